"""GSM8K with a small language model: ERPD and its opponents where right completions are rare.

    python figures/gsm8k.py --model HuggingFaceTB/SmolLM2-135M-Instruct --minutes 7    # again and again
    python figures/gsm8k.py --model FOLDER --quick                                     # 4 problems, on a CPU

The base is the model after cross-entropy on the worked solutions of the training split but its last 1,500, which are
for all methods. Every policy is measured on the test split and, untrained for, on SVAMP's.

A job that has rows is not run again; fine-tuning and ERPD's rounds go on from their last pass. So it can be stopped at
any moment and go on elsewhere, with --results and --folder as they are. The table and picture are of what is there.
"""

import argparse
import copy
import json
import math
import random
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch.nn.utils.rnn import pad_sequence

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import erpd  # noqa: E402
import rollout  # noqa: E402
from figures.claims_figures import BLACK, BLUE, GREEN, LIMIT, ORANGE, PINK, SKY, VERMILION  # noqa: E402
from figures.experiments import Bench, Stage, run_stage  # noqa: E402
from figures.frontier import kl_axis, legend, line, point  # noqa: E402
from figures.outcomes import Outcome, outcomes  # noqa: E402
from rewards import InputError, Problem, load_problems, load_splits, reward, row_problem  # noqa: E402

ROUNDS, TIMES = 2, 4  # rounds of ERPD; rounds whose rollouts the longer GRPO takes
METHODS = {  # method → (label, colour, marker)
    "base": ("the base", BLACK, "o"),
    "temperature": ("the base at a temperature", PINK, "*"),
    "erpd rounds": ("ERPD's rounds", VERMILION, "D"),
    "control": ("Â in place of δ_t", "grey", "d"),
    "nll": ("cross-entropy, right completions", BLUE, "o"),
    "weights: nll": ("its weights moved back", BLUE, "v"),
    "sapo": ("SAPO", ORANGE, "P"),
    "clip + KL 0.2": ("clip, KL penalty 0.2", GREEN, "s"),
    "grpo": ("on-policy GRPO, a round's rollouts", SKY, "<"),
    f"grpo {TIMES}×": (f"on-policy GRPO, {TIMES} rounds'", SKY, "h")}


@dataclass(frozen=True)
class Benchmark(Stage):
    """`config.model` is fine-tuned on `config.data` first."""

    other: str = ""  # a set to measure on besides
    kept: int | None = 1500  # last problems, which are not the base's; none: it has all
    shortest: int | None = None  # of each set only so many, the shortest; none: all
    passes: int = 3  # of fine-tuning
    lr: float = 1e-4  # its learning rate


