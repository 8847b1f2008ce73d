"""The toy: sums of four numbers, a task with real forks, and a 0.43 M parameter model, made from nothing in minutes."""

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys

import torch

from lib.ranks import everywhere

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FOLDER = "runs/toy-base"  # where `model: toy` keeps its base model
SYMBOLS = ["<|pad|>", "<|endoftext|>", *"0123456789+=;?Ġ\\boxed{}"]
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


def toy_regions(text):
    r"""Per character of a response: does it choose operands (20+27), is it a digit of a result (47; the 82 in \boxed)?
    Takes any text, as half-trained models write all sorts: "6+4" cut off is operands, "=" and letters are neither."""
    part, operands, results = "operands", [], []
    for c in text:
        part = {";": "operands", "=": "results", "{": "results", "\\": "", "}": ""}.get(c, part)
        operands.append(part == "operands" and c in "0123456789+")
        results.append(part == "results" and c in "0123456789")
    return {"operands": operands, "results": results}


def toy_config():
    """The shape of the toy's model, 0.43 M parameters."""
    from transformers import Qwen2Config
    return Qwen2Config(vocab_size=len(SYMBOLS), hidden_size=128, intermediate_size=384, num_hidden_layers=2,
                       num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128,
                       tie_word_embeddings=True, bos_token_id=None, pad_token_id=0, eos_token_id=1)  # fmt: skip


def make_toy(folder, n_train=4000, n_heldout=256, n_sft=48000, seed=0):
    """Into `folder`: an untrained model as an ordinary HF folder, and train.jsonl, heldout.jsonl, sft.jsonl.
    No held-out problem is in the others, in any order of its numbers (29 values make 35,960 multisets of 4). No file
    has a prompt twice. The same seed makes the same files and weights. Global random states stay as they are."""
    from transformers import Qwen2ForCausalLM, Qwen2Tokenizer
    assert n_heldout <= 10_000 and max(n_train, n_sft) <= 300_000, "too much to draw from 29^4 = 707,281 prompts"
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as e:
        raise ValueError(f"model: toy: cannot make the folder {folder}: {e.strerror}") from e
    rng, held = random.Random(seed), set()
    for name, count in (("heldout", n_heldout), ("train", n_train), ("sft", n_sft)):
        rows = {}
        while len(rows) < count:
            prompt, solution, answer = toy_problem(rng)
            numbers = tuple(sorted(map(int, prompt[:-1].split("+"))))
            if prompt in rows or numbers in held:
                continue
            if name == "heldout":
                held.add(numbers)
            rows[prompt] = {"prompt": prompt, "answer": answer} | ({"solution": solution} if name == "sft" else {})
        with open(f"{folder}/{name}.jsonl", "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows.values())
    # A BPE without merges is a character-level tokenizer. It must be Qwen2's own class (which writes " " as "Ġ"): for a
    # qwen2 model AutoTokenizer overrules the class named in the folder, and any other would come back blind to spaces.
    tokenizer = Qwen2Tokenizer(vocab={s: i for i, s in enumerate(SYMBOLS)}, merges=[], unk_token=None,
                               pad_token=SYMBOLS[0], eos_token=SYMBOLS[1], clean_up_tokenization_spaces=False)
    with torch.random.fork_rng(devices=[]):  # the init draws from the global CPU generator: restore it
        torch.default_generator.manual_seed(seed)  # (torch.manual_seed would reseed CUDA as well)
        model = Qwen2ForCausalLM(toy_config())
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)  # with a generation_config that holds eos and pad


def make_toy_base(run, folder):
    """The toy's base model, made once in `folder` and reused. A collective. ValueError: it could not be made."""
    missing = run.rank == 0 and not os.path.exists(f"{folder}/config.json")
    if missing:
        run.print(f"making the toy's base model in {folder} (once, a minute or two)")
    everywhere((lambda: train_toy(folder)) if missing else None, ValueError)


def train_toy(folder):
    """Random weights and data files by make_toy, trained by a run of configs/toy-base.yaml (kind: sft), in a process of
    its own, so that the result does not depend on the rank count. Under a temporary name, renamed when complete."""
    tmp = f"{folder}.tmp-{os.getpid()}"
    # one thread: the same floats whoever asks, python or torchrun (which sets it for its ranks)
    env = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER)} | {"OMP_NUM_THREADS": "1"}
    argv = [sys.executable, f"{HERE}/cure.py", "--config", f"{HERE}/configs/toy-base.yaml", f"model={tmp}",
            f"data={tmp}/sft.jsonl", f"eval_data={tmp}/heldout.jsonl", f"out_dir={tmp}/sft"]  # fmt: skip
    try:
        make_toy(tmp)
        if subprocess.run(argv, env=env).returncode == 0:
            latest = open(f"{tmp}/sft/ckpt/latest").read()
            shutil.copytree(f"{tmp}/sft/ckpt/{latest}/hf", tmp, dirs_exist_ok=True)
            with contextlib.suppress(OSError):  # another run was faster, or the folder holds something else
                os.rename(tmp, folder)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    if not os.path.exists(f"{folder}/config.json"):
        raise ValueError(f"model: the toy's base model could not be made in {folder}")
