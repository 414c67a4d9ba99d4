"""Probabilities: token log-probs, entropy, KL divergences, the surrogates that move a policy, and the trust region.

Everything here is a function over tensors. Shapes: B completions, T tokens, V vocabulary. A *completion mask* [B, T] is 1
on the tokens that the policy chose (its end-of-sequence token among them) and 0 after them. All KL is in nats.

Directions, once and for all: `exact_kl(p, q)` is KL(p‖q) = Σ_v p(v)·log(p(v)/q(v)). A policy's distance from its
reference is KL(π_θ‖π_0): the expectation is under the policy that moved.

Log-probs, entropy and KL exist twice. On distributions [..., V] they are one line each, to be read. `token_figures`
has the same numbers and their gradients from hidden states [N, d] and the output embedding [V, d]: never [N, V].
"""

import copy
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


# ---------------------------------------------------------------------------------------------- log-probs and entropy

def log_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """log π(·|s) over the vocabulary [..., V], in fp32 whatever the dtype of the logits."""
    return F.log_softmax(logits.float() / temperature, dim=-1)


def token_log_probs(log_probs: Tensor, ids: Tensor) -> Tensor:
    """log π(y_t|s_t) [B, T]: each position's distribution [B, T, V] read at the token [B, T] that was chosen there.

    Position t of `log_probs` must be the distribution *of* token t, that is the model's output at token t − 1.
    """
    return log_probs.gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def entropy(log_probs: Tensor) -> Tensor:
    """−Σ_v π(v)·log π(v), nats [...], from log-probs [..., V]. A token of probability 0 adds 0."""
    return torch.special.entr(log_probs.exp()).sum(-1)


# -------------------------------------------------------------------------------------------------------------- KL

def exact_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p‖q) over the whole vocabulary, nats [...], from log-probs [..., V] of both.

    No sampling noise, so it is what every figure shows. (F.kl_div takes its arguments the other way round.)
    """
    difference = torch.where(log_p == -torch.inf, 0.0, log_p - log_q)  # 0·log 0 = 0
    return (log_p.exp() * difference).sum(-1)


def k1(log_prob: Tensor, reference: Tensor) -> Tensor:
    """log π − log π_0 on sampled tokens: unbiased for KL(π‖π_0) under y ~ π, noisy, and its gradient has mean zero."""
    return log_prob - reference


def k2(log_prob: Tensor, reference: Tensor) -> Tensor:
    """½(log π − log π_0)²: a biased value, but under y ~ π its gradient is that of KL(π‖π_0)."""
    return 0.5 * (log_prob - reference).square()


def k3(log_prob: Tensor, reference: Tensor) -> Tensor:
    """e^{−k1} − 1 + k1: unbiased for KL(π‖π_0) under y ~ π, never negative (Schulman, 'Approximating KL divergence')."""
    log_ratio = log_prob - reference
    return torch.expm1(-log_ratio) + log_ratio


def k3_off_policy(log_ratio: Tensor) -> Tensor:
    """ρ·log ρ − (ρ − 1), log ρ = log π_θ − log π_0: unbiased for KL(π_θ‖π_0) when y ~ π_0, never negative."""
    ratio = log_ratio.exp()
    return ratio * log_ratio - (ratio - 1)


def on_policy_kl(kl: Tensor, log_ratio: Tensor, mask: Tensor, max_weight: float = 10.0) -> Tensor:
    """KL(π_θ‖π_0) in nats a completion [], estimated on completions that π_0 sampled.

    KL(π_θ‖π_0) = Σ_t E_{y_<t ~ π_θ}[KL_t] = Σ_t E_{y_<t ~ π_0}[(Π_{s<t} ρ_s)·KL_t], with the weights normalised at each
    position and bounded. Summing KL_t without the weights asks how far the policy moved on the *reference's* prefixes,
    which is another number and usually the wrong one: a policy that avoids its reference's errors visits other prefixes.

    kl, log_ratio and mask are [B, T]: exact KL at each stored prefix, log ρ_t of the chosen token, completion mask.
    """
    before = ((log_ratio * mask).cumsum(-1) - log_ratio * mask).detach()  # log Π_{s<t} ρ_s
    # A finished completion still counts in the normaliser: its KL at later positions is zero.
    weight = before.clamp(max=math.log(max_weight)).softmax(0)
    return (weight * kl * mask).sum()


# ------------------------------------------------------------- the same from hidden states, without the logits [N, V]

BLOCK, GPU_BLOCK = 2**22, 2**24  # logits in memory at a time: 16 MB, near a CPU's caches; 64 MB, enough work for a GPU


class Head(NamedTuple):
    """A model's output layer: logits = cap·tanh(scale·h Wᵀ / cap), or scale·h Wᵀ where nothing caps them."""

    weight: Tensor  # W [V, d], the output embedding
    scale: float = 1.0
    cap: float | None = None


