"""Extreme Region Policy Distillation (arXiv 2605.25582), from top to bottom.

    python erpd.py                                    # the embedded policy: minutes on a laptop
    python erpd.py --model Qwen/Qwen3-0.6B --data gsm8k ...

One round, with π_0 the policy it starts from; `one_round` below says the same in code:

1. *Rollouts.* Sample a batch of completions from π_0, once, and judge them.
2. *Explore.* Squeeze a copy of π_0 on that fixed batch, for many epochs and under weak constraints, until it drifts: the
   extreme region policy π_T. With the targets reversed the same loss gives the unlearned policy π_U, trained to be worse.
3. *Signal.* Both become supervision: a log-ratio δ_t at every stored token. Then they are thrown away.
4. *Distil.* Starting again from π_0, learn from δ_t on the same batch inside a trust region, with a KL budget.
5. *Next round.* π_0 ← the student, with new problems.

For a reader who knows PPO or GRPO, what is different:

- Rollouts are sampled once a round, and trained on for many epochs. π_old never moves: it is the reference, too.
- The explorer has no clip that closes and no KL term. It is meant to leave the region where its gradient can be trusted.
- Nobody deploys the explorer. Only its opinion of the stored tokens is kept, so that it may even be worse than π_0.
- The distiller's advantage is that opinion, token by token. There is no critic, and the outcome advantage Â is not in it.
- Its KL is exact over the vocabulary, and its coefficient is no setting: you name the KL to spend, and λ follows.

The paper's equations could not be read in full when this was written: README.md says which parts are a reconstruction.
"""

import argparse
import copy
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
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
from figures.frontier import draw_frontier, ends, table
from rewards import InputError, Problem, group_advantages, load_problems
from rollout import (Rollouts, by_tokens, collect, completion_stats, divergence, evaluate, in_batches, load_policy,
                     save_policy, score)

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

    signal: str = option("contrast", "δ_t: teacher (π_T over π_0), contrast (π_T over π_U), unlearned (π_0 over π_U)")
    distill_epochs: int = option(4, "passes of the distiller over the stored batch", 1)
    distill_lr: float = option(4e-4, "its learning rate, falling to 0", 1e-6)
    distill_batch: int = option(64, "completions an update, in whole groups", 64)
    distill_clip: float = option(1.0, "its ε, low and high; at 1 a ratio is pushed up to 2, and down as KL allows")
    signal_bound: float = option(3.0, "largest |A_t|, in root mean squares of δ_t")
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
            if isinstance(value, (int, float)) and not (0 < value < math.inf or value == 0 and f.name in may_be_zero):
                raise InputError(f"{name} {value!r} is out of range: it must be a finite number above 0")
        if any(loss not in LOSSES or math.isnan(weight) for loss, weight in self.teachers):
            raise InputError(f"--loss {self.loss!r} is unknown: choose from {', '.join(LOSSES)}; several as sapo:1,nll:0.5")
        if len(self.teachers) == 1 and ":" in self.loss:
            raise InputError(f"--loss {self.loss!r}: weights are relative to one another, so a single teacher has none")
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


# --------------------------------------------------------------------------------------------------------- one update

class Diverged(RuntimeError):
    """A loss or gradient that is not finite. `model` holds the weights before that update, the last finite ones."""

    def __init__(self, stage: str, model):
        super().__init__(f"{stage} stopped: the loss is no longer finite")
        self.model = model


def trainable(base, lr: float, checkpointing: bool = False):
    """(model, optimizer): a copy of a frozen policy to train; it stays in eval mode, so that dropout is off."""
    model = copy.deepcopy(base).requires_grad_(True)
    if checkpointing:  # transformers' own would need train mode
        for layer in model.modules():
            if isinstance(layer, GradientCheckpointingLayer) and "forward" not in vars(layer):
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    return model, torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)


