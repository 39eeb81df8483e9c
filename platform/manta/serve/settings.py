"""The settings of the server."""

from typing import Literal

from manta.config import Count, Natural, NonNegativeFloat, PositiveFloat, PositiveFraction, config
from manta.evaluate.inference_settings import InferenceConfig

Overflow = Literal["error", "slide", "summarise"]
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@config
class ServeConfig(InferenceConfig):
    checkpoint: str = "quickstart"
    """A run's name or folder (its newest checkpoint), or a checkpoint's folder; several, separated
    by commas, are served together."""
    host: str = "127.0.0.1"
    """Address to listen on. Any other than this machine's own needs a token."""
    port: Natural = 8000
    """Port to listen on; 0: any free one."""
    token: bool | None = None
    """Whether requests need a token, which is made and kept in HOME/serve-token. null: on any other
    address than this machine's own."""
    hosts: tuple[str, ...] = ()
    """Further names by which browsers and clients reach the server, as that of a proxy."""
    overflow: Overflow | None = None
    """What happens when a conversation is longer than the model's context. error: the request is
    refused, with OpenAI's code context_length_exceeded; slide: its oldest turns are left out whole,
    and named in the answer; summarise: the model's own summary, marked as one, takes their place.
    null: error for clients, slide for the chat page, where each person may choose otherwise; so may
    each request."""
    transcript: bool = False
    """Whether models continue a transcript ("User: ...", "Assistant: ...") although they have a
    chat template. One without a template always does."""
    max_tokens: Count = 512
    """Most tokens of an answer, where a request names no number."""
    temperature: NonNegativeFloat = 0.8
    """Sampling temperature, where a request names none; 0: always the likeliest token."""
    top_k: Count | None = 50
    """Number of likeliest tokens to sample among, where a request names none; null: all."""
    top_p: PositiveFraction = 1.0
    """Share of probability to sample among, where a request names none; 1: all."""
    cache_gb: PositiveFloat | None = None
    """Memory for what each model remembers of texts, in GB. null: half of the memory that is
    free after the models are loaded (on a GPU, nearly all of it), divided among them."""
    max_running: Count = 64
    """Most requests of a model that are answered at once; others wait."""

    replicas: Count | None = None
    """Copies of the server on the Ray cluster, by Ray Serve, without the chat page; each answers
    some of the requests. They need pip install 'manta[replicas]', and a home that all nodes have.
    null: one server, in this process."""
    replica_cpus: Count = 1
    """CPUs, and compute threads, of each replica. (On a GPU each has one GPU.)"""
    wait_seconds: NonNegativeFloat = 0.0
    """Seconds to wait for an autoscaling cluster to have room for all replicas."""

    def problems(self) -> list[str]:
        found = []
        if self.port > 65535:
            found.append(f"port={self.port}: a port is a number from 0 to 65535")
        if self.token is False and not self.is_loopback:
            found.append(f"token=false: host={self.host} is open to others: omit it")
        if self.replicas is not None and not self.port:
            found.append(f"port=0: replicas={self.replicas} need a port with a number")
        for key in ("replica_cpus", "wait_seconds"):
            value = getattr(self, key)
            if self.replicas is None and value != getattr(type(self), key):
                found.append(f"{key}={value}: is for replicas; give replicas= a number, or omit it")
        names = self.names
        if not names:
            found.append("checkpoint= is empty: give a run's name")
        if twice := [name for name in names if names.count(name) > 1]:
            found.append(f"checkpoint={self.checkpoint}: {twice[0]} is there twice: omit one")
        return found

    @property
    def names(self) -> list[str]:
        """The checkpoints to serve, each as a person named it."""
        return [name.strip() for name in self.checkpoint.split(",") if name.strip()]

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return self.host in LOOPBACK

    @property
    def needs_token(self) -> bool:
        return bool(self.token) or not self.is_loopback
