"""Countdown: reach a target from a few numbers, each used exactly once, by + - * and division.

Read from top to bottom: the gold answer, the verifier for its two forms of response, legal moves, random problems, the
table by which their difficulty was chosen. Nothing here is heavy: lib/pool.py imports it in every verifier process.
Symbols: a *step* is "3*7=21", a *trace* is steps joined by ";", a *pool* is the numbers that are left, largest first.
"""

import functools
import itertools
import json
import random
import re
import sys
from collections import Counter
from fractions import Fraction

import reward

# ------------------------------------------------------------------------------------------------------- gold and steps
MAX_STEPS_CHARS = 400  # a longer trace is wrong: six numbers of nine digits need 5 steps of 32 characters
MAX_EXPRESSION_CHARS = 200  # a longer <answer> is wrong
MAX_DEPTH = 20  # of brackets
ILLEGAL = "illegal: "  # how the answer of a response begins that breaks a rule, other than by its end
GOLD = re.compile(r"([0-9]{1,9}(?: [0-9]{1,9})*) -> (-?[0-9]{1,9})")
NUMBER = r"(0|-?[1-9][0-9]{0,8})"  # ASCII digits only: \d would take those of all scripts
STEP = re.compile(rf" *{NUMBER} *([-+*/]) *{NUMBER} *= *{NUMBER} *")
TOKEN = re.compile(r"[ \t\n]*(0|[1-9][0-9]{0,8}|[-+*/()])")


def gold_text(numbers, target):
    """A problem as text, in the answer column and in the testbed's prompts: ((3, 7, 8), 29) -> "3 7 8 -> 29"."""
    return f"{' '.join(map(str, numbers))} -> {target}"


def read_gold(gold):
    """gold_text back into (numbers, target). ValueError: the gold is of another form."""
    if not (found := GOLD.fullmatch(gold)):
        raise ValueError(f"verifier=countdown reads answers like '3 7 8 -> 29', got {gold[:60]!r}")
    return [int(x) for x in found[1].split()], int(found[2])


def check_golds(prompts, verifier, key):
    """ValueError, naming `key` and the row, where the verifier is countdown and a prompt's gold is not of its form."""
    for p in prompts if verifier == "countdown" else ():
        try:
            read_gold(p.answer)
        except ValueError as e:
            raise ValueError(f"{key}: row {p.id}: {e}") from e


def apply(a, op, b):
    """a op b as a Fraction. None for a division by 0."""
    if op == "/":
        return Fraction(a) / b if b else None
    return {"+": a + b, "-": a - b, "*": a * b}[op]


# --------------------------------------------------------------------------------------------------------- the verifier
class Illegal(Exception):
    """A rule that a response breaks. The text is its answer."""


def countdown(text, gold):
    """A verifier (reward.py): are the gold's numbers, each used exactly once, combined to its target?

    Read are the last <answer>expression</answer> where there is one, TinyZero's form, else the whole text as a trace.
    Both are parsed and nothing is evaluated by Python. Values are exact. answer is the target if it is reached, else
    what was wrong: "ends at 20", "numbers left: 4", "illegal: 3*7 is not 22". ValueError: the gold is unreadable."""
    numbers, target = read_gold(gold)
    _, tag, rest = text.rpartition("<answer>")
    try:
        if tag:
            inside, end, _ = rest.partition("</answer>")
            value, left = read_expression(inside, numbers) if end else (None, [])
        else:
            value, left = read_trace(text, numbers)
    except Illegal as e:
        return False, f"{ILLEGAL}{e}"
    if value is None:
        return False, reward.INVALID
    if left:
        return False, f"numbers left: {' '.join(map(str, sorted(left)))}"
    return value == target, f"{target}" if value == target else f"ends at {value}"


def read_trace(text, numbers):
    """" 3*7=21;21+8=29;" -> (29, the numbers that are left), (None, …) for no text. Illegal: the first wrong step."""
    if len(text) > MAX_STEPS_CHARS:
        raise Illegal("too long")
    pool, value, text = Counter(numbers), None, text.strip(" \n").removesuffix(";")
    for step in text.split(";") if text else ():
        if not (found := STEP.fullmatch(step)):
            raise Illegal(f"{step[:40]!r} is no step")
        a, op, b, said = int(found[1]), found[2], int(found[3]), int(found[4])
        for x in (a, b):
            if not pool[x]:
                raise Illegal(f"{x} is not there")
            pool[x] -= 1
        if (value := apply(a, op, b)) != said:
            raise Illegal(f"{a}{op}{b} is not {said}")
        pool[said] += 1
    return value, list((pool - Counter([value])).elements())


def read_expression(text, numbers):
    """" (3 * 7) + 8 " -> (its value, a Fraction, the numbers it leaves out). Illegal: it cannot be parsed, takes a
    number that is not there, divides by 0. Unary signs are no operation of the game."""
    if len(text) > MAX_EXPRESSION_CHARS:
        raise Illegal("too long")
    tokens, at, text = [], 0, text.rstrip(" \t\n")
    while at < len(text):
        if not (found := TOKEN.match(text, at)):
            raise Illegal(f"{text[at : at + 20]!r} is no arithmetic")
        tokens.append(found[1])
        at = found.end()
    used = Counter(int(t) for t in tokens if t.isdigit())
    if more := used - Counter(numbers):
        raise Illegal(f"{min(more)} is not there")
    tokens.reverse()  # popped from the end
    value = read_sum(tokens, 0)
    if tokens:
        raise Illegal(f"{tokens[-1]!r} is not expected")
    return value, list((Counter(numbers) - used).elements())