def optimise(model, optimizer, rollouts: Rollouts, advantage: Tensor, objective: Callable, config: Config, bar: tqdm,
             reference=None) -> None:
    """One update on some of the stored completions, in micro-batches; changes `model`. Raises Diverged.

    advantage is [B, T], or [B, 1] for one that all tokens of a completion share.
    `objective(policy, part, advantage, tokens, completions)` gives the loss of a micro-batch and numbers to show, from the
    `policy`'s log-probs, entropy and, with a `reference`, exact KL to it, [b, T] each.
    """
    # Every micro-batch divides by the counts of the whole update, so that their gradients add up to the update's.
    tokens, completions = int(rollouts.length.sum()), len(rollouts)
    total, shown = 0.0, {}
    for rows in by_tokens(rollouts, config.tokens_per_step):
        # One forward pass of the policy, and one of the reference, over completions of like lengths.
        part = rollouts.select(rows)
        policy = completion_stats(model, part, config.temperature, with_entropy=True, reference=reference)
        # The loss of these rows, with everything else about them where the policy is.
        part, its_advantage = part.to(model.device), advantage[rows, :part.log_probs.shape[1]].to(model.device)
        loss, numbers = objective(policy, part, its_advantage, tokens, completions)
        # Gradients add up over the micro-batches; what is shown does as well, without waiting for the device.
        loss.backward()
        total = total + loss.detach()
        shown = {name: shown.get(name, 0.0) + number for name, number in numbers.items()}
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    # Before the weights change, so that the last finite ones can be saved.
    if not torch.isfinite(total + norm):
        raise Diverged(bar.desc, model)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    bar.update()
    bar.set_postfix({name: f"{number:.3g}" for name, number in shown.items()}, refresh=False)


def unwatched(name: str, model, **about) -> None:
    """Whoever watches a stage is called with a policy's name, the policy, and epoch=…, step=… where it is on its way."""


# ------------------------------------------------------------------------------------------------- stage 1: the explorer

def explorer_loss(name: str, log_prob: Tensor, part: Rollouts, advantage: Tensor, tokens: int, completions: int,
                  config: Config) -> Tensor:
    """One of the explorer's losses on a micro-batch, to be minimised [].

    log_prob is log π_θ(y_t|s_t) [B, T], advantage Â [B, 1]; ρ_t = π_θ/π_0 and R = β Σ_t log ρ_t.

        sapo   −mean_t f(ρ_t)·Â                              kl.soft_gate_surrogate
        clip   −mean_t min(ρ_t·Â, clip(ρ_t)·Â)               kl.clipped_surrogate
        ce     −[r·log σ(R) + (1 − r)·log σ(−R)]             the implicit reward as a classifier (2412.01981)
        mse    (R − Â)²                                      regression on the log-ratio (REBEL, 2404.16767)
        nll    −mean_t r·log π_θ                             cross-entropy on the right completions
    """
    log_ratio = log_prob - part.log_probs
    if name == "sapo":
        return -kl.masked_mean(kl.soft_gate_surrogate(log_ratio.exp(), advantage), part.mask, tokens)
    if name == "clip":
        surrogate = kl.clipped_surrogate(log_ratio.exp(), advantage, config.clip_low, config.clip_high)
        return -kl.masked_mean(surrogate, part.mask, tokens)
    if name == "nll":
        return -kl.masked_mean(log_prob, part.mask * part.rewards[:, None], tokens)
    implicit_reward = config.beta * (log_ratio * part.mask).sum(-1)
    if name == "ce":
        return F.binary_cross_entropy_with_logits(implicit_reward, part.rewards, reduction="sum") / completions
    if name == "mse":
        return (implicit_reward - advantage[:, 0]).square().sum() / completions
    raise ValueError(f"unknown loss {name!r}")


