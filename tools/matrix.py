"""The experiments of docs/exploration.md, methods.md and scale.md: every arm, resumed where it stopped, tables.

    python -m tools.matrix plain                             # all arms, all seeds, two runs at a time
    python -m tools.matrix methods                           # docs/methods.md: every method, one seed, the first budget
    python -m tools.matrix lora                              # docs/scale.md: adapters against the whole model
    python -m tools.matrix hard --seeds 0 --arms cure,dapo   # a part of it; --jobs 0: run nothing
    python -m tools.matrix plain --data docs/data/exploration.jsonl     # tables and picture of kept lines

A run ends at an evaluation beyond the last budget. A number at a budget lies on the line between the two evaluations
around it.
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
from tools.common import COLOURS, MARKERS, command_line, picture, read_run, read_samples, warn
from tools.methods import METHODS

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BUDGETS = [400_000, 800_000, 1_200_000, 1_600_000]  # generated tokens
SEEDS, EVAL_N = (0, 1, 2), 64  # EVAL_N: samples a held-out problem, in the configs
ARMS = {  # arm: config, and what differs
    "cure": ["countdown"],
    "random": ["countdown", "critical=random"],
    "none": ["countdown", "critical=none"],
    "surprisal": ["countdown", "method=surprisal"],
    "dapo": ["countdown-dapo", "stages.dapo.steps=1000"],
    "8020": ["countdown-8020", "stages.mask8020.steps=1000"],
    "random20": ["countdown-8020", "stages.mask8020.steps=1000", "entropy_mask_side=random"],  # its null
}
LORA = {"lora": ["countdown-dapo", "stages.dapo.steps=1000", "lora_rank=16", "lora_alpha=32", "lr=1e-3"]}
LONG = {"countdown-dapo": ["stages.dapo.steps=1000"], "countdown": []}
ALL = {name: [config, *LONG[config], *own] for name, (config, *own) in METHODS.items()} | ARMS | LORA
REGIMES = {  # regime: arms, steps between evaluations, steps of stage 1, budgets, seeds, and what differs
    "plain": (list(ARMS), 20, 40, BUDGETS, SEEDS, []),
    "hard": (["cure", "random", "dapo"], 5, 15, BUDGETS, SEEDS,
             ["data=runs/countdown-base/hard.jsonl", "prompts_per_step=64", "samples_per_step=0"]),
    "methods": (list(METHODS), 20, 40, BUDGETS[:1], SEEDS[:1], []),
    "lora": (["dapo", "lora"], 20, 0, BUDGETS, SEEDS, []),
}  # fmt: skip
COMPARED = [("cure", "random"), ("cure", "surprisal"), ("cure", "dapo"), ("cure", "none"), ("8020", "dapo"),
            ("8020", "random20"), ("lora", "dapo")]
COLUMNS = {"step": ("step", ".0f"), "pass@1": ("eval/pass@1", ".3f"), "pass@8": ("eval/pass@8", ".3f"),
           "pass@64": ("eval/pass@64", ".3f"), "illegal": ("illegal", ".3f"),
           "operands": ("eval/entropy_operands", ".3f"), "distinct": ("eval/distinct", ".3f"),
           "ever solved": ("ever_solved", ".0f")}  # fmt: skip
T_95 = {2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45}  # Student's t, two-sided 5 %, by degrees of freedom


# ------------------------------------------------------------------------------------------------------------- the runs
def run_folder(regime, arm, seed):
    """The folder of a run."""
    return f"runs/exploration/{regime}-{arm}-s{seed}"


def evaluations(regime, arm, seed):
    """The evaluations of a run, in order, as lines to keep. [] where it has not begun.

    illegal: share of samples. ever_solved: training problems with a right rollout in a group trained on until then,
    where samples.jsonl has all groups."""
    folder = run_folder(regime, arm, seed)
    rows = read_run(folder)[1] if os.path.exists(f"{folder}/metrics.jsonl") else []
    first, whole = {}, "samples_per_step=0" in REGIMES[regime][-1]
    for row in read_samples(f"{folder}/samples.jsonl", {"prompt_id", "correct"}) if rows and whole else ():
        if row["correct"]:
            first[row["prompt_id"]] = min(row["step"], first.get(row["prompt_id"], row["step"]))
    kept = {key for key, _ in COLUMNS.values()} | {"tokens/generated", "eval/right"}
    return [{"regime": regime, "arm": arm, "seed": seed} | {k: v for k, v in row.items() if k in kept}
            | {"illegal": row["eval/illegal"] / EVAL_N / len(row["eval/right"])}
            | ({"ever_solved": sum(s <= row["step"] for s in first.values())} if whole else {})
            for row in rows]  # fmt: skip


def command(regime, arm, seed, max_steps):
    """The command that takes a run to max_steps."""
    (config, *own), (_, every, first, _, _, more) = ALL[arm], REGIMES[regime]
    stages = [f"stages.stage1.steps={first}", "stages.stage2.steps=1000"] if config == "countdown" else []
    return [sys.executable, f"{HERE}/cure.py", "--config", f"{HERE}/configs/{config}.yaml", f"seed={seed}",
            f"out_dir={run_folder(regime, arm, seed)}", f"max_steps={max_steps}", f"eval_every={every}",
            "eval_prompts=0", f"save_every={every}", *stages, *own, *more]  # fmt: skip


def finish(regime, arm, seed, run=subprocess.run):
    """Run an arm's seed until its budget is spent. RuntimeError: it failed, or was interrupted."""
    folder, every, last = run_folder(regime, arm, seed), REGIMES[regime][1], REGIMES[regime][3][-1]
    while not (done := evaluations(regime, arm, seed)) or done[-1]["tokens/generated"] < last:
        goal = every  # later: the last evaluation within the budget, at so many tokens a step, then one more
        if done and (step := done[-1]["step"]):
            goal = every * max(step // every + 1, int(step * last / done[-1]["tokens/generated"] / every))
        print(f"{folder}: to step {goal}", flush=True)
        os.makedirs(folder, exist_ok=True)
        with open(f"{folder}.log", "a") as log:  # two runs at once would mix their lines on a screen
            code = run(command(regime, arm, seed, goal), env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log,
                       stderr=log).returncode  # fmt: skip
        done = evaluations(regime, arm, seed)
        if code or not done or done[-1]["step"] < goal:
            raise RuntimeError(f"{folder}: stopped before step {goal}, see {folder}.log")


def finish_all(todo, jobs):
    """finish() of many (regime, arm, seed), `jobs` at a time -> how many failed. Each failure is said at once."""
    def attempt(what):
        try:
            finish(*what)
        except RuntimeError as e:
            warn(f"error: {e}")
            return 1
        return 0

    with ThreadPoolExecutor(jobs) as pool:
        try:
            return sum(pool.map(attempt, todo))
        except KeyboardInterrupt:  # the runs have got it, too, and save
            pool.shutdown(cancel_futures=True)
            raise


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
    """at_budget of those seeds of an arm that have got so far, as an array with seeds first."""
    found = [at_budget(rows, budget, get) for (a, _), rows in sorted(runs.items()) if a == arm]
    return np.array([x for x in found if x is not None])


def table(runs, budgets):
    """A line an arm and budget: mean and standard deviation over the seeds."""
    rows = [["arm", "tokens", "seeds", *COLUMNS]]
    for arm in dict.fromkeys(a for a, _ in runs):
        for budget in (0, *budgets):
            found = over_seeds(runs, arm, budget, lambda row: [row.get(key, np.nan) for key, _ in COLUMNS.values()])
            if len(found):
                spread = found.std(0, ddof=1) if len(found) > 1 else [np.nan] * len(COLUMNS)
                cells = zip(found.mean(0), spread, COLUMNS.values(), strict=True)
                rows.append([arm, f"{budget // 1000}k", str(len(found)),
                             *("-" if np.isnan(m) else f"{m:{form}}" + f" ± {s:{form}}" * (len(found) > 1)
                               for m, s, (_, form) in cells)])  # fmt: skip
    return aligned(rows)


def differences(runs, budget):
    """A line a pair of arms and measure: the difference, its standard error over seeds, the difference from which on it
    is seen, and the standard error over problems.

    The first holds the problems fixed: it is about other seeds, pooled over the two arms. The last holds the runs
    fixed: it is about other problems, paired, each with its mean over seeds."""
    rows = [[f"at {budget // 1000}k", "seeds", "measure", "difference", "se seeds", "seen from", "seen", "se problems"]]
    measures = {"pass@1": (lambda row: np.array(row["eval/right"]) / EVAL_N, "+.3f", ".3f"),
                "pass@64": (lambda row: np.array(row["eval/right"]) > 0, "+.3f", ".3f"),
                "ever solved": (lambda row: [row.get("ever_solved", np.nan)], "+.1f", ".1f")}  # fmt: skip
    for a, b in COMPARED:
        for name, (get, signed, form) in measures.items():
            x, y = over_seeds(runs, a, budget, get), over_seeds(runs, b, budget, get)
            if min(len(x), len(y)) < 2 or np.isnan(x).any():
                continue
            free, by_problem = len(x) + len(y) - 2, x.mean(0) - y.mean(0)
            pooled = (x.mean(1).var(ddof=1) * (len(x) - 1) + y.mean(1).var(ddof=1) * (len(y) - 1)) / free
            se = np.sqrt(pooled * (1 / len(x) + 1 / len(y)))
            found, limit = by_problem.mean(), T_95[free] * se
            paired = f"{by_problem.std(ddof=1) / len(by_problem) ** 0.5:{form}}" if len(by_problem) > 1 else "-"
            rows.append([f"{a} - {b}", f"{len(x)}, {len(y)}", name, f"{found:{signed}}", f"{se:{form}}",
                         f"{limit:{form}}", "yes" if abs(found) > limit else "no", paired])
    return aligned(rows)


def draw(runs, path):
    """The picture: pass@1 against pass@64 along training. Lines are means over seeds, pale marks single seeds."""
    def point(row):
        return [row["eval/pass@1"], row["eval/pass@64"]]

    with picture(Path(path), 4.6) as figure:
        ax = figure.subplots()
        for i, arm in enumerate(ARMS):
            points = [over_seeds(runs, arm, budget, point) for budget in (0, *BUDGETS)]
            means = np.array([p.mean(0) for p in points if len(p)])
            if len(means):
                ax.plot(*means.T, color=COLOURS[i], marker=MARKERS[i], label=arm)
                ax.plot(*points[-1].T if len(points[-1]) else [], color=COLOURS[i], marker=MARKERS[i], ls="", alpha=0.4)
                ax.annotate("", means[-1], means[-2:][0], arrowprops={"arrowstyle": "-|>", "color": COLOURS[i]})
        ax.set(xlabel="pass@1, held-out", ylabel="pass@64, held-out")
        ax.legend(title=f"a mark every {BUDGETS[0] // 1000}k tokens")


def main(argv):
    """The part of the matrix that is asked for, then the tables and the picture of all that is there."""
    parser = command_line("matrix", __doc__)
    parser.add_argument("regime", choices=REGIMES)
    parser.add_argument("--seeds", default="")
    parser.add_argument("--arms", default="")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a core each; 0: run nothing")
    parser.add_argument("--data", help="kept lines: run nothing")
    parser.add_argument("--picture", help="default runs/exploration/REGIME.png")
    args = parser.parse_args(argv)
    (every_arm, _, _, budgets, seeds, _), regime = REGIMES[args.regime], args.regime
    arms, seeds = args.arms.split(",") if args.arms else every_arm, args.seeds.split(",") if args.seeds else seeds
    if unknown := set(arms) - set(ALL):
        parser.error(f"--arms: no arm {min(unknown)}; there are {', '.join(ALL)}")
    failed, kept = 0, args.data or f"runs/exploration/{args.regime}.jsonl"
    if not args.data:
        todo = [(regime, arm, int(seed)) for seed in seeds for arm in arms]  # seed by seed
        failed = finish_all(todo, args.jobs) if args.jobs else 0
        os.makedirs("runs/exploration", exist_ok=True)
        with open(kept, "w") as file:
            file.writelines(json.dumps(row) + "\n" for arm in every_arm for seed in SEEDS
                            for row in evaluations(regime, arm, seed))
    runs = {}
    for row in map(json.loads, Path(kept).read_text().splitlines()):
        if row["regime"] == regime:
            runs.setdefault((row["arm"], row["seed"]), []).append(row)
    print(table(runs, budgets))
    if regime != "methods":  # one seed has no differences to be seen
        print(*(f"\n{differences(runs, budget)}" for budget in (budgets[0], budgets[-1])), sep="\n")
    if regime in ("plain", "hard"):
        draw(runs, args.picture or f"runs/exploration/{regime}.png")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
