"""Rewards: find the answer in a response, compare it with the gold answer, charge what is too long.

Read from top to bottom: text verifiers (dapo, boxed, integer), math_verify, the overlong penalty, the table of all
verifiers with its self-test. A *verifier* is a function (text, gold) -> (correct, answer). text is the response and
never the prompt, whose template contains "Answer: $Answer". answer is what was compared with the gold answer: sample
logs show it, majority votes count it. A *verdict* is (reward, correct, answer), and its reward is +1.0 or -1.0.
"""

import logging
import math
import re
from dataclasses import replace

# ---------------------------------------------------------------------------------------------------- text verifiers
# These compare text and do no mathematics. \boxed{2^{10}} is wrong where 1024 is asked for, on purpose: if restating
# the question earned reward, the policy would learn to restate. They look at a bounded piece of the response, however
# long it is. First I find the answer: it is in an "Answer:" line or in a \boxed{}, whichever the prompt asked for.
INVALID = "[INVALID]"  # the answer of a response in which none was found (verl's word for it)
MAX_ANSWER_CHARS = 1000  # a longer \boxed{} is no answer (the longest of MATH-500 has 159); verdicts are cut here
ANSWER_LINE = re.compile(r"(?i)Answer\s*:\s*([^\n]+)")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # steps over \{ and \}, which group nothing


def last_boxed(text, limit=MAX_ANSWER_CHARS):
    """The inside of the last \\boxed{…}. None without one, if its brace never closes (a response cut short), or if it
    holds more than `limit` characters."""
    _, box, rest = text.rpartition(r"\boxed{")
    depth = 1
    for brace in BRACE.finditer(rest, 0, limit + 1) if box else ():
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return rest[: brace.start()]
    return None


# Then I compare it with the gold answer. They are the same if their normal forms are equal. This is Minerva's normal
# form, odd words included, as verl's math_dapo computes it. The order of the tables matters: "a " goes before " " does,
# and \text{m} becomes the \text{} that the second table removes.
REPLACED = (("an ", ""), ("a ", ""), (".$", "$"), (r"\$", ""), ("\\ ", ""), (" ", ""), ("mbox", "text"),
            (r",\text{and}", ","), (r"\text{and}", ","), (r"\text{m}", r"\text{}"))  # fmt: skip
REMOVED = ("square", "ways", "integers", "dollars", "mph", "inches", "hours", "km", "units", r"\ldots", "sue", "points",
           "feet", "minutes", "digits", "cents", "degrees", "cm", "gm", "pounds", "meters", "meals", "edges",
           "students", "childrentickets", "multiples", r"\text{s}", r"\text{.}", "\\text{\ns}", r"\text{}^2",
           r"\text{}^3", "\\text{\n}", r"\text{}", r"\mathrm{th}", r"^\circ", r"^{\circ}", r"\;", r",\!", "{,}", '"',
           r"\dots")  # fmt: skip
# (A dot matches anything but a newline, so an answer of several lines is treated line by line.)
PATTERNS = ((r".*?\$(.*?)\$.*", r"$\1$"), (r"\\text\{(.*?)\}", r"\1"), (r"\\textbf\{(.*?)\}", r"\1"),
            (r"\\overline\{(.*?)\}", r"\1"), (r"\\boxed\{(.*)\}", r"\1"), (r"frac([^{])(.)", r"frac{\1}{\2}"),
            (r"sqrt([^{])", r"sqrt{\1}"))  # fmt: skip


def normalise(answer):
    """Minerva's normal form of an answer. Source: verl, math_dapo.py."""
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


def dapo(text, gold):
    """verl's math_dapo: the last "Answer:" line within the last 300 characters."""
    found = ANSWER_LINE.findall(text[-300:])
    answer = normalise(found[-1]) if found else INVALID
    return answer == normalise(gold), answer


def boxed(text, gold, form=normalise):
    """The last \\boxed{}, in the same normal form. An empty box is no answer."""
    inside = last_boxed(text)
    answer = form(inside) if inside else INVALID
    return bool(inside) and answer == form(gold), answer


def integer(text, gold):
    """boxed, where 073, (73) and 73.0 are 73, too."""
    return boxed(text, gold, integer_form)


