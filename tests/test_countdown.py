"""lib/countdown.py: the verifier against an independent solver, what it refuses, the problems, the testbed."""
import functools
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from itertools import permutations

import pytest
from conftest import ROOT, lines, train_lines
from hypothesis import given
from hypothesis import strategies as st

from lib import toy
from lib.countdown import ILLEGAL, LIMIT, countdown_problem, gold_text, moves, read_gold, walk_ends
from lib.data import load_rows, render
from lib.pool import VerifierPool
from reward import INVALID, SELF_TEST, VERIFIERS, verdict

GOLD = "3 7 8 -> 29"


def graded(text, gold=GOLD):
    return verdict(text, gold, "countdown")[1:]


# ------------------------------------------------------------------------------------------------ an independent solver
def solutions(numbers, target, rational=False):
    """Every solution of a problem as (steps text, expression), by brute force over ordered pairs: nothing of ours is used.
    Fractions on the way (rational) have an expression and no step form."""
    out = []

    def search(pool, steps, exact):
        if len(pool) == 1:
            if pool[0][0] == target:
                out.append((steps if exact else None, pool[0][1]))
            return
        for i, j in permutations(range(len(pool)), 2):
            (a, x), (b, y) = pool[i], pool[j]
            rest = [p for k, p in enumerate(pool) if k not in (i, j)]
            results = [("+", a + b), ("-", a - b), ("*", a * b)] + ([("/", a / b)] if b else [])
            for op, value in results:
                if value.denominator != 1 and not rational:
                    continue
                step = f"{a}{op}{b}={value}"
                search([*rest, (value, f"({x}{op}{y})")], [*steps, step], exact and value.denominator == 1)

    search([(Fraction(n), str(n)) for n in numbers], [], True)
    return out


def replay(text, numbers, target):
    """Whether a trace is right, by another road than the verifier's: sorted lists and Python's integers."""
    pool = sorted(numbers)
    for step in text.strip().split(";"):
        a, op, b, c = re.fullmatch(r"(-?\d+)([-+*/])(-?\d+)=(-?\d+)", step).groups()
        a, b, c = int(a), int(b), int(c)
        for x in (a, b):
            if x not in pool:
                return False
            pool.remove(x)
        if op == "/" and (b == 0 or b * c != a) or op != "/" and {"+": a + b, "-": a - b, "*": a * b}[op] != c:
            return False
        pool.append(c)
    return pool == [target]


def test_all_legal_solutions_of_500_random_problems_are_right():
    rng, checked = random.Random(0), 0
    for _ in range(500):
        numbers, _, target = countdown_problem(rng, 3, 12)
        found = solutions(numbers, target, rational=True)
        for steps, expression in dict.fromkeys((";".join(s) if s else None, e) for s, e in found):
            assert graded(f"so <answer>{expression}</answer>", gold_text(numbers, target)) == (True, str(target))
            if steps:
                assert graded(f" {steps}", gold_text(numbers, target)) == (True, str(target))
            checked += 1
    assert checked > 1000
    print(f"{checked} solutions accepted")


def test_all_solutions_of_four_numbers_are_right():
    rng, checked = random.Random(1), 0
    for _ in range(6):
        numbers, _, target = countdown_problem(rng)
        for steps, expression in solutions(numbers, target):
            assert graded(f" {';'.join(steps)};", gold_text(numbers, target)) == (True, str(target))
            assert graded(f"<answer>{expression}</answer>", gold_text(numbers, target)) == (True, str(target))
            checked += 1
    print(f"{checked} solutions accepted")


# ----------------------------------------------------------------------------------------------------- no false accepts
def wrong_result(steps, numbers, target, rng):
    at, by = rng.randrange(len(steps)), rng.choice((-10, -1, 1, 10))
    head, value = steps[at].split("=")
    return [*steps[:at], f"{head}={int(value) + by}", *steps[at + 1 :]]


def right_end_by_a_wrong_step(steps, numbers, target, rng):
    return [*steps[:-1], steps[-1].split("=")[0].replace("+", "-") + f"={target}"] if "+" in steps[-1] else [
        *steps[:-1], steps[-1].split("=")[0] + f"+0={target}"]  # fmt: skip


