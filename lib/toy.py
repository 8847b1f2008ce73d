"""Tasks that are made from nothing in minutes, each with data and a small base model.

The toy is sums of four numbers, with forks that all lead to the goal, and a model of 0.43 M parameters. Countdown
(lib/countdown.py) has forks that mostly do not, and a model of the same size.
"""

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
from functools import partial
from typing import NamedTuple

import torch

from lib.countdown import countdown_problem, gold_text, random_walk, read_gold, walk_ends
from lib.ranks import everywhere

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FOLDER = "runs/toy-base"  # where `model: toy` keeps its base model
SYMBOLS = ["<|pad|>", "<|endoftext|>", *"0123456789+=;?Ġ\\boxed{}"]
COUNTDOWN_SYMBOLS = ["<|pad|>", "<|endoftext|>", *"0123456789+-*=;:>Ġ"]
HINTS = 0.3
INIT = 0.05  # Countdown's: 800 steps at the usual 0.02 left 0.303 nats a token, at 0.05 0.291, at 0.1 0.323
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK",
            "ROLE_RANK", "TORCHELASTIC")  # how torchrun's variables begin  # fmt: skip


def toy_problem(rng, n=4):
    r"""-> (prompt, solution, answer): "20+27+6+29?", " 20+27=47;6+47=53;53+29=82;\boxed{82}", "82".
    Which two of the remaining numbers come next is a real fork, uniform over ordered pairs. Their sum, which joins the
    rest, is none. In small what CURE and 80/20 see in a chain of thought: few tokens that decide, many that follow."""
    pool = [rng.randint(2, 30) for _ in range(n)]
    prompt, steps = "+".join(map(str, pool)) + "?", ""
    while len(pool) > 1:
        i, j = rng.sample(range(len(pool)), 2)
        a, b = pool[i], pool[j]
        pool = [x for at, x in enumerate(pool) if at not in (i, j)] + [a + b]
        steps += f"{a}+{b}={a + b};"
    return prompt, f" {steps}\\boxed{{{pool[0]}}}", str(pool[0])


def toy_regions(text, choice="0123456789+"):
    r"""Per character of a response: does it choose operands (20+27), is it a digit of a result (47; the 82 in \boxed)?
    Takes any text, as half-trained models write all sorts: "6+4" cut off is operands, "=" and letters are neither.
    choice: the characters that choose."""
    part, operands, results = "operands", [], []
    for c in text:
        part = {";": "operands", "=": "results", "{": "results", "\\": "", "}": ""}.get(c, part)
        operands.append(part == "operands" and c in choice)
        results.append(part == "results" and c in "0123456789")
    return {"operands": operands, "results": results}


def toy_config(symbols=SYMBOLS, init=0.02):
    """The shape of the models, 0.43 M parameters. init: standard deviation of the random weights."""
    from transformers import Qwen2Config
    return Qwen2Config(vocab_size=len(symbols), hidden_size=128, intermediate_size=384, num_hidden_layers=2,
                       num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128,
                       initializer_range=init, tie_word_embeddings=True, bos_token_id=None, pad_token_id=0,
                       eos_token_id=1)  # fmt: skip


def write_set(path, count, draw, held, hold=False, worked=False, several=False):
    """Write `count` problems to a .jsonl, no prompt twice -> its rows. draw() -> (prompt, solution, answer, key).

    held: the keys that may not come. hold: this set's keys join them, so that no later set has one of its problems.
    worked: with solutions. several: a prompt may come with several of them."""
    rows = {}
    while len(rows) < count:
        prompt, solution, answer, key = draw()
        name = prompt + solution if several else prompt
        if name in rows or key in held:
            continue
        if hold:
            held.add(key)
        rows[name] = {"prompt": prompt, "answer": answer} | ({"solution": solution} if worked else {})
    write_rows(path, rows.values())
    return list(rows.values())


def write_rows(path, rows):
    """Write rows, dicts, to a .jsonl."""
    with open(path, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def make_folder(folder, name):
    """Make the folder of a base model. ValueError: it cannot be made."""
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as e:
        raise ValueError(f"model: {name}: cannot make the folder {folder}: {e.strerror}") from e


def write_model(folder, symbols, config, seed):
    """Into `folder`: an untrained model and its tokenizer, as an ordinary HF folder."""
    from transformers import Qwen2ForCausalLM, Qwen2Tokenizer
    # A BPE without merges is a character-level tokenizer. It must be Qwen2's own class (which writes " " as "Ġ"): for a
    # qwen2 model AutoTokenizer overrules the class named in the folder, and any other would come back blind to spaces.
    tokenizer = Qwen2Tokenizer(vocab={s: i for i, s in enumerate(symbols)}, merges=[], unk_token=None,
                               pad_token=symbols[0], eos_token=symbols[1], clean_up_tokenization_spaces=False)
    with torch.random.fork_rng(devices=[]):  # the init draws from the global CPU generator: restore it
        torch.default_generator.manual_seed(seed)  # (torch.manual_seed would reseed CUDA as well)
        model = Qwen2ForCausalLM(config)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)  # with a generation_config that holds eos and pad


