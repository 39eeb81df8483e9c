"""Evaluation against lm-eval's own adapter for transformers, and against sums done by hand."""

import base64
import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from helpers.evaluation import TEXT, hellaswag_rows
from helpers.models import gpt2_weights, with_weights
from manta.config import from_dict
from manta.evaluate.report import table
from manta.evaluate.suites import Results, run_suite
from manta.model.gpt import GPT, ModelConfig
from manta.text import tokenizer as tokenizers
from manta.text.tokenizer import Tokenizer
from manta.text.tokenizer_extras import END_OF_TEXT

CONTEXT = 40
few = settings(deadline=None, max_examples=10)
# Words that split into tokens in different ways; in the last two a letter is several tokens.
WORDS = ["The", "cat", "dug.", "number 17", "shrimps", "wall.\n", "'s", "  ", "naïve", "日本"]
texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=60).map(" ".join)


class Pair(NamedTuple):
    """The same weights and the same tokenizer twice."""

    ours: Any
    """MantaLM"""
    theirs: Any
    """lm-eval's HFLM"""
    model: GPT
    tokenizer: Tokenizer


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A GPT-2 of transformers, trained until it knows the habits of the text, saved, and read by
    both."""
    from lm_eval.models.huggingface import HFLM
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    from manta.evaluate.adapter import in_process

    folder = tmp_path_factory.mktemp("hugging-face")
    tokenizer = tokenizers.train([TEXT], 400)
    PreTrainedTokenizerFast(
        tokenizer_object=byte_level_bpe(tokenizer), eos_token=END_OF_TEXT
    ).save_pretrained(folder)
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=tokenizer.vocab_size,
            n_positions=CONTEXT,
            n_embd=48,
            n_layer=2,
            n_head=2,
            bos_token_id=tokenizer.eot,
            eos_token_id=tokenizer.eot,
        )
    )
    overfit(theirs, tokenizer)
    theirs.save_pretrained(folder)
    c = from_dict(
        ModelConfig,
        {
            "family": "gpt2",
            "vocab_size": tokenizer.vocab_size,
            "context_length": CONTEXT,
            "n_embd": 48,
            "n_layer": 2,
            "n_head": 2,
        },
    )
    model = with_weights(c, gpt2_weights(theirs))
    return Pair(
        in_process(model, tokenizer),
        HFLM(
            pretrained=str(folder),
            device="cpu",
            dtype="float32",
            batch_size=4,
            add_bos_token=False,
        ),
        model,
        tokenizer,
    )


def byte_level_bpe(tokenizer: Tokenizer) -> Any:
    """Our encoding as a tokenizer of Hugging Face's `tokenizers`, made from what ours saves."""
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as FastTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    saved = json.loads(tokenizer.serialized)
    character = bytes_to_unicode()
    names = ["".join(map(character.get, base64.b64decode(token))) for token in saved["tokens"]]
    ranks = {name: rank for rank, name in enumerate(names)}
    merges = [
        (name[:cut], name[cut:])
        for name in names
        for cut in range(1, len(name))
        if name[:cut] in ranks and name[cut:] in ranks
    ]
    made = FastTokenizer(models.BPE(vocab=ranks, merges=merges, ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(saved["pattern"]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False, special=True)])
    assert made.token_to_id(END_OF_TEXT) == tokenizer.eot
    return made


def overfit(model: Any, tokenizer: Tokenizer, steps: int = 120) -> None:
    line = torch.tensor(
        [t for text in TEXT.splitlines() for t in (tokenizer.eot, *tokenizer.encode(text))]
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    random = torch.Generator().manual_seed(0)
    for _ in range(steps):
        starts = torch.randint(len(line) - CONTEXT, (8,), generator=random)
        tokens = torch.stack([line[s : s + CONTEXT] for s in starts])
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 2, "the model knows its text"
    model.eval()


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, index) for index, args in enumerate(arguments)]


