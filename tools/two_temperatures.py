"""Decoding with two temperatures: T_high where a model hesitates, T_low elsewhere (80/20, arXiv 2506.01939, eq. 5).

    python -m tools.two_temperatures runs/toy [key=value …] [--high .5,1,1.5] [--low .5,1,1.5] [--threshold .672]
    python -m tools.two_temperatures model=DIR eval_data=FILE.jsonl template=chat verifier=boxed max_response_tokens=512

Every T_high with every T_low: accuracy on the held-out problems, on the torch engine. The keys are cure.py's. A run
stands for its config.yaml, last stage and last checkpoint. eval_temperature and eval_top_p do not count: eq. 5 is of
the whole distribution. H is the entropy at T = 1, nats. P: problems.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from lib import toy
from lib.config import load_config
from lib.data import Task, find_benchmark, grader, load_prompts
from lib.engine import Sampling, TorchEngine, request_seed
from lib.files import aligned
from lib.policy import compute_dtype
from lib.pool import VerifierPool
from lib.weights import load_tokenizer
from reward import self_test
from rollout import Rollout, grade
from tools.common import command_line, for_each, look, panel, picture, run_file
from tools.token_entropy import DEVICE, PAPER_80, run_models


class TwoTemperatureEngine(TorchEngine):
    """80/20 eq. 5: temperature `high` where H > `threshold`, `low` elsewhere. Logits are divided by their position's
    temperature and then drawn from at T = 1. drawn: [tokens drawn, those at `high`] of the last generate()."""

    high, low, threshold = 1.0, 1.0, PAPER_80

    def generate(self, prompts, n, sampling, seeds):
        self.n, self.drawn = n, np.zeros(2, int)
        return super().generate(prompts, n, sampling, seeds)

    def _forward(self, ids, mask, pos, cache):
        copies = self.n if cache.get_seq_length() == 0 else 1  # a prompt is read once, and n samples are drawn from it
        logits = super()._forward(ids, mask, pos, cache)  # (B, V)
        logp = logits.log_softmax(-1)
        h = -(logp.exp() * logp).nan_to_num(nan=0.0).sum(-1, keepdim=True)  # (B, 1); of a logit -inf 0, not 0 * inf
        uncertain = h > self.threshold
        self.drawn += copies * np.array([len(uncertain), int(uncertain.sum())])
        return logits / torch.where(uncertain, self.high, self.low)


def task_and_engine(argv):
    """Command line -> (config, model folder, task, engine, folder for the picture). argv: at most one run folder, whose
    config.yaml and newest ckpt/*/hf are taken, and cure.py's key=value, which win. ValueError: what is missing."""
    runs, keys = [a for a in argv if "=" not in a], [a for a in argv if "=" in a]
    if len(runs) > 1:
        raise ValueError(f"two_temperatures: one run at a time, got {' '.join(runs)}")
    if runs:
        keys = ["--config", str(run_file(runs[0], "config.yaml")), *keys]
    cfg, given = load_config(keys)[-1][1], {key.split("=")[0] for key in keys}  # the last stage's
    path = cfg.model
    if runs and "model" not in given:
        checkpoints = [folder for name, folder in run_models(runs[0]).items() if name != "base"]
        if not checkpoints:
            raise ValueError(f"{runs[0]} has no ckpt/*/hf: name a model with model=FOLDER")
        path = checkpoints[-1]
    if not cfg.eval_data:
        raise ValueError("eval_data: nothing to decode, name a benchmark or a file of problems")
    bed = toy.BEDS.get(cfg.eval_data)
    source = f"{bed.folder}/heldout.jsonl" if bed else find_benchmark(cfg.eval_data, "eval_data")[1]
    tokenizer, gen_eos = load_tokenizer(path)
    stop_ids = set(cfg.stop_token_ids or [tokenizer.eos_token_id, *gen_eos]) - {None}
    if not stop_ids:
        raise ValueError(f"stop_token_ids: the tokenizer of {path!r} has no end token: name one")
    prompts, _ = load_prompts(source, tokenizer, cfg.template, cfg.max_prompt_tokens, cfg.system_prompt,
                              cfg.chat_args, limit=cfg.eval_prompts, key="eval_data")
    verifier = cfg.verifier if "verifier" in given else grader(cfg.eval_data, cfg.template) or cfg.verifier
    task = Task("eval", prompts, None, tokenizer, None, VerifierPool(timeout_s=20.0), verifier)
    self_test(verifier, task.verifiers)
    engine = TwoTemperatureEngine(cfg, path, DEVICE, compute_dtype(cfg, DEVICE), stop_ids)
    context, longest = getattr(engine.model.config, "max_position_embeddings", None), max(len(p.ids) for p in prompts)
    if context and longest + cfg.max_response_tokens > context:
        raise ValueError(f"max_response_tokens: {cfg.max_response_tokens} and the longest prompt, {longest} tokens, "
                         f"are over the model's context of {context}")
    engine.sync(engine.model.named_parameters())  # it was loaded with its weights
    return cfg, path, task, engine, Path(runs[0] if runs else ".") / "plots"


