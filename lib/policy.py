"""The trained model: Hugging Face weights under FSDP2, the packed forward, micro-batches, one optimizer step.

Symbols: T packed input tokens of a micro-batch · K keys that they see · R response tokens in it · n its rollouts ·
V vocabulary · D width.
"""

import inspect

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.utils import logging as hf_logging

from lib.broom import brooms, skips
from lib.lora import LoraLinear, adapt, save_adapter
from lib.watch import LIMIT
from lib.weights import open_lm, read_weights
from loss import HEAD_CHUNK, logp_and_entropy

MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's, as torch names them
GRAD_CLIP = 1.0  # the reference's; larger gradients are scaled down to this norm

# torch 2.11 has no enable_gqa argument (its kernel accepts fewer kv heads as it is); later releases want it said
GQA = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def packed_attention(module, query, key, value, mask, scaling=None, cu_seq_lens_q=None, max_length_q=None,
                     cu_seq_lens_k=None, max_length_k=None, seen=None, **kwargs):  # fmt: skip
    """Causal attention within each sequence of one packed row; tokens never see another sequence.

    query (1, heads, T, d), key/value (1, kv_heads, T, d) -> (1, T, heads, d), None. cu_seq_lens_q, cu_seq_lens_k
    (n + 1,) int32: borders of the sequences' queries in the row, and of their keys in `seen` (K,), the positions of all
    keys one sequence after the other (lib/broom.py). seen None: keys are those of the row. Queries are the last keys.
    CUDA: torch's own variable-length flash kernel. CPU: a loop over sequences, without a T x T mask."""
    if seen is not None:
        key, value = gather_tokens(key, seen), gather_tokens(value, seen)
    if not query.is_cpu:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, d)
        # more keys than queries: flash-attn 2 aligns the causal mask at the bottom right (its mask.h)
        borders = cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k
        return varlen_attn(q, k, v, *borders, scale=scaling, window_size=(-1, 0), **GQA)[None], None
    if seen is not None:  # the flat rows again: the very calls of flat packing, so the same floats, and no mask
        query = gather_tokens(query, seen)
    return _attention_by_sequence(query, key, value, cu_seq_lens_q, cu_seq_lens_k, scaling), None


def gather_tokens(x, positions):
    """(1, heads, T, d) -> (1, heads, K, d), laid out token by token as it was."""
    return x.transpose(1, 2).index_select(1, positions).transpose(1, 2)


