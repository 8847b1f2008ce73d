"""lib/broom.py: what branches share is trained once, and every number is that of flat rows."""
import numpy as np
import pytest
import torch
from conftest import WORLDS, largest
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st
from test_policy import cut as flat_cut
from test_policy import gradients, make, prepared, same, token_mean, weights, worst

from lib.broom import brooms, skips
from lib.policy import cut, pack, packed_length
from rollout import Rollout

CPU = torch.device("cpu")


def group(rng, vocab, n1, n2, forks, g=0, longest=12, prompt=6, t_star=None):
    """Rollouts of one group as rollout.sample_round leaves them, random ids. forks: of each base response first | last |
    middle | none (a plain resample) | clause (of the prefix only the end)."""
    def ids(n):
        return rng.integers(2, vocab, n).tolist()

    asked, base, branches = ids(prompt), [], []
    for parent in range(n1):
        base.append(Rollout(asked, [], ids(rng.integers(2, longest + 1)), group=g))
        T, how = len(base[-1].response_ids), forks[parent % len(forks)]
        t = {"first": 1, "last": T - 1, "none": None}.get(how, int(rng.integers(1, T)))
        prefix = base[-1].response_ids[(t // 2 or 1 if how == "clause" else 0) : t or 0]
        branches += [Rollout(asked, prefix, ids(rng.integers(1, longest)), group=g, parent=parent, t_star=t)
                     for _ in range(n2)]  # fmt: skip
    out = base + branches
    for i, r in enumerate(out):
        r.reward, r.seed = float(i % 2), i
        r.engine_logp = -rng.random(len(r.response_ids)).astype(np.float32)
    return out


def groups(seed, vocab, shapes, **how):
    """Several groups, a minibatch."""
    rng = np.random.default_rng(seed)
    return [r for g, (n1, n2, forks) in enumerate(shapes) for r in group(rng, vocab, n1, n2, forks, g, **how)]


SHAPES = st.lists(
    st.tuples(st.integers(1, 4), st.integers(0, 4),
              st.lists(st.sampled_from(["first", "last", "middle", "middle", "none", "clause"]), min_size=1, max_size=4)),
    min_size=1, max_size=3,
)  # fmt: skip


@pytest.fixture(scope="module", params=["sharp", "odd"])
def policies(request, cpu):
    """The same weights: (packing=flat, packing=broom)."""
    path = request.getfixturevalue(request.param)
    return make(path, packing="flat"), make(path, packing="broom")


def micro_batches(policy, rows, budget=4096, world=1):
    policy.cfg.micro_batch_tokens, before = budget, policy.cfg.micro_batch_tokens
    try:
        return [[[rows[i] for i in mb] for mb in rank] for rank in cut(rows, policy.cfg, world)]
    finally:
        policy.cfg.micro_batch_tokens = before


def by_rollout(policy, mbs):
    """{id of a rollout: (logp, entropy)}."""
    return {id(r): s for r, s in zip(sum(mbs, []), policy.score(mbs, 1.0), strict=True)}


# ---------------------------------------------------------------------------------------------------------- the numbers
@given(st.integers(0, 10**6), SHAPES)
@settings(deadline=None, max_examples=60)
def test_log_probs_and_entropies_of_random_brooms_are_those_of_flat_rows_bit_for_bit(policies, seed, shapes):
    flat, broom = policies
    rows = groups(seed, flat.config.vocab_size, shapes)
    mbs = micro_batches(broom, rows)[0]
    T = min(pack(mb, CPU, share=True)["input_ids"].shape[1] for mb in mbs)
    assume(T >= 4)
    event("shares" if any(skips(mbs[0])) else "shares nothing")
    ours, exact = by_rollout(broom, mbs), by_rollout(flat, mbs)
    for r in rows:
        for a, b in zip(ours[id(r)], exact[id(r)], strict=True):
            assert np.array_equal(a, b), f"{np.abs(a - b).max():.1e} at {len(rows)} rows of {T} tokens"
