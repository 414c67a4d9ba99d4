"""kl.py, against sums over every token and every sequence of tiny policies, and against torch.distributions."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, kl_divergence
from torch.testing import assert_close

import kl


@pytest.fixture(autouse=True)
def on_device(device):
    with torch.device(device):
        yield


def random_log_probs(*shape: int, seed: int = 0, scale: float = 1.0):
    numbers = torch.randn(*shape, dtype=torch.float64, device="cpu", generator=torch.Generator("cpu").manual_seed(seed))
    return torch.log_softmax(scale * numbers.to(torch.get_default_device()), dim=-1)  # the same on every device


def gradient(value, theta):
    return torch.autograd.grad(value, theta, retain_graph=True)[0]


# --------------------------------------------------------------------------------------------------- sampled estimators

@pytest.mark.parametrize("estimator, samples, unbiased, slope", [
    (kl.k1, "π", True, "zero"), (kl.k2, "π", False, "KL(π‖π_0)"), (kl.k3, "π", True, "KL(π_0‖π)"),
    (lambda log_p, log_q: kl.k3_off_policy(log_p - log_q), "π_0", True, "KL(π‖π_0)"),
], ids=["k1", "k2", "k3", "k3_off_policy"])
def test_estimators_by_enumeration(estimator, samples, unbiased, slope):
    """Mistake: a sign or direction reversed; k1 or k3 as a KL loss, whose mean gradients are 0 and ∇KL(π_0‖π); an
    on-policy estimator on π_0's samples."""
    theta, log_q = random_log_probs(5, seed=1).requires_grad_(), random_log_probs(5, seed=2)
    log_p = theta.log_softmax(-1)
    p, q = Categorical(logits=log_p), Categorical(logits=log_q)
    exact, value = kl_divergence(p, q), estimator(log_p, log_q)
    weight = p.probs.detach() if samples == "π" else q.probs  # the samples do not move with θ
    assert torch.isclose((weight * value).sum(), exact, rtol=0.01) == unbiased
    slopes = {"zero": 0 * theta, "KL(π‖π_0)": gradient(exact, theta), "KL(π_0‖π)": gradient(kl_divergence(q, p), theta)}
    assert_close(gradient((weight * value).sum(), theta), slopes[slope])
    assert not torch.allclose(slopes["KL(π‖π_0)"], slopes["KL(π_0‖π)"], rtol=0.1)
    assert (value >= 0).all() == (estimator is not kl.k1)


# --------------------------------------------------------------------------------------------------------- on-policy KL

def all_sequences(eos: int):
    """(kl, log_ratio, mask, exact): every sequence as often as π_0 samples it, and KL(π_θ‖π_0) over the sequences.

    π_0 gives its three tokens 1/4, 1/4 and 1/2, so that 64 rows hold all sequences of three tokens in proportion; π_θ
    has one distribution for each prefix, rows of a [1 + V + V², V] table. `eos` ends a sequence.
    """
    y = torch.cartesian_prod(*[torch.arange(3)] * 3)  # [N, T]
    prefix = torch.stack([0 * y[:, 0], 1 + y[:, 0], 4 + 3 * y[:, 0] + y[:, 1]], 1)
    log_pi, log_pi_0 = random_log_probs(13, 3, seed=5, scale=3.0), torch.tensor([0.25, 0.25, 0.5]).double().log()
    ends = (y == eos).long()
    behind = (ends.cumsum(-1) > ends).double()
    y, prefix, behind = (x[(y * behind == 0).all(-1)] for x in (y, prefix, behind))  # each once: zeros behind an end
    log_p, log_q = log_pi[prefix, y] * (1 - behind), log_pi_0[y] * (1 - behind)
    rows = torch.arange(len(y)).repeat_interleave((64 * log_q.sum(-1).exp()).round().long())
    assert len(rows) == 64
    divergence = kl_divergence(Categorical(logits=log_pi), Categorical(logits=log_pi_0))[prefix]
    exact = kl_divergence(Categorical(logits=log_p.sum(-1)), Categorical(logits=log_q.sum(-1)))
    # nothing behind the end may count
    return (divergence + 7 * behind)[rows], (log_p - log_q + 3 * behind)[rows], (1 - behind)[rows], exact


