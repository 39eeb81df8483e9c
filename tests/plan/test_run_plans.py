"""Plans of runs: what is known is reckoned, what is not known is said, and nothing is invented."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.common import ROOT
from manta import layout, storage
from manta.config import load
from manta.errors import MantaError
from manta.model.cost import flops_per_token
from manta.plan import calibration, goodput, prices
from manta.plan.plan import Planned, keep, plan
from manta.plan.settings import PlanConfig, run_of
from manta.train.records import planned

A100 = f"cluster={ROOT}/clusters/a100x8.yaml"
GPT2 = str(ROOT / "jobs" / "configs" / "gpt2-124m.yaml")
TINY = ["model.n_layer=1", "model.n_embd=32", "model.n_head=2", "model.context_length=32",
        "model.vocab_size=300", "tokens_per_batch=128", "total_tokens=12800", "dtype=fp32",
        "threads_per_worker=1", "sample.prompts=[a]", "sample.tokens=2"]  # fmt: skip


def config(home: Path, *arguments: str) -> PlanConfig:
    return load(PlanConfig, [*arguments, f"home={home}"])


def planned_for(home: Path, *arguments: str) -> Planned:
    return plan(config(home, *arguments))


def text_of(made: Planned) -> str:
    return "\n".join(made.lines)


def test_a_run_on_a_cluster_by_a_stated_mfu(tmp_path: Path) -> None:
    made = planned_for(tmp_path, GPT2, A100, "mfu=0.4")
    tree = made.tree
    c = run_of(config(tmp_path, GPT2))
    rate = 8 * 0.4 * 312e12 / flops_per_token(c.expected_model, 1024)
    assert tree["tokens_per_second"] == pytest.approx(rate)
    assert tree["train_hours"] == pytest.approx(c.tokens_before(c.total_steps) / rate / 3600)
    assert made.can_run and tree["memory"]["fits"] is True
    assert tree["price_per_hour"] == pytest.approx(21.95764)
    assert tree["dollars"] == pytest.approx(21.95764 * tree["hours"])
    assert "read 2026-11-27" in text_of(made) and "8 x A100-SXM4-40GB" in text_of(made)


def test_what_is_not_known_is_said_and_not_guessed(tmp_path: Path) -> None:
    made = planned_for(tmp_path, GPT2, A100)
    for key in ("tokens_per_second", "hours", "dollars", "loss"):
        assert made.tree[key] is None
    text = text_of(made)
    assert "give mfu=" in text and "no scaling law is in the home" in text
    gcp = planned_for(tmp_path, GPT2, f"cluster={ROOT}/clusters/gcp-a100x8.yaml", "mfu=0.4")
    assert gcp.tree["dollars"] is None and gcp.tree["hours"] > 0
    assert "no price of a2-highgpu-8g in us-central1, on demand" in text_of(gcp)
    given = planned_for(
        tmp_path, GPT2, f"cluster={ROOT}/clusters/gcp-a100x8.yaml", "mfu=0.4", "price_per_hour=30"
    )
    assert given.tree["dollars"] == pytest.approx(30 * given.tree["hours"])


def test_spot_machines_have_their_own_price(tmp_path: Path) -> None:
    spot = f"cluster={ROOT}/clusters/a100x8-spot.yaml"
    made = planned_for(tmp_path, GPT2, spot, "mfu=0.4")
    assert made.tree["price_per_hour"] == pytest.approx(9.7315)
    on_demand = planned_for(tmp_path, GPT2, spot, "mfu=0.4", "spot=false")
    assert on_demand.tree["price_per_hour"] == pytest.approx(21.95764)


@pytest.mark.parametrize("name", ["kuberay/cluster.yaml", "skypilot.yaml", "local.yaml"])
def test_a_cluster_file_without_gpu_names_asks_for_them(tmp_path: Path, name: str) -> None:
    cluster = f"cluster={ROOT}/clusters/{name}"
    made = planned_for(tmp_path, GPT2, cluster, "mfu=0.4")
    assert made.tree["memory"]["fits"] is None
    assert "give gpu=NAME, one of A10" in text_of(made)
    assert "give memory_per_device=GIB" in text_of(made)
    told = planned_for(
        tmp_path, GPT2, cluster, "mfu=0.4", "gpu=H100 80GB HBM3", "memory_per_device=79.1"
    )
    assert told.tree["memory"]["fits"] is True and told.tree["hours"] > 0


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("a: [", "not YAML"), ("[]", "has no keys"), ("a: 1", "neither a file for `ray up`"),
        ("available_node_types: {a: 3}", "not as a cluster's file is"),
        ("available_node_types: {a: {resources: {CPU: 1}}}", "none of its node types has a GPU"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_clusters_is_said(tmp_path: Path, content: str, why: str) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(content)
    with pytest.raises(MantaError, match=why):
        planned_for(tmp_path, GPT2, f"cluster={file}")


def test_all_reasons_why_a_run_cannot_work_are_said_with_what_would(tmp_path: Path) -> None:
    made = planned_for(
        tmp_path, A100, "mfu=0.4", "model.preset=gpt2-1.5b", "model.vocab_size=50257",
        "num_workers=16", "gpus_per_worker=1", "tokens_per_batch=2097152", "micro_batch_size=64",
    )  # fmt: skip
    assert not made.can_run
    room, memory = made.tree["problems"]
    assert "num_workers=16" in room and "set num_workers=8" in room
    assert "would fit, the cheapest first: micro_batch_size=" in memory
    assert made.tree["machine"]["workers"] == 8  # the rest is planned for those that have room


def test_a_run_of_fewest_and_most_workers_is_planned_for_those_that_have_room(
    tmp_path: Path,
) -> None:
    made = planned_for(tmp_path, GPT2, A100, "num_workers=[2,16]")
    assert made.can_run and made.tree["machine"]["workers"] == 8
    assert made.tree["config"]["num_workers"] == [2, 16]  # as the run has it
    few = planned_for(tmp_path, GPT2, A100, "num_workers=12", "tokens_per_batch=786432")
    assert "set num_workers=8, which is planned here" in few.tree["problems"][0]


@pytest.mark.parametrize("content", [None, "{"])
def test_a_calibration_that_cannot_be_used_is_said_and_the_rest_is_planned(
    tmp_path: Path, content: str | None
) -> None:
    entry = calibration.Layout(
        1, "CPU, 1 threads", "fp32", calibration.now(), {"steps": 1.0}, {}, 0.1, 0.2, 1.0
    )
    path = Path(calibration.keep(str(tmp_path), entry, 1e9))
    tree = json.loads(path.read_text())
    tree["machine"]["cpu"] = "another"
    path.write_text(json.dumps(tree) if content is None else content)
    made = planned_for(tmp_path, *TINY)
    why = "measured on another machine" if content is None else "not valid JSON"
    assert why in text_of(made) and "jobs/bench.py what=calibrate" in text_of(made)
    assert made.tree["hours"] is None and made.tree["memory"]["fits"] is True
    if content is None:
        assert planned_for(tmp_path, *TINY, "mfu=0.3").tree["time"]["source"] == "mfu"


def test_a_gpu_whose_peak_is_not_known_is_said_with_those_that_are(tmp_path: Path) -> None:
    made = planned_for(tmp_path, GPT2, "gpu=H1", "memory_per_device=80", "mfu=0.4")
    assert made.tree["hours"] is None
    assert "no peak of H1 in bf16 is known" in text_of(made)
    assert "give gpu=NAME, one of A10, A100" in text_of(made)


def test_a_machine_without_a_calibration_says_how_to_get_one(tmp_path: Path) -> None:
    made = planned_for(tmp_path, *TINY)
    assert made.tree["hours"] is None
    text = text_of(made)
    assert "python jobs/bench.py what=calibrate threads_per_worker=1 dtype=fp32" in text
    assert "or give probe=20" in text
    assert planned_for(tmp_path, *TINY, "mfu=0.3").tree["time"]["source"] == "mfu"


def test_hours_come_from_the_calibration_and_first_from_a_probe(tmp_path: Path) -> None:
    step = {"products": 1e-9, "optimizer": 1e-9, "steps": 0.01}
    entry = calibration.Layout(
        1, "CPU, 1 threads", "fp32", calibration.now(), step, {"products": 3e-10}, 0.1, 0.2, 1.0
    )
    calibration.keep(str(tmp_path), entry, 1e9)
    made = planned_for(tmp_path, *TINY)
    assert made.tree["time"]["source"] == "calibration"
    assert made.tree["hours"] > made.tree["train_hours"] > 0
    assert "mfu=0.3 is not used" in text_of(planned_for(tmp_path, *TINY, "mfu=0.3"))
    probed = planned_for(tmp_path, *TINY, "probe=4")
    assert probed.tree["time"]["source"] == "probe"
    assert probed.tree["memory"]["measured_bytes"] > 0
    assert probed.tree["tokens_per_second"] == pytest.approx(
        128 / probed.tree["time"]["step_seconds"]
    )


def test_the_loss_is_that_of_the_law_in_the_home(tmp_path: Path) -> None:
    law = {"E": 1.8, "A": 480.0, "B": 2100.0, "alpha": 0.35, "beta": 0.37}
    fit = {
        "law": {key: {"value": value} for key, value in law.items()}, "count": "all",
        "points": [{"n": 1e6, "d": 1e9}, {"n": 1e8, "d": 2e10}],
    }  # fmt: skip
    storage.write_json(f"{layout.scaling_folder(str(tmp_path), 'mine')}/{layout.LAW}", fit)
    tree = planned_for(tmp_path, GPT2, A100).tree
    n, d = tree["model"]["parameters"], tree["tokens"]
    assert tree["loss"] == pytest.approx(1.8 + 480 / n**0.35 + 2100 / d**0.37)
    assert "its runs have 1e+06 to 1e+08 parameters" in tree["law"]
    with pytest.raises(MantaError, match="law=other"):
        planned_for(tmp_path, GPT2, A100, "law=other")
    storage.write_json(f"{layout.scaling_folder(str(tmp_path), 'more')}/{layout.LAW}", fit)
    assert "choose one with law= (mine, more)" in planned_for(tmp_path, GPT2, A100).tree["law"]


def test_the_run_takes_its_plan_along(tmp_path: Path) -> None:
    c = config(tmp_path, *TINY, "name=a/b")
    path = keep(c, plan(c))
    tree: dict[str, Any] = json.loads(Path(path).read_text())
    said: list[str] = []
    folder = layout.run_folder(str(tmp_path), "a/b")
    planned.adopt(str(tmp_path), "a/b", folder, tree["config"], said.append)
    assert said == [] and planned.read(folder) is not None
    assert tree["tokens_per_second"] is None  # the key that the alerts read


def test_prices_are_dated_and_have_a_source() -> None:
    listed = prices.load(None)
    for file in (ROOT / "clusters").glob("*.yaml"):
        value = yaml.safe_load(file.read_text())
        for it in (value.get("available_node_types") or {}).values():
            node = it["node_config"]
            if it["resources"].get("GPU") and (kind := node.get("InstanceType")):
                assert kind in listed, f"{file}: {kind} has no price"
    for kind, it in listed.items():
        assert it.gpu is not None and it.gpu_memory_gib is not None, kind
        if it.regions:
            assert it.read is not None and it.source is not None, kind


def test_a_file_of_prices_that_is_none_is_said(tmp_path: Path) -> None:
    file = tmp_path / "prices.yaml"
    file.write_text("p4d.24xlarge: {regions: {us-west-2: {on_demand: much}}}")
    for name in (file, tmp_path / "none.yaml"):
        with pytest.raises(MantaError, match=r"prices=.*prices.yaml shows how it is written"):
            planned_for(tmp_path, GPT2, A100, f"prices={name}")


# Goodput

positive = st.floats(0.01, 1e5)


@given(save=st.floats(0.01, 100), between=st.floats(1e3, 1e6))
@settings(deadline=None, max_examples=50)
def test_dalys_interval_costs_least(save: float, between: float) -> None:
    best = goodput.daly(save, between)

    def lost(interval: float) -> float:
        return goodput.losses(1e6, interval, save, 0.0, 0.0, 1 / between).total

    if best < between / 10:  # where failures are rare within an interval, as the formula wants
        assert lost(best) <= 1.02 * min(lost(best / 2), lost(best * 2))
        assert best == pytest.approx(math.sqrt(2 * save * between), rel=0.25)  # Young 1974


@given(trained=positive, interval=positive, pause=st.floats(0, 10), rate=st.floats(0, 1e-5))
@settings(deadline=None, max_examples=50)
def test_more_failures_lose_more(
    trained: float, interval: float, pause: float, rate: float
) -> None:
    few = goodput.losses(trained, interval, pause, 1.0, 20.0, rate)
    many = goodput.losses(trained, interval, pause, 1.0, 20.0, 2 * rate + 1e-9)
    assert many.total > few.total >= few.saves


def test_a_run_that_fails_faster_than_it_recovers_never_ends(tmp_path: Path) -> None:
    found = goodput.losses(1e5, 1e4, 1.0, 1.0, 600.0, 1 / 300)
    assert math.isinf(found.total)
    made = planned_for(tmp_path, GPT2, A100, "mfu=0.4", "failures_per_day=100000")
    assert made.tree["hours"] is None and made.tree["dollars"] is None
    assert "never ends" in text_of(made)
