"""What a worker keeps of one run for the next: embeddings and head that were fitted to the data.

A lane trains many runs, most of which begin alike. What is kept changes no bit of them.
"""

import dataclasses
import pickle
import time
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from manta.data.stream import Reader
from manta.model.gpt import GPT
from manta.model.init import InitConfig, fit_bigrams
from manta.train.step.device import available_cpus

MOST_FITS = 4  # trials of a few batch sizes take turns, each of which reads in another order


@dataclasses.dataclass(frozen=True)
class _Fitted:
    """Embeddings and head after a fit, on the CPU."""

    embeddings: Tensor
    head: Tensor
    random: Tensor
    """The state of torch's random numbers after the fit."""


class Kept:
    """The fits of the runs that this process has trained."""

    def __init__(self) -> None:
        self._fits: dict[Hashable, _Fitted] = {}

    def fit(
        self, model: GPT, c: InitConfig, reader: Reader, threads: int, say: Callable[[str], None]
    ) -> None:
        """Fits embeddings and head to the counts of token pairs in the data, or takes those of an
        earlier fit that began alike. `threads`: of the run, which the fit leaves set."""
        if not c.bigram_steps:
            return
        vocab_size = model.config.vocab_size
        assert vocab_size is not None
        paths = tuple(manifest.path for manifest in reader.manifests)
        # (An order equals itself alone; its values are small.)
        order = pickle.dumps(dataclasses.asdict(reader.order))
        reads = (paths, order, reader.best_fit, reader.skip_corrupt)
        key = (torch.get_rng_state().numpy().tobytes(), model.config, c, reads)
        found = self._fits.get(key)
        if found is not None:
            with torch.no_grad():
                model.embedding.weight[:vocab_size] = found.embeddings.to(model.embedding.weight)
                model.head.weight[:vocab_size] = found.head.to(model.head.weight)
            torch.set_rng_state(found.random)
            return
        started = time.perf_counter()
        counts = torch.from_numpy(reader.count_pairs(vocab_size))
        torch.set_num_threads(available_cpus())  # this machine's other workers wait meanwhile
        loss = fit_bigrams(model, counts, c)
        torch.set_num_threads(threads)
        say(
            f"embeddings and head fitted to {counts.sum() / 1e6:.1f}M pairs of tokens: loss "
            f"{loss:.4f} as a bigram model, {time.perf_counter() - started:.1f} s"
        )
        while len(self._fits) >= MOST_FITS:
            del self._fits[next(iter(self._fits))]
        embeddings, head = (
            w.weight.detach()[:vocab_size].cpu().clone() for w in (model.embedding, model.head)
        )
        self._fits[key] = _Fitted(embeddings, head, torch.get_rng_state())
