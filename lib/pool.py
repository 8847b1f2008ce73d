"""The pool of verifier processes.

sympy on model text can run for ever inside one C call, deaf to signals, or eat all memory. So it runs in processes that
can be killed and cost nothing to lose. They are no forks of the trainer, as CUDA and vLLM do not survive a fork, and no
spawned copies, which would import torch. Each is this light file: python -m lib.pool SECONDS MIB."""

import contextlib
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

import lib.countdown  # noqa: F401, enters its verifier into the table
from reward import IN_WORKERS, INVALID, check_verifier, verdict

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
COUNTS = ("reward/timeout", "reward/crash", "reward/parse_fail")
START_LIMIT_S = 120.0  # for a worker to come up: half a second of imports, with a slow shared disk in mind
MAX_FAILED_STARTS = 3  # in a row; then something is wrong that another start does not mend
ALARM_MARGIN_S = 1.0  # a worker ends by itself so long after its time is up


class Worker:
    """The parent's end of one worker process: one job at a time, JSON lines over pipes that never block."""

    def __init__(self, timeout_s, memory_mb):
        command, pipe = [sys.executable, "-m", "lib.pool", str(timeout_s), str(memory_mb)], subprocess.PIPE
        # A session of its own: Ctrl-C in the terminal is for the trainer, which wants to finish its step first.
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, bufsize=0, start_new_session=True, cwd=HERE)
        os.set_blocking(self.process.stdin.fileno(), False)
        os.set_blocking(self.process.stdout.fileno(), False)
        self.ready = False  # it says so after its imports, which are not charged to a job
        self.job = None  # index of the response it works on
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
        if (chunk := self.process.stdout.read(65536)) == b"":
            raise EOFError
        self.inbox += chunk or b""
        line, end, self.inbox = self.inbox.rpartition(b"\n")
        return json.loads(line) if end else None


class VerifierPool(contextlib.AbstractContextManager):
    """Verdicts on many responses. Most verifiers run right here, those of reward.IN_WORKERS in `workers` processes that
    stay. Each response has `timeout_s` seconds, from when a worker starts on it, and each worker `memory_mb` MiB of
    address space. A response that breaks a limit is wrong, is counted, and costs one worker, which is replaced.
    Workers end when their pipe closes, so even kill -9 of this process leaves none behind."""

    def __init__(self, workers=2, timeout_s=5.0, memory_mb=1024):
        assert workers >= 1 and timeout_s > 0 and memory_mb >= 1, (workers, timeout_s, memory_mb)
        self.size, self.timeout_s, self.memory_mb = workers, timeout_s, memory_mb
        self.workers, self.failed_starts = [], 0
        self.selector = selectors.DefaultSelector()

    def close(self, *exception):
        """Kill all workers. They hold nothing worth saving, and the next call of `verdicts` starts new ones."""
        for worker in list(self.workers):
            self._remove(worker)

    __exit__ = close

    def verdicts(self, pairs, verifier="dapo"):
        """pairs: (text, gold) each -> the verdicts, in their order, and the counts of responses that ran out of time,
        killed their worker, or held no answer that could be parsed. Raises ValueError for an unknown verifier,
        RuntimeError if no worker can be started."""
        check_verifier(verifier)
        jobs, counts = [(text, gold, verifier) for text, gold in pairs], dict.fromkeys(COUNTS, 0)
        out = self._in_workers(jobs, counts) if verifier in IN_WORKERS else [verdict(*job) for job in jobs]
        counts["reward/parse_fail"] = sum(answer == INVALID for _, _, answer in out)
        return out, counts

    def _in_workers(self, jobs, counts):
        out, todo = [None] * len(jobs), list(reversed(range(len(jobs))))  # popped from the end, so 0 first
        for worker in [w for w in self.workers if w.process.poll() is not None]:
            self._remove(worker)  # died since the last call: no job of ours did that
        try:
            while todo or any(w.job is not None for w in self.workers):
                self._hand_out(jobs, todo)
                pause = min(w.deadline for w in self.workers) - time.monotonic()
                for key, _ in self.selector.select(max(pause, 0.0)):
                    if key.data in self.workers:  # not removed by an earlier event of this round
                        self._on_event(key.fileobj, key.data, out, counts)
                for worker in [w for w in self.workers if w.deadline <= time.monotonic()]:
                    self._on_loss(worker, "timeout", out, counts)
        finally:  # interrupted: a late answer must not be taken for that of the next call's job
            for worker in [w for w in self.workers if w.job is not None]:
                self._remove(worker)
        return out

    def _hand_out(self, jobs, todo):
        """Start the workers that are missing (not more than there is work), and give each idle one a job."""
        busy = sum(w.job is not None for w in self.workers)
        while len(self.workers) < min(self.size, busy + len(todo)):
            self.workers.append(worker := Worker(self.timeout_s, self.memory_mb))
            self.selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
        for worker in self.workers:
            if todo and worker.ready and worker.job is None:
                worker.job = todo.pop()
                worker.outbox = memoryview(json.dumps(jobs[worker.job]).encode() + b"\n")
                worker.deadline = time.monotonic() + self.timeout_s
                self.selector.register(worker.process.stdin, selectors.EVENT_WRITE, worker)

    def _on_event(self, pipe, worker, out, counts):
        if pipe is worker.process.stdin:
            if worker.send():
                self.selector.unregister(pipe)
            return
        try:
            message = worker.receive()
        except EOFError:  # its own alarm may have come first, if this process was held up: that is a timeout, too
            return self._on_loss(worker, "timeout" if worker.deadline <= time.monotonic() else "crash", out, counts)
        if message == "ready":
            worker.ready, worker.deadline, self.failed_starts = True, math.inf, 0
        elif message:
            out[worker.job] = tuple(message)
            worker.job, worker.deadline = None, math.inf

    def _on_loss(self, worker, kind, out, counts):
        """A worker is dead, or out of time: bury it, and call its response wrong. `_hand_out` starts the next one."""
        self._remove(worker)
        if worker.job is not None:
            counts[f"reward/{kind}"] += 1
            out[worker.job] = (-1.0, False, f"[{kind.upper()}]")
        elif not worker.ready:
            self.failed_starts += 1
            if self.failed_starts >= MAX_FAILED_STARTS:
                status = worker.process.returncode
                raise RuntimeError(f"verifier: {self.failed_starts} workers in a row did not start (exit status "
                                   f"{status}); is math-verify installed, and memory_mb={self.memory_mb} enough?")

    def _remove(self, worker):
        worker.process.kill()
        worker.process.wait()
        for pipe in (worker.process.stdin, worker.process.stdout):
            if pipe in self.selector.get_map():
                self.selector.unregister(pipe)
            pipe.close()
        self.workers.remove(worker)


