"""The configs of the training loop, wherever it runs, and of a run on Ray."""

import contextlib
import dataclasses
import itertools
import math
from typing import Any, ClassVar, Literal

from manta import config as configs
from manta import layout, storage, terminal
from manta.arguments import POSITIVE
from manta.config import Count, Natural, NonNegativeFloat, PositiveFloat, RunName, Seed, config
from manta.data.order import Stage, batches_for, make_stages, sequences_before, stage_of
from manta.data.recipe import BPE_VOCAB_SIZE, DataConfig
from manta.errors import MantaError
from manta.model import lora
from manta.model.cost import learning
from manta.model.families import num_parameters
from manta.model.gpt import ModelConfig
from manta.model.init import InitConfig
from manta.model.lora import LoraConfig
from manta.model.memory import Setup, costs
from manta.model.recomputation import Recompute
from manta.model.shape import GPTS
from manta.model.trainable import Trainable
from manta.monitor.settings import AlertsConfig, Tracker
from manta.storage import HomeConfig
from manta.text.tokenizer import R50K, R50K_SIZE
from manta.train.checkpoints.checkpoint import CheckpointConfig
from manta.train.eval_settings import EvalConfig, SampleConfig
from manta.train.faults.spikes import SpikeConfig
from manta.train.objectives.dpo import DpoConfig
from manta.train.step.engine_settings import EngineConfig
from manta.train.step.optimizer import OptimizerConfig
from manta.train.step.scaling import lr_scales, recipe_of_depth
from manta.train.step.schedule import ScheduleConfig

MAX_DEFAULT_MICRO_BATCH = 16
LOOKING_BACK = ("previous_tokens", "induction_heads")  # of the model's first two blocks


