"""Pretrain a GPT.

    python jobs/pretrain.py [config.yaml ...] [key=value ...]
    ray job submit -- python jobs/pretrain.py jobs/configs/shakespeare.yaml

Prepares the data first if it is missing. The same command again goes on where a run stopped,
however that was. SIGTERM has it save and end, with exit code 143.
"""

import sys
from pathlib import Path

# The code beside this job is the code that runs, and jobs/ leaves the path: jobs/evaluate.py would
# hide the package of that name, which lm-eval imports.
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
