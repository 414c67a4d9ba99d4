"""The claims of Extreme Region Policy Distillation, measured and judged.

    python figures/claims.py                  # runs what is missing, draws all, prints figures/README.md's tables
    python figures/claims.py --only           # draws and judges what is there
    python figures/claims.py --fresh          # runs both on five more seeds, where nothing was chosen; C8's on ten more
    python figures/claims.py --quick          # every job of one seed at a tenth of the size; keeps nothing
    python figures/claims.py --model FOLDER   # with SmolLM2-135M-Instruct's small frontier

What is asked of which stage, and what paths, levels and KL efficiency are, stands in figures/README.md; `asked` below
says the same of one seed, in code.
"""

import argparse
import json
import math
import os
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from figures import claims_figures, claims_tables  # noqa: E402
from figures.experiments import Stage, carries, drawn, erpd, run_stage  # noqa: E402
from figures.outcomes import LEVELS, Outcome, first_crossing, mean_interval, mending_alike, outcomes  # noqa: E402

RESULTS, FRESH, SCRATCH = *(HERE / "results" / f"{name}.jsonl" for name in ("claims", "fresh")), Path("runs") / "claims"
TINY_BASE, LONG_BASE = (str(HERE.parent / "tutorial" / name) for name in ("tiny_base", "long_base"))
CONSTRAINED = ("clip", "clip + KL 0.2", "clip + KL 1", "sapo + KL 0.2")
OPPONENTS = (*CONSTRAINED, "sapo", "ce", "mse", "nll", "grpo", "grpo 8×", "temperature", "weights: sapo",
             "weights: mse", "weights: nll", "logits: nll")


class Statistic(NamedTuple):
    claim: str
    what: str
    values: list[float]  # by seed; NaN where a seed has none
    above: bool  # which side of the threshold is asked for
    threshold: float
    every_seed: bool = True  # False: seeds without a value are left out

    def interval(self) -> tuple[float, float, float]:
        """(mean, low, high): the 95 % interval over seeds."""
        mean, half = mean_interval(self.values)
        return mean, mean - half, mean + half

    def met(self) -> bool:
        _, low, high = self.interval()
        complete = self.seeds == len(self.values) or not self.every_seed
        return complete and (low > self.threshold if self.above else high < self.threshold)

    @property
    def asks(self) -> str:
        """What it is, without the opponent's name."""
        return self.what.partition(" (")[0]

    @property
    def seeds(self) -> int:
        return sum(not math.isnan(value) for value in self.values)


