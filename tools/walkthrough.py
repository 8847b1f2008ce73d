"""One training step, printed while it is taken. docs/walkthrough.md explains what it prints.

    python -m tools.walkthrough --config configs/toy.yaml [script=mine.py] [key=value …]

It is the step of the script itself: this tool puts a window around the script's own functions and prints what goes in and
what comes out. It computes nothing that the step does not. No file is written.
Symbols as in cure.py and loss.py: P prompts · n1, n2, G = n1 (1 + n2) · N rollouts · T response tokens of a micro-batch.
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
    (stage, cfg), say = run.stages[0], run.print
    run.state.update(stage=stage, stage_step=1, step=1)
    run.engine.sleep()
    run.refresh()
    weights = [w.clone() for _, w in zip(range(1), (w for _, w in run.policy.named_full(torch.float32)))]

    def after_update(m, *_):
        say("\n== 5. optimizer steps, one a minibatch (cure.optimizer_steps, lib/policy.py Policy.update)")
        say(f"{m['actor/minibatches']} steps, lr {m['actor/lr']:g}, mean gradient norm {m['actor/grad_norm']:.4f} (over "
            f"1 it is scaled down), clipped tokens {m['actor/pg_clipfrac']:.4f}")  # fmt: skip
        name, now = next(run.policy.named_full(torch.float32))
        say(f"{name} {tuple(now.shape)}, first numbers {rounded(weights[0][-1, :4], 6)} -> {rounded(now[-1, :4], 6)}, "
            f"the largest change of all {(now - weights[0]).abs().max():.1e}")  # fmt: skip

    window(script, "collect", lambda out, *_: show_samples(run, cfg, out))
    window(script, "cut_minibatches", lambda out, *_: show_cut(say, out))
    window(script, "compare_with_engine", lambda gap, *_: say(
        f"trainer against engine: mean |d| {gap['mean_abs']:.1e}, max |d| {gap['max_abs']:.1e}, k3 {gap['k3']:.1e} nats"))
    window(script, "set_advantages", lambda _, method, rows: show_advantages(say, rows[: cfg.group_size]))
    show_losses(script, run, run.tasks[stage].method)
    window(script, "optimizer_steps", after_update)
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
        say(f"{len(base.candidates)} valid positions{kind}, the first {len(pool)} (position, token, H): " + ", ".join(pool))
        say(f"t* = {b.t_star}: refined prompt {text(b.prompt_ids + b.prefix_ids)!r}, "
            f"{len(b.prompt_ids)} + {len(b.prefix_ids)} ids")  # fmt: skip
    for i, r in enumerate(group):
        kind = "base     " if r.parent < 0 else f"branch of {r.parent} at {'-' if r.t_star is None else r.t_star:>2}"
        if r.parent < 0 or r.parent == b.parent:
            say(f"{i:3} {kind:18} {len(r.response_ids):3} tokens, {r.finish:6} {r.text!r} -> {r.reward:+g}")


def show_cut(say, minibatches):
    say("\n== 2. minibatches and old log-probs (cure.cut_minibatches, cure.score, cure.compare_with_engine)")
    say(f"rollouts in [minibatch][rank][micro-batch]: {[[[len(x) for x in rank] for rank in m.cut] for m in minibatches]}")


def show_advantages(say, group):
    say("\n== 3. advantages (cure.set_advantages, loss.group_advantages)")
    scores = [r.reward for r in group]
    say(f"scores of the group: {[int(s) if s == int(s) else s for s in scores]}")
    for r in sorted({(r.reward, r.advantage) for r in group}, reverse=True):
        say(f"score {r[0]:g} -> advantage {r[1]:.4f}")


def show_losses(script, run, method):
    """Windows on the loss: the first micro-batch of the first and of the last minibatch, from log-probs to one number."""
    make, policy_loss, token_weights, seen = script.minibatch_loss, method.policy_loss, script.token_weights, {}

    def see_loss(logp, old, advantage, entropy, rows, *clips):
        loss, flags = policy_loss(logp, old, advantage, entropy, rows, *clips)
        seen.update(logp=logp, old_logp=old, advantage=advantage, loss=loss, clipped=flags["pg_clipfrac"])
        return loss, flags

    def see_weights(*args):
        seen["weight"] = token_weights(*args)
        return seen["weight"]

    def minibatch_loss(run, cfg, method, mini, k, sums):
        loss_fn, shown = make(run, cfg, method, mini, k, sums), []

        def watched(rows, logp, entropy):
            loss = loss_fn(rows, logp, entropy)
            if not shown and rows:
                shown.append(show_loss(run, k, rows, loss, seen))
            return loss

        return watched if k in (0, run.walk_last) else loss_fn

    def cut_minibatches(*args):
        out = cut(*args)
        run.walk_last = len(out) - 1
        return out

    cut, script.cut_minibatches = script.cut_minibatches, cut_minibatches
    script.minibatch_loss, method.policy_loss, script.token_weights = minibatch_loss, see_loss, see_weights


def show_loss(run, k, rows, loss, seen):
    say = run.print
    if k == 0:
        say("\n== 4. the loss of one micro-batch (policy.pack, loss.policy_loss, loss.token_weights)")
        for key, value in pack(rows, run.device, run.policy.bucket).items():
            tensor = torch.is_tensor(value)
            say(f"{key:13}" + (f"{tuple(value.shape)!s:11}{value.flatten()[:14].tolist()} ..." if tensor else f"{value}"))
    else:
        say(f"and of a micro-batch of minibatch {k}, after {k} optimizer step{'s' * (k > 1)}:")
    for key in ("logp", "old_logp", "advantage", "loss"):
        say(f"{key:13}{tuple(seen[key].shape)!s:11}{rounded(seen[key][:8], 4)} ...")
    ratio, w = (seen["logp"] - seen["old_logp"]).detach().exp(), seen["weight"]
    say(f"ratio        {ratio.min():.4f} to {ratio.max():.4f}, clipped {int(seen['clipped'].sum())} of {len(ratio)} tokens; "
        f"weight of a token {w[0]:.3e} = 1 / {1 / w[0]:.0f}")  # fmt: skip
    say(f"the micro-batch's share of the loss {loss.item():+.6f}")


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
