"""The tables of figures/README.md, from the rows that figures/claims.py has measured."""

from collections.abc import Iterable, Sequence
from math import isnan

from figures.outcomes import LEVELS, Outcome, mean_interval

STUDENT = "**ERPD's student**"
NAMES = {"base": "base", "unlearned": "unlearned policy", "erpd": f"{STUDENT}, contrast",
         "erpd, twice the updates": "the same, contrast, twice the updates",
         "erpd, unlearned": f"{STUDENT}, unlearned policy alone", "control": "stage 2 with Â in place of δ_t",
         "clip": "clipped reuse", "clip + KL 0.2": "clipped reuse, KL penalty 0.2",
         "clip + KL 1": "clipped reuse, KL penalty 1", "sapo": "SAPO", "sapo + KL 0.2": "SAPO, KL penalty 0.2",
         "ce": "CE", "mse": "MSE", "nll": "imitation",
         "grpo": "on-policy GRPO, as many rollouts", "grpo 4×": "on-policy GRPO, 384 rollouts (4×)",
         "grpo 8×": "on-policy GRPO, 8,192 rollouts (8×)",
         "temperature": "the base, colder or hotter", "weights: sapo": "SAPO, weights moved back",
         "weights: mse": "MSE, weights moved back", "weights: nll": "imitation, weights moved back",
         "logits: nll": "imitation, logits moved back"}
ROUNDS = {"erpd rounds": "**ERPD**, contrast", "rounds, twice the updates": "the same, contrast, twice the updates",
          "unlearned rounds": "**ERPD**, unlearned policy alone",
          "expert iteration": "expert iteration (imitation in rounds), the same budgets",
          "rounds, share 0.5": "ERPD, budget for ½ of the gap", "rounds, share 0.9": "ERPD, budget for 0.9 of the gap"}


def shown(values: Sequence[float], digits: int = 2) -> str:
    """Mean and 95 % interval; in brackets the seeds that have a value, where not all do."""
    mean, half = mean_interval(values)
    known = sum(not isnan(value) for value in values)
    interval = f" ± {half:.{digits}f}" if known > 1 else ""
    return f"{mean:.{digits}f}{interval}" + f" ({known})" * (known < len(values)) if known else "–"


def percent(values: Sequence[float], digits: int = 1) -> str:
    """The same of shares, in per cent."""
    mean, *interval = shown([100 * value for value in values], digits).partition(" ± ")
    return f"{mean} %" + "".join(interval)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    print("\n| " + " | ".join(head) + " |", "|" + "---|" * len(head), sep="\n")
    for cells in rows:
        print("| " + " | ".join(cells) + " |")
    print()


def once_more(name: str, statistics: list) -> None:
    """Statistics on more seeds."""
    table((name, "asked", "all of them", ""), [(" ".join(s.what.split()), asked(s), *judged(s)) for s in statistics])


def asked(s) -> str:
    return f"{'>' if s.above else '<'} {s.threshold:.3g}"


def claim(number: str, statistics: dict[str, list[tuple]]) -> None:
    """The verdict on a claim, by stage, and the statistics behind it: (statistic, that of fresh seeds, that of all)."""
    verdicts, rows = [], []
    for stage, some in statistics.items():
        met, again, both = ([s.met() for s in column if s] for column in zip(*some))
        verdict = "holds" if all(met) else "holds in part" if any(met) else "does not hold"
        beside = f" (of {len(again)}: fresh seeds {sum(again)}, all {sum(both)})" if again else ""
        verdicts.append(f"`{stage}` {verdict}, {sum(met)} of {len(met)}{beside}")
        for s, *others in some:
            beside = [cell for other in others for cell in judged(other, s)]
            rows.append((stage, " ".join(s.what.split()), asked(s), *judged(s), *beside))
    print(number, f"{'; '.join(verdicts)}.", sep="\n")
    table(("stage", "statistic", "asked", "seeds 0 to 4", "", "fresh seeds, 5 to 9", "", "all", ""), rows)


def judged(s, beside=None) -> tuple[str, str]:
    """(mean and interval, whether it is met) of a statistic; with the opponent, where that is not the one `beside`."""
    if s is None:
        return "", ""
    mean, low, high = s.interval()
    opponent = s.what.partition("(")[2].rstrip(")") + ": " if beside and s.what != beside.what else ""
    seeds = f", {s.seeds} of {len(s.values)}" if s.seeds < len(s.values) else ""
    return f"{opponent}{mean:.3f} ({low:.3f} – {high:.3f}){seeds}", "met" if s.met() else "**missed**"


