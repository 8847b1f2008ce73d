"""A page on which the reader makes CURE's move by hand: cut a response at a token, let the model go on from there.

    python -m tools.play runs/countdown [more runs] [--out FILE]        one HTML file, works offline

The page holds the models, in half precision, and computes with them: the base model, and of each run the checkpoints
at the ends of its stages and the newest. It is for models as small as those of `model: toy` and `model: countdown`.
What a model writes is shown as text only.
"""
import base64
import json
import sys
from pathlib import Path

from safetensors.torch import load_file

from lib.checkpoint import latest
from lib.data import find_benchmark, load_prompts
from lib.files import read_json
from lib.weights import load_hf_config, load_tokenizer
from rollout import allowed_tokens
from tools.common import command_line, for_each, run_file

LARGEST = 2_000_000  # parameters: 4 MB of the page for each model
VERIFIERS = ("countdown", "boxed")  # that the page knows
SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
         "rms_norm_eps", "max_position_embeddings", "vocab_size")  # fmt: skip


def models_of(runs):
    """[(name, HF folder)]: the base model of the first run, then of each run its stage ends and newest checkpoint."""
    stages = [read_json(str(run_file(run, "stages.json"))) for run in runs]
    base = next(iter(stages[0].values()))["model"]
    out = [("base model", base)]
    for run in runs:
        newest = latest(f"{run}/ckpt")
        for meta in sorted(Path(run).glob("ckpt/step_*/meta.json")):
            state = read_json(str(meta))
            if state["stage_done"] or meta.parent.name == newest:
                title = f"{Path(run).name}: {state['stage']}, step {state['step']}"
                out.append((title, str(meta.parent / "hf")))
    return out


def packed(folder, names):
    """The weights of an HF folder in this order, half precision, as base64."""
    state = load_file(f"{folder}/model.safetensors")
    if sorted(state) != sorted(names):
        raise ValueError(f"{folder}: its weights are not those of the first model")
    return base64.b64encode(b"".join(state[n].half().numpy().tobytes() for n in names)).decode()


def play_data(runs):
    """What the page needs: models, shapes, prompts with their tokens, settings. ValueError: no model for a page."""
    models = models_of(runs)
    config, (tokenizer, gen_eos) = load_hf_config(models[0][1]), load_tokenizer(models[0][1])
    if config.model_type != "qwen2":
        raise ValueError(f"{models[0][1]}: the page computes Qwen2, this is {config.model_type}")
    state = load_file(f"{models[0][1]}/model.safetensors")
    if (n := sum(t.numel() for t in state.values())) > LARGEST:
        raise ValueError(f"{models[0][1]}: {n / 1e6:.0f} M parameters, a page takes {LARGEST / 1e6:.0f} M")
    stages = read_json(str(run_file(runs[0], "stages.json")))
    cfg = next((s for s in stages.values() if s["n2"]), next(iter(stages.values())))
    if cfg["verifier"] not in VERIFIERS or cfg["method"] or cfg["clause"] != "prefix":
        raise ValueError(f"{runs[0]}: the page has CURE's own move alone, with the verifiers {', '.join(VERIFIERS)}")
    _, source = find_benchmark(cfg["eval_data"] or cfg["data"])
    prompts, _ = load_prompts(source, tokenizer, cfg["template"], cfg["max_prompt_tokens"],
                              cfg["system_prompt"], cfg.get("chat_args"), limit=60)
    allowed = allowed_tokens(tokenizer, config.vocab_size, cfg["min_token_chars"])
    names = sorted(state)
    return {
        "models": [{"name": name, "weights": packed(folder, names)} for name, folder in models],
        "shapes": {n: list(state[n].shape) for n in names},
        "config": {k: getattr(config, k) for k in SHAPE} | {"theta": config.rope_parameters["rope_theta"]},
        "tokens": [tokenizer.decode([i]) for i in range(config.vocab_size)],
        "stop": sorted({tokenizer.eos_token_id, *gen_eos} - {None}),
        "allowed": allowed.tolist(),
        "prompts": [{"text": p.text, "ids": p.ids, "gold": p.answer} for p in prompts],
        "verifier": cfg["verifier"],
        "settings": {k: cfg[k] for k in ("n1", "n2", "critical_top_k", "max_response_tokens", "temperature")},
    }


def page(data, command):
    """The whole page. Nothing in the data can end its script element: every < is escaped."""
    text = Path(__file__).with_name("play.html").read_text(encoding="utf-8")
    text = text.replace("__COMMAND__", command.replace("--", "- -"), 1)
    return text.replace("__DATA__", json.dumps(data).replace("<", "\\u003c"), 1)


def write_page(runs, out):
    """Write the page of these runs -> what to print."""
    out = Path(out or Path(runs[0]) / "plots/play.html")
    out.parent.mkdir(parents=True, exist_ok=True)
    data = play_data(runs)
    out.write_text(page(data, f"python -m tools.play {' '.join(runs)} --out {out}"), encoding="utf-8")
    return f"{out}: {', '.join(m['name'] for m in data['models'])}; {out.stat().st_size / 1e6:.1f} MB"


def main(argv):
    """One page of some runs; exit code 2 where something is missing."""
    parser = command_line("play", __doc__)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folders; the first gives the task")
    parser.add_argument("--out", metavar="FILE", help="the page (default: RUN/plots/play.html)")
    args = parser.parse_args(argv)
    return for_each(lambda _: write_page(args.runs, args.out), [args.runs[0]])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
