"""What branches share is trained once. A broom is a base response, its trunk, and the branches that leave it at one t*.

In flat rows the prompt and the response up to t* are forwarded again for every branch. In a broom's row a branch, a
bristle, brings the tokens of its own only:

    row          | prompt, base response | branch 1 | branch 2 | another trunk …
    positions      0 … P + T - 2           P + t* …   P + t* …   0 …

A bristle's queries see trunk[: P + t*] and, causally, the bristle: the keys of its flat row, gathered from a shorter
one. The trunk's hidden state before t* gives the base response's token at t* and the first token of every branch. The
gradients of all of them meet in the trunk. docs/broom.png shows a row.

A micro-batch has a branch right after its trunk or after another branch of it. That order is all that the row is read
from (`skips`). A rollout that shares nothing stays a flat row: a plain resample (t* None), a clause that is not all of
the response before t* (clause=last), a group without its base responses, a branch for which the budget has no room.
"""


def starts_inside(r):
    """Whether a branch goes on from all of its parent's response before t*."""
    return r.t_star is not None and len(r.prefix_ids) == r.t_star


def shares(trunk, r):
    """Whether r is a branch whose prompt and prefix are inputs of `trunk`, a base response of its group or None.

    A response's last token is no input, so t* must be before its end: as a critical token it is."""
    return (
        trunk is not None and trunk.parent < 0 <= r.parent and trunk.group == r.group and starts_inside(r)
        and r.t_star < len(trunk.response_ids) and trunk.prompt_ids == r.prompt_ids
        and trunk.response_ids[: r.t_star] == r.prefix_ids
    )  # fmt: skip


def brooms(rollouts, lengths, budget):
    """Rollouts of whole groups, base responses first -> (units that a minibatch is cut into, their tokens in a row).

    A unit is [index of a trunk, indices of its branches …] or a flat [index]. Every rollout is in one of them. lengths:
    input tokens of each rollout in a flat row. budget: tokens that a unit may have, unless it is a single rollout.
    AssertionError: a branch's prefix is not its parent's."""
    units, tokens, trunks = [], [], {}
    for i, r in enumerate(rollouts):
        of_group = trunks.setdefault(r.group, [])  # numbers of units; `parent` counts these
        own = len(r.response_ids) - 1
        if 0 <= r.parent < len(of_group) and starts_inside(r):
            u = of_group[r.parent]
            assert shares(rollouts[units[u][0]], r), f"rollout {i}, group {r.group}: its prefix is not its parent's"
            if tokens[u] + own <= budget:
                units[u].append(i)
                tokens[u] += own
                continue
        if r.parent < 0:
            of_group.append(len(units))
        units.append([i])
        tokens.append(lengths[i])
    return units, tokens


def skips(rollouts):
    """Of each rollout of a micro-batch, how many of its first tokens are its trunk's: prompt and prefix, or 0."""
    trunk, out = None, []
    for r in rollouts:
        shared = shares(trunk, r)
        out.append(len(r.prompt_ids) + len(r.prefix_ids) if shared else 0)
        trunk = trunk if shared else r
    return out
