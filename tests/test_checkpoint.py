"""checkpoint.py: whatever ends a run, it goes on from its last complete checkpoint as if nothing had happened."""
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, lines, numbers, train_lines
from safetensors.torch import load_file

import cure
from lib import checkpoint, files, ranks

STATE = "ckpt/step_000006/state"


def argv(config, out, *more):
    return ["--config", config, f"out_dir={out}", "samples_per_step=0", *more]


def same_as_whole(out, whole):
    """Metrics, samples, parameters and Adam's moments, bit for bit."""
    assert numbers(out) == numbers(whole)
    assert (out / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    names = sorted(os.listdir(whole / STATE))
    assert names == sorted(os.listdir(out / STATE))
    for name in names:
        a, b = load_file(whole / STATE / name), load_file(out / STATE / name)
        assert a.keys() == b.keys() and any(k.startswith("exp_avg_sq") for k in a)
        assert all(torch.equal(a[k], b[k]) for k in a)


def all_complete(out):
    """What `latest` names, after a check of every folder there is: checksums, weights that transformers reads."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    for d in out.glob("ckpt/step_*"):
        subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=d, check=True)
        assert AutoModelForCausalLM.from_pretrained(d / "hf").num_parameters()
        assert len(AutoTokenizer.from_pretrained(d / "hf"))
    return checkpoint.latest(out / "ckpt")


# -------------------------------------------------------------------------------------------------------- exact resume
@pytest.mark.parametrize("stop_at", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 5))])
def test_a_stopped_and_resumed_run_on_two_ranks_equals_the_whole_one(whole2, config, run, tmp_path, stop_at):
    assert run(*argv(config, tmp_path, f"max_steps={stop_at}"), ranks=2).codes == [0, 0]
    again = run(*argv(config, tmp_path), ranks=2)
    assert again.codes == [0, 0] and f"resumed from step {stop_at}" in again.printed
    same_as_whole(tmp_path, whole2)


def test_a_run_resumes_on_another_rank_count_with_the_same_tokens(whole, config, run, tmp_path):
    assert run(*argv(config, tmp_path, "max_steps=4"), ranks=2).codes == [0, 0]
    assert run(*argv(config, tmp_path), ranks=1).codes == [0]
    for m, w in zip(train_lines(tmp_path), train_lines(whole), strict=True):
        assert m["tokens/generated"] == w["tokens/generated"]
        # sums in another order, 1e-7, which Adam makes 2e-5 in three steps where the gradient is next to nothing
        assert m["actor/grad_norm"] == pytest.approx(w["actor/grad_norm"], rel=1e-4)


@pytest.mark.slow
def test_a_checkpoint_in_many_pieces_is_read_on_any_rank_count(whole, whole2, config, run, tmp_path):
    assert run(*argv(config, tmp_path / "2", "max_steps=4"), ranks=2, piece=200_000).codes == [0, 0]
    pieces = sorted((tmp_path / "2/ckpt/step_000004/state").iterdir())
    sizes = [p.stat().st_size for p in pieces]
    print(f"{len(pieces)} files of {min(sizes)} to {max(sizes)} bytes")
    assert len(pieces) >= 12 and max(sizes) < 300_000 and sum(sizes) > 12 * 200_000 - 200_000
    shutil.copytree(tmp_path / "2", tmp_path / "1")
    assert run(*argv(config, tmp_path / "2"), ranks=2).codes == [0, 0]
    same_as_whole(tmp_path / "2", whole2)
    assert run(*argv(config, tmp_path / "1"), ranks=1).codes == [0]
    for m, w in zip(train_lines(tmp_path / "1"), train_lines(whole), strict=True):
        assert m["tokens/generated"] == w["tokens/generated"]
        assert m["actor/grad_norm"] == pytest.approx(w["actor/grad_norm"], rel=1e-4)


def test_sigterm_to_all_ranks_ends_the_run_after_the_step_with_exit_0(whole2, config, run, tmp_path):
    out = run(*argv(config, tmp_path), ranks=2, signal_at=2)
    assert out.codes == [0, 0] and "stopped by a signal after step 2" in out.printed
    assert all_complete(tmp_path) == "step_000002"
    assert run(*argv(config, tmp_path), ranks=2).codes == [0, 0]
    same_as_whole(tmp_path, whole2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_torchrun_passes_a_signal_on_and_the_workers_save(config, tmp_path, name):
    """As from a scheduler, or Ctrl-C in a terminal: torchrun gets it, and hands it to its workers."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "cure.py"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "120"}
    p = subprocess.Popen([*command, *argv(config, tmp_path)], cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
    seen = []
    for line in p.stdout:
        seen.append(line)
        if "stage1 1/3" in line:
            p.send_signal(getattr(signal, name))
    p.wait(timeout=120)
    text = "".join(seen)
    step = int(re.search(r"stopped by a signal after step (\d)", text).group(1))
    assert all_complete(tmp_path) == f"step_{step:06d}" and len(train_lines(tmp_path)) == step
    assert "Traceback" not in text.split("stopped by a signal")[0] and p.returncode != 0, "torchrun reports the signal"


def test_noise_in_every_global_generator_changes_nothing(whole, config, tmp_path, monkeypatch):
    import numpy as np
    noise, describe = random.Random(0), cure.describe

    def disturb(*args):
        n = noise.randrange(2**31)
        random.seed(n), np.random.seed(n), torch.manual_seed(n)
        return describe(*args)

    monkeypatch.setattr(cure, "describe", disturb)
    monkeypatch.setattr("tools.analyze.curves", lambda out: [])
    cure.main(argv(config, tmp_path))
    same_as_whole(tmp_path, whole)


# ------------------------------------------------------------------------------------------------------------- kill -9
@pytest.fixture(scope="session")
def uninterrupted(config, run, tmp_path_factory):
    """(seconds, operations on files) of a run that saves every step."""
    out = run(*argv(config, tmp_path_factory.mktemp("saves"), "save_every=1"))
    assert out.codes == [0], out.printed
    return out.seconds, int(re.search(r"operations on the run's files: (\d+)", out.printed).group(1))


def kill_and_resume(moment, config, run, out, uninterrupted, whole):
    """Killed at a random moment: one in three by the clock, the others right before an operation on a file of it."""
    seconds, operations = uninterrupted
    rng = random.Random(moment)
    when = {"kill_after": rng.uniform(0, seconds)} if moment % 3 == 0 else {"kill_at": rng.randint(1, operations)}
    killed = run(*argv(config, out, "save_every=1"), **when)
    latest = all_complete(out)
    again = run(*argv(config, out, "save_every=1"))
    print(f"{when}: exit {killed.codes[0]}, latest {latest}")
    assert again.codes == [0], again.printed
    if latest:
        step = int(latest[-6:])
        assert f"resumed from step {step} " in again.printed or step == 6 and "finished already" in again.printed
    else:
        assert "resumed" not in again.printed
    same_as_whole(out, whole)
    assert all_complete(out) == "step_000006"
    assert sorted(os.listdir(out / "ckpt")) == ["latest", "step_000003", "step_000005", "step_000006"], "no leftovers"
    return killed.codes == [-9]                         # the clock may strike after the end


@pytest.mark.parametrize("moment", [2, 4, 5])
def test_kill_9_loses_nothing_before_the_last_checkpoint(moment, config, run, tmp_path, uninterrupted, whole):
    assert kill_and_resume(moment, config, run, tmp_path, uninterrupted, whole), "killed before it ended"


@pytest.mark.slow
def test_kill_9_at_thirty_random_moments(config, run, tmp_path, uninterrupted, whole):
    killed = sum(kill_and_resume(m, config, run, tmp_path / str(m), uninterrupted, whole) for m in range(3, 33))
    print(f"{killed} of 30 runs were killed before their end, all 30 went on to the same numbers")
    assert killed >= 25


def test_kill_9_of_one_rank_ends_the_other_and_the_run_goes_on(whole2, config, run, tmp_path):
    killed = run(*argv(config, tmp_path, "save_every=1"), ranks=2, kill_at=60)
    print(f"exit codes {killed.codes} after {killed.seconds:.1f} s")
    assert killed.codes[0] == -9 and killed.codes[1] != 0
    assert run(*argv(config, tmp_path, "save_every=1"), ranks=2).codes == [0, 0]
    same_as_whole(tmp_path, whole2)


# ----------------------------------------------------------------------------------------------------------- full disk
@pytest.mark.parametrize("ranks, limit", [
    (1, {"0": 3_000_000}), *(pytest.param(2, {k: 2_000_000}, marks=pytest.mark.slow) for k in "01"),
])  # fmt: skip
def test_a_save_that_cannot_be_written_ends_all_ranks_and_leaves_the_last_good_one(
        whole, whole2, config, run, tmp_path, ranks, limit):
    """RLIMIT_FSIZE on one rank: a write fails in the middle, as on a full disk."""
    assert run(*argv(config, tmp_path, "max_steps=2"), ranks=ranks).codes == [0] * ranks
    full = run(*argv(config, tmp_path, "max_steps=4"), ranks=ranks, limit=limit)
    says = re.findall(r"RuntimeError: (step 3: no checkpoint could be written in .*)", full.printed)
    print(f"{ranks} ranks, {full.seconds:.1f} s: {says[0]}")
    assert full.codes == [1] * ranks and len(says) == ranks, full.printed
    assert "It needs 0.00" in says[0] and "step_000002 is complete" in says[0]
    assert all_complete(tmp_path) == "step_000002"
    assert sorted(os.listdir(tmp_path / "ckpt")) == ["latest", "step_000002"], "nothing of the attempt is left"
    assert run(*argv(config, tmp_path), ranks=ranks).codes == [0] * ranks
    same_as_whole(tmp_path, whole if ranks == 1 else whole2)


def test_a_disk_without_room_is_refused_before_a_byte_is_written(config, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: SimpleNamespace(free=4_000_000))
    says = r"only 0.00373 GiB are free. It needs 0.00\d+ GiB. There is none to go on from"
    with pytest.raises(RuntimeError, match=says):
        cure.main(argv(config, tmp_path, "max_steps=1"))
    assert os.listdir(tmp_path / "ckpt") == [] and len(train_lines(tmp_path)) == 1
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_a_really_full_disk(config, tmp_path):
    """A tmpfs of 16 MiB with room for one checkpoint of 7 MB, not for two."""
    small = tmp_path / "small"
    small.mkdir()
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs -o size=16m tmpfs {small} && "
    if not shutil.which("unshare") or subprocess.run([*unshare, mount + "true"], capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    command = f"{sys.executable} cure.py {' '.join(argv(config, small / 'run', 'save_every=1', 'keep_ckpts=5'))}"
    keep = f"; code=$?; ls -A {small}/run/ckpt > {tmp_path}/left; cp -r {small}/run {tmp_path}/kept; exit $code"
    p = subprocess.run([*unshare, mount + command + keep], cwd=ROOT, capture_output=True, text=True,
                       env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    says = re.search(r"RuntimeError: (step \d: no checkpoint could be written.*)", p.stderr)
    assert p.returncode == 1 and says, p.stderr
    print(says.group(1).replace(str(small), "DIR"))
    names = (tmp_path / "left").read_text().split()
    assert "latest" in names and not any(n.startswith(".tmp-") for n in names)
    assert all_complete(tmp_path / "kept") in names


def test_a_log_that_cannot_be_written_ends_all_ranks(config, run, tmp_path):
    out = run(*argv(config, tmp_path), ranks=2, limit={"0": 20_000})
    says = re.findall(r"RuntimeError: OSError: .*/samples.jsonl cannot be written: File too large", out.printed)
    print(f"{out.seconds:.1f} s: {says}")
    assert out.codes == [1, 1] and len(says) == 2


# -------------------------------------------------------------------------------------------------------------- damage
def test_one_flipped_byte_anywhere_in_a_shard_is_found_at_load(whole2, config, run, tmp_path, capsys):
    shutil.copytree(whole2, tmp_path / "run")
    shard = sorted((tmp_path / "run" / STATE).iterdir())[1]
    good, rng = shard.read_bytes(), random.Random(0)
    for at in [0, len(good) - 1, *(rng.randrange(len(good)) for _ in range(3))]:
        shard.write_bytes(good[:at] + bytes([good[at] ^ 1 << rng.randrange(8)]) + good[at + 1 :])
        with pytest.raises(SystemExit) as e:
            cure.main(argv(config, tmp_path / "run"))
        err = capsys.readouterr().err
        assert e.value.code == 2 and err.count("\n") == 1
        assert f"state/{shard.name}" in err and "is damaged or missing" in err
        torch.distributed.destroy_process_group()
    out = run(*argv(config, tmp_path / "run"), ranks=2)
    assert out.codes == [2, 2]
    assert out.printed.count("is damaged or missing") == 2, "the ranks share the check, and the answer"


@pytest.mark.parametrize("file", ["meta.json", "SHA256SUMS", "state"])
def test_other_damage_is_one_line_too(whole, config, tmp_path, capsys, file):
    shutil.copytree(whole, tmp_path / "run")
    checkpoint_dir = tmp_path / "run/ckpt/step_000006"
    if file == "state":
        files.delete(checkpoint_dir / "state")
    else:
        (checkpoint_dir / file).write_text((checkpoint_dir / file).read_text()[:-40])
    with pytest.raises(SystemExit) as e:
        cure.main(argv(config, tmp_path / "run"))
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.startswith("error: resume: ") and err.count("\n") == 1
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("pointer", ["../../elsewhere", "/tmp", "..", "", "step_000099"])
def test_latest_leads_nowhere_but_into_the_runs_own_folder(whole, config, tmp_path, capsys, pointer):
    shutil.copytree(whole, tmp_path / "run")
    shutil.copytree(whole / "ckpt/step_000003", tmp_path / "elsewhere")
    (tmp_path / "run/ckpt/latest").write_text(pointer)
    with pytest.raises(SystemExit) as e:
        cure.main(argv(config, tmp_path / "run"))
    assert e.value.code == 2 and capsys.readouterr().err.startswith("error: resume: ")
    torch.distributed.destroy_process_group()


def test_lines_missing_from_a_log_are_said(whole, config, tmp_path, capsys):
    cure.main(argv(config, tmp_path, "max_steps=3"))
    kept = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)[:2]
    (tmp_path / "metrics.jsonl").write_text("".join(kept))
    cure.main(argv(config, tmp_path, "max_steps=4"))
    assert "lines are missing" in capsys.readouterr().out and len(lines(tmp_path / "metrics.jsonl")) == 3


# ------------------------------------------------------------------------------------------------------- one at a time
def test_two_runs_do_not_write_to_one_folder(config, run, tmp_path):
    import fcntl
    assert run(*argv(config, tmp_path / "run", "max_steps=2")).codes == [0]
    with open(tmp_path / "run/metrics.jsonl", "a") as f:
        f.write('{"step": 3}\n')                        # the first run is past its checkpoint
    before = (tmp_path / "run/metrics.jsonl").read_text()
    with open(tmp_path / "run/.lock", "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        out = run(*argv(config, tmp_path / "run"), ranks=2)
    assert out.codes == [2, 2] and "out_dir: " in out.printed and "another run is writing there" in out.printed
    assert (tmp_path / "run/metrics.jsonl").read_text() == before, "the run that is refused touches nothing"
    assert run(*argv(config, tmp_path / "run", "max_steps=3")).codes == [0]


def test_another_runs_checkpoint_goes_on_in_a_folder_of_its_own(whole, config, run, tmp_path):
    foreign = whole / "ckpt/step_000003"
    out = run(*argv(config, tmp_path / "new", f"resume={foreign}"))
    assert out.codes == [0] and "resumed from step 3" in out.printed
    assert [m["step"] for m in train_lines(tmp_path / "new")] == [4, 5, 6]
    assert numbers(tmp_path / "new") == numbers(whole)[-4:], "three steps and the evaluation at the end"
    taken = run(*argv(config, tmp_path / "new", f"resume={foreign}"))
    assert taken.codes == [2] and "resume: " in taken.printed and "has a run already" in taken.printed
    done = run(*argv(config, tmp_path / "other", f"resume={whole / 'ckpt/step_000006'}"))
    assert done.codes == [2] and "is the end of the last stage" in done.printed and not (tmp_path / "other").exists()


@pytest.mark.slow
def test_an_older_checkpoint_of_the_run_itself_is_gone_back_to(whole, config, run, tmp_path):
    assert run(*argv(config, tmp_path, "save_every=1", "keep_ckpts=9")).codes == [0]
    out = run(*argv(config, tmp_path, f"resume={tmp_path}/ckpt/step_000002", "save_every=1"))
    assert out.codes == [0] and "resumed from step 2" in out.printed
    same_as_whole(tmp_path, whole)


def test_a_cold_start_before_rl_is_evaluated_once_and_gone_on_from_exactly(tiny, config, run, tmp_path):
    path = tmp_path / "cold.yaml"
    data = tiny[1].replace("rl.", "sft.")
    sft = f"sft: {{kind: sft, data: {data}, steps: 2, prompts_per_step: 8, prompts_per_minibatch: 8}}"
    stages = f"stages:\n  {sft}\n  stage1: {{steps: 1, n1: 2, n2: 3}}\n"
    path.write_text(open(config).read().split("stages:")[0] + stages)
    assert run(*argv(path, tmp_path / "run", "save_every=1", "keep_ckpts=9")).codes == [0]
    whole = numbers(tmp_path / "run")
    kinds = ["sft" if "sft/step" in m else f"eval {m['step']}" if "actor/entropy" not in m else "rl" for m in whole]
    assert kinds == ["sft", "sft", "eval 0", "rl", "eval 1"], "the evaluation after sft is the base line of RL"
    for name, left in (("step_000000_sft_000001", 4), ("step_000000_sft_000002", 2)):
        done = run(*argv(path, tmp_path / name, f"resume={tmp_path}/run/ckpt/{name}"))
        assert done.codes == [0] and numbers(tmp_path / name) == whole[-left:], done.printed


def test_only_our_own_files_are_removed_and_a_lost_pointer_is_no_lost_run(whole, config, run, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run/ckpt/latest").unlink()
    (tmp_path / "run/ckpt/mine").mkdir()
    (tmp_path / "run/ckpt/mine/notes.txt").write_text("keep me")
    assert "finished already" in run(*argv(config, tmp_path / "run")).printed
    assert run(*argv(config, tmp_path / "run", "resume=never", "max_steps=1")).codes == [0]
    assert (tmp_path / "run/ckpt/mine/notes.txt").read_text() == "keep me"
    assert sorted(os.listdir(tmp_path / "run/ckpt")) == ["latest", "mine", "step_000001"]


def test_old_checkpoints_that_cannot_be_removed_do_not_end_the_run(config, tmp_path, monkeypatch, capsys):
    def refuse(*args):
        raise PermissionError("not yours")

    monkeypatch.setattr(checkpoint, "prune", refuse)
    cure.main(argv(config, tmp_path, "max_steps=1"))
    assert "WARNING: old checkpoints could not be removed: not yours" in capsys.readouterr().out
    assert checkpoint.latest(tmp_path / "ckpt") == "step_000001"


def test_changed_keys_are_all_named_with_both_values_and_free_ones_are_not(whole, config, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    changes = ["clip_high=0.3", "micro_batch_tokens=256", "eval_every=1", "save_every=2", "keep_ckpts=3", "max_steps=9"]
    with pytest.raises(SystemExit) as e:
        cure.main(argv(config, tmp_path / "run", *changes))
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.startswith("error: clip_high, micro_batch_tokens: not as in the run in ")
    assert "clip_high was 0.28, is 0.3 (stage1, stage2); micro_batch_tokens was 128, is 256 (stage1, stage2)" in err
    assert "eval_every" not in err and err.count("\n") == 1
    torch.distributed.destroy_process_group()
    stages = json.loads((tmp_path / "run/stages.json").read_text())
    for old in stages.values():
        del old["packing"]
    (tmp_path / "run/stages.json").write_text(json.dumps(stages))
    with pytest.raises(SystemExit):
        cure.main(argv(config, tmp_path / "run", "packing=broom"))
    assert "packing was 'flat', is 'broom'" in capsys.readouterr().err, "a run from before there were brooms"
    torch.distributed.destroy_process_group()
    with pytest.raises(SystemExit):
        cure.main(argv(config, tmp_path / "run", "packing=flat", "stages.stage1.steps=0"))
    assert "error: stages: the run in" in capsys.readouterr().err
    torch.distributed.destroy_process_group()


# -------------------------------------------------------------------------------------------- what is left, going back
def test_pruning_takes_whole_folders_but_no_stage_end_and_nothing_that_is_not_ours(tmp_path):
    for name in ("step_000001", "step_000002", "step_000003", "step_000004", "step_000005", "step_000009", "mine"):
        (tmp_path / name / "hf").mkdir(parents=True)
        (tmp_path / name / "meta.json").write_text(json.dumps({"stage_done": name == "step_000002"}))
    (tmp_path / "step_000001/meta.json").unlink()       # only hf is there, kept by an older version's keep_hf
    (tmp_path / ".tmp-step_000004").mkdir()
    checkpoint.prune(str(tmp_path), "step_000005", 2)
    left = ["mine", "step_000001", "step_000002", "step_000004", "step_000005", "step_000009"]
    assert sorted(os.listdir(tmp_path)) == left, "those after the newest are of a run that was gone back in"


def test_a_run_killed_before_its_last_pruning_is_pruned_by_the_next_start(whole, config, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    for name in ("step_000004", "step_000005"):
        shutil.copytree(whole / "ckpt/step_000006", tmp_path / "run/ckpt" / name)
        (tmp_path / "run/ckpt" / name / "meta.json").write_text('{"stage_done": false}')
    cure.main(argv(config, tmp_path / "run"))
    assert sorted(os.listdir(tmp_path / "run/ckpt")) == ["latest", "step_000003", "step_000005", "step_000006"]


@pytest.mark.slow
def test_keep_ckpts_leaves_what_it_says(config, run, tmp_path):
    assert run(*argv(config, tmp_path, "save_every=1", "keep_ckpts=1")).codes == [0]
    left = {d.name: sorted(os.listdir(d)) for d in (tmp_path / "ckpt").glob("step_*")}
    full = ["SHA256SUMS", "hf", "meta.json", "state"]
    assert left == {"step_000003": full, "step_000006": full}, "the end of stage 1, and the newest"


@pytest.mark.parametrize("have, left, warned", [("abcdef", "abc", False), ("abc", "abc", False), ("ab", "ab", True),
                                                (None, "", True)])  # fmt: skip
def test_rewind_cuts_a_log_that_is_too_long_and_says_which_is_too_short(tmp_path, have, left, warned):
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt/latest").write_text("step_000004")
    (tmp_path / "samples.jsonl").write_text("xy")
    if have is not None:
        (tmp_path / "metrics.jsonl").write_text(have)
    said, state = [], {"files": {"metrics.jsonl": 3, "samples.jsonl": 2}}
    run = SimpleNamespace(out=str(tmp_path), state=state, print=said.append)
    checkpoint.rewind(run, f"{tmp_path}/ckpt/step_000002")
    assert (tmp_path / "ckpt/latest").read_text() == "step_000002"
    assert (tmp_path / "metrics.jsonl").read_text() == left and (tmp_path / "samples.jsonl").read_text() == "xy"
    short = f"WARNING: {tmp_path}/metrics.jsonl has {len(have or '')} bytes, 3 when the checkpoint was written"
    assert said == ([f"{short}: lines are missing"] if warned else [])


def test_going_back_sets_logs_and_pointer_back_before_anything_else_is_saved(whole, config, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    older = tmp_path / "run/ckpt/step_000003"
    cure.main(argv(config, tmp_path / "run", f"resume={older}/", "max_steps=3"))
    assert "resumed from step 3" in capsys.readouterr().out
    assert (tmp_path / "run/ckpt/latest").read_text() == "step_000003", "and so resume=auto goes on from there"
    assert [m["step"] for m in train_lines(tmp_path / "run")] == [1, 2, 3]
    for name, size in json.loads((older / "meta.json").read_text())["files"].items():
        assert os.path.getsize(tmp_path / "run" / name) == size > 0, name


# -------------------------------------------------------------------------------------------------------- changed code
def rewrite_meta(folder, change):
    """Change a checkpoint's meta.json, and its checksum."""
    meta, sums = json.loads((folder / "meta.json").read_text()), (folder / "SHA256SUMS").read_text()
    change(meta)
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))
    new = f"{files.sha256(folder / 'meta.json')}  meta.json"
    (folder / "SHA256SUMS").write_text(re.sub(r"\w+  meta\.json", new, sums))


def test_code_that_changed_since_the_checkpoint_is_named_and_nothing_else(config, tmp_path, monkeypatch, capsys):
    house, out = tmp_path / "house", tmp_path / "run"
    shutil.copytree(ROOT / "lib", house / "lib")
    for script in ROOT.glob("*.py"):
        shutil.copy(script, house)
    monkeypatch.setattr(files, "ROOT", house)

    def warnings(steps):
        cure.main(argv(config, out, "eval_data=", f"max_steps={steps}"))
        text = capsys.readouterr().out
        assert (f"resumed from step {steps - 1} " in text) == (steps > 1)
        return re.findall("WARNING: (the code .*)", text)

    assert warnings(1) == []
    with open(house / "loss.py", "a") as f:
        f.write("# mine\n")
    assert warnings(2) == ["the code has changed since the checkpoint was written: loss.py"]
    shutil.copy(house / "cure.py", house / "mine.py")
    (house / "lib/toy.py").unlink()
    assert warnings(3) == ["the code has changed since the checkpoint was written: lib/toy.py (gone), mine.py (new)"]
    rewrite_meta(out / "ckpt/step_000003", lambda meta: meta.pop("code"))
    (house / "eval.py").unlink()
    assert warnings(4) == [], "a checkpoint from before the hashes"
    code = json.loads((out / "ckpt/step_000004/meta.json").read_text())["code"]
    assert code == files.code_hashes() and "eval.py" not in code and "lib/run.py" in code


def test_the_hashes_of_the_code_are_of_scripts_lib_and_the_files_that_are_named(tmp_path):
    (tmp_path / "idea.py").write_text("x = 1\n")
    code, more = files.code_hashes(), files.code_hashes(tmp_path / "idea.py", ROOT / "tools/tree.py")
    assert {"cure.py", "loss.py", "lib/checkpoint.py"} <= set(code) and not any(n.startswith("tests") for n in code)
    assert set(more) - set(code) == {os.path.relpath(tmp_path / "idea.py", ROOT), "tools/tree.py"}
    assert more["tools/tree.py"] == files.sha256(ROOT / "tools/tree.py")[:16] and more["cure.py"] == code["cure.py"]


# ------------------------------------------------------------------------------------------------------------ the group
def test_only_an_engine_of_vllm_leaves_the_end_of_the_group_to_vllm(monkeypatch):
    ended = []
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace())  # imported by somebody, not the engine
    monkeypatch.setattr(ranks.dist, "barrier", lambda: None)
    monkeypatch.setattr(ranks.dist, "destroy_process_group", lambda: ended.append(1))
    for engine, ends in ((None, 1), (SimpleNamespace(model=1), 1), (SimpleNamespace(llm=1), 0)):
        ended.clear()
        ranks.end_group(SimpleNamespace(engine=engine, tracker=None))
        assert len(ended) == ends, engine


# ------------------------------------------------------------------------------------------------------------- adapters
@pytest.fixture(scope="module")
def adapted(config, run, tmp_path_factory):
    out = tmp_path_factory.mktemp("adapted")
    assert run(*argv(config, out, "lora_rank=4", "lr=3e-3", "eval_data="), ranks=1).codes == [0]
    return out


def test_a_run_with_adapters_resumes_bit_for_bit_and_its_checkpoint_has_both_forms(adapted, config, run, tmp_path):
    own = "lora_rank=4", "lr=3e-3", "eval_data="
    assert run(*argv(config, tmp_path, *own, "max_steps=2")).codes == [0]
    assert run(*argv(config, tmp_path, *own)).codes == [0]
    same_as_whole(tmp_path, adapted)
    assert all(m["mismatch/mean_abs"] < 1e-5 for m in train_lines(adapted)), "the engine has the merged weights"
    folder = adapted / "ckpt/step_000006"
    adapter, merged = load_file(folder / "adapter/adapter_model.safetensors"), load_file(folder / "hf/model.safetensors")
    assert len(adapter) == 2 * 7 * 2 and not any("lora" in k for k in merged)


@pytest.mark.parametrize("change", ["lora_alpha=500", "lora_rank=0", "lora_rank=2", "model"])
def test_adapters_go_on_from_their_own_model_rank_and_alpha_alone(adapted, config, run, tmp_path, change):
    own = ["lora_rank=4", "lr=3e-3", "eval_data=", f"resume={adapted}/ckpt/step_000003"]
    if change == "model":                               # the same shapes, other weights
        change = f"model={adapted}/ckpt/step_000006/hf"
    out = run(*argv(config, tmp_path, *own, change))
    assert out.codes == [2] and "error: lora_rank: " in out.printed and "has [rank, alpha, SHA-256" in out.printed


def test_adapters_are_trained_alike_on_two_ranks(adapted, config, run, tmp_path):
    assert run(*argv(config, tmp_path, "lora_rank=4", "lr=3e-3", "eval_data=", "max_steps=3"), ranks=2).codes == [0, 0]
    for m, w in zip(train_lines(tmp_path), train_lines(adapted), strict=False):
        assert m["tokens/generated"] == w["tokens/generated"]
        assert m["actor/grad_norm"] == pytest.approx(w["actor/grad_norm"], rel=1e-4)
