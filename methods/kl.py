"""KL to the model that the run began with, in the loss of every token: GRPO's third term (arXiv 2402.03300, eq. 4).

    L = L_ppo + coef (e^-d - 1 + d),   d = logp - ref_logp: the k3 estimate, never negative

coef: 0.04 in GRPO's paper, 0.001 in verl's examples, our default. DAPO and CURE have none. target > 0: coef is steered
so that this mean, before the update, goes there (D. Ziegler et al., arXiv 1909.08593): each step multiplies it by
1 + clip(kl / target - 1, -0.2, 0.2) rollouts / horizon. verl has that for a KL in the reward, with another estimate.
"""

import numpy as np

from loss import policy_loss as ppo
from rollout import token_column

REFERENCE = True


def policy_loss(logp, old_logp, advantage, entropy, rows, clip_low, clip_high, *, coef=0.001):
    """loss.policy_loss + coef k3, k3 itself differentiated, as in GRPO and verl, which caps it at 10."""
    loss, flags = ppo(logp, old_logp, advantage, entropy, rows, clip_low, clip_high)
    d = (logp - token_column(rows, lambda r: r.ref_logp, logp.device)).clamp(-20, 20)
    k3 = (-d).expm1() + d
    return loss + coef * k3, flags | {"ref_kl": k3.detach()}


def step_settings(state, progress, rows, *, coef=0.001, target=0.0, horizon=10000):
    """The coefficient of this step. state: coef."""
    if target > 0:
        d = np.concatenate([r.old_logp - r.ref_logp for r in rows]).astype(np.float64)
        error = float(np.clip((np.expm1(-d) + d).mean() / target - 1, -0.2, 0.2))
        coef = state["coef"] = state.get("coef", coef) * (1 + error * len(rows) / horizon)
    return {"coef": coef}


def check(coef, target, horizon):
    """ValueError names the setting."""
    if target > 0 and not coef:
        raise ValueError("method_args.coef: what is steered by factors cannot start at 0")
    if not (coef >= 0 and target >= 0 and horizon > 0):
        raise ValueError(f"method_args.coef: coef, target >= 0 and horizon > 0, got {coef}, {target}, {horizon}")
