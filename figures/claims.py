"""The claims of Extreme Region Policy Distillation, measured and judged.

    python figures/claims.py                # runs what is missing, draws the figures, prints the verdicts
    python figures/claims.py --only         # draws and judges what is there
    python figures/claims.py --quick        # draws, and runs one seed at a tenth of the size in a scratch folder
    python figures/claims.py --model path/to/SmolLM2-135M-Instruct      # a language model's small frontier, too

Everything is measured on 256 held-out problems × 8 samples of the policy's own (4 or 2 on a direct method's way),
KL(π‖π_0) is exact, in nats a completion. Intervals are 95 %, Student's t over seeds; every seed has other problems,
samples and training. The statistics and thresholds below were fixed before the results were known, but for what
figures/README.md names. A statistic is met when its whole interval is on the right side of its threshold; a claim
holds when all its statistics are met, holds in part when some are, and does not hold when none is.

Stages: `main` (chains of 4 operands, where the base is right about a third of the time) and `rare` (8 operands, about
8 %), 64 problems × 16 completions with all methods; and cells of the map, 3 seeds with 128 held-out problems: 256 and
16 prompts, 2 operands, and problems with 3, with 2 and with at most 1 carry.

A *path* is what one setting of a method leads through: checkpoints, students by budget, interpolations by share. A
direct method is measured whenever its updates have doubled, until its accuracy has stopped rising: after 256 updates
or more (512 for cross-entropy; 2,048 at most) it is not above its last checkpoint's interval. A *level* is an
accuracy 1/3, 1/2, 2/3 or 5/6 of the way from the base's to 1. The KL of a method at a level is the least at which any
of its paths reaches it; between two points of a path, accuracy goes linearly with √KL, since KL is quadratic in the
distance from the base. *KL efficiency* is the KL of the limit (kl.least_kl, of pass rates with Jeffreys' prior) over
that. Two methods are compared at the levels that both reach, seed by seed, where that is so on at least 3 seeds. The
*ceiling*, the best accuracy on any path, is a statistic of its own, and a level that is not reached counts for
nothing else.

C1  Many off-policy steps on fixed data: fast rise, early plateau, entropy collapse, KL that keeps growing.
    The SAPO explorer (learning rate 3e-5), 256 updates at least, on `main`:
    (a) best accuracy of the first 64 updates, less the base's > 0.10      (b) best accuracy less the last > 0.05
    (c) KL at the last update over KL at the best > 2             (d) entropy at the last update over the base's < 0.5
C2  A tighter constraint lowers the ceiling without curing the degradation. `main`:
    (a) ceiling of SAPO less that of clipping with KL penalty 1.0 > 0      (b) the same for clipping alone > 0
    (c) KL efficiency of the last clipped checkpoint over the best on its way < 0.5
    (d) the same with KL penalty 0.2 < 0.5
C3  The student is as accurate for a fraction of the KL, and at equal KL at least as good as every direct method.
    On `main` and on `rare`, students of the contrast with SAPO's explorer after 256 updates, at a ladder of budgets:
    (a) KL at which they reach their explorer's best accuracy, over the explorer's KL there < 1/3
    (b) ceiling less that of each constrained direct method (clip, clip + KL; SAPO + KL was added after two seeds) > 0
    (c) KL efficiency at each level, reached on every seed, > 0.7; and at the best level > 0.85
    (d) efficiency less that of every opponent, at each level that both reach > 0 (the closest opponent is named)
    (e) ceiling less that of every opponent > 0 (the closest is named)
C4  A weak or degenerate teacher still makes a better student. `main` and `rare`, at the ladder's second budget:
    (a) student of the unlearned policy: accuracy less the base's > 0.10       (b) less its teacher's > 0
    (c), (d) the same for the contrast with the explorer after 256 updates
    (e) KL efficiency of the student less that of the control, Â in place of δ_t, 1/2 of the way > 0
C5  Several teachers beat one. `main` and `rare`, same budget: KL efficiency at the accuracy reached, sapo + mse +
    nll by contrast, less that of each of the three alone > 0
C6  Gains continue over rounds, also where on-policy GRPO has flattened. Both stages, 4 rounds with --kl-budget auto:
    (a) accuracy of round k + 1 less round k > 0, k = 1, 2, 3
    (b) accuracy after 4 rounds less GRPO's with twice as many rollouts > 0
    (c) the same less expert iteration's under the same budgets (cross-entropy on the right completions, 384 updates,
        weights moved back) > −0.01: not worse by a point
    (d) gain of one round of ERPD from GRPO's end > 0
C7  Stage 2 costs no generation: rollouts until 2/3 of the way, ERPD's over GRPO's < 1/2 (a GRPO that never gets there
    counts with all its rollouts). `main` and `rare`
C8  The token signal, not the trust region alone. `rare`: the student less the control, Â in place of δ_t, with the same
    updates and the ladder's third budget: (a) accuracy > 0.20       (b) KL efficiency at the accuracy reached > 0.3
"""

