"""The configuration: one flat dataclass, YAML files with the differences, key=value on the command line.

    defaults < file < the file's entry for a stage < command line          (`stages.stage1.steps=3` reaches one stage only)

`stages` in a file is a mapping, run in order; each entry is a few overrides. What differs between two entries *is* the method.
"""

import argparse
import difflib
import math
import os
from dataclasses import dataclass, field, fields

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from lib.data import TEMPLATES
from reward import VERIFIERS


@dataclass
class Config:
    """Every setting. The defaults are stage 1 of the CURE reference (Qwen2.5-Math-7B, 8 GPUs)."""

    # what is trained, on what
    model: str = "Qwen/Qwen2.5-Math-7B"  # hub id or HF folder; "toy" makes the toy's base model in toy_dir
    data: str = "BytedTsinghua-SIA/DAPO-Math-17k"  # hub id, .parquet or .jsonl; "toy"
    template: str = "chat"  # chat | dapo | boxed | 8020 | raw: how a question becomes a prompt (data.render)
    system_prompt: str = ""
    stop_token_ids: list[int] = field(default_factory=list)  # [] = eos of tokenizer and generation config
    verifier: str = "dapo"  # dapo | boxed | integer | math_verify (reward.score)
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
    prompts_per_chunk: int = 512  # prompts sampled before kept groups are counted: a full step samples no more; 0 = whole rounds
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
    entropy_coef: float = 0.0  # entropy bonus: - entropy_coef x H of every token in the loss; 0 = off
    loss_mode: str = "ppo"  # ppo | clip_cov (no dual clip) | kl_cov (no clip): arXiv 2505.22617, loss.token_covariance
    cov_share: float = 2e-4  # of a minibatch's tokens, so many are touched, at least one; the paper's KL-Cov on 7B: 2e-3
    clip_cov_low: float = 1.0  # clip_cov: drawn of tokens whose covariance is between these
    clip_cov_high: float = 5.0
    kl_cov_coef: float = 0.1  # kl_cov: of |logp - old logp|; verl's configuration, 1 in the paper and in the code's own default
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
    compile: bool = False  # torch.compile every block, packed inputs padded to a few static shapes (policy.pack)
    engine_rows: int = 256  # torch engine: sequences decoded together
    engine_kv_mib: int = 256  # vllm on CPU: KV cache
    gpu_memory_utilization: float = 0.0  # vllm on CUDA: share of the GPU; 0 = derived (plan.engine_share)
    prefix_caching: bool = True  # vllm
    max_logp_gap: float = 0.0  # stop when mean |logp trainer - engine| exceeds it; 0 = 1e-3 in fp32, 3 x the first gap in bf16
    seed: int = 0
    # evaluation while training
    eval_data: str = ""  # like data, or a benchmark: NAME, NAME:FILE (eval.BENCHMARKS), graded its own way; "" = none
    eval_prompts: int = 0  # the first so many; 0 = all
    eval_n: int = 16  # samples a prompt
    eval_every: int = 0  # steps; 0 = only before the first step and at stage ends
    eval_temperature: float = 1.0
    eval_top_p: float = 1.0
    # the plan: cure.py prints what the run will cost and stops, without GPU, weights or data (plan.py)
    dry_run: bool = False
    plan_gpu: str = "h100"  # h100 | h200 | a100 (80 GB) | l40s | rtx4090
    plan_gpus: int = 8  # of one node
    plan_mean_response: int = 0  # tokens of a response; 0 = 1000, or 40 % of max_response_tokens where that is less
    walkthrough: bool = False  # print the tensors of the first training step and stop; writes nothing (walkthrough.py)
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

    @property
    def group_size(self):
        """G: rollouts of one prompt."""
        return self.n1 * (1 + self.n2)


