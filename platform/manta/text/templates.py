"""Chat templates: conversations to text with special tokens, and to ids with a mask, in Jinja.

A template is what transformers' `apply_chat_template` takes: it writes `messages`, and marks what
is trained with {% generation %}. Special tokens are only those that the template writes. A person's
text that spells one stays text: before rendering, its first character is replaced by one that is
in no text, and put back after the rendering has been split at its special tokens.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jinja2
import numpy as np
from jinja2 import ext, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from manta import foreign, storage
from manta.errors import DataError
from manta.text.conversations import Turn
from manta.text.rows import BadRow
from manta.text.tokenizer import Tokenizer
from manta.text.tokenizer_extras import CHAT_TOKENS, Added, Extras, nfc

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
ALPACA = (
    "{% set turns = messages[1:] if messages[0]['role'] == 'system' else messages %}"
    "{% if turns|length > 2 %}"
    "{{ raise_exception('the Alpaca form has one instruction and one response') }}"
    "{% endif %}"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}"
    "{% else %}{{ 'Below is an instruction that describes a task. Write a response that "
    "appropriately completes the request.' }}{% endif %}"
    "{{ '\\n\\n### Instruction:\\n' + turns[0]['content'] }}"
    "{% if turns|length == 2 %}{{ '\\n\\n### Response:\\n' }}"
    "{% generation %}{{ turns[1]['content'] + eos_token }}{% endgeneration %}"
    "{% elif add_generation_prompt %}{{ '\\n\\n### Response:\\n' }}{% endif %}"
)
Ids = dict[str, int | list[int]]  # `Extras.ids`
NAMED = {"chatml": CHATML, "alpaca": ALPACA}
UNKNOWN = re.compile(r"<\|[^|<>\s]+\|>")
MOST_BYTES = 1 << 20  # of a template's file
PROBE = ["Be brief.", "Which colour?", "It is red.", "Why so?", "Nobody knows."]
# The characters that Unicode leaves to everybody: markers are taken from those that no text has.
PRIVATE = (*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE))


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
    """A conversation as ids (T,), and whether each is trained, (T,) bool."""

    ids: np.ndarray
    trained: np.ndarray


def read(name: str) -> str:
    """The source of a template: `chatml`, `alpaca`, or a file.

    Raises:
        DataError: the file is missing, not UTF-8 or no template.
    """
    if name in NAMED:
        return NAMED[name]
    path = storage.absolute(name)
    data = foreign.read_bytes(path, DataError)
    if len(data) > MOST_BYTES:
        raise DataError(f"data.template={name}: {len(data):,} bytes; a template has at most 1 MiB")
    try:
        source = data.decode()
        _compiled(source)
    except (UnicodeDecodeError, jinja2.TemplateError) as e:
        reason = foreign.line(str(e))
        raise DataError(f"data.template={name}: not a template ({reason}); fix the file") from None
    return source


# --- rendering -----------------------------------------------------------------------------------


class _Generation(ext.Extension):
    """The block {% generation %}: puts its text between two markers."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own name and type

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        names = ("generation_opens", "generation_closes")
        markers: list[nodes.Expr] = [nodes.Name(name, "load") for name in names]
        return nodes.CallBlock(self.call_method("_marked", markers), [], [], body).set_lineno(line)

    def _marked(self, opens: str, closes: str, caller: Any) -> str:
        return f"{opens}{caller()}{closes}"


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    return environment.from_string(source)


def _to_json(value: Any, **options: Any) -> str:
    import json

    return json.dumps(value, **{"ensure_ascii": False, **options})