@pytest.mark.parametrize("eos", [-1, 0], ids=["fixed length", "early ends"])
def test_on_policy_kl_is_that_of_the_sequences(eos):
    """Mistake: KL_t summed over the *reference's* prefixes, another number; or ended rows missing in the normaliser.
    """
    divergence, log_ratio, mask, exact = all_sequences(eos)
    assert torch.isclose(kl.on_policy_kl(divergence, log_ratio, mask, max_weight=1e9), exact)
    assert abs((divergence * mask).sum() / 64 - exact) > 0.1 * exact


@pytest.mark.parametrize("first, weights", [([math.log(1000), 0.0], [10 / 11, 1 / 11]), ([-200.0, -200.0], [0.5, 0.5])])
def test_on_policy_kl_by_hand(first, weights):
    """Mistake: a weight that includes its own token, is unbounded, not normalised, or carries a gradient; 0/0 where a
    collapsed policy makes all stored completions so improbable that their weights underflow."""
    divergence = torch.tensor([[0.5, 1.0], [0.5, 3.0]], requires_grad=True)
    log_ratio = torch.stack([torch.tensor(first), torch.tensor([5.0, -5.0])], 1).requires_grad_()
    value = kl.on_policy_kl(divergence, log_ratio, torch.ones(2, 2))
    assert_close(value, torch.tensor(0.5 + weights[0] * 1.0 + weights[1] * 3.0))
    value.backward()
    assert_close(divergence.grad, torch.tensor([[0.5, weights[0]], [0.5, weights[1]]]))
    assert log_ratio.grad is None


# ------------------------------------------------------------------------------------------ a chunk of tokens at a time

def assert_relative(ours, theirs, relative=1e-5):
    """Equal to 1e-5 of the tensor's own size: single entries may be near zero."""
    assert (ours - theirs).norm() <= relative * theirs.norm(), ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("has_weight, reference_has", [(True, True), (False, False), (False, True), (True, False)])
@pytest.mark.parametrize("chunk", [1, 300, 1000, 10**9])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_token_stats_are_those_of_all_the_logits(temperature, chunk, has_weight, reference_has):
    """Mistake: a chunk missed or counted twice, a temperature without its slope, a KL's gradient without its mean; a
    policy or reference whose logits are no h Wᵀ, and which gives its logits instead, treated as if they were; and in
    the definitions: F.kl_div(input, target) read as KL(input‖target), which is KL(target‖input)."""
    torch.manual_seed(0)
    n, d, size = 37, 16, 211
    hidden, weight = (3 * torch.randn(n, d)).requires_grad_(), torch.randn(size, d, requires_grad=True)
    ids = torch.cat([torch.tensor([0, size - 1]), torch.randint(size, (n - 2,))])
    other, other_weight = torch.randn(n, d), torch.randn(size, d)
    p, q = (Categorical(logits=h @ w.T / temperature) for h, w in ((hidden, weight), (other, other_weight)))
    log_prob, entropy, divergence = p.log_prob(ids), p.entropy(), kl_divergence(p, q)

    policy = (hidden, weight) if has_weight else (hidden @ weight.T, None)
    reference = (other, other_weight) if reference_has else (other @ other_weight.T, None)
    ours = kl.token_stats(*policy, ids, temperature, with_entropy=True, reference=reference, chunk=chunk)
    for mine, theirs in zip(ours, (log_prob, entropy, divergence), strict=True):
        assert_relative(mine, theirs)
    assert not ours.entropy.requires_grad
    alone = kl.token_stats(*policy, ids, temperature, chunk=chunk)
    assert alone.entropy is None and alone.kl is None
    a, b = (torch.rand(n) < 0.7) * torch.randn(2, n)  # some tokens have no gradient
    for loss, theirs in ((a * ours.log_prob + b * ours.kl, a * log_prob + b * divergence),
                         (a * alone.log_prob, a * log_prob), (b * ours.kl, b * divergence)):
        for of in (hidden, weight):
            assert_relative(gradient(loss.sum(), of), gradient(theirs.sum(), of))


