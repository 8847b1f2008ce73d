"""policy.py: packing, micro-batches and ranks change neither numbers nor gradients; one optimizer step is what it says."""
import itertools
import json
import random
import shutil
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import WORLDS, largest, loss_of, one_minibatch, ragged
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import cure
from lib import policy as policy_module
from lib import weights as weights_module
from lib.config import Config
from lib.memory import GPUS, engine_share
from lib.method import load_method
from lib.policy import Policy, bins, compute_dtype, pack, packed_length, partition
from lib.ranks import gather
from lib.weights import load_hf_config, load_lm, load_tokenizer, named_from_folder, refuse_unsupported
from loss import group_advantages, policy_loss, token_weights
from rollout import Rollout, set_pass_rates

BUDGET = 4096


def config(**kwargs):
    return Config(**{"micro_batch_tokens": BUDGET, "lr": 1e-3, "weight_decay": 0.0, **kwargs})


def make(path, head_chunk=64, **kwargs):
    policy = Policy(config(**kwargs), path, torch.device("cpu"))
    policy.model.chunk = head_chunk
    return policy


@pytest.fixture(scope="module", params=["sharp", "odd"])
def policy(request, cpu):
    """Read only: tests that step make their own."""
    return make(request.getfixturevalue(request.param))


@pytest.fixture
def fresh(sharp, cpu):
    return make(sharp)


def plain_model(path, dtype=torch.float32):
    """Transformers as anyone would use it: eager attention, padding-free, one sequence at a time."""
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager").eval()


def plain_logp(model, r, temperature=1.0):
    """Logits at i are for token i + 1: (logp, entropy) of the response tokens of one rollout, without any of our code."""
    ids = torch.tensor([r.prompt_ids + r.prefix_ids + r.response_ids])
    logq = (model(ids).logits[0, :-1] / temperature).log_softmax(-1)      # row i: the distribution of token i + 1
    n = len(r.response_ids)
    return logq.gather(-1, ids[0, 1:, None])[-n:, 0], -(logq.exp() * logq).sum(-1)[-n:]


def prepared(policy, rollouts):
    """Advantages, and old log-probs some way from the present ones, so that clipping is at work."""
    rng = np.random.default_rng(0)
    a = group_advantages(torch.tensor([r.reward for r in rollouts]), torch.tensor([r.group for r in rollouts]))
    for r, x, (logp, _) in zip(rollouts, a.tolist(), policy.score_local(rollouts, 1.0), strict=True):
        r.advantage, r.old_logp = x, logp + rng.normal(0, 0.3, len(logp)).astype(np.float32)
    return rollouts


def token_mean(rollouts):
    """PPO loss over all of `rollouts`, as a function of a micro-batch of them."""
    n_tokens = sum(len(r.response_ids) for r in rollouts)

    def loss_fn(rows, logp, entropy):
        length = torch.tensor([len(r.response_ids) for r in rows], dtype=torch.long)
        old = torch.from_numpy(np.concatenate([np.empty(0, np.float32), *(r.old_logp for r in rows)]))
        advantage = torch.tensor([r.advantage for r in rows]).repeat_interleave(length)
        loss, _ = policy_loss(logp, old.to(logp.dtype), advantage)
        return (loss * token_weights(length, length, "token", n_tokens, len(rollouts))).sum()

    return loss_fn


def gradients(policy, micro_batches, loss_fn, grad_clip=0.0):
    """Policy.update up to the optimizer step: ({name: full gradient}, returned norm)."""
    seen = {}
    policy.opt.step = lambda: seen.update({n: p.grad.full_tensor() for n, p in policy.model.named_parameters()})
    try:
        norm, taken = policy.update(micro_batches, loss_fn, 1.0, 1e-3, grad_clip)
    finally:
        del policy.opt.step
    assert taken == bool(seen)
    return {n.removeprefix("lm."): g for n, g in seen.items()}, norm


def cut(rollouts, budget=BUDGET, world=1):
    return [[[rollouts[i] for i in mb] for mb in rank]
            for rank in partition([packed_length(r) for r in rollouts], world, budget)]


def worst(ours, exact):
    """The largest ‖g - g'‖ / ‖g'‖ of any parameter tensor."""
    assert ours.keys() == exact.keys()
    return largest(((ours[n].double() - g.double()).norm() / g.double().norm()).item() for n, g in exact.items())


def weights(policy):
    return {n: p.clone() for n, p in policy.named_full(torch.float32)}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --------------------------------------------------------------------------------------------------------------- the shift
