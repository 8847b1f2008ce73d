"""What several test files share: one thread, a process group of one, tiny random models, and a launcher of gloo ranks.

The models learnt nothing, but their weights are large, so that entropies differ and log-probs are worth comparing."""
import json
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")           # before torch is imported: two cores are no place for its threads

import random
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def sharpen(folder, **changes):
    """Rewrite the model in `folder` with large random weights: entropies of 0.8 to 2.9 nats, responses that end at times.
    `changes` are of its config."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    config = AutoConfig.from_pretrained(folder)
    config.initializer_range = 0.15
    for key, value in changes.items():
        setattr(config, key, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for p in model.parameters():
            if p.ndim == 1:                             # norms and biases
                p.data += 0.1 * torch.randn_like(p)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """The toy as toy.make_toy leaves it, but small in rows: tied embeddings, 25 symbols. Read only."""
    from lib.toy import make_toy
    folder = str(tmp_path_factory.mktemp("models") / "toy")
    make_toy(folder, n_train=64, n_heldout=16, n_sft=32)
    return folder


@pytest.fixture(scope="session")
def sharp(tmp_path_factory):
    """The toy with large weights (see sharpen). Read only."""
    from lib.toy import make_toy
    folder = str(tmp_path_factory.mktemp("models") / "sharp")
    make_toy(folder, n_train=64, n_heldout=16, n_sft=32)
    return sharpen(folder)


@pytest.fixture(scope="session")
def odd(tmp_path_factory):
    """What the toy is not: a head of its own, fewer kv heads than heads, V larger than the tokenizer. Read only."""
    from lib.toy import make_toy
    folder = str(tmp_path_factory.mktemp("models") / "odd")
    make_toy(folder, n_train=64, n_heldout=16, n_sft=32)
    return sharpen(folder, vocab_size=37, tie_word_embeddings=False, num_key_value_heads=2, hidden_size=48,
                   intermediate_size=80)


@pytest.fixture(scope="module")
def cpu():
    """A process group of one on the CPU, as ranks.init_distributed makes it; its variables do not leak to children. Of one
    module: cure.main, which other modules call, ends the group that it finds."""
    import torch
    import torch.distributed as dist

    from lib import ranks
    before = {k: os.environ.pop(k, None) for k in LAUNCHER}
    with pytest.MonkeyPatch.context() as patch:         # these tests are of fp32 on the CPU, wherever they run
        patch.setattr(torch.cuda, "is_available", lambda: False)
        rank, world, device = ranks.init_distributed()
    for k, v in before.items():
        os.environ.pop(k, None)
        os.environ.update({} if v is None else {k: v})
    assert (rank, world, device.type) == (0, 1, "cpu")
    yield device
    dist.destroy_process_group()


def one_minibatch(rows, budget, world=1):
    """All rows as one minibatch, cut as the training loop cuts it."""
    from cure import Minibatch
    from lib.policy import packed_length, partition
    return Minibatch(rows, partition([packed_length(r) for r in rows], world, budget))


def loss_of(policy, cfg, mini, sums=None, k=0, rank=0, world=1):
    """cure.minibatch_loss of a minibatch, with the functions of cfg.method."""
    import cure
    from lib.method import load_method
    run = SimpleNamespace(policy=policy, rank=rank, world=world, state={"stage_step": 1})
    return cure.minibatch_loss(run, cfg, load_method(cfg, cure.HOOKS), mini, k, Counter() if sums is None else sums)


def first_line(config, out, *overrides):
    """The first line of metrics of a run of one step and one minibatch."""
    import cure
    cure.main(["--config", config, f"out_dir={out}", "max_steps=1", "eval_data=", "prompts_per_minibatch=4", *overrides])
    return train_lines(out)[0]


def largest(*numbers):
    """max() of numbers, or of one iterable of them, that does not lose a NaN: max(0.0, nan) is 0.0, and a test would pass."""
    return float(np.max([float(x) for x in (numbers if len(numbers) > 1 else numbers[0])]))


def ragged(n, seed, vocab, per_group=1, prompt=(2, 12), prefix=(0, 6), response=(1, 40)):
    """n rollouts of random ids and very different lengths, every second one with a prefix, `per_group` in a group."""
    from rollout import Rollout
    rng = random.Random(seed)

    def ids(bounds):
        return [rng.randrange(2, vocab) for _ in range(rng.randint(*bounds))]

    out = []
    for i in range(n):
        r = Rollout(ids(prompt), ids(prefix) if i % 2 else [], ids(response), group=i // per_group, prompt_id=i // per_group)
        r.reward, r.seed = 1.0 if i % per_group % 3 == 0 else -1.0, i     # every group is mixed
        r.engine_logp = np.float32([-rng.random() for _ in r.response_ids])
        out.append(r)
    return out


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_ranks(world, *args):
    """`world` processes of this file, see the end; what they print goes to a pipe."""
    port = free_port()
    env = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen([sys.executable, __file__, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                         env=env | dict(zip(LAUNCHER, (str(rank), str(rank), str(world), "127.0.0.1", str(port)), strict=True)))
        for rank in range(world)
    ]  # fmt: skip


WORLDS = [2, pytest.param(3, marks=pytest.mark.slow)]  # rank counts; five processes of it are half a minute of importing


class Ranks(dict):
    """What gloo ranks found, {world: {"policy": …, "rollout": …, "out": folder}}, started at the first look: rank_job of
    test_policy.py, test_broom.py, test_lora.py, test_rollout.py and test_eval.py. One set of processes for all files, since importing is most of their
    time. A rank that hangs or fails is an error here."""

    def __init__(self, model, out):
        self.model, self.out = model, out

    def __missing__(self, world):
        import torch
        started = start_ranks(world, self.model, self.out)
        try:
            logs = [p.communicate(timeout=180)[0] for p in started]
        except subprocess.TimeoutExpired:
            pytest.fail(f"a rank did not end, exit codes so far: {[p.poll() for p in started]}")
        finally:
            for p in started:
                p.kill()
        failed = [f"exit code {p.returncode}:\n{log[-3000:]}" for p, log in zip(started, logs, strict=True) if p.returncode]
        assert not failed, "\n".join(failed)
        found = {name: torch.load(self.out / f"{name}{world}.pt", weights_only=True) for name in ("policy", "broom", "lora", "rollout")}
        self[world] = found | {"out": self.out}
        return self[world]


@pytest.fixture(scope="session")
def ranks(sharp, tmp_path_factory):
    return Ranks(sharp, tmp_path_factory.mktemp("ranks"))


# ------------------------------------------------------------------------------------------------- whole runs, the smallest
TINY = [
    "template=raw", "verifier=boxed", "min_token_chars=1", "critical_top_k=4", "max_prompt_tokens=24", "max_response_tokens=24",
    "micro_batch_tokens=128", "overlong_buffer=0", "prompts_per_step=4", "prompts_per_round=4", "prompts_per_minibatch=2",
    "lr=1e-3", "warmup=2", "weight_decay=0", "engine=torch", "save_every=0",
]  # fmt: skip


def lines(path):
    return [json.loads(line) for line in open(path)]


def train_lines(out):
    return [m for m in lines(f"{out}/metrics.jsonl") if "actor/entropy" in m]


def numbers(out):
    """The metrics that must repeat bit for bit: everything but seconds and what is computed from them."""
    return [{k: v for k, v in m.items() if not k.startswith(("timing_s", "perf"))} for m in lines(f"{out}/metrics.jsonl")]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """(model folder, data file): sums of two digits, answered in the right form with one of three values: right a third of
    the time. Trained by the sft stage itself, in seconds."""

    import cure
    from lib.toy import make_toy
    folder = tmp_path_factory.mktemp("tiny")
    make_toy(f"{folder}/init", n_train=4, n_heldout=4, n_sft=4)
    rng = random.Random(0)
    rows, sft = [], []
    for a in range(1, 10):
        for b in range(1, 10):
            rows.append({"prompt": f"{a}+{b}?", "answer": str(a + b)})
            for _ in range(8):
                c = a + b + rng.choice([-1, 0, 1])
                sft.append({"prompt": f"{a}+{b}?", "answer": str(a + b), "solution": f" {a}+{b}={c};\\boxed{{{c}}}"})
    for name, content in (("rl", rows), ("sft", sft)):
        with open(f"{folder}/{name}.jsonl", "w") as f:
            f.writelines(json.dumps(r) + "\n" for r in content)
    argv = [f"model={folder}/init", f"data={folder}/sft.jsonl", f"out_dir={folder}/sft", *TINY, "kind=sft", "steps=150",
            "prompts_per_step=32", "prompts_per_minibatch=32", "lr=3e-3", "micro_batch_tokens=2048"]  # fmt: skip
    cure.main(argv)
    losses = [m["sft/loss"] for m in lines(f"{folder}/sft/metrics.jsonl")]
    assert len(losses) == 150 and losses[-1] < 0.6 < losses[0], "the sft stage must have learnt the form"
    latest = open(f"{folder}/sft/ckpt/latest").read()
    return f"{folder}/sft/ckpt/{latest}/hf", f"{folder}/rl.jsonl"


@pytest.fixture(scope="session")
def config(tiny, tmp_path_factory):
    """A config file with both stages over the tiny model."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    keys = "\n".join(f"{k}: {v}" for k, v in (kv.split("=") for kv in TINY))
    path.write_text(
        f"model: {tiny[0]}\ndata: {tiny[1]}\neval_data: {tiny[1]}\neval_prompts: 6\neval_n: 4\n{keys}\n"
        "stages:\n  stage1: {steps: 3, n1: 2, n2: 3}\n  stage2: {steps: 3, n1: 8, n2: 0, betas: [0.8, 0.95], weight_decay: 0.3}\n"
    )
    return str(path)