class TokenFigures(NamedTuple):
    """What a policy says of its tokens, nats. Log-prob and KL carry gradients, the entropy does not."""

    log_prob: Tensor  # log π(y|s)
    entropy: Tensor | None  # of π(·|s)
    kl: Tensor | None  # exact KL(π‖π_0) at s


def token_figures(hidden: Tensor, head: Head | None, ids: Tensor, temperature: float = 1.0, *,
                  with_entropy: bool = False, reference: tuple[Tensor, Head | None] | None = None,
                  block: int | None = None) -> TokenFigures:
    """log π(y|s) [N] of the tokens `ids` [N], from the hidden states [N, d] at s; on request the entropy [N], and the
    KL [N] to a reference, given by its (hidden states, head) there. About `block` logits are in memory at a time.

    A model whose output layer is no `Head` has its logits [N, V] for `hidden`, and None for `head`; so has its reference.
    """
    block = block or (BLOCK if hidden.device.type == "cpu" else GPU_BLOCK)
    if head is not None and (reference is None or reference[1] is not None):
        return TokenFigures(*_FromHidden.apply(hidden, head.weight, ids, head.scale, head.cap, temperature,
                                               with_entropy, reference, block))
    log_pi = log_softmax(whole_logits(hidden, head), temperature)
    return TokenFigures(token_log_probs(log_pi, ids), entropy(log_pi.detach()) if with_entropy else None,
                        exact_kl(log_pi, log_softmax(whole_logits(*reference), temperature)) if reference else None)


def whole_logits(states: Tensor, head: Head | None) -> Tensor:
    """[N, V] from hidden states [N, d] and their head; without a head the states are the logits."""
    if head is None:
        return states
    logits = head.scale * (states @ head.weight.to(states.dtype).T).float()
    return logits if head.cap is None else head.cap * (logits / head.cap).tanh()