def nlls_by_hand(model: GPT, tokenizer: Tokenizer, text: str) -> list[float]:
    """The loss of every token of `text`, from windows of CONTEXT tokens one after the other. The
    last window is moved back so that it is full too, and end-of-text comes before everything."""
    line = [tokenizer.eot, *tokenizer.encode(text)]
    found: list[float] = []
    while len(found) < len(line) - 1:
        end = min(len(found) + CONTEXT, len(line) - 1)
        begin = max(0, end - CONTEXT)
        with torch.no_grad():
            logits = model(torch.tensor([line[begin:end]]))[0]
        log_probabilities = logits.double().log_softmax(dim=-1)
        for position in range(len(found), end):
            found.append(-log_probabilities[position - begin, line[position + 1]].item())
    return found


def scores(lm: Any, suite: str, documents: Any, limit: int | None = None) -> Results:
    """The results of the suite's task that has the suite's name."""
    return run_suite(
        lm, suite, lambda task, about: documents, limit, only=[suite], say=lambda task: None
    ).results


# Against lm-eval's HFLM


@given(text=texts)
@few
def test_both_tokenizers_give_the_same_ids(pair: Pair, text: str) -> None:
    assert pair.theirs.tok_encode(text) == pair.ours.tok_encode(text)
    assert pair.tokenizer.decode(pair.theirs.tok_encode(text)) == text


def test_both_have_the_same_prefix_and_length(pair: Pair) -> None:
    assert pair.theirs.prefix_token_id == pair.ours.prefix_token_id == pair.tokenizer.eot
    assert pair.theirs.max_length == pair.ours.max_length == CONTEXT


