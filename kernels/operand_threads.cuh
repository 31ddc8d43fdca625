// What one thread of the kernels for operands and for gathering does, between two barriers each. Host and device alike,
// as operand_rules.cuh: on a host, run each phase for all threads of a block before the next phase.
//
// The refresh reads a layer's values once and writes both operands. A block takes 64 outs x 64 ins, a thread 4 x 4 of
// them: thread t has ins 4*(t%16) .. + 3 and outs 4*(t/16) .. + 3 of the tile. The transposed operand goes through
// shared memory, so that its rows, too, are written in pieces of 64 bytes.
#pragma once

#include "operand_rules.cuh"

namespace slope {

// Where the positions of W^{R,C} come from.
enum class Second {
  kChoose,  // the magnitudes: choose anew, write the metadata and, for M > 4, second_kept
  kKept,    // second_kept: write the metadata
  kReuse,   // the metadata and, for M > 4, second_kept, as they are
};

struct RefreshPointers {
  const float* values;
  const uint16_t* mask;
  uint32_t* forward;  // two entries a word; null: not wanted
  uint32_t* metadata;
  uint32_t* second_kept;  // null for M = 4
  uint32_t* backward;     // two entries a word
  int backward_words;     // from one of its rows to the next
};

// One layer of slope_refresh; kernels/native.py packs the same fields in the same order.
struct RefreshEntry {
  const void *values, *mask_bits;
  void *forward, *metadata, *second_kept, *backward;
  int64_t out, in;
  int32_t m, backward_stride;  // of the rows of `backward`, in entries

  SLOPE_RULE RefreshPointers pointers() const {
    return {static_cast<const float*>(values),    static_cast<const uint16_t*>(mask_bits),
            static_cast<uint32_t*>(forward),      static_cast<uint32_t*>(metadata),
            static_cast<uint32_t*>(second_kept),  static_cast<uint32_t*>(backward),
            backward_stride / 2};
  }
};

struct alignas(8) TwoFloats {
  float a, b;
};

struct alignas(16) FourWords {
  uint32_t words[4];
};

template <bool kKeys>
struct RefreshShared {
  uint32_t entries[kTile][17];  // [in][group of 4 outs]: a pair of entries; 17, so that columns spread over the banks
  uint32_t groups[kTile][5];    // [in][group of 4 outs] in bytes: nibble | second_kept << 4; 5 for the same reason
  uint32_t keys[kKeys ? kTile : 1][kTile];  // [out][in]

  SLOPE_RULE uint8_t& group(int in, int quad) { return reinterpret_cast<uint8_t*>(groups[in])[quad]; }
};

// kLogM is 2 for M = 4, or 0: any larger M, told at run time (up to 64 where it chooses).
// Element::pack(low, high) rounds two floats into a word of two entries.
template <class Element, int kLogM, Second kSecond>
struct RefreshThread {
  static constexpr bool kShort = kLogM == 2;
  static constexpr bool kScans = !kShort && kSecond == Second::kChoose;
  using Shared = RefreshShared<kScans>;

  const RefreshPointers& at;
  const Layer& layer;
  Shared& shared;
  const int mb, kb, thread, quad_in, quad_out;
  bool inside;        // the tile may reach beyond the matrix; a thread's 4 x 4 does not
  uint32_t kept[4];   // a nibble of the mask for each out
  TwoFloats two[4];   // the values it keeps, at most 2
  float x[4][4];      // [out][in], 0 where the mask prunes

  SLOPE_RULE RefreshThread(const RefreshPointers& pointers, const Layer& its_layer, Shared& its_shared, int block_in,
                           int block_out, int its_thread)
      : at(pointers),
        layer(its_layer),
        shared(its_shared),
        mb(block_in),
        kb(block_out),
        thread(its_thread),
        quad_in(its_thread % 16),
        quad_out(its_thread / 16) {
    inside = first_in() < layer.in && first_out() < layer.out;
  }

