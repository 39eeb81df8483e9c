"""The config of a fine-tuning."""

import dataclasses
import re
from typing import Any, Literal

from manta import layout, storage
from manta.config import PositiveFloat, RunName, config, find_problems
from manta.data.recipe import DataConfig
from manta.errors import ConfigError
from manta.model.gpt import ModelConfig
from manta.text import sources
from manta.train.checkpoints import checkpoint as checkpoints
from manta.train.settings import PretrainConfig, load_run_config


@config
class FinetuneConfig(PretrainConfig):
    name: RunName = "chat"
    """Name of the run, and of its folder under HOME/runs."""
    base: str | None = None
    """A run's name, or a checkpoint's folder, to start from: its weights, model and tokenizer."""
    kind: Literal["chat", "text"] = "chat"
    """What is learnt. chat: the assistant's answers in conversations (data.kind=chat has the forms
    of the rows); text: every token of documents, as in pretraining."""
    epochs: PositiveFloat = 2.0
    """Length of the run, in passes over the data; it replaces total_tokens."""

    @classmethod
    def beneath(cls, tree: dict[str, Any]) -> dict[str, Any]:
        return {**super().beneath(tree), "data": {"kind": tree.get("kind", "chat")}}

    def problems(self) -> list[str]:
        # The model, and so the length of a sequence, is known once `base` is opened: see `run`.
        model = dataclasses.replace(self.model, context_length=self.seq_len or 1)
        found = PretrainConfig.problems(dataclasses.replace(self, model=model))
        if self.base is None:
            found.append("base is missing: give the run to start from, as in base=NAME")
        set_by_us = {
            "init.checkpoint": (self.init.checkpoint, None, "base"),
            "data.kind": (self.data.kind, self.kind, "kind"),
            "total_tokens": (self.total_tokens, type(self).total_tokens, "epochs"),
        }
        for key, (value, default, ours) in set_by_us.items():
            if value != default:
                found.append(f"{key}={value}: a fine-tuning takes {ours}=; omit {key}")
        if self.data.mix:
            found.append("data.mix is for jobs/pretrain.py: a fine-tuning has one source")
        return found

    def run(self) -> PretrainConfig:
        """The run that this fine-tuning is, but for its length. An earlier start of it keeps the
        weights that it started from, whatever has become of them.

        Raises:
            CheckpointError: there is no such checkpoint.
            ConfigError: a run of this name is something else's, or the base's model and the other
                keys do not go together.
        """
        assert self.base is not None
        fields = [f.name for f in dataclasses.fields(PretrainConfig)]
        plain = PretrainConfig(**{name: getattr(self, name) for name in fields})
        before = load_run_config(plain.run_folder)
        if before is None:
            path = checkpoints.resolve(self.base, self.home_folder)
            model = checkpoints.load_model_config(path)
            data = self._data(path, model)
        else:
            self._check_is_ours(before)
            path, model = str(before.init.checkpoint), before.model
            kept = {key: getattr(before.data, key) for key in ("name", "tokenizer", "row_tokens")}
            data = dataclasses.replace(self.data, **kept)
        made = dataclasses.replace(
            plain,
            data=data,
            model=model.with_dropout_of(self.model),
            init=dataclasses.replace(self.init, checkpoint=path),
            document_mask=self.document_mask or self.kind == "chat",
        )
        if problems := find_problems(made):
            raise ConfigError(f"base={self.base}: {'; '.join(problems)}")
        return made

    def _data(self, path: str, model: ModelConfig) -> DataConfig:
        """The data, made with the tokenizer of the checkpoint at `path`. `keep_tokenizer` copies
        it to the place that is given here."""
        data = self.data
        if data.tokenizer == type(data).tokenizer:
            sha256 = checkpoints.load_tokenizer(path).sha256
            file = layout.tokenizer_file(self.home_folder, sha256)
            data = dataclasses.replace(data, tokenizer=file)
        if self.kind == "chat":
            data = dataclasses.replace(data, row_tokens=self.seq_len or model.context_length)
        if data.name is None:
            stem = data.source.rstrip("/").rpartition("/")[2].partition(".")[0] or "data"
            template = data.template.rpartition("/")[2].removesuffix(".jinja")
            form = f"{template}-{data.row_tokens}" if self.kind == "chat" else self.kind
            run = layout.split_checkpoint(path)[0].rpartition("/")[2]
            name = re.sub(r"[^\w.-]+", "-", f"{stem}-{form}-for-{run}").strip("-")
            data = dataclasses.replace(data, name=name)
        return data

    def _check_is_ours(self, before: PretrainConfig) -> None:
        """Raises ConfigError unless the run of this name is this fine-tuning, started before."""
        there = f"name={self.name}: the run of this name"
        other = "give another name="
        if before.init.checkpoint is None:
            raise ConfigError(f"{there} did not start from a checkpoint; {other}")
        started = before.init.checkpoint
        places = (started, layout.split_checkpoint(started)[0])
        if not set(places) & set(checkpoints.candidates(str(self.base), self.home_folder)):
            raise ConfigError(f"{there} started from {started}, not from base={self.base}; {other}")
        theirs, ours = before.data, self.data
        for key in ("source", "kind", "template", "train_on"):
            was, now = getattr(theirs, key), getattr(ours, key)
            if key == "source":
                was, now = (place_of(value) for value in (was, now))
            if was != now:
                raise ConfigError(f"{there} trains on data.{key}={was}, not {now}; {other}")


def place_of(source: str) -> str:
    """A source, with the whole path of a file."""
    named = source == sources.PYTHON or source.startswith(sources.HUGGING_FACE)
    return source if named else storage.absolute(source)
