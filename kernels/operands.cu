// The operands of the sparse products, made from a layer's values, and its weight gradient, taken into their places.
// operand_rules.cuh says what the arrays hold; kernels/layout.py says the same in torch.
//
// C interface. All pointers are to device memory, 16-byte aligned (the gradient of slope_gather may be less); `stream`
// is a cudaStream_t. Every function returns 0 or a cudaError_t, allocates nothing and waits for nothing. Sizes that no
// kernel here takes (see `make_layer`) give cudaErrorInvalidValue.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "operand_threads.cuh"

using namespace slope;

namespace {

struct ToBfloat16 {
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    const __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&two);
  }
};

struct ToFloat16 {
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    const __half2 two = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&two);
  }
};

struct FromFloat16 {
  using Bits = uint16_t;
  static __device__ __forceinline__ float value(Bits bits) { return __half2float(__ushort_as_half(bits)); }
};

enum Dtype { kBfloat16 = 0, kFloat16 = 1, kFloat32 = 2 };

constexpr int64_t kLargest = 1 << 21;   // either dimension: what a grid's second dimension reaches
constexpr int kLongestInTile = 6;  // log2 of the longest group that one tile chooses in

bool make_layer(int64_t out, int64_t in, int m, Layer* layer) {
  if (out <= 0 || in <= 0 || out > kLargest || in > kLargest || out % 16 != 0 || in % 16 != 0) return false;
  if (m < 4 || (m & (m - 1)) != 0 || out % m != 0 || in % m != 0) return false;
  *layer = {static_cast<int>(out), static_cast<int>(in), 0};
  while (1 << layer->log_m < m) ++layer->log_m;
  return true;
}

dim3 blocks_of(int rows, int columns) {
  return dim3(static_cast<unsigned>(blocks_of_rows(rows)), static_cast<unsigned>(blocks_of_columns(columns)));
}

// ------------------------------------------------------------------------------------------------------------ kernels
__global__ void __launch_bounds__(kWords) forward_metadata_kernel(const uint16_t* mask, uint32_t* words, Layer layer) {
  words[word_of_block(blockIdx.y, blockIdx.x, layer.out) + threadIdx.x] =
      forward_word(mask, layer, blockIdx.y, blockIdx.x, threadIdx.x);
}

// The layers of one launch; their blocks lie one after the other.
constexpr int kMostLayers = 48;  // the arguments of a kernel are at most 4 KiB

struct RefreshTable {
  RefreshPointers at[kMostLayers];
  Layer layer[kMostLayers];
  int first_block[kMostLayers];
  int count;
};
static_assert(sizeof(RefreshTable) <= 4096, "arguments of a kernel");

template <class Element, int kLogM, Second kSecond>
__global__ void __launch_bounds__(kThreads, 6) refresh_kernel(__grid_constant__ const RefreshTable table) {
  using Thread = RefreshThread<Element, kLogM, kSecond>;
  __shared__ typename Thread::Shared shared;
  const int block = static_cast<int>(blockIdx.x);
  int which = 0, end = table.count;  // the last layer whose first block is not after this one
  while (end - which > 1) {
    const int middle = (which + end) / 2;
    (table.first_block[middle] <= block ? which : end) = middle;
  }
  const RefreshPointers at = table.at[which];
  const Layer layer = table.layer[which];
  const int inside = block - table.first_block[which], wide = blocks_of_rows(layer.in);
  Thread thread(at, layer, shared, inside % wide, inside / wide, threadIdx.x);
  thread.load();
  if constexpr (Thread::kScans) {
    __syncthreads();
    thread.scan();
    __syncthreads();
  }
  thread.choose();
  __syncthreads();
  thread.store();
}

__global__ void choose_long_kernel(const float* values, const uint16_t* mask, uint16_t* second_kept, Layer layer) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < layer.in) choose_long_group(values, mask, second_kept, layer, i, blockIdx.y);
}

__global__ void __launch_bounds__(kWords) set_second_kernel(const uint8_t* bits, const uint16_t* mask,
                                                            uint32_t* metadata, uint32_t* second_kept, Layer layer) {
  set_second_word(bits, mask, metadata, second_kept, layer, blockIdx.y, blockIdx.x, threadIdx.x);
}

__global__ void second_bits_kernel(const uint32_t* metadata, const uint32_t* second_kept, const uint16_t* mask,
                                   uint8_t* bits, Layer layer, int64_t bytes) {
  const int64_t byte = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (byte < bytes) bits[byte] = second_bits_byte(metadata, second_kept, mask, layer, byte);
}

constexpr int kGatherRows = 8;  // threads of a block along out; 32 along in

