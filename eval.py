"""Held-out accuracy: avg@k, pass@k, maj@k, entropy, length. `evaluate` is what cure.py calls; as a script it evaluates any
model folder or hub id with the same code:

    python eval.py --config configs/toy.yaml model=runs/toy/ckpt/step_000080/hf eval_n=32
    torchrun --nproc_per_node 2 eval.py model=DIR eval_data=FILE.jsonl template=chat verifier=boxed max_response_tokens=512
"""

import json
import math
import sys
from collections import Counter

import numpy as np
import torch.distributed as dist

from policy import leave
from rollout import Rollout, Sampling, gather, request_seed, score_rollouts, timed


def pass_at_k(n, c, k):
    """Unbiased estimate of P(at least one of k samples is right) from c right ones among n: 1 - C(n-c, k) / C(n, k)
    (M. Chen et al. 2021, arXiv 2107.03374, eq. 1)."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def evaluate(cfg, engine, policy, task, step, regions=None):
    """Sample eval_n responses of every held-out prompt, sharded over the ranks, grade them, score them with the trainer.

    regions: optional text -> {name: per-character bools}, for character-level tokenizers: the toy's split of the entropy.
    Returns a dict of eval/* numbers, the same on every rank; entropies in nats, token means over all responses at the
    sampling temperature; eval/stderr is of avg@k, over prompts. A collective."""
    rank, world = dist.get_rank(), dist.get_world_size()
    metrics = {"reward": {}}
    with timed(metrics, "eval"):
        mine = task.prompts[rank::world]
        seeds = [request_seed(cfg.seed, task.stage, step, p.id, -1) for p in mine]
        sampling = Sampling(cfg.max_response_tokens, cfg.eval_temperature, cfg.eval_top_p)
        answers = engine.generate([p.ids for p in mine], cfg.eval_n, sampling, seeds)
        rollouts = [
            Rollout(p.ids, [], c.ids, c.logp, prompt_id=p.id, finish=c.finish)
            for p, outs in zip(mine, answers, strict=True)
            for c in outs
        ]
        score_rollouts(cfg, task, rollouts, metrics)
        entropies = [h for _, h in policy.score_local(rollouts, cfg.eval_temperature or 1.0)]
        rows = gather([_row(rs, hs, regions) for rs, hs in _by_prompt(rollouts, entropies, cfg.eval_n)])
    rows.sort(key=lambda r: r["id"])
    n, right = cfg.eval_n, [r["right"] for r in rows]
    avg = np.array(right) / n
    out = {
        f"eval/avg@{n}": avg.mean(),
        "eval/stderr": avg.std(ddof=1) / math.sqrt(len(avg)) if len(avg) > 1 else float("nan"),
        f"eval/maj@{n}": np.mean([r["majority"] for r in rows]),
        "eval/distinct": np.mean([r["distinct"] for r in rows]) / n,
        "eval/length": np.sum([r["tokens"] for r in rows]) / (n * len(rows)),
        "eval/truncated": np.sum([r["cut"] for r in rows]) / (n * len(rows)),
    }
    for k in sorted({2**i for i in range(n.bit_length())} | {n}):
        out[f"eval/pass@{k}"] = np.mean([pass_at_k(n, c, k) for c in right])
    for name in rows[0]["entropy"]:
        total, count = np.sum([r["entropy"][name] for r in rows], axis=0)
        out[f"eval/entropy{name}"] = total / max(1, count)
    out["eval/parse_fail"] = sum(gather([metrics["reward"].get("reward/parse_fail", 0)])) / (n * len(rows))
    return {**{k: float(v) for k, v in out.items()}, "timing_s/eval": metrics["timing_s/eval"]}


NO_ANSWER = ("[INVALID]", "[TIMEOUT]", "[CRASH]")  # reward.py's marks; [0,1] is an answer and has a vote


def _by_prompt(rollouts, entropies, n):
    return [(rollouts[i : i + n], entropies[i : i + n]) for i in range(0, len(rollouts), n)]


def _row(rollouts, entropies, regions):
    """What one prompt's samples contribute: counts, and (sum, count) of the entropy of all tokens and of each region."""
    votes = Counter(r.answer for r in rollouts if r.answer not in NO_ANSWER)
    majority = votes.most_common(1)[0][0] if votes else None
    entropy = {"": (float(np.sum([h.sum() for h in entropies])), sum(len(h) for h in entropies))}
    for r, h in zip(rollouts, entropies, strict=True):
        for name, mask in regions(r.text).items() if regions else ():
            mask = np.array(mask[: len(h)] + [False] * (len(h) - len(mask)), bool)
            total, count = entropy.get("_" + name, (0.0, 0))
            entropy["_" + name] = (total + float(h[mask].sum()), count + int(mask.sum()))
    return {
        "id": rollouts[0].prompt_id,
        "right": sum(r.correct for r in rollouts),
        "majority": next((r.correct for r in rollouts if r.answer == majority), False),
        "distinct": len({tuple(r.response_ids) for r in rollouts}),
        "tokens": sum(len(r.response_ids) for r in rollouts),
        "cut": sum(r.finish == "length" for r in rollouts),
        "entropy": entropy,
    }


def main(argv):
    """Evaluate `model` on `eval_data`; the keys are cure.py's. Prints a table and one JSON line."""
    import cure  # only as a script: cure.py itself imports this file

    run = cure.setup(argv, train=False)
    cfg = run.stages[0][1]
    run.refresh()
    result = evaluate(cfg, run.engine, run.policy, run.heldout[cfg.name], 0, run.regions)
    if run.rank == 0:
        for k, v in result.items():
            print(f"{k:28s} {v:.4f}")
        print(json.dumps({"model": cfg.model, "eval_data": cfg.eval_data, "n": cfg.eval_n, **result}))


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
