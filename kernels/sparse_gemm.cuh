// Y[tokens, out] = X[tokens, in] W^T + (X L) R + bias on Hopper's sparse tensor cores, W 2:4 along `in`: one kernel.
//
// W is wgmma's sparse A operand (M = out), X its B operand (N = tokens). The reads of B from shared memory bound a
// sparse wgmma: each m64 instruction reads all of its B tile, 128 bytes a cycle at full rate, which is all that shared
// memory gives, and the copies into shared memory come on top. So tiles are chosen for few bytes a product rather than
// for many stages: up to 256 rows of W share one load of X, and the epilogue takes little of the memory.
//
//   load warp        TMA: W's kept values, X (multicast to the cluster's row tiles), metadata -> ring of stages
//   two consumer     one wgmma group in flight; then registers -> bf16/fp16 -> shared memory, transposed, and on to the
//   warpgroups       block's next tile, whose stages the load warp has filled already (persistent blocks)
//   store warp       TMA: shared memory -> Y, while the warpgroups multiply
//
// Low-rank adapters widen the reduction: R^T [out, r] is a 2:4 matrix of 2r columns whose metadata is one constant, and
// X L comes spread over the kept positions [tokens, 2r]. Both are read by the same loop from tensor maps of their own.
#pragma once

#include "hopper.cuh"

namespace slope {

constexpr int kBlockK = 64;          // columns of W a stage: two wgmma of 32, whose metadata share a register
constexpr int kKeptRowBytes = 64;    // of a stage: 32 kept values
constexpr int kTokenRowBytes = 128;  // of a stage: 64 inputs
constexpr int kMetadataBytes = 512;  // of 64 rows and a stage's columns: one word a thread of a warpgroup
constexpr uint32_t kAdapterMetadata = 0x44444444u;  // positions 0 and 1 of every group of 4

struct Problem {
  int tokens, out, in;
  int adapter_columns;  // columns of the spread X L, 2r; 0 without adapters
  int group;            // token tiles that are worked on together before the next ones
  int metadata_blocks;  // row blocks of 64 in the metadata, padding included
  const uint32_t* metadata;
  const float* bias;    // [out], or null
};

// The instruction of one tile width and element type, for both halves of a stage's metadata.
template <class Element, int Tokens>
struct SparseMma;
#define SLOPE_SPARSE_MMA(TOKENS) SLOPE_SPARSE_MMA_OF(TOKENS)
#define SLOPE_SPARSE_MMA_OF(TOKENS)                                                                                    \
  template <>                                                                                                          \
  struct SparseMma<__nv_bfloat16, TOKENS> {                                                                            \
    template <gmma::SparseSel Half>                                                                                    \
    using Op = gmma::SPARSE::GMMA_64x##TOKENS##x32_F32BF16BF16_SS<gmma::Major::K, gmma::Major::K, gmma::ScaleIn::One,  \
                                                                  gmma::ScaleIn::One, Half>;                           \
  };                                                                                                                   \
  template <>                                                                                                          \
  struct SparseMma<__half, TOKENS> {                                                                                   \
    template <gmma::SparseSel Half>                                                                                    \
    using Op = gmma::SPARSE::GMMA_64x##TOKENS##x32_F32F16F16_SS<gmma::Major::K, gmma::Major::K, gmma::ScaleIn::One,    \
                                                                gmma::ScaleIn::One, Half>;                             \
  };

// Rows (of W) and Tokens (of X) a block's tile has; ClusterRows x ClusterTokens blocks share their loads;
// A warpgroup's part leaves for Y StoreTokens tokens at a time, through a ring of StoreSlots that the two share.
template <class Element_, int Rows_, int Tokens_, int ClusterRows_, int ClusterTokens_, int LoadTokens_,
          int StoreTokens_, int StoreSlots_>
struct Tile {
  using Element = Element_;
  static constexpr int Rows = Rows_, Tokens = Tokens_, Warpgroups = 2;
  static constexpr int ClusterRows = ClusterRows_, ClusterTokens = ClusterTokens_;
  static constexpr int LoadTokens = LoadTokens_, StoreTokens = StoreTokens_, StoreSlots = StoreSlots_;
  static constexpr int ClusterSize = ClusterRows * ClusterTokens;
  static constexpr int Blocks = Rows / 64 / Warpgroups;  // m64 blocks a warpgroup holds
  static constexpr int LoadRows = Rows / ClusterTokens;
  static constexpr int KeptBytes = Rows * kKeptRowBytes, TokenBytes = Tokens * kTokenRowBytes;
  static constexpr int MetadataBytes = Rows / 64 * kMetadataBytes;
  static constexpr int StageBytes = KeptBytes + TokenBytes + MetadataBytes;
  static constexpr int Chunks = Tokens / StoreTokens;
  static constexpr int StoreBytes = StoreTokens * 128;  // one m64 block of one chunk
  static constexpr int StoreTotal = StoreSlots * Blocks * StoreBytes;
  static constexpr int Overhead = 1024 + 256;  // alignment and barriers
  static constexpr int Stages = std::min(16, (kSharedLimit - Overhead - StoreTotal) / StageBytes);
  static constexpr int SharedBytes = Overhead + StoreTotal + Stages * StageBytes;
  static constexpr int Threads = (Warpgroups + 1) * kWarpgroup;
  static_assert(Rows % (64 * Warpgroups) == 0 && Tokens % 8 == 0 && Tokens <= 256, "tile of whole instructions");
  static_assert(Tokens % LoadTokens == 0 && LoadTokens % 8 == 0, "loads of whole swizzle atoms");
  static_assert(Tokens % StoreTokens == 0 && StoreTokens % 8 == 0, "stores of whole swizzle atoms");
  static_assert(Blocks == 2 || StoreTokens % 16 == 0, "stores of whole stmatrix steps");
  static_assert(TokenBytes % 1024 == 0 && StoreBytes % 1024 == 0, "swizzle atoms of 8 rows");
  static_assert(Stages >= 3 && StoreSlots >= 3, "rings");
  // A slot's barrier tells one fill from the next by one bit. A warpgroup may be a tile ahead of the other where the
  // reduction has few stages; what it last waited for must then have freed the fill before the last one of this slot.
  static_assert(StoreSlots > Chunks, "a slot is free before it can be waited for twice");
};

struct Schedule {
  int row_tiles, token_tiles;  // of clusters
  int group;

