"""What a lane's first rank hears, and copies of checkpoints, without Ray."""

from pathlib import Path

import pytest

from helpers.checkpoints import model_of, save
from manta import layout
from manta.errors import CheckpointError
from manta.text.tokenizer import train
from manta.train.checkpoints import checkpoint
from manta.train.checkpoints.contents import copy
from manta.train.faults.signals import Asked
from manta.train.lane import Piece, _Desk


def test_only_the_answer_to_the_question_counts_and_a_stop_stays() -> None:
    """A worker that was started again may hear what was meant for the one before."""
    desk = _Desk()
    for message in (Piece("before", {}), Asked.STOP, Asked.SAVE, Piece("now", {"seed": 1}, 7)):
        desk.take(message)
    assert desk.answer("now") == Piece("now", {"seed": 1}, 7)
    assert desk.asked is Asked.STOP


def test_a_copied_checkpoint_is_whole_and_has_the_same_bytes(tmp_path: Path) -> None:
    tokenizer = train(["some text to learn from " * 20], 300)
    path = save(model_of({}, tokenizer.vocab_size), tokenizer, tmp_path)
    to = layout.checkpoint_folder(layout.run_folder(str(tmp_path), "child"), 7)
    copy(path, to)
    checkpoint.verify(to)
    names = [p.name for p in Path(path).iterdir() if p.is_file()]
    assert all(Path(to, n).read_bytes() == Path(path, n).read_bytes() for n in names)
    Path(to, layout.MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        copy(to, layout.checkpoint_folder(layout.run_folder(str(tmp_path), "other"), 0))
