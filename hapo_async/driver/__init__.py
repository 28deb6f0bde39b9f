"""The driver: one process that owns the ledger, the buffer and the version, and moves headers, never payloads.

Every loop, what it consumes, what it waits for, who unblocks it, and what bounds it:

| loop              | consumes                  | waits for                           | unblocked by                      |
|-------------------|---------------------------|-------------------------------------|-----------------------------------|
| sampling.feed     | prompts, retries          | capacity of a generator (admission) | a trained or dropped group        |
| sampling.follow   | one issued group          | generator, verifier                 | their answer, or their deadline   |
| fleet.install     | the newest manifest       | a generator to apply it             | its answer, or weights.deadline_s |
| upkeep.replace    | a dead generator          | backoff; a place; it to be ready    | their deadlines; a few tries      |
| upkeep.retire     | a generator that leaves   | its groups, then their hand-over    | its deadline                      |
| judges.replace    | a dead verifier           | backoff; it to be ready             | its deadline; a few tries         |
| scaling.run       | one request at a time     | those that come, those that leave   | their deadlines, and the request's|
| fleet.detach      | one generator             | its groups, then one install        | their answers, or its deadline    |
| offline.generate  | prompts without answers   | generator, verifier (offline alone) | their answer; asked three times   |
| training.run      | the buffer, oldest first  | a full batch; overdue groups        | follow; late_deadline_s           |
| training.prefetch | what arrives beside a step| the step                            | the step's end                    |
| training.turn     | (colocated) both sides    | the other side to sleep             | its answer, or its deadline       |
| training.publish  | the learner's new version | the learner's ranks                 | their answer; learner.deadline_s  |
| journal.record    | the groups of one step    | their payloads, the disk            | at most one step is behind        |
| evaluation.beside | one evaluation at a time  | a detached generator, verifiers     | their answers, or their deadlines |
| canary            | one version               | learner; generators that serve it   | their answers, or a deadline      |
| watchdog          | heartbeats                | the clock                           | itself; one call per actor        |

Bounds: groups in flight and buffered together never exceed (max_staleness + 1) x batch_prompts (``admission``); the
buffer holds no more, so nothing ever waits for room in it: back-pressure is that ``feed`` issues nothing
(``buffer/blocked_s``). Payloads stay in the object store, owned by the generators that made them.
"""
