"""What the sampler, the log-probs and a training pass cost, beside transformers alone.

    python figures/speed.py --model FOLDER     # of SmolLM2-135M-Instruct; without it, the rows that need none

Times are medians of five pairs in turn: on a shared machine only ratios mean anything. Memory is the most over what the
inputs take, in a process of its own. A GPU waits for launches of small models, and for every synchronisation:
both are counted, on any machine.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch.nn.utils.rnn import pad_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3Config, Qwen3ForCausalLM

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import kl  # noqa: E402
import rollout  # noqa: E402
from rewards import chain_problems  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Count(TorchDispatchMode):
    """Counts operations, views of tensors left out, and how often the host waits for a result."""

    operations = waits = 0
    waiting = ("_local_scalar_dense item is_nonzero nonzero _unique2 unique_dim unique_consecutive masked_select "
               "equal").split()  # in inference mode item and is_nonzero come as they are
    idle = "_unsafe_view empty empty_like empty_strided new_empty".split()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation._schema.name.split("::")[1]
        places = args[1] if name in ("index", "index_put", "index_put_") else ()
        self.waits += name in self.waiting or any(x is not None and x.dtype == torch.bool for x in places)
        self.operations += not operation.is_view and name not in self.idle
        return operation(*args, **(kwargs or {}))


def counted(work: Callable) -> tuple[int, int]:
    with Count() as count:
        work()
    return count.operations, count.waits


def operations(make: Callable) -> dict:
    row = {"unit": "operations"}
    for who, work in zip(("ours", "theirs"), make()):
        work()  # what is looked up once is looked up
        row[who], row[f"waits, {who}"] = counted(work)
    return row


def per_token(make: Callable) -> dict:
    """The difference between 14 and 6 new tokens, before any row has ended."""
    long, short = (operations(lambda: [partial(work, new) for work in make()]) for new in (14, 6))
    return long | {name: (long[name] - short[name]) / 8 for name in long if name != "unit"}


def in_turn(make: Callable) -> dict:
    pair, rates = make(), {"ours": [], "theirs": []}
    for repetition in range(6):
        for work, rate in zip(pair, rates.values()):
            start = time.perf_counter()
            tokens = work()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            if repetition > 0:  # the first warms up
                rate.append(tokens / (time.perf_counter() - start))
    return {"unit": "tokens/s", "all": rates} | {who: sorted(rate)[2] for who, rate in rates.items()}  # the medians


def over_inputs(make: Callable, side: int) -> float:
    """MiB; on a CPU under Linux, and not by ru_maxrss, which is inherited from the parent process."""
    def peak() -> float:
        if DEVICE == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**10

    work, inputs = make()[side], peak()
    work()
    return peak() - inputs


def memory(make: Callable) -> dict:
    with get_context("spawn").Pool(1, maxtasksperchild=1) as alone:
        ours, theirs = (alone.apply(over_inputs, (make, side)) for side in (0, 1))
    return {"unit": "MiB", "ours": ours, "theirs": theirs}


def policy(folder: str, questions: list[str], group: int) -> tuple:
    """(model, prompts, stop ids, a function that samples so many new tokens)."""
    model, tokenizer = rollout.load_policy(folder, DEVICE)
    prompts, stop = [rollout.encode_prompt(tokenizer, q) for q in questions], rollout.stop_ids(model, tokenizer)
    return model, prompts, stop, lambda new, stop=stop, **more: rollout.sample(
        model, prompts, group, max_new_tokens=new, temperature=1.0, stop=stop, pad_id=0, seed=0, **more)


def samplers(folder: str, questions: list[str], group: int, precision: torch.dtype, most: int = 64,
             **more) -> tuple[Callable, Callable]:
    """`rollout.sample` and `generate`. Ends of sequences are tokens, what stands behind them is none."""
    model, prompts, stop, sample = policy(folder, questions, group)
    model.to(precision)
    prompts = [torch.tensor(prompt, device=DEVICE) for prompt in prompts]
    ids, attention = (pad_sequence(x, True, 0, "left") for x in (prompts, [torch.ones_like(p) for p in prompts]))

    def theirs(new: int = most) -> int:
        torch.manual_seed(0)
        rows = model.generate(ids, attention_mask=attention, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                              num_return_sequences=group, max_new_tokens=new, eos_token_id=stop, pad_token_id=stop[0])
        ends = torch.isin(rows[:, ids.shape[1]:], torch.tensor(stop, device=DEVICE)).long()
        return int((ends.cumsum(1) - ends == 0).sum())

    return lambda new=most: int(sample(new, **more).length.sum()), theirs


def cast_once(folder: str, questions: list[str], group: int, most: int = 16) -> list[Callable]:
    """Sampling under autocast from the weights that `rollout.collect` has lowered before, and from those of fp32."""
    model, prompts, *_ = policy(folder, questions, group)
    under = rollout.autocast("bf16", model.device)
    sample = partial(rollout.sample, prompts=prompts, group=group, max_new_tokens=most, temperature=1.0, stop=[],
                     pad_id=0, seed=0)
    return [under(lambda one=one: int(sample(one).length.sum())) for one in (under(rollout.lowered)(model), model)]


def passes(model, batch: rollout.Rollouts, reference=None) -> tuple[Callable, Callable]:
    """Forward and backward of −mean log π, plus exact KL to a `reference`: as erpd.py does it, and from logits."""
    count, tokens = int(batch.length.sum()), int(batch.total_length.sum())

    def ours() -> int:
        for rows in rollout.micro_batches(batch, 16 * 129):
            part = batch.select(rows)
            stats, mask = rollout.completion_stats(model, part, reference=reference), part.mask.to(DEVICE)
            loss = -stats.log_prob if reference is None else stats.kl - stats.log_prob
            kl.masked_mean(loss, mask, count).backward()
        return tokens

    def theirs() -> int:
        part = batch.select(torch.arange(len(batch))).to(DEVICE)
        attention = torch.arange(part.ids.shape[1] - 1, device=DEVICE) < part.total_length[:, None]
        inputs = {"input_ids": part.ids[:, :-1], "attention_mask": attention, "use_cache": False}
        log_p = model(**inputs).logits.float().log_softmax(-1)
        loss = -log_p.gather(-1, part.ids[:, 1:, None])[..., 0]
        if reference is not None:
            with torch.no_grad():
                log_q = reference(**inputs).logits.float().log_softmax(-1)
            loss = loss + (log_p.exp() * (log_p - log_q)).sum(-1)
            del log_q  # backward does without
        ((loss.gather(1, part.completion_positions - 1) * part.mask).sum() / count).backward()
        return tokens

    return ours, theirs


def training(folder: str, questions: list[str], group: int, ends=True, with_kl=False) -> list[Callable]:
    """As erpd.py trains; where no text ends, rows are equally long, and padding or copies save nothing."""
    model, _, stop, sample = policy(folder, questions, group)
    batch, reference = sample(90, stop=stop if ends else []), None
    if with_kl:  # on rows no two of which are alike
        batch, reference = batch.select(batch.distinct()[0][:16]), policy(folder, [], 0)[0].requires_grad_(False)
    return [rollout.autocast("auto", model.device)(work) for work in passes(model, batch, reference)]


def output_layer(_, rows: int, with_kl=False, trained=False) -> tuple[Callable, Callable]:
    """Of a Qwen3-0.6B without layers, on rows of 128 tokens; `trained`: the output embedding, too."""
    settings = Qwen3Config(vocab_size=151936, hidden_size=1024, num_hidden_layers=0, initializer_range=1 / 32)
    model, *reference = (Qwen3ForCausalLM(settings).to(DEVICE).requires_grad_(False) for _ in range(1 + with_kl))
    model.model.norm.requires_grad_(True)
    model.lm_head.requires_grad_(trained)
    one, ids = torch.ones(rows, dtype=torch.long), torch.randint(151936, (rows, 129))
    return passes(model, rollout.Rollouts(ids, one, 128 * one, torch.zeros(rows, 128), 0.0 * one, one), *reference)


SUMS = [f"What is {a} + {b}?" for a in (7, 3, 9, 2) for b in (5, 4, 8, 6)]
RAGGED = ["What is 7 + 5?", "What is the sum of the two numbers 7 and 5?"] * 4
CHAINS = [p.question for p in chain_problems(64, "train", operands=4, seed=0)]
FP32, BF16 = torch.float32, torch.bfloat16
GENERATE, LOGITS, FULL = "generate", "logits, log_softmax", "log_softmax over full logits"
CAST = "autocast at every token"
# name: (what, beside what, the goal; how it is measured; how it is made from a model's folder)
ROWS = {
    "embedded": ("sampling, embedded policy, 64 × 16", GENERATE, 1.3, in_turn, samplers, CHAINS, 16, FP32),
    "decoding": ("a decoding step, embedded policy", GENERATE, 1.1, per_token, samplers, CHAINS, 16, FP32),
    "pass": ("a training pass with exact KL, embedded policy", LOGITS, 1.2, operations, training,
             CHAINS[:2], 16, True, True),
    "time": ("log-prob + backward, 2048 tokens: time", FULL, 0.8, in_turn, output_layer, 16, False, True),
    "memory": ("log-prob + backward, 2048 tokens: memory", FULL, 8, memory, output_layer, 16),
    "kl": ("exact KL + backward, 1024 tokens: memory", "full logits of both", 8, memory, output_layer, 8, True),
    "sampling, SmolLM2": ("sampling, SmolLM2-135M bf16, 8 × 8", GENERATE, 1.3, in_turn, samplers, SUMS[:8], 8, BF16),
    "autocast, SmolLM2": ("sampling under autocast, SmolLM2-135M, 2 × 4", CAST, 1.5, in_turn, cast_once, SUMS[:2], 4),
    "autocast, many, SmolLM2": ("the same, 8 × 8", CAST, 1.0, in_turn, cast_once, SUMS[:8], 8),
    "decoding, SmolLM2": ("a decoding step, SmolLM2", GENERATE, 1.1, per_token, samplers, SUMS[:8], 8, BF16),
    "ragged, SmolLM2": ("the same, prompts of two lengths", GENERATE, 1.1, per_token, samplers, RAGGED, 8, BF16),
    "pass, SmolLM2": ("a training pass with exact KL, SmolLM2", LOGITS, 1.2, operations, training,
                      SUMS[:2], 8, True, True),
    "step, SmolLM2": ("a training step, SmolLM2, 2 prompts × 8 of 128 tokens", LOGITS, 1.1, in_turn, training,
                      SUMS[:2], 8, False),
    "apart, SmolLM2": ("the same, 16 prompts × 1", LOGITS, 1.1, in_turn, training, SUMS, 1, False),
    "sampled, SmolLM2": ("the same, 2 × 8 as they are sampled", LOGITS, 1.1, in_turn, training, SUMS[:2], 8),
}
GRAPH = partial(samplers, cuda_graph=1)
if DEVICE == "cuda":
    ROWS |= {
        "graph": ("sampling by a CUDA graph, embedded policy, 64 × 16", GENERATE, 3, in_turn, GRAPH, CHAINS, 16, FP32),
        "graph, SmolLM2": ("sampling by a CUDA graph, SmolLM2-135M bf16, 64 × 16 of 256 tokens", GENERATE, 3, in_turn,
                           GRAPH, SUMS * 4, 16, BF16, 256)}


def draw(rows: list[dict], picture: Path) -> None:
    """Every ratio as a bar beside its goal: green where reached. Of operations, few are good."""
    figure = Figure(figsize=(9, 0.36 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    for y, row in enumerate(rows):
        ratio, goal, few = row["ratio"], row["goal"], row["unit"] == "operations"
        reached = ratio <= goal if few else ratio >= goal
        axes.barh(y, ratio, color="#009E73" if reached else "#D55E00", height=0.6)
        axes.plot([goal, goal], [y - 0.42, y + 0.42], color="black", linewidth=2)
        axes.text(1.04 * max(ratio, goal), y, f"{ratio:.2f}×{' as many operations' * few}", va="center", fontsize=8)
    axes.axvline(1, color="grey", linewidth=1, linestyle=":")
    axes.set_yticks(range(len(rows)), [row["what"] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set(xscale="log", xlim=(0.5, 40), xlabel="times what transformers alone has (log)")
    axes.set_xticks([0.5, 1, 2, 5, 10, 20], ["0.5", "1", "2", "5", "10", "20"])
    axes.set_title(f"Speed and memory saved (more is better) and operations (fewer are better), {DEVICE.upper()}\n"
                   "black: the goal; green: reached; orange: missed", fontsize=10)
    figure.savefig(picture, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", choices=ROWS, default=[], metavar="row", help=", ".join(ROWS))
    parser.add_argument("--model", help="checkpoint folder of SmolLM2-135M-Instruct")
    arguments = parser.parse_args()
    results = HERE / "results" / ("speed-cuda.json" if DEVICE == "cuda" else "speed.json")
    measured = json.loads(results.read_text())["rows"] if results.exists() else {}
    for name in [name for name in arguments.only or ROWS if arguments.model or "SmolLM2" not in name]:
        what, against, goal, measure, make, *settings = ROWS[name]
        folder = arguments.model if "SmolLM2" in name else str(HERE.parent / "tutorial" / "tiny_base")
        row = {"what": what, "against": against, "goal": goal, "device": DEVICE, "threads": torch.get_num_threads(),
               **measure(partial(make, folder, *settings))}
        row["ratio"] = row["theirs"] / row["ours"] if row["unit"] == "MiB" else row["ours"] / row["theirs"]
        measured[name] = row
        results.write_text(json.dumps({"rows": measured}, indent=1) + "\n")
        print(f"{what}: {row['ratio']:.2f}× of {against}, goal {goal}", flush=True)
        print("   ", *(f"{key}: {value:.4g};" for key, value in row.items() if "ours" in key or "theirs" in key))
        if "all" in row:
            print("    pair by pair:", *(f"{ours / theirs:.2f}" for ours, theirs in zip(*row["all"].values())))
    draw([measured[name] for name in ROWS if name in measured], HERE / f"{results.stem}.png")
