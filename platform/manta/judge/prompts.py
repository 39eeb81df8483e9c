"""What a judge is asked, and what of its reply is a verdict.

A reply that may mean several things is no verdict: it is kept and counted.
"""

import re

from manta.judge.questions import Question

LEAST, MOST = 0.0, 100.0
FIRST, SECOND, TIE = 1.0, 0.0, 0.5  # what a verdict of a pair gives to the answer shown first

EMPTY = "(no answer)"
SCORE = (
    "Grade the answer to the question. Reply with one whole number from 0 (wrong or useless) to "
    "100 (right and complete), and nothing else.\n\n"
    "Question:\n{question}\n\n{reference}Answer:\n{answer}\n\nGrade:"
)
PAIR = (
    "Which answer to the question is better? Reply with A, B or tie, and nothing else.\n\n"
    "Question:\n{question}\n\n{reference}Answer A:\n{a}\n\nAnswer B:\n{b}\n\nBetter answer:"
)


def for_score(question: Question, answer: str) -> str:
    """Asks for the grade of an answer, 0 to 100."""
    return SCORE.format(
        question=question.text, reference=_reference(question), answer=_shown(answer)
    )


def for_pair(question: Question, a: str, b: str) -> str:
    """Asks which of two answers is better; `a` is shown first."""
    return PAIR.format(
        question=question.text, reference=_reference(question), a=_shown(a), b=_shown(b)
    )


def _reference(question: Question) -> str:
    return "" if question.reference is None else f"Right answer:\n{question.reference}\n\n"


def _shown(answer: str) -> str:
    return answer if answer.strip() else EMPTY


# --- replies -------------------------------------------------------------------------------------

# No sign, digit or point before a number, and no digit after it: 85 is not found in -85 or 1850.
_NUMBER = r"(?<![\d.,/-])(\d{1,3}(?:\.\d+)?)(?![\d]|[.,]\d)"
_OF = r"(?:\s*(?:/|out of|of)\s*(\d+)|\s*%|\s*points?)?"
_ALONE = re.compile(rf"{_NUMBER}{_OF}\s*\.?", re.IGNORECASE)
_NAMED = re.compile(
    r"\b(?:score|grade|rating)\b[\"']?(?:\s+(?:of|for)\s+(?:this|the)\s+answer)?\s*(?:\([^()]*\))?"
    rf"\s*(?:is|of|:|=)*\s*[\"']?{_NUMBER}{_OF}",
    re.IGNORECASE,
)
_OUT_OF = re.compile(rf"{_NUMBER}\s*(?:/|out of)\s*(\d+)", re.IGNORECASE)

_SIDE = r"(a|b|tie|draw|both|neither|equal)"
_LABEL = r"(?:the\s+)?(?:better\s+)?(?:answer|response|winner|verdict)?"
_SIDE_ALONE = re.compile(rf"{_LABEL}[\s:=]*\[*{_SIDE}\]*\s*\.?", re.IGNORECASE)
_BRACKETS = re.compile(rf"\[\[\s*{_SIDE}\s*\]\]", re.IGNORECASE)
_SIDE_NAMED = re.compile(
    r"\b(?:winner|verdict|better answer|better response|better)\b\s*(?:is|:|=)+\s*"
    rf"(?:answer\s+|response\s+)?{_SIDE}\b(?!\s+\w)",
    re.IGNORECASE,
)
_SIDE_IS = re.compile(
    r"\b(?:answer|response)\s+(a|b)\s+(?:is|was)\s+(?:the\s+)?(?:clearly\s+|much\s+)?"
    r"(?:better|best|correct\s+one|winner)\b",
    re.IGNORECASE,
)


def score_of(reply: str) -> float | None:
    """The score, 0 to 100, that a reply gives; None: it gives none, or several, or another scale.

    85, 85/100, Score: 85., **85**, {"score": 85} and "I would give it 85 out of 100." are scores.
    """
    text = _plain(reply)
    found = _alone(_ALONE, text) or [*_NAMED.finditer(text)] or [*_OUT_OF.finditer(text)]
    scores = {(float(match[1]), match[2] or "100") for match in found}
    if len(scores) != 1:
        return None
    ((score, scale),) = scores
    return score if int(scale) == MOST and LEAST <= score <= MOST else None


def side_of(reply: str) -> float | None:
    """What a reply gives to the answer shown first: FIRST, SECOND or TIE; None: no verdict."""
    text = _plain(reply)
    found = [*_BRACKETS.finditer(text)] or _alone(_SIDE_ALONE, text)
    found = found or [*_SIDE_NAMED.finditer(text)] or [*_SIDE_IS.finditer(text)]
    sides = {match[1].lower() for match in found}
    values = {{"a": FIRST, "b": SECOND}.get(side, TIE) for side in sides}
    return values.pop() if len(values) == 1 else None


def _alone(pattern: re.Pattern[str], text: str) -> list[re.Match[str]]:
    """The matches of the first and of the last line, if one of them is nothing else."""
    lines = text.splitlines() or [""]
    found = (pattern.fullmatch(part.strip()) for part in (lines[0], lines[-1]))
    return [match for match in found if match]


def _plain(reply: str) -> str:
    """A reply without its thoughts and its marks of Markdown."""
    after = reply.rpartition("</think>")[2]
    return re.sub(r"[*_`#]", "", after).strip()
