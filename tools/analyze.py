"""From a run folder to pictures and tables; needs the run's logs, no GPU and no model.

    python -m tools.analyze curves runs/toy           the run's table, and runs/toy/plots/{curves,headline}.png
    python -m tools.analyze compare runs/toy-s1 runs/toy-s2 runs/toy-dapo-s1 [--out FILE]         several runs, in arms

Runs whose folder names differ only in a trailing `-s1` or `-seed1` are seeds of one arm. Below, a run is what read_run
returns: (training lines, evaluations).
"""
import os
import re
import sys
from pathlib import Path

import numpy as np

from lib.files import aligned
from tools.common import command_line, for_each, look, panel, picture, read_run, run_file, value, warn

PHASES = ["wake", "gen_base", "entropy", "gen_branch", "reward", "sleep", "old_log_prob", "update_actor", "sync",
          "eval", "save", "other"]  # timing_s/*, in the order of a step
# (title, unit, {metric: label}); a metric that ends in `@` stands for the largest k logged. Each row of three answers a
# question: how good? how sure? what do responses look like? what does a step cost? is the update healthy?
PANELS = [
    ("Held-out accuracy", "share", {"eval/avg@": "avg@", "eval/pass@": "pass@"}),
    ("Training accuracy", "share", {
        "train/accuracy": "all", "branch/accuracy_base_sampled": "base", "branch/accuracy_branch_sampled": "branches"}),
    ("Training score", "score", {"critic/score/mean": "mean"}),
    ("Entropy", "nats per token", {"actor/entropy": "base", "entropy/branch_kept": "branches",
                                   "entropy/all_kept": "both", "eval/entropy": "held-out"}),
    ("Entropy at forks", "nats per token", {
        "branch/entropy_at_t_star_sampled": "at t*", "eval/entropy_operands": "operands",
        "eval/entropy_results": "results"}),
    ("Distinct responses, held-out", "share of samples", {"eval/distinct": "distinct"}),
    ("Response length", "tokens", {"response_length/mean": "training", "eval/length": "held-out",
                                   "branch/depth_sampled": "depth of t*"}),
    ("Truncated responses", "share", {"response_length/clip_ratio": "training", "eval/truncated": "held-out"}),
    ("Branches with another reward", "share of branches", {"branch/flip_rate_sampled": "flip rate"}),
    ("Dynamic sampling", "groups per step", {"train/sampled_groups": "sampled", "train/kept_groups": "kept"}),
    ("Sampling rounds", "rounds per step", {"train/rounds": "rounds"}),
    ("Seconds by phase", "seconds per step", {f"timing_s/{phase}": phase for phase in PHASES}),
    ("Clipped tokens", "share of tokens", {"actor/pg_clipfrac": "ratio clip", "actor/pg_clipfrac_lower": "dual clip"}),
    ("Gradient norm", "norm before clipping", {"actor/grad_norm": "norm"}),
    ("Engine against trainer", "|Δ log-prob|, nats", {"mismatch/mean_abs": "mean", "mismatch/max_abs": "max"}),
]
X_AXES = {"step": "training steps", "opt_step": "optimizer steps", "tokens/generated": "generated tokens"}


def full_name(rows, key):
    """`eval/avg@` -> `eval/avg@16`, the largest k in these lines; any other metric's name as it is."""
    ks = [int(name[len(key):]) for row in rows for name in row if name.startswith(key) and name[len(key):].isdigit()]
    return key + str(max(ks)) if key.endswith("@") and ks else key


def series(run, key, x="step"):
    """{step: (x, metric)} over the lines that have both as finite numbers."""
    rows = run[key.startswith("eval/")]
    name = full_name(rows, key)
    points = {row["step"]: (value(row, x), value(row, name)) for row in rows}
    return {step: point for step, point in points.items() if np.isfinite(point).all()}


def stage_spans(run):
    """[[stage, first step, last step]] in order; a stage begins where the one before it ended."""
    spans = []
    for row in run[0] or [row for row in run[1] if row["step"] > 0]:
        if spans and spans[-1][0] == row.get("stage"):
            spans[-1][2] = row["step"]
        else:
            spans.append([row.get("stage"), spans[-1][2] if spans else max(row["step"] - 1, 0), row["step"]])
    return spans


# ---- tables ----------------------------------------------------------------------------------------------------------

