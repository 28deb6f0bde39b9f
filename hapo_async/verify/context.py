"""What touches an answer where it is stated: the rest of its formula and of its sentence.

An answer counts only where nothing works on its box (``-\\boxed{5}``, ``\\boxed{5}^2``, ``x > \\boxed{5}``), denies it (``not
\\boxed{5}``, ``\\boxed{5} is wrong``) or offers another one (``\\boxed{5} or 6``). What merely stands in the same sentence does
no harm: ``5 is not prime, so \\boxed{5}``. At most 300 characters on either side are read.
"""

from __future__ import annotations

import re

NEAR = 300

# What may stand between a box and what works on it. "*" and "_" are emphasis where they follow no value.
_OPENED = re.compile(
    r"(?:[\s`\"'“]|(?<![0-9A-Za-z)}])[*_]|\*\*|\$|\\[\[(,;:! ]|\\(?:q?quad|displaystyle|left|bf|large|Large|huge)(?![a-zA-Z])|"
    r"(?:\\(?:text(?:bf|it|rm)?|math(?:bf|rm|it)|bm|boldsymbol|underline|mbox|color\{[a-z]+\}|textcolor\{[a-z]+\}))?\{|\()+$"
)
_APART = re.compile(r"[\s*_`\"'“]|\\(?:[;: ]|q?quad|displaystyle)")
_TAG = re.compile(r"<[/A-Za-z_|]{1,40}>$")
_CLOSED = re.compile(
    r"(?:[\s*_`\"'”}]|\\?\$|\\[\]),;:! ]|\\(?:q?quad|right)(?![a-zA-Z])|\)|\\end\{[a-z]+\*?\})*", re.DOTALL
)

_SIGNS = "√∛∜±∓×÷·⋅½¼¾⅓⅔−"
_WORKS_COMMANDS = (
    r"\\(?:neq?|not|neg|lnot|notin|nless|ngtr|nleq|ngeq|lt|gt|sim|simeq|cdot|times|div|pm|mp|propto|sqrt|d?frac|log|ln|sin|cos|"
    r"tan|cancel|xcancel|bcancel|sout|overline|phantom|prec|succ|ll|gg|setminus|cup|cap|mid|nmid)"
)
_WORKS_BEFORE = re.compile(
    rf"(?:[\^<≠≁≯≮~¬∼≉≢∉]|(?<![-=])>|(?:[0-9)}}]|(?<![A-Za-z])[A-Za-z])\s*[-+]|(?:\\not|not|!)\s*=|\}}\s*\{{|{_WORKS_COMMANDS})$"
)
_TOUCHES_BEFORE = re.compile(
    rf"(?:[\d)\]}}^_/!+<≠≁≯≮~¬∼≉≢∉*{_SIGNS}–-]|(?<![-=])>|(?<![A-Za-z\\])[a-zA-Z]|(?:\\not|!)\s*=|\\pi|{_WORKS_COMMANDS})$"
)
_TOUCHES_AFTER = re.compile(
    rf"[\d+⁰¹²³⁴-⁹{_SIGNS}]|"
    r"\^(?!\{?\\circ)|_[{0-9]|\.[0-9]|,[0-9]{3}(?![0-9])|[a-zA-Z](?![a-zA-Z])|\*(?=[0-9a-zA-Z(])|/(?=[0-9a-zA-Z\\])|"
    r"-(?=[0-9a-zA-Z\\(])|[!'](?=\s*(?:\$|\\[\])]))|\?"
)
_WORKS_AFTER = re.compile(
    r"(?:[+²³≠]|\^(?!\{?\\circ)|[0-9]|<(?![|/a-zA-Z!])|>\s*[0-9\\]|-\s?[0-9\\(]|,\s*\$?-?[0-9.]+\$?\s*(?:[.;,]|$)|"
    rf"\\(?:lor|vee|pi|i|leq?|geq?|to|pmod|bmod)(?![a-zA-Z])|{_WORKS_COMMANDS}(?![a-zA-Z]))"
)

_FILLERS = (
    r"(?:[\s$*]+(?:be|to|equals?|the|an?|answer|exactly|simply|really|actually|just|correct|right|final|value|result|is|it|of|"
    r"[xyn]|definitely|would|number))"
)
_DENIED = re.compile(
    r"(?:\b(?:not|never|cannot|nor|neither|unlike|except|than|instead of|without|excluding|isnt|unequal|wrong|incorrect|false|"
    rf"untrue|bad|invalid|rejected|(?:anything|everything|all) but)|n['’]t){_FILLERS}{{0,5}}[\s$:*,(){{}}\\[]*$|"
    r"\b(?:no|or)[\s$*]*$",
    re.IGNORECASE,
)
_WIDENED = re.compile(r"\b(?:at (?:least|most)|over|under|above|below|between|either)[\s$:*({\\[]*$", re.IGNORECASE)
_FRAMES = re.compile(
    r"\b(?:do|does|did|would|could|can|should)(?:\s+not|n['’]t|not)\s+(?:think|believe|claim|say|suppose|mean|agree|conclude|"
    r"accept|expect|follow)\b|\b(?:cannot|never)\s+(?:say|claim|believe|conclude|accept|be)\b|"
    r"\b(?:doubt|deny|disagree)\s+(?:that|the|whether|with)\b|\bnobody\b|\bno one\b|\bno way\b|"
    r"\b(?:false|untrue|wrong|incorrect|impossible|unlikely|not (?:true|the case|correct|possible|so|clear))\s+(?:that|to say)\b",
    re.IGNORECASE,
)
_TURN = re.compile(
    r"\b(?:but|so|hence|therefore|thus|however|instead|rather|because|since|then)\b|[;,:]", re.IGNORECASE
)
_SENTENCE = re.compile(r"[.!?](?=\s)")

