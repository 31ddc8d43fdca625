// The rules of the 2:4 operands, for host and device alike: the kernels of operands.cu are thin over this file, so a
// host compiler can run every thread of them one by one and hold them against kernels/layout.py.
//
// A layer: W^R [out, in], 2 of every M along in. `values` [out, in*2/M], fp32, in position order; `mask` one bit a
// weight, row-major, lowest bit first. M is a power of two >= 4 that divides both dimensions; both are multiples of 16.
//
// An operand: a matrix [rows, columns] with 2 of every 4 along columns. Its entries, [rows, columns/2], are in position
// order; a group with fewer than 2 is filled with zeros at free positions. The nibble of a group is idx0 | idx1 << 2,
// idx0 < idx1. Sixteen columns make a 16-bit word, lowest group in the lowest bits. Words are stored in the fragment
// order of wgmma.m64nNk32.sp: uint32 [columns/64 rounded up][rows/256 rounded up * 4][128]; thread t of block (kb, mb)
// holds row mb*64 + t/32*16 + t%32/4, columns kb*64 + t%4*16 .. + 15 in its low half, and row + 8 in its high half.
// Out of range, a nibble is 4 (positions 0 and 1).
//
// Free positions: those that the first mask does not keep, lowest first; only where these do not suffice, others,
// lowest first. With M = 4 they always suffice, so the nibble and the mask together tell what the second pruning
// keeps. With M > 4 they do not (a column can keep 4 of 4 neighbours that belong to larger groups), so what it keeps
// is stored beside the metadata: `second_kept`, the same words with one bit a position instead of two indices.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define SLOPE_RULE __host__ __device__ __forceinline__
#else
#define SLOPE_RULE inline
#endif

namespace slope {

constexpr int kTile = 64;      // a block works on 64 outs x 64 ins: one block of metadata words
constexpr int kThreads = 256;  // a thread of it on 4 outs x 4 ins
constexpr int kWords = 128;    // metadata words of a block

// ------------------------------------------------------------------------------------------------------ bits of words
SLOPE_RULE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

SLOPE_RULE float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

SLOPE_RULE int count_bits(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __popc(bits);
#else
  return __builtin_popcount(bits);
#endif
}

// The low nibbles of four bytes as one 16-bit word.
SLOPE_RULE uint32_t pack_nibbles(uint32_t bytes) {
  bytes &= 0x0f0f0f0fu;
  bytes = (bytes | bytes >> 4) & 0x00ff00ffu;
  return (bytes | bytes >> 8) & 0xffffu;
}

// -------------------------------------------------------------------------------------------------- groups of four
// Which two of a group's four positions hold its entries. Flags, not bits: they stay in predicate registers.
struct Pair {
  bool at0, at1, at2, at3;

  static SLOPE_RULE Pair of_bits(uint32_t bits) {
    return {(bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0, (bits & 8) != 0};
  }

  static SLOPE_RULE Pair of_nibble(uint32_t nibble) { return of_bits(1u << (nibble & 3) | 1u << (nibble >> 2 & 3)); }

  SLOPE_RULE uint32_t nibble() const { return (at0 ? 0u : at1 ? 1u : 2u) + (at3 ? 12u : at2 ? 8u : 4u); }
  SLOPE_RULE float low(float x0, float x1, float x2) const { return at0 ? x0 : at1 ? x1 : x2; }
  SLOPE_RULE float high(float x1, float x2, float x3) const { return at3 ? x3 : at2 ? x2 : x1; }
};

SLOPE_RULE bool in_nibble(uint32_t nibble, uint32_t position) {
  return (nibble & 3) == position || nibble >> 2 == position;
}

// The kept positions, at most two, and as many free ones as complete them to two.
SLOPE_RULE Pair complete_pair(uint32_t kept, uint32_t first_mask) {
  for (int step = 0; step < 2; ++step) {
    uint32_t free = ~(kept | first_mask) & 0xfu;
    if (free == 0) free = ~kept & 0xfu;
    if (count_bits(kept) < 2) kept |= free & (0u - free);
  }
  return Pair::of_bits(kept);
}

// ------------------------------------------------------------------------------------------------ the second pruning
// The key orders by magnitude, a kept zero before a pruned position, NaN before everything; equals by position.
SLOPE_RULE uint32_t key_of_kept(float value) { return bits_of(value) * 2 + 1; }

constexpr uint32_t kKeyOfPruned = 0;

SLOPE_RULE bool two_of(bool a, bool b, bool c) { return (a & b) | (c & (a | b)); }

// The pair of the two highest of four keys, of equals the earlier. Pruned positions have key 0, so where fewer than two
// are kept, the pair is completed with the lowest pruned ones: complete_pair's rule.
SLOPE_RULE Pair highest_pair(const uint32_t (&key)[4]) {
  const bool over01 = key[1] > key[0], over02 = key[2] > key[0], over03 = key[3] > key[0];
  const bool over12 = key[2] > key[1], over13 = key[3] > key[1], over23 = key[3] > key[2];
  return {!two_of(over01, over02, over03), !two_of(!over01, over12, over13), !two_of(!over02, !over12, over23),
          !two_of(!over03, !over13, !over23)};
}

// The two highest keys of a longer group, shown one by one in position order.
struct TopTwo {
  uint32_t key1 = 0, key2 = 0;  // 0: none
  int position1 = 0, position2 = 0;

