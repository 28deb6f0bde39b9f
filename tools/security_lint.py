"""Finds, in the syntax trees of this project, what must not be in it: ``python tools/security_lint.py [ROOT]``.

Objects that are unpickled, text that is evaluated, shells, YAML that makes objects, ``torch.load`` without
``weights_only=True``, sockets on a wildcard, code of model folders, and a few more; ``FIXES`` in ``security_rules`` lists
the rules. Names are followed through imports, other names, ``getattr`` with a literal, ``functools.partial`` and ``**{...}``.
Tests have fewer rules: what they keep out is never done in this project, not even there.

A line that has to break a rule says why: ``# lint: allow RULE because ...``. Such a comment that nothing needs is a finding
as well. Prints ``file:line: [rule] what: fix`` for each finding and exits with 1, or exits with 0.
"""

from __future__ import annotations

import ast
import io
import itertools
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

if __package__ in (None, ""):  # run by its path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import security_rules as rules
from tools.security_names import Names, canonical

SKIPPED = frozenset({"runs", "build", "dist", "node_modules", "site-packages"})
NOT_IN_TESTS = frozenset({"connection", "objects", "weak-hash", "tls", "extract", "mktemp"})
ALLOW = re.compile(r"#\s*lint:\s*allow\s+([\w-]+)(?:\s+because\s+(\S.*))?")
LEAST_REASON = 15  # characters

_YAML_TEXT = (
    (re.compile(r"^\s*trust_remote_code\s*:\s*(?:true|yes|on|1)\b", re.IGNORECASE), "remote-code"),
    (re.compile(r"!!python/"), "yaml"),
    (re.compile(r"(?:^|[\s\"'/@\[])(?:0\.0\.0\.0|\[::\]|tcp://\*)(?:[:\"'/\s]|$)"), "wildcard"),
)


class Finding(NamedTuple):
    """path: relative to the root. what: the code that breaks the rule, cut short."""

    path: str
    line: int
    rule: str
    what: str

    def __str__(self) -> str:
        return (
            f"{self.path}:{self.line}: [{self.rule}] {self.what}: {rules.FIXES.get(self.rule, 'remove the comment')}."
        )


def check_tree(root: Path) -> list[Finding]:
    """All findings below ``root``, in hidden folders and those of SKIPPED none."""
    out: list[Finding] = []
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        if any(part.startswith(".") or part in SKIPPED for part in relative.parts) or not path.is_file():
            continue
        if path.suffix in (".py", ".pyi", ".pyw"):
            out += check_source(path.read_text(encoding="utf-8"), str(relative), relative.parts[0] == "tests")
        elif path.suffix in (".yaml", ".yml") and relative.parts[0] != "tests":
            out += _check_yaml(path.read_text(encoding="utf-8", errors="replace"), str(relative))
    return out


def check_source(source: str, path: str = "source.py", is_test: bool = False) -> list[Finding]:
    """The findings in one file's text."""
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        return [Finding(path, error.lineno or 1, "syntax", f"it cannot be read: {error.msg}")]
    spans = set(_Search(tree, is_test).run())
    allowed = dict(_allowances(source))
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


def _check_yaml(text: str, path: str) -> Iterator[Finding]:
    for number, line in enumerate(text.splitlines(), 1):
        code = line.partition(" #")[0]
        for pattern, rule in _YAML_TEXT:
            if not code.lstrip().startswith("#") and pattern.search(code):
                yield Finding(path, number, rule, code.strip()[:60])


Span = tuple[str, int, int, int, str]
"""(rule, line, first and last line where a comment may stand, code)."""


