"""lib/lora.py: gradients against the merged weight, the same model merged and adapted, files, bf16, ranks.

Resume is in test_checkpoint.py."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import WORLDS, largest, ragged

from lib.config import Config
from lib.engine import Sampling, TorchEngine
from lib.lora import LoraLinear, adapt
from lib.policy import Policy
from lib.ranks import gather
from lib.weights import load_lm, open_lm
from rollout import Rollout

RANK, ALPHA = 4, 8.0


def test_gradients_of_a_and_b_are_those_of_the_merged_weight():
    """y = (W + s B A) x in float64: dL/dA = s B^T G, dL/dB = s G A^T, G the gradient of the merged weight."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(7, 5, dtype=torch.float64)
    layer.__class__, layer.scale = LoraLinear, ALPHA / RANK
    for name, shape in (("lora_A", (RANK, 7)), ("lora_B", (5, RANK))):
        layer.register_parameter(name, torch.nn.Parameter(torch.randn(shape, dtype=torch.float64)))
    x, out = torch.randn(11, 7, dtype=torch.float64), torch.randn(11, 5, dtype=torch.float64)
    (layer(x) * out).sum().backward()
    W = (layer.weight + layer.scale * layer.lora_B @ layer.lora_A).detach().requires_grad_()
    ((x @ W.t() + layer.bias) * out).sum().backward()
    gaps = [(layer.lora_A.grad - layer.scale * layer.lora_B.t() @ W.grad).abs().max(),
            (layer.lora_B.grad - layer.scale * W.grad @ layer.lora_A.t()).abs().max()]  # fmt: skip
    assert largest(gaps) < 1e-12
    merged = layer.merged(layer.weight, layer.lora_A, layer.lora_B)
    assert (merged.double() - W).abs().max() < 1e-6


def make(path, **changes):
    own = {"lora_rank": RANK, "lora_alpha": ALPHA, "micro_batch_tokens": 256, "lr": 1e-2, "weight_decay": 0.0}
    return Policy(Config(**own | changes), path, torch.device("cpu"))


def step(policy, lr=1e-2):
    rows = ragged(6, 3, 25)
    for r in rows:
        r.advantage = 1.0 if r.reward > 0 else -1.0
    n = sum(len(r.response_ids) for r in rows)
    return policy.update([rows], lambda _, logp, __: -logp.sum() / n, 1.0, lr), rows


def test_it_begins_as_the_model_trains_adapters_only_and_its_weights_are_the_merged_ones(cpu, sharp, tmp_path):
    policy, plain = make(sharp), Policy(Config(micro_batch_tokens=256), sharp, torch.device("cpu"))
    before = dict(policy.named_full())
    assert all(torch.equal(before[k], v) for k, v in plain.named_full()), "B is 0"
    (norm, taken), rows = step(policy)
    assert taken and norm > 0
    still = [p for name, p in policy.model.named_parameters() if ".lora_" not in name]
    assert all(torch.equal(p.full_tensor(), q.full_tensor()) for p, q in zip(still, plain.model.parameters(), strict=True))
    step(policy)                                          # A has no gradient while B is 0
    moved = [k for k, v in policy.named_full() if not torch.equal(v, before[k])]
    assert moved and all("proj.weight" in k for k in moved) and len(moved) == 7 * policy.config.num_hidden_layers
    state = policy.state()
    assert all(".lora_" in key for key in state) and len(state) == 3 * 2 * len(moved)
    tokenizer = SimpleNamespace(save_pretrained=lambda folder: None)
    policy.save_hf(tmp_path / "hf", tokenizer)
    policy.save_adapter(tmp_path / "adapter")
    merged = Policy(Config(micro_batch_tokens=256), str(tmp_path / "hf"), torch.device("cpu"))
    gap = largest(np.abs(a - b).max() for x, y in zip(policy.score([rows], 1.0), merged.score([rows], 1.0), strict=True)
                  for a, b in zip(x, y, strict=True))
    print(f"adapted against merged: {gap:.1e} nats")
    assert gap < 1e-4


