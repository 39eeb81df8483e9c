"""Every judgement, asked once: those that are kept already, and new ones, kept as they come."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import numpy as np

from manta.errors import DataError
from manta.evaluate.inference_settings import place_of
from manta.foreign import Finite
from manta.job import hint, hint_once
from manta.judge import prompts
from manta.judge.answers import Answer, Model, load
from manta.judge.checkpoint_judge import CheckpointJudge
from manta.judge.endpoint import Endpoint
from manta.judge.questions import Question
from manta.judge.records import Records, Row, key_of
from manta.judge.settings import JudgeConfig
from manta.model.inference import inference
from manta.terminal import line

GIVE_UP = 8  # requests that fail, before any is answered
STOP = 20  # requests in a row that fail, after some were answered
LONGEST_REPLY = 20_000  # characters that are kept
NO_VERDICT = "no verdict in the reply"
EMPTY = "an empty reply"
NOT_ASKED = "not asked, as the judge did not answer any more"


@dataclasses.dataclass(frozen=True)
class Judgement(Row):
    """A line of judgements.jsonl."""

    judge: str
    mode: str
    models: list[str]
    """The model that answered; of a pair, in the order in which the answers were shown."""
    question: str
    repeat: int
    value: Finite | None
    """0 to 100; of a pair, 1: the answer shown first is better, 0.5: a tie, 0: the other one."""
    reply: str = ""
    problem: str | None = None
    """Why there is no verdict."""
    failed: bool = False
    """Whether there was no reply: the same command asks again."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A judgement to ask for, and its place in the array of all of them."""

    key: str
    place: tuple[int, ...]
    prompt: str
    models: list[str]
    question: str
    repeat: int


def judge(
    c: JudgeConfig,
    models: Sequence[Model],
    asked: Sequence[Question],
    answers: Sequence[Sequence[Answer]],
    kept: Records[Judgement],
    begin: Callable[[int], Callable[[int], None]],
) -> tuple[str, dict[tuple[int, ...], np.ndarray], Counter[str]]:
    """Judges all answers. Returns the judge's name; the judgements, NaN where there is none; and
    the numbers of those without a verdict, by why.

    For mode=score, the judgements are {(model,): (n questions, R repeats)}; for mode=pairwise,
    {(model, other): (n, R, 2)}, with `model` shown first in order 0.

    Raises:
        ConfigError, DataError: the judge cannot be used, or none of its first requests is answered.
    """
    if c.is_endpoint:
        assert c.judge is not None
        endpoint = Endpoint(c.judge, c.endpoint)
        name = f"{endpoint.model} at {endpoint.address}"
        identity: list[Any] = [endpoint.address, endpoint.model, c.endpoint.temperature]
        ask = _by_endpoint(c, endpoint)
    else:
        assert c.judge is not None
        found = Model.of(c.judge, c.home_folder)
        name, identity = found.name, [found.digest, place_of(c)[1], c.transcript]
        ask = _by_checkpoint(c, found)
    requests = list(_requests(c, identity, models, asked, answers))
    missing = [r for r in requests if (row := kept.rows.get(r.key)) is None or row.failed]
    advance = begin(len(requests))
    advance(len(requests) - len(missing))
    answered = len(requests) - len(missing)
    failures = 0  # in a row
    for request, verdict, reply, problem, failed in ask(missing):
        kept.add([
            Judgement(
                request.key, name, c.mode, request.models, request.question, request.repeat,
                verdict, reply[:LONGEST_REPLY], problem, failed,
            )
        ])  # fmt: skip
        advance(1)
        answered, failures = answered + (not failed), failures + 1 if failed else 0
        if problem is not None and failed:
            hint_once(f"judge: {problem}")
        if failures >= GIVE_UP and not answered:
            raise DataError(
                f"judge={line(c.judge)}: none of {failures} requests was answered: {problem}"
            )
        if failures >= STOP:
            hint(f"the last {STOP} requests failed: the rest is left for the same command again")
            break
    shape = (len(asked), c.repeats) + ((2,) if c.mode == "pairwise" else ())
    size = 1 if c.mode == "score" else 2
    values = {
        pair: np.full(shape, np.nan) for pair in itertools.combinations(range(len(models)), size)
    }
    problems: Counter[str] = Counter()
    for request in requests:
        row = kept.rows.get(request.key)
        if row is None:
            problems[NOT_ASKED] += 1
        elif row.value is None:
            problems[(row.problem or NO_VERDICT).partition(" (")[0]] += 1
        else:
            values[request.place[:size]][request.place[size:]] = row.value
    return name, values, problems


def _requests(
    c: JudgeConfig,
    identity: list[Any],
    models: Sequence[Model],
    asked: Sequence[Question],
    answers: Sequence[Sequence[Answer]],
) -> Iterator[Request]:
    """Yields all judgements, question by question."""
    for index, question in enumerate(asked):
        for repeat in range(c.repeats):
            if c.mode == "score":
                for number, model in enumerate(models):
                    prompt = prompts.for_score(question, answers[number][index].text)
                    key = key_of(identity, model.digest, prompt, repeat)
                    at = (number, index, repeat)
                    yield Request(key, at, prompt, [model.name], question.text, repeat)
                continue
            for pair in itertools.combinations(range(len(models)), 2):
                for order, shown in enumerate((pair, pair[::-1])):
                    texts = [answers[number][index].text for number in shown]
                    prompt = prompts.for_pair(question, *texts)
                    digests = [models[number].digest for number in shown]
                    key = key_of(identity, digests, prompt, repeat)
                    names = [models[number].name for number in shown]
                    place = (*pair, index, repeat, order)
                    yield Request(key, place, prompt, names, question.text, repeat)


Verdict = tuple[Request, float | None, str, str | None, bool]
"""(Request, value, reply, problem, whether it failed)."""
Ask = Callable[[Sequence[Request]], Iterator[Verdict]]


def _by_endpoint(c: JudgeConfig, endpoint: Endpoint) -> Ask:
    read = prompts.score_of if c.mode == "score" else prompts.side_of

    def verdict(request: Request) -> Verdict:
        reply = endpoint.ask(request.prompt)
        if reply.text is None:
            return request, None, "", reply.error, True
        value = read(reply.text)
        problem = None
        if value is None:
            problem = NO_VERDICT if reply.text.strip() else EMPTY
        return request, value, reply.text, problem, False

    def ask(requests: Sequence[Request]) -> Iterator[Verdict]:
        """Yields verdicts as they come. A few requests wait for a thread, no more: the job may end
        early."""
        with ThreadPoolExecutor(c.endpoint.parallel, thread_name_prefix="manta-judge") as pool:
            going: set[Future[Verdict]] = set()
            for request in requests:
                if len(going) >= c.endpoint.parallel:
                    done, going = wait(going, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
                going.add(pool.submit(verdict, request))
            while going:
                done, going = wait(going, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)

    return ask


def _by_checkpoint(c: JudgeConfig, found: Model) -> Ask:
    def ask(requests: Sequence[Request]) -> Iterator[Verdict]:
        if not requests:
            return
        device, dtype = place_of(c)
        with inference(device, dtype):
            judge = CheckpointJudge(load(found, c, device, None), c.mode, dtype)
            verdicts = judge.verdicts([request.prompt for request in requests])
            for request, (value, problem) in zip(requests, verdicts, strict=True):
                yield request, value, "", problem or None, False

    return ask
