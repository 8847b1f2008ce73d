"""HTPO (arXiv 2605.08283): clipping by a prompt's difficulty, the verdict and a token's entropy, eight groups in all.

Hard: under 0.6 of the group are right. High: the token is among the 20 % of highest entropy of its response.

    right, hard   low    PPO-clip; no loss for the 0.6 % of lowest entropy
                  high   -A r inside the clip. Outside, sign turned: r > 1 + high: (1 + high) A, r < 1 - low: A / r
    wrong         low    PPO-clip
                  high   -A r, but r < 1 - low: (1 - low) A: pulled back where a clip only lets go
    right, easy   low    PPO-clip
                  high   PPO-clip; no loss for the 2 % of highest entropy

This is the authors' code (xcyao00/HTPO), with its numbers and the dual clip at 10 of its training script. In it A / r
lowers what is too low already: it looks like a slip, and is kept. The paper's own equation was not at hand.
"""

import torch

from rollout import response_lengths


def token_groups(rows, entropy, hard_below):
    """bool (T,) each: hard prompt, right response, high entropy, and what is left out."""
    high, dropped = [], []
    for r, h in zip(rows, entropy.detach().split([len(r.response_ids) for r in rows]), strict=True):
        top = h >= h.topk(max(1, int(0.2 * len(h)))).values[-1]
        out = torch.zeros_like(top)
        if r.correct and r.pass_rate < hard_below and len(low := h[~top]):
            out = ~top & (h < low.topk(max(1, int(0.006 * len(low))), largest=False).values[-1])
        elif r.correct and r.pass_rate >= hard_below:
            out = top & (h >= h[top].topk(max(1, int(0.02 * int(top.sum())))).values[-1])
        high.append(top)
        dropped.append(out)
    lengths = response_lengths(rows, entropy.device)
    hard, right = (torch.tensor(x, dtype=torch.bool, device=entropy.device).repeat_interleave(lengths)
                   for x in ([r.pass_rate < hard_below for r in rows], [r.correct for r in rows]))  # fmt: skip
    none = torch.zeros(0, dtype=torch.bool, device=entropy.device)
    return hard, right, torch.cat([none, *high]), torch.cat([none, *dropped])


def policy_loss(logp, old_logp, advantage, entropy, rows, clip_low, clip_high, *, hard_below=0.6):
    """See loss.policy_loss."""
    hard, right, high, dropped = token_groups(rows, entropy, hard_below)
    ratio = (logp - old_logp).clamp(-20, 20).exp()
    plain, cut = -advantage * ratio, -advantage * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.where(high & (hard | ~right), plain, torch.maximum(plain, cut))
    pull = advantage * (logp - logp.detach()).exp()  # its value is A, its gradient that of -A r with the sign turned
    under = high & (ratio < 1 - clip_low)
    loss = torch.where(high & right & hard & (ratio > 1 + clip_high), (1 + clip_high) * pull, loss)
    loss = torch.where(under & right & hard, pull / ratio.detach(), loss)
    loss = torch.where(under & ~right, (1 - clip_low) * pull, loss).masked_fill(dropped, 0.0)
    dual = -advantage * 10.0
    is_dual = (advantage < 0) & (loss > dual)
    return torch.where(is_dual, dual, loss), {"pg_clipfrac": cut > plain, "pg_clipfrac_lower": is_dual}


def check(hard_below):
    """ValueError names the setting."""
    if not 0 < hard_below <= 1:
        raise ValueError(f"method_args.hard_below: is a share of right responses over 0, got {hard_below}")
