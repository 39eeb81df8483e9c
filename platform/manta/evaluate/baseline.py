"""The classifier that a GPT has to beat: TF-IDF of words and pairs of words, logistic regression.

scikit-learn is an extra: `pip install 'manta[classify]'`.
"""

import re
from collections.abc import Sequence

import numpy as np

NAME = "TF-IDF + logistic regression"
MISSING = f"the baseline ({NAME}) is left out: pip install 'manta[classify]' brings scikit-learn"
STRENGTHS = (1.0, 10.0, 100.0)  # inverse strengths of the regularization, chosen on the val split
WORD = r"(?u)\b\w+\b"
Split = tuple[Sequence[str], np.ndarray]


def is_installed() -> bool:
    try:
        import sklearn  # noqa: F401
    except ImportError:
        return False
    return True


def labels_of(train: Split, val: Split, texts: Sequence[str], *, balanced: bool) -> np.ndarray:
    """The numbers of the labels, (N,), that the baseline gives to N texts.

    Args:
        train, val: the texts of each split, and the numbers of their labels, (M,).
        balanced: whether rare labels count more in training.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    if not any(re.search(WORD, text) for text in train[0]):  # as of signs alone
        return np.full(len(texts), np.bincount(train[1]).argmax())
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=WORD)
    seen = vectorizer.fit_transform(train[0])
    best, fewest = None, -1.0
    for strength in STRENGTHS:
        made = LogisticRegression(
            C=strength, max_iter=1000, class_weight="balanced" if balanced else None
        ).fit(seen, train[1])
        right = float((made.predict(vectorizer.transform(val[0])) == val[1]).mean())
        if right > fewest:
            best, fewest = made, right
    assert best is not None
    return best.predict(vectorizer.transform(texts))