def test_pack_shifts_by_one_token_and_points_at_what_produced_the_response():
    a, b = Rollout([5, 6], [7], [8, 9, 1]), Rollout([2], [], [3])
    x = pack([a, b], torch.device("cpu"))
    assert x["input_ids"].tolist() == [[5, 6, 7, 8, 9, 2]]                # no rollout's last token is an input
    assert x["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0]]
    assert x["cu_seqlens"].tolist() == [0, 5, 6] and x["cu_seqlens"].dtype == torch.int32 and x["max_len"] == 5
    assert x["index"].tolist() == [2, 3, 4, 5] and x["targets"].tolist() == [8, 9, 1, 3]
    assert [packed_length(r) for r in (a, b)] == [5, 1]


@given(st.integers(0, 10**6), st.integers(1, 8))
@settings(deadline=None, max_examples=50)
def test_pack_targets_are_exactly_the_new_tokens_and_their_predecessors_are_at_index(seed, n):
    rows = ragged(n, seed, 30)
    x = pack(rows, torch.device("cpu"))
    assert x["targets"].tolist() == [t for r in rows for t in r.response_ids]
    before = [(r.prompt_ids + r.prefix_ids + r.response_ids)[-len(r.response_ids) - 1 : -1] for r in rows]
    assert x["input_ids"][0, x["index"]].tolist() == [t for ids in before for t in ids]
    assert x["input_ids"].shape[1] == sum(map(packed_length, rows)) == x["cu_seqlens"][-1]


def test_packing_nothing_gives_one_dummy_token_without_a_target():
    x = pack([], torch.device("cpu"))
    assert x["input_ids"].shape == (1, 1) and len(x["index"]) == len(x["targets"]) == 0


@pytest.mark.parametrize("rows", [[], ragged(3, 0, 30), ragged(40, 0, 30)], ids=len)
def test_padding_to_a_bucket_adds_dummy_sequences_only(rows):
    plain, padded = (pack(rows, torch.device("cpu"), bucket) for bucket in (0, 64))
    T, n = plain["input_ids"].shape[1], len(plain["cu_seqlens"])
    assert padded["input_ids"].shape[1] % 64 == 0 and padded["input_ids"].shape[1] - T < 64
    assert (len(padded["cu_seqlens"]) - 1) % 32 == 0 and padded["cu_seqlens"][-1] == padded["input_ids"].shape[1]
    assert (padded["cu_seqlens"].diff() >= 0).all() and padded["max_len"] >= padded["cu_seqlens"].diff().max()
    assert padded["max_len"].bit_count() == 1
    for key in ("input_ids", "position_ids"):
        assert torch.equal(padded[key][:, :T], plain[key])
    assert torch.equal(padded["cu_seqlens"][:n], plain["cu_seqlens"])
    assert torch.equal(padded["index"], plain["index"]) and torch.equal(padded["targets"], plain["targets"])


@pytest.mark.parametrize("r", [Rollout([1], [2], []), Rollout([], [], [1, 2])])
def test_a_rollout_without_prompt_or_response_is_refused(r):
    with pytest.raises(AssertionError, match="needs a prompt and a response"):
        pack([r], torch.device("cpu"))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_packed_logp_and_entropy_equal_a_plain_forward_one_by_one(policy, temperature):
    model = plain_model(policy.config._name_or_path)
    rows = ragged(9, 3, policy.config.vocab_size)
    gap = 0.0
    for r, ours in zip(rows, policy.score_local(rows, temperature), strict=True):
        with torch.no_grad():
            exact = plain_logp(model, r, temperature)
        assert all(x.dtype == np.float32 and x.shape == (len(r.response_ids),) for x in ours)
        gap = largest(gap, *(np.abs(a - b.numpy()).max() for a, b in zip(ours, exact, strict=True)))
    print(f"packed against plain forward: {gap:.1e}")
    assert gap <= 2e-5


# ------------------------------------------------------------------------------------------------------ gradients, one rank
def test_packed_gradients_equal_one_by_one_gradients(policy):
    rows = prepared(policy, ragged(9, 5, policy.config.vocab_size, per_group=3))
    loss_fn = token_mean(rows)
    packed, _ = gradients(policy, cut(rows)[0], loss_fn)
    single, _ = gradients(policy, [[r] for r in rows], loss_fn)
    gap = worst(packed, single)
    print(f"packed against one by one: {gap:.1e}")
    assert gap <= 1e-5


def test_packed_gradients_equal_a_plain_models_in_float64(policy):
    rows = prepared(policy, ragged(9, 5, policy.config.vocab_size, per_group=3))
    loss_fn, model = token_mean(rows), plain_model(policy.config._name_or_path, torch.float64)
    for r in rows:
        loss_fn([r], *plain_logp(model, r)).backward()
    ours, norm = gradients(policy, cut(rows)[0], loss_fn)
    exact = {n: p.grad for n, p in model.named_parameters()}
    gap = worst(ours, exact)
    print(f"packed fp32 against plain float64: {gap:.1e}")
    assert gap <= 1e-5
    assert norm == pytest.approx(torch.stack([g.norm() for g in exact.values()]).norm().item(), rel=1e-5)


def test_micro_batch_budget_does_not_change_the_gradient(policy):
    rows = prepared(policy, ragged(48, 6, policy.config.vocab_size, per_group=4))
    loss_fn, total = token_mean(rows), sum(map(packed_length, rows))
    sizes, grads = [], []
    for budget in (256, 1024, total):
        mbs = cut(rows, budget)[0]
        sizes.append(len(mbs))
        grads.append(gradients(policy, mbs, loss_fn)[0])
    assert sizes[0] > sizes[1] > sizes[2] == 1, sizes
    gaps = [worst(g, grads[2]) for g in grads[:2]]
    print(f"micro-batches {sizes}: {gaps[0]:.1e} {gaps[1]:.1e}")
    assert largest(gaps) <= 1e-5


def test_activation_checkpointing_and_head_chunk_do_not_change_the_gradient(odd, cpu):
    base = make(odd)
    rows = prepared(base, ragged(6, 5, 37, per_group=3))
    loss_fn = token_mean(rows)
    exact, _ = gradients(base, cut(rows)[0], loss_fn)
    for change in ({"activation_checkpointing": True}, {"head_chunk": 5}):
        assert worst(gradients(make(odd, **change), cut(rows)[0], loss_fn)[0], exact) <= 1e-6


def test_scoring_and_update_see_the_same_floats_so_the_first_ratio_is_exactly_one(policy):
    rows = ragged(12, 8, policy.config.vocab_size)
    mbs = cut(rows, 128)[0]
    assert len(mbs) > 1
    old = {id(r): s[0] for r, s in zip(sum(mbs, []), policy.score(mbs, 1.0), strict=True)}
    ratios = []

    def loss_fn(rows, logp, entropy):
        ratios.append((logp.detach() - torch.from_numpy(np.concatenate([old[id(r)] for r in rows]))).exp())
        return logp.sum()

    gradients(policy, mbs, loss_fn)
    ratios = torch.cat(ratios)
    print(f"{len(ratios)} ratios in {len(mbs)} micro-batches: {ratios.min().item()} to {ratios.max().item()}")
    assert ratios.eq(1).all()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on CPU needs a C++ compiler")
def test_compiled_blocks_give_the_same_gradient(odd, cpu):
    base, compiled = make(odd, micro_batch_tokens=512), make(odd, micro_batch_tokens=512, compile=True, packing="flat")
    rows = prepared(base, ragged(30, 5, 37, per_group=3))
    loss_fn, mbs = token_mean(rows), cut(rows, 512)[0]
    mbs = [mbs[0][:1], mbs[0][1:], *mbs[1:]]                # one bucket for a single short sequence, the last for full ones
    lengths = {pack(mb, torch.device("cpu"), compiled.bucket)["input_ids"].shape[1] for mb in mbs}
    assert len(lengths) > 1 and all(n % 64 == 0 for n in lengths), lengths
    exact, _ = gradients(base, mbs, loss_fn)
    counters = torch._dynamo.utils.counters
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        gap = worst(gradients(compiled, mbs, loss_fn)[0], exact)
        first = counters["stats"]["unique_graphs"]
        scores = zip(compiled.score(mbs, 1.0), base.score(mbs, 1.0), strict=True)
        apart = largest(np.abs(x[i] - y[i]).max() for x, y in scores for i in (0, 1))
        again = counters["stats"]["unique_graphs"]
        gradients(compiled, mbs, loss_fn)
    print(f"compiled against eager: gradient {gap:.1e}, log-prob and entropy {apart:.1e}; {first} graphs, {len(lengths)} lengths")
    assert first >= len(lengths), "every length was compiled"
    assert counters["stats"]["unique_graphs"] == again, "a second update compiles nothing"
    assert gap <= 1e-5 and apart <= 1e-5


# ------------------------------------------------------------------------------------------------------- neighbour isolation
def test_a_neighbours_tokens_do_not_change_one_bit(policy):
    v = policy.config.vocab_size
    a, b, c = Rollout([2, 3, 4], [], [5, 6, 7, 8]), Rollout([4] * 5, [], [3] * 6), Rollout([2, 9], [], [4, 4])
    other = Rollout([v - 1] * 5, [], [v - 2] * 6)
    before, after = policy.score([[a, b, c]], 1.0), policy.score([[a, other, c]], 1.0)
    gap = largest(np.abs(x - y).max() for i in (0, 2) for x, y in zip(before[i], after[i], strict=True))
    print(f"before and after a changed neighbour: {gap:.1e}, the neighbour itself {np.abs(before[1][0] - after[1][0]).max():.1e}")
    for i in (0, 2):                                    # the one before it and the one after it
        assert all(np.array_equal(x, y) for x, y in zip(before[i], after[i], strict=True))
    assert not np.array_equal(before[1][0], after[1][0])


def test_a_neighbour_of_another_length_changes_rounding_only(policy):
    a, b, c = ragged(3, 1, policy.config.vocab_size)
    longer = Rollout(b.prompt_ids * 2, [], b.response_ids + [2, 3, 4, 5, 6])
    alone, gap = policy.score([[a]], 1.0)[0], 0.0
    for mb in ([a, b, c], [a, longer, c], [longer, a], [c, longer, a]):
        at = next(i for i, r in enumerate(mb) if r is a)
        gap = largest(gap, *(np.abs(x - y).max() for x, y in zip(policy.score([mb], 1.0)[at], alone, strict=True)))
    print(f"neighbour of another length: {gap:.1e}")
    assert gap <= 1e-5


def test_no_token_sees_a_later_one(policy):
    a, b = Rollout([2, 3, 4], [], [5, 6, 7, 8]), Rollout([2, 3, 4], [], [5, 6, 9, 2])
    (x, h), (y, g) = policy.score([[a, b]], 1.0)
    assert np.abs(x[:2] - y[:2]).max() <= 1e-6 and np.abs(h[:3] - g[:3]).max() <= 1e-6
    assert abs(x[2] - y[2]) > 1e-3 and abs(h[3] - g[3]) > 1e-4


def test_scores_come_back_in_the_order_given_whatever_the_budget(policy):
    rows = ragged(20, 4, policy.config.vocab_size)
    alone = [policy.score([[r]], 1.0)[0] for r in rows]
    few = policy.score_local(rows, 1.0)
    policy.cfg.micro_batch_tokens = 70
    try:
        many = policy.score_local(rows, 1.0)
    finally:
        policy.cfg.micro_batch_tokens = BUDGET
    for exact, *scores in zip(alone, few, many, strict=True):
        for s in scores:
            assert all(np.abs(x - y).max() <= 1e-5 for x, y in zip(s, exact, strict=True))


# ------------------------------------------------------------------------------------------------------------ micro-batches
@given(st.lists(st.integers(1, 100), max_size=60), st.integers(1, 6), st.integers(0, 300))
@example([100] * 7, 2, 0)
@settings(deadline=None)
def test_partition_covers_every_index_once_within_budget_and_equally_often_on_all_ranks(lengths, world, slack):
    budget = max(lengths, default=1) + slack
    plan = partition(lengths, world, budget)
    assert len(plan) == world and len({len(rank) for rank in plan}) == 1 <= len(plan[0])
    assert sorted(i for rank in plan for mb in rank for i in mb) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in mb) <= budget for rank in plan for mb in rank)
    heaviest = max(sum(lengths[i] for mb in rank for i in mb) for rank in plan)
    assert heaviest <= sum(lengths) / world + max(lengths, default=0)     # longest first, into the emptiest: Graham's bound
    assert len(plan[0]) <= 2 * heaviest / budget + 2                      # not one sequence a micro-batch


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 5))
@settings(deadline=None)
def test_bins_spread_any_indices_each_once_in_ascending_order(lengths, k):
    indices = range(0, len(lengths), 2)
    out = bins(lengths, indices, k)
    assert len(out) == k and sorted(itertools.chain(*out)) == list(indices) and all(b == sorted(b) for b in out)


