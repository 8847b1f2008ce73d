"""Prefix sampling (arXiv 2605.05112): branches steer a group towards a pass rate of one half.

Of a group whose base responses mostly fail only the right ones are branched: a head start. Of one that mostly passes
only the wrong ones are: a handicap. At one half all are. The others get fresh responses of the prompt in place of
branches. A replayed prefix has no loss, as in CURE. Where the paper cuts and how it adapts was not found: here it is
CURE's critical token, and "mostly" is over or under one half.
"""

import torch

from rollout import critical_tokens as most_uncertain


def critical_tokens(rollout, allowed):
    """CURE's order of a response that pulls its group towards one half, nothing of the others."""
    pulls = rollout.pass_rate == 0.5 or rollout.correct == (rollout.pass_rate < 0.5)
    return most_uncertain(rollout, allowed) if pulls else torch.empty(0, dtype=torch.long)
