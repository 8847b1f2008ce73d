"""lib/broom.py: what branches share is trained once, and every number is that of flat rows."""

import numpy as np
import pytest
import test_rollout
import torch
import torch.nn.functional as F
from conftest import WORLDS, largest, sharpen
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from test_policy import config, gradients, make, prepared, token_mean, worst

from lib.broom import brooms, skips
from lib.config import load_config
from lib.policy import cut, pack, packed_attention, packed_length
from lib.ranks import gather
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
    both = zip(broom.score(mbs, 1.0), flat.score(mbs, 1.0), strict=True)
    assert largest(np.abs(x[i] - y[i]).max() for x, y in both for i in (0, 1)) <= 2e-5


@given(st.integers(0, 10**6), SHAPES)
@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_gradients_of_random_brooms_are_those_of_flat_rows(policies, same_rows, seed, shapes):
    flat, broom = policies
    rows = prepared(flat, groups(seed, flat.config.vocab_size, shapes))
    mbs, loss_fn = micro_batches(broom, rows)[0], token_mean(rows)
    exact, norm = gradients(flat, mbs, loss_fn)
    assume(norm > 1e-4)                                 # a group of one, all advantages 0
    ours, _ = gradients(broom, mbs, loss_fn)
    gap = sum((ours[n].double() - g.double()).square().sum() for n, g in exact.items()).sqrt() / norm
    assert gap <= 1e-6, f"{gap:.1e}"


@pytest.fixture(scope="module")
def sampled(sharp, cpu):
    """Groups of the toy's prompts as a round leaves them: rollouts."""
    policy, engine = test_rollout.make_pair(sharp, n1=4, n2=3)
    task = test_rollout.task_of(sharp)
    rows, _ = test_rollout.one_round((policy, engine), task, policy.cfg, range(6))
    return rows


def test_rollouts_of_the_toy_are_the_same_in_brooms(sampled, same_rows, sharp):
    flat, broom = make(sharp, packing="flat"), make(sharp, packing="broom")
    for i, r in enumerate(sampled):
        r.reward = float(i % 2)
    rows = prepared(flat, sampled)
    mbs, loss_fn = micro_batches(broom, rows, 1024)[0], token_mean(rows)
    shared, all_of_them = sum(map(sum, map(skips, mbs))), sum(map(packed_length, rows))
    same = [np.array_equal(x[i], y[i]) for x, y in zip(broom.score(mbs, 1.0), flat.score(mbs, 1.0), strict=True)
            for i in (0, 1)]  # fmt: skip
    gap = worst(gradients(broom, mbs, loss_fn)[0], gradients(flat, mbs, loss_fn)[0])
    print(f"{len(rows)} rollouts of the toy, {shared / all_of_them:.2f} of {all_of_them} tokens shared; gradients {gap:.1e}")
    assert shared > 0.2 * all_of_them and all(same) and gap <= 1e-6


