"""Secrets stay out of logs, files and what is printed: tokens and passwords of the environment and of the configuration.

``learn`` tells this process what its secrets are, ``redact`` takes them out of a text. ``guarded`` (the command line) and
``install`` (every actor) put that before everything that Python writes: records of all loggers, standard output and error,
tracebacks. Files of a run that may hold a text from elsewhere pass through ``redact`` where they are written.

Known are the values of variables and keys whose names look like it (``HF_TOKEN``, ``WANDB_API_KEY``, ``AWS_SECRET_ACCESS_KEY``,
``DB_PASSWORD``), passwords in URLs, and the shapes of common tokens. What a C library writes by itself is not covered, and
neither is text that a policy was trained to say.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
import threading
import traceback
import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO, cast

from hapo_async.words import clean

MARK = "(secret)"
LEAST = 6
"""Characters of a value that is taken for a secret because of its name: shorter ones are words."""

_NAMES = frozenset(
    """
    token tokens key keys apikey secret secrets password passwords passwd passphrase pass pwd credential credentials
    authorization bearer cookie
    """.split()  # noqa: SIM905 (a list of words)
)
_ABOUT = frozenset(
    {"file", "path", "dir", "mode", "type", "name", "count", "ttl", "timeout", "length", "size", "format"}
)
"""Last words of names that say something about a secret: ``RAY_AUTH_TOKEN_PATH``."""
_PLAIN = frozenset({"disabled", "enabled", "default", "always", "public", "optional", "required"})
_TOKEN_FILES = ("RAY_AUTH_TOKEN_PATH", "HF_TOKEN_PATH")
_HOME_FILES = (".ray/auth_token", ".cache/huggingface/token")
_MOST_FILE = 4096

_URL = re.compile(
    r"(?P<head>\b[A-Za-z][A-Za-z0-9+.-]*:/{1,3}(?:[^\s/?#@:\"'<>]*:)?)(?P<secret>[^\s/?#\"'<>]+)(?P<at>@)"
)
_QUERY = re.compile(
    r"(?P<head>[?&;](?:[\w-]*(?:token|secret|password|passwd|signature|credential)|api_?key|key|sig)=)[^&\s#\"'<>]{4,}",
    re.I,
)
_ALWAYS = (
    r"passw(?:or)?d|passphrase|secret|api[-_ ]?key|(?:access|secret|private|signing|encryption|account|master)[-_]?key"
)
_OFTEN = (
    r"(?:auth|access|api|hf|hub|bearer|session|security|refresh|id|csrf|xsrf|bot|user|client|deploy|personal|github|gitlab|wandb"
    r"|ray)[-_]?token"
)
_IS = r"(?:\\?[\"'])?\s*(?:=>|[=:])\s*"
_NO_VALUE = r"(?:none|null|true|false|required|optional|disabled|enabled|default|missing|unknown|\(secret\))"
_NUMBER = r"[-+.\d]+(?![^\s\"',;{}&])"
_RULES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(rf"(?P<head>{head}){value}", re.I), rf"\g<head>{MARK}")
    for head, value in (
        (
            rf"(?:{_ALWAYS}|{_OFTEN}){_IS}(?P<quote>\\?[\"'])",
            rf"(?!{_NO_VALUE}(?P=quote))(?:(?!(?P=quote))[^\n]){{5,}}",
        ),
        (rf"(?:{_ALWAYS}){_IS}", rf"(?![\"'\\])(?!{_NO_VALUE}\b|\(secret\))[^\s\"',;{{}}&]{{6,}}"),
        (rf"{_OFTEN}{_IS}", rf"(?![\"'\\])(?!\(secret\)|{_NUMBER})[^\s\"',;{{}}&]{{6,}}"),
        (r"(?<![\w-])pwd[\"']?\s*[=:]\s*[\"']?", r"(?![/~.$\\]|[a-z]:\\|\(secret\))[^\s\"',;{}&]{6,}"),
        (
            rf"(?<![\w-])(?:token|credentials?){_IS}(?:\\?[\"'])?",
            rf"(?!{_NUMBER})(?=[^\s\"',;]*\d|[\w.~+/=-]{{20}})[\w.~+/=-]{{8,}}",
        ),
        (
            rf"(?<![\w-])--?(?:[a-z]+-){{0,3}}(?:{_ALWAYS})(?:[\"'],)?[\s=]+[\"']?",
            r"(?!-|\(secret\))[^\s\"',;]{6,}",
        ),
        (
            rf"(?<![\w-])--?(?:{_OFTEN}|token)(?:[\"'],)?[\s=]+[\"']?",
            rf"(?!-|\(secret\)|{_NUMBER})[^\s\"',;]{{6,}}",
        ),
        (
            r"\bauthorization\\?[\"']?\s*[=:]\s*\\?[\"']?(?:(?:basic|bearer|digest|token|apikey|negotiate)\s+)?",
            rf"(?!{_NO_VALUE}\b|\(secret\))[^\s\"',;\\]{{6,}}",
        ),
        (r"\bcookie\\?[\"']?\s*[=:]\s*\\?[\"']?", r"(?=[^\s=;:]+=)[^\r\n\"'\\]{6,}"),
        (r"\bbearer\s+", r"(?=[\w.~+/=-]{20}|[a-z._~+/=-]*\d)[\w.~+/=-]{16,}"),
    )
)
"""What a name, a header or an option says is secret. Of names that are ordinary words too, the value must look like it."""
_HINT = re.compile(r"passw|passphrase|secret|key|token(?!s|i)|pwd|credential|authorization|cookie|bearer", re.I)
_SHAPES = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}|\bsk-[\w-]{20,}|\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{30,}|\bglpat-[\w-]{15,}"
    r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bxox[abeprs]-[\w-]{10,}|\bAIza[\w-]{30,}|\bnpm_[A-Za-z0-9]{30,}|\bpypi-A[\w-]{15,}"
    r"|\b[sr]k_(?:live|test)_[A-Za-z0-9]{16,}|\bdckr_pat_[\w-]{20,}|\bhvs\.[\w-]{20,}|\bya29\.[\w-]{20,}|\bnvapi-[\w-]{20,}"
    r"|\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{5,}|(?<=Bearer )[\w.~+/=-]{16,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|$)",
    re.S,
)


def is_secret_name(name: str) -> bool:
    """Whether a variable or key of this name holds a secret: one of its words says so."""
    words = [w for w in re.split(r"[^a-z0-9]+", re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()) if w]
    return bool(_NAMES & set(words)) and words[-1] not in _ABOUT and words != ["pwd"]  # the shell's working folder


class Redactor:
    """Replaces the values that it knows, and what looks like a secret. Thread-safe."""

    def __init__(self) -> None:
        self._values: set[str] = set()
        self._pattern: re.Pattern[str] | None = None
        self._lock = threading.Lock()

    def add(self, *values: str) -> None:
        """Each as it is, and as JSON, ``repr`` and URLs spell it."""
        known = set()
        for value in values:
            for one in {value.strip(), *(line.strip() for line in value.splitlines())}:
                is_word = one.lower() in _PLAIN or (one.isdigit() and len(one) < 2 * LEAST)
                if len(one) >= LEAST and not is_word:
                    known |= {one, json.dumps(one)[1:-1], repr(one)[1:-1], urllib.parse.quote(one, safe="")}
        with self._lock:
            if known - self._values:
                self._values |= known
                longest = sorted(self._values, key=lambda v: (-len(v), v))
                self._pattern = re.compile("|".join(map(re.escape, longest)))

    def __call__(self, text: str) -> str:
        pattern = self._pattern
        if pattern is not None:
            text = pattern.sub(MARK, text)
        if ":/" in text:  # also of a URL that was taken for a path
            text = _URL.sub(rf"\g<head>{MARK}\g<at>", text)
        text = _QUERY.sub(rf"\g<head>{MARK}", text)
        for rule, instead in _RULES if _HINT.search(text) else ():
            text = rule.sub(instead, text)
        return _SHAPES.sub(MARK, text)


_process = Redactor()


def redact(text: str) -> str:
    """The text without the secrets that this process knows."""
    return _process(text)


def redacted(value: Any) -> Any:
    """Plain data, with every text in it redacted."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {key: redacted(item) for key, item in value.items()}
    return [redacted(item) for item in value] if isinstance(value, list | tuple) else value


