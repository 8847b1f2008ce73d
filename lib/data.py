"""Prompts on their way to the model: rows (load_rows), their text (render), tokens (load_prompts), their order
(PromptStream), and the benchmarks. What a user can get wrong is a ValueError of one line: the setting to change, then
file and line. What is not kept is counted, and the counts add up to the rows of the source."""

import difflib
import hashlib
import inspect
import json
import os
import random
import re
from collections import namedtuple
from dataclasses import dataclass

from lib.countdown import GOLD, gold_text, read_gold
from reward import last_boxed

PROMPT_COLUMNS = ("prompt", "question", "problem")
COUNTDOWN_COLUMNS = ("nums", "target")  # TinyZero's Jiayi-Pan/Countdown-Tasks-3to4: prompt and answer in one
ANSWER_COLUMNS = ("answer", "final_answer", "reward_model", "solution")  # of the last one its last \boxed{}
PLAIN = ("8020", "raw")  # never through a chat template
TEMPLATES = ("chat", "dapo", "boxed", "countdown", *PLAIN)
BOXED = r"Please reason step by step, and put your final answer within \boxed{}."
DAPO_HEAD = ("Solve the following math problem step by step. The last line of your response should be of the form "
             "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n")  # fmt: skip
DAPO_TAIL = '\n\nRemember to put your answer on its own line after "Answer:".'

# Source: TinyZero, examples/data_preprocess/countdown.py, make_prefix.
COUNTDOWN = ("Using the numbers {numbers}, create an equation that equals {target}. You can use basic arithmetic "
             "operations (+, -, *, /) and each number can only be used once. Show your work in <think> </think> tags. "
             "And return the final answer in <answer> </answer> tags, for example <answer> (1 + 2) / 3 </answer>.")
COUNTDOWN_HEAD = ("A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
                  "The assistant first thinks about the reasoning process in the mind and then provides the user with "
                  "the answer.\nUser: ")
COUNTDOWN_TAIL = "\nAssistant: Let me solve this step by step.\n<think>"


@dataclass
class Prompt:
    id: int  # index in the source of the first row that has this prompt
    ids: list[int]  # tokens of `text`
    text: str  # the rendered prompt
    answer: str  # gold
    solution: str = ""  # worked solution, where the source has one (what `kind: sft` learns from)


# --------------------------------------------------------------------------------------------------------------- rows
def _answer_text(value):
    """Gold as a string, as the verifiers compare it: 27.0 -> "27", ["2"] -> "2", "025" -> "25", null and NaN -> ""."""
    if value is None or value != value:
        return ""
    if isinstance(value, list):
        return ", ".join(map(_answer_text, value))
    if not isinstance(value, str | int | float):
        raise TypeError(f"the answer should be text, a number or a list of them, not {type(value).__name__}")
    text = str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()
    # 7 of the 30 answers of AIME 2024 look like "025" in some copies. Compared as text no 25 would ever be rewarded.
    return re.sub(r"^(-?)0+(?=\d+$)", r"\1", text)


def _prompt_text(value):
    """A str as it is, chat messages as plain dicts, and "" for null or nothing but white space."""
    if value is None or isinstance(value, str):
        return value if value and value.strip() else ""
    if not (isinstance(value, list) and all(isinstance(m, dict) and isinstance(m.get("role"), str)
                                            and isinstance(m.get("content"), str | None) for m in value)):  # fmt: skip
        raise TypeError("the prompt should be text or a list of {role, content} messages")
    messages = [{"role": m["role"], "content": m["content"] or ""} for m in value]
    return messages if any(m["content"].strip() for m in messages) else ""


