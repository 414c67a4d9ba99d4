"""rollout.py, against transformers' own forward pass, loss and generate on single rows without padding."""

import math
from collections import Counter
from dataclasses import fields, replace
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertForMaskedLM, ViTConfig, ViTForImageClassification

import kl
from conftest import CHAT, EOS, WORDS, V
from rewards import InputError, Problem
from rollout import (Memory, Rollouts, bootstrap_interval, by_tokens, collect, completion_stats, completion_texts,
                     divergence, encode_prompt, evaluate, in_batches, load_policy, output_embedding, pass_at_k, sample,
                     save_policy, score, stop_ids)

PROMPTS = [[5, 3, 14, 4, 9, 13, 7], [4], [6, 13, 8, 14]]  # ragged
NAMES = [f.name for f in fields(Rollouts)]


def draw(model, prompts=PROMPTS, group=4, max_new_tokens=12, temperature=1.0, stop=(EOS, 8), pad_id=EOS, seed=0):
    return sample(model, prompts, group, max_new_tokens=max_new_tokens, temperature=temperature, stop=stop,
                  pad_id=pad_id, seed=seed)


def rows_of(rollouts):
    """[(prompt, completion)] as plain lists."""
    for ids, start, length in zip(rollouts.ids.tolist(), rollouts.prompt_length, rollouts.length):
        yield ids[:start], ids[start:start + length]


def unpadded_log_softmax(model, prompt, completion, temperature=1.0):
    """[T, V] from one whole forward pass over one row that has no padding, with nothing of ours in between."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion], device=model.device)).logits[0].cpu()
    return (logits[len(prompt) - 1:-1] / temperature).log_softmax(-1)


def unpadded_log_probs(model, rollouts, temperature=1.0):
    """[B, T], 0 after the end: each row for itself."""
    log_probs = torch.zeros_like(rollouts.log_probs)
    for row, (prompt, completion) in enumerate(rows_of(rollouts)):
        log_pi = unpadded_log_softmax(model, prompt, completion, temperature)
        log_probs[row, :len(completion)] = log_pi[range(len(completion)), completion]
    return log_probs


def loss_of(model, rollouts):
    """−mean log π over all completion tokens [], with gradients: what a training step would minimise."""
    return -kl.masked_mean(completion_stats(model, rollouts).log_prob, rollouts.mask.to(model.device))


def gradients(model, *losses):
    """What is left on the weights after backward through all of them."""
    model.zero_grad()
    for loss in losses:
        loss.backward()
    return [weight.grad.clone() for weight in model.parameters()]


def rollouts_by_hand(rows, pad_id=EOS):
    """Rollouts of [(prompt, completion)]; each is its own group, has reward row % 2, and log-probs −1, −2, −3 …"""
    width, length = max(len(p + c) for p, c in rows), torch.tensor([len(c) for _, c in rows])
    steps = torch.arange(1.0, length.max() + 1)
    return Rollouts(ids=torch.tensor([p + c + [pad_id] * (width - len(p + c)) for p, c in rows]),
                    prompt_length=torch.tensor([len(p) for p, _ in rows]), length=length,
                    log_probs=torch.where(steps <= length[:, None], -steps, 0.0),
                    rewards=torch.arange(len(rows)) % 2.0, groups=torch.arange(len(rows)))


def chain_table(followers: dict[int, int], size: int = V):
    """Logits of a policy that is certain: after token a comes followers[a], or 1 where nothing is said."""
    table = torch.full((size, size), -50.0)
    for a in range(size):
        table[a, followers.get(a, 1)] = 50.0
    return table


def assert_same(a, b):
    for name in NAMES:
        torch.testing.assert_close(getattr(a, name), getattr(b, name), equal_nan=True, rtol=0, atol=0)


# ----------------------------------------------------------------------------------------------------- ends and padding

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


def test_what_follows_the_end_changes_nothing(model):
    """Mistake: padding that is attended to, scored or trained on. Any ids may stand behind a row's end."""
    rows = [([5, 3], [4, 9, EOS]), ([6], [7, 3, 4, 5, 6, 7, 9]), ([4, 4, 4], [EOS])]
    one, other = rollouts_by_hand(rows, pad_id=EOS), rollouts_by_hand(rows, pad_id=11)
    torch.testing.assert_close(score(model, one), score(model, other))
    expected = gradients(model, loss_of(model, one))
    torch.testing.assert_close(gradients(model, loss_of(model, other)), expected, atol=1e-5, rtol=1e-3)


