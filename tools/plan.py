"""What a config will cost, before anything is spent: tokens, FLOPs, seconds, memory and disk, by arithmetic on the model's shape.

    python cure.py --config X dry_run=true                                    # needs the model's config.json, and no GPU
    python cure.py --config X dry_run=true plan_gpu=a100 plan_gpus=4 plan_mean_response=1500 model=DIR

Assumed, since only a run knows (constants below): every prompt has 180 tokens and every response plan_mean_response, a
branch's inherited prefix included; t* is at half of the response, so a branch inherits half and generates half; half of the
groups have right and wrong answers, so that 1024 sampled prompts keep 512; all lengths are equal, no rank waits for another.
The engine is vLLM, whatever `engine` says; GPUs are those of one node. Not counted: evaluation, weight sync, sleep and wake,
verifiers, checkpoints, vLLM's work on the host.

Seconds. `floor`: nothing can be faster; FLOPs at the GPU's peak, and for decoding the larger of that and all bytes read (weights
once a decoding step, each sequence's KV cache once a token) at full memory bandwidth. `expected`: FLOPs at MFU of the peak, bytes
at MBU of the bandwidth; in decoding matrix products and attention one after the other; elsewhere FSDP's traffic where it is
longer than the computation it hides behind (PCIe). Activation checkpointing runs one more forward, which costs seconds but
is not in the FLOPs shown (those are useful ones: 3 forwards an update).

Published for 7B, stage 1, 8 x H100, responses of 1000: update 406 PFLOP, 128 s (ours, without checkpointing: 402, 129 s); old
log-probs 34-49 s (42), entropy pass 17-24 s (22), both the range of MFU 0.5 to 0.35; decoding 25-35 s, which is the floor (31 s;
27 s in whole rounds, prompts_per_chunk=0).
"""

import math
import os
from bisect import bisect_left
from dataclasses import replace
from typing import NamedTuple

from lib import toy
from lib.memory import GIB, GPUS, engine_room, engine_share, forward_flops, model_sizes, trainer_memory
from lib.policy import load_hf_config

MFU = 0.4  # of peak, in FLOPs executed (with checkpointing 0.3 of useful ones): 0.35 to 0.5 is usual for FSDP at 7B on H100
MBU = 0.7  # of the bandwidth while decoding
MEAN_PROMPT = 180  # DAPO-Math: ~90 tokens of instruction and chat template, questions of ~270 characters at 3 a token
DEPTH = 0.5  # t* as a share of the response: uniform
MIXED = 0.5  # share of groups with right and wrong answers: what the reference's 1024 prompts a round for 512 presume
# ------------------------------------------------------------------------------------------------------- sizes and GPU memory
# ------------------------------------------------------------------------------------------------------------ FLOPs and seconds
class Batch(NamedTuple):
    """Sequences of equal lengths."""

    count: int
    context: int  # tokens that are given: prompt, and a branch's prefix
    new: int  # tokens that are sampled


class Phase(NamedTuple):
    name: str
    sequences: int
    generated: int  # tokens sampled
    tokens: int  # tokens through the model
    flops: float  # useful ones, of all GPUs
    floor: float  # seconds
    expected: float  # seconds


