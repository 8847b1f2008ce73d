"""What branching bought, in numbers: from all that was sampled, and from the groups that were written down.

    python analyze.py branches runs/toy                                a table, and runs/toy/plots/branches.png

Reads metrics.jsonl (all that was sampled) and samples.jsonl (of every step the first samples_per_step groups that were kept).
"""
from pathlib import Path

import numpy as np

from lib.files import aligned
from tools.analyze import COLOURS, LINES, MARKERS, STYLE, new_figure, read_run, value, warn
from tools.tree import read_samples, steps_of


def forks_sampled(run):
    """Of all rollouts sampled, from metrics.jsonl: {name: array over the steps that branched}; groups is the weight."""
    lines = [line for line in read_run(run)[0] if "branch/flip_rate" in line]
    names = {"step": "step", "groups": "train/sampled_groups", "base": "branch/accuracy_base",
             "branch": "branch/accuracy_branch", "flip": "branch/flip_rate", "depth": "branch/mean_depth",
             "h": "branch/entropy_at_t_star", "fallback": "branch/fallback_share", "over": "branch/over_budget_share"}
    return {name: np.array([value(line, key) for line in lines]) for name, key in names.items()} if lines else {}


def forks_on_file(run):
    """Of the groups in samples.jsonl: {name: array over forks}, NaN where a fork has no such number.

    base, branch, flip: the parent is right; share of its branches that are right, that differ from it. differ: share of the
    pairs of base responses of this prompt that differ, which is what fresh samples would flip. rank: of H at t* among the
    parent's tokens, 1 the highest. first: different first tokens; same: share that drew the dropped token again."""
    forks = []
    for step, groups in steps_of(read_samples(run)):
        for group in groups:
            n1 = sum(row["parent"] < 0 for row in group)
            right = sum(row["correct"] for row in group[:n1])
            for i, parent in enumerate(group[:n1]):
                rows = [row for row in group[n1:] if row["parent"] == i]
                if not rows:
                    continue
                t, h = rows[0]["t_star"], np.array(parent["entropy"], float)
                share, first = np.mean([row["correct"] for row in rows]), [row["response_ids"][0] for row in rows]
                forks.append({
                    "step": step, "groups": 1 / n1, "base": parent["correct"], "branch": share,
                    "flip": 1 - share if parent["correct"] else share,
                    "differ": 2 * right * (n1 - right) / (n1 * (n1 - 1)) if n1 > 1 else np.nan,
                    "depth": t, "h": h[t] if t else np.nan, "fallback": t == 0, "rank": 1 + (h > h[t]).sum() if t else np.nan,
                    "n2": len(rows), "first": len(set(first)), "same": np.mean([i == parent["response_ids"][t] for i in first]),
                    "base_tokens": len(h), "new_tokens": np.mean([len(row["response_ids"]) for row in rows]),
                    "inherited": np.mean([len(row["prefix_ids"]) for row in rows])})
    return {name: np.array([fork[name] for fork in forks], float) for name in forks[0]} if forks else {}


def branches_table(sampled, on_file):
    """Two columns: all that was sampled, and the groups on file, which were kept for having right and wrong members.

    Accuracy of parents a and of branches b and the flip rate f give the whole table parent -> branch: right-right is
    (a + b - f) / 2, wrong-right (b - a + f) / 2. Steps are weighted by the groups sampled in them."""
    def mean(source, name):
        x = source.get(name, np.array([]))
        known = np.isfinite(x)
        if not known.any():
            return np.nan
        weights = source["groups"][known]
        if name == "h":  # it is known only where t* > 0
            weights = weights * (1 - np.nan_to_num(source["fallback"][known]))
        return np.average(x[known], weights=weights) if weights.any() else np.nan

    def cell(number, form):
        return format(number, form) if np.isfinite(number) else "-"

    def quantiles(name):
        x = on_file.get(name, np.array([]))
        x = x[np.isfinite(x)]
        return " / ".join(f"{q:.3g}" for q in np.percentile(x, [10, 50, 90])) if len(x) else "-"

    rows = [["", "all sampled", "groups on file"],
            ["groups that branched", *(cell(np.sum(source.get("groups", np.nan)), ".0f") for source in (sampled, on_file))]]
    both = [(mean(source, "base"), mean(source, "branch"), mean(source, "flip")) for source in (sampled, on_file)]
    for label, number in (
            ("base responses that are right", lambda a, b, f: a), ("branches that are right", lambda a, b, f: b),
            ("branches with another verdict than their parent", lambda a, b, f: f),
            ("  parent right -> branch right", lambda a, b, f: (a + b - f) / 2),
            ("  parent right -> branch wrong", lambda a, b, f: (a - b + f) / 2),
            ("  parent wrong -> branch right", lambda a, b, f: (b - a + f) / 2),
            ("  parent wrong -> branch wrong", lambda a, b, f: 1 - (a + b + f) / 2)):
        rows.append([label, *(cell(number(*abf), ".3f") for abf in both)])
    for label, name, form in (
            ("pairs of base responses of a prompt with different verdicts", "differ", ".3f"),
            ("depth of t*, tokens (0 without a critical token)", "depth", ".1f"), ("entropy at t*, nats", "h", ".3f"),
            ("forks without a critical token (t* = 0)", "fallback", ".1%"),
            ("candidates over the prompt budget", "over", ".1%"),
            ("branches of a fork", "n2", ".3g"), ("  different first tokens among them", "first", ".2f"),
            ("  that start with the token that was dropped", "same", ".1%"),
            ("generated tokens of a base response", "base_tokens", ".1f"),
            ("generated tokens of a branch", "new_tokens", ".1f"), ("  tokens it inherited", "inherited", ".1f")):
        rows.append([label, *(cell(mean(source, name), form) for source in (sampled, on_file))])
    saved = 1 - mean(on_file, "new_tokens") / mean(on_file, "base_tokens")
    rows += [["tokens saved by a branch against a fresh base response", "-", cell(saved, ".1%")],
             ["depth of t*, 10th / 50th / 90th percentile", "-", quantiles("depth")],
             ["rank of its entropy in the response, 10th / 50th / 90th", "-", quantiles("rank")]]
    return aligned(rows)


