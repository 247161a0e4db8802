"""Token advantages in prime-rl: credit for each sampled token of a trace.

    python examples/export_prime_rl.py episodes.jsonl

An algorithm of prime-rl's calls `assign_advantages(trace, values)` in its `score_group`, with one
number for each sampled token, in order over the trace's nodes. `assign` does so for traces whose
texts are in a file; in an `Algorithm` of your own, `score_group(episodes)` would call it with their
traces. prime-rl has no KL to a reference in this loss, so the penalty is part of the advantages.
Checked with `assign_advantages` of commit 559b447 (prime-rl is not on PyPI).

What it leaves out: a training run, which needs GPUs; and traces that branch.
"""

import sys

from tokenenv.agents.run.export import read_episodes, token_advantages


def sampled_advantages(rows):
    """Return a list for each row: the advantages of the tokens that the policy wrote."""
    return [
        [value for value, own in zip(values, row["own"], strict=True) if own]
        for values, row in zip(token_advantages(rows), rows, strict=True)
    ]


def assign(traces, rows, assign_advantages):
    """Give each trace the advantages of its row, by prime-rl's own `assign_advantages`."""
    for trace, values in zip(traces, sampled_advantages(rows), strict=True):
        assign_advantages(trace, values)


def main(path):
    """Show what the trainer would be given."""
    rows = read_episodes(path)
    found = sampled_advantages(rows)
    print(f"{len(rows)} traces, {sum(map(len, found))} sampled tokens")
    print("the first:", [round(value, 3) for value in found[0]])


if __name__ == "__main__":
    main(sys.argv[1])
