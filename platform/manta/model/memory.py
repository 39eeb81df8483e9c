"""Memory of a training worker: what it holds, and its peak, from the config alone. Pure
arithmetic; nothing is allocated.

Manta trains with fp32 weights, fp32 gradients and fp32 optimizer state; bf16 is torch's autocast.
What DeepSpeed (0.19.8) holds on top comes from its source (runtime/engine.py,
zero/stage_1_and_2.py, zero/stage3.py) and from measurement: manta/bench/stages.py compares, and
tests/model/test_cost.py checks each stage. With P parameters and W workers, in values of 4 bytes,
if all weights learn (the weights that do not count in the first column alone):

    stage   weights    master copy   gradients   AdamW    at once, to reduce the gradients
    0       P          -             P           2P       P: flat copies, with several workers
    1       P          P/W           P           2P/W     P/W, and twice the bucket
    2       P          P/W           P/W *       2P/W     P/W *, and twice the bucket
    3       P/W        P/W           P/W         2P/W     P (all weights, gathered), the bucket, and
                                                          twice the largest weight

* Whole tensors: if a tensor lies in several workers' shares, each of these workers holds its whole
gradient. Mostly this is the embedding, which is alone in its group of parameters.

So stages 1 and 2 cost a single worker more than stage 0 does, and stage 1 costs two workers no less
than stage 0.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

from manta.errors import ConfigError
from manta.model.activations import BF16, FP32, Activations, DeviceType, Dtype, activations
from manta.model.cost import NO_ADAPTERS, Weight, adapters, learning, weights
from manta.model.groups import GROUPS
from manta.model.lora import LoraConfig
from manta.model.recomputation import Recompute
from manta.model.shape import ModelConfig
from manta.model.trainable import Trainable

GIB = 1 << 30
# Share of its card that a worker may use. CUDA's context, and pieces that CUDA's allocator cannot
# join, take the rest.
USABLE = 0.92
# For what is not counted: cuBLAS's workspaces, NCCL's buffers. An assumption, not a measurement.
ALLOWANCE = GIB // 4
# DeepSpeed's own settings, in values.
PREFETCH = 50_000_000  # stage3_prefetch_bucket_size
PERSISTENT = 100_000  # stage3_param_persistence_threshold: smaller weights are not sharded
LIVE = 1_000_000_000  # stage3_max_live_parameters: gathered at once
# Manta's default of engine.reduce_bucket_mb and engine.allgather_bucket_mb. DeepSpeed's own default
# is 500 million values. A worker holds a buffer of that size: more than a small model.
BUCKET_MB = 64
BUCKET = BUCKET_MB * 10**6 // FP32  # the same, in values


@dataclasses.dataclass(frozen=True)
class Setup:
    """The settings that decide a worker's memory. `model` has its vocabulary."""

    model: ModelConfig
    seq_len: int
    micro_batch_size: int = 1
    num_workers: int = 1
    zero_stage: Literal[0, 1, 2, 3] = 0
    dtype: Dtype = "bf16"
    optimizer_kind: Literal["adamw", "muon"] = "adamw"
    activation_checkpointing: Recompute = "none"
    trainable: Trainable = "all"
    """Weights that learn. The others have no gradient, master copy or optimizer's state."""
    lora: LoraConfig = NO_ADAPTERS
    """The adapters, if these learn in place of the model's own weights."""
    offload_optimizer: bool = False
    """Whether the optimizer is in the host's memory; stages 1 to 3."""
    offload_parameters: bool = False
    """Whether the parameters are in the host's memory; stage 3."""
    overlap_comm: bool = False
    """Whether reducing overlaps with backward, which takes a second bucket at stages 1 and 2."""
    reduce_bucket: int = BUCKET
    """Number of gradient values reduced at once; stages 1 to 3 hold a buffer for them."""
    device: DeviceType = "cuda"
    compiled: bool = False
    """Whether blocks and loss are compiled. Compiled blocks are counted as if they were not."""


