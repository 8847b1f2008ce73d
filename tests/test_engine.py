"""engine.py without vLLM: what arrives is compared with what was sent, what is put back, what becomes of errors."""

import os
import random
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT

from lib import engine
from lib.config import Config
from lib.engine import VLLMEngine, checked, process_settings_kept

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


# ------------------------------------------------------------------------ what arrives in an engine
def sent():
    """A block with fewer kv heads than heads, an embedding, a norm and a head tied to the first, as HF names them."""
    rows = {"embed_tokens.weight": 37, "layers.0.self_attn.q_proj.weight": 8, "layers.0.self_attn.k_proj.weight": 4,
            "layers.0.self_attn.v_proj.weight": 4, "layers.0.self_attn.o_proj.weight": 8,
            "layers.0.mlp.gate_proj.weight": 6, "layers.0.mlp.up_proj.weight": 6, "norm.weight": 8}  # fmt: skip
    return {name: torch.randn(n, 8) for name, n in rows.items()} | {"lm_head.weight": torch.randn(37, 8)}


def stacked(named, dtype):
    """The same as vLLM keeps it: vocabulary padded, parts of a block one below the other, no tied head."""
    out = {"embed_tokens.weight": torch.cat([named["embed_tokens.weight"], torch.zeros(27, 8)])}
    for name in ("layers.0.self_attn.o_proj.weight", "norm.weight"):
        out[name] = named[name].clone()
    for module, parts in (("self_attn.qkv_proj", FUSED["qkv_proj"]), ("mlp.gate_up_proj", FUSED["gate_up_proj"])):
        where = module.split(".")[0]
        out[f"layers.0.{module}.weight"] = torch.cat([named[f"layers.0.{where}.{p}.weight"] for p in parts])
    return {name: x.to(dtype) for name, x in out.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_that_did_not_arrive_in_the_engine_is_named_whatever_it_is_fused_into(dtype):
    named = sent()
    orders = [list(named.items()), sorted(named.items()), sorted(named.items(), reverse=True)]
    for order in orders:  # weights from a file come in the alphabet's order
        assert dict(checked(order, stacked(named, dtype), FUSED)).keys() == named.keys()
    for stale in set(named) - {"lm_head.weight"}:  # it has no parameter of its own
        moved = 1 + 2**-6  # by more than bf16 rounds
        params = stacked(named | {stale: named[stale] * moved}, dtype)
        for order in orders:
            with pytest.raises(AssertionError, match=f"sync: {stale} did not arrive in the engine"):
                list(checked(order, params, FUSED))


def test_one_weight_that_differs_by_its_last_bit_is_seen():
    named = sent()
    params = stacked(named, torch.bfloat16)
    row = params["layers.0.self_attn.qkv_proj.weight"][9:10, 3:4]  # of k_proj
    row.view(torch.int16).bitwise_xor_(1)
    with pytest.raises(AssertionError, match="k_proj"):
        list(checked(named.items(), params, FUSED))


def cut(named, rank, size, fused):
    """What rank `rank` of a vLLM engine over `size` ranks has of sent(): 4 heads and 2 kv heads 2 wide, 6 units of the
    MLP, a vocabulary padded to 64. Head by head, row by row."""
    out, heads, units, vocab = {}, range(4 * rank // size, 4 * (rank + 1) // size), 6 // size, 64 // size
    kv = sorted({h * 2 // 4 for h in heads})  # a kv head serves two heads
    rows = {"q_proj": heads, "k_proj": kv, "v_proj": kv, "gate_proj": range(rank * units, (rank + 1) * units),
            "up_proj": range(rank * units, (rank + 1) * units)}  # fmt: skip
    width = {"q_proj": 2, "k_proj": 2, "v_proj": 2}
    for module, parts in fused.items():
        where = "self_attn" if module == "qkv_proj" else "mlp"
        out[f"layers.0.{where}.{module}.weight"] = torch.stack([
            named[f"layers.0.{where}.{p}.weight"][i * width.get(p, 1) + j]
            for p in parts for i in rows[p] for j in range(width.get(p, 1))
        ])  # fmt: skip
    columns = [2 * h + j for h in heads for j in range(2)]  # of o_proj: what the heads give
    out["layers.0.self_attn.o_proj.weight"] = named["layers.0.self_attn.o_proj.weight"][:, columns]
    padded = torch.cat([named["embed_tokens.weight"], torch.zeros(27, 8)])
    out["embed_tokens.weight"] = padded[rank * vocab : (rank + 1) * vocab]
    return {name: x.clone() for name, x in out.items()} | {"norm.weight": named["norm.weight"]}


@pytest.mark.parametrize("size", [2, 4])  # kv heads: one a rank, and one on two ranks
def test_of_a_cut_tensor_a_rank_compares_its_own_part(size):
    named = sent() | {"norm.weight": torch.randn(8)}
    if size == 4:  # 6 units are not for 4 ranks
        named = {name: x for name, x in named.items() if ".mlp." not in name}
    fused = FUSED if size == 2 else {"qkv_proj": FUSED["qkv_proj"]}
    for rank in range(size):
        shard = rank, size, 2

        list(checked(named.items(), cut(named, rank, size, fused), fused, shard))
        list(checked(sorted(named.items(), reverse=True), cut(named, rank, size, fused), fused, shard))
        nothing = {"embed_tokens.weight"} if 64 // size * rank >= 37 else set()  # padding only
        for stale in set(named) - {"lm_head.weight"} - nothing:
            with pytest.raises(AssertionError, match=f"sync: {stale} did not arrive in the engine"):
                other = named | {stale: named[stale] + 1}
                list(checked(named.items(), cut(other, rank, size, fused), fused, shard))
        with pytest.raises(AssertionError, match="did not arrive"):  # another rank's parts are not this one's
            list(checked(named.items(), cut(named, (rank + 1) % size, size, fused), fused, shard))


# ------------------------------------------------------------------------- ranks that share an engine
class Numbered:
    """Stands for vllm.LLM: a completion's only token is that of its prompt, its log-prob its seed."""

    def __init__(self):
        self.asked = []
        self.llm_engine = SimpleNamespace(is_sleeping=lambda: False)

    def generate(self, prompts, params, use_tqdm):
        self.asked = [(p["prompt_token_ids"], s["seed"]) for p, s in zip(prompts, params, strict=True)]
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=p, logprobs=[{p[0]: SimpleNamespace(logprob=s)}],
                                                         finish_reason="stop", index=i) for i in range(2)])
                for p, s in self.asked]  # fmt: skip


