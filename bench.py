"""How fast are rollouts? One model, the same prompts and seeds, engines side by side in one run:

    python bench.py model=DIR data=FILE.jsonl                                    # a HF folder, prompts from any data source
    python bench.py model=DIR data=FILE.jsonl n1=4 n2=3 prompts_per_step=8 prompts_per_minibatch=8 max_response_tokens=128

Round 1 samples n1 responses a prompt; round 2 branches n2 times off each at its middle, as CURE does, with vLLM's prefix cache
(warm from round 1), with it cleared, and on the torch engine. Median of 5 repetitions; tokens/s of generated tokens.
"""

import json
import statistics
import sys
import time

import torch
from safetensors.torch import load_file
from tqdm import tqdm

import cure
import data
from config import load_config
from policy import compute_dtype, init_distributed
from rollout import Sampling, TorchEngine, VLLMEngine, request_seed

REPEATS = 5


def main(argv):
    (_, cfg), *_ = load_config(argv)
    _, _, device = init_distributed()
    tokenizer, eos = cure.load_tokenizer(cfg.model)
    stop = {tokenizer.eos_token_id, *eos} - {None}
    prompts, _ = data.load_prompts(cfg.data, tokenizer, cfg.template, cfg.max_prompt_tokens, limit=cfg.prompts_per_step)
    prompts = [p.ids for p in prompts]
    dtype, sampling = compute_dtype(cfg, device), Sampling(cfg.max_response_tokens)
    longest = cfg.max_prompt_tokens + cfg.max_response_tokens
    try:
        engines = {"vllm": VLLMEngine(cfg, cfg.model, device, dtype, stop, longest)}
    except ValueError as e:
        print(e, file=sys.stderr)
        engines = {}
    if device.type == "cpu" or not engines:
        engines["torch"] = TorchEngine(cfg, cfg.model, device, dtype, stop)
    for engine in engines.values():
        engine.wake()
        engine.sync(load_file(f"{cfg.model}/model.safetensors").items())

    speeds = {}
    for repeat in tqdm(range(REPEATS), unit="repeat", disable=None):
        for name, engine in engines.items():
            seeds = [request_seed("bench", repeat, i) for i in range(len(prompts))]
            base = timed_tokens(speeds, f"{name} round 1", engine, prompts, cfg.n1, sampling, seeds)
            forks = [p + c.ids[: len(c.ids) // 2] for p, cs in zip(prompts, base, strict=True) for c in cs]
            seeds = [request_seed("bench", repeat, i, "branch") for i in range(len(forks))]
            if name == "vllm":
                timed_tokens(speeds, "vllm round 2, prefix cache warm", engine, forks, cfg.n2, sampling, seeds)
                engine.llm.reset_prefix_cache()
            label = f"{name} round 2" + (", prefix cache cleared" if name == "vllm" else "")
            timed_tokens(speeds, label, engine, forks, cfg.n2, sampling, seeds)
    table = {k: round(statistics.median(v), 1) for k, v in speeds.items()}
    for k, v in table.items():
        print(f"{k:36s} {v:9.1f} tokens/s   (min {min(speeds[k]):.1f}, max {max(speeds[k]):.1f})")
    versions = {"torch": torch.__version__, "device": str(device), "threads": torch.get_num_threads()}
    print(json.dumps({"model": cfg.model, "prompts": len(prompts), "n1": cfg.n1, "n2": cfg.n2, "tokens/s": table, **versions}))


def timed_tokens(speeds, label, engine, prompts, n, sampling, seeds):
    """Generate, and note the generated tokens per second under `label`; returns the completions."""
    start = time.perf_counter()
    out = engine.generate(prompts, n, sampling, seeds)
    speeds.setdefault(label, []).append(sum(len(c.ids) for cs in out for c in cs) / (time.perf_counter() - start))
    return out


if __name__ == "__main__":
    main(sys.argv[1:])
