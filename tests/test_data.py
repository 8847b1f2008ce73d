"""lib/data.py and lib/toy.py: what is read, dropped and counted, what the model sees, in which order, and the toy."""
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import data
from lib.config import Config, load_config
from lib.run import load_tasks, resolved
from lib.toy import make_toy, make_toy_base, toy_problem, toy_regions
from reward import last_boxed

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared" / "data"
real = pytest.mark.skipif(not REAL.is_dir(), reason="needs the data files beside the repository")
CHATML = ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
          "{% if add_generation_prompt %}<|assistant|>{% endif %}")
THINKING = CHATML.replace("<|assistant|>", "<|assistant|>{% if enable_thinking is defined and enable_thinking is false %}"
                          "<think>\n\n</think>\n\n{% endif %}")  # as Qwen3's


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def write_parquet(path, rows):
    import pyarrow as pa
    import pyarrow.parquet as pq
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def fails(pattern, call, *args, **kwargs):
    """`call` is a user's error: a ValueError of one line that matches."""
    with pytest.raises(ValueError, match=pattern) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)


def adds_up(counts):
    assert all(v >= 0 for v in counts.values())
    return counts["rows"] == sum(v for k, v in counts.items() if k != "rows")


def byte_tokenizer(**kwargs):
    """Every byte a token: knows all text, has no chat template until a test gives it one."""
    from tokenizers import pre_tokenizers
    from transformers import Qwen2Tokenizer
    vocab = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    return Qwen2Tokenizer(vocab={s: i for i, s in enumerate(vocab)}, merges=[], **kwargs)


@pytest.fixture(scope="module")
def plain():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def chat():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    make_toy(str(folder), n_train=4000, n_heldout=256, n_sft=6000)
    return folder


# -------------------------------------------------------------------------------------------------------------- rows

