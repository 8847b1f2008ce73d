"""plan.py: arithmetic against hand-computed numbers, against what torch counts on the real model, and against itself."""
import json
import os
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, ragged
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

import cure
import eval as evaluation
from lib import checkpoint, toy
from lib.config import CHOICES, load_config
from lib.memory import GIB, GPUS, engine_room, engine_share, forward_flops, model_sizes, trainer_memory
from lib.policy import PackedLM, pack, packed_length
from tools import plan

CONFIG_7B = str(ROOT / "configs/qwen2.5-math-7b.yaml")


def qwen_7b(**changes):
    """The shape of Qwen2.5-Math-7B."""
    return Qwen2Config(**{"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
                          "intermediate_size": 18944, "vocab_size": 152064, "max_position_embeddings": 4096,
                          "tie_word_embeddings": False} | changes)


SMALL = {"vocab_size": 53, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": 1}
DENSE = {
    "qwen2": Qwen2Config(**SMALL, tie_word_embeddings=False),
    "tied": Qwen2Config(**SMALL, tie_word_embeddings=True),
    "llama": LlamaConfig(**SMALL, tie_word_embeddings=False),
    "qwen3": Qwen3Config(**SMALL, head_dim=24, tie_word_embeddings=True),     # 4 heads of 24: not D / 4
}


def stages(*overrides):
    return load_config(["--config", CONFIG_7B, *overrides])


def phases(config, *overrides, stage=0):
    """{name: Phase} of one step of a stage."""
    cfg = stages(*overrides)[stage][1]
    return {p.name: p for p in plan.step_phases(cfg, config, GPUS[cfg.plan_gpu], cfg.plan_gpus)}


# ---------------------------------------------------------------------------------------------------------- FLOPs, parameters
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


def test_a_model_the_arithmetic_does_not_hold_for_is_refused_by_name():
    moe = Qwen3MoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)
    with pytest.raises(ValueError, match="^model: 'qwen3_moe' is not dense"):
        plan.report(stages(), moe)
    from transformers import GPT2Config
    with pytest.raises(ValueError, match="^model: 'gpt2' is no llama-like decoder"):
        plan.report(stages(), GPT2Config(n_layer=1, n_embd=8, n_head=2))


# ---------------------------------------------------------------------------------------------------------- tokens and seconds
def test_the_published_numbers_of_7b_on_8_h100():
    p = phases(qwen_7b(), "plan_mean_response=1000", "activation_checkpointing=false")
    assert p["update"].flops == pytest.approx(406e15, rel=0.03)
    assert p["update"].expected == pytest.approx(128, rel=0.03)                  # at 40 %
    assert 34 < p["old log-probs"].expected < 49
    assert 17 < p["entropy pass"].expected < 24
    assert 25 < p["generate base"].floor + p["generate branches"].floor < 35


def test_tokens_of_a_step_by_hand():
    p = phases(qwen_7b(), "plan_mean_response=800")
    assert p["generate base"].sequences == p["entropy pass"].sequences == 1024 * 4
    assert p["generate base"].generated == 4096 * 800
    assert p["generate base"].tokens == 4096 * 800 + 1024 * 180                  # a prompt is read once for its four responses
    assert p["entropy pass"].tokens == 4096 * (180 + 800 - 1)
    assert p["generate branches"].generated == p["generate branches"].tokens == 12288 * 400
    # what a branch inherited is read in every pass and generated in none
    assert p["old log-probs"].tokens == p["update"].tokens == 2048 * 979 + 6144 * (180 + 400 + 400 - 1)
    assert p["old log-probs"].generated == p["update"].generated == 0
    lone = phases(qwen_7b(), "plan_mean_response=800", "prefix_caching=false")["generate branches"]
    assert lone.tokens - p["generate branches"].tokens == 4096 * 580 and lone.expected > p["generate branches"].expected
    assert lone.generated == p["generate branches"].generated


