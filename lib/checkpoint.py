"""Checkpoints: written whole or not at all, checked when they are read.

    ckpt/step_000040/hf/           an ordinary Hugging Face folder, for users
                     state/        fp32 weights and Adam's moments, one safetensors shard a rank, for resuming
                     meta.json     stage, step, data cursor, counters, sizes of the logs
                     SHA256SUMS    of every file above; `sha256sum -c SHA256SUMS` checks it without us
    ckpt/latest                    the name of the newest one

A folder is written under a temporary name, every file synced to the disk, renamed, and only then named by `latest`: whatever
kills the run, `latest` names a complete checkpoint, and no folder without `.tmp-` in its name is half there.
"""

import json
import os
import shutil

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from lib.config import FREE, Config, keys
from lib.files import TMP, delete, files, read_json, replace_file, sha256, sync_folders, synced_size
from lib.ranks import everywhere, gather

LOGS = ("metrics.jsonl", "samples.jsonl")
SUMS = "SHA256SUMS"


# ---------------------------------------------------------------------------------------------------------------------- write
def save(run, cfg, stream, final):
    """Write ckpt/step_NNNNNN and let `latest` name it. RuntimeError on every rank, and no trace left of the attempt, if it
    cannot be written anywhere. A collective."""
    s, root = run.state, f"{run.out}/ckpt"
    s.update(stage_done=final, cursor=stream.cursor, adam_step=run.policy.adam_step)
    name = f"step_{s['step']:06d}" + (f"_{cfg.name}_{s['stage_step']:06d}" if cfg.kind == "sft" else "")
    tmp = f"{root}/{TMP}{name}"
    state = run.policy.state()
    need = sum(x.numel() * x.element_size() for x in state.values()) + run.policy.n_params * run.policy.dtype.itemsize

    def begin():
        shutil.rmtree(tmp, ignore_errors=True)
        os.makedirs(tmp)
        if (free := shutil.disk_usage(root).free) < need:
            raise OSError(f"only {free / 2**30:.3g} GiB are free")

    def end():
        s["files"] = {f: synced_size(f"{run.out}/{f}") for f in LOGS}
        with open(f"{tmp}/meta.json", "w") as f:
            json.dump(s, f, indent=1)
        sums["meta.json"] = sha256(f"{tmp}/meta.json", sync=True)
        with open(f"{tmp}/{SUMS}", "w") as f:
            f.writelines(f"{digest}  {file}\n" for file, digest in sorted(sums.items()))
        publish(root, tmp, name)

    try:
        everywhere(begin if run.rank == 0 else None)
        everywhere(lambda: dcp.save(state, storage_writer=HuggingFaceStorageWriter(f"{tmp}/state", save_distributed=True)))
        everywhere(lambda: run.policy.save_hf(f"{tmp}/hf", run.tokenizer))
        sums = dict(shared(files(tmp), lambda file: (file, sha256(f"{tmp}/{file}", sync=True)), run))
        everywhere(end if run.rank == 0 else None)
    except RuntimeError as e:
        if run.rank == 0:
            shutil.rmtree(tmp, ignore_errors=True)
        last = gather([latest(root)])[0]
        raise RuntimeError(
            f"step {s['step']}: no checkpoint could be written in {root}: {e}. It needs {need / 2**30:.3g} GiB. "
            + (f"{last} is complete: the same command goes on from there" if last else "There is none to go on from")
        ) from e
    if run.rank == 0:
        try:
            prune(root, name, cfg.keep_ckpts)
        except OSError as e:  # the new one is there: no reason to end the run
            run.print(f"WARNING: old checkpoints could not be removed: {e}")


