"""What a run must know of GPUs and of its model's size: memory of trainer and engine, FLOPs, utilisation."""

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


GPUS = {  # NVIDIA's datasheets; 4090: Ada white paper
    "h100": GPU("H100 SXM", 989e12, 79.1, 3.35e12, 450e9),
    "h200": GPU("H200 SXM", 989e12, 139.8, 4.8e12, 450e9),
    "a100": GPU("A100 SXM 80GB", 312e12, 79.1, 2.04e12, 300e9),
    "l40s": GPU("L40S", 362e12, 44.4, 0.864e12, 32e9),
    "rtx4090": GPU("RTX 4090", 165e12, 23.6, 1.008e12, 32e9),
}


def this_gpu():
    """The GPU at hand: its own name and memory, and the rates of its entry in GPUS, 0 where it has none."""
    name = torch.cuda.get_device_name()
    known = [gpu for key, gpu in GPUS.items() if key in name.lower().replace(" ", "") and "pcie" not in name.lower()]
    rates = known[0] if known else GPU("", 0, 0, 0, 0)
    return rates._replace(name=name, memory=torch.cuda.mem_get_info()[1] / GIB)


def engine_batch(gpu):
    """(sequences that vLLM 0.32 decodes at a time, tokens that it computes at a time): its get_batch_defaults."""
    return (1024, 16384) if gpu.memory >= 70 and "a100" not in gpu.name.lower() else (256, 8192)


class Sizes(NamedTuple):
    """What arithmetic about a dense decoder needs: numbers of parameters (a tied head counted once), and widths."""

    params: int  # all
    block: int  # one transformer block
    layers: int  # blocks
    root: int  # outside the blocks: embedding, head, last norm. FSDP's root group
    linear: int  # weights of matrix products in all blocks: no biases, no norms
    head: int  # weights of the head's matrix product
    heads: int  # query heads x their width
    kv: int  # key heads x their width
    normed: int  # of both, what has a norm of its own before attention (Qwen3's q_norm and k_norm)
    kv_bytes: int  # one cached token: keys and values of all blocks in bf16


_SIZES = {}


def model_sizes(config):
    """Sizes of a model from its HF config, built on the meta device: no memory, 0.1 s at 7B, remembered. ValueError
    names `model` where it is no decoder with a list of equal blocks."""
    key = config.to_json_string(use_diff=False)  # a tenth of the time
    if key not in _SIZES:
        try:
            with torch.device("meta"):
                lm = AutoModelForCausalLM.from_config(config)
            blocks, width, _ = lm.base_model.layers, config.hidden_size, config.intermediate_size
            attention = blocks[0].self_attn
        except (ValueError, AttributeError) as e:
            raise ValueError(f"model: {config.model_type!r} is no llama-like decoder: {str(e).splitlines()[0]}") from e
        params, block = (sum(p.numel() for p in m.parameters()) for m in (lm, blocks[0]))
        linear = sum(m.weight.numel() for m in blocks.modules() if isinstance(m, torch.nn.Linear))
        layers, head = len(blocks), width * config.vocab_size
        head_dim = getattr(config, "head_dim", None) or width // config.num_attention_heads
        heads, kv = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
        normed = heads + kv if hasattr(attention, "q_norm") else 0
        root, kv_bytes = params - layers * block, 2 * 2 * kv * layers
        _SIZES[key] = Sizes(params, block, layers, root, linear, head, heads, kv, normed, kv_bytes)
    return _SIZES[key]


