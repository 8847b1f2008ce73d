"""Every method for two steps: does it run, and what do its loss, entropy and clipping look like?

    python -m tools.methods                                    # all, on Countdown with small batches, a minute or two
    python -m tools.methods --only cispo,gspo key=value …      # some; any setting of cure.py
    python -m tools.methods --config configs/toy.yaml

Numbers are of the second step. What these methods do to a longer run: python -m tools.matrix methods.
"""
import multiprocessing
import os
import shutil
import sys

import cure
from lib.config import HERE
from lib.files import aligned
from tools.common import command_line, read_run, value, warn

# name: the config of its longer run, and the settings that make it what it is
DAPO = ["n1=16", "n2=0"]  # what makes the first stage of configs/countdown.yaml that of countdown-dapo
METHODS = {
    "dapo": ["countdown-dapo"],
    "cispo": ["countdown-dapo", "method=cispo"],
    "gspo": ["countdown-dapo", "method=gspo", "agg=sequence"],
    "holder_po": ["countdown-dapo", "method=holder_po", "agg=sequence", "stages.dapo.steps=20"],
    "dr_grpo": ["countdown-dapo", "method=dr_grpo", "agg=sequence"],
    "rloo": ["countdown-dapo", "method=rloo"],
    "maxrl": ["countdown-dapo", "method=maxrl"],
    "pass_k": ["countdown-dapo", "method=pass_k"],
    "entropy_bonus": ["countdown-dapo", "method=entropy_bonus"],
    "adaptive_entropy": ["countdown-dapo", "method=adaptive_entropy", "method_args={target: 0.9, delta: 0.001}"],
    "entropy_shaped": ["countdown-dapo", "method=entropy_shaped"],
    "eapo": ["countdown-dapo", "method=eapo"],
    "kl": ["countdown-dapo", "method=kl"],
    "clip_cov": ["countdown-dapo", "method=clip_cov"],
    "kl_cov": ["countdown-dapo", "method=kl_cov"],
    "opefo": ["countdown-dapo", "method=opefo", "prompts_per_minibatch=${prompts_per_step}"],
    "lp_reg": ["countdown-dapo", "method=lp_reg", "clip_low=1", "clip_high=9"],
    "htpo": ["countdown-dapo", "method=htpo"],
    "spo_mask": ["countdown-dapo", "method=spo_mask"],
    "cure": ["countdown"],
    "surprisal": ["countdown", "method=surprisal"],
    "wrong_parents": ["countdown", "method=wrong_parents"],
    "prefix_sampling": ["countdown", "method=prefix_sampling"],
    "tree_po": ["countdown", "method=tree_po"],
    "three at once": ["countdown", "method=[surprisal,tree_po,cispo]"],
}
SMALL = ["max_steps=2", "prompts_per_step=4", "prompts_per_minibatch=2", "prompts_per_round=16", "max_rounds=2",
         "eval_data=", "save_every=0", "resume=never", "samples_per_step=1"]  # fmt: skip
OWN = ("actor/ref_kl", "actor/cov", "actor/cov_share", "actor/balance", "actor/saved", "branch/fallback_share_sampled")
COLUMNS = {"loss": ("actor/pg_loss", "+.4f"), "entropy": ("actor/entropy", ".3f"),
           "clipped": ("actor/pg_clipfrac", ".4f"), "gradient": ("actor/grad_norm", ".3f"),
           "accuracy": ("train/accuracy", ".3f")}  # fmt: skip


def run(argv, folder):
    """The lines of metrics of one short run, in a process of its own -> [dict]. [] where it failed: see folder.log."""
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(os.path.dirname(folder), exist_ok=True)
    process = multiprocessing.get_context("fork").Process(target=quietly, args=(argv, f"{folder}.log"))
    process.start()
    process.join()
    return read_run(folder)[0] if not process.exitcode else []


def quietly(argv, log):
    """cure.main, what it prints in a file, without the pictures at its end."""
    from tools import analyze
    analyze.report = lambda out, pending: ""
    sys.stdout = sys.stderr = open(log, "w")
    sys.exit(cure.main(argv))


def main(argv):
    """Run the methods and print the table -> 1 if one failed."""
    parser = command_line("methods", __doc__)
    parser.add_argument("--config", default=f"{HERE}/configs/countdown.yaml")
    parser.add_argument("--only", default=",".join(METHODS))
    parser.add_argument("--out", default="runs/methods")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args(argv)
    if unknown := set(args.only.split(",")) - METHODS.keys():
        parser.error(f"--only: no method {min(unknown)}; there are {', '.join(METHODS)}")
    rows, failed = [["method", *COLUMNS, "of its own"]], 0
    for name in args.only.split(","):
        folder = f"{args.out}/{name.replace(' ', '_')}"
        config, *own = METHODS[name]
        own = (DAPO if config == "countdown-dapo" else []) + [o for o in own if not o.startswith("stages.")]
        lines = run(["--config", args.config, f"out_dir={folder}", *SMALL, *own, *args.overrides], folder)
        if not lines:
            warn(f"error: {name} failed, see {folder}.log")
            failed = 1
            continue
        last = lines[-1]
        own = {k.split("/")[1]: v for k, v in last.items() if k.startswith("method/") or v and k in OWN}
        cells = [(value(last, k), form) for k, form in COLUMNS.values()]  # nan where a run logs none
        rows.append([name, *(f"{v:{form}}" for v, form in cells), ", ".join(f"{k} {v:.3g}" for k, v in own.items())])
    print(aligned(rows))
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
