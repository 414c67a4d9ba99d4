"""kl.py, against sums over every token and every sequence of tiny policies, and against torch.distributions."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, kl_divergence

import kl


@pytest.fixture(autouse=True)
def on_device(device):
    with torch.device(device):
        yield


def random_log_probs(*shape: int, seed: int = 0, scale: float = 1.0):
    numbers = torch.randn(*shape, dtype=torch.float64, device="cpu", generator=torch.Generator("cpu").manual_seed(seed))
    return torch.log_softmax(scale * numbers.to(torch.get_default_device()), dim=-1)  # the same on every device


# A tabular policy has one distribution for each prefix: rows of a [1 + V + V², V] table.
V, T = 3, 3
SEQUENCES = torch.cartesian_prod(*[torch.arange(V)] * T)  # all V^T of them, [N, T]
PREFIXES = torch.stack([0 * SEQUENCES[:, 0], 1 + SEQUENCES[:, 0], 1 + V + V * SEQUENCES[:, 0] + SEQUENCES[:, 1]], dim=1)
TABLE = (1 + V + V * V, V)


def token_log_probs_of_all(table):
    """[N, T] log π(y_t|s_t) for each of the sequences."""
    return table[PREFIXES, SEQUENCES]


def outcomes(kind: str):
    """(θ, log π [N] as a function of θ, log π_0 [N]): single tokens, or whole sequences of a tabular policy."""
    shape, log_prob = ((5,), lambda t: t) if kind == "tokens" else (TABLE, lambda t: token_log_probs_of_all(t).sum(-1))
    theta = random_log_probs(*shape, seed=1).requires_grad_()
    return theta, log_prob(theta.log_softmax(-1)), log_prob(random_log_probs(*shape, seed=2))


def gradient(value, theta):
    return torch.autograd.grad(value, theta, retain_graph=True)[0]


# --------------------------------------------------------------------------------------------------- sampled estimators

@pytest.mark.parametrize("kind", ["tokens", "sequences"])
def test_k1_and_k3_are_unbiased_and_k2_is_not(kind):
    """Mistake: k1's sign or k3's direction reversed. Under y ~ π all of KL(π‖π_0) is E[k1] = E[k3]."""
    _, log_p, log_q = outcomes(kind)
    p, exact = log_p.exp(), kl_divergence(Categorical(log_p.exp()), Categorical(log_q.exp()))
    assert torch.isclose((p * kl.k1(log_p, log_q)).sum(), exact)
    assert torch.isclose((p * kl.k3(log_p, log_q)).sum(), exact)
    assert not torch.isclose((p * kl.k2(log_p, log_q)).sum(), exact, rtol=0.02)
    assert (kl.k3(log_p, log_q) >= 0).all() and (kl.k1(log_p, log_q) < 0).any()


@pytest.mark.parametrize("kind", ["tokens", "sequences"])
def test_gradients_of_the_estimators_as_losses(kind):
    """Mistake: k1 or k3 as a KL loss. With samples held fixed E∇k1 = 0, E∇k3 = ∇KL(π_0‖π); only E∇k2 = ∇KL(π‖π_0)."""
    theta, log_p, log_q = outcomes(kind)
    p = log_p.detach().exp()  # the samples do not move with θ
    forward = gradient((log_p.exp() * (log_p - log_q)).sum(), theta)
    backward = gradient((log_q.exp() * (log_q - log_p)).sum(), theta)
    assert not torch.allclose(forward, backward, rtol=0.1)
    torch.testing.assert_close(gradient((p * kl.k1(log_p, log_q)).sum(), theta), torch.zeros_like(theta))
    torch.testing.assert_close(gradient((p * kl.k2(log_p, log_q)).sum(), theta), forward)
    torch.testing.assert_close(gradient((p * kl.k3(log_p, log_q)).sum(), theta), backward)


@pytest.mark.parametrize("kind", ["tokens", "sequences"])
def test_k3_off_policy_is_unbiased_in_value_and_gradient(kind):
    """Mistake: an on-policy estimator on π_0's samples. There this one has KL(π_θ‖π_0)'s value and gradient."""
    theta, log_p, log_q = outcomes(kind)
    exact = (log_p.exp() * (log_p - log_q)).sum()
    estimate = (log_q.exp() * kl.k3_off_policy(log_p - log_q)).sum()
    assert torch.isclose(estimate, exact)
    assert (kl.k3_off_policy(log_p - log_q) >= 0).all()
    torch.testing.assert_close(gradient(estimate, theta), gradient(exact, theta))


def test_token_estimates_add_up_to_the_sequence_kl():
    """Mistake: a mean over tokens called a completion's KL. Under y ~ π the sum is: E Σ_t k_t = KL of the sequences.
    """
    table, reference = random_log_probs(*TABLE, seed=1), random_log_probs(*TABLE, seed=2)
    log_p, log_q = token_log_probs_of_all(table), token_log_probs_of_all(reference)
    p = log_p.sum(-1).exp()
    exact = kl_divergence(Categorical(p), Categorical(log_q.sum(-1).exp()))
    for estimator in (kl.k1, kl.k3):
        assert torch.isclose((p * estimator(log_p, log_q).sum(-1)).sum(), exact)


# ------------------------------------------------------------------------------------------------------------- exact KL

def test_exact_kl_in_both_directions():
    """Mistake: F.kl_div(input, target) read as KL(input‖target): it is KL(target‖input)."""
    log_p, log_q = random_log_probs(2, 4, 7, seed=1), random_log_probs(2, 4, 7, seed=2)
    p, q = Categorical(logits=log_p), Categorical(logits=log_q)
    torch.testing.assert_close(kl.exact_kl(log_p, log_q), kl_divergence(p, q))
    torch.testing.assert_close(kl.exact_kl(log_q, log_p), kl_divergence(q, p))
    by_torch = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)  # reversed arguments
    torch.testing.assert_close(kl.exact_kl(log_p, log_q), by_torch)
    assert not torch.allclose(kl.exact_kl(log_p, log_q), kl.exact_kl(log_q, log_p), rtol=0.05)


def test_exact_kl_where_tokens_have_no_probability():
    """Mistake: 0·log 0 = NaN. A token p never chooses adds nothing; one that only q never chooses makes KL infinite.
    """
    log_p = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.5, 0.25, 0.25, 0.0]]).log().requires_grad_()
    log_q = torch.tensor([[0.25, 0.25, 0.5, 0.0], [0.5, 0.5, 0.0, 0.0]]).log()
    value = kl.exact_kl(log_p, log_q)
    torch.testing.assert_close(value, torch.tensor([math.log(2), math.inf]))
    value[0].backward()
    assert log_p.grad[0].isfinite().all()
    torch.testing.assert_close(kl.exact_kl(log_p, log_p), torch.zeros(2))


# --------------------------------------------------------------------------------------------------------- on-policy KL

def all_sequences(eos: int):
    """(kl, log_ratio, mask, exact): every sequence as often as π_0 samples it, and KL(π_θ‖π_0) over the sequences.

    π_0 gives its three tokens 1/4, 1/4 and 1/2, so that 64 rows hold them all in proportion. `eos` ends a sequence.
    """
    reference = torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64).log().expand(TABLE)
    table = random_log_probs(*TABLE, seed=5, scale=3.0)
    ends = (SEQUENCES == eos).long().to(table.device)
    mask = (ends.cumsum(-1) - ends == 0).double()
    different = ((SEQUENCES.to(mask.device) > 0) * (1 - mask)).sum(-1) == 0  # each once: only zeros behind an end
    log_p, log_q = token_log_probs_of_all(table) * mask, token_log_probs_of_all(reference) * mask
    p, q = log_p.sum(-1).exp()[different], log_q.sum(-1).exp()[different]
    assert p.sum().item() == pytest.approx(1) and q.sum().item() == pytest.approx(1)
    rows = different.nonzero()[:, 0].repeat_interleave((64 * q).round().long())
    divergence, behind = kl.exact_kl(table, reference)[PREFIXES], 1 - mask  # nothing behind the end may count
    return (divergence + 7 * behind)[rows], (log_p - log_q + 3 * behind)[rows], mask[rows], (p * (p / q).log()).sum()


@pytest.mark.parametrize("eos", [-1, 0], ids=["fixed length", "early ends"])
def test_on_policy_kl_is_that_of_the_sequences(eos):
    """Mistake: KL_t summed over the *reference's* prefixes, another number; or ended rows missing in the normaliser.
    """
    divergence, log_ratio, mask, exact = all_sequences(eos)
    assert len(mask) == 64
    assert torch.isclose(kl.on_policy_kl(divergence, log_ratio, mask, max_weight=1e9), exact)
    unweighted = (divergence * mask).sum() / len(mask)
    assert abs(unweighted - exact) > 0.1 * exact


def test_on_policy_kl_by_hand():
    """Mistake: a weight that includes its own token, is unbounded, not normalised, or carries a gradient."""
    divergence = torch.tensor([[0.5, 1.0], [0.5, 3.0]], requires_grad=True)
    log_ratio = torch.tensor([[math.log(1000), 5.0], [0.0, -5.0]], requires_grad=True)
    value = kl.on_policy_kl(divergence, log_ratio, torch.ones(2, 2), max_weight=10)
    torch.testing.assert_close(value, torch.tensor(0.5 + (10 * 1.0 + 1 * 3.0) / 11))
    value.backward()
    torch.testing.assert_close(divergence.grad, torch.tensor([[0.5, 10 / 11], [0.5, 1 / 11]]))
    assert log_ratio.grad is None


def test_on_policy_kl_survives_improbable_batches():
    """Mistake: 0/0 once every stored completion is so improbable that its weight underflows (a collapsed policy)."""
    divergence = torch.tensor([[0.5, 1.0], [0.5, 3.0]])
    log_ratio = torch.tensor([[-200.0, 0.0], [-200.0, 0.0]])
    torch.testing.assert_close(kl.on_policy_kl(divergence, log_ratio, torch.ones(2, 2)), torch.tensor(2.5))


# --------------------------------------------------------------------------------------------------- log-probs, entropy

def test_token_log_probs_by_hand():
    """Mistake: probabilities gathered along the wrong axis."""
    probs = torch.tensor([[[0.1, 0.2, 0.7], [0.3, 0.4, 0.3]]])
    chosen = kl.token_log_probs(probs.log(), torch.tensor([[2, 1]]))
    torch.testing.assert_close(chosen.exp(), torch.tensor([[0.7, 0.4]]))


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_log_softmax_is_fp32_at_the_temperature(temperature):
    """Mistake: a softmax in bf16 (errors of 1e-2), or one that forgets the sampling temperature."""
    torch.manual_seed(0)
    logits = (8 * torch.randn(3, 1000)).bfloat16()
    log_probs = kl.log_softmax(logits, temperature)
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs.double(), (logits.double() / temperature).log_softmax(-1), atol=1e-4, rtol=0)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(3))


def test_entropy():
    """Mistake: 0·log 0 = NaN, or the wrong sign. Uniform gives log V, certainty 0."""
    log_probs = torch.tensor([[0.25, 0.25, 0.25, 0.25], [1, 0, 0, 0], [0.5, 0.5, 0, 0]]).log()
    torch.testing.assert_close(kl.entropy(log_probs), torch.tensor([math.log(4), 0.0, math.log(2)]))
    log_probs = random_log_probs(2, 3, 7)
    torch.testing.assert_close(kl.entropy(log_probs), Categorical(logits=log_probs).entropy())


# ------------------------------------------------------------------------------------------ a chunk of tokens at a time

def naive_stats(hidden, weight, ids, temperature, reference):
    """The same as kl.token_stats, by autograd, from all the logits at once."""
    log_p, log_q = (kl.log_softmax(h @ w.T, temperature) for h, w in ((hidden, weight), reference))
    return kl.token_log_probs(log_p, ids), kl.entropy(log_p), kl.exact_kl(log_p, log_q)


def assert_relative(ours, theirs, relative=1e-5):
    """Equal to 1e-5 of the tensor's own size: single entries may be near zero."""
    assert (ours - theirs).norm() <= relative * theirs.norm(), ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("chunk", [1, 300, 1000, 10**9])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_token_stats_are_the_naive_ones(temperature, chunk):
    """Mistake: a chunk missed or counted twice, a temperature without its slope, a KL's gradient without its mean."""
    torch.manual_seed(0)
    n, d, size = 37, 16, 211
    hidden, weight = (3 * torch.randn(n, d)).requires_grad_(), torch.randn(size, d, requires_grad=True)
    ids = torch.cat([torch.tensor([0, size - 1]), torch.randint(size, (n - 2,))])
    reference = torch.randn(n, d), torch.randn(size, d)
    theirs = naive_stats(hidden, weight, ids, temperature, reference)
    ours = kl.token_stats(hidden, weight, ids, temperature, with_entropy=True, reference=reference, chunk=chunk)
    for mine, other in zip(ours, theirs, strict=True):
        assert_relative(mine, other)
    assert not ours.entropy.requires_grad
    alone = kl.token_stats(hidden, weight, ids, temperature, chunk=chunk)
    assert alone.entropy is None and alone.kl is None
    mask, a, b = (torch.rand(n) < 0.7).float(), torch.randn(n), torch.randn(n)  # some tokens have no gradient
    for loss, other in ((mask * (a * ours.log_prob + b * ours.kl), mask * (a * theirs[0] + b * theirs[2])),
                        (mask * a * alone.log_prob, mask * a * theirs[0]), (mask * b * ours.kl, mask * b * theirs[2])):
        mine = torch.autograd.grad(loss.sum(), (hidden, weight), retain_graph=True)
        for x, y in zip(mine, torch.autograd.grad(other.sum(), (hidden, weight), retain_graph=True), strict=True):
            assert_relative(x, y)