  SLOPE_RULE int first_in() const { return mb * kTile + 4 * quad_in; }
  SLOPE_RULE int first_out() const { return kb * kTile + 4 * quad_out; }
  SLOPE_RULE int64_t first_word() const { return word_of_block(kb, mb, layer.in); }

  // Phase 1: values to registers, the forward operand, and for M > 4 the keys of the choice.
  SLOPE_RULE void load() {
    for (int r = 0; r < 4; ++r) kept[r] = 0, two[r] = {0.0f, 0.0f};
    if (inside) {
      read_values();
      for (int r = 0; r < 4; ++r) kept[r] = kept[r] >> (4 * quad_in & 15) & 0xfu;
    }
    for (int r = 0; r < 4; ++r) place(r);
    if (at.forward != nullptr && inside) write_forward();
    if constexpr (kScans) {
      for (int r = 0; r < 4; ++r) {
        for (int j = 0; j < 4; ++j) shared.keys[4 * quad_out + r][4 * quad_in + j] = key(r, j);
      }
    }
  }

  // All loads, before anything that waits for one.
  SLOPE_RULE void read_values() {
    const uint16_t* mask = at.mask + offset(first_out(), layer.in >> 4) + (first_in() >> 4);
    for (int r = 0; r < 4; ++r) kept[r] = mask[offset(r, layer.in >> 4)];
    if constexpr (kShort) {
      const float* from = at.values + offset(first_out(), layer.in >> 1) + (first_in() >> 1);
      for (int r = 0; r < 4; ++r) two[r] = *reinterpret_cast<const TwoFloats*>(from + offset(r, layer.in >> 1));
    } else {
      for (int r = 0; r < 4; ++r) {
        const int count = count_bits(kept[r] >> (4 * quad_in & 15) & 0xfu);
        if (count == 0) continue;
        const float* from = at.values + value_index(at.mask, layer, first_out() + r, first_in());
        two[r].a = from[0];
        if (count == 2) two[r].b = from[1];
      }
    }
  }

  SLOPE_RULE bool keeps(int r, int j) const { return (kept[r] >> j & 1) != 0; }

  SLOPE_RULE uint32_t key(int r, int j) const { return keeps(r, j) ? key_of_kept(x[r][j]) : kKeyOfPruned; }

  SLOPE_RULE void place(int r) {
    if constexpr (kShort) {  // two of the four are kept
      x[r][0] = keeps(r, 0) ? two[r].a : 0.0f;
      x[r][1] = keeps(r, 1) ? (keeps(r, 0) ? two[r].b : two[r].a) : 0.0f;
      x[r][2] = keeps(r, 2) ? (keeps(r, 3) ? two[r].a : two[r].b) : 0.0f;
      x[r][3] = keeps(r, 3) ? two[r].b : 0.0f;
    } else {
      for (int j = 0; j < 4; ++j) {
        x[r][j] = keeps(r, j) ? (kept[r] & ((1u << j) - 1) ? two[r].b : two[r].a) : 0.0f;
      }
    }
  }

  SLOPE_RULE void write_forward() {
    uint32_t* to = at.forward + offset(first_out(), layer.in >> 2) + (first_in() >> 2);
    for (int r = 0; r < 4; ++r) {
      if constexpr (!kShort) {
        const Pair pair = complete_pair(kept[r], kept[r]);
        two[r] = {pair.low(x[r][0], x[r][1], x[r][2]), pair.high(x[r][1], x[r][2], x[r][3])};
      }
      to[offset(r, layer.in >> 2)] = Element::pack(two[r].a, two[r].b);
    }
  }

