"""Extreme Region Policy Distillation (arXiv 2605.25582), from top to bottom; README.md says what is a reconstruction.

    python erpd.py                                    # the embedded policy: about a minute on a laptop
    python erpd.py --model Qwen/Qwen3-0.6B --data gsm8k ...

One round, with π_0 the policy it starts from (`one_round` below says the same in code):

1. *Rollouts.* Sample a batch of completions from π_0, once, and judge them.
2. *Explore* (stage 1). Squeeze a copy of π_0 on that fixed batch, in many passes and under weak constraints, until it
   drifts: the extreme region policy π_T. A short run on reversed targets gives the unlearned policy π_U, a worse one.
3. *Signal* (stage 2). Both become supervision: a log-ratio δ_t at every stored token. Then they are thrown away.
4. *Distil* (stage 2). From π_0 again, learn from δ_t on the same batch inside a trust region, with a KL budget.
5. *Next round.* π_0 ← the student, with new problems.

Compared with PPO or GRPO: one batch serves many passes, and π_old, which sampled it, never moves. By default the
explorer has no KL term and no clip that closes. Only its opinion of the stored tokens is used, so it may be worse than
π_0. That opinion is the distiller's advantage, token by token: no critic, and no outcome. And the distiller's KL is
exact, with a coefficient that follows from the KL you are willing to spend.
"""

import argparse
import copy
import json
import math
import os
import re
import signal as os_signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path

from rewards import InputError, Problem, group_advantages, load_problems

LOSSES = ("sapo", "ce", "mse", "nll", "clip")
CHOICES = {"method": ("erpd", "grpo", *LOSSES), "signal": ("teacher", "contrast", "unlearned"), "unlearn_loss": LOSSES,
           "advantage": ("std", "mean", "loo"), "precision": ("auto", "fp32", "bf16")}
SECTIONS = {"model": "policy, problems, run", "problems": "rollouts and evaluations", "loss": "stage 1: the explorer",
            "signal": "stage 2: the signal and the distiller", "tokens_per_step": "memory"}  # each by its first field
# What may be given beside --resume: how much memory and time a run takes, not its numbers, but for rounding.
CHANGEABLE = ("tokens_per_step", "sample_rows", "cuda_graph", "checkpointing")


# -------------------------------------------------------------------------------------------------------- configuration

def option(default, help: str, paper=None, zero: bool = False):
    """A field of Config: default, meaning with its unit, the paper's value where known, and whether it may be 0."""
    return field(default=default, metadata={"help": help, "paper": paper, "zero": zero})


