"""reward.py: which answers are right, what over-length costs, and that no answer can hurt the pool."""

import json
import os
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import reward
from lib.pool import ALARM_MARGIN_S, COUNTS, VerifierPool, Worker, literals_only, unread_golds
from reward import INVALID, normalise, overlong_penalty, self_test, verdict

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT.parent / "shared" / "data" / "benchmarks"
RIGHT, WRONG = (1.0, True), (-1.0, False)
TOWER = r"\boxed{9^{9^{9^9}}}"

# ---------------------------------------------------------------------------------------------------------------------
# dapo


@pytest.mark.parametrize(
    "text",
    ["Answer: 34", "Answer: $34$", r"Answer: \boxed{34}", "answer : 34", "Answer: x = 34", "Answer: 34 degrees",
     "Answer:\n34", "Answer: $34$ or $35$"],
)  # fmt: skip
def test_dapo_accepts_the_forms_of_34(text):
    assert verdict("We add them up.\n" + text, "34") == (*RIGHT, "34")


@pytest.mark.parametrize(
    "text",
    ["Answer: 34.", r"Answer: \(34\)", "**Answer:** 34", r"\boxed{34}", "The answer is 34", "Answer: 034",
     "Answer: 34.0", "Answer: 34" + " " * 301, "Answer: 34\n" + "x" * 300, "Answer: 34\nAnswer: 35", "", "Answer:"],
)  # fmt: skip
def test_dapo_rejects_what_verl_rejects(text):
    assert verdict(text, "34")[:2] == WRONG


def test_dapo_drops_the_commas_of_a_number_on_both_sides():
    assert verdict("Answer: 1,234", "1234")[:2] == verdict("Answer: 1234", "1,234")[:2] == RIGHT
    assert verdict("Answer: (1,234)", "(1234)")[:2] == WRONG  # only where nothing but digits and commas is left


def test_dapo_sees_exactly_the_last_300_characters():
    assert verdict("Answer: 34" + "\n" * 290, "34")[1] and not verdict("Answer: 34" + "\n" * 291, "34")[1]


def test_dapo_normalises_the_gold_answer_as_well():
    assert verdict("Answer: 12", "12 cm")[1] and verdict(r"Answer: \frac{1}{2}", r"x = \frac12")[1]


def test_a_response_without_an_answer_line_reads_invalid():
    assert verdict("no idea", "34") == (*WRONG, INVALID)


@pytest.mark.parametrize(
    "before, after",
    [("a = b = 3", "3"), ("an apple", "apple"), ("a pear", "pear"), ("banana split", "banansplit"), ("$5.$", "5"),
     (r"\$5", "5"), (r"5\ 6", "56"), (r"\mbox{ab}", "ab"), (r"x,\text{and}y", "x,y"), (r"x\text{and}y", "x,y"),
     (r"5\text{m}", "5"), (r"5\text{ m}", "5"), ("5 square units", "5"), (r"x,\ldots", "x,"), (r"5\text{ s}", "5"),
     ("5\\text{\ns}", "5"), (r"5\text{m}^2", "5"), (r"7^{\circ}", "7"), (r"7^\circ", "7"), (r"5\mathrm{th}", "5"),
     (r"1{,}000", "1000"), (r"1,\!000", "1000"), ("so $x$ or $y$", "x"), ("one $ only", "oneonly"),
     (r"\textbf{(B)}", "(B)"), (r"\overline{AB}", "AB"), (r"\boxed{\boxed{3}}", r"\boxed{3}"), ("1,2,3", "123"),
     (r"\frac12", r"\frac{1}{2}"), (r"\frac{1}{2}", r"\frac{1}{2}"), (r"\frac123", r"\frac{1}{2}3"),
     (r"\sqrt2", r"\sqrt{2}"), (r"\sqrt{2}", r"\sqrt{2}"), ("x,y", "x,y"), ("\t5 \r", "5"),
     ("aan  x", "x"), (r"\.$5", "5"), (r"\text{x}+\text{y}", "x+y"), (r"\boxed{{1}+2}", "{1}+2")],  # in this order
)  # fmt: skip
def test_normalisation_step_by_step(before, after):
    assert normalise(before) == after


# An oracle written separately, string surgery instead of regexes: slow, plain, one paragraph a step of section 3.
DELETED = [
    *"square ways integers dollars mph inches hours km units".split(" "), "\\ldots",
    *"sue points feet minutes digits cents degrees cm gm pounds meters meals edges".split(" "),
    *"students childrentickets multiples".split(" "),
    *(f"\\text{{{c}}}" for c in ("s", ".", "\ns")), "\\text{}^2", "\\text{}^3", "\\text{\n}", "\\text{}",
    "\\mathrm{th}", "^\\circ", "^{\\circ}", "\\;", ",\\!", "{,}", chr(34), "\\dots",
]  # fmt: skip


def oracle_unwrap(line, command, last):
    """`command`{…} of one line by its inside; the brace that ends it is the next one, or the last of the line."""
    out = ""
    while (start := line.find(command)) >= 0:
        inside = line[start + len(command) :]
        end = inside.rfind("}") if last else inside.find("}")
        if end < 0:
            break
        out, line = out + line[:start] + inside[:end], inside[end + 1 :]
    return out + line


