"""What the instruments share: errors in one line, the logs of a run, the look of pictures. Imports no torch."""
import argparse
import contextlib
import functools
import json
import sys
from pathlib import Path

import numpy as np

# The colours are Okabe and Ito's. No line relies on colour alone: dashes and markers differ, too.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#E69F00", "#000000", "#CC79A7", "#56B4E9"]
LINES = ["-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (2, 1)), (0, (9, 3))]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
STYLE = {"font.size": 8.5, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": .25,
         "lines.linewidth": 1.3, "lines.markersize": 3.5, "legend.frameon": False}


# ---- the command line ------------------------------------------------------------------------------------------------

@functools.cache  # every message once, however often a file is read
def warn(message):
    print(message, file=sys.stderr)


def command_line(name, doc):
    """The parser of `python -m tools.NAME`."""
    return argparse.ArgumentParser(f"python -m tools.{name}", description=doc,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)


def for_each(function, inputs):
    """Print what the function returns, unless None, for every input -> exit code, 2 if one failed.

    A ValueError or OSError is one line on stderr, and the other inputs are done all the same."""
    code = 0
    for x in inputs:
        try:
            if (text := function(x)) is not None:
                print(text)
        except (ValueError, OSError) as error:
            warn(f"error: {error}")
            code = 2
    return code


# ---- the logs of a run -----------------------------------------------------------------------------------------------

def run_file(run, name):
    """The path of a file in a run folder; ValueError says what is missing."""
    if not Path(run).is_dir():
        raise ValueError(f"{run}: no such run folder")
    if not (Path(run) / name).is_file():
        raise ValueError(f"{run} is no run, or an incomplete one: it has no {name}")
    return Path(run) / name


def read_run(folder):
    """metrics.jsonl -> (training lines, evaluations), each sorted by step; sft lines are left out.

    A killed run goes on from its last checkpoint and logs the steps after it once more: the later line counts. A line
    that does not parse (the last one of a killed run may be torn) is named on stderr and left out."""
    path, train, evals = run_file(folder, "metrics.jsonl"), [], []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n"), 1):
        try:
            row = json.loads(line or "{}")
        except json.JSONDecodeError:
            warn(f"{path}, line {number} is torn: left out")
            continue
        if not isinstance(row, dict) or not isinstance(row.get("step"), int) or "sft/step" in row:
            continue
        step, held_out = row["step"], "actor/entropy" not in row and any(key.startswith("eval/") for key in row)
        while train and train[-1]["step"] >= step + held_out:
            train.pop()
        while evals and (evals[-1]["step"] > step or
                         held_out and evals[-1]["step"] == step and evals[-1].get("stage") == row.get("stage")):
            evals.pop()
        (evals if held_out else train).append(row)
    return train, evals


def value(row, key):
    """A metric as a float, NaN where the line has none."""
    return float(row[key]) if isinstance(row.get(key), (int, float)) else float("nan")


def read_samples(path, more=frozenset()):
    """The rows of a samples.jsonl, one at a time: the file of a long run is larger than memory. `more`: fields wanted
    besides the step, the parent, the ids, the text and the entropies.

    Lines that are torn (a killed run may end in one) or no rollout are left out and counted; stderr names the first."""
    bad, needed = [], more | {"step", "parent", "prompt_ids", "response_ids", "response", "entropy"}
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                if missing := needed - (row.keys() if isinstance(row, dict) else set()):
                    raise ValueError("it lacks " + ", ".join(sorted(missing)))
                T, t_star = len(row["response_ids"]), row.get("t_star")
                if not (T and row["prompt_ids"] and isinstance(row["response"], str) and isinstance(row["step"], int)
                        and all(len(row[key]) == T for key in ("entropy", "logp") if key in needed)
                        and np.isfinite(row["entropy"]).all() and (row["parent"] < 0 or t_star is None or t_star >= 0)
                        and all(0 <= i < T for i in row.get("candidates", []))):
                    raise ValueError("its fields do not fit together")
            except json.JSONDecodeError:
                bad.append(f"line {number} is torn")
            except (ValueError, TypeError) as error:
                bad.append(f"line {number}: {error}")
            else:
                yield row
    if bad:
        warn(f"{path}, {bad[0]}: left out" + (f", and {len(bad) - 1} lines more" if bad[1:] else ""))


# ---- pictures --------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def picture(path, height, style=None):
    """A figure to draw on, `height` inches high and as wide as a README; saved to `path` at the end of the block."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # not pyplot: no global state, no display, always drawn by Agg
    with rc_context(STYLE | (style or {})):
        figure = Figure(figsize=(10, height), dpi=100, layout="constrained")  # 1000 pixels
        yield figure
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def look(i, marked=True):
    """Colour, dashes and marker of line number i. The eighth has the first colour again, but not its dashes."""
    style = (i + i // len(COLOURS)) % len(LINES)
    return {"color": COLOURS[i % len(COLOURS)], "ls": LINES[style], "marker": MARKERS[style] if marked else ""}


def panel(ax, title, columns, room=0, handles=2.6, **labels):
    """Title on the left, under it the legend in `columns` (0: none), then `room` for a line of text, in font sizes.
    labels and limits: of Axes.set."""
    from matplotlib import rcParams
    ax.set(**labels)
    rows = -(-len(ax.get_legend_handles_labels()[0]) // columns) if columns else 0
    if rows:
        ax.legend(loc="lower left", bbox_to_anchor=(-.02, 1 + .05 * room), ncols=columns, fontsize="small",
                  columnspacing=1, handlelength=handles, handletextpad=.5, borderaxespad=.2, labelspacing=.3)
    pad = rcParams["font.size"] * (.7 + room + 1.5 * rows)
    ax.set_title(title, loc="left", fontweight="bold", fontsize="medium", pad=pad)