def block_width(hidden: Tensor, weight: Tensor, block: int) -> int:
    """How many columns [N] make about `block` logits; at least one, at most the vocabulary."""
    return max(1, min(len(weight), block // max(1, len(hidden))))


def logit_blocks(hidden: Tensor, head: Head, temperature: float, block: int) -> Iterator[tuple[slice, Tensor]]:
    """(columns, z [N, v]): logits over the temperature, fp32, block after block of the vocabulary in one buffer.

    The product has the dtype of the hidden states, as in the model's own output layer; inside it sums in fp32. A barred
    token's −∞ becomes −1e30, whose probability is 0 as well: sums over the vocabulary then need no 0·∞ = 0.
    """
    weight, scale, cap = head
    rows, width = len(hidden), block_width(hidden, weight, block)
    buffer = hidden.new_empty(rows * width)
    for start in range(0, len(weight), width):
        part = weight[start:start + width].to(hidden.dtype)
        z = torch.mm(hidden, part.T, out=buffer[:rows * len(part)].view(rows, -1)).float()
        if cap is not None:
            z.mul_(scale / cap).tanh_().mul_(cap / temperature)
        elif scale != temperature:
            z.mul_(scale / temperature)
        yield slice(start, start + len(part)), z.clamp_(min=-1e30)


def exponentials(z: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """m = max z [N, 1], e^(z − m) [N, v] written to `out`, and its sum [N, 1]."""
    largest = z.amax(1, keepdim=True)
    e = torch.sub(z, largest, out=out[:z.numel()].view_as(z)).exp_()
    return largest, e, e.sum(1, keepdim=True)


def joined(largest: list[Tensor], sums: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """M, Σe^(z − M) [N, 1] and each block's share [N, b] of it, from the blocks' own.

    M and the sum stay two numbers: log Σe^z = 25 is known to 2e-6 in fp32, as much as a sure token's 1 − p may be.
    """
    largest, sums = torch.cat(largest, 1), torch.cat(sums, 1)
    top = largest.amax(1, keepdim=True)
    parts = sums * (largest - top).exp()
    total = parts.sum(1, keepdim=True)
    return top, total, parts / total


def columns_of(ids: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Where the tokens [N] stand in a block of the vocabulary, and whether they do: [N, 1] each."""
    y = (ids - columns.start).unsqueeze(-1)
    width = columns.stop - columns.start
    return y.clamp(0, width - 1), (y >= 0) & (y < width)


class _FromHidden(torch.autograd.Function):
    """With z = logits/T and p = e^z/Σe^z of the policy, w and q of its reference:

        log π(y) = z_y − log Σe^z                                             ∂/∂z = 1_y − p
        KL       = Σ p·(log p − log q) = Σ p·(z − w) − log Σe^z + log Σe^w    ∂/∂z = p·(log p − log q − KL)
        H        = log Σe^z − Σ p·z

    Forward, each block b of the vocabulary gives its own Σ_b e^z and its own means under softmax_b(z); the whole is a
    mixture of the blocks. Backward, Σe^z is known, so that each block of z, computed a second time, turns into ∂z at
    once: each row of ∂W = ∂zᵀ h is written once, and ∂h = Σ_b ∂z W_b. That is a fourth product where autograd does
    three; what it saves is memory, and the time that memory takes.
    """

    @staticmethod
    def forward(ctx, hidden, weight, ids, scale, cap, temperature, with_entropy, reference, block):
        width = block_width(hidden, weight, block)
        z_y, largest, sums, largest_w, sums_w, means_z, means_difference = 0.0, [], [], [], [], [], []
        w_blocks = logit_blocks(*reference, temperature, block) if reference else None
        scratch = torch.empty(len(hidden) * width, device=hidden.device)  # new ones would fragment the heap
        for columns, z in logit_blocks(hidden, Head(weight, scale, cap), temperature, block):
            y, inside = columns_of(ids, columns)
            z_y = torch.where(inside, z.gather(1, y), z_y)
            if reference:
                w = next(w_blocks)[1]
                m, _, total = exponentials(w, scratch)
                largest_w.append(m)
                sums_w.append(total)
            m, e, total = exponentials(z, scratch)
            largest.append(m)
            sums.append(total)
            if reference:
                means_difference.append(w.neg_().add_(z).mul_(e).sum(1, keepdim=True) / total)
            if with_entropy:
                means_z.append(z.mul_(e).sum(1, keepdim=True) / total)
        top, total, shares = joined(largest, sums)
        entropy = kl = shift = None
        if with_entropy:
            entropy = (top + total.log())[:, 0] - (shares * torch.cat(means_z, 1)).sum(1)
            ctx.mark_non_differentiable(entropy)
        if reference:
            top_w, total_w, _ = joined(largest_w, sums_w)
            shift = top_w - top + (total_w / total).log()  # log Σe^w − log Σe^z
            kl = (shares * torch.cat(means_difference, 1)).sum(1) + shift[:, 0]
        ctx.settings = scale, cap, temperature, block, reference
        ctx.save_for_backward(hidden, weight, ids, top, total, shift, kl)
        return (z_y - top - total.log())[:, 0], entropy, kl

    @staticmethod
    def backward(ctx, grad_log_prob, _, grad_kl):
        hidden, weight, ids, top, total, shift, kl = ctx.saved_tensors
        scale, cap, temperature, block, reference = ctx.settings
        grad_log_prob = (grad_log_prob * (scale / temperature)).unsqueeze(-1)
        if reference:
            grad_kl = (grad_kl * (scale / temperature)).unsqueeze(-1) / total
            shift = shift - kl.unsqueeze(-1)
            w_blocks = logit_blocks(*reference, temperature, block)
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        product = torch.empty_like(hidden)
        grad_weight = torch.empty_like(weight, dtype=hidden.dtype) if ctx.needs_input_grad[1] else None
        for columns, z in logit_blocks(hidden, Head(weight, scale, cap), temperature, block):
            slope = None if cap is None else 1 - (z * (temperature / cap)).square_()  # of cap·tanh(·/cap)
            if reference:
                difference = next(w_blocks)[1].neg_().add_(z).add_(shift)  # log p − log q − KL
                dz = difference.mul_(grad_kl).sub_(grad_log_prob / total).mul_(z.sub_(top).exp_())
            else:
                dz = z.sub_(top).exp_().mul_(-grad_log_prob / total)
            y, inside = columns_of(ids, columns)
            dz.scatter_add_(1, y, torch.where(inside, grad_log_prob, 0.0))
            if slope is not None:
                dz.mul_(slope)
            dz = dz.to(hidden.dtype)
            grad_hidden += torch.mm(dz, weight[columns].to(hidden.dtype), out=product)
            if grad_weight is not None:
                torch.mm(dz.T, hidden, out=grad_weight[columns])
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_hidden.to(hidden.dtype), grad_weight, *[None] * 7


# --------------------------------------------------------------------------------------------------------- sampling

def uniform_noise(seed: int, problems: Tensor, samples: Tensor, steps: int) -> Tensor:
    """Uniform numbers in [0, 1) [R, steps] that belong to each row's (problem, sample): a hash of seed, pair and step.

    The hash is splitmix64 (Steele, Lea & Flood 2014), in 64-bit integers that wrap round, alike on every device.
    """
    def shifted(x: Tensor, bits: int) -> Tensor:
        return (x >> bits) & ((1 << 64 - bits) - 1)  # a logical shift: >> copies the sign

    def mixed(x: Tensor) -> Tensor:
        x = (x ^ shifted(x, 30)) * -0x40A7B892E31B1A47
        x = (x ^ shifted(x, 27)) * -0x6B2FB644ECCEEE15
        return x ^ shifted(x, 31)

    stream = mixed(mixed(mixed(torch.full_like(problems, seed)) + problems) + samples)
    numbers = mixed(stream[:, None] + torch.arange(1, steps + 1, device=stream.device) * -0x61C8864680B583EB)
    return shifted(numbers, 40).float() * 2.0 ** -24


def choose(logits: Tensor, temperature: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """(token, its log-prob) [R] each, sampled from logits [R, V]: where the running sum of π passes `uniform` [R]."""
    probs = (logits.float() / temperature).softmax(-1)
    sums = probs.cumsum(-1)
    total = sums[:, -1:]
    # Strictly below the total, so that no rounding leads to a token of probability 0 behind the last possible one.
    threshold = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    token = torch.searchsorted(sums, threshold, right=True)
    return token[:, 0], probs.gather(1, token)[:, 0].log()


# --------------------------------------------------------------------------------------------------------- averages

def masked_mean(values: Tensor, mask: Tensor, denominator: Tensor | float | None = None) -> Tensor:
    """Σ values·mask / denominator []; the denominator is the mask's own sum unless given.

    Give the whole batch's token count when the batch is split into micro-batches: then their gradients add up to the
    gradient of the whole, however it was split. A mask of zeros gives 0, not NaN.
    """
    if denominator is None:
        denominator = mask.sum()
    denominator = torch.as_tensor(denominator, device=values.device).clamp(min=1)
    return torch.where(mask.bool(), values, 0.0).sum() / denominator


# ------------------------------------------------------------------------------------- surrogates, each to be maximised

def importance_surrogate(ratio: Tensor, advantage: Tensor) -> Tensor:
    """ρ·A: the policy gradient, corrected for data that another policy sampled. No trust region at all."""
    return ratio * advantage


def clipped_surrogate(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """min(ρ·A, clip(ρ, 1 − ε_low, 1 + ε_high)·A) (PPO, 1707.06347; separate bounds as in DAPO, 2503.14476).

    The gradient stops where the ratio has already moved past its bound in the direction that A asks for. The other two
    sides stay open: with A < 0 and ρ > 1 + ε_high the term is unbounded below.
    """
    return torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def soft_gate_surrogate(ratio: Tensor, advantage: Tensor, tau_right: float = 1.0, tau_wrong: float = 1.05) -> Tensor:
    """f(ρ)·A with f(ρ) = (4/τ)·σ(τ(ρ − 1)) (SAPO, 2511.20347); τ = tau_right where A > 0, else tau_wrong.

    f′(1) = 1, as for ρ·A; away from 1 the gate closes smoothly and never quite: it is the weak constraint that lets
    the explorer drift.
    """
    tau = torch.where(advantage > 0, tau_right, tau_wrong)
    return 4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantage


# ----------------------------------------------------------------------------------------------------- the KL budget

def dual_ascent(multiplier: float, kl: float, budget: float, rate: float, gain: float = 1.0,
                bound: float = 1e3) -> tuple[float, float]:
    """One step on the dual of max J s.t. KL ≤ budget: (multiplier, the KL coefficient λ to use in the next update).

        log multiplier += rate·e        λ = multiplier·exp(gain·e)        e = kl/budget − 1, bounded to [−1, 1]

    The multiplier integrates what is over- or underspent. It answers late, since the policy takes many updates to
    follow, and alone it swings; the second factor answers at once and damps that (a PI controller on the Lagrangian,
    as in 2007.03964).
    """
    overspent = min(max(kl / budget - 1, -1.0), 1.0)
    multiplier = min(max(multiplier * math.exp(rate * overspent), 1 / bound), bound)
    return multiplier, multiplier * math.exp(gain * overspent)


def largest_step_within(measure: Callable[[float], float], budget: float, trials: int = 6) -> tuple[float, float]:
    """The largest step α ∈ (0, 1] along π_0 → π_θ whose measured KL keeps to the budget, and that KL: (α, KL(α)).

    Backtracking line search: the full step first; while that overspends, a quadratic's guess; then the bracket is halved
    until at least 95 % of the budget is used, or `trials` measurements are spent. (0, 0) if none kept to the budget.
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
        for b, start in zip(between.parameters(), base.parameters()):
            b.copy_(start + alpha * (b - start))
    return between


def least_kl(pass_rates: Tensor, points: int = 200) -> tuple[list[float], list[float]]:
    """The limit: (accuracies, KL): no policy has mean accuracy a for less KL(π‖π_0), in nats a completion.

    A policy that is right with probability q_x on problem x, where π_0 is with p_x [P], moved by at least the divergence
    of those two coins. Its least mean for a given mean accuracy tilts every problem alike: q_x = p_x·e^λ/(1 − p_x + p_x·e^λ).
    """
    p = pass_rates.double()
    tilt = torch.linspace(0, 12, points, dtype=torch.float64, device=p.device).exp()[:, None]
    q = p * tilt / (1 - p + p * tilt)
    divergence = sum(torch.special.xlogy(a, a) - torch.special.xlogy(a, b) for a, b in ((q, p), (1 - q, 1 - p)))
    return q.mean(1).tolist(), divergence.mean(1).tolist()
