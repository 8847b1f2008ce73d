"""Rollouts: two engines that generate, the critical token to branch at, and the rounds of dynamic sampling.

Symbols: P prompts · n1 base responses a prompt · n2 branches a base response · G = n1 (1 + n2) rollouts a group ·
N = P G rollouts · T tokens of one response · V vocabulary · t* the position where a branch leaves its parent.
A base rollout is prompt + response; a branch is prompt + prefix (its parent's response[:t*]) + response (new tokens).
"""

import contextlib
import hashlib
import os
import random
import time
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from policy import load_lm
from reward import overlong_penalty


@dataclass
class Rollout:
    """One trained-on sequence. Ids are lists of int, per-token numbers float32 arrays over the response tokens only."""

    prompt_ids: list
    prefix_ids: list  # what a branch inherited: prompt to the loss, part of the response to the verifier  (CURE-4)
    response_ids: list  # (T,) the tokens this rollout sampled, the stop token included
    engine_logp: np.ndarray = None  # (T,) as sampled, at the sampling temperature
    old_logp: np.ndarray = None  # (T,) of the trainer, before this step's first update
    entropy: np.ndarray = None  # (T,) nats, of the distributions the tokens were drawn from
    group: int = 0  # all rollouts of one prompt in one step
    prompt_id: int = 0
    seed: int = 0  # of this very sample
    parent: int = -1  # a branch: index of its base rollout among the group's n1; a base rollout: -1
    t_star: int = -1  # a branch: len(prefix in the parent's response); a base rollout: -1
    h_star: float = float("nan")  # entropy of the parent at t*
    finish: str = ""  # stop | length
    reward: float = 0.0  # verifier's +-1 plus the overlong penalty
    correct: bool = False  # the verifier alone: filtering looks at this
    answer: str = ""  # what the verifier extracted
    advantage: float = 0.0
    candidates: list = field(default_factory=list)  # a base rollout: the pool its t* was drawn from
    text: str = ""  # prefix + response, decoded: what the verifier read


class Sampling(NamedTuple):
    max_tokens: int
    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0


class Completion(NamedTuple):
    ids: list  # (T,) int
    logp: np.ndarray  # (T,) float32
    finish: str  # stop | length


@dataclass
class Task:
    """What collect() samples from, apart from the config: the stage's name, its prompts and how to read them."""

    stage: str
    prompts: list  # of data.Prompt
    stream: object  # data.PromptStream over them
    tokenizer: object
    allowed: torch.Tensor  # bool (V,), see allowed_tokens
    verifiers: object  # reward.VerifierPool
    verifier: str = ""  # instead of the config's


def request_seed(*parts):
    """One seed a request, hash(seed, stage, step, prompt id, parent or -1), in [0, 2^62); sample i of it uses seed + i.
    Noise therefore depends on what is sampled, never on rank, batch or order."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 2


@contextlib.contextmanager
def timed(metrics, name):
    """Add the seconds of the block to metrics["timing_s/<name>"], the accelerator's queue drained at both ends."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    key = f"timing_s/{name}"
    metrics[key] = metrics.get(key, 0.0) + time.perf_counter() - start


