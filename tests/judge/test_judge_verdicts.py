"""What of a judge's reply is a verdict, and what is none."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manta.judge.prompts import FIRST, SECOND, TIE, for_pair, for_score, score_of, side_of
from manta.judge.questions import Question
from manta.text.conversations import Turn

QUESTION = Question((Turn("user", "How many?"),), "Two.")


@pytest.mark.parametrize(
    "form",
    [
        "{}", " {}\n", "{}.", "{}/100", "{} / 100", "{}%", "{} out of 100", "{} points",
        "Score: {}", "Score: {}.", "**Score:** {}", "**{}**", "score = {}", "The score is {}.",
        "Grade: {}/100", "Score (0-100): {}", '{{"score": {}}}', '{{"score": "{}", "why": "good"}}',
        "I would give it {} out of 100.", "{}\n\nThe answer is right.", "It is right.\n\n{}",
        "<think>Is it 3? Or 12/100?</think>\n{}", "`{}`", "My rating of this answer is {}.",
    ],
)  # fmt: skip
@given(score=st.integers(0, 100))
def test_a_score_is_read_in_the_forms_that_judges_use(form: str, score: int) -> None:
    assert score_of(form.format(score)) == score


@pytest.mark.parametrize(
    "reply",
    [
        "", " \n", "I cannot grade this.", "It is a good answer.", "-5", "101", "1000",
        "Score: 120",
        "8/10", "Score: 4/5", "between 60 and 80", "Score: 60. On reflection, score: 80.",
        "60/100 for style, 80/100 for content", "1,000", "NaN", "inf", "<html>85</html>",
        "Score: -5", "Score: ten", "1. It is right. 2. It is short.", "85 90",
        "<think>Score: 85</think>", "0x55", "85e9",
    ],
)  # fmt: skip
def test_what_may_mean_several_things_is_no_score(reply: str) -> None:
    assert score_of(reply) is None


@given(reply=st.text(max_size=40) | st.text("0123456789/.-% ScoreABtie:[]*", max_size=20))
def test_any_reply_is_a_verdict_or_none(reply: str) -> None:
    score = score_of(reply)
    assert score is None or 0 <= score <= 100
    assert side_of(reply) in (None, FIRST, SECOND, TIE)


@pytest.mark.parametrize(
    ("side", "value"), [("A", FIRST), ("B", SECOND), ("a", FIRST), ("tie", TIE), ("Tie", TIE)]
)
@pytest.mark.parametrize(
    "form",
    [
        "{}", "{}.", " {}\n", "**{}**", "[[{}]]", "Better answer: {}", "The better answer is {}.",
        "Winner: {}", "Verdict: [[{}]]", "{}\n\nIt is longer.", "Both are fine.\n\n{}",
        "<think>B? A!</think>{}", "A says two, B says one. [[{}]]",
    ],
)  # fmt: skip
def test_a_side_is_read_in_the_forms_that_judges_use(form: str, side: str, value: float) -> None:
    assert side_of(form.format(side)) == value


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("Answer A", FIRST), ("Response B.", SECOND), ("Answer B is better, it is right.", SECOND),
        ("", None), ("A good answer needs more.", None), ("A and B", None), ("I can't.", None),
        ("Answer A is better. Answer B is better.", None), ("[[A]] or [[B]]", None), ("C", None),
        ("Both", TIE), ("The better answer is a matter of taste", None),
    ],
)  # fmt: skip
def test_prose_names_a_side_or_none(reply: str, value: float | None) -> None:
    assert side_of(reply) == value


def test_a_prompt_has_the_question_the_reference_and_the_answers() -> None:
    assert "How many?" in for_score(QUESTION, "One.") and "Two." in for_score(QUESTION, "One.")
    assert "(no answer)" in for_score(QUESTION, " \n")
    pair = for_pair(QUESTION, "first {x}", "second")
    assert pair.index("first {x}") < pair.index("second")
    assert "Right answer" not in for_score(QUESTION._replace(reference=None), "One.")
