"""The claims of Extreme Region Policy Distillation, measured and judged.

    python figures/claims.py                # runs what is missing, draws the figures, prints the verdicts
    python figures/claims.py --only         # draws and judges what is there
    # draws, and runs one seed at a tenth of the size in a scratch folder: 3 minutes
    python figures/claims.py --quick      
    python figures/claims.py --model path/to/SmolLM2-135M-Instruct      # the small frontier of a language model, too

Everything is measured on 256 held-out problems × 8 samples of the policy's own (4 on an explorer's way), KL(π‖π_0) is exact,
in nats a completion. Intervals are 95 %, Student's t over seeds; every seed has other problems, samples and training. The
statistics and thresholds below were fixed before the results were known, but for two that say so; all of it was measured again,
by the same ones, when updates began to hold whole groups. A statistic is met when its whole interval is on
the right side of its threshold; a claim holds when all its statistics are met, holds in part when some are, and does not
hold when none is.

Stages: `64 prompts` (64 problems × 16 completions, all methods, 5 seeds), `256 prompts` (the default run's settings, with SAPO
and cross-entropy beside it, 3 seeds), and cells of the map, 2 seeds with 128 held-out problems: 16 prompts; problems with 3,
with 2 and with at most 1 carry, where the base is right about 5, 15 and 60 % of the time; chains of 2 and of 8 operands.

A *path* is what one setting of a method leads through: checkpoints by epoch, students by budget, interpolations by share.
A *level* is an accuracy 1/3, 1/2 or 2/3 of the way from the base's to 1. The KL of a method at a level is the least at which
any of its paths reaches it; between two points of a path, accuracy goes linearly with √KL, since KL is quadratic in the
distance from the base. *KL efficiency* is the KL of the limit (kl.least_kl) over that; 0 where no path gets there.

C1  Many off-policy steps on fixed data: fast rise, early plateau, entropy collapse, KL that keeps growing.
    The default SAPO explorer (learning rate 3e-5), 16 epochs, at 64 prompts:
    (a) best accuracy of epochs 1–4, less the base's > 0.10      (b) best accuracy less the last > 0.05
    (c) KL at the last epoch over KL at the best > 2             (d) entropy at the last epoch over the base's < 0.5
C2  A tighter constraint lowers the ceiling without curing the degradation. 64 prompts:
    (a) best accuracy of SAPO, all rates, less that of clipping with KL penalty 1.0 > 0
    (b) the same for clipping alone > 0
    (c) KL efficiency of the last checkpoint of 16 clipped epochs over the best on its way < 0.5
    (d) the same with the KL penalty 0.2, 8 epochs < 0.5
C3  The student is as accurate for a fraction of the KL, and at equal KL at least as good as every direct method.
    At 64 and at 256 prompts:
    (a) KL at which ERPD's ladder reaches its own explorer's best accuracy, over the explorer's KL there < 1/3; at 64 prompts
        for a faster explorer (learning rate 1e-4) and its students, too
    (b) the ceiling: best accuracy of the ladder less the best of each constrained direct method (clip, clip + KL) > 0
    (c) KL efficiency at each level ≥ 0.7, and 0.85 at the best level
    (d) efficiency less that of every opponent, at each level > 0 (the closest opponent is named)
    (e) the same for `weights: erpd`, the student of the last budget with its weights moved back towards the base as the
        opponents' are; added after two seeds
C4  A weak or degenerate teacher still makes a better student. 64 prompts, budget 0.5:
    (a) student of the unlearned policy: accuracy less the base's > 0.10       (b) less its teacher's > 0
    (c), (d) the same for the contrast with the explorer after its last epoch
    (e) KL efficiency of the default student less that of the control, Â in place of δ_t, at the middle level > 0
C5  Several teachers beat one. 64 prompts, budget 0.5: KL efficiency at the accuracy reached, sapo + mse + nll by contrast,
    less that of each of the three alone > 0
C6  Gains continue over rounds, also where on-policy GRPO has flattened. 64 prompts:
    (a) accuracy of round 2 less round 1 > 0     (b) round 3 less round 2 > 0
    (c) gain of one ERPD round from the end of GRPO with 8× the rollouts, less GRPO's gain over its last half > 0
    `C6, small` is the same with budgets of 0.5 a round and 0.25 after GRPO instead of the default 1, added after two seeds had
    shown that a second round with the default's budget spends it on noise.
C7  Stage 2 costs no generation. 64 prompts: rollouts until the upper level is reached, ERPD's over GRPO's < 1/2 (a
    GRPO that never gets there counts with all its rollouts)
"""

