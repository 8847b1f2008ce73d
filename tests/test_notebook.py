"""docs/cure.ipynb runs from top to bottom, and what is saved of it names no machine.

    python tests/test_notebook.py        # runs it in place and saves its outputs anew: needs nbclient and ipykernel
"""

import ast
import importlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "docs/cure.ipynb"
pytestmark = pytest.mark.docs

OTHERS = {"numpy", "torch", "matplotlib"}  # beside our own modules and Python's


def cells(kind):
    return [c for c in json.loads(NOTEBOOK.read_text())["cells"] if c["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


def imports():
    """(module, names) of every import in the notebook; names is empty for `import module`."""
    for cell in cells("code"):
        for node in ast.walk(ast.parse(source(cell))):
            if isinstance(node, ast.Import):
                yield from ((a.name, []) for a in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield node.module, [a.name for a in node.names]


def test_its_size_and_form():
    book = json.loads(NOTEBOOK.read_text())
    n = len(book["cells"])
    print(f"{n} cells, {len(cells('code'))} of them code, {NOTEBOOK.stat().st_size / 1e3:.0f} kB")
    assert 15 <= n <= 26 and NOTEBOOK.stat().st_size < 300_000
    assert book["metadata"]["kernelspec"]["name"] == "python3"
    assert set(book["metadata"]) == {"kernelspec", "language_info"} and set(book["metadata"]["language_info"]) == {"name"}
    assert all(c["metadata"] == {} for c in book["cells"]), "no times of execution"


def test_every_code_cell_was_run_in_order_and_shows_something():
    for number, cell in enumerate(cells("code"), 1):
        assert cell["execution_count"] == number and cell["outputs"], source(cell)[:60]
        for out in cell["outputs"]:
            assert out["output_type"] in ("stream", "display_data", "execute_result"), "an error was saved"
            assert out.get("name") != "stderr", "a warning or a bar was saved"
    pictures = [out for c in cells("code") for out in c["outputs"] if "image/png" in out.get("data", {})]
    assert pictures and all(len(p["data"]["image/png"]) < 60_000 for p in pictures)


def test_it_names_no_machine():
    book = json.loads(NOTEBOOK.read_text())
    for cell in book["cells"]:
        for out in cell.get("outputs", ()):
            out.get("data", {}).pop("image/png", None)  # base64 may spell anything
    found = re.findall(r"/(?:work|tmp|home|root|Users|content|usr|opt|mnt|var)\b.{,30}|[A-Z]:\\\\.{,30}", json.dumps(book))
    assert not found


def test_it_imports_what_is_there_and_asserts():
    """A name that the code lost is found here, in seconds."""
    ours = {p.stem for p in ROOT.glob("*.py")} | {"lib"}
    for module, names in imports():
        top = module.split(".")[0]
        assert top in ours | OTHERS | sys.stdlib_module_names, module
        if top in ours:
            there = importlib.import_module(module)
            assert [n for n in names if not hasattr(there, n)] == [], module
    text = "\n".join(map(source, cells("code")))
    copies = set(re.findall(r"^def (\w+)", text, re.M)) & {n for m in ("cure", "rollout", "loss", "eval") for n in dir(importlib.import_module(m))}
    assert not copies and len(re.findall(r"^ *assert ", text, re.M)) >= 15


# ------------------------------------------------------------------------------------------------------------ it is run
def run_notebook(folder):
    """The notebook, run in `folder`, as a dict without what differs between machines and runs."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    book = nbformat.read(NOTEBOOK, as_version=4)
    # a cell that fails raises, with its traceback. Countdown's base model is made in the second one, if it is not there
    nbclient.NotebookClient(book, timeout=900, kernel_name="python3", record_timing=False, coalesce_streams=True,
                            resources={"metadata": {"path": str(folder)}}).execute()  # fmt: skip
    book = json.loads(nbformat.writes(book))
    book["metadata"] = json.loads(NOTEBOOK.read_text())["metadata"]
    for cell in book["cells"]:
        cell["metadata"] = {}
        if "outputs" in cell:
            cell["outputs"] = [out | ({"metadata": {}} if "metadata" in out else {}) for out in cell["outputs"]]
    return book


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(tmp_path, monkeypatch):
    """In a copy of the repository, from docs/, where Jupyter opens it. The asserts are its own."""
    left_out = shutil.ignore_patterns(".*", "runs", "__pycache__")
    shutil.copytree(ROOT, copy := tmp_path / "nanocure", ignore=left_out)
    base = copy / "runs/countdown-base"
    if (ROOT / "runs/countdown-base/config.json").exists():
        shutil.copytree(ROOT / "runs/countdown-base", base)
    else:  # minutes less than the notebook would take to make it: the sets, and the model of docs/play.html
        import test_play

        from lib import toy
        toy.make_countdown(str(base), n_sft=100)
        test_play.torch_model(test_play.page_data(test_play.COMMITTED), 0).save_pretrained(base)
    monkeypatch.delenv("MPLBACKEND", raising=False)
    before = {p for p in copy.rglob("*") if "__pycache__" not in p.parts and "runs" not in p.parts}
    book = run_notebook(copy / "docs")
    ran = [c for c in book["cells"] if c["cell_type"] == "code"]
    assert all(c["outputs"] for c in ran)
    assert before == {p for p in copy.rglob("*") if "__pycache__" not in p.parts and "runs" not in p.parts}, "it writes nothing"
    assert {p.name for p in (copy / "runs").iterdir()} == {"countdown-base"}


if __name__ == "__main__":
    os.environ.pop("MPLBACKEND", None)
    book = run_notebook(NOTEBOOK.parent)
    NOTEBOOK.write_text(json.dumps(book, indent=1, ensure_ascii=False) + "\n")
