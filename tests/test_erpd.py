"""The stages of erpd.py and its command line."""

import gc
import json
import math
import weakref
from dataclasses import fields, replace
from functools import partial

import pytest
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import erpd
import kl
import rollout
from conftest import SMALL, TINY, arguments, weights
from erpd import Config
from rewards import InputError, chain_problems, group_advantages
from rollout import Memory, Rollouts, autocast, collect, completion_stats, divergence, load_policy, score


def explored(base, rollouts, config, **settings):
    return erpd.explore(base, rollouts, group_advantages(rollouts.rewards, rollouts.groups), config, **settings)


# ------------------------------------------------------------------------------------------------------------ the stage

def test_the_embedded_policy_has_a_habit_that_no_temperature_cures(device):
    """A base that is merely noisy is cured by sampling colder, and every method then looks good on it."""
    base, tokenizer = load_policy(TINY, device)
    problems = chain_problems(256, "test", seed=0)
    right = {t: collect(base, tokenizer, problems, 8, max_new_tokens=64, temperature=t, seed=1).rewards.mean().item()
             for t in (1.0, 0.7, 0.3, 0.01)}
    assert 0.25 <= right[1.0] <= 0.45
    assert right[0.01] < right[0.3] < right[0.7] < right[1.0]


def test_the_embedded_policy_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert torch.equal(weights(load_policy(Config().model)[0]), weights(load_policy(TINY)[0]))


# ----------------------------------------------------------------------------------------------------------- the losses

def test_sequence_losses_by_hand():
    """mse regresses and ce classifies by β times the *sum* of the log-ratio over the completion, not its mean."""
    log_prob, behaviour = torch.tensor([[-0.5, -1.0], [-2.0, -1.5]]), torch.tensor([[-1.0, -1.5], [-1.0, -1.5]])
    one, config = torch.tensor([1, 1]), Config(beta=0.5)
    part = Rollouts(torch.zeros(2, 3, dtype=torch.long), one, 2 * one, behaviour, torch.tensor([1.0, 0.0]), one)
    advantage = torch.tensor([[1.0], [-1.0]])
    r_right, r_wrong = 0.5 * (0.5 + 0.5), 0.5 * (-1.0 + 0.0)
    mse = erpd.explorer_loss("mse", log_prob, part, advantage, 4, 2, config)
    assert mse.item() == pytest.approx(((r_right - 1) ** 2 + (r_wrong + 1) ** 2) / 2)
    ce = erpd.explorer_loss("ce", log_prob, part, advantage, 4, 2, config)
    assert ce.item() == pytest.approx((math.log1p(math.exp(-r_right)) + math.log1p(math.exp(r_wrong))) / 2)
    nll = erpd.explorer_loss("nll", log_prob, part, advantage, 4, 2, config)
    assert nll.item() == pytest.approx(1.5 / 4)


def test_ratios_begin_at_one_in_bf16(stage, monkeypatch):
    """Mistake: the sampler's log-probs as those of π_0: in bf16 a training pass gives others, and over a completion
    their differences add up to a log-ratio that nobody has learned. How far off they are depends on the processor, so
    here it is half a nat a token."""
    base, tokenizer, problems, _ = stage

    def far_off(*args, **kwargs):
        rollouts = collect(*args, **kwargs)
        return replace(rollouts, log_probs=rollouts.log_probs - 0.5 * rollouts.mask)

    monkeypatch.setattr(erpd, "collect", far_off)
    with autocast("bf16", base.device):
        stored = erpd.sampled(base, tokenizer, problems, Config(**SMALL), seed=0)
        with torch.no_grad():
            log_probs = completion_stats(base, stored.select(torch.arange(32))).log_prob.cpu()
    assert (log_probs - stored.log_probs[:32, :log_probs.shape[1]]).sum(1).abs().max() < 0.002


