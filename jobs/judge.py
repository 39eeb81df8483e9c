"""Have models answer a file of questions, and a judge score the answers.

python jobs/judge.py [config.yaml ...] [key=value ...]
python jobs/judge.py checkpoint=[A,B] questions=q.jsonl judge=http://localhost:8000/v1 repeats=3
python jobs/judge.py checkpoint=[A,B] questions=q.jsonl judge=RUN mode=pairwise
python jobs/judge.py checkpoint=chat questions=q.jsonl     only the answers

judge= is an OpenAI-compatible endpoint (pip install 'manta[judge]'; endpoint.key_env names the
environment variable that has its key) or a checkpoint. Answers and judgements are kept in
HOME/judged/NAME, and the same command goes on after a kill.
"""

import sys
from pathlib import Path

# Run the code next to this job, and take jobs/ off the path: jobs/evaluate.py would hide the
# package `evaluate`, which lm-eval imports.
sys.path[0] = str(Path(__file__).resolve().parents[1] / "platform")

from manta.job import run_job, say
from manta.judge.judge import judge
from manta.judge.settings import JudgeConfig


def main(config: JudgeConfig) -> None:
    judge(config, say)


if __name__ == "__main__":
    run_job(main, JudgeConfig)
