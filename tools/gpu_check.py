"""Five minutes on a new GPU machine: does what only a GPU runs compute the right numbers, and how fast is it?

    python -m tools.gpu_check                                           # one GPU, the shape of Qwen2.5-0.5B
    torchrun --nproc_per_node 8 -m tools.gpu_check shape=7b             # any number of ranks
    python -m tools.gpu_check shape=toy only=packed_attention,head      # these lines, and the ones they need

Nothing is downloaded: weights are random, shape is toy, 0.5b, 1.5b or 7b (default: 0.5b, toy without a GPU). A line is
PASS, FAIL, NUMBER or LEFT OUT, with what it means, and with what to do if it failed. The file that out names
(gpu_check.json) gets the same with versions, device and command: attach it to an issue. The exit code is 0 if nothing
failed. Any other key=value is the config's. Without a GPU it runs what a CPU can, on vLLM's CPU build if that is
installed. Speeds are of one rank. Temporary files go where TMPDIR says: 16 bytes a parameter, 20 without a GPU.
"""

import faulthandler
import gc
import importlib.util
import inspect
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import NamedTuple

import torch

from lib import toy
from lib.checkpoint import LOGS
from lib.config import HERE, load_config
from lib.files import replace_file
from lib.memory import model_sizes
from lib.ranks import end_group, everywhere, gather, init_distributed, leave, one_line_errors
from lib.run import Run, versions
from lib.weights import load_tokenizer
from tools import bench
from tools import gpu_kernels as kernels
from tools import gpu_parts as parts

PATIENCE = 600  # seconds; a line that takes longer ends the program, with every thread's stack on stderr. A checkpoint
DISK = 4e6  # may take longer by its parameters over this, a second: 16 bytes each at 64 MB/s
LARGE = ["n1=4", "max_prompt_tokens=1024", "max_response_tokens=256", "micro_batch_tokens=16384",
         "activation_checkpointing=true"]  # fmt: skip
SHAPES = {  # settings, all of which the command line can change
    "toy": ["n1=2", "max_prompt_tokens=64", "max_response_tokens=48", "micro_batch_tokens=1024",
            "gpu_memory_utilization=0.2"],  # a larger share would be millions of cache blocks
    "0.5b": LARGE,
    "1.5b": LARGE,
    "7b": LARGE,
}  # fmt: skip
# the learning rate is small: an engine that lacks one step of it must still show
COMMON = ["n2=3", "prompts_per_step=4", "prompts_per_minibatch=4", "lr=1e-4", "warmup=0", "weight_decay=0"]


def environment(run, cfg):
    """torch sees the GPU, it is new enough, and Triton finds what it needs: a C compiler and Python's headers."""
    query, driver = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], "unknown"
    if shutil.which(query[0]) and (lines := subprocess.run(query, capture_output=True, text=True).stdout.split()):
        driver = lines[0]
    if not torch.cuda.is_available():  # an old driver looks like no GPU to torch
        return (parts.LEFT_OUT if driver == "unknown" else False), {"driver": driver, "torch sees": "no GPU"}
    headers = f"{sysconfig.get_paths()['include']}/Python.h"
    major, minor = torch.cuda.get_device_capability()
    found = {"driver": driver, "compiler": shutil.which("gcc") or shutil.which("cc") or "none",
             "headers": headers if os.path.exists(headers) else "none", "capability": f"{major}.{minor}"}  # fmt: skip
    return "none" not in found.values() and major >= 8, found


def clean_exit(run, cfg):
    """A process with engine and trainer ends by itself, with exit code 0. This starts a small one of its own."""
    if run.rank:
        return True, {}
    run.policy = None
    release()
    argv = [sys.executable, "-m", "tools.gpu_check", "shape=toy", "only=trainer_start,wake_and_sync",
            f"engine={cfg.engine}", f"out={run.out}/exit.json"]  # fmt: skip
    env = {k: v for k, v in os.environ.items() if not k.startswith(toy.LAUNCHER)}
    done = subprocess.run(argv, cwd=HERE, env=env, capture_output=True, text=True, timeout=PATIENCE / 2)
    last = {"last line": (done.stderr.strip() or "none").splitlines()[-1]} if done.returncode else {}
    return done.returncode == 0, {"exit code": done.returncode} | last


class Line(NamedTuple):
    check: Callable  # (run, cfg) -> (whether it holds, or a status, {what: number}); its docstring is what it means
    needs: str  # names in NEEDS
    remedy: str  # what to do when it failed