# -------------------------------------------------------------------------------------------------------------- scoring

@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_one_hand_computed_token(make_bigram, temperature):
    """Mistake: the logit shift. Token t is scored by the output at token t − 1: here by a table of P(next | last)."""
    table = torch.zeros(V, V)
    table[5, 7], table[7, 9] = math.log(3), math.log(20)  # against V − 1 tokens of weight 1
    scores = score(make_bigram(table), rollouts_by_hand([([4, 5], [7, 9, 9])]), temperature)
    power = 1 / temperature
    by_hand = [3 ** power / (3 ** power + V - 1), 20 ** power / (20 ** power + V - 1), 1 / V]
    torch.testing.assert_close(scores.exp()[0], torch.tensor(by_hand))


def test_the_loss_is_that_of_transformers(model):
    """Mistake: a shift, or padding that counts. A ragged batch has the loss and gradient of its single rows."""
    rollouts, losses = draw(model), []
    for prompt, completion in rows_of(rollouts):
        ids = torch.tensor([prompt + completion], device=model.device)
        labels = torch.tensor([[-100] * len(prompt) + completion], device=model.device)
        losses.append(model(ids, labels=labels).loss * len(completion) / rollouts.length.sum().item())
    loss = loss_of(model, rollouts)
    torch.testing.assert_close(loss, sum(losses))
    torch.testing.assert_close(gradients(model, loss), gradients(model, *losses), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_padding_changes_no_log_prob(model, temperature):
    """Mistake: positions or attention shifted by left or right padding, which absolute positions and windows show."""
    rollouts = draw(model, temperature=temperature)
    wider = replace(rollouts, ids=F.pad(rollouts.ids, (0, 5), value=3), log_probs=F.pad(rollouts.log_probs, (0, 3)))
    for batch, tokens in ((rollouts, 10**6), (rollouts, 50), (wider, 10**6)):
        expected = unpadded_log_probs(model, batch, temperature)
        torch.testing.assert_close(score(model, batch, temperature, tokens), expected, atol=1e-4, rtol=0)


def test_score_is_zero_after_the_end_whatever_the_padding(make_bigram):
    """Mistake: −inf·0 = NaN behind the end, where the policy gives the padding id no probability at all."""
    table = torch.zeros(V, V)
    table[:, 11] = torch.finfo(torch.float32).min  # as some models bar tokens; over T = 0.7 it is −inf
    scores = score(make_bigram(table), rollouts_by_hand([([5], [EOS]), ([5], [6, 7, EOS])], pad_id=11), temperature=0.7)
    torch.testing.assert_close(scores, -math.log(V - 1) * torch.tensor([[1.0, 0, 0], [1, 1, 1]]))


@pytest.mark.parametrize("name, settings, plain", [
    ("qwen3", {}, True), ("gpt2", {}, True), ("gemma2", {}, False), ("cohere", {"logit_scale": 0.3}, False),
    ("granite", {"logits_scaling": 4.0}, False), ("phi", {}, False),
])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_the_logits_are_the_models_own(make_model, name, settings, plain, temperature):
    """Mistake: a scale, a cap or a bias of the output layer that is forgotten where logits are made of hidden states.
    """
    model, reference = make_model(name, 1, **settings), make_model(name, 2, **settings)
    assert (output_embedding(model) is not None) == plain
    rollouts = draw(model, temperature=temperature)
    torch.testing.assert_close(score(model, rollouts, temperature), unpadded_log_probs(model, rollouts, temperature),
                               atol=1e-4, rtol=0)
    stats = completion_stats(model, rollouts, temperature, with_entropy=True, reference=reference)
    for row, (prompt, completion) in enumerate(rows_of(rollouts)):
        log_p, log_q = (unpadded_log_softmax(m, prompt, completion, temperature) for m in (model, reference))
        for ours, theirs in ((stats.entropy, kl.entropy(log_p)), (stats.kl, kl.exact_kl(log_p, log_q))):
            torch.testing.assert_close(ours[row, :len(completion)].detach().cpu(), theirs, atol=1e-4, rtol=1e-4)
            assert (ours[row, len(completion):] == 0).all()


def test_the_output_embedding_of_a_trained_copy_is_its_own(make_model):
    """Mistake: what is remembered of a model's output layer holds its old weights."""
    model = make_model("qwen3")
    assert output_embedding(model) is model.lm_head.weight
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    rollouts = draw(model)
    torch.testing.assert_close(score(model, rollouts), unpadded_log_probs(model, rollouts), atol=1e-4, rtol=0)


def test_copies_are_run_once(make_model, monkeypatch):
    """Mistake: one row's numbers given to another, or a copy's gradient lost. A text that stands there thrice counts
    thrice."""
    model, runs = make_model("qwen3"), []
    rows = rollouts_by_hand([([5, 3], [4, 7, EOS]), ([5], [6, EOS]), ([5, 3], [4, 7]), ([5, 3, 4], [7, EOS])])
    many = rows.select(torch.tensor([0, 1, 0, 2, 3, 0, 1]))
    distinct, copy_of = many.distinct()
    # one text cut differently is another row, and so is a shorter one
    assert sorted(distinct.tolist()) == [0, 1, 3, 4]
    assert distinct[copy_of].tolist() == [0, 1, 0, 3, 4, 0, 1]
    output_embedding(model)
    forward = model.base_model.forward
    monkeypatch.setattr(model.base_model, "forward",
                        lambda *a, **k: runs.append(len(k["input_ids"])) or forward(*a, **k))
    weights = torch.arange(1.0, 8.0, device=model.device)[:, None]
    stats = completion_stats(model, many, with_entropy=True)
    assert runs == [4]
    found = gradients(model, (stats.log_prob * weights).sum())
    alone = [completion_stats(model, many.select(torch.tensor([row])), with_entropy=True) for row in range(7)]
    wanted = gradients(model, *((row.log_prob * weight).sum() for row, weight in zip(alone, weights)))
    assert all((ours - theirs).norm() <= 1e-5 * theirs.norm() for ours, theirs in zip(found, wanted, strict=True))
    for row, one in enumerate(alone):
        length = one.entropy.shape[1]
        torch.testing.assert_close(stats.entropy[row:row + 1, :length], one.entropy, rtol=1e-4, atol=1e-6)


def test_copies_are_found_once(monkeypatch):
    """Mistake: rows compared with one another again in every pass of every update."""
    rollouts, asked, unique = with_copies([9, 5, 9, 7], 3), [], torch.unique
    monkeypatch.setattr(torch, "unique", lambda *a, **k: asked.append(k) or unique(*a, **k))
    for rows in by_tokens(rollouts, 20):
        rollouts.select(rows).distinct()
    assert all(k.get("dim") is None for k in asked)


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
    batches, sizes = by_tokens(rollouts, budget), []
    assert torch.cat(batches).sort().values.tolist() == list(range(257 * copies))
    for rows in batches:
        lengths = rollouts.total_length[rows[rollouts.select(rows).distinct()[0]]]
        sizes.append(len(lengths) * int(lengths.max()))
        assert len(rows) == copies * len(lengths)
        assert len(lengths) == 1 or sizes[-1] <= budget
    assert all(len(rows) == copies or size + 200 > budget for rows, size in zip(batches[:-1], sizes))
    assert len(by_tokens(rollouts, 10**6)) == 1


@pytest.mark.parametrize("groups, size, group", [(7, 3, 1), (6, 3, 1), (2, 5, 1), (1, 1, 1), (40, 16, 4), (10, 2, 5),
                                                 (9, 10, 4)])
def test_in_batches(groups, size, group):
    """Mistake: rows dropped or seen twice in an epoch, a group parted, or an order that the seed does not fix."""
    rollouts = with_copies([5] * groups, group)
    rollouts.groups = 3 * rollouts.completions[:, 0]  # what names a group is no index
    once, again, other = (in_batches(rollouts, size, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert sorted(torch.cat(once).tolist()) == list(range(groups * group))
    assert all(map(torch.equal, once, again)) and (groups < 6 or torch.cat(once).tolist() != torch.cat(other).tolist())
    assert all(len(rows) == group * len(rollouts.groups[rows].unique()) for rows in once)
    assert all(len(rows) < size + group for rows in once)
    if size % group == 0:
        assert [len(rows) for rows in once] == [min(size, groups * group - i) for i in range(0, groups * group, size)]


# ------------------------------------------------------------------------------------------------------------- sampling

def test_the_text_does_not_depend_on_the_batch(model, tokenizer):
    """Mistake: noise drawn for the batch, so that another batch size or order is another experiment."""
    problems = [Problem(q, "3") for q in ("1+2=", "7", "1+1+1=", "2+2", "5=", "9+9+9+9")]
    alike = [list(rows_of(collect(model, tokenizer, problems, 4, max_new_tokens=12, rows=rows, seed=5)))
             for rows in (4, 8, 1000)]
    assert alike[0] == alike[1] == alike[2]
    assert len({tuple(completion) for _, completion in alike[0]}) > 12
    fewer = list(rows_of(collect(model, tokenizer, problems[:3], 4, max_new_tokens=12, seed=5)))
    assert fewer == alike[0][:12]


def test_a_cache_of_the_models_own_kind(make_model):
    """Mistake: keys and values taken out of a cache that holds other things: here convolutions' states."""
    model = make_model("lfm2")
    ours = draw(model, group=8, max_new_tokens=20)
    torch.testing.assert_close(ours.log_probs, unpadded_log_probs(model, ours), atol=1e-4, rtol=0)


def test_autocast_samples_and_scores_alike(make_bigram):
    """Mistake: logits in bf16 from the sampler and in fp32 from the scorer: ratios off by the rounding of the logits.
    """
    torch.manual_seed(0)
    model = make_bigram(5 * torch.randn(V, V))
    with torch.autocast(model.device.type, torch.bfloat16, cache_enabled=False):
        rollouts = draw(model, group=32)
        torch.testing.assert_close(score(model, rollouts), rollouts.log_probs, atol=1e-4, rtol=0)
    assert (score(model, rollouts) - rollouts.log_probs).abs().max() > 1e-3


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_200_000_tokens_are_those_of_the_softmax(make_model, temperature):
    """Mistake: a bias too small for a few thousand samples: first and second tokens of 100,000 completions, by
    chi-square."""
    model, prompt, count = make_model("qwen3"), [5, 3, 14], 100_000
    rollouts = draw(model, [prompt], group=count, max_new_tokens=2, temperature=temperature, stop=[])
    pairs = (rollouts.completions[:, 0] * V + rollouts.completions[:, 1]).bincount(minlength=V * V).double().view(V, V)
    first = unpadded_log_softmax(model, prompt, [0], temperature).exp().double()[0]
    second = torch.stack([unpadded_log_softmax(model, prompt, [a, 0], temperature).exp().double()[1] for a in range(V)])
    expected_pairs = count * (first[:, None] * second).flatten()
    for seen, expected in ((pairs.sum(1), count * first), (pairs.flatten(), expected_pairs)):
        common = expected >= 5
        seen, expected = (torch.cat([x[common], x[~common].sum()[None]]) for x in (seen, expected))
        chi_square = ((seen - expected).square() / expected.clamp(min=1e-9)).sum().item()
        assert abs(chi_square - common.sum()) < 5 * math.sqrt(2 * common.sum())


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_the_sampler_is_the_scorer(model, temperature):
    """Mistake: behaviour log-probs at another temperature than the one sampled at. After zero updates every ρ is 1."""
    rollouts = draw(model, temperature=temperature)
    ratio = (score(model, rollouts, temperature) - rollouts.log_probs).exp()
    torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=1e-4, rtol=0)
    assert (rollouts.log_probs[rollouts.mask == 1] < 0).all()


def test_a_prompt_is_run_once_and_finished_rows_leave(make_model, monkeypatch):
    """Mistake: a prompt run for each of its completions; rows that have ended kept to the last, or others lost with
    them."""
    model, runs = make_model("qwen3"), []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *a, **k: runs.append(tuple(k["input_ids"].shape)) or forward(*a, **k))
    rollouts = draw(model, group=16)
    assert runs[0] == (len(PROMPTS), 7)
    for t, (rows, width) in enumerate(runs[1:], 1):  # those that still went when they were last asked
        assert width == 1 and rows == (rollouts.length > t // 4 * 4).sum()


def test_cached_decoding_is_the_full_forward_pass(model):
    """Mistake: a cache out of step with its rows: ragged prompts, the fan-out over a group, rows that have ended."""
    rollouts = draw(model, group=8, max_new_tokens=20, temperature=0.7)
    assert len(set(rollouts.length.tolist())) > 4  # rows left the batch at many different steps
    assert rollouts.length.max() == 20
    torch.testing.assert_close(rollouts.log_probs, unpadded_log_probs(model, rollouts, 0.7), atol=1e-4, rtol=0)
    for row, (prompt, completion) in enumerate(rows_of(rollouts)):
        assert prompt == PROMPTS[row // 8] and rollouts.groups[row] == row // 8
        assert not {EOS, 8} & set(completion[:-1]) and (len(completion) == 20 or completion[-1] in (EOS, 8))


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


def test_a_group_has_different_samples(make_model):
    """Mistake: one completion copied over its group, or a generator that is not used."""
    model = make_model("qwen3")
    rollouts = draw(model, [[5, 3], [5, 3]], group=8)
    texts = [tuple(completion) for _, completion in rows_of(rollouts)]
    assert len(set(texts[:8])) > 4 and texts[:8] != texts[8:]
    assert_same(rollouts, draw(model, [[5, 3], [5, 3]], group=8))
    assert not torch.equal(rollouts.completions[:, 0], draw(model, [[5, 3], [5, 3]], group=8, seed=1).completions[:, 0])
    assert rollouts.rewards.isnan().all()  # not judged yet


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_sampled_frequencies_are_the_softmax(model, temperature):
    """Mistake: sampling from anything but π: top-k left on, a temperature forgotten, another row's cache."""
    count, prompt = 6000, [5, 3, 14]
    rollouts = draw(model, [prompt, [4]], group=count, max_new_tokens=2, temperature=temperature, stop=[EOS])
    seen = Counter(tuple(completion) for _, completion in list(rows_of(rollouts))[:count])
    expected = {}  # over all texts of at most two tokens
    for a in range(V):
        first, second = unpadded_log_softmax(model, prompt, [a, 0], temperature).exp().tolist()
        texts = {(a,): 1.0} if a == EOS else {(a, b): second[b] for b in range(V)}
        expected |= {text: count * first[a] * p for text, p in texts.items()}
    assert sum(expected.values()) == pytest.approx(count, rel=1e-4) and set(seen) <= set(expected)
    common = [text for text, n in expected.items() if n >= 5]
    rare = count - sum(expected[text] for text in common)
    chi_square = sum((seen[text] - expected[text]) ** 2 / expected[text] for text in common)
    chi_square += (count - sum(seen[text] for text in common) - rare) ** 2 / rare
    # mean and deviation of a chi-square variable
    assert abs(chi_square - len(common)) < 5 * math.sqrt(2 * len(common))


def test_dropout_is_off_in_sampling_and_scoring(make_model, tokenizer, tmp_path, device):
    """Mistake: dropout in the scorer and not in the sampler, or other masks: ratios would be noise around 1."""
    save_policy(make_model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5), tokenizer, tmp_path)
    model, _ = load_policy(str(tmp_path), device)
    assert not model.training and model.config.attn_pdrop == 0.5
    rollouts = draw(model)
    torch.testing.assert_close(score(model, rollouts), rollouts.log_probs, atol=1e-4, rtol=0)
    torch.testing.assert_close(score(model, rollouts), score(model, rollouts), atol=0, rtol=0)


def test_ids_are_never_encoded_again(make_bigram, tokenizer):
    """Mistake: training on re-encoded text. The policy chose "a" and "b", two tokens; their text encodes to one."""
    table = torch.zeros(V, V)
    table[:, [WORDS.index("a"), WORDS.index("b")]] = 2.0
    model = make_bigram(table)
    rollouts = collect(model, tokenizer, [Problem("1+2=", "3"), Problem("ab=", "4")], 32, max_new_tokens=12)
    chosen = [completion for _, completion in rows_of(rollouts)]
    again = [tokenizer.encode(tokenizer.decode(completion)) for completion in chosen]
    assert sum(a != b for a, b in zip(chosen, again)) > 5
    torch.testing.assert_close(score(model, rollouts), rollouts.log_probs, atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------------------------------- Rollouts batch

def test_save_and_load(tmp_path):
    """Mistake: a field lost or changed on disk: the round's batch is fixed."""
    rollouts = rollouts_by_hand([([5, 3], [4, EOS]), ([6], [7, 3, 4])])
    Memory(tmp_path).put("rollouts", vars(rollouts))
    assert_same(Rollouts.load(tmp_path / "rollouts.pt"), rollouts)


def test_select_trims_and_concatenate_pads():
    """Mistake: rows whose fields come apart, or prompts and completions shifted by another part's width."""
    rows = [([5, 3, 4, 9], [4, EOS]), ([6], [7, 3, 4]), ([4, 4], [EOS]), ([9, 9, 9], [5, 6, 7, 3, EOS])]
    whole = rollouts_by_hand(rows)
    part = whole.select(torch.tensor([2, 0]))
    assert part.ids.tolist() == [[4, 4, EOS, EOS, EOS, EOS], [5, 3, 4, 9, 4, EOS]] and part.log_probs.shape == (2, 2)
    assert list(rows_of(part)) == [rows[2], rows[0]]
    assert (part.groups.tolist(), part.rewards.tolist(), part.mask.tolist()) == ([2, 0], [0, 0], [[1, 0], [1, 1]])
    parts = [whole.select(torch.tensor(index)) for index in ([2], [0, 3], [1])]
    joined = Rollouts.concatenate(parts, pad_id=EOS)
    assert len(joined) == 4 and list(rows_of(joined)) == [rows[i] for i in (2, 0, 3, 1)]
    assert_same(joined.select(torch.argsort(joined.groups)), whole)


# ---------------------------------------------------------------------------------------------------- text and policies

def test_encode_prompt(make_tokenizer):
    """Mistake: apply_chat_template's BatchEncoding (transformers v5), or braces in a question taken for a format."""
    plain, chat = make_tokenizer(), make_tokenizer(CHAT)
    ids = [WORDS.index(word) for word in ("1", "+", "2", "=", "ab")]
    assert encode_prompt(plain, "1+2", "{question}=ab") == ids
    in_chat = encode_prompt(chat, "1+2", "{question}=ab")
    assert in_chat == [WORDS.index("<user>"), *ids, WORDS.index("<model>")] and isinstance(in_chat, list)
    assert encode_prompt(chat, "1{a}2", "{question}={b}") == encode_prompt(chat, "1{a}2={b}")


def test_stop_ids(make_model, tokenizer):
    """Mistake: only one of several end-of-sequence ids stops a text, or id 0 is taken for none."""
    model = make_model("qwen3")
    assert EOS == 0 and stop_ids(model, tokenizer) == [0]
    model.generation_config.eos_token_id = [7, 3]
    model.config.eos_token_id = 7
    assert stop_ids(model, tokenizer) == [0, 3, 7]
    tokenizer_without = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    assert stop_ids(model, tokenizer_without) == []


def test_completion_texts(tokenizer):
    """Mistake: padding, prompts or special tokens in the text that is judged."""
    one, two, three = (WORDS.index(digit) for digit in "123")
    rollouts = rollouts_by_hand([([one, one], [two, three, EOS]), ([one], [three, two] * 4)], pad_id=one)
    assert completion_texts(tokenizer, rollouts) == ["23", "32323232"]


def test_load_policy_reads_what_save_policy_wrote(model, tokenizer, tmp_path, device):
    """Mistake: a checkpoint folder that loses weights, or loads in another precision or in training mode."""
    save_policy(model, tokenizer, tmp_path)
    loaded, its_tokenizer = load_policy(str(tmp_path), device)
    ids = torch.tensor([PROMPTS[0]], device=device)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    assert loaded.dtype == torch.float32 and not loaded.training and loaded.device.type == torch.device(device).type
    assert its_tokenizer.encode("1+2=") == tokenizer.encode("1+2=")


def damaged(kind, model, tokenizer, folder):
    """A folder with something wrong in it; `kind` says what."""
    if kind == "endless":
        model.config.eos_token_id = model.generation_config.eos_token_id = None
        tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    elif kind == "not finite":
        with torch.no_grad():
            model.lm_head.weight[3, 3] = math.nan
    elif kind == "bidirectional":
        model = BertForMaskedLM(BertConfig(vocab_size=V, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                           intermediate_size=16, eos_token_id=EOS))
    elif kind == "no text":
        model = ViTForImageClassification(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                                    intermediate_size=16, image_size=16))
    model.save_pretrained(folder)
    if kind != "no tokenizer":
        tokenizer.save_pretrained(folder)
    if kind == "torn":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:500])