def test_import_is_light():
    code = ("import sys; from lib import data; "
            "print([m for m in ('torch', 'transformers', 'datasets', 'pyarrow') if m in sys.modules])")
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("column", ["prompt", "question", "problem"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_every_prompt_column_in_both_formats(tmp_path, column, kind):
    rows = [{column: "1+1?", "answer": "2", "solution": "two"}, {column: "1+2?", "answer": "3", "solution": None}]
    path = (write if kind == "jsonl" else write_parquet)(tmp_path / f"a.{kind}", rows)
    kept, counts = data.load_rows(path)
    assert kept == [{"prompt": "1+1?", "answer": "2", "solution": "two", "row": 0},
                    {"prompt": "1+2?", "answer": "3", "solution": "", "row": 1}]
    assert counts == {"rows": 2, "empty": 0, "duplicates": 0, "conflicting": 0, "kept": 2}


@pytest.mark.parametrize("row, answer", [
    ({"answer": 27.0}, "27"), ({"answer": 27}, "27"), ({"answer": 2.5}, "2.5"), ({"answer": -0.5}, "-0.5"),
    ({"answer": " 42 "}, "42"), ({"answer": "025"}, "25"), ({"answer": "-07"}, "-7"), ({"answer": "000"}, "0"),
    ({"answer": "0.5"}, "0.5"), ({"answer": "0"}, "0"), ({"answer": 0}, "0"), ({"answer": "1,234"}, "1,234"),
    ({"final_answer": ["$2n-2$"]}, "$2n-2$"), ({"final_answer": ["1", "2"]}, "1, 2"), ({"answer": [27.0]}, "27"),
    ({"answer": None, "final_answer": "7"}, "7"), ({"reward_model": {"ground_truth": "540", "style": "rule"}}, "540"),
    ({"reward_model": {"ground_truth": "540"}, "answer": "text"}, "540"), ({"reward_model": None, "answer": 3}, "3"),
    ({"solution": r"first \boxed{1}, so \boxed{\frac{1}{2}} m"}, r"\frac{1}{2}"),
    ({"solution": r"\boxed{\left\{ 1, 2 \right.}"}, r"\left\{ 1, 2 \right."),
    ({"solution": r"\boxed{1}", "answer": "2"}, "2"),
])
def test_gold_answers_of_every_known_schema(tmp_path, row, answer):
    kept, _ = data.load_rows(write(tmp_path / "a.jsonl", [{"problem": "p?", **row}]))
    assert kept[0]["answer"] == answer


@pytest.mark.parametrize("text, boxed", [("", ""), ("none", ""), (r"\boxed{", ""), (r"\boxed{1", ""), (r"\boxed{}", ""),
                                         (r"\boxed{{a}{b}} c}", "{a}{b}"), (r"\boxed{1} \boxed{ 2 }", "2"),
                                         (r"\boxed{\}}", r"\}"), (r"\boxed{a\\} b}", r"a\\")])
def test_last_boxed_balances_braces(text, boxed):
    assert (last_boxed(text) or "").strip() == boxed


def test_gsm8k_answer_is_split_into_gold_and_solution(tmp_path):
    answer = "He sold 48/2 = <<48/2=24>>24 clips.\nIn all 24*100 = $<<24*100=2400>>2,400.\n#### 2,400"
    kept, _ = data.load_rows(write(tmp_path / "a.jsonl", [{"question": "q?", "answer": answer}]))
    assert kept[0]["answer"] == "2400"
    assert kept[0]["solution"] == "He sold 48/2 = 24 clips.\nIn all 24*100 = $2,400.\nAnswer: 2400"


def test_dapo_rows_keep_their_messages(tmp_path):
    prompt = [{"content": "q?", "role": "user"}]
    row = {"data_source": "d", "prompt": prompt, "reward_model": {"ground_truth": "34", "style": "s"},
           "extra_info": {"index": 1}}
    for path in (write(tmp_path / "a.jsonl", [row]), write_parquet(tmp_path / "a.parquet", [row])):
        kept, _ = data.load_rows(path)
        assert kept == [{"prompt": [{"role": "user", "content": "q?"}], "answer": "34", "solution": "", "row": 0}]


def test_repeats_become_one_prompt_and_are_counted(tmp_path):
    rows = [{"prompt": f"{i}?", "answer": str(i)} for i in range(17)] * 100
    random.Random(0).shuffle(rows)
    kept, counts = data.load_rows(write(tmp_path / "a.jsonl", rows))
    assert counts == {"rows": 1700, "empty": 0, "duplicates": 1683, "conflicting": 0, "kept": 17}
    first = {}
    for i, row in enumerate(rows):
        first.setdefault(row["prompt"], i)
    assert [(r["prompt"], r["row"]) for r in kept] == list(first.items())   # in the source's order


def test_repeats_of_messages_are_found_too(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": f"{i % 3}?"}], "answer": i % 3} for i in range(12)]
    kept, counts = data.load_rows(write_parquet(tmp_path / "a.parquet", rows))
    assert [r["answer"] for r in kept] == ["0", "1", "2"] and counts["duplicates"] == 9


def test_prompts_with_conflicting_answers_go_altogether(tmp_path):
    rows = [("a", 1), ("b", 1), ("a", 1), ("b", 2), ("b", 1), ("c", 3), ("c", 3.0), ("d", "3"), ("d", "03")]
    kept, counts = data.load_rows(write(tmp_path / "a.jsonl", [{"prompt": p, "answer": a} for p, a in rows]))
    assert [r["prompt"] for r in kept] == ["a", "c", "d"]
    assert counts == {"rows": 9, "empty": 0, "duplicates": 3, "conflicting": 3, "kept": 3}


@pytest.mark.parametrize("bad", [
    {"prompt": None, "answer": "1"}, {"prompt": "", "answer": "1"}, {"prompt": " \n", "answer": "1"}, {"answer": "1"},
    {"prompt": [], "answer": "1"}, {"prompt": [{"role": "user", "content": None}], "answer": "1"}, {}, {"prompt": "p"},
    {"prompt": "p", "answer": None}, {"prompt": "p", "answer": " "}, {"prompt": "p", "answer": []},
    {"prompt": "p", "answer": float("nan")}, {"prompt": "p", "answer": "some text\n#### "},
    {"prompt": "p", "solution": "no box"}, {"prompt": "p", "reward_model": {"ground_truth": None}},
])
def test_rows_with_a_null_or_empty_field_are_dropped_and_counted(tmp_path, bad):
    kept, counts = data.load_rows(write(tmp_path / "a.jsonl", [{"prompt": "x", "answer": "1"}, bad]))
    assert [r["prompt"] for r in kept] == ["x"] and counts["empty"] == 1 and adds_up(counts)
    fails("^data: .*a.jsonl", data.load_rows, write(tmp_path / "a.jsonl", [bad]))           # and nothing else in it


def test_null_columns_of_a_parquet_are_counted(tmp_path):
    rows = [{"prompt": "a", "answer": 1.0}, {"prompt": None, "answer": 2.0}, {"prompt": "c", "answer": None}]
    kept, counts = data.load_rows(write_parquet(tmp_path / "a.parquet", rows))
    assert [r["answer"] for r in kept] == ["1"] and counts["empty"] == 2


rows_strategy = st.lists(st.fixed_dictionaries({"prompt": st.sampled_from(["a", "b", "c", "", None]),
                                                "answer": st.sampled_from(["1", "2", 1, None])}), max_size=30)


@settings(max_examples=100, deadline=None)
@given(rows_strategy)
def test_counts_always_add_up(tmp_path_factory, rows):
    path = write(tmp_path_factory.getbasetemp() / "counts.jsonl", rows)
    try:
        kept, counts = data.load_rows(path)
    except ValueError as e:
        assert "usable" in str(e) or "empty" in str(e)
        kept = []
    else:
        assert adds_up(counts) and counts["rows"] == len(rows) and counts["kept"] == len(kept)
    answers = {p: {str(r["answer"]) for r in rows if r["prompt"] == p and r["answer"]} for p in "abc"}  # brute force
    assert sorted(r["prompt"] for r in kept) == [p for p in "abc" if len(answers[p]) == 1]


@pytest.mark.parametrize("line", ['{"prompt": "b", "answer"', "nonsense", "[1, 2]", '"text"', "null", "[" * 100_000,
                                  '{"prompt": "b", "answer": {"x": 1}}', '{"prompt": 3, "answer": 1}',
                                  '{"prompt": [{"role": "user"}, 3], "answer": 1}',
                                  '{"prompt": "\\ud800", "answer": 1}',
                                  '{"prompt": "b", "answer": 1, "solution": 7}'])
def test_broken_line_gives_key_file_and_line(tmp_path, line):
    path = write(tmp_path / "a.jsonl", ['{"prompt": "a", "answer": "1"}', "", line, '{"prompt": "c", "answer": "1"}'])
    fails("^eval_data: .*a.jsonl:3: .", data.load_rows, path, key="eval_data")             # the blank line counts, too


def test_broken_utf8_gives_the_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "a", "answer": "1"}\n{"prompt": "\xff", "answer": "1"}\n')
    fails("^data: .*a.jsonl:2: ", data.load_rows, str(tmp_path / "a.jsonl"))


def test_line_separators_inside_a_string_do_not_end_a_line(tmp_path):
    text = "a\u2028b\u0085c\rd"
    line = json.dumps({"prompt": text, "answer": 1}, ensure_ascii=False) + "\r\n"
    (tmp_path / "a.jsonl").write_bytes(line.encode())
    assert data.load_rows(str(tmp_path / "a.jsonl"))[0][0]["prompt"] == text


def test_unusable_sources_name_the_key_and_the_file(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "blank.jsonl").write_text("\n \n")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "empty.parquet").write_bytes(b"")
    (tmp_path / "table.csv").write_text("prompt,answer\n")
    write(tmp_path / "columns.jsonl", [{"text": "a", "label": 1}])
    write_parquet(tmp_path / "columns.parquet", [{"prompt": "a", "label": 1}])
    write_parquet(tmp_path / "norows.parquet", [{"prompt": "a", "answer": "1"}])
    import pyarrow.parquet as pq
    pq.write_table(pq.read_table(tmp_path / "norows.parquet").slice(0, 0), tmp_path / "norows.parquet")
    for name, reason in [("empty.jsonl", "is empty"), ("blank.jsonl", "is empty"), ("norows.parquet", "is empty"),
                         ("missing.jsonl", ""), ("missing.parquet", ""), ("torn.parquet", ": ."),
                         ("empty.parquet", ": ."), ("table.csv", "hub id"), ("columns.jsonl", "it has label, text"),
                         ("columns.parquet", "it has label, prompt")]:
        fails(f"^data: .*{name}.*{reason}", data.load_rows, str(tmp_path / name))
    fails("^eval_data: no such file: nowhere.jsonl$", data.load_rows, "nowhere.jsonl", key="eval_data")
    for source in ("", "gsm8k", "a/b/c", "a/b:c:d:e"):
        fails("^data: .*hub id", data.load_rows, source)


@pytest.mark.parametrize("source, asked", [("owner/name", ("owner/name", None, "train")),
                                           ("owner/name:main", ("owner/name", "main", "train")),
                                           ("owner/name:main:test", ("owner/name", "main", "test")),
                                           ("owner/name::test", ("owner/name", None, "test"))])
def test_hub_ids_name_config_and_split(monkeypatch, source, asked):
    datasets = pytest.importorskip("datasets")
    seen = []

    def load_dataset(name, config=None, *, split):
        seen.append((name, config, split))
        rows = [{"question": f"{i // 2}?", "answer": [i // 2], "other": i} for i in range(10_000)]
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    kept, counts = data.load_rows(source)
    assert seen == [asked] and counts["kept"] == counts["duplicates"] == 5000 and kept[-1]["row"] == 9998


def test_hub_failures_are_one_line(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load_dataset(*args, **kwargs):
        raise ConnectionError("no network\nand a long explanation")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    fails("^data: owner/name: no network$", data.load_rows, "owner/name")


def test_sft_rows_need_a_solution_and_keep_several(tmp_path, plain):
    rows = [{"prompt": "a", "solution": "x"}, {"prompt": "a", "solution": "y"}, {"prompt": "a", "solution": "x"},
            {"prompt": "b", "answer": "1"}, {"prompt": "c", "answer": "1", "solution": "z"}]
    prompts, counts = data.load_prompts(write(tmp_path / "a.jsonl", rows), plain, "raw", 9, sft=True)
    assert [(p.text, p.solution) for p in prompts] == [("a", "x"), ("a", "y"), ("c", "z")]
    assert counts["empty"] == counts["duplicates"] == 1 and adds_up(counts)


# ---------------------------------------------------------------------------------------------------- text and tokens

def test_template_texts_without_a_chat_template(plain):
    boxed = "Please reason step by step, and put your final answer within \\boxed{}."
    assert data.render("1+1?", "raw", plain) == "1+1?"
    assert data.render("1+1?", "boxed", plain) == f"1+1?\n{boxed}"
    assert data.render("1+1?", "8020", plain) == f"User:\n1+1?\n{boxed}\n\nAssistant:\n"
    assert data.render("1+1?", "dapo", plain) == (
        "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
        "$Answer (without quotes) where $Answer is the answer to the problem.\n\n1+1?\n\n"
        'Remember to put your answer on its own line after "Answer:".')
    assert data.render("1+1?", "boxed", plain, "Be kind.") == f"Be kind.\n1+1?\n{boxed}"


def test_template_texts_through_a_chat_template(chat):
    boxed = "Please reason step by step, and put your final answer within \\boxed{}."
    assert data.render("1+1?", "chat", chat) == "<|user|>1+1?\n<|assistant|>"
    assert data.render("1+1?", "boxed", chat) == f"<|user|>1+1?\n{boxed}\n<|assistant|>"
    assert data.render("1+1?", "dapo", chat) == f"<|user|>{data.DAPO_HEAD}1+1?{data.DAPO_TAIL}\n<|assistant|>"
    assert data.render("1+1?", "raw", chat) == "1+1?"
    assert data.render("1+1?", "8020", chat) == f"User:\n1+1?\n{boxed}\n\nAssistant:\n"
    assert data.render("1+1?", "chat", chat, "Be kind.") == "<|system|>Be kind.\n<|user|>1+1?\n<|assistant|>"


def test_messages_keep_their_roles_and_the_last_question_gets_the_instruction(chat):
    messages = [{"role": role, "content": text}
                for role, text in (("system", "S"), ("user", "A"), ("assistant", "B"), ("user", "C"))]
    before = json.dumps(messages)
    assert data.render(messages, "chat", chat) == "<|system|>S\n<|user|>A\n<|assistant|>B\n<|user|>C\n<|assistant|>"
    assert data.render(messages, "raw", chat) == "S\nA\nB\nC"
    assert data.render(messages, "boxed", chat) == (
        f"<|system|>S\n<|user|>A\n<|assistant|>B\n<|user|>C\n{data.BOXED}\n<|assistant|>")
    assert data.render(messages, "chat", chat, "T").startswith("<|system|>T\n<|user|>A")    # replaced, not doubled
    assert json.dumps(messages) == before, "render must not change its input"


@pytest.mark.parametrize("template", ["dapo", "boxed", "8020"])
def test_no_template_asks_twice(plain, template):
    once = data.render("1+1?", template, plain)
    inner = once.removeprefix("User:\n").removesuffix("\n\nAssistant:\n")
    assert data.render(inner, template, plain) == once
    dapo = data.DAPO_HEAD + "1+1?" + data.DAPO_TAIL
    assert data.render(dapo, template, plain) == once                           # one answer format, never two
    assert ("Answer: $Answer" in once) != ("\\boxed" in once)


def test_dapo_leaves_another_wording_of_its_instruction_as_it_is(plain):
    text = "1+1? End with a line of the form Answer: $Answer."
    assert data.render(text, "dapo", plain) == text


def test_template_errors_name_their_key(plain, chat):
    fails("^template: chat needs a tokenizer with a chat template", data.render, "q", "chat", plain)
    fails("^template: 'boxd' is none of chat, dapo, boxed, countdown, 8020, raw", data.render, "q", "boxd", plain)
    for template in ("raw", "8020"):
        fails(f"^system_prompt: template {template}", data.render, "q", template, chat, "S")
    picky = byte_tokenizer()
    picky.chat_template = "{{ raise_exception('System role not supported') }}"
    fails("^template: .*System role not supported", data.render, "q", "chat", picky, "S")


@pytest.fixture(scope="module")
def thinking():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = THINKING
    return tokenizer


@pytest.mark.parametrize("template", ["chat", "dapo", "boxed"])
def test_chat_args_reach_the_chat_template(thinking, template):
    plainly = data.render("1+1?", template, thinking, "S")
    quiet = data.render("1+1?", template, thinking, "S", {"enable_thinking": False})
    assert quiet == plainly + "<think>\n\n</think>\n\n" and plainly.endswith("<|assistant|>")
    assert data.render("1+1?", template, thinking, "S", {"enable_thinking": True}) == plainly, "its default may be said"
    assert data.render("1+1?", template, thinking, "S", {}) == plainly


def test_of_several_chat_templates_the_default_one_is_asked(thinking):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"default": "{{ messages[0].content }}{{\nend }}", "tool_use": "{{ other }}"}
    assert data.render("q", "chat", tokenizer, "", {"end": "!"}) == "q!"
    fails("^chat_args: .* does not read other", data.render, "q", "chat", tokenizer, "", {"other": 1})


def test_chat_args_are_typed_and_may_differ_between_stages(tmp_path):
    (tmp_path / "c.yaml").write_text("chat_args: {enable_thinking: false}\nstages:\n  a: {}\n  b: {chat_args: {other: [1, x]}}\n")
    (_, a), (_, b) = load_config(["--config", f"{tmp_path}/c.yaml"])
    assert a.chat_args == {"enable_thinking": False} and b.chat_args == {"enable_thinking": False, "other": [1, "x"]}
    (tmp_path / "resolved.yaml").write_text(resolved([("a", a), ("b", b), ("none", replace(b, name="none", chat_args={}))]))
    again = load_config(["--config", f"{tmp_path}/resolved.yaml"])
    assert [c.chat_args for _, c in again] == [a.chat_args, b.chat_args, {}], "a stage's are not added to another's"
    ((_, c),) = load_config(["chat_args.enable_thinking=false"])
    assert c.chat_args["enable_thinking"] is False, "not the text false, which Qwen3's template would not take for it"


def test_training_sft_and_evaluation_share_chat_args(tmp_path, thinking, monkeypatch):
    monkeypatch.setattr("lib.run.self_test", lambda *args: None)
    rows = write(tmp_path / "a.jsonl", [{"prompt": "1+1?", "answer": 2, "solution": "2"}])
    stages = [(kind, Config(name=kind, kind=kind, data=rows, eval_data=rows, chat_args={"enable_thinking": kind == "rl"}))
              for kind in ("sft", "rl")]
    for train in (True, False):
        run = SimpleNamespace(tokenizer=thinking, print=print, rank=0)
        load_tasks(run, stages, train)
        for tasks in (run.tasks, run.heldout) if train else (run.heldout,):
            assert [task.prompts[0].text.endswith("</think>\n\n") for task in tasks.values()] == [True, False]


def test_chat_args_that_no_chat_template_would_see_are_refused(thinking, chat, plain):
    quiet = {"enable_thinking": False}
    for template in ("raw", "8020"):
        fails(f"^chat_args: template {template} uses no chat template", data.render, "q", template, chat, "", quiet)
    for template in ("chat", "boxed"):
        fails("^chat_args: this model's tokenizer has no chat template", data.render, "q", template, plain, "", quiet)
    fails("^chat_args: the tokenizer's chat template does not read enable_thinking", data.render, "q", "chat", chat, "", quiet)
    fails("^chat_args: .* does not read thinking$", data.render, "q", "chat", thinking, "", {"thinking": False})
    for name in ("tokenize", "add_generation_prompt", "messages", "conversation", "chat_template", "continue_final_message",
                 "return_tensors", "tools"):
        fails(f"^chat_args: {name} is not the chat template's", data.render, "q", "chat", thinking, "", quiet | {name: True})
    picky = byte_tokenizer()
    picky.chat_template = "{{ 1 + budget }}"
    assert data.render("q", "chat", picky, "", {"budget": 2}) == "3"
    fails("^template: .*refuses the messages, system_prompt or chat_args", data.render, "q", "chat", picky, "", {"budget": "x"})


def test_a_prompt_of_ten_thousand_tokens_is_dropped_and_counted(tmp_path, plain):
    path = write(tmp_path / "a.jsonl", [{"prompt": "x" * n, "answer": 1} for n in (100, 10_000, 101)])
    prompts, counts = data.load_prompts(path, plain, "raw", 100)
    assert [(p.id, len(p.ids)) for p in prompts] == [(0, 100)]
    assert counts["rows"] == 3 and counts["too_long"] == 2 and counts["kept"] == 1 and adds_up(counts)
    fails("^max_prompt_tokens: all 3 prompts of .*a.jsonl", data.load_prompts, path, plain, "raw", 99)


def test_limit_keeps_the_first_that_fit(tmp_path, plain):
    rows = [{"prompt": "x" * (20 if i % 2 else 5) + str(i), "answer": i} for i in range(1400)]
    path = write(tmp_path / "a.jsonl", rows)
    everything, counts = data.load_prompts(path, plain, "raw", 10)
    assert [p.id for p in everything] == list(range(0, 1400, 2)) and counts["too_long"] == 700 and adds_up(counts)
    assert all(p.text == rows[p.id]["prompt"] and p.answer == str(p.id) for p in everything)
    few, counts = data.load_prompts(path, plain, "raw", 10, limit=3)
    assert few == everything[:3] and counts["over_limit"] == 697 and adds_up(counts)


def test_ids_are_the_tokens_of_the_rendered_text(tmp_path, chat):
    rows = [{"prompt": f"  {'é' * i} ∑?", "answer": 1} for i in range(700)]     # more than one tokenizer batch
    prompts, _ = data.load_prompts(write(tmp_path / "a.jsonl", rows), chat, "boxed", 2000, "S")
    for p, row in zip(prompts, rows, strict=True):
        assert p.text == f"<|system|>S\n<|user|>{row['prompt']}\n{data.BOXED}\n<|assistant|>"
        assert chat.decode(p.ids) == p.text


def test_bos_comes_once_in_plain_text_and_never_twice_with_a_chat_template(tmp_path):
    from tokenizers import processors
    tokenizer = byte_tokenizer(bos_token="<s>")
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    path = write(tmp_path / "a.jsonl", [{"prompt": "abc", "answer": 1}, {"prompt": "<s>abc", "answer": 1}])
    prompts, _ = data.load_prompts(path, tokenizer, "raw", 9)
    assert [p.ids.count(bos) for p in prompts] == [0, 1]                # this tokenizer adds none: neither do we
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <|endoftext|>", special_tokens=[("<s>", bos), ("<|endoftext|>", eos)])
    assert tokenizer("abc")["input_ids"][0] == bos and tokenizer("abc")["input_ids"][-1] == eos
    for template, length in (("raw", 4), ("boxed", 4 + 1 + len(data.BOXED))):
        prompts, _ = data.load_prompts(path, tokenizer, template, 99)
        assert prompts[0].ids == prompts[1].ids and len(prompts[0].ids) == length
        assert prompts[0].ids.count(bos) == 1 and prompts[0].ids[0] == bos and eos not in prompts[0].ids
    tokenizer.chat_template = "{{ bos_token }}" + CHATML
    prompts, _ = data.load_prompts(write(tmp_path / "b.jsonl", [{"prompt": "abc", "answer": 1}]), tokenizer, "chat", 99)
    assert prompts[0].ids.count(bos) == 1 and eos not in prompts[0].ids
    tokenizer.chat_template = CHATML                    # writes none, so the model was trained without
    prompts, _ = data.load_prompts(str(tmp_path / "b.jsonl"), tokenizer, "chat", 99)
    assert bos not in prompts[0].ids
    fails("^max_prompt_tokens", data.load_prompts, path, tokenizer, "raw", 3)   # the BOS counts


def test_the_budget_is_inclusive(tmp_path, plain):
    path = write(tmp_path / "a.jsonl", [{"prompt": "abcd", "answer": 1}])
    assert len(data.load_prompts(path, plain, "raw", 4)[0]) == 1


# --------------------------------------------------------------------------------------------------------- the stream

@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 13), st.text(max_size=5))
def test_stream_gives_every_index_once_per_epoch(n, k, seed):
    stream = data.PromptStream(n, seed)
    epochs = []
    for _ in range(3):
        left, epoch = n, []
        while left:
            got = stream.take(min(k, left))
            epoch, left = epoch + got, left - len(got)
        assert sorted(epoch) == list(range(n))
        epochs.append(epoch)
    assert n < 8 or len({tuple(e) for e in epochs}) == 3                        # reshuffled


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 12), st.lists(st.tuples(st.integers(0, 20), st.sets(st.integers(-2, 15))), max_size=20))
def test_stream_respects_exclude_never_repeats_never_loops(n, calls):
    stream = data.PromptStream(n, "s")
    for k, exclude in calls:
        got = stream.take(k, exclude)
        assert len(got) == len(set(got)) == min(k, len(set(range(n)) - exclude))
        assert not set(got) & exclude and set(got) <= set(range(n))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 12), st.integers(0, 19),
       st.lists(st.tuples(st.integers(0, 9), st.sets(st.integers(0, 11), max_size=4)), max_size=20))
