"""Options: names, aliases, types and ranges."""

from __future__ import annotations

import pytest

from hapo_async import algorithms
from hapo_async.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("grpoo", {}, "Did you mean 'grpo'"),
        ("grpo", {"epss": 0.1}, "Did you mean 'eps'"),
        ("grpo", {"eps": -0.1}, "eps=-0.1.*at least 0"),
        ("grpo", {"eps": float("nan")}, "must be a number"),
        ("grpo", {"clip": 1}, "true or false"),
        ("grpo", {"reduction": "XX"}, "one of TM, SM, SN, SEQ"),
        ("hpt", {"gamma": 0.5}, "an integer"),
        ("hpt", {"reduction": "TM"}, "one of PN"),
        ("apo", {"anchor_clip": "both"}, "joint, push_only"),
        ("apo", {"k": 0}, "at least 1"),
        ("apo", {"lambda": 1.1, "lam": 1.2}, "given twice"),
        ("hapo", {"shaping_gamma": 0}, "above 0"),
    ],
)
def test_bad_names_and_options_are_refused_with_the_rule(name, options, match):
    with pytest.raises(ConfigError, match=match):
        algorithms.get(name).resolve(options)


def test_options_go_by_their_greek_names_too_and_take_their_own_type():
    options = algorithms.get("apo").resolve({"λ": 1, "K": 4.0, "eps_high": None, "r_anchor_max": 3})
    assert options["lam"] == 1.0 and isinstance(options["lam"], float)
    assert options["k"] == 4 and isinstance(options["k"], int)
    assert options["eps_high"] is None and options["r_anchor_max"] == 3.0