@given(
    pairs=st.lists(
        st.tuples(
            texts.filter(str.strip) | st.just(""),
            st.lists(st.sampled_from(WORDS), min_size=1, max_size=3).map(" ".join),
        ),
        min_size=1,
        max_size=6,
    )
)
@few
def test_log_likelihoods_equal_hflm(pair: Pair, pairs: list[tuple[str, str]]) -> None:
    """The cases include empty contexts, trailing spaces and contexts longer than the model's."""
    asked = requests("loglikelihood", *[(a, f" {b}" if a else b) for a, b in pairs])
    expected = pair.theirs.loglikelihood(asked, disable_tqdm=True)
    found = pair.ours.loglikelihood(asked, disable_tqdm=True)
    assert [score for score, _ in found] == pytest.approx([s for s, _ in expected], abs=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_greedy_continuations_are_known_as_such_by_both(pair: Pair) -> None:
    prompt = "Going out: The cat number 12 went to the"
    said = greedy(pair, prompt, [])
    asked = requests("loglikelihood", (prompt, said), (prompt, " wall and dug"))
    for lm in (pair.ours, pair.theirs):
        assert [known for _, known in lm.loglikelihood(asked, disable_tqdm=True)] == [True, False]


@given(documents=st.lists(texts, min_size=1, max_size=4))
@few
def test_rolling_log_likelihoods_equal_hflm_and_hand(pair: Pair, documents: list[str]) -> None:
    asked = requests("loglikelihood_rolling", *[(text,) for text in documents])
    found = pair.ours.loglikelihood_rolling(asked, disable_tqdm=True)
    expected = pair.theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    assert found == pytest.approx(expected, rel=1e-4)
    by_hand = [-sum(nlls_by_hand(pair.model, pair.tokenizer, text)) for text in documents]
    assert found == pytest.approx(by_hand, rel=1e-4)


@pytest.mark.parametrize(
    "length", [1, CONTEXT - 1, CONTEXT, CONTEXT + 1, 2 * CONTEXT, 2 * CONTEXT + 1]
)
def test_rolling_windows_end_right_at_the_edges_of_the_context(pair: Pair, length: int) -> None:
    text = pair.tokenizer.decode(pair.tokenizer.encode(TEXT)[:length])
    assert len(pair.tokenizer.encode(text)) == length
    asked = requests("loglikelihood_rolling", (text,))
    found = pair.ours.loglikelihood_rolling(asked, disable_tqdm=True)
    expected = pair.theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    by_hand = [-sum(nlls_by_hand(pair.model, pair.tokenizer, text))]
    assert found == pytest.approx(by_hand, rel=1e-4, abs=1e-5)


def test_hellaswag_equals_hflm(pair: Pair) -> None:
    """acc and acc_norm are equal, on rows of which some are longer than the context."""
    rows = hellaswag_rows()
    lengths = [len(pair.tokenizer.encode(row["ctx_a"])) for row in rows]
    assert min(lengths) < CONTEXT < max(lengths)
    found, expected = (
        scores(lm, "hellaswag", rows)["hellaswag"] for lm in (pair.ours, pair.theirs)
    )
    assert found == expected
    assert found["samples"] == len(rows)
    assert 0 < found["acc"] < 1


@pytest.mark.parametrize("suite", ["perplexity", "wikitext"])
def test_perplexities_equal_hflm(pair: Pair, suite: str) -> None:
    documents = plain_documents(pair.tokenizer) if suite == "perplexity" else wikitext_pages()
    found, expected = (scores(lm, suite, documents)[suite] for lm in (pair.ours, pair.theirs))
    assert found == pytest.approx(expected, rel=1e-4)


@given(start=st.integers(0, 30), size=st.integers(1, 6))
@few
def test_greedy_generation_equals_hflm(pair: Pair, start: int, size: int) -> None:
    """One stop string only: lm-eval cuts at several in turn, not at the one that comes first."""
    prompt = "Going out: The cat number 12"
    whole = greedy(pair, prompt, [])
    asked = requests("generate_until", (prompt, {"until": [], "max_gen_toks": 16}))
    assert [whole] == pair.theirs.generate_until(asked, disable_tqdm=True)
    stop = whole[min(start, len(whole) - 1) :][:size]
    asked = requests("generate_until", (prompt, {"until": [stop], "max_gen_toks": 16}))
    assert [greedy(pair, prompt, [stop])] == pair.theirs.generate_until(asked, disable_tqdm=True)


# Scores of any batching and precision


def test_scores_do_not_depend_on_the_batch(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    from manta.evaluate import adapter

    words = TEXT.split()
    asked = requests("loglikelihood", *[(" ".join(words[:n]), " the dog dug") for n in range(40)])
    together = pair.ours.loglikelihood(asked, disable_tqdm=True)
    monkeypatch.setattr(adapter, "LOGITS_PER_BATCH", 1)
    alone = pair.ours.loglikelihood(asked, disable_tqdm=True)
    assert [s for s, _ in together] == pytest.approx([s for s, _ in alone], abs=1e-3)


def test_bf16_scores_are_near_those_in_fp32(pair: Pair) -> None:
    from manta.evaluate.adapter import in_process

    asked = requests("loglikelihood_rolling", (TEXT[:2000],))
    exact = pair.ours.loglikelihood_rolling(asked)
    rounded = in_process(pair.model, pair.tokenizer, "bf16").loglikelihood_rolling(asked)
    assert rounded == pytest.approx(exact, rel=0.02)
    assert rounded != exact


def test_cudnn_attention_is_left_out_of_scores_and_completions_and_used_again_after(
    pair: Pair,
) -> None:
    during = []
    hook = pair.model.blocks[0].register_forward_hook(
        lambda *_: during.append(torch.backends.cuda.cudnn_sdp_enabled())
    )
    try:
        asked = requests("loglikelihood", ("The cat", " dug"), ("The cat", " caught"))
        pair.ours.loglikelihood(asked, disable_tqdm=True)
        assert greedy(pair, "The cat", [])
    finally:
        hook.remove()
    assert len(during) > 2 and not any(during)
    assert torch.backends.cuda.cudnn_sdp_enabled()


# Generation


def greedy(pair: Pair, prompt: str, until: Any) -> str:
    asked = requests("generate_until", (prompt, {"until": until, "max_gen_toks": 16}))
    return pair.ours.generate_until(asked, disable_tqdm=True)[0]


@given(start=st.integers(0, 40), size=st.integers(1, 9))
@few
def test_generation_ends_before_a_stop_string(pair: Pair, start: int, size: int) -> None:
    """The stop string may begin and end inside a token, and span several tokens."""
    prompt = "Going out: The dog number 7 went to the hill. The"
    whole = greedy(pair, prompt, ["never said"])
    stop = whole[min(start, len(whole) - 1) :][:size]
    assert greedy(pair, prompt, [stop, "never said"]) == whole[: whole.index(stop)]
    assert greedy(pair, prompt, stop) == whole[: whole.index(stop)]


@given(
    cuts=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 3)), min_size=2, max_size=4),
)
@example(cuts=[(1, 1), (0, 1)])  # both in the first token
@few
def test_generation_ends_before_whichever_stop_string_comes_first(
    pair: Pair, cuts: list[tuple[int, int]]
) -> None:
    whole = greedy(pair, "The cat", [])
    stops = [whole[min(start, len(whole) - 1) :][:size] for start, size in cuts]
    found = greedy(pair, "The cat", stops)
    assert whole.startswith(found)
    assert not any(stop in found for stop in stops)
    assert whole[len(found) :].startswith(tuple(stops))


