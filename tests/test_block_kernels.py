"""The Triton kernels of a block without a GPU: their checks in Triton's interpreter, and where they are refused."""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from interpreter import run_interpreted

import kernels
from configuration import BertConfig
from kernels.build import KernelsUnavailable
from modeling import BertForPreTraining, use_kernels
from training.distributed import World
from training.errors import UsageError
from training.execution import (
    asked_for,
    obstacle_to_dense_kernels,
    obstacle_to_short_attention,
    settle_execution,
)
from training.pretraining import PretrainingRun
from training.sparsity import SparsityConfig

SIZES = {"vocab_size": 61, "num_hidden_layers": 1, "intermediate_size": 64}
HEADS = {"hidden_size": 96, "num_attention_heads": 3}


@pytest.mark.parametrize("kernels", ["short_attention", "hopper_attention", "dense_kernels", "embedding_kernels"])
def test_the_kernels_in_tritons_interpreter(kernels):
    run_interpreted(f"{kernels}_interpreted.py")


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("rows_apart", [1024, 3072])
def test_the_backward_pass_of_attention_compiles_for_hopper(rows_apart, dropout):
    """Two programs fit on a multiprocessor, which has 228 KB of shared memory, 1 KB of it taken by each."""
    pytest.importorskip("triton", reason="needs Triton (requirements-test.txt)")
    from kernels.hopper_attention import WARPS, attention_backward

    constants = {"STRIDE": rows_apart, "HEADS": 16, "SIZE": 64, "LONGEST": 128, "DROPOUT": dropout}
    types = dict.fromkeys(("scale", "log2_scale", "kept_scale"), "fp32") | {"threshold": "i32"}
    types |= {"bias": "*fp32", "grad_bias": "*fp32", "boundaries": "*i32", "seed": "*i32"}
    types |= dict.fromkeys(("grad_out", "query", "key", "value", "grad_qkv"), "*bf16")
    compiled = compiled_for_hopper(attention_backward, types, constants, WARPS)
    assert compiled.asm["cubin"] and 2 * (compiled.metadata.shared + 1024) <= 228 * 1024


def test_the_dense_kernels_compile_for_hopper():
    """At BERT-Large's size: one quotient and one exponential a number, and registers for the programs of one wave."""
    pytest.importorskip("triton", reason="needs Triton (requirements-test.txt)")
    from kernels import dense_kernels as dense

    types = dict.fromkeys(("grad_y", "x", "y", "grad_x", "grad_out", "grad_skip", "total", "grad_residual"), "*bf16")
    types |= dict.fromkeys(("bias", "shares", "mean", "inverse_deviation", "weight"), "*fp32") | {"seed": "*i32"}
    types |= {"tokens": "i32", "threshold": "i32", "kept_scale": "fp32"}
    of_gelu = {"COLUMNS": 4096, "BLOCK": dense.COLUMNS_OF_PROGRAM, "ROWS": dense.ROWS}
    of_norm = {"HIDDEN": 1024, "BLOCK": 1024, "ROWS": dense.ROWS_OF_NORM, "SKIP": True, "DROPOUT": True}
    numbers = dense.ROWS * dense.COLUMNS_OF_PROGRAM // (32 * dense.WARPS)  # of a thread
    kernels = ((dense._gelu, of_gelu, numbers), (dense._gelu_backward, of_gelu, numbers))
    for kernel, constants, quotients in (*kernels, (dense._norm_backward, of_norm, 0)):
        compiled = compiled_for_hopper(kernel, types, constants, dense.WARPS)
        ptx = compiled.asm["ptx"]
        assert ("cp.async" in ptx) == (kernel is dense._gelu_backward)  # its next rows come while these are computed
        assert ptx.count("rcp.approx.ftz.f32") == ptx.count("ex2.approx.ftz.f32") == quotients
        assert kernel is dense._norm_backward or "div." not in ptx  # which divides sums of rows alone
        registers, spilled = registers_of(compiled)
        assert registers * 32 * dense.WARPS * dense.PROGRAMS_OF_PROCESSOR <= 65536 and not spilled, kernel


