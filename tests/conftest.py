"""One local Ray per test session, on loopback, ended by the pids it recorded."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ray_session(tmp_path_factory):
    """A local Ray on 127.0.0.1 with four logical CPUs; yields the ray module."""
    import ray

    from actors.placement import LocalRay

    local = LocalRay(num_cpus=8)
    yield ray
    local.stop()


@pytest.fixture(scope="session")
def chain_model() -> str:
    """Folder of the shipped tiny model."""
    from hapo_async import toy

    return str(toy.MODEL_DIR)