def test_definitions_on_a_batch():
    """Mistake: an axis counted from the front, right for tokens [N, V] and wrong for completions [B, T, V]."""
    log_p, log_q = random_log_probs(2, 3, 5), random_log_probs(2, 3, 5, seed=1)
    ids = torch.tensor([[4, 0, 2], [1, 1, 3]])
    p, q = Categorical(logits=log_p), Categorical(logits=log_q)
    assert_close(kl.token_log_probs(log_p, ids), p.log_prob(ids))
    assert_close(kl.entropy(log_p), p.entropy())
    assert_close(kl.exact_kl(log_p, log_q), kl_divergence(p, q))


def test_token_stats_where_tokens_have_no_probability():
    """Mistake: 0·log 0 = NaN. Tokens barred in the policy count nothing, nor does their gradient, barred in the
    reference or not; one that only the reference never chooses makes KL infinite."""
    logits = torch.tensor([[0.5, 0.25, 0.25, 0.0]]).log().repeat(3, 1).requires_grad_()
    other = torch.tensor([[0.0, 0.0, 0.0, -math.inf], [0.0] * 4, [0.0, 0.0, -math.inf, 0.0]])
    for chunk in (4, 100):
        stats = kl.token_stats(logits, None, torch.tensor([0, 1, 2]), with_entropy=True, chunk=chunk,
                               reference=(other, None))
        assert_close(stats.log_prob.exp(), torch.tensor([0.5, 0.25, 0.25]))
        assert_close(stats.entropy, torch.full((3,), 1.5 * math.log(2)))
        assert_close(stats.kl, torch.tensor([3.0, 4.0, math.inf]).log() - 1.5 * math.log(2))
        slope = gradient((stats.log_prob + stats.kl)[:2].sum(), logits)[:2]
        assert slope.isfinite().all() and (slope[:, 3] == 0).all()


@pytest.mark.parametrize("chunk", [1, 10**9])
def test_sure_tokens(chunk):
    """Mistake: log Σe^z = 55 as one fp32 number: its rounding is a good part of what 1 − p leaves to learn from."""
    torch.manual_seed(0)
    ids = torch.arange(5)
    hidden = (torch.rand(5, 50) + 15 * F.one_hot(ids, 50) + 10 * ids[:, None]).requires_grad_()
    log_prob = kl.token_stats(hidden, torch.eye(50), ids, chunk=chunk).log_prob
    exact = hidden.double().log_softmax(1)[ids, ids]
    assert_relative(log_prob.double(), exact, 0.02)
    assert_relative(*(gradient(value.sum(), hidden)[ids, ids] for value in (log_prob, exact)), 0.02)


def test_token_stats_in_bf16():
    """Mistake: a softmax (errors of 1e-2), sums over a vocabulary, or of many chunks' gradients, in bf16. The logits
    are rounded, as the model's are."""
    torch.manual_seed(0)
    hidden, weight, ids = torch.randn(64, 32).bfloat16(), torch.randn(5000, 32).bfloat16(), torch.randint(5000, (64,))
    exact = Categorical(logits=(hidden @ weight.T).double() / 0.7)
    stats = kl.token_stats(hidden, weight, ids, 0.7, with_entropy=True)
    assert stats.log_prob.dtype == torch.float32
    assert_close(stats[:2], (exact.log_prob(ids), exact.entropy()), check_dtype=False, atol=1e-4, rtol=1e-5)
    weight.requires_grad_()
    one, many = (gradient(kl.token_stats(hidden, weight, 0 * ids, chunk=chunk).log_prob.sum(), weight).float()
                 for chunk in (10**9, 5000))
    assert_relative(many, one, 4e-3)  # one rounding; sums in bf16 are off by 8e-3


# ------------------------------------------------------------------------------------------------------------- sampling

