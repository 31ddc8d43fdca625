"""Runs of several processes: the same training as one, one stop for all, nothing left behind, and the launchers."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from pretraining_runs import (
    ROOT,
    TrainingFiles,
    assembled,
    begin_ranks,
    losses,
    run,
    send_small_buckets,
    uneven_batch,
    values,
    wait_for_step,
    write_model,
)

from data.loader import step_loader
from training.checkpoint import load_checkpoint, saved_steps
from training.distributed import StopSignal, process_group

LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node=2"],
    "launch": ["torch.distributed.launch", "--nproc_per_node=1", "--master_port=0"],
}


def without_dropout(files: TrainingFiles, output: Path, **changes) -> list[str]:
    return files.flags(output, model_config_file=files.model_without_dropout, **changes)


# ------------------------------------------------------------------------------------------ the same training as alone
BATCHES = [
    # 12 = 2 micro-steps of two ranks, 4 of one; 7 leaves gaps in the last micro-step of both
    {"global_batch_size": 12, "local_batch_size": 3},
    {"global_batch_size": 7, "local_batch_size": 2},
    {"global_batch_size": 3, "local_batch_size": 4},  # the second rank has padding alone
]


@pytest.mark.parametrize("batch", BATCHES, ids=["12 of 3", "7 of 2", "3 of 4"])
def test_two_processes_train_as_one_does(files, tmp_path, batch):
    """Through accumulation, the adapter switch and evaluation; to rounding, since sums are in another order."""
    for ranks in (1, 2):
        flags = without_dropout(files, tmp_path / str(ranks), eval_dir=files.heldout, eval_interval=10, **batch)
        run(flags, send_small_buckets, ranks=ranks)
    for column in ("step_loss", "mlm_loss", "nsp_loss", "average_loss", "heldout_mlm_loss", "heldout_mlm_accuracy"):
        one, two = (values(tmp_path / str(ranks), column) for ranks in (1, 2))
        assert two == pytest.approx(one, rel=1e-4), column
    one, two = (load_checkpoint(tmp_path / str(ranks) / "pretrain_ckpts" / "ckpt_20.pt") for ranks in (1, 2))
    assert one["data"] == two["data"]
    for name, tensor in one["model"].items():
        if tensor.is_floating_point():
            torch.testing.assert_close(two["model"][name], tensor, rtol=1e-2, atol=1e-3, msg=name)


# ----------------------------------------------------------------------------------------------------------- gradients
def record_gradients(flags: list[str], result: Path) -> None:
    """Called in each rank in place of a run: one step on an uneven batch, and when gradients were averaged."""
    from training.pretraining import Counts

    begun = assembled(flags)
    world, engine = begun.world, begun.engine
    forwards, syncs, taken = 0, [], {}

    def count(*given, forward=begun.forward):
        nonlocal forwards
        forwards += 1
        return forward(*given)

    def all_reduce(tensor, reduce=torch.distributed.all_reduce, **options):
        if tensor.dtype == torch.float32:  # others are counts and losses
            syncs.append(forwards)
        return reduce(tensor, **options)

    with process_group(world):
        engine.connect()
        torch.distributed.all_reduce = all_reduce
        begun.forward = count
        engine.step = lambda rate: taken.update({n: p.grad.clone() for n, p in engine.model.named_parameters()})
        losses = begun.losses_of(begun.give_step(1, uneven_batch(world.rank, world.size), Counts(6, 3, 0), 0.0))
    torch.save({"gradients": taken, "losses": losses, "syncs": syncs}, f"{result}.{world.rank}")
    sys.exit(0)


def test_gradients_of_two_ranks_are_those_of_the_global_means_and_averaged_once(files, tmp_path):
    """Micro-steps and ranks with 3, 2, 1, 0, 0, 0 masked tokens; the last micro-step alone averages over ranks."""
    flags = without_dropout(files, tmp_path / "out", pruned_matrix="none", add_lora="False")
    prepare = functools.partial(record_gradients, flags, tmp_path / "result")
    for rank in begin_ranks(flags, 2, prepare):
        ended = rank.finish()
        assert ended.code == 0, ended
    model = assembled(flags).engine.model
    batch = {name: tensor.flatten(0, 1) for name, tensor in uneven_batch().items()}
    scores, sentence_scores = model(
        batch["input_ids"], batch["token_type_ids"], batch["attention_mask"], batch["masked_positions"]
    )
    mlm = torch.nn.functional.cross_entropy(scores.flatten(0, 1), batch["masked_labels"].flatten(), ignore_index=-1)
    nsp = torch.nn.functional.cross_entropy(sentence_scores, batch["next_sentence_labels"], ignore_index=-1)
    (mlm + nsp).backward()
    for rank in range(2):
        result = torch.load(f"{tmp_path / 'result'}.{rank}")
        assert result["losses"] == pytest.approx((mlm.item(), nsp.item()), rel=1e-6)
        assert result["syncs"] and set(result["syncs"]) == {3}, "averaged before the last of three micro-steps"
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(result["gradients"][name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def record_sums(flags: list[str], result: Path) -> None:
    """Called in each rank in place of a run: its own gradients of the first step, and what the optimizer would get."""
    begun = assembled(flags)
    engine, taken = begun.engine, {}

    def gradients(name: str) -> None:
        engine.step = lambda rate: taken.update({name: {n: p.grad.clone() for n, p in engine.model.named_parameters()}})
        begun.losses_of(begun.give_step(1, batch, counts, 0.0))
        engine.buckets.zero()

    with process_group(begun.world):
        engine.connect()
        batch, counts = begun.next_batch(step_loader(begun.dataset), StopSignal())
        gradients("sum")
        engine.sums_gradients = False
        gradients("own")
        engine.disconnect()
    torch.save(taken, f"{result}.{begun.world.rank}")
    sys.exit(0)


@pytest.mark.parametrize("ranks", [2, 3])
def test_gradients_summed_in_bf16_are_the_sums_rounded(files, tmp_path, ranks):
    """Of sparse and dense weights, the same on all ranks. Each rank's part is rounded, and each sum of them."""
    flags = without_dropout(files, tmp_path / "out", gradient_communication="bf16")
    prepare = functools.partial(record_sums, flags, tmp_path / "result")
    assert [rank.finish().code for rank in begin_ranks(flags, ranks, prepare)] == [0] * ranks
    found = [torch.load(f"{tmp_path / 'result'}.{rank}") for rank in range(ranks)]
    exact = 0
    for name, rounded in found[0]["sum"].items():
        assert all(torch.equal(rounded, other["sum"][name]) for other in found), name
        assert rounded.dtype == torch.float32
        assert torch.equal(rounded, rounded.bfloat16().float()), f"{name} was not added up in bf16"
        own = torch.stack([one["own"][name] for one in found])
        error, bound = (rounded - own.sum(0)).abs(), ranks * 2**-8 * own.abs().sum(0)
        assert (error <= 1.01 * bound + 1e-30).all(), name
        exact += torch.equal(rounded, own.sum(0))
    assert exact < len(found[0]["sum"])


