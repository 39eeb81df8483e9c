"""List, verify, compare and prune a run's checkpoints.

python jobs/checkpoints.py run=NAME
python jobs/checkpoints.py run=NAME action=verify
python jobs/checkpoints.py run=NAME action=compare steps=[100,200]
python jobs/checkpoints.py run=NAME action=prune checkpoint.keep=1
"""

import sys
from pathlib import Path

# Run the code next to this job, and take jobs/ off the path: jobs/evaluate.py would hide the
# package `evaluate`, which lm-eval imports.
sys.path[0] = str(Path(__file__).resolve().parents[1] / "platform")

from manta.job import hint, run_job
from manta.train.checkpoints.listing import CheckpointsConfig, report


def main(config: CheckpointsConfig) -> None:
    print("\n".join(report(config)))
    hint(f"\nnext  python jobs/evaluate.py checkpoint={config.run}")


if __name__ == "__main__":
    run_job(main, CheckpointsConfig)
