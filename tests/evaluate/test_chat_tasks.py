"""Tasks in a model's chat template, against lm-eval's own adapter for transformers."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.checkpoints import MODELS, model_of, save
from helpers.evaluation import HABITS, TEXT
from manta.config import from_dict, load
from manta.errors import ConfigError, DataError
from manta.evaluate import catalog, report
from manta.evaluate.adapter import MantaLM
from manta.evaluate.conversation import ChatForm, Conversation, ids_of
from manta.evaluate.evaluate import evaluate
from manta.evaluate.settings import EvaluateConfig
from manta.evaluate.suites import Chat, run_suite
from manta.evaluate.worker import Worker, pool_of
from manta.export.convert import ExportConfig, export
from manta.text import templates
from manta.text import tokenizer as tokenizers
from manta.text.templates import with_template
from manta.text.tokenizer import Tokenizer

CONTEXT = 400
few = settings(deadline=None, max_examples=10)

# A description, examples, choices, and an answer that has begun.
SUITE = """
group: mine
test_split: test
fewshot_split: test
num_fewshot: 2
description: "Answer about {{place}}."
metadata: {version: 1.0}
task:
  - task: mine_written
    output_type: generate_until
    doc_to_text: "Where did the {{animal}} go?"
    doc_to_target: "{{place}}"
    generation_kwargs: {until: ["\\n"], max_gen_toks: 12}
    metric_list: [{metric: exact_match}]
  - task: mine_begun
    output_type: generate_until
    doc_to_text: "Where did the {{animal}} go?"
    doc_to_target: "{{place}}"
    gen_prefix: "It went to the"
    generation_kwargs: {until: ["\\n"], max_gen_toks: 12}
    metric_list: [{metric: exact_match}]
  - task: mine_chosen
    output_type: multiple_choice
    doc_to_text: "What did the {{animal}} do?"
    doc_to_choice: "{{things}}"
    doc_to_target: "{{label}}"
    metric_list: [{metric: acc}, {metric: acc_norm}]
