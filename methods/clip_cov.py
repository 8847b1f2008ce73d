"""Clip-Cov (G. Cui et al., arXiv 2505.22617, eq. 10-12): no loss on a few tokens of large covariance.

cov_t = (logp_t - mean logp) (A_t - mean A). Their mean is the covariance of log-prob and advantage, to which the
entropy that a step costs is proportional, to first order and for a natural gradient (theorem 2). The means are over
the minibatch of all ranks, under the present policy. The authors' code takes what one micro-batch on one rank holds:
there the choice depends on how the minibatch is cut.
"""

import math

import torch

from loss import policy_loss as ppo
from rollout import token_column


def token_covariance(logp, advantage):
    """cov_t of every response token of a minibatch (eq. 10). logp, advantage (N,) -> (N,) fp32, nats, detached.
    (COV-1)"""
    logp, advantage = logp.detach().double(), advantage.double()
    return ((logp - logp.mean()) * (advantage - advantage.mean())).float()


def n_chosen(n, share):
    """How many of n tokens are touched: max(1, int(share n)), the authors' code's number."""
    return max(1, int(share * n))


def choose(cov, clipped, share, low, high, generator):
    """n_chosen tokens, or all where there are fewer, drawn uniformly of those with low < cov < high that the ratio
    clip has not cut off already (eq. 11). cov (N,), clipped bool (N,) -> bool (N,).  (COV-2)

    Every token draws a number and the smallest of the eligible win, so that a covariance which rounding moves over a
    bound changes one choice, where a permutation of the eligible would change all."""
    draw = torch.rand(len(cov), generator=generator, dtype=torch.float64)
    eligible = (cov > low) & (cov < high) & ~clipped
    order = draw.masked_fill(~eligible, math.inf).argsort(stable=True)
    chosen = torch.zeros_like(clipped)
    chosen[order[: n_chosen(len(cov), share)]] = True
    return chosen & eligible


def survey_minibatch(rows, logp, old_logp, advantage, generator, clip_low, clip_high, *,
                     cov_share=2e-4, cov_low=1.0, cov_high=5.0):  # fmt: skip
    """The covariance of each token, and which tokens lose their loss. See lib.method.survey_minibatch."""
    cov = token_covariance(logp, advantage)
    _, flags = ppo(logp, old_logp, advantage, None, rows, clip_low, clip_high)
    return {"cov": cov, "cov_share": choose(cov, flags["pg_clipfrac"], cov_share, cov_low, cov_high, generator)}


def policy_loss(logp, old_logp, advantage, entropy, rows, clip_low, clip_high):
    """PPO-clip without the dual clip, and 0 for the chosen tokens (eq. 12). See loss.policy_loss."""
    loss, flags = ppo(logp, old_logp, advantage, entropy, rows, clip_low, clip_high, clip_dual=math.inf)
    cov, chosen = (token_column(rows, lambda r, k=k: r.survey[k], logp.device) for k in ("cov", "cov_share"))
    return loss.masked_fill(chosen > 0, 0.0), flags | {"cov": cov, "cov_share": chosen}


def check(cov_share, cov_low, cov_high):
    """ValueError names the setting."""
    if not 0 < cov_share <= 1:
        raise ValueError(f"method_args.cov_share: is a share of the tokens, over 0 and at most 1, got {cov_share}")
    if not cov_low < cov_high:
        raise ValueError(f"method_args.cov_low: {cov_low} leaves nothing below cov_high {cov_high}")