def _fields(row):
    """A row of any known schema, a dict -> (prompt, answer, solution), "" for what is missing."""
    if not isinstance(row, dict):
        raise TypeError(f"a row should be a JSON object, not {type(row).__name__}")
    if row.get("nums") is not None and row.get("target") is not None:  # TinyZero's problems
        row = row | dict.fromkeys(("prompt", "answer"), _countdown_text(row["nums"], row["target"]))
    prompt = _prompt_text(next((row[c] for c in PROMPT_COLUMNS if row.get(c)), None))
    solution = row.get("solution") or ""
    solution = solution[0] or "" if isinstance(solution, list) else solution  # OlympiadBench: several ways to solve it
    if not isinstance(solution, str):
        raise TypeError(f"the solution should be text, not {type(solution).__name__}")
    if isinstance(row.get("reward_model"), dict):  # DAPO-Math
        truth = row["reward_model"].get("ground_truth")
        made = isinstance(truth, dict) and truth.keys() >= {"numbers", "target"}  # TinyZero's own files
        answer = _countdown_text(truth["numbers"], truth["target"]) if made else _answer_text(truth)
    elif "answer" in row or "final_answer" in row:
        answer = _answer_text(row.get("answer")) or _answer_text(row.get("final_answer"))
    else:  # Minerva
        answer = _answer_text(last_boxed(solution, len(solution)))
    work, mark, gold = answer.rpartition("####")
    if mark and "\n" not in gold.strip():  # GSM8K: "48/2 = <<48/2=24>>24 clips …\n#### 1,024"
        answer = _answer_text(re.sub(r"(?<=\d),(?=\d)", "", gold))
        # the <<…>> are a calculator's; "Answer:" in place of #### so that sft teaches the form that `dapo` rewards
        solution = solution or re.sub(r"<<[^<>]*>>", "", work).rstrip() + f"\nAnswer: {answer}"
    f"{prompt}{answer}{solution}".encode()  # raises on half a surrogate pair, which no tokenizer takes
    return prompt, answer, solution


def _countdown_text(numbers, target):
    """Countdown's gold of a row's numbers and target."""
    text = gold_text(numbers, target) if isinstance(numbers, list) else ""
    if not GOLD.fullmatch(text):
        raise TypeError(f"nums and target should be whole numbers, got {numbers!r:.60} and {target!r:.20}")
    return text


def _usable(names):
    """The columns worth reading (of DAPO-Math's 1.8 M rows we leave the rest on the disk)."""
    if set(names) >= set(COUNTDOWN_COLUMNS):
        return list(COUNTDOWN_COLUMNS)
    if not set(names) & set(PROMPT_COLUMNS) or not set(names) & set(ANSWER_COLUMNS):
        raise TypeError(f"needs a column {'|'.join(PROMPT_COLUMNS)} and a column {'|'.join(ANSWER_COLUMNS)}; it has "
                        + (", ".join(sorted(names)) or "none"))  # fmt: skip
    return [n for n in names if n in PROMPT_COLUMNS + ANSWER_COLUMNS]


def _raw_rows(source):
    """(where it stands, the row) of every row of any source, a line of JSON or a dict."""
    if source.endswith(".jsonl"):
        with open(source, "rb") as file:  # as bytes: text mode would also end a line at \r
            yield from ((f"{source}:{n}", line) for n, line in enumerate(file, 1) if line.strip())
        return
    if source.endswith(".parquet"):
        import pyarrow.parquet as pq  # here, as datasets below: --help and tests start without them
        file = pq.ParquetFile(source)
        tables = file.iter_batches(4096, columns=_usable(file.schema_arrow.names))
    else:
        import datasets
        name, config, split = (source.split(":") + ["", ""])[:3]
        data = datasets.load_dataset(name, config or None, split=split or "train")
        tables = data.select_columns(_usable(data.column_names)).with_format("arrow").iter(4096)
    rows = (row for table in tables for row in table.to_pylist())
    yield from ((f"{source}: row {n}", row) for n, row in enumerate(rows))


def _records(source, key):
    """_fields of every row of any source. Whatever cannot be read is a ValueError that says where."""
    where, names = source, set()
    try:
        for where, row in _raw_rows(source):  # noqa: B007, the except clause names it
            row = json.loads(row) if isinstance(row, bytes) else row
            yield _fields(row)
            names.update(row)
        where = source
        if names:  # of all lines of a .jsonl together: some writers leave nulls out
            _usable(names)
    except Exception as e:  # broken JSON or UTF-8, a torn file, no network, no such split: errors of four libraries
        reason = f"broken JSON, {e.msg}" if isinstance(e, json.JSONDecodeError) else str(e).strip() or type(e).__name__
        raise ValueError(f"{key}: {where}: {reason.splitlines()[0]}") from e


