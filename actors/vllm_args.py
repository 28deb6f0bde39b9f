"""Arguments and environment of a vLLM engine: what a user may give, what is set here, and why.

vLLM is imported only when arguments are checked: the driver runs without it.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import os
import zlib
from typing import Any

from actors.vllm_lifeline import Lifeline
from hapo_async.config import Config
from hapo_async.errors import ConfigError

# Set by us, because the recorded log-probs, the weight stream or the placement depend on them.
OWNED = {
    "model": "model",
    "tokenizer": "model",
    "dtype": "generator.dtype",
    "seed": "seed",
    "tensor_parallel_size": "generator.tensor_parallel",
    "pipeline_parallel_size": "generator.pipeline_parallel",
    "distributed_executor_backend": "generator.tensor_parallel",
    "logprobs_mode": "",
    "generation_config": "",
    "skip_tokenizer_init": "",
    "weight_transfer_config": "",
    "worker_extension_cls": "",
    "enable_sleep_mode": "generator.placement",
    "trust_remote_code": "",
    "additional_config": "",
}
CPU_KV_BYTES = 256 << 20
CPU_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # beside a busy neighbour, more threads are many times slower
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the worker lives in the engine's process, instead of one more of 900 MB
}
ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING", "TOKENIZERS_PARALLELISM": "false"}


def set_environment(device: str) -> None:
    """What vLLM reads from the environment, where it is not set already."""
    wanted = ENVIRONMENT | (CPU_ENVIRONMENT if device == "cpu" else {})
    os.environ.update({k: v for k, v in wanted.items() if k not in os.environ})


def is_installed() -> bool:
    """Whether vLLM can be imported; it is not imported here."""
    return importlib.util.find_spec("vllm") is not None


def engine_args(config: Config) -> dict[str, Any]:
    """The ``vllm:`` section, checked against vLLM's AsyncEngineArgs. Raises ConfigError with the nearest name."""
    given = dict(config.vllm)
    if not given:
        return {}
    for key in given:
        if key in OWNED:
            instead = f" Set {OWNED[key]} instead." if OWNED[key] else ""
            raise ConfigError(f"vllm.{key} is set by hapo_async itself and cannot be given.{instead}")
    os.environ.update({k: v for k, v in ENVIRONMENT.items() if k not in os.environ})
    from vllm.engine.arg_utils import AsyncEngineArgs

    known = [f.name for f in dataclasses.fields(AsyncEngineArgs)]
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else " vLLM's AsyncEngineArgs lists all."
            raise ConfigError(f"vllm.{key} is not an argument of vLLM's engine.{hint}")
    return given


def all_args(config: Config, model_path: str, device: str, name: str) -> dict[str, Any]:
    """All arguments of one generator's engine. name: the generator's."""
    from transformers import AutoConfig

    g = config.generator
    limit = AutoConfig.from_pretrained(model_path, trust_remote_code=False).get_text_config().max_position_embeddings
    needed = config.data.max_prompt_tokens + max(config.sampling.max_tokens, config.eval.max_tokens)
    args = {
        "max_model_len": min(limit, needed),
        "disable_log_stats": True,
        "scheduling_policy": "priority",  # what is to be scored does not wait behind what is to be sampled
        **({"enforce_eager": True, "kv_cache_memory_bytes": CPU_KV_BYTES} if device == "cpu" else {}),
        **engine_args(config),
    }
    dtype = ("bfloat16" if device == "cuda" else "float32") if g.dtype == "auto" else g.dtype
    return args | {
        "model": model_path,
        "dtype": dtype,
        # vLLM draws from one stream per engine; each generator gets its own.
        "seed": zlib.crc32(f"{config.seed}/{name}".encode()) & 0x7FFFFFFF,
        "tensor_parallel_size": g.tensor_parallel,
        "pipeline_parallel_size": g.pipeline_parallel,
        "distributed_executor_backend": _executor(g.width, device),
        "logprobs_mode": "processed_logprobs",  # the distribution that was sampled from, after temperature
        "generation_config": "vllm",  # no sampling defaults from the model's folder
        "skip_tokenizer_init": True,
        "weight_transfer_config": {"backend": "hapo_file"},
        "worker_extension_cls": "actors.vllm_transfer.WorkerExtension",
        "additional_config": {"lifeline": Lifeline("to the generator")},
        # On CPUs vLLM cannot sleep, and refuses to be asked for it.
        "enable_sleep_mode": g.placement == "colocated" and device == "cuda",
    }


def _executor(ranks: int, device: str) -> str | None:
    """Several ranks: on GPUs vLLM's Ray workers take the bundles of this actor's placement group; on CPUs they are
    processes of the engine's own, on this node."""
    if ranks == 1:
        return None
    return "mp" if device == "cpu" else "ray"
