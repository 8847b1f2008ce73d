"""Rollouts: base responses, the critical token in each, the clause before it, branches from there, verdicts.

Read from the bottom up: collect → sample_round → critical_tokens → clause → re-concatenation → grade.
Symbols: P prompts · n1 base responses a prompt · n2 branches a base response · G = n1 (1 + n2) rollouts a group ·
N = P G rollouts · T tokens of one response · V vocabulary · t* the position where a branch leaves its parent.
A base rollout is prompt + response. A branch is prompt + prefix (a clause of its parent's response) + response (new).
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from lib.engine import Sampling, request_seed
from lib.ranks import gather, gather_sums, timed
from reward import overlong_penalty


@dataclass
class Rollout:
    """One sequence that is trained on. Ids are lists of int, per-token numbers arrays (T,) over the response tokens."""

    prompt_ids: list
    prefix_ids: list  # a branch's clause: prompt to the loss, part of the response to the verifier  (CURE-4)
    response_ids: list  # (T,) the tokens this rollout sampled, the stop token included
    engine_logp: np.ndarray = None  # (T,) as sampled, at the sampling temperature
    old_logp: np.ndarray = None  # (T,) of the trainer, before this step's first update
    entropy: np.ndarray = None  # (T,) nats, of the distributions the tokens were drawn from
    group: int = 0  # all rollouts of one prompt in one step
    prompt_id: int = 0
    seed: int = 0  # of this very sample
    parent: int = -1  # a branch: index of its base rollout among the group's n1; a base rollout: -1
    t_star: int | None = None  # a branch: position of its critical token in the parent's response; None: there was none
    h_star: float = float("nan")  # entropy of the parent at t*
    finish: str = ""  # stop | length
    reward: float = 0.0  # verifier's +-1 plus the overlong penalty
    correct: bool = False  # the verifier alone: filtering looks at this
    answer: str = ""  # what the verifier extracted
    advantage: float = 0.0
    candidates: list = field(default_factory=list)  # a base rollout: the positions its t* was drawn from
    text: str = ""  # prefix + response, decoded: what the verifier read
    mask: np.ndarray = None  # (T,) bool, which tokens keep their loss in this minibatch; None: all
    pass_rate: float = 0.0  # share of right ones in its group; while branches are chosen, in the group's base responses
    logp: np.ndarray = None  # (T,) of the trainer before this minibatch's update, where a method asks for it
    ref_logp: np.ndarray = None  # (T,) of the reference model, likewise
    statistic: np.ndarray = None  # (T,) a method's own: method.position_statistic
    survey: dict = field(default_factory=dict)  # a method's own (T,) numbers of this minibatch: method.survey_minibatch


def token_column(rows, get, device="cpu"):
    """get(rollout) -> (T,) array, of all rows one after the other: a tensor on `device`, empty without rows."""
    return torch.from_numpy(np.concatenate([np.empty(0, np.float32), *(get(r) for r in rows)])).to(device)


def response_lengths(rows, device="cpu"):
    """Tokens of each rollout's response, int64 (n,)."""
    return torch.tensor([len(r.response_ids) for r in rows], dtype=torch.long, device=device)


# ------------------------------------------------------------------------------------ the critical token and the clause
def allowed_tokens(tokenizer, vocab_size, min_token_chars=2, stop_ids=()):
    """Which tokens may be critical: bool (V,). Not special or stop ids, not ids beyond the tokenizer (the model's V is
    often padded), not tokens whose text has fewer than min_token_chars characters once stripped.  (CURE-1)"""
    allowed = torch.zeros(vocab_size, dtype=torch.bool)
    n = min(vocab_size, len(tokenizer))
    texts = tokenizer.batch_decode([[i] for i in range(n)])
    banned = set(tokenizer.all_special_ids) | set(stop_ids)
    for i, text in enumerate(texts):
        allowed[i] = len(text.strip()) >= max(1, min_token_chars) and i not in banned
    return allowed


def critical_tokens(rollout, allowed):
    """Where a branch may leave a response: positions int64, the most uncertain first. A hook for methods.

    rollout: a graded base rollout with its entropy (T,). allowed: bool (V,), see allowed_tokens."""
    valid = valid_positions(rollout, allowed)
    # stable: of equal entropies the lower position first
    return valid[torch.argsort(torch.from_numpy(rollout.entropy)[valid], descending=True, stable=True)]


def valid_positions(rollout, allowed):
    """Every position that may be critical, in order. The ablation critical=random draws from all of them."""
    valid = allowed[torch.tensor(rollout.response_ids)]  # (T,)
    valid[:1] = False  # a branch at the first token is a plain resample
    return valid.nonzero()[:, 0]


def pick_critical(order, top_k, budget, generator):
    """t* of one response: one of the first top_k positions of `order` that fit, uniformly.  (CURE-2)

    budget = max_prompt_tokens - prompt length. A position beyond it is no candidate: the reference cuts such a prompt
    at its end, and so branches where nothing is critical. Returns (t* or None, the candidates)."""
    pool = order[order <= budget][:top_k]
    return (int(pool[torch.randint(len(pool), (1,), generator=generator)]) if len(pool) else None), pool


