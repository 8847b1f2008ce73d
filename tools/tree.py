"""What happened at the forks: one prompt's group as a tree to look at.

    python analyze.py tree runs/toy [--step N] [--prompt ID] [--out FILE] [--model DIR]     an HTML page that works offline
    python analyze.py tree runs/toy --text                                                  the same in the terminal

Reads samples.jsonl (of every step the first samples_per_step groups that were kept). A model is loaded for --model only. What a
model wrote is not trusted: it reaches the page as JSON that a script shows as text, and the terminal without control characters.
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

from tools.analyze import warn

NEEDED = {"step", "stage", "prompt", "response", "prompt_id", "group", "parent", "t_star", "candidates", "prompt_ids",
          "prefix_ids", "response_ids", "logp", "entropy", "reward", "correct", "advantage", "answer", "finish"}
TOP_H = 2.0  # nats, the dark end of the colours: the same for all steps, so that their pages can be compared
# white to brown (ColorBrewer's YlOrBr): each is darker than the one before, so the order survives print and colour blindness
RAMP = [(255, 255, 255), (254, 227, 145), (254, 153, 41), (204, 76, 2), (102, 37, 6)]


def read_samples(run):
    """The rows of a run's samples.jsonl, one at a time: the file of a long run is larger than memory.

    ValueError where there is no file. Lines that are torn (the last one of a killed run may be) or no rollout are left out,
    counted, and the first is named on stderr."""
    path = Path(run) / "samples.jsonl"
    if not path.parent.is_dir():
        raise ValueError(f"{run}: no such run folder")
    if not path.is_file():
        raise ValueError(f"{run} has no samples.jsonl: there is no rollout to look at")
    bad = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                if missing := NEEDED - (row.keys() if isinstance(row, dict) else set()):
                    raise ValueError("it lacks " + ", ".join(sorted(missing)))
                T = len(row["response_ids"])
                if not (T and T == len(row["entropy"]) == len(row["logp"]) and isinstance(row["step"], int)
                        and (row["parent"] < 0 or row["t_star"] >= 0) and all(0 <= i < T for i in row["candidates"])):
                    raise ValueError("its fields do not fit together")
            except json.JSONDecodeError:
                bad.append(f"line {number} is torn")
            except (ValueError, TypeError) as error:
                bad.append(f"line {number}: {error}")
            else:
                yield row
    if bad:
        warn(f"{path}, {bad[0]}: left out" + (f", and {len(bad) - 1} lines more" if bad[1:] else ""))


def steps_of(rows):
    """Yields (step, [group]) where a group is [row], base responses first, so that `parent` is an index into it.

    A group that lost rows to a torn line is named and left out: it is smaller than others of its stage, its base responses
    have unequal numbers of branches, or branches lost their parents."""
    sizes = {}  # {stage: rows of a whole group}
    for step, of_step in itertools.groupby(rows, key=lambda row: row["step"]):
        groups = {}
        for row in of_step:
            groups.setdefault(row["group"], []).append(row)
        whole = []
        for number, group in groups.items():
            stage = group[0]["stage"]
            size = sizes[stage] = max(sizes.get(stage, 0), *map(len, groups.values()))
            n1 = sum(row["parent"] < 0 for row in group)
            branches = {sum(row["parent"] == i for row in group) for i in range(n1)}  # of a base response: all have n2
            if len(group) < size or len(branches) > 1 or any(
                    (row["parent"] < 0) != (i < n1) or row["parent"] >= n1
                    or row["parent"] >= 0 and row["t_star"] >= len(group[row["parent"]]["response_ids"])
                    for i, row in enumerate(group)):
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
    chosen, seen, record = [], [], (False, False)
    for number, groups in steps_of(read_samples(run)):
        seen.append(number)
        best = max((interest(group)[:2] for group in groups), default=None)  # None: no whole group
        if best and (number == step or step is None and best >= record):
            chosen, record = groups, best
    if not chosen:
        held = f" of step {step}, only steps {min(seen)} to {max(seen)}" if seen and step is not None else ""
        raise ValueError(f"{run}: samples.jsonl holds no whole group{held}")
    ids = [group[0]["prompt_id"] for group in chosen]
    if prompt is not None and prompt not in ids:
        raise ValueError(f"{run}: step {chosen[0][0]['step']} holds the prompts {', '.join(map(str, ids))}, not {prompt}")
    return max((group for group in chosen if prompt in (None, group[0]["prompt_id"])), key=interest)


def score(group, model, temperature):
    """For every row (rank of each response token, [its five likeliest alternatives as (text, probability)]), and how the
    model's tokenizer spells each token; at the sampling temperature. ValueError if the ids are not this model's."""
    import torch
    from transformers import AutoTokenizer

    from lib.policy import load_lm
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lm = load_lm(model, "auto", "sdpa").to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
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

    A base leaf has fork (t*, or its length), clause and from: where the last clause before t* begins (t* itself where ids have
    no text), and what branches inherit. A branch has its parent's fork. model: see score()."""
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
                "h": [tidy(x) for x in row["entropy"]], "logp": [tidy(x) for x in row["logp"]], "fork": len(tokens),
                "clause": len(tokens), "from": 0, "h_star": None, **{key: tidy(row[key]) for key in ("reward", "advantage")},
                **{key: row[key] for key in ("correct", "answer", "finish")}}
        if row["parent"] >= 0:
            parent, t = leaves[row["parent"]], row["t_star"]
            clause = clause_start(parent["tokens"], t) if of_model or "tokens" in row else t
            parent |= {"fork": t, "clause": clause, "from": t - len(row["prefix_ids"]), "h_star": tidy(row["h_star"])}
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
        if 0 < base["clause"] < t:
            lines.append("    the clause before t*: " + visible("".join(base["tokens"][base["clause"]:t])))
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


# ---- the command line ------------------------------------------------------------------------------------------------

def add_command(subparsers):
    """The subcommand of analyze.py. args.command(run, args) returns what to print."""
    sub = subparsers.add_parser("tree", help="one prompt's group as a tree, an HTML page or text")
    sub.add_argument("--step", type=int, help="training step (default: the last that branched)")
    sub.add_argument("--prompt", type=int, metavar="ID", help="prompt_id (default: where most branches turned the verdict)")
    sub.add_argument("--model", metavar="DIR", help="HF folder or hub id that scores the tokens: rank and alternatives")
    sub.add_argument("--out", metavar="FILE", help="the page (default: in RUN/plots)")
    sub.add_argument("--text", action="store_true", help="print it instead")
    sub.add_argument("runs", nargs=1, metavar="RUN", help="a run folder")
    sub.set_defaults(command=tree_command)
