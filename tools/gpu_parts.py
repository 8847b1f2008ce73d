"""The larger parts that tools/gpu_check.py looks at: engine, trainer, what passes between them, checkpoints, speeds.

A check takes the run and its config and returns (whether it holds, or a status, and {what: number}). The checks are
in the order in which they run: the engine starts before the trainer, and sleeps from engine_sleep on.
"""

import contextlib
import gc
import math
import random
import resource
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import torch

import cure
from lib import checkpoint, policy
from lib.engine import Sampling, make_engine, request_seed
from lib.lora import adapt
from lib.memory import GIB, trainer_memory, utilisation
from lib.method import load_method
from lib.ranks import everywhere, gather, timed
from lib.weights import load_lm
from rollout import Rollout
from tools import bench

NUMBER, LEFT_OUT = "NUMBER", "LEFT OUT"

# Tolerances. bf16 rounds by up to 0.2 %, and it rounds the residual stream twice a block. After 24 blocks the hidden
# states of two correct forwards are some 2 % apart, their logits, 3 nats wide, some 0.07 nats (measured on a CPU).
GRADIENT = {torch.float32: 1e-4, torch.bfloat16: 0.05}  # relative, of all parameters together
GAP = {torch.float32: 1e-3, torch.bfloat16: 0.2}  # nats a token, mean
TIE = {torch.float32: 1e-3, torch.bfloat16: 0.6}  # nats: two tokens so close may change places


def free_gib():
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0] / GIB


@contextlib.contextmanager
def metered(numbers):
    """Add the block's seconds to `numbers`, and on a GPU the GiB free before and after it."""
    before = free_gib() if torch.cuda.is_available() else None
    with timed(clock := {}, "block"):
        yield
    numbers["seconds"] = clock["timing_s/block"]
    if before is not None:
        numbers |= {"GiB free before": before, "after": free_gib()}


def planned(run, cfg, peak):
    """GiB that the trainer will still take of this GPU at a log-prob pass (peak 0) or an update (1), by the run's own
    plan. Not what it holds already, and not the plan's reserve: CUDA and NCCL, for which that is, have started."""
    held = ["reserve", "fp32 weights", "Adam moments", "frozen models"] if run.policy else ["reserve"]
    parts = trainer_memory(cfg, run.config, run.world)[peak]
    return sum(v for k, v in parts.items() if k not in held) / GIB


def roomy(numbers, need):
    """Whether the GiB that a metered block left free are those that the plan needs next; true without a GPU."""
    if "after" in numbers:
        numbers["planned for what follows"] = need
    return numbers.get("after", need) >= need


# --------------------------------------------------------------------------------------------------- start and weights
def engine_start(run, cfg):
    """The engine starts, on a GPU vLLM, and sleeps. The GPU then has room for the trainer's update."""
    numbers = {}
    with metered(numbers):
        run.engine = make_engine(run, run.path, {0})
    wanted = not torch.cuda.is_available() or cfg.engine == "torch" or hasattr(run.engine, "llm")
    return wanted and roomy(numbers, planned(run, cfg, 1)), {"engine": type(run.engine).__name__} | numbers


