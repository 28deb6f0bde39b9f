"""Which dotted name an expression stands for, however it was imported, renamed or looked up. For ``tools/security_lint.py``.

Nothing is executed and the order of statements does not count: a name stands for everything that it is bound to anywhere
in its file.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator, Mapping, Sequence

from tools.security_values import Values

BUILTINS = frozenset({"eval", "exec", "compile", "open", "getattr", "vars", "globals", "locals", "__import__", "input"})
_BUILTIN = BUILTINS | {"__builtins__"}
_MARKS = (ast.expr_context, ast.operator, ast.cmpop, ast.unaryop, ast.boolop)
_BINDING = (
    *(ast.Assign, ast.AnnAssign, ast.NamedExpr, ast.For, ast.AsyncFor, ast.comprehension, ast.withitem, ast.ClassDef),
    *(ast.Return, ast.Call, ast.arguments),
)
_MOST_DOTS = 6
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
    ("torch.distributed.checkpoint.state_dict_loader.", "torch.distributed.checkpoint."),
    ("torch.multiprocessing.", "multiprocessing."),
    ("multiprocessing.context.", "multiprocessing."),
    ("yaml.constructor.", "yaml."),
    ("oyaml.", "yaml."),
    ("ruyaml.", "ruamel.yaml."),
    ("ruamel_yaml.", "ruamel.yaml."),
    ("ruamel.yaml.loader.", "ruamel.yaml."),
    ("ruamel.yaml.constructor.", "ruamel.yaml."),
    ("ruamel.yaml.main.", "ruamel.yaml."),
    ("asyncio.streams.", "asyncio."),
    ("asyncio.base_events.", "asyncio."),
    ("prometheus_client.exposition.", "prometheus_client."),
    ("jsonpickle.unpickler.", "jsonpickle."),
)
_INSIDE = re.compile(r".+\.(?=(?:pickle|cPickle|_pickle|cloudpickle|dill|marshal|_?ForkingPickler)\.\w+$)")
_MODULE_OF = frozenset({"__import__", "importlib.import_module", "importlib.__import__"})
_BY_PATH = frozenset({"pkgutil.resolve_name", "pydoc.locate", "django.utils.module_loading.import_string"})
_GET = frozenset({"get", "pop", "setdefault", "__getitem__"})
_GETATTR = frozenset({"getattr", "inspect.getattr_static"})
LOOKUPS = _MODULE_OF | _BY_PATH | _GETATTR
"""Calls that give what their text names."""


@functools.cache
def canonical(name: str) -> str:
    """The one spelling of a dotted name."""
    for before, after in _SAME:
        if name.startswith(before):
            name = after + name[len(before) :]
    inside = _INSIDE.match(name)  # torch.serialization.pickle.loads
    return canonical(name[inside.end() :]) if inside else name


Parents = Mapping[ast.AST, ast.AST]


def nodes_of(tree: ast.Module) -> tuple[list[ast.AST], dict[ast.AST, ast.AST]]:
    """All nodes that stand somewhere in the source, outer ones first, and the parent of each."""
    nodes: list[ast.AST] = [tree]
    parents: dict[ast.AST, ast.AST] = {}
    for node in nodes:  # it grows meanwhile
        for field in node._fields:
            value = getattr(node, field, None)
            for child in value if isinstance(value, list) else (value,):
                if isinstance(child, ast.AST) and not isinstance(child, _MARKS):
                    parents[child] = node
                    nodes.append(child)
    return nodes, parents


class Names(Values):
    """The bindings of one file, from all nodes of its tree. stars: what ``from module import *`` may bring, by module."""

    def __init__(self, nodes: Sequence[ast.AST], parents: Parents, stars: Mapping[str, frozenset[str]]) -> None:
        super().__init__()
        self.bound: dict[str, set[str]] = {}
        self._known: dict[ast.AST, set[str]] | None = None  # of each expression, once all bindings are found
        self._spelt: dict[ast.AST, set[str]] = {}
        self._own, self._replaced = _of_module(nodes[0])
        for node in nodes:
            if isinstance(node, ast.Import | ast.ImportFrom):
                self._imported(node, stars)
        functions = {n.name: n for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)}
        pairs = [pair for node in nodes if isinstance(node, _BINDING) for pair in _bindings(node, parents, functions)]
        for name, value in pairs:
            self.values.setdefault(name, []).append(value)
        for _ in range(_ROUNDS):
            before = sum(map(len, self.bound.values()))
            for name, value in pairs:
                if found := self.of(value):
                    self.bound.setdefault(name, set()).update(x for x in found if x != name)
            if before == sum(map(len, self.bound.values())):
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
        if node is None or self._known is None:
            return {canonical(name) for name in self._of(node)}
        if node not in self._spelt:
            self._spelt[node] = {canonical(name) for name in self._of(node)}
        return self._spelt[node]

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
            known = self.bound.get(node.id, set())
            hidden = node.id in self._own or (bool(known) and node.id in self._replaced)
            return known | ({node.id} if node.id in _BUILTIN and not hidden else set())
        if isinstance(node, ast.Attribute):
            found = {
                f"{base}.{node.attr}" for base in self._of(node.value) if base.count(".") < _MOST_DOTS
            } | self.bound.get(f".{node.attr}", set())
            of_class = isinstance(node.value, ast.Name) and node.value.id in self._own | {"self", "cls"}
            return found | self.bound.get(node.attr, set()) if of_class else found
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
        if isinstance(node.func, ast.Lambda):
            return self._of(node.func.body)
        called = self.of(node.func)
        first = self.text(node.args[0]) if node.args else None
        if called & _GETATTR and len(node.args) > 1 and (attribute := self.text(node.args[1])):
            return {f"{base}.{attribute}" for base in self._of(node.args[0])}
        if len(node.args) > 1 and getattr(node.func, "attr", "") == "__getattribute__":
            return {f"{base}.{self.text(node.args[1])}" for base in self._of(node.args[0])}
        if isinstance(node.func, ast.Attribute) and first is not None:
            base = self._of(node.func.value)
            if node.func.attr == "__getattribute__":
                return {f"{one}.{first}" for one in base}
            if node.func.attr in _GET and any(x.endswith((".__dict__", ".modules", "()", "builtins__")) for x in base):
                return self._of_keys(base, first)
        if called & _MODULE_OF and first:
            return {first}
        if called & _BY_PATH and first:
            return {first.replace(":", ".")}
        if "ctypes.CDLL" in called:
            return {"ctypes.CDLL"}
        if "vars" in called and node.args:
            return {f"{base}.__dict__" for base in self._of(node.args[0])}
        if called & {"globals", "locals"}:
            return {"globals()"}
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        return self.bound.get(f"{name}()", set())  # what a function of this file returns

    def _of_subscript(self, node: ast.Subscript) -> set[str]:
        return self._of_keys(self._of(node.value), self.text(node.slice))

    def _of_keys(self, bases: set[str], key: str | None) -> set[str]:
        out = set()
        for base in bases:
            if key is not None and base == "sys.modules":
                out.add(key)
            elif key is not None and base.endswith(".__dict__"):
                out.add(f"{base.removesuffix('.__dict__')}.{key}")
            elif key is not None and base in ("globals()", "__builtins__", "builtins"):
                out |= {key} if base != "globals()" or key in _BUILTIN else self.bound.get(key, set())
            else:
                out.add(base)  # an element of a container
        return out


def _of_module(module: ast.AST) -> tuple[set[str], set[str]]:
    """Names that a module defines itself, and those that it imports or assigns: what hides a builtin in all of it."""
    own: set[str] = set()
    replaced: set[str] = set()
    left = list(ast.iter_child_nodes(module))
    while left:
        node = left.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            replaced |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            replaced.add(node.id)
        elif not isinstance(node, ast.Lambda):
            left += ast.iter_child_nodes(node)
    return own, replaced


Functions = Mapping[str, ast.FunctionDef | ast.AsyncFunctionDef]


def _bindings(node: ast.AST, parents: Parents, functions: Functions) -> Iterator[tuple[str, ast.expr]]:
    """(name, what it is bound to) of one node."""
    if isinstance(node, ast.Assign):
        for target in node.targets:
            yield from _pairs(target, node.value)
    elif isinstance(node, ast.AnnAssign | ast.NamedExpr) and node.value is not None:
        yield from _pairs(node.target, node.value)
    elif isinstance(node, ast.For | ast.AsyncFor | ast.comprehension):
        is_literal = isinstance(node.iter, ast.Tuple | ast.List | ast.Set)
        for one in node.iter.elts if is_literal else [node.iter]:  # type: ignore[attr-defined]
            yield from _pairs(node.target, one)
        if isinstance(node.iter, ast.Dict):
            yield from (pair for key in node.iter.keys if key is not None for pair in _pairs(node.target, key))
    elif isinstance(node, ast.withitem) and node.optional_vars is not None:
        yield from _pairs(node.optional_vars, node.context_expr)
    elif isinstance(node, ast.ClassDef):
        for base in node.bases:
            yield node.name, base
    else:
        yield from _of_functions(node, parents, functions)


def _of_functions(node: ast.AST, parents: Parents, functions: Functions) -> Iterator[tuple[str, ast.expr]]:
    """What functions return, as ``name()``, and what their arguments are given."""
    if isinstance(node, ast.Return) and node.value is not None:
        outer = parents[node]
        while not isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef | ast.Module):
            outer = parents[outer]
        yield f"{getattr(outer, 'name', '')}()", node.value
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in functions:
        taken = functions[node.func.id].args
        yield from zip((a.arg for a in (*taken.posonlyargs, *taken.args)), node.args, strict=False)
    elif isinstance(node, ast.arguments):
        plain = [*node.posonlyargs, *node.args]
        for argument, default in zip(plain[len(plain) - len(node.defaults) :], node.defaults, strict=True):
            yield argument.arg, default
        for argument, given in zip(node.kwonlyargs, node.kw_defaults, strict=True):
            if given is not None:
                yield argument.arg, given


def _pairs(target: ast.expr, value: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(target, ast.Name):
        yield target.id, value
        if isinstance(value, ast.Lambda):
            yield f"{target.id}()", value.body
    elif isinstance(target, ast.Attribute):
        yield f".{target.attr}", value
    elif isinstance(target, ast.Tuple | ast.List):
        same = isinstance(value, ast.Tuple | ast.List) and len(value.elts) == len(target.elts)
        for number, element in enumerate(target.elts):
            yield from _pairs(element, value.elts[number] if same else value)  # type: ignore[attr-defined]
