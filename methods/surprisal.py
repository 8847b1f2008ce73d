"""Surprisal: a branch leaves where the sampled token was least likely, not where the model was most uncertain.

FR3E's (arXiv 2507.07017, separate_by_prob) and TreeRL's released code choose so, where their papers speak of entropy.
An engine reports this number anyway. I make the entropy pass all the same: h_star and the log's entropy at t* compare
the two rules, and a way around the pass would be a branch in rollout.py.
"""

import torch

from rollout import valid_positions


def critical_tokens(rollout, allowed):
    """Valid positions, int64, the lowest log-prob of the sampled token first, nats, as the engine sampled it. See
    rollout.critical_tokens."""
    valid = valid_positions(rollout, allowed)
    # stable: of equal log-probs the lower position first
    return valid[torch.argsort(torch.from_numpy(rollout.engine_logp)[valid], stable=True)]
