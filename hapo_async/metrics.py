"""Numbers of a run: each is declared once, written once a step, read back by the live view and the report.

``REGISTRY`` is the whole vocabulary. Names with a ``{placeholder}`` are families, as in ``eval/{set}/pass@1``: ``{k}``
and ``{n}`` stand for a number, any other placeholder for anything without a slash. ``Writer`` refuses what is not
declared. ``hapo_async.bottleneck`` turns the times of a step into the sentence that a row ends with.
"""

from __future__ import annotations

import difflib
import functools
import json
import math
import os
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hapo_async.append import Appender
from hapo_async.board import Board
from hapo_async.bottleneck import bottleneck
from hapo_async.files import replace_whole

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
DISCARDED_FOLDER = "discarded"


@dataclass(frozen=True)
class Metric:
    """A declared number. ``unit`` is "" for counts and pure numbers; shares have the unit "share" and lie in [0, 1]."""

    name: str
    unit: str
    meaning: str

    @property
    def is_family(self) -> bool:
        return "{" in self.name


_DECLARED: tuple[tuple[str, str, str], ...] = (
    # What the policy earns
    ("reward/mean", "", "Mean reward of the step's sampled answers, before injection; unjudged answers are left out."),
    ("reward/std", "", "Standard deviation of the rewards within a group, mean over groups."),
    ("reward/component/{name}", "", "Mean of one named component of the reward."),
    ("groups/zero_variance_frac", "share", "Groups whose sampled answers all earned the same: no advantage."),
    ("groups/solved_frac", "share", "Groups with at least one correct sampled answer."),
    ("groups/all_correct_frac", "share", "Groups whose sampled answers were all correct."),
    ("response/length_mean", "tokens", "Mean length of the sampled answers."),
    ("response/length_max", "tokens", "Longest sampled answer."),
    ("response/length_hist/{tokens}", "answers", "Sampled answers of so many tokens up to the next power of two."),
    ("response/truncated_frac", "share", "Sampled answers that ran out of tokens instead of ending by themselves."),
    ("response/multi_version_frac", "share", "Groups whose sampled tokens come from two or more weight versions."),
    # Held-out evaluation
    ("eval/{set}/pass@1", "share", "Held-out accuracy: mean over prompts of the share of correct answers."),
    ("eval/{set}/pass@1/se", "share", "Standard error of pass@1: over samples (n > 1), binomial (n = 1)."),
    ("eval/{set}/pass@{k}", "share", "Chance that one of k answers is correct, unbiased: 1 - C(n-c,k)/C(n,k)."),
    ("eval/{set}/pass@{k}/se", "share", "Standard error of pass@k over prompts."),
    ("eval/{set}/bootstrap@{k}", "share", "pass@k as the mean of seeded bootstrap draws of k answers per prompt."),
    ("eval/{set}/bootstrap@{k}/se", "share", "Standard error of bootstrap@k: spread of the bootstrap draws."),
    ("eval/{set}/avg@{n}", "share", "Mean accuracy over n answers per prompt."),
    ("eval/{set}/avg@{n}/se", "share", "Standard error of avg@n: std of the n accuracies over sqrt(n)."),
    ("eval/{set}/prompts", "prompts", "Prompts evaluated."),
    ("eval/{set}/unjudged", "answers", "Answers that the verifier could not judge; left out of the accuracies."),
    ("eval/{set}/length_mean", "tokens", "Mean length of the evaluated answers."),
    ("eval/{set}/truncated_frac", "share", "Evaluated answers that ran out of tokens."),
    ("eval/{set}/version", "step", "Oldest weight version that answered."),
    ("eval/{set}/version_max", "step", "Newest weight version that answered, of a floating evaluation."),
    ("eval/skipped", "", "Evaluations not made because the one before was still running."),
    ("eval/given_up", "", "Evaluations beside training that failed."),
    ("eval/{set}/oracle_recall@{k}", "share", "Ground-truth tokens among the model's k likeliest, teacher-forced."),
    ("eval/{set}/diversity/self_bleu", "share", "1 - Self-BLEU of a prompt's answers, mean over prompts."),
    ("eval/{set}/diversity/similarity", "", "Cosine of the answers' mean-pooled hidden states, mean over pairs."),
    ("eval/{set}/diversity/entropy", "nats", "Entropy of the model on its own answers at T = 1, mean over tokens."),
    ("eval/{set}/diversity/max_prob", "share", "Largest token probability on its own answers, mean over tokens."),
    # The gate and the teacher
    ("gate/open_frac", "share", "Groups whose confidence was below the gate's threshold."),
    ("gate/injected", "groups", "Teacher solutions injected in this step."),
    ("gate/injected_frac", "share", "Injected teacher solutions over groups of the step."),
    ("gate/confidence", "share", "Mean posterior confidence (1+S)/(2+N) of the step's groups."),
    ("gate/threshold", "share", "Mean threshold gamma that the step's groups were compared with."),
    ("gate/confidence_hist/{bin}", "share", "Groups whose confidence lies in [bin, bin + 1) tenths."),
    ("gate/no_teacher", "groups", "Groups with an open gate and no teacher solution that may be injected."),
    ("gate/blocked", "groups", "Groups with an open gate where injection would have replaced a correct answer."),
    ("gate/degenerate", "groups", "Injected groups in which all rewards are then equal: only the teacher term trains."),
    # Staleness
    ("staleness/mean", "steps", "Age of the trained policy tokens in learner steps, mean over tokens."),
    ("staleness/max", "steps", "Age of the oldest trained policy token; never above max_staleness."),
    ("staleness/{bucket}/frac", "share", "Policy tokens whose age lies in a bucket: 0, 1, 2, 3, 4-7 or 8+ steps."),
    ("staleness/{bucket}/ess", "share", "Effective sample size of the importance weights of tokens of that age."),
    ("staleness/{bucket}/clip_frac", "share", "Tokens of that age whose gradient the clip removed."),
    ("staleness/{bucket}/kl", "nats", "KL estimate (k3) between behaviour and proximal log-probs, tokens of that age."),
    ("staleness/dropped", "groups", "Groups thrown away in this step because they had grown too old."),
    (
        "staleness/dropped_length/{tokens}",
        "answers",
        "Answers thrown away because they had grown too old, by tokens so far, as in response/length_hist; unknown "
        "where a generator did not tell.",
    ),
    ("staleness/late", "groups", "Groups that the learner waited for because they were about to grow too old."),
    ("staleness/truncated", "groups", "Late groups whose running answers were cut short in this step."),
    # Throughput
    ("throughput/generate_tokens_per_s", "tokens/s", "Sampled tokens per second, all generators."),
    (
        "throughput/generate_tokens_per_s/{generator}",
        "tokens/s",
        "The same of one generator, evaluations included.",
    ),
    ("throughput/generate_tokens_per_gpu_s", "tokens/s", "Sampled tokens per second and generator GPU."),
    ("throughput/learn_tokens_per_s", "tokens/s", "Trained tokens per second of learning, prompts left out."),
    ("throughput/learn_tokens_per_gpu_s", "tokens/s", "Trained tokens per second of learning and learner GPU."),
    ("throughput/groups_per_s", "groups/s", "Groups trained per second of wall time."),
    # Time of one step
    ("time/step_s", "s", "Wall time of the step, from publish to publish."),
    ("time/run_s", "s", "Wall time since the run was started or resumed, coming up included."),
    ("time/learn_s", "s", "Forward, backward and optimizer."),
    ("time/wait_for_batch_s", "s", "The learner stood still because no batch was ready."),
    ("time/wait_for_stale_s", "s", "The learner stood still for running groups that would otherwise grow too old."),
    ("time/wait_for_weights_s", "s", "Generators had room but had to wait for newer weights; mean over generators."),
    ("time/sync_s", "s", "The learner gathered and handed out new weights."),
    ("time/eval_s", "s", "Training stood still for an evaluation."),
    ("time/checkpoint_s", "s", "Training stood still to capture a checkpoint, or for the one before to be written."),
    ("time/canary_s", "s", "Training stood still while the learner scored the canary's sequences."),
    ("time/generate_s", "s", "From issuing a group to its last answer; mean over the step's groups."),
    ("time/verify_s", "s", "From a group's last answer to its verdicts, queueing included; mean over groups."),
    # Buffer and weights
    ("buffer/fill", "share", "Filled share of the buffer when the step ended."),
    ("buffer/groups", "groups", "Groups in the buffer when the step ended."),
    ("buffer/blocked_s", "s", "The staleness bound held generators back while a full batch waited for the learner."),
    ("weights/version", "step", "Version published at the end of the step."),
    ("weights/version/{generator}", "step", "Version that a generator serves."),
    ("weights/lag", "steps", "Published version minus the served one; worst generator."),
    ("weights/lag/{generator}", "steps", "Published version minus the one that a generator serves."),
    ("weights/bytes", "bytes", "Size of one update."),
    ("weights/bytes_per_s", "bytes/s", "Size of one update over the time from publish to the last commit."),
    ("weights/fetch_s", "s", "A generator fetched and checked an update while it went on sampling; slowest generator."),
    ("weights/pause_s", "s", "Sampling paused to swap weights; longest pause."),
    ("weights/failed", "updates", "Updates that a generator refused or did not finish in time, in this step."),
    # Train-inference mismatch: learner and generator at equal weights, whatever the age of the data
    ("canary/kl", "nats", "KL estimate (k3) between learner and generator on fixed sequences; worst generator."),
    ("canary/max_diff", "nats", "Largest difference of a token's log-prob between the two; worst generator."),
    ("canary/compared", "generators", "Generators that were compared with the learner since the last row."),
    ("canary/skipped", "generators", "Generators that had skipped the version, failed, or did not answer in time."),
    # The policy and its loss
    ("policy/entropy", "nats", "Entropy of the policy, mean over trained policy tokens."),
    (
        "policy/entropy/{quadrant}",
        "nats",
        "Entropy of tokens by sign of advantage and entropy above or below a quantile.",
    ),
    ("policy/quadrant_frac/{quadrant}", "share", "Policy tokens in a quadrant: pos_high, pos_low, neg_high, neg_low."),
    ("policy/clip_frac", "share", "Policy tokens whose gradient the clip removed."),
    ("policy/ratio_mean", "", "Mean ratio of the current to the proximal policy."),
    ("policy/ratio_bounded_frac", "share", "Policy tokens whose ratio CISPO bounded."),
    ("policy/kl", "nats", "KL estimate (k3) between the proximal and the current policy."),
    ("policy/ref_kl", "nats", "KL estimate (k3) between the current and the reference policy."),
    ("policy/mismatch_kl", "nats", "KL estimate (k3) between the recorded behaviour and the proximal log-probs."),
    (
        "policy/mismatch_kl_equal",
        "nats",
        "The same for tokens sampled by the very weights that score them: numerics, not staleness.",
    ),
    ("policy/ess", "share", "Effective sample size of the importance weights, (sum w)^2 / (n sum w^2)."),
    ("policy/weight_mean", "", "Mean importance weight of policy tokens."),
    ("policy/weight_capped_frac", "share", "Policy tokens whose importance weight reached its cap."),
    ("policy/masked_frac", "share", "Policy tokens that the staleness correction gave the weight 0."),
    ("policy/veto_frac", "share", "Policy tokens in answers that the staleness correction's veto masked whole."),
    ("policy/bad_logp", "tokens", "Policy tokens with a non-finite behaviour log-prob; their weight is 1."),
    ("policy/grad_norm", "", "Global gradient norm before clipping; mean over the step's updates."),
    ("policy/lr", "", "Learning rate of the step's last update."),
    ("policy/logp/{which}", "nats", "Log-prob of a sampled token, mean over tokens of correct or incorrect answers."),
    ("policy/drift/{which}", "nats", "Sum over an answer of log pi - log ref; mean over correct or incorrect answers."),
    (
        "policy/hidden_grad_norm/{which}",
        "",
        "Norm of the loss's gradient at the last hidden states, over the tokens of correct or incorrect answers.",
    ),
    ("policy/teacher_logp", "nats", "Mean log-prob of the teacher's tokens under the policy."),
    ("loss/value", "", "The objective's negative value -J."),
    ("loss/policy", "", "The part of -J that sampled answers contribute."),
    ("loss/teacher", "", "The part of -J that teacher solutions contribute."),
    ("loss/kl", "", "The part of -J that the divergence from the reference policy contributes."),
    ("loss/value_function", "", "The critic's loss."),
    ("reference/bytes", "bytes", "Scores that the frozen reference handed to the learner in the step, all ranks."),
    ("critic/value_mean", "", "Mean value that the critic gives to policy tokens."),
    ("critic/explained_variance", "", "1 - var(return - value) / var(return)."),
    ("apo/r_anchor_mean", "", "Mean anchor ratio r_a of policy tokens with a negative advantage."),
    ("apo/r_anchor_p95", "", "95th percentile of the anchor ratio r_a."),
    ("apo/dead_frac", "share", "Policy tokens with a negative advantage whose gradient vanishes, r < 1 - eps."),
    ("apo/skipped_frac", "share", "Policy tokens with a negative advantage without a usable anchor set."),
    ("offline/weight/{which}", "", "Weight exp(mean log pi) of an answer under the policy, correct or incorrect ones."),
    ("offline/future_weight/{which}", "", "The same weight under the future policy of FPA."),
    ("offline/future_ratio/{which}", "", "Future weight over the policy's own."),
    ("offline/small_weight_frac/{which}", "share", "Answers whose future weight is below .2."),
    ("offline/holdout_loss", "", "-J on the held-out prompts, without gradient: what early stopping looks at."),
    ("offline/prompts/{which}", "prompts", "Prompts with cached answers: trained, held out, or left out and why."),
    # What was trained
    ("train/tokens", "tokens", "Trained tokens, prompts left out."),
    ("train/teacher_tokens", "tokens", "Trained tokens that a teacher wrote."),
    ("train/offline_frac", "share", "Samples that a teacher wrote or a cache supplied, over all samples of the step."),
    ("train/prompts", "prompts", "Groups in the step."),
    ("train/samples", "answers", "Answers in the step, teachers included."),
    ("train/updates", "updates", "Optimizer updates in the step."),
    ("train/skipped", "updates", "Optimizer updates skipped because loss or gradient was not finite."),
    (
        "train/skipped_norm",
        "updates",
        "Optimizer updates skipped because their gradient norm was above skip_grad_norm.",
    ),
    ("train/poisoned", "groups", "Groups that made an update impossible: dropped and quarantined."),
    ("train/micro_batches", "", "Micro-batches per rank, dummies included."),
    ("train/padding_frac", "share", "Padding among the tokens that the learner computed."),
    ("train/epoch", "epochs", "Epoch of the newest prompt."),
    ("ledger/issued", "prompts", "Prompts handed out since the run began."),
    ("ledger/trained", "prompts", "Prompts trained on, committed."),
    ("ledger/dropped", "prompts", "Prompts given up."),
    ("ledger/dropped/{reason}", "prompts", "Prompts given up for one reason."),
    ("ledger/in_flight", "prompts", "Prompts being generated or verified."),
    ("ledger/buffered", "prompts", "Prompts complete and waiting for the learner."),
    ("ledger/to_retry", "prompts", "Prompts that will be issued again."),
    (
        "ledger/discarded_lineage",
        "groups",
        "Groups of versions that restarts of the learner gave up; none was trained.",
    ),
    # The rest
    ("verify/p50_s", "s", "Median time of one judgement."),
    ("verify/p99_s", "s", "99th percentile of the times of judgements, all tries together."),
    ("verify/queue", "groups", "Groups waiting for verdicts when the step ended."),
    ("verify/unparseable", "answers", "Answers without a readable result, in this step."),
    ("verify/timeout", "answers", "Judgements killed at their deadline, in this step."),
    ("verify/oom", "answers", "Judgements that ran out of memory, in this step."),
    ("verify/crash", "answers", "Judgements whose verifier crashed, in this step."),
    ("verify/charged", "answers", "Timeouts, ooms and crashes that the answer pays for, with reward 0, in this step."),
    ("verify/masked", "answers", "Answers that were not judged, because judge or prompt are to blame, in this step."),
    ("scale/generators", "", "Generators that are alive, one that is lent to an evaluation included."),
    ("scale/verifiers", "", "Verifiers that serve."),
    ("scale/learners", "", "Learner ranks."),
    ("scale/restarts", "", "Actors that had died and were started again: generators, verifiers, the learner."),
    ("actors/{state}", "", "Actors that are healthy, suspect, dead, restarting, stale or retired."),
    ("checkpoint/write_s", "s", "Writing a checkpoint to disk beside training, of those that ended in this step."),
    ("checkpoint/failed", "", "Checkpoints that could not be written, in this step; three in a row end the run."),
    ("watchdog/alarms", "", "Times in this step that an actor, or the whole run, stood still though it had work."),
    ("perf/mfu", "share", "Floating-point operations of learning over what the devices can do."),
    ("perf/memory_bytes", "bytes", "Peak memory of a learner rank."),
)

