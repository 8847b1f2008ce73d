"""Models in HF folders and on the hub: configuration, tokenizer, and weights that are read when they are needed."""

import contextlib
import os

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lib.files import read_json


def load_tokenizer(path):
    """(tokenizer, eos ids of the generation config) of an HF folder or hub id; ValueError names `model`."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"model: no tokenizer in {path!r}: {str(e).splitlines()[0]}") from e
    try:
        eos = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # a model without generation_config.json is fine
        eos = None
    return tokenizer, eos if isinstance(eos, list) else [eos]


def load_hf_config(path):
    """The model's configuration; ValueError names `model`."""
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, StrictDataclassError) as e:  # the last: values that contradict each other
        raise ValueError(f"model: cannot read the configuration of {path!r}: {str(e).splitlines()[0]}") from e


def open_lm(path, dtype, attention):
    """A causal LM from an HF folder or hub id, safetensors only, no remote code, its weights not read yet -> (model
    with its parameters on the meta device, {parameter name: a slice of its file, read where it is indexed}).
    ValueError names `model`."""
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        with torch.device("meta"):
            how = {"dtype": dtype, "attn_implementation": attention}
            lm = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **how)
        with contextlib.suppress(OSError):  # without the file it is made from the configuration
            lm.generation_config = GenerationConfig.from_pretrained(path)
        stored = open_files(path)
    except (OSError, ValueError, KeyError, SafetensorError, StrictDataclassError) as e:
        raise ValueError(f"model: cannot load {path!r}: {str(e).splitlines()[0]}") from e
    for copy, name in lm.all_tied_weights_keys.items():
        if copy in stored and not torch.equal(stored[copy][...], stored.setdefault(name, stored[copy])[...]):
            raise ValueError(f"model: {path!r} has a {copy} other than the {name} that its configuration ties it to")
    parameters = dict(lm.named_parameters())
    if missing := sorted(parameters.keys() - stored.keys()):
        raise ValueError(f"model: {path!r} lacks {len(missing)} tensors, {missing[0]} for one")
    for name, p in parameters.items():
        kind, shape = stored[name].get_dtype(), stored[name].get_shape()
        if kind not in ("F64", "F32", "F16", "BF16") or shape != list(p.shape):  # quantized, or of another config
            raise ValueError(f"model: {path!r} has {name} as {kind} {shape}, not as floats {list(p.shape)}")
    if attention == "packed":
        refuse_unsupported(lm)
    for module in lm.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            nothing = float("nan") if buffer.is_floating_point() else 0
            setattr(module, name, torch.full_like(buffer, nothing, device="cpu"))
    lm.initialize_weights()  # as from_pretrained computes buffers; to parameters on the meta device it does nothing
    for name, buffer in lm.named_buffers():
        if name in stored:
            buffer.copy_(stored[name][...])
        if buffer.is_floating_point() and buffer.isnan().any():
            raise ValueError(f"model: {path!r} lacks the buffer {name}, and it is not computed")
    return lm.eval(), {name: stored[name] for name in parameters}  # eval: no dropout, one function for all log-probs


def open_files(path):
    """{name: slice} of all tensors in the safetensors files of an HF folder or hub id. Only headers are read."""
    if not os.path.isdir(path):
        # no "*": it goes into folders, and there are repositories with the same weights under other names
        path = snapshot_download(path, allow_patterns=["model*.safetensors", "model*.json"])
    names, index = ["model.safetensors"], read_json(f"{path}/model.safetensors.index.json")
    if index and not os.path.exists(f"{path}/{names[0]}"):
        names = sorted(set(index["weight_map"].values()))
    opened = [safe_open(f"{path}/{name}", "pt") for name in names]
    return {key: f.get_slice(key) for f in opened for key in f.keys()}


@torch.no_grad()
def read_weights(root, lm, weights, device):
    """Give a model of open_lm memory on `device`, and read its weights into it, of a parameter that FSDP has sharded
    only this rank's rows. root: the module that FSDP wraps, or lm itself."""
    buffers = dict(lm.named_buffers())
    root.to_empty(device=device)
    lm.tie_weights()  # to_empty makes two of one
    for name, buffer in lm.named_buffers():
        buffer.copy_(buffers[name])
    for name, p in lm.named_parameters():
        if isinstance(p, DTensor):  # rows are cut as by torch.chunk: the last ranks may have fewer, or none
            rows, local, mesh = p.shape[0], p.to_local(), p.device_mesh
            first = min(rows, mesh.get_local_rank("shard") * -(-rows // mesh.shape[-1]))
            local.copy_(weights[name][first : first + len(local)])
        else:
            p.copy_(weights[name][...])


def load_lm(path, dtype, attention):
    """A causal LM as open_lm takes it, whole and in host memory."""
    lm, weights = open_lm(path, dtype, attention)
    read_weights(lm, lm, weights, "cpu")
    return lm


def named_from_folder(path, dtype):
    """(HF name, full tensor) one after the other, as Policy.named_full gives them, but read from an HF folder or hub
    id: never a second copy of the model. ValueError as open_lm, before the first one."""
    weights = open_lm(path, dtype, "sdpa")[1]
    return ((name, w[...].to(dtype)) for name, w in weights.items())


# what configs call a factor on the logits, and a soft cap on logits or attention scores
SCALES = "logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier", "logits_mup_width_multiplier"
CAPS = "final_logit_softcapping", "attn_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"


def refuse_unsupported(lm):
    """ValueError if a model has what the packed forward lacks: a sliding window, a bias in the head, logits or
    attention scores that are scaled or capped."""
    config = lm.config.get_text_config()
    found = [f"{key} {getattr(config, key)}" for key in SCALES if getattr(config, key, None) not in (None, 1)]
    found += [f"{key} {getattr(config, key)}" for key in CAPS if getattr(config, key, None) is not None]
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        found.append("sliding-window attention")
    if getattr(lm.get_output_embeddings(), "bias", None) is not None:
        found.append("a bias in the head")
    if found:
        kind = lm.config.model_type
        raise ValueError(f"model: a {kind} with {', '.join(found)}, which the packed forward does not have")