@pytest.mark.parametrize("world", [2, 3, 8])
def test_ranks_are_balanced_on_log_normal_lengths(world):
    rng = random.Random(0)
    lengths = [min(4096, 1 + int(rng.lognormvariate(6, 0.8))) for _ in range(512)]
    plan = partition(lengths, world, 16384)
    loads = [sum(lengths[i] for mb in rank for i in mb) for rank in plan]
    print(f"{world} ranks: max/mean {max(loads) / np.mean(loads):.5f}, {len(plan[0])} micro-batches each")
    assert max(loads) / np.mean(loads) <= 1.05 and len(plan[0]) == -(-max(loads) // 16384)


def test_a_sequence_over_the_budget_is_a_value_error_naming_the_key(fresh):
    with pytest.raises(ValueError, match="micro_batch_tokens=99 .* 100 tokens"):
        partition([5, 100], 2, 99)
    fresh.cfg.micro_batch_tokens = 10
    with pytest.raises(ValueError, match="micro_batch_tokens=10"):
        fresh.score_local([Rollout([2] * 8, [], [3] * 8)], 1.0)


def test_loss_denominator_counts_neither_prompt_nor_padding_nor_the_ranks_share(policy):
    """All advantages 1 and all ratios 1: the loss is -1, or the denominator counts something else than response tokens."""
    for prompt, budget in ((2, 4096), (60, 120), (60, 4096)):
        rows = ragged(12, 2, policy.config.vocab_size, prompt=(prompt, prompt))
        mini, total = one_minibatch(rows, budget), []
        for micro in mini.here(0):
            for r, (logp, _) in zip(micro, policy.score([micro], 1.0), strict=True):
                r.old_logp, r.advantage = logp, 1.0
        inner = loss_of(policy, config(micro_batch_tokens=budget), mini)

        def loss_fn(*args, inner=inner, total=total):
            total.append(inner(*args))
            return total[-1]

        gradients(policy, mini.here(0), loss_fn)
        print(f"prompts of {prompt}, {len(total)} micro-batches: loss {sum(total).item():.7f}")
        assert sum(total).item() == pytest.approx(-1, abs=1e-6)


def masked_gradients(policy, rows, **kwargs):
    """Gradients of cure's own minibatch loss with these settings: ({name: gradient}, micro-batches)."""
    mini = one_minibatch(rows, 128)
    return gradients(policy, mini.here(0), loss_of(policy, config(**kwargs), mini))[0], len(mini.here(0))


@pytest.fixture
def masked_rows(policy):
    rows = prepared(policy, ragged(12, 5, policy.config.vocab_size, per_group=4))
    for r, (_, entropy) in zip(rows, policy.score_local(rows, 1.0), strict=True):
        r.entropy = entropy
    return rows


@pytest.mark.parametrize("rho", [1.0, 1 - 1e-9])        # the second goes through the mask, which then keeps every token
def test_a_mask_that_keeps_all_tokens_is_plain_dapo_bit_for_bit(policy, masked_rows, rho):
    mbs = cut(masked_rows, 128)[0]
    plain, _ = gradients(policy, mbs, token_mean(masked_rows))            # written here, without any mask
    for side, scope, norm in itertools.product(("top", "bottom", "random"), ("mini", "micro"), ("kept", "all")):
        ours, n = masked_gradients(policy, masked_rows, entropy_mask_rho=rho, entropy_mask_side=side, entropy_mask_scope=scope,
                                   entropy_mask_norm=norm)  # fmt: skip
        assert n == len(mbs) > 1 and same(ours, plain), (side, scope, norm)
    print(f"rho {rho}: 12 kinds of mask, every gradient equal bit for bit over {n} micro-batches")


@pytest.mark.parametrize("scope", ["mini", "micro"])
def test_norm_all_is_k_of_n_times_norm_kept_in_every_gradient(policy, masked_rows, scope):
    kept, of_all = (masked_gradients(policy, masked_rows, entropy_mask_rho=0.2, entropy_mask_scope=scope, entropy_mask_norm=norm)
                    [0] for norm in ("kept", "all"))  # fmt: skip
    sizes = [sum(len(r.response_ids) for r in mb) for mb in cut(masked_rows, 128)[0]]
    n = sum(sizes)
    k = -(-n // 5) if scope == "mini" else sum(-(-x // 5) for x in sizes)
    gap = worst(of_all, {name: g * (k / n) for name, g in kept.items()})
    print(f"{scope}: k/n = {k}/{n}, norm all against k/n of norm kept: {gap:.1e}")
    assert gap <= 1e-5


def test_an_empty_micro_batch_adds_nothing_to_cures_loss_and_no_nan(policy, masked_rows):
    rows, tried = masked_rows[:4], 0
    masks = {}, {"entropy_mask_rho": 0.3}, {"entropy_mask_rho": 0.3, "entropy_mask_scope": "micro"}
    for agg, mask, norm in itertools.product(("token", "sequence", "micro"), masks, ("kept", "all")):
        cfg, found = config(agg=agg, importance=["token_truncate", 0, 2], entropy_mask_norm=norm, **mask), []
        for plan in ([[[0, 1, 2, 3]]], [[[], [0, 1, 2, 3], []]]):
            mini, sums = cure.Minibatch(rows, plan), Counter()
            found.append(gradients(policy, mini.here(0), loss_of(policy, cfg, mini, sums))[0])
            assert all(np.isfinite(v) for v in sums.values()), sums
        assert same(*found) and all(g.isfinite().all() for g in found[0].values()), cfg
        tried += 1
    print(f"{tried} settings: gradients with and without two empty micro-batches are equal bit for bit, and finite")


# -------------------------------------------------------------------------------------------------- variants of the loss
def test_plain_dapo_is_policy_loss_and_token_weights_bit_for_bit_and_so_is_a_bonus_of_0(policy, masked_rows):
    plain, _ = gradients(policy, cut(masked_rows, 128)[0], token_mean(masked_rows))   # written here, without any variant
    for off in ({}, {"method": ["entropy_bonus"], "method_args": {"coef": 0.0}}):
        assert same(masked_gradients(policy, masked_rows, **off)[0], plain)


def test_entropy_bonus_adds_the_gradient_of_the_mean_entropy(policy, request, masked_rows):
    """Against plain transformers in float64: d/dw of -0.3 x mean H over all response tokens, mini- and micro-batches apart."""
    source = request.getfixturevalue(request.node.callspec.params["policy"])
    plain, with_bonus = (masked_gradients(policy, masked_rows, method=["entropy_bonus"], method_args={"coef": c})[0]
                         for c in (0.0, 0.3))  # fmt: skip
    model = plain_model(source, torch.float64)
    h = torch.cat([plain_logp(model, r)[1] for r in masked_rows])
    (-0.3 * h.mean()).backward()
    exact = {n: p.grad for n, p in model.named_parameters()}
    gap = worst({n: with_bonus[n].double() - plain[n].double() for n in exact}, exact)
    print(f"entropy bonus against float64: {gap:.1e}, mean entropy {h.mean().item():.3f}")
    assert gap <= 1e-4                                   # a difference of two fp32 gradients


def chosen_tokens(policy, rows, k, method, budget=128, **kwargs):
    """What the method's survey of all rows as minibatch k chose: [(chosen, cov) of each row], micro-batches."""
    mini = one_minibatch(rows, budget)
    loss_of(policy, config(method=[method], method_args=kwargs), mini, k=k)
    return [(r.survey["cov_share"], r.survey["cov"]) for r in rows], len(mini.here(0))


@pytest.mark.parametrize("k", [0, 1])
def test_covariance_is_of_the_whole_minibatch_under_the_present_policy(policy, masked_rows, k):
    """masked_rows' old log-probs are 0.3 nats from the present ones: k = 0 takes the old ones (there they are the same),
    k = 1 the present ones. Against numpy, token by token, from one plain scoring of the rows."""
    logp = [r.old_logp for r in masked_rows] if k == 0 else [x for x, _ in policy.score_local(masked_rows, 1.0)]
    a = np.repeat([r.advantage for r in masked_rows], [len(x) for x in logp])
    flat, old = np.concatenate(logp).astype(float), np.concatenate([r.old_logp for r in masked_rows])
    cov = (flat - flat.mean()) * (a - a.mean())
    found, n = chosen_tokens(policy, masked_rows, k, "kl_cov", cov_share=0.1)
    gap = np.abs(np.concatenate([c for _, c in found]) - cov).max()
    top = set(np.argsort(-cov, kind="stable")[: int(0.1 * len(cov))])
    picked = set(np.concatenate([c for c, _ in found]).nonzero()[0])
    print(f"minibatch {k}: covariance off by {gap:.1e}, {len(top)} of {len(cov)} tokens over {n} micro-batches")
    assert n > 1 and gap < 1e-4 and picked == top
    found, _ = chosen_tokens(policy, masked_rows, k, "clip_cov", cov_share=0.1, cov_low=0.3, cov_high=3.0)
    picked, ratio = np.concatenate([c for c, _ in found]) > 0, np.exp(flat - old)
    eligible = (cov > 0.3) & (cov < 3) & ~((a > 0) & (ratio > 1.28)) & ~((a < 0) & (ratio < 0.8))
    assert not (picked & ~eligible).any() and picked.sum() == min(int(0.1 * len(cov)), eligible.sum()) > 0


@pytest.mark.parametrize("mode", ["clip_cov", "kl_cov"])
def test_the_choice_does_not_depend_on_how_the_minibatch_is_cut(policy, masked_rows, mode):
    args = {"cov_share": 0.1} | ({"cov_low": 0.2} if mode == "clip_cov" else {})
    cuts = {b: chosen_tokens(policy, masked_rows, 1, mode, budget=b, **args) for b in (70, 128, 4096)}
    sizes = [n for _, n in cuts.values()]
    for found, _ in cuts.values():
        assert all(np.array_equal(x[0], y[0]) for x, y in zip(found, cuts[70][0], strict=True))
    print(f"{mode}: {int(sum(c.sum() for c, _ in found))} tokens, the same for {sizes} micro-batches")
    assert len(set(sizes)) == 3


@pytest.mark.parametrize(
    ("kept", "per_step", "sizes"),
    [(9, 4, [3, 3, 3]), (5, 4, [3, 2]), (8, 4, [4, 4]), (7, 3, [3, 2, 2]), (3, 4, [3]), (33, 32, [17, 16]), (0, 4, [])],
)  # fmt: skip
def test_left_over_groups_are_spread_and_never_get_a_step_of_their_own(fresh, kept, per_step, sizes):
    rows = ragged(3 * kept, 7, 25, per_group=3, response=(1, 8))
    for i, r in enumerate(rows):
        r.group = 3 * r.group + 1                       # the draw had groups in between, which were not kept
        r.reward, r.correct = [(1.0, True), (0.5, True), (-1.0, False)][i % 3]   # the second is right, but over-long
    plan = cure.cut_minibatches(config(prompts_per_minibatch=per_step), rows, 1) if rows else []
    if rows:
        run = SimpleNamespace(policy=fresh, rank=0, world=1)
        cure.score(run, config(prompts_per_minibatch=per_step), plan)
    cure.set_advantages(SimpleNamespace(**cure.HOOKS), rows)
    groups = [sorted({r.group for r in mini.rows}) for mini in plan]
    print(f"{kept} kept groups, {per_step} a step: {[len(g) for g in groups]}")
    assert [len(g) for g in groups] == sizes and sum(groups, []) == sorted({r.group for r in rows})       # in data order
    places = {id(r): i for i, r in enumerate(rows)}
    members = sorted(places[id(r)] for mini in plan for micro in mini.here(0) for r in micro)
    assert members == list(range(len(rows))), "every rollout once, groups whole"
    shaped = [0.80064, 0.32026, -1.12090]               # (1, 0.5, -1) - 1/6, over 1.04083: of the reward, not the accuracy
    assert [r.advantage for r in rows] == pytest.approx(shaped * kept, abs=1e-5)
    assert all(len(r.old_logp) == len(r.entropy) == len(r.response_ids) for r in rows)


# -------------------------------------------------------------------------------------------------------- the optimizer step
def test_first_step_moves_every_parameter_by_about_lr(fresh):
    rows, before = prepared(fresh, ragged(8, 5, 25, per_group=4)), weights(fresh)
    norm, taken = fresh.update(cut(rows)[0], token_mean(rows), 1.0, 1e-3, 1.0)
    assert taken and np.isfinite(norm) and norm > 0 and fresh.adam_step == 1
    moved = {name: (w - before[name]).abs().max().item() for name, w in weights(fresh).items()}
    print(f"lr 1e-3: {len(moved)} tensors move by {min(moved.values()):.2e} to {max(moved.values()):.2e}")
    for name, by in moved.items():
        assert 0.9e-3 < by < 1.1e-3, name               # Adam's first step is lr times the sign of the gradient


def test_a_step_descends_the_loss_it_was_given(fresh):
    rows = ragged(8, 5, 25)
    n = sum(len(r.response_ids) for r in rows)
    losses = []

    def loss_fn(_, logp, __):
        losses.append(-logp.sum() / n)
        return losses[-1]

    for _ in range(5):
        fresh.update(cut(rows)[0], loss_fn, 1.0, 1e-3, 1.0)
    assert losses == sorted(losses, reverse=True) and losses[4] < losses[0] - 0.02


def test_lr_of_the_call_is_used_and_zero_moves_nothing(fresh):
    rows, before = prepared(fresh, ragged(4, 5, 25, per_group=4)), weights(fresh)
    fresh.update(cut(rows)[0], token_mean(rows), 1.0, 0.0, 1.0)
    assert same(weights(fresh), before)


def test_weight_decay_is_on_all_parameters(sharp, cpu):
    p = make(sharp, weight_decay=0.5)
    assert [g["weight_decay"] for g in p.opt.param_groups] == [0.5]
    assert len(p.opt.param_groups[0]["params"]) == len(list(p.model.parameters()))
    before = weights(p)
    p.update([[]], lambda rows, logp, entropy: logp.sum(), 1.0, 0.1, 1.0)         # no gradient: nothing but decay
    assert all(torch.allclose(w, before[n] * 0.95, rtol=1e-6) for n, w in weights(p).items())


@pytest.mark.parametrize("clip", [0.5, 1e6, 0.0])
def test_gradient_is_clipped_to_the_norm_and_keeps_its_direction(policy, clip):
    rows = prepared(policy, ragged(8, 5, policy.config.vocab_size, per_group=4))

    inner = token_mean(rows)

    def loss_fn(*args):
        return 10 * inner(*args)

    free, norm = gradients(policy, cut(rows)[0], loss_fn)
    clipped, reported = gradients(policy, cut(rows)[0], loss_fn, clip)
    assert reported == norm > 1                         # what is logged is the norm before clipping
    scale = 0.5 / norm if clip == 0.5 else 1.0
    assert worst(clipped, {n: g * scale for n, g in free.items()}) <= 2e-6
    assert torch.stack([g.double().norm() for g in clipped.values()]).norm().item() == pytest.approx(norm * scale, rel=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_takes_no_step_and_leaves_no_trace(fresh, bad):
    rows = prepared(fresh, ragged(6, 5, 25, per_group=3))
    before = weights(fresh)
    norm, taken = fresh.update(cut(rows, 128)[0], lambda r, logp, h: (logp * bad).sum(), 1.0, 1e-3, 1.0)
    assert not taken and not np.isfinite(norm) and same(weights(fresh), before) and fresh.adam_step == 0
    clean, _ = gradients(fresh, cut(rows)[0], token_mean(rows))           # nothing of it is left in the gradients either
    assert all(g.isfinite().all() for g in clean.values())
    assert fresh.update(cut(rows)[0], token_mean(rows), 1.0, 1e-3, 1.0)[1] and not same(weights(fresh), before)


def test_empty_rows_give_no_nan_and_no_gradient(policy):
    assert policy.score_local([], 1.0) == [] == policy.score([[], []], 1.0)
    rows = prepared(policy, ragged(5, 5, policy.config.vocab_size, per_group=5))
    loss_fn = token_mean(rows)
    g, norm = gradients(policy, [[]], loss_fn)
    assert norm == 0 and not any(x.any() for x in g.values())
    full, _ = gradients(policy, [rows], loss_fn)
    padded, _ = gradients(policy, [[], rows, []], loss_fn)
    assert all(torch.equal(full[n], padded[n]) for n in full)


def test_training_does_not_touch_the_global_generator(fresh):
    rows, before = prepared(fresh, ragged(4, 5, 25, per_group=4)), torch.get_rng_state()
    fresh.score_local(rows, 1.0)
    fresh.update(cut(rows)[0], token_mean(rows), 1.0, 1e-3, 1.0)
    assert torch.equal(torch.get_rng_state(), before)


# ------------------------------------------------------------------------------------------------------ weights in and out
@pytest.mark.parametrize("name", ["sharp", "odd"])
def test_saved_folder_reloads_in_transformers_with_the_same_logits(name, request, cpu, tmp_path):
    from transformers import AutoTokenizer, GenerationConfig
    source = request.getfixturevalue(name)
    p, tokenizer = make(source), AutoTokenizer.from_pretrained(source)
    rows = prepared(p, ragged(6, 5, 25, per_group=3))
    p.update(cut(rows)[0], token_mean(rows), 1.0, 1e-3, 1.0)
    p.save_hf(tmp_path, tokenizer)
    again = plain_model(tmp_path)
    assert same(weights(p), dict(again.named_parameters())) and not same(weights(p), dict(plain_model(source).named_parameters()))
    assert again.config.tie_word_embeddings == (name == "sharp")
    original = plain_model(source)                      # logits, bit for bit: the same weights in the model they came from
    original.load_state_dict({n: w for n, w in weights(p).items()}, strict=False)
    ids = torch.tensor([rows[0].prompt_ids + rows[0].response_ids])
    assert torch.equal(again(ids).logits, original(ids).logits)
    for r, (logp, _) in zip(rows, p.score_local(rows, 1.0), strict=True):
        assert np.abs(plain_logp(again, r)[0].detach().numpy() - logp).max() <= 2e-5
    assert AutoTokenizer.from_pretrained(tmp_path)("1+2=3;")["input_ids"] == tokenizer("1+2=3;")["input_ids"]
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == 1
    assert not [f.name for f in tmp_path.iterdir() if f.suffix in (".bin", ".pt", ".pkl")]


def stored_otherwise(source, folder, form):
    """A copy of a model folder: its weights in bf16, in several files with an index, or the tied one as the head's."""
    from transformers import AutoModelForCausalLM
    if form in ("bf16", "sharded"):
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16 if form == "bf16" else torch.float32)
        model.save_pretrained(folder, max_shard_size="100KB" if form == "sharded" else "1GB")
        assert len(list(folder.glob("*.safetensors"))) == 1 or form == "sharded"
    else:
        shutil.copytree(source, folder)
    if form == "head's name":
        weights = load_file(folder / "model.safetensors")
        weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


@pytest.mark.parametrize("name, form", [
    ("sharp", "as it is"), ("odd", "as it is"), ("sharp", "bf16"), ("odd", "bf16"), ("sharp", "sharded"),
    ("odd", "sharded"), ("sharp", "head's name"),
])  # fmt: skip
def test_weights_and_buffers_are_those_of_transformers_bit_for_bit(name, form, request, cpu, tmp_path):
    folder = stored_otherwise(request.getfixturevalue(name), tmp_path / "model", form)
    ours = make(folder)
    for dtype in (torch.float32, torch.bfloat16):
        theirs, lm = plain_model(folder, dtype), load_lm(folder, dtype, "eager")
        exact = dict(theirs.named_parameters())
        found = [dict(lm.named_parameters()), dict(named_from_folder(folder, dtype))]
        found += [weights(ours)] if dtype == torch.float32 else []
        for w in found:
            assert list(w) == list(exact) and same(w, exact) and {x.dtype for x in w.values()} == {dtype}
        lms = [lm, ours.model.lm] if dtype == torch.float32 else [lm]
        for x in lms:
            assert same(dict(x.named_buffers()), dict(theirs.named_buffers()))
            assert x.generation_config == theirs.generation_config
            tied = x.lm_head.weight is x.model.embed_tokens.weight
            assert tied == x.config.tie_word_embeddings == (name == "sharp")
            assert not x.training and x.dtype == dtype
        ids = torch.arange(20)[None]
        assert torch.equal(lm(ids).logits, theirs(ids).logits)


def test_a_tensor_that_is_not_what_the_configuration_says_is_refused_by_its_name(sharp, odd, cpu, tmp_path):

    def folder(name, source, change):
        shutil.copytree(source, tmp_path / name)
        weights = load_file(tmp_path / name / "model.safetensors")
        change(weights)
        save_file(weights, tmp_path / name / "model.safetensors", {"format": "pt"})
        return str(tmp_path / name)

    norm, embedding, head = "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"
    bad = {
        "shape": (odd, lambda w: w.update({norm: w[norm][:-1].clone()}), f"{norm} as F32 .47., not as floats .48."),
        "kind": (odd, lambda w: w.update({norm: w[norm].to(torch.int8)}), f"{norm} as I8 .48., not as floats .48."),
        "head": (sharp, lambda w: w.update({head: w[embedding] + 1}), f"a {head} other than the {embedding}"),
    }
    for name, (source, change, says) in bad.items():
        with pytest.raises(ValueError, match="^model: .* has " + says) as caught:
            make(folder(name, source, change))
        assert "\n" not in str(caught.value)
    twice = folder("twice", sharp, lambda w: w.update({head: w[embedding].clone()}))
    assert same(weights(make(twice)), weights(make(sharp))), "the same tensor under both names is fine"


def test_a_torn_file_and_one_that_an_index_lacks_are_refused_in_one_line(sharp, cpu, tmp_path):
    torn, lost = (stored_otherwise(sharp, tmp_path / name, "sharded") for name in ("torn", "lost"))
    file = sorted((tmp_path / "torn").glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-100])
    (tmp_path / "lost" / file.name).unlink()
    for folder in (torn, lost):
        for load in (make, lambda f: load_lm(f, torch.float32, "sdpa"), lambda f: named_from_folder(f, torch.float32)):
            with pytest.raises(ValueError, match="^model: cannot load") as caught:
                load(folder)
            assert "\n" not in str(caught.value)
        print(caught.value)


def test_a_hub_id_is_read_from_its_local_snapshot(sharp, cpu, monkeypatch):
    asked = []

    def snapshot(name, allow_patterns):
        asked.append((name, allow_patterns))
        return sharp

    monkeypatch.setattr(weights_module, "snapshot_download", snapshot)
    stored = weights_module.open_files("somebody/model")
    assert asked == [("somebody/model", ["model*.safetensors", "model*.json"])]
    assert all(torch.equal(stored[name][...], w) for name, w in plain_model(sharp).named_parameters())
    weights_module.open_files(sharp)
    assert len(asked) == 1, "a folder is no hub id"


def counted(make_it):
    """What make_it() makes, how many numbers it read from files, and whether FSDP got nothing but the meta device's."""
    read, meta, plain, shard = [], [], weights_module.open_files, policy_module.fully_shard

    class Slice:
        def __init__(self, stored):
            self.get_shape, self.get_dtype, self.stored = stored.get_shape, stored.get_dtype, stored

        def __getitem__(self, index):
            rows = self.stored[index]
            read.append(rows.numel())
            return rows

    def sharded(module, **kwargs):
        meta.extend(p.is_meta for p in module.parameters())
        return shard(module, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights_module, "open_files", lambda path: {k: Slice(v) for k, v in plain(path).items()})
        patch.setattr(policy_module, "fully_shard", sharded)
        return make_it(), sum(read), all(meta) and len(meta) > 0


def test_each_weight_is_read_once_and_nothing_is_in_memory_before_it_is_sharded(sharp, odd, cpu):
    for folder in (sharp, odd):
        made, read, meta = counted(lambda folder=folder: make(folder))
        assert read == made.n_params and meta


def test_named_full_names_every_parameter_of_the_hf_model_once(policy):
    names = [n for n, _ in policy.named_full()]
    model = plain_model(policy.config._name_or_path)
    assert len(names) == len(set(names)) and set(names) == {n for n, _ in model.named_parameters()}
    assert policy.n_params == sum(p.numel() for p in model.parameters())


def test_state_holds_weights_and_moments_and_prepare_adam_makes_room_for_them(sharp, fresh):
    names = {n for n, _ in fresh.model.named_parameters()}
    assert set(fresh.state()) == {"model." + n for n in names} and fresh.adam_step == 0
    rows = prepared(fresh, ragged(4, 5, 25, per_group=4))
    for _ in range(2):
        fresh.update(cut(rows)[0], token_mean(rows), 1.0, 1e-3, 1.0)
    state = fresh.state()
    assert set(state) == {f"{k}{n}" for n in names for k in ("model.", "exp_avg.", "exp_avg_sq.")} and fresh.adam_step == 2
    other = make(sharp)
    other.prepare_adam(2)
    with torch.no_grad():
        for k, v in other.state().items():
            v.copy_(state[k])
    assert other.adam_step == 2
    for p in (fresh, other):
        p.update(cut(rows)[0], token_mean(rows), 1.0, 1e-3, 1.0)
    assert same(weights(fresh), weights(other))         # a copy of state() goes on bit for bit
    other.new_optimizer(config())
    assert other.adam_step == 0


def test_moments_made_with_the_optimizer_are_those_that_its_first_step_would_make(sharp, fresh):
    lazy = make(sharp)
    rows = prepared(fresh, ragged(4, 5, 25, per_group=4))
    for _ in range(2):                                  # the second time for a new stage, after steps
        for p in (fresh, lazy):
            p.new_optimizer(config(betas=[0.8, 0.95]))
        moments = [x for s in fresh.opt.state.values() for x in s.values()]
        assert len(moments) == 3 * len(list(fresh.model.parameters())) and not any(x.any() for x in moments)
        lazy.opt.state.clear()
        for _ in range(2):
            for p in (fresh, lazy):
                p.update(cut(rows)[0], token_mean(rows), 1.0, 1e-3, 1.0)
        a, b = ({k: x.full_tensor() for k, x in p.state().items()} for p in (fresh, lazy))
        assert same(a, b) and fresh.adam_step == lazy.adam_step == 2


def test_bf16_compute_keeps_fp32_masters_and_fp32_scores(sharp, cpu):
    p, full = make(sharp, dtype="bfloat16"), make(sharp)
    rows = prepared(p, ragged(6, 5, 25, per_group=3))
    gap = 0.0
    for a, b in zip(p.score_local(rows, 1.0), full.score_local(rows, 1.0), strict=True):
        assert a[0].dtype == a[1].dtype == np.float32
        gap = largest(gap, np.abs(a[0] - b[0]).mean())
    assert 1e-5 < gap < 0.2
    before = weights(p)
    p.update(cut(rows)[0], token_mean(rows), 1.0, 1e-6, 1.0)              # far below bf16's resolution
    assert all(w.dtype == torch.float32 for w in p.model.parameters()) and not same(weights(p), before)
    assert {w.dtype for _, w in p.named_full()} == {torch.bfloat16}
    exact, ours = gradients(full, cut(rows)[0], token_mean(rows))[0], gradients(p, cut(rows)[0], token_mean(rows))[0]
    assert all(g.dtype == torch.float32 for g in ours.values()) and worst(ours, exact) < 0.3


def test_a_folder_saved_in_bf16_says_so_and_loads_as_bf16(sharp, cpu, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    p = make(sharp, dtype="bfloat16")
    p.save_hf(tmp_path, AutoTokenizer.from_pretrained(sharp))
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16 and same(dict(p.named_full()), dict(again.named_parameters()))


def test_compute_dtype_is_fp32_on_cpu_and_bf16_on_cuda_unless_named():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [compute_dtype(config(), d) for d in (cpu, cuda)] == [torch.float32, torch.bfloat16]
    assert [compute_dtype(config(dtype="bfloat16"), cpu), compute_dtype(config(dtype="float32"), cuda)] == [
        torch.bfloat16, torch.float32]  # fmt: skip


def test_a_folder_without_a_model_is_a_value_error_naming_the_key(cpu, tmp_path):
    with pytest.raises(ValueError, match="^model: cannot load") as caught:
        make(str(tmp_path))
    assert "\n" not in str(caught.value)


EVIL = """
import pathlib
pathlib.Path({canary!r}).write_text("executed")
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
class Config(Qwen2Config): model_type = {model_type!r}
class Model(Qwen2ForCausalLM): config_class = Config
class Tokenizer(Qwen2Tokenizer): pass
"""


@pytest.mark.parametrize("model_type", ["qwen2", "nobodys"])
def test_code_in_a_model_folder_is_never_executed(sharp, cpu, tmp_path, model_type):
    folder, canary = tmp_path / "model", tmp_path / "canary"
    shutil.copytree(sharp, folder)
    (folder / "evil.py").write_text(EVIL.format(canary=str(canary), model_type=model_type))
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.Tokenizer", None]}
    for name, more in (("config.json", {"model_type": model_type}), ("tokenizer_config.json", {"tokenizer_class": "Tokenizer"})):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | more | {"auto_map": auto_map}))
    loaded = []
    for load in (load_tokenizer, load_hf_config, lambda f: load_lm(f, torch.float32, "packed"),
                 lambda f: engine_share(config(), load_hf_config(f), 1, GPUS["h100"])):
        try:
            loaded.append(load(str(folder)))
        except ValueError as e:                         # refused is as good as loaded without it
            assert str(e).startswith("model: ") and "\n" not in str(e)
    print(f"model type {model_type}: {len(loaded)} of 4 loaders load the folder, none runs its code")
    assert not canary.exists() and len(loaded) >= (3 if model_type == "qwen2" else 0)
    assert all(type(x).__module__.startswith(("transformers.", "builtins")) for x in loaded)


