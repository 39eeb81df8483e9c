"""Saving while training continues: a copy in memory, and threads that write it.

Training pauses only for the copy. Then a thread on each rank writes that rank's files and makes
sure that they are on the disk, the ranks tell each other whether that worked, and rank 0 writes the
manifest that makes the files a checkpoint. One save is under way at a time: the next one waits.

The copy is all the memory that a save needs. Files for an object store are first written to this
machine's temporary folder, one at a time, so $TMPDIR should be on a disk.
"""

import dataclasses
import errno
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from manta import layout, storage
from manta.errors import CheckpointError
from manta.messages import Saved
from manta.model.gpt import ModelConfig, unpadded
from manta.model.lora import LoraConfig
from manta.text.tokenizer import Tokenizer
from manta.train.checkpoints import checkpoint, fragments
from manta.train.checkpoints.checkpoint import CheckpointConfig, TrainState
from manta.train.checkpoints.host_memory import HostMemory, Spec
from manta.train.faults.signals import Asked
from manta.train.step.engine import Engine

# Errors that a retry cannot fix.
LASTING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)
ATTEMPTS = 6
FIRST_PAUSE = 1.0  # seconds before the second attempt; doubles before each further one


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The part of a checkpoint that a rank writes."""

    path: str
    state: TrainState
    share: fragments.State
    weights: dict[str, Tensor]
    """All weights, whole, on rank 0; {} on the other ranks."""
    waited: float
    """Seconds that training paused for the copy."""


class Saver:
    """Saves a run's checkpoints. All ranks must make it and call it alike."""

    def __init__(
        self,
        run: str,
        c: CheckpointConfig,
        model: ModelConfig,
        tokenizer: Tokenizer,
        say: Callable[[Any], None],
        beat: Callable[[], None] = lambda: None,
        adapters_of: LoraConfig = LoraConfig(),  # noqa: B008  # frozen
    ):
        """Makes the saver. It calls `beat()` at each sign of progress: storage that hangs gives
        none. `adapters_of`: the settings of the model's adapters."""
        self._run, self._c, self._model, self._tokenizer = run, c, model, tokenizer
        self._adapters_of = adapters_of
        self._say, self._beat = say, beat
        self._group: Any = dist.new_group(
            backend="gloo"
        )  # its own group, as the threads make the calls
        self._memory = HostMemory()
        self._has_room = self._has_told = False
        self._thread: threading.Thread | None = None
        self._last_time = time.monotonic()
        self._cost = 1.0  # seconds of the last save; a guess before the first one
        self.last_step: int | None = None
        self.problem: str | None = None
        """What went wrong in the last save that has ended, or None; the same on all ranks."""

    def save(self, engine: Engine, state: TrainState) -> float:
        """Copies the content of a checkpoint, and starts a thread that writes it. Returns the
        seconds that this took."""
        started = time.perf_counter()
        self.wait()
        if not self._has_room:  # on all ranks alike
            self._make_room(engine)
        share = fragments.copy_state(engine, self._memory.copy)
        weights = engine.full_weights(self._memory.copy)
        self._memory.wait()
        waited = time.perf_counter() - started
        self._last_time, self.last_step = time.monotonic(), state.step
        path = layout.checkpoint_folder(self._run, state.step)
        snapshot = Snapshot(path, dataclasses.replace(state), share, weights, waited)
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name="manta-saver")
        self._thread.start()
        return waited

    def asked(self) -> Asked:
        """Asks for a save (on rank 0) if checkpoints are saved by time and one is due."""
        seconds = self._c.seconds_between(self._cost)
        is_late = seconds is not None and time.monotonic() - self._last_time >= seconds
        return Asked.SAVE if is_late and dist.get_rank() == 0 else Asked.NOTHING

    @property
    def is_writing(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Waits until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def finish(self) -> None:
        """Waits for the last save. Raises CheckpointError (on all ranks) if it failed."""
        self.wait()
        if self.problem is not None:
            raise CheckpointError(f"{self.problem}; then run the same command again to resume")

    def close(self) -> None:
        """Waits until nothing is being written, and gives back the memory of the copies."""
        self.wait()
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None
        problem, self._has_room = self._memory.release(), False
        if problem is not None:
            self._say(f"the memory of the checkpoints' copies could not be unlocked: {problem}")

    def _make_room(self, engine: Engine) -> None:
        """Reserves memory for the copies, which later saves use again. It is one piece, so a dry
        run finds the size first."""
        specs: dict[str, Spec] = {}

        def note(name: str, values: Tensor) -> Tensor:
            specs[name] = Spec.of(values)
            return values

        fragments.copy_state(engine, note)
        engine.full_weights(note)
        self._memory.reserve(specs)
        self._has_room = True

    def _write(self, snapshot: Snapshot) -> None:
        try:
            self._write_with_all(snapshot)
        except Exception as e:  # a rank is gone: Ray ends the other ranks, too
            self.problem = f"step {snapshot.state.step} was not saved: {_in_a_line(e)}"

    def _write_with_all(self, snapshot: Snapshot) -> None:
        started = time.perf_counter()
        path, rank = snapshot.path, dist.get_rank()
        staging = Path(tempfile.mkdtemp(prefix="manta-")) if not storage.is_local(path) else None
        # An interrupted save may have left files in the folder.
        problem = _attempt(lambda: checkpoint.delete(path)) if rank == 0 else None
        problem = self._from_first(problem)
        written: dict[str, Any] = {}
        if problem is None:
            problem = _attempt(lambda: written.update(self._write_share(snapshot, staging)))
        everyone = self._to_first((problem, written, self._memory.problem))
        if rank == 0:
            problem = _first([found for found, *_ in everyone])
            self._tell_of_memory([unlocked for *_, unlocked in everyone])
            if problem is None:
                shares = [share for _, share, _ in everyone]
                problem = _attempt(lambda: _commit(path, shares))
            if problem is not None:
                _attempt(lambda: checkpoint.delete(path))  # makes room for the next save
        self.problem = self._from_first(problem)
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        step, seconds = snapshot.state.step, time.perf_counter() - started
        # Writing counts as cost: training continues meanwhile, but on two cores it loses about as
        # much time as the writing takes.
        self._cost = snapshot.waited + seconds
        if self.problem is not None:
            self.problem = f"step {step} was not saved: {self.problem}"
        if rank == 0 and self.problem is None:
            left = _attempt(lambda: checkpoint.prune(self._run, self._c))
            if left is not None:
                self._say(f"older checkpoints could not be deleted: {left}")
            self._say(
                f"saved step {step} to {path} ({seconds:.1f} s; training paused "
                f"{snapshot.waited:.2f} s)"
            )
            self._say(Saved(step, seconds, snapshot.waited))
        elif rank == 0:
            kept = checkpoint.find(self._run)
            last = f"the last checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
            self._say(f"{self.problem} ({last}); training continues")

    def _write_share(self, snapshot: Snapshot, staging: Path | None) -> dict[str, Any]:
        """Writes this rank's files; returns their entries for the manifest and the index."""
        rank, path = dist.get_rank(), snapshot.path
        folder = staging or Path(storage.filesystem(path)[1])
        (folder / layout.OPTIMIZER).mkdir(parents=True, exist_ok=True)
        name = f"{layout.OPTIMIZER}/{layout.rank_file(rank)}"
        entry = fragments.write(snapshot.share, folder / name)
        files = checkpoint.publish(path, folder, [name], self._beat)
        if rank == 0:
            weights = {n: unpadded(n, w, self._model) for n, w in snapshot.weights.items()}
            names = checkpoint.write_model(
                folder, self._model, weights, self._tokenizer, snapshot.state, self._adapters_of
            )
            files |= checkpoint.publish(path, folder, names, self._beat)
        return {"files": files, "state": entry}

    def _tell_of_memory(self, problems: list[str | None]) -> None:
        """Reports once on which workers copies from the GPU are slower than they could be."""
        ranks = [str(rank) for rank, problem in enumerate(problems) if problem is not None]
        if ranks and not self._has_told:
            self._has_told = True
            self._say(
                f"checkpoints: memory for the copies could not be locked on worker(s) "
                f"{', '.join(ranks)} ({_first(problems)}): training pauses longer at each save; "
                "allow more locked memory there (ulimit -l)"
            )

    def _to_first(self, value: Any) -> list[Any]:
        """The `value` (as JSON) of each rank, in the order of ranks, on rank 0; [] on the others:
        what grows with the number of ranks is on one of them. (A collective call.)"""
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        longest = torch.tensor(len(data))
        dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=self._group)
        padded = torch.zeros(int(longest), dtype=torch.uint8)
        padded[: len(data)] = data
        everyone: list[Tensor] = []
        if dist.get_rank() == 0:
            everyone = [torch.empty_like(padded) for _ in range(dist.get_world_size())]
        dist.gather(padded, everyone or None, dst=0, group=self._group)
        return [json.loads(each.numpy().tobytes().rstrip(b"\0")) for each in everyone]

    def _from_first(self, value: Any) -> Any:
        """Rank 0's `value`, on each rank. (A collective call.)"""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]