  SLOPE_RULE void see(uint32_t key, int position) {
    if (key > key1) {
      key2 = key1, position2 = position1;
      key1 = key, position1 = position;
    } else if (key > key2) {
      key2 = key, position2 = position;
    }
  }

  // Which of `count` positions from `start` on are among the two.
  SLOPE_RULE uint32_t members(int start, int count) const {
    const int offset1 = position1 - start, offset2 = position2 - start;
    uint32_t bits = 0;
    if (key1 != 0 && offset1 >= 0 && offset1 < count) bits |= 1u << offset1;
    if (key2 != 0 && offset2 >= 0 && offset2 < count) bits |= 1u << offset2;
    return bits;
  }
};

// -------------------------------------------------------------------------------------------------- places in memory
struct Layer {
  int out, in, log_m;

  SLOPE_RULE int values_per_row() const { return in >> (log_m - 1); }
};

// Rows and strides fit 32 bits, their products do not.
SLOPE_RULE int64_t offset(int row, int stride) { return static_cast<int64_t>(row) * stride; }

// 16 bits of the mask: row `o`, columns `i`/16*16 .. + 15.
SLOPE_RULE uint32_t mask_word(const uint16_t* mask, const Layer& layer, int o, int i) {
  return mask[offset(o, layer.in >> 4) + (i >> 4)];
}

SLOPE_RULE bool mask_keeps(const uint16_t* mask, const Layer& layer, int o, int i) {
  return (mask_word(mask, layer, o, i) >> (i & 15) & 1) != 0;
}

// Index in `values` of the first kept weight of row `o` at or behind column `i`, within its group of M.
SLOPE_RULE int64_t value_index(const uint16_t* mask, const Layer& layer, int o, int i) {
  const int group = i >> layer.log_m, start = group << layer.log_m;
  int before = 0;
  for (int column = start & ~15; column <= i; column += 16) {
    uint32_t word = mask_word(mask, layer, o, column);
    if (column < start) word &= ~((1u << (start - column)) - 1);
    if (i - column < 16) word &= (1u << (i - column)) - 1;
    before += count_bits(word);
  }
  return offset(o, layer.values_per_row()) + 2 * group + before;
}

SLOPE_RULE int blocks_of_columns(int columns) { return (columns + kTile - 1) >> 6; }

SLOPE_RULE int blocks_of_rows(int rows) { return (rows + 255) >> 8 << 2; }

// Word and shift of the nibble of (row, column), both within their block of 64 x 64.
SLOPE_RULE int word_in_block(int row, int column) { return (row >> 4) * 32 + (row & 7) * 4 + (column >> 4); }

SLOPE_RULE int shift_in_word(int row, int column) { return (row >> 3 & 1) * 16 + (column >> 2 & 3) * 4; }

// The first word of block (kb, mb) of a matrix of `rows` rows.
SLOPE_RULE int64_t word_of_block(int kb, int mb, int rows) {
  return (offset(kb, blocks_of_rows(rows)) + mb) * kWords;
}

SLOPE_RULE uint32_t stored_nibble(const uint32_t* words, int rows, int row, int column) {
  const int64_t word = word_of_block(column >> 6, row >> 6, rows) + word_in_block(row & 63, column & 63);
  return words[word] >> shift_in_word(row, column) & 0xfu;
}

// Row and first column of one half of metadata word `t` of block (kb, mb).
struct HalfWord {
  int row, column;

