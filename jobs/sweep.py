"""Sweep over any config keys; each trial is a real training run.

    python jobs/sweep.py [config.yaml ...] [key=value ...]
    python jobs/sweep.py sweep.lr=[1e-3,2e-3] sweep.tokens_per_batch=[2048,4096]

Accepts the keys of jobs/pretrain.py too; they apply to all trials, except where the sweep varies
them. Prints what was found in sentences, with the commands that would tell more, and writes
sweep.html. If a sweep stopped, for any reason, the same command goes on. On SIGTERM, SIGUSR1 or
Ctrl-C it saves and ends, with exit code 143, 138 or 130.
"""

import sys
from pathlib import Path

# Run the code next to this job, and take jobs/ off the path: jobs/evaluate.py would hide the
# package `evaluate`, which lm-eval imports.
sys.path[0] = str(Path(__file__).resolve().parents[1] / "platform")

from manta.job import run_job
from manta.sweep.settings import SweepConfig
from manta.sweep.sweep import sweep


def main(config: SweepConfig) -> int:
    done = sweep(config)
    if done.ranking is not None:
        print("\n" + "\n".join(done.ranking.lines))
        print(f"\nwritten to {done.page}: open it in a browser")
        more = f"total_tokens={4 * config.total_tokens}"
        print(f"next  python jobs/pretrain.py {done.ranking.best_config} {more}")
        if done.ranking.replay_config is not None:
            print(f"      python jobs/sweep.py {done.ranking.replay_config}")
    return done.exit_code


if __name__ == "__main__":
    run_job(main, SweepConfig, Path(__file__).parent / "configs" / "quickstart.yaml")
