"""The model card, hf/README.md of a checkpoint: what a run knows of its model, for whoever gets that folder alone."""

import json
import os
import re

import yaml

from lib.config import FREE, Config, keys
from lib.files import read_json


def save_card(run, cfg, folder):
    """Write README.md into a checkpoint's hf folder: YAML that the hub reads, then sentences and tables. On rank 0.
    Everything in it is from the run's config, counters, versions.json and last evaluation."""
    s, stages, default = run.state, {name: vars(c) for name, c in run.stages}, vars(Config())
    datasets = sorted({name for c in stages.values() if on_hub(name := c["data"].split(":")[0])})
    kinds = sorted({"sft" if c["kind"] == "sft" else "reinforcement-learning" for c in stages.values()})
    front = {"library_name": "transformers", "pipeline_tag": "text-generation",
             "tags": ["nanocure", *kinds, *(["lora"] if cfg.lora_rank else [])],
             **({"base_model": cfg.model} if on_hub(cfg.model) else {}),
             **({"datasets": datasets} if datasets else {})}  # fmt: skip
    title = code(os.path.basename(os.path.abspath(run.out)))
    steps = f"{s['stage_step']} of the {cfg.steps} steps of stage {code(cfg.name)}"
    parts = [f"---\n{yaml.safe_dump(front, sort_keys=False)}---", f"# {title}",
             f"A checkpoint of a run of nanoCURE, which began with the model {code(cfg.model)}. Training has done "
             f"{steps}, and {s['step']} steps of reinforcement learning in all."]  # fmt: skip
    if cfg.lora_rank:
        parts.append("LoRA's adapters are merged into these weights. `adapter/`, beside this folder in the checkpoint, "
                     "has them alone, in PEFT's format.")  # fmt: skip
    rows = [[code(name), c["steps"], method(c), code(c["data"])] for name, c in stages.items()]
    parts += ["## Stages", table(["stage", "steps", "method", "data"], rows)]
    rows = [[code(k), *(code(c[k]) for c in stages.values())] for k in default if k not in keys(FREE) | {"name"}
            and any(c[k] != default[k] for c in stages.values())]  # fmt: skip
    parts += ["Settings that are not nanoCURE's defaults:", table(["setting", *map(code, stages)], rows)]
    parts.append("## Last evaluation")
    if found := s.get("evaluation"):
        parts.append(f"After {found['step']} steps of reinforcement learning, in stage {code(found['stage'])}, on "
                     f"{code(found['eval_data'])}, at temperature {found['eval_temperature']} and top_p "
                     f"{found['eval_top_p']}.")  # fmt: skip
        rows = [[code(k), f"{v:.6g}"] for k, v in found.items() if k.startswith("eval/") and isinstance(v, int | float)]
        parts.append(table(["metric", "value"], rows))
    else:
        parts.append("The run knows of none.")
    versions = [[code(k), code(v)] for k, v in (read_json(f"{run.out}/versions.json") or {}).items() if v is not None]
    parts += ["## Versions", table(["of", "version"], versions)]
    with open(f"{folder}/README.md", "w", encoding="utf-8") as f:
        f.write("\n\n".join(parts) + "\n")


def on_hub(name):
    """Whether a setting names something of the hub, and no folder or file here."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)) and not os.path.exists(name)


def method(c):
    """What a stage does, in words. c: its settings."""
    if c["kind"] == "sft":
        return "supervised learning on the data's solutions"
    what = f"CURE, n1 {c['n1']}, n2 {c['n2']}" if c["n2"] else f"DAPO, groups of {c['n1']}"
    rho = f", loss on {c['entropy_mask_rho']:.0%} of the tokens" if c["entropy_mask_rho"] < 1 else ""
    return what + rho + "".join(f", method {code(name)}" for name in c["method"])


def code(value):
    """Any value as a Markdown code span of one line."""
    text = value if isinstance(value, str) and value.strip() and value.isprintable() else json.dumps(value)
    ticks = max(map(len, re.findall("`+", text)), default=0) + 1
    return f"{'`' * ticks} {text} {'`' * ticks}" if ticks > 1 else f"`{text}`"


def table(head, rows):
    """A Markdown table. Within one a | needs a backslash, even in a code span."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