def trainer_memory(cfg, config, world, frozen=0):
    """Bytes the trainer takes of one GPU at its two peaks, part by part, in bf16 compute -> (in a log-prob pass, while
    the engine is awake; in an update, while it sleeps). frozen: bytes a GPU holds of further models that stay there
    untrained, for instance the bf16 weights of a reference model.

    sharded    12 B a parameter for fp32 weights and Adam's moments, 4 B for gradients between micro-batches
    gathered   bf16 weights of the root and of two blocks, one of them prefetched
    log-probs  activations of one block only; three chunks of fp32 logits
    update     the largest of three moments. The head's backward: everything saved for it, three chunks of logits, the
               head's fp32 gradient and the product added to it in bf16 and fp32. The first block's backward: everything
               saved, the block's own activations again with checkpointing, its gradient in bf16 and in fp32 to be
               reduced. The root's: its gradient in both.
    A block saves 16 D + 8 I + 4 Q + 4 KV bytes a token (norms compute in fp32), and 6 (Q + KV) for norms of queries and
    keys. In brooms attention keeps a branch's keys and values with its trunk's gathered before them: at most 1 + n2
    times 4 KV. A checkpointed block saves its input, 2 D. With adapters it saves 2 r bytes a token for each of its
    seven layers, and no norm, since they are frozen, saves its bf16 output. tests/test_memory.py counts what the real
    forward saves.
    reserve    3 GiB for the CUDA context, NCCL and fragmentation"""
    s, world = model_sizes(config), world // cfg.replicate  # GPUs that share a copy
    adapters = adapter_parameters(config, cfg.lora_rank)
    frozen += 2 * s.params / world if adapters else 0  # the model itself, in bf16
    trained, head, of_block, root = (adapters, 0, adapters / s.layers, 0) if adapters else (
        s.params, s.head, s.block, s.root)  # fmt: skip
    T, D, inner = cfg.micro_batch_tokens, config.hidden_size, config.intermediate_size
    chunks = 3 * 4 * HEAD_CHUNK * config.vocab_size
    gathered = 1 + cfg.n2 if cfg.packing == "broom" else 1
    norm = 0 if adapters else 2  # bytes that a norm with a gradient saves of each number
    block = T * (2 * (6 + norm) * D + 8 * inner + 4 * s.heads + 4 * s.kv * gathered + (4 + norm) * s.normed)
    block += T * 2 * 7 * cfg.lora_rank
    kept, again = (2 * T * D, block) if cfg.activation_checkpointing else (block, 0)
    saved = s.layers * kept + T * (6 + norm) * D  # the last norm's, the head's input
    # activations, logit chunks, gradient buffers
    scoring = 2 * T * (8 * D + (4 if adapters else 3) * inner), chunks, 0
    moments = (saved, chunks, 10 * head), (saved + again, 0, 2 * head + 6 * of_block), (0, 0, 6 * root)
    peaks = []
    for gradients, (activations, logits, buffers) in ((0, scoring), (4 * trained / world, max(moments, key=sum))):
        peaks.append({
            "fp32 weights": 4 * trained / world, "Adam moments": 8 * trained / world, "gradients": gradients,
            "gathered weights": 2 * (s.root + 2 * s.block), "activations": activations, "logit chunks": logits,
            "gradient buffers": buffers, "reserve": 3 * GIB, **({"frozen models": frozen} if frozen else {}),
        })  # fmt: skip
    return peaks


def adapter_parameters(config, rank):
    """Parameters of LoRA adapters on all linear layers of the blocks: rank (in + out) each."""
    s = model_sizes(config)
    D, widths = config.hidden_size, (s.heads, s.kv, s.kv, s.heads, *[config.intermediate_size] * 3)
    return s.layers * rank * sum(D + width for width in widths)


