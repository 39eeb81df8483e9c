"""The suites other than perplexity and HellaSwag's own style, against scores worked out by hand;
tasks by name; and mistakes that a person may make."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.evaluation import TEXT, hellaswag_rows
from manta.config import from_dict
from manta.errors import ConfigError, DataError
from manta.evaluate import catalog, core, suites
from manta.evaluate.adapter import MantaLM, in_process
from manta.evaluate.differences import is_mean
from manta.evaluate.documents import QUICK_PIECES, continuations, read_lambada, whole_texts
from manta.evaluate.suites import run_suite, run_task
from manta.model.gpt import GPT, ModelConfig
from manta.text import tokenizer as tokenizers
from manta.text.tokenizer import Tokenizer

few = settings(deadline=None, max_examples=10)
WORDS = ["the", "cat", "dog", "ray", "bird", "went", "to", "sea", "hill", "town", "two", "wall"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tokenizers.train([TEXT], 400)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> GPT:
    """A model with random weights: its preferences are arbitrary, and good enough to compare
    with."""
    torch.manual_seed(0)
    shape = {"context_length": 256, "n_embd": 32, "n_layer": 2, "n_head": 2}
    model = GPT(from_dict(ModelConfig, {"vocab_size": tokenizer.vocab_size, **shape}))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def lm(model: GPT, tokenizer: Tokenizer) -> MantaLM:
    return in_process(model, tokenizer)


def nlls(model: GPT, tokens: list[int], start: int) -> list[tuple[float, bool]]:
    """The (loss, whether it is the likeliest) of each token from `start` on."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens[:-1]]))[0].double()
    found = logits.log_softmax(dim=-1)
    return [
        (-found[i - 1, tokens[i]].item(), int(found[i - 1].argmax()) == tokens[i])
        for i in range(start, len(tokens))
    ]


# HellaSwag in the completion style


def test_hellaswag_completion_is_the_likeliest_ending_per_token(
    lm: MantaLM, model: GPT, tokenizer: Tokenizer
) -> None:
    rows = [{**row, "label": str(row["label"])} for row in hellaswag_rows()]
    scores = run_suite(
        lm, "hellaswag", lambda task, about: rows, tokenizer=tokenizer, say=lambda task: None
    )
    assert list(scores.results) == ["hellaswag", "hellaswag_completion"]
    found = scores.results["hellaswag_completion"]
    right = right_per_token = 0
    for row in rows:
        context = tokenizer.encode(f"{row['ctx_a']} {row['ctx_b']}")
        sums, means = [], []
        for ending in row["endings"]:
            tokens = context + tokenizer.encode(f" {ending}")
            losses = [loss for loss, _ in nlls(model, tokens, len(context))]
            sums.append(sum(losses))
            means.append(sum(losses) / len(losses))
        right += sums.index(min(sums)) == int(row["label"])
        right_per_token += means.index(min(means)) == int(row["label"])
    assert found["acc"] == right / len(rows)
    assert found["acc_norm"] == right_per_token / len(rows)
    assert found["samples"] == len(rows)