def test_generation_from_nothing_begins_after_end_of_text(pair: Pair) -> None:
    from manta.model.generate import Sampling, generate

    eot = pair.tokenizer.eot
    expected = generate(pair.model, [eot], 16, sampling=Sampling(temperature=0), stop=eot)
    assert greedy(pair, "", []) == pair.tokenizer.decode(list(expected))


@given(
    start=st.integers(0, 500),
    length=st.integers(1, 2 * CONTEXT),
    new=st.integers(1, CONTEXT - 1),
)
@example(start=7, length=CONTEXT - 16, new=16)
@example(start=7, length=CONTEXT - 15, new=16)
@example(start=7, length=CONTEXT + 1, new=CONTEXT - 1)
@few
def test_prompts_of_any_length_are_cut_as_hflm_cuts_them(
    pair: Pair, start: int, length: int, new: int
) -> None:
    prompt = pair.tokenizer.decode(pair.tokenizer.encode(TEXT)[start : start + length])
    asked = requests("generate_until", (prompt, {"until": [], "max_gen_toks": new}))
    expected = pair.theirs.generate_until(asked, disable_tqdm=True)
    assert pair.ours.generate_until(asked, disable_tqdm=True) == expected


# The suites, by hand


def plain_documents(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Documents shorter and longer than the context, and with letters of several bytes."""
    found = [TEXT[:1500], "The cat dug.", "Le chat naïf, 日本の猫.", "A"]
    return [{"text": text, "num_tokens": len(tokenizer.encode(text))} for text in found]


def wikitext_pages() -> list[dict[str, Any]]:
    return [
        {"page": " = Cat = \n\n The cat 's sea is 1 @,@ 000 km away . It ( the cat ) dug . \n"},
        {"page": " = Ray = \n\n The ray went to the reef . \n\n = = Food = = \n\n Shrimps . \n"},
    ]


def run(pair: Pair, suite: str, documents: Any, limit: int | None = None) -> dict[str, Any]:
    """The suite's own results; also checks that its progress reaches the end."""
    from manta.evaluate.adapter import in_process

    totals: list[int] = []
    done: list[int] = []

    def begin(count: int) -> Callable[[int], None]:
        totals.append(count)
        return done.append

    lm = in_process(pair.model, pair.tokenizer)
    lm.begin = begin
    results = scores(lm, suite, documents, limit)
    assert totals == [sum(done)]
    assert list(results) == [suite]
    return results[suite]


def test_perplexity_suite_equals_the_sums_done_by_hand(pair: Pair) -> None:
    documents = plain_documents(pair.tokenizer)
    found = run(pair, "perplexity", documents)
    nlls = [n for d in documents for n in nlls_by_hand(pair.model, pair.tokenizer, d["text"])]
    num_bytes = sum(len(d["text"].encode()) for d in documents)
    num_words = sum(len(d["text"].split()) for d in documents)
    assert found["token_perplexity"] == pytest.approx(math.exp(sum(nlls) / len(nlls)), rel=1e-4)
    assert found["byte_perplexity"] == pytest.approx(math.exp(sum(nlls) / num_bytes), rel=1e-4)
    assert found["word_perplexity"] == pytest.approx(math.exp(sum(nlls) / num_words), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(math.log2(found["byte_perplexity"]), rel=1e-9)
    assert found["samples"] == len(documents)


def test_wikitext_suite_scores_detokenized_pages_per_original_word(pair: Pair) -> None:
    pages = [document["page"] for document in wikitext_pages()]
    texts = [
        " = Cat =\n\nThe cat's sea is 1,000 km away. It (the cat) dug.\n",
        " = Ray =\n\nThe ray went to the reef.\n\n== Food ==\n\nShrimps.\n",
    ]
    found = run(pair, "wikitext", wikitext_pages())
    total = sum(sum(nlls_by_hand(pair.model, pair.tokenizer, text)) for text in texts)
    num_bytes = sum(len(page.encode()) for page in pages)
    # lm-eval counts the empty words at both ends of a page, too.
    num_words = sum(len(page.split()) + 2 for page in pages)
    assert found["byte_perplexity"] == pytest.approx(math.exp(total / num_bytes), rel=1e-4)
    assert found["word_perplexity"] == pytest.approx(math.exp(total / num_words), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(math.log2(found["byte_perplexity"]), rel=1e-9)


def test_hellaswag_suite_equals_choices_made_by_hand(pair: Pair) -> None:
    rows = hellaswag_rows()
    found = run(pair, "hellaswag", rows)
    right = right_by_length = 0
    for row in rows:
        query = f"Going out: {row['ctx_a']} The {row['ctx_b'].split()[1]}"
        query = query.replace(" [title]", ". ").replace("  ", " ")
        asked = requests("loglikelihood", *[(query, f" {ending}") for ending in row["endings"]])
        scores = [score for score, _ in pair.ours.loglikelihood(asked, disable_tqdm=True)]
        each = [s / len(ending) for s, ending in zip(scores, row["endings"], strict=True)]
        right += scores.index(max(scores)) == row["label"]
        right_by_length += each.index(max(each)) == row["label"]
    assert found["acc"] == right / len(rows)
    assert found["acc_norm"] == right_by_length / len(rows)


@pytest.mark.parametrize("suite", ["perplexity", "wikitext", "hellaswag"])
def test_limit_evaluates_only_the_first_documents(pair: Pair, suite: str) -> None:
    documents = {
        "perplexity": plain_documents(pair.tokenizer),
        "wikitext": wikitext_pages(),
        "hellaswag": hellaswag_rows(),
    }[suite]
    limited = run(pair, suite, documents, limit=1)
    assert limited["samples"] == 1
    first = run(pair, suite, documents[:1])
    assert limited == pytest.approx(first, nan_ok=True)


def test_table_shows_every_metric_and_the_number_of_documents(pair: Pair) -> None:
    results = {"hellaswag": run(pair, "hellaswag", hellaswag_rows())}
    lines = table(results).splitlines()
    shown = {line.split()[1]: line.split()[2] for line in lines[2:]}
    assert shown == {
        "acc": f"{results['hellaswag']['acc']:.4f}",
        "acc_norm": f"{results['hellaswag']['acc_norm']:.4f}",
        "documents": "16",
    }
