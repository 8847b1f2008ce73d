"""tools.two_temperatures: against plain decoding and brute force, the table by hand, and the command."""
import json
import shutil

import numpy as np
import pytest
import torch
from test_analyze import assert_picture

from lib.config import Config
from lib.engine import Sampling, TorchEngine
from lib.weights import load_lm
from tools import common, two_temperatures

PROMPTS, SEEDS, N = [[5, 12, 3], [7, 12, 3, 10, 15], [9, 15]], [11, 22, 33], 3


def engine(kind, folder):
    out = kind(Config(engine_rows=6), folder, torch.device("cpu"), torch.float32, {1})
    out.sync(out.model.named_parameters())
    return out


def tokens(answers):
    return [[c.ids for c in outs] for outs in answers]


def test_one_temperature_at_forks_and_elsewhere_is_plain_sampling_at_it(sharp):
    plain, fork = engine(TorchEngine, sharp), engine(two_temperatures.TwoTemperatureEngine, sharp)
    cases = (1, 1, .672, 1.0), (.7, .7, 1.5, .7), (.5, 9., -1, .5), (9., 1.3, 99, 1.3)
    for high, low, threshold, temperature in cases:
        fork.high, fork.low, fork.threshold = high, low, threshold
        expected = plain.generate(PROMPTS, N, Sampling(20, temperature), SEEDS)
        got = fork.generate(PROMPTS, N, Sampling(20), SEEDS)
        assert tokens(got) == tokens(expected)
        for a, b in zip(sum(got, []), sum(expected, []), strict=True):
            np.testing.assert_allclose(a.logp, b.logp, atol=1e-5)


def test_two_temperatures_agree_with_brute_force(sharp):
    """Every token again, by a forward of the whole sequence in float64, H of its logits, eq. 5, and the same noise."""
    fork, lm = engine(two_temperatures.TwoTemperatureEngine, sharp), load_lm(sharp, torch.float64, "eager")
    fork.high, fork.low, fork.threshold = 1.6, .4, 2.3
    got = fork.generate(PROMPTS, N, Sampling(20), SEEDS)
    drawn, forks = 0, 0
    for prompt, seed, outs in zip(PROMPTS, SEEDS, got, strict=True):
        for i, completion in enumerate(outs):
            noise = torch.rand(20, generator=torch.Generator().manual_seed(seed + i), dtype=torch.float64)
            with torch.no_grad():
                logits = lm(torch.tensor([prompt + completion.ids])).logits[0, len(prompt) - 1:-1]
            for t, z in enumerate(logits):
                p = z.softmax(-1)
                high = -(p * p.log()).sum() > 2.3
                q = (z / (1.6 if high else .4)).softmax(-1)
                assert completion.ids[t] == int((q.cumsum(-1) < noise[t]).sum())
                assert completion.logp[t] == pytest.approx(float(q[completion.ids[t]].log()), abs=1e-4)
                drawn, forks = drawn + 1, forks + int(high)
    assert fork.drawn.tolist() == [drawn, forks] and .1 < forks / drawn < .9


def test_table_is_means_and_errors_over_prompts():
    cells = {(1., 1.): {"right": np.array([.5, 0, 1]), "length": 10, "cut": 0, "high": .25},
             (1.5, 1.): {"right": np.array([1, .5, 1]), "length": 12, "cut": .5, "high": .2}}
    rows = [line.split("  ") for line in two_temperatures.accuracy_table(cells).split("\n")]
    rows = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    # errors: sd with n - 1 over sqrt(3): 0.5 / 1.732, 0.2887 / 1.732; differences 0.5, 0.5, 0: the same 0.2887 / 1.732
    assert rows[1] == ["1", "1", "0.500 ± 0.289", "10.0", "0.000", "25.0%"]
    assert rows[2] == ["1.5", "1", "0.833 ± 0.167", "+0.333 ± 0.167", "12.0", "0.500", "20.0%"]


# ---- the command -----------------------------------------------------------------------------------------------------

def call(capsys, *argv):
    """python -m tools.two_temperatures …, here -> (exit code, stdout, stderr)."""
    common.warn.cache_clear()
    return two_temperatures.main(list(map(str, argv))), *capsys.readouterr()


KEYS = ["template=raw", "verifier=boxed", "max_prompt_tokens=32", "max_response_tokens=6", "eval_prompts=3", "eval_n=2"]


def test_a_run_is_swept_with_its_last_checkpoint(sharp, tmp_path, capsys):
    run = tmp_path / "run"
    for step in (4, 12):
        shutil.copytree(sharp, run / f"ckpt/step_{step:06d}/hf")
    config = [key.replace("=", ": ") for key in KEYS] + [f"model: {tmp_path}/gone", f"eval_data: {sharp}/heldout.jsonl"]
    (run / "config.yaml").write_text("\n".join([*config, "stages: {a: {}, b: {}}", ""]))
    (run / "stages.json").write_text(json.dumps({"a": {"model": sharp, "init_from": "", "temperature": 1.0}}))
    code, out, err = call(capsys, run, "seed=3", "--high", ".5,2", "--low", "1,2")
    assert code == 0 and "error" not in err and "step_000012/hf: 3 problems" in out and "2 responses each" in out
    rows = [line.split()[:2] for line in out.split("\n") if line[:1].isdigit()]
    assert rows == [["0.5", "1"], ["0.5", "2"], ["1", "1"], ["2", "1"], ["2", "2"]], "1, 1 is always there"
    assert_picture(run / "plots/two_temperatures.png")
    assert call(capsys, run, "seed=3", "--high", ".5,2", "--low", "1,2")[1] == out, "seeded"


def test_a_benchmark_is_read_and_graded_its_own_way(sharp, tmp_path):
    (tmp_path / "amc.jsonl").write_text(json.dumps({"question": "1+2?", "answer": 27.0}) + "\n")
    keys = [f"model={sharp}", f"eval_data=amc23:{tmp_path}/amc.jsonl", "template=raw", "max_response_tokens=6"]
    task = two_temperatures.task_and_engine(keys)[2]
    assert task.verifier == "integer" and len(task.prompts) == 1
    assert two_temperatures.task_and_engine([*keys, "verifier=boxed"])[2].verifier == "boxed"
    with pytest.raises(ValueError, match="eval_data: no benchmark 'amc24'; did you mean amc23"):
        two_temperatures.task_and_engine([*keys, "eval_data=amc24"])
    with pytest.raises(ValueError, match="max_response_tokens: 4000 and the longest prompt, 4 tokens, are over"):
        two_temperatures.task_and_engine([*keys, "max_response_tokens=4000"])


def test_what_is_missing_is_one_line(sharp, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    for argv, words in (([run], "it has no config.yaml"), ([tmp_path / "nowhere"], "no such run folder"),
                        ([run, sharp], "one run"),
                        ([f"model={sharp}", *KEYS], "eval_data"), (["modell=x"], "did you mean model"),
                        ([f"model={sharp}", *KEYS, f"eval_data={run}/x.jsonl"], "x.jsonl")):
        code, _, err = call(capsys, *argv)
        assert code == 2 and words in err and err.count("\n") == 1, err
    (run / "config.yaml").write_text(f"model: {sharp}\neval_data: {sharp}/heldout.jsonl\n")
    code, _, err = call(capsys, run)
    assert code == 2 and "no ckpt/*/hf" in err
    with pytest.raises(SystemExit, match="2"):  # no temperature of 0
        call(capsys, f"model={sharp}", "--high", "0,1")
