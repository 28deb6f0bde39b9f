"""Checks that imports run one way: ``hapo_async`` modules <- ``actors`` <- the driver and the command line.

- ``hapo_async`` imports neither ray, vllm, deepspeed nor zmq, nor ``actors``; only ``hapo_async/cli.py``,
  ``__main__.py`` and ``hapo_async/driver/`` may import ``ray`` and ``actors``.
- Nobody but the command line imports ``hapo_async.driver`` or ``hapo_async.cli``.

It reads the syntax tree, so an import inside a function counts as well. ``python tools/check_imports.py [ROOT]`` prints
what is wrong and exits with 1, or exits with 0.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

LIBRARIES = ("ray", "vllm", "deepspeed", "zmq")
TOP = ("hapo_async.driver", "hapo_async.cli")


def problems(root: Path) -> list[str]:
    """One line for each import that runs the wrong way, for the tree under ``root``."""
    out = []
    for package in ("hapo_async", "actors"):
        for path in sorted((root / package).rglob("*.py")):
            out += _problems_of(path, path.relative_to(root))
    return out


def _problems_of(path: Path, relative: Path) -> Iterator[str]:
    module = ".".join(relative.with_suffix("").parts)
    is_command = module in ("hapo_async.cli", "hapo_async.__main__")
    is_driver = relative.parts[:2] == ("hapo_async", "driver")
    is_core = relative.parts[0] == "hapo_async" and not (is_command or is_driver)
    for line, name in imported(ast.parse(path.read_text(encoding="utf-8")), module):
        where = f"{relative}:{line}"
        if is_core and _within(name, (*LIBRARIES, "actors")):
            yield f"{where}: {module} imports {name}; only actors, hapo_async/driver and hapo_async/cli.py may."
        elif (is_command or is_driver) and _within(name, ("vllm", "deepspeed", "zmq")):
            yield f"{where}: {module} imports {name}; only actors may."
        if _within(name, TOP) and not is_command and not (is_driver and _within(name, ("hapo_async.driver",))):
            yield f"{where}: {module} imports {name}; only the command line may."


def imported(tree: ast.AST, module: str) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of each import of a module's syntax tree."""
    parents = module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # A package is named with its __init__ here, so that its last part is dropped like that of a module.
            base = parents[: len(parents) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{stem}.{alias.name}") for alias in node.names)


def _within(name: str, modules: tuple[str, ...]) -> bool:
    return any(name == m or name.startswith(m + ".") for m in modules)


def main() -> int:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent
    found = problems(root)
    for line in found:
        print(line)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
