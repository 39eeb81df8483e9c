"""What a worker keeps of one run for the next changes nothing."""

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from helpers.orders import ALL, make_line
from manta.config import from_dict
from manta.data.order import Order, Phase, make_stages
from manta.model.gpt import GPT, ModelConfig
from manta.model.init import InitConfig, initialise
from manta.train.kept import MOST_FITS, Kept
from manta.train.lane import clean
from manta.train.loop import no_garbage_collection

MODEL = {
    "n_layer": 2, "n_embd": 16, "n_head": 2, "context_length": 8, "vocab_size": 12,
    "tie_embeddings": False, "qk_norm": True, "rope_theta": 1e5,
}  # fmt: skip
INIT = {"kind": "identity", "previous_tokens": 2, "induction_heads": [1], "bigram_steps": 3}


def made(kept: Kept, seed: int, order: int = 0) -> tuple[dict[str, Any], float, int]:
    """A new model's weights, the next random number, and how often pairs were counted."""
    counted: list[int] = []

    def count_pairs(size: int) -> np.ndarray:
        counted.append(size)
        return np.random.default_rng(order).integers(0, 9, (size, size)).astype(np.float32)

    stages = make_stages({}, 8, 64)
    read = Order((make_line([100, 60], 50, order),), order, 8, stages, (Phase(0, ALL),))
    reader: Any = SimpleNamespace(
        manifests=(), order=read, best_fit=False, skip_corrupt=False, count_pairs=count_pairs
    )
    c = from_dict(InitConfig, INIT)
    torch.manual_seed(seed)
    model = GPT(from_dict(ModelConfig, MODEL))
    initialise(model, c, lambda m: kept.fit(m, c, reader, 1, lambda _: None))
    return model.state_dict(), float(torch.rand(())), len(counted)


@pytest.mark.parametrize("order", [0, 1])
def test_a_model_that_begins_like_an_earlier_one_is_not_fitted_again(order: int) -> None:
    kept = Kept()
    first, again = made(kept, 1, order), made(kept, 1, order)
    assert (first[2], again[2]) == (1, 0)
    assert first[1] == again[1] == made(Kept(), 1, order)[1]
    assert all(torch.equal(first[0][name], again[0][name]) for name in first[0])
    for other in (made(kept, 2, order), made(kept, 1, order + 1)):
        assert other[2] == 1
        assert not torch.equal(other[0]["embedding.weight"], first[0]["embedding.weight"])


def test_a_few_fits_are_kept() -> None:
    kept = Kept()
    assert [made(kept, 1, order)[2] for order in range(MOST_FITS)] == [1] * MOST_FITS
    assert [made(kept, 1, order)[2] for order in range(MOST_FITS)] == [0] * MOST_FITS
    assert made(kept, 1, MOST_FITS)[2] == 1
    assert [made(kept, 1, order)[2] for order in (MOST_FITS - 1, 0)] == [0, 1]


def test_what_a_run_of_a_lane_leaves_is_freed_and_what_is_older_is_frozen() -> None:
    class Engine:
        def __init__(self) -> None:
            self.hook = self.__init__  # a cycle, as DeepSpeed's engine has some

    try:
        for _ in range(3):
            engine = Engine()
            gone = weakref.ref(engine)
            with no_garbage_collection():
                pass
            del engine
            clean()
            assert gone() is None and gc.get_freeze_count() > 1000
    finally:
        gc.unfreeze()
