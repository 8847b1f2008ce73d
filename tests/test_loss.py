"""loss.py: the fixtures of the papers' formulas, and the chunked head against float64."""
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import largest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import loss
from loss import (
    group_advantages,
    importance_weights,
    logp_and_entropy,
    mismatch,
    n_kept,
    policy_loss,
    token_mask,
    token_weights,
)
from methods import clip_cov, kl_cov
from methods.clip_cov import n_chosen, token_covariance
from rollout import Rollout

T, V, D = 197, 1009, 64


def surveyed(chosen):
    """Rows of one token, with what a survey of the minibatch found."""
    return [Rollout([1], [], [2], survey={"cov": np.float32([3]), "cov_share": np.array([chosen])})]


def gen(seed):
    return torch.Generator().manual_seed(seed)


def head_inputs(scale=1.0, seed=0):
    """Hidden states, a head and tokens; scale 1 gives logits of standard deviation 3, like a trained model's."""
    hidden = torch.randn(T, D, generator=gen(seed))
    weight = torch.randn(V, D, generator=gen(seed + 1)) * (3 * scale / D**0.5)
    return hidden, weight, torch.randint(V, (T,), generator=gen(seed + 2))


def head64(hidden, weight, tokens, temperature=1.0):
    """The same numbers the plain way: all logits at once, in float64."""
    logq = (hidden.double() @ weight.double().t() / temperature).log_softmax(-1)
    return logq.gather(-1, tokens[:, None])[:, 0], -(logq.exp() * logq).sum(-1)


def head_gradients(fn, hidden, weight, tokens, g_logp, g_entropy, **kwargs):
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logp, entropy = fn(h, w, tokens, **kwargs)
    total = 0
    if g_logp is not None:
        total = total + (logp * g_logp.to(logp.dtype)).sum()
    if g_entropy is not None:
        total = total + (entropy * g_entropy.to(logp.dtype)).sum()
    return torch.autograd.grad(total, (h, w))