class _Search:
    """One pass over a tree."""

    def __init__(self, tree: ast.Module, is_test: bool) -> None:
        self._is_test = is_test
        self._nodes = list(ast.walk(tree))
        self._names = Names(self._nodes, _STARS)
        self._parents = {child: node for node in self._nodes for child in ast.iter_child_nodes(node)}
        self._documentation = set(_docstrings(self._nodes))
        self._stored = {n.id for n in self._nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}

    def run(self) -> Iterator[Span]:
        for node in self._nodes:
            for rule in self._judge(node):
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
        if isinstance(node, ast.Call):
            yield from self._call(node)
        elif isinstance(node, ast.Dict):
            yield from self._dict(node)
        elif isinstance(node, ast.Assign):
            yield from self._assigned(node)
        elif isinstance(node, ast.arguments):
            yield from self._defaults(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str | bytes):
            yield from self._constant(node)
        elif isinstance(node, ast.ImportFrom):
            yield from self._import(node)

    # ---------------------------------------------------------------- names

    def _mention(self, node: ast.expr) -> Iterator[str]:
        """Names that are never used, and ones that need arguments where they are handed on without."""
        if isinstance(getattr(node, "ctx", None), ast.Store | ast.Del) or self._is_rebound(node):
            return
        found = self._names.of(node)
        for rule, banned in rules.ALWAYS.items():
            if found & banned:
                yield rule
        last = node.attr if isinstance(node, ast.Attribute) else self._literal_attribute(node)
        if last in rules.METHODS and not any(found & banned for banned in rules.ALWAYS.values()):
            yield rules.METHODS[last]
        if isinstance(node, ast.Call) and not self._is_lookup(node):
            return
        if found & rules.NEED_CALL and not self._is_called(node):
            yield next(self._rule_of(name) for name in sorted(found & rules.NEED_CALL))

    def _is_rebound(self, node: ast.expr) -> bool:
        """Whether this is a variable that is handed on: the assignment that gave it its value is judged."""
        return isinstance(node, ast.Name) and node.id in self._stored and not self._is_called(node)

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
        return bool(called & {"getattr", "__import__", "importlib.import_module"}) or isinstance(node.func, ast.Call)

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
        given, _ = rules.arguments(node)
        judged = rules.judge_call(self._names, called, node)
        if judged:
            yield judged
        for name, (rule, wanted) in rules.KEYWORDS.items():
            if name in given and rule != judged and self._is_wrong(rule, given[name], wanted):
                yield rule
        last = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        for name in {last, *(name.rsplit(".", 1)[-1] for name in called)} & rules.BINDERS:
            if rules.binds_wildcard(self._names, called, name, node):
                yield "wildcard"
                break
        if last == "eval" and node.args and not called:
            yield "eval"
        if last == "extractall" and "filter" not in given and self._names.bound.get("tarfile"):
            yield "extract"
        if self._runs_shell(node):
            yield "shell"

    def _is_wrong(self, rule: str, value: ast.expr, wanted: bool) -> bool:
        """A value that is only known later is wrong for what must never vary."""
        known = rules.truth(value)
        if rule in ("shell", "torch-load", "numpy-load", "remote-code"):
            return known is not wanted and not (isinstance(value, ast.Constant) and value.value is None and not wanted)
        return isinstance(value, ast.Constant) and value.value is (not wanted)

    def _runs_shell(self, node: ast.Call) -> bool:
        """["bash", "-c", ...] is a shell too."""
        lists = [x.elts for x in [*node.args, *(k.value for k in node.keywords)] if isinstance(x, ast.List | ast.Tuple)]
        for words in [node.args, *lists]:  # os.execl and create_subprocess_exec take them one by one
            for first, second in itertools.pairwise(self._names.text(word) or "" for word in words):
                if rules.SHELLS.match(first) and second.startswith(("-", "/")) and "c" in second.lower():
                    return True
        return False

    # ---------------------------------------------------------------- values

    def _dict(self, node: ast.Dict) -> Iterator[str]:
        for key, value in zip(node.keys, node.values, strict=True):
            name = self._names.text(key)
            if name in ("shell", "trust_remote_code", "allow_pickle", "weights_only") and _is_flag(value):
                rule, wanted = rules.KEYWORDS[name]
                if rules.truth(value) is (not wanted):
                    yield rule

    def _assigned(self, node: ast.Assign) -> Iterator[str]:
        """kwargs["shell"] = True, context.check_hostname = False."""
        for target in node.targets:
            name = target.attr if isinstance(target, ast.Attribute) else None
            name = self._names.text(target.slice) if isinstance(target, ast.Subscript) else name
            if name in rules.KEYWORDS and name != "verify":
                rule, wanted = rules.KEYWORDS[name]
                if isinstance(node.value, ast.Constant) and rules.truth(node.value) is (not wanted):
                    yield rule

    def _defaults(self, node: ast.arguments) -> Iterator[str]:
        plain = [*node.posonlyargs, *node.args]
        pairs = [*zip(plain[len(plain) - len(node.defaults) :], node.defaults, strict=True)]
        pairs += [(a, d) for a, d in zip(node.kwonlyargs, node.kw_defaults, strict=True) if d is not None]
        for argument, default in pairs:
            text = self._names.text(default)
            if argument.arg in ("host", "address", "ip") and text and rules.is_wildcard(text):
                yield "wildcard"
            elif argument.arg in ("trust_remote_code", "shell", "allow_pickle") and rules.truth(default):
                yield rules.KEYWORDS[argument.arg][0]

    def _constant(self, node: ast.Constant) -> Iterator[str]:
        text = self._names.text(node) or ""
        if not self._is_test and node not in self._documentation and rules.NAMED_WILDCARD.search(text):
            yield "wildcard"

    def _import(self, node: ast.ImportFrom) -> Iterator[str]:
        """from pickle import loads, from pickle import *."""
        module = node.module or ""
        for rule, banned in rules.ALWAYS.items():
            if any(canonical(f"{module}.{alias.name}") in banned for alias in node.names):
                yield rule
        if any(alias.name == "*" for alias in node.names) and module in _UNSAFE_STARS:
            yield "unpickle"


_UNSAFE_STARS = frozenset({"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"})


def _is_flag(value: ast.expr) -> bool:
    """True, False, 0 or 1."""
    return isinstance(value, ast.Constant) and isinstance(value.value, int)


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


def main() -> int:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent
    found = check_tree(root)
    for finding in found:
        print(finding)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
