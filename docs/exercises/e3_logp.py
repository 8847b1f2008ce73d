"""Exercise 3: the log-probs of a response.

ids (S,) int64 are a prompt of n_prompt >= 1 tokens and a response of S - n_prompt. The model read all of them.
logits (S, V) are what it put out at each position. They are the prediction of the token that follows.
Sampling divided the logits by `temperature`. The function returns the log-prob of each response token given all
tokens before it, (S - n_prompt,), in nats.

Source: 80/20 (arXiv 2506.01939, eq. 1) for the distribution that a token is drawn from.
Seen in: maxtext (#2103).
"""


def response_logp(logits, ids, n_prompt, temperature=1.0):
    response = ids[n_prompt:]
    produced = logits[n_prompt:] / temperature
    logq = produced.log_softmax(-1)
    return logq.gather(-1, response[:, None])[:, 0]
