"""Trackers: a run's lines on the pages of wandb, trackio, tensorboard or mlflow. metrics.jsonl stays the truth.

Rank 0 passes on the numbers of each line once it is in the file, and a few sampled groups now and then. A run that goes
on first passes on what the tracker lacks of the file. A tracker's step is the training step, plus the steps of sft so
far. It never falls, and an evaluation has the step that it follows.
"""

import importlib.util
import json
import os
import re
import shutil
import textwrap
import uuid
from pathlib import Path

from lib.files import read_json, replace_file

EVERY, GROUPS, CHARS = 10, 2, 2000  # training steps from table to table, groups in one, characters of a text
COLUMNS = ["step", "prompt_id", "group", "parent", "t_star", "h_star", "reward", "advantage", "correct", "answer",
           "finish", "prompt", "response"]  # fmt: skip


class Tracker:
    """An open tracker. What fails in it is one warning, after which it gets nothing more: it never ends a run."""

    def __init__(self, run, name, again):
        """again: go on in the tracker's run that out_dir/track.json names. ValueError: it cannot be opened."""
        self.print, self.name, self.lines, self.sft, self.ok = run.print, name, 0, 0, True
        out = Path(os.path.abspath(run.out))
        path = out / "track.json"
        try:
            ids = (read_json(path) if again else None) or {}
            lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            known, config = ids.get(name, ""), read_json(out / "stages.json")
            ids[name], self.have, self.put, self.finish = OPEN[name](out, known, config, lines if known else [])
            replace_file(path, json.dumps(ids))
        except Exception as e:  # errors of four libraries
            hint = f" ({path} names its run; without this file a new one begins)" if again else ""
            raise ValueError(f"track: {name}: {reason(e)}{hint}") from e
        for line in lines:
            self.log(line)

    def log(self, line, rows=()):
        """Pass on a line of metrics.jsonl, unless it is there. rows: what samples.jsonl got at this step."""
        self.lines += 1
        self.sft += "sft/step" in line
        if self.lines <= self.have:
            return
        numbers = {k: v for k, v in line.items() if isinstance(v, int | float)}
        groups = sorted({r["group"] for r in rows})[:GROUPS] if line["step"] % EVERY == 1 else []
        rows = [[r[c] for c in COLUMNS] for r in rows if r["group"] in groups]
        cells = [[x[:CHARS] if isinstance(x, str) else x for x in row] for row in rows]
        self.attempt(self.put, self.lines, line["step"] + self.sft, numbers, cells)

    def close(self):
        """Let it end its run properly, with all lines delivered."""
        self.attempt(self.finish)

    def attempt(self, do, *args):
        """do(*args), as long as nothing has failed."""
        try:
            if self.ok:
                do(*args)
        except Exception as e:  # network, disk, whatever the library makes of it
            self.ok = False
            self.print(f"WARNING: track: {self.name}: {reason(e)}. It gets nothing more until the next start")


def reason(e):
    """An exception in one line."""
    return " ".join(str(e).split())[:200] or type(e).__name__


def require(name):
    """ValueError: the package of a tracker is not there. A folder of its name, such as wandb/, is no package."""
    if name and getattr(importlib.util.find_spec(name), "origin", None) is None:
        raise ValueError(f"track: {name} is not installed: pip install {name}")


# ------------------------------------------------------------------------------------------------------- the trackers
# Each takes the run's folder, the id of the tracker's run or "" for a new one, the config, and the lines of
# metrics.jsonl that it should have. It gives back its id, how many lines it has, put(number of the line, step, numbers,
# cells) and finish(). Whatever its library raises goes through.
def open_wandb(out, known, config, lines):
    """wandb: one log call a line. Offline it cannot say what it has."""
    import wandb

    project = os.environ.get("WANDB_PROJECT", "nanocure")
    run = wandb.init(id=known or uuid.uuid4().hex, resume="allow", project=project, name=out.name, config=config,
                     dir=out)  # fmt: skip
    # wandb's own step is the line's number: a line is sent at once and whole, not when a larger step comes
    run.define_metric("*", step_metric="track/step")

    def put(number, step, numbers, cells):
        table = {"samples": wandb.Table(COLUMNS, cells)} if cells else {}
        run.log(numbers | {"track/step": step} | table, step=number - 1, commit=True)

    return run.id, len(lines) if run.offline else run.step, put, run.finish


def open_trackio(out, known, config, lines):
    """trackio: a run is known by its name. It counts the lines that it has."""
    import trackio

    project = os.environ.get("TRACKIO_PROJECT", "nanocure")
    name = known or f"{out.name}-{uuid.uuid4().hex[:6]}"
    have = len(trackio.SQLiteStorage.get_logs(project, name))
    run = trackio.init(project, name, resume="allow", config=config)

    def put(number, step, numbers, cells):
        table = {"samples": trackio.Table(COLUMNS, cells)} if cells else {}
        run.log({k: v for k, v in numbers.items() if k != "step"} | table, step=step)  # it has a `step` of its own

    return name, have, put, trackio.finish


def open_tensorboard(out, known, config, lines):
    """TensorBoard: a file a start. What came after the checkpoint is purged, and written again."""
    from torch.utils.tensorboard import SummaryWriter

    if not known:
        shutil.rmtree(out / "tensorboard", ignore_errors=True)
    last = lines[-1]["step"] + sum("sft/step" in line for line in lines) if lines else -1
    writer = SummaryWriter(out / "tensorboard", purge_step=last + 1)

    if not known:  # indented text is code in Markdown, shown as it is
        writer.add_text("config", textwrap.indent(json.dumps(config, indent=1), "    "), 0)

    def put(number, step, numbers, cells):
        for key, value in numbers.items():
            writer.add_scalar(key, value, step)
        rows = [json.dumps(dict(zip(COLUMNS, row)), ensure_ascii=False) for row in cells]
        if rows:
            writer.add_text("samples", textwrap.indent("\n".join(rows), "    "), step)
        writer.flush()

    return "tensorboard", len(lines), put, writer.close


def open_mlflow(out, known, config, lines):
    """MLflow: it keeps the number of lines that it has as a metric of its own, track/lines."""
    import mlflow

    def named(numbers):  # it has no @ in names, and little else besides letters
        return {re.sub(r"[^\w/. :-]", "_", k.replace("@", "_at_")): v for k, v in numbers.items()}

    mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "nanocure"))
    run = mlflow.start_run(run_id=known or None, run_name=None if known else out.name)
    if not known:
        mlflow.log_dict(config, "stages.json")
        mlflow.log_params(named({f"{stage}.{key}": v for stage, cfg in config.items() for key, v in cfg.items()}))

    def put(number, step, numbers, cells):
        if cells:
            mlflow.log_table(dict(zip(COLUMNS, zip(*cells))), f"samples/{step:06d}.json")
        mlflow.log_metrics(named(numbers) | {"track/lines": number}, step=step)

    return run.info.run_id, int(run.data.metrics.get("track/lines", 0)), put, mlflow.end_run


OPEN = {f.__name__.removeprefix("open_"): f for f in (open_wandb, open_trackio, open_tensorboard, open_mlflow)}