@pytest.mark.parametrize("ours_has_weight, reference_has_weight", [(False, False), (False, True), (True, False)])
def test_token_stats_from_logits(ours_has_weight, reference_has_weight):
    """Mistake: a model whose logits are no h Wᵀ treated as if they were. It, or its reference, gives its logits
    instead."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    ids = torch.randint(7, (9,))
    other, other_weight = torch.randn(9, 4), torch.randn(7, 4)
    theirs = naive_stats(hidden, weight, ids, 0.7, (other, other_weight))
    policy = (hidden, weight) if ours_has_weight else (hidden @ weight.T, None)
    reference = (other, other_weight) if reference_has_weight else (other @ other_weight.T, None)
    ours = kl.token_stats(*policy, ids, 0.7, with_entropy=True, reference=reference, chunk=20)
    for mine, expected in zip(ours, theirs, strict=True):
        assert_relative(mine, expected)
    mine, expected = (torch.autograd.grad((x[0] + 2 * x[2]).sum(), (hidden, weight)) for x in (ours, theirs))
    for x, y in zip(mine, expected, strict=True):
        assert_relative(x, y)


def test_token_stats_where_tokens_have_no_probability():
    """Mistake: 0·log 0 = NaN. Tokens barred in policy and reference alike count nothing, nor does their gradient."""
    logits = torch.tensor([[0.5, 0.25, 0.25, 0.0]]).log().repeat(2, 1).requires_grad_()
    other = torch.tensor([[0.0, 0.0, 0.0, -math.inf]]).repeat(2, 1)
    for chunk in (4, 100):
        stats = kl.token_stats(logits, None, torch.tensor([0, 1]), with_entropy=True, chunk=chunk,
                               reference=(other, None))
        torch.testing.assert_close(stats.log_prob.exp(), torch.tensor([0.5, 0.25]))
        torch.testing.assert_close(stats.entropy, torch.full((2,), 1.5 * math.log(2)))
        torch.testing.assert_close(stats.kl, torch.full((2,), math.log(3) - 1.5 * math.log(2)))
        gradient, = torch.autograd.grad((stats.log_prob + stats.kl).sum(), logits)
        assert gradient.isfinite().all() and (gradient[:, 3] == 0).all()


@pytest.mark.parametrize("chunk", [1, 10**9])
def test_sure_tokens(chunk):
    """Mistake: log Σe^z = 55 as one fp32 number: its rounding is a good part of what 1 − p leaves to learn from."""
    torch.manual_seed(0)
    ids = torch.arange(5)
    hidden = (torch.rand(5, 50) + 15 * F.one_hot(ids, 50) + 10 * ids[:, None]).requires_grad_()
    log_prob = kl.token_stats(hidden, torch.eye(50), ids, chunk=chunk).log_prob
    log_prob.sum().backward()
    exact = hidden.detach().double().requires_grad_()
    exact.log_softmax(1)[ids, ids].sum().backward()
    assert_relative(log_prob.double(), exact.log_softmax(1)[ids, ids], 0.02)
    assert_relative(hidden.grad[ids, ids].double(), exact.grad[ids, ids], 0.02)


def test_token_stats_in_bf16():
    """Mistake: sums over a vocabulary, or of many chunks' gradients, in bf16. The logits are rounded, as the model's
    are."""
    torch.manual_seed(0)
    hidden, weight, ids = torch.randn(64, 32).bfloat16(), torch.randn(5000, 32).bfloat16(), torch.randint(5000, (64,))
    stats = kl.token_stats(hidden, weight, ids, 0.7, with_entropy=True)
    log_pi = kl.log_softmax(hidden @ weight.T, 0.7)
    assert stats.log_prob.dtype == torch.float32
    torch.testing.assert_close(stats.log_prob, kl.token_log_probs(log_pi, ids), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(stats.entropy, kl.entropy(log_pi), atol=1e-4, rtol=1e-5)
    weight.requires_grad_()
    one, many = (torch.autograd.grad(kl.token_stats(hidden, weight, ids, chunk=chunk).log_prob.sum(), weight)[0].float()
                 for chunk in (10**9, 5000))
    assert_relative(many, one, 4e-3)  # one rounding; sums in bf16 are off by 1e-2


# ------------------------------------------------------------------------------------------------------------- sampling

def test_noise_is_uniform_and_belongs_to_its_sample():
    """Mistake: seeds whose streams are alike, so that problems, samples or rounds repeat one another's luck."""
    streams = [torch.cat([kl.noise(seed, problem, 16, 64) for problem in range(200)]) for seed in (3, 4)]
    counts = (streams[0] * 100).long().flatten().bincount(minlength=100)
    assert streams[0].min() >= 0 and streams[0].max() < 1
    assert ((counts - 2048).square() / 2048).sum() < 99 + 5 * math.sqrt(2 * 99)
    one = streams[0]
    # steps, samples, problems, seeds
    for x, y in ((one[:, :-1], one[:, 1:]), (one[:-1], one[1:]), (one[:-16], one[16:]), streams):
        assert torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1].abs() < 0.01
    assert torch.equal(kl.noise(3, 7, 4, 64), one[7 * 16:7 * 16 + 4])