def test_the_embeddings_kernels_compile_for_hopper():
    """At BERT-Large's size: registers for the programs of one wave, and for eight that add rows up, each thread by
    itself; nothing is added by atomics."""
    pytest.importorskip("triton", reason="needs Triton (requirements-test.txt)")
    from kernels import embedding_kernels as embedding

    types = dict.fromkeys(("grad_out", "grad_skip", "out"), "*bf16") | {"seed": "*i32", "keys": "*i16"}
    floats = "words positions types weight bias statistics grad_total shares grad total".split()
    types |= dict.fromkeys(floats, "*fp32") | dict.fromkeys(("eps", "kept_scale"), "fp32")
    types |= dict.fromkeys(("word_ids", "position_ids", "type_ids", "order"), "*i64")
    types |= dict.fromkeys(("tokens", "length", "threshold", "padding"), "i32")
    hidden = {"HIDDEN": 1024, "BLOCK": 1024}
    of_tokens = hidden | {"ROWS": embedding.ROWS, "POSITIONS": True, "DROPOUT": True}
    of_chunks = hidden | {"CHUNK": embedding.CHUNK, "ROWS": embedding.ROWS_OF_CHUNK}
    of_shares = {"HIDDEN": 1024, "BLOCK": embedding.COLUMNS_OF_SHARES, "CHUNK": embedding.CHUNK}
    for kernel, constants, programs in (
        (embedding._embed, of_tokens, 8),
        (embedding._embed_backward, of_tokens | {"SKIP": True}, embedding.PROGRAMS_OF_PROCESSOR),
        (embedding._sum_runs, of_chunks, 8),
        (embedding._join_runs, of_shares | {"SHARES": embedding.SHARES}, 8),
    ):
        compiled = compiled_for_hopper(kernel, types, constants, 4)
        registers, spilled = registers_of(compiled)
        assert registers * 32 * 4 * programs <= 65536 and not spilled, kernel
        assert "atom.global" not in compiled.asm["ptx"] and "red.global" not in compiled.asm["ptx"]
        assert kernel is not embedding._sum_runs or "bar.sync" not in compiled.asm["ptx"]


def test_blockwise_attention_compiles_for_hopper():
    """At BERT-Large's size: as many programs on a multiprocessor as when the launches were measured; products on its
    tensor cores, no atomics, what is read next on its way while products are computed, and few registers kept
    elsewhere."""
    pytest.importorskip("triton", reason="needs Triton (requirements-test.txt)")
    from kernels import blockwise_attention as blockwise

    types = dict.fromkeys("grad_out out query key value biased grad_qkv".split(), "*bf16")
    types |= dict.fromkeys("log_sums bias grad_bias".split(), "*fp32") | {"sums_products": "*i64"}
    types |= dict.fromkeys(("scale", "log2_scale", "kept_scale"), "fp32")
    types |= dict.fromkeys(("boundaries", "seed"), "*i32") | dict.fromkeys(("tokens", "threshold"), "i32")
    shape = {"STRIDE": 3072, "HEADS": 16, "SIZE": 64, "LONGEST": 512, "DROPOUT": True, "BLOCKS": 8, "SHARES": 8}
    for kernel, launch, programs in (
        (blockwise.blockwise_forward, blockwise.FORWARD, 3),
        (blockwise.blockwise_over_queries, blockwise.OVER_QUERIES, 4),
        (blockwise.blockwise_over_keys, blockwise.OVER_KEYS, 3),
    ):
        constants = launch.constants()
        blocks = {name: constants[name] for name in ("QUERIES", "KEYS")}
        given = {name: number for name, number in (shape | blocks).items() if name in kernel.arg_names}
        options = {"num_stages": launch.stages} | ({"maxnreg": launch.registers} if launch.registers else {})
        compiled = compiled_for_hopper(kernel, types, given, launch.warps, **options)
        registers, spilled = registers_of(compiled)
        assert registers * 32 * launch.warps * programs <= 65536, kernel
        assert compiled.metadata.shared * programs <= 227 * 1024, kernel
        assert spilled <= 40, kernel
        ptx = compiled.asm["ptx"]
        assert "wgmma" in ptx and "cp.async" in ptx and not re.search(r"\b(atom|red)\.", ptx), kernel


def compiled_for_hopper(kernel, types: dict[str, str], constants: dict, warps: int, **options):
    """In Triton or Gluon, with pointers to 16-byte aligned memory."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile
    from triton.experimental.gluon._runtime import GluonASTSource

    types, names = types | dict.fromkeys(constants, "constexpr"), kernel.arg_names
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types[name].startswith("*")}
    kind = GluonASTSource if kernel.is_gluon() else ASTSource
    source = kind(kernel, {name: types[name] for name in names}, constants, aligned)
    return compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps} | options)


def registers_of(compiled) -> tuple[int, int]:
    """Of a thread, and the bytes that it keeps elsewhere for want of more."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return tuple(int(re.search(rf"{name}:(\d+)", told)[1]) for name in ("REG", "STACK"))


@pytest.fixture
def triton(monkeypatch):
    """A GPU that runs Triton's kernels, as far as the choice of them can see."""
    monkeypatch.setattr("kernels.lamb.check_device", lambda device: None)


CUDA = World(0, 1, 0, torch.device("cuda"))


@pytest.mark.parametrize(
    ("value", "obstacle", "runs"),
    [("auto", "", True), ("auto", "cannot run", False), ("short", "", True), ("True", "", True)]
    + [(off, obstacle, False) for off in ("flash", "False") for obstacle in ("", "cannot run")],
)
def test_what_a_flag_asks_for_runs_where_it_can(value, obstacle, runs):
    assert asked_for("attention", value, obstacle) == runs


def test_what_is_asked_for_by_name_and_cannot_run_is_an_error():
    with pytest.raises(UsageError, match="^--attention short: cannot run with a CPU; leave it out"):
        asked_for("attention", "short", "cannot run with a CPU")


