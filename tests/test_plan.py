"""tools/plan.py: arithmetic against hand-computed and published numbers, and against what a run does."""
import json
import os
import re
from dataclasses import replace
from unittest.mock import patch

import pytest
from conftest import ROOT
from test_memory import CONFIG_7B, DENSE, PUBLISHED, SMALL, qwen_7b
from transformers import Qwen3MoeConfig

import cure
import eval as evaluation
from lib import checkpoint, toy
from lib.config import load_config
from lib.memory import (
    GIB,
    GPUS,
    adapter_parameters,
    engine_room,
    engine_share,
    forward_flops,
    model_sizes,
    trainer_memory,
)
from tools import bench, plan


@pytest.fixture(scope="module")
def folder_7b(tmp_path_factory):
    """A folder with the 7B's config.json and nothing else."""
    folder = tmp_path_factory.mktemp("7b")
    qwen_7b().save_pretrained(folder)
    return str(folder)


LARGE = ["activation_checkpointing=true", "micro_batch_tokens=16384"]


def planned(*overrides, config=None):
    """(stages, Given) of the 7B config as the command line gives them, without a file of the model."""
    with patch.object(plan, "load_hf_config", lambda path: config or qwen_7b()):
        return plan.arguments(["--config", CONFIG_7B, *overrides])


def stages(*overrides):
    return planned(*overrides)[0]


def report(*overrides, config=None):
    return plan.report(*planned(*overrides, config=config))


def phases(*overrides, stage=0):
    """{name: Phase} of one step of a stage."""
    todo, given = planned(*overrides)
    return {p.name: p for p in plan.step_phases(todo[stage][1], given)}


def given(name="h100", world=8, **changes):
    return plan.Given(qwen_7b(), GPUS[name], world)._replace(**changes)


# ------------------------------------------------------------------------------------------------- tokens and seconds
def test_the_published_numbers_of_7b_on_8_h100():
    p = phases("response=1000", "activation_checkpointing=false", "packing=flat")
    assert p["update"].flops == pytest.approx(406e15, rel=0.03)
    assert p["update"].expected == pytest.approx(128, rel=0.03)                  # at 40 %
    assert 34 < p["old log-probs"].expected < 49
    assert 17 < p["entropy pass"].expected < 24
    assert 25 < p["generate base"].floor + p["generate branches"].floor < 35


def test_tokens_of_a_step_by_hand():
    p = phases("response=800", "packing=flat")
    assert p["generate base"].sequences == p["entropy pass"].sequences == 1024 * 4
    assert p["generate base"].generated == 4096 * 800
    assert p["generate base"].tokens == 4096 * 800 + 1024 * 180  # a prompt is read once for its four responses
    assert p["entropy pass"].tokens == 4096 * (180 + 800 - 1)
    assert p["generate branches"].generated == p["generate branches"].tokens == 12288 * 400
    # what a branch inherited is read in every pass and generated in none
    assert p["old log-probs"].tokens == p["update"].tokens == 2048 * 979 + 6144 * (180 + 400 + 400 - 1)
    assert p["old log-probs"].generated == p["update"].generated == 0
    todo, given = planned("response=800")                                        # what the prefix cache saves
    branches = plan.batches(todo[0][1], 800)[2][1]
    lone = plan.decode_phase("x", todo[0][1], given, branches, 2, 2048)
    assert lone.tokens - p["generate branches"].tokens == 4096 * 580 and lone.expected > p["generate branches"].expected
    assert lone.generated == p["generate branches"].generated


