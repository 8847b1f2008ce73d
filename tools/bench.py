"""How fast, and with how much memory: random weights of any shape, nothing downloaded, variants side by side.

    python -m tools.bench                                    # SmolLM2-135M's shape on this machine, every part
    python -m tools.bench --only update,head --shape 1.5b --rollouts 256 --mean 1000 --longest 4000
    torchrun --nproc_per_node 8 -m tools.bench --shape 7b --only update,score,sync activation_checkpointing=true
    python -m tools.bench --only rollout model=DIR data=FILE.jsonl template=chat    # real prompts, text of real lengths

Parts: update (packed against padded to the longest), scaling (twice the tokens, twice the chunks), score (log-prob
pass), head (chunked against naive), rollout, sync, verifier, balance; memory, on its own: its peak is the process's.
Variants take turns. Numbers are medians of --repeats turns, ratios are of medians. key=value: as in lib/config.py.
"""

import argparse
import json
import multiprocessing
import random
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cached_property, partial
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

from lib import data, toy
from lib.config import load_config
from lib.engine import Sampling, TorchEngine, VLLMEngine, request_seed
from lib.memory import GIB, forward_flops, peak_flops, peak_memory, train_flops, trainer_memory
from lib.policy import Policy, compute_dtype, pack, packed_length, partition
from lib.pool import VerifierPool
from lib.ranks import gather, init_distributed, leave, one_line_errors, timed
from lib.weights import load_hf_config, load_tokenizer
from loss import HEAD_CHUNK, logp_and_entropy, policy_loss
from rollout import Rollout, token_column

PROMPT = 64  # tokens
PARTS = ("update", "scaling", "score", "head", "rollout", "sync", "verifier", "balance", "memory")
SHAPES = {  # of the published models' config.json: width, blocks, heads, kv heads, MLP, vocabulary, tied
    "135m": ("llama", 576, 30, 9, 3, 1536, 49152, True),  # SmolLM2-135M
    "0.5b": ("qwen2", 896, 24, 14, 2, 4864, 151936, True),  # Qwen2.5-0.5B
    "1.5b": ("qwen2", 1536, 28, 12, 2, 8960, 151936, True),  # Qwen2.5-Math-1.5B
    "7b": ("qwen2", 3584, 28, 28, 4, 18944, 152064, False),  # Qwen2.5-Math-7B
}


def shape_config(shape):
    """The HF config of one of SHAPES, or of the toy."""
    if shape == "toy":
        return toy.toy_config()
    kind, width, blocks, heads, kv, inner, vocab, tied = SHAPES[shape]
    return AutoConfig.for_model(
        kind, hidden_size=width, num_hidden_layers=blocks, num_attention_heads=heads, num_key_value_heads=kv,
        intermediate_size=inner, vocab_size=vocab, tie_word_embeddings=tied, max_position_embeddings=16384,
        bos_token_id=None, eos_token_id=0,
    )  # fmt: skip


