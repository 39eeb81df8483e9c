"""Runs tasks with lm-eval: the suites of evals/, and any lm-eval task by its name."""

import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from manta import foreign, storage
from manta.errors import ConfigError, DataError, MantaError
from manta.evaluate import catalog, core
from manta.terminal import line
from manta.text.tokenizer import Tokenizer

Source = Callable[[str, dict[str, Any]], list[dict[str, Any]] | None]
Results = dict[str, dict[str, float]]
NOT_IN_DOCUMENTS = ("num_tokens", "ids")  # differ by tokenizer, while documents do not
FEWSHOT_SEED = 1234  # lm-eval's own


@dataclasses.dataclass(frozen=True)
class Chat:
    """How lm-eval makes conversations of a task's questions."""

    system: str | None = None
    fewshot_as_multiturn: bool = True


@dataclasses.dataclass
class Scores:
    results: Results = dataclasses.field(default_factory=dict)
    """{task: {metric: value, metric_stderr: value, "samples": count}}"""
    each: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """{task: {"documents": sha256 of the documents, metric: [[value, weight], ...]}}: what each
    document adds. The metric (or its logarithm) is the sum of values over the sum of weights."""

    def add(self, other: "Scores") -> None:
        self.results |= other.results
        self.each |= other.each


def run_suite(
    lm: Any,
    suite: str,
    documents: Source,
    limit: int | None = None,
    data_dir: str | None = None,
    tokenizer: Tokenizer | None = None,
    only: Sequence[str] | None = None,
    chat: Chat | None = None,
    *,
    say: Callable[[str], None],
) -> Scores:
    """The scores of each task of a suite, and of the suite itself if it has a score of its own.

    Args:
        documents: gives a task's documents, from its name and metadata; None: they come from
            `data_dir` or the hub.
        tokenizer: for tasks that are scored by tokens.
        only: the tasks to run; None: all.
        chat: puts the questions into the chat template that `lm` has.
        say: is called with each task's name before the task runs.

    Raises:
        ConfigError: `chat` is given, and a task has no question for a chat template.
        DataError: a data set is missing, empty or not available here.
    """
    _quiet()
    import datasets
    from lm_eval.tasks import TaskManager

    scores, configs = Scores(), configs_of(suite)
    for given in configs:
        if only is not None and given["task"] not in only:
            continue
        name = given["task"]
        own = documents(name, given["metadata"])
        if own is not None:
            if not own:
                raise DataError(f"suite={suite}: {name} has no documents")
            made = datasets.Dataset.from_list(own)
            split = given.get("test_split") or given.get("validation_split") or "test"
            given["custom_dataset"] = lambda _made={split: made}, **_options: _made
        with _reading(data_dir, name):
            loaded = TaskManager(include_defaults=False).load([given])
        for task in loaded["tasks"].values():
            task.tokenizer = tokenizer
        say(name)
        scores.add(_evaluate(lm, loaded, limit, chat))
    if suite == "core" and only is None:
        found = {n: (r["acc"], r.get("acc_stderr", 0.0)) for n, r in scores.results.items()}
        chance = {given["task"]: given["metadata"]["chance"] for given in configs}
        scores.results = {"core": core.centred(found, chance), **scores.results}
    return scores


def run_task(
    lm: Any,
    name: str,
    limit: int | None = None,
    num_fewshot: int | None = None,
    data_dir: str | None = None,
    chat: Chat | None = None,
) -> Scores:
    """The scores of an lm-eval task, group or tag.

    Raises:
        ConfigError: Manta cannot run the task.
        DataError: the task's data set is empty or not available here.
    """
    _quiet()
    with _reading(data_dir, name):
        loaded = _manager().load([name])
    for task in loaded["tasks"].values():
        for flag, why in (
            ("UNSAFE_CODE", "it runs code that the model writes"),
            ("MULTIMODAL", "it is about pictures or sounds"),
        ):
            if getattr(task, flag, False):
                raise ConfigError(f"tasks={name}: {task.task_name} cannot be run here: {why}")
        if num_fewshot is not None:
            task.set_config(key="num_fewshot", value=num_fewshot)
    return _evaluate(lm, loaded, limit, chat)


