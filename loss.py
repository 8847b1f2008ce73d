"""The numbers that train the policy. Tensors in, tensors out: no config, no distributed, no logging, nothing of ours.

Symbols: N rollouts · T response tokens of a micro-batch, packed one rollout after the other · V vocabulary · D width.
Papers: DAPO = arXiv 2503.14476, 80/20 = arXiv 2506.01939, CURE = arXiv 2508.11016, TIS = F. Yao et al. 2025.
Three of these functions are hooks: a file of methods/ may replace group_advantages, policy_loss and token_mask.
"""

import math

import torch

HEAD_CHUNK = 1024  # tokens whose logits exist at one time: 0.6 GB in fp32 at V = 152k


# ---------------------------------------------------------------------------------------------------------- the head
def _logits(hidden, weight, temperature):
    """(C, D), (V, D) -> (C, V) in fp32."""
    # bf16 logits are off by up to 0.06 nats at |z| ~ 20 (8 bits of mantissa). That is more than a typical policy ratio
    # moves in one step. So I multiply in bf16 if I must, but accumulate *and keep* fp32.
    if hidden.is_cuda and hidden.dtype == torch.bfloat16:
        z = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    else:
        z = hidden.float() @ weight.float().t()
    return z if temperature == 1.0 else z.div_(temperature)


class _ChunkedHead(torch.autograd.Function):
    """Log-prob and entropy without ever holding a (T, V) tensor: at T = 16k, V = 152k that one tensor would be 10 GB,
    and autograd would keep several. Each chunk's logits are made, reduced and dropped. Backward makes them again, which
    costs 4 head products instead of 3."""

    @staticmethod
    def forward(ctx, hidden, weight, tokens, temperature, chunk, statistic):
        """See logp_and_entropy for shapes and units."""
        T = hidden.shape[0]
        logp, entropy, lse, extra = (torch.empty(T, dtype=torch.float32, device=hidden.device) for _ in range(4))
        for a in range(0, T, chunk):
            s = slice(a, a + chunk)
            z = _logits(hidden[s], weight, temperature)  # (C, V)
            lse[s] = z.logsumexp(-1)
            z -= lse[s, None]  # now log-probabilities
            logp[s] = z.gather(-1, tokens[s, None])[:, 0]
            # a token of probability 0 has log p = -inf; its share of the entropy is 0, not 0 * inf = nan
            entropy[s] = -(z.exp() * z).nan_to_num_(nan=0.0).sum(-1) + 0.0 * lse[s]  # a nan in the logits stays a nan
            if statistic:
                extra[s] = statistic(z, entropy[s], tokens[s])
        ctx.save_for_backward(hidden, weight, tokens, lse, entropy)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.set_materialize_grads(False)  # entropy is seldom differentiated: then its gradient is None, and free
        ctx.mark_non_differentiable(extra)
        return (logp, entropy, extra) if statistic else (logp, entropy)

    @staticmethod
    def backward(ctx, g_logp, g_entropy, *_):
        """From gradients (T,) of both outputs, None where there is none, to those of hidden (T, D), weight (V, D)."""
        hidden, weight, tokens, lse, entropy = ctx.saved_tensors
        if g_logp is None and g_entropy is None:
            return (None,) * 6
        d_hidden = torch.zeros_like(hidden)
        shape = weight.shape if ctx.needs_input_grad[1] else 0  # a frozen head has no gradient
        d_weight = torch.zeros(shape, dtype=torch.float32, device=weight.device)
        for a in range(0, hidden.shape[0], ctx.chunk):
            s = slice(a, a + ctx.chunk)
            z = _logits(hidden[s], weight, ctx.temperature).sub_(lse[s, None])  # log p, recomputed
            p = z.exp()
            if g_entropy is not None:  # dH/dz_v = -p_v (log p_v + H)
                z.add_(entropy[s, None]).mul_(p).nan_to_num_(nan=0.0).mul_(-g_entropy[s, None])
            if g_logp is not None:  # d log p_tok / dz_v = 1[v = tok] - p_v
                p.mul_(-g_logp[s, None])
                p.scatter_add_(1, tokens[s, None], g_logp[s, None])
                z = p if g_entropy is None else z.add_(p)
            dz = z.div_(ctx.temperature).to(hidden.dtype)
            d_hidden[s] = dz @ weight
            if ctx.needs_input_grad[1]:
                d_weight += (dz.t() @ hidden[s]).float()
        return d_hidden, d_weight.to(weight.dtype) if len(d_weight) else None, None, None, None, None


