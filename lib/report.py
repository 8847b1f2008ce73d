"""What a run says of a step: the numbers of its log, and the lines that it prints."""

import numpy as np

from lib.broom import skips
from lib.memory import peak_memory, utilisation
from lib.policy import packed_length
from lib.ranks import gather


def sampling_metrics(cfg, sampled):
    """The log's view of all rollouts that a step sampled, whether kept or not."""
    rows = sampled.briefs
    correct, branch = np.array([b.correct for b in rows], float), np.array([b.parent >= 0 for b in rows])
    m = {
        "train/accuracy": correct.mean(),
        "train/kept_groups": min(sampled.mixed, cfg.prompts_per_step),
        "train/mixed_groups": sampled.mixed,
        "train/sampled_groups": sampled.prompts,
        "train/rounds": sampled.rounds,
        "critic/score/mean": np.mean([b.reward for b in rows]),
        "response_length/mean": np.mean([b.length for b in rows]),
        "response_length/max": float(max(b.length for b in rows)),
        "response_length/clip_ratio": np.mean([b.cut for b in rows]),
        **{k: v for k, v in sampled.counts.items() if k.startswith("reward/")},
    }
    forks = [b for b in rows if b.parent >= 0]
    if forks:
        m["branch/depth_sampled"] = np.mean([b.t_star or 0 for b in forks])
        m["branch/fallback_share_sampled"] = np.mean([b.t_star is None for b in forks])
        m["branch/over_budget_share_sampled"] = sampled.counts["over_budget"] / max(1, sampled.counts["candidates"])
        m["branch/accuracy_base_sampled"] = correct[~branch].mean()
        m["branch/accuracy_branch_sampled"] = correct[branch].mean()
        m["branch/flip_rate_sampled"] = np.mean([b.flipped for b in forks])
        if h := [b.h_star for b in forks if b.t_star is not None]:
            m["branch/entropy_at_t_star_sampled"] = np.mean(h)
            m["branch/depth_share_sampled"] = np.nanmean([b.depth for b in forks])
    return {k: float(v) if isinstance(v, np.floating) else v for k, v in m.items()}


def entropy_metrics(rollouts):
    """Token means of the entropy over base, branch and all rollouts at hand: of kept groups, where any was kept."""
    base, branch = ([r.entropy for r in rollouts if (r.parent >= 0) == side] for side in (False, True))
    parts = {"base": base, "branch": branch, "all": branch and base + branch}
    m = {f"entropy/{k}_kept": float(np.concatenate(h).mean()) for k, h in parts.items() if h}
    return m | {"actor/entropy": m["entropy/base_kept"]}  # verl's name


def performance(run, minibatches, tokens, clock):
    """timing_s/* and perf/* of a step. minibatches: those trained on; tokens: generated, over all ranks; clock:
    timing_s/*."""
    m = clock | {"timing_s/other": 2 * clock["timing_s/step"] - sum(clock.values())}  # the step less its phases
    if minibatches:
        micro = [rows for mini in minibatches for rank in range(run.world) for rows in mini.here(rank)]
        lengths = [packed_length(r) for rows in micro for r in rows]
        trained = sum(len(r.response_ids) for rows in micro for r in rows)
        shared = [n for rows in micro for n in skips(rows)] if run.policy.cfg.packing == "broom" else []
        m |= utilisation(run.policy.config, lengths, trained, clock["timing_s/update_actor"], run.world, shared,
                         run.policy.cfg.lora_rank)  # fmt: skip
        m["perf/shared_tokens"] = sum(shared) / sum(lengths)
    m["perf/throughput"] = tokens / clock["timing_s/step"] / run.world  # generated tokens a second and rank
    return m | {"perf/peak_memory_gib": max(gather([peak_memory()]))}


def announce(run):
    """Print what each stage will do, with every batch identity."""
    for name, cfg in run.stages:
        size, per_step, per_mini = cfg.group_size, cfg.prompts_per_step, cfg.prompts_per_minibatch
        what = f"rows × {cfg.steps} steps of sft" if cfg.kind == "sft" else (
            f"prompts × {size} = {per_step * size} rollouts (n1 {cfg.n1}, n2 {cfg.n2}) in {per_step // per_mini} mini"
            f"batches of {per_mini} × {size} = {per_mini * size} / {run.world} ranks, {cfg.steps} steps")  # fmt: skip
        run.print(f"{name}: {per_step} {what}")


def describe(run, cfg, m):
    """The readable line of one step."""
    where = f"{cfg.name} {run.state['stage_step']}/{cfg.steps}"
    if cfg.kind == "sft":
        return f"{where} · loss {m['sft/loss']:.4f} · grad {m['actor/grad_norm']:.2f} · {m['timing_s/step']:.2f} s"
    branch = ""
    if "branch/accuracy_branch_sampled" in m:
        base, new, depth = (m[f"branch/{k}_sampled"] for k in ("accuracy_base", "accuracy_branch", "depth"))
        branch = f" (base {base:.3f} branch {new:.3f} depth {depth:.0f})"
    return " · ".join([
        f"{where} · acc {m['train/accuracy']:.3f}{branch}",
        f"H {m['actor/entropy']:.3f}",
        f"len {m['response_length/mean']:.0f}",
        f"kept {m['train/kept_groups']}/{m['train/sampled_groups']}",
        f"grad {m['actor/grad_norm']:.2f}" if "actor/grad_norm" in m else "no group kept, no update",
        f"|Δlogp| {m['mismatch/mean_abs']:.0e}",
        f"{m['timing_s/step']:.1f} s",
    ])  # fmt: skip


def describe_evaluation(run, cfg, m):
    """The readable line of one evaluation."""
    n = cfg.eval_n
    return (f"  eval at step {run.state['step']}: avg@{n} {m[f'eval/avg@{n}']:.3f} ± {m['eval/stderr']:.3f} · "
            f"pass@{n} {m[f'eval/pass@{n}']:.3f} · entropy {m['eval/entropy']:.3f} · distinct {m['eval/distinct']:.2f} "
            f"· length {m['eval/length']:.1f} · {m['timing_s/eval']:.1f} s")  # fmt: skip


def warn(run, cfg, m):
    """A step that found too little says so. A run that cannot learn says so at its first step, not after a night."""
    kept, sampled = m["train/kept_groups"], m["train/sampled_groups"]
    if kept < cfg.prompts_per_step:
        run.print(f"  step {run.state['step']}: only {kept} of {cfg.prompts_per_step} groups have right and wrong "
                  f"answers after {m['train/rounds']} rounds; training on those (max_rounds, on_starved)")  # fmt: skip
    if run.state["stage_step"] == 1 and (cut := m["response_length/clip_ratio"]) > 0.5:
        run.print(f"WARNING: {cut:.0%} of the responses are cut at max_response_tokens={cfg.max_response_tokens}. "
                  "Raise it, or see in samples.jsonl whether the model ever stops (stop_token_ids, template)")
    if run.state["stage_step"] == 1 and not m["train/mixed_groups"]:
        what = {0: "wrong", 1: "right"}.get(m["train/accuracy"], "right or all wrong")
        run.print(f"WARNING: each of the {sampled} groups is all {what}: nothing to learn from. See in samples.jsonl "
                  "whether answers have the form that template asks for and verifier reads. If so: other data, a cold "
                  "start (kind: sft), a larger n1")  # fmt: skip
