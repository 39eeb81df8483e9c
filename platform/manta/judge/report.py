"""What was judged, as a table, sentences and JSON."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from manta.judge.answers import CUT, REFUSED, TOO_LONG, Answer
from manta.judge.statistics import Estimate, Pairs, more_questions
from manta.statistics import rounded
from manta.terminal import aligned


@dataclasses.dataclass(frozen=True)
class Judged:
    """Everything that a judge said of some models' answers."""

    judge: str
    mode: str
    repeats: int
    models: list[str]
    questions: int
    is_random: bool
    """Whether the judge may judge the same answer in another way another time."""
    scores: list[Estimate | None] = dataclasses.field(default_factory=list)
    """The mean of each model, for mode=score."""
    differences: dict[tuple[int, int], Estimate | None] = dataclasses.field(default_factory=dict)
    """The second model's mean minus the first one's, for mode=score."""
    pairs: dict[tuple[int, int], Pairs | None] = dataclasses.field(default_factory=dict)
    """The pairs of two models, for mode=pairwise."""
    problems: Counter[str] = dataclasses.field(default_factory=Counter)


def answered(models: Sequence[str], answers: Sequence[Sequence[Answer]]) -> list[str]:
    """A table of how the answers ended."""
    rows = [["answers", *models]]
    for name, begins in (
        ("ended", ""), ("cut off", CUT), ("question too long", TOO_LONG), ("refused", REFUSED),
    ):  # fmt: skip
        counts = [
            sum((a.note or "").startswith(begins) if begins else a.note is None for a in given)
            for given in answers
        ]
        if any(counts) or not begins:
            rows.append([name, *(f"{count:,}" for count in counts)])
    return aligned(rows)


def lines(found: Judged) -> Iterator[str]:
    """The table, then a sentence for each thing to know."""
    times = f", {found.repeats} times each" if found.repeats > 1 else ""
    yield f"{found.questions:,} questions, judged by {found.judge}{times}"
    yield ""
    if found.mode == "score":
        yield from _scores(found)
    else:
        for (a, b), pairs in found.pairs.items():
            yield from _pairs(found.models[a], found.models[b], pairs)
    if found.problems:
        each = ", ".join(f"{count:,} {why}" for why, count in found.problems.most_common())
        yield f"{found.problems.total():,} judgements without a verdict: {each}"


def _scores(found: Judged) -> Iterator[str]:
    known = [e for e in found.scores if e]
    rows = [["", *found.models]]
    rows.append(["score, 0 to 100", *(f"{e.mean:.2f}" if e else "-" for e in found.scores)])
    rows.append(["95% over questions", *(_interval(e) for e in found.scores)])
    if any(e.again is not None for e in known):
        rows.append(["judged again, within", *(_again(e) for e in found.scores)])
        rows.append(["the judge's share", *(_share(e) for e in found.scores)])
    if any(e.missing for e in known):
        rows.append(
            [
                "without a verdict",
                *(f"{e.missing} of {e.asked}" if e else "-" for e in found.scores),
            ]
        )
        rows.append(["if those were 0, 100", *(_bounds(e) if e else "-" for e in found.scores)])
    yield from aligned(rows)
    yield ""
    if any(e.judge_share is not None for e in known):
        yield "the judge's share is that of its noise in the variance of the mean over questions"
    elif found.is_random:
        yield "the judge's own noise is not known: repeats=2 or more measures it"
    for (a, b), difference in found.differences.items():
        names = f"{found.models[b]} - {found.models[a]}"
        if difference is None:
            yield f"{names}: no question has judgements of both"
            continue
        yield (
            f"{names} = {difference.mean:+.2f} (95% {_signed(difference)}; paired, "
            f"{difference.questions:,} questions): {verdict(difference)}"
        )
        if difference.again is not None:
            yield (
                f"the same answers judged again: {names} changes by less than "
                f"{difference.again:.2f} in 19 of 20 cases"
            )
        yield from _missing(difference, 0.0, names, "{:+.2f}")


