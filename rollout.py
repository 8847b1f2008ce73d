"""Rollouts: two engines that generate, the critical token to branch at, and the rounds of dynamic sampling.

Symbols: P prompts · n1 base responses a prompt · n2 branches a base response · G = n1 (1 + n2) rollouts a group ·
N = P G rollouts · T tokens of one response · V vocabulary · t* the position where a branch leaves its parent.
A base rollout is prompt + response; a branch is prompt + prefix (its parent's response[:t*]) + response (new tokens).
"""

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist

from lib.engine import Sampling, request_seed
from lib.ranks import gather, timed
from reward import overlong_penalty


@dataclass
class Rollout:
    """One trained-on sequence. Ids are lists of int, per-token numbers float32 arrays over the response tokens only."""

    prompt_ids: list
    prefix_ids: list  # what a branch inherited: prompt to the loss, part of the response to the verifier  (CURE-4)
    response_ids: list  # (T,) the tokens this rollout sampled, the stop token included
    engine_logp: np.ndarray = None  # (T,) as sampled, at the sampling temperature
    old_logp: np.ndarray = None  # (T,) of the trainer, before this step's first update
    entropy: np.ndarray = None  # (T,) nats, of the distributions the tokens were drawn from
    group: int = 0  # all rollouts of one prompt in one step
    prompt_id: int = 0
    seed: int = 0  # of this very sample
    parent: int = -1  # a branch: index of its base rollout among the group's n1; a base rollout: -1
    t_star: int = -1  # a branch: len(prefix in the parent's response); a base rollout: -1
    h_star: float = float("nan")  # entropy of the parent at t*
    finish: str = ""  # stop | length
    reward: float = 0.0  # verifier's +-1 plus the overlong penalty
    correct: bool = False  # the verifier alone: filtering looks at this
    answer: str = ""  # what the verifier extracted
    advantage: float = 0.0
    candidates: list = field(default_factory=list)  # a base rollout: the pool its t* was drawn from
    text: str = ""  # prefix + response, decoded: what the verifier read


# ------------------------------------------------------------------------------------------------------------- the engines
# -------------------------------------------------------------------------------------- critical token and re-concatenation
def allowed_tokens(tokenizer, vocab_size, min_token_chars=2, stop_ids=()):
    """Which tokens may be critical: bool (V,). Not special or stop ids, not ids beyond the tokenizer (the model's V is often
    padded), not tokens whose text has fewer than min_token_chars characters once stripped.  (CURE-1)"""
    allowed = torch.zeros(vocab_size, dtype=torch.bool)
    n = min(vocab_size, len(tokenizer))
    texts = tokenizer.batch_decode([[i] for i in range(n)])
    banned = set(tokenizer.all_special_ids) | set(stop_ids)
    for i, text in enumerate(texts):
        allowed[i] = len(text.strip()) >= max(1, min_token_chars) and i not in banned
    return allowed


def critical_candidates(entropy, tokens, allowed, top_k, budget, mode="entropy"):
    """Positions t* may be drawn from, most uncertain first: int64 (<= top_k,), or all valid ones for mode "random".

    Walks the response in descending entropy (equal ones: lower position first) and keeps the first top_k *valid*
    positions: not 0, token allowed, t <= budget, i.e. prompt + response[:t] still fits the prompt budget.  (CURE-2)"""
    if mode not in ("entropy", "random", "none"):
        raise ValueError(f"critical must be entropy, random or none, got {mode!r}")
    entropy, tokens = torch.as_tensor(entropy), torch.as_tensor(tokens, dtype=torch.long)
    valid = allowed[tokens].clone()  # (T,)
    valid[:1] = False
    valid[max(0, budget + 1) :] = False
    if mode == "none":
        return torch.empty(0, dtype=torch.long)
    if mode == "random":
        return valid.nonzero()[:, 0]
    order = torch.argsort(entropy, descending=True, stable=True)
    return order[valid[order]][:top_k]