def asked(o: Outcome, stage: str) -> Iterator[tuple]:
    """(claim, what, side, threshold, value) of a seed. Of what it has not run nothing is asked."""
    sapo = o.of("sapo", lr=3e-5)
    best, last = peak(sapo), sapo[-1]
    if stage == "main":
        early = peak([row for row in sapo if row["at"] <= 64])
        yield "C1", "a  best accuracy of 64 updates less the base's", ">", 0.10, early["accuracy"] - o.base
        yield "C1", "b  best accuracy less the last", ">", 0.05, best["accuracy"] - last["accuracy"]
        yield "C1", "c  KL at the last update over KL at the best", ">", 2, last["kl"] / best["kl"]
        yield "C1", "d  entropy at the last update over the base's", "<", 0.5, last["entropy"] / o.entropy
        for letter, method in ("a", "clip + KL 1"), ("b", "clip"):
            if o.of(method):
                lead = o.best("sapo") - o.best(method)
                yield "C2", f"{letter}  ceiling of sapo less that of {method}", ">", 0, lead
        for letter, method in ("c", "clip"), ("d", "clip + KL 0.2"):
            if way := o.of(method, lr=3e-5):
                most = max(o.worth(row) for row in way)  # 0 where none of them is better than the base
                kept = o.worth(way[-1]) / most if most else math.nan
                yield "C2", f"{letter}  efficiency of {method}, last update over best", "<", 0.5, kept

    share = o.kl_at("erpd", best["accuracy"]) / best["kl"]
    yield "C3", "a  student's KL over its explorer's, at the explorer's best", "<", 1 / 3, share
    for method in filter(o.of, CONSTRAINED):
        yield "C3", f"b  ceiling less that of {method}", ">", 0, o.best("erpd") - o.best(method)
    efficiency = [o.efficiency("erpd", level) for level in o.levels]
    for name, value in zip(LEVELS, efficiency):
        yield "C3", f"c  KL efficiency {name} of the way", ">", 0.7, value
    reached = [value for value in efficiency if not math.isnan(value)]
    yield "C3", "c  KL efficiency at the best level", ">", 0.85, max(reached, default=math.nan)

    if o.of("student"):
        def student(path: str) -> dict:
            return peak(o.of("student", path=path), "at")

        unlearned, contrast = student("unlearned")["accuracy"], student("sapo, contrast")
        after_256, teacher = contrast["accuracy"], o.one("sapo", lr=3e-5, at=contrast["at"])["accuracy"]
        yield "C4", "a  student of the unlearned policy less the base", ">", 0.10, unlearned - o.base
        yield "C4", "b  … less its teacher", ">", 0, unlearned - o.best("unlearned")
        yield "C4", "c  student of the explorer after 256 updates less the base", ">", 0.10, after_256 - o.base
        yield "C4", "d  … less its teacher", ">", 0, after_256 - teacher
        several = o.worth(student("sapo + mse + nll, contrast"))
        for loss in ("sapo", "mse", "nll"):
            lead = several - o.worth(student(f"{loss}, contrast"))
            yield "C5", f"efficiency of sapo + mse + nll less that of {loss} alone", ">", 0, lead
    theirs = o.efficiency("control", o.levels[1])
    if not math.isnan(theirs):  # where right completions are rare the control seldom gets there
        yield "C4", "e  efficiency 1/2 of the way, less that of Â in place of δ_t", ">", 0, efficiency[1] - theirs

    rounds, imitated = ([row["accuracy"] for row in o.of(method)] for method in ("erpd rounds", "expert iteration"))
    grpo = o.paths("grpo 8×")
    end = max((path[-1]["accuracy"] for path in grpo), default=math.nan)
    for k in range(1, len(rounds)):
        yield "C6", f"a  round {k + 1} less round {k}", ">", 0, rounds[k] - rounds[k - 1]
    if rounds and grpo:
        yield "C6", "b  after 4 rounds, less GRPO's with twice the rollouts", ">", 0, rounds[-1] - end
    if rounds and imitated:
        yield "C6", "c  … less expert iteration's", ">", -0.01, rounds[-1] - imitated[-1]
    for row in o.of("grpo, then erpd"):
        yield "C6", "d  gain of a round after GRPO", ">", 0, row["accuracy"] - end

    if grpo:
        ways = [[(o.base, 0)] + [(row["accuracy"], row["rollouts"]) for row in path] for path in grpo]
        theirs = min(min(first_crossing(way, o.levels[2]), way[-1][1]) for way in ways)  # at most all of them
        ours = o.of("erpd")[0]["rollouts"] if o.best("erpd") >= o.levels[2] else math.inf
        yield "C7", "rollouts to 2/3 of the way, ERPD's over GRPO's", "<", 0.5, ours / theirs
    if stage == "rare" and o.of("control"):
        control = o.of("control")[-1]  # at the ladder's third budget
        ours = o.one("erpd", at=control["at"])
        lead = ours["accuracy"] - control["accuracy"]
        yield "C8", "a  accuracy at the third budget, less that of Â in place of δ_t", ">", 0.2, lead
        lead = o.worth(ours) - o.worth(control)
        yield "C8", "b  efficiency at the third budget, less that of Â in place of δ_t", ">", 0.3, lead


def peak(rows: list[dict], by: str = "accuracy") -> dict:
    return max(rows, key=lambda row: row[by])


def leads(o: Outcome) -> Iterator[tuple]:
    """C3, d and e: (what, opponent, lead over it); all must be above 0."""
    opponents = list(filter(o.of, OPPONENTS))
    for name, level in zip(LEVELS, o.levels):
        ours = o.efficiency("erpd", level)
        for method in opponents:
            yield f"d  {name} of the way, less every opponent's", method, ours - o.efficiency(method, level)
    for method in opponents:
        yield "e  ceiling less every opponent's", method, o.best("erpd") - o.best(method)


def by_seed(seeds: Iterable[Iterable[tuple]]) -> dict[tuple, list[float]]:
    """The last of every tuple, by what stands before it."""
    values: dict[tuple, list[float]] = {}
    for found in seeds:
        for *what, value in found:
            values.setdefault(tuple(what), []).append(value)
    return values


def statistics(by_stage: dict[str, list[Outcome]]) -> list[Statistic]:
    """Every statistic that 3 seeds have. Of the leads over every opponent the least, of those that miss if any does."""
    found = []
    for stage in ("main", "rare"):
        seeds = by_stage.get(stage, [])
        enough = min(3, len(seeds))
        for (claim, what, side, threshold), values in by_seed(asked(o, stage) for o in seeds).items():
            if len(values) >= enough:
                found.append(Statistic(f"{claim}, {stage}", what, values, side == ">", threshold))
        least: dict[str, Statistic] = {}
        for (what, method), values in by_seed(map(leads, seeds)).items():
            lead = Statistic(f"C3, {stage}", f"{what} ({method})", values, True, 0, every_seed=False)
            if lead.seeds >= enough:
                least[what] = min(least.get(what, lead), lead, key=lambda s: (s.met(), s.interval()[0]))
        found += least.values()
    return sorted(found, key=lambda s: s.claim)


