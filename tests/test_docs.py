"""README.md and docs/walkthrough.md say what the code does: tags, quoted lines, metrics, the walkthrough's numbers, methods."""

import re

import pytest
from conftest import ROOT, lines, numbers, train_lines

import cure
from lib import config
from tools import walkthrough

README, DOC = (ROOT / "README.md").read_text(), (ROOT / "docs/walkthrough.md").read_text()
SOURCES = {p.name: p.read_text() for d in (".", "lib", "methods", "tools") for p in sorted((ROOT / d).glob("*.py"))}
TAG = r"(?:CURE|DAPO|8020|ENT|COV)-\d+"


@pytest.mark.parametrize("doc", [README, DOC], ids=["README", "walkthrough"])
def test_every_tag_named_in_the_docs_is_in_the_code_and_the_other_way_round(doc):
    in_code = set(re.findall(rf"\(({TAG})\)", "".join(SOURCES.values())))
    named, table = set(re.findall(TAG, doc)), set()
    for row in re.findall(rf"^\| ((?:{TAG}(?:, )?)+) \|", doc, re.M):
        table |= set(row.split(", "))
    print(f"{len(in_code)} tags in the code: {', '.join(sorted(in_code))}")
    assert named == table == in_code, "named anywhere, in the table of tags, in the code"
    for kind in ("CURE", "DAPO", "8020", "COV"):         # numbered without gaps
        got = sorted(int(t.split("-")[1]) for t in in_code if t.startswith(kind))
        assert got == list(range(1, len(got) + 1))


def test_every_tag_is_where_the_docs_say():
    for row in re.findall(rf"^\| ({TAG}) \|[^|]*\| (.*) \|$", DOC, re.M):
        module, name = re.search(r"`(\w+)\.(\w+)`", row[1]).groups()
        start = re.search(rf"^(?:def|class) {name}\b", SOURCES[f"{module}.py"], re.M).start()
        body = re.split(r"^(?=def |class |@)", SOURCES[f"{module}.py"][start:], maxsplit=2, flags=re.M)[1]
        assert f"({row[0]})" in body, row


def test_every_line_of_python_in_the_walkthrough_is_a_line_of_the_code():
    code = {line.strip() for text in SOURCES.values() for line in text.splitlines()}
    quoted = [line.strip() for block in re.findall(r"```python\n(.*?)```", DOC, re.S) for line in block.splitlines() if line]
    print(f"{len(quoted)} lines quoted")
    assert quoted and not [q for q in quoted if q not in code]


def glossary():
    """Metric names of the glossary's first column."""
    table = DOC[DOC.index("| metric |"):]
    return {key for row in table.splitlines()[2:] for key in re.findall(r"`([^`]+)`", row.split("|")[1])}


def test_every_metric_of_a_run_is_in_the_glossary_and_every_one_of_the_glossary_in_the_code(whole, tiny):
    logged = {re.sub(r"@\d+", "@k", k) for m in lines(f"{whole}/metrics.jsonl") for k in m}
    logged |= {k for m in lines(f"{tiny[0]}/../../../metrics.jsonl") for k in m}      # a supervised stage
    known, code = glossary(), "".join(SOURCES.values())
    print(f"{len(logged)} keys logged, {len(known)} in the glossary; not in these runs: {', '.join(sorted(known - logged))}")
    assert not logged - known
    for key in known:
        last = key.split("/", 1)[-1].removesuffix("@k")
        assert re.search(rf"[\"'/{{]{last}\b", code) or last.removeprefix("entropy_") in code, key
    assert known - logged <= {"train/empty_steps", "actor/tis_weight", "actor/cov", "actor/cov_share", "perf/mfu",
                              "timing_s/save", "eval/entropy_operands", "eval/entropy_results"}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- the walkthrough
def test_walkthrough_takes_the_step_that_a_run_takes_and_writes_nothing(whole, config, tmp_path, capsys, monkeypatch):
    found, show = [], walkthrough.show
    monkeypatch.setattr(walkthrough, "show", lambda run: found.append(show(run)))
    out = tmp_path / "out"
    assert cure.main(["--config", config, f"out_dir={out}", "walkthrough=true"]) == 0
    printed = capsys.readouterr().out
    assert not out.exists()
    ours = {k: v for k, v in found[0].items() if not k.startswith("timing_s")}
    logged = numbers(whole)[[m["step"] for m in numbers(whole)].index(1)]
    assert {"actor/grad_norm", "mismatch/mean_abs", "train/accuracy", "branch/mean_depth"} <= ours.keys()
    assert ours == {k: logged[k] for k in ours}, "bit for bit"
    heads = re.findall(r"^== \d\. .*$", printed, re.M)
    assert heads == re.findall(r"^== \d\. .*$", DOC, re.M) and len(heads) == 5
    a, b = re.search(r"sum\(loss x weight\) (\S+); the training loop's own number (\S+)", printed).groups()
    print(f"gradient norm {ours['actor/grad_norm']:.6f}, as logged; loss of a micro-batch {a} and {b}")
    assert a == b