def pick_critical(entropy, tokens, allowed, top_k, budget, generator, mode="entropy"):
    """t*: one of critical_candidates, uniformly (CURE, section "critical token"). entropy, tokens (T,), allowed bool (V,),
    budget = max_prompt_tokens - prompt length. 0, a plain resample of the prompt, where no token is valid or mode is "none"."""
    pool = critical_candidates(entropy, tokens, allowed, top_k, budget, mode)
    return int(pool[torch.randint(len(pool), (1,), generator=generator)]) if len(pool) else 0


def clause_start(ids, t_star, tokenizer):
    """Start of the last clause before t*: the position after the previous sentence end (. ! ? before white space) or
    newline, so that ids[start:t*] is never empty for t* > 0. The literal reading of the paper's "clause"; the reference
    code, and our default, takes all of ids[:t*]."""
    pieces = [tokenizer.decode([i]) for i in ids[: t_star + 1]]
    for i in range(t_star - 2, -1, -1):
        text = pieces[i].rstrip(" ")
        ends = text.endswith((".", "!", "?")) and (text != pieces[i] or pieces[i + 1][:1].isspace())
        if ends or "\n" in pieces[i]:
            return i + 1
    return 0


# ---------------------------------------------------------------------------------------------------------------- one round
def sample_round(cfg, engine, policy, task, step, draw_ids, ordinal, metrics):
    """One sampling round over this rank's prompts: base responses, entropies, branches, verdicts -> scored rollouts, all
    members of a group together. draw_ids: indices into task.prompts; ordinal: their places in the step's draw."""
    sampling = Sampling(cfg.max_response_tokens, cfg.temperature)
    prompts = [task.prompts[i] for i in draw_ids]
    stats = metrics["branch"]

    with timed(metrics, "gen_base"):
        seeds = [request_seed(cfg.seed, task.stage, step, p.id, -1) for p in prompts]
        answers = engine.generate([p.ids for p in prompts], cfg.n1, sampling, seeds)
    base = [
        Rollout(p.ids, [], c.ids, c.logp, group=g, prompt_id=p.id, seed=s + i, finish=c.finish)
        for p, g, s, outs in zip(prompts, ordinal, seeds, answers, strict=True)
        for i, c in enumerate(outs)
    ]
    branches = []
    if cfg.n2:
        with timed(metrics, "entropy"):  # of the training model, same weights: exact, free of vLLM's top-k limit  (CURE-5)
            if cfg.critical != "none":
                for r, (logp, entropy) in zip(base, policy.score_local(base, cfg.temperature), strict=True):
                    r.old_logp, r.entropy = logp, entropy
        refined = []
        for i, r in enumerate(base):
            parent = i % cfg.n1
            budget = cfg.max_prompt_tokens - len(r.prompt_ids)
            h = r.entropy if r.entropy is not None else np.zeros(len(r.response_ids), np.float32)
            pool = critical_candidates(h, r.response_ids, task.allowed, cfg.critical_top_k, budget, cfg.critical)
            rng = torch.Generator().manual_seed(request_seed(cfg.seed, task.stage, step, r.prompt_id, parent, "pick"))
            t = pick_critical(h, r.response_ids, task.allowed, cfg.critical_top_k, budget, rng, cfg.critical)
            free = critical_candidates(h, r.response_ids, task.allowed, cfg.critical_top_k, len(h), cfg.critical)
            stats["candidates"] += len(free)
            stats["over_budget"] += int((free > budget).sum())
            r.candidates = pool.tolist()
            a = clause_start(r.response_ids, t, task.tokenizer) if cfg.clause == "last" else 0
            h_star = float(h[t]) if r.entropy is not None else float("nan")
            refined.append((r, parent, t, h_star, r.response_ids[a:t]))  # (CURE-3): the critical token itself is dropped
        with timed(metrics, "gen_branch"):
            # one request with n2 samples: all branches of a base response leave it at the same t*  (CURE-6)
            seeds = [request_seed(cfg.seed, task.stage, step, r.prompt_id, parent) for r, parent, *_ in refined]
            answers = engine.generate([r.prompt_ids + pre for r, _, _, _, pre in refined], cfg.n2, sampling, seeds)
        branches = [
            Rollout(r.prompt_ids, pre, c.ids, c.logp, group=r.group, prompt_id=r.prompt_id, seed=s + i, parent=parent,
                    t_star=t, h_star=h, finish=c.finish)
            for (r, parent, t, h, pre), s, outs in zip(refined, seeds, answers, strict=True)
            for i, c in enumerate(outs)
        ]  # fmt: skip
    rollouts = sorted(base + branches, key=lambda r: r.group)  # stable: a group's base rollouts come first, in order
    with timed(metrics, "reward"):
        score_rollouts(cfg, task, rollouts, metrics)
    return rollouts


