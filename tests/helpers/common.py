"""The text, the configs and the paths that tests of all rooms share."""

from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

SECRET = "hf_nobody-may-read-this"

# A corpus with some structure, so that a model has something to learn.
TEXT = "\n".join(
    f"The {animal} number {i} went to the {place} and saw {i % 7} {thing}s.\n"
    for i in range(400)
    for animal, place, thing in [
        (
            ("cat", "dog", "ray", "bird")[i % 4],
            ("sea", "hill", "town")[i % 3],
            ("fish", "tree")[i % 2],
        )
    ]
)


def tiny(home: Path, corpus: Path, *arguments: str) -> Any:
    """The config of a run that takes a moment: two layers, a few hundred tokens per step."""
    from manta.config import load
    from manta.train.settings import PretrainConfig

    return load(PretrainConfig, [*tiny_arguments(home, corpus), *arguments])


DATA = [
    "data.vocab_size=300",
    "data.document_bytes=500",
    "data.val_fraction=0.1",
]


def tiny_arguments(home: Path, corpus: Path) -> list[str]:
    return [f"data.source={corpus}", *DATA, *tiny_model_arguments(home)]


def tiny_model_arguments(home: Path) -> list[str]:
    return [
        f"home={home}",
        "model.n_layer=2",
        "model.n_head=2",
        "model.n_embd=32",
        "model.context_length=32",
        "tokens_per_batch=256",
        "total_tokens=1024",
        "eval.every=2",
        "eval.tokens=500",
        "checkpoint.every=2",
        "sample.tokens=4",
        "sample.prompts=[The cat]",
        "threads_per_worker=1",
        "dtype=fp32",
        "log_every=1",
    ]