@pytest.mark.parametrize("kind, named", [
    ("torn", "cannot|can load"), ("endless", "end-of-sequence"), ("not finite", "finite"), ("bidirectional", "causal"),
    ("no text", "can load"), ("no tokenizer", "tokenizer")])
def test_load_policy_names_what_is_wrong(make_model, make_tokenizer, tmp_path, kind, named):
    """Mistake: a traceback, or a run of hours, with a folder that cannot serve as a policy."""
    damaged(kind, make_model("qwen3"), make_tokenizer(), tmp_path / kind)
    with pytest.raises(InputError, match=named) as error:
        load_policy(str(tmp_path / kind))
    assert "\n" not in str(error.value) and kind in str(error.value)


@pytest.mark.parametrize("name", ["no/such-model", "."])
def test_load_policy_names_what_is_missing(name):
    """Mistake: a traceback where the user mistyped a name."""
    with pytest.raises(InputError, match=repr(name)) as error:
        load_policy(name)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------- collect, evaluate

def answering(make_bigram):
    """A policy that is certain: "1=" is answered 3, "2=" 4 (and the answer ends), by the digit before "=" alone."""
    word = WORDS.index
    return make_bigram(chain_table({word("1"): word("3"), word("2"): word("4"), word("3"): EOS, word("4"): EOS}))


