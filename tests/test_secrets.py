"""Secrets are taken out of whatever this process writes, and texts from elsewhere are shown and not obeyed."""

from __future__ import annotations

import io
import json
import logging
import sys
from pathlib import Path

import pytest

from hapo_async import config, secrets
from hapo_async.errors import ConfigError
from hapo_async.rundir import RunDir
from hapo_async.secrets import MARK, Redactor, cleanse, is_secret_name, redacted
from hapo_async.terminal import Terminal
from hapo_async.words import clean

VALUE = "xY7-secret/value+1"


@pytest.fixture
def known(monkeypatch):
    """This process knows VALUE, and forgets it afterwards."""
    fresh = Redactor()
    fresh.add(VALUE)
    monkeypatch.setattr(secrets, "_process", fresh)
    return fresh


@pytest.mark.parametrize(
    "name",
    ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN", "DB_PASSWORD", "hf_token",
     "OPENAI_API_KEY", "RAY_AUTH_TOKEN", "GITHUB_TOKEN", "MyPassword", "client-secret", "password", "smtp.passwd"],
)  # fmt: skip
def test_names_of_secrets_are_known(name):
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "PWD",
        "TOKENIZERS_PARALLELISM",
        "RAY_AUTH_MODE",
        "RAY_AUTH_TOKEN_PATH",
        "KEYBOARD",
        "tokenizer",
        "PATH",
        "monkey",
        "",
    ],
)
def test_other_names_are_not(name):
    assert not is_secret_name(name)


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        (f"before {VALUE} after", VALUE),
        (json.dumps({"x": f'a"b{VALUE}'}), VALUE),
        ("https://user:pa55w0rd@host:1/x", "pa55w0rd"),
        ("postgres://u:p@ss@word@db/x", "p@ss@word"),
        (str(Path("https://user:pa55w0rd@host/x")), "pa55w0rd"),
        ("git+https://ghtokenvalue@host/x", "ghtokenvalue"),
        ("GET /x?api_key=abcd1234&y=2", "abcd1234"),
        ("GET /x?a=1&access_token=abcd1234", "abcd1234"),
        ("HF_TOKEN=abcd1234efgh", "abcd1234efgh"),
        ("'password': 'correct horse'", "correct"),
        ("token hf_abcdefghijklmnopqrstuvwx", "hf_abcdefghijklmnopqrstuvwx"),
        ("Authorization: Bearer abcdefghijklmnopqrst", "abcdefghijklmnopqrst"),
        ("AKIAABCDEFGHIJKLMNOP", "AKIAABCDEFGHIJKLMNOP"),
        ("-----BEGIN PRIVATE KEY-----\nabc\n-----END PRIVATE KEY-----", "abc"),
    ],
)
def test_secrets_are_replaced(known, text, secret):
    assert secret not in known(text) and MARK in known(text)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("Authorization: Basic dXNlcjpodW50ZXIyMTIz", "Authorization: Basic"),
        ('{"Authorization": "token abcdefgh12"}', '{"Authorization": "token "}'),
        ("X-Api-Key: abcdef123456789", "X-Api-Key:"),
        ("api-key=abcdefgh1234&x", "api-key=&x"),
        ("--api-key abcdefgh1234 --x", "--api-key  --x"),
        ("--hf-token=abcdefgh", "--hf-token="),
        ("--token abcdefgh1234", "--token"),
        ("--password 12345678", "--password"),
        ("['--token', 'abcdefgh1234']", "['--token', '']"),
        ("token: abcdefgh1234", "token:"),
        ('{"token": "abcdefgh123"}', '{"token": ""}'),
        (r'"{\"token\": \"abcdefgh123\"}"', r'"{\"token\": \"\"}"'),
        ("bearer abcdefghijklmnopqrst", "bearer"),
        ("Cookie: session=abcdefghijkl; other=1", "Cookie:"),
        ("Set-Cookie: session=abcdefghijkl", "Set-Cookie:"),
        ("npm_abcdefghijklmnopqrstuvwxyz0123456789", ""),
        ("pypi-AgEIcHlwaS5vcmcCJDU5ZGY", ""),
        ("password=12345678", "password="),
        ("'password': 'correct horse'", "'password': ''"),
        ('secret = "a b c"', 'secret = ""'),
        ("pwd=hunter22", "pwd="),
        ("credentials: abcdefgh1", "credentials:"),
    ],
)
def test_what_a_text_calls_a_secret_is_replaced_as_a_whole(text, left):
    said = Redactor()(text)
    assert MARK in said and said.replace(MARK, "").strip() == left.strip()
    assert Redactor()(said) == said


@pytest.mark.parametrize(
    "text",
    ["throughput/generate_tokens_per_s: 31400.5", "eos_token='<|im_end|>'", "sampling.max_tokens=1024", "a@b.example",
     "see http://example.org/x", "http://example.org/a b@c", "tcp://127.0.0.1:5555", "key=value", "step 3/10",
     "tokens: 512", "max_tokens=32", "token ids: 12345678", "n_tokens: 123456", "tokenizer: Qwen/Qwen2.5-0.5B",
     "--tokenizer Qwen/Qwen2.5-0.5B", "--max-tokens 1024", "token: 1234567", "next token: understanding",
     '{"token": "understanding"}', "pad_token_id=151643", "eos_token: <|endoftext|>", "stop_token=abcdefgh12",
     "tokens_per_s=12345678", "token budget: 123456", "api_key=None", "password: required", "PWD=/root/abcdef",
     "authorization: required", "--token 12345678",
     "bearer of responsibilities", "cookie: a small biscuit", "npm_config_registry=https", "pypi-server"],
)  # fmt: skip
def test_ordinary_texts_stay(known, text):
    assert known(text) == text