def gather(items):
    """Every rank's list -> one list, the same on every rank, in rank order. A collective."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, items)
    return [x for part in parts for x in part]


# ------------------------------------------------------------------------------------------------------------- the engines
class TorchEngine:
    """Plain transformers decoding with a KV cache: the CPU default, the version to read, and the oracle for vLLM.

    It owns an unsharded copy of the model, so that it goes stale without sync() exactly as vLLM would."""

    def __init__(self, cfg, path, device, dtype, stop_ids):
        self.model = load_lm(path, dtype, "sdpa").to(device).eval()
        self.device, self.rows, self.ready = device, cfg.engine_rows, False
        self.stop = torch.tensor(sorted(stop_ids), device=device)

    def sleep(self):
        """Free what can be freed while the trainer works (here: nothing), and refuse to generate until sync()."""
        self.ready = False

    def wake(self):
        """Make room for weights again."""

    @torch.no_grad()
    def sync(self, named):
        """Copy every parameter from (HF name, full tensor) pairs. A missing one: AssertionError; an unknown one: KeyError."""
        self.ready = False
        params = dict(self.model.named_parameters())
        for name, full in named:
            params.pop(name).copy_(full)
        assert not params, f"weights never synced to the engine: {sorted(params)[:5]}"
        self.ready = True

    @torch.no_grad()
    def generate(self, prompts, n, sampling, seeds):
        """n completions of each prompt (lists of token ids) -> [[Completion] * n] in the prompts' order.

        seeds: one int a prompt; sample i draws its whole noise from its own generator seeded seeds[p] + i, one uniform
        number a token, so a sample does not depend on what else is in the batch (up to the last bits of float sums)."""
        assert self.ready, "generate() on an engine that was not synced since it slept"
        out = [None] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # equal lengths together: little padding
        size = max(1, self.rows // n)
        for a in range(0, len(order), size):
            batch = order[a : a + size]
            done = self._decode([prompts[i] for i in batch], n, sampling, [seeds[i] for i in batch])
            for j, i in enumerate(batch):
                out[i] = done[j * n : (j + 1) * n]
        return out

    def _decode(self, prompts, n, sampling, seeds):
        from transformers import DynamicCache

        B, width, L = len(prompts), max(map(len, prompts)), sampling.max_tokens
        ids = torch.zeros(B, width, dtype=torch.long, device=self.device)
        mask = torch.zeros_like(ids)  # prompts are left-padded
        for row, p in enumerate(prompts):
            ids[row, width - len(p) :] = torch.tensor(p, device=self.device)
            mask[row, width - len(p) :] = 1
        noise = [torch.rand(L, generator=torch.Generator().manual_seed(s + i), dtype=torch.float64)
                 for s in seeds for i in range(n)]  # fmt: skip
        noise = torch.stack(noise).to(self.device)  # (B n, L)

        cache = DynamicCache(config=self.model.config)
        pos = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = self._forward(ids, mask, pos, cache)
        cache.batch_repeat_interleave(n)  # the prompt is read once, its n samples continue from copies of the cache
        logits, mask = logits.repeat_interleave(n, 0), mask.repeat_interleave(n, 0)
        pos = mask.sum(-1, keepdim=True)  # (B n, 1): position of the token about to be sampled

        tokens = torch.zeros(B * n, L, dtype=torch.long, device=self.device)
        logps = torch.zeros(B * n, L, device=self.device)
        length = torch.zeros(B * n, dtype=torch.long, device=self.device)
        stopped = torch.zeros(B * n, dtype=torch.bool, device=self.device)
        alive = torch.arange(B * n, device=self.device)  # rows still decoding; finished ones leave the batch
        for t in range(L):
            token, logp = draw(logits, noise[alive, t], sampling)
            tokens[alive, t], logps[alive, t], length[alive] = token, logp, t + 1
            stop = torch.isin(token, self.stop)
            stopped[alive] = stop
            if t + 1 == L or bool(stop.all()):
                break
            if bool(stop.any()):
                on = (~stop).nonzero()[:, 0]
                cache.batch_select_indices(on)
                alive, token, mask, pos = alive[on], token[on], mask[on], pos[on]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            logits = self._forward(token[:, None], mask, pos, cache)
            pos = pos + 1
        tokens, logps, length, stopped = tokens.tolist(), logps.cpu().numpy(), length.tolist(), stopped.tolist()
        return [
            Completion(tokens[i][:k], logps[i, :k].copy(), "stop" if stopped[i] else "length")
            for i, k in enumerate(length)
        ]

    def _forward(self, ids, mask, pos, cache):
        out = self.model(
            input_ids=ids, attention_mask=mask, position_ids=pos, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        return out.logits[:, -1].float()  # (B, V)


def draw(logits, u, sampling):
    """Sample by inverse CDF: logits (B, V) fp32, u (B,) uniform float64 -> token (B,), its log-prob (B,) under the
    distribution sampled from (temperature and top_p applied, renormalised). temperature 0: argmax, log-prob at T = 1."""
    if sampling.temperature == 0:
        logq = logits.log_softmax(-1)
        token = logits.argmax(-1)
        return token, logq.gather(-1, token[:, None])[:, 0]
    logq = (logits / sampling.temperature).log_softmax(-1)
    if sampling.top_p < 1:
        p, index = logq.exp().sort(dim=-1, descending=True, stable=True)
        drop = p.cumsum(-1) - p >= sampling.top_p  # the token that crosses top_p stays
        logq = logq.masked_fill(torch.zeros_like(drop).scatter(-1, index, drop), float("-inf")).log_softmax(-1)
    cdf = logq.double().exp().cumsum(-1)  # float64: in fp32 a cumsum over 150k entries loses the small ones
    token = torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    return token, logq.gather(-1, token[:, None])[:, 0]


class VLLMEngine:
    """One vLLM engine inside each torchrun rank, tensor-parallel size 1, asleep (level 2: no weights, no KV) in updates.

    Its weights only ever come from sync() (load_format="dummy"), so an unsynced parameter cannot hide. Constructing it is
    a collective, after init_process_group and before the trainer's model (vLLM measures free memory)."""

    def __init__(self, cfg, path, device, dtype, stop_ids, max_model_len, utilization=None):
        cuda = device.type == "cuda"
        # external_launcher wants the engine in this process; its other two settings only keep stderr readable
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        if not cuda:
            os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # else the first log-prob compiles a helper for seconds
        try:
            from vllm import LLM, SamplingParams
        except ImportError as e:
            raise ValueError(f"engine=vllm: vllm cannot be imported here ({e}): use engine=torch, or install it") from e
        if not cuda:  # keep Linear weights as plain tensors: oneDNN's packed copies would go stale (CPU only)
            import vllm._custom_ops as ops

            ops._supports_onednn = False
        self.params_class, self.stop, self.ready = SamplingParams, sorted(stop_ids), False
        where = {"gpu_memory_utilization": utilization, "hf_overrides": {"head_dtype": "float32"}}
        if not cuda:  # a prompt prefilled in pieces would rewind its request's generator, which a CPU generator cannot do
            where = {"kv_cache_memory_bytes": cfg.engine_kv_mib << 20, "enforce_eager": True, "max_num_seqs": 64,
                     "enable_chunked_prefill": False, "max_num_batched_tokens": max(8192, max_model_len)}  # fmt: skip
        threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
        rng = random.getstate(), np.random.get_state(), torch.get_rng_state()
        try:
            self.llm = LLM(
                model=path, dtype=str(dtype).removeprefix("torch."), seed=cfg.seed + dist.get_rank(),
                tensor_parallel_size=1, distributed_executor_backend="external_launcher", load_format="dummy",
                enable_sleep_mode=cuda, max_model_len=max_model_len, logprobs_mode="processed_logprobs",
                generation_config="vllm", enable_prefix_caching=cfg.prefix_caching, disable_log_stats=True, **where,
            )  # fmt: skip
        except (ValueError, RuntimeError, OSError) as e:
            raise ValueError(f"engine=vllm: vLLM cannot serve model {path!r}: {str(e).strip().splitlines()[0]}") from e
        # LLM() reseeds python, numpy and torch and resets matmul precision and threads: give the trainer its own back
        random.setstate(rng[0]), np.random.set_state(rng[1]), torch.set_rng_state(rng[2])
        torch.set_float32_matmul_precision(precision)
        torch.set_num_threads(threads)
        self.asleep = False
        self.sleep()

    def sleep(self):
        """Give weights and KV cache back to the GPU (on CPU vLLM only changes its state, so the order is tested there)."""
        self.ready = False
        if not self.asleep:
            self.llm.sleep(level=2)
        self.asleep = True

    def wake(self):
        """Allocate the weights again. They are noise until sync()."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.llm.wake_up(tags=["weights"])
        self.asleep = False

    def sync(self, named):
        """Load (HF name, full tensor) pairs one at a time, check that every engine parameter came, wake the KV cache."""
        model = self.llm.llm_engine.model_executor.driver_worker.model_runner.model
        loaded = model.load_weights(named)
        missing = {n for n, _ in model.named_parameters()} - set(loaded)
        assert not missing, f"weights never synced to the engine: {sorted(missing)[:5]}"
        self.llm.wake_up(tags=["kv_cache"])  # generate() before this would wait for ever
        assert self.llm.reset_prefix_cache(), "the prefix cache of the old weights could not be cleared"
        self.ready = True

    def generate(self, prompts, n, sampling, seeds):
        """See TorchEngine.generate. One request a prompt with n samples: vLLM seeds sample i with seed + i, too, and the
        prompt (a branch point, say) is prefilled once."""
        assert self.ready and not self.llm.llm_engine.is_sleeping(), "generate() on an engine that is asleep or not synced"
        params = [
            self.params_class(
                n=n, temperature=sampling.temperature, top_p=sampling.top_p, top_k=0, max_tokens=sampling.max_tokens,
                logprobs=0, detokenize=False, stop_token_ids=self.stop, ignore_eos=True, seed=s,
            )
            for s in seeds
        ]  # fmt: skip
        outs = self.llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        assert len(outs) == len(prompts) and all(len(o.outputs) == n for o in outs), "vLLM returned another number of outputs"
        return [
            [
                Completion(
                    list(c.token_ids),
                    np.array([d[t].logprob for t, d in zip(c.token_ids, c.logprobs, strict=True)], np.float32),
                    c.finish_reason,
                )
                for c in sorted(o.outputs, key=lambda c: c.index)
            ]
            for o in outs
        ]


# -------------------------------------------------------------------------------------- critical token and re-concatenation
def allowed_tokens(tokenizer, vocab_size, min_token_chars=2, stop_ids=()):
    """Which tokens may be critical: bool (V,). Not special or stop ids, not ids beyond the tokenizer (the model's V is often
    padded), not tokens whose text has fewer than min_token_chars characters once stripped.  (CURE-1)"""
    allowed = torch.zeros(vocab_size, dtype=torch.bool)
    n = min(vocab_size, len(tokenizer))
    texts = tokenizer.batch_decode([[i] for i in range(n)])
    banned = set(tokenizer.all_special_ids) | set(stop_ids)
    for i, text in enumerate(texts):
        allowed[i] = len(text.strip()) >= max(1, min_token_chars) and i not in banned
    return allowed


def critical_candidates(entropy, tokens, allowed, top_k, budget, mode="entropy"):
    """Positions t* may be drawn from, most uncertain first: int64 (<= top_k,), or all valid ones for mode "random".

    Walks the response in descending entropy (equal ones: lower position first) and keeps the first top_k *valid*
    positions: not 0, token allowed, t <= budget, i.e. prompt + response[:t] still fits the prompt budget.  (CURE-2)"""
    if mode not in ("entropy", "random", "none"):
        raise ValueError(f"critical must be entropy, random or none, got {mode!r}")
    entropy, tokens = torch.as_tensor(entropy), torch.as_tensor(tokens, dtype=torch.long)
    valid = allowed[tokens].clone()  # (T,)
    valid[:1] = False
    valid[max(0, budget + 1) :] = False
    if mode == "none":
        return torch.empty(0, dtype=torch.long)
    if mode == "random":
        return valid.nonzero()[:, 0]
    order = torch.argsort(entropy, descending=True, stable=True)
    return order[valid[order]][:top_k]


def pick_critical(entropy, tokens, allowed, top_k, budget, generator, mode="entropy"):
    """t*: one of critical_candidates, uniformly (CURE, section "critical token"). entropy, tokens (T,), allowed bool (V,),
    budget = max_prompt_tokens - prompt length. 0, a plain resample of the prompt, where no token is valid or mode is "none"."""
    pool = critical_candidates(entropy, tokens, allowed, top_k, budget, mode)
    return int(pool[torch.randint(len(pool), (1,), generator=generator)]) if len(pool) else 0


def clause_start(ids, t_star, tokenizer):
    """Start of the last clause before t*: the position after the previous sentence end (. ! ? before white space) or
    newline, so that ids[start:t*] is never empty for t* > 0. The literal reading of the paper's "clause"; the reference
    code, and our default, takes all of ids[:t*]."""
    pieces = [tokenizer.decode([i]) for i in ids[: t_star + 1]]
    for i in range(t_star - 2, -1, -1):
        text = pieces[i].rstrip(" ")
        ends = text.endswith((".", "!", "?")) and (text != pieces[i] or pieces[i + 1][:1].isspace())
        if ends or "\n" in pieces[i]:
            return i + 1
    return 0


# ---------------------------------------------------------------------------------------------------------------- one round
def sample_round(cfg, engine, policy, task, step, draw_ids, ordinal, metrics):
    """One sampling round over this rank's prompts: base responses, entropies, branches, verdicts -> scored rollouts, all
    members of a group together. draw_ids: indices into task.prompts; ordinal: their places in the step's draw."""
    sampling = Sampling(cfg.max_response_tokens, cfg.temperature)
    prompts = [task.prompts[i] for i in draw_ids]
    stats = metrics["branch"]

    with timed(metrics, "gen_base"):
        seeds = [request_seed(cfg.seed, task.stage, step, p.id, -1) for p in prompts]
        answers = engine.generate([p.ids for p in prompts], cfg.n1, sampling, seeds)
    base = [
        Rollout(p.ids, [], c.ids, c.logp, group=g, prompt_id=p.id, seed=s + i, finish=c.finish)
        for p, g, s, outs in zip(prompts, ordinal, seeds, answers, strict=True)
        for i, c in enumerate(outs)
    ]
    branches = []
    if cfg.n2:
        with timed(metrics, "entropy"):  # of the training model, same weights: exact, free of vLLM's top-k limit  (CURE-5)
            if cfg.critical != "none":
                for r, (logp, entropy) in zip(base, policy.score_local(base, cfg.temperature), strict=True):
                    r.old_logp, r.entropy = logp, entropy
        refined = []
        for i, r in enumerate(base):
            parent = i % cfg.n1
            budget = cfg.max_prompt_tokens - len(r.prompt_ids)
            h = r.entropy if r.entropy is not None else np.zeros(len(r.response_ids), np.float32)
            pool = critical_candidates(h, r.response_ids, task.allowed, cfg.critical_top_k, budget, cfg.critical)
            rng = torch.Generator().manual_seed(request_seed(cfg.seed, task.stage, step, r.prompt_id, parent, "pick"))
            t = pick_critical(h, r.response_ids, task.allowed, cfg.critical_top_k, budget, rng, cfg.critical)
            free = critical_candidates(h, r.response_ids, task.allowed, cfg.critical_top_k, len(h), cfg.critical)
            stats["candidates"] += len(free)
            stats["over_budget"] += int((free > budget).sum())
            r.candidates = pool.tolist()
            a = clause_start(r.response_ids, t, task.tokenizer) if cfg.clause == "last" else 0
            h_star = float(h[t]) if r.entropy is not None else float("nan")
            refined.append((r, parent, t, h_star, r.response_ids[a:t]))  # (CURE-3): the critical token itself is dropped
        with timed(metrics, "gen_branch"):
            # one request with n2 samples: all branches of a base response leave it at the same t*  (CURE-6)
            seeds = [request_seed(cfg.seed, task.stage, step, r.prompt_id, parent) for r, parent, *_ in refined]
            answers = engine.generate([r.prompt_ids + pre for r, _, _, _, pre in refined], cfg.n2, sampling, seeds)
        branches = [
            Rollout(r.prompt_ids, pre, c.ids, c.logp, group=r.group, prompt_id=r.prompt_id, seed=s + i, parent=parent,
                    t_star=t, h_star=h, finish=c.finish)
            for (r, parent, t, h, pre), s, outs in zip(refined, seeds, answers, strict=True)
            for i, c in enumerate(outs)
        ]  # fmt: skip
    rollouts = sorted(base + branches, key=lambda r: r.group)  # stable: a group's base rollouts come first, in order
    with timed(metrics, "reward"):
        score_rollouts(cfg, task, rollouts, metrics)
    return rollouts