def clause_start(ids, t_star, tokenizer):
    """Start of the last clause before t*: the position after the previous sentence end (. ! ? before white space) or
    newline, so that ids[start:t*] is never empty for t* > 0. This is the literal reading of the paper's "clause"
    (clause=last). The reference code, and our default, takes all of ids[:t*]."""
    pieces = [tokenizer.decode([i]) for i in ids[: t_star + 1]]
    for i in range(t_star - 2, -1, -1):
        text = pieces[i].rstrip(" ")
        ends = text.endswith((".", "!", "?")) and (text != pieces[i] or pieces[i + 1][:1].isspace())
        if ends or "\n" in pieces[i]:
            return i + 1
    return 0


# ------------------------------------------------------------------------------------------------------------ one round
def sample_round(cfg, engine, policy, task, step, draw_ids, ordinal, counts, clock):
    """One sampling round over this rank's prompts -> its rollouts, graded, all members of a group together.

    draw_ids: indices into task.prompts; ordinal: their places in the step's draw. counts: a Counter of this rank's
    verdicts and candidates; clock: seconds by phase. Both are added to."""
    # First, n1 responses a prompt, as in any such algorithm.
    prompts, sampling = [task.prompts[i] for i in draw_ids], Sampling(cfg.max_response_tokens, cfg.temperature)
    with timed(clock, "gen_base"):
        seeds = [request_seed(cfg.seed, task.stage, step, p.id, -1) for p in prompts]
        answers = engine.generate([p.ids for p in prompts], cfg.n1, sampling, seeds)
    base = [
        Rollout(p.ids, [], c.ids, c.logp, group=g, prompt_id=p.id, seed=s + i, finish=c.finish)
        for p, g, s, outs in zip(prompts, ordinal, seeds, answers, strict=True)
        for i, c in enumerate(outs)
    ]
    with timed(clock, "reward"):  # before branching: a method may branch off wrong responses only
        counts.update(grade(cfg, task, base))
        set_pass_rates(base)

    # Where did the model hesitate? Its entropies come from a forward of the trained model, which has the same weights:
    # that is exact, and free of an engine's top-k limit.  (CURE-5)
    if cfg.n2 and cfg.critical != "none":
        with timed(clock, "entropy"):
            for r, (_, entropy) in zip(base, policy.score_local(base, cfg.temperature), strict=True):
                r.entropy = entropy

    branches = sample_branches(cfg, engine, task, step, base, sampling, counts, clock) if cfg.n2 else []
    with timed(clock, "reward"):
        counts.update(grade(cfg, task, branches))
        set_pass_rates(base + branches)
    return sorted(base + branches, key=lambda r: r.group)  # stable: a group's base rollouts come first, in order


def sample_branches(cfg, engine, task, step, base, sampling, counts, clock):
    """CURE's move: cut every base response before its critical token and let the model go on from there, n2 times."""
    find = valid_positions if cfg.critical == "random" else task.method.critical_tokens
    cuts, refined, seeds = [], [], []
    for i, r in enumerate(base):
        parent, budget, t, h = i % cfg.n1, cfg.max_prompt_tokens - len(r.prompt_ids), None, float("nan")
        if cfg.critical != "none":
            order, top_k = find(r, task.allowed), None if cfg.critical == "random" else cfg.critical_top_k
            rng = torch.Generator().manual_seed(request_seed(cfg.seed, task.stage, step, r.prompt_id, parent, "pick"))
            t, pool = pick_critical(order, top_k, budget, rng)
            r.candidates, h = pool.tolist(), float(r.entropy[t]) if t is not None else h
            counts["candidates"] += len(order[:top_k])
            counts["over_budget"] += int((order[:top_k] > budget).sum())
        start = clause_start(r.response_ids, t, task.tokenizer) if t and cfg.clause == "last" else 0
        clause = r.response_ids[start : t or 0]  # the critical token itself is dropped: it is what is sampled anew
        refined.append(r.prompt_ids + clause)  # the re-concatenation  (CURE-3)
        cuts.append((r, parent, t, h, clause))
        seeds.append(request_seed(cfg.seed, task.stage, step, r.prompt_id, parent))
    with timed(clock, "gen_branch"):
        # One request with n2 samples: all branches of a base response leave it at the same t*.  (CURE-6)
        answers = engine.generate(refined, cfg.n2, sampling, seeds)
    return [
        Rollout(r.prompt_ids, clause, c.ids, c.logp, group=r.group, prompt_id=r.prompt_id, seed=s + i, parent=parent,
                t_star=t, h_star=h, finish=c.finish)
        for (r, parent, t, h, clause), s, outs in zip(cuts, seeds, answers, strict=True)
        for i, c in enumerate(outs)
    ]  # fmt: skip


