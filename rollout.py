"""Policies and text: load a policy, sample completions, the Rollouts batch, evaluate a policy.

A policy is a pair (model, tokenizer) as transformers loads them. Nothing here asks which model it is.
Models stay in eval mode everywhere, so dropout is off alike where tokens are sampled and where they are scored.
"""

import itertools
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

import kl
from rewards import InputError, Problem, reward


# cuDNN's attention prepares every new shape for tens of milliseconds, and each sampled token makes a new shape.
torch.backends.cuda.enable_cudnn_sdp(False)

# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = ("#000000", "#E69F00", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#F0E442")


# ------------------------------------------------------------------------------------------------------------ policies

def load_policy(name: str, device: str | torch.device = "cpu"):
    """(model, tokenizer) from a checkpoint folder or a hub name; fp32 weights, eval mode.

    Raises InputError where there is no such model or device, or nothing that ends a text.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise InputError(f"--model {name!r} is no checkpoint folder or hub name that transformers can load: {reason}") from None
    if not stop_ids(model, tokenizer):
        raise InputError(f"--model {name!r} names no end-of-sequence token: set eos_token_id in its generation_config.json")
    try:
        return model.to(device).eval(), tokenizer
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {str(device)!r} cannot be used: {str(error).strip().splitlines()[0]}") from None


def save_policy(model, tokenizer, folder: str | Path) -> None:
    """Write a checkpoint folder that `load_policy`, and transformers itself, read back."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def stop_ids(model, tokenizer) -> list[int]:
    """Every id that ends a completion: the tokenizer's own and those of the generation config (there may be several)."""
    ids = {tokenizer.eos_token_id}
    for config in (model.generation_config, model.config):
        eos = getattr(config, "eos_token_id", None)
        ids |= set(eos) if isinstance(eos, (list, tuple)) else {eos}
    return sorted(i for i in ids if i is not None)


def encode_prompt(tokenizer, question: str, template: str = "{question}") -> list[int]:
    """Prompt ids: the question in `template`, as the user's turn of a chat where the tokenizer has a chat template."""
    text = template.replace("{question}", question)
    if tokenizer.chat_template is None:
        return tokenizer.encode(text)
    chat = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)


# ------------------------------------------------------------------------------------------------------------ Rollouts

@dataclass
class Rollouts:
    """B completions with their prompts, on the CPU; the stored batch of a round.

    Token in, token out: these ids are what the behaviour policy saw and chose, and text is never encoded again.
    Row b is prompt, completion, padding; what is what follows from the lengths alone, so a padding id that is also an
    end-of-sequence id does no harm. Token t of completion b is ids[b, prompt_length[b] + t].
    """

    ids: Tensor  # [B, L] prompt, completion, padding
    prompt_length: Tensor  # [B]
    length: Tensor  # [B] tokens of the completion, its end-of-sequence token included
    log_probs: Tensor  # [B, T] behaviour log-probs at the sampling temperature, 0 after the end
    rewards: Tensor  # [B] 1 right, 0 wrong
    groups: Tensor  # [B] index of the problem

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
        """[B, T] where in a row of `ids` each completion token stands; past the end, the row's last column."""
        steps = torch.arange(self.log_probs.shape[1], device=self.length.device)
        return (self.prompt_length[:, None] + steps).clamp(max=self.ids.shape[1] - 1)

    @property
    def completions(self) -> Tensor:
        """[B, T] the sampled tokens."""
        return self.ids.gather(1, self.completion_positions)

    def distinct(self) -> tuple[Tensor, Tensor]:
        """(rows [n], no two of them alike in prompt and completion; which of these each row [B] is a copy of).

        A group repeats itself, a sure policy's most of all, and what the copies cost is paid once.
        """
        return first_of_each(torch.cat([self.prompt_length[:, None], self.length[:, None], self.ids], 1))

    def prompts(self) -> tuple[Tensor, Tensor]:
        """(rows [n], no two of them alike in their prompts; which of these begins as each row [B] does)."""
        prompts = self.ids[:, :int(self.prompt_length.max())]
        inside = torch.arange(prompts.shape[1], device=self.ids.device) < self.prompt_length[:, None]
        return first_of_each(torch.where(inside, prompts, -1))

    def select(self, rows: Tensor) -> "Rollouts":
        """These rows, with the columns that none of them uses cut off."""
        part = Rollouts(*(getattr(self, f.name)[rows] for f in fields(self)))
        width, longest = int(part.total_length.max()), int(part.length.max())
        return replace(part, ids=part.ids[:, :width], log_probs=part.log_probs[:, :longest])

    def to(self, device) -> "Rollouts":
        return Rollouts(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))

    def save(self, path: str | Path) -> None:
        torch.save({f.name: getattr(self, f.name) for f in fields(self)}, path)

    @staticmethod
    def load(path: str | Path) -> "Rollouts":
        return Rollouts(**torch.load(path, weights_only=True))

    @staticmethod
    def concatenate(parts: Sequence["Rollouts"], pad_id: int) -> "Rollouts":
        """One batch from several, padded to the widest."""
        width, longest = max(p.ids.shape[1] for p in parts), max(p.log_probs.shape[1] for p in parts)

        def padded(x: Tensor, columns: int, value: float) -> Tensor:
            return torch.nn.functional.pad(x, (0, columns - x.shape[1]), value=value)

        return Rollouts(ids=torch.cat([padded(p.ids, width, pad_id) for p in parts]),
                        log_probs=torch.cat([padded(p.log_probs, longest, 0.0) for p in parts]),
                        **{name: torch.cat([getattr(p, name) for p in parts])
                           for name in ("prompt_length", "length", "rewards", "groups")})


