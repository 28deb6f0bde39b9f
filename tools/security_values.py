"""Which texts and which literals an expression may stand for. For ``tools/security_lint.py``.

Variables are followed through everything they are set to anywhere in the file; nothing is executed.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterable, Iterator

UNKNOWN = "{}"
"""Stands in a text for a part that is not known."""
_MOST = 16  # texts of one expression, and repetitions
_PERCENT = re.compile(r"%(?:\((\w+)\))?[-#0 +]*\d*(?:\.\d+)?[diouxXeEfFgGcrsa%]")
_BRACES = re.compile(r"\{(\w*)[^{}]*\}")
_SAME_TEXT = frozenset({"encode", "decode", "strip", "lstrip", "rstrip", "removesuffix", "removeprefix", "replace"})


class Values:
    """values: name, or ``.attribute``, to what it is set to."""

    def __init__(self) -> None:
        self.values: dict[str, list[ast.expr]] = {}
        self._texts: dict[ast.AST, frozenset[str]] = {}
        self._literals: dict[ast.AST, list[ast.expr]] = {}
        self._busy: set[ast.AST] = set()
        self._following: set[ast.AST] = set()

    def text(self, node: ast.AST | None) -> str | None:
        """The text that an expression is, where it can be but one."""
        found = self.texts(node)
        return next(iter(found)) if len(found) == 1 else None

    def texts(self, node: ast.AST | None) -> frozenset[str]:
        """All texts that an expression may be."""
        if node is None or node in self._busy:
            return frozenset()
        if node not in self._texts:
            self._busy.add(node)
            self._texts[node] = frozenset(itertools.islice(self._read(node), _MOST))
            self._busy.discard(node)
        return self._texts[node]

    def literals(self, node: ast.AST | None) -> list[ast.expr]:
        """What an expression is once variables, choices and elements of literals are followed."""
        if node is None or node in self._following:
            return []
        if node not in self._literals:
            self._following.add(node)
            inside = list(self._same(node))
            own = [node] if isinstance(node, ast.expr) and not inside else []
            found = [one for other in inside for one in self.literals(other)] + own
            self._literals[node] = list(dict.fromkeys(found))[:_MOST]
            self._following.discard(node)
        return self._literals[node]

    def _same(self, node: ast.AST) -> Iterator[ast.expr]:
        if isinstance(node, ast.Name):
            yield from self.values.get(node.id, ())
        elif isinstance(node, ast.Attribute):
            yield from self.values.get(f".{node.attr}", ())
            yield from self.values.get(node.attr, ())
        elif isinstance(node, ast.IfExp):
            yield from (node.body, node.orelse)
        elif isinstance(node, ast.BoolOp):
            yield from node.values
        elif isinstance(node, ast.NamedExpr | ast.Starred | ast.Await):
            yield node.value
        elif isinstance(node, ast.Subscript) and not isinstance(node.slice, ast.Slice):
            yield from self._elements(node)
        elif isinstance(node, ast.Call):
            yield from self._default(node)

    def _elements(self, node: ast.Subscript) -> Iterator[ast.expr]:
        """HOSTS["all"] of a dictionary, HOSTS[0] of a list."""
        key = node.slice.value if isinstance(node.slice, ast.Constant) else None
        for whole in self.literals(node.value):
            if isinstance(whole, ast.Dict):
                for name, value in zip(whole.keys, whole.values, strict=True):
                    if key is None or (isinstance(name, ast.Constant) and name.value == key):
                        yield value
            elif isinstance(whole, ast.List | ast.Tuple) and isinstance(key, int):
                yield from whole.elts[key:][:1]

    @staticmethod
    def _default(node: ast.Call) -> Iterator[ast.expr]:
        """os.environ.get(x, default), os.getenv(x, default), d.get(x, default), getattr(x, y, default), next(x, default), and
        tuple(x)."""
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in ("tuple", "list"):
            yield from node.args[:1]
        where = {"get": 1, "getenv": 1, "setdefault": 1, "pop": 1, "getattr": 2, "next": 1}.get(name)
        if where is not None:
            yield from node.args[where : where + 1]
            yield from (k.value for k in node.keywords if k.arg == "default")

    def _read(self, node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Constant):
            if isinstance(node.value, bytes):
                yield node.value.decode("latin-1")
            elif isinstance(node.value, str):
                yield node.value
        elif isinstance(node, ast.BinOp):
            yield from self._operation(node)
        elif isinstance(node, ast.JoinedStr):
            yield from self._joined("", node.values)
        elif isinstance(node, ast.FormattedValue):
            yield from self.texts(node.value)
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Slice):
            yield from self._sliced(node.value, node.slice)
        else:
            for one in self._same(node):
                yield from self.texts(one)
            if isinstance(node, ast.Call):
                yield from self._called(node)

    def _operation(self, node: ast.BinOp) -> Iterator[str]:
        if isinstance(node.op, ast.Add) and (self.texts(node.left) or self.texts(node.right)):
            yield from self._joined("", [node.left, node.right])
        elif isinstance(node.op, ast.Mod):
            for text in self.texts(node.left):
                yield from self._percent(text, node.right)
        elif isinstance(node.op, ast.Mult) and isinstance(node.right, ast.Constant):
            times = node.right.value
            if isinstance(times, int) and times <= _MOST:
                yield from (text * times for text in self.texts(node.left))

    def _joined(self, between: str, parts: Iterable[ast.expr]) -> Iterator[str]:
        pieces = [self.texts(part) or {UNKNOWN} for part in parts]
        yield from map(between.join, itertools.islice(itertools.product(*pieces), _MOST))

    def _sliced(self, node: ast.expr, part: ast.Slice) -> Iterator[str]:
        try:
            bounds = [None if x is None else ast.literal_eval(x) for x in (part.lower, part.upper, part.step)]
            yield from (text[slice(*bounds)] for text in self.texts(node))
        except (ValueError, TypeError):
            return

    def _percent(self, text: str, node: ast.expr) -> Iterator[str]:
        given = node.elts if isinstance(node, ast.Tuple) else [node]
        named = {}
        if isinstance(node, ast.Dict):
            named = {self.text(key): value for key, value in zip(node.keys, node.values, strict=True)}
        yield self._filled(_PERCENT, text.replace("%%", "\0"), given, named).replace("\0", "%")

    def _filled(
        self, holes: re.Pattern[str], text: str, given: list[ast.expr], named: dict[str | None, ast.expr]
    ) -> str:
        left = iter(given)

        def one(hole: re.Match[str]) -> str:
            name = hole[1] or ""
            at = given[int(name)] if name.isdigit() and int(name) < len(given) else named.get(name)
            found = self.texts(at if name else next(left, None))
            return min(found, key=len) if found else UNKNOWN  # "" and "*" rather than an address

        return holes.sub(one, text)

    def _called(self, node: ast.Call) -> Iterator[str]:
        """Of str(x), x.format(...), x.join([...]), x.lower()."""
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if not isinstance(node.func, ast.Attribute):
            if name in ("str", "bytes"):
                yield from self.texts(node.args[0]) if node.args else ("",)
            return
        for text in self.texts(node.func.value) if name in _SAME_TEXT | {"format", "join", "lower", "upper"} else ():
            if name == "format":
                named: dict[str | None, ast.expr] = {k.arg: k.value for k in node.keywords}
                yield self._filled(_BRACES, text, node.args, named)
            elif name == "join" and node.args:
                for parts in self.literals(node.args[0]):
                    if isinstance(parts, ast.List | ast.Tuple):
                        yield from self._joined(text, parts.elts)
            else:
                yield {"lower": text.lower(), "upper": text.upper()}.get(name, text)