def test_choose_at_the_edges():
    """Mistake: a token of probability 0 at either end, or an index beyond the last. Its log-prob is the softmax's."""
    logits = torch.tensor([[-math.inf, 1.0, 2.0, -math.inf, -math.inf]]).repeat(4, 1)
    uniform = torch.tensor([0.0, 0.1, 0.9, 1 - 2.0 ** -24])
    token, log_prob = kl.choose(logits, 0.5, uniform)
    assert token.tolist() == [1, 1, 2, 2]
    torch.testing.assert_close(log_prob, (logits / 0.5).log_softmax(-1).gather(1, token[:, None])[:, 0])


# ---------------------------------------------------------------------------------------------------------- masked mean

def test_masked_mean_of_nothing():
    """Mistake: 0/0. A mask of zeros gives 0 and no gradient, not NaN."""
    values = torch.ones(2, 3, requires_grad=True)
    mean = kl.masked_mean(values, torch.zeros(2, 3))
    mean.backward()
    assert mean == 0 and (values.grad == 0).all()


def test_masked_mean_ignores_what_is_behind_the_mask():
    """Mistake: values·mask, where NaN·0 and inf·0 are NaN: padding poisons the mean and its gradient."""
    values = torch.tensor([[1.0, 3.0, math.nan], [5.0, math.inf, -math.inf]], requires_grad=True)
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    mean = kl.masked_mean(values, mask)
    mean.backward()
    torch.testing.assert_close(mean, torch.tensor(3.0))
    torch.testing.assert_close(values.grad, mask / 3)


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_micro_batches_add_up(rows):
    """Mistake: each micro-batch divided by its own tokens: the gradient then depends on how the batch was split."""
    torch.manual_seed(0)
    weight, inputs = torch.randn(6, requires_grad=True), torch.randn(5, 4, 6)
    mask = (torch.arange(4) < torch.tensor([4, 1, 0, 2, 3])[:, None]).float()  # ragged, one row empty
    whole = gradient(((inputs @ weight).square() * mask).sum() / 10, weight)
    for part, part_mask in zip(inputs.split(rows), mask.split(rows)):
        kl.masked_mean((part @ weight).square(), part_mask, denominator=mask.sum()).backward()
    torch.testing.assert_close(weight.grad, whole)
    torch.testing.assert_close(gradient(kl.masked_mean((inputs @ weight).square(), mask), weight), whole)


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
    surrogate.backward()
    torch.testing.assert_close((surrogate, ratio.grad), (torch.tensor(value), torch.tensor(slope)))