def test_where_policies_are_lowered(stage):
    """Mistake: auto that lowers on a CPU, too; a cast that is kept when the weight has changed."""
    base, _, _, rollouts = stage
    model, _ = erpd.trainable(base, 1e-4)
    for precision, lowered in ("fp32", False), ("auto", base.device.type == "cuda"), ("bf16", True):
        with autocast(precision, base.device):
            before = completion_stats(model, rollouts).log_prob
            model.model.layers[0].mlp.down_proj.weight.data.mul_(2)
            assert not torch.equal(completion_stats(model, rollouts).log_prob, before)
            given = (x.to(base.device) for x in (rollouts.ids, rollouts.length))
            assert rollout.completion_states(model, *given)[0].dtype == (torch.bfloat16 if lowered else torch.float32)


@pytest.mark.parametrize("loss", ["sapo", "clip"])
def test_first_gradient_is_the_policy_gradient(stage, loss):
    """At ρ = 1 every surrogate has the gradient of mean_t Â·log π_θ (log π_θ: tests/test_rollout.py)."""
    base, _, _, rollouts = stage
    advantage = group_advantages(rollouts.rewards, rollouts.groups).to(base.device)[:, None]
    model, _ = erpd.trainable(base, 1e-4)
    log_prob, rollouts = completion_stats(model, rollouts).log_prob, rollouts.to(base.device)
    tokens = int(rollouts.length.sum())
    surrogate = erpd.explorer_loss(loss, log_prob, rollouts, advantage, tokens, len(rollouts), Config())
    plain = -(advantage * log_prob * rollouts.mask).sum() / tokens
    ours, theirs = (torch.autograd.grad(x, list(model.parameters()), retain_graph=True) for x in (surrogate, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------- the stages

@pytest.mark.parametrize("what", ["sapo", "ce", "mse", "nll", "clip", "distill"])
def test_an_update_does_not_depend_on_the_micro_batch(stage, what):
    """Averages of averages: a loss normalised in each micro-batch weighs short completions more. Or a base or stored
    log-probs that follow the policy, which make every ratio 1 and every KL 0."""
    base, _, _, rollouts = stage
    ends, before, stored = [], weights(base), rollouts.log_probs.clone()
    for tokens_per_step in (1, 300, 10**6):
        config = Config(**SMALL, tokens_per_step=tokens_per_step, kl_coef=0.1)
        if what == "distill":
            signal = torch.sin(torch.arange(rollouts.mask.numel())).view_as(rollouts.mask)
            model = erpd.distill(base, rollouts, signal, 1.0, config)
        else:
            model = explored(base, rollouts, config, loss=what, updates=2)
        ends.append(weights(model) - before)
    assert torch.equal(weights(base), before) and torch.equal(rollouts.log_probs, stored) and ends[0].any()
    # Adam divides by the gradient's size, so an update of 1e-4 a weight is compared; rounding may turn a sign near
    # zero.
    for other in ends[1:]:
        close = (ends[0] - other).abs() < 1e-5
        assert close.float().mean() > 0.98


def test_student_is_the_mean_of_its_weights_over_the_second_half(stage, monkeypatch):
    """A mean that takes in the start, or the last update alone; a schedule that begins again with every pass. And the
    advantage without its baseline: right tokens of a sure policy have hardly one of their own to learn from."""
    base, _, _, rollouts = stage
    rates, after, update = [], [], erpd.optimise
    due, spent, losses, prices, ascent = [], [], [], [(0.5, 0.5)], kl.dual_ascent

    def watched(model, optimizer, batch, advantage, *more):
        assert all(weight.grad is None for weight in model.parameters())  # the last update's would count again
        stats = completion_stats(model, batch, reference=base)
        log_ratio, own_kl = stats.log_prob.detach().cpu() - batch.log_probs, stats.kl.detach().cpu()
        due.append(kl.on_policy_kl(own_kl, log_ratio, batch.mask).item())
        gained = kl.clipped_surrogate(log_ratio.exp(), advantage, 10, 10)
        losses.append(((prices[-1][1] * own_kl - gained) * batch.mask).sum().item() / batch.mask.sum().item())
        rates.append(optimizer.param_groups[0]["lr"])
        balance = ((1 - batch.log_probs.exp()).square() * advantage).sum()
        assert abs(balance) < 1e-3 < abs(advantage.sum()) and not advantage[batch.mask == 0].any()
        shown = update(model, optimizer, batch, advantage, *more)
        assert shown["loss"] == pytest.approx(losses[-1], rel=1e-3, abs=1e-5)
        after.append(weights(model))
        return shown

    monkeypatch.setattr(erpd, "optimise", watched)
    monkeypatch.setattr(kl, "dual_ascent", lambda m, now, *a, **k: spent.append(now) or prices.append(
        ascent(m, now, *a, **k)) or prices[-1])
    config = Config(**SMALL | {"distill_updates": 4, "distill_batch": len(rollouts)}, distill_lr=1e-3)
    signal = torch.randn(rollouts.mask.shape, generator=torch.Generator().manual_seed(0)) + 1
    student = erpd.distill(base, rollouts, signal, 4.0, config)
    assert (after[1] - after[3]).abs().max() > 1e-4 and rates == pytest.approx([1e-3, 0.875e-3, 0.75e-3, 0.625e-3])
    torch.testing.assert_close(weights(student), (after[2] + after[3]) / 2)
    assert spent == pytest.approx(due, rel=1e-3, abs=1e-5) and spent[3] > 0.01  # on its own prefixes, not the stored


def test_every_pass_takes_the_whole_batch_in_an_order_of_its_own(stage):
    """Mistake: each pass in the first one's order; batches left out; an end that is a checkpoint, measured twice."""
    base, _, _, rollouts = stage
    looked, given = [], (*erpd.trainable(base, 1e-4), rollouts, 16, 19, 0, "stage")
    passes = erpd.passes(*given, lambda *_, update: looked.append(update), Memory(), {})
    rows = [rows.tolist() for rows, *_ in passes]
    first, second = rows[:4], rows[4:8]
    assert len(rows) == 19 and sorted(sum(first, [])) == sorted(sum(second, [])) == list(range(64)) and first != second
    assert looked == [1, 2, 4, 9]


def test_the_progress_bars_show_what_one_wants_to_watch(stage, monkeypatch, capsys):
    """Mistake: a bar that counts, and says nothing of loss, KL, entropy and λ."""
    base, _, _, rollouts = stage
    monkeypatch.setattr(erpd, "tqdm", partial(tqdm, mininterval=0, disable=False))
    explored(base, rollouts, Config(**SMALL), loss="sapo", updates=2)
    erpd.distill(base, rollouts, rollouts.mask, 1.0, Config(**SMALL))
    explorer, distiller = capsys.readouterr().err.split("student on its way", 1)
    assert all(name in explorer and name in distiller for name in ("loss=", "kl=", "entropy="))
    assert "lambda=" in distiller


def test_checkpointing_changes_no_update(stage):
    """Layers that are not run again, or that are but with other inputs; or that hold themselves, so that policies stay
    on the GPU until a garbage collection."""
    base, tokenizer, problems, rollouts = stage
    model, checkpointed = (explored(base, rollouts, Config(**SMALL, checkpointing=on), loss="mse", updates=2)
                           for on in (0, 1))
    torch.testing.assert_close(weights(checkpointed), weights(model))
    again, _ = erpd.trainable(checkpointed, 1e-4, True)  # a further round's
    again_rollouts = [collect(m, tokenizer, problems, 2, max_new_tokens=20, seed=1) for m in (model, again)]
    assert torch.equal(*(r.ids for r in again_rollouts))
    with torch.no_grad():
        next(checkpointed.parameters()).zero_()
    assert torch.equal(weights(again), weights(erpd.trainable(again, 1e-4)[0]))
    assert type(again.model.layers[0]) is type(checkpointed.model.layers[0])  # once more, and not twice
    torch.testing.assert_close(score(again, rollouts), score(model, rollouts), atol=1e-4, rtol=0)
    layer = weakref.ref(again.model.layers[0])
    gc.disable()
    del again
    freed = layer() is None
    gc.enable()
    assert freed


def test_explorer_raises_right_completions_and_the_unlearned_policy_wrong_ones(stage):
    """A sign error in the loss or in the reversal."""
    base, _, _, rollouts = stage
    right = rollouts.rewards.bool()

    def gain(advantage, rewards):
        judged = replace(rollouts, rewards=rewards)
        model = erpd.explore(base, judged, advantage, Config(**SMALL), loss="mse", updates=6)
        change = (score(model, rollouts) - rollouts.log_probs).sum(1)
        return (change[right].mean() - change[~right].mean()).item()

    advantage = group_advantages(rollouts.rewards, rollouts.groups)
    assert gain(advantage, rollouts.rewards) > 0.5 and gain(-advantage, 1 - rollouts.rewards) < -0.5


@pytest.mark.parametrize("signal", ["teacher", "contrast", "unlearned"])
def test_a_round_builds_its_signal_from_the_right_policies(stage, monkeypatch, signal):
    """Targets reversed for the explorer too, for one of Â and r alone, or not at all; a teacher scored on another
    batch, or π_0's log-probs from the sampler, which rounds otherwise, beside its copies' from scoring."""
    base, tokenizer, problems, _ = stage
    asked, given = {}, []

    def explore(base, rollouts, advantage, config, *, stage, **settings):
        asked[stage] = rollouts.rewards, advantage
        return stage

    scores = {"unlearned policy": -3.0, "extreme region policy (sapo)": -0.5, base: -1.0}
    monkeypatch.setattr(erpd, "explore", explore)
    monkeypatch.setattr(erpd, "score", lambda model, batch, *a, **k: torch.full_like(batch.log_probs, scores[model]))
    monkeypatch.setattr(erpd, "distill", lambda base, batch, signal, *a, **k: given.extend((batch, signal)) or base)
    monkeypatch.setattr(erpd, "within_budget", lambda base, student, *a: (student, 0.0))
    erpd.one_round(base, tokenizer, problems, Config(**SMALL, signal=signal))
    rollouts, signal_given = given
    advantage = group_advantages(rollouts.rewards, rollouts.groups)
    wanted = {"teacher": 0.5, "contrast": 2.5, "unlearned": 2.0}[signal]
    torch.testing.assert_close(signal_given, torch.full_like(rollouts.log_probs, wanted))
    unlearned, explorer, _ = scores
    assert set(asked) == {"teacher": {explorer}, "contrast": {explorer, unlearned}, "unlearned": {unlearned}}[signal]
    for name, (rewards, its_advantage) in asked.items():
        assert torch.equal(rewards, 1 - rollouts.rewards if name == "unlearned policy" else rollouts.rewards)
        assert torch.equal(its_advantage, -advantage if name == "unlearned policy" else advantage)


def test_a_perfect_teacher_assigns_credit_that_adds_up_to_the_outcome():
    """By enumeration: π_0(·|right)/π_0 telescopes to 1/P(right), and the contrast to the log-odds of the outcome."""
    torch.manual_seed(0)
    first, second = torch.rand(3).softmax(0), torch.rand(3, 3).softmax(1)
    joint = first[:, None] * second  # π_0 over all completions of two tokens
    right = torch.tensor([[1., 0, 0], [0, 1, 1], [0, 0, 1]])

    def log_probs_given(event):
        posterior = joint * event / (joint * event).sum()
        head = posterior.sum(1)
        return torch.stack([head.log()[:, None].expand(3, 3), (posterior / head[:, None]).log()], -1).view(9, 2)

    base, teacher = log_probs_given(torch.ones(3, 3)), log_probs_given(right)
    signal = erpd.token_signal("teacher", base, teacher, None)
    p_right = (joint * right).sum()
    torch.testing.assert_close(signal.sum(1)[right.view(9).bool()], -p_right.log().expand(4))
    p_right_after_first = (second * right).sum(1)  # the first token's share is log P(right|y_1)/P(right)
    torch.testing.assert_close(signal.view(3, 3, 2)[:, 0, 0], (p_right_after_first / p_right).log())
    with pytest.raises(ValueError, match="contrast"):
        erpd.token_signal("contrast", base, teacher, None)


def test_several_teachers_count_by_their_weights_and_not_by_their_drift():
    """A collapsed teacher's log-ratios are a hundred times larger and would drown the others."""
    mask = torch.tensor([[1., 1, 1], [1, 1, 0]])
    one, other = torch.randn(2, 3), torch.randn(2, 3)
    mixed = erpd.combine_signals([one, 100 * other], [1.0, 2.0], mask)
    torch.testing.assert_close(mixed, erpd.combine_signals([one, other], [1.0, 2.0], mask))
    advantage = erpd.normalised(one, mask, bound=0.5)
    assert advantage[1, 2] == 0 and advantage.abs().max() <= 0.5 and torch.equal(advantage.sign(), (one * mask).sign())


def test_the_baseline_is_that_of_least_variance():
    """Every token of three states, from undecided to nearly sure, with the advantages of Bayes: how far (A − b)·∇log π
    scatters, by autograd. Mistake: the mean as baseline, though a sure policy's right tokens have hardly a gradient."""
    logits = torch.tensor([[0.0, 0.0], [2.0, 0.0], [5.0, 0.0]], requires_grad=True)
    log_probs = logits.log_softmax(-1)
    advantage = torch.tensor([[1.0, -1.0], [0.2, -1.5], [0.01, -2.0]])
    slopes = [torch.autograd.grad(log_prob, logits, retain_graph=True)[0] for log_prob in log_probs.flatten()]
    squares, probs = torch.stack([slope.square().sum() for slope in slopes]), log_probs.exp().flatten().detach()

    def variance(baseline) -> float:  # of an unbiased estimate: its mean is the same for every baseline
        return (probs * squares * (advantage.flatten() - baseline).square()).sum().item()

    best = erpd.least_variance_baseline(advantage, log_probs.detach(), mask=probs.view(3, 2))
    mean = advantage.flatten() @ probs / 3
    assert variance(best) < min(variance(best - 0.01), variance(best + 0.01), variance(mean))
    sure = erpd.least_variance_baseline(advantage[2:], log_probs.detach()[2:], mask=probs.view(3, 2)[2:])
    assert sure < -1.9  # near its mistake's: what is right is pushed up
    zero, one = torch.zeros(1, 2), torch.ones(1, 2)  # no token with an alternative; a signal that says nothing
    assert erpd.least_variance_baseline(one, zero, one) == 0 and not erpd.normalised(zero, one).any()


def test_a_signal_that_a_completion_shares_is_the_same_signal(stage, monkeypatch):
    """Mistakes: λ that follows the first tokens' KL alone, where δ_t is [B, 1]; Â [B, 1] taken for one of [B]."""
    base, _, _, rollouts = stage
    spent, ascent = [], kl.dual_ascent
    monkeypatch.setattr(kl, "dual_ascent", lambda m, now, *a, **k: spent.append(now) or ascent(m, now, *a, **k))
    advantage = group_advantages(rollouts.rewards, rollouts.groups)[:, None]
    for signal in (advantage, advantage * rollouts.mask):
        erpd.distill(base, rollouts, signal, 0.5, Config(**SMALL | {"distill_updates": 4}))
    assert spent[:4] == pytest.approx(spent[4:], rel=1e-3) and spent[3] > 0
    with pytest.raises(ValueError, match="one advantage a completion"):
        erpd.explore(base, rollouts, advantage, Config(**SMALL), loss="sapo", updates=1)


def test_the_rounds_budget_is_the_batchs(stage):
    """Mistake: pass rates read by the settings' group, by the order of rows, or by one size for all groups."""
    *_, rollouts = stage
    right = rollouts.rewards.view(8, 8).sum(1)
    for batch in (rollouts, rollouts.select(torch.randperm(64))):
        assert erpd.round_budget(batch, Config(group=16)) == pytest.approx(kl.budget_from_limit(right, 8))
    fewer = rollouts.select(torch.cat([torch.arange(60), torch.arange(62, 64)]))  # of the last problem 6
    right[-1] = rollouts.rewards[[56, 57, 58, 59, 62, 63]].sum()
    sizes = torch.tensor([8] * 7 + [6])
    assert erpd.round_budget(fewer, Config()) == pytest.approx(kl.budget_from_limit(right, sizes))
    assert torch.equal(kl.smoothed(right, sizes)[-1], (right[-1].double() + 0.5) / 7)


def test_student_stays_within_its_budget_on_its_own_samples(stage):
    """KL on the stored batch flatters: the budget is kept on fresh samples of the student."""
    base, tokenizer, problems, rollouts = stage
    config = Config(**SMALL | {"distill_updates": 64, "distill_batch": 8}, distill_lr=1e-3)
    signal = (rollouts.rewards * 2 - 1)[:, None] * rollouts.mask
    wild = erpd.distill(base, rollouts, signal, 100.0, config)
    kept, spent = erpd.within_budget(base, wild, tokenizer, problems, 0.1, config)
    same = collect(kept, tokenizer, problems, 4, **config.sampling)
    assert spent == pytest.approx(divergence(kept, base, same)["kl"], rel=1e-3)
    fresh = collect(kept, tokenizer, problems, 64, seed=9, **config.sampling)
    measured = divergence(kept, base, fresh)["kl"]
    unchecked = divergence(wild, base, collect(wild, tokenizer, problems, 8, seed=9, **config.sampling))["kl"]
    assert unchecked > 0.3 and 0 < spent <= 0.1 and measured < 0.15


def test_a_small_budget_is_kept_to_from_the_first_updates(stage, monkeypatch):
    """Mistake: a λ that begins alike for every budget, or steps that are as long: the first updates spend many times a
    small one, and what they moved is noise when they are called back."""
    base, _, _, rollouts = stage
    spending, dual_ascent = [], kl.dual_ascent
    monkeypatch.setattr(kl, "dual_ascent", lambda *a, **k: spending.append(a[1] / a[2]) or dual_ascent(*a, **k))
    signal = group_advantages(rollouts.rewards, rollouts.groups)[:, None] * rollouts.mask
    erpd.distill(base, rollouts, signal, 0.01, Config(**SMALL | {"distill_updates": 16, "distill_batch": 64}))
    assert sum(spending) / 16 < 1.5


@pytest.mark.parametrize("budget, floor, least", [(100.0, 0.75, 0.075), (100.0, 0.0, 0.1 * math.exp(-0.8)),
                                                  (1.0, 0.75, 0.75), (0.25, 0.75, 2 * math.exp(-0.8))])
def test_a_large_budget_is_a_bound_and_no_goal(stage, monkeypatch, budget, floor, least):
    """Mistake: a λ that falls until a budget is spent which buys nothing: granted a nat on two operands, a student
    spent it, and lost 17 points. Here there is nothing to learn, so that each of 16 updates lowers it by 5 %."""
    base, _, _, rollouts = stage
    prices, dual_ascent = [], kl.dual_ascent
    monkeypatch.setattr(kl, "dual_ascent", lambda *a, **k: prices.append(dual_ascent(*a, **k)) or prices[-1])
    config = Config(**SMALL | {"distill_updates": 16, "lambda_floor": floor})
    erpd.distill(base, rollouts, rollouts.mask, budget, config)
    assert prices[-1][0] == pytest.approx(least, rel=1e-3)


# ----------------------------------------------------------------------------------------------------- the command line

def test_a_whole_run(tmp_path, monkeypatch, capsys):
    """Two rounds of ERPD: rows on disk as printed, a figure, and a policy that transformers loads and that has moved.
    """
    monkeypatch.chdir(tmp_path)
    assert erpd.main(arguments(run="whole", rounds=2, kl_budget=0.5)) == 0
    folder = tmp_path / "runs" / "whole"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    ends = [row["policy"] for row in rows if "update" not in row]
    assert {row["policy"] for row in rows if "update" in row} == {"extreme region policy (sapo)", "student on its way"}
    assert ends == ["base"] + ["unlearned policy", "extreme region policy (sapo)", "ERPD student"] * 2
    assert rows[0]["kl"] == 0 and all(row["kl"] > 0 for row in rows[1:])
    assert all(row["kl_round"] <= 0.5 for row in rows if row["policy"] == "ERPD student")
    out = capsys.readouterr().out
    assert all(name in out for name in ends) and out.count("pass@2") == 2  # a table on the way, another at the end
    assert torch.load(folder / "round-1" / "signal.pt")["value"].any()
    assert (folder / "frontier.png").stat().st_size > 10_000
    assert json.loads((folder / "config.json").read_text())["kl_budget"] == 0.5
    policy = AutoModelForCausalLM.from_pretrained(folder / "policy")
    assert AutoTokenizer.from_pretrained(folder / "policy").encode("1+1=")
    assert not torch.equal(weights(policy), weights(AutoModelForCausalLM.from_pretrained(TINY)))
    assert len(Rollouts.load(folder / "round-2" / "rollouts.pt")) == 64


def test_the_settings_reach_every_stage(stage, tmp_path, monkeypatch):
    """Mistake: a setting that one stage takes and another forgets: a temperature at which policies are sampled and not
    trained, a seed or targets that are every round's, memory that the evaluation does not save."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(erpd, "load_policy", lambda *_: stage[:2])  # which tries a policy with settings of its own
    seen = {}

    def watch(name, note, *modules):  # a call's argument, by its place, or what `note` makes of it
        for module in modules:
            monkeypatch.setattr(module, name, lambda *a, work=getattr(module, name), **k: (
                seen.setdefault(name, []).append(note(*a, **k) if callable(note) else a[note]), work(*a, **k))[1])

    watch("token_stats", 3, kl), watch("choose", 1, kl), watch("noise", 0, kl), watch("micro_batches", 1, erpd, rollout)
    watch("group_advantages", 2, erpd), watch("autocast", 0, erpd), watch("encode_prompt", 2, rollout)
    watch("clipped_surrogate", slice(2, 4), kl), watch("trainable", slice(1, 3), erpd), watch("explorer_loss", 0, erpd)
    watch("passes", slice(3, 7), erpd), watch("normalised", slice(2, 3), erpd), watch("combine_signals", 1, erpd)
    watch("clip_grad_norm_", 1, torch.nn.utils), watch("sample", lambda *a, **k: len(a[1]) * a[2], rollout)
    watch("one_round", 2, erpd), watch("mini_batches", lambda *a: a[2].initial_seed(), erpd)
    watch("evaluate", lambda *a, pass_k, **k: (a[4], pass_k), erpd)
    watch("collect", lambda *a, desc, **k: (desc, len(a[2]), a[3]), erpd)
    given = dict(temperature=0.5, seed=3, rounds=2, tokens_per_step=300, sample_rows=16, template="{question}\n",
                 advantage="loo", precision="fp32", checkpointing=1, loss="mse:2,nll,ce:0.5", unlearn_loss="ce",
                 explore_batch=64, explore_updates=2, unlearn_updates=1, distill_batch=24, distill_clip=5,
                 signal_bound=2, kl_budget=0.5, limit_samples=4)
    assert erpd.main(arguments(run="one", **given)) == 0
    mine, other = (erpd.problems_of(Config(**SMALL | given | {"seed": seed}))[0] for seed in (3, 4))
    assert seen.pop("one_round") == [mine[:8], mine[8:]] and mine != other
    assert seen.pop("passes") == [(*of, seed, name) for seed in (3001, 3002) for *of, name in (
        (64, 1, "unlearned policy"), (64, 2, "extreme region policy (mse)"), (64, 2, "extreme region policy (nll)"),
        (64, 2, "extreme region policy (ce)"), (24, 2, "student on its way"))]
    assert seen.pop("combine_signals") == [[2.0, 1.0, 0.5]] * 2
    assert {name: set(notes) for name, notes in seen.items()} == {
        "token_stats": {0.5}, "choose": {0.5}, "clip_grad_norm_": {1.0}, "noise": {3, 3001, 3002},
        "micro_batches": {300}, "group_advantages": {"loo"}, "autocast": {"fp32"}, "encode_prompt": {"{question}\n"},
        "sample": {8, 16}, "clipped_surrogate": {(5.0, 5.0)}, "trainable": {(1e-4, 1), (4e-4, 1)},
        "normalised": {(), (2.0,)}, "mini_batches": {3001, 3002}, "explorer_loss": {"ce", "mse", "nll"},
        "collect": {("rollouts", 8, 8), ("spending check", 8, 4)}, "evaluate": {(4, 2), (2, 2), (1, 2)}}


def test_spending_is_checked_on_the_problems_of_other_rounds(tmp_path, monkeypatch):
    """On the problems that it was trained on a late round's student had spent 0.03 nats, and elsewhere 0.27."""
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr(erpd, "within_budget", lambda base, student, _, some, *a: seen.append(some) or (student, 0.0))
    config = Config(**SMALL | {"rounds": 3, "curve_samples": 0}, signal="unlearned")
    erpd.run(config, tmp_path / "runs" / "checked")
    problems, _ = erpd.problems_of(config)
    assert seen == [problems[8:], problems[16:] + problems[:8], problems[:16]]


def test_a_later_round_with_nothing_to_learn_ends_the_run_and_keeps_its_policy(tmp_path, monkeypatch, capsys):
    """Mistake: a policy that solves every new problem costs the user all rounds before."""
    monkeypatch.chdir(tmp_path)
    sampled = erpd.collect
    monkeypatch.setattr(erpd, "collect", lambda *a, seed, desc="", **k: solved(sampled(*a, seed=seed, desc=desc, **k))
                        if desc == "rollouts" and seed == 2 else sampled(*a, seed=seed, desc=desc, **k))

    def solved(rollouts):
        rollouts.rewards.fill_(1)
        return rollouts

    assert erpd.main(arguments(run="solved", rounds=2)) == 0
    assert "round 2 was not begun: no problem" in capsys.readouterr().err
    folder = tmp_path / "runs" / "solved"
    assert (folder / "policy").is_dir() and (folder / "metrics.jsonl").read_text().count("ERPD student") == 1


@pytest.mark.parametrize("method", ["grpo", "mse", "nll", "clip"])
def test_direct_methods_run(tmp_path, monkeypatch, method):
    monkeypatch.chdir(tmp_path)
    seeds, batches = set(), erpd.mini_batches
    monkeypatch.setattr(erpd, "mini_batches", lambda *a: seeds.add(a[2].initial_seed()) or batches(*a))
    assert erpd.main(arguments(method=method, run=method, kl_coef=0.1)) == 0
    rows = [json.loads(line) for line in (tmp_path / "runs" / method / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["policy"] == method and rows[-1]["kl"] > 0 and seeds == ({1, 2} if method == "grpo" else {1})


def test_every_update_of_grpo_has_problems_and_noise_of_its_own(tmp_path, monkeypatch):
    """Mistake: the same luck in every update; the last problems left out; or less than a group in a batch of none."""
    asked, kinds, sampled = [], set(), erpd.sampled
    monkeypatch.setattr(erpd, "sampled", lambda *a: asked.append((a[4], a[2])) or sampled(*a))
    monkeypatch.setattr(erpd, "group_advantages", lambda *a: kinds.add(a[2:]) or group_advantages(*a))
    config = Config(**SMALL | dict(rounds=2, problems=4, explore_batch=4), method="grpo", seed=2, advantage="loo")
    rows = erpd.run(config, tmp_path / "one")
    problems, _ = erpd.problems_of(config)
    assert asked == [(2001 * 100_003 + n, problems[n - 1:n]) for n in range(1, 9)]
    assert [row.get("update") for row in rows] == [None, 1, 2, 4, None] and kinds == {("loo",)}


def test_several_teachers_run_and_the_seed_decides_everything(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written = []
    for run in ("one", "two"):
        several = arguments(run=run, loss="mse:1,nll:0.5", signal="teacher", explore_updates=2, device="cpu")
        assert erpd.main(several) == 0
        written.append((tmp_path / "runs" / run / "metrics.jsonl").read_text())
    assert written[0] == written[1]
    student = json.loads(written[0].splitlines()[-1])  # its budget is the stored batch's own
    right = Rollouts.load(tmp_path / "runs" / "one" / "round-1" / "rollouts.pt").rewards.view(8, 8).sum(1)
    assert student["kl_round"] <= student["kl_budget"] == erpd.kl.budget_from_limit(right, 8)


def test_help_and_paper_settings(capsys):
    """Every field is an option with its meaning; --paper starts from the paper's settings, which the line can
    override."""
    with pytest.raises(SystemExit) as stopped:
        erpd.main(["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0 and all("--" + f.name.replace("_", "-") in text for f in fields(Config))
    paper, _ = erpd.read_arguments(["--paper", "--group", "4"])
    assert (paper.problems, paper.explore_lr, paper.explore_batch, paper.group) == (1000, 1e-6, 256, 4)
    with pytest.raises(InputError, match="--grup"):
        erpd.read_arguments(["--grup", "4"])
    with pytest.raises(InputError, match="leave --seed out"):  # 0 is a setting, too
        erpd.read_arguments(["--resume", "runs/one", "--seed", "0"])