def oracle_shorthand(text, word, n):
    """`word` and n characters, the first no brace and the second no newline: each gets braces of its own."""
    i, out = 0, ""
    while i < len(text):
        arguments = text[i + len(word) :][:n]
        if text.startswith(word, i) and len(arguments) == n and arguments[0] != "{" and "\n" not in arguments[1:]:
            out += word + "".join("{" + c + "}" for c in arguments)
            i += len(word) + n
        else:
            out += text[i]
            i += 1
    return out


def oracle_normalise(text):
    text = text.split("=")[-1]
    for old, new in [("an ", ""), ("a ", ""), (".$", "$"), ("\\$", ""), ("\\ ", ""), (" ", ""), ("mbox", "text"),
                     (",\\text{and}", ","), ("\\text{and}", ","), ("\\text{m}", "\\text{}")]:  # fmt: skip
        text = new.join(text.split(old))
    for old in DELETED:
        text = "".join(text.split(old))
    lines = []
    for line in text.split("\n"):
        if line.count("$") >= 2:
            line = "$" + line.split("$")[1] + "$"
        for command in ("\\text{", "\\textbf{", "\\overline{"):
            line = oracle_unwrap(line, command, last=False)
        lines.append(oracle_unwrap(line, "\\boxed{", last=True))
    text = oracle_shorthand(oracle_shorthand("\n".join(lines), "frac", 2), "sqrt", 1).replace("$", "")
    without = "".join(c for c in text if c != ",")
    return (without if without.isdigit() else text).strip()


PIECES = [
    *DELETED, "an ", "a ", ".$", "\\$", "\\ ", " ", "mbox{", "\\text{and}", "\\text{m}", "\\text{", "\\textbf{",
    "\\overline{", "\\boxed{", "{", "}", "}", "$", "$", "\n", "\r", "\x0b", "\u2028", "=", "frac", "sqrt", "1", "2",
    "x", ",", "\\", "\x00", "\u00b2", "\u0663", "Answer:", "answer :", "An\u017fwer:", ":", "\t", "34",
]  # fmt: skip
NESTED = ["\\text{", "\\textbf{", "\\boxed{", "{", "}", "}", "$", "\n", "frac", "sqrt", "a", "n", " ", "\\", ".", "1"]
TEXTS = st.lists(st.sampled_from(PIECES) | st.sampled_from(NESTED), max_size=12).map("".join)


@settings(max_examples=1500, deadline=None)
@given(TEXTS)
@example("\\text{\\textbf{x}}}")
@example("frac\n1frac1\n")
def test_normalisation_agrees_with_an_oracle_of_string_surgery(text):
    assert normalise(text) == oracle_normalise(text)


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(["", "Answer: ", "answer:\n", "x" * 295]), TEXTS, TEXTS)
def test_dapo_verdict_is_equality_of_the_normal_forms_of_the_last_answer_line(start, text, gold):
    lines = re.findall(r"(?i)Answer\s*:\s*([^\n]+)", (start + text)[-300:])
    answer = oracle_normalise(lines[-1]) if lines else INVALID
    correct = answer == oracle_normalise(gold)
    assert verdict(start + text, gold) == (1.0 if correct else -1.0, correct, answer)


# ---------------------------------------------------------------------------------------------------------------------
# boxed, and what both text verifiers promise


@pytest.mark.parametrize(
    "text, gold, answer",
    [(r"so \boxed{34}.", "34", "34"), (r"\boxed{33}, no, \boxed{34}", "34", "34"),
     (r"\boxed{\frac{1}{2}}", r"\frac12", r"\frac{1}{2}"), (r"\boxed{\text{34} cm}", "34", "34"),
     (r"\boxed{\left\{ x \right.}", r"\left\{x\right.", r"\left\{x\right."), (r"\boxed{\boxed{7}}", "7", "7"),
     (r"$\boxed{1,234}$" + " more" * 500, "1234", "1234"), (r"\boxed{x = 34}", "34", "34")],
)  # fmt: skip
def test_boxed_reads_the_last_box_at_any_distance(text, gold, answer):
    assert verdict(text, gold, "boxed") == (*RIGHT, answer)


@pytest.mark.parametrize("text", ["34", "Answer: 34", r"\boxed{34", r"\boxed{34} or \boxed{3", r"\boxed 34", ""])
def test_boxed_without_a_closed_last_box_reads_invalid(text):
    assert verdict(text, "34", "boxed") == (*WRONG, INVALID)
    assert verdict(text, INVALID, "boxed")[1] is False


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ab{}", max_size=12), st.text(alphabet="ab{}", max_size=12))
def test_last_boxed_matches_braces_as_a_counter_does(before, after):
    depth, inside = 1, None
    for i, char in enumerate(after):
        depth += (char == "{") - (char == "}")
        if depth == 0:
            inside = after[:i]
            break
    assert reward.last_boxed(before + r"\boxed{" + after) == inside


def test_a_box_longer_than_any_answer_is_invalid():
    longest = "7" * reward.MAX_ANSWER_CHARS
    assert verdict(rf"\boxed{{{longest}}}", longest, "boxed")[1]
    assert verdict(rf"\boxed{{{longest}7}}", longest + "7", "boxed") == (*WRONG, INVALID)


