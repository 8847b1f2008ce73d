"""README.md and docs/ say what the code does: tags, quoted lines, metrics, the walkthrough's numbers, methods, recipes.

A fork that changes the code may leave these out: pytest -m "not docs"."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, lines, numbers, train_lines

import cure
from lib.config import SETTINGS, load_config
from tools import walkthrough
from tools.methods import METHODS as SMOKE

pytestmark = pytest.mark.docs
README = (ROOT / "README.md").read_text()
DOCS = {p.stem: p.read_text() for p in sorted((ROOT / "docs").glob("*.md"))}
SOURCES = {p.name: p.read_text() for d in (".", "lib", "methods", "tools") for p in sorted((ROOT / d).glob("*.py"))}
TAG = r"(?:CURE|DAPO|8020|ENT|COV)-\d+"


def test_every_tag_named_in_the_docs_is_in_the_code_and_the_other_way_round():
    in_code = set(re.findall(rf"\(({TAG})\)", "".join(SOURCES.values())))
    named, table = set(re.findall(TAG, "".join(DOCS.values()))), set()
    for row in re.findall(rf"^\| ((?:{TAG}(?:, )?)+) \|", DOCS["glossary"], re.M):
        table |= set(row.split(", "))
    print(f"{len(in_code)} tags in the code: {', '.join(sorted(in_code))}")
    assert named == table == in_code, "named anywhere, in the table of tags, in the code"
    for kind in ("CURE", "DAPO", "8020", "COV"):         # numbered without gaps
        got = sorted(int(t.split("-")[1]) for t in in_code if t.startswith(kind))
        assert got == list(range(1, len(got) + 1))


def test_every_tag_is_where_the_docs_say():
    for row in re.findall(rf"^\| ({TAG}) \|[^|]*\| (.*) \|$", DOCS["glossary"], re.M):
        module, name = re.search(r"`(\w+)\.(\w+)`", row[1]).groups()
        start = re.search(rf"^(?:def|class) {name}\b", SOURCES[f"{module}.py"], re.M).start()
        body = re.split(r"^(?=def |class |@)", SOURCES[f"{module}.py"][start:], maxsplit=2, flags=re.M)[1]
        assert f"({row[0]})" in body, row


def test_every_line_of_python_in_the_walkthrough_is_a_line_of_the_code():
    code = {line.strip() for text in SOURCES.values() for line in text.splitlines()}
    blocks = re.findall(r"```python\n(.*?)```", DOCS["walkthrough"], re.S)
    quoted = [line.strip() for block in blocks for line in block.splitlines() if line]
    print(f"{len(quoted)} lines quoted")
    assert quoted and not [q for q in quoted if q not in code]


def test_every_link_of_the_docs_leads_to_a_file_and_a_heading():
    pages = {ROOT / "README.md": README, ROOT / "tests/README.md": (ROOT / "tests/README.md").read_text()}
    pages |= {ROOT / f"docs/{name}.md": text for name, text in DOCS.items()}
    for page, text in pages.items():
        for target in re.findall(r"\]\((?!http)([^)\s]+)\)", text):
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert file.exists(), f"{page.name}: {target}"
            heads = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)$", file.read_text(), re.M)
                     } if anchor else {anchor}  # fmt: skip
            assert anchor in heads, f"{page.name}: {target}"


def test_every_command_line_of_the_docs_names_what_is_there():
    text = README + "".join(DOCS.values())
    for name in set(re.findall(r"-m tools\.(\w+)", text)):
        assert (ROOT / f"tools/{name}.py").exists(), name
    for name in set(re.findall(r"configs/([\w.-]+\.yaml)", text)):
        assert (ROOT / f"configs/{name}").exists(), name
    known = {f.name for f in SETTINGS} | {"benchmarks", "preset", "script", "gpu", "gpus", "response", "shape", "only", "out"}
    for line in re.findall(r"^(?:.*&& )?(?:python|torchrun) .*$", text, re.M):
        for key in re.findall(r" (?:stages\.\w+\.)?([a-z_]\w*)=", line.split("#")[0]):
            assert key in known or key == "method_args", f"{key}: {line}"


def test_every_test_that_the_list_of_promises_names_is_there():
    there = {n for p in (ROOT / "tests").glob("*.py") for n in re.findall(r"def (test_\w+)", p.read_text())}
    named = re.findall(r"`(test_\w+)(…?)`", (ROOT / "tests/README.md").read_text())
    missing = [n for n, cut in named if not any(t == n or cut and t.startswith(n) for t in there)]
    assert named and not missing


def test_the_table_of_adapters_is_what_the_kept_lines_say(capsys):
    """Mean and standard deviation over seeds of every cell, and whether a difference is seen."""
    from tools import matrix
    assert matrix.main(["lora", "--data", str(ROOT / "docs/data/lora.jsonl")]) == 0
    table, *differences = capsys.readouterr().out.split("\n\n")
    page = DOCS["scale"]
    for line in table.splitlines()[1:]:
        cells = re.split(r"  +", line.strip())[3:-1]      # without arm, tokens, seeds, and the last, which is not measured
        assert f"| {' | '.join(cells)} |" in page, line
    assert len(table.splitlines()) == 1 + 2 * 5 and differences[-1].strip() in page


def glossary():
    """Metric names of the glossary's first column."""
    table = DOCS["glossary"][DOCS["glossary"].index("| metric |"):]
    return {key for row in table.splitlines()[2:] for key in re.findall(r"`([^`]+)`", row.split("|")[1])}


