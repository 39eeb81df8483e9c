"""The folders and file names of runs, checkpoints and datasets in the home folder.

HOME/runs/NAME/config.yaml           the run's config
               metrics.jsonl         a line for each logged step
               samples.jsonl         texts that the model wrote during training
               loss.png              the loss curve
               tensorboard/          the same figures, for TensorBoard; scores in evals/
               goodput.json          what the run spent its time on
               history.jsonl         its starts with their commands, its failures, its ends
               rollbacks.json        steps whose tokens are skipped
               trackers.json         its ids in the trackers that it feeds
               labels.json           how well a classifier did on its test split
               confusion.png         which labels it gave instead of which
               plan.json             what it was expected to take, from before it began
               report.html           what was trained on what, and what came of it
               report.json           the same, each number with the file and key it comes from
               conversations.sqlite  what was said on the chat page
               stacks/               stack traces of workers that made no progress
               evals/STEP/           for each suite a file of scores, and one of each document's
               evals/curve.png       the scores against tokens
               .ray-1a2b3c4d/        Ray's own records of a run or sweep, only as long as it works
               checkpoints/STEP/     STEP is step-00001000; a checkpoint that was set aside has
                                     a prefix: damaged-, rolled-back-
                   model.safetensors     weights, fp32, readable without Manta
                   config.json           the model's config
                   encoding.json         the tokenizer
                   adapter.safetensors   the weights of LoRA's adapters, if the run has some
                   adapter.json          their rank and scale, and the weights that they are for
                   state.json            where training was (TrainState)
                   optimizer/            the optimizer's state, one file per rank
                   optimizer.json        where in these files each weight's state is
                   MANIFEST.json         every file's size and sha256, written LAST
HOME/runs/SWEEP/decisions.jsonl      what a sweep decided, a line each
                sweep.yaml           its config, for the commands that go on with it
                ranking.json         its trials, the best first
                findings.json        what it found, in sentences with their figures
                sweep.html           all of that as a page, with pictures
                best.yaml            the best trial as a config; for pbt also replay.yaml
HOME/data/NAME/train-00000.parquet   token ids; an end-of-text token ends each document
               val-00000.parquet
               encoding.json         the tokenizer
               lengths.png           the lengths of its documents
               sources.json          sizes, times and digests of what it was prepared from
               reference-SHA-fp32/   log-probabilities of the answers of pairs, by a model
               MANIFEST.json         written LAST: without it there is no dataset
HOME/judged/NAME/answers.jsonl       what each model answered to each question
                 judgements.jsonl    what the judge replied
                 result.json         the figures of the newest judging
HOME/scaling/NAME/fit.json           a scaling law, its intervals and its points
                  fit.png, ...        pictures of it
                  transfer.json, .png   loss against learning rate for several widths
                  coordinates.json, .png  growth of activations with the width
                  predictions/RUN.json  filed before the run, and never replaced
                  predictions/RUN.yaml  the run's config, if it is one of a ladder
HOME/plans/NAME.json                 what a run was expected to take, before it began
HOME/calibration.json                how fast this machine does each kind of work
HOME/trackers/                       what trackers keep on this machine
HOME/monitor/                        Prometheus' configuration and data, Grafana's board
HOME/exports/                        models in the formats of other software
"""

import re

from manta import storage

# Names in both checkpoints and datasets.
MANIFEST = "MANIFEST.json"
ENCODING = "encoding.json"

# Names in a run.
RUN_CONFIG = "config.yaml"
RUN_LOCK = ".lock"
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
LOSS_CURVE = "loss.png"
TENSORBOARD = "tensorboard"
GOODPUT = "goodput.json"
HISTORY = "history.jsonl"
ROLLBACKS = "rollbacks.json"
TRACKERS = "trackers.json"
STACKS = "stacks"
SURPRISE = "surprise.html"
PLAN = "plan.json"
REPORT = "report.html"
REPORT_FACTS = "report.json"
CONVERSATIONS = "conversations.sqlite"
LABELS = "labels.json"
CONFUSION = "confusion.png"
RAY_RECORDS = ".ray"
EVALS = "evals"
SCORES = ".json"
SCORED_DOCUMENTS = ".documents.json"
SCORES_CURVE = "curve.png"
_CHECKPOINTS = "checkpoints"

# Names of and in a checkpoint.
STEP = "step-"
DAMAGED = "damaged-"
ROLLED_BACK = "rolled-back-"
OUTSIDE = "model"
WEIGHTS = "model.safetensors"
MODEL_CONFIG = "config.json"
STATE = "state.json"
ADAPTER = "adapter.safetensors"
ADAPTER_CONFIG = "adapter.json"
OPTIMIZER = "optimizer"
OPTIMIZER_INDEX = "optimizer.json"

