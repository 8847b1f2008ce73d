"""eval.py: the numbers by hand, presets and benchmarks, graders on real golds, whole evaluations, interrupted ones, bad input."""

import json
import math
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, WORLDS, lines
from safetensors.torch import load_file, save_file

import cure
import eval as evaluation  # a file of ours; `eval` alone would hide the builtin
from lib import config, data, ranks
from lib.pool import VerifierPool
from reward import verdict
from tools import check_graders

DATA = ROOT.parent / "shared" / "data"
FILES = {"aime24": "aime24", "aime25": "aime25", "amc23": "amc23", "math500": "math500", "minerva": "minerva_math",
         "olympiad": "olympiadbench"}  # fmt: skip
real = pytest.mark.skipif(not (DATA / "benchmarks").is_dir(), reason="needs the benchmark files beside the repository")


def file_of(name):
    return str(DATA / "benchmarks" / f"{FILES[name]}.jsonl")


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Drawing takes longer than these runs."""
    monkeypatch.setattr("tools.analyze.curves", lambda out: [])


def samples(*answers, gold="1", length=3, cut=0):
    """Graded samples with these answers; the last `cut` of them were cut."""
    return [{"correct": a == gold, "answer": a, "finish": "length" if i >= len(answers) - cut else "stop", "text": a,
             "ids": [i] * length} for i, a in enumerate(answers)]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- the numbers
@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [(4, 0, 2, 0), (4, 4, 1, 1), (4, 2, 1, 1 / 2), (4, 2, 2, 5 / 6), (4, 2, 4, 1), (5, 1, 3, 6 / 10), (16, 8, 2, 1 - 28 / 120)],
)
def test_pass_at_k_is_the_unbiased_estimate(n, c, k, expected):
    assert evaluation.pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-12)


def test_the_summary_is_what_a_hand_computes():
    rows = [{"id": 0, "samples": samples("1", "1", "1", "1", length=2)}, {"id": 1, "samples": samples("1", "1", "2", "3", cut=1)},
            {"id": 2, "samples": samples("[INVALID]", "[TIMEOUT]", "[CRASH]", "[INVALID]", length=7, cut=2)}]  # fmt: skip
    m = evaluation.summary(rows, 4)
    expected = {"avg@4": 1 / 2, "stderr": 0.5 / math.sqrt(3), "maj@4": 2 / 3, "pass@1": 1 / 2, "pass@2": (1 + 5 / 6) / 3,
                "pass@4": 2 / 3, "distinct": 1, "length": 4, "truncated": 3 / 12, "parse_fail": 2, "timeout": 1, "crash": 1,
                "illegal": 0}  # fmt: skip
    assert m.pop("eval/right") == [4, 2, 0]
    assert m == pytest.approx({f"eval/{k}": v for k, v in expected.items()}, abs=1e-12)
    assert {k for k in evaluation.summary([{"id": 0, "samples": samples(*"111122")}], 6) if "pass" in k} == {
        "eval/pass@1", "eval/pass@2", "eval/pass@4", "eval/pass@6"}  # fmt: skip


def test_one_problem_has_no_standard_error():
    assert math.isnan(evaluation.summary([{"id": 0, "samples": samples("1", "2")}], 2)["eval/stderr"])


@pytest.mark.parametrize(
    ("answers", "right"),
    [(["1", "2", "2"], False), (["2", "1"], False), (["1", "2"], True), (["[INVALID]", "[INVALID]", "1"], True),
     (["[TIMEOUT]"], False), (["2", "3", r"\text{1}", "$1$"], True), (["[0,1]", "[0,1]", "1"], False)],
)  # fmt: skip
def test_the_majority_is_of_normalised_answers_the_first_wins_a_tie_and_no_answer_has_no_vote(answers, right):
    rows = samples(*answers)
    for s in rows:
        s["correct"] = s["answer"] in ("1", r"\text{1}", "$1$")
    assert evaluation.majority(rows) is right


def test_entropy_is_a_mean_over_all_tokens():
    class Fake:
        def score_local(self, rollouts, temperature):
            assert temperature == 1.0 and [len(r.prompt_ids) for r in rollouts] == [1, 1, 2]
            return [(None, np.float32([h] * len(r.response_ids))) for h, r in zip((1, 2, 4), rollouts, strict=True)]

    cfg = config.load_config(["eval_temperature=0", "eval_n=1"])[0][1]
    task = data.Task("eval", [data.Prompt(0, [5], "", ""), data.Prompt(3, [5, 6], "", "")], None, None, None, None)
    rows = [{"id": 0, "samples": samples("ab", length=2) + samples("c", length=1)}, {"id": 3, "samples": samples("d", length=2)}]
    ranks.init_distributed()
    got = evaluation.entropies(cfg, Fake(), task, rows, lambda text: {"a": [c == "a" for c in text]})
    torch.distributed.destroy_process_group()
    assert got == {"eval/entropy": (1 + 1 + 2 + 2 * 4) / 5, "eval/entropy_a": 1.0}


# --------------------------------------------------------------------------------------------------- benchmarks and presets
def stage(*argv):
    stages, _ = evaluation.benchmark_stages(["model=m", *argv])
    return dict(stages)


def test_presets_are_what_the_papers_say():
    six = "benchmarks=" + ",".join(FILES)
    got = {p: {name: (c.eval_temperature, c.eval_top_p, c.max_response_tokens, c.template, c.eval_n)
               for name, c in stage(six, f"preset={p}").items()} for p in evaluation.PRESETS}  # fmt: skip
    many, one = ("aime24", "aime25", "amc23"), ("math500", "minerva", "olympiad")
    for name in FILES:
        n = 32 if name in many else 1
        assert name in many + one and got["cure"][name] == (0.6, 0.7, 4096, "boxed", n)
        assert got["entropy"][name] == (1.0, 1.0, 4096, "boxed", n)
        assert got["dapo"][name] == (1.0, 0.7, 20480, "dapo", 32)
        assert got["8020"][name] == (1.0, 1.0, 20480, "8020", 16)
    assert stage(six) == stage(six, "preset=cure", "out_dir=runs/eval/m-cure"), "cure is the default"


def test_any_setting_overrides_the_preset_and_the_benchmark(tmp_path):
    (tmp_path / "c.yaml").write_text("seed: 7\neval_top_p: 0.5\n")
    own = ["--config", str(tmp_path / "c.yaml"), "eval_n=3", "max_response_tokens=99", "out_dir=here"]
    c = stage("benchmarks=aime24", *own)["aime24"]
    assert (c.eval_n, c.max_response_tokens, c.seed, c.eval_top_p, c.out_dir, c.name) == (3, 99, 7, 0.7, "here", "aime24")
    assert stage("eval_data=x.jsonl")["x"].eval_n == 16, "without benchmarks and preset the config's own values hold"


def test_each_benchmark_has_its_grader():
    names = "benchmarks=aime24,gsm8k:g.jsonl,math500,minerva,olympiad,my.jsonl,someone/set::test"
    assert [c.verifier for c in stage(names).values()] == ["integer", "integer", *["math_verify"] * 3, "dapo", "dapo"]
    assert [c.verifier for c in stage(names, "preset=dapo").values()][:3] == ["dapo", "dapo", "math_verify"]
    assert {c.verifier for c in stage(names, "verifier=boxed").values()} == {"boxed"}
    assert list(stage(names)) == ["aime24", "gsm8k", "math500", "minerva", "olympiad", "my", "set--test"]


def test_out_dir_is_named_after_model_and_preset():
    assert stage("benchmarks=aime24", "model=runs/toy/ckpt/step_000080/hf")["aime24"].out_dir == (
        "runs/eval/runs-toy-ckpt-step_000080-hf-cure")  # fmt: skip
    assert stage("eval_data=a.jsonl", "model=Qwen/Qwen2.5-Math-7B")["a"].out_dir == "runs/eval/Qwen-Qwen2.5-Math-7B"


HUB = {  # a row as the hub has it; AIME24 and Minerva differ from the files
    "aime24": ("math-ai/aime24", {"id": 60, "problem": "p", "solution": r"\boxed{204}", "url": ""}, "204"),
    "aime25": ("math-ai/aime25", {"problem": "p", "answer": "070", "id": "0"}, "70"),
    "amc23": ("math-ai/amc23", {"id": 0, "question": "p", "answer": "27.0", "url": ""}, "27.0"),
    "math500": ("HuggingFaceH4/MATH-500", {"problem": "p", "solution": r"\boxed{p - q}", "answer": "p - q"}, "p - q"),
    "minerva": ("math-ai/minervamath", {"question": "p", "answer": "4.5e33"}, "4.5e33"),
    "olympiad": ("math-ai/olympiadbench", {"question": "p", "solution": ["s"], "final_answer": ["$1$,$2$"]}, "$1$,$2$"),
    "gsm8k": ("openai/gsm8k", {"question": "p", "answer": "so\n#### 1,024"}, "1024"),
}  # fmt: skip


@pytest.mark.parametrize("name", data.BENCHMARKS)
def test_every_benchmark_is_read_from_its_hub_id(name, monkeypatch):
    import datasets
    hub, row, gold = HUB[name]
    asked = []

    def load_dataset(name, config=None, split=None):
        asked.append((name, config, split))
        return datasets.Dataset.from_list([row])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows, _ = data.load_rows(data.find_benchmark(name)[1])
    assert asked == [(hub, "main" if name == "gsm8k" else None, "test")] and [r["answer"] for r in rows] == [gold]
    verifier = data.grader(name, "boxed")
    assert verdict(rf"\boxed{{{gold}}}", gold, verifier)[1] and not verdict(r"\boxed{7}", gold, verifier)[1]


@real
def test_the_files_have_the_right_sizes():
    sizes = {name: len(data.load_rows(file_of(name))[0]) for name in FILES}
    assert sizes == {"aime24": 30, "aime25": 30, "amc23": 40, "math500": 500, "minerva": 272, "olympiad": 675}
    assert all(data.BENCHMARKS[name].size == n for name, n in sizes.items())
    assert len(data.load_rows(str(DATA / "dapo/aime-2024.parquet"))[0]) == 30, "each problem is there 32 times"
    assert len(data.load_rows(str(DATA / "gsm8k/test.jsonl"))[0]) == data.BENCHMARKS["gsm8k"].size


@real
def test_golds_of_the_integer_benchmarks_are_graded_right_and_others_wrong(capsys):
    names = ("aime24", "aime25", "amc23")
    assert check_graders.main(["benchmarks=" + ",".join(f"{n}:{file_of(n)}" for n in names)]) == 0
    print(out := capsys.readouterr().out)
    assert [line.split() for line in out.splitlines()[1:]] == [
        ["aime24", "integer", "30", "30/30", "29/29", "30/30"], ["aime25", "integer", "30", "30/30", "0/0", "30/30"],
        ["amc23", "integer", "40", "40/40", "0/0", "40/40"]]  # fmt: skip


@real
@pytest.mark.slow
def test_golds_of_the_symbolic_benchmarks_are_graded_right_and_others_wrong(capsys):
    names = ("math500", "minerva", "olympiad")
    check_graders.main(["benchmarks=" + ",".join(f"{n}:{file_of(n)}" for n in names)])
    print(out := capsys.readouterr().out)
    assert [line.split() for line in out.splitlines()[1:4]] == [
        ["math500", "math_verify", "500", "500/500", "500/500", "500/500", "500/500"],
        ["minerva", "math_verify", "272", "272/272", "272/272", "272/272", "269/272"],
        ["olympiad", "math_verify", "675", "675/675", "0/0", "675/675", "673/675"]]  # fmt: skip


def test_failures_of_the_check_are_listed_with_what_was_read():
    rows = [{"row": 4, "answer": "5", "solution": r"thus \boxed{6}"}, {"row": 5, "answer": "$t(0,4]$", "solution": ""},
            {"row": 6, "answer": "x=5", "solution": ""}]  # fmt: skip
    with VerifierPool(1) as pool:
        shares, failures = check_graders.check_golds(rows, "math_verify", pool)
    assert shares == {"gold": "3/3", "solution": "0/1", "other": "3/3", "read": "2/3"}, "another answer is never an equal one"
    assert failures == ["row 4: solution: gold '5', read '6'",
                        "row 5: read: gold '$t(0,4]$' is no mathematics, compared as text"]  # fmt: skip


# -------------------------------------------------------------------------------------------------------- whole evaluations
@pytest.fixture(scope="module")
def argv(tiny, tmp_path_factory):
    """An evaluation of 10 problems x 4 in chunks of two problems."""
    out = tmp_path_factory.mktemp("evaluations")
    return [f"model={tiny[0]}", f"benchmarks={tiny[1]}", "preset=cure", "template=raw", "verifier=boxed", "eval_prompts=10",
            "eval_n=4", "max_response_tokens=24", "engine=torch", "engine_rows=8", f"out_dir={out}/whole"]  # fmt: skip


@pytest.fixture(scope="module")
def done(argv):
    """The folder of one uninterrupted evaluation."""
    assert evaluation.main(argv) == 0
    return argv[-1].split("=")[1]


def result(out, name="rl"):
    """What must repeat exactly: all numbers but seconds."""
    r = json.load(open(f"{out}/eval.json"))["results"][name]
    return {k: v for k, v in r.items() if k not in ("timing_s/eval", "read_back")}


def refused(argv, capsys):
    """argv is a user's mistake: exit 2 and one line, which is returned."""
    with pytest.raises(SystemExit) as e:
        evaluation.main(argv)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    return err.removeprefix("error: ")


