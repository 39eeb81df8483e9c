"""Exports a checkpoint to another project's format, and imports a model from one."""

import contextlib
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal, cast

from pyarrow import fs as pafs
from torch import Tensor

from manta import layout, ownership, storage
from manta.config import RunName, config
from manta.data import labelled
from manta.data import manifest as manifests
from manta.errors import CheckpointError, ConfigError, DataError
from manta.export import adapter, ggml, huggingface, llmc
from manta.export.card import USE, card
from manta.lock import lock
from manta.model.families import num_parameters
from manta.model.gpt import GPT
from manta.model.shape import ModelConfig
from manta.report import report
from manta.storage import HomeConfig
from manta.terminal import line
from manta.text import tokenizer_r50k
from manta.text.tokenizer import R50K, R50K_SIZE, Tokenizer
from manta.train.checkpoints import checkpoint as checkpoints
from manta.train.checkpoints.checkpoint import TrainState

SAMPLES = 20  # texts of the run's own data, on which the tokenizers are compared


@config
class ExportConfig(HomeConfig):
    checkpoint: str = "quickstart"
    """A run's name or folder (its newest checkpoint), or a checkpoint's folder."""
    to: Literal["hf", "gguf", "llmc", "peft"] = "hf"
    """hf: a folder that plain transformers opens; gguf: a file for llama.cpp, fp32; llmc: a file
    for llm.c (gpt2 family, fp32). LoRA's adapters are merged into these. peft: a folder with the
    model without its adapters (base/) and the adapters in PEFT's format (adapter/)."""
    out: str | None = None
    """The folder or file to make; null: NAME-STEP in the home's exports/."""
    overwrite: bool = False
    """Replace what an earlier export wrote at `out`, if all of it is still as it was written."""


@config
class ImportConfig(HomeConfig):
    from_: Literal["hf", "llmc"] = "hf"
    """hf: a transformers folder (GPT-2, Llama, Qwen3, SmolLM2; safetensors); llmc: a .bin of
    llm.c."""
    path: str | None = None
    """The folder or file to import."""
    name: RunName = "imported"
    """Name of the run to make; it has one checkpoint, of step 0."""
    tokenizer_file: str | None = None
    """File of GPT-2's tokenizer, r50k_base.tiktoken, used if `path` has none; null: tiktoken's own
    download or cache."""

    def problems(self) -> list[str]:
        if self.path is None:
            return ["path: give the folder of a transformers model, or the file of an llm.c model"]
        return []


def export(c: ExportConfig, say: Callable[[str], None]) -> Path:
    """Writes `out`, which appears only once it is written whole and compared; returns its path.

    Raises:
        CheckpointError: the checkpoint does not exist, or the format has no such model.
        ConfigError: something is at `out`, or a package is missing.
    """
    home = c.home_folder
    path = checkpoints.resolve(c.checkpoint, home)
    run, step = layout.split_checkpoint(path)
    name = run.rpartition("/")[2]
    ending = {"gguf": ".gguf", "llmc": ".bin", "peft": "-peft"}.get(c.to, "")
    default = storage.join(layout.exports_folder(home), f"{name}-{step}{ending}")
    if checkpoints.load_model_config(path).is_recurrent:
        raise CheckpointError(
            f"{path}: an LSTM (model.family=lstm), for which transformers, llama.cpp and llm.c "
            "have no form; Manta itself generates with it (python jobs/generate.py)"
        )
    is_folder = c.to in ("hf", "peft")
    out = ownership.new_file(c.out, default, c.overwrite, is_folder=is_folder)
    labels, adapters = checkpoints.load_model_config(path).labels, checkpoints.load_adapter(path)
    if labels and not is_folder:
        raise CheckpointError(
            f"to={c.to}: {path} is a classifier of texts, and that format is for language models; "
            "use to=hf"
        )
    if c.to == "peft" and adapters is None:
        raise ConfigError(
            f"to=peft writes LoRA's adapters, and {path} has none: use to=hf, or train some, as in "
            "jobs/finetune.py base=RUN lora.rank=8"
        )
    model = checkpoints.load_model(path, classifies=bool(labels))
    tokenizer = checkpoints.load_tokenizer(path)
    assert isinstance(model, GPT)
    say(f"exporting {path}: {num_parameters(model.config) / 1e6:.1f}M parameters, {tokenizer.name}")
    with (
        storage.writing(str(out), "free some space there, or give another out="),
        tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as folder,
    ):
        made = Path(folder) / out.name
        if is_folder:
            made.mkdir()
            text = card(path, name, model.config, checkpoints.load_state(path))
            opened, plain = made, model
            if adapters is not None and c.to == "peft":
                opened = made / adapter.BASE
                plain = cast(GPT, checkpoints.load_model(path, classifies=bool(labels), bare=True))
                text = text.replace(USE, adapter.USE).replace("FOLDER", out.name)
                adapter.write(made, plain, adapters, tokenizer, text)
            else:
                huggingface.write(made, model, tokenizer, text.replace("FOLDER", out.name))
            if storage.exists(curve := storage.join(run, layout.LOSS_CURVE)):
                storage.download(curve, made / layout.LOSS_CURVE)
            if storage.exists(storage.join(run, layout.METRICS)):
                (made / layout.REPORT).write_text(report.build(path).page, encoding="utf-8")
            found = huggingface.check(opened, plain, tokenizer, _samples(path))
            say(
                f"transformers opens it: logits differ by {found['logits_differ_by']:.1e} at most, "
                f"tokens of {found['texts']} texts are the same"
            )
            if c.to == "peft":
                difference = adapter.check(made, model, tokenizer)
                say(f"PEFT opens it: logits differ by {difference:.1e} at most")
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
        if made.is_dir():
            ownership.record(made)
            if out.exists():
                out.rename(Path(folder) / "before")
        elif c.out is not None:
            listed = ownership.record(made)
            listed.replace(out.parent / listed.name)
        made.rename(out)
    return out


