"""EAPO (arXiv 2604.11056, v1): reward and punishment are larger at uncertain tokens, smaller at certain ones.

    h = clip((H - mu) / sigma, -|A| / phi, |A| / phi),   A <- A + alpha sign(A) sg(h)

With alpha < phi no sign turns. mu and sigma over what is not known to us. Our choice: over the response, which is whole
on its rank. The formula, alpha 0.2 and phi 2 are from summaries. Version 2 of the paper is called HAPO and may have
changed it.
"""

from loss import policy_loss as ppo
from loss import sequence_sums
from rollout import response_lengths


def shaped(advantage, entropy, rows, alpha, phi):
    """The advantage of each token, (T,)."""
    lengths = response_lengths(rows, entropy.device)
    n, h = lengths.repeat_interleave(lengths), entropy.detach()
    deviation = h - sequence_sums(h, lengths) / n
    sigma = (sequence_sums(deviation**2, lengths) / n).sqrt()
    limit = advantage.abs() / phi
    z = (deviation / (sigma + 1e-6)).clamp(-limit, limit)
    return advantage + alpha * advantage.sign() * z


def policy_loss(logp, old_logp, advantage, entropy, rows, clip_low, clip_high, *, alpha=0.2, phi=2.0):
    """loss.policy_loss with the shaped advantage."""
    return ppo(logp, old_logp, shaped(advantage, entropy, rows, alpha, phi), entropy, rows, clip_low, clip_high)


def check(alpha, phi):
    """ValueError names the setting."""
    if not 0 <= alpha < phi:
        raise ValueError(f"method_args.alpha: is at least 0 and less than phi, or signs turn, got {alpha} and {phi}")
