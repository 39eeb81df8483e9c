"""Plan a run before it costs anything: memory, hours, checkpoints, dollars, loss.

    python jobs/plan.py [config.yaml ...] [key=value ...]
    python jobs/plan.py probe=20                    runs 20 real steps here first
    python jobs/plan.py jobs/configs/gpt2-124m.yaml cluster=clusters/a100x8.yaml mfu=0.4

Takes what jobs/pretrain.py takes, with the same default config. The plan is kept in the home; the
run takes it along when it begins, and says at its end how wrong it was. Exit code 2: the run cannot
work as it is, and a line for each reason says what would.
"""

import sys
from pathlib import Path

# Run the code next to this job, and take jobs/ off the path: jobs/evaluate.py would hide the
# package `evaluate`, which lm-eval imports.
sys.path[0] = str(Path(__file__).resolve().parents[1] / "platform")

from manta.job import hint, run_job
from manta.plan.plan import keep, plan
from manta.plan.settings import PlanConfig


def main(config: PlanConfig) -> int:
    made = plan(config)
    print("\n".join(made.lines))
    hint(f"kept in {keep(config, made)}")
    return 0 if made.can_run else 2


if __name__ == "__main__":
    run_job(main, PlanConfig, Path(__file__).parent / "configs" / "quickstart.yaml")
