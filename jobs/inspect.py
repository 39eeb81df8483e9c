"""Show a prepared dataset: totals, lengths, decoded samples. Of conversations, what is trained is
green on a terminal, and elsewhere in [[ ]].

python jobs/inspect.py [config.yaml ...] [key=value ...]
python jobs/inspect.py dataset=python-bpe4096
python jobs/inspect.py dataset=fineweb verify=true
"""

import sys
from pathlib import Path

# Run the code next to this job, and take jobs/ off the path: this file would hide the standard
# library's `inspect`.
sys.path[0] = str(Path(__file__).resolve().parents[1] / "platform")

from manta.data.inspect import InspectConfig, inspect, is_of_text
from manta.job import hint, run_job
from manta.terminal import show


def main(config: InspectConfig) -> None:
    for line in inspect(config):
        show(line)
    if "/" not in config.dataset and is_of_text(config):
        hint(f"next     python jobs/pretrain.py 'data.mix={{{config.dataset}: 1}}' name=my-run")


if __name__ == "__main__":
    run_job(main, InspectConfig)