def load_rows(source, key="data", sft=False):
    """-> (rows {prompt: str or messages, answer, solution, row}, counts {rows, empty, duplicates, conflicting, kept}).
    source: a path, or a hub id owner/name[:config[:split]] (owner/name::test = default config, split test). Rows of
    equal prompt are one prompt: DAPO-Math-17k holds each of its rows a hundred times, so that a round of 1024 would
    meet about 29 prompts twice (CURE-9). Where they disagree about the answer the prompt goes altogether, as we cannot
    know which is right. rows = empty + duplicates + conflicting + kept. sft: a row needs a solution instead of an
    answer, and two solutions of one prompt are two rows. ValueError: what cannot be read, or holds nothing."""
    local = source.endswith((".jsonl", ".parquet"))
    if local and not os.path.isfile(source):
        raise ValueError(f"{key}: no such file: {source}")
    if not local and (os.path.exists(source) or not re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]*){0,2}", source)):
        raise ValueError(f"{key}: {source!r} is no .jsonl or .parquet file and no hub id owner/name[:config[:split]]")
    counts = dict.fromkeys(("rows", "empty", "duplicates", "conflicting", "kept"), 0)
    seen = {}  # prompt -> [its first row, how often it came, do all agree]
    for number, (prompt, answer, solution) in enumerate(_records(source, key)):
        counts["rows"] += 1
        if not prompt or not (solution if sft else answer):
            counts["empty"] += 1
            continue
        first = {"prompt": prompt, "answer": answer, "solution": solution, "row": number}
        entry = seen.setdefault((repr(prompt), sft and solution), [first, 0, True])
        entry[1] += 1
        entry[2] &= entry[0]["answer"] == answer
    for _, times, agree in seen.values():
        counts["kept"] += agree
        counts["duplicates" if agree else "conflicting"] += times - agree
    assert 2 * counts["rows"] == sum(counts.values()), counts
    if not counts["kept"]:
        raise ValueError(f"{key}: {source} {f'has no usable row: {counts}' if counts['rows'] else 'is empty'}")
    return [row for row, _, agree in seen.values() if agree], counts


# ---------------------------------------------------------------------------------------------------- text and tokens
def render(prompt, template, tokenizer, system_prompt="", chat_args=None):
    r"""The text that the model continues. prompt: a str (one user message) or chat messages.

    chat    the tokenizer's own chat template
    dapo    DAPO-Math's "Answer: $Answer" instruction around the question, unless it is there already
    boxed   question, newline, "Please reason step by step, and put your final answer within \boxed{}."
    8020    the same as plain text in 80/20's "User:\n…\n\nAssistant:\n"
    countdown   TinyZero's instruction for "3 7 8 -> 29", and its base prompt where there is no chat template
    raw     the text itself; of messages the contents, one a line
    dapo, boxed and countdown go through the chat template where there is one, else as plain text. boxed and 8020 first
    take off DAPO-Math's instruction: asking for two answer formats gets neither. system_prompt replaces the data's.
    chat_args: keyword arguments of the chat template, such as Qwen3's enable_thinking."""
    if template not in TEMPLATES:
        raise ValueError(f"template: {template!r} is none of {', '.join(TEMPLATES)}")
    if system_prompt and template in PLAIN:
        raise ValueError(f"system_prompt: template {template} has no place for it: leave it empty")
    if chat_args:
        check_chat_args(chat_args, template, tokenizer)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
    if template in ("dapo", "boxed", "8020"):
        turn = next((m for m in reversed(messages) if m["role"] == "user"), messages[-1])
        question = turn["content"].removeprefix(DAPO_HEAD).removesuffix(DAPO_TAIL)
        if template != "dapo":
            turn["content"] = question if BOXED in question else f"{question}\n{BOXED}"
        elif "Answer: $Answer" not in turn["content"]:
            turn["content"] = DAPO_HEAD + question + DAPO_TAIL
    if template == "countdown" and "<answer>" not in messages[-1]["content"]:  # else TinyZero's own, rendered already
        try:
            numbers, target = read_gold(messages[-1]["content"])
        except ValueError as e:
            raise ValueError("template: countdown wants columns nums and target, or prompts like '3 7 8 -> 29'") from e
        messages[-1]["content"] = COUNTDOWN.format(numbers=numbers, target=target)
    if system_prompt:
        messages = [{"role": "system", "content": system_prompt}, *(m for m in messages if m["role"] != "system")]
    if template in PLAIN or not tokenizer.chat_template:
        if template == "chat":
            raise ValueError("template: chat needs a tokenizer with a chat template; this model's has none")
        text = "\n".join(m["content"] for m in messages)
        if template == "countdown" and not text.startswith(COUNTDOWN_HEAD):
            return COUNTDOWN_HEAD + text + COUNTDOWN_TAIL
        return f"User:\n{text}\n\nAssistant:\n" if template == "8020" else text
    from jinja2 import TemplateError
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **(chat_args or {}))
    except (TemplateError, TypeError) as e:  # "System role not supported", "roles must alternate", an odd chat_args …
        what = "messages, system_prompt or chat_args" if chat_args else "messages or system_prompt"
        raise ValueError(f"template: the tokenizer's chat template refuses the {what}: {e}") from e


