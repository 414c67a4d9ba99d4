"""Probabilities: token log-probs, entropy, KL, sampling, the surrogates that move a policy, and the trust region.

Nearly everything here is a function over tensors. Shapes: B completions, T tokens, V vocabulary. A *completion mask*
[B, T] is 1 on the tokens that the policy chose, its end-of-sequence token among them, and 0 after them. All KL is in
nats.

Directions, once and for all: `exact_kl(p, q)` is KL(p‖q) = Σ_v p(v)·log(p(v)/q(v)). A policy's distance from its
reference is KL(π_θ‖π_0): the expectation is under the policy that moved.

From log-probs [..., V] everything is a line or two. What the vocabulary of a language model costs stands at the end:
`token_stats` has the same numbers and gradients from hidden states [N, d] without holding logits [N, V].
"""

import copy
import math
from bisect import bisect_left
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


# ------------------------------------------------------------------------------------------------ log-probs and entropy

def log_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """log π(·|s) over the vocabulary [..., V], in fp32 whatever the dtype of the logits."""
    return F.log_softmax(logits.float() if temperature == 1 else logits.float() / temperature, dim=-1)


def token_log_probs(log_probs: Tensor, ids: Tensor) -> Tensor:
    """log π(y_t|s_t) [B, T]: each position's distribution [B, T, V] read at the token [B, T] that was chosen there.

    Position t of `log_probs` must be the distribution *of* token t, that is the model's output at token t − 1.
    """
    return log_probs.gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def entropy(log_probs: Tensor) -> Tensor:
    """−Σ_v π(v)·log π(v), nats [...], from log-probs [..., V]. A token of probability 0 adds 0."""
    return torch.special.entr(log_probs.exp()).sum(-1)


# ------------------------------------------------------------------------------------------------------------------- KL

def exact_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p‖q) over the whole vocabulary, nats [...], from log-probs [..., V] of both.

    No noise from the choice of the next token: only the prefixes are sampled. It is what every figure shows. (F.kl_div
    takes its arguments the other way round.) The rounding of logits in bf16 alone is some 1e-4 nats a token.
    """
    return log_ratio_of(log_p, log_q).mul_(log_p.exp()).sum(-1)


def log_ratio_of(log_p: Tensor, log_q: Tensor) -> Tensor:
    """log p/q [..., V], and 0 where p is 0, since 0·log 0 = 0."""
    return (log_p - log_q).masked_fill_(log_p == -torch.inf, 0.0)


# For notebook 3, which compares them; training and reports take exact_kl, an explorer's bar k3_off_policy.

def k1(log_prob: Tensor, reference: Tensor) -> Tensor:
    """log π − log π_0 on sampled tokens: unbiased for KL(π‖π_0) under y ~ π, noisy, and its gradient has mean zero."""
    return log_prob - reference


def k2(log_prob: Tensor, reference: Tensor) -> Tensor:
    """½(log π − log π_0)²: a biased value, but under y ~ π its gradient is that of KL(π‖π_0)."""
    return 0.5 * (log_prob - reference).square()


def k3(log_prob: Tensor, reference: Tensor) -> Tensor:
    """e^{−k1} − 1 + k1: unbiased for KL(π‖π_0) under y ~ π, and never negative (Schulman, Approximating KL)."""
    log_ratio = log_prob - reference
    return torch.expm1(-log_ratio) + log_ratio


def k3_off_policy(log_ratio: Tensor) -> Tensor:
    """ρ·log ρ − (ρ − 1), log ρ = log π_θ − log π_0: unbiased for a token's KL(π_θ‖π_0) when π_0 sampled it, ≥ 0."""
    return log_ratio.exp() * log_ratio - torch.expm1(log_ratio)


