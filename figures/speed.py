"""What the sampler and the log-probs cost, beside what one would write without them.

    python figures/speed.py                          # the embedded policy and the output layer
    python figures/speed.py --model path/to/SmolLM2-135M-Instruct      # and the rows that need a language model

Times are medians of five or more repetitions, with the two alternatives taken in turn in one process: on a shared
machine only the ratios mean anything; the table has the smallest and the largest of the pairs, too. Memory is measured
in processes of their own, as the peak over what was there before; the table has it without the gradient of the output
embedding, which comes out whole in any case (speed.json has both). The last row runs `python erpd.py` as it was at an
earlier commit, from this repository's history.

The other panels say how time and memory of one job, sampling and a training step, grow when its group, its completions,
its vocabulary or its layers are doubled and doubled again. Memory follows `tokens_per_step` and not the group or the
completions once a step is full, and the vocabulary only by its weights. Time grows with the completions a little faster
than they do: each token attends to all before it.
"""

import argparse
import io
import json
import re
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
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
BEFORE = "32b9e82"  # the first version that was complete, with nothing in it made fast
TOKENS, WIDTH, VOCABULARY = 2048, 1024, 151936  # the output layer of Qwen3-0.6B
JOB = {"group": 8, "completion": 32, "vocabulary": 8192, "layers": 4}
SUMS = [f"What is {a} + {b}?" for a, b in ((7, 5), (3, 4), (9, 8), (2, 6), (5, 5), (8, 1), (4, 7), (6, 9))]


# ----------------------------------------------------------------------------------------------------------- measuring

def seconds(work: Callable) -> tuple[float, float]:
    """(wall time, what `work` returns: how many tokens it dealt with)."""
    start = time.perf_counter()
    tokens = work()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, tokens


def in_turn(ours: Callable, theirs: Callable, repetitions: int = 5) -> dict:
    """Medians of tokens a second of both, and their ratio, after one warm-up each."""
    rates: dict[str, list[float]] = {"ours": [], "theirs": []}
    for repetition in tqdm(range(repetitions + 1), leave=False):
        for name, work in (("ours", ours), ("theirs", theirs)):
            spent, tokens = seconds(work)
            rates[name] += [tokens / spent] if repetition else []
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {**medians, "unit": "tokens/s", "ratio": medians["ours"] / medians["theirs"], "all": rates}


def peak() -> int:
    """Bytes: the most memory this process has held so far (on a CPU, under Linux)."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated()
    # Not getrusage's ru_maxrss, which a process inherits from the one that started it.
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def in_a_process(name: str, **settings) -> dict:
    """What `python speed.py --alone NAME` prints: a measurement that no earlier one has touched."""
    command = [sys.executable, __file__, "--alone", name, "--settings", json.dumps(settings)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def memory(name: str, tokens: int) -> dict:
    """The most memory over the inputs, MiB, without and with the embedding's own gradient, which both end up with."""
    ours, theirs, our_total, their_total = (
        in_a_process(f"{who}_{name}", tokens=tokens, with_weight=with_weight)["bytes"] / 2**20
        for with_weight in (False, True) for who in ("our", "naive"))
    return {"ours": ours, "theirs": theirs, "unit": "MiB", "ratio": theirs / ours,
            "with the weight's gradient": {"ours": our_total, "theirs": their_total, "ratio": their_total / our_total}}


# ---------------------------------------------------------------------------------------------------- the output layer

def layer(tokens: int, seed: int = 0) -> tuple:
    """(hidden states, output embedding, ids): random, with logits of variance 1 so that no softmax is trivial."""
    torch.manual_seed(seed)
    hidden = torch.randn(tokens, WIDTH, device=DEVICE).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, device=DEVICE).mul_(WIDTH ** -0.5).requires_grad_()
    return hidden, weight, torch.randint(VOCABULARY, (tokens,), device=DEVICE)


def our_log_prob(hidden, weight, ids):
    return kl.token_figures(hidden, kl.Head(weight), ids).log_prob


def naive_log_prob(hidden, weight, ids):
    return (hidden @ weight.T).log_softmax(-1).gather(1, ids[:, None])[:, 0]


def our_kl(hidden, weight, ids, reference):
    return kl.token_figures(hidden, kl.Head(weight), ids, reference=(reference[0], kl.Head(reference[1]))).kl