@pytest.mark.parametrize("verifier", ["dapo", "boxed"])
@pytest.mark.parametrize("gold, text", [("55", r"\sum_{i=1}^{10} i"), ("1024", "2^{10}"), ("120", r"\binom{10}{3}")])
def test_an_unevaluated_restatement_earns_nothing(verifier, gold, text):
    for form in (rf"\boxed{{{text}}}", rf"Answer: \boxed{{{text}}}", f"Answer: ${text}$", f"Answer: {text}"):
        assert verdict(form, gold, verifier)[:2] == WRONG


def test_text_verifiers_do_not_slow_down_on_a_megabyte():
    slowest = 0.0
    for piece in [*PIECES, "$\n", "\\overline{x", ",\\text{and}", "\\{", "Answer:\n", "Answer: ", "\u202e", "\ud800"]:
        bulk = piece * (1_000_000 // len(piece))
        for text in (bulk, r"\boxed{" + bulk, r"\boxed{" + bulk + "}", "Answer: " + bulk, bulk + "}\nAnswer: " + bulk):
            for verifier in ("dapo", "boxed"):
                start = time.perf_counter()
                assert verdict(text, "no such gold", verifier)[:2] == WRONG
                slowest = max(slowest, time.perf_counter() - start)
    print(f"slowest verdict on 1 MB: {1e3 * slowest:.1f} ms")
    assert slowest < 0.5


@settings(max_examples=300, deadline=None)
@given(st.text(), st.text(), st.sampled_from(["dapo", "boxed"]))
def test_text_verifiers_take_any_unicode(text, gold, verifier):
    for form in (text, "Answer: " + text, r"\boxed{" + text + "}"):
        points, correct, answer = verdict(form, gold, verifier)
        assert points == (1.0 if correct else -1.0) and isinstance(answer, str)


def test_an_unknown_verifier_names_the_key():
    with VerifierPool() as pool:
        for call, *args in ((verdict, "", "", "dappo"), (pool.verdicts, [], "dappo"), (self_test, "dappo", pool)):
            with pytest.raises(ValueError, match="verifier: unknown 'dappo'"):
                call(*args)


# ---------------------------------------------------------------------------------------------------------------------
# overlong shaping


@pytest.mark.parametrize(
    "length, penalty", [(0, 0), (2084, 0), (2085, -0.001953125), (2340, -0.5), (2596, -1), (9999, -1)]
)
def test_overlong_penalty_fixtures(length, penalty):
    print(f"{length} -> {overlong_penalty(length, 2596, 512, 1.0):.5f}")
    assert overlong_penalty(length, 2596, 512, 1.0) == penalty
    assert overlong_penalty(length, 2596, 512, 0.5) == penalty / 2
    assert overlong_penalty(length, 2596, 0, 1.0) == 0


@given(st.integers(0, 5000), st.integers(1, 4000), st.data())
def test_overlong_penalty_falls_monotonically_from_zero_to_minus_factor(length, max_length, data):
    buffer = data.draw(st.integers(1, max_length))
    here, next_one = (overlong_penalty(n, max_length, buffer, 2.0) for n in (length, length + 1))
    assert -2.0 <= next_one <= here <= 0.0
    if length <= max_length:
        assert here == pytest.approx(min(0.0, (max_length - buffer - length) / buffer * 2.0))


# ---------------------------------------------------------------------------------------------------------------------
# math_verify


@pytest.fixture(scope="module")
def pool():
    with VerifierPool(workers=2, timeout_s=20.0) as pool:
        yield pool


EQUAL = [
    (r"\boxed{34}", "34"), (r"\boxed{12}, so \boxed{34}", "34"), (r"\boxed{0.5}", r"\frac{1}{2}"),
    (r"\boxed{x(x+1)}", "x^2+x"), (r"\boxed{\frac{2}{4}}", r"\boxed{\frac12}"), (r"\boxed{(1, 2)}", "(1,2)"),
    (r"\boxed{2^{10}}", "1024"),
]  # fmt: skip
UNEQUAL = [
    (r"\boxed{35}", "34"), (r"\boxed{-x}", "x"), (r"\boxed{(2, 1)}", "(1,2)"), (r"\boxed{34}, no, \boxed{12}", "34"),
    ("34", "34"), ("", "34"), ("$34$", "34"), (r"$34$ \boxed{?}", "34"), (r"$34$ \boxed{34", "34"),
    (r"\boxed{34} \boxed{3", "34"),
]  # fmt: skip


def test_math_verify_judges_the_same_in_this_process_and_in_the_pool(pool):
    verdicts, counts = pool.verdicts(EQUAL + UNEQUAL, "math_verify")
    assert [v[:2] for v in verdicts] == [RIGHT] * len(EQUAL) + [WRONG] * len(UNEQUAL)
    assert verdicts == [verdict(text, gold, "math_verify") for text, gold in EQUAL + UNEQUAL]
    assert counts == {"reward/timeout": 0, "reward/crash": 0, "reward/parse_fail": 6}  # the last six


GOLDS = [  # what math-verify alone would judge otherwise, from real golds: (response, gold, right)
    (r"\boxed{4.5 \times 10^{33}}", "4.5e33", True), (r"\boxed{4.5e33}", "4.5e33", True),
    (r"\boxed{4.5e32}", "4.5e33", False),
    (r"\boxed{\sin(\pi)}", "0", True), (r"\boxed{\sqrt2\sqrt2-2}", "0", True), (r"\boxed{10^{-9}}", "0", False),
    ("step \\boxed{3}.\nAnswer: 5", "5", True), ("Answer: 5, so \\boxed{3}", "5", False),
    # MATH500, row 448
    ("\\boxed{44}.\n\nWe may check our answer: $17\\cdot 44 = 748$, so our answer is correct.", "44", True),
    ("\\boxed{3}?\n\n**Final Answer: 5**", "5", True), ("we find the answer: 5", "5", True),
    ("an open \\boxed{3 first.\nAnswer: 5", "5", True), (r"Answer: $\boxed{5}$", "5", True),
    (r"\boxed{10^{-5}}", "1e-5", True), (r"\boxed{1.04\cdot10^{-3} \text{ cm}}", "1.04e-3", True),
    (r"\boxed{0}", "1.325e-27", False), (r"\boxed{2.88e-19}", "1.325e-27", False),
    (r"\boxed{1.3251e-27}", "1.325e-27", True),
    (r"\boxed{-\frac13}", "-1./3", True), (r"\boxed{\frac13}", "-1./3", False),
    (r"\boxed{\arcsin(10/13)}", "np.arcsin(10/13)", True),
    (r"\boxed{\frac tm}", r"\frac{1}{m} t", True), (r"\boxed{\frac{c}{\sqrt 2}}", r"\frac{1}{\sqrt{2}}c", True),
    (r"\boxed{\frac{37}{4}}", r"\frac{37}{4} m", True), (r"\boxed{\frac{m}{t}}", r"\frac{1}{m} t", False),
    (r"\boxed{n^2-n-1}", r"$m_{\max }=n^{2}-n-1$", True), (r"\boxed{n^2-n}", r"$m_{\max }=n^{2}-n-1$", False),
    (r"\boxed{84, 69}", "$69$,$84$", True), (r"\boxed{69}", "$69$,$84$", False), (r"\boxed{221,8}", "$221,$8$", True),
    (r"\boxed{166\text{ cm}^2}", "$166$", True), ("Answer: 34", "34", True), ("so.\nAnswer: \\frac12", "0.5", True),
    ("Answer: 35", "34", False), (r"\boxed{69} or \boxed{84}", "$69$,$84$", True),
    (r"we simplify $\sqrt{242}$", r"11\sqrt{2}", False),
]  # fmt: skip


@pytest.mark.parametrize(("text", "gold", "right"), GOLDS)
def test_golds_as_the_benchmarks_write_them(text, gold, right):
    assert verdict(text, gold, "math_verify")[1] is right


@pytest.mark.parametrize(
    "answer", ["73", "073", "(73)", "73.0", r"\textbf{(073)}", r"\mathbf{73}", "x = 73", r"73^\circ"]
)
def test_an_integer_may_be_written_like_this(answer):
    assert verdict(rf"\boxed{{{answer}}}", "73", "integer")[1]


@pytest.mark.parametrize("answer", ["730", "-73", "73.5", "7 3 0", "0.73", "74", "{", ""])
def test_another_number_is_another_integer(answer):
    assert not verdict(rf"\boxed{{{answer}}}", "73", "integer")[1]


def test_math_verify_in_this_process_sets_no_signal():
    before, ours = signal.getsignal(signal.SIGALRM), lambda *_: None
    signal.signal(signal.SIGALRM, ours)
    try:
        verdict(r"\boxed{34}", "34", "math_verify")
        assert signal.getsignal(signal.SIGALRM) is ours and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    finally:
        signal.signal(signal.SIGALRM, before)


def test_the_worker_evaluates_number_tokens_only():
    seen = []
    for code in ("Integer (12 )", "Float ('1.5' )", "Symbol ('mu' )", "E "):
        literals_only(code, None, None, evaluate=lambda *a: seen.append(a))
    assert len(seen) == 4
    for code in ("__import__ ('os' )", "eval ('1' )", "E ()", "Integer (eval ('1' ))", "Symbol ('a' ).name", "1 +1 "):
        with pytest.raises(ValueError, match="refused"):
            literals_only(code, None, None, evaluate=lambda *a: seen.append(a))
    assert len(seen) == 4


@pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="needs the benchmark files beside the repository")
def test_math_verify_accepts_gold_answers_of_the_benchmarks(pool):
    golds = []
    for name, key, step in (("math500", "answer", 5), ("olympiadbench", "final_answer", 12), ("aime25", "answer", 3)):
        rows = [json.loads(line)[key] for line in (BENCHMARKS / f"{name}.jsonl").read_text().splitlines()[::step]]
        golds += [str(row[0] if isinstance(row, list) else row) for row in rows]
    verdicts, _ = pool.verdicts([(rf"so it is $\boxed{{{gold}}}$.", gold) for gold in golds], "math_verify")
    misjudged = [gold for gold, verdict in zip(golds, verdicts) if not verdict[1]]
    print(f"{len(golds)} gold answers, {len(misjudged)} misjudged")
    assert len(golds) > 150 and not misjudged


