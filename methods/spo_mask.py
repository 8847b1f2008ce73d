"""SPO's probability mask (arXiv 2505.23564): loss only where the sampled token was no foregone conclusion.

A token keeps its loss if its probability was below 0.9 when it was sampled. The mean is over those that are left. This
is the mask of SPO-chain alone, with the group's advantages: its segments, their values and the whitening of advantages
over the tokens that are left are not here.
"""

from rollout import token_column


def token_mask(entropy, rows, rho, side, generator, *, below=0.9):
    """bool (T,), by the probabilities of before the step's first update. See loss.token_mask."""
    return token_column(rows, lambda r: r.old_logp, entropy.device).exp() < below


def check(below, entropy_mask_rho):
    """ValueError names the setting."""
    if entropy_mask_rho != 1:
        raise ValueError(f"entropy_mask_rho: spo_mask has no share of tokens, leave it at 1, got {entropy_mask_rho}")
    if not 0 < below <= 1:
        raise ValueError(f"method_args.below: is a probability over 0, got {below}")
