"""CURE in two stages, DAPO and the 80/20 rule: one training loop. Read it from `train_step` outwards.

    python cure.py --config configs/toy.yaml                            # a laptop CPU, minutes
    torchrun --nproc_per_node 8 cure.py --config configs/….yaml         # one node of GPUs
    python cure.py --config configs/toy.yaml stages.stage1.steps=3 lr=3e-5    # any setting, for all stages or one

A step: sample n1 base responses a prompt, branch n2 times off each at a critical token, keep the groups that are
neither all right nor all wrong, and take PPO-clip steps on them. Stage 2, and plain DAPO, is the same with n2 = 0.
Symbols: P prompts · n1, n2, G = n1 (1 + n2) rollouts a prompt · N = P G · T response tokens of a micro-batch.
"""

import signal
import sys
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from eval import evaluate
from lib import checkpoint, data
from lib.config import list_configs, load_config
from lib.engine import gap_limit, request_seed
from lib.method import for_step, load_method
from lib.policy import cut, learning_rate
from lib.ranks import end_group, gather, gather_sums, leave, one_line_errors, timed
from lib.report import (
    announce,
    describe,
    describe_evaluation,
    entropy_metrics,
    performance,
    sampling_metrics,
    warn,
)
from lib.run import prepare_run
from lib.sft import sft_step
from loss import group_advantages, importance_weights, mismatch, n_kept, policy_loss, token_mask, token_weights
from rollout import allowed_tokens, collect, critical_tokens, response_lengths, token_column


# ---------------------------------------------------------------------------------------------------- one training step
def train_step(run, cfg, task):
    """One training step from prompts to parameters -> its line of metrics. The engine is awake and fresh before and
    after. Everything decided here is decided on data that all ranks hold."""
    m, clock, step = {}, {}, run.state["stage_step"]
    with timed(clock, "step"):
        # 1. Sample. n1 base responses a prompt, n2 branches off each, verdicts. Groups that are all right or all wrong
        #    teach nothing, so more prompts are drawn until enough mixed groups are there.
        sampled = collect(cfg, run.engine, run.policy, task, step, clock)
        kept, rows = sampled.kept, sampled.kept or sampled.spare  # spare: something to measure and show all the same
        m |= sampling_metrics(cfg, sampled)

        # 2. Score: log-probs and entropies of these tokens under the policy as it is now, before this step's updates.
        minibatches = cut_minibatches(cfg, rows, run.world)
        with timed(clock, "old_log_prob"):
            score(run, cfg, minibatches, ("old_logp", "entropy", "statistic"), None, task.method.position_statistic)
            if task.method.reference:
                score(run, cfg, minibatches, ("ref_logp",), run.reference)
        m |= entropy_metrics(rows)

        # 3. Compare with the engine that sampled. A stale or corrupt engine trains with a normal-looking loss.
        m |= {f"mismatch/{k}": v for k, v in compare_with_engine(run, cfg, rows).items()}

        if kept:
            # 4. Advantages: how much better is a rollout than the others of its prompt?
            method, settings = for_step(task.method, run.state, cfg, kept)
            m |= settings
            set_advantages(method, kept)

            # 5. Optimizer steps, one a minibatch, while the engine sleeps.
            with timed(clock, "sleep"):
                run.engine.sleep()
            with timed(clock, "update_actor"):
                m |= optimizer_steps(run, cfg, method, minibatches)

            # 6. Sync: the engine wakes with the new weights.
            run.refresh(clock)
        else:
            m["train/empty_steps"] = 1
    run.state["generated"] += (tokens := sum(b.length for b in sampled.briefs))
    run.samples(rows, cfg)
    return m | performance(run, minibatches if kept else [], tokens, clock)


class Minibatch(NamedTuple):
    """The rollouts of one optimizer step and how they are cut, the same on every rank."""

    rows: list  # over all ranks, in data order
    cut: list  # [rank][micro-batch][index into rows]

    def here(self, rank):
        """A rank's micro-batches, lists of rollouts."""
        return [[self.rows[i] for i in micro] for micro in self.cut[rank]]