def test_cursor_restores_exactly(n, cut, calls):
    stream, copy = data.PromptStream(n, "s"), None
    for i, (k, exclude) in enumerate(calls):
        if i == cut:
            copy = data.PromptStream(n, "s", *json.loads(json.dumps(stream.cursor)))
        got = stream.take(k, exclude)
        if copy:
            assert copy.take(k, exclude) == got and copy.cursor == stream.cursor


def test_stream_is_a_function_of_seed_and_epoch_alone():
    want = data.PromptStream(10, "0/data").take(10)
    random.seed(5)
    state = random.getstate()
    assert data.PromptStream(10, "0/data").take(10) == want == [9, 0, 7, 8, 3, 1, 6, 2, 5, 4]   # everywhere, always
    assert random.getstate() == state
    assert data.PromptStream(10, "1/data").take(10) != want
    assert data.PromptStream(10, "0/data", epoch=1).take(10) != want


# ------------------------------------------------------------------------------------------------------------ the toy

def follow(prompt, solution, answer):
    """Redo a toy solution by hand: each step takes two numbers that are there; returns the numbers' places."""
    pool, places = Counter(int(x) for x in prompt.removesuffix("?").split("+")), []
    assert sum(pool.elements()) == int(answer)
    steps = re.fullmatch(r" ((?:\d+\+\d+=\d+;)*)\\boxed\{(\d+)\}", solution)
    assert steps and steps[2] == answer
    for a, b, c in re.findall(r"(\d+)\+(\d+)=(\d+);", steps[1]):
        assert int(a) + int(b) == int(c)
        for used in (int(a), int(b)):
            assert pool[used] > 0, (prompt, solution)
            pool[used] -= 1
            places.append(used)
        pool[int(c)] += 1
    assert +pool == Counter([int(answer)])
    return places


