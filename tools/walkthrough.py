"""One training step, printed while it is taken. docs/walkthrough.md explains what it prints.

    python -m tools.walkthrough --config configs/toy.yaml [script=mine.py] [key=value …]

It is the step of the script itself: this tool puts a window around the script's own functions and prints what goes in
and what comes out. It computes nothing that the step does not. No file is written. Symbols as in cure.py and loss.py:
P prompts · n1, n2, G = n1 (1 + n2) · N rollouts · T response tokens of a micro-batch.
"""

import importlib.util
import os
import sys

import torch

from lib.config import load_config
from lib.policy import pack
from lib.ranks import end_group, leave, one_line_errors


def load_script(path):
    """A training script as a module. ValueError: there is none at this path."""
    if not os.path.isfile(path):
        raise ValueError(f"script: no such file: {path}")
    spec = importlib.util.spec_from_file_location("walked", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def window(module, name, show):
    """Let module.name call show(its result, *its arguments) when it returns."""
    inner = getattr(module, name)

    def outer(*args, **kwargs):
        out = inner(*args, **kwargs)
        show(out, *args)
        return out

    setattr(module, name, outer)


def walk(script, run):
    """Take the first training step of the first stage, with windows on its functions -> its metrics. A collective."""
    (stage, cfg), say, seen = run.stages[0], run.print, {}
    run.state.update(stage=stage, stage_step=1, step=1)
    run.engine.sleep()
    run.refresh()
    before = next(run.policy.named_full(torch.float32))[1].clone()
    method = run.tasks[stage].method
    window(script, "collect", lambda out, *_: show_samples(run, cfg, out))
    window(script, "cut_minibatches", lambda out, *_: show_cut(say, out, seen))
    window(script, "compare_with_engine", lambda gap, *_: show_gap(say, gap))
    window(script, "set_advantages", lambda _, method, rows: show_advantages(say, rows[: cfg.group_size]))
    window(method, "policy_loss", lambda out, *args: seen.update(args=args, loss=out[0], flags=out[1]))
    window(script, "token_weights", lambda out, *_: seen.update(weight=out))
    window(script, "optimizer_steps", lambda m, *_: show_update(run, m, before))
    make = script.minibatch_loss

    def minibatch_loss(run, cfg, method, mini, k, sums):
        loss_fn, shown = make(run, cfg, method, mini, k, sums), []

        def watched(rows, logp, entropy):
            share = loss_fn(rows, logp, entropy)
            if not shown and rows:
                shown.append(show_loss(run, k, rows, share, seen))
            return share

        return watched if k in (0, seen["minibatches"] - 1) else loss_fn  # the first and the last

    script.minibatch_loss = minibatch_loss
    m = script.train_step(run, cfg, run.tasks[stage])
    if "train/empty_steps" in m:
        say("no group has right and wrong answers: nothing to learn from in this step")
    else:
        say("\n== 6. the engine has the new weights (lib/run.py Run.refresh)")
        say(f"{run.policy.n_params} parameters; the next step samples from them")
    return m


def rounded(values, digits):
    return [round(v, digits) for v in torch.as_tensor(values).detach().double().tolist()]


def show_samples(run, cfg, sampled):
    """What was sampled, and of one prompt where the first branch whose verdict is not its parent's left it."""
    say, text, tokens = run.print, run.tokenizer.decode, sum(b.length for b in sampled.briefs)
    say("\n== 1. sample: base responses, entropies, branches, verdicts (rollout.collect)")
    say(f"{sampled.prompts} prompts x G = {cfg.n1} (1 + {cfg.n2}) = {cfg.group_size} rollouts, {tokens} tokens; "
        f"{sampled.mixed} groups are mixed, {len(sampled.kept) // cfg.group_size} are kept: N = {len(sampled.kept)}")
    group = sampled.kept[: cfg.group_size]
    if not group:
        return
    flips = [b for b in group if b.parent >= 0 and b.correct != group[b.parent].correct]
    b = (flips or group[cfg.n1 :] or group)[0]
    base = group[max(0, b.parent)]
    say(f"prompt {text(base.prompt_ids)!r} = ids ({len(base.prompt_ids)},) {base.prompt_ids}")
    if cfg.n2:
        say(f"base response {b.parent}, ids ({len(base.response_ids)},): {text(base.response_ids)!r}")
    if base.candidates:
        say(f"H ({len(base.entropy)},), nats: {rounded(base.entropy, 2)}")
        pool = [f"{t} {text([base.response_ids[t]])!r} {base.entropy[t]:.2f}" for t in base.candidates[:10]]
        kind = " of highest H" if cfg.critical == "entropy" else ""
        say(f"{len(base.candidates)} valid positions{kind}, the first {len(pool)} (position, token, H): "
            + ", ".join(pool))  # fmt: skip
        say(f"t* = {b.t_star}: refined prompt {text(b.prompt_ids + b.prefix_ids)!r}, "
            f"{len(b.prompt_ids)} + {len(b.prefix_ids)} ids")  # fmt: skip
    for i, r in enumerate(group):
        kind = "base     " if r.parent < 0 else f"branch of {r.parent} at {'-' if r.t_star is None else r.t_star:>2}"
        if r.parent < 0 or r.parent == b.parent:
            say(f"{i:3} {kind:18} {len(r.response_ids):3} tokens, {r.finish:6} {r.text!r} -> {r.reward:+g}")


def show_cut(say, minibatches, seen):
    seen["minibatches"] = len(minibatches)
    cut = [[[len(micro) for micro in rank] for rank in mini.cut] for mini in minibatches]
    say("\n== 2. minibatches and old log-probs (cure.cut_minibatches, cure.score, cure.compare_with_engine)")
    say(f"rollouts in [minibatch][rank][micro-batch]: {cut}")


def show_gap(say, gap):
    mean, largest, k3 = (f"{gap[key]:.1e}" for key in ("mean_abs", "max_abs", "k3"))
    say(f"trainer against engine: mean |d| {mean}, max |d| {largest}, k3 {k3} nats")


def show_advantages(say, group):
    say("\n== 3. advantages (cure.set_advantages, loss.group_advantages)")
    say(f"scores of the group: {[int(r.reward) if r.reward == int(r.reward) else r.reward for r in group]}")
    for score, advantage in sorted({(r.reward, r.advantage) for r in group}, reverse=True):
        say(f"score {score:g} -> advantage {advantage:.4f}")


def show_loss(run, k, rows, share, seen):
    """One micro-batch of minibatch k, from the packed row to its share of the loss."""
    say, (logp, old, advantage, *_), weight = run.print, seen["args"], seen["weight"]
    if k == 0:
        say("\n== 4. the loss of one micro-batch (policy.pack, loss.policy_loss, loss.token_weights)")
        for key, value in pack(rows, run.device, run.policy.bucket, run.policy.cfg.packing == "broom").items():
            shown = value
            if torch.is_tensor(value):
                shown = f"{tuple(value.shape)!s:11}{value.flatten()[:14].tolist()} ..."
            say(f"{key:13}{shown}")
    else:
        say(f"and of a micro-batch of minibatch {k}, after {k} optimizer step{'s' * (k > 1)}:")
    for key, values in (("logp", logp), ("old_logp", old), ("advantage", advantage), ("loss", seen["loss"])):
        say(f"{key:13}{tuple(values.shape)!s:11}{rounded(values[:8], 4)} ...")
    ratio, clipped = (logp - old).detach().exp(), int(seen["flags"]["pg_clipfrac"].sum())
    say(f"ratio        {ratio.min():.4f} to {ratio.max():.4f}, clipped {clipped} of {len(ratio)} tokens; "
        f"weight of a token {weight[0]:.3e} = 1 / {1 / weight[0]:.0f}")  # fmt: skip
    say(f"the micro-batch's share of the loss {share.item():+.6f}")


def show_update(run, m, before):
    """The step's metrics, and what became of the first parameter."""
    say, (name, now) = run.print, next(run.policy.named_full(torch.float32))
    say("\n== 5. optimizer steps, one a minibatch (cure.optimizer_steps, lib/policy.py Policy.update)")
    say(f"{m['actor/minibatches']} steps, lr {m['actor/lr']:g}, mean gradient norm {m['actor/grad_norm']:.4f} "
        f"(over 1 it is scaled down), clipped tokens {m['actor/pg_clipfrac']:.4f}")  # fmt: skip
    say(f"{name} {tuple(now.shape)}, first numbers {rounded(before[-1, :4], 6)} -> {rounded(now[-1, :4], 6)}, "
        f"the largest change of all {(now - before).abs().max():.1e}")  # fmt: skip


def main(argv):
    """The command. Exit code 2: a setting is wrong."""
    with one_line_errors():
        path = next((a.split("=", 1)[1] for a in argv if a.startswith("script=")), "cure.py")
        script, argv = load_script(path), [a for a in argv if not a.startswith("script=")]
        name, cfg = load_config(argv, usage=__doc__)[0]
        if cfg.kind == "sft":
            raise ValueError(f"kind: the first stage {name} is supervised, the walkthrough shows a step of RL")
        run = script.setup(argv, files=False)
    walk(script, run)
    end_group(run)
    return 0


if __name__ == "__main__":
    leave(main, sys.argv[1:])
