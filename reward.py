"""Rewards: find the answer in a response, compare it with the gold answer, shape over-long responses.

Read from top to bottom: the text verifiers (`dapo`, `boxed`), `math_verify`, the overlong penalty, and VerifierPool,
which keeps a hostile answer such as 9^{9^{9^9}} from taking the trainer down with it. A *verdict* is the tuple
(reward, correct, answer): reward is +1.0 or -1.0, answer is what was compared (for sample logs and majority votes).

Imports nothing of ours and no torch: every pool worker is this very file, started as `python reward.py --worker`.
"""

import collections
import functools
import json
import math
import os
import re
import selectors
import signal
import subprocess
import sys
import time

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


def last_boxed(text):
    """The inside of the last \\boxed{…}; None without one, if its brace never closes (a response cut short), or if it
    holds more than MAX_ANSWER_CHARS."""
    start = text.rfind(r"\boxed{") + len(r"\boxed{")
    if start < len(r"\boxed{"):
        return None
    depth = 1
    for brace in BRACE.finditer(text, start, start + MAX_ANSWER_CHARS + 1):
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

    Read is an "Answer:" line with no \\boxed{ after it, for the `dapo` prompt; else the last \\boxed{}, and if that is wrong
    all of them as one list (\\boxed{69} or \\boxed{84}). Nothing else: left to itself the library takes any formula of the
    response, the question's own \\sqrt{242} for the answer 11\\sqrt{2}. The gold is right in any of its readings: as it is;
    with last letters, which may be a unit (37/4 m) or a symbol (t/m); where sympy cannot hold "m_{\\max} = n^2-n-1", behind
    the "="."""
    parse, parse_symbols, verify = math_verify_library()
    parts, rest = [], text
    said = list(ANSWER_LINE.finditer(text, max(0, len(text) - 300)))[-1:]
    if said and said[0].start() > text.rfind(r"\boxed{"):  # the last word counts, as for the `dapo` verifier
        parts, rest = [said[0][1]], ""
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


def score(text, gold, verifier="dapo"):
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


def overlong_penalty(length, max_length, buffer, factor):
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

START_LIMIT_S = 120.0  # for a worker to come up: half a second of imports, with a slow shared disk in mind
MAX_FAILED_STARTS = 3  # in a row; then something is wrong that another start does not mend
ALARM_MARGIN_S = 1.0


class Worker:
    """The parent's end of one worker process: one job at a time, JSON lines over pipes that never block."""

    def __init__(self, timeout_s, memory_mb):
        command = [sys.executable, os.path.abspath(__file__), "--worker", str(timeout_s), str(memory_mb)]
        # A session of its own: Ctrl-C in the terminal is for the trainer, which wants to finish its step first.
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True
        )
        os.set_blocking(self.process.stdin.fileno(), False)
        os.set_blocking(self.process.stdout.fileno(), False)
        self.ready = False  # it says so after its imports, which are not charged to a job
        self.job = None  # index of the pair it works on
        self.deadline = time.monotonic() + START_LIMIT_S
        self.outbox = self.inbox = b""

    def send(self):
        """Write what the pipe takes now; True when nothing is left. (A pipe holds 64 kB, a hostile answer 1 MB.)"""
        try:
            self.outbox = self.outbox[self.process.stdin.write(self.outbox) or 0 :]
        except BrokenPipeError:
            self.outbox = b""  # it died: its end of the other pipe will say so
        return not self.outbox

    def receive(self):
        """The next message, None if it is not complete yet. Raises EOFError when the worker is dead."""
        chunk = self.process.stdout.read(65536)
        if chunk == b"":
            raise EOFError
        self.inbox += chunk or b""
        if not self.inbox.endswith(b"\n"):
            return None
        message, self.inbox = json.loads(self.inbox), b""
        return message