def explore(base, rollouts: Rollouts, advantage: Tensor, config: Config, *, loss: str, epochs: int, seed: int = 0,
            desc: str = "explorer", watch: Callable = unwatched, resume: tuple | None = None):
    """Stage 1: many epochs of off-policy updates on the fixed batch, from π_0 = `base`; returns the policy it ends in.

    advantage is Â [B]. Every ρ_t is taken against the stored behaviour log-probs, which are π_0's. `watch` sees the policy
    after every epoch. `resume` is a (model, optimizer) to go on with instead.
    """
    model, optimizer = resume or trainable(base, config.explore_lr, config.checkpointing)

    def objective(policy, part, advantage, tokens, completions):
        value = explorer_loss(loss, policy.log_prob, part, advantage, tokens, completions, config)
        if config.kl_coef:
            value = value + config.kl_coef * kl.masked_mean(policy.kl, part.mask, tokens)
        moved = kl.k3_off_policy(policy.log_prob.detach() - part.log_probs)
        return value, {"loss": value.detach(), "kl": (moved * part.mask).sum() / completions,
                       "entropy": kl.masked_mean(policy.entropy, part.mask, tokens)}

    generator = torch.Generator().manual_seed(seed)
    passes = [in_batches(rollouts, config.explore_batch, generator) for _ in range(epochs)]
    with tqdm(total=sum(map(len, passes)), desc=desc, unit="update", leave=False) as bar:
        for epoch, batches in enumerate(passes, 1):
            for rows in batches:
                optimise(model, optimizer, rollouts.select(rows), advantage[rows, None], objective, config, bar,
                         base if config.kl_coef else None)
            watch(desc, model, epoch=epoch)
    return model


# ------------------------------------------------------------------------------------------------- stage 2: the signal

