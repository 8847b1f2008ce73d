"""The arithmetic that tools/gpu_check.py looks at first: attention and head in bf16, against float64.

A check takes the run (`device`, and `config`, the model's shape) and returns (whether it holds, {what: number}).
Symbols: T tokens of one packed row · d width of a head · D width · V vocabulary.
"""

import torch
from torch.nn.attention.varlen import varlen_attn

from lib import policy
from loss import logp_and_entropy

# Tolerances. bf16 has 8 bits, so rounding a number is off by at most 2^-9 = 0.2 % of it. Errors in a sum are random, so
# its relative error is that of its terms or less. What counts is how often a number is rounded on its way.
ATTENTION = {"forward": 0.02, "backward": 0.04}  # probabilities and output; then dP, dS and the product: worst token
HEAD = 0.02  # the gradient of the logits is rounded once, its products once: whole tensor
LOGITS = 1e-3  # nats: fp32 sums of exact products


# ---------------------------------------------------------------------------------------------------------- attention
def dense_attention(q, k, v, cu_q, cu_k):
    """The reference, with one mask of all queries by all keys. q (heads, T_q, d), k and v (kv_heads, T_k, d) -> like q.

    The queries of a sequence are its last tokens, so a query sees those keys of its sequence that are at least as far
    from the end as it is: the diagonal is at the bottom right."""

    def places(cu):  # of each token: its sequence, and how far it is from the end of that
        owner = torch.arange(len(cu) - 1, device=cu.device).repeat_interleave(cu.diff())
        return owner, cu[1:][owner] - torch.arange(len(owner), device=cu.device)

    (owner_q, left_q), (owner_k, left_k) = places(cu_q), places(cu_k)
    seen = (owner_q[:, None] == owner_k) & (left_q[:, None] <= left_k)  # (T_q, T_k)
    k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~seen, float("-inf"))
    return scores.softmax(-1) @ v


def attention_errors(run, attend, lengths, key_lengths=None):
    """attend(q, k, v, cu_q, cu_k, longest_q, longest_k) against dense_attention, for the shape's heads and for 8 heads
    on 2 -> {part: the largest error of a token, relative to its own norm or the typical one, whichever is larger}."""
    config, worst, key_lengths = run.config, {"forward": 0.0, "backward": 0.0}, key_lengths or lengths
    cu_q, cu_k = (torch.tensor([0, *n], device=run.device).cumsum(0).int() for n in (lengths, key_lengths))
    rng = torch.Generator(run.device).manual_seed(0)

    def noise(heads, cu):
        d = config.hidden_size // config.num_attention_heads
        return torch.randn(heads, int(cu[-1]), d, device=run.device, generator=rng).bfloat16()

    for heads, kv in ((config.num_attention_heads, config.num_key_value_heads), (8, 2)):
        inputs, g = (noise(heads, cu_q), noise(kv, cu_k), noise(kv, cu_k)), noise(heads, cu_q)
        ours, exact = ([x.to(dtype, copy=True).requires_grad_() for x in inputs] for dtype in (g.dtype, torch.double))
        out = attend(*ours, cu_q, cu_k, max(lengths), max(key_lengths))
        true = dense_attention(*exact, cu_q, cu_k)
        out.backward(g)
        true.backward(g.double())
        gradients = [("backward", a.grad, b.grad) for a, b in zip(ours, exact, strict=True)]
        for part, a, b in [("forward", out.detach(), true.detach()), *gradients]:
            apart, norms = ((x.double()).norm(dim=(0, 2)) for x in (a - b, b))  # (T,)
            error = (apart / norms.clamp(min=norms.square().mean().sqrt())).max().item()
            worst[part] = worst[part] if error <= worst[part] else error  # keeps a nan
    return worst


def within(errors):
    return all(errors[part] <= limit for part, limit in ATTENTION.items()), errors


def trainer_attention(q, k, v, cu_q, cu_k, longest_q, longest_k):
    """What the trained model calls."""
    where = {"cu_seq_lens_q": cu_q, "max_length_q": longest_q, "cu_seq_lens_k": cu_k, "max_length_k": longest_k}
    out, _ = policy.packed_attention(None, q[None], k[None], v[None], None, q.shape[-1] ** -0.5, **where)
    return out[0].transpose(0, 1)


def packed_attention(run, cfg):
    """Sequences in one row see themselves and their past, and no neighbour. Lengths differ, some are of one token."""
    # an early token has few others to look at: one too many or too few moves it by far more than the tolerance
    return within(attention_errors(run, trainer_attention, [1, 5, 64, 1, 33, 130]))


def empty_sequences(run, cfg):
    """The same holds with sequences of length 0 in the row, as compiled micro-batches are padded with them."""
    return within(attention_errors(run, trainer_attention, [3, 0, 40, 1, 0, 0]))


def causal_alignment(run, cfg):
    """Where keys are longer than queries, as in brooms, queries are the last tokens: the diagonal is bottom right."""

    def attend(q, k, v, *lengths):
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))  # (T, heads, d)
        return varlen_attn(q, k, v, *lengths, window_size=(-1, 0), **policy.GQA).transpose(0, 1)

    return within(attention_errors(run, attend, [1, 5, 20, 30, 7], [9, 70, 20, 131, 8]))


# --------------------------------------------------------------------------------------------------------------- head
def head_inputs(run, tokens=64):
    """Hidden states (T, D) and a head (V, D) in bf16 whose logits are 5 nats wide, and tokens (T,)."""
    D, V, rng = run.config.hidden_size, run.config.vocab_size, torch.Generator(run.device).manual_seed(0)
    hidden, weight = (torch.randn(n, D, device=run.device, generator=rng) for n in (tokens, V))
    targets = torch.randint(V, (tokens,), device=run.device, generator=rng)
    return hidden.bfloat16(), (weight * 5 / D**0.5).bfloat16(), targets


def largest(a, b):
    return (a.double() - b).abs().max().item()


def fp32_logits(run, cfg):
    """Logits are kept in fp32 though operands are bf16. The second number is the error of logits rounded to bf16."""
    hidden, weight, targets = head_inputs(run)
    z = hidden.double() @ weight.double().t()
    exact, rounded = (x.log_softmax(-1).gather(-1, targets[:, None])[:, 0] for x in (z, z.bfloat16().double()))
    error = largest(logp_and_entropy(hidden, weight, targets)[0], exact)
    return error <= LOGITS, {"nats off": error, "if rounded": largest(rounded, exact)}


def head(run, cfg):
    """The chunked head's log-prob, entropy and gradients are those of plain autograd, across a chunk's border."""
    hidden, weight, targets = head_inputs(run)
    ours, exact = ([x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight)]
                   for dtype in (hidden.dtype, torch.double))  # fmt: skip
    found = logp_and_entropy(*ours, targets, 1.0, 40)
    logq = (exact[0] @ exact[1].t()).log_softmax(-1)
    true = logq.gather(-1, targets[:, None])[:, 0], -(logq.exp() * logq).sum(-1)
    for logp, entropy in (found, true):
        (logp.sum() + 0.1 * entropy.sum()).backward()
    off = max(largest(a.detach(), b.detach()) for a, b in zip(found, true, strict=True))
    apart = [((a.grad - b.grad).norm() / b.grad.norm()).item() for a, b in zip(ours, exact, strict=True)]
    numbers = {"nats off": off, "gradient of hidden, relative": apart[0], "of weight": apart[1]}
    return off <= LOGITS and all(x <= HEAD for x in apart), numbers
