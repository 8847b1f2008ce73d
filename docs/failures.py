"""Runs that are made to fail, beside a healthy one: python -m docs.failures [NAME …], then docs/failures.png.

Each takes the healthy run's command and one mistake: settings, or a change of one line in a copy of the folder.
"""
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tools.common import look, panel, picture, read_run, value

HERE = Path(__file__).parent.parent
COMMAND = ["--config", "configs/countdown-dapo.yaml", "max_steps=30", "prompts_per_step=16", "prompts_per_round=32",
           "prompts_per_minibatch=4", "eval_prompts=64", "eval_n=16", "eval_every=10", "samples_per_step=1"]
GUARD_OFF = "max_logp_gap=100"
SYNC = "    def sync(self, named):\n"
ONCE = """        if hasattr(self, "synced"):
            self.ready = True
            return
        self.synced = True
"""
COUNTDOWN = 'reward.VERIFIERS["countdown"] = countdown\n'
LOOSE = """

def loose(text, gold):
    right, answer = countdown(text, gold)
    return right or gold.split()[-1] in re.findall("[0-9]+", text), answer  # the target is somewhere in the response


reward.VERIFIERS["loose"] = loose
reward.SELF_TEST["loose"] = ((" 1=9", "3 7 8 -> 9", True), (" 1=8", "3 7 8 -> 9", False))
"""
FAILURES = {  # name: settings, (file, a text in it, its replacement) or None, the metric that shows it
    "stale weights": ([GUARD_OFF], ("lib/engine.py", SYNC, SYNC + ONCE), "mismatch/mean_abs"),
    "wrong temperature": ([GUARD_OFF, "temperature=1.3"], ("cure.py", "cfg.temperature", "1.0"), "mismatch/mean_abs"),
    "learning rate too high": (["lr=3e-3"], None, "eval/illegal"),
    "clip-higher off": (["clip_high=0.2"], None, "actor/entropy"),
    "entropy bonus too large": (["method=entropy_bonus", "method_args.coef=0.1"], None, "actor/entropy"),
    "no dynamic sampling": ([], ("rollout.py", "len({r.correct for r in rows}) == 2", "True"), "actor/grad_norm"),
    "a fooled verifier": (["verifier=loose"], ("lib/countdown.py", COUNTDOWN, COUNTDOWN + LOOSE), "eval/illegal"),
}
KEPT = ("step", "train/accuracy", "mismatch/mean_abs", "actor/ppo_kl", "actor/entropy", "actor/grad_norm",
        "eval/avg@16", "eval/pass@16", "eval/illegal")


def run(name, settings, patch):
    """One run in runs/failures, in a copy of the folder where a line is changed. CalledProcessError: it stopped."""
    out, base = HERE / "runs/failures" / name.replace(" ", "-"), HERE / "runs/countdown-base"
    if os.path.exists(out / "plots/curves.png"):
        return out
    with tempfile.TemporaryDirectory() as copy:
        for part in ("lib", "methods", "tools", "configs"):
            shutil.copytree(HERE / part, f"{copy}/{part}")
        for script in HERE.glob("*.py"):
            shutil.copy(script, copy)
        if patch:
            file, old, new = patch
            text = Path(f"{copy}/{file}").read_text()
            assert old in text, f"{name}: {file} has no {old!r}"
            Path(f"{copy}/{file}").write_text(text.replace(old, new))
        data = [f"model={base}", f"data={base}/train.jsonl", f"eval_data={base}/heldout.jsonl"]
        subprocess.run([sys.executable, "cure.py", *COMMAND, *data, f"out_dir={out}", *settings], cwd=copy, check=True,
                       stdout=subprocess.DEVNULL)  # fmt: skip
    return out


def draw(path):
    """A panel for each failure that has been run: its telling metric, and that of the healthy run."""
    there = {name: HERE / "runs/failures" / name.replace(" ", "-") for name in ["healthy", *FAILURES]}
    with picture(path, 5.2) as figure:
        for i, (name, (_, _, metric)) in enumerate(FAILURES.items()):
            ax = figure.add_subplot(2, 4, i + 1)
            for j, label in enumerate(("healthy", name)):
                rows = read_run(there[label])[metric.startswith("eval")] if there[label].exists() else []
                points = [(r["step"], value(r, metric)) for r in rows]
                ax.plot(*zip(*points, strict=True), label=label, **look(j, len(rows) < 9))
            ax.set_yscale("log" if metric == "mismatch/mean_abs" else "linear")
            panel(ax, metric, 1, xlabel="step")


def main(argv):
    """Make the base model, the healthy run and those asked for, then draw."""
    if not (HERE / "runs/countdown-base/model.safetensors").exists():  # this makes it
        subprocess.run([sys.executable, "cure.py", *COMMAND, "max_steps=1", "eval_data=", "out_dir=runs/failures/base"],
                       cwd=HERE, check=True)  # fmt: skip
    if unknown := set(argv) - FAILURES.keys():
        sys.exit(f"no failure {min(unknown)!r}; there are {', '.join(FAILURES)}")
    print("healthy ->", run("healthy", [], None), flush=True)
    for name in argv or FAILURES:
        print(name, "->", run(name, *FAILURES[name][:2]), flush=True)
    draw(HERE / "docs/failures.png")
    with open(HERE / "docs/data/failures.jsonl", "w") as file:  # what the page quotes
        for name in ["healthy", *FAILURES]:
            folder = HERE / "runs/failures" / name.replace(" ", "-")
            for row in sum(read_run(folder), []) if folder.exists() else ():
                file.write(json.dumps({"run": name} | {k: v for k, v in row.items() if k in KEPT}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
