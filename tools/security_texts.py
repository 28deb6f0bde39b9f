"""Which files of a project are looked at, and what must not be in those that are no Python. For ``tools/security_lint.py``."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

SKIPPED = frozenset({"node_modules", "site-packages", "__pycache__"})
SKIPPED_ON_TOP = frozenset({"runs", "build", "dist"})
_HIDDEN = frozenset({".ci", ".github", ".circleci", ".gitlab-ci.yml", ".pre-commit-config.yaml"})
_PYTHON = frozenset({".py", ".pyi", ".pyw"})
_SETTINGS = frozenset({".yaml", ".yml", ".toml", ".json", ".jsonl", ".cfg", ".ini", ".env"})
_SCRIPTS = frozenset({".sh", ".bash", ".zsh", ".mk", ".service", ".ps1", ".bat"})
_BY_NAME = frozenset({"Makefile", "makefile", "Dockerfile", "Containerfile", "Justfile", "Procfile"})
_MOST = 4 << 20  # bytes of a file that somebody may have written by hand

_FLAG = r"(?:true|yes|on|1)\b"
_HOST = r"(?:\b|[\w-]+[_-])(?:host|hostname|bind|listen|interface|bind[_-]addr(?:ess)?|listen[_-]addr(?:ess)?)"
_ANYWHERE = r"(?:::|\[::\]|\*|0)"
_SETTING = tuple(
    (re.compile(pattern, re.IGNORECASE), rule)
    for pattern, rule in (
        (rf"trust[_-]remote[_-]code[\"']?\s*[:=]\s*[\"']?{_FLAG}", "remote-code"),
        (r"--trust[_-]remote[_-]code(?![=\s]+[\"']?(?:false|no|off|0)\b)(?![\w-])", "remote-code"),
        (r"!{2}python/|tag:yaml\.org,2002:python/", "yaml"),
        (r"(?:^|[\s\"'/@\[=])(?:0\.0\.0\.0|\[::\]|[a-z]+://\*)(?:[:\"'/\s,;}]|$)|\btcp://0+(?::|/|$)", "wildcard"),
        (rf"{_HOST}[\"']?\s*[:=]\s*(?:\"{_ANYWHERE}?\"|'{_ANYWHERE}?'|{_ANYWHERE}(?=\s*(?:[,}}\]]|$)))", "wildcard"),
        (rf"--{_HOST}[\s=]+[\"']?{_ANYWHERE}[\"']?(?:\s|$)", "wildcard"),
        (r"\bTORCH_FORCE_NO_WEIGHTS_ONLY_LOAD[\"']?\s*[:=]\s*[\"']?[1ty]", "torch-load"),
        (r"\bVLLM_ALLOW_INSECURE_SERIALIZATION[\"']?\s*[:=]\s*[\"']?[1ty]", "unpickle"),
        (r"\b(?:weights_only[\"']?\s*[:=]\s*[\"']?(?:false|no|off|0)\b)", "torch-load"),
        (r"\ballow_pickle[\"']?\s*[:=]\s*[\"']?" + _FLAG, "numpy-load"),
        (r"\b(?:verify_ssl|ssl_verify|check_hostname|sslverify)[\"']?\s*[:=]\s*[\"']?(?:false|no|off|0)\b", "tls"),
    )
)
_SCRIPT = (
    *_SETTING,
    *(
        (re.compile(pattern), rule)
        for pattern, rule in (
            (r"(?:^|[;&|(`]|\b(?:do|then|else))\s*eval\s", "eval"),
            (r"\bpython[\d.]*\b.*\s-c\s.*\b(?:eval|exec)\(", "eval"),
            (r"\b(?:pickle|cloudpickle|dill|marshal|joblib)\.loads?\(", "unpickle"),
            (r"\b(?:curl|wget)\b[^|]*\|\s*(?:sudo\s+)?(?:ba|z|da)?sh\b", "shell"),
            (r"\bcurl\b.*\s(?:-[a-zA-Z]*k[a-zA-Z]*|--insecure)\b|--no-check-certificate\b|--trusted-host\b", "tls"),
            (r"\bhttp\.server\b(?!.*(?:-b|--bind)\b)", "wildcard"),
        )
    ),
)


def files(root: Path) -> Iterator[tuple[Path, Path, str]]:
    """(path, path relative to the root, "python", "settings" or "script") of what is looked at: no hidden folders."""
    for folder, folders, found in os.walk(root):
        here = Path(folder)
        skipped = SKIPPED | SKIPPED_ON_TOP if here == root else SKIPPED
        folders[:] = sorted(f for f in folders if f not in skipped and (f[0] != "." or f in _HIDDEN))
        for name in sorted(found):
            path = here / name
            if (name[0] != "." or name in _HIDDEN or name.startswith(".env")) and (kind := _kind(path)):
                yield path, path.relative_to(root), kind


def _kind(path: Path) -> str | None:
    if not path.is_file():
        return None
    if path.suffix in _PYTHON:
        return "python"
    if path.stat().st_size > _MOST:
        return None
    if path.suffix in _SETTINGS or path.name.startswith(".env"):
        return "settings"
    if path.suffix in _SCRIPTS or path.name.partition(".")[0] in _BY_NAME:
        return "script"
    if path.suffix:
        return None
    with path.open("rb") as file:
        first = file.readline(200)
    if not first.startswith(b"#!"):
        return None
    return "python" if b"python" in first else "script"


def check_text(text: str, is_script: bool) -> Iterator[tuple[int, str, str]]:
    """(line, rule, code) of what a file of settings or a script must not hold; comments do not count."""
    for number, line in enumerate(text.splitlines(), 1):
        code = line.partition(" #")[0]
        if code.lstrip().startswith(("#", "//")):
            continue
        for rule in sorted({rule for pattern, rule in (_SCRIPT if is_script else _SETTING) if pattern.search(code)}):
            yield number, rule, code.strip()[:60]
