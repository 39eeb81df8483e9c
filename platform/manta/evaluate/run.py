"""An evaluation: a suite of lm-eval's on a checkpoint, by Ray workers; a table and a JSON file."""

import contextlib
import io
import json
import logging
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from manta import cluster, storage
from manta.config import Count, Natural, PositiveFloat, config
from manta.data import manifest as manifests
from manta.data import shards
from manta.errors import DataError
from manta.evaluate import farm
from manta.evaluate.adapter import MantaLM
from manta.progress import Progress
from manta.train import checkpoint as checkpoints

SUITES = Path(__file__).resolve().parents[3] / "evals"


@config
class LocalData:
    hellaswag_path: str | None = None
    """HellaSwag's validation set as JSONL; null: from the hub."""
    wikitext_path: str | None = None
    """WikiText as plain text, with its ` = Title = ` lines; null: from the hub."""
    text_path: str | None = None
    """Plain text for the perplexity suite; null: the val split of the run's own dataset."""


@config
class EvaluateConfig:
    checkpoint: str = "quickstart"
    """A run's name or folder (its newest checkpoint), or a checkpoint's folder."""
    suite: str = "perplexity"
    """A file of evals/, without its .yaml: perplexity, hellaswag or wikitext."""
    limit: Count | None = None
    """Only the first so many documents; null: all."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Of the matrix products. fp32 is what scores are usually compared in."""
    num_workers: Count = 1
    """Workers that share the requests; the scores are the same for any number."""
    cpus: PositiveFloat = 1.0
    """CPUs that Ray reserves for each worker."""
    gpus: Literal[0, 1] = 0
    """1: each worker has a GPU."""
    threads: Natural = 0
    """Compute threads of a worker; 0: its node's CPUs, shared by the workers."""
    home: str | None = None
    """Folder or URI for data and runs; null: $MANTA_HOME, or ~/manta."""
    evals: LocalData = LocalData()

    def problems(self) -> list[str]:
        known = sorted(p.stem for p in SUITES.glob("*.yaml"))
        if self.suite not in known:
            return [f"suite={self.suite}: valid are {', '.join(known)} (the files of {SUITES})"]
        found = []
        for key, suite in (
            ("hellaswag_path", "hellaswag"),
            ("wikitext_path", "wikitext"),
            ("text_path", "perplexity"),
        ):
            if getattr(self.evals, key) is not None and self.suite != suite:
                found.append(f"evals.{key} is for suite={suite}, not {self.suite}: omit it")
        return found


def evaluate(c: EvaluateConfig) -> dict[str, Any]:
    """Runs the suite; prints a table, writes JSON beside the run, returns what it wrote.

    Raises:
        MantaError: checkpoint or data are missing, damaged, or cannot be had here.
    """
    home = storage.home(c.home)
    path = checkpoints.resolve(c.checkpoint, home)
    documents = local_documents(c, path)
    cluster.connect()
    cluster.require(c.num_workers, c.cpus, c.gpus, 0)
    tokenizer = checkpoints.load_tokenizer(path)
    model = checkpoints.load_model_config(path)
    assert model.vocab_size is not None
    started = time.perf_counter()
    with farm.workers(path, c.num_workers, c.cpus, c.gpus, c.threads, c.dtype) as pool:
        lm = MantaLM(pool, tokenizer, model.context_length, model.vocab_size)

        def expect(count: int) -> None:
            lm.advance = Progress(f"evaluating {c.suite}", count, "requests").advance

        results = run_lm_eval(lm, c.suite, documents, c.limit, expect)
    found = {"results": results, "seconds": time.perf_counter() - started}
    result = {"suite": c.suite, "checkpoint": path, "limit": c.limit, "dtype": c.dtype, **found}
    run, step = path.rpartition("/checkpoints/")[::2]
    file = storage.join(run or path, "evals", step or "model", f"{c.suite}.json")
    storage.write_json(file, result)
    print(table(result) + f"\nwritten to {file}", flush=True)
    return result


def local_documents(c: EvaluateConfig, path: str) -> list[dict[str, Any]] | None:
    """The suite's documents from this machine or the run's dataset; None: they are on the hub."""
    if c.suite == "hellaswag" and c.evals.hellaswag_path is not None:
        return read_hellaswag(storage.absolute(c.evals.hellaswag_path))
    if c.suite == "wikitext" and c.evals.wikitext_path is not None:
        text = _read_text(c.evals.wikitext_path, "evals.wikitext_path")
        # A page begins at its title, ` = Title = `; sections have more signs.
        pages = re.split(r"(?m)^(?= = [^=\n]+ = ?$)", text)
        return [{"page": page} for page in pages if page.strip()]
    if c.suite == "perplexity":
        texts = (
            [_read_text(c.evals.text_path, "evals.text_path")]
            if c.evals.text_path is not None
            else val_texts(path)
        )
        if not texts:
            raise DataError(f"{path} was imported, without a dataset: give evals.text_path=FILE")
        tokenizer = checkpoints.load_tokenizer(path)
        return [{"text": t, "num_tokens": len(tokenizer.encode(t))} for t in texts if t.strip()]
    return None


