"""Exports a checkpoint to a format of others, and makes a checkpoint of one of theirs."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from manta import layout, storage
from manta.config import config
from manta.errors import CheckpointError, ConfigError, DataError
from manta.export import ggml, huggingface, llmc
from manta.export.card import card
from manta.model.gpt import num_parameters
from manta.storage import HomeConfig
from manta.text import tokenizer as tokenizers
from manta.text.tokenizer import R50K, R50K_SIZE, Tokenizer
from manta.train.checkpoints import checkpoint as checkpoints
from manta.train.checkpoints.checkpoint import TrainState

SAMPLES = 20  # texts of the run's own data, in which the tokenizer is compared


@config
class ExportConfig(HomeConfig):
    checkpoint: str = "quickstart"
    """A run's name or folder (its newest checkpoint), or a checkpoint's folder."""
    to: Literal["hf", "gguf", "llmc"] = "hf"
    """hf: a folder that plain transformers opens; gguf: a file for llama.cpp, fp32; llmc: a file
    for llm.c (gpt2 family, fp32)."""
    out: str | None = None
    """The folder, or file, that is made; null: NAME-STEP in the home's exports/."""
    overwrite: bool = False
    """Take the place of what is at `out`."""


@config
class ImportConfig(HomeConfig):
    from_: Literal["hf", "llmc"] = "hf"
    """hf: a folder of transformers' (GPT-2, Llama, Qwen3; weights as safetensors); llmc: a .bin of
    llm.c's."""
    path: str | None = None
    """The folder, or file."""
    name: str = "imported"
    """The run that is made, with one checkpoint, of step 0."""
    tokenizer_file: str | None = None
    """r50k_base.tiktoken, GPT-2's tokenizer, where `path` has none; null: tiktoken's own download
    or cache."""

    def problems(self) -> list[str]:
        if self.path is None:
            return ["path: give the folder of a model of transformers', or llm.c's file"]
        return []


def export(c: ExportConfig, say: Callable[[str], None]) -> Path:
    """Writes `out`, which is there when all of it has been written and compared; its path.

    Raises:
        CheckpointError: no such checkpoint, or no such model in that format.
        ConfigError: something is at `out`, or a package is missing.
    """
    home = c.home_folder
    path = checkpoints.resolve(c.checkpoint, home)
    run, step = layout.split_checkpoint(path)
    name = run.rpartition("/")[2]
    ending = "" if c.to == "hf" else {"gguf": ".gguf", "llmc": ".bin"}[c.to]
    default = storage.join(layout.exports_folder(home), f"{name}-{step}{ending}")
    out = storage.new_file(c.out, default, c.overwrite)
    model, tokenizer = checkpoints.load_model(path), checkpoints.load_tokenizer(path)
    say(f"exporting {path}: {num_parameters(model.config) / 1e6:.1f}M parameters, {tokenizer.name}")
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as folder:
        made = Path(folder) / out.name
        if c.to == "hf":
            made.mkdir()
            text = card(path, name, model.config, checkpoints.load_state(path))
            huggingface.write(made, model, tokenizer, text.replace("FOLDER", out.name))
            if storage.exists(curve := storage.join(run, layout.LOSS_CURVE)):
                storage.download(curve, made / layout.LOSS_CURVE)
            found = huggingface.check(made, model, tokenizer, _samples(path))
            say(
                f"transformers opens it: logits differ by {found['logits_differ_by']:.1e} at most, "
                f"tokens of {found['texts']} texts are the same"
            )
        elif c.to == "gguf":
            ggml.write(made, model, tokenizer, name)
            found = ggml.check(made, model, tokenizer)
            say(f"gguf reads it back: {found['tensors']} tensors, {found['tokens']:,} tokens")
        else:
            llmc.write(made, model)
            _, state = llmc.read(made)
            weights = model.state_dict()
            if any(not weights[n].equal(state[n]) for n in weights.keys() & state.keys()):
                raise CheckpointError(f"{out}: it reads back as something else; please report this")
            say(f"read back: {len(state)} weights are the same")
        if out.exists():
            out.rename(Path(folder) / "before")
        made.rename(out)
    return out


def _samples(path: str) -> list[str]:
    """Some of the val texts that the run was measured on, where they are still there."""
    from manta.evaluate.documents import val_texts

    try:
        return val_texts(path)[:SAMPLES]
    except DataError:
        return []


def import_model(c: ImportConfig, say: Callable[[str], None]) -> str:
    """Makes the run `name`, with one checkpoint; its path.

    Raises:
        CheckpointError: what is at `path` is not a whole model, or one that Manta has not.
        ConfigError: there is such a run.
        DataError: no tokenizer, or one that Manta cannot have.
    """
    assert c.path is not None
    run = layout.run_folder(c.home_folder, c.name)
    if storage.list_files(run):
        raise ConfigError(f"name={c.name}: {run} is there already; give another name")
    source = Path(c.path).expanduser().absolute()
    tokenizer: Tokenizer | None = None
    if c.from_ == "hf":
        model, state, tokenizer = huggingface.read(source)
    else:
        model, state = llmc.read(source)
    if tokenizer is None:
        if model.vocab_size != R50K_SIZE:
            raise DataError(
                f"{source}: without a tokenizer.json, and with {model.vocab_size:,} ids, which are "
                f"not GPT-2's {R50K_SIZE:,}; get the model with its tokenizer.json"
            )
        tokenizer = tokenizers.named(R50K, c.tokenizer_file)
    if (model.vocab_size or 0) < tokenizer.vocab_size:
        raise CheckpointError(
            f"{source}: its tokenizer has {tokenizer.vocab_size:,} ids, its model only "
            f"{model.vocab_size:,}"
        )
    path = layout.checkpoint_folder(run, 0)
    with tempfile.TemporaryDirectory(prefix="manta-import-") as folder:
        names = checkpoints.write_model(Path(folder), model, state, tokenizer, TrainState())
        files = checkpoints.publish(path, Path(folder), names)
    checkpoints.commit(path, files)
    say(f"{model.family}, {num_parameters(model) / 1e6:.1f}M parameters, {tokenizer.name}: {path}")
    return path