"""


def documents() -> list[dict[str, Any]]:
    things = [thing for _, thing in HABITS.values()]
    return [
        {"animal": animal, "place": place, "things": things, "label": things.index(thing)}
        for animal, (place, thing) in HABITS.items()
    ]


class Pair(NamedTuple):
    """An exported model, in Manta and in transformers."""

    ours: MantaLM
    theirs: Any
    tokenizer: Tokenizer


@pytest.fixture(scope="module", params=["chatml", "alpaca"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    from lm_eval.models.huggingface import HFLM

    form, home = request.param, tmp_path_factory.mktemp("chat")
    tokenizer = with_template(tokenizers.train([TEXT], 300), templates.NAMED[form], form)
    model = model_of({**MODELS["llama"], "context_length": CONTEXT}, tokenizer.vocab_size)
    save(model, tokenizer, home)
    out = home / "out"
    export(load(ExportConfig, [f"home={home}", "checkpoint=run", f"out={out}"]), print)
    theirs = HFLM(pretrained=str(out), device="cpu", dtype="float32", batch_size=1)
    pool, chat = pool_of(Worker(model, tokenizer)), ChatForm(tokenizer)
    ours = MantaLM(pool, tokenizer, CONTEXT, tokenizer.vocab_size, chat=chat)
    return Pair(ours, theirs, tokenizer)


def asked(lm: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], str, Any]]:
    """Records what an LM is asked, as ids, and what it answers."""
    found: list[tuple[list[int], str, Any]] = []
    for kind in ("generate_until", "loglikelihood"):
        ask = getattr(type(lm), kind)

        def recorded(requests: Any, _ask: Any = ask, **options: Any) -> Any:
            answers = _ask(lm, requests, **options)
            for request, answer in zip(requests, answers, strict=True):
                context, more = request.args
                found.append((lm.tok_encode(context), str(more), answer))
            return answers

        monkeypatch.setattr(lm, kind, recorded)
    return found


@pytest.mark.parametrize("turns", [True, False], ids=["turns", "one turn"])
def test_prompts_answers_and_scores_equal_those_of_hf(
    pair: Pair, turns: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.yaml").write_text(SUITE)
    monkeypatch.setattr(catalog, "FOLDER", tmp_path)
    chat = Chat("Be brief.", turns)
    if turns and "### Instruction" in pair.theirs.tokenizer.chat_template:
        with pytest.raises(ConfigError, match=r"one instruction.*fewshot_as_multiturn=false"):
            run_suite(pair.ours, "mine", lambda *_: documents(), chat=chat, say=lambda _: None)
        return
    ours, theirs = (
        (
            asked(lm, monkeypatch),
            run_suite(lm, "mine", lambda *_: documents(), chat=chat, say=lambda _: None),
        )
        for lm in (pair.ours, pair.theirs)
    )
    assert len(ours[0]) == 2 * 4 + 4 * 4
    for (ids, more, answer), (expected, their_more, their_answer) in zip(
        ours[0], theirs[0], strict=True
    ):
        assert (ids, more) == (expected, their_more)
        if isinstance(answer, str):
            assert answer == their_answer
        else:
            assert answer[0] == pytest.approx(their_answer[0], abs=1e-3)
    assert ours[1].results == theirs[1].results
    assert {"exact_match", "samples"} <= ours[1].results["mine_begun"].keys()


said = st.text(min_size=1, max_size=12).filter(str.strip)


@given(
    texts=st.lists(said, min_size=4, max_size=4),
    pairs=st.integers(1, 2),
    has_begun=st.booleans(),
    system=st.none() | st.just("Be brief."),
)
@few
def test_a_conversation_is_written_as_transformers_writes_it(
    pair: Pair, texts: list[str], pairs: int, has_begun: bool, system: str | None
) -> None:
    """One of them has a last answer that has begun."""
    if "### Instruction" in pair.theirs.tokenizer.chat_template:
        pairs = 1
    count = 2 * pairs - (not has_begun)
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": ("user", "assistant")[i % 2], "content": texts[i]} for i in range(count)]
    found = pair.ours.apply_chat_template(messages, not has_begun)
    assert found == pair.theirs.apply_chat_template(messages, not has_begun)
    assert ids_of(found, pair.tokenizer) == pair.theirs.tok_encode(str(found))


def test_what_a_text_spells_stays_text(pair: Pair) -> None:
    spelled = "<|im_end|><|endoftext|>"
    found = pair.ours.apply_chat_template([{"role": "user", "content": spelled}])
    assert isinstance(found, Conversation) and spelled in found
    special = {token.id for token in pair.tokenizer.extras.added}
    plain = pair.ours.apply_chat_template([{"role": "user", "content": "Hello"}])
    counts = [sum(i in special for i in ids_of(text, pair.tokenizer)) for text in (found, plain)]
    assert counts[0] == counts[1]


def test_tasks_without_a_question_are_refused_with_a_line(pair: Pair) -> None:
    rows = [{"text": TEXT[:100], "num_tokens": 40}]
    with pytest.raises(ConfigError, match=r"perplexity scores texts as they are.*omit chat=true"):
        run_suite(pair.ours, "perplexity", lambda *_: rows, chat=Chat(), say=lambda _: None)


def test_a_model_without_a_template_is_refused_before_workers_start(tmp_path: Path) -> None:
    tokenizer = tokenizers.train([TEXT], 300)
    save(model_of(MODELS["llama"], tokenizer.vocab_size), tokenizer, tmp_path)
    c = load(EvaluateConfig, [f"home={tmp_path}", "checkpoint=run", "tasks=[gsm8k]", "chat=true"])
    with pytest.raises(DataError, match="chat=true: the tokenizer has no chat template"):
        evaluate(c)


@pytest.mark.parametrize("keys", [{"system": "Hi"}, {"fewshot_as_multiturn": False}], ids=str)
def test_keys_of_chats_are_refused_without_chat(keys: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="are for chat=true"):
        from_dict(EvaluateConfig, keys)


def test_scores_in_a_template_have_files_of_their_own_and_are_compared_as_such() -> None:
    def label(**keys: Any) -> str:
        return report.label_of(from_dict(EvaluateConfig, {"tasks": ["mine"], **keys}), "task-mine")

    labels = [
        label(), label(chat=True), label(chat=True, fewshot_as_multiturn=False),
        label(chat=True, system="Be brief."), label(num_fewshot=5), label(limit=3),
    ]  # fmt: skip
    assert len({*labels}) == len(labels)
    variants = [report.variant_of(found) for found in labels]
    assert variants[0] == variants[5] == "" and variants[1] == " (chat)"
    assert variants[4] == " (5-shot)" and len({*variants}) == 5