def test_an_evaluation_leaves_its_settings_numbers_and_samples(done, tiny):
    report, rows = json.load(open(f"{done}/eval.json")), lines(f"{done}/samples.jsonl")
    settings = report["settings"]["rl"]
    assert settings.items() >= {"eval_n": 4, "eval_temperature": 0.6, "eval_top_p": 0.7, "verifier": "boxed", "template": "raw",
                                "max_response_tokens": 24, "engine": "TorchEngine", "dtype": "torch.float32", "seed": 0,
                                "stop_token_ids": [1]}.items()  # fmt: skip
    assert report["versions"]["torch"] == torch.__version__ and len(report["model_sha256"]) == 64 and report["preset"] == "cure"
    assert [r["id"] for r in rows] == list(range(10)) and all(r["benchmark"] == "rl" and len(r["samples"]) == 4 for r in rows)
    right = [sum(rf"\boxed{{{r['gold']}}}" in s["text"] for s in r["samples"]) for r in rows]
    numbers = result(done)
    assert numbers["eval/avg@4"] == pytest.approx(sum(right) / 40) and 0 < sum(right) < 40
    assert numbers["eval/stderr"] == pytest.approx(np.std(np.array(right) / 4, ddof=1) / math.sqrt(10))
    assert numbers["eval/length"] == pytest.approx(np.mean([len(s["ids"]) for r in rows for s in r["samples"]]))
    assert "eval/entropy" not in numbers and (numbers["problems"], numbers["n"]) == (10, 4)