def _commit(path: str, shares: list[dict[str, Any]]) -> None:
    files = {name: entry for share in shares for name, entry in share["files"].items()}
    index = storage.encode_json(fragments.index_of([share["state"] for share in shares]))
    storage.write_bytes(storage.join(path, layout.OPTIMIZER_INDEX), index)
    files[layout.OPTIMIZER_INDEX] = {"size": len(index), "sha256": storage.sha256_of(index)}
    checkpoint.commit(path, files)


def _attempt(function: Callable[[], Any]) -> str | None:
    """Calls `function`, and calls it again after a pause if storage fails. Returns None, or the
    last error in one line."""
    pause = FIRST_PAUSE
    for attempt in range(1, ATTEMPTS + 1):
        try:
            function()
            return None
        except Exception as e:
            reason = getattr(e, "errno", None)
            lasts = not isinstance(e, OSError) or reason in LASTING
            # safetensors wraps the disk's error and drops its errno.
            if lasts or "No space left" in str(e) or attempt == ATTEMPTS:
                return _in_a_line(e)
        time.sleep(pause)
        pause *= 2
    return None


def _in_a_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text:
        return f"the disk is full ({text}): free some space, or lower checkpoint.keep"
    return text


def _first(problems: list[str | None]) -> str | None:
    return next((problem for problem in problems if problem is not None), None)