def trainer_start(run, cfg):
    """The trainer reads and shards its weights. The GPU then has room for gradients and activations."""
    numbers = {}
    with metered(numbers):
        run.policy = policy.Policy(cfg, run.path, run.device)
    numbers["highest GiB of the process"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return roomy(numbers, planned(run, cfg, 1)), numbers


def plain_copy(run, cfg):
    """The model, with adapters where the run has them, as the trainer began with it: whole, and outside of FSDP."""
    lm = load_lm(run.path, run.policy.dtype, "packed")
    adapters = adapt(lm, cfg.lora_rank, cfg.lora_alpha, cfg.seed) if cfg.lora_rank else {}
    for name, value in adapters.items():
        layer, _, key = name.rpartition(".")
        lm.get_submodule(layer).register_parameter(key, torch.nn.Parameter(value.to(run.policy.dtype)))
    return policy.PackedLM(lm.to(run.device))


def sharded_gradient(run, cfg):
    """The gradient of all ranks and their micro-batches is that of one plain copy of the model on rank 0."""
    rows = bench.rollouts(4 * run.world, 16, 40, run.config.vocab_size)
    mine = bench.micro_batches(rows, replace(cfg, micro_batch_tokens=256), run.rank, run.world)
    loss = bench.loss_of(rows)
    norm, _ = run.policy.update(mine, loss, 1.0, 0.0, 0.0)  # lr 0: the weights stay
    run.policy.opt.state.clear()  # room for the plain copy
    for micro in mine:
        loss(micro, *run.policy.forward(micro, 1.0)).backward()
    true = {}

    def on_one_rank():
        plain = plain_copy(run, cfg)
        loss(rows, *plain(**policy.pack(rows, run.device), temperature=1.0)).backward()
        true.update((name, p.grad) for name, p in plain.named_parameters())

    everywhere(on_one_rank if run.rank == 0 else None)
    apart = total = 0.0
    for name, p in run.policy.trained.items():
        full = p.grad.full_tensor()  # a collective
        if run.rank == 0:
            apart += (full - true[name]).double().square().sum().item()
            total += true[name].double().square().sum().item()
    run.policy.opt.zero_grad(set_to_none=True)
    run.policy.new_optimizer(cfg)
    if run.rank:
        return True, {}
    numbers = {"gradient apart, relative": (apart / total) ** 0.5, "norm / true norm - 1": norm / total**0.5 - 1}
    return all(abs(x) <= GRADIENT[run.policy.dtype] for x in numbers.values()), numbers


def wake_and_sync(run, cfg):
    """The engine wakes and gets all weights. The GPU then has room for a log-prob pass beside it."""
    numbers, clock = {}, {}
    with metered(numbers):
        run.refresh(clock)
    numbers |= {f"{k} seconds": clock[f"timing_s/{k}"] for k in ("wake", "sync")}
    return roomy(numbers, planned(run, cfg, 0)), numbers


# ------------------------------------------------------------------------------------------------- engine and trainer
def random_prompts(run, cfg, n, seed):
    """n prompts of this rank. Their ids are the toy tokenizer's, which every shape here has."""
    rng = random.Random(f"{seed} {run.rank}")
    return [[rng.randrange(1, 25) for _ in range(cfg.max_prompt_tokens // 2)] for _ in range(n)]


def sample(run, cfg, n, seed, clock=None, forget=False):
    """n prompts a rank, n1 responses each, n2 branches off the middle of each -> Rollouts of all ranks. clock gets the
    seconds of both rounds. forget: vLLM's prefix cache is cleared between them."""
    clock, sampling = {} if clock is None else clock, Sampling(cfg.max_response_tokens)
    prompts = random_prompts(run, cfg, n, seed)

    def generate(name, contexts, count):
        seeds = [request_seed(seed, name, run.rank, i) for i in range(len(contexts))]
        with timed(clock, name):
            return run.engine.generate(contexts, count, sampling, seeds)

    first = enumerate(generate("round 1", prompts, cfg.n1), start=run.rank * n)
    base = [Rollout(p, [], c.ids, c.logp, group=g) for p, (g, cs) in zip(prompts, first, strict=True) for c in cs]
    if forget:
        run.engine.llm.reset_prefix_cache()
    cuts = [r.response_ids[: len(r.response_ids) // 2] for r in base]
    second = generate("round 2", [r.prompt_ids + cut for r, cut in zip(base, cuts, strict=True)], cfg.n2)
    branches = [Rollout(r.prompt_ids, cut, c.ids, c.logp, group=r.group, parent=i % cfg.n1, t_star=len(cut) or None)
                for i, (r, cut, cs) in enumerate(zip(base, cuts, second, strict=True)) for c in cs]  # fmt: skip
    rows = gather(sorted(base + branches, key=lambda r: r.group))
    for i, r in enumerate(rows):
        r.advantage = (-1.0) ** i
    return rows


def gap_of(run, cfg, rows):
    """Score rollouts as a training step does -> the mean |d| of trainer and engine, and the others of loss.mismatch."""
    cure.score(run, cfg, cure.cut_minibatches(cfg, rows, run.world))
    return cure.compare_with_engine(run, replace(cfg, max_logp_gap=math.inf), rows)


def distance_to_best(hidden, weight, tokens, temperature, chunk, statistic=None):
    """In the place of loss.logp_and_entropy: how far each token's logit is below the largest, nats (T,), and zeros."""
    z = torch.cat([hidden.float() @ w.float().t() for w in weight.split(16384)], 1)  # (T, V)
    below = z.amax(-1) - z.gather(-1, tokens[:, None])[:, 0]
    return below, torch.zeros_like(below)


def greedy_tokens(run, cfg):
    """Each greedy token of the engine is the trainer's best one, or as good as tied with it."""
    prompts = random_prompts(run, cfg, 4, "greedy")
    out = run.engine.generate(prompts, 1, Sampling(min(64, cfg.max_response_tokens), 0.0), [0] * 4)
    rows = [Rollout(p, [], c.ids) for p, (c,) in zip(prompts, out, strict=True)]
    with patch("lib.policy.logp_and_entropy", distance_to_best):
        below = torch.cat([torch.from_numpy(x) for x, _ in run.policy.score_local(rows, 1.0)])
    equal, furthest = (below == 0).double().mean().item(), below.max().item()
    return furthest <= TIE[run.policy.dtype], {"tokens": len(below), "equal": equal, "furthest, nats": furthest}


def logprob_gap(run, cfg):
    """Trainer and engine give sampled tokens the same log-prob. The trainer packs branches as it does in training."""
    run.rows = sample(run, cfg, 4, "gap")
    run.gap = gap_of(run, cfg, run.rows)
    return run.gap["mean_abs"] <= GAP[run.policy.dtype], run.gap


def same_seed_twice(run, cfg):
    """The same seeds give the same tokens (on a GPU: mostly, its float sums vary), and other seeds give others."""
    prompts, found = random_prompts(run, cfg, 8, "twice"), []
    for seed in (0, 0, 1):
        if hasattr(run.engine, "llm"):
            run.engine.llm.reset_prefix_cache()
        seeds = [request_seed(seed, i) for i in range(8)]
        out = run.engine.generate(prompts, 2, Sampling(min(64, cfg.max_response_tokens)), seeds)
        found.append([c.ids for cs in out for c in cs])
    again, other = (sum(a == b for a, b in zip(found[0], x, strict=True)) / 16 for x in found[1:])
    enough = 0.5 if torch.cuda.is_available() else 1
    return again >= enough and other < 0.5, {"equal": again, "equal with other seeds": other}


def generation_speed(run, cfg):
    """Tokens/s of base responses (round 1) and branches (round 2), with the prefix cache of round 1 and without."""
    numbers, n = {}, 32 if torch.cuda.is_available() else 4
    for cache in ("cleared", "kept") if hasattr(run.engine, "llm") else ("none",):
        rows = sample(run, cfg, n, cache, clock := {}, forget=cache == "cleared")
        for name, label, branch in (("round 1", "round 1", False), ("round 2", f"round 2, cache {cache}", True)):
            tokens = sum(len(r.response_ids) for r in rows if (r.parent >= 0) == branch)
            numbers[label] = tokens / clock[f"timing_s/{name}"] / run.world  # of round 1 the later one stays
    return NUMBER, numbers


def workload(run, cfg):
    """Rollouts of log-normal lengths, two micro-batches a rank -> (all, this rank's micro-batches)."""
    mean = cfg.max_response_tokens / 2
    n = int(2 * run.world * cfg.micro_batch_tokens / (bench.PROMPT + mean))
    rows = bench.rollouts(n, mean, cfg.max_response_tokens, run.config.vocab_size)
    return rows, bench.micro_batches(rows, cfg, run.rank, run.world)


def logprob_pass_speed(run, cfg):
    """Response tokens/s of the pass between sampling and update, while the engine is awake."""
    rows, mine = workload(run, cfg)
    for _ in range(2):  # the first turn is for caches and allocators
        with timed(clock := {}, "score"):
            run.policy.score(mine, 1.0)
    return NUMBER, {"tokens/s": sum(len(r.response_ids) for r in rows) / clock["timing_s/score"] / run.world}


def engine_sleep(run, cfg):
    """The engine gives weights and cache back. The GPU then has room for an update."""
    numbers = {}
    with metered(numbers):
        run.engine.sleep()
    return roomy(numbers, planned(run, cfg, 1)), numbers


def skipped_sync(run, cfg):
    """After an optimizer step an engine with the old weights shows, and a sync brings the gap back to what it was."""
    run.engine.sleep()
    run.state["stage_step"] = 1
    # adapters move the model less, and in bf16 the merged weights are rounded once more than those of the trainer
    far, room = (30, 4) if cfg.lora_rank else (1, 2)
    cfg = replace(cfg, lr=far * cfg.lr)
    cure.optimizer_steps(run, cfg, load_method(cfg, cure.HOOKS), cure.cut_minibatches(cfg, run.rows, run.world))
    with patch.object(run, "policy", None):  # without a trainer the engine gets the folder's weights: the old ones
        run.refresh()
    stale = gap_of(run, cfg, sample(run, cfg, 4, "stale"))["mean_abs"]
    run.engine.sleep()
    run.refresh()
    synced, before = gap_of(run, cfg, sample(run, cfg, 4, "synced"))["mean_abs"], run.gap["mean_abs"]
    run.engine.sleep()
    # rounding makes the same gap before and after a step, within some 10 %
    holds = synced <= room * before + 1e-5 and stale >= 3 * synced + 1e-5
    return holds, {"gap before": before, "not synced": stale, "synced": synced}


def save_and_resume(run, cfg):
    """A checkpoint read back gives the weights and Adam's moments that were saved, bit for bit."""
    rows = bench.rollouts(4 * run.world, 16, 40, run.config.vocab_size)
    mine, loss, clock = bench.micro_batches(rows, cfg, run.rank, run.world), bench.loss_of(rows), {}
    run.policy.update(mine, loss, 1.0, 1e-4)
    saved = {k: x.to_local().to("cpu", copy=True) for k, x in run.policy.state().items()}

    def not_as_saved():
        return sum(not torch.equal(x.to_local().cpu(), saved[k]) for k, x in run.policy.state().items())

    run.state.update(step=1, stage_step=1)
    with timed(clock, "save"):
        checkpoint.save(run, cfg, SimpleNamespace(cursor=[0, 0]), final=False)
    run.policy.update(mine, loss, 1.0, 1e-4)
    changed = not_as_saved()
    with timed(clock, "load"):
        checkpoint.load(run, f"{run.out}/ckpt/{checkpoint.latest(run.out + '/ckpt')}")
    numbers = {f"{k} seconds": clock[f"timing_s/{k}"] for k in ("save", "load")}
    return changed and not not_as_saved(), numbers | {"tensors": len(saved), "not as saved": not_as_saved()}


# ----------------------------------------------------------------------------------------------------------- the update
def timed_update(run, cfg, name):
    """The optimizer step by a trainer of its own -> response tokens/s, useful FLOP/s, memory. It holds if the gradient
    norm is that of the first variant."""
    if run.engine:
        run.engine.sleep()
    run.policy = None
    need = planned(run, cfg, 1)
    gc.collect()
    if torch.cuda.is_available() and need > (free := free_gib()):
        return LEFT_OUT, {"GiB planned": need, "GiB free": free}
    before = torch.cuda.memory_allocated()  # torch counts vLLM's pool, and does so while that sleeps. 0 without a GPU
    run.policy = policy.Policy(cfg, run.path, run.device)
    rows, mine = workload(run, cfg)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    for _ in range(3):  # the first turn is for caches, allocators and compilers
        with timed(clock := {}, "update"):
            norm, _ = run.policy.update(mine, bench.loss_of(rows), 1.0, 0.0, 0.0)
    lengths, tokens = [policy.packed_length(r) for r in rows], sum(len(r.response_ids) for r in rows)
    speed = utilisation(run.config, lengths, tokens, clock["timing_s/update"], run.world, (), cfg.lora_rank)
    names = {"perf/trained_throughput": "tokens/s", "perf/tflops": "TFLOP/s", "perf/mfu": "MFU"}
    if torch.cuda.is_available():
        run.peaks[name] = (torch.cuda.max_memory_allocated() - before) / GIB, need
    run.norm = run.norm or norm
    apart = norm / run.norm - 1
    numbers = {label: speed[key] for key, label in names.items() if key in speed} | {"norm / first norm - 1": apart}
    return abs(apart) <= GRADIENT[run.policy.dtype], numbers


def update(run, cfg):
    """Tokens/s and model FLOPs utilisation of the optimizer step, neither compiled nor checkpointed."""
    return timed_update(run, replace(cfg, compile=False, activation_checkpointing=False), "update")


def update_checkpointed(run, cfg):
    """The same with activation checkpointing, which takes a third more time and far less memory. Same gradient."""
    return timed_update(run, replace(cfg, compile=False, activation_checkpointing=True), "checkpointed")


def update_compiled(run, cfg):
    """The same with every block compiled, checkpointed unless the command line says no. Same gradient."""
    return timed_update(run, replace(cfg, compile=True, packing="flat"), "compiled")


def peak_memory(run, cfg):
    """The trainer's peak on the GPU in these updates is no higher than planned, within 10 % and 0.5 GiB."""
    numbers = {}
    for name, (peak, need) in run.peaks.items():
        numbers |= {f"{name}, GiB": peak, f"{name}, planned": need}
    return all(peak <= 1.1 * need + 0.5 for peak, need in run.peaks.values()), numbers
