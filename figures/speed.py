"""What the sampler, the log-probs and a training pass cost, beside what one would write with transformers alone.

    python figures/speed.py                          # the embedded policy and the output layer
    python figures/speed.py --model path/to/SmolLM2-135M-Instruct      # and the rows that need a language model

Times are medians of five repetitions with the two alternatives in turn in one process: on a shared machine only the
ratios mean anything, and the table has the smallest and the largest pair, too. Memory is measured in processes of
their own, over what the inputs take and without the output embedding's own gradient, which both sides end up with.

A GPU waits for launches where models are small, and for every synchronisation (`nonzero`, `unique`, `.item()`, a
boolean mask). Both are counted, on any machine: operations that compute something, and not views of tensors.
"""

import argparse
import copy
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import kl  # noqa: E402
import rollout  # noqa: E402
from rewards import chain_problems  # noqa: E402

EMBEDDED = str(HERE.parent / "tutorial" / "tiny_base")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAME = "speed-cuda" if DEVICE == "cuda" else "speed"
RESULTS, PICTURE = HERE / "results" / f"{NAME}.json", HERE / f"{NAME}.png"
TOKENS, WIDTH, VOCABULARY = 2048, 1024, 151936  # the output layer of Qwen3-0.6B
SUMS = [f"What is {a} + {b}?" for a, b in ((7, 5), (3, 4), (9, 8), (2, 6), (5, 5), (8, 1), (4, 7), (6, 9))]
RAGGED = ["What is 7 + 5?", "What is the sum of the two numbers 7 and 5?"] * 4
VIEWS = set("""view _unsafe_view reshape _reshape_alias permute transpose t slice select unsqueeze squeeze expand detach
               alias as_strided split unbind split_with_sizes chunk narrow movedim unflatten diagonal lift_fresh
               empty empty_like empty_strided new_empty""".split())
