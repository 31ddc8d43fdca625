// The gradients of the low-rank adapters, out of the layer's dense weight gradient G = dY^T X [out, in]:
//
//     dL = X^T (dY R^T) / r = G^T R^T / r     [in, r]
//     dR = (X L)^T dY / r   = (G L)^T / r     [r, out]
//
// So they cost no reading of X and dY, whose rows are the tokens, but one more of G, which lies in the L2 cache. A
// cluster of blocks takes a strip of 32 rows of G for dR, or of 32 columns for dL. Its warps share out the sum; what
// each has found is added up through shared memory, in a fixed order.
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <type_traits>

#include "operand_threads.cuh"

namespace slope {

namespace {

// D += A B: A 16 x 16, B 16 x 8. A lane of row g = lane/4 and quarter t = lane%4 holds
//   a   rows g and g + 8 of columns 2t, 2t + 1; the same of columns 2t + 8, 2t + 9
//   b   rows 2t, 2t + 1 of column g; rows 2t + 8, 2t + 9
//   d   columns 2t, 2t + 1 of row g; of row g + 8
// The sum runs over columns of A and rows of B in whatever order, as long as it is the same for both.
template <class Element>
__device__ __forceinline__ void multiply(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                         uint32_t b1) {
  if constexpr (std::is_same_v<Element, __half>)
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  else
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

constexpr int kStrip = 32, kWarps = 4, kStripThreads = kWarps * 32, kCluster = 4;
constexpr int kChunk = 32;  // rows or columns of G that a warp multiplies at a time, 8 a lane

struct AdapterGradients {
  char const *weight, *left, *right;  // G [out, in]; L^T [2 width, in] and R / r [2 width, out], at spread rows
  float *grad_left, *grad_right;      // [in, rank], [rank, out]
  int out, in, rank, right_stride;  // elements from one row of `right` to the next
  float right_scale;
};

__device__ __forceinline__ uint4 load16(char const* matrix, int64_t element, bool exists) {
  return exists ? *reinterpret_cast<uint4 const*>(matrix + element * 2) : make_uint4(0, 0, 0, 0);
}

__device__ __forceinline__ uint2 load8(char const* matrix, int64_t element, bool exists) {
  return exists ? *reinterpret_cast<uint2 const*>(matrix + element * 2) : make_uint2(0, 0);
}

// 16 rows of A, 32 columns of the sum: rows g and g + 8, 8 neighbours a lane.
struct Rows16 {
  uint4 low, high;
};

template <class Element>
__device__ __forceinline__ void multiply_chunk(float (&d)[4], Rows16 const& a, uint4 const& b) {
  multiply<Element>(d, a.low.x, a.high.x, a.low.y, a.high.y, b.x, b.y);
  multiply<Element>(d, a.low.z, a.high.z, a.low.w, a.high.w, b.z, b.w);
}

// A lane of row g and quarter t, at its first of 8 neighbours of the sum; Columns adapters from `column` on.
template <class Element, int Columns>
struct Strip {
  static constexpr int kSize = kStrip * Columns;                          // sums of a strip
  static constexpr int kRightPitch = kStrip + 4, kLeftPitch = Columns + 1;  // so that a warp's lanes share no bank
  static constexpr int kPartial = kRightPitch * Columns;                  // floats that a warp leaves, at most
  static constexpr int kSharedBytes = kWarps * kPartial * 4;
  // Chunks that are read before the first is multiplied: as many as leave registers for several blocks.
  static constexpr int kAhead = Columns <= 16 ? 4 : Columns <= 32 ? 2 : 1;

  AdapterGradients const& p;
  int first, column, g, t;  // first row or column of G

  // dR of 32 outs: G [32 outs, ins] times L. partial[c][out]
  __device__ void right(float* partial, int worker, int workers) const {
    float d[2][Columns / 8][4] = {};
    for (int chunk = worker; chunk * kChunk < p.in; chunk += kAhead * workers) {
      Rows16 a[kAhead][2];
      uint4 b[kAhead][Columns / 8];
#pragma unroll
      for (int ahead = 0; ahead < kAhead; ++ahead) {
        int const k = (chunk + ahead * workers) * kChunk + t * 8;
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          int const row = first + m * 16 + g;
          a[ahead][m].low = load16(p.weight, int64_t(row) * p.in + k, k < p.in && row < p.out);
          a[ahead][m].high = load16(p.weight, int64_t(row + 8) * p.in + k, k < p.in && row + 8 < p.out);
        }
#pragma unroll
        for (int n = 0; n < Columns / 8; ++n)
          b[ahead][n] = load16(p.left, int64_t(spread_row(column + n * 8 + g)) * p.in + k, k < p.in);
      }
#pragma unroll
      for (int ahead = 0; ahead < kAhead; ++ahead)
#pragma unroll
        for (int n = 0; n < Columns / 8; ++n)
#pragma unroll
          for (int m = 0; m < 2; ++m) multiply_chunk<Element>(d[m][n], a[ahead][m], b[ahead][n]);
    }
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int n = 0; n < Columns / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          partial[(n * 8 + t * 2 + i % 2) * kRightPitch + m * 16 + i / 2 * 8 + g] = d[m][n][i];
  }

  // dL of 32 ins: R [columns, outs] times G [outs, 32 ins]; lane g has ins 4g .. 4g + 3. partial[in][c]
  __device__ void left(float* partial, int worker, int workers) const {
    float d[Columns / 16][4][4] = {};
    for (int chunk = worker; chunk * kChunk < p.out; chunk += kAhead * workers) {
      uint2 rows[kAhead][8];
      Rows16 a[kAhead][Columns / 16];
#pragma unroll
      for (int ahead = 0; ahead < kAhead; ++ahead) {
        int const k = (chunk + ahead * workers) * kChunk + t * 8;
#pragma unroll
        for (int r = 0; r < 8; ++r)
          rows[ahead][r] =
              load8(p.weight, int64_t(k + r) * p.in + first + g * 4, k < p.out && first + g * 4 < p.in);
#pragma unroll
        for (int m = 0; m < Columns / 16; ++m) {
          int64_t const low = spread_row(column + m * 16 + g), high = spread_row(column + m * 16 + g + 8);
          a[ahead][m] = {load16(p.right, low * p.right_stride + k, k < p.out),
                         load16(p.right, high * p.right_stride + k, k < p.out)};
        }
      }
#pragma unroll
      for (int ahead = 0; ahead < kAhead; ++ahead) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          uint4 const b = column_of(rows[ahead], n);
#pragma unroll
          for (int m = 0; m < Columns / 16; ++m) multiply_chunk<Element>(d[m][n], a[ahead][m], b);
        }
      }
    }
#pragma unroll
    for (int m = 0; m < Columns / 16; ++m)
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          partial[((t * 2 + i % 2) * 4 + n) * kLeftPitch + m * 16 + i / 2 * 8 + g] = d[m][n][i];
  }