@dataclass
class Config:
    """Every setting of a run; each field is an option on the command line."""

    model: str = option("tutorial/tiny_base", "folder or hub name of the base policy", "Qwen/Qwen3-4B-Thinking-2507")
    data: str = option("chain", "chain (built in), gsm8k, math500, aime24, aime25, polaris, hub id, file", "polaris")
    test_data: str = option("", "held-out problems (default: the test split of --data; a part, where it has one split)")
    question_field: str = option("", "field that holds the question, in both data sets (default: found by name)")
    answer_field: str = option("", "field that holds the answer, in both data sets (default: found by name)")
    operands: int = option(4, "numbers in a built-in chain problem")
    template: str = option("{question}", "the prompt; {question} stands for the problem, a line ends as in $'…\\n…'")
    method: str = option("erpd", "erpd; or, to compare, grpo (on-policy) or an explorer's loss by itself")
    run: str = option("", "name of the folder under runs/ that takes the results (default: METHOD-DATA-sSEED)")
    seed: int = option(0, "seeds the problems, the sampling and the training", zero=True)
    device: str = option("auto", "auto, cpu, cuda, cuda:1 …")

    problems: int = option(64, "problems a round, P", 1000)
    group: int = option(16, "completions a problem, G", 16)
    max_new_tokens: int = option(64, "longest completion, tokens", 32768)
    temperature: float = option(1.0, "sampling temperature; every log-prob is taken at it")
    rounds: int = option(4, "rounds; each starts from the last one's student, with new problems (grpo: one long)", 6)
    test_problems: int = option(128, "held-out problems of the evaluations")
    test_samples: int = option(4, "completions a held-out problem in the final table: k of avg@k and pass@k")
    curve_samples: int = option(1, "the same for the checkpoints on the way; 0 leaves them out", zero=True)
    limit_samples: int = option(16, "the same for the base, whose pass rates give the limit in the figure", zero=True)

    loss: str = option("sapo", f"the explorer's: one of {', '.join(LOSSES)}; several teachers as sapo:1,nll:0.5", "mse")
    explore_updates: int = option(64, "updates of the explorer, in passes over the stored batch")
    explore_lr: float = option(6e-5, "its learning rate, the unlearned policy's and GRPO's", 1e-6)
    explore_batch: int = option(64, "completions an update, in whole groups", 256)
    advantage: str = option("std", "group advantage Â: std, mean (not divided), loo (leave one out)")
    beta: float = option(1.0, "scale β of the sequence log-ratio in ce and mse")
    clip_low: float = option(0.2, "ε_low of the loss clip", zero=True)
    clip_high: float = option(0.28, "ε_high of the same", zero=True)
    kl_coef: float = option(0.0, "coefficient of an exact KL(π_θ‖π_0) in all losses but the distiller's", zero=True)
    unlearn_loss: str = option("mse", "the unlearned policy's loss, with reversed targets", "mse")
    unlearn_updates: int = option(32, "updates of the unlearned policy, in batches like the explorer's")

    signal: str = option("contrast", "δ_t: teacher (π_T over π_0), contrast (π_T over π_U), unlearned (π_0 over π_U)")
    distill_updates: int = option(128, "updates of the distiller, in passes over the stored batch", 250)
    distill_lr: float = option(4e-4, "its learning rate, times min(1, √budget); it falls to half of that", 1e-6)
    distill_batch: int = option(64, "completions an update, in whole groups", 64)
    distill_clip: float = option(10.0, "its ε: a wanted token's probability is pushed up to 1 + ε times π_0's")
    signal_bound: float = option(3.0, "bound on |δ_t|, in root mean squares of δ_t over the batch")
    kl_budget: float | str = option("auto", "KL(π_θ‖π_0) a round may spend, nats a completion; auto: from the limit")
    lambda_floor: float = option(0.75, "from a nat on λ's multiplier keeps this share of its start", zero=True)

    tokens_per_step: int = option(8192, "tokens in one forward and backward pass; the gradient does not depend on it")
    sample_rows: int = option(1024, "completions sampled side by side, but at least those of one problem")
    cuda_graph: int = option(0, "1: a sampled token is one launch; not yet measured on a GPU", zero=True)
    checkpointing: int = option(0, "1: layers run again in the backward pass: less memory, more time", zero=True)
    precision: str = option("auto", "fp32; bf16 (autocast over fp32 weights); auto: bf16 on CUDA")

    def __post_init__(self):
        try:
            self.kl_budget = self.kl_budget if self.kl_budget == "auto" else float(self.kl_budget)
        except ValueError:
            raise InputError(f"--kl-budget {self.kl_budget!r} is no number: give nats a completion or auto") from None
        for f in fields(self):
            value, name = getattr(self, f.name), "--" + f.name.replace("_", "-")
            if value not in CHOICES.get(f.name, (value,)):
                raise InputError(f"{name} {value!r} is unknown: choose one of {', '.join(CHOICES[f.name])}")
            if isinstance(value, (int, float)) and not (0 < value < 2**31 or value == 0 and f.metadata["zero"]):
                least = "of at least" if f.metadata["zero"] else "above"
                raise InputError(f"{name} {value!r} is out of range: it must be a number {least} 0 and below 2**31")
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise InputError(f"--device {self.device!r} is unknown: give auto, cpu, cuda, or one card as cuda:1")
        teacher = rf"({'|'.join(LOSSES)})(:-?\d+(\.\d+)?)?"
        if not re.fullmatch(f"{teacher}(,{teacher})*", self.loss):
            raise InputError(f"--loss {self.loss!r} is unknown: name some of {', '.join(LOSSES)}, as in sapo:1,nll:0.5")
        if len(self.teachers) == 1 and ":" in self.loss:
            raise InputError(f"--loss {self.loss!r}: weights are relative to one another, and one teacher needs none")
        if len(self.teachers) > 1 and (self.signal == "unlearned" or not any(weight for _, weight in self.teachers)):
            raise InputError(f"--loss {self.loss!r}: several teachers need weights and another --signal than unlearned")
        if self.group < 2:
            raise InputError(f"--group {self.group}: an advantage compares completions of one problem: give at least 2")
        if Path(self.run).name != self.run or self.run == "..":
            raise InputError(f"--run {self.run!r} must be the name of a folder under runs/, and no path")
        if "{question}" not in self.template:
            raise InputError(f"--template {self.template!r} must contain {{question}}")
        self.run = self.run or f"{self.method}-{Path(self.data).stem}-s{self.seed}"

    @property
    def teachers(self) -> list[tuple[str, float]]:
        """(loss, weight) of every teacher named in `loss`."""
        parts = [part.partition(":") for part in self.loss.split(",")]
        return [(loss, float(weight or 1)) for loss, _, weight in parts]

    @property
    def sampling(self) -> dict:
        """What `collect` takes, also by way of `evaluate`."""
        return {"max_new_tokens": self.max_new_tokens, "temperature": self.temperature, "template": self.template,
                "rows": self.sample_rows, "cuda_graph": self.cuda_graph}


# ----------------------------------------------------------------------------------------------------- the command line

