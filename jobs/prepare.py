"""Prepare a dataset: documents become tokenized, shuffled Parquet shards.

    python jobs/prepare.py [config.yaml ...] [key=value ...]
    python jobs/prepare.py data.source=corpus/ data.vocab_size=8192
    ray job submit -- python jobs/prepare.py jobs/configs/gpt2-124m.yaml

Accepts the configs of jobs/pretrain.py, which also prepares missing data by itself. If it was
stopped, the same command continues.
"""

import shlex
import sys
from pathlib import Path

# Run the code next to this job, and take jobs/ off the path: jobs/evaluate.py would hide the
# package `evaluate`, which lm-eval imports.
sys.path[0] = str(Path(__file__).resolve().parents[1] / "platform")

from manta.cluster import connection
from manta.data import mixture, prepare, report
from manta.job import run_job
from manta.train.settings import PretrainConfig


def main(config: PretrainConfig) -> None:
    connection.connect(name=f"prepare {config.data.dataset_name}")
    before = None if config.data.mix else prepare.find(config.data, config.home_folder)
    home, patience = config.home_folder, config.wait_seconds
    for manifest in mixture.open_datasets(config.data, home, print, patience):
        print(report.summary(manifest))
        if config.data.mix or manifest == before:
            print(f"it existed already; to prepare it again, delete {manifest.path}")
    arguments = shlex.join(sys.argv[1:])
    print(f"look   python jobs/inspect.py dataset={manifest.name}")
    if config.data.kind == "text":  # conversations are what a trained model is fine-tuned on
        print("next   python jobs/pretrain.py" + (f" {arguments}" if arguments else ""))


if __name__ == "__main__":
    run_job(main, PretrainConfig)
