"""Adaptive entropy bonus: its coefficient rises while the entropy is below a target, and falls while it is above.

    c <- clip(c + delta if H < target else c - delta, 0, most),   L = L_ppo - c H while H < target, else L_ppo

The rule, with its gate, is Skywork-OR1's released code: delta 1e-4, most 0.005, c from 0, target 0.2 nats. Its H is the
mean of -logp. TRL has the same rule with delta 0.005, and the H of the step before. Here H is the token mean of the
entropy of the step's rollouts, before its update. anchored=true measures the target in the H of the stage's first step,
as AER (arXiv 2510.10959) does; 0.4 of it is from a summary. AER's coefficients by a prompt's difficulty are not here:
their formula was not found.
"""

import numpy as np

from methods.entropy_bonus import policy_loss as with_bonus


def policy_loss(logp, old_logp, advantage, entropy, rows, clip_low, clip_high, *, coef=0.0):
    """loss.policy_loss - coef H."""
    return with_bonus(logp, old_logp, advantage, entropy, rows, clip_low, clip_high, coef=coef)


def step_settings(state, progress, rows, *, coef=0.0, target=0.4, anchored=True, delta=1e-4, most=0.005):
    """The coefficient of this step. state: first, the first step's entropy, nats; coef, before the gate."""
    h = float(np.concatenate([r.entropy for r in rows]).mean(dtype=np.float64))
    below = h < target * (state.setdefault("first", h) if anchored else 1.0)
    state["coef"] = min(most, max(0.0, state.get("coef", coef) + (delta if below else -delta)))
    return {"coef": state["coef"] if below else 0.0}


def check(coef, target, delta, most):
    """ValueError names the setting."""
    if not 0 <= coef <= most:
        raise ValueError(f"method_args.coef: starts between 0 and most {most}, got {coef}")
    if not (target > 0 and delta > 0):
        raise ValueError(f"method_args.target: target and delta must be positive, got {target} and {delta}")
