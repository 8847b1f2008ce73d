"""The experiment of docs/exploration.md: every arm and seed, resumed where it stopped, then tables and a picture.

    python -m tools.matrix plain                           # all arms, all seeds, two runs at a time
    python -m tools.matrix hard --seeds 0 --arms cure,dapo # a part of it
    python -m tools.matrix plain --data docs/data/exploration.jsonl     # tables and picture of kept lines, no run

A run is over at its first evaluation at or beyond the last budget. A number at a budget lies on the line between the
two evaluations around it.
"""
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np

from lib.files import aligned
from tools.common import COLOURS, MARKERS, command_line, picture, read_run, read_samples

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BUDGETS = [400_000, 800_000, 1_200_000, 1_600_000]  # generated tokens
SEEDS = (0, 1, 2)
ARMS = {  # arm: config, and what differs
    "cure": ["countdown"],
    "random": ["countdown", "critical=random"],
    "none": ["countdown", "critical=none"],
    "surprisal": ["countdown", "method=surprisal"],
    "dapo": ["countdown-dapo", "stages.dapo.steps=1000"],
    "8020": ["countdown-8020", "stages.mask8020.steps=1000"],
}
REGIMES = {  # regime: arms, steps between evaluations, and what differs
    "plain": (list(ARMS), 20, []),
    "hard": (["cure", "random", "dapo"], 10, ["data=runs/countdown-base/hard.jsonl", "samples_per_step=0"]),
}
COMPARED = [("cure", "random"), ("cure", "surprisal"), ("cure", "dapo"), ("cure", "none"), ("8020", "dapo")]
COLUMNS = {"pass@1": "eval/pass@1", "pass@8": "eval/pass@8", "pass@64": "eval/pass@64", "illegal": "eval/illegal",
           "operands": "eval/entropy_operands", "distinct": "eval/distinct"}  # fmt: skip
T_95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 6: 2.45, 8: 2.31, 10: 2.23}  # two-sided, by degrees of freedom


# ------------------------------------------------------------------------------------------------------------- the runs
def run_folder(regime, arm, seed):
    """The folder of a run."""
    return f"runs/exploration/{regime}-{arm}-s{seed}"


def evaluations(regime, arm, seed):
    """The evaluations of a run as lines of docs/data, in order, [] where it has not begun."""
    folder = run_folder(regime, arm, seed)
    rows = read_run(folder)[1] if os.path.exists(f"{folder}/metrics.jsonl") else []
    who = {"regime": regime, "arm": arm, "seed": seed}
    return [who | {k: r[k] for k in ("step", "tokens/generated", *COLUMNS.values(), "eval/right")} for r in rows]


def command(regime, arm, seed, max_steps):
    """The command that takes a run to max_steps."""
    (config, *own), (_, every, more) = ARMS[arm], REGIMES[regime]
    if config == "countdown":  # two stages: half of the steps that a budget of 20,000 tokens a step allows
        own = [f"stages.stage1.steps={2 * every}", "stages.stage2.steps=1000", *own]
    return [sys.executable, f"{HERE}/cure.py", "--config", f"{HERE}/configs/{config}.yaml", f"seed={seed}",
            f"out_dir={run_folder(regime, arm, seed)}", f"max_steps={max_steps}", f"eval_every={every}",
            "eval_prompts=0", f"save_every={every}", *own, *more]  # fmt: skip


