"""How fast, and with how much memory: random weights of any shape, nothing downloaded, variants side by side in one run.

    python bench.py                                                    # SmolLM2-135M's shape on this machine, every part
    python bench.py --only update,head --shape 1.5b --rollouts 256 --mean 1000 --longest 4000 micro_batch_tokens=16384
    torchrun --nproc_per_node 8 bench.py --shape 7b --only update,score,sync activation_checkpointing=true
    python bench.py --only rollout model=DIR data=FILE.jsonl template=chat         # real prompts, text of real lengths

Parts: update (packed against padded to the longest), scaling (twice the tokens, twice the chunks), score (the log-prob pass,
with and without reuse_entropy_logp), head (chunked against naive, a process each), rollout, sync, verifier, balance. Variants
take turns, medians of --repeats turns; ratios are of medians. One table, one JSON line. key=value: settings of config.py.
"""

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import cure
from lib import data, toy
from lib import policy as policy_module
from lib.config import load_config
from lib.engine import Sampling, TorchEngine, VLLMEngine, request_seed
from lib.memory import forward_flops, peak_flops
from lib.policy import Policy, compute_dtype, pack, packed_length, partition
from lib.pool import VerifierPool
from lib.ranks import gather, init_distributed, leave
from loss import logp_and_entropy, policy_loss
from rollout import Rollout

PROMPT = 64  # tokens
PARTS = ("update", "scaling", "score", "head", "rollout", "sync", "verifier", "balance")
SHAPES = {  # of the published models' config.json; q = Qwen2, l = Llama
    "135m": ("llama", 576, 30, 9, 3, 1536, 49152, True),  # SmolLM2-135M: width, blocks, heads, kv heads, MLP, vocabulary, tied
    "0.5b": ("qwen2", 896, 24, 14, 2, 4864, 151936, True),  # Qwen2.5-0.5B
    "1.5b": ("qwen2", 1536, 28, 12, 2, 8960, 151936, True),  # Qwen2.5-Math-1.5B
    "7b": ("qwen2", 3584, 28, 28, 4, 18944, 152064, False),  # Qwen2.5-Math-7B
}


def shape_config(shape):
    """The HF config of one of SHAPES, of the toy, or of a folder with a config.json."""
    from transformers import AutoConfig

    if shape not in SHAPES:
        return data.toy_config() if shape == "toy" else cure.load_hf_config(shape)
    kind, width, blocks, heads, kv, inner, vocab, tied = SHAPES[shape]
    return AutoConfig.for_model(
        kind, hidden_size=width, num_hidden_layers=blocks, num_attention_heads=heads, num_key_value_heads=kv,
        intermediate_size=inner, vocab_size=vocab, tie_word_embeddings=tied, max_position_embeddings=16384,
        bos_token_id=None, eos_token_id=0,
    )  # fmt: skip


def random_model(config, folder):
    """An HF folder with random weights of this shape, and the toy's tokenizer: the engines want one."""
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    data.make_toy(f"{folder}/toy", n_train=1, n_heldout=1, n_sft=1)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{folder}/toy/{name}", folder)