def reused_number(steps, numbers, target, rng):
    x = rng.choice(numbers)
    return [*steps, f"{target}+{x}={target + x}", f"{target + x}-{x}={target}"]


def missing_number(steps, numbers, target, rng):
    return steps[:-1] if rng.random() < 0.5 else [s for i, s in enumerate(steps) if i != 0]


def foreign_number(steps, numbers, target, rng):
    x = rng.randint(11, 99)
    return [f"{x}*1={x}", *steps] if rng.random() < 0.5 else [f"{target - x}+{x}={target}"]


def another_walk(steps, numbers, target, rng):
    pool, out = tuple(sorted(numbers, reverse=True)), []
    while len(pool) > 1 and (legal := moves(pool)):
        (a, op, b), after = rng.choice(list(legal.items()))
        value = {"+": a + b, "-": a - b, "*": a * b}[op]
        out.append(f"{a}{op}{b}={value}")
        pool = after
    return out


def swapped_character(steps, numbers, target, rng):
    text = ";".join(steps)
    at = rng.randrange(len(text))
    return [text[:at] + rng.choice("0123456789+-*/=; x") + text[at + 1 :]]


def unicode_digits(steps, numbers, target, rng):
    zero = rng.choice((0x0660, 0x06F0, 0x0966, 0xFF10, 0x1D7CE))
    return [re.sub(r"[0-9]", lambda d: chr(zero + int(d[0])), ";".join(steps))]


KINDS = (wrong_result, right_end_by_a_wrong_step, reused_number, missing_number, foreign_number, another_walk,
         swapped_character, unicode_digits)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=[k.__name__ for k in KINDS])
def test_no_false_accepts_among_1250_wrong_traces_of_each_of_eight_kinds(kind):
    rng, tried, right, reasons = random.Random(kind.__name__), 0, 0, Counter()
    while tried < 1250:
        numbers, trace, target = countdown_problem(rng)
        text = ";".join(kind(trace.strip().split(";"), numbers, target, rng))
        canonical = re.fullmatch(r"((0|-?[1-9]\d*)[-+*/](0|-?[1-9]\d*)=(0|-?[1-9]\d*)(;|\Z))+", text, re.ASCII)
        correct, answer = graded(f" {text}", gold_text(numbers, target))
        if canonical and replay(text.removesuffix(";"), numbers, target):
            assert correct                              # the change was harmless: another solution
            right += 1
            continue
        if re.search("[ x]", text) is None:             # a blank between tokens is no fault
            assert not correct, (text, numbers, target)
        tried += not correct
        reasons[answer.split(":")[0].split(" ")[0]] += 1
        assert not correct or replay(text.replace(" ", "").removesuffix(";"), numbers, target), (text, numbers, target)
    print(f"{tried} wrong, 0 accepted; {right} changed into another solution; {dict(reasons)}")


@pytest.mark.parametrize(("text", "says"), [
    (" 3*7=22;22+8=30", "illegal: 3*7 is not 22"), (" 3*8=24", "numbers left: 7"), (" 3+7=10;10+8=18", "ends at 18"),
    (" 3*7=21;21+9=30", "illegal: 9 is not there"), (" 3*7=21;21+8", "illegal: '21+8' is no step"), ("", INVALID),
    (" 3*7=21;3+8=11", "illegal: 3 is not there"), (" 7/3=2;2+8=10", "illegal: 7/3 is not 2"),
    (" 3/0=3", "illegal: 0 is not there"), (" 03*7=21;21+8=29", "illegal: '03*7=21' is no step"),
    ("<answer>3*7</answer>", "numbers left: 8"), ("<answer>3*7+8+8</answer>", "illegal: 8 is not there"),
    ("<answer>3+7+8</answer>", "ends at 18"), ("<answer>8/(7-3)</answer>", "ends at 2"), ("<answer>3*7+8", INVALID),
    ("<answer>8/3*7</answer>", "ends at 56/3"), ("<answer>3**7+8</answer>", "illegal: '*' is not expected"),
    ("<answer>-3*7+8</answer>", "illegal: '-' is not expected"), ("<answer>3*7+8=29</answer>", "illegal: '=29'"),
    ("<answer>3 7 8</answer>", "illegal: '7' is not expected"), ("<answer></answer>", "illegal: 'the end' is not expected"),
    ("<answer>29</answer>", "illegal: 29 is not there"), ("<answer>(3*7+8</answer>", "illegal: a bracket is not closed"),
    ("<answer>3*7+8)</answer>", "illegal: ')' is not expected"), ("<answer>3*7.0+8</answer>", "illegal: '.0+8'"),
    (f"<answer>{'(' * 21}3{')' * 21}*7+8</answer>", "illegal: too deep"),
    ("<answer>3*7+8</answer> no: <answer>3+7*8</answer>", "ends at 59"),
])  # fmt: skip
def test_what_is_wrong_is_said(text, says):
    correct, answer = graded(text)
    assert not correct and answer.startswith(says)


