"""methods/: values of the authors' code, brute force in float64, limits in which methods agree, and whole steps of each.

ORACLE are values of the authors' own functions (TRL f2cd577, verl b178a3c, HTPO cfbbea7, Lp-Reg-dev 33b27e2, TreePO
f055523, Passk_Training c3ba575, maxrl c0698eb; HolderPO 1d27a37 typed off) on the three sequences of ROWS."""
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import first_line, largest, lines, train_lines

import cure
from lib.config import Config
from lib.method import for_step, load_method
from lib.policy import Policy
from loss import group_advantages, importance_weights, policy_loss
from methods import (
    adaptive_entropy,
    cispo,
    dr_grpo,
    eapo,
    entropy_shaped,
    gspo,
    holder_po,
    htpo,
    kl,
    lp_reg,
    maxrl,
    opefo,
    pass_k,
    prefix_sampling,
    rloo,
    spo_mask,
    tree_po,
    wrong_parents,
)
from rollout import Rollout, valid_positions
from tools import methods as smoke

LENGTHS, A, RIGHT = [3, 5, 2], [0.8, -0.5, 1.3], [True, False, True]
LOGP = [-0.2, -1.5, -0.7, -2.0, -0.1, -0.9, -3.0, -0.4, -0.05, -1.1]
OLD = [-0.3, -1.2, -0.7, -1.0, -0.15, -1.6, -2.5, -0.4, -0.06, -2.0]
ENGINE = [-0.35, -1.2, -0.75, -2.2, -0.15, -1.5, -2.5, -0.3, -0.06, -1.9]
H = [0.5, 1.4, 0.2, 1.9, 0.3, 1.1, 2.2, 0.6, 0.1, 1.0]


def double(x):
    return torch.tensor(x, dtype=torch.float64)


def rows_of(lengths=LENGTHS, right=RIGHT, old=OLD, pass_rate=0.5, **arrays):
    """Rollouts of these lengths; arrays: (T,) numbers of all of them, as fields. Kept in float64."""
    out, at = [], 0
    for n, ok in zip(lengths, right, strict=True):
        r = Rollout([1], [], [2] * n, correct=ok, pass_rate=pass_rate)
        for name, values in ({"old_logp": old} | arrays).items():
            setattr(r, name, np.float64(values[at : at + n]))
        out.append(r)
        at += n
    return out


def call(method, rows=None, advantage=A, clip=(0.2, 0.28), **settings):
    """The loss of each token and d sum(loss) / d logp, of a method's policy_loss on the common numbers."""
    logp, entropy = double(LOGP).requires_grad_(), double(H).requires_grad_()
    adv = double(advantage).repeat_interleave(torch.tensor(LENGTHS))
    loss, _ = method.policy_loss(logp, double(OLD), adv, entropy, rows or rows_of(), *clip, **settings)
    return loss.detach(), torch.autograd.grad(loss.sum(), logp)[0]


def close(found, wanted, tol=1e-6):
    found, wanted = (torch.as_tensor(x, dtype=torch.float64) for x in (found, wanted))
    gap = largest((found - wanted).abs().flatten())
    print(f"largest difference {gap:.2g}")
    return found.shape == wanted.shape and gap <= tol


def per_row(loss, lengths=LENGTHS):
    return [part.mean().item() for part in loss.split(lengths)]


# ------------------------------------------------------------------------------------------------ the authors' own values
def test_importance_weights_are_those_of_trl_verl_and_slime():
    lengths, w = torch.tensor(LENGTHS), [1.0512710963760241, 3.320116922736548, 0.9048374180359595]
    token = [w[0], 1, w[0], w[1], 1, w[2], 1, w[2], 1, w[2]]
    product = [1.1051709180756477] * 3 + [2.718281828459045] * 5 + [w[2]] * 2

    def weights(mode, low, high):
        return importance_weights(double(OLD), double(ENGINE), lengths, mode, low, high)

    assert close(weights("token_truncate", 0, 2), [min(x, 2) for x in token])
    assert close(weights("token_truncate", 0.95, 1.2), [w[0], 1, w[0], 1.2, 1, 0.95, 1, 0.95, 1, 0.95])
    assert close(weights("token_mask", 0.5, 5), token), "IcePop keeps the weight inside its bounds"
    assert close(weights("token_mask", 0.95, 1.2), [w[0], 1, w[0], 0, 1, 0, 1, 0, 1, 0])
    assert close(weights("sequence_truncate", 0, 2), [min(x, 2) for x in product])
    assert close(weights("sequence_mask", 0, 3), product)
    assert close(weights("sequence_mask", 0.5, 2), [x if x < 2 else 0 for x in product])
    none = torch.zeros(0)
    assert importance_weights(none, none, torch.zeros(0, dtype=torch.long), "sequence_mask", 0, 2).shape == (0,)


