"""Waiting that speaks: threads in every rank say where their rank is, and know where the others are.

A collective waits in silence for a rank that is still busy, or dead. After SPEAK seconds in one place one rank names
those that are missing. `kill -USR1` of any rank prints the stacks of all. Shortly before the process group's own limit
they are printed unasked. A rank without a sign of life for LOST seconds, on a node that is gone, ends the others.
"""

import json
import os
import select
import signal
import sys
import threading
import time
import traceback
from datetime import timedelta

import torch.distributed as dist

TICK = 5.0  # seconds between two signs of life
SPEAK, LOST = 300.0, 300.0
LIMIT = timedelta(hours=2)  # of a collective: for another rank's verifiers or long rollout, or the toy's base model
STACKS = LIMIT.total_seconds() - 120  # seconds in one place after which stacks are printed unasked

place = [0, "start", time.monotonic()]  # of this rank: how many places it has been in, the name of this one, since when


def enter(name):
    """Say that this rank is somewhere else now -> the name of the place before."""
    before = place[1]
    place[:] = place[0] + 1, name, time.monotonic()
    return before


class Signs:
    """What two threads share."""

    own = '[0, "start", 0, 0]'  # of this rank: places it has been in, name of the present one, seconds there, ticks
    ranks = {}  # everybody's last one
    ask, asked = 0, 0  # requests for stacks: of this rank, not yet passed on; of all ranks, as last seen


def start():
    """Start the threads, and let them hear SIGUSR1. From the main thread, once a process."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    out, into = os.pipe()
    os.set_blocking(into, False)
    signal.signal(signal.SIGUSR1, lambda *_: None)
    signal.set_wakeup_fd(into, warn_on_full_buffer=False)  # written to at once, even in the middle of a C call
    threading.Thread(target=watch, args=(out, rank, world), daemon=True).start()
    if world > 1:  # a thread of its own: a call to the store of a node that is gone may never return
        threading.Thread(target=exchange, args=(rank, world), daemon=True).start()


def watch(signals, rank, world):
    """Print what is to be said, end the process when a rank is lost. signals: the pipe on which numbers arrive."""
    last = {r: ("", time.monotonic()) for r in range(world)}  # of each rank: its last sign, and when that came here
    ticks, answered, spoken, told = 0, 0, -SPEAK, None
    while True:
        heard = bool(select.select([signals], [], [], TICK)[0]) and signal.SIGUSR1 in os.read(signals, 4096)
        (count, name, since), now, ticks = place, time.monotonic(), ticks + 1
        if now - since > STACKS and told != since:
            told, heard = since, True
        Signs.own, Signs.ask = json.dumps([count, name, now - since, ticks]), Signs.ask + heard
        if heard or Signs.asked > answered:
            answered = Signs.asked + heard
            stack = traceback.format_stack(sys._current_frames()[threading.main_thread().ident])
            say(f"rank {rank}: in {name} for {now - since:.0f} s\n{''.join(stack)}")
        signs = Signs.ranks
        last |= {r: (sign, now) for r, sign in signs.items() if sign != last[r][0]}
        if lost := [r for r, (_, when) in last.items() if now - when > LOST and r != rank]:
            say(f"rank {rank}: no sign of life of {names(lost)} for {LOST / 60:.0f} min, so this rank ends; "
                "the same command goes on from the last checkpoint")  # fmt: skip
            os._exit(1)
        places = {r: json.loads(sign) for r, sign in signs.items()}
        waiting = [r for r, (_, _, seconds, _) in places.items() if seconds > SPEAK]
        if waiting and rank == min(waiting) and now - spoken > SPEAK:
            spoken = now
            say(report(places))


def exchange(rank, world):
    """Tell the other ranks this one's sign, and get theirs, through the store that they met at."""
    where, run = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), os.environ.get("TORCHELASTIC_RUN_ID", "")
    while True:
        try:
            store = dist.TCPStore(*where, is_master=False, wait_for_workers=False)
            store = dist.PrefixStore(f"watch/{run}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
            while True:
                asking, Signs.ask = Signs.ask, 0
                store.set(str(rank), Signs.own)
                Signs.asked = store.add("asked", asking)
                Signs.ranks = {r: store.get(str(r)) for r in range(world)}
                time.sleep(TICK)
        except RuntimeError:  # the first node, where the store is, is busy or gone
            time.sleep(TICK)


def report(places):
    """One line on who waits for whom. places: {rank: [places it has been in, name, seconds there, ticks]}."""
    furthest = max(count for count, *_ in places.values())
    late = {r: p for r, p in places.items() if p[0] < furthest}
    there = places.keys() - late
    _, name, seconds, _ = places[min(there)]
    missing = "; ".join(f"rank {r} is in {p[1]} for {p[2] / 60:.1f} min" for r, p in late.items())
    missing = f"missing: {missing}" if late else "nobody is missing"
    return f"{names(there)} in {name} for {seconds / 60:.1f} min, {missing} (kill -USR1 {os.getpid()}: all stacks)"


def names(ranks):
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, sorted(ranks)))


def say(text):
    """In one write, so that ranks do not mix lines."""
    sys.stderr.write(text.rstrip() + "\n")
    sys.stderr.flush()