@pytest.mark.parametrize("fork, tokens", [(0.5, 2048 * 979 + 6144 * 399), (0.3, 2048 * 979 + 6144 * 559)])
def test_in_brooms_what_branches_share_is_forwarded_once(fork, tokens):
    flat, broom = (phases("response=800", f"packing={x}", f"fork={fork}") for x in ("flat", "broom"))
    for name, parts in broom.items():
        if name not in ("old log-probs", "update"):
            assert parts == flat[name], "sampling and the entropy pass, which has no branches yet, are the same"
    assert broom["update"].tokens == broom["old log-probs"].tokens == tokens
    depth = round(800 * fork)
    saved = 6144 * forward_flops(qwen_7b(), [180 + depth], 0)
    assert broom["old log-probs"].flops == flat["old log-probs"].flops - saved
    assert broom["update"].flops == flat["update"].flops - 3 * saved
    text = report("response=800", f"fork={fork}")
    every = 8192 * 979
    assert f"{tokens} tokens forwarded ({tokens / every:.2f} of flat rows), {2048 * 800 + 6144 * (800 - depth)}" in text
    for alone in ("critical=none", "clause=last"):  # a plain resample, another context: nothing is shared
        assert phases(alone)["update"] == phases(alone, "packing=flat")["update"]
    assert phases(stage=1)["update"] == phases("packing=flat", stage=1)["update"]


def test_settings_that_change_the_work_change_the_phases():
    names = list(phases())
    assert names == ["generate base", "entropy pass", "generate branches", "old log-probs", "update"]
    assert list(phases(stage=1)) == ["generate base", "old log-probs", "update"]
    assert "entropy pass" not in phases("critical=none")
    assert list(phases("stages.stage1.kind=sft")) == ["update"]
    cut = phases("stages.stage1.max_prompt_tokens=400")["generate branches"]
    assert cut.generated == 12288 * (1000 - 220)  # a prefix never passes the prompt budget
    few = phases("prompts_per_round=256")
    assert few["generate base"].sequences == 4 * 256 * 4  # four rounds until half of them make 512
    chunked, whole = (phases(f"prompts_per_round={n}")["generate base"] for n in (128, 1024))
    assert chunked.sequences == whole.sequences and chunked.flops == whole.flops    # 8 chunks of 128 prompts, 1 of 1024
    assert chunked.floor > 2 * whole.floor  # weights are read for fewer sequences
    surplus = phases("prompts_per_step=320", "prompts_per_round=250")["generate base"]
    assert surplus.sequences == 3 * 250 * 4  # 640 prompts are needed: 3 of 4 chunks
    starved = phases("prompts_per_round=256", "max_rounds=2")
    assert starved["update"].sequences == 256 * 16


def test_a_method_that_surveys_the_minibatch_costs_a_pass():
    cov, one = (phases("method=kl_cov", f"prompts_per_minibatch={n}") for n in (32, 512))
    print(f"survey pass at 7B: {cov['survey pass'].expected:.1f} s of {cov['update'].expected:.1f} s of update")
    assert cov["survey pass"].sequences == 8192 * 15 // 16                          # all minibatches but the first
    assert cov["survey pass"].floor == pytest.approx(cov["old log-probs"].floor * 15 / 16) and "survey pass" not in one
    assert "survey pass" not in phases("method=entropy_bonus")


