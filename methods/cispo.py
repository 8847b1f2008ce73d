"""CISPO (MiniMax-M1, arXiv 2506.13585, eq. 4-5): the clipped ratio is a weight, so a clipped token keeps its gradient.

    L = -sg(min(r, ratio_max)) A logp,   sg: no gradient

The paper has a lower bound as well, switched off. It does not print its upper one. ratio_max is our choice: 5.0 is the
absolute bound that TRL recommends, after ScaleRL (arXiv 2510.13786). verl's is relative: 1 + clip_high.
"""


def policy_loss(logp, old_logp, advantage, entropy, rows, clip_low, clip_high, *, ratio_max=5.0):
    """See loss.policy_loss. clip_low and clip_high are not used."""
    ratio = (logp - old_logp).detach().clamp(-20, 20).exp()
    return -ratio.clamp(max=ratio_max) * advantage * logp, {"pg_clipfrac": ratio > ratio_max}


def check(ratio_max):
    """ValueError names the setting."""
    if not ratio_max >= 1:
        raise ValueError(f"method_args.ratio_max: clips what is more likely now, so it is at least 1, got {ratio_max}")