_ALSO = re.compile(
    r"[\s,;.]*(?:\\text\{\s*)?(?:and/or|or|nor|maybe|perhaps|possibly|alternatively)\b"
    r"(?!\s*(?:equivalently|approximately|about|roughly|simply|otherwise written|in|as|\\approx)\b)(?![^.\n]{0,60}\\f?box)",
    re.IGNORECASE,
)
_BAD_NOUN = (
    r"(?:not|n['’]t)\s+(?:the |an? |my )?(?:\w+ )?(?:answer|solution|result|correct|right|true|valid|possible|it)\b"
)
_BAD = (
    rf"(?:{_BAD_NOUN}|(?:not|n['’]t)\s*(?:[.!,;]|$)|wrong|incorrect|false|untrue|impossible|excluded|invalid|rejected|extraneous|"
    r"too (?:low|high|small|large|big))"
)
_TAKEN_BACK = re.compile(
    r"[\s,;:—–(\[-]*(?:\\text\{\s*)?(?:(?:but |and )?(?:which|that|this|it|the answer) |but |and )?(?:"
    rf"(?:is|was|are|were|be|seems|looks|(?:would|must|might|may|could) be)\s*(?:\w+\s+){{0,2}}?{_BAD}|"
    r"(?:do|does|did|ca|can|could|wo|would|must|should)\s?(?:n['’]t|not)\s+(?:work|be|hold|fit|satisfy|count|correct|solve)|"
    r"fails\b|cannot be\b|not\b(?! (?:only|just|more|less|fewer|\$?[-0-9\\]))|(?:wrong|incorrect|false|untrue|excluded)\b)",
    re.IGNORECASE,
)
_AFTERTHOUGHT = re.compile(
    r"[\s.!?$*)\]\\]*(?:Or\b|Nor\b|Wait\b|Maybe\b|Perhaps\b|Just kidding|Scratch that|Correction\b|Oops|Wrong\b|False\b|"
    r"Incorrect\b|No[,.!:;]|Not[.!]|Not (?:really|so|quite|true)|(?:It|That|This)(?: is|'s| was) (?:wrong|incorrect|false)|"
    rf"(?:It|That|This) (?:is|was)\s?{_BAD_NOUN}|Actually,? (?:it|the answer|no\b|not\b|that|\$?[-0-9\\]))"
)


def objection(text: str, start: int, end: int, is_box: bool) -> str:
    """Why the answer from ``start`` to ``end`` is no plain statement, or "". is_box: these are the ends of its box."""
    before, after = text[max(0, start - NEAR) : start], text[end : end + NEAR]
    if is_box and (reason := _formula(before, after)):
        return reason
    sentence = _SENTENCE.split(before)[-1]
    if _DENIED.search(sentence) or (not is_box and _WIDENED.search(sentence)):
        return "a denial before the answer"
    if any(not _TURN.search(sentence, frame.end()) for frame in _FRAMES.finditer(sentence)):
        return "a sentence that denies the answer"
    rest = after[_length(after) :]
    if _ALSO.match(rest):
        return "an alternative behind the answer"
    if _TAKEN_BACK.match(rest) or _AFTERTHOUGHT.match(rest):
        return "an answer that is taken back"
    return ""


def _formula(before: str, after: str) -> str:
    """What works on a box: signs and commands that touch it, or stand beside it in the same line."""
    opened = _OPENED.search(before)
    outside = _TAG.sub("", before[: opened.start()] if opened else before)
    touches = opened is None or not _APART.match(opened.group())
    if _WORKS_BEFORE.search(outside) or (touches and _TOUCHES_BEFORE.search(outside)):
        return f"{outside[-8:].strip()!r} before a box"
    if _TOUCHES_AFTER.match(after):
        return f"{after[:8]!r} behind a box"
    closed = _length(after)
    if "\n" not in after[:closed] and _WORKS_AFTER.match(after, closed):
        return f"{after[closed : closed + 8]!r} behind a box"
    return ""


def _length(after: str) -> int:
    found = _CLOSED.match(after)
    return found.end() if found else 0
