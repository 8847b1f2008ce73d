"""Exercise 2: the weight of each token's loss in a minibatch.

A minibatch is cut into micro-batches, which are spread over ranks. The loss of each token is multiplied by its weight.
The sum over all tokens, micro-batches and ranks is the minibatch's loss. How the minibatch was cut must not matter.

lengths (n,) are the response tokens of the micro-batch's n rollouts. counts (n,) says how many of them enter the mean.
n_tokens and n_sequences are the totals of counts and of rollouts in the minibatch, over all ranks.
agg="token" is one mean over all tokens. agg="sequence" is the mean of each response, then of the responses.
The function returns the weights (sum(lengths),) fp32.

Source: DAPO (arXiv 2503.14476, eq. 8), GRPO (arXiv 2402.03300, eq. 3) for agg="sequence".
Seen in: open-instruct (#1161), prime-rl (#2562), verl (#5625), TRL (#3231).
"""

import torch


def token_weights(counts, lengths, agg, n_tokens, n_sequences):
    if agg == "token":
        share = len(counts) / n_sequences
        per_row = torch.full_like(counts, share / max(1, int(counts.sum())), dtype=torch.float32)
    else:
        per_row = 1 / (counts.clamp(min=1).float() * n_sequences)
    return per_row.repeat_interleave(lengths)