def test_cispo_has_the_values_and_gradients_of_trl_and_verl():
    loss, grad = call(cispo, ratio_max=1.28)
    assert close(loss, [0.1768273469, 0.8889818648, 0.56, -0.3678794412, -0.0525635548, -0.576, -0.9097959896, -0.2,
                        0.0656532609, 1.8304])  # fmt: skip
    assert close(grad / 10, [-0.0884136734, -0.0592654577, -0.08, 0.0183939721, 0.0525635548, 0.064, 0.030326533, 0.05,
                             -0.1313065217, -0.1664])  # fmt: skip
    assert call(cispo)[0].mean().item() == pytest.approx(0.27722672176041663), "TRL's recommended bound, 5.0"


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_gspo_has_the_values_and_gradients_of_trl_and_verl_at_both_levels(level):
    loss, grad = call(gspo, level=level)
    assert close(per_row(loss), [-0.7484055880, 0.49985, -1.30052])
    # the sum over tokens counts a row's loss as often as it has tokens; a mean over responses divides by that
    assert close(grad / torch.tensor(LENGTHS).repeat_interleave(torch.tensor(LENGTHS)) / 3, [-0.0831561762] * 3 + [0.0] * 7)
    wide, grad = call(gspo, level=level, low=0.2, high=0.28)
    assert close(per_row(wide), [-0.7484055880, 0.4303539882, -1.664])
    assert close(grad[3:8] / 5 / 3, [0.0286902658] * 5)


@pytest.mark.parametrize(("p", "total"), [(2.0, -0.58384493), (1.0, -0.60499568), (0.5, -0.61574047), (0.0, -0.62601720),
                                          (-1.0, -0.63246534), (-2.0, -0.62872943)])  # fmt: skip
def test_holder_po_has_the_values_of_its_authors_for_every_power(p, total):
    loss, grad = call(holder_po, p=p)
    assert np.mean(per_row(loss)) == pytest.approx(total, abs=1e-7)
    if p == 2.0:
        shared = torch.tensor(LENGTHS).repeat_interleave(torch.tensor(LENGTHS))
        assert close(grad / shared / 3, [-0.1129823, -0.0507662, -0.0925021, 0.0039077, 0.0319109, 0.1170906, 0.0106222,
                                         0.0288742, 0, 0])  # fmt: skip


def test_htpo_has_the_values_of_its_authors():
    hard, grad = call(htpo, rows_of(pass_rate=0.5))
    assert close(hard, [-0.8841367345, 1.0798870461, -0.8, 0.4, 0.5256355482, 1.0068763537, -0.4, 0.5, -1.3130652172, 1.664])
    assert close(grad[:2] / 10, [-0.0884136734, 0.1079887046])
    easy, _ = call(htpo, rows_of(pass_rate=0.6))
    assert close(easy, [-0.8841367345, 0, -0.8, 0.4, 0.5256355482, 1.0068763537, -0.4, 0.5, -1.3130652172, 0])
    flip = call(htpo, rows_of(right=[False, True, False]), advantage=[-0.8, 0.5, -1.3])[0]
    assert close(flip, [0.8841367345, -0.64, 0.8, -0.1839397206, -0.5256355482, -0.64, 0.8243606354, -0.5, 1.3130652172,
                        3.1974840445])  # fmt: skip


@pytest.mark.parametrize(("share", "clip", "beta", "total"), [(0.4, (1.0, 9.0), 1.0, -0.29379167), (1.0, (1.0, 9.0), 1.0, -0.29327457),
                                                             (1.0, (0.2, 0.28), 0.1, -0.26006518)])  # fmt: skip
def test_lp_reg_has_the_values_of_its_authors(share, clip, beta, total):
    proxy = [-0.2, -1.0, -0.6, -0.9, -0.1, -math.inf, -2.2, -0.3, -0.05, -1.9]  # theirs has -1e4 for what is noise
    adv = double(A).repeat_interleave(torch.tensor(LENGTHS))
    low = lp_reg.survey_minibatch(None, double(LOGP), None, adv, None, *clip, share=share)["low"].tolist()
    rows = rows_of(statistic=proxy)
    for r, part in zip(rows, torch.tensor(low).split(LENGTHS), strict=True):
        r.survey = {"low": part.numpy()}
    loss, grad = call(lp_reg, rows, clip=clip, beta=beta)
    assert loss.mean().item() == pytest.approx(total, abs=1e-7)
    if share == 1.0 and beta == 1.0:
        assert close(grad[3:8] / 10, [-0.1820226, 0.0525636, 0.1006876, -0.0922276, 0.0394829])