def spread(numbers, form):
    """`0.912 ± 0.004`: mean and half range, (max - min) / 2; `-` if a number is missing; form `k` is for thousands."""
    if not np.isfinite(numbers).all():
        return "-"
    parts = [np.mean(numbers), np.ptp(numbers) / 2][:len(numbers)]  # one seed has no spread
    return " ± ".join(f"{part / 1e3:.0f}k" if form == "k" else f"{part:{form}}" for part in parts)


def results_table(heads, rows, metrics):
    """Aligned text. rows: [([a cell for each of heads], [the line of every seed])], metrics: {metric: form}."""
    lines = [line for _, seeds in rows for line in seeds]
    forms = {full_name(lines, key): form for key, form in metrics.items()}
    cells = [[*heads, *(X_AXES.get(key, key.removeprefix("eval/")) for key in forms)]]
    for first, seeds in rows:
        cells.append([*first, *(spread([value(line, key) for line in seeds], form) for key, form in forms.items())])
    return aligned(cells)


def summary_table(run):
    """The table at the end of a run: held-out results at the base (step 0) and at the end of every stage."""
    last = {"base" if line["step"] == 0 else f"after {line.get('stage')}": line for line in read_run(run)[1]}
    rows = [([label, str(line["step"])], [line]) for label, line in last.items()]
    return results_table(["held-out", "step"], rows, {
        "eval/avg@": ".3f", "eval/pass@": ".3f", "eval/entropy": ".3f", "eval/distinct": ".3f", "eval/length": ".1f",
        "eval/truncated": ".3f", "tokens/generated": "k"}) if rows else f"{run}: no evaluation was logged"


def logged_phases(rows):
    """The phases in these lines: the known ones in the order of a step, then all others. A table that says 100 % must
    not drop one. timing_s/step is the total of a step and no phase."""
    names = [key.removeprefix("timing_s/") for row in rows for key in row if key.startswith("timing_s/")]
    return [phase for phase in dict.fromkeys([*PHASES, *names]) if phase in names and phase != "step"]


def ledger(run, last=None):
    """Where the time of a run went: seconds by phase, per training step and of all, then speed and memory.

    last: what was timed after the last line of the log (the final checkpoint)."""
    train, evals = read_run(run)
    rows = [*train, *evals, last or {}]
    seconds = {phase: sum(value(row, key) for row in rows if (key := f"timing_s/{phase}") in row)
               for phase in logged_phases(rows)}
    total = sum(seconds.values())
    if not train or not total:
        return f"{run}: no training step was logged"
    rows = [["phase", "s", "s/step", "share"]]
    rows += [[phase, f"{s:.1f}", f"{s / len(train):.3f}", f"{s / total:.1%}"] for phase, s in seconds.items() if s]
    rows += [["all", f"{total:.1f}", f"{total / len(train):.3f}", "100.0%"]]

    def middle(key, form):
        numbers = [value(row, key) for row in train if key in row]
        return f"{np.median(numbers):{form}}" if numbers else "-"

    tail = (f"median of {len(train)} steps: {middle('perf/throughput', '.0f')} generated tokens/s and rank over the "
            f"whole step, update {middle('perf/tflops', '.3g')} TFLOP/s and rank, MFU {middle('perf/mfu', '.1%')}, "
            f"peak {max((value(row, 'perf/peak_memory_gib') for row in train), default=0):.2f} GiB")
    return f"{aligned(rows)}\n{tail}"


def compare_table(arms):
    """One row per arm, from the last evaluation that all its seeds have; ± is half the range over the seeds."""
    rows = []
    for name, seeds in arms.items():
        lines = [{line["step"]: line for line in run[1] or run[0]} for run in seeds]
        step = max(set.intersection(*map(set, lines)), default="-")
        if any(step != max(of_seed, default="-") for of_seed in lines):
            warn(f"the seeds of {name} end at different steps, all are taken at step {step}")
        rows.append(([name, str(len(seeds)), str(step)], [of_seed.get(step, {}) for of_seed in lines]))
    return results_table(["arm", "seeds", "step"], rows, {
        "opt_step": ".0f", "tokens/generated": "k", "eval/avg@": ".3f", "eval/pass@": ".3f", "eval/entropy": ".3f",
        "eval/distinct": ".3f"}) + "\nheld-out; ± is half the range over the seeds, (max - min) / 2"


# ---- curves: one run -------------------------------------------------------------------------------------------------