def test_collect_keeps_problems_and_rewards_together(make_bigram, tokenizer):
    """Mistake: groups and rewards mixed over problems: they are sampled by length, and come back in their own order.
    """
    problems = [Problem("5+5+5+2", "4"), Problem("1", "3"), Problem("7+2", "9"), Problem("8+1", "3"), Problem("2", "3")]
    for rows in (1, 4, 1000):
        rollouts = collect(answering(make_bigram), tokenizer, problems, 2, max_new_tokens=6, rows=rows)
        assert rollouts.groups.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
        assert rollouts.rewards.tolist() == [1, 1, 1, 1, 0, 0, 1, 1, 0, 0]
        assert [prompt for prompt, _ in rows_of(rollouts)][::2] == [tokenizer.encode(p.question) for p in problems]
        assert completion_texts(tokenizer, rollouts)[::2] == ["4", "3", "4", "3", "4"]


def test_collect_refuses_prompts_beyond_the_context(model, tokenizer):
    """Mistake: positions past the model's last: an index error on the GPU, or silent nonsense."""
    problems = [Problem("1+2=", "3"), Problem("1" * 40, "3")]
    assert collect(model, tokenizer, problems, 1, max_new_tokens=8).prompt_length.max() == 40  # 48 just fit
    with pytest.raises(InputError, match="problem 1 .*40.*48"):
        collect(model, tokenizer, problems, 1, max_new_tokens=9)