  // Column n of four, two neighbouring outs to a word.
  static __device__ uint4 column_of(uint2 const (&rows)[8], int n) {
    uint32_t words[4];
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      uint2 const &even = rows[pair * 2], &odd = rows[pair * 2 + 1];
      words[pair] = __byte_perm(n < 2 ? even.x : even.y, n < 2 ? odd.x : odd.y, n % 2 ? 0x7632 : 0x5410);
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
  }

  // Where a warp leaves the sum of a place.
  static __device__ int partial_of(bool is_right, int place) {
    return is_right ? place / kStrip * kRightPitch + place % kStrip : place / Columns * kLeftPitch + place % Columns;
  }

  __device__ void write(bool is_right, int place, float sum) const {
    if (is_right) {
      int const c = column + place / kStrip, o = first + place % kStrip;
      if (c < p.rank && o < p.out) p.grad_right[int64_t(c) * p.out + o] = sum * p.right_scale;
    } else {
      int const i = first + place / Columns, c = column + place % Columns;
      if (c < p.rank && i < p.in) p.grad_left[int64_t(i) * p.rank + c] = sum;
    }
  }
};

// How many blocks of a cluster share a strip, whose sums have `length` terms: so that a warp has a few chunks.
__host__ __device__ constexpr int sharers_of(int length) { return length <= 1024 ? 1 : length <= 2048 ? 2 : kCluster; }
__host__ __device__ constexpr int clusters_of(int strips, int sharers) {
  return (strips * sharers + kCluster - 1) / kCluster;
}
__host__ __device__ constexpr int strips_of(int length) { return (length + kStrip - 1) / kStrip; }

