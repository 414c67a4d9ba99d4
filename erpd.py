"""Extreme Region Policy Distillation (arXiv 2605.25582), from top to bottom.

    python erpd.py                                    # the embedded policy: minutes on a laptop
    python erpd.py --model Qwen/Qwen3-0.6B --data gsm8k ...

One round, with π_0 the policy it starts from:

1. *Rollouts.* Sample a batch of completions from π_0, once, and judge them.
2. *Explore.* Squeeze a copy of π_0 on that fixed batch, for many epochs and under weak constraints, until it drifts: the
   extreme region policy π_T. With the targets reversed the same loss gives the unlearned policy π_U, trained to be worse.
3. *Signal.* Both become supervision: a log-ratio s_t at every stored token. Then they are thrown away.
4. *Distil.* Starting again from π_0, learn from s_t on the same batch inside a trust region, with a KL budget.
5. *Next round.* π_0 ← the student, with new problems.

The paper's equations could not be read in full when this was written: README.md says which parts are a reconstruction.
"""

import argparse
import copy
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers.modeling_layers import GradientCheckpointingLayer

import kl
from rewards import InputError, Problem, group_advantages, load_problems
from rollout import (Rollouts, by_tokens, collect, completion_figures, divergence, draw_frontier, evaluate, in_batches,
                     load_policy, save_policy, score, table)

LOSSES = ("sapo", "ce", "mse", "nll", "clip")
SIGNALS = ("teacher", "contrast", "unlearned")
METHODS = ("erpd", "grpo", *LOSSES)
SECTIONS = {"model": "policy, problems, run", "problems": "rollouts and evaluations", "loss": "stage 1: the explorer",
            "signal": "stage 2: the signal and the distiller", "tokens_per_step": "memory"}  # each by its first field


# ------------------------------------------------------------------------------------------------------- configuration

def option(default, help: str, paper=None):
    """A field of Config: its default, what it means with its unit, and the paper's value where that is known."""
    return field(default=default, metadata={"help": help, "paper": paper})