@pytest.mark.parametrize("text", [
    " 3*7=21;21+8=29", "3 * 7 = 21; 21 + 8 = 29;", " 7*3=21;8+21=29\n", "<answer>(3 * 7) + 8</answer>",
    "first <answer>3</answer> then <answer> 8+(7*3) </answer> done", f"<answer>{'(' * 20}3{')' * 20}*7+8</answer>",
])  # fmt: skip
def test_the_two_forms_are_read(text):
    assert graded(text) == (True, "29")


def test_negative_numbers_and_zero_on_the_way():
    assert graded(" 3-7=-4;-4+8=4", "3 7 8 -> 4") == (True, "4")
    assert graded(" 3-7=-4;8--4=12", "3 7 8 -> 12") == (True, "12")
    assert graded(" 5-5=0;0*9=0", "5 5 9 -> 0") == (True, "0")
    assert graded("<answer>9/(5-5)</answer>", "5 5 9 -> 0") == (False, "illegal: division by 0")
    assert graded(" 5-5=0;9/0=0", "5 5 9 -> 0") == (False, "illegal: 9/0 is not 0")


HOSTILE = ["\0", "3*7=21\0;21+8=29", "٣*٧=٢١;٢١+٨=٢٩", "<answer>３*７+８</answer>", "3*7=21;21+8=29" + " " * 10**6, "9" * 10**6,
           "<answer>" + "(" * 10**6 + "</answer>", "<answer>" + "9" * 5000 + "</answer>", "<answer>" * 10**5,
           "<answer>" + "-" * 199 + "</answer>", "<answer>" + "9*" * 99 + "9</answer>", "<answer>__import__('os')</answer>",
           "<answer>9**9**9</answer>", "3*7=21;21+8=29;\u2028", "3×7=21;21+8=29", "<answer>3\u00a0*7+8</answer>", "\ud800",
           "1e9+1=1e9", "nan", "<answer>3*7+8#</answer>", "3*7=21;;21+8=29", "3*7=21;21+8=29;;", ";" * 10**6,
           "3*7=21,21+8=29", "3*7=21;21+8=29=29", "3*7=21;21+8=+29"]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_responses_are_wrong(text):
    points, correct, answer = verdict(text, GOLD, "countdown")
    assert (points, correct) == (-1.0, False) and len(answer) <= 1000 and answer.startswith((ILLEGAL, INVALID))


@given(st.text(max_size=60) | st.text("0123456789+-*/=;() <answer>", max_size=60))
def test_any_text_gets_a_verdict(text):
    for form in (text, f"<answer>{text}</answer>"):
        correct, answer = graded(form)
        assert correct in (True, False) and isinstance(answer, str)


def test_a_gold_of_another_form_is_refused_by_name():
    assert read_gold("3 7 8 -> -29") == ([3, 7, 8], -29)
    for gold in ("29", "", "3 7 8 -> ", "3,7,8 -> 29", "３ 7 8 -> 29", "3 7 8 -> 29\n"):
        with pytest.raises(ValueError, match="^verifier=countdown reads answers like '3 7 8 -> 29', got "):
            graded(" 3*7=21", gold)


