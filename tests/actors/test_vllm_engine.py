"""What is asked of vLLM: its pass-through, checked before anything starts, and its sleep, which needs a GPU to be real."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from actors import vllm_args, vllm_engine, vllm_weights
from hapo_async import toy
from hapo_async.config import parse
from hapo_async.engine import EngineError
from hapo_async.errors import ConfigError
from hapo_async.types import Version
from hapo_async.weights import Manifest, TransferError

pytestmark = pytest.mark.skipif(not vllm_engine.is_installed(), reason="vllm is not installed")


def test_known_arguments_pass_unchanged():
    given = {"gpu_memory_utilization": 0.8, "max_num_seqs": 64}
    assert vllm_engine.engine_args(parse({"vllm": given})) == given


def test_nothing_given_is_nothing_passed():
    assert vllm_engine.engine_args(parse({})) == {}


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("gpu_memory_utilisation", "Did you mean 'gpu_memory_utilization'"),
        ("tensor_parallel_size", r"Set generator\.tensor_parallel instead"),
        ("logprobs_mode", "cannot be given"),
        ("enable_sleep_mode", r"Set generator\.placement instead"),
        ("trust_remote_code", "cannot be given"),
        ("additional_config", "cannot be given"),
    ],
)
def test_unknown_and_owned_arguments_are_refused_with_a_hint(key: str, message: str):
    with pytest.raises(ConfigError, match=message):
        vllm_engine.engine_args(parse({"vllm": {key: 1}}))


@pytest.mark.parametrize(
    ("placement", "device", "sleeps"),
    [("colocated", "cuda", True), ("colocated", "cpu", False), ("disaggregated", "cuda", False)],
)
def test_sleep_mode_is_asked_for_where_devices_are_shared_and_can_sleep(placement: str, device: str, sleeps: bool):
    config = parse({"max_staleness": 0, "generator": {"placement": placement}})
    args = vllm_args.all_args(config, str(toy.MODEL_DIR), device, "g")
    assert args["enable_sleep_mode"] is sleeps


@pytest.mark.parametrize(
    ("ranks", "device", "executor"), [(1, "cpu", None), (2, "cpu", "mp"), (1, "cuda", None), (2, "cuda", "ray")]
)
def test_ranks_are_rays_workers_on_gpus_and_own_processes_on_cpus(ranks: int, device: str, executor: str | None):
    config = parse({"generator": {"pipeline_parallel": ranks}})
    args = vllm_args.all_args(config, str(toy.MODEL_DIR), device, "g")
    assert args["distributed_executor_backend"] == executor and args["pipeline_parallel_size"] == ranks


# ---------------------------------------------------------------- sleep, on a stand-in with vLLM's own signatures


def on_gpu(scenario) -> list[str]:
    """Runs ``scenario(engine, llm)`` on an engine whose vLLM can sleep; the names of the calls that vLLM got."""
    from vllm.v1.engine.async_llm import AsyncLLM

    llm = mock.create_autospec(AsyncLLM, instance=True, errored=False)
    llm.model_config = mock.Mock(enable_sleep_mode=True, max_model_len=100)
    engine = vllm_engine.VllmEngine(llm, torch.nn.Linear(1, 1, device="meta"), [0], recompute=True)
    asyncio.run(scenario(engine, llm))
    return [_spelt(name, given) for name, _, given in llm.mock_calls]


def _spelt(name: str, given: dict) -> str:
    return f"{name}({', '.join(f'{k}={v}' for k, v in given.items())})" if name in ("sleep", "wake_up") else name


def install(engine, step: int = 1):
    weights = [("weight", torch.zeros(1, 1)), ("bias", torch.zeros(1))]
    return engine.install(Manifest(Version(0, step), ()), weights)


def test_weights_are_woken_to_be_replaced_and_nothing_is_resumed_before_the_rest_wakes():
    async def scenario(engine, _):
        await engine.sleep()
        with pytest.raises(EngineError, match="asleep"):
            await engine.score([])
        await install(engine)
        await engine.wake()
        assert engine.version == Version(0, 1)

    assert on_gpu(scenario) == [
        "sleep(level=1, mode=keep)",
        "wake_up(tags=['weights'])",
        "start_weight_update",
        "update_weights",
        "finish_weight_update",
        "wake_up()",
    ]


def test_torn_weights_stay_paused_when_their_engine_wakes():
    async def scenario(engine, llm):
        await engine.sleep()
        llm.update_weights.side_effect = RuntimeError("out of memory")
        with pytest.raises(TransferError, match="torn"):
            await install(engine)
        await engine.wake()
        with pytest.raises(EngineError, match="torn"):
            await engine.score([])
        llm.update_weights.side_effect = None
        await install(engine)

    calls = on_gpu(scenario)
    assert calls[calls.index("update_weights") + 1 :][:2] == ["wake_up()", "pause_generation"]
    assert calls[-2:] == ["finish_weight_update", "resume_generation"]


def test_what_killed_generators_left_in_memory_is_swept_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_weights, "_memory", lambda: str(tmp_path))
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait(20)
    prefix = vllm_weights._prefix()
    left, others = tmp_path / f"{prefix}{gone.pid}-x", [f"{prefix}{os.getpid()}-y", f"hapo-1-{gone.pid}-z", "hapo-else"]
    for folder in (left, *(tmp_path / name for name in others)):
        folder.mkdir()
        (folder / "weights.safetensors").write_bytes(b"x")
    with vllm_weights._folder() as own:
        vllm_weights.sweep()
        assert sorted(f.name for f in tmp_path.iterdir()) == sorted([*others, Path(own).name])
