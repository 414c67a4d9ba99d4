"""The table and picture of any runs, figures/frontier.py, and what figures/speed.py counts."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from figures import frontier, speed

ROWS = [{"policy": "base", "round": 1, "accuracy": 0.3, "accuracy_interval": [0.2, 0.4], "pass": 0.8, "pass_k": 8,
         "samples": 64, "kl": 0.0, "entropy": 0.03, "pass_rates": [0.1, 0.5]},
        {"policy": "student on its way", "round": 1, "update": 2, "accuracy": 0.5, "accuracy_interval": [0.4, 0.6],
         "pass": 0.9, "samples": 4, "kl": 0.3, "entropy": 0.02},
        {"policy": "ERPD student", "round": 1, "accuracy": 0.9, "accuracy_interval": [0.8, 0.95], "pass": 0.97,
         "samples": 8, "kl": 0.8, "entropy": 0.01, "kl_round": 0.8, "kl_budget": 0.85}]


def test_a_table_has_pass_at_k_at_the_ends_alone():
    """Mistake: pass@1 in a column that says pass@8, or a policy on its way in the final table."""
    header, *lines = frontier.table(ROWS).splitlines()
    assert "pass@8" in header and [line.split()[1] for line in lines] == ["base", "student", "ERPD"]
    assert "update 2" in lines[1] and "–" in lines[1].split()[-3] and "97.0%" in lines[2]
    assert "0.80 of 0.85" in lines[2] and frontier.ends(ROWS) == [ROWS[0], ROWS[2]]


def test_a_rounds_way_begins_where_the_last_round_ended():
    """Mistake: the explorer of a later round drawn from the first base, through all rounds before."""
    later = [row | {"round": 2, "kl": row["kl"] + 1} for row in ROWS[1:]]
    student = frontier.ways(ROWS + later)["ERPD student"]
    assert [[row["kl"] for row in way] for way in student] == [[0.0, 0.3, 0.8], [0.8, 1.3, 1.8]]


def run(*arguments, folder: Path):
    command = [sys.executable, frontier.__file__, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_several_runs_go_into_one_picture(tmp_path):
    """Mistake: a command that works only from within erpd.py, or a traceback for a folder that is no run."""
    for name in ("a/run", "b/run", "b"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    drawn = run("a/run", "b/run", "--out", "both.png", folder=tmp_path)
    assert drawn.returncode == 0 and drawn.stdout.count("ERPD student") == 2
    assert (tmp_path / "both.png").stat().st_size > 10_000
    (tmp_path / "b" / "metrics.jsonl").write_text("")
    for wrong in ("c", "b"):
        refused = run("a/run", wrong, folder=tmp_path)
        assert refused.returncode == 2 and refused.stderr.strip().splitlines()[-1].startswith(f"frontier.py: {wrong} ")
        assert "Traceback" not in refused.stderr


def test_operations_and_waits_are_counted():
    """Mistake: views counted as work, or a boolean mask that makes the host wait and is not seen."""
    x = torch.randn(4, 4)

    def work():
        y = (x.T.reshape(2, 8)[:1] + 1) * 2  # a view of a copy; an addition and a product
        y[y > 0], y.sum().item(), y.nonzero()

    assert speed.counted(lambda: x.view(16)[:3].unsqueeze(0)) == (0, 0)
    assert speed.counted(lambda: x + 1) == (1, 0)
    operations, waits = speed.counted(work)
    assert waits == 3 and operations == 8  # clone, +, ·, >, index, sum, item, nonzero
