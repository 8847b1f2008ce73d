"""Checkpoints: written whole or not at all, checked when they are read.

    ckpt/step_000040/hf/           an ordinary Hugging Face folder, for users, with a model card
                     state/        fp32 weights and Adam's moments, safetensors shards of each rank, for resuming
                     meta.json     stage, step, data cursor, counters, sizes of the logs, hashes of the code
                     SHA256SUMS    of every file above; `sha256sum -c SHA256SUMS` checks it without us
    ckpt/latest                    the name of the newest one

A folder is written under a temporary name, every file synced to the disk, renamed, and only then named by `latest`.
Whatever kills the run, `latest` names a complete checkpoint, and no folder without `.tmp-` in its name is half there.
"""

import json
import os
import shutil
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from lib.card import save_card
from lib.config import FREE, Config, keys
from lib.files import TMP, delete, files, read_json, replace_file, sha256, sync
from lib.policy import bins
from lib.ranks import everywhere, gather

LOGS = ("metrics.jsonl", "samples.jsonl")
SUMS = "SHA256SUMS"
PIECE = 1 << 29  # bytes of a rank's state in one file, about; torch builds each file in memory before it writes it


# ------------------------------------------------------------------------------------------------------------ write
def save(run, cfg, stream, final):
    """Write ckpt/step_NNNNNN and let `latest` name it. A collective. RuntimeError on every rank, and no trace left of
    the attempt, if it cannot be written anywhere."""
    s, root = run.state, f"{run.out}/ckpt"
    s.update(stage_done=final, cursor=stream.cursor, adam_step=run.policy.adam_step, code=run.code, lora=run.lora)
    name = f"step_{s['step']:06d}" + (f"_{cfg.name}_{s['stage_step']:06d}" if cfg.kind == "sft" else "")
    tmp, state = f"{root}/{TMP}{name}", run.policy.state()
    sizes = {key: x.numel() * x.element_size() for key, x in state.items()}
    need = sum(sizes.values()) + run.policy.n_params * run.policy.dtype.itemsize

    def make_folder():
        os.makedirs(tmp)
        if (free := shutil.disk_usage(root).free) < need:
            raise OSError(f"only {free / 2**30:.3g} GiB are free")

    try:
        everywhere(make_folder if run.rank == 0 else None)
        pieces = bins(sizes, sizes, -(-sum(sizes.values()) // (PIECE * run.world)))
        file = {key: number for number, piece in enumerate(pieces, 1) for key in piece}
        writer = HuggingFaceStorageWriter(f"{tmp}/state", file, save_distributed=True)
        everywhere(lambda: dcp.save(state, storage_writer=writer))
        everywhere(lambda: run.policy.save_hf(f"{tmp}/hf", run.tokenizer))
        everywhere(lambda: run.policy.save_adapter(f"{tmp}/adapter"))
        everywhere((lambda: save_card(run, cfg, f"{tmp}/hf")) if run.rank == 0 else None)
        sums = checksums(tmp, files(tmp), run)
        everywhere((lambda: seal(run, tmp, name, sums)) if run.rank == 0 else None)
    except RuntimeError as e:
        if run.rank == 0:
            shutil.rmtree(tmp, ignore_errors=True)
        last = gather([latest(root)])[0]
        says = f"step {s['step']}: no checkpoint could be written in {root}: {e}. It needs {need / 2**30:.3g} GiB. "
        says += f"{last} is complete: the same command goes on from there" if last else "There is none to go on from"
        raise RuntimeError(says) from e
    if run.rank == 0:
        try:
            prune(root, name, cfg.keep_ckpts)
        except OSError as e:  # the new one is there: no reason to end the run
            run.print(f"WARNING: old checkpoints could not be removed: {e}")


def seal(run, tmp, name, sums):
    """Complete the folder `tmp`, rename it, then let ckpt/latest say so. Each is on the disk before the next."""
    for log in LOGS:
        sync(f"{run.out}/{log}")
        run.state["files"][log] = os.path.getsize(f"{run.out}/{log}")
    replace_file(f"{tmp}/meta.json", json.dumps(run.state, indent=1))
    sums["meta.json"] = sha256(f"{tmp}/meta.json")
    replace_file(f"{tmp}/{SUMS}", "".join(f"{digest}  {file}\n" for file, digest in sorted(sums.items())))
    for path in [*Path(tmp).rglob("*"), tmp]:
        sync(path)
    root = os.path.dirname(tmp)
    if os.path.exists(f"{root}/{name}"):  # a run resumed from an older checkpoint comes by once more
        os.rename(f"{root}/{name}", f"{root}/{TMP}old-{name}")
    os.rename(tmp, f"{root}/{name}")
    sync(root)
    replace_file(f"{root}/latest", name)


def prune(root, newest, keep):
    """Delete checkpoints up to `newest`, but for stage ends and the `keep` last. Each is renamed first, in one step."""
    names = sorted(path.parent.name for path in Path(root).glob("step_*/meta.json"))  # by step
    for name in [n for n in names if n <= newest][:-keep]:
        if not read_json(f"{root}/{name}/meta.json")["stage_done"]:
            os.rename(f"{root}/{name}", f"{root}/{TMP}old-{name}")
    tidy(root, resumed=True)


def tidy(root, resumed):
    """Remove what is half there, and all checkpoints of a run that is not resumed. Nothing that is not ours."""
    for d in sorted(os.listdir(root)):  # `latest` before the folders that it may name
        if d.startswith(TMP) or not resumed and (d == "latest" or d.startswith("step_")):
            delete(f"{root}/{d}")


# ------------------------------------------------------------------------------------------------------------- read
def find_checkpoint(run, cfg):
    """The checkpoint to resume from, complete and undamaged, or None. A run resumes itself, with the config it was made
    with. resume=FOLDER takes any checkpoint, into a folder without a run. ValueError otherwise. A collective."""
    name, names = latest(f"{run.out}/ckpt"), [n for n, _ in run.stages]
    if cfg.resume == "never" or cfg.resume == "auto" and name is None:
        return None
    folder = f"{run.out}/ckpt/{name}" if cfg.resume == "auto" else cfg.resume
    if cfg.resume == "auto" and not own(run, folder):  # a pointer, not a way out of the run's folder
        raise ValueError(f"resume: {run.out}/ckpt/latest names {name!r}, which is no folder beside it")
    if not os.path.exists(f"{folder}/{SUMS}"):
        raise ValueError(f"resume: {folder!r} is no checkpoint folder (no {SUMS}); resume=never starts over")
    if bad := damaged(folder, run):
        raise ValueError(
            f"resume: {', '.join(bad)} in {folder!r} is damaged or missing (its checksum is not the stored one): "
            "resume=FOLDER takes an older checkpoint, resume=never starts over"
        )
    meta, weights = read_json(f"{folder}/meta.json"), f"to start from its weights: model={folder}/hf"
    if (stage := meta["stage"]) not in names:
        raise ValueError(f"resume: {folder!r} is of stage {stage}, not of {', '.join(names)}; {weights}")
    if cfg.resume == "auto":
        refuse_changes(run, folder)
    elif not own(run, folder):
        if name:
            raise ValueError(f"resume: {run.out} has a run already: another out_dir, or resume=auto to go on with that")
        if meta["stage_done"] and stage == names[-1]:
            raise ValueError(f"resume: {folder!r} is the end of the last stage; {weights}")
    return folder


def own(run, folder):
    """Whether a checkpoint is one of this run's own folder."""
    return os.path.dirname(os.path.abspath(folder)) == os.path.abspath(f"{run.out}/ckpt")


def refuse_changes(run, folder):
    """ValueError, naming keys and both values, if the run was made with another config than the present one."""
    saved = read_json(f"{run.out}/stages.json") or {}
    advice = f"choose another out_dir, or resume=never to start over, or resume={folder} to go on with the change"
    was, now = ", ".join(saved), ", ".join(name for name, _ in run.stages)
    if was != now:
        raise ValueError(f"stages: the run in {run.out} has the stages {was}, now {now}; {advice}")
    changes = {}  # (key, old, new) -> stages
    for name, cfg in run.stages:
        old = {**vars(Config()), "packing": "flat", **saved[name]}  # what runs had before there were brooms
        if isinstance(old["method"], str):  # the time before methods were taken together
            old["method"] = [old["method"]] if old["method"] else []
        if cap := old.pop("tis_cap", 0):
            old["importance"] = ["token_truncate", 0, cap]
        for key, value in vars(cfg).items():
            if key not in keys(FREE) and old[key] != value:
                changes.setdefault((key, repr(old[key]), repr(value)), []).append(name)
    if changes:
        named = ", ".join(dict.fromkeys(key for key, _, _ in changes))
        said = [f"{key} was {old}, is {new} ({', '.join(where)})" for (key, old, new), where in changes.items()]
        raise ValueError(f"{named}: not as in the run in {run.out}: {'; '.join(said)}; {advice}")


def damaged(folder, run):
    """Files of a checkpoint, hf and adapter apart, that are missing or are not as their checksum says. A collective."""
    with open(f"{folder}/{SUMS}", errors="replace") as f:  # a digest, two blanks, a name
        stored = dict(reversed(line.rstrip("\n").split("  ", 1)) for line in f if "  " in line and "  hf/" not in line
                      and "  adapter/" not in line)
    if "meta.json" not in stored:
        return [SUMS]
    found = checksums(folder, [file for file in files(folder) if file in stored or file.startswith("state/")], run)
    return [file for file in sorted(stored | found) if stored.get(file) != found.get(file)]


def load(run, path):
    """Restore state, weights and Adam's moments from what find_checkpoint found, at any rank count. A collective."""
    run.state = read_json(f"{path}/meta.json")
    if (was := run.state.get("lora")) != run.lora:  # adapters are nothing without their model
        raise ValueError(f"lora_rank: {path!r} has [rank, alpha, SHA-256 of the model] {was}, this run {run.lora}")
    old, new = run.state.get("code", run.code), run.code  # an old checkpoint has no hashes
    if changed := [file for file in sorted(old | new) if old.get(file) != new.get(file)]:
        said = (f + (" (new)" if f not in old else " (gone)" if f not in new else "") for f in changed)
        run.print(f"WARNING: the code has changed since the checkpoint was written: {', '.join(said)}")
    run.policy.new_optimizer(dict(run.stages)[run.state["stage"]])  # betas and weight decay may be the stage's own
    if not run.state["stage_done"]:
        run.policy.prepare_adam(run.state["adam_step"])
    dcp.load(run.policy.state(), storage_reader=HuggingFaceStorageReader(f"{path}/state"))


def rewind(run, path):
    """Cut the run's logs back to its own checkpoint at `path` and let `latest` name that. On rank 0, under the lock."""
    for name, size in run.state["files"].items():  # lines after the checkpoint will be written again
        log = f"{run.out}/{name}"
        open(log, "a").close()  # it may be gone
        have = os.path.getsize(log)
        if have > size:
            os.truncate(log, size)
        elif have < size:
            run.print(f"WARNING: {log} has {have} bytes, {size} when the checkpoint was written: lines are missing")
    replace_file(f"{run.out}/ckpt/latest", os.path.basename(os.path.abspath(path)))  # resume=FOLDER may be an older one


def latest(root):
    """The name that ckpt/latest gives. Without it (killed between the rename and the pointer of the first save, or not
    copied along) the last complete folder, or None."""
    if os.path.exists(f"{root}/latest"):
        return Path(f"{root}/latest").read_text(errors="replace").strip()
    return max((path.parent.name for path in Path(root).glob(f"step_*/{SUMS}")), default=None)


def checksums(folder, names, run):
    """{file: SHA-256} of files in a folder, the work spread over the ranks, the answer on all of them. A collective."""
    found = []
    everywhere(lambda: found.extend((file, sha256(f"{folder}/{file}")) for file in names[run.rank :: run.world]))
    return dict(gather(found))
