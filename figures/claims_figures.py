"""The pictures of figures/claims.py. Each takes the outcomes by stage and writes one PNG beside this file.

Bands and bars are 95 % intervals over seeds (Student's t). Colours are Okabe and Ito's, which the colour-blind can tell
apart; a method has the same colour, and marker, in all pictures.
"""

import math
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter

from figures.frontier import COLOURS
from figures.outcomes import LEVELS, interpolate, mean_interval

HERE = Path(__file__).resolve().parent
BLACK, ORANGE, BLUE, VERMILION, GREEN, PINK, SKY, YELLOW = COLOURS
LOOKS = {  # method → (colour, marker, line, label)
    "erpd": (VERMILION, "D", "-", "ERPD student"),
    "nll": (BLUE, "o", "-", "cross-entropy on the right completions"),
    "weights: nll": (BLUE, "v", "--", "  its weights towards the base"),
    "grpo 8×": (SKY, "h", "-", "on-policy GRPO, 8× the rollouts"),
    "sapo": (ORANGE, "P", "-", "SAPO (the explorer)"), "weights: sapo": (ORANGE, "v", "--", "its weights"),
    "control": ("grey", "d", ":", "stage 2 with Â in place of δ_t (the control)")}
MAIN = ("erpd", "nll", "weights: nll", "grpo 8×", "sapo", "control")  # the frontier's; figures/README.md has all


def save(figure: Figure, name: str) -> None:
    figure.savefig(HERE / name, dpi=150)


def banded(axes, x, values_by_point, **look) -> None:
    """A line of means over seeds with the band of its interval."""
    means, halves = zip(*(mean_interval(values) for values in values_by_point))
    line, = axes.plot(x, means, **look)
    axes.fill_between(x, [m - h for m, h in zip(means, halves)], [m + h for m, h in zip(means, halves)],
                      color=line.get_color(), alpha=0.15, linewidth=0)


def extreme_region(by_stage: dict) -> None:
    outcomes = [o for o in by_stage["main"] if o.of("clip + KL 1")]
    figure = Figure(figsize=(9, 6), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True).flat
    methods = {"sapo": (ORANGE, "SAPO, no constraint"), "clip": (BLACK, "clip"),
               **{f"clip + KL {c}": (colour, f"clip, KL penalty {c}")
                  for c, colour in (("0.2", BLUE), ("1", GREEN))}}
    for axes, (what, title) in zip(panels, (("accuracy", "right completions, held out (higher is better)"),
                                            ("kl", "KL(π‖π₀), nats a completion (lower is closer)"),
                                            ("entropy", "entropy, nats a token"),
                                            ("fallen", "stored completions whose probability fell by e⁵"))):
        for method, (colour, label) in methods.items():
            ways = [o.explorer(method) for o in outcomes]
            shared = min(map(len, ways))  # checkpoints that every seed has
            banded(axes, [row["at"] for row in ways[0][:shared]], [[row[what] for row in rows] for rows in zip(*ways)],
                   color=colour, marker="o", markersize=4, label=label)
        axes.set_title(title, fontsize=9)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        if what == "kl":
            axes.set_yscale("log")
        elif what in ("accuracy", "fallen"):
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        if what in ("accuracy", "entropy"):
            level = mean_interval([o.base if what == "accuracy" else o.entropy for o in outcomes])[0]
            axes.axhline(level, color="grey", linestyle=":", linewidth=1, label="base")
    figure.axes[3].legend(*figure.axes[0].get_legend_handles_labels(), frameon=False, fontsize=7, loc="upper left")
    for axes in figure.axes[2:]:
        axes.set_xlabel("updates on the stored batch (16 a pass)")
    figure.suptitle("Without a constraint the explorer rises first, then drifts and falls; the tighter the constraint, "
                    f"the lower it stays ({len(outcomes)} seeds)", fontsize=10)
    save(figure, "extreme_region.png")


TITLES = {"main": "chains of 4 numbers, the base right a third of the time",
          "rare": "chains of 8 numbers, the base right 8 % of the time"}