import argparse
import json
import math
import os
import random
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import fields, replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from figures import claims_figures, experiments  # noqa: E402
from figures.experiments import Stage, erpd  # noqa: E402
from figures.outcomes import LEVELS, Outcome, mean_interval, outcomes  # noqa: E402

RESULTS, SCRATCH = HERE / "results" / "claims.jsonl", Path("runs") / "claims"
VERDICTS = HERE / "results" / "verdicts.json"
EMBEDDED = str(HERE.parent / "tutorial" / "tiny_base")
LONG_BASE = str(HERE.parent / "tutorial" / "long_base")  # the same, taught to add eight numbers
CONSTRAINED = ("clip", "clip + KL 0.2", "clip + KL 1", "sapo + KL 0.2")
OPPONENTS = (*CONSTRAINED, "sapo", "ce", "mse", "nll", "grpo", "grpo 8×", "temperature", "weights: sapo",
             "weights: mse", "weights: nll", "logits: nll")


# --------------------------------------------------------------------------------------------------------- the verdicts

class Statistic(NamedTuple):
    claim: str
    what: str
    values: list[float]  # by seed; NaN where a seed has none
    above: bool  # which side of the threshold is asked for
    threshold: float
    every_seed: bool = True  # False: seeds without a value are left out

    def interval(self) -> tuple[float, float]:
        """(mean, half the width of its 95 % interval over seeds)."""
        return mean_interval(self.values)

    def met(self) -> bool:
        mean, half = self.interval()
        complete = not (self.every_seed and any(map(math.isnan, self.values)))
        return complete and (mean - half > self.threshold if self.above else mean + half < self.threshold)

    @property
    def seeds(self) -> int:
        return sum(not math.isnan(value) for value in self.values)


def peak(rows: list[dict]) -> dict:
    return max(rows, key=lambda row: row["accuracy"])


def statistics(by_stage: dict[str, list[Outcome]]) -> list[Statistic]:
    """Every statistic of the docstring, from the outcomes of all seeds of a stage."""
    found: list[Statistic] = []
    for stage in ("main", "rare"):
        found += of_stage(stage, [o for o in by_stage.get(stage, []) if o.of("erpd")])
    return sorted(found, key=lambda s: s.claim)


