"""`serve`: loads models, and answers requests until it is told to stop."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from manta import layout, storage
from manta.errors import ConfigError
from manta.evaluate.inference_settings import place_of
from manta.model.activations import Dtype
from manta.model.families import num_parameters
from manta.serve.conversations import Conversations
from manta.serve.engine.budget import cache_budget
from manta.serve.engine.engine import Engine
from manta.serve.served import Served, served
from manta.serve.settings import ServeConfig
from manta.train.checkpoints import checkpoint


def serve(c: ServeConfig, say: Callable[[str], None]) -> None:
    """Serves the config's checkpoints until SIGINT or SIGTERM comes.

    Raises:
        MantaError: a checkpoint does not exist, or the server cannot listen at its address.
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
    with (
        contextlib.closing(listening),
        models(c, say) as found,
        contextlib.closing(Conversations(_place(found))) as kept,
    ):
        app = guard.Guard(make_app(found, c, kept), c, token)
        at = server.address(c, listening)
        lines = _opening(c, at, found, token, file, is_new)
        server.run(app, listening, lambda: say("\n".join(lines)))
    say("stopped")


def _opening(
    c: ServeConfig,
    at: str,
    found: dict[str, Served],
    token: str | None,
    file: Path | None,
    is_new: bool,
) -> list[str]:
    """The lines that a person reads when the server is up."""
    name = next(iter(found))
    lines = [f"serving {', '.join(found)} at {at}"]
    if token is not None:
        shown = f"token: {token}" if is_new else "token: as before"
        lines.append(f"{shown} (kept in {file}, readable by you alone)")
        if not c.is_loopback:
            lines.append("others can reach this address, and nothing is encrypted on its way")
    header = ' -H "Authorization: Bearer $TOKEN"' if token else ""
    question = '{"messages": [{"role": "user", "content": "Hello!"}]}'
    return [
        *lines,
        f"chat      open {at}/{'#token=TOKEN' if token else ''} in a browser",
        f"curl      curl {at}/v1/chat/completions{header} -d '{question}'",
        f'openai    OpenAI(base_url="{at}/v1", api_key="{"TOKEN" if token else "none"}")'
        f'.chat.completions.create(model="{name}", ...)',
        "Ctrl-C ends it",
    ]


@contextlib.contextmanager
def models(c: ServeConfig, say: Callable[[str], None]) -> Iterator[dict[str, Served]]:
    """The models of the config's checkpoints by their names, until the block ends."""
    device, name_of_dtype = place_of(c)
    dtype: Dtype = "bf16" if name_of_dtype == "bf16" else "fp32"
    paths = {name: checkpoint.resolve(name, c.home_folder) for name in c.names}
    loaded = {}
    for name, path in paths.items():
        if checkpoint.load_model_config(path).labels:
            raise ConfigError(f"checkpoint={name}: a classifier; talk with jobs/classify.py")
        loaded[name] = checkpoint.load_model(path, device)
    plain = {name: name.rstrip("/").rpartition("/")[2] or name for name in paths}
    if len(set(plain.values())) < len(plain):
        raise ConfigError(
            f"checkpoint={c.checkpoint}: two of them have the same last name, by which clients ask "
            "for a model; copy one to another name"
        )
    found: dict[str, Served] = {}
    try:
        for name, model in loaded.items():
            tokenizer = checkpoint.load_tokenizer(paths[name])
            if c.cache_gb is not None:
                budget = int(c.cache_gb * 1e9)
            else:
                free = cache_budget(model.config, device, dtype, c.max_running)
                budget = free // (len(loaded) - len(found))
            engine = Engine(
                model,
                tokenizer,
                device=device,
                dtype=dtype,
                cache_bytes=budget,
                most_running=c.max_running,
            )
            manifest = storage.info(storage.join(paths[name], layout.MANIFEST))
            made = found[plain[name]] = served(
                plain[name],
                paths[name],
                tokenizer,
                engine,
                created=int((manifest.mtime_ns or 0) / 1e9),
                parameters=num_parameters(model.config),
                transcript=c.transcript,
            )
            how = "its chat template" if made.is_fine_tuned else "a transcript to go on with"
            say(
                f"{made.name}: {made.parameters / 1e6:.1f}M parameters, context "
                f"{engine.context_length:,}, {how}, {budget / 1e9:.2f} GB of cache"
            )
        yield found
    finally:
        for model_served in found.values():
            model_served.engine.close()


def _place(found: dict[str, Served]) -> Path:
    """Where conversations are kept: in the run of the first model, or, if that is in an object
    store, in ~/manta/conversations on this machine."""
    first = next(iter(found.values()))
    run, _ = layout.split_checkpoint(first.checkpoint)
    if storage.is_local(run):
        return Path(storage.filesystem(run)[1]) / layout.CONVERSATIONS
    return Path("~/manta/conversations").expanduser() / f"{first.name}.sqlite"