def learn(tree: Any) -> None:
    """Takes the texts under keys of a configuration that look like secrets."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            if isinstance(value, str) and is_secret_name(str(key)):
                _process.add(value)
            learn(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            learn(value)


def learn_environment(environment: Mapping[str, str] = os.environ) -> None:
    """Takes the values of variables that look like secrets, passwords of URLs in any variable, and the files where Ray and
    the Hugging Face hub keep theirs."""
    for name, value in environment.items():
        if is_secret_name(name):
            _process.add(value)
        _process.add(*(found["secret"] for found in _URL.finditer(value)))
    named = [Path(environment[name]) for name in _TOKEN_FILES if environment.get(name)]
    home = environment.get("HOME", "")
    for path in [*named, *(Path(home) / name for name in _HOME_FILES if home)]:
        with contextlib.suppress(OSError, ValueError):
            if path.is_file() and path.stat().st_size <= _MOST_FILE:
                _process.add(path.read_text(encoding="utf-8"))


def cleanse(error: BaseException, seen: set[int] | None = None) -> None:
    """Takes secrets out of what an exception, its causes and its parts say."""
    seen = set() if seen is None else seen
    if id(error) in seen:
        return
    seen.add(id(error))
    with contextlib.suppress(Exception):
        error.args = tuple(redact(a) if isinstance(a, str) else a for a in error.args)
    own = [*vars(error)] + ["filename", "filename2", "strerror"] * isinstance(error, OSError)
    for name in own:
        value = getattr(error, name, None)
        if isinstance(value, str) and value != (short := redact(value)):
            with contextlib.suppress(Exception):
                setattr(error, name, short)
    for other in (error.__cause__, error.__context__, *getattr(error, "exceptions", ())):
        if isinstance(other, BaseException):
            cleanse(other, seen)


# --------------------------------------------------------------------------------------------------------------------
# What Python writes


class _Stream:
    """A text stream that redacts; everything else about it is that of the stream below."""

    def __init__(self, below: TextIO) -> None:
        self._below = below

    def write(self, text: str) -> int:
        self._below.write(redact(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._below, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._below)


def install() -> None:
    """For the rest of this process: records of all loggers, standard output and standard error."""
    learn_environment()
    if getattr(logging.getLogRecordFactory(), "redacts", False):
        return
    logging.setLogRecordFactory(_record_factory(logging.getLogRecordFactory()))
    sys.stdout, sys.stderr = (cast(TextIO, _Stream(stream)) for stream in (sys.stdout, sys.stderr))


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """``install`` for the time of a command; what leaves it as an exception says no secret either."""
    factory, streams = logging.getLogRecordFactory(), (sys.stdout, sys.stderr)
    install()
    try:
        yield
    except BaseException as error:
        cleanse(error)
        raise
    finally:
        logging.setLogRecordFactory(factory)
        sys.stdout, sys.stderr = streams


def _record_factory(make: Any) -> Any:
    def record(*arguments: Any, **more: Any) -> logging.LogRecord:
        made: logging.LogRecord = make(*arguments, **more)
        with contextlib.suppress(Exception):  # a record that cannot be formatted is its handler's to report
            said = made.getMessage()
            if said != (short := clean(redact(said))):
                made.msg, made.args = short, None
            if made.exc_info and made.exc_info[1] is not None:
                made.exc_text = redact("".join(traceback.format_exception(*made.exc_info)).rstrip("\n"))
        return made

    record.redacts = True  # type: ignore[attr-defined]
    return record