  // Phase 2, only where kScans: one thread takes one in and one group of M outs.
  SLOPE_RULE void scan() {
    const int m = 1 << layer.log_m;
    for (int task = thread; task < (kTile * kTile >> layer.log_m); task += kThreads) {
      const int in = task % kTile, start = task / kTile << layer.log_m;
      TopTwo best;
      for (int k = 0; k < m; ++k) best.see(shared.keys[start + k][in], k);
      for (int k = 0; k < m; k += 4) shared.group(in, (start + k) / 4) = static_cast<uint8_t>(best.members(k, 4));
    }
  }

  // Phase 3: the pair of each in, its entries and its nibble to shared memory.
  SLOPE_RULE void choose() {
    for (int j = 0; j < 4; ++j) {
      const int in = 4 * quad_in + j;
      float y[4] = {x[0][j], x[1][j], x[2][j], x[3][j]};
      Pair pair;
      uint32_t second = 0;
      if constexpr (kShort) {  // free positions hold zeros, since the mask prunes them all
        const uint32_t keys[4] = {key(0, j), key(1, j), key(2, j), key(3, j)};
        pair = kSecond == Second::kChoose ? highest_pair(keys) : Pair::of_nibble(stored(at.metadata, in));
      } else {
        second = kScans ? shared.group(in, quad_out) : stored(at.second_kept, in);
        for (int r = 0; r < 4; ++r) y[r] = second >> r & 1 ? y[r] : 0.0f;
        uint32_t first_mask = 0;
        for (int r = 0; r < 4; ++r) first_mask |= (kept[r] >> j & 1) << r;
        pair = complete_pair(second, first_mask);
      }
      shared.entries[in][quad_out] = Element::pack(pair.low(y[0], y[1], y[2]), pair.high(y[1], y[2], y[3]));
      if constexpr (kSecond != Second::kReuse) {
        shared.group(in, quad_out) = static_cast<uint8_t>(pair.nibble() + (second << 4));
      }
    }
  }

  SLOPE_RULE uint32_t stored(const uint32_t* words, int in) const {
    const int64_t word = first_word() + word_in_block(in, 4 * quad_out);
    return inside ? words[word] >> shift_in_word(in, 4 * quad_out) & 0xfu : 0;
  }

  // Phase 4: the transposed operand, 16 bytes a thread, and the metadata words.
  SLOPE_RULE void store() {
    const int in = thread / 4, chunk = thread % 4;
    const int i = mb * kTile + in, o = kb * kTile + 16 * chunk;
    if (i < layer.in && o < layer.out) {
      FourWords four;
      for (int k = 0; k < 4; ++k) four.words[k] = shared.entries[in][4 * chunk + k];
      *reinterpret_cast<FourWords*>(at.backward + offset(i, at.backward_words) + (o >> 2)) = four;
    }
    if (kSecond != Second::kReuse && thread < kWords) {
      const int row = thread / 32 * 16 + thread % 32 / 4, quarter = thread % 4;
      const uint32_t low = shared.groups[row][quarter], high = shared.groups[row + 8][quarter];
      at.metadata[first_word() + thread] = pack_nibbles(low) | pack_nibbles(high) << 16;
      if constexpr (!kShort) {
        at.second_kept[first_word() + thread] = pack_nibbles(low >> 4) | pack_nibbles(high >> 4) << 16;
      }
    }
  }
};

// ------------------------------------------------------------------------------------------------ gradient to values
struct FromFloat {
  using Bits = uint32_t;
  static SLOPE_RULE float value(Bits bits) { return float_of(bits); }
};

struct FromBfloat16 {
  using Bits = uint16_t;
  static SLOPE_RULE float value(Bits bits) { return float_of(uint32_t{bits} << 16); }
};

template <class Source>
struct alignas(16) EightOf {
  typename Source::Bits bits[8];
};

struct alignas(16) FourFloats {
  float x[4];
};

struct GatherPointers {
  const void* gradient;
  int64_t row_stride;  // of the gradient, in elements
  const uint16_t* mask;
  float* values;
  bool accumulate;
};

// One thread: eight ins of a few outs, all read before the first is written.
// kLogM is 2 or 3, or 0: any larger M. kWide: eight elements of the gradient can be read at once.
template <class Source, int kLogM, bool kWide>
struct GatherThread {
  static constexpr int kRows = 2;
  using Eight = EightOf<Source>;

