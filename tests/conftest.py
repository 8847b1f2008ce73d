"""What several test files share: one thread, a process group of one, tiny random models, and a launcher of gloo ranks.

The models learnt nothing, but their weights are large, so that entropies differ and log-probs are worth comparing."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")           # before torch is imported: two cores are no place for its threads

import random
import socket
import subprocess
import sys
from pathlib import Path

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
    """The toy as data.make_toy leaves it, but small in rows: tied embeddings, 25 symbols. Read only."""
    import data
    folder = str(tmp_path_factory.mktemp("models") / "toy")
    data.make_toy(folder, n_train=64, n_heldout=16, n_sft=32)
    return folder


@pytest.fixture(scope="session")
def sharp(tmp_path_factory):
    """The toy with large weights (see sharpen). Read only."""
    import data
    folder = str(tmp_path_factory.mktemp("models") / "sharp")
    data.make_toy(folder, n_train=64, n_heldout=16, n_sft=32)
    return sharpen(folder)


@pytest.fixture(scope="session")
def odd(tmp_path_factory):
    """What the toy is not: a head of its own, fewer kv heads than heads, V larger than the tokenizer. Read only."""
    import data
    folder = str(tmp_path_factory.mktemp("models") / "odd")
    data.make_toy(folder, n_train=64, n_heldout=16, n_sft=32)
    return sharpen(folder, vocab_size=37, tie_word_embeddings=False, num_key_value_heads=2, hidden_size=48,
                   intermediate_size=80)


@pytest.fixture(scope="session")
def cpu():
    """A process group of one on the CPU, as policy.init_distributed makes it; its variables do not leak to children."""
    import torch

    import policy
    before = {k: os.environ.pop(k, None) for k in LAUNCHER}
    with pytest.MonkeyPatch.context() as patch:         # these tests are of fp32 on the CPU, wherever they run
        patch.setattr(torch.cuda, "is_available", lambda: False)
        rank, world, device = policy.init_distributed()
    for k, v in before.items():
        os.environ.pop(k, None)
        os.environ.update({} if v is None else {k: v})
    assert (rank, world, device.type) == (0, 1, "cpu")
    return device


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


def start_ranks(world, *args):
    """`world` processes of this file, see the end; what they print goes to a pipe."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen([sys.executable, __file__, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                         env=env | dict(zip(LAUNCHER, (str(rank), str(rank), str(world), "127.0.0.1", str(port)), strict=True)))
        for rank in range(world)
    ]  # fmt: skip


@pytest.fixture(scope="session")
def ranks(sharp, tmp_path_factory):
    """What 2 and 3 gloo ranks found, {world: {"policy": …, "rollout": …}}: rank_job of test_policy.py and test_rollout.py.
    One set of processes for both files, since importing is most of their time. A rank that hangs or fails is an error here."""
    import torch
    out = tmp_path_factory.mktemp("ranks")
    started = [p for world in (2, 3) for p in start_ranks(world, sharp, out)]
    try:
        logs = [p.communicate(timeout=180)[0] for p in started]
    except subprocess.TimeoutExpired:
        pytest.fail(f"a rank did not end, exit codes so far: {[p.poll() for p in started]}")
    finally:
        for p in started:
            p.kill()
    failed = [f"exit code {p.returncode}:\n{log[-3000:]}" for p, log in zip(started, logs, strict=True) if p.returncode]
    assert not failed, "\n".join(failed)
    return {w: {name: torch.load(out / f"{name}{w}.pt", weights_only=True) for name in ("policy", "rollout")} | {"out": out}
            for w in (2, 3)}  # fmt: skip


if __name__ == "__main__":                              # one rank
    import test_policy
    import test_rollout
    import torch.distributed as dist

    import policy
    where = policy.init_distributed()
    for file in (test_policy, test_rollout):
        file.rank_job(*where, *sys.argv[1:])
    dist.destroy_process_group()