def score_rollouts(cfg, task, rollouts, metrics):
    """Fill text, reward, correct and answer. The verifier reads the response, prefix included, never the user prompt, whose
    template may itself contain "Answer: $Answer" (reward_scope: response); overlong shaping by length (DAPO eq. 13)."""
    decode = task.tokenizer.decode  # not batch_decode: of an empty list, on a rank without prompts, it makes [""]
    texts = [decode(r.prefix_ids + r.response_ids, skip_special_tokens=True) for r in rollouts]
    read = texts
    if cfg.reward_scope == "continuation":  # the reference: an answer already in the prefix is invisible
        read = [decode(r.response_ids, skip_special_tokens=True) for r in rollouts]
    gold = {p.id: p.answer for p in task.prompts}
    verdicts, counts = task.verifiers.score_all(
        [(text, gold[r.prompt_id]) for text, r in zip(read, rollouts, strict=True)], task.verifier or cfg.verifier
    )
    for k, v in counts.items():
        metrics["reward"][k] = metrics["reward"].get(k, 0) + v
    for r, text, (reward, correct, answer) in zip(rollouts, texts, verdicts, strict=True):
        length = len(r.response_ids) + (len(r.prefix_ids) if cfg.overlong_scope == "total" else 0)
        penalty = overlong_penalty(length, cfg.max_response_tokens, cfg.overlong_buffer, cfg.overlong_factor)
        r.text, r.reward, r.correct, r.answer = text, reward + penalty, correct, answer


# --------------------------------------------------------------------------------------------------------- dynamic sampling
SPARE = 8  # dropped groups that are kept at hand, to measure and show something in a step that keeps no group


