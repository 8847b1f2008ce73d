"""tools/gpu_check.py: each thing that can be wrong, put in by hand, turns its line to FAIL. A healthy CPU passes."""
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

from lib import policy
from lib.broom import skips
from lib.engine import TorchEngine
from loss import logp_and_entropy
from tools import bench, gpu_check
from tools import gpu_kernels as kernels
from tools.gpu_check import report


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # these tests are of the CPU, wherever they run


@pytest.fixture
def check(cpu, tmp_path):
    """Run lines by name, and what they need, on the torch engine -> {name: row}."""

    def run(*names, engine="torch", own=()):
        argv = [f"only={','.join(names)}", f"engine={engine}", "shape=toy", "max_response_tokens=24", *own]
        shape, only, _, cfg = gpu_check.arguments(argv)
        machine = gpu_check.prepare(cfg, shape, tempfile.mkdtemp(dir=tmp_path), 0, 1, cpu)
        texts = []
        failed = gpu_check.run_lines(machine, cfg, only, lambda rows: texts.append(report(machine, shape, argv, rows)))
        rows = json.loads(texts[-1])["lines"]
        assert failed == sum(row["status"] == "FAIL" for row in rows)
        return {row["name"]: row for row in rows}

    return run


def slow_but(names, *plain):
    """Parameters of a test of which only `plain` are run by plain pytest."""
    return [name if name in plain else pytest.param(name, marks=pytest.mark.slow) for name in names]


def statuses(rows):
    return {name: row["status"] for name, row in rows.items()}


# ----------------------------------------------------------------------------------------------------- wrong attention
def attention(visible):
    """The trainer's attention on a CPU with another mask: visible(same sequence, query at, key at) -> bool (T, T)."""

    def attend(query, key, value, cu_seqlens, cu_keys, scaling):
        lengths = cu_seqlens.diff()
        owner, at = torch.arange(len(lengths)).repeat_interleave(lengths), torch.arange(query.shape[2])
        mask = visible(owner[:, None] == owner, at[:, None], at)
        out = F.scaled_dot_product_attention(query, key, value, mask, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2)

    return attend


MASKS = {
    "right": lambda same, q, k: same & (k <= q),
    "its neighbours, too": lambda same, q, k: k <= q,
    "one neighbour's last token, too": lambda same, q, k: (k <= q) & (same | (k == q - 1)),
    "its future, too": lambda same, q, k: same,
    "the next token, too": lambda same, q, k: same & (k <= q + 1),
    "not itself": lambda same, q, k: same & ((k < q) | (q == k) & ~same.roll(1, 1)),
}


@pytest.mark.parametrize("name", slow_but(MASKS, "right", "its neighbours, too"))
def test_a_wrong_mask_fails(check, monkeypatch, name):
    monkeypatch.setattr(policy, "_attention_by_sequence", attention(MASKS[name]))
    rows = check("packed_attention", "empty_sequences")
    print("a token sees", name, {k: row["numbers"] for k, row in rows.items()})
    assert set(statuses(rows).values()) == {"PASS" if name == "right" else "FAIL"}
    assert rows["packed_attention"]["do"].startswith("Do not train")


def test_a_trainer_that_sees_neighbours_is_apart_from_the_engine(check, monkeypatch):
    monkeypatch.setattr(policy, "_attention_by_sequence", attention(MASKS["one neighbour's last token, too"]))
    assert statuses(check("logprob_gap"))["logprob_gap"] == "FAIL"


def kernel(diagonal):
    """torch's varlen_attn on a CPU, the diagonal of (n queries, m keys) where `diagonal` says."""
    taken = inspect.signature(kernels.varlen_attn)

    def varlen_attn(q, k, v, cu_q, cu_k, longest_q, longest_k, **named):
        taken.bind(q, k, v, cu_q, cu_k, longest_q, longest_k, **named)
        window_size = named["window_size"]
        assert window_size == (-1, 0) and int(cu_q.diff().max()) == longest_q and int(cu_k.diff().max()) == longest_k
        out = []
        for a, b, c, d in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False):
            q1, k1, v1 = (x.transpose(0, 1) for x in (q[a:b], k[c:d], v[c:d]))
            mask = torch.ones(b - a, d - c, dtype=torch.bool).tril(diagonal(int(b - a), int(d - c)))
            out.append(F.scaled_dot_product_attention(q1, k1, v1, mask, enable_gqa=True).transpose(0, 1))
        return torch.cat(out)

    return varlen_attn