def on_policy_kl(kl: Tensor, log_ratio: Tensor, mask: Tensor, max_weight: float = 10.0) -> Tensor:
    """KL(π_θ‖π_0) in nats a completion [], estimated on completions that π_0 sampled.

    KL(π_θ‖π_0) = Σ_t E_{y_<t ~ π_θ}[KL_t] = Σ_t E_{y_<t ~ π_0}[(Π_{u<t} ρ_u)·KL_t], with the weights normalised at
    each position and bounded, so that far away it reads low. Without the weights it would be the KL on the
    *reference's* prefixes, another number and usually the wrong one: a policy that avoids its errors visits others.

    kl, log_ratio and mask are [B, T]: exact KL at each stored prefix, log ρ_t of the chosen token, completion mask.
    """
    before = ((log_ratio * mask).cumsum(-1) - log_ratio * mask).detach()  # log Π_{u<t} ρ_u
    # The softmax over the rows is each weight over the sum of all, with no underflow. Rows that have ended stay in that
    # sum, since only over all rows that π_0 sampled is the weights' mean 1; their KL at later positions is zero.
    weight = before.clamp(max=math.log(max_weight)).softmax(0)
    return (weight * kl * mask).sum()


# ------------------------------------------------------------------------------------------------------------- sampling

def noise(seed: int, problem: int, group: int, steps: int) -> Tensor:
    """Uniform numbers in [0, 1) [G, steps] that belong to a problem's samples, whatever is sampled beside them.

    They are drawn on the CPU, so that they are the same for every device.
    """
    generator = torch.Generator("cpu").manual_seed((1_000_003 * seed + problem) % 2**63)
    return torch.rand(group, steps, generator=generator, device="cpu")


