"""Verifiers judge final answers, never crash into a reward, and keep their deadline."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from hapo_async import verify
from hapo_async.errors import ConfigError, DataError, RunError
from hapo_async.types import Verdict
from hapo_async.verify import boxed, math, plugin, wire
from hapo_async.verify.check import check_verifier
from hapo_async.verify.pool import VerifierPool, _Worker

PLUGINS = """
import ctypes, os, signal, subprocess, sys, time

def ours(prompt, response, truth):
    return 1.0 if response == truth else 0.0

def positional(a, b, c):
    return float(b == c)

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": float(solution_str == ground_truth), "has_source": float(data_source == "aime")}

def trl(completions, answer, **columns):
    return [float(c == a) for c, a in zip(completions, answer)]

def odd(x):
    return 1.0

def loud(prompt, response, truth):
    print("noise on standard output", flush=True)
    os.write(1, b"\\x00\\x00\\x00\\x05trash")
    return 1.0

def undecided(prompt, response, truth):
    return None

def not_a_number(prompt, response, truth):
    return float("nan")

def naughty(prompt, response, truth):
    if response == "spin":
        for number in range(1, 32):
            try:
                signal.signal(number, signal.SIG_IGN)
            except OSError:
                pass
        ctypes.CDLL(None).sleep(3600)  # in C: no Python signal handler would ever run
    if response == "child":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
        open(truth, "w").write("started")
        time.sleep(3600)
    if response == "raise":
        raise KeyError("no such thing")
    if response == "exit":
        sys.exit(3)
    if response == "abort":
        os.abort()
    if response == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if response == "memory":
        raise MemoryError
    return 1.0
"""


@pytest.fixture(scope="module")
def plugins(tmp_path_factory):
    """Name of an importable module of plug-ins."""
    folder = tmp_path_factory.mktemp("plugins")
    (folder / "trial_rewards.py").write_text(textwrap.dedent(PLUGINS))
    sys.path.insert(0, str(folder))
    yield "trial_rewards"
    sys.path.remove(str(folder))


def verdict(name, response, truth):
    return str(verify.judge_text(name, "", response, truth).verdict)


def is_running(pid: int) -> bool:
    """Alive and not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def eventually(condition, seconds=20.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


# --------------------------------------------------------------------------------------------------------------------
# Boxed


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{12}.", "12"),
        (r"\boxed{1} or rather \boxed{ \frac{1}{2} }", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\fbox{7}", "7"),
        (r"$\boxed 9$", "9"),
        (r"\boxed{12", None),
        (r"\boxed{3} but \boxed{12", None),
        ("twelve", None),
        (r"\boxedness{3}", None),
    ],
)
def test_the_last_box_counts_and_must_be_closed(text, content):
    assert boxed.last_boxed(text) == content


def test_boxed_is_an_exact_match():
    assert verdict("boxed", r"\boxed{12}", "12") == "correct"
    assert verdict("boxed", r"\boxed{12.0}", "12") == "wrong"
    assert verdict("boxed", r"\boxed{13}; \boxed{12}", 12) == "correct"
    assert verdict("boxed", r"\boxed{12}; \boxed{13}", 12) == "wrong"
    assert verdict("boxed", "12", "12") == "unparseable"


@pytest.mark.parametrize("truth", ["42", 42, 42.0, r"\boxed{42}", "#### 42", ["41", 42], "some work\nA: 42"])
@pytest.mark.parametrize("name", ["auto", "boxed", "math"])
def test_a_truth_may_be_text_a_number_or_a_list(name, truth):
    assert verdict(name, r"\boxed{42}", truth) == "correct"
    assert verdict(name, r"\boxed{43}", truth) == "wrong"


# --------------------------------------------------------------------------------------------------------------------
# Math


@pytest.mark.parametrize(
    ("response", "truth"),
    [
        ("She has 3 left.\n#### 1,080", "1080"),
        ("6 * 3 = 18\nA: 18", "18"),
        ("A: 18.0", 18),
        ("A: $18", "18"),
        ("A: 18 dollars", "18"),
        ("Therefore **Answer:** $42$", 42),
        (r"The answer is $\frac12$.", "0.5"),
        ("The final answer is (C).", r"\text{(C)}"),
        (r"\boxed{x=42}", "42"),
        (r"\boxed{1080}", "1,080"),
        (r"\boxed{18\text{ dollars}}", "18"),
        (r"\boxed{90}", r"90^\circ"),
        (r"\boxed{\dfrac{14}3}", r"\frac{14}{3}"),
        (r"\boxed{0.333333}", r"\frac{1}{3}"),
        (r"\boxed{4.5\cdot 10^{3}}", "4500"),
        (r"\boxed{\text{evelyn}}", r"\text{Evelyn}"),
        (r"\boxed{(3, \pi/2)}", r"\left( 3, \frac{\pi}{2} \right)"),
        (r"\boxed{2\sqrt 2}", r"\sqrt{8}"),
        (r"\boxed{7,5,3}", "3, 5, 7"),
        (r"\boxed{-q+p}", "p - q"),
        ("42", "42"),
    ],
)
def test_math_accepts_what_is_equal(response, truth):
    assert verdict("math", response, truth) == "correct"


