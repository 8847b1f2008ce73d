"""docs/exercises: each function is wrong in exactly the way it is meant to be, and the project's own has every property."""
import ast
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import loss
from docs.exercises import check

pytestmark = pytest.mark.docs
FOLDER = ROOT / "docs/exercises"
FILES = sorted(FOLDER.glob("e?_*.py"))
README = (FOLDER / "README.md").read_text()

FAILS = {                                               # the claims that the mistake breaks; every other one holds
    1: {"for A < 0 it is |A| max(r, 0.8), at most 10 |A|", "no gradient just where A pushed r past its bound",
        "it is loss.policy_loss, at other bounds"},
    2: {"any responses, any cut: the mean over all tokens", "it is loss.token_weights, masked"},
    3: {"the probabilities of all 64 responses sum to 1", "which positions' logits are read",
        "it is loss.logp_and_entropy at policy.pack's index"},
    4: {"a group of one: 0", "the sum over all groups is 0", "it is loss.group_advantages"},
    5: {"a branch's gradient is 0 on average, at A = 1", "a parent and 3 branches: 16 tokens",
        "to the loss a prefix is prompt", "it is policy.pack"},
    6: {"its cursor is behind the last batch", "stopped after 1 … 7 steps and resumed: 7 right batches"},
}  # fmt: skip


def failures(n, f):
    """{claim: None where it holds, else what is wrong} of a function f put in the place of exercise n's."""
    return {claim: check.failure(pair) for claim, pair in check.EXERCISES[n][0](f)}


# ------------------------------------------------------------------------------------------------------ the project's own
def own_policy_loss(logp, old_logp, advantage, clip_low=0.2, clip_high=0.28, clip_dual=10.0):
    return loss.policy_loss(logp, old_logp, advantage, None, None, clip_low, clip_high, clip_dual=clip_dual)[0]


def own_response_logp(logits, ids, n_prompt, temperature=1.0):
    """The head is the identity, so that hidden states are logits."""
    row = check.packed(ids[:n_prompt].tolist(), [], ids[n_prompt:].tolist())
    return loss.logp_and_entropy(logits[row["index"]], torch.eye(logits.shape[1]), row["targets"], temperature)[0]


def own_training_row(prompt_ids, prefix_ids, response_ids):
    row = check.packed(prompt_ids, prefix_ids, response_ids)
    ids = torch.cat([row["input_ids"][0], row["targets"][-1:]])           # the last token is no input
    return ids, torch.zeros(len(ids), dtype=torch.bool).index_fill(0, row["index"] + 1, True)


@pytest.fixture
def own_train(cpu, tmp_path, monkeypatch):
    """cure.run_stage and checkpoint.save as they are, without a model: a step takes its prompts, a checkpoint has no
    weights. -> train(steps, k, n, saved), the checkpoint being the text of its meta.json."""
    import cure
    from lib import checkpoint
    from lib.data import PromptStream
    monkeypatch.setattr(cure, "train_step", lambda run, cfg, task: run.batches.append(task.stream.take(cfg.k)) or {})
    monkeypatch.setattr(cure, "describe", lambda run, cfg, line: "")
    monkeypatch.setattr(cure, "warn", lambda run, cfg, line: None)
    monkeypatch.setattr(checkpoint.dcp, "save", lambda state, storage_writer: None)
    monkeypatch.setattr(checkpoint, "save_card", lambda run, cfg, folder: None)
    monkeypatch.setattr(checkpoint, "sync", lambda path: None)            # fsync: the disk's business
    for log in checkpoint.LOGS:
        (tmp_path / log).touch()
    (tmp_path / "ckpt").mkdir()

    def nothing(*args):
        pass

    def train(steps, k, n, saved=None):
        cfg = SimpleNamespace(kind="rl", name="stage1", seed=0, k=k, steps=1000, max_steps=steps, save_every=0, keep_ckpts=1,
                              eval_data="", eval_every=0)
        state = {"stage": "stage1", "stage_step": 0, "step": 0, "stage_done": False, "cursor": [0, 0], "files": {}}
        policy = SimpleNamespace(adam_step=0, n_params=0, dtype=torch.float32, state=dict, new_optimizer=nothing, save_hf=nothing,
                                 save_adapter=nothing)
        run = SimpleNamespace(
            out=str(tmp_path), rank=0, world=1, device="cpu", stop=False, code={}, lora=None, pending={}, tokenizer=None, batches=[],
            stages=[("stage1", cfg)], state=json.loads(saved) if saved else state, policy=policy, print=nothing, log=nothing,
            tasks={"stage1": SimpleNamespace(prompts=range(n), stream=PromptStream(n, "0/stage1"))},
            engine=SimpleNamespace(sleep=nothing), refresh=nothing,
        )  # fmt: skip
        assert cure.run_stage(run, "stage1", cfg, SimpleNamespace(update=nothing)) is False, "max_steps ended it"
        name = checkpoint.latest(f"{run.out}/ckpt")
        return run.batches, (tmp_path / "ckpt" / name / "meta.json").read_text()

    return train


# ----------------------------------------------------------------------------------------------------------------- tests
@pytest.mark.parametrize("n", check.EXERCISES)
def test_an_exercise_lacks_the_stated_properties_and_no_others(n):
    found = failures(n, check.EXERCISES[n][1])
    assert {claim for claim, wrong in found.items() if wrong} == FAILS[n], found
    assert len(found) - len(FAILS[n]) >= 3, "several hold, so that the mistake is not plain from the first line"
    assert len(found) == sum(1 for _ in check.EXERCISES[n][0](None)), "each claim once"
    for wrong in filter(None, found.values()):
        expected, came = re.match(r"expected (.+), came ([^(]+)", wrong).groups()
        assert re.search(r"\d", expected) and re.search(r"\d|nan", came), wrong
    print(f"{len(found)} properties, {len(FAILS[n])} fail")