def draw_lines(ax, run, metrics):
    """One line per metric that was logged; evaluations, being few, carry markers."""
    for i, (key, label) in enumerate(metrics.items()):
        points = np.array([*series(run, key).values()]).reshape(-1, 2)  # (n, step and metric)
        marked = len(points) == 1 or key.startswith("eval/") and len(points) <= 60
        label = full_name(run[1], key).removeprefix("eval/") if key.endswith("@") else label
        if len(points):
            ax.plot(*points.T, **look(i, marked), label=label)


def draw_phases(ax, train):
    """Seconds by phase, stacked: the five longest in the order of a step, and the rest."""
    phases = logged_phases(train)
    seconds = {phase: np.nan_to_num([value(row, f"timing_s/{phase}") for row in train]) for phase in phases}
    longest = sorted(seconds, key=lambda phase: -seconds[phase].sum())[:5]
    parts = {phase: s for phase, s in seconds.items() if phase in longest and s.any()}
    parts["rest"] = sum((s for phase, s in seconds.items() if phase not in longest), np.zeros(len(train)))
    shades = ["#0072B2", "#F0E442", "#009E73", "#56B4E9", "#D55E00"][:len(parts) - 1] + ["#CCCCCC"]  # dark, light, …
    ax.stackplot([row["step"] for row in train], *parts.values(), labels=list(parts), colors=shades, lw=0)


def draw_panels(figure, shape, panels, run):
    """A panel from the top: title, legend, the names of the stages, the data with a dashed line where stages meet."""
    steps, spans = [row["step"] for row in run[0] + run[1]], stage_spans(run)
    length = max(max(steps) - min(steps), 1)
    for place, (title, unit, metrics) in enumerate(panels, 1):
        ax = figure.add_subplot(*shape, place)
        phases = title == "Seconds by phase"
        draw_phases(ax, run[0]) if phases else draw_lines(ax, run, metrics)
        if title == "Engine against trainer" and any((line.get_ydata() > 0).any() for line in ax.lines):
            ax.set_yscale("log")
            low, high = np.log10(ax.get_ylim())
            ax.set_ylim(10 ** np.floor(low), 10 ** np.ceil(high))
            ax.yaxis.set_minor_formatter("")  # whole decades, so that the powers of ten are labels enough
        elif all((line.get_ydata() >= 0).all() for line in ax.lines):  # a share that is always 0 needs no axis below 0
            ax.set_ylim(bottom=max(ax.get_ylim()[0], -.05 * ax.get_ylim()[1]))
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set_xlim(min(steps) - .02 * length, max(steps) + .02 * length)
        panel(ax, title, 3 if shape[1] == 3 else 4, 1.2, 1 if phases else 2.4, xlabel="training step", ylabel=unit)
        for i, (name, first, last) in enumerate(spans):
            if i:
                ax.axvline(first, color="black", ls=(0, (4, 3)), lw=.9, zorder=1)
            if (last - first) / length > .026 * len(str(name)):  # else the name is longer than its stage
                ax.text((first + last) / 2, 1.01, name, transform=ax.get_xaxis_transform(), ha="center",
                        fontsize="small", color=".35")


def report(run, pending):
    """What is printed at the end of a run: its table, its ledger and where its pictures are. pending: see ledger."""
    lines = [summary_table(run), ledger(run, pending)]
    if read_run(run)[0]:
        lines.append("pictures: " + ", ".join(map(str, curves(run))))
    return "\n".join(lines)


