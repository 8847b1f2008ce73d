"""Exercise 4: the advantages of groups of rollouts.

scores (N,) float are the rollouts' rewards. groups (N,) are integers, one for all rollouts of a prompt, in any order.
A = (s - mean) / (std + 1e-6), with mean and std over the rollouts of the same group. std divides by n - 1. A rollout
that has nothing to be compared with has the advantage 0. The function returns A (N,).

Source: GRPO (arXiv 2402.03300), DAPO (arXiv 2503.14476, eq. 9).
Seen in: tiny-grpo, on an empty row. TRL (#4662) had a warning of a std of one sample.
"""

import torch


def group_advantages(scores, groups):
    advantage = torch.zeros_like(scores)
    for g in groups.unique():
        s = scores[groups == g]
        deviation = s - s.mean()
        std = ((deviation**2).sum() / (len(s) - 1)).sqrt()
        advantage[groups == g] = deviation / (std + 1e-6)
    return advantage
