"""The claims of Extreme Region Policy Distillation, measured and judged.

    python figures/claims.py                # runs what is missing, draws the figures, prints the verdicts
    python figures/claims.py --quick        # re-draws from the results, and runs one seed at a tenth of the size in a scratch folder
    python figures/claims.py --model path/to/SmolLM2-135M-Instruct      # the small frontier of a language model, too

Everything is measured on 256 held-out problems × 8 samples of the policy's own, exact KL(π‖π_0) in nats a completion. Intervals are
95 %, Student's t over seeds; every seed has other problems, samples and training. The statistics and thresholds below were
fixed before the results were known. A statistic is met when its whole interval is on the right side of its threshold; a
claim holds when all its statistics are met, holds in part when some are, and does not hold when none is.

Stages: `64 prompts` (64 problems × 16 completions, all methods, 5 seeds), `256 prompts` (the same with 256, the frontier's
methods, 5 seeds), and cells of the map (2 seeds each): 16 prompts; problems with 3, with 2 and with at most 1 carry, where
the base is right about 5, 15 and 60 % of the time; chains of 2 and of 8 operands.

A *path* is what one setting of a method leads through: checkpoints by epoch, students by budget, interpolations by share.
A *level* is an accuracy 1/3, 1/2 or 2/3 of the way from the base's to 1. The KL of a method at a level is the least at which
any of its paths reaches it; between two points of a path, accuracy goes linearly with √KL, since KL is quadratic in the
distance from the base. *KL efficiency* is the KL of the limit (kl.least_kl) over that; 0 where no path gets there.

C1  Many off-policy steps on fixed data: fast rise, early plateau, entropy collapse, KL that keeps growing.
    The SAPO explorer, middle learning rate, 16 epochs, at 64 prompts:
    (a) best accuracy of epochs 1–4, less the base's > 0.10      (b) best accuracy less the last > 0.05
    (c) KL at the last epoch over KL at the best > 2             (d) entropy at the last epoch over the base's < 0.5
C2  A tighter constraint lowers the ceiling without curing the degradation. 64 prompts:
    (a) best accuracy of SAPO, all rates, less that of clipping with KL penalty 1.0 > 0       (b) the same for clipping alone > 0
    (c) KL efficiency of the last checkpoint of 16 clipped epochs over the best on its way < 0.5
    (d) the same with the KL penalty 0.2, 8 epochs < 0.5
C3  The student is as accurate for a fraction of the KL, and at equal KL at least as good as every direct method.
    At 64 and at 256 prompts:
    (a) KL at which ERPD's ladder reaches its own explorer's best accuracy, over the explorer's KL there < 1/3
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
