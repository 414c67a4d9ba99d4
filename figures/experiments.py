"""What figures/claims.py judges, measured: every policy of every method, on problems that none of them saw.

A *stage* is a base policy, its problems, a size of batch and a seed. A *job* is one path of policies on a stage: the
checkpoints of an explorer, students at a ladder of budgets, a policy moved back towards the base step by step. All jobs
of a stage share the stored batch and the held-out problems. The rows of a job are written together when it ends, a JSON
line each with all its settings, and a job that has rows is not run again.
"""

import json
import sys
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
from rewards import Problem, group_advantages, load_problems  # noqa: E402

BUDGETS = (0.1, 0.25, 0.5, 0.9, 1.3)  # of ERPD's ladder, nats a completion
STRENGTHS = (0.05, 0.2, 1.0)  # of the KL penalty
STEPS_BACK = (0.25, 0.5, 0.75)  # of the interpolations
FALLEN = -5.0  # a stored completion has fallen when log π_θ/π_0 of it is below this, nats


@dataclass(frozen=True)
class Stage:
    """Where methods are compared. `config` has all settings; `carries` keeps the chains with so many dropped-carry
    traps."""

    name: str
    config: erpd.Config
    carries: tuple[int, ...] = ()
    rates: tuple[float, ...] = (3e-5, 1e-4, 3e-4)  # learning rates of every direct method
    epochs: int = 16  # of the explorer, and of clipping beside it
    nll_epochs: int = 4
    budgets: tuple[float, ...] = BUDGETS
    losses: tuple[str, ...] = ("sapo", "nll", "mse")  # of the frontier; `everything` adds the rest
    everything: bool = True  # False: the frontier alone

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
        self.folder.mkdir(parents=True, exist_ok=True)

    # ------------------------------------------------------------------------------------------- problems and policies

    @cached_property
    def policy(self):
        base, tokenizer = rollout.load_policy(self.config.model, "cuda" if torch.cuda.is_available() else "cpu")
        return base.requires_grad_(False), tokenizer

    @property
    def base(self):
        return self.policy[0]

    def draw(self, split: str, count: int) -> list[Problem]:
        config, source = self.config, self.config.test_data if split == "test" and self.config.test_data else self.config.data
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
    def rollouts(self) -> rollout.Rollouts:
        return self.collect(self.base, self.problems[:self.config.problems], self.config.seed * 1000 + 1)

    def collect(self, model, problems, seed: int) -> rollout.Rollouts:
        return rollout.collect(model, self.policy[1], problems, self.config.group, seed=seed, **self.config.sampling)

    # ------------------------------------------------------------------------------------------------------ measuring

    def measure(self, model, samples: int | None = None, **about) -> dict:
        """A row: the policy's accuracy and KL on fresh samples of its own, and `about` it."""
        numbers = rollout.evaluate(model, self.base, self.policy[1], self.held_out, samples or self.config.test_samples,
                                   seed=self.config.seed, **self.config.sampling)
        if model is not self.base:
            numbers.pop("pass_rates")
        numbers = {name: [round(v, 5) for v in x] if isinstance(x, list) else round(x, 5) for name, x in numbers.items()}
        row = about | numbers
        self.rows.append(row)
        return row

    def fallen(self, model) -> float:
        """Share of the stored completions whose probability fell by a factor of e^5."""
        log_ratio = (self.score(model) - self.rollouts.log_probs) * self.rollouts.mask
        return (log_ratio.sum(1) < FALLEN).float().mean().item()

    def score(self, model) -> Tensor:
        return rollout.score(model, self.rollouts, self.config.temperature, self.config.tokens_per_step)

    # ------------------------------------------------------------------------------------------------ the direct methods

    def explored(self, loss: str, lr: float, epochs: int, kl_coef: float = 0.0, reverse: bool = False,
                 tell: bool = True) -> dict:
        """Weights of an explorer's checkpoints by epoch 1, 2, 4 …, kept on disk; with `tell` they are measured too."""
        name = f"{'un' if reverse else ''}{loss}-{lr:g}-{kl_coef:g}-{epochs}"
        path, kept = self.folder / f"{name}.pt", {}
        if path.exists() and not tell:
            return torch.load(path, weights_only=True)
        config, rollouts = replace(self.config, explore_lr=lr, kl_coef=kl_coef), self.rollouts
        advantage = group_advantages(rollouts.rewards, rollouts.groups, config.advantage)
        if reverse:
            rollouts, advantage = replace(rollouts, rewards=1 - rollouts.rewards), -advantage

        def watch(_, model, epoch: int) -> None:
            if epoch & (epoch - 1) == 0 or epoch == epochs:
                kept[epoch] = {k: v.detach().clone() for k, v in model.state_dict().items()}
                if tell:
                    method = "unlearned" if reverse else loss + (" + KL" if kl_coef else "")
                    path_name = f"lr {lr:g}" + (f", KL {kl_coef:g}" if kl_coef else "")
                    self.measure(model, self.config.curve_samples, method=method, path=path_name, at=epoch, lr=lr,
                                 kl_coef=kl_coef, epochs=epochs, fallen=self.fallen(model), rollouts=len(rollouts))

        erpd.explore(self.base, rollouts, advantage, config, loss=loss, epochs=epochs, seed=self.config.seed, watch=watch)
        torch.save(kept, path)
        return kept

    def revive(self, weights: dict):
        model, _ = erpd.trainable(self.base, 1.0)
        model.load_state_dict(weights)
        return model.requires_grad_(False)

    def best_of(self, loss: str) -> tuple:
        """(model, how it came about): the most accurate checkpoint of a loss over its learning rates."""
        row = max((r for r in self.rows if r["method"] == loss), key=lambda r: r["accuracy"])
        weights = self.explored(loss, row["lr"], row["epochs"], row["kl_coef"], tell=False)
        return self.revive(weights[row["at"]]), f"{loss}, lr {row['lr']:g}, epoch {row['at']}"

    def temperatures(self) -> None:
        for temperature in (0.3, 0.7, 1.3):
            self.measure(Combined([self.base], [1 / temperature]), method="temperature", path="temperature", at=temperature)

    def steps_back(self, loss: str, kind: str) -> None:
        """The explorer's weights, or its logits, moved towards the base."""
        model, what = self.best_of(loss)
        for share in STEPS_BACK:
            between = kl.interpolated(self.base, model, share) if kind == "weights" else \
                Combined([self.base, model], [1 - share, share])
            self.measure(between, method=f"{kind}: {loss}", path=what, at=share)

    def grpo(self, lr: float, times: int, tell: bool = True):
        """On-policy GRPO with `times` as many rollouts as the stored batch."""
        path, count = self.folder / f"grpo-{lr:g}-{times}.pt", self.config.problems * times
        if path.exists() and not tell:
            return self.revive(torch.load(path, weights_only=True))
        config = replace(self.config, explore_lr=lr)
        steps = -(-count // max(1, config.explore_batch // config.group))
        due = {steps * share // 8 for share in ((2, 4) if times > 1 else (4,))} | {steps}

        def watch(_, model, step: int) -> None:
            if tell and step in due:
                self.measure(model, method="grpo" if times == 1 else f"grpo {times}×", path=f"lr {lr:g}", at=step, lr=lr,
                             rollouts=step * count // steps * config.group)

        model = erpd.grpo(self.base, self.policy[1], self.problems[:count], config, seed=config.seed, watch=watch)
        torch.save(model.state_dict(), path)
        return model

    # --------------------------------------------------------------------------------------------------------- ERPD

    def log_probs(self, loss: str, lr: float, epoch: int, epochs: int, reverse: bool = False) -> Tensor:
        return self.score(self.revive(self.explored(loss, lr, epochs, reverse=reverse, tell=False)[epoch]))

    @cached_property
    def log_unlearned(self) -> Tensor:
        epochs = self.config.unlearn_epochs
        return self.log_probs("mse", self.config.explore_lr, epochs, epochs, reverse=True)

    def short(self, loss: str) -> int:
        return min(self.stage.epochs, self.stage.nll_epochs if loss == "nll" else 4)

    def signal(self, kind: str = "contrast", loss: str = "sapo", epoch: int | None = None) -> Tensor:
        """δ_t [B, T] of an explorer at one of its checkpoints."""
        lr, epochs = (self.config.explore_lr, self.stage.epochs) if loss == "sapo" else (self.stage.rates[1], self.short(loss))
        teacher = None if kind == "unlearned" else self.log_probs(loss, lr, epoch or epochs, epochs)
        return erpd.token_signal(kind, self.rollouts.log_probs, teacher, None if kind == "teacher" else self.log_unlearned)

    def student(self, signal: Tensor, budget: float, **about):
        config = replace(self.config, kl_budget=budget)
        seed = self.config.seed * 1000 + 1
        student = erpd.distill(self.base, self.rollouts, signal, config, seed=seed)
        student, spent = erpd.within_budget(self.base, student, self.policy[1], self.problems[:config.problems], config, seed)
        self.measure(student, **{"at": budget, **about}, budget=budget, spent=spent, rollouts=len(self.rollouts))
        return student

    def ladder(self) -> None:
        for budget in self.stage.budgets:
            self.student(self.signal(), budget, method="erpd", path="sapo, contrast")

    def stepped_back(self) -> None:
        """One student, distilled at the ladder's last budget, and its weights moved back towards the base."""
        config = replace(self.config, kl_budget=self.stage.budgets[-1])
        student = erpd.distill(self.base, self.rollouts, self.signal(), config, seed=self.config.seed * 1000 + 1)
        for share in (*STEPS_BACK, 1.0):
            self.measure(kl.interpolated(self.base, student, share), method="weights: erpd", path="sapo, contrast", at=share,
                         budget=config.kl_budget, rollouts=len(self.rollouts))

    def faster(self) -> None:
        """The same from an explorer with the next learning rate, which drifts further."""
        lr, epochs = self.stage.rates[1], self.short("sapo")
        log_teacher = self.log_probs("sapo", lr, epochs, epochs)
        signal = erpd.token_signal("contrast", self.rollouts.log_probs, log_teacher, self.log_unlearned)
        for budget in BUDGETS[:3]:
            self.student(signal, budget, method="erpd, faster explorer", path="sapo, contrast")

    def control(self) -> None:
        """Stage 2 with the outcome advantage Â at every token, everything else equal."""
        advantages = group_advantages(self.rollouts.rewards, self.rollouts.groups, "std")[:, None]
        for budget in BUDGETS[1:4]:
            self.student(advantages * self.rollouts.mask, budget, method="control", path="outcome advantage")

    def teachers(self) -> None:
        """Students of teachers from strong to collapsed, by every signal, at one budget; and of several teachers."""
        mask, budget = self.rollouts.mask, BUDGETS[2]
        self.student(self.signal("unlearned"), budget, method="student", path="unlearned", kind="unlearned", at=0)
        epochs = sorted({1, max(1, self.stage.epochs // 4), self.stage.epochs})
        for loss, epoch in [("sapo", e) for e in epochs] + [(loss, self.short(loss)) for loss in ("ce", "mse", "nll")]:
            for kind in ("teacher", "contrast") if loss == "sapo" else ("contrast",):
                self.student(self.signal(kind, loss, epoch), budget, method="student", path=f"{loss}, {kind}", kind=kind,
                             teacher=loss, at=epoch)
        several = [self.signal("contrast", loss) for loss in ("sapo", "mse", "nll")]
        self.student(erpd.combine_signals(several, [1, 1, 1], mask), budget, method="student",
                     path="sapo + mse + nll, contrast", kind="contrast", teacher="sapo + mse + nll", at=0)

    def rounds(self, budget: float, method: str = "erpd rounds", start=None, before: int = 0, count: int = 3) -> None:
        """Rounds of ERPD, each from the last one's student with new problems; every KL is to the first base.

        From another `start`, GRPO's end, the problems are the last ones that it saw.
        """
        base, size = start or self.base, self.config.problems
        config = replace(self.config, kl_budget=budget, explore_epochs=self.stage.epochs)
        for this_round in range(1, count + 1):
            problems = self.problems[-this_round * size:][:size] if start else self.problems[(this_round - 1) * size:][:size]
            base = erpd.one_round(base, self.policy[1], problems, config, seed=self.config.seed * 1000 + this_round)
            self.measure(base, method=method, path=method, at=this_round, budget=budget,
                         rollouts=before + this_round * size * config.group)

    def after_grpo(self, budget: float, method: str = "grpo, then erpd") -> None:
        """One round of ERPD from the policy where eight times the rollouts of GRPO ended."""
        best = max((r for r in self.rows if r["method"] == "grpo 8×"), key=lambda r: r["accuracy"])
        self.rounds(budget, method, start=self.grpo(best["lr"], 8, tell=False), before=best["rollouts"], count=1)

    # ----------------------------------------------------------------------------------------------- where it lands

    def first_wrong(self, rollouts: rollout.Rollouts, problems) -> Tensor:
        """[B] index of the first token that a right worked solution would not have; the length where there is none.

        It takes a character for a token, as the embedded policies do.
        """
        texts = rollout.completion_texts(self.policy[1], rollouts)
        firsts = []
        for text, group, length in zip(texts, rollouts.groups.tolist(), rollouts.length.tolist()):
            total, *rest = (int(n) for n in problems[group].question.rstrip("=").split("+"))
            right = "\n"
            for n in rest:
                right += f"{total}+{n}={total + n}\n"
                total += n
            right += f"So \\boxed{{{total}}}."
            firsts.append(next((i for i, (a, b) in enumerate(zip(text, right)) if a != b), length))
        return torch.tensor(firsts)

    def landing(self) -> None:
        """How well −δ_t finds the first wrong token of a wrong chain, and −Σδ that a prefix has gone wrong: AUROC."""
        mask, rollouts = self.rollouts.mask.bool(), self.rollouts
        first = self.first_wrong(rollouts, self.problems)
        steps = torch.arange(mask.shape[1])
        chains = (first < rollouts.length) & (first > 1)  # wrong, and not a guess without working
        here, inside = steps == first[:, None], mask & chains[:, None]
        middle = max(1, self.stage.epochs // 4)
        signals = {f"{kind}, sapo at epoch {epoch}": self.signal(kind, "sapo", epoch)
                   for epoch in (1, middle, self.stage.epochs) for kind in ("teacher", "contrast")}
        signals |= {f"contrast, {loss}": self.signal("contrast", loss) for loss in ("ce", "mse", "nll")}
        signals["unlearned"] = self.signal("unlearned")
        signals["outcome advantage"] = group_advantages(rollouts.rewards, rollouts.groups, "std")[:, None].expand(mask.shape)
        for name, s in signals.items():
            so_far = (s * mask).cumsum(1)
            self.rows.append({"method": "landing", "path": name, "at": 0, "chains": int(chains.sum()),
                              "first_wrong": auroc(-s[inside], here[inside]),
                              "gone_wrong": auroc(-so_far[inside], (steps >= first[:, None])[inside])})

        def first_of_each(chosen: Tensor) -> list[int]:
            """The first chosen completion of every problem that has one."""
            each = chosen.view(-1, self.config.group)
            return [g * self.config.group + int(each[g].float().argmax()) for g in each.any(1).nonzero()[:, 0].tolist()]

        shown = first_of_each(chains)[:6] + first_of_each(rollouts.rewards == 1)[6:8]
        contrast = erpd.normalised(self.signal(), rollouts.mask)
        texts = rollout.completion_texts(self.policy[1], rollouts)
        self.rows.append({"method": "rollouts shown", "path": "sapo, contrast", "at": 0, "shown": [
            {"question": self.problems[rollouts.groups[i]].question, "text": texts[i], "first_wrong": int(first[i]),
             "signal": [round(v, 3) for v in contrast[i, :rollouts.length[i]].tolist()]} for i in shown]})


def auroc(score: Tensor, positive: Tensor) -> float:
    """Chance that a positive scores higher than a negative, ties counted half (Mann and Whitney)."""
    values, order = score.double().sort()
    _, groups, counts = values.unique_consecutive(return_inverse=True, return_counts=True)
    rank = (counts.cumsum(0) - (counts - 1) / 2)[groups]  # the mean rank of equal scores
    hits = positive[order]
    n, m = int(hits.sum()), int((~hits).sum())
    return ((rank[hits].sum() - n * (n + 1) / 2) / (n * m)).item() if n and m else float("nan")


def jobs(bench: Bench) -> dict[str, Callable[[], object]]:
    """Every job of a stage by name, in the order in which they build on one another."""
    stage, config = bench.stage, bench.config
    plan: dict[str, Callable[[], object]] = {
        "base": lambda: bench.measure(bench.base, config.limit_samples, method="base", path="base", at=0)}
    for lr in stage.rates:
        long = stage.epochs if lr == config.explore_lr else bench.short("sapo")
        for loss in stage.losses:
            epochs = long if loss == "sapo" else bench.short(loss)
            plan[f"{loss} {lr:g}"] = partial(bench.explored, loss, lr, epochs)
        if stage.everything:
            plan[f"clip {lr:g}"] = partial(bench.explored, "clip", lr, long)
            plan[f"ce {lr:g}"] = partial(bench.explored, "ce", lr, bench.short("ce"))
            for c in STRENGTHS:
                plan[f"clip {lr:g} KL {c:g}"] = partial(bench.explored, "clip", lr, long // 2 if long > 4 else long, c)
            plan |= {f"grpo {lr:g}": partial(bench.grpo, lr, 1), f"grpo 8× {lr:g}": partial(bench.grpo, lr, 8)}
    plan["unlearned"] = partial(bench.explored, "mse", config.explore_lr, config.unlearn_epochs, reverse=True)
    plan |= {"erpd": bench.ladder, "weights: erpd": bench.stepped_back}
    for loss in stage.losses:
        plan[f"weights: {loss}"] = partial(bench.steps_back, loss, "weights")
        if stage.everything:
            plan[f"logits: {loss}"] = partial(bench.steps_back, loss, "logits")
    if stage.everything:
        plan |= {"faster explorer": bench.faster, "temperature": bench.temperatures, "control": bench.control,
                 "teachers": bench.teachers, "landing": bench.landing, "rounds": partial(bench.rounds, config.kl_budget),
                 "after grpo": partial(bench.after_grpo, config.kl_budget),
                 "small rounds": partial(bench.rounds, BUDGETS[2], "erpd small rounds"),
                 "small after grpo": partial(bench.after_grpo, BUDGETS[1], "grpo, then a little erpd")}
    return plan


def run_stage(stage: Stage, results: Path, folder: Path, told: Callable[[str], None] = lambda job: None) -> None:
    """Run the missing jobs of a stage; their rows go to `results`."""
    done = [row for row in measured(results) if row["stage"] == stage.name and row["seed"] == stage.config.seed]
    bench = Bench(stage, folder / stage.key, list(done))
    for name, work in jobs(bench).items():
        if not any(row["job"] == name for row in done):
            before = len(bench.rows)
            with rollout.autocast(stage.config.precision, bench.base.device):
                work()
            settings = {"problems": stage.config.problems, "group": stage.config.group, "operands": stage.config.operands,
                        "carries": list(stage.carries), "model": Path(stage.config.model).name,
                        "batch": stage.config.explore_batch, "distill_lr": stage.config.distill_lr,
                        "distill_epochs": stage.config.distill_epochs, "held_out": stage.config.test_problems}
            lines = [json.dumps({"stage": stage.name, "seed": stage.config.seed, "job": name, **row, "settings": settings},
                                ensure_ascii=False) + "\n" for row in bench.rows[before:]]
            with open(results, "ab", buffering=0) as file:  # one write: stages side by side append whole jobs
                file.write("".join(lines).encode())
        told(name)


def measured(results: Path) -> list[dict]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