@config
class TrainConfig:
    only_for: ClassVar = (
        ("optimizer.head_lr", "model.tie_embeddings", (False,)),
        ("init.bigram_steps", "model.tie_embeddings", (False,)),
        *((f"init.{key}", "model.qk_norm", (True,)) for key in LOOKING_BACK),
        *((f"init.{key}", "model.family", ("modern",)) for key in LOOKING_BACK),
        ("activation_checkpointing", "model.family", GPTS),
        *((f"init.{key}", "model.family", GPTS) for key in ("kind", "bigram_steps")),
        ("memory_per_worker", "micro_batch_size", ("auto",)),
        ("engine.overlap_comm", "zero_stage", (1, 2, 3)),
        ("engine.allgather_bucket_mb", "zero_stage", (1, 2)),
        ("engine.offload_optimizer", "zero_stage", (1, 2, 3)),
        ("engine.offload_parameters", "zero_stage", (3,)),
    )

    seed: Seed = 1337
    """Seed of the weights, the order of the data, dropout and samples."""
    total_tokens: Count = 1_024_000
    """Length of the run in tokens, rounded up to whole batches."""
    tokens_per_batch: Count = 2048
    """Tokens in one optimizer step, over all workers."""
    batch_ramp: dict[Count, Count] = dataclasses.field(default_factory=dict)
    """Smaller batches at the start, as {size: until}: batches of `size` tokens until the run has
    trained on `until` tokens. After the last entry, batches are of `tokens_per_batch`."""
    seq_len: Count | None = None
    """Tokens in a training sequence; null: the model's context_length."""
    micro_batch_size: Count | Literal["auto"] | None = None
    """Sequences that a worker computes at once; the gradient accumulation steps follow from it.
    null: the largest number up to 16 that divides the worker's share of the batch; auto: the
    largest that divides it and fits the worker's memory, by the cost model."""
    memory_per_worker: PositiveFloat | None = None
    """Memory for micro_batch_size=auto, in GiB. null: nine tenths of the GPU's memory; on CPUs, the
    worker's share of four fifths of the machine's free memory."""
    num_workers: Count | tuple[Count, Count] = 1
    """Data-parallel workers; the batch is split over them. [fewest, most]: as many as the cluster
    has room for and the batch divides by, even if nodes come and go; the batch stays the same."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed's ZeRO stage: what is sharded over the workers. 0: nothing; 1: optimizer state; 2:
    also gradients; 3: also weights."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Data type of the matrix products (weights stay fp32). auto: bf16 if a probe finds it fast."""
    activation_checkpointing: Recompute = "none"
    """What a block computes again in the backward pass, to save memory: none; selective (norms,
    activations, rotations: all but matrix products and attention); full (everything)."""
    compile: Literal["auto", "blocks", "none"] = "auto"
    """Whether torch.compile compiles the model's blocks, which share one compilation. auto: below
    zero_stage 3, if a compiler is found and the run is long enough (at the device's peak it would
    take ten minutes on CPUs, two on GPUs); blocks: always; none: never."""
    deterministic: bool = False
    """Whether GPUs use only operations that give the same bits each time. Then a run that is
    resumed or repeated on the same kind and number of GPUs is the same to the bit. This costs
    speed. (On CPUs, every run is the same to the bit.)"""
    document_mask: bool = False
    """Whether attention stays within each document of a sequence; positions restart with each. An
    LSTM's state restarts with each, which is slower on a CPU."""
    trainable: Trainable = "all"
    """Weights that learn, in a run that starts from a checkpoint. all; last_block or last_two: the
    last one or two blocks, the final norm and the head; head: the final norm and the head. A head
    that is tied to the embedding does not learn, except with all."""
    lora: LoraConfig = LoraConfig()
    class_weights: Literal["none", "balanced"] = "none"
    """What the texts of each label count in the loss of a classifier. none: all count alike;
    balanced: those of a rare label more, so that all labels count alike. (Val loss, accuracy and
    macro F1 never have weights.)"""
    log_every: Count = 10
    """Steps between log lines; metrics.jsonl has every step."""
    model: ModelConfig = ModelConfig()
    init: InitConfig = InitConfig()
    engine: EngineConfig = EngineConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    eval: EvalConfig = EvalConfig()
    sample: SampleConfig = SampleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    spikes: SpikeConfig = SpikeConfig()
    dpo: DpoConfig = DpoConfig()

    @classmethod
    def beneath(cls, tree: dict[str, Any]) -> dict[str, Any]:
        model = tree.get("model")
        return recipe_of_depth(model.get("depth") if isinstance(model, dict) else None)

    def problems(self) -> list[str]:
        found = []
        context = self.model.context_length
        if self.sequence_length > context:
            found.append(
                f"seq_len={self.seq_len} is beyond the model's context: use at most {context}, or "
                f"set model.context_length={self.seq_len}"
            )
        micro_batch = self.micro_batch_size if isinstance(self.micro_batch_size, int) else None
        if self.fewest_workers > self.most_workers:
            given = f"[{self.fewest_workers}, {self.most_workers}]"
            found.append(f"num_workers={given}: [fewest, most] is expected")
        counts = sorted({self.fewest_workers, self.most_workers})
        for (key, size), workers in itertools.product(self.batch_sizes, counts):
            unit = self._unit(workers)
            if size % unit:
                below = size // unit * unit
                parts = f"seq_len {self.sequence_length} x num_workers {workers}" + (
                    f" x micro_batch_size {micro_batch}" if micro_batch else ""
                )
                found.append(
                    f"{key}={size} does not divide by {parts} = {unit}; "
                    f"nearest that do: {f'{below} and ' if below else ''}{below + unit}"
                )
        untils = list(self.batch_ramp.values())
        if len(set(untils)) < len(untils):
            found.append(f"batch_ramp={self.batch_ramp}: two sizes end at the same token count")
        found += self.optimizer.conflicts(self.zero_stage, self.model.tie_embeddings)
        found += self.init.conflicts(self.expected_model)
        found += lora.choices(self.trainable, self.lora, self.has_base, self.optimizer.kind)
        if self.model.is_recurrent and self.activation_checkpointing != "none":
            found.append(
                f"activation_checkpointing={self.activation_checkpointing} is for the blocks of a "
                "GPT: omit it for an LSTM"
            )
        if self.eval.arguments and not self.eval.suites:
            found.append("eval.arguments are for eval.suites: omit them, or set that")
        if self.memory_per_worker is not None and self.micro_batch_size != "auto":
            found.append("memory_per_worker is for micro_batch_size=auto: omit it, or set that")
        return found

    @property
    def has_base(self) -> bool:
        """Whether there are weights to begin with, so that some of them need not learn."""
        return self.init.checkpoint is not None

    @property
    def batch_sizes(self) -> list[tuple[str, int]]:
        """Batch sizes that must divide evenly over the workers, each with the key that sets it."""
        ramp = [("batch_ramp", size) for size in self.batch_ramp]
        return [("tokens_per_batch", self.tokens_per_batch), *ramp]

    @property
    def expected_model(self) -> ModelConfig:
        """The model, as far as it is known before a dataset is opened."""
        return self.model

    @property
    def workers(self) -> int:
        """Number of data-parallel workers; for [fewest, most], known once the workers decide."""
        assert isinstance(self.num_workers, int), "decided in the worker"
        return self.num_workers

    @property
    def fewest_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def most_workers(self) -> int:
        """The number of workers to plan for; in a worker's config, the actual number."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def worker_counts(self) -> list[int]:
        """The numbers of workers that are allowed, ascending: all batches divide by them."""
        counts = range(self.fewest_workers, self.most_workers + 1)
        sizes = [size for _, size in self.batch_sizes]
        return [n for n in counts if not any(size % self._unit(n) for size in sizes)]

    def _unit(self, workers: int) -> int:
        """The tokens in a micro batch of this many workers; a batch has to divide by them."""
        size = self.micro_batch_size if isinstance(self.micro_batch_size, int) else 1
        return self.sequence_length * workers * size

    @property
    def sequence_length(self) -> int:
        return self.seq_len or self.model.context_length

    @property
    def stages(self) -> tuple[Stage, ...]:
        return make_stages(self.batch_ramp, self.sequence_length, self.tokens_per_batch)

    @property
    def micro_batches(self) -> list[int]:
        """Sizes that divide a worker's share of every batch, ascending."""
        shares = [stage.sequences_per_batch // self.most_workers for stage in self.stages]
        share = math.gcd(*shares)
        small = [n for n in range(1, math.isqrt(share) + 1) if share % n == 0]
        return sorted({*small, *(share // n for n in small)})

    @property
    def micro_batch(self) -> int:
        """Sequences that a worker computes at once; for `auto`, known once the workers decide."""
        assert self.micro_batch_size != "auto", "decided in the worker"
        if self.micro_batch_size is not None:
            return self.micro_batch_size
        return max(n for n in self.micro_batches if n <= MAX_DEFAULT_MICRO_BATCH)

    def grad_accum_steps(self, step: int) -> int:
        """Micro batches per worker in step `step` (0 is the first)."""
        sequences = stage_of(self.stages, step).sequences_per_batch
        return sequences // self.most_workers // self.micro_batch

    def tokens_before(self, step: int) -> int:
        """Tokens in all steps before `step`."""
        return sequences_before(self.stages, step) * self.sequence_length

    def val_tokens(self, datasets: int) -> int:
        """Val tokens to measure on of each of this many datasets."""
        return max(1, self.eval.tokens // datasets)

    @property
    def total_steps(self) -> int:
        return batches_for(self.stages, self.total_tokens, self.sequence_length)

    @property
    def lr_scales(self) -> dict[str, float]:
        """Factor of the learning rate of each group of weights, for this batch and width."""
        o = self.optimizer
        return lr_scales(
            o.kind, self.model.n_embd, o.reference_width, self.tokens_per_batch, o.reference_batch
        )

    def derived(self) -> dict[str, Any]:
        """Values that follow from the keys; --dry-run shows them."""
        found: dict[str, Any] = {
            "steps": self.total_steps,
            "sequence length": self.sequence_length,
            "sequences per batch": self.tokens_per_batch // self.sequence_length,
        }
        if self.fewest_workers != self.most_workers:
            found["numbers of workers"] = terminal.named([str(n) for n in self.worker_counts])
        if self.micro_batch_size != "auto":
            found["micro batch size"] = self.micro_batch
            found["gradient accumulation steps"] = self.grad_accum_steps(self.total_steps)
        if self.optimizer.reference_batch or self.optimizer.reference_width:
            scales = ", ".join(f"{name} {scale:.4g}" for name, scale in self.lr_scales.items())
            found["learning rates are multiplied by"] = scales
        return found


def memory_setup(
    c: TrainConfig,
    model: ModelConfig,
    dtype: Literal["fp32", "bf16"],
    device: Literal["cpu", "cuda"],
    compiled: bool = False,
) -> Setup:
    """The settings that decide a worker's memory; `compiled`: whether its model is compiled."""
    return Setup(
        model,
        c.sequence_length,
        num_workers=c.most_workers,
        zero_stage=c.zero_stage,
        dtype=dtype,
        optimizer_kind=c.optimizer.kind,
        activation_checkpointing=c.activation_checkpointing,
        trainable=c.trainable,
        lora=c.lora,
        offload_optimizer=c.engine.offload_optimizer != "none",
        offload_parameters=c.engine.offload_parameters != "none",
        overlap_comm=c.engine.overlaps(c.zero_stage, c.most_workers, device == "cuda"),
        reduce_bucket=c.engine.reduce_bucket,
        device=device,
        compiled=compiled,
    )


@config
class PretrainConfig(HomeConfig, TrainConfig):
    only_for: ClassVar = (
        ("deterministic", "gpus_per_worker", POSITIVE),
        ("engine.overlap_comm", "gpus_per_worker", POSITIVE),
        *((f"dpo.{f.name}", "data.kind", ("preference",)) for f in dataclasses.fields(DpoConfig)),
    )

    name: RunName = "quickstart"
    """Name of the run, and of its folder under HOME/runs."""
    resume: Literal["auto", "never"] = "auto"
    """auto: resume from the run's newest whole checkpoint; never: refuse a run that exists."""
    cpus_per_worker: PositiveFloat = 1.0
    """CPUs that Ray reserves for each worker."""
    gpus_per_worker: Literal[0, 1] | configs.OpenFraction = 0
    """1: train on GPUs, one per worker; 0: train on CPUs. A fraction, for num_workers=1: the share
    of a GPU that Ray reserves; 0.25 lets four trials of a sweep share one (and its memory)."""
    threads_per_worker: Count | None = None
    """Compute threads of each worker; null: its node's CPUs, divided among the workers there."""
    wait_seconds: NonNegativeFloat = 0.0
    """Seconds to wait for an autoscaling cluster to grow to the size that the run needs."""
    max_failures: Natural = 3
    """How often failed workers are started again from the newest checkpoint while no new one is
    saved; one more failure ends the run. (An error that a person has to fix ends it at once.)"""
    out_of_memory: Literal["halve", "stop"] = "halve"
    """What happens when a worker runs out of memory. halve: the run continues with micro batches of
    half the size and the same batch per step; stop: the run ends and says what would fit."""
    hang_seconds: PositiveFloat | None = 600.0
    """Seconds without progress after which a worker counts as hung (progress: a micro batch, a
    batch of an evaluation, a file of a checkpoint that training waits for). Then the stacks of all
    workers are written to the run's folder, and all are started again; null: never."""
    data: DataConfig = DataConfig()
    track: tuple[Tracker, ...] = ()
    """Experiment trackers that get the figures of metrics.jsonl as well, as [wandb, mlflow,
    trackio]. Each needs its package (pip install 'manta[wandb]'). W&B without a key, MLflow and
    Trackio without a server keep them in HOME/trackers. (TensorBoard's files are always there.)"""
    alerts: AlertsConfig = AlertsConfig()

    def problems(self) -> list[str]:
        found = super().problems()
        on_gpu = self.gpus_per_worker > 0
        for field in dataclasses.fields(DpoConfig):
            value = getattr(self.dpo, field.name)
            if self.data.kind != "preference" and value != field.default:
                found.append(f"dpo.{field.name} is for data.kind=preference: omit it")
        if self.deterministic and not on_gpu:
            found.append(
                "deterministic=true does nothing on CPUs, where every run is deterministic: "
                "omit it, or set gpus_per_worker=1"
            )
        if 0 < self.gpus_per_worker < 1 and self.most_workers > 1:
            found.append(
                f"gpus_per_worker={self.gpus_per_worker} with num_workers={self.num_workers}: NCCL "
                "needs a whole GPU for each worker; set gpus_per_worker=1, or num_workers=1"
            )
        if not self.engine.problems():
            found += self.engine.conflicts(self.zero_stage, on_gpu, self.optimizer)
        return found

    @property
    def run_folder(self) -> str:
        return layout.run_folder(self.home_folder, self.name)

    @property
    def expected_model(self) -> ModelConfig:
        """The model before a dataset is opened: its vocabulary has the size that is expected."""
        size = R50K_SIZE if self.data.tokenizer == R50K else self.data.vocab_size or BPE_VOCAB_SIZE
        return dataclasses.replace(self.model, vocab_size=self.model.vocab_size or size)

    def derived(self) -> dict[str, Any]:
        on_gpu = self.gpus_per_worker > 0
        model, found = self.expected_model, super().derived()
        found["parameters"] = f"{num_parameters(model):,}"
        if self.trainable != "all" or self.lora.rank is not None:
            learnt = learning(model, self.trainable, self.lora)
            found["parameters that learn"] = f"{sum(w.total for w in learnt):,}"
        setup = memory_setup(self, model, "bf16" if on_gpu else "fp32", "cuda" if on_gpu else "cpu")
        if self.micro_batch_size != "auto":
            setup = dataclasses.replace(setup, micro_batch_size=self.micro_batch)
        size = setup.micro_batch_size
        parts = [" ".join(line.split()) for line in costs(setup).lines()]
        found[f"memory of a worker (cost model, micro batches of {size})"] = ", ".join(parts)
        return found


def save_run_config(c: PretrainConfig) -> None:
    file = storage.join(c.run_folder, layout.RUN_CONFIG)
    storage.write_bytes(file, configs.to_yaml(c).encode())


def load_run_config(run: str) -> PretrainConfig | None:
    """The config of the run in this folder; None if this version of Manta did not write it."""
    file = storage.join(run, layout.RUN_CONFIG)
    if not storage.exists(file):
        return None
    with contextlib.suppress(MantaError):
        return configs.load(PretrainConfig, [file])
    return None