# ------------------------------------------------------------------------------------------------------- math_verify
# Symbolic equality, by the library math-verify, for benchmarks whose golds are formulas. In training it pays for
# restatements, and a run that trains with it says so. The library alone misjudges some golds of the benchmarks. Most of
# what follows is there for them, and each has a test.

# 58 of Minerva's 272 golds look like 4.5e33. The library takes that for 4.5 e 33, and so \boxed{4.5 \times 10^{33}} for
# wrong. Two more are -1./3 and -3./2, one is np.arcsin(10/13). So I write Python's numbers as LaTeX.
PYTHON_NUMBERS = ((re.compile(r"(?<![\w.])(\d++(?:\.\d*+)?)[eE]([+-]?\d+)(?!\w)"), r"\1 \\times 10^{\2}"),
                  (re.compile(r"(?<=\d)\.(?=/)"), ""), (re.compile(r"\bnp\.(?=[a-z])"), r"\\"))  # fmt: skip
# Behind a box I take only a line that starts with it, not "\boxed{44}. We check our answer: 17 x 44 = 748".
OWN_ANSWER_LINE = re.compile(r"(?im)^\W*(?:final )?Answer\s*:\s*([^\n]+)")
logging.getLogger("math_verify").setLevel(logging.ERROR)  # it would warn that its timeouts are off


def answer_parts(text):
    """What a response calls its answer: [its last "Answer:" line], or the insides of up to ten \\boxed{}, or [].
    Nothing else. The library alone takes any formula: the question's own \\sqrt{242} for the answer 11\\sqrt{2}."""
    box = text.rfind(r"\boxed{")
    line = ANSWER_LINE if box < 0 else OWN_ANSWER_LINE
    said = list(line.finditer(text, max(0, len(text) - 300)))[-1:]
    if said and said[0].start() > box:  # the last word counts, as in `dapo`
        return [said[0][1].strip("* ")]  # **Answer:** 5
    parts = []
    while len(parts) < 10 and (inside := last_boxed(text)) is not None:
        parts, text = [inside, *parts], text.rpartition(r"\boxed{")[0]
    return parts


def read_latex(latex, units=True):
    """What the library reads: [expression, its LaTeX], [LaTeX] where sympy cannot hold it, or []. units: whether last
    letters are dropped as a unit."""
    from math_verify import LatexExtractionConfig, parse

    # LaTeX only: the library's expression config would call sympy's parse_expr, an eval, on model text. Its timeouts
    # are off, here and in verify: they are signals, which C code does not heed.
    config = LatexExtractionConfig()
    config = replace(config, normalization_config=replace(config.normalization_config, units=units))
    return parse(rf"\boxed{{{latex}}}", [config], parsing_timeout=None)


def far_apart(gold, answer):
    """Whether two numbers near 0 differ by more than 0.1 %. To the library, which takes differences below 1e-15 for 0,
    2.9e-19 would be right where 1.3e-27 is asked for, and 20 golds of Minerva are below 1e-3."""
    try:
        gold, answer = float(gold), float(answer)
    except (TypeError, ValueError, OverflowError):  # not numbers
        return False
    rounding = 0.0 if gold else 1e-15  # \sin(\pi) is 1e-16
    return abs(gold) < 1e-3 and not math.isclose(gold, answer, rel_tol=1e-3, abs_tol=rounding)


def math_verify_verdict(text, gold):
    """Symbolic equality. answer is the LaTeX that the library read, INVALID if that is no mathematics. There is no time
    limit in here. Training and evaluation go through lib/pool.py, which has one."""
    from math_verify import verify

    parts, gold = answer_parts(text), last_boxed(gold) or gold
    if not parts:
        return False, INVALID
    for pattern, latex in PYTHON_NUMBERS:
        parts, gold = [pattern.sub(latex, p) for p in parts], pattern.sub(latex, gold)
    # The gold is right in any of its readings. Its last letters may be a unit (37/4 m) or a symbol (t/m).
    golds, symbols = read_latex(gold), read_latex(gold, units=False)
    golds += symbols if symbols[-1:] != golds[-1:] else []
    # Where sympy cannot hold it, "m_{\max} = n^2-n-1", it is also what stands behind the "=".
    if "=" in gold and all(isinstance(g, str) for g in golds):
        golds += read_latex(gold.rpartition("=")[2].strip(" $"))
    # The answer is the last part, or all parts as one list: \boxed{69} or \boxed{84}.
    readings = [read_latex(part) for part in dict.fromkeys((parts[-1], ", ".join(parts)))]
    for answers in readings:
        if verify(golds, answers, timeout_seconds=None) and not far_apart(golds[0], answers[0]):
            return True, str(answers[-1])
    return False, str(readings[0][-1]) if len(readings[0]) > 1 else INVALID


