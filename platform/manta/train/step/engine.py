"""The DeepSpeed engine, and everything Manta knows about its internals (DeepSpeed 0.19.8)."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from manta.errors import ConfigError
from manta.model.gpt import LanguageModel
from manta.model.trainable import learning
from manta.train.step.deepspeed_config import check_disk, deepspeed_config, import_deepspeed
from manta.train.step.device import Device
from manta.train.step.engine_settings import EngineConfig
from manta.train.step.optimizer import OptimizerConfig, make_optimizer
from manta.train.step.reducer import Reducer


def to_cpu(_name: str, values: Tensor) -> Tensor:
    """A copy of `values` on the CPU, in memory of its own."""
    return values.detach().to("cpu", copy=True)


@dataclasses.dataclass(frozen=True)
class Fragment:
    """A range of a flattened weight, `start` to `start + size`, whose state is on this rank: in the
    optimizer's state of `holder`, from `offset` on."""

    name: str
    start: int
    size: int
    holder: Tensor
    offset: int
    group: int | None = None
    """The sub-group whose state `holder` has, at ZeRO stage 3; None at other stages."""

    def of(self, state: Tensor) -> Tensor:
        """This fragment's part of `state`, a tensor of the holder's size."""
        return state.view(-1)[self.offset : self.offset + self.size]