import argparse
import json
import math
import os
import random
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
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
from figures.outcomes import Outcome, mean_interval, outcomes  # noqa: E402

RESULTS, SCRATCH = HERE / "results" / "claims.jsonl", Path("runs") / "claims"
EMBEDDED = str(HERE.parent / "tutorial" / "tiny_base")
LONG_BASE = str(HERE.parent / "tutorial" / "long_base")  # the same, taught to add eight numbers
CONSTRAINED = ("clip", "clip + KL 0.05", "clip + KL 0.2", "clip + KL 1")
OPPONENTS = (*CONSTRAINED, "sapo", "ce", "mse", "nll", "grpo", "grpo 8×", "temperature",
             *(f"{kind}: {loss}" for kind in ("weights", "logits") for loss in ("sapo", "mse", "nll")))


# --------------------------------------------------------------------------------------------------------- the verdicts

class Statistic(NamedTuple):
    claim: str
    what: str
    values: list[float]  # by seed
    above: bool  # which side of the threshold is asked for
    threshold: float

    def interval(self) -> tuple[float, float]:
        """(mean, half the width of its 95 % interval over seeds)."""
        return mean_interval(self.values)

    def met(self) -> bool:
        mean, half = self.interval()
        return mean - half > self.threshold if self.above else mean + half < self.threshold