def test_settings_that_change_the_work_change_the_phases():
    names = list(phases(qwen_7b()))
    assert names == ["generate base", "entropy pass", "generate branches", "old log-probs", "update"]
    assert list(phases(qwen_7b(), stage=1)) == ["generate base", "old log-probs", "update"]
    assert "entropy pass" not in phases(qwen_7b(), "critical=none")
    assert list(phases(qwen_7b(), "stages.stage1.kind=sft")) == ["update"]
    reuse = phases(qwen_7b(), "reuse_entropy_logp=true")["old log-probs"]
    assert reuse.sequences == 6144                                               # branches only
    cut = phases(qwen_7b(), "stages.stage1.max_prompt_tokens=400")["generate branches"]
    assert cut.generated == 12288 * (1000 - 220)                                 # a prefix never passes the prompt budget
    few = phases(qwen_7b(), "prompts_per_round=256")
    assert few["generate base"].sequences == 4 * 256 * 4                         # four rounds until half of them make 512
    chunked, whole = (phases(qwen_7b(), f"prompts_per_chunk={n}")["generate base"] for n in (128, 0))
    assert chunked.sequences == whole.sequences and chunked.flops == whole.flops    # 8 chunks of 128 prompts, 1 of 1024
    assert chunked.floor > 2 * whole.floor                                          # weights are read for fewer sequences
    surplus = phases(qwen_7b(), "prompts_per_step=320", "prompts_per_round=1000", "prompts_per_chunk=300")["generate base"]
    assert surplus.sequences == 3 * 250 * 4                                         # 640 prompts are needed: 3 of 4 chunks
    starved = phases(qwen_7b(), "prompts_per_round=256", "max_rounds=2")
    assert starved["update"].sequences == 256 * 16
    cov, one = (phases(qwen_7b(), "loss_mode=kl_cov", f"prompts_per_minibatch={n}") for n in (32, 512))
    print(f"covariance pass at 7B: {cov['covariance pass'].expected:.1f} s of {cov['update'].expected:.1f} s of update")
    assert cov["covariance pass"].sequences == 8192 * 15 // 16                      # all minibatches but the first
    assert cov["covariance pass"].floor == pytest.approx(cov["old log-probs"].floor * 15 / 16) and "covariance pass" not in one


def test_checkpointing_and_the_chunked_head_cost_seconds_but_no_useful_flops():
    plain, again = (phases(qwen_7b(), f"activation_checkpointing={x}")["update"] for x in ("false", "true"))
    assert plain.flops == again.flops
    scored = phases(qwen_7b())["old log-probs"]
    assert again.flops == 3 * scored.flops and again.expected == pytest.approx(4 * scored.expected)
    head = 2 * 3584 * 152064 * (2048 * 1000 + 6144 * 500)
    assert plain.expected == pytest.approx((3 * scored.flops + head) / 8 / 989e12 / 0.4)


def test_decoding_by_hand():
    """One GPU, 512 sequences, which fit at once: 100 steps that read all weights but the embedding, and the whole cache each."""
    cfg = stages("plan_gpus=1", "max_prompt_tokens=64", "max_response_tokens=100")[0][1]
    config, batch = qwen_7b(num_hidden_layers=2), plan.Batch(512, 40, 100)
    s = model_sizes(config)
    p = plan.decode_phase("x", config, cfg, GPUS["h100"], 1, batch, 1, 0)
    steps = 100 * 2 * (s.params - 152064 * 3584 - 3584)
    cache = sum(512 * (40 + t) * s.kv_bytes for t in range(1, 101))
    assert p.flops == 512 * (forward_flops(config, [140], 100) - forward_flops(config, [40], 0))
    assert p.floor == pytest.approx(max(p.flops / 989e12, (steps + cache) / 3.35e12))
    doubled = plan.decode_phase("x", config, cfg, GPUS["h100"], 1, batch._replace(count=2048), 1, 0)
    weights = (steps + cache) + steps + 3 * cache                                # twice the slots: twice the steps
    assert doubled.floor == pytest.approx(max(4 * p.flops / 989e12, weights / 3.35e12))


