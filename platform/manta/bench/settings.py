"""The config of a bench: what to measure, and for how long."""

from typing import Literal

from manta.config import Count, PositiveFloat, config
from manta.train.settings import PretrainConfig

WITH_PARTS = ("model", "scaling", "memory")  # take lora.*, and all but the last one trainable
ON_RAY = ("overhead", "data", "tokenize", "lanes")


@config
class BenchConfig(PretrainConfig):
    what: Literal[
        "model",
        "scaling",
        "growth",
        "conversations",
        "overhead",
        "data",
        "tokenize",
        "checkpoint",
        "evaluate",
        "generate",
        "serve",
        "serve_http",
        "memory",
        "sweeps",
        "lanes",
        "calibrate",
        "peaks",
        "metrics",
        "gpu",
    ] = "model"
    """What to measure. model: the training step by its parts; scaling: several workers (two, or
    num_workers) against one, each with tokens_per_batch; growth: what grows with the number of
    workers, counted for up to 4,096; conversations: a step on conversations against one on
    documents; overhead: the platform against a bare PyTorch loop; data: the stream against a bare
    pyarrow read of the same shards; tokenize: preparation against tiktoken; checkpoint: a save
    against a bare write; evaluate: lm-eval's requests in batches against one by one; generate:
    sampling with and without the KV cache, and for many prompts at once; serve: the serving engine,
    a conversation with and without its cache, and many streams at once against one; serve_http: the
    server over HTTP, with a crowd of clients of which some go away; memory: the memory that each
    ZeRO stage takes on two workers, against the cost model; sweeps: ASHA replayed over recorded
    curves of a grid; lanes: twelve trials of a sweep, the share of their time that is steps;
    calibrate: how fast this machine does each kind of work, kept in the home for jobs/plan.py;
    peaks: the peak memory of a step of twelve models at each ZeRO stage, against the cost model;
    metrics: what metrics and alerts add to a step; gpu: all checks of a GPU, part by part, with
    their own settings. num_workers applies to model, scaling, overhead and calibrate.
    gpus_per_worker=1 and dtype also apply to evaluate, generate, serve and serve_http, where
    dtype=auto is as in their jobs: fp32 for evaluate; for the others, bf16 on a GPU that
    computes in it, else fp32. lora.* and trainable apply to model and scaling, lora.* to memory
    too."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """gpu: the device of the parts; cpu is for trying out the command itself."""
    size: Literal["full", "tiny"] = "full"
    """gpu: full measures GPT-2 of 124M, 350M and 1.5B parameters; tiny, one with a few thousand."""
    seconds: PositiveFloat = 600.0
    """gpu: the most seconds for all parts together; parts without time left count as skipped."""
    parts: str | None = None
    """gpu: names of the parts to run, in this order, separated by commas; peaks: names of models,
    separated by semicolons; null: all."""
    patience: PositiveFloat = 1.0
    """gpu: factor that lengthens the time-outs of the parts, for a slower machine."""
    curves: str | None = None
    """sweeps: a file of recorded curves; null: the ones that come with Manta. If there is no such
    file, the curves are recorded into it first: 108 small runs on data.source, in this process."""
    json: str | None = None
    """File to write the figures to, as JSON; null: none."""
    rounds: Count = 8
    """Rounds in which A and B are measured in turn; one more round warms up."""
    profile: bool = False
    """model: whether to write a trace of one step, which ui.perfetto.dev opens."""
    new_tokens: Count = 512
    """generate, serve and serve_http: tokens to add to each prompt."""
    minutes: PositiveFloat = 5.0
    """serve_http: how long the crowd of clients stays."""
    hellaswag_path: str | None = None
    """serve_http: HellaSwag's validation set, whose first 200 rows are scored; null: no scores."""
    steps_per_round: Count = 10
    """model and scaling: steps in a round; overhead: steps of A, then as many of B, in a round."""
    tokens: Count = 1 << 27
    """data: tokens of the generated dataset, all of which are read in a round."""
    text_bytes: Count = 256 << 20
    """tokenize: bytes of text to prepare in a round. The text of data.source is repeated up to this
    size, with a number in front of each document."""

    @property
    def has_base(self) -> bool:
        return self.what in WITH_PARTS or self.init.checkpoint is not None

    def problems(self) -> list[str]:
        found = super().problems()
        if self.profile and self.what != "model":
            found.append(f"profile=true is for what=model, not {self.what}: omit it")
        if self.trainable != "all" and self.what == "memory":
            found.append(f"trainable={self.trainable} is not for what=memory: omit it")
        of_http = {"minutes": 5.0, "hellaswag_path": None}
        for key, value in of_http.items():
            if self.what != "serve_http" and getattr(self, key) != value:
                found.append(f"{key} is for what=serve_http, not {self.what}: omit it")
        if self.curves is not None and self.what != "sweeps":
            found.append(f"curves={self.curves} is for what=sweeps, not {self.what}: omit it")
        own = {
            "device": "auto",
            "size": "full",
            "seconds": 600.0,
            "patience": 1.0,
        }
        for key, default in own.items():
            if self.what != "gpu" and getattr(self, key) != default:
                found.append(
                    f"{key}={getattr(self, key)} is for what=gpu, not {self.what}: omit it"
                )
        if self.what not in ("gpu", "peaks") and self.parts is not None:
            found.append(f"parts={self.parts} is for what=gpu or peaks, not {self.what}: omit it")
        return found