def logp_and_entropy(hidden, weight, tokens, temperature=1.0, chunk=HEAD_CHUNK, statistic=None):
    """Log-probability of each sampled token, and entropy of the distribution it was drawn from (80/20 eq. 1).

    hidden (T, D): last hidden states at the positions that *produced* the tokens; the shift is made in policy.pack.
    weight (V, D): the LM head. tokens (T,) int64. temperature: of sampling; the logits are divided by it.
    Returns logp (T,), entropy (T,), nats, fp32 whatever the input dtype, differentiable in hidden and weight. Only
    `chunk` rows of logits live at a time, forward and backward. ValueError: temperature <= 0.
    statistic: a method's function of a chunk's log-probs (C, V), entropy (C,), tokens (C,) -> (C,), a third result."""
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0 to score tokens, got {temperature}")
    return _ChunkedHead.apply(hidden, weight, tokens, float(temperature), chunk, statistic)


# ------------------------------------------------------------------------------------------------ advantage and loss
def group_advantages(scores, groups, parents=None):
    """A = (s - mean) / (std + 1e-6) over each group of rollouts of one prompt, std with n - 1 (GRPO; DAPO eq. 9).

    scores (N,) float, groups (N,) any integers, parents (N,): of a branch the index of its base rollout among its
    group's n1, else -1, also for a plain resample (not used here). Returns (N,) fp32."""
    s = scores.double()
    _, g = torch.unique(groups, return_inverse=True)
    n = torch.bincount(g).double()  # (groups,)
    mean = torch.bincount(g, weights=s) / n
    dev = s - mean[g]
    # a group of one has nothing to be compared with: its dev is 0, so A = 0 whatever we divide by
    std = (torch.bincount(g, weights=dev * dev) / (n - 1).clamp(min=1)).sqrt()
    return (dev / (std[g] + 1e-6)).float()


def policy_loss(logp, old_logp, advantage, entropy=None, rows=None, clip_low=0.2, clip_high=0.28, *, clip_dual=10.0):
    """PPO-clip loss of each token, DAPO's wider upper bound, dual clip for A < 0 (arXiv 1912.09729). (DAPO-1)

    logp, old_logp, advantage (T,) fp32. entropy (T,) and rows, the micro-batch's rollouts, are for methods that use
    them. Returns the loss (T,), to be minimised, and a dict of numbers or bools (T,) that are logged as actor/NAME,
    token means: pg_clipfrac (the clipped branch is the active one, so the token has no gradient), pg_clipfrac_high
    (of those, the ones with A > 0), pg_clipfrac_lower (the dual clip)."""
    log_ratio = (logp - old_logp).clamp(-20, 20)  # exp(20) = 5e8 is far outside every clip, and finite
    ratio = log_ratio.exp()
    plain = -advantage * ratio
    clipped = -advantage * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(plain, clipped)
    # For A < 0 the maximum has no upper bound: a token that became 20 times likelier would cost 20 |A|.
    dual = -advantage * clip_dual
    is_dual = (advantage < 0) & (loss > dual)
    active = clipped > plain
    flags = {"pg_clipfrac": active, "pg_clipfrac_high": active & (advantage > 0), "pg_clipfrac_lower": is_dual}
    return torch.where(is_dual, dual, loss), flags


