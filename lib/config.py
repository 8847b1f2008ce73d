"""The configuration: one flat dataclass, YAML files with the differences, key=value on the command line.

    defaults < file < the file's entry for a stage < command line          (`stages.stage1.steps=3` reaches one stage
    only)

`stages` in a file is a mapping, run in order. Each entry is a few overrides. What differs between two entries *is* the
method.
"""

import argparse
import difflib
import math
import os
from dataclasses import dataclass, field, fields
from glob import glob
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from lib.data import TEMPLATES
from lib.track import OPEN as TRACKERS
from reward import VERIFIERS

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RUN, FREE = "run", "free"  # of the whole run, not of a stage · says how long or where, so a resumed run may change it
IMPORTANCE = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
LIMITS = {
    "> 0": ("must be positive", lambda x: 0 < x < math.inf),
    ">= 0": ("must be finite and not negative", lambda x: 0 <= x < math.inf),
    "(0, 1]": ("must be in (0, 1]", lambda x: 0 < x <= 1),
}


def title(text):
    """The heading that --help prints above the settings that follow."""
    title.of = text


def key(default, meaning, limits=None, *scope):
    """One setting: its default, its meaning with unit, its limits (a key of LIMITS) or choices (a tuple), its scope."""
    metadata = {"title": title.of, "meaning": meaning, "limits": limits, "scope": scope}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: default.copy(), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class Config:
    """Every setting. The defaults are stage 1 of the CURE reference (Qwen2.5-Math-7B, 8 GPUs)."""

    title("what is trained, on what")
    model: str = key("Qwen/Qwen2.5-Math-7B", "hub id or HF folder; toy, countdown: made once in runs/", None, RUN)
    data: str = key("BytedTsinghua-SIA/DAPO-Math-17k", "hub id, .parquet or .jsonl; toy, countdown")
    template: str = key("chat", "how a question becomes a prompt (lib/data.render)", TEMPLATES)
    system_prompt: str = key("", "instead of the data's own")
    chat_args: dict[str, Any] = key({}, "for the chat template, e.g. chat_args.enable_thinking=false")
    stop_token_ids: list[int] = key([], "[] = eos of tokenizer and generation config", None, RUN)
    verifier: str = key("dapo", "what is right (reward.py)", tuple(VERIFIERS))
    title("the stage")
    kind: str = key("rl", "sft: a cold start on the data's solutions", ("rl", "sft"))
    steps: int = key(300, "training steps of the stage; a stage of 0 steps is left out", ">= 0")
    method: list[str] = key([], "files of methods/, or paths to ones like them, whose functions replace the defaults")
    method_args: dict[str, Any] = key({}, "settings of these files: method_args.NAME=VALUE")
    title("sampling and branching (CURE)")
    n1: int = key(4, "base responses a prompt", "> 0")
    n2: int = key(3, "branches a base response; 0: no branching, DAPO with groups of n1", ">= 0")
    critical: str = key("entropy", "how t* is chosen; none: a plain resample", ("entropy", "random", "none"))
    critical_top_k: int = key(20, "t* is drawn from so many valid positions of highest entropy", "> 0")
    min_token_chars: int = key(2, "a critical token has at least so many characters; 1 for character-level tokenizers")
    clause: str = key("prefix", "what of the parent's response a branch starts from", ("prefix", "last"))
    max_prompt_tokens: int = key(1500, "tokens of a prompt, and of prompt + clause", "> 0")
    max_response_tokens: int = key(2596, "tokens of a response, and of a branch's continuation", "> 0")
    temperature: float = key(1.0, "of sampling, and of every log-prob and entropy", "> 0")
    prompts_per_step: int = key(512, "groups kept for one training step", "> 0")
    prompts_per_round: int = key(512, "prompts sampled before kept groups are counted (the reference: 1024)", "> 0")
    prompts_per_minibatch: int = key(32, "groups of one optimizer step", "> 0")
    max_rounds: int = key(20, "sampling rounds of one training step (the reference: 10, of 1024 prompts)", "> 0")
    on_starved: str = key("train", "what to do when max_rounds did not fill the step", ("train", "raise"))
    title("reward")
    overlong_buffer: int = key(512, "so many tokens before the limit the penalty begins to grow to 1; 0 = off", ">= 0")
    reward_scope: str = key("response", "does the verifier see a branch's prefix", ("response", "continuation"))
    title("loss")
    clip_low: float = key(0.2, "the ratio is clipped below 1 - clip_low", ">= 0")
    clip_high: float = key(0.28, "and above 1 + clip_high: DAPO's clip-higher", ">= 0")
    agg: str = key("token", "how token losses become one number (loss.token_weights)", ("token", "sequence", "micro"))
    importance: list[Any] = key([], "[mode, low, high] of weights trainer/engine (loss.importance_weights); [] = off")
    entropy_mask_rho: float = key(1.0, "80/20: loss on this share of the tokens; 1 = all", "(0, 1]")
    entropy_mask_side: str = key("top", "which entropies keep their loss", ("top", "bottom", "random"))
    entropy_mask_scope: str = key("mini", "exact-k of what; micro: the official code", ("mini", "micro"))
    entropy_mask_norm: str = key("kept", "what the masked loss is divided by", ("kept", "all"))
    title("optimizer: AdamW, eps 1e-8, weight decay on all parameters, gradients clipped at norm 1")
    lr: float = key(1e-6, "learning rate", "> 0")
    betas: list[float] = key([0.9, 0.999], "of AdamW")
    weight_decay: float = key(0.1, "of AdamW", ">= 0")
    lora_rank: int = key(0, "train adapters of this rank, not the model itself (lib/lora.py); 0 = off", ">= 0", RUN)
    lora_alpha: float = key(32.0, "their scale is lora_alpha / lora_rank", "> 0", RUN)
    warmup: int = key(10, "training steps; the first one already has lr / warmup", ">= 0")
    title("machine")
    engine: str = key("auto", "auto: vllm where CUDA and vllm are there", ("auto", "vllm", "torch"), RUN)
    dtype: str = key("auto", "of forward and backward; auto: bf16 on CUDA", ("auto", "float32", "bfloat16"), RUN)
    micro_batch_tokens: int = key(16384, "packed tokens of one forward", "> 0", RUN)
    packing: str = key("broom", "broom: what branches share is forwarded once (lib/broom.py)", ("broom", "flat"), RUN)
    activation_checkpointing: bool = key(False, "less memory, one more forward", None, RUN)
    replicate: int = key(1, "copies of the sharded trainer, as one a node (HSDP); divides the ranks", "> 0", RUN, FREE)
    compile: bool = key(False, "torch.compile every block, packed inputs padded to a few shapes", None, RUN)
    engine_tp: int = key(1, "vllm: so many ranks of a node share one engine, each with a part of it", "> 0", RUN, FREE)
    engine_rows: int = key(256, "torch engine: sequences decoded together", "> 0", RUN)
    gpu_memory_utilization: float = key(0.0, "vllm on CUDA: share of the GPU; 0 = what the trainer leaves", ">= 0", RUN)
    max_logp_gap: float = key(0.0, "stop above this mean gap of trainer and engine, nats; 0: engine.gap_limit", ">= 0")
    seed: int = key(0, "of all noise", None, RUN)
    title("evaluation while training")
    eval_data: str = key("", "like data, or a benchmark: NAME, NAME:FILE (lib/data.BENCHMARKS); empty = none")
    eval_prompts: int = key(0, "the first so many; 0 = all", ">= 0")
    eval_n: int = key(16, "samples a prompt", "> 0")
    eval_every: int = key(0, "steps; 0 = only before the first step and at stage ends", ">= 0", FREE)
    eval_temperature: float = key(1.0, "0 = greedy", ">= 0")
    eval_top_p: float = key(1.0, "of evaluation only: training samples from the whole distribution", "> 0")
    title("files")
    out_dir: str = key("", "default runs/<name of the config file>", None, RUN, FREE)
    resume: str = key("auto", "auto | never | a checkpoint folder", None, RUN, FREE)
    max_steps: int = key(0, "rl training steps in all, over all stages; 0 = as the stages say", ">= 0", RUN, FREE)
    save_every: int = key(50, "steps; 0 = only at stage ends", ">= 0", FREE)
    keep_ckpts: int = key(2, "newest checkpoints kept, besides every stage end", "> 0", FREE)
    samples_per_step: int = key(8, "groups written to samples.jsonl; 0 = all", ">= 0", FREE)
    track: str = key("", f"also log to {' | '.join(TRACKERS)} (lib/track.py)", None, RUN, FREE)

    name: str = ""  # of the stage, filled in: no setting

    @property
    def group_size(self):
        """G: rollouts of one prompt."""
        return self.n1 * (1 + self.n2)