def read_arguments(arguments: Sequence[str] | None = None) -> tuple[Config, Path]:
    """The command line as a Config, and the run's folder. Raises InputError."""
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise InputError(f"{message} (python erpd.py --help lists every option)")

    parser = Parser(prog="erpd.py", usage="python erpd.py [--option value …]", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS)
    parser.add_argument("--resume", metavar="FOLDER", help="go on with the run in this folder, with its own settings; "
                        f"beside it only --{', --'.join(CHANGEABLE).replace('_', '-')}")
    parser.add_argument("--paper", action="store_true", help="start from the paper's own settings; give your "
                        "--sample-rows and --template beside them")
    papers = {f.name: f.metadata["paper"] for f in fields(Config) if f.metadata["paper"] is not None}
    for f in fields(Config):
        if f.name in SECTIONS:
            section = parser.add_argument_group(SECTIONS[f.name])
        values = [str(f.default)] * (f.default != "") + [f"the paper: {papers.get(f.name)}"] * (f.name in papers)
        text = f.metadata["help"] + (f" [{'; '.join(values)}]" if values else "")
        section.add_argument("--" + f.name.replace("_", "-"), type=type(f.default), help=text.replace("%", "%%"),
                             metavar=type(f.default).__name__.upper())
    given = vars(parser.parse_args(arguments))  # defaults are left out
    if "resume" in given:
        folder = Path(given.pop("resume"))
        if other := min(given.keys() - CHANGEABLE, default=""):
            raise InputError(f"--resume {folder} takes the settings of that run: leave --{other.replace('_', '-')} out")
        try:
            return Config(**json.loads((folder / "config.json").read_text()) | given), folder
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"--resume {folder}: there is no run of this version to go on with ({error})") from None
    config = Config(**(papers if given.pop("paper", False) else {}) | given)
    folder, model = Path("runs") / config.run, Path(config.model)
    if (model.is_dir() or config.model.count("/") > 1) and not (model / "config.json").is_file():
        raise InputError(f"--model {config.model!r} is no checkpoint folder: there is no {model / 'config.json'}")
    if folder.exists():
        raise InputError(f"{folder} exists: go on with it by --resume {folder}, name another with --run, or remove it")
    return config, folder


def problems_of(config: Config) -> tuple[list[Problem], list[Problem]]:
    """The problems of all rounds, and those held out. Raises InputError, also where these are not other problems."""
    sources = {"seed": config.seed, "operands": config.operands, "question_field": config.question_field,
               "answer_field": config.answer_field, "divide": config.test_data in ("", config.data)}
    train = load_problems(config.data, "train", config.problems * config.rounds, **sources)
    held_out = load_problems(config.test_data or config.data, "test", config.test_problems, **sources)
    if shared := {p.question.strip() for p in train} & {p.question.strip() for p in held_out}:
        raise InputError(f"{len(shared)} held-out problems are trained on, too, such as {min(shared)[:60]!r}: give "
                         "other --test-data, or none, to have --data divided")
    return train, held_out


def ended(reason: Exception | str, status: int = 2, alone: bool = False) -> int:
    """One line of why, from one process of a machine or from one that is `alone` with it; returns the exit status."""
    if alone or os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"erpd.py: {reason}", file=sys.stderr)
    return status


if __name__ == "__main__":  # what is wrong is told before torch and transformers take seconds; `run` reads it again
    if os.environ.get("LOCAL_RANK", "0") != "0":
        os.environ["TQDM_DISABLE"] = "1"  # of several processes one shows its progress; tqdm asks as it is imported
    os_signal.signal(os_signal.SIGINT, lambda *_: os._exit(ended("stopped", 130)))  # until `main` takes over
    try:
        problems_of(read_arguments()[0])
    except (InputError, OSError) as error:
        sys.exit(ended(error))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402
from tqdm import tqdm  # noqa: E402

import kl  # noqa: E402
from figures.frontier import draw_frontier, ends, table  # noqa: E402
from rollout import (Memory, Rollouts, added_up, autocast, collect, completion_stats, completion_texts,  # noqa: E402
                     divergence, evaluate, gathered, join, load_policy, micro_batches, mini_batches, rank, ranks,
                     save_policy, score, trainable)


# ----------------------------------------------------------------------------------------------------------- one update

def optimise(model, optimizer, rollouts: Rollouts, advantage: Tensor, objective: Callable, config: Config, stage: str,
             reference=None) -> dict[str, float]:
    """One update of `model` on some of the stored completions, in micro-batches; returns the loss before it, the
    entropy, nats a token, and the KL to `reference`, or to what sampled them, nats a completion (kl.on_policy_kl).

    advantage is [B, T], as wide as the stored batch. `objective(stats, part, advantage, tokens, completions)` gives the
    loss of a micro-batch from the policy's `stats`: log-probs, entropy and, with the `reference` π_0, exact KL to it,
    [b, T] each. The gradient's norm is clipped at 1. Where loss or gradient are not finite it raises
    FloatingPointError(stage, model), and the model has its last finite weights.
    """
    # Every micro-batch divides by the counts of the whole update: then their gradients add up to the update's.
    tokens, completions = int(rollouts.length.sum()), len(rollouts)
    shown, seen = torch.zeros(2, device=model.device), []
    for rows in micro_batches(rollouts, config.tokens_per_step):
        # Completions of like lengths: one forward pass of the policy, and one of the reference without gradients.
        part = rollouts.select(rows)
        stats = completion_stats(model, part, config.temperature, with_entropy=True, reference=reference)
        part, width = part.to(model.device), part.log_probs.shape[1]
        # Not blocking, or the host would wait for the forward pass here.
        loss = objective(stats, part, advantage[rows, :width].to(model.device, non_blocking=True), tokens, completions)
        # Gradients add up on the weights; what is shown adds up where it is, without waiting for the device.
        loss.backward()
        shown += torch.stack([loss.detach(), kl.masked_mean(stats.entropy, part.mask, tokens)])
        # kl.on_policy_kl weighs completions against one another: it waits for those of all micro-batches.
        log_ratio = stats.log_prob.detach() - part.log_probs
        token_kl = kl.k3_off_policy(log_ratio) if reference is None else stats.kl.detach()
        seen.append(F.pad(torch.stack([token_kl, log_ratio, part.mask]), (0, advantage.shape[1] - width)))
        del stats, loss  # and with them, under autocast, the reference's lowered output embedding
    loss, mean_entropy = added_up(model, shown)
    spent = kl.on_policy_kl(*torch.cat(gathered([part.cpu() for part in seen]), 1)).item()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if not torch.isfinite(loss + norm):  # asked before the weights change
        raise FloatingPointError(stage, model)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"loss": loss, "kl": spent, "entropy": mean_entropy}