def test_lp_regs_proxy_is_the_filtered_and_renormalised_distribution():
    logits = double([[2.0, 1.0, 0.0, -1.0, -3.0, -5.0]])
    logp = logits.log_softmax(-1)
    kept = [0, 1, 2, 3]                                # p >= 0.02 max p: e^-3 is, e^-5 is not
    for token in range(6):
        found = lp_reg.position_statistic(logp, None, torch.tensor([token]), kappa=0.02).item()
        want = (logp[0, token] - logp[0, kept].logsumexp(0)).item() if token in kept else -math.inf
        assert found == pytest.approx(want)
    assert (lp_reg.position_statistic(logp, None, torch.tensor([0]), kappa=0.02) - logp[0, 0]).item() == pytest.approx(0.00491374)


def test_kl_has_verls_k3_its_gradient_and_its_controller():
    rows = rows_of(ref_logp=OLD)
    plain, with_kl = call(SimpleNamespace(policy_loss=policy_loss)), call(kl, rows, coef=1.0)
    assert close(with_kl[0] - plain[0], [0.0048374180, 0.0498588076, 0, 0.7182818285, 0.0012294245, 0.1965853038, 0.1487212707, 0,
                                         0.0000498337, 0.3065696597])  # fmt: skip
    assert close((with_kl[1] - plain[1]) / 10, [0.0095162582, -0.0349858808, 0, -0.1718281828, 0.0048770576, 0.0503414696,
                                                -0.0648721271, 0, 0.000995016, 0.059343034])  # fmt: skip
    state, got = {}, []
    for current, n in ((6.0, 256), (12.0, 256), (0.0, 256), (6.6, 256), (5.9, 1024)):
        d = next(d for d in np.linspace(-3, 0, 3_000_001) if math.expm1(-d) + d <= current) if current else 0.0
        row = SimpleNamespace(old_logp=np.array([d]), ref_logp=np.zeros(1))
        got.append(kl.step_settings(state, 0, [row] * n, coef=0.2, target=6.0)["coef"])
    assert got == pytest.approx([0.2, 0.201024, 0.19999475712, 0.20050674369822719, 0.20016454552231555], rel=1e-6)


SCORES = [1.0, -1, -1, 1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, 1, -1]
PARENTS = [-1] * 4 + [p for p in range(4) for _ in range(3)]


def advantages(method, scores=SCORES, groups=None, parents=PARENTS, **settings):
    groups = torch.zeros(len(scores), dtype=torch.long) if groups is None else groups
    return method.group_advantages(double(scores), groups, torch.tensor(parents), **settings)


def test_group_advantages_have_the_values_of_their_authors():
    right = np.array(SCORES) > 0
    assert close(advantages(rloo), np.where(right, 4 / 3, -0.8))
    assert close(advantages(dr_grpo), np.where(right, 1.25, -0.75))
    assert close(advantages(maxrl), np.where(right, 5 / 3, -1.0), 1e-5)
    std = np.std(SCORES, ddof=1)
    size = [1.2, -0.6, -0.7, 1.1, 1.2, -0.8, -0.8, -0.6, -0.6, -0.6, -0.7, 1.3, -0.7, 1.1, 1.1, -0.9]
    equal = [1.125, -0.375, -0.625, 0.875, 1.125, -0.875, -0.875, -0.375, -0.375, -0.375, -0.625, 1.375, -0.625, 0.875,
             0.875, -1.125]  # fmt: skip
    assert close(advantages(tree_po) * std, size, 1e-5) and close(advantages(tree_po, equal=True) * std, equal, 1e-5)


@pytest.mark.parametrize(("n", "c", "k", "right", "wrong"), [
    (16, 8, 1, 1.0, -1.0), (16, 8, 2, 0.55167598, -0.55167598), (16, 8, 4, 0.19999896, -0.19999896), (16, 8, 8, 0.00881411, -0.00881411),
    (8, 1, 1, 2.64574331, -0.37796333), (8, 1, 2, 1.73204681, -0.24743526), (8, 1, 4, 1.0, -0.14285686), (8, 1, 8, 0, 0),
    (8, 7, 1, 0.37796333, -2.64574331), (8, 7, 2, 0, 0), (8, 4, 2, 0.52223170, -0.52223170), (8, 4, 4, 0.12038484, -0.12038484)])  # fmt: skip
def test_pass_k_has_the_values_of_its_authors(n, c, k, right, wrong):
    assert pass_k.pass_k_advantages(n, c, k) == pytest.approx((right, wrong), abs=2e-5), "they add 1e-6 to sigma"