@dataclass
class Config:
    """Every setting of a run; each field is an option on the command line."""

    model: str = option("tutorial/tiny_base", "checkpoint folder or hub name of the base policy", "Qwen/Qwen3-4B-Thinking-2507")
    data: str = option("chain", "chain (built in), gsm8k, math500, aime24, aime25, polaris, a hub id, a .jsonl or .parquet file",
                       "polaris")
    test_data: str = option("", "held-out problems, if other than the test split of --data (a part of it, where it has one split)")
    question_field: str = option("", "field of the data set that holds the question (default: found by name)")
    answer_field: str = option("", "field of the data set that holds the answer (default: found by name)")
    operands: int = option(4, "numbers in a built-in chain problem")
    template: str = option("{question}", "the prompt; {question} stands for the problem")
    method: str = option("erpd", "erpd; or, to compare: grpo (on-policy), or an explorer's loss alone: " + ", ".join(LOSSES))
    run: str = option("", "name of the folder under runs/ that takes the results (default: METHOD-DATA-sSEED)")
    seed: int = option(0, "seeds the problems, the sampling and the training")
    device: str = option("auto", "auto, cpu, cuda, cuda:1 …")

    problems: int = option(256, "problems a round, P", 1000)
    group: int = option(16, "completions a problem, G", 16)
    max_new_tokens: int = option(64, "longest completion, tokens", 32768)
    temperature: float = option(1.0, "sampling temperature; every log-prob is taken at it")
    rounds: int = option(1, "rounds; each starts from the last one's student, with new problems", 6)
    test_problems: int = option(256, "held-out problems of the evaluations")
    test_samples: int = option(8, "completions a held-out problem in the final table: accuracy is avg@k")
    curve_samples: int = option(4, "the same for the checkpoints on the way; 0 leaves them out")
    limit_samples: int = option(64, "the same for the base: from 64 on, the figure shows the least KL that any policy needs")

    loss: str = option("sapo", "the explorer's loss: sapo, ce, mse, nll or clip; several teachers, with weights: sapo:1,nll:0.5",
                       "mse")
    explore_epochs: int = option(16, "passes of the explorer over the stored batch")
    explore_lr: float = option(3e-5, "its learning rate", 1e-6)
    explore_batch: int = option(256, "completions an update, in whole groups", 256)
    advantage: str = option("std", "group advantage Â: std, mean (not divided), loo (leave one out)")
    beta: float = option(1.0, "scale β of the sequence log-ratio in ce and mse")
    clip_low: float = option(0.2, "ε_low of the loss clip and of grpo")
    clip_high: float = option(0.28, "ε_high of the same")
    kl_coef: float = option(0.0, "coefficient of an exact KL(π_θ‖π_0) term added to the explorer's loss")
    unlearn_loss: str = option("mse", "the unlearned policy's loss, with the targets reversed", "mse")
    unlearn_epochs: int = option(4, "passes of the unlearned policy over the stored batch")

    signal: str = option("contrast", "s_t: teacher (π_T over π_0), contrast (π_T over π_U), unlearned (π_0 over π_U)")
    distill_epochs: int = option(4, "passes of the distiller over the stored batch", 1)
    distill_lr: float = option(4e-4, "its learning rate, falling to 0", 1e-6)
    distill_batch: int = option(64, "completions an update, in whole groups", 64)
    distill_clip: float = option(1.0, "its ε, low and high: how far a token's probability ratio is pushed")
    signal_bound: float = option(3.0, "largest |A_t|, in root mean squares of s_t")
    kl_budget: float = option(1.0, "KL(π_θ‖π_0) that the student may spend in a round, nats a completion")
    kl_start: float = option(1.0, "KL coefficient λ that the distiller starts with; the budget moves it")
    kl_rate: float = option(0.05, "rate of the dual ascent on log λ, per update")

    tokens_per_step: int = option(8192, "tokens in one forward and backward pass; the gradient does not depend on it")
    sample_rows: int = option(1024, "completions sampled side by side")
    checkpointing: int = option(0, "1: layers run again in the backward pass: less memory, more time")
    precision: str = option("auto", "fp32; bf16 (autocast over fp32 weights); auto: bf16 on CUDA")

    def __post_init__(self):
        choices = {"method": METHODS, "signal": SIGNALS, "unlearn_loss": LOSSES, "advantage": ("std", "mean", "loo"),
                   "precision": ("auto", "fp32", "bf16")}
        may_be_zero = ("seed", "clip_low", "clip_high", "kl_coef", "kl_rate", "curve_samples", "limit_samples", "checkpointing")
        for f in fields(self):
            value, name = getattr(self, f.name), "--" + f.name.replace("_", "-")
            if f.name in choices and value not in choices[f.name]:
                raise InputError(f"{name} {value!r} is unknown: choose one of {', '.join(choices[f.name])}")
            if isinstance(value, (int, float)) and not (value > 0 or value == 0 and f.name in may_be_zero):
                raise InputError(f"{name} {value!r} is out of range: it must be above 0")
        if any(loss not in LOSSES or math.isnan(weight) for loss, weight in self.teachers):
            raise InputError(f"--loss {self.loss!r} is unknown: choose from {', '.join(LOSSES)}; several as sapo:1,nll:0.5")
        if self.group < 2:
            raise InputError(f"--group {self.group}: an advantage compares the completions of one problem, so give at least 2")
        if "{question}" not in self.template:
            raise InputError(f"--template {self.template!r} must contain {{question}}")
        self.run = self.run or f"{self.method}-{Path(self.data).stem}-s{self.seed}"

    @property
    def teachers(self) -> list[tuple[str, float]]:
        """(loss, weight) of every teacher named in `loss`; a weight that is no number is NaN."""
        parts = [part.partition(":") for part in self.loss.split(",")]
        return [(loss, float(weight if re.fullmatch(r"-?\d+(\.\d+)?", weight) else "nan" if colon else 1))
                for loss, colon, weight in parts]

    @property
    def sampling(self) -> dict:
        return {"max_new_tokens": self.max_new_tokens, "temperature": self.temperature, "template": self.template,
                "rows": self.sample_rows}