def report(by_stage: dict[str, list[Outcome]], fresh: dict[str, list[Outcome]], more: Sequence[Outcome] = ()) -> None:
    """Print the tables of figures/README.md; beside each statistic stands that of fresh seeds, and of all. `more`: all
    seeds of `rare` that have the student and its control."""
    found = statistics(by_stage)
    again, both = ({(s.claim, s.asks): s for s in statistics(some)} for some in (fresh, together(by_stage, fresh)))
    for number in dict.fromkeys(s.claim[:2] for s in found):
        mine = {stage: [(s, *(others.get((s.claim, s.asks)) if (s.claim, s.asks) in again else None
                              for others in (again, both))) for s in found if s.claim == f"{number}, {stage}"]
                for stage in ("main", "rare")}
        claims_tables.claim(number, {stage: some for stage, some in mine.items() if some})
    if more:
        some = [Statistic(claim, f"{claim} {what}", values, side == ">", threshold) for (claim, what, side, threshold),
                values in by_seed(asked(o, "rare") for o in more).items() if len(values) == len(more)]
        claims_tables.once_more(f"`rare` on {len(more)} seeds", some)
    for seeds, name in (by_stage, ""), (fresh, ", fresh seeds"):
        for part in claims_tables.methods, claims_tables.rounds:
            for stage in filter(seeds.get, ("main", "rare")):
                part(f"`{stage}`{name}", seeds[stage])
    if cells := {name: by_stage[name] for name in CELLS if name in by_stage}:
        claims_tables.cells(cells)
    if "SmolLM2" in by_stage:
        claims_tables.policies(by_stage["SmolLM2"])


def known(results: Path, fresh: bool = False) -> dict[str, list[Outcome]]:
    """The outcomes by stage; those of chains with what it costs to mend the lost ones, too."""
    found = outcomes(results)
    for stage in stages(fresh):
        for o in found.get(stage.name, ()):
            if o.rows[0]["seed"] == stage.config.seed:
                o.alike = mending_alike(o.rates, torch.tensor([carries(p.question) for p in drawn(stage)[1]]))
    return found


def with_control() -> list[Outcome]:
    """Every seed of `rare` that has the control."""
    return [o for results in (RESULTS, FRESH) for o in outcomes(results, needed=("erpd", "control")).get("rare", ())]


def together(by_stage: dict[str, list[Outcome]], fresh: dict[str, list[Outcome]]) -> dict[str, list[Outcome]]:
    return by_stage | {stage: by_stage.get(stage, []) + seeds for stage, seeds in fresh.items()}


def write_verdicts(by_stage: dict[str, list[Outcome]], path: Path) -> None:
    """The verdicts for who reads them with a program: the tutorial does."""
    rows = []
    for s in statistics(by_stage):
        bounds = {name: round(x, 4) if math.isfinite(x) else None
                  for name, x in zip(("mean", "low", "high"), s.interval())}
        rows.append({"claim": s.claim, "what": s.what, **bounds, "above": s.above, "threshold": round(s.threshold, 4),
                     "met": s.met(), "seeds": s.seeds})
    path.write_text("[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n")


# 64 problems × 16 completions, 16 updates a pass, of the embedded policy, unless said otherwise.
config = partial(erpd.Config, model=TINY_BASE, explore_lr=3e-5, explore_updates=256, unlearn_updates=64,
                 distill_updates=256, test_problems=256, test_samples=8, curve_samples=4, limit_samples=64)
RARE = {"model": LONG_BASE, "operands": 8, "max_new_tokens": 128, "curve_samples": 2}
STEPS = (0.25, 0.4, 0.5, 0.6, 0.75, 0.8, 0.9, 1.0)
# name: (settings, which carries, seeds, further budgets)
CELLS = {"256 prompts": ({"problems": 256}, (), 3, (2.6,)), "16 prompts": ({"problems": 16}, (), 8, ()),
         "2 operands": ({"operands": 2}, (), 3, ()), "3 carries": ({}, (3,), 8, (2.6, 3.4)),
         "2 carries": ({}, (2,), 3, (2.6,)), "at most 1 carry": ({}, (0, 1), 3, ())}


