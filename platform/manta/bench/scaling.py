"""Measures weak scaling: several workers, each with the work of one, against one worker alone.

Three things run in turn on this machine, all on the same threads: one worker alone; as many single
workers at once as are to be compared, which do not know of each other; and the same number of
workers that train together. The second one is the ceiling of the machine: what it loses against the
first, the workers take from each other (memory, cache, clock), and no communication can win it
back.
"""

import contextlib
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

from manta.bench.model import communication_seconds, in_worker
from manta.bench.settings import BenchConfig
from manta.bench.workers import Crew, crew
from manta.model.families import num_parameters
from manta.train.alone import Step
from manta.train.step.device import Device, available_cpus

ALONE, APART, TOGETHER = "alone", "apart", "together"


def scaling(c: BenchConfig) -> dict[str, Any]:
    """Times steps of the config's model; each worker has `tokens_per_batch` tokens in a step."""
    count = max(2, c.most_workers)
    backend = "nccl" if c.gpus_per_worker else "gloo"
    threads = c.threads_per_worker or max(1, available_cpus() // count)
    one = dataclasses.replace(c, num_workers=1, threads_per_worker=threads)
    many = dataclasses.replace(one, num_workers=count, tokens_per_batch=count * c.tokens_per_batch)
    with contextlib.ExitStack() as stack:
        start = functools.partial(_start, stack, backend)
        singles = [start(1, index, one) for index in range(count)]
        team = start(count, 0, many)
        setups: dict[str, list[Crew]] = {ALONE: singles[:1], APART: singles, TOGETHER: [team]}
        rates: dict[str, list[float]] = {name: [] for name in setups}
        for _ in range(c.rounds + 1):
            for name, crews in setups.items():
                seconds = _run(crews, c.steps_per_round)
                rates[name].append(sum(c.tokens_per_batch / s for s in seconds))
        team.tell("communication")
        answers = team.answers()
    return {
        **answers[0]["about"],
        "workers": count,
        "threads": threads,
        "zero_stage": c.zero_stage,
        "tokens_per_worker": c.tokens_per_batch,
        **{f"{name}_tokens_per_second": statistics.median(r[1:]) for name, r in rates.items()},
        "efficiencies": _ratios(rates[TOGETHER], rates[ALONE], count),
        "efficiencies_of_ceiling": _ratios(rates[TOGETHER], rates[APART], 1),
        "ceilings": _ratios(rates[APART], rates[ALONE], count),
        "fastest_tokens_per_second": {name: max(r[1:]) for name, r in rates.items()},
        "communication_seconds": [answer["seconds"] for answer in answers],
    }


def _ratios(rates: list[float], others: list[float], count: int) -> list[float]:
    """The ratio of each round to `count` times the other, without the first round."""
    return [a / b / count for a, b in zip(rates[1:], others[1:], strict=True)]


def _start(
    stack: contextlib.ExitStack, backend: str, count: int, first: int, c: BenchConfig
) -> Crew:
    made: Crew = stack.enter_context(crew(count, backend, first, in_worker, c, _ready))
    return made


def _run(crews: list[Crew], steps: int) -> list[float]:
    """Seconds of a step of each worker, of all these crews at once."""
    for each in crews:
        each.tell(steps)
    return [seconds for each in crews for seconds in each.answers()]


def _ready(c: BenchConfig, device: Device) -> Callable[[Any], Any]:
    """The function that answers a command: a number of steps with the seconds of one;
    "communication" with the seconds of it in a step."""
    step = Step(c, device)
    about = {
        "device": device.description,
        "dtype": device.dtype,
        "parameters": num_parameters(step.model),
        "compiled": step.compiled,
        "micro_batch_size": step.size,
        "seq_len": c.sequence_length,
    }

    def answer(command: int | str) -> Any:
        if command == "communication":
            found = [communication_seconds(step) for _ in range(c.rounds)]
            return {"about": about, "seconds": statistics.median(found)}
        assert isinstance(command, int)
        step.wait()
        started = time.perf_counter()
        for _ in range(command):
            step.run()
        step.wait()
        return (time.perf_counter() - started) / command

    step.run()
    return answer


def table(result: dict[str, Any]) -> str:
    count = result["workers"]

    def ratio(key: str) -> str:
        found = result[key]
        return (
            f"{statistics.median(found):>10.1%}  (median of {len(found)} rounds, "
            f"{min(found):.1%} to {max(found):.1%})"
        )

    def speed(name: str) -> str:
        return f"{result[f'{name}_tokens_per_second']:>10,.0f} tok/s"

    fastest = result["fastest_tokens_per_second"]
    alone, apart, together = (fastest[name] for name in (ALONE, APART, TOGETHER))
    least, most = min(result["communication_seconds"]), max(result["communication_seconds"])
    step = count * result["tokens_per_worker"] / result["together_tokens_per_second"]
    how = ", compiled" if result["compiled"] else ""
    return "\n".join(
        [
            f"device             {result['device']}, {result['dtype']}{how}",
            f"model              {result['parameters'] / 1e6:,.1f}M parameters, "
            f"{result['tokens_per_worker']:,} tokens of a step for each worker, ZeRO stage "
            f"{result['zero_stage']}",
            f"one worker alone   {speed(ALONE)}",
            f"{count} at once, apart   {speed(APART)}",
            f"{count} together         {speed(TOGETHER)}",
            f"together / alone   {ratio('efficiencies')}: weak scaling",
            f"together / apart   {ratio('efficiencies_of_ceiling')}: what communication leaves",
            f"apart / alone      {ratio('ceilings')}: this machine's ceiling",
            f"fastest rounds     {together / alone / count:>10.1%}  together / alone, "
            f"{together / apart:.1%} together / apart, {apart / alone / count:.1%} apart / alone "
            "(where other work disturbs some rounds)",
            f"communication      {least * 1e3:>10,.1f} ms of a step of {step * 1e3:,.1f} ms on the "
            f"worker with the least of it, {most * 1e3:,.1f} ms on the one with the most (with its "
            "wait for others)",
        ]
    )