class Engine:
    """DeepSpeed's engine for a model, in the process group that already exists. All ranks must make
    it and call its methods alike.

    bf16 is torch's autocast over fp32 weights. The weights, their gradients and the optimizer's
    state are fp32 at every stage, so all stages train alike and checkpoints are exact.
    """

    def __init__(
        self,
        model: LanguageModel,
        optimizer: OptimizerConfig,
        device: Device,
        *,
        zero_stage: int,
        micro_batch_size: int,
        grad_accum_steps: int,
        c: EngineConfig | None = None,
        lr_scales: dict[str, float] | None = None,
    ):
        """Makes the engine.

        Args:
            micro_batch_size: sequences in a micro batch.
            grad_accum_steps: micro batches in an optimizer step, at first.

        Raises:
            ConfigError: this worker cannot offload as `c` says, or DeepSpeed rejects its
                `deepspeed_json`.
        """
        self.module, self.device, self.zero_stage = model, device.torch_device, zero_stage
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._micro_batch_size = micro_batch_size
        c = c or EngineConfig()
        self._deepspeed = import_deepspeed(self.device.type)
        settings = deepspeed_config(
            model,
            optimizer,
            device,
            zero_stage=zero_stage,
            micro_batch_size=micro_batch_size,
            grad_accum_steps=grad_accum_steps,
            c=c,
        )
        check_disk(c)
        self._engine: Any
        try:
            self._engine, *_ = self._deepspeed.initialize(
                model=model.to(self.device),
                optimizer=make_optimizer(model, optimizer, device.dtype, lr_scales),
                config=settings,
                dist_init_required=False,
            )
        except (ValueError, AssertionError, TypeError, KeyError) as e:
            if c.deepspeed_json is None:
                raise
            what = " ".join(str(e).split())[:300]
            raise ConfigError(f"engine.deepspeed_json: DeepSpeed rejects it: {what}") from e
        self._zero: Any = None
        """ZeRO's optimizer, which wraps torch's; None at stage 0."""
        self._reducer: Reducer | None = None
        """Manta's own reducer of gradients, at stage 0 with several workers; else None."""
        if zero_stage:
            self._zero = self._engine.optimizer
            _limit_norm(self._zero)
            return
        self._engine.enable_backward_allreduce = False  # the reducer does it, gradient by gradient
        if self.world_size > 1:
            dtype = torch.bfloat16 if c.communication_dtype == "bf16" else torch.float32
            weights = [weight for _, weight in learning(model)]
            self._reducer = Reducer(weights, c.reduce_bucket, dtype)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """torch's optimizer, at every stage."""
        return self._engine.optimizer if self._zero is None else self._zero.optimizer

    def __call__(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        documents: Tensor | None = None,
        reduction: Literal["mean", "none"] = "mean",
        at: Tensor | None = None,
    ) -> Tensor:
        """The model's loss or logits (`GPT.forward`), in the engine's dtype. All ranks must call
        this equally often: at stage 3 each call gathers the weights."""
        return self._engine(tokens, targets, documents=documents, reduction=reduction, at=at)

    def set_lr(self, share: float) -> float:
        """Sets each learning rate to this share (0 to 1) of its peak, which the config gives.
        Returns the rate of the first group: of the blocks' matrices, if they learn."""
        groups = self.optimizer.param_groups
        for group in groups:
            group["lr"] = share * group["peak_lr"]
        return groups[0]["lr"]

    def set_grad_accum_steps(self, steps: int) -> None:
        """Sets how many micro batches make up this worker's next optimizer step."""
        if self._engine.gradient_accumulation_steps() == steps:
            return
        self._engine.set_train_batch_size(steps * self._micro_batch_size * self.world_size)
        if hasattr(self._zero, "gradient_accumulation_steps"):  # ZeRO keeps its own count
            self._zero.gradient_accumulation_steps = steps

    @contextmanager
    def casting_once(self) -> Iterator[None]:
        """Makes autocast cast each weight to bf16 once, instead of once for each micro batch.

        The context must end before the optimizer's step, which changes the weights: it spans what
        happens between two steps.

        It does nothing where the copies would cost more memory than the forward pass itself needs:
        with activation checkpointing, which makes them block by block, and at stage 3, where no
        worker has all weights. (Compiled blocks cast for themselves.)
        """
        if self.module.recompute != "none" or self.zero_stage == 3:
            yield
            return
        # The innermost autocast computes. The outermost one, which is this, drops the copies when
        # it ends.
        with torch.autocast(self.device.type, enabled=False):
            yield

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Adds a micro batch's gradients; after the last micro batch of a step, also averages them
        over the workers."""
        # DeepSpeed would find the last one by counting micro batches since the run's start, but
        # their number in a step may change.
        self._engine.set_gradient_accumulation_boundary(is_boundary=is_last)
        if self._reducer is not None:
            self._reducer.armed = is_last
        self._engine.backward(loss)
        if self._reducer is not None and is_last:
            self._reducer.finish()

    def step(self, grad_clip: float, *, limit: float = math.inf) -> Tensor | float:
        """Takes the optimizer's step, unless the gradients are not finite or their norm exceeds
        `limit`: then no rank takes it. Call this after a step's last `backward`, and not within
        `casting_once`.

        Returns:
            The global 2-norm of the gradients before clipping, which may still be on the device;
            not finite if the step was not taken.
        """
        if self._zero is not None:
            self._zero.norm_limit = limit
            self._engine.step()
            return self._engine.get_global_grad_norm()
        # The gradients are reduced by now. DeepSpeed could clip them here, but it does not keep the
        # norm, which people watch.
        parameters = list(self.module.parameters())
        norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip or math.inf)
        found = float(norm)  # the only wait for the device in a step; ZeRO waits too
        if found <= limit and found < math.inf:  # False for NaN
            self._engine.step()
            return norm
        self._engine.zero_grad()
        return math.inf

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Puts the model in eval mode, without gradients, for as long as the context lasts."""
        self._engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._engine.train()

    def full_weights(self, copy: Callable[[str, Tensor], Tensor] = to_cpu) -> dict[str, Tensor]:
        """All weights by name, each one whole, on rank 0; {} on the other ranks. A tied weight
        appears once. `copy(name, weight)` copies a weight to the CPU."""
        found: dict[str, Tensor] = {}
        seen: set[int] = set()
        for name, parameter in self.module.named_parameters():
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            # One weight at a time, so that no rank has the whole model in addition to its shards.
            is_sharded = hasattr(parameter, "ds_id")
            with self._deepspeed.zero.GatheredParameters([parameter], enabled=is_sharded):
                if self.rank == 0:
                    found[name] = copy(name, parameter)
        return found

    def fragments(self) -> list[Fragment]:
        """This rank's fragments of all weights that learn (a tied weight appears once). All ranks
        list the weights in the same order."""
        zero: Any = self._zero
        found = []
        for name, weight in learning(self.module):
            inside: Any = weight  # DeepSpeed adds attributes to a weight
            if self.zero_stage == 0:
                found.append(Fragment(name, 0, weight.numel(), weight, 0))
            elif self.zero_stage < 3:
                mapping = inside._hp_mapping
                if mapping is not None:  # part of the weight is in this rank's partition
                    here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
                    holder = zero.single_partition_of_fp32_groups[mapping.param_group_index]
                    found.append(Fragment(name, here.start, here.numel, holder, there.start))
            else:
                group, offset, size = zero.grad_position[zero.get_param_id(weight)]
                start = self.rank * size
                size = min(size, inside.ds_numel - start)  # the last ranks' parts are padded
                if size > 0:
                    holder = zero.fp32_partitioned_groups_flat[group]
                    found.append(Fragment(name, start, size, holder, offset, group))
        return found

    @contextmanager
    def at_hand(self, part: Fragment, *, write: bool) -> Iterator[None]:
        """Makes a holder's state available for reading or writing, which means loading it from disk
        if it is offloaded there. With `write`, the state goes back to disk at the end."""
        group = part.group
        if group is None or not self._zero._swappable_optimizer_subgroup(group):
            yield
            return
        self._zero._optimizer_states_and_gradient_swap_in(group)
        yield
        if write:
            self._zero._optimizer_states_and_gradient_swap_out(group)
        else:
            self._zero._release_swap_buffers(group)


def _limit_norm(optimizer: Any) -> None:
    """Makes a ZeRO optimizer skip a step whose gradient norm exceeds its `norm_limit`. By itself it
    already skips a step (on all ranks alike) whose norm is not finite."""
    optimizer.norm_limit = math.inf
    if hasattr(optimizer, "scaled_global_norm"):  # stages 1 and 2

        def limited() -> Any:
            norm = measure()
            if optimizer.norm_limit == math.inf or norm <= optimizer.norm_limit:
                return norm
            return math.inf

        measure, optimizer.scaled_global_norm = optimizer.scaled_global_norm, limited
    else:

        def limited_groups() -> Any:
            norms = groups()
            if optimizer.norm_limit == math.inf:
                return norms
            total = torch.stack([torch.as_tensor(norm) for norm in norms]).norm()
            return norms if total <= optimizer.norm_limit else [math.inf]

        groups, optimizer._get_norm_groups = optimizer._get_norm_groups, limited_groups
