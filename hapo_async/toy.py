"""The built-in task, tagged chain arithmetic, and the small model that is shipped with it.

A prompt holds a number and k tagged steps, worked from left to right modulo 100; the solution writes every step out:

    36a+2b*3c-9?   ->   a36+2=38;b38*3=14;c14-9=05;\\boxed{05}

Numbers always have two digits, so a solution has 9k+4 tokens (one per character, ``\\boxed{`` is one) and its
end-of-text token. A quarter of the prompts are easy (k = 2, 3), the others hard (k = 4..6). The shipped model knows
every step by heart but habitually stops a hard chain early and boxes what it has: it has to learn to go on, and a
reward at the end of the whole chain alone is too rare to teach it that. ``tools/make_chain_model.py`` makes the model.

Whether a prompt belongs to training or to evaluation is a property of its text (a checksum), so the two can never
overlap, whatever the seeds.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import zlib
from pathlib import Path
from typing import TypedDict

MODEL_DIR = Path(__file__).parent / "assets" / "chain"

MODULUS = 100
EASY_STEPS = (2, 3)
HARD_STEPS = (4, 5, 6)
EASY_SHARE = 0.25
TAGS = "abcdef"
SPLITS = ("train", "eval")
EVAL_ONE_IN = 5  # so many prompt texts have one that belongs to the eval split
BUILTIN_ROWS = {"train": 1024, "eval": 200}


class Row(TypedDict):
    """One exercise. ``answer`` is what ``\\boxed{}`` must hold; ``k`` the number of steps."""

    prompt: str
    answer: str
    solution: str
    k: int


class Chain(TypedDict):
    """An exercise before it is written down: the start value and (operator, operand) per step."""

    start: int
    steps: list[tuple[str, int]]


def rows(split: str, n: int, seed: int) -> list[Row]:
    """``n`` distinct exercises of a split ("train" or "eval"), the same for the same (split, n, seed).

    The first rows do not depend on ``n``. Raises ValueError for an unknown split or a negative n.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} does not exist. The splits of the built-in task are {' and '.join(SPLITS)}.")
    if n < 0:
        raise ValueError(f"n={n} rows cannot be made. Use 0 or more.")
    rng = random.Random(f"{split}/{seed}")
    out: list[Row] = []
    seen: set[str] = set()
    while len(out) < n:
        k = rng.choice(EASY_STEPS if rng.random() < EASY_SHARE else HARD_STEPS)
        chain = draw(rng, k)
        row = write(chain)
        if split_of(row["prompt"]) == split and row["prompt"] not in seen and not has_shortcut(chain):
            seen.add(row["prompt"])
            out.append(row)
    return out


def builtin_rows(split: str) -> list[Row]:
    """The rows behind ``builtin:chain/train`` (1,024) and ``builtin:chain/eval`` (200). Raises ValueError."""
    return rows(split, BUILTIN_ROWS.get(split, 0), seed=0)


def split_of(prompt: str) -> str:
    """The split that a prompt's text belongs to, whatever the seed."""
    return "eval" if zlib.crc32(prompt.encode()) % EVAL_ONE_IN == 0 else "train"


def draw(rng: random.Random, k: int) -> Chain:
    """A random chain of ``k`` steps: +d and -d with d in 1..9, *d with d in 2, 3."""
    operators = [rng.choice("+-*") for _ in range(k)]
    steps = [(op, rng.choice((2, 3)) if op == "*" else rng.randint(1, 9)) for op in operators]
    return Chain(start=rng.randrange(MODULUS), steps=steps)


def has_shortcut(chain: Chain) -> bool:
    """Whether boxing the start or an intermediate value would be right by coincidence. Rows have no such chains: their
    rewards for stopping one step later, not at once, would teach plain GRPO to go on."""
    values = [chain["start"]]
    for op, d in chain["steps"]:
        values.append(apply(values[-1], op, d))
    return values[-1] in values[:-1]


def write(chain: Chain) -> Row:
    """The prompt, the written-out solution and the answer of a chain."""
    value = chain["start"]
    prompt, solution = f"{value:02d}", ""
    for tag, (op, d) in zip(TAGS, chain["steps"], strict=False):
        after = apply(value, op, d)
        prompt += f"{tag}{op}{d}"
        solution += f"{tag}{value:02d}{op}{d}={after:02d};"
        value = after
    answer = f"{value:02d}"
    return Row(prompt=prompt + "?", answer=answer, solution=f"{solution}\\boxed{{{answer}}}", k=len(chain["steps"]))


def apply(value: int, op: str, d: int) -> int:
    """One step, modulo 100."""
    result = {"+": value + d, "-": value - d, "*": value * d}[op]
    return result % MODULUS


def main(argv: list[str] | None = None) -> int:
    """``python -m hapo_async.toy --split eval --n 200 --seed 7``: prints the rows as JSON lines."""
    parser = argparse.ArgumentParser(prog="python -m hapo_async.toy", description="Rows of the built-in task as JSONL.")
    parser.add_argument("--split", choices=SPLITS, default="eval")
    parser.add_argument("--n", type=int, default=200, help="rows (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="0 gives the rows of builtin:chain (default 0)")
    args = parser.parse_args(argv)
    if args.n < 0:
        parser.error(f"--n {args.n}: must be 0 or more")
    for row in rows(args.split, args.n, args.seed):
        sys.stdout.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
