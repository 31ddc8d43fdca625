// The tiles that sparse_gemm.cuh is instantiated for, one a compilation unit (-DVARIANT=i, both element types), and the
// C interface that chooses among them (the unit without VARIANT). kernels/autotune.py measures which tile wins a shape.
#include "sparse_gemm.cuh"

#define SLOPE_FOR_VARIANTS(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5)

#ifdef VARIANT

// rows, tokens; cluster of rows x tokens; tokens a load, tokens a store; store slots
#if VARIANT == 0  // the fewest bytes of shared memory a product
#define TILE 256, 192, 2, 1, 96, 32, 7
#define TOKENS 192
#elif VARIANT == 1  // 132 multiprocessors: 2^k tokens x 1024 outputs fill their waves
#define TILE 256, 168, 2, 1, 56, 56, 4
#define TOKENS 168
#elif VARIANT == 2  // small matrices: four times as many tiles
#define TILE 128, 128, 1, 1, 128, 64, 4
#define TOKENS 128
#elif VARIANT == 3  // pairs of 256 rows fit 768 outputs; 4096 outputs of 1024 tokens, 1024 of 4096: 64 pairs for the 66
#define TILE 128, 256, 2, 1, 128, 64, 7
#define TOKENS 256
#elif VARIANT == 4  // 768 outputs of 4096, 8192, 16384 tokens are 66, 129, 258 pairs
#define TILE 128, 192, 2, 1, 96, 64, 6
#define TOKENS 192
#elif VARIANT == 5  // few tokens: 768 outputs of 2048 are 66 pairs
#define TILE 128, 96, 2, 1, 48, 48, 4
#define TOKENS 96
#endif

namespace slope {
SLOPE_SPARSE_MMA(TOKENS)
}

#define SLOPE_CONCAT_OF(A, B) A##B
#define SLOPE_CONCAT(A, B) SLOPE_CONCAT_OF(A, B)
int SLOPE_CONCAT(slope_variant_, VARIANT)(slope::Call const& call, bool half) {
  return half ? slope::launch<slope::Tile<__half, TILE>>(call) : slope::launch<slope::Tile<__nv_bfloat16, TILE>>(call);
}

#else

#define SLOPE_DECLARE(I) int slope_variant_##I(slope::Call const& call, bool half);
SLOPE_FOR_VARIANTS(SLOPE_DECLARE)

extern "C" {

int slope_gemm_variants() {
#define SLOPE_COUNT(I) +1
  return SLOPE_FOR_VARIANTS(SLOPE_COUNT);
}

// outputs[tokens, out] = inputs[tokens, in] W^T + adapter_inputs adapter_kept^T + bias. Rows of `inputs` are
// input_stride elements apart, those of `kept` [out, in/2] kept_stride and those of `adapter_kept` adapter_stride,
// multiples of 8; all else is packed.
// kernels/layout.py describes `kept` and `metadata`.
//   adapter_kept    [out, adapter_columns/2]
//   adapter_inputs  [tokens, adapter_columns]: column c of adapter_kept meets column c/2*4 + c%2; the others are not read
//   bias            fp32 [out] or null
//   group           token tiles that are worked on together: changes the speed only
//   half            fp16 instead of bf16
// Returns 0, a cudaError_t, or a slope::Status; launches on `stream` and does not wait.
int slope_sparse_gemm(slope::Call const* call) {
  switch (call->variant) {
#define SLOPE_CASE(I) \
  case I:             \
    return slope_variant_##I(*call, call->half != 0);
    SLOPE_FOR_VARIANTS(SLOPE_CASE)
  }
  return slope::kVariant;
}

const char* slope_gemm_error(int status) {
  switch (status) {
    case slope::kNoDriver: return "the CUDA driver has no cuTensorMapEncodeTiled";
    case slope::kTensorMap: return "a matrix cannot be described to the copy engine: unaligned?";
    case slope::kShape: return "sizes that the kernel does not take";
    case slope::kVariant: return "no such tile";
  }
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}

}  // extern "C"
#endif
