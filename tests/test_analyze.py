"""tools.analyze on small metrics files written here: what it reads, the numbers in its tables, its pictures."""
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from tools import analyze, common

ROOT = Path(analyze.__file__).parents[1]


def train_line(step, stage="stage1", **more):
    return {"step": step, "stage": stage, "opt_step": 4 * step, "tokens/generated": 1000 * step,
            "actor/entropy": .2 - .01 * step, "critic/score/mean": .1 * step, "train/accuracy": .4 + .05 * step,
            "train/kept_groups": 16, "train/sampled_groups": 20, "train/rounds": 2, "response_length/mean": 38,
            "response_length/clip_ratio": .01, "actor/pg_clipfrac": .002, "actor/pg_clipfrac_lower": 0,
            "actor/grad_norm": .5, "mismatch/mean_abs": 1e-7, "mismatch/max_abs": 1e-5, "timing_s/gen_base": .3,
            "timing_s/update_actor": .4, "timing_s/other": .1, **more}


def branch_metrics(step):
    return {"branch/accuracy_base_sampled": .4 + .04 * step, "branch/accuracy_branch_sampled": .4 + .06 * step,
            "branch/depth_sampled": 9, "branch/entropy_at_t_star_sampled": .8, "branch/flip_rate_sampled": .3,
            "entropy/branch_kept": .1, "entropy/all_kept": .15, "timing_s/entropy": .05, "timing_s/gen_branch": .1,
            "timing_s/old_log_prob": .1, "timing_s/sync": .01}


def eval_line(step, stage="stage1", **more):
    return {"step": step, "stage": stage, "opt_step": 4 * step, "tokens/generated": 1000 * step, "eval/avg@16": .4,
            "eval/pass@1": .4, "eval/pass@16": .9, "eval/entropy": .19, "eval/entropy_operands": .36,
            "eval/entropy_results": .07, "eval/distinct": .97, "eval/length": 38.25, "eval/truncated": .01, **more}


def write_run(folder, lines, tail=""):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    return folder


def two_stages(folder):
    """An sft stage, then CURE's two: six steps with branches and four without; an evaluation every two steps."""
    lines = [{"sft/step": 1, "sft/loss": 3.1}, {"sft/step": 2, "sft/loss": 2.9}, eval_line(0)]
    for step in range(1, 11):
        stage = "stage1" if step <= 6 else "stage2"
        lines.append(train_line(step, stage, **(branch_metrics(step) if stage == "stage1" else {})))
        if step % 2 == 0:
            lines.append(eval_line(step, stage, **{"eval/avg@16": .4 + .05 * step}))
    return write_run(folder, lines)


def assert_picture(path, width=1000):
    from matplotlib.image import imread
    pixels = imread(path)
    assert pixels.shape[1] == width, pixels.shape
    ink = (pixels[..., :3].min(-1) < .9).mean()
    assert .01 < ink < .6, f"{path} is blank or solid: {ink:.4f} of it is not white"
    assert len(np.unique(pixels)) > 20
    return pixels.shape[0]


def run_tool(name, *arguments):
    return subprocess.run([sys.executable, "-m", f"tools.{name}", *map(str, arguments)], cwd=ROOT, capture_output=True,
                          text=True, timeout=120)


# ---- reading ---------------------------------------------------------------------------------------------------------

def test_lines_are_told_apart_and_sft_is_left_out(tmp_path):
    train, evals = analyze.read_run(two_stages(tmp_path / "toy"))
    assert [line["step"] for line in train] == list(range(1, 11))
    assert [line["step"] for line in evals] == [0, 2, 4, 6, 8, 10]
    assert analyze.stage_spans((train, evals)) == [["stage1", 0, 6], ["stage2", 6, 10]]


def test_a_step_without_a_kept_group_is_a_training_line(tmp_path):
    starved = {"step": 1, "stage": "stage1", "train/kept_groups": 0, "timing_s/eval": 1.0}
    assert analyze.read_run(write_run(tmp_path / "toy", [starved])) == ([starved], [])


def test_torn_last_line_is_named_and_the_rest_is_read(tmp_path, capsys):
    run = write_run(tmp_path / "toy", [train_line(1), train_line(2)], tail='{"step": 3, "stage": "sta')
    assert [line["step"] for line in analyze.read_run(run)[0]] == [1, 2]
    analyze.read_run(run)
    message = capsys.readouterr().err
    assert "line 3 is torn" in message and message.count("\n") == 1, "said once, however often the file is read"