def test_adapters_save_the_products_of_frozen_weights_gradients_and_most_of_what_is_reduced():
    """Qwen2.5-7B, rank 32, blocks not checkpointed: 3 forwards less the weights of blocks and head once, plus 3 products
    of the adapters. The reference is the model without adapters."""
    full, lora = (phases(f"lora_rank={r}", "activation_checkpointing=false", "method=kl") for r in (0, 32))
    count = 28 * 32 * (4 * 3584 + 2 * (3584 + 512) + 3 * (3584 + 18944))
    assert adapter_parameters(qwen_7b(), 32) == count
    tokens, losses, linear = full["update"].tokens, 2048 * 1000 + 6144 * 500, model_sizes(qwen_7b()).linear
    head, first = 2 * 152064 * 3584 * losses, 2 * 3584 * (3584 + 2 * 512 + 3 * 32) * tokens
    assert lora["old log-probs"].flops == full["old log-probs"].flops + 2 * count * tokens
    assert lora["reference log-probs"] == full["reference log-probs"]
    assert lora["update"].flops == full["update"].flops - 2 * linear * tokens - head - first + 6 * count * tokens
    assert lora["update"].expected == pytest.approx((lora["update"].flops + head) / 8 / 989e12 / 0.4)
    assert lora["generate base"].flops == full["generate base"].flops, "the engine has the merged weights"
    again = phases("lora_rank=32", "activation_checkpointing=true")["update"]
    assert again.expected == pytest.approx((again.flops + lora["old log-probs"].flops) / 8 / 989e12 / 0.4)
    # over a slow link: the model's bf16 weights twice, bf16 adapters twice, and fp32 gradients of adapters alone
    cfg = stages("micro_batch_tokens=4096", "lora_rank=32")[0][1]
    slow = plan.step_phases(cfg, given(gpu=GPUS["h100"]._replace(link=1e8)))[-1]
    micro = 16 * -(-slow.tokens // (16 * 8 * 4096))
    assert slow.expected == pytest.approx(micro * (4 * 7_615_616_512 + 8 * count) * 7 / 8 / 1e8)


def test_checkpointing_and_the_chunked_head_cost_seconds_but_no_useful_flops():
    plain, again = (phases(f"activation_checkpointing={x}")["update"] for x in ("false", "true"))
    assert plain.flops == again.flops
    scored = phases()["old log-probs"]
    assert again.flops == 3 * scored.flops and again.expected == pytest.approx(4 * scored.expected)
    head = 2 * 3584 * 152064 * (2048 * 1000 + 6144 * 500)
    assert plain.expected == pytest.approx((3 * scored.flops + head) / 8 / 989e12 / 0.4)


def test_decoding_by_hand():
    """One GPU, 512 sequences, which fit at once: 100 steps, each reads all weights but the embedding, and all cache."""
    cfg = stages("stages.stage1.max_prompt_tokens=64", "stages.stage1.max_response_tokens=100")[0][1]
    config, batch = qwen_7b(num_hidden_layers=2), plan.Batch(512, 40, 100)
    s, alone = model_sizes(config), given(world=1, config=config)
    p = plan.decode_phase("x", cfg, alone, batch, 1, 0)
    steps = 100 * 2 * (s.params - 152064 * 3584 - 3584)
    cache = sum(512 * (40 + t) * s.kv_bytes for t in range(1, 101))
    assert p.flops == 512 * (forward_flops(config, [140], 100) - forward_flops(config, [40], 0))
    assert p.floor == pytest.approx(max(p.flops / 989e12, (steps + cache) / 3.35e12))
    doubled = plan.decode_phase("x", cfg, alone, batch._replace(count=2048), 1, 0)
    weights = (steps + cache) + steps + 3 * cache                                # twice the slots: twice the steps
    assert doubled.floor == pytest.approx(max(4 * p.flops / 989e12, weights / 3.35e12))


def test_decoding_over_two_gpus_by_hand():
    """The two read half of weights and cache each, for all sequences of both, and send what they add up."""
    cut = ["stages.stage1.max_prompt_tokens=64", "stages.stage1.max_response_tokens=100"]
    (_, cfg), (_, shared) = stages(*cut)[0], stages(*cut, "gpus=2", "engine_tp=2")[0]
    config, batch = qwen_7b(num_hidden_layers=2), plan.Batch(512, 40, 100)
    one = plan.decode_phase("x", cfg, given(world=1, config=config), batch, 1, 128)
    two = plan.decode_phase("x", shared, given(world=2, config=config), batch, 1, 128)
    assert two[:5] == one[:5] and two.floor == pytest.approx(one.floor / 2)
    # an all-reduce over two GPUs sends once what it adds up: 2 blocks, 2 of them in each, bf16; half of the fp32 logits
    sent = (512 * 100 + 128 * 40) * 2 * 2 * 2 * 3584 + 512 * 100 * 4 * 152064 / 2
    assert two.expected == pytest.approx(one.expected / 2 + sent / 450e9)
    four = plan.decode_phase("x", shared, given(world=4, config=config), batch._replace(count=1024), 1, 256)
    assert four.floor == pytest.approx(two.floor) and four.expected == pytest.approx(two.expected)


def test_a_slow_link_shows_only_where_it_is_slower_than_the_computation():
    slow = GPUS["h100"]._replace(link=1e9)
    cfg = stages("micro_batch_tokens=4096")[0][1]
    fast = plan.step_phases(cfg, given())[-1]
    late = plan.step_phases(cfg, given(gpu=slow))[-1]
    micro = 16 * -(-fast.tokens // (16 * 8 * 4096))
    assert late.expected == pytest.approx(micro * 8 * 7_615_616_512 * 7 / 8 / 1e9)
    assert late.expected > fast.expected and late.floor == fast.floor
    alone = plan.step_phases(cfg, given(gpu=slow, world=1))[-1]
    assert alone.expected == pytest.approx(8 * fast.expected)                    # nothing to send to


def test_a_faster_or_a_second_gpu_is_faster():
    one, two = (sum(p.expected for p in phases(f"gpus={n}").values()) for n in (8, 16))
    assert 0.45 < two / one < 0.6
    times = [sum(p.expected for p in phases(f"gpu={g}").values()) for g in ("h200", "h100", "a100")]
    assert times == sorted(times)


# ---------------------------------------------------------------------------------------------------- memory and disk
def test_memory_of_7b_by_hand():
    peaks = plan.memory(stages(*LARGE)[0][1], given())
    n, gib = 7_615_616_512, 79.1 * GIB
    for parts in peaks.values():
        assert sum(parts.values()) == pytest.approx(gib)
        assert parts["fp32 weights"] == 4 * n / 8 and parts["Adam moments"] == 8 * n / 8
        assert parts["gathered weights"] == 2 * (2 * 152064 * 3584 + 3584 + 2 * 233_057_792)
        assert parts["logit chunks"] == 3 * 1024 * 152064 * 4
    awake, asleep = peaks["awake"], peaks["asleep"]
    share = sum(awake[k] for k in ("engine weights", "KV cache", "engine workspace", "CUDA graphs"))
    assert awake["engine weights"] == 2 * n and awake["gradients"] == 0 and awake["free"] >= 0
    assert share == pytest.approx(0.73 * gib, rel=1e-4)                          # all that is left, in whole per cent
    assert asleep["engine weights"] == asleep["KV cache"] == 0 and asleep["gradients"] == 4 * n / 8
    assert asleep["activations"] == 16384 * 3584 * (28 * 2 + 8)                 # with checkpointing: block inputs
    assert asleep["gradient buffers"] == 10 * 152064 * 3584


def test_a_copy_a_node_takes_the_memory_of_one_node_and_half_its_time():
    one, two = planned("gpus=8"), planned("gpus=16", "replicate=2")
    parts = [plan.memory(plan.widest(todo), given) for todo, given in (one, two)]
    assert parts[0] == parts[1] and len({re.search("host memory: .*", plan.report(*x))[0] for x in (one, two)}) == 1
    needs = [[w for w in plan.warnings(todo, given._replace(host=48)) if "host memory" in w] for todo, given in (one, two)]
    assert needs[0] == needs[1] != []
    hours = [plan.stage_report(*todo[0], given)[1] for todo, given in (one, two)]
    assert hours[1] == pytest.approx(hours[0] / 2, rel=0.05)  # decoding reads all weights for half the sequences
    slow = [phases("gpu=l40s", *changes)["update"].expected for changes in (["gpus=16"], ["gpus=16", "replicate=2"])]
    assert slow[1] == pytest.approx(slow[0] * (7 / 8) / (15 / 16), rel=1e-6), "traffic over PCIe, within a copy"


def test_a_model_that_stays_resident_counts_in_plan_and_share():
    """The bf16 weights of a frozen reference model on every GPU."""
    cfg, config, gpu, frozen = stages(*LARGE)[0][1], qwen_7b(), GPUS["h100"], 2 * 7_615_616_512
    for alone, beside in zip(trainer_memory(cfg, config, 8), trainer_memory(cfg, config, 8, frozen), strict=True):
        assert beside == alone | {"frozen models": frozen}
    (share, line), (less, other) = engine_share(cfg, config, 8, gpu), engine_share(cfg, config, 8, gpu, frozen)
    assert (share - less) * gpu.memory * GIB == pytest.approx(frozen, abs=0.01 * gpu.memory * GIB)         # shares are whole per cent
    assert "trainer keeps 10.6" in line and "trainer keeps 24.8" in other
    with pytest.raises(ValueError, match="^gpu_memory_utilization: 0.73 is too much, set at most 0.55"):
        engine_share(replace(cfg, gpu_memory_utilization=share), config, 8, gpu, frozen)
    peaks, more = plan.memory(cfg, given()), plan.memory(cfg, given(frozen=frozen))
    assert more["asleep"]["free"] == peaks["asleep"]["free"] - frozen
    assert more["awake"]["KV cache"] == pytest.approx(peaks["awake"]["KV cache"] - frozen, abs=0.01 * gpu.memory * GIB)
    todo = stages(*LARGE, "gpus=1", "gpu=h200")
    assert about(plan.report(todo, given("h200", 1)), "awake") is None
    assert about(plan.report(todo, given("h200", 1, frozen=2 * frozen)), "awake")[-1] == "gpus=2"


@pytest.mark.parametrize("save_every, keep, max_steps", [
    (20, 2, 0), (0, 2, 0), (50, 1, 0), (30, 3, 75), (7, 2, 310),
])  # fmt: skip
def test_disk_is_what_the_run_would_leave(tmp_path, save_every, keep, max_steps):
    """Against checkpoint.prune on folders with a file of 12 bytes for state and one of 2 for hf."""
    settings = [f"save_every={save_every}", f"keep_ckpts={keep}", f"max_steps={max_steps}"]
    todo, step, most = load_config(["--config", CONFIG_7B, *settings]), 0, 0

    def size():
        return sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file() and f.parent.name in ("state", "hf"))

    for _, cfg in todo:
        for i in range(1, cfg.steps + 1):
            if cfg.max_steps and step >= cfg.max_steps:
                break
            step += 1
            if i == cfg.steps or step == cfg.max_steps or save_every and i % save_every == 0:
                folder = tmp_path / "ckpt" / f"step_{step:06d}"
                for part, n in (("state", 12), ("hf", 2)):
                    (folder / part).mkdir(parents=True)
                    (folder / part / "x").write_bytes(b"x" * n)
                (folder / "SHA256SUMS").touch()
                (folder / "meta.json").write_text(json.dumps({"stage_done": i == cfg.steps}))
                most = max(most, size())
                checkpoint.prune(str(folder.parent), folder.name, keep)
    n = model_sizes(DENSE["tied"]).params
    assert plan.disk(stages(*settings), DENSE["tied"]) == (14 * n, most * n, size() * n)


# ----------------------------------------------------------------------------------------------------------- warnings
def about(text, peak):
    """The changes that the WARNING about a peak proposes, or None without such a warning."""
    start = {"awake": "WARNING: log-prob passes beside the engine", "asleep": "WARNING: the update"}[peak]
    line = next((x for x in text.splitlines() if x.startswith(f"{start} will not fit")), None)
    return line and line.rpartition(": ")[2].split(" | ")


def test_fewer_copies_and_a_frozen_model_over_more_gpus_are_remedies():
    assert "replicate=2" in about(report("gpus=16", "replicate=16"), "asleep")
    narrow = "method=kl", "gpus=1", "micro_batch_tokens=8192"
    assert "gpus=16" in about(report(*narrow), "asleep") and "gpus=2" in about(report(*narrow), "awake")


@pytest.mark.parametrize("peak, overrides, keys", [
    ("asleep", ["activation_checkpointing=false"], {"activation_checkpointing", "micro_batch_tokens"}),
    ("asleep", ["gpus=1", "gpu=rtx4090"], {"gpus"}),
    ("awake", ["gpus=1", "gpu=rtx4090"], {"gpu"}),
    ("awake", ["gpus=4", "gpu=l40s"], {"gpus"}),
    ("awake", ["gpus=1"], {"gpus"}),
    ("awake", ["gpu_memory_utilization=0.9"], {"gpu_memory_utilization"}),
    ("awake", ["gpu_memory_utilization=0.1"], {"gpu_memory_utilization"}),
    ("awake", ["micro_batch_tokens=500000"], {"micro_batch_tokens"}),
])  # fmt: skip
def test_what_does_not_fit_is_said_with_changes_that_mend_it(peak, overrides, keys):
    overrides = [*LARGE, *overrides]
    changes = about(report(*overrides), peak)
    assert keys <= {c.split("=")[0] for c in changes}
    for change in changes:
        assert about(report(*overrides, *change.split()), peak) is None, change
        key, _, value = change.partition("=")
        if key == "micro_batch_tokens":                                          # and it is no lower than it must be
            more = f"{key}={int(value) + 1024}"
            assert about(report(*overrides, more), peak), more


def test_the_32b_with_lora_fits_on_8_gpus_where_two_share_an_engine():
    """Qwen2.5-32B with the settings of the LoRA config: the engine's weights alone take 61 of a GPU's 79 GiB."""
    config = qwen_7b(hidden_size=5120, num_hidden_layers=64, num_attention_heads=40, num_key_value_heads=8,
                     intermediate_size=27648)  # fmt: skip
    lora = ["lora_rank=32", "micro_batch_tokens=8192", "activation_checkpointing=true"]
    assert model_sizes(config).params == 32_763_876_352
    assert about(report(*lora, config=config), "awake") == ["engine_tp=2"]
    text = report(*lora, "engine_tp=2", config=config)
    assert "WARNING" not in text and "for the 2 GPUs of an engine together" in text
    todo, where = planned(*lora, "engine_tp=2", config=config)
    parts = plan.memory(todo[0][1], where)["awake"]
    assert parts["engine weights"] == 32_763_876_352 and parts["frozen models"] == 2 * 32_763_876_352 / 8
    tokens = engine_room(todo[0][1], config, 8, GPUS["h100"])[2]
    assert parts["KV cache"] == tokens * 64 * 2 * 2 * 4 * 128, "4 of 8 kv heads on each"
    assert parts["free"] == pytest.approx(0, abs=0.01 * 79.1 * GIB) and parts["free"] >= 0


def test_the_shipped_7b_config_fits_without_a_warning():
    assert "WARNING" not in report()


def test_the_run_refuses_where_the_parts_of_the_plan_add_up_to_too_much():
    cfg, refused = stages()[0][1], 0
    for gpu in GPUS.values():
        for world in (1, 2, 4, 8):
            over = plan.memory(cfg, given(gpu=gpu, world=world))["awake"]["free"] < 0
            refused += over
            if over:
                with pytest.raises(ValueError, match="^model: does not fit"):
                    engine_share(cfg, qwen_7b(), world, gpu)
            else:
                engine_share(cfg, qwen_7b(), world, gpu)
    assert 0 < refused < 20


def test_a_context_that_is_too_small_is_said_with_the_value_that_fits():
    config = qwen_7b(max_position_embeddings=4000)
    lines = [x for x in report(config=config).splitlines() if x.startswith("WARNING")]
    assert len(lines) == 2 and "4000" in lines[0]                                # both stages take 4096
    changes = [x.rpartition(": ")[2] for x in lines]
    assert changes == ["stages.stage1.max_response_tokens=2500", "stages.stage2.max_response_tokens=3488"]
    assert "WARNING" not in report(*changes, config=config)


def test_a_dtype_that_a_gpu_refuses_is_said():
    assert "dtype=auto" in report("dtype=float32")


def test_a_model_the_arithmetic_does_not_hold_for_is_refused_by_name():
    moe = Qwen3MoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)
    with pytest.raises(ValueError, match="^model: 'qwen3_moe' is not dense"):
        report(config=moe)
    from transformers import GPT2Config
    with pytest.raises(ValueError, match="^model: 'gpt2' is no llama-like decoder"):
        report(config=GPT2Config(n_layer=1, n_embd=8, n_head=2))


