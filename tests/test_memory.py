"""lib/memory.py: arithmetic against hand-computed numbers, and against what torch counts and keeps on real models."""
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, ragged
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from lib import memory
from lib.config import load_config
from lib.lora import adapt
from lib.memory import adapter_parameters, forward_flops, model_sizes, train_flops, trainer_memory, utilisation
from lib.policy import PackedLM, pack, packed_length
from rollout import Rollout
from tools import bench

CONFIG_7B = str(ROOT / "configs/qwen2.5-math-7b.yaml")


def qwen_7b(**changes):
    """The shape of Qwen2.5-Math-7B."""
    shape = {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
             "intermediate_size": 18944, "vocab_size": 152064, "max_position_embeddings": 4096}  # fmt: skip
    return Qwen2Config(**shape | {"tie_word_embeddings": False} | changes)


SMALL = {"vocab_size": 53, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": 1}  # fmt: skip
DENSE = {
    "qwen2": Qwen2Config(**SMALL, tie_word_embeddings=False),
    "tied": Qwen2Config(**SMALL, tie_word_embeddings=True),
    "llama": LlamaConfig(**SMALL, tie_word_embeddings=False),
    "qwen3": Qwen3Config(**SMALL, head_dim=24, tie_word_embeddings=True),     # 4 heads of 24: not D / 4
}


def stage_1(**changes):
    """The settings of stage 1 on the 7B, with large micro-batches."""
    large = {"activation_checkpointing": True, "micro_batch_tokens": 16384}
    return replace(load_config(["--config", CONFIG_7B])[0][1], **large | changes)


# -------------------------------------------------------------------------------------------------- FLOPs, parameters
@pytest.mark.parametrize("name", DENSE)
def test_forward_flops_are_those_torch_counts_on_the_packed_forward(name):
    config = DENSE[name]
    lm = AutoModelForCausalLM.from_config(config, attn_implementation="packed")
    rows = ragged(5, 0, 53)
    lengths = [packed_length(r) for r in rows]
    # the plain attention kernel is two bmm a block, n x n: causal attention is n (n + 1) / 2 of them
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        PackedLM(lm, 16)(**pack(rows, "cpu"), temperature=1.0)
    counts = {str(op).split(".")[-1]: n for op, n in counter.get_flop_counts()["Global"].items()}
    heads = sum(len(r.response_ids) for r in rows)
    causal = counts["bmm"] * sum(n * (n + 1) for n in lengths) // (2 * sum(n * n for n in lengths))
    assert counts.keys() - {"addmm"} == {"mm", "bmm"}
    assert forward_flops(config, lengths, heads) == counts["mm"] + counts.get("addmm", 0) + causal


def adapted(lm, rank, dtype=torch.float32):
    """The model with adapters on its own device, outside of a Policy."""
    for name, value in adapt(lm, rank, 8.0, 0).items():
        layer, _, key = name.rpartition(".")
        lm.get_submodule(layer).register_parameter(key, torch.nn.Parameter(value.to(lm.device, dtype)))
    return lm


@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("name", DENSE)
def test_train_flops_are_those_torch_counts_of_forward_and_backward(name, rank):
    config, rows = DENSE[name], ragged(5, 0, 53)
    lm = AutoModelForCausalLM.from_config(config, attn_implementation="packed")
    lm = adapted(lm, rank) if rank else lm
    lengths, heads = [packed_length(r) for r in rows], sum(len(r.response_ids) for r in rows)
    assert sum(p.numel() for p in lm.parameters() if p.requires_grad) == (adapter_parameters(config, rank) or model_sizes(config).params)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        PackedLM(lm, 16)(**pack(rows, "cpu"), temperature=1.0)[0].sum().backward()
    counts = {str(op).split(".")[-1]: n for op, n in counter.get_flop_counts()["Global"].items()}
    causal = counts["bmm"] * sum(n * (n + 1) for n in lengths) // (2 * sum(n * n for n in lengths))
    again = 2 * model_sizes(config).head * heads                  # the chunked head's second product
    counted = counts["mm"] + counts.get("addmm", 0) + causal - again
    print(f"{name}, rank {rank}: {counted} FLOPs, {counted / forward_flops(config, lengths, heads):.3f} forwards of the model")
    assert train_flops(config, lengths, heads, rank) == counted


def test_flops_grow_with_the_right_power():
    config = qwen_7b()
    one, two = forward_flops(config, [500]), forward_flops(config, [500, 500])
    assert two == 2 * one                                         # sequences do not see each other
    pairs = 4 * 3584 * 28 * 500 * 500
    assert forward_flops(config, [1000]) - two == pairs           # Q K^T and P V between the halves, 28 blocks
    assert forward_flops(config, [500], 100) == one - 400 * 2 * 3584 * 152064
    assert forward_flops(config, []) == 0


def test_parameters_of_7b_by_hand():
    s = model_sizes(qwen_7b())
    products = 2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944               # q and o, k and v, the MLP's three
    assert s.linear == 28 * products
    assert s.block == products + 3584 + 2 * 512 + 2 * 3584                       # biases of q, k, v; two norms
    assert s.root == 2 * 152064 * 3584 + 3584
    assert s.params == 28 * s.block + s.root == 7_615_616_512
    assert s.kv_bytes == 2 * 28 * 512 * 2


def test_a_tied_head_is_one_parameter_and_a_product_all_the_same():
    s, tied = model_sizes(DENSE["qwen2"]), model_sizes(DENSE["tied"])
    assert s.params - tied.params == s.head == tied.head == 53 * 64
    assert forward_flops(DENSE["qwen2"], [9]) == forward_flops(DENSE["tied"], [9])


def test_utilisation_by_hand(monkeypatch):
    """3 forwards, a second and rank; of a peak only where the GPU is known."""
    lengths, config = [50, 70], DENSE["qwen2"]
    flops = 3 * forward_flops(config, lengths, 90) / 4.0 / 2
    monkeypatch.setattr(memory, "peak_flops", lambda: 0)
    assert utilisation(config, lengths, 90, 4.0, 2) == {"perf/tflops": flops / 1e12, "perf/trained_throughput": 90 / 8}
    monkeypatch.setattr(memory, "peak_flops", lambda: 989e12)
    assert utilisation(config, lengths, 90, 4.0, 2)["perf/mfu"] == flops / 989e12
    once = flops - 3 * forward_flops(config, [30], 0) / 4.0 / 2  # a branch whose first 30 tokens its trunk forwards
    assert utilisation(config, lengths, 90, 4.0, 2, [0, 30])["perf/tflops"] == pytest.approx(once / 1e12)
    adapted = train_flops(config, lengths, 90, 4) - train_flops(config, [30], 0, 4)
    assert utilisation(config, lengths, 90, 4.0, 2, [0, 30], 4)["perf/tflops"] == pytest.approx(adapted / 4.0 / 2 / 1e12)


# ------------------------------------------------------------------------------------------------------------- memory
def saved_bytes(config, rows, checkpointing, share=False, rank=0):
    """Bytes that autograd keeps of one packed bf16 forward for the backward, parameters excepted, every storage once.

    On the meta device, where attention goes as on CUDA and no number is computed."""
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config, attn_implementation="packed", dtype=torch.bfloat16)
    lm = adapted(lm, rank, torch.bfloat16) if rank else lm
    if checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
        lm.train()
    own = {x.untyped_storage()._cdata for x in (*lm.parameters(), *lm.buffers())}
    kept = {}

    def note(x):
        kept[x.untyped_storage()._cdata] = x  # keeping x alive keeps the address its own
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out = PackedLM(lm)(**pack(rows, "meta", share=share), temperature=1.0)
        assert out[0].requires_grad
    return sum(x.untyped_storage().nbytes() for key, x in kept.items() if key not in own)


