"""TreePO's advantage (arXiv 2508.17445): a rollout is compared with all of its prompt, and with its own subtree.

    A = sum_d n_d (s - mean_d) / sum_d n_d / (std of the group + 1e-6)

d runs over a rollout's ancestors that have other descendants: the prompt, with n_d = G, and the base response, with its
branches. mean_d is over the n_d rollouts below d. So 12 branches off 4 responses are no longer judged by one baseline.
Weights by size are the default of the authors' code; equal=true weights all d alike, as their training script does.
Their code divides by no group's std and whitens over all tokens of the batch instead. With ours a group without
branches has GRPO's advantages.
"""

import torch


def group_advantages(scores, groups, parents, *, equal=False):
    """(N,) fp32. See loss.group_advantages."""
    out = torch.zeros(len(scores), dtype=torch.float64)
    for g in groups.unique():
        mine = (groups == g).nonzero()[:, 0]
        s, parent = scores[mine].double(), parents[mine]
        base = torch.cumsum(parent < 0, 0) - 1  # a base response's own index among the group's
        tree = torch.where(parent < 0, base, parent)  # which subtree each rollout is in
        weight = torch.full((len(s),), 1.0 if equal else len(s), dtype=torch.float64)
        total = weight * (s - s.mean())
        for t in tree.unique():
            below = tree == t
            if (n := int(below.sum())) > 1:
                total[below] += (1 if equal else n) * (s[below] - s[below].mean())
                weight[below] += 1 if equal else n
        std = s.std() if len(s) > 1 else torch.zeros(())
        out[mine] = total / weight / (std + 1e-6)
    return out.float()