def statistics(by_stage: dict[str, list[Outcome]]) -> list[Statistic]:
    """Every statistic of the docstring, from the outcomes of all seeds of a stage."""
    found: list[Statistic] = []
    few, many = by_stage.get("64 prompts", []), by_stage.get("256 prompts", [])

    def ask(claim: str, what: str, value: Callable[[Outcome], float], above: bool, threshold: float, of=None) -> None:
        if of or few:
            found.append(Statistic(claim, what, [value(outcome) for outcome in of or few], above, threshold))

    def peak(rows: list[dict]) -> dict:
        return max(rows, key=lambda row: row["accuracy"])

    ask("C1", "a  best accuracy of epochs 1–4 less the base's",
        lambda o: peak([r for r in o.explorer() if r["at"] <= 4])["accuracy"] - o.base, True, 0.10)
    ask("C1", "b  best accuracy less the last",
        lambda o: peak(o.explorer())["accuracy"] - o.explorer()[-1]["accuracy"], True, 0.05)
    ask("C1", "c  KL at the last epoch over KL at the best", lambda o: o.explorer()[-1]["kl"] / peak(o.explorer())["kl"], True, 2)
    ask("C1", "d  entropy at the last epoch over the base's", lambda o: o.explorer()[-1]["entropy"] / o.entropy, False, 0.5)

    ask("C2", "a  best of SAPO less best of clip + KL 1", lambda o: o.best("sapo") - o.best("clip + KL 1"), True, 0)
    ask("C2", "b  best of SAPO less best of clip", lambda o: o.best("sapo") - o.best("clip"), True, 0)

    def kept(o: Outcome, rows: list[dict]) -> float:
        best = max(o.worth(row) for row in rows)
        return o.worth(rows[-1]) / best if best else math.nan  # none of them better than the base

    ask("C2", "c  efficiency of clip, last epoch over best", lambda o: kept(o, o.explorer("clip")), False, 0.5)
    ask("C2", "d  efficiency of clip + KL 0.2, last epoch over best",
        lambda o: kept(o, o.explorer("clip + KL 0.2")), False, 0.5)

    for size, outcomes in (("64", few), ("256", many)):
        claim = f"C3, {size} prompts"
        if not outcomes:
            continue
        for method, lr in [("erpd", 3e-5)] + [("erpd, faster explorer", 1e-4)] * (size == "64"):
            ask(claim, f"a  student's KL over its explorer's (lr {lr:g}), at the explorer's best",
                lambda o, method=method, lr=lr: o.kl_at(method, peak(o.explorer(lr=lr))["accuracy"])
                / peak(o.explorer(lr=lr))["kl"], False, 1 / 3, outcomes)
        for method in CONSTRAINED:
            if outcomes[0].of(method):
                ask(claim, f"b  ceiling: best student less best of {method}",
                    lambda o, method=method: o.best("erpd") - o.best(method), True, 0, outcomes)
        for k, name in enumerate(("1/3", "1/2", "2/3")):
            ask(claim, f"c  KL efficiency {name} of the way",
                lambda o, k=k: o.efficiency("erpd", o.levels[k]), True, 0.7, outcomes)
        ask(claim, "c  KL efficiency at the best level",
            lambda o: max(o.efficiency("erpd", a) for a in o.levels), True, 0.85, outcomes)
        for way in ("erpd", "weights: erpd"):
            for k, name in enumerate(("1/3", "1/2", "2/3") if all(o.of(way) for o in outcomes) else ()):
                leads = {method: [o.efficiency(way, o.levels[k]) - o.efficiency(method, o.levels[k]) for o in outcomes]
                         for method in OPPONENTS if outcomes[0].of(method)}
                closest = min(leads, key=lambda method: mean_interval(leads[method])[0])
                what = f"{'de'[way != 'erpd']}  {name} of the way, {way} less the closest opponent ({closest})"
                found.append(Statistic(claim, what, leads[closest], True, 0))

    def student(o: Outcome, path: str, **more) -> dict:
        return o.one("student", path=path, **more)

    last = max((row["at"] for o in few for row in o.explorer()), default=16)
    ask("C4", "a  student of the unlearned policy less the base",
        lambda o: student(o, "unlearned")["accuracy"] - o.base, True, 0.10)
    ask("C4", "b  … less its teacher",
        lambda o: student(o, "unlearned")["accuracy"] - max(o.of("unlearned"), key=lambda r: r["at"])["accuracy"], True, 0)
    ask("C4", "c  student of the explorer after its last epoch less the base",
        lambda o: student(o, "sapo, contrast", at=last)["accuracy"] - o.base, True, 0.10)
    ask("C4", "d  … less its teacher",
        lambda o: student(o, "sapo, contrast", at=last)["accuracy"] - o.explorer()[-1]["accuracy"], True, 0)
    ask("C4", "e  efficiency at 1/2, less that of Â in place of δ_t",
        lambda o: o.efficiency("erpd", o.levels[1]) - o.efficiency("control", o.levels[1]), True, 0)

    for loss in ("sapo", "mse", "nll"):
        ask("C5", f"efficiency of sapo + mse + nll less that of {loss} alone",
            lambda o, loss=loss: o.worth(student(o, "sapo + mse + nll, contrast"))
            - o.worth(max(o.of("student", path=f"{loss}, contrast"), key=lambda r: r["at"])), True, 0)

    def rounds(o: Outcome, method: str = "erpd rounds") -> list[float]:
        return [row["accuracy"] for row in sorted(o.of(method), key=lambda r: r["at"])]

    def long_grpo(o: Outcome) -> list[dict]:
        return max(o.paths("grpo 8×"), key=lambda path: path[-1]["accuracy"])

    for claim, way, after in (("C6", "erpd rounds", "grpo, then erpd"),
                              ("C6, small", "erpd small rounds", "grpo, then a little erpd")):
        if not all(o.of(after) for o in few):
            continue
        for k, letter in ((1, "a"), (2, "b")):
            ask(claim, f"{letter}  round {k + 1} less round {k}",
                lambda o, k=k, way=way: rounds(o, way)[k] - rounds(o, way)[k - 1], True, 0)

        def gain(o: Outcome, after: str = after) -> float:
            half, end = (row["accuracy"] for row in long_grpo(o)[-2:])
            return (o.one(after)["accuracy"] - end) - (end - half)

        ask(claim, "c  gain of ERPD after GRPO less GRPO's over its last half", gain, True, 0)

    def rollouts_until(o: Outcome, level: float) -> float:
        """Rollouts until GRPO reaches an accuracy, at its best learning rate; all of them where it does not."""
        needed = []
        for path in o.paths("grpo 8×"):
            known = [(0, o.base)] + [(row["rollouts"], row["accuracy"]) for row in path]
            needed.append(next((n0 + (level - a0) / (a1 - a0) * (n1 - n0) for (n0, a0), (n1, a1) in zip(known, known[1:])
                                if a0 < level <= a1), known[-1][0]))
        return min(needed)

    ask("C7", "rollouts to 2/3 of the way, ERPD's over GRPO's",
        lambda o: (o.one("erpd", at=0.1)["rollouts"] if o.best("erpd") >= o.levels[2] else math.inf)
        / rollouts_until(o, o.levels[2]), False, 0.5)
    return found