SETTINGS = [f for f in fields(Config) if f.metadata]


def keys(scope):
    """Names of the settings of a scope."""
    return {f.name for f in SETTINGS if scope in f.metadata["scope"]}


def help_text():
    """All settings by group: name, default, limits or choices, meaning."""
    lines, heading = [], ""
    for f in SETTINGS:
        if f.metadata["title"] != heading:
            heading = f.metadata["title"]
            lines += ["", f"  {heading}"]
        limits = f.metadata["limits"] or ""
        limits = " | ".join(limits) if isinstance(limits, tuple) else limits
        default = getattr(Config(), f.name)
        meaning = f.metadata["meaning"] + (f" ({limits})" if limits else "")
        lines.append(f"    {f.name + '=' + str(default):42} {meaning}")
    return "\n".join(lines)


def list_configs():
    """The shipped configs, a line each, from the first line of their header."""
    lines = []
    for path in sorted(glob(f"{HERE}/configs/*.yaml")):
        with open(path) as f:
            lines.append(f"  configs/{os.path.basename(path):28} {f.readline().removeprefix('# ').strip()}")
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------------------- reading
def load_config(argv, usage=None):
    """Command line -> [(stage name, Config)]. Typed merges by OmegaConf; every mistake is one ValueError naming the
    key."""
    parser = argparse.ArgumentParser(description=usage, epilog="settings:\n" + help_text().replace("%", "%%"),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="YAML file with the differences from the defaults")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any setting, or stages.NAME.key=value")
    args = parser.parse_intermixed_args(argv)
    if bad := [o for o in args.overrides if "=" not in o]:
        raise ValueError(f"{bad[0]!r} is not key=value")
    if args.config and not os.path.isfile(args.config):
        raise ValueError(f"--config: no such file: {args.config}")
    try:
        stages = merge_stages(args.config, args.overrides)
    except yaml.YAMLError as e:
        raise ValueError(f"--config: not readable as YAML: {' '.join(str(e).split())}") from e
    except ConfigKeyError as e:
        raise ValueError(unknown_key(str(e.full_key or e.key), [f.name for f in SETTINGS])) from e
    except OmegaConfBaseException as e:
        raise ValueError(f"{e.full_key or 'config'}: {str(e).splitlines()[0]}") from e
    for name in sorted(keys(RUN)):
        if len({str(getattr(c, name)) for _, c in stages}) > 1:
            raise ValueError(f"{name}: is for the whole run, it cannot differ between stages")
    if not (left := [s for s in stages if s[1].steps]):
        raise ValueError("steps: no stage has any")
    return left


