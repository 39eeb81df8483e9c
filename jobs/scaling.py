"""Fit a scaling law to runs, and say what it predicts.

Fits L = E + A / N^alpha + B / D^beta, recommends size and tokens for a budget, files a prediction
before the run that tests it, and checks it after.

python jobs/scaling.py points=FILE.csv [key=value ...]
python jobs/scaling.py runs=[a,b,c,...] budget.hours=10 budget.flops_per_second=2e13
python jobs/scaling.py check=RUN
"""

import sys
from pathlib import Path

# Run the code next to this job, and take jobs/ off the path: jobs/evaluate.py would hide the
# package `evaluate`, which lm-eval imports.
sys.path[0] = str(Path(__file__).resolve().parents[1] / "platform")

from manta.job import hint, run_job
from manta.scaling.settings import ScalingConfig
from manta.scaling.study import study


def main(config: ScalingConfig) -> None:
    lines, folder = study(config)
    print("\n".join(line.rstrip() for line in lines))
    if folder is not None:
        hint(f"\ndrawn in {folder}: fit.png, residuals.png, isoflop.png, frontier.png")


if __name__ == "__main__":
    run_job(main, ScalingConfig)
