"""Conversations about words and small numbers, made by rule, and how well a model answers them.

They need no download, and each question has one right answer, so a small model that was fine-tuned
on them in minutes can be told from one that was not.
"""

import json
import random
from collections.abc import Callable
from typing import Any, NamedTuple

from manta import storage
from manta.config import Count, NonNegativeFloat, Seed, config
from manta.errors import ConfigError, DataError
from manta.evaluate.chat import Chat
from manta.evaluate.inference_settings import ChatConfig
from manta.model.gpt import LanguageModel
from manta.storage import HomeConfig
from manta.text.tokenizer import Tokenizer

MOST_TURNS = 3  # questions in a conversation
DRAWS = 5  # for each question that is wanted once
HELD_OUT = 7  # one in this many questions is never written, and asked of a model
LIST = (
    "apple bird boat book bread bridge candle castle chair clock cloud coat corn cup desk dog "
    "door drum eagle fern field fish flame flower forest fox garden gate glass goat grass green "
    "hand hat hill horse house island jacket key king ladder lake lamp leaf lemon light lion map "
    "market milk mirror moon mountain mouse music needle night ocean onion orange owl paint paper "
    "pear pencil piano plate pocket pond queen rabbit rain ray ring river road rock roof rope "
    "sail salt sand school sea seed shell ship shoe silver sky snow song spoon star stone storm "
    "sugar summer sun table tiger tower train tree valley violin wall water wheel whale wind "
    "window winter wolf wood"
)
WORDS = LIST.split()


class Pair(NamedTuple):
    """A question and its answer."""

    question: str
    answer: str


@config
class QuestionsConfig(HomeConfig):
    out: str | None = None
    """JSONL file to write, or s3://...; null: questions.jsonl (or held-out-questions.jsonl) in the
    home."""
    count: Count = 4000
    """Number of conversations, each of one to three questions."""
    held_out: bool = False
    """Whether to write questions that are never in such conversations, each once and with its
    answer, for jobs/judge.py."""
    seed: Seed = 0
    """Seed of the draws: the same seed gives the same file again."""


@config
class AnswersConfig(ChatConfig):
    count: Count = 200
    """Number of questions to ask, each in a conversation of its own."""
    max_tokens: Count = 200
    """Most tokens of an answer; a longer one counts as one that does not end."""
    temperature: NonNegativeFloat = 0.0
    """Sampling temperature; 0: always the likeliest token."""


class Answered(NamedTuple):
    """The numbers of answers that ended by themselves and that are right, of `asked` ones."""

    asked: int
    ended: int
    right: int

    def line(self) -> str:
        ended, right = 100 * self.ended / self.asked, 100 * self.right / self.asked
        return f"{self.asked} answers: {ended:.1f}% end by themselves, {right:.1f}% are right"


def pair(draw: random.Random) -> Pair:
    """Draws a question."""
    word, a, b = draw.choice(WORDS), draw.randint(0, 20), draw.randint(0, 20)
    low, high = sorted((a, b))
    first, second = draw.choice(("What is", "How much is")), draw.choice(("plus", "and"))
    if second == "and":
        first = "What do you get from"
    ask = draw.choice(("", "Please ", "Can you "))
    end = "?" if ask == "Can you " else "."
    kinds: list[Callable[[], Pair]] = [
        lambda: Pair(f"{first} {a} {second} {b}?", f"{a} plus {b} is {a + b}."),
        lambda: Pair(f"What is {high} minus {low}?", f"{high} minus {low} is {high - low}."),
        lambda: Pair(_sentence(f"{ask}spell {word}{end}"), "-".join(word)),
        lambda: Pair(_sentence(f"{ask}write {word} in capital letters{end}"), word.upper()),
        lambda: Pair(_sentence(f"{ask}write {word} backwards{end}"), word[::-1]),
        lambda: Pair(f"How many letters has {word}?", f"{len(word)}, as in {'-'.join(word)}."),
        lambda: Pair(f"With which letter does {word} begin?", f"It begins with {word[0]}."),
        lambda: Pair(f"With which letter does {word} end?", f"It ends with {word[-1]}."),
    ]
    return draw.choice(kinds)()


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def is_held_out(question: str) -> bool:
    """Whether a question is kept for asking, whatever the seed."""
    return sum(question.encode()) % HELD_OUT == 0


def conversations(count: int, seed: int) -> list[list[Pair]]:
    """Draws conversations without held-out questions."""
    draw = random.Random(seed)
    return [[_one(draw, False) for _ in range(draw.randint(1, MOST_TURNS))] for _ in range(count)]


def held_out(count: int, seed: int) -> list[Pair]:
    """Draws questions that no conversation has."""
    draw = random.Random(seed)
    return [_one(draw, True) for _ in range(count)]


def _one(draw: random.Random, wanted: bool) -> Pair:
    while is_held_out((found := pair(draw)).question) != wanted:
        pass
    return found


def distinct(count: int, seed: int) -> list[Pair]:
    """Draws questions that no conversation has, each once.

    Raises:
        ConfigError: there are not so many.
    """
    found = dict.fromkeys(held_out(DRAWS * count, seed))
    if len(found) < count:
        raise ConfigError(f"count={count}: give at most {len(found):,} questions that are held out")
    return list(found)[:count]


def write(c: QuestionsConfig) -> str:
    """Writes conversations as JSONL in OpenAI's form, or held-out questions; returns the file's
    path.

    Raises:
        ConfigError: there are not so many held-out questions.
        DataError: there is another file at that place.
    """
    name = "held-out-questions.jsonl" if c.held_out else "questions.jsonl"
    path = storage.absolute(c.out) if c.out else storage.join(c.home_folder, name)
    rows: list[dict[str, Any]] = []
    if c.held_out:
        rows = [{"question": q, "answer": a} for q, a in distinct(c.count, c.seed)]
    for talk in [] if c.held_out else conversations(c.count, c.seed):
        said = [text for each in talk for text in each]
        roles = ("user", "assistant") * len(talk)
        messages = [{"role": r, "content": t} for r, t in zip(roles, said, strict=True)]
        rows.append({"messages": messages})
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if storage.exists(path):
        if storage.read_bytes(path) != data:
            raise DataError(f"{path}: another file is there; choose another place with out=")
        return path
    storage.write_bytes(path, data)
    return path


def ask(model: LanguageModel, tokenizer: Tokenizer, c: AnswersConfig) -> Answered:
    """Asks a model held-out questions. Use within `inference`."""
    chat = Chat(model, tokenizer, c)
    ended = right = 0
    for question, answer in held_out(c.count, c.seed):
        chat.reset()
        found = "".join(chat.answer(question))
        ended += not chat.notes
        right += found.strip() == answer
    return Answered(c.count, ended, right)
