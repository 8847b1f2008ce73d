"""Whole runs of cure.py at the smallest size: a model that knows the format of an answer and guesses its value."""

import ast
import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, first_line, largest, lines, numbers, train_lines
from safetensors.torch import load_file
from vllm_ranks import spoilt

import cure
import loss
import reward
from lib import engine, policy, pool
from lib.config import Config, load_config
from lib.data import DAPO_HEAD, DAPO_TAIL
from lib.run import fit_context
from lib.weights import load_hf_config


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Drawing takes longer than these runs: only `whole` (session scoped, made before) draws for real."""
    monkeypatch.setattr("tools.analyze.curves", lambda out: [])


# ------------------------------------------------------------------------------------------------------------- a whole run
def test_a_run_leaves_the_files_that_the_readme_promises(whole):
    for f in ("config.yaml", "versions.json", "metrics.jsonl", "samples.jsonl", "plots/curves.png", "ckpt/latest"):
        assert os.path.getsize(whole / f) > 0, f
    train = train_lines(whole)
    assert [m["step"] for m in train] == [1, 2, 3, 4, 5, 6], "steps count on over the stages"
    assert [m["stage"] for m in train] == ["stage1"] * 3 + ["stage2"] * 3
    for m in train:
        assert {"opt_step", "tokens/generated", "mismatch/mean_abs", "mismatch/max_abs", "mismatch/k3"} <= m.keys()
        assert m["mismatch/mean_abs"] < 1e-5
        parts = sum(v for k, v in m.items() if k.startswith("timing_s/") and k[9:] not in ("step", "save"))
        assert parts == pytest.approx(m["timing_s/step"]), "the ledger adds up"
    evals = [m for m in lines(whole / "metrics.jsonl") if "eval/avg@4" in m]
    assert [m["step"] for m in evals] == [0, 3, 6] and not any("actor/entropy" in m for m in evals)
    generated = [m["tokens/generated"] for m in train]
    assert generated == sorted(generated) and generated[0] > 0


def test_samples_are_the_rollouts_that_were_trained_on(whole):
    rows = lines(whole / "samples.jsonl")
    keys = {"step", "stage", "prompt_id", "group", "parent", "t_star", "candidates", "prompt", "response", "prompt_ids",
            "prefix_ids", "response_ids", "tokens", "logp", "entropy", "reward", "correct", "advantage", "finish"}  # fmt: skip
    for r in rows:
        assert keys <= r.keys() and len(r["logp"]) == len(r["entropy"]) == len(r["response_ids"]) == len(r["tokens"])
    for step in range(1, 7):
        groups = {}
        for r in rows:
            if r["step"] == step:
                groups.setdefault(r["group"], []).append(r)
        for g in groups.values():
            assert len(g) == 8 and len({r["correct"] for r in g}) == 2, "a kept group has right and wrong members"
            assert sum(r["advantage"] for r in g) == pytest.approx(0, abs=1e-4)
            for r in g:
                inherited = g[r["parent"]]["tokens"][: r["t_star"]] if r["parent"] >= 0 else []
                told = "".join(inherited + r["tokens"])  # a branch's prefix is told by its parent's tokens
                assert re.sub(r"<\|(endoftext|pad)\|>", "", told) == r["response"], "special tokens are shown in tokens only"
                if r["parent"] >= 0:
                    parent = g[r["parent"]]
                    assert parent["parent"] == -1 and r["prefix_ids"] == parent["response_ids"][: r["t_star"]]
                    assert r["t_star"] in parent["candidates"] or (r["t_star"] is None and not parent["candidates"])


def test_logged_shared_tokens_are_prompt_and_prefix_of_the_branches_that_had_room(whole):
    rows = lines(whole / "samples.jsonl")
    for m in train_lines(whole):
        of_step = [r for r in rows if r["step"] == m["step"]]
        length = sum(len(r["prompt_ids"] + r["prefix_ids"] + r["response_ids"]) - 1 for r in of_step)
        could = sum(len(r["prompt_ids"] + r["prefix_ids"]) for r in of_step if r["t_star"] is not None and r["parent"] >= 0)
        shared = m["perf/shared_tokens"]
        assert (0.5 * could / length < shared <= could / length + 1e-9) if m["stage"] == "stage1" else shared == 0


def test_logged_entropy_is_the_token_mean_over_base_rollouts_and_not_minus_their_log_probs(whole):
    rows, gaps, apart = lines(whole / "samples.jsonl"), [], []
    for m in train_lines(whole):
        base = [r for r in rows if r["step"] == m["step"] and r["parent"] < 0]
        h, logp = (np.concatenate([r[k] for r in base]) for k in ("entropy", "logp"))
        gaps.append(abs(m["actor/entropy"] - h.mean()))
        apart.append(abs(m["actor/entropy"] + logp.mean()))
        branches = [r["entropy"] for r in rows if r["step"] == m["step"] and r["parent"] >= 0]
        assert bool(branches) == ("entropy/branch_kept" in m) == (m["stage"] == "stage1")
        if branches:
            gaps.append(abs(m["entropy/branch_kept"] - np.concatenate(branches).mean()))
            gaps.append(abs(m["entropy/all_kept"] - np.concatenate([h, *branches]).mean()))
    print(f"actor/entropy off by {largest(gaps):.1e} from the samples' entropies, by {min(apart):.1e} or more from -mean logp")
    assert largest(gaps) <= 1e-5 < 1e-4 < min(apart)        # samples.jsonl has five decimals


def test_checkpoints_open_in_transformers_with_the_weights_of_the_state(whole):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = whole / "ckpt" / (whole / "ckpt/latest").read_text()
    model = AutoModelForCausalLM.from_pretrained(folder / "hf")
    shard = load_file(next((folder / "state").glob("*.safetensors")))
    for name, p in model.named_parameters():
        assert torch.equal(p, shard["model.lm." + name]), name
    assert AutoTokenizer.from_pretrained(folder / "hf").encode("1+2?") == AutoTokenizer.from_pretrained(
        whole / "ckpt/step_000003/hf"
    ).encode("1+2?")


def test_the_first_optimizer_step_moves_the_weights(config, tiny, tmp_path):
    from transformers import AutoModelForCausalLM

    cure.main(["--config", config, f"out_dir={tmp_path}", "max_steps=1", "eval_data=", "prompts_per_minibatch=4"])
    a, b = (AutoModelForCausalLM.from_pretrained(f) for f in (tiny[0], tmp_path / "ckpt/step_000001/hf"))
    moved = [(p - q).abs().max().item() for p, q in zip(a.parameters(), b.parameters(), strict=True)]
    print(f"{len(moved)} tensors moved, by {min(moved):.1e} to {max(moved):.1e}")
    assert min(moved) > 0, "warmup must not give the first step lr 0"
    assert train_lines(tmp_path)[0]["actor/lr"] == pytest.approx(5e-4)


def test_a_finished_run_says_so_and_trains_no_further(whole, config, capsys):
    before = (whole / "metrics.jsonl").read_text()
    cure.main(["--config", config, f"out_dir={whole}", "samples_per_step=0"])
    assert "finished already" in capsys.readouterr().out and (whole / "metrics.jsonl").read_text() == before


# ------------------------------------------------------------------------------------------------------------------ resume
@pytest.mark.parametrize("stop_at", [2, 3, 5])
def test_a_stopped_and_resumed_run_equals_the_whole_one(whole, config, tmp_path, capsys, stop_at):
    argv = ["--config", config, f"out_dir={tmp_path}", "samples_per_step=0"]
    cure.main([*argv, f"max_steps={stop_at}"])
    assert len(train_lines(tmp_path)) == stop_at
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 99, "torn')  # what a killed process leaves behind is cut off
    random.seed(7), np.random.seed(7), torch.manual_seed(7)  # noise: no global generator is used in training
    cure.main(argv)
    assert f"resumed from step {stop_at}" in capsys.readouterr().out
    assert numbers(tmp_path) == numbers(whole)
    assert (tmp_path / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    assert read_meta(tmp_path, 6)["gaps"] == read_meta(whole, 6)["gaps"] and len(read_meta(whole, 6)["gaps"]) == 6
    for f in sorted((whole / "ckpt/step_000006/state").iterdir()):
        a, b = load_file(f), load_file(tmp_path / "ckpt/step_000006/state" / f.name)
        assert a.keys() == b.keys() and any(k.startswith("exp_avg_sq") for k in a)
        assert all(torch.equal(a[k], b[k]) for k in a), "parameters and Adam's moments"


def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(whole, config, tmp_path, monkeypatch):
    describe = cure.describe

    def and_interrupt(run, cfg, m):
        if run.state["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return describe(run, cfg, m)

    monkeypatch.setattr(cure, "describe", and_interrupt)
    cure.main(["--config", config, f"out_dir={tmp_path}", "samples_per_step=0"])
    assert (tmp_path / "ckpt/latest").read_text() == "step_000002"
    monkeypatch.undo()
    cure.main(["--config", config, f"out_dir={tmp_path}", "samples_per_step=0"])
    assert numbers(tmp_path) == numbers(whole)


def test_a_changed_config_is_refused_by_name(whole, config, capsys):
    with pytest.raises(SystemExit) as e:
        cure.main(["--config", config, f"out_dir={whole}", "clip_high=0.3", "samples_per_step=0"])
    assert e.value.code == 2
    assert "clip_high: not as in the run in" in (err := capsys.readouterr().err) and "0.28" in err and "0.3" in err


def test_one_stage_runs_alone_from_given_weights(whole, config, tmp_path):
    hf = whole / "ckpt/step_000003/hf"
    cure.main(["--config", config, f"out_dir={tmp_path}", "stages.stage1.steps=0", f"model={hf}", "samples_per_step=0"])
    alone, joint = train_lines(tmp_path), train_lines(whole)[3:]
    assert [m["stage"] for m in alone] == ["stage2"] * 3
    assert [m["train/accuracy"] for m in alone] == [m["train/accuracy"] for m in joint], "same weights, same seeds"


# ------------------------------------------------------------------------------------------------- what must change nothing
def test_loss_is_rank_and_micro_batch_invariant(whole, whole2, config, tmp_path):
    """2 ranks, and other micro-batches, against the whole run: same tokens, gradient norms equal but for float sums."""
    argv = ["--config", config, "max_steps=3", "samples_per_step=0", "eval_data="]
    cure.main([*argv, f"out_dir={tmp_path}/micro", "micro_batch_tokens=2048"])
    for name, out in (("2 ranks", whole2), ("micro", tmp_path / "micro")):
        for m, w in zip(train_lines(out)[:3], train_lines(whole)[:3], strict=True):
            gap = abs(m["actor/grad_norm"] / w["actor/grad_norm"] - 1)
            print(f"{name} step {m['step']}: relative difference of gradient norms {gap:.1e}")
            assert m["tokens/generated"] == w["tokens/generated"] and gap < 1e-5


def test_ranks_without_prompts_join_in(config, run, tmp_path):
    """One prompt a round and one held-out prompt on two ranks: no crash, no hang, both stages."""
    out = run("--config", config, f"out_dir={tmp_path}", "prompts_per_round=1", "max_rounds=3", "eval_prompts=1",
              "prompts_per_minibatch=1", "stages.stage1.steps=2", "stages.stage2.steps=2", ranks=2)  # fmt: skip
    assert out.codes == [0, 0], out.printed
    assert [m["train/sampled_groups"] for m in train_lines(tmp_path)] == [3] * 4


def test_entropy_mask_identities(config, tmp_path):
    plain = first_line(config, tmp_path / "plain")
    one = first_line(config, tmp_path / "one", "entropy_mask_rho=1.0", "entropy_mask_norm=all")
    assert one["actor/grad_norm"] == plain["actor/grad_norm"], "rho 1 is plain DAPO bit for bit"
    kept = first_line(config, tmp_path / "kept", "entropy_mask_rho=0.2")
    share = first_line(config, tmp_path / "all", "entropy_mask_rho=0.2", "entropy_mask_norm=all")
    rows = lines(tmp_path / "kept/samples.jsonl")
    n = sum(len(r["response_ids"]) for r in rows)
    k = -(-n // 5)
    print(f"k/n {k}/{n} = {k / n:.6f}, norm all / norm kept = {share['actor/grad_norm'] / kept['actor/grad_norm']:.6f}")
    assert share["actor/grad_norm"] == pytest.approx(k / n * kept["actor/grad_norm"], rel=1e-4)
    assert kept["actor/grad_norm"] != pytest.approx(plain["actor/grad_norm"], rel=1e-2)


@pytest.mark.parametrize(
    "overrides",
    [("packing=flat",), ("importance=[token_truncate,0,2]",), ("importance=[sequence_mask,0.5,2]",), ("agg=micro",), ("entropy_mask_rho=0.2", "entropy_mask_scope=micro"),
     ("overlong_buffer=4",), ("activation_checkpointing=true",), ("reward_scope=continuation",)],
)  # fmt: skip
def test_every_setting_of_the_loop_takes_a_step(config, tmp_path, overrides):
    """Those that are no method of the README's table: test_docs.py runs these."""
    m = first_line(config, tmp_path, *overrides)
    assert m["actor/grad_norm"] > 0 and m["opt_step"] == 1
    if overrides[0] in ("packing=flat", "importance=[token_truncate,0,2]", "importance=[sequence_mask,0.5,2]", "activation_checkpointing=true"):
        plain = first_line(config, tmp_path / "plain")
        assert m["actor/grad_norm"] == pytest.approx(plain["actor/grad_norm"], rel=1e-4), "same mathematics, other arithmetic"


