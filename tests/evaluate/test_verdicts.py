"""Figures of a classifier, with their intervals: as other libraries compute them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manta.evaluate import verdicts
from manta.evaluate.verdicts import Verdicts

few = settings(deadline=None, max_examples=25)
NAMES = ("a", "b", "c")


@few
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=40))
def test_figures_are_scikit_learns(pairs: list[tuple[int, int]]) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    truth, given_ = np.array(pairs).T
    found = Verdicts(NAMES, truth, given_)
    assert (
        found.confusion.tolist()
        == metrics.confusion_matrix(truth, given_, labels=[0, 1, 2]).tolist()
    )
    assert found.accuracy.value == pytest.approx(metrics.accuracy_score(truth, given_))
    f1 = metrics.f1_score(truth, given_, average="macro", zero_division=0)
    assert found.macro_f1.value == pytest.approx(f1)
    for figure in (found.accuracy, found.macro_f1):
        assert 0 <= figure.low <= figure.high <= 1
    assert found.accuracy.low <= found.accuracy.value <= found.accuracy.high


def test_the_interval_of_macro_f1_holds_it_as_often_as_it_says() -> None:
    """Samples of a population whose macro F1 is known: about 95% of the intervals hold it."""
    rng = np.random.default_rng(1)
    cells = np.array([[0.5, 0.05], [0.1, 0.35]])
    true = (2 * 0.5 / (0.55 + 0.6) + 2 * 0.35 / (0.45 + 0.4)) / 2
    held = 0
    for _ in range(100):
        counts = rng.multinomial(200, cells.reshape(-1))
        truth, given_ = np.repeat([0, 0, 1, 1], counts), np.repeat([0, 1, 0, 1], counts)
        interval = Verdicts(("a", "b"), truth, given_).macro_f1
        held += interval.low <= true <= interval.high
    assert 88 <= held <= 100


def test_many_labels_take_no_matrix_of_all_of_them() -> None:
    names = tuple(f"label {i}" for i in range(50_000))
    truth = np.arange(0, 50_000, 100)
    found = Verdicts(names, truth, truth)
    assert found.macro_f1 == (1, 1, 1) and "confusion" not in found.record()


def test_a_difference_is_called_noise_or_not() -> None:
    truth = np.zeros(100, int)
    good, bad = truth.copy(), truth.copy()
    bad[:20] = 1
    slightly = truth.copy()
    slightly[:3] = 1
    a, b, c = (Verdicts(("x", "y"), truth, each) for each in (good, bad, slightly))
    assert "the model is better, by more than noise" in verdicts.difference(a, b, "the other")
    assert "the model is worse, by more than noise" in verdicts.difference(b, a, "the other")
    assert "the difference is within noise" in verdicts.difference(a, c, "the other")
