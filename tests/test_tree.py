"""tools.tree: on small groups written here, which rows it takes, what page and text show, that no text of a model runs.
tools.branches: its numbers against counts by hand."""
import html.parser
import json
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
from test_analyze import assert_picture, branch_metrics, run_tool, train_line, write_run

from lib import toy
from tools import branches, common, tree

HOSTILE = ["</script><script>document.title='owned'</script>", "<img src=x onerror=\"document.title='owned'\">",
           "<!--<script>", "&lt;b&gt;", "\x1b[2J\x1b]0;owned\x07", "\u202etxt", "\ud800", "a\nb", "\t", ""]


@pytest.fixture(autouse=True)
def forget_warnings():
    """Every message is printed once in a process: each test wants its own."""
    common.warn.cache_clear()


def row(parent, tokens, t_star=None, correct=True, prefix=(), entropy=None, candidates=(), **more):
    n = len(tokens)
    ids = [sum(map(ord, token)) % 997 for token in tokens]
    return {"step": 1, "stage": "stage1", "prompt": "2+2?", "response": "".join(tokens), "prompt_id": 5, "group": 0,
            "parent": parent, "t_star": t_star, "h_star": None if t_star is None else .5,
            "candidates": list(candidates), "prompt_ids": [1, 2], "prefix_ids": list(prefix), "response_ids": ids,
            "tokens": list(tokens), "logp": [-.1] * n, "entropy": entropy or [.1] * n,
            "correct": correct, "reward": 1.0 if correct else -1.0, "advantage": .5 if correct else -.5,
            "answer": "4", "finish": "stop", **more}


def group(right="rwrwww", t_star=2, **more):
    """Two base responses of five tokens with two branches each, right or wrong as spelled: base, base, branches."""
    verdicts = [c == "r" for c in right]
    text, h = ["So", ".", " x", "=", "4"], [.9, .1, .7, .3, 0.]
    base = [row(-1, text, correct=ok, entropy=h, candidates=[2, 3]) for ok in verdicts[:2]]
    branches = [row(i, [first, " end"], t_star, ok, base[i]["response_ids"][:t_star or 0])
                for i, first, ok in zip([0, 0, 1, 1], [" x", " y", " z", " z"], verdicts[2:], strict=True)]
    return [one | more for one in base + branches]


def write_samples(folder, *groups, tail=""):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "samples.jsonl").write_text("".join(json.dumps(one) + "\n" for rows in groups for one in rows) + tail)
    return folder


# ---- reading and choosing --------------------------------------------------------------------------------------------

def test_what_is_missing_is_named(tmp_path, capsys):
    for run, message in ((tmp_path / "nowhere", "nowhere: no such run folder"), (tmp_path, "has no samples.jsonl")):
        with pytest.raises(ValueError, match=message):
            tree.choose_group(run)
    old = group()
    del old[3]["entropy"], old[3]["logp"]
    with pytest.raises(ValueError, match="samples.jsonl holds no whole group$"):
        tree.choose_group(write_samples(tmp_path / "old", old))
    assert "line 4: it lacks entropy, logp: left out" in capsys.readouterr().err
    with pytest.raises(ValueError, match="samples.jsonl holds no whole group$"):
        tree.choose_group(write_samples(tmp_path / "empty"))
    with pytest.raises(ValueError, match="no whole group of step 3, only steps 1 to 1$"):
        tree.choose_group(write_samples(tmp_path / "one", group()), step=3)


def test_a_row_that_is_no_rollout_costs_its_group_only(tmp_path, capsys):
    for key, wrong in (("parent", None), ("t_star", 99), ("response_ids", []), ("entropy", [.1]), ("candidates", [99]),
                       ("step", [])):
        bad = group(group=1)
        bad[4] |= {key: wrong}
        kept = [rows[0]["group"] for _, groups in tree.groups_by_step(write_samples(tmp_path, group(), bad))
                for rows in groups]
        assert kept == [0], key
    assert "samples.jsonl, line 11: its fields do not fit together: left out" in capsys.readouterr().err


