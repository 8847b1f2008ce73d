"""One training step, printed while it is taken: `python cure.py --config configs/toy.yaml walkthrough=true`, docs/walkthrough.md.

The calls are those of cure.train_step in its order (a test holds the two to the same numbers); no file is written.
Symbols as in cure.py and loss.py: P prompts · n1, n2, G = n1 (1 + n2) · N rollouts · T response tokens of a micro-batch."""

import numpy as np
import torch

from lib.policy import pack
from loss import policy_loss, token_weights
from rollout import collect


def show(run):
    """Take the first training step of the first stage and print its tensors; returns its metrics. A collective."""
    from cure import guard, minibatch_loss, prepare, update  # here, since cure.py imports this file

    (stage, cfg), m, say = run.stages[0], {}, run.print
    run.state.update(stage=stage, stage_step=1, step=1)
    run.engine.sleep()
    run.refresh()

    say("\n== 1. sample: base responses, entropies, branches, verdicts (rollout.collect)")
    rollouts, sampled = collect(cfg, run.engine, run.policy, run.tasks[stage], 1)
    dropped, tokens = sampled.pop("dropped"), sampled.pop("tokens/step")
    m.update(sampled)
    say(f"{m['train/sampled_groups']} prompts x G = {cfg.n1} (1 + {cfg.n2}) = {cfg.group_size} rollouts, {tokens} tokens; "
        f"{m['train/mixed_groups']} groups are mixed, {m['train/kept_groups']} are kept: N = {len(rollouts)}")  # fmt: skip
    group = rollouts[: cfg.group_size]
    if group:
        show_group(run, cfg, group)

    say("\n== 2. advantages, minibatches, old log-probs (cure.prepare, cure.guard)")
    plan = prepare(run, cfg, rollouts, m)
    guard(run, cfg, rollouts or dropped, m, 1)
    if not rollouts:
        say("no group has right and wrong answers: nothing to learn from in this step")
        return m
    scores = np.array([r.reward for r in group])
    say(f"scores of the group: {scores.astype(int).tolist() if (scores % 1 == 0).all() else scores.tolist()}")
    say(f"A = (s - mean) / (std + 1e-6), mean {scores.mean():.4f}, std {scores.std(ddof=1):.4f}: {scores.max():g} -> "
        f"{max(r.advantage for r in group):.4f}, {scores.min():g} -> {min(r.advantage for r in group):.4f}")  # fmt: skip
    say(f"rollouts in [minibatch][rank][micro-batch]: {[[[len(mb) for mb in rank] for rank in mini] for mini in plan]}")
    say(f"trainer against engine: mean |d| {m['mismatch/mean_abs']:.1e}, max |d| {m['mismatch/max_abs']:.1e}, "
        f"k3 {m['mismatch/k3']:.1e} nats; mean entropy of the base responses {m['actor/entropy']:.4f}")  # fmt: skip

    say("\n== 3. the loss of one micro-batch (policy.pack, loss.policy_loss, loss.token_weights)")
    rows = [rollouts[i] for i in plan[0][run.rank][0]]
    for key, value in pack(rows, run.device, run.policy.bucket).items():
        tensor = torch.is_tensor(value)
        say(f"{key:13}" + (f"{tuple(value.shape)!s:11}{value.flatten()[:14].tolist()} ..." if tensor else f"{value}"))
    mini = [rollouts[i] for rank in plan[0] for mb in rank for i in mb]
    loss_fn = minibatch_loss(run, cfg, rollouts, plan[0], (cfg.seed, stage, 1, 0), {"gap": 0.0})
    show_loss(run, cfg, rows, mini, loss_fn)
    name, weights = next(run.policy.named_full(torch.float32))
    weights = weights.clone()

    say("\n== 4. optimizer steps, one a minibatch (cure.update, policy.Policy.update)")
    run.engine.sleep()
    update(run, cfg, rollouts, plan, 1, m)
    say(f"{m['actor/minibatches']} steps, lr {m['actor/lr']:g}, mean gradient norm {m['actor/grad_norm']:.4f} (over "
        f"{cfg.grad_clip:g} it is scaled down), clipped tokens {m['actor/pg_clipfrac']:.4f}")  # fmt: skip
    now = next(run.policy.named_full(torch.float32))[1]
    say(f"{name} {tuple(now.shape)}, first numbers {rounded(weights[-1, :4], 6)} -> {rounded(now[-1, :4], 6)}, "
        f"the largest change of all {(now - weights).abs().max():.1e}")  # fmt: skip
    say("the micro-batch of part 3 under the new weights:")
    show_loss(run, cfg, rows, mini, loss_fn)

    say("\n== 5. the engine gets the new weights (Run.refresh)")
    run.refresh(m)
    say(f"{run.policy.n_params} parameters; the next step samples from them")
    return m


