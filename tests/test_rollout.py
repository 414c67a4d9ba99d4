"""rollout.py, against transformers' own forward pass, loss and generate on single rows without padding."""

import math
from dataclasses import fields
from functools import partial
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from tokenizers.processors import TemplateProcessing
from torch.distributions import Categorical, kl_divergence
from torch.nn.utils.rnn import pad_sequence
from torch.testing import assert_close
from transformers import BloomConfig, GPT2Config

import rollout
from conftest import CHAT, EOS, WORDS, V
from rewards import InputError, Problem
from figures.experiments import Combined
from figures.speed import counted
from rollout import (Memory, Rollouts, bootstrap_interval, captured, collect, completion_stats, completion_texts,
                     context_of, decode, decode_in_graphs, divergence, encode_prompt, evaluate, load_policy, lowered,
                     micro_batches, mini_batches, output_embedding, pass_at_k, prefill, sample, save_policy, score,
                     stop_ids)

PROMPTS = [[5, 3, 14, 4, 9, 13, 7], [4], [6, 13, 8, 14]]  # ragged


def draw(model, prompts=PROMPTS, group=4, max_new_tokens=12, temperature=1.0, stop=(EOS, 8), pad_id=EOS, seed=0):
    return sample(model, prompts, group, max_new_tokens=max_new_tokens, temperature=temperature, stop=stop,
                  pad_id=pad_id, seed=seed)


def rows_of(rollouts):
    """[(prompt, completion)] as plain lists."""
    for ids, start, length in zip(rollouts.ids.tolist(), rollouts.prompt_length, rollouts.length):
        yield ids[:start], ids[start:start + length]


