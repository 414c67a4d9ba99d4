"""Policies and text: load a policy, sample completions, the Rollouts batch, score it, evaluate, remember, share.

A policy is a pair (model, tokenizer) as transformers loads them. Nothing here asks which model it is.
Models stay in eval mode everywhere, so dropout is off alike where tokens are sampled and where they are scored.
"""

import copy
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from zipfile import ZipFile

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer
from transformers.modeling_layers import GradientCheckpointingLayer

import kl
from rewards import InputError, Problem, reward

# cuDNN's attention prepares every new shape for tens of milliseconds, and each sampled token makes a new shape.
torch.backends.cuda.enable_cudnn_sdp(False)


# ------------------------------------------------------------------------------------------------------------- policies

def load_policy(name: str, device: str | torch.device = "cpu"):
    """(model, tokenizer) from a checkpoint folder or a hub name; fp32 weights, eval mode.

    Raises InputError where there is no such policy or device, and where what is there cannot serve as one.
    """
    def refused(reason: str) -> InputError:
        return InputError(f"--model {name!r} {reason}")

    if not Path(name).is_dir() and (beside := Path(__file__).parent / name).is_dir():
        name = str(beside)  # the embedded policies, from wherever the program is started
    try:
        # transformers would ask at the keyboard whether to run code that comes with a model.
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, trust_remote_code=False)
    except Exception as error:  # of some ten kinds: no such name, no tokenizer, a broken file, a model without text
        reason = (str(error).strip() or repr(error)).splitlines()[0][:200]
        raise refused(f"is no checkpoint folder or hub name that transformers can load: {reason}") from None
    if not tokenizer.encode("1"):
        raise refused("has no tokenizer: put tokenizer.json and tokenizer_config.json beside its weights")
    if len(tokenizer) > (room := model.get_input_embeddings().weight.shape[0]):
        raise refused(f"has a tokenizer of {len(tokenizer)} tokens and an embedding of {room}: one is another model's")
    if not stop_ids(model, tokenizer):
        raise refused("names no end-of-sequence token: set eos_token_id in its generation_config.json")
    if getattr(model, "is_quantized", False):
        raise refused("is quantised, and packed weights cannot be trained: give it in bf16 or fp32")
    if not all(weight.isfinite().all() for weight in model.parameters()):
        raise refused("has weights that are not finite: its file is damaged, or its training had diverged")
    try:
        model = model.to(device).eval()
        if model.device.type == "cuda":
            torch.cuda.set_device(model.device)  # a CUDA graph is captured on the current one
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise InputError(f"--device {str(device)!r} cannot be used: {reason}") from None
    try:
        with torch.no_grad():  # what another second token changes, at the first position and at its own
            output = model(input_ids=torch.tensor([[0, 1], [0, 2]], device=device), use_cache=True)
        first, second = output.logits.diff(dim=0)[0].abs().amax(-1)
        if first > 1e-3 * second + 1e-5:
            raise refused("is no causal language model: what it says of a token depends on the tokens after it")
        if getattr(output, "past_key_values", None) is None:
            raise refused("remembers the tokens before in its own way: it cannot be sampled without past_key_values")
        prompts = [ids := tokenizer.encode("1"), ids * 3]
        tried = sample(model, prompts, 2, max_new_tokens=4, temperature=1.0, stop=(), pad_id=ids[0], seed=0)
        off = completion_stats(model, tried).log_prob.cpu() - tried.log_probs
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of any kind: it wants other inputs, or gives other outputs
        raise refused(f"cannot be sampled from: {(str(error).strip() or repr(error)).splitlines()[0][:200]}") from None
    if off.abs().max() > 0.05:
        raise refused("says other things of a text that stands beside a longer one: it cannot be sampled in batches")
    return model, tokenizer


def save_policy(model, tokenizer, folder: str | Path) -> None:
    """Write a checkpoint folder that `load_policy`, and transformers itself, read back."""
    if rank() == 0:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@cache
def run_again(kind: type) -> type:
    """The same layer with a forward pass that runs again in the backward pass. A class, since a layer that held its own
    method would not be freed with the last reference to it, but by some later garbage collection."""
    def forward(self, *args, **kwargs):
        return checkpoint(kind.forward, self, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
    return type(kind.__name__, (kind,), {"forward": forward, "runs_again": True, "__module__": kind.__module__})


def trainable(base, lr: float, checkpointing: bool = False):
    """(model, optimizer): a copy of a policy to train; it stays in eval mode, so that dropout is off."""
    model = copy.deepcopy(base).requires_grad_(True)
    if checkpointing:  # transformers' own would need train mode; without dropout there is no random state to keep
        for layer in model.modules():
            if isinstance(layer, GradientCheckpointingLayer) and not hasattr(layer, "runs_again"):
                layer.__class__ = run_again(type(layer))
    return model, torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)


