"""Tests of a GPU against the CPU. `python jobs/bench.py what=gpu` runs them, also where there is no
pytest: they are plain functions, without fixtures.

On a CPU what=gpu device=cpu runs it against itself, so that the tests are known to work before
there is a GPU.
"""

import contextlib
import os
import tempfile
import unittest
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# cuBLAS reads this when it starts; the last test needs it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
import torch.distributed as dist

DEVICE = os.environ.get("MANTA_TEST_DEVICE", "cuda" if torch.cuda.is_available() else "none")
if DEVICE == "none":
    raise unittest.SkipTest("no GPU is here (python jobs/bench.py what=gpu device=cpu tries these)")

from manta import layout
from manta.config import from_dict
from manta.evaluate.rows import Answer, Row
from manta.evaluate.worker import Worker
from manta.model import loss as losses
from manta.model.attention import fused_kernels
from manta.model.generate import Sampling, generate
from manta.model.gpt import GPT, ModelConfig
from manta.text import tokenizer
from manta.train.checkpoints import checkpoint
from manta.train.checkpoints.checkpoint import CheckpointConfig, TrainState
from manta.train.checkpoints.saver import Saver
from manta.train.patience import is_out_of_memory
from manta.train.step.device import Device, make_deterministic
from manta.train.step.engine import Engine
from manta.train.step.optimizer import OptimizerConfig, make_optimizer

PLACE = torch.device(DEVICE)
SHAPE = {"n_layer": 2, "n_embd": 64, "n_head": 4, "context_length": 64, "vocab_size": 300}
FAMILIES = {"gpt2": {"family": "gpt2"}, "modern": {"qk_norm": True, "n_kv_head": 2}}
# Without that epsilon, AdamW takes full steps where a gradient is only rounding (a key's bias).
ADAMW, MUON = OptimizerConfig(eps=1e-4), OptimizerConfig(kind="muon")


def need_gpu() -> None:
    if DEVICE != "cuda":
        raise unittest.SkipTest("it is about GPUs alone")


def model_of(family: str = "modern", place: torch.device = PLACE, **keys: Any) -> GPT:
    """A model with the same weights on every device."""
    torch.manual_seed(0)
    model = GPT(from_dict(ModelConfig, SHAPE | FAMILIES[family] | keys))
    for weight in model.parameters():  # large enough that attention and norms have something to do
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.1)
    with torch.no_grad():  # the vocabulary's padding
        model.embedding.weight[model.config.vocab_size :] = 0
        model.head.weight[model.config.vocab_size :] = 0
    return model.to(place)


def batch_of(step: int, rows: int = 4, length: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(step)
    tokens = torch.randint(SHAPE["vocab_size"], (rows, length + 1), generator=random)
    return tokens[:, :-1], tokens[:, 1:].contiguous()


def start_group() -> None:
    """Starts a process group of one process, which DeepSpeed needs."""
    if not dist.is_initialized():
        os.environ["LOCAL_RANK"] = "0"
        store = dist.FileStore(str(Path(tempfile.mkdtemp()) / "store"), 1)
        dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo", store=store, rank=0,
                                world_size=1)  # fmt: skip


def engine_of(model: GPT, stage: int, c: OptimizerConfig = ADAMW, dtype: Any = "fp32") -> Any:
    start_group()
    device = Device(PLACE, dtype, 1e12, DEVICE)
    return Engine(model, c, device, zero_stage=stage, micro_batch_size=2, grad_accum_steps=2)


def train(engine: Any, steps: range) -> list[float]:
    found = []
    for step in steps:
        engine.set_lr(1.0)
        tokens, targets = batch_of(step)
        with engine.casting_once():
            for index in range(2):
                part = slice(2 * index, 2 * index + 2)
                loss = engine(tokens[part].to(PLACE), targets[part].to(PLACE))
                engine.backward(loss, is_last=index == 1)
                found.append(loss.item())
        engine.step(1.0)
    return found


def weights_of(engine: Any) -> dict[str, torch.Tensor]:
    return engine.full_weights()


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        error = ((a[name] - b[name]).norm() / b[name].norm().clamp(min=1e-6)).item()
        assert error <= tolerance, f"{name} differs by {error:.2e}"


