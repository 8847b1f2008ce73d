"""KL-Cov (G. Cui et al., arXiv 2505.22617, eq. 13-14): no clip, and a penalty on the few tokens of largest covariance.

The covariance is that of methods/clip_cov.py. The authors' configuration has coef 0.1, their paper and their code's
own default 1. Their share of touched tokens is 2e-4, and 2e-3 for the 7B model.
"""

import math

import torch

from loss import policy_loss as ppo
from methods.clip_cov import n_chosen, token_covariance
from rollout import token_column


def choose(cov, share):
    """The n_chosen tokens of largest covariance, of equal ones the first (eq. 13). (N,) -> bool (N,).  (COV-3)"""
    chosen = torch.zeros(len(cov), dtype=torch.bool)
    chosen[cov.argsort(descending=True, stable=True)[: n_chosen(len(cov), share)]] = True
    return chosen


def survey_minibatch(rows, logp, old_logp, advantage, generator, clip_low, clip_high, *, cov_share=2e-4):
    """The covariance of each token, and which tokens pay. See lib.method.survey_minibatch."""
    cov = token_covariance(logp, advantage)
    return {"cov": cov, "cov_share": choose(cov, cov_share)}


def policy_loss(logp, old_logp, advantage, entropy, rows, clip_low, clip_high, *, coef=0.1):
    """-A r without any clip, plus coef |logp - old_logp| for the chosen tokens (eq. 14). See loss.policy_loss.

    The penalty has no gradient where logp = old_logp: in a step's first minibatch it does nothing."""
    loss, flags = ppo(logp, old_logp, advantage, entropy, rows, math.inf, math.inf, clip_dual=math.inf)
    cov, chosen = (token_column(rows, lambda r, k=k: r.survey[k], logp.device) for k in ("cov", "cov_share"))
    return loss + coef * (logp - old_logp).abs() * chosen, flags | {"cov": cov, "cov_share": chosen}


def check(cov_share, coef):
    """ValueError names the setting."""
    if not 0 < cov_share <= 1:
        raise ValueError(f"method_args.cov_share: is a share of the tokens, over 0 and at most 1, got {cov_share}")
    if not 0 <= coef < math.inf:
        raise ValueError(f"method_args.coef: must be finite and not negative, got {coef}")