WAITS = {"_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "unique_consecutive", "masked_select", "equal"}


# ---------------------------------------------------------------------------------------------------------- measuring

class Count(TorchDispatchMode):
    """Counts the operations that run inside it, without views, and those for which the host waits."""

    def __init__(self):
        super().__init__()
        self.operations = self.waits = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation._schema.name.split("::")[1]
        self.operations += name not in VIEWS
        places = args[1] if name in ("index", "index_put", "index_put_") else ()
        self.waits += name in WAITS or any(x is not None and x.dtype == torch.bool for x in places)
        return operation(*args, **(kwargs or {}))


def counted(work: Callable) -> tuple[int, int]:
    with Count() as count:
        work()
    return count.operations, count.waits


def in_turn(ours: Callable, theirs: Callable, repetitions: int = 5) -> dict:
    """Medians of tokens a second of both, and their ratio, after one warm-up each."""
    rates: dict[str, list[float]] = {"ours": [], "theirs": []}
    for repetition in tqdm(range(repetitions + 1), leave=False):
        for name, work in (("ours", ours), ("theirs", theirs)):
            start = time.perf_counter()
            tokens = work()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            rates[name] += [tokens / (time.perf_counter() - start)] if repetition else []
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {**medians, "unit": "tokens/s", "ratio": medians["ours"] / medians["theirs"], "all": rates}


def peak() -> int:
    """Bytes: the most memory this process has held so far (on a CPU, under Linux)."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated()
    # Not getrusage's ru_maxrss, which a process inherits from the one that started it.
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def memory(name: str, tokens: int) -> dict:
    """The most memory over the inputs, MiB; each side in a process that no earlier measurement has touched."""
    peaks = {}
    for who in ("ours", "theirs"):
        command = [sys.executable, __file__, "--alone", json.dumps([name, who, tokens])]
        peaks[who] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / 2**20
    return {**peaks, "unit": "MiB", "ratio": peaks["theirs"] / peaks["ours"]}


# ---------------------------------------------------------------------------------------------------- the output layer

def layer(tokens: int, seed: int = 0) -> tuple:
    """(hidden states, output embedding, ids): random, with logits of variance 1 so that no softmax is trivial."""
    torch.manual_seed(seed)
    hidden = torch.randn(tokens, WIDTH, device=DEVICE).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, device=DEVICE).mul_(WIDTH ** -0.5).requires_grad_()
    return hidden, weight, torch.randint(VOCABULARY, (tokens,), device=DEVICE)


LAYER = {
    ("log_prob", "ours"): lambda h, w, y, _: kl.token_stats(h, w, y).log_prob,
    ("log_prob", "theirs"): lambda h, w, y, _: (h @ w.T).log_softmax(-1).gather(1, y[:, None]),
    ("kl", "ours"): lambda h, w, y, reference: kl.token_stats(h, w, y, reference=reference).kl,
    ("kl", "theirs"): lambda h, w, y, reference: kl.exact_kl((h @ w.T).log_softmax(-1),
                                                             (reference[0] @ reference[1].T).log_softmax(-1))}


def alone(name: str, who: str, tokens: int) -> int:
    """Forward and backward to the hidden states once: peak bytes over the inputs."""
    hidden, weight, ids = layer(tokens)
    reference = tuple(x.detach() for x in layer(tokens, seed=2)[:2]) if name == "kl" else None
    before = peak()
    LAYER[name, who](hidden, weight.detach(), ids, reference).sum().backward()
    return peak() - before


def time_of_layer(_) -> dict:
    inputs = layer(TOKENS)

    def step(who: str) -> int:
        inputs[0].grad = inputs[1].grad = None
        LAYER["log_prob", who](*inputs, None).sum().backward()
        return TOKENS

    return in_turn(partial(step, "ours"), partial(step, "theirs"))


# ------------------------------------------------------------------------------------------- sampling, a training pass

def samplers(model, tokenizer, prompts: list[list[int]], group: int) -> tuple[Callable, Callable]:
    """`rollout.sample` and transformers' `generate` on the same prompts at T = 1, as functions of the new tokens."""
    stop = rollout.stop_ids(model, tokenizer)
    width, pad = max(map(len, prompts)), stop[0]
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=model.device)
    attention = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)

    def ours(new: int) -> int:
        return int(rollout.sample(model, prompts, group, max_new_tokens=new, temperature=1.0, stop=stop, pad_id=pad,
                                  seed=0).length.sum())

    @torch.no_grad()
    def theirs(new: int) -> int:
        torch.manual_seed(0)
        rows = model.generate(ids, attention_mask=attention, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                              num_return_sequences=group, max_new_tokens=new, eos_token_id=stop, pad_token_id=pad)
        ends = torch.isin(rows[:, width:], torch.tensor(stop, device=rows.device)).long()
        return int((ends.cumsum(1) - ends == 0).sum())  # the end-of-sequence token counts, what follows it does not

    return ours, theirs


def embedded(_) -> tuple:
    model, tokenizer = rollout.load_policy(EMBEDDED, DEVICE)
    prompts = [rollout.encode_prompt(tokenizer, p.question) for p in chain_problems(64, "train", operands=4, seed=0)]
    return model.requires_grad_(False), tokenizer, prompts, 16


def language(questions: list[str], folder: str) -> tuple:
    model, tokenizer = rollout.load_policy(folder, DEVICE)
    prompts = [rollout.encode_prompt(tokenizer, question) for question in questions]
    return model.requires_grad_(False).to(torch.bfloat16), tokenizer, prompts, 8


def sampling(policy: Callable, folder: str) -> dict:
    ours, theirs = samplers(*policy(folder))
    return in_turn(partial(ours, 64), partial(theirs, 64))


def decoding(policy: Callable, folder: str) -> dict:
    """Operations and waits of a token: the difference of 14 and 6 new tokens, before any row has ended."""
    numbers = {}
    for who, work in zip(("ours", "theirs"), samplers(*policy(folder))):
        long, short = counted(partial(work, 14)), counted(partial(work, 6))
        numbers[who], numbers[f"waits, {who}"] = ((a - b) / 8 for a, b in zip(long, short))
    return {**numbers, "unit": "operations", "ratio": numbers["ours"] / numbers["theirs"]}


