"""Hostile and degenerate answers for the judge, and how it stands them:
`python tools/hostile_corpus.py OUT.jsonl [--count 2400] [--seed 0] [--judge] [--math500 FILE] [--write]`.

OUT gets one JSON object per case: prompt, response, truth, class, expected (correct: an honest answer; none: anything but a
reward; masked: the truth itself is hostile). The same seed gives the same file. With --judge every case goes through a
VerifierPool, honest ones between hostile ones; then a plug-in that spins, bombs and crashes in its worker. --math500 takes a
list of {answer} and compares with Math-Verify on pairs of its answers. --write keeps the result in
benchmarks/results/verifier.json.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measured
from honest_answers import benign
from hostile_cases import (
    Maker,
    blowup,
    collections,
    control,
    look_alikes,
    magnitude,
    nesting,
    regexes,
    size,
)
from hostile_claims import bad_truths, boxes, hedges, injections, negations, relations
from hostile_near import leftovers, neighbours, surroundings
from hostile_plugin import DEEDS

from hapo_async.types import FAILURES, Judgement
from hapo_async.verify.pool import VerifierPool

Case = dict[str, Any]
CLASSES: dict[str, Maker] = {
    "magnitude": magnitude,
    "nesting": nesting,
    "size": size,
    "collections": collections,
    "blow-up": blowup,
    "regex": regexes,
    "look-alikes": look_alikes,
    "control": control,
    "boxes": boxes,
    "relations": relations,
    "negations": negations,
    "hedges": hedges,
    "surroundings": surroundings,
    "leftovers": leftovers,
    "neighbours": neighbours,
    "injections": injections,
    "bad truths": bad_truths,
    "benign": benign,
}
STRICT = ("relations", "negations", "boxes")
BENIGN_SHARE = 0.25
NEIGHBOURS, ROUNDS = 64, 5
DEED_TIMEOUT_S = 2.0


def cases(count: int, seed: int) -> list[Case]:
    """At least ``count`` cases, in random order; a quarter of them are honest, the classes of the others are equally large."""
    rng = random.Random(seed)
    hostile = [name for name in CLASSES if name != "benign"]
    out = []
    for name, make in CLASSES.items():
        share = BENIGN_SHARE if name == "benign" else (1 - BENIGN_SHARE) / len(hostile)
        made = make(rng)
        expected = {"benign": "correct", "bad truths": "masked"}.get(name, "none")
        for number in range(math.ceil(share * count)):
            response, truth = next(made)
            row = {"prompt": f"{name} {number}", "response": response, "truth": truth}
            out.append({**row, "class": name, "expected": expected})
    rng.shuffle(out)
    return out


def judged(corpus: Sequence[Case], workers: int, timeout_s: float) -> dict[str, Any]:
    """Per class: cases, verdicts, charged, masked, and what came out otherwise than expected; times per verdict [s]."""
    with VerifierPool("auto", workers, timeout_s) as pool:
        start = time.perf_counter()
        outcomes = pool.judge([(c["prompt"], c["response"], c["truth"]) for c in corpus])
        seconds, stats = time.perf_counter() - start, pool.stats()
    classes: dict[str, Any] = {}
    for name in CLASSES:
        pairs = [(c, j) for c, j in zip(corpus, outcomes, strict=True) if c["class"] == name]
        classes[name] = _class(pairs)
    honest = [j for c, j in zip(corpus, outcomes, strict=True) if c["expected"] == "correct"]
    wrong = sum(j.reward != 1.0 for j in honest)
    return {
        "cases": len(corpus),
        "seconds": round(seconds, 1),
        "workers": workers,
        "timeout_s": timeout_s,
        "false_accepts": sum(c["false_accepts"] for c in classes.values()),
        "false_accepts_strict": sum(classes[name]["false_accepts"] for name in STRICT),
        "false_rejects": wrong,
        "false_reject_share": round(wrong / len(honest), 4),
        "neighbours_affected": sum(j.verdict in FAILURES for j in honest),
        "truths_not_masked": classes["bad truths"]["unexpected"],
        "longest_past_deadline_s": round(stats["overstay_s"], 3),
        "workers_started": stats["workers_started"],
        "classes": classes,
        "verdict_seconds": _times(outcomes),
    }


def _class(pairs: Sequence[tuple[Case, Judgement]]) -> dict[str, Any]:
    odd = [(c, j) for c, j in pairs if not _is_expected(c, j)]
    return {
        "cases": len(pairs),
        "verdicts": dict(Counter(str(j.verdict) for _, j in pairs)),
        "charged": sum("charged" in j.tally for _, j in pairs),
        "masked": sum("masked" in j.tally for _, j in pairs),
        "false_accepts": sum(c["expected"] != "correct" and j.reward == 1.0 for c, j in pairs),
        "unexpected": len(odd),
        "examples": [[c["response"][-120:], str(c["truth"])[:60], str(j.verdict), j.detail[:120]] for c, j in odd[:5]],
    }


def _is_expected(case: Case, judgement: Judgement) -> bool:
    wanted = {"correct": 1.0, "none": 0.0, "masked": None}[case["expected"]]
    return judgement.reward == wanted


def _times(outcomes: Sequence[Judgement]) -> dict[str, Any]:
    seconds: dict[str, list[float]] = defaultdict(list)
    for outcome in outcomes:
        seconds[str(outcome.verdict)].append(outcome.seconds)
    return {name: {"count": len(s), **_percentiles(s)} for name, s in sorted(seconds.items())}


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    ranked = sorted(seconds)
    at = {
        name: ranked[min(len(ranked) - 1, int(share * len(ranked)))]
        for name, share in (("p50_s", 0.5), ("p99_s", 0.99))
    }
    return {name: float(f"{value:.3g}") for name, value in at.items()}


def deeds(workers: int, timeout_s: float, rounds: int) -> dict[str, Any]:
    """What a plug-in does to its worker: verdicts per deed, neighbours that came out otherwise than right, time past the
    deadline."""
    verdicts: dict[str, Counter[str]] = defaultdict(Counter)
    affected = 0
    with VerifierPool("hostile_plugin:verify", workers, timeout_s) as pool:
        for number in range(rounds):
            for deed in DEEDS:
                answers = ["fine"] * NEIGHBOURS
                answers[(number * 7) % NEIGHBOURS] = deed
                for answer, judgement in zip(answers, pool.judge([("", a, number) for a in answers]), strict=True):
                    if answer == deed:
                        verdicts[deed][f"{judgement.verdict} {judgement.fault}".strip()] += 1
                    else:
                        affected += judgement.reward != 1.0
        overstay_s = pool.stats()["overstay_s"]
    return {
        "each": rounds,
        "neighbours": NEIGHBOURS - 1,
        "neighbours_affected": affected,
        "verdicts": {deed: dict(found) for deed, found in verdicts.items()},
        "longest_past_deadline_s": round(overstay_s, 3),
    }


def throughput(corpus: Sequence[Case]) -> dict[str, float]:
    """Answers that one worker judges, per second of wall clock and per second of processor time, its pool's included: numbers,
    which never reach sympy, and the honest answers of the corpus."""
    numbers = [("", rf"some words and \boxed{{{n}}}", n) for n in range(4000)]
    honest = [("", c["response"], c["truth"]) for c in corpus if c["expected"] == "correct"][:600]
    out = {}
    with VerifierPool("auto", 1, 30.0) as pool:
        pool.judge(honest[:64])
        (pid,) = pool.stats()["worker_pids"]
        for name, items in (("numbers", numbers), ("benign", honest)):
            start, used = time.perf_counter(), _cpu_s(pid) + time.process_time()
            pool.judge(items)
            out[f"{name}_per_s"] = round(len(items) / (time.perf_counter() - start), 1)
            out[f"{name}_per_core_s"] = round(len(items) / (_cpu_s(pid) + time.process_time() - used), 1)
    return out


def _cpu_s(pid: int) -> float:
    """Processor time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def against_math_verify(path: str, others: int, seed: int) -> dict[str, Any]:
    """Each answer of the file as truth, judged by both against itself, against itself as sympy would write it, and against
    ``others`` of the other ones. Agreement: the same answer to 'is it correct'."""
    from math_verify import parse, verify
    from sympy import latex

    golds = [str(row["answer"]) for row in json.loads(Path(path).read_text())]
    rng = random.Random(seed)
    pairs = [("itself", gold, gold) for gold in golds]
    pairs += [("another", a, gold) for gold in golds for a in rng.sample(golds, others)]
    for gold in golds:
        found = parse(f"${gold}$")
        if found and not isinstance(found[0], str):
            pairs.append(("rewritten", latex(found[0]), gold))
    with VerifierPool("auto", 2, 30.0) as pool:
        ours = [j.reward == 1.0 for j in pool.judge([("", rf"\boxed{{{a}}}", gold) for _, a, gold in pairs])]
    theirs = [bool(verify(parse(f"${gold}$"), parse(rf"\boxed{{{a}}}"))) for _, a, gold in pairs]
    kinds = {}
    for kind in ("itself", "rewritten", "another"):
        both = [(o, t) for (k, _, _), o, t in zip(pairs, ours, theirs, strict=True) if k == kind]
        same = sum(o == t for o, t in both)
        accepted = {"accepted": sum(o for o, _ in both), "accepted_by_math_verify": sum(t for _, t in both)}
        kinds[kind] = {"pairs": len(both), "agreement": round(same / len(both), 5), **accepted}
    differ = [
        {"pair": kind, "answer": a, "truth": gold, "ours": o}
        for (kind, a, gold), o, t in zip(pairs, ours, theirs, strict=True)
        if o != t
    ]
    return {
        "file": Path(path).name,
        "pairs": len(pairs),
        "agreement": round(1 - len(differ) / len(pairs), 5),
        **kinds,
        "disagreements": differ,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=2400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--judge", action="store_true")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--timeout-s", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of each deed of the plug-in")
    parser.add_argument("--math500")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    corpus = cases(args.count, args.seed)
    args.out.write_text("".join(json.dumps(case) + "\n" for case in corpus))
    if not args.judge:
        return
    result: dict[str, Any] = {
        "command": "python tools/hostile_corpus.py " + " ".join(Path(a).name if "/" in a else a for a in sys.argv[1:]),
        "load": round(os.getloadavg()[0], 1),
        "math-verify": importlib.metadata.version("math-verify"),
        "sympy": importlib.metadata.version("sympy"),
        "corpus": judged(corpus, args.workers, args.timeout_s),
        "deeds": deeds(args.workers, DEED_TIMEOUT_S, args.rounds),
        "throughput_one_worker": throughput(corpus),
    }
    if args.math500:
        result["against_math_verify"] = against_math_verify(args.math500, 3, args.seed)
    print(json.dumps(result, indent=1))
    if args.write:
        measured.write("verifier", result)


if __name__ == "__main__":
    main()
