"""One pass over a syntax tree, for ``tools/security_lint.py``: what of it breaks a rule, and where a comment may allow that."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator

from tools import security_rules as rules
from tools.security_binds import NAMED_WILDCARD, is_wildcard, names_wildcard, opens_wildcard
from tools.security_names import BUILTINS, LOOKUPS, Names, canonical, nodes_of
from tools.security_shells import mentions_shell, runs_shell

NOT_IN_TESTS = frozenset({"connection", "objects", "weak-hash", "tls", "extract", "mktemp", "pickle"})
_UNSAFE_STARS = frozenset({"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"})
_SERVERS = frozenset({"ray.init", "uvicorn.Config"})
_NO_LOOKUP = rules.PICKLES | {"builtins", "__builtins__", "yaml"}
_LOOKED_UP_BY_NAME = frozenset({"getattr", "inspect.getattr_static"})
_FRAME = re.compile(r"(?:.*_)?(?:df|frame|dataframe)", re.IGNORECASE)
_JUDGES: dict[type[ast.AST], str] = {
    ast.Call: "_call",
    ast.Dict: "_dict",
    ast.Assign: "_assigned",
    ast.AnnAssign: "_assigned",
    ast.Tuple: "_tuple",
    ast.List: "_list",
    ast.arguments: "_defaults",
    ast.Constant: "_constant",
    ast.Import: "_import",
    ast.ImportFrom: "_import",
}
_JUDGED = {*_JUDGES, ast.Name, ast.Attribute, ast.Subscript}

Span = tuple[str, int, int, int, str]
"""(rule, line, first and last line where a comment may stand, code)."""


class Search:
    """One pass over a tree."""

    def __init__(self, tree: ast.Module, is_test: bool) -> None:
        self._is_test = is_test
        self._nodes, self._parents = nodes_of(tree)
        self._names = Names(self._nodes, self._parents, _STARS)
        self._documentation = set(_docstrings(self._nodes))
        self._stored = {n.id for n in self._nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        self._has_shell = any(map(mentions_shell, self._nodes))

    def run(self) -> Iterator[Span]:
        for node in self._nodes:
            for rule in self._judge(node) if type(node) in _JUDGED else ():
                if not (self._is_test and rule in NOT_IN_TESTS):
                    yield self._span(rule, node)

    def _span(self, rule: str, node: ast.AST) -> Span:
        """A comment may stand on any line of the statement; of one with a body, on those of the expression."""
        at = node
        while not isinstance(at, ast.stmt):
            if hasattr(at, "lineno"):
                node = node if hasattr(node, "lineno") else at
            at = self._parents[at]
        where: ast.AST = node if hasattr(at, "body") and hasattr(node, "lineno") else at
        line = int(getattr(node, "lineno", at.lineno))
        what = " ".join(ast.unparse(node).split())
        last = int(getattr(where, "end_lineno", None) or line)
        return rule, line, int(getattr(where, "lineno", line)), last, what if len(what) <= 70 else f"{what[:67]}..."

    def _judge(self, node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Name | ast.Attribute | ast.Subscript | ast.Call):
            yield from self._mention(node)
        if name := _JUDGES.get(type(node)):
            yield from getattr(self, name)(node)

    # ---------------------------------------------------------------- names

    def _mention(self, node: ast.expr) -> Iterator[str]:
        """Names that are never used, and ones that need arguments where they are handed on without."""
        if isinstance(node, ast.Name) and node.id not in self._names.bound and node.id not in BUILTINS:
            return
        if isinstance(getattr(node, "ctx", None), ast.Store | ast.Del) or self._is_rebound(node):
            return
        is_call = isinstance(node, ast.Call) and not self._is_lookup(node)
        found = set() if is_call else self._names.of(node) | self._spelled(node)
        for rule, banned in rules.ALWAYS.items():
            if found & banned:
                yield rule
        if isinstance(node, ast.Call) and found & rules.PICKLES:
            yield "pickle"
        last = node.attr if isinstance(node, ast.Attribute) else self._literal_attribute(node)
        if last is not None and last in rules.METHODS and not any(found & banned for banned in rules.ALWAYS.values()):
            yield rules.METHODS[last]
        if found & rules.NEED_CALL and not self._is_called(node):
            yield next(self._rule_of(name) for name in sorted(found & rules.NEED_CALL))

    def _is_rebound(self, node: ast.expr) -> bool:
        """Whether this is a variable that is handed on: the assignment that gave it its value is judged."""
        is_stored = isinstance(node, ast.Name) and node.id in self._stored and not self._is_called(node)
        return is_stored and not {getattr(node, "id", "")} & self._names.of(node)  # eval = eval

    def _spelled(self, node: ast.expr) -> set[str]:
        """x.pickle.loads whatever x is, and what is looked up in a module that is not known."""
        if not isinstance(node, ast.Attribute):
            return set()
        base = node.value
        if isinstance(base, ast.Call) and base.args and self._names.text(base.args[0]) is None:
            is_module = bool(self._names.of(base.func) & {"__import__", "importlib.import_module"})
            return {f"pickle.{node.attr}"} if is_module else set()
        before = base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", "")
        return {canonical(f"{before}.{node.attr}")} if before in rules.PICKLES else set()

    def _literal_attribute(self, node: ast.expr) -> str | None:
        """y of getattr(x, "y"), operator.methodcaller("y")."""
        called = self._names.of(node.func) if isinstance(node, ast.Call) else set()
        if isinstance(node, ast.Call) and called & {"operator.methodcaller", "operator.attrgetter"} and node.args:
            return self._names.text(node.args[0])
        return (
            self._names.text(node.args[1])
            if isinstance(node, ast.Call) and "getattr" in called and node.args[1:]
            else None
        )

    def _is_lookup(self, node: ast.Call) -> bool:
        called = self._names.of(node.func)
        looked_up = isinstance(node.func, ast.Attribute) and node.func.attr in (
            "get",
            "pop",
            "__getattribute__",
            "__getitem__",
        )
        return bool(called & LOOKUPS) or looked_up or isinstance(node.func, ast.Call)

    def _is_called(self, node: ast.AST) -> bool:
        """Whether the arguments are seen here: it is called, is the function of a partial, or stands in a test of equality."""
        parent = self._parents.get(node)
        if isinstance(parent, ast.Call):
            is_partial = self._is_partial(parent) and parent.args[:1] == [node]
            return parent.func is node or is_partial
        return isinstance(parent, ast.Compare)

    def _is_partial(self, call: ast.Call) -> bool:
        return bool(self._names.of(call.func) & {"functools.partial", "functools.partialmethod"})

    @staticmethod
    def _rule_of(name: str) -> str:
        for known, rule in (
            (rules.TORCH_LOADS, "torch-load"),
            (rules.NUMPY_LOADS, "numpy-load"),
            (rules.YAML_LOADS, "yaml"),
        ):
            if name in known:
                return rule
        return "eval" if name == "compile" else "wildcard"

    # ---------------------------------------------------------------- calls

    def _call(self, node: ast.Call) -> Iterator[str]:
        called = self._names.of(node.func)
        if self._is_partial(node) and node.args:
            called = self._names.of(node.args[0])
            node = ast.copy_location(ast.Call(node.args[0], node.args[1:], node.keywords), node)
        given, unread = self._given(node)
        judged = rules.judge_call(self._names, called, node)
        if judged:
            yield judged
        for name, value in given.items():
            if name in rules.KEYWORDS and rules.is_wrong(self._names, name, value, True):
                if rules.KEYWORDS[name][0] != judged:
                    yield rules.KEYWORDS[name][0]
            elif (called & _SERVERS or not self._is_test) and names_wildcard(
                self._names, name, value, name != "dashboard_host"
            ):
                yield "wildcard"
        last = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if opens_wildcard(self._names, called, last, node):
            yield "wildcard"
        if self._evaluates(called, last, node):
            yield "eval"
        if last == "extractall" and "filter" not in given and self._names.bound.get("tarfile"):
            yield "extract"
        if runs_shell(self._names, called, node, unread, self._has_shell):
            yield "shell"
        yield from self._pair(node.args)
        yield from self._option(node, given)
        if called & _LOOKED_UP_BY_NAME and node.args[1:] and self._names.text(node.args[1]) is None:
            yield from ["eval"] * bool(self._names.of(node.args[0]) & _NO_LOOKUP)

    def _given(self, node: ast.Call) -> tuple[dict[str, ast.expr], bool]:
        """Keyword arguments, those of ``**variable`` too where it is a literal; whether others may be given."""
        given, unread = rules.arguments(node)
        if not unread:
            return given, False
        left = False
        for keyword in node.keywords:
            if keyword.arg is None and not isinstance(keyword.value, ast.Dict):
                known = list(self._names.literals(keyword.value))
                left = left or not known
                for one in known:
                    made = ast.Call(ast.Name("dict"), [], [ast.keyword(None, one)])
                    more, rest = rules.arguments(made) if isinstance(one, ast.Dict | ast.Call) else ({}, True)
                    given, left = given | more, left or rest
        return given, left

    def _evaluates(self, called: set[str], last: str, node: ast.Call) -> bool:
        """frame.eval("a + b"), frame.query("a > b"), methodcaller("eval", "a + b")."""
        given = bool(node.args or node.keywords)
        if called and not any(name.startswith("pandas.") for name in called):
            return False
        if last == "query" and given and isinstance(node.func, ast.Attribute):
            base = node.func.value
            name = base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", "")
            return bool(self._names.bound.get("pandas") or self._names.bound.get("pd")) or bool(_FRAME.fullmatch(name))
        return last == "eval" and given

    def _option(self, node: ast.Call, given: dict[str, ast.expr]) -> Iterator[str]:
        """add_argument("--host", default="::"), methodcaller("eval", text)."""
        first = self._names.text(node.args[0]) if node.args else None
        if not self._is_test and names_wildcard(self._names, first, given.get("default")):
            yield "wildcard"
        if first == "eval" and node.args[1:] and "operator.methodcaller" in self._names.of(node.func):
            yield "eval"

    # ---------------------------------------------------------------- values

    def _dict(self, node: ast.Dict) -> Iterator[str]:
        said = {self._names.text(key): value for key, value in zip(node.keys, node.values, strict=True) if key}
        for name, value in said.items():
            yield from self._named(name, value)
            if not self._is_test and names_wildcard(self._names, name, value, "port" not in said):
                yield "wildcard"

    def _named(self, name: str | None, value: ast.expr) -> Iterator[str]:
        """A key, attribute or variable that is given a value."""
        if name is None or name not in rules.KEYWORDS or (name in rules.ONLY_CALLS and not self._sends_requests()):
            return
        if rules.is_wrong(self._names, name, value, False) and not _is_said(value):
            yield rules.KEYWORDS[name][0]

    def _sends_requests(self) -> bool:
        return any(self._names.bound.get(name) for name in ("requests", "httpx", "aiohttp", "urllib3"))

    def _pair(self, nodes: list[ast.expr]) -> Iterator[str]:
        """("shell", True), setattr(x, "shell", True)."""
        yield from self._listen_options(nodes)
        for before, after in itertools.pairwise(nodes):
            if isinstance(before, ast.Constant) and before.value in rules.KEYWORDS and isinstance(after, ast.Constant):
                yield from self._named(str(before.value), after)

    def _listen_options(self, words: list[ast.expr]) -> Iterator[str]:
        """["--host", "::"]."""
        for before, after in itertools.pairwise(words):
            name = before.value if isinstance(before, ast.Constant) else None
            is_option = not self._is_test and isinstance(name, str) and name.startswith("--")
            if is_option and names_wildcard(self._names, str(name), after, may_be_empty=False):
                yield "wildcard"

    def _tuple(self, node: ast.Tuple) -> Iterator[str]:
        yield from self._pair(node.elts)

    def _list(self, node: ast.List) -> Iterator[str]:
        yield from self._listen_options(node.elts)

    def _assigned(self, node: ast.Assign | ast.AnnAssign) -> Iterator[str]:
        """kwargs["shell"] = True, context.check_hostname = False."""
        value = node.value
        if value is None:
            return
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            name = target.attr if isinstance(target, ast.Attribute) else None
            name = self._names.text(target.slice) if isinstance(target, ast.Subscript) else name
            if isinstance(target, ast.Name):
                name = target.id.lower() if isinstance(value, ast.Constant) else None
            yield from self._named(name, value)
            is_host = not self._is_test and isinstance(value, ast.Constant)
            if is_host and names_wildcard(self._names, name, value):
                yield "wildcard"

    def _defaults(self, node: ast.arguments) -> Iterator[str]:
        plain = [*node.posonlyargs, *node.args]
        pairs = [*zip(plain[len(plain) - len(node.defaults) :], node.defaults, strict=True)]
        pairs += [(a, d) for a, d in zip(node.kwonlyargs, node.kw_defaults, strict=True) if d is not None]
        for argument, default in pairs:
            text = self._names.text(default)
            if argument.arg in ("host", "address", "ip") and text and is_wildcard(text):
                yield "wildcard"
            elif argument.arg in ("trust_remote_code", "shell", "allow_pickle") and rules.truth(default):
                yield rules.KEYWORDS[argument.arg][0]

    def _constant(self, node: ast.Constant) -> Iterator[str]:
        if self._is_test or not isinstance(node.value, str | bytes) or node in self._documentation:
            return
        text = self._names.text(node) or ""
        if NAMED_WILDCARD.search(text):
            yield "wildcard"
        yield from (rule for pattern, rule in rules.SAID if pattern.search(text))

    def _import(self, node: ast.Import | ast.ImportFrom) -> Iterator[str]:
        """import pickle, from pickle import loads, from pickle import *."""
        module = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
        whole = {f"{module}.{alias.name}".strip(".") for alias in node.names}
        if not getattr(node, "level", 0) and any(_is_within(name, rules.PICKLES) for name in {module, *whole}):
            yield "pickle"
        if isinstance(node, ast.Import):
            return
        for rule, banned in rules.ALWAYS.items():
            if any(canonical(f"{module}.{alias.name}") in banned for alias in node.names):
                yield rule
        if any(alias.name == "*" for alias in node.names) and module in _UNSAFE_STARS:
            yield "unpickle"


def _is_within(name: str, modules: frozenset[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _is_said(value: ast.expr) -> bool:
    """A text about a name rather than its value."""
    return isinstance(value, ast.Constant) and isinstance(value.value, str) and value.value != "CERT_NONE"


def _stars() -> dict[str, frozenset[str]]:
    """What a star import of a module brings of the names that count, by module."""
    known = rules.NEED_CALL.union(*rules.ALWAYS.values()) | {"subprocess.run", "subprocess.Popen", "functools.partial"}
    out: dict[str, set[str]] = {}
    for name in known:
        module, _, last = name.rpartition(".")
        out.setdefault(module, set()).add(last)
    return {module: frozenset(found) for module, found in out.items() if module}


_STARS = _stars()


def _docstrings(nodes: list[ast.AST]) -> Iterator[ast.Constant]:
    for node in nodes:
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else []:
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                yield statement.value