def naive_kl(hidden, weight, ids, reference):
    return kl.exact_kl((hidden @ weight.T).log_softmax(-1), (reference[0] @ reference[1].T).log_softmax(-1))


def peak_of_layer(name: str, tokens: int, with_weight: bool) -> dict:
    """Forward and backward once: peak bytes over the inputs; gradients to both, or to the hidden states alone."""
    inputs, work = layer(tokens), globals()[name]
    inputs[1].requires_grad_(with_weight)
    more = (tuple(x.detach() for x in layer(tokens, seed=2)[:2]),) if name.endswith("kl") else ()
    before = peak()
    work(*inputs, *more).sum().backward()
    return {"bytes": peak() - before}


# ------------------------------------------------------------------------------------------ sampling, a training step

def sampling(model, tokenizer, prompts: list[list[int]], group: int, max_new_tokens: int) -> dict:
    """Tokens a second of `rollout.sample` and of transformers' `generate` on the same prompts at T = 1."""
    stop = rollout.stop_ids(model, tokenizer)
    width, pad = max(map(len, prompts)), stop[0]
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=model.device)
    attention = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)

    def ours() -> int:
        return int(rollout.sample(model, prompts, group, max_new_tokens=max_new_tokens, temperature=1.0, stop=stop,
                                  pad_id=pad, seed=0).length.sum())

    @torch.no_grad()
    def theirs() -> int:
        torch.manual_seed(0)
        rows = model.generate(ids, attention_mask=attention, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                              num_return_sequences=group, max_new_tokens=max_new_tokens, eos_token_id=stop,
                              pad_token_id=pad)
        ends = torch.isin(rows[:, width:], torch.tensor(stop, device=rows.device)).long()
        return int((ends.cumsum(1) - ends == 0).sum())  # the end-of-sequence token counts, what follows it does not

    return in_turn(ours, theirs)


def training_step(model, batch: rollout.Rollouts) -> dict:
    """Forward and backward of −mean log π over the completions, 2,048 tokens at a time, against transformers' logits and
    log_softmax, 16 rows at a time.
    """
    pieces, sixteen = rollout.by_tokens(batch, 2048), torch.arange(len(batch)).split(16)
    batch, tokens, in_all = batch.to(model.device), int(batch.length.sum()), int(batch.total_length.sum())

    def ours() -> int:
        for chosen in pieces:
            part = batch.select(chosen)
            log_probs = rollout.completion_figures(model, part).log_prob
            kl.masked_mean(log_probs, part.mask, tokens).neg().backward()
        return in_all

    def theirs() -> int:
        for chosen in sixteen:
            part = batch.select(chosen)
            attention = torch.arange(part.ids.shape[1] - 1, device=model.device) < part.total_length[:, None]
            logits = model(input_ids=part.ids[:, :-1], attention_mask=attention, use_cache=False).logits
            log_probs = logits.float().log_softmax(-1).gather(-1, part.ids[:, 1:, None])[..., 0]
            log_probs = log_probs.gather(1, part.completion_positions - 1)
            ((log_probs * part.mask).sum() / tokens).neg().backward()
        return in_all

    with torch.autocast(DEVICE, torch.bfloat16, DEVICE == "cuda", cache_enabled=False):  # as erpd.py trains
        return in_turn(ours, theirs)


def job(group: int, completion: int, vocabulary: int, layers: int) -> dict:
    """Seconds (of three, the median) and peak bytes of sampling 16 prompts and of a training step on the samples."""
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=vocabulary, hidden_size=128, intermediate_size=384, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, tie_word_embeddings=True)
    model = transformers.Qwen3ForCausalLM(config).to(DEVICE).eval()
    before, prompts = peak(), torch.randint(vocabulary, (16, 16)).tolist()

    def work() -> int:
        batch = rollout.sample(model, prompts, group, max_new_tokens=completion, temperature=1.0, stop=[], pad_id=0, seed=0)
        for rows in rollout.by_tokens(batch, 8192):
            part = batch.select(rows).to(DEVICE)
            kl.masked_mean(rollout.completion_figures(model, part).log_prob, part.mask).neg().backward()
        return int(batch.length.sum())

    times = [seconds(work)[0] for _ in range(4)]
    return {"seconds": statistics.median(times[1:]), "bytes": peak() - before}