def score_rollouts(cfg, task, rollouts, metrics):
    """Fill text, reward, correct and answer. The verifier reads the response, prefix included, never the user prompt, whose
    template may itself contain "Answer: $Answer" (reward_scope: response); overlong shaping by length (DAPO eq. 13)."""
    decode = task.tokenizer.decode  # not batch_decode: of an empty list, on a rank without prompts, it makes [""]
    texts = [decode(r.prefix_ids + r.response_ids, skip_special_tokens=True) for r in rollouts]
    read = texts
    if cfg.reward_scope == "continuation":  # the reference: an answer already in the prefix is invisible
        read = [decode(r.response_ids, skip_special_tokens=True) for r in rollouts]
    gold = {p.id: p.answer for p in task.prompts}
    verdicts, counts = task.verifiers.score_all(
        [(text, gold[r.prompt_id]) for text, r in zip(read, rollouts, strict=True)], task.verifier or cfg.verifier
    )
    for k, v in counts.items():
        metrics["reward"][k] = metrics["reward"].get(k, 0) + v
    for r, text, (reward, correct, answer) in zip(rollouts, texts, verdicts, strict=True):
        length = len(r.response_ids) + (len(r.prefix_ids) if cfg.overlong_scope == "total" else 0)
        penalty = overlong_penalty(length, cfg.max_response_tokens, cfg.overlong_buffer, cfg.overlong_factor)
        r.text, r.reward, r.correct, r.answer = text, reward + penalty, correct, answer


