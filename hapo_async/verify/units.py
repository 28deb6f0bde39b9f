"""What may stand behind a number without changing it: units of measurement, counted things, degrees.

A unit is known, or the plural of a noun (``18 apples``): anything else that follows a number takes part in the answer.
"""

from __future__ import annotations

import re

from hapo_async.verify import refuse

_MEASURES = """
m meter meters metre metres; cm centimeter centimeters centimetre centimetres; mm millimeter millimeters; km kilometer
kilometers kilometre kilometres; in inch inches; ft foot feet; yd yard yards; mi mile miles; nm nanometer nanometers;
g gram grams; kg kilogram kilograms kilo kilos; mg milligram milligrams; lb lbs pound pounds; oz ounce ounces; ton tons tonnes;
s sec secs second seconds; min mins minute minutes; hr hrs hour hours; day days; week weeks; month months; yr yrs year years;
ms millisecond milliseconds; mph; kmh kph; rpm; L liter liters litre litres; ml mL milliliter milliliters; gal gallon gallons;
cup cups; pint pints; quart quarts; acre acres; hectare hectares; N newton newtons; J joule joules; kJ; W watt watts; kW;
kWh; V volt volts; mV; ohm ohms; Hz; kHz; MHz; Pa; kPa; atm; mol moles mole; eV; MeV; cal calories; rad radian radians;
deg degree degrees; celsius; fahrenheit; kelvin; dollar dollars USD usd bucks; cent cents; euro euros EUR; pence;
rupee rupees; yen; peso pesos; unit units
"""
_KNOWN = {word: line.split()[0] for line in _MEASURES.split(";") for word in line.split()}
_LETTERS = frozenset("mgsLJNWV")  # units of one letter, written after a space
_COUNTS = (
    "person people man men woman women child children student way apple mouse mice sheep fish deer dice feet goose geese tooth "
    "teeth integer value solution root digit element term point triangle set pair face vertex vertices edge matrices indices "
    "index am pm a.m p.m o'clock bit byte game page book box bus buses boxes dishes classes glasses passes gas"
)
_ADJUNCTS = (
    "more left total each per in all of a an the altogether square cubic sq cu whole different possible distinct remaining "
    "additional extra"
)
_PLURALS_OF_NOTHING = (
    "twos threes fours fives sixes sevens eights nines tens elevens twelves twenties hundreds thousands millions billions "
    "trillions dozens scores halves thirds quarters fourths fifths sixths sevenths eighths ninths tenths hundredths thousandths "
    "millionths percents squares cubes doubles triples powers roots reciprocals inverses opposites negatives zeros nulls ones "
    "fails works lies seems appears contradicts exceeds does goes misses varies errs excludes negates equals becomes means "
    "breaks violates loses has was less plus minus times always perhaps besides sometimes versus unless towards upwards "
    "downwards afterwards thus remains stays comes gets makes gives follows holds needs wants cancels disagrees conflicts "
    "differs rejects refutes disproves denies lacks alternatives maybes guesses overestimates underestimates overshoots "
    "undershoots approximates doubts"
)
_COUNTED = frozenset(_COUNTS.split())
_BESIDE = frozenset(_ADJUNCTS.split())
_ENDINGS = ("more", "left", "total", "in all", "in total", "each", "altogether", "remaining")
_OPEN = frozenset(("per", "in", "of", "a", "an", "the", "square", "cubic", "sq", "cu", "all"))
_NOT_COUNTED = frozenset(_PLURALS_OF_NOTHING.split())
_PLURAL = re.compile(r"[a-z]{2,}(?<![sui])s")
_BREAKS = re.compile(r"\\cdot(?![a-zA-Z])|\\[,; ]|[\s/*·~-]+")
_POWER = re.compile(r"\^?\{?(-?[1-4])\}?$")

_BRACED = r"\\text\{((?:[^{}]|\{[^{}]*\})*)\}"
_GROUP = re.compile(rf"{_BRACED}\s?(?:\^\{{?(-?[0-9]+)\}}?)?$")
_DEGREE = re.compile(r"(?:\^\s?\{?\s?\\circ\s?\}?|\\degree|°)\s*(?:\\text\{\s*([CFK])\s*\}|([CFK]))?$")
_PERCENT = re.compile(
    r"\s*(?:\\?%|\\text\{\s*(?:percent|per cent|percentage|percentage points|pct|\\?%)\s*\}|\s(?:percent|per cent))$"
)
_CURRENCY = re.compile(r"\s*(?:\\?\$|[€£¥¢₹]|\\text\{\s*[€£¥¢₹]\s*\})$")
_BARE = re.compile(
    r"(?<=[0-9})])(?:\s+[A-Za-z][A-Za-z.'-]*(?:(?:\s*/\s*|\s+)[A-Za-z][A-Za-z.'-]*){0,6}(?:\^\{?-?[0-9]\}?)?"
    r"|(?:[cmk]m|[kmM]?Hz|kg|mg|ml|mL|ft|lbs?|oz|mph|km/h|m/s|cm/s|min|hrs?|sec|kWh|mol|USD)(?:\^\{?[23]\}?)?)$"
)
_LETTERS_ONLY = re.compile(r"[A-Za-z .'/-]*")
_NO_UNITS = frozenset(("i", "j", "e", "x", "y", "z", "n", "pi"))


