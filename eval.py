"""Accuracy as the papers report it: avg@k with its standard error, unbiased pass@k, maj@k, length, grader counts.

    python eval.py model=DIR_OR_HUB_ID benchmarks=aime24,math500:FILE.jsonl,OTHER.parquet preset=cure    # hub, or files
    torchrun --nproc_per_node 8 eval.py model=… benchmarks=aime24,aime25,amc23,math500,minerva,olympiad preset=dapo

Any setting overrides the preset. Results in out_dir: eval.json (every setting, versions, hashes, numbers) and
samples.jsonl (a line a problem with all its samples). The same command again goes on where an interrupted one stopped.
`evaluate` is also what cure.py calls while it trains. Symbols: k samples of n a problem, c of them right.
"""

import hashlib
import json
import math
import os
import re
import sys
from collections import Counter

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from lib import toy
from lib.config import load_config
from lib.countdown import ILLEGAL
from lib.data import BENCHMARKS, find_benchmark, grader
from lib.engine import Sampling, request_seed
from lib.files import aligned, model_hash, read_json, replace_file
from lib.policy import compute_dtype
from lib.pool import unread_golds
from lib.ranks import end_group, everywhere, gather, leave, one_line_errors, timed
from lib.run import lock, prepare_run, versions
from reward import INVALID, normalise
from rollout import Rollout, grade

# DAPO and 80/20 train with 20480 response tokens; their evaluation length is not published, so it is the same here.
# micro_batch_tokens: one forward, of the entropy preset alone, must take the longest sequence.
LONG = {"eval_temperature": 1.0, "max_response_tokens": 20480, "micro_batch_tokens": 32768}
PRESETS = {
    "cure": {"template": "boxed", "eval_temperature": 0.6, "eval_top_p": 0.7, "max_response_tokens": 4096},
    "dapo": {"template": "dapo", "eval_top_p": 0.7, "eval_n": 32, **LONG},
    "8020": {"template": "8020", "eval_top_p": 1.0, "eval_n": 16, **LONG},
    "entropy": {"template": "boxed", "eval_temperature": 1.0, "eval_top_p": 1.0, "max_response_tokens": 4096},
}
# what the samples depend on: in eval.json, and refused if it differs when an evaluation goes on
KEYS = ("template", "system_prompt", "chat_args", "stop_token_ids", "verifier", "max_prompt_tokens", "eval_data",
        "max_response_tokens", "eval_prompts", "eval_n", "eval_temperature", "eval_top_p", "engine", "dtype", "seed")
NO_ANSWER = (INVALID, "[TIMEOUT]", "[CRASH]")  # reward.py's marks; [0,1] is an answer and has a vote


