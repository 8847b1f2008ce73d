"""Exercise 6: a training loop that can be stopped and resumed.

Prompts are the indices 0 … n - 1. Each step trains on the next k of lib.data.PromptStream, which has a `cursor`:
PromptStream(n, seed, *cursor) goes on right there. The function trains up to step number `steps` and returns the
batches that it trained on (lists of k indices) and a checkpoint (a JSON text of step and cursor). `saved` is such a
checkpoint, to go on from. A run that was stopped and resumed trains on the batches of one that was not.

Source: the data order of this repository. The training itself is left out.
Seen in: nano-aha.
"""

import json

from lib.data import PromptStream


def train(steps, k, n, saved=None):
    state = json.loads(saved) if saved else {"step": 0, "cursor": [0, 0]}
    stream, batches = PromptStream(n, "0/stage1", *state["cursor"]), []
    while state["step"] < steps:
        state = {"step": state["step"] + 1, "cursor": stream.cursor}
        batches.append(stream.take(k))
    return batches, json.dumps(state)