def test_a_file_that_ends_inside_a_group_shows_no_part_of_it(tmp_path, capsys):
    for rows in (2, 4):  # two base responses, and two with both branches of the first
        common.warn.cache_clear()
        run = write_samples(tmp_path, group(), group(step=2)[:rows], tail='{"step": 2, "par')
        assert tree.choose_group(run)[0]["step"] == 1 and "step 2, group 0: rows are missing" in capsys.readouterr().err


def test_a_torn_row_costs_its_group_only(tmp_path, capsys):
    torn = json.dumps(group(group=2)[5])[:70]
    run = write_samples(tmp_path, group(), group(group=1, prompt_id=6)[1:], group(group=2, prompt_id=7)[:5], tail=torn)
    (_, groups), = tree.groups_by_step(run)
    assert [rows[0]["group"] for rows in groups] == [0]
    message = capsys.readouterr().err
    assert "line 17 is torn: left out" in message
    assert "step 1, group 1: rows are missing" in message and "step 1, group 2: rows are missing" in message


def test_the_group_shown_is_of_the_last_step_that_branched_where_most_verdicts_turned(tmp_path):
    dapo = [row(-1, ["a", "b"], correct=i == 0, step=3, stage="stage2") for i in range(6)]
    second = [group(right, step=2, prompt_id=6 + i, group=i) for i, right in enumerate(["rwrwww", "rwwwrw", "rrrrrr"])]
    run = write_samples(tmp_path, group("rwrwww"), *second, dapo)
    chosen = tree.choose_group(run)
    assert (chosen[0]["step"], chosen[0]["prompt_id"]) == (2, 7)
    assert tree.choose_group(run, prompt=6)[0]["prompt_id"] == 6 and tree.choose_group(run, 1)[0]["step"] == 1
    assert tree.choose_group(run, 3)[0]["stage"] == "stage2"
    with pytest.raises(ValueError, match="no whole group of step 9, only steps 1 to 3"):
        tree.choose_group(run, 9)
    with pytest.raises(ValueError, match="step 2 holds the prompts 6, 7, 8, not 5"):
        tree.choose_group(run, 2, 5)


# ---- page and text ---------------------------------------------------------------------------------------------------

def test_the_tree_says_where_branches_leave_and_what_they_inherit(tmp_path):
    data = tree.tree_data(tmp_path, group(t_star=3))
    base, _, branch, *_ = data["leaves"]
    assert [leaf["name"] for leaf in data["leaves"]] == ["0", "1", "0.1", "0.2", "1.1", "1.2"]
    assert (base["fork"], base["t_star"], base["from"], base["h_star"]) == (3, 3, 0, .5)
    assert (branch["parent"], branch["fork"]) == (0, 3)
    assert data["summary"] == "2 base responses × (1 + 2 branches), 2 of 6 right"
    last = group(t_star=3)
    for one in last[2:]:
        one["prefix_ids"] = one["prefix_ids"][2:]
    data = tree.tree_data(tmp_path, last)
    assert data["leaves"][0]["from"] == 2, "clause: last"
    assert "branches inherit tokens 2 to 2 only:\n      ‹ x›" in tree.terminal(data)
    alone = tree.tree_data(tmp_path, group()[:2])
    assert alone["summary"] == "2 base responses, 1 of 2 right"
    assert [alone["leaves"][0][key] for key in ("fork", "from")] == [5, 0], "nothing is inherited"


def test_a_plain_resample_leaves_at_the_start_and_is_no_fork_at_position_0(tmp_path):
    base, _, branch, *_ = tree.tree_data(tmp_path, group(t_star=None))["leaves"]
    assert [base[key] for key in ("fork", "t_star", "h_star", "from")] == [0, None, None, 0] and branch["fork"] == 0
    at_0 = tree.tree_data(tmp_path, group(t_star=0))
    assert [at_0["leaves"][0][key] for key in ("fork", "t_star", "h_star")] == [0, 0, .5]
    assert "shared up to t* = 0, H 0.500\n    base 0 goes on: 0 'So'" in tree.terminal(at_0)
    on_file = branches.forks_on_file(write_samples(tmp_path, group(t_star=0), group(t_star=None, group=1)))
    assert on_file["fallback"].tolist() == [0, 0, 1, 1] and on_file["depth"].tolist() == [0] * 4
    assert on_file["rank"][:2].tolist() == [1, 1] and np.isnan(on_file["rank"][2:]).all(), "H 0.9 is the highest"


