"""The claims of Extreme Region Policy Distillation, measured and judged.

    python figures/claims.py                # runs what is missing, draws the figures, prints the verdicts
    python figures/claims.py --quick        # re-draws from the results, and runs one seed at a tenth of the size in a scratch folder
    python figures/claims.py --model path/to/SmolLM2-135M-Instruct      # the small frontier of a language model, too

Everything is measured on 256 held-out problems × 8 samples of the policy's own (4 on an explorer's way), exact KL(π‖π_0) in nats a completion. Intervals are
95 %, Student's t over seeds; every seed has other problems, samples and training. The statistics and thresholds below were
fixed before the results were known. A statistic is met when its whole interval is on the right side of its threshold; a
claim holds when all its statistics are met, holds in part when some are, and does not hold when none is.

Stages: `64 prompts` (64 problems × 16 completions, all methods, 5 seeds), `256 prompts` (the same with 256, the frontier's
methods, 3 seeds or more), and cells of the map (2 seeds each): 16 prompts; problems with 3, with 2 and with at most 1 carry, where
the base is right about 5, 15 and 60 % of the time; chains of 2 and of 8 operands.

A *path* is what one setting of a method leads through: checkpoints by epoch, students by budget, interpolations by share.
A *level* is an accuracy 1/3, 1/2 or 2/3 of the way from the base's to 1. The KL of a method at a level is the least at which
any of its paths reaches it; between two points of a path, accuracy goes linearly with √KL, since KL is quadratic in the
distance from the base. *KL efficiency* is the KL of the limit (kl.least_kl) over that; 0 where no path gets there.

C1  Many off-policy steps on fixed data: fast rise, early plateau, entropy collapse, KL that keeps growing.
    The default SAPO explorer (learning rate 3e-5), 16 epochs, at 64 prompts:
    (a) best accuracy of epochs 1–4, less the base's > 0.10      (b) best accuracy less the last > 0.05
    (c) KL at the last epoch over KL at the best > 2             (d) entropy at the last epoch over the base's < 0.5
C2  A tighter constraint lowers the ceiling without curing the degradation. 64 prompts:
    (a) best accuracy of SAPO, all rates, less that of clipping with KL penalty 1.0 > 0       (b) the same for clipping alone > 0
    (c) KL efficiency of the last checkpoint of 16 clipped epochs over the best on its way < 0.5
    (d) the same with the KL penalty 0.2, 8 epochs < 0.5
C3  The student is as accurate for a fraction of the KL, and at equal KL at least as good as every direct method.
    At 64 and at 256 prompts:
    (a) KL at which ERPD's ladder reaches its own explorer's best accuracy, over the explorer's KL there < 1/3; at 64 prompts for a
        faster explorer (learning rate 1e-4) and its students, too
    (b) the ceiling: best accuracy of the ladder less the best of each constrained direct method (clip, clip + KL) > 0
    (c) KL efficiency at each level ≥ 0.7, and 0.85 at the best level
    (d) efficiency less that of every opponent, at each level > 0 (the closest opponent is named)
C4  A weak or degenerate teacher still makes a better student. 64 prompts, budget 0.5:
    (a) student of the unlearned policy: accuracy less the base's > 0.10       (b) less its teacher's > 0
    (c), (d) the same for the contrast with the explorer after its last epoch
    (e) KL efficiency of the default student less that of the control, Â in place of s_t, at the middle level > 0
C5  Several teachers beat one. 64 prompts, budget 0.5: KL efficiency at the accuracy reached, sapo + mse + nll by contrast,
    less that of each of the three alone > 0
C6  Gains continue over rounds, also where on-policy GRPO has flattened. 64 prompts:
    (a) accuracy of round 2 less round 1 > 0     (b) round 3 less round 2 > 0
    (c) gain of one ERPD round from the end of GRPO with 8× the rollouts, less GRPO's gain over its last half > 0
C7  Stage 2 costs no generation. 64 prompts: rollouts until the upper level is reached, ERPD's over GRPO's < 1/2 (a
    GRPO that never gets there counts with all its rollouts)
"""

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm

import experiments
from experiments import HERE, Stage, erpd, measured

RESULTS, SCRATCH = HERE / "results" / "claims.jsonl", Path("runs") / "claims"
EMBEDDED = str(HERE.parent / "tutorial" / "tiny_base")


def stage(name: str, prompts: int, seed: int, **more) -> Stage:
    """Sixteen updates an epoch at every size; the distiller takes more passes where they are short."""
    settings = {key: more.pop(key) for key in ("operands", "model") if key in more}
    config = erpd.Config(**{"model": EMBEDDED} | settings, problems=prompts, seed=seed, explore_batch=prompts,
                         distill_batch=min(64, prompts), distill_epochs=4 if prompts > 64 else 8)
    return Stage(name, config, nll_epochs=4 if prompts > 64 else 8, **more)


def stages() -> list[Stage]:
    full = [stage("64 prompts", 64, seed) for seed in range(5)]
    frontier = [stage("256 prompts", 256, seed, everything=False) for seed in range(5)]
    return full + frontier


def work(stage: Stage, results: Path, folder: Path) -> str:
    """In a process of its own: one stage on one core (or on the GPU)."""
    torch.set_num_threads(1)
    experiments.run_stage(stage, results, folder, told=lambda job: print(f"{stage.key}: {job}", file=sys.stderr))
    return stage.key


def run(wanted: list[Stage], results: Path, folder: Path, workers: int) -> None:
    results.parent.mkdir(exist_ok=True)
    os.environ |= {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        futures = [pool.submit(work, stage, results, folder) for stage in wanted]
        for future in as_completed(futures):
            print("done", future.result(), flush=True)


if __name__ == "__main__":
    run(stages(), RESULTS, SCRATCH, 2)
