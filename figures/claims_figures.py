"""The pictures of figures/claims.py: each draws on a figure, and returns its title.

Bands and bars are 95 % intervals over seeds (Student's t). A method has one colour and marker in all pictures.
"""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from figures.frontier import COLOURS, legend
from figures.outcomes import Outcome, mean_interval

Stages = dict[str, list[Outcome]]
HERE = Path(__file__).resolve().parent
BLACK, ORANGE, BLUE, VERMILION, GREEN, PINK, SKY, YELLOW = COLOURS
LOOKS = {  # method → (colour, marker, line, label)
    "erpd": (VERMILION, "D", "-", "ERPD student"),
    "nll": (BLUE, "o", "-", "cross-entropy on the right completions"),
    "weights: nll": (BLUE, "v", "--", "cross-entropy, its weights towards the base"),
    "grpo 8×": (PINK, "h", "-", "on-policy GRPO, 8× the rollouts"),
    "sapo": (ORANGE, "P", "-", "SAPO (the explorer)"),
    "control": ("grey", "d", ":", "stage 2 with Â in place of δ_t (the control)")}
TITLES = {"main": "chains of 4 numbers, the base right a third of the time",
          "rare": "chains of 8 numbers, the base right 8 % of the time"}
SHARES = np.arange(1, 60) / 60  # of every seed's own way from its base to 1
LIMIT = {"color": BLACK, "linewidth": 1.6, "linestyle": (0, (4, 2))}
BASE = {"color": "grey", "linewidth": 1, "linestyle": ":"}
STYLE = {"figure.constrained_layout.use": True, "figure.titlesize": 10, "axes.titlesize": 9, "legend.fontsize": 8,
         "legend.frameon": False, "savefig.dpi": 150}


def means(columns) -> np.ndarray:
    """[2, points] from values [points, seeds]: the means, and half the width of their intervals."""
    return np.array([mean_interval(list(values)) for values in columns]).T


def banded(axes, x, values, **look) -> None:
    """A line of means over seeds, from values [points, seeds], with its band."""
    mean, half = means(values)
    axes.plot(x, mean, **look)
    axes.fill_between(x, mean - half, mean + half, color=look["color"], alpha=0.15, linewidth=0)


def extreme_region(figure: Figure, stages: Stages) -> str:
    figure.set_size_inches(9, 6)
    outcomes, = stages.values()
    methods = {"sapo": (ORANGE, "SAPO, no constraint"), "clip": (BLACK, "clip"),
               "clip + KL 0.2": (BLUE, "clip, KL penalty 0.2"), "clip + KL 1": (GREEN, "clip, KL penalty 1"),
               "sapo + KL 0.2": (PINK, "SAPO, KL penalty 0.2")}
    panels = {"accuracy": "right completions, held out (higher is better)",
              "kl": "KL(π‖π₀), nats a completion (lower is closer)", "entropy": "entropy, nats a token",
              "fallen": "stored completions whose probability fell by e⁵"}
    for axes, (what, title) in zip(figure.subplots(2, 2, sharex=True).flat, panels.items()):
        for method, (colour, label) in methods.items():
            checkpoints = list(zip(*(o.of(method, lr=3e-5) for o in outcomes)))  # those that every seed has
            values = [[row[what] for row in rows] for rows in checkpoints]
            updates = [rows[0]["at"] for rows in checkpoints]
            banded(axes, updates, values, color=colour, marker="o", markersize=4, label=label)
        axes.set_title(title)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
    accuracy, spent, entropy, fallen = figure.axes
    spent.set_yscale("log")
    accuracy.yaxis.set_major_formatter("{x:.0%}")
    fallen.yaxis.set_major_formatter("{x:.0%}")
    accuracy.axhline(np.mean([o.base for o in outcomes]), **BASE, label="base")
    entropy.axhline(np.mean([o.entropy for o in outcomes]), **BASE)
    fallen.legend(*accuracy.get_legend_handles_labels(), loc="upper left")
    for axes in (entropy, fallen):
        axes.set_xlabel("updates on the stored batch (16 a pass)")
    return ("Without a constraint the explorer rises, then drifts and falls; clipped it stays low; "
            f"a KL penalty alone does neither\n(learning rate 3e-5, {len(outcomes)} seeds)")