# --------------------------------------------------------------------------------------------------------- dynamic sampling
SPARE = 8  # dropped groups that are kept at hand, to measure and show something in a step that keeps no group


def collect(cfg, engine, policy, task, step):
    """Sampling rounds until prompts_per_step groups with both right and wrong answers are kept (DAPO, dynamic sampling).

    Returns (rollouts of the kept groups in data order, metrics), the same on every rank: each rank samples its share of the
    prompts, all decisions are made on gathered data. A round is sampled in chunks of prompts_per_chunk and ends with the chunk
    that fills the step: the groups kept are those of the whole round, the surplus is never sampled. Fewer groups than asked
    for after max_rounds: trained on, or RuntimeError with on_starved: raise. Metrics: counts over *all* rollouts sampled;
    key "dropped" holds a few rollouts of dropped groups of the first round, for a step that keeps nothing.  (DAPO-3)"""
    metrics = {"branch": {"candidates": 0, "over_budget": 0}, "reward": {}}
    drawn, kept, dropped, seen = [], [], [], []
    most = cfg.max_rounds * cfg.prompts_per_round
    while len(drawn) < most and len(kept) < cfg.prompts_per_step:
        left = cfg.prompts_per_round - len(drawn) % cfg.prompts_per_round  # of this round
        ids = task.stream.take(min(left, cfg.prompts_per_chunk or left), exclude=set(drawn))
        if not ids:
            break  # every prompt of the data has been drawn in this step
        mine = range(dist.get_rank(), len(ids), dist.get_world_size())
        ordinal = [len(drawn) + i for i in mine]
        rollouts = sample_round(cfg, engine, policy, task, step, [ids[i] for i in mine], ordinal, metrics)
        drawn += ids
        groups = {}
        for r in rollouts:
            groups.setdefault(r.group, []).append(r)
        mixed = {g: len({r.correct for r in rs}) == 2 for g, rs in groups.items()}  # std(accuracy) > 0
        # only what is trained on travels between ranks, and of the rest the numbers for the log
        everyone = gather([(g, mixed[g], rs if mixed[g] or g < SPARE else [], _brief(rs)) for g, rs in groups.items()])
        for g, ok, rs, brief in sorted(everyone, key=lambda x: x[0]):
            assert len(brief) == cfg.group_size, f"group {g} has {len(brief)} rollouts"
            (kept if ok else dropped).append(rs)
            seen += brief
    rounds = -(-len(drawn) // cfg.prompts_per_round)
    if len(kept) < cfg.prompts_per_step and cfg.on_starved == "raise":
        raise RuntimeError(
            f"step {step}: only {len(kept)} of {cfg.prompts_per_step} groups have both right and wrong answers after {rounds} "
            "rounds; on_starved: train goes on with what there is, max_rounds or prompts_per_round sample more"
        )
    metrics["dropped"] = [r for rs in dropped for r in rs]
    metrics.update(_sampling_metrics(cfg, seen, len(drawn), len(kept), rounds, metrics.pop("branch"), metrics.pop("reward")))
    return [r for rs in kept[: cfg.prompts_per_step] for r in rs], metrics


def _brief(group):
    """Of each rollout what the log needs: (length, correct, truncated, parent, t*, H at t*, reward, parent correct)."""
    return [
        (len(r.response_ids), r.correct, r.finish == "length", r.parent, r.t_star, r.h_star, r.reward,
         group[r.parent].correct if r.parent >= 0 else None)
        for r in group
    ]  # fmt: skip


def _sampling_metrics(cfg, seen, drawn, kept, rounds, branch, reward):
    """The log's view of all rollouts sampled in a step. `seen`: _brief tuples, gathered; branch and reward: rank-local
    counters, summed over ranks here."""
    totals = {}
    for part in gather([{**branch, **reward}]):
        for k, v in part.items():
            totals[k] = totals.get(k, 0) + v
    length, correct, cut = (np.array([s[i] for s in seen], dtype=float) for i in range(3))
    m = {
        "train/accuracy": correct.mean(),
        "train/kept_groups": min(kept, cfg.prompts_per_step),
        "train/mixed_groups": kept,
        "train/sampled_groups": drawn,
        "train/rounds": rounds,
        "tokens/step": int(length.sum()),
        "critic/score/mean": float(np.mean([s[6] for s in seen])),
        "response_length/mean": length.mean(),
        "response_length/max": length.max(),
        "response_length/clip_ratio": cut.mean(),
        **{k: v for k, v in totals.items() if k.startswith("reward/")},
    }
    forks = [s for s in seen if s[3] >= 0]
    if forks:
        t = np.array([s[4] for s in forks], dtype=float)
        m["branch/mean_depth"] = t.mean()
        m["branch/fallback_share"] = (t == 0).mean()
        m["branch/over_budget_share"] = totals["over_budget"] / max(1, totals["candidates"])
        m["branch/accuracy_base"] = correct[[s[3] < 0 for s in seen]].mean()
        m["branch/accuracy_branch"] = correct[[s[3] >= 0 for s in seen]].mean()
        m["branch/flip_rate"] = float(np.mean([s[1] != s[7] for s in forks]))
        h = [s[5] for s in forks if s[4] > 0]
        if h and cfg.critical != "none":
            m["branch/entropy_at_t_star"] = float(np.mean(h))
    return {k: float(v) if isinstance(v, np.floating) else v for k, v in m.items()}
