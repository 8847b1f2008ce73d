"""Where models hesitate: the entropy analyses of the 80/20 paper (arXiv 2506.01939) on any run or models.

    python -m tools.token_entropy runs/toy [more runs]         from samples.jsonl, the base model and ckpt/*/hf
    python -m tools.token_entropy BASE MODEL… FINAL --samples FILE.jsonl [--out DIR]     any models with one tokenizer

(a) histogram and percentiles, (b) tokens of highest and lowest mean H, (c) overlap of the top-20 % positions between
models, (d) change of H by 5 % bin of the base model's H, (e) percentiles over training. All models read the same
responses, the last ones in samples.jsonl; only base rollouts, for a branch does not start at the prompt.
Symbols: H entropy of the full distribution at T = 1, nats · N tokens of the responses, one after the other · K models.
"""
import json
import os
import re
import sys
from collections import deque
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch

from lib.config import Config
from lib.files import aligned
from lib.policy import PackedLM, compute_dtype, pack, packed_length
from lib.weights import load_lm, load_tokenizer
from loss import token_mask
from rollout import Rollout
from tools.common import COLOURS, LINES, command_line, for_each, look, panel, picture, read_samples, run_file, warn

PAPER_BELOW, PAPER_80, PAPER_LAST = .5064, .672, 86.67  # share of H < 0.01, 80th percentile, last overlap
PAPER_OVERLAP = "100, 98.92, 98.70, 93.04, 93.02, 93.03, 87.45, 87.22, 87.09, 86.67"  # %, base and ten checkpoints
PERCENTILES = (50, 80, 90, 95, 99)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHOWN = 30  # tokens in the picture and the printed table; the file has them all


# ---- reading ---------------------------------------------------------------------------------------------------------

def read_responses(path, number):
    """samples.jsonl -> (the last `number` base rollouts, {step: H (tokens,) of all its base rollouts, as logged}).

    ValueError: it holds none."""
    rows, by_step = deque(maxlen=number), {}
    for row in read_samples(path):
        if row["parent"] < 0:
            rows.append(row)
            by_step.setdefault(row["step"], []).append(np.array(row["entropy"], np.float32))
    if not rows:
        raise ValueError(f"{path} holds no fresh response")
    return list(rows), {step: np.concatenate(hs) for step, hs in by_step.items()}


def run_models(run):
    """{name: HF folder} of a run: the base model where it is a folder here, then ckpt/step_*/hf in order."""
    models = {}
    try:
        stages = list(json.loads((Path(run) / "stages.json").read_text()).values())
        base = stages[0].get("init_from") or stages[0]["model"]
        if any(stage["temperature"] != 1 for stage in stages):
            warn(f"{run}: sampled at another temperature than 1: so are the entropies in its samples.jsonl, (e)")
        if os.path.isdir(base):
            models["base"] = base
        else:
            warn(f"{run}: its base model {base!r} is no folder here; the first checkpoint stands for it")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        warn(f"{run}: no readable stages.json to name the base model; the first checkpoint stands for it")
    for folder in sorted(Path(run).glob("ckpt/step_*/hf")):
        if found := re.fullmatch(r"step_\d+_(\w+)_(\d+)|step_(\d+)", folder.parent.name):  # of an sft stage; of RL
            models[f"{found[1] or 'step'} {int(found[2] or found[3])}"] = str(folder)
    return models


def short_names(folders):
    """{name: folder} of models: the folder's own name, of an `hf` the one above it, the path where two agree."""
    paths = [Path(folder).resolve() for folder in folders]
    names = [path.parent.name if path.name == "hf" else path.name for path in paths]
    return {name if names.count(name) == 1 else folder: folder for name, folder in zip(names, folders, strict=True)}


