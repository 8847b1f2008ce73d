"""The experiment of docs/exploration.md: every arm and seed, resumed where it stopped, and the table at equal tokens.

    python -m tools.matrix plain                          # all arms, all seeds, then the table
    python -m tools.matrix few --seeds 0 --arms cure,dapo # a part of it, then the table; --table: only that

A run is over at its first evaluation at or beyond the last budget. A number at a budget lies on the line between the
two evaluations around it.
"""
import os
import subprocess
import sys

import numpy as np

from lib.files import aligned
from tools.common import command_line, read_run, read_samples

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BUDGETS = [400_000, 800_000, 1_600_000, 2_400_000]  # generated tokens
SEEDS, EVERY = (0, 1, 2), 20  # EVERY: steps between evaluations
TWO_STAGES = ["stages.stage2.steps=1000"]
ARMS = {  # arm: config, and what differs
    "cure": ["countdown", *TWO_STAGES],
    "random": ["countdown", *TWO_STAGES, "critical=random"],
    "none": ["countdown", *TWO_STAGES, "critical=none"],
    "surprisal": ["countdown", *TWO_STAGES, "method=surprisal"],
    "dapo": ["countdown-dapo", "stages.dapo.steps=1000"],
    "8020": ["countdown-8020", "stages.mask8020.steps=1000"],
}
REGIMES = {  # regime: arms, and what differs
    "plain": (list(ARMS), []),
    "few": (["cure", "random", "dapo"], ["data=runs/countdown-base/few.jsonl", "samples_per_step=0"]),
}
COLUMNS = {"pass@1": "eval/pass@1", "pass@8": "eval/pass@8", "pass@64": "eval/pass@64", "illegal": "eval/illegal",
           "entropy at operands": "eval/entropy_operands", "distinct": "eval/distinct"}  # fmt: skip
SAMPLES = 256 * 64  # of one evaluation; eval/illegal is a count


def run_folder(regime, arm, seed):
    """The folder of a run."""
    return f"runs/exploration/{regime}-{arm}-s{seed}"


def evaluations(folder):
    """The evaluations of a run, in order, [] where it has not begun."""
    return read_run(folder)[1] if os.path.exists(f"{folder}/metrics.jsonl") else []


def command(regime, arm, seed, max_steps):
    """The command that takes a run to max_steps."""
    config, *own = ARMS[arm]
    return [sys.executable, f"{HERE}/cure.py", "--config", f"{HERE}/configs/{config}.yaml", f"seed={seed}",
            f"out_dir={run_folder(regime, arm, seed)}", f"max_steps={max_steps}", f"eval_every={EVERY}",
            "eval_prompts=0", "save_every=20", *own, *REGIMES[regime][1]]  # fmt: skip


def finish(regime, arm, seed, run=subprocess.run):
    """Run an arm's seed until its budget is spent. RuntimeError: a run failed, or stands still."""
    before = -1
    while not (done := evaluations(run_folder(regime, arm, seed))) or done[-1]["tokens/generated"] < BUDGETS[-1]:
        step = done[-1]["step"] if done else 0
        if step == before:
            raise RuntimeError(f"{run_folder(regime, arm, seed)}: still at step {step}, interrupted?")
        before, argv = step, command(regime, arm, seed, (step // EVERY + 1) * EVERY)
        print(" ".join(argv[1:]), flush=True)
        if code := run(argv, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode:
            raise RuntimeError(f"{run_folder(regime, arm, seed)}: cure.py ended with {code}")


def at_budget(done, key, budget):
    """A number of the evaluations `done` at so many generated tokens, nan beyond them."""
    tokens, values = [row["tokens/generated"] for row in done], [row[key] for row in done]
    return float(np.interp(budget, tokens, values, right=np.nan)) if done else float("nan")


def solved(folder):
    """How many training problems a run ever solved, of those whose groups it trained on."""
    rows = read_samples(f"{folder}/samples.jsonl", {"prompt_id", "correct"})
    return len({row["prompt_id"] for row in rows if row["correct"]})


def table(regime, seeds=SEEDS):
    """A line an arm and budget: mean and standard deviation over the seeds that have got so far."""
    rows = [["arm", "tokens", "seeds", *COLUMNS, *(["ever solved"] if regime == "few" else [])]]
    for arm in REGIMES[regime][0]:
        runs = {s: evaluations(run_folder(regime, arm, s)) for s in seeds}
        for budget in (0, *BUDGETS):
            cells = {name: [at_budget(done, key, budget) for done in runs.values()] for name, key in COLUMNS.items()}
            cells["illegal"] = [x / SAMPLES for x in cells["illegal"]]
            if not (there := ~np.isnan(cells["pass@1"])).any():
                continue
            values = [np.array(v)[there] for v in cells.values()]
            spread = [v.std(ddof=1) if len(v) > 1 else np.nan for v in values]
            numbers = [f"{v.mean():.3f} ± {sd:.3f}" for v, sd in zip(values, spread, strict=True)]
            rows.append([arm, f"{budget / 1000:.0f}k", str(there.sum()), *numbers])
        if regime == "few" and len(rows) > 1 and rows[-1][0] == arm:
            rows[-1].append(" ".join(str(solved(run_folder(regime, arm, s))) for s, done in runs.items() if done))
    return aligned([row + [""] * (len(rows[0]) - len(row)) for row in rows])


def main(argv):
    """The part of the matrix that is asked for, then the table."""
    parser = command_line("matrix", __doc__)
    parser.add_argument("regime", choices=REGIMES)
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--arms", default="")
    parser.add_argument("--table", action="store_true", help="run nothing")
    args = parser.parse_args(argv)
    arms = args.arms.split(",") if args.arms else REGIMES[args.regime][0]
    if unknown := set(arms) - set(ARMS):
        parser.error(f"--arms: no arm {min(unknown)}; there are {', '.join(ARMS)}")
    for seed in () if args.table else map(int, args.seeds.split(",")):  # a seed of all arms first
        for arm in arms:
            finish(args.regime, arm, seed)
    print(table(args.regime))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
