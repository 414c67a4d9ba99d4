"""The pictures of figures/claims.py. Each takes the outcomes by stage and writes one PNG beside this file.

Bands and bars are 95 % intervals over seeds (Student's t). Colours are Okabe and Ito's, which the colour-blind can tell
apart; a method has the same colour, and marker, in all pictures.
"""

import math
from pathlib import Path

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter

from figures.frontier import COLOURS
from figures.outcomes import mean_interval

HERE = Path(__file__).resolve().parent
BLACK, ORANGE, BLUE, VERMILION, GREEN, PINK, SKY, YELLOW = COLOURS
MAIN = ("erpd", "nll", "weights: nll", "grpo 8×", "sapo", "control")  # the frontier's; figures/README.md has all
LOOKS = {  # method → (colour, marker, line, label)
    "erpd": (VERMILION, "D", "-", "ERPD student"), "weights: erpd": (VERMILION, "v", "--", "  its weights towards the base"),
    "nll": (BLUE, "o", "-", "cross-entropy on the right completions"),
    "weights: nll": (BLUE, "v", "--", "  its weights towards the base"),
    "logits: nll": (BLUE, "^", ":", "  its logits towards the base"),
    "mse": (GREEN, "s", "-", "MSE"), "weights: mse": (GREEN, "v", "--", "  its weights towards the base"),
    "sapo": (ORANGE, "P", "-", "SAPO (the explorer)"), "weights: sapo": (ORANGE, "v", "--", "  its weights towards the base"),
    "ce": (PINK, "X", "-", "CE"), "clip": (BLACK, "*", "-", "clipped off-policy reuse"),
    "clip + KL 0.2": (BLACK, "*", "--", "  with KL penalty 0.2"), "grpo": (SKY, "h", "--", "on-policy GRPO, as many rollouts"),
    "grpo 8×": (SKY, "h", "-", "on-policy GRPO, 8× the rollouts"),
    "control": ("grey", "d", ":", "stage 2 with Â (the control)"),
    "temperature": ("grey", "_", "-", "the base, colder or hotter")}


def save(figure: Figure, name: str) -> None:
    figure.savefig(HERE / name, dpi=150)


def banded(axes, x, values_by_point, **look) -> None:
    """A line of means over seeds with the band of its interval."""
    means, halves = zip(*(mean_interval(values) for values in values_by_point))
    line, = axes.plot(x, means, **look)
    axes.fill_between(x, [m - h for m, h in zip(means, halves)], [m + h for m, h in zip(means, halves)], color=line.get_color(),
                      alpha=0.15, linewidth=0)


def extreme_region(by_stage: dict) -> None:
    outcomes = by_stage["64 prompts"]
    figure = Figure(figsize=(9, 6), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True).flat
    methods = {"sapo": (ORANGE, "SAPO, no constraint"), "clip": (BLACK, "clip"),
               **{f"clip + KL {c}": (colour, f"clip, KL penalty {c}")
                  for c, colour in (("0.05", SKY), ("0.2", BLUE), ("1", GREEN))}}
    for axes, (what, title) in zip(panels, (("accuracy", "right completions, held out (higher is better)"),
                                            ("kl", "KL(π‖π₀), nats a completion (lower is closer)"),
                                            ("entropy", "entropy, nats a token"),
                                            ("fallen", "stored completions whose probability fell by e⁵"))):
        for method, (colour, label) in methods.items():
            ways = [o.explorer(method) for o in outcomes]
            banded(axes, [16 * row["at"] for row in ways[0]], [[row[what] for row in rows] for rows in zip(*ways)],
                   color=colour, marker="o", markersize=4, label=label)
        axes.set_title(title, fontsize=9)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        if what == "kl":
            axes.set_yscale("log")
        elif what in ("accuracy", "fallen"):
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        if what in ("accuracy", "entropy"):
            axes.axhline(mean_interval([o.base if what == "accuracy" else o.entropy for o in outcomes])[0], color="grey",
                         linestyle=":", linewidth=1, label="base")
    figure.axes[3].legend(*figure.axes[0].get_legend_handles_labels(), frameon=False, fontsize=7, loc="upper left")
    for axes in figure.axes[2:]:
        axes.set_xlabel("updates on the stored batch (16 a pass)")
    figure.suptitle(f"Without a constraint the explorer rises first, then drifts and falls; the tighter the constraint, "
                    f"the lower it stays ({len(outcomes)} seeds)", fontsize=10)
    save(figure, "extreme_region.png")


