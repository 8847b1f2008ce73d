"""Check the exercises, from the root of the repository.

    python -m docs.exercises.check 3      # the properties of exercise 3, a line each; exit code 0 if all hold
    python -m docs.exercises.check        # a table of all six

`clip` to `resume` yield the properties of a function f: a claim, and a function -> (what is expected, what f gives).
"""

import itertools
import json
import statistics
import sys

import torch
from torch.autograd import grad

import loss
from docs.exercises import e1_clip, e2_weights, e3_logp, e4_advantage, e5_branch, e6_resume
from lib.data import PromptStream

TOLERANCE = 1e-4  # relative and absolute: rounding makes 1e-5 here, the mistakes 1e-2 or more


def random(seed):
    """A generator of its own, so that a check gives the same numbers each time."""
    return torch.Generator().manual_seed(seed)


def clip(f):
    """1: f is policy_loss."""
    old, log_r, A = torch.randn(3, 500, generator=random(1), dtype=torch.float64)  # (T,) each
    r, size, logp, h = (1.5 * log_r).exp(), A.abs(), (old + 1.5 * log_r).requires_grad_(), 1e-6
    good = torch.tensor([-a * min(x, 1.28) for x, a in zip(r.tolist(), size.tolist())])
    bad = torch.tensor([a * min(max(x, 0.8), 10) for x, a in zip(r.tolist(), size.tolist())])
    past = torch.where(A > 0, r > 1.28, (r < 0.8) | (r > 10))
    own = loss.policy_loss(logp, old, A, None, None, 0.1, 0.5, clip_dual=3.0)[0]

    def differences():
        return (f(logp + h, old, A) - f(logp - h, old, A)) / (2 * h)

    yield "at r = 1 the loss is -A", lambda: (-A, f(old, old, A))
    yield "for A > 0 it is -A min(r, 1.28)", lambda: (good, f(logp, old, size))
    yield "for A < 0 it is |A| max(r, 0.8), at most 10 |A|", lambda: (bad, f(logp, old, -size))
    yield "no gradient just where A pushed r past its bound", lambda: (past, grad(f(logp, old, A).sum(), logp)[0] == 0)
    yield "differences give the gradient", lambda: (differences(), grad(f(logp, old, A).sum(), logp)[0])
    yield "it is loss.policy_loss, at other bounds", lambda: (own, f(logp, old, A, 0.1, 0.5, 3.0))


def weights(f):
    """2: f is token_weights. A minibatch of 6 responses is cut in each of the 32 ways that keep their order."""
    ragged, equal, few = torch.tensor([3, 40, 1, 12, 25, 7]), torch.full((6,), 8), torch.tensor([2, 5, 0])
    cuts = [[i for i in range(1, 6) if bits >> i & 1] for bits in range(0, 64, 2)]
    x, y = torch.randn(88, generator=random(1)), torch.randn(48, generator=random(2))
    responses = sum(part.mean() for part in x.split(ragged.tolist())) / 6

    def totals(x, lengths, cuts, agg="token"):
        """The minibatch's loss for each cut, summed over its micro-batches."""
        parts = ([f(n, n, agg, len(x), 6) for n in lengths.tensor_split(cut)] for cut in cuts)
        return [torch.cat(weight) @ x for weight in parts]

    yield "not cut: the mean over all tokens", lambda: ([x.mean()], totals(x, ragged, [[]]))
    yield "any cut: weights sum to 1", lambda: ([1.0] * 32, totals(x * 0 + 1, ragged, cuts))
    yield "equal responses, equal parts: the mean", lambda: ([y.mean()] * 3, totals(y, equal, [[], [3], [2, 4]]))
    yield "any responses, any cut: the mean over all tokens", lambda: ([x.mean()] * 32, totals(x, ragged, cuts))
    yield "agg=sequence, any cut: the mean of means", lambda: ([responses] * 32, totals(x, ragged, cuts, "sequence"))
    yield "an empty micro-batch has no weights", lambda: ([], f(few[:0], few[:0], "token", 90, 9))
    yield "it is loss.token_weights, masked", lambda: [g(few, few + 3, "token", 90, 9) for g in (loss.token_weights, f)]


