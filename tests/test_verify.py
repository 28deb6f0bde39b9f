"""Verifiers judge final answers, never crash into a reward, and keep their deadline."""

import json
import subprocess
import sys

import pytest

from hapo_async import verify
from hapo_async.errors import ConfigError, DataError
from hapo_async.types import Fault, Verdict
from hapo_async.verify import boxed, math, plugin
from hapo_async.verify.check import check_verifier

PLUGINS = "tests.verify_plugins"


def verdict(name, response, truth):
    return str(verify.judge_text(name, "", response, truth).verdict)


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


@pytest.mark.parametrize("name", ["auto", "math", "boxed"])
@pytest.mark.parametrize("truth", [None, "", [], [""], float("nan"), {"a": 1}, [["x"] * 99]])
def test_a_truth_that_is_none_poisons_its_prompt(name, truth):
    judgement = verify.judge_text(name, "", r"\boxed{1}", truth)
    assert (judgement.verdict, judgement.reward, judgement.fault) == (Verdict.CRASH, None, Fault.PROMPT)
    assert judgement.detail.startswith("poisoned prompt: ")


# --------------------------------------------------------------------------------------------------------------------
# Plug-ins


@pytest.mark.parametrize("function", ["ours", "positional", "compute_score", "trl"])
def test_a_plugins_signature_is_told_from_its_parameters(function):
    name = f"{PLUGINS}:{function}"
    assert verify.judge_text(name, "p", "yes", "yes").reward == 1.0
    assert verify.judge_text(name, "p", "no", "yes").reward == 0.0


def test_verl_dicts_become_components_and_see_the_data_source():
    judgement = verify.judge_text(f"{PLUGINS}:compute_score", "p", "yes", "yes", {"data_source": "aime"})
    assert judgement.components == {"score": 1.0, "has_source": 1.0}


def test_a_plugin_without_a_judgement_gives_no_reward():
    for function, fault in (("undecided", Fault.PLUGIN), ("not_a_number", Fault.NONE)):
        judgement = verify.judge_text(f"{PLUGINS}:{function}", "p", "yes", "yes")
        assert judgement.reward is None and judgement.verdict is Verdict.CRASH and "returned" in judgement.detail
        assert judgement.fault is fault


def test_an_exception_in_a_plugin_is_a_crash_never_a_zero():
    judgement = verify.judge_text(f"{PLUGINS}:naughty", "p", "raise", "yes")
    assert judgement.verdict is Verdict.CRASH and judgement.reward is None and "KeyError" in judgement.detail


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("maths", "Did you mean 'math'"),
        ("nowhere_module:f", "no module named"),
        ("tests.verify_plugins:missing", "no function 'missing'"),
        ("tests.verify_plugins:odd", r"verify\(prompt, response, truth\)"),
        (":f", "module:function"),
    ],
)
def test_a_wrong_verifier_name_is_a_config_error(name, said):
    with pytest.raises(ConfigError, match=said):
        verify.resolve(name)


def test_builtin_and_good_names_resolve():
    for name in ("auto", "boxed", "math", f"{PLUGINS}:ours"):
        verify.resolve(name)
    assert verify.is_plugin(f"{PLUGINS}:ours") and not verify.is_plugin("auto")


def test_three_positional_parameters_of_any_name_are_ours():
    assert plugin.adapt(lambda a, b, c: (a, b, c), "m:f")("p", "r", "t", {}) == ("p", "r", "t")


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