def frontier(by_stage: dict) -> None:
    stages = [name for name in TITLES if name in by_stage]
    figure = Figure(figsize=(6.5 * len(stages), 5.4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(stages), sharey=True, squeeze=False)[0], stages):
        outcomes = by_stage[name]
        base = mean_interval([o.base for o in outcomes])[0]
        shares = [k / 60 for k in range(1, 60)]  # of every seed's own way from its base to 1
        heights = [base + share * (1 - base) for share in shares]

        def level(o, share: float) -> float:
            return o.base + share * (1 - o.base)

        # The limit of the mean pass rates, and the band of what the base's samples leave open of them.
        axes.plot([mean_interval([o.least(level(o, share)) for o in outcomes])[0] for share in shares], heights,
                  color="black", linewidth=1.6, linestyle=(0, (4, 2)), label="the limit: no policy can be to the left")
        drawn = [list(zip(*[[interpolate(level(o, share), *limit) for share in shares] for limit in o.limits()]))
                 for o in outcomes]
        bounds = [[sum(sorted(seed[k])[cut] for seed in drawn) / len(drawn) for k in range(len(shares))]
                  for cut in (4, -5)]  # of 200 draws
        axes.fill_betweenx(heights, *bounds, color="black", alpha=0.2, linewidth=0)
        for method in MAIN:
            colour, marker, line, label = LOOKS[method]
            some = [o for o in outcomes if o.of(method)]
            spent = [(height, [o.kl_at(method, level(o, share)) for o in some])
                     for height, share in zip(heights, shares)]
            reached = [(a, ks) for a, ks in spent if ks and all(map(math.isfinite, ks))]
            if not reached:
                continue
            accuracy, spent = zip(*reached)
            means, halves = zip(*(mean_interval(ks) for ks in spent))
            strong = method == "erpd"
            axes.plot(means, accuracy, color=colour, linestyle=line, marker=marker, markevery=6,
                      markersize=6 if strong else 4, linewidth=2.4 if strong else 1.2, label=label,
                      zorder=3 if strong else 4 if method.startswith("weights") else 2)
            left, right = [max(1e-4, m - h) for m, h in zip(means, halves)], [m + h for m, h in zip(means, halves)]
            axes.fill_betweenx(accuracy, left, right, color=colour, alpha=0.25 if strong else 0.08, linewidth=0)
        axes.axhline(base, color="grey", linestyle=":", linewidth=1)
        axes.text(0.011, base + 0.006, "base", fontsize=8, color="grey")
        axes.set_xscale("log")
        axes.set_xlim(0.01, 8)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("KL(π‖π₀) to reach it, on the policy's own samples, nats a completion (log)")
        axes.set_title(f"{TITLES[name]}; {len(outcomes)} seed{'s' * (len(outcomes) != 1)}", fontsize=9)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    figure.axes[0].set_ylabel("right completions, held out")
    figure.axes[0].legend(frameon=False, fontsize=8, loc="upper left")
    figure.suptitle("Cross-entropy moved back keeps up with the student; what the token signal adds is over the "
                    "outcome, most where right completions are rare", fontsize=10)
    save(figure, "frontier.png")


def teacher_accuracy(outcome, row: dict) -> float:
    if row["kind"] == "unlearned":
        return outcome.best("unlearned")
    return outcome.one(row["teacher"], lr=row["lr"], at=row["at"])["accuracy"]


