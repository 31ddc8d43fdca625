// What the Hopper kernels share: the ring of a pipeline, tensor maps for the copy engine, and error codes.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED
#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm90.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <cute/arch/mma_sm90_gmma_sparse.hpp>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

#include <algorithm>
#include <atomic>
#include <type_traits>
#include <utility>

namespace slope {

namespace gmma = cute::SM90::GMMA;
using cutlass::arch::ClusterBarrier;
using cutlass::arch::ClusterTransactionBarrier;

constexpr int kWarpgroup = 128;
constexpr int kSharedLimit = 232448;  // 227 KiB, what a block may have

struct Ring {
  int stage = 0;
  uint32_t phase = 0;
  template <int Stages>
  __device__ void advance() {
    if (++stage == Stages) {
      stage = 0;
      phase ^= 1;
    }
  }
  template <int Stages>
  __device__ void skip(int count) {
    stage += count;
    while (stage >= Stages) {
      stage -= Stages;
      phase ^= 1;
    }
  }
};

// ------------------------------------------------------------------------------------------------------------- host
// What the C functions return besides 0 and CUDA's own error codes.
enum Status { kNoDriver = 10001, kTensorMap = 10002, kShape = 10003, kVariant = 10004 };

constexpr int kDevices = 64;

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

inline EncodeTiled encode_function() {
  static EncodeTiled const function = [] {  // through the runtime, so that the library does not link the driver
    void* pointer = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &pointer, 12000, cudaEnableDefault, &found);
#else
    cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &pointer, cudaEnableDefault, &found);
#endif
    return found == cudaDriverEntryPointSuccess ? reinterpret_cast<EncodeTiled>(pointer) : nullptr;
  }();
  return function;
}

// A row-major matrix of 2-byte elements, read or written in boxes of 64 or 32 columns, swizzled by their width.
template <class Element>
bool tensor_map(CUtensorMap* map, void const* data, int64_t rows, int64_t columns, int64_t stride, int box_rows,
                int box_columns) {
  cuuint64_t size[2] = {cuuint64_t(columns), cuuint64_t(rows)}, strides[1] = {cuuint64_t(stride) * 2};
  cuuint32_t box[2] = {cuuint32_t(box_columns), cuuint32_t(box_rows)}, step[2] = {1, 1};
  auto type = std::is_same_v<Element, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  auto swizzle = box_columns == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
  return encode_function()(map, type, 2, const_cast<void*>(data), size, strides, box, step,
                           CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                           CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// The multiprocessors of the present device, on which `kernel` may use `shared_bytes` from now on; else an error.
template <auto Kernel>
cudaError_t prepare(int shared_bytes, int* processors) {
  static std::atomic<int> prepared[kDevices];  // multiprocessors of a device on which the kernel may run, or 0
  int device = 0;
  if (cudaError_t const error = cudaGetDevice(&device); error != cudaSuccess) return error;
  *processors = prepared[device % kDevices].load();
  if (*processors != 0) return cudaSuccess;
  cudaError_t error = cudaFuncSetAttribute(Kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) prepared[device % kDevices].store(*processors);
  return error;
}

}  // namespace slope