def test_every_metric_of_a_run_is_in_the_glossary_and_every_one_of_the_glossary_in_the_code(whole, tiny):
    logged = {re.sub(r"@\d+", "@k", k) for m in lines(f"{whole}/metrics.jsonl") for k in m}
    logged |= {k for m in lines(f"{tiny[0]}/../../../metrics.jsonl") for k in m}      # a supervised stage
    known, code = glossary(), "".join(SOURCES.values())
    print(f"{len(logged)} keys logged, {len(known)} in the glossary; not in these runs: {', '.join(sorted(known - logged))}")
    assert not logged - known
    for key in known:
        last = key.split("/", 1)[-1].removesuffix("@k").removesuffix("_kept")
        assert re.search(rf"[\"'/{{]{last}\b", code) or last.removeprefix("entropy_") in code, key
    assert known - logged <= {"train/empty_steps", "actor/is_weight", "actor/ref_kl", "actor/balance", "actor/saved", "method/coef", "method/p", "actor/cov", "actor/cov_share", "perf/mfu",
                              "timing_s/save", "eval/entropy_operands", "eval/entropy_results"}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- the walkthrough
WALK = DOCS["walkthrough"]


def test_walkthrough_takes_the_step_that_a_run_takes_and_writes_nothing(whole, config, tmp_path, capsys, monkeypatch):
    found, walk = [], walkthrough.walk
    monkeypatch.setattr(walkthrough, "walk", lambda *args: found.append(walk(*args)))
    out = tmp_path / "out"
    assert walkthrough.main(["--config", config, f"out_dir={out}"]) == 0
    printed = capsys.readouterr().out
    assert not out.exists()
    ours = {k: v for k, v in found[0].items() if not k.startswith(("timing_s", "perf"))}
    logged = next(m for m in numbers(whole) if m["step"] == 1)
    assert {"actor/grad_norm", "mismatch/mean_abs", "train/accuracy", "branch/depth_sampled"} <= ours.keys()
    assert ours == {k: logged[k] for k in ours}, "bit for bit"
    heads = re.findall(r"^== \d\. .*$", printed, re.M)
    assert heads == re.findall(r"^== \d\. .*$", WALK, re.M) and len(heads) == 6
    print(f"gradient norm {ours['actor/grad_norm']:.6f}, as logged; {len(ours)} numbers equal")


