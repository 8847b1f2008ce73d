"""What a config will cost, before anything is spent: tokens, FLOPs, seconds, memory and disk, by arithmetic.

    python -m tools.plan --config X gpu=a100 gpus=4 response=1500 model=DIR    # no GPU, only the model's config.json

gpu is one of h100, h200, a100 (80 GB), l40s, rtx4090; gpus are those of one node, or with replicate=N of N nodes; host
is the GiB of a node's own memory (0: this machine's, if it has a GPU). response is the tokens of a mean response, 0 for
1000, or for 40 % of max_response_tokens where that is less. fork is t* as a share of it: 0.5 where t* is uniform. Any
other key=value is the config's.

Only a run knows what is assumed here (the constants below). All prompts are equally long, and so are all responses, a
branch's inherited prefix included: no rank waits for another. The engine is vLLM, whatever `engine` says. Evaluation,
weight sync, sleep and wake, verifiers, checkpoints and vLLM's work on the host are not counted.

floor: nothing can be faster. FLOPs take the GPU's peak, decoding the larger of that and of all bytes read at full
bandwidth. expected: FLOPs at MFU of the peak, bytes at MBU of the bandwidth, matrix products and attention of decoding
one after the other, FSDP's traffic where it is longer than the computation it hides behind (PCIe), and that of an
engine of engine_tp GPUs, at the link's full rate and without its latency. FLOPs shown are useful ones
(lib.memory.train_flops): what checkpointing computes again costs seconds only.
"""

import math
import os
import re
import sys
from collections import namedtuple
from dataclasses import replace

import torch

from cure import HOOKS
from lib import toy
from lib.checkpoint import PIECE
from lib.config import load_config
from lib.files import aligned
from lib.memory import (
    GIB,
    GPUS,
    adapter_parameters,
    engine_batch,
    engine_overhead,
    engine_room,
    engine_shard,
    engine_share,
    forward_flops,
    frozen_memory,
    model_sizes,
    tp_misfit,
    train_flops,
    trainer_memory,
)
from lib.method import load_method
from lib.ranks import one_line_errors
from lib.weights import load_hf_config

MFU = 0.4  # of peak, in FLOPs executed (with checkpointing 0.3 of useful ones): FSDP at 7B on H100 has 0.35 to 0.5
MBU = 0.7  # of the bandwidth while decoding
MEAN_PROMPT = 180  # DAPO-Math: ~90 tokens of instruction and chat template, questions of ~270 characters at 3 a token
PROCESS = 5 * GIB  # of host memory a rank takes beside weights: torch, vLLM, CUDA, data. Imports alone take 0.4
MIXED = 0.5  # share of groups with right and wrong answers: the reference samples 1024 prompts a round for 512

# the model's HF config, an entry of GPUS, how many, tokens of a mean response, bytes a GPU holds of frozen models, GiB
# of host memory (0: unknown), t* as a share of the response
Given = namedtuple("Given", "config gpu world response frozen host fork", defaults=(0, 0, 0, 0.5))
# equal sequences: how many; tokens given to each, the prompt and a branch's prefix; tokens sampled; of those given, how
# many the trainer forwards once for all branches, in the base response (lib/broom.py)
Batch = namedtuple("Batch", "count context new shared", defaults=(0,))
# tokens sampled, tokens through the model, useful FLOPs of all GPUs, seconds
Phase = namedtuple("Phase", "name sequences generated tokens flops floor expected")


