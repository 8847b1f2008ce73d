"""The form: who imports whom, how long things are, how many settings there are. A fork may leave these out: -m "not docs"."""
import ast
import re
from dataclasses import fields

import pytest
from conftest import ROOT

from lib.config import SETTINGS, Config

pytestmark = pytest.mark.docs
SCRIPTS = ("cure", "rollout", "loss", "reward", "eval")
FOLDERS = ("lib", "methods", "tools")
FILES = [*(ROOT / f"{s}.py" for s in SCRIPTS), *(p for d in FOLDERS for p in sorted((ROOT / d).glob("*.py")))]


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


OURS = {module_of(p) for p in FILES}


def imports(path, lazy=True):
    """Modules of ours that a file imports; lazy=False: only at import time, outside of functions."""
    tree, out = ast.parse(path.read_text()), set()
    nodes = ast.walk(tree) if lazy else [n for top in tree.body if not isinstance(top, ast.FunctionDef | ast.ClassDef)
                                         for n in ast.walk(top)]  # fmt: skip
    for node in nodes:
        names = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
        out |= {n for n in names if n in OURS}
    return out


def test_nobody_imports_what_stands_above_it():
    root = set(SCRIPTS)
    for path in FILES:
        name, all_of_it = module_of(path), imports(path)
        folder = name.split(".")[0]
        if name in ("loss", "reward"):
            assert not all_of_it, f"{name} imports {all_of_it}"
        elif folder == "lib":
            above = {m for m in all_of_it if m in root - {"loss", "reward"} or m.split(".")[0] in ("methods", "tools")}
            assert not above, f"{name} imports {above}"
        elif folder == "methods":
            wrong = {m for m in all_of_it if m in ("cure", "eval") or m.startswith("tools")}
            assert not wrong, f"{name} imports {wrong}"
        elif name in root:
            early = {m for m in imports(path, lazy=False) if m.startswith(("tools", "methods"))}
            late = {m for m in all_of_it if m.startswith(("tools", "methods"))}
            assert not early and late <= ({"tools.analyze"} if name == "cure" else set()), f"{name} imports {early | late}"
    print(f"{len(FILES)} files, {sum(len(imports(p)) for p in FILES)} imports of ours, all downwards")


def test_there_are_no_circles():
    graph = {module_of(p): imports(p) for p in FILES}
    graph["cure"] -= {"tools.analyze"}                   # the pictures at the end of a run

    def reach(name, seen):
        for m in graph[name] - seen:
            seen.add(m)
            reach(m, seen)
        return seen

    circles = [name for name in graph if name in reach(name, set())]
    assert not circles


def test_files_functions_and_lines_are_of_a_size_to_be_read():
    for path in FILES:
        text = path.read_text()
        lines = text.splitlines()
        wide = [i + 1 for i, line in enumerate(lines) if len(line) > 120]
        assert not wide, f"{path.name}: lines {wide} are over 120 columns"
        assert len(lines) <= 400, f"{path.name} has {len(lines)} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                n = node.end_lineno - node.lineno + 1
                assert n <= 60, f"{path.name}: {node.name} has {n} lines"
    count = {d: sum(len(p.read_text().splitlines()) for p in FILES if module_of(p).startswith(d)) for d in FOLDERS}
    root = sum(len((ROOT / f"{s}.py").read_text().splitlines()) for s in SCRIPTS)
    print(f"five scripts {root} lines, {', '.join(f'{d} {n}' for d, n in count.items())}")
    assert root <= 1350 and count["lib"] <= 3995 and count["tools"] <= 3725


def test_the_map_of_lib_names_every_file():
    named = re.findall(r"^    (\w+(?:, \w+)*)  ", (ROOT / "lib/__init__.py").read_text(), re.M)
    assert sorted(n for line in named for n in line.split(", ")) == sorted(p.stem for p in (ROOT / "lib").glob("[a-z]*.py"))


def test_settings_are_few_and_each_says_what_it_means():
    assert len(SETTINGS) <= 66 and {f.name for f in fields(Config)} - {f.name for f in SETTINGS} == {"name"}
    for f in SETTINGS:
        assert f.metadata["title"] and (f.metadata["meaning"] or f.metadata["limits"]), f.name
    source = (ROOT / "lib/config.py").read_text()
    for f in SETTINGS:
        assert len(re.findall(rf"^    {f.name}: .* = key\(.*\)$", source, re.M)) == 1, f"{f.name}: one line, once"


def test_every_setting_is_used():
    code = "".join(p.read_text() for p in FILES if module_of(p) != "lib.config")
    idle = [f.name for f in SETTINGS if not re.search(rf"\b\w+\.{f.name}\b", code)]
    assert idle == [], "no script reads them"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200
