"""A checkpoint as a judge: its verdicts are those of the probabilities, worked out by hand."""

import json
from pathlib import Path

import pytest
import torch

from manta.config import load
from manta.errors import DataError
from manta.judge.answers import Speaker
from manta.judge.answers import load as load_speaker
from manta.judge.checkpoint_judge import GRADES, SIDES, TOO_LONG, CheckpointJudge
from manta.judge.judge import judge
from manta.judge.settings import JudgeConfig
from manta.model.inference import inference
from manta.text.conversations import Turn

PROMPTS = ["Which?", "Which one of these, and why?" * 3, "How many?", "no" * 600]


def config(home: Path, *keys: str) -> JudgeConfig:
    common = [f"home={home}", f"questions={home}/questions.json", "device=cpu", "max_tokens=6"]
    return load(JudgeConfig, [*common, *keys])


def speaker_of(home: Path, run: str) -> Speaker:
    from manta.judge.answers import Model

    c = config(home)
    return load_speaker(Model.of(run, str(home)), c, torch.device("cpu"), None)


@pytest.mark.parametrize("run", ["base", "chat"])
@pytest.mark.parametrize("mode", ["score", "pairwise"])
def test_verdicts_are_those_of_the_probabilities(run: str, mode: str, judged_home: Path) -> None:
    speaker = speaker_of(judged_home, run)
    with inference(torch.device("cpu"), "fp32"):
        found = list(CheckpointJudge(speaker, mode, "fp32").verdicts(PROMPTS))
        assert found[-1] == (None, TOO_LONG)
        for prompt, (value, _) in zip(PROMPTS[:-1], found, strict=False):
            before = speaker.form.whole([Turn("user", prompt)])
            names, scores = (GRADES if mode == "score" else SIDES), []
            for name in names:
                after = speaker.tokenizer.encode(speaker.form.lead + name)
                logits = speaker.model(torch.tensor([before + after[:-1]]))[0]
                log = logits.double().log_softmax(-1)
                places = range(len(before) - 1, len(before) + len(after) - 1)
                scores.append(sum(log[i, t] for i, t in zip(places, after, strict=True)))
            shares = torch.stack(scores).softmax(0)
            values = torch.tensor([*names.values()], dtype=torch.float64)
            expected = (shares * values).sum() if mode == "score" else values[shares.argmax()]
            assert value == pytest.approx(float(expected), abs=1e-3)


def test_a_checkpoint_judges_its_own_and_others_answers(judged_home: Path) -> None:
    lines: list[str] = []
    c = config(judged_home, "checkpoint=[base,chat]", "judge=chat", "name=local")
    judge(c, lines.append)
    found = json.loads((judged_home / "judged" / "local" / "result.json").read_text())
    assert all(0 < found["scores"][model]["mean"] < 100 for model in ("base", "chat"))
    assert found["scores"]["base"]["again"] is None
    assert not any("repeats=2" in line for line in lines)
    again: list[str] = []
    judge(c, again.append)
    assert again == lines
    judge(config(judged_home, "checkpoint=[base,chat]", "judge=chat", "name=local",
                 "mode=pairwise"), lines.append)  # fmt: skip
    found = json.loads((judged_home / "judged" / "local" / "result.json").read_text())
    (pair,) = found["pairs"]
    assert pair["found"]["unjudged"] == 0


def test_prompts_that_do_not_fit_are_counted(judged_home: Path) -> None:
    """An answer of some length does not fit into the judge's context with its question."""
    lines: list[str] = []
    c = config(judged_home, "checkpoint=chat", "judge=base", "name=long", "max_tokens=560")
    with pytest.raises(DataError, match="nothing could be judged"):
        judge(c, lines.append)
    assert lines[-1] == f"12 judgements without a verdict: 12 {TOO_LONG}"
