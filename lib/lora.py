"""LoRA (E. Hu et al., arXiv 2106.09685): y = W x + (alpha / r) B A x in every linear layer of the blocks.

W is frozen and in the compute dtype. A (r, in) and B (out, r) are fp32 and alone have gradients, Adam's moments and a
place in state/. B begins at 0, so a run begins with the model as it is. Whoever asks for weights gets them merged
(Policy.named_full): engine, guard and evaluation know nothing of it.
"""

import hashlib
import json
import math
import os

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from lib.files import replace_file


class LoraLinear(torch.nn.Linear):
    """A linear layer with an adapter. Made of a plain one by `adapt`, so that its names stay those of the model."""

    on = True  # of all layers; False: the model as it was (Policy.score_base)

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        # the scale goes to the narrow product: that of B has as many numbers as y
        return y + F.linear(self.scale * F.linear(x, self.lora_A), self.lora_B) if self.on else y

    def merged(self, weight, A, B):
        """W + (alpha / r) B A of full tensors, in fp32."""
        return weight.float() + self.scale * (B.float() @ A.float())


def adapt(lm, rank, alpha, seed):
    """Freeze a model of open_lm and give its blocks adapters -> {name: values to begin with} of A and B.

    A is uniform in +-1 / sqrt(in), as in PEFT, from a generator of its own name: equal on any number of ranks.
    ValueError: a layer has fewer inputs or outputs than rank."""
    lm.requires_grad_(False)
    values = {}
    for name, layer in lm.named_modules():
        if type(layer) is not torch.nn.Linear or layer is lm.get_output_embeddings():
            continue
        if rank > (narrow := min(layer.in_features, layer.out_features)):
            raise ValueError(f"lora_rank: {rank} is larger than {name}, which has {narrow} inputs or outputs")
        layer.__class__, layer.scale = LoraLinear, alpha / rank
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        rng = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        bound = 1 / math.sqrt(layer.in_features)
        values[f"{name}.lora_A"] = torch.empty(rank, layer.in_features).uniform_(-bound, bound, generator=rng)
        values[f"{name}.lora_B"] = torch.zeros(layer.out_features, rank)
        for key in ("lora_A", "lora_B"):
            empty = torch.empty_like(values[f"{name}.{key}"], device="meta")
            layer.register_parameter(key, torch.nn.Parameter(empty))
    if not values:
        raise ValueError("lora_rank: the model has no linear layers that an adapter could stand beside")
    return values


def save_adapter(folder, adapters, rank, alpha, base):
    """Write adapters {name: full tensor} as PEFT reads them. base: the model's path or hub id."""
    os.makedirs(folder, exist_ok=True)
    names = {f"base_model.model.{name}.weight": x.contiguous() for name, x in adapters.items()}
    save_file(names, f"{folder}/adapter_model.safetensors", metadata={"format": "pt"})
    targets = sorted({name.split(".")[-2] for name in adapters})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank,
              "lora_alpha": alpha, "target_modules": targets, "lora_dropout": 0.0, "bias": "none"}  # fmt: skip
    replace_file(f"{folder}/adapter_config.json", json.dumps(config, indent=1))