def token_weights(counts, lengths, agg, n_tokens, n_sequences):
    """Weight of each token's loss, so that the minibatch loss is a plain sum over tokens, micro-batches and ranks.
    (DAPO-2)

    lengths (n,): response tokens of the micro-batch's n rollouts. counts (n,): how many of them enter the mean, fewer
    under an entropy mask. n_tokens, n_sequences: totals of counts and rollouts in the *minibatch over all ranks*, known
    before the forward, so packing and rank count cannot change the gradient. Returns (sum(lengths),) fp32.
      token:    1 / n_tokens                       one mean over all tokens (DAPO eq. 8)
      sequence: 1 / (count_i * n_sequences)        mean of each response, then of responses (GRPO)
      micro:    (n / n_sequences) / sum(counts)    the CURE reference: a token mean per micro-batch, weighted by its
                                                   number of sequences. It changes with packing, hence not our default
    """
    if agg == "token":
        per_row = torch.full_like(counts, 1 / max(1, n_tokens), dtype=torch.float32)
    elif agg == "sequence":
        per_row = 1 / (counts.clamp(min=1).float() * n_sequences)
    elif agg == "micro":
        n = len(counts)
        per_row = torch.full_like(counts, n / n_sequences / max(1, int(counts.sum())), dtype=torch.float32)
    else:
        raise ValueError(f"agg must be token, sequence or micro, got {agg!r}")
    return per_row.repeat_interleave(lengths)


def sequence_sums(x, lengths):
    """x (T,) summed over each response, at every token of it: (T,). lengths (n,): the responses'."""
    row = torch.arange(len(lengths), device=x.device).repeat_interleave(lengths)
    return x.new_zeros(len(lengths)).index_add(0, row, x)[row]


# ------------------------------------------------------------------------------------------------------ entropy mask
def n_kept(n, rho):
    """How many of n tokens the 80/20 mask keeps: max(1, ceil(rho n)). round() undoes 0.07 * 100 = 7.000000000000001."""
    return max(1, math.ceil(round(rho * n, 6))) if n else 0


def token_mask(entropy, rows=None, rho=0.2, side="top", generator=None):
    """The 80/20 mask (eq. 6): keep the loss of exactly n_kept(T, rho) tokens, those of highest entropy.  (8020-1)

    entropy (T,), nats; rows: the rollouts it belongs to, for methods that use them. side: top, bottom (the paper's
    ablation, with rho .8) or random (its null, which needs generator). Returns bool (T,). ValueError: another side."""
    T = len(entropy)
    if side == "random":
        order = torch.randperm(T, generator=generator)
    elif side in ("top", "bottom"):
        # stable, so that exactly k are kept where entropies tie: of equal ones the lower position
        order = torch.argsort(entropy, descending=side == "top", stable=True)
    else:
        raise ValueError(f"entropy_mask_side must be top, bottom or random, got {side!r}")
    keep = torch.zeros(T, dtype=torch.bool, device=entropy.device)
    keep[order[: n_kept(T, rho)].to(entropy.device)] = True
    return keep


# ------------------------------------------------------------------------------------------------- trainer vs engine
def mismatch(logp, engine_logp):
    """How far the trainer is from the engine that sampled. logp, engine_logp (T,), nats -> floats: mean |d|, max |d|,
    and the k3 estimate of the KL, mean(e^d - 1 - d) >= 0, with d = logp - engine_logp (J. Schulman 2020)."""
    d = (logp - engine_logp).double()
    return {"mean_abs": d.abs().mean().item(), "max_abs": d.abs().max().item(), "k3": (d.expm1() - d).mean().item()}


def importance_weights(old_logp, engine_logp, lengths, mode, low, high):
    """Weight w = pi_trainer_old / pi_engine of each token's loss, detached: it corrects for an engine whose
    probabilities differ a little from the trainer's. lengths (n,) of the micro-batch's responses; all others (T,).

    The modes have TRL's names. token: w of the token, sequence: of the whole response, a product. truncate: clamped to
    low … high (token_truncate is TIS); mask: 0 outside of them (sequence_mask is MIS, token_mask is IcePop)."""
    d = old_logp - engine_logp
    w = (sequence_sums(d, lengths) if mode.startswith("sequence") else d).clamp(-20, 20).exp().detach()
    return w.clamp(low, high) if mode.endswith("truncate") else w * ((w >= low) & (w <= high))
