"""The work of a training step as a few numbers, which a machine's calibration turns into seconds.

Pure arithmetic. Each number grows with one kind of work: products of matrices, attention, what
moves through memory, calls. The counts are those of the cost model (model/cost.py, activations.py
and traffic.py), for one worker.
"""

import dataclasses

from manta.model.activations import BF16, FP32, DeviceType, Dtype, activations
from manta.model.cost import Weight, adapters, flops_per_token, learning, weights
from manta.model.loss import loss_chunk
from manta.model.shape import ModelConfig
from manta.model.traffic import loss_traffic
from manta.model.trainable import blocks_trained
from manta.train.settings import TrainConfig

# Work that each micro batch has, forward and backward.
OF_A_MICRO_BATCH = ("products", "attention", "head", "traffic", "loss_traffic", "calls", "gathered")
# Work that each optimizer step has.
OF_A_STEP = ("optimizer", "muon", "reduced", "steps")
KINDS = (*OF_A_MICRO_BATCH, *OF_A_STEP)


def of_step(
    c: TrainConfig,
    model: ModelConfig,
    micro_batch: int,
    dtype: Dtype,
    device: DeviceType,
) -> dict[str, float]:
    """The work of the last step of a run on each worker, by KINDS. `model` has its vocabulary."""
    sequences = c.tokens_per_batch // c.sequence_length // c.most_workers
    once = of_micro_batch(c, model, micro_batch, dtype, device)
    found = {kind: n * sequences / micro_batch for kind, n in once.items()}
    learnt = learning(model, c.trainable, c.lora)
    numel = sum(w.total for w in learnt)
    is_muon = c.optimizer.kind == "muon"
    matrices = [w for w in learnt if w.group == "matrices"] if is_muon else []
    return {
        **found,
        "optimizer": float(FP32 * numel),
        "muon": float(sum(w.count * _orthogonalized(w, c.optimizer.muon_rounds) for w in matrices)),
        "reduced": float(FP32 * numel if c.most_workers > 1 else 0),
        "steps": 1.0,
    }


def of_micro_batch(
    c: TrainConfig, model: ModelConfig, size: int, dtype: Dtype, device: DeviceType
) -> dict[str, float]:
    """The work of one micro batch of `size` sequences, by OF_A_MICRO_BATCH."""
    seq_len = c.sequence_length
    tokens = size * seq_len
    held = activations(
        model, size, seq_len, dtype, c.activation_checkpointing, device, False, c.trainable, c.lora
    )
    reached = blocks_trained(c.trainable, model.n_layer) if c.lora.rank is None else model.n_layer
    attention = model.query_size * seq_len * (4.0 * model.n_layer + 8.0 * reached) * tokens
    attention = 0.0 if model.is_recurrent else attention
    whole = flops_per_token(model, seq_len, c.trainable, c.lora) * tokens
    vocab = model.vocab_size or 0
    head = 0.0 if model.labels else min(6.0 * vocab * model.n_embd * tokens, whole - attention)
    products = whole - attention - head
    if held.recomputed:  # backward computes the blocks again
        products, attention = products * 4 / 3, attention * 4 / 3
    # Every worker gathers the weights of stage 3 for the forward and for the backward pass.
    is_gathered = c.zero_stage == 3 and c.most_workers > 1
    every = sum(w.total for w in weights(model) + adapters(model, c.lora))
    return {
        "products": products,
        "attention": attention,
        "head": head,
        "traffic": float(held.blocks + held.recomputed * model.n_layer + held.ends),
        "loss_traffic": float(
            loss_traffic(
                tokens, model.n_embd, model.head_rows, min(tokens, loss_chunk(device, False)),
                BF16 if dtype == "bf16" else FP32, device, False,
            )
        ),
        "calls": float(model.n_layer),
        "gathered": float(2 * FP32 * every) if is_gathered else 0.0,
    }  # fmt: skip


def _orthogonalized(w: Weight, rounds: int) -> float:
    """FLOPs of Muon's update of one matrix (Newton-Schulz): in each round X X', its square, and a
    product with X."""
    short, long = sorted(w.shape)
    return rounds * (4.0 * short * short * long + 2.0 * short**3)


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model and a step of the survey that calibrates a machine: keys of a run's config."""

    n_layer: int
    n_embd: int
    seq_len: int
    vocab_size: int
    micro_batch: int
    grad_accum_steps: int = 1
    optimizer: str = "adamw"
    family: str = "modern"

    def keys(self, workers: int) -> dict[str, object]:
        tokens = self.seq_len * self.micro_batch * self.grad_accum_steps * workers
        return {
            "model": {
                "family": self.family, "n_layer": self.n_layer, "n_embd": self.n_embd,
                "n_head": max(1, self.n_embd // 64), "context_length": self.seq_len,
                "vocab_size": self.vocab_size,
            },
            "optimizer": {"kind": self.optimizer},
            "tokens_per_batch": tokens, "total_tokens": tokens,
            "micro_batch_size": self.micro_batch, "num_workers": workers, "compile": "none",
        }  # fmt: skip
