"""The configuration: one typed tree, YAML plus ``key=value`` overrides, every cross-check with its fix.

    sections   the keys            checks   what contradicts itself            file   loading

``load(path, overrides)`` is the only way in. It raises ConfigError (exit code 2) with the value, the rule and the fix;
nothing has been started by then. Options of an algorithm live in ``options:`` and are checked against that algorithm's
own defaults; ``vllm:`` and ``deepspeed:`` are handed to those libraries and checked against their own arguments.
"""

from hapo_async.config.file import known_keys, load, overridden, parse, section_of, to_yaml
from hapo_async.config.sections import Config, EvalConfig, GateConfig

__all__ = [
    "Config",
    "EvalConfig",
    "GateConfig",
    "known_keys",
    "load",
    "overridden",
    "parse",
    "section_of",
    "to_yaml",
]
