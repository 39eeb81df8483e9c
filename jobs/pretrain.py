"""Pretrain a GPT.

    python jobs/pretrain.py [config.yaml ...] [key=value ...]
    ray job submit -- python jobs/pretrain.py jobs/configs/shakespeare.yaml

Prepares the data first if it is missing. If a run stopped, for any reason, the same command
continues it. On SIGTERM, SIGUSR1 or Ctrl-C it saves and ends, with exit code 143, 138 or 130.
"""

import sys
from pathlib import Path

# Run the code next to this job, and take jobs/ off the path: jobs/evaluate.py would hide the
# package `evaluate`, which lm-eval imports.
sys.path[0] = str(Path(__file__).resolve().parents[1] / "platform")

from manta.evaluate.beside import beside, check
from manta.job import run_job, say
from manta.train.pretrain import pretrain, summary
from manta.train.settings import PretrainConfig


def main(config: PretrainConfig) -> int:
    check(config)
    done = pretrain(config, say, beside=beside)
    print("\n" + summary(config, done))
    return done.exit_code


if __name__ == "__main__":
    run_job(main, PretrainConfig, Path(__file__).parent / "configs" / "quickstart.yaml")
