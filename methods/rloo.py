"""RLOO (A. Ahmadian et al., arXiv 2402.14740): the baseline of a rollout is the mean of the others of its prompt.

    A_i = s_i - mean_{j != i} s_j = n / (n - 1) (s_i - mean)

No division by the std. The paper updates once a batch, without a ratio: prompts_per_minibatch=prompts_per_step. Its
KL to the reference, 0.03 in the reward, is left out.
"""

from methods.dr_grpo import group_advantages as centred


def group_advantages(scores, groups, parents):
    """(N,) fp32. A group of one has A = 0. See loss.group_advantages."""
    n = (groups[:, None] == groups).sum(1)
    return centred(scores, groups, parents) * n / (n - 1).clamp(min=1)