def check(
    suites: Sequence[str],
    tasks: Sequence[str],
    look: Callable[[str, dict[str, Any]], object] = lambda *_: None,
) -> None:
    """Raises MantaError if a file of a suite is wrong (`look` reads it, by a task's name and
    metadata) or lm-eval has no task of a given name (the message has the nearest names)."""
    _quiet()
    for suite in suites:
        for given in configs_of(suite):
            look(given["task"], given["metadata"])
    known = _manager().all_tasks if tasks else []
    for name in tasks:
        if name not in known:
            meant = catalog.nearest(name, known)
            raise ConfigError(
                f"tasks={name}: lm-eval has no such task, group or tag{meant} (`lm-eval ls tasks` "
                f"lists its {len(known):,})"
            )


_managers: list[Any] = []


def _manager() -> Any:
    """lm-eval's task manager, made only once because it reads some ten thousand files."""
    if not _managers:
        from lm_eval.tasks import TaskManager

        _managers.append(TaskManager())
    return _managers[0]


def _quiet() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # lm-eval's bootstrap would fork this process
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    import datasets

    datasets.disable_progress_bars()


@dataclasses.dataclass
class _Task:
    """What Manta itself reads of a task's config; lm-eval checks the rest."""

    task: str | None = None
    metadata: dict[str, Any] | None = None
    test_split: str | None = None
    validation_split: str | None = None


