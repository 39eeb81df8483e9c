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
from manta.errors import ConfigError
from manta.evaluate import compare, entries, report
from manta.evaluate.differences import differences, spread
from manta.evaluate.entries import Entry, kind_of
from manta.evaluate.settings import EvaluateConfig
from manta.evaluate.suites import Scores
from manta.text import tokenizer as tokenizers
from manta.train.settings import PretrainConfig

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
    paired = two(a, b)
    assert "b - a = +0.0500 ± 0.0109 (paired, 400 documents): more than noise" in paired
    assert paired.endswith("(p < 0.0001)")
    apart = two(a, b, ("one", "two"))
    assert "± 0.0353 (unpaired): within noise (p = 0.16)" in apart
    assert apart.endswith("about 1,200 more documents of each would tell them apart")


@given(outcomes=outcomes)
@settings(deadline=None)
def test_a_run_is_not_better_than_itself(outcomes: list[int]) -> None:
    assert two(outcomes, outcomes).endswith(
        f"(paired, {len(outcomes)} documents): within noise (p = 1)"
    )


def test_one_document_says_nothing_of_others() -> None:
    assert two([0], [1]).endswith("(paired, 1 documents): no standard error is known")
    bits = [
        Entry(n, scores={"t bits_per_byte": (v, 0.0)}, each={"t bits_per_byte": ("d", [(v, 7.0)])})
        for n, v in (("a", 1.25), ("b", 2.0))
    ]
    (line,) = differences(bits)
    assert line.endswith("(paired, 1 documents): no standard error is known")


def test_chance_is_called_noise_as_often_as_it_should() -> None:
    """At most 1 time in 20; McNemar's exact test is on the safe side."""
    rng = random.Random(2)
    called = 0
    for _ in range(300):
        a, b = ([rng.randint(0, 1) for _ in range(200)] for _ in range(2))
        called += "more than noise" in two(a, b)
    assert 3 <= called <= 25


def test_so_many_more_documents_would_tell_two_runs_apart() -> None:
    """With the number that is named, four of five comparisons find the difference."""
    rng = random.Random(3)

    def outcomes_of(count: int) -> tuple[list[int], list[int]]:
        a = [int(rng.random() < 0.5) for _ in range(count)]
        return a, [int(rng.random() < (0.9 if right else 0.16)) for right in a]  # 53% right

    lines = (two(*outcomes_of(400)) for _ in range(200))
    line = next(text for text in lines if "= +0.03" in text and "more documents" in text)
    more = int(line.partition("about ")[2].partition(" more")[0].replace(",", ""))
    found = sum("more than noise" in two(*outcomes_of(400 + more)) for _ in range(60))
    assert 33 <= found <= 59


def entry_of(name: str, loss: float, kind: str) -> Entry:
    return Entry(name, facts={"val loss": loss}, kind=kind)


def test_runs_of_one_config_tell_how_far_seeds_spread() -> None:
    runs = [entry_of("a", 2.00, "x"), entry_of("a2", 2.02, "x"), entry_of("b", 2.50, "y")]
    (line,) = differences(runs)
    assert line.startswith("val loss: b - mean of a, a2 = +0.4900 ± 0.0173 (1 and 2 seeds): ")
    assert line.endswith("more than noise (p = 0.022)")
    near = [*runs[:2], entry_of("b", 2.03, "y")]
    (line,) = differences(near)
    assert "within noise (p = 0.45); about " in line and "more seeds of each would tell" in line


def test_single_runs_are_not_said_to_differ_by_more_than_chance() -> None:
    runs = [entry_of("a", 2.0, "x"), entry_of("b", 3.0, "y")]
    (line,) = differences(runs)
    assert line.startswith("val loss: how far two runs of one config differ by chance is not known")
    assert list(differences(runs, losses=False)) == [] == list(differences(runs[:1]))


def test_many_comparisons_are_one_family() -> None:
    """Eight runs that are equally good have 28 pairs, of which one looks different by chance."""
    rng, found, families = random.Random(5), 0, 20
    for _ in range(families):
        runs = []
        for name in "abcdefgh":
            pairs = [(float(rng.randint(0, 1)), 1.0) for _ in range(40)]
            score = (sum(v for v, _ in pairs) / 40, spread(pairs))
            runs.append(Entry(name, scores={"t acc": score}, each={"t acc": ("d", pairs)}))
        *lines, last = differences(runs)
        assert last == "p-values are corrected for 28 comparisons (Holm)" and len(lines) == 28
        found += any("more than noise" in line for line in lines)
    assert found <= 4


def test_a_difference_that_a_few_documents_make_is_said_to_be_one() -> None:
    values = [(1.0, 1.0)] * 60
    others = [(0.75, 1.0)] * 34 + [(1.25, 1.0)] * 20 + [(9.0 + n, 1.0) for n in range(6)]
    runs = [
        Entry(n, scores={"t nll": (sum(v for v, _ in p) / 60, 0.1)}, each={"t nll": ("d", p)})
        for n, p in (("a", values), ("b", others))
    ]
    (line,) = differences(runs)
    assert "more than noise" in line and "by ranks it is not (Wilcoxon, p = " in line


def test_the_same_run_twice_is_refused(tmp_path: Path) -> None:
    tokenizer = tokenizers.train([TEXT], 300)
    save(model_of(MODELS["llama"], tokenizer.vocab_size), tokenizer, tmp_path)
    for runs in (["run", "run"], ["run", str(tmp_path / "runs" / "run")]):
        c = from_dict(compare.CompareConfig, {"home": str(tmp_path), "runs": runs})
        with pytest.raises(ConfigError, match="are the same checkpoint"):
            compare.compare(c)


@pytest.mark.parametrize(
    ("changed", "is_kind"),
    [
        ({"name": "b", "seed": 7, "num_workers": 2}, True),
        ({"optimizer": {"lr": 0.5}}, False),
    ],
)
def test_the_kind_of_a_run_is_its_config_but_for_seed_and_name(
    changed: dict[str, Any], is_kind: bool
) -> None:
    one, two = from_dict(PretrainConfig, {}), from_dict(PretrainConfig, changed)
    assert (kind_of(one) == kind_of(two)) is is_kind


def test_published_figures_have_their_sources() -> None:
    for entry in entries.published():
        assert entry.scores and entry.sources
    rows = {entry.name: entry for entry in entries.published()}
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
    found = entries.entry("run", path, None, None).scores
    assert {key: value for key, (value, _) in found.items()} == {
        "mine acc": 0.0, "mine acc (chat)": 0.1, "mine acc (5-shot)": 0.2, "mine acc (seed-3)": 0.3,
    }  # fmt: skip
