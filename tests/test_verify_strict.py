"""What earns nothing though it contains the truth, what is refused before sympy sees it, and what honest answers may do."""

import sys
import time
from pathlib import Path

import pytest

from hapo_async.types import Fault
from hapo_async.verify import final, judge_text, refuse, symbolic
from hapo_async.verify.pool import VerifierPool

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import hostile_corpus


def judge(response, truth):
    return judge_text("auto", "", response, truth)


@pytest.fixture(scope="module")
def outcomes():
    """A slice of the corpus with its judgements, hostile and honest answers side by side."""
    corpus = hostile_corpus.cases(300, seed=1)
    with VerifierPool("auto", workers=1, timeout_s=4.0) as pool:
        judgements = pool.judge([(c["prompt"], c["response"], c["truth"]) for c in corpus])
        stats = pool.stats()
    return list(zip(corpus, judgements, strict=True)), stats


def test_no_hostile_answer_of_the_corpus_earns_anything(outcomes):
    accepted = [c for c, j in outcomes[0] if c["expected"] != "correct" and j.reward]
    assert not accepted
    assert {c["class"] for c, _ in outcomes[0]} == set(hostile_corpus.CLASSES)


def test_honest_answers_among_hostile_ones_are_right(outcomes):
    honest = [(c, j) for c, j in outcomes[0] if c["expected"] == "correct"]
    assert len(honest) >= 75 and not [(c, j) for c, j in honest if j.reward != 1.0]


def test_hostile_truths_poison_their_prompts_and_nothing_else_does(outcomes):
    assert all((j.fault is Fault.PROMPT) == (c["expected"] == "masked") for c, j in outcomes[0])


def test_no_worker_of_the_corpus_outlives_its_deadline(outcomes):
    assert outcomes[1]["overstay_s"] < 1.0


def test_the_same_seed_makes_the_same_corpus():
    one, other = (hostile_corpus.cases(2000, seed=3) for _ in range(2))
    assert repr(one) == repr(other) and len(one) >= 2000
    assert repr(one) != repr(hostile_corpus.cases(2000, seed=4))


@pytest.mark.parametrize(
    ("response", "truth"),
    [
        (r"\boxed{41=42}", "42"),
        (r"\boxed{\neq 42}", "42"),
        (r"\boxed{\neq=42}", "42"),
        (r"\boxed{1=2=3=42}", "42"),
        (r"\boxed{" + ",".join(map(str, range(1, 43))) + "}", "42"),
        (r"\boxed{42}\boxed{43}", "42"),
        (r"\boxed{41} and then \boxed{42}", "42"),
        (r"\boxed{42} " * 20, "42"),
        ("A: 41\nA: 42", "42"),
        ("The answer is 42. The answer is 41.", "42"),
        ("Final answer: 41\n" + r"\boxed{42}", "42"),
        (r"x \boxed{x \in \{41, 42\}}", "42"),
        (r"\boxed{\{42\}}", "42"),
        (r"\boxed{[0, 100]}", "42"),
        (r"\boxed{42 \text{ or } 43}", "42"),
        (r"\boxed{\text{42 or 43}}", "42"),
        (r"\boxed{42\text{ million}}", "42"),
        (r"\boxed{42\mathrm{i}}", "42"),
        (r"\boxed{\frac{42x}{x}}", "42"),
        (r"\boxed{4 2}", "42"),
        ("\\boxed{4\u200b2}", "42"),
        ("\\boxed{\uff14\uff12}", "42"),
        ("\\boxed{\u202e24}", "42"),
        (r"\boxed{\overline{42}}", "42"),
        (r"\boxed{\text{all real numbers}}", "42"),
        (r"\boxed{42 % 41}", "42"),
        (r"\boxed{0.42}", "42"),
        (r"\boxed{0.42\%}", r"42\%"),
        (r"\boxed{x}", "2x+1"),
        (r"\boxed{y}", "y=2x+1"),
        (r"\boxed{0=0}", "5x - 7y + 11z + 4 = 0"),
        (r"\boxed{2x+1, 2x}", "2x+1"),
        (r"\boxed{2x+1 \text{ or } 2x}", "2x+1"),
        (r"\boxed{y > 2x+1}", "2x+1"),
        (r"\boxed{[3,4]}", "(3,4]"),
        (r"\boxed{C D}", "C"),
        (r"\boxed{C or D}", "C"),
        (r"\boxed{(C) or (D)}", "C"),
        (r"\boxed{\text{not }C}", "C"),
        (r"\boxed{A,B,C,D}", "C"),
        (r"\boxed{seat}", "east"),
        (r"\boxed{42}" + " and so on" * 1000, "42"),
    ],
)
def test_strictness_gives_nothing_for(response, truth):
    assert judge(response, truth).reward == 0.0