# ---------------------------------------------------------------------------------------------------------- the numbers
def pass_at_k(n, c, k):
    """Unbiased estimate of P(at least one of k samples is right) from c right ones among n: 1 - C(n-c, k) / C(n, k)
    (M. Chen et al. 2021, arXiv 2107.03374, eq. 1)."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def majority(samples):
    """Whether the most frequent answer is right. Answers vote in reward.normalise's form (0.5 and 1/2 are two), no
    answer has no vote, of a tie the first seen wins; no votes at all: wrong."""
    votes = [(normalise(s["answer"]), s["correct"]) for s in samples if s["answer"] not in NO_ANSWER]
    winner = Counter(v for v, _ in votes).most_common(1)
    return next((correct for v, correct in votes if winner and v == winner[0][0]), False)


def summary(rows, n):
    """The eval/* numbers of graded rows (see sample), n samples each. eval/stderr is of avg@n over problems: their
    standard deviation (n - 1) / sqrt(problems). Counts are of samples, length is in tokens. eval/right is a list: how
    many samples of each problem are right, in the rows' order."""
    samples = [s for r in rows for s in r["samples"]]
    right = [sum(s["correct"] for s in r["samples"]) for r in rows]
    avg = np.array(right) / n
    out = {
        f"eval/avg@{n}": avg.mean(),
        "eval/stderr": avg.std(ddof=1) / math.sqrt(len(avg)) if len(avg) > 1 else float("nan"),
        f"eval/maj@{n}": np.mean([majority(r["samples"]) for r in rows]),
        "eval/distinct": np.mean([len({tuple(s["ids"]) for s in r["samples"]}) for r in rows]) / n,
        "eval/length": np.mean([len(s["ids"]) for s in samples]),
        "eval/truncated": np.mean([s["finish"] == "length" for s in samples]),
    }
    for k in sorted({2**i for i in range(n.bit_length())} | {n}):
        out[f"eval/pass@{k}"] = np.mean([pass_at_k(n, c, k) for c in right])
    for key, mark in (("parse_fail", INVALID), ("timeout", "[TIMEOUT]"), ("crash", "[CRASH]"), ("illegal", ILLEGAL)):
        out[f"eval/{key}"] = sum(s["answer"].startswith(mark) for s in samples)
    return {k: float(v) for k, v in out.items()} | {"eval/right": right}


def sample(cfg, engine, task, prompts, step):
    """eval_n graded responses of each of this rank's prompts -> rows {id, prompt, gold, samples: [{correct, answer,
    finish, text, ids}]}. Every prompt has a seed of its own: neither ranks nor an interruption change the noise."""
    seeds = [request_seed(cfg.seed, task.stage, step, p.id, -1) for p in prompts]
    sampling = Sampling(cfg.max_response_tokens, cfg.eval_temperature, cfg.eval_top_p)
    answers = engine.generate([p.ids for p in prompts], cfg.eval_n, sampling, seeds)
    groups = [[Rollout(p.ids, [], c.ids, prompt_id=p.id, finish=c.finish) for c in outs]
              for p, outs in zip(prompts, answers, strict=True)]  # fmt: skip
    grade(cfg, task, sum(groups, []))
    return [
        {"id": p.id, "prompt": p.text, "gold": p.answer, "samples": [
            {"correct": r.correct, "answer": r.answer, "finish": r.finish, "text": r.text, "ids": r.response_ids}
            for r in rollouts]}
        for p, rollouts in zip(prompts, groups, strict=True)
    ]  # fmt: skip


def evaluate(cfg, engine, policy, task, step, regions=None, rows=None, save=None):
    """Sample eval_n responses of every prompt of task, sharded over the ranks, and grade them -> eval/* numbers, the
    same on every rank. With a policy: also eval/entropy (see entropies). A collective.

    rows: what an interrupted evaluation already has, extended in place. save(new rows): called on every rank after
    engine_rows samples a rank, 4 engine_rows on a GPU. Without it all is one chunk."""
    rank, world, seconds = dist.get_rank(), dist.get_world_size(), {}
    rows = [] if rows is None else rows
    with timed(seconds, "eval"):
        done = {r["id"] for r in rows}
        todo = [p for p in task.prompts if p.id not in done]
        many = cfg.engine_rows * (4 if torch.cuda.is_available() else 1)
        size = world * max(1, many // cfg.eval_n) if save else max(1, len(todo))
        for start in range(0, len(todo), size):
            new = gather(sample(cfg, engine, task, todo[start : start + size][rank::world], step))
            new.sort(key=lambda r: r["id"])
            rows += new
            if save:
                save(new)
        rows.sort(key=lambda r: r["id"])
        out = summary(rows, cfg.eval_n)
        if policy:
            out |= entropies(cfg, policy, task, rows, regions)
    return out | {"timing_s/eval": seconds["timing_s/eval"]}


def entropies(cfg, policy, task, rows, regions=None):
    """{eval/entropy: nats}, the policy's entropy at the sampling temperature (top_p does not enter), token mean over
    all responses, by the trained model's forward. A collective.

    regions: optional text -> {name: per-character bools}, for the toy's character-level tokenizer."""
    prompt_ids = {p.id: p.ids for p in task.prompts}
    mine = [(r["id"], s) for r in rows[dist.get_rank() :: dist.get_world_size()] for s in r["samples"]]
    scored = policy.score_local([Rollout(prompt_ids[i], [], s["ids"]) for i, s in mine], cfg.eval_temperature or 1.0)
    parts = []  # (prompt id, name, sum, count)
    for (i, s), (_, h) in zip(mine, scored, strict=True):
        parts.append((i, "", float(h.sum()), len(h)))
        for name, mask in regions(s["text"]).items() if regions else ():
            mask = np.array(mask[: len(h)] + [False] * (len(h) - len(mask)), bool)
            parts.append((i, "_" + name, float(h[mask].sum()), int(mask.sum())))
    sums = {}
    for _, name, total, count in sorted(gather(parts), key=lambda p: p[0]):  # one order of addition on any ranks
        a, b = sums.get(name, (0.0, 0))
        sums[name] = a + total, b + count
    return {f"eval/entropy{name}": a / max(1, b) for name, (a, b) in sums.items()}


# ----------------------------------------------------------------------------------------------- benchmarks and presets
def benchmark_stages(argv):
    """Command line -> ([(benchmark's name, its Config)], preset). Order: defaults < file < preset < command line."""
    own = dict(a.split("=", 1) for a in argv if a.startswith(("benchmarks=", "preset=")))
    argv = [a for a in argv if not a.startswith(("benchmarks=", "preset="))]
    preset = own.get("preset") or ("cure" if own.get("benchmarks") else "")
    if preset and preset not in PRESETS:
        raise ValueError(f"preset: must be one of {', '.join(PRESETS)}, got {preset!r}")
    base = [f"{k}={v}" for k, v in PRESETS.get(preset, {}).items()]
    given = {a.split("=")[0] for a in argv}
    first = load_config([*base, *argv], usage=__doc__)[0][1]
    items = own.get("benchmarks") or first.eval_data
    if not items:
        raise ValueError("benchmarks: nothing to evaluate on")
    stages = {}
    for item in items.split(","):
        name, _ = find_benchmark(item)
        n = [f"eval_n={BENCHMARKS[name].n}"] if preset and name in BENCHMARKS else []
        cfg = load_config([*n, *base, *argv])[0][1]
        cfg.name, cfg.eval_data = name, item
        cfg.verifier = cfg.verifier if "verifier" in given else grader(item, cfg.template) or cfg.verifier
        if "out_dir" not in given:
            cfg.out_dir = "runs/eval/" + re.sub(r"[^\w.-]+", "-", f"{cfg.model}-{preset}".strip("./-"))
        if name in stages:
            raise ValueError(f"benchmarks: two are called {name!r}")
        stages[name] = cfg
    return list(stages.items()), preset


# ----------------------------------------------------------------------------------------------------------- the script
def results_table(results):
    """One line a benchmark, then the mean of their avg@n. results: {name: numbers}, None for a number there is not."""
    ks = sorted({int(k.split("@")[1]) for r in results.values() for k in r if k.startswith("eval/pass@")} - {1})
    columns = {"problems": ("problems", ".0f"), "n": ("n", ".0f"), "avg@n": ("avg", ".3f"), "±": ("eval/stderr", ".3f"),
               **{f"pass@{k}": (f"eval/pass@{k}", ".3f") for k in ks}, "maj@n": ("maj", ".3f"),
               "length": ("eval/length", ".1f"), "truncated": ("eval/truncated", ".3f"),
               "no answer": ("eval/parse_fail", ".0f"), "timeout": ("eval/timeout", ".0f"),
               "crash": ("eval/crash", ".0f")}  # fmt: skip
    if any("eval/entropy" in r for r in results.values()):
        columns["entropy"] = ("eval/entropy", ".3f")
    lines, means = [["benchmark", *columns]], []
    for name, r in results.items():
        r = r | {"avg": r[f"eval/avg@{r['n']}"], "maj": r[f"eval/maj@{r['n']}"]}
        lines.append([name, *("" if r.get(k) is None else f"{r[k]:{form}}" for k, form in columns.values())])
        means.append(r["avg"])
    return aligned(lines) + (f"\nmean of {len(means)}: {np.mean(means):.3f}" if len(means) > 1 else "")


def open_results(run, report):
    """Rank 0: lock out_dir, refuse what was begun with other settings, cut a torn last line off -> rows of
    samples.jsonl. `report` takes over what eval.json holds of other benchmarks. ValueError names the key."""
    lock(run)
    report["model_sha256"] = model_hash(run.path)
    path, old = f"{run.out}/samples.jsonl", read_json(f"{run.out}/eval.json") or {}
    if os.path.exists(path) and not old:
        raise ValueError(f"out_dir: {run.out} holds the samples.jsonl of something else")
    if old and old["model_sha256"] != report["model_sha256"]:
        raise ValueError(f"model: the evaluation in {run.out} is of other weights ({old['model']}); "
                         "another out_dir begins anew")  # fmt: skip
    for name in report["settings"].keys() & old.get("settings", {}).keys():
        now, then = (r["settings"][name] for r in (report, old))
        for k in [k for k in now if now[k] != then.get(k, {})]:  # {}: chat_args, from before there were any
            raise ValueError(f"{k.removesuffix('_sha256')}: {name} in {run.out} was begun with {then.get(k)!r}, "
                             f"not {now[k]!r}; another out_dir begins anew")  # fmt: skip
    report["settings"], report["results"] = (old.get(k, {}) | report[k] for k in ("settings", "results"))
    replace_file(f"{run.out}/eval.json", json.dumps(report, indent=1))
    raw = open(path, "rb").read() if os.path.exists(path) else b""
    if len(raw) != (whole := raw.rfind(b"\n") + 1):
        os.truncate(path, whole)
    rows = []
    for number, line in enumerate(raw[:whole].splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError as e:
            raise ValueError(f"out_dir: {path}:{number}: unreadable row, {e}") from e
    return rows


def set_up(argv):
    """Command line -> (run with model and engine, contents of eval.json, rows that samples.jsonl has). A collective."""
    stages, preset = benchmark_stages(argv)
    run = prepare_run(stages, train=False, trainer=preset == "entropy")
    report = {"model": run.path, "model_sha256": "", "preset": preset, "versions": versions(run)}
    report |= {"settings": {}, "results": {}}
    for name, cfg in run.stages:
        task, known = run.heldout[name], BENCHMARKS.get(name)
        text = json.dumps([(p.id, p.ids, p.answer) for p in task.prompts]).encode()
        report["settings"][name] = {k: getattr(cfg, k) for k in KEYS} | {
            "stop_token_ids": sorted(run.stop_ids), "engine": type(run.engine).__name__,
            "dtype": str(compute_dtype(cfg, run.device)), "eval_data_sha256": hashlib.sha256(text).hexdigest(),
        }  # fmt: skip
        if known and not cfg.eval_prompts and len(task.prompts) != known.size:
            run.print(f"WARNING: {name} has {known.size} problems, this evaluation {len(task.prompts)}")

        def list_unread(name=name, task=task):
            if unread := unread_golds([(p.id, p.answer) for p in task.prompts], task.verifiers):
                run.print(f"{name}: {len(unread)} of {len(task.prompts)} golds are no mathematics, compared as text"
                          + "".join(f"; row {row} {gold!r}" for row, gold in unread))  # fmt: skip

        if cfg.verifier == "math_verify":
            everywhere(list_unread if run.rank == 0 else None)
    rows = []
    everywhere((lambda: rows.extend(open_results(run, report))) if run.rank == 0 else None, ValueError)
    return run, report, gather(rows)


def main(argv):
    """Evaluate `model` on `benchmarks`."""
    with one_line_errors():
        run, report, saved = set_up(argv)
    run.refresh()
    results, rows = {}, {name: [r for r in saved if r["benchmark"] == name] for name, _ in run.stages}
    for name, cfg in run.stages:
        task, old, n = run.heldout[name], len(rows[name]), cfg.eval_n
        with tqdm(total=len(task.prompts) * n, initial=old * n, desc=name, unit="sample",
                  disable=None if run.rank == 0 else True) as bar:  # fmt: skip

            def save(new, name=name, bar=bar, n=n):
                run.append("samples.jsonl", [{"benchmark": name, **r} for r in new])
                bar.update(len(new) * n)

            numbers = evaluate(cfg, run.engine, None, task, 0, rows=rows[name], save=save)
        results[name] = {"problems": len(task.prompts), "read_back": old, "n": n, **numbers}
    if run.policy:
        run.engine.sleep()
        for name, cfg in run.stages:
            regions = bed.regions if (bed := toy.bed_of(cfg.eval_data)) else None
            results[name] |= entropies(cfg, run.policy, run.heldout[name], rows[name], regions)
    if run.rank == 0:
        results = {b: {k: None if v != v else v for k, v in r.items()} for b, r in results.items()}  # JSON has no NaN
        print(results_table(results))
        report["results"] |= results
    text = json.dumps(report, indent=1)
    everywhere((lambda: replace_file(f"{run.out}/eval.json", text)) if run.rank == 0 else None)
    if run.rank == 0:
        print(f"{run.out}/eval.json, {run.out}/samples.jsonl")
    end_group(run)
    return 0


if __name__ == "__main__":
    leave(main, sys.argv[1:])
