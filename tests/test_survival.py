"""Runs that are stopped, numbers that go wrong, several processes, many rounds.

    KILLS=50 python -m pytest -s tests/test_survival.py -k killed        # both jobs below, killed as often
    ROUNDS=30 python -m pytest -s tests/test_survival.py -k nothing_behind    # memory, disk and time, round by round
"""

import json
import math
import os
import shutil
import statistics
import sys
import time
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from random import Random

import pytest
import torch

import conftest
import erpd
from conftest import SMALL, weights
from erpd import Config
from rewards import InputError, group_advantages
from rollout import Memory, load_policy, trainable

arguments = partial(conftest.arguments, rounds=2, device="cpu", explore_updates=8, distill_updates=8)
CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(["erpd"])


def started(folder: Path, given: list[str], rank: int = 0, ranks: int = 0, port: int = 0) -> None:
    """In a process of its own: the command line, on one thread; one of several, as torchrun starts them, by `ranks`."""
    os.chdir(folder)
    torch.set_num_threads(1)
    sys.stdout, sys.stderr = open(os.devnull, "w"), open(f"stderr-{rank}", "w")
    losses, update = [], erpd.optimise
    if ranks:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                       "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

        def recorded(*a, **k):
            losses.append(float((shown := update(*a, **k))["loss"]))
            return shown

        erpd.optimise = recorded
    status = erpd.main(given)
    Path(f"losses-{rank}.json").write_text(json.dumps(losses))
    sys.exit(status)


def begin(*given):
    process = CONTEXT.Process(target=started, args=given)
    process.start()
    return process


# -------------------------------------------------------------------------------------------------------- interruption

@pytest.mark.parametrize("method", ["erpd", "grpo"])
def test_a_run_killed_ten_times_ends_as_if_it_had_not_been(tmp_path, method):
    """A job undisturbed; then again, with SIGKILL at random moments, until the kills are spent. Mistakes: an optimizer,
    a shuffle or λ that begins anew, a row measured twice, a file half written. To the bit."""
    random, given, kills = Random(0), arguments(run="one", method=method), int(os.environ.get("KILLS", 10))
    (tmp_path / "whole").mkdir()
    began, whole = time.monotonic(), begin(tmp_path / "whole", given)
    whole.join()
    lasted, runs = time.monotonic() - began, 0
    assert whole.exitcode == 0
    while kills > 0:
        here = tmp_path / f"killed-{runs}"
        here.mkdir()
        while True:
            there = (here / "runs" / "one" / "config.json").exists()
            process = begin(here, ["--resume", "runs/one"] if there else given)
            process.join(lasted * random.uniform(0.02, 0.2) if kills > 0 else None)
            if process.exitcode is not None:
                break
            process.kill(), process.join()
            kills -= 1
            if not (here / "runs" / "one" / "config.json").exists():  # killed before it had settings
                shutil.rmtree(here / "runs", ignore_errors=True)
        assert process.exitcode == 0, (here / "stderr-0").read_text()
        one, other = (where / "runs" / "one" for where in (tmp_path / "whole", here))
        names = [str(path.relative_to(one)) for path in one.rglob("*.jsonl")]  # the rows, and each update's numbers
        assert len(names) == (7 if method == "erpd" else 2)
        for name in (*names, "policy/model.safetensors"):
            assert (one / name).read_bytes() == (other / name).read_bytes(), name
        runs += 1
    print(f"{method}: {os.environ.get('KILLS', 10)} kills over {runs} runs; each ended with the same bytes")