def test_all_ranks_of_an_engine_ask_for_the_same_and_each_keeps_its_own(monkeypatch):
    numbers, told = [2, 0, 0, 3, 0, 0], {}
    wanted = [[([10 * rank + i], 100 * rank + i) for i in range(n)] for rank, n in enumerate(numbers)]
    everyone = [(rank, *x) for rank, asked in enumerate(wanted) for x in asked]
    monkeypatch.setattr(engine, "gather", lambda items: everyone)
    for rank in range(6):
        monkeypatch.setattr(engine.dist, "get_rank", lambda rank=rank: rank)
        vllm = VLLMEngine.__new__(VLLMEngine)
        vllm.llm, vllm.ready, vllm.stop, vllm.params_class, vllm.shard = Numbered(), True, [1], dict, (rank % 2, 2, 2)
        prompts, seeds = [p for p, _ in wanted[rank]], [s for _, s in wanted[rank]]
        outs = vllm.generate(prompts, 2, engine.Sampling(1), seeds)
        assert [(outs[i][1].ids, outs[i][1].logp.tolist()) for i in range(len(outs))] == [(p, [s]) for p, s in wanted[rank]]
        told[rank] = vllm.llm.asked
    assert [told[r] for r in range(6)] == [wanted[0]] * 2 + [wanted[3]] * 2 + [[]] * 2


@pytest.mark.parametrize("settings, ranks, says", [
    ({"engine": "torch"}, "4", "engine_tp: 2 needs engine=vllm: the torch engine is one a rank"),
    ({}, "4", "engine_tp: 2 needs engine=vllm: the torch engine is one a rank"),  # auto, without CUDA
    ({"engine": "vllm"}, "3", "engine_tp: 2 does not divide the 3 ranks of a node"),
    ({"engine": "vllm", "engine_tp": 3}, "3", "engine_tp: 3 does not divide the 4 attention heads"),
])  # fmt: skip
def test_an_engine_that_cannot_be_shared_is_one_line(toy, monkeypatch, settings, ranks, says):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    cfg = Config(**{"engine_tp": 2} | settings)
    run = SimpleNamespace(stages=[("x", cfg)], device=torch.device("cpu"), world=12)  # four nodes of three, say
    with pytest.raises(ValueError) as e:
        engine.make_engine(run, toy, {1})
    assert str(e.value) == says