def test_two_steps_at_each_zero_stage_are_those_of_plain_torch_on_the_cpu() -> None:
    for family in FAMILIES:
        plain = model_of(family, torch.device("cpu"))
        optimizer = make_optimizer(plain, ADAMW)
        for step in range(2):
            tokens, targets = batch_of(step)
            for part in (slice(0, 2), slice(2, 4)):
                (plain(tokens[part], targets[part]) / 2).backward()
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        expected = {name: weight.detach() for name, weight in plain.named_parameters()}
        for stage in (0, 1, 2, 3):
            engine = engine_of(model_of(family), stage)
            train(engine, range(2))
            close(weights_of(engine), expected, 1e-4)


def test_bf16_at_each_zero_stage_is_near_fp32() -> None:
    expected = train(engine_of(model_of(), 0), range(3))
    for stage in (0, 1, 2):
        found = train(engine_of(model_of(), stage, dtype="bf16"), range(3))
        worst = max(abs(a - b) for a, b in zip(found, expected, strict=True))
        assert worst < 0.05, f"stage {stage}: {worst}"


def test_saving_loading_and_going_on_is_training_straight_on() -> None:
    made = tokenizer.train(["a text to train a tokenizer on"], 257)
    for c, stage in ((ADAMW, 0), (MUON, 0), (ADAMW, 2), (MUON, 2)):
        straight = engine_of(model_of(), stage, c)
        train(straight, range(4))
        first = engine_of(model_of(), stage, c)
        train(first, range(2))
        with tempfile.TemporaryDirectory() as folder:
            saver = Saver(folder, CheckpointConfig(), model_of().config, made, lambda line: None)
            saver.save(first, TrainState(step=2))
            saver.finish()
            path = layout.checkpoint_folder(folder, 2)
            checkpoint.verify(path)
            model = model_of(vocab_size=300)
            with torch.no_grad():
                for weight in model.parameters():
                    weight.zero_()
            checkpoint.load_weights(path, model)
            second = engine_of(model, stage, c)
            checkpoint.load_optimizer(path, second)
            train(second, range(2, 4))
            saver.close()
        close(weights_of(second), weights_of(straight), 0.0 if DEVICE == "cpu" else 1e-4)


def test_what_is_saved_is_what_is_there_while_training_goes_on() -> None:
    made = tokenizer.train(["a text to train a tokenizer on"], 257)
    engine = engine_of(model_of(), 1)
    train(engine, range(1))
    before = weights_of(engine)
    with tempfile.TemporaryDirectory() as folder:
        saver = Saver(folder, CheckpointConfig(), model_of().config, made, lambda line: None)
        saver.save(engine, TrainState(step=1))
        train(engine, range(1, 3))  # while it is written
        saver.finish()
        model = model_of()
        checkpoint.load_weights(layout.checkpoint_folder(folder, 1), model)
        saver.close()
    close({n: w.detach().cpu() for n, w in model.named_parameters()}, before, 0.0)


