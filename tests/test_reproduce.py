"""scripts/reproduce.py: the whole comparison on a tiny model, branches, stops, the report, one line for mistakes."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from finetuning_runs import sentences, write, write_questions, write_sst2, write_stsb
from pretraining_runs import ROOT, checkpoint, kill_after, metrics, wait_for_step
from reproduction_calls import call, flags, report_rows, reproduce, run_processes, settings
from reproduction_data import HIDDEN, Forked, make_data
from reproduction_report import MARKERS  # scripts, found through reproduction_calls
from reproduction_runs import PREFIX, RECIPES, STANDARD, Plan, Settings, _copy_lines, _copy_rows
from run_processes import Command, Planned, Processes

import run_glue
import run_pretraining
import run_squad
from optimization import learning_rate

STEPS = 40  # 20 passes over 63 / 5 sequences in batches of 6, to the nearest 10
BEFORE = "# Results\n\nabove\n\n"
SAME = ("step", "step_loss", "mlm_loss", "average_loss", "learning_rate", "adapters", "heldout_mlm_loss")


def log_of(output: Path, name: str) -> list[list[str]]:
    """What may not depend on how a run came to be, row by row, as written."""
    return [[row[column] for column in SAME] for row in metrics(output / name, PREFIX)]


def shared(output: Path, one: str, other: str) -> int:
    """Steps that the two runs took together: those of the same speed, to the last digit."""
    logs = [[row["sequences_per_second"] for row in metrics(output / name, PREFIX)] for name in (one, other)]
    return sum(a == b for a, b in zip(*logs, strict=True))


def same_weights(one: dict, other: dict) -> bool:
    return one["model"].keys() == other["model"].keys() and all(
        torch.equal(tensor, other["model"][key]) for key, tensor in one["model"].items()
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = make_data(tmp_path_factory.mktemp("data"))
    write_stsb(folder / "glue/STS-B")
    write_sst2(folder / "glue/SST-2-shaped")
    for split, seed in (("train", 0), ("dev", 1)):
        rows = [f"{n}\t{text}\t{text}\t{('not_entailment', 'entailment')[y]}\n" for n, (text, y) in
                enumerate(sentences(16, seed))]  # fmt: skip
        write(folder / f"glue/QNLI-shaped/{split}.tsv", "index\tquestion\tsentence\tlabel\n" + "".join(rows))
        write_questions(write(folder / f"download/squad/{split}-v1.1.json", ""), count=6, seed=seed)
    return folder


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """The output directory of the whole comparison; `docs.md` beside it has the report, too. Read-only for tests."""
    output = tmp_path_factory.mktemp("whole") / "out"
    docs = write(output.parent / "docs.md", BEFORE + "\nold\n".join(MARKERS) + "\n\nbelow\n")
    words = flags(data, output, "--docs", str(docs))
    log = output.parent / "log"
    assert call(words, lambda command, place, _: Forked(command, place, log)) == 0, log.read_text()
    return output


# --------------------------------------------------------------------------------------------------------------- whole
def test_all_runs_have_the_same_steps_and_the_same_data(whole):
    tokens = {}
    for name in STANDARD:
        rows = metrics(whole / name, PREFIX)
        assert [int(row["step"]) for row in rows] == list(range(1, STEPS + 1))
        tokens[name] = [round(6 * float(r["tokens_per_second"]) / float(r["sequences_per_second"])) for r in rows]
    assert tokens["dense"] == tokens["slope"] == tokens["lazy_1"] == tokens["lazy_10"]
    half = STEPS // 2
    assert tokens["pruned_half"][:half] == tokens["dense"][:half]
    assert tokens["pruned_half"][half:] != tokens["dense"][:half]  # its second half is not its first again


def test_runs_are_what_their_names_say(whole):
    adapters = {name: sum(row["adapters"] == "1" for row in metrics(whole / name, PREFIX)) for name in STANDARD}
    assert adapters == {"dense": 0, "slope": 0, "lazy_1": 1, "lazy_10": 4, "pruned_half": 0}
    for name in STANDARD:
        sparsity = checkpoint(whole / name, STEPS)["sparsity"]
        assert sparsity["pruned_matrix"] == ("none" if name == "dense" else "static-weight")
        assert sparsity["lora_rank"] == (HIDDEN // 16 if name.startswith("lazy") else 0)


def test_the_pruned_run_is_dense_before_and_follows_its_rates_after(whole):
    dense, pruned = log_of(whole, "dense"), log_of(whole, "pruned_half")
    assert pruned[: STEPS // 2] == dense[: STEPS // 2]
    rates = [[float(row[SAME.index("learning_rate")]) for row in log] for log in (dense, pruned)]
    assert rates[1] == pytest.approx(rates[0], rel=1e-12)
    assert pruned[STEPS // 2][1] != dense[STEPS // 2][1]
    assert checkpoint(whole / "pruned_half", STEPS)["phase_start"] == STEPS // 2


def test_every_run_is_finetuned_from_its_last_checkpoint(whole):
    for name in STANDARD:
        for task, seeds in (("STS-B", 2), ("SST-2-shaped", 2), ("QNLI-shaped", 2), ("SQuAD", 1)):
            results = json.loads((whole / name / "finetune" / task / "eval_results.json").read_text())
            assert len(results["seeds"]) == seeds
            (log, *_) = (whole / name / "finetune" / task).rglob("finetune.txt")
            assert f"{whole}/{name}/pretrain_ckpts/ckpt_{STEPS}.pt lacks, so these start anew: " in log.read_text()
    assert not list(whole.rglob("finetune_ckpts"))


def test_the_report_stands_in_the_document_too(whole):
    docs, report = (whole.parent / "docs.md").read_text(), (whole / "report.md").read_text()
    begin, end = MARKERS
    assert docs.startswith(BEFORE + begin + "\n\n![") and docs.endswith(f"\n\n{end}\n\nbelow\n")
    assert report.replace("curves.png", "reproduction.png") in docs and "old" not in docs
    assert (whole / "curves.png").read_bytes() == (whole.parent / "reproduction.png").read_bytes()
    assert (whole / "curves.png").stat().st_size > 20_000
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.splitlines() if line[:1] == "|"]
    rows = {row[0]: row[1:] for row in table}
    assert rows[""] == [RECIPES[name].title.format(rank=HIDDEN // 16) for name in STANDARD]
    assert rows["steps"] == [str(STEPS)] * 5
    assert rows["density of W^R (2:4: 0.5)"] == ["1.0000", *["0.5000"] * 4]
    backward = [float(cell) for cell in rows["density of W^{R,C} (the formula, 2:4: 0.40625)"]]
    assert backward[0] == 1 and all(0.3 < value < 0.5 for value in backward[1:])
    for task in ("STS-B dev pearson", "SST-2-shaped dev accuracy", "QNLI-shaped dev accuracy"):
        assert all(" ± " in cell for cell in rows[task])
    assert all(0 <= float(cell) <= 100 for cell in rows["SQuAD dev f1"])
    last = metrics(whole / "slope", PREFIX)[-1]
    assert rows["held-out MLM loss, last"][1] == f"{float(last['heldout_mlm_loss']):.3f}"
    command = "bash scripts/reproduce.sh --epochs 20 --global_batch_size 6 --local_batch_size 3 --learning_rate 0.004 "
    command += (
        "--sparse_learning_rate 0.005 --precision fp32 --finetune_seeds 3,5 --finetune_steps 2 --model_config_file FILE"
    )
    assert f"```\n{command}\n```" in report


def test_again_nothing_runs(whole, data, tmp_path):
    def start(command, *_):
        raise AssertionError(command)

    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*.csv")}
    assert call(flags(data, whole), start) == 0
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*.csv")} == before


# -------------------------------------------------------------------------------------------------- branches and stops
@pytest.mark.parametrize("name", ["lazy_1", "lazy_10"])
def test_a_branch_is_the_run_without_interruption(name, whole, data, tmp_path, capfd):
    """Alone there is nothing to branch off, so it runs from its first step."""
    assert call(flags(data, tmp_path, "--only", name, "--skip_finetuning")) == 0
    assert f"{name}: runs from its first step" in capfd.readouterr().out
    assert log_of(tmp_path, name) == log_of(whole, name)
    assert same_weights(checkpoint(tmp_path / name, STEPS), checkpoint(whole / name, STEPS))


def test_a_branch_does_not_run_what_it_shares(whole, data, tmp_path):
    assert call(flags(data, tmp_path, "--only", "slope,lazy_10", "--skip_finetuning"), spy := Spy()) == 0
    assert [word for command in spy.commands for word in command if word.startswith(str(tmp_path))] == [
        str(tmp_path / "slope"),
        str(tmp_path / "lazy_10"),
    ]
    text = (tmp_path / "lazy_10" / f"{PREFIX}.txt").read_text()
    assert f"adapters of rank {HIDDEN // 16} joined before step 37" in text
    assert shared(tmp_path, "slope", "lazy_10") == 36


class Spy:
    """Starts commands and remembers them; the `number`-th one is killed once `step` is logged."""

    def __init__(self, number: int = -1, step: int = 0):
        self.commands, self.number, self.step = [], number, step

    def __call__(self, command: list[str], *how) -> Forked:
        self.commands.append(command)
        return Forked(command, *how, [kill_after(self.step)] if len(self.commands) - 1 == self.number else [])


def test_a_branch_that_has_not_taken_a_step_shows_what_it_shares(data, tmp_path, capsys):
    assert call(flags(data, tmp_path, "--only", "slope", "--skip_finetuning")) == 0
    assert call(flags(data, tmp_path, "--only", "lazy_10", "--skip_finetuning"), lambda *_: Ended(1)) == 2
    assert "lazy_10: ended with exit code 1" in capsys.readouterr().err
    assert report_rows(tmp_path, capsys)["steps"] == [str(STEPS), f"36 of {STEPS}"]


@pytest.mark.parametrize(("number", "step"), [(0, 22), (0, STEPS), (1, 38), (2, 21), (3, 39)])
def test_goes_on_where_a_run_was_killed(number, step, whole, data, tmp_path, capfd):
    """In dense past where another branches off, in SLoPe, and in a branch before it has a checkpoint of its own."""
    words = flags(data, tmp_path, "--only", "dense,slope,lazy_1,pruned_half", "--skip_finetuning")
    assert call(words, Spy(number, step)) == 2
    assert "ended with exit code -9; when its reason is gone, the same command goes on" in capfd.readouterr().err
    assert call(words) == 0
    for name in ("dense", "slope", "lazy_1", "pruned_half"):
        assert log_of(tmp_path, name) == log_of(whole, name)
        assert same_weights(checkpoint(tmp_path / name, STEPS), checkpoint(whole / name, STEPS))


def test_a_branch_outlives_its_sources_stops(whole, data, tmp_path):
    """A stop adds a checkpoint, which would push out the one where others branch off."""
    words = flags(data, tmp_path, "--only", "slope", "--skip_finetuning")
    for step in (38, 39):
        call(words, lambda *command, step=step: Forked(*command, [kill_after(step, signal.SIGTERM)]))
    assert call(words) == 0
    assert not (tmp_path / "slope/pretrain_ckpts/ckpt_36.pt").exists()
    assert call(flags(data, tmp_path, "--only", "lazy_1", "--skip_finetuning"), spy := Spy()) == 0
    assert len(spy.commands) == 1 and shared(tmp_path, "slope", "lazy_1") == 36
    assert log_of(tmp_path, "lazy_1") == log_of(whole, "lazy_1")


def test_killed_or_stopped_itself(whole, data, tmp_path):
    """Real processes: killed, what it ran dies with it; told to stop, that saves first; then it goes on."""
    words = ["bash", "scripts/reproduce.sh", *flags(data, tmp_path, "--only", "dense", "--skip_finetuning")]
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    begin = functools.partial(subprocess.Popen, words, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    with begin() as first:
        wait_for_step(tmp_path / "dense", 3, PREFIX)
        first.kill()
    rows = len(metrics(tmp_path / "dense", PREFIX))
    time.sleep(0.5)
    assert len(metrics(tmp_path / "dense", PREFIX)) == rows < STEPS
    with begin() as second:
        wait_for_step(tmp_path / "dense", rows + 1, PREFIX)
        second.terminate()
        said = second.communicate()[1]
    if second.returncode:  # unless it was faster
        assert said.splitlines()[-1] == "stopped; the same command goes on"
    with begin() as third:
        said = third.communicate()[1]
    assert third.returncode == 0, said
    assert log_of(tmp_path, "dense") == log_of(whole, "dense")


def test_a_stop_ends_a_scripts_children_too(tmp_path):
    """Nothing of `create_datasets.sh` may go on writing where the next one begins."""
    words = ["bash", "-c", f"(sleep 1; touch {tmp_path}/late) & touch {tmp_path}/begun; wait; true"]
    code = f"""