  __device__ int count() const { return row_tiles * token_tiles; }
  // Tiles in order: groups of token tiles; inside a group all token tiles of a row tile, then the next row tile.
  __device__ void place(int index, int& row_tile, int& token_tile) const {
    int per_group = group * row_tiles;
    int first = index / per_group * group;
    int width = min(group, token_tiles - first);
    int inside = index % per_group;
    row_tile = inside / width;
    token_tile = first + inside % width;
  }
};

__host__ __device__ constexpr int blocks_of(int columns) { return (columns + kBlockK - 1) / kBlockK; }

template <int RowBytes>
__device__ inline uint64_t operand_descriptor(uint32_t address) {
  constexpr uint64_t swizzle = RowBytes == 128 ? 1 : 2;  // 128 or 64 bytes
  constexpr uint64_t stride = RowBytes * 8;                                   // between groups of 8 rows
  return uint64_t((address & 0x3FFFF) >> 4) | (uint64_t(1) << 16) | ((stride >> 4) << 32) | (swizzle << 62);
}

template <class Op, int... I>
__device__ __forceinline__ void multiply(uint64_t a, uint64_t b, float* d, uint32_t metadata, gmma::ScaleOut scale,
                                         std::integer_sequence<int, I...>) {
  Op::fma(a, b, d[I]..., metadata, scale);
}

template <class Element>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<Element, __half>) {
    __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<uint32_t&>(pair);
  } else {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<uint32_t&>(pair);
  }
}

