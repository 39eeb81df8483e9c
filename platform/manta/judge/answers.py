"""What each model answers to each question, generated in batches and kept."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from manta import layout, storage
from manta.errors import ConfigError, DataError
from manta.evaluate.chat import ByTemplate, ByTranscript, form_of
from manta.evaluate.inference_settings import place_of
from manta.job import hint
from manta.judge import questions as files
from manta.judge.questions import Question
from manta.judge.records import Records, Row, key_of
from manta.judge.settings import JudgeConfig
from manta.model.generate import generate_batch
from manta.model.gpt import LanguageModel
from manta.model.inference import inference
from manta.terminal import line
from manta.text import conversations, templates
from manta.text.conversations import Turn
from manta.text.rows import BadRow
from manta.text.tokenizer import Tokenizer
from manta.train.checkpoints import checkpoint

TOO_LONG = "the question is longer than the context"
REFUSED = "the chat template refuses the question"
CUT = "cut off"


@dataclasses.dataclass(frozen=True)
class Answer(Row):
    """A line of answers.jsonl."""

    model: str
    checkpoint: str
    question: str
    text: str
    tokens: int
    note: str | None = None
    """Why it is not an answer that ended by itself: TOO_LONG, REFUSED or CUT."""


@dataclasses.dataclass(frozen=True)
class Model:
    """A checkpoint that answers or judges."""

    name: str
    """The name that a person gave."""
    path: str
    digest: str
    """sha256 of the checkpoint's manifest, which has those of all its files."""
    before_input: str
    """What its chat template puts between an instruction and its input."""

    @classmethod
    def of(cls, name: str, home: str) -> "Model":
        """Raises CheckpointError if there is no such checkpoint."""
        path = checkpoint.resolve(name, home)
        template = checkpoint.load_tokenizer(path).extras.chat_template
        is_alpaca = template == templates.ALPACA
        before = conversations.ALPACA_INPUT if is_alpaca else conversations.INPUT
        return cls(name, path, storage.sha256(storage.join(path, layout.MANIFEST)), before)


@dataclasses.dataclass(frozen=True)
class Speaker:
    """A loaded model with its form of conversations; use it within `inference`."""

    model: LanguageModel
    tokenizer: Tokenizer
    form: ByTemplate | ByTranscript

    @property
    def context_length(self) -> int:
        return self.model.config.context_length


def load(found: Model, c: JudgeConfig, device: torch.device, system: str | None) -> Speaker:
    """Raises CheckpointError or DataError if the checkpoint is damaged, or its chat template cannot
    be used, and ConfigError if that has no place for `system`."""
    tokenizer = checkpoint.load_tokenizer(found.path)
    turns = [] if system is None else [Turn("system", system)]
    try:
        form = form_of(tokenizer, turns, c.transcript)
    except (ConfigError, DataError) as e:
        raise type(e)(f"{line(found.name)}: {e}") from None
    return Speaker(checkpoint.load_model(found.path, device), tokenizer, form)


def answer(
    c: JudgeConfig,
    found: Model,
    asked: Sequence[Question],
    kept: Records[Answer],
    advance: Callable[[int], None],
) -> list[Answer]:
    """The model's answer to each question: those that are kept already, and new ones, which are
    kept as each batch ends. Loads the model only if an answer is missing.

    Raises:
        MantaError: the checkpoint cannot be used, or the disk is full.
    """
    device, dtype = place_of(c)
    settings = [
        c.max_tokens, c.temperature, c.top_k, c.top_p, c.seed, c.system, c.transcript, dtype,
    ]  # fmt: skip
    keys = [key_of(found.digest, [*q.turns], *settings) for q in asked]
    missing = [i for i, key in enumerate(keys) if key not in kept.rows]
    advance(len(keys) - len(missing))
    if missing:
        speaker = load(found, c, device, c.system)
        with inference(device, dtype):
            for done in _batches(c, speaker, [(keys[i], asked[i]) for i in missing]):
                rows = [
                    Answer(key, found.name, found.path, q.text, text, tokens, note)
                    for key, q, text, tokens, note in done
                ]
                kept.add(rows)
                advance(len(rows))
    return [kept.rows[key] for key in keys]


