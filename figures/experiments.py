"""What figures/claims.py judges, measured: every policy of every method, on problems that none of them saw.

A *stage* is a base policy, its problems, a size of batch and a seed. A *job* is one path of policies on a stage: the
checkpoints of an explorer, students at a ladder of budgets, a policy moved back towards the base step by step. All jobs
of a stage share the stored batch and the held-out problems. The rows of a job are written together when it ends, a JSON
line each, and a job that has rows is not run again.
"""

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import erpd  # noqa: E402
import kl  # noqa: E402
import rollout  # noqa: E402
from rewards import Problem, load_problems  # noqa: E402

STEPS_BACK = (0.25, 0.5, 0.75, 0.9)  # of the interpolations; the policy itself, 1, is on its own path
FALLEN = -5.0  # a stored completion has fallen when log π_θ/π_0 of it is below this, nats


@dataclass(frozen=True)
class Stage:
    """Where methods are compared. `config` has all settings; `carries` keeps the chains with so many dropped-carry
    traps."""

    name: str
    config: erpd.Config
    carries: tuple[int, ...] = ()
    rates: tuple[float, ...] = (3e-5, 1e-4, 3e-4)  # learning rates of every direct method
    least: int = 256  # updates of a direct method before it may stop, and the most there are
    most: int = 2048
    nll_least: int = 512  # of cross-entropy, the strongest
    budgets: tuple[float, ...] = (0.25, 0.5, 0.9, 1.4)  # the students' ladder, nats a completion; none: the round's
    everything: bool = True  # False: the frontier alone
    all_weights: bool = True  # of the direct methods' checkpoints stay on disk; False: the most accurate one's
    shares: tuple[float, ...] = ()  # of the gap, for rounds with other budgets than the default's

    @property
    def key(self) -> str:
        return f"{self.name}-s{self.config.seed}"


def carries(question: str) -> int:
    """Steps of a chain in which the units carry: where the embedded policy's habit can strike."""
    total, *rest = (int(n) for n in question.rstrip("=").split("+"))
    count = 0
    for n in rest:
        count += total % 10 + n % 10 >= 10
        total += n
    return count


class Combined(torch.nn.Module):
    """The policy π ∝ Π_k π_k^w_k of several models: decoding in the logits, without training. w may add up to anything.

    One model with w = 1/T is that model at temperature T; (1 − λ, λ) goes from one policy to another.
    """

    def __init__(self, models, weights):
        super().__init__()
        self.models, self.weights = torch.nn.ModuleList(models), weights
        self.config, self.generation_config = models[0].config, models[0].generation_config

    @property
    def device(self):
        return self.models[0].device

    def get_output_embeddings(self):
        return None  # the logits are no linear layer's

    def forward(self, past_key_values=None, **inputs):
        count = len(self.models)
        caches = [None] * count
        if past_key_values is not None:
            share = len(past_key_values.layers) // count
            caches = [DynamicCache() for _ in self.models]
            for k, cache in enumerate(caches):
                cache.layers = past_key_values.layers[k * share:(k + 1) * share]
        outputs = [model(past_key_values=cache, **inputs) for model, cache in zip(self.models, caches)]
        logits = sum(w * kl.log_softmax(output.logits) for w, output in zip(self.weights, outputs))
        if outputs[0].past_key_values is not None and past_key_values is None:
            past_key_values = DynamicCache()
            past_key_values.layers = [layer for output in outputs for layer in output.past_key_values.layers]
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)