template <class T>
struct Shared {
  char* kept;    // [Stages][Rows][32], 64-byte swizzle
  char* inputs;  // [Stages][Tokens][64], 128-byte swizzle
  char* metadata;  // [Stages][Rows / 64][128 words]
  char* store;   // [StoreSlots][Blocks][StoreTokens][64], 128-byte swizzle
  uint64_t *full, *empty;    // [Stages]
  uint64_t *staged, *stored;  // [StoreSlots]

  __device__ explicit Shared(char* raw) {
    char* base = raw + (-cute::cast_smem_ptr_to_uint(raw) & 1023);
    store = base;  // in order of the alignment that each one's swizzle needs
    kept = store + T::StoreTotal;
    inputs = kept + T::Stages * T::KeptBytes;
    metadata = inputs + T::Stages * T::TokenBytes;
    full = reinterpret_cast<uint64_t*>(metadata + T::Stages * T::MetadataBytes);
    empty = full + T::Stages;
    staged = empty + T::Stages;
    stored = staged + T::StoreSlots;
  }
};

struct Maps {
  CUtensorMap kept, inputs, outputs, adapter_kept, adapter_inputs;
};

// The first row of W and the first token of a block's part of a cluster's tile.
template <class T>
__device__ __forceinline__ void tile_origin(Schedule const& schedule, int index, int rank, int& row, int& token) {
  schedule.place(index, row, token);
  row = (row * T::ClusterRows + rank % T::ClusterRows) * T::Rows;
  token = (token * T::ClusterTokens + rank / T::ClusterRows) * T::Tokens;
}

// The metadata of a tile's rows; row blocks past the matrix (of a cluster's last tile) take any that exist.
template <class T>
__device__ __forceinline__ void load_metadata(Problem const& p, int k_block, int row_block, uint64_t* full, char* to) {
  static_assert(4 % (T::Rows / 64) == 0, "row blocks come padded to fours");
  int const words = (k_block * p.metadata_blocks + min(row_block, p.metadata_blocks - T::Rows / 64)) * kWarpgroup;
  cute::SM90_BULK_COPY_G2S::copy(p.metadata + words, full, to, T::MetadataBytes);
}

// One thread fills the ring, tile after tile.
template <class T>
__device__ void load(Maps const& maps, Problem const& p, Schedule const& schedule, Shared<T>& shared, int cluster,
                        int clusters, int rank) {
  constexpr uint64_t kNormal = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);
  constexpr uint64_t kKeep = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_LAST);
  int const row_rank = rank % T::ClusterRows, token_rank = rank / T::ClusterRows;
  uint16_t rows_mask = 0, tokens_mask = 0;  // blocks that need this one's share of W, of X
  for (int i = 0; i < T::ClusterTokens; ++i) rows_mask |= 1 << (row_rank + T::ClusterRows * i);
  for (int i = 0; i < T::ClusterRows; ++i) tokens_mask |= 1 << (i + T::ClusterRows * token_rank);
  int const k_blocks = blocks_of(p.in);
  int const k_total = k_blocks + blocks_of(p.adapter_columns);
  Ring ring;
  for (int index = cluster; index < schedule.count(); index += clusters) {
    int row, token;
    tile_origin<T>(schedule, index, rank, row, token);
    for (int k = 0; k < k_total; ++k, ring.advance<T::Stages>()) {
      bool const adapter = k >= k_blocks;
      int const block = adapter ? k - k_blocks : k;
      CUtensorMap const* kept_map = adapter ? &maps.adapter_kept : &maps.kept;
      CUtensorMap const* input_map = adapter ? &maps.adapter_inputs : &maps.inputs;
      uint64_t* full = &shared.full[ring.stage];
      ClusterBarrier::wait(&shared.empty[ring.stage], ring.phase ^ 1);
      ClusterTransactionBarrier::arrive_and_expect_tx(full, T::StageBytes - (adapter ? T::MetadataBytes : 0));
      if (!adapter) load_metadata<T>(p, block, row / 64, full, shared.metadata + ring.stage * T::MetadataBytes);
      char* kept = shared.kept + ring.stage * T::KeptBytes;
      char* inputs = shared.inputs + ring.stage * T::TokenBytes;
      if constexpr (T::ClusterTokens == 1) {
        cute::SM90_TMA_LOAD_2D::copy(kept_map, full, kKeep, kept, block * kBlockK / 2, row);
      } else {
        cute::SM90_TMA_LOAD_MULTICAST_2D::copy(kept_map, full, rows_mask, kKeep,
                                               kept + token_rank * T::LoadRows * kKeptRowBytes, block * kBlockK / 2,
                                               row + token_rank * T::LoadRows);
      }
      for (int load = row_rank; load < T::Tokens / T::LoadTokens; load += T::ClusterRows) {
        char* to = inputs + load * T::LoadTokens * kTokenRowBytes;
        if constexpr (T::ClusterRows == 1) {
          cute::SM90_TMA_LOAD_2D::copy(input_map, full, kNormal, to, block * kBlockK, token + load * T::LoadTokens);
        } else {
          cute::SM90_TMA_LOAD_MULTICAST_2D::copy(input_map, full, tokens_mask, kNormal, to, block * kBlockK,
                                                 token + load * T::LoadTokens);
        }
      }
    }
  }
  // The ring's last loads must have been consumed everywhere before this block may go.
  for (int i = 0; i < T::Stages; ++i, ring.advance<T::Stages>())
    ClusterBarrier::wait(&shared.empty[ring.stage], ring.phase ^ 1);
}