class Template:
    """A chat template for one tokenizer.

    Raises:
        DataError: the tokenizer lacks a token of the template, or the template does not train the
            token that ends an answer, or does not preserve prefixes.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, where: str = "the chat template"):
        self.source, self.tokenizer, self._where = source, tokenizer, where
        added = tokenizer.extras.added
        self._ids = {token.content: token.id for token in added if token.special}
        spelled = sorted(map(re.escape, self._ids), key=len, reverse=True)
        self._special = re.compile("|".join(spelled))
        self._firsts = sorted({name[0] for name in self._ids})
        self._spelled = re.compile(f"(?={self._special.pattern}).", re.DOTALL)
        content = {token.id: token.content for token in added}
        self._names = {
            "bos_token": content[tokenizer.start], "eos_token": content[tokenizer.eot],
            **tokenizer.extras.names,
        }  # fmt: skip
        self.header, self.end = self._check()

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Template":
        """The template that is saved with a tokenizer. Raises DataError if there is none."""
        source = tokenizer.extras.chat_template
        if not isinstance(source, str):
            raise DataError("the tokenizer has no chat template, or several; prepare with one")
        return cls(source, tokenizer)

    def encode(self, turns: Sequence[Turn], add_generation_prompt: bool = False) -> Encoded:
        """The ids of a conversation, from the token on that opens it.

        With `add_generation_prompt`, they end where an answer begins.

        Raises:
            BadRow: the template refuses the conversation, or ends it in the middle.
        """
        ids: list[np.ndarray] = []
        mask: list[np.ndarray] = []
        start = self.tokenizer.start
        for part, marks in self._parts(turns, add_generation_prompt):
            if isinstance(part, int):
                ids.append(np.array([part], self.tokenizer.dtype))
                mask.append(np.array([bool(marks)]))
            else:
                ids.append(self.tokenizer.encode_array(part))
                mask.append(self._overlapping(part, ids[-1], marks))
        if not ids or ids[0][:1].tolist() != [start]:
            ids.insert(0, np.array([start], self.tokenizer.dtype))
            mask.insert(0, np.array([False]))
        found = Encoded(np.concatenate(ids), np.concatenate(mask))
        if (found.ids[1:-1] == start).any():
            raise BadRow(
                "refused by the template",
                "the template opens a document in the middle of the conversation",
                "give another data.template",
            )
        return found

    def parts(
        self, turns: Sequence[Turn], add_generation_prompt: bool = False, goes_on: bool = False
    ) -> list[int | str]:
        """A conversation as ids of special tokens and the texts between them. With `goes_on`, it
        ends within the last turn, after its content, as transformers' `continue_final_message`.

        Raises:
            BadRow: the template refuses the conversation.
        """
        if not goes_on:
            return [part for part, _ in self._parts(turns, add_generation_prompt)]
        said = "".join(turn.content for turn in turns) + self.source
        mark = next(character for character in map(chr, PRIVATE) if character not in said)
        last = Turn(turns[-1].role, f"{turns[-1].content}{mark} ")
        found: list[int | str] = []
        for part, _ in self._parts([*turns[:-1], last], False):
            if isinstance(part, str) and mark in part:
                text, _, after = part.partition(mark)
                # A template that takes off white space at the end does so before the mark too.
                return [*found, text if after.startswith(" ") else text.rstrip()]
            found.append(part)
        raise BadRow(
            "refused by the template",
            "the template does not write the answer that has begun",
            "give another data.template",
        )

    def _rendered(
        self, turns: Sequence[Turn], add_generation_prompt: bool = False
    ) -> tuple[str, str, str, dict[int, str]]:
        """Returns the text of a conversation; the characters that mark where a trained part begins,
        and where it ends; and the characters that others stand for."""
        said = "".join(turn.content for turn in turns) + self.source
        unused = (character for character in map(chr, PRIVATE) if character not in said)
        opens, closes, *others = itertools.islice(unused, 2 + len(self._firsts))
        hidden = dict(zip(self._firsts, others, strict=True))
        messages = [
            {
                "role": turn.role,
                "content": self._spelled.sub(lambda found: hidden[found[0]], turn.content),
            }
            for turn in turns
        ]
        try:
            text = _compiled(self.source).render(
                messages=messages, add_generation_prompt=add_generation_prompt,
                generation_opens=opens, generation_closes=closes, **self._names,
            )  # fmt: skip
        except Exception as e:  # a template can raise anything that an expression can
            raise BadRow(
                "refused by the template",
                f"the template refuses it ({foreign.line(str(e))})",
                "fix the row or give another data.template",
            ) from None
        return text, opens, closes, {ord(other): first for first, other in hidden.items()}

    def _parts(
        self, turns: Sequence[Turn], add_generation_prompt: bool
    ) -> Iterator[tuple[int | str, list[tuple[int, int]]]]:
        """Yields ids of special tokens and the texts between, each with the ranges of characters in
        it that are trained."""
        text, opens, closes, shown = self._rendered(turns, add_generation_prompt)
        pieces = re.split(f"({self._special.pattern}|{opens}|{closes})", text)
        held, marks, began = "", list[tuple[int, int]](), None
        for piece in pieces:
            if piece in (opens, closes):
                if began is not None:
                    marks.append((began, len(held)))
                began = len(held) if piece == opens else None
            elif piece in self._ids:
                if held:
                    yield held, [*marks, *([(began, len(held))] if began is not None else [])]
                yield self._ids[piece], [(0, 1)] if began is not None else []
                held, marks, began = "", [], None if began is None else 0
            else:
                held += piece.translate(shown)
        if held:
            yield held, [*marks, *([(began, len(held))] if began is not None else [])]

    def _overlapping(self, text: str, ids: np.ndarray, marks: list[tuple[int, int]]) -> np.ndarray:
        """Whether each token of a text has a byte of one of these ranges of characters."""
        found = np.zeros(len(ids), dtype=bool)
        if marks == [(0, len(text))]:
            return ~found
        if marks:
            decode = self.tokenizer.tiktoken.decode_single_token_bytes
            ends = np.cumsum([len(decode(token)) for token in ids.tolist()])
            starts = np.concatenate([[0], ends[:-1]])
            for first, last in marks:
                start, stop = (self._size(text[:at]) for at in (first, last))
                found |= (ends > start) & (starts < stop)
        return found

    def _size(self, text: str) -> int:
        normal = nfc(text) if self.tokenizer.extras.normalization else text
        return len(normal.encode().translate(None, self.tokenizer.lacking))

    # --- what a template must do -----------------------------------------------------------------

    def _check(self) -> tuple[tuple[int | bytes, ...], int]:
        """Returns what is before an answer (`data.conversations.Rule`), and the id at its end."""
        roles = ("system", *("user", "assistant") * 2)
        turns = [Turn(role, content) for role, content in zip(roles, PROBE, strict=True)]
        longest = 0
        problem = ""
        for last in (5, 3):  # some templates have one answer
            for first in (0, 1):  # some refuse a system's turn
                try:
                    self._check_prefixes(turns[first:last])
                    longest = longest or last
                except BadRow as e:
                    problem = e.what
        if not longest:
            raise DataError(f"{self._where}: {problem}; give another data.template")
        text, opens, closes, _ = self._rendered(turns[1:3])
        for unknown in UNKNOWN.findall(text):
            if unknown not in self._ids:
                raise DataError(
                    f"{self._where}: it writes {unknown}, which is no special token of the "
                    "tokenizer; give another data.template, or a tokenizer that has it"
                )
        before = text.partition(PROBE[1])[2].partition(opens)[0]
        inside, _, after = text.partition(opens)[2].partition(closes)
        if opens not in text or closes in after:
            raise DataError(
                f"{self._where}: it has not one {{% generation %}} around each answer; add it, as "
                "nothing would be trained without it"
            )
        ends = [*self._special.finditer(inside)]
        if not ends or ends[-1].end() != len(inside):
            raise DataError(
                f"{self._where}: the trained part of an answer ends with "
                f"{foreign.line(repr(inside[-24:]))}, which is no special token of the tokenizer; "
                "end {% generation %} with one, as a model that is never trained to end never stops"
            )
        header = self._header(before)
        if not header:
            raise DataError(f"{self._where}: it writes nothing between a question and its answer")
        return header, self._ids[ends[-1][0]]

    def _check_prefixes(self, turns: list[Turn]) -> None:
        """Raises DataError unless the text of some turns begins the text of more turns."""

        def text(count: int, prompt: bool = False) -> str:
            found, opens, closes, _ = self._rendered(turns[:count], prompt)
            return found.replace(opens, "").replace(closes, "")

        whole = text(len(turns))
        for count in range(1, len(turns)):
            if turns[count - 1].role == "system":
                continue
            for prompt in {False, turns[count].role == "assistant"}:
                if not whole.startswith(text(count, prompt)):
                    raise DataError(
                        f"{self._where}: its text for {count} turns"
                        + (" and the start of an answer" if prompt else "")
                        + " is not how its text for more turns begins; write each turn in the same "
                        "way whatever follows"
                    )

    def _header(self, text: str) -> tuple[int | bytes, ...]:
        first = self._special.search(text)
        pieces = re.split(f"({self._special.pattern})", text[first.start() if first else 0 :])
        return tuple(self._ids.get(piece, piece.encode()) for piece in pieces if piece)


# --- tokenizers ----------------------------------------------------------------------------------


def with_template(tokenizer: Tokenizer, source: str, where: str) -> Tokenizer:
    """The tokenizer with a chat template, and with the chat tokens that the template writes.

    New tokens get the next ids; all others stay the same. Generation then ends at the template's
    end token too.

    Raises:
        DataError: the template cannot be used (`Template`).
    """
    extras = tokenizer.extras
    there = {token.content for token in extras.added}
    lacking = [name for name in CHAT_TOKENS if name in source and name not in there]
    new = [Added(name, tokenizer.vocab_size + i) for i, name in enumerate(lacking)]
    added = (*extras.added, *new)
    name = f"{tokenizer.name}-chat" if new else tokenizer.name
    changed = dataclasses.replace(extras, added=added, chat_template=source)
    made = _with(tokenizer, name, changed)
    end = Template(source, made, where).end
    if end in made.ends:
        return made
    ends = dataclasses.replace(
        changed,
        ends=tuple(sorted((*extras.ends, end))),
        ids=_with_end(extras.ids, end),
        generation_ids=_with_end(extras.generation_ids, end),
    )
    return _with(made, name, ends)


def _with_end(ids: Ids, end: int) -> Ids:
    """The ids of a published model's config, in which generation ends at one more token."""
    if "eos_token_id" not in ids:
        return ids
    there = ids["eos_token_id"]
    return {**ids, "eos_token_id": [*([there] if isinstance(there, int) else there), end]}


def _with(tokenizer: Tokenizer, name: str, extras: Extras) -> Tokenizer:
    return Tokenizer(name, tokenizer.pattern, tokenizer.ranks, tokenizer.eot, extras)