@pytest.mark.parametrize(
    ("response", "truth"),
    [
        (r"\boxed{41=42}", "42"),
        (r"\boxed{\neq 42}", "42"),
        (r"\boxed{1=2=3=42}", "42"),
        (r"\boxed{41,42}", "42"),
        (r"\boxed{x>42}", "42"),
        (r"\boxed{1=2x}", "2x"),
        (r"\boxed{3}", "3 n"),
        (r"\boxed{0.33}", r"\frac{1}{3}"),
        (r"\boxed{12345677.0}", "12345678"),
        (r"\boxed{D}", "C"),
        (r"\boxed{CD}", "C"),
        (r"\boxed{2/0}", "2"),
        (r"the answer is 42, so \boxed{41}", "42"),
        ("A: 17\nA: 18", "17"),
    ],
)
def test_math_refuses_what_is_not(response, truth):
    assert verdict("math", response, truth) == "wrong"


@pytest.mark.parametrize(
    "response", ["", "I do not know.\nSorry", r"\boxed{}", r"\boxed{12", "Let me think.\n1 + 2 = 3,\nso"]
)
def test_an_answer_that_is_not_marked_is_unparseable(response):
    judgement = verify.judge_text("math", "", response, "12")
    assert (judgement.verdict, judgement.reward) == (Verdict.UNPARSEABLE, 0.0)


def test_numbers_are_compared_without_loading_sympy():
    code = (
        "import sys; from hapo_async import verify\n"
        "assert verify.judge_text('auto', '', 'A: 1,080', '1080').reward == 1.0\n"
        "assert not {'sympy', 'math_verify', 'torch', 'transformers'} & set(sys.modules), 'loaded'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_truth_is_the_judges_failure_not_the_answers():
    judgement = verify.judge_text("math", "", r"\boxed{1}", None)
    assert judgement.verdict is Verdict.CRASH and judgement.reward is None


# --------------------------------------------------------------------------------------------------------------------
# Plug-ins


@pytest.mark.parametrize("function", ["ours", "positional", "compute_score", "trl"])
def test_a_plugins_signature_is_told_from_its_parameters(plugins, function):
    name = f"{plugins}:{function}"
    assert verify.judge_text(name, "p", "yes", "yes").reward == 1.0
    assert verify.judge_text(name, "p", "no", "yes").reward == 0.0


def test_verl_dicts_become_components_and_see_the_data_source(plugins):
    judgement = verify.judge_text(f"{plugins}:compute_score", "p", "yes", "yes", {"data_source": "aime"})
    assert judgement.components == {"score": 1.0, "has_source": 1.0}


def test_a_plugin_without_a_judgement_gives_no_reward(plugins):
    for function in ("undecided", "not_a_number"):
        judgement = verify.judge_text(f"{plugins}:{function}", "p", "yes", "yes")
        assert judgement.reward is None and judgement.verdict is Verdict.CRASH and "returned" in judgement.detail


def test_an_exception_in_a_plugin_is_a_crash_never_a_zero(plugins):
    judgement = verify.judge_text(f"{plugins}:naughty", "p", "raise", "yes")
    assert judgement.verdict is Verdict.CRASH and judgement.reward is None and "KeyError" in judgement.detail


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("maths", "Did you mean 'math'"),
        ("nowhere_module:f", "no module named"),
        ("trial_rewards:missing", "no function 'missing'"),
        ("trial_rewards:odd", r"verify\(prompt, response, truth\)"),
        (":f", "module:function"),
    ],
)
def test_a_wrong_verifier_name_is_a_config_error(plugins, name, said):
    with pytest.raises(ConfigError, match=said):
        verify.resolve(name)


def test_builtin_and_good_names_resolve(plugins):
    for name in ("auto", "boxed", "math", f"{plugins}:ours"):
        verify.resolve(name)
    assert verify.is_plugin(f"{plugins}:ours") and not verify.is_plugin("auto")


def test_three_positional_parameters_of_any_name_are_ours():
    assert plugin.adapt(lambda a, b, c: (a, b, c), "m:f")("p", "r", "t", {}) == ("p", "r", "t")


