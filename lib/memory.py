"""GPUs, sizes of models, the memory of trainer and engine, FLOPs: what a run itself must know (the rest: tools/plan.py)."""

import resource
import sys
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM

from loss import HEAD_CHUNK

GIB = 2**30


class GPU(NamedTuple):
    name: str
    flops: float  # dense bf16 with fp32 accumulation, 1/s
    memory: float  # GiB as torch reports it, a little under the label
    bandwidth: float  # HBM or GDDR, bytes/s
    link: float  # to the other GPUs, one direction, bytes/s: NVLink, or PCIe 4.0 x16
    slots: int  # sequences vLLM decodes at a time by default: 1024 from 70 GiB on (not A100), else 256 (0.32, get_batch_defaults)


GPUS = {  # NVIDIA's datasheets; 4090: Ada white paper
    "h100": GPU("H100 SXM", 989e12, 79.1, 3.35e12, 450e9, 1024),
    "h200": GPU("H200 SXM", 989e12, 139.8, 4.8e12, 450e9, 1024),
    "a100": GPU("A100 SXM 80GB", 312e12, 79.1, 2.04e12, 300e9, 256),
    "l40s": GPU("L40S", 362e12, 44.4, 0.864e12, 32e9, 256),
    "rtx4090": GPU("RTX 4090", 165e12, 23.6, 1.008e12, 32e9, 256),
}


def peak_flops():
    """Dense bf16 FLOP/s of the GPU at hand, 0 where it is not in GPUS or is none."""
    name = torch.cuda.get_device_name().lower().replace(" ", "") if torch.cuda.is_available() else ""
    return next((gpu.flops for key, gpu in GPUS.items() if key in name and "pcie" not in name), 0)


class Sizes(NamedTuple):
    """What arithmetic about a dense decoder needs: parameters (a tied head counted once), or widths."""

    params: int  # all
    block: int  # one transformer block
    layers: int  # blocks
    linear: int  # weights of matrix products in all blocks: no biases, no norms
    width: int  # D
    inner: int  # of the MLP
    heads: int  # query heads x their width
    kv: int  # key heads x their width
    vocab: int  # V

    @property
    def root(self):
        """Parameters outside the blocks: embedding, head, last norm. FSDP's root group."""
        return self.params - self.layers * self.block

    @property
    def head(self):
        """Weights of the head's matrix product."""
        return self.width * self.vocab

    @property
    def kv_bytes(self):
        """Bytes of one cached token: keys and values of all blocks in bf16."""
        return 2 * 2 * self.kv * self.layers


_SIZES = {}


def model_sizes(config):
    """Sizes of a model from its HF config, built on the meta device: no memory, 0.1 s at 7B, remembered. ValueError names
    `model` where it is no decoder with a list of equal blocks."""
    key = config.to_json_string()
    if key not in _SIZES:
        try:
            with torch.device("meta"):
                lm = AutoModelForCausalLM.from_config(config)
            blocks, inner = lm.base_model.layers, config.intermediate_size
        except (ValueError, AttributeError) as e:
            raise ValueError(f"model: {config.model_type!r} is no llama-like decoder: {str(e).splitlines()[0]}") from e
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        _SIZES[key] = Sizes(
            params=sum(p.numel() for p in lm.parameters()), block=sum(p.numel() for p in blocks[0].parameters()),
            layers=len(blocks), linear=sum(m.weight.numel() for m in blocks.modules() if isinstance(m, torch.nn.Linear)),
            width=config.hidden_size, inner=inner, heads=config.num_attention_heads * head_dim,
            kv=config.num_key_value_heads * head_dim, vocab=config.vocab_size,
        )  # fmt: skip
    return _SIZES[key]


def trainer_memory(cfg, config, world):
    """Bytes the trainer takes of one GPU at its two peaks, part by part, bf16 compute -> (in a log-prob pass, while the
    engine is awake; in an update, while it sleeps).

    Sharded over all ranks: 12 B a parameter for fp32 weights and Adam's moments, 4 B for gradients between micro-batches.
    gathered   bf16 weights of the root and of two blocks, one of them prefetched
    log-probs  activations of one block only; three chunks of fp32 logits
    update     the largest of three moments. The head's backward: everything saved for it, three chunks of logits, the
               head's fp32 gradient and the product added to it in bf16 and fp32. The first block's backward: everything
               saved, the block's own activations again with checkpointing, its gradient in bf16 and in fp32 to be reduced.
               The root's: its gradient in both.
    A block saves 16 D + 8 I + 4 Q + 4 KV bytes a token (norms compute in fp32), a checkpointed one its input, 2 D.
    reserve    3 GiB for the CUDA context, NCCL and fragmentation"""
    s = model_sizes(config)
    T, D = cfg.micro_batch_tokens, s.width
    chunks = 3 * 4 * HEAD_CHUNK * s.vocab
    one_block = T * (16 * D + 8 * s.inner + 4 * s.heads + 4 * s.kv)
    saved = T * 8 * D + s.layers * (2 * T * D if cfg.activation_checkpointing else one_block)  # 8 D: last norm, head's input
    again = one_block if cfg.activation_checkpointing else 0
    shared = {
        "fp32 weights": 4 * s.params / world, "Adam moments": 8 * s.params / world, "gradients": 0,
        "gathered weights": 2 * (s.root + 2 * s.block),
    }  # fmt: skip
    moments = [(saved, chunks, 10 * s.head), (saved + again, 0, 2 * s.head + 6 * s.block), (0, 0, 6 * s.root)]
    names = "activations", "logit chunks", "gradient buffers"
    awake = shared | dict(zip(names, (2 * T * (8 * D + 3 * s.inner), chunks, 0), strict=True))
    asleep = shared | {"gradients": 4 * s.params / world} | dict(zip(names, max(moments, key=sum), strict=True))
    return awake | {"reserve": 3 * 2**30}, asleep | {"reserve": 3 * 2**30}