def test_pass_k_is_the_mean_over_all_subsets():
    """Brute force: a rollout's advantage is the mean, over the subsets of k with it, of (best - mean of bests) / std."""
    import itertools
    for n, c, k in ((6, 2, 2), (6, 2, 3), (7, 3, 4), (5, 4, 1), (5, 1, 5)):
        subsets = list(itertools.combinations(range(n), k))
        best = {s: float(any(i < c for i in s)) for s in subsets}
        mean, std = np.mean(list(best.values())), np.std(list(best.values()))
        of = [np.mean([best[s] - mean for s in subsets if i in s]) / std if std else 0.0 for i in (0, n - 1)]
        assert pass_k.pass_k_advantages(n, c, k) == pytest.approx(of)


def test_spo_masks_what_was_at_least_nine_tenths_sure():
    assert spo_mask.token_mask(double(H), rows_of(), 1.0, "top", None).tolist() == [True] * 8 + [False, True]
    assert len(spo_mask.token_mask(torch.zeros(0), [], 1.0, "top", None)) == 0


def test_adaptive_entropy_follows_skyworks_trace():
    def step(state, h, **settings):
        return adaptive_entropy.step_settings(state, 0, [SimpleNamespace(entropy=np.float32([h] * 3))], **settings)["coef"]

    state = {}
    got = [step(state, h, target=0.2, anchored=False) for h in (0.3, 0.1, 0.15, 0.201, 0.05, 0.19)]
    assert got == pytest.approx([0, 1e-4, 2e-4, 0, 2e-4, 3e-4]) and state["coef"] == pytest.approx(3e-4)
    state = {}
    assert [step(state, h, delta=0.004) for h in (1.0, 0.5, 0.39, 0.3)] == pytest.approx([0, 0, 0.004, 0.005]), "0.4 of the first"


# ---------------------------------------------------------------------------------------------------- by hand, brute force
def test_entropy_shaping_by_hand():
    """Bonus .2 .4 .08 | .25 .12 .25 .25 .24 | .04 .4 with alpha .4, kappa 2."""
    shaped = [1.0, 1.2, 0.88, -0.25, -0.38, -0.25, -0.25, -0.26, 1.34, 1.7]
    want, _ = policy_loss(double(LOGP), double(OLD), double(shaped), None, None, 0.2, 0.28)
    assert close(call(entropy_shaped)[0], want)


def test_eapo_by_hand_and_its_signs():
    adv = double(A).repeat_interleave(torch.tensor(LENGTHS))
    found = eapo.shaped(adv, double(H), rows_of(), alpha=0.2, phi=2.0)
    want = []
    for a, h in zip(A, np.split(np.array(H), np.cumsum(LENGTHS)[:-1]), strict=True):
        z = (h - h.mean()) / (h.std() + 1e-6)
        want += [a + 0.2 * np.sign(a) * np.clip(x, -abs(a) / 2, abs(a) / 2) for x in z]
    assert close(found, want) and (found.sign() == adv.sign()).all()


def reference(name, logp, old, a, h, lengths):
    """Losses of each token, written down once more with loops over responses. logp: requires grad; a: (n,)."""
    out, at = [], 0
    for n, adv in zip(lengths, a, strict=True):
        x, o, e = logp[at : at + n], old[at : at + n], h[at : at + n]
        at += n
        r = (x - o).exp()
        if name == "cispo":
            out += [-r[t].detach().clamp(max=5) * adv * x[t] for t in range(n)]
        elif name in ("gspo", "holder_po"):
            lo, hi = (3e-4, 4e-4) if name == "gspo" else (0.2, 0.2)
            rho = r.prod() ** (1 / n) if name == "gspo" else ((r**1.7).sum() / n) ** (1 / 1.7)
            out += [-torch.minimum(rho * adv, rho.clamp(1 - lo, 1 + hi) * adv)] * n
        else:
            weight, shaped = 1.0, adv
            for t in range(n):
                if name == "dr_grpo":
                    weight = n / 64
                if name == "entropy_shaped":
                    shaped = adv + min(0.4 * e[t].item(), abs(adv) / 2)
                value = -min((r[t] * shaped, r[t].clamp(0.8, 1.28) * shaped), key=lambda v: v.item())
                if shaped < 0:
                    value = min((value, -torch.tensor(10.0 * shaped, dtype=torch.float64)), key=lambda v: v.item())
                if name == "adaptive_entropy":
                    value = value - 0.01 * e[t]
                out.append(weight * value)
    return torch.stack(out)