def first_of_each(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(the first [n] of each kind of row [B, k], the kind [B] of every row)."""
    kinds, kind = torch.unique(rows, dim=0, return_inverse=True)
    index = torch.arange(len(rows), device=rows.device)
    return index.new_zeros(len(kinds)).scatter_reduce_(0, kind, index, "amin", include_self=False), kind


def in_batches(rollouts: Rollouts, size: int, generator: torch.Generator) -> list[Tensor]:
    """Row indices in shuffled batches of about `size`: whole groups, since what they have in common is run once."""
    _, group = torch.unique(rollouts.groups, return_inverse=True)
    place = torch.randperm(int(group.max()) + 1, generator=generator)[group]
    members = place.bincount()
    batch = (members.cumsum(0) - members) // size
    sizes = batch[place].bincount()
    return list(place.argsort(stable=True).split(sizes[sizes > 0].tolist()))


def by_tokens(rollouts: Rollouts, budget: int, padding: float = 0.1) -> list[Tensor]:
    """Row indices in batches of like lengths, the longest first. Each has at most `budget` tokens, padding included, but
    at least one row, and less than `padding` of them are padding. Copies of a row share its batch and count once.
    """
    distinct, copy_of = rollouts.distinct()
    lengths = rollouts.total_length[distinct]
    order = lengths.argsort(descending=True, stable=True)
    copies = copy_of.bincount()[order]
    sizes, rows, width, tokens = [0], 0, 0, 0
    for length, count in zip(lengths[order].tolist(), copies.tolist()):
        full = (rows + 1) * width
        if full > budget or tokens + length <= (1 - padding) * full:
            sizes.append(0)
            rows, tokens = 0, 0
        sizes[-1] += count
        rows, tokens, width = rows + 1, tokens + length, width if rows else length
    return list(order.argsort()[copy_of].argsort(stable=True).split(sizes))


# ------------------------------------------------------------------------------------------------------------- scoring

SHAPES: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # model → (scale, cap) of its output layer, or None


@torch.no_grad()
def output_head(model) -> kl.Head | None:
    """A model's output layer as a `kl.Head`, or None where it is anything else.

    transformers' models scale or cap their logits by these fields of their configs. That is not taken on trust: the
    logits of two tokens must be the model's own.
    """
    layer = model.get_output_embeddings()
    if model not in SHAPES:
        config = model.config.get_text_config()
        cap = getattr(config, "final_logit_softcapping", None)  # Gemma
        scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
        scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
        SHAPES[model] = None
        if isinstance(layer, torch.nn.Linear) and layer.bias is None:
            ids = torch.tensor([[0, 1]], device=layer.weight.device)
            logits = model(input_ids=ids, use_cache=False).logits
            ours = scale * layer(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
            ours = ours if cap is None else cap * (ours / cap).tanh()
            tolerance = torch.finfo(logits.dtype).eps ** 0.5 * logits.abs().max()
            SHAPES[model] = (scale, cap) if (ours - logits).abs().max() <= tolerance else None
    return None if SHAPES[model] is None else kl.Head(layer.weight, *SHAPES[model])


def computing_dtype(states: Tensor) -> torch.dtype:
    """The type in which autocast has products computed, where it is on; else the tensor's own."""
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype


class PromptLayer(DynamicLayer):
    """One layer's keys and values of the prompts. It does not grow: with checkpointing the layer runs a second time."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        self.keys, self.values, self.is_initialized = key_states, value_states, True
        return key_states, value_states


class ContinuedLayer(PromptLayer):
    """The same, for rows that go on from them: row b after the prompt tokens places[b] [B, P] of all [n·P]."""

    def __init__(self, prompts: PromptLayer, places: Tensor):
        super().__init__()
        super().update(prompts.keys, prompts.values)
        self.places = places

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        return self.continued(self.keys, key_states), self.continued(self.values, value_states)

    def continued(self, prompts: Tensor, new: Tensor) -> Tensor:
        tokens = prompts.transpose(1, 2).flatten(0, 1).index_select(0, self.places.flatten())
        return torch.cat([tokens.unflatten(0, self.places.shape).transpose(1, 2), new], 2)


# Where a prompt is run once. A GPU waits for launches, and a second pass through the layers has as many again: on an H100
# steps of 2,048 to 8,192 tokens took about twice as long, with SmolLM2-135M and with 0.6 B parameters.
SHARING = {"cpu"}
PLAIN_CACHES: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # model → bool


def is_plain(cache) -> bool:
    """Whether a cache holds keys and values of the tokens, as transformers' own does, and nothing of a model's own kind."""
    return type(cache) is DynamicCache and all(type(x) in (DynamicLayer, DynamicSlidingWindowLayer) for x in cache.layers)


@torch.no_grad()
def has_plain_cache(model) -> bool:
    """Asked of the model itself, once; of what is no model of transformers', nothing is known."""
    if model not in PLAIN_CACHES:
        ids = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
        PLAIN_CACHES[model] = isinstance(model, PreTrainedModel) and is_plain(
            getattr(model.base_model(input_ids=ids, use_cache=True), "past_key_values", None))
    return PLAIN_CACHES[model]


def completion_states(model, rollouts: Rollouts) -> tuple[Tensor, kl.Head | None]:
    """(hidden states [N, d] before each of the N completion tokens, output head); or their logits [N, V] and None.

    The distribution of a token is the output one position before it; nothing else reaches the output layer. A prompt is
    run once for all rows that it begins where that pays: on a CPU, if it saves a tenth of the tokens; with less the
    attention mask, which whole rows do without, costs as much.
    """
    head = output_head(model)

    def run(ids: Tensor, first: Tensor, **cache) -> Tensor:
        """Outputs [B·L, d or V] of tokens [B, L], of which each row's first stands at position first [B, 1]."""
        position = first + torch.arange(ids.shape[1], device=ids.device)
        output = (model if head is None else model.base_model)(input_ids=ids, position_ids=position, **cache)
        return (output.logits if head is None else output.last_hidden_state).flatten(0, 1)

    prompts, prompt_of = rollouts.prompts()
    whole, steps = rollouts.ids[:, :-1], rollouts.log_probs.shape[1] - 1
    shared = len(prompts) * int(rollouts.prompt_length.max()) + len(whole) * steps
    if whole.device.type in SHARING and shared <= 0.9 * whole.numel() and has_plain_cache(model):
        states, before = states_after_prompts(run, rollouts, prompts, prompt_of)
    else:  # padding is on the right, where causal attention never looks from inside a completion: no mask is needed
        states = run(whole, torch.zeros_like(rollouts.length)[:, None], use_cache=False)
        row = torch.arange(len(whole), device=whole.device)[:, None]
        before = row * whole.shape[1] + rollouts.completion_positions - 1
    states = states.index_select(0, before[rollouts.mask.bool()])
    return states.to(computing_dtype(states)), head  # as the sampler's output layer has them


def states_after_prompts(run: Callable, rollouts: Rollouts, prompts: Tensor, prompt_of: Tensor) -> tuple[Tensor, Tensor]:
    """(outputs of all tokens run, the place [B, T] among them of the one before each completion token).

    First the prompts of the rows `prompts` [n]; then the completions, row b on the keys and values of prompt_of[b].
    """
    length, steps = rollouts.prompt_length[:, None], rollouts.log_probs.shape[1] - 1
    begun = rollouts.ids[prompts, :int(length.max())]
    width, first = begun.shape[1], prompt_of[:, None] * begun.shape[1]
    cache = Cache(layer_class_to_replicate=PromptLayer)
    states, before = run(begun, torch.zeros_like(prompts)[:, None], past_key_values=cache, use_cache=True), first + length - 1
    if steps == 0:
        return states, before
    # Prompts move to the right, up to their completions, so that windows of attention reach as far as in whole rows.
    column = torch.arange(width + steps, device=length.device) - (width - length)
    places = first + column[:, :width].clamp(min=0)
    cache = Cache(layers=[ContinuedLayer(layer, places) for layer in cache.layers])
    after = run(rollouts.completions[:, :-1], length, past_key_values=cache, use_cache=True, attention_mask=(column >= 0).long())
    place = len(states) + torch.arange(len(after), device=length.device).view(-1, steps)
    return torch.cat([states, after]), torch.cat([before, place], 1)


def completion_figures(model, rollouts: Rollouts, temperature: float = 1.0, *, with_entropy: bool = False,
                       reference=None) -> kl.TokenFigures:
    """log π(y_t|s_t), on request the entropy and the exact KL to the model `reference`, at every stored prefix [B, T],
    0 after the end, on the rollouts' device, with gradients where they are enabled.
    """
    distinct, copy_of = rollouts.distinct()
    rollouts = rollouts.select(distinct)
    mask = rollouts.mask.bool()
    with torch.no_grad():
        reference = None if reference is None else completion_states(reference, rollouts)
    states, head = completion_states(model, rollouts)
    figures = kl.token_figures(states, head, rollouts.completions[mask], temperature, with_entropy=with_entropy,
                               reference=reference)
    return kl.TokenFigures(*(x if x is None else x.new_zeros(mask.shape).masked_scatter(mask, x).index_select(0, copy_of)
                             for x in figures))


@torch.no_grad()
def score(model, rollouts: Rollouts, temperature: float = 1.0, tokens_per_step: int = 8192,
          desc: str = "scoring") -> Tensor:
    """log π(y_t|s_t) [B, T] of the stored completions, 0 after their ends, on the CPU."""
    device = next(model.parameters()).device
    scores = torch.zeros_like(rollouts.log_probs)
    for rows in tqdm(by_tokens(rollouts, tokens_per_step), desc=desc, leave=False):
        log_probs = completion_figures(model, rollouts.select(rows).to(device), temperature).log_prob
        scores[rows, :log_probs.shape[1]] = log_probs.cpu()
    return scores


# ------------------------------------------------------------------------------------------------------------ sampling

class ReservedLayer(DynamicLayer):
    """One layer's keys and values, with room for more rows and for every token to come: nothing is copied as they grow.

    It takes the place of transformers' dynamic layers, which build new tensors for every token. Under autocast attention
    computes in bf16: there it holds bf16 to begin with, where a norm of the keys had left fp32.
    """

    def __init__(self, prompt: DynamicLayer, rows: int, new_tokens: int):
        super().__init__()
        self.is_initialized, self.is_sliding = True, prompt.is_sliding
        self.sliding_window = getattr(prompt, "sliding_window", None)
        self.seen, self.filled = prompt.get_seq_length(), prompt.keys.shape[-2]
        for name in ("keys", "values"):
            states = getattr(prompt, name)
            room = states.new_empty(rows, states.shape[1], self.filled + new_tokens, states.shape[3],
                                    dtype=computing_dtype(states))
            room[:len(states), :, :self.filled] = states
            setattr(self, name, room)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        start, end = self.filled - self.visible(), self.filled + key_states.shape[-2]
        rows = len(key_states)
        self.keys[:rows, :, self.filled:end] = key_states
        self.values[:rows, :, self.filled:end] = value_states
        self.seen, self.filled = self.seen + key_states.shape[-2], end
        return self.keys[:rows, :, start:end], self.values[:rows, :, start:end]

    def visible(self) -> int:
        """How many of the earlier tokens the next one attends to."""
        return self.filled if self.sliding_window is None else min(self.filled, self.sliding_window - 1)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.visible() + query_length, self.seen - self.visible()

    def get_seq_length(self) -> int:
        return self.seen

    def copy_rows(self, source: Tensor, target: Tensor) -> None:
        for states in (self.keys, self.values):
            states[target, :, :self.filled] = states[source, :, :self.filled]


def branch(row: Tensor, chosen: Tensor, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """The tree of a batch grows by a token: samples [S] whose prefixes were `row`s of the cache have `chosen` tokens.

    Samples that still agree go on in one row. Returns where each row of the next cache comes from [N], its token [N], and
    each sample's row there [S]. One child of a row stays in its place; others, and the last rows, go where rows are free.
    """
    children, child_of = torch.unique(row * vocabulary + chosen, return_inverse=True)
    parents = children // vocabulary
    stays = (parents < len(parents)) & (parents != torch.cat([parents.new_full((1,), -1), parents[:-1]]))
    taken = torch.zeros_like(stays)
    taken[parents[stays]] = True
    place = torch.where(stays, parents, 0)
    place[~stays] = (~taken).nonzero()[:, 0]
    order = place.argsort()
    return parents[order], children[order] % vocabulary, place[child_of]


@torch.no_grad()
def sample(model, prompts: Sequence[Sequence[int]], group: int, *, max_new_tokens: int, temperature: float,
           stop: Sequence[int], pad_id: int, seed: int, problems: Tensor | None = None) -> Rollouts:
    """`group` completions of every prompt (a list of ids): P·group rows, a prompt's side by side; rewards are NaN.

    The completions of a prompt are a tree: the prompt is run once, and so is every prefix that several of them have in
    common; where they part, its key–value cache is copied. Prompts are padded on the left, so that all sequences end in
    the same column. The behaviour log-probs come from the very logits that were sampled. The noise belongs to (problem,
    sample), by default the prompt's index: the same seed gives the same text in any batch, up to rounding.
    """
    device = next(model.parameters()).device
    prompt_length = torch.tensor([len(p) for p in prompts])
    width, total = int(prompt_length.max()), len(prompts) * group
    left_padded = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in prompts], device=device)
    attention = torch.arange(width + max_new_tokens, device=device) >= (width - prompt_length.to(device))[:, None]
    position = torch.arange(width, device=device) - (width - prompt_length.to(device))[:, None]

    output = model(input_ids=left_padded, attention_mask=attention[:, :width].long(), use_cache=True,
                   position_ids=position.clamp(min=0), logits_to_keep=1)
    cache, logits, position = output.past_key_values, output.logits[:, -1], prompt_length.to(device)
    reserved = is_plain(cache)  # else it is the model's own
    if reserved:
        cache.layers = [ReservedLayer(layer, total, max_new_tokens) for layer in cache.layers]

    groups = torch.arange(len(prompts)) if problems is None else problems
    row = torch.arange(len(prompts), device=device).repeat_interleave(group)  # of the cache: the sample's prefix
    noise = kl.uniform_noise(seed, groups.to(device)[row], torch.arange(total, device=device) % group, max_new_tokens)
    tokens = torch.full((total, max_new_tokens), pad_id, device=device)
    log_probs = torch.zeros(total, max_new_tokens, device=device)
    length = torch.zeros(total, dtype=torch.long, device=device)
    stop = torch.tensor(stop, device=device)
    alive = torch.arange(total, device=device)  # the samples still going
    for t in range(max_new_tokens):
        chosen, log_prob = kl.choose(logits[row], temperature, noise[alive, t])
        tokens[alive, t], log_probs[alive, t] = chosen, log_prob
        length[alive] += 1
        going = (~torch.isin(chosen, stop)).nonzero()[:, 0]
        if len(going) == 0 or t == max_new_tokens - 1:
            break
        alive = alive[going]
        parents, token, row = branch(row[going], chosen[going], logits.shape[-1])
        attention, position = attention[parents], position[parents]
        moved = (parents != torch.arange(len(parents), device=device)).nonzero()[:, 0]
        if reserved:
            source = parents[moved]
            for layer in cache.layers if len(moved) else ():
                layer.copy_rows(source, moved)
        elif len(moved) or len(parents) < len(logits):
            cache.reorder_cache(parents)
        logits = model(input_ids=token[:, None], attention_mask=attention[:, :width + t + 1].long(), use_cache=True,
                       position_ids=position[:, None] + t, past_key_values=cache, logits_to_keep=1).logits[:, -1]

    tokens, log_probs, length = tokens.cpu(), log_probs[:, :length.max()].cpu(), length.cpu()
    ids = [torch.cat([torch.tensor(prompts[row // group]), tokens[row, :n]]) for row, n in enumerate(length.tolist())]
    return Rollouts(pad_sequence(ids, batch_first=True, padding_value=pad_id), prompt_length.repeat_interleave(group), length,
                    log_probs, torch.full((total,), math.nan), groups.repeat_interleave(group))


def collect(model, tokenizer, problems: Sequence[Problem], group: int, *, max_new_tokens: int, temperature: float = 1.0,
            template: str = "{question}", seed: int = 0, rows: int = 1024, desc: str = "sampling") -> Rollouts:
    """`group` completions of every problem, judged; `rows` completions are sampled at a time.

    Raises InputError where a prompt and its completion would not fit into the model's context.
    """
    prompts = [encode_prompt(tokenizer, p.question, template) for p in problems]
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
    if len(prompts[longest]) + max_new_tokens > context:
        raise InputError(f"problem {longest} has a prompt of {len(prompts[longest])} tokens; with --max-new-tokens "
                         f"{max_new_tokens} that is more than the model's context of {context}: shorten one of them")
    stop = stop_ids(model, tokenizer)
    pad_id = stop[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # little left padding in a batch
    parts, right, done = [], 0.0, 0
    with tqdm(total=len(prompts) * group, desc=desc, unit="completion", leave=False) as bar:
        per_batch = max(1, rows // group)
        for start in range(0, len(prompts), per_batch):
            chosen = by_length[start:start + per_batch]
            part = sample(model, [prompts[i] for i in chosen], group, max_new_tokens=max_new_tokens,
                          temperature=temperature, stop=stop, pad_id=pad_id, seed=seed, problems=torch.tensor(chosen))
            part.rewards = torch.tensor([reward(text, problems[g].answer) for text, g in
                                         zip(completion_texts(tokenizer, part), part.groups.tolist())])
            parts.append(part)
            right, done = right + part.rewards.sum().item(), done + len(part)
            bar.update(len(part))
            bar.set_postfix(right=f"{right / done:.1%}")
    rollouts = Rollouts.concatenate(parts, pad_id)
    return rollouts.select(torch.argsort(rollouts.groups, stable=True))


def completion_texts(tokenizer, rollouts: Rollouts) -> list[str]:
    """What each completion says, without special tokens."""
    rows = zip(rollouts.completions.tolist(), rollouts.length.tolist())
    return tokenizer.batch_decode([ids[:n] for ids, n in rows], skip_special_tokens=True)


# ---------------------------------------------------------------------------------------------------------- evaluation

def pass_at_k(rewards: Tensor, k: int) -> Tensor:
    """Unbiased pass@k a problem [P] from n ≥ k samples each [P, n]: 1 − C(n − c, k)/C(n, k) (2107.03374, eq. 1)."""
    n = rewards.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples a problem, not {n}")
    wrong = n - rewards.sum(1).long()
    table = torch.tensor([1 - math.comb(w, k) / math.comb(n, k) for w in range(n + 1)], dtype=torch.float64)
    return table.to(rewards.device)[wrong]


def bootstrap_interval(values: Tensor, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of values [P], by resampling problems: samples of one problem are not independent."""
    values = values.double().cpu()
    generator = torch.Generator().manual_seed(seed)
    means = values[torch.randint(len(values), (draws, len(values)), generator=generator)].mean(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


@torch.no_grad()
def divergence(model, reference, rollouts: Rollouts, temperature: float = 1.0,
               tokens_per_step: int = 8192) -> dict[str, float]:
    """Exact KL(π‖π_0) and entropy at the prefixes of `rollouts`, which `model` must have sampled: nats a completion, a token."""
    device = next(model.parameters()).device
    kl_sum = entropy_sum = torch.zeros((), dtype=torch.float64, device=device)
    other = None if reference is model else reference
    for rows in tqdm(by_tokens(rollouts, tokens_per_step), desc="exact KL", leave=False):
        batch = rollouts.select(rows).to(device)
        figures = completion_figures(model, batch, temperature, with_entropy=True, reference=other)
        entropy_sum = entropy_sum + figures.entropy.sum()
        kl_sum = kl_sum if other is None else kl_sum + figures.kl.sum()
    kl_sum, entropy_sum = kl_sum.item(), entropy_sum.item()
    tokens = rollouts.length.sum().item()
    return {"kl": kl_sum / len(rollouts), "kl_token": kl_sum / tokens, "entropy": entropy_sum / tokens}


def evaluate(model, reference, tokenizer, problems: Sequence[Problem], samples: int, *, temperature: float = 1.0,
             desc: str = "evaluating", **sampling) -> dict[str, float | list[float]]:
    """A policy's accuracy and its distance from `reference`, on fresh samples of its own.

    accuracy: avg@k, the share of right completions, k = `samples`; pass: unbiased pass@k for k = min(8, samples), both
    with 95 % intervals by bootstrap over problems. kl, kl_token: exact KL(π‖π_0) in nats a completion and a token;
    entropy: nats a token; length: tokens a completion; pass_rates: the accuracy on each problem.
    """
    rollouts = collect(model, tokenizer, problems, samples, temperature=temperature, desc=desc, **sampling)
    rewards = rollouts.rewards.view(len(problems), samples)
    solved = pass_at_k(rewards, min(8, samples))
    return {
        "pass_rates": [round(rate, 4) for rate in rewards.mean(1).tolist()],
        "accuracy": rewards.mean().item(), "accuracy_interval": list(bootstrap_interval(rewards.mean(1))),
        "pass": solved.mean().item(), "pass_interval": list(bootstrap_interval(solved)), "samples": samples,
        **divergence(model, reference, rollouts, temperature), "length": rollouts.length.double().mean().item(),
    }


def table(rows: Sequence[dict], header: bool = True) -> str:
    """Policies as lines: accuracy with its 95 % interval over problems, pass@8 (from 8 samples on), KL to the first base, entropy."""
    lines = [f"{'policy':36} {'avg@k':>6}  {'95 % interval':15} {'k':>3} {'pass@8':>7} {'KL, nats/completion':>20} "
             f"{'entropy, nats/token':>20}"] if header else []
    for row in rows:
        on_its_way = [f", {unit} {row[unit]}" for unit in ("epoch", "step") if unit in row]
        low, high = row["accuracy_interval"]
        lines.append(f"{row['policy'] + ''.join(on_its_way):36} {row['accuracy']:6.1%}  {low:6.1%} – {high:6.1%} "
                     f"{row['samples']:3} {format(row['pass'], '.1%') if row['samples'] >= 8 else '–':>7} "
                     f"{row['kl']:20.3f} {row['entropy']:20.3f}")
    return "\n".join(lines)


def draw_frontier(rows: Sequence[dict], path: str | Path, budget: float | None = None) -> None:
    """Accuracy against KL: every policy's way, its end large with its interval; the budget; and the limit.

    The limit, the least KL at which any policy can have an accuracy, is drawn where the base (the first row) was
    sampled 64 times a problem or more: from fewer, problems that look unsolvable would bend it.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    ways: dict[str, list[dict]] = {}
    for row in rows:
        name = row["policy"].replace("student on its way", "ERPD student")
        ways.setdefault(name if row["round"] == 1 else f"{name}, round {row['round']}", []).append(row)
    for (name, way), colour, marker in zip(ways.items(), itertools.cycle(COLOURS), itertools.cycle("*vsD^oPX")):
        x, y, (low, high) = [r["kl"] for r in way], [r["accuracy"] for r in way], way[-1]["accuracy_interval"]
        axes.plot(x, y, color=colour, marker=marker, markersize=4, linewidth=1, label=name)
        axes.errorbar(x[-1], y[-1], [[max(0.0, y[-1] - low)], [max(0.0, high - y[-1])]], color=colour, marker=marker,
                      markersize=8, capsize=3)
    if rows[0]["samples"] >= 64:
        accuracy, least = kl.least_kl(torch.tensor(rows[0]["pass_rates"]))
        axes.plot(least, accuracy, color="black", linewidth=1, linestyle="--", label="the limit: least KL of any policy")
    if budget is not None:
        axes.axvline(budget, color="grey", linewidth=1, linestyle=":", label=f"KL budget, {budget:g} nats")
    axes.set(xlabel="KL(π‖π₀) on the policy's own samples, nats a completion", ylabel="right completions",
             title="Accuracy against the KL spent for it")
    axes.set_xscale("symlog", linthresh=0.1)
    axes.set_xlim(-0.004, 1.3 * max(0.2, *(row["kl"] for row in rows)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