def test_losses_with_gradients_averaged_in_bf16_stay_near_fp32(files, tmp_path):
    """Near, and not the same: before the first update they are. One rank averages nothing, and rounds nothing."""
    runs = {}
    for kind, ranks in (("fp32", 2), ("bf16", 2), ("fp32", 1), ("bf16", 1)):
        flags = without_dropout(files, tmp_path / f"{kind} {ranks}", gradient_communication=kind)
        run(flags, ranks=ranks)
        runs[kind, ranks] = values(tmp_path / f"{kind} {ranks}")
    full, half = runs["fp32", 2], runs["bf16", 2]
    assert half[0] == full[0] and all(a != b for a, b in zip(half[2:], full[2:], strict=True))
    assert half == pytest.approx(full, rel=2e-3)
    assert runs["bf16", 1] == runs["fp32", 1]


# ------------------------------------------------------------------------------------------------------------- the end
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("told", [0, 1])
def test_a_signal_to_one_rank_stops_both_at_the_same_step(files, tmp_path, number, told):
    flags = files.flags(tmp_path, max_steps=100_000, num_steps_per_checkpoint=100_000)
    ranks = begin_ranks(flags, 2)
    wait_for_step(tmp_path, 3)
    ranks[told].signal(number)
    ended = [rank.finish() for rank in ranks]
    assert [end.code for end in ended] == [0, 0], ended
    last = losses(tmp_path)[-1][0]
    assert saved_steps(tmp_path / "pretrain_ckpts") == [last]
    assert f"stopped after step {last}" in ended[0].stderr

    run(files.flags(tmp_path, max_steps=last + 2, num_steps_per_checkpoint=100_000), ranks=2)
    assert [step for step, _ in losses(tmp_path)] == list(range(1, last + 3))