@pytest.mark.parametrize("advantage, tau", [(2.0, 1.0), (-2.0, 1.05)])
def test_soft_gate_surrogate(advantage, tau):
    """Mistake: no 4/τ, or one τ for both signs. f′(ρ) = 1/cosh²(τ(ρ − 1)/2): 1 at ρ = 1, never 0, steeper for A < 0.
    """
    ratio = torch.tensor([1.0, 2.0, 4.0, 8.0, 0.5, 0.0], requires_grad=True)
    value = kl.soft_gate_surrogate(ratio, torch.full((6,), advantage))
    value.sum().backward()
    slope = ratio.grad / advantage
    torch.testing.assert_close(slope, 1 / (tau * (ratio.detach() - 1) / 2).cosh().square())
    torch.testing.assert_close(value[0], torch.tensor(2 / tau * advantage))
    assert slope[0].item() == pytest.approx(1)
    assert (slope[:4].diff() < 0).all() and (slope[[0, 4, 5]].diff() < 0).all() and (slope > 0).all()


def test_soft_gate_of_no_advantage():
    """Mistake: NaN or a gradient where the group's rewards are all equal."""
    ratio = torch.tensor([0.5, 1.0, 3.0], requires_grad=True)
    kl.soft_gate_surrogate(ratio, torch.zeros(3)).sum().backward()
    assert (ratio.grad == 0).all()


