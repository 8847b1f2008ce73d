"""What test_vllm.py runs on every rank: python -m torch.distributed.run --nproc_per_node N tests/vllm_ranks.py CASE ARGS…"""

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


def engines(path, kinds=("vllm",), **settings):
    """(rank, world, [engines, synced with the folder's weights], tokenizer)."""
    rank, world, device = init_distributed()
    cfg = Config(seed=0, **settings)
    tokenizer, eos = policy.load_tokenizer(path)
    stop = {tokenizer.eos_token_id, *eos} - {None}
    out = []
    for kind in kinds:
        if kind == "vllm":
            out.append(VLLMEngine(cfg, path, device, torch.float32, stop, 1024 if "smol" in path.lower() else 128))
        else:
            out.append(TorchEngine(cfg, path, device, torch.float32, stop))
        out[-1].wake()
        out[-1].sync(weights(path).items())
    return rank, world, out, tokenizer


def weights(path):
    """Named parameters of an HF folder."""
    return load_file(f"{path}/model.safetensors")


def uneven(path):
    """0, 1 and 7 prompts on a rank do not hang; noise belongs to the prompt id, not to the rank or the text."""
    rank, world, (engine,), tokenizer = engines(path)
    ids, sampling = tokenizer.encode("20+27+6+29?"), Sampling(40)
    for shift in range(3):
        n = (0, 1, 7)[(rank + shift) % 3]
        out = engine.generate([ids] * n, 2, sampling, [request_seed(0, "stage1", 1, i, -1) for i in range(n)])
        everyone = gather([(i, s, c.ids, c.logp.tolist()) for i, cs in enumerate(out) for s, c in enumerate(cs)])
        seen = {}
        for i, s, tokens, logp in everyone:
            first = seen.setdefault((i, s), (tokens, logp))
            assert first[0] == tokens, f"prompt {i} sample {s} differs between ranks"
        assert len(seen) == 2 * max((0, 1, 7)[(r + shift) % 3] for r in range(world))
        if len(seen) == 14:
            assert len({tuple(t) for t, _ in seen.values()}) >= 10, "prompts of equal text but other ids must differ"
    print("UNEVEN OK", flush=True)


def misuse(path):
    """Half-awake or asleep engines do not generate, and a sync without every parameter does not pass."""
    _, _, (engine,), tokenizer = engines(path)
    ask = ([tokenizer.encode("2+3+4+5?")], 1, Sampling(4), [1])
    engine.generate(*ask)
    for step in ("sleep", "wake"):
        getattr(engine, step)()
        try:
            engine.generate(*ask)
        except AssertionError as e:
            assert "asleep or not synced" in str(e)
        else:
            raise SystemExit(f"generate() after {step}() was not refused")
    half = dict(list(weights(path).items())[:-3])
    try:
        engine.sync(half.items())
    except AssertionError as e:
        assert "never synced" in str(e)
    else:
        raise SystemExit("an incomplete sync was accepted")
    print("MISUSE OK", flush=True)


def greedy(path, source, template, n, max_tokens):
    """Token by token, both engines, greedy decoding: prints how many prompts agree and where log-probs are tied."""
    _, _, (vllm, plain), tokenizer = engines(path, ("vllm", "torch"), engine_rows=16)
    prompts, _ = data.load_prompts(source, tokenizer, template, 400, limit=int(n))
    ask = ([p.ids for p in prompts], 1, Sampling(int(max_tokens), temperature=0), [0] * len(prompts))
    same, ties = 0, 0
    for a, b in zip(vllm.generate(*ask), plain.generate(*ask), strict=True):
        a, b = a[0], b[0]
        if a.ids == b.ids:
            same += 1
        else:  # a tie is a position where both engines find their own token at most 1e-4 nats better than the other's
            t = next(i for i, (x, y) in enumerate(zip(a.ids, b.ids, strict=False)) if x != y)
            ties += abs(a.logp[t] - b.logp[t]) < 1e-4
    print("GREEDY", json.dumps({"prompts": len(prompts), "identical": same, "ties": int(ties)}), flush=True)


def skipped_sync(*argv):
    """cure.py with every sync but the first skipped, engine otherwise awake: the guard must stop it."""
    sync, calls = VLLMEngine.sync, []

    def once(self, named):
        calls.append(1)
        if len(calls) == 1:
            return sync(self, named)
        for _ in named:
            pass
        self.llm.wake_up(tags=["kv_cache"])
        self.ready = True

    engine.VLLMEngine.sync = once
    cure.main(list(argv))


def main(name, *args):
    globals()[name](*args)
    dist.barrier()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    leave(main, *sys.argv[1:])
