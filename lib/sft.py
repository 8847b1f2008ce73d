"""Supervised learning on worked solutions: the cold start before RL, and the toy's base model."""

from types import SimpleNamespace

import numpy as np

from lib.policy import learning_rate, packed_length, partition
from lib.ranks import gather, timed


def sft_step(run, cfg, task):
    """One step of it -> metrics. Loss = -mean log-prob of the solution's tokens and the stop token, over the minibatch
    and all ranks, through the packed forward that RL uses. A collective."""
    clock, prompts = {}, [task.prompts[i] for i in task.stream.take(cfg.prompts_per_step, exclude=set())]
    with timed(clock, "step"):
        encode, eos = task.tokenizer.encode, task.tokenizer.eos_token_id
        # a solution over max_response_tokens is cut, without an end token: the model must not learn to stop there
        solutions = [(encode(p.solution, add_special_tokens=False) + [eos])[: cfg.max_response_tokens] for p in prompts]
        rows = [SimpleNamespace(prompt_ids=p.ids, prefix_ids=[], response_ids=ids, parent=-1)
                for p, ids in zip(prompts, solutions, strict=True)]  # fmt: skip
        losses, norms, skipped, lr = [], [], 0, learning_rate(cfg, run.state["stage_step"])
        for part in np.array_split(np.arange(len(rows)), -(-len(rows) // cfg.prompts_per_minibatch)):
            n_tokens, sums = sum(len(rows[i].response_ids) for i in part), []
            cut = partition([packed_length(rows[i]) for i in part], run.world, cfg.micro_batch_tokens)[run.rank]

            def loss_fn(_, logp, __, n_tokens=n_tokens, sums=sums):
                sums.append(-logp.sum().item() / n_tokens)
                return -logp.sum() / n_tokens

            norm, taken = run.policy.update([[rows[part[i]] for i in micro] for micro in cut], loss_fn, 1.0, lr)
            losses.append(sum(gather(sums)))
            norms.append(norm)
            skipped += run.count_step(taken)
    return clock | {"sft/loss": float(np.mean(losses)), "actor/grad_norm": float(np.mean(norms)), "actor/lr": lr,
                    "train/skipped_steps": skipped}  # fmt: skip
