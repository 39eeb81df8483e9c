"""Compare runs: budget, losses, scores, beside published figures; and what is only noise.

python jobs/compare.py [key=value ...]
python jobs/compare.py runs=[small,large] price_per_hour=2.5
"""

import sys
from pathlib import Path

# The code beside this job is the code that runs, and jobs/ leaves the path: jobs/evaluate.py would
# hide the package of that name, which lm-eval imports.
sys.path[0] = str(Path(__file__).resolve().parents[1] / "platform")

from manta.evaluate.compare import CompareConfig, compare
from manta.job import run_job


def main(config: CompareConfig) -> None:
    lines, picture = compare(config)
    print("\n".join(lines))
    print(f"\ndrawn in {picture}")


if __name__ == "__main__":
    run_job(main, CompareConfig)