def merge_stages(path, overrides):
    """[(stage name, checked Config)] of a file and the command line's key=value."""
    file = OmegaConf.load(path) if path else OmegaConf.create()
    if not OmegaConf.is_dict(file):
        raise ValueError(f"--config: {path} is not a mapping of keys")
    cli = OmegaConf.from_dotlist([o + "''" if o.endswith("=") else o for o in overrides])  # key= means ""
    stages, cli_stages = named_entries(file.pop("stages", None) or {"train": {}}), named_entries(cli.pop("stages", {}))
    if unknown := [s for s in cli_stages if s not in stages]:
        raise ValueError(f"stages.{unknown[0]}: the config has the stages {', '.join(stages)}")
    out = []
    for name, entry in stages.items():
        parts = [file, entry or {}, cli, cli_stages.get(name, {})]
        for part in parts:  # method=NAME is short for method=[NAME]
            if isinstance(part.get("method"), str):
                part["method"] = [part["method"]] if part["method"] else []
        cfg = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), *parts))
        cfg.name = name
        cfg.out_dir = cfg.out_dir or "runs/" + (os.path.splitext(os.path.basename(path))[0] if path else "run")
        check(cfg)
        out.append((name, cfg))
    return out


def named_entries(stages):
    """The mapping stage name -> overrides, names as text (YAML reads 8020 as a number)."""
    if not OmegaConf.is_dict(stages) and not isinstance(stages, dict):
        raise ValueError("stages: must be a mapping of stage names to overrides")
    out = {str(k): v or {} for k, v in stages.items()}
    if bad := [k for k, v in out.items() if not (OmegaConf.is_dict(v) or isinstance(v, dict))]:
        raise ValueError(f"stages.{bad[0]}: must be a mapping of keys")
    return out