def test_walkthrough_shows_the_step_of_the_script_it_is_given(config, tmp_path, capsys):
    """cp cure.py mine.py, and an advantage of its own: that is what is printed."""
    mine = (ROOT / "cure.py").read_text().replace("r.advantage = advantage", "r.advantage = 7 * advantage")
    (tmp_path / "mine.py").write_text(mine)
    shown = []
    for script in (ROOT / "cure.py", tmp_path / "mine.py"):
        walkthrough.main(["--config", config, f"out_dir={tmp_path}/out", f"script={script}"])
        shown.append([float(a) for a in re.findall(r"^score \S+ -> advantage (\S+)$", capsys.readouterr().out, re.M)])
    assert len(shown[0]) == 2 and shown[1] == pytest.approx([7 * a for a in shown[0]], rel=1e-3)


def test_the_walkthrough_quotes_what_it_prints_and_its_arithmetic_is_right():
    """The labels are those of the code, and the quoted numbers fit the formulas beside them."""
    quoted = "".join(re.findall(r"```text\n(.*?)```", WALK, re.S))
    labels = set(re.findall(r"^([a-z_]+) +\(", quoted, re.M))
    assert {"input_ids", "cu_seqlens", "targets", "logp", "old_logp", "advantage", "loss"} <= labels
    scores = [int(x) for x in re.search(r"scores of the group: \[(.*)\]", quoted)[1].split(",")]
    mean = sum(scores) / 16
    std = (sum((s - mean) ** 2 for s in scores) / 15) ** 0.5
    right, wrong = (float(x) for x in re.findall(r"^score \S+ -> advantage (\S+)", quoted, re.M))
    assert len(scores) == 16 and [(1 - mean) / std, (-1 - mean) / std] == pytest.approx([right, wrong], abs=1e-4)
    columns = {k: [[float(x) for x in row.split(",")] for row in re.findall(rf"^{k} .*\[(.*)\]", quoted, re.M)]
               for k in ("logp", "old_logp", "advantage", "loss")}  # fmt: skip
    assert len(columns["loss"]) == 2, "the first minibatch and the last"
    for logp, old, a, loss in zip(*columns.values(), strict=True):
        for x, y, adv, found in zip(logp, old, a, loss, strict=True):
            r = 2.718281828 ** (x - y)
            assert found == pytest.approx(max(-adv * r, -adv * min(max(r, 0.8), 1.28)), abs=4e-4)


def test_walkthrough_of_plain_dapo_and_of_a_step_that_keeps_nothing(config, tmp_path, capsys):
    argv = ["--config", config, f"out_dir={tmp_path}/out"]
    walkthrough.main([*argv, "n1=8", "n2=0", "entropy_mask_rho=0.2"])
    assert "== 6." in (printed := capsys.readouterr().out) and "t* =" not in printed
    rows = (f'{{"prompt": "{a}+{b}?", "answer": "999"}}\n' for a in range(1, 5) for b in range(1, 5))
    (tmp_path / "wrong.jsonl").write_text("".join(rows))
    walkthrough.main([*argv, f"data={tmp_path}/wrong.jsonl", "max_rounds=1"])
    assert "nothing to learn from" in capsys.readouterr().out


@pytest.mark.parametrize(("extra", "says"), [("stages.stage1.kind=sft", "kind: "), ("script=none.py", "script: no such file")])
def test_a_walkthrough_that_cannot_be_is_refused_by_name(config, capsys, extra, says):
    with pytest.raises(SystemExit) as e:
        walkthrough.main(["--config", config, extra])
    assert e.value.code == 2 and capsys.readouterr().err.startswith(f"error: {says}")


# ------------------------------------------------------------------------------------------------- the README's table of methods
METHODS = {name: (base, over.strip("`").split()) for name, base, over in
           re.findall(r"^\| ([^|`]+) \| `(toy|toy-dapo)` \| ([^|]*?) ?\|", README, re.M)}  # fmt: skip
BASES = {"toy": ["n1=2", "n2=3"], "toy-dapo": ["n1=8", "n2=0"]}  # the same methods at the size of the tests


