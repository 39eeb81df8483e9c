"""The DeepSpeed engine, and all that Manta knows of its insides (DeepSpeed 0.19.8)."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from manta.errors import ConfigError
from manta.model.gpt import GPT
from manta.train.step.deepspeed_config import check_disk, deepspeed_config, import_deepspeed
from manta.train.step.device import Device
from manta.train.step.engine_settings import EngineConfig
from manta.train.step.optimizer import OptimizerConfig, make_optimizer
from manta.train.step.reducer import Reducer


def to_cpu(_name: str, values: Tensor) -> Tensor:
    """A copy of them, in memory of its own."""
    return values.detach().to("cpu", copy=True)


@dataclasses.dataclass(frozen=True)
class Fragment:
    """Values `start` to `start + size` of a flattened weight, of which this rank holds the state:
    in the optimizer's state of `holder`, from `offset` on."""

    name: str
    start: int
    size: int
    holder: Tensor
    offset: int
    group: int | None = None
    """At ZeRO stage 3, the sub-group whose state `holder` has."""

    def of(self, state: Tensor) -> Tensor:
        """Its part of a tensor of the holder's size."""
        return state.view(-1)[self.offset : self.offset + self.size]


class Engine:
    """DeepSpeed's engine over a model, in the process group that is already there. Made and used
    on all ranks alike.

    bf16 is torch's autocast over fp32 weights: the weights, their gradients and the optimizer's
    state are fp32 at every stage, so that all stages train alike and checkpoints are exact.
    """

    def __init__(
        self,
        model: GPT,
        optimizer: OptimizerConfig,
        device: Device,
        *,
        zero_stage: int,
        micro_batch_size: int,
        grad_accum_steps: int,
        c: EngineConfig | None = None,
        lr_scales: dict[str, float] | None = None,
    ):
        """The engine for micro batches of `micro_batch_size`, of which `grad_accum_steps` make an
        optimizer step at first.

        Raises:
            ConfigError: this worker cannot offload as `c` says, or DeepSpeed refuses its
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
            raise ConfigError(f"engine.deepspeed_json: DeepSpeed refuses it: {what}") from e
        self._zero: Any = None
        """ZeRO's optimizer, which wraps torch's own; None at stage 0."""
        self._reducer: Reducer | None = None
        """Manta's own, at stage 0 on several workers."""
        if zero_stage:
            self._zero = self._engine.optimizer
            _limit_norm(self._zero)
            return
        self._engine.enable_backward_allreduce = False  # the reducer does it as gradients are made
        if self.world_size > 1:
            dtype = torch.bfloat16 if c.communication_dtype == "bf16" else torch.float32
            self._reducer = Reducer(list(model.parameters()), c.reduce_bucket, dtype)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """torch's own optimizer, at each stage."""
        return self._engine.optimizer if self._zero is None else self._zero.optimizer

    def __call__(
        self,
        tokens: Tensor,
        targets: Tensor,
        *,
        documents: Tensor | None = None,
        reduction: Literal["mean", "none"] = "mean",
    ) -> Tensor:
        """The model's loss, in the engine's dtype. Every rank calls it as often: at stage 3 each
        call gathers the weights."""
        return self._engine(tokens, targets, documents=documents, reduction=reduction)

    def set_lr(self, share: float) -> float:
        """Sets the learning rates to this share (0 to 1) of their peaks, which the config gives;
        the one of the blocks' matrices."""
        groups = self.optimizer.param_groups
        for group in groups:
            group["lr"] = share * group["peak_lr"]
        return groups[0]["lr"]

    def set_grad_accum_steps(self, steps: int) -> None:
        """How many micro batches this worker's next optimizer step is made of."""
        if self._engine.gradient_accumulation_steps() == steps:
            return
        self._engine.set_train_batch_size(steps * self._micro_batch_size * self.world_size)
        if hasattr(self._zero, "gradient_accumulation_steps"):  # ZeRO keeps a number of its own
            self._zero.gradient_accumulation_steps = steps

    @contextmanager
    def casting_once(self) -> Iterator[None]:
        """While it lasts, autocast casts each weight to bf16 once, and not once for each micro
        batch. It must end before the optimizer's step, which changes the weights: it spans what
        comes between two of these.

        Not where the copies would cost more memory than the forward needs by itself: with
        activation checkpointing, which makes them block by block, and at stage 3, where no worker
        holds all weights. (Compiled blocks cast for themselves.)
        """
        if self.module.recompute != "none" or self.zero_stage == 3:
            yield
            return
        # The innermost autocast computes; the outermost, which this is, throws the copies away.
        with torch.autocast(self.device.type, enabled=False):
            yield

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Adds a micro batch's gradients; the last of a step has them averaged over the workers."""
        # DeepSpeed would count micro batches since the run's start: their number in a step may
        # change.
        self._engine.set_gradient_accumulation_boundary(is_boundary=is_last)
        if self._reducer is not None:
            self._reducer.armed = is_last
        self._engine.backward(loss)
        if self._reducer is not None and is_last:
            self._reducer.finish()

    def step(self, grad_clip: float, *, limit: float = math.inf) -> Tensor | float:
        """The optimizer's step, after a step's last `backward`, and not within `casting_once`. It
        is not taken (on any rank) if the gradients are not finite, or their norm is beyond `limit`.

        Returns:
            The global 2-norm of the gradients before clipping, which may still be on the device;
            not finite if the step was not taken.
        """
        if self._zero is not None:
            self._zero.norm_limit = limit
            self._engine.step()
            return self._engine.get_global_grad_norm()
        # Reduced by now. DeepSpeed clips here too, and forgets the norm, which people watch.
        parameters = list(self.module.parameters())
        norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip or math.inf)
        found = float(norm)  # the one wait for the device in a step; ZeRO has it too
        if found <= limit and found < math.inf:  # False for NaN
            self._engine.step()
            return norm
        self._engine.zero_grad()
        return math.inf

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """While it lasts, the model is in eval mode and computes no gradients."""
        self._engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._engine.train()

    def full_weights(self, copy: Callable[[str, Tensor], Tensor] = to_cpu) -> dict[str, Tensor]:
        """Every weight by its name, whole, on rank 0; {} on the others. A tied weight appears once.
        `copy(name, weight)` copies it to the CPU."""
        found: dict[str, Tensor] = {}
        seen: set[int] = set()
        for name, parameter in self.module.named_parameters():
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            # One at a time, so that no rank holds the whole model beside its shards.
            is_sharded = hasattr(parameter, "ds_id")
            with self._deepspeed.zero.GatheredParameters([parameter], enabled=is_sharded):
                if self.rank == 0:
                    found[name] = copy(name, parameter)
        return found

    def fragments(self) -> list[Fragment]:
        """This rank's, of every weight (a tied one comes once); in the same order on all ranks."""
        zero: Any = self._zero
        found = []
        for name, weight in self.module.named_parameters():
            inside: Any = weight  # DeepSpeed puts attributes of its own on a weight
            if self.zero_stage == 0:
                found.append(Fragment(name, 0, weight.numel(), weight, 0))
            elif self.zero_stage < 3:
                mapping = inside._hp_mapping
                if mapping is not None:  # some of it is in this rank's partition
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
        """While a holder's state is read or written: from the disk, where it is offloaded there."""
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
    """Has a ZeRO optimizer leave out a step whose gradient norm is beyond its `norm_limit`, as it
    does by itself (on all ranks alike) where the norm is not finite."""
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
