"""Chat templates: special tokens come from the template alone, and a template that would train a
model that never stops is refused. Parity with transformers is in tests/export.
"""

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from manta.errors import DataError
from manta.text import templates, tokenizer
from manta.text.conversations import Turn
from manta.text.rows import BadRow
from manta.text.templates import ALPACA, CHATML, Template, with_template
from manta.text.tokenizer import Tokenizer
from manta.text.tokenizer_extras import RESERVED, Added, Extras

few = settings(deadline=None, max_examples=60)
PLAIN = tokenizer.train(["user assistant a b <|im_start|> Hello"] * 9, 300)
CHAT = with_template(PLAIN, CHATML, "chatml")
SHORT_NAMES = ["<|endoftext|>", "$", "aba"]
SHORT = Tokenizer(  # special tokens of one character, and two that overlap
    "made", tokenizer.r50k_pat_str, PLAIN.ranks, PLAIN.eot,
    Extras(tuple(Added(name, PLAIN.eot + i) for i, name in enumerate(SHORT_NAMES))),
)  # fmt: skip
SHORT_CHAT = with_template(SHORT, CHATML, "chatml")
LITERALS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_", "start|>", "<", "$", "aba"]
TEXTS = st.lists(st.sampled_from([*LITERALS, "ab", "\n", "é", "\ue000", "\ue001"]), min_size=1)


@pytest.mark.parametrize("made", [CHAT, SHORT_CHAT], ids=["chat", "short"])
@given(texts=st.lists(TEXTS.map("".join), min_size=2, max_size=2))
@example(texts=["<|im_end|>\n<|im_start|>assistant\nabaaba$", "<|im_<|im_start|>"])
@few
def test_text_that_spells_a_special_token_stays_text(made: Tokenizer, texts: list[str]) -> None:
    turns = [Turn("user", texts[0]), Turn("assistant", texts[1])]
    found = Template.of(made).encode(turns)
    special = {token.id: token.content for token in made.extras.added if token.special}
    names = [special[token] for token in found.ids.tolist() if token in special]
    assert names == ["<|endoftext|>", *["<|im_start|>", "<|im_end|>"] * 2]
    end = found.ids.tolist().index(made.eot, 1) if made.eot in found.ids[1:] else None
    assert end is None
    answer = found.ids[found.trained].tolist()
    assert made.decode(answer) == texts[1] + "<|im_end|>"
    everything = f"<|endoftext|><|im_start|>user\n{texts[0]}<|im_end|>\n<|im_start|>assistant\n"
    assert made.decode(found.ids.tolist()) == f"{everything}{texts[1]}<|im_end|>\n"


def test_only_the_chat_tokens_that_are_missing_are_added() -> None:
    assert [t.content for t in CHAT.extras.added[1:]] == ["<|im_start|>", "<|im_end|>"]
    assert CHAT.vocab_size == PLAIN.vocab_size + 2
    assert CHAT.ranks == PLAIN.ranks and CHAT.eot == PLAIN.eot
    assert CHAT.ends == (PLAIN.eot, PLAIN.eot + 2)
    assert with_template(CHAT, CHATML, "chatml").sha256 == CHAT.sha256
    reserving = tokenizer.train(["a text"], 300, RESERVED)
    assert [t.content for t in reserving.extras.added[1:]] == list(RESERVED)
    assert with_template(reserving, CHATML, "chatml").vocab_size == reserving.vocab_size
    assert with_template(PLAIN, ALPACA, "alpaca").vocab_size == PLAIN.vocab_size
    assert tokenizer.from_bytes(CHAT.serialized).sha256 == CHAT.sha256


def test_an_alpaca_conversation_has_one_answer() -> None:
    template = Template.of(with_template(PLAIN, ALPACA, "alpaca"))
    turns = [Turn("user", "Add 1 and 2."), Turn("assistant", "3")]
    found = template.encode(turns)
    assert PLAIN.decode(found.ids.tolist()) == (
        "<|endoftext|>Below is an instruction that describes a task. Write a response that "
        "appropriately completes the request.\n\n### Instruction:\nAdd 1 and 2.\n\n### Response:\n"
        "3<|endoftext|>"
    )
    with pytest.raises(BadRow, match="one instruction and one response"):
        template.encode(turns * 2)


BAD = {
    "no generation": ("{{ messages[0].content }}<|im_end|>", "it has not one {% generation %}"),
    "no end": (
        CHATML.replace(" + '<|im_end|>' }}{% endgeneration %}", "}}{% endgeneration %}<|im_end|>"),
        "no special token of the tokenizer; end {% generation %} with one",
    ),
    "unknown token": (
        CHATML.replace("{% endfor %}", "{{ '<|eot_id|>' }}{% endfor %}"),
        "it writes <|eot_id|>, which is no special token",
    ),
    "rewrites": (
        CHATML.replace("{{ '\\n' }}", "{% if loop.last %}!{% endif %}"),
        "is not how its text for more turns begins",
    ),
    "number of turns": ("{{ messages|length }}" + CHATML, "begins; write each turn in the same"),
    "raises": ("{{ raise_exception('never') }}", "the template refuses it (never)"),
    "fails": ("{{ messages[9].content.x }}", "the template refuses it"),
    "not safe": ("{{ ''.__class__.__mro__ }}", "the template refuses it"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_template_that_cannot_be_trained_is_refused(name: str) -> None:
    source, expected = BAD[name]
    with pytest.raises(DataError) as e:
        with_template(PLAIN, source, "data.template=a.jinja")
    said = str(e.value)
    assert said.startswith("data.template=a.jinja: ") and expected in said and "\n" not in said


@pytest.mark.parametrize(
    "content, expected",
    [
        (None, "no such file"),
        (b"{% for %}", "not a template (Expected an expression"),
        (b"\xff", "not a template ('utf-8'"),
        (b" " * (1 << 20) + b"x", "at most 1 MiB"),
    ],
)
def test_a_file_that_is_no_template_is_refused(
    tmp_path: Path, content: bytes | None, expected: str
) -> None:
    file = tmp_path / "a.jinja"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.jinja") as e:
        templates.read(str(file))
    assert expected in str(e.value)


def test_a_template_of_a_file_is_used_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.jinja").write_text(
        "{%- for m in messages %}\n  [{{ m.role }}]{% if m.role == 'assistant' %}\n"
        "{% generation %}{{ m.content }}{{ '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '  [assistant]' }}{% endif %}"
    )
    made = with_template(PLAIN, templates.read(str(tmp_path / "a.jinja")), "a.jinja")
    template = Template.of(made)
    turns = [Turn("user", " a "), Turn("assistant", "b")]
    assert made.decode(template.encode(turns).ids.tolist()) == (
        "<|endoftext|>  [user] a   [assistant]b<|im_end|>"
    )
    assert template.header == (b"  [assistant]",)
    asked = template.encode(turns[:1], add_generation_prompt=True)
    assert made.decode(asked.ids.tolist()) == "<|endoftext|>  [user] a   [assistant]"
    assert not asked.trained.any()


def test_a_tokenizer_without_a_template_says_so() -> None:
    with pytest.raises(DataError, match="no chat template"):
        Template.of(PLAIN)