class Bomb:
    """Unpickling it writes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_pickled_weights_are_refused_unread_naming_the_key(sharp, cpu, tmp_path, name):
    folder, canary = tmp_path / "model", tmp_path / "canary"
    shutil.copytree(sharp, folder)
    (folder / "model.safetensors").unlink()
    torch.save({"weights": Bomb(canary)}, folder / name)                  # under either name: what counts is what is in it
    with pytest.raises(ValueError, match="^model: cannot load") as caught:
        make(str(folder))
    print(f"{name}: {caught.value}")
    assert "\n" not in str(caught.value) and not canary.exists()


def test_a_model_file_that_lacks_a_tensor_is_refused_by_its_name(sharp, cpu, tmp_path):
    shutil.copytree(sharp, tmp_path / "model")
    weights = load_file(tmp_path / "model/model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model/model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"model: .*lacks 1 tensors, model.layers.1.mlp.up_proj.weight"):
        make(str(tmp_path / "model"))


@pytest.mark.parametrize(
    "name, says",
    [("Cohere", "logit_scale 0.0625"), ("Granite", "logits_scaling 8"),
     ("Gemma2", "final_logit_softcapping 30.0, attn_logit_softcapping 50.0, sliding-window attention"),
     ("MiniCPM3", "logits_scaling 2.0"), ("Mistral", "sliding-window attention"), ("Phi", "a bias in the head"),
     ("Llama", None), ("Qwen2", None), ("Qwen3", None), ("SmolLM3", None), ("Gemma", None)],
)  # fmt: skip
def test_what_the_packed_forward_lacks_is_refused_by_name_and_plain_models_are_not(name, says):
    import transformers
    changes = {"Granite": {"logits_scaling": 8}, "MiniCPM3": {"dim_model_base": 1280}}
    one = getattr(transformers, f"{name}Config")(**{"num_hidden_layers": 1} | changes.get(name, {}))
    with torch.device("meta"):
        lm = transformers.AutoModelForCausalLM.from_config(one)
    if says is None:
        return refuse_unsupported(lm)
    with pytest.raises(ValueError, match=f"^model: a {one.model_type} with {says}, which the packed forward"):
        refuse_unsupported(lm)


def test_a_granite_folder_is_refused_where_the_policy_loads_it_and_by_it_alone(tmp_path):
    from transformers import GraniteConfig, GraniteForCausalLM
    one = GraniteConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                        num_key_value_heads=1, logits_scaling=8)  # fmt: skip
    GraniteForCausalLM(one).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="^model: a granite with logits_scaling 8"):
        load_lm(str(tmp_path), torch.float32, "packed")
    load_lm(str(tmp_path), torch.float32, "sdpa")           # an engine's own forward scales


def test_buffers_of_the_file_are_read_and_one_that_nothing_computes_is_refused(tmp_path):
    from transformers import ApertusConfig, ApertusForCausalLM
    one = ApertusConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                        num_key_value_heads=1)  # fmt: skip
    ApertusForCausalLM(one).save_pretrained(tmp_path)
    stored, name = load_file(tmp_path / "model.safetensors"), "model.layers.0.mlp.act_fn.beta"
    save_file(stored | {name: torch.tensor(0.75)}, tmp_path / "model.safetensors")
    assert dict(load_lm(str(tmp_path), torch.float32, "sdpa").named_buffers())[name] == 0.75
    del stored[name]
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"^model: .* lacks the buffer {name}"):
        load_lm(str(tmp_path), torch.float32, "sdpa")


def test_sliding_window_attention_is_refused_because_the_packed_forward_has_none(sharp, cpu, tmp_path):
    shutil.copytree(sharp, tmp_path, dirs_exist_ok=True)
    config_json = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config_json | {"use_sliding_window": True, "sliding_window": 8}))
    with pytest.raises(ValueError, match="^model: .*sliding-window"):
        make(str(tmp_path))


# -------------------------------------------------------------------------------------------------------------- more ranks
VARIANTS = {
    "token": {},
    "sequence": {"agg": "sequence"},
    "mask": {"entropy_mask_rho": 0.3},
    "mask of all": {"entropy_mask_rho": 0.3, "entropy_mask_norm": "all"},
    "small micro-batches": {"micro_batch_tokens": 70},
    "clip_cov": {"method": ["clip_cov"], "method_args": {"cov_share": 0.05, "cov_low": 0.2}},
    "kl_cov": {"method": ["kl_cov"], "method_args": {"cov_share": 0.05}, "micro_batch_tokens": 70},
    "entropy bonus": {"method": ["entropy_bonus"], "method_args": {"coef": 0.1}, "agg": "sequence"},
    "sequence weights": {"importance": ["sequence_truncate", 0.5, 1.5]},
    **{name: {"method": [name], "agg": "sequence"} for name in ("gspo", "holder_po", "dr_grpo")},
    **{name: {"method": [name]} for name in ("cispo", "rloo", "maxrl", "tree_po", "entropy_shaped", "eapo", "htpo", "spo_mask")},
    "kl": {"method": ["kl"], "method_args": {"coef": 0.5}},
    "lp_reg": {"method": ["lp_reg"], "method_args": {"share": 0.5}},
    "opefo": {"method": ["opefo"], "prompts_per_step": 7, "prompts_per_minibatch": 7},
    "pass_k": {"method": ["pass_k"], "method_args": {"k": 2}},
}


def steps_of(policy, rank, world, variant):
    """Gradients of all minibatches of one training step on 7 kept groups of 4, cut as the training loop cuts them."""
    cfg = config(**{"prompts_per_minibatch": 3} | VARIANTS[variant])
    rows = ragged(28, 11, 25, per_group=4)
    run, method = SimpleNamespace(policy=policy, rank=rank, world=world), load_method(cfg, cure.HOOKS)
    plan = cure.cut_minibatches(cfg, rows, world)
    cure.score(run, cfg, plan, ("old_logp", "entropy", "statistic"), statistic=method.position_statistic)
    for i, r in enumerate(rows):                        # of hard and of easy prompts; two base responses and a branch of each
        r.correct = r.reward > 0 or i % 8 == 1
        r.parent, r.t_star = (i % 4 - 2, 1) if variant == "tree_po" and i % 4 > 1 else (-1, None)
    set_pass_rates(rows)
    cure.set_advantages(method, rows)
    rng = np.random.default_rng(0)
    for r in rows:                                      # as after an optimizer step: ratios apart from 1, some clipped
        r.ref_logp = r.old_logp + rng.normal(0, 0.5, len(r.old_logp)).astype(np.float32)
        r.old_logp = r.old_logp + rng.normal(0, 0.3, len(r.old_logp)).astype(np.float32)
    out = []
    for k, mini in enumerate(plan):
        out.append(gradients(policy, mini.here(rank), loss_of(policy, cfg, mini, k=k, rank=rank, world=world)))
    return out, [[len(mb) for mb in mini.cut] for mini in plan], [r.old_logp for r in rows]


def rank_job(rank, world, device, source, out):
    """One rank's side of all tests below (see conftest.ranks); what they look at is saved by rank 0."""
    found = {}
    policy, read, meta = counted(lambda: make(source))
    found["start"] = {"read": gather([read]), "meta": gather([meta]), "weights": weights(policy)}
    for variant in VARIANTS:
        steps, counts, old = steps_of(policy, rank, world, variant)
        found[variant] = {"grads": [g for g, _ in steps], "norms": gather([[n for _, n in steps]]), "counts": counts,
                          "old": [torch.from_numpy(x) for x in old]}  # fmt: skip
    # one rollout for all ranks: all but one have nothing to do
    rows = prepared(policy, ragged(1, 5, 25))
    rows[0].advantage = 1.0
    plan = cut(rows, world=world)
    found["one"] = {"grads": gradients(policy, plan[rank], token_mean(rows))[0], "busy": gather([sum(map(len, plan[rank]))])}
    # scoring with 0, 1, 2 micro-batches on ranks 0, 1, 2
    mine = ragged(rank, 100 + rank, 25)
    scored = policy.score([[r] for r in mine], 1.0)
    found["uneven"] = gather([torch.from_numpy(logp) for logp, _ in scored])
    # a gradient that is not finite on the last rank alone
    rows = prepared(policy, ragged(8, 5, 25, per_group=4))
    loss_fn, before = token_mean(rows), weights(policy)
    plan = cut(rows, world=world)[rank]

    def broken(r, logp, entropy):
        return loss_fn(r, logp, entropy) * (float("nan") if rank == world - 1 else 1.0)

    # the loss is so on one rank, which reaches all shards; or the gradient is so in one rank's shard, which the others never see
    for where, fn in (("loss", broken), ("shard", loss_fn)):
        if where == "shard":
            for p in policy.model.parameters():
                p.grad = torch.zeros_like(p)
            next(policy.model.parameters()).grad.to_local().fill_(float("nan") if rank == world - 1 else 0.0)
        norm, taken = policy.update(plan, fn, 1.0, 1e-3, 1.0)
        found[f"nan in a {where}"] = {"taken": gather([taken]), "finite": gather([bool(np.isfinite(norm))]),
                                      "same": gather([same(before, weights(policy))]), "adam": gather([policy.adam_step])}
    # and a good one after it, from which the same weights follow as on one rank
    norm, taken = policy.update(plan, loss_fn, 1.0, 1e-3, 1.0)
    found["after"] = {"taken": gather([taken]), "weights": weights(policy)}
    mesh = next(make(source, replicate=world).model.parameters()).device_mesh
    found["limits"] = [group._get_backend(device).options._timeout.total_seconds() for group in mesh.get_all_groups()]
    from transformers import AutoTokenizer
    policy.save_hf(f"{out}/hf{world}", AutoTokenizer.from_pretrained(source))
    if rank == 0:
        torch.save(found, f"{out}/policy{world}.pt")


