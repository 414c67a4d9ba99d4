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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import kl  # noqa: E402

# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = ("#000000", "#E69F00", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#F0E442")


def table(rows: Sequence[dict], header: bool = True) -> str:
    """Policies as lines: accuracy with its 95 % interval over problems, KL to the first base; of a policy at the end of
    its stage also pass@k, of a student the KL that its round spent and might have spent."""
    pass_at_k = f"pass@{rows[0]['pass_k']}"
    lines = [f"{'round':5} {'policy':28} {'avg@k':>6}  {'95 % interval':15} {'k':>2} {pass_at_k:>6} "
             f"{'KL nats/completion':>18} {'of its budget':>13} {'entropy nats/token':>18}"] if header else []
    for row in rows:
        name = row["policy"] + (f", update {row['update']}" if "update" in row else "")
        low, high = row["accuracy_interval"]
        solved = "–" if "update" in row else f"{row['pass']:.1%}"
        spent = f"{row['kl_round']:.2f} of {row['kl_budget']:.2f}" if "kl_budget" in row else ""
        lines.append(f"{row['round']:5} {name:28} {row['accuracy']:6.1%}  {low:6.1%} – {high:6.1%} {row['samples']:2} "
                     f"{solved:>6} {row['kl']:18.3f} {spent:>13} {row['entropy']:18.3f}")
    return "\n".join(lines)


def ends(rows: Sequence[dict]) -> list[dict]:
    """The rows of policies at the end of their stage."""
    return [row for row in rows if "update" not in row]


def ways(rows: Sequence[dict]) -> dict[str, list[list[dict]]]:
    """The rows by policy and round, each way from where its round begins: the end of the one before."""
    last = {row["round"]: row for row in rows}
    found: dict[str, dict[int, list[dict]]] = {}
    for row in rows[1:]:
        of_rounds = found.setdefault(row["policy"].replace("student on its way", "ERPD student"), {})
        of_rounds.setdefault(row["round"], [last.get(row["round"] - 1, rows[0])]).append(row)
    return {name: list(of_rounds.values()) for name, of_rounds in found.items()}


def legend(axes, on=None, **look) -> None:
    """Each label once, on the axes or on the figure."""
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles))
    (on or axes).legend(once.values(), once.keys(), **look)


def line(axes, rows: Sequence[dict], which: str = "", **look) -> None:
    """Policies one after the other; `which` stands before the names of their numbers."""
    axes.plot([row[which + "kl"] for row in rows], [row[which + "accuracy"] for row in rows], **look)


def point(axes, row: dict, which: str = "", **look) -> None:
    """A policy with its interval."""
    accuracy, (low, high) = row[which + "accuracy"], row[which + "accuracy_interval"]
    axes.errorbar(row[which + "kl"], accuracy, [[max(0.0, accuracy - low)], [max(0.0, high - accuracy)]],
                  linestyle="none", **look)


def kl_axis(axes, furthest: float) -> None:
    """x from 0 to the furthest KL, nats a completion."""
    # KL is quadratic in the distance from the base: on this scale a straight way is straight.
    axes.set_xscale("function", functions=(lambda x: x.clip(0) ** 0.5, lambda x: x**2))
    end = 1.1 * max(0.2, furthest)
    ticks = [tick for tick in (0, 0.1, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500) if tick <= end]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set(xlim=(0, end), xlabel="KL(π‖π₀) to the first base, on the policy's own samples, nats a completion "
             "(root scale)")


def draw_frontier(runs: dict[str, Sequence[dict]], path: str | Path) -> None:
    """The rows of each run by its name, the base's first: every policy's way in each round, thin; its ends, large,
    with their intervals; the way of what goes from round to round, thick; and the limit.

    The limit, the least KL at which any policy can have an accuracy, is that of the base's pass rates, smoothed, so
    that a problem which no sample solved is no wall.
    """
    figure = Figure(figsize=(7, 4.8), layout="constrained")
    axes = figure.subplots()
    looks = zip(itertools.cycle(COLOURS[1:]), itertools.cycle("vsDoPX^<"))  # 56, before one comes again
    for run, rows in runs.items():
        before = f"{run}: " if len(runs) > 1 else ""
        point(axes, rows[0], capsize=3, color="black", marker="*", markersize=10, label=before + "base")
        for (name, of_rounds), (colour, marker) in zip(ways(rows).items(), looks):
            for way in of_rounds:
                line(axes, way, color=colour, marker=marker, markersize=3, linewidth=1, alpha=0.6)
                point(axes, way[-1], capsize=3, color=colour, marker=marker, markersize=7, label=before + name)
            if len(of_rounds) > 1 and of_rounds[-1][-1] is rows[-1]:  # the policy that the next round begins with
                ends_of_rounds = [rows[0], *(way[-1] for way in of_rounds)]
                line(axes, ends_of_rounds, color=colour, linewidth=2.5)
                for k, row in enumerate(ends_of_rounds[1:], 1):
                    axes.annotate(str(k), (row["kl"], row["accuracy"]), xytext=(-4, 9), textcoords="offset points")
    bases = {tuple(rows[0]["pass_rates"]): (run, rows[0]["samples"]) for run, rows in runs.items()}  # each once
    for rates, (run, samples) in bases.items():
        accuracy, least = kl.least_kl(kl.smoothed(torch.tensor(rates, dtype=torch.float64) * samples, samples))
        axes.plot(least, accuracy, color="black", linewidth=1, linestyle="--",
                  label=f"{run}: " * (len(bases) > 1) + "the limit: least KL of any policy")
    kl_axis(axes, max(row["kl"] for rows in runs.values() for row in rows))
    axes.set(ylim=(-0.02, 1.03), ylabel="right completions, held out",
             title="Accuracy against the KL spent for it" + "; numbers: rounds" * bool(axes.texts))
    axes.yaxis.set_major_formatter("{x:.0%}")
    legend(axes, frameon=False, fontsize=8, loc="lower right")
    figure.savefig(path, dpi=150)


def read_run(folder: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl; without any, an exit that names the folder."""
    try:  # of an empty file JSON misses a value
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().strip().split("\n")]
    except (OSError, ValueError) as error:
        print(f"frontier.py: {folder} is no run of erpd.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders that erpd.py wrote")
    parser.add_argument("--out", type=Path, default=Path("frontier.png"), help="the picture")
    arguments = parser.parse_args()
    several = {str(folder): read_run(folder) for folder in arguments.runs}
    for name, rows in several.items():
        print(f"{name}\n{table(ends(rows))}\n")
    draw_frontier(several, arguments.out)
    print(arguments.out)
