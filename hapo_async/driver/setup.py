"""Everything that can be wrong before anything starts: data, model, engine, algorithm. Raises UserError, exit code 2."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hapo_async import algorithms, data, lora, verify
from hapo_async.algorithms import Algorithm
from hapo_async.config import Config
from hapo_async.errors import ConfigError, DataError
from hapo_async.evaluation import evaluate
from hapo_async.learner.policy import adamw, schedule
from hapo_async.types import Prompt


@dataclass(frozen=True)
class Prepared:
    """A checked run: nothing has been started, and nothing that a user wrote can fail any more."""

    config: Config
    algorithm: Algorithm
    options: Mapping[str, Any]
    model_path: str
    tokenizer: Any
    prompts: list[Prompt]
    eval_sets: dict[str, list[Prompt]]
    reports: dict[str, data.DataReport]


def prepare(config: Config, gpus: bool | None = None) -> Prepared:
    """Checks and loads. gpus: whether the cluster has GPUs, None when that is not known yet."""
    algorithm = algorithms.get(config.algorithm)
    options = algorithm.check_config(config)
    verify.resolve(config.verifier.name)
    check_libraries(config, gpus)
    check_optimizer(config, options, gpus)
    check_early_stopping(config, options)
    if algorithm.offline and config.staleness.force_lag:
        raise ConfigError(
            f"staleness.force_lag={config.staleness.force_lag} has no meaning with algorithm={config.algorithm!r}: cached "
            "answers have no age. Set staleness.force_lag=0."
        )
    model_path = data.resolve_model(config.model)
    lora.check(config, model_path)
    tokenizer = data.load_tokenizer(model_path)
    prompts, report = data.load_prompts(config, config.data.train, tokenizer, "train")
    reports = {config.data.train: report}
    taught = [p for p in prompts if any(t.rejected is None for t in p.teachers)]
    if not taught and (algorithm.composition == "demonstrations" or options.get("sft_steps")):
        raise DataError(
            f"algorithm={config.algorithm!r} learns from demonstrations, but no prompt of {config.data.train!r} has a usable "
            "teacher solution. Name its column with data.columns, or choose another algorithm (or options.sft_steps=0)."
        )
    if algorithm.composition == "demonstrations":
        prompts = taught
    if not prompts:
        raise DataError(f"{config.data.train!r} holds no usable prompt; see data.max_prompt_tokens and data.columns.")
    eval_sets: dict[str, list[Prompt]] = {}
    for source in config.data.eval:
        loaded, reports[source] = data.load_prompts(config, source, tokenizer, "eval")
        if not loaded:
            raise DataError(f"evaluation set {source!r} holds no usable prompt.")
        eval_sets[free_name(evaluate.set_name(source), eval_sets)] = loaded[: config.eval.limit or None]
    check_context(config, model_path, [*prompts, *(p for loaded in eval_sets.values() for p in loaded)])
    return Prepared(config, algorithm, options, model_path, tokenizer, prompts, eval_sets, reports)


def check_optimizer(config: Config, options: Mapping[str, Any], gpus: bool | None) -> None:
    """The optimizer and its schedule can be made and stepped. Raises ConfigError with what torch or transformers say."""
    c = config.learner
    if options.get("skip_grad_norm") and c.zero_stage == 1 and (c.dtype == "bfloat16" or (c.dtype == "auto" and gpus)):
        raise ConfigError(
            f"options.skip_grad_norm={options['skip_grad_norm']} does not work with bfloat16 and learner.zero_stage=1. Set "
            "learner.zero_stage to 2 or 3, or leave the option out."
        )
    try:
        made = schedule(adamw([torch.nn.Parameter(torch.zeros(1))], config), config)
        made.optimizer.step()
        made.step()
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"learner.lr_schedule={c.lr_schedule!r} with learner.adamw={c.adamw} does not work: {error} A schedule "
            "must need nothing but learner.warmup_steps: constant, constant_with_warmup, linear, cosine, ..."
        ) from None


def check_early_stopping(config: Config, options: Mapping[str, Any]) -> None:
    """Early stopping has evaluations to count and something to measure. Raises ConfigError."""
    patience = options.get("patience", 0)
    if patience and not config.eval.every:
        raise ConfigError(
            f"options.patience={patience} counts evaluations, but eval.every=0 makes none while training. Set eval.every."
        )
    if patience and not options["holdout"]:
        raise ConfigError(
            f"options.patience={patience} looks at held-out prompts, but options.holdout=0 holds none out. Set "
            "options.holdout, or options.patience=0."
        )


def check_context(config: Config, model_path: str, prompts: list[Prompt]) -> None:
    """Every prompt with its longest answer fits the model. Raises ConfigError with the numbers."""
    limit = data.context_tokens(model_path)
    longest = max(len(p.tokens) for p in prompts)
    answer = max(config.sampling.max_tokens, config.eval.max_tokens)
    if longest + answer > limit:
        raise ConfigError(
            f"the longest prompt ({longest} tokens) and sampling.max_tokens or eval.sampling.max_tokens ({answer}) exceed the "
            f"model's {limit} positions. Lower the latter to {max(1, limit - longest)} or less, or data.max_prompt_tokens."
        )


def check_libraries(config: Config, gpus: bool | None) -> None:
    """The engine is installed, weights can travel, and the pass-through sections name what their libraries know."""
    check_transport(config, gpus)
    if config.deepspeed:
        from actors import learner

        learner.check_overrides(config.deepspeed)
    if config.generator.engine == "vllm" or (config.generator.engine == "auto" and gpus):
        from actors import vllm_engine

        if not vllm_engine.is_installed():
            raise ConfigError(
                "generator.engine=vllm, but vllm is not installed. Install hapo_async[gpu] (or hapo_async[cpu] on a machine "
                "without GPUs), or set generator.engine=transformers."
            )
        vllm_engine.engine_args(config)
    elif config.vllm and config.generator.engine == "transformers":
        raise ConfigError("the vllm: section has no effect with generator.engine=transformers. Remove one of the two.")


def check_transport(config: Config, gpus: bool | None) -> None:
    """``nccl`` and ``ipc`` find what they need. gpus: None: of this machine, unless a cluster is to be joined."""
    transport, staging = config.weights.transport, config.weights.staging
    if transport not in ("nccl", "ipc"):
        return
    if gpus is None and not os.environ.get("RAY_ADDRESS"):
        gpus = torch.cuda.is_available()
    if gpus is False:
        raise ConfigError(
            f"weights.transport={transport} moves weights between GPUs, and there are none. Use weights.transport=auto, or "
            "gloo, zmq or ray."
        )
    if staging == "host":
        raise ConfigError(
            f"weights.staging=host does not go with weights.transport={transport}, which never passes through host memory. Use "
            "weights.staging=device (or none, where there is no room for a second copy)."
        )
    if config.learner.lora:
        raise ConfigError(
            f"weights.transport={transport} sends full models; an adapter (learner.lora) is merged in host memory. Use "
            "weights.transport=auto."
        )
    if transport == "ipc" and (config.generator.placement != "colocated" or config.learner.ranks > 1):
        raise ConfigError(
            "weights.transport=ipc shares memory of one GPU: it needs generator.placement=colocated and learner.ranks=1. Use "
            "weights.transport=auto."
        )


def free_name(name: str, taken: Mapping[str, Any]) -> str:
    """``name``, or ``name_2``, ``name_3``, ... when it is taken."""
    number = 2
    unique = name
    while unique in taken:
        unique, number = f"{name}_{number}", number + 1
    return unique