def rounded(values, digits):
    return [round(float(v), digits) for v in values]


def show_group(run, cfg, group):
    """One prompt's rollouts, and where the first branch whose verdict is not its parent's left it."""
    say, text = run.print, run.tokenizer.decode
    flips = [b for b in group if b.parent >= 0 and b.correct != group[b.parent].correct]
    b = (flips or group[cfg.n1 :] or group)[0]
    base = group[max(0, b.parent)]
    say(f"prompt {text(base.prompt_ids)!r} = ids ({len(base.prompt_ids)},) {base.prompt_ids}")
    if cfg.n2:
        say(f"base response {b.parent}, ids ({len(base.response_ids)},): {text(base.response_ids)!r}")
    if cfg.n2 and base.entropy is not None:
        say(f"H ({len(base.entropy)},), nats: {rounded(base.entropy, 2)}")
        pool = [f"{t} {text([base.response_ids[t]])!r} {base.entropy[t]:.2f}" for t in base.candidates[:10]]
        kind = " of highest H" if cfg.critical == "entropy" else ""
        say(f"{len(base.candidates)} valid positions{kind}, the first {len(pool)} (position, token, H): " + ", ".join(pool))
        say(f"t* = {b.t_star}: refined prompt {text(b.prompt_ids + b.prefix_ids)!r}, "
            f"{len(b.prompt_ids)} + {len(b.prefix_ids)} ids")  # fmt: skip
    for i, r in enumerate(group):
        kind = "base     " if r.parent < 0 else f"branch of {r.parent} at {r.t_star:2}"
        if r.parent < 0 or r.parent == b.parent:
            say(f"{i:3} {kind:18} {len(r.response_ids):3} tokens, {r.finish:6} {r.text!r} -> {r.reward:+g}")


def show_loss(run, cfg, rows, mini, loss_fn):
    """The micro-batch `rows` of the minibatch `mini` under the present weights, from log-probs to one number."""
    scored = run.policy.score([rows], cfg.temperature)
    logp, entropy = (torch.from_numpy(np.concatenate(x)) for x in zip(*scored, strict=True))  # (T,)
    old = torch.from_numpy(np.concatenate([r.old_logp for r in rows]))
    length = torch.tensor([len(r.response_ids) for r in rows])  # (n,)
    advantage = torch.tensor([r.advantage for r in rows]).repeat_interleave(length)
    loss, flags = policy_loss(logp, old, advantage, cfg.clip_low, cfg.clip_high, cfg.clip_dual)
    n_tokens = sum(len(r.response_ids) for r in mini)
    w = token_weights(length, length, cfg.agg, n_tokens, len(mini))
    ratio = (logp - old).exp()
    for key, values in (("logp", logp), ("old_logp", old), ("advantage", advantage), ("loss", loss)):
        run.print(f"{key:13}{tuple(values.shape)!s:11}{rounded(values[:8], 4)} ...")
    clipped = int((flags["clipped_low"] | flags["clipped_high"]).sum())
    run.print(f"ratio        {ratio.min():.4f} to {ratio.max():.4f}, clipped {clipped} of {len(ratio)} tokens; "
              f"weight of a token {w[0]:.3e} = 1 / {1 / w[0]:.0f}")  # fmt: skip
    more = {"entropy_mask_rho": cfg.entropy_mask_rho < 1, "entropy_coef": cfg.entropy_coef, "loss_mode": cfg.loss_mode != "ppo",
            "tis_cap": cfg.tis_cap}  # fmt: skip
    more = ", ".join(key for key, on in more.items() if on)
    run.print(f"sum(loss x weight) {(loss * w).sum():+.6f}; the training loop's own number {loss_fn(rows, logp, entropy):+.6f}"
              + (f", with {more}; the lines above are without" if more else ""))  # fmt: skip