# --------------------------------------------------------------------------------- what is put back
@pytest.mark.parametrize("asked", [None, "3"])
def test_what_import_vllm_sets_for_the_whole_process_is_put_back(monkeypatch, asked):
    from torch._inductor import config as inductor
    for name in ("TORCHINDUCTOR_COMPILE_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
        if asked:
            monkeypatch.setenv(name, asked)

    def state():
        draws = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        return draws, torch.get_num_threads(), torch.get_float32_matmul_precision(), \
            [os.environ.get(name) for name in ("TORCHINDUCTOR_COMPILE_THREADS", "LOCAL_WORLD_SIZE")]  # fmt: skip

    before, threads = state(), inductor.decide_compile_threads()
    assert threads == int(asked or threads)
    with inductor.patch("compile_threads", threads):
        with process_settings_kept():
            random.seed(1), np.random.seed(1), torch.manual_seed(1)
            torch.set_num_threads(before[1] + 1)
            torch.set_float32_matmul_precision("medium")
            os.environ["TORCHINDUCTOR_COMPILE_THREADS"], inductor.compile_threads = "1", 1
            os.environ["LOCAL_WORLD_SIZE"] = "1"
        assert state() == before and inductor.compile_threads == threads


# --------------------------------------------------------------------------- what becomes of errors
class Counted(ValueError):
    """As pydantic's ValidationError, whose first line says nothing."""

    def __str__(self):
        return "1 validation error for VllmConfig\n  Value error, no Triton"

    def errors(self):
        return [{"msg": "Value error, no Triton"}]


def start(monkeypatch, device, error):
    def LLM(**settings):
        raise error

    monkeypatch.setattr(engine, "import_vllm", lambda cuda: (LLM, None))
    monkeypatch.setattr(engine.dist, "get_rank", lambda: 0)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine sets these: put back after the test
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    VLLMEngine(Config(), "some/model", torch.device(device), torch.bfloat16, {1}, 128, 0.5)


def test_free_blocks_go_back_to_the_driver_before_the_kv_cache_is_allocated(monkeypatch):
    calls, vllm = [], VLLMEngine.__new__(VLLMEngine)
    vllm.shard = 0, 1, 1
    model = SimpleNamespace(named_parameters=dict, load_weights=lambda named: calls.append("weights") or [])
    driver = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=SimpleNamespace(model=model)))
    vllm.llm = SimpleNamespace(llm_engine=SimpleNamespace(model_executor=driver), reset_prefix_cache=lambda: True,
                               wake_up=lambda tags: calls.append(*tags))  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty_cache"))
    vllm.sync(iter([]))
    assert calls == ["weights", "empty_cache", "kv_cache"] and vllm.ready


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("error, says", [(ValueError("too\nlong"), "too"), (Counted(), "Value error, no Triton")])
def test_what_vllm_says_of_the_configuration_is_one_line(monkeypatch, device, error, says):
    with pytest.raises(ValueError) as e:
        start(monkeypatch, device, error)
    assert str(e.value) == f"engine=vllm: vLLM cannot serve model 'some/model': {says}"


@pytest.mark.parametrize("error", [RuntimeError("NCCL"), torch.OutOfMemoryError("no memory"), OSError("disk")])
def test_on_cuda_every_other_error_of_vllm_comes_through_whole(monkeypatch, error):
    with pytest.raises(type(error)) as e:
        start(monkeypatch, "cuda", error)
    assert e.value is error
    with pytest.raises(ValueError, match="vLLM cannot serve model"):
        start(monkeypatch, "cpu", error)


# ----------------------------------------------------------------------------------- how a run ends
SCRIPT = """
import atexit, os, sys, types
import torch
from lib.ranks import leave
torch.cuda.is_available = lambda: {cuda}
if {vllm}:
    sys.modules["vllm"] = types.ModuleType("vllm")
atexit.register(os._exit, 134)      # a finalizer that aborts
def main():
    print("done")
    {last}
leave(main)
"""


@pytest.mark.parametrize(
    "cuda, vllm, last, code",
    [(True, True, "return 0", 0), (True, True, "raise RuntimeError('no update was made')", 134),
     *(pytest.param(*case, marks=pytest.mark.slow) for case in (
         (True, True, "return 2", 2), (True, False, "return 0", 134), (False, True, "return 0", 134)))],
)  # fmt: skip
def test_a_finished_run_on_cuda_exits_0_whatever_the_finalizers_of_vllm_do(cuda, vllm, last, code):
    script = SCRIPT.format(cuda=cuda, vllm=vllm, last=last)
    env = os.environ | {"PYTHONPATH": str(ROOT), "WORLD_SIZE": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == code
    assert code == 134 or done.stdout == "done\n", "what was printed is not lost"
    assert ("no update was made" in done.stderr) == ("raise" in last), "a failed run shows its traceback"
