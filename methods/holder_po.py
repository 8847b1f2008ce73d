"""HolderPO (arXiv 2605.12058): one ratio a response, the power mean of its tokens' ratios, its power annealed.

    rho = (mean_t r_t^p)^(1/p),   p -> 0: the geometric mean, GSPO;   J = min(rho A, clip(rho) A), mean over responses

p goes linearly from 2 to -2: large ratios count most at first, small ones in the end. The authors take 500 rollout
steps for it, here it takes the stage. Their clip is 0.2 on both sides, far wider than GSPO's. Their other variant clips
each token's ratio before the mean; it is not here.
"""

from loss import sequence_sums
from methods.gspo import clipped
from rollout import response_lengths

WHOLE_RESPONSES = True


def log_power_mean(log_ratio, lengths, p):
    """log of the power mean of exp(log_ratio) over each response, at every token of it. log_ratio (T,), lengths (n,).

    log(mean r^p) / p. With |log r| at most 20 and |p| at most 4 no power overflows. Around p = 0, where that is 0 / 0,
    the mean of log r."""
    n = lengths.repeat_interleave(lengths)
    if abs(p) < 1e-3:
        return sequence_sums(log_ratio, lengths) / n
    return (sequence_sums((p * log_ratio).exp(), lengths) / n).log() / p


def policy_loss(logp, old_logp, advantage, entropy, rows, clip_low, clip_high, *, p=2.0, low=0.2, high=0.2):
    """See loss.policy_loss. clip_low and clip_high are not used."""
    lengths = response_lengths(rows, logp.device)
    log_rho = log_power_mean((logp - old_logp).clamp(-20, 20), lengths, p)
    return clipped(log_rho.clamp(-20, 20).exp(), advantage, low, high)


def step_settings(state, progress, rows, *, p=2.0, p_end=-2.0):
    """p of this step, linear in the stage's progress."""
    return {"p": p + (p_end - p) * progress}


def check(p, p_end, low, high, agg):
    """ValueError names the setting."""
    if max(abs(p), abs(p_end)) > 4:
        raise ValueError(f"method_args.p: p and p_end are from -4 to 4, or powers overflow, got {p} and {p_end}")
    if agg != "sequence":
        raise ValueError(f"agg: holder_po's loss is a mean over responses, agg=sequence, got {agg}")
    if not (0 <= low < 1 and high >= 0):
        raise ValueError(f"method_args.low: low, high are distances from a ratio of 1, got {low}, {high}")