@pytest.mark.parametrize(("n", "own"), [(1, own_policy_loss), (2, loss.token_weights), (3, own_response_logp),
                                        (4, loss.group_advantages), (5, own_training_row)])  # fmt: skip
def test_the_projects_own_function_has_every_property(n, own):
    assert set(failures(n, own).values()) == {None}


def test_the_projects_own_loop_has_every_property(own_train):
    assert set(failures(6, own_train).values()) == {None}


@pytest.mark.parametrize("n", check.EXERCISES)
@pytest.mark.parametrize("f", [lambda *args: torch.full((3,), float("nan")), lambda *args: 1 / 0, lambda *args: None])
def test_no_property_holds_for_nan_an_error_or_nothing(n, f):
    found = failures(n, f)
    assert all(found.values()), found


def test_the_texts_of_a_failure():
    def says(want, got):
        return check.failure(lambda: (want, got))

    assert says([1.0, 2.0], torch.tensor([1.0, 2.00001], requires_grad=True)) is None
    assert says([1.0, 2.0], [1.0, 3.5]) == "expected 1 2, came 1 3.5"
    assert says(0.5, float("nan")) == "expected 0.5, came nan"
    assert says([1.0] * 20, [1.0] * 17 + [4.0, 2.0, 1.0]) == "expected 1, came 4 (number 17; 2 of 20 are wrong)"
    assert says([[1, 2]], [1, 2]) == "expected the shape (1, 2), came (2,)"
    assert check.failure(lambda: {}["step"]) == "KeyError: 'step'"


# --------------------------------------------------------------------------------------------------------- the command line
def test_the_command_prints_a_line_a_property_and_ends_with_1(capsys):
    for n, (_, f) in check.EXERCISES.items():
        assert check.main([str(n)]) == 1
        want = [f"FAILS  {claim}: {wrong}" if wrong else f"ok     {claim}" for claim, wrong in failures(n, f).items()]
        assert capsys.readouterr().out.splitlines() == want


def test_without_a_number_it_prints_a_table_of_all(capsys):
    assert check.main([]) == 1
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    counts = {n: (len(list(make(f))), len(FAILS[n])) for n, (make, f) in check.EXERCISES.items()}
    assert rows == [[str(n), f"{FILES[n - 1].stem}.{check.EXERCISES[n][1].__name__}", "ok", str(total - bad), "FAILS", str(bad)]
                    for n, (total, bad) in counts.items()]  # fmt: skip


def test_it_ends_with_0_only_if_all_hold(monkeypatch, capsys):
    own = {1: own_policy_loss, 2: loss.token_weights, 4: loss.group_advantages}
    monkeypatch.setattr(check, "EXERCISES", {n: (check.EXERCISES[n][0], f) for n, f in own.items()})
    assert [check.main([str(n)]) for n in own] == [0, 0, 0] and check.main([]) == 0
    assert "FAILS  " not in re.sub(r"FAILS  0$", "", capsys.readouterr().out, flags=re.M)
    check.EXERCISES[2] = (check.weights, lambda counts, lengths, agg, n_tokens, n_sequences: lengths.float())
    assert check.main([]) == check.main(["2"]) == 1 and check.main(["1"]) == 0


@pytest.mark.parametrize("argv", [["7"], ["0"], ["x"], ["--help"], ["1", "2"]])
def test_a_bad_argument_is_one_line_and_2(capsys, argv):
    assert check.main(argv) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err == "error: python -m docs.exercises.check [1 … 6]\n"


def test_it_runs_from_the_root_of_the_repository():
    done = subprocess.run([sys.executable, "-m", "docs.exercises.check", "6"], cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 1 and done.stderr == "", done.stderr
    assert sum(line.startswith("FAILS") for line in lines) == 2 and sum(line.startswith("ok") for line in lines) == 4


# --------------------------------------------------------------------------------------------------------------- the files
def test_an_exercise_is_one_short_function_below_a_docstring_without_a_comment():
    assert len(FILES) == len(check.EXERCISES) == 6
    for n, path in enumerate(FILES, 1):
        text = path.read_text()
        tree = ast.parse(text)
        (f,) = [node for node in tree.body if not isinstance(node, ast.Import | ast.ImportFrom | ast.Expr)]
        assert isinstance(f, ast.FunctionDef) and 5 <= f.end_lineno - f.lineno + 1 <= 20, path.name
        assert f.name == check.EXERCISES[n][1].__name__ and check.EXERCISES[n][1].__module__.endswith(path.stem)
        doc = ast.get_docstring(tree)
        assert doc.startswith(f"Exercise {n}: ") and "\nSource" in doc and "\nSeen in: " in doc, path.name
        assert "#" not in text.replace(doc, ""), f"{path.name}: a comment could give the mistake away"
    assert sum(len(p.read_text().splitlines()) for p in FOLDER.glob("*.py")) < 330


def test_the_readme_names_each_function_its_file_and_the_projects_own():
    rows = re.findall(r"^\| (\d) \| \[`(\w+)\.(\w+)`\]\((\w+)\.py\) \| (.*) \|$", README, re.M)
    assert [(int(n), file, name) for n, file, name, *_ in rows] == [
        (n, FILES[n - 1].stem, f.__name__) for n, (_, f) in check.EXERCISES.items()]
    for _, file, _, link, own in rows:
        assert link == file
        for name, path in re.findall(r"`(\w+)` in \[([\w/.]+)\]", own):
            assert re.search(rf"^def {name}\b", (ROOT / path).read_text(), re.M), own
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", README):
        assert (FOLDER / target).exists(), target
    assert len(re.findall(r"^\d\. ", README, re.M)) == 6
