"""The schedule of ``chaos.py``: which runs there are, and which faults happen to each, from a seed.

A case is one run folder, and the same command again and again until the run is complete. Its *main* faults come one after the
other, each when the one before has been got over; the others are armed at their step and happen beside them.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from weight_faults import DAMAGE

STAGES = ("generating", "verifying", "broadcasting", "stepping", "saving")
SUB_STEPS = 14
"""At least so many things that a driver does to files make a checkpoint."""
BUCKETS = 6
"""At least so many buckets make a version."""
CHECKPOINT_DAMAGE = ("truncate", "flip", "delete")

COMMON = (
    *("model=builtin:chain", "data.train=builtin:chain/train", "data.demonstrations=256", "data.max_prompt_tokens=32"),
    *("algorithm=hapo", "sampling.n=4", "sampling.max_tokens=48", "max_staleness=2", "train.batch_prompts=4"),
    *("train.checkpoint_every=5", "train.keep_checkpoints=3", "data.eval=[]", "rollouts.sample=1.0"),
    *("learner.lr=1e-5", "learner.deadline_s=20", "learner.max_bad_steps=8", "staleness.late_deadline_s=5"),
    *("generator.engine=transformers", "generator.count=2", "generator.max_concurrent=4", "generator.deadline_s=15"),
    *("weights.deadline_s=4", "weights.bucket_bytes=32768", "verifier.count=2", "verifier.workers=2"),
    *("verifier.timeout_s=1.5", "run.alarms={silence_s: 4, canary_every: 0}"),
)
"""Deadlines are short: what they do not see in time must not take the schedule a day."""


@dataclass(frozen=True)
class Fault:
    """One fault. what: kill, stop, term, or a kind of damage. who: what it happens to. stage: what must be in progress, "" where
    it lies in the fault itself. step: not before so many steps of the run. args: of the kind."""

    id: str
    what: str
    who: str
    stage: str = ""
    step: int = 0
    args: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The class that it is counted in."""
        return f"{self.who} {self.what}"


@dataclass(frozen=True)
class Case:
    """One run. steps: it has so many; 0: it is stopped (SIGTERM) once all faults have happened, at ``least`` or later, and the
    same command with a few steps more completes it. needs: what the command around it has to provide: "disk" (a small file
    system for its checkpoints), "nodes" (a second Ray node), "ports" (occupied ones). outside: faults from outside, one for
    each start of the command, until there are none left."""

    name: str
    settings: tuple[str, ...]
    main: tuple[Fault, ...] = ()
    beside: tuple[Fault, ...] = ()
    outside: tuple[Fault, ...] = ()
    steps: int = 0
    least: int = 0
    needs: str = ""

    @property
    def faults(self) -> tuple[Fault, ...]:
        return (*self.main, *self.beside, *self.outside)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, tree: dict[str, Any]) -> Case:
        lists = {name: tuple(Fault(**f) for f in tree[name]) for name in ("main", "beside", "outside")}
        return cls(**{**tree, "settings": tuple(tree["settings"]), **lists})


class Writer:
    """Makes the faults of one case: numbered, and drawn from the seed and the case's name."""

    def __init__(self, case: str, seed: int) -> None:
        self.case, self.rng, self._count = case, random.Random(f"{seed}/{case}"), 0

    def fault(self, what: str, who: str, stage: str = "", step: int = 0, **args: Any) -> Fault:
        self._count += 1
        return Fault(f"{self.case}-{self._count:03d}", what, who, stage, step, args)

    def signals(self, who: str, stages: Sequence[str], kills: int, stops: int) -> list[Fault]:
        """Kills and stops over the stages, in an order of their own."""
        wanted = ["kill"] * kills + ["stop"] * stops
        offset = self.rng.randrange(len(stages))
        out = [self.fault(what, who, stages[(i + offset) % len(stages)]) for i, what in enumerate(wanted)]
        self.rng.shuffle(out)
        return out

    def spread(self, who: str, what: Iterable[str], first: int, every: float, **args: Any) -> list[Fault]:
        """One after the other from step ``first`` on, each ``every`` steps after the last."""
        kinds = list(what)
        self.rng.shuffle(kinds)
        return [self.fault(kind, who, step=int(first + every * i), **args) for i, kind in enumerate(kinds)]

    def shuffled(self, *parts: Iterable[Fault]) -> tuple[Fault, ...]:
        out = [fault for part in parts for fault in part]
        self.rng.shuffle(out)
        return tuple(out)


def paced(faults: Sequence[Fault], steps: int) -> tuple[Fault, ...]:
    """Spread evenly over the steps of a run."""
    every = steps / (len(faults) + 1)
    return tuple(replace(fault, step=round(every * (i + 1))) for i, fault in enumerate(faults))