# CORE


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file for each of the 22 tasks, laid out like the published ones."""
    folder = tmp_path_factory.mktemp("core")
    rng = random.Random(7)
    for task in suites.configs_of("core"):
        about = task["metadata"]
        rows: list[dict[str, Any]] = []
        for _ in range(12):
            # Choices share a beginning, which is no part of them; none is a prefix of another.
            first = sentence(rng, 1)
            choices = [f"{first} {word} {sentence(rng, 2)}" for word in rng.sample(WORDS, 3)]
            made = {
                "multiple_choice": {"query": sentence(rng, 4), "choices": choices, "gold": 1},
                "schema": {
                    "context_options": [sentence(rng, 3), sentence(rng, 4)],
                    "continuation": sentence(rng, 3),
                    "gold": 0,
                },
                "language_modeling": {
                    "context": f" {sentence(rng, 5)} ",
                    "continuation": sentence(rng, 1),
                },
            }
            rows.append(made[about["kind"]])
        file = folder / "eval_bundle" / "eval_data" / about["file"]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def from_bundle(bundle: Path, limit: int | None = None) -> Callable[..., list[Any]]:
    return lambda task, about: core.documents(str(bundle), about, limit)


def by_hand(about: dict[str, Any], file: Path, model: GPT, tokenizer: Tokenizer) -> float:
    """The accuracy, computed one prompt after the other."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    random.Random(1337).shuffle(rows)
    right = 0
    for index, row in enumerate(rows):
        rest = [i for i in range(len(rows)) if i != index]
        examples = [rows[i] for i in random.Random(1234 + index).sample(rest, about["shots"])]
        gap = about["delimiter"]

        def text(row: dict[str, Any], number: int, gap: str = gap) -> str:
            if about["kind"] == "multiple_choice":
                return str(row["query"] + gap + row["choices"][number])
            if about["kind"] == "schema":
                return str(row["context_options"][number] + gap + row["continuation"])
            return str(row["context"].strip() + gap + row["continuation"])

        start = "".join(text(e, e.get("gold", 0)) + "\n\n" for e in examples)
        if about["kind"] == "language_modeling":
            context = (row["context"].strip() + gap).rstrip()
            before = [tokenizer.eot, *tokenizer.encode(start + context)]
            tokens = [tokenizer.eot, *tokenizer.encode(start + text(row, 0))]
            assert tokens[: len(before)] == before
            right += all(greedy for _, greedy in nlls(model, tokens, len(before)))
            continue
        count = len(row.get("choices", row.get("context_options")))
        prompts = [[tokenizer.eot, *tokenizer.encode(start + text(row, i))] for i in range(count)]
        means = []
        for prompt in prompts:
            if about["kind"] == "multiple_choice":
                shortest = range(min(map(len, prompts)))
                first = next(i for i in shortest if len({p[i] for p in prompts}) > 1)
            else:
                lengths = range(1, min(map(len, prompts)) + 1)
                ends = [n for n in lengths if len({tuple(p[-n:]) for p in prompts}) == 1]
                first = len(prompt) - max(ends)
            losses = [loss for loss, _ in nlls(model, prompt, first)]
            means.append(sum(losses) / len(losses))
        right += means.index(min(means)) == row["gold"]
    return right / len(rows)


def test_core_is_the_mean_of_22_centred_accuracies(
    lm: MantaLM, model: GPT, tokenizer: Tokenizer, bundle: Path
) -> None:
    """Each accuracy is worked out by hand, with the same examples drawn for each row."""
    found = run_suite(
        lm, "core", from_bundle(bundle), tokenizer=tokenizer, say=lambda task: None
    ).results
    centred = []
    for task in suites.configs_of("core"):
        about, name = task["metadata"], task["task"]
        file = bundle / "eval_bundle" / "eval_data" / about["file"]
        assert found[name]["acc"] == by_hand(about, file, model, tokenizer), name
        chance = about["chance"] / 100
        centred.append((found[name]["acc"] - chance) / (1 - chance))
    assert len(centred) == 22
    assert found["core"]["core"] == pytest.approx(sum(centred) / 22)
    assert found["core"]["core_stderr"] > 0
    assert any(values.get("acc") not in (0, 1) for values in found.values())


def test_of_a_limited_core_examples_are_drawn_from_what_is_left(bundle: Path) -> None:
    about = next(g["metadata"] for g in suites.configs_of("core") if g["metadata"]["shots"] == 10)
    assert len(core.documents(str(bundle), about, 11)) == 11
    with pytest.raises(
        DataError, match="10 rows, but each needs 10 others as examples: raise limit="
    ):
        core.documents(str(bundle), about, 10)


def test_a_missing_or_wrong_file_of_core_is_named(bundle: Path, tmp_path: Path) -> None:
    about = suites.configs_of("core")[0]["metadata"]
    with pytest.raises(DataError, match=r"needs evals.data_dir=DIR; download .*eval_bundle.zip"):
        core.documents(None, about, None)
    with pytest.raises(DataError, match=f"has no eval_bundle/eval_data/{about['file']}"):
        core.documents(str(tmp_path), about, None)
    file = tmp_path / about["file"]
    file.parent.mkdir()
    file.write_text('{"query": "a", "choices": ["b"], "gold": 0}\n{"query": "a"}\n')
    with pytest.raises(DataError, match=r"line 2: not a row of CORE .*each has query, choices"):
        core.documents(str(tmp_path), about, None)


# LAMBADA


