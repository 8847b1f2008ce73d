"""Dr. GRPO (Z. Liu et al., arXiv 2503.20783): no division by the group's std, none by a response's own length.

    A = s - mean of the group,   L = sum of a response's token losses / max_response_tokens, mean over responses

Dividing by the std favours prompts that are nearly solved or nearly hopeless. Dividing by the length makes long wrong
responses cheap. The clip stays DAPO's.
"""

import torch

from loss import policy_loss as ppo
from rollout import response_lengths

WHOLE_RESPONSES = True


def group_advantages(scores, groups, parents):
    """s - mean over each group, (N,) fp32. See loss.group_advantages."""
    _, g = torch.unique(groups, return_inverse=True)
    s = scores.double()
    return (s - (torch.bincount(g, weights=s) / torch.bincount(g))[g]).float()


def policy_loss(logp, old_logp, advantage, entropy, rows, clip_low, clip_high, *, max_response_tokens):
    """loss.policy_loss times length / max_response_tokens: agg=sequence then divides by the length."""
    loss, flags = ppo(logp, old_logp, advantage, entropy, rows, clip_low, clip_high)
    lengths = response_lengths(rows, logp.device)
    return loss * lengths.repeat_interleave(lengths) / max_response_tokens, flags


def check(agg):
    """ValueError names the setting."""
    if agg != "sequence":
        raise ValueError(f"agg: dr_grpo's loss is a mean over responses, agg=sequence, got {agg}")
