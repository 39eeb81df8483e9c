"""Train a ladder of small runs, fit a scaling law to runs, and say what it predicts.

Fits L = E + A / N^alpha + B / D^beta to the runs of a ladder (sizes x budgets), to finished runs or
to points from a file, recommends size and tokens for a budget, files a prediction before the run
that tests it, and checks it after. A ladder that stopped, for any reason, goes on by the same
command.

    python jobs/scaling.py ladder.sizes=[64,128,192] ladder.tokens=[1e6,2e6,4e6] [key=value ...]
    python jobs/scaling.py points=FILE.csv [key=value ...]
    python jobs/scaling.py runs=[a,b,c,...] budget.hours=10 budget.flops_per_second=2e13
    python jobs/scaling.py check=RUN
    python jobs/scaling.py what=coordinates ladder.sizes=[64,128,256] optimizer.reference_width=128

Accepts the keys of jobs/pretrain.py too; they are for all runs of a ladder.
"""

import sys
from pathlib import Path

# Run the code next to this job, and take jobs/ off the path: jobs/evaluate.py would hide the
# package `evaluate`, which lm-eval imports.
sys.path[0] = str(Path(__file__).resolve().parents[1] / "platform")

from manta.job import hint, run_job
from manta.scaling.answer import answer
from manta.scaling.settings import ScalingConfig


def main(config: ScalingConfig) -> int:
    done = answer(config)
    print("\n".join(line.rstrip() for line in done.lines))
    if done.folder is not None:
        hint(f"\ndrawn in {done.folder}: {', '.join(done.pictures)}")
    return done.exit_code


if __name__ == "__main__":
    run_job(main, ScalingConfig)
