"""Brooms against flat rows (lib/broom.py): seconds and memory side by side, and a picture of a row.

    python -m tools.brooms                           # SmolLM2-135M's shape: a group, old log-probs and update
    python -m tools.brooms --fork 0.3 --response 300 --only flat,broom n1=4 n2=3 micro_batch_tokens=4096
    python -m tools.brooms --picture docs/broom.png

Random weights and ids: n1 base responses of equal length, n2 branches each, all at one share of the response; fork 0:
plain resamples, which share nothing. Both packings take turns. Memory is the peak of the process: ask for one packing.
"""

import argparse
import random
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

from lib.config import load_config
from lib.memory import peak_memory
from lib.policy import cut, pack
from lib.ranks import init_distributed, leave, one_line_errors
from rollout import Rollout
from tools.bench import PROMPT, SHAPES, Bench, loss_of, random_model, shape_config
from tools.common import picture

PACKINGS = ("flat", "broom")


def group(cfg, prompt, response, fork, vocab):
    """Rollouts of one group with random ids. prompt, response: tokens; fork: t* as a share of the response."""
    rng, t_star = random.Random(0), min(int(fork * response), response - 1)

    def ids(n):
        return [rng.randrange(vocab) for _ in range(n)]

    asked = ids(prompt)
    base = [Rollout(asked, [], ids(response)) for _ in range(cfg.n1)]
    rows = base + [
        Rollout(asked, r.response_ids[:t_star], ids(response - t_star), parent=k, t_star=t_star or None)
        for k, r in enumerate(base) for _ in range(cfg.n2)
    ]  # fmt: skip
    for r in rows:
        r.advantage, r.old_logp = rng.choice([-1.0, 1.0]), np.full(len(r.response_ids), -np.log(vocab), np.float32)
    return rows


def compare(b, rows, packings):
    """Seconds of old log-probs and update of one minibatch, and the tokens that are forwarded, in the notes of `b`."""
    tokens, norms = {}, {}

    def passes(packing):
        micro = [[rows[i] for i in mb] for mb in cut(rows, replace(b.cfg, packing=packing), b.world)[b.rank]]
        tokens[packing] = sum(pack(mb, b.device, share=packing == "broom")["input_ids"].shape[1] for mb in micro)

        def run():
            with patch.object(b.policy.cfg, "packing", packing):
                b.policy.score(micro, 1.0)
                norms[packing] = b.policy.update(micro, loss_of(rows), 1.0, 0.0, 0.0)[0]

        return run

    seconds = b.turns({packing: passes(packing) for packing in packings})
    for packing in packings:
        b.note(f"{packing}: tokens forwarded", tokens[packing])
        b.note(f"{packing}: seconds", seconds[packing])
    if len(packings) > 1:
        b.note("broom / flat, tokens", tokens["broom"] / tokens["flat"])
        b.note("broom / flat, seconds", seconds["broom"] / seconds["flat"])
        b.note("gradient norm broom / flat - 1", norms["broom"] / norms["flat"] - 1)
    b.note("peak GiB of the process", peak_memory())


def draw(path):
    """The row of one small broom: which token attends to which."""
    cfg = load_config(["n1=1", "n2=2"])[0][1]
    rows = group(cfg, 3, 8, 0.5, 100)
    packed = pack(rows, "cpu", share=True)
    T, queries, keys = packed["input_ids"].shape[1], packed["cu_seqlens"].tolist(), packed["cu_keys"].tolist()
    sees = torch.zeros(T, T)
    for k in range(len(queries) - 1):
        seen = packed["seen"][keys[k] : keys[k + 1]]
        for i in range(queries[k], queries[k + 1]):  # causal, aligned at the bottom right
            sees[i, seen[: len(seen) - (queries[k + 1] - 1 - i)]] = 1 + k
    names = ["prompt and base response"] + [f"branch {k}" for k in range(1, len(queries) - 1)]
    with picture(Path(path), 5.2) as figure:
        axes = figure.subplots()
        axes.imshow(sees, cmap="Blues", vmin=0, vmax=len(queries))
        axes.set_xticks(range(T), packed["position_ids"][0].tolist())
        axes.set_yticks(range(T), packed["position_ids"][0].tolist())
        for k, name in enumerate(names):
            axes.axhline(queries[k] - 0.5, color="black", lw=0.8)
            axes.text(T - 0.3, (queries[k] + queries[k + 1]) / 2 - 0.5, name, va="center")
        fork = len(rows[0].prompt_ids) + rows[1].t_star
        axes.axvline(fork - 0.5, color="firebrick", lw=1, ls="--")
        axes.set(xlabel="key, by its position id; dashed: the fork", ylabel="query, by its position id")
        axes.set_title(f"{T} tokens in the row of a broom, {keys[-1]} in flat rows: who attends to whom", fontsize=10)
    return path


def main(argv):
    """The comparison as a table, or the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--picture", metavar="FILE", help="draw this, measure nothing")
    parser.add_argument("--shape", default="135m", choices=[*SHAPES, "toy"])
    parser.add_argument("--only", default=",".join(PACKINGS), help="packings, with a comma")
    parser.add_argument("--fork", type=float, default=0.5, help="t* as a share of the response")
    parser.add_argument("--response", type=int, default=300, help="tokens")
    parser.add_argument("--repeats", type=int, default=5)
    args, rest = parser.parse_known_args(argv)
    if args.picture:
        print(draw(args.picture))
        return 0
    with one_line_errors():
        (_, cfg), *_ = load_config(["n1=4", "n2=3", "micro_batch_tokens=4096", *rest])
    with tempfile.TemporaryDirectory() as folder:
        config = shape_config(args.shape)
        random_model(config, folder, init_distributed()[2])
        args.rollouts, args.mean, args.longest = 1, args.response, args.response
        b = Bench(args, cfg, config, folder)
        compare(b, group(cfg, PROMPT, args.response, args.fork, config.vocab_size), args.only.split(","))
    for name, value in b.notes.items():
        print(f"{name:32} {value:>10,.4g}")
    return 0


if __name__ == "__main__":
    leave(main, sys.argv[1:])