def unpadded(model, prompt, completion, temperature=1.0) -> Categorical:
    """π at each token of the completion, by one forward pass without padding, with nothing of ours in between."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + completion], device=model.device)).logits[0].cpu()
    return Categorical(logits=logits[len(prompt) - 1:-1] / temperature)


def unpadded_log_probs(model, rollouts, temperature=1.0):
    """[B, T], 0 after the end: each row for itself."""
    return pad_sequence([unpadded(model, prompt, completion, temperature).log_prob(torch.tensor(completion))
                         for prompt, completion in rows_of(rollouts)], batch_first=True)


def rollouts_by_hand(rows, pad_id=EOS):
    """Rollouts of [(prompt, completion)]; each is its own group, has reward row % 2, and log-probs −1, −2, −3 …"""
    width, length = max(len(p + c) for p, c in rows), torch.tensor([len(c) for _, c in rows])
    steps = torch.arange(1.0, length.max() + 1)
    return Rollouts(ids=torch.tensor([p + c + [pad_id] * (width - len(p + c)) for p, c in rows]),
                    prompt_length=torch.tensor([len(p) for p, _ in rows]), length=length,
                    log_probs=torch.where(steps <= length[:, None], -steps, 0.0),
                    rewards=torch.arange(len(rows)) % 2.0, groups=torch.arange(len(rows)))


def policy(make_model, name, seed=0):
    if name == "combined":
        return Combined([make_model("qwen3", seed), make_model("qwen3", seed + 2)], [0.4, 0.6])
    return make_model(name, seed)


def chain_table(followers: dict[int, int]):
    """Logits of a policy that is certain: after token a comes followers[a], or 1 where nothing is said."""
    return 100.0 * F.one_hot(torch.tensor([followers.get(a, 1) for a in range(V)]), V) - 50


def assert_same(a, b):
    for field in fields(Rollouts):
        assert_close(getattr(a, field.name), getattr(b, field.name), equal_nan=True, rtol=0, atol=0)


# -------------------------------------------------------------------------------------------------------------- scoring

@pytest.mark.parametrize("followers, stop, completion, mask", [
    ({5: 6, 6: 7, 7: EOS}, [EOS], [6, 7, EOS], [1, 1, 1, 0, 0]),
    ({5: 6, 6: 7, 7: 9, 9: EOS}, [EOS, 9], [6, 7, 9], [1, 1, 1, 0, 0]),
    ({5: EOS}, [EOS], [EOS], [1, 0, 0, 0, 0]),
    ({5: 6, 6: 5}, [EOS], [6, 5, 6, 5, 6], [1, 1, 1, 1, 1]),
], ids=["pad is eos", "several eos ids", "eos first", "no eos"])
def test_the_end_is_trained_on_and_nothing_after_it(make_bigram, followers, stop, completion, mask):
    """Mistake: the EOS masked out, padding trained on (masks from `ids != pad`), an EOS in a prompt ending the row."""
    model = make_bigram(chain_table(followers))
    rollouts = draw(model, [[EOS, 5], [3]], group=1, max_new_tokens=5, stop=stop)  # [3] never ends
    assert rollouts.completions[0, :len(completion)].tolist() == completion
    assert rollouts.length.tolist() == [len(completion), 5]
    assert rollouts.mask.tolist() == [mask, [1] * 5]
    assert (rollouts.log_probs[rollouts.mask == 0] == 0).all()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_computed_by_hand(make_bigram, temperature):
    """Mistake: the logit shift. Token t is scored by the output at token t − 1: here by a table of P(next | last). Or
    −inf·0 = NaN behind the end, where the policy gives the padding id no probability at all."""
    table = torch.zeros(V, V)
    table[5, 7], table[7, 9] = math.log(3), math.log(20)  # against V − 2 tokens of weight 1
    table[:, 11] = torch.finfo(torch.float32).min  # as some models bar tokens; over T = 0.5 it is −inf
    rollouts = rollouts_by_hand([([4, 5], [7, 9, 9]), ([5], [EOS])], pad_id=11)
    three, twenty = 3 ** (1 / temperature), 20 ** (1 / temperature)
    by_hand = [[three / (three + V - 2), twenty / (twenty + V - 2), 1 / (V - 1)], [1 / (three + V - 2), 1, 1]]
    assert_close(score(make_bigram(table), rollouts, temperature).exp(), torch.tensor(by_hand))


def test_the_loss_is_that_of_transformers(model):
    """Mistake: a shift, padding that counts, a copy's gradient lost. Single rows have the same loss and gradient."""
    rollouts, losses = draw(model, pad_id=11).select(torch.tensor([0, 1, 4, 5, 1, 9, 1])), []
    weights = torch.arange(1.0, 8.0)
    for (prompt, completion), weight in zip(rows_of(rollouts), weights.tolist()):
        ids = torch.tensor([prompt + completion], device=model.device)
        labels = torch.tensor([[-100] * len(prompt) + completion], device=model.device)
        losses.append(weight * len(completion) * model(ids, labels=labels).loss)
    loss = -(completion_stats(model, rollouts).log_prob * weights[:, None].to(model.device)).sum()
    assert_close(loss, sum(losses))
    ours, theirs = (torch.autograd.grad(x, list(model.parameters())) for x in (loss, sum(losses)))
    assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("name, has_embedding", [("qwen3", True), ("gpt2", True), ("lfm2", True), ("gemma2", False),
                                                 ("phi", False), ("cohere", False), ("granite", False),
                                                 ("llama4", False), ("combined", False)])