def cut_minibatches(cfg, rollouts, world):
    """Rollouts -> [Minibatch]. Groups are split as evenly as possible over ceil(groups / prompts_per_minibatch)
    optimizer steps, so that no leftover gets a full step of its own."""
    groups, out = sorted({r.group for r in rollouts}), []
    for part in np.array_split(groups, -(-len(groups) // cfg.prompts_per_minibatch)):
        rows = [r for r in rollouts if part[0] <= r.group <= part[-1]]
        out.append(Minibatch(rows, cut(rows, cfg, world)))
    return out


def score(run, cfg, minibatches, names=("old_logp", "entropy"), model=None, statistic=None):
    """Write log-probs, entropies and the statistic, if any, into these fields of all rollouts, on every rank, under
    `model`, else the policy. A collective.

    One pass, in the update's own micro-batches: the same shapes give the same floats, so the first minibatch's ratio is
    exactly 1 (CURE-8)."""
    mine = [(k, i) for k, mini in enumerate(minibatches) for micro in mini.cut[run.rank] for i in micro]
    micro_batches = [micro for mini in minibatches for micro in mini.here(run.rank)]
    scored = (model or run.policy).score(micro_batches, cfg.temperature, statistic)
    for (k, i), found in gather(list(zip(mine, scored, strict=True))):
        vars(minibatches[k].rows[i]).update(zip(names, found, strict=False))


def compare_with_engine(run, cfg, rollouts):
    """mean |d|, max |d| and k3 between trainer and engine over all tokens at hand, nats (loss.mismatch). RuntimeError
    where the mean is over max_logp_gap, or over what rounding can make of a fresh sync (gap_limit)."""
    gap = mismatch(token_column(rollouts, lambda r: r.old_logp), token_column(rollouts, lambda r: r.engine_logp))
    gaps = run.state.setdefault("gaps", [])  # of the steps before: the first and the last 15
    limit = cfg.max_logp_gap or gap_limit(run.policy.dtype, gaps)
    if not gap["mean_abs"] <= limit:  # a nan is over it, too
        raise RuntimeError(
            f"step {run.state['step']}: engine and trainer disagree by {gap['mean_abs']:.2g} nats a token "
            f"(k3 {gap['k3']:.2g}), limit {limit:.2g}: no update was made. Was the engine synced after the last "
            "update? Same dtype, temperature and stop tokens on both sides? max_logp_gap sets the limit."
        )
    run.state["gaps"] = [*gaps[:1], *gaps[1:][-14:], gap["mean_abs"]]
    return gap


def set_advantages(method, rollouts):
    """Write advantage into the rollouts. Base and branches of a prompt are one group, with one baseline.  (CURE-7)"""
    scores, groups = (torch.tensor([getattr(r, k) for r in rollouts]) for k in ("reward", "group"))
    parents = torch.tensor([r.parent if r.t_star is not None else -1 for r in rollouts])  # a plain resample has none
    for r, advantage in zip(rollouts, method.group_advantages(scores, groups, parents).tolist(), strict=True):
        r.advantage = advantage


def optimizer_steps(run, cfg, method, minibatches):
    """The optimizer steps of one training step, one epoch over the kept rollouts, in order -> metrics. A collective."""
    lr = learning_rate(cfg, run.state["stage_step"])
    sums, norms, skipped = Counter(), [], 0
    for k, mini in enumerate(minibatches):
        loss_fn = minibatch_loss(run, cfg, method, mini, k, sums)
        norm, taken = run.policy.update(mini.here(run.rank), loss_fn, cfg.temperature, lr)
        norms.append(norm)
        skipped += run.count_step(taken)
        moved = sums.pop("moved")
        if k == 0 and run.policy.dtype == torch.float32:
            assert moved == 0, f"ratio was not 1 in the first minibatch: |logp - old_logp| is up to {moved:.3g}"
    totals = gather_sums(sums)
    n = totals.pop("tokens")
    return {f"actor/{k}": v / n for k, v in totals.items()} | {
        "actor/grad_norm": float(np.mean(norms)), "actor/lr": lr, "actor/minibatches": len(minibatches),
        "train/skipped_steps": skipped,
    }  # fmt: skip


def minibatch_loss(run, cfg, method, mini, k, sums):
    """The loss of a step's minibatch number k as a function of one of its micro-batches: loss_fn(rollouts, logp,
    entropy) -> scalar. `sums`, a Counter, collects per-token sums for the log. A collective."""
    seed = (cfg.seed, cfg.name, run.state["stage_step"], k)
    if method.survey_minibatch:
        survey(run, cfg, method, mini, seed, first=k == 0)
    # Totals of the minibatch over all ranks, known before any forward: summing the scalars over micro-batches and ranks
    # gives the loss, however it was cut.
    n_tokens, n_loss_tokens = sum(len(r.response_ids) for r in mini.rows), mask_minibatch(cfg, method, mini, seed)

    def loss_fn(rows, logp, entropy):
        """A micro-batch's share of the loss. logp, entropy (T,): of its response tokens, by the present policy."""
        length = response_lengths(rows, logp.device)  # (n,)
        old = token_column(rows, lambda r: r.old_logp, logp.device)  # (T,)
        advantage = torch.tensor([r.advantage for r in rows], device=logp.device).repeat_interleave(length)
        loss, flags = method.policy_loss(logp, old, advantage, entropy, rows, cfg.clip_low, cfg.clip_high)
        if cfg.importance:
            engine = token_column(rows, lambda r: r.engine_logp, logp.device)
            flags["is_weight"] = importance_weights(old, engine, length, *cfg.importance)
            loss = loss * flags["is_weight"]
        counts = length
        if masked(cfg, method):  # the 80/20 rule
            keep = micro_mask(run, cfg, method, rows, entropy, seed)
            loss = loss * keep
            if cfg.entropy_mask_norm == "kept" and rows:
                counts = torch.stack([part.sum() for part in keep.split(length.tolist())])
        loss = (loss * token_weights(counts, length, cfg.agg, n_loss_tokens, len(mini.rows))).sum()

        delta = (logp - old).detach()
        for key, values in {"tokens": torch.ones_like(delta), "ppo_kl": -delta, **flags}.items():
            sums[key] += values.double().sum().item()
        sums["pg_loss"] += loss.item() * n_tokens
        sums["moved"] = max(sums["moved"], delta.abs().max().item() if len(delta) else 0.0)
        return loss

    return loss_fn


def masked(cfg, method):
    """Whether some tokens lose their loss: the 80/20 rule, or a method that has a mask of its own."""
    return cfg.entropy_mask_rho < 1 or method.token_mask is not token_mask


def mask_minibatch(cfg, method, mini, seed):
    """The 80/20 mask of a minibatch, written to r.mask -> tokens to divide the loss by, over all ranks.

    Scope mini: exact-k on old-policy entropies over all ranks, so that it does not depend on the cut (8020-2). Scope
    micro: each micro-batch chooses in its own forward. Norm all divides by all tokens of the minibatch."""
    lengths = [len(r.response_ids) for r in mini.rows]
    if not masked(cfg, method):
        return sum(lengths)
    if cfg.entropy_mask_scope == "mini":
        h, rng = token_column(mini.rows, lambda r: r.entropy), torch.Generator().manual_seed(request_seed(*seed))
        keep = method.token_mask(h, mini.rows, cfg.entropy_mask_rho, cfg.entropy_mask_side, rng)
        for r, part in zip(mini.rows, keep.split(lengths), strict=True):
            r.mask = part.numpy()
        n = int(keep.sum())
    else:
        micro = [sum(lengths[i] for i in indices) for rank in mini.cut for indices in rank]
        n = sum(n_kept(tokens, cfg.entropy_mask_rho) for tokens in micro)
    return sum(lengths) if cfg.entropy_mask_norm == "all" else n


def micro_mask(run, cfg, method, rows, entropy, seed):
    """bool (T,): which tokens of a micro-batch keep their loss. entropy (T,): the current policy's."""
    if cfg.entropy_mask_scope == "mini":
        return token_column(rows, lambda r: r.mask, entropy.device) > 0
    rng = torch.Generator().manual_seed(request_seed(*seed, run.rank, rows[0].seed if rows else 0))
    keep = method.token_mask(entropy.detach(), rows, cfg.entropy_mask_rho, cfg.entropy_mask_side, rng)
    return keep.to(entropy.device)


def survey(run, cfg, method, mini, seed, first):
    """Call a method's survey_minibatch and hand its numbers to the rollouts. A collective.

    The log-probs are scored once more, in the update's own micro-batches, which gives the floats of the update's own
    forward. In a step's first minibatch they are the old ones."""
    if not first:
        score(run, cfg, [mini], ("logp",))
    old = token_column(mini.rows, lambda r: r.old_logp)  # (N,)
    logp = old if first else token_column(mini.rows, lambda r: r.logp)
    lengths = response_lengths(mini.rows)
    advantage = torch.tensor([r.advantage for r in mini.rows]).repeat_interleave(lengths)
    rng = torch.Generator().manual_seed(request_seed(*seed, "survey"))
    found = method.survey_minibatch(mini.rows, logp, old, advantage, rng, cfg.clip_low, cfg.clip_high)
    for name, values in found.items():
        for r, part in zip(mini.rows, values.split(lengths.tolist()), strict=True):
            r.survey[name] = part.numpy()


HOOKS = {f.__name__: f for f in (critical_tokens, group_advantages, policy_loss, token_mask)}  # and method.OPTIONAL


# ----------------------------------------------------------------------------------------------------------- the stages
def setup(argv, files=True):
    """Command line -> Run. Everything that a user can get wrong is refused here, before a file of the run is written.
    files=False: a run that only looks, and writes nothing."""
    with one_line_errors():
        stages = load_config(argv, usage=__doc__)
        methods = {name: load_method(cfg, HOOKS) for name, cfg in stages}
        run = prepare_run(stages, files=files, reference=any(m.reference for m in methods.values()))
        for name, cfg in stages if not run.finished else []:
            V, task = run.policy.config.vocab_size, run.tasks[name]
            task.allowed = allowed_tokens(run.tokenizer, V, cfg.min_token_chars, run.stop_ids)
            task.method = methods[name]
        return run


def run_stage(run, name, cfg, bar):
    """All steps of one stage, evaluations and checkpoints between them -> False when the run should end early."""
    task, s, rl = run.tasks[name], run.state, cfg.kind == "rl"
    run.engine.sleep()
    if rl:
        run.refresh()
    if s["stage"] == name:  # resumed inside this stage, or its first run
        task.stream = data.PromptStream(len(task.prompts), f"{cfg.seed}/{name}", *s["cursor"])
    if s["stage"] != name or s["stage_step"] == 0:
        run.policy.new_optimizer(cfg)
        s.update(stage=name, stage_step=0, stage_done=False, skipped_in_a_row=0)
        first, its = run.stages[0]
        if rl and s["step"] == 0 and cfg.eval_data and (name == first or not its.eval_data):  # else sft ended with one
            evaluate_heldout(run, cfg)
    while s["stage_step"] < cfg.steps:
        if rl and cfg.max_steps and s["step"] >= cfg.max_steps:
            run.print(f"max_steps={cfg.max_steps} is reached; the same command with more goes on from here")
            return False
        s["stage_step"] += 1
        s["step"] += rl
        line = (train_step if rl else sft_step)(run, cfg, task)
        run.log(line if rl else {"sft/step": s["stage_step"], **line})
        run.print(describe(run, cfg, line))
        if rl:
            warn(run, cfg, line)
        bar.update(1)
        last = s["stage_step"] == cfg.steps
        if cfg.eval_data and (last or cfg.eval_every and s["stage_step"] % cfg.eval_every == 0):
            evaluate_heldout(run, cfg)
        stop = torch.tensor(float(run.stop), device=run.device)
        dist.all_reduce(stop)  # a signal reaches one rank or all, at different times: all must leave at the same step
        due = cfg.save_every and s["stage_step"] % cfg.save_every == 0
        if last or stop or due or (rl and s["step"] == cfg.max_steps):
            with timed(run.pending, "save"):
                checkpoint.save(run, cfg, task.stream, final=last)
        if stop:
            run.print(f"stopped by a signal after step {s['step']}, with a checkpoint; the same command goes on")
            return False
    return True


def evaluate_heldout(run, cfg):
    """Evaluate on the held-out prompts, log and print. An sft stage's engine sleeps in between."""
    if cfg.kind == "sft":
        run.refresh()
    result = evaluate(cfg, run.engine, run.policy, run.heldout[cfg.name], run.state["step"], run.regions)
    if cfg.kind == "sft":
        run.engine.sleep()
    run.log(result)
    run.print(describe_evaluation(run, cfg, result))


def train(run):
    """The stages that are left. A signal ends them after the step at hand -> whether all were done."""

    def finish_step(signum, _):
        if run.stop and signum == signal.SIGINT:  # Ctrl-C twice: at once. SIGTERM may come twice, from two senders
            raise KeyboardInterrupt
        run.stop = True

    for sig in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sig, finish_step)
    announce(run)
    at = [n for n, _ in run.stages].index(run.state["stage"]) + run.state["stage_done"]
    done = sum(c.steps for _, c in run.stages[:at]) + (0 if run.state["stage_done"] else run.state["stage_step"])
    total = sum(cfg.steps for _, cfg in run.stages)
    with tqdm(total=total, initial=done, disable=None if run.rank == 0 else True, unit="step") as bar:
        return all(run_stage(run, *stage, bar) for stage in run.stages[at:])


def main(argv):
    """Run all stages of a config, from where the run folder stands."""
    if not argv:
        print(f"python cure.py --config FILE [key=value …]. The configs here:\n{list_configs()}\n"
              "Start with the toy, minutes on a laptop CPU: python cure.py --config configs/toy.yaml")  # fmt: skip
        return 2
    run = setup(argv)
    if run.finished:
        run.print(f"the run in {run.out} is finished already")
    elif train(run):
        run.print("all stages are done")
    if run.rank == 0:
        from tools import analyze  # the pictures at the end of a run are no part of it

        run.print(analyze.report(run.out, run.pending))
    end_group(run)
    return 0


if __name__ == "__main__":
    leave(main, sys.argv[1:])
