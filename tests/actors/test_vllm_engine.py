"""The pass-through to vLLM is checked before anything starts."""

from __future__ import annotations

import pytest

from actors import vllm_engine
from hapo_async.config import parse
from hapo_async.errors import ConfigError

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
        ("trust_remote_code", "cannot be given"),
    ],
)
def test_unknown_and_owned_arguments_are_refused_with_a_hint(key: str, message: str):
    with pytest.raises(ConfigError, match=message):
        vllm_engine.engine_args(parse({"vllm": {key: 1}}))
