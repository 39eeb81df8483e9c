"""Answers and judgements through a real endpoint: what is kept, resumed, counted and said."""

import itertools
import json
import random
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from helpers.judge_server import Server
from manta.config import load
from manta.errors import ConfigError, DataError
from manta.judge import answers, asking
from manta.judge.judge import judge
from manta.judge.settings import JudgeConfig

KEY = "sk-nobody-may-read-this"
TWO = "checkpoint=[base,chat]"


def config(home: Path, name: str, *keys: str) -> JudgeConfig:
    common = [
        f"home={home}", f"questions={home}/questions.json", f"name={name}", "max_tokens=6",
        "device=cpu",
    ]  # fmt: skip
    if any(key.startswith("judge=http") for key in keys):
        common.append("endpoint.max_retries=0")
    return load(JudgeConfig, [*common, *keys])


def run(home: Path, name: str, *keys: str) -> tuple[list[str], dict[str, Any]]:
    """The lines that are said, and the figures."""
    lines: list[str] = []
    judge(config(home, name, *keys), lines.append)
    file = home / "judged" / name / "result.json"
    return lines, json.loads(file.read_text()) if file.exists() else {}


def rows(home: Path, name: str, file: str) -> list[dict[str, Any]]:
    path = home / "judged" / name / file
    assert path.stat().st_mode & 0o777 == 0o600
    return [json.loads(line) for line in path.read_text().splitlines()]


def noisy(seed: int, spread: float = 8.0) -> Any:
    """A judge whose score follows from the prompt, plus noise of its own, which depends on the seed
    and on how often it was asked the same."""
    times: Counter[str] = Counter()
    lock = threading.Lock()

    def reply(prompt: str) -> str:
        with lock:
            times[prompt] += 1
            draw = random.Random(f"{seed} {times[prompt]} {prompt}")
        score = 30 + 40 * random.Random(prompt).random() + draw.gauss(0, spread)
        return f"Score: {min(100, max(0, round(score)))}"

    return reply


def test_answers_are_kept_and_made_once(judged_home: Path, monkeypatch: Any) -> None:
    """Each model answers in its own form; a chat's template ends its answers."""
    lines, _ = run(judged_home, "alone", TWO)
    found = rows(judged_home, "alone", "answers.jsonl")
    assert Counter(row["model"] for row in found) == {"base": 12, "chat": 12}
    assert found[0]["question"] == "Where did animal 0 go?\n\nIt is a 0."
    assert len({row["key"] for row in found}) == 24 and lines[0].split() == [
        "answers", "base", "chat",
    ]  # fmt: skip
    monkeypatch.setattr(answers, "load", None)  # no model is loaded again
    run(judged_home, "alone", TWO)
    assert rows(judged_home, "alone", "answers.jsonl") == found


@pytest.mark.parametrize("count", [2, pytest.param(21, marks=pytest.mark.long)])
def test_the_same_answers_scored_twice_differ_by_less_than_is_said(
    count: int, judged_home: Path, server: Server
) -> None:
    """It holds in 19 of 20 cases; test_statistics.py has hundreds."""
    figures = []
    for seed in range(count):
        server.reply = noisy(seed)
        keys = [TWO, f"judge={server.address}", f"endpoint.model=judge-{seed}", "repeats=3"]
        lines, found = run(judged_home, "twice", *keys)
        figures.append(found["scores"])
        assert any("judged again, within" in line for line in lines)
        assert any(line.startswith("chat - base = ") for line in lines)
    for model in ("base", "chat"):
        pairs = [(a[model], b[model]) for a, b in itertools.pairwise(figures)]
        assert all(a["mean"] != b["mean"] and a["again"] < 15 for a, b in pairs)
        hits = sum(abs(a["mean"] - b["mean"]) < a["again"] for a, b in pairs)
        print(f"{model}: {hits} of {len(pairs)} second scorings are within what is said")
        assert hits >= 0.9 * len(pairs)
    first = figures[0]["base"]
    assert first["questions"] == 12 and first["asked"] == 36 and not first["missing"]
    assert len(server.prompts) == count * 2 * 12 * 3