def frontier(by_stage: dict) -> None:
    stages = [name for name in ("64 prompts", "256 prompts") if name in by_stage]
    figure = Figure(figsize=(6.5 * len(stages), 5.4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(stages), sharey=True, squeeze=False)[0], stages):
        outcomes = by_stage[name]
        base = mean_interval([o.base for o in outcomes])[0]
        shares = [k / 60 for k in range(1, 60)]  # of every seed's own way from its base to 1

        def level(o, share: float) -> float:
            return o.base + share * (1 - o.base)

        axes.plot([mean_interval([o.least(level(o, share)) for o in outcomes])[0] for share in shares],
                  [base + share * (1 - base) for share in shares], color="black", linewidth=1.6, linestyle=(0, (4, 2)),
                  label="the limit: no policy can be to the left")
        for method in MAIN:
            colour, marker, line, label = LOOKS[method]
            if not all(o.of(method) for o in outcomes):
                continue
            spent = [(base + share * (1 - base), [o.kl_at(method, level(o, share)) for o in outcomes]) for share in shares]
            reached = [(a, ks) for a, ks in spent if all(map(math.isfinite, ks))]
            if not reached:
                continue
            accuracy, spent = zip(*reached)
            means, halves = zip(*(mean_interval(ks) for ks in spent))
            strong = method == "erpd"
            axes.plot(means, accuracy, color=colour, linestyle=line, marker=marker, markevery=6, markersize=6 if strong else 4,
                      linewidth=2.4 if strong else 1.2, label=label,
                      zorder=3 if strong else 4 if method.startswith("weights") else 2)
            left, right = [max(1e-4, m - h) for m, h in zip(means, halves)], [m + h for m, h in zip(means, halves)]
            axes.fill_betweenx(accuracy, left, right, color=colour, alpha=0.25 if strong else 0.08, linewidth=0)
        axes.axhline(base, color="grey", linestyle=":", linewidth=1)
        axes.text(0.011, base + 0.006, "base", fontsize=8, color="grey")
        axes.set_xscale("log")
        axes.set_xlim(0.01, 5)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("KL(π‖π₀) to reach it, on the policy's own samples, nats a completion (log)")
        axes.set_title(f"{name} × 16 stored completions, {len(outcomes)} seed{'s' * (len(outcomes) != 1)}", fontsize=9)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    figure.axes[0].set_ylabel("right completions, held out")
    figure.axes[0].legend(frameon=False, fontsize=8, loc="upper left")
    figure.suptitle("The student stays nearer to the limit than every method that trains directly; only cross-entropy, "
                    "moved back towards the base, keeps up", fontsize=10)
    save(figure, "frontier.png")


