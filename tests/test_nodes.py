"""Several nodes: a copy of the trainer a node (replicate), two torchruns that meet, and a node that is lost."""
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import ROOT, free_port, largest, lines, train_lines
from safetensors.torch import load_file

from lib import checkpoint

STATE = "ckpt/step_000001/state"


def moments(out, like):
    """Adam's first moments in a checkpoint, whole tensors of the shapes of `like`: after one optimizer step a tenth of its
    gradient."""
    state = {k: torch.zeros_like(v) for k, v in like.items() if k.startswith("exp_avg.")}
    dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(out / STATE), no_dist=True)
    return state


def tokens(out):
    return [row["response_ids"] for row in lines(out / "samples.jsonl")]


@pytest.mark.parametrize("ranks, copies", [(2, 2), pytest.param(4, 2, marks=pytest.mark.slow), pytest.param(4, 4, marks=pytest.mark.slow)])
def test_copies_have_the_gradient_and_the_tokens_of_one_process(config, run, tmp_path, ranks, copies):
    found = {}
    for name, n, r in (("one", 1, 1), ("copies", ranks, copies)):
        out = tmp_path / name
        changes = "max_steps=1", "prompts_per_minibatch=4", "samples_per_step=0", "eval_data=", f"replicate={r}"
        assert run("--config", config, f"out_dir={out}", *changes, ranks=n).codes == [0] * n
        found[name] = tokens(out), train_lines(out)[0]["actor/grad_norm"], sum(p.stat().st_size for p in (out / STATE).iterdir())
    (ids, norm, size), (ids2, norm2, size2) = found.values()
    assert ids == ids2 and size2 < 1.05 * size, "each shard is written once"
    file, = (tmp_path / "one" / STATE).iterdir()
    a, b = (moments(tmp_path / name, load_file(file)) for name in found)
    whole = largest(x.abs().max() for x in a.values())
    gap = largest((a[k] - b[k]).abs().max() for k in a) / whole
    print(f"{ranks} ranks, {copies} copies: gradients differ by {gap:.1e} of the largest, norms by {norm2 / norm - 1:.1e}")
    assert whole > 1e-3 and gap < 1e-5 and norm2 == pytest.approx(norm, rel=1e-6)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_copies(whole, config, run, tmp_path):
    argv = "--config", config, f"out_dir={tmp_path}", "samples_per_step=0"
    assert run(*argv, "max_steps=2", "replicate=2", ranks=4).codes == [0] * 4
    assert run(*argv, "max_steps=4", ranks=3).codes == [0] * 3
    assert run(*argv, "replicate=2", ranks=2).codes == [0] * 2
    for m, w in zip(train_lines(tmp_path), train_lines(whole), strict=True):
        assert m["tokens/generated"] == w["tokens/generated"]
        assert m["actor/grad_norm"] == pytest.approx(w["actor/grad_norm"], rel=1e-4)


def test_copies_that_do_not_divide_the_ranks_are_refused_in_one_line(config, run, tmp_path):
    out = run("--config", config, f"out_dir={tmp_path}", "replicate=3", ranks=2)
    assert out.codes == [2, 2] and "error: replicate: 3 copies do not divide 2 ranks" in out.printed
    assert "Traceback" not in out.printed and not os.listdir(tmp_path)


def nodes(argv, out):
    """Two torchruns of two ranks each, as on two machines that share a folder. What they print goes to files in `out`."""
    port, env = str(free_port()), os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    meet = ["--nnodes", "2", "--nproc_per_node", "2", "--master_addr", "127.0.0.1", "--master_port", port]
    return [
        subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--node_rank", str(n), *meet, "cure.py", *argv], cwd=ROOT,
                         env=env, stdout=open(out / f"node{n}.log", "w"), stderr=subprocess.STDOUT, start_new_session=True)
        for n in range(2)
    ]  # fmt: skip


@pytest.mark.slow
def test_two_nodes_run_as_one_process_and_the_loss_of_one_ends_the_other_and_costs_nothing(whole, config, tmp_path):
    out = tmp_path / "run"
    argv = ["--config", config, f"out_dir={out}", "samples_per_step=0", "replicate=2", "save_every=1"]
    started = nodes(argv, tmp_path)
    while not os.path.exists(out / "ckpt/step_000002"):
        assert all(p.poll() is None for p in started), (tmp_path / "node0.log").read_text()
        time.sleep(0.1)
    children = subprocess.run(["pgrep", "-P", str(started[1].pid)], stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    ranks = [int(pid) for pid in children if "cure.py" in open(f"/proc/{pid}/cmdline").read()]
    assert len(ranks) == 2
    for pid in ranks:
        os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    codes = [p.wait(timeout=120) for p in started]
    text = (tmp_path / "node0.log").read_text()
    print(f"the other node ended after {time.monotonic() - began:.1f} s with {codes[0]}")
    assert codes[0] != 0 and codes[1] != 0 and "If a connection was lost, the lines of the other ranks say why" in text, text
    assert checkpoint.latest(out / "ckpt") >= "step_000002"
    assert [p.wait(timeout=300) for p in nodes(argv, tmp_path)] == [0, 0], (tmp_path / "node0.log").read_text()
    assert "resumed from step" in (tmp_path / "node0.log").read_text()
    assert tokens(out) == tokens(whole)
    for m, w in zip(train_lines(out), train_lines(whole), strict=True):
        assert m["tokens/generated"] == w["tokens/generated"]
        assert m["actor/grad_norm"] == pytest.approx(w["actor/grad_norm"], rel=1e-4)
