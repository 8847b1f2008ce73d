"""One optimizer step, ours against TRL's GRPOTrainer: the same random weights, the same 16 rollouts, CPU, fp32, one run.

    pip install trl==1.16.0                                    # beside requirements-cpu.txt, for this measurement only
    OMP_NUM_THREADS=2 python bench_trl.py                      # SmolLM2-135M's shape; --shape, --rollouts ... as in bench.py
    python bench_trl.py --ours 4096,2048 --trl 16,8,4,2        # our micro_batch_tokens, TRL's per_device_train_batch_size

Every variant lives in a process of its own; they take turns, one untimed turn first. Peak memory is the process's (ru_maxrss);
"above rest" is that less what it holds between steps: weights, Adam's moments, libraries. The ratio is to TRL's fastest variant.

The same in both: token-mean PPO clip 0.2 / 0.28, old log-probs given, no KL, temperature 1, entropy computed but not trained,
clip of the gradient norm at 1, fused AdamW, lr 1e-6, no weight decay, no activation checkpointing. The loss and the gradient
norm of every step are compared. Our dual clip (10) is never active here: the ratios are near 1.
Ours is Policy.update. TRL's is its own train(): training_step, backward, norm, step, zero_grad, from on_step_begin to
on_step_end, with only _generate_and_score_completions replaced: it returns these rollouts padded by TRL's own pad(). So TRL
shuffles and splits them itself, and every micro-batch is as long as the longest of all rollouts. Its head works on all
positions on CPU, and on response tokens only where Triton is (GPUs); a variant with a c (`--trl 4c`) has the latter on CPU.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from importlib.metadata import version

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch: ours is bf16 on CUDA, and this is about fp32

import numpy as np
import torch
from tqdm import tqdm

import cure
from lib.config import load_config
from lib.policy import Policy, packed_length
from lib.ranks import init_distributed
from tools import bench

LR, CLIP = 1e-6, 1.0


def clock():
    """Seconds, and CPU seconds of this process."""
    return np.array([time.perf_counter(), time.process_time()])  # the second does not count what others do with the machine


def report(loss, norm, seconds):
    """What a worker tells of one step; GiB at the highest, and now."""
    with open("/proc/self/statm") as f:
        rest = int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30
    return {
        "loss": loss,
        "norm": norm,
        "seconds": float(seconds[0]),
        "cpu": float(seconds[1]),
        "peak": cure.peak_memory(),
        "rest": rest,
    }


def ours(pipe, folder, rows, micro_batch_tokens, turns):
    """A step at each message: Policy.update on all rows."""
    settings = ["max_prompt_tokens=1", "max_response_tokens=1", "weight_decay=0", f"micro_batch_tokens={micro_batch_tokens}"]
    (_, cfg), *_ = load_config(settings)
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
        seconds = clock() - start
        pipe.send(report(sum(x.item() for x in losses), norm, seconds))


def trl(pipe, folder, rows, batch, turns):
    """A step at each message: GRPOTrainer.train() on all rows, `batch` sequences a micro-batch."""
    import trl.trainer.utils
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    if batch.endswith("c"):  # the kernel itself asks elsewhere
        trl.trainer.utils._use_triton = lambda device: True

    def padded(tensors, side="right"):
        return trl.trainer.utils.pad(tensors, padding_value=0, padding_side=side)

    prompts, responses = ([torch.tensor(x) for x in xs] for xs in zip(*((r.prompt_ids, r.response_ids) for r in rows)))
    inputs = {
        "prompt_ids": padded(prompts, "left"), "prompt_mask": padded([torch.ones_like(x) for x in prompts], "left"),
        "completion_ids": padded(responses), "completion_mask": padded([torch.ones_like(x) for x in responses]),
        "advantages": torch.tensor([r.advantage for r in rows]), "num_items_in_batch": torch.tensor(sum(map(len, responses))),
        "old_per_token_logps": padded([torch.from_numpy(r.old_logp) for r in rows]),
    }  # fmt: skip

    class Prepared(GRPOTrainer):
        def _generate_and_score_completions(self, _):
            return inputs

    class Turns(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            pipe.recv()
            self.start = clock()

        def on_step_end(self, *args, **kwargs):
            self.seconds = clock() - self.start

        def on_log(self, args, state, control, logs, **kwargs):
            if "grad_norm" in logs:
                pipe.send(report(logs["loss"], logs["grad_norm"], self.seconds))

    size = int(batch.rstrip("c"))
    args = GRPOConfig(
        output_dir=f"{folder}/trl", per_device_train_batch_size=size, gradient_accumulation_steps=len(rows) // size,
        num_generations=len(rows), max_steps=turns, loss_type="dapo", epsilon=0.2, epsilon_high=0.28, beta=0.0,
        num_iterations=1, learning_rate=LR, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=CLIP, bf16=False,
        gradient_checkpointing=False, model_init_kwargs={"dtype": "float32"}, use_cpu=True, logging_steps=1,
        save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    data = Dataset.from_dict({"prompt": ["unused"] * turns})
    tokenizer, _ = cure.load_tokenizer(folder)
    trainer = Prepared(folder, lambda **_: [], args, data, processing_class=tokenizer, callbacks=[Turns()])
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def main(argv):
    """Start a process for each variant, let them take turns, print a table and a JSON line."""
    parser = argparse.ArgumentParser(prog="bench_trl.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", default="135m")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rollouts", type=int, default=16)
    parser.add_argument("--mean", type=float, default=200, help="tokens of a response")
    parser.add_argument("--longest", type=int, default=1000)
    parser.add_argument("--ours", default="4096", help="micro_batch_tokens, with commas")
    parser.add_argument("--trl", default="16,8,4,2", help="sequences of a micro-batch, with commas")
    args = parser.parse_args(argv)
    if not importlib.util.find_spec("trl"):
        sys.exit("bench_trl.py: trl is not installed: pip install trl==1.16.0")
    if bad := [b for b in args.trl.split(",") if args.rollouts % int(b.rstrip("c"))]:
        parser.error(f"--trl: {bad[0]} does not divide --rollouts {args.rollouts}")
    config, spawn, seen = bench.shape_config(args.shape), multiprocessing.get_context("spawn"), {}
    rows = bench.rollouts(args.rollouts, args.mean, args.longest, config.vocab_size)
    tokens, turns = sum(len(r.response_ids) for r in rows), args.repeats + 1
    names = [f"ours {x}" for x in args.ours.split(",")] + [f"trl {x}" for x in args.trl.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        bench.random_model(config, folder)
        pipes = {}
        for name in names:
            pipes[name], theirs = spawn.Pipe()
            worker, setting = name.split()
            spawn.Process(target=globals()[worker], args=(theirs, folder, rows, setting, turns), daemon=True).start()
            theirs.close()  # a worker that dies is then an EOFError here
        for _ in tqdm(range(turns), desc="turns", disable=None):
            for name, pipe in pipes.items():
                pipe.send("step")
                seen.setdefault(name, []).append(pipe.recv())
                tqdm.write(f"{name}: {seen[name][-1]}", file=sys.stderr)
    first, found = seen[names[0]], {}
    for name, steps in seen.items():
        seconds, cpu = (statistics.median(s[k] for s in steps[1:] or steps) for k in ("seconds", "cpu"))
        peak, rest = steps[-1]["peak"], statistics.median(s["rest"] for s in steps)
        found[name] = {"tokens_per_s": tokens / seconds, "seconds": seconds, "cpu_seconds": cpu, "peak_gib": peak,
                       "above_rest_gib": peak - rest}  # fmt: skip
        for k in ("loss", "norm"):
            found[name][f"{k}_differs"] = max(abs(s[k] / o[k] - 1) for s, o in zip(steps, first, strict=True))
    fastest = max((n for n in names if n[:3] == "trl" and n[-1] != "c"), key=lambda n: found[n]["tokens_per_s"])
    for name, f in found.items():
        f["speed_to_fastest_trl"] = f["tokens_per_s"] / found[fastest]["tokens_per_s"]
        found[name] = {k: float(f"{v:.4g}") for k, v in f.items()}
    print(" " * 12, *found[fastest])
    for name, f in found.items():
        print(f"{name:12s}", *(f"{v:{len(k)}g}" for k, v in f.items()))
    lengths = [packed_length(r) for r in rows]
    meta = {"shape": args.shape, "rollouts": args.rollouts, "response_tokens": tokens, "packed": sum(lengths),
            "padded": len(rows) * max(lengths), "repeats": args.repeats, "device": "cpu", "threads": torch.get_num_threads(),
            "loss": first[0]["loss"], "norm": first[0]["norm"], "fastest_trl": fastest}  # fmt: skip
    print(json.dumps(meta | {p: version(p) for p in ("torch", "trl", "transformers")} | {"variants": found}))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