DIAGONALS = {"bottom right": lambda n, m: m - n, "top left": lambda n, m: 0, "one too far": lambda n, m: m - n + 1}


@pytest.mark.parametrize("name", DIAGONALS)
def test_a_wrong_causal_alignment_fails(check, monkeypatch, name):
    monkeypatch.setattr(kernels, "varlen_attn", kernel(DIAGONALS[name]))
    monkeypatch.setitem(gpu_check.NEEDS, "GPU", (lambda run: True, None))
    row = check("causal_alignment")["causal_alignment"]
    print(name, row["numbers"])
    assert row["status"] == ("PASS" if name == "bottom right" else "FAIL")


# ---------------------------------------------------------------------------------------------------------- wrong head
def bf16_head(hidden, weight, tokens, *rest):
    logq = (hidden @ weight.t()).float().log_softmax(-1)
    return logq.gather(-1, tokens[:, None])[:, 0], -(logq.exp() * logq).sum(-1)


def next_tokens(hidden, weight, tokens, *rest):
    return logp_and_entropy(hidden, weight, tokens.roll(1), *rest)


@pytest.mark.parametrize("wrong", [bf16_head, next_tokens])
@pytest.mark.parametrize("line", ["fp32_logits", "head"])
def test_a_wrong_head_fails(check, monkeypatch, line, wrong):
    monkeypatch.setattr(kernels, "logp_and_entropy", wrong)
    assert statuses(check(line)) == {line: "FAIL"}


# ---------------------------------------------------------------------------------------------------------- wrong sync
def nothing(sync, calls):
    def broken(engine, named):
        for _ in named:
            pass
        engine.ready = True

    return broken


def all_but_one(name):
    def broken_by_name(sync, calls):
        def broken(engine, named):
            stale = dict(engine.model.named_parameters())[name].detach().clone()
            sync(engine, ((k, stale if k == name else full) for k, full in named))

        return broken

    return broken_by_name


def weights_of_the_last_time(sync, calls):
    def broken(engine, named):
        calls.append([(name, full.clone()) for name, full in named])
        sync(engine, calls[max(0, len(calls) - 2)])

    return broken


BROKEN = {"nothing": nothing, "weights of the last time": weights_of_the_last_time,
          "all but a norm": all_but_one("model.layers.0.input_layernorm.weight"),
          "all but the embedding": all_but_one("model.embed_tokens.weight"),
          "all but a matrix": all_but_one("model.layers.1.mlp.up_proj.weight")}  # fmt: skip


@pytest.mark.parametrize("name", slow_but(BROKEN, "nothing"))
def test_a_broken_sync_fails(check, monkeypatch, name):
    monkeypatch.setattr(TorchEngine, "sync", BROKEN[name](TorchEngine.sync, []))
    rows = check("skipped_sync")
    print(name, rows["skipped_sync"]["numbers"])
    assert rows["skipped_sync"]["status"] == "FAIL" and rows["wake_and_sync"]["status"] == "PASS"


def test_the_gap_is_that_of_branches_packed_with_their_base_responses(check, monkeypatch):
    score, shared = gpu_check.parts.cure.score, []

    def noted(run, cfg, minibatches):
        shared.append(sum(sum(skips(rows)) for mini in minibatches for rows in mini.here(0)))
        score(run, cfg, minibatches)

    monkeypatch.setattr(gpu_check.parts.cure, "score", noted)
    assert statuses(check("logprob_gap"))["logprob_gap"] == "PASS" and shared[0] > 0


def test_seeds_that_are_ignored_fail(check, monkeypatch):
    generate = TorchEngine.generate
    monkeypatch.setattr(TorchEngine, "generate", lambda self, prompts, n, sampling, seeds: generate(
        self, prompts, n, sampling, [7] * len(prompts)))  # fmt: skip
    assert check("same_seed_twice")["same_seed_twice"]["status"] == "FAIL"


def test_a_micro_batch_that_is_lost_fails(check, monkeypatch):
    cut = bench.micro_batches
    monkeypatch.setattr(bench, "micro_batches", lambda *args: cut(*args)[:-1])
    assert check("sharded_gradient")["sharded_gradient"]["status"] == "FAIL"