def token_signal(kind: str, log_base: Tensor, log_teacher: Tensor | None = None, log_unlearned: Tensor | None = None) -> Tensor:
    """δ_t [B, T], nats: what the drifted policies say of every stored token. All arguments are log-probs [B, T] of it.

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
    """Σ_k w_k·δ^k / rms(δ^k) [B, T]: several teachers, each brought to one scale first."""
    return sum(w * normalised(signal, mask) for w, signal in zip(weights, signals, strict=True))


def normalised(signal: Tensor, mask: Tensor, bound: float = math.inf) -> Tensor:
    """A_t: δ_t over its root mean square on the batch, bounded [B, T]. Not centred: the sign of δ_t is its meaning."""
    rms = kl.masked_mean(signal.square(), mask).sqrt()
    return (signal / rms.clamp(min=1e-8) * mask).clamp(-bound, bound)


# ------------------------------------------------------------------------------------------------ stage 2: the distiller

def distill(base, rollouts: Rollouts, signal: Tensor, config: Config, *, seed: int = 0, watch: Callable = unwatched):
    """Stage 2: from π_0 again, learn from δ_t [B, T] on the same batch, inside a trust region; returns the student.

        maximise  mean_t min(ρ_t·A_t, clip(ρ_t)·A_t) − λ·mean_t KL_t(π_θ‖π_0),      A_t = bounded δ_t / rms(δ)

    KL_t is exact over the vocabulary. λ follows by dual ascent: it rises while the policy's estimated on-policy KL is above
    the budget and falls while it is below. The outcome Â is not mixed in: what the student gains is the teachers'.
    """
    model, optimizer = trainable(base, config.distill_lr, config.checkpointing)
    advantage = normalised(signal, rollouts.mask, config.signal_bound)
    multiplier, coefficient, seen = config.kl_start, config.kl_start, []

    def objective(policy, part, advantage, tokens, completions):
        log_ratio = policy.log_prob - part.log_probs
        # With ε = 1 the clip stops a wanted token at ρ = 2. An unwanted one it never stops, since ρ > 0 = 1 − ε: KL alone
        # restrains there, and pushing such tokens down is what costs least.
        surrogate = kl.clipped_surrogate(log_ratio.exp(), advantage, config.distill_clip, config.distill_clip)
        value = coefficient * kl.masked_mean(policy.kl, part.mask, tokens) - kl.masked_mean(surrogate, part.mask, tokens)
        seen.extend(zip(policy.kl.detach(), log_ratio.detach(), part.mask))
        return value, {"entropy": kl.masked_mean(policy.entropy, part.mask, tokens)}

    generator = torch.Generator().manual_seed(seed)
    passes = [in_batches(rollouts, config.distill_batch, generator) for _ in range(config.distill_epochs)]
    updates = sum(map(len, passes))
    # The rate falls to 0: what the last updates of a constant one add is noise, and noise costs KL.
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / updates)
    with tqdm(total=updates, desc="distil", unit="update", leave=False) as bar:
        for epoch, batches in enumerate(passes, 1):
            for rows in batches:
                optimise(model, optimizer, rollouts.select(rows), advantage[rows], objective, config, bar, base)
                schedule.step()
                spent = kl.on_policy_kl(*(pad_sequence(column, batch_first=True) for column in zip(*seen))).item()
                seen.clear()
                multiplier, coefficient = kl.dual_ascent(multiplier, spent, config.kl_budget, config.kl_rate)
                bar.set_postfix(kl=f"{spent:.3g}", λ=f"{coefficient:.3g}", refresh=False)
            watch("student on its way", model, epoch=epoch)
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


# ------------------------------------------------------------------------------------------------------------- one round

def stored_batch(base, tokenizer, problems: Sequence[Problem], config: Config, seed: int, folder: Path | None = None):
    """(rollouts, Â [B]): the batch of a round, sampled once and judged. Raises InputError where nothing can be learnt."""
    rollouts = collect(base, tokenizer, problems, config.group, seed=seed, desc="rollouts", **config.sampling)
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        rollouts.save(folder / "rollouts.pt")
    advantage = group_advantages(rollouts.rewards, rollouts.groups, config.advantage)
    if not advantage.any():
        raise InputError(f"no problem has both right and wrong completions ({rollouts.rewards.mean():.0%} are right): "
                         "nothing to learn. Choose easier or harder --data, or raise --group or --max-new-tokens")
    return rollouts, advantage


def one_round(base, tokenizer, problems: Sequence[Problem], config: Config, *, seed: int = 0, watch: Callable = unwatched,
              folder: Path | None = None):
    """A round of ERPD from π_0 = `base`, which stays as it is; returns the student. `folder` takes the batch and the signal."""
    rollouts, advantage = stored_batch(base, tokenizer, problems, config, seed, folder)

    def drifted(name: str, rollouts: Rollouts, advantage: Tensor, loss: str, epochs: int) -> Tensor:
        """log π(y_t|s_t) [B, T] of a policy explored until it drifts, which is dropped once it has scored the batch."""
        model = explore(base, rollouts, advantage, config, loss=loss, epochs=epochs, seed=seed, desc=name, watch=watch)
        watch(name, model)
        return score(model, rollouts, config.temperature, config.tokens_per_step, desc=f"{name} scores the batch")

    log_unlearned, log_teachers = None, [None]
    if config.signal != "teacher":  # the same batch with its targets reversed: Â → −Â, r → 1 − r
        reversed_batch = replace(rollouts, rewards=1 - rollouts.rewards)
        log_unlearned = drifted("unlearned policy", reversed_batch, -advantage, config.unlearn_loss, config.unlearn_epochs)
    if config.signal != "unlearned":
        log_teachers = [drifted(f"extreme region policy ({loss})", rollouts, advantage, loss, config.explore_epochs)
                        for loss, _ in config.teachers]

    signals = [token_signal(config.signal, rollouts.log_probs, teacher, log_unlearned) for teacher in log_teachers]
    signal = signals[0]
    if len(signals) > 1:
        signal = combine_signals(signals, [weight for _, weight in config.teachers], rollouts.mask)
    if folder:
        torch.save(signal, folder / "signal.pt")

    student = distill(base, rollouts, signal, config, seed=seed, watch=watch)
    student, spent = within_budget(base, student, tokenizer, problems, config, seed)
    watch("ERPD student", student, kl_round=spent)
    return student


# ------------------------------------------------------------------------------------------- what ERPD is compared with

def direct(base, tokenizer, problems: Sequence[Problem], config: Config, *, seed: int = 0, watch: Callable = unwatched,
           folder: Path | None = None):
    """A round of an explorer's loss alone: the policy it ends in is the result."""
    rollouts, advantage = stored_batch(base, tokenizer, problems, config, seed, folder)
    model = explore(base, rollouts, advantage, config, loss=config.method, epochs=config.explore_epochs, seed=seed,
                    desc=config.method, watch=watch)
    watch(config.method, model)
    return model