def unread_golds(golds, pool):
    """Those of the (row, gold) that math-verify cannot read as mathematics: answers are compared with them as text."""
    # no answer equals an empty gold, and math-verify leaves none only where \boxed{gold} has no expression
    verdicts, _ = pool.verdicts([(rf"\boxed{{{gold}}}", "") for _, gold in golds], "math_verify")
    return [g for g, v in zip(golds, verdicts, strict=True) if v[2] == INVALID]


def literals_only(code, *namespaces, evaluate):
    """Stands in for sympy's eval of strings in a worker. The library turns number tokens into numbers with it and
    nothing else (seen on 3,000 comparisons of benchmark answers). Should model text ever get that far, it ends here."""
    if not re.fullmatch(r"(Integer|Float|Symbol) \(('[\w.+-]+'|\d+) \)|\w+ ", code):
        raise ValueError("refused to evaluate text")
    return evaluate(code, *namespaces)


def worker_main(timeout_s, memory_mb):
    """One worker: a [text, gold, verifier] JSON line in, a verdict line out, until stdin ends."""
    import resource  # here, because Windows has none; the text verifiers work there

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash here is routine
    try:
        resource.setrlimit(resource.RLIMIT_AS, (memory_mb * 2**20,) * 2)
    except ValueError:  # macOS cannot; a container may already allow less
        print(f"lib.pool: cannot set a memory limit of {memory_mb} MiB, the system's own holds", file=sys.stderr)
    # The replies get stdout for themselves; what libraries print goes nowhere, after the imports their warnings too.
    replies, nowhere = os.fdopen(os.dup(1), "w"), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    verdict(r"\boxed{(1+x)x}", "x^2+x", "math_verify")  # imports all that a comparison needs, and builds its tables
    from sympy.parsing import sympy_parser

    sympy_parser.eval_expr = functools.partial(literals_only, evaluate=sympy_parser.eval_expr)
    os.dup2(nowhere, 2)
    print(json.dumps("ready"), file=replies, flush=True)
    for line in sys.stdin.buffer:
        # If the parent is gone nobody kills us in time, and a worker lost in a power tower never sees the end of
        # stdin. The kernel's alarm ends the process, whatever code it is in.
        signal.setitimer(signal.ITIMER_REAL, timeout_s + ALARM_MARGIN_S)
        reply = verdict(*json.loads(line))
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    worker_main(timeout_s=float(sys.argv[1]), memory_mb=int(sys.argv[2]))