@pytest.mark.parametrize(("name", "settings"), [
    ("cispo", {}), ("gspo", {}), ("holder_po", {"p": 1.7}), ("dr_grpo", {"max_response_tokens": 64}), ("entropy_shaped", {}),
    ("adaptive_entropy", {"coef": 0.01})])  # fmt: skip
def test_losses_and_gradients_are_autograds_of_the_formula_written_down(name, settings):
    rng, method = np.random.default_rng(5), globals()[name]
    for lengths in ([1], [4, 1, 9], [30, 2, 2, 17]):
        T = sum(lengths)
        old, h, a = double(-rng.exponential(1, T)), double(rng.exponential(1, T)), rng.normal(0, 1, len(lengths)).tolist()
        logp = (old + double(rng.normal(0, 0.5, T))).requires_grad_()
        adv = double(a).repeat_interleave(torch.tensor(lengths))
        rows = rows_of(lengths, [True] * len(lengths), old.tolist())
        ours, _ = method.policy_loss(logp, old, adv, h, rows, 0.2, 0.28, **settings)
        want = reference(name, logp, old, a, h, lengths)
        weights = double(rng.normal(0, 1, T))
        grads = [torch.autograd.grad((weights * x).sum(), logp, retain_graph=True)[0] for x in (ours, want)]
        assert close(ours.detach(), want.detach(), 1e-9) and close(*grads, 1e-9)


def test_tree_po_is_brute_force_over_the_ancestors_of_every_rollout():
    rng = np.random.default_rng(3)
    for _ in range(20):
        n1, sizes = 3, rng.integers(0, 4, 3)
        parents = [-1] * n1 + [i for i, k in enumerate(sizes) for _ in range(k)]
        s = rng.choice([-1.0, 1.0, 0.3], len(parents)).tolist()
        mine = [set(range(len(s)))] * len(s)
        tree = [i if p < 0 else p for i, p in enumerate(parents)]
        want = []
        for i in range(len(s)):
            subtree = {j for j in mine[i] if tree[j] == tree[i]}
            sets = [mine[i]] + [subtree] * (len(subtree) > 1)
            a = sum(len(x) * (s[i] - np.mean([s[j] for j in x])) for x in sets) / sum(map(len, sets))
            want.append(a / (np.std(s, ddof=1) + 1e-6))
        two = torch.tensor([0] * len(s) + [7] * len(s))  # a second group in the same call changes nothing
        found = advantages(tree_po, s * 2, two, parents * 2)
        assert close(found, want * 2, 1e-5)


def test_opefos_entropy_change_is_that_of_a_small_step_and_its_weights_balance_it():
    rng = torch.Generator().manual_seed(0)
    n, eta = 12, 1e-6
    z = torch.randn(n, 7, generator=rng, dtype=torch.float64)
    tokens, adv = torch.randint(7, (n,), generator=rng), torch.randn(n, generator=rng, dtype=torch.float64)

    def entropy(z):
        return -(z.softmax(-1) * z.log_softmax(-1)).sum(-1)

    logp = z.log_softmax(-1)
    stat = opefo.position_statistic(logp, entropy(z), tokens)
    of_token = logp.gather(-1, tokens[:, None])[:, 0]
    dh = opefo.entropy_change(of_token, adv, entropy(z), stat)
    onehot = torch.nn.functional.one_hot(tokens, 7)
    step = eta * adv[:, None] * (onehot - logp.exp())    # the gradient of A log p of the token, in the logits
    assert close((entropy(z + step) - entropy(z)) / eta, dh, 1e-4)
    rows = rows_of([5, 7], [True, False], of_token.tolist(), entropy=entropy(z).tolist(), statistic=stat.tolist())
    weight = opefo.survey_minibatch(rows, of_token, of_token, adv, None, 0.2, 0.28)["balance"].double()
    balanced = weight * dh
    print(f"weights {sorted({round(w, 4) for w in weight.tolist()})}")
    assert balanced.sum().abs() < 1e-6 * balanced.abs().sum() and weight.min() < 1 < weight.max()
    impossible = torch.tensor([[0.0, -math.inf]])        # a token of probability 0 adds nothing
    assert opefo.position_statistic(impossible, torch.zeros(1), torch.zeros(1, dtype=torch.long)).item() == 0


