"""Real steps on this machine, which a plan is corrected by."""

import dataclasses
import statistics
import time

from manta import config as configs
from manta.model.generate import Sampling, generate_batch
from manta.model.shape import ModelConfig
from manta.train.alone import Step, together
from manta.train.peak_memory import PeakMemory
from manta.train.settings import PretrainConfig
from manta.train.step.device import find_device, threads_of

WARM_UP = 2  # steps that are not counted: the first allocate memory, and choose kernels


@dataclasses.dataclass(frozen=True)
class Probed:
    """What was measured on the first worker."""

    device: str
    dtype: str
    micro_batch: int
    steps: int
    step_seconds: float
    """Median of the steps, those that warm up left out."""
    quiet_step_seconds: float | None
    """The same by the CPU time of a worker's only thread: what a machine that does nothing else
    would take. None: it has several threads or workers, or is a GPU."""
    first_step_seconds: float
    evaluated_token_seconds: float
    """Seconds of an evaluation, for each token of a worker's share."""
    sample_seconds: float
    """Seconds to complete all prompts once."""
    peak_memory_bytes: int
    busy: float
    """Wall time against CPU time of the threads; 1: nothing else ran. (1 on a GPU.)"""


def probe(c: PretrainConfig, model: ModelConfig, steps: int) -> Probed:
    """Runs `steps` steps of the run's model in as many workers as it has, on random tokens. They
    are processes of their own, as the memory of one is measured.

    Raises:
        MantaError: the model cannot run here.
    """
    backend = "nccl" if c.gpus_per_worker else "gloo"
    c = dataclasses.replace(c, model=model, num_workers=c.most_workers)
    found = together(c.workers, backend, _work, configs.to_dict(c), steps, apart=True)
    return Probed(**found)


def _work(tree: dict[str, object], steps: int) -> dict[str, object]:
    c = configs.from_dict(PretrainConfig, tree)
    on_gpu = bool(c.gpus_per_worker)
    threads = c.threads_per_worker or threads_of(c.workers)
    device = find_device(c.dtype, on_gpu, threads)
    memory = PeakMemory(device.torch_device)
    step = Step(c, device)
    times, used, own = [], [], []
    for _ in range(steps):
        started, cpu, thread = time.perf_counter(), time.process_time(), time.thread_time()
        step.run()
        step.wait()
        times.append(time.perf_counter() - started)
        used.append(time.process_time() - cpu)
        own.append(time.thread_time() - thread)
    peak = memory.bytes
    counted = slice(min(WARM_UP, steps - 1), None)
    tokens = step.size * c.sequence_length
    return {
        "device": device.description,
        "dtype": device.dtype,
        "micro_batch": step.size,
        "steps": steps,
        "step_seconds": statistics.median(times[counted]),
        "quiet_step_seconds": None
        if on_gpu or threads * c.workers > 1
        else statistics.median(own[counted]),
        "first_step_seconds": times[0],
        "evaluated_token_seconds": _evaluation(step) / tokens,
        "sample_seconds": _samples(c, step),
        "peak_memory_bytes": peak,
        "busy": 1.0 if on_gpu else sum(times) * threads / sum(used),
    }


def _evaluation(step: Step) -> float:
    """Seconds of an evaluation's micro batch: the median of three after one."""
    tokens, targets = step.batch.to(step.device.torch_device)
    times = []
    for _ in range(4):
        started = time.perf_counter()
        with step.engine.evaluating():
            step.engine(tokens, targets, reduction="none")
        step.wait()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def _samples(c: PretrainConfig, step: Step) -> float:
    """Seconds to complete the config's prompts, whose tokens are made up."""
    count = len(c.sample.prompts)
    if not count or step.model.labels:
        return 0.0
    started = time.perf_counter()
    with step.engine.evaluating():
        sampling = Sampling(c.sample.temperature, c.sample.top_k)
        prompts = [[1, 2, 3, 4] for _ in range(count)]
        for _ in generate_batch(
            step.engine.module, prompts, c.sample.tokens, seeds=[*range(count)], sampling=sampling
        ):
            pass
    step.wait()
    return time.perf_counter() - started
