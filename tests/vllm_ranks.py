"""What test_vllm.py runs on every rank: torchrun --nproc_per_node N tests/vllm_ranks.py CASE ARGS…"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from safetensors.torch import load_file

import cure
from lib import data, engine, policy
from lib.config import Config
from lib.engine import Sampling, TorchEngine, VLLMEngine, request_seed
from lib.ranks import gather, init_distributed, leave
from lib.weights import load_tokenizer

SHARE = 0.3 if torch.cuda.is_available() else None  # of the GPU, for an engine that has it to itself
TIE = {"float32": 1e-4, "bfloat16": 0.1}  # nats by which two engines may rank two tokens differently


def engines(path, kinds=("vllm",), **settings):
    """(rank, world, [engines, synced with the folder's weights], tokenizer, dtype)."""
    rank, world, device = init_distributed()
    cfg = Config(seed=0, **settings)
    tokenizer, eos = load_tokenizer(path)
    stop, dtype = {tokenizer.eos_token_id, *eos} - {None}, policy.compute_dtype(cfg, device)
    out = []
    for kind in kinds:
        if kind == "vllm":
            longest = 1024 if "smol" in path.lower() else 128
            out.append(VLLMEngine(cfg, path, device, dtype, stop, longest, SHARE))
            print("RUNNER V2" if out[-1].llm.llm_engine.vllm_config.use_v2_model_runner else "RUNNER V1", flush=True)
        else:
            out.append(TorchEngine(cfg, path, device, dtype, stop))
        out[-1].wake()
        out[-1].sync(weights(path).items())
    return rank, world, out, tokenizer, str(dtype).removeprefix("torch.")


def weights(path):
    """Named parameters of an HF folder."""
    return load_file(f"{path}/model.safetensors")


def uneven(path):
    """0, 1 and 7 prompts on a rank do not hang; noise belongs to the prompt id, not to the rank or the text."""
    rank, world, (engine,), tokenizer, _ = engines(path)
    ids, sampling = tokenizer.encode("20+27+6+29?"), Sampling(40)
    for shift in range(3):
        n = (0, 1, 7)[(rank + shift) % 3]
        out = engine.generate([ids] * n, 2, sampling, [request_seed(0, "stage1", 1, i, -1) for i in range(n)])
        everyone = gather([(i, s, c.ids) for i, cs in enumerate(out) for s, c in enumerate(cs)])
        seen, other = {}, []
        for i, s, tokens in everyone:
            if seen.setdefault((i, s), tokens) != tokens:
                other.append((i, s))
        # on CUDA a batch of another size sums in another order, and a sample may leave its twin at some token
        assert len(other) <= (1 if SHARE else 0), f"differ between ranks (prompt, sample): {other}"
        assert len(seen) == 2 * max((0, 1, 7)[(r + shift) % 3] for r in range(world))
        if len(seen) == 14:
            assert len({tuple(t) for t in seen.values()}) >= 10, "prompts of equal text but other ids must differ"
    print("UNEVEN OK", flush=True)


def shared(path, tp, file):
    """Ranks that share an engine ask for unequal numbers, some or all of them for nothing, of unequal prompts, before
    and after a sync of other weights: what each prompt and sample got, to a file."""
    rank, _, (engine,), tokenizer, _ = engines(path, engine_tp=int(tp))
    text, found = tokenizer.encode("20+27+6+29?"), []
    for factor in (1, 1.25):
        if factor != 1:
            engine.sleep()
            engine.wake()
            engine.sync((name, factor * w) for name, w in weights(path).items())
        for turn, numbers in enumerate([(0, 7), (7, 1), (1, 0), (0, 0), (3, 3)]):
            ids = [10 * rank + i for i in range(numbers[rank % 2])]
            asked = [text[: 3 + i % 9] for i in ids], 2, Sampling(40), [request_seed(turn, i) for i in ids]
            for i, outs in zip(ids, engine.generate(*asked), strict=True):
                found += [((factor, turn, i, s), c.ids, c.logp.tolist(), c.finish) for s, c in enumerate(outs)]
    found = sorted(gather(found))
    if rank == 0:
        Path(file).write_text(json.dumps(found))


def misuse(path, tp=1):
    """Half-awake or asleep engines do not generate. A sync of too little, or that does not arrive, does not pass."""
    _, _, (engine,), tokenizer, _ = engines(path, engine_tp=int(tp))
    ask = ([tokenizer.encode("2+3+4+5?")], 1, Sampling(4), [1])
    engine.generate(*ask)
    for step in ("sleep", "wake"):
        getattr(engine, step)()
        refused("asleep or not synced", lambda: engine.generate(*ask))
    half = dict(list(weights(path).items())[:-3])
    refused("never synced", lambda: engine.sync(half.items()))
    refused("asleep or not synced", lambda: engine.generate(*ask))
    engine.sync(weights(path).items())
    twice, tried = {name: 2 * w for name, w in weights(path).items()}, 0
    for name, p in engine.llm.llm_engine.model_executor.driver_worker.model_runner.model.named_parameters():
        part = name.replace("qkv_proj", "k_proj").replace("gate_up_proj", "up_proj")
        first = [(part, twice[part]), *((n, w) for n, w in twice.items() if n != part)]
        if hasattr(p, "weight_loader") and twice[part].any():
            load, p.weight_loader = p.weight_loader, lambda *args, **kwargs: None  # as if it had loaded
            refused(f"{part} did not arrive", lambda first=first: engine.sync(first))
            p.weight_loader, tried = load, tried + 1
    assert tried >= 9, tried
    print("MISUSE OK", flush=True)


def refused(says, do):
    """do() ends in an AssertionError that says so."""
    try:
        do()
    except AssertionError as e:
        assert says in str(e), e
    else:
        raise AssertionError(f"not refused: {says}")


def greedy(path, source, template, n, max_tokens, dtype="auto"):
    """Token by token, both engines, greedy decoding: prints how many prompts agree and where log-probs are tied."""
    _, _, (vllm, plain), tokenizer, dtype = engines(path, ("vllm", "torch"), engine_rows=16, dtype=dtype)
    prompts, _ = data.load_prompts(source, tokenizer, template, 400, limit=int(n))
    ask = ([p.ids for p in prompts], 1, Sampling(int(max_tokens), temperature=0), [0] * len(prompts))
    same, ties, gaps = 0, 0, []
    for a, b in zip(vllm.generate(*ask), plain.generate(*ask), strict=True):
        a, b = a[0], b[0]
        if a.ids == b.ids:
            same += 1
            gaps.append(float(abs(a.logp - b.logp).mean()))
        else:  # a tie: either engine finds its own token hardly better than the other's
            t = next(i for i, (x, y) in enumerate(zip(a.ids, b.ids, strict=False)) if x != y)
            ties += abs(a.logp[t] - b.logp[t]) < TIE[dtype]
    result = {"prompts": len(prompts), "identical": same, "ties": int(ties), "gap": max(gaps), "dtype": dtype}
    print("GREEDY", json.dumps(result), flush=True)


def spoilt(sync, how):
    """An engine's sync that goes wrong after the first training step. skipped: the engine keeps its weights.
    late: it gets those of one step before. short: one tensor is not sent."""
    sent = []

    def wrong(self, named):
        sent.append([(name, full.clone()) for name, full in named])
        if how == "skipped" and len(sent) > 1:
            if hasattr(self, "llm"):
                self.llm.wake_up(tags=["kv_cache"])
            self.ready = True
        elif how == "late":
            sync(self, iter(sent[-2:][0]))
        else:
            sync(self, iter(sent[-1][len(sent) > 1 :]))

    return wrong


def spoilt_run(how, *argv):
    """cure.py with a sync that goes wrong."""
    engine.VLLMEngine.sync = spoilt(VLLMEngine.sync, how)
    cure.main(list(argv))


def main(name, *args):
    globals()[name](*args)
    dist.barrier()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    leave(main, *sys.argv[1:])