PUBLISHED = {
    "Qwen2.5-0.5B": bench.shape_config("0.5b"), "Qwen2.5-7B": bench.shape_config("7b"),
    "Qwen3-4B": AutoConfig.for_model(
        "qwen3", hidden_size=2560, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        intermediate_size=9728, vocab_size=151936, tie_word_embeddings=True,
    ),
    "Qwen3-8B": AutoConfig.for_model(
        "qwen3", hidden_size=4096, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        intermediate_size=12288, vocab_size=151936, tie_word_embeddings=False,
    ),
    "Llama-3.1-8B": AutoConfig.for_model(
        "llama", hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        intermediate_size=14336, vocab_size=128256, tie_word_embeddings=False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("rank", [0, 32])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", PUBLISHED)
def test_activations_are_those_autograd_keeps(name, checkpointing, rank, monkeypatch):
    lengths, config = [2048] * 7 + [1, 300, 1747], PUBLISHED[name]
    rows = [Rollout([1], [], [1] * n) for n in lengths]
    cfg = stage_1(activation_checkpointing=checkpointing, micro_batch_tokens=sum(lengths), packing="flat", lora_rank=rank)
    monkeypatch.setattr(memory, "HEAD_CHUNK", 10**7)
    # so the largest moment is the head's backward, where all is saved and no block is repeated
    planned, saved = trainer_memory(cfg, config, 1)[1]["activations"], saved_bytes(config, rows, checkpointing, rank=rank)
    print(f"{name}, rank {rank}, {sum(lengths)} tokens: planned {planned / 2**30:.2f} GiB, autograd keeps {saved / 2**30:.2f}")
    assert planned == pytest.approx(saved, rel=0.02)


def test_brooms_keep_gathered_keys_and_values_within_the_planned_bound(monkeypatch):
    """One base response of 801 tokens, 3 branches of 1000 new ones from its last token: as many keys as there can be."""
    base = Rollout([1], [], [1] * 801)
    rows = [base] + [Rollout([1], [1] * 800, [1] * 1000, parent=0, t_star=800) for _ in range(3)]
    tokens = 801 + 3 * 999
    monkeypatch.setattr(memory, "HEAD_CHUNK", 10**7)
    for config in (PUBLISHED["Qwen2.5-7B"], PUBLISHED["Llama-3.1-8B"]):
        planned = trainer_memory(stage_1(micro_batch_tokens=tokens, activation_checkpointing=False), config, 1)[1]["activations"]
        assert 0.9 * planned <= saved_bytes(config, rows, False, share=True) <= planned


def test_peak_memory_is_without_the_pool_of_vllm(monkeypatch):
    pool = SimpleNamespace(get_current_usage=lambda: 55 * 2**30)
    cumem = SimpleNamespace(CuMemAllocator=SimpleNamespace(get_instance=lambda: pool))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 83 * 2**30)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.delitem(sys.modules, "vllm.device_allocator.cumem", raising=False)
    assert memory.peak_memory() == 83
    monkeypatch.setitem(sys.modules, "vllm.device_allocator.cumem", cumem)
    assert memory.peak_memory() == 28


def test_what_vllm_needs_beside_weights_and_cache_by_hand():
    """Qwen2.5-7B on an H100: MLP 1.16 + 0.58 GiB, residual stream 0.22, logits 0.58, penalties 0.58, and the graphs."""
    work, graphs = memory.engine_overhead(qwen_7b(), memory.GPUS["h100"])
    assert work == 16384 * (6 * 18944 + 4 * 3584) + 8 * 1024 * 152064 and work / 2**30 == pytest.approx(3.11, abs=0.01)
    assert graphs == 1.5 * 2**30
    small = memory.engine_overhead(qwen_7b(), memory.GPUS["a100"])[0]
    assert small == 8192 * (6 * 18944 + 4 * 3584) + 8 * 256 * 152064, "vLLM halves its batch there"


def test_what_a_gpu_of_a_shared_engine_holds_by_hand():
    s, config = model_sizes(qwen_7b()), qwen_7b()  # 4 kv heads
    shards = {tp: memory.engine_shard(stage_1(engine_tp=tp), config) for tp in (1, 2, 4, 28)}
    assert shards[1] == (2 * s.params, s.kv_bytes) and shards[2] == (s.params, s.kv_bytes / 2)
    assert shards[4][1] == shards[28][1] == s.kv_bytes / 4 == 2 * 28 * 128 * 2, "a GPU has one kv head at least"
    work = memory.engine_overhead(config, memory.GPUS["h100"], 2)[0]
    assert work == 16384 * (3 * 18944 + 4 * 3584) + 8 * 1024 * 152064, "the MLP is cut, states and logits are not"
    shares = {tp: memory.engine_room(stage_1(engine_tp=tp), config, 8, memory.GPUS["h100"]) for tp in (1, 2)}
    assert shares[1][:2] == shares[2][:2], "what the trainer leaves is the same"
    freed = s.params + 16384 * 3 * 18944
    assert shares[2][2] == pytest.approx(2 * (shares[1][2] + freed / s.kv_bytes), abs=3)


@pytest.mark.parametrize("changes, tp, ranks, says", [
    ({}, 1, 3, ""), ({}, 2, 8, ""), ({}, 4, 8, ""), ({"num_attention_heads": 8, "num_key_value_heads": 1}, 8, 8, ""),
    ({}, 2, 7, "does not divide the 7 ranks of a node"), ({}, 16, 8, "does not divide the 8 ranks of a node"),
    ({}, 8, 8, "does not divide the 28 attention heads"),
    ({"num_attention_heads": 24, "num_key_value_heads": 6}, 4, 8, "does not divide the 6 kv heads"),
    ({"intermediate_size": 18946}, 4, 8, "does not divide the 18946 units of the MLP"),
    ({"num_attention_heads": 24, "num_key_value_heads": 3, "intermediate_size": 18942, "vocab_size": 100}, 3, 9,
     "does not divide the 128 rows of the padded vocabulary"),
])  # fmt: skip
def test_what_cannot_be_cut_over_ranks_is_one_line(changes, tp, ranks, says):
    config = qwen_7b(head_dim=128, **changes)
    assert memory.tp_misfit(tp, config, ranks) == (says and f"engine_tp: {tp} {says}")


@pytest.mark.parametrize("name, entry", [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-80GB", "a100"),
                                         ("NVIDIA GeForce RTX 4090", "rtx4090"), ("NVIDIA H100 PCIe", None)])  # fmt: skip
def test_the_gpu_at_hand_has_its_own_memory_and_the_rates_of_its_kind(name, entry, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1, 77 * 2**30))
    gpu = memory.this_gpu()
    assert gpu.memory == 77 and gpu.flops == (memory.GPUS[entry].flops if entry else 0)
    assert memory.engine_batch(gpu)[0] == (256 if entry == "a100" else 1024)


