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
ANSWER = timedelta(seconds=60)  # of the store
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

    met = False  # whether the ranks have met: from then on they hear of each other
    own = '[0, "start", 0]'  # of this rank: places it has been in, name of the present one, seconds there
    ranks = {}  # everybody's last one
    ask, asked = 0, 0  # requests for stacks: of this rank, not yet passed on; of all ranks, as last seen


def start():
    """Start to watch this rank, and to hear SIGUSR1. From the main thread, once a process."""
    out, into = os.pipe()
    os.set_blocking(into, False)
    signal.signal(signal.SIGUSR1, lambda *_: None)
    signal.siginterrupt(signal.SIGUSR1, False)
    signal.set_wakeup_fd(into, warn_on_full_buffer=False)  # written to at once, even in the middle of a C call
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    threading.Thread(target=watch, args=(out, rank, world), daemon=True).start()
    if world > 1:  # a thread of its own: a call to the store of a node that is gone may never return
        threading.Thread(target=exchange, args=(rank, world), daemon=True).start()


def watch(signals, rank, world):
    """Print what is to be said, end the process when a rank is lost. signals: the pipe on which their numbers come."""
    last = {r: ("", 0) for r in range(world)}  # of each rank: its last sign, and at which tick it came
    ticks, answered, spoken, told = 0, 0, -SPEAK, None
    while True:
        asks = bool(select.select([signals], [], [], TICK)[0]) and signal.SIGUSR1 in os.read(signals, 4096)
        ticks += Signs.met  # no clock: a job that was suspended as a whole has lost nobody
        count, name, since = place
        now = time.monotonic()
        Signs.own = json.dumps([count, name, now - since])

        signs = Signs.ranks
        places = {r: json.loads(sign) for r, sign in signs.items()}
        if rank == min(furthest(places), default=None):  # one of those that wait speaks for all
            if min(now - since, now - spoken) > SPEAK:
                spoken = now
                say(report(places))
            if now - since > STACKS and told != since:
                told, asks = since, True
        Signs.ask += asks
        if asks or Signs.asked > answered:
            answered = Signs.asked + asks
            print_stack(rank, name, now - since)

        last |= {r: (sign, ticks) for r, sign in signs.items() if sign != last[r][0]}
        if lost := [r for r, (_, tick) in last.items() if (ticks - tick) * TICK > LOST and r != rank]:
            store = ", or torchrun on the first node, through which ranks speak, is gone" * (len(lost) == world - 1)
            say(f"rank {rank}: no sign of life of {names(lost)} for {LOST / 60:.0f} min{store}. This rank ends. A "
                "training run goes on from its last checkpoint with the same command")  # fmt: skip
            sys.stdout.flush()
            os._exit(1)


def exchange(rank, world):
    """Tell the other ranks this one's sign, and get theirs, through the store that they met at."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    while True:
        time.sleep(TICK)
        if not Signs.met:
            continue
        try:
            store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=ANSWER)
            # no restart count in the name: the agent of each node has a count of its own
            store = dist.PrefixStore(f"watch/{os.environ.get('TORCHELASTIC_RUN_ID', '')}", store)
            before = store.add("asked", 0)  # of an earlier start
            while True:
                asking, Signs.ask = Signs.ask, 0
                store.set(str(rank), Signs.own)
                Signs.asked = store.add("asked", asking) - before
                Signs.ranks = {r: store.get(str(r)) for r in range(world)}
                time.sleep(TICK)
        except RuntimeError:  # the first node, where the store is, is busy or gone
            pass


def furthest(places):
    """Which ranks have been in the most places: all others are missing there."""
    return [r for r, (count, _, _) in places.items() if count == max(c for c, _, _ in places.values())]


def report(places):
    """One line on who waits for whom. places: {rank: [places it has been in, name, seconds there]}."""
    there = furthest(places)
    late = {r: p for r, p in places.items() if r not in there}
    _, name, seconds = places[min(there)]
    missing = "; ".join(f"rank {r} has been in {where} for {s / 60:.1f} min" for r, (_, where, s) in late.items())
    missing = f"missing: {missing}" if late else "nobody is missing"
    says = f"{names(there)} {'has' if len(there) == 1 else 'have'} been in {name} for {seconds / 60:.1f} min"
    return f"{says}, {missing} (kill -USR1 {os.getpid()}: all stacks)"


def print_stack(rank, name, seconds):
    stack = traceback.format_stack(sys._current_frames()[threading.main_thread().ident])
    say(f"rank {rank} has been in {name} for {seconds:.0f} s\n{''.join(stack)}")


def names(ranks):
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, sorted(ranks)))


def say(text):
    """In one write, so that ranks do not mix lines."""
    sys.stderr.write(text.rstrip() + "\n")
    sys.stderr.flush()
