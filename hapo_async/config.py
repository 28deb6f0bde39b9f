"""The configuration: one typed tree, YAML plus ``key=value`` overrides, every cross-check with its fix.

``load(path, overrides)`` is the only way in. It raises ConfigError (exit code 2) with the value, the rule and the fix;
nothing has been started by then. Options of an algorithm live in ``options:`` and are checked against that algorithm's
own defaults; ``vllm:`` and ``deepspeed:`` are handed to those libraries and checked against their own arguments.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from hapo_async import corrections, schedule, subkeys
from hapo_async.errors import ConfigError


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
    max_bad_steps: int = Field(5, ge=1, description="Stop after this many skipped (non-finite) steps in a row.")
    deadline_s: float = Field(1800.0, gt=0, description="A step or publish that takes longer ends the run.")

    @field_validator("adamw", mode="after")
    @classmethod
    def _adamw(cls, value: dict[str, Any]) -> dict[str, Any]:
        return subkeys.complete(subkeys.ADAMW, value)


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

    transport: Literal["ray"] = Field("ray", description="ray: the object store.")
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
    temperature: float = Field(0.0, ge=0, description="0 is greedy.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus sampling, evaluation only.")
    max_tokens: int = Field(0, ge=0, description="Longest answer; 0 means sampling.max_tokens.")
    limit: int = Field(0, ge=0, description="Prompts per set; 0 means all.")


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
        for check in (_check_batch, _check_eval, _check_flow):
            check(self)
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

    def digest(self) -> str:
        """sha256 over everything that shapes the training (not the run folder)."""
        tree = self.model_dump(mode="json", exclude={"run"})
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _check_batch(c: Config) -> None:
    per_update, rest = divmod(c.train.batch_prompts, c.learner.mini_batches)
    if rest:
        raise ValueError(
            f"train.batch_prompts={c.train.batch_prompts} is not divisible by learner.mini_batches={c.learner.mini_batches}. "
            f"Use {per_update * c.learner.mini_batches or c.learner.mini_batches} prompts, or another number of mini-batches."
        )
    if per_update % c.learner.ranks:
        raise ValueError(
            f"a mini-batch of {per_update} prompts (train.batch_prompts / learner.mini_batches) is not divisible by "
            f"learner.ranks={c.learner.ranks}. Make train.batch_prompts a multiple of {c.learner.ranks * c.learner.mini_batches}."
        )


def _check_eval(c: Config) -> None:
    if c.eval.k > c.eval.n:
        raise ValueError(
            f"eval.k={c.eval.k} is larger than eval.n={c.eval.n}: pass@k needs k answers. Raise eval.n or lower eval.k."
        )
    if c.eval.temperature == 0 and c.eval.n > 1:
        raise ValueError(
            f"eval.n={c.eval.n} with eval.temperature=0 samples the same answer each time. Set a temperature, or eval.n=1."
        )


def _check_flow(c: Config) -> None:
    lag = c.staleness.force_lag
    if lag and c.max_staleness != lag:
        raise ValueError(
            f"staleness.force_lag={lag} trains on groups that are {lag} steps old, but max_staleness={c.max_staleness}. Set "
            f"max_staleness={lag} as well, or staleness.force_lag=0."
        )
    if c.generator.placement == "colocated" and c.max_staleness > 0:
        raise ValueError(
            f"generator.placement=colocated lets generators and learner take turns, which is synchronous training, but "
            f"max_staleness={c.max_staleness}. Set max_staleness=0, or generator.placement=disaggregated."
        )
    if c.eval.mode == "detached" and c.generator.count < 2:
        raise ValueError(
            f"eval.mode=detached takes one generator out of sampling, but generator.count={c.generator.count}. Use at least "
            "two generators, or eval.mode=barrier."
        )
    if c.is_timing_free and c.eval.mode in ("detached", "floating"):
        cause = f"staleness.force_lag={lag}" if lag else "max_staleness=0"
        raise ValueError(
            f"eval.mode={c.eval.mode} goes on beside training, but with {cause} no batch may depend on timing. Use "
            "eval.mode=barrier."
        )


# --------------------------------------------------------------------------------------------------------------------
# Loading


def load(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file, applies ``a.b=value`` overrides (values are YAML), validates.

    Raises ConfigError for a missing file, broken YAML, an unknown key (with the nearest known one), a bad value, or a
    failed cross-check.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        tree = _read_yaml(Path(path))
    for text in overrides:
        _apply_override(tree, text)
    if path is not None and not (tree.get("run") or {}).get("dir"):
        run = tree.setdefault("run", {}) or {}
        tree["run"] = {**run, "dir": f"runs/{Path(path).stem}"}
    return parse(tree)


def parse(tree: dict[str, Any]) -> Config:
    """Validates a plain tree. Raises ConfigError."""
    _refuse_unknown(tree, Config, "")
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def known_keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Dotted names of all leaves of the tree."""
    out = []
    for name, info in model.model_fields.items():
        sub = _section_of(info.annotation)
        out += known_keys(sub, f"{prefix}{name}.") if sub else [prefix + name]
    return out


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"config file {str(path)!r} does not exist. The shipped ones are in configs/.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {str(path)!r} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"config file {str(path)!r} is not YAML: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"config file {str(path)!r} holds a {type(tree).__name__}; it must hold key: value pairs.")
    return tree


def _apply_override(tree: dict[str, Any], text: str) -> None:
    key, equals, raw = text.partition("=")
    key = key.strip().removeprefix("--")
    if not equals or not key:
        raise ConfigError(f"override {text!r} is not of the form key=value, such as train.steps=10.")
    try:
        value = yaml.safe_load(raw)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {text!r}: the value is not YAML: {error}") from None
    if isinstance(value, str):
        value = _number(value)
    node = tree
    *parents, leaf = key.split(".")
    for parent in parents:
        child = node.setdefault(parent, {})
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"override {text!r}: {parent!r} is a value, not a section.")
        node = child
    node[leaf] = value


def _number(text: str) -> str | float:
    """YAML 1.1 reads 1e-4 as a string; people do not."""
    try:
        return float(text) if any(ch.isdigit() for ch in text) else text
    except ValueError:
        return text


def _section_of(annotation: Any) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _refuse_unknown(tree: dict[str, Any], model: type[BaseModel], prefix: str) -> None:
    for key, value in tree.items():
        if key not in model.model_fields:
            raise ConfigError(f"unknown key {prefix + str(key)!r}.{_nearest(prefix + str(key))}")
        sub = _section_of(model.model_fields[key].annotation)
        if sub and value is None:
            tree[key] = {}
        elif sub and not isinstance(value, dict):
            raise ConfigError(f"{prefix + key!r} is a section with keys {', '.join(sub.model_fields)}; got {value!r}.")
        elif sub:
            _refuse_unknown(value, sub, f"{prefix}{key}.")


def _nearest(key: str) -> str:
    known = known_keys()
    leaf = key.rsplit(".", 1)[-1]
    by_leaf = [k for k in known if k.rsplit(".", 1)[-1] == leaf]
    near = by_leaf or difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    near = near or [k for k in known if difflib.get_close_matches(leaf, [k.rsplit(".", 1)[-1]], n=1, cutoff=0.7)]
    return f" Did you mean {near[0]!r}?" if near else " `hapo-async train CONFIG --dry-run` prints all keys."


def _explain(error: ValidationError) -> str:
    lines = []
    for item in error.errors():
        where = ".".join(str(p) for p in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        lines.append(f"{where}={item['input']!r}: {message}." if where else message)
    return "\n".join(lines)