def grpo(base, tokenizer, problems: Sequence[Problem], config: Config, *, seed: int = 0, watch: Callable = unwatched,
         folder: Path | None = None):
    """On-policy GRPO (2402.03300): `explore` with the clip loss, on fresh samples at every step.

    It sees every problem once, like a run of ERPD, so that both spend as many rollouts. Nothing is kept in `folder`.
    """
    model, optimizer = trainable(base, config.explore_lr, config.checkpointing)
    each = max(1, config.explore_batch // config.group)
    for step, start in enumerate(tqdm(range(0, len(problems), each), desc="grpo", unit="step", leave=False), 1):
        rollouts = collect(model, tokenizer, problems[start:start + each], config.group, seed=seed * 100_003 + step,
                           **config.sampling)
        advantage = group_advantages(rollouts.rewards, rollouts.groups, config.advantage)
        explore(base, rollouts, advantage, config, loss="clip", epochs=1, seed=step, resume=(model, optimizer),
                desc=f"grpo, {rollouts.rewards.mean():.1%} right")
        watch("grpo", model, step=step)
    watch("grpo", model)
    return model


# --------------------------------------------------------------------------------------------------------------- a run

def autocast(config: Config, device: torch.device):
    """The context of all computing: bf16 over fp32 weights where `precision` says so."""
    bf16 = config.precision == "bf16" or config.precision == "auto" and device.type == "cuda"
    return torch.autocast(device.type, torch.bfloat16, bf16, cache_enabled=False)  # weights change between passes


@dataclass
class Journal:
    """The evaluations of a run on held-out problems; each is a line of metrics.jsonl before anything else happens."""

    folder: Path
    base: torch.nn.Module  # where the first round starts: KL is measured from here
    tokenizer: object
    held_out: list[Problem]
    config: Config
    rows: list[dict] = field(default_factory=list)

    def measure(self, name: str, model, samples: int, **about) -> None:
        numbers = evaluate(model, self.base, self.tokenizer, self.held_out, samples, seed=self.config.seed, desc=name,
                           tokens_per_step=self.config.tokens_per_step, **self.config.sampling)
        self.rows.append({"policy": name, **about, **numbers})
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(self.rows[-1]) + "\n")
        tqdm.write(table(self.rows[-1:], header=len(self.rows) == 1))

    def watch(self, round: int, name: str, model, **about) -> None:
        """Evaluate a policy at the end of its stage; on its way after 1, 2, 4, 8 … epochs or steps."""
        count = about.get("epoch", about.get("step"))
        if count is None:
            self.measure(name, model, self.config.test_samples, round=round, **about)
        elif self.config.curve_samples and count & (count - 1) == 0:
            self.measure(name, model, self.config.curve_samples, round=round, **about)


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
    policy, tokenizer = load_policy(config.model, automatic if config.device == "auto" else config.device)
    policy.requires_grad_(False)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
    journal = Journal(folder, policy, tokenizer, held_out, config)

    one = {"erpd": one_round, "grpo": grpo}.get(config.method, direct)
    size = len(problems) if config.method == "grpo" else config.problems
    try:
        with autocast(config, policy.device):
            journal.measure("base", policy, max(config.test_samples, config.limit_samples), round=1)
            for k, start in enumerate(range(0, len(problems), size), 1):
                policy = one(policy, tokenizer, problems[start:start + size], config, seed=config.seed * 1000 + k,
                             watch=partial(journal.watch, k), folder=folder / f"round-{k}")
    except Diverged as error:
        save_policy(error.model, tokenizer, folder / "last_finite")
        raise InputError(f"{error}; its last finite weights are in {folder / 'last_finite'}: lower the learning rate") from None
    finally:
        if journal.rows:
            draw_frontier({config.method: journal.rows}, folder / "frontier.png",
                          config.kl_budget if config.method == "erpd" else None)
    save_policy(policy, tokenizer, folder / "policy")
    return journal.rows


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
        print(f"\n{table(ends(rows))}")
        print(f"\nruns/{config.run}/: policy/ (the final policy), metrics.jsonl (these rows), frontier.png")
    except InputError as error:
        print(f"erpd.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