template <class T>
struct Consumer {
  using Element = typename T::Element;
  static constexpr int kAccumulators = T::Tokens / 2;
  float d[T::Blocks][kAccumulators];
  float bias[T::Blocks][2];
  uint32_t metadata[2][T::Blocks];  // of the products in flight and of the next ones
  Ring ring, slots;
  int previous;  // stage whose products may still run
  int warpgroup, thread;

  __device__ __forceinline__ void load_metadata(Shared<T>& shared, uint32_t (&words)[T::Blocks], bool adapter) {
    auto const* from = reinterpret_cast<uint32_t const*>(shared.metadata + ring.stage * T::MetadataBytes) +
                       warpgroup * T::Blocks * kWarpgroup + thread;
#pragma unroll
    for (int block = 0; block < T::Blocks; ++block) words[block] = adapter ? kAdapterMetadata : from[block * kWarpgroup];
  }

  // The products of half a stage, 32 columns.
  template <gmma::SparseSel Half>
  __device__ __forceinline__ void multiply_half(Shared<T>& shared, uint32_t (&words)[T::Blocks], bool first) {
    using Op = typename SparseMma<Element, T::Tokens>::template Op<Half>;
    constexpr int kHalf = Half == gmma::SparseSel::One ? 1 : 0;
    uint32_t const kept = cute::cast_smem_ptr_to_uint(shared.kept) + ring.stage * T::KeptBytes +
                          warpgroup * T::Blocks * 64 * kKeptRowBytes + kHalf * kKeptRowBytes / 2;
    uint32_t const inputs = cute::cast_smem_ptr_to_uint(shared.inputs) + ring.stage * T::TokenBytes + kHalf * kTokenRowBytes / 2;
    uint64_t const a = operand_descriptor<kKeptRowBytes>(kept), b = operand_descriptor<kTokenRowBytes>(inputs);
#pragma unroll
    for (int block = 0; block < T::Blocks; ++block)
      multiply<Op>(a + block * (64 * kKeptRowBytes / 16), b, d[block], words[block],
                   first ? gmma::ScaleOut::Zero : gmma::ScaleOut::One,
                   std::make_integer_sequence<int, kAccumulators>{});
  }

  // Ends a stage: its products run on, those of the stage before it are done and that stage goes back.
  __device__ __forceinline__ void finish_stage(Shared<T>& shared) {
    cute::warpgroup_commit_batch();
    cute::warpgroup_wait<1>();
    if (previous >= 0) release(shared, previous);
    previous = ring.stage;
    ring.advance<T::Stages>();
  }

