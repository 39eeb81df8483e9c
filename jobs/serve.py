"""Serve trained models: a chat page, and a server that speaks OpenAI's protocol.

python jobs/serve.py checkpoint=my-run
python jobs/serve.py checkpoint=my-run,other-run port=8080 overflow=slide
ray job submit --working-dir . -- python jobs/serve.py checkpoint=my-run replicas=4

It listens on this machine alone, and needs no token there. On another address (host=0.0.0.0) it
needs one, which it makes, keeps and prints once. It needs pip install 'manta[serve]' (for
replicas on a cluster, 'manta[replicas]').
"""

import sys
from pathlib import Path

# Run the code next to this job, and take jobs/ off the path: jobs/evaluate.py would hide the
# package `evaluate`, which lm-eval imports.
sys.path[0] = str(Path(__file__).resolve().parents[1] / "platform")

from manta.job import run_job, say
from manta.serve.serve import serve
from manta.serve.settings import ServeConfig


def main(config: ServeConfig) -> None:
    serve(config, say)


if __name__ == "__main__":
    run_job(main, ServeConfig)
