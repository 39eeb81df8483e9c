"""A chat with an exported checkpoint, in transformers."""

from pathlib import Path

import pytest
import torch

from helpers.checkpoints import MODELS, model_of, save
from helpers.evaluation import TEXT
from manta.config import load
from manta.evaluate.chat import Chat
from manta.evaluate.inference_settings import ChatConfig
from manta.export.convert import ExportConfig, export
from manta.model.inference import inference
from manta.text import templates
from manta.text import tokenizer as tokenizers
from manta.text.templates import with_template


@pytest.mark.parametrize("form", ["chatml", "alpaca"])
def test_transformers_answers_an_exported_chat_with_the_same_ids(form: str, tmp_path: Path) -> None:
    """Its prompt is the chat's, from the token on that opens a document; greedy answers agree."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = with_template(tokenizers.train([TEXT], 300), templates.NAMED[form], form)
    model = model_of({**MODELS["llama"], "context_length": 400}, tokenizer.vocab_size)
    save(model, tokenizer, tmp_path)
    out = tmp_path / "out"
    export(load(ExportConfig, [f"home={tmp_path}", "checkpoint=run", f"out={out}"]), print)
    theirs = AutoTokenizer.from_pretrained(out)
    turns = [{"role": "user", "content": "The cat?"}]
    found = theirs.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    keys = ["temperature=0", "max_tokens=8", "device=cpu"]
    with inference(torch.device("cpu"), "fp32"):
        chat = Chat(model, tokenizer, load(ChatConfig, keys))
        prompt = chat.prompt("The cat?")
        assert prompt == [tokenizer.start, *found]
        list(chat.answer("The cat?"))
        hf = AutoModelForCausalLM.from_pretrained(out)
        ids = hf.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0]
        assert ids[len(prompt) :].tolist()[: len(chat.exchanges[0].answer)] == (
            chat.exchanges[0].answer
        )
        assert theirs.eos_token_id in tokenizer.ends