def frontier(figure: Figure, stages: Stages) -> str:
    figure.set_size_inches(6.5 * len(stages), 5.4)
    panels = figure.subplots(1, len(stages), sharey=True, squeeze=False)[0]
    for axes, (title, outcomes) in zip(panels, stages.items()):
        base = np.mean([o.base for o in outcomes])
        heights = base + SHARES * (1 - base)
        # The mean limit, and the band of what the base's samples leave open of it.
        limit, _ = means([o.least(o.level(share)) for o in outcomes] for share in SHARES)
        axes.plot(limit, heights, **LIMIT, label="the limit: no policy can be to the left")
        if all(o.alike for o in outcomes):  # from the first level on: below, paths are interpolated from the base
            above = SHARES >= 1 / 3
            alike, _ = means([o.least(o.level(share), o.alike) for o in outcomes] for share in SHARES[above])
            axes.plot(alike, heights[above], color=BLACK, linewidth=0.8, label="… that mends lost chains, too")
        drawn = [[np.interp(o.level(SHARES), *one, right=np.inf) for one in o.limits()] for o in outcomes]
        band = np.sort(drawn, axis=1).mean(0)  # [200 draws, shares]
        axes.fill_betweenx(heights, band[4], band[-5], color=BLACK, alpha=0.2, linewidth=0)
        for method, (colour, marker, line, label) in LOOKS.items():
            some = [o for o in outcomes if o.of(method)]
            spent = np.array([[o.kl_at(method, o.level(share)) for o in some] for share in SHARES])
            reached = np.isfinite(spent).all(1)  # by every seed
            if some and reached.any():
                mean, half = means(spent[reached])
                width = 2.4 if method == "erpd" else 1.2
                axes.plot(mean, heights[reached], color=colour, linestyle=line, linewidth=width, marker=marker,
                          markersize=2 + 1.6 * width, markevery=6, label=label)
                left = np.maximum(1e-4, mean - half)
                axes.fill_betweenx(heights[reached], left, mean + half, color=colour, alpha=0.12, linewidth=0)
                # A line ends where one seed falls out; every seed has a ceiling, each at a KL of its own.
                ceilings = [max(o.of(method), key=lambda row: row["accuracy"]) for o in some]
                best, half = mean_interval([row["accuracy"] for row in ceilings])
                spent = np.median([row["kl"] for row in ceilings])  # GRPO on one seed: 22 nats, else 0.9 to 1.6
                axes.errorbar(spent, best, half, color=colour, marker=marker, markersize=4 + 1.6 * width,
                              markerfacecolor="white", capsize=2)
        axes.plot([], [], "o", color=BLACK, markersize=5, markerfacecolor="white",
                  label="hollow: the ceilings, at their median KL")
        axes.axhline(base, **BASE)
        axes.text(7.6, base + 0.006, "base", fontsize=8, color="grey", ha="right")
        axes.set(xscale="log", xlim=(0.01, 8), title=title,
                 xlabel="KL(π‖π₀) to reach it, on the policy's own samples, nats a completion (log)")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:.0%}")
    figure.axes[0].set_ylabel("right completions, held out")
    figure.axes[0].legend(loc="upper left")
    return ("Cross-entropy moved back keeps up with the student; "
            "what the token signal beats, in the same trust region, is the bare outcome Â")


def weak_teachers(figure: Figure, stages: Stages) -> str:
    """Students at one budget beside their teachers, the weakest first; several teachers have no accuracy together."""
    figure.set_size_inches(7.5 * len(stages), 5)
    panels = figure.subplots(1, len(stages), squeeze=False)[0]
    for axes, (title, outcomes) in zip(panels, stages.items()):
        labels, teachers, students = [], [], []
        for row in outcomes[0].of("student"):
            labels.append(f"{row['path']}, {row['at']} updates" if row["at"] else row["path"])
            about = {key: row[key] for key in ("lr", "at") if "lr" in row}
            teacher, measured = row.get("teacher", "unlearned"), outcomes if row["kind"] != "crossed" else []
            teachers.append([found["accuracy"] for o in measured for found in o.of(teacher, **about)])
            students.append([o.one("student", path=row["path"], at=row["at"])["accuracy"] for o in outcomes])
        order = np.argsort(np.nan_to_num(means(teachers)[0], nan=1), kind="stable")
        for (mean, half), colour, marker, label in ((means(teachers), "grey", "o", "teacher"),
                                                    (means(students), VERMILION, "D", "its student")):
            axes.errorbar(mean[order], range(len(labels)), xerr=half[order], color=colour, marker=marker, capsize=2,
                          linestyle="none", label=label)
        axes.set_yticks(range(len(labels)), [labels[k] for k in order])
        axes.axvline(np.mean([o.base for o in outcomes]), **BASE, label="base")
        control = [o.one("control", at=row["budget"])["accuracy"] for o in outcomes if o.of("control")]
        axes.axvline(np.mean(control), color="grey", linewidth=1, linestyle="--", label="Â in place of δ_t")
        axes.set(xlim=(0, 1), title=title,
                 xlabel=f"right completions, held out; students with a KL budget of {row['budget']:g}")
        axes.xaxis.set_major_formatter("{x:.0%}")
        axes.legend(loc="upper left")
    return "At this budget a teacher's own accuracy hardly matters to its student"


