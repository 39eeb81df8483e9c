"""Memory of a training worker: what it holds, and its peak, from the config alone. Pure
arithmetic; nothing is allocated.

Manta trains with fp32 weights, fp32 gradients and fp32 optimizer state; bf16 is torch's autocast.
What DeepSpeed (0.19.8) holds on top comes from its source (runtime/engine.py,
zero/stage_1_and_2.py, zero/stage3.py) and from measurement: manta/bench/stages.py and peaks.py
compare, and tests/model/test_cost.py checks each stage. With P parameters and W workers, in values
of 4 bytes, if all weights learn (the weights that do not count in the first column alone), a worker
holds from step to step:

    stage   weights    master copy   gradients   AdamW
    0       P          -             P           2P
    1       P          P/W           P           2P/W
    2       P          P/W           P/W *       2P/W
    3       P/W        P/W           P/W         2P/W

* Whole tensors: if a tensor lies in several workers' shares, each of these workers holds its whole
gradient. Mostly this is the embedding, which is alone in its group of parameters.

So stages 1 and 2 cost a single worker more than stage 0 does, and stage 1 costs two workers no less
than stage 0.

The peak of a step is at one of these moments: the loss, when the activations are all there with the
logits of a chunk (at stage 3, also just before); the first block's backward pass, when they are
still there; the last gradient, when they are gone and gradients are being reduced; the optimizer's
step. `_at_stage_0` to `_at_stage_3` say what each stage has at each of them.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

from manta.model.activations import BF16, FP32, Activations, DeviceType, Dtype, activations
from manta.model.cost import NO_ADAPTERS, Weight, adapters, learning, weights
from manta.model.groups import GROUPS
from manta.model.lora import LoraConfig
from manta.model.recomputation import Recompute
from manta.model.shape import ModelConfig
from manta.model.trainable import Trainable, blocks_trained

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
    moments: dict[str, int]
    """Bytes beyond `states` at the moments of a step that may be its peak."""

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
    def fullest(self) -> str:
        """The moment of the peak."""
        return max(self.moments, key=lambda name: self.moments[name])

    @property
    def temporary(self) -> int:
        """The peak beyond `total`."""
        return max(self.moments.values()) - self.activations.held

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
    share = G if stage == 0 else -(-G // W)
    matrices = FP32 * sum(w.total for w in learnt if w.group == "matrices") * share // G
    state = 2 * share - (matrices if s.optimizer_kind == "muon" else 0)
    bucket = FP32 * s.reduce_bucket
    if s.device == "cpu":  # which gives memory when it is written to, and not when it is asked for
        bucket = min(bucket, G)
    touched = FP32 * _touched(learnt, W)
    held_weights, master, gradients, buffers, host = P, share, G, 0, 0
    if stage == 0:
        master = 0
    elif stage == 1:
        buffers = 0 if s.device == "cpu" else bucket * (2 if s.overlap_comm else 1)
    elif stage == 2:
        gradients = touched
    else:
        small = FP32 * sum(w.total for w in tensors if w.numel < PERSISTENT)
        held_weights = -(-P // W) + (small if W > 1 else 0)
        gradients, buffers = share, bucket
    acts = activations(
        c,
        s.micro_batch_size,
        s.seq_len,
        s.dtype,
        s.activation_checkpointing,
        s.device,
        compiled_loss=s.compiled,
        trainable=s.trainable,
        lora=s.lora,
    )
    moved = s.offload_optimizer and stage > 0
    kept = 0 if moved else touched
    moments = _MOMENTS[stage](_Step(s, tensors, learnt, acts, P, G, kept, bucket))
    if s.optimizer_kind == "muon":
        # Two fp32 directions, all ranks' updates, this rank's; of whole matrices.
        own = 3 * matrices + matrices // W if stage == 0 else 4 * matrices
        moments["the optimizer's step"] = max(moments["the optimizer's step"], own)
    if moved:
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
        moments["the optimizer's step"] = 0
    if s.offload_parameters and stage == 3:
        host += -(-P // W)
        held_weights -= -(-P // W)
    return Costs(held_weights, master, gradients, state, buffers, host, acts, moments)


@dataclasses.dataclass(frozen=True)
class _Step:
    """What decides the moments of a step."""

    setup: Setup
    tensors: list[Weight]
    learnt: list[Weight]
    acts: Activations
    P: int
    """Bytes of all weights."""
    G: int
    """Bytes of the gradients of those that learn."""
    touched: int
    """Bytes of the gradients that have a part in the first worker's share; 0 where they go to the
    host."""
    bucket: int

    @property
    def written_only(self) -> bool:
        """Whether memory counts when it is written to, as on CPUs, and not when it is asked for."""
        return self.setup.device == "cpu"

    @property
    def last(self) -> int:
        """Bytes of the gradient that the backward pass makes last: the embedding's."""
        return FP32 * max((w.numel for w in self.learnt if w.kind == "embedding"), default=0)

    @property
    def at_last(self) -> int:
        """Bytes while that gradient is made: with a tied head there are two of them, that of the
        head since the loss (autograd adds them up before it hands them on). There are the gradient
        that flows into the embedding and, as Engine.casting_once keeps them, the bf16 weights."""
        sums = 2 if self.setup.model.tie_embeddings else 1
        return sums * self.last + self.around

    @property
    def around(self) -> int:
        """Bytes of what is there with the last gradient."""
        s = self.setup
        kept = 0 if self.acts.recomputed or s.zero_stage == 3 else self.acts.autocast
        return kept + FP32 * s.micro_batch_size * s.seq_len * s.model.n_embd

    @property
    def norm(self) -> int:
        """Bytes of the fp64 copy of the largest gradient of a share, whose norm is taken in fp64
        (get_grad_norm_direct)."""
        largest = max((w.numel for w in self.learnt), default=0)
        return 2 * FP32 * -(-largest // self.setup.num_workers)

    @property
    def flattened(self) -> int:
        """Bytes of the first worker's largest group of gradients, end to end, for the optimizer. A
        tensor that is a group by itself stays where it is."""
        groups = [[w for w in self.learnt if w.group == group] for group in GROUPS]
        several = [those for those in groups if sum(w.count for w in those) > 1]
        sizes = [FP32 * sum(w.total for w in those) for those in several]
        return max(sizes, default=0) // self.setup.num_workers

    def slices(self, size: int) -> int:
        """Bytes of the copy that DeepSpeed makes of a bucket, or of a gradient larger than one, to
        reduce it: of parts for several workers that fit into a bucket together
        (allreduce_and_scatter)."""
        W = self.setup.num_workers
        return size if W > 1 and size // W <= self.bucket else 0


def _at_stage_0(x: _Step) -> dict[str, int]:
    """Manta's reducer (train/step/reducer.py) keeps the gradients that it has sent, end to end,
    until all are there; the last one is still in autograd's hands when it is copied."""
    held, W = x.acts.held, x.setup.num_workers
    sent = max(x.G - x.last + x.at_last, x.G + x.last + x.around)
    return {
        "the loss": held + x.acts.at_loss,
        "the backward pass": held + x.acts.in_backward,
        "the last gradient": x.at_last if W == 1 else sent,
        "the optimizer's step": 0,
    }


def _at_stage_1(x: _Step) -> dict[str, int]:
    """All gradients are whole until the last micro batch. Then they go through the bucket, and
    those of the worker's share from there into a buffer of their own. What is in the bucket has
    left its own memory."""
    held, buffer, buckets = x.acts.held, x.touched, x.bucket
    if x.written_only:  # bucket and buffer fill as gradients leave
        buffer = buckets = 0
    overlapped = buffer if x.setup.overlap_comm else 0
    filled = min(buckets, x.G)
    return {
        "the loss": held + x.acts.at_loss,
        "the backward pass": held + x.acts.in_backward + overlapped,
        "the last gradient": max(
            x.at_last + overlapped, max(x.slices(min(x.bucket, x.G)), buffer) - filled
        ),
        "the optimizer's step": x.touched + max(x.norm, x.flattened) - x.G,
    }


def _at_stage_2(x: _Step) -> dict[str, int]:
    """Each gradient goes through the bucket as soon as it is there, and those of the worker's share
    into a buffer, which is added to the sums of earlier micro batches."""
    held, s = x.acts.held, x.setup
    buckets = x.bucket * (2 if s.overlap_comm else 1)
    first, before_last = x.touched, x.touched
    if x.written_only:
        first = 0
        before_last -= min(x.last, x.touched)
    return {
        "the loss": held + x.acts.at_loss,
        "the backward pass": held + x.acts.in_backward + buckets + first,
        "the last gradient": buckets
        + max(before_last + x.at_last, x.touched + x.last + x.slices(x.last) + x.around),
        "the optimizer's step": max(x.norm, x.flattened),
    }


def _at_stage_3(x: _Step) -> dict[str, int]:
    """The forward pass gathers the weights ahead of their use, many of them end to end in a buffer,
    which stays until the last of them is used, and from there into tensors of their own. These stay
    for the backward pass, if they are few (max_live_parameters). A single worker's share is already
    the whole.

    DeepSpeed's linear layer (zero/linear.py) keeps its input as it comes, in fp32 from a norm, and
    casts the weight again in the backward pass."""
    s, acts = x.setup, x.acts
    held, at_loss, live, ahead, again = acts.held, acts.at_loss, 0, 0, 0
    if s.dtype == "bf16" and not s.model.is_recurrent:
        if acts.recomputed:
            at_loss = acts.loss_work
        else:
            held -= acts.autocast
        if s.activation_checkpointing == "none":
            norms = 2 if s.model.family == "gpt2" else 1  # gate and up have one input, not two
            tokens = s.micro_batch_size * s.seq_len
            blocks = blocks_trained(s.trainable, s.model.n_layer)
            held += (FP32 - BF16) * norms * tokens * s.model.n_embd * blocks
    if s.num_workers > 1:
        live, ahead = min(x.P, FP32 * LIVE), min(x.P, FP32 * PREFETCH)
        again = min(x.P - live, FP32 * PREFETCH)
    return {
        "the end of the forward pass": held - acts.loss + live + ahead,
        "the loss": held + at_loss + live + again,
        "the backward pass": held + acts.in_backward + live + again + min(x.bucket, x.G),
        "the last gradient": x.at_last + 2 * x.last,  # with its weight, and as it is scattered
        "the optimizer's step": max(-(-x.G // s.num_workers), x.norm),
    }


_MOMENTS: dict[int, Callable[[_Step], dict[str, int]]] = {
    0: _at_stage_0, 1: _at_stage_1, 2: _at_stage_2, 3: _at_stage_3,
}  # fmt: skip


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


def gib(size: float, *, up: bool = False) -> str:
    """A size to a hundredth of a GiB; `up`: never less than it is."""
    hundredths = 100 * size / GIB
    return f"{(math.ceil(hundredths) if up else hundredths) / 100:.2f} GiB"