# -------------------------------------------------------------------------------------------------- FLOPs and seconds
def batches(cfg, response=0, fork=0.5):
    """One training step -> (rounds, prompts of one, its base and branch batches, those that are trained on)."""
    prompt = min(MEAN_PROMPT, max(1, cfg.max_prompt_tokens // 2))
    response = response or max(1, min(1000, int(0.4 * cfg.max_response_tokens)))
    if cfg.kind == "sft":
        return 0, 0, [], [Batch(cfg.prompts_per_step, prompt, response)]
    rounds = min(cfg.max_rounds, math.ceil(cfg.prompts_per_step / MIXED / cfg.prompts_per_round))
    kept = max(1, min(cfg.prompts_per_step, int(MIXED * rounds * cfg.prompts_per_round)))
    # critical=none starts branches at 0, clause=last a clause before the fork: as good as 0
    inside = cfg.critical != "none" and cfg.clause == "prefix"
    depth = min(int(fork * response) if inside else 0, response - 1, cfg.max_prompt_tokens - prompt)
    shared = prompt + depth if depth and cfg.packing == "broom" else 0

    def group(prompts):
        branches = Batch(prompts * cfg.n1 * cfg.n2, prompt + depth, response - depth, shared)
        return [Batch(prompts * cfg.n1, prompt, response), *([branches] if cfg.n2 else [])]

    return rounds, cfg.prompts_per_round, group(cfg.prompts_per_round), group(kept)


def forwarded(parts, flat=False):
    """Input tokens of a trainer's pass over the batches `parts`. flat: in flat rows."""
    # a sequence's last token is no input (policy.pack)
    return sum(b.count * (b.context + b.new - 1 - (0 if flat else b.shared)) for b in parts)


def pass_phase(name, cfg, given, parts, minibatches=1, update=False):
    """A forward over the batches `parts`, or forward and backward, cut into minibatches and micro-batches."""
    config, gpu, world = given[:3]
    s, adapters = model_sizes(config), adapter_parameters(config, cfg.lora_rank)

    def total(work):
        """FLOPs of the batches by a function of lib/memory.py."""
        return sum(b.count * (work(config, [b.context + b.new - 1], b.new, cfg.lora_rank)
                              - work(config, [b.shared], 0, cfg.lora_rank)) for b in parts)  # fmt: skip

    tokens, flops = forwarded(parts), total(train_flops if update else forward_flops)
    done = flops
    if update:  # the chunked head is multiplied once more, as every block is with checkpointing
        head = 2 * s.head * sum(b.count * b.new for b in parts)
        done += total(forward_flops) if cfg.activation_checkpointing else head
    micro = minibatches * math.ceil(tokens / minibatches / world / cfg.micro_batch_tokens)
    # a micro-batch gathers bf16 weights, again for the backward, and reduces fp32 gradients of what is trained
    moved = 2 * (s.params + adapters) * (1 + update) + update * 4 * (adapters or s.params)
    shards = world // cfg.replicate  # gradients of several copies, added up between nodes, are not counted
    traffic = micro * moved * (shards - 1) / shards / gpu.link
    seconds = flops / world / gpu.flops, max(done / world / gpu.flops / MFU, traffic)
    return Phase(name, sum(b.count for b in parts), 0, tokens, flops, *seconds)


def decode_phase(name, cfg, given, batch, rounds, prefill):
    """Generating `batch` `rounds` times. prefill: requests of a round whose context is in no prefix cache yet."""
    config, gpu, world = given[:3]
    s, (count, context, new, _), tp = model_sizes(config), batch, cfg.engine_tp
    token, engines = engine_shard(cfg, config)[1], world // tp
    # sequences of an engine; tokens in a sequence's cache when read, on average
    mine, mean = math.ceil(count / engines), context + (new + 1) / 2
    room = memory(cfg, given)["awake"]["KV cache"] // token
    # sequences decoded together; no room at all: seconds as if there were, and `warnings` says so
    slots = min(engine_batch(gpu)[0], room // math.ceil(mean)) or engine_batch(gpu)[0]
    # read: all weights but the embedding once a decoding step, each sequence's cache once a token
    weights = new * max(1, mine / slots) * 2 * (s.layers * s.block + s.head) / tp / gpu.bandwidth
    cache = mine * new * mean * token / gpu.bandwidth
    before = forward_flops(config, [context], 0)
    flops = forward_flops(config, [context + new], new) - before
    # a token's bf16 state is added up over an engine's GPUs twice a block, 2 (tp - 1) / tp of it sent and received; the
    # fp32 logits of one sampled are gathered
    states = 8 * s.layers * config.hidden_size * (mine * new + prefill * context / engines)
    traffic = (tp - 1) / tp * (states + 4 * config.vocab_size * mine * new) / gpu.link
    products = flops - 4 * s.heads * s.layers * mean * new  # without attention: its time is that of reading the cache
    reading = prefill * before / world / gpu.flops
    floor = max(mine * flops / tp / gpu.flops, weights + cache) + reading
    expected = max(mine * products / tp / gpu.flops / MFU, weights / MBU) + cache / MBU + reading / MFU + traffic
    totals = count, count * new, count * new + prefill * context, count * flops + prefill * before, floor, expected
    return Phase(name, *(rounds * x for x in totals))


def step_phases(cfg, given):
    """The phases of one training step, in order."""
    rounds, prompts, sampled, kept = batches(cfg, given.response, given.fork)
    minibatches = math.ceil(kept[0].count / (cfg.n1 if rounds else 1) / cfg.prompts_per_minibatch)
    update = pass_phase("update", cfg, given, kept, minibatches, update=True)
    if not rounds:
        return [update]
    base, scored = sampled[0], cfg.n2 and cfg.critical != "none"
    out = [decode_phase("generate base", cfg, given, base, rounds, prompts)]
    if scored:
        out.append(pass_phase("entropy pass", cfg, given, [base._replace(count=rounds * base.count)]))
    if cfg.n2:  # round 1 left prompt and prefix in the cache
        out.append(decode_phase("generate branches", cfg, given, sampled[1], rounds, 0))
    out.append(pass_phase("old log-probs", cfg, given, kept, minibatches))
    method = load_method(cfg, HOOKS)
    if method.reference:
        out.append(pass_phase("reference log-probs", replace(cfg, lora_rank=0), given, kept, minibatches))
    if method.survey_minibatch and minibatches > 1:  # for the first minibatch the old log-probs are the present ones
        rest = [b._replace(count=b.count * (minibatches - 1) // minibatches) for b in kept]
        out.append(pass_phase("survey pass", cfg, given, rest, minibatches - 1))
    return [*out, update]


# ---------------------------------------------------------------------------------------------------- memory and disk
def memory(cfg, given):
    """Bytes of one GPU by part at the two peaks of trainer_memory -> {"awake": parts, "asleep": parts}. `free` is the
    rest, negative where it does not fit."""
    config, gpu, world, _, frozen = given[:5]
    total = gpu.memory * GIB
    weights, token = engine_shard(cfg, config)
    cache = max(0, engine_room(cfg, config, world, gpu, frozen)[2]) * token
    work, graphs = engine_overhead(config, gpu, cfg.engine_tp)
    engine = {"engine weights": weights, "KV cache": cache, "engine workspace": work, "CUDA graphs": graphs}
    awake, asleep = trainer_memory(cfg, config, world, frozen)
    peaks = {"awake": awake | engine, "asleep": asleep | dict.fromkeys(engine, 0) | {"CUDA graphs": graphs}}
    return {k: parts | {"free": total - sum(parts.values())} for k, parts in peaks.items()}


def misfits(cfg, given):
    """Which of the two peaks do not fit on the GPU -> {"awake" or "asleep": what is missing}."""
    short = {peak: -parts["free"] / GIB for peak, parts in memory(cfg, given).items()}
    out = {peak: f"over by {gib:.1f} GiB" for peak, gib in short.items() if gib >= 0.05}
    try:
        engine_share(cfg, given.config, given.world, given.gpu, given.frozen)
    except ValueError:  # the run itself would refuse
        out = {"awake": "no KV cache for one sequence"} | out
    return out


def remedies(cfg, given, peak):
    """Changes "key=value" of one key, each of which alone makes `peak` fit. If there is none: GPUs on which it fits."""

    def mends(world=given.world, gpu=given.gpu, **changes):
        new = replace(cfg, **changes)  # a frozen model is spread over the GPUs of a copy
        frozen = given.frozen * (given.world // cfg.replicate) / (world // new.replicate)
        return peak not in misfits(new, given._replace(world=world, gpu=gpu, frozen=frozen))

    longest, counts = cfg.max_prompt_tokens + cfg.max_response_tokens, [cfg.replicate * 2**k for k in range(11)]
    tries = {  # the first value that fits is taken
        "activation_checkpointing": [True],
        "micro_batch_tokens": range(cfg.micro_batch_tokens // 1024 * 1024, longest - 1, -1024),
        "gpu_memory_utilization": [k / 100 for k in range(99, 0, -1)],
        "replicate": [n for n in range(cfg.replicate - 1, 0, -1) if given.world % n == 0],
        "engine_tp": [k for k in (2, 4, 8) if not tp_misfit(k, given.config, given.world // cfg.replicate)],
    }
    found = {key: next((v for v in values if mends(**{key: v})), 0) for key, values in tries.items()}
    found["gpus"] = next((n for n in counts if n > given.world and mends(n)), 0)
    if out := [f"{key}={value}".lower() for key, value in found.items() if value]:
        return out
    for key, gpu in GPUS.items():
        n = next((n for n in counts if n >= given.world and mends(n, gpu)), 0)
        out += [f"gpu={key}" + f" gpus={n}" * (n != given.world)] if n else []
    return out


def host_memory():
    """GiB of this machine's own memory, or of its container's limit where that is lower."""
    total, limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "/sys/fs/cgroup/memory.max"
    if os.path.exists(limit) and (text := open(limit).read().strip()).isdigit():
        total = min(total, int(text))
    return total / GIB


def host(config, world, lora_rank=0):
    """Bytes of the node's own memory that all ranks take together (at the start, while a checkpoint is written).

    A rank reads only its rows of the weights, one tensor at a time. It writes its state in files of checkpoint.PIECE,
    or of one tensor where that is larger, and holds each twice. Then rank 0 gathers the bf16 weights of hf/. State is
    of what is trained: with adapters, of the adapters. None of them is as large as a file."""
    s, adapters = model_sizes(config), adapter_parameters(config, lora_rank)
    piece = min(12 * (adapters or s.params) / world, max(PIECE, 0 if adapters else 4 * s.head / world))
    return world * PROCESS + 2 * s.head, world * PROCESS + max(2 * piece * world, 2 * s.params)


def disk(stages, config):
    """Bytes of (one checkpoint, the most that lie there at a time, what is left at the end), see lib/checkpoint.py."""
    s, adapters = model_sizes(config), adapter_parameters(config, stages[0][1].lora_rank)
    # hf in bf16; of what is trained fp32 weights and two moments; the adapters once more, for PEFT
    one = 2 * s.params + 12 * (adapters or s.params) + 4 * adapters
    there, most = [], 0  # of each checkpoint that lies there, whether it ends a stage
    for _, cfg in stages:
        for step in range(1, cfg.steps + 1):
            if step == cfg.steps or cfg.save_every and step % cfg.save_every == 0:
                there.append(step == cfg.steps)
                most = max(most, len(there))  # the new one is complete before an old one goes
                there = [end for end in there[: -cfg.keep_ckpts] if end] + there[-cfg.keep_ckpts :]
    return one, most * one, len(there) * one


# --------------------------------------------------------------------------------------------------------- the report
def widest(stages):
    """The config of the stage with the longest sequences, for which the engine is built, with the most branches."""
    longest = max((c for _, c in stages), key=lambda c: c.max_prompt_tokens + c.max_response_tokens)
    return replace(longest, n2=max(c.n2 for _, c in stages))


def warnings(stages, given):
    """Lines about what will not work, each with the key to change and a value."""
    context, out = getattr(given.config, "max_position_embeddings", None) or math.inf, []
    for name, c in stages:
        longest, room = c.max_prompt_tokens + c.max_response_tokens, context - c.max_prompt_tokens
        if longest > context:
            change = f"stages.{name}.max_response_tokens={room}" if room > 0 else "lower max_prompt_tokens as well"
            out.append(f"prompt and response of {name} take {longest} tokens, the context is {context}: {change}")
    cfg = widest(stages)
    if cfg.dtype == "float32":
        out.append("float32 does not run on a GPU, packed attention is bf16 there: dtype=auto")
    needed = max(host(given.config, given.world // cfg.replicate, cfg.lora_rank)) / GIB
    if given.host and needed > given.host:
        out.append(f"the ranks take {needed:.0f} GiB of host memory, there are {given.host:.0f}: the kernel kills a "
                   "rank without a message: a smaller model, or a machine with more")  # fmt: skip
    phase = {"awake": "log-prob passes beside the engine", "asleep": "the update"}
    for peak, what in misfits(cfg, given).items():
        change = " | ".join(remedies(cfg, given, peak)) or "a smaller model"
        where = f"{given.world} x {given.gpu.name} ({what}), the seconds are as if it did"
        out.append(f"{phase[peak]} will not fit on {where}: {change}")
    return out


def stage_report(name, cfg, given):
    """-> (lines about one stage, its expected hours)."""
    rounds, prompts, _, kept = batches(cfg, given.response, given.fork)
    n, trained = rounds * prompts, sum(b.count for b in kept)
    about = f"{n} prompts x {cfg.group_size} = {n * cfg.group_size} rollouts, {trained} of them trained on"
    lines = ["", f"{name}, one of {cfg.steps} steps: {about if rounds else f'{trained} rows'}"]
    lines += [f"  {b.count} sequences of {b.context} tokens given + {b.new} new" for b in kept]
    tokens, flat, loss = forwarded(kept), forwarded(kept, flat=True), sum(b.count * b.new for b in kept)
    share = f"{tokens / flat:.2f} of flat rows"
    lines.append(f"  a pass over them: {tokens} tokens forwarded ({share}), {loss} tokens with a loss")
    phases = step_phases(cfg, given)
    step = Phase("step", 0, *(sum(p[i] for p in phases) for i in range(2, 7)))
    table = [["", "sequences", "generated", "forward tokens", "PFLOP", "floor", "expected"]]
    for p in [*phases, step]:
        counts = [str(n or "") for n in p[1:4]]
        table.append([p.name, *counts, f"{p.flops / 1e15:.3g}", f"{p.floor:.1f} s", f"{p.expected:.1f} s"])
    floor, expected = (cfg.steps * s / 3600 for s in step[-2:])
    return [*lines, aligned(table), f"{cfg.steps} steps: floor {floor:.1f} h, expected {expected:.1f} h"], expected


def report(stages, given):
    """The whole plan as text, see `arguments`. ValueError for a model the arithmetic does not hold for."""
    config, gpu, world = given[:3]
    s, cfg = model_sizes(config), widest(stages)
    if s.linear < 0.95 * s.layers * s.block:  # experts, convolutions, state spaces
        raise ValueError(f"model: {config.model_type!r} is not dense, there is no plan for it")
    rates = f"{gpu.flops / 1e12:.0f} TFLOP/s, {gpu.memory} GiB, {gpu.bandwidth / 1e12:.3g} TB/s"
    stage_lines, hours = zip(*(stage_report(*stage, given) for stage in stages), strict=True)
    awake, asleep = memory(cfg, given).values()
    table = [[f"GiB of {gpu.memory} a GPU", "engine awake, log-prob pass", "engine asleep, update"]]
    table += [[k, f"{awake[k] / GIB:.1f}", f"{asleep[k] / GIB:.1f}"] for k in awake]
    tokens = round(awake["KV cache"] / engine_shard(cfg, config)[1])
    longest = cfg.max_prompt_tokens + cfg.max_response_tokens
    one, most, left = (b / 1e9 for b in disk(stages, config))
    start, save = (b / GIB for b in host(config, world // cfg.replicate, cfg.lora_rank))
    return "\n".join([
        f"{cfg.model}: {s.params / 1e6:.2f} M parameters, on {world} x {gpu.name} ({rates})",
        f"expected: at {MFU:.0%} of peak FLOP/s and {MBU:.0%} of bandwidth; "
        "these and all lengths are assumed (plan.py)",
        *sum(stage_lines, []),
        f"all stages: expected {sum(hours):.1f} h = {sum(hours) * world:.3g} GPU hours",
        "", aligned(table),
        f"KV cache: {tokens} tokens = {tokens // longest} sequences of {longest}"
        + f", for the {cfg.engine_tp} GPUs of an engine together" * (cfg.engine_tp > 1),
        f"micro_batch_tokens {cfg.micro_batch_tokens}, "
        f"activation checkpointing {'on' if cfg.activation_checkpointing else 'off'}",
        "", f"host memory: {start:.0f} GiB at the start, {save:.0f} GiB while a checkpoint is written, "
        f"{PROCESS / GIB:.0f} GiB of it assumed for each process",
        f"disk: {one:.3g} GB a checkpoint (12 B a trained parameter of state, 2 B a parameter of hf), "
        f"{most:.3g} GB at most, {left:.3g} GB at the end",
        *(f"WARNING: {w}" for w in warnings(stages, given)),
    ])  # fmt: skip


def arguments(argv):
    """Command line -> (stages with so many steps as max_steps leaves of them, Given). ValueError names the key."""
    own = {"gpu": "h100", "gpus": "8", "response": "0", "host": "0", "fork": "0.5"}
    own |= dict(a.partition("=")[::2] for a in argv if a.split("=")[0] in own)
    stages = load_config([a for a in argv if a.split("=")[0] not in own], usage=__doc__)
    first, most = stages[0][1], min(c.max_response_tokens for _, c in stages)
    limits = {"gpu": list(GPUS), "gpus": range(1, 1025), "response": range(most + 1), "host": range(10**6)}
    for key, allowed in limits.items():
        if own[key] not in map(str, allowed):
            names = ", ".join(allowed) if key == "gpu" else f"{allowed[0]} to {allowed[-1]}"
            raise ValueError(f"{key}: must be one of {names}, got {own[key]!r}")
    if int(own["gpus"]) % first.replicate:
        raise ValueError(f"replicate: {first.replicate} copies do not divide {own['gpus']} gpus")
    if not re.fullmatch(r"0?\.\d+|0", own["fork"]):
        raise ValueError(f"fork: must be a share below 1, as 0.5, got {own['fork']!r}")
    left = first.max_steps or math.inf
    for _, cfg in stages:
        if cfg.kind == "rl":
            cfg.steps = min(cfg.steps, left)
            left -= cfg.steps
    bed = toy.BEDS.get(first.model) or toy.bed_of(first.model)
    path = bed.folder if first.model in toy.BEDS else first.model
    unmade = bed and not os.path.exists(f"{path}/config.json")
    config = bed.config() if unmade else load_hf_config(path)  # the toy has a shape before it has a folder
    if wrong := tp_misfit(first.engine_tp, config, int(own["gpus"]) // first.replicate):
        raise ValueError(wrong)
    there = int(own["host"]) or (host_memory() if torch.cuda.is_available() else 0)
    reference = any(load_method(cfg, HOOKS).reference for _, cfg in stages)
    frozen = frozen_memory(first, config, int(own["gpus"])) if reference else 0
    numbers = int(own["gpus"]), int(own["response"]), frozen, there, float(own["fork"])
    return stages, Given(config, GPUS[own["gpu"]], *numbers)


def main(argv):
    """Print the plan of a config."""
    with one_line_errors():
        text = report(*arguments(argv))
    if os.environ.get("RANK", "0") == "0":
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