NEEDS = {  # whether it is there, and the line that brings it
    "GPU": (lambda run: torch.cuda.is_available(), None),
    "engine": (lambda run: run.engine, "engine_start"),
    "trainer": (lambda run: run.policy, "trainer_start"),
    "awake_engine": (lambda run: run.engine and run.engine.ready, "wake_and_sync"),
    "sampled_rows": (lambda run: run.gap, "logprob_gap"),
    "update_peaks": (lambda run: run.peaks, "update"),
}
WRONG = "Do not train: losses would look normal. Are versions those of requirements.txt? Open an issue."
ROOM = "Is another process on the GPU? Lower gpu_memory_utilization or micro_batch_tokens, and open an issue."
RUNNER = "Set VLLM_USE_V2_MODEL_RUNNER=0. If the line passes then, train with it. Open an issue."
ENGINE = f"An error: {RUNNER} No room: {ROOM}"
LINES = [
    Line(environment, "", "Driver 580 or newer, apt install gcc python3-dev, capability 8.0 or more."),
    Line(kernels.packed_attention, "", WRONG),
    Line(kernels.empty_sequences, "", f"Leave compile off. {WRONG}"),
    Line(kernels.causal_alignment, "GPU", "Set packing=flat: branches need such attention. Open an issue."),
    Line(kernels.fp32_logits, "", WRONG),
    Line(kernels.head, "", WRONG),
    Line(parts.engine_start, "", ENGINE),
    Line(parts.trainer_start, "", "Out of memory: more ranks. Killed without a word: the host has too little memory."),
    Line(parts.sharded_gradient, "trainer", f"{WRONG} If it passes on one rank: set NCCL_DEBUG=INFO."),
    Line(parts.wake_and_sync, "engine trainer", ENGINE),
    Line(parts.greedy_tokens, "awake_engine trainer", RUNNER),
    Line(parts.logprob_gap, "awake_engine trainer", RUNNER),
    Line(parts.same_seed_twice, "awake_engine", RUNNER),
    Line(parts.generation_speed, "awake_engine", RUNNER),
    Line(parts.logprob_pass_speed, "awake_engine trainer", ROOM),
    Line(parts.engine_sleep, "engine trainer", ROOM),
    Line(parts.skipped_sync, "engine trainer sampled_rows", f"Do not train: the engine lacks weights. {RUNNER}"),
    Line(parts.save_and_resume, "trainer", "A full disk: set TMPDIR. Else never resume a run here, and open an issue."),
    Line(parts.update, "", f"Out of memory: lower micro_batch_tokens. Else: {WRONG}"),
    Line(parts.update_checkpointed, "", f"Out of memory: lower micro_batch_tokens. Else: {WRONG}"),
    Line(parts.update_compiled, "GPU", "Leave compile off: nothing else needs it. Open an issue."),
    Line(parts.peak_memory, "GPU update_peaks", "The plan is wrong: lower micro_batch_tokens. Open an issue."),
    Line(clean_exit, "", "A run is complete all the same, but a scheduler takes it for failed. Open an issue."),
]