def test_who_branches():
    allowed = torch.ones(40, dtype=torch.bool)

    def order(method, right, rate):
        r = Rollout([1], [], [3, 4, 5, 6], entropy=np.float32([0.1, 0.3, 0.2, 0.9]), correct=right, pass_rate=rate)
        return method.critical_tokens(r, allowed).tolist()

    assert order(wrong_parents, True, 0.5) == [] and order(wrong_parents, False, 0.5) == [3, 1, 2]
    branched = {(right, rate): bool(order(prefix_sampling, right, rate)) for right in (True, False) for rate in (0.25, 0.5, 0.75)}
    assert branched == {(True, 0.25): True, (False, 0.25): False, (True, 0.5): True, (False, 0.5): True, (True, 0.75): False,
                        (False, 0.75): True}  # fmt: skip
    assert len(valid_positions(Rollout([1], [], [3, 4]), allowed)) == 1


# --------------------------------------------------------------------------------------------------------------- the limits
def test_methods_agree_where_their_formulas_do():
    assert close(call(holder_po, p=0.0, low=3e-4, high=4e-4)[1], call(gspo)[1]), "p -> 0 is GSPO"
    assert close(call(holder_po, p=1.1e-3, low=0.2, high=0.28)[0], call(holder_po, p=0.0, low=0.2, high=0.28)[0], 1e-3)
    flat = advantages(pass_k, k=1)
    assert close(flat / group_advantages(double(SCORES), torch.zeros(16), None), [(flat[0] / group_advantages(
        double(SCORES), torch.zeros(16), None)[0]).item()] * 16), "k = 1: GRPO's, with another std"  # fmt: skip
    assert close(advantages(tree_po, parents=[-1] * 16), group_advantages(double(SCORES), torch.zeros(16), None), 1e-6)
    small = [-0.29, -1.18, -0.72, -1.05, -0.15, -1.5, -2.4, -0.41, -0.06, -1.9]  # all ratios inside the clip
    logp = double(small).requires_grad_()
    adv = double(A).repeat_interleave(torch.tensor(LENGTHS))
    grads = [torch.autograd.grad(f(logp, double(OLD), adv, double(H), rows_of(ref_logp=OLD), 0.2, 0.28, **k)[0].sum(), logp)[0]
             for f, k in ((policy_loss, {}), (cispo.policy_loss, {}), (kl.policy_loss, {"coef": 0.0}))]  # fmt: skip
    assert close(grads[0], grads[1]) and close(grads[0], grads[2])
    assert close(advantages(rloo, [1.0, -1.0], parents=[-1, -1]), [2.0, -2.0]) and advantages(rloo, [1.0], parents=[-1]).item() == 0
    assert advantages(maxrl, [-1.0, -2.0], parents=[-1, -1]).tolist() == [0, 0], "no right one: nothing, and no sign turned"


# -------------------------------------------------------------------------------------------------------- loading, together
def load(*names, **changes):
    return load_method(Config(name="s", method=list(names), **changes), cure.HOOKS)


def test_methods_are_taken_together_where_their_hooks_do_not_collide_and_refused_by_name_where_they_do():
    both = load("surprisal", "tree_po", "cispo", method_args={"ratio_max": 3, "equal": True})
    assert both.policy_loss.keywords == {"ratio_max": 3.0} and both.group_advantages.keywords == {"equal": True}
    assert both.critical_tokens.func.__module__ == "method_surprisal" and not both.reference
    for names, says in ((("cispo", "kl"), "cispo.py and .*kl.py both have policy_loss: take one"),
                        (("adaptive_entropy", "kl"), "adaptive_entropy.py and .*kl.py both have policy_loss"),
                        (("clip_cov", "spo_mask"), "clip_cov.py and .*spo_mask.py both choose tokens"),
                        (("surprisal", "wrong_parents"), "surprisal.py and .*wrong_parents.py both have critical_tokens"),
                        (("dr_grpo",), "agg: dr_grpo's loss is a mean over responses, agg=sequence, got token"),
                        (("opefo",), "prompts_per_minibatch: opefo is on-policy, one minibatch a step of 512 prompts, got 32")):
        with pytest.raises(ValueError, match=says):
            load(*names)
    for changes, names, says in (({"entropy_mask_rho": 0.2, "agg": "sequence"}, ["gspo"], "loss of .*gspo.py is of whole responses"),
                                 ({"agg": "sequence"}, ["dr_grpo", "spo_mask"], "loss of .*dr_grpo.py is of whole responses"),
                                 ({"agg": "sequence", "importance": ["token_mask", 0, 2]}, ["holder_po"], "of whole responses"),
                                 ({"critical": "random"}, ["surprisal"], "critical: random and .*surprisal.py both choose"),
                                 ({"entropy_mask_rho": 0.5}, ["spo_mask"], "entropy_mask_rho: spo_mask has no share"),
                                 ({"method_args": {"p": 5}, "agg": "sequence"}, ["holder_po"], "method_args.p: p and p_end"),
                                 ({"method_args": {"ratio_max": math.inf}}, ["cispo"], "must be of type float, got inf"),
                                 ({"method_args": {"coef": 0, "target": 1}}, ["kl"], "method_args.coef: what is steered")):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            load(*names, **changes)
    assert load("kl").reference and load("dr_grpo", agg="sequence").policy_loss.keywords == {"max_response_tokens": 2596}