@torch.compiler.disable  # lengths are data
def _attention_by_sequence(query, key, value, cu_queries, cu_keys, scaling):
    own, lengths = cu_queries.diff().tolist(), cu_keys.diff().tolist()
    # split, not slices: the backward of n slices would fill n gradients of the whole row with zeros
    parts = zip(own, *(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    causal = {"is_causal": True, "scale": scaling, "enable_gqa": True}
    rows = [F.scaled_dot_product_attention(q, k, v, **causal)[:, :, q.shape[2] - n :] for n, q, k, v in parts]
    return torch.cat(rows, 2).transpose(1, 2)


AttentionInterface.register("packed", packed_attention)
hf_logging.disable_progress_bar()  # one bar, ours


# -------------------------------------------------------------------------------------------------------- micro-batches
def pack(rollouts, device, bucket=0, share=False):
    """Rollouts one after the other in a single row, without padding -> dict for PackedLM.forward.

    The one place of the one-token shift: the logits at position i are for token i + 1, so a rollout's last token is
    never an input, and `index` holds the positions whose hidden states *produced* the response tokens `targets` (R,).
    No rollouts: one dummy token and no targets, so that a rank with nothing to do still joins FSDP's collectives.
    bucket > 0 (for compiled blocks, which are compiled for each shape anew): dummy sequences without targets pad T to
    a multiple of it and n to a multiple of 32, and lengths are the next power of two. Not together with share.
    share: tokens that a branch has in common with the base response before it are in the row once (lib/broom.py)."""
    assert not (bucket and share), "brooms are neither compiled nor padded"
    ids, pos, seen, index, targets, cu, cu_keys, trunk = [], [], [], [], [], [0], [0], []
    for r, skip in zip(rollouts, skips(rollouts) if share else [0] * len(rollouts), strict=True):
        seq = r.prompt_ids + r.prefix_ids + r.response_ids
        first = len(seq) - len(r.response_ids)
        if not 0 < first < len(seq):
            raise AssertionError(f"a rollout needs a prompt and a response, got {first} + {len(r.response_ids)} tokens")
        # where in the row each of its inputs is; the state before the fork, the trunk's, produces the first new token
        at = [*trunk[:skip], *range(cu[-1], cu[-1] + len(seq) - 1 - skip)]
        trunk = trunk if skip else at
        index += at[first - 1 :]
        targets += r.response_ids
        ids += seq[skip:-1]
        pos += range(skip, len(seq) - 1)
        if len(ids) > cu[-1]:  # a branch of one token has no input of its own
            seen += at
            cu.append(len(ids))
            cu_keys.append(len(seen))
    if not rollouts:
        ids, pos, seen, cu, cu_keys = [0], [0], [0], [0, 1], [0, 1]
    if bucket:
        dummy = -len(ids) % bucket
        ids, pos, cu = ids + [0] * dummy, pos + list(range(dummy)), cu + [cu[-1] + dummy]
        cu_keys = cu = cu + cu[-1:] * (-(len(cu) - 1) % 32)  # sequences of length 0

    def tensor(x, dtype=torch.long):
        return torch.tensor(x, dtype=dtype, device=device)

    def longest(borders):
        n = max(b - a for a, b in zip(borders, borders[1:], strict=False))
        return 1 << (n - 1).bit_length() if bucket else n

    return {
        "input_ids": tensor(ids)[None],  # (1, T)
        "position_ids": tensor(pos)[None],  # (1, T)
        "cu_seqlens": tensor(cu, torch.int32),  # (n + 1,)
        "max_len": longest(cu),
        "cu_keys": tensor(cu_keys, torch.int32),  # (n + 1,)
        "max_keys": longest(cu_keys),
        "seen": tensor(seen) if len(seen) > len(ids) else None,  # (K,)
        "index": tensor(index),  # (R,)
        "targets": tensor(targets),  # (R,)
    }


def packed_length(r):
    """Input tokens a rollout takes in a flat row of a micro-batch."""
    return len(r.prompt_ids) + len(r.prefix_ids) + len(r.response_ids) - 1


def bins(lengths, indices, k):
    """Spread `indices` over k bins of nearly equal total length: longest first, always into the emptiest bin
    (at most 4/3 of the best possible maximum: R. L. Graham 1969). Each bin is in ascending order."""
    out, load = [[] for _ in range(k)], [0] * k
    for i in sorted(indices, key=lambda i: (-lengths[i], i)):
        b = load.index(min(load))
        out[b].append(i)
        load[b] += lengths[i]
    return [sorted(b) for b in out]


def partition(lengths, world, budget):
    """Rollouts of one minibatch -> [rank][micro-batch][index]: balanced over ranks by tokens, at most `budget` tokens a
    micro-batch, and equally many micro-batches on every rank, since each is one collective forward. Every rank computes
    the whole plan from the same lengths: no communication. A sequence over the budget is a ValueError."""
    if lengths and max(lengths) > budget:
        raise ValueError(f"micro_batch_tokens={budget} is smaller than one sequence of {max(lengths)} tokens: raise it")
    ranks = bins(lengths, range(len(lengths)), world)
    k = max(1, *(-(-sum(lengths[i] for i in r) // budget) for r in ranks))
    while True:
        plan = [bins(lengths, r, k) for r in ranks]
        if all(sum(lengths[i] for i in b) <= budget for p in plan for b in p):
            return plan
        k += 1


def cut(rollouts, cfg, world):
    """partition() of a minibatch, brooms whole -> [rank][micro-batch][index], a trunk before its branches."""
    lengths = [packed_length(r) for r in rollouts]
    units = [[i] for i in range(len(rollouts))]
    if cfg.packing == "broom":
        units, lengths = brooms(rollouts, lengths, cfg.micro_batch_tokens)
    plan = partition(lengths, world, cfg.micro_batch_tokens)
    return [[[i for u in micro for i in units[u]] for micro in rank] for rank in plan]


# ------------------------------------------------------------------------------------------------------------ the model
class PackedLM(torch.nn.Module):
    """A causal LM whose forward ends in (logp, entropy). The head is applied *inside* the FSDP root's forward: there
    lm_head.weight is gathered, once, and stays so through all chunks and the backward."""

    def __init__(self, lm, chunk=HEAD_CHUNK):
        super().__init__()
        self.lm, self.chunk = lm, chunk

    def forward(self, input_ids, position_ids, cu_seqlens, max_len, cu_keys, max_keys, seen, index, targets,
                temperature, statistic=None):  # fmt: skip
        hidden = self.lm.base_model(
            input_ids=input_ids, position_ids=position_ids, use_cache=False, cu_seq_lens_q=cu_seqlens,
            max_length_q=max_len, cu_seq_lens_k=cu_keys, max_length_k=max_keys, seen=seen,
        ).last_hidden_state[0]  # (T, D)
        head = self.lm.get_output_embeddings().weight  # (V, D)
        return logp_and_entropy(hidden[index], head, targets, temperature, self.chunk, statistic)  # (R,) each


class Policy:
    """fp32 master weights, sharded by FSDP2 over the ranks of a copy, as a rule all ranks (one group a block, the rest
    in the root); compute in `dtype` (fp32 on CPU, bf16 on CUDA), gradients reduced in fp32. Whatever runs the model or
    gathers weights is a collective (forward, score, update, named_full, save_hf): every rank calls it, in the same
    order."""

    def __init__(self, cfg, path, device, frozen=False):
        """frozen: only to score with, in the compute dtype, without an optimizer."""
        self.dtype = compute_dtype(cfg, device)
        lora, self.path = cfg.lora_rank and not frozen, path
        lm, weights = open_lm(path, self.dtype if frozen or lora else torch.float32, "packed")
        lm.requires_grad_(not frozen)
        if lora:
            weights |= adapt(lm, cfg.lora_rank, cfg.lora_alpha, cfg.seed)
        if device.type == "cuda" and self.dtype == torch.float32:
            raise ValueError("dtype: the packed attention kernel on CUDA is for bfloat16: leave dtype at auto")
        self.device, self.cfg = device, cfg
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.config, self.n_params = lm.config, sum(p.numel() for n, p in lm.named_parameters() if ".lora_" not in n)
        if cfg.activation_checkpointing:
            lm.gradient_checkpointing_enable({"use_reentrant": False})
            lm.train()  # transformers checkpoints in train mode only; the models used here have dropout 0
        self.model = PackedLM(lm)
        # eighths of the budget: at most 12.5 % of a full micro-batch is padding, and few shapes are compiled
        self.bucket = -(-cfg.micro_batch_tokens // 8) if cfg.compile else 0
        # Neighbours are of one copy: with a copy a node, weights are gathered within a node, and only gradients cross.
        shape = cfg.replicate, self.world // cfg.replicate
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
        mesh = mesh if cfg.replicate > 1 else mesh["shard"]
        for group in mesh.get_all_groups():  # a mesh takes no limit of its own, and its groups' would be minutes
            dist.distributed_c10d._set_pg_timeout(LIMIT, group)
        mp = MixedPrecisionPolicy(param_dtype=self.dtype, reduce_dtype=torch.float32)
        if cfg.compile:  # shapes x (scoring, training); past the default limit of 8 a shape would run eager, unasked
            torch._dynamo.config.recompile_limit = 128
        for block in lm.base_model.layers:
            if cfg.compile:
                block.compile(dynamic=False)
            fully_shard(block, mesh=mesh, mp_policy=mp)
        fully_shard(self.model, mesh=mesh, mp_policy=mp)
        read_weights(self.model, lm, weights, device)
        for m in self.model.modules():
            if isinstance(m, FSDPModule):  # our losses are sums over all ranks already: add gradients, do not average
                m.set_force_sum_reduction_for_comms(True)
                m.set_gradient_divide_factor(1.0)
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if not frozen:
            self.new_optimizer(cfg)

    def new_optimizer(self, cfg):
        """A fresh AdamW, weight decay on all that is trained (the reference's setting). It has its moments from the
        start: the first step would put them among activations, whose blocks could then not go back to the driver."""
        self.opt = torch.optim.AdamW(
            self.trained.values(), lr=cfg.lr, betas=tuple(cfg.betas), eps=1e-8, weight_decay=cfg.weight_decay,
            fused=True,
        )  # fmt: skip
        for p in self.trained.values():
            moments = {k: torch.zeros_like(p.detach()) for k in MOMENTS}
            self.opt.state[p] = {"step": torch.zeros((), device=self.device), **moments}

    def forward(self, rollouts, temperature, statistic=None):
        """(logp (R,), entropy (R,)) fp32 of the response tokens of one micro-batch, rollout after rollout. With a
        method's position_statistic also that (R,)."""
        packed = pack(rollouts, self.device, self.bucket, self.cfg.packing == "broom")
        return self.model(**packed, temperature=temperature, statistic=statistic)

    @torch.no_grad()
    def score(self, micro_batches, temperature, statistic=None):
        """Log-probs and entropies of this rank's micro-batches (lists of rollouts): -> [(logp, entropy)] per rollout
        in order, numpy fp32 (T,), and the statistic as a third where there is one. Ranks may bring different numbers of
        micro-batches, none included: the rest are dummies."""
        count = torch.tensor(len(micro_batches), device=self.device)
        dist.all_reduce(count, op=dist.ReduceOp.MAX)
        out = []
        for i in range(int(count)):
            mb = micro_batches[i] if i < len(micro_batches) else []
            found = torch.stack(self.forward(mb, temperature, statistic)).cpu().numpy()  # (2 or 3, R)
            cuts = np.cumsum([len(r.response_ids) for r in mb])
            out += [tuple(x) for x in np.split(found, cuts, axis=1)[:-1]]
        self.model.reshard()  # FSDP2 leaves the root gathered after a forward without backward
        return out

    def score_base(self, *args):
        """score() by the model without its adapters: the one that `model` names, as it was before training."""
        LoraLinear.on = False
        try:
            return self.score(*args)
        finally:
            LoraLinear.on = True

    def score_local(self, rollouts, temperature):
        """score() for any list of rollouts of this rank, packed into micro-batches here, results in the list's
        order."""
        plan = partition([packed_length(r) for r in rollouts], 1, self.cfg.micro_batch_tokens)[0]
        flat = [i for mb in plan for i in mb]
        scored = self.score([[rollouts[i] for i in mb] for mb in plan], temperature)
        out = [None] * len(rollouts)
        for i, s in zip(flat, scored, strict=True):
            out[i] = s
        return out

    def update(self, micro_batches, loss_fn, temperature, lr, grad_clip=GRAD_CLIP):
        """One optimizer step on one minibatch. loss_fn(rollouts, logp, entropy) -> scalar, already divided by the
        minibatch's totals over all ranks. Returns (gradient norm, taken): a norm that is not finite means no step, on
        every rank alike, because the norm is of the whole gradient."""
        for mb in micro_batches:
            logp, entropy = self.forward(mb, temperature)
            loss_fn(mb, logp, entropy).backward()  # frees this micro-batch's graph
        grads = [p.grad.to_local() for p in self.trained.values()]
        # squares in float64: the norm must not depend on how many ranks the parameters are cut into
        total = torch.stack([g.double().square().sum() for g in grads]).sum()
        dist.all_reduce(total)
        norm = (total / self.cfg.replicate).sqrt().item()  # a shard is there so often
        taken = bool(np.isfinite(norm))
        if taken:
            if grad_clip > 0 and norm > grad_clip:
                torch._foreach_mul_(grads, grad_clip / (norm + 1e-6))
            for group in self.opt.param_groups:
                group["lr"] = lr
            self.opt.step()
        self.opt.zero_grad(set_to_none=True)
        return norm, taken

    # ----------------------------------------------------------------------------------------------- weights in and out
    def named_full(self, dtype=None):
        """(HF name, full tensor) one after the other, each gathered from its shards when asked for and freed by the
        caller: never a second copy of the model. A collective. Tied weights appear once."""
        for name, p in self.model.named_parameters():
            if ".lora_" in name:
                continue
            layer, p = self.model.get_submodule(name.rpartition(".")[0]), p.detach()
            if isinstance(layer, LoraLinear) and name.endswith("weight"):
                parts = (x.detach().full_tensor() for x in (p, layer.lora_A, layer.lora_B))
                yield name.removeprefix("lm."), layer.merged(*parts).to(dtype or self.dtype)
            else:
                yield name.removeprefix("lm."), p.to(dtype or self.dtype).full_tensor()

    def save_hf(self, folder, tokenizer):
        """Write an ordinary Hugging Face folder in the compute dtype (safetensors, config, tokenizer, generation
        config)."""
        state = {}
        for name, full in self.named_full():
            if self.rank == 0:
                state[name] = full.cpu()
        if self.rank == 0:
            lm = self.model.lm
            lm.save_pretrained(folder, state_dict=state)
            # save_pretrained notes the fp32 of the master weights, and loaders would believe it
            lm.config.dtype = self.dtype
            lm.config.save_pretrained(folder)
            tokenizer.save_pretrained(folder)

    def save_adapter(self, folder):
        """Write the adapters as PEFT reads them. A collective; nothing without adapters."""
        if self.cfg.lora_rank:
            full = {n.removeprefix("lm."): p.detach().full_tensor().cpu() for n, p in self.trained.items()}
            if self.rank == 0:
                save_adapter(folder, full, self.cfg.lora_rank, self.cfg.lora_alpha, self.path)

    def state(self):
        """What is trained and its Adam state as one flat dict of sharded tensors, for torch.distributed.checkpoint.
        Moments are left out before the first step: they are zeros."""
        out, keys = {}, MOMENTS if self.adam_step else ()
        for name, p in self.trained.items():
            out["model." + name] = p.detach()
            out |= {f"{key}.{name}": self.opt.state[p][key] for key in keys}
        return out

    @property
    def adam_step(self):
        """Optimizer steps taken since the optimizer was made."""
        return int(next(s["step"] for s in self.opt.state.values()))

    def prepare_adam(self, step):
        """Let a new optimizer count from `step`, for a checkpoint's moments to be loaded into."""
        for s in self.opt.state.values():
            s["step"].fill_(step)


def compute_dtype(cfg, device):
    """The dtype of forward and backward: cfg.dtype, where auto is bf16 on CUDA and fp32 elsewhere."""
    if cfg.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, cfg.dtype)


def learning_rate(cfg, step):
    """Linear warmup, then constant. Steps count from 1, so the first one already has lr / warmup and never 0."""
    return cfg.lr * min(1.0, step / cfg.warmup) if cfg.warmup else cfg.lr
