"""The config of a fine-tuning."""

import dataclasses
import re
from typing import Any, Literal

from manta import layout, storage
from manta.config import PositiveFloat, RunName, config, find_problems
from manta.errors import ConfigError
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

    def problems(self) -> list[str]:
        # The model, and so the length of a sequence, is known once `base` is opened: see `run`.
        model = dataclasses.replace(self.model, context_length=self.seq_len or 1)
        found = PretrainConfig.problems(dataclasses.replace(self, model=model))
        if self.base is None:
            found.append("base is missing: give the run to start from, as in base=NAME")
        set_by_us = {
            "init.checkpoint": (self.init.checkpoint, None, "base"),
            "data.kind": (self.data.kind, "text", "kind"),
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
        checkpoint that it started from, whatever has been saved since.

        Raises:
            CheckpointError: there is no such checkpoint.
            ConfigError: its model and the other keys do not go together.
        """
        assert self.base is not None
        fields = [f.name for f in dataclasses.fields(PretrainConfig)]
        values: dict[str, Any] = {name: getattr(self, name) for name in fields}
        plain = PretrainConfig(**values)
        before = load_run_config(plain.run_folder)
        path = before.init.checkpoint if before is not None else None
        path = path or checkpoints.resolve(self.base, self.home_folder)
        model = checkpoints.load_model_config(path)
        data = self.data
        if data.tokenizer == type(data).tokenizer:
            data = dataclasses.replace(data, tokenizer=storage.join(path, layout.ENCODING))
        if data.name is None:
            stem = data.source.rstrip("/").rpartition("/")[2].partition(".")[0] or "data"
            run = layout.split_checkpoint(path)[0].rpartition("/")[2]
            name = re.sub(r"[^\w.-]+", "-", f"{stem}-{self.kind}-for-{run}").strip("-")
            data = dataclasses.replace(data, name=name)
        if self.kind == "chat":
            rows = self.seq_len or model.context_length
            data = dataclasses.replace(data, kind="chat", row_tokens=rows)
        made = dataclasses.replace(
            plain,
            data=data,
            model=dataclasses.replace(model, dropout=self.model.dropout),
            init=dataclasses.replace(self.init, checkpoint=path),
            document_mask=self.document_mask or self.kind == "chat",
        )
        if problems := find_problems(made):
            raise ConfigError(f"base={self.base}: {'; '.join(problems)}")
        return made