def autocast(precision: str, device: torch.device):
    """The context of all computing: bf16 over fp32 weights for bf16, and for auto on CUDA."""
    bf16 = precision == "bf16" or precision == "auto" and device.type == "cuda"
    return torch.autocast(device.type, torch.bfloat16, bf16, cache_enabled=False)  # weights change between passes


def stop_ids(model, tokenizer) -> list[int]:
    """Every id that ends a completion: the tokenizer's own and those of the model's configs; there may be several."""
    ids = {tokenizer.eos_token_id}
    for config in (model.generation_config, model.config):  # the first is None where a model cannot generate
        eos = getattr(config, "eos_token_id", None)
        ids |= set(eos) if isinstance(eos, (list, tuple)) else {eos}
    return sorted(i for i in ids if i is not None)


def encode_prompt(tokenizer, question: str, template: str = "{question}") -> list[int]:
    """Prompt ids: the question in `template`, as the user's turn of a chat where the tokenizer has a chat template."""
    text = template.replace("{question}", question)
    if tokenizer.chat_template is None:
        ids = tokenizer.encode(text)  # some tokenizers end a text themselves, and after an end nothing is said
        return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] and not text.endswith(tokenizer.eos_token) else ids
    chat = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)


# ------------------------------------------------------------------------------------------------------------- Rollouts

@dataclass
class Rollouts:
    """B completions with their prompts, on the CPU; the stored batch of a round.

    Token in, token out: these ids are what the behaviour policy saw and chose, and text is never encoded again.
    Row b is prompt, completion, padding. The lengths alone tell them apart, so a padding id that is also an
    end-of-sequence id does no harm. Token t of completion b is ids[b, prompt_length[b] + t].
    """

    ids: Tensor  # [B, L] prompt, completion, padding
    prompt_length: Tensor  # [B]
    length: Tensor  # [B] tokens of the completion, its end-of-sequence token included
    log_probs: Tensor  # [B, T] behaviour log-probs at the sampling temperature, 0 after the end
    rewards: Tensor  # [B] 1 right, 0 wrong
    groups: Tensor  # [B] index of the problem
    text_id: Tensor | None = None  # [B] equal where prompt and completion are; found here, once, unless given

    def __post_init__(self):
        if self.text_id is None:
            rows = torch.cat([self.prompt_length[:, None], self.length[:, None], self.ids], 1)
            self.text_id = torch.unique(rows, dim=0, return_inverse=True)[1]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def total_length(self) -> Tensor:
        """Tokens of prompt and completion [B]."""
        return self.prompt_length + self.length

    @property
    def mask(self) -> Tensor:
        """Completion mask [B, T]: 1 on every sampled token, the end-of-sequence token included."""
        return (torch.arange(self.log_probs.shape[1], device=self.length.device) < self.length[:, None]).float()

    @property
    def completion_positions(self) -> Tensor:
        """[B, T] where in a row of `ids` each completion token stands; past the end, some column of the row."""
        steps = torch.arange(self.log_probs.shape[1], device=self.length.device)
        return (self.prompt_length[:, None] + steps).clamp(max=self.ids.shape[1] - 1)

    @property
    def completions(self) -> Tensor:
        """[B, T] the sampled tokens."""
        return self.ids.gather(1, self.completion_positions)

    def distinct(self) -> tuple[Tensor, Tensor]:
        """(rows [n], no two of them alike; which of these each row [B] is a copy of).

        A group repeats itself, a sure policy's most of all, and what copies cost is paid once.
        """
        kinds, copy_of = self.text_id.unique(return_inverse=True)
        first = torch.full_like(kinds, len(self))
        return first.scatter_reduce_(0, copy_of, torch.arange(len(self), device=kinds.device), "amin"), copy_of

    def select(self, rows: Tensor) -> "Rollouts":
        """These rows, with the columns that none of them uses cut off."""
        part = Rollouts(*(getattr(self, f.name)[rows] for f in fields(self)))
        part.ids = part.ids[:, :int(part.total_length.max())]
        part.log_probs = part.log_probs[:, :int(part.length.max())]
        return part

    def to(self, device) -> "Rollouts":
        return Rollouts(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))

    @staticmethod
    def load(path: str | Path) -> "Rollouts":
        """The batch that a run keeps in round-K/rollouts.pt."""
        return Rollouts(**torch.load(path, weights_only=True)["value"])

    @staticmethod
    def concatenate(parts: Sequence["Rollouts"], pad_id: int) -> "Rollouts":
        """One batch from several, padded to the widest. Equal group numbers mean one group, also across parts."""
        return Rollouts(ids=pad_sequence([row for p in parts for row in p.ids], batch_first=True, padding_value=pad_id),
                        log_probs=pad_sequence([row for p in parts for row in p.log_probs], batch_first=True),
                        **{name: torch.cat([getattr(p, name) for p in parts])
                           for name in ("prompt_length", "length", "rewards", "groups")})