def read_sum(tokens, depth, signs="+-"):
    """The value of the tokens up to a closing bracket, which are taken off. Its terms are products (signs "*/")."""
    product = functools.partial(read_sum, tokens, depth, "*/")
    term = product if signs == "+-" else functools.partial(read_atom, tokens, depth)
    value = term()
    while tokens and tokens[-1] in signs:
        if (value := apply(value, tokens.pop(), term())) is None:
            raise Illegal("division by 0")
    return value


def read_atom(tokens, depth):
    """The value of a number or of a sum in brackets."""
    token = tokens.pop() if tokens else "the end"
    if token == "(" and depth < MAX_DEPTH:
        value = read_sum(tokens, depth + 1)
        if not tokens or tokens.pop() != ")":
            raise Illegal("a bracket is not closed")
        return value
    if not token.isdigit():
        raise Illegal("too deep" if token == "(" else f"{token!r} is not expected")
    return Fraction(int(token))


# reward.py imports nothing of ours, so the entry is made from here. lib/data.py and lib/pool.py import this file, and
# with them the trainer, every evaluation and every verifier process.
reward.VERIFIERS["countdown"] = countdown
reward.SELF_TEST["countdown"] = (
    (" 3*7=21;21+8=29", "3 7 8 -> 29", True), ("<answer> 8 + 7 * 3 </answer>", "3 7 8 -> 29", True),
    (" 3*7=22;22+8=30", "3 7 8 -> 30", False), (" 3*7=21;21+8=29", "3 7 8 -> 30", False),
    (" 3*7=21", "3 7 8 -> 21", False), ("<answer>29</answer>", "3 7 8 -> 29", False))  # fmt: skip


# ------------------------------------------------------------------------------------------------- moves and difficulty
N, TOP, LIMIT = 4, 9, 24  # the testbed: four numbers from 1 to 9, no result over 24


@functools.cache
def moves(pool, limit=LIMIT):
    """{(a, op, b): the pool after it} of all moves that the testbed writes: larger number first, results 0 … limit.

    So no two moves differ in their order alone: every choice of operands decides something, other than in the toy."""
    out = {}
    for i, j in itertools.combinations(range(len(pool)), 2):
        rest = [x for at, x in enumerate(pool) if at not in (i, j)]
        for op in "+-*":
            if 0 <= (value := apply(pool[i], op, pool[j])) <= limit:
                out[pool[i], op, pool[j]] = tuple(sorted([value, *rest], reverse=True))
    return out


def random_walk(rng, numbers, limit=LIMIT):
    """A uniform walk over legal moves -> (trace, where it ends). rng: random.Random. No number may be over the limit:
    then a difference is always a move."""
    pool, steps = tuple(sorted(numbers, reverse=True)), []
    while len(pool) > 1:
        (a, op, b), pool = rng.choice(list(moves(pool, limit).items()))
        steps.append(f"{a}{op}{b}={apply(a, op, b)}")
    return " " + ";".join(steps), pool[0]


def countdown_problem(rng, n=N, top=TOP, limit=LIMIT):
    """-> (numbers, trace, target): [3, 8, 7], " 7*3=21;21+8=29", 29. The target is where a random walk ended."""
    numbers = [rng.randint(1, top) for _ in range(n)]
    return numbers, *random_walk(rng, numbers, limit)


def worked_row(rng, n=3, top=12, limit=99):
    """A problem in TinyZero's columns and a solution for sft in its form, one line a step: what
    `python -m lib.countdown COUNT` writes. No step's number is over limit."""
    numbers, trace, target = countdown_problem(rng, n, top, limit)
    made, lines = [(str(x), str(x)) for x in numbers], []  # number, the expression that it came from
    for step in trace.strip().split(";"):
        a, op, b, value = STEP.fullmatch(step).groups()
        (_, left), (_, right) = (made.pop(next(i for i, m in enumerate(made) if m[0] == x)) for x in (a, b))
        lines.append(f"{a} {op} {b} = {value}\n")
        made.append((value, f"({left} {op} {right})"))
    answer = made[0][1][1:-1]  # without its outer brackets
    return {"nums": numbers, "target": target,
            "solution": f"<think>\n{''.join(lines)}</think>\n<answer> {answer} </answer>"}  # fmt: skip


@functools.cache
def walk_ends(pool, limit=LIMIT):
    """{end: probability} of a uniform walk over legal moves from a pool, largest number first."""
    if len(pool) == 1:
        return {pool[0]: 1.0}
    ends, legal = Counter(), moves(pool, limit)
    for after in legal.values():
        for end, p in walk_ends(after, limit).items():
            ends[end] += p / len(legal)
    return dict(ends)


if __name__ == "__main__":  # for a real model: so many different problems of three numbers, a line each
    rng, seen = random.Random(0), set()
    while len(seen) < int(sys.argv[1]):
        row = worked_row(rng)
        key = (*sorted(row["nums"]), row["target"])
        if key not in seen:
            print(json.dumps(row))
        seen.add(key)
