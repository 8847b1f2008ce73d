"""What happened at the forks: one prompt's group as a tree to look at, and in numbers what branching bought.

    python analyze.py tree runs/toy [--step N] [--prompt ID] [--out FILE] [--model DIR]     an HTML page that works offline
    python analyze.py tree runs/toy --text                                                  the same in the terminal
    python analyze.py branches runs/toy                                a table, and runs/toy/plots/branches.png

Reads samples.jsonl (of every step the first samples_per_step groups that were kept) and, for `branches`, metrics.jsonl (all
that was sampled). A model is loaded for --model only. What a model wrote is not trusted: it reaches the page as JSON that a
script shows as text, and the terminal without control characters.
"""
import itertools
import json
import math
import os
import signal
import sys
import textwrap
from pathlib import Path

import numpy as np

from analyze import COLOURS, LINES, MARKERS, STYLE, new_figure, read_run, value, warn

NEEDED = {"step", "stage", "prompt", "prompt_id", "group", "parent", "t_star", "candidates", "prompt_ids", "prefix_ids",
          "response_ids", "logp", "entropy", "reward", "correct", "advantage", "answer", "finish"}
TOP_H = 2.0  # nats, the dark end of the colours: the same for all steps, so that their pages can be compared
# white to brown (ColorBrewer's YlOrBr): each is darker than the one before, so the order survives print and colour blindness
RAMP = [(255, 255, 255), (254, 227, 145), (254, 153, 41), (204, 76, 2), (102, 37, 6)]


def read_samples(run):
    """The rows of a run's samples.jsonl, one at a time: the file of a long run is larger than memory.

    ValueError where the file or a field is missing; a line that does not parse (the last one of a killed run may be torn)
    is named on stderr and left out."""
    path = Path(run) / "samples.jsonl"
    if not path.parent.is_dir():
        raise ValueError(f"{run}: no such run folder")
    if not path.is_file():
        raise ValueError(f"{run} has no samples.jsonl: there is no rollout to look at")
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                warn(f"{path}, line {number} is torn: left out")
                continue
            if missing := NEEDED - (row.keys() if isinstance(row, dict) else set()):
                raise ValueError(f"{path}, line {number} lacks {', '.join(sorted(missing))}")
            yield row


def steps_of(rows):
    """Yields (step, [group]) where a group is [row], base responses first, so that `parent` is an index into it.

    A group that lost a row to a torn line is named and left out."""
    for step, of_step in itertools.groupby(rows, key=lambda row: row["step"]):
        groups = {}
        for row in of_step:
            groups.setdefault(row["group"], []).append(row)
        size, whole = max(map(len, groups.values())), []
        for number, group in groups.items():
            n1 = sum(row["parent"] < 0 for row in group)
            if len(group) < size or any((row["parent"] < 0) != (i < n1) or row["parent"] >= n1 for i, row in enumerate(group)):
                warn(f"step {step}, group {number}: rows are missing in samples.jsonl, left out")
            else:
                whole.append(group)
        yield step, whole


# ---- tree: one group -------------------------------------------------------------------------------------------------

def interest(group):
    """What makes a group worth looking at: branches, then right and wrong answers, then verdicts that a branch turned, then
    how near it is to half right."""
    branches, right = [row for row in group if row["parent"] >= 0], sum(row["correct"] for row in group)
    turned = sum(row["correct"] != group[row["parent"]]["correct"] for row in branches)
    return bool(branches), 0 < right < len(group), turned, min(right, len(group) - right)


