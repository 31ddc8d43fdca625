// The kernels of kernels/operands.cu, and that of adapters.cu which makes operands, on the host: the same threads, one
// after the other, barrier by barrier. Built by tests/test_kernel_layout.py. Same C interface; the stream is not looked
// at, and fp16 is refused, since only the device knows its conversions.
#include <memory>
#include <vector>

#include "operand_threads.cuh"

using namespace slope;

namespace {

struct ToBfloat16 {
  static uint32_t rounded(float value) {  // to nearest, of equally near the even one
    const uint32_t bits = bits_of(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;  // NaN
    return (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
  }
  static uint32_t pack(float low, float high) { return rounded(low) | rounded(high) << 16; }
};

Layer make_layer(int64_t out, int64_t in, int m) {
  Layer layer = {static_cast<int>(out), static_cast<int>(in), 0};
  while (1 << layer.log_m < m) ++layer.log_m;
  return layer;
}

template <int kLogM, Second kSecond>
void refresh_block(const RefreshPointers& at, const Layer& layer, int mb, int kb) {
  using Thread = RefreshThread<ToBfloat16, kLogM, kSecond>;
  auto shared = std::make_unique<typename Thread::Shared>();
  memset(static_cast<void*>(shared.get()), 0xa5, sizeof *shared);
  std::vector<Thread> threads;
  for (int t = 0; t < kThreads; ++t) threads.emplace_back(at, layer, *shared, mb, kb, t);
  for (Thread& thread : threads) thread.load();
  if constexpr (Thread::kScans) {
    for (Thread& thread : threads) thread.scan();
  }
  for (Thread& thread : threads) thread.choose();
  for (Thread& thread : threads) thread.store();
}

template <int kLogM, Second kSecond>
void refresh(const RefreshPointers& at, const Layer& layer) {
  for (int kb = 0; kb < blocks_of_columns(layer.out); ++kb) {
    for (int mb = 0; mb < blocks_of_rows(layer.in); ++mb) refresh_block<kLogM, kSecond>(at, layer, mb, kb);
  }
}

void refresh_layer(const RefreshPointers& at, const RefreshEntry& entry, bool rechoose) {
  const Layer layer = make_layer(entry.out, entry.in, entry.m);
  if (entry.m == 4) {
    rechoose ? refresh<2, Second::kChoose>(at, layer) : refresh<2, Second::kReuse>(at, layer);
  } else if (!rechoose) {
    refresh<0, Second::kReuse>(at, layer);
  } else if (entry.m <= 64) {
    refresh<0, Second::kChoose>(at, layer);
  } else {
    for (int i = 0; i < layer.in; ++i) {
      for (int group = 0; group < layer.out >> layer.log_m; ++group) {
        choose_long_group(at.values, at.mask, reinterpret_cast<uint16_t*>(at.second_kept), layer, i, group);
      }
    }
    refresh<0, Second::kKept>(at, layer);
  }
}

void adapter_operands(const AdapterOperands& layer, bool is_right, int block) {
  auto shared = std::make_unique<AdapterShared>();
  memset(static_cast<void*>(shared.get()), 0xa5, sizeof *shared);
  std::vector<AdapterThread<ToBfloat16>> threads;
  for (int t = 0; t < kThreads; ++t) threads.emplace_back(layer, is_right, *shared, block, t);
  for (int column = 0; column < layer.width; column += kTile) {
    for (auto& thread : threads) thread.load(column);
    for (auto& thread : threads) thread.store(column);
  }
}

template <class Source, int kLogM, bool kWide>
void gather(const GatherPointers& at, const Layer& layer) {
  constexpr int kRows = GatherThread<Source, kLogM, kWide>::kRows, kStep = 8;
  for (int block = 0; block < (layer.out + kRows * kStep - 1) / (kRows * kStep); ++block) {
    for (int y = 0; y < kStep; ++y) {
      for (int i = 0; i < (layer.in + 255) / 256 * 256; i += 8) {
        GatherThread<Source, kLogM, kWide>(at, layer, block * kRows * kStep + y, kStep, i).run();
      }
    }
  }
}

template <class Source, bool kWide>
void gather(const GatherPointers& at, const Layer& layer) {
  if (layer.log_m == 2) return gather<Source, 2, kWide>(at, layer);
  if (layer.log_m == 3) return gather<Source, 3, kWide>(at, layer);
  gather<Source, 0, kWide>(at, layer);
}

}  // namespace

extern "C" {

int slope_forward_metadata(const uint16_t* mask, uint32_t* metadata, int64_t out, int64_t in, int m, void*) {
  const Layer layer = make_layer(out, in, m);
  for (int kb = 0; kb < blocks_of_columns(layer.in); ++kb) {
    for (int mb = 0; mb < blocks_of_rows(layer.out); ++mb) {
      for (int t = 0; t < kWords; ++t) {
        metadata[word_of_block(kb, mb, layer.out) + t] = forward_word(mask, layer, kb, mb, t);
      }
    }
  }
  return 0;
}

int slope_refresh(const RefreshEntry* layers, int count, int dtype, int rechoose, void*) {
  if (dtype != 0) return 1;
  for (int i = 0; i < count; ++i) refresh_layer(layers[i].pointers(), layers[i], rechoose != 0);
  return 0;
}

int slope_adapter_operands(const AdapterOperands* layers, int count, int half, void*) {
  if (half) return 1;
  for (int i = 0; i < count; ++i) {
    if (!layers[i].rows_lie_apart()) return 1;
    for (bool is_right : {false, true}) {
      const int blocks = blocks_of_adapters(is_right ? layers[i].out : layers[i].in);
      for (int block = 0; block < blocks; ++block) adapter_operands(layers[i], is_right, block);
    }
  }
  return 0;
}

int slope_second_bits(const uint32_t* metadata, const uint32_t* second_kept, const uint16_t* mask, uint8_t* bits,
                      int64_t out, int64_t in, int m, void*) {
  const Layer layer = make_layer(out, in, m);
  for (int64_t byte = 0; byte < offset(layer.out, layer.values_per_row()) / 8; ++byte) {
    bits[byte] = second_bits_byte(metadata, second_kept, mask, layer, byte);
  }
  return 0;
}

int slope_set_second(const uint8_t* bits, const uint16_t* mask, uint32_t* metadata, uint32_t* second_kept, int64_t out,
                     int64_t in, int m, void*) {
  const Layer layer = make_layer(out, in, m);
  for (int kb = 0; kb < blocks_of_columns(layer.out); ++kb) {
    for (int mb = 0; mb < blocks_of_rows(layer.in); ++mb) {
      for (int t = 0; t < kWords; ++t) set_second_word(bits, mask, metadata, second_kept, layer, kb, mb, t);
    }
  }
  return 0;
}

int slope_gather(const void* gradient, int64_t row_stride, const uint16_t* mask, float* grad_values, int64_t out,
                 int64_t in, int m, int dtype, int accumulate, void*) {
  if (dtype == 1) return 1;
  const Layer layer = make_layer(out, in, m);
  const GatherPointers at = {gradient, row_stride, mask, grad_values, accumulate != 0};
  const bool wide = row_stride % 8 == 0 && reinterpret_cast<uintptr_t>(gradient) % 16 == 0;
  if (dtype == 0) {
    wide ? gather<FromBfloat16, true>(at, layer) : gather<FromBfloat16, false>(at, layer);
  } else {
    wide ? gather<FromFloat, true>(at, layer) : gather<FromFloat, false>(at, layer);
  }
  return 0;
}

}  // extern "C"
