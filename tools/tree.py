"""What happened at the forks: one prompt's group as a tree to look at.

    python -m tools.tree runs/toy [--step N] [--prompt ID] [--out FILE] [--model DIR]     an HTML page, works offline
    python -m tools.tree runs/toy --text                                                  the same in the terminal

Reads samples.jsonl: of every step the first samples_per_step groups that were kept. Only --model loads a model. What a
model wrote is not trusted: a script on the page shows it as text, the terminal gets printable characters only.
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

from lib.files import read_json
from tools.common import command_line, for_each, read_samples, run_file, warn

HEAD = ("step", "stage", "prompt_id", "prompt")  # fields of samples.jsonl: the same in all rows of a group,
LEAF = ("parent", "t_star", "h_star", "candidates", "tokens", "logp", "reward", "correct", "advantage", "answer",
        "finish")  # and of each rollout
TOP_H = 2.0  # nats, the dark end of the colours: the same for all steps, so that their pages can be compared
# white to brown (ColorBrewer's YlOrBr): each is darker than the one before, in print and to the colour-blind, too
RAMP = [(255, 255, 255), (254, 227, 145), (254, 153, 41), (204, 76, 2), (102, 37, 6)]


def groups_by_step(run):
    """Yields (step, [group]) of samples.jsonl. A group is [row], base responses first: `parent` is an index into it.

    A group that lost rows to a torn line is named and left out. ValueError: there is no such file."""
    sizes = {}  # {stage: rows of a whole group}
    rows = read_samples(run_file(run, "samples.jsonl"), {"group", "prefix_ids", *HEAD, *LEAF})
    for step, of_step in itertools.groupby(rows, key=lambda row: row["step"]):
        groups = [list(of_group) for _, of_group in itertools.groupby(of_step, key=lambda row: row["group"])]
        stage = groups[0][0]["stage"]
        size = sizes[stage] = max(sizes.get(stage, 0), *map(len, groups))
        for group in groups:
            if not is_whole(group, size):
                warn(f"step {step}, group {group[0]['group']}: rows are missing in samples.jsonl, left out")
        yield step, [group for group in groups if is_whole(group, size)]


def is_whole(group, size):
    """Whether a group has `size` rows: its base responses, then equally many branches of each that leave inside it."""
    parents = [row["parent"] for row in group]
    n1 = parents.count(-1)
    return n1 and parents == [-1] * n1 + [i for i in range(n1) for _ in range(size // n1 - 1)] and all(
        (row["t_star"] or 0) < len(group[row["parent"]]["response_ids"]) for row in group[n1:])


# ---- one group -------------------------------------------------------------------------------------------------------

def interest(group):
    """What makes a group worth looking at: branches, then right and wrong answers, then verdicts that a branch turned,
    then how near it is to half right."""
    branches, right = [row for row in group if row["parent"] >= 0], sum(row["correct"] for row in group)
    turned = sum(row["correct"] != group[row["parent"]]["correct"] for row in branches)
    return bool(branches), 0 < right < len(group), turned, min(right, len(group) - right)


def choose_group(run, step=None, prompt=None):
    """The rows of one group. Default: the one in which most branches turned the verdict, of the last step that branched
    and holds a group with right and wrong answers (of the last step, where there is none)."""
    chosen, seen, record = [], [], (False, False)
    for number, groups in groups_by_step(run):
        seen.append(number)
        best = max((interest(group)[:2] for group in groups), default=None)  # None: no whole group
        if best and (number == step or step is None and best >= record):
            chosen, record = groups, best
    if not chosen:
        held = f" of step {step}, only steps {min(seen)} to {max(seen)}" if seen and step is not None else ""
        raise ValueError(f"{run}: samples.jsonl holds no whole group{held}")
    ids = [group[0]["prompt_id"] for group in chosen]
    if prompt is not None and prompt not in ids:
        held = ", ".join(map(str, ids))
        raise ValueError(f"{run}: step {chosen[0][0]['step']} holds the prompts {held}, not {prompt}")
    return max((group for group in chosen if prompt in (None, group[0]["prompt_id"])), key=interest)


def rank_tokens(group, model, temperature):
    """A model's view of every row, at the sampling temperature: {rank: of each response token in the whole vocabulary,
    likeliest: the five likeliest at its place as (text, probability)}. ValueError: the ids are not of its tokenizer."""
    import torch

    from lib.weights import load_lm, load_tokenizer
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lm, (tokenizer, _) = load_lm(model, torch.float32, "sdpa").to(device), load_tokenizer(model)
    out = []
    for row in group:
        ids = torch.tensor(row["prompt_ids"] + row["prefix_ids"] + row["response_ids"], device=device)
        text = tokenizer.decode(row["prefix_ids"] + row["response_ids"], skip_special_tokens=True)
        if ids.max() >= lm.config.vocab_size or text != row["response"]:
            raise ValueError(f"--model: {model} has another tokenizer than these rollouts")
        first, ranks, likeliest = len(ids) - len(row["response_ids"]), [], []
        with torch.no_grad():
            hidden = lm.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0, first - 1:-1]  # (T, D)
            for part, own in zip(hidden.split(256), ids[first:].split(256), strict=True):  # never a whole (T, V)
                logp = (lm.get_output_embeddings()(part).float() / temperature).log_softmax(-1)
                ranks += (1 + (logp > logp.gather(-1, own[:, None])).sum(-1)).tolist()
                for five in zip(*(x.tolist() for x in logp.topk(5)), strict=True):
                    likeliest.append([(tokenizer.decode([i]), round(math.exp(x), 4)) for x, i in zip(*five)])
        out.append({"rank": ranks, "likeliest": likeliest})
    return out


def for_json(x):
    """Numbers for JSON, also those in a list: rounded, NaN and infinity as None."""
    if isinstance(x, list):
        return [for_json(y) for y in x]
    return x if not isinstance(x, float) else round(x, 4) if math.isfinite(x) else None


def tree_data(run, group, model=None):
    """What page and text show: the group's head, and its rows as leaves.

    A base leaf has `fork` (where its branches leave it, its length without branches), t_star (None for plain resamples,
    which leave at the start) and `from`, where what its branches inherit begins. A branch has its parent's fork."""
    head, ranked, leaves = group[0], [{}] * len(group), []
    if model:
        settings = read_json(Path(run) / "stages.json") or {}
        ranked = rank_tokens(group, model, settings.get(head["stage"], {}).get("temperature", 1.0))
    for n, (row, of_model) in enumerate(zip(group, ranked, strict=True)):
        leaf = {key: for_json(row[key]) for key in LEAF} | of_model
        leaf |= {"n": n, "name": str(n), "h": for_json(row["entropy"]), "fork": len(row["tokens"]), "from": 0}
        if row["parent"] >= 0:
            siblings, t = sum(other["parent"] == row["parent"] for other in leaves), row["t_star"] or 0
            leaf |= {"name": f"{row['parent']}.{siblings + 1}", "fork": t}
            leaves[row["parent"]] |= {key: leaf[key] for key in ("t_star", "h_star", "fork")}
            leaves[row["parent"]]["from"] = t - len(row["prefix_ids"])
        leaves.append(leaf)
    # a model that is unsure nearly everywhere would be one dark block: a tenth of its tokens are as dark as can be
    top = max(TOP_H, math.ceil(np.percentile([h or 0 for leaf in leaves for h in leaf["h"]], 90)))
    n1, right = sum(row["parent"] < 0 for row in group), sum(row["correct"] for row in group)
    shape = f"{n1} base responses" + (f" × (1 + {len(group) // n1 - 1} branches)" if len(group) > n1 else "")
    return {"run": Path(run).resolve().name, **{key: head[key] for key in HEAD},
            "summary": f"{shape}, {right} of {len(group)} right", "top": top, "ramp": RAMP,
            "model": model and "/".join(Path(model).parts[-2:]), "leaves": leaves}