import sys; sys.path[:0] = [{str(ROOT / "scripts")!r}, {str(ROOT)!r}]
from run_processes import Command, Planned, Processes, StopRequestedError
def job():
    yield Command({words!r}, with_children=True)
try:
    Processes().run({{"a script": Planned(job())}})
except StopRequestedError:
    sys.exit(7)
"""
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "begun").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 7
    time.sleep(1.2)
    assert not (tmp_path / "late").exists()


# ------------------------------------------------------------------------------------------------------- several GPUs
def test_on_two_gpus_runs_are_the_same_and_each_begins_where_it_branches_off(whole, data, tmp_path, monkeypatch):
    gpus, events = [{"CUDA_VISIBLE_DEVICES": "4"}, {"CUDA_VISIBLE_DEVICES": "7"}], []
    monkeypatch.setattr(reproduce, "gpu_places", lambda: gpus)

    class Watched(Forked):
        def __init__(self, command, place, log):
            self.name = str(log.parent.relative_to(tmp_path))
            step, source = {"lazy_10": (36, "slope"), "pruned_half": (20, "dense")}.get(self.name, (0, ""))
            assert not source or (tmp_path / source / f"branches/ckpt_{step}.pt").exists()
            events.append((self.name, "begins on", place["CUDA_VISIBLE_DEVICES"]))
            super().__init__(command, place, log)

        def poll(self):
            code = super().poll()
            if code is not None and (self.name, "ended") not in events:
                events.append((self.name, "ended"))
            return code

    names = ("dense", "slope", "lazy_10", "pruned_half")
    words = flags(data, tmp_path, "--only", ",".join(names), "--tasks", "SST-2-shaped", "--parallel", "2")
    assert call(words, Watched) == 0
    assert events[:2] == [("dense", "begins on", "4"), ("slope", "begins on", "7")]
    running, most = {"4": [], "7": []}, 0
    for name, what, *place in events:
        if what == "ended":
            next(names for names in running.values() if name in names).remove(name)
            continue
        beside, (_, *finetuning) = running[place[0]], name.split("/")
        assert len(beside) < 2 and all("/" in other for other in beside) if finetuning else not beside
        beside.append(name)
        most = max(most, len(beside))
    assert not any(running.values()) and most == 2, "two fine-tunings at a time on a GPU"
    for name in names:
        assert log_of(tmp_path, name) == log_of(whole, name)
        said = (tmp_path / name / "run.log").read_text()
        assert f"finished: step {STEPS}" in said and "step/s" not in said
        assert (tmp_path / name / "finetune/SST-2-shaped/run.log").stat().st_size


def test_when_one_run_fails_the_others_are_stopped(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "gpu_places", lambda: [{}, {}])
    words = flags(data, tmp_path, "--only", "dense,slope", "--skip_finetuning")

    def start(command, place, log):
        if log.parent.name == "slope":
            return Forked(command, place, log, [kill_after(2)])
        return Forked(command, place, log, [functools.partial(time.sleep, 3)])

    began = time.monotonic()
    assert call(words, start) == 2
    assert f"slope: ended with exit code -9 (see {tmp_path}/slope/run.log); when" in capsys.readouterr().err
    assert not (tmp_path / f"dense/pretrain_ckpts/ckpt_{STEPS}.pt").exists()
    assert time.monotonic() - began < 60


def test_jobs_run_in_their_order_when_they_are_ready():
    order = []

    def job(name: str, count: int):
        for number in range(count):
            assert (yield Command([sys.executable, "-c", "pass"])) == 0
            order.append((name, number))

    planned = {name: Planned(job(name, 2 if name == "a" else 1)) for name in "abcd"}
    planned["b"] = Planned(planned["b"].job, lambda unfinished: "c" not in unfinished)
    Processes().run(planned)
    assert order == [("a", 0), ("a", 1), ("c", 0), ("b", 0), ("d", 0)]


def test_a_job_alone_waits_for_an_empty_place_and_holds_back_the_rest():
    running, most, threads = {"x": [], "y": []}, [], {}

    class Noted:
        def __init__(self, words, place, log):
            threads[words[0]] = place.get("OMP_NUM_THREADS")
            self.name, self.place, self.polls = words[0], running[place["PLACE"]], 3
            self.place.append(self.name)
            most.append({where: list(names) for where, names in running.items()})

        def poll(self):
            self.polls -= 1
            if self.polls == 0:
                self.place.remove(self.name)
            return None if self.polls > 0 else 0

    def job(name):
        assert (yield Command([name])) == 0

    names = {"a": False, "b": False, "C": True, "d": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_processes, "start", Noted)
        patch.setattr(run_processes, "cores", lambda: 18)
        patch.delenv("OMP_NUM_THREADS")
        planned = {name: Planned(job(name), alone=alone) for name, alone in names.items()}
        Processes().run(planned, [{"PLACE": "x"}, {"PLACE": "y"}], 2)
    assert most == [
        {"x": ["a"], "y": []},
        {"x": ["a"], "y": ["b"]},
        {"x": ["C"], "y": []},
        {"x": ["C"], "y": ["d"]},
    ]
    assert threads == {"a": "4", "b": "4", "C": "9", "d": "4"}, "more threads than cores, or fewer"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_processes, "start", Noted)
        patch.delenv("OMP_NUM_THREADS")
        Processes().run({"e": Planned(job("e"))}, [{"PLACE": "x", "OMP_NUM_THREADS": "3"}, {"PLACE": "y"}])
        patch.setenv("OMP_NUM_THREADS", "5")
        Processes().run({"g": Planned(job("g"))}, [{"PLACE": "x"}, {"PLACE": "y"}])
        patch.delenv("OMP_NUM_THREADS")
        Processes().run({"f": Planned(job("f"))}, [{"PLACE": "x"}])
    assert (threads["e"], threads["g"], threads["f"]) == ("3", None, None), "a user's number, or torch's own, is lost"


def test_branches_begin_with_their_checkpoint_and_finetunings_with_the_end_of_their_run(data, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *flags(data, tmp_path, "--parallel", "2")])
    args = reproduce.parse_arguments()
    plan = reproduce.plan_for_data(args)
    planned = reproduce.planned_jobs(args, plan, [{}])
    assert all(planned[name].ready(planned.keys()) for name in ("dense", "slope"))
    longest_first = ["dense", "slope", "pruned_half", "lazy_1", "lazy_10"]
    assert [name for name, one in planned.items() if one.alone] == longest_first
    assert [name for name in planned if name.startswith("dense, ")] == [
        f"dense, {task}" for task in ("SQuAD", "QNLI-shaped", "SST-2-shaped", "STS-B")
    ]
    for name, source, step in (("lazy_10", "slope", 36), ("pruned_half", "dense", 20)):
        assert not planned[name].ready(planned.keys())
        assert planned[name].ready(planned.keys() - {source})
        write(plan.checkpoint(source, step), "")
        assert planned[name].ready(planned.keys())
    assert not planned["slope, SQuAD"].ready({"slope", "dense"})
    assert planned["slope, SQuAD"].ready({"dense"})
    for one in planned.values():
        one.job.close()


def test_a_branch_copies_no_line_that_is_being_written(tmp_path):
    write(tmp_path / "source.csv", "step,loss,rate\n1,2.5,1\n2,2.25,1\n3,2.0,1\n2,1.")
    _copy_rows(tmp_path / "source.csv", tmp_path / "target.csv", 2)
    assert (tmp_path / "target.csv").read_text().split() == ["step,loss,rate", "1,2.5,1", "2,2.25,1"]
    write(tmp_path / "source.json", 'DLLL {"step": 1}\nDLLL {"st')
    _copy_lines(tmp_path / "source.json", tmp_path / "target.json")
    assert (tmp_path / "target.json").read_text() == 'DLLL {"step": 1}\n'


# ----------------------------------------------------------------------------------------------------------- commands
def test_a_dry_run_prints_what_would_run_and_makes_nothing(tmp_path, capsys):
    assert call(["--dry_run", "--output_dir", str(tmp_path / "out")], Forked) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    commands = [shlex.split(line) for line in lines]
    assert commands[0][:2] == ["bash", "scripts/create_datasets.sh"] and "16384" in commands[0]
    assert commands[1][:3] == ["python", "-m", "data.prepare_glue"]
    doors = {"run_pretraining.py": run_pretraining, "run_glue.py": run_glue, "run_squad.py": run_squad}
    parsed = [(words[1], doors[words[1]].parse_arguments(words[2:])) for words in commands[2:]]
    assert [door for door, _ in parsed] == ["run_pretraining.py"] * 5 + [*["run_glue.py"] * 3, "run_squad.py"] * 5
    assert {args.lora_rank for door, args in parsed if door == "run_pretraining.py"} == {48}
    assert {args.seeds for door, args in parsed if door == "run_glue.py"} == {"0,1,2"}
    assert not list(tmp_path.iterdir())


def test_extra_runs_are_made_on_demand(data, tmp_path, capsys):
    names = {"slope_random": "--mask_init random", "slope_fixed": "--double_prune_interval 0",
             "slope_exact": "--double_prune False", "slope_but_attention": "--skip_attention True"}  # fmt: skip
    words = flags(data, tmp_path / "out", "--dry_run", "--only", ",".join(names), "--skip_finetuning")
    assert call(words) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    assert len(lines) == len(names)
    for line, (name, words) in zip(lines, names.items(), strict=True):
        assert f"{tmp_path}/out/{name}" in line and line.endswith(f"--pruned_matrix static-weight {words}")
        run_pretraining.parse_arguments(shlex.split(line)[2:])
    titles = [settings().title(name) for name in names]
    assert titles == [
        "SLoPe, random masks",
        "SLoPe, W^{R,C} chosen once",
        "SLoPe, input gradient by W^R",
        "SLoPe, attention dense",
    ]


def test_only_and_no_finetuning(data, tmp_path, capsys):
    words = flags(data, tmp_path / "out", "--dry_run", "--only", "slope,dense", "--skip_finetuning")
    assert call(words) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    assert [shlex.split(line)[1] for line in lines] == ["run_pretraining.py"] * 2
    assert f"{tmp_path}/out/dense" in lines[0] and f"--max_steps {STEPS}" in lines[0]


class Ended:
    """A process that has ended."""

    def __init__(self, code: int):
        self.code = code

    def poll(self) -> int:
        return self.code


def test_data_are_made_first(data, tmp_path):
    commands = []
    words = [word for word in flags(data, tmp_path, "--only", "dense") if word != "--skip_data"]
    assert call(words, lambda command, *_: commands.append(command) or Ended(0 if len(commands) == 1 else 2)) == 2
    assert [Path(command[1]).name for command in commands[:1]] == ["create_datasets.sh"]
    assert commands[1][1:3] == ["-m", "data.prepare_glue"] and commands[1][-3:] == [
        "STS-B", "SST-2-shaped", "QNLI-shaped"]  # fmt: skip
    assert len(commands) == 2 and not (tmp_path / "settings.json").exists()
    for command in commands:
        assert run_processes.start([*command, "--help"], {}, None).wait() == 0, "there is no such script or module"


def test_the_scripts_of_the_data_run_on_this_python(tmp_path):
    done = run_processes.start(["bash", "-c", f"echo $PYTHON > {tmp_path}/python"], {}, None)
    assert done.wait() == 0 and (tmp_path / "python").read_text() == f"{sys.executable}\n"


def test_what_is_sparse_from_the_start_has_a_learning_rate_of_its_own(tmp_path):
    plan = Plan(settings(), tmp_path, tmp_path, tmp_path, 1)
    rates = {
        name: run_pretraining.parse_arguments(plan.pretraining_command(name)[2:]).learning_rate for name in RECIPES
    }
    assert rates.pop("dense") == 2e-3 and rates.pop("pruned_half") == pytest.approx(2e-3 / 2**0.5)
    assert set(rates.values()) == {3e-3}
    assert run_pretraining.parse_arguments(plan.pretraining_command("lazy_1")[2:]).lora_lr_scale == 0.5


def test_settings_of_earlier_versions_had_one_learning_rate(tmp_path):
    now = settings(sparse_learning_rate=2e-3)
    now.save(tmp_path)
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "sparse_learning_rate"}))
    assert Settings.load(tmp_path) == now
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "lora_lr_scale"}))
    assert Settings.load(tmp_path) == dataclasses.replace(now, lora_lr_scale=1.0)


def test_the_cut_schedule_is_the_whole_one(tmp_path):
    whole = settings()
    assert (whole.steps, whole.step_of(5), whole.step_of(9), whole.lora_rank) == (2380, 1190, 2142, 48)
    plan = Plan(whole, tmp_path, tmp_path, tmp_path, 1)
    dense, half = (
        run_pretraining.parse_arguments(plan.pretraining_command(name)[2:]) for name in ("dense", "pruned_half")
    )
    assert (half.previous_phase_end_step, half.max_steps, half.seed) == (1190, 1190, 43)

    def rate(args, step: int) -> float:
        of = {"base": args.learning_rate, "total_steps": args.max_steps, "warmup_proportion": args.warmup_proportion}
        return learning_rate(step - args.previous_phase_end_step, **of, decay=args.lr_decay)

    steps = range(1191, 2381)
    assert [rate(half, step) for step in steps] == pytest.approx([rate(dense, step) for step in steps], rel=1e-12)


# ------------------------------------------------------------------------------------------------------------- mistakes
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "dense,lazy"], "--only dense,lazy: lazy is none of dense, slope, lazy_1, lazy_10, pruned_half"),
        (["--only", "dense,"], "an empty name is none of"),
        (["--tasks", "CoLA"], "--tasks CoLA: CoLA is none of STS-B"),
        (["--epochs", "31"], "--epochs: must be a whole number from 1 to 30, not 31"),
        (["--finetune_seeds", "0,0"], "--finetune_seeds 0,0: must be different whole numbers with commas"),
        (["--finetune_seeds", "a"], "--finetune_seeds a"),
        (["--model_config_file", "none.json"], "--model_config_file none.json: cannot be read"),
        (["--report"], "settings.json: cannot be read"),
        (["--only", "pruned_half"], "--only pruned_half: begins with step 20 of dense, which is not there"),
        (["--data_dir", "none"], "--data_dir"),
        (["--speed"], "unrecognized arguments: --speed"),
    ],
)
def test_mistakes_are_one_line(words, said, data, tmp_path, capsys):
    assert call([*flags(data, tmp_path), *words], None) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("reproduce.py: error: ") and said in lines[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--epochs", "10"], "was begun with --epochs 20, not 10"),
        (["--learning_rate", "1e-3"], "was begun with --learning_rate 0.004, not 0.001"),
        (["--sparse_learning_rate", "1e-3"], "was begun with --sparse_learning_rate 0.005, not 0.001"),
        (["--finetune_seeds", "3"], "was begun with --finetune_seeds 3,5, not 3"),
    ],
)
def test_one_directory_holds_one_comparison(words, said, whole, data, capsys):
    assert call([*flags(data, whole), *words], None) == 2
    assert said in capsys.readouterr().err