@pytest.fixture(scope="module")
def alone(sharp, cpu):
    """What one process finds: gradients and old log-probs of every variant."""
    policy = make(sharp)
    return {v: steps_of(policy, 0, 1, v) for v in VARIANTS}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("world", WORLDS)
def test_gradient_is_rank_invariant_on_ragged_lengths_and_uneven_groups(ranks, alone, world, variant):
    steps, _, old = alone[variant]
    found = ranks[world]["policy"][variant]
    assert len(found["grads"]) == len(steps) == (1 if variant == "opefo" else 3)
    gap = largest(worst(g, exact) for g, (exact, _) in zip(found["grads"], steps, strict=True))
    print(f"{world} ranks against 1, {variant}: {gap:.1e}")
    assert gap <= 1e-5
    for norms in found["norms"]:
        assert norms == found["norms"][0] and norms == pytest.approx([n for _, n in steps], rel=1e-6)
    assert all(len(set(mini)) == 1 for mini in found["counts"])           # equally many forwards on every rank
    assert largest((a - b).abs().max() for a, b in zip(found["old"], map(torch.from_numpy, old), strict=True)) <= 1e-5


@pytest.mark.parametrize("world", WORLDS)
def test_ranks_read_every_weight_once_together_and_what_they_have_is_the_file(ranks, sharp, world):
    start, model = ranks[world]["policy"]["start"], plain_model(sharp)
    assert same(start["weights"], dict(model.named_parameters())) and all(start["meta"])
    print(f"{world} ranks read {start['read']} numbers of {model.num_parameters()}")
    assert sum(start["read"]) == model.num_parameters() and max(start["read"]) < 1.1 * min(start["read"])


