"""What branching bought, in numbers: from all that was sampled, and from the groups that were written down.

    python -m tools.branches runs/toy [more runs]                      a table, and runs/toy/plots/branches.png

Reads metrics.jsonl (all that was sampled) and samples.jsonl (of every step the first samples_per_step kept groups).
"""
import sys
from pathlib import Path

import numpy as np

from lib.files import aligned
from tools.common import COLOURS, command_line, for_each, look, panel, picture, read_run, value, warn
from tools.tree import groups_by_step

# a line of the table: label, one of means(), format
TABLE = [
    ("groups that branched", "groups", ".0f"),
    ("base responses that are right", "base", ".3f"), ("branches that are right", "branch", ".3f"),
    ("branches with another verdict than their parent", "flip", ".3f"),
    ("  parent right -> branch right", "right right", ".3f"), ("  parent right -> branch wrong", "right wrong", ".3f"),
    ("  parent wrong -> branch right", "wrong right", ".3f"), ("  parent wrong -> branch wrong", "wrong wrong", ".3f"),
    ("pairs of base responses of a prompt with different verdicts", "differ", ".3f"),
    ("depth of t*, tokens (0 without a critical token)", "depth", ".1f"), ("entropy at t*, nats", "h", ".3f"),
    ("forks without a critical token", "fallback", ".1%"), ("candidates over the prompt budget", "over", ".1%"),
    ("branches of a fork", "n2", ".3g"), ("  different first tokens among them", "first", ".2f"),
    ("  that start with the token that was dropped", "same", ".1%"),
    ("generated tokens of a base response", "base_tokens", ".1f"),
    ("generated tokens of a branch", "new_tokens", ".1f"), ("  tokens it inherited", "inherited", ".1f"),
    ("tokens saved by a branch against a fresh base response", "saved", ".1%")]
SAMPLED = {"step": "step", "groups": "train/sampled_groups", "base": "branch/accuracy_base_sampled",
           "branch": "branch/accuracy_branch_sampled", "flip": "branch/flip_rate_sampled",
           "depth": "branch/depth_sampled", "h": "branch/entropy_at_t_star_sampled",
           "fallback": "branch/fallback_share_sampled", "over": "branch/over_budget_share_sampled"}


def forks_sampled(run):
    """Of all rollouts sampled, from metrics.jsonl: {name: array over the steps that branched}; groups is the weight."""
    lines = [line for line in read_run(run)[0] if SAMPLED["flip"] in line]
    return {name: np.array([value(line, key) for line in lines]) for name, key in SAMPLED.items()} if lines else {}


def forks_on_file(run):
    """Of the groups in samples.jsonl: {name: array over forks}, NaN where a fork has no such number (see forks_of)."""
    forks = [fork for step, groups in groups_by_step(run) for group in groups for fork in forks_of(step, group)]
    return {name: np.array([fork[name] for fork in forks], float) for name in forks[0]} if forks else {}


def forks_of(step, group):
    """The numbers of every parent that has branches.

    base, branch, flip: it is right; share of its branches that are right, that differ from it. differ: share of the
    pairs of base responses of this prompt that differ, which is what fresh samples would flip. rank: of H at t* among
    the parent's tokens, 1 the highest. first: different first tokens. same: share that drew the dropped token again."""
    n1 = sum(row["parent"] < 0 for row in group)
    right = sum(row["correct"] for row in group[:n1])
    for i, parent in enumerate(group[:n1] if len(group) > n1 else []):
        rows, h = [row for row in group[n1:] if row["parent"] == i], np.array(parent["entropy"], float)
        t, found = rows[0]["t_star"] or 0, rows[0]["t_star"] is not None  # plain resamples leave at the start
        share, first = np.mean([row["correct"] for row in rows]), [row["response_ids"][0] for row in rows]
        yield {"step": step, "groups": 1 / n1, "base": parent["correct"], "branch": share,
               "flip": 1 - share if parent["correct"] else share,
               "differ": 2 * right * (n1 - right) / (n1 * (n1 - 1)) if n1 > 1 else np.nan,
               "depth": t, "fallback": not found, "h": h[t] if found else np.nan,
               "rank": 1 + (h > h[t]).sum() if found else np.nan, "n2": len(rows), "first": len(set(first)),
               "same": np.mean([token == parent["response_ids"][t] for token in first]), "base_tokens": len(h),
               "new_tokens": np.mean([len(row["response_ids"]) for row in rows]),
               "inherited": np.mean([len(row["prefix_ids"]) for row in rows])}


def means(source):
    """{name: number} for TABLE, NaN where the source does not know it; steps weigh as the groups sampled in them.

    Accuracy of parents a and of branches b and the flip rate f give the whole table parent -> branch."""
    out = {name: np.nan for _, name, _ in TABLE}
    for name, x in source.items():
        known = np.isfinite(x)
        weights = source["groups"] * known
        if name == "h":  # it is known only where there is a t*
            weights = weights * (1 - np.nan_to_num(source["fallback"]))
        if weights.any():
            out[name] = np.average(np.nan_to_num(x), weights=weights)
    a, b, f = out["base"], out["branch"], out["flip"]
    return out | {"groups": sum(source.get("groups", [np.nan])), "saved": 1 - out["new_tokens"] / out["base_tokens"],
                  "right right": (a + b - f) / 2, "right wrong": (a - b + f) / 2,
                  "wrong right": (b - a + f) / 2, "wrong wrong": 1 - (a + b + f) / 2}