# ---------------------------------------------------------------------------------------------------------------------
# the pool


class TimedPool(VerifierPool):
    """Notes for each job the seconds from its worker's start on it to its verdict, and the worker's peak memory."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seconds, self.peak_mb = {}, []

    def _note(self, worker, step, *args):
        job, began = worker.job, worker.deadline - self.timeout_s
        status = Path(f"/proc/{worker.process.pid}/status")
        peak = re.search(r"VmPeak:\s*(\d+) kB", status.read_text()) if status.exists() else None
        step(*args)
        if job is not None and (worker.job is None or worker not in self.workers):
            self.seconds[job] = time.monotonic() - began
            self.peak_mb.append(int(peak[1]) / 1024 if peak else 0)

    def _on_event(self, pipe, worker, *args):
        self._note(worker, super()._on_event, pipe, worker, *args)

    def _on_loss(self, worker, *args):
        if worker.deadline <= time.monotonic():  # else it comes from _on_event, which notes it
            self._note(worker, super()._on_loss, worker, *args)
        else:
            super()._on_loss(worker, *args)


def hostile_answers(canary):
    """(answer, gold 34) pairs that hang, fill the memory, break the parser, or would run code that creates `canary`."""
    inject = f"__import__('os').system('touch {canary}')"
    million = 1_000_000
    return [
        TOWER, r"\boxed{9^{9^9}}", r"\boxed{" + "2^{" * 10 + "3" + "}" * 11, r"\boxed{9^{-9^{9^{9}}}}",
        r"\boxed{\frac{9^{9^{9}}}{9^{9^{8}}}}", r"\boxed{10^{10^{10}}}", r"\boxed{x = 9^{9^{9^{9}}}!}",
        r"\boxed{x < 9^{9^{9^{9}}}}", r"\boxed{\log_{2}(2^{2^{2^{2^{2^{2}}}}})}", r"\boxed{\sin(10^{10^{8}})}",
        r"\boxed{\lfloor \pi^{\pi^{\pi^{\pi}}} \rfloor}", r"\boxed{7^{7^{7^{7}}} \bmod 10}",
        r"\boxed{1000000000!}", r"\boxed{((20!)!)!}", r"\boxed{100000000!!}", r"\boxed{\gcd(10^{10^6}!, 3^{10^6})}",
        r"\boxed{\binom{1000000000}{500000000}}", r"\boxed{\binom{100000000}{50000000}}",
        r"\boxed{\sum_{i=1}^{10^{9}} i!}", r"\boxed{\prod_{i=1}^{1000000000} (i+\sqrt{i})}",
        r"\boxed{\sum_{i=1}^{10000}\sum_{j=1}^{10000}\frac{1}{i^j+j^i}}", r"\boxed{(a+b+c+d+e+f+g)^{200}}",
        r"\boxed{\int_0^{10} e^{-x^2}\sin(x^3)\ln(x+\sqrt{x^4+1}) dx}",
        r"\boxed{" + r"\sqrt{1+" * 300 + "2" + "}" * 301, r"\boxed{" + r"\frac{1}{1+" * 2000 + "2" + "}" * 2001,
        r"\boxed{" + "(" * 5000 + "1" + ")" * 5000 + "}", r"\boxed{" + "{" * 100_000 + "1" + "}" * 100_001,
        r"\boxed{" * 100_000, r"\boxed{" + "1+" * (million // 2) + "1}", r"\boxed{" + "7" * million + "}",
        r"\boxed{" + r"\frac{1}{2}+" * (million // 12) + "1}", r"\boxed{" + "\\" * million + "}", "$" * million,
        r"\boxed{" + " " * million + "}", "$x$ " * (million // 4), r"\boxed{" + "=".join(["x"] * 20_000) + "}",
        "\x00" * 1000, "\\boxed{3\x004}", "\\boxed{\u202e43\u200d\U0001f600}", "\\boxed{\u0663\u0664}",
        "\\boxed{\ud800}", rf"\boxed{{{inject}}}", rf"\boxed{{\text{{{inject}}}}}", f"${inject}$", f"Answer: {inject}",
        rf"\boxed{{\{{\text{{{inject}}}, 2\}}}}", rf"\boxed{{\mathrm{{eval}}(\text{{{inject}}})}}",
        rf"\boxed{{\operatorname{{exec}}({inject})}}",
    ]  # fmt: skip


def check_hostile(texts, timeout_s, at_least_counted, canary):
    with TimedPool(workers=2, timeout_s=timeout_s, memory_mb=1024) as pool:
        verdicts, counts = pool.verdicts([(text, "34") for text in texts], "math_verify")
        assert [v[:2] for v in verdicts] == [WRONG] * len(texts)
        marks = [v[2] for v in verdicts]
        assert list(counts.values()) == [marks.count(m) for m in ("[TIMEOUT]", "[CRASH]", INVALID)]
        assert sum(counts.values()) >= at_least_counted and counts["reward/timeout"] > 0
        assert len(pool.seconds) == len(texts)
        slowest = max(pool.seconds.values())
        late = [texts[job] for job, s in pool.seconds.items() if s >= timeout_s + 1.0]
        print(f"{len(texts)} hostile answers: {counts}, slowest {slowest:.2f} s, {max(pool.peak_mb):.0f} MiB")
        for _ in range(3 if late else 0):  # other work on the machine stretches any time: late is who is so every time
            pool.seconds.clear()
            pool.verdicts([(text, "34") for text in late], "math_verify")
            late = [late[job] for job, s in pool.seconds.items() if s >= timeout_s + 1.0]
        assert not late
        assert max(pool.peak_mb) <= 1024
        assert pool.verdicts([(r"\boxed{34}", "34")], "math_verify")[0] == [(*RIGHT, "34")]
    assert not canary.exists()


def test_hostile_answers_are_wrong_counted_and_on_time(tmp_path):
    texts = hostile_answers(tmp_path / "canary")
    few = [TOWER, texts[12], texts[16], *texts[-12:]]
    check_hostile(few, timeout_s=0.5, at_least_counted=12, canary=tmp_path / "canary")


@pytest.mark.slow
def test_forty_hostile_answers_are_wrong_counted_and_on_time(tmp_path):
    texts = hostile_answers(tmp_path / "canary")
    assert len(texts) >= 40
    check_hostile(texts, timeout_s=1.0, at_least_counted=36, canary=tmp_path / "canary")


@pytest.mark.parametrize("verifier", ["dapo", "boxed"])
def test_hostile_answers_are_wrong_for_the_text_verifiers_too(verifier, tmp_path):
    texts = hostile_answers(tmp_path / "canary")
    with VerifierPool() as pool:
        verdicts, _ = pool.verdicts([(text, "34") for text in texts], verifier)
        assert not pool.workers
    assert [v[:2] for v in verdicts] == [WRONG] * len(texts) and not (tmp_path / "canary").exists()


def test_verdicts_keep_the_order_of_the_answers(pool):
    pairs = [(rf"\boxed{{{i}}}", str(i if i % 3 else i + 1)) for i in range(60)]
    pairs[0:0] = [(r"\boxed{(x+1)^{12}(x-1)^{12}}", "(x^2-1)^{12}")]  # slow, so that the others overtake it
    verdicts, counts = pool.verdicts(pairs, "math_verify")
    assert verdicts[0][:2] == RIGHT and not any(counts.values())
    assert [(v[1], v[2]) for v in verdicts[1:]] == [(i % 3 != 0, str(i)) for i in range(60)]
    assert pool.verdicts([("Answer: 1", "1"), ("Answer: 1", "2"), ("", "1")], "dapo") == (
        [(*RIGHT, "1"), (*WRONG, "1"), (*WRONG, INVALID)],
        {"reward/timeout": 0, "reward/crash": 0, "reward/parse_fail": 1},
    )


@pytest.mark.parametrize("verifier", reward.VERIFIERS)
def test_an_empty_list_starts_no_worker(verifier):
    with VerifierPool() as pool:
        assert pool.verdicts([], verifier) == ([], dict.fromkeys(COUNTS, 0)) and not pool.workers


def test_text_verifiers_start_no_worker_for_a_step_of_16384_rows():
    rows = [("reason " * 500 + "\nAnswer: $\\frac{1}{2}$", r"\frac12"), ("x" * 3000 + r"\boxed{1,234}", "1234")] * 8192
    with VerifierPool() as pool:
        for verifier in ("dapo", "boxed"):
            verdicts, counts = pool.verdicts(rows, verifier)
            assert sum(v[1] for v in verdicts) == counts["reward/parse_fail"] == 8192
        assert not pool.workers


def test_a_killed_worker_is_a_crash_and_the_pool_lives_on():
    class Assassin(VerifierPool):
        def _on_event(self, pipe, worker, *args):
            super()._on_event(pipe, worker, *args)
            if worker.job == 1 and not worker.outbox:
                worker.process.kill()

    with Assassin(workers=1, timeout_s=20.0) as pool:
        verdicts, counts = pool.verdicts([(r"\boxed{1}", "1"), (TOWER, "1"), (r"\boxed{1}", "1")], "math_verify")
    assert verdicts == [(*RIGHT, "1"), (*WRONG, "[CRASH]"), (*RIGHT, "1")]
    assert counts == {"reward/timeout": 0, "reward/crash": 1, "reward/parse_fail": 0}


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS")
def test_an_answer_that_breaks_the_memory_limit_is_a_crash():
    with VerifierPool(workers=1, timeout_s=20.0, memory_mb=128) as pool:
        pairs = [(r"\boxed{1}", "1"), ("x" * 50_000_000, "1"), (r"\boxed{1}", "1")]
        verdicts, counts = pool.verdicts(pairs, "math_verify")
        limits = resource.prlimit(pool.workers[0].process.pid, resource.RLIMIT_AS)
    assert verdicts == [(*RIGHT, "1"), (*WRONG, "[CRASH]"), (*RIGHT, "1")] and counts["reward/crash"] == 1
    assert limits == (128 * 2**20, 128 * 2**20)


def test_a_worker_that_died_between_calls_costs_no_answer():
    with VerifierPool(workers=2, timeout_s=20.0) as pool:
        pool.verdicts(EQUAL, "math_verify")
        for worker in pool.workers:
            worker.process.kill()
            worker.process.wait()
        verdicts, counts = pool.verdicts(EQUAL, "math_verify")
    assert all(v[1] for v in verdicts) and not any(counts.values())


def test_workers_persist_and_do_not_share_the_terminal_session(pool):
    pool.verdicts(EQUAL, "math_verify")
    before = [w.process.pid for w in pool.workers]
    pool.verdicts(EQUAL, "math_verify")
    assert before and before == [w.process.pid for w in pool.workers][: len(before)]
    assert all(os.getsid(pid) != os.getsid(0) for pid in before)


def test_an_interrupt_leaves_no_stale_verdict_behind():
    class Interrupted(VerifierPool):
        armed = True

        def _on_event(self, pipe, worker, *args):
            super()._on_event(pipe, worker, *args)
            if self.armed and worker.job is not None and not worker.outbox:
                self.armed = False
                raise KeyboardInterrupt

    with Interrupted(workers=1, timeout_s=20.0) as pool:
        with pytest.raises(KeyboardInterrupt):
            pool.verdicts([(r"\boxed{1}", "1")], "math_verify")
        assert not pool.workers
        assert pool.verdicts([(r"\boxed{2}", "2")], "math_verify")[0] == [(*RIGHT, "2")]


def test_close_ends_all_workers_and_may_be_called_twice():
    pool = VerifierPool(workers=2, timeout_s=20.0)
    pool.verdicts(EQUAL, "math_verify")
    processes = [w.process for w in pool.workers]
    pool.close()
    pool.close()
    assert processes and all(p.returncode is not None for p in processes) and not pool.workers


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS")
def test_workers_that_cannot_start_are_an_error_and_no_endless_loop():
    with VerifierPool(workers=1, memory_mb=40) as pool:
        with pytest.raises(RuntimeError, match="3 workers in a row did not start.*memory_mb=40"):
            pool.verdicts([(r"\boxed{1}", "1")], "math_verify")


def test_a_worker_that_never_gets_ready_is_an_error(monkeypatch):
    monkeypatch.setattr("lib.pool.START_LIMIT_S", 0.01)
    with VerifierPool(workers=1) as pool, pytest.raises(RuntimeError, match="did not start"):
        pool.verdicts([(r"\boxed{1}", "1")], "math_verify")


def test_golds_that_are_no_mathematics_are_named(pool):
    golds = [(3, "5"), (4, "$t(0,4]$"), (7, "x=5"), (9, "")]
    assert unread_golds(golds, pool) == [(4, "$t(0,4]$"), (9, "")]


@pytest.fixture
def start_worker():
    started = []

    def start(timeout_s):
        command = [sys.executable, "-m", "lib.pool", str(timeout_s), "1024"]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT))
        assert json.loads(started[-1].stdout.readline()) == "ready"
        return started[-1]

    yield start
    for worker in started:
        worker.kill()
        worker.communicate()


def test_a_worker_ends_when_its_stdin_does(start_worker):
    worker = start_worker(5.0)
    out, _ = worker.communicate(json.dumps([r"\boxed{34}", "34", "math_verify"]) + "\n", timeout=10)
    assert json.loads(out) == [*RIGHT, "34"] and worker.returncode == 0


def test_an_idle_worker_waits_without_an_alarm_and_prints_nothing_but_verdicts(start_worker):
    worker = start_worker(0.1)
    worker.stdin.write(json.dumps([r"\boxed{34}", "34", "math_verify"]) + "\n")
    worker.stdin.flush()
    assert json.loads(worker.stdout.readline()) == [*RIGHT, "34"]
    assert not select.select([worker.stdout], [], [], 0.1 + ALARM_MARGIN_S + 0.5)[0], "it ended"
    if os.path.exists(f"/proc/{worker.pid}/fd"):
        assert [os.readlink(f"/proc/{worker.pid}/fd/{fd}") for fd in (1, 2)] == [os.devnull] * 2


def test_a_worker_lost_in_a_power_tower_ends_by_its_own_alarm(start_worker):
    worker = start_worker(0.2)
    start = time.monotonic()
    worker.communicate(json.dumps([TOWER, "34", "math_verify"]) + "\n", timeout=30)
    assert worker.returncode == -signal.SIGALRM and time.monotonic() - start < 0.2 + 2.0


def test_sending_to_a_dead_worker_and_replies_in_pieces_are_no_trouble():
    worker = Worker(5.0, 1024)
    worker.process.kill()
    worker.process.wait()
    worker.outbox = b"job"
    assert worker.send()
    with pytest.raises(EOFError):
        worker.receive()
    worker.process.stdin.close()
    worker.process.stdout.close()
    pieces = iter([b"[1,", None, b" 2]\n"])
    worker.process = SimpleNamespace(stdout=SimpleNamespace(read=lambda n: next(pieces)))
    assert [worker.receive() for _ in range(3)] == [None, None, [1, 2]]


PARENT = """
import sys
from lib.pool import VerifierPool
class Noisy(VerifierPool):
    def _on_event(self, pipe, worker, *args):
        super()._on_event(pipe, worker, *args)
        if worker.job is not None and not worker.outbox:
            print(worker.process.pid, flush=True)  # it has its job