@pytest.mark.parametrize("world", WORLDS)
def test_a_rank_with_nothing_to_do_joins_in_and_changes_nothing(ranks, fresh, world):
    rows = prepared(fresh, ragged(1, 5, 25))
    rows[0].advantage = 1.0
    exact, _ = gradients(fresh, [rows], token_mean(rows))
    assert sorted(ranks[world]["policy"]["one"]["busy"]) == [0] * (world - 1) + [1]
    assert worst(ranks[world]["policy"]["one"]["grads"], exact) <= 1e-5


@pytest.mark.parametrize("world", WORLDS)
def test_ranks_may_bring_different_numbers_of_micro_batches_to_a_scoring_pass(ranks, fresh, world):
    rows = [r for rank in range(world) for r in ragged(rank, 100 + rank, 25)]
    exact = [s[0] for s in fresh.score([[r] for r in rows], 1.0)]
    assert len(exact) == len(ranks[world]["policy"]["uneven"])
    assert all(np.abs(a.numpy() - b).max() <= 1e-5 for a, b in zip(ranks[world]["policy"]["uneven"], exact, strict=True))


@pytest.mark.parametrize("where", ["loss", "shard"])
@pytest.mark.parametrize("world", WORLDS)
def test_nan_gradient_on_one_rank_makes_every_rank_skip_the_step_bit_for_bit(ranks, world, where):
    found = ranks[world]["policy"][f"nan in a {where}"]
    print(f"{world} ranks, NaN in the {where} of one: {found}")
    assert found == {"taken": [False] * world, "finite": [False] * world, "same": [True] * world, "adam": [0] * world}