def checkpoints(updates: int) -> set[int]:
    """Where a stage is looked at on its way: after 1/16, 1/8, 1/4 and 1/2 of its updates."""
    return {updates >> k for k in range(1, 5)}


def unwatched(name: str, model, **about) -> None:
    """A `watch` that does nothing. That of `run` evaluates a policy: at the end of its stage, and with update=… on the
    way there."""


def passes(model, optimizer, rollouts: Rollouts, size: int, updates: int, seed: int, stage: str, watch: Callable,
           memory: Memory, more: dict) -> Iterator:
    """(rows, updates done before, show) of each update, in passes over the stored batch. `show(numbers)` puts them on
    the progress bar and into `memory`.

    `watch` is called with update=… at checkpoints on the way. At the end of a pass, now and then, `memory` takes all
    that the stage needs to go on, and `more`; where a stage goes on, `more` is filled in again, in place.
    """
    def show(numbers: dict[str, float]) -> None:
        bar.set_postfix(numbers, refresh=False)
        memory.note(stage, done, numbers)

    generator = torch.Generator().manual_seed(seed)
    done = memory.resume_stage(stage, model, optimizer, more)
    generator.set_state(more.get("shuffle", generator.get_state()))
    with tqdm(total=updates, initial=done, desc=stage, unit="update", leave=False) as bar:
        while done < updates:
            for rows in mini_batches(rollouts, size, generator)[:updates - done]:
                yield rows, done, show
                done += 1
                bar.update()
                if done in checkpoints(updates):
                    watch(stage, model, update=done)
            memory.put_stage(stage, model, optimizer, more | {"shuffle": generator.get_state()}, done)


# ------------------------------------------------------------------------------------------------ stage 1: the explorer

def explorer_loss(name: str, log_prob: Tensor, part: Rollouts, advantage: Tensor, tokens: int, completions: int,
                  config: Config) -> Tensor:
    """One of the explorer's losses on a micro-batch [], to be minimised, from log π_θ(y_t|s_t) [B, T] and Â [B, T] or
    [B, 1], equal along a row."""
    log_ratio = log_prob - part.log_probs  # log ρ_t = log π_θ − log π_0
    if name == "sapo":  # −mean_t f(ρ_t)·Â
        return -kl.masked_mean(kl.soft_gate_surrogate(log_ratio.exp(), advantage), part.mask, tokens)
    if name == "clip":  # −mean_t min(ρ_t·Â, clip(ρ_t)·Â)
        surrogate = kl.clipped_surrogate(log_ratio.exp(), advantage, config.clip_low, config.clip_high)
        return -kl.masked_mean(surrogate, part.mask, tokens)
    if name == "nll":  # −mean_t r·log π_θ: cross-entropy on the right completions
        return -kl.masked_mean(log_prob, part.mask * part.rewards[:, None], tokens)
    implicit_reward = config.beta * (log_ratio * part.mask).sum(-1)  # R = β Σ_t log ρ_t [B]
    if name == "ce":  # −[r·log σ(R) + (1 − r)·log σ(−R)]: the implicit reward as a classifier (2412.01981)
        return F.binary_cross_entropy_with_logits(implicit_reward, part.rewards, reduction="sum") / completions
    if name == "mse":  # (R − Â)²: regression on the log-ratio (REBEL without its pairs, 2404.16767)
        return (implicit_reward - advantage[:, 0]).square().sum() / completions
    raise ValueError(f"unknown loss {name!r}")