def test_noise_is_uniform_and_belongs_to_its_sample():
    """Mistake: seeds whose streams are alike, so that problems, samples or rounds repeat one another's luck."""
    streams = [torch.cat([kl.noise(seed, problem, 16, 64) for problem in range(200)]) for seed in (3, 4)]
    counts = (streams[0] * 100).long().flatten().bincount(minlength=100)
    assert streams[0].min() >= 0 and streams[0].max() < 1
    assert ((counts - 2048).square() / 2048).sum() < 99 + 5 * math.sqrt(2 * 99)
    one = streams[0]
    assert len(one.unique(dim=0)) == len(one)
    # steps, samples, problems, seeds, a seed's problem and the next seed's one before
    for x, y in ((one[:, :-1], one[:, 1:]), (one[:-1], one[1:]), (one[:-16], one[16:]), streams,
                 (one[16:], streams[1][:-16])):
        assert torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1].abs() < 0.01
    assert torch.equal(kl.noise(3, 7, 4, 64), one[7 * 16:7 * 16 + 4])
    assert kl.noise((2**31 - 1) * 100_003, 7, 1, 1).numel() == 1  # GRPO's largest seed: no overflow


def test_choose_at_the_edges():
    """Mistake: a token of probability 0 at either end, or an index beyond the last, which ends a GPU's process without
    a word, also where logits are not finite (test_input.py: that is told). Its log-prob is the softmax's."""
    logits = torch.tensor([[-math.inf, 1.0, 2.0, -math.inf, -math.inf]]).repeat(4, 1)
    uniform = torch.tensor([0.0, 0.1, 0.9, 1 - 2.0 ** -24])
    token, log_prob = kl.choose(logits, 0.5, uniform)
    assert token.tolist() == [1, 1, 2, 2]
    assert_close(log_prob, (logits / 0.5).log_softmax(-1).gather(1, token[:, None])[:, 0])
    for bad in (math.nan, math.inf):
        assert (kl.choose(torch.full((4, 5), bad), 1.0, uniform)[0] < 5).all()


# ---------------------------------------------------------------------------------------------------------- masked mean

@pytest.mark.parametrize("mask, mean", [([[1, 1, 0], [1, 0, 0]], 3.0), ([[0, 0, 0], [0, 0, 0]], 0.0),
                                        ([[0.5, 1.5, 0], [1, 0, 0]], 10 / 3)])
def test_masked_mean_ignores_what_is_behind_the_mask(mask, mean):
    """Mistake: values·mask, where NaN·0 and inf·0 are NaN; 0/0, where a mask of zeros gives 0 and no gradient; or a
    mask that counts a weight of a half as one."""
    values = torch.tensor([[1.0, 3.0, math.nan], [5.0, math.inf, -math.inf]], requires_grad=True)
    mask = torch.tensor(mask, dtype=torch.float32)
    value = kl.masked_mean(values, mask)
    assert_close(value, torch.tensor(mean))
    assert_close(gradient(value, values), mask / 3)


# ----------------------------------------------------------------------------------------------------------- surrogates

@pytest.mark.parametrize("ratio, advantage, value, slope", [
    (1.5, 1.0, 1.28, 0.0),     # already far enough up: closed
    (0.5, 1.0, 0.5, 1.0),      # moved the wrong way: open
    (0.5, -1.0, -0.8, 0.0),    # already far enough down: closed
    (1.5, -1.0, -1.5, -1.0),   # moved the wrong way: open
    (50., -2.0, -100., -2.0),  # … and unbounded
    (1.1, 2.0, 2.2, 2.0), (0.9, -2.0, -1.8, -2.0), (1.0, 1.0, 1.0, 1.0), (1.0, -1.0, -1.0, -1.0),  # inside
    (1.25, 1.0, 1.25, 1.0),    # the upper bound is its own, 0.28
    (1.5, 0.0, 0.0, 0.0),
])
def test_clipped_surrogate(ratio, advantage, value, slope):
    """Mistake: clip without the minimum, which closes all four sign × side cases; or the two bounds exchanged."""
    ratio = torch.tensor(ratio, requires_grad=True)
    surrogate = kl.clipped_surrogate(ratio, torch.tensor(advantage), low=0.2, high=0.28)
    assert_close((surrogate, gradient(surrogate, ratio)), (torch.tensor(value), torch.tensor(slope)))