REGISTRY: dict[str, Metric] = {name: Metric(name, unit, meaning) for name, unit, meaning in _DECLARED}
assert len(REGISTRY) == len(_DECLARED), "a metric is declared twice"


_PLACEHOLDERS = {"k": r"\d+", "n": r"\d+"}


def _pattern(name: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", name)
    return re.compile("".join(_PLACEHOLDERS.get(p, r"[^/]+") if i % 2 else re.escape(p) for i, p in enumerate(parts)))


_FAMILIES = tuple((_pattern(m.name), m) for m in REGISTRY.values() if m.is_family)


@functools.lru_cache(maxsize=4096)
def find(name: str) -> Metric | None:
    """The declaration that covers ``name``, or None."""
    if "{" in name:
        return None
    return REGISTRY.get(name) or next((m for pattern, m in _FAMILIES if pattern.fullmatch(name)), None)


def lookup(name: str) -> Metric:
    """The declaration that covers ``name``. Raises LookupError, with the nearest name, when there is none."""
    metric = find(name)
    if metric is None:
        near = difflib.get_close_matches(name, REGISTRY, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise LookupError(f"metric {name!r} is not declared.{hint} Declare it in hapo_async/metrics.py.")
    return metric


# --------------------------------------------------------------------------------------------------------------------
# Writing


class Writer:
    """Writes one row per learner step to ``metrics.jsonl`` and TensorBoard. Flushed each step; a context manager. A disk that is
    full stops neither: see ``Appender`` and ``Board``.

    purge_step: the first step that does not count any more (a resume continues before it): its rows and all later ones
    move to ``discarded/`` and TensorBoard hides them.
    """

    def __init__(self, run_dir: str | Path, purge_step: int | None = None) -> None:
        self.folder = Path(run_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._open(purge_step)
        self._held_s = 0.0  # by the evaluation or checkpoint of the row before

    def _open(self, purge_step: int | None) -> None:
        path = self.folder / METRICS_FILE
        _repair(path)
        if purge_step is not None:
            discard(path, purge_step)
        self._file = Appender(path)
        self._board = Board(self.folder / TENSORBOARD_FOLDER, purge_step)

    def roll_back(self, purge_step: int) -> None:
        """Goes on before ``purge_step``, whose row and all later ones do not count any more."""
        self.close()
        self._open(purge_step)

    def write(self, step: int, values: Mapping[str, float | None]) -> dict[str, Any]:
        """Appends the row {step, time, bottleneck, advice, metrics...} and returns it.

        None means "not measured" and is left out; a value that is not finite becomes null. Raises LookupError for an
        undeclared name, before anything is written. ``bottleneck`` and ``advice`` are there when the step has times.
        """
        for name in values:
            lookup(name)
        numbers = {name: float(value) for name, value in values.items() if value is not None}
        row: dict[str, Any] = {"step": int(step), "time": time.time()}
        verdict = bottleneck(numbers, self._held_s)
        if "time/step_s" in numbers:  # an evaluation beside training has a row of its own, and held nobody
            self._held_s = numbers.get("time/eval_s", 0.0) + numbers.get("time/checkpoint_s", 0.0)
        if verdict.component:
            row |= {"bottleneck": verdict.component, "advice": verdict.advice}
        row |= {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        self._file.add(json.dumps(row, allow_nan=False))
        self._board.write(step, numbers, verdict.advice if verdict.component else "")
        return row

    def sync(self) -> None:
        """Rows that were written are on disk for good. Raises OSError."""
        self._file.sync()

    def close(self) -> None:
        if not self._file.closed:
            self._file.close()
            self._board.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _repair(path: Path) -> None:
    """Cuts a last line that a crash left unfinished, so that the next row does not grow out of it."""
    if not path.exists():
        return
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)


def discard(path: Path, purge_step: int) -> None:
    """Moves the rows of ``purge_step`` and later, which a resume will make anew, to ``discarded/`` beside the file."""
    rows = read(path)
    gone = [r for r in rows if r["step"] >= purge_step]
    if not gone:
        return
    folder = path.parent / DISCARDED_FOLDER
    folder.mkdir(exist_ok=True)
    with (folder / path.name).open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(r) + "\n" for r in gone)
    replace_whole(path, "".join(json.dumps(r) + "\n" for r in rows if r["step"] < purge_step))


# --------------------------------------------------------------------------------------------------------------------
# Reading


def read(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a ``metrics.jsonl``, or of the one in a run folder, in file order. Lines that are not whole rows (a crash
    cuts the last one) are left out; a file that does not exist has no rows."""
    path = Path(path)
    path = path / METRICS_FILE if path.is_dir() else path
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def series(rows: Iterable[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of one metric, ordered by step; of several rows of a step the last one counts."""
    points = {row["step"]: float(row[name]) for row in rows if isinstance(row.get(name), (int, float))}
    steps = sorted(points)
    return steps, [points[s] for s in steps]
