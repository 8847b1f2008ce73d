"""OPEFO (arXiv 2605.11491): tokens whose update raises entropy and those whose update lowers it are brought to balance.

To first order, a gradient step of size eta on a token's logits changes the entropy of its position by

    dH = -eta A [p (log p + H) - sum_v p_v^2 (log p_v + H)],   p: of the sampled token

P is the sum of the positive dH, N that of |dH| over the negative ones. Loss weights are 1 + lambda where dH > 0 and
1 - lambda where dH < 0, with lambda = (N - P) / (N + P), so that both sums become equal. eta cancels. dH is derived
here, from z_v += eta A (1[v sampled] - p_v) and dH/dz_v = -p_v (log p_v + H); the weights are from a summary. It is
strictly on-policy: one minibatch a step.
"""

import torch

from loss import policy_loss as ppo
from rollout import token_column


def position_statistic(logp, entropy, tokens):
    """sum_v p_v^2 (log p_v + H) of each position. logp (C, V), entropy (C,), nats -> (C,)."""
    return (2 * logp).exp_().mul_(logp + entropy[:, None]).nan_to_num_(nan=0.0).sum(-1)  # p = 0: 0 (-inf) is 0


def entropy_change(logp, advantage, entropy, statistic):
    """dH / eta of each token, all (N,)."""
    return -advantage * (logp.exp() * (logp + entropy) - statistic)


def survey_minibatch(rows, logp, old_logp, advantage, generator, clip_low, clip_high):
    """The weight of each token. See lib.method.survey_minibatch."""
    entropy, statistic = (token_column(rows, lambda r, k=k: getattr(r, k)) for k in ("entropy", "statistic"))
    dh = entropy_change(*(x.double() for x in (logp, advantage, entropy, statistic)))
    p, n = dh.clamp(min=0).sum(), (-dh).clamp(min=0).sum()
    weight = (n - p) / (n + p) if n + p > 0 else torch.zeros_like(n)
    return {"balance": (1 + weight * dh.sign()).float()}


def policy_loss(logp, old_logp, advantage, entropy, rows, clip_low, clip_high):
    """loss.policy_loss times the token's weight."""
    loss, flags = ppo(logp, old_logp, advantage, entropy, rows, clip_low, clip_high)
    weight = token_column(rows, lambda r: r.survey["balance"], logp.device)
    return loss * weight, flags | {"balance": weight}


def check(prompts_per_step, prompts_per_minibatch, importance):
    """ValueError names the setting."""
    if importance:
        raise ValueError("importance: its weights would unbalance those of opefo: leave it empty")
    if prompts_per_minibatch != prompts_per_step:
        raise ValueError(f"prompts_per_minibatch: opefo is on-policy, one minibatch a step of {prompts_per_step} "
                         f"prompts, got {prompts_per_minibatch}")  # fmt: skip