  const GatherPointers& at;
  const Layer& layer;
  const int out, step, in;  // outs out, out + step, ..; ins in .. + 7
  Eight eight[kRows];
  uint32_t kept[kRows];
  FourFloats old[kRows];  // kLogM == 3 uses half of it

  SLOPE_RULE GatherThread(const GatherPointers& pointers, const Layer& its_layer, int first_out, int its_step,
                          int first_in)
      : at(pointers), layer(its_layer), out(first_out), step(its_step), in(first_in) {}

  SLOPE_RULE void run() {
    for (int r = 0; r < kRows; ++r) {
      if (in < layer.in && out + r * step < layer.out) load(r, out + r * step);
    }
    for (int r = 0; r < kRows; ++r) {
      if (in < layer.in && out + r * step < layer.out) store(r, out + r * step);
    }
  }

  SLOPE_RULE void load(int r, int o) {
    const auto* from = static_cast<const typename Source::Bits*>(at.gradient) + o * at.row_stride + in;
    if constexpr (kWide) {
      eight[r] = *reinterpret_cast<const Eight*>(from);
    } else {
      for (int k = 0; k < 8; ++k) eight[r].bits[k] = from[k];
    }
    kept[r] = mask_word(at.mask, layer, o, in) >> (in & 15) & 0xffu;
    old[r] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (!at.accumulate) return;
    if constexpr (kLogM == 2) {
      old[r] = *reinterpret_cast<const FourFloats*>(destination(o));
    } else if constexpr (kLogM == 3) {
      const TwoFloats two = *reinterpret_cast<const TwoFloats*>(destination(o));
      old[r] = {two.a, two.b, 0.0f, 0.0f};
    }
  }

  SLOPE_RULE float* destination(int o) const {
    if constexpr (kLogM == 0) {
      return at.values + value_index(at.mask, layer, o, in);
    } else {
      return at.values + offset(o, layer.in >> (kLogM - 1)) + (in >> (kLogM - 1));
    }
  }

  SLOPE_RULE void store(int r, int o) {
    if constexpr (kLogM == 2) {
      const TwoFloats low = picked<4>(r, 0), high = picked<4>(r, 4);
      const float* before = old[r].x;
      *reinterpret_cast<FourFloats*>(destination(o)) = {before[0] + low.a, before[1] + low.b, before[2] + high.a,
                                                        before[3] + high.b};
    } else if constexpr (kLogM == 3) {
      const TwoFloats two = picked<8>(r, 0);
      *reinterpret_cast<TwoFloats*>(destination(o)) = {old[r].x[0] + two.a, old[r].x[1] + two.b};
    } else if (kept[r] != 0) {
      const TwoFloats two = picked<8>(r, 0);
      float* to = destination(o);
      to[0] = two.a + (at.accumulate ? to[0] : 0.0f);
      if (count_bits(kept[r]) == 2) to[1] = two.b + (at.accumulate ? to[1] : 0.0f);
    }
  }

  // The at most two kept of `kCount` neighbours from the `start`-th of the eight on.
  template <int kCount>
  SLOPE_RULE TwoFloats picked(int r, int start) const {
    TwoFloats two = {0.0f, 0.0f};
    const uint32_t here = kept[r] >> start;
    for (int k = 0; k < kCount; ++k) {
      if ((here >> k & 1) == 0) continue;
      (here & ((1u << k) - 1) ? two.b : two.a) = Source::value(eight[r].bits[start + k]);
    }
    return two;
  }
};

// ------------------------------------------------------------------------------------------- adapters to operands
// What the products read of a layer's L [in, rank] and R [rank, out]. Columns c of L and rows c of R / rank stand at
// spread_row(c) of the first two, with zeros in all others, and as they are in the last two, with zeros from `rank` to
// `width`, which is even. Rows may lie apart, so that layers of one input have joint operands; what is between is left
// alone. kernels/native.py packs the same fields in the same order.
struct AdapterOperands {
  const float *left, *right;
  void *left_rows, *right_rows;  // [2 width, in], [2 width, out]
  void *left_kept, *right_kept;  // [in, width], [out, width]
  int32_t in, out, rank, width;
  int32_t left_rows_stride, right_rows_stride, left_kept_stride, right_kept_stride;  // from row to row, in elements

