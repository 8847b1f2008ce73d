"""Rewards: find the answer in a response, compare it with the gold answer, shape over-long responses.

Read from top to bottom: the text verifiers (`dapo`, `boxed`), `math_verify`, the overlong penalty, and VerifierPool,
which keeps a hostile answer such as 9^{9^{9^9}} from taking the trainer down with it. A *verdict* is the tuple
(reward, correct, answer): reward is +1.0 or -1.0, answer is what was compared (for sample logs and majority votes).

Imports nothing of ours and no torch: every pool worker is this very file, started as `python reward.py --worker`.
"""

import functools
import math
import re

VERIFIERS = ("dapo", "boxed", "integer", "math_verify")
INVALID = "[INVALID]"  # the answer of a response in which none was found (verl's word for it)
MAX_ANSWER_CHARS = 1000  # a longer \boxed{} is no answer (the longest of MATH-500 has 159); verdicts are cut here
COUNTS = ("reward/timeout", "reward/crash", "reward/parse_fail")

# ---------------------------------------------------------------------------------------------------------------------
# dapo and boxed: plain text, no mathematics. 1024 against \boxed{2^{10}} is wrong, on purpose: a restatement of the
# question must not earn reward. Both look at a bounded piece of the text, so its length costs nothing.

# Minerva's tables, as verl's math_dapo applies them. The order matters: "a " goes before " " does, and \text{m}
# becomes the \text{} that the second table removes.
REPLACED = (
    ("an ", ""), ("a ", ""), (".$", "$"), (r"\$", ""), ("\\ ", ""), (" ", ""), ("mbox", "text"),
    (r",\text{and}", ","), (r"\text{and}", ","), (r"\text{m}", r"\text{}"),
)  # fmt: skip
REMOVED = (
    "square", "ways", "integers", "dollars", "mph", "inches", "hours", "km", "units", r"\ldots", "sue", "points",
    "feet", "minutes", "digits", "cents", "degrees", "cm", "gm", "pounds", "meters", "meals", "edges", "students",
    "childrentickets", "multiples", r"\text{s}", r"\text{.}", "\\text{\ns}", r"\text{}^2", r"\text{}^3", "\\text{\n}",
    r"\text{}", r"\mathrm{th}", r"^\circ", r"^{\circ}", r"\;", r",\!", "{,}", '"', r"\dots",
)  # fmt: skip
ANSWER_LINE = re.compile(r"(?i)Answer\s*:\s*([^\n]+)")
OWN_ANSWER_LINE = re.compile(r"(?im)^\W*(?:final )?Answer\s*:\s*([^\n]+)")  # not "\boxed{44}. We check our answer: 17 x ..."
PATTERNS = (  # (pattern, replacement); a dot matches anything but a newline, so gold answers are treated line by line
    (r".*?\$(.*?)\$.*", r"$\1$"), (r"\\text\{(.*?)\}", r"\1"), (r"\\textbf\{(.*?)\}", r"\1"),
    (r"\\overline\{(.*?)\}", r"\1"), (r"\\boxed\{(.*)\}", r"\1"),
    (r"frac([^{])(.)", r"frac{\1}{\2}"), (r"sqrt([^{])", r"sqrt{\1}"),
)  # fmt: skip
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # steps over \{ and \}, which group nothing


def normalise(answer):
    """Minerva's normal form of an answer, as verl's math_dapo computes it. Gold answers go through it, too."""
    answer = answer.rpartition("=")[2]
    for old, new in REPLACED:
        answer = answer.replace(old, new)
    for old in REMOVED:
        answer = answer.replace(old, "")
    for pattern, new in PATTERNS:
        answer = re.sub(pattern, new, answer)
    answer = answer.replace("$", "")
    digits = answer.replace(",", "")
    return (digits if digits.isdigit() else answer).strip()


def integer_form(answer):
    """normalise, and other ways to write an integer: 073 (AIME's rules want three digits), (73), 73.0, \\mathbf{73}."""
    plain = re.sub(r"\A\\math(?:bf|rm)\{(.*)\}\Z", r"\1", normalise(answer)).strip("()")
    return re.sub(r"\A(-?)0*(\d+?)(?:\.0*)?\Z", r"\1\2", plain)


def last_boxed(text, limit=MAX_ANSWER_CHARS):
    """The inside of the last \\boxed{…}; None without one, if its brace never closes (a response cut short), or if it
    holds more than `limit` characters."""
    start = text.rfind(r"\boxed{") + len(r"\boxed{")
    if start < len(r"\boxed{"):
        return None
    depth = 1
    for brace in BRACE.finditer(text, start, start + limit + 1):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start : brace.start()]
    return None


