"""What a GPU must do: compute what the CPU computes, run the pretraining door, and resume exactly."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from shard_factory import write_shard
from torch import nn

from optimization import Lamb
from sparse_ops import OperandRefresh, SparseLinear, nm_mask

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parent.parent


def sparse_layer(m: int, reduction_dim: bool) -> SparseLinear:
    torch.manual_seed(0)
    linear = nn.Linear(64, 96)
    return SparseLinear(linear, nm_mask(linear.weight.detach().abs(), 2, m, dim=int(reduction_dim)), m, reduction_dim)


@pytest.mark.parametrize("reduction_dim", [True, False])
@pytest.mark.parametrize("m", [4, 8])
def test_sparse_layer_on_gpu_equals_cpu(m, reduction_dim):
    host, device = sparse_layer(m, reduction_dim), sparse_layer(m, reduction_dim).cuda()
    x = torch.randn(3, 7, 64)
    results = []
    for layer, inputs in ((host, x.clone()), (device, x.cuda())):
        inputs.requires_grad_()
        layer.double()
        y = layer(inputs)
        y.square().sum().backward()
        results.append([t.cpu().double() for t in (y, inputs.grad, layer.values.grad, layer.bias.grad)])
    for on_host, on_device in zip(*results, strict=True):
        torch.testing.assert_close(on_device, on_host, rtol=1e-6, atol=1e-6)


def test_masks_choose_the_same_on_gpu():
    scores = torch.randint(0, 4, (64, 64)).float()  # full of ties
    assert torch.equal(nm_mask(scores.cuda(), 2, 4).cpu(), nm_mask(scores, 2, 4))


@pytest.mark.parametrize("fused", [False, True])
def test_training_on_gpu_follows_the_cpu(fused):
    layers = [sparse_layer(4, True).double(), sparse_layer(4, True).double().cuda()]
    inputs = torch.randn(10, 5, 64, dtype=torch.float64)
    for layer in layers:
        layer.set_operand_dtype(torch.float64)
        optimizer = Lamb(layer.parameters(), lr=1e-2, fused=fused)
        OperandRefresh(layer).attach(optimizer)
        for x in inputs.to(layer.values.device):
            layer(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(layers[1].values.cpu(), layers[0].values, rtol=1e-5, atol=1e-7)
    assert torch.equal(layers[1].mask_bits.cpu(), layers[0].mask_bits)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    for number in range(2):
        write_shard(folder / "train" / f"shard_{number}.hdf5", count=64, length=32, vocab_size=211, seed=number)
    sizes = {"vocab_size": 211, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 128, "max_position_embeddings": 32}
    (folder / "model.json").write_text(json.dumps(sizes))
    return folder


def pretrain(data: Path, output: Path, *flags: str, launcher: tuple[str, ...] = (), cuda: bool = True) -> list[float]:
    """Run the door; returns the step_loss column."""
    command = [sys.executable, *launcher, str(ROOT / "run_pretraining.py"), "--disable_progress_bar"]
    command += ["--input_dir", str(data / "train"), "--model_config_file", str(data / "model.json")]
    command += ["--output_dir", str(output), "--max_steps", "12", "--num_steps_per_checkpoint", "4"]
    command += ["--global_batch_size", "16", "--local_batch_size", "8", "--learning_rate", "4e-3"]
    command += ["--pruned_matrix", "static-weight", "--add_lora", "lazy", "--lazy_lora_fraction", "0.3", *flags]
    hidden = {} if cuda else {"CUDA_VISIBLE_DEVICES": ""}
    # The compiler times its reductions' shapes and keeps the fastest; another test's process could overwrite it.
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(data / "compiled")}
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | cache | hidden, timeout=300)
    with (output / "logfile_metrics.csv").open() as file:
        return [float(row["step_loss"]) for row in csv.DictReader(file)]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_pretraining_on_gpu_follows_the_cpu(data, tmp_path, precision):
    model = json.loads((data / "model.json").read_text())
    still = data / "model_without_dropout.json"  # dropout draws other numbers on a GPU
    still.write_text(json.dumps(model | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}))
    flags = ("--model_config_file", str(still), "--optimizer", "fused-lamb")
    on_gpu = pretrain(data, tmp_path / "gpu", *flags, "--precision", precision)
    on_cpu = pretrain(data, tmp_path / "cpu", *flags, "--precision", "fp32", cuda=False)
    tolerance = 1e-4 if precision == "fp32" else 2e-3
    assert on_gpu == pytest.approx(on_cpu, abs=tolerance)


def test_resume_on_gpu_gives_the_same_losses(data, tmp_path):
    whole = pretrain(data, tmp_path / "whole", "--precision", "bf16")
    part = tmp_path / "part"
    pretrain(data, part, "--precision", "bf16")
    (part / "pretrain_ckpts" / "ckpt_12.pt").unlink()
    assert pretrain(data, part, "--precision", "bf16") == whole


def test_torchrun_with_nccl_gives_the_same_losses(data, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={torch.cuda.device_count()}")
    alone = pretrain(data, tmp_path / "alone", "--precision", "fp32")
    launched = pretrain(data, tmp_path / "launched", "--precision", "fp32", launcher=launcher)
    if torch.cuda.device_count() == 1:
        assert launched == alone
    else:  # other ranks draw other dropout
        assert launched == pytest.approx(alone, abs=0.1)