def publish(root, tmp, name):
    """Rename a complete folder to its name, then let ckpt/latest say so; each is on the disk before the next."""
    sync_folders(tmp)
    path = f"{root}/{name}"
    if os.path.exists(path):  # a run resumed from an older checkpoint comes by once more
        shutil.rmtree(f"{root}/{TMP}old", ignore_errors=True)
        os.rename(path, f"{root}/{TMP}old")
    os.rename(tmp, path)
    sync_folders(root, deep=False)
    point_at(root, name)
    shutil.rmtree(f"{root}/{TMP}old", ignore_errors=True)


def point_at(root, name):
    """Let ckpt/latest name this checkpoint, in one atomic step."""
    replace_file(f"{root}/latest", name)
    sync_folders(root, deep=False)


def prune(root, newest, keep):
    """Delete old checkpoints: the `keep` last ones up to `newest` and every stage end stay. Each moves aside in one step
    before it is deleted, so that what is there is whole."""
    resumable = sorted(d for d in os.listdir(root) if os.path.exists(f"{root}/{d}/meta.json") and d <= newest)  # by step
    for name in resumable[:-keep]:
        if not read_json(f"{root}/{name}/meta.json")["stage_done"]:
            delete(f"{root}/{TMP}gone")  # of a deletion that failed half-way
            os.rename(f"{root}/{name}", f"{root}/{TMP}gone")
            delete(f"{root}/{TMP}gone")


def tidy(root, resumed):
    """At the start of a run: remove what a killed one left half-written or half-deleted, and, unless it is resumed, all its
    checkpoints; nothing that is not ours."""
    for d in sorted(os.listdir(root)):  # `latest` before the folders that it may name
        if d.startswith(TMP) or not resumed and (d == "latest" or d.startswith("step_")):
            delete(f"{root}/{d}")
        elif d.startswith("step_") and not os.path.exists(f"{root}/{d}/meta.json"):  # killed while pruning
            for part in (SUMS, "state"):
                delete(f"{root}/{d}/{part}")


# ----------------------------------------------------------------------------------------------------------------------- read
def find_checkpoint(run, cfg):
    """The checkpoint to resume from, complete and undamaged, or None. A run resumes itself, with the config it was made
    with; resume=FOLDER takes any, into a folder without a run. ValueError otherwise. A collective: the ranks share the
    checking."""
    folder, name = cfg.resume, None
    if cfg.resume == "never":
        return None
    if cfg.resume == "auto":
        name = latest(f"{run.out}/ckpt")
        if name is None:
            return None
        if name in ("", ".", "..") or os.path.basename(name) != name:  # a pointer, not a way out of the run's folder
            raise ValueError(f"resume: {run.out}/ckpt/latest names {name!r}, which is no folder beside it")
        folder = f"{run.out}/ckpt/{name}"
    if not os.path.exists(f"{folder}/{SUMS}"):
        raise ValueError(f"resume: {folder!r} is no checkpoint folder (no {SUMS}); resume=never starts over")
    if bad := damaged(folder, run):
        raise ValueError(
            f"resume: {', '.join(bad)} in {folder!r} is damaged or missing (its checksum is not the stored one): "
            "resume=FOLDER takes an older checkpoint, resume=never starts over"
        )
    meta, names = read_json(f"{folder}/meta.json"), [n for n, _ in run.stages]
    if meta["stage"] not in names:
        raise ValueError(f"resume: {folder!r} is of stage {meta['stage']}, not of {', '.join(names)}; "
                         "to start from its weights: model=…/hf and another out_dir")  # fmt: skip
    if cfg.resume == "auto":
        refuse_changes(run, folder)
    elif not own(run, folder):
        if latest(f"{run.out}/ckpt"):
            raise ValueError(f"resume: {run.out} has a run already: choose another out_dir, or resume=auto goes on with that one")
        if meta["stage_done"] and meta["stage"] == names[-1]:
            raise ValueError(f"resume: {folder!r} is the end of the last stage; to start from its weights: model={folder}/hf")
    return folder


def own(run, folder):
    """Whether a checkpoint is one of this run's own folder."""
    return os.path.dirname(os.path.abspath(folder)) == os.path.abspath(f"{run.out}/ckpt")