  __device__ __forceinline__ void release(Shared<T>& shared, int stage) {
    ClusterBarrier::arrive(&shared.empty[stage], thread % T::ClusterSize, thread < T::ClusterSize);
  }

  __device__ __forceinline__ void multiply_tile(Shared<T>& shared, Problem const& p) {
    int const k_blocks = blocks_of(p.in), k_total = k_blocks + blocks_of(p.adapter_columns);
    int const tail = p.adapter_columns % kBlockK;  // adapters of rank 16 fill half a stage
    int const k_whole = k_total - (tail > 0 && tail <= kBlockK / 2);
    previous = -1;
    for (int k_first = 0; k_first < k_whole; k_first += 2) {
#pragma unroll
      for (int turn = 0; turn < 2; ++turn) {
        int const k = k_first + turn;
        if (k < k_whole) {
          ClusterBarrier::wait(&shared.full[ring.stage], ring.phase);
          load_metadata(shared, metadata[turn], k >= k_blocks);
          cute::warpgroup_arrive();
          multiply_half<gmma::SparseSel::Zero>(shared, metadata[turn], k == 0);
          multiply_half<gmma::SparseSel::One>(shared, metadata[turn], false);
          finish_stage(shared);
        }
      }
    }
    if (k_whole < k_total) {
      uint32_t constant[T::Blocks];
      load_metadata(shared, constant, true);
      ClusterBarrier::wait(&shared.full[ring.stage], ring.phase);
      cute::warpgroup_arrive();
      multiply_half<gmma::SparseSel::Zero>(shared, constant, false);
      finish_stage(shared);
    }
    cute::warpgroup_wait<0>();
    release(shared, previous);
  }

  // Long before the epilogue wants it.
  __device__ __forceinline__ void load_bias(Problem const& p, int row) {
#pragma unroll
    for (int block = 0; block < T::Blocks; ++block)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int const r = row + block * 64 + thread / 32 * 16 + half * 8 + thread % 32 / 4;
        bias[block][half] = p.bias != nullptr && r < p.out ? __ldg(p.bias + r) : 0.f;
      }
  }

  // Accumulators + bias -> shared memory, transposed, for the store warp; the warpgroups take the slots in turn.
  __device__ __forceinline__ void stage_tile(Shared<T>& shared) {
    int const lane = thread % 32, warp = thread / 32;
    // The address of this lane's 16-byte row for stmatrix: which 8x8 matrix, which token in it.
    int const matrix = lane / 8, token_row = lane % 8;
    int const chunk_of_row = (warp * 16 + matrix % 2 * 8) / 8 ^ token_row;
    if (warpgroup == 1) slots.skip<T::StoreSlots>(T::Chunks);
#pragma unroll
    for (int first = 0; first < T::Tokens; first += T::StoreTokens) {
      char* to = shared.store + slots.stage * T::Blocks * T::StoreBytes;
      ClusterBarrier::wait(&shared.stored[slots.stage], slots.phase ^ 1);
      constexpr int kStep = T::Blocks == 2 ? 8 : 16;  // tokens a stmatrix of four 8x8 matrices covers
#pragma unroll
      for (int t = 0; t < T::StoreTokens; t += kStep) {
        uint32_t packed[4];
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          int const block = T::Blocks == 2 ? m / 2 : 0, column = T::Blocks == 2 ? 0 : m / 2 * 8;
          float const* pair = &d[block][(first + t + column) / 2 + m % 2 * 2];
          packed[m] = pack<Element>(pair[0] + bias[block][m % 2], pair[1] + bias[block][m % 2]);
        }
        int const at_block = T::Blocks == 2 ? matrix / 2 : 0, at_column = T::Blocks == 2 ? 0 : matrix / 2 * 8;
        char* address = to + at_block * T::StoreBytes + (t + at_column + token_row) * 128 + chunk_of_row * 16;
        cute::SM90_U16x8_STSM_T::copy(packed[0], packed[1], packed[2], packed[3],
                                      *reinterpret_cast<cute::uint128_t*>(address));
      }
      cute::tma_store_fence();
      __syncwarp();
      if (lane == 0) ClusterBarrier::arrive(&shared.staged[slots.stage]);
      slots.advance<T::StoreSlots>();
    }
    if (warpgroup == 0) slots.skip<T::StoreSlots>(T::Chunks);
  }
};