def methods(stage: str, seeds: list[Outcome]) -> None:
    """KL efficiency at the four levels and the ceiling, of every method on a stage; and what was stopped too early."""
    print(f"{stage}, base {percent([o.base for o in seeds])}:")
    rows = []
    for method, name in NAMES.items():
        have = [o for o in seeds if o.of(method)]
        if have and method not in ("base", "unlearned"):
            efficiency = [shown([o.efficiency(method, o.levels[k]) for o in have]) for k in range(len(LEVELS))]
            rows.append((name, f"{len(have)}", *efficiency, percent([o.best(method) for o in have])))
    if have := [o for o in seeds if o.alike]:
        most = [[o.least(o.levels[k]) / o.least(o.levels[k], o.alike) for o in have] for k in range(len(LEVELS))]
        share = [[o.efficiency("erpd", o.levels[k], o.alike) for o in have] for k in range(len(LEVELS))]
        rows += [("the most, if lost chains are mended, too", f"{len(have)}", *map(shown, most), ""),
                 ("ERPD's student, contrast, over that", f"{len(have)}", *map(shown, share), "")]
    table(("method", "seeds", *LEVELS, "ceiling"), rows)
    rising = [f"{path} (seed {o.rows[0]['seed']})" for o in seeds for path in o.still_rising()]
    print(f"Direct methods still rising at their end: {'; '.join(rising) or 'none'}.\n")


def rounds(stage: str, seeds: list[Outcome]) -> None:
    """Accuracy and mean KL to the first base, round by round."""
    print(f"{stage}: right (KL to the first base, nats a completion)")

    def cell(rows: Sequence[dict]) -> str:
        return f"{percent([row['accuracy'] for row in rows])} ({mean_interval([row['kl'] for row in rows])[0]:.2f})"

    rows = []
    for method, name in ROUNDS.items():
        if have := [o.of(method) for o in seeds if o.of(method)]:
            rows.append((name, f"{len(have)}", *map(cell, zip(*have))))
    if ends := [o.best_path("grpo 8×")[-1] for o in seeds if o.of("grpo 8×")]:
        rows.append(("on-policy GRPO, end of 8,192 rollouts", f"{len(ends)}", "", "", "", cell(ends)))
    table(("method", "seeds", "round 1", "2", "3", "4"), rows)
    print("KL efficiency of round 4:", shown([o.worth(row) for o in seeds for row in o.of("erpd rounds")[-1:]]))


def cells(found: dict[str, list[Outcome]]) -> None:
    """The map: KL efficiency half of the way, and the ceiling; of the student also over what mending alike allows."""
    compared = ("erpd", "erpd, unlearned", "weights: nll", "nll", "sapo")

    def both(method: str, seeds: list[Outcome]) -> str:
        efficiency = shown([o.efficiency(method, o.levels[1]) for o in seeds])
        return f"{efficiency}; {percent([o.best(method) for o in seeds], 0)}"

    def share(seeds: list[Outcome]) -> str:
        return shown([o.efficiency("erpd", o.levels[1], o.alike) for o in seeds]) if all(o.alike for o in seeds) else ""

    rows = [(name, f"{len(seeds)}", percent([o.base for o in seeds], 0), *(both(method, seeds) for method in compared),
             share(seeds)) for name, seeds in found.items()]
    table(("cell", "seeds", "base", *(NAMES[method] for method in compared), "contrast, over mending alike"), rows)


def policies(seeds: list[Outcome]) -> None:
    """Every policy of a stage with few of them: right, KL, KL efficiency; by update, share of the way, or round."""
    def cell(o: Outcome, method: str, at: float | None) -> str:
        for row in o.of(method, **({} if at is None else {"at": at})):
            worth = f", {o.worth(row):.2f}" if row["accuracy"] > o.base else ""
            return f"{row['accuracy']:.0%}, {row['kl']:.2f}".replace("%", " %") + worth
        return "–"

    names = NAMES | ROUNDS
    found = dict.fromkeys((row["method"], row["at"] if row["method"] in ROUNDS or "budget" not in row else None)
                          for o in seeds for row in o.rows)
    order = sorted(found, key=lambda key: (list(names).index(key[0]), key[1] or 0))
    rows = [(f"{names[method]}, {at:g}" if at else names[method], *(cell(o, method, at) for o in seeds))
            for method, at in order]
    table(("policy, at", *(f"seed {k}: right, KL, KL efficiency" for k in range(len(seeds)))), rows)