def weak_teachers(by_stage: dict) -> None:
    stages = {name: some for name in TITLES if (some := [o for o in by_stage.get(name, []) if o.of("student")])}
    figure = Figure(figsize=(6.4 * len(stages), 5.2), layout="constrained")
    kinds = {"teacher": (BLUE, "o", "signal: teacher over base"),
             "contrast": (VERMILION, "D", "signal: teacher over unlearned policy"),
             "crossed": (PINK, "s", "the same, teachers of the other half of the problems"),
             "unlearned": (GREEN, "v", "signal: base over unlearned policy")}
    for axes, (name, outcomes) in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages.items()):
        seen = set()
        for row in outcomes[0].of("student"):
            students = [o.one("student", path=row["path"], at=row["at"]) for o in outcomes]
            y, dy = mean_interval([s["accuracy"] for s in students])
            colour, marker, label = kinds[row["kind"]]
            if "+" in row.get("teacher", ""):
                axes.axhline(y, color=VERMILION, linewidth=1, linestyle="--",
                             label="three teachers: sapo + mse + nll, by contrast")
                continue
            x, dx = mean_interval([teacher_accuracy(o, s) for o, s in zip(outcomes, students)])
            axes.errorbar(x, y, dy, dx, color=colour, marker=marker, markersize=7, elinewidth=0.8, capsize=2,
                          linestyle="none", label=None if row["kind"] in seen else label)
            seen.add(row["kind"])
            if row["kind"] in ("contrast", "unlearned"):
                text = row.get("teacher", "unlearned") + (f" {row['at']}" if row.get("teacher") == "sapo" else "")
                below = row.get("teacher") in ("mse", "ce")  # beside others as accurate
                axes.annotate(text, (x, y), xytext=(3, -12 if below else 10), textcoords="offset points",
                              rotation=-50 if below else 50, va="top" if below else "bottom", fontsize=8)
        base, budget = mean_interval([o.base for o in outcomes])[0], outcomes[0].of("student")[0]["budget"]
        control = [o.one("control", at=budget)["accuracy"] for o in outcomes if o.of("control")]
        for height, text in ((base, "base"), (mean_interval(control)[0], "the control, Â in place of δ_t")):
            axes.axhline(height, color="grey", linestyle=":", linewidth=1)
            axes.text(0.02, height - 0.03, text, fontsize=8, color="grey")
        axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
        axes.text(0.86, 0.84, "student = teacher", fontsize=8, color="grey", rotation=45, ha="right",
                  rotation_mode="anchor")
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="right completions of the teacher, held out",
                 ylabel=f"right completions of its student, KL budget {budget:g}")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_title(f"{TITLES[name]}; {len(outcomes)} seeds", fontsize=9)
        axes.legend(frameon=False, fontsize=7, loc="lower right")
    figure.suptitle("A teacher's own accuracy hardly matters to its student", fontsize=10)
    save(figure, "weak_teachers.png")


def rounds(by_stage: dict) -> None:
    """Accuracy by rollouts, and by KL to the first base, along the limit."""
    stages = {name: some for name in TITLES if (some := [o for o in by_stage.get(name, []) if o.of("erpd rounds")])}
    figure = Figure(figsize=(11, 4.4 * len(stages)), layout="constrained")
    ways = {"erpd rounds": (VERMILION, "D", "-", "ERPD, 4 rounds of 1,024 rollouts, budget from the limit"),
            "expert iteration": (BLUE, "o", "--", "expert iteration under the same budgets"),
            "grpo 8×": (SKY, "h", "-", "on-policy GRPO, best learning rate")}
    for (left, right), (name, outcomes) in zip(figure.subplots(len(stages), 2, sharey="row", squeeze=False),
                                               stages.items()):
        base = [o.base for o in outcomes]
        for method, (colour, marker, line, label) in ways.items():
            some = [o for o in outcomes if o.of(method)]
            paths = [max(o.paths(method), key=lambda path: path[-1]["accuracy"]) for o in some]
            if not paths:
                continue
            values = [base, *([row["accuracy"] for row in rows] for rows in zip(*paths))]
            banded(left, [0] + [row["rollouts"] for row in paths[0]], values, color=colour, marker=marker,
                   linestyle=line, label=label)
            spent = [0] + [mean_interval([row["kl"] for row in rows])[0] for rows in zip(*paths)]
            banded(right, spent, values, color=colour, marker=marker, linestyle=line)
        after = [(long_grpo(o)[-1], o.one("grpo, then erpd")) for o in outcomes if o.of("grpo, then erpd")]
        if after:
            banded(left, [row["rollouts"] for row in after[0]], [[r["accuracy"] for r in rows] for rows in zip(*after)],
                   color=GREEN, marker="^", linestyle="--", label="one ERPD round after GRPO")
        shares = [k / 60 for k in range(60)]
        right.plot([mean_interval([o.least(o.base + s * (1 - o.base)) for o in outcomes])[0] for s in shares],
                   [mean_interval(base)[0] * (1 - s) + s for s in shares], color="black", linestyle=(0, (4, 2)),
                   linewidth=1.6, label="the limit")
        left.set(xlabel="rollouts that were used to train", ylabel="right completions, held out", ylim=(0, 1.02))
        right.set(xlabel="KL(π‖π₀) to the first base, nats a completion", xlim=(0, None))
        right.legend(frameon=False, fontsize=8, loc="lower right")
        left.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        left.set_title(f"{TITLES[name]}; {len(outcomes)} seeds", fontsize=9)
        left.legend(frameon=False, fontsize=8, loc="lower right")
    figure.suptitle("With a budget from the limit rounds go on rising, from half of GRPO's rollouts; expert iteration "
                    "under the same budgets does as well or better", fontsize=10)
    save(figure, "rounds.png")