def test_the_same_command_goes_on_after_a_kill(judged_home: Path, server: Server) -> None:
    """What is there is not asked again, but for half a line at the end, and requests that failed;
    another repeat, question or judge has judgements of its own."""
    keys = ["checkpoint=base", f"judge={server.address}", "repeats=2"]
    run(judged_home, "killed", *keys)
    assert len(server.prompts) == 24
    file = judged_home / "judged" / "killed" / "judgements.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[: whole.rindex(b"{") + 40])
    run(judged_home, "killed", *keys)
    assert len(server.prompts) == 25
    assert len([x for x in file.read_text().splitlines() if x.endswith("}")]) == 24
    run(judged_home, "killed", *keys)
    assert len(server.prompts) == 25
    run(judged_home, "killed", *keys, "repeats=3")
    assert len(server.prompts) == 25 + 12
    run(judged_home, "killed", *keys, "limit=5", "endpoint.temperature=0.5")
    assert len(server.prompts) == 25 + 12 + 10
    run(judged_home, "killed", *keys, "limit=5", "max_tokens=7")  # the answers differ
    assert len(server.prompts) == 25 + 12 + 10 + 10


def test_a_position_bias_is_found_in_pairs(judged_home: Path, server: Server) -> None:
    """This judge always takes what it sees first."""
    server.reply = lambda prompt: "A"
    lines, found = run(judged_home, "pairs", TWO, f"judge={server.address}", "mode=pairwise")
    ((pair),) = found["pairs"]
    assert pair["models"] == ["base", "chat"]
    assert pair["found"]["inconsistent"] == 12 and pair["found"]["shown_first"]["mean"] == 1
    assert lines[-2].endswith("position bias")
    assert any("within noise" in line for line in lines)
    shown = rows(judged_home, "pairs", "judgements.jsonl")
    assert Counter(map(tuple, (row["models"] for row in shown))) == {
        ("base", "chat"): 12, ("chat", "base"): 12,
    }  # fmt: skip


HTML = (200, {"content-type": "text/html"}, "<html><body>Sign in</body></html>")
BAD: dict[str, tuple[Any, str]] = {
    "prose": ("It depends on many things.", "12 no verdict in the reply"),
    "nothing": ("", "12 an empty reply"),
    "null": (None, "12 an empty reply"),
    "another scale": ("8/10", "12 no verdict in the reply"),
    "a list": ([{"type": "text"}], "not a reply of an OpenAI-compatible endpoint"),
    "no choices": ((200, {}, '{"choices": []}'), "12 an empty reply"),
    "an empty body": ((200, {}, ""), "not a reply of an OpenAI-compatible endpoint"),
    "HTML": (HTML, "not a reply of an OpenAI-compatible endpoint"),
    "no JSON": ((200, {}, "{"), "not a reply of an OpenAI-compatible endpoint"),
    "401": ((401, {}, '{"error": {"message": "no key sk-1"}}'), "not authorized, 401"),
    "403": ((403, {}, "no"), "not allowed, 403"),
    "404": ((404, {}, "no"), "not found, 404"),
    "429": ((429, {}, "slow down"), "too many requests, 429"),
    "500": ((500, {}, "oh"), "HTTP 500"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_judge_of_whom_nothing_can_be_used_ends_with_a_line(
    kind: str, judged_home: Path, server: Server, capfd: pytest.CaptureFixture[str]
) -> None:
    reply, words = BAD[kind]
    server.reply = lambda prompt: reply
    lines: list[str] = []
    c = config(judged_home, f"bad-{kind.replace(' ', '-')}", "checkpoint=base",
               f"judge={server.address}", "endpoint.parallel=1")  # fmt: skip
    with pytest.raises(DataError) as refused:
        judge(c, lines.append)
    assert "\n" not in str(refused.value)
    assert words in "\n".join([*lines, str(refused.value)])
    if words.startswith("12 "):  # replies that are none of a judge's are kept
        assert "nothing could be judged" in str(refused.value)
        assert len(server.prompts) == 12
    else:
        assert "none of 8 requests was answered" in str(refused.value)
        assert len(server.prompts) == 8


@pytest.mark.parametrize("bad", ["prose", "HTML", "500", "401"])
def test_bad_replies_among_good_ones_are_counted_and_bounded(
    bad: str, judged_home: Path, server: Server
) -> None:
    """Failed requests are asked again by the same command; replies without a verdict are not."""
    count = iter(range(1000))
    server.reply = lambda prompt: BAD[bad][0] if next(count) % 4 == 3 else "80"
    keys = ["checkpoint=base", f"judge={server.address}", "endpoint.parallel=1"]
    name = f"some-{bad}"
    lines, found = run(judged_home, name, *keys)
    scores = found["scores"]["base"]
    assert (scores["mean"], scores["missing"]) == (80, 3)
    assert (scores["least"], scores["most"]) == (60, 85)
    assert any(line.startswith("3 judgements without a verdict: 3 ") for line in lines)
    server.reply = lambda prompt: "80"
    _, again = run(judged_home, name, *keys)
    assert again["scores"]["base"]["missing"] == (3 if bad == "prose" else 0)
    assert len(server.prompts) == 12 + (0 if bad == "prose" else 3)


def test_a_judge_that_breaks_off_leaves_the_rest_for_the_same_command(
    judged_home: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "STOP", 4)
    count = iter(range(1000))
    server.reply = lambda prompt: "40" if next(count) < 5 else (503, {}, "")
    keys = ["checkpoint=base", f"judge={server.address}", "endpoint.parallel=1"]
    _, found = run(judged_home, "broke-off", *keys)
    assert found["without a verdict"] == {"HTTP 503": 4, asking.NOT_ASKED: 3}
    scores = found["scores"]["base"]
    assert (scores["questions"], scores["missing"], scores["mean"]) == (5, 7, 40)
    server.reply = lambda prompt: "40"
    _, again = run(judged_home, "broke-off", *keys)
    assert again["scores"]["base"]["missing"] == 0 and len(server.prompts) == 9 + 7


def test_a_missing_client_is_named_with_what_to_install(
    judged_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    keys = ["checkpoint=base", "judge=http://127.0.0.1:9/v1"]
    with pytest.raises(ConfigError, match=r"pip install 'manta\[judge\]'"):
        run(judged_home, "without-client", *keys)


def test_a_failed_request_is_retried_with_bounds(judged_home: Path, server: Server) -> None:
    """The client itself tries again, after the pause that the endpoint asks for."""
    count = iter(range(1000))
    soon = {"retry-after-ms": "1"}
    server.reply = lambda prompt: (429, soon, "{}") if next(count) % 3 else "70"
    keys = ["checkpoint=base", f"judge={server.address}", "endpoint.parallel=1", "limit=4"]
    _, found = run(judged_home, "retried", *keys, "endpoint.max_retries=2")
    assert found["scores"]["base"]["mean"] == 70 and len(server.prompts) == 1 + 3 * 3
    server.reply = lambda prompt: (500, soon, "{}")
    server.prompts.clear()
    with pytest.raises(DataError, match="nothing could be judged"):
        run(judged_home, "gave-up", *keys, "endpoint.max_retries=2")
    assert len(server.prompts) == 4 * 3


def test_a_judge_that_hangs_or_is_not_there_is_said_so(judged_home: Path, server: Server) -> None:
    done = threading.Event()
    server.reply = lambda prompt: done.wait(20) and "50"
    keys = ["checkpoint=base", "limit=2", "endpoint.timeout_seconds=0.2", "endpoint.model=m"]
    lines: list[str] = []
    with pytest.raises(DataError, match="nothing could be judged"):
        judge(config(judged_home, "hangs", *keys, f"judge={server.address}"), lines.append)
    done.set()
    assert "2 judgements without a verdict: 2 timed out" in lines
    lines.clear()
    with pytest.raises(DataError):
        judge(config(judged_home, "gone", *keys, "judge=http://127.0.0.1:9/v1"), lines.append)
    assert "2 judgements without a verdict: 2 no connection" in lines
    with pytest.raises(DataError, match=r"cannot say which models it has: no connection"):
        run(judged_home, "gone", "checkpoint=base", "judge=http://127.0.0.1:9/v1")


def test_a_key_is_sent_and_written_nowhere(
    judged_home: Path,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Not even where an endpoint repeats it; and no key is sent that was not asked for."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-another")
    monkeypatch.setenv("MY_KEY", KEY)
    count = iter(range(1000))
    echo = (401, {}, json.dumps({"error": {"message": f"wrong key: {KEY}"}}))
    server.reply = lambda prompt: f"Your key is {KEY}. Score: 50" if next(count) % 2 else echo
    keys = ["checkpoint=base", f"judge={server.address}"]
    lines, _ = run(judged_home, "key", *keys, "endpoint.key_env=MY_KEY")
    assert {*server.keys} == {f"Bearer {KEY}"}
    written = [p.read_text() for p in (judged_home / "judged" / "key").iterdir()]
    out, err = capfd.readouterr()
    assert KEY not in "".join([*written, *lines, out, err]) and "***" in err
    server.reply = lambda prompt: "50"
    run(judged_home, "no-key", *keys)
    assert "another" not in f"{server.keys}"
    with pytest.raises(ConfigError, match="key_env=NO_KEY: this environment variable is not set"):
        run(judged_home, "no-key", *keys, "endpoint.key_env=NO_KEY")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["judge=http://me:pw@localhost/v1"], "a password or key in an address"),
        (["judge=https://token@host/v1"], "without a name, password or query"),
        (["judge=https://host/v1?a=b"], "without a name, password or query"),
        (["judge=http://10.0.0.1/v1", "endpoint.key_env=K"], "without encryption"),
        (["judge=http:///v1"], "not an address"),
        (["judge=localhost:8000/v1"], "begins with http:// or https://"),
        (["judge=chat", "repeats=2"], "repeats=2: is for a judge behind an endpoint"),
        (["judge=chat", "endpoint.parallel=2"], "endpoint: is for judge=https"),
        (["judge=chat", "mode=pairwise"], "mode=pairwise: compares models"),
        ([TWO, "mode=pairwise"], "is for a judge; give judge="),
        (["checkpoint=[base,base]"], "base is there twice"),
        (["checkpoint=[]"], "at least one model"),
        (["questions="], "questions: give a .json or .jsonl file"),
    ],
    ids=str,
)
def test_keys_that_do_not_fit_are_refused_with_a_line(
    keys: list[str], words: str, judged_home: Path
) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        config(judged_home, "refused", "checkpoint=base", *keys)
    assert "pw" not in str(refused.value) and "token" not in str(refused.value)


def test_an_endpoint_with_several_models_asks_for_a_name(judged_home: Path, server: Server) -> None:
    server.models = ["one", "two"]
    keys = ["checkpoint=base", f"judge={server.address}", "limit=2"]
    with pytest.raises(DataError, match=r"has 2 models; give endpoint\.model=NAME: one, two"):
        run(judged_home, "several", *keys)
    _, found = run(judged_home, "several", *keys, "endpoint.model=two")
    assert found["judged"]["judge"] == f"two at {server.address}"


def test_another_file_at_json_stays(judged_home: Path, server: Server, tmp_path: Path) -> None:
    mine = tmp_path / "mine.json"
    mine.write_text('{"a": 1}')
    keys = ["checkpoint=base", f"judge={server.address}", "limit=2"]
    with pytest.raises(DataError, match="something else than earlier figures is there"):
        run(judged_home, "copy", *keys, f"json={mine}")
    assert mine.read_text() == '{"a": 1}'
    out = tmp_path / "out.json"
    for _ in range(2):
        _, found = run(judged_home, "copy", *keys, f"json={out}")
        assert json.loads(out.read_text()) == found
