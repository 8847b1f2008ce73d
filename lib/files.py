"""Small files: written as a whole, brought to the disk, checked. Nothing heavy is imported here."""

import hashlib
import json
import os
import shutil
from glob import glob
from pathlib import Path

ROOT = Path(__file__).absolute().parents[1]  # the folder of the scripts
TMP = ".tmp-"


def delete(path):
    """Remove a file or a folder, if it is there."""
    if os.path.isdir(path):
        shutil.rmtree(path)
    elif os.path.exists(path):
        os.remove(path)


def files(folder):
    """Relative paths of all files under a folder, sorted."""
    return sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file())


def sync(path):
    """Bring the bytes of a file, or the names in a folder, to the disk. A rename is durable only with its folder."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def sha256(path):
    """The file's SHA-256 in hex. 1.7 GB/s on one core."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def model_hash(path):
    """SHA-256 over names and SHA-256 sums of the weights and config.json of a folder, or of a hub id's local copy."""
    if not os.path.isdir(path):
        from huggingface_hub import snapshot_download
        path = snapshot_download(path, allow_patterns=["*.safetensors", "config.json"], local_files_only=True)
    files = sorted(f for f in os.listdir(path) if f.endswith(".safetensors") or f == "config.json")
    return hashlib.sha256("".join(f"{sha256(f'{path}/{f}')}  {f}\n" for f in files).encode()).hexdigest()


def code_hashes(*more):
    """What a run's code is: {file: the first 16 hex digits of its SHA-256} of the scripts, of lib and of the paths in
    `more`, such as the method's file. Names are relative to the folder of the scripts."""
    names = [*glob("*.py", root_dir=ROOT), *glob("lib/*.py", root_dir=ROOT), *(os.path.relpath(p, ROOT) for p in more)]
    return {name: sha256(ROOT / name)[:16] for name in sorted(names)}


def replace_file(path, text):
    """Write a small file as a whole: a reader, or a killed run, finds the old one or the new one."""
    folder, name = os.path.split(path)
    with open(f"{folder}/{TMP}{name}", "w") as f:
        f.write(text)
    sync(f"{folder}/{TMP}{name}")
    os.replace(f"{folder}/{TMP}{name}", path)
    sync(folder)


def read_json(path):
    """The object in a JSON file, or None where there is no such file."""
    return json.loads(Path(path).read_text()) if os.path.exists(path) else None


def aligned(rows):
    """Rows of text cells -> lines: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)
    return "\n".join(map(str.rstrip, lines))
