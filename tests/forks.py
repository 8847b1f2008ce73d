"""A process that has imported cure.py and forks a copy of itself for every run it is asked for: each run is a process of its
own, to be killed or limited, without the seconds that importing torch takes. One JSON job a line on stdin, one reply a line.

    {"argv": […], "log": file, "ranks": 1, "port": 0, "kill_after": seconds, "kill_at": k, "limit": {"1": bytes},
     "signal_at": 2, "piece": bytes}

kill_after: SIGKILL after that time. kill_at: SIGKILL before the k-th operation on a file of the run. limit: RLIMIT_FSIZE of a
rank. signal_at: SIGTERM to all ranks when that step is described. piece: checkpoint.PIECE. The reply: exit codes
(negative: signals) and seconds."""
import json
import os
import resource
import signal
import sys
import time

import cure
from lib import checkpoint
from tools import analyze

OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree")


def rank_process(job, rank):
    """In the fork: become rank `rank` of the job; does not return."""
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for fd in (1, 2):
        os.dup2(log, fd)
    if job.get("ranks", 1) > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job["ranks"]), MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(job["port"]))  # fmt: skip
    if limit := job.get("limit", {}).get(str(rank)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    checkpoint.PIECE = job.get("piece", checkpoint.PIECE)
    count, out = [0], next(a.removeprefix("out_dir=") for a in job["argv"] if a.startswith("out_dir="))

    def hook(event, args):
        if event in OPERATIONS and args and isinstance(args[0], str) and args[0].startswith(out):
            count[0] += 1
            if count[0] == job.get("kill_at"):
                os.kill(os.getpid(), signal.SIGKILL)

    if rank == 0:
        sys.addaudithook(hook)
    describe = cure.describe

    def and_signal(run, cfg, m):
        if run.state["step"] == job.get("signal_at"):
            os.kill(os.getpid(), signal.SIGTERM)
        return describe(run, cfg, m)

    cure.describe = and_signal
    analyze.curves = lambda out: []                # drawing takes longer than these runs
    code = 1
    try:
        code = cure.main(job["argv"])
        print("operations on the run's files:", count[0])
    except SystemExit as e:
        code = e.code
    except BaseException:
        import traceback
        traceback.print_exc()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


def main():
    for line in sys.stdin:
        job, start = json.loads(line), time.monotonic()
        pids = []
        for rank in range(job.get("ranks", 1)):
            if not (pid := os.fork()):
                rank_process(job, rank)
            pids.append(pid)
        codes, deadline = {}, start + job.get("kill_after", 300)
        while len(codes) < len(pids):
            for pid in set(pids) - codes.keys():
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
                    if codes[pid]:                      # as torchrun does: the others get a moment to end by themselves
                        deadline = min(deadline, time.monotonic() + 20)
                elif time.monotonic() > deadline:
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.005)                           # how exact kill_after is
        reply = {"codes": [codes[p] for p in pids], "seconds": time.monotonic() - start}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