def split(text: str, known: str = "") -> tuple[str, str]:
    """(the value, its unit) of a clean text, unit "" where nothing is one. known: text whose words may be units as well."""
    if degree := _DEGREE.search(text):
        return text[: degree.start()].rstrip(), f"deg {degree.group(1) or degree.group(2) or ''}".strip()
    if percent := _PERCENT.search(text):
        return text[: percent.start()].rstrip(), "%"
    if sign := _CURRENCY.search(text):
        return text[: sign.start()].rstrip(), "$"
    if group := _GROUP.search(text):
        unit, power = group.group(1).strip(), group.group(2) or ""
        value = text[: group.start()].rstrip()
        if not unit.strip(" ."):
            return (value, "") if not power and value else (text, "")
        unit = f"{unit}^{power}" if power else unit
        return (value, unit) if value and is_unit(unit, known) else (text, "")
    if (words := _BARE.search(text)) and is_unit(words.group().strip(), known):
        return text[: words.start()].rstrip(), words.group().strip()
    return text, ""


def behind_formula(text: str, known: str) -> tuple[str, str]:
    """As ``split``, where a letter may be a factor and a percent sign may work on all of it."""
    value, unit = split(text, known)
    is_letter = len(unit) == 1 and not text.endswith("}")
    return (text, "") if unit in ("%", "$") or is_letter else (value, unit)


def of_truth(text: str) -> tuple[str, str]:
    """As ``split``, for a truth: any words behind it are its unit, unless they change its value."""
    value, unit = split(text)
    if unit or not (group := _GROUP.search(text)) or not group.start():
        return value, unit
    words = group.group(1).strip()
    plain = _LETTERS_ONLY.fullmatch(words) and not refuse.stop_word(words, "", refuse.UNIT_STOPS)
    return (text[: group.start()].rstrip(), words) if plain and words.lower() not in _NO_UNITS else (value, unit)


def is_unit(unit: str, known: str = "") -> bool:
    """Whether all its words are units, counted things, or ``more``, ``in all`` and the like."""
    words = [word for word in _BREAKS.split(unit) if word]
    if not words or len(words) > 5 or refuse.stop_word(unit, "", refuse.UNIT_STOPS):
        return False
    if " ".join(words) in _ENDINGS:
        return True
    is_closed = words[-1] not in _OPEN or words == ["in"]
    return is_closed and all(_is_word(word, known) or (word == "h" and len(words) > 1) for word in words)


def _is_word(text: str, known: str) -> bool:
    base = _POWER.sub("", text)
    if base != text:  # only what is measured has a square
        return base.strip(".") in _KNOWN
    word = base.strip(".")
    low = word.lower()
    if len(word) == 1:
        return word in _LETTERS or low == "a"
    if word in _KNOWN or low in _KNOWN or low in _COUNTED or low in _BESIDE:
        return True
    is_plural = low not in _NOT_COUNTED and _PLURAL.fullmatch(low) is not None
    return is_plural or (len(low) > 2 and low in known.lower().split())


def differ(one: str, other: str) -> bool:
    """Whether both are units of measurement, and different ones: ``5 cm`` is not ``5 m``, ``5 cm^2`` not ``5 cm^3``."""
    a, b = _measure(one), _measure(other)
    return bool(a and b) and not (a <= b or b <= a)


def _measure(unit: str) -> frozenset[tuple[str, str]]:
    """The known units in it with their powers; empty where a word is something else."""
    power, out = "", set()
    for word in filter(None, _BREAKS.split(unit)):
        raised = _POWER.search(word)
        base = _POWER.sub("", word).strip(".")
        low = base.lower()
        if low in ("square", "sq", "cubic", "cu"):
            power = "2" if low[0] == "s" else "3"
        elif (name := _KNOWN.get(base) or _KNOWN.get(low)) and name != "unit":
            out.add((name, raised.group(1) if raised else power or "1"))
            power = ""
        elif low not in _BESIDE:
            return frozenset()
    return frozenset(out)