def rounds(figure: Figure, stages: Stages) -> str:
    """Accuracy by rollouts, and by KL to the first base, along the limit."""
    figure.set_size_inches(11, 4.4 * len(stages))
    looks = {"erpd rounds": (VERMILION, "D", "-", "ERPD, 4 rounds of 1,024 rollouts, budget from the limit"),
             "expert iteration": (BLUE, "o", "--", "expert iteration under the same budgets"),
             "grpo 8×": (PINK, "h", "-", "on-policy GRPO, best learning rate"),
             "grpo, then erpd": (GREEN, "^", "--", "one ERPD round after GRPO")}
    panels = figure.subplots(len(stages), 2, sharey="row", squeeze=False)
    for (left, right), (title, outcomes) in zip(panels, stages.items()):
        for method, (colour, marker, line, label) in looks.items():
            some = [o for o in outcomes if o.of(method)]
            paths = [[o.one("base") | {"rollouts": 0}, *o.best_path(method)] for o in some]
            if method == "grpo, then erpd":
                paths = [[o.best_path("grpo 8×")[-1], o.one(method)] for o in some]
            if points := list(zip(*paths)):
                accuracy, spent = ([[row[what] for row in rows] for rows in points] for what in ("accuracy", "kl"))
                look = {"color": colour, "marker": marker, "linestyle": line, "label": label}
                banded(left, [rows[0]["rollouts"] for rows in points], accuracy, **look)
                banded(right, np.median(spent, axis=1), accuracy, **look)
        base = np.mean([o.base for o in outcomes])
        limit, _ = means([o.least(o.level(share)) for o in outcomes] for share in SHARES)
        right.plot(limit, base + SHARES * (1 - base), **LIMIT, label="the limit")
        left.set(title=title, ylim=(0, 1.02), xlabel="rollouts that were used to train",
                 ylabel="right completions, held out")
        right.set(xlabel="KL(π‖π₀) to the first base, nats a completion, median over seeds", xlim=(0, None))
        left.legend(*right.get_legend_handles_labels(), loc="lower right")
        left.yaxis.set_major_formatter("{x:.0%}")
    return ("With a budget from the limit rounds go on rising, from half of GRPO's rollouts; expert iteration under "
            "the same budgets does as well or better")


def which_wins(figure: Figure, stages: Stages) -> str:
    """The map: every stage, by KL efficiency half of the way and by ceiling."""
    figure.set_size_inches(11, 1.5 + 0.9 * len(stages))
    looks = LOOKS | {"weights: sapo": (ORANGE, "v", "--", "SAPO, its weights towards the base")}
    measures = {"KL efficiency 1/2 of the way, where all seeds get there": lambda o, m: o.efficiency(m, o.levels[1]),
                "right completions, the ceiling": Outcome.best}
    for axes, (title, measure) in zip(figure.subplots(1, 2, sharey=True), measures.items()):
        for k, (method, (colour, marker, _, label)) in enumerate(looks.items()):
            for y, outcomes in enumerate(stages.values()):
                values = [measure(o, method) for o in outcomes]
                if np.isfinite(values).all():
                    mean, half = mean_interval(values)
                    axes.errorbar(mean, y + 0.1 * k, xerr=half, color=colour, marker=marker, label=label)
        axes.set(xlim=(0, 1), title=title)
    bases = {name: np.mean([o.base for o in outcomes]) for name, outcomes in stages.items()}
    axes.set_yticks(np.arange(len(bases)) + 0.3, [f"{name}: base {base:.0%}" for name, base in bases.items()])
    axes.invert_yaxis()
    legend(axes, on=figure, loc="outside lower center", ncols=4)
    return "Which method wins where: ERPD beyond cross-entropy moved back where 6 to 8 % are right"


def draw(by_stage: Stages) -> None:
    """The pictures of what has been run; the map where more than the main stages has."""
    def have(method: str, *names: str) -> Stages:
        found = {name: [o for o in by_stage.get(name, []) if o.of(method)] for name in names}
        return {f"{TITLES[name]}; {len(some)} seeds": some for name, some in found.items() if some}

    cells = {name: some for name, some in by_stage.items() if name != "SmolLM2"}
    pictures = {extreme_region: have("clip + KL 1", "main"), frontier: have("erpd", *TITLES),
                weak_teachers: have("student", *TITLES), rounds: have("erpd rounds", *TITLES),
                which_wins: cells if set(cells) - set(TITLES) else {}}
    with matplotlib.rc_context(STYLE):
        for picture, stages in pictures.items():
            if stages:
                figure = Figure()
                figure.suptitle(picture(figure, stages))
                figure.savefig(HERE / f"{picture.__name__}.png")
