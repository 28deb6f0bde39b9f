"""The keys: one typed tree, with a default and a description for each.

Tables (``learner.adamw``, ``eval.sampling``, ...) are completed and checked in ``hapo_async.subkeys``.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from hapo_async import corrections, schedule, subkeys
from hapo_async.config import checks


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


class RunConfig(_Section):
    """Where a run lives."""

    dir: str = Field("", description="Run folder; empty means runs/<config file name>.")
    resume: Literal["auto", "never", "must"] = Field(
        "auto", description="auto: continue when the folder holds a checkpoint; must: fail when it does not."
    )
    alarms: dict[str, Any] = Field(
        default_factory=dict,
        description="What is reported while a run goes on: silence_s (30) without progress of an actor; canary_every (10) "
        "steps a comparison of generators and learner at equal weights, 0 never; mismatch_kl (0.01) allowed there.",
    )

    @field_validator("alarms", mode="after")
    @classmethod
    def _alarms(cls, value: dict[str, Any]) -> dict[str, Any]:
        return subkeys.complete(subkeys.ALARMS, value)


class DataConfig(_Section):
    """What is trained and evaluated on. A source is a file (.jsonl, .json, .parquet), a `datasets` name, or builtin:chain."""

    train: str = Field("builtin:chain/train", description="Training prompts.")
    eval: list[str] = Field(default_factory=list, description="Evaluation sets; each is named after its file.")
    columns: dict[str, str] = Field(
        default_factory=dict, description="Column names by role (prompt, truth, teacher, uid), where not recognised."
    )
    system: str = Field("", description="System message put before every prompt that has none.")
    suffix: str = Field("", description="Text appended to every user message, such as 'Put the answer in \\boxed{}.'")
    chat_template: bool = Field(True, description="Apply the tokenizer's chat template where it has one.")
    max_prompt_tokens: int = Field(1024, ge=1, description="Longer prompts are left out and counted.")
    limit: int = Field(0, ge=0, description="Use only the first rows; 0 means all.")
    demonstrations: int = Field(-1, ge=-1, description="Prompts that keep their teacher solution; -1 means all.")
    shuffle: bool = Field(True, description="Seeded shuffling, a new order each epoch.")
    epochs: int = Field(0, ge=0, description="Passes over the data; 0 means until train.steps.")
    answers: str = Field(
        "", description="Folder of cached answers, for offline algorithms; empty means run.dir/answers."
    )


class SamplingConfig(_Section):
    """How training answers are sampled."""

    n: int = Field(8, ge=1, description="Answers per prompt: the group size N.")
    max_tokens: int = Field(1024, ge=1, description="Longest answer, in tokens.")
    temperature: float = Field(1.0, gt=0, description="Sampling temperature; the learner's log-probs use it too.")


class VerifierConfig(_Section):
    """Who judges the answers."""

    name: str = Field("auto", description="auto | boxed | math | module:function.")
    count: int = Field(1, ge=1, description="Verifier actors; each holds its own worker processes.")
    workers: int = Field(1, ge=1, description="Worker processes per verifier actor.")
    timeout_s: float = Field(10.0, gt=0, description="A judgement that takes longer is killed: verdict 'timeout'.")


class GateConfig(_Section):
    """HAPO's gate: when a group gets the teacher's solution."""

    mode: Literal["bayes", "always", "never"] = Field("bayes", description="bayes: open iff (1+S)/(2+N) < gamma.")
    gamma: float = Field(0.8, ge=0, le=1, description="Confidence below which the gate opens.")
    schedule: dict[str, Any] = Field(
        default_factory=dict,
        description="How gamma moves over training: {} constant; or kind (linear | step | sigmoid), end, at, slope.",
    )
    decision: Literal["mean", "thompson", "pooled"] = Field(
        "mean",
        description="Compared with gamma: the posterior's mean; a draw from it (thompson); its mean with the prompt's "
        "earlier visits (pooled).",
    )
    decay: float = Field(
        0.5, ge=0, le=1, description="Weight of a prompt's last visit, and again of each before (pooled)."
    )
    ties: Literal["first", "random", "longest", "stalest"] = Field(
        "first", description="Which of the lowest-reward answers is replaced."
    )
    teacher: Literal["seeded", "shortest", "likeliest"] = Field(
        "seeded",
        description="Which of several demonstrations is used; likeliest: under the policy about to be trained.",
    )
    advantage_group: Literal["injected", "rollouts"] = Field(
        "injected", description="Group whose rewards give the advantage: after or before injection."
    )

    @field_validator("schedule", mode="after")
    @classmethod
    def _schedule(cls, value: dict[str, Any]) -> dict[str, Any]:
        return schedule.complete(value)


class GeneratorConfig(_Section):
    """The engines that sample. Each generator is a placement-group bundle of tensor_parallel x pipeline_parallel ranks."""

    engine: Literal["auto", "vllm", "transformers"] = Field(
        "auto", description="auto: vllm on GPUs, else transformers."
    )
    count: int = Field(1, ge=1, description="Generators.")
    placement: Literal["disaggregated", "colocated"] = Field(
        "disaggregated",
        description="disaggregated: generators and learner have devices of their own; colocated: they take turns on the "
        "same ones (max_staleness=0).",
    )
    tensor_parallel: int = Field(1, ge=1, description="Ranks that share each layer of one generator.")
    pipeline_parallel: int = Field(1, ge=1, description="Stages that one generator's layers are split into.")
    max_concurrent: int = Field(256, ge=1, description="Groups in flight on one generator.")
    kv_cache: Literal["recompute", "keep"] = Field(
        "recompute", description="What a weight update does to the KV cache of running answers."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto: bfloat16 on GPUs, else float32.")
    deadline_s: float = Field(1800.0, gt=0, description="A group not answered by then is re-issued elsewhere.")

    @property
    def width(self) -> int:
        """Ranks of one generator."""
        return self.tensor_parallel * self.pipeline_parallel


class LearnerConfig(_Section):
    """The ZeRO learner."""

    ranks: int = Field(1, ge=1, description="Learner processes.")
    zero_stage: Literal[1, 2, 3] = Field(3, description="DeepSpeed ZeRO stage.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto: bfloat16 on GPUs, else float32.")
    lr: float = Field(1e-6, gt=0, description="Peak learning rate.")
    lr_schedule: str = Field("constant_with_warmup", description="A name that transformers.get_scheduler knows.")
    warmup_steps: int = Field(0, ge=0, description="Optimizer updates of linear warm-up.")
    adamw: dict[str, Any] = Field(
        default_factory=dict, description="betas ([0.9, 0.95]), eps (1e-8), weight_decay (0) of AdamW."
    )
    grad_clip: float = Field(1.0, gt=0, description="Global gradient norm.")
    mini_batches: int = Field(1, ge=1, description="Optimizer updates per step: the batch is split into this many.")
    micro_batch_tokens: int = Field(8192, ge=1, description="Tokens, padding included, of one forward pass.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations in the backward pass.")
    lora: dict[str, Any] = Field(
        default_factory=dict,
        description="{}: all weights train; else a low-rank adapter: rank (8), alpha (16), targets (auto), dropout (0).",
    )
    max_bad_steps: int = Field(5, ge=1, description="Stop after this many skipped (non-finite) steps in a row.")
    deadline_s: float = Field(1800.0, gt=0, description="A step or publish that takes longer ends the run.")

    @field_validator("adamw", mode="after")
    @classmethod
    def _adamw(cls, value: dict[str, Any]) -> dict[str, Any]:
        return subkeys.complete(subkeys.ADAMW, value)

    @field_validator("lora", mode="after")
    @classmethod
    def _lora(cls, value: dict[str, Any]) -> dict[str, Any]:
        return subkeys.complete(subkeys.LORA, value) if value else {}


class StalenessConfig(_Section):
    """What happens to data older than the weights that learn from it."""

    correction: str = Field(
        "auto",
        description="How old tokens are weighted: auto (clip when max_staleness > 0, else off), off, clip, tis, mask, "
        "sequence_tis, sequence_mask, geometric_tis, geometric_mask, m2po.",
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="Of the correction: cap, floor, decay, veto, tau, prox; docs/staleness.md."
    )
    late: Literal["truncate", "drop", "wait"] = Field(
        "truncate", description="What happens to a group that would grow too old; wait: nothing, the learner waits on."
    )
    late_deadline_s: float = Field(120.0, gt=0, description="How long the learner waits for such a group first.")
    force_lag: int = Field(
        0, ge=0, description="For experiments: train on groups of exactly this age, whatever the timing; 0 is off."
    )

    @field_validator("correction", mode="before")
    @classmethod
    def _correction(cls, value: Any) -> Any:
        """YAML 1.1 reads a bare `off` as False."""
        corrections.resolve(value, {})
        return "off" if value is False else value

    @field_validator("options", mode="after")
    @classmethod
    def _options(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if "correction" in info.data:
            corrections.resolve(info.data["correction"], value)
        return value


class WeightsConfig(_Section):
    """How new weights reach the generators."""

    transport: Literal["auto", "ray", "zmq", "gloo", "nccl", "ipc"] = Field(
        "auto",
        description="ray: the object store; zmq: sockets; gloo, nccl: collectives; ipc: memory of a shared GPU. auto: nccl "
        "on GPUs, ipc where they are colocated, else ray.",
    )
    staging: Literal["auto", "device", "host", "none"] = Field(
        "auto",
        description="Where a generator gathers new weights while the old ones serve; none: it stands still and they are "
        "written as they come (a LoRA adapter is always gathered). auto: device with nccl and ipc, else host.",
    )
    bucket_bytes: int = Field(256 << 20, ge=1024, description="Size of one piece of the stream.")
    deadline_s: float = Field(
        300.0, gt=0, description="A generator that has not applied an update by then is taken out of service."
    )


class TrainConfig(_Section):
    """How long and how much."""

    steps: int = Field(100, ge=1, description="Learner steps.")
    batch_prompts: int = Field(128, ge=1, description="Groups per learner step.")
    checkpoint_every: int = Field(50, ge=0, description="Steps between checkpoints; 0 means only at start and end.")
    keep_checkpoints: int = Field(2, ge=2, description="Newest checkpoints that are kept.")


class EvalConfig(_Section):
    """Held-out evaluation."""

    every: int = Field(0, ge=0, description="Steps between evaluations; 0 means only before and after.")
    mode: Literal["auto", "barrier", "detached", "floating"] = Field(
        "auto",
        description="barrier: training stands still; detached: one of several generators leaves for it; floating: on all, "
        "while their weights change. auto: detached with several generators and max_staleness > 0, else barrier.",
    )
    n: int = Field(1, ge=1, description="Answers per prompt.")
    k: int = Field(1, ge=1, description="k of pass@k; at most n.")
    sampling: dict[str, Any] = Field(
        default_factory=dict,
        description="temperature (0, greedy), top_p (1), max_tokens (0: sampling.max_tokens) of the answers.",
    )
    limit: int = Field(0, ge=0, description="Prompts per set; 0 means all.")

    @field_validator("sampling", mode="after")
    @classmethod
    def _sampling(cls, value: dict[str, Any]) -> dict[str, Any]:
        return subkeys.complete(subkeys.EVAL_SAMPLING, value)

    @property
    def temperature(self) -> float:
        return float(self.sampling["temperature"])

    @property
    def top_p(self) -> float:
        return float(self.sampling["top_p"])

    @property
    def max_tokens(self) -> int:
        """Longest answer; 0 means sampling.max_tokens."""
        return int(self.sampling["max_tokens"])


class RolloutsConfig(_Section):
    """What is kept of the sampled groups."""

    sample: float = Field(0.1, ge=0, le=1, description="Share of groups written to rollouts/; 1 keeps all.")


class Config(_Section):
    """The whole run."""

    model: str = Field("builtin:chain", description="A Hugging Face id, a folder, or builtin:chain.")
    algorithm: str = Field("hapo", description="A name that `hapo-async explain` lists.")
    options: dict[str, Any] = Field(default_factory=dict, description="Options of the algorithm.")
    seed: int = Field(0, ge=0, description="Seeds data order, sampling and choices.")
    max_staleness: int = Field(
        1, ge=0, description="Oldest data, in learner steps, that may be trained on; 0 is synchronous."
    )
    run: RunConfig = Field(default_factory=RunConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    verifier: VerifierConfig = Field(default_factory=VerifierConfig)
    gate: GateConfig = Field(default_factory=GateConfig)
    generator: GeneratorConfig = Field(default_factory=GeneratorConfig)
    learner: LearnerConfig = Field(default_factory=LearnerConfig)
    staleness: StalenessConfig = Field(default_factory=StalenessConfig)
    weights: WeightsConfig = Field(default_factory=WeightsConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    rollouts: RolloutsConfig = Field(default_factory=RolloutsConfig)
    vllm: dict[str, Any] = Field(default_factory=dict, description="Passed to vLLM's AsyncEngineArgs.")
    deepspeed: dict[str, Any] = Field(default_factory=dict, description="Merged into DeepSpeed's configuration.")

    @model_validator(mode="after")
    def _cross_checks(self) -> Config:
        checks.check(self)
        return self

    @property
    def correction(self) -> corrections.Settings:
        """The staleness correction with its options, `auto` resolved."""
        return corrections.resolve(self.staleness.correction, self.staleness.options, self.max_staleness > 0)

    @property
    def most_untrained(self) -> int:
        """Groups in flight and buffered together that ``max_staleness`` allows."""
        return (self.max_staleness + 1) * self.train.batch_prompts

    @property
    def is_timing_free(self) -> bool:
        """Whether every batch is sampled at a version that does not depend on how fast anything is: synchronous training,
        and a forced lag."""
        return self.max_staleness == 0 or self.staleness.force_lag > 0

    @property
    def evaluation_mode(self) -> str:
        """``eval.mode`` with `auto` resolved: barrier | detached | floating."""
        if self.eval.mode != "auto":
            return self.eval.mode
        return "detached" if self.generator.count > 1 and not self.is_timing_free else "barrier"

    def transport(self, cuda: bool) -> str:
        """``weights.transport`` with `auto` resolved. cuda: learner and generators compute on GPUs."""
        if self.weights.transport != "auto":
            return self.weights.transport
        if not cuda or self.learner.lora:
            return "ray"
        if self.generator.placement == "colocated":
            return "ipc" if self.learner.ranks == 1 else "ray"
        return "nccl"

    def staging(self, cuda: bool) -> str:
        """``weights.staging`` with `auto` resolved: device | host | none."""
        if self.weights.staging != "auto":
            return self.weights.staging
        return "device" if self.transport(cuda) in ("nccl", "ipc") else "host"

    def digest(self) -> str:
        """sha256 over everything that shapes the training (not the run folder)."""
        tree = self.model_dump(mode="json", exclude={"run"})
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
