"""lib/broom.py: what branches share is trained once, and every number is that of flat rows."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import WORLDS, largest, sharpen
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from test_policy import cut as flat_cut
from test_policy import gradients, make, prepared, same, token_mean, weights, worst

from lib.broom import brooms, skips
from lib.policy import cut, pack, packed_length
from lib.toy import make_toy
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


@pytest.fixture(scope="module")
def grouped(tmp_path_factory):
    """A model with fewer kv heads than heads and a head of its own. Its widths are multiples of 64: of others silu computes
    the tail of a tensor, wherever that is, in another way."""
    folder = str(tmp_path_factory.mktemp("models") / "grouped")
    make_toy(folder, n_train=4, n_heldout=4, n_sft=4)
    return sharpen(folder, vocab_size=37, tie_word_embeddings=False, num_key_value_heads=2, hidden_size=64,
                   intermediate_size=192)  # fmt: skip


@pytest.fixture(scope="module", params=["sharp", "grouped"])
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


def row_tokens(mb):
    return pack(mb, CPU, share=True)["input_ids"].shape[1]


def by_rollout(policy, mbs):
    """{id of a rollout: (logp, entropy)}."""
    return {id(r): s for r, s in zip(sum(mbs, []), policy.score(mbs, 1.0), strict=True)}


@pytest.fixture
def same_rows(monkeypatch):
    """Attention whose rows do not depend on how many follow. torch's kernel on the CPU cuts a sequence into blocks, and its
    matrix products round the last, partial one in another way (see the test below). Then even the flat row of a branch and
    that of its parent differ in the last bits of the prefix they share, and a broom has only one of the two."""
    plain = F.scaled_dot_product_attention

    def padded(q, k, v, **kwargs):
        n = q.shape[2]
        return plain(*(F.pad(x, (0, 0, 0, -n % 256)) for x in (q, k, v)), **kwargs)[:, :, :n]

    monkeypatch.setattr(F, "scaled_dot_product_attention", padded)


# ---------------------------------------------------------------------------------------------------------- the numbers
@given(st.integers(0, 10**6), SHAPES)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_log_probs_and_entropies_of_random_brooms_are_those_of_flat_rows_bit_for_bit(policies, same_rows, seed, shapes):
    flat, broom = policies
    rows = groups(seed, flat.config.vocab_size, shapes)
    mbs = micro_batches(broom, rows)[0]
    assume(all(row_tokens(mb) >= 4 for mb in mbs))      # MKL multiplies a matrix of up to three rows in another way
    event("shares" if any(map(any, map(skips, mbs))) else "shares nothing")
    ours, exact = by_rollout(broom, mbs), by_rollout(flat, mbs)
    for r in rows:
        for a, b in zip(ours[id(r)], exact[id(r)], strict=True):
            assert np.array_equal(a, b), f"{np.abs(a - b).max():.1e}"


@given(st.integers(0, 10**6), SHAPES)
@settings(deadline=None, max_examples=40)
def test_with_torchs_own_attention_they_differ_by_rounding_only(policies, seed, shapes):
    flat, broom = policies
    mbs = micro_batches(broom, groups(seed, flat.config.vocab_size, shapes, longest=40))[0]
    gap = [np.abs(a - b).max() for x, y in zip(broom.score(mbs, 1.0), flat.score(mbs, 1.0), strict=True) for a, b in zip(x, y, strict=True)]
    assert largest(gap) <= 2e-5


@given(st.integers(0, 10**6), SHAPES)
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_gradients_of_random_brooms_are_those_of_flat_rows(policies, same_rows, seed, shapes):
    flat, broom = policies
    rows = prepared(flat, groups(seed, flat.config.vocab_size, shapes))
    mbs, loss_fn = micro_batches(broom, rows)[0], token_mean(rows)
    exact, norm = gradients(flat, mbs, loss_fn)
    assume(norm > 1e-4)                                 # a group of one, all advantages 0
    ours, _ = gradients(broom, mbs, loss_fn)
    gap = sum((ours[n].double() - g.double()).square().sum() for n, g in exact.items()).sqrt() / norm
    assert gap <= 1e-6, f"{gap:.1e}"