@pytest.mark.parametrize("mode", ["clip_cov", "kl_cov"])
def test_covariance_variants_take_steps_of_several_minibatches_and_log_what_they_chose(config, tmp_path, mode):
    argv = ["n1=8", "n2=0", "prompts_per_minibatch=1", "method_args.cov_share=0.02", "lr=1e-2"]
    argv += ["method_args.cov_low=0.1"] if mode == "clip_cov" else []
    m = first_line(config, tmp_path / mode, *argv, f"method={mode}")
    cov, share = m["actor/cov"], m["actor/cov_share"]
    print(f"{mode}: covariance {cov:.4f}, share chosen {share:.4f}, clipped {m['actor/pg_clipfrac']:.3f}")
    assert m["opt_step"] == 4 and m["actor/cov"] != 0 and 0 < m["actor/cov_share"] <= 0.02
    assert (m["actor/pg_clipfrac"] > 0) == (mode == "clip_cov"), "KL-Cov has no clip"


# ------------------------------------------------------------------------------------------------------- what must be caught
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("how", ["skipped", "late", "short"])
def test_a_wrong_sync_stops_the_run_before_another_step_is_trained(config, tmp_path, monkeypatch, how, dtype):
    error, says = RuntimeError, "engine and trainer disagree"
    if how == "short":
        error, says = AssertionError, "weights never synced to the engine"
    monkeypatch.setattr(engine.TorchEngine, "sync", spoilt(engine.TorchEngine.sync, how))
    with pytest.raises(error, match=says) as e:
        cure.main(["--config", config, f"out_dir={tmp_path}", "eval_data=", f"dtype={dtype}"])
    print(e.value)
    assert [m["step"] for m in train_lines(tmp_path)] == ([] if how == "short" else [1])
    torch.distributed.destroy_process_group()


