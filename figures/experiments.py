"""What figures/claims.py judges: every policy of every method, on problems that none of them saw.

A *stage* is a base policy, its problems, a size of batch and a seed. A *job* is a path of policies on a stage: an
explorer's checkpoints, students at a ladder of budgets, a policy moved back step by step. All jobs of a stage share the
stored batch and the held-out problems. A job's rows are written when it ends; one that has rows is not run again.
"""

import copy
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

import erpd
import kl
import rollout
from rewards import Problem


@dataclass(frozen=True)
class Stage:
    """Where methods are compared, with all settings."""

    name: str
    config: erpd.Config
    carries: tuple[int, ...] = ()  # only the chains with so many; none: all
    rates: tuple[float, ...] = (3e-5, 1e-4, 3e-4)  # learning rates of every direct method
    least: int = 256  # updates of a direct method before it may stop, and the most there are
    most: int = 2048
    nll_least: int = 512  # of cross-entropy, the strongest
    budgets: tuple[float, ...] = (0.25, 0.5, 0.9, 1.4)  # the students', nats; none: the round's
    further: tuple[float, ...] = ()  # where they still became better at the last of these; not with twice the updates
    steps: tuple[float, ...] = (0.25, 0.5, 0.75, 0.9, 1.0)  # shares of the way that policies are moved back to
    batches: int = 8  # as many stored batches' problems are drawn: for methods that take new ones
    all_weights: bool = True  # of checkpoints are kept; False: the best one's
    shares: tuple[float, ...] = ()  # of the gap, for rounds with other budgets
    grpo: tuple[int, ...] = (8, 1)  # rollouts of on-policy GRPO, in stored batches
    only: tuple[str, ...] = ()  # the jobs to run; none: all


def carries(question: str) -> int:
    """Steps of a chain in which the units pass a ten: where the embedded policy's habit can strike."""
    return sum(int(n) % 10 for n in question.rstrip("=").split("+")) // 10


def drawn(stage: Stage) -> tuple[list[Problem], list[Problem]]:
    """(problems to train on, those of the stored batch first; problems held out)."""
    wanted, config = stage.carries, replace(stage.config, rounds=stage.batches)
    if not wanted:
        return erpd.problems_of(config)
    many = replace(config, problems=40 * config.problems, test_problems=40 * config.test_problems)
    train, test = ([p for p in some if carries(p.question) in wanted] for some in erpd.problems_of(many))
    return train[:config.problems], test[:config.test_problems]


class Combined(torch.nn.Module):
    """The policy π ∝ Π_k π_k^w_k of several models: decoding in the logits, without training.

    One model with w = 1/T is that model at temperature T; (1 − λ, λ) goes from one policy to another.
    """

    def __init__(self, models, weights):
        super().__init__()
        self.models, self.weights, self.device = torch.nn.ModuleList(models), weights, models[0].device
        self.config, self.generation_config = models[0].config, models[0].generation_config

    def get_output_embeddings(self):
        return None  # the logits are no linear layer's

    def forward(self, past_key_values=None, **inputs):
        caches = [None] * len(self.models)
        if past_key_values is not None:  # the layers of all models
            layers = past_key_values.layers
            share = len(layers) // len(self.models)
            caches = [Cache(layers=layers[k:k + share]) for k in range(0, len(layers), share)]
        outputs = [model(past_key_values=cache, **inputs) for model, cache in zip(self.models, caches)]
        logits = sum(w * kl.log_softmax(output.logits) for w, output in zip(self.weights, outputs))
        if past_key_values is None and outputs[0].past_key_values is not None:
            layers = [layer for output in outputs for layer in output.past_key_values.layers]
            past_key_values = Cache(layers=layers)
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)