@pytest.mark.parametrize("advantage, tau", [(0.3, 1.0), (-2.0, 1.05), (0.0, 1.0)])
def test_soft_gate_surrogate(advantage, tau):
    """Mistake: no 4/τ, or one τ for both signs. f(1) = 2/τ and f′(ρ) = 1/cosh²(τ(ρ − 1)/2): 1 at ρ = 1 and never 0."""
    ratio = torch.tensor([1.0, 2.0, 4.0, 8.0, 0.5, 0.0], requires_grad=True)
    value = kl.soft_gate_surrogate(ratio, torch.full((6,), advantage))
    assert_close(value[0], torch.tensor(2 / tau * advantage))
    slope = advantage / (tau * (ratio.detach() - 1) / 2).cosh().square()
    assert_close(gradient(value.sum(), ratio), slope)


# -------------------------------------------------------------------------------------------------------- the KL budget

def test_dual_ascent_direction_and_bounds():
    """Mistake: the sign of the dual step: a policy that overspends must be held harder, at once and in the long run.
    """
    for kl_now, harder in ((2.0, 1), (0.5, -1)):
        multiplier, coefficient = kl.dual_ascent(1.0, kl=kl_now, budget=1.0, rate=0.1, gain=1.0)
        assert harder * math.log(multiplier) > 0 and harder * math.log(coefficient) > harder * math.log(multiplier)
    assert kl.dual_ascent(1.0, kl=1.0, budget=1.0, rate=0.1) == (1.0, 1.0)
    assert kl.dual_ascent(1.0, kl=2.0, budget=1.0) == pytest.approx((math.exp(0.05), math.exp(1.05)))
    for wild in (1e9, math.inf):  # one wild batch moves it no further than twice the budget does
        assert kl.dual_ascent(1.0, kl=wild, budget=0.5, rate=0.1) == kl.dual_ascent(1.0, kl=1.0, budget=0.5, rate=0.1)
    assert kl.dual_ascent(900.0, kl=9.0, budget=1.0, rate=1.0, bound=1e3)[0] == 1e3
    assert kl.dual_ascent(2e-3, kl=0.0, budget=1.0, rate=9.0, bound=1e3)[0] == 1e-3
    assert kl.dual_ascent(0.6, kl=0.0, budget=1.0, rate=9.0, least=0.5)[0] == 0.5


@pytest.mark.parametrize("start", [0.01, 1.0, 100.0])
def test_dual_ascent_finds_the_budget(start):
    """Mistake: a coefficient that swings for ever or stops short. Where KL slowly follows c/λ it ends at the budget.
    """
    multiplier, spent, c, budget = start, 1.0, 3.0, 0.5
    for _ in range(1000):
        multiplier, coefficient = kl.dual_ascent(multiplier, spent, budget, rate=0.05)
        spent *= (c / coefficient / spent) ** 0.1  # a tenth of the way in each update
    assert spent == pytest.approx(budget, rel=1e-2) and coefficient == pytest.approx(c / budget, rel=1e-2)


@pytest.mark.parametrize("c", [0.9, 1.5, 3.0, 20.0, 300.0])
def test_largest_step_on_a_quadratic(c):
    """Mistake: a step much shorter than it need be; a student within the budget that is moved back all the same."""
    asked = []
    step, spent = kl.largest_step_within(lambda a: asked.append(a) or c * a * a, budget=1.0, trials=16)
    assert spent <= 1.0 and spent == c * step * step
    assert step > 0.9 * c ** -0.5 if c > 1 else asked == [1.0] == [step]
    assert not any(0.95 <= c * a * a <= 1 for a in asked[:-1])  # near enough: another trial is samples for nothing