def watch(gaps, dtype=torch.bfloat16, state=None, **settings):
    """The steps that compare_with_engine lets pass, of a run with these gaps."""
    state = {"step": 0, "gaps": []} if state is None else state
    run = SimpleNamespace(policy=SimpleNamespace(dtype=dtype), state=state)
    for i, gap in enumerate(gaps):
        run.state["step"] += 1
        try:
            row = SimpleNamespace(old_logp=np.array([gap], np.float32), engine_logp=np.zeros(1, np.float32))
            cure.compare_with_engine(run, Config(**settings), [row])
        except RuntimeError:
            return i
    return len(gaps)


def test_the_guard_follows_the_gaps_of_the_run():
    healthy = [0.02 * (1 + 0.3 * np.sin(i)) for i in range(100)]
    assert watch(healthy) == 100 and watch([*healthy, 0.08]) == 100
    assert watch([0.29]) == 1 and watch([0.31]) == watch([float("nan")]) == 0, "no rounding, on any step"
    assert watch([0.002, 0.0055]) == 2 and watch([0.002, 0.0065]) == 1, "one gap is enough to know"
    assert watch([1e-5, 1.9e-3]) == 2 and watch([1e-5, 2.1e-3]) == 1, "a policy that is sure of nearly all tokens"
    falling = [0.03 * 0.97**i for i in range(100)]
    assert watch(falling) == 100 and watch([*falling, 0.03]) == 100, "as its entropy falls it gets sharper"
    drifting = watch([0.002 * 1.05**i for i in range(200)])
    print(f"5 % more at each step: stopped at {0.002 * 1.05**drifting:.3f} nats")
    assert 0.002 * 1.05**drifting <= 0.053, "never synced: no step is large, and the first gap ends it"
    assert watch([9e-4] * 5, torch.float32) == 5 and watch([1e-5] * 5 + [1.1e-3], torch.float32) == 5
    assert watch([0.4, 5.0], max_logp_gap=1.0) == 1 and watch([2e-4], torch.float32, max_logp_gap=1e-4) == 0