def of_stage(stage: str, outcomes: list[Outcome]) -> list[Statistic]:
    found: list[Statistic] = []

    def ask(claim: str, what: str, value: Callable[[Outcome], float], above: bool, threshold: float,
            needs: tuple[str, ...] = ()) -> None:
        """A statistic of the seeds that have the methods that it needs: a run that was stopped has not all of them."""
        some = [o for o in outcomes if all(o.of(method) for method in needs)]
        if some:
            found.append(Statistic(f"{claim}, {stage}", what, [value(o) for o in some], above, threshold))

    def closest(claim: str, what: str, value: Callable[[Outcome, str], float]) -> None:
        """The opponent over which the lead is smallest, of those that can be compared on enough seeds."""
        leads = {}
        for method in OPPONENTS:
            values = [value(o, method) for o in outcomes if o.of(method)]
            if sum(not math.isnan(v) for v in values) >= min(3, len(outcomes)) and values:
                leads[method] = values
        if leads:
            first = min(leads, key=lambda method: mean_interval(leads[method])[0])
            found.append(Statistic(f"{claim}, {stage}", f"{what} ({first})", leads[first], True, 0, every_seed=False))

    def kept(o: Outcome, rows: list[dict]) -> float:
        best = max(o.worth(row) for row in rows)
        return o.worth(rows[-1]) / best if best else math.nan  # none of them better than the base

    if stage == "main":
        ask("C1", "a  best accuracy of 64 updates less the base's",
            lambda o: peak([r for r in o.explorer() if r["at"] <= 64])["accuracy"] - o.base, True, 0.10)
        ask("C1", "b  best accuracy less the last",
            lambda o: peak(o.explorer())["accuracy"] - o.explorer()[-1]["accuracy"], True, 0.05)
        ask("C1", "c  KL at the last update over KL at the best",
            lambda o: o.explorer()[-1]["kl"] / peak(o.explorer())["kl"], True, 2)
        ask("C1", "d  entropy at the last update over the base's",
            lambda o: o.explorer()[-1]["entropy"] / o.entropy, False, 0.5)
        for letter, method in (("a", "clip + KL 1"), ("b", "clip")):
            ask("C2", f"{letter}  ceiling of sapo less that of {method}",
                lambda o, method=method: o.best("sapo") - o.best(method), True, 0, (method,))
        for letter, method in (("c", "clip"), ("d", "clip + KL 0.2")):
            ask("C2", f"{letter}  efficiency of {method}, last update over best",
                lambda o, method=method: kept(o, o.explorer(method)), False, 0.5, (method,))

    ask("C3", "a  student's KL over its explorer's, at the explorer's best",
        lambda o: o.kl_at("erpd", peak(o.explorer())["accuracy"]) / peak(o.explorer())["kl"], False, 1 / 3)
    for method in CONSTRAINED:
        ask("C3", f"b  ceiling less that of {method}",
            lambda o, method=method: o.best("erpd") - o.best(method), True, 0, (method,))
    for k, name in enumerate(LEVELS):
        ask("C3", f"c  KL efficiency {name} of the way", lambda o, k=k: o.efficiency("erpd", o.levels[k]), True, 0.7)
    ask("C3", "c  KL efficiency at the best level",
        lambda o: max((e for a in o.levels if math.isfinite(e := o.efficiency("erpd", a))), default=math.nan),
        True, 0.85)
    for k, name in enumerate(LEVELS):
        closest("C3", f"d  {name} of the way, less the closest",
                lambda o, method, k=k: o.efficiency("erpd", o.levels[k]) - o.efficiency(method, o.levels[k]))
    closest("C3", "e  ceiling less the closest's", lambda o, method: o.best("erpd") - o.best(method))

    def student(o: Outcome, path: str) -> dict:
        return max(o.of("student", path=path), key=lambda row: row["at"])

    needs = ("student", "unlearned")
    ask("C4", "a  student of the unlearned policy less the base",
        lambda o: student(o, "unlearned")["accuracy"] - o.base, True, 0.10, needs)
    ask("C4", "b  … less its teacher",
        lambda o: student(o, "unlearned")["accuracy"] - o.best("unlearned"), True, 0, needs)
    ask("C4", "c  student of the explorer after 256 updates less the base",
        lambda o: student(o, "sapo, contrast")["accuracy"] - o.base, True, 0.10, needs)
    ask("C4", "d  … less its teacher", lambda o: student(o, "sapo, contrast")["accuracy"]
        - o.one("sapo", lr=3e-5, at=student(o, "sapo, contrast")["at"])["accuracy"], True, 0, needs)
    ask("C4", "e  efficiency 1/2 of the way, less that of Â in place of δ_t",
        lambda o: o.efficiency("erpd", o.levels[1]) - o.efficiency("control", o.levels[1]), True, 0, ("control",))
    for loss in ("sapo", "mse", "nll"):
        ask("C5", f"efficiency of sapo + mse + nll less that of {loss} alone",
            lambda o, loss=loss: o.worth(student(o, "sapo + mse + nll, contrast"))
            - o.worth(student(o, f"{loss}, contrast")), True, 0, ("student",))

    def round_of(o: Outcome, k: int, method: str = "erpd rounds") -> float:
        return o.one(method, at=k)["accuracy"]

    for k in (1, 2, 3):
        ask("C6", f"a  round {k + 1} less round {k}",
            lambda o, k=k: round_of(o, k + 1) - round_of(o, k), True, 0, ("erpd rounds",))
    ask("C6", "b  after 4 rounds, less GRPO's with twice the rollouts",
        lambda o: round_of(o, 4) - long_grpo(o)[-1]["accuracy"], True, 0, ("erpd rounds", "grpo 8×"))
    ask("C6", "c  … less expert iteration's",
        lambda o: round_of(o, 4) - round_of(o, 4, "expert iteration"), True, -0.01, ("erpd rounds", "expert iteration"))
    ask("C6", "d  gain of a round after GRPO",
        lambda o: o.one("grpo, then erpd")["accuracy"] - long_grpo(o)[-1]["accuracy"], True, 0, ("grpo, then erpd",))

    def rollouts_until(o: Outcome, level: float) -> float:
        """Rollouts until GRPO reaches an accuracy, at its best learning rate; all of them where it does not."""
        needed = []
        for path in o.paths("grpo 8×"):
            known = [(0, o.base)] + [(row["rollouts"], row["accuracy"]) for row in path]
            needed.append(next((n0 + (level - a0) / (a1 - a0) * (n1 - n0)
                                for (n0, a0), (n1, a1) in zip(known, known[1:]) if a0 < level <= a1), known[-1][0]))
        return min(needed)

    ask("C7", "rollouts to 2/3 of the way, ERPD's over GRPO's",
        lambda o: (o.of("erpd")[0]["rollouts"] if o.best("erpd") >= o.levels[2] else math.inf)
        / rollouts_until(o, o.levels[2]), False, 0.5, ("grpo 8×",))
    if stage == "rare":
        third = sorted({row["budget"] for o in outcomes for row in o.of("erpd")})[2:3]
        for letter, what, of, more in (("a", "accuracy", lambda o, row: row["accuracy"], 0.2),
                                       ("b", "efficiency", lambda o, row: o.worth(row), 0.3)):
            ask("C8", f"{letter}  {what} at the third budget, less that of Â in place of δ_t",
                lambda o, of=of: of(o, o.one("erpd", at=third[0])) - of(o, o.one("control", at=third[0])), True, more,
                ("control",))
    return found


