"""Answers that are almost the truth, and responses that state it in order to take it back: for ``tools/hostile_corpus.py``.

Every function is one class and yields (response, truth). ``{}`` in a pattern is the truth's own text.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from hostile_cases import EXPRESSIONS, Pair, box

TRUTHS = ("42", r"\frac{3}{4}", "(2,5)", r"\{1,2\}", "3+4i", "C", r"\text{Evelyn}", "x>3", *EXPRESSIONS)

AROUND = (
    *(
        "The answer is not {}.",
        "The answer isn't ${}$.",
        "not\n$$\n{}\n$$",
        "Either {} or 77",
        "It is false that it is {}.",
    ),
    *(
        "I do not think the answer is {}.",
        "Wrong answer: {}",
        "The answer is anything but {}.",
        "$x \\neq {}$",
        "$x > {}$",
    ),
    *(
        "$x \\not= {}$",
        "$-{}$",
        "$\\pm {}$",
        "$2{}$",
        "$2 \\cdot {}$",
        "$\\sqrt{{{}}}$",
        "$\\frac{{1}}{{{}}}$",
        "${}^2$",
    ),
    *(
        "${} + 1$",
        "${}\\cdot 7$",
        "{}0",
        "{}, or 77",
        "{}, or maybe 77",
        "{} or six",
        "{} is wrong.",
        "{} is not the answer.",
    ),
    *("{} does not work.", "{}. Or 77.", "{}. Wait, no.", "{}? No.", "less than {}", "rather than {}", "{} $\\lor 77$"),
    *("Answer: 77\n{}", "Answer: x = 77\n{}", "The answer is 77 or 78.\n{}", "#### 77\n{}", "{}\nAnswer: $77$"),
    *(r"\framebox{{77}} {}", "77 or {}", "¬{}"),
)
"""Around a box that holds the truth."""

MARKED = (
    *(
        "The answer is not ${}$.",
        "The answer is ${}$ or $77$.",
        "The answer is {}. Or 77.",
        "The answer is at least ${}$.",
    ),
    *(
        "I doubt that the answer is {}.",
        "It is false that the answer is {}.",
        "Answer: not {}",
        "#### {} or 77",
        "A: ${}$, $77$",
    ),
    *(
        "Answer: 77\nAnswer: {}",
        "#### x=77\n#### {}",
        "Answer: {}. That is wrong.",
        "not ${}$",
        "The answer is between {} and 77",
    ),
)
"""Around a number without a box."""

NUMBERS = (
    *("~{}", r"\geq={}", r"\lt = {}", r"\text{{at least}}={}", r"\sqrt x={}", "2x={}", r"\text{{exceeds}}={}"),
    *(
        r"{}\text{{ at least}}",
        r"{}\text{{ is impossible}}",
        r"{}\text{{ squared}}",
        r"{}\text{{k}}",
        r"{}\text{{}}^2",
        "{} nope",
    ),
    *(
        "{} six",
        r"{}\text{{ tenths}}",
        "{} halves",
        r"{}\text{{ fails}}",
        r"{}\text{{ can't be}}",
        "{}...",
        "{}.0000001",
        r"{}\%",
    ),
    *(
        r"{}\cdot 1.0000001",
        "{}'",
        "9+\n\\frac{{{}}}{{1}}",
        r"9\({}\)",
        "{}_7",
        r"\operatorname{{not}} {}",
        r"\hbox{{not }}{}",
    ),
    *(r"{}\text{{ vs six}}", "{} over two", r"\text{{negative }}{}", "{} approx.", r"\gg {}", r"\overset{{?}}{{=}} {}"),
)
"""Boxed, with a number as truth."""

FORMULAS = (
    *(
        "{} t",
        "{} h",
        "{}'",
        r"{}\text{{ is impossible}}",
        r"{}\textrm{{ or six}}",
        "9x\n\\({}\\)",
        r"not the answer \({}\)",
        "~{}",
    ),
    *(
        "{}+10^{{-20}}",
        r"{}\%",
        r"{} \quad 7",
        r"\leq={}",
        r"\textrm{{not }}{}",
        r"{}\mod 3",
        r"{}\newline 6",
        r"-({})",
    ),
)
"""Boxed, with a formula as truth."""

PAIRS = (
    ("3t", "3", "3s", r"3\text{ m}"),
    ("2c", "2", "2d"),
    (r"\frac13\pi r^2 h", r"\frac13\pi r^2", r"\frac13\pi r^2 t"),
    ("x^2 d", "x^2"),
    ("5m", "5", "5s"),
    ("3 1/2", "31/2", "15.5"),
    ("1010_2", "1010", "1010_3", "1010_{10}", "1011_2"),
    (r"x<2 \text{ or } x>3", r"x<2 \text{ and } x>3", "x<2, x>3", r"y<2 \text{ or } y>3", "2<x<3"),
    (r"-1<x \text{ and } x<3", r"-1<x \text{ or } x<3", "-1<x, x<3"),
    (r"2 \le x < 5", "[2,5]", "2<x<5", r"2\le y<5"),
    ("[2,5)", r"2\le x\le 5", "2<x<5", r"x\ge 2 \text{ or } x<5"),
    ("x>3", "3>x", r"x\ge 3", "y>3"),
    ("(2,5)", r"\{2,5\}", "[2,5]", "(2,5)'", r"(2,5)\text{ excluded}", "x=5, y=2", "(2.0000001,5)"),
    (r"\{1,2\}", "(1,2)", "[1,2]", "x=1, y=2", r"x=1 \text{ or } x=3"),
    ("(1,2,3)", r"\{1,2,3\}", "[1,2,3]"),
    ("(1,2),(3,4)", r"\{1,2\},\{3,4\}", "[1,2],[3,4]"),
    ("x^2+1=0", "0=0", "x^2+2=0", "x^2=1"),
    ("y=2x+1", "x=2y+1", "y+2x=1"),
    ("2x+1", "2X+1", "2x+1=0", "2.0000001x+1"),
    (r"15\text{ cm}^2", r"15\text{ cm}^3", r"15\text{ m}^2"),
    (r"\text{3:45 PM}", "3:45 AM", "3:46 PM"),
    ("No", "on", "not no"),
    ("odd", "ddo", r"\text{not odd}"),
    ("C", "C. D or E", "C. is wrong", "C: no, D", "C'", "C. also D", "C. Actually B", "~C", "C. maybe D", "(C)(D)"),
)
"""(a truth, what is not equal to it ...)."""


def surroundings(rng: random.Random) -> Iterator[Pair]:
    """The right answer, where it is denied, doubled or part of something else."""
    while True:
        for pattern in AROUND:
            truth = rng.choice(TRUTHS)
            yield pattern.format(rf"\boxed{{{truth}}}"), truth
        for pattern in MARKED:
            truth = str(rng.randint(2, 70))
            yield pattern.format(truth), truth


def leftovers(rng: random.Random) -> Iterator[Pair]:
    """The right answer, with something behind or before it that a parser may pass over."""
    while True:
        for pattern in NUMBERS:
            number = rng.randint(2, 70)
            yield box(pattern.format(number)), number
        for pattern in FORMULAS:
            truth = rng.choice(EXPRESSIONS)
            yield box(pattern.format(truth)), truth


def neighbours(rng: random.Random) -> Iterator[Pair]:
    """Something else in the spelling of the truth."""
    pairs = [(box(answer), truth) for truth, *answers in PAIRS for answer in answers]
    while True:
        rng.shuffle(pairs)
        yield from pairs
