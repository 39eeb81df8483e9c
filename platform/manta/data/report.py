"""What a preparation tells a person: how much is in the dataset, and what was left out."""

from typing import Any

from manta import layout, storage
from manta.data import near
from manta.data.manifest import Manifest, NearPair, Place
from manta.data.runs import Run
from manta.data.shuffle import SPLITS
from manta.terminal import line
from manta.text import rows, sources
from manta.text.tokenizer import Tokenizer

EXCERPT = 80  # characters of an example


def near_pair(
    path: str, pair: list[Any], documents: list[Run], parts: list[sources.Part], made: Tokenizer
) -> NearPair:
    """The pair with these numbers of documents, for a person to read."""
    *both, similarity = pair
    shown = []
    for number in both:
        mine = [run for run in documents if run["split"] == near.split_of(number)]
        (part, piece, row), tokens = near.locate(path, mine, number)
        text = made.text_of(tokens[:-1][: 4 * EXCERPT].tolist())
        shown.append(Place(sources.name_of_piece(parts[part], piece), row, text[:EXCERPT]))
    return NearPair(similarity, dropped=shown[1], like=shown[0])


def examples(manifest: Manifest) -> str:
    """The line that shows near duplicates that were dropped."""
    shown = [
        f"{pair.dropped.file} row {pair.dropped.row:,} ({pair.similarity:.2f} like "
        f"{pair.like.file} row {pair.like.row:,}: {line(repr(pair.dropped.excerpt))})"
        for pair in manifest.near_pairs
    ]
    count = manifest.dropped["near_duplicate"]
    return f"dropped {count:,} near duplicates, such as {', '.join(shown)}"


def cut(manifest: Manifest) -> str:
    """The line that says how many conversations or labelled texts were cut, in which files."""
    found = manifest.cut
    how = "conversations after the last answer that fits in a row of"
    if manifest.labels:
        how = "texts at their end, to fit with their label in a row of"
    files = ", ".join(f"{path} ({count:,})" for path, count in list(found.items())[:3])
    more = f", and {len(found) - 3:,} more" if len(found) > 3 else ""
    return (
        f"cut {sum(found.values()):,} {how} {manifest.recipe['row_tokens']:,} tokens: {files}{more}"
    )


def counts(dropped: dict[str, int]) -> str:
    """Numbers of documents that were left out, with the reasons."""
    return ", ".join(f"{count:,} {kind.replace('_', ' ')}" for kind, count in dropped.items())


def summary(manifest: Manifest) -> str:
    """The quality report, for a person to read."""
    lines = []
    for split in (*SPLITS, *(["test"] if manifest.split("test") else [])):
        documents, tokens = manifest.documents(split), manifest.tokens(split)
        text_bytes = manifest.text_bytes(split)
        lines.append(
            f"{split:5}    {documents:,} documents, {tokens:,} tokens, {text_bytes:,} bytes of "
            f"text, {text_bytes / max(tokens, 1):.2f} bytes per token"
        )
    lines.append(f"dropped  {counts(manifest.dropped)} documents")
    if manifest.skipped:
        lines.append(f"left out {rows.line(manifest.skipped)}")
    if manifest.cut:
        lines.append(cut(manifest))
    for number, label in enumerate(manifest.labels):
        each = ", ".join(f"{n[number]:,} {split}" for split, n in manifest.label_counts.items())
        lines.append(f"label    {line(label)}: {each}")
    if "row_tokens" in manifest.recipe:
        tokens = sum(shard.tokens for shard in manifest.shards)
        unit = "texts" if manifest.labels else "conversations"
        filled = sum(manifest.lengths["tokens"])
        lines.append(
            f"packing  rows of {manifest.recipe['row_tokens']:,} tokens, whole {unit}, "
            f"{1 - filled / max(tokens, 1):.2%} padding"
        )
    lines.append(f"lengths  {storage.join(manifest.path, layout.LENGTHS)}")
    return "\n".join(lines)
