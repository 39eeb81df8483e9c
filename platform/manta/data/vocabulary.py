"""The tokenizer of a dataset: given by its name or file, or trained on the corpus."""

from collections.abc import Iterator

from manta import layout, storage
from manta.data.recipe import BPE_VOCAB_SIZE, PrepareConfig
from manta.errors import DataError
from manta.text import rows, sources, templates, tokenizer, tokenizer_r50k
from manta.text.records import plain
from manta.text.rows import BadRows
from manta.text.tokenizer import Tokenizer
from manta.text.tokenizer_extras import RESERVED

SAMPLE_BYTES = 64 << 20  # of the corpus, on which a tokenizer is trained


def of(c: PrepareConfig, path: str, parts: list[sources.Part]) -> Tokenizer:
    """The tokenizer that the config names, saved with the dataset; `bpe` is trained on (the start
    of) the corpus. One for conversations has the chat template, and the tokens that it writes.

    Raises:
        DataError: the corpus holds no text, or the tokenizer or the template cannot be used.
    """
    file = storage.join(path, layout.ENCODING)
    if storage.exists(file):
        return tokenizer.load(file)
    if c.tokenizer == tokenizer.R50K:
        made = tokenizer_r50k.named(tokenizer.R50K, c.tokenizer_file)
    elif c.tokenizer != "bpe":
        made = tokenizer.load(storage.absolute(c.tokenizer))
    else:
        size = c.vocab_size or BPE_VOCAB_SIZE
        reserved = RESERVED if size >= tokenizer.LEAST_SIZE + len(RESERVED) else ()
        made = tokenizer.train(_sample(parts), size, reserved)
    if c.kind == "chat":
        made = templates.with_template(made, c.template_source(), f"data.template={c.template}")
    storage.write_bytes(file, made.serialized)
    return made


def _sample(parts: list[sources.Part]) -> Iterator[str]:
    size = 0
    bad = BadRows(parts[0].source.on_bad_rows)
    for part in parts:
        for text in sources.documents(part, bad):
            yield plain(part.source.kind, text)
            size += len(text)
            if size >= SAMPLE_BYTES:
                return
    if not size:
        skipped = rows.total([bad.counts])
        raise DataError(
            f"data.source={parts[0].source.location}: the corpus holds no text"
            + (f"; left out {rows.line(skipped)}" if skipped else "")
        )
