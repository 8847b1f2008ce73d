"""Where models hesitate: the entropy analyses of the 80/20 paper (arXiv 2506.01939) on any run or models.

    python analyze.py entropy runs/toy [more runs]         from samples.jsonl, the base model and ckpt/*/hf
    python analyze.py entropy BASE MODEL… FINAL --samples FILE.jsonl [--out DIR]         any models with one tokenizer

(a) histogram and percentiles, (b) tokens of highest and lowest mean H, (c) overlap of the top-20 % positions between models,
(d) change of H by 5 % bin of the base model's H, (e) percentiles over training. All models score the same responses, the last
ones in samples.jsonl; only fresh ones, which start at the prompt and not at a branch point: what the model writes by itself.
Symbols: H entropy of the full distribution at T = 1, nats · N tokens of the responses, one after the other · K models.
"""
import argparse
import glob
import json
import os
import re
from collections import deque
from functools import partial
from pathlib import Path

import numpy as np
import torch

from lib.config import Config
from lib.files import aligned
from lib.policy import PackedLM, compute_dtype, load_lm, load_tokenizer, pack, packed_length, partition
from loss import entropy_mask
from rollout import Rollout
from tools.analyze import COLOURS, LINES, MARKERS, STYLE, new_figure, warn

PAPER_BELOW, PAPER_80, PAPER_LAST = .5064, .672, 86.67  # share of tokens with H < 0.01, 80th percentile, last overlap
PAPER_OVERLAP = "100, 98.92, 98.70, 93.04, 93.02, 93.03, 87.45, 87.22, 87.09, 86.67"  # %, with the base, ten checkpoints
PERCENTILES = (50, 80, 90, 95, 99)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHOWN = 30  # tokens in the picture and the printed table; the file has them all


# ---- reading ---------------------------------------------------------------------------------------------------------

def run_file(run, name):
    """The path of a file of a run; ValueError says what is missing."""
    if not os.path.isdir(run):
        raise ValueError(f"{run}: no such run folder")
    if not (Path(run) / name).is_file():
        raise ValueError(f"{run} is no run, or an incomplete one: it has no {name}")
    return Path(run) / name


def read_samples(path, responses):
    """samples.jsonl -> (the last `responses` fresh rows, {step: H (tokens of that step's fresh rows,) as logged}).

    Torn lines and lines that are no sample are counted, named in one line on stderr and left out. ValueError: nothing left."""
    rows, by_step, bad = deque(maxlen=responses), {}, []
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                step, fresh, h = int(row["step"]), row["parent"] < 0, np.array(row["entropy"], np.float32)
                if not (h.shape == (len(row["response_ids"]),) and len(h) and row["prompt_ids"] and np.isfinite(h).all()):
                    raise ValueError("ids and entropies do not fit")
                row["response"] + ""  # the text must be there: it tells whether a model has the same tokenizer
            except (ValueError, KeyError, TypeError):
                bad.append(number)
                continue
            if fresh:
                rows.append(row)
                by_step.setdefault(step, []).append(h)
    if bad:
        warn(f"{path}: {len(bad)} lines are torn or no samples, the first is line {bad[0]}: left out")
    if not rows:
        raise ValueError(f"{path} holds no fresh response")
    return list(rows), {step: np.concatenate(hs) for step, hs in by_step.items()}


def run_models(run):
    """{label: HF folder} of a run: the base model where it is a folder here, then ckpt/step_*/hf in order."""
    models = {}
    try:
        stages = list(json.loads((Path(run) / "stages.json").read_text()).values())
        base = stages[0]["init_from"] or stages[0]["model"]
        if any(stage["temperature"] != 1 for stage in stages):
            warn(f"{run}: sampled at another temperature than 1: so are the entropies in its samples.jsonl, (e)")
        if os.path.isdir(base):
            models["base"] = base
        else:
            warn(f"{run}: its base model {base!r} is no folder here; the first checkpoint stands for it")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        warn(f"{run}: no readable stages.json to name the base model; the first checkpoint stands for it")
    for folder in sorted(glob.glob(f"{glob.escape(str(run))}/ckpt/step_*/hf")):
        if number := re.fullmatch(r"step_\d+_(\w+)_(\d+)|step_(\d+)", Path(folder).parent.name):  # of an sft stage; of RL
            models[f"{number[1] or 'step'} {int(number[2] or number[3])}"] = folder
    return models