def mini_batches(rollouts: Rollouts, size: int, generator: torch.Generator) -> list[Tensor]:
    """Row indices in shuffled batches of about `size`, whole groups each: an advantage compares within its group."""
    groups = rollouts.groups.unique()
    groups = groups[torch.randperm(len(groups), generator=generator)]
    each = max(1, size * len(groups) // len(rollouts))
    return [torch.isin(rollouts.groups, some).nonzero()[:, 0] for some in groups.split(each)]


def micro_batches(rollouts: Rollouts, tokens_per_step: int) -> list[Tensor]:
    """Row indices in batches of like lengths, the longest first: at most `tokens_per_step` each, padding included,
    but at least one row. Copies of a row share its batch and count once. Of several processes, each has its share."""
    rows, copy_of = rollouts.distinct()
    order = rollouts.total_length[rows].argsort(descending=True, stable=True)
    lengths, batches, start = rollouts.total_length[rows[order]].tolist(), [], 0
    if ranks() > 1:
        tokens_per_step = min(tokens_per_step, sum(lengths) // ranks())
    while start < len(order):
        end = start + max(1, tokens_per_step // lengths[start])  # the first is the longest
        batches.append(torch.isin(copy_of, order[start:end]).nonzero()[:, 0])
        start = end
    return batches[rank()::ranks()]


# -------------------------------------------------------------------------------------------------------------- scoring

def output_embedding(model) -> Tensor | None:
    """W [V, d] if the model's logits are h Wᵀ, which is tested once; None if they are biased, scaled or capped."""
    layer = model.get_output_embeddings()
    if not isinstance(layer, torch.nn.Linear) or layer.bias is not None or model.base_model is model:
        return None
    if not hasattr(layer, "gives_logits"):
        ids = torch.tensor([[0, 1]], device=layer.weight.device)
        with torch.no_grad(), torch.autocast(ids.device.type, enabled=False):  # in bf16 a mild cap would not show
            logits = model(input_ids=ids, use_cache=False).logits
            off = layer(model.base_model(input_ids=ids, use_cache=False).last_hidden_state) - logits
        layer.gives_logits = bool(off.abs().max() <= torch.finfo(logits.dtype).eps ** 0.7 * logits.abs().max())
    return layer.weight if layer.gives_logits else None


def completion_states(model, ids: Tensor, before: Tensor) -> tuple[Tensor, Tensor | None]:
    """(hidden states [N, d] of the tokens `before` [N] in rows of ids [n, L], output embedding); or logits and None."""
    weight = output_embedding(model)
    # Padding is on the right, where causal attention never looks from inside a completion: no attention mask is needed.
    if weight is None:
        return model(input_ids=ids, use_cache=False).logits.flatten(0, 1).index_select(0, before), None
    states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1).index_select(0, before)
    device = ids.device.type
    if torch.is_autocast_enabled(device):  # products as in the model's own output layer, which autocast lowers
        return states.to(torch.get_autocast_dtype(device)), weight.to(torch.get_autocast_dtype(device))
    return states, weight


def completion_stats(model, rollouts: Rollouts, temperature: float = 1.0, *, with_entropy: bool = False,
                     reference=None) -> kl.TokenStats:
    """log π(y_t|s_t), on request the entropy and the exact KL to the model `reference`, at every stored prefix [B, T];
    0 after the end, with gradients where they are enabled, on the model's device.

    The rollouts lie on the CPU. Which outputs count is worked out there, so that a GPU is not waited for here
    (transformers asks it once a pass whether a row is several sequences).
    """
    rows, copy_of = rollouts.distinct()
    part = rollouts.select(rows)
    ids, inside = part.ids[:, :-1], part.mask.bool()
    # The distribution of a token is the output one position before it; nothing else reaches the output layer.
    before = (torch.arange(len(part))[:, None] * ids.shape[1] + part.completion_positions - 1)[inside]
    place = (inside.flatten().cumsum(0).view_as(inside) * inside)[copy_of]  # rows of `stats`, from 1; 0 after the end
    chosen = part.completions[inside]
    ids, before, chosen, place = (x.to(model.device, non_blocking=True) for x in (ids, before, chosen, place))
    if reference is not None:
        with torch.no_grad():
            reference = completion_states(reference, ids, before)
    stats = kl.token_stats(*completion_states(model, ids, before), chosen, temperature, with_entropy=with_entropy,
                           reference=reference)
    return kl.TokenStats(*(None if x is None else F.pad(x, (1, 0))[place] for x in stats))


@torch.no_grad()
def score(model, rollouts: Rollouts, temperature: float = 1.0, tokens_per_step: int = 8192,
          desc: str = "scoring") -> Tensor:
    """log π(y_t|s_t) [B, T] of the stored completions, 0 after their ends, on the CPU."""
    scores = torch.zeros_like(rollouts.log_probs)
    for rows in tqdm(micro_batches(rollouts, tokens_per_step), desc=desc, leave=False):
        log_probs = completion_stats(model, rollouts.select(rows), temperature).log_prob
        scores[rows, :log_probs.shape[1]] = log_probs.cpu()
    return sum(gathered([scores]))


# ------------------------------------------------------------------------------------------------------------- sampling

def sample(model, prompts: Sequence[Sequence[int]], group: int, *, max_new_tokens: int, temperature: float,
           stop: Sequence[int], pad_id: int, seed: int, problems: Sequence[int] | None = None,
           cuda_graph: int = 0) -> Rollouts:
    """`group` completions of every prompt (a list of ids): P·group rows, a prompt's side by side; rewards are NaN.

    The noise belongs to (problem, sample), by default the prompt's index: the same seed gives the same text in any
    batch, up to rounding. With `cuda_graph` it is `decode_in_graphs` that samples.
    """
    if cuda_graph and model.device.type != "cuda":
        raise InputError(f"--cuda-graph {cuda_graph} needs a CUDA device, and the policy is on {model.device}")
    problems = range(len(prompts)) if problems is None else problems
    uniform = torch.cat([kl.noise(seed, problem, group, max_new_tokens) for problem in problems])
    decoding = decode_in_graphs if cuda_graph else decode
    tokens, log_probs = decoding(model, prompts, uniform.to(model.device), temperature, torch.tensor(stop), pad_id)
    ends = torch.isin(tokens, torch.tensor(stop))
    length = torch.where(ends.any(1), ends.int().argmax(1) + 1, max_new_tokens)
    ids = [torch.cat([torch.tensor(prompts[b // group]), tokens[b, :n]]) for b, n in enumerate(length.tolist())]
    inside = torch.arange(int(length.max())) < length[:, None]
    return Rollouts(pad_sequence(ids, batch_first=True, padding_value=pad_id),
                    torch.tensor([len(p) for p in prompts]).repeat_interleave(group), length,
                    torch.where(inside, log_probs[:, :inside.shape[1]], 0.0), torch.full((len(ids),), math.nan),
                    torch.tensor(problems).repeat_interleave(group))


@torch.inference_mode()
def decode(model, prompts: Sequence[Sequence[int]], uniform: Tensor, temperature: float, stop: Tensor,
           pad_id: int) -> tuple[Tensor, Tensor]:
    """(tokens, their log-probs) [B, T] on the CPU, sampled with the noise `uniform` [B, T]; what follows a stop id is
    undefined. The log-probs come from the very logits that were sampled."""
    (total, steps), device = uniform.shape, model.device
    logits, attention, position, cache = prefill(model, prompts, total, steps, pad_id)
    width, stop = attention.shape[1] - steps, stop.to(device)
    ragged = len({len(p) for p in prompts}) > 1
    for layer in cache.layers if ragged else []:  # else transformers reads the mask at every token: a GPU would wait
        layer.is_compileable = True
    row, going = torch.arange(total, device=device), torch.ones(total, dtype=torch.bool, device=device)
    tokens, log_probs = torch.full((total, steps), pad_id, device=device), torch.zeros(total, steps, device=device)
    for t in range(steps):
        token, log_prob = kl.choose(logits, temperature, uniform[row, t])
        tokens[row, t], log_probs[row, t] = token, log_prob
        going &= (token[:, None] != stop).all(1)
        if t % 4 == 3:  # to ask which samples still go makes a GPU wait, so the others leave every fourth token
            kept = going.nonzero()[:, 0]
            if len(kept) == 0:
                break
            if len(kept) < len(row):
                row, token, attention, position, going = (x[kept] for x in (row, token, attention, position, going))
                cache.reorder_cache(kept)
        if t < steps - 1:
            seen = attention[:, :width + t + 1] if ragged else None
            logits = model(input_ids=token[:, None], attention_mask=seen, use_cache=True, past_key_values=cache,
                           position_ids=position + t + 1, logits_to_keep=1).logits[:, -1]
    return tokens.cpu(), log_probs.cpu()


def prefill(model, prompts: Sequence[Sequence[int]], total: int, steps: int, pad_id: int):
    """The prompts, run once, for `total` samples, as many of each: (logits of the first token [B, V], which columns of
    prompt and `steps` tokens hold any [B, L], positions of the prompts' last tokens [B, 1], keys and values)."""
    # Padded on the left, all prompts end in the same column.
    ids = pad_sequence([torch.tensor(p) for p in prompts], True, pad_id, padding_side="left").to(model.device)
    width = ids.shape[1]
    padding = torch.tensor([width - len(p) for p in prompts])
    position = (torch.arange(width + steps) - padding[:, None]).to(model.device)
    attention, position = (position >= 0).long(), position[:, :width].clamp(min=0)
    seen = attention[:, :width] if padding.any() else None
    output = model(input_ids=ids, attention_mask=seen, position_ids=position, use_cache=True, logits_to_keep=1)
    prompt_of = torch.arange(total, device=model.device) // (total // len(prompts))
    layers = output.past_key_values.layers
    for k, layer in enumerate(layers):
        if type(layer) is DynamicLayer:  # no sliding window and no state
            layers[k] = GrowingLayer()
            layers[k].update(layer.keys, layer.values)
    output.past_key_values.reorder_cache(prompt_of)
    return output.logits[prompt_of, -1], attention[prompt_of], position[prompt_of, -1:], output.past_key_values


def context_of(config) -> float:
    """The context within which positions keep their meaning. With longrope one row beyond the original context changes
    those of the whole batch."""
    rope = getattr(config, "rope_parameters", None) or {}
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len")]
    limits += [rope["original_max_position_embeddings"]] if rope.get("rope_type") == "longrope" else []
    return min(filter(None, limits), default=math.inf)


def collect(model, tokenizer, problems: Sequence[Problem], group: int, *, max_new_tokens: int, temperature: float = 1.0,
            template: str = "{question}", seed: int = 0, rows: int = 1024, cuda_graph: int = 0,
            desc: str = "sampling") -> Rollouts:
    """`group` completions of every problem, judged; about `rows` completions are sampled at a time, in whole groups.

    Raises InputError where a prompt is empty or would not fit into the model's context with its completion, and where
    the policy's logits are not finite.
    """
    prompts = [encode_prompt(tokenizer, p.question, template) for p in problems]
    context = context_of(model.config.get_text_config())
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # little left padding in a batch
    if not prompts[by_length[0]]:
        raise InputError(f"problem {by_length[0] + 1} has no tokens: this tokenizer knows none of its characters")
    if len(prompts[longest := by_length[-1]]) + max_new_tokens > context:
        raise InputError(f"problem {longest + 1} has a prompt of {len(prompts[longest])} tokens; with --max-new-tokens "
                         f"{max_new_tokens} that is more than the model's context of {context}: shorten one of them")
    stop, model = stop_ids(model, tokenizer), lowered(model)
    pad_id = stop[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    by_length = by_length[rank()::ranks()]  # this process's share
    parts = []
    with tqdm(total=len(by_length) * group, desc=desc, unit="completion", leave=False) as bar:
        per_batch = max(1, rows // group)
        for start in range(0, len(by_length), per_batch):
            chosen = by_length[start:start + per_batch]
            part = sample(model, [prompts[i] for i in chosen], group, max_new_tokens=max_new_tokens,
                          temperature=temperature, stop=stop, pad_id=pad_id, seed=seed, problems=chosen,
                          cuda_graph=cuda_graph)
            part.rewards = torch.tensor([reward(text, problems[g].answer) for text, g in
                                         zip(completion_texts(tokenizer, part), part.groups.tolist())])
            parts.append(part)
            bar.update(len(part))
            bar.set_postfix(right=f"{torch.cat([p.rewards for p in parts]).mean():.1%}")
    rollouts = Rollouts.concatenate(gathered(parts), pad_id)
    if not rollouts.log_probs.isfinite().all():  # asked when all processes know it
        raise InputError("the policy's logits are not finite: try --precision fp32, a lower learning rate before, or a "
                         "temperature above 0")
    return rollouts.select(torch.argsort(rollouts.groups, stable=True))


def completion_texts(tokenizer, rollouts: Rollouts) -> list[str]:
    """What each completion says, without special tokens."""
    rows = zip(rollouts.completions.tolist(), rollouts.length.tolist())
    return tokenizer.batch_decode([ids[:n] for ids, n in rows], skip_special_tokens=True)


# ----------------------------------------------------------------------------------------------------------- evaluation

def pass_at_k(rewards: Tensor, k: int) -> Tensor:
    """Unbiased pass@k a problem [P] from n ≥ k samples each [P, n]: 1 − C(n − c, k)/C(n, k) (2107.03374, eq. 1)."""
    n = rewards.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples a problem, not {n}")
    right = rewards.sum(1).long().tolist()
    return rewards.new_tensor([1 - math.comb(n - c, k) / math.comb(n, k) for c in right], dtype=torch.float64)


def bootstrap_interval(values: Tensor, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of values [P], by resampling problems: samples of one problem are not independent.
    (Nominal: at 97 % right on 128 problems it covers 91 %.)"""
    values = values.double().cpu()
    generator = torch.Generator().manual_seed(seed)
    means = values[torch.randint(len(values), (draws, len(values)), generator=generator)].mean(1)
    return tuple(means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist())


@torch.no_grad()
def divergence(model, reference, rollouts: Rollouts, temperature: float = 1.0,
               tokens_per_step: int = 8192) -> dict[str, float]:
    """Exact KL(π‖π_0), nats a completion and a token, and entropy, nats a token, on `rollouts` of `model` itself."""
    kl_sum = entropy_sum = torch.zeros((), dtype=torch.float64, device=model.device)
    other = None if reference is model else reference
    for rows in tqdm(micro_batches(rollouts, tokens_per_step), desc="exact KL", leave=False):
        stats = completion_stats(model, rollouts.select(rows), temperature, with_entropy=True, reference=other)
        entropy_sum = entropy_sum + stats.entropy.sum()
        kl_sum = kl_sum if other is None else kl_sum + stats.kl.sum()
    kl_sum, entropy_sum = map(sum, zip(*gathered([(kl_sum.item(), entropy_sum.item())])))
    tokens = rollouts.length.sum().item()
    return {"kl": kl_sum / len(rollouts), "kl_token": kl_sum / tokens, "entropy": entropy_sum / tokens}


def evaluate(model, reference, tokenizer, problems: Sequence[Problem], samples: int, *, pass_k: int = 8,
             temperature: float = 1.0, tokens_per_step: int = 8192, desc: str = "evaluating", **sampling) -> dict:
    """A policy's accuracy and its distance from `reference`, on fresh samples of its own.

    accuracy: avg@k, the share of right completions, k = `samples`; pass: unbiased pass@k, k = `pass_k`, or `samples`
    where they are fewer; both with 95 % intervals by bootstrap over problems. length: tokens a completion; pass_rates:
    accuracy on each problem; and what `divergence` gives. `sampling` is what `collect` takes: Config.sampling has it.
    """
    rollouts = collect(model, tokenizer, problems, samples, temperature=temperature, desc=desc, **sampling)
    rewards = rollouts.rewards.view(len(problems), samples)
    solved = pass_at_k(rewards, pass_k := min(pass_k, samples))
    return {
        "pass_rates": [round(rate, 4) for rate in rewards.mean(1).tolist()],
        "accuracy": rewards.mean().item(), "accuracy_interval": list(bootstrap_interval(rewards.mean(1))),
        "pass": solved.mean().item(), "pass_interval": list(bootstrap_interval(solved)), "pass_k": pass_k,
        "samples": samples, "length": rollouts.length.double().mean().item(),
        **divergence(model, reference, rollouts, temperature, tokens_per_step),
    }


# ------------------------------------------------------------------------------------------------- what a run remembers

class Memory:
    """What a run has come to, in its folder, so that it can be stopped at any moment and go on as if it had not been.

    A file is written whole or not at all. One that is damaged is made again, as all that follows from the seed can be;
    one of a run with other settings (`of`) is refused. Without a folder nothing is kept.
    """

    def __init__(self, folder: Path | None = None, of: str = ""):
        self.folder, self.of, self.due = (folder if rank() == 0 else None), of, 0.0  # the first process keeps it all

    def inside(self, name: str) -> "Memory":
        return Memory(self.folder and self.folder / name, self.of)

    def get(self, name: str, wanted: Callable = lambda value: True):
        """What was put there, tensors on the CPU; None where there is nothing, or nothing that is `wanted`, which is
        asked before other processes are sent gigabytes. Raises InputError."""
        value = self.read(name)
        values = [value if value is not None and wanted(value) else None]
        if ranks() > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def read(self, name: str):
        if self.folder is None or not (path := self.folder / f"{name}.pt").exists():
            return None
        try:
            if damaged := ZipFile(path).testzip():  # torch reads a turned bit without a word
                raise ValueError(damaged)
            of, value = torch.load(path, map_location="cpu", weights_only=True).values()
        except Exception as error:  # of several kinds: cut short, a bit turned, something else altogether
            print(f"{path} is damaged and is made again ({type(error).__name__})", file=sys.stderr)
            return None
        if of != self.of:
            raise InputError(f"{path} is of a run with other settings: start a new one with --run "
                             "(figures/gsm8k.py: --folder)")
        return value

    def put(self, name: str, value) -> None:
        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)
            beside = self.folder / f"{name}.part"
            with open(beside, "wb") as file:
                torch.save({"of": self.of, "value": value}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, self.folder / f"{name}.pt")

    def keep(self, *names: str) -> None:
        """Remove all but these."""
        if self.folder:
            for path in self.folder.glob("*.pt"):
                path.stem in names or path.unlink()

    def note(self, name: str, done: int, numbers: dict[str, float]) -> None:
        """Line done + 1 of name.jsonl, for a person to plot; later lines, of a run that was stopped, are dropped."""
        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)
            path, beside = (self.folder / f"{name}.{end}" for end in ("jsonl", "part"))
            before = path.read_text().splitlines(True)[:done] if path.exists() else []
            beside.write_text("".join(before) + json.dumps(numbers) + "\n")
            os.replace(beside, path)

    def resume_stage(self, name: str, model, optimizer, more: dict) -> int:
        """How many updates of this stage were done when the run was stopped, or 0. Model, optimizer and `more` are set,
        in place, to what `put_stage` was given then."""
        if (state := self.get("state", lambda state: state["stage"] == name)) is None:
            return 0
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        more.update(state["more"])
        return state["done"]

    def put_stage(self, name: str, model, optimizer, more: dict, done: int) -> None:
        """For `resume_stage`. Now and then: at most a twentieth of the time goes into writing."""
        if (began := time.monotonic()) < self.due:
            return
        self.put("state", {"stage": name, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                           "more": more, "done": done})
        self.due = time.monotonic() + 20 * (time.monotonic() - began)


# ---------------------------------------------------------------------------------------------------- several processes
#
# Started by torchrun, every process has the same policy, batch and random numbers, and computes a share: of the prompts
# in `collect`, of the micro-batches in `micro_batches`. What they find is put together at once, so that all stay alike.

def join(device: str = "auto") -> None:
    """Join torchrun's process group where there is one, each process with a GPU of its own where there are GPUs."""
    if "LOCAL_RANK" not in os.environ or dist.is_initialized():
        return
    if ":" in device:
        raise InputError(f"--device {device!r} is one card, and torchrun has a process for each: leave it out")
    if cuda := device != "cpu" and torch.cuda.is_available():
        if int(os.environ["LOCAL_WORLD_SIZE"]) > (cards := torch.cuda.device_count()):
            raise InputError(f"there is one process for each GPU: give torchrun --nproc_per_node {cards} at most")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    if rank():  # the first one speaks
        sys.stdout = open(os.devnull, "w")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gathered(values: list) -> list:
    """The values of all processes, one after the other; tensors on the CPU."""
    every = [values] * ranks()
    if ranks() > 1:
        dist.all_gather_object(every, values)
    return [value for part in every for value in part]


def added_up(model, numbers: Tensor) -> list[float]:
    """The numbers [n], in one wait for the device, and the gradients in place, summed over the processes."""
    for weight in model.parameters() if ranks() > 1 else ():
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        dist.all_reduce(weight.grad)
    return [sum(parts) for parts in zip(*gathered([numbers.tolist()]))]


# ---------------------------------------------------------------------- faster sampling, with the text of the plain one

def lowered(model):
    """The policy to sample from: the same numbers, without autocast's casting of all its weights at every token."""
    device = model.device.type
    if not torch.is_autocast_enabled(device):
        return model
    model = copy.deepcopy(model, {id(x): x for x in (*model.parameters(), *model.buffers())})  # which stay shared
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):  # an embedding that is tied to one stays as it is
            layer.weight = torch.nn.Parameter(layer.weight.detach().to(torch.get_autocast_dtype(device)), False)
    return model


def captured(step: Callable) -> Callable:
    """`step` as a CUDA graph: one launch for all of its operations."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


class AsRead:
    """Keys and values [B, heads, L, d] in the dtype that attention reads: under autocast half of the memory."""

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        device = keys.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else keys.dtype
        return super().update(keys.to(dtype), values.to(dtype), *args, **kwargs)


class GrowingLayer(AsRead, DynamicLayer):
    """Of the tokens so far."""


class FixedLayer(AsRead, StaticLayer):
    """Of all tokens there will be, in their place."""


@torch.inference_mode()
def decode_in_graphs(model, prompts: Sequence[Sequence[int]], uniform: Tensor, temperature: float, stop: Tensor,
                     pad_id: int, capture: Callable = captured) -> tuple[Tensor, Tensor]:
    """What `decode` returns, by a step that `capture` makes a CUDA graph of: a GPU waits for the launches of a small
    model longer than it computes. Whatever changes from step to step, even which one it is, lies in tensors that stay
    in their place. Rows leave when half of them have ended, and the smaller step is captured anew.

    Raises InputError for a model with another attention than sdpa, whose masks differ, and for one that remembers
    something else than the keys and values of all tokens: a sliding window, a state.
    """
    (total, steps), device = uniform.shape, model.device
    logits, attention, position, begun = prefill(model, prompts, total, steps, pad_id)
    if model.config._attn_implementation != "sdpa" or any(type(layer) is not GrowingLayer for layer in begun.layers):
        raise InputError(f"--cuda-graph 1 cannot sample from {type(model).__name__}: it needs sdpa attention to the "
                         "keys and values of all tokens")
    width, stop, t = attention.shape[1] - steps, stop.to(device), torch.zeros(1, dtype=torch.long, device=device)
    cache = Cache(layers=[FixedLayer(width + steps) for _ in begun.layers])
    for layer, old in zip(cache.layers, begun.layers):
        layer.update(old.keys, old.values)
    del begun, old
    seen = F.pad(attention[:, None, None, :width].bool(), (0, steps))  # [B, 1, 1, L], as sdpa takes it
    row, going = torch.arange(total, device=device), torch.ones(total, dtype=torch.bool, device=device)
    tokens, log_probs = torch.full((total, steps), pad_id, device=device), torch.zeros(total, steps, device=device)

    def step() -> None:
        token, log_prob = kl.choose(logits, temperature, uniform[row, t])
        tokens[row, t], log_probs[row, t] = token, log_prob
        going.logical_and_((token[:, None] != stop).all(1))
        seen.index_fill_(3, width + t, True)
        logits.copy_(model(input_ids=token[:, None], attention_mask=seen, use_cache=True, past_key_values=cache,
                           position_ids=position + t + 1, logits_to_keep=1).logits[:, -1])
        t.add_(1)

    run = None
    for done in range(1, steps + 1):
        if run is None:  # the first step of a shape prepares what may not be prepared in a capture
            step()
            run = capture(step)  # which runs nothing
        else:
            run()
        if done % 16 == 0:
            kept = going.nonzero()[:, 0]
            if len(kept) == 0:
                break
            if len(kept) <= len(row) // 2:
                run = None  # first, since it reads and writes what is given up here
                row, logits, position, seen, going = (x[kept] for x in (row, logits, position, seen, going))
                cache.reorder_cache(kept)
    return tokens.cpu(), log_probs.cpu()
