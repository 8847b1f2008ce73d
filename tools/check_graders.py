"""Are gold answers graded right and other answers wrong? No model is needed. Without an argument: all benchmarks.

    python -m tools.check_graders benchmarks=minerva:FILE.jsonl,aime24
"""

import sys

from lib.data import BENCHMARKS, find_benchmark, grader, load_rows
from lib.files import aligned
from lib.pool import VerifierPool, unread_golds
from lib.ranks import one_line_errors
from reward import normalise

COLUMNS = {"gold": "gold right", "solution": "solution right", "other": "other wrong", "read": "gold read"}


def check_golds(rows, verifier, pool):
    """What a grader makes of a benchmark (rows of load_rows) -> ({kind: "so many as it should be/of"}, [a line a
    failure]). Kinds: \\boxed{gold} and a reference solution with a \\boxed should be right ("gold", "solution"), the
    gold of the next problem that has another should be wrong ("other"). To math-verify golds should be mathematics
    ("read")."""
    cases = {"gold": [(r, rf"\boxed{{{r['answer']}}}") for r in rows],
             "solution": [(r, r["solution"]) for r in rows if r"\boxed" in r["solution"]], "other": []}  # fmt: skip
    for i, r in enumerate(rows):
        others = (o["answer"] for o in rows[i + 1 :] + rows[:i] if normalise(o["answer"]) != normalise(r["answer"]))
        cases["other"] += [(r, rf"\boxed{{{other}}}") for other in [next(others, None)] if other is not None]
    shares, failures = {}, []
    for kind, pairs in cases.items():
        verdicts, _ = pool.verdicts([(text, r["answer"]) for r, text in pairs], verifier)
        bad = [(r, v[2]) for (r, _), v in zip(pairs, verdicts, strict=True) if v[1] == (kind == "other")]
        shares[kind] = f"{len(pairs) - len(bad)}/{len(pairs)}"
        failures += [f"row {r['row']}: {kind}: gold {r['answer']!r}, read {answer!r}" for r, answer in bad]
    if verifier == "math_verify":
        unread = unread_golds([(r["row"], r["answer"]) for r in rows], pool)
        shares["read"] = f"{len(rows) - len(unread)}/{len(rows)}"
        failures += [f"row {row}: read: gold {gold!r} is no mathematics, compared as text" for row, gold in unread]
    return shares, failures


def main(argv):
    """check_golds of each benchmark, printed as a table and a list of failures -> exit code."""
    table, lines = [["benchmark", "grader", "problems", *COLUMNS.values()]], []
    with one_line_errors(), VerifierPool(timeout_s=20.0) as pool:
        if unknown := [a for a in argv if not a.startswith("benchmarks=")]:
            raise ValueError(f"{unknown[0].split('=')[0]}: check takes benchmarks= and nothing else")
        items = argv[-1].split("=", 1)[1].split(",") if argv else list(BENCHMARKS)
        for name, source in map(find_benchmark, items):
            rows, _ = load_rows(source, "benchmarks")
            verifier = grader(name, "boxed") or "math_verify"
            shares, failures = check_golds(rows, verifier, pool)
            table.append([name, verifier, str(len(rows)), *(shares.get(kind, "") for kind in COLUMNS)])
            lines += [f"{name}, {line}" for line in failures]
    print("\n".join([aligned(table), *lines]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