def language_model(by_stage: dict) -> None:
    """Every measured policy of the chat model, by seed: two seeds give no band worth drawing."""
    outcomes = by_stage["SmolLM2"]
    figure = Figure(figsize=(7, 4.8), layout="constrained")
    axes = figure.subplots()
    for o in outcomes:
        first = o is outcomes[0]
        axes.plot(o.limit[1], o.limit[0], color="black", linewidth=1, linestyle=(0, (4, 2)),
                  label="the limit" if first else None)
        for method, (colour, marker, line, label) in LOOKS.items():
            for path in o.paths(method):
                axes.plot([0, *(row["kl"] for row in path)], [o.base, *(row["accuracy"] for row in path)], color=colour,
                          marker=marker, linestyle=line, linewidth=1 + (method == "erpd"), markersize=5,
                          label=label if first else None)
    axes.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
    axes.set_xlim(0, 3.2)
    axes.set_xticks([0, 0.1, 0.3, 1, 2, 3], ["0", "0.1", "0.3", "1", "2", "3"])
    axes.set(xlabel="KL(π‖π₀) on the policy's own samples, nats a completion (square-root scale)",
             ylabel="right completions, held out")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_title(f"SmolLM2-135M on one-digit sums: from 96 completions no method stands out ({len(outcomes)} seeds)", fontsize=9)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    save(figure, "language_model.png")


def teacher_accuracy(outcome, row: dict) -> float:
    if row["kind"] == "unlearned":
        return max(outcome.of("unlearned"), key=lambda r: r["at"])["accuracy"]
    return outcome.one(row["teacher"], lr=3e-5 if row["teacher"] == "sapo" else 1e-4, at=row["at"])["accuracy"]


