"""Write conversations about words and small numbers, to fine-tune a small model on.

python jobs/questions.py [config.yaml ...] [key=value ...]
python jobs/questions.py out=questions.jsonl count=4000
python jobs/questions.py held_out=true out=held-out.jsonl count=200

jobs/answers.py asks a model the questions that are left out of the file; held_out=true writes such
questions for jobs/judge.py.
"""

import sys
from pathlib import Path

# Run the code next to this job, and take jobs/ off the path: jobs/evaluate.py would hide the
# package `evaluate`, which lm-eval imports.
sys.path[0] = str(Path(__file__).resolve().parents[1] / "platform")

from manta.evaluate.questions import QuestionsConfig, write
from manta.job import hint, run_job


def main(config: QuestionsConfig) -> None:
    path = write(config)
    print(path)
    if config.held_out:
        hint(f"next  python jobs/judge.py checkpoint=RUN questions={path}")
    else:
        hint(f"next  python jobs/prepare.py data.kind=chat data.source={path}")


if __name__ == "__main__":
    run_job(main, QuestionsConfig)