# --------------------------------------------------------------------------------------------------------------------
# Frames and pool


def test_frames_survive_any_cut():
    messages = [{"a": "x" * 1000}, {"b": [1, 2.5, None, "\ud800"]}, {}]
    stream = b"".join(wire.encode(m) for m in messages)
    for step in (1, 3, 1000, len(stream)):
        decoder = wire.Decoder()
        out = [m for at in range(0, len(stream), step) for m in decoder.feed(stream[at : at + step])]
        assert out == messages


def test_an_oversized_frame_is_refused():
    with pytest.raises(ValueError, match="exceeds the limit"):
        wire.Decoder().feed(b"\xff\xff\xff\xff")


def test_a_pool_judges_in_order_and_reports_progress():
    seen = []
    items = [("", rf"\boxed{{{n % 7}}}", n % 5) for n in range(300)]
    with VerifierPool("auto", workers=2, timeout_s=30) as pool:
        out = pool.judge(items, lambda done, total: seen.append((done, total)))
        stats = pool.stats()
    assert [j.reward for j in out] == [float(n % 7 == n % 5) for n in range(300)]
    assert seen == [(n + 1, 300) for n in range(300)]
    assert stats["judged"] == 300 and stats["workers_started"] <= 2


def test_a_pool_judges_nothing_and_huge_answers():
    with VerifierPool("auto", timeout_s=30) as pool:
        assert pool.judge([]) == []
        (judgement,) = pool.judge([("", "word " * 400_000 + r"\boxed{3}", "3")])
    assert judgement.verdict is Verdict.CORRECT


def test_a_spinning_verifier_is_killed_at_its_deadline_and_its_neighbours_finish(plugins):
    with VerifierPool(f"{plugins}:naughty", workers=2, timeout_s=1.0) as pool:
        out = pool.judge([("", "spin" if n in (3, 20) else "fine", "") for n in range(40)])
        stats = pool.stats()
        verdicts = [str(j.verdict) for j in out]
        assert verdicts == ["timeout" if n in (3, 20) else "correct" for n in range(40)]
        assert stats["workers_started"] >= 3, "the killed worker was replaced"
        assert [j.reward for j in pool.judge([("", "fine", "")])] == [1.0], "and the pool still works"