def relative(a, b):
    """‖a - b‖ / ‖b‖."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# ---------------------------------------------------------------------------------------------------------------- the head
@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.0])
def test_logp_and_entropy_agree_with_float64(scale, temperature):
    hidden, weight, tokens = head_inputs(scale)
    logp, entropy = logp_and_entropy(hidden, weight, tokens, temperature, chunk=64)
    logp64, entropy64 = head64(hidden, weight, tokens, temperature)
    gaps = (logp - logp64).abs().max().item(), (entropy - entropy64).abs().max().item()
    print(f"scale {scale} T {temperature}: logp off by {gaps[0]:.1e}, entropy by {gaps[1]:.1e}")
    assert logp.dtype == entropy.dtype == torch.float32
    assert largest(gaps) <= 2e-5


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("through", ["logp", "entropy", "both"])
def test_gradients_agree_with_float64(through, temperature):
    hidden, weight, tokens = head_inputs()
    g_logp = torch.randn(T, generator=gen(5)) if through != "entropy" else None
    g_entropy = torch.randn(T, generator=gen(6)) if through != "logp" else None
    ours = head_gradients(logp_and_entropy, hidden, weight, tokens, g_logp, g_entropy, temperature=temperature, chunk=50)
    exact = head_gradients(head64, hidden.double(), weight.double(), tokens, g_logp, g_entropy, temperature=temperature)
    gaps = [relative(a, b) for a, b in zip(ours, exact, strict=True)]
    print(f"gradient through {through}, T {temperature}: hidden {gaps[0]:.1e}, weight {gaps[1]:.1e}")
    assert largest(gaps) <= 2e-6


@pytest.mark.parametrize("chunk", [1, 7, 196, 197, 198, 1024])
def test_chunk_size_changes_nothing_but_rounding(chunk):
    hidden, weight, tokens = head_inputs()
    g = torch.randn(T, generator=gen(5))
    whole, cut = (logp_and_entropy(hidden, weight, tokens, 1.0, c) for c in (T, chunk))
    for a, b in zip(cut, whole, strict=True):
        assert (a - b).abs().max() <= 1e-5
    whole, cut = (head_gradients(logp_and_entropy, hidden, weight, tokens, g, g, chunk=c) for c in (T, chunk))
    assert largest(relative(a, b) for a, b in zip(cut, whole, strict=True)) <= 2e-6


def test_no_tensor_of_tokens_times_vocabulary_ever_exists():
    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else [out]:
                if isinstance(x, torch.Tensor):
                    self.size = max(self.size, x.numel())
            return out

    hidden, weight, tokens = head_inputs()
    with Largest() as seen:
        head_gradients(logp_and_entropy, hidden, weight, tokens, torch.ones(T), torch.ones(T), chunk=16)
    assert seen.size <= max(16 * V, V * D, T * D) < T * V


def test_uniform_logits_have_entropy_ln_v():
    hidden, weight, tokens = torch.zeros(T, D), head_inputs()[1], head_inputs()[2]
    logp, entropy = logp_and_entropy(hidden, weight, tokens)
    gaps = (entropy - math.log(V)).abs().max().item(), (logp + math.log(V)).abs().max().item()
    print(f"uniform over {V}: entropy off from ln V by {gaps[0]:.1e}, logp by {gaps[1]:.1e}")
    assert largest(gaps) <= 2e-6


def test_one_hot_distribution_has_entropy_zero():
    hidden = torch.ones(1, 1, requires_grad=True)
    weight = torch.zeros(V, 1).index_fill_(0, torch.tensor([3]), 1e4).requires_grad_()
    logp, entropy = logp_and_entropy(hidden, weight, torch.tensor([3]))
    print(f"one-hot: logp {logp.item()}, entropy {entropy.item()}")
    assert (logp.item(), entropy.item()) == (0, 0)
    (logp.sum() + entropy.sum()).backward()
    assert hidden.grad.norm() == 0 and weight.grad.norm() == 0


def test_minus_infinity_logit_counts_for_nothing():
    weight = torch.randn(9, 1, generator=gen(0))
    weight[4] = -torch.inf
    tokens = torch.tensor([0, 8])
    logp, entropy = logp_and_entropy(torch.ones(2, 1), weight, tokens)
    rest = torch.cat([weight[:4], weight[5:]])
    logp64, entropy64 = head64(torch.ones(2, 1), rest, torch.tensor([0, 7]))
    gaps = (logp - logp64).abs().max().item(), (entropy - entropy64).abs().max().item()
    print(f"beside a -inf logit: logp off by {gaps[0]:.1e}, entropy by {gaps[1]:.1e}")
    assert largest(gaps) <= 1e-6
    assert logp_and_entropy(torch.ones(1, 1), weight, torch.tensor([4]))[0].item() == -torch.inf


def test_gradient_is_finite_beside_a_minus_infinity_logit():
    weight = torch.randn(9, 1, generator=gen(0))
    rest = torch.cat([weight[:4], weight[5:]])
    weight[4] = -3e38                                   # times 2 it overflows to -inf, while the weight itself is finite
    hidden, tokens, g = torch.full((2, 1), 2.0), torch.tensor([0, 8]), torch.tensor([1.0, -0.5])
    ours = head_gradients(logp_and_entropy, hidden, weight, tokens, g, g)
    exact = head_gradients(head64, hidden.double(), rest.double(), torch.tensor([0, 7]), g, g)
    assert relative(ours[0], exact[0]) <= 2e-6 and ours[1][4] == 0
    assert relative(torch.cat([ours[1][:4], ours[1][5:]]), exact[1]) <= 2e-6


def test_nan_in_the_hidden_states_stays_nan_in_its_row_alone():
    hidden, weight, tokens = head_inputs()
    hidden[5] = torch.nan
    for x in logp_and_entropy(hidden, weight, tokens, chunk=4):
        assert x.isnan().nonzero().tolist() == [[5]]


def test_bf16_inputs_give_fp32_numbers_exact_to_fp32():
    hidden, weight, tokens = head_inputs(2)
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    logp, entropy = logp_and_entropy(hidden, weight, tokens)
    logp64, entropy64 = head64(hidden, weight, tokens)
    assert logp.dtype == entropy.dtype == torch.float32
    gap = largest((logp - logp64).abs().max().item(), (entropy - entropy64).abs().max().item())
    rounded = (hidden @ weight.t()).float().log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    print(f"bf16 inputs: fp32 logits off by {gap:.1e}, bf16 logits would be by {(rounded - logp64).abs().max():.1e}")
    assert gap <= 2e-5 < 1e-2 < (rounded - logp64).abs().max()


def test_bf16_gradients_come_back_in_bf16_and_close():
    hidden, weight, tokens = head_inputs()
    hidden, weight, g = hidden.bfloat16(), weight.bfloat16(), torch.randn(T, generator=gen(5))
    ours = head_gradients(logp_and_entropy, hidden, weight, tokens, g, None, chunk=64)
    exact = head_gradients(head64, hidden.double(), weight.double(), tokens, g, None)
    assert all(x.dtype == torch.bfloat16 for x in ours)
    assert largest(relative(a, b) for a, b in zip(ours, exact, strict=True)) <= 1e-2


def test_temperature_divides_the_logits():
    hidden, weight, tokens = head_inputs()
    for a, b in zip(logp_and_entropy(hidden, weight, tokens, 0.5), logp_and_entropy(hidden * 2, weight, tokens), strict=True):
        assert (a - b).abs().max() <= 1e-5
    _, cold = logp_and_entropy(hidden, weight, tokens, 0.5)
    _, hot = logp_and_entropy(hidden, weight, tokens, 2.0)
    assert (cold < hot).all()


@pytest.mark.parametrize("temperature", [0, -1.0])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match="temperature"):
        logp_and_entropy(*head_inputs(), temperature)


def test_entropy_is_of_the_distribution_not_minus_the_sampled_logp():
    hidden, weight, tokens = head_inputs()
    other = (tokens + 1) % V
    (logp, entropy), (logp2, entropy2) = (logp_and_entropy(hidden, weight, t) for t in (tokens, other))
    assert torch.equal(entropy, entropy2)               # whatever was sampled
    assert (logp - logp2).abs().min() > 0
    assert (entropy.mean() + logp.mean()).abs() > 1


def test_no_tokens_give_no_numbers_and_a_zero_gradient():
    hidden, weight = torch.zeros(0, D), head_inputs()[1]
    logp, entropy = logp_and_entropy(hidden, weight, torch.zeros(0, dtype=torch.long))
    assert logp.shape == entropy.shape == (0,)
    ours = head_gradients(logp_and_entropy, hidden, weight, torch.zeros(0, dtype=torch.long), torch.zeros(0), torch.zeros(0))
    assert ours[0].shape == (0, D) and not ours[1].any()


# --------------------------------------------------------------------------------------------------------------- advantages
@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([1, -1, -1, -1], [1.5, -0.5, -0.5, -0.5]),
        ([1] * 8 + [-1] * 8, [0.9682] * 8 + [-0.9682] * 8),
        ([1] + [-1] * 15, [3.75] + [-0.25] * 15),
        ([0.3], [0]),
        ([-1.7] * 5, [0] * 5),
    ],
)
def test_advantage_fixtures(scores, expected):
    a = group_advantages(torch.tensor(scores, dtype=torch.float32), torch.full((len(scores),), 7))
    print(f"{scores[:2]}…, n {len(scores)} -> {a[0].item():.4f}, {a[-1].item():.4f}")
    assert a.dtype == torch.float32 and a.tolist() == pytest.approx(expected, abs=5e-5)


def test_a_group_of_one_has_advantage_zero_among_others():
    a = group_advantages(torch.tensor([1.0, -1.0, 5.0]), torch.tensor([2, 2, 9]))
    assert a[2] == 0 and a[0] == -a[1] != 0


@given(st.lists(st.tuples(st.integers(-3, 3), st.floats(-3, 3, width=32)), min_size=1, max_size=40), st.randoms())
@settings(deadline=None)
def test_advantages_sum_to_zero_in_each_group_in_any_order(rows, rng):
    def advantages(rows):
        return group_advantages(torch.tensor([s for _, s in rows]), torch.tensor([g for g, _ in rows]))

    a = advantages(rows)
    for g in {g for g, _ in rows}:
        mine = torch.tensor([i for i, (h, _) in enumerate(rows) if h == g])
        scores = torch.tensor([rows[i][1] for i in mine.tolist()], dtype=torch.float64)
        assert abs(a[mine].sum().item()) <= 1e-4
        std = scores.std().item() if len(scores) > 1 else 0.0
        assert torch.allclose(a[mine].double(), (scores - scores.mean()) / (std + 1e-6), atol=1e-5)
    order = list(range(len(rows)))
    rng.shuffle(order)
    assert torch.allclose(advantages([rows[i] for i in order]), a[order], atol=1e-6)


# -------------------------------------------------------------------------------------------------------------- policy loss
@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [(1, 1, -1), (1.5, 1, -1.28), (0.5, 1, -0.5), (1.5, -1, 1.5), (0.5, -1, 0.8), (20, -1, 10), (20, 1, -1.28)],
)
def test_policy_loss_fixtures(ratio, advantage, expected):
    out, _ = policy_loss(torch.tensor([math.log(ratio) - 2]), torch.tensor([-2.0]), torch.tensor([float(advantage)]))
    print(f"({ratio}, {advantage} -> {out.item():.6g})")
    assert out.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("ratio", "advantage", "slope", "flag"),
    [  # slope: d loss / d logp, whose descent direction is -slope
        (1.0, 1, -1.0, None), (1.2, 1, -1.2, None), (0.5, 1, -0.5, None), (1.5, 1, 0, "pg_clipfrac_high"),
        (1.0, -1, 1.0, None), (1.5, -1, 1.5, None), (0.9, -1, 0.9, None), (0.5, -1, 0, "pg_clipfrac"),
        (20, -1, 0, "pg_clipfrac_lower"), (20, 1, 0, "pg_clipfrac_high"), (1.0, 0, 0, None), (20, 0, 0, None),
    ],
)  # fmt: skip
def test_gradient_pushes_the_right_way_and_stops_where_clipped(ratio, advantage, slope, flag):
    logp = torch.tensor([math.log(ratio)], requires_grad=True)
    out, flags = policy_loss(logp, torch.zeros(1), torch.tensor([float(advantage)]))
    out.sum().backward()
    assert logp.grad.item() == pytest.approx(slope, abs=1e-6)
    both = {"pg_clipfrac_high": ["pg_clipfrac", "pg_clipfrac_high"]}
    assert [k for k, v in flags.items() if v.item()] == both.get(flag, [flag] if flag else [])
    assert set(flags) == {"pg_clipfrac", "pg_clipfrac_high", "pg_clipfrac_lower"}


def test_ratio_one_gives_the_policy_gradient_exactly():
    advantage = torch.randn(50, generator=gen(0))
    old = torch.randn(50, generator=gen(1))
    logp = old.clone().requires_grad_()
    out, flags = policy_loss(logp, old, advantage)
    out.sum().backward()
    assert torch.equal(out, -advantage) and torch.equal(logp.grad, -advantage)
    assert not any(f.any() for f in flags.values())


@given(st.floats(-3, 3), st.floats(-4, 4), st.floats(0.05, 0.5), st.floats(0.05, 0.5), st.floats(1.5, 12))
@settings(deadline=None)
def test_policy_loss_agrees_with_the_formula_in_floats(log_ratio, advantage, low, high, dual):
    out, flags = policy_loss(
        torch.tensor([log_ratio], dtype=torch.float64), torch.zeros(1), torch.tensor([advantage], dtype=torch.float64),
        clip_low=low, clip_high=high, clip_dual=dual,
    )  # fmt: skip
    r = math.exp(log_ratio)
    expected = max(-advantage * r, -advantage * min(max(r, 1 - low), 1 + high))
    if advantage < 0:
        expected = min(expected, -advantage * dual)
    assert out.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    clipped, high, lower = (flags[k].item() for k in ("pg_clipfrac", "pg_clipfrac_high", "pg_clipfrac_lower"))
    assert not (clipped and lower) and high == (clipped and advantage > 0)


@pytest.mark.parametrize(
    ("gap", "advantage", "expected"), [(100, 1, -1.28), (100, -1, 10), (-100, 1, -2.0612e-9), (-100, -1, 0.8)]
)
def test_extreme_log_ratios_stay_finite(gap, advantage, expected):
    logp = torch.tensor([gap / 2.0], requires_grad=True)
    out, _ = policy_loss(logp, torch.tensor([-gap / 2.0]), torch.tensor([float(advantage)]))
    out.sum().backward()
    assert out.item() == pytest.approx(expected, rel=1e-3) and logp.grad.isfinite().all()


def test_dual_clip_is_felt_only_where_it_says_so():
    logp, zero = torch.linspace(-2, 3, 200), torch.zeros(200)
    for sign in (1.0, -1.0):
        with_dual, flags = policy_loss(logp, zero, zero + sign)
        without, _ = policy_loss(logp, zero, zero + sign, clip_dual=math.inf)
        changed = with_dual != without
        assert torch.equal(changed, flags["pg_clipfrac_lower"]) and changed.any() == (sign < 0)


# -------------------------------------------------------------------------------------------------------------- aggregation
def aggregate(per_token, cut, agg):
    """The minibatch loss as it is summed up in training: micro-batch after micro-batch."""
    lengths = [len(x) for x in per_token]
    total = 0.0
    for mb in cut:
        length = torch.tensor([lengths[i] for i in mb], dtype=torch.long)
        weights = token_weights(length, length, agg, sum(lengths), len(lengths))
        assert weights.dtype == torch.float32
        total += (torch.cat([per_token[i] for i in mb] or [torch.empty(0)]) * weights).sum().item()
    return total


def test_global_token_mean_is_not_a_mean_of_micro_batch_means():
    rows = [torch.full((10,), -1.0), torch.full((90,), 1.0)]
    print(f"token mean {aggregate(rows, [[0], [1]], 'token'):.7f}, micro {aggregate(rows, [[0], [1]], 'micro'):.7f}")
    assert aggregate(rows, [[0], [1]], "token") == pytest.approx(0.8, abs=1e-6)
    assert aggregate(rows, [[0, 1]], "token") == pytest.approx(0.8, abs=1e-6)
    assert aggregate(rows, [[0], [1]], "micro") == pytest.approx(0.0, abs=1e-6)
    assert aggregate(rows, [[0, 1]], "micro") == pytest.approx(0.8, abs=1e-6)     # it changes with packing
    assert aggregate(rows, [[0], [1]], "sequence") == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("agg", ["token", "sequence"])
@given(st.lists(st.integers(1, 12), min_size=1, max_size=12), st.integers(1, 4), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_loss_does_not_depend_on_how_rollouts_are_cut_into_micro_batches(agg, lengths, k, seed):
    rows = [torch.randn(n, generator=gen(seed + i)) for i, n in enumerate(lengths)]
    whole = aggregate(rows, [range(len(rows))], agg)
    cut = [[i for i in range(len(rows)) if i % k == j] for j in range(k)]         # some of them empty
    assert aggregate(rows, cut, agg) == pytest.approx(whole, abs=1e-6)
    exact = torch.cat(rows).mean() if agg == "token" else torch.stack([r.mean() for r in rows]).mean()
    assert whole == pytest.approx(exact.item(), abs=1e-6)


@pytest.mark.parametrize("agg", ["token", "sequence", "micro"])
def test_weights_of_a_constant_loss_sum_to_one_and_empty_rows_give_no_nan(agg):
    rows = [torch.ones(n) for n in (3, 1, 8, 2, 5)]
    assert aggregate(rows, [[0, 3], [], [1, 2, 4], []], agg) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("agg", ["token", "sequence", "micro"])
def test_a_row_of_which_the_mask_keeps_nothing_has_finite_weights(agg):
    w = token_weights(torch.tensor([0, 4]), torch.tensor([3, 5]), agg, 4, 2)
    assert w.shape == (8,) and w.isfinite().all()


def test_masked_means_divide_by_what_is_kept():
    counts, lengths = torch.tensor([1, 4]), torch.tensor([10, 10])
    assert token_weights(counts, lengths, "token", 5, 2).tolist() == pytest.approx([1 / 5] * 20)
    assert token_weights(counts, lengths, "sequence", 5, 2).tolist() == pytest.approx([1 / 2] * 10 + [1 / 8] * 10)
    assert token_weights(counts, lengths, "micro", 5, 4).tolist() == pytest.approx([2 / 4 / 5] * 20)


def test_micro_mean_under_a_mask_divides_by_the_kept_tokens_alone():
    w = token_weights(torch.tensor([0, 5]), torch.tensor([5, 5]), "micro", 5, 2)  # the first row keeps nothing
    assert w.tolist() == pytest.approx([1 / 5] * 10)


def test_unknown_aggregation_is_refused_by_name():
    with pytest.raises(ValueError, match="agg.*median"):
        token_weights(torch.tensor([1]), torch.tensor([1]), "median", 1, 1)


# ------------------------------------------------------------------------------------------------------------- entropy mask
def test_ten_equal_entropies_keep_exactly_two():
    keep = token_mask(torch.full((10,), 0.7), None, 0.2)
    print(f"kept {int(keep.sum())} of 10 equal entropies")
    assert keep.dtype == torch.bool and keep.nonzero()[:, 0].tolist() == [0, 1]


@given(st.integers(1, 3000), st.integers(1, 100))
@example(100, 7)                                        # 0.07 * 100 = 7.000000000000001 in floats
@example(10, 20)
def test_kept_count_is_the_exact_ceiling(n, percent):
    assert n_kept(n, percent / 100) == max(1, math.ceil(Fraction(percent, 100) * n))


def test_nothing_is_kept_of_nothing():
    assert n_kept(0, 0.2) == 0
    assert token_mask(torch.empty(0), None, 0.2).shape == (0,)


@pytest.mark.parametrize("side", ["top", "bottom"])
@given(st.lists(st.sampled_from([0.0, 0.1, 0.5, 2.0]), min_size=1, max_size=60), st.integers(1, 100))
@settings(deadline=None)
def test_mask_keeps_exactly_k_of_highest_or_lowest_entropy_and_of_equal_ones_the_first(side, h, percent):
    rho = percent / 100
    k = max(1, math.ceil(Fraction(percent, 100) * len(h)))
    order = sorted(range(len(h)), key=lambda i: (-h[i] if side == "top" else h[i], i))
    assert token_mask(torch.tensor(h), None, rho, side).nonzero()[:, 0].tolist() == sorted(order[:k])


@pytest.mark.parametrize("side", ["top", "bottom", "random"])
def test_rho_one_keeps_all(side):
    assert token_mask(torch.rand(37, generator=gen(0)), None, 1.0, side, gen(1)).all()


def test_random_mask_is_its_generators_and_blind_to_entropy():
    h, before = torch.rand(200, generator=gen(0)), torch.get_rng_state()
    a, b, c = (token_mask(x, None, 0.25, "random", gen(s)) for x, s in ((h, 1), (-h, 1), (h, 2)))
    assert a.sum() == b.sum() == c.sum() == 50
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), before)
    share = sum(token_mask(h, None, 0.25, "random", gen(s)).double() for s in range(400)) / 400
    assert (share - 0.25).abs().max() < 0.12             # 5 standard deviations: no position is preferred


def test_unknown_side_is_refused_by_name():
    with pytest.raises(ValueError, match="entropy_mask_side.*left"):
        token_mask(torch.rand(3), None, 0.5, "left")


def test_norm_all_is_the_share_kept_of_norm_kept():
    h = torch.rand(40, generator=gen(0))
    keep, lengths = token_mask(h, None, 0.2), torch.tensor([15, 25])
    counts = torch.tensor([keep[:15].sum(), keep[15:].sum()])
    values = torch.randn(40, generator=gen(1))
    kept = (values * keep * token_weights(counts, lengths, "token", 8, 2)).sum()
    of_all = (values * keep * token_weights(lengths, lengths, "token", 40, 2)).sum()
    assert of_all.item() == pytest.approx(8 / 40 * kept.item(), rel=1e-5)
    assert kept.item() == pytest.approx(values[keep].mean().item(), rel=1e-5)


# ------------------------------------------------------------------------------------------------------ Clip-Cov and KL-Cov
def test_covariance_fixture():
    logp, advantage = torch.tensor([-1.0, -2.0, -3.0, -6.0]), torch.tensor([2.0, 0.0, -1.0, -1.0])
    cov = token_covariance(logp, advantage)             # means -3 and 0
    assert cov.dtype == torch.float32 and cov.tolist() == [4, 0, 0, 3] and cov.mean() == 7 / 4


@given(st.lists(st.tuples(st.floats(-30, 0, width=32), st.floats(-4, 4, width=32)), min_size=1, max_size=50))
@settings(deadline=None)
def test_covariance_agrees_with_the_formula_and_its_mean_with_the_covariance(rows):
    logp, advantage = ([r[i] for r in rows] for i in (0, 1))
    n, a, b = len(rows), math.fsum(logp) / len(rows), math.fsum(advantage) / len(rows)
    expected = [(x - a) * (y - b) for x, y in rows]
    cov = token_covariance(torch.tensor(logp, requires_grad=True), torch.tensor(advantage))
    assert cov.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5) and not cov.requires_grad
    assert cov.double().mean().item() == pytest.approx(math.fsum(x * y for x, y in rows) / n - a * b, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (4999, 1), (5000, 1), (9999, 1), (10_000, 2), (500_000, 100)])
def test_two_in_ten_thousand_are_chosen_and_at_least_one(n, k):
    assert n_chosen(n, 2e-4) == k


COV = st.lists(st.tuples(st.sampled_from([-1.0, 0.0, 0.5, 1.0, 1.5, 2.0, 5.0, 7.0]), st.booleans()), min_size=1, max_size=60)


@given(COV, st.sampled_from([2e-4, 0.1, 0.5, 1.0]), st.integers(0, 99))
@settings(deadline=None)
def test_clip_cov_chooses_so_many_of_the_eligible_and_kl_cov_the_largest(rows, share, seed):
    cov, clipped = torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows])
    k = max(1, int(share * len(rows)))
    chosen = clip_cov.choose(cov, clipped, share, 1.0, 5.0, gen(seed)).nonzero()[:, 0].tolist()
    eligible = {i for i, (c, cut) in enumerate(rows) if 1 < c < 5 and not cut}
    assert set(chosen) <= eligible and len(chosen) == min(k, len(eligible))
    order = sorted(range(len(rows)), key=lambda i: (-rows[i][0], i))
    assert kl_cov.choose(cov, share).nonzero()[:, 0].tolist() == sorted(order[:k])


def test_clip_cov_draws_uniformly_from_its_own_generator():
    cov, clipped, before = torch.full((40,), 2.0), torch.arange(40) % 4 == 0, torch.get_rng_state()
    a, b, c = (clip_cov.choose(cov, clipped, 0.25, 1, 5, gen(s)) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(torch.get_rng_state(), before)
    share = sum(clip_cov.choose(cov, clipped, 0.25, 1, 5, gen(s)).double() for s in range(600)) / 600
    assert (share[~clipped] - 1 / 3).abs().max() < 0.1 and not share[clipped].any()   # 5 standard deviations


def test_a_covariance_that_crosses_a_bound_changes_one_choice_of_clip_cov():
    cov, clipped = torch.full((500,), 2.0), torch.zeros(500, dtype=torch.bool)
    most = 0
    for i in range(50):
        moved = cov.index_fill(0, torch.tensor([10 * i]), 0.99)
        a, b = (clip_cov.choose(x, clipped, 0.2, 1, 5, gen(3)) for x in (cov, moved))
        most = max(most, int((a & ~b).sum()))
        assert a.sum() == b.sum() == 100 and not b[10 * i]
    assert most == 1


@pytest.mark.parametrize(
    ("ratio", "advantage", "chosen", "expected", "slope"),
    [  # Clip-Cov: PPO's clip, no dual clip, nothing of the chosen
        (1.0, 1, False, -1, -1), (1.0, 1, True, 0, 0), (1.5, 1, False, -1.28, 0), (0.5, -1, False, 0.8, 0),
        (20, -1, False, 20, 20), (20, -1, True, 0, 0),
    ],
)  # fmt: skip
def test_clip_cov_loss_fixtures(ratio, advantage, chosen, expected, slope):
    logp = torch.tensor([math.log(ratio)], requires_grad=True)
    out, flags = clip_cov.policy_loss(logp, torch.zeros(1), torch.tensor([float(advantage)]), None, surveyed(chosen), 0.2, 0.28)
    out.sum().backward()
    assert out.item() == pytest.approx(expected, rel=1e-6) and logp.grad.item() == pytest.approx(slope, rel=1e-6)
    assert not flags["pg_clipfrac_lower"].any()


@pytest.mark.parametrize(
    ("ratio", "advantage", "chosen", "expected", "slope"),
    [  # KL-Cov: no clip; the chosen pay c |log r|, whose slope is c, -c, and 0 at r = 1
        (1.5, 1, False, -1.5, -1.5), (20, -1, False, 20, 20), (0.5, -1, False, 0.5, 0.5), (2.0, 0, False, 0, 0),
        (1.5, 1, True, -1.5 + 0.1 * math.log(1.5), -1.4), (0.5, -1, True, 0.5 + 0.1 * math.log(2), 0.4), (1.0, 1, True, -1, -1),
    ],
)  # fmt: skip
def test_kl_cov_loss_fixtures(ratio, advantage, chosen, expected, slope):
    logp = torch.tensor([math.log(ratio)], requires_grad=True)
    out, flags = kl_cov.policy_loss(logp, torch.zeros(1), torch.tensor([float(advantage)]), None, surveyed(chosen), 0.2, 0.28)
    out.sum().backward()
    assert out.item() == pytest.approx(expected, rel=1e-5) and logp.grad.item() == pytest.approx(slope, rel=1e-5, abs=1e-7)
    assert not any(flags[k].any() for k in ("pg_clipfrac", "pg_clipfrac_high", "pg_clipfrac_lower"))
    assert flags["cov"].item() == 3 and flags["cov_share"].item() == chosen


# ------------------------------------------------------------------------------------------------------- trainer vs engine
def test_a_truncated_importance_weight_is_the_ratio_up_to_the_cap_and_detached():
    old = torch.tensor([-1.0, -1.0, -1.0, 50.0, -80.0], requires_grad=True)
    engine = torch.tensor([-1.0, -1.5, -3.0, -50.0, 0.0])
    w = importance_weights(old, engine, torch.ones(5, dtype=torch.long), "token_truncate", 0.0, 2.0)
    assert w.tolist() == pytest.approx([1, math.exp(0.5), 2, 2, math.exp(-20)]) and not w.requires_grad


@given(st.lists(st.tuples(st.floats(-30, 0, width=32), st.floats(-30, 0, width=32)), min_size=1, max_size=20))
@settings(deadline=None)
def test_k3_is_never_negative(pairs):
    a, b = (torch.tensor([p[i] for p in pairs]) for i in (0, 1))
    m = mismatch(a, b)
    assert m["k3"] >= 0 and 0 <= m["mean_abs"] <= m["max_abs"] * (1 + 1e-12)


def test_mismatch_of_equal_logps_is_zero_and_of_known_ones_known():
    a = torch.tensor([-1.0, -2.0])
    assert mismatch(a, a) == {"mean_abs": 0, "max_abs": 0, "k3": 0}
    m = mismatch(a, a - torch.tensor([0.0, math.log(2)]))
    assert m == pytest.approx({"mean_abs": math.log(2) / 2, "max_abs": math.log(2), "k3": (1 - math.log(2)) / 2}, rel=1e-6)


def test_k3_is_the_kl_from_engine_to_trainer():
    engine, trainer = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])
    drawn = torch.tensor([0, 0, 1, 2])                   # the engine's samples, in its own proportions
    kl = (engine * (engine / trainer).log()).sum().item()
    assert mismatch(trainer[drawn].log(), engine[drawn].log())["k3"] == pytest.approx(kl, rel=1e-6)


def test_loss_py_imports_nothing_of_ours():
    import ast

    names = {
        (n.module if isinstance(n, ast.ImportFrom) else n.names[0].name).split(".")[0]
        for n in ast.walk(ast.parse(open(loss.__file__).read()))
        if isinstance(n, ast.Import | ast.ImportFrom)
    }
    assert names == {"math", "torch"}
