"""figures/gsm8k.py, end to end with the embedded policy on a few problems in GSM8K's form."""

import json
import math

import pytest
import torch

import erpd
from conftest import TINY
from figures import gsm8k
from figures.outcomes import Outcome
from rewards import chain_problems


@pytest.fixture
def start(tmp_path, monkeypatch):
    """start(*options): the command on sums in GSM8K's form, of which the embedded policy solves some; its exit status.
    """
    def write(name: str, rows: list[dict]) -> str:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    worked = [{"question": p.question, "answer": f"It is <<{p.question}{p.answer}>>{p.answer}.\n#### {p.answer}"}
              for p in chain_problems(4, "train", operands=4)]
    test = [{"question": p.question, "answer": f"#### {p.answer}"} for p in chain_problems(3, "test", operands=3)]
    other = [{"Body": "1", "Question": p.question, "Answer": float(p.answer)} for p in chain_problems(2, "test", 2)]
    fixed = ("--quick", "--model", TINY, "--train", write("train.jsonl", worked), "--test", write("test.jsonl", test),
             "--other", write("other.jsonl", other), "--seeds", "1", "--passes", "3", "--lr", "1e-6")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def start(*options: str, folder: str = "work") -> int:
        try:
            return gsm8k.main([*fixed, "--folder", str(tmp_path / folder), *options])
        except SystemExit as stop:
            return stop.code
    return start


@pytest.fixture
def stop_in(monkeypatch):
    """stop_in(module, name, call): the list of what is said of each call of a function; the `call`-th one is stopped.
    """
    def stop_in(module, name: str, call: int) -> list[str]:
        calls, work = [], getattr(module, name)

        def watched(*args, **more):
            calls.append(more.get("stage", name))
            if len(calls) == call:
                raise KeyboardInterrupt
            return work(*args, **more)
        monkeypatch.setattr(module, name, watched)
        return calls
    return stop_in


def test_all_jobs_run_and_go_on_where_they_were_stopped(start, stop_in, tmp_path, capsys):
    """Mistake: a stop in the fine-tuning or in a round that loses what was done, changes what comes, or writes rows
    twice; a job that is never reached; a report that begins one."""
    results = tmp_path / "work" / "gsm8k.jsonl"
    updates = stop_in(erpd, "optimise", 3)  # in the third and last pass of the fine-tuning
    assert start() == 130 and not results.exists()
    distilled = stop_in(erpd, "distill", 2)  # in the second round
    assert start() == 130 and len(distilled) == 2
    assert len(updates) <= 3 + 2 + 3 + 2 + 3  # then what was left of it; a round takes three and two
    assert [json.loads(line)["job"] for line in results.read_text().splitlines()] == ["base"]
    explored = stop_in(erpd, "explore", 0)
    capsys.readouterr()
    assert start("--minutes", "0") == 0 and not explored
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:]] == [["the", "base"]]
    assert start() == 0
    assert len(distilled) == 4 and "unlearned policy" not in explored  # the second round's again, and the control's
    lines = results.read_text().splitlines()
    assert {row["method"] for row in map(json.loads, lines)} == {*gsm8k.METHODS, "clip + KL"} - {"clip + KL 0.2"}
    assert results.with_suffix(".png").stat().st_size > 10_000
    assert start() == 0 and results.read_text().splitlines() == lines

    stop_in(gsm8k.GradeSchool, "until_it_stops", 1)
    assert start(folder="at once") == 130
    assert (tmp_path / "at once" / "gsm8k.jsonl").read_text().splitlines() == lines[:3]  # base, two rounds
    assert start("--lr", "1e-5") == 2 and "other settings" in capsys.readouterr().err
    moved = (tmp_path / "train.jsonl").rename(tmp_path / "at once" / "train.jsonl")
    assert start("--train", str(moved)) == 0  # results and folder came from another machine


def test_the_table_by_hand():
    """Mistake: the KL efficiency of another policy than the line's, a path's last policy or another method's for its
    best, pass@8 of four samples, or one set's numbers for the other's."""
    def row(method: str, accuracy: float, kl: float, **more) -> dict:
        return {"method": method, "path": "lr 1", "at": 1, "seed": 3, "accuracy": accuracy, "kl": kl, "entropy": 0.1,
                "accuracy_interval": [accuracy - 0.1, accuracy + 0.1], "pass": 0.9, "samples": 8, "other_kl": 9.0,
                "other_accuracy": 0.25, "other_accuracy_interval": [0.2, 0.3]} | more

    least = 0.8 * math.log(0.8 / 0.5) + 0.2 * math.log(0.2 / 0.5)  # from coins of ½ to 0.8
    path = [row("nll", 0.8, 2 * least, lr=1, at=2, samples=4), row("nll", 0.7, 9.0, lr=1, at=4)]
    outcome = Outcome([row("base", 0.5, 0.0, pass_rates=[0.5] * 4, samples=4), *path, row("sapo", 0.1, 9.0, lr=1),
                       row("clip + KL", 0.6, 5.0, kl_coef=0.2),
                       row("erpd rounds", 0.8, 4 * least, rollouts=8192, at=2)])
    lines = {line[:34].strip(): line[34:].split() for line in gsm8k.table([outcome]).splitlines()[1:]}
    interval, other = ["70.0%", "–", "90.0%"], ["25.0%", "20.0%", "–", "30.0%"]
    assert lines["cross-entropy, right completions"] == [
        "lr", "1,", "2", "3", "0", "80.0%", *interval, "–", f"{2 * least:.3f}", "0.50", *other]
    assert lines["ERPD's rounds"] == [
        "lr", "1,", "2", "3", "8,192", "80.0%", *interval, "90.0%", f"{4 * least:.3f}", "0.25", *other]
    assert lines["SAPO"][-6:] == ["9.000", "–", *other]  # worse than the base
    assert list(lines) == ["the base", "ERPD's rounds", "cross-entropy, right completions", "SAPO",
                           "clip, KL penalty 0.2"]


@pytest.mark.parametrize("options, said", [
    (["--seeds", "0"], "--seeds"), (["--frobnicate"], "--frobnicate"), (["--minutes", "soon"], "--minutes"),
    (["--minutes", "nan"], "--minutes"), (["--model", "no/such"], "no/such"), (["--other", "none.jsonl"], "none.jsonl"),
    (["--train", "none.jsonl"], "none.jsonl"), (["--train", "bad"], "problem 2"), (["--train", "few"], "4 problems"),
    (["--cuda-graph", "1"], "CUDA device"), (["--folder", "file"], "file")])
def test_bad_input_is_one_line(start, tmp_path, capsys, options, said):
    """Mistake: a traceback, or an hour of work before a file is missed."""
    good = {"question": "1+1=", "answer": "#### 2"}
    bad = {"question": "1+1=", "answer": "two\n#### "}
    for name, rows in {"bad": [good, bad], "few": [good] * 3, "file": []}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [str(tmp_path / f"{o}.jsonl") if o in ("bad", "few", "file") else o for o in options]
    assert start(*options) == 2
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith("gsm8k.py: ") and said in err.splitlines()[-1] and "Traceback" not in err
    assert not list(tmp_path.glob("work/*/state.pt")) or "CUDA" in said  # nothing was trained