def explore(base, rollouts: Rollouts, advantage: Tensor, config: Config, *, loss: str, updates: int, seed: int = 0,
            stage: str = "explorer", watch: Callable = unwatched, memory: Memory = Memory(),
            start: tuple | None = None):
    """Stage 1: many off-policy updates on the fixed batch, from π_0 = `base`; returns the policy they end in.

    advantage is Â [B]. Every ρ_t is against the stored behaviour log-probs: π_0's, or in GRPO those of the policy as it
    is now, a (model, optimizer) to `start` from. For the unlearned policy give targets reversed: −Â and 1 − r. `memory`
    knows a stage by its name: give another loss another one.
    """
    if advantage.shape != rollouts.rewards.shape:
        raise ValueError(f"explore takes one advantage a completion, not {tuple(advantage.shape)}")
    model, optimizer = start or trainable(base, config.explore_lr, config.checkpointing)

    def objective(stats, part, advantage, tokens, completions):
        value = explorer_loss(loss, stats.log_prob, part, advantage, tokens, completions, config)
        if config.kl_coef:
            value = value + config.kl_coef * kl.masked_mean(stats.kl, part.mask, tokens)
        return value

    advantage = advantage[:, None].expand_as(rollouts.log_probs)  # all tokens of a completion share it
    size, reference = config.explore_batch, (base if config.kl_coef else None)
    for rows, _, show in passes(model, optimizer, rollouts, size, updates, seed, stage, watch, memory, {}):
        batch = rollouts.select(rows)
        show(optimise(model, optimizer, batch, advantage[rows], objective, config, stage, reference))
    return model


# -------------------------------------------------------------------------------------------------- stage 2: the signal

def token_signal(kind: str, log_base: Tensor, log_teacher: Tensor | None, log_unlearned: Tensor | None) -> Tensor:
    """δ_t [B, T], nats: what the drifted policies say of every stored token. All arguments are log-probs [B, T] of it.

        teacher    log π_T − log π_0
        contrast   log π_T − log π_U     drift that both have in common cancels
        unlearned  log π_0 − log π_U     a policy that got worse teaches alone

    By Bayes π_0(y_t|s_t, right)/π_0(y_t|s_t) = P(right|s_t, y_t)/P(right|s_t): a teacher that became π_0 given right
    gives increments of log P(right), one that became π_0 given wrong increments of −log P(wrong), their contrast
    increments of the log-odds. Their sum has the sign of the outcome: credit assignment without a critic.
    """
    better, worse = {"teacher": (log_teacher, log_base), "contrast": (log_teacher, log_unlearned),
                     "unlearned": (log_base, log_unlearned)}.get(kind, (None, None))
    if better is None or worse is None:
        raise ValueError(f"signal {kind!r} needs other log-probs than were given")
    return better - worse


def combine_signals(signals: Sequence[Tensor], weights: Sequence[float], mask: Tensor) -> Tensor:
    """Σ_k w_k·δ^k / rms(δ^k) [B, T]: several teachers, each brought to one scale first."""
    return sum(w * normalised(signal, mask) for w, signal in zip(weights, signals, strict=True))


def normalised(signal: Tensor, mask: Tensor, bound: float = math.inf) -> Tensor:
    """δ_t over its root mean square on the batch, bounded [B, T]. Not centred: see least_variance_baseline."""
    rms = kl.masked_mean(signal.square(), mask).sqrt()
    return (signal / rms.clamp(min=1e-8) * mask).clamp(-bound, bound)


def least_variance_baseline(advantage: Tensor, log_probs: Tensor, mask: Tensor) -> Tensor:
    """b [] = Σ w_t·A_t / Σ w_t, w_t = (1 − π_0(y_t|s_t))²: near the baseline of least variance (Greensmith, 2004).

    No constant changes what A_t − b teaches on average, since E_{y~π}[∇log π] = 0, but it does change the noise; w_t
    stands for |∇log π_0(y_t|s_t)|², which in the logits is 1 to 2 times that. While π_0 is unsure, b is small. When it
    is nearly always right, the tokens with any weight are its mistakes, so that b is near their A, and a right token
    has A_t − b > 0 at every state, not only where a mistake happened to be sampled.
    """
    weight = (1 - log_probs.exp()).square()
    return kl.masked_mean(weight * advantage, mask) / kl.masked_mean(weight, mask).clamp(min=1e-8)


# ----------------------------------------------------------------------------------------------- stage 2: the distiller

def round_budget(rollouts: Rollouts, config: Config) -> float:
    """KL that the round may spend, nats a completion: as it was given, or `auto`, from the batch's own pass rates."""
    if config.kl_budget != "auto":
        return config.kl_budget
    groups, problem, size = rollouts.groups.unique(return_inverse=True, return_counts=True)
    return kl.budget_from_limit(torch.zeros(len(groups)).index_add_(0, problem, rollouts.rewards), size)