def test_settings_that_cannot_be_told_apart_are_refused(tmp_path):
    (tmp_path / "key.py").write_text("def group_advantages(scores, groups, parents, *, lr=0.5): pass\n")
    with pytest.raises(ValueError, match="lr is a key of the config: without a default it has its value"):
        load(str(tmp_path / "key.py"))
    (tmp_path / "key.py").write_text("def group_advantages(scores, groups, parents): pass\ndef check(lr, lrr): pass\n")
    with pytest.raises(ValueError, match="check asks for lrr, which is no setting"):
        load(str(tmp_path / "key.py"))
    (tmp_path / "key.py").write_text("def group_advantages(scores, groups, parents, *, k=1): pass\n"
                                     "def critical_tokens(rollout, allowed, *, k=2): pass\n")
    with pytest.raises(ValueError, match="its setting k has two defaults"):
        load(str(tmp_path / "key.py"))
    (tmp_path / "key.py").write_text("from methods.kl import policy_loss\n")
    assert load(str(tmp_path / "key.py")).reference, "what an imported function needs comes with it"
    (tmp_path / "key.py").unlink()
    for name in ("group_advantages(scores, groups, parents", "critical_tokens(rollout, allowed"):
        (tmp_path / f"{name[:5]}.py").write_text(f"def {name}, *, size=1): pass\n")
    with pytest.raises(ValueError, match="method_args.size: two of the files"):
        load(*(str(p) for p in sorted(tmp_path.glob("*.py"))))


def test_the_settings_of_a_step_follow_progress_and_state():
    cfg = Config(name="s", method=["holder_po"], agg="sequence", steps=4)
    method, state, seen = load_method(cfg, cure.HOOKS), {"stage_step": 1}, []
    for state["stage_step"] in (1, 2, 3, 4):
        now, logged = for_step(method, state, cfg, [])
        seen.append(now.policy_loss.keywords["p"])
        assert logged == {"method/p": seen[-1]}
    assert seen == [2.0, 1.0, 0.0, -1.0] and method.policy_loss.keywords["p"] == 2.0
    plain = load()
    assert for_step(plain, state, cfg, []) == (plain, {})
    method.step_settings = lambda state, progress, rows: {"q": 1.0}
    with pytest.raises(AssertionError, match="step_settings gives"):
        for_step(method, state, cfg, [])


@pytest.mark.parametrize("name", ["cispo", "gspo", "holder_po", "dr_grpo", "kl", "entropy_bonus", "adaptive_entropy", "entropy_shaped",
                                  "eapo", "clip_cov", "kl_cov", "opefo", "lp_reg", "htpo"])  # fmt: skip
def test_a_rank_without_rollouts_has_a_loss_of_zero_that_can_be_differentiated(name):
    per_step = {"prompts_per_minibatch": 512} if name == "opefo" else {}
    agg = {"agg": "sequence"} if name in ("gspo", "holder_po", "dr_grpo") else {}
    logp, entropy = (torch.zeros(0, requires_grad=True) for _ in range(2))
    none = torch.zeros(0)
    loss, flags = load(name, **per_step, **agg).policy_loss(logp, none, none, entropy, [], 0.2, 0.28)
    loss.sum().backward()
    assert loss.shape == (0,) and all(len(v) == 0 for v in flags.values())


# --------------------------------------------------------------------------------------------------------------- whole steps
def test_a_reference_costs_nothing_but_its_term(config, tmp_path):
    two = "prompts_per_minibatch=2"                      # in the first minibatch the policy is the reference
    plain = first_line(config, tmp_path / "plain", two)
    off = first_line(config, tmp_path / "off", two, "method=kl", "method_args.coef=0")
    on = first_line(config, tmp_path / "on", two, "method=kl", "method_args.coef=0.5")
    assert off["actor/grad_norm"] == plain["actor/grad_norm"], "beta 0 is plain, bit for bit"
    assert 0 < on["actor/ref_kl"] < 1e-3 and on["actor/grad_norm"] != plain["actor/grad_norm"]
    cure.main(["--config", config, f"out_dir={tmp_path}/two", "max_steps=2", "eval_data=", "prompts_per_minibatch=4", "method=kl"])
    first, second = (m["actor/ref_kl"] for m in train_lines(tmp_path / "two"))
    assert first == 0 < second, "one minibatch a step: at first the policy is the reference, which does not move with it"