@pytest.mark.parametrize("world", WORLDS)
def test_the_step_after_a_skipped_one_is_taken_and_equals_one_process(ranks, fresh, world):
    rows = prepared(fresh, ragged(8, 5, 25, per_group=4))
    fresh.update(cut(rows)[0], token_mean(rows), 1.0, 1e-3, 1.0)
    assert ranks[world]["policy"]["after"]["taken"] == [True] * world
    for n, w in weights(fresh).items():                 # Adam's first step turns rounding into up to 2 lr where g ~ 0
        gap = (ranks[world]["policy"]["after"]["weights"][n] - w).abs()
        assert gap.max() <= 2.1e-3 and (gap > 1e-5).double().mean() <= 1e-3, n


@pytest.mark.parametrize("world", WORLDS)
def test_the_groups_of_several_copies_wait_as_long_as_the_process_group(ranks, world):
    assert ranks[world]["policy"]["limits"] == [7200.0, 7200.0]


@pytest.mark.parametrize("world", WORLDS)
def test_a_folder_saved_by_several_ranks_is_whole(ranks, world):
    saved = plain_model(ranks[world]["out"] / f"hf{world}")
    assert same(dict(saved.named_parameters()), ranks[world]["policy"]["after"]["weights"])


# ----------------------------------------------------------------------------------------------------------- GPU memory, by sums
GIB = 2**30