def test_the_guard_goes_on_after_a_resume_as_if_there_had_been_none():
    gaps = [0.02 * (1 + 0.3 * np.sin(i)) for i in range(60)]
    state = {"step": 0, "gaps": []}
    watch(gaps, state=state)
    for at in (1, 7, 40):
        half = {"step": 0, "gaps": []}
        watch(gaps[:at], state=half)
        half = json.loads(json.dumps(half))
        watch(gaps[at:], state=half)
        assert half == state
    assert state["gaps"] == pytest.approx([gaps[0], *gaps[-15:]])
    assert watch(gaps, state={"step": 5}) == 60, "an old checkpoint has none"


@pytest.fixture
def spoil(monkeypatch):
    """spoil(n): the first n minibatches of the run have a NaN in their loss (n = inf: all), so their gradients are NaN."""
    inner, seen = cure.minibatch_loss, []

    def install(n):
        def minibatch_loss(*args):
            seen.append(1)
            loss_fn, bad = inner(*args), len(seen) <= n
            return lambda *batch: loss_fn(*batch) * (float("nan") if bad else 1.0)

        monkeypatch.setattr(cure, "minibatch_loss", minibatch_loss)
        return seen

    return install


def test_a_gradient_that_is_not_finite_skips_the_step_and_is_counted(config, tiny, tmp_path, spoil):
    spoil(2)
    argv = ["--config", config, f"out_dir={tmp_path}", "eval_data=", "prompts_per_minibatch=4", "save_every=1", "keep_ckpts=9"]
    cure.main([*argv, "max_steps=3"])
    m = train_lines(tmp_path)
    skipped = [x["train/skipped_steps"] for x in m]
    print(f"train/skipped_steps {skipped}, optimizer steps {[x['opt_step'] for x in m]}")
    assert skipped == [1, 1, 0] and [x["opt_step"] for x in m] == [0, 0, 1]
    assert [x["actor/grad_norm"] is None for x in m] == [True, True, False]
    start, after = load_file(f"{tiny[0]}/model.safetensors"), [
        load_file(tmp_path / f"ckpt/step_00000{i}/hf/model.safetensors") for i in (1, 2, 3)]  # fmt: skip
    unchanged = [all(torch.equal(w, start[k]) for k, w in x.items()) for x in after]
    assert unchanged == [True, True, False], "bit for bit"
    assert read_meta(tmp_path, 2)["skipped_in_a_row"] == 2 and read_meta(tmp_path, 3)["skipped_in_a_row"] == 0


def read_meta(out, step):
    return json.loads((out / f"ckpt/step_00000{step}/meta.json").read_text())


def test_the_third_gradient_in_a_row_that_is_not_finite_ends_the_run(config, tmp_path, spoil):
    seen = spoil(float("inf"))
    with pytest.raises(RuntimeError, match="three gradients in a row are not finite: lower lr"):
        cure.main(["--config", config, f"out_dir={tmp_path}", "eval_data=", "prompts_per_minibatch=4"])
    print(f"{len(seen)} minibatches tried, {len(train_lines(tmp_path))} steps logged")
    assert len(seen) == 3 and [m["train/skipped_steps"] for m in train_lines(tmp_path)] == [1, 1]
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("verdict", [(-1.0, False, "34"), (1.0, True, "34")])
def test_a_verifier_that_always_says_the_same_stops_the_run_before_its_first_step(config, tmp_path, monkeypatch, verdict):
    monkeypatch.setattr(pool.VerifierPool, "verdicts", lambda self, pairs, verifier: ([verdict] * len(pairs), {}))
    with pytest.raises(RuntimeError, match="verifier 'boxed' misjudged .* Not starting"):
        cure.main(["--config", config, f"out_dir={tmp_path}/run"])
    assert not (tmp_path / "run").exists()
    torch.distributed.destroy_process_group()