# ------------------------------------------------------------------------------------------------------------ one line
def release():
    """Give back what the last line left on the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def outcome(line, run, cfg):
    """Run one line -> (status, numbers, note), the same on every rank: if it failed on one, its. A collective."""
    lacking = gather([need for need in line.needs.split() if not NEEDS[need][0](run)])
    if lacking:
        return parts.LEFT_OUT, {}, "no " + lacking[0].replace("_", " ")
    try:
        holds, numbers = line.check(run, cfg)
        # JSON knows no nan
        numbers = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in numbers.items()}
        mine = holds if isinstance(holds, str) else "PASS" if holds else "FAIL", numbers, ""
    except Exception as e:  # the others go on
        traceback.print_exc()
        mine = "FAIL", {}, traceback.format_exception_only(e)[-1].strip().splitlines()[-1]
    release()
    everyone = gather([mine])
    rank, worst = next(((i, x) for i, x in enumerate(everyone) if x[0] == "FAIL"), (0, everyone[0]))
    return worst if rank == 0 else (*worst[:2], f"rank {rank} {worst[2]}")


def shown(value):
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def show(row):
    """A row of the table: status, name, numbers and seconds; what it means; what to do."""
    numbers = ", ".join(f"{k} {shown(v)}" for k, v in row["numbers"].items())
    text = "; ".join(filter(None, [row["note"], numbers]))
    out = [f"{row['status']:8}  {row['name']:19}  {text}  ({row['seconds']:.1f} s)", f"{'':10}{row['means']}"]
    return "\n".join(out + ([f"{'':10}DO: {row['do']}"] if row["status"] == "FAIL" else []))


def run_lines(run, cfg, only, write):
    """All lines, or those in `only` and what they need -> how many failed. write(rows) after each. A collective."""
    wanted, rows = set(only), []
    for line in reversed(LINES):
        if line.check.__name__ in wanted:
            wanted |= {NEEDS[need][1] for need in line.needs.split()}
    for line in LINES:
        name = line.check.__name__
        if only and name not in wanted:
            continue
        patience = PATIENCE + model_sizes(run.config).params / DISK
        faulthandler.dump_traceback_later(patience, exit=True, file=sys.__stderr__)
        start = time.perf_counter()
        status, numbers, note = outcome(line, run, cfg)
        faulthandler.cancel_dump_traceback_later()
        means, seconds = " ".join(inspect.getdoc(line.check).split()), time.perf_counter() - start
        rows.append({"status": status, "name": name, "note": note, "numbers": numbers, "seconds": seconds,
                     "means": means, "do": line.remedy})  # fmt: skip
        if run.rank == 0:
            print(show(rows[-1]), flush=True)
            write(rows)
    return sum(row["status"] == "FAIL" for row in rows)


# --------------------------------------------------------------------------------------------------------------- start
def arguments(argv):
    """Command line -> (shape, names of lines, output file, Config). ValueError names the key."""
    own = {"shape": "0.5b" if torch.cuda.is_available() else "toy", "only": "", "out": "gpu_check.json"}
    own |= dict(a.split("=", 1) for a in argv if a.split("=")[0] in own and "=" in a)
    only, names = list(filter(None, own["only"].split(","))), [line.check.__name__ for line in LINES]
    if own["shape"] not in SHAPES:
        raise ValueError(f"shape: must be one of {', '.join(SHAPES)}, got {own['shape']!r}")
    if unknown := [name for name in only if name not in names]:
        raise ValueError(f"only: no line {unknown[0]!r}; there are {', '.join(names)}")
    if not os.path.isdir(os.path.dirname(os.path.abspath(own["out"]))):
        raise ValueError(f"out: no such folder: {os.path.dirname(own['out'])}")
    engine = ["engine=vllm"] if importlib.util.find_spec("vllm") else []  # on a CPU as well
    rest = [a for a in argv if a.split("=")[0] not in own or "=" not in a]
    (_, cfg), *_ = load_config([*COMMON, *SHAPES[own["shape"]], *engine, *rest], usage=__doc__)
    return own["shape"], only, own["out"], cfg


def prepare(cfg, shape, folder, rank, world, device):
    """A model of this shape with random weights in `folder` -> Run, with nothing started. A collective.

    The usual start makes all tokens about as likely, and nothing would show. Here every block adds about as much as its
    input, and the last norm makes logits some 3 nats wide."""
    run = Run([("gpu_check", cfg)], rank, world, device)
    run.path, run.out, run.gap, run.norm, run.peaks = f"{folder}/model", f"{folder}/run", None, None, {}
    run.config = toy.toy_config() if shape == "toy" else bench.shape_config(shape)

    run.config.initializer_range = run.config.hidden_size**-0.5

    def write():
        bench.random_model(run.config, run.path, device, last_norm=3.0)
        os.makedirs(f"{run.out}/ckpt")
        for log in LOGS:
            open(f"{run.out}/{log}", "w").close()

    everywhere(write if rank == 0 else None)
    release()
    run.tokenizer = load_tokenizer(run.path)[0]
    return run


def report(run, shape, argv, rows):
    """What an issue needs to know, as JSON."""
    cuda = torch.cuda.is_available()
    launch = "python" if run.world == 1 else f"torchrun --nproc_per_node {run.world}"
    names = "VLLM_USE_V2_MODEL_RUNNER", "PYTORCH_ALLOC_CONF", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"
    head = {
        "command": f"{launch} -m tools.gpu_check {shlex.join(argv)}".strip(), "shape": shape,
        "device": torch.cuda.get_device_name() if cuda else "cpu", "ranks": run.world,
        "GiB": torch.cuda.mem_get_info()[1] / parts.GIB if cuda else None,
        "versions": versions(run) | {"cuda": torch.version.cuda, "nccl": torch.cuda.nccl.version() if cuda else None},
        "environment": {k: os.environ[k] for k in names if k in os.environ},
        "settings": vars(run.stages[0][1]) | {"model": "random weights", "data": ""},
    }  # fmt: skip
    head["failed"] = sum(row["status"] == "FAIL" for row in rows)
    return json.dumps(head | {"lines": rows}, indent=1)


def main(argv):
    """The lines one after the other, a table and a file on rank 0 -> 0 if none failed."""
    with one_line_errors():
        shape, only, out, cfg = arguments(argv)
    where = init_distributed()
    with tempfile.TemporaryDirectory() as folder:
        run = prepare(cfg, shape, gather([folder])[0], *where)
        out = os.path.abspath(out)
        failed = run_lines(run, cfg, only, lambda rows: replace_file(out, report(run, shape, argv, rows)))
        run.print(f"{failed} failed; {out} has these lines, versions, device and command")
        end_group(run)
    return 1 if failed else 0


if __name__ == "__main__":
    leave(main, sys.argv[1:])