# -------------------------------------------------------------------------------------------------------- the KL budget

def test_dual_ascent_direction_and_bounds():
    """Mistake: the sign of the dual step: a policy that overspends must be held harder, at once and in the long run.
    """
    for kl_now, harder in ((2.0, 1), (0.5, -1)):
        multiplier, coefficient = kl.dual_ascent(1.0, kl=kl_now, budget=1.0, rate=0.1, gain=1.0)
        assert harder * math.log(multiplier) > 0 and harder * math.log(coefficient) > harder * math.log(multiplier)
    assert kl.dual_ascent(1.0, kl=1.0, budget=1.0, rate=0.1) == (1.0, 1.0)
    for wild in (1e9, math.inf):  # one wild batch moves it no further than twice the budget does
        assert kl.dual_ascent(1.0, kl=wild, budget=1.0, rate=0.1) == kl.dual_ascent(1.0, kl=2.0, budget=1.0, rate=0.1)
    assert kl.dual_ascent(900.0, kl=9.0, budget=1.0, rate=1.0, bound=1e3)[0] == 1e3
    assert kl.dual_ascent(2e-3, kl=0.0, budget=1.0, rate=9.0, bound=1e3)[0] == 1e-3


@pytest.mark.parametrize("start", [0.01, 1.0, 100.0])
def test_dual_ascent_finds_the_budget(start):
    """Mistake: a coefficient that swings for ever or stops short. Where KL slowly follows c/λ it ends at the budget.
    """
    multiplier, spent, c, budget = start, 1.0, 3.0, 0.5
    for _ in range(1000):
        multiplier, coefficient = kl.dual_ascent(multiplier, spent, budget, rate=0.05)
        spent *= (c / coefficient / spent) ** 0.1  # a tenth of the way in each update
    assert spent == pytest.approx(budget, rel=1e-2) and coefficient == pytest.approx(c / budget, rel=1e-2)