def test_rows_without_token_texts_are_left_out_and_say_so(tmp_path, capsys):
    rows = [{key: x for key, x in one.items() if key != "tokens"} for one in group()]
    with pytest.raises(ValueError, match="holds no whole group"):
        tree.choose_group(write_samples(tmp_path, rows))
    assert "line 1: it lacks tokens: left out, and 5 lines more" in capsys.readouterr().err


class Scripts(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.data = [("", {})], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.data.append("")

    def handle_data(self, data):
        if self.tags[-1][0] == "script":
            self.data[-1] += data


def hostile_group():
    rows = group(prompt=HOSTILE[0], stage=HOSTILE[1], answer=HOSTILE[1])
    rows[0] |= row(-1, HOSTILE, candidates=[0, 1], prompt=HOSTILE[0], logp=[float("nan")] * 10, advantage=float("nan"))
    return rows


def test_model_text_cannot_leave_the_pages_data(tmp_path):
    data = tree.tree_data(tmp_path, hostile_group())
    text = tree.page(data)
    found = Scripts()
    found.feed(text)
    scripts = [attrs for tag, attrs in found.tags if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "data"}, {"nonce": "tree"}]
    assert "img" not in [tag for tag, _ in found.tags]
    read = json.loads(found.data[0])
    assert read["leaves"][0]["tokens"] == [text.replace("\ud800", "?") for text in HOSTILE]
    assert read["prompt"] == HOSTILE[0] and read["leaves"][0]["logp"][0] is None
    for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "http:", "https:", "src="):
        assert sink not in text.replace(found.data[0].strip(), ""), sink
    assert "default-src 'none'" in text


def test_text_shows_the_same_and_no_control_character(tmp_path):
    text = tree.terminal(tree.tree_data(tmp_path, hostile_group()))
    assert all(c.isprintable() or c == "\n" for c in text)
    assert "‹</script><script>document.title='owned'</script>›" in text and "\ufffd[2J" in text
    text = tree.terminal(tree.tree_data(tmp_path, group()))
    assert "base 0  ✓ reward +1.00 advantage +0.50 · answer 4 · 5 tokens, stop" in text
    assert "candidates: 2 ' x' H 0.700 log-prob -0.100 · 3 '=' H 0.300" in text
    assert "shared up to t* = 2, H 0.500\n      So.\n" in text
    assert "base 0 goes on: 2 ' x'" in text and "« x»‹=›4" in text
    assert re.search(r"branch 1\.2  ✗ reward -1\.00.*first 0 ' z'.*\n      « z» end", text)
    coloured = tree.terminal(tree.tree_data(tmp_path, group()), colour=True)
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == text and "\x1b[48;2;" in coloured


def test_every_colour_is_darker_than_the_one_before():
    linear = [[c / 255 / 12.92 if c < 11 else ((c / 255 + .055) / 1.055) ** 2.4 for c in rgb] for rgb in tree.RAMP]
    luminance = [np.dot(rgb, (.2126, .7152, .0722)) for rgb in linear]
    assert all(a > 1.25 * b for a, b in zip(luminance, luminance[1:], strict=False)), luminance


