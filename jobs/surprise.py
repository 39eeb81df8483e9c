"""Show what surprises a model: writes a text as a web page, each token in the colour of its loss.

python jobs/surprise.py checkpoint=my-run text_path=README.md out=surprise.html
python jobs/surprise.py checkpoint=my-run text='The cat sat on the moon.'
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1] / "platform")

from manta.evaluate.surprise import SurpriseConfig, surprise
from manta.job import run_job


def main(config: SurpriseConfig) -> None:
    out, line = surprise(config)
    print(line)
    print(f"written to {out}: open it in a browser")


if __name__ == "__main__":
    run_job(main, SurpriseConfig)
