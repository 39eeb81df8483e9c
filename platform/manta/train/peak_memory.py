"""The most memory that a worker takes, as the machine sees it."""

import contextlib
import resource
import sys
from pathlib import Path

import torch

from manta.train.step.deepspeed_config import import_deepspeed

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """The most bytes that this process has taken on its device since this was made: on a GPU those
    of torch's tensors, on a CPU the growth of the process without DeepSpeed's libraries."""

    def __init__(self, device: torch.device):
        self._device = device
        import_deepspeed(device.type)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = 0
            return
        with contextlib.suppress(OSError):  # (the peak is then that of its whole life)
            _RESET.write_text("5")  # Linux: the peak becomes what there is now
        self._before = _of_process("VmRSS")

    @property
    def bytes(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return max(0, _of_process("VmHWM") - self._before)


def _of_process(key: str) -> int:
    """Bytes that this process has in memory (VmRSS), or had at its peak (VmHWM). Elsewhere than on
    Linux, its peak."""
    if _STATUS.is_file():
        for line in _STATUS.read_text().splitlines():
            if line.startswith(f"{key}:"):
                return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