# All names that Manta gives to files and folders directly in a run.
RUN_NAMES = (
    RUN_CONFIG, RUN_LOCK, METRICS, SAMPLES, LOSS_CURVE, TENSORBOARD, GOODPUT, HISTORY, ROLLBACKS,
    TRACKERS,
    STACKS, SURPRISE, REPORT, REPORT_FACTS, CONVERSATIONS, LABELS, CONFUSION, EVALS, _CHECKPOINTS,
    PLAN,
)  # fmt: skip

# Names in a dataset.
LENGTHS = "lengths.png"
SOURCES = "sources.json"
REFERENCE = "reference-"

# Names in a sweep and in a comparison of runs.
DECISIONS = "decisions.jsonl"
BEST_CONFIG = "best.yaml"
RANKING = "ranking.json"
REPLAY_CONFIG = "replay.yaml"
SWEEP_CONFIG = "sweep.yaml"
FINDINGS = "findings.json"
SWEEP_PAGE = "sweep.html"
COMPARISON = "compare.png"
SWEEP_NAMES = (
    RUN_LOCK, DECISIONS, BEST_CONFIG, RANKING, REPLAY_CONFIG, SWEEP_CONFIG, FINDINGS, SWEEP_PAGE,
)  # fmt: skip

# Names in a folder of answers and judgements.
ANSWERS = "answers.jsonl"
JUDGEMENTS = "judgements.jsonl"
JUDGED = "result.json"

# The name in the home of what a machine's speed was measured to be.
CALIBRATION = "calibration.json"

# Names in a study of scaling.
LAW = "fit.json"


def rank_file(rank: int) -> str:
    """The name of a rank's file of the optimizer's state."""
    return f"rank-{rank:05d}.safetensors"


def runs_folder(home: str) -> str:
    return storage.join(home, "runs")


def run_folder(home: str, name: str) -> str:
    return storage.join(runs_folder(home), name)


def datasets_folder(home: str) -> str:
    return storage.join(home, "data")


def dataset_folder(home: str, name: str) -> str:
    return storage.join(datasets_folder(home), name)


def dataset_lock(home: str, name: str) -> str:
    """The lock of a dataset; it is next to its folder because that may have to be deleted."""
    return storage.join(datasets_folder(home), f".{name}.lock")


def judged_folder(home: str, name: str) -> str:
    return storage.join(home, "judged", name)


def scaling_folder(home: str, name: str) -> str:
    return storage.join(home, "scaling", name)


def plan_file(home: str, name: str) -> str:
    """The plan of a run that has not begun; its start takes it into the run's folder."""
    return storage.join(home, "plans", f"{name}.json")


def prediction_file(study: str, run: str) -> str:
    return storage.join(study, "predictions", f"{run}.json")


def predicted_config(study: str, run: str) -> str:
    return storage.join(study, "predictions", f"{run}.yaml")


def prediction_lock(study: str, run: str) -> str:
    folder, _, name = prediction_file(study, run).rpartition("/")
    return storage.join(folder, f".{name}.lock")


def trackers_folder(home: str) -> str:
    return storage.join(home, "trackers")


def monitor_folder(home: str) -> str:
    return storage.join(home, "monitor")


def exports_folder(home: str) -> str:
    return storage.join(home, "exports")


def checkpoints_folder(run: str) -> str:
    return storage.join(run, _CHECKPOINTS)


def checkpoint_folder(run: str, step: int) -> str:
    return storage.join(checkpoints_folder(run), f"{STEP}{step:08d}")


def step_of(checkpoint: str) -> int:
    """The step of a checkpoint, from the folder name that `checkpoint_folder` gives it."""
    return int(checkpoint.rpartition("-")[2])


def is_step(name: str) -> bool:
    """Whether a folder's name is one that `checkpoint_folder` gives, and not step-abc."""
    return re.fullmatch(f"{STEP}[0-9]{{1,18}}", name) is not None


def tokenizers_folder(home: str) -> str:
    return storage.join(home, "tokenizers")


def tokenizer_file(home: str, sha256: str) -> str:
    """A copy of a tokenizer that stays when the checkpoint that it came from is deleted."""
    return storage.join(tokenizers_folder(home), f"{sha256[:16]}.json")


def split_checkpoint(path: str) -> tuple[str, str]:
    """The run's folder and the checkpoint's name, step-00000500; for a checkpoint that is not in a
    run, its own folder and "model"."""
    run, _, step = path.rpartition(f"/{_CHECKPOINTS}/")
    return (run, step) if run else (path, OUTSIDE)


def evals_folder(run: str) -> str:
    return storage.join(run, EVALS)


def scores_file(run: str, step: str, label: str) -> str:
    """The scores of a suite or task; `step` is a checkpoint's name, step-00000500."""
    return storage.join(evals_folder(run), step, f"{label}{SCORES}")


def scored_documents_file(run: str, step: str, label: str) -> str:
    """What each document contributes to the scores of `scores_file`."""
    return storage.join(evals_folder(run), step, f"{label}{SCORED_DOCUMENTS}")