# ---- as a page, as text ----------------------------------------------------------------------------------------------

def page(tree):
    """The HTML page. No text of the model can end the script element: `<` is written \\u003c in its JSON. A lone
    surrogate, which UTF-8 cannot write, becomes `?`."""
    data = json.dumps(tree, allow_nan=False, ensure_ascii=False).replace("<", "\\u003c")
    data = data.encode(errors="replace").decode()
    return Path(__file__).with_name("tree.html").read_text(encoding="utf-8").replace("__DATA__", data, 1)


def visible(text):
    """Text for a terminal: no control character (an escape sequence could rewrite the screen), no invisible one."""
    return "".join(c if c.isprintable() else {"\n": "↵", "\t": "⇥"}.get(c, "\ufffd") for c in str(text))


def shaded(token, h, top):
    """A token for a terminal, on the background that the page gives its entropy."""
    x = min(h or 0, top) / top * (len(RAMP) - 1)
    rgb = ";".join(f"{np.interp(x, range(len(RAMP)), channel):.0f}" for channel in zip(*RAMP, strict=True))
    return f"\x1b[48;2;{rgb};{97 if x > .62 * (len(RAMP) - 1) else 30}m{token}\x1b[0m"


def terminal(tree, colour=False):
    """The tree as text: ‹candidates›, «first tokens after the fork», with colour entropy as background."""
    def spell(leaf, a, b, first=None):
        out, pool = "      ", set(leaf["candidates"])
        for i in range(a, b):
            token = visible(leaf["tokens"][i])
            token = f"«{token}»" if i == first else f"‹{token}›" if i in pool else token
            out += (shaded(token, leaf["h"][i], tree["top"]) if colour else token).replace("↵", "↵\n      ")
        return out

    def number(x, form):
        return "-" if x is None else format(x, form)

    def title(name, leaf):
        reward, advantage = (number(leaf[key], "+.2f") for key in ("reward", "advantage"))
        return (f"{name}  {'✓' if leaf['correct'] else '✗'} reward {reward} advantage {advantage} · answer "
                f"{visible(leaf['answer'])} · {len(leaf['tokens'])} tokens, {visible(leaf['finish'])}")

    def at(leaf, i):
        h, logp, more = number(leaf["h"][i], ".3f"), number(leaf["logp"][i], ".3f"), ""
        if "rank" in leaf:
            likeliest = "".join(f" {visible(text)!r} {p:.3f}" for text, p in leaf["likeliest"][i])
            more = f" rank {leaf['rank'][i]} of {tree['model']}, likeliest{likeliest}"
        return f"{i} {visible(leaf['tokens'][i])!r} H {h} log-prob {logp}{more}"

    lines = [f"{tree['run']} · step {tree['step']} · {visible(tree['stage'])} · prompt {tree['prompt_id']} · "
             f"{tree['summary']}", textwrap.indent(textwrap.fill(visible(tree["prompt"]), 116), "  | "),
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
        found = base["t_star"] is not None
        lines.append(f"    shared up to t* = {t}, H {number(base['h_star'], '.3f')}" if found else
                     "    no critical token: the branches are fresh samples of the prompt")
        lines += [spell(base, 0, t)] if t else []
        if base["from"]:  # clause: last
            lines += [f"    branches inherit tokens {base['from']} to {t - 1} only:", spell(base, base["from"], t)]
        lines += [f"    base {base['name']} goes on: {at(base, t)}", spell(base, t, len(base["tokens"]), t)]
        for leaf in forks:
            lines += [title(f"    branch {leaf['name']}", leaf) + f" · first {at(leaf, 0)}",
                      spell(leaf, 0, len(leaf["tokens"]), 0)]
    return "\n".join(lines)


def draw_tree(run, args):
    """Writes the page and returns what to print: its path, or with --text the tree itself."""
    tree = tree_data(run, choose_group(run, args.step, args.prompt), args.model)
    if args.text:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| less` that is left early is no error
        return terminal(tree, sys.stdout.isatty() and "NO_COLOR" not in os.environ)
    out = Path(args.out or Path(run) / "plots" / f"tree-step{tree['step']:d}-prompt{tree['prompt_id']:d}.html")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page(tree), encoding="utf-8")
    return f"{out}: {tree['summary']}"


def main(argv):
    """One group of one run; exit code 2 where something is missing."""
    parser = command_line("tree", __doc__)
    parser.add_argument("run", metavar="RUN", help="a run folder")
    parser.add_argument("--step", type=int, help="training step (default: the last that branched)")
    parser.add_argument("--prompt", type=int, metavar="ID", help="prompt_id (default: most verdicts turned)")
    parser.add_argument("--model", metavar="DIR", help="HF folder or hub id that ranks the tokens, with alternatives")
    parser.add_argument("--out", metavar="FILE", help="the page (default: in RUN/plots)")
    parser.add_argument("--text", action="store_true", help="print it instead")
    args = parser.parse_args(argv)
    return for_each(lambda run: draw_tree(run, args), [args.run])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