def test_a_reference_beside_adapters_takes_no_memory():
    frozen = [planned("method=kl", f"lora_rank={r}")[1].frozen for r in (0, 32)]
    assert frozen == [2 * 7_615_616_512 / 8, 0]
    assert planned("method=kl", "gpus=16", "replicate=2")[1].frozen == 2 * 7_615_616_512 / 8, "of a copy"


SINGLE = {"qwen2.5-0.5b-24gb": bench.shape_config("0.5b"), "qwen2.5-1.5b-24gb-lora": bench.shape_config("1.5b"),
          "qwen2.5-7b-1gpu-lora": qwen_7b(), "qwen3-4b-1gpu-lora": PUBLISHED["Qwen3-4B"]}  # fmt: skip


@pytest.mark.parametrize("name", SINGLE)
def test_a_config_of_a_single_gpu_quotes_its_plan_which_fits(name):
    header = (ROOT / f"configs/{name}.yaml").read_text().split("\n# Time")[0]
    command, *quoted = re.search(r"^# The plan: python -m tools\.plan (.*(?:\n#   .*)*)$", header, re.M)[1].split("\n#   ")
    with patch.object(plan, "load_hf_config", lambda path: SINGLE[name]):
        text = plan.report(*plan.arguments(command.replace("configs/", f"{ROOT}/configs/").split()))
    assert len(quoted) == 4 and [line for line in quoted if line not in text.splitlines()] == []
    assert "WARNING" not in text


