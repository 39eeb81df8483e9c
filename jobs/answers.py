"""Ask a model questions about words and small numbers, and count the answers that end.

python jobs/answers.py [config.yaml ...] [key=value ...]
python jobs/answers.py checkpoint=my-run count=200

The questions are of the kinds that jobs/questions.py writes, but none that it has written.
"""

import sys
from pathlib import Path

# Run the code next to this job, and take jobs/ off the path: jobs/evaluate.py would hide the
# package `evaluate`, which lm-eval imports.
sys.path[0] = str(Path(__file__).resolve().parents[1] / "platform")

from manta.evaluate.inference_settings import place_of
from manta.evaluate.questions import AnswersConfig, ask
from manta.job import hint, run_job
from manta.model.inference import inference
from manta.train.checkpoints import checkpoint


def main(config: AnswersConfig) -> None:
    path = checkpoint.resolve(config.checkpoint, config.home_folder)
    device, dtype = place_of(config)
    model = checkpoint.load_model(path, device)
    with inference(device, dtype):
        print(ask(model, checkpoint.load_tokenizer(path), config).line())
    hint(f"next  python jobs/chat.py checkpoint={config.checkpoint}")


if __name__ == "__main__":
    run_job(main, AnswersConfig)
