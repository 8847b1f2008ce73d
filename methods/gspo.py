"""GSPO (C. Zheng et al., arXiv 2507.18071): one ratio a response, the geometric mean of its tokens' ratios.

    rho = exp(mean_t log r_t),   L = -min(rho A, clip(rho, 1 - low, 1 + high) A),   mean over responses

level=token (eq. 13) gives a token the ratio sg(rho) pi/sg(pi): the same value, a gradient of its own. Where A is the
same for all tokens of a response, as here, the two gradients are equal. verl has the token form alone. The bounds are
the paper's (section 5.1). They are narrow, because a mean of logs moves little.
"""

import torch

from loss import sequence_sums
from rollout import response_lengths

WHOLE_RESPONSES = True


def policy_loss(logp, old_logp, advantage, entropy, rows, clip_low, clip_high, *,
                low=3e-4, high=4e-4, level="sequence"):  # fmt: skip
    """See loss.policy_loss. clip_low and clip_high are not used."""
    lengths = response_lengths(rows, logp.device)
    mean = sequence_sums(logp - old_logp, lengths) / lengths.repeat_interleave(lengths)
    if level == "token":
        mean = mean.detach() + logp - logp.detach()
    return clipped(mean.clamp(-20, 20).exp(), advantage, low, high)


def clipped(ratio, advantage, low, high):
    """PPO-clip without the dual clip, of any ratio (T,)."""
    plain, cut = -advantage * ratio, -advantage * ratio.clamp(1 - low, 1 + high)
    return torch.maximum(plain, cut), {"pg_clipfrac": cut > plain, "pg_clipfrac_high": (cut > plain) & (advantage > 0)}


def check(low, high, level, agg):
    """ValueError names the setting."""
    if agg != "sequence":
        raise ValueError(f"agg: gspo's loss is a mean over responses, agg=sequence, got {agg}")
    if level not in ("sequence", "token"):
        raise ValueError(f"method_args.level: is sequence or token, got {level!r}")
    if not (0 <= low < 1 and high >= 0):
        raise ValueError(f"method_args.low: low, high are distances from a ratio of 1, got {low}, {high}")