# -------------------------------------------------------------------------------------------------------- the command
@pytest.fixture
def nothing_else(monkeypatch):
    """Whatever starts work is an error."""
    def no(*args, **kwargs):
        raise AssertionError("a plan started something")
    for name in ("lib.run.prepare_run", "lib.weights.load_lm", "lib.toy.make_toy"):
        monkeypatch.setattr(name, no)
    monkeypatch.setattr("torch.distributed.init_process_group", no)


@pytest.mark.parametrize("file", sorted(p.name for p in (ROOT / "configs").glob("*.yaml")))
def test_every_config_has_a_plan(file, folder_7b, tmp_path, monkeypatch, capsys, nothing_else):
    monkeypatch.chdir(tmp_path)
    toy = file.startswith("toy")
    argv = ["model=toy", "eval_data=toy"] if toy else [f"model={folder_7b}"]
    assert plan.main(["--config", str(ROOT / "configs" / file), *argv]) == 0
    text = capsys.readouterr().out
    assert ("0.43 M parameters" if toy else "7615.62 M parameters") in text
    for name, cfg in load_config(["--config", str(ROOT / "configs" / file), *argv]):
        assert f"{name}, one of {cfg.steps} steps" in text
    assert not list(tmp_path.rglob("*"))                                         # no run folder, no toy