def branches_table(sampled, on_file):
    """Two columns: all that was sampled, and the groups on file, which were kept for having right and wrong members."""
    def quantiles(name):
        x = on_file.get(name, np.array([]))
        x = x[np.isfinite(x)]
        return " / ".join(f"{q:.3g}" for q in np.percentile(x, [10, 50, 90])) if len(x) else "-"

    def flips_by_third():
        third = np.minimum(3 * on_file["depth"] / on_file["base_tokens"], 2).astype(int) if on_file else np.array([])
        return " / ".join(f"{on_file['flip'][third == k].mean():.3f}" if (third == k).any() else "-" for k in range(3))

    columns, rows = [means(sampled), means(on_file)], [["", "all sampled", "groups on file"]]
    for label, name, form in TABLE:
        rows.append([label, *(format(m[name], form) if np.isfinite(m[name]) else "-" for m in columns)])
    rows += [["verdict turned, forks in the parent's first / second / last third", "-", flips_by_third()],
             ["depth of t*, 10th / 50th / 90th percentile", "-", quantiles("depth")],
             ["rank of its entropy in the response, 10th / 50th / 90th", "-", quantiles("rank")]]
    return aligned(rows)


def draw_branches(figure, sampled, on_file):
    """Six panels; those over steps show all that was sampled where metrics.jsonl has it."""
    def axes(place):
        ax = figure.add_subplot(2, 3, place)
        ax.xaxis.get_major_locator().set_params(integer=True)
        return ax

    def lines(place, title, unit, source, curves):
        """curves: {label: one of means()}."""
        ax, steps = axes(place), np.unique(source["step"])
        by_step = [means({name: x[source["step"] == step] for name, x in source.items()}) for step in steps]
        for i, (label, name) in enumerate(curves.items()):
            ax.plot(steps, [m[name] for m in by_step], **look(i, len(steps) < 3), label=label)
        ax.set_ylim(bottom=0)
        panel(ax, title, 3, xlabel="training step", ylabel=unit)

    def histogram(place, title, what, x):
        """Share of the forks by whole numbers x (forks,), NaN left out. The last bar holds the highest percentile."""
        ax, x = axes(place), x[np.isfinite(x)]
        if len(x):
            top = np.percentile(x, 99)  # one straggler would flatten the rest
            width = max(1, round((top - x.min()) / 40))  # whole tokens, at most about 40 bars
            edges = np.arange(x.min(), top + width + 1, width) - .5
            ax.hist(np.clip(x, None, edges[-1] - .1), edges, weights=np.full(len(x), 1 / len(x)), color=COLOURS[0])
            ax.axvline(np.median(x), color="black", ls="--", label=f"median {np.median(x):g}")
        panel(ax, title if len(x) else f"{title}: no critical token", 1, xlabel=what, ylabel="share of forks")

    if on_file:
        histogram(1, "Depth of t*", "tokens into the parent (last bar: and more)",
                  on_file["depth"][on_file["fallback"] == 0])
        histogram(2, "Entropy rank of t*", "rank among the parent's tokens, 1 the highest", on_file["rank"])
        n2 = int(on_file["n2"].max())
        ax = axes(3)
        ax.bar(range(1, n2 + 1), [np.mean(on_file["first"] == k) for k in range(1, n2 + 1)], .6, color=COLOURS[0])
        panel(ax, "Different first tokens of a fork", 0, xlabel=f"of {n2} branches", ylabel="share of forks")
        lines(6, "Tokens of a response", "tokens", on_file, {
            "base, new": "base_tokens", "branch, new": "new_tokens", "inherited": "inherited"})
    source, whose = (sampled, "all sampled") if sampled else (on_file, "groups on file")
    lines(4, f"Right answers, {whose}", "share", source, {"base": "base", "branches": "branch"})
    lines(5, f"Verdict turned, {whose}", "share of branches", source, {
        "any": "flip", "wrong to right": "wrong right", "right to wrong": "right wrong"})


def table_and_picture(run):
    """Draws run/plots/branches.png; returns the table and the picture's path. One of the two logs is enough."""
    found, missing = [], []
    for read in (forks_sampled, forks_on_file):
        try:
            found.append(read(run))
        except ValueError as error:
            found.append({})
            missing.append(error)
    if not any(found):
        raise missing[0] if len(missing) == 2 else ValueError(f"{run}: there are no branches in it")
    for error in missing:
        warn(error)
    out = Path(run) / "plots" / "branches.png"
    with picture(out, 5.6) as figure:
        draw_branches(figure, *found)
    steps = np.concatenate([source["step"] for source in found if source])
    return f"{run}, steps {steps.min():.0f} to {steps.max():.0f}\n{branches_table(*found)}\n{out}"


def main(argv):
    """Every run; exit code 2 tells that one could not be done."""
    parser = command_line("branches", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder")
    return for_each(table_and_picture, parser.parse_args(argv).runs)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
