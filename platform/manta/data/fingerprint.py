"""A number that identifies the tokens of a global batch, each in its place."""

import numpy as np

from manta.data.order import mix_bits


def fingerprint(rows: np.ndarray, first_slot: int) -> int:
    """The fingerprint of rows (B, T + 1) of token ids in the slots `first_slot` and up of a batch.

    The fingerprint of a whole batch is the sum of the fingerprints of its rows, modulo 2^64,
    whichever worker computed them: each (place, token) is hashed separately, and addition gives
    the same sum in any order.
    """
    first = first_slot * rows.shape[1]
    places = np.arange(first, first + rows.size, dtype=np.uint64).reshape(rows.shape)
    tokens = (rows.astype(np.int64) + 1).astype(np.uint64)  # the id IGNORED becomes 0
    hashed = mix_bits((places << np.uint64(32)) | tokens)
    return int(hashed.sum(dtype=np.uint64))
