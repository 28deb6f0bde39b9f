"""The driver: one process that owns the ledger, the buffer and the version, and moves headers, never payloads.

Every loop, what it waits for, and who unblocks it:

| loop             | consumes                  | waits for                           | unblocked by                      |
|------------------|---------------------------|-------------------------------------|-----------------------------------|
| sampling.feed    | prompts, retries          | capacity of a generator (admission) | a trained or dropped group        |
| sampling.follow  | one issued group          | generator, verifier                 | their answer, or their deadline   |
| fleet.install    | the newest manifest       | a generator to apply it             | its answer, or weights.deadline_s |
| offline.generate | prompts without answers   | generator, verifier (offline alone) | their answer; asked three times   |
| training.run     | the buffer, oldest first  | a full batch; overdue groups        | follow; late_deadline_s           |
| training.publish | the learner's new version | the learner's ranks                 | their answer; learner.deadline_s  |

Bounds: groups in flight and buffered together never exceed (max_staleness + 1) x batch_prompts (``admission``).
"""