@pytest.fixture(scope="session")
def whole(config, tmp_path_factory):
    """The folder of one uninterrupted run of both stages."""
    import cure
    out = tmp_path_factory.mktemp("whole")  # session fixtures are set up before no_pictures: this run draws
    cure.main(["--config", config, f"out_dir={out}", "samples_per_step=0"])
    return out


class Forks:
    """The other end of forks.py."""

    def __init__(self, folder):
        env = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        self.folder, self.n = folder, 0
        self.process = subprocess.Popen([sys.executable, Path(__file__).with_name("forks.py")], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True, env=env)  # fmt: skip

    def __call__(self, *argv, **job):
        """One run of cure.py -> codes, seconds, printed."""
        self.n += 1
        job |= {"argv": list(map(str, argv)), "log": f"{self.folder}/{self.n}.log", "port": free_port()}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        out = SimpleNamespace(**json.loads(self.process.stdout.readline()))
        out.printed = Path(job["log"]).read_text() if os.path.exists(job["log"]) else ""
        return out


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    forks = Forks(tmp_path_factory.mktemp("forks"))
    yield forks
    forks.process.stdin.close()
    forks.process.wait(timeout=30)


@pytest.fixture(scope="session")
def whole2(config, run, tmp_path_factory):
    """The folder of one uninterrupted run on two ranks."""
    out = tmp_path_factory.mktemp("whole2")
    assert run("--config", config, f"out_dir={out}", "samples_per_step=0", ranks=2).codes == [0, 0]
    return out


if __name__ == "__main__":                              # one rank
    import test_broom
    import test_eval
    import test_lora
    import test_policy
    import test_rollout

    from lib import ranks

    def main():
        where = ranks.init_distributed()
        for file in (test_policy, test_broom, test_lora, test_rollout, test_eval):     # the last one ends the process group
            file.rank_job(*where, *sys.argv[1:])

    ranks.leave(main)