# ------------------------------------------------------------------------------------- penalty, verdict and self-test
def overlong_penalty(length, max_length, buffer, factor=1.0):
    """What an over-long response is charged, in reward units: 0 up to max_length - buffer tokens, then linearly down to
    -factor at max_length and never below. buffer 0 turns it off. Source: DAPO eq. 13. (DAPO-4)"""
    excess = length - (max_length - buffer)
    if buffer == 0 or excess <= 0:
        return 0.0
    return -min(excess / buffer, 1.0) * factor


# To add a verifier, write its function, enter it here, and add right and wrong answers to the self-test.
VERIFIERS = {"dapo": dapo, "boxed": boxed, "integer": integer, "math_verify": math_verify_verdict}
IN_WORKERS = {"math_verify"}  # sympy on model text may hang: lib/pool.py runs these where they can be killed
SELF_TEST = {  # (text, gold, correct)
    "dapo": (
        ("so x = 34.\nAnswer: $34$", "34", True), (r"Answer: \frac12", r"\frac{1}{2}", True),
        ("Answer: 34\nAnswer: 35", "34", False), (r"\boxed{34}", "34", False), (r"Answer: $2^{10}$", "1024", False)),
    "boxed": (
        (r"so \boxed{34}.", "34", True), (r"\boxed{35} or \boxed{\frac{1}{2}}", r"\frac12", True),
        (r"\boxed{34} or \boxed{35}", "34", False), ("Answer: 34", "34", False), (r"\boxed{2^{10}}", "1024", False)),
    "integer": (
        (r"so \boxed{34}.", "34", True), (r"\boxed{\textbf{(034)}}", "34", True), (r"\boxed{1,034}", "1034", True),
        (r"\boxed{0}", "0", True), (r"\boxed{340}", "34", False), (r"\boxed{34.5}", "34", False), ("34", "34", False)),
    "math_verify": (
        (r"so \boxed{34}.", "34", True), (r"\boxed{0.5}", r"\frac{1}{2}", True), (r"\boxed{(1+x)x}", "x^2+x", True),
        (r"\boxed{35}", "34", False), ("so $34$", "34", False), (r"\boxed{-x}", "x", False)),
}  # fmt: skip


def check_verifier(verifier):
    """Raises ValueError, naming the config key, unless `verifier` is one of VERIFIERS."""
    if verifier not in VERIFIERS:
        raise ValueError(f"verifier: unknown {verifier!r}, choose one of {', '.join(VERIFIERS)}")


def verdict(text, gold, verifier="dapo"):
    """The verdict (reward, correct, answer) on one response, in this process. ValueError: no such verifier."""
    check_verifier(verifier)
    correct, answer = VERIFIERS[verifier](text, gold)
    return (1.0 if correct else -1.0), correct, answer[:MAX_ANSWER_CHARS]


def self_test(verifier, pool):
    """Grade known answers through the pool at the start of a run: a changed library can make every reward -1 and say
    nothing. RuntimeError names a misjudged answer. ValueError: no such verifier, or one without a self-test."""
    check_verifier(verifier)
    cases = SELF_TEST.get(verifier, ())
    if {correct for _, _, correct in cases} != {True, False}:
        raise ValueError(f"verifier: {verifier} has no self-test: add right and wrong answers to reward.SELF_TEST")
    verdicts, _ = pool.verdicts([(text, gold) for text, gold, _ in cases], verifier)
    for (text, gold, expected), (_, correct, answer) in zip(cases, verdicts, strict=True):
        if correct != expected:
            said, truth = ("right", "wrong") if correct else ("wrong", "right")
            raise RuntimeError(f"verifier {verifier!r} misjudged {text!r} against gold {gold!r}: it read {answer!r} "
                               f"and said {said}, which is {truth}. Not starting.")  # fmt: skip