def test_groups_without_contrast_are_not_trained_on(config, tiny, tmp_path, capsys):
    wrong = tmp_path / "wrong.jsonl"
    rows = [{"prompt": f"{a}+{b}?", "answer": "999"} for a in range(1, 5) for b in range(1, 5)]
    wrong.write_text("".join(json.dumps(r) + "\n" for r in rows))
    argv = ["--config", config, f"data={wrong}", "eval_data="]
    cure.main([*argv, f"out_dir={tmp_path}/run", "max_steps=2", "max_rounds=2"])
    m = train_lines(tmp_path / "run")
    assert [(x["train/kept_groups"], x["train/empty_steps"], x["opt_step"], x["train/rounds"]) for x in m] == [(0, 1, 0, 2)] * 2
    assert "no group kept" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="on_starved"):
        cure.main([*argv, f"out_dir={tmp_path}/raise", "max_rounds=1", "on_starved=raise"])
    torch.distributed.destroy_process_group()


BAD_CONFIG = {
    ("lrr=1",): "lrr: no such key; did you mean lr?",
    ("stages.stage1.n3=1",): "n3: no such key",
    ("stages.stage1.clip_hihg=1",): "clip_hihg: no such key; did you mean clip_high?",
    ("stages.stage9.n1=1",): "stages.stage9",
    ("lr=fast",): "lr: ",
    ("steps=2.5",): "steps: ",
    ("stages.stage2.n1=many",): "n1: ",
    ("prompts_per_step=5",): "prompts_per_step: 5 is no multiple of prompts_per_minibatch 2",
    ("micro_batch_tokens=30",): "micro_batch_tokens: 30 is smaller than one sequence of 48",
    ("critical=best",): "critical: must be one of entropy, random, none",
    ("temperature=0",): "temperature: must be positive",
    ("stages.stage1.steps=0", "stages.stage2.steps=0"): "steps: no stage has any",
    ("method_args.coef=1",): "method_args: are of a method, and method is empty",
    ("plan_gpu=h100",): "plan_gpu: no such key",
    ("n1=1", "n2=0"): "n1, n2: ",
    ("oops",): "'oops' is not key=value",
    ("stages.stage2.engine=vllm",): "engine: is for the whole run",
    ("stages=3",): "stages: must be a mapping",
    ("lr=nan",): "lr: must be positive",
    ("warmup=-3",): "warmup: must be finite and not negative",
    ("keep_ckpts=0",): "keep_ckpts: must be positive",
    ("eval_temperature=0",): "eval_n: greedy",
    ("entropy_mask_side=bottom",): "entropy_mask_side: bottom masks nothing at entropy_mask_rho 1",
    ("importance=[tis,0,2]",): "importance: is [mode, low, high], mode one of token_truncate",
    ("importance=[token_mask,2,1]",): "importance: is [mode, low, high]",
    ("importance=token_mask",): "importance: ",
}
BAD_METHOD = {
    ("method=clip_cof",): "method: no file methods/clip_cof.py; there are adaptive_entropy, cispo, clip_cov, dr_grpo",
    ("method={tmp}/nothing.py",): "method: no file {tmp}/nothing.py",
    ("method={tmp}/no_hook.py",): "method: {tmp}/no_hook.py has none of the functions critical_tokens, group_advantages, policy_loss",
    ("method={tmp}/other_signature.py",): "method: {tmp}/other_signature.py: group_advantages should take (scores, groups, parents)",
    ("method={tmp}/bare_setting.py",): "method: {tmp}/bare_setting.py: group_advantages: its setting power needs a default",
    ("method={tmp}/broken.py",): "method: {tmp}/broken.py cannot be loaded: ",
    ("method=clip_cov", "entropy_mask_rho=0.2"): "method: {root}/methods/clip_cov.py and entropy_mask_rho 0.2 both choose tokens",
    ("method=clip_cov", "method_args.cov_shre=1"): "method_args.cov_shre: no such key; did you mean cov_share?",
    ("method=clip_cov", "method_args.cov_share=many"): "method_args.cov_share: must be of type float, got 'many'",
    ("method=clip_cov", "method_args.cov_low=5"): "method_args.cov_low: 5.0 leaves nothing below cov_high 5.0",
    ("method=clip_cov", "method_args.cov_share=0"): "method_args.cov_share: is a share of the tokens",
    ("method=clip_cov", "method_args.cov_share=2"): "method_args.cov_share: is a share of the tokens",
    ("method=entropy_bonus", "method_args.coef=-0.1"): "method_args.coef: must be finite and not negative",
    ("method=kl_cov", "method_args.coef=nan"): "method_args.coef: must be of type float, got 'nan'",
}
METHOD_FILES = {
    "no_hook": "def something_else(): pass\n", "broken": "def group_advantages(:\n",
    "other_signature": "def group_advantages(scores, group): return scores\n",
    "bare_setting": "def group_advantages(scores, groups, parents, *, power): return scores\n",
}


@pytest.mark.parametrize("overrides", BAD_METHOD, ids=lambda o: "+".join(o))
def test_a_bad_method_is_one_line_naming_file_and_function_and_nothing_is_written(config, tmp_path, capsys, overrides):
    for name, text in METHOD_FILES.items():
        (tmp_path / f"{name}.py").write_text(text)
    with pytest.raises(SystemExit) as e:
        cure.main(["--config", config, f"out_dir={tmp_path}/run", *[o.format(tmp=tmp_path) for o in overrides]])
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count("\n") == 1 and not (tmp_path / "run").exists()
    assert err.startswith("error: " + BAD_METHOD[overrides].format(tmp=tmp_path, root=ROOT)), err