def make_toy(folder, n_train=4000, n_heldout=256, n_sft=48000, seed=0):
    """Into `folder`: an untrained model as an ordinary HF folder, and train.jsonl, heldout.jsonl, sft.jsonl.
    No held-out problem is in the others, in any order of its numbers (29 values make 35,960 multisets of 4). No file
    has a prompt twice. The same seed makes the same files and weights. Global random states stay as they are."""
    assert n_heldout <= 10_000 and max(n_train, n_sft) <= 300_000, "too much to draw from 29^4 = 707,281 prompts"
    make_folder(folder, "toy")
    rng, held = random.Random(seed), set()

    def draw():
        prompt, solution, answer = toy_problem(rng)
        return prompt, solution, answer, tuple(sorted(map(int, prompt[:-1].split("+"))))

    write_set(f"{folder}/heldout.jsonl", n_heldout, draw, held, hold=True)
    write_set(f"{folder}/train.jsonl", n_train, draw, held)
    write_set(f"{folder}/sft.jsonl", n_sft, draw, held, worked=True)
    write_model(folder, SYMBOLS, toy_config(), seed)


def make_countdown(folder, n_train=2000, n_heldout=256, n_sft=48000, seed=0, n_hard=200):
    """Into `folder`: an untrained model, and heldout, choose, train, hard and sft.jsonl. A problem is a multiset of
    numbers and a target. No problem is asked for in two files, but for hard.jsonl: the n_hard rows of train.jsonl that
    a uniform walk solves least often. choose.jsonl, of n_heldout problems, is there to choose settings on. Otherwise as
    make_toy."""
    assert 2 * n_heldout + n_train <= 4000 and n_sft <= 50_000, "too much to draw: there are 8,282 problems"
    make_folder(folder, "countdown")
    rng, held = random.Random(seed), set()

    def row(numbers, trace, target):
        gold = gold_text(sorted(numbers, reverse=True), target)  # one order: fewer prompts to learn the rules on
        return f"{gold}:", trace, gold, gold

    def draw():
        return row(*countdown_problem(rng))

    def walk_rate(row):
        numbers, target = read_gold(row["answer"])
        return walk_ends(tuple(numbers)).get(target, 0.0)

    def draw_worked():
        """A legal walk. A share of HINTS end at the target, the others wherever they end, which may be a held problem's
        target. Trained on right walks alone, a model wrote the target behind the last operands whatever they were:
        after 750 steps 92 % of its traces were illegal."""
        numbers, trace, end = countdown_problem(rng)
        return row(numbers, trace, end if rng.random() < HINTS else random_walk(rng, numbers)[1])

    write_set(f"{folder}/heldout.jsonl", n_heldout, draw, held, hold=True)
    write_set(f"{folder}/choose.jsonl", n_heldout, draw, held, hold=True)
    train = write_set(f"{folder}/train.jsonl", n_train, draw, held, hold=True)
    write_rows(f"{folder}/hard.jsonl", sorted(train, key=walk_rate)[:n_hard])
    write_set(f"{folder}/sft.jsonl", n_sft, draw_worked, held, worked=True, several=True)
    write_model(folder, COUNTDOWN_SYMBOLS, toy_config(COUNTDOWN_SYMBOLS, INIT), seed)


def make_toy_base(run, folder, name="toy"):
    """The base model of a bed, made once in `folder` and reused. A collective. ValueError: it could not be made."""
    missing = run.rank == 0 and not os.path.exists(f"{folder}/config.json")
    if missing:
        run.print(f"making the {name}'s base model in {folder} (once, {BEDS[name].takes})")
    everywhere((lambda: train_toy(folder, name)) if missing else None, ValueError)


def train_toy(folder, name="toy"):
    """Random weights and data files by the bed's `make`, trained by a run of configs/NAME-base.yaml (kind: sft), in a
    process of its own, so that the result does not depend on the rank count. Under a temporary name, renamed when
    complete."""
    tmp, bed = f"{folder}.tmp-{os.getpid()}", BEDS[name]
    # one thread: the same floats whoever asks, python or torchrun (which sets it for its ranks)
    env = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER)} | {"OMP_NUM_THREADS": "1"}
    argv = [sys.executable, f"{HERE}/cure.py", "--config", f"{HERE}/configs/{name}-base.yaml", f"model={tmp}",
            f"data={tmp}/sft.jsonl", f"eval_data={tmp}/{bed.judge}.jsonl", f"out_dir={tmp}/sft"]  # fmt: skip
    try:
        bed.make(tmp)
        if subprocess.run(argv, env=env).returncode == 0:
            latest = open(f"{tmp}/sft/ckpt/latest").read()
            shutil.copytree(f"{tmp}/sft/ckpt/{latest}/hf", tmp, dirs_exist_ok=True)
            with contextlib.suppress(OSError):  # another run was faster, or the folder holds something else
                os.rename(tmp, folder)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    if not os.path.exists(f"{folder}/config.json"):
        raise ValueError(f"model: the {name}'s base model could not be made in {folder}")


# ------------------------------------------------------------------------------------------------------------- the beds
class Bed(NamedTuple):
    """What `model`, `data` and `eval_data` mean by one name."""

    folder: str  # of the base model and the data
    make: object  # writes data and an untrained model into a folder
    config: object  # () -> the model's HF config
    regions: object  # text -> {name: per-character bools}, for eval/entropy_*
    judge: str  # the set that the base model's training is watched on
    takes: str  # how long that is


BEDS = {
    "toy": Bed(FOLDER, make_toy, toy_config, toy_regions, "heldout", "a minute or two"),
    "countdown": Bed("runs/countdown-base", make_countdown, partial(toy_config, COUNTDOWN_SYMBOLS, INIT),
                     partial(toy_regions, choice="0123456789+-*"), "choose", "about four minutes"),
}  # fmt: skip


def bed_of(source):
    """The bed whose folder a path lies in, or None."""
    return next((bed for bed in BEDS.values() if source.startswith(bed.folder)), None)
