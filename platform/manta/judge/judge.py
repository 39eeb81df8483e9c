"""Models answer a file of questions, and a judge scores the answers."""

import itertools
import os
import sys
from collections.abc import Callable

from manta import layout, ownership, storage
from manta.config import name_of_dataset
from manta.errors import ConfigError, DataError
from manta.job import hint
from manta.judge import answers as answering
from manta.judge import asking, report, statistics
from manta.judge.answers import Answer, Model
from manta.judge.asking import Judgement
from manta.judge.prompts import LEAST, MOST
from manta.judge.records import Records, json_file, local_folder
from manta.judge.report import Judged
from manta.judge.settings import JudgeConfig
from manta.lock import lock
from manta.progress import Progress
from manta.terminal import line

NAMES = (layout.ANSWERS, layout.JUDGEMENTS, layout.JUDGED, layout.RUN_LOCK)


def judge(c: JudgeConfig, say: Callable[[str], None]) -> None:
    """Answers, judges, says what was found line by line, and writes it to the folder (and `json`).
    What an earlier call kept is not made again.

    Raises:
        MantaError: a file, a checkpoint or the judge cannot be used, or nothing could be judged.
    """
    folder = local_folder(layout.judged_folder(c.home_folder, _name(c)))
    copy = None if c.json is None else json_file(c.json, "judged")
    models = [Model.of(name, c.home_folder) for name in c.models]
    same = {m.digest: m.name for m in models}
    if len(same) < len(models):
        raise ConfigError("checkpoint: two of them are the same checkpoint; name each model once")
    asked, chosen = answering.read(c, models)
    ownership.refuse_links(folder, NAMES)
    with lock(storage.join(folder, layout.RUN_LOCK), folder):
        kept = Records(storage.join(folder, layout.ANSWERS), Answer)
        answers = []
        with Progress("answering", len(models) * len(asked), "answers", sys.stderr) as progress:
            for model, own in zip(models, chosen, strict=True):
                answers.append(answering.answer(c, model, own, kept, progress.advance))
        names = [model.name for model in models]
        for text in report.answered([line(name) for name in names], answers):
            say(text)
        say(f"answers    {kept.path}")
        if c.judge is None:
            hint("next  the same command with judge=https://HOST/v1 or judge=CHECKPOINT")
            return
        said = Records(storage.join(folder, layout.JUDGEMENTS), Judgement)
        name, values, problems = asking.judge(
            c, models, asked, answers, said,
            lambda count: Progress("judging", count, "judgements", sys.stderr).advance,
        )  # fmt: skip
        found = Judged(name, c.mode, c.repeats, names, len(asked), c.is_endpoint, problems=problems)
        if c.mode == "score":
            found.scores.extend(
                statistics.estimate(values[(i,)], LEAST, MOST) for i in range(len(models))
            )
            for a, b in itertools.combinations(range(len(models)), 2):
                found.differences[a, b] = statistics.difference(
                    values[(a,)], values[(b,)], LEAST, MOST
                )
        else:
            for (a, b), verdicts in values.items():
                found.pairs[a, b] = statistics.pairs(verdicts)
        say(f"judgements {said.path}\n")
        for text in report.lines(found):
            say(text)
        if not any(found.scores) and not any(found.pairs.values()):
            raise DataError(
                f"judge={line(c.judge)}: nothing could be judged; {said.path} has the replies"
            )
        figures = report.as_json(found, answers)
        for path in filter(None, (storage.join(folder, layout.JUDGED), copy)):
            storage.write_json(path, figures)
            say(f"written to {path}")


def _name(c: JudgeConfig) -> str:
    """The name of the folder that keeps everything."""
    if c.name is not None:
        return c.name
    stem = os.path.splitext(c.questions.rpartition("/")[2])[0]  # noqa: PTH122 - may be s3://...
    try:
        return name_of_dataset(stem)
    except ValueError as e:
        raise ConfigError(
            f"questions={line(c.questions)}: no name for a folder ({e}); give name="
        ) from None