def random_model(config, folder, device, last_norm=1.0):
    """An HF folder with random weights of this shape, and the toy's tokenizer: the engines want one. last_norm: the
    weights of the norm before the head, to which logits are proportional."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng([device] if cuda else []), device:
        torch.manual_seed(0)
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if cuda else torch.float32)
    torch.nn.init.constant_(lm.base_model.norm.weight, last_norm)
    lm.save_pretrained(folder)
    toy.make_toy(f"{folder}/toy", n_train=1, n_heldout=1, n_sft=1)
    load_tokenizer(f"{folder}/toy")[0].save_pretrained(folder)


def rollouts(n, mean, longest, vocab):
    """n rollouts of random ids whose response lengths are log-normal (sigma 0.8), `mean` on average, at most `longest`.
    They are the distribution's quantiles in random order, since 16 draws can be far from it (a mean of 139 for 200)."""
    rng, normal = random.Random(0), statistics.NormalDist(np.log(mean) - 0.32, 0.8)
    lengths = [min(longest, max(1, round(np.exp(normal.inv_cdf((i + 0.5) / n))))) for i in range(n)]
    rng.shuffle(lengths)
    out = []
    for i, length in enumerate(lengths):
        ids = [rng.randrange(vocab) for _ in range(PROMPT + length)]
        out.append(Rollout(ids[:PROMPT], [], ids[PROMPT:], group=i // 4, advantage=rng.choice([-1.0, 1.0])))
        out[-1].old_logp = np.full(length, -np.log(vocab), np.float32)  # as random weights say
    return out


class Bench:
    """What the parts share: model, engines, rollouts, a clock, and `notes`, the lines that they leave."""

    def __init__(self, args, cfg, config, path):
        self.args, self.cfg, self.config, self.path, self.notes = args, cfg, config, path, {}
        self.rank, self.world, self.device = init_distributed()
        self.rows = rollouts(args.rollouts, args.mean, args.longest, config.vocab_size)
        self.lengths = [packed_length(r) for r in self.rows]
        self.trained = sum(len(r.response_ids) for r in self.rows)

    @cached_property
    def policy(self):
        return Policy(self.cfg, self.path, self.device)

    @cached_property
    def engines(self):
        """The engines that can run here, vLLM first."""
        cfg, found = self.cfg, {}
        where = cfg, self.path, self.device, compute_dtype(cfg, self.device), {0}
        try:
            found["vllm"] = VLLMEngine(*where, cfg.max_prompt_tokens + cfg.max_response_tokens, 0.4)
        except ValueError as e:
            print(e if self.rank == 0 else "", file=sys.stderr)
        if self.device.type == "cpu" or not found:
            found["torch"] = TorchEngine(*where)
        return found

    def progress(self, turns, what):
        return tqdm(turns, desc=what[:60], disable=None if self.rank == 0 else True)

    def turns(self, variants):
        """{name: function} -> {name: median seconds}. They run in turns, after one untimed turn for caches, allocators
        and compilers."""
        seconds = {name: [] for name in variants}
        for turn in self.progress(range(-1, self.args.repeats), ", ".join(variants)):
            for name, run in variants.items():
                dist.barrier()
                with timed(spent := {}, name):
                    run()
                    dist.barrier()
                seconds[name] += spent.values() if turn >= 0 else []
        return {name: statistics.median(s) for name, s in seconds.items()}

    def note(self, name, value):
        self.notes[name] = float(f"{value:.4g}")

    def speed(self, name, seconds, work=None):
        """Note response tokens a second and rank, and the FLOP/s of `work`, a function of lib/memory.py, over them."""
        self.note(f"{name}, response tokens/s and rank", self.trained / seconds / self.world)
        if work:
            flops = work(self.config, self.lengths, self.trained, self.cfg.lora_rank) / seconds / self.world
            self.note(f"{name}, TFLOP/s and rank", flops / 1e12)
            if peak := peak_flops():
                self.note(f"{name}, MFU", flops / peak)


# ------------------------------------------------------------------------------------------------------------ trainer
def micro_batches(rows, cfg, rank, world, padded=0):
    """This rank's micro-batches of one minibatch. padded: cut them as if every sequence had so many tokens."""
    plan = partition([padded or packed_length(r) for r in rows], world, cfg.micro_batch_tokens)
    return [[rows[i] for i in mb] for mb in plan[rank]]


def loss_of(rows):
    """PPO-clip loss with a token mean over all of `rows`, for one of their micro-batches."""
    n_tokens = sum(len(r.response_ids) for r in rows)

    def loss_fn(mb, logp, entropy):
        old = token_column(mb, lambda r: r.old_logp, logp.device)
        lengths = torch.tensor([len(r.response_ids) for r in mb], dtype=torch.long)
        advantage = torch.tensor([r.advantage for r in mb]).repeat_interleave(lengths).to(logp.device)
        return policy_loss(logp, old, advantage)[0].sum() / n_tokens

    return loss_fn


def padded_pack(longest, rows, device, bucket=0, share=False):
    """policy.pack with every sequence padded to `longest`: what an (n, longest) batch computes, to the same numbers."""
    padding = [[0] * (longest - packed_length(r)) for r in rows]
    both = list(zip(rows, padding, strict=True))
    out = pack([replace(r, response_ids=r.response_ids + p) for r, p in both], device, bucket)
    real = [x for r, p in both for x in [True] * len(r.response_ids) + [False] * len(p)]
    real = torch.tensor(real, dtype=torch.bool, device=device)
    return out | {key: out[key][real] for key in ("index", "targets")}


def optimizer_step(b, rows, norms, name, chunk=HEAD_CHUNK, packing=pack, padded=0):
    """A function that takes one optimizer step on `rows` and notes its gradient norm. Its lr is 0: the weights stay."""
    mine = micro_batches(rows, b.cfg, b.rank, b.world, padded)

    def run():
        with patch("lib.policy.pack", packing), patch.object(b.policy.model, "chunk", chunk):
            norms[name] = b.policy.update(mine, loss_of(rows), 1.0, 0.0, 0.0)[0]

    return run


def bench_update(b):
    """The optimizer step, packed against padded to the longest of all: in micro-batches of as many sequences as the
    budget holds."""
    norms, longest, wide = {}, max(b.lengths), "update, padded to the longest"
    padding = partial(padded_pack, longest)
    seconds = b.turns({
        "update": optimizer_step(b, b.rows, norms, "packed"),
        wide: optimizer_step(b, b.rows, norms, "padded", packing=padding, padded=longest),
    })  # fmt: skip
    b.speed("update", seconds["update"], train_flops)
    b.speed(wide, seconds[wide])
    b.note("update packed / padded, tokens/s", seconds[wide] / seconds["update"])
    b.note("gradient norm padded / packed - 1", norms["padded"] / norms["packed"] - 1)


def bench_scaling(b):
    """A quarter of the rollouts: twice the tokens (the same lengths again), twice the chunks of the head."""
    rows, norms = b.rows[: max(1, len(b.rows) // 4)], {}
    seconds = b.turns({
        "once": optimizer_step(b, rows, norms, "once"),
        "twice the tokens": optimizer_step(b, rows + rows, norms, "twice"),
        "half the chunk": optimizer_step(b, rows, norms, "half", chunk=HEAD_CHUNK // 2),
    })  # fmt: skip
    b.note("update, seconds for twice the tokens / once", seconds["twice the tokens"] / seconds["once"])
    b.note("update, seconds with half the head_chunk / whole", seconds["half the chunk"] / seconds["once"])
    b.note("gradient norm with half the head_chunk / whole - 1", norms["half"] / norms["once"] - 1)


def bench_score(b):
    """The log-prob pass over all rollouts."""
    mine = micro_batches(b.rows, b.cfg, b.rank, b.world)
    b.speed("log-prob pass", b.turns({"score": partial(b.policy.score, mine, 1.0)})["score"], forward_flops)


def sync(b, engine):
    """Full weights from the trainer into the engine."""
    engine.sleep()
    engine.wake()
    engine.sync(b.policy.named_full())


def bench_sync(b):
    engine = next(iter(b.engines.values()))
    name = f"sleep, wake, sync ({type(engine).__name__})"
    b.note(f"{name}, seconds", b.turns({name: partial(sync, b, engine)})[name])


def bench_memory(b):
    """Peak memory above that of the imports, and what lib/memory.py expects of an update, which on a GPU is in bf16."""
    before, step = peak_memory(), optimizer_step(b, b.rows, {}, "packed")
    b.note("trained parameters", sum(p.numel() for p in b.policy.trained.values()))
    b.note("trainer's start, GiB", peak_memory() - before)
    step(), step()
    b.note("update, GiB", peak_memory() - before)
    for name, size in trainer_memory(b.cfg, b.config, b.world)[1].items():
        b.note(f"planned for bf16, {name}, GiB", size / GIB)


# --------------------------------------------------------------------------------------------------------------- head
def head_once(kind, T, D, V, chunk):
    """Log-prob, entropy and backward of one head, alone in this process -> median seconds, GiB above the inputs."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    hidden = torch.randn(T, D, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, D, device=device, dtype=dtype).div_(D**0.5).requires_grad_()
    tokens = torch.randint(V, (T,), device=device)
    before, seconds = peak_memory(), []
    for _ in range(3):
        with timed(spent := {}, kind):
            if kind == "chunked":
                logp, _ = logp_and_entropy(hidden, weight, tokens, 1.0, chunk)
            else:
                logq = (hidden @ weight.t()).float().log_softmax(-1)
                logp = logq.gather(-1, tokens[:, None])[:, 0]
                with torch.no_grad():
                    (-logq.exp() * logq).sum(-1)  # the entropy
            logp.sum().backward()
            hidden.grad = weight.grad = None
        seconds += spent.values()
    return statistics.median(seconds[1:]), peak_memory() - before


def bench_head(b):
    """Chunked against naive: seconds, and peak memory above inputs and weights, each in a process of its own."""
    if b.rank:
        return
    T, V, found = b.args.head_tokens, b.config.vocab_size, {"chunked": [], "naive": []}
    alone = multiprocessing.get_context("forkserver")  # other children count this process's peak as theirs
    with ProcessPoolExecutor(1, mp_context=alone, max_tasks_per_child=1) as processes:
        for _ in b.progress(range(b.args.repeats), "head"):
            for kind, seen in found.items():
                job = processes.submit(head_once, kind, T, b.config.hidden_size, V, HEAD_CHUNK)
                seen.append(job.result())
    for kind, seen in found.items():
        found[kind] = seconds, gib = [statistics.median(x) for x in zip(*seen, strict=True)]
        b.note(f"head {kind}, {T} x {V}: seconds", seconds)
        b.note(f"head {kind}, {T} x {V}: peak GiB", gib)
    (seconds, gib), (naive_seconds, naive_gib) = found.values()
    b.note("head chunked / naive, seconds", seconds / naive_seconds)
    if naive_gib:  # 0: less than the process had used before
        b.note("head chunked / naive, peak memory", gib / naive_gib)


# ----------------------------------------------------------------------------------------------------------- rollouts
def bench_rollout(b):
    """Round 1 samples n1 responses a prompt; round 2 branches n2 times off each at its middle, as CURE does. Generated
    tokens a second and rank: with vLLM's prefix cache warm from round 1, with it cleared, and on the torch engine."""
    cfg, rng, speeds = b.cfg, random.Random(1), {}
    prompts = [[rng.randrange(2, 25) for _ in range(PROMPT)] for _ in range(cfg.prompts_per_step)]
    if b.args.real:
        how = load_tokenizer(cfg.model)[0], cfg.template, cfg.max_prompt_tokens
        prompts = [p.ids for p in data.load_prompts(cfg.data, *how, limit=cfg.prompts_per_step)[0]]
    for engine in b.engines.values():
        sync(b, engine)

    def generate(label, engine, contexts, n, *seed):
        seeds = [request_seed("bench", i, *seed) for i in range(len(contexts))]
        with timed(spent := {}, label):
            out = engine.generate(contexts, n, Sampling(cfg.max_response_tokens), seeds)
        (seconds,) = spent.values()
        speeds.setdefault(label, []).append(sum(len(c.ids) for cs in out for c in cs) / seconds)
        return out

    for turn in b.progress(range(b.args.repeats), "rollout"):
        for name, engine in b.engines.items():
            base = generate(f"{name} round 1", engine, prompts, cfg.n1, turn)
            forks = [p + c.ids[: len(c.ids) // 2] for p, cs in zip(prompts, base, strict=True) for c in cs]
            label = f"{name} round 2"
            if name == "vllm":
                generate(f"{label}, prefix cache warm", engine, forks, cfg.n2, turn, "branch")
                engine.llm.reset_prefix_cache()
                label += ", prefix cache cleared"
            generate(label, engine, forks, cfg.n2, turn, "branch")
    for label, values in speeds.items():
        b.note(f"{label}, generated tokens/s", statistics.median(values))


# ------------------------------------------------------------------------------------------------------ the small ones
def bench_verifier(b):
    """16,384 ordinary rows: a round of 1024 prompts x 16."""
    rng, pool = random.Random(0), VerifierPool()
    filler = "We add the two numbers and simplify the result step by step. " * 40
    answers = [(rng.randrange(1000), str(rng.randrange(1000))) for _ in range(16384)]
    for name, form in (("dapo", "{}\nAnswer: {}"), ("boxed", "{} \\boxed{{{}}}")):
        rows = [(form.format(filler, answer), gold) for answer, gold in answers]
        seconds = b.turns({name: partial(pool.verdicts, rows, name)})
        b.note(f"verifier {name}, seconds for 16384 rows of 2,500 characters", seconds[name])


def bench_balance(b):
    """Tokens of the fullest rank over the mean, 512 rollouts in one minibatch; and had they been dealt out in turn."""
    lengths = [packed_length(r) for r in rollouts(512, b.args.mean, b.args.longest, 1000)]
    for world in (2, 8):
        plan = partition(lengths, world, b.cfg.micro_batch_tokens)
        loads = [sum(lengths[i] for mb in rank for i in mb) for rank in plan]
        b.note(f"balance of {world} ranks, most / mean tokens, 512 rollouts", max(loads) / statistics.mean(loads))
        dealt = [sum(lengths[rank::world]) for rank in range(world)]
        b.note(f"balance of {world} ranks, dealt out in turn", max(dealt) / statistics.mean(dealt))


def arguments(argv):
    """Command line -> (options, settings). ValueError names the option or the key."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", default="135m", choices=[*SHAPES, "toy"])
    parser.add_argument("--only", default=",".join(PARTS[:-1]), help="parts, with commas")
    parser.add_argument("--mean", type=float, default=200, help="tokens of a response")
    for name, default in {"longest": 1000, "rollouts": 16, "repeats": 5, "head-tokens": 4096}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args, rest = parser.parse_known_args(argv)
    args.parts = args.only.split(",")
    if unknown := set(args.parts) - set(PARTS):
        raise ValueError(f"--only: {', '.join(sorted(unknown))}: the parts are {', '.join(PARTS)}")
    args.real = any(o.startswith("model=") for o in rest)
    small = ["n1=2", "n2=3", "prompts_per_step=4", "prompts_per_minibatch=4", "max_prompt_tokens=256",
             "max_response_tokens=64", "micro_batch_tokens=4096"]  # fmt: skip
    (_, cfg), *_ = load_config([*([] if args.real else small), *rest])
    if args.longest + PROMPT > (budget := cfg.micro_batch_tokens):
        raise ValueError(f"--longest: {args.longest} and a prompt of {PROMPT} are over micro_batch_tokens={budget}")
    return args, cfg


def main(argv):
    """The parts of --only, one after the other: a table and a JSON line on rank 0."""
    with one_line_errors():
        args, cfg = arguments(argv)
    rank, world, device = init_distributed()
    with tempfile.TemporaryDirectory() as tmp:
        path = cfg.model if args.real else gather([tmp])[0]
        config = load_hf_config(path) if args.real else shape_config(args.shape)
        if rank == 0 and not args.real:
            random_model(config, path, device)
        dist.barrier()
        b = Bench(args, cfg, config, path)
        if {"rollout", "sync"} & set(args.parts):
            _ = b.engines  # vLLM measures free memory: before the trainer's model
        for part in args.parts:
            globals()[f"bench_{part}"](b)
        dist.barrier()
    if rank == 0:
        width = max(map(len, b.notes), default=0)
        for name, value in b.notes.items():
            print(f"{name:{width}s}  {value:>12,.4g}")
        meta = {
            "shape": path if args.real else args.shape, "ranks": world, "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu", "torch": torch.__version__,
            "rollouts": args.rollouts, "tokens": sum(b.lengths), "response tokens": b.trained,
            "longest": max(b.lengths), "micro_batch_tokens": cfg.micro_batch_tokens, "repeats": args.repeats,
        }  # fmt: skip
        print(json.dumps(meta | b.notes))


if __name__ == "__main__":
    leave(main, sys.argv[1:])
