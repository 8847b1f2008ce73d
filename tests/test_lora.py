"""lib/lora.py: gradients against the merged weight, the same model merged and adapted, files, ranks, resume."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import largest, ragged

from lib.config import Config
from lib.lora import LoraLinear, adapt
from lib.policy import Policy
from lib.weights import load_lm, open_lm

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
    cfg = Config(lora_rank=RANK, lora_alpha=ALPHA, micro_batch_tokens=256, lr=1e-2, weight_decay=0.0, **changes)
    return Policy(cfg, path, torch.device("cpu"))


def step(policy):
    rows = ragged(6, 3, 25)
    for r in rows:
        r.advantage = 1.0 if r.reward > 0 else -1.0
    n = sum(len(r.response_ids) for r in rows)
    return policy.update([rows], lambda _, logp, __: -logp.sum() / n, 1.0, 1e-2), rows


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