def test_damaged_memory_is_made_again_and_anothers_is_refused(tmp_path, capsys):
    """Mistake: a run that goes on from half a file, a flipped bit or other settings, silently another run."""
    memory = Memory(tmp_path, "these settings")
    memory.put("state", {"weights": torch.arange(1000.0)})
    whole = (tmp_path / "state.pt").read_bytes()
    flipped = [whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1:] for at in range(0, len(whole), 97)]
    for damaged in (whole[:len(whole) // 2], b"", b"junk", *flipped):
        (tmp_path / "state.pt").write_bytes(damaged)
        got = memory.get("state")  # a bit of the padding may turn and harm nothing
        assert torch.equal(got["weights"], torch.arange(1000.0)) if got else "damaged" in capsys.readouterr().err
    (tmp_path / "state.pt").write_bytes(whole)
    assert torch.equal(memory.get("state")["weights"], torch.arange(1000.0))
    with pytest.raises(InputError, match="other settings"):
        Memory(tmp_path, "others").get("state")
    nowhere = Memory()
    nowhere.put("state", 1)
    assert nowhere.get("state") is None


def test_an_interruption_and_a_folder_that_cannot_be_written_end_with_one_line(tmp_path, monkeypatch, capsys):
    """Mistakes: a traceback; no word of how to go on, or one where nothing has begun; no way on with less memory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").write_text("in the way")
    assert erpd.main(arguments(run="one")) == 2 and "--resume" not in capsys.readouterr().err
    (tmp_path / "runs").unlink()
    explore = erpd.explore
    for error, code, said in ((KeyboardInterrupt(), 130, "stopped"), (OSError(28, "No space left"), 2, "No space left"),
                              (torch.OutOfMemoryError("CUDA out of memory."), 2, "lower --tokens-per-step")):
        monkeypatch.setattr(erpd, "explore", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        assert erpd.main(arguments(run="one")) == code
        told = capsys.readouterr().err.strip().splitlines()[-1]
        assert said in told and told.endswith("; python erpd.py --resume runs/one goes on from here")
        assert (tmp_path / "runs" / "one" / "round-1" / "rollouts.pt").exists()
    monkeypatch.setattr(erpd, "explore", explore)
    assert erpd.main(["--resume", "runs/one", "--tokens-per-step", "256"]) == 0


def test_rows_that_were_damaged_are_measured_again(tmp_path, monkeypatch):
    """Mistake: a run that goes on without the rows of the rounds that it had done."""
    monkeypatch.chdir(tmp_path)
    assert erpd.main(arguments(run="whole")) == 0
    distill, metrics = erpd.distill, Path("runs/whole/metrics.jsonl").read_text()

    def stopped(*a, seed, **k):
        if seed == 2:  # in the second round
            raise KeyboardInterrupt
        return distill(*a, seed=seed, **k)

    monkeypatch.setattr(erpd, "distill", stopped)
    assert erpd.main(arguments(run="one")) == 130
    Path("runs/one/rows.pt").write_bytes(Path("runs/one/rows.pt").read_bytes()[:-99])
    monkeypatch.setattr(erpd, "distill", distill)
    assert erpd.main(["--resume", "runs/one"]) == 0 and Path("runs/one/metrics.jsonl").read_text() == metrics


# ------------------------------------------------------------------------------------------------ numbers that go wrong

@pytest.mark.parametrize("where", ["log-probs", "advantage", "weight", "gradient"])
def test_what_is_not_finite_stops_a_stage_with_the_last_finite_weights(stage, where):
    """Mistake: an optimizer's step with NaN, after which everything is NaN."""
    base, _, _, rollouts = stage
    advantage, start = group_advantages(rollouts.rewards, rollouts.groups), trainable(base, 1e-4)
    if where == "log-probs":
        rollouts = replace(rollouts, log_probs=torch.full_like(rollouts.log_probs, math.nan))
    if where == "advantage":
        advantage = torch.where(torch.arange(len(advantage)) == 5, torch.inf, advantage)
    if where == "weight":
        with torch.no_grad():
            next(start[0].parameters())[5].fill_(torch.inf)
    if where == "gradient":
        next(start[0].parameters()).register_hook(lambda gradient: gradient * torch.nan)
    before = weights(start[0])
    with pytest.raises(FloatingPointError) as stopped:
        erpd.explore(base, rollouts, advantage, Config(**SMALL), loss="sapo", updates=2, start=start)
    name, model = stopped.value.args
    assert name == "explorer" and torch.equal(weights(model), before)


def test_a_stage_that_is_not_finite_ends_with_a_line_and_its_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert erpd.main(arguments(run="one", explore_lr=1e9)) == 2
    assert "erpd.py: unlearned policy stopped" in capsys.readouterr().err and load_policy("runs/one/last_finite")


def test_a_teacher_that_rules_out_a_stored_token_is_told(stage, monkeypatch):
    """Mistake: −∞ in δ_t, whose mean square makes every advantage NaN."""
    base, tokenizer, problems, _ = stage
    monkeypatch.setattr(erpd, "score", lambda model, rollouts, *_, **__: rollouts.log_probs if model is base else
                        rollouts.log_probs.index_fill(1, torch.tensor([3]), -math.inf))
    with pytest.raises(InputError, match="unlearned policy gives a stored token no probability"):
        erpd.one_round(base, tokenizer, problems, Config(**SMALL))


def test_groups_of_one_and_batches_of_nothing_do_no_harm(stage):
    """A group that lost all but one completion has advantage 0; a batch whose every token is masked moves nothing."""
    base, _, _, rollouts = stage
    one_left = rollouts.select(torch.tensor([0, *range(8, 64)]))
    advantage = group_advantages(one_left.rewards, one_left.groups)
    assert advantage[0] == 0
    model = erpd.explore(base, one_left, advantage, Config(**SMALL), loss="clip", updates=2)
    assert weights(model).isfinite().all() and not torch.equal(weights(model), weights(base))
    masked = replace(rollouts, length=torch.zeros_like(rollouts.length))
    for loss in ("sapo", "clip", "nll"):
        model = erpd.explore(base, masked, torch.ones(64), Config(**SMALL), loss=loss, updates=1)
        assert torch.equal(weights(model), weights(base))


def test_an_explorer_that_collapsed_onto_one_token_still_teaches(stage, monkeypatch):
    """It gives the others next to no probability; δ_t is large, finite and bounded, and the student near its base."""
    base, tokenizer, problems, rollouts = stage
    collapsed, _ = trainable(base, 1.0)
    with torch.no_grad():
        collapsed.model.norm.weight.mul_(50)
    monkeypatch.setattr(erpd, "explore", lambda *_, **__: collapsed)
    told = []
    student = erpd.one_round(base, tokenizer, problems, Config(**SMALL, signal="teacher", kl_budget=0.2),
                             watch=lambda name, model, **about: told.append(about))
    assert weights(student).isfinite().all() and 0 <= told[-1]["kl_round"] <= 0.2


def test_a_budget_that_cannot_be_met_leaves_the_base_and_says_so(stage, monkeypatch, capsys):
    base, tokenizer, problems, rollouts = stage
    monkeypatch.setattr(erpd, "divergence", lambda *_: {"kl": 1.0})
    student, spent = erpd.within_budget(base, trainable(base, 1.0)[0], tokenizer, problems, 1e-9, Config(**SMALL))
    assert spent == 0 and torch.equal(weights(student), weights(base)) and "1e-09 nats" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------- several processes

def together(folder: Path, ranks: int, port: int, given: list[str]):
    folder.mkdir(exist_ok=True)
    return [begin(folder, given, rank, ranks, port) for rank in range(ranks)]


def test_two_processes_do_what_one_does_and_another_number_goes_on(tmp_path):
    """Mistakes: a mean of means, a problem sampled twice, a process that is not told what another has found."""
    for ranks in (1, 2):
        for process in together(tmp_path / str(ranks), ranks, 29611 + ranks, arguments(run="one")):
            process.join()
            assert process.exitcode == 0
    alone, shared = (json.loads((tmp_path / str(n) / "losses-0.json").read_text()) for n in (1, 2))
    assert len(alone) == len(shared) == 36 and json.loads((tmp_path / "2" / "losses-1.json").read_text()) == shared
    assert alone[:18] == pytest.approx(shared[:18], abs=1e-5)  # the first round, from the very same policy
    rows = [[json.loads(line) for line in (tmp_path / str(n) / "runs/one/metrics.jsonl").read_text().splitlines()]
            for n in (1, 2)]
    for one, other in zip(*rows, strict=True):
        assert one["policy"] == other["policy"] and abs(one["accuracy"] - other["accuracy"]) < 0.2

    process, = together(tmp_path / "one card", 1, 29620, arguments(run="one") + ["--device", "cuda:1"])
    process.join()
    assert process.exitcode == 2 and "torchrun has a process for each" in (tmp_path / "one card/stderr-0").read_text()

    process, other = together(tmp_path / "3", 2, 29621, arguments(run="one"))
    while not list((tmp_path / "3").glob("runs/one/round-1/unlearned*")) and process.is_alive():
        time.sleep(0.01)
    other.kill(), process.join()
    assert process.exitcode == 1
    assert (tmp_path / "3" / "stderr-0").read_text().splitlines()[-1].startswith("erpd.py: another process of this job")
    (resumed,) = together(tmp_path / "3", 1, 29622, ["--resume", "runs/one"])
    resumed.join()
    assert resumed.exitcode == 0 and (tmp_path / "3" / "runs" / "one" / "policy").exists()


# ----------------------------------------------------------------------------------------------------------------- soak

def test_rounds_leave_nothing_behind(tmp_path, monkeypatch):
    """Mistake: policies, optimizer states or graphs of earlier rounds that are kept."""
    monkeypatch.chdir(tmp_path)
    memory, disk, began, one = [], [], [], erpd.one_round

    def measured(*a, **k):  # as each round begins: memory in use; on disk, without what is kept of each; the time
        memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20)
        disk.append(sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".jsonl"
                        and p.stem not in ("rollouts", "signal", "rows")) / 2**20)
        began.append(time.monotonic())
        return one(*a, **k)

    monkeypatch.setattr(erpd, "one_round", measured)
    count = int(os.environ.get("ROUNDS", 8))
    assert erpd.main(arguments(run="soak", rounds=count, kl_budget=0.05, curve_samples=0)) == 0
    assert len(disk) >= 6 and disk[-1] <= 1.02 * disk[2] and memory[-1] <= 1.1 * memory[2]
    took = [after - before for before, after in zip(began, began[1:])]
    print(f"{len(disk)} rounds. MB of memory after round 3 and at the end: {memory[2]:.1f}, {memory[-1]:.1f}; on disk "
          f"{disk[2]:.2f}, {disk[-1]:.2f}. Seconds a round: {statistics.median(took[2:12]):.2f}, of the last ten "
          f"{statistics.median(took[-10:]):.2f}")