// Blocks that a multiprocessor must have registers for; 0: as many as the compiler leaves room for. With 16 columns it
// takes some registers too many for the fourth.
constexpr int at_least_blocks(int columns) { return columns == 16 ? 4 : 0; }

template <class Element, int Columns>
__global__ void __cluster_dims__(kCluster, 1, 1) __launch_bounds__(kStripThreads, at_least_blocks(Columns))
    adapter_grads_kernel(AdapterGradients p) {
  using Work = Strip<Element, Columns>;
  extern __shared__ float partial[];  // [kWarps][kPartial]
  auto const cluster = cooperative_groups::this_cluster();
  int const warp = threadIdx.x / 32, lane = threadIdx.x % 32, block = cluster.block_rank();
  int const right_clusters = clusters_of(strips_of(p.out), sharers_of(p.in));
  int const index = blockIdx.x / kCluster;
  bool const is_right = index < right_clusters;
  int const sharers = sharers_of(is_right ? p.in : p.out), rank = block % sharers;
  int const strip = (is_right ? index : index - right_clusters) * (kCluster / sharers) + block / sharers;
  Work const work{p, strip * kStrip, int(blockIdx.y) * Columns, lane / 4, lane % 4};
  float* const own = partial + warp * Work::kPartial;
  if (is_right)
    work.right(own, rank * kWarps + warp, sharers * kWarps);
  else
    work.left(own, rank * kWarps + warp, sharers * kWarps);
  cluster.sync();
  for (int place = rank * kStripThreads + threadIdx.x; place < Work::kSize; place += sharers * kStripThreads) {
    float sum = 0;
    for (int other = block - rank; other < block - rank + sharers; ++other) {
      float const* theirs = cluster.map_shared_rank(partial, other) + Work::partial_of(is_right, place);
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += theirs[w * Work::kPartial];
    }
    work.write(is_right, place, sum);
  }
  cluster.sync();  // what others still read stays until they have
}

template <class Element, int Columns>
int launch_columns(AdapterGradients const& problem, int width, cudaStream_t stream) {
  constexpr int kSharedBytes = Strip<Element, Columns>::kSharedBytes, kDevices = 64;
  static std::atomic<bool> prepared[kDevices];
  int device = 0;
  if (cudaError_t const error = cudaGetDevice(&device); error != cudaSuccess) return error;
  if (!prepared[device % kDevices].load()) {
    cudaError_t const error = cudaFuncSetAttribute(adapter_grads_kernel<Element, Columns>,
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
    if (error != cudaSuccess) return error;
    prepared[device % kDevices].store(true);
  }
  int const clusters = clusters_of(strips_of(problem.out), sharers_of(problem.in)) +
                       clusters_of(strips_of(problem.in), sharers_of(problem.out));
  dim3 const blocks(clusters * kCluster, width / Columns);
  adapter_grads_kernel<Element, Columns><<<blocks, kStripThreads, kSharedBytes, stream>>>(problem);
  return cudaGetLastError();
}

template <class Element>
int launch(AdapterGradients const& problem, int width, cudaStream_t stream) {
  if (width == 80) return launch_columns<Element, 80>(problem, width, stream);
  if (width % 64 == 0) return launch_columns<Element, 64>(problem, width, stream);
  if (width % 48 == 0) return launch_columns<Element, 48>(problem, width, stream);
  if (width % 32 == 0) return launch_columns<Element, 32>(problem, width, stream);
  return launch_columns<Element, 16>(problem, width, stream);
}

// ------------------------------------------------------------------------------------------------------------ operands
constexpr int kMostAdapters = 48;  // of a launch: the arguments of a kernel are at most 4 KiB

struct AdapterTable {
  AdapterOperands of[kMostAdapters];
};
static_assert(sizeof(AdapterTable) <= 4096, "arguments of a kernel");

struct ToBfloat16 {
  static __device__ __forceinline__ uint16_t rounded(float value) {
    return __bfloat16_as_ushort(__float2bfloat16_rn(value));
  }
};

struct ToFloat16 {
  static __device__ __forceinline__ uint16_t rounded(float value) { return __half_as_ushort(__float2half_rn(value)); }
};

template <class Element>
__global__ void __launch_bounds__(kThreads) adapter_operands_kernel(__grid_constant__ AdapterTable const table) {
  using Thread = AdapterThread<Element>;
  __shared__ AdapterShared shared;
  AdapterOperands const& layer = table.of[blockIdx.y];
  Thread const thread(layer, blockIdx.z == 1, shared, blockIdx.x, threadIdx.x);
  for (int column = 0; column < layer.width; column += kTile) {
    thread.load(column);
    __syncthreads();
    thread.store(column);
    __syncthreads();
  }
}

}  // namespace
}  // namespace slope