template <class Source, int kLogM, bool kWide>
__global__ void __launch_bounds__(32 * kGatherRows) gather_kernel(GatherPointers at, Layer layer) {
  using Thread = GatherThread<Source, kLogM, kWide>;
  const int o = static_cast<int>(blockIdx.x * Thread::kRows * kGatherRows + threadIdx.y);
  const int i = static_cast<int>(blockIdx.y * 32 + threadIdx.x) * 8;
  Thread(at, layer, o, kGatherRows, i).run();
}

// ---------------------------------------------------------------------------------------------------------- launchers
template <class Element, int kLogM, Second kSecond>
void launch_refresh(RefreshTable* table, cudaStream_t stream) {
  int blocks = 0;
  for (int i = 0; i < table->count; ++i) {
    table->first_block[i] = blocks;
    blocks += blocks_of_rows(table->layer[i].in) * blocks_of_columns(table->layer[i].out);
  }
  refresh_kernel<Element, kLogM, kSecond><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(*table);
}

enum class Kind { kShort, kLong, kVeryLong };  // M = 4; up to what one tile chooses in; beyond

Kind kind_of(const Layer& layer) {
  return layer.log_m == 2 ? Kind::kShort : layer.log_m <= kLongestInTile ? Kind::kLong : Kind::kVeryLong;
}

// Layers of one kind.
template <class Element>
void refresh(RefreshTable* table, Kind kind, bool rechoose, cudaStream_t stream) {
  if (kind == Kind::kShort) {
    if (rechoose) return launch_refresh<Element, 2, Second::kChoose>(table, stream);
    return launch_refresh<Element, 2, Second::kReuse>(table, stream);
  }
  if (!rechoose) return launch_refresh<Element, 0, Second::kReuse>(table, stream);
  if (kind == Kind::kLong) return launch_refresh<Element, 0, Second::kChoose>(table, stream);
  for (int i = 0; i < table->count; ++i) {
    const RefreshPointers& at = table->at[i];
    const Layer& layer = table->layer[i];
    const dim3 blocks(static_cast<unsigned>((layer.in + 63) / 64), static_cast<unsigned>(layer.out >> layer.log_m));
    choose_long_kernel<<<blocks, 64, 0, stream>>>(at.values, at.mask, reinterpret_cast<uint16_t*>(at.second_kept),
                                                  layer);
  }
  launch_refresh<Element, 0, Second::kKept>(table, stream);
}

template <class Source, int kLogM, bool kWide>
void launch_gather(const GatherPointers& at, const Layer& layer, cudaStream_t stream) {
  constexpr int kOuts = GatherThread<Source, kLogM, kWide>::kRows * kGatherRows;
  const dim3 blocks(static_cast<unsigned>((layer.out + kOuts - 1) / kOuts),
                    static_cast<unsigned>((layer.in + 255) / 256));
  gather_kernel<Source, kLogM, kWide><<<blocks, dim3(32, kGatherRows), 0, stream>>>(at, layer);
}

template <class Source, bool kWide>
void gather_rows(const GatherPointers& at, const Layer& layer, cudaStream_t stream) {
  if (layer.log_m == 2) return launch_gather<Source, 2, kWide>(at, layer, stream);
  if (layer.log_m == 3) return launch_gather<Source, 3, kWide>(at, layer, stream);
  launch_gather<Source, 0, kWide>(at, layer, stream);
}

template <class Source>
void gather(const GatherPointers& at, const Layer& layer, cudaStream_t stream) {
  const bool wide = at.row_stride % 8 == 0 && reinterpret_cast<uintptr_t>(at.gradient) % 16 == 0;
  if (wide) return gather_rows<Source, true>(at, layer, stream);
  gather_rows<Source, false>(at, layer, stream);
}

int launched() { return static_cast<int>(cudaGetLastError()); }

}  // namespace

extern "C" {

// Makes a device the calling thread's, with a context: this library's runtime knows of no other choice of the program.
int slope_set_device(int device) { return cudaSetDevice(device); }

// Metadata of W^R, uint32 [in/64 rounded up][out/256 rounded up * 4][128]. Once per mask.
int slope_forward_metadata(const void* mask_bits, void* metadata, int64_t out, int64_t in, int m, void* stream) {
  Layer layer;
  if (!make_layer(out, in, m, &layer)) return cudaErrorInvalidValue;
  forward_metadata_kernel<<<blocks_of(layer.out, layer.in), kWords, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const uint16_t*>(mask_bits), static_cast<uint32_t*>(metadata), layer);
  return launched();
}