pool = Noisy(workers=1, timeout_s=2.0)
pool.verdicts([(sys.argv[1], "34")], "math_verify")
print("done", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs pidfd_open to wait for a process that is no child")
@pytest.mark.parametrize("text, limit_s", [(r"\boxed{34}", 1.0), (TOWER, 2.0 + 2.0)])
def test_kill_9_of_the_parent_leaves_no_orphan_idle_or_busy(text, limit_s):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, text], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    worker = os.pidfd_open(int(parent.stdout.readline()))
    try:
        if text != TOWER:
            assert parent.stdout.readline() == "done\n"
        parent.kill()
        parent.communicate()
        assert select.select([worker], [], [], limit_s)[0], "the worker outlived its parent"
    finally:
        os.close(worker)


def test_reward_starts_light():
    heavy = "{'torch', 'transformers', 'sympy', 'math_verify', 'numpy'} & set(sys.modules)"
    code = f"import sys, reward; reward.verdict('Answer: 1', '1'); assert not {heavy}, {heavy}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_no_eval_of_text_in_reward_py():
    source = (ROOT / "reward.py").read_text()
    assert not re.search(r"(?<![\w.])(eval|exec|sympify|parse_expr)\(", source)


# ---------------------------------------------------------------------------------------------------------------------
# the self-test at the start of a run