def weak_teachers(by_stage: dict) -> None:
    outcomes = by_stage["64 prompts"]
    figure = Figure(figsize=(8, 5.2), layout="constrained")
    axes = figure.subplots()
    seen = set()
    kinds = {"teacher": (BLUE, "o", "signal: teacher over base"),
             "contrast": (VERMILION, "D", "signal: teacher over unlearned policy"),
             "unlearned": (GREEN, "v", "signal: base over unlearned policy")}
    for row in outcomes[0].of("student"):
        students = [o.one("student", path=row["path"], at=row["at"]) for o in outcomes]
        y, dy = mean_interval([s["accuracy"] for s in students])
        colour, marker, label = kinds[row["kind"]]
        if "+" in row.get("teacher", ""):
            axes.axhline(y, color=VERMILION, linewidth=1, linestyle="--", label="three teachers: sapo + mse + nll, by contrast")
            continue
        x, dx = mean_interval([teacher_accuracy(o, s) for o, s in zip(outcomes, students)])
        axes.errorbar(x, y, dy, dx, color=colour, marker=marker, markersize=7, elinewidth=0.8, capsize=2, linestyle="none",
                      label=None if row["kind"] in seen else label)
        seen.add(row["kind"])
        name = row.get("teacher", "unlearned") + (f", epoch {row['at']}" if row.get("teacher") == "sapo" else "")
        if row["kind"] != "teacher":
            # Teachers of like accuracy: their labels go up, down to the left and down to the right.
            up, left, right = ((2, 16), 60, "left"), ((-2, -16), 60, "right"), ((6, -16), -60, "left")
            offset, slant, side = {"mse": left, "sapo, epoch 1": left, "ce": right}.get(name, up)
            axes.annotate(name, (x, y), xytext=offset, textcoords="offset points", rotation=slant, ha=side, fontsize=8,
                          rotation_mode="anchor")
    base = mean_interval([o.base for o in outcomes])[0]
    axes.axhline(base, color="grey", linestyle=":", linewidth=1)
    axes.text(0.11, base + 0.008, "base", fontsize=8, color="grey")
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    axes.text(0.775, 0.75, "student = teacher", fontsize=8, color="grey", rotation=45, rotation_mode="anchor")
    axes.set(xlim=(0.1, 1), ylim=(0.3, 0.85), xlabel="right completions of the teacher, held out",
             ylabel="right completions of its student, KL budget 0.5")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_title(f"At one KL budget every teacher makes the same student, one worse than the base too ({len(outcomes)} seeds)",
                   fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    save(figure, "weak_teachers.png")


def rounds(by_stage: dict) -> None:
    outcomes = by_stage["64 prompts"]
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    base = [o.base for o in outcomes]

    def way(paths, **look):
        """Mean accuracy over seeds at each count of rollouts; every path has the same counts."""
        means = [[row["accuracy"] for row in rows] for rows in zip(*paths)]
        banded(axes, [0] + [row["rollouts"] for row in paths[0]], [base] + means, **look)

    def rounds_of(method: str) -> list[list[dict]]:
        return [sorted(o.of(method), key=lambda row: row["at"]) for o in outcomes]

    best = [max(o.paths("grpo 8×"), key=lambda path: path[-1]["accuracy"]) for o in outcomes]
    way(best, color=SKY, marker="h", label="on-policy GRPO, best learning rate of three")
    way(rounds_of("erpd rounds"), color=VERMILION, marker="D", label="ERPD, rounds of 1,024 rollouts, KL budget 1 each")
    if all(o.of("erpd small rounds") for o in outcomes):
        way(rounds_of("erpd small rounds"), color=ORANGE, marker="s", label="the same, KL budget 0.5 each")
    for method, colour, line, budget in (("grpo, then erpd", GREEN, "--", "1"), ("grpo, then a little erpd", PINK, ":", "0.25")):
        if all(o.of(method) for o in outcomes):
            after = [[path[-1], o.one(method)] for path, o in zip(best, outcomes)]
            banded(axes, [row["rollouts"] for row in after[0]], [[row["accuracy"] for row in rows] for rows in zip(*after)],
                   color=colour, marker="^", linestyle=line, label=f"one ERPD round after GRPO, KL budget {budget}")
    axes.set(xlabel="rollouts that were used to train", ylabel="right completions, held out", ylim=(0.25, 1.02))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_title("Two small rounds of ERPD go as far as GRPO with some three times the rollouts;\n"
                   f"above 90 % a further round spends its budget on noise ({len(outcomes)} seeds)", fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    save(figure, "rounds.png")


def landing(by_stage: dict) -> None:
    outcomes = by_stage["64 prompts"]
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.7, 1))
    shown = outcomes[0].one("rollouts shown")["shown"]
    norm = TwoSlopeNorm(0, -4, 4)
    colours = ScalarMappable(norm, "RdBu")
    for line, item in enumerate(shown):
        text = item["text"].replace("\n", "⏎")[:len(item["signal"])] + "■"
        for i, (character, s) in enumerate(zip(text, item["signal"])):
            left.add_patch(Rectangle((i, line), 1, 0.9, facecolor=colours.to_rgba(max(-4, min(4, s))), edgecolor="none"))
            left.text(i + 0.5, line + 0.47, character, ha="center", va="center", fontsize=6.5, family="monospace",
                      color="white" if abs(s) > 2.6 else "black")
            if i == item["first_wrong"]:
                left.add_patch(Rectangle((i, line), 1, 0.9, facecolor="none", edgecolor="black", linewidth=1.4))
        left.text(-0.6, line + 0.47, item["question"], ha="right", va="center", fontsize=7, family="monospace")
    left.set(xlim=(-13, max(len(i["signal"]) for i in shown) + 0.5), ylim=(len(shown), -0.3))
    left.axis("off")
    left.set_title("Stored completions (■: end), coloured by δ_t; a box: the first wrong token", fontsize=9)
    figure.colorbar(colours, ax=left, shrink=0.6, label="δ_t over its root mean square (red: worse)")
    names = [row["path"] for row in outcomes[0].of("landing")]
    for at, (what, colour, label) in enumerate((("first_wrong", VERMILION, "−δ_t: which token is the first wrong one"),
                                                ("gone_wrong", BLUE, "−Σ δ: has the prefix gone wrong"))):
        means, halves = zip(*(mean_interval([o.one("landing", path=name)[what] for o in outcomes]) for name in names))
        right.barh([i + 0.4 * at for i in range(len(names))], means, 0.38, xerr=halves, color=colour, label=label,
                   error_kw={"elinewidth": 0.8})
    right.set_yticks([i + 0.2 for i in range(len(names))], names, fontsize=8)
    right.invert_yaxis()
    right.set_xlim(0, 1)
    right.axvline(0.5, color="grey", linewidth=1, linestyle=":")
    right.set_xlabel("AUROC in wrong chains (0.5: chance)")
    right.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.4, -0.12))
    right.set_title(f"How well a signal finds the mistake ({len(outcomes)} seeds)", fontsize=9)
    figure.suptitle("The drifted policies know where a chain goes wrong; the outcome advantage does not", fontsize=10)
    save(figure, "landing.png")


