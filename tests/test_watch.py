"""lib/watch.py, with real gloo ranks: who is missing, stacks on SIGUSR1 and before the limit, ranks that are gone."""
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import LAUNCHER, ROOT, free_port

from lib.watch import report

JOB = """
import os, signal, sys, time
import torch, torch.distributed as dist
from lib import ranks, watch
watch.TICK, watch.SPEAK, watch.LOST = 0.2, 1.0, float(sys.argv[1])
watch.STACKS = float(sys.argv[2])

def linger(seconds):
    time.sleep(seconds)

def main():
    if os.environ.get("RANK") == "1":
        time.sleep(float(os.environ.get("LATE", 0)))
    rank, world, _ = ranks.init_distributed()
    ranks.gather([rank])
    print("up", flush=True)
    for what in sys.argv[3:]:
        with ranks.timed({}, "reward"):
            if rank == world - 1:
                linger(float(what))
        with ranks.timed({}, "update_actor"):
            dist.all_reduce(torch.zeros(1))  # a collective of torch's own, which knows nothing of the watch
    if world == 1:
        dist.destroy_process_group()
    return 0

ranks.leave(main)
"""


def start(world, *args, **more):
    port, env = free_port(), os.environ | more | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    started = []
    for rank in range(world):
        own = dict(zip(LAUNCHER, (str(rank), str(rank), str(world), "127.0.0.1", str(port)), strict=True)) if world > 1 else {}
        started.append(subprocess.Popen([sys.executable, "-c", JOB, *map(str, args)], stdout=subprocess.PIPE, env=env | own,
                                        stderr=subprocess.STDOUT, text=True))  # fmt: skip
    return started


def up(started):
    """Wait until all have met."""
    for p in started:
        assert p.stdout.readline() == "up\n", p.stdout.read()


def end(started, seconds=30):
    try:
        return [p.communicate(timeout=seconds)[0] for p in started], [p.returncode for p in started]
    finally:
        for p in started:
            p.kill()


def test_who_waits_says_who_is_missing_and_all_goes_on():
    started = start(3, 99, 99, 2.5, 0.1)
    up(started)
    said, codes = end(started)
    assert codes == [0, 0, 0] and said[1] == said[2] == "", "one rank speaks for all"
    found = re.findall(r"ranks 0, 1 have been in update_actor for 0.0 min, missing: rank 2 has been in reward for 0.0 min \(kill -USR1 (\d+)", said[0])
    assert found and 1 <= len(found) <= 3 and {int(pid) for pid in found} == {started[0].pid}


@pytest.mark.slow
def test_a_signal_to_one_rank_prints_the_stacks_of_all_even_inside_a_collective():
    started = start(3, 99, 99, 3)
    up(started)
    time.sleep(0.5)
    started[1].send_signal(signal.SIGUSR1)
    said, codes = end(started)
    assert codes == [0, 0, 0]
    for rank, text in enumerate(said):
        where, line = ("reward", "in linger") if rank == 2 else ("update_actor", "in all_reduce")
        assert re.search(rf"^rank {rank} has been in {where} for [0-3] s$", text, re.M) and text.count("in main\n") == 1, text
        assert line in text


@pytest.mark.slow
def test_stacks_come_unasked_before_the_limit_of_a_collective():
    started = start(2, 99, 1.2, 2.5)
    up(started)
    said, codes = end(started)
    assert codes == [0, 0] and "in all_reduce" in said[0] and "in linger" in said[1], said
    assert [text.count("in main\n") for text in said] == [1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("gone", [0, 1])
def test_a_rank_that_is_gone_ends_the_others_with_a_message(gone):
    """Stopped, not killed: gloo sees no closed connection, as with a node that is off. With rank 0 the store is gone."""
    started = start(2, 2.0, 99, 30)
    up(started)
    started[gone].send_signal(signal.SIGSTOP)
    said, code = started[1 - gone].communicate(timeout=40)[0], started[1 - gone].returncode
    started[gone].kill()
    assert code == 1 and f"rank {1 - gone}: no sign of life of rank {gone} for" in said, said


@pytest.mark.slow
def test_a_rank_that_comes_late_and_a_job_that_is_suspended_have_lost_nobody():
    started = start(2, 1.5, 99, 2, LATE="5")
    up(started)
    time.sleep(0.5)
    for what in (signal.SIGSTOP, signal.SIGCONT):
        for p in started:
            p.send_signal(what)
        time.sleep(3)
    said, codes = end(started)
    assert codes == [0, 0] and not any("no sign" in text for text in said), said


def test_a_single_process_has_nobody_to_wait_for_but_prints_its_stack():
    started = start(1, 0.1, 99, 2)
    up(started)
    time.sleep(0.5)
    started[0].send_signal(signal.SIGUSR1)
    (said,), codes = end(started)
    assert codes == [0] and re.match(r"rank 0 has been in reward for [0-2] s\n", said) and "in linger" in said and " min" not in said


def test_the_line_names_all_who_are_behind_or_nobody():
    places = {0: [7, "reward", 400.0], 1: [9, "update_actor", 390.0], 2: [9, "update_actor", 360.0], 3: [6, "gen_base", 420.0]}
    says = "ranks 1, 2 have been in update_actor for 6.5 min, missing: rank 0 has been in reward for 6.7 min; rank 3 has been in gen_base"
    assert report(places).startswith(says)
    everybody = report({r: [3, "gen_base", 300.0] for r in range(2)})
    assert everybody.startswith("ranks 0, 1 have been in gen_base for 5.0 min, nobody is missing (kill")