def passes(model, batch: rollout.Rollouts, reference=None) -> tuple[Callable, Callable]:
    """Forward and backward of the loss on all completions, 2,048 tokens at a time, and transformers' logits and
    log_softmax, 16 rows at a time. The loss is −mean log π, and with a `reference` the KL to it, too.
    """
    tokens, in_all = int(batch.length.sum()), int(batch.total_length.sum())

    def ours() -> int:
        for rows in rollout.by_tokens(batch, 2048):
            part = batch.select(rows)
            stats, mask = rollout.completion_stats(model, part, reference=reference), part.mask.to(model.device)
            loss = -stats.log_prob if reference is None else stats.kl - stats.log_prob
            kl.masked_mean(loss, mask, tokens).backward()
        return in_all

    def theirs() -> int:
        for rows in torch.arange(len(batch)).split(16):
            part = batch.select(rows).to(model.device)
            attention = torch.arange(part.ids.shape[1] - 1, device=model.device) < part.total_length[:, None]
            inputs = {"input_ids": part.ids[:, :-1], "attention_mask": attention, "use_cache": False}
            log_p = model(**inputs).logits.float().log_softmax(-1)
            loss = -log_p.gather(-1, part.ids[:, 1:, None])[..., 0]
            if reference is not None:
                with torch.no_grad():
                    log_q = reference(**inputs).logits.float().log_softmax(-1)
                loss = loss + (log_p.exp() * (log_p - log_q)).sum(-1)
            loss = loss.gather(1, part.completion_positions - 1)
            ((loss * part.mask).sum() / tokens).backward()
        return in_all

    return ours, theirs