def test_children_of_a_killed_verifier_die_with_it(plugins, tmp_path):
    marker = tmp_path / "marker"
    with VerifierPool(f"{plugins}:naughty", timeout_s=3.0) as pool:
        asyncio.run(pool.start_async())
        (pid,) = pool.stats()["worker_pids"]
        future = pool.submit([("", "child", str(marker))])[0]
        assert eventually(marker.exists)
        children = [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        assert len(children) == 1 and is_running(children[0])
        assert future.result().verdict is Verdict.TIMEOUT
        assert eventually(lambda: not is_running(children[0]) and not is_running(pid))


@pytest.mark.parametrize(
    ("response", "expected"),
    [("raise", "crash"), ("exit", "crash"), ("abort", "crash"), ("killed", "oom"), ("memory", "oom")],
)
def test_a_worker_that_fails_costs_one_judgement_only(plugins, response, expected):
    with VerifierPool(f"{plugins}:naughty", timeout_s=30) as pool:
        out = pool.judge([("", response if n == 1 else "fine", "") for n in range(8)])
    assert [str(j.verdict) for j in out] == [expected if n == 1 else "correct" for n in range(8)]
    assert out[1].reward is None and out[1].detail


def test_what_a_plugin_prints_does_not_corrupt_the_stream(plugins):
    with VerifierPool(f"{plugins}:loud", timeout_s=30) as pool:
        assert [j.reward for j in pool.judge([("", "x", "")] * 5)] == [1.0] * 5


def test_the_deadline_clock_stops_while_a_worker_imports():
    verdict_frame = {"verdict": "correct", "reward": 1.0}
    frames = [{"loading": True}, {"loading": False}, verdict_frame]
    deadlines = []

    class Scripted(_Worker):
        def __init__(self):
            """No process: the frames are given."""

        def _receive(self, deadline):
            deadlines.append(deadline - time.monotonic())
            return frames.pop(0)

    assert Scripted().receive_judgement(1.0).reward == 1.0
    before, loading, after = deadlines
    assert before <= 1.0 and after <= 1.0 and loading > 60


def test_a_worker_says_when_it_imports():
    code = (
        "from hapo_async.verify import math; events = []; math.loading_hook = events.append\n"
        "math.verdict('A: 1', '1'); assert events == []\n"
        "math.verdict('A: x+1', '1+x'); assert events == [True, False], events"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_plugin_that_is_not_there_fails_loudly():
    with VerifierPool("nowhere_module:f") as pool, pytest.raises(ConfigError, match="no module named"):
        pool.judge([("", "x", "")])
    with VerifierPool("nowhere_module:f") as pool, pytest.raises(ConfigError, match="no module named"):
        asyncio.run(pool.start_async())


def test_a_frozen_worker_runs_into_the_deadline_and_is_replaced():
    with VerifierPool("auto", timeout_s=1.0) as pool:
        asyncio.run(pool.start_async())
        (pid,) = pool.stats()["worker_pids"]
        os.kill(pid, signal.SIGSTOP)
        assert pool.judge([("", "word " * 200_000 + r"\boxed{1}", "1")])[0].verdict is Verdict.TIMEOUT
        assert pool.judge([("", r"\boxed{1}", "1")])[0].verdict is Verdict.CORRECT
        assert not is_running(pid)


def test_closing_ends_workers_and_fails_what_is_left(plugins):
    pool = VerifierPool(f"{plugins}:naughty", timeout_s=600)
    asyncio.run(pool.start_async())
    (pid,) = pool.stats()["worker_pids"]
    futures = pool.submit([("", "spin", "")] * 3)
    pool.close()
    assert not is_running(pid)
    for future in futures:
        with pytest.raises(RunError, match="closed"):
            future.result(timeout=10)
    with pytest.raises(RunError, match="closed"):
        pool.judge([("", "x", "")])


def test_workers_die_with_a_killed_parent(plugins):
    code = (
        "import asyncio, sys, time; from hapo_async.verify.pool import VerifierPool\n"
        f"pool = VerifierPool('{plugins}:naughty', 2, 600); asyncio.run(pool.start_async())\n"
        "pool.submit([('', 'spin', '')]); print(*pool.stats()['worker_pids'], flush=True); time.sleep(600)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout
    pids = [int(p) for p in parent.stdout.readline().split()]
    assert len(pids) == 2 and all(is_running(p) for p in pids)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert eventually(lambda: not any(is_running(p) for p in pids))


def test_judging_asynchronously_leaves_the_event_loop_free():
    async def both():
        ticks = 0

        async def tick():
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.001)

        ticker = asyncio.create_task(tick())
        with VerifierPool("auto", timeout_s=30) as pool:
            out = await pool.judge_async([("", r"\boxed{1}", 1)] * 20)
            ticker.cancel()
        return out, ticks

    out, ticks = asyncio.run(both())
    assert [j.reward for j in out] == [1.0] * 20 and ticks > 3


# --------------------------------------------------------------------------------------------------------------------
# check-verifier


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_published_model_solutions_are_compared_and_disagreements_listed(tmp_path):
    rows = [
        {
            "question": "How many?",
            "ground_truth": "9 * 2 = <<9*2=18>>18\nA: 18",
            "6b": {"is_correct": True, "solution": "2 * 9 = 18\nA: 18"},
            "175b": {"is_correct": right, "solution": "1 + 1 = 2\nA: 2"},
        }
        for right in (False, True)
    ]
    report = check_verifier(write_lines(tmp_path / "solutions.jsonl", rows), workers=1)
    assert (report.cases, report.agree) == (4, 3)
    (d,) = report.disagreements
    assert (d.row, d.column, d.label, d.verdict, d.answer, d.truth) == (2, "175b", True, "wrong", "2", "18")
    assert "row 2 175b" in report.text() and "75.00%" in report.text()
    assert json.loads(json.dumps(report.as_dict()))["agreement"] == 0.75


def test_rows_of_response_truth_and_label_are_compared(tmp_path):
    rows = [{"response": r"\boxed{3}", "answer": 3, "label": 1}, {"response": "no", "answer": 3, "label": "false"}]
    report = check_verifier(write_lines(tmp_path / "labelled.jsonl", rows), workers=1)
    assert (report.cases, report.agree) == (2, 2)


def test_a_file_without_labels_is_refused(tmp_path):
    path = write_lines(tmp_path / "plain.jsonl", [{"question": "q", "answer": "a"}])
    with pytest.raises(DataError, match="label"):
        check_verifier(path)


def test_a_label_that_is_none_names_its_row(tmp_path):
    path = write_lines(tmp_path / "odd.jsonl", [{"response": "x", "truth": "x", "label": "perhaps"}])
    with pytest.raises(DataError, match="row 1: label 'perhaps'"):
        check_verifier(path)


def test_final_answers_are_found_where_people_write_them():
    assert math.final_answer("so\n#### 7") == "7"
    assert math.final_answer("Answer: **7**") == "7"
    assert math.final_answer("the answer is $x^2$. Done") == "x^2"
    assert math.final_answer("first\nsecond") is None
