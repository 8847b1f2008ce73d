"""MaxRL (arXiv 2602.02710): the policy gradient of the log of a prompt's pass rate, estimated from its rollouts.

    A = (s - mean) / mean,   s = 1 for right, 0 for wrong

So a hard prompt weighs more than under GRPO: with one right rollout of n that one has A = n - 1. Scores are +-1 here,
so s = (score + 1) / 2, which the overlong penalty lowers; s below 0 is 0, our choice, or the mean could be negative.
"""

import torch


def group_advantages(scores, groups, parents):
    """(N,) fp32, 0 where no rollout of the group is right. See loss.group_advantages."""
    _, g = torch.unique(groups, return_inverse=True)
    s = ((scores.double() + 1) / 2).clamp(0, 1)
    mean = (torch.bincount(g, weights=s) / torch.bincount(g))[g]
    return torch.where(mean > 0, (s - mean) / mean.clamp(min=1e-12), 0.0).float()