def grade(cfg, task, rollouts):
    """Fill text, reward, correct and answer -> the verifier's counts. The verifier reads the response, a branch's
    prefix included, and never the user prompt, whose template may itself contain "Answer: $Answer"
    (reward_scope=response)."""
    decode = task.tokenizer.decode  # not batch_decode: of an empty list, on a rank without prompts, it makes [""]
    texts = [decode(r.prefix_ids + r.response_ids, skip_special_tokens=True) for r in rollouts]
    read = texts
    if cfg.reward_scope == "continuation":  # the reference: an answer that is in the prefix already is invisible
        read = [decode(r.response_ids, skip_special_tokens=True) for r in rollouts]
    gold = {p.id: p.answer for p in task.prompts}
    pairs = [(text, gold[r.prompt_id]) for text, r in zip(read, rollouts, strict=True)]
    verdicts, counts = task.verifiers.verdicts(pairs, task.verifier or cfg.verifier)
    for r, text, (reward, correct, answer) in zip(rollouts, texts, verdicts, strict=True):
        # A branch pays for the tokens it added, as in the reference: its prefix is its parent's.
        penalty = overlong_penalty(len(r.response_ids), cfg.max_response_tokens, cfg.overlong_buffer)
        r.text, r.reward, r.correct, r.answer = text, reward + penalty, correct, answer
    return counts


def set_pass_rates(rollouts):
    """Write into each rollout the share of right ones among those of its group that are at hand."""
    total, right = Counter(r.group for r in rollouts), Counter(r.group for r in rollouts if r.correct)
    for r in rollouts:
        r.pass_rate = right[r.group] / total[r.group]


# ----------------------------------------------------------------------------------------------------- dynamic sampling
SPARE = 8  # dropped groups that are kept at hand, to measure and show something in a step that keeps none


class Brief(NamedTuple):
    """Of every rollout sampled what the log needs; only the rollouts that are trained on travel between ranks."""

    length: int
    correct: bool
    cut: bool  # at max_response_tokens
    reward: float
    parent: int
    t_star: int | None
    h_star: float
    flipped: bool  # a branch whose verdict is not its parent's
    depth: float  # t* as a share of the parent's response, nan where there is no t*


class Sampled(NamedTuple):
    """What a step sampled, the same on every rank."""

    kept: list  # rollouts of the groups to train on, in data order
    spare: list  # rollouts of a few dropped groups
    briefs: list  # of all rollouts
    prompts: int  # drawn
    mixed: int  # groups with right and wrong answers; those beyond prompts_per_step are surplus
    rounds: int
    counts: Counter  # verdicts and candidates, over all ranks


def collect(cfg, engine, policy, task, step, clock):
    """Sampling rounds until prompts_per_step groups with right and wrong answers are there. (DAPO-3)

    Every rank samples its share of the prompts; what is decided is decided on gathered data. Fewer groups than asked
    for after max_rounds, or when the data has no other prompt: returned as they are, or RuntimeError with
    on_starved=raise."""
    drawn, kept, dropped, briefs, counts = [], [], [], [], Counter()
    while len(drawn) < cfg.max_rounds * cfg.prompts_per_round and len(kept) < cfg.prompts_per_step:
        ids = task.stream.take(cfg.prompts_per_round, exclude=set(drawn))
        if not ids:
            break  # every prompt of the data has been drawn in this step
        mine = range(dist.get_rank(), len(ids), dist.get_world_size())
        ordinal = [len(drawn) + i for i in mine]
        rollouts = sample_round(cfg, engine, policy, task, step, [ids[i] for i in mine], ordinal, counts, clock)
        drawn += ids
        groups = {}
        for r in rollouts:
            groups.setdefault(r.group, []).append(r)
        mixed = {g: len({r.correct for r in rows}) == 2 for g, rows in groups.items()}  # std(accuracy) > 0
        parts = [(g, mixed[g], rows if mixed[g] or g < SPARE else [], brief(rows)) for g, rows in groups.items()]
        for g, ok, rows, seen in sorted(gather(parts), key=lambda part: part[0]):
            assert len(seen) == cfg.group_size, f"group {g} has {len(seen)} rollouts"
            (kept if ok else dropped).append(rows)
            briefs += seen
    rounds = -(-len(drawn) // cfg.prompts_per_round)
    if len(kept) < cfg.prompts_per_step and cfg.on_starved == "raise":
        raise RuntimeError(
            f"step {step}: only {len(kept)} of {cfg.prompts_per_step} groups have both right and wrong answers after "
            f"{rounds} rounds. on_starved=train goes on with what there is, max_rounds or prompts_per_round sample more"
        )
    rows = [r for group in kept[: cfg.prompts_per_step] for r in group]
    return Sampled(rows, sum(dropped, []), briefs, len(drawn), len(kept), rounds, gather_sums(counts))


def brief(group):
    """[Brief] of one group's rollouts."""
    return [
        Brief(len(r.response_ids), r.correct, r.finish == "length", r.reward, r.parent, r.t_star, r.h_star,
              r.parent >= 0 and r.correct != group[r.parent].correct,
              float("nan") if r.t_star is None else r.t_star / len(group[r.parent].response_ids))
        for r in group
    ]  # fmt: skip