Done = tuple[str, Question, str, int, str | None]
"""(Key, question, text, tokens, note) of an answer."""


def _batches(
    c: JudgeConfig, speaker: Speaker, asked: Sequence[tuple[str, Question]]
) -> Iterator[list[Done]]:
    """Yields the answers batch by batch; the first batch has those that cannot be given."""
    ready: list[tuple[list[int], str, Question]] = []
    never: list[Done] = []
    for key, question in asked:
        turns = list(question.turns)
        if c.system is not None and turns[0].role != "system":
            turns.insert(0, Turn("system", c.system))
        try:
            prompt = speaker.form.whole(turns)
        except BadRow as e:
            never.append((key, question, "", 0, f"{REFUSED} ({e.what})"))
            continue
        if len(prompt) > speaker.context_length:
            never.append((key, question, "", 0, TOO_LONG))
        else:
            ready.append((prompt, key, question))
    if never:
        yield never
    ready.sort(key=lambda item: len(item[0]))  # prompts of one length are read at once
    for start in range(0, len(ready), c.batch):
        batch = ready[start : start + c.batch]
        texts = _generated(c, speaker, [(prompt, int(key[:15], 16)) for prompt, key, _ in batch])
        yield [(key, q, *found) for (_, key, q), found in zip(batch, texts, strict=True)]


def _generated(
    c: JudgeConfig, speaker: Speaker, prompts: list[tuple[list[int], int]]
) -> list[tuple[str, int, str | None]]:
    """(Text, tokens, note) for each prompt, which has a seed. An answer is cut off where the
    context is full, as `generate_batch` would forget the question there."""
    tokenizer, stop = speaker.tokenizer, speaker.form.stop
    room = [min(c.max_tokens, speaker.context_length + 1 - len(p)) for p, _ in prompts]
    ids: list[list[int]] = [[] for _ in prompts]
    texts = [""] * len(prompts)
    going = set(range(len(prompts)))
    stopped: set[int] = set()
    new: dict[int, int]
    for new in generate_batch(
        speaker.model,
        [prompt for prompt, _ in prompts],
        max(room),
        seeds=[seed for _, seed in prompts],
        sampling=c.sampling(tokenizer.vocab_size),
        stop=tokenizer.ends,
    ):
        going &= new.keys()  # the others have ended
        for row in sorted(going):
            ids[row].append(new[row])
            texts[row] = tokenizer.decode(ids[row])
            if stop and stop in texts[row]:
                stopped.add(row)
            if row in stopped or len(ids[row]) == room[row]:
                going.discard(row)
        if not going:
            break
    found: list[tuple[str, int, str | None]] = []
    for row, text in enumerate(texts):
        is_cut = len(ids[row]) == room[row] and row not in stopped
        text = text.partition(stop)[0] if stop else text
        found.append((text.lstrip(speaker.form.lead), len(ids[row]), CUT if is_cut else None))
    return found


def read(c: JudgeConfig, models: Sequence[Model]) -> tuple[list[Question], list[list[Question]]]:
    """The questions for a judge, and those for each model, whose templates may differ in what is
    between an instruction and its input. Without those that are in the file twice.

    Raises:
        DataError: the file is not as expected.
    """
    plain = files.read(c.questions)
    first: dict[Any, int] = {}
    for index, question in enumerate(plain):
        first.setdefault(question.turns, index)
    if twice := len(plain) - len(first):
        hint(f"{twice:,} questions are in the file more than once, and are asked once")
    places = list(first.values())[: c.limit]
    forms = {form: files.read(c.questions, form) for form in {m.before_input for m in models}}
    chosen = [[forms[m.before_input][i] for i in places] for m in models]
    return [plain[i] for i in places], chosen