def frozen_memory(cfg, config, world):
    """Bytes a GPU holds of a reference model, bf16 and sharded over a copy. With adapters it is the policy's own."""
    return 0 if cfg.lora_rank else 2 * model_sizes(config).params / (world // cfg.replicate)


def tp_misfit(tp, config, ranks):
    """Why vLLM cannot cut a model over tp of the ranks of a node: one line, "" if it can."""
    if tp == 1:
        return ""
    model_sizes(config)  # ValueError: no llama-like decoder
    kv = config.num_key_value_heads
    counts = {"ranks of a node": ranks, "attention heads": config.num_attention_heads,
              "kv heads": kv if tp % kv else 0,  # each of them on several GPUs, otherwise
              "units of the MLP": config.intermediate_size,
              "rows of the padded vocabulary": -(-config.vocab_size // 64) * 64}  # fmt: skip
    wrong = [f"engine_tp: {tp} does not divide the {n} {what}" for what, n in counts.items() if n % tp]
    return wrong[0] if wrong else ""


def engine_shard(cfg, config):
    """What each GPU of an engine holds -> (bytes of its weights, bytes of a cached token). A kv head is on several GPUs
    where there are fewer heads than GPUs. Norms, and kv weights then, are on more than one, which is not counted."""
    s = model_sizes(config)
    return 2 * s.params / cfg.engine_tp, s.kv_bytes // min(cfg.engine_tp, config.num_key_value_heads)


def engine_overhead(config, gpu, tp=1):
    """Bytes that vLLM takes of its share beside weights and KV cache -> (activations and sampling, CUDA graphs). The
    graphs stay on the GPU while the engine sleeps.

    A batch of T tokens: input and output of the MLP's activation, 6 I / tp, the residual stream, 4 D. A sequence: fp32
    logits and the counts of the penalties, 8 V. Graphs: 1.5 GiB, assumed; no GPU has shown it."""
    slots, tokens = engine_batch(gpu)
    work = tokens * (6 * config.intermediate_size // tp + 4 * config.hidden_size) + 8 * slots * config.vocab_size
    return work, 1.5 * GIB


def engine_room(cfg, config, world, gpu, frozen=0):
    """Of one GPU -> (the share vLLM gets, the largest share that fits beside the trainer, tokens of its engine's KV
    cache). The share is cfg.gpu_memory_utilization, or all that fits."""
    (weights, token), total = engine_shard(cfg, config), gpu.memory * GIB
    fits = (total - sum(trainer_memory(cfg, config, world, frozen)[0].values())) / total
    share = cfg.gpu_memory_utilization or int(100 * fits) / 100
    return share, fits, int((share * total - weights - sum(engine_overhead(config, gpu, cfg.engine_tp))) / token)


def engine_share(cfg, config, world, gpu, frozen=0):
    """The share of one GPU that vLLM may take (its gpu_memory_utilization) beside what the trainer keeps while the
    engine is awake (trainer_memory) -> (share, one line of numbers).

    ValueError where cfg.gpu_memory_utilization asks for more, or where nothing useful is left."""
    share, fits, tokens = engine_room(cfg, config, world, gpu, frozen)
    parts = trainer_memory(cfg, config, world, frozen)[0]
    keeps = parts["fp32 weights"] + parts["Adam moments"] + parts.get("frozen models", 0)
    scoring = sum(parts.values()) - parts["reserve"] - keeps
    weights, overhead = engine_shard(cfg, config)[0], sum(engine_overhead(config, gpu, cfg.engine_tp))
    report = (
        f"GPU {gpu.memory:.1f} GiB: trainer keeps {keeps / GIB:.1f}, entropy pass {scoring / GIB:.1f}, "
        f"engine {share:.2f} = {share * gpu.memory:.1f} GiB, weights {weights / GIB:.1f}, "
        f"workspace and graphs {overhead / GIB:.1f}, KV for {max(0, tokens)} tokens"
    )
    if fits <= 0 or tokens < cfg.max_prompt_tokens + cfg.max_response_tokens:
        change = f"use more ranks, or a larger engine_tp, or lower micro_batch_tokens (= {cfg.micro_batch_tokens})"
        raise ValueError(f"model: does not fit, {change}. {report}")
    if share > fits:
        most = int(100 * fits) / 100
        raise ValueError(f"gpu_memory_utilization: {share:.2f} is too much, set at most {most}. {report}")
    return share, report


def peak_memory():
    """GiB at the highest: of this rank's GPU as torch counts it, since the last call; of the process where there is no
    GPU, since its start. torch also counts vLLM's pool, awake or asleep (vLLM's issues 17117, 33625): here it is left
    out. vLLM's CUDA graphs are outside the pool, and count."""
    if torch.cuda.is_available():
        cumem = sys.modules.get("vllm.device_allocator.cumem")
        pool = cumem.CuMemAllocator.get_instance().get_current_usage() if cumem else 0
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return (peak - pool) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 2**10) / GIB


def peak_flops():
    """Dense bf16 FLOP/s of the GPU at hand, 0 where it is not in GPUS or is none."""
    return this_gpu().flops if torch.cuda.is_available() else 0


def forward_flops(config, lengths, head_tokens=None, lora_rank=0):
    """FLOPs of one forward over packed sequences of these lengths n, a multiply-add counted as 2:

        2 · weights of the blocks' matrix products · Σ n + 4 · query width · blocks · Σ n (n + 1) / 2 + 2 · D · V · h

    The middle term is causal attention: Q K^T and P V for each pair of a token and one it sees. Embedding look-up,
    norms, RoPE and softmax count nothing. h = head_tokens: how many tokens go through the head (None: all).
    lora_rank: adapters stand beside the blocks' weights, and their weights are multiplied as well."""
    s = model_sizes(config)
    tokens, pairs = sum(lengths), sum(n * (n + 1) // 2 for n in lengths)
    head = tokens if head_tokens is None else head_tokens
    weights = s.linear + adapter_parameters(config, lora_rank)
    return 2 * weights * tokens + 4 * s.heads * s.layers * pairs + 2 * s.head * head


def train_flops(config, lengths, head_tokens=None, lora_rank=0):
    """FLOPs of forward and backward over the same. A backward multiplies the gradient of every product with both of
    its factors, so the two are 3 forwards. With adapters the weights of blocks and head are frozen, and a factor
    without a gradient saves one product. Attention and the adapters still count 3. The input of the first block is
    the frozen embedding: q, k and v and their A get no gradient of it."""
    flops = 3 * forward_flops(config, lengths, head_tokens, lora_rank)
    if not lora_rank:
        return flops
    s, tokens = model_sizes(config), sum(lengths)
    head = tokens if head_tokens is None else head_tokens
    first = config.hidden_size * (s.heads + 2 * s.kv + 3 * lora_rank)
    return flops - 2 * (s.linear + first) * tokens - 2 * s.head * head


def utilisation(config, lengths, response_tokens, seconds, world, shared=(), lora_rank=0):
    """Model FLOPs utilisation of an update: forward and backward (train_flops) over the rollouts trained on, of
    `lengths` packed tokens, whatever is computed again, padded or waited for. Embeddings do not count. shared: of
    branches in brooms, the first tokens that their trunk forwards for them (broom.skips); those count once.
    -> perf/tflops and perf/trained_throughput (response tokens), both a second and rank; perf/mfu, over the GPU's
    peak, where that is known."""
    once = train_flops(config, shared, 0, lora_rank)
    flops = (train_flops(config, lengths, response_tokens, lora_rank) - once) / seconds / world
    out = {"perf/tflops": flops / 1e12, "perf/trained_throughput": response_tokens / seconds / world}
    return out | ({"perf/mfu": flops / peak_flops()} if peak_flops() else {})
