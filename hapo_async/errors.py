"""Errors that a user meets. Exit codes: 0 done; 1 the run failed; 2 the command or the config is wrong."""

from __future__ import annotations


class UserError(ValueError):
    """The command, the config or the data is wrong: nothing was started. Exit code 2. Says value, rule and fix."""


class ConfigError(UserError):
    """A configuration that cannot run."""


class DataError(UserError):
    """A data file that cannot be used."""


class RunError(RuntimeError):
    """The run failed after it had started. Exit code 1."""
