"""Why Ray's workers failed: unwraps the cause from the errors that Ray puts around it."""

import re
from typing import Any

from manta.errors import ClusterError, MantaError

# How gloo and NCCL say that another worker is gone.
LOST_CONNECTION = re.compile(
    r"Connection (closed|reset) by peer|Broken pipe|remote process exited|ncclRemoteError"
)


class WorkersFailed(RuntimeError):
    """Workers failed, and not with a MantaError. The text is the whole traceback of one of them."""


def cause_of(error: BaseException) -> Exception:
    """Returns the MantaError inside a failure from Ray, else one error that describes it."""
    from ray.exceptions import RayError

    controller = getattr(error, "controller_failure", None)
    if isinstance(controller, MantaError | WorkersFailed):
        return controller  # raised there on purpose
    if controller is not None:
        why = f"Ray Train could not start or keep the workers: {' '.join(str(controller).split())}"
        # What dies can be started again; what does not fit cannot.
        return RuntimeError(why) if isinstance(controller, RayError) else ClusterError(why)
    return failure_of(getattr(error, "worker_failures", {}) or {0: error})


def failure_of(failures: dict[int, Any]) -> Exception:
    """Returns the MantaError inside the workers' failures (keyed by rank), else WorkersFailed."""
    for failure in failures.values():
        cause: BaseException | None = getattr(failure, "_base_exc", failure)
        while cause is not None:
            inner = getattr(cause, "cause", None) or cause.__cause__
            # Ray's wrapper has the class of its cause too, but its text is the whole traceback.
            if isinstance(cause, MantaError) and not isinstance(inner, MantaError):
                return cause
            cause = inner
    # Ray's own message about all of them would cut the traceback off.
    return WorkersFailed(str(min(failures.values(), key=_place)))


def _place(failure: Any) -> int:
    """The place of a failure among those of all workers: what caused the others comes first. A
    worker that died made them fail; one that lost its connection to another made none."""
    if death_of(failure) is not None:
        return 0
    return 2 if LOST_CONNECTION.search(str(failure)) else 1


def death_of(failure: Any) -> Any:
    """The RayActorError of a worker whose process is gone; None if it failed in another way."""
    from ray.exceptions import RayActorError

    cause = getattr(failure, "health_check_failure", failure)  # (Ray Train wraps it)
    return cause if isinstance(cause, RayActorError) else None