def test_lambada_is_the_last_word(lm: MantaLM, model: GPT, tokenizer: Tokenizer) -> None:
    rng = random.Random(3)
    rows = [{"text": sentence(rng, 12)} for _ in range(9)]
    found = run_suite(lm, "lambada", lambda task, about: rows, say=lambda task: None).results[
        "lambada"
    ]
    total, right = 0.0, 0
    for row in rows:
        begin, _, word = row["text"].rpartition(" ")
        context = tokenizer.encode(begin)
        losses = nlls(model, context + tokenizer.encode(f" {word}"), len(context))
        total += sum(loss for loss, _ in losses)
        right += all(greedy for _, greedy in losses)
    assert found["acc"] == right / len(rows)
    assert found["perplexity"] == pytest.approx(torch.tensor(total / len(rows)).exp().item())


@pytest.mark.parametrize("bad", ["{", '{"text": "word"}', '{"texts": "a b"}', "[]"])
def test_a_wrong_row_of_lambada_is_named_by_its_line(tmp_path: Path, bad: str) -> None:
    file = tmp_path / "lambada.jsonl"
    file.write_text('{"text": "two words"}\n' + bad)
    with pytest.raises(DataError, match="line 2: not a row of LAMBADA "):
        read_lambada(str(file))


# quick


@given(length=st.integers(8, 40), size=st.integers(200, 3000))
@few
def test_a_continuation_is_of_its_own_text(tokenizer: Tokenizer, length: int, size: int) -> None:
    texts = [TEXT[:size], TEXT[size : size + 900]]
    found = continuations(texts, tokenizer, length)
    assert 0 < len(found) <= QUICK_PIECES
    for document in found:
        assert len(set(document["endings"])) == 4
        own = document["beginning"] + document["endings"][document["label"]]
        assert any(own in text for text in texts)
    assert found == continuations(texts, tokenizer, length)


def test_too_short_a_text_for_continuations_is_said_so(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"has 1 pieces of 16 tokens, but needs 4"):
        continuations([tokenizer.decode(tokenizer.encode(TEXT)[:30])], tokenizer, 16)


@given(most=st.integers(1, 400))
@few
def test_perplexity_of_a_beginning_is_of_so_many_tokens(tokenizer: Tokenizer, most: int) -> None:
    texts = TEXT.splitlines()[:40]
    found = whole_texts(texts, tokenizer, most)
    assert 0 < sum(document["num_tokens"] for document in found) <= most
    whole = [document["text"] for document in found[:-1]]
    assert whole == texts[: len(whole)]
    assert texts[len(whole)].startswith(found[-1]["text"])


def test_quick_runs_both_of_its_tasks(lm: MantaLM, tokenizer: Tokenizer) -> None:
    made = {
        "quick_perplexity": whole_texts([TEXT], tokenizer, 500),
        "quick_continuation": continuations([TEXT], tokenizer, 32),
    }
    scores = run_suite(lm, "quick", lambda task, about: made[task], say=lambda task: None)
    assert scores.results["quick_continuation"]["samples"] == len(made["quick_continuation"])
    assert 0 <= scores.results["quick_continuation"]["acc"] <= 1
    assert scores.results["quick_perplexity"]["bits_per_byte"] > 0


# What each document adds


@pytest.mark.parametrize("suite", ["hellaswag", "quick"])
def test_what_each_document_adds_makes_up_the_score(
    lm: MantaLM, tokenizer: Tokenizer, suite: str
) -> None:
    rows = [{**row, "label": str(row["label"])} for row in hellaswag_rows()]
    made = {
        "quick_perplexity": whole_texts(TEXT.splitlines()[:9], tokenizer, None),
        "quick_continuation": continuations([TEXT], tokenizer, 32),
    }
    scores = run_suite(
        lm,
        suite,
        lambda task, about: made.get(task, rows),
        tokenizer=tokenizer,
        say=lambda task: None,
    )
    for task, values in scores.results.items():
        for metric, value in values.items():
            pairs = scores.each[task].get(metric)
            if pairs is not None:
                assert len(pairs) == values["samples"]
                assert is_mean(pairs, metric, value) == ("perplexity" not in metric)


def test_documents_are_the_same_whatever_the_tokenizer(lm: MantaLM, tokenizer: Tokenizer) -> None:
    def digest(extra: int) -> Any:
        rows = [{"text": t, "num_tokens": 5 + extra} for t in TEXT.splitlines()[:3]]
        return run_suite(lm, "perplexity", lambda task, about: rows, say=lambda task: None).each[
            "perplexity"
        ]["documents"]

    assert digest(0) == digest(1)


