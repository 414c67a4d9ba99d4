"""Accuracy against KL: the table and the picture of one run of erpd.py, or of several together.

    python figures/frontier.py runs/a runs/b …        # prints their tables, draws frontier.png
"""

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import kl  # noqa: E402

# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = ("#000000", "#E69F00", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#F0E442")


def table(rows: Sequence[dict], header: bool = True) -> str:
    """Policies as lines: accuracy with its 95 % interval over problems, pass@8 from 8 samples on, KL to the base."""
    lines = [f"{'policy':36} {'avg@k':>6}  {'95 % interval':15} {'k':>3} {'pass@8':>7} {'KL, nats/completion':>20} "
             f"{'entropy, nats/token':>20}"] if header else []
    for row in rows:
        on_its_way = f", update {row['update']}" if "update" in row else ""
        low, high = row["accuracy_interval"]
        solved = f"{row['pass']:.1%}" if row["samples"] >= 8 else "–"
        lines.append(f"{row['policy'] + on_its_way:36} {row['accuracy']:6.1%}  {low:6.1%} – {high:6.1%} "
                     f"{row['samples']:3} {solved:>7} {row['kl']:20.3f} {row['entropy']:20.3f}")
    return "\n".join(lines)


def ends(rows: Sequence[dict]) -> list[dict]:
    """The rows of policies at the end of their stage."""
    return [row for row in rows if "update" not in row]


def draw_frontier(runs: dict[str, Sequence[dict]], path: str | Path, budget: float | None = None) -> None:
    """The rows of each run by its name: every policy's way, its end large with its interval; the budget; and the limit.

    The limit, the least KL at which any policy can have an accuracy, is drawn where the base (the first row) was
    sampled 64 times a problem or more: from fewer, problems that look unsolvable would bend it.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    ways: dict[str, list[dict]] = {}
    for run, rows in runs.items():
        for row in rows:
            name = row["policy"].replace("student on its way", "ERPD student")
            name += f", round {row['round']}" if row["round"] > 1 else ""
            ways.setdefault(f"{run}: {name}" if len(runs) > 1 else name, []).append(row)
    for (name, way), colour, marker in zip(ways.items(), itertools.cycle(COLOURS), itertools.cycle("*vsD^oPX")):
        x, y, (low, high) = [r["kl"] for r in way], [r["accuracy"] for r in way], way[-1]["accuracy_interval"]
        axes.plot(x, y, color=colour, marker=marker, markersize=4, linewidth=1, label=name)
        axes.errorbar(x[-1], y[-1], [[max(0.0, y[-1] - low)], [max(0.0, high - y[-1])]], color=colour, marker=marker,
                      markersize=8, capsize=3)
    limits = {tuple(rows[0]["pass_rates"]) for rows in runs.values() if rows[0]["samples"] >= 64}  # of each base once
    for label, rates in zip(["the limit: least KL of any policy"] + [None] * len(limits), limits):
        accuracy, least = kl.least_kl(torch.tensor(rates))
        axes.plot(least, accuracy, color="black", linewidth=1, linestyle="--", label=label)
    if budget is not None:
        axes.axvline(budget, color="grey", linewidth=1, linestyle=":", label=f"KL budget, {budget:g} nats")
    axes.set(xlabel="KL(π‖π₀) on the policy's own samples, nats a completion", ylabel="right completions",
             title="Accuracy against the KL spent for it")
    axes.set_xscale("symlog", linthresh=0.1)
    axes.set_xlim(-0.004, 1.3 * max(0.2, *(row["kl"] for rows in runs.values() for row in rows)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def read_run(folder: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl. Exits with a line that names the folder where there are none."""
    try:
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        if rows:
            return rows
        reason = "its metrics.jsonl is empty"
    except (OSError, ValueError) as error:
        reason = error
    print(f"frontier.py: {folder} is no run of erpd.py: {reason}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders that erpd.py wrote")
    parser.add_argument("--out", type=Path, default=Path("frontier.png"), help="the picture")
    arguments = parser.parse_args()
    several = {folder.name: read_run(folder) for folder in arguments.runs}
    for name, rows in several.items():
        print(f"{name}\n{table(ends(rows))}\n")
    draw_frontier(several, arguments.out)
    print(arguments.out)
