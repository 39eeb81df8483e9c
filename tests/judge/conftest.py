"""Two checkpoints that answer a file of questions, and an endpoint that judges."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.checkpoints import MODELS, model_of, save
from helpers.evaluation import TEXT
from helpers.judge_server import Server, serving
from manta.text import templates
from manta.text import tokenizer as tokenizers
from manta.text.templates import with_template


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as made:
        yield made


@pytest.fixture(scope="session")
def judged_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with the runs `base` (a transcript) and `chat` (a template), and `questions.json` with
    twelve questions."""
    home = tmp_path_factory.mktemp("judge")
    tokenizer = tokenizers.train([TEXT], 300)
    chat = with_template(tokenizer, templates.CHATML, "chatml")
    for name, made in (("base", tokenizer), ("chat", chat)):
        keys = {**MODELS["llama"], "context_length": 640}
        save(model_of(keys, made.vocab_size), made, home, name)
    rows = [
        {
            "instruction": f"Where did animal {i} go?",
            "input": f"It is a {i}.",
            "output": f"Place {i}",
        }
        for i in range(12)
    ]
    (home / "questions.json").write_text(json.dumps(rows))
    return home