@pytest.mark.parametrize(
    ("response", "truth"),
    [
        (r"\boxed{42} again \boxed{42}", "42"),
        (r"\boxed{\frac{1}{2}}, or as decimal \boxed{0.5}", r"\frac12"),
        (r"I put it into \boxed{}: \boxed{42}", "42"),
        (r"<think>\boxed{41}? no</think> \boxed{42}", "42"),
        (r"<think>so \boxed{42}</think>", "42"),
        (r"The answer is 42. \boxed{42}", "42"),
        (r"\boxed{f(3) = 42}", "42"),
        (r"\boxed{\text{Area} = 42\text{ cm}^2}", "42"),
        (r"\boxed{10\,080}", "10,080"),
        *((text, r"42\%") for text in (r"\boxed{42\%}", r"\boxed{42}", r"\boxed{0.42}", r"\boxed{\frac{21}{50}}")),
        (r"\boxed{42 \cdot \frac{1}{100}}", r"42\%"),
        (r"\boxed{17.5 \cdot \frac{1}{100}}", "17.5%"),
        (r"\boxed{0.\overline{3}}", r"\frac{1}{3}"),
        (r"\boxed{\textbf{(C)}\ 42}", "42"),
        (r"\boxed{\log_2 3}", r"\log_2 3"),
        (r"\boxed{x \in [-2,7]}", "[-2,7]"),
        (r"\boxed{\pm 3}", r"3, -3"),
        (r"\boxed{(x+1)^{2017}}", r"(1+x)^{2017}"),
        ("C. A planet with twice the mass of Earth", "C"),
        ("A: 1\nB: 2\nC: 42\nso " + r"\boxed{C}", "C"),
        (r"\boxed{\text{是}}", "是"),
    ],
)
def test_strictness_does_not_reject(response, truth):
    judgement = judge(response, truth)
    assert judgement.reward == 1.0, judgement.detail


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("10^{10^{10}}", "power"),
        ("10**10**10", "power of a power"),
        ("2^2^2^2", "power of a power"),
        ("((10^{999})^{999})^{999}", "powers of powers"),
        ("10^{999 \\cdot 999}", "a power of 998001"),
        ("e^{e^{e^{10}}}", "tower"),
        ("(x+y+z)^{50}", "of a sum"),
        ("1000000!", "factorial"),
        ("((3!)!)!", "factorial"),
        (r"\binom{1000000}{500000}", "large argument"),
        (r"\sqrt[1000000]{2}", "large argument"),
        (r"\begin{pmatrix}1&1\\0&1\end{pmatrix}^{99}", "power of a matrix"),
        ("1e99999", "exponent"),
        ("(" * 51 + ")" * 51, "nested deeper than 50"),
        (",".join("1" * 65), "64 items"),
        ("9" * 1001, "1000 digits"),
        ("x" * 2001, "2000 characters"),
        (r"\sum_{k=1}^{9} k", r"\sum"),
    ],
)
def test_the_gate_refuses(text, reason):
    assert reason in refuse.limits(text, "42")


@pytest.mark.parametrize(
    "text",
    [
        "x^8 + x^7 + 1",
        "e^{-x^{2}}",
        "2^{2^{10}}",
        "10^{-34}",
        "e^{-0.123456t}",
        "20!",
        r"\binom{100}{50}",
        "n!",
        "9" * 1000,
    ],
)
def test_the_gate_lets_pass(text):
    assert refuse.limits(text, "42") == ""


def test_what_the_truth_contains_an_answer_may_contain():
    assert refuse.limits("x^{2017}", "x^{2017}+1") == "" != refuse.limits("x^{2017}", "x")
    assert refuse.limits("x^{2017}") == "" != refuse.limits("x^{20170}")
    assert refuse.characters("Émile и", "и") == "" != refuse.characters("и", "")


PIECES = (
    *(
        "answer is\t",
        "answer is\n",
        "answer to a",
        "A: ",
        "\nA: 1",
        "*_#> ",
        "####",
        "$",
        r"\(",
        r"\[",
        r"\boxed",
        r"\boxed{",
    ),
    *(
        "{",
        r"\frac",
        r"\frac{",
        "1 ",
        " ",
        "a",
        "a ",
        "1,",
        "^",
        "^{",
        "!",
        "1e",
        r"\text{",
        "(a,",
        "x_{",
        "=",
        "%",
        ".5",
    ),
    *(
        "not ",
        "wrong to ",
        "is not the ",
        r"\text{ or",
        "'",
        "~",
        "²",
        "√",
        "½",
        "x<",
        "x<2 or ",
        r"\cup",
        "0.1",
        " or",
        "cm ",
        "f(-1",
    ),
    *("aaa bbb", r"\text{a}", "|", "[", "1^", "**", "-", "+1", ";", "&", "\\\\", "or ", "~", "·"),
)


@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize("wrap", ["{}", r"\boxed{{{}}}", "A: {}"])
def test_no_pattern_of_ours_takes_long(piece, wrap, monkeypatch):
    monkeypatch.setattr(symbolic, "equal", lambda answer, gold: False)
    took = []
    while len(took) < 5 and min(took, default=1.0) >= 0.3:  # a pattern is slow each time, a machine now and then
        start = time.process_time()
        for text in (piece * 4096, piece * (1900 // len(piece))):
            for truth in ("42", "x^2+1", "C", r"\text{Evelyn}", "(1,2)", "x<2", "1010_2"):
                judge_text("auto", "", wrap.format(text), truth)
        took.append(time.process_time() - start)
    assert min(took) < 0.3


def test_only_the_last_four_kilobytes_are_read():
    text = r"\boxed{42}" + "x" * (final.TAIL - 10)
    assert final.answer(text) == "42" and final.answer(text + "x") != "42"