def test_all_probabilities_are_the_models_own(make_model, name, has_embedding, temperature):
    """Mistake in the sampler: a cache out of step with its rows, or of other things than keys and values; log-probs at
    another temperature than sampled at. In both: positions or attention shifted by padding, an output layer's scale,
    cap or bias forgotten. In the sums: the other direction of KL, or a mean over padding."""
    model, reference = policy(make_model, name), make_model("qwen3" if name == "combined" else name, 1)
    assert (output_embedding(model) is not None) == has_embedding
    rollouts = draw(model, group=8, max_new_tokens=20, temperature=temperature)
    assert len(set(rollouts.length.tolist())) > 4  # rows left the batch at many different steps
    expected = unpadded_log_probs(model, rollouts, temperature)
    assert_close(rollouts.log_probs, expected, atol=1e-4, rtol=0)

    p, q = ([unpadded(m, *row, temperature) for row in rows_of(rollouts)] for m in (model, reference))
    entropy = pad_sequence([a.entropy() for a in p], batch_first=True)
    divergences = pad_sequence([kl_divergence(a, b) for a, b in zip(p, q)], batch_first=True)
    stats = completion_stats(model, rollouts, temperature, with_entropy=True, reference=reference)
    assert_close((stats.entropy.cpu(), stats.kl.detach().cpu()), (entropy, divergences), atol=1e-4, rtol=1e-4)

    tokens, total = rollouts.length.sum().item(), divergences.sum().item()
    means = {"kl": total / len(rollouts), "kl_token": total / tokens, "entropy": entropy.sum().item() / tokens}
    for step in (50, 10**6):
        assert_close(score(model, rollouts, temperature, step), expected, atol=1e-4, rtol=0)
        assert divergence(model, reference, rollouts, temperature, step) == pytest.approx(means, rel=1e-4)
    with torch.no_grad():  # what is remembered of an output layer is not its weights: training goes on
        for weight in model.parameters():
            weight.mul_(1.1)
    assert_close(score(model, rollouts), unpadded_log_probs(model, rollouts), atol=1e-4, rtol=0)


def test_copies_are_run_once(make_model):
    """Mistake: a text run as often as it stands there, or one row's numbers given to another."""
    model, runs = make_model("qwen3"), []
    rows = rollouts_by_hand([([5, 3], [4, 7, EOS]), ([5], [6, EOS]), ([5, 3], [4, 7]), ([5, 3, 4], [7, EOS])])
    many = rows.select(torch.tensor([0, 1, 0, 2, 3, 0, 1]))
    distinct, copy_of = many.distinct()
    assert sorted(distinct.tolist()) == [0, 1, 3, 4]  # one text cut differently is another row, and a shorter one too
    assert distinct[copy_of].tolist() == [0, 1, 0, 3, 4, 0, 1]
    model.base_model.register_forward_pre_hook(lambda *args: runs.append(len(args[2]["input_ids"])), with_kwargs=True)
    assert_close(score(model, many), unpadded_log_probs(model, many), atol=1e-4, rtol=0)
    assert 4 in runs and 7 not in runs


# ------------------------------------------------------------------------------------------------------------- Rollouts

def with_copies(lengths, copies):
    """Rollouts of these total lengths, each row several times, shuffled."""
    rows = rollouts_by_hand([([5], [index] * (int(length) - 1)) for index, length in enumerate(lengths)])
    order = torch.arange(len(lengths)).repeat_interleave(copies)
    return rows.select(order[torch.randperm(len(order))])


@pytest.mark.parametrize("budget", [1, 400, 3000, 10**6])
@pytest.mark.parametrize("copies", [1, 3])
def test_batches_by_tokens(budget, copies):
    """Mistake: rows lost, copies parted, a budget that forgets the padding, or batches that could have been one."""
    torch.manual_seed(0)
    rollouts = with_copies(torch.randint(20, 200, (257,)), copies)
    batches, sizes = micro_batches(rollouts, budget), []
    assert torch.cat(batches).sort().values.tolist() == list(range(257 * copies))
    for rows in batches:
        lengths = rollouts.total_length[rows[rollouts.select(rows).distinct()[0]]]
        sizes.append(len(lengths) * int(lengths.max()))
        assert len(rows) == copies * len(lengths) and (sizes[-1] <= budget or len(lengths) == 1)
    assert all(len(rows) == copies or size + 200 > budget for rows, size in zip(batches[:-1], sizes))