def long_grpo(o: Outcome) -> list[dict]:
    return max(o.paths("grpo 8×"), key=lambda path: path[-1]["accuracy"])


def percent(values: list[float]) -> str:
    mean, half = mean_interval(values)
    return f"{mean:6.1%}" + (f" ± {half:.1%}" if len(values) > 1 else "")


def report(by_stage: dict[str, list[Outcome]]) -> str:
    lines, found = [], statistics(by_stage)
    lines.append(f"{'claim':10} {'statistic':76} {'seeds':>5} {'mean':>7} {'95 % interval':>17} {'asked':>8}")
    for s in found:
        mean, half = s.interval()
        lines.append(f"{s.claim:10} {s.what:76} {s.seeds:5} {mean:7.3f} {mean - half:8.3f} –{mean + half:7.3f} "
                     f"{'>' if s.above else '<'} {s.threshold:<5.3g} {'met' if s.met() else 'missed'}")
    lines.append("")
    for claim in dict.fromkeys(s.claim for s in found):
        met = [s.met() for s in found if s.claim == claim]
        verdict = "holds" if all(met) else "holds in part" if any(met) else "does not hold"
        lines.append(f"{claim:10} {verdict:14} {sum(met)} of {len(met)} statistics")
    for name, seeds in by_stage.items():
        lines.append(f"\n{name}, seeds: {len(seeds)}. KL efficiency {', '.join(LEVELS)} of the way "
                     "(seeds that reach it), and the ceiling")
        lines.append(f"{'base':26} {'':84} {percent([o.base for o in seeds])}")
        for method in ("erpd", "erpd, unlearned", "control", *OPPONENTS):
            some = [o for o in seeds if o.of(method)]
            if some:
                levels = [[o.efficiency(method, o.levels[k]) for o in some] for k in range(len(LEVELS))]
                cells = [f"{mean_interval(v)[0]:6.2f} ± {mean_interval(v)[1]:.2f} ({sum(map(math.isfinite, v))})"
                         if any(map(math.isfinite, v)) else f"{'–':>17}" for v in levels]
                lines.append(f"{method:26} {'   '.join(cells):84} {percent([o.best(method) for o in some])}")
        for method in ("erpd rounds", "unlearned rounds", "expert iteration", "rounds, share 0.5", "rounds, share 0.9"):
            some = [o for o in seeds if o.of(method)]
            if some:
                each = [[o.one(method, at=k) for o in some] for k in range(1, 5)]
                lines.append(f"{method:26} " + "   ".join(
                    f"{percent([r['accuracy'] for r in rows])} at {mean_interval([r['kl'] for r in rows])[0]:.2f}"
                    for rows in each))
        rising = [f"{path} (seed {seed})" for seed, o in enumerate(seeds) for path in o.still_rising()]
        lines.append(f"direct methods still rising at their end: {'; '.join(rising) or 'none'}")
    return "\n".join(lines)