# ---------------------------------------------------------------------------------------------------- one optimisation

class Diverged(RuntimeError):
    """A loss or gradient that is not finite. `model` holds the weights before that update, the last finite ones."""

    def __init__(self, stage: str, step: int, model):
        super().__init__(f"{stage} stopped at update {step}: the loss is no longer finite")
        self.stage, self.step, self.model = stage, step, model


def optimise(model, optimizer, rollouts: Rollouts, targets: dict[str, Tensor], objective: Callable, *, epochs: int,
             batch: int, config: Config, seed: int, desc: str, reference=None, after_update: Callable | None = None,
             after_epoch: Callable | None = None, decay: bool = False) -> None:
    """Minimise `objective` on the stored batch, `epochs` passes in updates of about `batch` completions; changes `model`.

    `targets` are further tensors, [B] or [B, T], that are cut into micro-batches with the rollouts.
    `objective(policy, part, targets, tokens, completions)` gives the loss of one micro-batch and a dict of figures to show,
    from the `policy`'s log-probs, entropy and, with a `reference`, exact KL to it, [b, T] each. `tokens` and `completions`
    count the whole update: dividing by them makes the gradient independent of how it is cut into micro-batches.
    `after_update()` and `after_epoch(epoch, model)` may return more figures. With `decay` the learning rate falls linearly
    to 0. Raises Diverged.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    passes = [in_batches(rollouts, batch, generator) for _ in range(epochs)]
    updates = sum(map(len, passes))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / updates if decay else 1.0)
    shown, step = {}, 0
    with tqdm(total=updates, desc=desc, unit="update", leave=False) as bar:
        for epoch, indices in enumerate(passes, 1):
            for index in indices:
                tokens, completions = int(rollouts.length[index].sum()), len(index)
                loss_value, figures = 0.0, {}
                for chosen in by_tokens(rollouts.select(index), config.tokens_per_step):
                    rows = index[chosen]
                    part = rollouts.select(rows).to(device)
                    cut = {name: (x[rows, :part.log_probs.shape[1]] if x.dim() == 2 else x[rows]).to(device)
                           for name, x in targets.items()}
                    policy = completion_figures(model, part, config.temperature, with_entropy=True, reference=reference)
                    loss, parts = objective(policy, part, cut, tokens, completions)
                    loss.backward()
                    loss_value = loss_value + loss.detach()
                    figures = {name: figures.get(name, 0.0) + value.detach() for name, value in parts.items()}
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                step += 1
                if not torch.isfinite(loss_value + norm):
                    raise Diverged(desc, step, model)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad(set_to_none=True)
                shown |= figures | (after_update() if after_update else {})
                bar.update()
                bar.set_postfix({name: f"{value:.3g}" for name, value in shown.items()}, refresh=False)
            if after_epoch is not None:
                shown |= after_epoch(epoch, model) or {}


def trainable(base, lr: float, checkpointing: bool = False):
    """(model, optimizer): a copy of a frozen policy to train; it stays in eval mode, so that dropout is off."""
    model = copy.deepcopy(base).requires_grad_(True)
    for layer in model.modules() if checkpointing else ():  # transformers' own would need train mode
        if isinstance(layer, GradientCheckpointingLayer) and "forward" not in vars(layer):
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    return model, torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)


# ------------------------------------------------------------------------------------------------- stage 1: the explorer

def explorer_loss(name: str, log_prob: Tensor, part: Rollouts, advantage: Tensor, tokens: Tensor | int,
                  completions: int, config: Config, reverse: bool = False) -> Tensor:
    """One of the explorer's losses on a micro-batch, to be minimised [].

    log_prob is log π_θ(y_t|s_t) [B, T], advantage Â [B]; ρ_t = π_θ/π_0 and R = β Σ_t log ρ_t.

        sapo   −mean_t f(ρ_t)·Â                              kl.soft_gate_surrogate
        clip   −mean_t min(ρ_t·Â, clip(ρ_t)·Â)               kl.clipped_surrogate
        ce     −[r·log σ(R) + (1 − r)·log σ(−R)]             the implicit reward as a classifier (2412.01981)
        mse    (R − Â)²                                      regression on the log-ratio (REBEL, 2404.16767)
        nll    −mean_t r·log π_θ                             cross-entropy on the right completions

    `reverse` turns the targets round (Â → −Â, r → 1 − r): the unlearned policy.
    """
    mask = part.mask
    right = 1 - part.rewards if reverse else part.rewards
    advantage = -advantage if reverse else advantage
    log_ratio = log_prob - part.log_probs
    if name == "sapo":
        return -kl.masked_mean(kl.soft_gate_surrogate(log_ratio.exp(), advantage[:, None]), mask, tokens)
    if name == "clip":
        surrogate = kl.clipped_surrogate(log_ratio.exp(), advantage[:, None], config.clip_low, config.clip_high)
        return -kl.masked_mean(surrogate, mask, tokens)
    if name == "nll":
        return -kl.masked_mean(log_prob, mask * right[:, None], tokens)
    implicit_reward = config.beta * (log_ratio * mask).sum(-1)
    if name == "ce":
        return F.binary_cross_entropy_with_logits(implicit_reward, right, reduction="sum") / completions
    if name == "mse":
        return (implicit_reward - advantage).square().sum() / completions
    raise ValueError(f"unknown loss {name!r}")


def explore(base, rollouts: Rollouts, config: Config, *, loss: str, epochs: int, reverse: bool = False, seed: int = 0,
            desc: str = "explore", after_epoch: Callable | None = None, resume: tuple | None = None):
    """Stage 1: many epochs of off-policy updates on the fixed batch, from π_0 = `base`; returns the policy it ends in.

    Every ρ_t is taken against the stored behaviour log-probs, which are π_0's. `reverse` trains the unlearned policy.
    `after_epoch(epoch, model)` watches it drift. `resume` is a (model, optimizer) to go on with instead.
    """
    model, optimizer = resume or trainable(base, config.explore_lr, config.checkpointing)
    advantages = group_advantages(rollouts.rewards, rollouts.groups, config.advantage)

    def objective(policy, part, targets, tokens, completions):
        value = explorer_loss(loss, policy.log_prob, part, targets["advantage"], tokens, completions, config, reverse)
        if config.kl_coef:
            value = value + config.kl_coef * kl.masked_mean(policy.kl, part.mask, tokens)
        moved = kl.k3_off_policy(policy.log_prob.detach() - part.log_probs)
        return value, {"loss": value, "kl": (moved * part.mask).sum() / completions,
                       "entropy": kl.masked_mean(policy.entropy, part.mask, tokens)}

    optimise(model, optimizer, rollouts, {"advantage": advantages}, objective, epochs=epochs, batch=config.explore_batch,
             config=config, seed=seed, desc=desc, reference=base if config.kl_coef else None, after_epoch=after_epoch)
    return model


# -------------------------------------------------------------------------------------------------------- the signal

def token_signal(kind: str, log_base: Tensor, log_teacher: Tensor | None = None, log_unlearned: Tensor | None = None) -> Tensor:
    """s_t [B, T], nats: what the drifted policies say of every stored token. All arguments are log-probs [B, T] of it.

        teacher    log π_T − log π_0
        contrast   log π_T − log π_U     drift that both have in common cancels
        unlearned  log π_0 − log π_U     a policy that got worse teaches alone

    By Bayes π_0(y_t|s_t, right)/π_0(y_t|s_t) = P(right|s_t, y_t)/P(right|s_t): a teacher that has learnt the right
    completions gives increments of log P(right), one that has learnt the wrong ones increments of −log P(wrong), and their
    contrast increments of the log-odds. Over a completion they add up to its outcome: credit assignment without a critic.
    """
    better = log_base if kind == "unlearned" else log_teacher
    worse = log_base if kind == "teacher" else log_unlearned
    if kind not in SIGNALS or better is None or worse is None:
        raise ValueError(f"signal {kind!r} needs other log-probs than were given")
    return better - worse


def combine_signals(signals: Sequence[Tensor], weights: Sequence[float], mask: Tensor) -> Tensor:
    """Σ_k w_k·s^k / rms(s^k) [B, T]: several teachers, each brought to one scale first."""
    return sum(w * normalised(s, mask) for w, s in zip(weights, signals, strict=True))


def normalised(signal: Tensor, mask: Tensor, bound: float = math.inf) -> Tensor:
    """A_t: s_t over its root mean square on the batch, bounded [B, T]. Not centred: the sign of s_t is its meaning."""
    rms = kl.masked_mean(signal.square(), mask).sqrt()
    return (signal / rms.clamp(min=1e-8) * mask).clamp(-bound, bound)


# ------------------------------------------------------------------------------------------------ stage 2: the distiller

def distill(base, rollouts: Rollouts, signal: Tensor, config: Config, *, seed: int = 0, desc: str = "distil",
            after_epoch: Callable | None = None):
    """Stage 2: from π_0 again, learn from s_t [B, T] on the same batch, inside a trust region; returns the student.

        maximise  mean_t min(ρ_t·A_t, clip(ρ_t)·A_t) − λ·mean_t KL_t(π_θ‖π_0),      A_t = bounded s_t / rms(s)

    KL_t is exact over the vocabulary. λ follows by dual ascent: it rises while the policy's estimated on-policy KL is above
    the budget and falls while it is below. The outcome Â is not mixed in: what the student gains is the teachers'.
    """
    model, optimizer = trainable(base, config.distill_lr, config.checkpointing)
    advantages = normalised(signal, rollouts.mask, config.signal_bound)
    multiplier, coefficient, seen = config.kl_start, config.kl_start, []

    def objective(policy, part, targets, tokens, completions):
        log_ratio = policy.log_prob - part.log_probs
        surrogate = kl.clipped_surrogate(log_ratio.exp(), targets["advantage"], config.distill_clip, config.distill_clip)
        value = coefficient * kl.masked_mean(policy.kl, part.mask, tokens) - kl.masked_mean(surrogate, part.mask, tokens)
        seen.extend(zip(policy.kl.detach(), log_ratio.detach(), part.mask))
        return value, {"entropy": kl.masked_mean(policy.entropy, part.mask, tokens)}

    def steer_coefficient():
        nonlocal multiplier, coefficient
        spent = kl.on_policy_kl(*(pad_sequence(rows, batch_first=True) for rows in zip(*seen))).item()
        seen.clear()
        multiplier, coefficient = kl.dual_ascent(multiplier, spent, config.kl_budget, config.kl_rate)
        return {"kl": spent, "lambda": coefficient}

    optimise(model, optimizer, rollouts, {"advantage": advantages}, objective, epochs=config.distill_epochs,
             batch=config.distill_batch, config=config, seed=seed, desc=desc, reference=base, after_update=steer_coefficient,
             after_epoch=after_epoch, decay=True)  # what the last updates of a constant rate add is noise, and it costs KL
    return model


def within_budget(base, student, tokenizer, problems: Sequence[Problem], config: Config, seed: int = 0):
    """The student, moved back towards π_0 until its on-policy KL is within the budget; and that KL, nats a completion.

    The KL of a policy is known only from its own samples: a few fresh completions of at most 128 training problems for
    each trial. Their answers are not looked at.
    """
    def measure(alpha: float) -> float:
        policy = kl.interpolated(base, student, alpha)
        rollouts = collect(policy, tokenizer, problems[:128], 4, seed=seed, desc="spending check", **config.sampling)
        return divergence(policy, base, rollouts, config.temperature, config.tokens_per_step)["kl"]

    alpha, spent = kl.largest_step_within(measure, config.kl_budget)
    return kl.interpolated(base, student, alpha), spent


# --------------------------------------------------------------------------------------------------------------- GRPO

def grpo(base, tokenizer, problems: Sequence[Problem], config: Config, *, after_step: Callable | None = None):
    """On-policy GRPO (2402.03300), to compare with: `explore` with the clip loss, on fresh samples at every step.

    It sees every problem once, like a run of ERPD, so that both spend as many rollouts.
    """
    model, optimizer = trainable(base, config.explore_lr, config.checkpointing)
    per_step = max(1, config.explore_batch // config.group)
    for step, start in enumerate(tqdm(range(0, len(problems), per_step), desc="grpo", unit="step", leave=False), 1):
        rollouts = collect(model, tokenizer, problems[start:start + per_step], config.group,
                           seed=config.seed * 100_003 + step, **config.sampling)
        explore(base, rollouts, config, loss="clip", epochs=1, seed=step, resume=(model, optimizer),
                desc=f"grpo, {rollouts.rewards.mean():.1%} right")
        if after_step is not None:
            after_step(step, model)
    return model


# -------------------------------------------------------------------------------------------------------------- a run

def teach(base, rollouts: Rollouts, config: Config, seed: int, watch: Callable, measure: Callable) -> Tensor:
    """Stages 1 and signal of a round: A_t's raw material s_t [B, T]. Each drifted policy is gone once it has scored the batch.

    `watch(name)` gives an after_epoch callback, `measure(name, model)` evaluates the policy a stage ends in.
    """
    def drifted(name: str, loss: str, epochs: int, reverse: bool) -> Tensor:
        model = explore(base, rollouts, config, loss=loss, epochs=epochs, reverse=reverse, seed=seed, desc=name,
                        after_epoch=watch(name))
        measure(name, model)
        return score(model, rollouts, config.temperature, config.tokens_per_step, desc=f"{name} scores the batch")

    log_unlearned = None
    if config.signal != "teacher":
        log_unlearned = drifted("unlearned policy", config.unlearn_loss, config.unlearn_epochs, True)
    if config.signal == "unlearned":
        return token_signal("unlearned", rollouts.log_probs, None, log_unlearned)
    signals = [token_signal(config.signal, rollouts.log_probs,
                            drifted(f"extreme region policy ({loss})", loss, config.explore_epochs, False), log_unlearned)
               for loss, _ in config.teachers]
    return combine_signals(signals, [weight for _, weight in config.teachers], rollouts.mask)


def autocast(config: Config, device: torch.device):
    """The context of all computing: bf16 over fp32 weights where `precision` says so."""
    bf16 = config.precision == "bf16" or config.precision == "auto" and device.type == "cuda"
    return torch.autocast(device.type, torch.bfloat16, bf16, cache_enabled=False)  # weights change between passes


def run(config: Config) -> list[dict]:
    """Rounds of ERPD, or a direct method. Writes runs/NAME/ as it goes and returns the rows of its metrics.jsonl."""
    folder = Path("runs") / config.run
    if folder.exists():
        raise InputError(f"{folder} exists: give the run another name with --run, or remove that folder")
    sources = {"seed": config.seed, "operands": config.operands, "question_field": config.question_field or None,
               "answer_field": config.answer_field or None, "divide": config.test_data in ("", config.data)}
    problems = load_problems(config.data, "train", config.problems * config.rounds, **sources)
    held_out = load_problems(config.test_data or config.data, "test", config.test_problems, **sources)
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    origin, tokenizer = load_policy(config.model, automatic if config.device == "auto" else config.device)
    origin.requires_grad_(False)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
    rows, this_round, base = [], 1, origin

    def measure(name: str, model, samples: int = config.test_samples, **more) -> dict:
        """Evaluate a policy on the held-out problems; its row is on disk before anything else happens."""
        row = {"policy": name, "round": this_round, **more,
               **evaluate(model, origin, tokenizer, held_out, samples, seed=config.seed, desc=name, **config.sampling)}
        rows.append(row)
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        tqdm.write(table([row], header=len(rows) == 1))
        return {"right": row["accuracy"]}

    def watch(name: str, unit: str = "epoch") -> Callable:
        """A callback that evaluates the policy on its way, after 1, 2, 4, 8 … epochs."""
        def after(count: int, model) -> dict:
            due = config.curve_samples and count & (count - 1) == 0
            return measure(name, model, config.curve_samples, **{unit: count}) if due else {}
        return after

    with autocast(config, origin.device):
        try:
            measure("base", base, max(config.test_samples, config.limit_samples))
            if config.method == "grpo":
                base = grpo(base, tokenizer, problems, config, after_step=watch("grpo", "step"))
                measure("grpo", base)
            for this_round in range(1, config.rounds + 1) if config.method != "grpo" else ():
                fresh = problems[(this_round - 1) * config.problems:this_round * config.problems]
                seed = config.seed * 1000 + this_round
                rollouts = collect(base, tokenizer, fresh, config.group, seed=seed, desc="rollouts", **config.sampling)
                rollouts.save(folder / f"rollouts-{this_round}.pt")
                if not group_advantages(rollouts.rewards, rollouts.groups, "mean").any():
                    raise InputError(f"no problem has both right and wrong completions ({rollouts.rewards.mean():.0%} are right): "
                                     "nothing to learn. Choose easier or harder --data, or raise --group or --max-new-tokens")
                if config.method == "erpd":
                    signal = teach(base, rollouts, config, seed, watch, measure)
                    torch.save(signal, folder / f"signal-{this_round}.pt")
                    student = distill(base, rollouts, signal, config, seed=seed, after_epoch=watch("student on its way"))
                    base, spent = within_budget(base, student, tokenizer, fresh, config, seed)
                    measure("ERPD student", base, kl_round=spent)
                else:
                    base = explore(base, rollouts, config, loss=config.method, epochs=config.explore_epochs, seed=seed,
                                   desc=config.method, after_epoch=watch(config.method))
                    measure(config.method, base)
        except Diverged as error:
            save_policy(error.model, tokenizer, folder / "last_finite")
            raise InputError(f"{error}; its last finite weights are in {folder / 'last_finite'}: lower the learning rate") from None
        finally:
            if rows:
                draw_frontier(rows, folder / "frontier.png", config.kl_budget if config.method == "erpd" else None)
    save_policy(base, tokenizer, folder / "policy")
    return rows


# --------------------------------------------------------------------------------------------------- the command line

def read_arguments(arguments: Sequence[str] | None = None) -> Config:
    """The command line as a Config. Raises InputError."""
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise InputError(f"{message} (python erpd.py --help lists every option)")

    parser = Parser(prog="erpd.py", usage="python erpd.py [--option value …]", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paper", action="store_true", help="start from the paper's own settings, for a large GPU")
    for f in fields(Config):
        if f.name in SECTIONS:
            section = parser.add_argument_group(SECTIONS[f.name])
        values = [str(f.default)] * (f.default != "") + [f"the paper: {f.metadata['paper']}"] * (f.metadata["paper"] is not None)
        section.add_argument("--" + f.name.replace("_", "-"), type=type(f.default), metavar=type(f.default).__name__.upper(),
                             help=f"{f.metadata['help']} [{'; '.join(values)}]".replace(" []", "").replace("%", "%%"))
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    papers = {f.name: f.metadata["paper"] for f in fields(Config) if f.metadata["paper"] is not None} if given.pop("paper") else {}
    return Config(**papers | given)


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        config = read_arguments(arguments)
        print(f"{config.method} on {config.data} with {config.model}: the results go to runs/{config.run}/\n")
        rows = run(config)
        print(f"\n{table([row for row in rows if not {'epoch', 'step'} & row.keys()])}")
        print(f"\nruns/{config.run}/: policy/ (the final policy), metrics.jsonl (these rows), frontier.png")
    except InputError as error:
        print(f"erpd.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