CELLS = (("how often the base is right", ("3 carries", "2 carries", "64 prompts", "at most 1 carry")),
         ("prompts in the batch", ("16 prompts", "64 prompts", "256 prompts")),
         ("operands in a chain", ("2 operands", "64 prompts", "8 operands")))
RIVALS = {"erpd": "ERPD", "weights: erpd": "ERPD, weights", "nll": "cross-entropy", "weights: nll": "cross-entropy, weights",
          "sapo": "SAPO", "weights: sapo": "SAPO, weights"}


def which_wins(by_stage: dict) -> None:
    """The map: who has the best KL efficiency (mean of the three levels) and the best accuracy, cell by cell."""
    figure = Figure(figsize=(11, 6.2), layout="constrained")
    for axes, (title, cells) in zip(figure.subplots(3, 1), CELLS):
        for x, name in enumerate(cells):
            outcomes = by_stage.get(name, [])
            for y, what in enumerate(("KL efficiency", "best accuracy")):
                if not outcomes:
                    continue
                scores = {method: mean_interval([sum(o.efficiency(method, a) for a in o.levels) / 3 if y == 0
                                                 else o.best(method) for o in outcomes])[0]
                          for method in RIVALS if all(o.of(method) for o in outcomes)}
                first = max(scores, key=scores.get)
                shade = LOOKS[first][0]
                axes.add_patch(Rectangle((x, y), 0.98, 0.96, facecolor=shade, alpha=0.35, edgecolor=shade))
                form = "{:.2f}" if y == 0 else "{:.0%}"
                axes.text(x + 0.49, y + 0.34, f"{RIVALS[first]} {form.format(scores[first])}", ha="center", va="center",
                          fontsize=9, weight="bold")
                rest = next(m for m in sorted(scores, key=scores.get, reverse=True) if ("erpd" in m) != ("erpd" in first))
                axes.text(x + 0.49, y + 0.7, f"{RIVALS[rest]} {form.format(scores[rest])}", ha="center", va="center",
                          fontsize=8)
            seeds = f"{len(outcomes)} seed{'s' * (len(outcomes) != 1)}"
            base = f"{mean_interval([o.base for o in outcomes])[0]:.0%} right, {seeds}" if outcomes else "not run"
            axes.text(x + 0.49, -0.12, cell_name(title, name, base), ha="center", va="bottom", fontsize=8)
        axes.set(xlim=(-0.02, 4), ylim=(2.02, -0.5))
        axes.set_yticks([0.48, 1.48], ["KL efficiency", "best accuracy"], fontsize=8)
        axes.set_xticks([])
        axes.set_title(title, fontsize=9, loc="left")
        for side in axes.spines.values():
            side.set_visible(False)
        axes.tick_params(length=0)
    figure.suptitle("Which method wins where: the winner, and below it the best of ERPD or, where ERPD wins, of the rest",
                    fontsize=10)
    save(figure, "which_wins.png")


def cell_name(title: str, name: str, base: str) -> str:
    if title.startswith("how often"):
        return base
    number = "64" if name == "64 prompts" and title.startswith("prompts") else "4" if name == "64 prompts" else name.split()[0]
    return f"{number} (base {base})"


def draw(by_stage: dict) -> None:
    if "64 prompts" in by_stage:
        for picture in (extreme_region, frontier, weak_teachers, rounds, landing, which_wins):
            picture(by_stage)
    if "SmolLM2" in by_stage:
        language_model(by_stage)