@pytest.mark.parametrize("groups, size, group", [(7, 3, 1), (6, 3, 1), (2, 5, 1), (40, 16, 4), (10, 2, 5), (9, 10, 4)])
def test_in_batches(groups, size, group):
    """Mistake: rows dropped or seen twice in an epoch, a group parted, or an order that the seed does not fix."""
    rollouts = with_copies([5] * groups, group)
    rollouts.groups = 3 * rollouts.completions[:, 0]  # what names a group is no index
    once, again, other = (mini_batches(rollouts, size, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert sorted(torch.cat(once).tolist()) == list(range(groups * group))
    assert all(map(torch.equal, once, again)) and (groups < 6 or torch.cat(once).tolist() != torch.cat(other).tolist())
    sizes = [len(some) for some in torch.arange(groups).split(max(1, size // group))]  # in groups
    assert [len(rollouts.groups[rows].unique()) for rows in once] == sizes == [len(rows) // group for rows in once]


def test_select_trims_concatenate_pads_and_disks_keep(tmp_path):
    """Mistake: rows whose fields come apart, or prompts and completions shifted by another part's width."""
    rows = [([5, 3, 4, 9], [4, EOS]), ([6], [7, 3, 4]), ([4, 4], [EOS]), ([9, 9, 9], [5, 6, 7, 3, EOS])]
    whole = rollouts_by_hand(rows)
    part = whole.select(torch.tensor([2, 0]))
    assert part.ids.tolist() == [[4, 4, EOS, EOS, EOS, EOS], [5, 3, 4, 9, 4, EOS]]
    assert list(rows_of(part)) == [rows[2], rows[0]] and part.groups.tolist() == [2, 0]
    assert torch.equal(part.text_id, whole.text_id[[2, 0]])  # found once, and not in every batch
    assert part.mask.tolist() == [[1, 0], [1, 1]] and part.log_probs.tolist() == [[-1, 0], [-1, -2]]
    joined = Rollouts.concatenate([whole.select(torch.tensor(some)) for some in ([2], [0, 3], [1])], pad_id=EOS)
    assert list(rows_of(joined)) == [rows[i] for i in (2, 0, 3, 1)]
    assert_same(joined.select(torch.argsort(joined.groups)), whole)
    Memory(tmp_path).put("rollouts", vars(part))
    assert_same(Rollouts.load(tmp_path / "rollouts.pt"), part)


# ------------------------------------------------------------------------------------------------------------- sampling

def test_the_noise_belongs_to_problem_and_sample(model, tokenizer):
    """Mistake: noise drawn for the batch, so that another batch size or order is another experiment; one completion
    copied over its group; a generator that is not used."""
    problems = [Problem(q, "3") for q in ("1+2=", "7", "1+1+1=", "2+2", "5=", "9+9+9+9", "7")]

    def texts(count=7, rows=1000, seed=5):
        return list(rows_of(collect(model, tokenizer, problems[:count], 4, max_new_tokens=12, rows=rows, seed=seed)))

    alike = texts()
    assert texts(rows=4) == texts(rows=8) == alike and texts(3) == alike[:12]
    assert len({tuple(completion) for _, completion in alike}) > 14 and alike[4:8] != alike[24:]
    assert [completion[0] for _, completion in texts(seed=6)] != [completion[0] for _, completion in alike]


def test_autocast_samples_and_scores_alike(make_bigram, make_model):
    """Mistake: logits in bf16 from the sampler and in fp32 from the scorer: ratios off by their rounding."""
    torch.manual_seed(0)
    model = make_bigram(5 * torch.randn(V, V))
    with torch.autocast(model.device.type, torch.bfloat16, cache_enabled=False):
        rollouts = draw(model, group=32)
        assert_close(score(model, rollouts), rollouts.log_probs, atol=1e-4, rtol=0)
    assert (score(model, rollouts) - rollouts.log_probs).abs().max() > 1e-3
    capped = make_model("gemma2")
    capped.config.final_logit_softcapping = 30.0  # as Gemma 2's own are: in bf16 it hardly shows
    with torch.autocast(model.device.type, torch.bfloat16, cache_enabled=False):
        assert output_embedding(capped) is None


@pytest.mark.parametrize("name, count", [("qwen3", 50_000), ("gpt2", 6000), ("gemma2", 6000)])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_sampled_frequencies_are_the_softmax(make_model, name, count, temperature):
    """Mistake: sampling from anything but π: top-k left on, a temperature forgotten, another row's cache, or a bias too
    small for a few thousand samples. First tokens and pairs of tokens, by chi-square."""
    model, prompts = make_model(name), [[5, 3, 14], [4]]
    rollouts = draw(model, prompts, group=count, max_new_tokens=2, temperature=temperature, stop=[EOS])
    for prompt, samples in zip(prompts, rollouts.completions.split(count)):
        pairs = (samples @ torch.tensor([V, 1])).bincount(minlength=V * V).view(V, V)
        first = unpadded(model, prompt, [0], temperature).probs[0]
        second = torch.stack([unpadded(model, prompt, [a, 0], temperature).probs[1] for a in range(V)])
        second[EOS] = F.one_hot(torch.tensor(EOS), V)  # the padding behind an end
        for seen, expected in ((pairs.sum(1), count * first), (pairs, count * first[:, None] * second)):
            common = expected >= 5
            seen, expected = (torch.cat([x[common], x[~common].sum()[None]]) for x in (seen, expected))
            chi_square = ((seen - expected).square() / expected.clamp(min=1e-9)).sum()
            assert abs(chi_square - common.sum()) < 5 * math.sqrt(2 * common.sum())  # its mean and deviation


def test_a_prompt_is_run_once_and_finished_rows_leave(make_model):
    """Mistake: a prompt run for each of its completions; rows that have ended kept, or others lost with them."""
    model, runs = make_model("qwen3"), []
    model.register_forward_pre_hook(lambda *args: runs.append(tuple(args[2]["input_ids"].shape)), with_kwargs=True)
    rollouts = draw(model, group=16)
    assert runs[0] == (len(PROMPTS), 7)
    for t, (rows, width) in enumerate(runs[1:], 1):  # those that still went when they were last asked
        assert width == 1 and rows == (rollouts.length > t // 4 * 4).sum()
    assert rollouts.rewards.isnan().all()  # not judged yet


def test_cold_sampling_is_greedy_generate(model):
    """Mistake: text unlike transformers' own. Near temperature 0 it is generate(do_sample=False), token for token."""
    endless = draw(model, group=1, temperature=1e-5, max_new_tokens=25, stop=[])
    stop = [endless.completions[0, 5].item(), EOS]  # so that one row ends early
    rollouts = draw(model, group=2, temperature=1e-5, max_new_tokens=25, stop=stop)
    for row, (prompt, completion) in enumerate(rows_of(rollouts)):
        ids = torch.tensor([PROMPTS[row // 2]], device=model.device)
        greedy = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=25,
                                eos_token_id=stop, pad_token_id=EOS)
        assert prompt + completion == greedy[0].tolist()


def test_prompts_of_several_lengths_cost_no_wait_at_every_token(model):
    """Mistake: transformers looking at each token whether the mask is all ones; a GPU is waited for to know it."""
    few, many = (counted(lambda: draw(model, max_new_tokens=steps, stop=[]))[1] for steps in (6, 14))
    assert many - few == 2  # who still goes, asked at every fourth


def fixed_and_plain(model, prompts, capture, steps=40):
    """By steps of fixed shape, and by `decode`, at one noise: (tokens, log-probs) up to each row's end, 0 after it."""
    uniform = torch.rand(len(prompts) * 24, steps, generator=torch.Generator().manual_seed(3)).to(model.device)
    stop = torch.tensor([EOS, 8])
    for how in (partial(decode_in_graphs, capture=capture), decode):
        tokens, log_probs = how(model, prompts, uniform, 0.9, stop, EOS)
        inside = (torch.isin(tokens, stop).cumsum(1) - torch.isin(tokens, stop).int()) == 0
        yield tokens * inside, log_probs * inside


@pytest.mark.parametrize("prompts", [PROMPTS, [[5, 3], [4, 9]]], ids=["ragged", "alike"])
@pytest.mark.parametrize("name", ["qwen3", "gpt2", "phi", "cohere", "granite", "combined"])
def test_steps_of_fixed_shape_sample_the_same(make_model, name, prompts):
    """Mistake: a token that sees columns not yet written or padding, a position or column out of step, rows mixed up
    where half of them leave. And in what is to be captured: any wait of the host, a shape that changes, or (on a GPU)
    anything that a CUDA graph replays as it was at its capture."""
    model = policy(make_model, name)
    waits, operations, shapes = [], [], []

    def watched(step):
        shapes.append(len(operations))

        def run():
            work, waited = counted(step)
            operations.append(work), waits.append(waited)
        return run

    for capture in [watched, captured][:1 + torch.cuda.is_available()]:
        fixed, plain = fixed_and_plain(model, prompts, capture)
        assert torch.equal(fixed[0], plain[0])
        assert_close(fixed[1], plain[1], atol=1e-4 if capture is watched else 1e-3, rtol=0)
    assert len(shapes) > 1 and not any(waits) and len(set(operations)) == 1


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "gemma2", "combined"])
def test_weights_are_cast_once_and_not_at_every_token(make_model, tokenizer, monkeypatch, name):
    """Mistake: other text for speed; the policy itself cast, which is trained on; an embedding that is tied copied."""
    model, sampled_from = policy(make_model, name), []
    monkeypatch.setattr(rollout, "sample", lambda one, *a, **more: sampled_from.append(one) or sample(one, *a, **more))
    assert lowered(model) is model  # without autocast
    with torch.autocast(model.device.type, torch.bfloat16, cache_enabled=False):
        low = lowered(model)
        assert_same(draw(low), draw(model))
        collect(model, tokenizer, [Problem("1+2=", "3")], 4, max_new_tokens=4)
    assert {weight.dtype for weight in sampled_from[0].parameters()} == {torch.float32, torch.bfloat16}
    kinds = [(layer.weight.dtype, own.weight.dtype, layer.weight is own.weight) for layer, own in
             zip(low.modules(), model.modules()) if isinstance(layer, (torch.nn.Linear, torch.nn.Embedding))]
    assert set(kinds) <= {(torch.bfloat16, torch.float32, False), (torch.float32, torch.float32, True)}
    assert len(set(kinds)) == 2


def test_steps_of_fixed_shape_under_autocast(make_model):
    """Mistake: a cache in the dtype of the keys, where autocast makes values of another; or both kept in fp32, to be
    cast at every token."""
    model = make_model("qwen3")
    with torch.autocast(model.device.type, torch.bfloat16, cache_enabled=False):
        layers = prefill(model, PROMPTS, 6, 4, EOS)[3].layers
        assert {x.dtype for layer in layers for x in (layer.keys, layer.values)} == {torch.bfloat16}
        fixed, plain = fixed_and_plain(model, PROMPTS, lambda step: step, steps=12)
    alike = (fixed[0] == plain[0]).cumprod(1).bool()  # products in bf16 are rounded by their shapes
    assert alike.float().mean() > 0.9
    assert (fixed[1] - plain[1])[alike].abs().max() < 0.1


@pytest.mark.parametrize("name", ["gemma2", "lfm2"])
def test_what_has_no_fixed_shape_is_refused(make_model, name):
    """Mistake: a sliding window, or a state, sampled from as if all tokens were seen. Or a silent fall back."""
    with pytest.raises(InputError, match="--cuda-graph"):
        next(fixed_and_plain(make_model(name), PROMPTS, lambda step: step))
    with pytest.raises(InputError, match="CUDA device"):
        sample(make_model(name).cpu(), PROMPTS, 2, max_new_tokens=4, temperature=1.0, stop=[EOS], pad_id=EOS, seed=0,
               cuda_graph=1)


def test_ids_are_never_encoded_again(make_bigram, tokenizer):
    """Mistake: training on re-encoded text. The policy chose "a" and "b", two tokens; their text encodes to one."""
    table = torch.zeros(V, V)
    table[:, [WORDS.index("a"), WORDS.index("b")]] = 2.0
    model = make_bigram(table)
    rollouts = collect(model, tokenizer, [Problem("1+2=", "3"), Problem("ab=", "4")], 32, max_new_tokens=12)
    assert sum(tokenizer.encode(tokenizer.decode(ids)) != ids for _, ids in rows_of(rollouts)) > 5
    assert_close(score(model, rollouts), rollouts.log_probs, atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------------------- policies, text, evaluation

def test_encode_prompt(make_tokenizer):
    """Mistake: apply_chat_template's BatchEncoding (transformers v5), or braces in a question taken for a format."""
    plain, chat = make_tokenizer(), make_tokenizer(CHAT)
    ids = [WORDS.index(word) for word in ("1", "+", "2", "=", "ab")]
    assert encode_prompt(plain, "1+2", "{question}=ab") == ids
    assert encode_prompt(chat, "1+2", "{question}=ab") == [WORDS.index("<user>"), *ids, WORDS.index("<model>")]
    assert encode_prompt(chat, "1{a}2", "{question}={b}") == encode_prompt(chat, "1{a}2={b}")
    plain.backend_tokenizer.post_processor = TemplateProcessing("$A <eos>", special_tokens=[("<eos>", EOS)])
    assert plain.encode("1") == [WORDS.index("1"), EOS] and encode_prompt(plain, "1+2", "{question}=ab") == ids


def test_a_batch_stays_where_every_row_has_the_same_positions(make_model, tokenizer):
    """Mistake: with longrope one long row changes what a policy says of the short ones beside it."""
    longrope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.0], "long_factor": [1.0, 9.0],
                "original_max_position_embeddings": 20}
    model = make_model("qwen3", rope_parameters=longrope)
    collect(model, tokenizer, [Problem("1+2=", "3")], 2, max_new_tokens=16)
    with pytest.raises(InputError, match="context of 20"):
        collect(model, tokenizer, [Problem("1+2=", "3")], 2, max_new_tokens=17)
    assert context_of(GPT2Config(n_positions=48)) == 48 and context_of(BloomConfig()) == math.inf


def test_stop_ids(make_model, tokenizer):
    """Mistake: only one of several end-of-sequence ids stops a text, or id 0 is taken for none."""
    model = make_model("qwen3")
    assert EOS == 0 and stop_ids(model, tokenizer) == [0]
    model.generation_config.eos_token_id, model.config.eos_token_id = [7, 3], 5
    assert stop_ids(model, tokenizer) == [0, 3, 5, 7]


def test_a_saved_policy_is_read_back_and_has_no_dropout(make_model, tokenizer, tmp_path, device):
    """Mistake: weights lost, or read in another precision; dropout in the scorer: ratios would be noise around 1."""
    model = make_model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    save_policy(model, tokenizer, tmp_path)
    loaded, its_tokenizer = load_policy(str(tmp_path), device)
    assert (loaded.config.attn_pdrop, loaded.dtype, loaded.device.type) == (0.5, torch.float32, device)
    rollouts = draw(loaded)
    for policy in (loaded, model):
        assert_close(score(policy, rollouts), rollouts.log_probs, atol=1e-4, rtol=0)
    assert its_tokenizer.encode("1+2=") == tokenizer.encode("1+2=")
    save_policy(model.bfloat16(), tokenizer, tmp_path)  # as most are published
    assert load_policy(str(tmp_path), device)[0].dtype == torch.float32


def answering(make_bigram):
    """A policy that is certain, by a question's last digit alone: 1 is answered 3, 2 is answered 4, and 3 nothing."""
    word = WORDS.index
    return make_bigram(chain_table({word("1"): word("3"), word("2"): word("4"), word("3"): EOS, word("4"): EOS}))


def test_collect_keeps_problems_and_rewards_together(make_bigram, make_tokenizer):
    """Mistake: groups and rewards mixed over problems, or padding, prompts and special tokens judged with the text."""
    tokenizer, said = make_tokenizer(), ["4", "3", "4", "3", "", "4"]
    tokenizer.pad_token = "9"
    problems = [Problem(*both) for both in zip(("5+5+5+2", "1", "7+2", "8+1", "3", "2"), "439393")]
    for rows in (1, 4, 1000):
        rollouts = collect(answering(make_bigram), tokenizer, problems, 2, max_new_tokens=6, rows=rows)
        assert [prompt for prompt, _ in rows_of(rollouts)][::2] == [tokenizer.encode(p.question) for p in problems]
        assert completion_texts(tokenizer, rollouts)[::2] == completion_texts(tokenizer, rollouts)[1::2] == said
        assert rollouts.rewards.view(6, 2).tolist() == [[text == p.answer] * 2 for text, p in zip(said, problems)]
        assert rollouts.groups.view(6, 2).tolist() == [[i, i] for i in range(6)]


def test_collect_refuses_prompts_that_are_empty_or_beyond_the_context(model, tokenizer):
    """Mistake: positions past the model's last: an index error on the GPU, or silent nonsense."""
    problems = [Problem("1+2=", "3"), Problem("1" * 40, "3")]
    assert collect(model, tokenizer, problems, 1, max_new_tokens=8).prompt_length.max() == 40  # 48 just fit
    with pytest.raises(InputError, match="problem 2 .*40.*48"):
        collect(model, tokenizer, problems, 1, max_new_tokens=9)
    with pytest.raises(InputError, match="problem 3 has no tokens"):
        collect(model, tokenizer, [*problems, Problem("☃", "3")], 1, max_new_tokens=8)
    vars(model.config)["max_position_embeddings"] = None  # no end to its context
    collect(model, tokenizer, problems[:1], 1, max_new_tokens=9)


def test_evaluate_resamples_problems(make_bigram, tokenizer):
    """Mistake: the bootstrap over samples: 3 problems × 64 samples would look like 192 observations."""
    model, uniform = answering(make_bigram), make_bigram(torch.zeros(V, V))
    problems = [Problem("1", "3"), Problem("2", "9"), Problem("3", "9")]  # completions of 2, 2 and 1 tokens
    result = evaluate(model, uniform, tokenizer, problems, 64, max_new_tokens=4)
    assert result.pop("pass_rates") == [1, 0, 0]
    assert result.pop("accuracy_interval") == result.pop("pass_interval") == [0, 1]
    assert result == pytest.approx({"accuracy": 1 / 3, "pass": 1 / 3, "pass_k": 8, "samples": 64, "length": 5 / 3,
                                    "entropy": 0, "kl": 5 / 3 * math.log(V), "kl_token": math.log(V)}, abs=1e-5)
    seldom = evaluate(uniform, uniform, tokenizer, problems, 64, max_new_tokens=1)  # some are right by chance
    assert sum(seldom["pass_rates"]) / 3 == pytest.approx(seldom["accuracy"], abs=1e-4) and 0 < seldom["accuracy"]
    assert seldom["accuracy"] < seldom["pass_interval"][0] <= seldom["pass"] <= seldom["pass_interval"][1]


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_pass_at_k_by_enumeration(k):
    """Mistake: the biased 1 − (1 − c/n)^k. The share of all subsets of k samples that hold a right one."""
    rewards = torch.tensor([[0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0], [0, 1, 1, 0, 1, 0], [1, 1, 1, 1, 1, 1.0]])
    by_hand = [sum(any(s) for s in combinations(row, k)) / math.comb(6, k) for row in rewards.tolist()]
    assert_close(pass_at_k(rewards, k), torch.tensor(by_hand, dtype=torch.float64))
    for beyond in (0, 7):
        with pytest.raises(ValueError, match=str(beyond)):
            pass_at_k(rewards, beyond)


def test_bootstrap_interval():
    """Mistake: an interval of the values and not of their mean, or one that moves from call to call."""
    torch.manual_seed(0)
    values = torch.rand(200, 60)
    low, high = torch.tensor([bootstrap_interval(row, draws=300) for row in values]).T
    assert (low < values.mean(1)).all() and (values.mean(1) < high).all()
    assert (high - low).mean().item() == pytest.approx(2 * 1.96 * (1 / 12 / 60) ** 0.5, rel=0.1)
    assert bootstrap_interval(values[0]) == bootstrap_interval(values[0])
    assert bootstrap_interval(torch.full((5,), 0.25)) == (0.25, 0.25)
