"""Decoding with two temperatures: T_high where a model hesitates, T_low elsewhere (80/20, arXiv 2506.01939, eq. 5).

    python analyze.py forks runs/toy [key=value …] [--high .5,1,1.5] [--low .5,1,1.5] [--threshold .672]
    python analyze.py forks model=DIR eval_data=FILE.jsonl template=chat verifier=boxed max_response_tokens=512

Every T_high with every T_low, accuracy on the held-out problems, on the torch engine. The keys are cure.py's (eval_prompts,
eval_n, seed, …; eval_temperature and eval_top_p do not count here, eq. 5 is of the whole distribution); of a run its config.yaml,
last stage and last checkpoint. H is the entropy at T = 1, nats. P: problems.
"""
import argparse
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from lib.config import load_config
from lib.data import Task, find_benchmark, grader, load_prompts
from lib.engine import Sampling, TorchEngine, request_seed
from lib.files import aligned
from lib.policy import compute_dtype, load_tokenizer
from lib.pool import VerifierPool
from reward import self_test
from rollout import Rollout, score_rollouts
from tools.analyze import COLOURS, LINES, MARKERS, STYLE, new_figure
from tools.token_entropy import DEVICE, PAPER_80, panel, run_file, run_jobs, run_models


class ForkEngine(TorchEngine):
    """80/20 eq. 5: temperature `high` where H > `threshold`, `low` elsewhere. The logits are divided by their position's
    temperature before they are drawn from, at T = 1. drawn: [tokens drawn, those drawn at `high`] of the last generate()."""

    high, low, threshold = 1.0, 1.0, PAPER_80

    def generate(self, prompts, n, sampling, seeds):
        self.n, self.drawn = n, np.zeros(2, int)
        return super().generate(prompts, n, sampling, seeds)

    def _forward(self, ids, mask, pos, cache):
        copies = self.n if cache.get_seq_length() == 0 else 1  # a prompt is read once, and n samples are drawn from it
        logits = super()._forward(ids, mask, pos, cache)  # (B, V)
        logp = logits.log_softmax(-1)
        h = -(logp.exp() * logp).nan_to_num(nan=0.0).sum(-1, keepdim=True)  # (B, 1); of a logit -inf 0, not 0 * inf
        fork = h > self.threshold
        self.drawn += copies * np.array([len(fork), int(fork.sum())])
        return logits / torch.where(fork, self.high, self.low)


def fork_setup(argv):
    """Command line -> (config, model folder, task, ForkEngine, folder for the picture). argv: at most one run folder, whose
    config.yaml and newest ckpt/*/hf are taken, and cure.py's key=value, which win. ValueError: what is missing."""
    runs, keys = [a for a in argv if "=" not in a], [a for a in argv if "=" in a]
    if len(runs) > 1:
        raise ValueError(f"forks: one run at a time, got {' '.join(runs)}")
    if runs:
        keys = ["--config", str(run_file(runs[0], "config.yaml")), *keys]
    cfg, given = load_config(keys)[-1][1], {key.split("=")[0] for key in keys}  # the last stage's
    path = cfg.model if "model" in given else cfg.init_from or cfg.model
    if runs and not given & {"model", "init_from"}:
        checkpoints = [folder for label, folder in run_models(runs[0]).items() if label != "base"]
        if not checkpoints:
            raise ValueError(f"{runs[0]} has no ckpt/*/hf: name a model with model=FOLDER")
        path = checkpoints[-1]
    if not cfg.eval_data:
        raise ValueError("eval_data: nothing to decode, name a benchmark or a file of problems")
    source = f"{cfg.toy_dir}/heldout.jsonl" if cfg.eval_data == "toy" else find_benchmark(cfg.eval_data, "eval_data")[1]
    tokenizer, gen_eos = load_tokenizer(path)
    stop_ids = set(cfg.stop_token_ids or [tokenizer.eos_token_id, *gen_eos]) - {None}
    if not stop_ids:
        raise ValueError(f"stop_token_ids: the tokenizer of {path!r} has no end token: name one")
    prompts, _ = load_prompts(source, tokenizer, cfg.template, cfg.max_prompt_tokens, cfg.system_prompt,
                              limit=cfg.eval_prompts, key="eval_data")
    verifier = cfg.verifier if "verifier" in given else grader(cfg.eval_data, cfg.template) or cfg.verifier
    task = Task("eval", prompts, None, tokenizer, None, VerifierPool(timeout_s=20.0), verifier)
    self_test(verifier, task.verifiers)
    engine = ForkEngine(cfg, path, DEVICE, compute_dtype(cfg, DEVICE), stop_ids)
    context, longest = getattr(engine.model.config, "max_position_embeddings", None), max(len(p.ids) for p in prompts)
    if context and longest + cfg.max_response_tokens > context:
        raise ValueError(f"max_response_tokens: {cfg.max_response_tokens} and the longest prompt, {longest} tokens, are over the "
                         f"model's context of {context}")
    engine.sync(engine.model.named_parameters())  # it was loaded with its weights
    return cfg, path, task, engine, Path(runs[0] if runs else ".") / "plots"


