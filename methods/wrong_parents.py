"""Wrong parents (DEEP-GRPO, arXiv 2602.14169): only a failed response is branched.

A right base response has no critical token here: its n2 "branches" are fresh responses of the prompt, so that groups
stay equal in size. What the paper does otherwise: one branch point a failed response, at the end of a segment of 50
tokens, late ones and those that led to success before more likely; 8 branches, which have a baseline and a loss of
their own. The released scripts run another method; the paper's is behind their `expand_branch_chain`.
"""

import torch

from rollout import critical_tokens as most_uncertain


def critical_tokens(rollout, allowed):
    """CURE's order of a wrong response, nothing of a right one. See rollout.critical_tokens."""
    return torch.empty(0, dtype=torch.long) if rollout.correct else most_uncertain(rollout, allowed)
