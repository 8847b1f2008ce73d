"""tools.token_entropy: its numbers against hand-computed ones and brute force, and what it does about bad input."""
import json
import random
import shutil
from collections import defaultdict

import numpy as np
import pytest
import torch
from conftest import ragged
from test_analyze import assert_picture

from lib.weights import load_lm
from tools import common, token_entropy


def sample_rows(tokenizer, n=12, steps=(1, 2, 3), branches=0, seed=0):
    """Lines of samples.jsonl from random ids. Logged entropies are 0.1 times the step, branches come last in a step."""
    rows = []
    for i, r in enumerate(ragged(n + branches, seed=seed, vocab=25)):
        fresh = i < n
        step = steps[i * len(steps) // n] if fresh else steps[-1]
        rows.append({"step": step, "parent": -1 if fresh else 0, "prompt_ids": r.prompt_ids,
                     "prefix_ids": [] if fresh else [3, 4], "response_ids": r.response_ids,
                     "entropy": [.1 * step] * len(r.response_ids),
                     "response": tokenizer.decode(r.response_ids, skip_special_tokens=True)})
    return rows


def write_run(folder, rows, base=None, checkpoints=(), tail=""):
    folder.mkdir(parents=True)
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    if base:
        stages = {"s": {"model": str(base), "init_from": "", "temperature": 1.0}}
        (folder / "stages.json").write_text(json.dumps(stages))
    for step, model in checkpoints:
        shutil.copytree(model, folder / f"ckpt/step_{step:06d}/hf")
    return folder


@pytest.fixture(scope="module")
def tokenizer(sharp):
    return token_entropy.load_tokenizer(sharp)[0]


# ---- numbers ---------------------------------------------------------------------------------------------------------

def test_extremes_of_a_hand_made_row():
    ids = np.array([7, 7, 7, 2, 2, 2, 5, 5, 5, 9, 9, 4, 4, 4])
    h = np.array([1, 2, 3, .5, .5, .5, 4, 4, 4, 99, 99, 0, 0, .3])
    expected = [(5, 3, 4)], [(4, 3, pytest.approx(.1))], 4  # 9 is seen twice
    assert token_entropy.extremes(ids, h, k=1, more_than=2) == expected
    high, low, number = token_entropy.extremes(ids, h, k=100, more_than=2)
    assert ([e[0] for e in high], [e[0] for e in low], number) == ([5, 7], [4, 2], 4), "too few: halves, nothing twice"
    assert token_entropy.extremes(ids, h, k=100, more_than=3) == ([], [], 0)
    high, low, _ = token_entropy.extremes(np.repeat([3, 1, 2], 2), np.ones(6), k=2, more_than=1)
    assert ([e[0] for e in high], [e[0] for e in low]) == ([1, 2], [3]), "ties: the lower id first"


def test_extremes_agree_with_brute_force():
    rng = random.Random(0)
    ids = [min(int(rng.expovariate(1 / 150)), 600) for _ in range(60_000)]
    h = [rng.expovariate(1 + i % 7) for i in ids]
    seen = defaultdict(list)
    for i, x in zip(ids, h, strict=True):
        seen[i].append(x)
    often = {i: sum(xs) / len(xs) for i, xs in seen.items() if len(xs) > 100}
    assert 200 < len(often) < len(seen)
    high, low, number = token_entropy.extremes(np.array(ids), np.array(h))
    assert number == len(often) and len(high) == len(low) == 100
    assert [e[0] for e in high] == sorted(often, key=lambda i: -often[i])[:100]
    assert [e[0] for e in low] == sorted(often, key=lambda i: often[i])[:100]
    assert all(count == len(seen[i]) and mean == pytest.approx(often[i]) for i, count, mean in high + low)


def test_overlap_by_hand_and_by_brute_force():
    base, final = np.array([9, 8, 1, 1, 1, 1, 1, 1, 1, 1.]), np.array([9, 1, 1, 1, 1, 1, 1, 1, 1, 8.])
    np.testing.assert_array_equal(token_entropy.overlaps([base, final]), [[1, .5], [.5, 1]])
    first_two = np.array([2, 2, 1, 1, 1, 1, 1, 1, 1, 1.])
    assert (token_entropy.overlaps([np.ones(10), first_two]) == 1).all(), "exactly 20 %, of equal ones the first"
    hs = np.random.default_rng(0).exponential(size=(3, 1003)).round(1)  # many ties, and 0.2 N = 200.6 -> 201
    sets = [set(sorted(range(1003), key=lambda i: (-h[i], i))[:201]) for h in hs]
    expected = [[len(a & b) / 201 for b in sets] for a in sets]
    np.testing.assert_allclose(token_entropy.overlaps(hs), expected, rtol=1e-12)


def test_change_by_bin_by_hand_and_by_brute_force():
    base = np.arange(40.)[::-1] / 10  # bin i of 20 holds 2 i / 10 and (2 i + 1) / 10
    final = base + np.arange(40)[::-1] // 2
    expected = [((2 * i + 1) / 10, (4 * i + 1) / 20, i) for i in range(20)]
    np.testing.assert_allclose(token_entropy.change_by_bin(base, final), expected, atol=1e-12)
    rng = np.random.default_rng(1)
    base, final = rng.exponential(size=(2, 2000)).round(2)
    order = sorted(range(2000), key=lambda i: (base[i], i))
    for k, (top, mean, change) in enumerate(token_entropy.change_by_bin(base, final)):
        part = order[100 * k:100 * k + 100]
        assert (top, mean) == (max(base[part]), pytest.approx(sum(base[part]) / 100))
        assert change == pytest.approx(sum(final[i] - base[i] for i in part) / 100)
    assert len(token_entropy.change_by_bin(base[:3], final[:3])) == 3, "fewer tokens than bins"


def test_percentile_table_by_hand():
    table = token_entropy.percentile_table({"m": np.array([0, .005, .01, .02, 1])}).split("\n")
    assert table[0].split()[-3:] == ["m", "80/20", "paper"]
    cells = {line.split("  ")[0]: line.split()[2:] for line in table[1:]}
    assert cells["share below 0.01"] == ["0.01", "40.00%", "50.64%"], "0.01 itself is not below it"
    assert cells["50th percentile"] == ["0.0100"] and cells["80th percentile"] == ["0.2160", "0.672"]


@pytest.mark.parametrize("model", ["sharp", "odd"])
def test_scores_are_the_entropies_of_a_plain_forward_in_float64(model, tokenizer, request):
    folder = request.getfixturevalue(model)
    rows = sample_rows(tokenizer)
    got, _ = token_entropy.response_entropies(folder, rows)
    lm, expected = load_lm(folder, torch.float64, "eager"), []
    for row in rows:
        with torch.no_grad():
            z = lm(torch.tensor([row["prompt_ids"] + row["response_ids"]])).logits[0]
        logp = z[len(row["prompt_ids"]) - 1:-1].log_softmax(-1)
        expected += (-(logp.exp() * logp).sum(-1)).tolist()
    gap = np.abs(got - expected).max()
    print(f"largest difference of {len(got)} entropies: {gap:.1e} nats")
    assert len(got) == sum(len(row["response_ids"]) for row in rows) and gap < 2e-5


# ---- reading ---------------------------------------------------------------------------------------------------------

def test_the_last_fresh_responses_are_read_and_every_step_counts(tokenizer, tmp_path):
    rows = sample_rows(tokenizer, branches=3)
    run = write_run(tmp_path / "run", rows)
    got, by_step = token_entropy.read_responses(run / "samples.jsonl", 5)
    assert got == rows[7:12], "branches are left out"
    lengths = [len(row["response_ids"]) for row in rows]
    expected = {1: sum(lengths[:4]), 2: sum(lengths[4:8]), 3: sum(lengths[8:12])}
    assert {step: len(h) for step, h in by_step.items()} == expected
    assert np.allclose(by_step[2], .2)


def test_torn_and_foreign_lines_are_one_message_and_the_rest_is_read(tokenizer, tmp_path, capsys):
    rows = sample_rows(tokenizer)
    tail = "".join(json.dumps(bad) + "\n" for bad in (
        {"prompt": "1+1?"}, 7, None, rows[0] | {"entropy": [.1]},
        rows[0] | {"entropy": [float("nan")] * len(rows[0]["entropy"])},
        rows[0] | {"response": None})) + json.dumps(rows[0])[:99]
    run = write_run(tmp_path / "run", rows, tail=tail)
    assert token_entropy.read_responses(run / "samples.jsonl", 99)[0] == rows
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "line 13: it lacks entropy, " in message and "and 6 lines more" in message
    (run / "samples.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds no fresh response"):
        token_entropy.read_responses(run / "samples.jsonl", 99)


def test_models_are_named_by_what_tells_them_apart():
    names = token_entropy.short_names(["runs/a", "b/step_000040/hf"])
    assert names == {"a": "runs/a", "step_000040": "b/step_000040/hf"}
    assert list(token_entropy.short_names(["x/hf", "y/x/hf", "z"])) == ["x/hf", "y/x/hf", "z"]


# ---- the command -----------------------------------------------------------------------------------------------------

def call(capsys, *argv):
    """python -m tools.token_entropy …, here -> (exit code, stdout, stderr)."""
    common.warn.cache_clear()
    return token_entropy.main(list(map(str, argv))), *capsys.readouterr()


def test_a_run_becomes_tables_and_pictures(sharp, odd, tokenizer, tmp_path, capsys):
    run = write_run(tmp_path / "run", sample_rows(tokenizer, 40, range(1, 9)), sharp, [(4, odd), (8, sharp)])
    code, out, err = call(capsys, run)
    assert (code, err) == (0, "")
    assert "40 fresh responses, of steps 1 to 8" in out
    overlap = next(line for line in out.split("\n") if line.startswith("base")).split()
    assert overlap[1] == overlap[3] == "100.00%" != overlap[2], "the last checkpoint has the base's weights"
    changes = [line.split()[-1] for line in out.split("\n") if line.split()[1:2] == ["to"] and "%" in line]
    assert changes == ["+0.00000"] * 20
    assert_picture(run / "plots/entropy.png")
    table = (run / "plots/entropy_tokens.tsv").read_text().split("\n")
    assert table[0].split("\t") == ["list", "rank", "id", "text", "count", "mean_H"]


def test_models_and_a_samples_file_without_a_run(sharp, odd, tokenizer, tmp_path, capsys):
    rows = [row | {key: row[key] * 9 for key in ("response_ids", "entropy", "response")}
            for row in sample_rows(tokenizer, 30)]
    run = write_run(tmp_path / "run", rows)
    code, out, err = call(capsys, sharp, odd, "--samples", run / "samples.jsonl", "--out", tmp_path / "p")
    assert (code, err) == (0, "") and "mean change to odd" in out and "token ids were seen so often" in out
    ids = np.concatenate([row["response_ids"] for row in rows])
    expected = token_entropy.response_entropies(odd, rows)[0]
    table = [line.split("\t") for line in (tmp_path / "p/entropy_tokens.tsv").read_text().split("\n")[1:-1]]
    assert len(table) == sum(np.bincount(ids) > 100) > 10
    for _, _, i, text, count, mean in table:
        at = ids == int(i)
        assert int(count) == at.sum() and float(mean) == pytest.approx(expected[at].mean(), abs=1e-5)
        assert text == repr(tokenizer.decode([int(i)]))
    assert_picture(tmp_path / "p/entropy_tokens.png")


def test_what_is_missing_is_one_line_and_the_rest_is_done(sharp, tokenizer, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(sharp, other)
    text = (other / "tokenizer.json").read_text()
    spec = json.loads(text)
    vocab = spec["model"]["vocab"]
    vocab["1"], vocab["2"] = vocab["2"], vocab["1"]
    (other / "tokenizer.json").write_text(json.dumps(spec))
    empty = tmp_path / "empty"
    empty.mkdir()
    checkpoints = [(1, other), (2, sharp)]
    run = write_run(tmp_path / "run", sample_rows(tokenizer), "somebody/a-hub-id", checkpoints, tail='{"step": 3')
    code, out, err = call(capsys, tmp_path / "nowhere", empty, run)
    assert code == 2 and (run / "plots/entropy.png").is_file() and "(a) entropy of a token" in out and "(c)" not in out
    lines = err.strip().split("\n")
    for words in ("nowhere: no such run folder", "empty is no run, or an incomplete one: it has no samples.jsonl",
                  "'somebody/a-hub-id' is no folder here", "line 13 is torn: left out",
                  "another tokenizer than the samples'", "only step 2 is there"):
        assert sum(words in line for line in lines) == 1, (words, err)
    bare = write_run(tmp_path / "bare", sample_rows(tokenizer))
    code, out, err = call(capsys, bare)
    assert code == 0 and "no model scored it" in err and "as logged" in out and (bare / "plots/entropy.png").is_file()
    logged = np.concatenate([row["entropy"] for row in sample_rows(tokenizer)])
    line = next(line for line in out.split("\n") if line.startswith("80th percentile")).split()
    assert line == ["80th", "percentile", f"{np.percentile(logged, 80):.4f}", "0.672"]


def test_models_of_a_run_are_the_base_then_sft_then_the_steps(tmp_path):
    names = ["step_000012", "step_000000_sft_000040", "step_000004", "step_x", "latest"]
    for name in (*names, "../base"):
        (tmp_path / f"ckpt/{name}/hf").mkdir(parents=True)
    stages = {"sft": {"model": f"{tmp_path}/base", "init_from": "", "temperature": 1.0}}
    (tmp_path / "stages.json").write_text(json.dumps(stages))
    found = token_entropy.run_models(tmp_path)
    assert list(found) == ["base", "sft 40", "step 4", "step 12"]
    assert found["step 4"] == f"{tmp_path}/ckpt/step_000004/hf"