def response_entropies(folder, rows):
    """H of every response token under the model in `folder` at T = 1 -> (fp32 (N,) in the rows' order, its tokenizer).

    The trainer's packed forward and fp32 head, on one device. ValueError: not loadable, or another tokenizer than the
    rows': ids beyond its vocabulary, or ids that it reads as other text (looked at in 64 rows)."""
    cfg, other = Config(), "another tokenizer than the samples': "
    tokenizer, _ = load_tokenizer(folder)
    for row in rows[::-(-len(rows) // 64)]:
        if (text := tokenizer.decode(row["response_ids"], skip_special_tokens=True)) != row["response"]:
            raise ValueError(f"{other}it reads {row['response'][:30]!r} as {text[:30]!r}")
    lm = load_lm(folder, compute_dtype(cfg, DEVICE), "packed")
    if (top := max(max(row["prompt_ids"] + row["response_ids"]) for row in rows)) >= lm.config.vocab_size:
        raise ValueError(f"{other}id {top} is over its vocabulary of {lm.config.vocab_size}")
    model = PackedLM(lm.to(DEVICE).eval())
    rollouts = [Rollout(row["prompt_ids"], [], row["response_ids"]) for row in rows]
    size = max(1, cfg.micro_batch_tokens // max(map(packed_length, rollouts)))  # so many always fit
    with torch.no_grad():
        parts = [model(**pack(rollouts[i:i + size], DEVICE), temperature=1.0)[1] for i in range(0, len(rows), size)]
    return torch.cat(parts).cpu().numpy(), tokenizer


# ---- the numbers: arrays in, arrays out ------------------------------------------------------------------------------

def extremes(ids, h, k=100, more_than=100):
    """The k token ids of highest and the k of lowest mean H of those seen over `more_than` times (80/20's word clouds).

    ids, h (N,) -> (highest, lowest, number that qualify). The lists are of (id, count, mean H), most extreme first, of
    equal means the lower id first. Where fewer than 2 k qualify, they are the two halves: no token is in both."""
    found, index, count = np.unique(ids, return_inverse=True, return_counts=True)
    means = zip(found.tolist(), count.tolist(), (np.bincount(index, h) / count).tolist(), strict=True)
    often = sorted((entry for entry in means if entry[1] > more_than), key=lambda entry: (-entry[2], entry[0]))
    high = often[:min(k, -(-len(often) // 2))]
    low = sorted(often[max(len(often) - k, len(high)):], key=lambda entry: (entry[2], entry[0]))
    return high, low, len(often)


def overlaps(entropies):
    """|A and B| / |A| of the top-20 % positions of K models on the same N tokens: (K, N) -> (K, K).

    The positions are those that 80/20's mask trains on, of equal H the lower ones."""
    top = np.array([token_mask(torch.as_tensor(h), rho=.2).numpy() for h in entropies]).astype(float)
    return top @ top.T / top.sum(1)


def change_by_bin(base, final, bins=20):
    """Positions sorted by the base model's H, in `bins` of equal number (of equal H the lower position first) ->
    (bins, 3): highest and mean base H of the bin, mean of H final - H base. Fewer tokens than bins: so many bins."""
    parts = np.array_split(np.argsort(base, kind="stable"), min(bins, len(base)))
    base, final = base.astype(float), final.astype(float)
    return np.array([(base[i].max(), base[i].mean(), (final[i] - base[i]).mean()) for i in parts])


# ---- tables and pictures ---------------------------------------------------------------------------------------------

def analyse(models, samples, plots, responses):
    """Analyses (a)-(e): prints the tables, draws plots/entropy.png and entropy_tokens.png, writes entropy_tokens.tsv.

    models: {name: HF folder}, base first, final last; those that cannot read the samples are named and left out.
    Without any, (a), (b) and (e) are of the entropies in samples.jsonl. ValueError: no samples. Returns a line."""
    rows, by_step = read_responses(samples, responses)
    ids = np.concatenate([row["response_ids"] for row in rows])
    hs, tokenizer = {}, None
    for name, folder in models.items():
        try:
            hs[name], tokenizer = response_entropies(folder, rows)
        except ValueError as error:
            warn(f"{name} ({folder}) is left out: {error}")
    if not hs:
        warn(f"{samples}: no model scored it: no (c), no (d), and the entropies are those of the file")
        hs = {"as logged": np.concatenate([np.array(row["entropy"], np.float32) for row in rows])}
    elif len(hs) < 2:
        warn(f"{samples}: (c) and (d) compare two models, only {next(iter(hs))} is there")
    steps, final = [row["step"] for row in rows], list(hs)[-1]
    print(f"{samples}: the last {len(rows)} fresh responses, of steps {steps[0]} to {steps[-1]}, {len(ids)} tokens; "
          "H in nats at T = 1.\nA step writes down groups with right and wrong answers if it has any: these are not "
          "all its responses.\n")
    high, low, number = extremes(ids, hs[final])

    def text(i):  # quoted: it shows spaces and newlines
        return repr(tokenizer.decode([i])) if tokenizer else f"id {i}"

    print(percentile_table(hs), token_table(high, low, number, final, text), sep="\n\n", end="\n\n")
    if len(hs) > 1:
        print(overlap_table(hs), change_table(hs), sep="\n\n", end="\n\n")
    print(training_table(by_step))
    paths = [plots / "entropy.png", plots / "entropy_tokens.tsv"]
    draw_entropy(paths[0], hs, by_step)
    with open(paths[1], "w", encoding="utf-8") as file:
        file.write("list\trank\tid\ttext\tcount\tmean_H\n")
        for name, entries in (("highest", high), ("lowest", low)):
            file.writelines(f"{name}\t{rank}\t{i}\t{text(i)}\t{count}\t{h:.6f}\n"
                            for rank, (i, count, h) in enumerate(entries, 1))
    if number:
        paths.append(plots / "entropy_tokens.png")
        draw_tokens(paths[-1], high[:SHOWN], low[:SHOWN], final, text)
    return "\nwritten: " + ", ".join(map(str, paths)) + "\n"


def percentile_table(hs):
    """(a): hs {model: H (N,) nats} -> share of tokens below 0.01 nats, percentiles and mean, beside the paper's."""
    rows = [["(a) entropy of a token", *hs, "80/20 paper"],
            ["share below 0.01", *(f"{(h < .01).mean():.2%}" for h in hs.values()), f"{PAPER_BELOW:.2%}"]]
    for p in PERCENTILES:
        paper = str(PAPER_80) if p == 80 else ""
        rows.append([f"{p}th percentile", *(f"{np.percentile(h, p):.4f}" for h in hs.values()), paper])
    return aligned([*rows, ["mean", *(f"{h.mean(dtype=float):.4f}" for h in hs.values()), ""]])


def token_table(high, low, number, final, text):
    """(b): the first SHOWN tokens of both lists side by side."""
    head = (f"(b) mean entropy of tokens seen more than 100 times, {final}: the {len(high)} highest, the {len(low)} "
            "lowest")
    if number < 200:
        head += (f"\n    only {number} token ids were seen so often, too few for two lists of 100: their upper and "
                 "lower half")
    cells = [[(text(i), str(count), f"{h:.5f}") for i, count, h in entries[:SHOWN]] for entries in (high, low)]
    rows = [["highest", "count", "mean H", "   lowest", "count", "mean H"]]
    rows += [[*a, *b] for a, b in zip_longest(*cells, fillvalue=("", "", ""))]
    more = [f"… and {len(high) - SHOWN} more of each in entropy_tokens.tsv"] if len(high) > SHOWN else []
    return "\n".join([head, *([aligned(rows)] if number else []), *more])


def overlap_table(hs):
    """(c): hs {model: H (N,)} -> overlaps() of every pair of models, percent."""
    rows = [["(c) overlap of the top 20 % positions with", *hs]]
    for name, line in zip(hs, overlaps(list(hs.values())), strict=True):
        rows.append([name, *(f"{x:.2%}" for x in line)])
    return aligned(rows) + f"\n80/20 paper, base and ten checkpoints of a run, with the base: {PAPER_OVERLAP} %"


def change_table(hs):
    """(d): hs {model: H (N,)}, base first, final last -> change_by_bin() of these two, nats."""
    base, final = list(hs)[0], list(hs)[-1]
    rows = [[f"(d) bin of H in {base}", "H up to", "mean H", f"mean change to {final}"]]
    bins = change_by_bin(hs[base], hs[final])
    for i, (top, mean, change) in enumerate(bins):
        borders = f"{100 * i / len(bins):3.0f} to {100 * (i + 1) / len(bins):3.0f} %"
        rows.append([borders, f"{top:.5f}", f"{mean:.5f}", f"{change:+.5f}"])
    return aligned(rows)


def training_table(by_step):
    """(e): percentiles of every step's own responses; at most nine steps, the first and the last among them."""
    steps = sorted(by_step)
    rows = [["(e) step, its own fresh responses as logged", "tokens", *(f"{p}th" for p in PERCENTILES)]]
    for i in sorted({round(i) for i in np.linspace(0, len(steps) - 1, 9)}):
        h = by_step[steps[i]]
        rows.append([str(steps[i]), str(len(h)), *(f"{x:.4f}" for x in np.percentile(h, PERCENTILES))])
    return aligned(rows)


def draw_entropy(path, hs, by_step):
    """Four panels, or two where there is one model: histogram (a), overlap (c), change by bin (d), percentiles (e)."""
    rows = 2 if len(hs) > 1 else 1
    with picture(path, 4 * rows, {"font.size": 10}) as figure:
        axes = figure.subplots(rows, 2).flatten()
        draw_histogram(axes[0], hs)
        if len(hs) > 1:
            draw_overlap(axes[1], hs)
            draw_change(axes[2], hs)
        draw_training(axes[-1], by_step)


def draw_histogram(ax, hs):
    """(a): share of tokens by H, of the first and the last model: more would hide each other."""
    edges = np.linspace(0, max(max(h.max() for h in hs.values()), 1e-3), 61)
    for i, name in enumerate(dict.fromkeys([list(hs)[0], list(hs)[-1]])):
        h = hs[name]
        ax.stairs(np.histogram(h, edges)[0] / len(h), edges, color=COLOURS[i], ls=LINES[i], lw=1.5,
                  label=f"{name}: {(h < .01).mean():.0%} below 0.01, 80th percentile {np.percentile(h, 80):.3g}")
    ax.axvline(PAPER_80, color="black", ls=":", label=f"80/20 paper: 51% below 0.01, 80th percentile {PAPER_80}")
    ax.set_yscale("log")
    panel(ax, "(a) How uncertain tokens are", 1, xlabel="entropy of a token (nats)",
          ylabel=f"share of tokens\nper bin of {edges[1]:.2g} nats")


def draw_overlap(ax, hs):
    """(c): the first and the last model's overlap with every model, percent."""
    names, table = list(hs), 100 * overlaps(list(hs.values()))
    for i, row in enumerate((0, -1)):
        ax.plot(range(len(names)), table[row], **look(i), ms=5, label=f"with {names[row]}")
    ax.axhline(PAPER_LAST, color="black", ls=":", label=f"80/20 paper: {PAPER_LAST}, final with base")
    ax.set_xticks(range(len(names)), names, rotation=30 if len(names) > 6 else 0)
    ax.set(xlim=(-.2, len(names) - .8), ylim=(min(80, table.min() - 5), 101))
    ax.yaxis.get_major_locator().set_params(integer=True)
    panel(ax, "(c) Do the same positions stay uncertain?", 1, ylabel="% of the top 20 % positions shared")


def draw_change(ax, hs):
    """(d): a bar a bin of the first model's H: mean change to the last model, nats."""
    base, final = list(hs)[0], list(hs)[-1]
    change = change_by_bin(hs[base], hs[final])[:, 2]
    width = 100 / len(change)
    ax.bar((np.arange(len(change)) + .5) * width, change, .86 * width, color=COLOURS[0])
    ax.axhline(0, color="black", lw=.8)
    panel(ax, f"(d) Change from {base} to {final}", 0, xlim=(0, 100), xlabel=f"percentile of entropy in {base}",
          ylabel="mean change of entropy (nats)")


def draw_training(ax, by_step):
    """(e): percentiles of every step's own responses. samples.jsonl rounds to 1e-5."""
    steps = sorted(by_step)
    lines = np.array([np.percentile(by_step[step], PERCENTILES) for step in steps]).clip(1e-5)
    for i, p in reversed(list(enumerate(PERCENTILES))):
        ax.plot(steps, lines[:, i], **look(i, len(steps) == 1), label=f"{p}th")
    ax.set_yscale("log")
    ax.xaxis.get_major_locator().set_params(integer=True)
    panel(ax, "(e) Percentiles over training", 5, xlabel="training step",
          ylabel="entropy (nats), each step's\nown fresh responses")


def draw_tokens(path, high, low, final, text):
    """(b): bars of mean H, highest tokens left, lowest right; the count of each beside its bar."""
    with picture(path, 1.2 + .2 * len(high), {"font.size": 9.5, "axes.grid.axis": "x"}) as figure:
        for k, (ax, which, entries) in enumerate(zip(figure.subplots(1, 2), ("highest", "lowest"), (high, low))):
            means = [h for _, _, h in entries]
            ax.barh(range(len(entries)), means, color=COLOURS[k])
            names = [text(i) for i, _, _ in entries]
            names = [ascii(name[1:-1] if name[0] in "'\"" else name).replace("\\\\", "\\") for name in names]
            # ascii: the font has no CJK; no mathematics: a token may be "$"
            ax.set_yticks(range(len(entries)), names, family="monospace", parse_math=False)
            for y, (_, count, h) in enumerate(entries):
                ax.annotate(f"{count}×", (h, y), (3, 0), textcoords="offset points", va="center", fontsize="small",
                            color=".3")
            panel(ax, f"(b) Tokens of {which} mean entropy", 0, xlabel=f"mean entropy under {final} (nats)",
                  xlim=(0, 1.16 * max([*means, 1e-6])), ylim=(max(len(high), 1) - .4, -.6))


def main(argv):
    """Every run, or the models given; exit code 2 tells that one could not be done."""
    parser = command_line("token_entropy", __doc__)
    parser.add_argument("folders", nargs="+", metavar="RUN|MODEL", help="runs; with --samples models, base to final")
    parser.add_argument("--samples", metavar="FILE", help="a samples.jsonl that the models read")
    parser.add_argument("--responses", type=int, default=512, help="the last so many responses (default %(default)s)")
    parser.add_argument("--out", metavar="DIR", default="plots", help="with --samples: for all files (%(default)s)")
    args = parser.parse_args(argv)
    if args.responses < 1:
        parser.error(f"--responses must be at least 1, got {args.responses}")

    def analyse_run(run):
        samples = run_file(run, "samples.jsonl")
        return analyse(run_models(run), samples, Path(run) / "plots", args.responses)

    if args.samples:
        models = short_names(args.folders)
        return for_each(lambda file: analyse(models, file, Path(args.out), args.responses), [args.samples])
    return for_each(analyse_run, args.folders)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