@pytest.mark.parametrize("c", [1.5, 3.0, 20.0, 300.0])
def test_largest_step_on_a_quadratic(c):
    """Mistake: a step that overspends, or one much shorter than it need be."""
    step, spent = kl.largest_step_within(lambda a: c * a * a, budget=1.0, trials=16)
    assert spent <= 1.0 and spent == c * step * step
    assert step > 0.9 * c ** -0.5


def test_the_full_step_is_measured_once():
    """Mistake: a student within the budget that is moved back all the same."""
    asked = []
    assert kl.largest_step_within(lambda a: asked.append(a) or 0.9, budget=1.0) == (1.0, 0.9)
    assert asked == [1.0]


@pytest.mark.parametrize("measure", [
    lambda a: 50 * a, lambda a: 50 * a ** 6, lambda a: 1e6 * a * a, lambda a: 5.0 if a > 0.3 else 0.1,
    lambda a: math.nan if a > 0.4 else a, lambda a: math.inf if a > 0.4 else a * a,
    lambda a: 3 * a * a * (1 + 0.5 * math.sin(50 * a)), lambda a: 0.0 if a < 0.5 else 1.0 + 1e-9,
], ids=["linear", "steep", "tiny", "jump", "nan", "inf", "wavy", "flat"])
def test_largest_step_keeps_to_the_budget(measure):
    """Mistake: trusting the model of the line search. What comes back was measured, and is within the budget."""
    asked = {}
    step, spent = kl.largest_step_within(lambda a: asked.setdefault(a, measure(a)), budget=1.0)
    assert 0 <= step <= 1 and spent <= 1.0
    assert (step, spent) == (0.0, 0.0) or asked[step] == spent
    assert len(asked) <= 6