def logprobs(f):
    """3: f is response_logp. The model is a table of logits (V, V), a row for each token that was read last."""
    table, ids = torch.randn(4, 4, generator=random(1)), torch.tensor([2, 0, 3, 3, 1, 0, 2])  # 3 are the prompt
    z, constants = table[ids].requires_grad_(), torch.randn(7, 1, generator=random(2))

    def probabilities():
        """Of each of the 64 responses of 3 tokens to that prompt."""
        rows = (torch.tensor([2, 0, 3, *response]) for response in itertools.product(range(4), repeat=3))
        return [f(table[row], row, 3).sum().exp() for row in rows]

    def project():
        row = packed(ids[:3].tolist(), [], ids[3:].tolist())
        return loss.logp_and_entropy(z[row["index"]], torch.eye(4), row["targets"], 0.7)[0]  # logits, hence no head

    yield "V equal logits: -ln V for each response token", lambda: (-torch.full((4,), 4.0).log(), f(z * 0, ids, 3))
    yield "a constant added to a position's logits changes nothing", lambda: (f(z, ids, 3), f(z + constants, ids, 3))
    yield "temperature 2 is logits by half", lambda: (f(z / 2, ids, 3), f(z, ids, 3, 2.0))
    yield "the probabilities of all 64 responses sum to 1", lambda: (1.0, sum(probabilities()))
    yield "which positions' logits are read", lambda: ([0, 0, 1, 1, 1, 1, 0], grad(f(z, ids, 3).sum(), z)[0].any(-1))
    yield "it is loss.logp_and_entropy at policy.pack's index", lambda: (project(), f(z, ids, 3, 0.7))


def packed(prompt_ids, prefix_ids, response_ids):
    """One rollout as the trainer reads it. Imported late: transformers takes seconds."""
    from lib.policy import pack
    from rollout import Rollout

    return pack([Rollout(prompt_ids, prefix_ids, response_ids)], "cpu")


def advantages(f):
    """4: f is group_advantages. 5 groups of some 12 rollouts, then two more of one rollout each."""
    g, order = torch.randint(5, (60,), generator=random(1)), torch.randperm(60, generator=random(2))
    s, ones, zeros = torch.randn(60, generator=random(3)), torch.ones(16), torch.zeros(16, dtype=torch.long)
    more_s, more_g = torch.cat([s, torch.tensor([1.0, -1.0])]), torch.cat([g, torch.tensor([7, 9])])

    def moments():
        parts = [f(s, g)[g == i].tolist() for i in range(5)]
        return [[statistics.mean(part), statistics.stdev(part)] for part in parts]  # stdev divides by n - 1

    yield "1 right of 16: 3.75 and -0.25", lambda: ([3.75] + [-0.25] * 15, f(torch.tensor([1.0] + [-1.0] * 15), zeros))
    yield "in each group mean 0 and standard deviation 1", lambda: ([[0.0, 1.0]] * 5, moments())
    yield "other units of the scores change nothing", lambda: (f(s, g), f(5 * s - 3, g))
    yield "other names of groups and another order change nothing", lambda: (f(s, g)[order], f(s[order], 9 - g[order]))
    yield "equal scores: 0", lambda: (zeros, f(ones, zeros))
    yield "a group of one: 0", lambda: ([0.0, 0.0], f(more_s, more_g)[60:])
    yield "the sum over all groups is 0", lambda: (0.0, f(more_s, more_g).sum())
    yield "it is loss.group_advantages", lambda: (loss.group_advantages(more_s, more_g), f(more_s, more_g))


def branch(f):
    """5: f is training_row."""
    table = torch.randn(3, 3, generator=random(1)).requires_grad_()  # a model as in 3
    p, x, y = [5, 2, 8], [1, 4], [7, 7, 3, 0]  # prompt, prefix, response

    def score(prefix):
        """The gradient of the loss tokens' log-prob, its mean over all responses of 3 tokens to the prompt 0."""
        total = 0
        for response in itertools.product(range(3), repeat=3):
            ids, has_loss = f([0], prefix, list(response))
            logp = table.log_softmax(-1)[ids[:-1], ids[1:]]  # of each token but the first
            total = total + logp[-3:].sum().exp().detach() * logp[has_loss[1:]].sum()
        return grad(total, table)[0]

    yield "the model reads prompt, prefix and response", lambda: (p + x + y, f(p, x, y)[0])
    yield "a base response: loss on all of it", lambda: ([0, 0, 0, 1, 1, 1, 1], f(p, [], y)[1])
    yield "no loss on the prompt", lambda: ([0, 0, 0], f(p, x, y)[1][:3])
    yield "a base response's gradient is 0 on average, at A = 1", lambda: (torch.zeros(3, 3), score([]))
    yield "a branch's gradient is 0 on average, at A = 1", lambda: (torch.zeros(3, 3), score([2, 1]))
    yield "a parent and 3 branches: 16 tokens", lambda: (16, sum(f(p, prefix, y)[1].sum() for prefix in ([], x, x, x)))
    yield "to the loss a prefix is prompt", lambda: (f(p + x, [], y)[1], f(p, x, y)[1])
    yield "it is policy.pack", lambda: (torch.isin(torch.arange(9), packed(p, x, y)["index"] + 1), f(p, x, y)[1])