CHOICES = {
    "template": TEMPLATES, "verifier": VERIFIERS, "kind": ("rl", "sft"),
    "critical": ("entropy", "random", "none"), "clause": ("prefix", "last"), "on_starved": ("train", "raise"),
    "overlong_scope": ("continuation", "total"), "reward_scope": ("response", "continuation"),
    "agg": ("token", "sequence", "micro"), "loss_mode": ("ppo", "clip_cov", "kl_cov"),
    "entropy_mask_side": ("top", "bottom", "random"),
    "entropy_mask_scope": ("mini", "micro"), "entropy_mask_norm": ("kept", "all"), "engine": ("auto", "vllm", "torch"),
    "dtype": ("auto", "float32", "bfloat16"), "plan_gpu": ("h100", "h200", "a100", "l40s", "rtx4090"),
}  # fmt: skip
POSITIVE = ("n1", "max_prompt_tokens", "max_response_tokens", "prompts_per_step", "prompts_per_round", "max_rounds",
            "prompts_per_minibatch", "critical_top_k", "micro_batch_tokens", "head_chunk", "eval_n", "lr", "temperature",
            "engine_rows", "keep_ckpts", "eval_top_p", "plan_gpus", "cov_share")  # fmt: skip
NOT_NEGATIVE = ("n2", "steps", "warmup", "weight_decay", "grad_clip", "clip_low", "clip_high", "overlong_buffer", "tis_cap",
                "eval_prompts", "eval_every", "eval_temperature", "max_steps", "save_every", "samples_per_step", "max_logp_gap",
                "gpu_memory_utilization", "prompts_per_chunk", "plan_mean_response", "entropy_coef", "kl_cov_coef")  # fmt: skip
# keys a resumed run may change: they say how long, how often and where, not what is computed
FREE_KEYS = {"max_steps", "save_every", "keep_ckpts", "keep_hf", "eval_every", "samples_per_step", "resume", "out_dir",
             "dry_run", "walkthrough", "plan_gpu", "plan_gpus", "plan_mean_response"}  # fmt: skip


def free_keys():
    """FREE_KEYS, by the name that it will have."""
    return FREE_KEYS


# keys of the whole run: one model, one engine, one folder for all stages
RUN_KEYS = ("model", "toy_dir", "stop_token_ids", "engine", "dtype", "micro_batch_tokens", "head_chunk",
            "activation_checkpointing", "compile",
            "engine_rows", "engine_kv_mib", "gpu_memory_utilization", "prefix_caching", "seed", "out_dir", "init_from",
            "only_stage", "resume", "max_steps", "dry_run", "walkthrough", "plan_gpu", "plan_gpus")  # fmt: skip


def load_config(argv, usage=None):
    """Command line -> [(stage name, Config)]. Typed merges by OmegaConf; every mistake is one ValueError naming the key."""
    parser = argparse.ArgumentParser(description=usage, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", help="YAML file with the differences from the defaults")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any field of Config, or stages.NAME.key=value")
    args = parser.parse_intermixed_args(argv)
    if bad := [o for o in args.overrides if "=" not in o]:
        raise ValueError(f"{bad[0]!r} is not key=value")
    if args.config and not os.path.isfile(args.config):
        raise ValueError(f"--config: no such file: {args.config}")
    try:
        file = OmegaConf.load(args.config) if args.config else OmegaConf.create()
        if not OmegaConf.is_dict(file):
            raise ValueError(f"--config: {args.config} is not a mapping of keys")
        cli = OmegaConf.from_dotlist([o + "''" if o.endswith("=") else o for o in args.overrides])  # key= means ""
        stages, cli_stages = named_entries(file.pop("stages", None) or {"train": {}}), named_entries(cli.pop("stages", {}))
        if unknown := [s for s in cli_stages if s not in stages]:
            raise ValueError(f"stages.{unknown[0]}: the config has the stages {', '.join(stages)}")
        out = []
        for name, entry in stages.items():
            parts = [file, entry or {}, cli, cli_stages.get(name, {})]
            cfg = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), *parts, {"name": name}))
            cfg.out_dir = cfg.out_dir or "runs/" + (os.path.splitext(os.path.basename(args.config))[0] if args.config else "run")
            check(cfg)
            out.append((name, cfg))
        for key in RUN_KEYS:
            if len({str(getattr(c, key)) for _, c in out}) > 1:
                raise ValueError(f"{key}: is for the whole run, it cannot differ between stages")
    except yaml.YAMLError as e:
        raise ValueError(f"--config: not readable as YAML: {' '.join(str(e).split())}") from e
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