def hf_config(size):
    from transformers import Qwen2Config
    shapes = {"7b": (152064, 3584, 18944, 28, 4, False), "1.5b": (151936, 1536, 8960, 12, 2, True)}
    V, D, inner, heads, kv, tied = shapes[size]
    return Qwen2Config(vocab_size=V, hidden_size=D, intermediate_size=inner, num_hidden_layers=28, num_attention_heads=heads,
                       num_key_value_heads=kv, tie_word_embeddings=tied)


H100 = GPUS["h100"]._replace(memory=79.6)


@pytest.mark.parametrize("size, world, keeps", [("7b", 8, 10.6), ("1.5b", 1, 17.3), ("1.5b", 8, 2.2)])
def test_engine_share_leaves_room_for_what_the_trainer_keeps(size, world, keeps):
    cfg = config(micro_batch_tokens=16384, max_prompt_tokens=1500, max_response_tokens=2596)
    share, report = engine_share(cfg, hf_config(size), world, H100)
    assert f"trainer keeps {keeps}" in report                   # 12 bytes x 7.6e9 / 8 = 10.6 GiB
    assert 0.5 < share and share * 79.6 + keeps + 3 < 79.6


def test_a_model_that_cannot_fit_and_a_share_that_is_too_large_are_refused_by_name():
    cfg = config(micro_batch_tokens=16384, max_prompt_tokens=1500, max_response_tokens=2596)
    with pytest.raises(ValueError, match="^model: does not fit"):
        engine_share(cfg, hf_config("7b"), 1, H100)
    cfg.gpu_memory_utilization = 0.9
    with pytest.raises(ValueError, match=r"^gpu_memory_utilization: 0.90 is too much, set at most 0.7"):
        engine_share(cfg, hf_config("7b"), 8, H100)


@pytest.mark.parametrize("mode", ["clip_cov", "kl_cov"])
def test_the_chosen_tokens_get_the_gradient_of_clip_cov_and_kl_cov(mode):
    """The loss of a minibatch in two micro-batches, against d loss / d logp written down: chosen or clipped tokens 0 (eq. 12); or
    - A r, and coef sign(logp - old) more on the chosen (eq. 14)."""
    rng, rows = np.random.default_rng(0), []
    for i in range(4):
        rows.append(Rollout([1, 2], [], list(range(5 + i)), old_logp=-rng.random(5 + i).astype(np.float32)))
        rows[i].advantage = [1.5, -0.5, -0.5, -0.5][i]
    old, a = np.concatenate([r.old_logp for r in rows]), np.repeat([r.advantage for r in rows], [5, 6, 7, 8])
    args = {"clip_cov": {"cov_low": -9.0}, "kl_cov": {"coef": 0.1}}[mode] | {"cov_share": 0.2}
    loss_fn = loss_of(None, Config(method=[mode], method_args=args), cure.Minibatch(rows, [[[0, 1], [2, 3]]]))
    picked = np.concatenate([r.survey["cov_share"] for r in rows]) > 0
    assert picked.sum() == 5                                        # int(0.2 x 26)
    new = old + rng.normal(0, 0.3, 26).astype(np.float32)
    logp = torch.tensor(new, requires_grad=True)
    for mb, part in ((rows[:2], logp[:11]), (rows[2:], logp[11:])):
        loss_fn(mb, part, torch.zeros(len(part))).backward()
    r = np.exp(new - old)
    cut = ((a > 0) & (r > 1.28)) | ((a < 0) & (r < 0.8))
    assert cut.any()
    expected = -a * r + 0.1 * np.sign(new - old) * picked if mode == "kl_cov" else np.where(picked | cut, 0, -a * r)
    assert np.abs(expected / 26 - logp.grad.numpy()).max() < 1e-6