def test_toy_solutions_are_right():
    rng = random.Random(0)
    for n in (1, 2, 4, 6):
        for _ in range(200):
            prompt, solution, answer = toy_problem(rng, n)
            numbers = [int(x) for x in prompt.removesuffix("?").split("+")]
            assert len(numbers) == n and all(2 <= x <= 30 for x in numbers)
            assert len(follow(prompt, solution, answer)) == 2 * (n - 1)


def test_toy_picks_ordered_pairs_uniformly():
    rng, first, second = random.Random(1), Counter(), Counter()
    while sum(first.values()) < 6000:
        prompt, solution, answer = toy_problem(rng)
        numbers = [int(x) for x in prompt[:-1].split("+")]
        if len(set(numbers)) < 4:
            continue
        a, b, c, d, *_ = follow(prompt, solution, answer)
        first[numbers.index(a), numbers.index(b)] += 1
        second[a + b in (c, d)] += 1                    # the new sum is one of 3 numbers: taken in 2 steps of 3
    assert len(first) == 12 and all(abs(count - 500) < 110 for count in first.values())     # 5 sigma
    assert abs(second[True] / 6000 - 2 / 3) < 0.04


def test_toy_problem_uses_only_its_own_generator():
    random.seed(3)
    state = random.getstate()
    assert toy_problem(random.Random(7)) == toy_problem(random.Random(7))
    assert random.getstate() == state