# ------------------------------------------------------------------------------------------------------------ the table

def embedded_sampling(folder: str) -> dict:
    model, tokenizer = rollout.load_policy(folder, DEVICE)
    prompts = [rollout.encode_prompt(tokenizer, p.question) for p in chain_problems(64, "train", operands=4, seed=0)]
    return sampling(model.requires_grad_(False), tokenizer, prompts, 16, 64)


def language_model_sampling(folder: str) -> dict:
    model, tokenizer = rollout.load_policy(folder, DEVICE)
    prompts = [rollout.encode_prompt(tokenizer, question) for question in SUMS]
    return sampling(model.requires_grad_(False).to(torch.bfloat16), tokenizer, prompts, 8, 64)


def full_step(folder: str, prompts: int, rows: int = 16, columns: int = 128, prompt: int = 38) -> dict:
    """All rows equally long, no two completions alike, as many of each prompt: nothing is saved on padding or on copies."""
    model = rollout.load_policy(folder, DEVICE)[0]
    torch.manual_seed(0)
    ids, other = torch.randint(model.config.vocab_size, (2, rows, columns))
    ids[:, :prompt] = other[:prompts, :prompt].repeat_interleave(rows // prompts, 0)
    lengths = [torch.full((rows,), n) for n in (prompt, columns - prompt)]
    return training_step(model, rollout.Rollouts(ids, *lengths, torch.zeros(rows, columns - prompt), *torch.zeros(2, rows)))


def sampled_step(folder: str, prompts: int) -> dict:
    """Completions as the model samples them."""
    model, tokenizer = rollout.load_policy(folder, DEVICE)
    prompts = [rollout.encode_prompt(tokenizer, question) for question in SUMS[:prompts]]
    stop = rollout.stop_ids(model, tokenizer)
    return training_step(model, rollout.sample(model, prompts, 8, max_new_tokens=128 - len(prompts[0]), temperature=1.0,
                                               stop=stop, pad_id=stop[0], seed=0))


def default_run(_) -> dict:
    """`python erpd.py` from start to end, beside that of `BEFORE`."""
    def work(checkout: Path) -> int:
        with TemporaryDirectory() as folder:
            command = [sys.executable, checkout / "erpd.py", "--model", checkout / "tutorial" / "tiny_base"]
            subprocess.run(command, cwd=folder, check=True, capture_output=True)
        return 3600

    with TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "-C", HERE.parent, "archive", BEFORE], check=True, capture_output=True).stdout
        tarfile.open(fileobj=io.BytesIO(archive)).extractall(folder, filter="data")
        return {**in_turn(lambda: work(HERE.parent), lambda: work(Path(folder))), "unit": "runs/h"}


def time_of_layer(_) -> dict:
    inputs = layer(TOKENS)

    def step(log_prob: Callable) -> int:
        inputs[0].grad = inputs[1].grad = None
        log_prob(*inputs).sum().backward()
        return TOKENS

    return in_turn(lambda: step(our_log_prob), lambda: step(naive_log_prob))


