"""Where a step's GPU time goes: kernels told apart by name, idle time, what a trace holds."""

from __future__ import annotations

import json

import pytest

from benchmarks import step_profile
from benchmarks.step_profile import Kernel


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("2:4 GEMM", "void (anonymous namespace)::sparse_gemm_kernel<Tile<256, 192> >(Maps, Problem)"),
        ("adapters", "void adapter_grads_kernel<__nv_bfloat16, 16>(AdapterGradients)"),
        ("attention", "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd<cutlass::bf16> >()"),
        ("attention", "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<>::Params)"),
        ("attention", "_attention_forward"),
        ("attention", "attention_backward"),
        ("attention", "blockwise_over_keys"),
        ("refresh, gather", "void (anonymous namespace)::refresh_kernel<__nv_bfloat16, 2, false>(RefreshTable)"),
        ("refresh, gather", "void (anonymous namespace)::gather_kernel<__nv_bfloat16, 2, true>(GatherPointers, Layer)"),
        ("refresh, gather", "void adapter_operands_kernel<__half>(AdapterTable)"),
        ("optimizer", "_moments"),
        ("optimizer", "_apply"),
        ("optimizer", "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>()"),
        ("dense GEMM", "nvjet_tst_256x128_64x4_1x2_h_bz_coopA_NTT"),
        ("dense GEMM", "sm90_xmma_gemm_bf16bf16_bf16f32_f32_nn_n_tilesize256x128x64_cublas"),
        ("dense GEMM", "void cublasLt::splitKreduce_kernel<32, 16, int, float>(cublasLt::cublasSplitKParams<float>)"),
        ("other kernels", "void at::native::vectorized_gather_kernel<16, long>(char*, char*, long*)"),
        ("other kernels", "triton_per_fused_add_native_layer_norm_3"),
        ("other kernels", "triton_poi_fused_apply_moments"),
        ("other kernels", "Memcpy HtoD (Pinned -> Device)"),
    ],
)
def test_kernels_are_told_apart_by_name(kind, name):
    assert step_profile.kind_of(name) == kind


def test_idle_is_what_no_kernel_covers():
    kernels = [
        *(Kernel("nvjet", 10.0, 14.0), Kernel("triton_poi", 12.0, 13.0)),  # the second one runs beside the first
        *(Kernel("_clip", 13.5, 15.0), Kernel("nvjet", 18.0, 20.0)),
    ]
    found = step_profile.breakdown(kernels, steps=2)
    expected = {"dense GEMM": 3.0, "optimizer": 0.75, step_profile.OTHER: 0.5, step_profile.IDLE: 1.5}
    assert found == dict.fromkeys(step_profile.KINDS, 0.0) | expected
    assert step_profile.longest_others(kernels, 2) == ["500.000 ms triton_poi"]


def test_a_trace_s_kernels_alone_are_read(tmp_path):
    def event(category, **more):
        return {"ph": "X", "cat": category, "name": category, "ts": 2e6, "dur": 5e5} | more

    ranges = [event("gpu_user_annotation"), event("cuda_runtime"), event("kernel", ph="i")]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": [event("kernel"), event("gpu_memcpy", ts=3e6), *ranges]}))
    assert step_profile.read_trace(path) == [Kernel("kernel", 2.0, 2.5), Kernel("gpu_memcpy", 3.0, 3.5)]