def test_lines_after_the_checkpoint_a_run_resumed_from_are_void(tmp_path):
    first = [eval_line(0), train_line(1), train_line(2), eval_line(2), train_line(3), train_line(4), eval_line(4)]
    again = [train_line(3, **{"train/accuracy": .99})]
    train, evals = analyze.read_run(write_run(tmp_path / "toy", first + again))
    assert [line["step"] for line in train] == [1, 2, 3] and train[-1]["train/accuracy"] == .99
    assert [line["step"] for line in evals] == [0, 2]


@pytest.mark.parametrize("evaluation_first", [False, True])
def test_the_order_of_a_steps_two_lines_does_not_matter(tmp_path, evaluation_first):
    pairs = [[eval_line(step), train_line(step)] for step in (1, 2)]
    lines = [line for pair in pairs for line in (pair if evaluation_first else pair[::-1])]
    train, evals = analyze.read_run(write_run(tmp_path / "toy", lines))
    assert len(train) == len(evals) == 2


def test_both_evaluations_at_a_stage_border_are_kept(tmp_path):
    lines = [eval_line(0), train_line(1), eval_line(1, "stage1"), eval_line(1, "stage2"), train_line(2, "stage2")]
    evals = analyze.read_run(write_run(tmp_path / "toy", lines))[1]
    assert [line["stage"] for line in evals] == ["stage1", "stage1", "stage2"]


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such run folder"):
        analyze.read_run(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no metrics.jsonl"):
        analyze.curves(tmp_path)
    run = write_run(tmp_path / "empty", [{"sft/step": 1, "sft/loss": 3.0}])
    with pytest.raises(ValueError, match="no training step and no evaluation"):
        analyze.curves(run)
    with pytest.raises(ValueError, match="no training step and no evaluation"):
        analyze.compare([run])
    assert [path.name for path in run.iterdir()] == ["metrics.jsonl"], "nothing is written on an error"


# ---- tables ----------------------------------------------------------------------------------------------------------

def test_summary_table_has_the_base_and_each_stage_end(tmp_path):
    lines = [eval_line(0), train_line(1), eval_line(1), train_line(60), train_line(61, "stage2"),
             eval_line(60, **{"eval/avg@16": .8424, "eval/pass@16": .9876, "eval/entropy": .0984}),
             eval_line(100, "stage2", **{"eval/avg@16": .912, "tokens/generated": 851_600, "eval/truncated": None})]
    table = analyze.summary_table(write_run(tmp_path / "toy", lines)).split("\n")
    assert [line.split() for line in table] == [
        ["held-out", "step", "avg@16", "pass@16", "entropy", "distinct", "length", "truncated", "generated", "tokens"],
        ["base", "0", "0.400", "0.900", "0.190", "0.970", "38.2", "0.010", "0k"],
        ["after", "stage1", "60", "0.842", "0.988", "0.098", "0.970", "38.2", "0.010", "60k"],
        ["after", "stage2", "100", "0.912", "0.900", "0.190", "0.970", "38.2", "-", "852k"]]
    assert len({len(line) for line in table}) == 1, "columns are aligned"


def test_summary_table_without_evaluations_says_so(tmp_path):
    assert "no evaluation" in analyze.summary_table(write_run(tmp_path / "toy", [train_line(1)]))


def test_ledger_adds_up_the_phases_of_training_evaluation_and_the_last_checkpoint(tmp_path):
    lines = [{"step": 0, "eval/avg@2": .5, "timing_s/eval": 3.0}]
    for step, seconds in ((1, {"gen_base": 1.0}), (2, {"gen_base": 2.0, "save": 1.0})):
        seconds |= {"update_actor": 4.0, "other": .5}
        lines.append({"step": step, "actor/entropy": .1, "perf/mfu": .15 + step / 10})
        lines[-1] |= {f"timing_s/{k}": v for k, v in seconds.items()}
    text = analyze.ledger(write_run(tmp_path / "toy", lines), {"timing_s/save": 4.0})
    rows = {row.split()[0]: row.split()[1:] for row in text.splitlines()[1:-1]}
    assert rows["gen_base"] == ["3.0", "1.500", "15.0%"] and rows["update_actor"] == ["8.0", "4.000", "40.0%"]
    assert rows["save"] == ["5.0", "2.500", "25.0%"] and rows["eval"][0] == "3.0"
    assert rows["all"] == ["20.0", "10.000", "100.0%"]
    assert list(rows) == ["gen_base", "update_actor", "eval", "save", "other", "all"]
    assert "MFU 30.0%" in text.splitlines()[-1] and "median of 2 steps" in text
    assert "no training step" in analyze.ledger(write_run(tmp_path / "sft", [{"sft/step": 1, "sft/loss": 3.0}]))


def test_ledger_lists_a_phase_that_nobody_told_it_of(tmp_path):
    """timing_s/step is the total of the step: no phase, and counted once."""
    line = train_line(1, **{"timing_s/reward_model": 2.0, "timing_s/step": 2.8})
    run = write_run(tmp_path / "toy", [line, eval_line(1, **{"timing_s/plot": .2})])
    rows = {row.split()[0]: row.split()[1:] for row in analyze.ledger(run).splitlines()[1:-1]}
    assert list(rows) == ["gen_base", "update_actor", "other", "reward_model", "plot", "all"], "known ones first"
    assert rows["reward_model"] == ["2.0", "2.000", "66.7%"] and rows["all"] == ["3.0", "3.000", "100.0%"]
    assert sum(float(share.rstrip("%")) for *_, share in rows.values()) == pytest.approx(200, abs=.2)


def test_compare_table_is_mean_and_half_range_at_the_last_common_step(tmp_path, capsys):
    def seed(accuracy, entropy, tokens):
        return [eval_line(0), eval_line(10, **{"eval/avg@16": accuracy, "eval/entropy": entropy,
                                               "tokens/generated": tokens})]
    runs = [write_run(tmp_path / "cure-s1", seed(.80, .10, 90_000)),
            write_run(tmp_path / "cure-s2", seed(.86, .07, 95_000)),
            write_run(tmp_path / "cure-s3", seed(.83, .07, 94_000) + [eval_line(20, **{"eval/avg@16": .99})]),
            write_run(tmp_path / "dapo", [train_line(7)])]
    table = analyze.compare_table(analyze.group_arms(runs)).split("\n")
    assert [line.split() for line in table[:3]] == [
        "arm seeds step optimizer steps generated tokens avg@16 pass@16 entropy distinct".split(),
        "cure 3 10 40 ± 0 93k ± 2k 0.830 ± 0.030 0.900 ± 0.000 0.080 ± 0.015 0.970 ± 0.000".split(),
        "dapo 1 7 28 7k - - - -".split()], "one seed has no spread, a run without evaluations no result"
    assert "half the range" in table[3]
    assert "the seeds of cure end at different steps, all are taken at step 10" in capsys.readouterr().err


# ---- pictures --------------------------------------------------------------------------------------------------------

def test_curves_of_two_stages(tmp_path):
    run = two_stages(tmp_path / "toy")
    curves, headline = analyze.curves(run)
    assert (curves, headline) == (run / "plots" / "curves.png", run / "plots" / "headline.png")
    assert assert_picture(curves) == 5 * 270, "fifteen panels, three a row"
    assert assert_picture(headline) == 400


def test_what_was_not_logged_leaves_no_empty_panel(tmp_path):
    one_stage = [train_line(step) for step in range(1, 6)]
    curves, _ = analyze.curves(write_run(tmp_path / "no-evaluations", one_stage))
    assert assert_picture(curves) == 4 * 270, "eleven panels: no held-out accuracy, forks, distinct, flip rate"
    curves, headline = analyze.curves(write_run(tmp_path / "evaluations-only", [eval_line(0), eval_line(5)]))
    assert assert_picture(curves) == 2 * 270, "accuracy, entropy, forks, distinct, length, truncated"
    assert_picture(headline)


@pytest.mark.parametrize("gaps", [[0, 0, 0], [0, 1e-7, 2e-7], [math.nan, None, math.inf]])
def test_curves_survive_zeros_and_missing_numbers(tmp_path, gaps):
    lines = [train_line(i, **{"mismatch/mean_abs": gap, "mismatch/max_abs": gap}) for i, gap in enumerate(gaps, 1)]
    assert_picture(analyze.curves(write_run(tmp_path / "toy", lines))[0])


def test_stage_borders_and_names_are_drawn(tmp_path):
    run = analyze.read_run(two_stages(tmp_path / "toy"))
    with common.picture(tmp_path / "panel.png", 4) as figure:
        analyze.draw_panels(figure, (1, 1), analyze.PANELS[:1], run)
    ax, = figure.axes
    assert [text.get_text() for text in ax.texts] == ["stage1", "stage2"]
    assert [text.get_position()[0] for text in ax.texts] == [3, 8]
    assert [list(line.get_xdata()) for line in ax.lines if line.get_label().startswith("_")] == [[6, 6]]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["avg@16", "pass@16"]
    assert ax.get_xlabel() == "training step" and ax.get_ylabel() == "share"


def test_phases_add_up_to_the_seconds_logged(tmp_path):
    run = analyze.read_run(two_stages(tmp_path / "toy"))
    run[0][0]["timing_s/unknown"] = .07
    ax = Figure().add_subplot()
    analyze.draw_phases(ax, run[0])
    labels = [area.get_label() for area in ax.collections]
    assert labels == ["gen_base", "gen_branch", "old_log_prob", "update_actor", "other", "rest"]
    tops = ax.collections[-1].get_paths()[0].vertices
    assert tops[tops[:, 0] == 1][:, 1].max() == pytest.approx(.3 + .4 + .1 + .05 + .1 + .1 + .01 + .07)


def test_runs_are_grouped_into_arms_with_seeds(tmp_path):
    names = ["toy-s1", "toy-s02", "toy-seed3", "toy-dapo-s1", "gsm8k-s", "s1", "toy-s1x"]
    arms = analyze.group_arms([write_run(tmp_path / name, [train_line(1)]) for name in names])
    assert {arm: len(seeds) for arm, seeds in arms.items()} == {
        "toy": 3, "toy-dapo": 1, "gsm8k-s": 1, "s1": 1, "toy-s1x": 1}


def test_the_same_name_in_two_folders_is_two_arms(tmp_path):
    runs = [write_run(tmp_path / name, [train_line(1)]) for name in ("old/toy-s1", "new/toy-s1", "new/toy-s2")]
    assert list(analyze.group_arms(runs)) == ["old/toy", "new/toy"]
    with pytest.raises(ValueError, match="given twice"):
        analyze.group_arms([runs[0], runs[0]])


def test_over_seeds_keeps_the_steps_all_seeds_have():
    seeds = [([], [eval_line(0), eval_line(5, **{"eval/avg@16": .6}), eval_line(10)]),
             ([], [eval_line(0), eval_line(5, **{"eval/avg@16": .7, "tokens/generated": 6000})])]
    steps, values = analyze.over_seeds(seeds, "eval/avg@", "tokens/generated")
    assert steps == [0, 5]
    assert values.tolist() == [[[0, .4], [5000, .6]], [[0, .4], [6000, .7]]]


def test_fourteen_arms_differ_in_more_than_colour():
    ax = Figure().add_subplot()
    for i in range(14):
        analyze.draw_arm(ax, i, str(i), [([train_line(1), train_line(2)], [])], "actor/entropy", "step")
    looks = [(line.get_color(), str(line._unscaled_dash_pattern)) for line in ax.lines]
    assert len(set(looks)) == 14
    assert len({style for _, style in looks[:7]}) == 7 and len({colour for colour, _ in looks[:7]}) == 7


def test_compare_writes_where_it_is_told(tmp_path, capsys):
    runs = [two_stages(tmp_path / "runs" / name) for name in ("toy-s1", "toy-s2", "toy-dapo")]
    assert analyze.compare(runs) == tmp_path / "runs" / "compare.png"
    assert analyze.compare(runs[:1], tmp_path / "here") == tmp_path / "here" / "compare.png"
    assert analyze.compare(runs[:1], tmp_path / "docs" / "toy.png") == tmp_path / "docs" / "toy.png"
    for path in (tmp_path / "runs" / "compare.png", tmp_path / "here" / "compare.png", tmp_path / "docs" / "toy.png"):
        assert_picture(path)
    assert capsys.readouterr().out.count("\ntoy ") == 3


# ---- the command line ------------------------------------------------------------------------------------------------

def test_curves_from_the_command_line_do_the_rest(tmp_path):
    run = two_stages(tmp_path / "toy")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 11, "st')
    done = run_tool("analyze", "curves", run)
    assert done.returncode == 0 and done.stderr.count("\n") == 1 and "is torn" in done.stderr
    assert str(run / "plots" / "headline.png") in done.stdout and "after stage2" in done.stdout
    done = run_tool("analyze", "curves", tmp_path / "nowhere", run)
    assert done.returncode == 2 and "after stage2" in done.stdout
    assert done.stderr.split("\n")[0] == f"error: {tmp_path / 'nowhere'}: no such run folder"


def test_compare_from_the_command_line(tmp_path):
    run = two_stages(tmp_path / "toy-s1")
    done = run_tool("analyze", "compare", run, tmp_path, "--out", tmp_path / "c.png")
    message = f"error: {tmp_path} is no run, or an incomplete one: it has no metrics.jsonl\n"
    assert done.returncode == 2 and done.stderr == message
    assert done.stdout.rstrip().endswith(str(tmp_path / "c.png")) and (tmp_path / "c.png").is_file()
    done = run_tool("analyze", "compare", run, run)
    assert (done.returncode, done.stdout.strip()) == (2, "") and done.stderr.count("\n") == 1 and "twice" in done.stderr
    assert run_tool("analyze", "compare", tmp_path).returncode == 2
    done = run_tool("analyze", "guess", run)
    assert done.returncode == 2 and done.stderr.startswith("usage: python -m tools.analyze")


def test_looking_at_files_imports_no_torch():
    code = "import sys; from tools import analyze, branches, tree; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