# name: (what, against what, the goal, how it is measured from a model's folder)
ROWS = {
    "embedded": ("sampling, embedded policy, 64 × 16", "model.generate", 2, lambda _: embedded_sampling(EMBEDDED)),
    "sampling": ("sampling, SmolLM2-135M bf16, 8 × 8", "model.generate", 1.5, language_model_sampling),
    "step": ("a training step, SmolLM2-135M, 2 prompts × 8", "transformers' logits, log_softmax", 1.3,
             partial(full_step, prompts=2)),
    "apart": ("the same, 16 prompts × 1", "transformers' logits, log_softmax", 1.3, partial(full_step, prompts=16)),
    "sampled": ("the same, 2 × 8 as they are sampled", "transformers' logits, log_softmax", 1.3,
                partial(sampled_step, prompts=2)),
    "update": ("the same, 8 × 8 as they are sampled", "transformers, 16 rows at a time", 1.3, partial(sampled_step, prompts=8)),
    "time": (f"log-prob + backward, {TOKENS} tokens: time", "log_softmax over full logits", 1, time_of_layer),
    "memory": (f"log-prob + backward, {TOKENS} tokens: memory", "log_softmax over full logits", 12,
               lambda _: memory("log_prob", TOKENS)),
    "kl": (f"exact KL + backward, {TOKENS // 2} tokens: memory", "full logits of both", 12,
           lambda _: memory("kl", TOKENS // 2)),
    "run": ("python erpd.py, wall time", f"commit {BEFORE}", 2, default_run),
}


def record(part: str, name: str, value) -> dict:
    """Everything that has been measured; with this, which replaces an earlier one."""
    measured = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": {}, "growth": {}}
    measured[part][name] = value
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(measured, indent=1) + "\n")
    return measured


def line(row: dict) -> str:
    pairs = [ours / theirs for ours, theirs in zip(*row["all"].values())] if "all" in row else []
    return (f"{row['what']:48} {row['ours']:10.1f} against {row['theirs']:10.1f} {row['unit']:8} ({row['against']}): "
            f"{row['ratio']:5.2f}×{f' ({min(pairs):.2f} – {max(pairs):.2f})' if pairs else ''}, goal {row['goal']}×")


def draw(measured: dict) -> None:
    figure = Figure(figsize=(12, 4), layout="constrained")
    bars, *growth = figure.subplots(1, 3, width_ratios=(1.6, 1, 1))
    rows = [measured["rows"][name] for name in ROWS if name in measured["rows"]][::-1]
    bars.barh(range(len(rows)), [row["ratio"] for row in rows], color=rollout.COLOURS[2], height=0.55)
    bars.plot([row["goal"] for row in rows], range(len(rows)), "|", color=rollout.COLOURS[3], markersize=18,
              markeredgewidth=2.5, label="the goal that was set")
    for i, row in enumerate(rows):
        bars.annotate(f"{row['ratio']:.3g}×", (max(row["ratio"], row["goal"]), i), xytext=(6, 0),
                      textcoords="offset points", va="center", fontsize=8)
    bars.set_yticks(range(len(rows)), [f"{row['what']}\nagainst {row['against']}" for row in rows], fontsize=7)
    bars.set(xscale="log", xlim=(0.5, 300), xlabel="times as fast, or times less memory",
             title="Against the alternatives")
    bars.xaxis.set_major_formatter("{x:g}")
    bars.legend(frameon=False, fontsize=8, loc="upper right")
    for axes, (figure_of, title) in zip(growth, (("seconds", "Time of a job"), ("bytes", "Its peak memory"))):
        for (name, points), colour, marker in zip(measured["growth"].items(), rollout.COLOURS[1:], "osD^"):
            costs = [point[figure_of] / points[0][figure_of] for point in points]
            axes.plot([1, 2, 4], costs, color=colour, marker=marker, label=name)
        axes.plot([1, 2, 4], [1, 2, 4], color="black", linestyle="--", linewidth=1, label="in proportion")
        axes.set(xscale="log", yscale="log", xlabel="times the size", ylabel="times the cost", title=title)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(FixedLocator([1, 2, 4]))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_locator(NullLocator())
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(PICTURE, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", help=f"some of {', '.join(ROWS)}, growth (default: all of them)")
    parser.add_argument("--model", help="checkpoint folder of SmolLM2-135M-Instruct")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    parser.add_argument("--settings", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        work = job if arguments.alone == "job" else partial(peak_of_layer, arguments.alone)
        print(json.dumps(work(**arguments.settings)))
        sys.exit()
    for name in arguments.only or [*ROWS, "growth"]:
        if name == "growth":
            for size in JOB:
                record("growth", size, [in_a_process("job", **JOB | {size: JOB[size] * k}) for k in (1, 2, 4)])
        elif name in ("sampling", "step", "apart", "sampled", "update") and not arguments.model:
            print(f"({name} needs a language model: --model FOLDER)")
        elif name == "run" and subprocess.run(["git", "-C", HERE.parent, "cat-file", "-e", BEFORE], capture_output=True).returncode:
            print(f"(run needs commit {BEFORE}, which this clone has not: git fetch --unshallow)")
        else:
            what, against, goal, work = ROWS[name]
            result = work(arguments.model)
            result = {"what": what, "against": against, "goal": goal, "device": DEVICE,
                      "threads": torch.get_num_threads(), **result}
            record("rows", name, result)
            print(line(result), flush=True)
    measured = json.loads(RESULTS.read_text())
    draw(measured)