  SLOPE_RULE bool rows_lie_apart() const {
    return left_rows_stride >= in && right_rows_stride >= out && left_kept_stride >= width &&
           right_kept_stride >= width;
  }
};

// Where the 2:4 product reads column c: its groups of four keep positions 0 and 1.
SLOPE_RULE int spread_row(int c) { return c / 2 * 4 + c % 2; }

SLOPE_RULE int blocks_of_adapters(int rows) { return (rows + kTile - 1) / kTile; }

struct AdapterShared {
  uint16_t tile[kTile][kTile + 2];  // [column][row]; 2, so that rows spread over the banks
};

// A block takes 64 rows of L, or of R^T where it is the right side, 64 columns at a time. Through shared memory, so
// that both the matrix and its transpose are read and written along their rows. Element::rounded(float) gives bits.
template <class Element>
struct AdapterThread {
  const AdapterOperands& layer;
  AdapterShared& shared;
  const bool is_right;
  const int rows, first, thread;
  uint16_t *const spread, *const kept;
  const int spread_stride, kept_stride;

  SLOPE_RULE AdapterThread(const AdapterOperands& its_layer, bool right, AdapterShared& its_shared, int block,
                           int its_thread)
      : layer(its_layer),
        shared(its_shared),
        is_right(right),
        rows(right ? its_layer.out : its_layer.in),
        first(block * kTile),
        thread(its_thread),
        spread(static_cast<uint16_t*>(right ? its_layer.right_rows : its_layer.left_rows)),
        kept(static_cast<uint16_t*>(right ? its_layer.right_kept : its_layer.left_kept)),
        spread_stride(right ? its_layer.right_rows_stride : its_layer.left_rows_stride),
        kept_stride(right ? its_layer.right_kept_stride : its_layer.left_kept_stride) {}

  SLOPE_RULE int columns_from(int column) const { return layer.width - column < kTile ? layer.width - column : kTile; }

  // Phase 1 of the columns from `column` on.
  SLOPE_RULE void load(int column) const {
    const int columns = columns_from(column);
    for (int i = thread; i < kTile * columns; i += kThreads) {
      const int r = is_right ? i % kTile : i / columns, c = is_right ? i / kTile : i % columns;
      const bool exists = first + r < rows && column + c < layer.rank;
      float value = 0;
      if (exists && is_right) value = layer.right[offset(column + c, rows) + first + r] / float(layer.rank);
      if (exists && !is_right) value = layer.left[offset(first + r, layer.rank) + column + c];
      shared.tile[c][r] = Element::rounded(value);
    }
  }

  // Phase 2; before the next columns, another barrier.
  SLOPE_RULE void store(int column) const {
    const int columns = columns_from(column);
    for (int i = thread; i < kTile * columns; i += kThreads) {
      const int r = i / columns, c = i % columns;
      if (first + r < rows) kept[offset(first + r, kept_stride) + column + c] = shared.tile[c][r];
    }
    for (int i = thread; i < kTile * columns; i += kThreads) {
      const int r = i % kTile, c = i / kTile;
      if (first + r >= rows) continue;
      uint16_t* const to = spread + offset(spread_row(column + c), spread_stride) + first + r;
      to[0] = shared.tile[c][r];
      to[offset(2, spread_stride)] = 0;  // a row that nothing stands at
    }
  }
};

}  // namespace slope
