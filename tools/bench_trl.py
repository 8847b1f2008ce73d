"""One optimizer step, ours against TRL's GRPOTrainer: the same weights, the same 16 rollouts, CPU, fp32, one run.

    pip install trl==1.16.0                                             # beside requirements-cpu.txt, for this only
    OMP_NUM_THREADS=1 python -m tools.bench_trl --ours 1024 --trl 2     # SmolLM2-135M's shape

--ours is our micro_batch_tokens, --trl TRL's per_device_train_batch_size. Both live in processes of their own and take
turns, one untimed turn first. Peak memory is the process's.

The same in both: token-mean PPO clip 0.2 / 0.28, old log-probs given, no KL, temperature 1, entropy computed but not
trained, clip of the gradient norm at 1, fused AdamW, lr 1e-6, no weight decay, no activation checkpointing. Loss and
gradient norm of every step are compared. Our dual clip (10) is never active here: the ratios are near 1.
Ours is Policy.update. TRL's is its own train() from on_step_begin to on_step_end. Only the rollouts come from us,
padded by TRL's own pad(). So TRL shuffles and splits them itself, and every micro-batch is as long as the longest of
all. Its head works on all positions on CPU, and on response tokens only where Triton is (GPUs).
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import sys
import tempfile
import time
from importlib.metadata import version

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch: ours is bf16 on CUDA, and this is about fp32

import numpy as np
import torch
from tqdm import tqdm

from lib.config import load_config
from lib.files import aligned
from lib.memory import peak_memory
from lib.policy import Policy, packed_length
from lib.ranks import init_distributed
from lib.weights import load_tokenizer
from tools import bench

SHAPE, ROLLOUTS, MEAN, LONGEST = "135m", 16, 200, 1000  # tools.bench's own
LR, CLIP = 1e-6, 1.0


def clock():
    """Seconds, and CPU seconds of this process: those do not count what others do with the machine."""
    return np.array([time.perf_counter(), time.process_time()])


def ours(pipe, folder, rows, micro_batch_tokens, turns):
    """At each message a step, Policy.update on all rows -> seconds, CPU seconds, peak GiB, loss, gradient norm."""
    lengths = ["max_prompt_tokens=1", "max_response_tokens=1"]
    (_, cfg), *_ = load_config([*lengths, "weight_decay=0", f"micro_batch_tokens={micro_batch_tokens}"])
    rank, world, device = init_distributed()
    policy, token_mean, losses = Policy(cfg, folder, device), bench.loss_of(rows), []

    def loss_fn(*micro_batch):
        losses.append(token_mean(*micro_batch))
        return losses[-1]

    for _ in range(turns):
        pipe.recv()
        losses.clear()
        start = clock()
        norm, _ = policy.update(bench.micro_batches(rows, cfg, rank, world), loss_fn, 1.0, LR, CLIP)
        spent = clock() - start
        pipe.send([*spent.tolist(), peak_memory(), sum(x.item() for x in losses), norm])


def trl(pipe, folder, rows, size, turns):
    """At each message a step of GRPOTrainer.train() on all rows, `size` sequences a micro-batch -> as `ours`."""
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    from trl.trainer.utils import pad

    def padded(tensors, side="right"):
        return pad(tensors, padding_value=0, padding_side=side)

    prompts, responses = ([torch.tensor(x) for x in xs] for xs in zip(*((r.prompt_ids, r.response_ids) for r in rows)))
    inputs = {
        "prompt_ids": padded(prompts, "left"), "prompt_mask": padded([torch.ones_like(x) for x in prompts], "left"),
        "completion_ids": padded(responses), "completion_mask": padded([torch.ones_like(x) for x in responses]),
        "advantages": torch.tensor([r.advantage for r in rows]),
        "num_items_in_batch": torch.tensor(sum(map(len, responses))),
        "old_per_token_logps": padded([torch.from_numpy(r.old_logp) for r in rows]),
    }  # fmt: skip

    class Turns(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            pipe.recv()
            self.start = clock()

        def on_step_end(self, *args, **kwargs):
            self.spent = clock() - self.start

        def on_log(self, args, state, control, logs, **kwargs):
            if "grad_norm" in logs:
                pipe.send([*self.spent.tolist(), peak_memory(), logs["loss"], logs["grad_norm"]])

    args = GRPOConfig(
        output_dir=f"{folder}/trl", per_device_train_batch_size=size, gradient_accumulation_steps=len(rows) // size,
        num_generations=len(rows), max_steps=turns, loss_type="dapo", epsilon=0.2, epsilon_high=0.28, beta=0.0,
        num_iterations=1, learning_rate=LR, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=CLIP,
        bf16=False, gradient_checkpointing=False, model_init_kwargs={"dtype": "float32"}, use_cpu=True,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    unused, (tokenizer, _) = Dataset.from_dict({"prompt": ["unused"] * turns}), load_tokenizer(folder)
    trainer = GRPOTrainer(folder, lambda **_: [], args, unused, processing_class=tokenizer, callbacks=[Turns()])
    trainer._generate_and_score_completions = lambda _: inputs
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def measure(settings, config, rows, turns):
    """Let a process for each of `settings`, {worker: its micro-batch}, take turns -> {worker: array (turns, 5)}."""
    spawn, pipes, seen = multiprocessing.get_context("spawn"), {}, {name: [] for name in settings}
    with tempfile.TemporaryDirectory() as folder:
        bench.random_model(config, folder, torch.device("cpu"))
        for name, size in settings.items():
            pipes[name], theirs = spawn.Pipe()
            spawn.Process(target=globals()[name], args=(theirs, folder, rows, size, turns), daemon=True).start()
            theirs.close()  # a worker that dies is then an EOFError here
        for _ in tqdm(range(turns), desc="turns", disable=None):
            for name, pipe in pipes.items():
                pipe.send("step")
                seen[name].append(pipe.recv())
                tqdm.write(f"{name}: {seen[name][-1]}", file=sys.stderr)
    return {name: np.array(steps) for name, steps in seen.items()}


def main(argv):
    """Measure both, print a table and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ours", type=int, default=1024, help="micro_batch_tokens")
    parser.add_argument("--trl", type=int, default=2, choices=[1, 2, 4, 8, 16], help="sequences of a micro-batch")
    args = parser.parse_args(argv)
    if not importlib.util.find_spec("trl"):
        sys.exit("tools.bench_trl: trl is not installed: pip install trl==1.16.0")
    config = bench.shape_config(SHAPE)
    rows = bench.rollouts(ROLLOUTS, MEAN, LONGEST, config.vocab_size)
    tokens, lengths = sum(len(r.response_ids) for r in rows), [packed_length(r) for r in rows]
    seen = measure({"ours": args.ours, "trl": args.trl}, config, rows, args.repeats + 1)
    found = {}
    for name, steps in seen.items():
        seconds, cpu = np.median(steps[min(1, args.repeats) :, :2], axis=0)
        loss, norm = np.abs(steps[:, 3:] / seen["ours"][:, 3:] - 1).max(0)
        line = {"tokens_per_s": tokens / seconds, "seconds": seconds, "cpu_seconds": cpu, "peak_gib": steps[-1, 2],
                "loss_differs": loss, "norm_differs": norm}  # fmt: skip
        found[name] = {k: float(f"{v:.4g}") for k, v in line.items()}
    print(aligned([["", *line], *([name, *map(str, line.values())] for name, line in found.items())]))
    ratio = found["ours"]["tokens_per_s"] / found["trl"]["tokens_per_s"]
    print(f"ours / trl, tokens/s: {ratio:.3g}")
    meta = vars(args) | {
        "shape": SHAPE, "rollouts": ROLLOUTS, "response_tokens": tokens, "packed": sum(lengths),
        "padded": ROLLOUTS * max(lengths), "threads": torch.get_num_threads(),
        "versions": {p: version(p) for p in ("torch", "trl", "transformers")},
    }  # fmt: skip
    print(json.dumps(meta | {"variants": found}))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