def test_every_process_that_grades_has_the_verifier():
    assert VERIFIERS["countdown"] and {c for _, _, c in SELF_TEST["countdown"]} == {True, False}
    with VerifierPool() as pool:
        assert pool.verdicts([(" 3*7=21;21+8=29", GOLD)], "countdown")[0] == [(1.0, True, "29")]
        assert not pool.workers, "it runs in this process"
    code = "import lib.pool, reward, sys; assert 'countdown' in reward.VERIFIERS and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# ---------------------------------------------------------------------------------------------------------- its data
TINYZERO = {"nums": [44, 19, 35], "target": 98}


def test_tinyzeros_columns_are_read_and_asked_for_in_its_words(tmp_path):
    rendered = {"prompt": [{"role": "user", "content": "Using the numbers … <answer> (1 + 2) / 3 </answer>."}],
                "reward_model": {"style": "rule", "ground_truth": {"target": 98, "numbers": [44, 19, 35]}}}  # fmt: skip
    for row in (TINYZERO, rendered):
        (tmp_path / "x.jsonl").write_text(json.dumps(row) + "\n")
        rows, _ = load_rows(f"{tmp_path}/x.jsonl")
        assert rows[0]["answer"] == "44 19 35 -> 98"
    (tmp_path / "x.jsonl").write_text(json.dumps(TINYZERO) + "\n")
    rows, _ = load_rows(f"{tmp_path}/x.jsonl")

    class Plain:
        chat_template = ""

    text = render(rows[0]["prompt"], "countdown", Plain())
    assert "\nUser: Using the numbers [44, 19, 35], create an equation that equals 98. You can use basic" in text
    assert text.endswith("<answer> (1 + 2) / 3 </answer>.\nAssistant: Let me solve this step by step.\n<think>")
    assert graded("…</think>\n<answer> 44+19+35 </answer>", rows[0]["answer"]) == (True, "98")


