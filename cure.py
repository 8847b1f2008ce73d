"""CURE in two stages, DAPO and the 80/20 rule: one training loop, read it from `train_step` outwards.

    python cure.py --config configs/toy.yaml                            # a laptop CPU, minutes
    torchrun --nproc_per_node 8 cure.py --config configs/….yaml         # one node of GPUs
    python cure.py --config configs/toy.yaml stages.stage1.steps=3 lr=3e-5    # any key, for all stages or one

A step: sample n1 base responses a prompt, branch n2 times off each at a critical token, keep the groups that are neither
all right nor all wrong, and take PPO-clip steps on them. Stage 2, and plain DAPO, is the same with n2 = 0.
Symbols: P prompts · n1, n2, G = n1 (1 + n2) rollouts a prompt · N = P G · T tokens.
"""

import signal
import sys

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from eval import evaluate
from lib import checkpoint, data
from lib.config import load_config
from lib.engine import request_seed
from lib.memory import forward_flops, peak_flops, peak_memory
from lib.policy import packed_length, partition
from lib.ranks import end_group, gather, leave, one_line_errors, timed
from lib.run import prepare_run
from loss import (
    clip_cov_loss,
    clip_cov_tokens,
    entropy_mask,
    group_advantages,
    kl_cov_loss,
    kl_cov_tokens,
    mismatch,
    n_kept,
    policy_loss,
    token_covariance,
    token_weights,
    truncated_importance,
)
from rollout import Rollout, allowed_tokens, collect
from tools import analyze, walkthrough
from tools.plan import print_plan


# ----------------------------------------------------------------------------------------------------------------- training
def train_step(run, cfg, task, stage_step):
    """One training step from prompts to parameters; returns its line of metrics. The engine is awake and fresh before
    and after. Everything decided here is decided on data that all ranks hold."""
    m = {}
    step = run.state["step"]
    with timed(m, "step"):
        rollouts, sampled = collect(cfg, run.engine, run.policy, task, stage_step)
        dropped = sampled.pop("dropped")
        if sampled["train/kept_groups"] < cfg.prompts_per_step:
            run.print(f"  step {step}: only {sampled['train/kept_groups']} of {cfg.prompts_per_step} groups have right and wrong "
                      f"answers after {sampled['train/rounds']} rounds; training on those (max_rounds, on_starved)")  # fmt: skip
        m.update(sampled)
        tokens = m.pop("tokens/step")
        run.state["generated"] += tokens
        plan = prepare(run, cfg, rollouts, m)
        guard(run, cfg, rollouts or dropped, m, step)
        if rollouts:
            with timed(m, "sleep"):
                run.engine.sleep()
            with timed(m, "update_actor"):
                update(run, cfg, rollouts, plan, stage_step, m)
            m.update(utilisation(run, rollouts, m["timing_s/update_actor"]))
            run.refresh(m)
        else:
            m["train/empty_steps"] = 1
    parts = sum(v for k, v in m.items() if k.startswith("timing_s/")) - m["timing_s/step"]
    m["timing_s/other"] = m["timing_s/step"] - parts
    m["perf/throughput"] = tokens / m["timing_s/step"] / run.world  # generated tokens a second and rank
    m["perf/peak_memory_gib"] = max(gather([peak_memory()]))
    run.samples(rollouts or dropped, cfg, step)
    return m


def utilisation(run, rollouts, seconds):
    """Model FLOPs utilisation of the update: 3 forwards (a backward is 2) over the rollouts trained on, whatever is computed
    again, padded or waited for, per second and rank, over the GPU's peak (plan.forward_flops: embeddings do not count)."""
    tokens = sum(len(r.response_ids) for r in rollouts)
    flops = 3 * forward_flops(run.policy.config, [packed_length(r) for r in rollouts], tokens) / seconds / run.world
    out = {"perf/tflops": flops / 1e12, "perf/trained_throughput": tokens / seconds / run.world}
    return out | ({"perf/mfu": flops / peak_flops()} if peak_flops() else {})