@pytest.mark.parametrize("dtype", slow_but(["float32", "bfloat16"], "bfloat16"))
def test_with_adapters_the_same_lines_pass_and_an_engine_without_them_fails(check, monkeypatch, dtype):
    names, own = ("sharded_gradient", "skipped_sync", "save_and_resume"), ("lora_rank=4", f"dtype={dtype}")
    rows = check(*names, "update", own=own)
    print({name: rows[name]["numbers"] for name in names})
    assert set(statuses(rows).values()) == {"PASS"} and rows["save_and_resume"]["numbers"]["tensors"] == 3 * 2 * 7 * 2
    monkeypatch.setattr("lib.lora.LoraLinear.merged", lambda self, weight, A, B: weight)
    assert statuses(check("skipped_sync", own=own))["skipped_sync"] == "FAIL"


def test_a_checkpoint_that_is_not_read_fails(check, monkeypatch):
    from lib import checkpoint
    monkeypatch.setattr(checkpoint.dcp, "load", lambda *args, **kwargs: None)
    assert check("save_and_resume")["save_and_resume"]["status"] == "FAIL"


# ----------------------------------------------------------------------------------------------------------- the table
def test_a_line_that_raises_fails_with_the_exceptions_last_line_and_the_others_go_on(check, monkeypatch, capsys):
    def wake(engine):
        raise RuntimeError("first line\nno wake today")

    monkeypatch.setattr(TorchEngine, "wake", wake)
    rows = check("greedy_tokens", "engine_sleep", "save_and_resume")
    wanted = {"wake_and_sync": "FAIL", "greedy_tokens": "LEFT OUT"}
    others = ("engine_start", "trainer_start", "engine_sleep", "save_and_resume")
    assert statuses(rows) == wanted | dict.fromkeys(others, "PASS")
    assert rows["wake_and_sync"]["note"] == "no wake today" and rows["greedy_tokens"]["note"] == "no awake engine"
    out, err = capsys.readouterr()
    assert "DO: An error: Set VLLM_USE_V2_MODEL_RUNNER=0" in out and "in wake" in err, "what to do, and the traceback"


def test_a_line_brings_what_it_needs_and_no_more(check):
    assert list(check("head")) == ["head"]
    assert list(check("sharded_gradient")) == ["trainer_start", "sharded_gradient"]


def test_every_line_says_what_it_means_and_what_to_do():
    names = [line.check.__name__ for line in gpu_check.LINES]
    assert len(set(names)) == len(names)
    for line in gpu_check.LINES:
        assert line.check.__doc__ and line.remedy, line.check.__name__
        assert set(line.needs.split()) <= gpu_check.NEEDS.keys()
    assert {maker for _, maker in gpu_check.NEEDS.values()} - {None} <= set(names)


@pytest.mark.parametrize("argv, says", [
    (["shape=70b"], "shape: must be one of toy, 0.5b, 1.5b, 7b, got '70b'"), (["only=heads"], "only: no line 'heads'"),
    (["shape"], "'shape' is not key=value"), (["micro_batch_tokens=0"], "micro_batch_tokens: must be positive"), (["shap=toy"], "shap: no such key"),
])  # fmt: skip
def test_mistakes_are_one_line(argv, says, capsys):
    with pytest.raises(SystemExit) as e:
        gpu_check.main(argv)
    assert e.value.code == 2 and capsys.readouterr().err.startswith(f"error: {says}")


class PretendedGPU:
    """What the lines ask torch.cuda about memory: a GPU with `free` of 80 GiB, where an update takes `peak`."""

    def __init__(self, monkeypatch, free, peak=0.0):
        gib = 2**30
        answers = {
            "is_available": True, "mem_get_info": (int(free * gib), 80 * gib), "empty_cache": None, "synchronize": None,
            "memory_allocated": 5 * gib, "max_memory_allocated": int((5 + peak) * gib), "get_device_name": "NVIDIA X",
            "reset_peak_memory_stats": None, "get_device_capability": (9, 0),
        }  # fmt: skip
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, lambda *args, answer=answer: answer)
        monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 29, 7))


@pytest.mark.slow
def test_engine_and_trainer_that_leave_too_little_room_fail(check, monkeypatch):
    names = "engine_start", "trainer_start", "wake_and_sync", "engine_sleep"
    PretendedGPU(monkeypatch, free=60)
    rows = check(*names)
    assert set(statuses(rows).values()) == {"PASS"}
    numbers = rows["engine_start"]["numbers"]
    assert numbers["GiB free before"] == numbers["after"] == 60 and 0 < numbers["planned for what follows"] < 1
    PretendedGPU(monkeypatch, free=0.001)
    rows = check(*names)
    assert set(statuses(rows).values()) == {"FAIL"} and "Lower gpu_memory_utilization" in rows["wake_and_sync"]["do"]