def curves(run):
    """Draws run/plots/curves.png (all that was logged) and headline.png (accuracy, entropy); returns their paths."""
    lines, plots = read_run(run), Path(run) / "plots"
    panels = [entry for entry in PANELS if any(series(lines, key) for key in entry[2])]
    if not panels:
        raise ValueError(f"{run}: metrics.jsonl holds no training step and no evaluation yet")
    rows = -(-len(panels) // 3)
    with picture(plots / "curves.png", 2.7 * rows) as figure:
        draw_panels(figure, (rows, 3), panels, lines)
    headline = [entry for entry in panels if entry[0] in ("Held-out accuracy", "Entropy")]
    with picture(plots / "headline.png", 4, {"font.size": 11, "lines.linewidth": 1.8, "lines.markersize": 5}) as figure:
        draw_panels(figure, (1, 2), headline, lines)
    return [plots / "curves.png", plots / "headline.png"]


# ---- compare: several runs -------------------------------------------------------------------------------------------

def group_arms(runs):
    """{arm: [run of each seed]}, in the order given."""
    paths = [Path(run).resolve() for run in runs]
    if len(set(paths)) < len(paths):
        raise ValueError("compare: the same run is given twice")
    common, arms = os.path.commonpath([path.parent for path in paths]), {}
    unique = len({path.name for path in paths}) == len(paths)  # or old/toy and new/toy: two arms, not two seeds
    for path in paths:
        name = path.name if unique else os.path.relpath(path, common)
        arms.setdefault(re.sub(r"(?<=.)-(s|seed)\d+$", "", name), []).append(read_run(path))
    return arms


def over_seeds(seeds, key, x="step"):
    """(steps (n,), values (seeds, n, 2)): x and metric of every seed at the n steps where all seeds have both."""
    points = [series(run, key, x) for run in seeds]
    steps = sorted(set.intersection(*map(set, points)))
    return steps, np.array([[of_seed[step] for step in steps] for of_seed in points]).reshape(len(seeds), len(steps), 2)


def draw_arm(ax, i, name, seeds, key, x):
    """Mean line and min-max band of arm number i, dotted verticals where its stages meet."""
    steps, values = over_seeds(seeds, key, x)
    if not steps:
        return
    mean_x, mean = values.mean(0).T
    line, = ax.plot(mean_x, mean, **look(i, len(mean) == 1 or key.startswith("eval/") and len(mean) <= 40), label=name)
    if len(seeds) > 1:
        ax.fill_between(mean_x, values[..., 1].min(0), values[..., 1].max(0), color=line.get_color(), alpha=.18, lw=0)
    for _, border, _ in stage_spans(seeds[0])[1:]:
        ax.axvline(np.interp(border, steps, mean_x), color=line.get_color(), ls=":", lw=1)


def compare(runs, out=None):
    """Overlays runs against steps, optimizer steps and generated tokens, prints the table; returns the picture's path.

    out: a picture file, or a folder for compare.png; by default the folder that holds the runs."""
    from matplotlib import ticker
    arms, out = group_arms(runs), Path(out or os.path.commonpath([Path(run).resolve().parent for run in runs]))
    out = out if out.suffix and not out.is_dir() else out / "compare.png"
    metrics = {"eval/avg@": "held-out accuracy\n(avg@k, share)", "eval/entropy": "held-out entropy\n(nats per token)",
               "actor/entropy": "training entropy\n(nats per token)",
               "eval/distinct": "distinct responses\n(share of samples)"}
    metrics = {key: label for key, label in metrics.items() if any(over_seeds(arm, key)[0] for arm in arms.values())}
    if not metrics:
        raise ValueError("compare: these runs hold no training step and no evaluation yet")
    with picture(out, .8 + 2.4 * len(metrics), {"font.size": 9.5}) as figure:
        grid, legend = figure.subplots(len(metrics), 3, sharex="col", sharey="row", squeeze=False), {}
        for row, (key, label) in zip(grid, metrics.items(), strict=True):
            for ax, x in zip(row, X_AXES, strict=True):
                for i, (name, seeds) in enumerate(arms.items()):
                    draw_arm(ax, i, name, seeds, key, x)
                handles, names = ax.get_legend_handles_labels()
                legend |= dict(zip(names, handles, strict=True))
            row[0].set_ylabel(label)
        for ax, label in zip(grid[-1], X_AXES.values(), strict=True):
            ax.set_xlabel(label)
            ax.xaxis.get_major_locator().set_params(integer=True)
        grid[-1][2].xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
        figure.legend(legend.values(), legend.keys(), loc="outside upper center", ncols=4, handlelength=4,
                      title="line: mean over seeds · band: min to max · dotted: a new stage")
    print(compare_table(arms))
    return out


def table_and_curves(run):
    print(summary_table(run))
    print(*curves(run), sep="\n")


def main(argv):
    """`curves` or `compare`. What cannot be read is one line on stderr, exit code 2, and the rest is done."""
    parser = command_line("analyze", __doc__)
    what = parser.add_subparsers(dest="what", required=True)
    for name, text in (("curves", "draw each run"), ("compare", "overlay runs, seeds of an arm averaged")):
        sub = what.add_parser(name, help=text)
        sub.add_argument("runs", nargs="+", metavar="RUN", help="a run folder")
    sub.add_argument("--out", metavar="FILE", help="the picture (default: compare.png where the runs are)")
    args = parser.parse_args(argv)
    if args.what == "curves":
        return for_each(table_and_curves, args.runs)
    readable = []
    code = for_each(lambda run: readable.append(run_file(run, "metrics.jsonl").parent), args.runs)
    return code | for_each(lambda runs: compare(runs, args.out), [readable] if readable else [])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