def percent(values: list[float]) -> str:
    mean, half = mean_interval(values)
    return f"{mean:6.1%}" + (f" ± {half:.1%}" if len(values) > 1 else "")


def report(by_stage: dict[str, list[Outcome]]) -> str:
    lines, found = [], statistics(by_stage)
    lines.append(f"{'claim':16} {'statistic':76} {'mean':>7} {'95 % interval':>17} {'asked':>8}")
    for s in found:
        mean, half = s.interval()
        lines.append(f"{s.claim:16} {s.what:76} {mean:7.3f} {mean - half:8.3f} –{mean + half:7.3f} "
                     f"{'>' if s.above else '<'} {s.threshold:<5.3g} {'met' if s.met() else 'missed'}")
    lines.append("")
    for claim in dict.fromkeys(s.claim for s in found):
        met = [s.met() for s in found if s.claim == claim]
        verdict = "holds" if all(met) else "holds in part" if any(met) else "does not hold"
        seeds = len(next(s for s in found if s.claim == claim).values)
        lines.append(f"{claim:16} {verdict:14} {sum(met)} of {len(met)} statistics, {seeds} seeds")
    for name, outcomes in by_stage.items():
        lines.append(f"\n{name}, seeds: {len(outcomes)}. KL efficiency 1/3, 1/2 and 2/3 of the way, and the best accuracy on it")
        lines.append(f"{'base':22} {'':46} {percent([o.base for o in outcomes])}")
        for method in ("erpd", "weights: erpd", "erpd, faster explorer", "control", *OPPONENTS):
            if all(o.of(method) for o in outcomes):
                levels = (mean_interval([o.efficiency(method, o.levels[k]) for o in outcomes]) for k in range(3))
                lines.append(f"{method:22} {'  '.join('{:6.2f} ± {:.2f}'.format(*level) for level in levels)}   "
                             f"{percent([o.best(method) for o in outcomes])}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------- what is run

def stage(name: str, prompts: int, seed: int, **more) -> Stage:
    """Sixteen updates an epoch at every size; the distiller takes more passes where they are short."""
    settings = {key: more.pop(key) for key in ("operands", "model", "max_new_tokens", "test_problems") if key in more}
    config = erpd.Config(**{"model": EMBEDDED} | settings, problems=prompts, seed=seed, explore_batch=prompts,
                         distill_batch=min(64, prompts), distill_epochs=4 if prompts > 64 else 8)
    return Stage(name, config, nll_epochs=4 if prompts > 64 else 8, **more)


def scaled(factor: float) -> tuple[float, ...]:
    """ERPD's budgets in a cell of the map, where the limit lies further out, or nearer, than in the main stage."""
    return tuple(factor * budget for budget in (0.25, 0.6, 1.3))


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
        model=model, data=train, test_data=test, template="{question} Reply with the number only.", problems=12, group=8,
        max_new_tokens=24, test_problems=27, test_samples=4, curve_samples=4, limit_samples=16, explore_lr=1e-5,
        explore_batch=16, unlearn_epochs=1, distill_lr=2e-5, distill_batch=8, distill_epochs=1, tokens_per_step=1100,
        sample_rows=256, precision="bf16")
    return [Stage("SmolLM2", replace(config, seed=seed, run=""), rates=(1e-5,), epochs=2, nll_epochs=2, everything=False,
                  losses=("sapo", "nll"), budgets=(1.0, 3.0)) for seed in range(2)]


