"""Settings of an evaluation."""

from typing import Literal

from manta.config import Count, Natural, NonNegativeFloat, PositiveFloat, Seed, config
from manta.evaluate import catalog
from manta.storage import HomeConfig


@config
class LocalData:
    data_dir: str | None = None
    """Folder with data sets as downloaded (DIR/allenai/ai2_arc/..., as the hub names them;
    hellaswag_val.jsonl, lambada_test.jsonl, eval_bundle/ as published); the hub is then not used.
    null: from the hub."""
    hellaswag_path: str | None = None
    """HellaSwag's validation set as JSONL; null: from data_dir or the hub."""
    lambada_path: str | None = None
    """LAMBADA's test set as JSONL, each row with a `text`; null: from data_dir or the hub."""
    wikitext_path: str | None = None
    """WikiText as plain text, with its ` = Title = ` lines; null: from data_dir or the hub."""
    text_path: str | None = None
    """Plain text for the perplexity suite; null: the val split of the run's own dataset."""
    dataset: str | None = None
    """A prepared dataset, by name or folder, whose val split the perplexity suite reads instead."""


LEAST_SHARE = 0.01  # of a GPU: a process takes about 500 MB of it before it loads a model

SUITE_OF = {
    "hellaswag_path": ("hellaswag",),
    "lambada_path": ("lambada",),
    "wikitext_path": ("wikitext",),
    "text_path": ("perplexity", "quick"),
    "dataset": ("perplexity", "quick"),
}


@config
class EvaluateConfig(HomeConfig):
    checkpoint: str = "quickstart"
    """A run's name or folder (its newest checkpoint), or a checkpoint's folder."""
    suite: str | tuple[str, ...] | None = None
    """A file of evals/ (or [several]), without its .yaml: perplexity, quick, hellaswag, wikitext,
    lambada or core; null: perplexity, or only `tasks` if any are given."""
    tasks: tuple[str, ...] = ()
    """Names of lm-eval tasks, groups or tags: hellaswag, arc_easy, piqa, winogrande, ..."""
    num_fewshot: Natural | None = None
    """Examples before each question of `tasks`; null: as many as the task sets."""
    chat: bool = False
    """Whether the questions of a task are put into the model's chat template, as lm-eval's
    apply_chat_template does it. Scores with it have a file of their own."""
    system: str | None = None
    """System message, with chat=true, before a task's own description; null: none."""
    fewshot_as_multiturn: bool = True
    """Whether, with chat=true, examples are turns of their own, and not one text with the
    question."""
    seed: Seed = 0
    """Seed of the completions that tasks draw. Scores with another seed have a file of their
    own."""
    limit: Count | None = None
    """Evaluate at most this many documents of each task, the first ones; null: all."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of the matrix products. Scores are usually compared in fp32."""
    watch: bool = False
    """Follow a run: evaluate each of its checkpoints once, as it lands, until the run has ended."""
    watch_seconds: PositiveFloat = 5.0
    """Seconds between two looks for a new checkpoint."""
    num_workers: Count = 1
    """Workers that share the requests; the scores are the same for any number."""
    cpus: PositiveFloat = 1.0
    """CPUs that Ray reserves for each worker."""
    gpus: NonNegativeFloat = 0
    """GPUs of each worker: 0, 1, or a share of one (0.25: four workers to a card)."""
    threads: Natural = 0
    """Compute threads of a worker; 0: its node's CPUs, shared by the workers."""
    evals: LocalData = LocalData()

    def problems(self) -> list[str]:
        known = catalog.names()
        for suite in self.suites:
            if suite not in known:
                meant = catalog.nearest(suite, known)
                return [
                    f"suite={suite}: valid are {', '.join(known)} (the files of "
                    f"{catalog.FOLDER}){meant}; an lm-eval task goes in tasks=[...]"
                ]
        found = []
        for key, suites in SUITE_OF.items():
            if getattr(self.evals, key) is not None and not {*suites} & {*self.suites}:
                given = ", ".join([*self.suites, *self.tasks])
                found.append(f"evals.{key} is for suite={suites[0]}, not {given}: omit it")
        if self.evals.text_path is not None and self.evals.dataset is not None:
            found.append("evals.text_path, evals.dataset: give one of them")
        if not (self.gpus in (0, 1) or LEAST_SHARE <= self.gpus < 1):
            found.append(
                f"gpus={self.gpus:g}: a worker has no GPU (0), one (1) or a share of one, from "
                f"{LEAST_SHARE} (0.25: four workers to a card); for more GPUs, raise num_workers"
            )
        if self.seed and not self.tasks:
            found.append("seed is for tasks=[...]: omit it; the suites draw nothing")
        if self.num_fewshot is not None and not self.tasks:
            found.append("num_fewshot is for tasks=[...]: omit it; the suites have their own")
        if not self.chat and (self.system is not None or not self.fewshot_as_multiturn):
            found.append("system, fewshot_as_multiturn: are for chat=true; omit them")
        return found

    @property
    def suites(self) -> tuple[str, ...]:
        """The suites to run, in addition to `tasks`."""
        if self.suite is None:
            return () if self.tasks else ("perplexity",)
        return (self.suite,) if isinstance(self.suite, str) else self.suite