def test_peft_reads_the_adapter_and_finds_the_same_logits(cpu, sharp, tmp_path):
    peft = pytest.importorskip("peft")
    policy = make(sharp)
    step(policy), step(policy)
    policy.save_adapter(tmp_path)
    policy.save_hf(tmp_path / "hf", SimpleNamespace(save_pretrained=lambda folder: None))
    ids = torch.arange(2, 12)[None]
    theirs = peft.PeftModel.from_pretrained(load_lm(sharp, torch.float32, "eager"), str(tmp_path))(ids).logits
    ours = load_lm(str(tmp_path / "hf"), torch.float32, "eager")(ids).logits
    assert (theirs - ours).abs().max() < 1e-4 and json.loads((tmp_path / "adapter_config.json").read_text())["r"] == RANK


def test_values_to_begin_with_depend_on_seed_and_layer_alone(sharp):
    a, b, c = (adapt(open_lm(sharp, torch.float32, "packed")[0], RANK, ALPHA, seed) for seed in (0, 0, 1))
    keys = [k for k in a if k.endswith("lora_A")]
    assert all(torch.equal(a[k], b[k]) and not torch.equal(a[k], c[k]) for k in keys)
    assert not torch.equal(a[keys[0]], a[keys[1]]) and largest(a[k].abs().max() for k in keys) < 0.5
    with pytest.raises(ValueError, match="lora_rank: 1000 is larger than model.layers.0.self_attn.q_proj, which has"):
        adapt(open_lm(sharp, torch.float32, "packed")[0], 1000, ALPHA, 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_without_its_adapters_scores_as_a_second_copy_of_it_bit_for_bit(cpu, sharp, dtype):
    policy, second = make(sharp, dtype=dtype), Policy(Config(dtype=dtype, micro_batch_tokens=256), sharp, cpu, frozen=True)
    (_, rows), _ = step(policy), step(policy)
    theirs, base, adapted = (f([rows], 1.0) for f in (second.score, policy.score_base, policy.score))
    assert all(np.array_equal(a, b) for x, y in zip(base, theirs, strict=True) for a, b in zip(x, y, strict=True))
    assert largest(np.abs(a - b).max() for (a, _), (b, _) in zip(base, adapted, strict=True)) > 0.1
    with pytest.raises(AttributeError):                   # a failed pass leaves the adapters on
        policy.score_base([[None]], 1.0)
    again = policy.score([rows], 1.0)
    assert all(np.array_equal(a, b) for (a, _), (b, _) in zip(adapted, again, strict=True))


# ----------------------------------------------------------------------------------------------------------------- bf16
def engine_gap(policy, engine):
    """The guard's number: mean |d log-prob| of trainer and engine over sampled tokens, after a sync."""
    engine.sleep(), engine.wake(), engine.sync(policy.named_full())
    prompts = [r.prompt_ids for r in ragged(16, 9, 25)]
    sampled = engine.generate(prompts, 2, Sampling(30), list(range(0, 160, 10)))
    rows = [Rollout(p, [], c.ids, c.logp) for p, cs in zip(prompts, sampled, strict=True) for c in cs]
    return np.concatenate([np.abs(logp - r.engine_logp) for (logp, _), r in zip(policy.score_local(rows, 1.0), rows, strict=True)]).mean()


def test_in_bf16_adapters_take_steps_and_merged_weights_differ_by_their_rounding(cpu, sharp):
    """Before a step the gap to the engine is that of full training. Then merged weights are rounded to bf16, and W and the
    adapters beside it are not. Updates below half a step of bf16 do not reach the engine. Hence importance weights in the
    configs. The gap is of that rounding alone: a trainer that has the rounded weights has none of it."""
    policy, plain = make(sharp, dtype="bfloat16"), make(sharp, dtype="bfloat16", lora_rank=0)
    engine = TorchEngine(policy.cfg, sharp, cpu, torch.bfloat16, {1})
    before, gaps = {k: v.clone() for k, v in policy.named_full()}, {"full": engine_gap(plain, engine)}
    gaps["start"], old = engine_gap(policy, engine), policy.score([ragged(6, 3, 25)], 1.0)
    assert gaps["full"] == gaps["start"]
    for lr, least, most in ((1e-6, 0, 1e-3), (1e-2, 0.5, 1)):
        assert step(policy, lr)[0][1] and step(policy, lr)[0][1]
        moved = largest(np.abs(a - b).max() for (a, _), (b, _) in zip(policy.score([ragged(6, 3, 25)], 1.0), old, strict=True))
        share = sum((before[k] != v).sum().item() for k, v in policy.named_full()) / sum(v.numel() for v in before.values())
        gaps[lr] = engine_gap(policy, engine)
        print(f"two steps of lr {lr}: log-probs moved by up to {moved:.1e} nats, {share:.4f} of the engine's weights did")
        assert moved > 1e-3 and least <= share <= most
    rounded = dict(policy.named_full())
    with torch.no_grad():
        for name, p in plain.model.named_parameters():
            p.to_local().copy_(rounded[name.removeprefix("lm.")])
    gaps["rounded"] = engine_gap(plain, engine)
    print({k: f"{v:.1e}" for k, v in gaps.items()})
    assert gaps[1e-6] < 1.5 * gaps["full"] and gaps["rounded"] < 1.5 * gaps["full"] < gaps[1e-2] < 6 * gaps["full"]


# ---------------------------------------------------------------------------------------------------------------- ranks
def rank_job(rank, world, device, source, out):
    """Adapters of rank 2, so that one of three ranks holds no row of A (see conftest.ranks). Rank 0 saves what is found."""
    from test_policy import cut, prepared, token_mean
    policy = make(source, lora_rank=2)
    with torch.no_grad():
        for p in policy.trained.values():
            p.add_(0.05)                                  # B is not 0: A has a gradient, too
    rows = prepared(policy, ragged(14, 3, 25, per_group=2))
    mine, loss_fn, grads = cut(rows, 120, world)[rank], token_mean(rows), {}
    held = [p.to_local().numel() for name, p in policy.trained.items() if name.endswith("lora_A")]

    def broken(r, logp, entropy):
        return loss_fn(r, logp, entropy) * (float("nan") if rank == world - 1 else 1.0)

    before = {k: v.clone() for k, v in policy.named_full()}
    skipped = policy.update(mine, broken, 1.0, 1e-2)[1], all(torch.equal(v, before[k]) for k, v in policy.named_full())
    take = policy.opt.step
    policy.opt.step = lambda: (grads.update((n, p.grad.full_tensor()) for n, p in policy.trained.items()), take())
    norm, taken = policy.update(mine, loss_fn, 1.0, 1e-2, 0.0)
    found = {"grads": grads, "norms": gather([norm]), "taken": gather([taken]), "held": gather([held]), "nan": gather([skipped]),
             "weights": dict(policy.named_full()), "logp": gather([torch.from_numpy(x) for x, _ in policy.score(mine, 1.0)])}  # fmt: skip
    if rank == 0:
        torch.save(found, f"{out}/lora{world}.pt")
    return found


@pytest.fixture(scope="module")
def alone(cpu, sharp, tmp_path_factory):
    return rank_job(0, 1, cpu, sharp, tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("world", WORLDS)
def test_adapters_have_one_gradient_and_one_norm_on_any_number_of_ranks_one_of_which_may_hold_no_row(ranks, alone, world):
    from test_policy import worst
    found = ranks[world]["lora"]
    assert [any(h) for h in found["held"]] == [True, True, False][:world], "3 ranks: A has 2 rows"
    gap = worst(found["grads"], alone["grads"])
    print(f"{world} ranks against 1: gradients of {len(found['grads'])} tensors within {gap:.1e}")
    assert gap <= 1e-5 and found["norms"] == [found["norms"][0]] * world
    assert found["norms"][0] == pytest.approx(alone["norms"][0], rel=1e-6)
    assert found["taken"] == [True] * world and found["nan"] == [(False, True)] * world
    assert found["weights"].keys() == alone["weights"].keys()
    apart = torch.cat([(v - alone["weights"][k]).abs().flatten() for k, v in found["weights"].items()])
    assert (apart > 1e-4).double().mean() <= 1e-3         # Adam's first step turns rounding into up to 2 lr where g ~ 0
