"""What failures and checkpoints cost a run: the share of its time that is training.

Young 1974 ("A first order approximation to the optimum checkpoint interval") and Daly 2006 ("A
higher order estimate of the optimum checkpoint interval for restart dumps") give the interval at
which the time for saves and the steps that are lost cost the least.
"""

import dataclasses
import math


def daly(save: float, between_failures: float) -> float:
    """Seconds of training between saves that cost the least in all, by Daly 2006, equation 37.

    Args:
        save: seconds that training pauses for a save.
        between_failures: mean seconds between failures.
    """
    if save >= 2 * between_failures:
        return between_failures
    ratio = save / (2 * between_failures)
    return math.sqrt(2 * save * between_failures) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save


@dataclasses.dataclass(frozen=True)
class Losses:
    """Seconds that are no training, for a run of `trained` seconds of steps."""

    saves: float
    lost: float
    """Steps that are trained again after failures."""
    restarts: float

    @property
    def total(self) -> float:
        return self.saves + self.lost + self.restarts


def losses(
    trained: float,
    interval: float,
    pause: float,
    write: float,
    restart: float,
    failures_per_second: float,
) -> Losses:
    """What a run loses, expected.

    Args:
        trained: seconds of steps.
        interval: seconds of steps between saves.
        pause: seconds that training pauses for a save.
        write: seconds until a save is on the disk; a failure before then loses what it has.
        restart: seconds from a failure until the first step.
        failures_per_second: failures of the whole run.

    A failure comes, on average, in the middle between two saves. It may also come while lost steps
    are trained again or the workers start, so the time in which failures come includes these.
    """
    saves = trained / interval * pause
    each = min(interval, trained) / 2 + write + restart
    share = failures_per_second * each
    if share >= 1:  # failures come faster than the run recovers
        return Losses(saves, math.inf, math.inf)
    failures = failures_per_second * (trained + saves) / (1 - share)
    return Losses(saves, failures * (each - restart), failures * restart)