def stages(fresh: bool = False) -> list[Stage]:
    """Both main stages by seed, then the cells of the map; or both main stages on fresh seeds."""
    def rare(seed: int, further: tuple[float, ...] = (3.0, 3.4), only: tuple[str, ...] = ()) -> Stage:
        return Stage("rare", config(seed=seed, **RARE), budgets=(0.6, 1.2, 2.0, 2.3, 2.6), further=further, steps=STEPS,
                     only=only)

    found = []
    for seed in range(5, 10) if fresh else range(5):
        found += [Stage("main", config(seed=seed), shares=(0.5, 0.9), budgets=(0.25, 0.5, 0.9, 1.1, 1.4), steps=STEPS),
                  rare(seed)]
    if fresh:  # the last ten for the student and its control alone, which ten seeds had left undecided
        return found + [rare(seed, (), ("base", "sapo 3e-05", "erpd", "control")) for seed in range(30, 40)]
    few = {"batches": 1, "rates": (1e-4, 3e-4), "budgets": (0.15, 0.4, 1.0, 1.8), "only": frontier(1e-4, 3e-4)}
    return found + [Stage(name, config(seed=seed, test_problems=128, **settings), carries, further=further, **few)
                    for seed in range(8) for name, (settings, carries, seeds, further) in CELLS.items() if seed < seeds]


def frontier(*rates: float) -> tuple[str, ...]:
    """The jobs that a small frontier needs."""
    return ("base", *(f"{loss} {lr:g}" for loss in ("sapo", "nll") for lr in rates), "unlearned policy", "erpd",
            "erpd, unlearned", "weights: nll", "weights: sapo")


def quick_stage() -> Stage:
    """All jobs of the main stage at a tenth of the size."""
    settings = config(seed=0, problems=6, explore_batch=16, distill_batch=16, explore_updates=16, unlearn_updates=4,
                      distill_updates=16, test_problems=24, limit_samples=16)
    return Stage("main", settings, least=32, most=64, nll_least=32, shares=(0.5,))


def sums(folder: Path) -> dict[str, str]:
    """Files of one-digit sums: 40 pairs of digits to train on, 15 to test on, in both orders."""
    pairs = [(a, b) for a in range(10) for b in range(a, 10)]
    random.Random(0).shuffle(pairs)
    folder.mkdir(parents=True, exist_ok=True)
    files = {"data": str(folder / "sums-train.jsonl"), "test_data": str(folder / "sums-test.jsonl")}
    for file, some in zip(files.values(), (pairs[:40], pairs[40:])):
        both = some + [(b, a) for a, b in some if a != b]
        rows = [json.dumps({"question": f"What is {a} + {b}?", "answer": str(a + b)}) for a, b in both]
        Path(file).write_text("\n".join(rows) + "\n")
    return files


def language_model(model: str) -> list[Stage]:
    """The frontier, smaller, and rounds, on a chat model with one-digit sums."""
    settings = {
        "template": "{question} Reply with the number only.", "problems": 12, "group": 8, "max_new_tokens": 24,
        "test_problems": 27, "test_samples": 4, "limit_samples": 16, "explore_lr": 1e-5, "explore_batch": 16,
        "explore_updates": 16, "unlearn_updates": 6, "distill_lr": 1e-5, "distill_batch": 16, "distill_updates": 24,
        "tokens_per_step": 1100, "sample_rows": 256, "precision": "fp32"}
    only = *frontier(1e-5), "control", "grpo 4× 1e-05", "rounds", "expert iteration"
    return [Stage("SmolLM2", config(seed=seed, model=model, **sums(SCRATCH), **settings), rates=(1e-5,), least=16,
                  nll_least=16, most=64, budgets=(), batches=6, grpo=(4,), only=only) for seed in range(4)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed at a tenth of the size; keeps nothing")
    parser.add_argument("--fresh", action="store_true", help="main and rare on seeds 5 to 9, for results/fresh.jsonl")
    parser.add_argument("--only", nargs="*", choices=["main", "rare", *CELLS, "SmolLM2"], metavar="stage",
                        help="stages to run, by name; none at all: draw and judge what is there")
    parser.add_argument("--model", default="",
                        help="SmolLM2-135M-Instruct's folder or hub name, for its own small frontier")
    parser.add_argument("--workers", type=int, default=1 if torch.cuda.is_available() else os.cpu_count() or 1,
                        help="stages side by side, each on one core, or on the GPU")
    arguments = parser.parse_args()
    if arguments.quick:
        with TemporaryDirectory() as scratch:
            results = Path(scratch) / "claims.jsonl"
            run_stage(quick_stage(), results, Path(scratch))
            report(outcomes(results), {})
        return
    every = stages(arguments.fresh) + (language_model(arguments.model) if arguments.model else [])
    wanted = [stage for stage in every if arguments.only is None or stage.name in arguments.only]
    os.environ |= {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}  # read by the processes that start here
    with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        list(pool.map(partial(run_stage, results=FRESH if arguments.fresh else RESULTS, folder=SCRATCH), wanted))
    found, fresh = known(RESULTS), known(FRESH, fresh=True)
    report(found, fresh, with_control())
    write_verdicts(found, HERE / "results" / "verdicts.json")
    claims_figures.draw(together(found, fresh))


if __name__ == "__main__":
    main()