def engine_room(cfg, config, world, total):
    """Of one GPU of `total` bytes -> (the share vLLM gets, the largest share that fits beside the trainer, tokens of KV cache).
    Share: cfg.gpu_memory_utilization, or all that fits. 1 GiB of it is for the engine's own activations and graphs, roughly."""
    s = model_sizes(config)
    fits = (total - sum(trainer_memory(cfg, config, world)[0].values())) / total
    share = cfg.gpu_memory_utilization or int(100 * fits) / 100
    return share, fits, int((share * total - 2 * s.params - 2**30) / s.kv_bytes)


def engine_share(cfg, config, world, total):
    """The share of one GPU that vLLM may take (its gpu_memory_utilization) beside what the trainer keeps while the engine
    is awake (trainer_memory) -> (share, one line of numbers). `total`: bytes of the GPU.

    ValueError where cfg.gpu_memory_utilization asks for more, or where nothing useful is left."""
    share, fits, tokens = engine_room(cfg, config, world, total)
    parts, gib = trainer_memory(cfg, config, world)[0], 2**30
    persistent = parts["fp32 weights"] + parts["Adam moments"]
    report = (
        f"GPU {total / gib:.1f} GiB: trainer keeps {persistent / gib:.1f}, entropy pass "
        f"{(sum(parts.values()) - parts['reserve'] - persistent) / gib:.1f}, engine {share:.2f} = {share * total / gib:.1f} GiB, "
        f"weights {2 * model_sizes(config).params / gib:.1f}, KV for {max(0, tokens)} tokens"
    )
    if fits <= 0 or tokens < cfg.max_prompt_tokens + cfg.max_response_tokens:
        T = cfg.micro_batch_tokens
        raise ValueError(f"model: does not fit, use more ranks, or lower micro_batch_tokens (= {T}). {report}")
    if share > fits:
        raise ValueError(f"gpu_memory_utilization: {share:.2f} is too much, set at most {int(100 * fits) / 100}. {report}")
    return share, report


def forward_flops(config, lengths, head_tokens=None):
    """FLOPs of one forward over packed sequences of these lengths, a multiply-add counted as 2:

        2 · weights of the blocks' matrix products · Σ n + 4 · query width · blocks · Σ n (n + 1) / 2 + 2 · D · V · head_tokens

    The middle term is causal attention, Q K^T and P V for each pair of a token and one it sees; embedding look-up, norms, RoPE
    and softmax count nothing. head_tokens: how many tokens go through the head (None: all; in training the response tokens).
    A backward is twice that. Model FLOPs utilisation counts 3 forwards an update, whatever is computed again."""
    s = model_sizes(config)
    tokens, pairs = sum(lengths), sum(n * (n + 1) // 2 for n in lengths)
    head = tokens if head_tokens is None else head_tokens
    return 2 * s.linear * tokens + 4 * s.heads * s.layers * pairs + 2 * s.head * head


def peak_memory():
    """GiB at the highest: of this rank's GPU as torch counts it (the engine's KV cache, vLLM's own pool, apart), since the
    last call; of the process where there is no GPU, since its start."""
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 2**10) / 2**30


def utilisation(config, lengths, response_tokens, seconds, world):
    """Model FLOPs utilisation of the update: 3 forwards (a backward is 2) over the rollouts trained on, whatever is computed
    again, padded or waited for, per second and rank, over the GPU's peak (forward_flops: embeddings do not count)."""
    flops = 3 * forward_flops(config, lengths, response_tokens) / seconds / world
    out = {"perf/tflops": flops / 1e12, "perf/trained_throughput": response_tokens / seconds / world}
    return out | ({"perf/mfu": flops / peak_flops()} if peak_flops() else {})