def collect(cfg, engine, policy, task, step):
    """Sampling rounds until prompts_per_step groups with both right and wrong answers are kept (DAPO, dynamic sampling).

    Returns (rollouts of the kept groups in data order, metrics), the same on every rank: each rank samples its share of the
    prompts, all decisions are made on gathered data. A round is sampled in chunks of prompts_per_chunk and ends with the chunk
    that fills the step: the groups kept are those of the whole round, the surplus is never sampled. Fewer groups than asked
    for after max_rounds: trained on, or RuntimeError with on_starved: raise. Metrics: counts over *all* rollouts sampled;
    key "dropped" holds a few rollouts of dropped groups of the first round, for a step that keeps nothing.  (DAPO-3)"""
    metrics = {"branch": {"candidates": 0, "over_budget": 0}, "reward": {}}
    drawn, kept, dropped, seen = [], [], [], []
    most = cfg.max_rounds * cfg.prompts_per_round
    while len(drawn) < most and len(kept) < cfg.prompts_per_step:
        left = cfg.prompts_per_round - len(drawn) % cfg.prompts_per_round  # of this round
        ids = task.stream.take(min(left, cfg.prompts_per_chunk or left), exclude=set(drawn))
        if not ids:
            break  # every prompt of the data has been drawn in this step
        mine = range(dist.get_rank(), len(ids), dist.get_world_size())
        ordinal = [len(drawn) + i for i in mine]
        rollouts = sample_round(cfg, engine, policy, task, step, [ids[i] for i in mine], ordinal, metrics)
        drawn += ids
        groups = {}
        for r in rollouts:
            groups.setdefault(r.group, []).append(r)
        mixed = {g: len({r.correct for r in rs}) == 2 for g, rs in groups.items()}  # std(accuracy) > 0
        # only what is trained on travels between ranks, and of the rest the numbers for the log
        everyone = gather([(g, mixed[g], rs if mixed[g] or g < SPARE else [], _brief(rs)) for g, rs in groups.items()])
        for g, ok, rs, brief in sorted(everyone, key=lambda x: x[0]):
            assert len(brief) == cfg.group_size, f"group {g} has {len(brief)} rollouts"
            (kept if ok else dropped).append(rs)
            seen += brief
    rounds = -(-len(drawn) // cfg.prompts_per_round)
    if len(kept) < cfg.prompts_per_step and cfg.on_starved == "raise":
        raise RuntimeError(
            f"step {step}: only {len(kept)} of {cfg.prompts_per_step} groups have both right and wrong answers after {rounds} "
            "rounds; on_starved: train goes on with what there is, max_rounds or prompts_per_round sample more"
        )
    metrics["dropped"] = [r for rs in dropped for r in rs]
    metrics.update(_sampling_metrics(cfg, seen, len(drawn), len(kept), rounds, metrics.pop("branch"), metrics.pop("reward")))
    return [r for rs in kept[: cfg.prompts_per_step] for r in rs], metrics


def _brief(group):
    """Of each rollout what the log needs: (length, correct, truncated, parent, t*, H at t*, reward, parent correct)."""
    return [
        (len(r.response_ids), r.correct, r.finish == "length", r.parent, r.t_star, r.h_star, r.reward,
         group[r.parent].correct if r.parent >= 0 else None)
        for r in group
    ]  # fmt: skip


def _sampling_metrics(cfg, seen, drawn, kept, rounds, branch, reward):
    """The log's view of all rollouts sampled in a step. `seen`: _brief tuples, gathered; branch and reward: rank-local
    counters, summed over ranks here."""
    totals = {}
    for part in gather([{**branch, **reward}]):
        for k, v in part.items():
            totals[k] = totals.get(k, 0) + v
    length, correct, cut = (np.array([s[i] for s in seen], dtype=float) for i in range(3))
    m = {
        "train/accuracy": correct.mean(),
        "train/kept_groups": min(kept, cfg.prompts_per_step),
        "train/mixed_groups": kept,
        "train/sampled_groups": drawn,
        "train/rounds": rounds,
        "tokens/step": int(length.sum()),
        "critic/score/mean": float(np.mean([s[6] for s in seen])),
        "response_length/mean": length.mean(),
        "response_length/max": length.max(),
        "response_length/clip_ratio": cut.mean(),
        **{k: v for k, v in totals.items() if k.startswith("reward/")},
    }
    forks = [s for s in seen if s[3] >= 0]
    if forks:
        t = np.array([s[4] for s in forks], dtype=float)
        m["branch/mean_depth"] = t.mean()
        m["branch/fallback_share"] = (t == 0).mean()
        m["branch/over_budget_share"] = totals["over_budget"] / max(1, totals["candidates"])
        m["branch/accuracy_base"] = correct[[s[3] < 0 for s in seen]].mean()
        m["branch/accuracy_branch"] = correct[[s[3] >= 0 for s in seen]].mean()
        m["branch/flip_rate"] = float(np.mean([s[1] != s[7] for s in forks]))
        h = [s[5] for s in forks if s[4] > 0]
        if h and cfg.critical != "none":
            m["branch/entropy_at_t_star"] = float(np.mean(h))
    return {k: float(v) if isinstance(v, np.floating) else v for k, v in m.items()}