def choose_group(run, step=None, prompt=None):
    """The rows of one group. Default: of the last step that branched and holds a group with right and wrong answers (the
    last step, where there is none), the group in which most branches turned the verdict."""
    chosen, seen = [], []
    for number, groups in steps_of(read_samples(run)):
        seen.append(number)
        best = max((interest(group)[:2] for group in groups), default=(False, False))
        if number == step or step is None and best >= max((interest(group)[:2] for group in chosen), default=(False, False)):
            chosen = groups
    if not chosen:
        held = f"steps {min(seen)} to {max(seen)}" if seen else "no group"
        raise ValueError(f"{run}: samples.jsonl holds {held}" + (f", not step {step}" if seen and step is not None else ""))
    ids = [group[0]["prompt_id"] for group in chosen]
    if prompt is not None and prompt not in ids:
        raise ValueError(f"{run}: step {chosen[0][0]['step']} holds the prompts {', '.join(map(str, ids))}, not {prompt}")
    return max((group for group in chosen if prompt in (None, group[0]["prompt_id"])), key=interest)


def score(group, model, temperature):
    """For every row (rank of each response token, [its five likeliest alternatives as (text, probability)]), and how the
    model's tokenizer spells each token; at the sampling temperature. ValueError if the ids are not this model's."""
    import torch
    from transformers import AutoTokenizer

    from policy import load_lm
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lm = load_lm(model, "auto", "sdpa").to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    out = []
    for row in group:
        ids = torch.tensor(row["prompt_ids"] + row["prefix_ids"] + row["response_ids"], device=device)
        if ids.max() >= lm.config.vocab_size:
            raise ValueError(f"--model: {model} has no token {int(ids.max())}: these rollouts are another model's")
        first, ranks, likeliest = len(ids) - len(row["response_ids"]), [], []
        with torch.no_grad():
            hidden = lm.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0, first - 1:-1]  # (T, D)
            for part, own in zip(hidden.split(256), ids[first:].split(256), strict=True):  # never a whole (T, V)
                logp = (lm.get_output_embeddings()(part).float() / temperature).log_softmax(-1)
                ranks += (1 + (logp > logp.gather(-1, own[:, None])).sum(-1)).tolist()
                for p, i in zip(*(x.tolist() for x in logp.topk(5)), strict=True):
                    likeliest.append([(tokenizer.decode([j]), round(math.exp(q), 4)) for q, j in zip(p, i, strict=True)])
        out.append((ranks, likeliest, [tokenizer.decode([i]) for i in row["response_ids"]]))
    return out


def clause_start(tokens, t):
    """rollout.clause_start on the tokens' texts: a copy, for looking at a file should not take importing torch."""
    for i in range(t - 2, -1, -1):
        text = tokens[i].rstrip(" ")
        ends = text.endswith((".", "!", "?")) and (text != tokens[i] or tokens[i + 1][:1].isspace())
        if ends or "\n" in tokens[i]:
            return i + 1
    return 0