// Both operands of each of `count` layers from its values, in one pass, in as few launches as their addresses fit in.
//   forward    W^R, [out, in/2] bf16 (dtype 0) or fp16 (1), or null where it is not wanted
//   metadata   of W^{R,C} transposed, uint32 [out/64 rounded up][in/256 rounded up * 4][128]
//   second_kept  as large as `metadata`; only for M > 4, null for M = 4
//   backward   W^{R,C} transposed, [in, out/2], its rows `backward_stride` entries apart, a multiple of 8
// With `rechoose`, W^{R,C} keeps of every column and every M outs the 2 largest magnitudes of W^R (of equals the
// earlier), and `metadata` and `second_kept` are written; without, they say what it keeps.
int slope_refresh(const RefreshEntry* layers, int count, int dtype, int rechoose, void* stream) {
  if (dtype != kBfloat16 && dtype != kFloat16) return cudaErrorInvalidValue;
  Layer layer;
  for (int i = 0; i < count; ++i) {
    const RefreshEntry& entry = layers[i];
    if (!make_layer(entry.out, entry.in, entry.m, &layer)) return cudaErrorInvalidValue;
    if ((entry.second_kept == nullptr) != (entry.m == 4)) return cudaErrorInvalidValue;
    if (entry.backward_stride < entry.out / 2 || entry.backward_stride % 8 != 0) return cudaErrorInvalidValue;
  }
  RefreshTable table;
  for (const Kind kind : {Kind::kShort, Kind::kLong, Kind::kVeryLong}) {
    table.count = 0;
    const auto launch = [&] {
      if (table.count == 0) return;
      if (dtype == kBfloat16) refresh<ToBfloat16>(&table, kind, rechoose != 0, static_cast<cudaStream_t>(stream));
      if (dtype == kFloat16) refresh<ToFloat16>(&table, kind, rechoose != 0, static_cast<cudaStream_t>(stream));
      table.count = 0;
    };
    for (int i = 0; i < count; ++i) {
      const RefreshEntry& entry = layers[i];
      make_layer(entry.out, entry.in, entry.m, &layer);
      if (kind_of(layer) != kind) continue;
      table.layer[table.count] = layer;
      table.at[table.count++] = entry.pointers();
      if (table.count == kMostLayers) launch();
    }
    launch();
  }
  return launched();
}

// Which values W^{R,C} keeps, one bit a value in the order of `values`, lowest bit first: what a checkpoint holds.
int slope_second_bits(const void* metadata, const void* second_kept, const void* mask_bits, void* bits, int64_t out,
                      int64_t in, int m, void* stream) {
  Layer layer;
  if (!make_layer(out, in, m, &layer) || (second_kept == nullptr) != (m == 4)) return cudaErrorInvalidValue;
  const int64_t bytes = offset(layer.out, layer.values_per_row()) / 8;
  second_bits_kernel<<<static_cast<unsigned>((bytes + 127) / 128), 128, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const uint32_t*>(metadata), static_cast<const uint32_t*>(second_kept),
      static_cast<const uint16_t*>(mask_bits), static_cast<uint8_t*>(bits), layer, bytes);
  return launched();
}

// The inverse: `metadata` and, for M > 4, `second_kept` from one bit a value. The bits must be a choice of the second
// pruning: at most 2 of M in a column and, with M = 4, no fewer than the smaller of 2 and what the mask keeps there.
int slope_set_second(const void* bits, const void* mask_bits, void* metadata, void* second_kept, int64_t out,
                     int64_t in, int m, void* stream) {
  Layer layer;
  if (!make_layer(out, in, m, &layer) || (second_kept == nullptr) != (m == 4)) return cudaErrorInvalidValue;
  set_second_kernel<<<blocks_of(layer.in, layer.out), kWords, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const uint8_t*>(bits), static_cast<const uint16_t*>(mask_bits), static_cast<uint32_t*>(metadata),
      static_cast<uint32_t*>(second_kept), layer);
  return launched();
}

// The kept positions of a dense weight gradient [out, in] (rows `row_stride` elements apart; dtype 0 bf16, 1 fp16,
// 2 fp32) as fp32 in the order of `values`: written, or with `accumulate` added.
int slope_gather(const void* gradient, int64_t row_stride, const void* mask_bits, void* grad_values, int64_t out,
                 int64_t in, int m, int dtype, int accumulate, void* stream) {
  Layer layer;
  if (!make_layer(out, in, m, &layer) || row_stride < in) return cudaErrorInvalidValue;
  const GatherPointers at = {gradient, row_stride, static_cast<const uint16_t*>(mask_bits),
                             static_cast<float*>(grad_values), accumulate != 0};
  switch (dtype) {
    case kBfloat16:
      gather<FromBfloat16>(at, layer, static_cast<cudaStream_t>(stream));
      break;
    case kFloat16:
      gather<FromFloat16>(at, layer, static_cast<cudaStream_t>(stream));
      break;
    case kFloat32:
      gather<FromFloat>(at, layer, static_cast<cudaStream_t>(stream));
      break;
    default:
      return cudaErrorInvalidValue;
  }
  return launched();
}

}  // extern "C"
