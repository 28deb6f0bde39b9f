"""Which calls start a shell without ``shell=True``. For ``tools/security_lint.py``."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence

from tools.security_names import Names

SHELLS = re.compile(r"(?:.*/)?(?:r?bash|sh|zsh|dash|ash|ksh|csh|tcsh|fish|cmd|cmd\.exe|powershell|pwsh|su|runuser)")
_MENTION = re.compile(r"(?:sh|su|runuser|cmd(?:\.exe)?|powershell|env)(?:$|[\s'])|\bSHELL\b", re.IGNORECASE)
_STARTERS = frozenset(
    f"subprocess.{name}" for name in ("run", "Popen", "call", "check_call", "check_output")
)  # their first arguments are those of Popen
_EXECUTABLE, _SHELL = 2, 8  # where Popen takes them
_WITH_VALUE = frozenset({"-o", "+o", "-O", "+O", "--rcfile", "--init-file"})
_SCRIPT = re.compile(r"-[a-zA-Z]*c[a-zA-Z]*|/[cCkK]|-(?:Command|EncodedCommand)|--command(?:=.*)?")

Words = Sequence[str | None]


def mentions_shell(node: ast.AST) -> bool:
    """Whether a shell may be meant anywhere where this node stands."""
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str | bytes) and bool(_MENTION.search(str(node.value)))
    name = node.id if isinstance(node, ast.Name) else getattr(node, "attr", "")
    return name in ("shell", "SHELL", "Shell")


def runs_shell(names: Names, called: set[str], call: ast.Call, unread: bool, has_shell: bool) -> bool:
    """["bash", "-c", ...], executable="/bin/sh", Popen's shell by its place. unread: a ``**`` may hold ``shell``. has_shell:
    whether the file mentions one."""
    starts = bool(called & _STARTERS)
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    if starts and unread and "shell" not in given:
        return True
    if starts and len(call.args) > _SHELL and not _is_false(call.args[_SHELL]):
        return True
    if not has_shell:
        return False
    programs = [given.get("executable"), *(call.args[_EXECUTABLE : _EXECUTABLE + 1] if starts else [])]
    if any(SHELLS.fullmatch(word) for program in programs if program for word in _word(names, program)):
        return True
    asks = "input" in given or ("stdin" in given and "DEVNULL" not in ast.dump(given["stdin"]))
    lists = [_words(names, call.args), *(x for argument in call.args for x in _lists(names, argument))]
    lists += [x for value in given.values() for x in _lists(names, value)]
    return any(_is_shell(words, asks and starts) for words in lists)


def _is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and not node.value


def _lists(names: Names, node: ast.expr, depth: int = 4) -> list[Words]:
    """The argument lists that an expression may be."""
    return [words for one in names.literals(node) if depth and (words := _words_of(names, one, depth - 1))]


def _words_of(names: Names, node: ast.expr, depth: int) -> Words:
    if isinstance(node, ast.List | ast.Tuple):
        return _words(names, node.elts, depth)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        found = [next(iter(_lists(names, side, depth)), ()) for side in (node.left, node.right)]
        return [*found[0], *(found[1] or (None,))] if found[0] else found[1]
    if isinstance(node, ast.Call):
        base = node.func.value if isinstance(node.func, ast.Attribute) else None
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        text = names.text(base if name == "split" and names.text(base) else (node.args[0] if node.args else None))
        if name == "split" and text:
            return text.split()
        if name in ("list", "tuple", "copy") and (node.args or base):
            return next(iter(_lists(names, node.args[0] if node.args else base, depth)), ())  # type: ignore[arg-type]
    return ()


def _words(names: Names, nodes: Sequence[ast.expr], depth: int = 4) -> Words:
    out: list[str | None] = []
    for node in nodes:
        if isinstance(node, ast.Starred):
            out += next(iter(_lists(names, node.value, depth)), (None,))
        else:
            found = _word(names, node)
            out.append(next((word for word in sorted(found) if SHELLS.fullmatch(word)), next(iter(found), None)))
    return out


def _word(names: Names, node: ast.expr) -> set[str]:
    """Its texts; what is called SHELL, also in the environment, is one."""
    found = {text.strip() for text in names.texts(node)}
    for one in names.literals(node):
        name = one.attr if isinstance(one, ast.Attribute) else getattr(one, "id", "")
        if isinstance(one, ast.Subscript):
            name = names.text(one.slice) or ""
        elif isinstance(one, ast.Call) and one.args:
            is_which = getattr(one.func, "attr", getattr(one.func, "id", "")) in ("which", "get", "getenv")
            name = (names.text(one.args[0]) or "") if is_which else ""
        if name.lower() == "shell" or SHELLS.fullmatch(name):
            found.add("sh")
    return found


def _is_shell(words: Words, asks: bool) -> bool:
    """asks: it reads what it is to do from its standard input."""
    for at, word in enumerate(words):
        if word is None or not SHELLS.fullmatch(word):
            if word in ("-S", "--split-string") and at and (words[at - 1] or "").endswith("env"):
                return True
            continue
        has_user = word.endswith(("su", "runuser"))
        skip = script = False
        for other in words[at + 1 :]:
            if skip:
                skip = False
            elif other is not None and _SCRIPT.fullmatch(other):
                return True
            elif other in _WITH_VALUE:
                skip = True
            elif not has_user and (other is None or not re.match(r"[-+]|/\w$", other)):
                script = True
                break
        if asks and not script and at == 0:
            return True
    return False
