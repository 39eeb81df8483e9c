"""A model card, made from the run: what the model is, its data, and how well it does."""

import html
import re
import tempfile
from pathlib import Path

from manta import arguments, layout, storage
from manta.evaluate import report
from manta.model.families import num_parameters
from manta.model.shape import ModelConfig
from manta.report.private import without_places
from manta.terminal import visible
from manta.train.checkpoints.checkpoint import TrainState
from manta.train.records.logbook import evaluations, read_metrics
from manta.train.settings import PretrainConfig

USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
tokens = tokenizer("Once", return_tensors="pt")
print(tokenizer.decode(model.generate(**tokens, max_new_tokens=40)[0]))
```"""


USE_CLASSIFIER = """```python
from transformers import pipeline

print(pipeline("text-classification", "FOLDER")("You have won"))
```"""
MEASURED = {
    "val_bpb": "val bits per byte",
    "val_accuracy": "val accuracy",
    "val_macro_f1": "val macro F1",
}


def card(path: str, name: str, c: ModelConfig, state: TrainState) -> str:
    """The card of the checkpoint at `path`, in Markdown, without what its run does not record."""
    run, step = layout.split_checkpoint(path)
    task, use = ("text-classification", USE_CLASSIFIER) if c.labels else ("text-generation", USE)
    size = f"{num_parameters(c):,} parameters"
    lines = [
        "---", "library_name: transformers", f"pipeline_tag: {task}", "---", "",
        f"# {_shown(name)}", "",
        f"A GPT of the {c.family} family, {size}, trained with Manta.", "",
        "| | |", "|---|---|",
        f"| blocks, channels, heads | {c.n_layer}, {c.n_embd}, {c.n_head} |",
        f"| context | {c.context_length:,} tokens |",
        f"| vocabulary | {c.vocab_size:,} tokens |",
    ]  # fmt: skip
    if c.labels:
        lines.append(f"| labels | {', '.join(map(_shown, c.labels))} |")
    records = read_metrics(storage.join(run, layout.METRICS))
    records = [r for r in records if r["step"] <= state.step]
    if state.datasets:
        names = [_shown(d.rpartition("/")[2]) for d in state.datasets]
        lines.append(f"| data | {', '.join(names)} |")
    if tokens := [r["tokens"] for r in records if r.get("tokens") is not None]:
        lines.append(f"| trained on | {max(tokens):,} tokens |")
        lines.append(f"| steps | {state.step:,} |")
    if found := evaluations(records, state.step):
        unit = " nats a text" if c.labels else " nats a token" if "val_bpb" in found[-1] else ""
        lines.append(f"| val loss | {float(found[-1]['val_loss']):.4f}{unit} |")
        for key, measured in MEASURED.items():
            if found[-1].get(key) is not None:
                lines.append(f"| {measured} | {float(found[-1][key]):.4f} |")
    lines += ["", "## Scores", "", *_scores(run, step)]
    if storage.exists(storage.join(run, layout.LOSS_CURVE)):
        lines += ["", "## Loss", "", f"![Loss against tokens]({layout.LOSS_CURVE})"]
    lines += ["", "## Use", "", use, ""]
    if storage.exists(config := storage.join(run, layout.RUN_CONFIG)):
        home = run.rpartition("/runs/")[0]
        lines += ["", "## Config", "", *_config(storage.read_bytes(config), home), ""]
    return "\n".join(lines)


def _shown(text: str) -> str:
    """A name that others chose, as text in Markdown: on one line, without HTML or markup."""
    line = html.escape(" ".join(visible(text).split()), quote=False)
    return re.sub(r"([\\`*_{}\[\]<>#|!])", r"\\\1", line)


def _config(text: bytes, home: str) -> list[str]:
    """The config in a fence that nothing in it closes. A card may be published, and where the model
    was made is private: a path is relative to the home, or the last name of it alone."""
    with tempfile.NamedTemporaryFile(suffix=".yaml") as file:
        Path(file.name).write_bytes(text)
        tree = arguments.read(PretrainConfig, [file.name])
    kept = {key: value for key, value in tree.items() if key not in ("home", "name")}
    content = visible(arguments.to_yaml(without_places(kept, home))).rstrip()
    longest = max((len(run) for run in re.findall("`+", content)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}yaml", content, fence]


def _scores(run: str, step: str) -> list[str]:
    """A table of this checkpoint's evaluations, with lm-eval's figures."""
    rows = []
    for scores in report.all_of(run, step):
        for task, metric, value, error in report.figures(scores["results"]):
            shown = f"{value:.4f}" + (f" ± {error:.4f}" if error else "")
            samples = scores["results"][task].get("samples", "-")
            rows.append(f"| {_shown(task)} | {metric} | {shown} | {samples} |")
    if not rows:
        return ["Not evaluated yet."]
    return ["| task | metric | value | documents |", "|---|---|---|---|", *sorted(rows)]
