"""Prepare a dataset: documents become tokenized Parquet shards.

    python jobs/prepare.py [config.yaml ...] [key=value ...]
    python jobs/prepare.py data.source=corpus/ data.vocab_size=8192
    ray job submit -- python jobs/prepare.py jobs/configs/fineweb-124m.yaml

Takes the configs of jobs/pretrain.py, which prepares what is missing by itself.
"""

import sys
from pathlib import Path

# The code beside this job is the code that runs, and jobs/ leaves the path: jobs/evaluate.py would
# hide the package of that name, which lm-eval imports.
sys.path[0] = str(Path(__file__).resolve().parents[1] / "platform")

from manta import cluster
from manta.data import prepare
from manta.job import run_job
from manta.train.pretrain import PretrainConfig, ready_data


def main(config: PretrainConfig) -> None:
    cluster.connect()
    is_new = prepare.find(config.data, config.home_folder) is None
    manifest = ready_data(config, print)
    for split in ("train", "val"):
        rows, tokens = manifest.rows(split), manifest.tokens(split)
        per_token = manifest.text_bytes(split) / tokens
        print(f"{split:5}  {rows:,} documents, {tokens:,} tokens, {per_token:.2f} bytes per token")
    if not is_new:
        print(f"it was there already, and is whole; to prepare it anew, delete {manifest.path}")
    arguments = " ".join(sys.argv[1:])
    print("next   python jobs/pretrain.py" + (f" {arguments}" if arguments else ""))


if __name__ == "__main__":
    run_job(main, PretrainConfig)