def test_evaluate_resamples_problems(make_bigram, tokenizer):
    """Mistake: the bootstrap over samples: 2 problems × 64 samples would look like 128 observations."""
    model = answering(make_bigram)
    result = evaluate(model, model, tokenizer, [Problem("1", "3"), Problem("2", "9")], 64, max_new_tokens=4)
    assert (result["accuracy"], result["accuracy_interval"], result["pass_rates"]) == (0.5, [0.0, 1.0], [1.0, 0.0])
    assert (result["pass"], result["pass_interval"], result["samples"], result["length"]) == (0.5, [0.0, 1.0], 64, 2.0)
    assert result["kl"] == result["kl_token"] == 0 and result["entropy"] == pytest.approx(0, abs=1e-6)


def test_divergence_is_the_naive_sum(make_model):
    """Mistake: a mean that counts padding, or the other direction. KL(π‖π_0) and entropy, one token after the other.
    """
    model, reference = make_model("gemma2", 1), make_model("gemma2", 2)
    rollouts, total, entropy, tokens = draw(model, temperature=0.7), 0.0, 0.0, 0
    with torch.no_grad():
        for prompt, completion in rows_of(rollouts):
            log_p = unpadded_log_softmax(model, prompt, completion, 0.7).tolist()
            log_q = unpadded_log_softmax(reference, prompt, completion, 0.7).tolist()
            for p, q in zip(log_p, log_q, strict=True):
                total += sum(math.exp(a) * (a - b) for a, b in zip(p, q))
                entropy -= sum(math.exp(a) * a for a in p)
                tokens += 1
    for tokens_per_step in (50, 10**6):
        result = divergence(model, reference, rollouts, 0.7, tokens_per_step)
        assert result["kl"] == pytest.approx(total / len(rollouts), rel=1e-4)
        assert result["kl_token"] == pytest.approx(total / tokens, rel=1e-4)
        assert result["entropy"] == pytest.approx(entropy / tokens, rel=1e-4)
    assert divergence(model, model, rollouts)["kl"] == 0


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_pass_at_k_by_enumeration(k):
    """Mistake: the biased 1 − (1 − c/n)^k. The share of all subsets of k samples that hold a right one."""
    rewards = torch.tensor([[0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0], [0, 1, 1, 0, 1, 0], [1, 1, 1, 1, 1, 1.0]])
    by_hand = [sum(any(s) for s in combinations(row, k)) / math.comb(6, k) for row in rewards.tolist()]
    torch.testing.assert_close(pass_at_k(rewards, k), torch.tensor(by_hand, dtype=torch.float64))
    for beyond in (0, 7):
        with pytest.raises(ValueError, match=str(beyond)):
            pass_at_k(rewards, beyond)


def test_bootstrap_interval_covers():
    """Mistake: an interval of the values and not of their mean, or one that moves from call to call."""
    torch.manual_seed(0)
    values = torch.rand(200, 60)
    intervals = [bootstrap_interval(row, draws=300) for row in values]
    covered = sum(low < 0.5 < high for low, high in intervals) / len(intervals)
    assert 0.88 < covered < 0.99
    width = sum(high - low for low, high in intervals) / len(intervals)
    assert width == pytest.approx(2 * 1.96 * (1 / 12 / 60) ** 0.5, rel=0.1)
    assert bootstrap_interval(values[0]) == bootstrap_interval(values[0])
    assert bootstrap_interval(torch.full((5,), 0.25)) == (0.25, 0.25)