def rollouts(n, mean, longest, vocab, prompt=PROMPT, seed=0):
    """n rollouts of random ids whose response lengths are log-normal (sigma 0.8), `mean` on average, at most `longest`: the
    distribution's quantiles in random order, since 16 draws can be far from it (seed 0: a mean of 139 for 200)."""
    rng, normal = random.Random(seed), statistics.NormalDist(np.log(mean) - 0.32, 0.8)
    lengths = [min(longest, max(1, round(np.exp(normal.inv_cdf((i + 0.5) / n))))) for i in range(n)]
    rng.shuffle(lengths)
    out = []
    for i, length in enumerate(lengths):
        ids = [rng.randrange(vocab) for _ in range(prompt + length)]
        r = Rollout(ids[:prompt], [], ids[prompt:], group=i // 4)
        r.advantage, r.old_logp = rng.choice([-1.0, 1.0]), np.full(length, -np.log(vocab), np.float32)  # as random weights say
        out.append(r)
    return out


class Stopwatch:
    """Turns of named variants -> medians of their seconds."""

    def __init__(self, repeats, rank):
        self.repeats, self.rank, self.seconds = repeats, rank, {}

    def turns(self, variants):
        """{name: function}, in turns, after one untimed turn each for caches, allocators and compilers."""
        for turn in tqdm(range(-1, self.repeats), desc=", ".join(variants)[:60], disable=None if self.rank == 0 else True):
            for name, run in variants.items():
                dist.barrier()
                start = time.perf_counter()
                run()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                dist.barrier()
                if turn >= 0:
                    self.seconds.setdefault(name, []).append(time.perf_counter() - start)

    def median(self, name):
        return statistics.median(self.seconds[name])

    def ratio(self, a, b):
        """Median of a over median of b."""
        return self.median(a) / self.median(b)


# -------------------------------------------------------------------------------------------------------------------- trainer
def micro_batches(rows, cfg, rank, world):
    return [[rows[i] for i in mb] for mb in partition([packed_length(r) for r in rows], world, cfg.micro_batch_tokens)[rank]]


def loss_of(rows):
    """PPO-clip loss with a token mean over all of `rows`, for one of their micro-batches."""
    n_tokens = sum(len(r.response_ids) for r in rows)

    def loss_fn(mb, logp, entropy):
        old = torch.from_numpy(np.concatenate([np.empty(0, np.float32), *(r.old_logp for r in mb)])).to(logp.device)
        lengths = torch.tensor([len(r.response_ids) for r in mb], dtype=torch.long)
        advantage = torch.tensor([r.advantage for r in mb]).repeat_interleave(lengths).to(logp.device)
        return policy_loss(logp, old, advantage)[0].sum() / n_tokens

    return loss_fn


def padded_pack(longest, rows, device, bucket=0):
    """policy.pack, with every sequence padded to `longest`: what an (n, longest) batch computes, to the same numbers."""
    ids, pos, index, targets = [], [], [], []
    for i, r in enumerate(rows):
        seq = (r.prompt_ids + r.prefix_ids + r.response_ids)[:-1]
        first = packed_length(r) - len(r.response_ids)
        index += range(i * longest + first, i * longest + packed_length(r))
        targets += r.response_ids
        ids += seq + [0] * (longest - len(seq))
        pos += range(longest)
    if not rows:
        return pack(rows, device)
    cu = torch.arange(0, len(ids) + 1, longest, dtype=torch.int32, device=device)
    as_tensor = {"input_ids": [ids], "position_ids": [pos], "index": index, "targets": targets}
    return {k: torch.tensor(v, device=device) for k, v in as_tensor.items()} | {"cu_seqlens": cu, "max_len": longest}


def optimizer_step(b, rows, norms, name, pack=None, mine=None, chunk=None):
    """A function that takes one optimizer step on `rows`, lr 0 so that the weights stay, and notes its gradient norm."""
    mine = mine or micro_batches(rows, b.cfg, b.rank, b.world)
    packing = policy_module.pack

    def run():
        policy_module.pack, b.policy.model.chunk = pack or packing, chunk or b.cfg.head_chunk
        try:
            norms[name] = b.policy.update(mine, loss_of(rows), 1.0, 0.0, 0.0)[0]
        finally:
            policy_module.pack, b.policy.model.chunk = packing, b.cfg.head_chunk

    return run


def bench_update(b):
    """The optimizer step, packed against padded to the longest of all: in micro-batches of as many sequences as the budget
    holds."""
    norms, flat, longest = {}, sum(micro_batches(b.rows, b.cfg, b.rank, b.world), []), max(map(packed_length, b.rows))
    k = b.cfg.micro_batch_tokens // longest
    padded = [flat[i : i + k] for i in range(0, len(flat), k)]
    padded += [[]] * (max(gather([len(padded)])) - len(padded))
    variants = {"update": optimizer_step(b, b.rows, norms, "packed")}
    if not b.cfg.compile:
        packing = partial(padded_pack, longest)
        variants["update, padded to the longest"] = optimizer_step(b, b.rows, norms, "padded", packing, padded)
    b.clock.turns(variants)
    b.row("update", flops=3 * b.flops)
    if not b.cfg.compile:
        b.row("update, padded to the longest")
        b.note("update packed / padded, tokens/s", b.clock.ratio("update, padded to the longest", "update"))
        b.note("gradient norm padded / packed - 1", norms["padded"] / norms["packed"] - 1)


def bench_scaling(b):
    """A quarter of the rollouts: twice the tokens (the same lengths again), twice the chunks of the head."""
    rows, norms = b.rows[: max(1, len(b.rows) // 4)], {}
    b.clock.turns({"once": optimizer_step(b, rows, norms, "once"),
                   "twice the tokens": optimizer_step(b, rows + rows, norms, "twice"),
                   "half the chunk": optimizer_step(b, rows, norms, "half", chunk=b.cfg.head_chunk // 2)})  # fmt: skip
    b.note("update, seconds for twice the tokens / once", b.clock.ratio("twice the tokens", "once"))
    b.note("update, seconds with half the head_chunk / whole", b.clock.ratio("half the chunk", "once"))
    b.note("gradient norm with half the head_chunk / whole - 1", norms["half"] / norms["once"] - 1)


def bench_score(b):
    """The log-prob pass over all rollouts, and over the branches alone (3 of 4, as reuse_entropy_logp leaves them)."""
    branches = [r for i, r in enumerate(b.rows) if i % 4]
    cuts = {name: micro_batches(rows, b.cfg, b.rank, b.world) for name, rows in (("all", b.rows), ("branches", branches))}
    b.clock.turns({"log-prob pass": lambda: b.policy.score(cuts["all"], 1.0),
                   "log-prob pass, reuse_entropy_logp": lambda: b.policy.score(cuts["branches"], 1.0)})  # fmt: skip
    b.row("log-prob pass", flops=b.flops)
    ratio = b.clock.ratio("log-prob pass, reuse_entropy_logp", "log-prob pass")
    b.note("log-prob pass, seconds with reuse_entropy_logp / without", ratio)


def bench_sync(b):
    """Full weights from the trainer into the engine."""
    engine = next(iter(b.engines().values()))
    engine.sleep()

    def sync():
        engine.sleep()
        engine.wake()
        engine.sync(b.policy.named_full())

    name = f"sleep, wake, sync ({type(engine).__name__})"
    b.clock.turns({name: sync})
    b.note(f"{name}, seconds", b.clock.median(name))


# ----------------------------------------------------------------------------------------------------------------------- head
def head_once(kind, T, D, V, chunk, repeats):
    """Log-prob, entropy and backward of one head, alone in this process -> median seconds, peak GiB above the inputs."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    hidden = torch.randn(T, D, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, D, device=device, dtype=dtype).div_(D**0.5).requires_grad_()
    tokens = torch.randint(V, (T,), device=device)
    before, seconds = peak_gib(device), []
    for _ in range(repeats):
        start = time.perf_counter()
        if kind == "chunked":
            logp, _ = logp_and_entropy(hidden, weight, tokens, 1.0, chunk)
        else:
            logq = (hidden @ weight.t()).float().log_softmax(-1)
            logp = logq.gather(-1, tokens[:, None])[:, 0]
            with torch.no_grad():
                (-logq.exp() * logq).sum(-1)  # the entropy
        logp.sum().backward()
        hidden.grad = weight.grad = None
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds[1:] or seconds), "gib": peak_gib(device) - before}


def peak_gib(device):
    """The most memory so far: of the GPU, or of this process (Linux; ru_maxrss would start at the parent's)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("VmHWM")) / 2**20


def bench_head(b):
    """Chunked against naive: seconds, and peak memory above inputs and weights; a process for each, in turns."""
    if b.rank:
        return
    found = {"chunked": [], "naive": []}
    for _ in tqdm(range(b.args.repeats), desc="head", disable=None):
        for kind, seen in found.items():
            job = {"kind": kind, "T": b.args.head_tokens, "D": b.config.hidden_size, "V": b.config.vocab_size,
                   "chunk": b.cfg.head_chunk, "repeats": 3}  # fmt: skip
            script = "import json, sys; from tools import bench; print(json.dumps(bench.head_once(**json.loads(sys.argv[1]))))"
            p = subprocess.run([sys.executable, "-c", script, json.dumps(job)], stdout=subprocess.PIPE, text=True, check=True,
                               cwd=toy.HERE)  # fmt: skip
            seen.append(json.loads(p.stdout.splitlines()[-1]))
    middle = {k: {x: statistics.median(s[x] for s in seen) for x in ("seconds", "gib")} for k, seen in found.items()}
    for k, m in middle.items():
        b.note(f"head {k}, {b.args.head_tokens} x {b.config.vocab_size}: seconds", m["seconds"])
        b.note(f"head {k}, {b.args.head_tokens} x {b.config.vocab_size}: peak GiB", m["gib"])
    b.note("head chunked / naive, seconds", middle["chunked"]["seconds"] / middle["naive"]["seconds"])
    if middle["naive"]["gib"]:  # 0: less than the process had used before
        b.note("head chunked / naive, peak memory", middle["chunked"]["gib"] / middle["naive"]["gib"])


# ------------------------------------------------------------------------------------------------------------------- rollouts
def bench_rollout(b):
    """Round 1 samples n1 responses a prompt; round 2 branches n2 times off each at its middle, as CURE does: with vLLM's prefix
    cache warm from round 1, with it cleared, and on the torch engine. Tokens/s of generated tokens and rank."""
    cfg, rng = b.cfg, random.Random(1)
    sampling = Sampling(cfg.max_response_tokens)
    prompts = [[rng.randrange(2, 25) for _ in range(64)] for _ in range(cfg.prompts_per_step)]
    if b.args.real:
        tokenizer, _ = cure.load_tokenizer(cfg.model)
        loaded, _ = data.load_prompts(cfg.data, tokenizer, cfg.template, cfg.max_prompt_tokens, limit=cfg.prompts_per_step)
        prompts = [p.ids for p in loaded]
    for engine in b.engines().values():
        engine.sleep()
        engine.wake()
        engine.sync(b.policy.named_full())
    speeds = {}

    def generate(label, engine, contexts, n, *seed):
        start = time.perf_counter()
        out = engine.generate(contexts, n, sampling, [request_seed("bench", i, *seed) for i in range(len(contexts))])
        spent = time.perf_counter() - start
        speeds.setdefault(label, []).append(sum(len(c.ids) for cs in out for c in cs) / spent)
        return out

    for turn in tqdm(range(b.args.repeats), desc="rollout", disable=None if b.rank == 0 else True):
        for name, engine in b.engines().items():
            base = generate(f"{name} round 1", engine, prompts, cfg.n1, turn)
            forks = [p + c.ids[: len(c.ids) // 2] for p, cs in zip(prompts, base, strict=True) for c in cs]
            if name == "vllm":
                generate("vllm round 2, prefix cache warm", engine, forks, cfg.n2, turn, "branch")
                engine.llm.reset_prefix_cache()
            label = f"{name} round 2" + (", prefix cache cleared" if name == "vllm" else "")
            generate(label, engine, forks, cfg.n2, turn, "branch")
    for label, values in speeds.items():
        b.note(f"{label}, generated tokens/s", statistics.median(values))


# --------------------------------------------------------------------------------------------------------------- the small ones
def bench_verifier(b):
    """16,384 ordinary rows: a round of 1024 prompts x 16."""
    rng, pool = random.Random(0), VerifierPool()
    filler = "We add the two numbers and simplify the result step by step. " * 40
    answers = [(rng.randrange(1000), rng.randrange(1000)) for _ in range(16384)]
    rows = {
        "dapo": [(f"{filler}\nAnswer: {a}", str(g)) for a, g in answers],
        "boxed": [(f"{filler} \\boxed{{{a}}}", str(g)) for a, g in answers],
    }
    b.clock.turns({f"verifier {k}": lambda k=k, v=v: pool.verdicts(v, k) for k, v in rows.items()})
    for k in rows:
        b.note(f"verifier {k}, seconds for 16384 rows of 2,500 characters", b.clock.median(f"verifier {k}"))


def bench_balance(b):
    """Tokens of the fullest rank over the mean, 512 rollouts in one minibatch; and had they been dealt out in turn."""
    lengths = [packed_length(r) for r in rollouts(512, b.args.mean, b.args.longest, 1000)]
    for world in (2, 8):
        loads = [sum(lengths[i] for mb in rank for i in mb) for rank in partition(lengths, world, b.cfg.micro_batch_tokens)]
        b.note(f"balance of {world} ranks, most / mean tokens, 512 rollouts", max(loads) / statistics.mean(loads))
        dealt = [sum(lengths[rank::world]) for rank in range(world)]
        b.note(f"balance of {world} ranks, dealt out in turn", max(dealt) / statistics.mean(dealt))


class Bench:
    """What the parts share, and the lines they leave."""

    def __init__(self, args, cfg, config, path, rank, world, device):
        self.args, self.cfg, self.config, self.path = args, cfg, config, path
        self.rank, self.world, self.device = rank, world, device
        self.clock, self.notes, self._engines = Stopwatch(args.repeats, rank), {}, None
        self.rows = rollouts(args.rollouts, args.mean, args.longest, config.vocab_size)
        lengths = [packed_length(r) for r in self.rows]
        self.tokens, self.trained = sum(lengths), sum(len(r.response_ids) for r in self.rows)
        self.flops = forward_flops(config, lengths, self.trained)

    @property
    def policy(self):
        if not hasattr(self, "_policy"):
            self._policy = Policy(self.cfg, self.path, self.device)
        return self._policy

    def engines(self):
        """The engines that can run here, vLLM first."""
        if self._engines is None:
            dtype, longest = compute_dtype(self.cfg, self.device), self.cfg.max_prompt_tokens + self.cfg.max_response_tokens
            self._engines = {}
            try:
                self._engines["vllm"] = VLLMEngine(self.cfg, self.path, self.device, dtype, {0}, longest, 0.4)
            except ValueError as e:
                self.print(e)
            if self.device.type == "cpu" or not self._engines:
                self._engines["torch"] = TorchEngine(self.cfg, self.path, self.device, dtype, {0})
        return self._engines

    def print(self, *text):
        if self.rank == 0:
            print(*text, file=sys.stderr)

    def row(self, name, flops=0):
        """Response tokens a second and rank, and what the hardware makes of it."""
        seconds = self.clock.median(name)
        self.note(f"{name}, response tokens/s and rank", self.trained / seconds / self.world)
        if flops:
            self.note(f"{name}, TFLOP/s and rank", flops / seconds / self.world / 1e12)
            if peak := peak_flops():
                self.note(f"{name}, MFU", flops / seconds / self.world / peak)

    def note(self, name, value):
        self.notes[name] = float(f"{value:.4g}")


def main(argv):
    """The parts of --only, one after the other: a table and a JSON line on rank 0."""
    parser = argparse.ArgumentParser(prog="bench.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", default="135m", help=f"{', '.join(SHAPES)}, toy, or a folder with a config.json")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rollouts", type=int, default=16)
    parser.add_argument("--mean", type=float, default=200, help="tokens of a response")
    parser.add_argument("--longest", type=int, default=1000)
    parser.add_argument("--head-tokens", type=int, default=4096)
    args, rest = parser.parse_known_args(argv)
    if unknown := set(args.only.split(",")) - set(PARTS):
        parser.error(f"--only: {', '.join(sorted(unknown))}: the parts are {', '.join(PARTS)}")
    args.real = any(o.startswith("model=") for o in rest)
    small = ["n1=2", "n2=3", "prompts_per_step=4", "prompts_per_minibatch=4", "max_prompt_tokens=256", "max_response_tokens=64",
             "micro_batch_tokens=4096"]  # fmt: skip
    (_, cfg), *_ = load_config([*([] if args.real else small), *rest])
    if args.longest + PROMPT > cfg.micro_batch_tokens:
        parser.error(f"--longest: {args.longest} and a prompt of {PROMPT} are over micro_batch_tokens={cfg.micro_batch_tokens}")
    rank, world, device = init_distributed()
    with tempfile.TemporaryDirectory() as tmp:
        path = cfg.model if args.real else gather([tmp])[0]
        config = cure.load_hf_config(path) if args.real else shape_config(args.shape)
        if not args.real and rank == 0:
            random_model(config, path)
        dist.barrier()
        b = Bench(args, cfg, config, path, rank, world, device)
        parts = args.only.split(",")
        if {"rollout", "sync"} & set(parts):
            b.engines()  # vLLM measures free memory: before the trainer's model
        for part in parts:
            globals()[f"bench_{part}"](b)
        dist.barrier()
    if rank == 0:
        width = max(map(len, b.notes), default=0)
        for name, value in b.notes.items():
            print(f"{name:{width}s}  {value:>12,.4g}")
        meta = {"shape": path if args.real else args.shape, "ranks": world, "threads": torch.get_num_threads(),
                "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu", "torch": torch.__version__,
                "rollouts": args.rollouts, "tokens": b.tokens, "response tokens": b.trained,
                "longest": max(map(packed_length, b.rows)),
                "micro_batch_tokens": cfg.micro_batch_tokens, "repeats": args.repeats}  # fmt: skip
        print(json.dumps(meta | b.notes))


if __name__ == "__main__":
    leave(main, sys.argv[1:])