def score(folder, rows):
    """H of every response token under the model in `folder` at T = 1 -> (fp32 (N,) in the rows' order, its tokenizer).

    The trainer's packed forward and fp32 head, on one device. ValueError: not loadable, or another tokenizer than the one that
    made the rows: ids beyond its vocabulary, or ids that it reads as other text (looked at in 64 rows)."""
    cfg, other = Config(), "another tokenizer than the samples': "
    tokenizer, _ = load_tokenizer(folder)
    for row in rows[::-(-len(rows) // 64)]:
        if (text := tokenizer.decode(row["response_ids"], skip_special_tokens=True)) != row["response"]:
            raise ValueError(f"{other}it reads {row['response'][:30]!r} as {text[:30]!r}")
    lm = load_lm(folder, compute_dtype(cfg, DEVICE), "packed")
    if (top := max(max(row["prompt_ids"] + row["response_ids"]) for row in rows)) >= lm.config.vocab_size:
        raise ValueError(f"{other}id {top} is over its vocabulary of {lm.config.vocab_size}")
    model = PackedLM(lm.to(DEVICE).eval(), cfg.head_chunk)
    rollouts = [Rollout(row["prompt_ids"], [], row["response_ids"]) for row in rows]
    lengths = [packed_length(r) for r in rollouts]
    out = [None] * len(rows)
    for batch in partition(lengths, 1, max(cfg.micro_batch_tokens, *lengths))[0]:
        with torch.no_grad():
            h = model(**pack([rollouts[i] for i in batch], DEVICE), temperature=1.0)[1].cpu().numpy()
        cuts = np.cumsum([len(rollouts[i].response_ids) for i in batch])[:-1]
        for i, part in zip(batch, np.split(h, cuts), strict=True):
            out[i] = part
    return np.concatenate(out), tokenizer


# ---- the numbers: arrays in, arrays out ------------------------------------------------------------------------------

def token_means(ids, h):
    """ids, h (N,) -> (the distinct ids, how often each was seen, mean H at it)."""
    found, index, count = np.unique(ids, return_inverse=True, return_counts=True)
    return found, count, np.bincount(index, weights=h) / count


def extremes(ids, h, k=100, more_than=100):
    """The k token ids of highest and the k of lowest mean H among those seen more than `more_than` times (80/20, word clouds).

    -> (highest, lowest, number that qualify), each a list of (id, count, mean H), most extreme first, of equal means the lower
    id first. Where fewer than 2 k qualify, the upper and the lower half, so that no token is in both lists."""
    often = [entry for entry in zip(*map(np.ndarray.tolist, token_means(ids, h)), strict=True) if entry[1] > more_than]
    often.sort(key=lambda entry: (-entry[2], entry[0]))
    high = often[:min(k, -(-len(often) // 2))]
    low = sorted(often[max(len(often) - k, len(high)):], key=lambda entry: (entry[2], entry[0]))
    return high, low, len(often)


def top_positions(h, share=.2):
    """The max(1, ceil(share N)) positions of highest H as bools (N,): the mask that 80/20 trains on, ties to the lower one."""
    return entropy_mask(torch.as_tensor(h), share).numpy()


def overlaps(entropies):
    """|A and B| / |A| of the top-20 % positions of K models on the same N tokens: (K, N) -> (K, K)."""
    top = np.array([top_positions(h) for h in entropies]).astype(float)
    return top @ top.T / top.sum(1)


def change_by_bin(base, final, bins=20):
    """Positions sorted by the base model's H, in `bins` of equal number (of equal H the lower position first) ->
    (bins, 3): highest and mean base H of the bin, mean of H final - H base. Fewer tokens than bins: so many bins."""
    parts = np.array_split(np.argsort(base, kind="stable"), min(bins, len(base)))
    base, final = base.astype(float), final.astype(float)
    return np.array([(base[i].max(), base[i].mean(), (final[i] - base[i]).mean()) for i in parts])


# ---- entropy: tables and pictures ------------------------------------------------------------------------------------

def entropy(models, samples, plots, responses):
    """Analyses (a)-(e): prints the tables, draws plots/entropy.png and entropy_tokens.png, writes entropy_tokens.tsv.

    models: {label: HF folder}, base first, final last; those that cannot score are named and left out. Without any, (a), (b)
    and (e) are of the entropies in samples.jsonl. ValueError: no samples. Returns the paths written."""
    rows, by_step = read_samples(samples, responses)
    ids = np.concatenate([row["response_ids"] for row in rows])
    scored, tokenizer = {}, None
    for label, folder in models.items():
        try:
            scored[label], tokenizer = score(folder, rows)
        except ValueError as error:
            warn(f"{label} ({folder}) is left out: {error}")
    if not scored:
        warn(f"{samples}: no model scored it: no (c), no (d), and the entropies are those of the file")
        scored = {"as logged": np.concatenate([np.array(row["entropy"], np.float32) for row in rows])}
    elif len(scored) < 2:
        warn(f"{samples}: (c) and (d) compare two models, only {next(iter(scored))} is there")
    steps, final = [row["step"] for row in rows], list(scored)[-1]
    print(f"{samples}: the last {len(rows)} fresh responses, of steps {steps[0]} to {steps[-1]}, {len(ids)} tokens; H in nats at "
          "T = 1.\nA step writes down groups with right and wrong answers if it has any: these are not all its responses.\n")
    high, low, number = extremes(ids, scored[final])
    text = partial(token_text, tokenizer)
    print(percentile_table(scored), token_table(high, low, number, final, text), sep="\n\n", end="\n\n")
    if len(scored) > 1:
        print(overlap_table(scored), change_table(scored), sep="\n\n", end="\n\n")
    print(training_table(by_step))
    plots.mkdir(parents=True, exist_ok=True)
    with open(plots / "entropy_tokens.tsv", "w", encoding="utf-8") as file:
        file.write("list\trank\tid\ttext\tcount\tmean_H\n")
        for name, entries in (("highest", high), ("lowest", low)):
            file.writelines(f"{name}\t{rank}\t{i}\t{text(i)}\t{count}\t{h:.6f}\n"
                            for rank, (i, count, h) in enumerate(entries, 1))
    paths = [plots / "entropy.png", plots / "entropy_tokens.tsv"]
    draw_entropy(paths[0], scored, by_step)
    if number:
        paths.append(plots / "entropy_tokens.png")
        draw_tokens(paths[-1], high[:SHOWN], low[:SHOWN], final, text)
    return paths


def token_text(tokenizer, i):
    """A token as a quoted string that shows spaces and newlines; without a tokenizer its id."""
    return repr(tokenizer.decode([i])) if tokenizer else f"id {i}"


def percentile_table(scored):
    """(a): scored {label: H (N,) nats} -> share of tokens below 0.01 nats, percentiles and mean, beside the paper's."""
    rows = [["(a) entropy of a token", *scored, "80/20 paper"]]
    rows.append(["share below 0.01", *(f"{(h < .01).mean():.2%}" for h in scored.values()), f"{PAPER_BELOW:.2%}"])
    for p in PERCENTILES:
        paper = str(PAPER_80) if p == 80 else ""
        rows.append([f"{p}th percentile", *(f"{np.percentile(h, p):.4f}" for h in scored.values()), paper])
    rows.append(["mean", *(f"{h.mean(dtype=float):.4f}" for h in scored.values()), ""])
    return aligned(rows)


def token_table(high, low, number, final, text):
    """The first SHOWN tokens of both lists side by side."""
    head = f"(b) mean entropy of tokens seen more than 100 times, {final}: the {len(high)} highest, the {len(low)} lowest"
    if number < 200:
        head += f"\n    only {number} token ids were seen so often, too few for two lists of 100: their upper and lower half"
    rows = [["highest", "count", "mean H", "   lowest", "count", "mean H"]]
    for i in range(min(SHOWN, len(high))):
        cells = [[text(e[i][0]), str(e[i][1]), f"{e[i][2]:.5f}"] if i < len(e) else ["", "", ""] for e in (high, low)]
        rows.append([*cells[0], *cells[1]])
    more = [f"… and {len(high) - SHOWN} more of each in entropy_tokens.tsv"] if len(high) > SHOWN else []
    return "\n".join([head, *([aligned(rows)] if number else []), *more])


def overlap_table(scored):
    """(c): scored {label: H (N,)} -> overlaps() of every pair of models, percent."""
    names = list(scored)
    rows = [["(c) overlap of the top 20 % positions with", *names]]
    for name, line in zip(names, overlaps(list(scored.values())), strict=True):
        rows.append([name, *(f"{x:.2%}" for x in line)])
    return aligned(rows) + f"\n80/20 paper, base and ten checkpoints of a run, with the base: {PAPER_OVERLAP} %"


def change_table(scored):
    """(d): scored {label: H (N,)}, base first, final last -> change_by_bin() of these two, nats."""
    base, final = list(scored)[0], list(scored)[-1]
    rows = [[f"(d) bin of H in {base}", "H up to", "mean H", f"mean change to {final}"]]
    lines = change_by_bin(scored[base], scored[final])
    for i, (top, mean, change) in enumerate(lines):
        rows.append([f"{100 * i / len(lines):3.0f} to {100 * (i + 1) / len(lines):3.0f} %", f"{top:.5f}", f"{mean:.5f}",
                     f"{change:+.5f}"])
    return aligned(rows)


def training_table(by_step):
    """Percentiles of every step's own responses; at most nine steps, the first and the last among them."""
    steps = sorted(by_step)
    rows = [["(e) step, its own fresh responses as logged", "tokens", *(f"{p}th" for p in PERCENTILES)]]
    for i in sorted({round(i) for i in np.linspace(0, len(steps) - 1, 9)}):
        h = by_step[steps[i]]
        rows.append([str(steps[i]), str(len(h)), *(f"{x:.4f}" for x in np.percentile(h, PERCENTILES))])
    return aligned(rows)


def draw_entropy(path, scored, by_step):
    """Four panels, or two where there is one model: histogram (a), overlap (c), change by bin (d), percentiles (e)."""
    from matplotlib import rc_context, ticker
    names, several = list(scored), len(scored) > 1
    with rc_context(STYLE | {"font.size": 10}):
        figure = new_figure(8 if several else 4)
        axes = figure.subplots(2 if several else 1, 2).flat
        ax = next(axes)
        edges = np.linspace(0, max(max(h.max() for h in scored.values()), 1e-3), 61)
        for i, name in enumerate(dict.fromkeys([names[0], names[-1]])):  # first and last model: more would hide each other
            h = scored[name]
            ax.stairs(np.histogram(h, edges)[0] / len(h), edges, color=COLOURS[i], ls=LINES[i], lw=1.5,
                      label=f"{name}: {(h < .01).mean():.0%} below 0.01, 80th percentile {np.percentile(h, 80):.3g}")
        ax.axvline(PAPER_80, color="black", ls=":", lw=1.3, label=f"80/20 paper: 51% below 0.01, 80th percentile {PAPER_80}")
        ax.set(yscale="log", xlabel="entropy of a token (nats)", ylabel=f"share of tokens\nper bin of {edges[1]:.2g} nats")
        panel(ax, "(a) How uncertain tokens are", 1)
        if several:
            draw_overlap(next(axes), scored)
            draw_change(next(axes), scored)
        ax, steps = next(axes), sorted(by_step)
        lines = np.array([np.percentile(by_step[step], PERCENTILES) for step in steps]).clip(1e-5)  # samples.jsonl rounds to it
        for i, p in reversed(list(enumerate(PERCENTILES))):
            ax.plot(steps, lines[:, i], color=COLOURS[i], ls=LINES[i], marker=MARKERS[i] if len(steps) == 1 else "",
                    label=f"{p}th")
        ax.set(yscale="log", xlabel="training step", ylabel="entropy (nats), each step's\nown fresh responses")
        ax.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        panel(ax, "(e) Percentiles over training", 5)
        figure.savefig(path)


def draw_overlap(ax, scored):
    """(c): the first and the last model's overlap with every model, percent."""
    names, table = list(scored), 100 * overlaps(list(scored.values()))
    for i, row in enumerate((0, -1)):
        ax.plot(range(len(names)), table[row], color=COLOURS[i], ls=LINES[i], marker=MARKERS[i], ms=5,
                label=f"with {names[row]}")
    ax.axhline(PAPER_LAST, color="black", ls=":", lw=1.3, label=f"80/20 paper: {PAPER_LAST}, final with base")
    ax.set_xticks(range(len(names)), names, rotation=30 if len(names) > 6 else 0)
    ax.set(ylabel="% of the top 20 % positions shared", ylim=(min(80, table.min() - 5), 101), xlim=(-.2, len(names) - .8))
    ax.yaxis.get_major_locator().set_params(integer=True)
    panel(ax, "(c) Do the same positions stay uncertain?", 1)


def draw_change(ax, scored):
    """(d): a bar a bin of the first model's H: mean change to the last model, nats."""
    base, final = list(scored)[0], list(scored)[-1]
    change = change_by_bin(scored[base], scored[final])[:, 2]
    width = 100 / len(change)
    ax.bar((np.arange(len(change)) + .5) * width, change, .86 * width, color=COLOURS[0])
    ax.axhline(0, color="black", lw=.8)
    ax.set(xlabel=f"percentile of entropy in {base}", ylabel="mean change of entropy (nats)", xlim=(0, 100))
    panel(ax, f"(d) Change from {base} to {final}", 0)


def panel(ax, title, columns):
    """Title on the left, the legend under it in `columns`; 0: no legend."""
    rows = -(-len(ax.get_legend_handles_labels()[0]) // columns) if columns else 0
    if columns:
        ax.legend(loc="lower left", bbox_to_anchor=(-.02, 1.0), ncols=columns, fontsize="small", columnspacing=1,
                  handlelength=2.6, handletextpad=.5, borderaxespad=.2, labelspacing=.3)
    ax.set_title(title, loc="left", fontweight="bold", fontsize="medium", pad=6 + 14 * rows)


def draw_tokens(path, high, low, final, text):
    """Bars of mean H, highest tokens left, lowest right; the count of each beside its bar."""
    from matplotlib import rc_context
    with rc_context(STYLE | {"font.size": 9.5, "axes.grid.axis": "x"}):
        figure = new_figure(1.2 + .2 * len(high))
        for ax, name, entries, colour in zip(figure.subplots(1, 2), ("highest", "lowest"), (high, low), COLOURS, strict=False):
            means = [h for _, _, h in entries]
            ax.barh(range(len(entries)), means, color=colour)
            # ascii: the font has no CJK; no mathematics: a token may be "$"
            ax.set_yticks(range(len(entries)), [ascii(text(i)[1:-1] if text(i)[0] in "'\"" else text(i)).replace("\\\\", "\\")
                                                for i, _, _ in entries], family="monospace", parse_math=False)
            for y, (_, count, h) in enumerate(entries):
                ax.annotate(f"{count}×", (h, y), (3, 0), textcoords="offset points", va="center", fontsize="small", color=".3")
            ax.set(xlabel=f"mean entropy under {final} (nats)", xlim=(0, 1.16 * max([*means, 1e-6])),
                   ylim=(max(len(high), 1) - .4, -.6))
            ax.set_title(f"(b) Tokens of {name} mean entropy", loc="left", fontweight="bold", fontsize="medium")
        figure.savefig(path)


# ---- the command line ------------------------------------------------------------------------------------------------

def entropy_of_run(run, responses):
    """entropy() of a run's samples.jsonl, base model and checkpoints, pictures into its plots folder."""
    return entropy(run_models(run), run_file(run, "samples.jsonl"), Path(run) / "plots", responses)


def labels(folders):
    """{short name: folder} of models: the folder's own name, the one above it for an `hf`, the path as given where two agree."""
    names = [Path(folder).resolve() for folder in folders]
    names = [path.parent.name if path.name == "hf" else path.name for path in names]
    return {name if names.count(name) == 1 else folder: folder for name, folder in zip(names, folders, strict=True)}


def run_jobs(jobs):
    """Calls each, prints the files it made; one that fails costs one line on stderr. -> exit code: 2 if one failed."""
    code = 0
    for job in jobs:
        try:
            print("\nwritten: " + ", ".join(map(str, job())) + "\n")
        except (ValueError, OSError) as error:
            warn(f"error: {error}")
            code = 2
    return code


def main(argv):
    """`analyze.py entropy`: every run, or the models given; exit code 2 tells that one could not be done."""
    parser = argparse.ArgumentParser(prog="analyze.py entropy", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="RUN|MODEL", help="runs; with --samples models, base first, final last")
    parser.add_argument("--samples", metavar="FILE", help="a samples.jsonl that the models score")
    parser.add_argument("--responses", type=int, default=512, help="the last so many fresh responses (default %(default)s)")
    parser.add_argument("--out", metavar="DIR", default="plots", help="with --samples: for pictures and table (%(default)s)")
    args = parser.parse_args(argv)
    if args.responses < 1:
        parser.error(f"--responses must be at least 1, got {args.responses}")
    if args.samples:
        jobs = [partial(entropy, labels(args.folders), args.samples, Path(args.out), args.responses)]
    else:
        jobs = [partial(entropy_of_run, run, args.responses) for run in args.folders]
    return run_jobs(jobs)