def test_a_method_of_ones_own_by_path_replaces_a_hook_and_takes_its_settings(config, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from loss import group_advantages as default\n\n\n"
        "def group_advantages(scores, groups, parents, *, factor=1.0):\n"
        "    return factor * default(scores, groups, parents)\n"
    )
    argv = [f"method={tmp_path}/mine.py"]
    plain = first_line(config, tmp_path / "plain")
    same = first_line(config, tmp_path / "one", argv[0])
    twice = first_line(config, tmp_path / "two", argv[0], "method_args.factor=2")
    assert same["actor/grad_norm"] == plain["actor/grad_norm"]
    assert twice["actor/grad_norm"] == pytest.approx(2 * plain["actor/grad_norm"], rel=1e-4)


def test_prompt_and_response_fit_the_context_in_training_and_take_the_room_in_an_evaluation(tiny, capsys):
    heldout = SimpleNamespace(prompts=[SimpleNamespace(ids=[0] * n) for n in (9, 28)])
    run = SimpleNamespace(path=tiny[0], heldout={"a": heldout}, print=print)
    context = load_hf_config(tiny[0]).max_position_embeddings
    cfg = Config(name="a", max_prompt_tokens=28, max_response_tokens=context - 28)
    fit_context(run, [("a", cfg)], train=True)
    cfg.max_prompt_tokens += 1
    with pytest.raises(ValueError, match=rf"max_prompt_tokens: .*context of {context} \(stage a\)"):
        fit_context(run, [("a", cfg)], train=True)
    cfg.max_response_tokens = 10**6
    fit_context(run, [("a", cfg)], train=False)
    assert (cfg.max_prompt_tokens, cfg.max_response_tokens) == (28, context - 28)
    assert f"a: max_response_tokens {context - 28}, not 1000000" in capsys.readouterr().out


@pytest.mark.parametrize("overrides", BAD_CONFIG, ids=lambda o: "+".join(o))
def test_bad_config_is_one_line_that_names_the_key(config, overrides):
    with pytest.raises(ValueError) as e:
        load_config(["--config", config, *overrides])
    assert BAD_CONFIG[overrides] in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("entry", "says"),
    [("clip_hihg: 0.3", "clip_hihg: no such key; did you mean clip_high?"), ("n1: many", "n1: "), ("n1: 2.5", "n1: "),
     ("lr: [1]", "lr: "), ("betas: 0.9", "betas: "), ("prompts_per_step: 48", "prompts_per_step: 48 is no multiple"),
     ("micro_batch_tokens: 4095", "micro_batch_tokens: 4095 is smaller than one sequence of 4096 tokens")],
)  # fmt: skip
def test_a_mistake_inside_a_stage_entry_of_the_file_is_one_line_that_names_the_key(tmp_path, entry, says):
    (tmp_path / "bad.yaml").write_text(f"stages:\n  one: {{steps: 1}}\n  two: {{{entry}}}\n")
    with pytest.raises(ValueError) as e:
        load_config(["--config", str(tmp_path / "bad.yaml")])
    print(e.value)
    assert str(e.value).startswith(says) and "\n" not in str(e.value)


@pytest.mark.parametrize("text", ["lr: [1", "stages: [a, b]", "stages: {a: 3}", "- lr", "8020: {}"])
def test_a_config_file_that_is_no_mapping_of_keys_is_one_line(tmp_path, text):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ValueError) as e:
        load_config(["--config", str(tmp_path / "bad.yaml")])
    assert "\n" not in str(e.value)


def test_every_config_of_the_project_is_valid():
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        for name, cfg in load_config(["--config", str(path), "eval_data=some.jsonl"]):
            assert isinstance(name, str) and cfg.name == name and cfg.out_dir == f"runs/{path.stem}"