def refuse_changes(run, folder):
    """ValueError, naming keys and both values, if the run was made with another config than the present one."""
    saved, advice = read_json(f"{run.out}/stages.json") or {}, (
        f"choose another out_dir, or resume=never to start over, or resume={folder} to go on with the change")  # fmt: skip
    if list(saved) != (names := [n for n, _ in run.stages]):
        raise ValueError(f"stages: the run in {run.out} has the stages {', '.join(saved)}, now {', '.join(names)}; {advice}")
    changes = {}  # (key, old, new) -> stages
    for name, cfg in run.stages:
        old = {**vars(Config()), **saved[name]}
        for key, value in vars(cfg).items():
            if key not in keys(FREE) and old[key] != value:
                changes.setdefault((key, repr(old[key]), repr(value)), []).append(name)
    if changes:
        names = ", ".join(dict.fromkeys(key for key, _, _ in changes))
        said = "; ".join(f"{key} was {old}, is {new} ({', '.join(names)})" for (key, old, new), names in changes.items())
        raise ValueError(f"{names}: not as in the run in {run.out}: {said}; {advice}")


def damaged(folder, run):
    """Files of a checkpoint, its hf folder apart, that are missing or differ from their stored checksum. A collective."""
    with open(f"{folder}/{SUMS}", errors="replace") as f:
        stored = dict(reversed(line.rstrip("\n").split("  ", 1)) for line in f if "  " in line)
    if "meta.json" not in stored:
        return [SUMS]
    names = sorted(set(stored) | {file for file in files(folder) if file.startswith("state/")})
    wanted = [file for file in names if not file.startswith(("hf/", SUMS))]

    def check(file):
        ok = os.path.exists(f"{folder}/{file}") and stored.get(file) == sha256(f"{folder}/{file}")
        return None if ok else file

    return [file for file in shared(wanted, check, run) if file]


def load(run, path):
    """Restore state, weights and Adam's moments from a checkpoint that find() has checked, at any rank count. Reads only.
    A collective."""
    run.state = read_json(f"{path}/meta.json")
    run.policy.new_optimizer(dict(run.stages)[run.state["stage"]])  # betas and weight decay may be the stage's own
    if not run.state["stage_done"]:
        run.policy.prepare_adam(run.state["adam_step"])
    dcp.load(run.policy.state(), storage_reader=HuggingFaceStorageReader(f"{path}/state"))


def rewind(run, path):
    """Cut the run's logs back to its own checkpoint at `path`, and let `latest` name that. On rank 0, under the lock."""
    for name, size in run.state["files"].items():  # lines after the checkpoint will be written again
        log = f"{run.out}/{name}"
        have = os.path.getsize(log) if os.path.exists(log) else 0
        if have > size:
            os.truncate(log, size)
        elif have < size:
            run.print(f"WARNING: {log} has {have} bytes, {size} when the checkpoint was written: lines are missing")
    point_at(f"{run.out}/ckpt", os.path.basename(os.path.abspath(path)))  # resume=FOLDER may have named an older one


# ---------------------------------------------------------------------------------------------------------------------- files
def latest(root):
    """The name that ckpt/latest gives. Without it (killed between the rename and the pointer of the first save, or not copied
    along) the last complete folder, or None."""
    if not os.path.exists(f"{root}/latest"):
        complete = [d for d in os.listdir(root) if os.path.exists(f"{root}/{d}/{SUMS}")] if os.path.isdir(root) else []
        return max((d for d in complete if d.startswith("step_")), default=None)
    with open(f"{root}/latest", errors="replace") as f:
        return f.read().strip()


def shared(items, do, run):
    """[do(item) for each item], the work spread over the ranks; the results, in rank order, on every rank. A collective."""
    out = []
    everywhere(lambda: out.extend(do(item) for item in items[run.rank :: run.world]))
    return gather(out)


