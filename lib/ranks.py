"""The process group: its start and end, and the few collectives on Python objects that everything else is made of."""

import contextlib
import os
import sys
import time
import traceback
from collections import Counter

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from lib import watch


def init_distributed():
    """Process group for `python` (a world of one, no port opened) and `torchrun` alike -> (rank, world, device)."""
    rank, local = int(os.environ.setdefault("RANK", "0")), int(os.environ.setdefault("LOCAL_RANK", "0"))
    world = int(os.environ.setdefault("WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        store = {} if "MASTER_ADDR" in os.environ else {"store": dist.HashStore(), "rank": rank, "world_size": world}
        dist.init_process_group("nccl" if cuda else "gloo", timeout=watch.LIMIT, **store)
        watch.Signs.met = world > 1
    return rank, world, device


def leave(main, *args):
    """Run a script's main() and exit with its code.

    One of several ranks skips the interpreter's shutdown. Gloo's threads outlive destroy_process_group (torch 2.13:
    DTensor's caches hold the mesh, that holds the group). One that wants the GIL then ends the process with "terminate
    called without an active exception": 2 of about 180 ranks. A finished run with vLLM on CUDA skips it too. There it
    frees vLLM's memory pools, and in the wrong order that aborts with "pure virtual method called"."""
    watch.start()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        code = main(*args)
        if torch.cuda.is_available() and "vllm" in sys.modules:
            exit_at_once(code)
        sys.exit(code)
    code = 1
    try:
        code = main(*args)
    except SystemExit as e:
        code = e.code
    except BaseException:
        traceback.print_exc()
        watch.say(f"rank {os.environ['RANK']} ended in {watch.place[1]}. If a connection was lost, the lines of the "
                  "other ranks say why")  # fmt: skip
    exit_at_once(code)


def exit_at_once(code):
    """End the process without the interpreter's shutdown."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


@contextlib.contextmanager
def timed(metrics, name):
    """Add the block's seconds to metrics["timing_s/<name>"], the accelerator's queue drained at both ends. None if it
    raises: nothing is logged after that."""
    drain = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    drain()
    start, before = time.perf_counter(), watch.enter(name)
    yield
    drain()
    watch.enter(before)
    key = f"timing_s/{name}"
    metrics[key] = metrics.get(key, 0.0) + time.perf_counter() - start


def gather(items):
    """Every rank's list -> one list, the same on every rank, in rank order. A collective."""
    parts, before = [None] * dist.get_world_size(), watch.enter(f"a meeting of all ranks in {watch.place[1]}")
    dist.all_gather_object(parts, items)
    watch.enter(before)
    return [x for part in parts for x in part]


def gather_sums(counter):
    """Every rank's Counter, added up, the same on every rank. Keys with the sum 0 stay. A collective."""
    out = Counter()
    for part in gather([counter]):
        out.update(part)
    return out


def everywhere(do, error=RuntimeError):
    """do() on this rank (None: nothing to do here), then a word with the others: if it failed on any rank, `error` with
    the reasons on all of them. Without it the rank with the full disk ends, and the others wait for it in the next
    collective. A collective itself."""
    failed, cause = [], None
    try:
        if do:
            do()
    except (Exception, CheckpointException) as e:  # CheckpointException is torch's, and no Exception
        failed, cause = reasons(e), e
    if failed := gather(failed):
        raise error("; ".join(dict.fromkeys(failed))) from cause


def reasons(e):
    """An exception in one line. Of torch's checkpoint exception, which has every rank's traceback, only the causes."""
    causes = [c for c, _ in e.failures.values()] if isinstance(e, CheckpointException) else [e]
    return [" ".join((str(c) if isinstance(c, ValueError) else f"{type(c).__name__}: {c}").split()) for c in causes]


@contextlib.contextmanager
def one_line_errors():
    """Around all that reads what a user gave: a ValueError becomes one line, exit code 2."""
    try:
        yield
    except ValueError as e:
        rank = os.environ.get("RANK", "0")
        print(("" if rank == "0" else f"[rank {rank}] ") + f"error: {e}", file=sys.stderr)
        raise SystemExit(2) from e


def end_group(run):
    """Close the run's tracker and end the process group, all ranks together. Where the engine is vLLM's, its own
    finalizer tears the group down."""
    if run.tracker:
        run.tracker.close()
    dist.barrier()
    if not hasattr(run.engine, "llm"):
        dist.destroy_process_group()
