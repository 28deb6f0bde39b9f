"""Finds, in the syntax trees of this project, what must not be in it: ``python tools/security_lint.py [ROOT]``.

Objects that are unpickled, text that is evaluated, shells, YAML that makes objects, ``torch.load`` without
``weights_only=True``, sockets on a wildcard, code of model folders, and a few more; ``FIXES`` in ``security_rules`` lists
the rules. Names are followed through imports, other names, ``getattr`` with a literal, ``functools.partial`` and ``**{...}``,
texts through variables and formats. Scripts and settings (shell, YAML, TOML, JSON, Makefiles) are read line by line.
Tests have fewer rules: what they keep out is never done in this project, not even there.

A line that has to break a rule says why: ``# lint: allow RULE because ...``. Such a comment that nothing needs is a finding
as well. Prints ``file:line: [rule] what: fix`` for each finding and exits with 1, or exits with 0.
"""

from __future__ import annotations

import ast
import gc
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

if __package__ in (None, ""):  # run by its path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.security_rules import FIXES
from tools.security_search import Search
from tools.security_texts import check_text, files

ALLOW = re.compile(r"#\s*lint:\s*allow\s+([\w-]+)(?:\s+because\s+(\S.*))?")
LEAST_REASON = 15  # characters


class Finding(NamedTuple):
    """path: relative to the root. what: the code that breaks the rule, cut short."""

    path: str
    line: int
    rule: str
    what: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: [{self.rule}] {self.what}: {FIXES.get(self.rule, 'remove the comment')}."


def check_tree(root: Path) -> list[Finding]:
    """All findings below ``root``, in hidden folders and in what is built or installed there none."""
    out: list[Finding] = []
    collects = gc.isenabled()
    gc.disable()  # trees hold no cycles, and looking for some takes a third of the time
    try:
        for path, relative, kind in files(root):
            out += _check_any(path, relative, kind)
    finally:
        if collects:
            gc.enable()
    return out


def _check_any(path: Path, relative: Path, kind: str) -> list[Finding]:
    is_test = relative.parts[0] == "tests"
    if kind == "python":
        return _check_file(path, str(relative), is_test)
    text = "" if is_test else path.read_text(encoding="utf-8", errors="replace")
    return [Finding(str(relative), *found) for found in check_text(text, kind == "script")]


def _check_file(path: Path, name: str, is_test: bool) -> list[Finding]:
    try:
        with tokenize.open(path) as file:
            source = file.read()
    except (SyntaxError, UnicodeDecodeError) as error:
        return [Finding(name, 1, "syntax", f"it cannot be read: {error}")]
    return check_source(source, name, is_test)


def check_source(source: str, path: str = "source.py", is_test: bool = False) -> list[Finding]:
    """The findings in one file's text."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return [Finding(path, getattr(error, "lineno", None) or 1, "syntax", f"it cannot be read: {error}")]
    spans = set(Search(tree, is_test).run())
    allowed = dict(_allowances(source)) if ALLOW.search(source) else {}
    used: set[int] = set()
    out = []
    for rule, line, first, last, what in spans:
        lines = [n for n in range(first, last + 1) if n in allowed and allowed[n][0] == rule and allowed[n][1]]
        used.update(lines)
        if not lines:
            out.append(Finding(path, line, rule, what))
    for line, (rule, has_reason) in allowed.items():
        if not has_reason:
            out.append(Finding(path, line, "allowance", f"it allows {rule} and does not say why (because ...)"))
        elif line not in used:
            out.append(Finding(path, line, "allowance", f"it allows {rule}, and nothing here needs that"))
    return sorted(out, key=lambda f: (f.line, f.rule))


def _allowances(source: str) -> Iterator[tuple[int, tuple[str, bool]]]:
    """(line, (rule, whether a reason is given)) of each comment that allows something."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and (found := ALLOW.search(token.string)):
            yield token.start[0], (found[1], len(found[2] or "") >= LEAST_REASON)


def main() -> int:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent
    found = check_tree(root)
    for finding in found:
        print(finding)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