// One thread takes what the warpgroups staged to Y.
template <class T>
__device__ void store(Maps const& maps, Problem const& p, Schedule const& schedule, Shared<T>& shared, int cluster,
                      int clusters, int rank) {
  Ring slots;
  int before = -1;  // the slot whose bytes may still be read
  for (int index = cluster; index < schedule.count(); index += clusters) {
    int tile_row, token;
    tile_origin<T>(schedule, index, rank, tile_row, token);
    for (int part = 0; part < T::Warpgroups * T::Chunks; ++part) {
      int const row = tile_row + part / T::Chunks * T::Blocks * 64;
      int const first = token + part % T::Chunks * T::StoreTokens;
      char const* from = shared.store + slots.stage * T::Blocks * T::StoreBytes;
      ClusterBarrier::wait(&shared.staged[slots.stage], slots.phase);
      for (int block = 0; block < T::Blocks; ++block)
        if (row + block * 64 < p.out && first < p.tokens)
          cute::SM90_TMA_STORE_2D::copy(&maps.outputs, from + block * T::StoreBytes, row + block * 64, first);
      cute::tma_store_arrive();
      cute::tma_store_wait<1>();
      if (before >= 0) ClusterBarrier::arrive(&shared.stored[before]);
      before = slots.stage;
      slots.advance<T::StoreSlots>();
    }
  }
  cute::tma_store_wait<0>();
}

template <class T>
__global__ void __cluster_dims__(T::ClusterSize, 1, 1) __launch_bounds__(T::Threads, 1)
    sparse_gemm_kernel(__grid_constant__ Maps const maps, Problem const p) {
  extern __shared__ char raw[];
  Shared<T> shared(raw);
  int const warpgroup = threadIdx.x / kWarpgroup;
  int const rank = cute::block_rank_in_cluster();
  int const cluster = blockIdx.x / T::ClusterSize, clusters = gridDim.x / T::ClusterSize;
  constexpr int kClusterRows = T::Rows * T::ClusterRows, kClusterTokens = T::Tokens * T::ClusterTokens;
  Schedule const schedule{(p.out + kClusterRows - 1) / kClusterRows, (p.tokens + kClusterTokens - 1) / kClusterTokens,
                          p.group};
  if (threadIdx.x == T::Warpgroups * kWarpgroup) {  // the thread that loads: what describes the matrices is on its way
    for (CUtensorMap const* map : {&maps.kept, &maps.inputs}) cute::prefetch_tma_descriptor(map);
    if (p.adapter_columns)
      for (CUtensorMap const* map : {&maps.adapter_kept, &maps.adapter_inputs}) cute::prefetch_tma_descriptor(map);
  }
  if (threadIdx.x == T::Warpgroups * kWarpgroup + 32) cute::prefetch_tma_descriptor(&maps.outputs);
  if (threadIdx.x == 0) {
    for (int i = 0; i < T::Stages; ++i) {
      ClusterBarrier::init(&shared.full[i], 1);
      ClusterBarrier::init(&shared.empty[i], T::Warpgroups * T::ClusterSize);
    }
    for (int i = 0; i < T::StoreSlots; ++i) {
      ClusterBarrier::init(&shared.staged[i], kWarpgroup / 32);
      ClusterBarrier::init(&shared.stored[i], 1);
    }
    cutlass::arch::fence_barrier_init();
  }
  if constexpr (T::ClusterSize > 1) {
    cute::cluster_arrive_relaxed();
    cute::cluster_wait();
  } else {
    __syncthreads();
  }
  if (warpgroup == T::Warpgroups) {
    cutlass::arch::warpgroup_reg_dealloc<40>();
    int const thread = threadIdx.x - T::Warpgroups * kWarpgroup;
    if (thread == 0) load<T>(maps, p, schedule, shared, cluster, clusters, rank);
    if (thread == 32) store<T>(maps, p, schedule, shared, cluster, clusters, rank);
  } else {
    cutlass::arch::warpgroup_reg_alloc<232>();
    Consumer<T> consumer;
    consumer.warpgroup = warpgroup;
    consumer.thread = threadIdx.x % kWarpgroup;
    for (int index = cluster; index < schedule.count(); index += clusters) {
      int row, token;
      tile_origin<T>(schedule, index, rank, row, token);
      consumer.load_bias(p, row + warpgroup * T::Blocks * 64);
      consumer.multiply_tile(shared, p);
      consumer.stage_tile(shared);
    }
  }
}

