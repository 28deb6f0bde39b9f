"""What a policy might try on its judge, and what honest answers look like: the cases of ``tools/hostile_corpus.py``.

Every function is one class and yields (response, truth). Truths are what the hostile answer would like to be taken for.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

Pair = tuple[str, Any]
Maker = Callable[[random.Random], Iterator[Pair]]
EXPRESSIONS = ("2x+1", "x^2-4", r"\frac{x+1}{x-1}", r"p - q", r"2\sqrt{2}\,x", r"\sin^2 x", "a^2+b^2")


def box(text: str) -> str:
    return rf"So the result is \boxed{{{text}}}."


def magnitude(rng: random.Random) -> Iterator[Pair]:
    while True:
        gold, n = rng.randint(2, 99), rng.randint(2, 9)
        big = 10 ** rng.randint(4, 12)
        for text in (
            f"{n}^{{{big}}}",
            f"{n}^{{{n}^{{{big}}}}}",
            f"10^{{10^{{10^{{{n}}}}}}}",
            f"{n}**{n}**{big}",
            f"{n}^{n}^{n}^{n}",
            f"{big}!",
            f"({n}!)!!!!",
            rf"\binom{{{big}}}{{{big // 2}}}",
            f"{n}e{big}",
            f"1e-{rng.randint(10**4, 10**8)}",
            f"((({n}^{{99}})^{{99}})^{{99}})^{{99}}",
            rf"\sqrt[{big}]{{{n}}}^{{{big}}}",
            rf"e^{{e^{{e^{{{big}}}}}}}",
            rf"\log_{{{big}}} {n}^{{{big}}}",
            f"{gold}+{n}^{{-{big}}}",
        ):
            yield box(text), gold


def nesting(rng: random.Random) -> Iterator[Pair]:
    while True:
        gold, deep = rng.randint(2, 99), rng.choice((60, 200, 400, 1000))
        for opening, closing in (
            (r"\frac{1}{1+", "}"),
            ("(", ")"),
            ("{", "}"),
            (r"\sqrt{2+", "}"),
            (r"\left(", r"\right)"),
            (r"\sin(", ")"),
            ("x^{", "}"),
            ("[", "]"),
            ("-(", ")"),
            ("|", "|"),
            (r"\text{", "}"),
        ):
            yield box(opening * deep + str(gold + 1) + closing * deep), gold
        yield r"\boxed{" * deep + str(gold + 1), gold
        yield r"\sqrt" * deep + str(gold), gold


def size(rng: random.Random) -> Iterator[Pair]:
    while True:
        gold, n = rng.randint(2, 99), rng.choice((1001, 2500, 5000, 20_000))
        digits = "".join(rng.choice("0123456789") for _ in range(n))
        for text in (
            "9" + digits,
            "0." + digits,
            rf"\frac{{1{digits}}}{{7{digits}}}",
            "+".join(str(gold) for _ in range(n)),
            r"\cdot".join(f"x_{{{i}}}" for i in range(n // 4)),
            ",".join(str(i) for i in range(n // 4)),
            "-" * n + str(gold),
            "1" + "+1" * n,
        ):
            yield box(text), gold
        yield "word " * n + "no answer", gold
        yield box(str(gold)) + " bla" * 5000, gold  # an answer before the last 4 KB is none


def collections(rng: random.Random) -> Iterator[Pair]:
    while True:
        gold = rng.randint(2, 99)
        low, high = sorted(rng.sample(range(-50, 150), 2))
        items = [*rng.sample(range(100), rng.randint(2, 40)), gold]
        rng.shuffle(items)
        listed = ", ".join(map(str, items))
        cells = r" \\ ".join(" & ".join(str(rng.randint(0, 9)) for _ in range(9)) for _ in range(9))
        for text in (
            listed,
            rf"\{{{listed}\}}",
            f"({listed})",
            f"[{listed}]",
            rf"x \in \{{{listed}\}}",
            f"[{min(low, gold)}, {max(high, gold)}]",
            rf"({low}, \infty)",
            rf"[{gold}, {gold}]",
            rf"\begin{{pmatrix}} {cells} \end{{pmatrix}}",
            rf"\begin{{pmatrix}} 1 & 1 \\ 0 & 1 \end{{pmatrix}}^{{{10 ** rng.randint(3, 9)}}}",
            rf"\begin{{cases}} {gold} \\ {gold + 1} \end{{cases}}",
            r"\mathbb{R}",
            r"x \in \mathbb{Z}",
            rf"(-\infty, {gold}) \cup ({gold}, \infty)",
            rf"{gold} \cup {gold + 1}",
            rf"{low}, {low + 1}, \ldots, {high}",
            rf"\pm {gold}",
            f"{gold}; {gold + 1}",
        ):
            yield box(text), gold
        expression = rng.choice(EXPRESSIONS)
        yield box(f"{expression}, {expression}+1"), expression
        yield box(rf"\{{{expression}, 0, 1\}}"), expression


def blowup(rng: random.Random) -> Iterator[Pair]:
    while True:
        n, gold = rng.randint(30, 400), rng.choice(EXPRESSIONS)
        letters = "+".join("abcdfghkmnpqrstuvwyz"[: rng.randint(5, 20)])
        for text in (
            f"({letters})^{{{n}}}",
            rf"\frac{{({letters})^{{19}}}}{{({letters})^{{18}}}}",
            rf"\int_0^1 x^{{{n}}}\sin(x^{{{n}}})\,dx",
            rf"\sum_{{k=1}}^{{10^{{9}}}} \frac{{1}}{{k^{{{n}}}}}",
            rf"\prod_{{k=1}}^{{{n * 10**4}}} (x+k)",
            rf"\lim_{{x \to 0}} \frac{{\sin^{{{n}}} x}}{{x^{{{n}}}}}",
            "+".join(rf"\sqrt{{{rng.randint(2, 999)}+\sqrt{{x+{i}}}}}" for i in range(10)),
            r"\cdot".join(rf"(x^{{{i + 2}}}+{i}x+y^{{{i}}}+1)" for i in range(n % 8 + 5)),
            rf"\tan({'+'.join(f'{i}x' for i in range(1, 25))})",
            rf"\arctan(\arctan(\arctan({letters})))",
            f"(x+y)^{{{n}}}-(x-y)^{{{n}}}",
            rf"\sqrt[3]{{2+\sqrt{{5}}}}+\sqrt[7]{{{rng.randint(10**20, 10**30)}x}}",
        ):
            yield box(text), gold


def regexes(rng: random.Random) -> Iterator[Pair]:
    while True:
        gold, n = rng.randint(2, 99), rng.choice((500, 2000, 4000, 100_000))
        for text in (
            "answer is" + " " * n,
            "answer to" + " a" * n,
            "answer " * n,
            "\n" + " \t" * n + "A:",
            "*_#> " * n,
            "#" * n,
            "$" * n,
            r"\(" * n,
            r"\boxed" * n,
            r"\boxed{" + "{" * n,
            "A: " + "(" * n,
            "answer is\n" + "\n" * n,
            r"\boxed{" + r"\text{" * 300 + "}",
            r"\boxed{" + "1 " * 900 + "}",
            r"\boxed{" + "a" * 1900 + "=}",
            r"\boxed{" + ",".join("1" * 400) + r"\text{ x}}",
            r"\boxed{" + r"\frac" * 140 + "}",
            r"\boxed{" + " " * 1900 + "x}",
            r"\boxed{1" + " aaa" * 450 + "!}",
            r"\boxed{" + "1," * 60 + "}",
        ):
            yield text, gold


def look_alikes(rng: random.Random) -> Iterator[Pair]:
    while True:
        gold = rng.randint(100, 9999)
        text = str(gold)
        for zero in (0xFF10, 0x0660, 0x06F0, 0x0966, 0x1D7CE, 0x1D7D8, 0x2080, 0x09E6, 0x2460 - 1):
            yield box("".join(chr(zero + int(d)) for d in text)), gold
        for sign in "\u200b\u200c\u200d\u2060\ufeff\u00ad\u202e\u202d\u2066\u180e\u034f\u0338\u20d2\u0336":
            yield box(sign.join(text)), gold
            yield box(text[:-1] + sign + text[-1]), gold
        yield box("\u202e" + text[::-1]), gold
        yield box(text.replace(text[0], {"1": "l", "0": "O"}.get(text[0], "З"), 1)), gold
        yield box("\u0421"), "C"  # Cyrillic
        yield box("\uff23"), "C"  # full width
        yield box("\u2102"), "C"
        yield box("\U0001d402"), "C"
        yield box("".join(chr(0xFF10 + int(d)) for d in text) + text), gold


def control(rng: random.Random) -> Iterator[Pair]:
    while True:
        gold = rng.randint(100, 9999)
        text = str(gold)
        for byte in "\x00\x01\x02\x03\x04\x05\x06\x07\x08\x0b\x0e\x0f\x10\x1a\x1b\x1c\x1f\x7f\x80\x85\x9f":
            yield box(text[0] + byte + text[1:]), gold
            yield box(byte * 9 + str(gold + 1)), gold
        yield "\x00" * 5000, gold
        yield "\x1b[2J\x1b[H" + box(str(gold + 1)), gold
        yield box(text + "\x08" * len(text) + str(gold + 1)), gold
        yield box(text[:-1] + " " + text[-1]), gold
        yield box(" ".join(text)), gold
        yield box("\ud800" + text), gold