def distill(base, rollouts: Rollouts, signal: Tensor, budget: float, config: Config, *, seed: int = 0,
            watch: Callable = unwatched, memory: Memory = Memory()):
    """Stage 2: from π_0 again, learn from δ_t [B, T] on the same batch, inside a trust region; returns the student.

        maximise  mean_t min(ρ_t·A_t, clip(ρ_t)·A_t) − λ·mean_t KL_t(π_θ‖π_0),      A_t = bounded δ_t / rms(δ) − b

    KL_t is exact over the vocabulary, at the prefixes of the stored batch. λ begins at 1/√budget (what is gained grows
    like √KL, so its slope goes like 1/√KL) and follows by dual ascent: its multiplier rises while the KL on the
    policy's own prefixes, estimated from the stored ones (kl.on_policy_kl), is above the budget, and falls below. A
    budget of a nat or more may be more than is of use, and is a bound, not a goal: there the multiplier falls to
    `lambda_floor` of its start at most. The outcome Â is not mixed in: what the student learns, it has from δ_t alone.

    What single updates add is noise, and noise costs KL. So b is a baseline that lowers it; below a nat the
    learning rate goes like √budget, as the distance that may be gone; and the student is the mean of its weights over
    the second half of the updates (Polyak and Ruppert), while the rate falls to half.
    """
    radius = math.sqrt(budget)
    least = config.lambda_floor / radius if budget >= 1 else 0.0
    model, optimizer = trainable(base, config.distill_lr, config.checkpointing)
    advantage = normalised(signal, rollouts.mask, config.signal_bound)
    advantage = (advantage - least_variance_baseline(advantage, rollouts.log_probs, rollouts.mask)) * rollouts.mask
    # What a resumed stage goes on with: `passes` fills it in.
    state = {"multiplier": 1 / radius, "coefficient": 1 / radius, "mean": {}}

    def objective(stats, part, advantage, tokens, completions):
        log_ratio = stats.log_prob - part.log_probs
        # A wanted token is pushed up to ρ = 1 + ε: from 5 % to 55 %, where ε = 1 would stop at 10 %. For an unwanted
        # one the clip never closes where ε ≥ 1, since ρ > 0: KL alone restrains a push that fades as ρ falls.
        surrogate = kl.clipped_surrogate(log_ratio.exp(), advantage, config.distill_clip, config.distill_clip)
        return kl.masked_mean(state["coefficient"] * stats.kl - surrogate, part.mask, tokens)

    stage, size, count = "student on its way", config.distill_batch, config.distill_updates
    for rows, done, show in passes(model, optimizer, rollouts, size, count, seed, stage, watch, memory, state):
        optimizer.param_groups[0]["lr"] = config.distill_lr * min(1, radius) * (1 - done / count / 2)
        numbers = optimise(model, optimizer, rollouts.select(rows), advantage[rows], objective, config, stage, base)
        state["multiplier"], state["coefficient"] = kl.dual_ascent(state["multiplier"], numbers["kl"], budget,
                                                                   least=least)
        show(numbers | {"lambda": state["coefficient"]})
        if (averaged := done + 1 - count // 2) > 0:
            for name, weight in model.named_parameters():
                mean = state["mean"].get(name, weight.detach()).to(weight.device)  # resumed, it is on the CPU
                state["mean"][name] = mean.lerp(weight.detach(), 1 / averaged)
    model.load_state_dict(state["mean"], strict=False)  # buffers, such as a mask, are not trained
    return model


def within_budget(base, student, tokenizer, problems: Sequence[Problem], budget: float, config: Config, seed: int = 0):
    """(the student, moved back towards π_0 until its on-policy KL is within the budget; that KL, nats a completion)."""
    def measure(alpha: float) -> float:
        policy = kl.interpolated(base, student, alpha)
        # The KL of a policy is known only from its own samples. All trials have the same noise (on the batch's own
        # problems, that of the batch); their rewards are not used.
        rollouts = collect(policy, tokenizer, problems[:128], 4, seed=seed, desc="spending check", **config.sampling)
        return divergence(policy, base, rollouts, config.temperature, config.tokens_per_step)["kl"]

    alpha, spent = kl.largest_step_within(measure, budget)
    if alpha == 0:
        tqdm.write(f"no step that was tried keeps to {budget:g} nats: the student stays where the round began")
    return kl.interpolated(base, student, alpha), spent


# ------------------------------------------------------------------------------------------------------------ one round

class NothingToLearn(InputError):
    """No problem of a round has both right and wrong completions."""


def sampled(policy, tokenizer, problems: Sequence[Problem], config: Config, seed: int) -> Rollouts:
    """Rollouts to train on: sampled, judged, and with the log-probs that a training pass gives them."""
    rollouts = collect(policy, tokenizer, problems, config.group, seed=seed, desc="rollouts", **config.sampling)
    # The sampler's own, from a cache of keys and values, are those up to rounding. In bf16 that is 0.05 nats a token
    # and 0.65 on 108 tokens (SmolLM2), as much as there is to learn: ρ_t would not begin at 1, nor Σ_t log ρ_t at 0.
    log_probs = score(policy, rollouts, config.temperature, config.tokens_per_step, desc="their log-probs")
    return replace(rollouts, log_probs=log_probs)


def stored_batch(base, tokenizer, problems: Sequence[Problem], config: Config, seed: int, memory: Memory = Memory()):
    """(rollouts, Â [B]): a round's batch, sampled once and judged. Raises NothingToLearn."""
    if (stored := memory.get("rollouts")) is None:
        memory.put("rollouts", stored := vars(sampled(base, tokenizer, problems, config, seed)))
    rollouts = Rollouts(**stored)
    advantage = group_advantages(rollouts.rewards, rollouts.groups, config.advantage)
    if not advantage.any():
        said, wanted = completion_texts(tokenizer, rollouts.select(torch.tensor([0])))[0], problems[0].answer
        raise NothingToLearn(
            f"no problem has both right and wrong completions ({rollouts.rewards.mean():.0%} are right): nothing to "
            f"learn. Choose easier or harder --data, or raise --group or --max-new-tokens. The first ends in "
            f"{said[-60:]!r}, where {wanted[-60:]!r} is right")
    return rollouts, advantage


def one_round(base, tokenizer, problems: Sequence[Problem], config: Config, *, seed: int = 0,
              watch: Callable = unwatched, memory: Memory = Memory(), others: Sequence[Problem] = ()):
    """A round of ERPD from π_0 = `base`, which stays as it is; returns the student. `memory` takes batch and signal.

    The KL is checked on problems of other rounds, `others`, since its own can mislead: in an earlier version one round
    spent 0.03 nats there and 0.27 elsewhere, and lost 6 points. Without others it is checked on its own.
    """
    rollouts, advantage = stored_batch(base, tokenizer, problems, config, seed, memory)

    def drifted(name: str, batch: Rollouts, targets: Tensor, loss: str, updates: int, watch_updates=watch) -> Tensor:
        """log π(y_t|s_t) [B, T] of a policy explored until it drifts, which is dropped once it has scored the batch."""
        if (scores := memory.get(name)) is None:
            model = explore(base, batch, targets, config, loss=loss, updates=updates, seed=seed, stage=name,
                            watch=watch_updates, memory=memory)
            watch(name, model)
            scores = score(model, batch, config.temperature, config.tokens_per_step, desc=f"{name} scores the batch")
            if not scores.isfinite().all():
                raise InputError(f"the {name} gives a stored token no probability at all: fewer updates or a lower "
                                 "learning rate leave it something to say")
            memory.put(name, scores)
        return scores

    log_unlearned, log_teachers = None, [None]  # where the signal does not need them
    if config.signal != "teacher":  # the targets reversed: Â → −Â, r → 1 − r; only its end is evaluated
        log_unlearned = drifted("unlearned policy", replace(rollouts, rewards=1 - rollouts.rewards), -advantage,
                                config.unlearn_loss, config.unlearn_updates, watch_updates=unwatched)
    if config.signal != "unlearned":
        log_teachers = [drifted(f"extreme region policy ({loss})", rollouts, advantage, loss, config.explore_updates)
                        for loss, _ in config.teachers]

    signals = [token_signal(config.signal, rollouts.log_probs, teacher, log_unlearned) for teacher in log_teachers]
    weights = [weight for _, weight in config.teachers]
    signal = signals[0] if len(signals) == 1 else combine_signals(signals, weights, rollouts.mask)
    memory.put("signal", signal)

    budget = round_budget(rollouts, config)
    student = distill(base, rollouts, signal, budget, config, seed=seed, watch=watch, memory=memory)
    student, spent = within_budget(base, student, tokenizer, others or problems, budget, config, seed)
    watch("ERPD student", student, kl_round=spent, kl_budget=budget)
    return student


# ------------------------------------------------------------------------------------------- what ERPD is compared with

def direct(base, tokenizer, problems: Sequence[Problem], config: Config, *, seed: int, watch: Callable, memory: Memory):
    """A round of an explorer's loss by itself; returns the policy it ends in."""
    rollouts, advantage = stored_batch(base, tokenizer, problems, config, seed, memory)
    return explore(base, rollouts, advantage, config, loss=config.method, updates=config.explore_updates, seed=seed,
                   stage=config.method, watch=watch, memory=memory)


def grpo(base, tokenizer, problems: Sequence[Problem], config: Config, *, seed: int = 0, watch: Callable = unwatched,
         memory: Memory = Memory()):
    """On-policy GRPO (2402.03300): `explore` with the clip loss, on fresh samples at every update; nothing is stored.
    Here the mean is over an update's tokens, not by completion, and there is no KL term unless --kl-coef asks for one.

    It sees every problem once, like a run of ERPD, so that both spend as many rollouts. With one update a sample every
    ρ_t is 1: the clip has nothing to do, and this is the policy gradient with group advantages.
    """
    model, optimizer = trainable(base, config.explore_lr, config.checkpointing)
    done = memory.resume_stage("grpo", model, optimizer, {})
    each = max(1, config.explore_batch // config.group)
    batches = [problems[start:start + each] for start in range(0, len(problems), each)]
    for update, batch in enumerate(tqdm(batches[done:], desc="grpo", unit="update", leave=False), done + 1):
        rollouts = sampled(model, tokenizer, batch, config, seed * 100_003 + update)
        advantage = group_advantages(rollouts.rewards, rollouts.groups, config.advantage)
        explore(base, rollouts, advantage, config, loss="clip", updates=1, seed=update, start=(model, optimizer),
                stage=f"grpo, {rollouts.rewards.mean():.1%} right")
        if update in checkpoints(len(batches)):
            watch("grpo", model, update=update)
        memory.note("grpo", update - 1, {"right": rollouts.rewards.mean().item()})
        memory.put_stage("grpo", model, optimizer, {}, update)
    return model


# ---------------------------------------------------------------------------------------------------------------- a run

def run(config: Config, folder: Path) -> list[dict]:
    """Rounds of ERPD, or a direct method. Writes `folder` as it goes and returns the rows of its metrics.jsonl.

    A run that was stopped goes on in its folder from the last state written, and ends as if it had not been.
    """
    settings = asdict(config)
    memory = Memory(folder, json.dumps({name: value for name, value in settings.items() if name not in CHANGEABLE}))
    last = memory.get("policy") or {"round": 0}  # of the last round that was done
    if (rows := memory.get("rows")) is None:  # this is the beginning, or they are damaged: each round has its own, and
        rows = sum((memory.inside(f"round-{k + 1}").get("rows") or [] for k in range(last["round"])), [])
        memory.inside(f"round-{last['round'] + 1}").keep("rollouts")  # those of the round begun are measured again
    problems, held_out = problems_of(config)
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    first, tokenizer = load_policy(config.model, automatic if config.device == "auto" else config.device)
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")

    def watch(round: int, name: str, model, samples: int = config.test_samples, **about) -> None:
        """Evaluate a policy, on its way with fewer samples. Its row is on disk at once, and not measured again."""
        samples = config.curve_samples if "update" in about else samples
        this = name, round, about.get("update")
        if samples and not any(this == (row["policy"], row["round"], row.get("update")) for row in rows):
            numbers = evaluate(model, first, tokenizer, held_out, samples, seed=config.seed, desc=name,
                               pass_k=config.test_samples, tokens_per_step=config.tokens_per_step, **config.sampling)
            rows.append({"policy": name, "round": round, **about, **numbers})
            memory.put("rows", rows)
            tqdm.write(table(rows[-1:], header=len(rows) == 1))
        if rank() == 0:
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    policy, size = first, (len(problems) if config.method == "grpo" else config.problems)
    if last["round"]:
        policy = copy.deepcopy(first)
        policy.load_state_dict(last.pop("weights"))
    try:
        with autocast(config.precision, first.device):
            watch(1, "base", first, max(config.test_samples, config.limit_samples))
            for k in range(last["round"] + 1, len(problems) // size + 1):
                here, start, end = memory.inside(f"round-{k}"), (k - 1) * size, k * size
                others = problems[end:] + problems[:start]
                one = {"erpd": partial(one_round, others=others), "grpo": grpo}.get(config.method, direct)
                policy = one(policy, tokenizer, problems[start:end], config, seed=config.seed * 1000 + k,
                             watch=partial(watch, k), memory=here)
                if config.method != "erpd":
                    watch(k, config.method, policy)
                here.keep("rollouts", "signal")
                here.put("rows", [row for row in rows if row["round"] == k])
                memory.put("policy", {"round": k, "weights": policy.state_dict()})
    except NothingToLearn as reason:
        if policy is first:
            raise
        ended(f"round {k} was not begun: {reason}")
    except FloatingPointError as error:
        stage, model = error.args
        save_policy(model, tokenizer, folder / "last_finite")
        raise InputError(f"{stage} stopped, its loss is no longer finite: lower its learning rate (the last finite "
                         f"weights are in {folder / 'last_finite'})") from None
    finally:
        if rows and rank() == 0:
            draw_frontier({config.method: rows}, folder / "frontier.png")
    save_policy(policy, tokenizer, folder / "policy")
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    folder, status, alone = None, 2, False
    try:
        config, folder = read_arguments(arguments)
        join(config.device)
        print(f"{config.method} on {config.data} with {config.model}: the results go to {folder}/\n")
        rows = run(config, folder)
        print(f"\n{table(ends(rows))}")
        print(f"\n{folder}/: policy/ (the final policy), metrics.jsonl (these rows), frontier.png")
        return 0
    except InputError as error:
        return ended(error)
    except OSError as error:  # a full disk, a folder that cannot be written
        reason = str(error)
    except KeyboardInterrupt:
        reason, status = "stopped", 130
    except torch.OutOfMemoryError:
        alone, reason = True, ("the GPU's memory is full: a lower --tokens-per-step or --sample-rows, or "
                               "--checkpointing 1, takes less, also beside --resume")
    except RuntimeError as error:
        if ranks() == 1 or not re.search("peer|remote", str(error)):  # the words of gloo and NCCL
            raise
        reason, status = "another process of this job has ended", 1
    if folder and (folder / "config.json").is_file():  # something has begun
        reason += f"; python erpd.py --resume {folder} goes on from here"
    return ended(reason, status, alone)


if __name__ == "__main__":
    for sent in os_signal.SIGINT, os_signal.SIGTERM:  # Ctrl-C, and what a scheduler or torchrun sends
        os_signal.signal(sent, os_signal.default_int_handler)
    sys.exit(main())
