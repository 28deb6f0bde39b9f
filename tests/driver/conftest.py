"""What tests of the driver's loops share."""

import pytest
import ray

from tests.virtual_time import Clock


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """Virtual time; what is ended by ``ray.kill`` is a stand-in."""
    monkeypatch.setattr(ray, "kill", lambda actor: actor.die())
    return Clock(monkeypatch)