@dataclasses.dataclass(frozen=True)
class Costs:
    """Bytes of one worker, all on its device except `host`."""

    weights: int
    """The model's own weights, or the worker's share of them."""
    master_weights: int
    """DeepSpeed's flat copy of this worker's share, which the optimizer works on."""
    gradients: int
    """Gradients held while micro batches accumulate."""
    optimizer_state: int
    buffers: int
    """DeepSpeed's buffers, held with the gradients."""
    host: int
    """Offloaded bytes, in the host's memory."""
    activations: Activations
    working: int
    """DeepSpeed's temporary memory from the end of the forward pass on: the weights of stage 3."""
    reducing: int
    """The same in the backward pass alone, while activations are held: reducing gradients."""
    stepping: int
    """Peak after the activations are gone: reducing the last gradients, the optimizer's step."""

    @property
    def states(self) -> int:
        """Bytes held from step to step; gradients and buffers, from micro batch to micro batch."""
        return (
            self.weights
            + self.master_weights
            + self.gradients
            + self.optimizer_state
            + self.buffers
        )

    @property
    def total(self) -> int:
        """Bytes held after a forward, without those held only for a moment."""
        return self.states + self.activations.held

    @property
    def temporary(self) -> int:
        """The peak beyond `total`."""
        at_loss = self.activations.at_loss
        in_backward = self.activations.in_backward + self.reducing
        in_pass = max(at_loss, in_backward) + self.working
        return max(in_pass, self.stepping - self.activations.held)

    @property
    def peak(self) -> int:
        """The most bytes held at once, with the allowance."""
        return self.total + self.temporary + ALLOWANCE

    def parts(self) -> dict[str, int]:
        """The parts of the peak, in bytes, and what is on the host."""
        return {
            "weights": self.weights + self.master_weights,
            "gradients": self.gradients,
            "optimizer state": self.optimizer_state,
            "DeepSpeed's buffers": self.buffers,
            "activations": self.activations.held,
            "temporary": self.temporary,
            "allowance": ALLOWANCE,
            "peak of a step": self.peak,
            "on the host": self.host,
        }

    def lines(self) -> list[str]:
        """Lists the parts of the peak in GiB, for --dry-run."""
        return [f"{name:<20}{gib(size):>9}" for name, size in self.parts().items() if size]


