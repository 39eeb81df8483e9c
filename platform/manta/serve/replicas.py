"""The server in several copies on a Ray cluster, by Ray Serve."""

import contextlib
import dataclasses
import logging
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

from manta import config as configs
from manta.cluster import capacity, connection
from manta.errors import ClusterError, ConfigError
from manta.serve.loading import models
from manta.serve.protocol.app import make_app
from manta.serve.protocol.guard import Guard
from manta.serve.protocol.server import STOP_SECONDS
from manta.serve.settings import ServeConfig

NAME = "manta"  # of the application, in Ray Serve and on Ray's dashboard
LOOK_SECONDS = 2.0  # between two looks at how the replicas are
END = "`serve shutdown -y` on the cluster ends it"


def serve_replicas(
    c: ServeConfig, token_digest: bytes | None, say: Callable[[str], None], opening: list[str]
) -> None:
    """Serves the config's checkpoints by `c.replicas` replicas until a signal ends this process, or
    somebody ends the application. `opening` is said once the server is up.

    Raises:
        MantaError: the cluster has no room, Ray Serve is in use there, or a replica does not start.
    """
    assert c.replicas is not None
    connection.connect(name=f"serve {c.checkpoint}")
    gpus = _gpus(c)
    capacity.require(c.replicas, c.replica_cpus, gpus, c.wait_seconds, say)
    # Replicas have other nodes' names; clients ask for this one's.
    known = dataclasses.replace(c, hosts=(*c.hosts, socket.gethostname()))
    with _serving(known, gpus, token_digest):
        say("\n".join(opening))
        _watch(c.replicas, say)


def _gpus(c: ServeConfig) -> int:
    """The GPUs of each replica."""
    import ray

    if c.device == "auto":
        return int(ray.cluster_resources().get("GPU", 0) >= (c.replicas or 1))
    return int(c.device == "cuda")


class Replica:
    """One copy of the server: the models, and the protocol without the page, whose conversations
    are kept at one place."""

    def __init__(self, arguments: dict[str, Any], token_digest: bytes | None):
        import torch

        self._c = configs.from_dict(ServeConfig, arguments)
        torch.set_num_threads(self._c.replica_cpus)
        self._token_digest = token_digest
        self._held = contextlib.ExitStack()
        self._models = self._held.enter_context(models(self._c, print))

    def __serve_build_asgi_app__(self) -> Guard:
        from ray import serve

        name = serve.get_replica_context().replica_id.unique_id
        app = make_app(self._models, self._c, None, replica=name)
        return Guard(app, self._c, self._token_digest)


@contextlib.contextmanager
def _serving(c: ServeConfig, gpus: int, token_digest: bytes | None) -> Iterator[None]:
    """Starts Ray Serve and the application, and ends both after the block.

    Raises:
        ClusterError: Ray Serve runs there already, or a replica does not start.
        ConfigError: Ray Serve is not installed.
    """
    try:
        from ray import serve
        from ray.serve.exceptions import RayServeException
        from ray.serve.schema import LoggingConfig
    except ImportError as e:
        raise ConfigError(
            f"replicas={c.replicas} needs Ray Serve ({e}): pip install 'manta[replicas]', on the "
            "cluster too"
        ) from None
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    found = serve.status()
    if found.proxies or found.applications:
        names = ", ".join(found.applications) or "none"
        raise ClusterError(
            f"replicas={c.replicas}: Ray Serve already runs on this cluster (applications: "
            f"{names}), and there is one in a cluster; {END}"
        )
    actor = {"num_cpus": c.replica_cpus, "num_gpus": gpus}
    made = serve.deployment(
        name="server",
        num_replicas=c.replicas,
        max_ongoing_requests=c.max_running,
        graceful_shutdown_timeout_s=STOP_SECONDS,
        ray_actor_options=actor,
    )
    deployment = made(serve.ingress()(Replica))
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    try:
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": c.host, "port": c.port},
            logging_config=quiet,
        )
        application = deployment.bind(configs.to_dict(c), token_digest)
        try:
            serve.run(application, name=NAME, route_prefix="/", logging_config=quiet)
        except (RuntimeError, TimeoutError, RayServeException) as e:
            raise ClusterError(f"the replicas do not start: {_why(serve.status(), e)}") from None
        yield
    finally:
        serve.shutdown()


def _why(status: Any, error: BaseException) -> str:
    """The reason in one line: the last one that a replica's traceback has."""
    application = status.applications.get(NAME)
    texts = [error, *(d.message for d in application.deployments.values())] if application else []
    lines = [line.strip() for text in texts for line in str(text).splitlines()]
    reasons = [line for line in lines if ".errors." in line or "Error:" in line]
    return (reasons or lines or [str(error)])[-1]


def _watch(replicas: int, say: Callable[[str], None]) -> None:
    """Says when how many replicas answer changes; returns when the application is gone."""
    from ray import serve
    from ray.serve.schema import ReplicaState

    before = replicas
    while (application := serve.status().applications.get(NAME)) is not None:
        states = [d.replica_states for d in application.deployments.values()]
        now = sum(state.get(ReplicaState.RUNNING, 0) for state in states)
        if now != before:
            say(f"{now} of {replicas} replicas answer")
            before = now
        time.sleep(LOOK_SECONDS)
    say("somebody else ended the server")