def schedule(seed: int) -> list[Case]:
    """The whole schedule, longest runs last."""
    return [
        *(random_driver(seed, number) for number in range(10)),
        *(staged_driver(seed, number) for number in range(2)),
        terms(seed),
        ports(seed),
        verifiers(seed),
        numbers(seed),
        *(generators(seed, transport) for transport in ("ray", "zmq", "gloo")),
        *(learner(seed, ranks) for ranks in (1, 2)),
        disk(seed),
        nodes(seed),
        vllm(seed),
    ]


def generators(seed: int, transport: str) -> Case:
    """Generators die and freeze while buckets are damaged on their way."""
    w = Writer(f"generators-{transport}", seed)
    main = w.shuffled(w.signals("generator", STAGES, 5, 4), [w.fault("stop", "driver", seconds=6.0)])
    damage = [*DAMAGE] * 3 + (["vanish"] * 4 if transport == "zmq" else ["flip"] * 2)
    beside = [
        *w.spread("generator-weights", damage, 4, 9, after=w.rng.randrange(1, BUCKETS - 1)),
        *w.spread("rank-weights", [*DAMAGE] * 2, 8, 13, after=w.rng.randrange(1, BUCKETS - 1)),
    ]
    settings = (*COMMON, f"weights.transport={transport}")
    return Case(w.case, settings, main, tuple(beside), least=190)


def verifiers(seed: int) -> Case:
    """Verifiers and their workers die and freeze, and answers break their judges."""
    from chaos_verifier import NAME

    w = Writer("verifiers", seed)
    main = w.shuffled(
        w.signals("verifier", STAGES, 6, 6),
        w.signals("worker", ("verifying",), 6, 6),
        [w.fault("stop", "driver", seconds=6.0) for _ in range(2)],
    )
    bad = [kind for kind, count in MISBEHAVIOUR.items() for _ in range(count)]
    beside = [
        *w.spread("verdict", bad, 3, 3),
        *w.spread("verdict", ["spin", "bomb", "segv", "exit"] * 3, 5, 14, once=True),
    ]
    return Case(w.case, (*COMMON, f"verifier.name={NAME}"), main, tuple(beside), least=220)


MISBEHAVIOUR = {"spin": 12, "bomb": 10, "segv": 12, "exit": 12, "nan": 8, "inf": 6}


def numbers(seed: int) -> Case:
    """Losses, gradients and log-probs that are no numbers, and prompts that bring one each time."""
    w = Writer("numbers", seed)
    rank = [f"{bad}-{where}" for bad in ("nan", "inf") for where in ("loss", "gradient") for _ in range(10)]
    beside = [
        *w.spread("rank-number", rank, 3, 5),
        *w.spread("generator-number", ["nan-logprob", "inf-logprob"] * 10, 5, 10),
        *w.spread("generator-number", ["nan-poison", "inf-poison"] * 5, 8, 20, always=True),
    ]
    main = [w.fault("stop", "driver", seconds=6.0) for _ in range(2)]
    settings = (*COMMON, "learner.ranks=2", "learner.zero_stage=2")
    return Case(w.case, settings, tuple(main), tuple(beside), least=230)


def learner(seed: int, ranks: int) -> Case:
    """Learner ranks die and freeze, some three steps and more after a manifest, some in the middle of a checkpoint, some when the
    newest checkpoint is damaged."""
    w = Writer(f"learner-{ranks}", seed)
    main = list(w.signals("learner", STAGES[:4], 4, 4))
    for fault in main[::2]:
        fault.args["after_manifest"] = 3
    saving = [w.fault("kill", "learner", "saving", n=n) for n in (0, 2, 5)]
    damaged = [w.fault(what, "checkpoint", "training", then="kill") for what in CHECKPOINT_DAMAGE]
    settings = (
        *COMMON,
        "train.checkpoint_every=10",
        f"learner.ranks={ranks}",
        f"weights.transport={'zmq' if ranks > 1 else 'ray'}",
    )
    return Case(w.case, settings, w.shuffled(main, saving, damaged), least=180)


def random_driver(seed: int, number: int) -> Case:
    """The driver is killed twice from outside, at a random moment of its start or of its training."""
    w = Writer(f"driver-random-{number}", seed)
    early = w.fault("kill", "driver", "starting", after_s=round(w.rng.uniform(0.3, 14.0), 2))
    late = w.fault("kill", "driver", "training", at_step=w.rng.randrange(1, RANDOM_STEPS - 1))
    outside = (early, late) if number % 2 else (late, early)
    return Case(w.case, COMMON, outside=outside, steps=RANDOM_STEPS)


RANDOM_STEPS = 30