def check_chat_args(chat_args, template, tokenizer):
    """ValueError: chat_args that no chat template would see. Jinja ignores a name that a template does not read."""
    if template in PLAIN or not tokenizer.chat_template:
        what = f"template {template} uses no" if template in PLAIN else "this model's tokenizer has no"
        raise ValueError(f"chat_args: {what} chat template: leave it empty")
    ours = {"messages", *inspect.signature(tokenizer.apply_chat_template).parameters}
    if bad := sorted(chat_args.keys() & ours):
        raise ValueError(f"chat_args: {bad[0]} is not the chat template's to take: leave it out")
    read = tokenizer.get_chat_template()  # of several named ones the one that is used
    if bad := [name for name in chat_args if not re.search(rf"\b{re.escape(name)}\b", read)]:
        raise ValueError(f"chat_args: the tokenizer's chat template does not read {bad[0]}")


def load_prompts(source, tokenizer, template, max_prompt_tokens, system_prompt="", chat_args=None, limit=0, key="data",
                 sft=False):  # fmt: skip
    """load_rows, rendered and tokenised -> (prompts in the source's order, its counts with too_long and over_limit).

    A prompt of more than max_prompt_tokens is dropped, not cut: a question without its end has no answer. limit > 0
    keeps the first so many. key: what messages call the source, data or eval_data."""
    rows, counts = load_rows(source, key, sft)
    texts = [render(row["prompt"], template, tokenizer, system_prompt, chat_args) for row in rows]
    # No special tokens: a chat template writes its own BOS, and some tokenizers would put an EOS *behind* the prompt.
    # But plain text without BOS is what a Llama has never seen: where its tokenizer puts one (not so Qwen's), so do we.
    bos = [] if template not in PLAIN and tokenizer.chat_template else [tokenizer.bos_token_id]
    bos = bos if tokenizer("1")["input_ids"][:1] == bos else []
    prompts, encoded = [], []
    for start in range(0, len(texts), 512):  # in batches, as a fast tokenizer likes it
        encoded += tokenizer(texts[start : start + 512], add_special_tokens=False)["input_ids"]
    for row, text, ids in zip(rows, texts, encoded, strict=True):
        if not ids:
            raise ValueError(f"model: its tokenizer knows nothing in row {row['row']} of {source}: {text[:60]!r}")
        ids = ids if ids[:1] == bos else bos + ids
        prompts.append(Prompt(row["row"], ids, text, row["answer"], row["solution"]))
    fit = [p for p in prompts if len(p.ids) <= max_prompt_tokens]
    if not fit:
        raise ValueError(f"max_prompt_tokens: all {len(rows)} prompts of {source} have over {max_prompt_tokens} tokens")
    kept = fit[: limit or None]
    return kept, counts | {"too_long": len(rows) - len(fit), "over_limit": len(fit) - len(kept), "kept": len(kept)}