def by_step(source, *names):
    """Per step the means of these numbers, NaN left out: (steps, [array of each name])."""
    steps = sorted(set(source["step"]))
    groups = [[source[name][source["step"] == step] for step in steps] for name in names]
    return steps, [np.array([np.nanmean(x) if np.isfinite(x).any() else np.nan for x in parts]) for parts in groups]


def draw_branches(figure, sampled, on_file):
    """Six panels; those over steps show all that was sampled where metrics.jsonl has it."""
    source = sampled or on_file
    whose = "all sampled" if source is sampled else "groups on file"

    def panel(place, title, x, y):
        ax = figure.add_subplot(2, 3, place)
        ax.set_title(title, loc="left", fontweight="bold", fontsize="medium")
        ax.set(xlabel=x, ylabel=y)
        return ax

    def lines(ax, steps, curves):
        for i, (label, y) in enumerate(curves.items()):
            ax.plot(steps, y, color=COLOURS[i], ls=LINES[i], marker=MARKERS[i] if len(steps) < 3 else "", label=label)
        ax.set_ylim(bottom=0)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.legend(fontsize="small")

    def histogram(ax, x):
        """Share of the forks by whole numbers x (forks,), NaN left out; what is over the 99th percentile is in the last bar."""
        x = x[np.isfinite(x)]
        if not len(x):
            ax.text(.5, .5, "no critical token", transform=ax.transAxes, ha="center")
            return
        top = np.percentile(x, 99)  # one straggler would flatten the rest
        width = max(1, round((top - x.min()) / 40))  # whole tokens, at most about 40 bars
        edges = np.arange(x.min(), top + width + 1, width) - .5
        ax.hist(np.clip(x, None, edges[-1] - .1), edges, weights=np.full(len(x), 1 / len(x)), color=COLOURS[0])
        middle = np.median(x)
        ax.axvline(middle, color="black", ls="--", label=f"median {middle:g}")
        ax.set_ylim(top=1.2 * ax.get_ylim()[1])  # room for the legend
        ax.legend(fontsize="small")

    if on_file:
        found = on_file["fallback"] == 0
        histogram(panel(1, "Depth of t*", "tokens into the parent (last bar: and more)", "share of forks"),
                  on_file["depth"][found])
        histogram(panel(2, "Entropy rank of t*", "rank among the parent's tokens, 1 the highest", "share of forks"),
                  on_file["rank"][found])
        n2 = int(on_file["n2"].max())
        ax = panel(3, "Different first tokens of a fork", f"of {n2} branches", "share of forks")
        ax.bar(range(1, n2 + 1), [np.mean(on_file["first"] == k) for k in range(1, n2 + 1)], .6, color=COLOURS[0])
        ax.xaxis.get_major_locator().set_params(integer=True)
        steps, (base, new, inherited) = by_step(on_file, "base_tokens", "new_tokens", "inherited")
        lines(panel(6, "Tokens of a response", "training step", "tokens"), steps, {
            "base, generated": base, "branch, generated": new, "branch, inherited": inherited})
    steps, (a, b, f) = by_step(source, "base", "branch", "flip")
    lines(panel(4, f"Right answers, {whose}", "training step", "share"), steps, {"base": a, "branches": b})
    lines(panel(5, f"Verdict turned, {whose}", "training step", "share of branches"), steps, {
        "any": f, "wrong to right": (b - a + f) / 2, "right to wrong": (a - b + f) / 2})


def branches_command(run, _):
    """Draws run/plots/branches.png; returns the table and the picture's path. One of the two files is enough: the other is
    named on stderr."""
    from matplotlib import rc_context
    found, missing = [], []
    for read in (forks_sampled, forks_on_file):
        try:
            found.append(read(run))
        except ValueError as error:
            found.append({})
            missing.append(error)
    if len(missing) == 2:
        raise missing[0]
    for error in missing:
        warn(error)
    if not any(found):
        raise ValueError(f"{run}: there are no branches in it")
    out = Path(run) / "plots" / "branches.png"
    out.parent.mkdir(exist_ok=True)
    with rc_context(STYLE):
        figure = new_figure(5.6)
        draw_branches(figure, *found)
        figure.savefig(out)
    steps = np.concatenate([source["step"] for source in found if source])
    return f"{run}, steps {steps.min():.0f} to {steps.max():.0f}\n{branches_table(*found)}\n{out}"


def add_command(subparsers):
    """The subcommand of analyze.py. args.command(run, args) returns what to print."""
    sub = subparsers.add_parser("branches", help="what branching bought, a table and a picture")
    sub.add_argument("runs", nargs="+", metavar="RUN", help="a run folder")
    sub.set_defaults(command=branches_command)
