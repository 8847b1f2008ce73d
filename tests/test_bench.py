"""tools/bench.py: every part runs on random weights at the smallest size; what it compares is the same computation."""
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, largest, ragged

from lib import policy
from tools import bench, brooms


def run(*argv, ranks=1):
    """Its JSON line, as the two commands of its docstring start it."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launch, "-m", "tools.bench", *argv]
    p = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300,
                       env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert p.returncode == 0, p.stderr
    return json.loads(p.stdout.splitlines()[-1])


SMALL = ["--shape", "toy", "--repeats", "1", "--rollouts", "8", "--mean", "20", "--longest", "60", "--head-tokens",
         "64", "prompts_per_step=2", "prompts_per_minibatch=2", "max_response_tokens=16"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_part_leaves_its_numbers(ranks):
    out = run(*SMALL, *(["--only", "update,scaling,score,rollout,sync,balance"] if ranks == 1 else []), ranks=ranks)
    assert out["ranks"] == ranks and out["tokens"] > 0
    for name in ("update, response tokens/s and rank", "log-prob pass, response tokens/s and rank",
                 "update, TFLOP/s and rank", "torch round 2, generated tokens/s"):
        assert out[name] > 0, name
    assert abs(out["gradient norm padded / packed - 1"]) < 1e-5
    assert abs(out["gradient norm with half the head_chunk / whole - 1"]) < 1e-6
    assert 1 <= out["balance of 2 ranks, most / mean tokens, 512 rollouts"] <= 1.05


@pytest.mark.slow
def test_memory_of_adapters_is_less_than_that_of_the_whole_model():
    full, lora = (run("--shape", "135m", "--rollouts", "2", "--only", "memory", *own) for own in ([], ["lora_rank=16"]))
    assert (full["trained parameters"], lora["trained parameters"]) == (134_500_000, 4_884_000)  # four digits
    assert full["trainer's start, GiB"] - lora["trainer's start, GiB"] > 0.8, "two moments of fp32 are 1 GiB"
    assert full["update, GiB"] > lora["update, GiB"] and lora["planned for bf16, frozen models, GiB"] == 0.2506


def test_padding_changes_the_work_and_not_the_numbers(sharp, cpu):
    rows = ragged(9, 3, 25)
    longest = max(map(policy.packed_length, rows))
    packed, padded = policy.pack(rows, cpu), bench.padded_pack(longest, rows, cpu)
    assert padded["input_ids"].shape == (1, 9 * longest) and packed["input_ids"].shape[1] < 9 * longest
    from test_policy import make
    model = make(sharp).model
    with torch.no_grad():
        a, b = model(**packed, temperature=1.0), model(**padded, temperature=1.0)
    gap = largest((x - y).abs().max().item() for x, y in zip(a, b, strict=True))
    print(f"padded against packed: {gap:.1e}")
    assert gap <= 1e-5


def test_an_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--only", "update,speed"])
    assert "--only: speed: the parts are update" in capsys.readouterr().err


def test_a_wrong_setting_is_one_line_that_names_the_key(capsys):
    for argv, key in ((["microbatch_tokens=1"], "microbatch_tokens"), (["--longest", "9999"], "--longest")):
        with pytest.raises(SystemExit) as e:
            bench.main(argv)
        err = capsys.readouterr().err
        assert e.value.code == 2 and err.startswith(f"error: {key}: ") and err.count("\n") == 1


@pytest.mark.slow
def test_the_head_alone_in_a_process_counts_its_own_memory():
    """The logits of 8192 tokens and 4000 symbols are 125 MiB; the naive head holds several, a chunk is an eighth."""
    b = SimpleNamespace(rank=0, notes={}, progress=lambda turns, what: turns)
    b.note = b.notes.__setitem__
    b.args, b.config = SimpleNamespace(head_tokens=8192, repeats=1), SimpleNamespace(hidden_size=32, vocab_size=4000)
    bench.bench_head(b)
    gib = {kind: b.notes[f"head {kind}, 8192 x 4000: peak GiB"] for kind in ("chunked", "naive")}
    print({kind: f"{1024 * x:.0f} MiB" for kind, x in gib.items()})
    assert 125 / 1024 < gib["naive"] < 1.2 and gib["chunked"] < 0.6 * gib["naive"]  # it was 0.50 and 0.51


@pytest.mark.parametrize("shape, millions", [("135m", 134.5), ("0.5b", 494.0), ("1.5b", 1543.7), ("7b", 7615.6)])
def test_shapes_have_the_published_models_sizes(shape, millions):
    from lib.memory import model_sizes
    assert model_sizes(bench.shape_config(shape)).params / 1e6 == pytest.approx(millions, abs=0.1)


def test_brooms_are_compared_with_flat_rows_and_drawn(tmp_path, capsys):
    """4 base responses of 20 tokens and 3 branches of each from the middle, prompts of 64 tokens."""
    assert brooms.main(["--shape", "toy", "--response", "20", "--repeats", "1"]) == 0
    found = dict(line.rsplit(None, 1) for line in capsys.readouterr().out.splitlines())
    flat, broom = 16 * (64 + 19), 4 * (64 + 19) + 12 * 9
    assert float(found["flat: tokens forwarded"].replace(",", "")) == flat
    assert float(found["broom / flat, tokens"]) == pytest.approx(broom / flat, rel=1e-3)
    assert abs(float(found["gradient norm broom / flat - 1"])) <= 1e-4 and float(found["broom / flat, seconds"]) > 0
    assert brooms.main(["--picture", str(tmp_path / "broom.png")]) == 0 and (tmp_path / "broom.png").stat().st_size > 5000
