"""How the seed papers evaluate, as presets of ``hapo-async eval --protocol``.

A protocol names its benchmarks, the answers per prompt on each, and how these are sampled. What a paper does not say is
not set here: ``notes`` lists it, and the configuration decides. A benchmark is recognised by the name of its file.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from hapo_async.errors import ConfigError

AIME24, AIME25, AIME26 = r"aime(20)?24", r"aime(20)?25", r"aime(20)?26"
AMC, AMC23, AMC24 = r"amc(\d\d)?(\d\d)?", r"amc(20)?23", r"amc(20)?24"
MATH500, MINERVA, OLYMPIAD = r"math500", r"minerva(math)?", r"olympiad(bench)?(math)?"
GSM8K, PERTURB, GAOKAO = r"gsm8k(test)?", r"mathperturb\w*", r"gaokao\w*"
ARC, GPQA = r"arcc(hallenge)?", r"gpqa(diamond)?"
SAMPLED_BY = ("temperature", "top_p", "max_tokens")


@dataclass(frozen=True)
class Protocol:
    """One paper's way. benchmarks: (pattern of the name, answers per prompt). other: answers on benchmarks that it does
    not name. None: the paper does not say. k_is_n: it reports pass@k up to all answers. bootstrap: draws of its
    bootstrap, 0 when pass@k is the unbiased estimate."""

    name: str
    benchmarks: tuple[tuple[str, int], ...]
    other: int = 1
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    k_is_n: bool = False
    bootstrap: int = 0

    def answers(self, benchmark: str) -> int | None:
        """Answers per prompt on a benchmark, None when the protocol does not name it."""
        plain = re.sub(r"[^a-z0-9]", "", benchmark.lower())
        return next((n for pattern, n in self.benchmarks if re.fullmatch(pattern, plain)), None)


PROTOCOLS = {
    p.name: p
    for p in (
        Protocol("000", ((AIME24, 32), (MATH500, 1), (OLYMPIAD, 1)), temperature=0.6, max_tokens=8192),
        Protocol(
            "001", ((AIME24, 32), (AIME25, 32), (AIME26, 32), (r"aime", 32), (AMC, 32), (MINERVA, 4), (OLYMPIAD, 4))
        ),
        Protocol(
            "002",
            ((AIME24, 32), (AIME25, 32), (AMC, 32), (MATH500, 1), (MINERVA, 1), (OLYMPIAD, 1), (ARC, 1), (GPQA, 1)),
            temperature=0.6,
            top_p=0.95,
            bootstrap=1000,
        ),
        Protocol(
            "003",
            (
                *((name, 8) for name in (GSM8K, MATH500, PERTURB, GAOKAO, OLYMPIAD)),
                *((name, 32) for name in (AMC23, AMC24, AIME24, AIME25, AIME26)),
            ),
            other=8,
            temperature=0.7,
        ),
        Protocol(
            "004",
            ((AIME24, 256), (AIME25, 256), (AMC23, 256), (MATH500, 16), (MINERVA, 16)),
            other=16,
            k_is_n=True,
        ),
    )
}


def get(name: str) -> Protocol:
    """Raises ConfigError for an unknown name."""
    if name not in PROTOCOLS:
        raise ConfigError(f"protocol {name!r} is unknown. Known: {', '.join(PROTOCOLS)}.")
    return PROTOCOLS[name]


def overrides(protocol: Protocol | None, benchmark: str, n: int | None = None, k: int | None = None) -> list[str]:
    """``eval.*`` overrides for one benchmark; n and k given by the user win. Without a protocol n and k are 1."""
    named = protocol.answers(benchmark) if protocol else None
    default = named or (protocol.other if protocol else 1)
    answers = default if n is None else n
    size = (answers if protocol and protocol.k_is_n else 1) if k is None else k
    values: dict[str, float | None] = {"n": answers, "k": size}
    if protocol:
        values |= {f"sampling.{name}": getattr(protocol, name) for name in SAMPLED_BY}
    if answers > 1 and values.get("sampling.temperature") is None:
        values["sampling.temperature"] = 1.0  # greedy answers would all be the same
    return [f"eval.{name}={value}" for name, value in values.items() if value is not None]


def notes(protocol: Protocol, benchmarks: Sequence[str], given: Collection[str] = ()) -> list[str]:
    """What a user should know: benchmarks that the paper does not have, and settings that it does not give. given: names
    of settings that the user has set."""
    out = []
    unnamed = [] if "n" in given else [b for b in benchmarks if protocol.answers(b) is None]
    for benchmark in unnamed:
        count = f"{protocol.other} answer{'s' if protocol.other > 1 else ''} per prompt"
        out.append(f"protocol {protocol.name} does not name {benchmark!r}: its default of {count} is used")
    missing = [name for name in SAMPLED_BY if getattr(protocol, name) is None]
    missing = [name for name in missing if name not in given]
    if missing:
        names = ", ".join(f"eval.sampling.{name}" for name in missing)
        sampled = " (temperature 1 where there are several answers)" if "temperature" in missing else ""
        out.append(f"protocol {protocol.name} does not give {names}: the configuration decides{sampled}")
    return out