def _pairs(a: str, b: str, found: Pairs | None) -> Iterator[str]:
    if found is None:
        yield f"{b} against {a}: no pair was judged in both orders"
        return
    share = found.share
    yield from aligned(
        [
            ["pairs, in both orders", a, b, "tie", "inconsistent", "without a verdict"],
            ["won", *map(str, (found.first, found.second, found.ties, found.inconsistent)),
             str(found.unjudged)],
        ]
    )  # fmt: skip
    yield ""
    yield (
        f"{b} wins {_percent(share)} against {a} (a tie or an inconsistent pair is half a win; "
        f"{share.questions:,} questions): {verdict(share, 0.5)}"
    )
    if share.again is not None:
        yield (
            f"the same answers judged again: {b}'s share changes by less than "
            f"{100 * share.again:.1f} points in 19 of 20 cases"
        )
    yield from _missing(share, 0.5, f"{b}'s share", "{:.1%}")
    shown = found.shown_first
    bias = "position bias" if shown.excludes(0.5) else "no position bias to be seen"
    yield f"the answer that is shown first wins {_percent(shown)}: {bias}"


def verdict(found: Estimate, value: float = 0.0) -> str:
    """Whether a mean differs from a value by more than noise, and how many more questions would
    show it."""
    if math.isnan(found.low):
        return "one question says nothing about others"
    if found.excludes(value):
        return "more than noise"
    more = more_questions(found, value)
    if more is None:
        return "within noise"
    return f"within noise (some {rounded(more):,} more questions would show it, if it is real)"


def _missing(found: Estimate, value: float, what: str, form: str) -> Iterator[str]:
    if not found.missing:
        return
    ends = f"{form.format(found.least)} to {form.format(found.most)}"
    turns = found.least <= value <= found.most and found.excludes(value)
    yield (
        f"judgements without a verdict could make {what} {ends}"
        + (", which could turn the sentence above around" if turns else "")
    )


def _interval(e: Estimate | None) -> str:
    return "-" if e is None or math.isnan(e.low) else f"{e.low:.2f} to {e.high:.2f}"


def _signed(e: Estimate) -> str:
    return "not known" if math.isnan(e.low) else f"{e.low:+.2f} to {e.high:+.2f}"


def _again(e: Estimate | None) -> str:
    return "-" if e is None or e.again is None else f"±{e.again:.2f}"


def _share(e: Estimate | None) -> str:
    return "-" if e is None or e.judge_share is None else f"{e.judge_share:.0%}"


def _bounds(e: Estimate) -> str:
    return f"{e.least:.2f} to {e.most:.2f}"


def _percent(e: Estimate) -> str:
    within = "not known" if math.isnan(e.low) else f"{e.low:.1%} to {e.high:.1%}"
    return f"{e.mean:.1%} (95% {within})"


def as_json(found: Judged, answers: Sequence[Sequence[Answer]]) -> dict[str, Any]:
    """The figures as plain values; null where a number is not known."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {k: plain(v) for k, v in vars(value).items()}
        return None if isinstance(value, float) and math.isnan(value) else value

    def named(values: dict[tuple[int, int], Any]) -> list[dict[str, Any]]:
        return [
            {"models": [found.models[a], found.models[b]], "found": plain(value)}
            for (a, b), value in values.items()
        ]

    return {
        "judged": {"judge": found.judge, "mode": found.mode, "repeats": found.repeats},
        "questions": found.questions,
        "answers": {
            name: dict(Counter((a.note or "ended").partition(" (")[0] for a in given))
            for name, given in zip(found.models, answers, strict=True)
        },
        "scores": dict(zip(found.models, map(plain, found.scores), strict=False)),
        "differences": named(found.differences),
        "pairs": named(found.pairs),
        "without a verdict": dict(found.problems),
    }