def answering(folder, kind, answers):
    """A random model of an architecture, and its tokenizer: bytes, and each of `answers` in one token. Nothing is learnt,
    but all embeddings share a direction, in which the answers' and the end's are long: it writes little else."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Tokenizer
    symbols = ["<|pad|>", "<|endoftext|>", *sorted(ByteLevel.alphabet())]
    tokenizer = Qwen2Tokenizer(vocab={s: i for i, s in enumerate(symbols)}, merges=[], unk_token=None, pad_token=symbols[0],
                               eos_token=symbols[1])  # fmt: skip
    tokenizer.add_tokens(list(answers))
    tokenizer.chat_template = (  # as Qwen3's, thoughts of none where thinking is off
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
        "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}")
    config = AutoConfig.for_model(kind, vocab_size=len(symbols) + len(answers), hidden_size=64, intermediate_size=96,
                                  num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                                  tie_word_embeddings=True, bos_token_id=None, eos_token_id=1, pad_token_id=0)  # fmt: skip
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        lm.get_input_embeddings().weight[:, 0] = 0.3
        lm.get_input_embeddings().weight[[1, *range(len(symbols), config.vocab_size)], 0] = 1.3
    tokenizer.save_pretrained(folder)
    lm.save_pretrained(folder)


SINGLE_GPU = {  # config: architecture, task
    "qwen2.5-0.5b-24gb": ("qwen2", "countdown"), "qwen2.5-1.5b-24gb-lora": ("qwen2", "countdown"),
    "qwen2.5-7b-1gpu-lora": ("qwen2", "math"), "qwen3-4b-1gpu-lora": ("qwen3", "math"),
}  # fmt: skip
TASKS = {  # task: answers that are tokens of the model, rows of the data's schema
    "countdown": (["<answer>3+4</answer>", "<answer>3*4</answer>"],
                  [{"nums": nums, "target": t} for nums in ([3, 4], [4, 3]) for t in (7, 12)]),
    "math": (["Answer: 4\n", "Answer: 5\n"],
             [{"prompt": [{"role": "user", "content": f"{DAPO_HEAD}What is {a} + {b - a}?{DAPO_TAIL}"}],
               "reward_model": {"ground_truth": str(b)}} for a in (1, 2) for b in (4, 5)]),
}  # fmt: skip


@pytest.mark.parametrize("name", SINGLE_GPU)
def test_each_config_of_a_single_gpu_takes_a_step_of_both_stages_at_a_tiny_size(name, tmp_path, monkeypatch):
    """The file as it is, but for model, data, sizes and counts: template, verifier, adapters, weights, checkpointing."""
    kind, task = SINGLE_GPU[name]
    answers, rows = TASKS[task]
    answering(tmp_path / "model", kind, answers)
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = ["stages.stage1.steps=1", "stages.stage2.steps=1", "prompts_per_step=4", "prompts_per_round=4", "engine=torch",
             "prompts_per_minibatch=2", "max_prompt_tokens=600", "max_response_tokens=12", "micro_batch_tokens=1300"]  # fmt: skip
    argv = ["--config", str(ROOT / f"configs/{name}.yaml"), f"model={tmp_path}/model", f"data={tmp_path}/data.jsonl", *small]
    counted = []
    monkeypatch.setattr("lib.report.utilisation", lambda *args: counted.append(args) or {})
    assert cure.main([*argv, f"out_dir={tmp_path}/run"]) == 0
    first, second = train_lines(tmp_path / "run")
    rank = load_config(argv)[0][1].lora_rank
    assert {args[-1] for args in counted} == {rank}, "perf/mfu counts adapters"
    assert (rank > 0) == ("lora" in name) and (first["stage"], second["stage"]) == ("stage1", "stage2")
    for m in (first, second):
        print(f"{name} {m['stage']}: {m['train/kept_groups']} groups kept, accuracy {m['train/accuracy']:.2f}, gradient {m['actor/grad_norm']:.3f}")
        assert m["train/kept_groups"] >= 2 and m["actor/grad_norm"] > 0 and m["mismatch/mean_abs"] < 1e-5
        assert ("actor/is_weight" in m) == (rank > 0)
    assert first["branch/fallback_share_sampled"] < 1, "branches left at critical tokens"
    prompts = {row["prompt"] for row in lines(tmp_path / "run/samples.jsonl")}
    assert all(("<think></think>" in prompt) == name.startswith("qwen3") for prompt in prompts) and prompts
    step = tmp_path / "run/ckpt/step_000002"
    assert (step / "adapter/adapter_model.safetensors").exists() == (rank > 0)
    assert json.loads((step / "hf/config.json").read_text())["model_type"] == kind


def test_the_7b_config_is_the_table_of_the_reference():
    (_, one), (_, two) = load_config(["--config", str(ROOT / "configs/qwen2.5-math-7b.yaml")])
    table = {  # key: (stage 1, stage 2)
        "n1": (4, 16), "n2": (3, 0), "group_size": (16, 16), "max_prompt_tokens": (1500, 512),
        "max_response_tokens": (2596, 3584), "critical_top_k": (20, 20), "prompts_per_step": (512, 512),
        "prompts_per_round": (512, 512), "prompts_per_minibatch": (32, 32), "clip_low": (0.2, 0.2), "clip_high": (0.28, 0.28),
        "lr": (1e-6, 1e-6), "betas": ([0.9, 0.999],) * 2, "weight_decay": (0.1, 0.1),
        "warmup": (10, 10), "overlong_buffer": (512, 512),
        "temperature": (1, 1), "max_rounds": (20, 20), "steps": (300, two.steps),
        "model": ("Qwen/Qwen2.5-Math-7B",) * 2, "agg": ("token", "token"), "entropy_mask_rho": (1, 1), "importance": ([], []),
    }  # fmt: skip
    assert {k: (getattr(one, k), getattr(two, k)) for k in table} == table
    assert (policy.GRAD_CLIP, loss.policy_loss.__kwdefaults__["clip_dual"]) == (1, 10)
    assert reward.overlong_penalty(2596, 2596, 512) == -1, "the penalty grows to 1"


def forbidden(source):
    """What a script must not do, found in its syntax tree: ["line: what", …]."""
    found = []
    for node in ast.walk(ast.parse(source)):
        name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None
        if isinstance(node, ast.alias):                 # from sympy import sympify as s; from eval import evaluate is a file
            name = node.name.split(".")[-1]
            name = None if name == "eval" else name
        if name in ("sympify", "parse_expr", "__import__", "pickle", "cPickle", "dill", "exec", "joblib"):
            found.append(f"{node.lineno}: {name}")
        if isinstance(node, ast.Name) and name == "eval":
            found.append(f"{node.lineno}: eval")
        if isinstance(node, ast.Call):
            called, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            if called.endswith("torch.load") and keywords.get("weights_only") != "True":
                found.append(f"{node.lineno}: torch.load without weights_only=True")
            for key, safe in (("trust_remote_code", "False"), ("shell", "False"), ("allow_pickle", "False")):
                if keywords.get(key, safe) != safe:
                    found.append(f"{node.lineno}: {key}={keywords[key]}")
            if called in ("os.system", "os.popen") or called == "yaml.load" or called.endswith(".eval") and node.args:
                found.append(f"{node.lineno}: {called}")
    return found


@pytest.mark.parametrize(
    "bad",
    ["eval('1')", "exec(text)", "f = eval", "map(eval, texts)", "import pickle", "from sympy import sympify as s",
     "frame.eval(x)", "sympy.parse_expr(x)", "__import__('os')", "torch.load(f)", "torch.load(f, weights_only=False)",
     "import joblib", "AutoModel.from_pretrained(x, trust_remote_code=True)", "f(trust_remote_code=flag)",
     "np.load(f, allow_pickle=True)", "subprocess.run(x, shell=True)", "os.system(x)", "yaml.load(x)"],
)  # fmt: skip
def test_the_search_for_forbidden_calls_finds_them(bad):
    assert forbidden(bad) and forbidden(f"class A:\n    def f(self):\n        {bad}\n")


def test_no_script_evaluates_text_unpickles_or_trusts_remote_code():
    scripts = [p for d in (".", "lib", "methods", "tools", "tests") for p in sorted((ROOT / d).glob("*.py"))]
    assert {"cure.py", "policy.py", "rollout.py", "loss.py", "reward.py", "data.py", "eval.py"} <= {p.name for p in scripts}
    found = {p.name: hits for p in scripts if (hits := forbidden(p.read_text()))}
    print(f"{len(scripts)} scripts: {found or 'nothing forbidden'}")
    assert not found


@pytest.mark.parametrize(
    "overrides, says",
    [
        (["data=nothing.jsonl"], "data: no such file"),
        (["data={tmp}/empty.jsonl"], "data: "),
        (["model={tmp}"], "model: no tokenizer in"),
        (["template=chat"], "template: chat needs a tokenizer with a chat template"),
        (["max_prompt_tokens=1"], "max_prompt_tokens: "),
        (["resume={tmp}"], "resume: "),
    ],
)
def test_bad_input_exits_2_with_one_line_and_writes_nothing(config, tmp_path, capsys, overrides, says):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(SystemExit) as e:
        cure.main(["--config", config, f"out_dir={tmp_path}/run", *[o.format(tmp=tmp_path) for o in overrides]])
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.startswith("error: " + says) and err.count("\n") == 1
    assert not (tmp_path / "run").exists()
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed")
def test_engine_vllm_without_vllm_is_one_line(config, tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        cure.main(["--config", config, f"out_dir={tmp_path}/run", "engine=vllm"])
    assert e.value.code == 2 and "error: engine=vllm: vllm cannot be imported" in capsys.readouterr().err
    torch.distributed.destroy_process_group()


def test_precedence_is_defaults_file_stage_entry_command_line(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text("lr: 2.0e-6\nseed: 5\nstages: {a: {lr: 3.0e-6, n1: 8}, b: {}}\n")
    (_, a), (_, b) = load_config(["--config", str(path)])
    assert (a.lr, b.lr, a.n1, b.n1, a.seed) == (3e-6, 2e-6, 8, 4, 5) and a.out_dir == "runs/p"
    (_, a), (_, b) = load_config(["lr=4e-6", "--config", str(path), "stages.b.lr=5e-6", "out_dir=", "system_prompt="])
    assert (a.lr, b.lr, a.out_dir, a.system_prompt) == (4e-6, 5e-6, "runs/p", "")


# ------------------------------------------------------------------------------------------------------------------ the toy
TOY_BF16 = ["--config", "configs/toy.yaml", "dtype=bfloat16", "engine=torch", "eval_data=", "save_every=0"]


@pytest.mark.slow
def test_80_healthy_steps_of_the_toy_in_bf16_raise_no_alarm(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # its base model is in runs/
    small = ["prompts_per_step=4", "prompts_per_round=5", "prompts_per_minibatch=2"]
    cure.main([*TOY_BF16, *small, f"out_dir={tmp_path}"])
    gaps = sorted(m["mismatch/mean_abs"] for m in train_lines(tmp_path))
    print(f"{len(gaps)} steps: gap {gaps[0]:.2g} to {gaps[-1]:.2g}, median {gaps[40]:.2g}")
    assert len(gaps) == 80


@pytest.mark.slow
@pytest.mark.parametrize("how", ["skipped", "late"])
def test_a_wrong_sync_of_the_toy_in_bf16_stops_the_run_at_the_next_step(tmp_path, monkeypatch, how):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(engine.TorchEngine, "sync", spoilt(engine.TorchEngine.sync, how))
    with pytest.raises(RuntimeError, match="engine and trainer disagree") as e:
        cure.main([*TOY_BF16, f"out_dir={tmp_path}"])
    print(e.value)
    assert [m["step"] for m in train_lines(tmp_path)] == [1]
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_the_toy_learns_from_its_own_base(tmp_path):
    """The README's first command on 2 ranks with few steps: base made once, both stages, an accuracy that rises."""
    argv = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "cure.py", "--config", "configs/toy.yaml",
            f"out_dir={tmp_path}/run", "stages.stage1.steps=12", "stages.stage2.steps=4", "eval_every=0"]  # fmt: skip
    subprocess.run([sys.executable, *argv], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    base, one, two = (m["eval/avg@16"] for m in lines(tmp_path / "run/metrics.jsonl") if "eval/avg@16" in m)
    print(f"held-out avg@16: base {base:.3f}, after 12 steps of stage 1 {one:.3f}, after 4 of stage 2 {two:.3f}")
    assert base < 0.5 and one > base + 0.05
