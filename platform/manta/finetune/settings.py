"""The config of a fine-tuning."""

import dataclasses
import re
from typing import Any, Literal

from manta import layout, storage
from manta.config import PositiveFloat, RunName, config, find_problems
from manta.data.recipe import DataConfig
from manta.errors import ConfigError, MantaError
from manta.model import trainable
from manta.model.gpt import ModelConfig
from manta.text import labels, sources
from manta.train.checkpoints import checkpoint as checkpoints
from manta.train.eval_settings import SampleConfig
from manta.train.settings import PretrainConfig, load_run_config

CLASSIFY = labels.KIND


@config
class FinetuneConfig(PretrainConfig):
    name: RunName = "chat"
    """Name of the run, and of its folder under HOME/runs."""
    base: str | None = None
    """A run's name, or a checkpoint's folder, to start from: its weights, model and tokenizer."""
    kind: Literal["chat", "text", "preference", "classify"] = "chat"
    """What is learnt. chat: the assistant's answers in conversations (data.kind=chat has the forms
    of the rows); text: every token of documents, as in pretraining; preference: to prefer the
    chosen to the rejected answers of pairs, by DPO (the base is a chat model); classify: the label
    of a text, by a new head on its last token (data.kind=classify has the forms of the rows)."""
    labels: tuple[str, ...] | Literal["auto"] = "auto"
    """Labels of kind=classify, in the order of the classifier's outputs; auto: those in the data,
    sorted. A row with another label is a bad row (data.on_bad_rows)."""
    epochs: PositiveFloat = 2.0
    """Length of the run, in passes over the data; it replaces total_tokens."""

    @classmethod
    def beneath(cls, tree: dict[str, Any]) -> dict[str, Any]:
        return {**super().beneath(tree), "data": {"kind": tree.get("kind", "chat")}}

    def problems(self) -> list[str]:
        # The model, and so the length of a sequence, is known once `base` is opened: see `run`.
        tied = self.model.tie_embeddings and self.kind != CLASSIFY
        length = self.seq_len or 1
        model = dataclasses.replace(self.model, context_length=length, tie_embeddings=tied)
        init = dataclasses.replace(self.init, checkpoint=self.base or "")
        found = PretrainConfig.problems(dataclasses.replace(self, model=model, init=init))
        if self.base is None:
            found.append("base is missing: give the run to start from, as in base=NAME")
        set_by_us = {
            "init.checkpoint": (self.init.checkpoint, None, "base"),
            "data.kind": (self.data.kind, self.kind, "kind"),
            "data.labels": (self.data.labels, "auto", "labels"),
            "total_tokens": (self.total_tokens, type(self).total_tokens, "epochs"),
            "dpo.reference": (self.dpo.reference, None, "base"),
        }
        for key, (value, default, ours) in set_by_us.items():
            if value != default:
                found.append(f"{key}={value}: a fine-tuning takes {ours}=; omit {key}")
        if self.data.mix:
            found.append("data.mix is for jobs/pretrain.py: a fine-tuning has one source")
        if self.kind == CLASSIFY:
            if self.eval.suites:
                found.append("eval.suites are for language models: omit them with kind=classify")
            if self.sample.prompts != type(self.sample)().prompts:
                found.append("sample.prompts: a classifier writes no text: omit them")
        elif self.labels != "auto":
            found.append(f"labels={list(self.labels)} are for kind=classify: omit them")
        return found

    def derived(self) -> dict[str, Any]:
        try:
            found = self.run().derived()
        except MantaError as e:
            return {"no more is known": str(e)}
        del found["steps"]  # these follow from the data
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
            path = checkpoints.resolve(self.base, self.home_folder, "base")
            model = checkpoints.load_model_config(path)
            if self.kind != CLASSIFY:
                checkpoints.refuse_other_sort(path, model)
            data, dtype, dpo = self._data(path, model), self.dtype, self.dpo
        else:
            self._check_is_ours(before)
            path, model = str(before.init.checkpoint), before.model
            kept = {key: getattr(before.data, key) for key in ("name", "tokenizer", "row_tokens")}
            data = dataclasses.replace(self.data, labels=self.labels, **kept)
            dtype = before.dtype if self.dtype == "auto" else self.dtype
            dpo = dataclasses.replace(self.dpo, reference=before.dpo.reference)
        if self.kind == CLASSIFY:  # its labels are known when the data are there
            model = dataclasses.replace(model, tie_embeddings=False)
            plain = dataclasses.replace(plain, sample=SampleConfig(prompts=()))
        made = dataclasses.replace(
            plain,
            data=data,
            dtype=dtype,
            dpo=dpo,
            model=model.with_dropout_of(self.model),
            init=dataclasses.replace(self.init, checkpoint=path),
            document_mask=self.document_mask or self.kind != "text",
        )
        problems = find_problems(made)
        problems += trainable.problems(made.trainable, model) + made.lora.conflicts(model)
        if problems:
            raise ConfigError(f"base={self.base}: {'; '.join(problems)}")
        return made

    def _data(self, path: str, model: ModelConfig) -> DataConfig:
        """The data, made with the tokenizer of the checkpoint at `path`. `keep_tokenizer` copies
        it to the place that is given here."""
        data, theirs = self.data, checkpoints.load_tokenizer(path)
        data = dataclasses.replace(data, labels=self.labels)
        if self.kind == "preference" and not isinstance(theirs.extras.chat_template, str):
            raise ConfigError(
                f"base={self.base} has no chat template, so it has no answers yet: fine-tune it on "
                "conversations first (kind=chat), and give that run as base"
            )
        if data.tokenizer == type(data).tokenizer:
            file = layout.tokenizer_file(self.home_folder, theirs.sha256)
            data = dataclasses.replace(data, tokenizer=file)
        if self.kind != "text":
            data = dataclasses.replace(data, row_tokens=self.seq_len or model.context_length)
        if data.name is None:
            stem = data.source.rstrip("/").rpartition("/")[2].partition(".")[0] or "data"
            template = data.template.rpartition("/")[2].removesuffix(".jinja")
            form = template if self.kind == "chat" else self.kind
            form += f"-{data.row_tokens}" if self.kind != "text" else ""
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