@pytest.mark.slow
def test_an_update_over_the_plan_fails_and_one_that_cannot_fit_is_left_out(check, monkeypatch):
    for peak, status in ((0.2, "PASS"), (3, "FAIL")):
        PretendedGPU(monkeypatch, free=60, peak=peak)
        rows = check("peak_memory")
        assert statuses(rows) == {"update": "PASS", "peak_memory": status}
        assert rows["peak_memory"]["numbers"]["update, GiB"] == pytest.approx(peak)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**20, 80 * 2**30))  # free, and in all
    assert statuses(check("peak_memory")) == {"update": "LEFT OUT", "peak_memory": "LEFT OUT"}


@pytest.mark.parametrize("seen, driver, lacks, status", [
    (True, "580.65.06\n" * 8, "", True),
    (True, "", "nvidia-smi", True),                          # a container without it
    (True, "580.65.06", "gcc cc", False),
    (False, "570.12", "", False),                           # too old for torch, which then sees no GPU
    (False, "", "", "LEFT OUT"), (False, "", "nvidia-smi", "LEFT OUT"),
])  # fmt: skip
def test_a_machine_that_lacks_something_fails(monkeypatch, seen, driver, lacks, status):
    if seen:
        PretendedGPU(monkeypatch, free=60)
    monkeypatch.setattr(gpu_check.subprocess, "run", lambda *args, **kwargs: SimpleNamespace(stdout=driver))
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: None if name in lacks.split() else f"/usr/bin/{name}")
    monkeypatch.setattr(gpu_check.os.path, "exists", lambda path: True)
    found = gpu_check.environment(None, None)
    assert found[0] == status and found[1]["driver"] == (driver.split() or ["unknown"])[0]


def test_a_gpu_machine_without_vllm_fails(check, monkeypatch):
    PretendedGPU(monkeypatch, free=60)
    assert statuses(check("engine_start")) == {"engine_start": "PASS"}, "engine=torch was asked for"
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: None)
    assert statuses(check("engine_start", engine="auto")) == {"engine_start": "FAIL"}


def test_a_process_that_does_not_end_well_fails(check, monkeypatch):
    monkeypatch.setattr(gpu_check.subprocess, "run", lambda *args, **kwargs: SimpleNamespace(
        returncode=-6, stderr="pure virtual method called\nterminate called"))  # fmt: skip
    row = check("clean_exit")["clean_exit"]
    assert row["status"] == "FAIL" and row["numbers"] == {"exit code": -6, "last line": "terminate called"}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_healthy_cpu_fails_nothing_and_leaves_a_file_for_an_issue(tmp_path, ranks):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    done = subprocess.run([sys.executable, *launch, "-m", "tools.gpu_check", "shape=toy", f"out={tmp_path}/check.json"],
                          cwd=ROOT, capture_output=True, text=True, timeout=180,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "check.json").read_text())
    assert found["versions"]["torch"] == torch.__version__ and found["device"] == "cpu" and found["ranks"] == ranks
    assert found["command"].endswith(f"-m tools.gpu_check shape=toy out={tmp_path}/check.json") and found["failed"] == 0
    rows = {row["name"]: row for row in found["lines"]}
    assert list(rows) == [line.check.__name__ for line in gpu_check.LINES]
    left = {name for name, status in statuses(rows).items() if status == "LEFT OUT"}
    assert left == {"environment"} | {line.check.__name__ for line in gpu_check.LINES if "GPU" in line.needs}
    assert set(statuses(rows).values()) == {"PASS", "NUMBER", "LEFT OUT"}
    assert all(name in done.stdout and row["means"] in done.stdout for name, row in rows.items())


def test_the_commands_of_the_page_are_understood():
    page = (ROOT / "docs/gpu.md").read_text()
    commands = re.findall(r"^.*-m tools\.gpu_check ?(.*?)(?: +#.*)?$", page, re.M)
    shapes = [gpu_check.arguments(argv.split())[0] for argv in commands]
    print(f"{commands} -> {shapes}")
    assert shapes == ["toy", "7b"], "without a GPU the first is the toy's"