def costs(s: Setup) -> Costs:
    """Computes the bytes of each worker; where workers differ, those of the first."""
    c, stage, W = s.model, s.zero_stage, s.num_workers
    tensors = weights(c) + adapters(c, s.lora)
    learnt = learning(c, s.trainable, s.lora)
    P, G = (FP32 * sum(w.total for w in those) for those in (tensors, learnt))
    largest = FP32 * max(w.numel for w in tensors)
    share = G if stage == 0 else -(-G // W)
    matrices = FP32 * sum(w.total for w in learnt if w.group == "matrices") * share // G
    state = 2 * share - (matrices if s.optimizer_kind == "muon" else 0)
    bucket = FP32 * s.reduce_bucket
    flat = min(bucket, G)  # a bucket's content, copied end to end to be reduced
    offload = s.offload_optimizer and stage > 0

    held_weights, master, host, buffers, working, reducing = P, share, 0, 0, 0, 0
    if stage == 0:
        master, gradients = 0, G
        stepping = G if W > 1 else 0  # buckets being reduced (train/step/reducer.py)
        if s.optimizer_kind == "muon":  # two fp32 directions, all ranks' updates, this rank's
            stepping = max(stepping, 2 * matrices + matrices + matrices // W)
    elif stage == 1:
        gradients = G
        buffers = bucket * (2 if s.overlap_comm else 1)
        stepping = flat + FP32 * _touched(learnt, W)
    elif stage == 2:
        gradients = FP32 * _touched(learnt, W)
        # The first gradients are reduced while nearly all activations are held, the last ones when
        # they are gone.
        reducing = bucket * (2 if s.overlap_comm else 1) + flat
        stepping = reducing + gradients
    else:
        small = FP32 * sum(w.total for w in tensors if w.numel < PERSISTENT)
        held_weights = -(-P // W) + (small if W > 1 else 0)
        gradients, buffers = share, bucket
        reducing = flat
        if W > 1:  # a single worker's share is already the whole
            # When backward begins, the forward pass has gathered all weights, as far as they stay.
            # The rest is gathered again, ahead of its use. The largest, with its gradient, is
            # whole twice while the workers' parts of it are joined or summed.
            live = min(P, FP32 * LIVE)
            working = live + min(P - live, FP32 * PREFETCH) + 2 * largest
        stepping = share
    if s.optimizer_kind == "muon" and stage:
        stepping = max(stepping, 4 * matrices)
    if offload:
        host = master + state + share  # the gradients that the optimizer reads
        if stage == 3:
            host += share  # the summed gradients
        else:
            transit = FP32 * max(w.numel for w in learnt)
            host += share + transit  # new weights and a gradient in transit
            buffers += transit
            if stage == 2:
                host += share  # the summed gradients
        master = state = 0
        gradients = gradients if stage == 1 else 0
        stepping = flat if stage < 3 else 0
    if s.offload_parameters and stage == 3:
        host += -(-P // W)
        held_weights -= -(-P // W)
    return Costs(
        weights=held_weights,
        master_weights=master,
        gradients=gradients,
        optimizer_state=state,
        buffers=buffers,
        host=host,
        activations=activations(
            c,
            s.micro_batch_size,
            s.seq_len,
            s.dtype,
            s.activation_checkpointing,
            s.device,
            compiled_loss=s.compiled,
            trainable=s.trainable,
            lora=s.lora,
        ),
        working=working,
        reducing=reducing,
        stepping=stepping,
    )


def cache_bytes(c: ModelConfig, tokens: int, dtype: Dtype) -> int:
    """Computes the bytes of what a model remembers of a text of so many tokens: keys and values, or
    an LSTM's state, which has one size."""
    if c.is_recurrent:
        return 2 * c.n_layer * c.n_embd * FP32
    return 2 * c.n_layer * c.kv_heads * c.head_size * tokens * (BF16 if dtype == "bf16" else FP32)


def _touched(tensors: list[Weight], num_workers: int) -> int:
    """Counts the values of all tensors that have a part in the first worker's share. Each of the
    optimizer's groups is split by itself."""
    total = 0
    for group in GROUPS:
        ours = [w for w in tensors if w.group == group]
        if group == "matrices":  # block by block
            blocks = math.gcd(*(w.count for w in ours))
            sizes = [w.numel for w in ours for _ in range(w.count // blocks)] * blocks
        else:
            sizes = [w.numel for w in ours for _ in range(w.count)]
        share, found = sum(sizes) / num_workers, 0
        for size in sizes:
            found += size if found < share else 0
        total += found
    return total


def largest_micro_batch(s: Setup, memory_bytes: float, choices: Sequence[int]) -> int:
    """Returns the largest of `choices` whose peak fits in `memory_bytes`, whatever
    `s.micro_batch_size` is.

    Raises:
        ConfigError: not even the smallest of `choices` fits; the message says what it needs and
            what would make it fit.
    """
    fitting = [n for n in choices if _peak(s, micro_batch_size=n) <= memory_bytes]
    if fitting:
        return max(fitting)
    least = min(choices)
    found = costs(dataclasses.replace(s, micro_batch_size=least))
    parts = ", ".join(
        f"{name} {size / GIB:.1f}"
        for name, size in {
            "weights": found.weights + found.master_weights,
            "gradients": found.gradients,
            "optimizer state": found.optimizer_state,
            "buffers": found.buffers,
            "activations": found.activations.held,
            "temporary": found.temporary + ALLOWANCE,
        }.items()
        if size
    )
    ways = remedies(dataclasses.replace(s, micro_batch_size=least), memory_bytes)
    would = (
        f"would fit: {'; '.join(ways)}" if ways else "no setting makes it fit; use a smaller model"
    )
    raise ConfigError(
        f"micro_batch_size={least} needs {gib(found.peak)} ({parts}), but the device has "
        f"{gib(memory_bytes)} for it; {would}"
    )


def remedies(s: Setup, memory_bytes: float) -> list[str]:
    """Lists changes of `s`, with the peak of each, that each alone make the peak fit in
    `memory_bytes`; if there are none, the mildest of several changes together."""
    top: Literal[2, 3] = 2 if s.optimizer_kind == "muon" else 3
    modes: list[Recompute] = ["none", "selective", "full"]
    tried: list[tuple[str, Setup]] = [
        (f"activation_checkpointing={mode}", dataclasses.replace(s, activation_checkpointing=mode))
        for mode in modes[modes.index(s.activation_checkpointing) + 1 :]
    ]
    stages: list[Literal[1, 2, 3]] = [1, 2, 3]
    if s.num_workers > 1:
        tried += [
            (f"zero_stage={stage}", dataclasses.replace(s, zero_stage=stage))
            for stage in stages[s.zero_stage : top]
        ]
    more = [
        (f"zero_stage={top} num_workers={n}", dataclasses.replace(s, zero_stage=top, num_workers=n))
        for n in (2, 4, 8, 16, 32, 64)
        if n > s.num_workers
    ]
    tried += more
    if s.device == "cuda" and not s.offload_optimizer:
        stage = s.zero_stage or 1
        text = ("" if s.zero_stage else "zero_stage=1 ") + "engine.offload_optimizer=cpu"
        tried.append((text, dataclasses.replace(s, zero_stage=stage, offload_optimizer=True)))
    seq_len = s.seq_len // 2
    while seq_len >= 128:
        tried.append((f"seq_len={seq_len}", dataclasses.replace(s, seq_len=seq_len)))
        seq_len //= 2
    found = _that_fit(tried, memory_bytes)
    if found:
        return found
    together: list[tuple[str, Setup]] = []
    recompute: Recompute = "none" if s.model.is_recurrent else "full"
    by_recomputing = "" if s.model.is_recurrent else "activation_checkpointing=full "
    for n in (s.num_workers, 2, 4, 8, 16, 32, 64):
        if n >= max(2, s.num_workers):
            strong = dataclasses.replace(
                s, activation_checkpointing=recompute, zero_stage=top, num_workers=n
            )
            text = f"{by_recomputing}zero_stage={top}"
            together.append((f"{text} num_workers={n}", strong))
    if s.device == "cuda":
        strong = dataclasses.replace(
            s,
            activation_checkpointing=recompute,
            zero_stage=top,
            offload_optimizer=True,
            offload_parameters=top == 3,
        )
        text = f"{by_recomputing}zero_stage={top} "
        text += "engine.offload_parameters=cpu " if top == 3 else ""
        together.append((f"{text}engine.offload_optimizer=cpu", strong))
    for layers in range(s.model.n_layer - 1, 0, -1):
        model = dataclasses.replace(s.model, n_layer=layers)
        together.append((f"model.n_layer={layers}", dataclasses.replace(s, model=model)))
    return _that_fit(together, memory_bytes)


def _that_fit(tried: list[tuple[str, Setup]], memory_bytes: float) -> list[str]:
    """Lists the first change of each kind that fits. A kind is the text before the last =."""
    found: dict[str, str] = {}
    for text, setup in tried:
        kind = text.rpartition("=")[0]
        if kind not in found and (peak := _peak(setup)) <= memory_bytes:
            found[kind] = f"{text} ({gib(peak)})"
    return list(found.values())


def gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


def _peak(s: Setup, micro_batch_size: int | None = None) -> int:
    size = s.micro_batch_size if micro_batch_size is None else micro_batch_size
    return costs(dataclasses.replace(s, micro_batch_size=size)).peak