class Bench:
    """One stage at work: its policies, problems, measurements and jobs. `folder` keeps weights of checkpoints."""

    def __init__(self, stage: Stage, folder: Path, rows: list[dict]):
        self.stage, self.config, self.folder, self.rows = stage, stage.config, folder, rows
        self.seed = self.config.seed * 1000 + 1  # of the first round, as in erpd.run
        self.weights = rollout.Memory(folder)
        self.problems, self.held_out = self.draw()
        self.first = self.checked = self.problems[:self.config.problems]  # the stored batch's; and the KL's
        self.base, self.tokenizer = self.load(self.config.model)

    def draw(self) -> tuple[list[Problem], list[Problem]]:
        return drawn(self.stage)

    def load(self, name: str):
        """(base policy, tokenizer)."""
        return rollout.load_policy(name, "cuda" if torch.cuda.is_available() else "cpu")

    @cached_property
    def batch(self) -> tuple[rollout.Rollouts, Tensor]:
        """(rollouts, Â): the stored batch of all jobs."""
        return erpd.stored_batch(self.base, self.tokenizer, self.first, self.config, self.seed)

    @property
    def rollouts(self) -> rollout.Rollouts:
        return self.batch[0]

    def score(self, model, rollouts: rollout.Rollouts | None = None) -> Tensor:
        return rollout.score(model, rollouts or self.rollouts, self.config.temperature, self.config.tokens_per_step)

    def evaluate(self, model, problems: list[Problem], samples: int) -> dict:
        return rollout.evaluate(model, self.base, self.tokenizer, problems, samples, seed=self.config.seed,
                                tokens_per_step=self.config.tokens_per_step, **self.config.sampling)

    def measure(self, model, samples: int | None = None, **about) -> dict:
        """A row: accuracy and KL to the first base on fresh samples of the policy, and `about` it."""
        numbers = self.evaluate(model, self.held_out, samples or self.config.test_samples)
        if model is not self.base:
            numbers.pop("pass_rates")
        row = about | {name: [round(v, 5) for v in x] if isinstance(x, list) else round(x, 5)
                       for name, x in numbers.items()}
        self.rows.append(row)
        return row

    def limit(self) -> None:
        """The base's row, from many samples: its pass rates give the limit."""
        self.measure(self.base, self.config.limit_samples, method="base", path="base", at=0)

    def policy(self, name: str, job: Callable, at: int | None = None):
        """What a job left in the folder, by update where it left several."""
        if (weights := self.weights.get(name)) is None:  # then the job runs again, and its rows do not count
            counted = len(self.rows)
            job()
            del self.rows[counted:]
            weights = self.weights.get(name)
        model = copy.deepcopy(self.base)
        # Made again on a GPU, the best and only one kept may be of another update.
        model.load_state_dict(weights.get(at, [*weights.values()][-1]) if at else weights)
        return model

    def until_it_stops(self, loss: str, lr: float, kl_coef: float = 0.0) -> None:
        """A direct method, measured each time that its updates have doubled, until its accuracy has stopped rising:
        after `least` updates or more it is not above the last checkpoint's 95 % interval."""
        config = replace(self.config, explore_lr=lr, kl_coef=kl_coef)
        about = {"method": loss, "path": f"lr {lr:g}", "lr": lr, "kl_coef": kl_coef, "rollouts": len(self.rollouts)}
        if kl_coef:
            about |= {"method": f"{loss} + KL", "path": f"lr {lr:g}, KL {kl_coef:g}"}
        least = self.stage.nll_least if loss == "nll" else self.stage.least
        start, done, kept, best, last = erpd.trainable(self.base, lr), 0, {}, -1.0, math.inf
        while done < self.stage.most:
            updates = done or self.stage.least // 16
            model = erpd.explore(self.base, *self.batch, config, loss=loss, updates=updates,
                                 seed=self.seed + done, start=start)
            done += updates
            log_ratio = ((self.score(model) - self.rollouts.log_probs) * self.rollouts.mask).sum(1)
            fallen = (log_ratio < -5).float().mean().item()  # those whose probability fell by e^5
            row = self.measure(model, self.config.curve_samples, **about, at=done, fallen=fallen)
            if self.stage.all_weights or row["accuracy"] > best:
                best = row["accuracy"]
                kept = kept if self.stage.all_weights else {}
                kept[done] = copy.deepcopy(model.state_dict())
            if done >= least and row["accuracy"] <= last:
                break
            last = row["accuracy_interval"][1]
        self.weights.put(f"{loss}-{lr:g}-{kl_coef:g}", kept)

    def direct(self, loss: str, kl_coef: float = 0.0) -> dict[str, Callable]:
        """The jobs of a direct method, by learning rate."""
        penalty = f" KL {kl_coef:g}" if kl_coef else ""
        return {f"{loss} {lr:g}{penalty}": partial(self.until_it_stops, loss, lr, kl_coef)
                for lr in self.stage.rates}

    def checkpoint(self, loss: str, lr: float, at: int):
        """The policy of a path after `at` updates."""
        return self.policy(f"{loss}-{lr:g}-0", partial(self.until_it_stops, loss, lr), at)

    def temperatures(self, *values: float) -> None:
        for value in values:
            self.measure(Combined([self.base], [1 / value]), method="temperature", path="temperature", at=value)

    def steps_back(self, loss: str, kind: str) -> None:
        """The most accurate checkpoint of a loss, moved back towards the base by steps."""
        best = max((row for row in self.rows if row["method"] == loss), key=lambda row: row["accuracy"])
        model = self.checkpoint(loss, best["lr"], best["at"])
        for share in self.stage.steps:
            between = kl.interpolated(self.base, model, share)
            if kind == "logits":
                between = Combined([self.base, model], [1 - share, share])
            self.measure(between, method=f"{kind}: {loss}", path=f"lr {best['lr']:g}, update {best['at']}", at=share,
                         rollouts=best["rollouts"])

    def grpo(self, lr: float, times: int) -> None:
        """On-policy GRPO with `times` the stored batch's rollouts, measured from a quarter of them on."""
        config, problems = replace(self.config, explore_lr=lr), self.problems[:self.config.problems * times]
        steps = -(-len(problems) // max(1, config.explore_batch // config.group))
        method = f"grpo {times}×" if times > 1 else "grpo"

        def watch(_, model, update: int) -> None:
            if update >= steps // 4:
                rollouts = update * len(problems) // steps * config.group
                self.measure(model, method=method, path=f"lr {lr:g}", at=update, lr=lr, rollouts=rollouts)

        model = erpd.grpo(self.base, self.tokenizer, problems, config, seed=self.config.seed, watch=watch)
        watch("grpo", model, steps)
        self.weights.put(f"grpo-{lr:g}-{times}", model.state_dict())

    def unlearned(self, rollouts: rollout.Rollouts, advantage: Tensor):
        """The policy that is taught the reverse."""
        config = self.config
        return erpd.explore(self.base, replace(rollouts, rewards=1 - rollouts.rewards), -advantage, config,
                            loss=config.unlearn_loss, updates=config.unlearn_updates, seed=self.seed)

    def measure_unlearned(self) -> None:
        self.measure(self.unlearned(*self.batch), method="unlearned", path="unlearned", at=self.config.unlearn_updates)

    @cached_property
    def log_unlearned(self) -> Tensor:
        return self.score(self.unlearned(*self.batch))

    def signal(self, kind: str = "contrast", loss: str = "sapo", lr: float = 0.0, at: int = 0) -> Tensor:
        """δ_t [B, T] of a checkpoint, by default SAPO's after `least` updates; the control's is Â."""
        if kind == "control":
            return self.batch[1][:, None] * self.rollouts.mask
        teacher = None
        if kind != "unlearned":
            teacher = self.score(self.checkpoint(loss, lr or self.config.explore_lr, at or self.stage.least))
        return erpd.token_signal(kind, self.rollouts.log_probs, teacher, self.log_unlearned)

    def student(self, signal: Tensor, budget: float, settings: dict | None = None, **about) -> None:
        """Stage 2 as in erpd.one_round, at a budget; `settings`: in place of the stage's."""
        config = replace(self.config, **settings or {})
        student = erpd.distill(self.base, self.rollouts, signal, budget, config, seed=self.seed)
        student, spent = erpd.within_budget(self.base, student, self.tokenizer, self.checked, budget, config, self.seed)
        self.measure(student, **{"at": budget, **about}, budget=budget, spent=spent, rollouts=len(self.rollouts))

    def ladder(self, method: str, kind: str, budgets: tuple[float, ...], **settings) -> None:
        """Students at several budgets; where none is given, at the round's own."""
        signal = self.signal(kind)
        for budget in budgets or [erpd.round_budget(self.rollouts, self.config)]:
            self.student(signal, budget, settings, method=method, path=kind)

    def teachers(self) -> None:
        """Students of teachers from strong to collapsed, at one budget; and of several teachers."""
        least, slow, fast = self.stage.least, self.config.explore_lr, self.stage.rates[-2]
        student = partial(self.student, budget=self.stage.budgets[1], method="student")
        several = [("sapo", slow, least), ("mse", fast, least // 2), ("nll", fast, self.stage.nll_least)]
        early = [("sapo", slow, least // 16), ("sapo", slow, least // 4), ("ce", fast, least // 2)]
        for loss, lr, at in early + several:
            for kind in ("teacher", "contrast") if loss in ("sapo", "nll") else ("contrast",):
                student(self.signal(kind, loss, lr, at), path=f"{loss}, {kind}", kind=kind, teacher=loss, lr=lr, at=at)
        student(self.signal("unlearned"), path="unlearned", kind="unlearned", at=0)
        signals = [self.signal("contrast", *teacher) for teacher in several]
        combined = erpd.combine_signals(signals, [1, 1, 1], self.rollouts.mask)
        names = "sapo + mse + nll"
        student(combined, path=f"{names}, contrast", kind="contrast", teacher=names, at=0)

    def crossed(self) -> None:
        """The contrast; teachers that saw one half of the problems score the other."""
        rollouts, advantage = self.batch
        signal = torch.zeros_like(rollouts.log_probs)
        first = rollouts.groups < self.config.problems // 2
        for mine, other in ((first, ~first), (~first, first)):
            seen, scored = (rollouts.select(mine), advantage[mine]), rollouts.select(other)
            teacher = erpd.explore(self.base, *seen, self.config, loss="sapo", updates=self.config.explore_updates,
                                   seed=self.seed)
            half = self.score(teacher, scored) - self.score(self.unlearned(*seen), scored)
            signal[other, :half.shape[1]] = half
        self.student(signal, self.stage.budgets[1], method="student", path="sapo, contrast, crossed", kind="crossed",
                     teacher="sapo", lr=self.config.explore_lr, at=self.stage.least)

    def rounds(self, method: str, one: Callable = erpd.one_round, count: int = 4, base=None,
               problems: list[Problem] | None = None, before: int = 0, **settings) -> None:
        """Rounds with new problems and the budget of their own limit; `before`: rollouts that `base` took."""
        base, problems, told = base or self.base, problems or self.problems, {}
        size, config = self.config.problems, replace(self.config, kl_budget="auto", **settings)
        for k in range(count):
            base = one(base, self.tokenizer, problems[k * size:(k + 1) * size], config, seed=self.seed + k,
                       watch=lambda *_, **about: told.update(about), others=problems[(k + 1) * size:])
            self.measure(base, method=method, path=method, at=k + 1, budget=told["kl_budget"],
                         rollouts=before + (k + 1) * size * config.group)

    def after_grpo(self) -> None:
        """One round of ERPD from where GRPO with eight times the rollouts ended, on its last problems."""
        best = max((row for row in self.rows if row["method"] == "grpo 8×"),
                   key=lambda row: (row["rollouts"], row["accuracy"]))
        base = self.policy(f"grpo-{best['lr']:g}-8", partial(self.grpo, best["lr"], 8))
        self.rounds("grpo, then erpd", count=1, base=base, problems=self.problems[-self.config.problems:],
                    before=best["rollouts"])


def round_with(share: float, base, tokenizer, problems, config: erpd.Config, *, seed: int, **more):
    """A round whose budget closes another share of the gap to 1."""
    rollouts, _ = erpd.stored_batch(base, tokenizer, problems, config, seed)
    budget = kl.budget_from_limit(rollouts.rewards.view(-1, config.group).sum(1), config.group, share)
    return erpd.one_round(base, tokenizer, problems, replace(config, kl_budget=budget), seed=seed, **more)


def imitation_round(base, tokenizer, problems, config: erpd.Config, *, seed: int, watch: Callable, others):
    """Expert iteration: cross-entropy on the right completions, moved back to the same budget."""
    rollouts, advantage = erpd.stored_batch(base, tokenizer, problems, config, seed)
    updates = 3 * config.explore_updates // 2
    model = erpd.explore(base, rollouts, advantage, config, loss="nll", updates=updates, seed=seed)
    budget = erpd.round_budget(rollouts, config)
    model, spent = erpd.within_budget(base, model, tokenizer, others or problems, budget, config, seed)
    watch("expert iteration", model, kl_round=spent, kl_budget=budget)
    return model


def jobs(bench: Bench) -> dict[str, Callable[[], object]]:
    """Every job of a stage by name; later ones build on earlier ones."""
    stage = bench.stage
    plan: dict[str, Callable[[], object]] = {"base": bench.limit}
    for loss in "sapo", "nll", "mse", "ce", "clip":
        plan |= bench.direct(loss)
    plan |= {"unlearned policy": bench.measure_unlearned,
             "erpd": partial(bench.ladder, "erpd", "contrast", stage.budgets + stage.further),
             "erpd, unlearned": partial(bench.ladder, "erpd, unlearned", "unlearned", stage.budgets + stage.further),
             "weights: nll": partial(bench.steps_back, "nll", "weights"),
             "weights: sapo": partial(bench.steps_back, "sapo", "weights")}
    # With a floor under λ the control spends less of its budget, and is weaker.
    plan["control"] = partial(bench.ladder, "control", "control", stage.budgets[1:3], lambda_floor=0.0)
    for times in stage.grpo:
        name = f"grpo {times}×" if times > 1 else "grpo"
        plan |= {f"{name} {lr:g}": partial(bench.grpo, lr, times) for lr in stage.rates}
    plan |= {"rounds": partial(bench.rounds, "erpd rounds"),
             "unlearned rounds": partial(bench.rounds, "unlearned rounds", signal="unlearned"),
             "expert iteration": partial(bench.rounds, "expert iteration", imitation_round,
                                         explore_lr=stage.rates[-1]),
             "after grpo": bench.after_grpo, "teachers": bench.teachers, "crossed": bench.crossed,
             "weights: mse": partial(bench.steps_back, "mse", "weights"),
             "logits: nll": partial(bench.steps_back, "nll", "logits"),
             "temperature": partial(bench.temperatures, 0.3, 0.7, 1.3)}
    for loss, kl_coef in ("sapo", 0.2), ("clip", 0.2), ("clip", 1.0):
        plan |= bench.direct(loss, kl_coef)
    name, twice = "twice the updates", {"distill_updates": 2 * stage.config.distill_updates}  # does it rise further?
    plan |= {f"erpd, {name}": partial(bench.ladder, f"erpd, {name}", "contrast", stage.budgets, **twice),
             f"rounds, {name}": partial(bench.rounds, f"rounds, {name}", **twice)}
    for share in stage.shares:
        name = f"rounds, share {share:g}"
        plan[name] = partial(bench.rounds, name, partial(round_with, share))
    return plan


def run_stage(stage: Stage, results: Path, folder: Path, at: type[Bench] = Bench,
              plan: Callable[[Bench], dict[str, Callable]] = jobs, until: float = math.inf) -> None:
    """Run a stage's missing jobs; their rows go to `results`. None begins after time.monotonic() = `until`."""
    key, mine = f"{stage.name}-s{stage.config.seed}", {"stage": stage.name, "seed": stage.config.seed}
    done = [row for row in measured(results) if mine.items() <= row.items()]
    bench = at(stage, folder / key, list(done))
    for name, work in plan(bench).items():
        if stage.only and name not in stage.only:
            continue
        if not any(row["job"] == name for row in done):
            if time.monotonic() >= until:
                return
            before = len(bench.rows)
            try:
                with rollout.autocast(stage.config.precision, bench.base.device):
                    work()
            except FloatingPointError:  # what it came to before counts, and later jobs go on
                print(f"{key}: {name} diverged", file=sys.stderr)
            rows = [mine | {"job": name} | row for row in bench.rows[before:]]
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            with open(results, "ab", buffering=0) as file:  # one write: stages append whole jobs
                file.write("".join(lines).encode())
        print(f"{key}: {name}", file=sys.stderr)


def measured(results: Path) -> list[dict]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