def write_verdicts(by_stage: dict[str, list[Outcome]], path: Path) -> None:
    """The verdicts for who reads them with a program: the tutorial does."""
    rows = []
    for s in statistics(by_stage):
        mean, half = s.interval()
        bounds = {name: round(x, 4) if math.isfinite(x) else None
                  for name, x in (("mean", mean), ("low", mean - half), ("high", mean + half))}
        rows.append({"claim": s.claim, "what": s.what, **bounds, "above": s.above, "threshold": round(s.threshold, 4),
                     "met": s.met(), "seeds": s.seeds})
    path.write_text("[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n")


# ---------------------------------------------------------------------------------------------------------- what is run

def stage(name: str, seed: int, **more) -> Stage:
    """64 problems × 16 completions, 16 updates a pass, unless said otherwise."""
    settings = {f.name: more.pop(f.name) for f in fields(erpd.Config) if f.name in more}
    defaults = {"model": EMBEDDED, "explore_updates": 256, "curve_samples": 4, "limit_samples": 64}
    config = erpd.Config(**defaults | settings, seed=seed)
    return Stage(name, config, **more)


def sums(folder: Path) -> tuple[str, str]:
    """Files of one-digit sums to train on (40 pairs of digits) and to test on (15 others), each pair in both orders.
    """
    pairs = [(a, b) for a in range(10) for b in range(a, 10)]
    random.Random(0).shuffle(pairs)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, some in ("train", pairs[:40]), ("test", pairs[40:]):
        both = [(a, b) for a, b in some] + [(b, a) for a, b in some if a != b]
        paths.append(folder / f"sums-{name}.jsonl")
        rows = [{"question": f"What is {a} + {b}?", "answer": str(a + b)} for a, b in both]
        paths[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(paths[0]), str(paths[1])


def language_model(model: str) -> list[Stage]:
    """The frontier, smaller, on a chat model with one-digit sums."""
    train, test = sums(SCRATCH)
    config = erpd.Config(
        model=model, data=train, test_data=test, template="{question} Reply with the number only.", problems=12,
        group=8, max_new_tokens=24, test_problems=27, test_samples=4, curve_samples=4, limit_samples=16,
        explore_lr=1e-5, explore_batch=16, explore_updates=16, unlearn_updates=6, distill_lr=2e-5, distill_batch=8,
        distill_updates=24, tokens_per_step=1100, sample_rows=256, precision="bf16")
    return [Stage("SmolLM2", replace(config, seed=seed, run=""), rates=(1e-5,), least=16, nll_least=16, most=64,
                  budgets=(), everything=False) for seed in range(2)]


RARE = {"model": LONG_BASE, "operands": 8, "max_new_tokens": 128, "curve_samples": 2, "budgets": (0.6, 1.2, 2.0, 2.6)}
CELLS = {"256 prompts": {"problems": 256}, "16 prompts": {"problems": 16}, "2 operands": {"operands": 2},
         "3 carries": {"carries": (3,)}, "2 carries": {"carries": (2,)}, "at most 1 carry": {"carries": (0, 1)}}


def stages() -> list[Stage]:
    """Both main stages by seed, then the cells of the map."""
    full = [s for seed in range(5) for s in (stage("main", seed, shares=(0.5, 0.9)), stage("rare", seed, **RARE))]
    few = {"everything": False, "rates": (1e-4, 3e-4), "budgets": (0.4, 1.0, 1.8), "test_problems": 128}
    return full + [stage(name, seed, **few, **more) for seed in range(3) for name, more in CELLS.items()]


def quick_stage() -> Stage:
    """All jobs of the main stage at a tenth of the size."""
    return stage("main", 0, problems=6, explore_batch=16, distill_batch=16, explore_updates=16, unlearn_updates=4,
                 distill_updates=16, test_problems=24, limit_samples=16, least=32, most=64, nll_least=32,
                 shares=(0.5,))


def work(stage: Stage, results: Path, folder: Path) -> str:
    """In a process of its own: one stage on one core, or on the GPU."""
    torch.set_num_threads(1)
    experiments.run_stage(stage, results, folder, told=lambda job: print(f"{stage.key}: {job}", file=sys.stderr))
    return stage.key


def run(wanted: list[Stage], results: Path, folder: Path, workers: int) -> None:
    """Run what is missing of the stages, `workers` side by side."""
    results.parent.mkdir(parents=True, exist_ok=True)
    os.environ |= {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}  # read by the processes that start here
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        futures = [pool.submit(work, stage, results, folder) for stage in wanted]
        with tqdm(as_completed(futures), total=len(futures), desc="stages", unit="stage") as bar:
            for future in bar:
                bar.set_postfix_str(f"{future.result()} is there")


# ----------------------------------------------------------------------------------------------------- the command line

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true",
                        help="draw, and run one seed at a tenth of the size in a scratch folder")
    parser.add_argument("--only", nargs="*", help="stages to run, by name; none at all: draw and judge what is there")
    parser.add_argument("--model", default="",
                        help="SmolLM2-135M-Instruct's folder or hub name, for its own small frontier")
    parser.add_argument("--workers", type=int, default=1 if torch.cuda.is_available() else os.cpu_count() or 1,
                        help="stages side by side")
    arguments = parser.parse_args()
    if arguments.quick:
        with TemporaryDirectory() as scratch:
            run([quick_stage()], Path(scratch) / "claims.jsonl", Path(scratch), 1)
            print(report(outcomes(Path(scratch) / "claims.jsonl")))
    else:
        every = stages() + (language_model(arguments.model) if arguments.model else [])
        if unknown := set(arguments.only or ()) - {s.name for s in every}:
            names = ", ".join(dict.fromkeys(s.name for s in every))
            parser.error(f"--only {unknown.pop()!r} is no stage: choose from {names}")
        wanted = [s for s in every if arguments.only is None or s.name in arguments.only]
        run(wanted, RESULTS, SCRATCH, arguments.workers)
        print(report(outcomes(RESULTS)))
        write_verdicts(outcomes(RESULTS), VERDICTS)
    claims_figures.draw(outcomes(RESULTS))
