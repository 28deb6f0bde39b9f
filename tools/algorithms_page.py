"""Writes docs/algorithms.md from the table of algorithms, and from measured differences to independent implementations.

    python tools/algorithms_page.py

The parts, equations, options and defaults are ``Algorithm.describe``; the differences come from ``tests/oracles`` on its
fixed batches, as upper powers of ten. ``tests/test_oracles.py`` fails when the page and the code disagree.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/algorithms.md"
CLOSED_FORM = "closed form"
LEAST = -13  # differences of rounding alone are all shown as this power of ten

Measured = Mapping[str, Mapping[str, tuple[str, str]]]
"""algorithm -> what it was compared with -> (value, gradient), as they are printed."""

INTRO = """# Algorithms

Written by `python tools/algorithms_page.py` from the code; a test compares the two. `hapo-async explain NAME` prints the
same for one algorithm, `hapo-async explain A B` what two of them do differently.

ℓ = log π_θ(y_t) now; ℓp = log-prob under the proximal policy; ℓb = as recorded by the generator; ℓr = under the
reference; ρ = exp(ℓ − ℓp); A never carries a gradient; sg stops one; H = token entropy; [x]₊ = max(x, 0). The weight on
∇ℓ of a token is mask · A · weight · π_θ / π_ref, with π_ref the *reference denominator*; one surrogate,
−reduce(mask · A · weight · exp(ℓ − sg(log_ref))), gives the gradient of every row. The value is −J.

*Compared with*: every algorithm has a second implementation in plain Python floats, written from its specification alone
(`tests/oracles`), and where verl 0.9.1 or TRL 1.16.0 have the function, theirs. *Value* is the largest difference of −J
over max(1, |J|); *gradient* the largest difference of an entry over its own size (not below a millionth of the largest
entry); both in fp64 over {batches} seeded batches, among them empty, masked, degenerate and adversarial ones (peers:
{peer_batches} ordinary ones, with the options that they have).

Papers: 000 HAPO (Hindsight-Anchored Policy Optimization); 001 HAPO (Hindsight-Aware, signed capacity: only its abstract
is public, so what is here is our reconstruction); 002 HPT and the unified policy gradient estimator; 003 FPA; 004 APO.

Options that all algorithms share:

{shared}

| name | what it is | trains on | reduction | papers |
| --- | --- | --- | --- | --- |
"""

ADDITIVE = {
    "kl_coef": "− kl_coef · KL(θ‖ref) on rollout tokens (estimate `kl`, where `kl_where`)",
    "tau": "− τ · KL(ref‖θ)",
    "critic": "− value_coef · max((V−G)², (clip(V, V_old ± value_clip)−G)²) with a critic",
    "entropy_coef": "+ entropy_coef · H",
}
PARTS = {
    "reference": "Reference denominator",
    "mask": "Stabilisation mask",
    "weight": "Weight",
    "J_per_token": "J per token",
}
FILTERS = ("filter", "band_low", "band_high", "overlong")


def page(measured: Measured, batches: int, peer_batches: int) -> str:
    """The whole page. measured: one entry per algorithm."""
    from hapo_async import algorithms

    rows = [algorithms.get(name).describe() for name in algorithms.names()]
    overview = [
        f"| [`{d['name']}`](#{d['name']}) | {_cell(d['title'])} | {'cached answers' if d['offline'] else d['composition']} | "
        f"{d['reduction'].partition(':')[0]} | {', '.join(d['seed_papers'])} |"
        for d in rows
    ]
    entries = [set(_options(d)) for d in rows]
    shared = [line for line in _options(rows[0]) if all(line in each for each in entries)]
    intro = INTRO.format(
        batches=batches, peer_batches=peer_batches, shared=_table("option | default | meaning", shared)
    )
    sections = (section(d, measured[d["name"]], shared) for d in rows)
    return intro + "\n".join(overview) + "\n" + "".join(sections)


def section(d: Mapping[str, Any], measured: Mapping[str, tuple[str, str]], shared: Sequence[str]) -> str:
    """One algorithm: equation, the five parts, what is added and kept, its own options, comparisons."""
    lines = ["", f"## {d['name']}", "", f"**{d['title']}** (papers: {', '.join(d['seed_papers'])})"]
    if "note" in d:
        lines += ["", f"Note: {d['note']}."]
    lines += ["", f"    {d['equation']}", "", f"- Trains on: {d['trains_on']}; keeps {d['keep']}"]
    lines += [f"- Gate: {'HAPO’s gate decides about injection' if d['uses_gate'] else 'none'}"]
    filters = [f"`{f}={_text(d['defaults'][f])}`" for f in FILTERS if f in d["defaults"]]
    lines += [f"- Filters: {', '.join(filters) or 'none'}"]
    lines += [f"- Advantage: {d['advantage']}"]
    for key, label in PARTS.items():
        lines += [f"- {label}, {who}: {text}" for who, text in d[key].items()]
    lines += [f"- Reduction: {d['reduction']}"]
    lines += [f"- Added to J: {text}" for key, text in ADDITIVE.items() if key in d["defaults"]]
    lines += [f"- Needs: {', '.join(d['needs']) or 'log-probs alone'}"]
    lines += ["", _table("option | default | meaning", [line for line in _options(d) if line not in shared])]
    compared = [f"{what} | {value} | {gradient}" for what, (value, gradient) in measured.items()]
    lines += ["", _table("compared with | value | gradient", compared)]
    return "\n".join(lines) + "\n"


def _options(d: Mapping[str, Any]) -> list[str]:
    return [f"`{k}` | `{_text(d['defaults'][k])}` | {_cell(text)}" for k, text in d["options"].items()]


def _table(head: str, rows: Sequence[str]) -> str:
    rule = " | ".join(["---"] * (head.count("|") + 1))
    return "\n".join(f"| {row} |" for row in (head, rule, *rows))


def _text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def bound(difference: float) -> str:
    """An upper power of ten with one digit to spare, so that another machine's rounding prints the same."""
    power = LEAST if difference <= 0 else max(LEAST, math.ceil(math.log10(10 * difference)))
    return f"< 1e{power}"


def measure() -> dict[str, dict[str, tuple[str, str]]]:
    """Every algorithm against its oracle and its peers. Takes about a quarter of a minute."""
    from hapo_async import algorithms
    from tests.oracles import compare

    out = {}
    for name in algorithms.names():
        each = list(compare.against_oracle(name).values())
        found = {CLOSED_FORM: (max(v for v, _ in each), max(g for _, g in each)), **compare.against_peers(name)}
        out[name] = {what: (bound(value), bound(gradient)) for what, (value, gradient) in found.items()}
    return out


def recorded(text: str) -> dict[str, dict[str, tuple[str, str]]]:
    """The comparisons that a page holds."""
    out: dict[str, dict[str, tuple[str, str]]] = {}
    for part in text.split("\n## ")[1:]:
        found = re.findall(r"^\| (.+?) \| (< 1e-?\d+) \| (< 1e-?\d+) \|$", part, re.MULTILINE)
        out[part.split("\n", 1)[0]] = {what: (value, gradient) for what, value, gradient in found}
    return out


def main() -> None:
    from tests.oracles.batches import BATCHES
    from tests.oracles.compare import PEER_BATCHES

    PAGE.write_text(page(measure(), len(BATCHES), len(PEER_BATCHES)), encoding="utf-8")
    print(f"written to {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
