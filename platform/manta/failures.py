"""What went wrong in Ray's workers: the cause, out of the errors that Ray has wrapped it in."""

from typing import Any

from manta.errors import ClusterError, MantaError


class WorkersFailed(RuntimeError):
    """Workers failed, and not with a MantaError: the text is that of one of them, whole."""


def cause_of(error: BaseException) -> Exception:
    """The MantaError inside a failure of Ray's, if there is one; else the failure, as one error."""
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
    """The MantaError inside workers' failures, by rank, if there is one; else WorkersFailed."""
    for failure in failures.values():
        cause: BaseException | None = getattr(failure, "_base_exc", failure)
        while cause is not None:
            inner = getattr(cause, "cause", None) or cause.__cause__
            # Ray's wrapper is of its cause's class too, with the whole traceback as its text.
            if isinstance(cause, MantaError) and not isinstance(inner, MantaError):
                return cause
            cause = inner
    # Who died took the others along. A whole traceback: Ray's own message of all cuts it off.
    died = [failure for failure in failures.values() if death_of(failure) is not None]
    return WorkersFailed(str([*died, *failures.values()][0]))


def death_of(failure: Any) -> Any:
    """The RayActorError of a worker whose process is gone; None: it has failed otherwise."""
    from ray.exceptions import RayActorError

    cause = getattr(failure, "health_check_failure", failure)  # (Ray Train wraps it)
    return cause if isinstance(cause, RayActorError) else None
