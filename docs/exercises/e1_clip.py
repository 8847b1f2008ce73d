"""Exercise 1: the clipped policy loss of each token.

logp, old_logp (T,) are the log-probs of the sampled tokens, in nats, by the present policy and by the one that sampled.
advantage (T,) is A, positive for a good rollout and negative for a bad one. With r = exp(logp - old_logp) the loss of
each token (T,), to be minimised, is

    l = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high));   if A < 0:  l = min(l, -A clip_dual)

Sources: PPO (arXiv 1707.06347, eq. 7), DAPO (arXiv 2503.14476, eq. 8), dual clip (arXiv 1912.09729).
Seen in: rasbt, takuseno/ppo (#3).
"""

import torch


def policy_loss(logp, old_logp, advantage, clip_low=0.2, clip_high=0.28, clip_dual=10.0):
    ratio = (logp - old_logp).clamp(-20, 20).exp()
    pessimistic = torch.minimum(ratio, ratio.clamp(1 - clip_low, 1 + clip_high))
    loss = -advantage * pessimistic
    dual = -advantage * clip_dual
    return torch.where((advantage < 0) & (loss > dual), dual, loss)