def stages() -> list[Stage]:
    full = [stage("64 prompts", 64, seed) for seed in range(5)]
    short = {"everything": False, "losses": ("sapo", "nll")}
    frontier = [stage("256 prompts", 256, seed, budgets=(0.25, 0.5, 1.0, 1.5), **short) for seed in range(3)]
    cells = [stage(name, 64, seed, test_problems=128, **short, **more) for seed in range(2) for name, more in {
        "3 carries": {"carries": (3,), "budgets": scaled(2.0)}, "2 carries": {"carries": (2,), "budgets": scaled(1.5)},
        "at most 1 carry": {"carries": (0, 1), "budgets": scaled(0.7)}, "2 operands": {"operands": 2, "budgets": scaled(0.5)},
        "8 operands": {"operands": 8, "budgets": scaled(2.0), "max_new_tokens": 128, "model": LONG_BASE}}.items()]
    cells += [stage("16 prompts", 16, seed, test_problems=128, budgets=scaled(1.0), **short) for seed in range(2)]
    return full + frontier + cells


def quick_stage() -> Stage:
    """All jobs of the first stage at a tenth of the size."""
    few = replace(stage("64 prompts", 64, 0), epochs=4, nll_epochs=4)
    return replace(few, config=replace(few.config, problems=6, explore_batch=16, distill_batch=16, distill_epochs=2,
                                       unlearn_epochs=2, test_problems=24, limit_samples=16))


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
    parser.add_argument("--quick", action="store_true", help="draw, and run one seed at a tenth of the size in a scratch folder")
    parser.add_argument("--only", nargs="*", help="stages to run, by name; none at all: draw and judge what is there")
    parser.add_argument("--model", default="", help="SmolLM2-135M-Instruct's folder or hub name, for its own small frontier")
    parser.add_argument("--workers", type=int, default=1 if torch.cuda.is_available() else max(1, (os.cpu_count() or 1)),
                        help="stages side by side")
    arguments = parser.parse_args()
    if arguments.quick:
        with TemporaryDirectory() as scratch:
            run([quick_stage()], Path(scratch) / "claims.jsonl", Path(scratch), 1)
            print(report(outcomes(Path(scratch) / "claims.jsonl")))
    else:
        every = stages() + (language_model(arguments.model) if arguments.model else [])
        if unknown := set(arguments.only or ()) - {s.name for s in every}:
            parser.error(f"--only {unknown.pop()!r} is no stage: choose from {', '.join(dict.fromkeys(s.name for s in every))}")
        wanted = [s for s in every if arguments.only is None or s.name in arguments.only]
        run(wanted, RESULTS, SCRATCH, arguments.workers)
        print(report(outcomes(RESULTS)))
    claims_figures.draw(outcomes(RESULTS))