@pytest.mark.parametrize("vocab, tokens, expected", [
    # activations, logit chunks, gradient buffers by hand for D = 64, I = 160, Q = 64, KV = 32, 3 blocks
    (4000, 500, lambda s: (500 * 64 * (8 + 3 * 2), 3 * 4 * 8 * 4000, 10 * s.head)),  # the head's backward
    (53, 4096, lambda s: (4096 * (64 * (8 + 3 * 2 + 16 + 4 + 2) + 8 * 160), 0, 2 * s.head + 6 * s.block)),  # a block's
    (4000, 100, lambda s: (0, 0, 6 * (2 * 4000 * 64 + 64))),  # the root's, untied
])  # fmt: skip
def test_the_update_peaks_at_the_largest_of_three_moments(vocab, tokens, expected, monkeypatch):
    config = Qwen2Config(**SMALL | {"vocab_size": vocab}, tie_word_embeddings=False)
    cfg = stage_1(micro_batch_tokens=tokens, packing="flat")
    monkeypatch.setattr(memory, "HEAD_CHUNK", 8)
    parts = trainer_memory(cfg, config, 1)[1]
    assert tuple(parts[k] for k in ("activations", "logit chunks", "gradient buffers")) == expected(model_sizes(config))


def test_a_broom_keeps_the_keys_that_its_branches_see_at_most_once_more_for_each():
    config, most = qwen_7b(), {}
    for packing in ("flat", "broom"):
        most[packing] = trainer_memory(stage_1(packing=packing, micro_batch_tokens=4096, activation_checkpointing=False), config, 8)[1]["activations"]
    assert most["broom"] - most["flat"] == 3 * 4 * 512 * 4096 * 28 and most["broom"] < 1.03 * most["flat"]


def test_what_is_sharded_halves_with_twice_the_gpus_and_the_rest_stays():
    cfg = stage_1()
    for few, many in zip(trainer_memory(cfg, qwen_7b(), 8), trainer_memory(cfg, qwen_7b(), 16), strict=True):
        sharded = {k for k in few if few[k] == 2 * many[k] > 0}
        assert sharded <= {"fp32 weights", "Adam moments", "gradients"} and len(sharded) >= 2
        assert all(few[k] == many[k] for k in few.keys() - sharded)
