"""Several texts that a model reads together, each with its own cache and some new tokens."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from manta.model.cache import Cache, KVCache, StateCache
from manta.model.gpt import LanguageModel
from manta.model.inference import send
from manta.model.ragged import Ragged

# The numbers of rows that products of matrices have; above the last, its multiples. One row would
# be computed in another way than two, and its result may differ in the last bit: with two at least,
# a text's logits do not depend on its company. And oneDNN keeps a kernel for each number of rows,
# all of them together some 130 MB.
ROWS = (2, 4, 8)


def padded(rows: int) -> int:
    """The number of rows, of those that are not used too, in a product for so many rows."""
    largest = ROWS[-1]
    return next((n for n in ROWS if n >= rows), -(-rows // largest) * largest)


def read(
    model: LanguageModel,
    caches: Sequence[Cache],
    new: Sequence[Sequence[int]],
    wanted: Sequence[int],
) -> Tensor:
    """Reads new tokens of texts, at least one of each, and adds them to the texts' caches.

    Args:
        caches: of one text each, of the model's kind, with room for the text's new tokens.
        new: the new ids of each text.
        wanted: for how many of its last new tokens the logits are wanted, for each text.

    Returns:
        (sum of `wanted`, V) logits, text by text. An error leaves all caches as they were.
    """
    if isinstance(caches[0], StateCache):
        return _read_states(model, cast(Sequence[StateCache], caches), new, wanted)
    counts = [len(ids) for ids in new]
    padding = padded(sum(counts)) - sum(counts)
    ragged = Ragged(cast(Sequence[KVCache], caches), counts, padding)
    ends = torch.tensor(counts).cumsum(0).tolist()
    places = [place for end, n in zip(ends, wanted, strict=True) for place in range(end - n, end)]
    ids = [id for ids in new for id in ids] + [0] * padding
    return _logits(model, [ids], ragged, places)


def _logits(
    model: LanguageModel, rows: list[list[int]], cache: Cache | Ragged, places: list[int]
) -> Tensor:
    """Computes the (P, V) logits at `places` of the tokens, counted row by row."""
    device = model.embedding.weight.device
    tokens = torch.tensor(rows)
    asked = set(places)
    others = [place for place in range(tokens.numel()) if place not in asked]
    all_places = sorted([*places, *others[: padded(len(places)) - len(places)]])
    at = torch.zeros(tokens.numel(), dtype=torch.bool)
    at[all_places] = True
    logits = model(send(tokens, device), cache=cache, at=send(at.view_as(tokens), device))
    if len(places) == len(all_places):
        return logits
    row_of = {place: row for row, place in enumerate(all_places)}
    return logits[[row_of[place] for place in places]]


def _read_states(
    model: LanguageModel,
    caches: Sequence[StateCache],
    new: Sequence[Sequence[int]],
    wanted: Sequence[int],
) -> Tensor:
    """Reads the texts that have one new token at once, and each of the others by itself: one kernel
    takes all tokens of a row."""
    single = [text for text, ids in enumerate(new) if len(ids) == 1]
    batches = [single] if single else []
    batches += [[text] for text, ids in enumerate(new) if len(ids) > 1]
    found: dict[int, Tensor] = {}
    states: list[tuple[list[int], StateCache]] = []
    for batch in batches:
        count = len(new[batch[0]])
        rows = batch + batch[:1] * (padded(len(batch)) - len(batch)) if count == 1 else batch
        state = StateCache.joined([caches[text] for text in rows])
        places = [
            (row + 1) * count - back
            for row, text in enumerate(batch)
            for back in range(wanted[text], 0, -1)
        ]
        logits = _logits(model, [list(new[text]) for text in rows], state, places)
        parts = logits.split([wanted[text] for text in batch])
        found.update(zip(batch, parts, strict=True))
        states.append((batch, state))
    for batch, state in states:
        for row, text in enumerate(batch):
            caches[text].store.copy_(state.store[:, :, row : row + 1])
            caches[text].lengths = [state.lengths[row]]
    return torch.cat([found[text] for text in range(len(new))])