class GradeSchool(Bench):
    """A Benchmark at work. Its base is fine-tuned once, and is that of all seeds."""

    def memory(self, name: str, *of: str) -> rollout.Memory:
        """What is remembered under a name, of the settings it depends on: all, unless they are named."""
        settings = asdict(self.stage) | asdict(self.config) | {"config": None, "cuda_graph": None}
        settings = {key: Path(value).name if isinstance(value, str) else value  # elsewhere the files are elsewhere
                    for key, value in settings.items() if key in of or not of}
        return rollout.Memory(self.folder.parent / f"{self.stage.name}-{name}", json.dumps(settings))

    def draw(self) -> tuple[list[Problem], list[Problem]]:
        """(problems to train on, those of the test split); those of the other set are `others`."""
        tests = [load_problems(source, "test", divide=False) for source in (self.config.test_data, self.stage.other)]
        sets = [worked_solutions(self.config.data), *tests]
        if few := self.stage.shortest:
            sets = [sorted(items, key=lambda item: len(str(item)))[:few] for items in sets]
        self.solutions, held_out, self.others = sets
        some = [problem for problem, _ in self.solutions[-(self.stage.kept or 0):]]
        needed = self.config.problems
        if len(some) < ROUNDS * needed:
            raise InputError(f"{self.config.data}: {ROUNDS} rounds take {ROUNDS * needed} problems; it has {len(some)}")
        random.Random(self.config.seed).shuffle(some)
        return (some * TIMES)[:TIMES * needed], held_out

    def load(self, name: str):
        memory = self.memory("base", "model", "data", "kept", "shortest", "passes", "lr")
        if not memory.get("done"):
            if self.rows:
                raise InputError(f"{memory.folder} is gone, the base of these results: bring it, or name other "
                                 "--results")
            model, tokenizer = super().load(name)
            with rollout.autocast(self.config.precision, model.device):
                model = self.fine_tuned(model, tokenizer, memory)
            rollout.save_policy(model.bfloat16(), tokenizer, memory.folder)  # half the size, to travel
            memory.put("done", True)
            memory.put("state", None)
        return super().load(str(memory.folder))

    def fine_tuned(self, model, tokenizer, memory: rollout.Memory):
        """The model after cross-entropy on the worked solutions, as if it had sampled them."""
        stage, end = self.stage, rollout.stop_ids(model, tokenizer)[-1:]  # sampling ends at any of them
        texts = [(rollout.encode_prompt(tokenizer, problem.question, self.config.template),
                  tokenizer.encode(solution, add_special_tokens=False) + end)
                 for problem, solution in self.solutions[:stage.kept and -stage.kept]]
        begun, length = (torch.tensor([len(part) for part in column]) for column in zip(*texts))
        rows, right = [torch.tensor(prompt + solution) for prompt, solution in texts], torch.ones(len(texts))
        batch = rollout.Rollouts(pad_sequence(rows, batch_first=True), begun, length,
                                 torch.zeros(len(rows), int(length.max())), right, torch.arange(len(rows)))
        batch.log_probs = self.score(model, batch)
        config = replace(self.config, explore_lr=stage.lr, explore_batch=32)
        return erpd.explore(model, batch, right, config, loss="nll", updates=stage.passes * -(-len(rows) // 32),
                            stage="fine-tuning", memory=memory)

    @cached_property
    def batch(self):
        return erpd.stored_batch(self.base, self.tokenizer, self.first, self.config, self.seed,
                                 self.memory(f"round-{self.seed}"))

    def round(self, *args, seed: int, watch: Callable, **more):
        """A round of ERPD that goes on where it was stopped. Its student is kept: the next round's batch is of it."""
        memory, told = self.memory(f"round-{seed}"), {}
        if (kept := memory.get("student")) is None:
            student = erpd.one_round(*args, seed=seed, memory=memory, watch=lambda *_, **one: told.update(one), **more)
            memory.put("student", kept := {"told": told, "weights": student.state_dict()})
            memory.put("state", None)
        student = copy.deepcopy(self.base)
        student.load_state_dict(kept["weights"])
        watch("ERPD student", student, **kept["told"])
        return student

    def measure(self, model, samples: int | None = None, **about) -> dict:
        there = self.evaluate(model, self.others, self.config.curve_samples)
        about |= {f"other_{name}": there[name] for name in ("accuracy", "accuracy_interval", "kl")}
        return super().measure(model, samples, **about)


def worked_solutions(source: str) -> list[tuple[Problem, str]]:
    """The training problems, and what the base shall write: no calculator's notes, an answer to be read."""
    found = []
    for n, row in enumerate(load_splits(source)["train"], 1):
        problem = row_problem(row, f"{source}, problem {n}", None, None)
        solution = re.sub(r"<<.*?>>", "", str(row.get("answer")))
        if not reward(solution, problem.answer):
            raise InputError(f"{source}, problem {n}: no answer can be read at the end of its solution")
        found.append((problem, solution))
    return found


def jobs(bench: GradeSchool, everything: bool) -> dict[str, Callable]:
    """Base, ERPD and cross-entropy; then everything. The most important first."""
    bench.checked = bench.problems[bench.config.problems:]  # as in ERPD's rounds, none that it was trained on
    plan = {"base": bench.limit, "erpd": partial(bench.rounds, "erpd rounds", bench.round, count=ROUNDS),
            **bench.direct("nll"), "weights: nll": partial(bench.steps_back, "nll", "weights")}
    if everything:
        plan |= bench.direct("sapo") | bench.direct("clip", 0.2)
        plan["control"] = partial(bench.ladder, "control", "control", (), lambda_floor=0.0)
        for times in (1, TIMES):
            plan |= {f"grpo {times}× {lr:g}": partial(bench.grpo, lr, times) for lr in bench.stage.rates}
        plan["temperature"] = partial(bench.temperatures, 0.7, 1e-3)  # the second is greedy
    return plan


def told(outcome: Outcome, method: str) -> list[dict]:
    """A method's rows for the table; of paths over rates and updates only the most accurate policy."""
    rows = outcome.of(method)
    return [max(rows, key=lambda row: (row["accuracy"], row["at"]))] if rows and "lr" in rows[0] else rows


def table(seeds: list[Outcome]) -> str:
    """A line a policy and seed. The best of a path is chosen on the test split itself, which flatters all methods but
    ERPD, whose every round is told. Rollouts are those whose rewards are used: ERPD and the control take up to 3,072
    more a round, to check their KL."""
    lines = [f"{'policy':34} {'path, and where on it':30} {'seed':>4} {'rollouts':>8} {'right':>6}  "
             f"{'95 % interval':13} {'pass@8':>6} {'KL nats/completion':>18} {'KL efficiency':>13} {'other set':>9}  "
             f"{'95 % interval':13}"]
    for method, (label, *_) in METHODS.items():
        for outcome in seeds:
            for row in told(outcome, method):
                here, there = (f"{low:5.1%} – {high:5.1%}" for low, high in
                               (row["accuracy_interval"], row["other_accuracy_interval"]))
                solved = f"{row['pass']:.1%}" if row["samples"] >= 8 else "–"
                worth = f"{outcome.worth(row):.2f}" if row["kl"] and row["accuracy"] > outcome.base else "–"
                path = f"{row['path']}, {row['at']:g}"
                lines.append(f"{label:34} {path:30} {row['seed']:4} {row.get('rollouts', 0):8,} "
                             f"{row['accuracy']:6.1%}  {here:13} {solved:>6} {row['kl']:18.3f} {worth:>13} "
                             f"{row['other_accuracy']:9.1%}  {there:13}")
    return "\n".join(lines)


def draw(seeds: list[Outcome], path: Path, names: tuple[str, str]) -> None:
    """Accuracy against KL on both sets: all ways, thin; what the table tells, large; the limits."""
    figure = Figure(figsize=(14, 5.2), layout="constrained")
    for axes, which, name in zip(figure.subplots(1, 2), ("", "other_"), names):
        for outcome in seeds:
            for method, (label, colour, marker) in METHODS.items():
                for way in outcome.paths(method):
                    line(axes, [outcome.one("base"), *way], which, color=colour, alpha=0.7,
                         linewidth=2 if method == "erpd rounds" else 0.7)
                for row in told(outcome, method):
                    point(axes, row, which, color=colour, marker=marker, elinewidth=0.8, capsize=2, label=label)
        kl_axis(axes, max(row[which + "kl"] for outcome in seeds for row in outcome.rows))
        axes.set_title("/".join(Path(name).parts[-2:]))
        axes.set_ylim(0, None)
        axes.yaxis.set_major_formatter("{x:.0%}")
    first = figure.axes[0]
    for outcome in seeds:
        first.plot(*outcome.limit[::-1], **LIMIT, scaley=False, label="the limit: no policy can be to the left")
    legend(first, frameon=False, fontsize=8)
    first.set_ylabel("right completions")
    figure.savefig(path, dpi=150)


def stages(arguments) -> list[Benchmark]:
    """The benchmark by seed: as a GPU with 80 GB does it, or what a CPU does in minutes."""
    sizes = {"problems": 512, "max_new_tokens": 256, "test_samples": 8, "curve_samples": 4, "limit_samples": 64,
             "explore_lr": 1e-5, "explore_batch": 256, "explore_updates": 256, "unlearn_updates": 64,
             "distill_lr": 5e-5, "distill_updates": 256, "tokens_per_step": 16384, "sample_rows": 2048,
             "cuda_graph": arguments.cuda_graph, "model": arguments.model, "data": arguments.train,
             "test_data": arguments.test}
    # At a rate of 1e-5 what 32 updates do, all of GRPO's 1×, is less than bf16 tells apart.
    more = {"rates": (3e-5, 1e-4), "least": 64, "nll_least": 128, "most": 1024, "other": arguments.other,
            "passes": arguments.passes, "lr": arguments.lr}
    if arguments.quick:
        sizes |= {"problems": 2, "group": 8, "max_new_tokens": 72, "test_samples": 2, "curve_samples": 1,
                  "limit_samples": 8, "explore_batch": 16, "explore_updates": 2, "unlearn_updates": 1,
                  "distill_updates": 2}
        more |= {"rates": (3e-5,), "least": 16, "nll_least": 2, "most": 2, "shortest": 2 * ROUNDS, "kept": None}
    return [Benchmark("quick" if arguments.quick else "GSM8K", erpd.Config(**sizes, seed=seed), budgets=(),
                      all_weights=False, **more) for seed in range(arguments.seeds)]


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gsm8k.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub name of SmolLM2-135M-Instruct, or of another")
    parser.add_argument("--train", default="gsm8k", help="worked solutions: gsm8k (from the hub), a hub id or a file")
    parser.add_argument("--test", default="gsm8k", help="the problems to measure on, likewise")
    parser.add_argument("--other", default="ChilleD/SVAMP", help="a second set to measure on, likewise")
    parser.add_argument("--results", type=Path, help="JSON lines, with the picture beside them "
                        "[figures/results/gsm8k.jsonl and figures/gsm8k.png; --quick: in --folder]")
    parser.add_argument("--folder", type=Path, default=Path("runs/gsm8k"), help="weights and stored batches")
    parser.add_argument("--minutes", type=float, default=math.inf, help="no job begins after these; 0: only a report")
    parser.add_argument("--seeds", type=int, default=2, help="of sampling and training")
    parser.add_argument("--passes", type=int, default=3, help="of fine-tuning")
    parser.add_argument("--lr", type=float, default=1e-4, help="of fine-tuning")
    parser.add_argument("--cuda-graph", type=int, default=0, help="as erpd.py's")
    parser.add_argument("--quick", action="store_true", help="a trial, whose numbers say nothing: the 4 shortest "
                        "problems, on which the base is fine-tuned too, since it would solve none")
    arguments = parser.parse_args(given)
    if min(arguments.seeds, arguments.passes, arguments.lr) <= 0 or not arguments.minutes >= 0:
        parser.error("--seeds, --passes and --lr must be above 0, and --minutes not below")
    until, folder = time.monotonic() + 60 * arguments.minutes, arguments.folder
    results = arguments.results or (folder if arguments.quick else HERE / "results") / "gsm8k.jsonl"
    picture = HERE / "gsm8k.png" if results.parent == HERE / "results" else results.with_suffix(".png")
    try:
        results.parent.mkdir(parents=True, exist_ok=True)
        for everything in (False, True):  # of all seeds the most important first
            for stage in stages(arguments):
                if time.monotonic() < until:
                    run_stage(stage, results, folder, GradeSchool, partial(jobs, everything=everything), until)
        if found := outcomes(results, {"base"}).get(stage.name):
            print(table(found))
            draw(found, picture, (arguments.test, arguments.other))
    except FloatingPointError as error:
        parser.exit(2, f"gsm8k.py: {error.args[0]} stopped, its loss is no longer finite: lower its learning rate\n")
    except (InputError, OSError) as error:
        parser.exit(2, f"gsm8k.py: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "gsm8k.py: stopped; the same command goes on\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
