"""Which dotted name an expression stands for, however it was imported, renamed or looked up. For ``tools/security_lint.py``.

Nothing is executed and the order of statements does not count: a name stands for everything that it is bound to anywhere
in its file.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence

BUILTINS = frozenset({"eval", "exec", "compile", "open", "getattr", "vars", "globals", "locals", "__import__", "input"})
_ROUNDS = 4  # how often bindings of bindings are followed

_SAME = (  # one spelling for what has several
    ("builtins.", ""),
    ("__builtins__.", ""),
    ("_pickle.", "pickle."),
    ("cPickle.", "pickle."),
    ("pickle5.", "pickle."),
    ("ray.cloudpickle.", "cloudpickle."),
    ("cloudpickle.cloudpickle.", "cloudpickle."),
    ("cloudpickle.cloudpickle_fast.", "cloudpickle."),
    ("dill._dill.", "dill."),
    ("joblib.numpy_pickle.", "joblib."),
    ("torch.serialization.", "torch."),
    ("numpy.lib.npyio.", "numpy."),
    ("numpy.lib._npyio_impl.", "numpy."),
    ("yaml.loader.", "yaml."),
    ("yaml.cyaml.", "yaml."),
    ("yaml.main.", "yaml."),
    ("posix.", "os."),
    ("os.posix.", "os."),
    ("asyncio.subprocess.", "asyncio."),
    ("torch.distributed.distributed_c10d.", "torch.distributed."),
    ("torch._C._distributed_c10d.", "torch.distributed."),
    ("multiprocessing.context.", "multiprocessing."),
)


def canonical(name: str) -> str:
    """The one spelling of a dotted name."""
    for before, after in _SAME:
        if name.startswith(before):
            name = after + name[len(before) :]
    return name


class Names:
    """The bindings of one file, from all nodes of its tree. stars: what ``from module import *`` may bring, by module."""

    def __init__(self, nodes: Sequence[ast.AST], stars: Mapping[str, frozenset[str]]) -> None:
        self.bound: dict[str, set[str]] = {}
        self.texts: dict[str, set[str]] = {}
        self._known: dict[ast.AST, set[str]] | None = None  # of each expression, once all bindings are found
        self._own: set[str] = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
        for node in nodes:
            self._imported(node, stars)
        pairs = [pair for node in nodes for pair in _bindings(node)]
        for _ in range(_ROUNDS):
            before = sum(map(len, self.bound.values())) + sum(map(len, self.texts.values()))
            for name, value in pairs:
                self.bound.setdefault(name, set()).update(x for x in self.of(value) if x != name)
                if (text := self.text(value)) is not None:
                    self.texts.setdefault(name, set()).add(text)
            if before == sum(map(len, self.bound.values())) + sum(map(len, self.texts.values())):
                break
        self._known = {}

    def _imported(self, node: ast.AST, stars: Mapping[str, frozenset[str]]) -> None:
        if isinstance(node, ast.Import):
            for alias in node.names:
                whole = alias.name if alias.asname else alias.name.partition(".")[0]
                self.bound.setdefault(alias.asname or whole, set()).add(whole)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            for alias in node.names:
                if alias.name == "*":
                    for name in stars.get(canonical(node.module + ".").rstrip("."), ()):
                        self.bound.setdefault(name, set()).add(f"{node.module}.{name}")
                else:
                    self.bound.setdefault(alias.asname or alias.name, set()).add(f"{node.module}.{alias.name}")

    def of(self, node: ast.AST | None) -> set[str]:
        """Dotted names in their one spelling; empty where nothing is known."""
        return {canonical(name) for name in self._of(node)}

    def _of(self, node: ast.AST | None) -> set[str]:
        if node is None:
            return set()
        if self._known is None:
            return self._look_up(node)
        if node not in self._known:
            self._known[node] = self._look_up(node)
        return self._known[node]

    def _look_up(self, node: ast.AST) -> set[str]:
        if isinstance(node, ast.Name):
            own = node.id in self._own and node.id not in self.bound
            known = self.bound.get(node.id, set())
            return known | ({node.id} if node.id in BUILTINS | {"__builtins__"} and not known and not own else set())
        if isinstance(node, ast.Attribute):
            return {f"{base}.{node.attr}" for base in self._of(node.value)} | self.bound.get(f".{node.attr}", set())
        if isinstance(node, ast.Call):
            return self._of_call(node)
        if isinstance(node, ast.Subscript):
            return self._of_subscript(node)
        if isinstance(node, ast.IfExp):
            return self._of(node.body) | self._of(node.orelse)
        if isinstance(node, ast.BoolOp):
            return set().union(*(self._of(x) for x in node.values))
        if isinstance(node, ast.NamedExpr | ast.Starred | ast.Await):
            return self._of(node.value)
        if isinstance(node, ast.Tuple | ast.List | ast.Set):
            return set().union(*(self._of(x) for x in node.elts))
        if isinstance(node, ast.Dict):
            return set().union(*(self._of(x) for x in node.values))
        return set()

    def _of_call(self, node: ast.Call) -> set[str]:
        """getattr(x, "y"), __import__("x"), importlib.import_module("x"), operator.attrgetter("y")(x)."""
        if isinstance(node.func, ast.Call) and "operator.attrgetter" in self.of(node.func.func) and node.args:
            attribute = self.text(node.func.args[0]) if node.func.args else None
            return {f"{base}.{attribute}" for base in self._of(node.args[0])} if attribute else set()
        called = self.of(node.func)
        first = self.text(node.args[0]) if node.args else None
        if "getattr" in called and len(node.args) > 1 and (attribute := self.text(node.args[1])):
            return {f"{base}.{attribute}" for base in self._of(node.args[0])}
        if called & {"__import__", "importlib.import_module", "importlib.__import__"} and first:
            return {first}
        if "vars" in called and node.args:
            return {f"{base}.__dict__" for base in self._of(node.args[0])}
        if called & {"globals", "locals"}:
            return {"globals()"}
        return set()

    def _of_subscript(self, node: ast.Subscript) -> set[str]:
        key = self.text(node.slice)
        out = set()
        for base in self._of(node.value):
            if key is not None and base == "sys.modules":
                out.add(key)
            elif key is not None and base.endswith(".__dict__"):
                out.add(f"{base.removesuffix('.__dict__')}.{key}")
            elif key is not None and base in ("globals()", "__builtins__", "builtins"):
                out |= (
                    {key} if base != "globals()" or key in BUILTINS | {"__builtins__"} else self.bound.get(key, set())
                )
            else:
                out.add(base)  # an element of a container
        return out

    def text(self, node: ast.AST | None) -> str | None:
        """The text that an expression is, where that can be told; unknown parts of an f-string are ``{}``."""
        if isinstance(node, ast.Constant):
            if isinstance(node.value, bytes):
                return node.value.decode("latin-1")
            return node.value if isinstance(node.value, str) else None
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            left, right = self.text(node.left), self.text(node.right)
            return left + right if left is not None and right is not None else None
        if isinstance(node, ast.JoinedStr):
            return "".join(self._piece(part) for part in node.values)
        if isinstance(node, ast.Name | ast.Attribute) and len(found := self._texts_of(node)) == 1:
            return next(iter(found))
        return None

    def _texts_of(self, node: ast.Name | ast.Attribute) -> set[str]:
        """What a variable, or an attribute of that name anywhere in the file, is set to."""
        if isinstance(node, ast.Name):
            return self.texts.get(node.id, set())
        return self.texts.get(f".{node.attr}", set()) | self.texts.get(node.attr, set())

    def _piece(self, node: ast.expr) -> str:
        inner = node.value if isinstance(node, ast.FormattedValue) else node
        found = self.text(inner)
        return "{}" if found is None else found

    def any_texts(self, node: ast.AST | None) -> set[str]:
        """All texts that an expression may be."""
        if isinstance(node, ast.Name | ast.Attribute):
            return self._texts_of(node)
        if isinstance(node, ast.IfExp):
            return self.any_texts(node.body) | self.any_texts(node.orelse)
        if isinstance(node, ast.BoolOp):
            return set().union(*(self.any_texts(x) for x in node.values))
        found = self.text(node)
        return set() if found is None else {found}


def _bindings(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """(name, what it is bound to) of one node."""
    if isinstance(node, ast.Assign):
        for target in node.targets:
            yield from _pairs(target, node.value)
    elif isinstance(node, ast.AnnAssign | ast.NamedExpr) and node.value is not None:
        yield from _pairs(node.target, node.value)
    elif isinstance(node, ast.For | ast.comprehension):
        yield from _pairs(node.target, node.iter)
    elif isinstance(node, ast.withitem) and node.optional_vars is not None:
        yield from _pairs(node.optional_vars, node.context_expr)
    elif isinstance(node, ast.ClassDef):
        for base in node.bases:
            yield node.name, base
    elif isinstance(node, ast.arguments):
        plain = [*node.posonlyargs, *node.args]
        for argument, default in zip(plain[len(plain) - len(node.defaults) :], node.defaults, strict=True):
            yield argument.arg, default
        for argument, default in zip(node.kwonlyargs, node.kw_defaults, strict=True):
            if default is not None:
                yield argument.arg, default


def _pairs(target: ast.expr, value: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(target, ast.Name):
        yield target.id, value
    elif isinstance(target, ast.Attribute):
        yield f".{target.attr}", value
    elif isinstance(target, ast.Tuple | ast.List):
        same = isinstance(value, ast.Tuple | ast.List) and len(value.elts) == len(target.elts)
        for number, element in enumerate(target.elts):
            yield from _pairs(element, value.elts[number] if same else value)  # type: ignore[attr-defined]
