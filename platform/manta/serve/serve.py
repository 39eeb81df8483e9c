"""`serve`: loads models, and answers requests until it is told to stop."""

import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path

from manta import layout, storage
from manta.errors import ConfigError
from manta.serve.conversations import Conversations
from manta.serve.loading import checkpoints_of, models
from manta.serve.served import Served
from manta.serve.settings import ServeConfig


def serve(c: ServeConfig, say: Callable[[str], None]) -> None:
    """Serves the config's checkpoints until SIGINT or SIGTERM comes.

    Raises:
        MantaError: a checkpoint does not exist, or the server cannot listen at its address; or, of
            replicas, what `replicas.serve_replicas` raises.
    """
    try:
        from manta.serve.protocol import guard, server
        from manta.serve.protocol.app import make_app
    except ModuleNotFoundError as e:
        raise ConfigError(
            f"the server needs {e.name}, which is not installed: pip install 'manta[serve]'"
        ) from None
    listening = server.listen(c)
    token, file, is_new = guard.token_of(c.home_folder) if c.needs_token else (None, None, False)
    digest = None if token is None else guard.digest(token)
    if c.replicas is not None:
        from manta.serve.replicas import serve_replicas

        listening.close()
        at = server.address(c, c.port)
        names = checkpoints_of(c)
        serve_replicas(c, digest, say, _opening(c, at, names, token, file, is_new))
        return
    with (
        contextlib.closing(listening),
        models(c, say) as found,
        contextlib.closing(Conversations(_place(found))) as kept,
    ):
        app = guard.Guard(make_app(found, c, kept), c, digest)
        at = server.address(c, listening.getsockname()[1])
        lines = _opening(c, at, found, token, file, is_new)
        server.run(app, listening, lambda: say("\n".join(lines)))
    say("stopped")


def _opening(
    c: ServeConfig,
    at: str,
    names: Iterable[str],
    token: str | None,
    file: Path | None,
    is_new: bool,
) -> list[str]:
    """The lines that a person reads when the server is up."""
    names = list(names)
    copies = f", by {c.replicas} replicas" if c.replicas else ""
    lines = [f"serving {', '.join(names)} at {at}{copies}"]
    if token is not None:
        shown = f"token: {token}" if is_new else "token: as before"
        lines.append(f"{shown} (kept in {file}, readable by you alone)")
        if not c.is_loopback:
            lines.append("others can reach this address, and nothing is encrypted on its way")
    header = ' -H "Authorization: Bearer $TOKEN"' if token else ""
    question = '{"messages": [{"role": "user", "content": "Hello!"}]}'
    page = f"chat      open {at}/{'#token=TOKEN' if token else ''} in a browser"
    if c.replicas:
        page = "chat      no page: its conversations are kept at one place; omit replicas= for it"
    return [
        *lines,
        page,
        f"curl      curl {at}/v1/chat/completions{header} -d '{question}'",
        f'openai    OpenAI(base_url="{at}/v1", api_key="{"TOKEN" if token else "none"}")'
        f'.chat.completions.create(model="{names[0]}", ...)',
        "Ctrl-C ends it",
    ]


def _place(found: dict[str, Served]) -> Path:
    """The file of conversations: in the run of the first model, or, if that is in an object
    store, in ~/manta/conversations on this machine."""
    first = next(iter(found.values()))
    run, _ = layout.split_checkpoint(first.checkpoint)
    if storage.is_local(run):
        return Path(storage.filesystem(run)[1]) / layout.CONVERSATIONS
    return Path("~/manta/conversations").expanduser() / f"{first.name}.sqlite"
