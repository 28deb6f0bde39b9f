"""One local Ray per test session, on loopback, ended by the pids it recorded."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

# Libraries keep caches, tokens and settings in the home folder: the tests give them one that goes away.
_HOME = tempfile.mkdtemp(prefix="hapo-tests-")
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
os.environ.update(HOME=_HOME, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # Ray reads it when it is imported: every listener on loopback
os.environ.pop("RAY_ADDRESS", None)

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ray_session(tmp_path_factory):
    """A local Ray on 127.0.0.1 with eight logical CPUs; yields the ray module."""
    import ray

    from actors.placement import LocalRay  # first: it sets what Ray reads when it is imported

    local = LocalRay(num_cpus=8)
    yield ray
    local.stop()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> str:
    """Folder of a random Qwen2 that knows every byte."""
    from tests.tiny import random_qwen2

    return random_qwen2(tmp_path_factory.mktemp("tiny") / "qwen2")


@pytest.fixture(scope="session")
def chain_model() -> str:
    """Folder of the shipped tiny model."""
    from hapo_async import toy

    return str(toy.MODEL_DIR)
