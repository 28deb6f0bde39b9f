"""What data, models and other users put into names and files stays where it belongs, and holds up nobody."""

from __future__ import annotations

import html.parser
import json
import os
import socket
import threading
from pathlib import Path

import pytest

from hapo_async import control, events, metrics, toy
from hapo_async.config import parse
from hapo_async.data import load_prompts, load_tokenizer, resolve_model
from hapo_async.errors import ConfigError, DataError, UserError
from hapo_async.evaluation import verdicts
from hapo_async.evaluation.evaluate import LONGEST_NAME, set_name
from hapo_async.files import open_regular, read_regular
from hapo_async.quarantine import Quarantine
from hapo_async.report import page
from hapo_async.rollouts import RolloutWriter
from hapo_async.types import GroupKey

ODD = {
    "upwards": "../../../../outside",
    "absolute": "/tmp/outside",
    "nul": "a\0b",
    "long": "x" * 10_000,
    "half a character": "\ud83d",
    "lines": "a\nb\r\nc",
    "windows": "..\\..\\outside",
    "empty": "",
    "dots": "..",
    "script": "</script><script>alert(1)</script>",
}


def within(seconds: float, work) -> object:
    """What ``work`` returns; fails when that takes longer."""
    out: list[object] = []
    thread = threading.Thread(target=lambda: out.append(work()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "it waits"
    return out[0] if out else None


def everything(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("name", list(ODD.values()), ids=list(ODD))
def test_the_name_of_a_set_is_a_name_and_no_path(name):
    for source in (name, f"{name}.jsonl", f"folder/{name}", f"{name}/{name}.parquet"):
        found = set_name(source)
        assert found and "/" not in found and "\0" not in found and found not in (".", "..")
        assert len(f"{found}_12.jsonl".encode("utf-8", "surrogatepass")) < 255 and not found.startswith(".")
    assert len(set_name("x" * 300).encode()) <= LONGEST_NAME
    assert set_name("x" * 300 + "a") != set_name("x" * 300 + "b") and set_name("é" * 300)


@pytest.mark.parametrize("uid", list(ODD.values()), ids=list(ODD))
def test_no_uid_leaves_the_run_folder_or_ends_the_run(tmp_path, uid):
    run = tmp_path / "a" / "run"
    run.mkdir(parents=True)
    before = everything(tmp_path)
    verdicts.append(run, set_name(uid), 1, [(uid, [True, None], uid)])
    row = {
        "step": 1,
        "key": [0, uid, 0],
        "prompt": uid,
        "truth": uid,
        "gate": {},
        "answers": [{"text": uid, "verdict": uid}],
    }
    RolloutWriter(run / "rollouts", 1.0, 0).write(1, [row])
    Quarantine(run).add(GroupKey(0, uid, 1), 1, "late", 2)
    events.Events(run, lambda: 1, lambda text: None).add("lost", uid, uid)
    with metrics.Writer(run) as writer:
        writer.write(1, {"reward/mean": 0.5})
    verdicts.append(run, set_name(uid), 2, [(uid, [False], uid)])
    text = page.write(run).read_text(encoding="utf-8")
    assert all(p.startswith("a/run") for p in everything(tmp_path) - before), everything(tmp_path)
    assert verdicts.read(run)[set_name(uid)].uids == [uid]
    assert events.read(run)[0].text == uid
    assert text.count("<script>") == 1


def test_rows_with_odd_texts_are_loaded_or_refused(tmp_path):
    tokenizer = load_tokenizer("builtin:chain")
    rows = list(toy.builtin_rows("train"))[:3]
    for number, odd in enumerate(ODD.values()):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(
            "".join(json.dumps({**row, "id": f"{odd}{i}", "level": odd}) + "\n" for i, row in enumerate(rows))
        )
        settings = parse({"data": {"columns": {"uid": "id"}}, "algorithm": "grpo"})
        prompts, _ = load_prompts(settings, str(path), tokenizer)
        assert len(prompts) == 3
    (tmp_path / "deep.jsonl").write_text("[" * 200_000)
    with pytest.raises(DataError, match="nested too deeply"):
        load_prompts(parse({}), str(tmp_path / "deep.jsonl"), tokenizer)


# ---------------------------------------------------------------- the report


class _Tags(html.parser.HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


@pytest.mark.parametrize(
    "attack",
    [
        "<script>alert(1)</script>",
        "</script><img src=x onerror=alert(1)>",
        '"><svg onload=alert(1)>',
        "' onmouseover='alert(1)",
        "javascript:alert(1)",
        "]]><!--<x/>",
        "{{ 7 * 7 }}{% raw %}",
        "&lt;script&gt;",
    ],
)
def test_the_report_shows_what_models_and_data_say_and_runs_none_of_it(tmp_path, attack):
    run = tmp_path / attack.replace("/", "_")
    (run / "rollouts").mkdir(parents=True)
    (run / "config.yaml").write_text(
        json.dumps({"algorithm": attack, "model": attack, "max_staleness": attack, "run": attack})
    )
    group = {
        "step": attack,
        "key": [attack],
        "prompt": attack,
        "truth": attack,
        "gate": {"reason": attack, "successes": attack},
    }
    answer = {"text": attack, "verdict": attack, "finish_reason": attack, "spans": [[attack, 0, 1]], "reward": attack}
    (run / "rollouts" / "step-1.jsonl").write_text(json.dumps({**group, "answers": [answer]}) + "\n")
    (run / "status.json").write_text(json.dumps({"state": attack}))
    with metrics.Writer(run) as writer:
        for step in (1, 2):
            writer.write(step, {"reward/mean": 0.5, "eval/x/pass@1": 0.5, "scale/generators": 1, "time/step_s": 1})
    for step in (1, 2):
        verdicts.append(run, "x", step, [(attack, [True], attack)])
    events.Events(run, lambda: 1, lambda text: None).add(attack, attack, attack)
    text = page.write(run).read_text()
    tags = _Tags(text).tags
    names = [tag for tag, _ in tags]
    assert names.count("script") == 1 and not {"img", "iframe", "object", "base", "form", "a"} & set(names)
    for _, attributes in tags:
        assert not any(name.startswith("on") for name in attributes)
        assert not any(
            (value or "").startswith("javascript:") for name, value in attributes.items() if name in ("href", "src")
        )
    policy = next(a["content"] for t, a in tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy and "unsafe-eval" not in policy


def test_the_policy_names_the_script_that_is_there(tmp_path):
    import base64
    import hashlib

    text = page.write(tmp_path).read_text()
    script = text.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text and "addEventListener" in script


# ---------------------------------------------------------------- files that are none


def test_only_regular_files_are_opened_and_nothing_waits(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(os.path.relpath(tmp_path / "socket"))
        for name in ("folder", "pipe", "socket"):
            assert isinstance(within(2, lambda name=name: _raised(open_regular, tmp_path / name)), OSError)
    assert read_regular(tmp_path / "link", 5) == b"12345"
    with pytest.raises(OSError):
        read_regular(tmp_path / "link", 5, follow=False)
    with pytest.raises(ValueError, match="larger than 4"):
        read_regular(tmp_path / "file", 4)


def _raised(work, *arguments) -> BaseException | None:
    try:
        work(*arguments)
    except OSError as error:
        return error
    return None


def test_pipes_in_a_run_folder_hold_up_no_report(tmp_path):
    for name in ("events.jsonl", "status.json", "config.yaml", "evals/x.jsonl", "rollouts/step-000001.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        os.mkfifo(tmp_path / name)
    assert within(20, lambda: page.write(tmp_path))


REQUEST = {"id": "0" * 16, "generators": 2}


def _requests(path: Path, elsewhere: Path) -> dict[str, object]:
    text = json.dumps(REQUEST)
    elsewhere.write_text(text)
    return {
        "nested": lambda: path.write_text("[" * 100_000 + "]" * 100_000),
        "nested object": lambda: path.write_text('{"a":' * 40_000),
        "huge number": lambda: path.write_text(text.replace("2", "9" * 5000)),
        "huge float": lambda: path.write_text(text.replace("2", "1e999")),
        "many keys": lambda: path.write_text(json.dumps({str(i): 1 for i in range(20_000)})),
        "not a number": lambda: path.write_text(text.replace("2", "NaN")),
        "path for an id": lambda: path.write_text(text.replace("0" * 16, "../../etc/passwd")),
        "nul": lambda: path.write_bytes(b"\0" * 100),
        "UTF-16": lambda: path.write_bytes(b"\xff\xfe{\0"),
        "oversized": lambda: path.write_bytes(b" " * 50_000_000),
        "empty": path.touch,
        "pipe": lambda: os.mkfifo(path),
        "folder": path.mkdir,
        "full folder": lambda: (path.mkdir(), (path / "x").touch()),
        "link": lambda: path.symlink_to(elsewhere),
        "link to a device": lambda: path.symlink_to("/dev/zero"),
        "link to itself": lambda: path.symlink_to(path),
        "unreadable": lambda: (path.write_text(text + "x"), path.chmod(0)),
    }


def test_odd_requests_are_set_aside_at_once_and_the_next_one_is_met(tmp_path, caplog):
    desk = control.Desk(tmp_path)
    path, elsewhere = tmp_path / "control" / "request.json", tmp_path / "elsewhere"
    for name, make in _requests(path, elsewhere).items():
        make()
        caplog.clear()
        assert within(3, desk.take) is None, name
        assert not os.path.lexists(path), name
        assert len(caplog.records) == 1 and len(caplog.text) < 2000, name
        path.write_text(json.dumps(REQUEST))
        assert desk.take() == control.Request(**REQUEST), name
        path.unlink()
    assert elsewhere.read_text() == json.dumps(REQUEST)


def test_what_cannot_be_set_aside_is_said_once(tmp_path, caplog, monkeypatch):
    desk = control.Desk(tmp_path)
    monkeypatch.setattr(control, "_clear", lambda path: None)
    (tmp_path / "control" / "request.json").write_text("x")
    for _ in range(5):
        assert desk.take() is None
    assert len(caplog.records) == 1


@pytest.mark.parametrize("kind", ["pipe", "link", "file"])
def test_a_control_folder_that_is_none_is_set_aside(tmp_path, kind):
    place, elsewhere = tmp_path / "control", tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o755)
    (elsewhere / "request.json").write_text("mine")
    {"pipe": lambda: os.mkfifo(place), "link": lambda: place.symlink_to(elsewhere), "file": place.touch}[kind]()
    within(3, lambda: control.Desk(tmp_path))
    assert place.is_dir() and not place.is_symlink() and place.stat().st_mode & 0o777 == 0o700
    assert (elsewhere / "request.json").read_text() == "mine" and elsewhere.stat().st_mode & 0o777 == 0o755


def test_pipes_in_place_of_answers_and_locks_hold_up_nobody(tmp_path, monkeypatch):
    desk = control.Desk(tmp_path)
    for name in ("answer.json", "driver.json"):
        (tmp_path / "control" / name).unlink(missing_ok=True)
        os.mkfifo(tmp_path / "control" / name)
    within(3, lambda: desk.answer(control.Request(**REQUEST), ["line"], ""))
    assert (tmp_path / "control" / "answer.json").is_file()
    os.mkfifo(tmp_path / ".lock")
    assert within(3, lambda: control.driver_of(tmp_path)) is None
    (tmp_path / ".lock").unlink()
    (tmp_path / ".lock").write_text("9" * 30)
    assert control.driver_of(tmp_path) is None
    (tmp_path / "config.yaml").touch()
    monkeypatch.setattr(control, "driver_of", lambda run_dir: 1)

    def submit() -> str:
        try:
            control.submit(tmp_path, control.new_request(["generators=2"]))
        except ConfigError as error:
            return str(error)
        return ""

    assert "takes no requests now" in str(within(3, submit))


# ---------------------------------------------------------------- models


def test_weights_that_would_be_unpickled_are_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "training_args.bin").touch()
    assert resolve_model(str(tmp_path))
    for name in ("pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth", "model.pt"):
        (tmp_path / name).touch()
        with pytest.raises(ConfigError, match=rf"{name}, which is a pickle"):
            resolve_model(str(tmp_path))
        (tmp_path / "model.safetensors").touch()
        assert resolve_model(str(tmp_path))
        (tmp_path / "model.safetensors").unlink()
        (tmp_path / name).unlink()


def test_code_of_a_model_folder_is_never_run(tmp_path):
    mark = tmp_path / "executed"
    folder = tmp_path / "model"
    folder.mkdir()
    code = f"from pathlib import Path\nPath({str(mark)!r}).touch()\nclass C: pass\n"
    for name in ("modeling_x.py", "configuration_x.py", "tokenization_x.py"):
        (folder / name).write_text(code)
    named = {
        "AutoConfig": "configuration_x.C",
        "AutoModelForCausalLM": "modeling_x.C",
        "AutoTokenizer": "tokenization_x.C",
    }
    (folder / "config.json").write_text(
        json.dumps({"model_type": "x", "auto_map": named, "max_position_embeddings": 64})
    )
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["tokenization_x.C", None]}})
    )
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").touch()
    from hapo_async import engine, plan

    for work in (
        lambda: load_tokenizer(str(folder)),
        lambda: plan.parameter_count(str(folder)),
        lambda: engine.load_model(str(folder), "cpu", "float32"),
    ):
        with pytest.raises((UserError, ValueError, OSError, KeyError)):
            work()
    assert not mark.exists()


def test_a_pickle_under_a_safe_name_is_no_model(tmp_path):
    import pickle

    from safetensors import SafetensorError

    from hapo_async import engine

    class Boom:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    source = Path(toy.MODEL_DIR)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        if (source / name).exists():
            (tmp_path / name).write_bytes((source / name).read_bytes())
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Boom()))
    with pytest.raises((OSError, SafetensorError, ValueError)):
        engine.load_model(str(tmp_path), "cpu", "float32")
    assert not (tmp_path / "executed").exists()