def leave_tensors_to_let_go_of(flags: list[str]) -> None:
    """Called in each rank in place of a run: the group's threads have many tensors to let go of when it ends."""
    begun = assembled(flags)
    sys.setswitchinterval(1000)  # the interpreter's lock stays where it is unless a call lets go of it
    with process_group(begun.world):
        begun.engine.connect()
        for _ in range(500):
            torch.distributed.all_reduce(torch.ones(1), async_op=True)
    begun.engine.disconnect()
    sys.exit(0)


def test_ranks_end_though_their_group_has_tensors_to_let_go_of(files, tmp_path):
    """Its threads need the interpreter's lock for that, which this process must not hold to its end."""
    flags = files.flags(tmp_path)
    ranks = begin_ranks(flags, 2, functools.partial(leave_tensors_to_let_go_of, flags))
    assert [rank.finish(30).code for rank in ranks] == [0, 0]


def children(process: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks for the workers in /proc")
def test_workers_end_within_seconds_of_a_launcher_that_was_killed(files, tmp_path):
    flags = files.flags(tmp_path, max_steps=100_000, num_steps_per_checkpoint=100_000)
    command = [sys.executable, "-m", *LAUNCHERS["torchrun"], "run_pretraining.py", *flags]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True) as launcher:
        wait_for_step(tmp_path, 3)
        workers = children(launcher.pid)
        assert len(workers) == 2 and all(map(alive, workers))
        launcher.kill()
    deadline = time.monotonic() + 10
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    left = [worker for worker in workers if alive(worker)]
    for worker in left:
        os.kill(worker, signal.SIGKILL)
    assert not left


# ---------------------------------------------------------------------------------------------- the published command
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_published_command(files, tmp_path, launcher):
    """As its README has it, with the published phase 1 configuration; small values on the command line win over it."""
    model = write_model(tmp_path / "model.json")
    published = f"""
        --input_dir {files.train} --output_dir {tmp_path} --config_file config/bert_pretraining_phase1_config.json
        --weight_decay 0.01 --num_steps_per_checkpoint 200 --optimizer fused-lamb --pruned_matrix static-weight
        --skip_first_block False --skip_last_block False --skip_attention False --reduction_dim True
        --add_lora False --lora_rank 4 --unstructured_masking False --unstructured_mask_sparsity 60
        --sparsity_increment -1
    """.split()
    small = f"--model_config_file {model} --max_steps 3 --global_batch_size 8 --local_batch_size 2".split()
    command = [sys.executable, "-m", *LAUNCHERS[launcher], "run_pretraining.py", *published, *small]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=110)
    assert ended.returncode == 0, ended.stderr
    assert [step for step, _ in losses(tmp_path, "phase1_log")] == [1, 2, 3]
    arguments = load_checkpoint(tmp_path / "pretrain_ckpts" / "ckpt_3.pt")["arguments"]
    assert arguments["warmup_proportion"] == 0.2843 and arguments["precision"] == "fp16"
    assert ended.stderr.count("finished: step 3") == 1
