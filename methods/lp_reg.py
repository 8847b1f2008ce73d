"""Lp-Reg (arXiv 2510.03222): unlikely but sensible tokens of wrong responses are kept from dying out.

The proxy is the policy without its noise: tokens with p < kappa max p are taken out, the rest is renormalised. Of the
tokens with A < 0 the `share` of lowest p is looked at. Where the proxy gives such a token more than the policy does, so
where it is no noise, its loss is

    -A r + beta (e^d - 1 - d),   d = log proxy - logp: the k3 estimate of KL(pi || proxy)

As in the authors' code the proxy is the old policy's, r has no clip there, and k3 is at most 10. kappa, share and beta
are those of their scripts. These clip r to 0 … 10 elsewhere: clip_low=1 clip_high=9. Their share is of a micro-batch,
and one token is not enough; here it is of the minibatch, and one is.
"""

import math

import torch

from loss import policy_loss as ppo
from rollout import token_column


def position_statistic(logp, entropy, tokens, *, kappa=0.02):
    """Log-prob of the sampled token under the proxy, -inf where that is noise. (C, V), (C,), (C,) -> (C,)."""
    kept = logp >= logp.max(-1, keepdim=True).values + math.log(kappa)
    proxy = logp.masked_fill(~kept, -math.inf)
    return proxy.gather(-1, tokens[:, None])[:, 0] - proxy.logsumexp(-1)


def survey_minibatch(rows, logp, old_logp, advantage, generator, clip_low, clip_high, *, share=0.01):
    """1 for the max(1, int(share n)) least likely of the n tokens with A < 0, else 0."""
    negative = advantage < 0
    n = int(negative.sum())
    order = logp.masked_fill(~negative, math.inf).argsort(stable=True)
    low = torch.zeros_like(logp)
    low[order[: max(1, int(share * n)) if n else 0]] = 1.0
    return {"low": low}


def policy_loss(logp, old_logp, advantage, entropy, rows, clip_low, clip_high, *, beta=1.0):
    """See loss.policy_loss."""
    loss, flags = ppo(logp, old_logp, advantage, entropy, rows, clip_low, clip_high, clip_dual=math.inf)
    proxy = token_column(rows, lambda r: r.statistic, logp.device)
    saved = (token_column(rows, lambda r: r.survey["low"], logp.device) > 0) & (logp.detach() < proxy)
    d = torch.where(saved, proxy - logp, 0.0).clamp(-20, 20)
    ratio = (logp - old_logp).clamp(-20, 20).exp()
    return torch.where(saved, -advantage * ratio + beta * (d.expm1() - d).clamp(max=10), loss), flags | {"saved": saved}


def check(kappa, share, beta):
    """ValueError names the setting."""
    if not (0 < kappa <= 1 and 0 < share <= 1):
        raise ValueError(f"method_args.kappa: kappa and share are over 0 and at most 1, got {kappa} and {share}")
    if not 0 <= beta < math.inf:
        raise ValueError(f"method_args.beta: must be finite and not negative, got {beta}")