def test_a_run_with_a_reference_and_adapters_has_one_model(config, tmp_path, monkeypatch):
    """kl in two steps of one minibatch: at first the policy is the reference. The reference then stays where it was."""
    made = []
    start = Policy.__init__
    monkeypatch.setattr(Policy, "__init__", lambda self, *args, **kwargs: made.append(kwargs) or start(self, *args, **kwargs))
    monkeypatch.setattr("tools.analyze.curves", lambda out: [])
    first_line(config, tmp_path, "method=kl", "lora_rank=4", "lr=1e-2", "max_steps=2")
    first, second = train_lines(tmp_path)
    assert made == [{}] and first["actor/ref_kl"] == 0 < second["actor/ref_kl"]


@pytest.mark.parametrize(("name", "settings"), [("adaptive_entropy", ["method_args.target=5", "method_args.delta=0.001"]),
                                                ("holder_po", ["agg=sequence"]), ("kl", ["method_args.target=0.001"])])  # fmt: skip
def test_a_method_with_state_resumes_bit_for_bit(config, tmp_path, monkeypatch, name, settings):
    monkeypatch.setattr("tools.analyze.curves", lambda out: [])
    argv = ["--config", config, "eval_data=", f"method={name}", *settings, "lr=1e-3"]
    cure.main([*argv, f"out_dir={tmp_path}/whole", "max_steps=3"])
    cure.main([*argv, f"out_dir={tmp_path}/parts", "max_steps=2"])
    cure.main([*argv, f"out_dir={tmp_path}/parts", "max_steps=3"])
    whole, parts = ([{k: v for k, v in m.items() if not k.startswith(("timing_s", "perf"))} for m in train_lines(tmp_path / d)]
                    for d in ("whole", "parts"))  # fmt: skip
    changing = [m[next(k for k in m if k.startswith("method/"))] for m in whole]
    print(f"{name}: {changing}")
    assert whole == parts and len(set(changing)) == 3


def test_the_reference_is_refused_behind_sft_and_the_smoke_table_names_what_failed(config, tmp_path, capsys):
    assert smoke.main(["--config", config, "--out", str(tmp_path), "--only", "dapo,tree_po,gspo", "prompts_per_round=4"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()] == ["method", "dapo", "tree_po", "gspo"]
    assert smoke.main(["--config", config, "--out", str(tmp_path), "--only", "gspo", "agg=token"]) == 1
    assert "gspo failed" in capsys.readouterr().err and "agg: gspo's loss" in (tmp_path / "gspo.log").read_text()
    with pytest.raises(SystemExit):
        cure.main(["--config", config, "eval_data=", f"out_dir={tmp_path}/x", "method=kl", "stages.stage1.kind=sft",
                   "stages.stage1.n2=0"])  # fmt: skip
    assert "method: the reference is the model that a run begins with" in capsys.readouterr().err


@pytest.mark.slow
def test_every_method_takes_two_steps(config, tmp_path, capsys):
    code = smoke.main(["--config", config, "--out", str(tmp_path), "prompts_per_round=4"])
    print(out := capsys.readouterr().out)
    assert code == 0 and len(out.splitlines()) == len(smoke.METHODS) + 1
    assert all(np.isfinite(float(cell)) for line in out.splitlines()[1:] for cell in re.findall(r"  ([+-]?[\d.]+|nan)", line)[:4])


def test_a_plain_resample_is_no_branch_to_an_advantage():
    rows = [Rollout([1], [], [2], group=0, reward=1.0, parent=p, t_star=t) for p, t in ((-1, None), (-1, None), (0, 3), (1, None))]
    seen = []
    hook = SimpleNamespace(group_advantages=lambda scores, groups, parents: seen.append(parents.tolist()) or scores)
    cure.set_advantages(hook, rows)
    assert seen == [[-1, -1, 0, -1]]


def test_branches_are_chosen_by_the_pass_rate_of_the_base_responses(config, tmp_path):
    first_line(config, tmp_path, "method=prefix_sampling", "samples_per_step=0")
    rows, branched = lines(tmp_path / "samples.jsonl"), []
    for group in {r["group"] for r in rows}:
        base, branches = ([r for r in rows if r["group"] == group and (r["parent"] >= 0) == side] for side in (False, True))
        rate = np.mean([r["correct"] for r in base])
        for b in branches:
            parent = base[b["parent"]]
            branched.append((b["t_star"] is not None) == (rate == 0.5 or parent["correct"] == (rate < 0.5)))
    assert branched and all(branched)
