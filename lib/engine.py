"""The engines that generate: token ids in, token ids and log-probs out.

Both have generate(prompts, n, sampling, seeds), sleep(), wake() and sync(named full tensors).
Symbols: B prompts · n samples a prompt · L new tokens at most · V vocabulary.
"""

import contextlib
import hashlib
import importlib.util
import os
import random
import sys
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from lib.memory import engine_share, frozen_memory, this_gpu, tp_misfit
from lib.policy import compute_dtype
from lib.ranks import gather
from lib.weights import load_hf_config, load_lm

CPU_KV_MIB = 256  # vLLM's KV cache on a CPU


def request_seed(*parts):
    """One seed a request, hash(seed, stage, step, prompt id, parent or -1), in [0, 2^62); sample i of it uses seed + i.
    Noise therefore depends on what is sampled, never on rank, batch or order."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 2


class Sampling(NamedTuple):
    max_tokens: int
    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0


class Completion(NamedTuple):
    ids: list  # (T,) int
    logp: np.ndarray  # (T,) float32
    finish: str  # stop | length


def gap_limit(dtype, gaps):
    """The mean |log-prob of engine - of trainer| above which a run stops, nats a token. gaps: of healthy steps, the
    first one of the run and the last ones.

    In fp32 a fresh sync leaves 1e-6. In bf16 the gap is rounding: the limit is 3 times its median. The first gap bounds
    the limit for good, since an engine that is never synced again drifts away in small steps."""
    if dtype == torch.float32:
        return 1e-3
    if not gaps:
        return 0.3  # more is no rounding, on any step
    # 2e-3: half the spacing of bf16 just below 1, for a policy that is sure of nearly all tokens
    return min(0.3, max(0.05, 3 * gaps[0]), max(2e-3, 3 * float(np.median(gaps))))


def shard_of(full, have, part, shard):
    """What of a full tensor one rank of a tensor-parallel engine has, as vLLM's loaders cut it. have: its parameter.
    part: the tensor's name among fused ones, or "". shard: (rank in the engine, of how many, kv parts)."""
    rank, size, kv = shard
    if part:  # rows: some of the heads, or of the MLP's units
        n = kv if part in ("k_proj", "v_proj") else size
        return full.chunk(n)[rank * n // size]
    if full.dim() == 1:  # a norm
        return full
    if have.shape[1] < full.shape[1]:  # columns: what those heads and units are inputs of
        return full.chunk(size, 1)[rank]
    return full[rank * len(have) : (rank + 1) * len(have)]  # rows of the padded vocabulary


def checked(named, params, fused=None, shard=(0, 1, 1)):
    """Pass on (HF name, full tensor) pairs. Once the engine has taken one, compare it with the engine's parameter of
    that name, exactly, in the engine's dtype. AssertionError names a tensor that did not arrive. A tensor that the
    engine knows by a name of its own is not compared, nor is one cut over ranks that HF, too, has fused.

    params: {name: the engine's parameter}. fused: {its name of a module: the parts that it stacks, all but the first of
    one length}. Parts may come in any order. shard: see shard_of."""
    places = {p: (module, len(ps) - i if i else 0) for module, ps in (fused or {}).items() for i, p in enumerate(ps)}
    for name, full in named:
        yield name, full
        part = next((p for p in name.split(".") if p in places), "")
        module, from_end = places.get(part, ("", 0))  # the first part, as any plain tensor, is the first rows
        have = params.get(name.replace(f".{part}.", f".{module}."))
        fused_in_hf = part and part == module
        if have is not None and not (fused_in_hf and shard[1] > 1):  # a tied head has none of its own
            full = shard_of(full, have, part, shard) if shard[1] > 1 else full
            start = len(have) - from_end * len(full) if from_end else 0
            have = have[start : start + len(full)]  # an engine's vocabulary may be padded
            assert torch.equal(have, full.to(have)), f"sync: {name} did not arrive in the engine as it was sent"


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
        """Copy every parameter from (HF name, full tensor) pairs. A missing one, or one that did not arrive:
        AssertionError; an unknown one: KeyError."""
        self.ready = False
        params = dict(self.model.named_parameters())
        missing = set(params)
        for name, full in checked(named, params):
            params[name].copy_(full)
            missing.discard(name)
        assert not missing, f"weights never synced to the engine: {sorted(missing)[:5]}"
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
            input_ids=ids, attention_mask=mask, position_ids=pos, past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        return out.logits[:, -1].float()  # (B, V)


def draw(logits, u, sampling):
    """Sample by inverse CDF: logits (B, V) fp32, u (B,) uniform float64 -> token (B,), its log-prob (B,) under the
    distribution sampled from (temperature and top_p applied, renormalised). temperature 0: argmax, log-prob at T =
    1."""
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


@contextlib.contextmanager
def process_settings_kept():
    """Put back what `import vllm` and LLM() change for the whole process: the states of the CPU's random generators,
    matmul precision, threads, the threads that compile the trainer's blocks (vLLM asks for one), and on a CPU the
    number of ranks of a node."""
    variables = {name: os.environ.get(name) for name in ("TORCHINDUCTOR_COMPILE_THREADS", "LOCAL_WORLD_SIZE")}
    threads = torch.get_num_threads()
    precision = torch.get_float32_matmul_precision()
    rng = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(rng[0]), np.random.set_state(rng[1]), torch.set_rng_state(rng[2])
        torch.set_float32_matmul_precision(precision)
        torch.set_num_threads(threads)
        for name, value in variables.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        if inductor := sys.modules.get("torch._inductor.config"):  # it has read the variable when it was imported
            inductor.compile_threads = inductor.decide_compile_threads()


def import_vllm(cuda):
    """(LLM, SamplingParams); ValueError where vllm cannot be imported."""
    try:
        from vllm import LLM, SamplingParams
    except ImportError as e:
        raise ValueError(f"engine=vllm: vllm cannot be imported here ({e}): use engine=torch, or install it") from e
    if not cuda:  # keep Linear weights as plain tensors: the CPU's packed copies (oneDNN; AMX in bf16) would go stale
        import vllm._custom_ops
        import vllm.model_executor.layers.utils
        from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator as Cpu

        vllm._custom_ops._supports_onednn = False
        vllm.model_executor.layers.utils.check_cpu_sgl_kernel = lambda n, k, dtype: False
        # gloo between engine_tp ranks: vLLM's shared memory has one name for all runs, and stays when one ends
        Cpu._all_group_ranks_share_shm_group_name = lambda self: False
    return LLM, SamplingParams


class VLLMEngine:
    """A vLLM engine inside torchrun ranks, asleep (level 2: no weights, no KV) in updates. Each rank has one of its
    own. With engine_tp = k > 1 the ranks r of equal r // k are the tensor-parallel parts of one, which decodes what all
    of them ask for. A sample has the same seed either way.

    Its weights only ever come from sync() (load_format="dummy"), so an unsynced parameter cannot hide. Constructing it
    is a collective, after init_process_group and before the trainer's model (vLLM measures free memory).

    vLLM has two model runners. The CPU build runs V1: synchronous, no chunked prefill, no graphs, torch's generators.
    What was measured on a CPU is of that one. On CUDA 0.32 runs V2: asynchronous scheduling, chunked prefill, CUDA
    graphs, noise hashed from seed, position and token. So a seed gives other samples there. VLLM_USE_V2_MODEL_RUNNER=0
    chooses V1 on CUDA too."""

    def __init__(self, cfg, path, device, dtype, stop_ids, max_model_len, utilization=None):
        cuda = device.type == "cuda"
        # external_launcher wants the engine in this process; its other two settings only keep stderr readable
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        if not cuda:
            os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # else the first log-prob compiles a helper for seconds
        self.stop, self.ready, self.asleep = sorted(stop_ids), False, False
        tp = cfg.engine_tp
        where = {"gpu_memory_utilization": utilization, "hf_overrides": {"head_dtype": "float32"}}
        if not cuda:  # a prompt prefilled in pieces rewinds its request's generator, which a CPU generator cannot do
            where = {"kv_cache_memory_bytes": CPU_KV_MIB << 20, "enforce_eager": True, "max_num_seqs": 64,
                     "enable_chunked_prefill": False, "max_num_batched_tokens": max(8192, max_model_len)}  # fmt: skip
        # what becomes one line. On CUDA the others come through whole: no memory and NCCL's errors are RuntimeErrors
        configuration = (ValueError,) if cuda else (ValueError, RuntimeError, OSError)
        with process_settings_kept():
            LLM, self.params_class = import_vllm(cuda)
            try:
                self.llm = LLM(
                    model=path, dtype=str(dtype).removeprefix("torch."), seed=cfg.seed + dist.get_rank() // tp,
                    tensor_parallel_size=tp, distributed_executor_backend="external_launcher", load_format="dummy",
                    enable_sleep_mode=cuda, max_model_len=max_model_len, logprobs_mode="processed_logprobs",
                    generation_config="vllm", enable_prefix_caching=True, disable_log_stats=True, **where,
                )  # fmt: skip
            except configuration as e:
                # the first line of a pydantic error only counts them
                says = e.errors()[0]["msg"] if hasattr(e, "errors") else str(e).strip().splitlines()[0]
                raise ValueError(f"engine=vllm: vLLM cannot serve model {path!r}: {says}") from e
        kv_heads = self.llm.llm_engine.model_config.get_total_num_kv_heads()
        self.shard = dist.get_rank() % tp, tp, min(tp, kv_heads)
        self.sleep()

    def sleep(self):
        """Give weights and KV cache back to the GPU (on CPU vLLM only changes its state, so the order is tested
        there)."""
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
        """Load (HF name, full tensor) pairs one at a time, check that every engine parameter came and arrived as it
        was sent, wake the KV cache."""
        model = self.llm.llm_engine.model_executor.driver_worker.model_runner.model
        params = dict(model.named_parameters())
        fused = getattr(model, "packed_modules_mapping", {})
        loaded = model.load_weights(checked(named, params, fused, self.shard))
        missing = set(params) - set(loaded)
        assert not missing, f"weights never synced to the engine: {sorted(missing)[:5]}"
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the gathered tensors: the KV cache is allocated past torch, by the driver
        self.llm.wake_up(tags=["kv_cache"])  # generate() before this would wait for ever
        assert self.llm.reset_prefix_cache(), "the prefix cache of the old weights could not be cleared"
        self.ready = True

    def generate(self, prompts, n, sampling, seeds):
        """See TorchEngine.generate. One request a prompt with n samples: vLLM seeds sample i with seed + i, too, and
        the prompt (a branch point, say) is prefilled once. A collective over all ranks for engine_tp > 1."""
        awake = self.ready and not self.llm.llm_engine.is_sleeping()
        assert awake, "generate() on an engine that is asleep or not synced"
        rank, tp = dist.get_rank(), self.shard[1]
        asked = [(rank, p, s) for p, s in zip(prompts, seeds, strict=True)]
        if tp > 1:  # the ranks of an engine must ask vLLM for the same in the same order
            asked = [x for x in gather(asked) if x[0] // tp == rank // tp]
        params = [
            self.params_class(
                n=n, temperature=sampling.temperature, top_p=sampling.top_p, top_k=0, max_tokens=sampling.max_tokens,
                logprobs=0, detokenize=False, stop_token_ids=self.stop, ignore_eos=True, seed=s,
            )
            for _, _, s in asked
        ]  # fmt: skip
        outs = self.llm.generate([{"prompt_token_ids": p} for _, p, _ in asked], params, use_tqdm=False)
        whole = len(outs) == len(asked) and all(len(o.outputs) == n for o in outs)
        assert whole, "vLLM returned another number of outputs"
        return [
            [
                Completion(
                    list(c.token_ids),
                    np.array([d[t].logprob for t, d in zip(c.token_ids, c.logprobs, strict=True)], np.float32),
                    c.finish_reason,
                )
                for c in sorted(o.outputs, key=lambda c: c.index)
            ]
            for (whose, _, _), o in zip(asked, outs, strict=True)
            if whose == rank
        ]


def make_engine(run, path, stop_ids, trainer=True, reference=False):
    """The rollout engine all stages share: one for engine_tp ranks, on CUDA with the memory that the trainer, if any,
    and the reference model, if any, leave. ValueError names engine_tp."""
    cfg = run.stages[0][1]
    kind = cfg.engine
    if kind == "auto":
        kind = "vllm" if run.device.type == "cuda" and importlib.util.find_spec("vllm") else "torch"
    dtype = compute_dtype(cfg, run.device)
    if kind == "torch" and cfg.engine_tp > 1:
        raise ValueError(f"engine_tp: {cfg.engine_tp} needs engine=vllm: the torch engine is one a rank")
    if kind == "torch":
        return TorchEngine(cfg, path, run.device, dtype, stop_ids)
    config = load_hf_config(path)
    if wrong := tp_misfit(cfg.engine_tp, config, int(os.environ.get("LOCAL_WORLD_SIZE", run.world))):
        raise ValueError(wrong)
    longest = max(c.max_prompt_tokens + c.max_response_tokens for _, c in run.stages)
    share = None
    if run.device.type == "cuda" and not trainer:
        share = cfg.gpu_memory_utilization or 0.9  # vLLM's own default
    elif run.device.type == "cuda":
        widest = max((c for _, c in run.stages), key=lambda c: c.max_prompt_tokens + c.max_response_tokens)
        frozen = frozen_memory(cfg, config, run.world) if reference else 0
        share, report = engine_share(widest, config, run.world, this_gpu(), frozen)
        run.print(report)
    return VLLMEngine(cfg, path, run.device, dtype, stop_ids, longest, share)