def test_the_document_mask_by_flex_attention_is_the_boolean_mask() -> None:
    need_gpu()
    documents = (torch.arange(64) // 11).expand(4, 64).to(PLACE)
    for family in FAMILIES:
        found = []
        for flex in (False, True):
            model = model_of(family)
            model.flex = flex
            tokens, targets = (t.to(PLACE) for t in batch_of(0))
            loss = model(tokens, targets, documents=documents)
            loss.backward()
            gradients = {n: p.grad.cpu() for n, p in model.named_parameters()}  # type: ignore
            found.append((loss.item(), gradients))
        assert abs(found[0][0] - found[1][0]) < 1e-4
        close(found[1][1], found[0][1], 1e-2)


def test_scores_and_greedy_texts_are_those_of_the_cpu() -> None:
    made = tokenizer.train(["a text to train a tokenizer on"], 257)
    rows = []
    for length in (20, 21, 22):
        tokens = tuple(range(10, 10 + length))
        answer = Answer(0, tokens[6:], tuple(range(5, length - 1)))
        rows.append(Row(tokens, None, (answer,)))
    for family in FAMILIES:
        here, there = (model_of(family, place).eval() for place in (PLACE, torch.device("cpu")))
        pairs = zip(Worker(here, made).score(rows), Worker(there, made).score(rows), strict=True)
        for ours, theirs in pairs:
            assert abs(ours.log_likelihood - theirs.log_likelihood) < 1e-2
            assert ours.is_greedy == theirs.is_greedy
        greedy = [
            list(generate(m, [5, 6, 7], 40, sampling=Sampling(temperature=0)))
            for m in (here, there)
        ]
        assert greedy[0] == greedy[1]
        drawn = [
            list(generate(m, [5, 6, 7], 8, sampling=Sampling(temperature=0.7), seed=3))
            for m in (here, there)
        ]
        assert drawn[0] == drawn[1]


def test_the_compiled_loss_is_the_plain_one() -> None:
    need_gpu()
    torch.manual_seed(0)
    head = losses.Head(128, 1000, 1024).to(PLACE)
    targets = torch.randint(1000, (500,), device=PLACE)
    targets[::7] = losses.IGNORED
    found = []
    for compiled in (False, True):
        head.compiled, head.weight.grad = compiled, None
        x = torch.randn(500, 128, generator=torch.Generator().manual_seed(1)).to(PLACE)
        x.requires_grad_()
        with torch.autocast("cuda", torch.bfloat16):
            loss = head(x, targets)
        loss.backward()
        assert x.grad is not None and head.weight.grad is not None
        found.append((loss.item(), {"x": x.grad, "weight": head.weight.grad}))
    assert abs(found[0][0] - found[1][0]) < 1e-4 * found[0][0]
    close(found[1][1], found[0][1], 1e-2)


def test_running_out_of_memory_is_recognised() -> None:
    need_gpu()
    total = torch.cuda.mem_get_info()[1]
    held = []
    try:
        for _ in range(64):
            held.append(torch.empty(total // 8, dtype=torch.uint8, device=PLACE))
        raise AssertionError("more than all memory was given out")
    except torch.OutOfMemoryError as e:
        assert is_out_of_memory(f"{type(e).__name__}: {e}")
    finally:
        held.clear()
        torch.cuda.empty_cache()


@contextlib.contextmanager
def counting_waits() -> Iterator[list[str]]:
    """Lists, while it is open, the calls that wait for the whole device, a stream or an event."""
    calls: list[str] = []
    places = [(torch.cuda, "synchronize"), (torch.cuda.Event, "synchronize"),
              (torch.cuda.Stream, "synchronize")]  # fmt: skip
    real = [(owner, name, getattr(owner, name)) for owner, name in places]
    try:
        for owner, name, function in real:

            def counted(*a: Any, _f: Any = function, _n: str = f"{owner}.{name}", **k: Any) -> Any:
                calls.append(_n)
                return _f(*a, **k)

            setattr(owner, name, counted)
        yield calls
    finally:
        for owner, name, function in real:
            setattr(owner, name, function)


def test_a_step_never_waits_for_the_whole_device() -> None:
    need_gpu()
    for stage in (0, 1, 2):
        for c in (ADAMW, MUON):
            engine = engine_of(model_of(), stage, c, "bf16")
            train(engine, range(2))  # what is done once
            with counting_waits() as calls:
                train(engine, range(2, 4))
            assert calls == [], f"stage {stage}, {c.kind}: {calls}"


def test_attention_in_training_takes_a_kernel_that_holds_no_scores() -> None:
    need_gpu()
    if torch.cuda.get_device_capability() < (8, 0):
        raise unittest.SkipTest("FlashAttention needs a GPU of capability 8.0 or more")
    for size in (64, 128):
        assert fused_kernels(PLACE, torch.bfloat16, size)
    engine = engine_of(model_of("gpt2", n_embd=256, n_head=4), 0, dtype="bf16")
    train(engine, range(1))
    with torch.profiler.profile() as profile:
        train(engine, range(1, 2))
    names = " ".join(event.key.lower() for event in profile.key_averages())
    assert "scaled_dot_product_flash" in names or "scaled_dot_product_cudnn" in names
    assert "_scaled_dot_product_attention_math" not in names


def test_a_gpu_that_is_seen_and_not_asked_for_is_left_alone() -> None:
    """A run on the CPU does not touch the GPU. (In a process of its own: DeepSpeed asks once per
    process.)"""
    need_gpu()
    import subprocess
    import sys

    code = f"""
import os
os.environ["MANTA_TEST_DEVICE"] = "cpu"
import runpy, sys
sys.path.insert(0, {str(Path(__file__).parents[2] / "platform")!r})
found = runpy.run_path({__file__!r})
found["train"](found["engine_of"](found["model_of"](), 1), range(1))
import torch
assert not torch.cuda.is_initialized(), "a run on the CPU has touched the GPU"
print("trained")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=90)
    assert done.stdout.strip().endswith("trained"), done.stderr[-500:]


def test_what_is_deterministic_gives_the_same_bits_twice() -> None:
    """This test is the last one, because it changes how the process computes."""
    make_deterministic()
    for family in FAMILIES:
        found = []
        for _ in range(2):
            engine = engine_of(model_of(family), 1, dtype="bf16")
            train(engine, range(3))
            found.append(weights_of(engine))
        close(found[0], found[1], 0.0)