@pytest.mark.parametrize("verifier", reward.VERIFIERS)
def test_self_test_passes_with_every_verifier(verifier, pool):
    self_test(verifier, pool)


@pytest.mark.parametrize("verifier", reward.VERIFIERS)
def test_self_test_refuses_a_verifier_that_says_always_wrong_or_always_right(verifier):
    class Stuck:
        def verdicts(self, pairs, verifier):
            return [(*self.verdict, "34")] * len(pairs), {}

    for Stuck.verdict, said in ((WRONG, "wrong, which is right"), (RIGHT, "right, which is wrong")):
        message = rf"verifier '{verifier}' misjudged '.*' against gold '.*': it read '34' and said {said}"
        with pytest.raises(RuntimeError, match=message):
            self_test(verifier, Stuck())


def test_a_verifier_without_a_self_test_is_refused_by_what_is_missing(monkeypatch, pool):
    right, wrong = ("34", "34", True), ("35", "34", False)
    monkeypatch.setitem(reward.VERIFIERS, "mine", lambda text, gold: (text == gold, text))
    says = "verifier: mine has no self-test: add right and wrong answers to reward.SELF_TEST"
    for cases in (None, (), (right, right), (wrong,)):  # one that is never right, or always, must not pass
        if cases is not None:
            monkeypatch.setitem(reward.SELF_TEST, "mine", cases)
        with pytest.raises(ValueError) as caught:
            self_test("mine", pool)
        assert str(caught.value) == says
    monkeypatch.setitem(reward.SELF_TEST, "mine", (right, wrong))
    self_test("mine", pool)