  SLOPE_RULE HalfWord(int kb, int mb, int t, int half)
      : row(mb * kTile + t / 32 * 16 + t % 32 / 4 + half * 8), column(kb * kTile + t % 4 * 16) {}
};

// ------------------------------------------------------------------------------------------- metadata without speed
// One word of W^R's metadata.
SLOPE_RULE uint32_t forward_word(const uint16_t* mask, const Layer& layer, int kb, int mb, int t) {
  uint32_t word = 0;
  for (int half = 0; half < 2; ++half) {
    const HalfWord at(kb, mb, t, half);
    const bool inside = at.row < layer.out && at.column < layer.in;
    const uint32_t kept = inside ? mask_word(mask, layer, at.row, at.column) : 0;
    for (int group = 0; group < 4; ++group) {
      const uint32_t quad = kept >> 4 * group & 0xfu;
      word |= complete_pair(quad, quad).nibble() << (16 * half + 4 * group);
    }
  }
  return word;
}

// One word of the transposed metadata, and of `second_kept` unless it is null, from one bit a value.
SLOPE_RULE void set_second_word(const uint8_t* bits, const uint16_t* mask, uint32_t* metadata, uint32_t* second_kept,
                                const Layer& layer, int kb, int mb, int t) {
  uint32_t nibbles = 0, kept = 0;
  for (int half = 0; half < 2; ++half) {
    const HalfWord at(kb, mb, t, half);  // its rows are ins, its columns outs
    const bool inside = at.row < layer.in && at.column < layer.out;
    for (int group = 0; group < 4; ++group) {
      uint32_t first = 0, second = 0;
      for (int k = 0; inside && k < 4; ++k) {
        const int o = at.column + 4 * group + k;
        if (!mask_keeps(mask, layer, o, at.row)) continue;
        const int64_t index = value_index(mask, layer, o, at.row);
        first |= 1u << k;
        second |= (bits[index >> 3] >> (index & 7) & 1u) << k;
      }
      nibbles |= complete_pair(second, first).nibble() << (16 * half + 4 * group);
      kept |= second << (16 * half + 4 * group);
    }
  }
  const int64_t word = word_of_block(kb, mb, layer.in) + t;
  metadata[word] = nibbles;
  if (second_kept != nullptr) second_kept[word] = kept;
}

// Eight values' bits of W^{R,C}: the inverse of the above.
SLOPE_RULE uint8_t second_bits_byte(const uint32_t* metadata, const uint32_t* second_kept, const uint16_t* mask,
                                    const Layer& layer, int64_t byte) {
  uint32_t bits = 0;
  for (int k = 0; k < 8; ++k) {
    const int o = static_cast<int>((8 * byte + k) / layer.values_per_row());
    const int in_row = static_cast<int>((8 * byte + k) % layer.values_per_row());
    int i = in_row / 2 << layer.log_m;
    for (int to_skip = in_row % 2;; ++i) {
      if (mask_keeps(mask, layer, o, i) && to_skip-- == 0) break;
    }
    const bool listed = second_kept == nullptr ? in_nibble(stored_nibble(metadata, layer.in, i, o), o & 3)
                                               : stored_nibble(second_kept, layer.in, i, o) >> (o & 3) & 1;
    bits |= (listed ? 1u : 0u) << k;
  }
  return static_cast<uint8_t>(bits);
}

// The second pruning of column `i` in one group of M > 64 outs, into `second_kept` as 16-bit halves of its words.
SLOPE_RULE void choose_long_group(const float* values, const uint16_t* mask, uint16_t* second_kept, const Layer& layer,
                                  int i, int group) {
  const int m = 1 << layer.log_m, first = group << layer.log_m;
  TopTwo best;
  for (int k = 0; k < m; ++k) {
    if (!mask_keeps(mask, layer, first + k, i)) continue;
    best.see(key_of_kept(values[value_index(mask, layer, first + k, i)]), k);
  }
  for (int start = 0; start < m; start += 16) {
    const int o = first + start;
    const int64_t word = word_of_block(o >> 6, i >> 6, layer.in) + word_in_block(i & 63, o & 63);
    second_kept[2 * word + (i >> 3 & 1)] = static_cast<uint16_t>(best.members(start, 16));
  }
}

}  // namespace slope