def unknown_key(name, known):
    """The message about a key that does not exist."""
    near = difflib.get_close_matches(name.split(".")[-1], [k.split(".")[-1] for k in known], 1)
    return f"{name}: no such key" + (f"; did you mean {near[0]}?" if near else "")


def is_importance(mode, low=None, high=None, *rest):
    """Whether these are what the setting `importance` takes."""
    numbers = all(type(x) in (int, float) for x in (low, high))
    return mode in IMPORTANCE and numbers and 0 <= low < high and not rest


def check(cfg):
    """Refuse what cannot work before anything is loaded: ValueError, one line, the key first."""
    for f in SETTINGS:
        value, limits = getattr(cfg, f.name), f.metadata["limits"]
        if isinstance(limits, tuple) and value not in limits:
            raise ValueError(f"{f.name}: must be one of {', '.join(limits)}, got {value!r} (stage {cfg.name})")
        if limits in LIMITS and not LIMITS[limits][1](value):
            raise ValueError(f"{f.name}: {LIMITS[limits][0]}, got {value} (stage {cfg.name})")
    longest, per_mini = cfg.max_prompt_tokens + cfg.max_response_tokens, cfg.prompts_per_minibatch
    rho, side = cfg.entropy_mask_rho, cfg.entropy_mask_side
    for wrong, message in (
        (cfg.prompts_per_step % per_mini,
         f"prompts_per_step: {cfg.prompts_per_step} is no multiple of prompts_per_minibatch {per_mini}"),
        (cfg.micro_batch_tokens < longest,
         f"micro_batch_tokens: {cfg.micro_batch_tokens} is smaller than one sequence of {longest} tokens"),
        (side != "top" and rho == 1,
         f"entropy_mask_side: {side} masks nothing at entropy_mask_rho 1: lower that, e.g. 0.2"),
        (cfg.kind == "rl" and cfg.group_size < 2,
         f"n1, n2: a group of n1 (1 + n2) = {cfg.group_size} rollouts has nothing to compare"),
        (cfg.eval_temperature == 0 and cfg.eval_n > 1,
         f"eval_n: greedy decoding (eval_temperature 0) gives one response, not {cfg.eval_n}"),
        (cfg.compile and cfg.packing == "broom",
         "packing: brooms have too many shapes to compile: with compile=true set packing=flat"),
        (len(cfg.betas) != 2, f"betas: AdamW takes two numbers, got {cfg.betas}"),
        (cfg.importance and not is_importance(*cfg.importance),
         f"importance: is [mode, low, high], mode one of {', '.join(IMPORTANCE)}, got {cfg.importance}"),
        (cfg.method_args and not cfg.method, "method_args: are of a method, and method is empty"),
        (cfg.track and cfg.track not in TRACKERS, f"track: must be one of {', '.join(TRACKERS)}, got {cfg.track!r}"),
    ):  # fmt: skip
        if wrong:
            raise ValueError(message)