def test_a_slow_link_shows_only_where_it_is_slower_than_the_computation():
    slow = GPUS["h100"]._replace(link=1e9)
    cfg = stages("micro_batch_tokens=4096")[0][1]
    fast = plan.step_phases(cfg, qwen_7b(), GPUS["h100"], 8)[-1]
    late = plan.step_phases(cfg, qwen_7b(), slow, 8)[-1]
    micro = 16 * -(-fast.tokens // (16 * 8 * 4096))
    assert late.expected == pytest.approx(micro * 8 * 7_615_616_512 * 7 / 8 / 1e9)
    assert late.expected > fast.expected and late.floor == fast.floor
    alone = plan.step_phases(cfg, qwen_7b(), slow, 1)[-1]
    assert alone.expected == pytest.approx(8 * fast.expected)                    # nothing to send to


def test_a_faster_or_a_second_gpu_is_faster():
    one, two = (sum(p.expected for p in phases(qwen_7b(), f"plan_gpus={n}").values()) for n in (8, 16))
    assert 0.45 < two / one < 0.6
    times = [sum(p.expected for p in phases(qwen_7b(), f"plan_gpu={g}").values()) for g in ("h200", "h100", "a100")]
    assert times == sorted(times)


# -------------------------------------------------------------------------------------------------------------- memory and disk
def saved_bytes(lm, rows):
    """Bytes that autograd keeps of one packed forward for the backward, parameters excepted, every storage once."""
    kept, own = {}, {p.untyped_storage().data_ptr() for p in lm.parameters()}

    def note(x):
        kept[x.untyped_storage().data_ptr()] = x                                 # keeping x alive keeps the address its own
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out = PackedLM(lm, 16)(**pack(rows, "cpu"), temperature=1.0)
        assert out[0].requires_grad
    return sum(x.untyped_storage().nbytes() for a, x in kept.items() if a not in own)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("layers", [2, 6])
def test_activations_are_those_autograd_keeps(checkpointing, layers):
    shape = SMALL | {"num_hidden_layers": layers, "hidden_size": 128, "intermediate_size": 448}
    config = Qwen2Config(**shape, tie_word_embeddings=True)
    lm = AutoModelForCausalLM.from_config(config, attn_implementation="packed", dtype=torch.bfloat16)
    if checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
        lm.train()
    rows = ragged(12, 1, 53, prompt=(1, 2), prefix=(0, 0), response=(100, 300))   # nearly all tokens go through the head
    tokens = sum(packed_length(r) for r in rows)
    cfg = replace(stages(f"activation_checkpointing={checkpointing}")[0][1], micro_batch_tokens=tokens, head_chunk=10**6)
    # a huge head_chunk: the largest moment is the head's backward, where all that is saved is there and no block is repeated
    planned = trainer_memory(cfg, config, 1)[1]["activations"]
    if not checkpointing:  # on a CPU the sequences' attention outputs are put together in a second tensor
        planned += layers * tokens * 2 * 128
    assert saved_bytes(lm, rows) == pytest.approx(planned, rel=0.03)  # ids, positions: some 30 bytes a token


def test_memory_of_7b_by_hand():
    peaks = plan.memory(stages("plan_gpus=8")[0][1], qwen_7b(), GPUS["h100"], 8)
    n, gib = 7_615_616_512, 79.1 * GIB
    for parts in peaks.values():
        assert sum(parts.values()) == pytest.approx(gib)
        assert parts["fp32 weights"] == 4 * n / 8 and parts["Adam moments"] == 8 * n / 8
        assert parts["gathered weights"] == 2 * (2 * 152064 * 3584 + 3584 + 2 * 233_057_792)
        assert parts["logit chunks"] == 3 * 1024 * 152064 * 4
    awake, asleep = peaks["awake"], peaks["asleep"]
    share = awake["engine weights"] + awake["KV cache"] + awake["engine workspace"]
    assert awake["engine weights"] == 2 * n and awake["gradients"] == 0 and awake["free"] >= 0
    assert share == pytest.approx(0.73 * gib, rel=1e-4)                          # all that is left, in whole per cent
    assert asleep["engine weights"] == asleep["KV cache"] == 0 and asleep["gradients"] == 4 * n / 8
    assert asleep["activations"] == 16384 * 3584 * (28 * 2 + 8)                 # with checkpointing: block inputs
    assert asleep["gradient buffers"] == 10 * 152064 * 3584


@pytest.mark.parametrize("vocab, tokens, expected", [
    # activations, logit chunks, gradient buffers by hand for D = 64, I = 160, Q = 64, KV = 32, 3 blocks
    (4000, 500, lambda s: (500 * 64 * (8 + 3 * 2), 3 * 4 * 8 * 4000, 10 * s.head)),                      # the head's backward
    (53, 4096, lambda s: (4096 * (64 * (8 + 3 * 2 + 16 + 4 + 2) + 8 * 160), 0, 2 * s.head + 6 * s.block)),      # a block's
    (4000, 100, lambda s: (0, 0, 6 * (2 * 4000 * 64 + 64))),                                             # the root's, untied
])  # fmt: skip
def test_the_update_peaks_at_the_largest_of_three_moments(vocab, tokens, expected):
    config = Qwen2Config(**SMALL | {"vocab_size": vocab}, tie_word_embeddings=False)
    cfg = replace(stages()[0][1], micro_batch_tokens=tokens, head_chunk=8)
    parts = trainer_memory(cfg, config, 1)[1]
    assert tuple(parts[k] for k in ("activations", "logit chunks", "gradient buffers")) == expected(model_sizes(config))


def test_what_is_sharded_halves_with_twice_the_gpus_and_the_rest_stays():
    cfg = stages()[0][1]
    for few, many in zip(trainer_memory(cfg, qwen_7b(), 8), trainer_memory(cfg, qwen_7b(), 16), strict=True):
        sharded = {k for k in few if few[k] == 2 * many[k] > 0}
        assert sharded <= {"fp32 weights", "Adam moments", "gradients"} and len(sharded) >= 2
        assert all(few[k] == many[k] for k in few.keys() - sharded)


@pytest.mark.parametrize("save_every, keep, hf, steps, most", [
    (20, 2, False, "", 0), (20, 2, True, "", 0), (0, 2, False, "", 0), (50, 1, False, "", 0), (30, 3, True, "max_steps=75", 0),
    (7, 2, False, "max_steps=310", 0),
])  # fmt: skip
def test_disk_is_what_the_run_would_leave(tmp_path, save_every, keep, hf, steps, most):
    """Against checkpoint.prune on folders with a file of 12 bytes for state and one of 2 for hf."""
    todo = stages(f"save_every={save_every}", f"keep_ckpts={keep}", f"keep_hf={hf}", *[s for s in [steps] if s])
    step = 0

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
                checkpoint.prune(str(folder.parent), folder.name, keep, hf)
    n = model_sizes(DENSE["tied"]).params
    assert plan.disk(todo, DENSE["tied"]) == (14 * n, most * n, size() * n)


# ------------------------------------------------------------------------------------------------------------------- warnings
def about(text, peak):
    """The changes that the WARNING about a peak proposes, or None without such a warning."""
    start = {"awake": "WARNING: log-prob passes beside the engine will not fit", "asleep": "WARNING: the update will not fit"}
    line = next((x for x in text.splitlines() if x.startswith(start[peak])), None)
    return line and line.rpartition(": ")[2].split(" | ")


@pytest.mark.parametrize("peak, overrides, keys", [
    ("asleep", ["activation_checkpointing=false"], {"activation_checkpointing", "micro_batch_tokens"}),
    ("asleep", ["plan_gpus=1", "plan_gpu=rtx4090"], {"plan_gpus"}),
    ("awake", ["plan_gpus=1", "plan_gpu=rtx4090"], {"plan_gpu"}),
    ("awake", ["plan_gpus=4", "plan_gpu=l40s"], {"plan_gpus"}),
    ("awake", ["plan_gpus=1"], {"plan_gpus"}),
    ("awake", ["gpu_memory_utilization=0.9"], {"gpu_memory_utilization"}),
    ("awake", ["gpu_memory_utilization=0.1"], {"gpu_memory_utilization"}),
    ("awake", ["micro_batch_tokens=500000"], {"micro_batch_tokens"}),
])  # fmt: skip
def test_what_does_not_fit_is_said_with_changes_that_mend_it(peak, overrides, keys):
    changes = about(plan.report(stages(*overrides), qwen_7b()), peak)
    assert keys <= {c.split("=")[0] for c in changes}
    for change in changes:
        assert about(plan.report(stages(*overrides, *change.split()), qwen_7b()), peak) is None, change
        key, _, value = change.partition("=")
        if key == "micro_batch_tokens":                                          # and it is no lower than it must be
            more = f"{key}={int(value) + 1024}"
            assert about(plan.report(stages(*overrides, more), qwen_7b()), peak), more


def test_the_shipped_7b_config_fits_without_a_warning():
    assert "WARNING" not in plan.report(stages(), qwen_7b())


def test_the_run_refuses_where_the_parts_of_the_plan_add_up_to_too_much():
    cfg, refused = stages()[0][1], 0
    for gpu in GPUS.values():
        for world in (1, 2, 4, 8):
            over = plan.memory(cfg, qwen_7b(), gpu, world)["awake"]["free"] < 0
            refused += over
            if over:
                with pytest.raises(ValueError, match="^model: does not fit"):
                    engine_share(cfg, qwen_7b(), world, gpu.memory * GIB)
            else:
                engine_share(cfg, qwen_7b(), world, gpu.memory * GIB)
    assert 0 < refused < 20


def test_a_context_that_is_too_small_is_said_with_the_value_that_fits():
    config = qwen_7b(max_position_embeddings=4000)
    lines = [x for x in plan.report(stages(), config).splitlines() if x.startswith("WARNING")]
    assert len(lines) == 2 and "4000" in lines[0]                                # both stages take 4096
    changes = [x.rpartition(": ")[2] for x in lines]
    assert changes == ["stages.stage1.max_response_tokens=2500", "stages.stage2.max_response_tokens=3488"]
    assert "WARNING" not in plan.report(stages(*changes), config)


def test_a_dtype_that_a_gpu_refuses_is_said():
    assert "dtype=auto" in plan.report(stages("dtype=float32"), qwen_7b())


def test_the_table_of_gpus_is_the_choice_of_the_config():
    assert tuple(GPUS) == CHOICES["plan_gpu"]


# ----------------------------------------------------------------------------------------------------------------- the command
@pytest.fixture
def nothing_else(monkeypatch):
    """Whatever starts work is an error."""
    def no(*args, **kwargs):
        raise AssertionError("a dry run started something")
    monkeypatch.setattr(cure, "prepare_run", no)
    monkeypatch.setattr("lib.run.init_distributed", no)


@pytest.mark.parametrize("file", sorted(p.name for p in (ROOT / "configs").glob("*.yaml")))
def test_every_config_has_a_plan(file, tmp_path, monkeypatch, capsys, nothing_else):
    monkeypatch.chdir(tmp_path)
    qwen_7b().save_pretrained(tmp_path / "7b")                                   # config.json and nothing else
    toy = file.startswith("toy")
    argv = ["model=toy", "eval_data=toy"] if toy else [f"model={tmp_path}/7b"]
    before = sorted(tmp_path.rglob("*"))
    assert cure.main(["--config", str(ROOT / "configs" / file), "dry_run=true", *argv]) == 0
    text = capsys.readouterr().out
    assert ("0.43 M parameters" if toy else "7615.62 M parameters") in text
    for name, cfg in load_config(["--config", str(ROOT / "configs" / file), *argv]):
        assert f"{name}, one of {cfg.steps} steps" in text
    assert sorted(tmp_path.rglob("*")) == before                                 # no run folder, no toy


def test_a_toy_that_is_there_is_read(tmp_path, capsys, nothing_else):
    config = toy.toy_config()
    config.intermediate_size = 999
    config.save_pretrained(tmp_path)
    assert cure.main(["--config", str(ROOT / "configs/toy.yaml"), "dry_run=true", f"toy_dir={tmp_path}"]) == 0
    assert f"{model_sizes(config).params / 1e6:.2f} M parameters" in capsys.readouterr().out


def test_the_plan_of_max_steps_is_of_those_steps():
    text = plan.report(stages("max_steps=320"), qwen_7b())
    assert "stage1, one of 300 steps" in text and "stage2, one of 20 steps" in text


@pytest.mark.parametrize("overrides, key", [
    (["plan_gpu=b200"], "plan_gpu"), (["plan_gpus=0"], "plan_gpus"), (["plan_mean_response=5000"], "plan_mean_response"),
    (["model=/no/such/folder"], "model"), (["stages.stage1.plan_gpus=4"], "plan_gpus"),
])  # fmt: skip
def test_mistakes_are_one_line_that_names_the_key(overrides, key, capsys, nothing_else):
    with pytest.raises(SystemExit) as e:
        cure.main(["--config", CONFIG_7B, "dry_run=true", *overrides])
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.startswith(f"error: {key}: ") and err.count("\n") == 1


def test_only_training_has_a_plan(capsys, nothing_else):
    with pytest.raises(SystemExit):
        evaluation.main(["--config", CONFIG_7B, "dry_run=true", "eval_data=x.jsonl"])
    assert "dry_run: only cure.py" in capsys.readouterr().err


def test_ranks_print_the_plan_once(tmp_path, capsys, monkeypatch, nothing_else):
    qwen_7b().save_pretrained(tmp_path)
    monkeypatch.setitem(os.environ, "RANK", "1")
    assert cure.main(["--config", CONFIG_7B, "dry_run=true", f"model={tmp_path}"]) == 0
    assert capsys.readouterr().out == ""


def test_the_cache_holds_the_sequences_the_plan_says():
    cfg = stages()[0][1]
    tokens = engine_room(cfg, qwen_7b(), 8, GPUS["h100"].memory * GIB)[2]
    assert f"{tokens} tokens = {tokens // 4096} sequences of 4096" in plan.report(stages(), qwen_7b())


def test_the_7b_configs_differ_in_the_method_only_and_fit(tmp_path, capsys):
    """CURE, its control DAPO and 80/20: equal optimizer steps and groups, so that runs can be compared."""
    qwen_7b().save_pretrained(tmp_path)
    for name in ("", "-dapo", "-8020"):
        argv = ["--config", str(ROOT / f"configs/qwen2.5-math-7b{name}.yaml"), f"model={tmp_path}"]
        stages = load_config(argv)
        assert sum(c.steps for _, c in stages) == 400
        assert {(c.group_size, c.prompts_per_step, c.prompts_per_minibatch, c.lr) for _, c in stages} == {(16, 512, 32, 1e-6)}
        assert cure.main([*argv, "dry_run=true"]) == 0 and "WARNING" not in capsys.readouterr().out
