"""The README tells the truth about the files and commands."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SHOWN = ("hapo_async", "actors", "configs", "tools")


def listed() -> set[str]:
    """Paths of the README's tree: folders end with a slash, files are indented below them."""
    block = README.split("## The files", 1)[1].split("```")[1]
    found, folders = set(), {}
    for line in block.splitlines():
        match = re.match(r"^( *)(\S+)", line)
        if not match:
            continue
        depth, name = len(match[1]) // 2, match[2]
        if name.endswith("/"):
            folders[depth] = name
        else:
            found.add("".join(folders[d] for d in range(depth)) + name)
    return found


def test_the_tree_names_every_file_and_no_other():
    there = {
        str(path.relative_to(ROOT))
        for top in SHOWN
        for path in (ROOT / top).rglob("*")
        if path.suffix in (".py", ".yaml", ".sh", ".j2") and "__pycache__" not in path.parts
    }
    assert listed() == there


def test_each_line_of_the_tree_says_what_the_file_is_for():
    block = README.split("## The files", 1)[1].split("```")[1]
    for line in block.strip().splitlines():
        assert line.endswith("/") or (len(line.split(maxsplit=1)) == 2 and len(line) <= 120), line


@pytest.mark.parametrize("command", sorted(set(re.findall(r"hapo-async ([a-z-]+)", README))))
def test_each_command_that_it_shows_exists(command):
    from typer.main import get_command

    from hapo_async.cli import app

    assert command in get_command(app).commands


@pytest.mark.parametrize("path", sorted(set(re.findall(r"configs/\w+\.yaml", README))))
def test_each_config_that_it_shows_loads(path):
    from hapo_async import config

    config.load(ROOT / path)


def test_there_are_no_placeholders_left():
    assert not re.search(r"\b(TREE|QUICKSTART_TABLE|QUICKSTART_OUTPUT)\b", README)