@pytest.mark.parametrize(
    ("change", "obstacle"),
    [
        ({}, ""),
        ({"device": "cpu"}, "cannot run with a CPU"),
        ({"unpadded": False}, "cannot run with padding computed (--unpad)"),
        ({"longest": 512}, ""),
        ({"longest": 513}, "cannot run with sequences of 513 tokens"),
        ({"heads": 4}, "cannot run with attention heads of size 24"),
    ],
)
def test_what_stands_against_short_attention(change, obstacle, triton):
    case = {"device": "cuda", "unpadded": True, "longest": 128, "heads": 3} | change
    config = BertConfig(**SIZES, hidden_size=96, num_attention_heads=case["heads"])
    world = World(0, 1, 0, torch.device(case["device"]))
    assert obstacle_to_short_attention(config, case["unpadded"], case["longest"], world) == obstacle


@pytest.mark.parametrize(
    ("value", "longest", "capability", "runs"),
    [("auto", 512, 9, True), ("auto", 512, 8, False), ("auto", 128, 8, True), ("short", 512, 8, True)],
)
def test_auto_takes_attention_of_ours_where_it_was_timed(value, longest, capability, runs, triton, monkeypatch):
    pytest.importorskip("triton", reason="needs Triton (requirements-test.txt)")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
    args = SimpleNamespace(attention=value, unpad="True", precision="bf16", dense_kernels="False", pruned_matrix="none")
    size = {"sequences": 4, "length": 128, "longest": longest, "compiled": True}
    found = settle_execution(args, BertConfig(**SIZES, **HEADS), SparsityConfig("none"), CUDA, **size)
    assert found.short_attention == runs
    assert any("timed with sequences of more than 128 tokens on Hopper" in note for note in found.notes) == (not runs)


def test_a_triton_with_another_gluon_is_told_before_the_first_step(triton, monkeypatch):
    pytest.importorskip("triton", reason="needs Triton (requirements-test.txt)")
    monkeypatch.setattr("kernels.short_attention.runs_on_hopper", lambda device, size: True)
    monkeypatch.setitem(sys.modules, "triton.experimental.gluon", None)
    monkeypatch.delitem(sys.modules, "kernels.hopper_attention", raising=False)
    found = obstacle_to_short_attention(BertConfig(**SIZES, **HEADS), True, 128, CUDA)
    assert re.match(r"this Triton's Gluon is another \(.*gluon", found)


OBSTACLES = {
    "short": lambda: obstacle_to_short_attention(BertConfig(**SIZES, **HEADS), True, 128, CUDA),
    "dense": lambda: obstacle_to_dense_kernels(True, CUDA),
}


@pytest.mark.parametrize("kernel", OBSTACLES)
def test_a_machine_that_cannot_compile_is_told_before_the_first_step(kernel, monkeypatch):
    def refuse(device):
        raise KernelsUnavailable("Triton needs a C compiler: install gcc, or set CC")

    monkeypatch.setattr("kernels.lamb.check_device", refuse)
    assert OBSTACLES[kernel]() == "Triton needs a C compiler: install gcc, or set CC"


@pytest.mark.parametrize("kernel", OBSTACLES)
def test_without_triton_that_is_the_reason(kernel, triton, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in ("short_attention", "dense_kernels", "triton_parts"):  # not LAMB's, which has checked the device
        monkeypatch.delitem(sys.modules, f"kernels.{name}", raising=False)
        monkeypatch.delattr(kernels, name, raising=False)
    assert re.match(r"no Triton \(.*\): it comes with every CUDA build of torch", OBSTACLES[kernel]())


@pytest.mark.parametrize("short", [False, True])
def test_what_a_run_is_told_reaches_the_model(short):
    seen = []

    def model(ids, types, attention, masked):
        seen.append(attention)
        return None, None

    run = PretrainingRun.__new__(PretrainingRun)
    run.short_attention, run.loss_sums = short, lambda *scores: (0, 0)
    names = ("input_ids", "token_type_ids", "positions", "masked_positions", "masked_labels", "next_sentence_labels")
    part = {name: torch.zeros(4, dtype=torch.int64) for name in names}
    run.forward(model, part | {"boundaries": torch.tensor([0, 3, 4])}, 128)
    assert (seen[0].short, seen[0].longest) == (short, 128)


# --------------------------------------------------------------------------------------------------- the dense kernels
def test_dense_kernels_run_in_the_embeddings_and_the_blocks():
    pytest.importorskip("triton", reason="Triton is there for Linux alone")
    model = BertForPreTraining(BertConfig(**SIZES, **HEADS))
    use_kernels(model)
    told = [name for name, module in model.named_modules() if getattr(module, "kernels", False)]
    block = "bert.encoder.layer.0"
    assert told == ["bert.embeddings", f"{block}.attention.output", f"{block}.intermediate", f"{block}.output"]


def test_dense_kernels_want_compiled_blocks():
    assert obstacle_to_dense_kernels(False, CUDA) == "cannot run without a GPU's compiled blocks"
