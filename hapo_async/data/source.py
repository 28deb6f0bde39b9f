"""Reading rows: JSON lines, JSON lists, parquet, `datasets` names, the built-in task."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hapo_async.errors import DataError
from hapo_async.files import parse_json

Row = dict[str, Any]

SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
_HUB_NAME = re.compile(r"[\w.-]+(?:/[\w.-]+)?(?::[\w.+\[\]%-]+){0,2}")
_BUILTIN = "builtin:chain/"
_HUB_TIMEOUT_S = 5.0


def load_rows(source: str) -> tuple[list[Row], str]:
    """All rows of a source, and the source's short name (the file's stem).

    source: a file, a `datasets` name (``name``, ``name:split`` or ``name:config:split``; split train by default) or
    builtin:chain/{train,eval}. Raises DataError: missing, of an unsupported type, broken (with the line), empty.
    """
    if source.startswith("builtin:"):
        return _builtin(source), source.removeprefix("builtin:").replace("/", "-")
    path = Path(source).expanduser()
    if path.is_dir():
        raise DataError(f"data source {source!r} is a folder. Give a file in it ({', '.join(SUFFIXES)}).")
    if path.is_file():
        rows, name = _read_file(path, source), path.stem
    elif path.suffix.lower() in SUFFIXES or source.startswith((".", "/", "~")) or not _HUB_NAME.fullmatch(source):
        raise DataError(
            f"data file {source!r} does not exist{_nearby(path)}. Give a file that does, or a `datasets` name."
        )
    else:
        rows, name = _from_hub(source), source.split(":")[0].split("/")[-1]
    if not rows:
        raise DataError(f"data source {source!r} holds no rows. Give one that has at least one.")
    return rows, name


def _read_file(path: Path, source: str) -> list[Row]:
    readers = {".jsonl": _read_lines, ".ndjson": _read_lines, ".json": _read_json, ".parquet": _read_parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"data file {source!r} has type {path.suffix or '(none)'!r}, which is not supported. "
            f"Convert it to one of {', '.join(SUFFIXES)}."
        )
    try:
        return reader(path)
    except UnicodeDecodeError as error:
        raise DataError(f"data file {source!r} is not UTF-8 text: {error}. Save it as UTF-8.") from None
    except OSError as error:
        raise DataError(f"data file {source!r} cannot be read: {error}.") from None


def _read_lines(path: Path) -> list[Row]:
    with path.open(encoding="utf-8-sig") as lines:
        return [_row(line, path, number) for number, line in enumerate(lines, 1) if line.strip()]


def _row(line: str, path: Path, number: int) -> Row:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise DataError(
            f"{path} line {number} is not JSON: {error}. Line: {line.strip()[:80]!r}. Fix or remove it."
        ) from None
    return _checked(row, f"{path} line {number}")


def _checked(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise DataError(
            f'{where} holds a {type(row).__name__}; every row must be an object of columns, such as {{"prompt": ...}}.'
        )
    return row


def _read_json(path: Path) -> list[Row]:
    text = path.read_text(encoding="utf-8-sig")
    if not text.strip():
        return []
    try:
        tree = parse_json(text)
    except ValueError as error:
        if len(text.strip().splitlines()) > 1 and text.lstrip().startswith("{"):
            return _read_lines(path)  # JSON lines under the wrong name
        raise DataError(f"{path} is not JSON: {error}. Fix it there, or name JSON lines .jsonl.") from None
    if isinstance(tree, dict):
        lists = [value for value in tree.values() if isinstance(value, list)]
        if len(lists) == 1 and lists[0] and isinstance(lists[0][0], dict):
            tree = lists[0]  # {"data": [...]}
        elif tree:
            tree = [tree]  # a file of one row
    if not isinstance(tree, list):
        raise DataError(
            f"{path} holds a {type(tree).__name__}; it must hold a list of rows, or one row per line (.jsonl)."
        )
    return [_checked(row, f"{path} row {number}") for number, row in enumerate(tree, 1)]


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a parquet file that can be read: {error}. Write it again.") from None


def _builtin(source: str) -> list[Row]:
    split = source.removeprefix(_BUILTIN)
    if not source.startswith(_BUILTIN) or split not in ("train", "eval"):
        raise DataError(
            f"data source {source!r} is unknown. The built-in ones are builtin:chain/train and builtin:chain/eval."
        )
    from hapo_async import toy

    return [dict(row) for row in toy.builtin_rows(split)]


# --------------------------------------------------------------------------------------------------------------------
# Hugging Face hub


def _from_hub(source: str) -> list[Row]:
    name, *rest = source.split(":")
    config, split = (rest[0], rest[1]) if len(rest) == 2 else (None, rest[0] if rest else "train")
    missing = f"there is no file {source!r}"
    reachable = hub_reachable()
    if not reachable:
        os.environ.setdefault("HF_DATASETS_OFFLINE", "1")  # what is cached can still be used, without retries
    import datasets

    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # `datasets` raises many kinds, all of which mean: this name gives no rows
        why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        how = "" if reachable else " and the Hugging Face hub cannot be reached from here (or HF_HUB_OFFLINE is set)"
        raise DataError(
            f"{missing}{how}; as a `datasets` name (name[:config]:split) it fails: {why[:300]}. "
            "Check the path or the name."
        ) from None
    return [dict(row) for row in loaded]


def hub_reachable() -> bool:
    """Whether the Hugging Face hub answers within seconds; False at once where HF_HUB_OFFLINE is set."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return False
    import urllib.error
    import urllib.request

    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if not endpoint.startswith(("https://", "http://")):
        return False
    request = urllib.request.Request(endpoint, method="HEAD")  # noqa: S310  (the scheme is checked above)
    try:
        with urllib.request.urlopen(request, timeout=_HUB_TIMEOUT_S):  # noqa: S310
            return True
    except urllib.error.HTTPError:
        return True  # it answered
    except OSError:
        return False


def _nearby(path: Path) -> str:
    """Names in the same folder that a typing error may have meant."""
    import difflib

    folder = path.parent
    if not folder.is_dir():
        return f" (nor does the folder {str(folder)!r})"
    names: Iterable[str] = (p.name for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
    near = difflib.get_close_matches(path.name, list(names), n=1, cutoff=0.6)
    return f"; did you mean {str(folder / near[0])!r}?" if near else ""