def choose(logits: Tensor, temperature: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """(token, its log-prob) [R] each, sampled from logits [R, V]: where the running sum of π passes `uniform` [R]."""
    probs = (logits.float() / temperature).softmax(-1)
    sums = probs.cumsum(-1)
    total = sums[:, -1:]
    # Strictly below the total, so that no rounding leads to a token of probability 0 behind the last possible one.
    threshold = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    token = torch.searchsorted(sums, threshold, right=True).clamp_(max=sums.shape[1] - 1)  # NaN would lead beyond
    return token[:, 0], probs.gather(1, token)[:, 0].log()


# ------------------------------------------------------------------------------------------------------------- averages

def masked_mean(values: Tensor, mask: Tensor, denominator: float | None = None) -> Tensor:
    """Σ values·mask / denominator []; the denominator is the mask's own sum unless given.

    Give the whole batch's token count when the batch is split into micro-batches: then their gradients add up to the
    gradient of the whole, however it was split. A mask of zeros gives 0, not NaN; so do infinite values outside it.
    """
    denominator = mask.sum().clamp(min=1) if denominator is None else max(1, denominator)
    return torch.where(mask.bool(), values * mask, 0.0).sum() / denominator


# ------------------------------------------------------------------------------------- surrogates, each to be maximised

def clipped_surrogate(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """min(ρ·A, clip(ρ, 1 − ε_low, 1 + ε_high)·A) (PPO, 1707.06347; separate bounds as in DAPO, 2503.14476).

    The gradient stops where the ratio has already moved past its bound in the direction that A asks for. The other two
    sides stay open: with A < 0 and ρ > 1 + ε_high the term is unbounded below.
    """
    return torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def soft_gate_surrogate(ratio: Tensor, advantage: Tensor, tau_pos: float = 1.0, tau_neg: float = 1.05) -> Tensor:
    """f(ρ)·A with f(ρ) = (4/τ)·σ(τ(ρ − 1)) (SAPO, 2511.20347); τ = tau_pos where A > 0, else tau_neg.

    f′(1) = 1, as for ρ·A; above 1 the gate closes smoothly and never quite, below hardly (f′(0) = 0.79): it is the weak
    constraint that lets the explorer drift.
    """
    tau = torch.where(advantage > 0, tau_pos, tau_neg)
    return 4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantage


# -------------------------------------------------------------------------------------------------------- the KL budget

def dual_ascent(multiplier: float, kl: float, budget: float, rate: float = 0.05, gain: float = 1.0,
                least: float = 0.0, bound: float = 1e3) -> tuple[float, float]:
    """One step on the dual of max J s.t. KL ≤ budget: (multiplier, the KL coefficient λ to use in the next update).

        log multiplier += rate·e        λ = multiplier·exp(gain·e)        e = kl/budget − 1, bounded to [−1, 1]

    The multiplier, from `least` or 1/bound to `bound`, integrates what is over- or underspent. It answers late, since
    the policy takes many updates to follow, and alone it swings; the second factor answers at once and damps that (a PI
    controller on the Lagrangian, 2007.03964, here in log λ).
    """
    overspent = min(max(kl / budget - 1, -1.0), 1.0)
    multiplier = min(max(multiplier * math.exp(rate * overspent), least, 1 / bound), bound)
    return multiplier, multiplier * math.exp(gain * overspent)


def largest_step_within(measure: Callable[[float], float], budget: float, trials: int = 6) -> tuple[float, float]:
    """A large step α ∈ (0, 1] along π_0 → π_θ whose measured KL keeps to the budget, and that KL: (α, KL(α)).

    Backtracking line search: the full step first; while that overspends, a quadratic's guess; then the bracket is
    halved until 95 % of the budget is used, or `trials` measurements are spent. (0, 0) if none kept to the budget.
    """
    step, spent = 0.0, 0.0  # the best that keeps to the budget
    above, trial = 1.0, 1.0
    for _ in range(trials):
        measured = measure(trial)
        if measured <= budget:
            step, spent = trial, measured
        else:  # NaN too
            above = trial
        if step == 1.0 or spent >= 0.95 * budget:
            break
        if step == 0.0 and math.isfinite(measured):
            trial *= 0.9 * math.sqrt(budget / measured)  # KL grows like α² near the reference
        else:
            trial = (step + above) / 2
    return step, spent


def interpolated(base, model, alpha: float):
    """The policy at π_0 + α(π_θ − π_0) in the space of weights."""
    between = copy.deepcopy(model)
    with torch.no_grad():
        for weight, start in zip(between.parameters(), base.parameters()):
            weight.copy_(start + alpha * (weight - start))
    return between


def smoothed(right: Tensor, samples: int | Tensor) -> Tensor:
    """Pass rates (c + ½)/(n + 1) [P] of c right completions in n: Jeffreys' prior, where no problem is hopeless."""
    return (right.double() + 0.5) / (samples + 1)


def coin_kl(q: Tensor, p: Tensor) -> Tensor:
    """KL of two coins, nats [...]: the least of a policy that is right with probability q where π_0 is with p."""
    return sum(torch.special.xlogy(a, a) - torch.special.xlogy(a, b) for a, b in ((q, p), (1 - q, 1 - p)))


def least_kl(pass_rates: Tensor, points: int = 200) -> tuple[list[float], list[float]]:
    """The limit: (accuracies, KL). Where π_0 has these pass rates no policy is right a of the time for less KL(π‖π_0).

    A policy that is right with probability q_x on problem x, where π_0 is with p_x [P], moved by at least the KL of
    those two coins. For a given mean accuracy their mean is least where all problems' odds grow by one factor, the
    tilt: q_x = p_x·tilt/(1 − p_x + p_x·tilt).
    """
    p = pass_rates.double()
    tilt = torch.linspace(0, 12, points, dtype=torch.float64, device=p.device).exp()[:, None]
    q = p * tilt / (1 - p + p * tilt)
    return q.mean(1).tolist(), coin_kl(q, p).mean(1).tolist()


def budget_from_limit(right: Tensor, group: int | Tensor, share: float = 0.75, efficiency: float = 0.8) -> float:
    """The KL of a round, nats a completion, from the right completions [P] of each problem in its stored batch.

    It is the least that any policy needs to close `share` of the gap between the base's accuracy and 1, over the
    efficiency that a student can be expected to have. So a round near 100 % spends little.
    """
    rates = smoothed(right, group)
    accuracies, least = least_kl(rates, points=2000)
    wanted = rates.mean().item() + share * (1 - rates.mean().item())
    return least[bisect_left(accuracies, wanted)] / efficiency


# ----------------------------------------------------------------- for large vocabularies: never all the logits at once

CHUNK = 2**25  # logits in an array, 128 MB: a GPU works longer on it than it waits for its launch


class TokenStats(NamedTuple):
    """What a policy says of N tokens, nats. Log-prob and KL carry gradients, the entropy does not."""

    log_prob: Tensor  # log π(y|s)
    entropy: Tensor | None  # of π(·|s)
    kl: Tensor | None  # exact KL(π‖π_0) at s


def log_policy(hidden: Tensor, weight: Tensor | None, temperature: float) -> Tensor:
    """log π [n, V] from hidden states [n, d] and the output embedding [V, d]; or without one from logits [n, V]."""
    return log_softmax(hidden if weight is None else hidden @ weight.T, temperature)


def token_stats(hidden: Tensor, weight: Tensor | None, ids: Tensor, temperature: float = 1.0, *,
                with_entropy: bool = False, reference: tuple[Tensor, Tensor | None] | None = None,
                chunk: int | None = None) -> TokenStats:
    """TokenStats of the tokens `ids` [N] from the hidden states [N, d] before them; `reference`: its states and weight.

    Equal to the definitions above, in value and gradient (tests/test_kl.py), with up to four arrays of about `chunk`
    logits in memory at a time.
    """
    vocabulary = hidden.shape[1] if weight is None else len(weight)
    rows = max(1, (chunk or CHUNK) // vocabulary)
    return TokenStats(*_InChunks.apply(hidden, weight, ids, temperature, with_entropy, reference, rows))


class _InChunks(torch.autograd.Function):
    """`rows` tokens after the other. Backward, the logits of each chunk are made again, and with z = logits/T

        ∂ log π(y)/∂z = 1_y − p        ∂ KL/∂z = p·(log p/q − KL)        ∂h = ∂z W        ∂W = Σ ∂zᵀ h

    In all four products with W, where autograd, holding all logits, takes three.
    """

    @staticmethod
    def forward(ctx, hidden, weight, ids, temperature, with_entropy, reference, rows):
        stats = []
        for part in (slice(start, start + rows) for start in range(0, max(1, len(hidden)), rows)):
            log_p = log_policy(hidden[part], weight, temperature)
            log_q = log_policy(reference[0][part], reference[1], temperature) if reference else None
            stats.append((token_log_probs(log_p, ids[part]), entropy(log_p) if with_entropy else None,
                          exact_kl(log_p, log_q) if reference else None))
            del log_p, log_q  # before the next chunk's are made
        log_prob, its_entropy, kl = (None if column[0] is None else torch.cat(column) for column in zip(*stats))
        ctx.save_for_backward(hidden, weight, ids, kl)
        ctx.settings = temperature, reference, rows
        ctx.mark_non_differentiable(*[its_entropy] * with_entropy)
        return log_prob, its_entropy, kl

    @staticmethod
    def backward(ctx, grad_log_prob, _, grad_kl):
        hidden, weight, ids, kl = ctx.saved_tensors
        temperature, reference, rows = ctx.settings
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for part in (slice(start, start + rows) for start in range(0, len(hidden), rows)):
            log_p, slope = log_policy(hidden[part], weight, temperature), -grad_log_prob[part, None] / temperature
            if reference:
                log_ratio = log_ratio_of(log_p, log_policy(reference[0][part], reference[1], temperature))
                slope = log_ratio.sub_(kl[part, None]).mul_(grad_kl[part, None] / temperature).add_(slope)
            grad_z = log_p.exp_().mul_(slope)
            grad_z.scatter_add_(1, ids[part, None], grad_log_prob[part, None] / temperature)
            grad_z = grad_z.to(hidden.dtype)
            grad_hidden[part] = grad_z if weight is None else grad_z @ weight
            if grad_weight is not None and grad_z.dtype == torch.float32:
                grad_weight.addmm_(grad_z.T, hidden[part])
            elif grad_weight is not None:  # products in bf16 are summed in fp32
                grad_weight += grad_z.T @ hidden[part]
            log_p = log_ratio = slope = grad_z = None  # before the next chunk's are made
        return grad_hidden, grad_weight, *[None] * 5