// ------------------------------------------------------------------------------------------------------------- host
// One call of the C interface; kernels/native.py packs the same fields in the same order.
struct Call {
  void const *inputs, *kept, *metadata, *bias, *adapter_inputs, *adapter_kept;
  void* outputs;
  int64_t input_stride, kept_stride, adapter_stride, tokens, out, in;
  cudaStream_t stream;
  int32_t adapter_columns, group, variant, half;
};

template <class T>
int launch(Call const& c) {
  constexpr int64_t kLargest = 1 << 30;
  if (c.tokens < 1 || c.out % 8 || c.in % 16 || c.adapter_columns % 16) return kShape;
  if (c.input_stride % 8 || c.kept_stride % 8 || c.kept_stride < c.in / 2) return kShape;
  if (c.adapter_stride % 8 || c.adapter_stride < c.adapter_columns / 2) return kShape;
  if (c.tokens > kLargest || c.out > kLargest || c.in > kLargest || c.input_stride > kLargest) return kShape;
  if (encode_function() == nullptr) return kNoDriver;
  int processors = 0;
  cudaError_t const error = prepare<sparse_gemm_kernel<T>>(T::SharedBytes, &processors);
  if (error != cudaSuccess) return error;
  using E = typename T::Element;
  Maps maps;
  bool encoded = tensor_map<E>(&maps.kept, c.kept, c.out, c.in / 2, c.kept_stride, T::LoadRows, kBlockK / 2) &&
                 tensor_map<E>(&maps.inputs, c.inputs, c.tokens, c.in, c.input_stride, T::LoadTokens, kBlockK) &&
                 tensor_map<E>(&maps.outputs, c.outputs, c.tokens, c.out, c.out, T::StoreTokens, 64);
  int const width = c.adapter_columns;
  if (width)
    encoded = encoded &&
              tensor_map<E>(&maps.adapter_kept, c.adapter_kept, c.out, width / 2, c.adapter_stride, T::LoadRows, kBlockK / 2) &&
              tensor_map<E>(&maps.adapter_inputs, c.adapter_inputs, c.tokens, width, width, T::LoadTokens, kBlockK);
  if (!encoded) return kTensorMap;
  constexpr int kClusterRows = T::Rows * T::ClusterRows, kClusterTokens = T::Tokens * T::ClusterTokens;
  long const tiles = long((c.out + kClusterRows - 1) / kClusterRows) * ((c.tokens + kClusterTokens - 1) / kClusterTokens);
  int const clusters = int(std::min<long>(tiles, processors / T::ClusterSize));
  Problem problem{int(c.tokens),
                  int(c.out),
                  int(c.in),
                  width,
                  std::max(c.group, 1),
                  int((c.out + 255) / 256 * 4),
                  static_cast<uint32_t const*>(c.metadata),
                  static_cast<float const*>(c.bias)};
  sparse_gemm_kernel<T><<<clusters * T::ClusterSize, T::Threads, T::SharedBytes, c.stream>>>(maps, problem);
  return cudaGetLastError();
}

}  // namespace slope