def test_toy_regions_mark_choices_and_results():
    text = r" 20+27=47;6+47=53;53+29=82;\boxed{82}"
    regions = toy_regions(text)
    shown = {name: "".join(c if on else "_" for c, on in zip(text, marks, strict=True))
             for name, marks in regions.items()}
    assert shown == {"operands": "_20+27____6+47____53+29______________",
                     "results": "_______47______53_______82________82_"}


@given(st.text(alphabet="0123456789+=;?\\boxed{} \n", max_size=60) | st.text(max_size=20))
def test_toy_regions_take_any_text(text):
    regions = toy_regions(text)
    assert len(regions["operands"]) == len(regions["results"]) == len(text)
    assert not any(a and b for a, b in zip(regions["operands"], regions["results"], strict=True))
    assert all(c in "0123456789+" for c, on in zip(text, regions["operands"], strict=True) if on)
    assert all(c in "0123456789" for c, on in zip(text, regions["results"], strict=True) if on)


@pytest.mark.parametrize("text, operands, results", [
    ("6+4", "6+4", ""), ("6+4=", "6+4", ""), ("=5", "", "5"), ("5=6=7;8", "58", "67"), ("", "", ""),
    (r"1+2=3\boxed{4}5", "1+2", "34"), (r"\boxed{3", "", "3"),
])
def test_toy_regions_of_malformed_text(text, operands, results):
    regions = toy_regions(text)
    assert "".join(c for c, on in zip(text, regions["operands"], strict=True) if on) == operands
    assert "".join(c for c, on in zip(text, regions["results"], strict=True) if on) == results


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_toy_files_are_right_and_heldout_is_disjoint(toy):
    files = {name: read(toy / f"{name}.jsonl") for name in ("train", "heldout", "sft")}
    assert {name: len(rows) for name, rows in files.items()} == {"train": 4000, "heldout": 256, "sft": 6000}
    numbers = {name: {tuple(sorted(r["prompt"][:-1].split("+"))) for r in rows} for name, rows in files.items()}
    assert len(numbers["heldout"]) == 256 and not numbers["heldout"] & (numbers["train"] | numbers["sft"])
    for name, rows in files.items():
        assert len({r["prompt"] for r in rows}) == len(rows), f"{name} has a prompt twice"
        assert all(set(r) == {"prompt", "answer"} | ({"solution"} if name == "sft" else set()) for r in rows)
        assert all(sum(map(int, r["prompt"][:-1].split("+"))) == int(r["answer"]) for r in rows)
    for row in files["sft"]:
        follow(row["prompt"], row["solution"], row["answer"])