def test_a_model_gives_rank_and_alternatives(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    toy.make_toy(f"{tmp_path}/model", n_train=4, n_heldout=4, n_sft=4)
    tokenizer, rows = AutoTokenizer.from_pretrained(f"{tmp_path}/model"), group()
    for one in rows:  # ids the toy's model knows
        one |= {key: [i % 24 for i in one[key]] for key in ("response_ids", "prefix_ids")}
        one["response"] = tokenizer.decode(one["prefix_ids"] + one["response_ids"], skip_special_tokens=True)
    (tmp_path / "stages.json").write_text('{"stage1": {"temperature": 0.5}}')
    leaf = tree.tree_data(tmp_path, rows, f"{tmp_path}/model")["leaves"][2]
    ids = torch.tensor([rows[2]["prompt_ids"] + rows[2]["prefix_ids"] + rows[2]["response_ids"]])
    with torch.no_grad():
        p = (AutoModelForCausalLM.from_pretrained(f"{tmp_path}/model")(ids).logits[0, 3:5].double() / .5).softmax(-1)
    for i, own in enumerate(rows[2]["response_ids"]):
        assert leaf["rank"][i] == 1 + int((p[i] > p[i, own]).sum())
        assert [q for _, q in leaf["likeliest"][i]] == pytest.approx(p[i].topk(5).values.tolist(), abs=1e-4)
    assert "likeliest" in tree.terminal(tree.tree_data(tmp_path, rows, f"{tmp_path}/model"))
    for change in ({"response_ids": [10**6, 1, 1, 1, 1]}, {"response": "other text"}):
        with pytest.raises(ValueError, match="has another tokenizer than these rollouts"):
            tree.tree_data(tmp_path, [rows[0], rows[1] | change, *rows[2:]], f"{tmp_path}/model")


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")
def test_in_a_browser_hostile_text_is_only_text_and_the_tree_is_drawn(tmp_path):
    (tmp_path / "tree.html").write_text(tree.page(tree.tree_data(tmp_path, hostile_group())), encoding="utf-8")
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's sandbox does not start as root
    done = subprocess.run([CHROMIUM, "--headless", *sandbox, "--disable-gpu", "--hide-scrollbars",
                           "--window-size=1000,900", f"--user-data-dir={tmp_path}/user",
                           f"--screenshot={tmp_path}/tree.png", "--dump-dom", f"{tmp_path}/tree.html"],
                          capture_output=True, text=True, timeout=60)
    assert "<title>owned" not in done.stdout and "· prompt 5</title>" in done.stdout
    assert done.stdout.count("data-i=") == 2 * 5 + 5 + 4 * 2, done.stderr  # ten hostile tokens, five, four times two
    assert done.stdout.count("<script") == 2 and "<img" not in done.stdout
    assert_picture(tmp_path / "tree.png")


# ---- branches --------------------------------------------------------------------------------------------------------

def cells(table):
    return {re.split(r"\s{2,}", line.strip())[0]: re.split(r"\s{2,}", line.strip())[1:] for line in table.splitlines()}


def test_branches_table_against_counts_by_hand(tmp_path):
    run = write_samples(tmp_path, group("rwrwww"), group("rwrwrw", t_star=1, group=1, prompt_id=6))
    table = cells(branches.branches_table({}, branches.forks_on_file(run)))
    assert {name: table[name][1] for name in table if "->" in name} == {
        "parent right -> branch right": "0.250", "parent right -> branch wrong": "0.250",
        "parent wrong -> branch right": "0.125", "parent wrong -> branch wrong": "0.375"}
    assert table["base responses that are right"][1] == "0.500" and table["branches that are right"][1] == "0.375"
    assert table["branches with another verdict than their parent"] == ["-", "0.375"]
    assert table["pairs of base responses of a prompt with different verdicts"][1] == "1.000"
    assert table["depth of t*, tokens (0 without a critical token)"][1] == "1.5"
    assert table["entropy at t*, nats"][1] == "0.400"
    assert table["different first tokens among them"][1] == "1.50", "x y, z z"
    assert table["that start with the token that was dropped"][1] == "12.5%", "one x of eight"
    assert table["generated tokens of a branch"][1] == "2.0"
    assert table["tokens saved by a branch against a fresh base response"][1] == "60.0%"
    ranks = table["rank of its entropy in the response, 10th / 50th / 90th"][1]
    assert ranks == "2 / 3 / 4", "0.7 is second, 0.1 fourth of five"
    turned = table["verdict turned, forks in the parent's first / second / last third"]
    assert turned == ["-", "0.500 / 0.250 / -"], "t* 1 and t* 2 of five tokens"
    assert table["groups that branched"] == ["-", "2"]
    right = branches.forks_on_file(write_samples(tmp_path, group("rrrrww")))
    assert right["flip"].tolist() == [0, 1] and right["branch"].tolist() == [1, 0], "right as their parent: none turned"


def test_rates_over_all_sampled_rollouts_weigh_steps_by_their_groups(tmp_path):
    lines = [train_line(1, **branch_metrics(1), **{"train/sampled_groups": 10, "branch/fallback_share_sampled": .1}),
             train_line(2, **branch_metrics(2), **{"train/sampled_groups": 30, "branch/fallback_share_sampled": .2}),
             train_line(3, "stage2")]
    lines[0] |= {"branch/accuracy_base_sampled": .5, "branch/accuracy_branch_sampled": .4,
                 "branch/flip_rate_sampled": .3, "branch/entropy_at_t_star_sampled": .5}
    lines[1] |= {"branch/accuracy_base_sampled": .7, "branch/accuracy_branch_sampled": .8,
                 "branch/flip_rate_sampled": .1}
    table = cells(branches.branches_table(branches.forks_sampled(write_run(tmp_path, lines)), {}))
    assert table["groups that branched"] == ["40", "-"] and table["forks without a critical token"][0] == "17.5%"
    assert table["entropy at t*, nats"][0] == "0.718", "(0.5 x 9 + 0.8 x 24) / 33: forks of 9 and 24 groups have a t*"
    # step 1: of 10 groups right-right .3, right-wrong .2, wrong-right .1; step 2, of 30: .7, 0, .1
    assert [table[f"parent {a} -> branch {b}"][0] for a in ("right", "wrong") for b in ("right", "wrong")] == [
        "0.600", "0.050", "0.100", "0.250"]
    assert table["candidates over the prompt budget"] == ["-", "-"]


@pytest.mark.parametrize("files", ["both", "samples", "metrics"])
def test_branches_draws_from_what_there_is(tmp_path, capsys, files):
    if files != "metrics":
        write_samples(tmp_path, *(group(step=step) for step in (1, 2, 3)), group(t_star=None, step=4))
    if files != "samples":
        write_run(tmp_path, [train_line(step, **branch_metrics(step)) for step in (1, 2, 3)])
    printed = branches.table_and_picture(tmp_path)
    assert printed.endswith("branches.png") and f"steps 1 to {3 if files == 'metrics' else 4}" in printed
    assert_picture(tmp_path / "plots" / "branches.png")
    missing = {"both": "", "samples": "no metrics.jsonl", "metrics": "no samples.jsonl"}[files]
    assert missing in capsys.readouterr().err


def test_forks_without_a_critical_token_have_no_rank(tmp_path):
    run = write_samples(tmp_path, group(t_star=None))
    on_file = branches.forks_on_file(run)
    assert np.isnan(on_file["rank"]).all() and on_file["fallback"].all()
    assert_picture(branches.table_and_picture(run).split("\n")[-1])
    text = tree.terminal(tree.tree_data(run, tree.choose_group(run)))
    assert "no critical token: the branches are fresh samples" in text


def test_a_run_that_never_branched_says_so(tmp_path):
    with pytest.raises(ValueError, match="no branches in it"):
        branches.table_and_picture(write_run(write_samples(tmp_path, group()[:2]), [train_line(1)]))


# ---- the command line ------------------------------------------------------------------------------------------------

def test_tree_and_branches_from_the_command_line(tmp_path):
    run = write_samples(tmp_path / "toy", group())
    done = run_tool("tree", run, "--step", 1, "--prompt", 5)
    page = run / "plots" / "tree-step1-prompt5.html"
    assert done.stdout == f"{page}: 2 base responses × (1 + 2 branches), 2 of 6 right\n"
    assert done.returncode == 0 and page.is_file()
    text = tree.terminal(tree.tree_data(run, group()))
    assert run_tool("tree", run, "--text").stdout == text + "\n", "no colour in a pipe"
    done = run_tool("branches", tmp_path / "nowhere", run)
    assert done.returncode == 2 and "parent right -> branch right" in done.stdout
    assert done.stderr.splitlines() == [f"error: {tmp_path / 'nowhere'}: no such run folder",
                                        f"{run} is no run, or an incomplete one: it has no metrics.jsonl"]