def test_the_walkthrough_quotes_what_it_prints_and_its_arithmetic_is_right():
    """The labels are those of the code, and the quoted numbers fit the formulas beside them."""
    quoted = "".join(re.findall(r"```text\n(.*?)```", DOC, re.S))
    labels = set(re.findall(r"^([a-z_]+) +\(", quoted, re.M))
    assert {"input_ids", "cu_seqlens", "targets", "logp", "old_logp", "advantage", "loss"} <= labels
    scores = [int(x) for x in re.search(r"scores of the group: \[(.*)\]", quoted)[1].split(",")]
    mean = sum(scores) / 16
    std = (sum((s - mean) ** 2 for s in scores) / 15) ** 0.5
    right, wrong = (float(x) for x in re.search(r": 1 -> (\S+), -1 -> (\S+)", quoted).groups())
    assert len(scores) == 16 and [(1 - mean) / std, (-1 - mean) / std] == pytest.approx([right, wrong], abs=1e-4)
    columns = {k: [[float(x) for x in row.split(",")] for row in re.findall(rf"^{k} .*\[(.*)\]", quoted, re.M)]
               for k in ("logp", "old_logp", "advantage", "loss")}  # fmt: skip
    for logp, old, a, loss in zip(*columns.values(), strict=True):      # before and after the update; all A < 0 here
        for x, y, adv, found in zip(logp, old, a, loss, strict=True):
            assert found == pytest.approx(-adv * max(2.718281828 ** (x - y), 0.8), abs=2e-4)


def test_walkthrough_of_plain_dapo_and_of_a_step_that_keeps_nothing(config, tmp_path, capsys):
    argv = ["--config", config, f"out_dir={tmp_path}/out", "walkthrough=true"]
    cure.main([*argv, "n1=8", "n2=0", "entropy_mask_rho=0.2"])
    assert "== 5." in (printed := capsys.readouterr().out) and "t* =" not in printed
    assert printed.count(", with entropy_mask_rho; the lines above are without") == 2
    rows = (f'{{"prompt": "{a}+{b}?", "answer": "999"}}\n' for a in range(1, 5) for b in range(1, 5))
    (tmp_path / "wrong.jsonl").write_text("".join(rows))
    cure.main([*argv, f"data={tmp_path}/wrong.jsonl", "max_rounds=1"])
    assert "nothing to learn from" in capsys.readouterr().out


def test_walkthrough_of_a_supervised_stage_is_refused_by_name(config, capsys):
    with pytest.raises(SystemExit):
        cure.main(["--config", config, "walkthrough=true", "stages.stage1.kind=sft"])
    assert capsys.readouterr().err.startswith("error: walkthrough: shows a step of reinforcement learning")


# ------------------------------------------------------------------------------------------------- the README's table of methods
METHODS = {name: (base, over.strip("`").split()) for name, base, over in
           re.findall(r"^\| ([^|`]+) \| `(toy|toy-dapo)` \| ([^|]*?) ?\|", README, re.M)}  # fmt: skip
BASES = {"toy": ["n1=2", "n2=3"], "toy-dapo": ["n1=8", "n2=0"]}  # the same methods at the size of the tests


def test_the_readme_lists_the_methods():
    assert list(METHODS) == ["CURE", "CURE, random critical tokens", "CURE, clause=last", "resample control", "DAPO", "GRPO",
                             "80/20", "bottom 80 %", "random 20 %", "entropy bonus", "Clip-Cov", "KL-Cov"]  # fmt: skip
    assert [name for name, (_, over) in METHODS.items() if not over] == ["CURE", "DAPO"]
    for name, (base, over) in METHODS.items():            # its two stages differ as the table says, the others are one stage
        stages = config.load_config(["--config", str(ROOT / f"configs/{base}.yaml"), *over])
        assert [(c.n1, c.n2) for _, c in stages] == ([(4, 3), (16, 0)] if base == "toy" else [(16, 0)]), name


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