def decode(cfg, task, engine, high, low):
    """eval_n responses of every prompt with these two temperatures -> {right (P,): share of right ones a prompt, length: mean
    tokens, cut: share that reached max_response_tokens, forks: share of tokens drawn at T_high}.

    Seeds are eval.py's, the same for all temperatures: what differs between two cells is not the noise."""
    engine.high, engine.low = high, low
    seeds = [request_seed(cfg.seed, task.stage, 0, p.id, -1) for p in task.prompts]
    answers = engine.generate([p.ids for p in task.prompts], cfg.eval_n, Sampling(cfg.max_response_tokens), seeds)
    rollouts = [Rollout(p.ids, [], c.ids, c.logp, prompt_id=p.id, finish=c.finish)
                for p, outs in zip(task.prompts, answers, strict=True) for c in outs]
    score_rollouts(cfg, task, rollouts, {"reward": {}})
    return {"right": np.array([r.correct for r in rollouts]).reshape(-1, cfg.eval_n).mean(1),
            "length": np.mean([len(r.response_ids) for r in rollouts]),
            "cut": np.mean([r.finish == "length" for r in rollouts]), "forks": engine.drawn[1] / engine.drawn[0]}


def forks(argv, highs, lows, threshold, out=None):
    """Analysis (f): every T_high with every T_low, and T = 1 for both to compare with. Prints the table, draws forks.png."""
    cfg, path, task, engine, plots = fork_setup(argv)
    engine.threshold, P = threshold, len(task.prompts)
    print(f"{path}: {P} problems of {cfg.eval_data}, {cfg.eval_n} responses each, T_high where H > {threshold:g} nats")
    cells = {}
    for pair in tqdm(dict.fromkeys([(1.0, 1.0), *((high, low) for high in highs for low in lows)]), disable=None):
        cells[pair] = decode(cfg, task, engine, *pair)
    task.verifiers.close()
    print(fork_table(cells))
    plots = Path(out) if out else plots
    plots.mkdir(parents=True, exist_ok=True)
    draw_forks(plots / "forks.png", cells, highs, lows, cfg.eval_n, threshold)
    return [plots / "forks.png"]


def mean_and_error(x):
    """(P,) -> mean, its standard error over prompts (NaN for one)."""
    return x.mean(), x.std(ddof=1) / np.sqrt(len(x)) if len(x) > 1 else float("nan")


def fork_table(cells):
    """{(T_high, T_low): decode()'s} -> a line a pair; the difference to T = 1 throughout is paired by problem."""
    plain = cells[1.0, 1.0]["right"]
    rows = [["T_high", "T_low", "accuracy", "against 1, 1", "length", "truncated", "tokens at T_high"]]
    for (high, low), cell in sorted(cells.items()):
        mean, error = mean_and_error(cell["right"])
        gain, gain_error = mean_and_error(cell["right"] - plain)
        rows.append([f"{high:g}", f"{low:g}", f"{mean:.3f} ± {error:.3f}",
                     f"{gain:+.3f} ± {gain_error:.3f}" if (high, low) != (1, 1) else "", f"{cell['length']:.1f}",
                     f"{cell['cut']:.3f}", f"{cell['forks']:.1%}"])
    return aligned(rows) + "\n±: standard error over prompts; of a difference, of the prompts' differences"


def draw_forks(path, cells, highs, lows, n, threshold):
    """Accuracy against T_high, a line per T_low, and the other way round; bars are standard errors over prompts."""
    from matplotlib import rc_context
    highs, lows = sorted(set(highs)), sorted(set(lows))
    views = [("T_high", f"T_high: temperature of tokens with H > {threshold:g}", highs, lows, "T_low"),
             ("T_low", "T_low: temperature of all other tokens", lows, highs, "T_high")]
    views = [view for view in views if len(view[2]) > 1] or views[:1]  # one value makes no curve
    with rc_context(STYLE | {"font.size": 10.5}):
        figure = new_figure(4.4)
        for ax, (name, label, across, lines, other) in zip(figure.subplots(1, len(views), sharey=True, squeeze=False)[0], views,
                                                           strict=True):
            for i, fixed in enumerate(lines):
                points = [cells[(x, fixed) if name == "T_high" else (fixed, x)]["right"] for x in across]
                ax.errorbar(across, *zip(*map(mean_and_error, points), strict=True), color=COLOURS[i % 7], ls=LINES[i % 7],
                            marker=MARKERS[i % 7], ms=5, capsize=2, label=f"{other} {fixed:g}")
            ax.set(xlabel=label, ylabel=f"accuracy (avg@{n}, share)" if ax.get_subplotspec().is_first_col() else "")
            panel(ax, f"(f) Accuracy against {name}", 3)
        figure.savefig(path)


def temperatures(text):
    """`.5,1` -> [0.5, 1.0]; the error is argparse's."""
    out = [float(x) for x in text.split(",")]
    if not all(0 < t < np.inf for t in out):
        raise argparse.ArgumentTypeError(f"temperatures must be positive, got {text}")
    return out


def main(argv):
    """`analyze.py forks`; exit code 2 where something is missing."""
    parser = argparse.ArgumentParser(prog="analyze.py forks", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="+", metavar="RUN|key=value", help="a run folder and keys, or keys alone")
    for name in ("--high", "--low"):
        parser.add_argument(name, type=temperatures, default=[.5, .75, 1., 1.25, 1.5], metavar="T,T", help=".5,.75,1,1.25,1.5")
    parser.add_argument("--threshold", type=float, default=PAPER_80, help="a token with H above it is a fork, nats (%(default)s)")
    parser.add_argument("--out", metavar="DIR", help="where the picture goes (default: the run's plots, or plots)")
    args = parser.parse_intermixed_args(argv)
    return run_jobs([partial(forks, args.settings, args.high, args.low, args.threshold, args.out)])