@dataclass
class Bench:
    """One stage at work. `folder` keeps what is only a means: weights of checkpoints."""

    stage: Stage
    folder: Path
    rows: list[dict] = field(default_factory=list)

    def __post_init__(self):
        self.config = self.stage.config
        self.seed = self.config.seed * 1000 + 1  # of the first round, as in erpd.run
        self.folder.mkdir(parents=True, exist_ok=True)

    # ------------------------------------------------------------------------------------------- problems and policies

    @cached_property
    def policy(self):
        base, tokenizer = rollout.load_policy(self.config.model, "cuda" if torch.cuda.is_available() else "cpu")
        return base.requires_grad_(False), tokenizer

    @property
    def base(self):
        return self.policy[0]

    @property
    def tokenizer(self):
        return self.policy[1]

    def draw(self, split: str, count: int) -> list[Problem]:
        config, source = self.config, self.config.data
        if split == "test" and config.test_data:
            source = config.test_data
        more = {"seed": config.seed, "operands": config.operands, "divide": not config.test_data}
        if not self.stage.carries:
            return load_problems(source, split, count, **more)
        some = load_problems(source, split, 40 * count, **more)
        return [p for p in some if carries(p.question) in self.stage.carries][:count]

    @cached_property
    def problems(self) -> list[Problem]:
        """The stored batch's come first; `everything` asks for more rounds, and for GRPO with eight times the
        rollouts."""
        return self.draw("train", self.config.problems * (8 if self.stage.everything else 1))

    @cached_property
    def held_out(self) -> list[Problem]:
        return self.draw("test", self.config.test_problems)

    @cached_property
    def batch(self) -> tuple[rollout.Rollouts, Tensor]:
        """(rollouts, Â): the stored batch of all jobs."""
        problems = self.problems[:self.config.problems]
        return erpd.stored_batch(self.base, self.tokenizer, problems, self.config, self.seed)

    @property
    def rollouts(self) -> rollout.Rollouts:
        return self.batch[0]

    def score(self, model, rollouts: rollout.Rollouts | None = None) -> Tensor:
        return rollout.score(model, rollouts or self.rollouts, self.config.temperature, self.config.tokens_per_step)

    def measure(self, model, samples: int | None = None, **about) -> dict:
        """A row: the policy's accuracy and KL to the first base on fresh samples of its own, and `about` it."""
        numbers = rollout.evaluate(model, self.base, self.tokenizer, self.held_out,
                                   samples or self.config.test_samples, seed=self.config.seed,
                                   tokens_per_step=self.config.tokens_per_step, **self.config.sampling)
        if model is not self.base:
            numbers.pop("pass_rates")
        row = about | {name: [round(v, 5) for v in x] if isinstance(x, list) else round(x, 5)
                       for name, x in numbers.items()}
        self.rows.append(row)
        return row

    def fallen(self, model) -> float:
        """Share of the stored completions whose probability fell by a factor of e^5."""
        log_ratio = (self.score(model) - self.rollouts.log_probs) * self.rollouts.mask
        return (log_ratio.sum(1) < FALLEN).float().mean().item()

    # ----------------------------------------------------------------------------------------------- the direct methods

    def until_it_stops(self, loss: str, lr: float, kl_coef: float = 0.0) -> None:
        """A direct method, measured each time that its updates have doubled, until its accuracy has stopped rising.

        That is: after `least` updates or more it is not above the last checkpoint's 95 % interval. Its optimizer goes
        on from one checkpoint to the next.
        """
        config = replace(self.config, explore_lr=lr, kl_coef=kl_coef)
        least = self.stage.nll_least if loss == "nll" else self.stage.least
        start, done, kept, best, last = erpd.trainable(self.base, lr), 0, {}, -1.0, math.inf
        while done < self.stage.most:
            updates = done or self.stage.least // 16
            model = erpd.explore(self.base, *self.batch, config, loss=loss, updates=updates, seed=self.seed + done,
                                 start=start)
            done += updates
            row = self.measure(model, self.config.curve_samples, method=loss + (" + KL" if kl_coef else ""), at=done,
                               path=f"lr {lr:g}" + (f", KL {kl_coef:g}" if kl_coef else ""), lr=lr, kl_coef=kl_coef,
                               fallen=self.fallen(model), rollouts=len(self.rollouts))
            if self.stage.all_weights or row["accuracy"] > best:
                kept = kept if self.stage.all_weights else {}
                kept[done] = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
                best = row["accuracy"]
            if done >= least and row["accuracy"] <= last:
                break
            last = row["accuracy_interval"][1]
        torch.save(kept, self.folder / f"{loss}-{lr:g}-{kl_coef:g}.pt")

    def checkpoint(self, loss: str, lr: float, at: int):
        """The policy of a path after `at` updates. Its path is run again where its weights are gone."""
        path = self.folder / f"{loss}-{lr:g}-0.pt"
        if not path.exists():
            type(self)(self.stage, self.folder).until_it_stops(loss, lr)
        return self.revive(torch.load(path, weights_only=True)[at])

    def revive(self, weights: dict):
        model, _ = erpd.trainable(self.base, 1.0)
        model.load_state_dict(weights)
        return model.requires_grad_(False)

    def temperatures(self, *values: float) -> None:
        for temperature in values:
            self.measure(Combined([self.base], [1 / temperature]), method="temperature", path="temperature",
                         at=temperature)

    def steps_back(self, loss: str, kind: str) -> None:
        """The most accurate checkpoint of a loss over its learning rates, moved back towards the base."""
        best = max((row for row in self.rows if row["method"] == loss), key=lambda row: row["accuracy"])
        model = self.checkpoint(loss, best["lr"], best["at"])
        for share in (*STEPS_BACK, 1.0):
            between = Combined([self.base, model], [1 - share, share]) if kind == "logits" else \
                kl.interpolated(self.base, model, share)
            self.measure(between, method=f"{kind}: {loss}", path=f"lr {best['lr']:g}, update {best['at']}", at=share)

    def grpo(self, lr: float, times: int, tell: bool = True):
        """On-policy GRPO with `times` as many rollouts as the stored batch."""
        path, count = self.folder / f"grpo-{lr:g}-{times}.pt", self.config.problems * times
        if path.exists() and not tell:
            return self.revive(torch.load(path, weights_only=True))
        config = replace(self.config, explore_lr=lr)
        steps = -(-count // max(1, config.explore_batch // config.group))

        def watch(_, model, update: int) -> None:
            if tell and update >= steps // 4:
                self.measure(model, method="grpo" if times == 1 else f"grpo {times}×", path=f"lr {lr:g}", at=update,
                             lr=lr, rollouts=update * count // steps * config.group)

        model = erpd.grpo(self.base, self.tokenizer, self.problems[:count], config, seed=self.config.seed, watch=watch)
        torch.save(model.state_dict(), path)
        return model

    # --------------------------------------------------------------------------------------------------------- ERPD

    @cached_property
    def log_unlearned(self) -> Tensor:
        return self.score(self.unlearned(self.rollouts, self.batch[1]))

    def unlearned(self, rollouts: rollout.Rollouts, advantage: Tensor):
        config = self.config
        return erpd.explore(self.base, replace(rollouts, rewards=1 - rollouts.rewards), -advantage, config,
                            loss=config.unlearn_loss, updates=config.unlearn_updates, seed=self.seed)

    def tell_unlearned(self) -> None:
        self.measure(self.unlearned(*self.batch), method="unlearned", path="unlearned", at=self.config.unlearn_updates)

    def signal(self, kind: str = "contrast", loss: str = "sapo", lr: float | None = None,
               at: int | None = None) -> Tensor:
        """δ_t [B, T] of an explorer at one of its checkpoints; by default SAPO's after `least` updates."""
        lr, at = lr or self.config.explore_lr, at or self.stage.least
        teacher = None if kind == "unlearned" else self.score(self.checkpoint(loss, lr, at))
        unlearned = None if kind == "teacher" else self.log_unlearned
        return erpd.token_signal(kind, self.rollouts.log_probs, teacher, unlearned)

    def student(self, signal: Tensor, budget: float, **about) -> None:
        """Stage 2 as in erpd.one_round, at a budget."""
        problems = self.problems[:self.config.problems]
        student = erpd.distill(self.base, self.rollouts, signal, budget, self.config, seed=self.seed)
        student, spent = erpd.within_budget(self.base, student, self.tokenizer, problems, budget, self.config,
                                            self.seed)
        self.measure(student, **{"at": budget, **about}, budget=budget, spent=spent, rollouts=len(self.rollouts))

    def ladder(self, method: str, kind: str) -> None:
        """Students at the stage's budgets; the control, whose signal is Â at every token, at the middle ones."""
        signal, budgets = self.signal(kind) if kind != "control" else None, self.stage.budgets
        if kind == "control":
            signal, budgets = self.batch[1][:, None] * self.rollouts.mask, budgets[1:3]
        for budget in budgets or [erpd.round_budget(self.rollouts, self.config)]:
            self.student(signal, budget, method=method, path=kind)

    @property
    def middle(self) -> float:
        return self.stage.budgets[1]

    def drifted(self) -> list[tuple[str, float, int]]:
        """(loss, learning rate, updates) of the teachers: SAPO's from early to collapsed, one of each other loss."""
        least, slow, fast = self.stage.least, self.config.explore_lr, self.stage.rates[-2]
        return [("sapo", slow, least // 16), ("sapo", slow, least // 4), ("ce", fast, least // 2),
                ("sapo", slow, least), ("mse", fast, least // 2), ("nll", fast, self.stage.nll_least)]

    def teachers(self) -> None:
        """Students of teachers from strong to collapsed, by every signal, at one budget; and of several teachers."""
        for loss, lr, at in self.drifted():
            for kind in ("teacher", "contrast") if loss in ("sapo", "nll") else ("contrast",):
                self.student(self.signal(kind, loss, lr, at), self.middle, method="student", path=f"{loss}, {kind}",
                             kind=kind, teacher=loss, lr=lr, at=at)
        self.student(self.signal("unlearned"), self.middle, method="student", path="unlearned", kind="unlearned", at=0)
        several = [self.signal("contrast", loss, lr, at) for loss, lr, at in self.drifted()[-3:]]
        self.student(erpd.combine_signals(several, [1, 1, 1], self.rollouts.mask), self.middle, method="student",
                     path="sapo + mse + nll, contrast", kind="contrast", teacher="sapo + mse + nll", at=0)

    def crossed(self) -> None:
        """The contrast, where each half of the problems is scored by teachers that saw only the other half."""
        rollouts, advantage = self.batch
        signal = torch.zeros_like(rollouts.log_probs)
        first = rollouts.groups < self.config.problems // 2
        for mine, other in ((first, ~first), (~first, first)):
            seen, scored = rollouts.select(mine.nonzero()[:, 0]), rollouts.select(other.nonzero()[:, 0])
            teacher = erpd.explore(self.base, seen, advantage[mine], self.config, loss="sapo", seed=self.seed,
                                   updates=self.config.explore_updates)
            unlearned = self.unlearned(seen, advantage[mine])
            half = erpd.token_signal("contrast", scored.log_probs, self.score(teacher, scored),
                                     self.score(unlearned, scored))
            signal[other, :half.shape[1]] = half
        self.student(signal, self.middle, method="student", path="sapo, contrast, crossed", kind="crossed",
                     teacher="sapo", lr=self.config.explore_lr, at=self.stage.least)

    # ------------------------------------------------------------------------------------------------------- rounds

    def rounds(self, method: str, one: Callable | None = None, start=None, before: int = 0, count: int = 4,
               **settings) -> None:
        """Rounds, each from the last one's student with new problems and the budget of its own limit.

        From another `start`, GRPO's end, the problems are the last ones that it saw.
        """
        base, size, told = start or self.base, self.config.problems, {}
        config = replace(self.config, kl_budget="auto", **settings)
        for this_round in range(1, count + 1):
            problems = self.problems[-this_round * size:][:size] if start else \
                self.problems[(this_round - 1) * size:][:size]
            base = (one or erpd.one_round)(base, self.tokenizer, problems, config, seed=self.seed + this_round - 1,
                                           watch=lambda *_, **about: told.update(about))
            self.measure(base, method=method, path=method, at=this_round, budget=told["kl_budget"],
                         rollouts=before + this_round * size * config.group)

    def after_grpo(self) -> None:
        """One round of ERPD from the policy where eight times the rollouts of GRPO ended."""
        best = max((r for r in self.rows if r["method"] == "grpo 8×"), key=lambda r: (r["rollouts"], r["accuracy"]))
        self.rounds("grpo, then erpd", start=self.grpo(best["lr"], 8, tell=False), before=best["rollouts"], count=1)


def round_with(share: float, base, tokenizer, problems, config: erpd.Config, *, seed: int, watch: Callable):
    """A round whose budget closes another share of the gap to 1."""
    rollouts, _ = erpd.stored_batch(base, tokenizer, problems, config, seed)
    budget = kl.budget_from_limit(rollouts.rewards.view(-1, config.group).sum(1), config.group, share)
    return erpd.one_round(base, tokenizer, problems, replace(config, kl_budget=budget), seed=seed, watch=watch)


def imitation_round(base, tokenizer, problems, config: erpd.Config, *, seed: int, watch: Callable):
    """Expert iteration: cross-entropy on the right completions, its weights moved back to the same budget."""
    rollouts, advantage = erpd.stored_batch(base, tokenizer, problems, config, seed)
    updates = 3 * config.explore_updates // 2
    model = erpd.explore(base, rollouts, advantage, config, loss="nll", updates=updates, seed=seed)
    budget = erpd.round_budget(rollouts, config)
    model, spent = erpd.within_budget(base, model, tokenizer, problems, budget, config, seed)
    watch("expert iteration", model, kl_round=spent, kl_budget=budget)
    return model


def jobs(bench: Bench) -> dict[str, Callable[[], object]]:
    """Every job of a stage by name, in the order in which they build on one another."""
    stage, config, full = bench.stage, bench.config, bench.stage.everything
    plan: dict[str, Callable[[], object]] = {
        "base": lambda: bench.measure(bench.base, config.limit_samples, method="base", path="base", at=0)}
    for loss in ("sapo", "nll", "mse", "ce", "clip") if full else ("sapo", "nll"):
        plan |= {f"{loss} {lr:g}": partial(bench.until_it_stops, loss, lr) for lr in stage.rates}
    plan |= {"unlearned policy": bench.tell_unlearned, "erpd": partial(bench.ladder, "erpd", "contrast"),
             "erpd, unlearned": partial(bench.ladder, "erpd, unlearned", "unlearned"),
             "weights: nll": partial(bench.steps_back, "nll", "weights"),
             "weights: sapo": partial(bench.steps_back, "sapo", "weights")}
    if full:
        plan["control"] = partial(bench.ladder, "control", "control")
        plan |= {f"grpo 8× {lr:g}": partial(bench.grpo, lr, 8) for lr in stage.rates}
        plan |= {f"grpo {lr:g}": partial(bench.grpo, lr, 1) for lr in stage.rates}
        plan |= {"rounds": partial(bench.rounds, "erpd rounds"),
                 "unlearned rounds": partial(bench.rounds, "unlearned rounds", signal="unlearned"),
                 "expert iteration": partial(bench.rounds, "expert iteration", imitation_round,
                                             explore_lr=stage.rates[-1]),
                 "after grpo": bench.after_grpo, "teachers": bench.teachers, "crossed": bench.crossed,
                 "weights: mse": partial(bench.steps_back, "mse", "weights"),
                 "logits: nll": partial(bench.steps_back, "nll", "logits"),
                 "temperature": partial(bench.temperatures, 0.3, 0.7, 1.3)}
        plan |= {f"{loss} {lr:g} KL {c:g}": partial(bench.until_it_stops, loss, lr, c)
                 for lr in stage.rates for loss, c in (("sapo", 0.2), ("clip", 0.2), ("clip", 1.0))}
    plan |= {f"rounds, share {share:g}": partial(bench.rounds, f"rounds, share {share:g}", partial(round_with, share))
             for share in stage.shares}
    return plan


def run_stage(stage: Stage, results: Path, folder: Path, told: Callable[[str], None] = lambda job: None, *,
              at: type[Bench] = Bench, plan: Callable[[Bench], dict[str, Callable]] = jobs,
              until: float = math.inf) -> None:
    """Run the missing jobs of a stage's `plan`; their rows go to `results`. From time.monotonic() = `until` on, none
    begins."""
    done = [row for row in measured(results) if row["stage"] == stage.name and row["seed"] == stage.config.seed]
    bench = at(stage, folder / stage.key, list(done))
    for name, work in plan(bench).items():
        if not any(row["job"] == name for row in done):
            if time.monotonic() >= until:
                return
            before = len(bench.rows)
            with rollout.autocast(stage.config.precision, bench.base.device):
                work()
            lines = [json.dumps({"stage": stage.name, "seed": stage.config.seed, "job": name, **row},
                                ensure_ascii=False) + "\n" for row in bench.rows[before:]]
            with open(results, "ab", buffering=0) as file:  # one write: stages side by side append whole jobs
                file.write("".join(lines).encode())
        told(name)


def measured(results: Path) -> list[dict]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