def val_texts(path: str) -> list[str]:
    """The documents of the val split that the checkpoint's run was measured on."""
    texts = []
    for folder in checkpoints.load_state(path).datasets:
        if not manifests.exists(folder):
            raise DataError(
                f"the dataset of this checkpoint is not at {folder} any more; give a text with "
                "evals.text_path=FILE"
            )
        manifest = manifests.load(folder)
        tokenizer = manifest.load_tokenizer()
        for shard in manifest.split("val"):
            texts += [tokenizer.decode(ids.tolist()) for ids in shards.documents(manifest, shard)]
    return texts


def read_hellaswag(path: str) -> list[dict[str, Any]]:
    """Raises DataError, naming the line, when a row is not one of HellaSwag's."""
    strings = ("activity_label", "ctx_a", "ctx_b")
    rows = []
    for number, line in enumerate(storage.read_bytes(path).splitlines(), 1):
        try:
            row = json.loads(line)
            endings, label = row["endings"], int(row["label"])
            texts = [row[key] for key in strings] + endings
            if (
                len(endings) != 4
                or not 0 <= label <= 3
                or not all(isinstance(t, str) for t in texts)
            ):
                raise ValueError("4 endings, a label from 0 to 3, and strings else")
            rows.append({**{k: row[k] for k in strings}, "endings": endings, "label": str(label)})
        except (ValueError, KeyError, TypeError) as e:
            raise DataError(
                f"evals.hellaswag_path={path}, line {number}: not a HellaSwag row ({e!r}); each "
                f"has {', '.join(strings)}, endings and label"
            ) from None
    if not rows:
        raise DataError(f"evals.hellaswag_path={path}: the file is empty")
    return rows


def _read_text(path: str, key: str) -> str:
    data = storage.read_bytes(storage.absolute(path))
    try:
        text = data.decode()
    except UnicodeDecodeError as e:
        raise DataError(f"{key}={path}: not UTF-8 at byte {e.start}; convert the file") from None
    if not text.strip():
        raise DataError(f"{key}={path}: the file is empty")
    return text


def run_lm_eval(
    lm: Any,
    suite: str,
    documents: list[dict[str, Any]] | None,
    limit: int | None,
    expect: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """{task: {metric: value, metric_stderr: value, "samples": count}}.

    Args:
        expect: is told how many requests there are.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    import datasets
    from lm_eval.evaluator import evaluate as lm_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    datasets.disable_progress_bars()
    task_config = load_yaml(SUITES / f"{suite}.yaml", resolve_func=True)
    if documents is not None:
        made = datasets.Dataset.from_list(documents)
        split = task_config.get("test_split") or task_config["validation_split"]
        task_config["custom_dataset"] = lambda **kwargs: {split: made}
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            tasks = TaskManager(include_defaults=False).load([task_config])
        except Exception as e:
            if documents is not None:
                raise
            where = task_config.get("dataset_path")
            raise DataError(
                f"suite={suite}: the dataset {where} cannot be had from the hub "
                f"({type(e).__name__}); download it and give evals.{suite}_path=FILE"
            ) from None
    expect(_count_requests(tasks, limit))
    with contextlib.redirect_stderr(io.StringIO()):  # lm-eval's own bars, beside ours
        found = lm_evaluate(lm, tasks, limit=limit, bootstrap_iters=1000, log_samples=False)
    results = {}
    for name, values in found["results"].items():
        clean = {
            key.removesuffix(",none").replace("_stderr,none", "_stderr"): value
            for key, value in values.items()
            if isinstance(value, int | float) and key not in ("sample_len", "sample_count")
        }
        results[name] = {**clean, "samples": found["n-samples"][name]["effective"]}
    return results


def _count_requests(tasks: Any, limit: int | None) -> int:
    total = 0
    for task in tasks["tasks"].values():
        documents = len(task.eval_docs)
        documents = min(documents, limit) if limit is not None else documents
        choices = len(task.doc_to_choice(task.eval_docs[0])) if "choice" in task.OUTPUT_TYPE else 1
        total += documents * choices
    return total


def table(result: dict[str, Any]) -> str:
    """The results as aligned columns."""
    rows = [("task", "metric", "value", "stderr")]
    for task, values in result["results"].items():
        for metric, value in values.items():
            if metric.endswith("_stderr") or metric == "samples":
                continue
            error = values.get(f"{metric}_stderr")
            rows.append((task, metric, f"{value:.4f}", f"{error:.4f}" if error else ""))
        rows.append((task, "documents", str(values["samples"]), ""))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        f"{a:<{widths[0]}}  {b:<{widths[1]}}  {v:>{widths[2]}}  {e:>{widths[3]}}".rstrip()
        for a, b, v, e in rows
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