def test_a_finished_evaluation_is_read_back_without_sampling(argv, done, monkeypatch, capsys):
    before = open(f"{done}/samples.jsonl").read()
    monkeypatch.setattr(evaluation, "sample", None)
    numbers = result(done)
    evaluation.main(argv)
    assert result(done) == numbers and open(f"{done}/samples.jsonl").read() == before
    assert [line.split()[:3] for line in capsys.readouterr().out.splitlines() if line.startswith("rl ")] == [["rl", "10", "4"]]


def test_an_interrupted_evaluation_goes_on_to_the_same_numbers(argv, done, tmp_path, monkeypatch):
    calls, sample = [], evaluation.sample

    def third_fails(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return sample(*args)

    out = [*argv[:-1], f"out_dir={tmp_path}/run"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evaluation, "sample", third_fails)
        evaluation.main(out)
    torch.distributed.destroy_process_group()
    assert len(lines(tmp_path / "run/samples.jsonl")) == 4
    with open(tmp_path / "run/samples.jsonl", "a") as f:
        f.write('{"benchmark": "rl", "id": 4, "samp')           # killed while it wrote
    report = json.load(open(tmp_path / "run/eval.json"))
    assert report["settings"]["rl"].pop("chat_args") == {}       # a version from before there were any
    (tmp_path / "run/eval.json").write_text(json.dumps(report))
    evaluation.main(out)
    assert open(tmp_path / "run/samples.jsonl").read() == open(f"{done}/samples.jsonl").read()
    assert result(tmp_path / "run") == result(done)
    assert json.load(open(tmp_path / "run/eval.json"))["results"]["rl"]["read_back"] == 4


def test_an_evaluation_takes_chat_args(argv, tiny, tmp_path, capsys):
    from transformers import AutoTokenizer
    shutil.copytree(tiny[0], tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.chat_template = "{{ messages[0]['content'] }}{% if quiet is defined and quiet %}={% endif %}"
    tokenizer.save_pretrained(tmp_path / "model")
    out = [*argv[:-1], f"model={tmp_path}/model", "template=chat", "eval_prompts=2", f"out_dir={tmp_path}/run"]
    evaluation.main([*out, "chat_args.quiet=true"])
    assert [r["prompt"] for r in lines(tmp_path / "run/samples.jsonl")] == ["1+1?=", "1+2?="]
    assert json.load(open(tmp_path / "run/eval.json"))["settings"]["rl"]["chat_args"] == {"quiet": True}
    assert refused(out, capsys).startswith("chat_args: rl in ")
    report = json.load(open(tmp_path / "run/eval.json"))
    del report["settings"]["rl"]["chat_args"]                    # one of before there were any had none
    (tmp_path / "run/eval.json").write_text(json.dumps(report))
    assert refused([*out, "chat_args.quiet=true"], capsys).startswith("chat_args: rl in ")
    assert "does not read loud" in refused([*out, "chat_args.loud=true"], capsys)


def sharp_argv(folder, out):
    """Random weights, 5 problems x 3 in chunks of one problem a rank: two ranks leave one without work, three also."""
    return [f"model={folder}", f"benchmarks={folder}/heldout.jsonl", "preset=entropy", "template=raw", "verifier=boxed",
            "eval_n=3", "eval_prompts=5", "max_response_tokens=16", "engine=torch", "engine_rows=3", f"out_dir={out}"]


def rank_job(rank, world, device, folder, out):
    """One rank's side of the test below (see conftest.ranks). Ends the process group."""
    evaluation.main(sharp_argv(folder, f"{out}/eval{world}"))


@pytest.mark.parametrize("world", WORLDS)
def test_samples_and_numbers_do_not_depend_on_the_rank_count(ranks, sharp, world, tmp_path):
    evaluation.main(sharp_argv(sharp, tmp_path))
    out, alone = ranks[world]["out"] / f"eval{world}", result(tmp_path, "heldout")
    found = result(out, "heldout")
    assert found.pop("eval/right") == alone.pop("eval/right")  # a list, which approx does not take
    assert found == pytest.approx(alone, rel=1e-6) and alone["eval/entropy"] > 0.5
    assert sorted(lines(out / "samples.jsonl"), key=lambda r: r["id"]) == lines(tmp_path / "samples.jsonl")
    assert json.load(open(out / "eval.json"))["versions"]["ranks"] == world


def test_the_entropy_preset_measures_the_trained_models_entropy_over_the_samples(argv, tiny, tmp_path):
    evaluation.main([*argv[:2], "preset=entropy", *argv[3:-1], "eval_prompts=3", f"out_dir={tmp_path}/run"])
    rows, report = lines(tmp_path / "run/samples.jsonl"), json.load(open(tmp_path / "run/eval.json"))
    assert report["settings"]["rl"]["eval_temperature"] == report["settings"]["rl"]["eval_top_p"] == 1
    from transformers import AutoModelForCausalLM, AutoTokenizer
    lm, tokenizer = (c.from_pretrained(tiny[0]) for c in (AutoModelForCausalLM, AutoTokenizer))
    h = []
    with torch.no_grad():
        for r in rows:
            for s in r["samples"]:
                ids = tokenizer(r["prompt"])["input_ids"] + s["ids"]
                logp = lm(torch.tensor([ids])).logits[0, -len(s["ids"]) - 1:-1].double().log_softmax(-1)
                h += (-(logp.exp() * logp).sum(-1)).tolist()
    assert report["results"]["rl"]["eval/entropy"] == pytest.approx(np.mean(h), abs=1e-5) and np.mean(h) > 0.01


def test_several_benchmarks_are_one_evaluation_and_more_can_follow(argv, tiny, tmp_path, capsys):
    shutil.copy(tiny[1], tmp_path / "more.jsonl")
    few = [*argv[2:-1], argv[0], "eval_prompts=2", f"out_dir={tmp_path}/run"]
    evaluation.main([*few, argv[1]])
    evaluation.main([*few, argv[1] + f",gsm8k:{tmp_path}/more.jsonl", "verifier=boxed"])
    out = capsys.readouterr().out
    assert "mean of 2" in out and "WARNING" not in out
    assert list(json.load(open(tmp_path / "run/eval.json"))["results"]) == ["rl", "gsm8k"]
    assert [(r["benchmark"], r["id"]) for r in lines(tmp_path / "run/samples.jsonl")] == [
        ("rl", 0), ("rl", 1), ("gsm8k", 0), ("gsm8k", 1)]  # fmt: skip


@pytest.mark.parametrize("change", ["eval_temperature=0.7", "seed=1", "eval_n=5"])
def test_other_settings_are_refused_by_name(argv, done, change, capsys):
    before = open(f"{done}/samples.jsonl").read()
    says = refused([*argv, change], capsys)
    print(says)
    key, value = change.split("=")
    assert says.startswith(f"{key}: rl in ") and value in says
    assert open(f"{done}/samples.jsonl").read() == before


def test_other_weights_and_other_data_are_refused(argv, done, tiny, tmp_path, capsys):
    shutil.copytree(tiny[0], tmp_path / "model")
    weights = load_file(tmp_path / "model/model.safetensors")
    weights["model.norm.weight"][0] += 0.1
    save_file(weights, tmp_path / "model/model.safetensors", {"format": "pt"})
    assert refused([*argv, f"model={tmp_path}/model"], capsys).startswith("model: ")
    shutil.copy(tiny[1], tmp_path / "two.jsonl")        # another benchmark of other weights would stand in the same table
    other = [f"model={tmp_path}/model", f"benchmarks={tmp_path}/two.jsonl"]
    assert refused([*argv, *other], capsys).startswith("model: ")
    rows = lines(tiny[1])
    rows[0]["answer"] = "99"
    shutil.copytree(done, tmp_path / "run")
    (tmp_path / "rl.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    report = json.load(open(tmp_path / "run/eval.json"))
    report["settings"]["rl"]["eval_data"] = f"{tmp_path}/rl.jsonl"  # as if the file had changed under its name
    (tmp_path / "run/eval.json").write_text(json.dumps(report))
    says = refused([*argv, f"benchmarks={tmp_path}/rl.jsonl", f"out_dir={tmp_path}/run"], capsys)
    assert says.startswith("eval_data: ")


def test_a_damaged_samples_file_and_a_foreign_folder_are_one_line(argv, done, tmp_path, capsys):
    shutil.copytree(done, tmp_path / "run")
    text = open(f"{done}/samples.jsonl").read().splitlines(keepends=True)
    (tmp_path / "run/samples.jsonl").write_text("".join([text[0], "{torn\n", *text[2:]]))
    assert "samples.jsonl:2: unreadable row" in refused([*argv[:-1], f"out_dir={tmp_path}/run"], capsys)
    os.remove(tmp_path / "run/eval.json")
    assert refused([*argv[:-1], f"out_dir={tmp_path}/run"], capsys).startswith("out_dir: ")


# ------------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("change", "says"),
    [("benchmarks=amie24", "benchmarks: no benchmark 'amie24'; did you mean aime24?"),
     ("benchmarks=zzz", "benchmarks: no benchmark 'zzz'; there are aime24, "),
     ("benchmarks=aime42:{tmp}/bad.jsonl", "benchmarks: no benchmark 'aime42'; did you mean aime2"),
     ("benchmarks=aime24:{tmp}/none.jsonl", "benchmarks: no such file: "),
     ("benchmarks={tmp}/bad.jsonl", "benchmarks: {tmp}/bad.jsonl:2: broken JSON"),
     ("benchmarks=aime24,aime24", "benchmarks: two are called 'aime24'"), ("benchmarks=", "benchmarks: nothing to evaluate"),
     ("preset=best", "preset: must be one of cure, dapo, 8020, entropy, got 'best'"), ("model={tmp}", "model: no tokenizer in "),
     ("model={tmp}/half", "model: "), ("template=chat", "template: chat needs a tokenizer with a chat template"),
     ("eval_n=0", "eval_n: must be positive"), ("eval_tmeperature=1", "eval_tmeperature: no such key; did you mean eval_temp")],
)  # fmt: skip
def test_bad_input_is_one_line_that_names_the_key(argv, tiny, change, says, tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n{"question": \n')
    shutil.copytree(tiny[0], tmp_path / "half", ignore=shutil.ignore_patterns("config.json"))
    got = refused([*argv, change.format(tmp=tmp_path), f"out_dir={tmp_path}/run"], capsys)
    print(got)
    assert got.startswith(says.format(tmp=tmp_path)) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argv", "says"),
    [(["benchmarks=aime2"], "benchmarks: no benchmark 'aime2'"), (["model=x"], "model: check takes benchmarks="),
     (["benchmarks=x.jsonl"], "benchmarks: no such file: x.jsonl")],
)  # fmt: skip
def test_bad_input_to_the_check_is_one_line(argv, says, capsys):
    with pytest.raises(SystemExit):
        check_graders.main(argv)
    assert capsys.readouterr().err.removeprefix("error: ").startswith(says)


# ------------------------------------------------------------------------------------------------------------- in training
def test_training_evaluates_a_benchmark_with_its_own_grader(config, tiny, tmp_path):
    run = cure.setup(["--config", config, f"out_dir={tmp_path}/run", f"eval_data=aime24:{tiny[1]}", "verifier=dapo"])
    cfg = run.stages[0][1]
    assert run.heldout[cfg.name].verifier == "integer" and cfg.verifier == "dapo"
    run.refresh()
    m = evaluation.evaluate(cfg, run.engine, run.policy, run.heldout[cfg.name], 0)
    assert 0 < m["eval/avg@4"] < 1 and m["eval/entropy"] > 0
    torch.distributed.destroy_process_group()


def test_a_run_that_cannot_learn_says_so_at_its_first_step(config, tiny, tmp_path, capsys):
    rows = [r | {"answer": "999"} for r in lines(tiny[1])]
    (tmp_path / "wrong.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    argv = ["--config", config, "eval_data=", "max_steps=1", "stages.stage1.n1=4", "n2=0", "max_rounds=1"]
    cure.main([*argv, f"data={tmp_path}/wrong.jsonl", "max_response_tokens=4", f"out_dir={tmp_path}/bad"])
    out = capsys.readouterr().out
    assert "WARNING: 100% of the responses are cut at max_response_tokens=4" in out
    assert "WARNING: each of the 4 groups is all wrong" in out
    cure.main([*argv, f"out_dir={tmp_path}/good"])
    assert "WARNING" not in capsys.readouterr().out


def test_a_checkpoint_is_an_ordinary_model_folder(tiny):
    names = set(os.listdir(tiny[0]))
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
