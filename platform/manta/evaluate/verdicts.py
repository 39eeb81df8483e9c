"""How well labels were given to texts: figures, with intervals and with tests of differences.

Shapes: N texts, K labels.
"""

import dataclasses
from typing import Any

import numpy as np

from manta.statistics import LEVEL, Interval, mcnemar, wilson

DRAWS = 2000  # of the bootstrap
MOST_DRAWN = 200  # labels of a confusion matrix


@dataclasses.dataclass(frozen=True, eq=False)
class Verdicts:
    """What was given to N texts: `truth` and `given` are numbers of labels, (N,)."""

    labels: tuple[str, ...]
    truth: np.ndarray
    given: np.ndarray

    @property
    def confusion(self) -> np.ndarray:
        """(K, K) numbers of texts, by label (row) and by the label that they were given."""
        size = len(self.labels)
        codes = self.truth * size + self.given
        return np.bincount(codes, minlength=size**2).reshape(size, size)

    @property
    def is_drawn(self) -> bool:
        """Whether there are few enough labels for a matrix that a person looks at."""
        return len(self.labels) <= MOST_DRAWN

    @property
    def is_right(self) -> np.ndarray:
        return self.truth == self.given

    @property
    def accuracy(self) -> Interval:
        """The share of texts that were given their label, with Wilson's interval."""
        return wilson(int(self.is_right.sum()), len(self.truth))

    @property
    def macro_f1(self) -> Interval:
        """The mean F1 of the labels that a text has or was given, with a bootstrap interval over
        texts (seeded)."""
        codes = self.truth * len(self.labels) + self.given
        cells, counts = np.unique(codes, return_counts=True)
        rng, share = np.random.default_rng(0), counts / counts.sum()
        drawn = (rng.multinomial(len(codes), share) for _ in range(DRAWS))
        low, high = np.quantile([self._macro_f1(cells, n) for n in drawn], [0.025, 0.975])
        return Interval(self._macro_f1(cells, counts), float(low), float(high))

    def _macro_f1(self, cells: np.ndarray, counts: np.ndarray) -> float:
        """The macro F1 if `counts` texts are in these cells of the confusion matrix."""
        found, there, given = self._margins(cells, counts)
        counted = there + given
        return float((2 * found / np.maximum(counted, 1)).sum() / (counted > 0).sum())

    def _margins(self, cells: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """(3, K) numbers of texts of each label: found, there, and given it."""
        truth, given = np.divmod(cells, len(self.labels))
        kept = [(truth, counts * (truth == given)), (truth, counts), (given, counts)]
        return np.stack([np.bincount(label, n, len(self.labels)) for label, n in kept])

    def each(self) -> list[dict[str, Any]]:
        """Precision, recall, F1 and texts of each label; a figure of no texts is None."""
        codes = self.truth * len(self.labels) + self.given
        found, there, given = self._margins(codes, np.ones(len(codes)))
        return [
            {
                "label": label,
                "texts": int(there[k]),
                "precision": found[k] / given[k] if given[k] else None,
                "recall": found[k] / there[k] if there[k] else None,
                "f1": 2 * found[k] / (there[k] + given[k]) if there[k] + given[k] else None,
            }
            for k, label in enumerate(self.labels)
        ]

    def record(self) -> dict[str, Any]:
        """The figures as JSON."""
        found = {
            "texts": len(self.truth),
            "accuracy": self.accuracy._asdict(),
            "macro_f1": self.macro_f1._asdict(),
            "labels": self.each(),
        }
        return found | ({"confusion": self.confusion.tolist()} if self.is_drawn else {})


def difference(a: Verdicts, b: Verdicts, b_name: str) -> str:
    """A sentence that says whether `a` is better than `b` on the same texts, or within noise."""
    better = int((a.is_right & ~b.is_right).sum())
    worse = int((~a.is_right & b.is_right).sum())
    p = mcnemar(better, worse)
    verdict = "the difference is within noise"
    if p < 1 - LEVEL:
        verdict = "better" if better > worse else "worse"
        verdict = f"the model is {verdict}, by more than noise"
    return (
        f"right where {b_name} is wrong: {better:,} texts; wrong where it is right: {worse:,}: "
        f"{verdict} (McNemar's exact test, p = {p:.2g})"
    )
