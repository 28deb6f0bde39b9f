"""Generators of every kind, for all tests here that only ask things of them."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def generators(ray_session, chain_model, tmp_path_factory):
    pytest.importorskip("vllm")
    from tests.actors.serving import Generators

    started = Generators(ray_session, chain_model, tmp_path_factory.mktemp("model"))
    yield started
    started.close()