def test_toy_tokenizer_gives_back_every_character(toy):
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(toy)
    assert tokenizer.is_fast and tokenizer.chat_template is None and tokenizer.bos_token_id is None
    assert tokenizer.eos_token_id != tokenizer.pad_token_id and set(tokenizer.all_special_ids) == {0, 1}
    texts = [r["prompt"] + r["solution"] for r in read(toy / "sft.jsonl")[:200]]
    for text in [*texts, "  2 +  3 ? ", " ", "0123456789+=;? \\boxed{}", "?= ;+ = 1 ; 2"]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == tokenizer(text)["input_ids"], "nothing is added"
        assert len(ids) == len(text) and tokenizer.decode(ids) == text
        assert "".join(tokenizer.decode([i]) for i in ids) == text
        assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text
    first, _ = data.load_prompts(str(toy / "train.jsonl"), tokenizer, "raw", 20, limit=5)
    assert [p.ids for p in first] == [tokenizer(p.text)["input_ids"] for p in first]


def test_toy_model_is_an_ordinary_folder(toy):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    model, tokenizer = AutoModelForCausalLM.from_pretrained(toy), AutoTokenizer.from_pretrained(toy)
    assert 425_000 < sum(p.numel() for p in model.parameters()) < 435_000
    assert model.dtype == torch.float32 and model.config.model_type == "qwen2" and model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.vocab_size == len(tokenizer) == 25
    generation = GenerationConfig.from_pretrained(toy)
    assert generation.eos_token_id == tokenizer.eos_token_id and generation.pad_token_id == tokenizer.pad_token_id
    longest = max(len(r["prompt"] + r["solution"]) + 1 for r in read(toy / "sft.jsonl"))
    assert longest <= model.config.max_position_embeddings
    ids = torch.tensor([tokenizer("2+3+4+5?")["input_ids"]])
    assert model(ids).logits.shape == (1, 8, 25) and not list(toy.glob("*.bin")) and not list(toy.glob("*.pt"))


