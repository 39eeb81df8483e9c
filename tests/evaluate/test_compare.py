"""Comparing runs: which differences are noise, against what statistics says of known cases."""

import math
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.checkpoints import MODELS, model_of, save
from helpers.evaluation import TEXT
from manta.config import from_dict
from manta.evaluate import compare, report
from manta.evaluate.compare import Entry, differences, spread
from manta.evaluate.settings import EvaluateConfig
from manta.evaluate.suites import Scores
from manta.text import tokenizer as tokenizers

outcomes = st.lists(st.integers(0, 1), min_size=2, max_size=200)


@given(outcomes=outcomes)
@settings(deadline=None)
def test_the_error_of_an_accuracy_is_that_of_a_mean(outcomes: list[int]) -> None:
    n = len(outcomes)
    p = sum(outcomes) / n
    expected = math.sqrt(p * (1 - p) / (n - 1))
    assert spread([(v, 1) for v in outcomes]) == pytest.approx(expected, abs=1e-12)


def test_the_error_of_bits_per_byte_is_that_of_drawing_the_documents_again() -> None:
    """The standard error is compared with the bootstrap's."""
    rng = random.Random(1)
    sizes = [rng.randint(50, 2000) for _ in range(300)]
    pairs = [(-rng.gauss(1.2, 0.3) * size, size) for size in sizes]
    found = spread(pairs, "bits_per_byte")
    drawn = []
    for _ in range(2000):
        again = rng.choices(pairs, k=len(pairs))
        drawn.append(-sum(v for v, _ in again) / sum(w for _, w in again) / math.log(2))
    mean = sum(drawn) / len(drawn)
    assert found == pytest.approx(
        math.sqrt(sum((d - mean) ** 2 for d in drawn) / len(drawn)), rel=0.1
    )


def two(a: list[int], b: list[int], documents: tuple[str, str] = ("same", "same")) -> str:
    """The line that compares two runs with these outcomes."""
    runs = []
    for name, values, digest in zip("ab", (a, b), documents, strict=True):
        pairs = [(float(v), 1.0) for v in values]
        score = (sum(values) / len(values), spread(pairs))
        each = {"task acc": (digest, pairs)}
        runs.append(Entry(name, scores={"task acc": score}, each=each))
    (line,) = differences(runs)
    return line


def test_the_same_documents_are_compared_in_pairs() -> None:
    """Half of 400 documents are hard for both runs. 20 more right answers are more than noise in
    pairs, and would be noise between different documents."""
    a = [1] * 200 + [0] * 200
    b = [1] * 220 + [0] * 180
    assert "b - a = +0.0500 ± 0.0109 (paired, 400 documents): more than noise" in two(a, b)
    assert "± 0.0353 (unpaired): within noise" in two(a, b, ("one", "two"))


@given(outcomes=outcomes)
@settings(deadline=None)
def test_a_run_is_not_better_than_itself(outcomes: list[int]) -> None:
    assert two(outcomes, outcomes).endswith(
        "(paired, " + f"{len(outcomes)} documents): within noise"
    )


def test_chance_is_called_noise_as_often_as_it_should() -> None:
    rng = random.Random(2)
    called = 0
    for _ in range(300):
        a, b = ([rng.randint(0, 1) for _ in range(200)] for _ in range(2))
        called += "more than noise" in two(a, b)
    assert 3 <= called <= 30  # one in twenty: 15


def test_published_figures_have_their_sources() -> None:
    for entry in compare.published():
        assert entry.scores and entry.sources
    rows = {entry.name: entry for entry in compare.published()}
    value, error = rows["GPT-2 124M"].scores["hellaswag acc_norm"]
    assert value == 0.3114 and error == pytest.approx(0.0046, abs=1e-4)
    assert rows["GPT-2 1558M"].scores["core"][0] == 0.2565


def test_val_losses_of_other_samples_are_not_to_be_compared() -> None:
    runs = [
        Entry(name, {"val loss": 2.0}, data=("/d/words",), sample=sample)
        for name, sample in (("a", {"x": 1280}), ("b", {"x": 1280}), ("c", {"x": 640}), ("d", {}))
    ]
    assert list(compare.other_data(runs[:2])) == []
    (line,) = compare.other_data(runs[1:])
    assert line.endswith("(b: 1,280 tokens; c: 640 tokens; d: the split's beginning)")
    assert "different samples of the val split (eval.tokens): do not compare" in line


def test_a_val_loss_of_an_earlier_step_is_not_taken_for_the_last_ones() -> None:
    """Runs that were stopped, or go on, have come further than their newest evaluation."""
    runs = [Entry("a", steps=(0, 160)), Entry("b", steps=(200, 200)), Entry("c")]
    (line,) = compare.older_losses(runs)
    assert line.endswith("(a: of step 0, not 160)")
    assert list(compare.older_losses(runs[1:])) == []


def test_scores_of_a_task_that_was_asked_in_other_ways_are_rows_of_their_own(
    tmp_path: Path,
) -> None:
    tokenizer = tokenizers.train([TEXT], 300)
    path = save(model_of(MODELS["llama"], tokenizer.vocab_size), tokenizer, tmp_path)
    ways: list[dict[str, Any]] = [{}, {"chat": True}, {"num_fewshot": 5}, {"seed": 3}]
    for number, keys in enumerate(ways):
        c = from_dict(EvaluateConfig, {"tasks": ["mine"], **keys})
        scores = Scores({"mine": {"acc": number / 10, "acc_stderr": 0.1, "samples": 4}})
        report.write(c, path, "task-mine", scores, 1.0)
    found = compare.entry("run", str(tmp_path), from_dict(compare.CompareConfig, {})).scores
    assert {key: value for key, (value, _) in found.items()} == {
        "mine acc": 0.0, "mine acc (chat)": 0.1, "mine acc (5-shot)": 0.2, "mine acc (seed-3)": 0.3,
    }  # fmt: skip
