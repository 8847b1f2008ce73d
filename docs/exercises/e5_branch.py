"""Exercise 5: which tokens of a branch are trained on.

A branch is a prompt, a prefix and a response, each a list of token ids. The prefix was cut from its parent's response.
The response was sampled after prompt + prefix. A base response has an empty prefix. The verifier reads prefix and
response. The policy gradient is over the tokens that this rollout sampled, and no others. The function returns ids (S,)
int64, the sequence that the model reads, and has_loss (S,) bool, whether a token is one of those.

Source: CURE (arXiv 2508.11016), tags CURE-3 and CURE-4.
Seen in: ms-swift (#10106). nano-aha had the like of it: prompt and padding were in its loss's denominator.
"""

import torch


def training_row(prompt_ids, prefix_ids, response_ids):
    answer = prefix_ids + response_ids
    ids = torch.tensor(prompt_ids + answer)
    position = torch.arange(len(ids))
    has_loss = position >= len(ids) - len(answer)
    return ids, has_loss