def tree_data(run, group, model=None):
    """What page and text show: the group's head, and its leaves as dicts. Numbers rounded, NaN as None: it becomes JSON.

    A base leaf has fork (t*, or its length), clause and from: where the last clause before t* begins, and what branches
    inherit. A branch has its parent's fork. model: see score()."""
    head, scored, stages = group[0], [None] * len(group), Path(run) / "stages.json"
    if model:
        settings = json.loads(stages.read_text()) if stages.is_file() else {}
        scored = score(group, model, settings.get(head["stage"], {}).get("temperature", 1.0))
    elif "tokens" not in head:
        warn(f"{run}: samples.jsonl lacks `tokens`, their texts (an older run): ids are shown, --model DIR spells them")

    def tidy(x):
        return round(x, 4) if isinstance(x, (int, float)) and math.isfinite(x) else None

    leaves, children = [], {}
    for n, (row, of_model) in enumerate(zip(group, scored, strict=True)):
        tokens = row.get("tokens") or (of_model[2] if of_model else [f" {i}" for i in row["response_ids"]])
        siblings = children.setdefault(row["parent"], [])
        siblings.append(n)
        leaf = {"n": n, "parent": row["parent"], "name": str(n), "tokens": tokens, "candidates": row["candidates"],
                "h": [tidy(x) for x in row["entropy"]], "logp": [tidy(x) for x in row["logp"]], "fork": len(tokens), "clause": 0,
                "from": 0, "h_star": None, **{key: tidy(row[key]) for key in ("reward", "advantage")},
                **{key: row[key] for key in ("correct", "answer", "finish")}}
        if row["parent"] >= 0:
            parent, t = leaves[row["parent"]], row["t_star"]
            parent |= {"fork": t, "clause": clause_start(parent["tokens"], t), "from": t - len(row["prefix_ids"]),
                       "h_star": tidy(row["h_star"])}
            leaf |= {"name": f"{row['parent']}.{len(siblings)}", "fork": t}
        if of_model:
            leaf |= {"rank": of_model[0], "likeliest": of_model[1]}
        leaves.append(leaf)
    # a model that is unsure nearly everywhere would be one dark block: a tenth of its tokens are as dark as can be
    top = max(TOP_H, math.ceil(np.percentile([h or 0 for leaf in leaves for h in leaf["h"]], 90)))
    n1, right = len(children[-1]), sum(row["correct"] for row in group)
    shape = f"{n1} base responses" + (f" × (1 + {len(group) // n1 - 1} branches)" if len(group) > n1 else "")
    return {"run": Path(run).resolve().name, "step": head["step"], "stage": head["stage"], "prompt_id": head["prompt_id"],
            "prompt": head["prompt"], "summary": f"{shape}, {right} of {len(group)} right", "top": top, "ramp": RAMP,
            "model": model and "/".join(Path(model).parts[-2:]), "leaves": leaves}


def page(tree):
    """The HTML page. `<` is written \\u003c in its JSON, so that no text of the model can end the script element; a lone
    surrogate, which UTF-8 cannot write, becomes `?`."""
    data = json.dumps(tree, allow_nan=False, ensure_ascii=False).replace("<", "\\u003c").encode(errors="replace").decode()
    return Path(__file__).with_name("tree.html").read_text(encoding="utf-8").replace("__DATA__", data, 1)


def visible(text):
    """Text for a terminal: no control character (an escape sequence could rewrite the screen), no invisible one."""
    return "".join(c if c.isprintable() else "↵" if c == "\n" else "⇥" if c == "\t" else "\ufffd" for c in str(text))


def terminal(tree, colour=False):
    """The tree as text: ‹candidates›, «first tokens after the fork», with colour entropy as background."""
    def spell(leaf, a, b, first=None):
        out, pool = "", set(leaf["candidates"])
        for i in range(a, b):
            token = visible(leaf["tokens"][i])
            token = f"«{token}»" if i == first else f"‹{token}›" if i in pool else token
            if colour:
                x = min(leaf["h"][i] or 0, tree["top"]) / tree["top"] * (len(RAMP) - 1)
                r, g, b_ = (round(float(np.interp(x, range(len(RAMP)), channel))) for channel in zip(*RAMP, strict=True))
                token = f"\x1b[48;2;{r};{g};{b_};{97 if x > .62 * (len(RAMP) - 1) else 30}m{token}\x1b[0m"
            out += token.replace("↵", "↵\n      ")
        return "      " + out

    def number(x, form="+.2f"):
        return "-" if x is None else format(x, form)

    def title(name, leaf):
        return (f"{name}  {'✓' if leaf['correct'] else '✗'} reward {number(leaf['reward'])} advantage {number(leaf['advantage'])}"
                f" · answer {visible(leaf['answer'])} · {len(leaf['tokens'])} tokens, {visible(leaf['finish'])}")

    def at(leaf, i):
        more = "".join(f" {visible(text)!r} {p:.3f}" for text, p in leaf["likeliest"][i]) if "rank" in leaf else ""
        more = more and f" rank {leaf['rank'][i]} of {tree['model']}, likeliest{more}"
        h, logp = (number(leaf[key][i], ".3f") for key in ("h", "logp"))
        return f"{i} {visible(leaf['tokens'][i])!r} H {h} log-prob {logp}{more}"

    lines = [f"{tree['run']} · step {tree['step']} · {visible(tree['stage'])} · prompt {tree['prompt_id']} · {tree['summary']}",
             textwrap.indent(textwrap.fill(visible(tree["prompt"]), 116), "  | "),
             "marks: ‹candidate for t*›  «first token after the fork»  H in nats"]
    for base in (leaf for leaf in tree["leaves"] if leaf["parent"] < 0):
        lines += ["", title(f"base {base['name']}", base)]
        forks, t = [leaf for leaf in tree["leaves"] if leaf["parent"] == base["n"]], base["fork"]
        if base["candidates"]:
            lines += textwrap.wrap("candidates: " + " · ".join(at(base, i) for i in base["candidates"]), 116,
                                   initial_indent="    ", subsequent_indent="      ")
        if not forks:
            lines.append(spell(base, 0, len(base["tokens"])))
            continue
        h_star = number(base["h_star"], ".3f")
        lines.append(f"    shared up to t* = {t}, H {h_star}" if t else "    t* = 0: the branches are fresh samples")
        lines += [spell(base, 0, t)] if t else []
        lines += ["    the clause before t*: " + visible("".join(base["tokens"][base["clause"]:t]))] if base["clause"] else []
        lines += [f"    branches inherit tokens {base['from']} to {t - 1} only"] if base["from"] else []
        lines += [f"    base {base['name']} goes on: {at(base, t)}", spell(base, t, len(base["tokens"]), t)]
        for leaf in forks:
            lines += [title(f"    branch {leaf['name']}", leaf) + f" · first {at(leaf, 0)}",
                      spell(leaf, 0, len(leaf["tokens"]), 0)]
    return "\n".join(lines)


