"""The models of a server's config, loaded and ready to answer."""

import contextlib
from collections.abc import Callable, Iterator

from manta import layout, storage
from manta.errors import ConfigError
from manta.evaluate.inference_settings import place_of
from manta.model.activations import Dtype
from manta.model.families import num_parameters
from manta.serve.engine.budget import cache_budget
from manta.serve.engine.engine import Engine
from manta.serve.served import Served, served
from manta.serve.settings import ServeConfig
from manta.train.checkpoints import checkpoint


def checkpoints_of(c: ServeConfig) -> dict[str, str]:
    """The paths of the config's checkpoints, by the names by which clients ask for the models.

    Raises:
        MantaError: one does not exist, is a classifier, or has the name of another.
    """
    found: dict[str, str] = {}
    for name in c.names:
        path = checkpoint.resolve(name, c.home_folder)
        if checkpoint.load_model_config(path).labels:
            raise ConfigError(f"checkpoint={name}: a classifier; talk with jobs/classify.py")
        plain = name.rstrip("/").rpartition("/")[2] or name
        if plain in found:
            raise ConfigError(
                f"checkpoint={c.checkpoint}: two of them have the same last name, by which clients "
                "ask for a model; copy one to another name"
            )
        found[plain] = path
    return found


@contextlib.contextmanager
def models(c: ServeConfig, say: Callable[[str], None]) -> Iterator[dict[str, Served]]:
    """The models of the config's checkpoints by their names, until the block ends. Their caches
    share what memory there is, also with those of the server's other replicas.

    Raises:
        MantaError: as `checkpoints_of`; or a model cannot be loaded.
    """
    device, name_of_dtype = place_of(c)
    dtype: Dtype = "bf16" if name_of_dtype == "bf16" else "fp32"
    paths = checkpoints_of(c)
    loaded = {name: checkpoint.load_model(path, device) for name, path in paths.items()}
    found: dict[str, Served] = {}
    try:
        for name, model in loaded.items():
            tokenizer = checkpoint.load_tokenizer(paths[name])
            if c.cache_gb is not None:
                budget = int(c.cache_gb * 1e9)
            else:
                free = cache_budget(model.config, device, dtype, c.max_running)
                budget = free // (len(loaded) - len(found))
                if device.type == "cpu":  # all replicas may be on one node; a GPU has one
                    budget //= c.replicas or 1
            engine = Engine(
                model,
                tokenizer,
                device=device,
                dtype=dtype,
                cache_bytes=budget,
                most_running=c.max_running,
            )
            manifest = storage.info(storage.join(paths[name], layout.MANIFEST))
            made = found[name] = served(
                name,
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