def batches(cfg):
    """One training step -> (chunks, prompts of one, its base and branch batches, base and branch batches that are trained on).
    A round is sampled in equal chunks, here, and ends with the one that fills the step (rollout.collect)."""
    prompt = min(MEAN_PROMPT, max(1, cfg.max_prompt_tokens // 2))
    response = cfg.plan_mean_response or max(1, min(1000, int(0.4 * cfg.max_response_tokens)))
    if cfg.kind == "sft":
        return 0, 0, [], [Batch(cfg.prompts_per_step, prompt, response)]
    chunk = math.ceil(cfg.prompts_per_round / math.ceil(cfg.prompts_per_round / (cfg.prompts_per_chunk or cfg.prompts_per_round)))
    chunks = math.ceil(min(cfg.prompts_per_step / MIXED, cfg.max_rounds * cfg.prompts_per_round) / chunk)
    drawn = min(chunks * chunk, cfg.max_rounds * cfg.prompts_per_round)  # the last chunk of a round may be smaller
    kept = max(1, min(cfg.prompts_per_step, int(MIXED * drawn)))
    # critical=none starts branches at 0, clause=last a clause before the fork: as good as 0
    depth = int(DEPTH * response) if cfg.critical != "none" and cfg.clause == "prefix" else 0
    depth = min(depth, cfg.max_prompt_tokens - prompt)

    def group(prompts):
        out = [Batch(prompts * cfg.n1, prompt, response)]
        return out + ([Batch(prompts * cfg.n1 * cfg.n2, prompt + depth, response - depth)] if cfg.n2 else [])

    return chunks, chunk, group(chunk), group(kept)


def pass_phase(name, config, cfg, gpu, world, parts, minibatches=1, update=False):
    """A forward over the batches `parts`, or forward and backward, cut into minibatches and micro-batches."""
    s = model_sizes(config)
    tokens = sum(b.count * (b.context + b.new - 1) for b in parts)  # a sequence's last token is no input (policy.pack)
    flops = done = sum(b.count * forward_flops(config, [b.context + b.new - 1], b.new) for b in parts)
    if update:  # the chunked head is multiplied once more, as every block is with checkpointing
        done = 4 * flops if cfg.activation_checkpointing else 3 * flops + 2 * s.head * sum(b.count * b.new for b in parts)
        flops *= 3
    micro = minibatches * math.ceil(tokens / minibatches / world / cfg.micro_batch_tokens)
    # a micro-batch gathers bf16 weights, again for the backward, and reduces fp32 gradients; (world - 1) / world of them travel
    traffic = micro * (8 if update else 2) * s.params * (world - 1) / world / gpu.link
    seconds = flops / world / gpu.flops, max(done / world / gpu.flops / MFU, traffic)
    return Phase(name, sum(b.count for b in parts), 0, tokens, flops, *seconds)


def decode_phase(name, config, cfg, gpu, world, batch, chunks, prefill):
    """Generating `batch` `chunks` times. prefill: requests of a chunk whose context has to be read first; the other sequences
    find it in the cache."""
    s = model_sizes(config)
    mine, new = math.ceil(batch.count / world), batch.new
    mean = batch.context + (new + 1) / 2  # tokens in a sequence's cache when it is read, on average
    room = engine_room(cfg, config, world, gpu.memory * GIB)[2]
    slots = min(gpu.slots, room // math.ceil(mean))  # sequences decoded together
    slots = slots if slots > 0 else gpu.slots  # no room at all: seconds as if there were; `warnings` says so
    weights = new * max(1, mine / slots) * 2 * (s.layers * s.block + s.head)  # bytes: all but the embedding, once a decoding step
    cache = mine * new * mean * s.kv_bytes  # bytes
    before = forward_flops(config, [batch.context], 0)
    flops = forward_flops(config, [batch.context + new], new) - before
    products = mine * (flops - 4 * s.heads * s.layers * mean * new)  # without attention, whose time is that of reading the cache
    reading = prefill * before / world / gpu.flops
    floor = max(mine * flops / gpu.flops, (weights + cache) / gpu.bandwidth) + reading
    expected = max(products / gpu.flops / MFU, weights / gpu.bandwidth / MBU) + cache / gpu.bandwidth / MBU + reading / MFU
    tokens = batch.count * new, batch.count * new + prefill * batch.context
    totals = *tokens, batch.count * flops + prefill * before, floor, expected
    return Phase(name, chunks * batch.count, *(chunks * t for t in totals))


def step_phases(cfg, config, gpu, world):
    """The phases of one training step, in order."""
    chunks, prompts, sampled, kept = batches(cfg)
    minibatches = math.ceil(kept[0].count / (cfg.n1 if chunks else 1) / cfg.prompts_per_minibatch)
    update = pass_phase("update", config, cfg, gpu, world, kept, minibatches, update=True)
    if not chunks:
        return [update]
    base, scored = sampled[0], cfg.n2 and cfg.critical != "none"
    out = [decode_phase("generate base", config, cfg, gpu, world, base, chunks, prompts)]
    if scored:
        out.append(pass_phase("entropy pass", config, cfg, gpu, world, [base._replace(count=chunks * base.count)]))
    if cfg.n2:  # with the cache, round 1 left prompt and prefix there
        prefill = 0 if cfg.prefix_caching else base.count
        out.append(decode_phase("generate branches", config, cfg, gpu, world, sampled[1], chunks, prefill))
    parts = kept[1:] if cfg.reuse_entropy_logp and scored else kept
    out.append(pass_phase("old log-probs", config, cfg, gpu, world, parts, minibatches))
    if cfg.loss_mode != "ppo" and minibatches > 1:  # before every minibatch but the first (cure.choose_by_covariance)
        again = [b._replace(count=b.count * (minibatches - 1) // minibatches) for b in kept]
        out.append(pass_phase("covariance pass", config, cfg, gpu, world, again, minibatches - 1))
    return [*out, update]


# -------------------------------------------------------------------------------------------------------------- memory and disk
def memory(cfg, config, gpu, world):
    """Bytes of one GPU by part at the two peaks -> {"awake": during a log-prob pass beside the engine, "asleep": during an
    update}. `free` is the rest, negative where it does not fit."""
    s, total = model_sizes(config), gpu.memory * GIB
    awake, asleep = trainer_memory(cfg, config, world)
    cache = max(0, engine_room(cfg, config, world, total)[2]) * s.kv_bytes
    engine = {"engine weights": 2 * s.params, "KV cache": cache, "engine workspace": GIB}
    peaks = {"awake": awake | engine, "asleep": asleep | dict.fromkeys(engine, 0)}
    return {k: parts | {"free": total - sum(parts.values())} for k, parts in peaks.items()}


def misfits(cfg, config, gpu, world):
    """Which of the two peaks do not fit on the GPU: a list of "awake", "asleep"."""
    out = ["asleep"] if memory(cfg, config, gpu, world)["asleep"]["free"] < 0 else []
    try:
        engine_share(cfg, config, world, gpu.memory * GIB)
    except ValueError:  # what the run itself would say
        return ["awake", *out]
    return out


def remedies(cfg, config, gpu, world, peak):
    """Changes of a single key, "key=value", each of which alone makes `peak` fit; or, if none does, GPUs on which it fits."""

    def fits(gpu=gpu, world=world, **changes):
        return peak not in misfits(replace(cfg, **changes), config, gpu, world)

    longest, counts, out = cfg.max_prompt_tokens + cfg.max_response_tokens, [2**k for k in range(11)], []
    if not cfg.activation_checkpointing and fits(activation_checkpointing=True):
        out.append("activation_checkpointing=true")
    budgets = range(-(-longest // 1024) * 1024, cfg.micro_batch_tokens, 1024)  # one sequence must fit
    if k := bisect_left(budgets, True, key=lambda v: not fits(micro_batch_tokens=v)):
        out.append(f"micro_batch_tokens={budgets[k - 1]}")
    share = int(100 * engine_room(cfg, config, world, gpu.memory * GIB)[1]) / 100
    if cfg.gpu_memory_utilization and share > 0 and fits(gpu_memory_utilization=share):
        out.append(f"gpu_memory_utilization={share}")
    if more := next((n for n in counts if n > world and fits(world=n)), 0):
        out.append(f"plan_gpus={more}")
    if not out:
        least = {k: next((n for n in counts if n >= world and fits(gpu=g, world=n)), 0) for k, g in GPUS.items()}
        out = [f"plan_gpu={k}" + (f" plan_gpus={n}" if n != world else "") for k, n in least.items() if n]
    return out


def planned(stages):
    """[(stage, config, steps)]: what max_steps leaves of each stage."""
    left, out = stages[0][1].max_steps or math.inf, []
    for name, cfg in stages:
        out.append((name, cfg, cfg.steps if cfg.kind == "sft" else min(cfg.steps, left)))
        left -= out[-1][2] if cfg.kind == "rl" else 0
    return out


def disk(stages, config):
    """Bytes of (one checkpoint, the most that lie there at a time, what is left at the end), as checkpoint.py does it."""
    n, written, peak = model_sizes(config).params, [], 0
    one, hf = 14 * n, 2 * n  # state: fp32 weights and two moments; hf: bf16
    for _, cfg, steps in planned(stages):
        for step in range(1, steps + 1):
            if step == steps or cfg.save_every and step % cfg.save_every == 0:
                written.append([one, step == cfg.steps])
                peak = max(peak, sum(size for size, _ in written))  # the new one is complete before an old one goes
                for old in written[: -cfg.keep_ckpts]:
                    old[0] = old[0] if old[1] else hf * cfg.keep_hf
    return one, peak, sum(size for size, _ in written)


# ------------------------------------------------------------------------------------------------------------------- the report
def warnings(stages, config):
    """Lines about what will not work, each with the key to change and a value."""
    first, out = stages[0][1], []
    context = getattr(config, "max_position_embeddings", None) or math.inf
    for name, cfg in stages:
        if (longest := cfg.max_prompt_tokens + cfg.max_response_tokens) > context:
            value = context - cfg.max_prompt_tokens
            change = f"stages.{name}.max_response_tokens={value}" if value > 0 else "lower max_prompt_tokens as well"
            out.append(f"prompt and response of {name} take {longest} tokens, the model's context is {context}: {change}")
    if first.dtype == "float32":
        out.append("float32 does not run on a GPU, packed attention is bf16 there: dtype=auto")
    gpu, world, cfg = GPUS[first.plan_gpu], first.plan_gpus, longest_stage(stages)
    phase = {"awake": "log-prob passes beside the engine", "asleep": "the update"}
    for peak in misfits(cfg, config, gpu, world):
        short = -memory(cfg, config, gpu, world)[peak]["free"] / GIB
        what = f"over by {short:.1f} GiB" if short >= 0.05 else "no KV cache for one sequence"
        change = " | ".join(remedies(cfg, config, gpu, world, peak)) or "a smaller model"
        out.append(f"{phase[peak]} will not fit on {world} x {gpu.name} ({what}), the seconds are as if it did: {change}")
    return out


def longest_stage(stages):
    """The config of the stage with the longest sequences: the engine is built for those."""
    return max((c for _, c in stages), key=lambda c: c.max_prompt_tokens + c.max_response_tokens)


def stage_report(name, cfg, steps, config, gpu, world):
    """-> (lines about one stage, its expected hours)."""
    chunks, prompts, _, kept = batches(cfg)
    trained = sum(b.count for b in kept)
    about = f"{trained} rows"
    if chunks:
        n = min(chunks * prompts, cfg.max_rounds * cfg.prompts_per_round)
        about = f"{n} prompts x {cfg.group_size} = {n * cfg.group_size} rollouts, {trained} of them trained on"
    lines = ["", f"{name}, one of {steps} steps: {about}"]
    lines += [f"  {b.count} sequences of {b.context} tokens given + {b.new} new" for b in kept]
    lines.append(f"  {'':18}{'sequences':>10}{'generated':>12}{'forward tokens':>16}{'PFLOP':>9}{'floor':>11}{'expected':>11}")
    phases = step_phases(cfg, config, gpu, world)
    whole = Phase("step", 0, *(sum(p[i] for p in phases) for i in range(2, 7)))
    for p in [*phases, whole]:
        counts = f"{p.sequences or '':>10}{p.generated or '':>12}{p.tokens:>16}"
        lines.append(f"  {p.name:18}{counts}{p.flops / 1e15:>9.3g}{p.floor:>9.1f} s{p.expected:>9.1f} s")
    hours = steps * whole.expected / 3600
    return [*lines, f"  {steps} steps: floor {steps * whole.floor / 3600:.1f} h, expected {hours:.1f} h"], hours


def report(stages, config):
    """The whole plan as text. stages: [(name, Config)] as load_config gives them; config: of the model. ValueError for a model
    the arithmetic does not hold for."""
    s, first = model_sizes(config), stages[0][1]
    if s.linear < 0.95 * s.layers * s.block:  # experts, convolutions, state spaces
        raise ValueError(f"model: {config.model_type!r} is not dense, there is no plan for it")
    gpu, world, cfg = GPUS[first.plan_gpu], first.plan_gpus, longest_stage(stages)
    rates = f"{gpu.flops / 1e12:.0f} TFLOP/s, {gpu.memory} GiB, {gpu.bandwidth / 1e12:.3g} TB/s"
    lines = [f"{first.init_from or first.model}: {s.params / 1e6:.2f} M parameters, on {world} x {gpu.name} ({rates})",
             f"expected: at {MFU:.0%} of peak FLOP/s and {MBU:.0%} of bandwidth; these and all lengths are assumed (plan.py)"]
    total = 0.0
    for name, c, steps in planned(stages):
        more, hours = stage_report(name, c, steps, config, gpu, world)
        lines, total = lines + more, total + hours
    lines.append(f"all stages: expected {total:.1f} h = {total * world:.3g} GPU hours")
    awake, asleep = memory(cfg, config, gpu, world).values()
    lines += ["", f"{f'GiB of {gpu.memory} a GPU':22}{'engine awake,':>16}{'engine asleep,':>16}",
              f"{'':22}{'log-prob pass':>16}{'update':>16}"]
    lines += [f"  {k:20}{awake[k] / GIB:>16.1f}{asleep[k] / GIB:>16.1f}" for k in awake]
    tokens, longest = round(awake["KV cache"] / s.kv_bytes), cfg.max_prompt_tokens + cfg.max_response_tokens
    lines += [f"  KV cache: {tokens} tokens = {tokens // longest} sequences of {longest}", f"  micro_batch_tokens "
              f"{cfg.micro_batch_tokens}, activation checkpointing {'on' if cfg.activation_checkpointing else 'off'}"]
    one, peak, left = (b / 1e9 for b in disk(stages, config))
    lines += ["", f"disk: {one:.3g} GB a checkpoint (12 B a parameter of state, 2 B of hf), {peak:.3g} GB at most, "
              f"{left:.3g} GB at the end"]
    return "\n".join([*lines, *(f"WARNING: {w}" for w in warnings(stages, config))])


def print_plan(stages):
    """What this config would cost, from the model's config.json alone. The toy has a shape before it has a folder."""
    first = stages[0][1]
    path = first.init_from or (first.toy_dir if first.model == "toy" else first.model)
    unmade = path == first.toy_dir and not os.path.exists(f"{path}/config.json")
    text = report(stages, toy.toy_config() if unmade else load_hf_config(path))
    if os.environ.get("RANK", "0") == "0":
        print(text)
