"""The frontier of the default run, over seeds: accuracy against the KL spent for it.

    python figures/frontier.py                  # runs what is missing, then draws; about 4 minutes a seed on two CPU cores
    python figures/frontier.py --seeds 0 1

Each seed is `python erpd.py --seed S` (its own problems, samples and training), and then stage 2 again from the stored
batch and signal of that run, at other budgets: no further generation but for the evaluations. Every policy that was
measured is a line of figures/results/frontier.jsonl; lines that are there are not run again. Intervals are Student's t
over seeds.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import erpd  # noqa: E402
import kl  # noqa: E402
import rollout  # noqa: E402
from rewards import load_problems  # noqa: E402

RESULTS, PICTURE = HERE / "results" / "frontier.jsonl", HERE / "frontier.png"
BUDGETS = (0.1, 0.25, 0.5, 1.5)  # beside the default run's own
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # two-sided, n − 1 degrees


def measured() -> list[dict]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def record(rows: list[dict]) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    with open(RESULTS, "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def run_seed(seed: int) -> None:
    """The default run of a seed, and its students at the other budgets, as far as they are missing."""
    done = {row["budget"] for row in measured() if row["seed"] == seed}
    config = erpd.Config(seed=seed)
    folder = Path("runs") / config.run
    if config.kl_budget not in done:
        record([{"seed": seed, "budget": config.kl_budget, **row} for row in erpd.run(config)])
    missing = [budget for budget in BUDGETS if budget not in done]
    if not missing:
        return
    base, tokenizer = rollout.load_policy(config.model, "cuda" if torch.cuda.is_available() else "cpu")
    base.requires_grad_(False)
    rollouts = rollout.Rollouts.load(folder / "rollouts-1.pt")
    signal = torch.load(folder / "signal-1.pt", weights_only=True)
    problems = load_problems(config.data, "train", config.problems, seed, config.operands)
    held_out = load_problems(config.data, "test", config.test_problems, seed, config.operands)
    for budget in missing:
        other = erpd.Config(seed=seed, kl_budget=budget)
        student = erpd.distill(base, rollouts, signal, other, seed=seed * 1000 + 1)
        student, spent = erpd.within_budget(base, student, tokenizer, problems, other, seed * 1000 + 1)
        record([{"seed": seed, "budget": budget, "policy": "ERPD student", "round": 1, "kl_round": spent,
                 **rollout.evaluate(student, base, tokenizer, held_out, config.test_samples, seed=seed, **config.sampling)}])


def mean_interval(values: list[float]) -> tuple[float, float]:
    """(mean, half the width of its 95 % interval) over seeds."""
    x = torch.tensor(values, dtype=torch.float64)
    return x.mean().item(), T95.get(len(x), 1.96) * x.std().item() / math.sqrt(len(x)) if len(x) > 1 else math.nan


def group(rows: list[dict]) -> dict[tuple, list[dict]]:
    """Rows of all seeds by (policy, epoch or budget), in order of appearance."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        key = row["budget"] if row["policy"] == "ERPD student" else row.get("epoch")
        groups.setdefault((row["policy"], key), []).append(row)
    return groups


def report(rows: list[dict]) -> str:
    lines = [f"{'policy':40} {'seeds':>5} {'right':>14} {'pass@8':>14} {'KL, nats/completion':>22}"]
    for (name, key), same in group(rows).items():
        label = name if key is None else f"{name}, budget {key:g}" if name == "ERPD student" else f"{name}, epoch {key}"
        (a, da), (p, dp), (k, dk) = (mean_interval([row[figure] for row in same]) for figure in ("accuracy", "pass", "kl"))
        full = same[0]["samples"] >= 8
        lines.append(f"{label:40} {len(same):5} {a:7.1%} ± {da:5.1%} {f'{p:7.1%} ± {dp:5.1%}' if full else '':>15} {k:14.3f} ± {dk:.3f}")
    lines.append("\nthe student's KL over that of the cheapest explorer checkpoint that is at least as accurate, by seed:")
    for budget in sorted({row["budget"] for row in rows}):
        ratios = []
        for student in (row for row in rows if row["policy"] == "ERPD student" and row["budget"] == budget):
            rivals = [row["kl"] for row in rows if row["policy"].startswith("extreme") and row["seed"] == student["seed"]
                      and row["accuracy"] >= student["accuracy"]]
            ratios.append(f"{student['kl'] / min(rivals):.2f}" if rivals else "no checkpoint is")
        lines.append(f"  budget {budget:<5g} " + ", ".join(ratios))
    return "\n".join(lines)


def draw(rows: list[dict]) -> None:
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    groups = group(rows)
    seeds = len({row["seed"] for row in rows})

    def way(name: str, colour: str, marker: str, label: str, sort_by=None):
        keys = [key for key in groups if key[0] == name and (key[1] is not None or name == "base")]
        points = []
        for key in sorted(keys, key=lambda k: k[1] or 0):
            (x, dx), (y, dy) = (mean_interval([row[f] for row in groups[key]]) for f in ("kl", "accuracy"))
            points.append((x, dx, y, dy, key[1]))
        x, dx, y, dy, _ = zip(*points)
        axes.errorbar(x, y, yerr=dy, xerr=dx, color=colour, marker=marker, markersize=7, linewidth=1.4, elinewidth=0.8,
                      capsize=2, label=label)
        return points

    rates = torch.tensor([rate for row in rows if row["policy"] == "base" for rate in row["pass_rates"]])
    accuracy, least = kl.least_kl(rates)
    axes.plot(least, accuracy, color="black", linestyle="--", linewidth=1, label="the limit: least KL of any policy")
    student = way("ERPD student", rollout.COLOURS[3], "D", "ERPD student, by KL budget")
    explorer = way(next(k[0] for k in groups if k[0].startswith("extreme")), rollout.COLOURS[2], "s",
                   "explorer (SAPO), by epochs on the stored batch")
    way("unlearned policy", rollout.COLOURS[1], "v", "unlearned policy (MSE, reversed), by epochs")
    way("base", rollout.COLOURS[0], "*", "base")
    for x, _, y, _, budget in student:
        axes.annotate(f"{budget:g}", (x, y), textcoords="offset points", xytext=(-6, 8), ha="right", fontsize=8, color=rollout.COLOURS[3])
    for x, _, y, _, epoch in explorer:
        axes.annotate(f"{epoch}", (x, y), textcoords="offset points", xytext=(6, 7), fontsize=8, color=rollout.COLOURS[2])
    axes.set_xscale("symlog", linthresh=0.1)
    axes.set_xlim(left=-0.004)
    axes.set_ylim(0, 1.03)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="KL(π‖π₀) on the policy's own samples, nats a completion (log scale above 0.1)",
             ylabel="right completions of held-out problems",
             title=f"The explorer drifts and collapses; its student is better, for less KL ({seeds} seeds, 95 % intervals)")
    axes.title.set_fontsize(10)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(PICTURE, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4], help="seeds to run where they are missing")
    for seed in parser.parse_args().seeds:
        run_seed(seed)
    print(report(measured()))
    draw(measured())