class VerifierPool:
    """Scores many responses. The text verifiers run right here; math_verify runs in `workers` persistent processes
    (started on first use), each limited to `timeout_s` seconds a response, counted from when a worker starts on it, and
    to `memory_mb` MiB of address space. A response that breaks a limit is wrong, is counted, and costs one worker,
    which is replaced. Workers end when their pipe closes, so even kill -9 of this process leaves none behind."""

    def __init__(self, workers=2, timeout_s=5.0, memory_mb=1024):
        assert workers >= 1 and timeout_s > 0 and memory_mb >= 1, (workers, timeout_s, memory_mb)
        self.size, self.timeout_s, self.memory_mb = workers, timeout_s, memory_mb
        self.workers, self.failed_starts = [], 0
        self.selector = selectors.DefaultSelector()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self):
        """Kill all workers. They hold nothing worth saving, and the next score_all starts new ones."""
        for worker in list(self.workers):
            self._remove(worker)

    def score_all(self, pairs, verifier="dapo"):
        """pairs: (text, gold) each. Returns the verdicts, in the order of pairs, and the counts of responses that ran
        out of time, killed their worker, or held no answer that could be parsed. Raises ValueError for an unknown
        verifier, RuntimeError if no worker can be started."""
        check_verifier(verifier)
        pairs, counts = list(pairs), dict.fromkeys(COUNTS, 0)
        if verifier == "math_verify":
            verdicts = self._score_in_workers(pairs, counts)
        else:
            verdicts = [score(text, gold, verifier) for text, gold in pairs]
        counts["reward/parse_fail"] = sum(answer == INVALID for _, _, answer in verdicts)
        return verdicts, counts

    def _score_in_workers(self, pairs, counts):
        verdicts, todo = [None] * len(pairs), collections.deque(range(len(pairs)))
        for worker in [w for w in self.workers if w.process.poll() is not None]:
            self._remove(worker)  # died since the last call: no job of ours did that
        try:
            while todo or any(w.job is not None for w in self.workers):
                self._hand_out(pairs, todo)
                pause = min(w.deadline for w in self.workers) - time.monotonic()
                for key, _ in self.selector.select(max(pause, 0.0)):
                    if key.data in self.workers:  # not removed by an earlier event of this round
                        self._on_event(key.fileobj, key.data, verdicts, counts)
                for worker in [w for w in self.workers if w.deadline <= time.monotonic()]:
                    self._on_loss(worker, "reward/timeout", verdicts, counts)
        finally:  # interrupted: a late answer must not be taken for that of the next call's job
            for worker in [w for w in self.workers if w.job is not None]:
                self._remove(worker)
        return verdicts

    def _hand_out(self, pairs, todo):
        """Start the workers that are missing (not more than there is work), and give each idle one a job."""
        busy = sum(w.job is not None for w in self.workers)
        while len(self.workers) < min(self.size, busy + len(todo)):
            worker = Worker(self.timeout_s, self.memory_mb)
            self.workers.append(worker)
            self.selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
        for worker in self.workers:
            if todo and worker.ready and worker.job is None:
                worker.job = todo.popleft()
                worker.outbox = memoryview(json.dumps(pairs[worker.job]).encode() + b"\n")
                worker.deadline = time.monotonic() + self.timeout_s
                self.selector.register(worker.process.stdin, selectors.EVENT_WRITE, worker)

    def _on_event(self, pipe, worker, verdicts, counts):
        if pipe is worker.process.stdin:
            if worker.send():
                self.selector.unregister(pipe)
            return
        try:
            message = worker.receive()
        except EOFError:
            # Its own alarm may have come first, if this process was held up: that is a timeout, too.
            late = worker.deadline <= time.monotonic()
            self._on_loss(worker, "reward/timeout" if late else "reward/crash", verdicts, counts)
            return
        if message is None:
            return
        if worker.job is None:
            worker.ready, self.failed_starts = True, 0
        else:
            verdicts[worker.job] = tuple(message)
        worker.job, worker.deadline = None, math.inf

    def _on_loss(self, worker, kind, verdicts, counts):
        """A worker is dead, or out of time: bury it, and call its response wrong. `_hand_out` starts the next one."""
        self._remove(worker)
        if worker.job is not None:
            counts[kind] += 1
            verdicts[worker.job] = (-1.0, False, f"[{kind.removeprefix('reward/').upper()}]")
        elif not worker.ready:
            self.failed_starts += 1
            if self.failed_starts >= MAX_FAILED_STARTS:
                raise RuntimeError(
                    f"verifier: {self.failed_starts} workers in a row did not start (exit status "
                    f"{worker.process.returncode}); is math-verify installed, and memory_mb={self.memory_mb} enough?"
                )

    def _remove(self, worker):
        worker.process.kill()
        worker.process.wait()
        for pipe in (worker.process.stdin, worker.process.stdout):
            if pipe in self.selector.get_map():
                self.selector.unregister(pipe)
            pipe.close()
        self.workers.remove(worker)


def literals_only(code, *namespaces, evaluate):
    """Stands in for sympy's eval of strings in a worker. The library turns number tokens into numbers with it and
    nothing else (seen on 3,000 comparisons of benchmark answers); should model text ever get that far, it ends here."""
    if not re.fullmatch(r"(Integer|Float|Symbol) \(('[\w.+-]+'|\d+) \)|\w+ ", code):
        raise ValueError("refused to evaluate text")
    return evaluate(code, *namespaces)


def worker_main(timeout_s, memory_mb):
    """One worker: a [text, gold] JSON line in, a verdict line out, until stdin ends."""
    import resource  # here, because Windows has none; the text verifiers work there

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash here is routine
    try:
        resource.setrlimit(resource.RLIMIT_AS, (memory_mb * 2**20,) * 2)
    except ValueError:  # macOS cannot; a container may already allow less
        print(f"reward.py: cannot set a memory limit of {memory_mb} MiB, the system's own holds", file=sys.stderr)
    # The replies get stdout for themselves; what libraries print goes nowhere, after the imports their warnings too.
    replies, nowhere = os.fdopen(os.dup(1), "w"), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    score(r"\boxed{(1+x)x}", "x^2+x", "math_verify")  # imports all that a comparison needs, and builds its tables
    from sympy.parsing import sympy_parser

    sympy_parser.eval_expr = functools.partial(literals_only, evaluate=sympy_parser.eval_expr)
    os.dup2(nowhere, 2)
    print(json.dumps("ready"), file=replies, flush=True)
    for line in sys.stdin.buffer:
        # If the parent is gone nobody kills us in time, and a worker lost in a power tower never sees the end of
        # stdin. The kernel's alarm ends the process, whatever code it is in.
        signal.setitimer(signal.ITIMER_REAL, timeout_s + ALARM_MARGIN_S)
        verdict = score(*json.loads(line), "math_verify")
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(verdict), file=replies, flush=True)


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
    verdicts, _ = pool.score_all([(text, gold) for text, gold, _ in cases], verifier)
    for (text, gold, expected), (_, correct, answer) in zip(cases, verdicts, strict=True):
        if correct != expected:
            raise RuntimeError(
                f"verifier {verifier!r} misjudged {text!r} against gold {gold!r}: it read {answer!r} and said "
                f"{'right' if correct else 'wrong'}, which is {'wrong' if correct else 'right'}. Not starting."
            )


if __name__ == "__main__" and sys.argv[1:2] == ["--worker"]:
    worker_main(timeout_s=float(sys.argv[2]), memory_mb=int(sys.argv[3]))