def test_a_toy_that_is_there_is_read(tmp_path, monkeypatch, capsys, nothing_else):
    config = toy.toy_config()
    config.intermediate_size = 999
    config.save_pretrained(tmp_path)
    monkeypatch.setitem(toy.BEDS, "toy", toy.BEDS["toy"]._replace(folder=str(tmp_path)))
    assert plan.main(["--config", str(ROOT / "configs/toy.yaml")]) == 0
    assert f"{model_sizes(config).params / 1e6:.2f} M parameters" in capsys.readouterr().out


def test_the_plan_of_max_steps_is_of_those_steps():
    text = report("max_steps=320")
    assert "stage1, one of 300 steps" in text and "stage2, one of 20 steps" in text


@pytest.mark.parametrize("overrides, key", [
    (["gpu=b200"], "gpu"), (["gpus=0"], "gpus"), (["gpus=many"], "gpus"), (["gpu"], "gpu"),
    (["response=5000"], "response"), (["response=-1"], "response"), (["model=/no/such/folder"], "model"),
    (["stages.stage1.gpus=4"], "gpus"), (["plan_gpus=4"], "plan_gpus"), (["replicate=3"], "replicate"),
    (["engine_tp=8"], "engine_tp"),
    (["engine_tp=2", "gpus=1"], "engine_tp"),
])  # fmt: skip
def test_mistakes_are_one_line_that_names_the_key(overrides, key, folder_7b, capsys, nothing_else):
    with pytest.raises(SystemExit) as e:
        plan.main(["--config", CONFIG_7B, f"model={folder_7b}", *overrides])
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.startswith(f"error: {key}: ") and err.count("\n") == 1