def finish(regime, arm, seed, run=subprocess.run):
    """Run an arm's seed until its budget is spent. RuntimeError: a run failed, or stands still."""
    before, folder, every = -1, run_folder(regime, arm, seed), REGIMES[regime][1]
    while not (done := evaluations(regime, arm, seed)) or done[-1]["tokens/generated"] < BUDGETS[-1]:
        step = done[-1]["step"] if done else 0
        if step == before:
            raise RuntimeError(f"{folder}: still at step {step}, see {folder}.log")
        spent = done[-1]["tokens/generated"] if step else BUDGETS[-1]
        before, goal = step, every * max(step // every + 1, -int(-step * BUDGETS[-1] // (spent * every)))
        argv = command(regime, arm, seed, goal)
        os.makedirs(folder, exist_ok=True)
        print(f"{folder}: to step {goal}", flush=True)
        with open(f"{folder}.log", "a") as log:  # two runs at once would mix their lines on a screen
            code = run(argv, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log).returncode
        if code:
            raise RuntimeError(f"{folder}: cure.py ended with {code}, see {folder}.log")


def ever_solved(regime, arm, seed):
    """How many training problems a run solved at least once within the last budget."""
    folder = run_folder(regime, arm, seed)
    steps = {row["step"] for row in read_run(folder)[0] if row["tokens/generated"] <= BUDGETS[-1]}
    rows = read_samples(f"{folder}/samples.jsonl", {"prompt_id", "correct"})
    return len({row["prompt_id"] for row in rows if row["correct"] and row["step"] in steps})


# ----------------------------------------------------------------------------------------------------------- the result
def at_budget(rows, budget, get):
    """get(row), a number or an array, at so many generated tokens of a run's evaluations. None beyond them."""
    for a, b in pairwise([*rows, *rows[-1:]]):
        low, high = a["tokens/generated"], b["tokens/generated"]
        if low <= budget <= high:
            w = (budget - low) / max(1, high - low)
            return (1 - w) * np.asarray(get(a), float) + w * np.asarray(get(b), float)
    return None


def over_seeds(runs, arm, budget, get):
    """at_budget of an arm's seeds that have got so far, as an array with seeds first."""
    found = [at_budget(rows, budget, get) for (a, _), rows in sorted(runs.items()) if a == arm]
    return np.array([x for x in found if x is not None])


def table(runs):
    """A line an arm and budget: mean and standard deviation over the seeds."""
    rows = [["arm", "tokens", "seeds", *COLUMNS]]
    for arm in dict.fromkeys(a for a, _ in runs):
        for budget in (0, *BUDGETS):
            def numbers(row):
                scale = [64 * len(row["eval/right"]) if k == "illegal" else 1 for k in COLUMNS]
                return [row[key] / s for key, s in zip(COLUMNS.values(), scale, strict=True)]
            if len(found := over_seeds(runs, arm, budget, numbers)):
                spread = found.std(0, ddof=1) if len(found) > 1 else [np.nan] * len(COLUMNS)
                cells = [f"{m:.3f} ± {s:.3f}" for m, s in zip(found.mean(0), spread, strict=True)]
                rows.append([arm, f"{budget // 1000}k", len(found), *cells])
    return aligned([[str(x) for x in row] for row in rows])


def differences(runs, budget):
    """A line a pair of arms: the difference in pass@1 and pass@64, its standard error over seeds and over problems
    (paired: both arms on the same problems, each problem's mean over seeds), and the smallest difference that is seen.
    """
    rows = [["at " + f"{budget // 1000}k", "measure", "difference", "se seeds", "se problems", "seen from", "seen"]]
    for a, b in COMPARED:
        for name, get in (("pass@1", lambda r: np.array(r["eval/right"]) / 64),
                          ("pass@64", lambda r: np.array(r["eval/right"]) > 0)):  # fmt: skip
            x, y = over_seeds(runs, a, budget, get), over_seeds(runs, b, budget, get)
            if min(len(x), len(y)) < 2:
                continue
            by_problem, free = x.mean(0) - y.mean(0), len(x) + len(y) - 2
            pooled = (x.mean(1).var(ddof=1) * (len(x) - 1) + y.mean(1).var(ddof=1) * (len(y) - 1)) / free
            se = np.sqrt(pooled * (1 / len(x) + 1 / len(y)))
            limit = T_95.get(free, 2.0) * se
            paired, found = by_problem.std(ddof=1) / len(by_problem) ** 0.5, by_problem.mean()
            rows.append([f"{a} - {b}", name, f"{found:+.3f}", *(f"{v:.3f}" for v in (se, paired, limit)),
                         "yes" if abs(found) > limit else "no"])
    return aligned(rows)


def draw(runs, path):
    """The picture: pass@1 against pass@64 along training, a line an arm from the base model on, mean over seeds."""
    with picture(Path(path), 4.2) as figure:
        ax = figure.subplots()
        for i, arm in enumerate(dict.fromkeys(a for a, _ in runs)):
            points = [over_seeds(runs, arm, b, lambda r: [r["eval/pass@1"], r["eval/pass@64"]]) for b in (0, *BUDGETS)]
            points = np.array([p.mean(0) for p in points if len(p)])
            ax.plot(*points.T, color=COLOURS[i], marker=MARKERS[i], label=arm)
            for p in over_seeds(runs, arm, BUDGETS[-1], lambda r: [r["eval/pass@1"], r["eval/pass@64"]]):
                ax.plot(*p, color=COLOURS[i], marker=MARKERS[i], alpha=0.35, linestyle="none")
        ax.set(xlabel="pass@1, held-out", ylabel="pass@64, held-out")
        ax.legend(title=f"{BUDGETS[0] // 1000}k tokens a mark")


def main(argv):
    """The part of the matrix that is asked for, then its tables and its picture."""
    parser = command_line("matrix", __doc__)
    parser.add_argument("regime", choices=REGIMES)
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--arms", default="")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--data", help="kept evaluation lines: run nothing")
    parser.add_argument("--picture", help="default runs/exploration/REGIME.png")
    args = parser.parse_args(argv)
    arms = args.arms.split(",") if args.arms else REGIMES[args.regime][0]
    if unknown := set(arms) - set(ARMS):
        parser.error(f"--arms: no arm {min(unknown)}; there are {', '.join(ARMS)}")
    todo = [(args.regime, arm, int(seed)) for seed in args.seeds.split(",") for arm in arms]  # a seed of all arms first
    if not args.data:
        with ThreadPoolExecutor(args.jobs) as jobs:
            list(jobs.map(lambda x: finish(*x), todo))
        args.data = f"runs/exploration/{args.regime}.jsonl"
        with open(args.data, "w") as file:
            for what in todo:
                solved = {"ever_solved": ever_solved(*what)} if args.regime == "hard" else {}
                file.writelines(json.dumps(row | solved) + "\n" for row in evaluations(*what))
    runs = {}
    for row in map(json.loads, open(args.data)):
        if row["regime"] == args.regime:
            runs.setdefault((row["arm"], row["seed"]), []).append(row)
    print(table(runs), differences(runs, BUDGETS[-1]), sep="\n\n")
    if args.regime == "hard":
        solved = {who: rows[-1]["ever_solved"] for who, rows in runs.items()}
        print("\nof 200 training problems, ever solved: " +
              ", ".join(f"{arm} (seed {seed}) {n}" for (arm, seed), n in solved.items()))
    draw(runs, args.picture or f"runs/exploration/{args.regime}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