# ---------------------------------------------------------------------------------------------------------------------
# math_verify: symbolic equality. For evaluation; in training it pays for restatements.


@functools.cache
def math_verify_library():
    """(parse, parse without unit removal, verify) of the library, imported on first use. LaTeX only: its expression config
    would call sympy's parse_expr, an eval, on model text. Its own timeouts are off: signals, which C code does not heed."""
    import dataclasses
    import logging

    from math_verify import LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # else it warns that its timeouts are off
    plain = LatexExtractionConfig()
    symbols = LatexExtractionConfig(normalization_config=dataclasses.replace(plain.normalization_config, units=False))
    readers = [functools.partial(parse, extraction_config=[c], parsing_timeout=None) for c in (plain, symbols)]
    return *readers, functools.partial(verify, timeout_seconds=None)


# Python's way to write numbers, as LaTeX. 58 of Minerva's 272 golds look like 4.5e33, which the library takes for 4.5 e 33:
# the right \boxed{4.5 \times 10^{33}} would be wrong. Two more are -1./3 and -3./2, one is np.arcsin(10/13).
PYTHON_NUMBERS = (
    (re.compile(r"(?<![\w.])(\d++(?:\.\d*+)?)[eE]([+-]?\d+)(?!\w)"), r"\1 \\times 10^{\2}"),
    (re.compile(r"(?<=\d)\.(?=/)"), ""), (re.compile(r"\bnp\.(?=[a-z])"), r"\\"),
)  # fmt: skip


def far_apart(gold, answer):
    """Whether two numbers near 0 differ by more than 0.1 %. The library compares floats to 6 decimals and takes differences
    below 1e-15 for 0: to it, 0 and 2.9e-19 are right where 1.3e-27 is asked for (20 golds of Minerva are below 1e-3)."""
    try:
        gold, answer = float(gold), float(answer)
    except (TypeError, ValueError, OverflowError):  # not numbers
        return False
    rounding = 0.0 if gold else 1e-15  # \sin(\pi) is 1e-16
    return abs(gold) < 1e-3 and not math.isclose(gold, answer, rel_tol=1e-3, abs_tol=rounding)


def math_verify_verdict(text, gold):
    """(correct, answer) by the math-verify library; answer is the LaTeX it read, INVALID if that is no mathematics.

    Read is an "Answer:" line (after a \\boxed{ only a line that starts so), for the `dapo` prompt; else the last \\boxed{},
    and if that is wrong all of them as one list (\\boxed{69} or \\boxed{84}). Nothing else: left to itself the library takes
    any formula of the response, the question's own \\sqrt{242} for the answer 11\\sqrt{2}. The gold is right in any of its
    readings: as it is; with last letters, which may be a unit (37/4 m) or a symbol (t/m); where sympy cannot hold
    "m_{\\max} = n^2-n-1", behind the "="."""
    parse, parse_symbols, verify = math_verify_library()
    parts, rest = [], text
    box = text.rfind(r"\boxed{")
    said = list((ANSWER_LINE if box < 0 else OWN_ANSWER_LINE).finditer(text, max(0, len(text) - 300)))[-1:]
    if said and said[0].start() > box:  # the last word counts, as for the `dapo` verifier
        parts, rest = [said[0][1].strip("* ")], ""  # **Answer:** 5
    while len(parts) < 10 and (inside := last_boxed(rest)) is not None:
        parts, rest = [inside, *parts], rest[: rest.rfind(r"\boxed{")]
    if not parts:
        return False, INVALID
    if r"\boxed{" in gold:
        gold = last_boxed(gold) or gold
    for pattern, latex in PYTHON_NUMBERS:
        parts, gold = [pattern.sub(latex, p) for p in parts], pattern.sub(latex, gold)
    golds, symbols = parse(rf"\boxed{{{gold}}}"), parse_symbols(rf"\boxed{{{gold}}}")
    golds += symbols if symbols[-1:] != golds[-1:] else []
    if "=" in gold and all(isinstance(g, str) for g in golds):
        golds += parse(rf"\boxed{{{gold.rpartition('=')[2].strip(' $')}}}")
    # each [expression, its LaTeX]; [LaTeX] if sympy cannot hold it, then compared as text; or []
    readings = [parse(rf"\boxed{{{part}}}") for part in dict.fromkeys((parts[-1], ", ".join(parts)))]
    for answers in readings:
        if verify(golds, answers) and not far_apart(golds[0], answers[0]):
            return True, str(answers[-1])
    return False, str(readings[0][-1]) if len(readings[0]) > 1 else INVALID