def tree_command(run, args):
    """Writes the page (or returns the text, with --text); returns what to print."""
    tree = tree_data(run, choose_group(run, args.step, args.prompt), args.model)
    if args.text:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| less` that is left early is no error
        return terminal(tree, sys.stdout.isatty() and "NO_COLOR" not in os.environ)
    out = Path(args.out or Path(run) / "plots" / f"tree-step{tree['step']:d}-prompt{tree['prompt_id']:d}.html")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page(tree), encoding="utf-8")
    return f"{out}: {tree['summary']}"


# ---- branches: all forks ---------------------------------------------------------------------------------------------

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
        return np.average(x[known], weights=source["groups"][known]) if known.any() else np.nan

    def cell(number, form):
        return format(number, form) if np.isfinite(number) else "-"

    def quantiles(name):
        x = on_file.get(name, np.array([]))
        x = x[np.isfinite(x)]
        return " / ".join(f"{q:.0f}" for q in np.percentile(x, [10, 50, 90])) if len(x) else "-"

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
            ("depth of t*, tokens", "depth", ".1f"), ("entropy at t*, nats", "h", ".3f"),
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
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)


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


# ---- the command line ------------------------------------------------------------------------------------------------

def add_commands(subparsers):
    """The two subcommands of analyze.py. args.command(run, args) returns what to print."""
    tree = subparsers.add_parser("tree", help="one prompt's group as a tree, an HTML page or text")
    tree.add_argument("--step", type=int, help="training step (default: the last that branched)")
    tree.add_argument("--prompt", type=int, metavar="ID", help="prompt_id (default: where most branches turned the verdict)")
    tree.add_argument("--model", metavar="DIR", help="HF folder or hub id that scores the tokens: rank and alternatives")
    tree.add_argument("--out", metavar="FILE", help="the page (default: in RUN/plots)")
    tree.add_argument("--text", action="store_true", help="print it instead")
    branches = subparsers.add_parser("branches", help="what branching bought, a table and a picture")
    for sub, command, many in ((tree, tree_command, 1), (branches, branches_command, "+")):
        sub.add_argument("runs", nargs=many, metavar="RUN", help="a run folder")
        sub.set_defaults(command=command)