class PromptStream:
    """Endless indices 0 … n-1, each epoch in an order that depends on seed and epoch alone: no ranks, no global RNG.
    `cursor` = [epoch, position] is all that a checkpoint needs: PromptStream(n, seed, *cursor) goes on right there."""

    def __init__(self, n, seed, epoch=0, position=0):
        assert n > 0 and epoch >= 0 and 0 <= position <= n, (n, epoch, position)
        self.n, self.seed = n, seed
        self._start(epoch, position)

    def _start(self, epoch, position=0):
        self.epoch, self.position, self.order = epoch, position, list(range(self.n))
        digest = hashlib.sha256(f"{self.seed}/epoch {epoch}".encode()).digest()
        random.Random(int.from_bytes(digest, "big")).shuffle(self.order)

    @property
    def cursor(self):
        return [self.epoch, self.position]

    def take(self, k, exclude=frozenset()):
        """The next k indices, none twice and none of `exclude` (what this step has drawn); fewer if no more are left.
        Only an epoch that begins within a step can bring one again. It was seen just now, so it is passed over."""
        taken, left = [], set(range(self.n)) - exclude
        while left and len(taken) < k:
            if self.position == self.n:
                self._start(self.epoch + 1)
            index, self.position = self.order[self.position], self.position + 1
            if index in left:
                left.remove(index)
                taken.append(index)
        return taken


# -------------------------------------------------------------------------------------------------- tasks, benchmarks
@dataclass
class Task:
    """What collect() samples from, apart from the config: the stage's name, its prompts and how to read them."""

    stage: str
    prompts: list  # of Prompt
    stream: object  # PromptStream over them
    tokenizer: object
    allowed: object  # bool (V,), which tokens may be critical (rollout.allowed_tokens)
    verifiers: object  # lib.pool.VerifierPool
    verifier: str = ""  # instead of the config's
    method: object = None  # the stage's functions (lib/method.load_method)


# source: hub id owner/name:config:split · size: problems, for a warning when a copy has another number · n: samples a
# problem, unless the preset or eval_n says
Benchmark = namedtuple("Benchmark", "source size verifier n")
BENCHMARKS = {
    "aime24": Benchmark("math-ai/aime24::test", 30, "integer", 32),
    "aime25": Benchmark("math-ai/aime25::test", 30, "integer", 32),
    "amc23": Benchmark("math-ai/amc23::test", 40, "integer", 32),
    "math500": Benchmark("HuggingFaceH4/MATH-500::test", 500, "math_verify", 1),
    "minerva": Benchmark("math-ai/minervamath::test", 272, "math_verify", 1),
    "olympiad": Benchmark("math-ai/olympiadbench::test", 675, "math_verify", 1),  # the hub's copy has 674
    "gsm8k": Benchmark("openai/gsm8k:main:test", 1319, "integer", 1),
}


def find_benchmark(item, key="benchmarks"):
    """NAME, NAME:FILE, a file or a hub id, as benchmarks and eval_data take it -> (name, source for load_prompts).
    ValueError: no such NAME. Whether the source is there, load_rows finds out."""
    name, _, file = item.partition(":")
    if name in BENCHMARKS:
        return name, file or BENCHMARKS[name].source
    if item in ("toy", "countdown") or "/" in name or item.endswith((".jsonl", ".parquet")) and not file:
        return re.sub(r"\.(jsonl|parquet)$", "", item.split("/")[-1]).replace(":", "-"), item
    near = difflib.get_close_matches(name, BENCHMARKS, 1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(BENCHMARKS)}, NAME:FILE, files and hub ids"
    raise ValueError(f"{key}: no benchmark {name!r}; {hint}")


def grader(item, template):
    """The verifier that a benchmark brings along, "" for other data. Template dapo asks for integers on a line."""
    name = item.partition(":")[0]
    verifier = BENCHMARKS[name].verifier if name in BENCHMARKS else ""
    return "dapo" if verifier == "integer" and template == "dapo" else verifier