@pytest.mark.parametrize("script", [cure, evaluation], ids=["cure", "eval"])
def test_a_run_has_no_setting_of_the_plan(script, capsys, nothing_else):
    for key in ("dry_run", "gpu", "gpus", "response"):
        with pytest.raises(SystemExit):
            script.main(["--config", CONFIG_7B, f"{key}=1", "eval_data=x.jsonl"])
        assert f"error: {key}: no such key" in capsys.readouterr().err


def test_ranks_print_the_plan_once(folder_7b, capsys, monkeypatch, nothing_else):
    monkeypatch.setitem(os.environ, "RANK", "1")
    assert plan.main(["--config", CONFIG_7B, f"model={folder_7b}"]) == 0
    assert capsys.readouterr().out == ""


def test_the_cache_holds_the_sequences_the_plan_says():
    cfg = stages()[0][1]
    tokens = engine_room(cfg, qwen_7b(), 8, GPUS["h100"])[2]
    assert f"{tokens} tokens = {tokens // 4096} sequences of 4096" in report()


def test_the_7b_configs_differ_in_the_method_only_and_fit(folder_7b, capsys):
    """CURE, its control DAPO and 80/20: equal optimizer steps and groups, so that runs can be compared."""
    for name in ("", "-dapo", "-8020"):
        argv = ["--config", str(ROOT / f"configs/qwen2.5-math-7b{name}.yaml"), f"model={folder_7b}"]
        configs = [c for _, c in load_config(argv)]
        assert sum(c.steps for c in configs) == 400
        common = {(c.group_size, c.prompts_per_step, c.prompts_per_minibatch, c.lr) for c in configs}
        assert common == {(16, 512, 32, 1e-6)}
        assert plan.main(argv) == 0 and "WARNING" not in capsys.readouterr().out


