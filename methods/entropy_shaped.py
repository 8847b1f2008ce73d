"""Entropy-shaped advantage (D. Cheng et al., arXiv 2506.14758): a token where the model hesitated gets a bonus.

    A <- A + min(alpha sg(H), |A| / kappa)

H is of the present policy, without a gradient. kappa > 1, so that no sign turns. The bonus is added where A < 0, too:
there it makes the punishment smaller. alpha 0.4 and kappa 2 are the paper's for GRPO.
"""

import torch

from loss import policy_loss as ppo


def policy_loss(logp, old_logp, advantage, entropy, rows, clip_low, clip_high, *, alpha=0.4, kappa=2.0):
    """loss.policy_loss with the shaped advantage."""
    bonus = torch.minimum(alpha * entropy.detach(), advantage.abs() / kappa)
    return ppo(logp, old_logp, advantage + bonus, entropy, rows, clip_low, clip_high)


def check(alpha, kappa):
    """ValueError names the setting."""
    if not alpha >= 0:
        raise ValueError(f"method_args.alpha: must not be negative, got {alpha}")
    if not kappa > 1:
        raise ValueError(f"method_args.kappa: must be over 1, or a bonus could turn the sign of A, got {kappa}")