def _samples(path: str) -> list[str]:
    """Some of the val texts on which the run was measured; none if they are gone."""
    from manta.evaluate.documents import val_texts

    try:
        if not checkpoints.load_model_config(path).labels:
            return val_texts(path)[:SAMPLES]
        for manifest in map(manifests.load, checkpoints.load_state(path).datasets):
            texts = labelled.examples(manifest, labelled.VAL)[0][:SAMPLES]
            return [manifest.load_tokenizer().decode(ids[1:].tolist()) for ids in texts]
        return []
    except DataError:
        return []


def import_model(c: ImportConfig, say: Callable[[str], None]) -> str:
    """Makes the run `name`, with one checkpoint; returns the checkpoint's path.

    Raises:
        CheckpointError: `path` has no whole model, or one that Manta does not have.
        ConfigError: the run exists already.
        DataError: there is no tokenizer, or Manta cannot use it.
    """
    assert c.path is not None
    run = layout.run_folder(c.home_folder, c.name)
    checkpoints.check_place(c.home_folder, c.name)
    _check_is_free(run, c.name)
    if not storage.is_local(place := storage.absolute(c.path)):
        raise ConfigError(f"path={line(place)}: a model is imported from this machine; download it")
    source = Path(storage.filesystem(place)[1])
    tokenizer: Tokenizer | None = None
    if c.from_ == "hf":
        model, state, tokenizer = huggingface.read(source)
    else:
        model, state = llmc.read(source)
    if tokenizer is None:
        if model.vocab_size != R50K_SIZE:
            raise DataError(
                f"{source}: no tokenizer.json, and the model's {model.vocab_size:,} ids are "
                f"not GPT-2's {R50K_SIZE:,}; get the model with its tokenizer.json"
            )
        tokenizer = tokenizer_r50k.named(R50K, c.tokenizer_file)
    if (model.vocab_size or 0) < tokenizer.vocab_size:
        raise CheckpointError(
            f"{source}: its tokenizer has {tokenizer.vocab_size:,} ids, its model only "
            f"{model.vocab_size:,}"
        )
    path = layout.checkpoint_folder(run, 0)
    with (
        storage.writing(path, "free some space there, then run the same command again"),
        lock(storage.join(run, layout.RUN_LOCK), f"run {c.name}", say),
    ):
        if not _check_is_free(run, c.name):
            say(f"clearing what an interrupted import left in {run}")
            checkpoints.delete(path)
        try:
            _write(path, model, state, tokenizer)
        except BaseException:
            with contextlib.suppress(OSError):  # else the next import clears it
                checkpoints.delete(path)
            raise
    say(f"{model.family}, {num_parameters(model) / 1e6:.1f}M parameters, {tokenizer.name}: {path}")
    say(_about(tokenizer))
    return path


def _about(tokenizer: Tokenizer) -> str:
    """How the tokenizer treats documents, in one line."""
    names = {token.id: token.content for token in tokenizer.extras.added}
    found = [f"documents end with {line(names[tokenizer.eot])}"]
    if tokenizer.extras.bos is not None:
        found = [f"documents begin with {line(names[tokenizer.extras.bos])}", *found]
    if tokenizer.extras.ends:
        ends = ", ".join(names.get(token, str(token)) for token in tokenizer.ends)
        found.append(f"generation ends at {line(ends)}")
    if tokenizer.lacking:
        count = len(tokenizer.lacking)
        found.append(f"{count} of the 256 bytes have no token, and a text loses them")
    return "; ".join(found)


def _check_is_free(run: str, name: str) -> bool:
    """Whether nothing is in the folder of a run to be made. Raises ConfigError unless that, or
    what is there are parts of an import that never ended."""
    checkpoint = layout.checkpoint_folder(run, 0)[len(run) + 1 :]
    ours = re.compile(rf"{re.escape(checkpoint)}/({checkpoints.OWN_FILES.pattern})")
    found = {path for path in ownership.paths_in(run) if path != layout.RUN_LOCK}
    is_whole = f"{checkpoint}/{layout.MANIFEST}" in found
    is_folder = storage.info(run).type != pafs.FileType.File
    if is_whole or not is_folder or not all(ours.fullmatch(path) for path in found):
        raise ConfigError(f"name={name}: {run} is there already; give another name")
    return not found


def _write(path: str, model: ModelConfig, state: dict[str, Tensor], tokenizer: Tokenizer) -> None:
    """Writes a checkpoint of step 0, its manifest last."""
    with contextlib.ExitStack() as stack:
        if storage.is_local(path):
            folder = Path(storage.filesystem(path)[1])
            folder.mkdir(parents=True, exist_ok=True)
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="manta-import-")))
        names = checkpoints.write_model(folder, model, state, tokenizer, TrainState())
        checkpoints.commit(path, checkpoints.publish(path, folder, names))