@pytest.mark.parametrize("measure", [
    lambda a: 50 * a, lambda a: 50 * a ** 6, lambda a: 1e6 * a * a, lambda a: 5.0 if a > 0.3 else 0.1,
    lambda a: math.nan if a > 0.4 else a, lambda a: math.inf if a > 0.4 else a * a,
    lambda a: 3 * a * a * (1 + 0.5 * math.sin(50 * a)), lambda a: 0.0 if a < 0.5 else 1.0 + 1e-9,
    lambda a: math.nan, lambda a: math.inf, lambda a: 2.0,
], ids=["linear", "steep", "tiny", "jump", "nan", "inf", "wavy", "flat", "only nan", "only inf", "never"])
def test_largest_step_keeps_to_the_budget(measure):
    """Mistake: trusting the model of the line search, or NaN > budget, which is False. What comes back is the largest
    step that was measured within the budget, or none."""
    asked = {}
    step, spent = kl.largest_step_within(lambda a: asked.setdefault(a, measure(a)), budget=1.0)
    assert (step, spent) == max(((a, cost) for a, cost in asked.items() if cost <= 1.0), default=(0.0, 0.0))
    assert all(0 < a <= 1 for a in asked) and len(asked) <= 6


def test_interpolated(make_model):
    """Mistake: interpolating in place, or tied weights moved twice."""
    base, model = make_model("qwen3", 1), make_model("qwen3", 2)
    before = copy.deepcopy(base.state_dict()), copy.deepcopy(model.state_dict())
    middle = kl.interpolated(base, model, 0.25)
    for name, weight in middle.state_dict().items():
        assert_close(weight, 0.75 * before[0][name] + 0.25 * before[1][name])
    assert middle.lm_head.weight is middle.model.embed_tokens.weight
    for policy, state in zip((base, model), before):
        assert all(torch.equal(weight, state[name]) for name, weight in policy.state_dict().items())


# ------------------------------------------------------------------------------------------------------------ the limit

def test_least_kl_is_the_least():
    """Mistake: a limit that some policy crosses. Random pass rates q cost at least the limit's KL at their mean."""
    p = torch.tensor([0.0, 0.1, 0.3, 0.5, 0.9, 1.0], dtype=torch.float64)
    accuracy, least = (torch.tensor(x, dtype=torch.float64) for x in kl.least_kl(p, points=4000))
    assert_close(torch.stack([accuracy[0], least[0]]), torch.stack([p.mean(), 0 * p[0]]))
    assert (accuracy.diff() >= 0).all() and (least.diff() >= 0).all()
    torch.manual_seed(0)
    q = p + torch.rand(500, 6, dtype=torch.float64) * (p > 0) * (1 - p)  # a problem never solved stays so
    coins = torch.stack([p, 1 - p], -1), torch.stack([q, 1 - q], -1)
    cost = kl_divergence(Categorical(coins[1]), Categorical(coins[0].expand(500, 6, 2))).mean(-1)
    at = torch.searchsorted(accuracy, q.mean(-1)).clamp(1, len(accuracy) - 1) - 1  # the point just below
    assert (cost >= least[at] - 1e-9).all()


def test_a_rounds_budget_by_hand():
    """Mistake: rates of 0 and 1, under which a problem is hopeless or done; a share of 1, not of what is left to 1."""
    half = kl.budget_from_limit(torch.full((4,), 8), 16)  # p̃ = 8½/17 = ½, so q = ⅞ is asked for
    assert half == pytest.approx((7 / 8 * math.log(7 / 4) + 1 / 8 * math.log(1 / 4)) / 0.8, rel=0.01)
    assert_close(kl.smoothed(torch.tensor([0, 16]), 16), torch.tensor([1 / 34, 33 / 34]).double())
    never, rarely, mostly, always = (kl.budget_from_limit(torch.full((64,), c), 16) for c in (0, 2, 14, 16))
    assert never > rarely > half > mostly > always > 0 and always < 0.03
    assert kl.budget_from_limit(torch.tensor([1] + 63 * [0]), 4096) > never  # the limit is drawn that far