# Tasks by name


@pytest.fixture(scope="module")
def data_sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ARC as it is downloaded from the hub: a card that names the configs, and their files."""
    folder = tmp_path_factory.mktemp("data")
    arc = folder / "allenai" / "ai2_arc"
    arc.mkdir(parents=True)
    rng = random.Random(5)
    card = ["---", "configs:"]
    for name in ("ARC-Easy", "ARC-Challenge"):
        card += [f"- config_name: {name}", "  data_files:"]
        for split in ("train", "validation", "test"):
            labels = ["A", "B", "C", "D"]
            rows = [
                {
                    "id": f"{split}-{i}",
                    "question": sentence(rng, 6),
                    "choices": {"text": [sentence(rng, 2) for _ in labels], "label": labels},
                    "answerKey": rng.choice(labels),
                }
                for i in range(8)
            ]
            file = arc / name / f"{split}.jsonl"
            file.parent.mkdir(exist_ok=True)
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            card += [f"  - split: {split}", f"    path: {name}/{split}.jsonl"]
    (arc / "README.md").write_text("\n".join([*card, "---", ""]))
    return folder


def test_a_task_or_a_tag_of_lm_evals_runs_by_its_name(lm: MantaLM, data_sets: Path) -> None:
    one = run_task(lm, "arc_easy", data_dir=str(data_sets)).results
    assert list(one) == ["arc_easy"] and one["arc_easy"]["samples"] == 8
    assert {"acc", "acc_norm", "acc_stderr"} <= one["arc_easy"].keys()
    both = run_task(lm, "ai2_arc", data_dir=str(data_sets)).results
    assert set(both) == {"arc_easy", "arc_challenge"} and both["arc_easy"] == one["arc_easy"]
    shots = run_task(lm, "arc_easy", limit=3, num_fewshot=2, data_dir=str(data_sets)).results
    assert shots["arc_easy"]["samples"] == 3
    words = r"arc_easy: num_fewshot=50 examples before each question, and there are \d documents"
    with pytest.raises(DataError, match=words):
        run_task(lm, "arc_easy", num_fewshot=50, data_dir=str(data_sets))


def test_a_data_set_that_is_not_there_is_said_with_what_to_download(
    lm: MantaLM, data_sets: Path
) -> None:
    with pytest.raises(DataError, match=r"piqa: its data set is not at .*/baber/piqa; .*`hf down"):
        run_task(lm, "piqa", data_dir=str(data_sets))


def test_a_data_set_without_documents_is_said_so(lm: MantaLM, tmp_path: Path) -> None:
    folder = tmp_path / "Rowan" / "hellaswag"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text("")
    with pytest.raises(DataError, match="hellaswag: "):
        run_task(lm, "hellaswag", data_dir=str(tmp_path))
    with pytest.raises(DataError, match="suite=hellaswag: hellaswag has no documents"):
        run_suite(lm, "hellaswag", lambda task, about: [], say=lambda task: None)


def test_a_task_with_a_typo_is_refused_with_the_nearest_names() -> None:
    def nothing(task: str, about: Any) -> None:
        raise AssertionError

    with pytest.raises(ConfigError, match=r"tasks=arc_eazy: .*did you mean .*arc_easy"):
        suites.check((), ["arc_eazy"], nothing)
    with pytest.raises(
        ConfigError, match=r"tasks=qqqqqqqq: lm-eval has no such task, group or tag"
    ):
        suites.check((), ["qqqqqqqq"], nothing)
    suites.check((), ["arc_easy", "mmlu"], nothing)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("task: mine\n", "metadata"),
        ("metadata: {version: 1.0}\n", "task"),
        ("group: mine\nmetadata: {version: 1.0}\n", "task"),
        ("group: mine\ntask:\n- task: one\n  metadata: {version: 1.0}\n- task: two\n", "metadata"),
    ],
)
def test_a_suite_without_what_a_task_needs_is_named(
    text: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    monkeypatch.setattr(catalog, "FOLDER", tmp_path)
    with pytest.raises(ConfigError, match=rf"mine\.yaml: .* has no {key}: add {key}: "):
        suites.configs_of("mine")


def test_every_suite_is_read() -> None:
    for name in catalog.names():
        assert all(given["task"] and given["metadata"] for given in suites.configs_of(name))
