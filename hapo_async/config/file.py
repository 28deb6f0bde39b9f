"""From a YAML file and ``key=value`` overrides to a Config. What is wrong is a ConfigError: the value, the rule, the fix."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from hapo_async import secrets, subkeys
from hapo_async.config.sections import Config
from hapo_async.errors import ConfigError


def load(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file, applies ``a.b=value`` overrides (values are YAML), validates.

    Raises ConfigError for a missing file, broken YAML, an unknown key (with the nearest known one), a bad value, or a
    failed cross-check.
    """
    tree = _read_yaml(Path(path)) if path is not None else {}
    for text in overrides:
        _apply_override(tree, text)
    _refuse_redacted(tree, "")
    if path is not None and not (tree.get("run") or {}).get("dir"):
        run = tree.setdefault("run", {}) or {}
        tree["run"] = {**run, "dir": f"runs/{Path(path).stem}"}
    return parse(tree)


def overridden(overrides: Sequence[str]) -> dict[str, Any]:
    """The tree that overrides alone make. Raises ConfigError for one that is not of the form key=value."""
    tree: dict[str, Any] = {}
    for text in overrides:
        _apply_override(tree, text)
    return tree


def parse(tree: dict[str, Any]) -> Config:
    """Validates a plain tree. Raises ConfigError."""
    secrets.learn(tree)
    _refuse_unknown(tree, Config, "")
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None


def to_yaml(config: Config) -> str:
    """The whole tree, with ``secrets.MARK`` in place of secrets."""
    return yaml.safe_dump(secrets.redacted(config.model_dump(mode="json")), sort_keys=False, allow_unicode=True)


def known_keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Dotted names of all leaves of the tree."""
    out = []
    for name, info in model.model_fields.items():
        sub = section_of(info.annotation)
        out += known_keys(sub, f"{prefix}{name}.") if sub else [prefix + name]
    return out


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"config file {str(path)!r} does not exist. The shipped ones are in configs/.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {str(path)!r} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"config file {str(path)!r} is not YAML: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"config file {str(path)!r} holds a {type(tree).__name__}; it must hold key: value pairs.")
    return tree


def _apply_override(tree: dict[str, Any], text: str) -> None:
    key, equals, raw = text.partition("=")
    key = key.strip().removeprefix("--")
    secrets.learn({key: raw})
    if not equals or not key:
        raise ConfigError(f"override {text!r} is not of the form key=value, such as train.steps=10.")
    try:
        value = yaml.safe_load(raw)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {text!r}: the value is not YAML: {error}") from None
    if isinstance(value, str):
        value = _number(value)
    node = tree
    *parents, leaf = key.split(".")
    for parent in parents:
        child = node.setdefault(parent, {})
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"override {text!r}: {parent!r} is a value, not a section.")
        node = child
    node[leaf] = value


def _refuse_redacted(tree: Any, key: str) -> None:
    """Raises ConfigError where a value is that of a run folder's config.yaml, which holds no secrets."""
    if isinstance(tree, dict | list):
        for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            _refuse_redacted(value, f"{key}.{name}" if key else str(name))
    elif isinstance(tree, str) and secrets.MARK in tree:
        raise ConfigError(f"{key}={tree!r} holds {secrets.MARK} in place of a secret. Give it again: {key}=...")


def _number(text: str) -> str | float:
    """YAML 1.1 reads 1e-4 as a string; people do not."""
    try:
        return float(text) if any(ch.isdigit() for ch in text) else text
    except ValueError:
        return text


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a field of this type holds, None for a leaf."""
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _refuse_unknown(tree: dict[str, Any], model: type[BaseModel], prefix: str) -> None:
    for key, value in tree.items():
        if key not in model.model_fields:
            raise ConfigError(f"unknown key {prefix + str(key)!r}.{_nearest(prefix + str(key))}")
        sub = section_of(model.model_fields[key].annotation)
        if sub and value is None:
            tree[key] = {}
        elif sub and not isinstance(value, dict):
            raise ConfigError(f"{prefix + key!r} is a section with keys {', '.join(sub.model_fields)}; got {value!r}.")
        elif sub:
            _refuse_unknown(value, sub, f"{prefix}{key}.")


def _nearest(key: str) -> str:
    known = [*known_keys(), *(f"{table}.{name}" for table, names in subkeys.TABLES.items() for name in names)]
    section, leaf = key.partition(".")[0], key.rsplit(".", 1)[-1]
    by_leaf = [k for k in known if k.rsplit(".", 1)[-1] == leaf]
    by_leaf.sort(key=lambda k: k.partition(".")[0] != section)
    near = by_leaf or difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    near = near or [k for k in known if difflib.get_close_matches(leaf, [k.rsplit(".", 1)[-1]], n=1, cutoff=0.7)]
    return f" Did you mean {near[0]!r}?" if near else " `hapo-async train CONFIG --dry-run` prints all keys."


def _explain(error: ValidationError) -> str:
    lines = []
    for item in error.errors():
        where = ".".join(str(p) for p in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        lines.append(f"{where}={item['input']!r}: {message}." if where else message)
    return "\n".join(lines)