def test_the_longest_stage_is_planned_with_the_most_branches_of_any():
    longest, other = stages()[0][1], stages()[0][1]
    longest = replace(longest, n2=0, max_response_tokens=other.max_response_tokens + 1)
    cfg = plan.widest([("a", other), ("b", longest)])
    assert cfg.max_response_tokens == longest.max_response_tokens and cfg.n2 == other.n2 > 0


def test_host_memory_by_hand_and_its_warning(monkeypatch):
    """8 ranks: 5 GiB each. A checkpoint: two copies of a piece each, or rank 0's bf16 weights, whichever is more."""
    n, gib = 7_615_616_512, 2**30
    start, save = plan.host(qwen_7b(), 8)
    assert start == 40 * gib + 2 * 152064 * 3584 and save == 40 * gib + 2 * n
    assert plan.host(qwen_7b(), 32)[1] == 160 * gib + 2 * 32 * 2**29, "32 pieces of 512 MiB, twice, are more"
    assert plan.host(qwen_7b(), 1)[1] == 5 * gib + 2 * n, "a piece is at least one tensor: the head's 2.2 GB"
    assert plan.host(qwen_7b(), 1, 32)[1] == 5 * gib + 2 * n, "hf/ is the model"
    assert plan.host(qwen_7b(), 32, 32)[1] == 160 * gib + 2 * n, "32 pieces of state are the adapters', and less"
    assert "host memory: 41 GiB at the start, 54 GiB while a checkpoint is written" in plan.report(stages(), given())
    assert "take 54 GiB of host memory, there are 48" in plan.report(stages(), given(host=48))
    assert "WARNING" not in plan.report(stages(), given(host=64))
    assert plan.arguments(["--config", CONFIG_7B, "model=toy", "host=48"])[1].host == 48
    assert plan.arguments(["--config", CONFIG_7B, "model=toy"])[1].host == 0, "a plan for another machine"
    monkeypatch.setattr(plan.torch.cuda, "is_available", lambda: True)
    assert 1 < plan.arguments(["--config", CONFIG_7B, "model=toy"])[1].host < 1e5
