"""lib/track.py and lib/card.py: what a tracker gets of a run's lines, also after kill -9, and the model card.

CI has tensorboard alone. The other three are tested where they are installed."""
import importlib.util
import json
import os
import re
import struct
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import lines, numbers

import cure
from lib import card, track
from lib.config import Config


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Drawing takes longer than these runs."""
    monkeypatch.setattr("tools.analyze.curves", lambda out: [])


def stand_in(calls, have=None, fail_at=None):
    """A tracker that keeps what it gets in `calls`. It has `have` lines from before, or cannot say, and fails at a line."""

    def put(number, step, numbers, cells):
        if number == fail_at:
            raise OSError("no\nnetwork")
        calls.append((number, step, numbers, cells))

    def open_it(out, known, config, lines):
        calls.append(("open", known, sorted(config), len(lines)))
        return known or "run-1", len(lines) if have is None else have, put, lambda: calls.append("closed")

    return open_it


@pytest.fixture
def folder(tmp_path):
    """A run folder with three lines: sft, its evaluation, a training step."""
    file = [{"step": 0, "stage": "cold", "sft/step": 1, "sft/loss": 0.5}, {"step": 0, "stage": "cold", "eval/avg@4": 0.25},
            {"step": 1, "stage": "rl", "actor/lr": 1e-6, "eval/right": [1, 2], "actor/x": None}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in file))
    (tmp_path / "stages.json").write_text('{"cold": {}, "rl": {}}')
    return SimpleNamespace(out=str(tmp_path), print=print)


# ------------------------------------------------------------------------------------------------------- what it gets
def test_lines_of_before_come_first_in_steps_that_never_fall_and_only_numbers(folder, monkeypatch):
    calls = []
    monkeypatch.setitem(track.OPEN, "wandb", stand_in(calls))
    track.Tracker(folder, "wandb", again=False).log({"step": 1, "eval/avg@4": 0.5})
    assert calls[0] == ("open", "", ["cold", "rl"], 0), "a new run should have none of the file's lines"
    assert calls[1:] == [(1, 1, {"step": 0, "sft/step": 1, "sft/loss": 0.5}, []), (2, 1, {"step": 0, "eval/avg@4": 0.25}, []),
                         (3, 2, {"step": 1, "actor/lr": 1e-6}, []), (4, 2, {"step": 1, "eval/avg@4": 0.5}, [])]  # fmt: skip


@pytest.mark.parametrize("have, passed_on", [(2, [3, 4, 5]), (3, [4, 5]), (4, [5]), (0, [1, 2, 3, 4, 5]), (None, [4, 5])])
def test_a_run_that_goes_on_passes_on_what_the_tracker_lacks_and_nothing_twice(folder, monkeypatch, have, passed_on):
    """have: its lines. None: it cannot say (tensorboard, wandb offline), and those of the file count as there."""
    calls = []
    monkeypatch.setitem(track.OPEN, "wandb", stand_in([]))
    track.Tracker(folder, "wandb", again=False)
    monkeypatch.setitem(track.OPEN, "wandb", stand_in(calls, have))
    tracker = track.Tracker(folder, "wandb", again=True)
    for step in (2, 3):
        tracker.log({"step": step})
    assert calls[0][:2] == ("open", "run-1") and [c[0] for c in calls[1:]] == passed_on
    monkeypatch.setitem(track.OPEN, "wandb", stand_in(calls := []))
    track.Tracker(folder, "wandb", again=False)
    assert calls[0][1] == "" and [c[0] for c in calls[1:]] == [1, 2, 3], "a new run gets all of the file"


def test_tables_are_few_and_bounded(folder, monkeypatch):
    calls = []
    monkeypatch.setitem(track.OPEN, "wandb", stand_in(calls, have=3))
    tracker = track.Tracker(folder, "wandb", again=True)
    row = dict.fromkeys(track.COLUMNS) | {"response": "x" * 10_000, "prompt": "<b>", "correct": True}
    rows = [row | {"group": g, "tokens": ["x"] * 10_000} for g in (4, 4, 7, 9) for _ in range(2)]
    for step in range(1, 31):
        tracker.log({"step": step}, rows)
        tracker.log({"step": step, "eval/avg@4": 0.5})
    shown = {step: cells for _, step, _, cells in calls[1:] if cells}
    assert [step - 1 for step in shown] == [1, 11, 21], "less the step of sft"
    for cells in shown.values():
        assert [dict(zip(track.COLUMNS, c))["group"] for c in cells] == [4, 4, 4, 4, 7, 7]
        assert len(json.dumps(cells)) < 6 * (track.CHARS + 200) and cells[0][-2:] == ["<b>", "x" * track.CHARS]


def test_a_tracker_that_fails_is_one_warning_and_does_not_end_the_run(whole, config, tmp_path, monkeypatch, capsys):
    """Under the name of an installed package. The run's own numbers are those without a tracker, bit for bit."""
    calls = []
    monkeypatch.setitem(track.OPEN, "json", stand_in(calls, fail_at=4))
    assert cure.main(["--config", config, f"out_dir={tmp_path}", "samples_per_step=0", "track=json"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("WARNING: track: json: no network. It gets nothing more until the next start") == 1
    assert [c[0] for c in calls] == ["open", 1, 2, 3] and "closed" not in calls
    assert numbers(tmp_path) == numbers(whole)
    assert (tmp_path / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()


def test_it_is_closed_once_at_the_end_and_goes_on_with_the_same_command_only(config, tmp_path, monkeypatch):
    def start(*more):
        calls = []
        monkeypatch.setitem(track.OPEN, "json", stand_in(calls))
        assert cure.main(["--config", config, f"out_dir={tmp_path}", "save_every=1", "keep_ckpts=9", *more]) == 0
        assert calls.count("closed") == ("track=json" in more) and calls[-1:] in ([], ["closed"])
        return calls[:-1]

    assert [c[1] for c in start("max_steps=1", "track=json")] == ["", 0, 1]
    assert start("max_steps=2") == [], "a resumed run may leave it out, or take it up"
    assert [c[:2] for c in start("max_steps=3", "track=json")] == [("open", "run-1"), (4, 3), (5, 3)]
    older = [c[:2] for c in start("max_steps=2", "track=json", f"resume={tmp_path}/ckpt/step_000001")]
    assert older == [("open", ""), (1, 0), (2, 1), (3, 2)], "with whatever config: a new run of the tracker"


@pytest.mark.parametrize("name", ["wandb", "trackio", "tensorboard", "mlflow", "wandbb"])
def test_an_unknown_or_missing_tracker_is_one_line_and_nothing_is_written(name, config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin=None))  # a folder wandb/ and no more
    with pytest.raises(SystemExit) as e:
        cure.main(["--config", config, f"out_dir={tmp_path}/run", f"track={name}"])
    says = f"{name} is not installed: pip install {name}" if name != "wandbb" else (
        "must be one of wandb, trackio, tensorboard, mlflow, got 'wandbb'")
    assert e.value.code == 2 and capsys.readouterr().err == f"error: track: {says}\n" and not (tmp_path / "run").exists()


def test_a_tracker_that_does_not_open_is_one_line(folder, monkeypatch):
    def open_it(*args):
        raise RuntimeError("no key\nand a long explanation")

    monkeypatch.setitem(track.OPEN, "wandb", open_it)
    with pytest.raises(ValueError, match="^track: wandb: no key and a long explanation$"):
        track.Tracker(folder, "wandb", again=False)


@pytest.mark.parametrize("damaged", ["", "[1]", '{"wandb": '])
def test_a_damaged_track_json_is_named(damaged, folder, monkeypatch):
    monkeypatch.setitem(track.OPEN, "wandb", stand_in([]))
    (Path(folder.out) / "track.json").write_text(damaged)
    with pytest.raises(ValueError, match=r"^track: wandb: .*/track\.json names its run; without this file a new one begins"):
        track.Tracker(folder, "wandb", again=True)
    track.Tracker(folder, "wandb", again=False)


# -------------------------------------------------------------------------------------------------- the real packages
def in_tensorboard(out):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    a = EventAccumulator(f"{out}/tensorboard", size_guidance={"scalars": 0, "tensors": 0})
    a.Reload()
    texts = [e.tensor_proto.string_val[0].decode() for e in a.Tensors("samples/text_summary")]
    assert all(line.startswith("    {") for text in texts for line in text.splitlines()), "Markdown code, whatever it is"
    return [(e.step, tag, e.value) for tag in a.Tags()["scalars"] for e in a.Scalars(tag)], len(texts)


def in_mlflow(out):
    import mlflow
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("nanocure").experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["stage1.n1"] == "2"
    names = {k: re.sub(r"_at_(\d)", r"@\1", k) for k in run.data.metrics if k != "track/lines"}
    found = [(m.step, names[k], m.value) for k in names for m in client.get_metric_history(run.info.run_id, k)]
    return found, len(client.list_artifacts(run.info.run_id, "samples"))


def in_trackio(out):
    import trackio
    (name,) = trackio.SQLiteStorage.get_runs("nanocure")
    logs, found, tables = trackio.SQLiteStorage.get_logs("nanocure", name if isinstance(name, str) else name["name"]), [], 0
    for log in logs:
        found += [(log["step"], k, v) for k, v in log.items() if isinstance(v, int | float)]
        tables += any(isinstance(v, dict) for v in log.values())
    return found, tables


def in_wandb(out):
    """Its offline files: a header of 7 bytes, then protobuf records in LevelDB's log format, in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record
    found, tables = [], 0
    for file in sorted(Path(out).glob("wandb/offline-run-*/*.wandb")):
        data, at, record = file.read_bytes(), 7, b""
        while at + 7 <= len(data):
            _, size, kind = struct.unpack("<IHB", data[at : at + 7])
            if not kind:                                 # the end of a block
                at += 32768 - at % 32768
                continue
            record = data[at + 7 : at + 7 + size] if kind in (1, 2) else record + data[at + 7 : at + 7 + size]
            at += 7 + size
            at += 32768 - at % 32768 if 32768 - at % 32768 < 7 else 0
            if kind in (1, 4):
                items = Record.FromString(record).history.item
                row = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}
                tables += "samples/nrows" in row
                found += [(row["track/step"], k, v) for k, v in row.items() if isinstance(v, int | float)
                          and not k.startswith(("_", "track/", "samples/"))]  # fmt: skip
    return found, tables


@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "trackio", "wandb"])
def test_a_resumed_run_is_in_the_real_tracker_value_by_value(name, config, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", f"{tmp_path}/store")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/store.db")
    monkeypatch.chdir(tmp_path)                          # where mlflow puts its artifacts
    pytest.importorskip(name)
    for steps in (2, 6):
        assert cure.main(["--config", config, f"out_dir={tmp_path}/run", f"track={name}", f"max_steps={steps}"]) == 0
    found, tables = globals()[f"in_{name}"](f"{tmp_path}/run")
    exact = np.float32 if name == "tensorboard" else float
    want = [(line["step"], k, float(exact(v))) for line in lines(f"{tmp_path}/run/metrics.jsonl") for k, v in line.items()
            if isinstance(v, int | float)]
    print(f"{name}: {len(found)} values, {tables} table")
    assert sorted(found) == sorted(want) and tables == 1


@pytest.mark.parametrize("name", ["mlflow", "trackio"])
def test_a_tracker_that_failed_from_the_start_gets_all_lines_at_the_next(name, folder, tmp_path, monkeypatch):
    """It says that it has none, which is not that it cannot say. Names that MLflow refuses fail neither."""
    pytest.importorskip(name)
    monkeypatch.setenv("TRACKIO_DIR", f"{tmp_path}/store")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/store.db")
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "metrics.jsonl"
    text, _ = file.read_text(), file.write_text("")
    (tmp_path / "stages.json").write_text(json.dumps({"a+b": {"system_prompt": "x" * 10_000, "method_args": {"a": {"b": None}}}}))
    track.Tracker(folder, name, again=False).close()     # opened, and then no line came through
    file.write_text(text)
    tracker = track.Tracker(folder, name, again=True)
    tracker.log({"step": 2, "actor/share>0, é": 0.25})
    assert tracker.have == 0 and tracker.lines == 4 and tracker.ok
    tracker.close()
    again = track.Tracker(folder, name, again=True)
    again.close()
    assert again.have == 4


@pytest.mark.slow
@pytest.mark.parametrize("kill_at", [110, 150])
def test_tensorboard_after_kill_9_shows_each_step_once_and_two_ranks_write_one_file(kill_at, config, run, tmp_path):
    pytest.importorskip("tensorboard")
    argv = ["--config", config, f"out_dir={tmp_path}", "track=tensorboard", "save_every=1"]
    killed = run(*argv, ranks=2, kill_at=kill_at)
    assert killed.codes[0] == -9
    before = len(lines(f"{tmp_path}/metrics.jsonl"))
    again = run(*argv, ranks=2)
    assert again.codes == [0, 0] and "resumed from step" in again.printed
    assert len(os.listdir(tmp_path / "tensorboard")) == 2, "one file a start"
    found, _ = in_tensorboard(tmp_path)
    steps = [m["step"] for m in lines(f"{tmp_path}/metrics.jsonl") if "actor/lr" in m]
    print(f"killed with {before} lines; {sorted(s for s, k, _ in found if k == 'actor/lr')}")
    assert sorted(s for s, k, _ in found if k == "actor/lr") == steps


# ------------------------------------------------------------------------------------------------------ the model card
def last_evaluation(out):
    return [m for m in lines(f"{out}/metrics.jsonl") if "eval/stderr" in m][-1]


def test_the_card_of_a_checkpoint_says_what_the_run_knows_and_its_folder_loads(whole):
    hub = pytest.importorskip("huggingface_hub")
    from transformers import AutoModelForCausalLM
    loaded = hub.ModelCard.load(whole / "ckpt/step_000006/hf/README.md")
    data = loaded.data.to_dict()
    assert data == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["nanocure", "reinforcement-learning"]}
    rows = dict(re.findall(r"^\| `(eval/\S+)` \| (\S+) \|$", loaded.text, re.M))
    m = last_evaluation(whole)
    assert rows == {k: f"{v:.6g}" for k, v in m.items() if k.startswith("eval/") and k != "eval/right"} and len(rows) > 8
    assert "After 6 steps of reinforcement learning, in stage `stage2`" in loaded.text
    assert "| `n1` | `2` | `8` |" in loaded.text and "| `weight_decay` | `0.0` | `0.3` |" in loaded.text
    assert "out_dir" not in loaded.text and "adapter" not in loaded.text
    assert "  hf/README.md\n" in (whole / "ckpt/step_000006/SHA256SUMS").read_text()
    subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=whole / "ckpt/step_000006", check=True)
    assert AutoModelForCausalLM.from_pretrained(whole / "ckpt/step_000006/hf").num_parameters()


def test_a_resumed_run_knows_its_last_evaluation(config, tmp_path):
    for steps in (4, 5):
        cure.main(["--config", config, f"out_dir={tmp_path}", f"max_steps={steps}"])
    text = (tmp_path / "ckpt/step_000005/hf/README.md").read_text()
    assert "After 3 steps of reinforcement learning, in stage `stage1`" in text
    assert "2 of the 3 steps of stage `stage2`, and 5 steps of reinforcement learning" in text
    assert f"| `eval/avg@4` | {last_evaluation(tmp_path)['eval/avg@4']:.6g} |" in text


def card_of(tmp_path, evaluation=None, **changes):
    """The card of a run of one stage with these settings."""
    hub = pytest.importorskip("huggingface_hub")
    cfg = Config(name=changes.pop("name", "only"), **changes)
    (tmp_path / "versions.json").write_text('{"torch": "2.13.0", "vllm": null}')
    state = {"step": 3, "stage_step": 3, "evaluation": evaluation}
    card.save_card(SimpleNamespace(state=state, stages=[(cfg.name, cfg)], out=str(tmp_path)), cfg, tmp_path)
    return hub.ModelCard.load(tmp_path / "README.md")


def test_hub_ids_are_named_and_folders_are_not(tmp_path, monkeypatch):
    found = card_of(tmp_path, model="Qwen/Qwen2.5-0.5B", data="openai/gsm8k:main:train", lora_rank=8, kind="sft")
    assert found.data.base_model == "Qwen/Qwen2.5-0.5B" and found.data.datasets == ["openai/gsm8k"]
    assert found.data.tags == ["nanocure", "sft", "lora"] and "The run knows of none." in found.text
    assert "LoRA's adapters are merged into these weights. `adapter/`" in found.text and "vllm" not in found.text
    (tmp_path / "runs/base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    found = card_of(tmp_path, model="runs/base", data="runs/base/train.jsonl")
    assert found.data.base_model is None and found.data.datasets is None and "adapter" not in found.text


def test_text_of_a_config_breaks_neither_yaml_nor_tables(tmp_path):
    nasty = "a | b `c` ``d``\n---\n| x |\n# <script>alert(1)</script>\r\n```\u2028end"
    evaluation = {"step": 2, "stage": nasty, "eval_data": "x|y", "eval_temperature": 1.0, "eval_top_p": 1.0, "eval/stderr": None,
                  "eval/avg@4": 0.5, "eval/words": "a fork's", "eval/list": [1]}
    found = card_of(tmp_path, evaluation, name=nasty, system_prompt=nasty, model=nasty, method=["a|b"], method_args={nasty: 1})
    assert found.data.tags == ["nanocure", "reinforcement-learning"] and found.data.base_model is None
    lines = found.text.splitlines()
    assert not [x for x in lines if re.match(r"\s*(---|# <|```)", x)] and re.findall("`(eval/.*?)`", found.text) == ["eval/avg@4"]
    for block in re.findall(r"(?:^\|.*\n?)+", found.text, re.M):
        cells = {len(re.findall(r"(?<!\\)\|", row)) for row in block.splitlines()}
        assert len(cells) == 1, "as many cells in each row"
    for line in lines:                                   # outside of code there is no mark-up of theirs
        assert "<" not in re.sub(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "", line), line


def test_what_a_stage_does_is_said_in_words():
    for method, says in (({}, "CURE, n1 4, n2 3"), ({"n1": 16, "n2": 0}, "DAPO, groups of 16"),
                         ({"n2": 0, "entropy_mask_rho": 0.2}, "DAPO, groups of 4, loss on 20% of the tokens"),
                         ({"kind": "sft"}, "supervised learning on the data's solutions"),
                         ({"method": ["dr_grpo"]}, "CURE, n1 4, n2 3, method `dr_grpo`")):
        assert card.method(vars(Config(**method))) == says
