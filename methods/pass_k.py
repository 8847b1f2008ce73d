"""Pass@k training (arXiv 2508.10751): the reward of a subset of k rollouts is that of its best, in closed form.

Of a group's N rollouts c are right. rho is the share of all subsets of k with a right one, sigma their std:

    rho = 1 - C(N-c, k) / C(N, k),   sigma = sqrt(rho (1 - rho))
    A right = (1 - rho) / sigma,   A wrong = (1 - rho - C(N-c-1, k-1) / C(N-1, k-1)) / sigma

A wrong rollout is one of k - 1 further ones: its subset fails if they all do. So what is solved often teaches little,
and a group with fewer than k wrong ones nothing. Right is here a score over 0. k = 4 is our choice.
"""

import math

import torch


def group_advantages(scores, groups, parents, *, k=4):
    """(N,) fp32. See loss.group_advantages. AssertionError: a group smaller than k."""
    out = torch.zeros(len(scores))
    for g in groups.unique():
        mine, right = groups == g, scores[groups == g] > 0
        out[mine] = torch.tensor(pass_k_advantages(len(right), int(right.sum()), k))[(~right).long()]
    return out


def pass_k_advantages(n, c, k):
    """(A of a right rollout, A of a wrong one), 0 where all subsets are alike."""
    assert n >= k, f"a group of {n} rollouts has no subset of {k}"
    fails = math.comb(n - c, k) / math.comb(n, k)  # 1 - rho
    sigma = math.sqrt(fails * (1 - fails))
    if not sigma:
        return 0.0, 0.0
    return fails / sigma, (fails - math.comb(n - c - 1, k - 1) / math.comb(n - 1, k - 1)) / sigma


def check(k, n1, n2):
    """ValueError names the setting."""
    if not 1 <= k <= n1 * (1 + n2):
        raise ValueError(f"method_args.k: must be from 1 to the group's n1 (1 + n2) = {n1 * (1 + n2)}, got {k}")