NEW_VERIFIER = """

def last_number(text, gold):
    answer = [INVALID, *re.findall(r"-?[0-9]+", text)][-1]
    return answer == gold, answer


VERIFIERS["last_number"] = last_number
"""
NEW_SELF_TEST = 'SELF_TEST["last_number"] = (("so 34.", "34", True), ("34 or 35", "34", False))\n'
NEW_RUN = """
from lib.config import load_config
from lib.pool import VerifierPool
from reward import self_test
(_, cfg), = load_config(["verifier=last_number", "data=x.jsonl"])
with VerifierPool(workers=1, timeout_s=20.0) as pool:
    self_test(cfg.verifier, pool)
    print(pool.verdicts([("it is 7", "7"), ("7 or 8", "7")], cfg.verifier)[0], len(pool.workers))
"""


@pytest.mark.parametrize(
    "added, workers, error",
    [
        (NEW_VERIFIER + NEW_SELF_TEST, 0, None),
        (NEW_VERIFIER + NEW_SELF_TEST + 'IN_WORKERS.add("last_number")\n', 1, None),
        (NEW_VERIFIER, 0, "verifier: last_number has no self-test"),
        (NEW_VERIFIER.replace("gold, answer", "gold[:1], answer") + NEW_SELF_TEST, 0, "misjudged 'so 34.'"),
    ],
    ids=["in this process", "in workers", "no self-test", "misjudged"],
)
def test_a_new_verifier_is_a_function_and_two_entries_in_reward_py(added, workers, error, tmp_path):
    skip = shutil.ignore_patterns(".*", "__pycache__", "runs", "tests", "docs")
    shutil.copytree(ROOT, tmp_path / "fork", ignore=skip)
    with open(tmp_path / "fork/reward.py", "a") as file:
        file.write(added)
    done = subprocess.run([sys.executable, "-c", NEW_RUN], cwd=tmp_path / "fork", capture_output=True, text=True)
    if error:
        assert done.returncode == 1 and error in done.stderr
    else:
        assert done.stdout == f"{[(*RIGHT, '7'), (*WRONG, '8')]} {workers}\n", done.stderr