// One call of the C interface; kernels/native.py packs the same fields in the same order.
struct AdapterGradsCall {
  void const *grad_weight, *left_rows, *right_rows;
  void *grad_left, *grad_right;
  int64_t out, in;
  cudaStream_t stream;
  int32_t width, rank, half, right_stride;
};

extern "C" {

// grad_left [in, rank] and grad_right [rank, out] in fp32 from grad_weight [out, in] and the first two of the layer's
// AdapterOperands; width a multiple of 16. All packed, but for rows of right_rows that are right_stride elements apart,
// and 16-byte aligned; out, in and right_stride multiples of 8. Returns 0 or a cudaError_t; launches on `stream`, waits
// for nothing.
int slope_adapter_grads(AdapterGradsCall const* c) {
  constexpr int64_t kLargest = 1 << 24;
  if (c->out < 8 || c->in < 8 || c->out % 8 || c->in % 8 || c->out > kLargest || c->in > kLargest)
    return cudaErrorInvalidValue;
  if (c->width < 16 || c->width % 16 || c->rank < 1 || c->rank > c->width) return cudaErrorInvalidValue;
  if (c->right_stride < c->out || c->right_stride % 8) return cudaErrorInvalidValue;
  slope::AdapterGradients const problem{static_cast<char const*>(c->grad_weight),
                                        static_cast<char const*>(c->left_rows),
                                        static_cast<char const*>(c->right_rows),
                                        static_cast<float*>(c->grad_left),
                                        static_cast<float*>(c->grad_right),
                                        int(c->out),
                                        int(c->in),
                                        c->rank,
                                        c->right_stride,
                                        1.f / float(c->rank)};
  return c->half ? slope::launch<__half>(problem, c->width, c->stream)
                 : slope::launch<__nv_bfloat16>(problem, c->width, c->stream);
}

// The operands of many layers' adapters, in as few launches as their addresses fit in. Returns 0 or a cudaError_t.
int slope_adapter_operands(slope::AdapterOperands const* layers, int count, int half, cudaStream_t stream) {
  using namespace slope;
  for (int i = 0; i < count; ++i)
    if (!layers[i].rows_lie_apart()) return cudaErrorInvalidValue;
  for (int first = 0; first < count; first += kMostAdapters) {
    AdapterTable table{};
    int const number = std::min(count - first, kMostAdapters);
    int rows = 0;
    for (int i = 0; i < number; ++i) {
      table.of[i] = layers[first + i];
      rows = std::max({rows, table.of[i].in, table.of[i].out});
    }
    dim3 const blocks(blocks_of_adapters(rows), number, 2);
    if (half)
      adapter_operands_kernel<ToFloat16><<<blocks, kThreads, 0, stream>>>(table);
    else
      adapter_operands_kernel<ToBfloat16><<<blocks, kThreads, 0, stream>>>(table);
    if (cudaError_t const error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  return 0;
}

}  // extern "C"
