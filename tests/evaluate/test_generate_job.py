"""Jobs that read a model: what they print where, and weights that are not numbers."""

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.checkpoints import MODELS, model_of, save
from helpers.common import ROOT
from helpers.evaluation import TEXT
from helpers.texts import TEXTS
from manta.config import load, to_yaml
from manta.errors import CheckpointError
from manta.evaluate.farm import Evaluator
from manta.evaluate.inference_settings import GenerateConfig
from manta.evaluate.surprise import SurpriseConfig, surprise
from manta.export.convert import ExportConfig, export
from manta.job import run_job
from manta.model.generate import Sampling, generate
from manta.model.gpt import GPT
from manta.text import tokenizer as tokenizers
from manta.text.tokenizer import Tokenizer
from manta.train.checkpoints import checkpoint


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tokenizers.train([TEXT], 300)


def ran(home: Path, job: str, *keys: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a job."""
    command = [sys.executable, str(ROOT / "jobs" / f"{job}.py"), f"home={home}", "checkpoint=run"]
    done = subprocess.run([*command, *keys], capture_output=True, check=False)
    return done.returncode, done.stdout.decode(), done.stderr.decode()  # (\r stays as it is)


def test_every_prompt_is_echoed_byte_for_byte(
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfdbinary: pytest.CaptureFixture[bytes],
) -> None:
    """The job's own main function, once for each prompt as an argument, and a process of its own
    with all of them in a file."""
    save(model_of(MODELS["llama, grouped"], tokenizer.vocab_size), tokenizer, tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])  # the job takes its own folder off it
    spec = importlib.util.spec_from_file_location("generate_job", ROOT / "jobs" / "generate.py")
    assert spec is not None and spec.loader is not None
    job = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(job)
    monkeypatch.setitem(sys.modules, "generate_job", job)
    keys = ["max_tokens=1", "device=cpu", f"home={tmp_path}", "checkpoint=run"]
    for text in TEXTS:
        monkeypatch.setattr(sys, "argv", ["generate.py", *keys, f"prompt={text}"])
        with pytest.raises(SystemExit) as ended:
            run_job(job.main, GenerateConfig)
        out = capfdbinary.readouterr().out
        assert (ended.value.code, out[: len(text.encode())]) == (0, text.encode()), text[:50]
    file = tmp_path / "prompts.yaml"
    file.write_text(to_yaml({"prompts": TEXTS}))
    _, out, _ = ran(tmp_path, "generate", *keys[:2], str(file))
    parts = out.encode().split(b"\n" + b"-" * 40 + b"\n")
    assert len(parts) == len(TEXTS) + 1 >= 66
    for text, part in zip(TEXTS, parts, strict=False):
        assert part[: len(text.encode())] == text.encode(), text[:50]


@pytest.mark.parametrize("more", [0, 40], ids=["as many ids", "more ids"])
def test_generate_prints_the_texts_and_nothing_else(
    tokenizer: Tokenizer, tmp_path: Path, more: int
) -> None:
    """A model may have more ids than its tokenizer, and like these best."""
    model = model_of(MODELS["llama, grouped"], tokenizer.vocab_size + more)
    with torch.no_grad():
        model.head.weight[tokenizer.vocab_size : tokenizer.vocab_size + more] *= 20
    save(model, tokenizer, tmp_path)
    sampling = Sampling(0.7, 20, 0.9, tokenizer.vocab_size)
    expected = [
        "The cat"
        + tokenizer.decode(
            list(
                generate(
                    model,
                    tokenizer.encode("The cat"),
                    12,
                    sampling=sampling,
                    stop=tokenizer.eot,
                    seed=5 + index,
                )
            )
        )
        for index in range(2)
    ]
    keys = ["prompt=The cat", "max_tokens=12", "temperature=0.7", "top_k=20", "top_p=0.9"]
    keys += ["device=cpu", "seed=5"]
    next_ = "next  python jobs/evaluate.py checkpoint=run\n"
    assert ran(tmp_path, "generate", *keys) == (0, expected[0] + "\n", next_)
    line = "-" * 40
    both = f"{expected[0]}\n{line}\n{expected[1]}\n{line}\n"
    assert ran(tmp_path, "generate", *keys, "num_samples=2") == (0, both, next_)
    # A newer checkpoint that is damaged is passed over, which is not part of the text.
    newer = tmp_path / "runs" / "run" / "checkpoints" / "step-00000009"
    newer.mkdir()
    (newer / "MANIFEST.json").write_text("{}")
    code, out, err = ran(tmp_path, "generate", *keys)
    assert (code, out) == (0, expected[0] + "\n")
    assert err.startswith("skipping a damaged checkpoint") and err.endswith(next_)


def spoilt(model: GPT, index: int, value: float) -> str:
    """Puts a value into one weight; returns the weight's name."""
    names = dict(model.named_parameters())
    name = list(names)[index % len(names)]
    with torch.no_grad():
        flat = names[name][: model.config.vocab_size].view(-1)  # without the padding
        flat[index % len(flat)] = value
    return name


@given(
    kind=st.sampled_from(list(MODELS)),
    index=st.integers(0, 10**6),
    value=st.sampled_from([float("nan"), float("inf"), -float("inf")]),
)
@settings(deadline=None, max_examples=6)
def test_one_weight_that_is_not_finite_is_named(
    tokenizer: Tokenizer,
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    index: int,
    value: float,
) -> None:
    home = tmp_path_factory.mktemp("home")
    model = model_of(MODELS[kind], tokenizer.vocab_size)
    name = spoilt(model, index, value)
    path = save(model, tokenizer, home)
    words = rf"^{path}/model\.safetensors: {name} has values that are NaN or infinite: "
    with pytest.raises(CheckpointError, match=words):
        checkpoint.load_model(path)
    with pytest.raises(CheckpointError, match=words):
        checkpoint.load_weights(path, model)


@pytest.mark.parametrize(
    "use",
    [
        lambda home, path: surprise(
            load(SurpriseConfig, [f"home={home}", "checkpoint=run", "text=The cat"])
        ),
        lambda home, path: export(
            load(ExportConfig, [f"home={home}", "checkpoint=run", f"out={home}/out"]), print
        ),
        lambda home, path: Evaluator("fp32", 1, 1, on_gpu=False).ready(path),
    ],
    ids=["surprise", "export", "evaluate"],
)
def test_a_model_that_is_not_finite_is_refused_and_leaves_nothing(
    use: Callable[[Path, str], Any], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = model_of(MODELS["gpt2"], tokenizer.vocab_size)
    spoilt(model, 3, float("nan"))
    path = save(model, tokenizer, tmp_path)
    there = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        use(tmp_path, path)
    assert sorted(tmp_path.rglob("*")) == there


def test_generate_refuses_a_model_that_is_not_finite_in_one_line(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = model_of(MODELS["gpt2"], tokenizer.vocab_size)
    spoilt(model, 3, float("nan"))
    save(model, tokenizer, tmp_path)
    code, out, err = ran(tmp_path, "generate", "device=cpu")
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1
