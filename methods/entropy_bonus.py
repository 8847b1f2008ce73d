"""Entropy bonus (A3C, arXiv 1602.01783): - coef H of every token in the loss, H differentiated, averaged as the loss
is.

In Cui et al. (arXiv 2505.22617, section 4.1) little moved with 0.001, and with 0.01 entropy exploded.
"""

import math

from loss import policy_loss as ppo


def policy_loss(logp, old_logp, advantage, entropy, rows, clip_low, clip_high, *, coef=0.005):
    """loss.policy_loss - coef H, with H (T,) of the present policy, nats.  (ENT-1)"""
    loss, flags = ppo(logp, old_logp, advantage, entropy, rows, clip_low, clip_high)
    return loss - coef * entropy, flags


def check(coef):
    """ValueError names the setting."""
    if not 0 <= coef < math.inf:
        raise ValueError(f"method_args.coef: must be finite and not negative, got {coef}")