def test_values_are_known_in_every_spelling(known):
    known.add('qu"ote\\and/é and space', "first line of a key\nsecond line of a key")
    for text in (
        'qu"ote\\and/é and space',
        json.dumps('qu"ote\\and/é and space'),
        repr('qu"ote\\and/é and space'),
        "qu%22ote%5Cand%2F%C3%A9%20and%20space",
        "... second line of a key",
    ):
        assert "ote" not in known(text).replace("(secret)", "") or "second" not in text
        assert MARK in known(text), text
    known.add("true", "12345", "disabled", "100000")
    assert known("true 12345 disabled 100000") == "true 12345 disabled 100000"


def test_the_environment_and_the_configuration_are_read(known, tmp_path):
    (tmp_path / "token").write_text("from-a-file-0123\n")
    secrets.learn_environment(
        {
            "X_TOKEN": "from-environment",
            "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"),
            "DB": "x://u:in-the-url@h",
            "PATH": "/bin/abc",
        }
    )
    secrets.learn(
        {"vllm": {"hf_token": "from-config-1", "model": "not-a-secret"}, "list": [{"api_key": "from-a-list"}]}
    )
    said = known("from-environment from-a-file-0123 in-the-url from-config-1 from-a-list not-a-secret /bin/abc")
    assert said == " ".join([MARK] * 5) + " not-a-secret /bin/abc"
    assert redacted({"a": ["from-config-1", 3], "b": None}) == {"a": [MARK, 3], "b": None}


def test_logs_streams_and_tracebacks_are_redacted(known, monkeypatch):
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    factory = logging.getLogRecordFactory()
    with secrets.guarded():
        handler = logging.StreamHandler(sys.stderr)
        logger = logging.getLogger("some.library")
        logger.addHandler(handler)
        try:
            print("printed", VALUE)
            logger.error("logged %s \x1b[31m", VALUE)
            try:
                raise ValueError(f"raised {VALUE}")
            except ValueError:
                logger.exception("caught")
            logger.error("%d is badly formatted", "x") if sys.flags.dev_mode else None
        finally:
            logger.removeHandler(handler)
    assert logging.getLogRecordFactory() is factory and sys.stdout is out
    assert out.getvalue() == f"printed {MARK}\n"
    assert VALUE not in err.getvalue() and "raised (secret)" in err.getvalue() and "\\x1b[31m" in err.getvalue()


def test_what_leaves_a_command_as_an_exception_says_no_secret(known):
    with pytest.raises(RuntimeError) as caught, secrets.guarded():
        try:
            raise OSError(2, f"no {VALUE}", f"/x/{VALUE}")
        except OSError as error:
            raise RuntimeError(f"because {VALUE}", 3) from error
    assert VALUE not in repr(caught.value) + repr(caught.value.__cause__) + str(caught.value.__cause__)
    assert caught.value.args[1] == 3
    loop = ValueError(VALUE)
    loop.__cause__ = loop
    cleanse(loop)
    assert loop.args == (MARK,)


def test_a_run_folder_holds_no_secret_and_cannot_be_taken_for_a_configuration(known, tmp_path):
    tree = {
        "run": {"dir": str(tmp_path / "run")},
        "vllm": {"hf_token": "abcdefgh-1"},
        "data": {"suffix": "https://u:pw@h"},
    }
    parsed = config.parse(tree)
    with RunDir(parsed) as folder:
        folder.write_config()
        folder.write_status({"state": "running", "advice": "abcdefgh-1"})
        text = (folder.path / "config.yaml").read_text() + (folder.path / "status.json").read_text()
        assert "abcdefgh-1" not in text and ":pw@" not in text and text.count(MARK) == 3
        with pytest.raises(ConfigError, match=r"data\.suffix=.*in place of a secret"):
            config.load(folder.path / "config.yaml")
        with pytest.raises(ConfigError, match=r"vllm\.hf_token=.*Give it again"):
            config.load(folder.path / "config.yaml", ["data.suffix=x"])
        assert config.load(folder.path / "config.yaml", ["data.suffix=x", "vllm.hf_token=y"])


def test_an_override_that_cannot_be_read_says_no_secret(known):
    with pytest.raises(ConfigError) as caught:
        config.load(None, ["vllm.hf_token=[abcdefgh-2"])
    assert "abcdefgh-2" in str(caught.value) and "abcdefgh-2" not in known(str(caught.value))


# ---------------------------------------------------------------- terminals


@pytest.mark.parametrize(
    "attack",
    [
        "\x1b]0;title\x07",
        "\x1b[2J",
        "\x9b31m",
        "\rover",
        "a\bb",
        "\x1b]8;;http://x\x07link",
        "\u202ereversed",
        "\x7f",
        "\ud83d",
    ],
)
def test_texts_from_elsewhere_move_no_cursor(attack):
    stream = io.StringIO()
    console = Terminal(file=stream, force_terminal=True, width=100, highlight=False)
    console.print(f"before {attack} after [red]not markup[/red] :smile:", soft_wrap=True)
    console.print_json(json.dumps({"x": attack}), highlight=False)
    said = stream.getvalue()
    said.encode("utf-8")
    assert attack not in said and "[red]not markup[/red] :smile:" in said
    assert not set("\x1b\x07\x9b\r\b\x7f\u202e") & set(said.replace("\x1b[0m", "").replace("\x1b[1m", ""))


def test_clean_keeps_what_people_write():
    text = "tab\tand\nlines, Ελληνικά, 日本語, emoji 🙂, العربية"
    assert clean(text) == text and clean("a\r\nb") == "a\nb"