def test_rows_of_attention_depend_on_what_follows_by_rounding_only():
    """Why the tests above bring an attention of their own. Should this fail one day, they need none."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 40, 16) for _ in range(3))
    whole = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    gaps = [(F.scaled_dot_product_attention(q[:, :, :n], k[:, :, :n], v[:, :, :n], is_causal=True) - whole[:, :, :n])
            .abs().max().item() for n in range(1, 40)]  # fmt: skip
    print(f"up to {max(gaps):.1e}, at {sum(g > 0 for g in gaps)} of 39 lengths")
    assert max(gaps) <= 1e-5


def test_scoring_and_update_see_the_same_floats_so_the_first_ratio_is_exactly_one(policies):
    broom = policies[1]
    rows = groups(3, broom.config.vocab_size, [(4, 3, ["middle"])] * 3)
    mbs = micro_batches(broom, rows, 96)[0]
    old, seen = by_rollout(broom, mbs), []

    def loss_fn(rows, logp, entropy):
        seen.append((logp.detach() - torch.from_numpy(np.concatenate([old[id(r)][0] for r in rows]))).abs().max().item())
        return logp.sum()

    gradients(broom, mbs, loss_fn)
    assert len(seen) == len(mbs) > 1 and max(seen) == 0


def test_a_neighbour_in_the_row_changes_no_bit(policies):
    """Not a branch's sibling, not another broom's tokens, before it or behind it."""
    broom, rng = policies[1], np.random.default_rng(0)
    V = broom.config.vocab_size
    rows = groups(1, V, [(2, 3, ["middle"])] * 2, longest=20)
    mb = micro_batches(broom, rows)[0][0]
    assert sum(map(bool, skips(mb))) == 12
    before = by_rollout(broom, [mb])
    for r in (rows[3], rows[8]):                        # a branch in the middle of a broom; a trunk of the other group
        kept = r.response_ids
        last = max([0, *(len(b.prefix_ids) for b in rows if shares_with(r, b, rows))])
        r.response_ids = kept[:last] + rng.integers(2, V, len(kept) - last).tolist()
        after = by_rollout(broom, [mb])
        changed = [i for i, x in enumerate(mb) if not all(map(np.array_equal, before[id(x)], after[id(x)]))]
        r.response_ids = kept
        assert changed == [mb.index(r)]


def shares_with(trunk, r, rows):
    return r.parent >= 0 and r.group == trunk.group and [x for x in rows if x.group == r.group][r.parent] is trunk


def test_checkpointed_blocks_give_the_same_gradient(grouped, cpu):
    base, other = make(grouped, packing="flat"), make(grouped, activation_checkpointing=True)
    rows = prepared(base, groups(5, 37, [(2, 3, ["middle", "none"])] * 3))
    mbs, loss_fn = micro_batches(other, rows, 256)[0], token_mean(rows)
    assert worst(gradients(other, mbs, loss_fn)[0], gradients(base, mbs, loss_fn)[0]) <= 1e-5


def test_compiled_blocks_want_flat_rows():
    with pytest.raises(ValueError, match="^packing: brooms have too many shapes"):
        load_config(["compile=true"])
    load_config(["compile=true", "packing=flat"])


# ------------------------------------------------------------------------------------------------------- the row, the units
def test_the_row_of_a_broom_by_hand():
    base = Rollout([5, 6], [], [7, 8, 9, 1])
    long, one = (Rollout([5, 6], [7, 8], ids, parent=0, t_star=2) for ids in ([2, 3, 4], [3]))
    x = pack([base, long, one, Rollout([5, 6], [], [8], parent=0)], CPU, share=True)
    assert x["input_ids"].tolist() == [[5, 6, 7, 8, 9, 2, 3, 5, 6]]       # trunk, branch, none of one token, a resample
    assert x["position_ids"].tolist() == [[0, 1, 2, 3, 4, 4, 5, 0, 1]]    # a branch goes on from the fork
    assert x["cu_seqlens"].tolist() == [0, 5, 7, 9] and x["max_len"] == 5
    assert x["seen"].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 5, 6, 7, 8]  # keys: trunk[: P + t*] and its own
    assert x["cu_keys"].tolist() == [0, 5, 11, 13] and x["max_keys"] == 6
    assert x["targets"].tolist() == [7, 8, 9, 1, 2, 3, 4, 3, 8]
    assert x["index"].tolist() == [1, 2, 3, 4, 3, 5, 6, 3, 8]             # the state before t*, 3, gives 9, 2 and 3
    flat = pack([base, long], CPU)
    assert flat["seen"] is None and flat["input_ids"].tolist() == [[5, 6, 7, 8, 9, 5, 6, 7, 8, 2, 3]]


@given(st.integers(0, 10**6), SHAPES, st.integers(30, 200), st.integers(1, 3))
@settings(deadline=None, max_examples=100)
def test_units_are_brooms_within_the_budget_and_every_rollout_is_in_one(seed, shapes, budget, world):
    rows = groups(seed, 30, shapes)
    lengths = list(map(packed_length, rows))
    units, tokens = brooms(rows, lengths, budget)
    assert sorted(sum(units, [])) == list(range(len(rows)))
    for unit, n in zip(units, tokens, strict=True):
        mb = [rows[i] for i in unit]
        assert pack(mb, CPU, share=True)["input_ids"].shape[1] == n == sum(map(packed_length, mb)) - sum(skips(mb))
        assert n <= budget or len(unit) == 1
        assert all(skips(mb)[1:]) and not skips(mb)[0]
    plan = cut(rows, config(micro_batch_tokens=budget), world)
    assert sorted(i for rank in plan for mb in rank for i in mb) == list(range(len(rows)))
    assert len({len(rank) for rank in plan}) == 1       # equally many forwards on every rank
    assert all(row_tokens([rows[i] for i in mb]) <= budget for rank in plan for mb in rank)
    event("a branch had no room" if any(len(u) == 1 and rows[u[0]].t_star for u in units) else "room for all")


def test_what_shares_nothing_stays_flat():
    rng = np.random.default_rng(0)
    for forks in (["none"], ["clause"]):
        rows = group(rng, 30, 2, 3, forks, longest=30)
        rows = [r for r in rows if len(r.prefix_ids) != r.t_star]         # a clause of one token may be all there is
        assert all(len(u) == 1 for u in brooms(rows, list(map(packed_length, rows)), 10**6)[0])
    rows = group(rng, 30, 4, 0, ["middle"])
    assert cut(rows, config(), 1) == cut(rows, config(packing="flat"), 1)               # DAPO, stage 2
    orphans = group(rng, 30, 2, 3, ["middle"])[2:]
    assert all(len(u) == 1 for u in brooms(orphans, list(map(packed_length, orphans)), 10**6)[0])
    assert not any(skips(orphans))


def test_another_prompt_or_a_fork_at_the_last_token_shares_nothing():
    base = Rollout([5, 6], [], [7, 8, 9])
    def branch(prompt, t):
        return Rollout(prompt, base.response_ids[:t], [3], parent=0, t_star=t)

    assert skips([base, branch([5, 6], 2)]) == [0, 4]
    assert skips([base, branch([5, 4], 2)]) == [0, 0]
    assert skips([base, branch([5, 6], 3)]) == [0, 0], "the response's last token is no input of the trunk"
    with pytest.raises(AssertionError, match="neither compiled nor padded"):
        pack([base], CPU, bucket=8, share=True)


def test_packing_flat_shares_nothing_even_where_it_could():
    rows = group(np.random.default_rng(0), 30, 1, 3, ["middle"])
    assert pack(rows, CPU)["input_ids"].shape[1] == sum(map(packed_length, rows)) > row_tokens(rows)


def test_a_prefix_that_is_not_the_parents_is_refused():
    rows = group(np.random.default_rng(0), 30, 2, 1, ["middle"])
    rows[3].prefix_ids = [99] * rows[3].t_star
    with pytest.raises(AssertionError, match="rollout 3, group 0: its prefix is not its parent's"):
        brooms(rows, list(map(packed_length, rows)), 1000)


# ---------------------------------------------------------------------------------------------------------- several ranks
def found_by(policy, rank, world):
    """(gradients, log-probs of all rollouts) of one minibatch of brooms, cut for `world` ranks into small micro-batches."""
    rows = groups(7, 25, [(4, 3, ["middle", "first", "none", "last"])] * 3)
    for r, x in zip(rows, np.random.default_rng(1).normal(size=len(rows)), strict=True):
        r.advantage, r.old_logp = float(x), np.full(len(r.response_ids), -2.0, np.float32)
    plan = micro_batches(policy, rows, 128, world)
    place = {id(r): i for i, r in enumerate(rows)}
    scored = zip(sum(plan[rank], []), policy.score(plan[rank], 1.0), strict=True)
    logp = dict(gather([(place[id(r)], torch.from_numpy(s[0])) for r, s in scored]))
    return gradients(policy, plan[rank], token_mean(rows))[0], [logp[i] for i in range(len(rows))]


def rank_job(rank, world, device, source, out):
    """One rank's side of the test below (see conftest.ranks)."""
    grads, logp = found_by(make(source, packing="broom"), rank, world)
    if rank == 0:
        torch.save({"grads": grads, "logp": logp}, f"{out}/broom{world}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_several_ranks_find_what_one_finds_in_flat_rows(ranks, sharp, cpu, world):
    grads, logp = found_by(make(sharp, packing="flat"), 0, 1)
    found = ranks[world]["broom"]
    gap = worst(found["grads"], grads)
    apart = largest((a - b).abs().max() for a, b in zip(found["logp"], logp, strict=True))
    print(f"{world} ranks in brooms against one in flat rows: gradients {gap:.1e}, log-probs {apart:.1e}")
    assert gap <= 5e-6 and apart <= 1e-5


# ---------------------------------------------------------------------------------------------------------------- on a GPU
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel of a GPU")
def test_on_cuda_the_causal_mask_is_aligned_at_the_bottom_right():
    """bf16, the attention alone, forward and backward: rows of a broom against the same rows in flat packing."""
    rng = np.random.default_rng(0)
    rows = [r for g in range(3) for r in group(rng, 100, 1, 3, ["middle"], g, longest=200, prompt=50)]
    flat, broom = (pack(rows, "cuda", share=share) for share in (False, True))
    own, at = [], 0                                     # where in the flat rows a broom's tokens are
    for r, skip in zip(rows, skips(rows), strict=True):
        own += range(at + skip, at + packed_length(r))
        at += packed_length(r)
    full = torch.randn(3, 1, 4, at, 64, device="cuda", dtype=torch.bfloat16)
    trunk_of = torch.empty(at, dtype=torch.long, device="cuda")           # flat position -> position in the broom's row
    trunk_of[:] = broom["seen"] if len(broom["seen"]) == at else pytest.fail("a branch of one token: its keys are not seen")
    row = full[:, :, :, own].requires_grad_()
    spread = row[:, :, :, trunk_of].detach().requires_grad_()             # what flat rows hold twice is equal there

    def attend(x, packed):
        return packed_attention(None, *x, None, None, packed["cu_seqlens"], packed["max_len"], packed["cu_keys"],
                                packed["max_keys"], packed["seen"])[0]  # fmt: skip

    ours, exact = attend(row, broom), attend(spread, flat)[:, own]
    gap = (ours - exact).abs().max().item()
    grad = torch.randn_like(ours)
    ours.backward(grad)
    exact.backward(grad)
    summed = torch.zeros_like(row, dtype=torch.float32).index_add_(3, trunk_of, spread.grad.float())
    apart = ((row.grad - summed).norm() / summed.norm()).item()
    print(f"attention apart by {gap:.1e}, gradients by {apart:.1e}")
    assert gap <= 2e-2 and apart <= 2e-2
