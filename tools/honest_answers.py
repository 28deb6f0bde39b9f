"""What honest answers look like: the controls of ``tools/hostile_corpus.py``.

Every function is one class and yields (response, truth); the answer is right.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from hostile_cases import Pair, box


def benign(rng: random.Random) -> Iterator[Pair]:
    while True:
        yield from _numbers(rng)
        yield from _statements(rng)
        yield from _mathematics()
        yield from _spellings(rng)


def _numbers(rng: random.Random) -> Iterator[Pair]:
    n, thousands = rng.randint(-99, 999), rng.randint(1000, 99_999)
    over, under = rng.randint(1, 30) * 2 + 1, 2 ** rng.randint(1, 5)
    for text, truth in (
        (str(n), n),
        (f"{n}.0", str(n)),
        (f"x = {n}", n),
        (rf"\text{{{n}}}", str(n)),
        (rf"\$ {abs(n)}", abs(n)),
        (rf"{n}\text{{ cm}}", n),
        (rf"{n}\,\text{{m}}^2", n),
        (f"{n} apples", n),
        (f"{n} km/h", str(n)),
        (rf"{n}^\circ", n),
        (rf"{n}\%", rf"{n}\%"),
        (rf"\textbf{{(C)}}\ {n}", n),
        (f"{thousands:,}", thousands),
        (f"{thousands:,}".replace(",", "{,}"), str(thousands)),
        (f"{thousands:,}".replace(",", r"\,"), thousands),
        (f"{thousands:,}".replace(",", " "), f"{thousands:,}"),
        (rf"\frac{{{over}}}{{{under}}}", rf"\dfrac{{{over}}}{{{under}}}"),
        (f"{over}/{under}", rf"\frac{{{over}}}{{{under}}}"),
        (str(over / under), rf"\frac{{{over}}}{{{under}}}"),
        (rf"\frac{{{3 * over}}}{{{3 * under}}}", f"{over}/{under}"),
        (rf"-\frac{{{over}}}{{{under}}}", rf"\frac{{-{over}}}{{{under}}}"),
        (
            rf"{over // under}\frac{{{over % under}}}{{{under}}}" if over > under else f"{over}/{under}",
            f"{over}/{under}",
        ),
        (f"2^{{{under}}}", 2**under),
        (rf"{over} \cdot 10^3", over * 1000),
        (rf"f({under}) = {n}", n),
    ):
        yield box(text), truth


def _statements(rng: random.Random) -> Iterator[Pair]:
    """Ways of stating an answer."""
    n, other, letter = rng.randint(2, 999), rng.randint(1000, 1999), rng.choice("ABCD")
    yield rf"First \boxed{{{n}}}. Checking again: \boxed{{{n}}}.", n
    yield rf"\boxed{{{n}}} that is \boxed{{{n}.0}}", n
    yield rf"I will put it into \boxed{{}}. It is \boxed{{{n}}}", n
    yield rf"<think>Perhaps \boxed{{{other}}}? No.</think>It is \boxed{{{n}}}.", n
    yield f"<think>Perhaps {other}.</think>\n**Answer:** {n}", n
    yield f"{other} - {other - n} = {n}\n#### {n}", n
    yield f"We get {other}, minus {other - n}.\nA: {n}", n
    yield f"The final answer is ${n}$. I hope it is correct.", n
    yield f"So {n} is what we want. The answer is {n}.\n" + box(str(n)), n
    yield f"**Final Answer:** {n} dollars", n
    yield str(n), n
    yield f"The answer is ({letter}).", letter
    yield rf"\boxed{{\text{{({letter})}}}}", letter
    yield rf"\boxed{{{letter}}}", rf"\text{{({letter})}}"
    yield f"A: 1\nB: 2\nC: 3\nD: 4\nso \\boxed{{{letter}}}", letter
    yield f"{letter}. A planet of twice the mass", letter
    yield "word " * 2000 + box(str(n)), n


def _mathematics() -> Iterator[Pair]:
    for text, truth in (
        ("1+2x", "2x+1"),
        ("(x-2)(x+2)", "x^2-4"),
        (r"\dfrac{1+x}{x-1}", r"\frac{x+1}{x-1}"),
        ("-q+p", "p - q"),
        (r"\sqrt{8}", r"2\sqrt{2}"),
        (r"y = 2x + 3", "y=2x+3"),
        (r"(3, \pi/2)", r"\left( 3, \frac{\pi}{2} \right)"),
        (r"7, 5, 3", "3, 5, 7"),
        (r"\{-2, 1+\sqrt{5}, 1-\sqrt{5}\}", r"\{1\pm\sqrt{5},-2\}"),
        (r"x \in [-2, 7]", r"[-2,7]"),
        (r"[-2,7]", r"x \in [-2,7]"),
        (r"(-\infty, 2)\cup(3,\infty)", r"(-\infty, 2) \cup (3, \infty)"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
        (r"\text{evelyn}", r"\text{Evelyn}"),
        (r"e^{-x^2}", r"\frac{1}{e^{x^2}}"),
        (r"(x+1)^{20}", r"(1+x)^{20}"),
        (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"),
        (r"\binom{10}{3}", "120"),
        (r"5!", "120"),
        (r"\log_2 8", "3"),
        (r"2x+1 = 0", "2x+1=0"),
    ):
        yield box(text), truth


SPELLINGS = (
    ("3 1/2", "7/2", "3.5", r"3\frac{1}{2}", "3½"),
    ("7/2", "3 1/2"),
    ("1010_2", r"1010_{\text{two}}", "(1010)_2"),
    ("1000000", "10⁶", "1 x 10^6"),
    (r"3 \times 10^8", "3e8", "300000000"),
    (r"\frac{3}{4}", "¾", r"{3 \over 4}", r"\nicefrac{3}{4}", r"75\%"),
    ("-0.75", "–0.75", "−0.75"),
    (r"\frac{1}{3}", r"0.\bar{3}"),
    ("x^2+1", "x²+1"),
    (r"2\sqrt{3}", "2√3", r"2\sqrt{3} \text{ m}"),
    (r"(-\infty,2)\cup(3,\infty)", "(-∞,2)∪(3,∞)", r"x<2 \text{ or } x>3"),
    ("[2,5)", r"2 \le x < 5", r"2 \leq x < 5", r"x\ge 2 \text{ and } x<5"),
    ("(2,5)", "x=2, y=5", "P(2,5)", "(x,y)=(2,5)"),
    (r"\{1,2\}", "x=1, x=2", r"x = 1 \text{ or } x = 2", r"x \in \{1,2\}"),
    (r"\pm 3", r"x=3 \text{ or } x=-3"),
    ("y=2x+1", "2x+1=y", "y-2x=1", "y-2x-1=0"),
    ("3+4i", r"3+4\cdot i"),
    (r"\text{3:45 PM}", "3:45 p.m.", r"3{:}45 \text{ PM}"),
    (r"\emptyset", r"\varnothing"),
    ("C", r"(C)\ 42"),
)
"""(a truth, other ways to write it ...)."""

NUMBER_SPELLINGS = (
    *("f(-1) = {}", "f'(2) = {}", r"m\angle A = {}", r"\overline{{AB}} = {}", "a+b={}", "= {}", "{} = x", r"\({}\)"),
    *(
        "{} m",
        "{} g",
        "{}°C",
        "{}^\\circ F",
        r"{}\,\mathrm{{m/s^2}}",
        "{}€",
        "₹{}",
        r"\text{{Rs. }}{}",
        "{} units^2",
        "{} o'clock",
    ),
    *(
        "{} square units",
        "{} more apples",
        "{} in all",
        r"\large {}",
        r"\text{{Answer: }}{}",
        r"\text{{Total cost}} = {}",
    ),
)

AROUND = (
    *(
        "5 is not prime, so the answer is {}.",
        "Not 17. It is {}.",
        "The first guess was wrong, but the answer is {}.",
        "- {}",
    ),
    *(
        "{}, which is not obvious.",
        "{}. No other values work.",
        "{}!",
        "=> {}",
        "{}<|im_end|>",
        "{}\n\n2. Next",
        r"$n \ge {}$",
    ),
    *(
        r"\[ x = {} \]",
        "**{}**",
        "The answer is {}, not 17.",
        "It is {}, not more.",
        "<answer>{}</answer>",
        "Either way, the answer is {}.",
    ),
    *(
        "I do not think that it is 17, so {}.",
        "{} is the answer.",
        r"$\therefore {}$",
        "The answer is obtained so.\n{}",
    ),
)
"""Around a box that holds the truth."""


def _spellings(rng: random.Random) -> Iterator[Pair]:
    number = rng.randint(2, 999)
    for truth, *answers in SPELLINGS:
        yield box(rng.choice(answers)), truth
    for pattern in NUMBER_SPELLINGS:
        yield box(pattern.format(number)), number
    for pattern in AROUND:
        yield pattern.format(rf"\boxed{{{number}}}"), number
    yield rf"$\boxed{number % 10}$", number % 10
