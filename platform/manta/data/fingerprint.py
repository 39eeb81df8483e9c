"""One number that stands for the tokens of a global batch, each in its place."""

import numpy as np

from manta.data.order import mix_bits


def fingerprint(rows: np.ndarray, first_slot: int) -> int:
    """Of rows (B, T + 1) of token ids that stand in the slots from `first_slot` on of their batch.

    The fingerprint of a batch is the sum of its rows', modulo 2^64, whoever computed them: each
    (place, token) is hashed by itself, and addition does not mind the order.
    """
    first = first_slot * rows.shape[1]
    places = np.arange(first, first + rows.size, dtype=np.uint64).reshape(rows.shape)
    tokens = (rows.astype(np.int64) + 1).astype(np.uint64)  # an id that is IGNORED is 0 here
    hashed = mix_bits((places << np.uint64(32)) | tokens)
    return int(hashed.sum(dtype=np.uint64))