def resume(f):
    """6: f is train. 7 steps of 3 of 10 prompts reach into the third epoch."""
    stream, steps = PromptStream(10, "0/stage1"), range(1, 8)
    batches = [stream.take(3) for _ in steps]

    def right(stop):
        first, saved = f(stop, 3, 10)
        return sum(a == b for a, b in zip(first + f(7, 3, 10, saved)[0], batches, strict=True))

    yield "a run that is not stopped takes the stream's batches", lambda: (batches, f(7, 3, 10)[0])
    yield "5 steps of 2 of 10 prompts take each prompt once", lambda: (range(10), sorted(sum(f(5, 2, 10)[0], [])))
    yield "the checkpoint has the step", lambda: (steps, [json.loads(f(s, 3, 10)[1])["step"] for s in steps])
    yield "a finished run takes nothing more", lambda: ([], f(7, 3, 10, f(7, 3, 10)[1])[0])
    yield "its cursor is behind the last batch", lambda: (stream.cursor, json.loads(f(7, 3, 10)[1])["cursor"])
    yield "stopped after 1 … 7 steps and resumed: 7 right batches", lambda: ([7] * 7, [right(s) for s in steps])


EXERCISES = {
    1: (clip, e1_clip.policy_loss), 2: (weights, e2_weights.token_weights), 3: (logprobs, e3_logp.response_logp),
    4: (advantages, e4_advantage.group_advantages), 5: (branch, e5_branch.training_row), 6: (resume, e6_resume.train),
}  # fmt: skip


def failure(pair):
    """None where the two that pair() returns are equal, else a text with numbers."""
    try:
        want, got = (torch.as_tensor(x).detach().double() for x in pair())
    except Exception as e:  # a function under repair may raise anything
        return f"{type(e).__name__}: {e}".splitlines()[0]
    if want.shape != got.shape:
        return f"expected the shape {tuple(want.shape)}, came {tuple(got.shape)}"
    wrong = ~torch.isclose(got, want, rtol=TOLERANCE, atol=TOLERANCE)
    if not wrong.any():
        return None
    worst = (got - want).abs().nan_to_num(torch.inf).argmax()
    texts = [" ".join(f"{v:.4g}" for v in (x if x.numel() < 10 else x.flatten()[worst]).flatten()) for x in (want, got)]
    more = f" (number {worst}; {wrong.sum()} of {wrong.numel()} are wrong)" if wrong.numel() >= 10 else ""
    return f"expected {texts[0]}, came {texts[1]}{more}"


def main(argv):
    """Print, and return the exit code."""
    if len(argv) > 1 or argv and argv[0] not in map(str, EXERCISES):
        print(f"error: python -m docs.exercises.check [1 … {len(EXERCISES)}]", file=sys.stderr)
        return 2
    chosen = {n: EXERCISES[n] for n in map(int, argv or EXERCISES)}
    found = {n: [(claim, failure(pair)) for claim, pair in check(f)] for n, (check, f) in chosen.items()}
    if argv:
        for claim, wrong in found[int(argv[0])]:
            print(f"FAILS  {claim}: {wrong}" if wrong else f"ok     {claim}")
    else:
        for n, (_, f) in chosen.items():
            name, fails = f"{f.__module__.split('.')[-1]}.{f.__name__}", sum(wrong is not None for _, wrong in found[n])
            print(f"{n}  {name:32}  ok {len(found[n]) - fails}  FAILS {fails}")
    return int(any(wrong for rows in found.values() for _, wrong in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