def configs_of(suite: str) -> list[dict[str, Any]]:
    """The configs of a suite's tasks, each merged with the part that all tasks share.

    Raises:
        ConfigError: the suite's file is damaged, or lacks a key that each task needs.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    file = catalog.FOLDER / f"{suite}.yaml"
    try:
        content = load_yaml(file, resolve_func=True)
        shared = {key: value for key, value in content.items() if key not in ("group", "task")}
        own = content.get("task", []) if "group" in content else [content]
        found = [{**shared, **given} for given in foreign.check(own, list[dict[str, Any]])]
        for given in found:
            foreign.check(given, _Task)
            if suite == "core":
                foreign.check(given.get("metadata"), core.About)
    except Exception as e:  # its !function lines run code of evals/
        why = line(" ".join(f"{e}".split()) or type(e).__name__)
        raise ConfigError(f"{file}: not a suite ({why}); restore the file") from None
    for given in found or [shared]:
        for key, example in (("task", "a name"), ("metadata", "{version: 1.0}")):
            if not given.get(key):
                name = given.get("task", "a task")
                raise ConfigError(f"{file}: {name} has no {key}: add {key}: {example}")
    return found


@contextlib.contextmanager
def _reading(data_dir: str | None, name: str) -> Iterator[None]:
    """A context in which lm-eval's tasks load their data sets from `data_dir`, if it is given.

    Tasks load data in their constructors, some with code of their own, by `datasets.load_dataset`;
    lm-eval has no option for a folder for all of them. A failure becomes a one-line DataError.
    """
    import datasets

    load = datasets.load_dataset

    def load_dataset(path: str, *args: Any, **kwargs: Any) -> Any:
        where = path
        if data_dir is not None and not Path(path).is_absolute():
            where = storage.join(storage.absolute(data_dir), path)
            if not Path(where).is_dir():
                raise DataError(f"{name}: its data set is not at {where}; {_remedy(path)}")
        try:
            return load(where, *args, **kwargs)
        except Exception as e:
            why = " ".join(f"{type(e).__name__}: {e}".split())[:160]
            there = f"at {where} cannot be read" if where != path else "cannot be loaded"
            raise DataError(f"{name}: its data set {path} {there} ({why}); {_remedy(path)}") from e

    datasets.load_dataset = load_dataset
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    except (DataError, ConfigError):
        raise
    except IndexError:
        raise DataError(f"{name}: its data set has no documents") from None
    except ModuleNotFoundError as e:
        raise DataError(f"{name}: needs a package that is missing ({e}): install it") from None
    except Exception as e:
        why = " ".join(f"{type(e).__name__}: {e}".split())[:200]
        raise DataError(f"{name}: lm-eval cannot load it ({why})") from e
    finally:
        datasets.load_dataset = load


def _remedy(path: str) -> str:
    return (
        f"where there is a network: `hf download {path} --repo-type dataset --local-dir "
        f"DIR/{path}`, then evals.data_dir=DIR"
    )


def _evaluate(lm: Any, loaded: Any, limit: int | None, chat: Chat | None) -> Scores:
    from lm_eval.evaluator import evaluate as lm_evaluate

    from manta.evaluate.choices import TokenChoices

    for task in loaded["tasks"].values():
        task.set_fewshot_seed(FEWSHOT_SEED)  # else each evaluation draws other examples
    options: dict[str, Any] = {}
    if chat is not None:
        for name, task in loaded["tasks"].items():
            if isinstance(task, TokenChoices) or task.OUTPUT_TYPE == "loglikelihood_rolling":
                raise ConfigError(
                    f"chat=true: {name} scores texts as they are, without a chat template: leave "
                    "it out, or omit chat=true"
                )
        options = {
            "apply_chat_template": True,
            "fewshot_as_multiturn": chat.fewshot_as_multiturn,
            "system_instruction": chat.system,
        }
    each = {name: _recorded(name, task) for name, task in loaded["tasks"].items()}
    with contextlib.redirect_stderr(io.StringIO()):  # hides lm-eval's own progress bars
        found = lm_evaluate(
            lm, loaded, limit=limit, bootstrap_iters=1000, log_samples=False, **options
        )
    scores = Scores()
    for name, values in found["results"].items():
        # "acc,none": the metric and the filter; most tasks have one filter.
        clean = {
            key.removesuffix(",none").replace("_stderr,none", "_stderr"): value
            for key, value in values.items()
            if isinstance(value, int | float) and key not in ("sample_len", "sample_count")
        }
        samples = found["n-samples"].get(name, {}).get("effective")
        if samples is None:  # for a group
            samples = sum(found["n-samples"][n]["effective"] for n in _members(loaded, name))
        scores.results[name] = {**clean, "samples": samples}
    scores.each = {name: record() for name, record in each.items()}
    return scores


def _members(loaded: Any, group: str) -> list[str]:
    return [task.task_name for task in loaded["groups"][group].get_all_tasks()]


@contextlib.contextmanager
def _of_documents(name: str, task: Any) -> Iterator[None]:
    """A context in which a task makes something of its documents. Raises DataError if it cannot:
    fields are missing or of another type, or there are too few for the examples."""
    try:
        yield
    except MantaError:
        raise
    except Exception as e:
        shots = task.config.num_fewshot or 0
        if shots and ("larger than population" in str(e) or "fewshot samples" in str(e)):
            count = len(list(task.fewshot_docs()))
            raise DataError(
                f"{name}: num_fewshot={shots} examples before each question, and there are {count} "
                "documents to draw them from: lower num_fewshot"
            ) from None
        why = line(" ".join(f"{type(e).__name__}: {e}".split()))
        raise DataError(
            f"{name}: lm-eval cannot use its documents ({why}); check the fields of its data set"
        ) from e


def _recorded(name: str, task: Any) -> Callable[[], dict[str, Any]]:
    """Records what each document adds to the task's metrics; returns a function that gives it. What
    is wrong with documents becomes one line."""
    build = task.build_all_requests

    def build_all_requests(*args: Any, **kwargs: Any) -> Any:
        with _of_documents(name, task):
            return build(*args, **kwargs)

    task.build_all_requests = build_all_requests
    process, digest = task.process_results, hashlib.sha256()
    added: dict[str, list[tuple[float, float]]] = {}
    count = 0

    def process_results(doc: Any, results: Any) -> Any:
        nonlocal count
        with _of_documents(name, task):
            found = process(doc, results)
        known = {key: value for key, value in doc.items() if key not in NOT_IN_DOCUMENTS}
        digest.update(json.dumps(known, sort_keys=True, default=str).encode())
        count += 1
        for metric, value in found.items():
            pair = value if isinstance(value, tuple) and len(value) == 2 else (value, 1)
            if all(isinstance(number, int | float) for number in pair):
                added.setdefault(metric, []).append((float(pair[0]), float(pair[1])))
        return found

    task.process_results = process_results
    return lambda: {
        "documents": digest.hexdigest(),
        **{metric: pairs for metric, pairs in added.items() if len(pairs) == count},
    }