def test_toy_is_made_the_same_twice_and_leaves_random_states_alone(tmp_path):
    import torch
    small = {"n_train": 20, "n_heldout": 5, "n_sft": 20}
    torch.manual_seed(123)
    random.seed(123)
    states = torch.get_rng_state(), random.getstate()
    make_toy(str(tmp_path / "a"), **small)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    torch.rand(7)                                       # another global state must not matter
    make_toy(str(tmp_path / "b"), **small)
    make_toy(str(tmp_path / "c"), **small, seed=1)
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "b").iterdir())
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)
    for name in ("model.safetensors", "train.jsonl", "heldout.jsonl", "sft.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() != (tmp_path / "c" / name).read_bytes()


def test_toy_dir_that_cannot_be_made_names_its_key(tmp_path):
    (tmp_path / "file").write_text("")
    fails("^model: toy: cannot make the folder ", make_toy, str(tmp_path / "file"), n_train=1, n_heldout=1, n_sft=1)


@pytest.fixture
def base(cpu, monkeypatch, tmp_path):
    """make_toy_base() with a cure.py that trains nothing: what it ran, and what else it is to do or to return."""
    base = SimpleNamespace(ran=[], also=lambda: None, returncode=0, folder=tmp_path / "runs/toy-base")

    def run(argv, env):
        base.ran.append((argv, env))
        out = Path(argv[-1].removeprefix("out_dir="))
        (out / "ckpt/step_000740/hf").mkdir(parents=True)
        (out / "ckpt/step_000740/hf/model.safetensors").write_text("trained")
        (out / "ckpt/latest").write_text("step_000740")
        base.also()
        return SimpleNamespace(returncode=base.returncode)

    monkeypatch.setattr("lib.toy.subprocess.run", run)
    monkeypatch.setattr("lib.toy.make_toy.__defaults__", (4, 4, 4, 0))
    base.make = lambda: make_toy_base(SimpleNamespace(rank=0, print=lambda text: None), str(base.folder))
    return base


def test_the_toys_base_model_is_made_once_by_one_thread_of_no_group(base, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    base.make()
    base.make()
    (argv, env), = base.ran
    assert Path(argv[1]) == ROOT / "cure.py" and argv[3].endswith("configs/toy-base.yaml")
    assert env["OMP_NUM_THREADS"] == "1" and not [k for k in env if "RANK" in k or "WORLD" in k or "TORCHE" in k]
    assert (base.folder / "model.safetensors").read_text() == "trained"
    names = {"config.json", "tokenizer.json", "train.jsonl", "heldout.jsonl", "sft.jsonl"}
    assert names <= set(os.listdir(base.folder)) and os.listdir(base.folder.parent) == ["toy-base"]


def test_a_base_model_that_cannot_be_made_is_one_line_and_leaves_nothing(base):
    base.returncode = 1
    fails("^model: the toy's base model could not be made in .*toy-base$", base.make)
    assert os.listdir(base.folder.parent) == []
    base.returncode = 0
    base.also = lambda: (base.folder / "something else").mkdir(parents=True)
    fails("^model: the toy's base model could not be made in .*toy-base$", base.make)
    assert os.listdir(base.folder.parent) == ["toy-base"] and os.listdir(base.folder) == ["something else"]


def test_of_two_runs_that_make_the_base_model_the_faster_one_wins(base):
    def other():
        base.folder.mkdir(parents=True)
        (base.folder / "config.json").write_text("the other's")

    base.also = other
    base.make()
    assert (base.folder / "config.json").read_text() == "the other's" and os.listdir(base.folder.parent) == ["toy-base"]


# ---------------------------------------------------------------------------------------------------------- real files

@real
def test_aime_2024_parquet_is_thirty_prompts(plain):
    prompts, counts = data.load_prompts(str(REAL / "dapo" / "aime-2024.parquet"), plain, "dapo", 10_000)
    assert counts["rows"] == 960 and counts["duplicates"] == 930 and counts["kept"] == 30 and adds_up(counts)
    assert prompts[0].answer == "540" and prompts[0].text.startswith(data.DAPO_HEAD + "Find the largest possible")
    assert all(p.text.count("Answer: $Answer") == 1 and p.text.endswith(data.DAPO_TAIL) for p in prompts)   # as it is
    boxed, _ = data.load_prompts(str(REAL / "dapo" / "aime-2024.parquet"), plain, "8020", 10_000)
    assert not any("Answer:" in p.text for p in boxed) and all(p.text.count("\\boxed{}") == 1 for p in boxed)


@real
def test_aime_2024_has_the_same_answers_in_both_files():
    parquet, _ = data.load_rows(str(REAL / "dapo" / "aime-2024.parquet"))
    jsonl, _ = data.load_rows(str(REAL / "benchmarks" / "aime24.jsonl"))
    assert sorted(r["answer"] for r in parquet) == sorted(r["answer"] for r in jsonl)          # "25" here, "025" there


@real
def test_gsm8k_train_has_numbers_for_answers_and_clean_solutions():
    rows, counts = data.load_rows(str(REAL / "gsm8k" / "train.jsonl"))
    assert counts["rows"] == counts["kept"] == 7473 and rows[0]["answer"] == "72"
    assert all(re.fullmatch(r"-?\d+(\.\d+)?", r["answer"]) for r in rows)
    assert all(r["solution"].endswith(f"\nAnswer: {r['answer']}") for r in rows)
    assert not any("<<" in r["solution"] or "####" in r["solution"] for r in rows)


@real
@pytest.mark.parametrize("name, kept, first", [("aime24", 30, "204"), ("aime25", 30, "70"), ("amc23", 40, "27"),
                                               ("math500", 500, r"\left( 3, \frac{\pi}{2} \right)"),
                                               ("minerva_math", 272, "1.6"), ("olympiadbench", 675, "2")])
def test_benchmark_files_lose_no_row(name, kept, first):
    rows, counts = data.load_rows(str(REAL / "benchmarks" / f"{name}.jsonl"))
    assert counts["rows"] == counts["kept"] == len(rows) == kept and rows[0]["answer"] == first


@real
@pytest.mark.skipif("NANOCURE_SMOLLM2" not in os.environ, reason="NANOCURE_SMOLLM2 names no model folder")
def test_real_tokenizer_renders_and_round_trips():
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(os.environ["NANOCURE_SMOLLM2"])
    for template in data.TEMPLATES:
        prompts, counts = data.load_prompts(str(REAL / "gsm8k" / "test.jsonl"), tokenizer, template, 512, limit=100)
        assert adds_up(counts) and counts["kept"] == 100
        assert all(tokenizer.decode(p.ids) == p.text for p in prompts)
        assert prompts[0].text.startswith("<|im_start|>") == (template in ("chat", "dapo", "boxed"))
