"""What the job does: a law and its predictions, a check of one, or a comparison of widths."""

import dataclasses
import signal

from manta.scaling import pictures
from manta.scaling.settings import ScalingConfig
from manta.scaling.study import study
from manta.scaling.training import train
from manta.scaling.transfer import widths


@dataclasses.dataclass(frozen=True)
class Answer:
    lines: list[str]
    """The lines to show."""
    folder: str | None
    """The folder of the pictures; None: nothing was drawn."""
    pictures: tuple[str, ...] = ()
    stopped_by: signal.Signals | None = None

    @property
    def exit_code(self) -> int:
        """128 + the signal that stopped the training, as shells report it, else 0."""
        return 0 if self.stopped_by is None else 128 + self.stopped_by


def answer(c: ScalingConfig) -> Answer:
    """Does what the config asks for. Training that a signal stops goes on when the same is asked
    again.

    Raises:
        MantaError: it cannot be done.
    """
    if c.what != "law":
        lines, folder, stopped_by = widths(c)
        drawn = () if stopped_by else (f"{c.what}.png",)
        return Answer(lines, None if stopped_by else folder, drawn, stopped_by)
    trained, stopped_by = train(c)
    if stopped_by is not None:
        return Answer([], None, (), stopped_by)
    told, place = study(c, trained)
    return Answer(told, place, pictures.NAMES if place else ())
