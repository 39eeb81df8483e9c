"""Evaluate a checkpoint with lm-eval.

python jobs/evaluate.py [config.yaml ...] [key=value ...]
python jobs/evaluate.py checkpoint=quickstart suite=perplexity
python jobs/evaluate.py checkpoint=my-run suite=hellaswag evals.hellaswag_path=val.jsonl
python jobs/evaluate.py checkpoint=my-run tasks=[arc_easy,piqa] evals.data_dir=DIR
python jobs/evaluate.py checkpoint=my-run suite=quick watch=true     every new checkpoint
"""

import sys
from pathlib import Path

# Run the code next to this job, and take jobs/ off the path: jobs/evaluate.py would hide the
# package `evaluate`, which lm-eval imports.
sys.path[0] = str(Path(__file__).resolve().parents[1] / "platform")

from manta.evaluate.evaluate import evaluate
from manta.evaluate.settings import EvaluateConfig
from manta.evaluate.watch import watch
from manta.job import run_job, say


def main(config: EvaluateConfig) -> None:
    if config.watch:
        watch(config, say)
        return
    evaluate(config)
    print(f'next  python jobs/generate.py checkpoint={config.checkpoint} prompt="..."')


if __name__ == "__main__":
    run_job(main, EvaluateConfig)
