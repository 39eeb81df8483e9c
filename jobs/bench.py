"""Measure Manta itself.

    python jobs/bench.py what=gpu json=gpu.json     every check of a GPU, in ten minutes
    python jobs/bench.py what=overhead json=overhead.json
    python jobs/bench.py what=data
    python jobs/bench.py what=tokenize data.source=corpus.txt

Accepts the keys of jobs/pretrain.py too. Figures are ratios within one run; compare only those.
"""

import sys
from pathlib import Path

# Run the code next to this job, and take jobs/ off the path: jobs/evaluate.py would hide the
# package `evaluate`, which lm-eval imports.
sys.path[0] = str(Path(__file__).resolve().parents[1] / "platform")

from manta.bench.command import bench
from manta.bench.settings import BenchConfig
from manta.job import run_job


def main(config: BenchConfig) -> int:
    return 1 if bench(config).get("failed") else 0


if __name__ == "__main__":
    run_job(main, BenchConfig, Path(__file__).parent / "configs" / "quickstart.yaml")