def random_batch(model, prompts: int, rows: int = 16, columns: int = 128, prompt: int = 38) -> rollout.Rollouts:
    """All rows equally long, no two alike, as many of each prompt: nothing is saved on padding or on copies."""
    torch.manual_seed(0)
    ids, other = torch.randint(model.config.vocab_size, (2, rows, columns))
    ids[:, :prompt] = other[:prompts, :prompt].repeat_interleave(rows // prompts, 0)
    lengths = [torch.full((rows,), n) for n in (prompt, columns - prompt)]
    return rollout.Rollouts(ids, *lengths, torch.zeros(rows, columns - prompt), *torch.zeros(2, rows))


def sampled_batch(model, tokenizer, prompts: list[list[int]], group: int, new: int) -> rollout.Rollouts:
    stop = rollout.stop_ids(model, tokenizer)
    return rollout.sample(model, prompts, group, max_new_tokens=new, temperature=1.0, stop=stop, pad_id=stop[0], seed=0)


def training(prompts: int | None, folder: str) -> dict:
    """SmolLM2's step, in turn: random rows of so many prompts, or 2 × 8 completions as it samples them."""
    model, tokenizer = rollout.load_policy(folder, DEVICE)
    two = [rollout.encode_prompt(tokenizer, question) for question in SUMS[:2]]
    batch = random_batch(model, prompts) if prompts else sampled_batch(model, tokenizer, two, 8, 90)
    with rollout.autocast("auto", model.device):  # as erpd.py trains
        return in_turn(*passes(model, batch))


def operations_of_a_pass(policy: Callable, folder: str) -> dict:
    """One pass with exact KL to a reference, on rows no two of which are alike."""
    model, tokenizer, prompts, group = policy(folder)
    reference, model = model.float(), copy.deepcopy(model).float().requires_grad_(True)
    batch = sampled_batch(reference, tokenizer, prompts[:2], group, 64)
    numbers = {}
    for who, work in zip(("ours", "theirs"), passes(model, batch.select(batch.distinct()[0][:16]), reference)):
        work()  # what is looked up once is looked up
        numbers[who], numbers[f"waits, {who}"] = counted(work)
    return {**numbers, "unit": "operations", "ratio": numbers["ours"] / numbers["theirs"]}


# ----------------------------------------------------------------------------------------------------------- the table

# name: (what, beside what, the goal, how it is measured from a model's folder); "at most" goals are of operations.
ROWS = {
    "embedded": ("sampling, embedded policy, 64 × 16", "generate", 1.3, partial(sampling, embedded)),
    "decoding": ("a decoding step, embedded policy", "generate", 1.1, partial(decoding, embedded)),
    "pass": ("a training pass with exact KL, embedded policy", "logits, log_softmax", 1.2,
             partial(operations_of_a_pass, embedded)),
    "time": (f"log-prob + backward, {TOKENS} tokens: time", "log_softmax over full logits", 0.8, time_of_layer),
    "memory": (f"log-prob + backward, {TOKENS} tokens: memory", "log_softmax over full logits", 8,
               lambda _: memory("log_prob", TOKENS)),
    "kl": (f"exact KL + backward, {TOKENS // 2} tokens: memory", "full logits of both", 8,
           lambda _: memory("kl", TOKENS // 2)),
    "sampling, SmolLM2": ("sampling, SmolLM2-135M bf16, 8 × 8", "generate", 1.3,
                          partial(sampling, partial(language, SUMS))),
    "decoding, SmolLM2": ("a decoding step, SmolLM2", "generate", 1.1, partial(decoding, partial(language, SUMS))),
    "ragged, SmolLM2": ("the same, prompts of two lengths", "generate", 1.1,
                        partial(decoding, partial(language, RAGGED))),
    "pass, SmolLM2": ("a training pass with exact KL, SmolLM2", "logits, log_softmax", 1.2,
                      partial(operations_of_a_pass, partial(language, SUMS))),
    "step, SmolLM2": ("a training step, SmolLM2, 2 prompts × 8 of 128 tokens", "logits, log_softmax", 1.1,
                      partial(training, 2)),
    "apart, SmolLM2": ("the same, 16 prompts × 1", "logits, log_softmax", 1.1, partial(training, 16)),
    "sampled, SmolLM2": ("the same, 2 × 8 as they are sampled", "logits, log_softmax", 1.1, partial(training, None)),
}


def line(row: dict) -> str:
    """A row of the table: the ratio, its range over the pairs, and what was measured of either side."""
    pairs = [ours / theirs for ours, theirs in zip(*row["all"].values())] if "all" in row else []
    around = f" ({min(pairs):.2f} – {max(pairs):.2f})" if pairs else ""
    waits = f", waits {row['waits, ours']:g} and {row['waits, theirs']:g}" if "waits, ours" in row else ""
    asked = "at most" if row["unit"] == "operations" else "at least"
    return (f"{row['what']:55} {row['ratio']:6.2f}×{around:18} {asked} {row['goal']}×   {row['ours']:.4g} and "
            f"{row['theirs']:.4g} {row['unit']}{waits}, beside {row['against']}")


def draw(rows: dict[str, dict]) -> None:
    """Every ratio as a bar beside its goal: green where it is reached."""
    figure = Figure(figsize=(9, 0.36 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    for y, row in enumerate(rows.values()):
        few = row["unit"] == "operations"
        reached = row["ratio"] <= row["goal"] if few else row["ratio"] >= row["goal"]
        axes.barh(y, row["ratio"], color="#009E73" if reached else "#D55E00", height=0.6)
        axes.plot([row["goal"]] * 2, [y - 0.42, y + 0.42], color="black", linewidth=2)
        axes.text(1.04 * max(row["ratio"], row["goal"]), y, f"{row['ratio']:.2f}×{' as many operations' * few}", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [row["what"] for row in rows.values()], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1, color="grey", linewidth=1, linestyle=":")
    axes.set(xscale="log", xlim=(0.5, 40), xlabel="times what transformers alone has (log); black: the goal")
    axes.set_xticks([0.5, 1, 2, 5, 10, 20], ["0.5", "1", "2", "5", "10", "20"])
    axes.set_title(f"Speed, memory saved and operations beside plain transformers, {DEVICE.upper()}", fontsize=10)
    figure.savefig(PICTURE, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", help=f"some of {', '.join(ROWS)} (default: all)")
    parser.add_argument("--model", help="checkpoint folder of SmolLM2-135M-Instruct")
    parser.add_argument("--alone", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        print(alone(*arguments.alone))
        sys.exit()
    if unknown := set(arguments.only) - set(ROWS):
        parser.error(f"{unknown.pop()!r} is no row: choose from {', '.join(ROWS)}")
    measured = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else {}
    for name in arguments.only or ROWS:
        if "SmolLM2" in name and not arguments.model:
            print(f"({name} needs a language model: --model FOLDER)")
            continue
        what, against, goal, work = ROWS[name]
        measured[name] = {"what": what, "against": against, "goal": goal, "device": DEVICE,
                          "threads": torch.get_num_threads(), **work(arguments.model)}
        RESULTS.write_text(json.dumps({"rows": measured}, indent=1) + "\n")
        print(line(measured[name]), flush=True)
    draw({name: measured[name] for name in ROWS if name in measured})
