"""Compare runs with each other and with published figures, and show which differences are noise.

Shows the budget, losses and scores of each run.

python jobs/compare.py [key=value ...]
python jobs/compare.py runs=[small,large] price_per_hour=2.5
"""

import sys
from pathlib import Path

# Run the code next to this job, and take jobs/ off the path: jobs/evaluate.py would hide the
# package `evaluate`, which lm-eval imports.
sys.path[0] = str(Path(__file__).resolve().parents[1] / "platform")

from manta.evaluate.compare import CompareConfig, compare
from manta.job import hint, run_job


def main(config: CompareConfig) -> None:
    lines, picture = compare(config)
    print("\n".join(lines))
    hint(f"\ndrawn in {picture}")


if __name__ == "__main__":
    run_job(main, CompareConfig)
