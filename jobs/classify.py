"""Label texts with a classifier, which jobs/finetune.py kind=classify makes.

python jobs/classify.py [config.yaml ...] [key=value ...]
python jobs/classify.py checkpoint=spam text="You have won a prize! Call now"
python jobs/classify.py checkpoint=spam file=texts.csv out=labels.csv

The file is a .csv, .tsv, .json, .jsonl or .parquet with a column `text` (text_key). If it has a
column `label` (label_key) too, the answers are scored. Standard output has results only.
"""

import sys
from pathlib import Path

# Run the code next to this job, and take jobs/ off the path: jobs/evaluate.py would hide the
# package `evaluate`, which lm-eval imports.
sys.path[0] = str(Path(__file__).resolve().parents[1] / "platform")

from manta.evaluate.classify import ClassifyConfig, classify
from manta.job import hint, run_job


def main(config: ClassifyConfig) -> None:
    for line in classify(config, hint):
        print(line)


if __name__ == "__main__":
    run_job(main, ClassifyConfig)