def long_grpo(outcome) -> list[dict]:
    return max(outcome.paths("grpo 8×"), key=lambda path: path[-1]["accuracy"])


CELLS = (("how often the base is right", ("3 carries", "2 carries", "main", "at most 1 carry")),
         ("prompts in the batch", ("16 prompts", "main", "256 prompts")),
         ("operands in a chain", ("2 operands", "main", "rare")))
RIVALS = {"erpd": "ERPD", "nll": "cross-entropy", "weights: nll": "cross-entropy, weights", "sapo": "SAPO",
          "weights: sapo": "SAPO, weights"}


def which_wins(by_stage: dict) -> None:
    """The map: who has the best KL efficiency (mean of the levels that ERPD and its best rival both reach on every
    seed) and the highest ceiling, cell by cell."""
    figure = Figure(figsize=(11, 6.2), layout="constrained")
    for axes, (title, cells) in zip(figure.subplots(3, 1), CELLS):
        for x, name in enumerate(cells):
            outcomes = by_stage.get(name, [])
            for y in range(2 if outcomes else 0):
                text, shade = (efficiency_cell if y == 0 else ceiling_cell)(outcomes)
                axes.add_patch(Rectangle((x, y), 0.98, 0.96, facecolor=shade, alpha=0.35, edgecolor=shade))
                for line, (words, weight) in enumerate(zip(text, ("bold", "normal"))):
                    axes.text(x + 0.49, y + 0.32 + 0.36 * line, words, ha="center", va="center", fontsize=9 - line,
                              weight=weight)
            base = "not run"
            if outcomes:
                base = f"{mean_interval([o.base for o in outcomes])[0]:.0%} right, {len(outcomes)} seeds"
            axes.text(x + 0.49, -0.12, cell_name(title, name, base), ha="center", va="bottom", fontsize=8)
        axes.set(xlim=(-0.02, 4), ylim=(2.02, -0.5))
        axes.set_yticks([0.48, 1.48], ["KL efficiency", "ceiling"], fontsize=8)
        axes.set_xticks([])
        axes.set_title(title, fontsize=9, loc="left")
        for side in axes.spines.values():
            side.set_visible(False)
        axes.tick_params(length=0)
    figure.suptitle("Which method wins where: the winner, and below it ERPD or, where ERPD wins, the best of the rest",
                    fontsize=10)
    save(figure, "which_wins.png")


def efficiency_cell(outcomes) -> tuple[tuple[str, str], str]:
    """Paired: ERPD and the rival that leads it most, or trails it least, at the levels that both reach."""
    pairs = {}
    for method in list(RIVALS)[1:]:
        both = [[(o.efficiency("erpd", o.levels[k]), o.efficiency(method, o.levels[k])) for o in outcomes]
                for k in range(len(LEVELS))]
        both = [pair for seeds in both if not any(math.isnan(e) for pair in seeds for e in pair) for pair in seeds]
        if both:
            pairs[method] = [sum(side) / len(both) for side in zip(*both)]
    if not pairs:
        return ("no level is shared", ""), "grey"
    rival = max(pairs, key=lambda method: pairs[method][1] - pairs[method][0])
    ours, theirs = pairs[rival]
    text = (f"ERPD {ours:.2f}", f"{RIVALS[rival]} {theirs:.2f}")
    return (text, LOOKS["erpd"][0]) if ours >= theirs else (text[::-1], LOOKS[rival][0])


def ceiling_cell(outcomes) -> tuple[tuple[str, str], str]:
    best = {method: mean_interval([o.best(method) for o in outcomes])[0]
            for method in RIVALS if all(o.of(method) for o in outcomes)}
    first = max(best, key=best.get)
    second = "erpd" if first != "erpd" else max(set(best) - {"erpd"}, key=best.get)
    return tuple(f"{RIVALS[m]} {best[m]:.0%}" for m in (first, second)), LOOKS[first][0]


def cell_name(title: str, name: str, base: str) -> str:
    if title.startswith("how often"):
        return base
    number = {"main": "64" if title.startswith("prompts") else "4", "rare": "8"}.get(name, name.split()[0])
    return f"{number} (base {base})"


def draw(by_stage: dict) -> None:
    pictures = {extreme_region: "clip + KL 1", frontier: "erpd", weak_teachers: "student", rounds: "erpd rounds",
                which_wins: "erpd"}
    for picture, method in pictures.items():
        if any(o.of(method) for o in by_stage.get("main", [])):
            picture(by_stage)