def test_the_readme_lists_the_methods():
    assert list(METHODS) == ["CURE", "CURE, random critical tokens", "CURE, clause=last", "resample control", "DAPO", "GRPO",
                             "80/20", "bottom 80 %", "random 20 %", "a published method", "several at once"]  # fmt: skip
    assert [name for name, (_, over) in METHODS.items() if not over] == ["CURE", "DAPO"]
    for name, (base, over) in METHODS.items():            # its two stages differ as the table says, the others are one stage
        stages = load_config(["--config", str(ROOT / f"configs/{base}.yaml"), *over])
        assert [(c.n1, c.n2) for _, c in stages] == ([(4, 3), (16, 0)] if base == "toy" else [(16, 0)]), name


def test_every_method_has_a_row_of_the_page_and_a_line_of_the_smoke_table():
    files = {p.stem for p in (ROOT / "methods").glob("[a-z]*.py")}
    listed = re.findall(r"^\| `(\w+)` \|", DOCS["methods"].split("## On Countdown")[0], re.M)
    assert sorted(listed) == sorted(files), "each once"
    assert files <= {m.removeprefix("method=") for own in SMOKE.values() for m in own}


@pytest.fixture(scope="module")
def norms():
    return {}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_of_the_readme_takes_a_step_of_its_own(config, tmp_path, monkeypatch, norms, name):
    monkeypatch.setattr("tools.analyze.curves", lambda out: [])
    base, over = METHODS[name]
    cure.main(["--config", config, f"out_dir={tmp_path}", "max_steps=1", "eval_data=", *BASES[base], *over])
    m = train_lines(tmp_path)[0]
    print(f"{name}: gradient norm {m['actor/grad_norm']:.6f}")
    assert m["opt_step"] == 2 and m["actor/grad_norm"] > 0
    norms[name] = m["actor/grad_norm"]
    others = {k: v for k, v in norms.items() if k != name and {k, name} != {"CURE", "CURE, clause=last"}}
    assert norms[name] not in others.values(), "another method's numbers (clause=last is CURE where there are no sentences)"


# ------------------------------------------------------------------------------------------------------- the five recipes
RECIPES = dict(re.findall(r"^### (Change the [\w ]+)\n.*?```python\n(.*?)```", README, re.M | re.S))


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The folder, copied: what a fork starts from."""
    folder = tmp_path_factory.mktemp("fork") / "nanocure"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns("runs", ".git", "__pycache__", "tests", "docs"))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_of_the_readme_takes_a_step_of_its_own_in_a_copy_of_the_folder(copy, config, tmp_path, recipe):
    text = README[README.index(f"### {recipe}"):].split("```")[0]
    code, old = RECIPES[recipe], {p: (copy / p).read_text() for p in ("cure.py", "reward.py")}
    if file := re.search(r"Add `(methods/\w+\.py)`", text):
        (copy / file[1]).write_text(code)
    elif "Append this to `reward.py`" in text:
        (copy / "reward.py").write_text(old["reward.py"] + "\n\n" + code)
    else:                                               # the metric: before train_step's return
        before, after = old["cure.py"].split("    return m | performance(", 1)
        (copy / "cure.py").write_text(f"{before}{code}    return m | performance({after}")
    override = re.search(r"run with `([^`]+)`", text)
    argv = [*(override[1].split() if override else []), "max_steps=1", "eval_data=", f"out_dir={tmp_path}/run"]
    argv = [f"verifier={a.split('=')[1]}" if a.startswith("verifier=") else a for a in argv]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "cure.py", "--config", config, *argv], cwd=copy, env=env, capture_output=True, text=True)
    for path, text in old.items():
        (copy / path).write_text(text)
    assert done.returncode == 0, done.stderr[-2000:]
    (m,) = train_lines(tmp_path / "run")
    assert m["actor/grad_norm"] > 0 and ("response_length/right_kept" in m) == (recipe == "Change the metrics")


def test_the_readme_has_five_recipes():
    assert list(RECIPES) == ["Change the branch rule", "Change the advantage", "Change the verifier", "Change the loss",
                             "Change the metrics"]  # fmt: skip