def prepare(run, cfg, rollouts, m):
    """Advantages, minibatches, micro-batches, old log-probs -> [minibatch][rank][micro-batch][index into rollouts].

    Kept groups are split as evenly as possible over ceil(kept / prompts_per_minibatch) optimizer steps, so that no leftover
    gets a full step of its own. The old log-probs come from one pass in the update's own micro-batches: the same shapes give
    the same floats, and the first minibatch's ratio is exactly 1.  (CURE-8)"""
    groups = sorted({r.group for r in rollouts})
    if not groups:
        return []
    # a group is base and branch rollouts of one prompt together  (CURE-7)
    advantages = group_advantages(torch.tensor([r.reward for r in rollouts]), torch.tensor([r.group for r in rollouts]))
    for r, a in zip(rollouts, advantages.tolist(), strict=True):
        r.advantage = a
    plan = []
    for part in np.array_split(groups, -(-len(groups) // cfg.prompts_per_minibatch)):
        members = [i for i, r in enumerate(rollouts) if part[0] <= r.group <= part[-1]]
        cut = partition([packed_length(rollouts[i]) for i in members], run.world, cfg.micro_batch_tokens)
        plan.append([[[members[i] for i in mb] for mb in rank] for rank in cut])
    with timed(m, "old_log_prob"):
        if not cfg.reuse_entropy_logp:
            for r in rollouts:
                r.old_logp = None
        mine = [[i for i in mb if rollouts[i].old_logp is None] for mini in plan for mb in mini[run.rank]]
        scored = run.policy.score([[rollouts[i] for i in mb] for mb in mine], cfg.temperature)
        for i, logp, entropy in gather([(i, *s) for i, s in zip(sum(mine, []), scored, strict=True)]):
            rollouts[i].old_logp, rollouts[i].entropy = logp, entropy
    return plan


def guard(run, cfg, rollouts, m, step):
    """Compare engine and trainer on the step's fresh rollouts, before the update: a stale or corrupt engine trains with a
    normal-looking loss. Also logs the entropies, from the same pass. RuntimeError above max_logp_gap."""
    unscored = [i for i, r in enumerate(rollouts) if r.old_logp is None]
    if unscored:  # nothing was kept: score the dropped groups at hand
        mine = unscored[run.rank :: run.world]
        with timed(m, "old_log_prob"):
            scored = run.policy.score_local([rollouts[i] for i in mine], cfg.temperature)
        for i, s in gather(list(zip(mine, scored, strict=True))):
            rollouts[i].old_logp, rollouts[i].entropy = s
    old = torch.from_numpy(np.concatenate([r.old_logp for r in rollouts]))
    gap = mismatch(old, torch.from_numpy(np.concatenate([r.engine_logp for r in rollouts])))
    m.update({f"mismatch/{k}": v for k, v in gap.items()})
    base, branch = ([r.entropy for r in rollouts if (r.parent >= 0) == side] for side in (False, True))
    for key, h in (("actor/entropy", base), ("branch/entropy_branch", branch), ("branch/entropy_all", branch and base + branch)):
        if h:
            m[key] = float(np.concatenate(h).mean())
    limit = cfg.max_logp_gap
    if not limit:
        fp32 = run.policy.dtype == torch.float32
        run.state["first_gap"] = run.state["first_gap"] or gap["mean_abs"]
        # bf16: what this model's rounding makes of a fresh sync, times 3; above 0.3 it is no rounding, on the first step either
        limit = 1e-3 if fp32 else min(0.3, max(0.05, 3 * run.state["first_gap"]))
    if not gap["mean_abs"] <= limit:
        raise RuntimeError(
            f"step {step}: engine and trainer disagree by {gap['mean_abs']:.2g} nats a token (k3 {gap['k3']:.2g}), limit "
            f"{limit:.2g}: no update was made. Was the engine synced after the last update? Same dtype, temperature and "
            "stop tokens on both sides? max_logp_gap sets the limit."
        )


def update(run, cfg, rollouts, plan, stage_step, m):
    """The optimizer steps of one training step, one epoch over the kept rollouts, in order."""
    lr = cfg.lr * min(1.0, stage_step / cfg.warmup) if cfg.warmup else cfg.lr  # stage_step counts from 1: never lr 0
    sums, norms = {"gap": 0.0}, []
    for k, mini in enumerate(plan):
        loss_fn = minibatch_loss(run, cfg, rollouts, mini, (cfg.seed, cfg.name, stage_step, k), sums)
        mine = [[rollouts[i] for i in mb] for mb in mini[run.rank]]
        norm, taken = run.policy.update(mine, loss_fn, cfg.temperature, lr, cfg.grad_clip)
        norms.append(norm)
        if k == 0 and run.policy.dtype == torch.float32 and not cfg.reuse_entropy_logp:
            assert sums["gap"] == 0, f"ratio was not 1 in the first minibatch: |logp - old_logp| is up to {sums['gap']:.3g}"
        m["train/skipped_steps"] = m.get("train/skipped_steps", 0) + run.count_step(taken)
    sums.pop("gap")
    totals = {}
    for part in gather([sums]):
        for k, v in part.items():
            totals[k] = totals.get(k, 0.0) + v
    n = totals.pop("tokens")
    m.update({f"actor/{k}": v / n for k, v in totals.items()})
    m.update({"actor/grad_norm": float(np.mean(norms)), "actor/lr": lr, "actor/minibatches": len(plan)})


def minibatch_loss(run, cfg, rollouts, mini, seed, sums):
    """The loss of one minibatch as a function of one of its micro-batches: loss_fn(rollouts, logp, entropy) -> scalar.

    All denominators are totals of the minibatch over all ranks, known here, before any forward: summing the scalars over
    micro-batches and ranks gives the loss, however it was cut. `sums` collects per-token sums for the log. A collective, for
    choose_by_covariance."""
    rho, lengths = cfg.entropy_mask_rho, [len(rollouts[i].response_ids) for rank in mini for mb in rank for i in mb]
    n_tokens, n_sequences = sum(lengths), len(lengths)
    keeps, kept_total = minibatch_mask(cfg, rollouts, mini, seed) if rho < 1 else ({}, n_tokens)
    chosen = {} if cfg.loss_mode == "ppo" else choose_by_covariance(run, cfg, rollouts, mini, seed)

    def loss_fn(rows, logp, entropy):
        """A micro-batch's share of the minibatch's loss, a scalar. rows: its rollouts; logp, entropy (R,): of all their response
        tokens, in this order, by the current policy, nats."""
        def cat(arrays):
            return torch.from_numpy(np.concatenate([np.empty(0, np.float32), *arrays])).to(logp.device)

        length = torch.tensor([len(r.response_ids) for r in rows], dtype=torch.long, device=logp.device)  # (n,)
        old = cat([r.old_logp for r in rows])  # (T,)
        advantage = torch.tensor([r.advantage for r in rows], device=logp.device).repeat_interleave(length)
        if chosen:
            picked, cov = (cat([chosen[id(r)][j] for r in rows]) for j in (0, 1))
            add("cov", cov)
            add("cov_share", picked)
        if cfg.loss_mode == "clip_cov":
            loss, flags = clip_cov_loss(logp, old, advantage, picked > 0, cfg.clip_low, cfg.clip_high)
        elif cfg.loss_mode == "kl_cov":
            loss, flags = kl_cov_loss(logp, old, advantage, picked > 0, cfg.kl_cov_coef)
        else:
            loss, flags = policy_loss(logp, old, advantage, cfg.clip_low, cfg.clip_high, cfg.clip_dual)
        if cfg.tis_cap:
            weight = truncated_importance(old, cat([r.engine_logp for r in rows]), cfg.tis_cap)
            loss = loss * weight
            add("tis_weight", weight)
        if cfg.entropy_coef:  # entropy bonus (A3C, arXiv 1602.01783): H is differentiated, and averaged as the loss is  (ENT-1)
            loss = loss - cfg.entropy_coef * entropy
        counts = length
        if rho < 1:
            if keeps:
                keep = torch.cat([keeps[id(r)] for r in rows]) if rows else torch.empty(0, dtype=torch.bool)
            else:  # exact-k per micro-batch on the current policy's entropies (the official code)
                rng = torch.Generator().manual_seed(request_seed(*seed, run.rank, rows[0].seed if rows else 0))
                keep = entropy_mask(entropy.detach(), rho, cfg.entropy_mask_side, rng)
            keep = keep.to(logp.device)
            loss = loss * keep
            if cfg.entropy_mask_norm == "kept" and rows:
                counts = torch.stack([k.sum() for k in keep.split(length.tolist())])
        loss = (loss * token_weights(counts, length, cfg.agg, kept_total, n_sequences)).sum()

        delta = (logp - old).detach()
        add("tokens", torch.ones_like(delta))
        add("ppo_kl", -delta)
        add("pg_clipfrac", flags["clipped_low"] | flags["clipped_high"])
        add("pg_clipfrac_high", flags["clipped_high"])
        add("pg_clipfrac_lower", flags["clipped_dual"])
        sums["pg_loss"] = sums.get("pg_loss", 0.0) + loss.item() * n_tokens
        sums["gap"] = max(sums["gap"], delta.abs().max().item() if len(delta) else 0.0)
        return loss

    def add(key, values):
        sums[key] = sums.get(key, 0.0) + values.double().sum().item()

    return loss_fn


def minibatch_mask(cfg, rollouts, mini, seed):
    """The 80/20 mask of a minibatch -> ({id(rollout): bool (T,), keep its loss}, tokens to divide the masked loss by).

    Scope mini: exact-k on old-policy entropies over all ranks, so that it does not depend on the cut (8020-2). Scope micro: {},
    each micro-batch chooses in its own forward. Norm all divides by all tokens of the minibatch."""
    rho, members = cfg.entropy_mask_rho, sorted(i for rank in mini for mb in rank for i in mb)
    lengths = {i: len(rollouts[i].response_ids) for i in members}
    n_tokens, keeps = sum(lengths.values()), {}
    if cfg.entropy_mask_scope == "mini":
        h = torch.from_numpy(np.concatenate([rollouts[i].entropy for i in members]))
        keep = entropy_mask(h, rho, cfg.entropy_mask_side, torch.Generator().manual_seed(request_seed(*seed)))
        keeps = {id(rollouts[i]): k for i, k in zip(members, keep.split(list(lengths.values())), strict=True)}
    if cfg.entropy_mask_norm == "all":
        return keeps, n_tokens
    micro = [n_kept(sum(lengths[i] for i in mb), rho) for rank in mini for mb in rank]
    return keeps, n_kept(n_tokens, rho) if keeps else sum(micro)


def choose_by_covariance(run, cfg, rollouts, mini, seed):
    """The tokens of a minibatch that Clip-Cov or KL-Cov touch -> {id(rollout): (chosen, cov)}, two float arrays (T,) each,
    the same on every rank. A collective.

    The covariance is that of the paper: over all tokens of the minibatch, under the policy as it is now. So the log-probs are
    scored once more before the update, in its own micro-batches, which gives the floats of the update's own forward, except
    in the first minibatch (seed ends in 0), where they are the old ones. The official code takes what one micro-batch on
    one rank holds instead: its choice, and at least one token for each, depends on how the minibatch is cut."""
    members = sorted(i for rank in mini for mb in rank for i in mb)
    now = {i: rollouts[i].old_logp for i in members}
    if seed[-1] > 0:
        mine = mini[run.rank]
        scored = run.policy.score([[rollouts[i] for i in mb] for mb in mine], cfg.temperature)
        now = dict(gather([(i, logp) for i, (logp, _) in zip(sum(mine, []), scored, strict=True)]))
    lengths = [len(now[i]) for i in members]
    logp = torch.from_numpy(np.concatenate([now[i] for i in members]))  # (N,)
    old = torch.from_numpy(np.concatenate([rollouts[i].old_logp for i in members]))
    advantage = torch.tensor([rollouts[i].advantage for i in members]).repeat_interleave(torch.tensor(lengths))
    cov = token_covariance(logp, advantage)  # (N,)
    if cfg.loss_mode == "clip_cov":
        _, flags = policy_loss(logp, old, advantage, cfg.clip_low, cfg.clip_high)
        rng = torch.Generator().manual_seed(request_seed(*seed, "clip_cov"))
        clipped = flags["clipped_low"] | flags["clipped_high"]
        chosen = clip_cov_tokens(cov, clipped, cfg.cov_share, cfg.clip_cov_low, cfg.clip_cov_high, rng)
    else:
        chosen = kl_cov_tokens(cov, cfg.cov_share)
    parts = zip(members, chosen.float().split(lengths), cov.split(lengths), strict=True)
    return {id(rollouts[i]): (c.numpy(), x.numpy()) for i, c, x in parts}


def sft_step(run, cfg, task, step):
    """One step of supervised learning on the solutions: loss = -mean log-prob of the solution's tokens and the stop token,
    over the minibatch and all ranks, through the same packed forward. The cold start of 80/20, and the toy's base model."""
    m = {}
    with timed(m, "step"):
        prompts = [task.prompts[i] for i in task.stream.take(cfg.prompts_per_step, exclude=set())]
        encode, eos = task.tokenizer.encode, task.tokenizer.eos_token_id
        # a solution over max_response_tokens is cut, without an end token: the model must not learn to stop there
        rows = [
            Rollout(p.ids, [], (encode(p.solution, add_special_tokens=False) + [eos])[: cfg.max_response_tokens])
            for p in prompts
        ]
        lr = cfg.lr * min(1.0, step / cfg.warmup) if cfg.warmup else cfg.lr
        losses, norms, skipped = [], [], 0
        for part in np.array_split(np.arange(len(rows)), -(-len(rows) // cfg.prompts_per_minibatch)):
            n_tokens = sum(len(rows[i].response_ids) for i in part)
            plan = partition([packed_length(rows[i]) for i in part], run.world, cfg.micro_batch_tokens)[run.rank]
            sums = []

            def loss_fn(_, logp, __, n_tokens=n_tokens, sums=sums):
                sums.append(-logp.sum().item() / n_tokens)
                return -logp.sum() / n_tokens

            norm, taken = run.policy.update([[rows[part[i]] for i in mb] for mb in plan], loss_fn, 1.0, lr, cfg.grad_clip)
            losses.append(sum(gather(sums)))
            norms.append(norm)
            skipped += run.count_step(taken)
    return {**m, "sft/loss": float(np.mean(losses)), "actor/grad_norm": float(np.mean(norms)), "actor/lr": lr,
            "train/skipped_steps": skipped}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ one run's state
# -------------------------------------------------------------------------------------------------------------- the whole run
def setup(argv):
    """Everything that a user can get wrong is refused here, before a file of the run is written. None: dry_run."""
    with one_line_errors():
        stages = load_config(argv, usage=__doc__)
        first = stages[0][1]
        if first.walkthrough and first.kind == "sft":
            raise ValueError(f"walkthrough: shows a step of reinforcement learning, the first stage {first.name} is sft")
        if not first.dry_run:
            run = prepare_run(stages)
            for name, cfg in stages if run.policy else []:
                V = run.policy.config.vocab_size
                run.tasks[name].allowed = allowed_tokens(run.tokenizer, V, cfg.min_token_chars, run.stop_ids)
            return run
        print_plan(stages)


def run_stage(run, name, cfg, bar):
    """All steps of one stage, evaluations and checkpoints between them. Returns False when the run should end early."""
    task, s = run.tasks[name], run.state
    rl = cfg.kind == "rl"
    run.engine.sleep()
    if rl:
        run.refresh()
    if s["stage"] == name:  # resumed inside this stage, or its first run
        epoch, position = s["cursor"]
        task.stream = data.PromptStream(len(task.prompts), f"{cfg.seed}/{name}", epoch, position)
    if s["stage"] != name or s["stage_step"] == 0:
        run.policy.new_optimizer(cfg)
        s.update(stage=name, stage_step=0, stage_done=False, skipped_in_a_row=0)
        first, its = run.stages[0]
        if rl and s["step"] == 0 and cfg.eval_data and (name == first or not its.eval_data):  # else the sft stage ended with one
            run_eval(run, cfg)
    ended = stopped = False
    while s["stage_step"] < cfg.steps and not (ended or stopped):
        if rl and cfg.max_steps and s["step"] >= cfg.max_steps:
            run.print(f"max_steps={cfg.max_steps} is reached; the same command with more goes on from here")
            return False
        s["stage_step"] += 1
        s["step"] += rl
        line = (train_step if rl else sft_step)(run, cfg, task, s["stage_step"])
        run.log(line if rl else {"sft/step": s["stage_step"], **line})
        run.print(describe(run, cfg, line))
        if rl and s["stage_step"] == 1:
            warn_hopeless(run, cfg, line)
        bar.update(1)
        last = s["stage_step"] == cfg.steps
        if cfg.eval_data and (last or cfg.eval_every and s["stage_step"] % cfg.eval_every == 0):
            result = run_eval(run, cfg)
            ended = 0 < cfg.stop_at_accuracy <= result[f"eval/avg@{cfg.eval_n}"]
        stop = torch.tensor(float(run.stop), device=run.device)
        dist.all_reduce(stop)  # a signal reaches one rank or all, at different times: every rank must leave at the same step
        stopped = bool(stop)
        pause = stopped or (rl and s["step"] == cfg.max_steps)
        if last or ended or pause or cfg.save_every and s["stage_step"] % cfg.save_every == 0:
            with timed(run.pending, "save"):
                checkpoint.save(run, cfg, task.stream, final=last or ended)
    if stopped:
        run.print(f"stopped by a signal after step {s['step']}, with a checkpoint; the same command goes on from here")
    return not stopped


def warn_hopeless(run, cfg, m):
    """A run that cannot learn should say so at its first step, not after a night."""
    if (cut := m["response_length/clip_ratio"]) > 0.5:
        run.print(f"WARNING: {cut:.0%} of the responses are cut at max_response_tokens={cfg.max_response_tokens}. "
                  "Raise it, or see in samples.jsonl whether the model ever stops (stop_token_ids, template)")
    if not m["train/mixed_groups"]:
        what = {0: "wrong", 1: "right"}.get(m["train/accuracy"], "right or all wrong")
        run.print(f"WARNING: each of the {m['train/sampled_groups']} groups is all {what}: nothing to learn from. See in "
                  "samples.jsonl whether answers have the form that template asks for and verifier reads; if so, other data, a "
                  "cold start (kind: sft), a larger n1")  # fmt: skip


def run_eval(run, cfg):
    """Evaluate on the held-out prompts with the engine in use, log and print; an sft stage's engine sleeps in between."""
    if cfg.kind == "sft":
        run.refresh()
    result = evaluate(cfg, run.engine, run.policy, run.heldout[cfg.name], run.state["step"], run.regions)
    if cfg.kind == "sft":
        run.engine.sleep()
    run.log(result)
    n = cfg.eval_n
    run.print(
        f"  eval at step {run.state['step']}: avg@{n} {result[f'eval/avg@{n}']:.3f} ± {result['eval/stderr']:.3f} · "
        f"pass@{n} {result.get(f'eval/pass@{n}', float('nan')):.3f} · entropy {result['eval/entropy']:.3f} · "
        f"distinct {result['eval/distinct']:.2f} · length {result['eval/length']:.1f} · {result['timing_s/eval']:.1f} s"
    )
    return result


def describe(run, cfg, m):
    """The readable line of one step."""
    s = run.state
    where = f"{cfg.name} {s['stage_step']}/{cfg.steps}"
    if cfg.kind == "sft":
        return f"{where} · loss {m['sft/loss']:.4f} · grad {m['actor/grad_norm']:.2f} · {m['timing_s/step']:.2f} s"
    branch = ""
    if "branch/accuracy_branch" in m:
        base, new, depth = (m[f"branch/{k}"] for k in ("accuracy_base", "accuracy_branch", "mean_depth"))
        branch = f" (base {base:.3f} branch {new:.3f} depth {depth:.0f})"
    parts = [
        f"{where} · acc {m['train/accuracy']:.3f}{branch}",
        f"H {m['actor/entropy']:.3f}",
        f"len {m['response_length/mean']:.0f}",
        f"kept {m['train/kept_groups']}/{m['train/sampled_groups']}",
        f"grad {m['actor/grad_norm']:.2f}" if "actor/grad_norm" in m else "no group kept, no update",
        f"|Δlogp| {m['mismatch/mean_abs']:.0e}",
        f"{m['timing_s/step']:.1f} s",
    ]
    return " · ".join(parts)


def main(argv):
    """Run all stages of a config, from where the run folder stands."""
    run = setup(argv)
    if run is None:  # dry_run
        return 0
    if run.stages[0][1].walkthrough:
        walkthrough.show(run)
        end_group(run)
        return 0
    if run.finished:
        run.print(f"the run in {run.out} is finished already")
    elif train(run):
        run.print("all stages are done")
    if run.rank == 0:
        run.print(analyze.summary_table(run.out))
        run.print(analyze.ledger(run.out, run.pending))
        if run.state["step"]:
            run.print("pictures: " + ", ".join(map(str, analyze.curves(run.out))))
    end_group(run)
    return 0


def train(run):
    """The stages that are left. A signal ends them after the step at hand -> whether all were done."""

    def finish_step(signum, _):
        if run.stop and signum == signal.SIGINT:  # Ctrl-C twice: at once. SIGTERM may come from launcher and scheduler both
            raise KeyboardInterrupt
        run.stop = True

    for sig in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sig, finish_step)
    for name, cfg in run.stages:
        size = cfg.group_size
        what = f"rows × {cfg.steps} steps of sft" if cfg.kind == "sft" else (
            f"prompts × {size} = {cfg.prompts_per_step * size} rollouts (n1 {cfg.n1}, n2 {cfg.n2}) in "
            f"{cfg.prompts_per_step // cfg.prompts_per_minibatch} minibatches of {cfg.prompts_per_minibatch} × {size} = "
            f"{cfg.prompts_per_minibatch * size} / {run.world} ranks, {cfg.steps} steps")  # fmt: skip
        run.print(f"{name}: {cfg.prompts_per_step} {what}")
    begin = [n for n, _ in run.stages].index(run.state["stage"]) + run.state["stage_done"]
    done = sum(c.steps for _, c in run.stages[:begin]) + (0 if run.state["stage_done"] else run.state["stage_step"])
    total = sum(cfg.steps for _, cfg in run.stages)
    with tqdm(total=total, initial=done, disable=None if run.rank == 0 else True, unit="step") as bar:
        return all(run_stage(run, *stage, bar) for stage in run.stages[begin:])


if __name__ == "__main__":
    leave(main, sys.argv[1:])