def measure(cfg, task, engine, high, low):
    """eval_n responses of every prompt with these two temperatures -> {right (P,): share of right ones a prompt,
    length: mean tokens, cut: share that reached max_response_tokens, high: share of tokens drawn at T_high}.

    Seeds are eval.py's, the same for all temperatures: what differs between two of them is not the noise."""
    engine.high, engine.low = high, low
    seeds = [request_seed(cfg.seed, task.stage, 0, p.id, -1) for p in task.prompts]
    answers = engine.generate([p.ids for p in task.prompts], cfg.eval_n, Sampling(cfg.max_response_tokens), seeds)
    rollouts = [Rollout(p.ids, [], c.ids, c.logp, prompt_id=p.id, finish=c.finish)
                for p, outs in zip(task.prompts, answers, strict=True) for c in outs]
    grade(cfg, task, rollouts)
    return {"right": np.array([r.correct for r in rollouts]).reshape(-1, cfg.eval_n).mean(1),
            "length": np.mean([len(r.response_ids) for r in rollouts]),
            "cut": np.mean([r.finish == "length" for r in rollouts]), "high": engine.drawn[1] / engine.drawn[0]}


def sweep(args):
    """Every T_high with every T_low, and T = 1 for both to compare with: prints the table, draws the picture."""
    cfg, path, task, engine, plots = task_and_engine(args.settings)
    engine.threshold = args.threshold
    print(f"{path}: {len(task.prompts)} problems of {cfg.eval_data}, {cfg.eval_n} responses each, T_high where "
          f"H > {args.threshold:g} nats")
    pairs = dict.fromkeys([(1.0, 1.0), *((high, low) for high in args.high for low in args.low)])
    cells = {pair: measure(cfg, task, engine, *pair) for pair in tqdm(pairs, disable=None)}
    task.verifiers.close()
    print(accuracy_table(cells))
    out = Path(args.out or plots) / "two_temperatures.png"
    draw_accuracy(out, cells, sorted(set(args.high)), sorted(set(args.low)), cfg.eval_n, args.threshold)
    return f"\nwritten: {out}\n"


def mean_and_error(x):
    """(P,) -> mean, its standard error over prompts (NaN for one)."""
    return x.mean(), x.std(ddof=1) / np.sqrt(len(x)) if len(x) > 1 else float("nan")


def accuracy_table(cells):
    """{(T_high, T_low): measure()'s} -> a line a pair; the difference to T = 1 throughout is paired by problem."""
    rows = [["T_high", "T_low", "accuracy", "against 1, 1", "length", "truncated", "tokens at T_high"]]
    for (high, low), cell in sorted(cells.items()):
        mean, error = mean_and_error(cell["right"])
        gain, gain_error = mean_and_error(cell["right"] - cells[1.0, 1.0]["right"])
        rows.append([f"{high:g}", f"{low:g}", f"{mean:.3f} ± {error:.3f}",
                     f"{gain:+.3f} ± {gain_error:.3f}" if (high, low) != (1, 1) else "", f"{cell['length']:.1f}",
                     f"{cell['cut']:.3f}", f"{cell['high']:.1%}"])
    return aligned(rows) + "\n±: standard error over prompts; of a difference, of the prompts' differences"


def draw_accuracy(path, cells, highs, lows, n, threshold):
    """Accuracy against T_high, a line per T_low, and the other way round; bars are standard errors over prompts."""
    grid = [[mean_and_error(cells[high, low]["right"]) for low in lows] for high in highs]  # (highs, lows, 2)
    views = [("T_high", f"tokens with H > {threshold:g}", highs, "T_low", lows, np.array(grid)),
             ("T_low", "all other tokens", lows, "T_high", highs, np.array(grid).transpose(1, 0, 2))]
    views = [view for view in views if len(view[2]) > 1] or views[:1]  # one value makes no curve
    with picture(path, 4.4, {"font.size": 10.5}) as figure:
        axes = figure.subplots(1, len(views), sharey=True, squeeze=False)[0]
        for ax, (name, where, across, other, lines, values) in zip(axes, views, strict=True):
            for i, fixed in enumerate(lines):
                ax.errorbar(across, *values[:, i].T, **look(i), ms=5, capsize=2, label=f"{other} {fixed:g}")
            ax.set_xlabel(f"{name}: temperature of {where}")
            panel(ax, f"(f) Accuracy against {name}", 3)
        axes[0].set_ylabel(f"accuracy (avg@{n}, share)")


def temperatures(text):
    """`.5,1` -> [0.5, 1.0]; the error is argparse's."""
    out = [float(x) for x in text.split(",")]
    if not all(0 < t < np.inf for t in out):
        raise argparse.ArgumentTypeError(f"temperatures must be positive, got {text}")
    return out


def main(argv):
    """A run, or a model and its problems; exit code 2 where something is missing."""
    parser = command_line("two_temperatures", __doc__)
    parser.add_argument("settings", nargs="+", metavar="RUN|key=value", help="a run folder and keys, or keys alone")
    for name in ("--high", "--low"):
        parser.add_argument(name, type=temperatures, default=[.5, .75, 1., 1.25, 1.5], metavar="T,T",
                            help=".5,.75,1,1.25,1.5")
    parser.add_argument("--threshold", type=float, default=PAPER_80, help="nats, T_high where H > it (%(default)s)")
    parser.add_argument("--out", metavar="DIR", help="where the picture goes (default: the run's plots, or plots)")
    return for_each(sweep, [parser.parse_intermixed_args(argv)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