def check_verifier(verifier):
    """Raises ValueError, naming the config key, unless `verifier` is one of VERIFIERS."""
    if verifier not in VERIFIERS:
        raise ValueError(f"verifier: unknown {verifier!r}, choose one of {', '.join(VERIFIERS)}")


def verdict(text, gold, verifier="dapo"):
    """The verdict (reward, correct, answer) on one response.

    text: the response, never the prompt (whose template contains "Answer: $Answer"). gold: the gold answer as text.
    verifier: "dapo" = verl's math_dapo, the last "Answer:" line within the last 300 characters; "boxed" = the last
    \\boxed{}, normalised the same way; "integer" = boxed, where 073, (73) and 73.0 are 73, too; "math_verify" = symbolic,
    without any time limit in this process (training and evaluation use VerifierPool). Raises
    ValueError for another verifier. Source: verl, math_dapo.py."""
    check_verifier(verifier)
    if verifier == "dapo":
        found = ANSWER_LINE.findall(text[-300:])
        answer = normalise(found[-1]) if found else INVALID
        correct = answer == normalise(gold)
    elif verifier in ("boxed", "integer"):
        form = normalise if verifier == "boxed" else integer_form
        inside = last_boxed(text) or None  # an empty box is no answer
        answer = INVALID if inside is None else form(inside)
        correct = inside is not None and answer == form(gold)
    else:
        correct, answer = math_verify_verdict(text, gold)
    return (1.0 if correct else -1.0), correct, answer[:MAX_ANSWER_CHARS]


def overlong_penalty(length, max_length, buffer, factor=1.0):
    """What an over-long response is charged, in reward units: 0 up to max_length - buffer tokens, then linearly down to
    -factor at max_length and never below. buffer 0 turns it off. Source: DAPO eq. 13. (DAPO-4)"""
    excess = length - (max_length - buffer)
    if buffer == 0 or excess <= 0:
        return 0.0
    return -min(excess / buffer, 1.0) * factor


# ---------------------------------------------------------------------------------------------------------------------
# The pool. sympy on model text can run for ever inside one C call, deaf to signals, or eat all memory. So it runs in
# processes of its own that can be killed and cost nothing to lose: not forks of the trainer (CUDA and vLLM do not
# survive a fork), not a spawned copy of it (that would import torch), but this light file.

SELF_TEST = {  # verifier -> (text, gold, correct)
    "dapo": (
        ("so x = 34.\nAnswer: $34$", "34", True), (r"Answer: \frac12", r"\frac{1}{2}", True),
        ("Answer: 34\nAnswer: 35", "34", False), (r"\boxed{34}", "34", False), (r"Answer: $2^{10}$", "1024", False),
    ),
    "boxed": (
        (r"so \boxed{34}.", "34", True), (r"\boxed{35} or \boxed{\frac{1}{2}}", r"\frac12", True),
        (r"\boxed{34} or \boxed{35}", "34", False), ("Answer: 34", "34", False), (r"\boxed{2^{10}}", "1024", False),
    ),
    "integer": (
        (r"so \boxed{34}.", "34", True), (r"\boxed{\textbf{(034)}}", "34", True), (r"\boxed{1,034}", "1034", True),
        (r"\boxed{0}", "0", True), (r"\boxed{340}", "34", False), (r"\boxed{34.5}", "34", False), ("34", "34", False),
    ),
    "math_verify": (
        (r"so \boxed{34}.", "34", True), (r"\boxed{0.5}", r"\frac{1}{2}", True), (r"\boxed{(1+x)x}", "x^2+x", True),
        (r"\boxed{35}", "34", False), ("so $34$", "34", False), (r"\boxed{-x}", "x", False),
    ),
}  # fmt: skip


def self_test(verifier, pool):
    """Grade known right and wrong answers through the pool, at the start of a run: a changed library can make every
    reward -1 and say nothing. Raises RuntimeError naming a misjudged answer, ValueError for an unknown verifier."""
    check_verifier(verifier)
    cases = SELF_TEST[verifier]
    verdicts, _ = pool.verdicts([(text, gold) for text, gold, _ in cases], verifier)
    for (text, gold, expected), (_, correct, answer) in zip(cases, verdicts, strict=True):
        if correct != expected:
            raise RuntimeError(
                f"verifier {verifier!r} misjudged {text!r} against gold {gold!r}: it read {answer!r} and said "
                f"{'right' if correct else 'wrong'}, which is {'wrong' if correct else 'right'}. Not starting."
            )