@pytest.mark.parametrize("nothing_fits", [math.nan, math.inf, 2.0])
def test_no_step_where_nothing_fits(nothing_fits):
    """Mistake: NaN > budget is False: a policy whose KL is NaN passes."""
    assert kl.largest_step_within(lambda a: nothing_fits, budget=1.0) == (0.0, 0.0)


def test_interpolated(make_model):
    """Mistake: interpolating in place, or tied weights moved twice."""
    base, model = make_model("qwen3", 1), make_model("qwen3", 2)
    before = copy.deepcopy(base.state_dict()), copy.deepcopy(model.state_dict())
    ids = torch.arange(8)[None]
    for alpha, same in ((0.0, base), (1.0, model)):
        torch.testing.assert_close(kl.interpolated(base, model, alpha)(ids).logits, same(ids).logits)
    middle = kl.interpolated(base, model, 0.25)
    for name, weight in middle.state_dict().items():
        torch.testing.assert_close(weight, 0.75 * before[0][name] + 0.25 * before[1][name])
    assert middle.lm_head.weight is middle.model.embed_tokens.weight
    for policy, state in zip((base, model), before):
        assert all(torch.equal(weight, state[name]) for name, weight in policy.state_dict().items())


# ------------------------------------------------------------------------------------------------------------ the limit

def test_least_kl_is_the_least():
    """Mistake: a limit that some policy crosses. Random pass rates q cost at least the limit's KL at their mean."""
    p = torch.tensor([0.0, 0.1, 0.3, 0.5, 0.9, 1.0], dtype=torch.float64)
    accuracy, least = (torch.tensor(x, dtype=torch.float64) for x in kl.least_kl(p, points=4000))
    assert accuracy[0].item() == pytest.approx(p.mean().item()) and least[0].item() == pytest.approx(0, abs=1e-12)
    assert (accuracy.diff() >= 0).all() and (least.diff() >= 0).all()
    torch.manual_seed(0)
    q = p + torch.rand(500, 6, dtype=torch.float64) * (p > 0) * (1 - p)  # a problem never solved stays so
    coins = torch.stack([p, 1 - p], -1), torch.stack([q, 1 - q], -1)
    cost = kl_divergence(Categorical(coins[1]), Categorical(coins[0].expand(500, 6, 2))).mean(-1)
    at = torch.searchsorted(accuracy, q.mean(-1)).clamp(1, len(accuracy) - 1) - 1  # the point just below
    assert (cost >= least[at] - 1e-9).all()


def test_least_kl_by_hand():
    """Mistake: nats, mean or direction. One problem, right half the time: KL = log 2 − H(a)."""
    for a, least in zip(*kl.least_kl(torch.tensor([0.5]), points=9)):
        entropy = Categorical(torch.tensor([a, 1 - a], dtype=torch.float64)).entropy().item()
        assert least == pytest.approx(math.log(2) - entropy, abs=1e-6)


def test_a_rounds_budget_by_hand():
    """Mistake: rates of 0 and 1, under which a problem is hopeless or done; a share of 1, not of what is left to 1."""
    half = kl.budget_from_limit(torch.full((4,), 8), 16)  # p̃ = 8½/17 = ½, so q = ⅞ is asked for
    assert half == pytest.approx((7 / 8 * math.log(7 / 4) + 1 / 8 * math.log(1 / 4)) / 0.8, rel=0.01)
    torch.testing.assert_close(kl.smoothed(torch.tensor([0, 16]), 16), torch.tensor([1 / 34, 33 / 34]).double())
    never, rarely, mostly, always = (kl.budget_from_limit(torch.full((64,), c), 16) for c in (0, 2, 14, 16))
    assert never > rarely > half > mostly > always > 0 and always < 0.03