def staged_driver(seed: int, number: int) -> Case:
    """The driver kills itself in every stage and in sub-steps of a checkpoint; the newest checkpoint is damaged meanwhile."""
    w = Writer(f"driver-stages-{number}", seed)
    stages = [w.fault("kill", "driver", stage) for stage in (*STAGES[:4], "ending")]
    subs = sorted(w.rng.sample(range(SUB_STEPS), 4))
    saving = [w.fault("kill", "driver", "saving", n=n) for n in subs]
    main = paced((*w.shuffled(stages[:-1], saving), stages[-1]), 60)
    outside = [w.fault(what, "checkpoint", "resuming") for what in CHECKPOINT_DAMAGE]
    return Case(w.case, COMMON, main, outside=tuple(outside), steps=60)


def terms(seed: int) -> Case:
    """SIGTERM in every stage, half of them with a second one."""
    w = Writer("sigterm", seed)
    main = [w.fault("term", "driver", stage) for stage in STAGES]
    main += [
        w.fault("term", "driver", stage, again_s=again)
        for stage, again in zip(STAGES, (0.0, 0.2, 0.5, 1.0, 2.0), strict=True)
    ]
    return Case(w.case, COMMON, paced(w.shuffled(main), 80), steps=80)


def ports(seed: int) -> Case:
    """Ports that Ray and torch like to use are occupied."""
    w = Writer("ports", seed)
    ports = (6379, 6380, 8265, 8076, 10001, 29500, 44217, 52365)
    outside = tuple(w.fault("occupied", "port", "starting", port=port) for port in ports)
    return Case(w.case, COMMON, outside=outside, steps=20, needs="ports")


def disk(seed: int) -> Case:
    """The file system of the checkpoints is full for a while, and a write fails in the middle."""
    w = Writer("disk", seed)
    main = [w.fault("full", "disk", saves=1 + i % 2) for i in range(8)]
    main += [w.fault("error", who, "saving", n=n) for who in ("driver-save", "rank-save") for n in (1, 4)]
    return Case(w.case, COMMON, w.shuffled(main), least=120, needs="disk")


def nodes(seed: int) -> Case:
    """The node of a generator dies, with the objects that were there; and the driver, on a cluster that lives on."""
    w = Writer("nodes", seed)
    main = [
        w.fault("kill", "node", stage)
        for stage in ("generating", "broadcasting", "stepping", "verifying", "generating", "saving")
    ]
    drivers = [w.fault("kill", "driver", stage) for stage in ("generating", "stepping")]
    return Case(w.case, COMMON, w.shuffled(main, drivers), least=60, needs="nodes")


def vllm(seed: int) -> Case:
    """The process of a vLLM engine dies or freezes, under its generator."""
    w = Writer("vllm", seed)
    main = w.signals("engine", ("generating", "broadcasting"), 6, 6)
    settings = (
        *COMMON,
        "generator.engine=vllm",
        "learner.deadline_s=60",
        "weights.deadline_s=10",
        "generator.deadline_s=30",
    )
    return Case(w.case, settings, tuple(main), least=60)


def short(seed: int) -> list[Case]:
    """What ``make test`` runs: each class of fault once or more."""
    from chaos_verifier import NAME

    w = Writer("short-actors", seed)
    main = [
        w.fault("kill", "generator", "generating"),
        w.fault("stop", "verifier", "verifying"),
        w.fault("kill", "worker", "verifying"),
        w.fault("kill", "learner", "stepping", after_manifest=3),
        w.fault("stop", "worker", "verifying"),
        w.fault("stop", "generator", "broadcasting"),
        w.fault("kill", "verifier", "stepping"),
        w.fault("stop", "learner", "broadcasting"),
    ]
    beside = [
        *w.spread("verdict", MISBEHAVIOUR, 2, 2),
        *w.spread("rank-number", ["nan-loss", "inf-gradient"], 3, 4),
        *w.spread("generator-number", ["nan-logprob"], 5, 1),
        *w.spread("generator-number", ["inf-poison"], 6, 1, always=True),
        *w.spread("generator-weights", [*DAMAGE, "vanish"], 2, 3, after=2),
        *w.spread("rank-weights", ["flip", "drop"], 5, 9, after=2),
    ]
    actors = Case(
        w.case,
        (
            *COMMON,
            *(f"verifier.name={NAME}", "weights.transport=zmq", "learner.ranks=2", "train.checkpoint_every=10"),
            "run.alarms={silence_s: 2.5, canary_every: 0}",
        ),
        tuple(main),
        tuple(beside),
        least=40,
    )
    w = Writer("short-driver", seed)
    kill = w.fault("kill", "driver", "saving", n=6)
    outside = [w.fault("kill", "driver", "starting", at="ray"), w.fault("flip", "checkpoint", "resuming")]
    driver = Case(w.case, (*COMMON, "train.checkpoint_every=3"), paced([kill], 16), outside=tuple(outside), steps=16)
    return [actors, driver]