def test_tinyzeros_parquet_is_read(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq
    pq.write_table(pa.table({"nums": [[44, 19, 35], [1, 2, 3, 4]], "target": [98, 10]}), tmp_path / "x.parquet")
    assert [r["answer"] for r in load_rows(f"{tmp_path}/x.parquet")[0]] == ["44 19 35 -> 98", "1 2 3 4 -> 10"]


@pytest.mark.parametrize("row", [{"nums": "3 7", "target": 2}, {"nums": [1.5, 2], "target": 2}, {"nums": [1], "target": [2]}])
def test_tinyzeros_columns_with_something_else_in_them_are_refused(tmp_path, row):
    (tmp_path / "x.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="^data: .*x.jsonl:1: nums and target should be whole numbers, got "):
        load_rows(f"{tmp_path}/x.jsonl")


def test_the_template_wants_countdown_problems():
    with pytest.raises(ValueError, match="^template: countdown wants columns nums and target"):
        render("What is 1+1?", "countdown", None)


# ----------------------------------------------------------------------------------------------------------- the problems
def test_problems_are_solved_by_their_traces_and_depend_on_their_generator_alone():
    rng = random.Random(0)
    for _ in range(500):
        numbers, trace, target = countdown_problem(rng)
        assert graded(trace, gold_text(numbers, target)) == (True, str(target))
        assert replay(trace, numbers, target) and 0 <= target <= 24 and len(numbers) == 4 and max(numbers) <= 9
    random.seed(1)
    state = random.getstate()
    assert countdown_problem(random.Random(7)) == countdown_problem(random.Random(7)) and random.getstate() == state


def test_problems_for_a_real_model_come_with_solutions_in_tinyzeros_form(tmp_path):
    """The command that configs/smollm2-countdown.yaml names: each solution is right by both forms of the verifier."""
    done = subprocess.run([sys.executable, "-m", "lib.countdown", "200"], capture_output=True, text=True, cwd=ROOT, check=True)
    (tmp_path / "made.jsonl").write_text(done.stdout)
    rows, counts = load_rows(f"{tmp_path}/made.jsonl")
    assert counts["kept"] == 200 and len({(*sorted(read_gold(r["answer"])[0]), r["answer"].split()[-1]) for r in rows}) == 200
    for row in rows:
        assert graded(row["solution"], row["answer"])[0]
        think = row["solution"].split("<think>\n")[1].split("</think>")[0]
        assert graded(think.strip().replace(" ", "").replace("\n", ";"), row["answer"])[0], "the steps lead there, too"
        assert row["solution"].endswith(" </answer>")


def test_the_counts_of_walks_are_those_of_walks():
    rng, numbers = random.Random(0), (9, 5, 2)
    ends, found = walk_ends(numbers), Counter()
    for _ in range(4000):
        pool = numbers
        while len(pool) > 1:
            pool = rng.choice(list(moves(pool).values()))
        found[pool[0]] += 1
    assert sum(ends.values()) == pytest.approx(1) and found.keys() == ends.keys()
    assert all(abs(found[e] / 4000 - p) < 4 * (p / 4000) ** 0.5 for e, p in ends.items())


@functools.cache
def walk_sees(pool, target, limit=LIMIT):
    """The probability that a uniform walk gets to two numbers that one move takes to the target."""
    legal = moves(pool, limit)
    if len(pool) == 2:
        return float((target,) in legal.values())
    return sum(walk_sees(after, target, limit) for after in legal.values()) / len(legal)


def difficulty(problems, limit=LIMIT, ks=(1, 16, 64)):
    """{walk: [pass@k], "perfect last step": [pass@k]} of a uniform legal walk, exact, mean over problems.

    problems: [(numbers, target)]. The testbed was chosen by this table before any model was trained."""
    pools = [(tuple(sorted(numbers, reverse=True)), target) for numbers, target in problems]
    rates = {"uniform walk": [walk_ends(p, limit).get(t, 0.0) for p, t in pools],
             "perfect last step": [walk_sees(p, t, limit) for p, t in pools]}  # fmt: skip
    return {name: [sum(1 - (1 - p) ** k for p in ps) / len(ps) for k in ks] for name, ps in rates.items()}


def test_the_table_of_difficulty_is_that_of_the_docs():
    rows = re.findall(r"^\| (\d) numbers to (\d+), results to (\d+) \| (.*) \|$", (ROOT / "docs/exploration.md").read_text(), re.M)
    assert len(rows) >= 4
    for n, top, limit, cells in rows[:3]:  # the third is the testbed
        rng, limit = random.Random(0), int(limit)
        drawn = [countdown_problem(rng, int(n), int(top), limit) for _ in range(400)]
        found = difficulty([(numbers, target) for numbers, _, target in drawn], limit)
        assert [f"{x:.3f}" for x in found["uniform walk"] + found["perfect last step"]] == cells.split(" | ")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("countdown"))
    toy.make_countdown(folder, n_train=300, n_heldout=100, n_sft=500, n_hard=50)
    return folder


def problems(folder, name):
    return [read_gold(json.loads(row)["answer"]) for row in open(f"{folder}/{name}.jsonl")]


def test_no_problem_is_in_two_sets(made):
    sets = {n: [(tuple(sorted(a)), t) for a, t in problems(made, n)] for n in ("heldout", "choose", "train", "sft")}
    assert {n: len(v) for n, v in sets.items()} == {"heldout": 100, "choose": 100, "train": 300, "sft": 500}
    assert all(row["prompt"] == f"{row['answer']}:" for row in map(json.loads, open(f"{made}/sft.jsonl")))
    for a, b in permutations(sets, 2):
        assert not set(sets[a]) & set(sets[b]), (a, b)
    assert all(len(set(sets[n])) == len(sets[n]) for n in ("heldout", "choose", "train"))
    hard, train = (problems(made, n) for n in ("hard", "train"))
    rates = [walk_ends(tuple(a))[t] for a, t in hard]
    rest = [walk_ends(tuple(a))[t] for a, t in train if (a, t) not in hard]
    assert len(hard) == 50 and len(rest) == 250 and rates == sorted(rates) and max(rates) <= min(rest)


def test_three_worked_walks_in_ten_end_at_the_target_on_purpose(made):
    rows = [json.loads(row) for row in open(f"{made}/sft.jsonl")]
    right = sum(graded(row["solution"], row["answer"])[0] for row in rows) / len(rows)
    assert 0.30 < right < 0.46, "three in ten, and a tenth of the others by chance: 0.37, 4 standard errors of 0.022"


def test_the_sets_are_made_the_same_twice(made, tmp_path):
    toy.make_countdown(str(tmp_path), n_train=300, n_heldout=100, n_sft=500, n_hard=50)
    for name in os.listdir(made):
        assert (tmp_path / name).read_bytes() == open(f"{made}/{name}", "rb").read(), name


def test_its_tokenizer_has_a_token_for_every_character_and_the_model_0_43_m_parameters(made):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    tokenizer, model = AutoTokenizer.from_pretrained(made), AutoModelForCausalLM.from_pretrained(made)
    for line in open(f"{made}/sft.jsonl"):
        row = json.loads(line)
        ids = tokenizer(row["prompt"] + row["solution"])["input_ids"]
        assert len(ids) == len(row["prompt"] + row["solution"]) <= 64 and tokenizer.decode(ids) == row["prompt"] + row["solution"]
    assert 425_000 < sum(p.numel() for p in model.parameters()) < 435_000


def test_its_regions_are_choices_and_results():
    text = " 9*3=27;27-4=23"
    regions = toy.BEDS["countdown"].regions(text)
    assert "".join(c for c, x in zip(text, regions["operands"], strict=True) if x) == "9*327-4"
    assert "".join(c for c, x in zip(text, regions["results"], strict=True) if x) == "2723"


# ------------------------------------------------------------------------------------------------- training, the matrix
def cold_start(folder, made):
    """A config of three stages on problems of two numbers: sft on right and wrong walks, then a step of CURE's stages."""
    rows = [{"prompt": f"{a} {b} -> {t}:", "answer": f"{a} {b} -> {t}", "solution": f" {max(a, b)}{op}{min(a, b)}={c}"}
            for a in range(1, 6) for b in range(1, 6) for op, c in (("+", a + b), ("*", a * b)) for t in {a + b, a * b}]
    (folder / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = (ROOT / "configs/countdown.yaml").read_text().split("stages:")[0].replace("countdown\n", f"{made}\n", 1)
    text = text.replace("data: countdown", f"data: {folder}/two.jsonl").replace("configs/countdown.yaml", "")
    text += ("stages:\n  cold: {kind: sft, steps: 120, lr: 3.0e-3, prompts_per_step: 64, prompts_per_minibatch: 64, eval_data: ''}\n"
             "  stage1: {steps: 1, n1: 4, n2: 1}\n  stage2: {steps: 1, n1: 8, n2: 0}\n")  # fmt: skip
    (folder / "tiny.yaml").write_text(text)
    return ["--config", f"{folder}/tiny.yaml", f"out_dir={folder}/run", "prompts_per_step=4", "prompts_per_round=16",
            "stages.cold.prompts_per_step=64", "prompts_per_minibatch=4", "stages.cold.prompts_per_minibatch=64",
            "eval_prompts=8", "eval_n=4", "engine=torch"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("method", ["", "surprisal"])
def test_two_steps_of_the_config_at_a_tiny_size(made, tmp_path, monkeypatch, method):
    import cure
    monkeypatch.setattr("tools.analyze.curves", lambda out: [])
    assert cure.main([*cold_start(tmp_path, made), f"method={method}"]) == 0
    first, second = (m for m in train_lines(tmp_path / "run") if "actor/grad_norm" in m and "sft/step" not in m)
    print({k: first[k] for k in ("train/accuracy", "train/kept_groups", "branch/entropy_at_t_star_sampled")})
    assert first["train/kept_groups"] >= 1 and first["actor/grad_norm"] > 0 and second["actor/grad_norm"] > 0
    evals = [m for m in lines(tmp_path / "run/metrics.jsonl") if "eval/illegal" in m]
    assert evals and all(0 <= m["eval/illegal"] <= 32 for m in evals)


def test_a_surprisal_branch_leaves_at_the_least_likely_tokens():
    import numpy as np
    import torch

    from methods.surprisal import critical_tokens
    from rollout import Rollout
    r = Rollout([1], [], [5, 6, 7, 5, 1], engine_logp=np.array([-9, -1, -3, -2, -8], np.float32))
    allowed = torch.tensor([False, False, True, True, True, True, True, True])
    assert critical_tokens(r, allowed).tolist() == [2, 3, 1], "not the first token, not the stop token"


@pytest.mark.parametrize("config", ["countdown", "countdown-dapo", "countdown-8020"])
def test_the_configs_differ_from_one_another_as_they_say(config):
    from lib.config import load_config
    stages = load_config(["--config", str(ROOT / f"configs/{config}.yaml")])
    same = {k: v for k, v in vars(stages[-1][1]).items() if k not in ("name", "out_dir", "steps", "critical_top_k", "entropy_mask_rho")}
    dapo = load_config(["--config", str(ROOT / "configs/countdown-dapo.yaml")])[0][1]
    assert same == {k: vars(dapo)[k] for k in same} and sum(c.steps for _, c in stages) == 80


def stub(tmp_path, tokens_a_step, solved=()):
    """A cure.py that logs evaluations and writes samples up to max_steps; (run, the goals that it was given)."""
    goals = []

    def run(argv, **_):
        given = dict(a.split("=", 1) for a in argv if "=" in a)
        goals.append(int(given["max_steps"]))
        steps = range(0, goals[-1] + 1, int(given["eval_every"]))
        rows = [{"step": s, "stage": "dapo", "tokens/generated": s * tokens_a_step, "eval/right": [min(s, 64), 0], "eval/illegal": 32,
                 "eval/pass@1": s / 1000, "eval/pass@8": 0, "eval/pass@64": 0, "eval/entropy_operands": 0, "eval/distinct": 0} for s in steps]
        (tmp_path / given["out_dir"] / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        samples = [{"step": s, "prompt_id": p, "correct": c, "parent": -1, "prompt_ids": [1], "response_ids": [1], "response": "a", "entropy": [0.0]}
                   for s, p, c in solved if s <= goals[-1]]  # fmt: skip
        (tmp_path / given["out_dir"] / "samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in samples))
        return subprocess.CompletedProcess(argv, 0)

    return run, goals


def test_the_matrix_resumes_skips_what_is_done_and_reads_off_budgets(tmp_path, monkeypatch):
    from tools import matrix
    monkeypatch.chdir(tmp_path)
    run, goals = stub(tmp_path, 15_000)
    matrix.finish("plain", "dapo", 0, run)
    assert goals == [20, 100, 120], "20 steps, the last evaluation within 1.6 M tokens, one more"
    matrix.finish("plain", "dapo", 0, run)
    assert len(goals) == 3, "nothing is left to do"
    done = matrix.evaluations("plain", "dapo", 0)
    assert done[1]["illegal"] == 32 / 128 and "ever_solved" not in done[1]
    assert matrix.at_budget(done, 450_000, lambda row: row["eval/pass@1"]) == pytest.approx(0.03)
    assert matrix.at_budget(done, 2_000_000, lambda row: row["eval/pass@1"]) is None
    assert re.search(r"1600k +1 +107 +0.107 ", matrix.table({("dapo", 0): done}, matrix.BUDGETS))


@pytest.mark.parametrize("code", [0, 1])
def test_a_run_that_was_interrupted_or_failed_is_not_started_again(tmp_path, monkeypatch, capsys, code):
    from tools import matrix
    monkeypatch.chdir(tmp_path)
    run, goals = stub(tmp_path, 15_000)
    matrix.warn.cache_clear()  # it says every message once

    def interrupted(argv, **kwargs):  # cure.py saves at Ctrl-C, and exits with 0
        run([a.replace("max_steps=20", "max_steps=10") for a in argv], **kwargs)
        return subprocess.CompletedProcess(argv, code)

    with pytest.raises(RuntimeError, match="plain-dapo-s1: stopped before step 20"):
        matrix.finish("plain", "dapo", 1, interrupted)
    assert len(goals) == 1
    monkeypatch.setattr(matrix, "finish", lambda *what, f=matrix.finish: f(*what, run=interrupted if what[2] else run))
    assert matrix.finish_all([("plain", "dapo", 1), ("plain", "dapo", 0)], 1) == 1, "the others are run all the same"
    assert "error: runs/exploration/plain-dapo-s1" in capsys.readouterr().err and len(matrix.evaluations("plain", "dapo", 0)) == 7


def test_problems_ever_solved_are_counted_up_to_each_evaluation(tmp_path, monkeypatch):
    from tools import matrix
    monkeypatch.chdir(tmp_path)
    run, _ = stub(tmp_path, 160_000, solved=[(1, 7, True), (1, 8, False), (5, 9, True), (5, 7, True), (6, 8, True), (11, 3, True)])
    matrix.finish("hard", "dapo", 0, run)
    assert [row["ever_solved"] for row in matrix.evaluations("hard", "dapo", 0)] == [0, 2, 3], "at steps 0, 5, 10"


def two_arms(right=(64, 0, 0, 0)):
    """{(arm, seed): evaluations} of two arms, two seeds, four problems, 64 samples; right: of the first arm's second seed."""
    def run(right, tokens):
        return [{"step": 0, "tokens/generated": t, "eval/right": list(r), "illegal": 0.25, "ever_solved": sum(r), "eval/distinct": 0,
                 **{f"eval/{k}": sum(r) / 256 for k in ("pass@1", "pass@8", "pass@64", "entropy_operands")}}
                for t, r in zip(tokens, ([8, 8, 0, 0], right), strict=True)]  # fmt: skip
    return {("cure", 0): run([64, 0, 0, 64], [0, 1_600_000]), ("cure", 1): run(right, [0, 1_600_000]),
            ("random", 0): run([64, 0, 0, 0], [0, 3_200_000]), ("random", 1): run([0, 0, 0, 0], [0, 3_200_000])}  # fmt: skip


def test_the_differences_of_two_arms_by_hand():
    from tools import matrix
    rows = [re.split(" {2,}", line.strip()) for line in matrix.differences(two_arms(), 1_600_000).split("\n")[1:]]
    # pass@1. cure: 1/2 and 1/4. random, half way from 1/16: 5/32 and 1/32. Differences 3/8 - 3/32 = 9/32. Variances over
    # the seeds 1/32 and 1/128, pooled 5/256: se = sqrt(5/256) = 0.140, with 2 degrees of freedom seen from 4.30 se
    # problems: cure 1, 0, 0, 1/2; random 5/16, 1/16, 0, 0
    def paired(x):
        return (sum((v - sum(x) / 4) ** 2 for v in x) / 3 / 4) ** 0.5

    assert rows[0] == ["cure - random", "2, 2", "pass@1", "+0.281", "0.140", "0.601", "no", f"{paired([11 / 16, -1 / 16, 0, 1 / 2]):.3f}"]
    # pass@64: solved or not. cure 1, 0, 0, 1/2; random, half way from 1, 1, 0, 0: 3/4, 1/2, 0, 0
    # seeds: cure 1/2, 1/4; random 3/8, 2/8: variances 1/32, 1/128
    assert rows[1] == ["cure - random", "2, 2", "pass@64", "+0.062", "0.140", "0.601", "no", f"{paired([1 / 4, -1 / 2, 0, 1 / 2]):.3f}"]
    assert rows[2][2:5] == ["ever solved", "+72.0", f"{256 * 0.1398:.1f}"] and rows[2][-1] == "-"
    same = {(a, s): rs for (a, s), rs in two_arms([64, 0, 0, 64]).items()} | {("random", 1): two_arms()["random", 0]}
    first, *_ = matrix.differences(same, 1_600_000).split("\n")[1:]
    assert re.split(" {2,}", first.strip())[3:7] == ["+0.344", "0.000", "0.000", "yes"], "two seeds that do not differ"
    swapped = {({"cure": "random", "random": "cure"}[a], s): rs for (a, s), rs in same.items()}
    assert re.split(" {2,}", matrix.differences(swapped, 1_600_000).split("\n")[1].strip())[3::3] == ["-0.344", "yes"]


def test_kept_lines_give_the_tables_and_the_picture_again(tmp_path, monkeypatch, capsys):
    from test_analyze import assert_picture

    from tools import matrix
    monkeypatch.chdir(tmp_path)
    rows = [{"regime": "hard", "arm": a, "seed": s} | r for (a, s), rs in two_arms().items() for r in rs]
    (tmp_path / "kept.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert matrix.main(["hard", "--data", "kept.jsonl", "--picture", "hard.png"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"cure +1600k +2 +0 ± 0 +0.375 ± 0.177", out) and "cure - random" in out and "at 400k" in out
    assert_picture(tmp_path / "hard.png")