def named_entries(stages):
    """The mapping stage name -> overrides, names as text (YAML reads 8020 as a number)."""
    if not OmegaConf.is_dict(stages) and not isinstance(stages, dict):
        raise ValueError("stages: must be a mapping of stage names to overrides")
    out = {str(k): v or {} for k, v in stages.items()}
    if bad := [k for k, v in out.items() if not (OmegaConf.is_dict(v) or isinstance(v, dict))]:
        raise ValueError(f"stages.{bad[0]}: must be a mapping of keys")
    return out


def check(cfg):
    """Refuse what cannot work before anything is loaded: ValueError, one line, the key first."""
    for key, allowed in CHOICES.items():
        if getattr(cfg, key) not in allowed:
            raise ValueError(f"{key}: must be one of {', '.join(allowed)}, got {getattr(cfg, key)!r} (stage {cfg.name})")
    for key in POSITIVE:
        if not 0 < getattr(cfg, key) < float("inf"):
            raise ValueError(f"{key}: must be positive, got {getattr(cfg, key)} (stage {cfg.name})")
    for key in NOT_NEGATIVE:
        if not 0 <= getattr(cfg, key) < math.inf:
            raise ValueError(f"{key}: must be finite and not negative, got {getattr(cfg, key)} (stage {cfg.name})")
    if cfg.prompts_per_step % cfg.prompts_per_minibatch:
        raise ValueError(
            f"prompts_per_step: {cfg.prompts_per_step} is no multiple of prompts_per_minibatch {cfg.prompts_per_minibatch}"
        )
    if cfg.plan_mean_response > cfg.max_response_tokens:
        raise ValueError(f"plan_mean_response: {cfg.plan_mean_response} is over max_response_tokens {cfg.max_response_tokens}")
    longest = cfg.max_prompt_tokens + cfg.max_response_tokens
    if cfg.micro_batch_tokens < longest:
        raise ValueError(f"micro_batch_tokens: {cfg.micro_batch_tokens} is smaller than one sequence of {longest} tokens")
    if cfg.top_p != 1:
        raise ValueError("top_p: must be 1 in training, log-probs of a cut distribution bias every ratio (eval_top_p is free)")
    if not 0 < cfg.entropy_mask_rho <= 1:
        raise ValueError(f"entropy_mask_rho: must be in (0, 1], got {cfg.entropy_mask_rho}")
    if cfg.entropy_mask_side != "top" and cfg.entropy_mask_rho == 1:
        raise ValueError(f"entropy_mask_side: {cfg.entropy_mask_side} masks nothing at entropy_mask_rho 1: lower that, e.g. 0.2")
    if cfg.loss_mode != "ppo" and cfg.entropy_mask_rho < 1:
        raise ValueError(f"loss_mode: {cfg.loss_mode} and entropy_mask_rho {cfg.entropy_mask_rho} both choose tokens: take one")
    if cfg.cov_share > 1:
        raise ValueError(f"cov_share: is a share of the tokens, at most 1, got {cfg.cov_share}")
    if not cfg.clip_cov_low < cfg.clip_cov_high:
        raise ValueError(f"clip_cov_low: {cfg.clip_cov_low} leaves nothing below clip_cov_high {cfg.clip_cov_high}")
    if cfg.kind == "rl" and cfg.group_size < 2:
        raise ValueError(f"n1, n2: a group of n1 (1 + n2) = {cfg.group_size} rollouts has nothing to compare")
    if cfg.eval_temperature == 0 and cfg.eval_n > 1:
        raise ValueError(f"eval_n: greedy decoding (eval_temperature 0) gives one response, not {cfg.eval_n}")
    if len(cfg.betas) != 2:
        raise ValueError(f"betas: AdamW takes two numbers, got {cfg.betas}")
    if cfg.stop_at_accuracy and not (cfg.eval_data and cfg.eval_every):
        raise ValueError("stop_at_accuracy: needs eval_data and eval_every")
