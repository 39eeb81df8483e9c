"""A model card may be published: nothing in a run's names or config can change the page, or tell
where the model was made."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manta import layout
from manta.config import from_dict, to_yaml
from manta.export.card import card
from manta.model.shape import ModelConfig
from manta.train.checkpoints.checkpoint import TrainState
from manta.train.settings import PretrainConfig

hostile = st.text(max_size=30) | st.text(alphabet="`~<>\n \t|*#\x1b\u202e", max_size=12)


def made(home: Path, keys: dict[str, object], name: str = "run", dataset: str = "ds") -> str:
    """The card of a run with these keys."""
    run = Path(layout.run_folder(str(home), "run"))
    run.mkdir(parents=True, exist_ok=True)
    c = from_dict(PretrainConfig, {"home": str(home), **keys})
    (run / layout.RUN_CONFIG).write_text(to_yaml(c))
    (run / layout.METRICS).write_text("")
    path = layout.checkpoint_folder(str(run), 1)
    model = ModelConfig(n_layer=1, n_head=1, n_embd=8, context_length=8, vocab_size=300)
    return card(path, name, model, TrainState(step=1, datasets=(dataset,)))


@settings(deadline=None, max_examples=25)
@given(hostile, hostile)
def test_no_text_of_a_run_leaves_its_fence_or_becomes_html(
    tmp_path_factory: pytest.TempPathFactory, prompt: str, name: str
) -> None:
    home = tmp_path_factory.mktemp("home")
    text = made(home, {"sample": {"prompts": [prompt]}}, name, f"/x/{name.replace('/', '')}")
    head, _, config = text.partition("\n## Config\n\n")
    lines = config.rstrip("\n").split("\n")
    fence = lines[0].removesuffix("yaml")
    assert set(fence) == {"`"} and lines[-1] == fence
    assert not [line for line in lines[1:-1] if fence in line]
    body = head.partition("## Use")[0]
    assert "<" not in body and "\x1b" not in text and "\u202e" not in text
    assert len([line for line in body.splitlines() if line.startswith("# ")]) == 1


def test_a_card_names_no_absolute_path(tmp_path: Path) -> None:
    home = tmp_path / "secret place"
    data = {
        "source": f"{home}/data/a b.txt",
        "val_source": "/secret/val.txt",
        "decontaminate": ["/secret/tests.jsonl", "~/secret.jsonl", f"file://{tmp_path}/secret/x"],
    }
    text = made(home, {"data": data, "sample": {"prompts": ["and/or", "// comment"]}})
    for private in (str(tmp_path), "/secret", f"{Path.home()}/"):
        assert private not in text
    for kept in ("data/a b.txt", "val.txt", "tests.jsonl", "and/or", "// comment"):
        assert kept in text
