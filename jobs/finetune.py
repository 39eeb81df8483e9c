"""Fine-tune a model: go on from a checkpoint, on conversations, preferences, labels or texts.

    python jobs/finetune.py base=quickstart data.source=chats.jsonl
    python jobs/finetune.py kind=preference base=chat data.source=pairs.jsonl
    python jobs/finetune.py kind=classify base=quickstart data.source=labelled.csv
    ray job submit -- python jobs/finetune.py base=RUN data.source=FILE kind=chat name=chat

Rows of conversations have OpenAI's messages, ShareGPT's conversations, Alpaca's instruction, input
and output, or prompt and completion. The loss is that of the assistant's answers. Rows of
preferences have a prompt, a chosen and a rejected answer; the loss is DPO's, against the
log-probabilities that the base gives the answers. Labelled texts have a text and a label; what is
made classifies texts, and is tested at the end. The run is one like any other: the same command
continues it, and evaluate, generate and export take it.
"""

import sys
from pathlib import Path

# Run the code next to this job, and take jobs/ off the path: jobs/evaluate.py would hide the
# package `evaluate`, which lm-eval imports.
sys.path[0] = str(Path(__file__).resolve().parents[1] / "platform")

from manta.evaluate.beside import beside, check
from manta.evaluate.exam import examine, publish
from manta.evaluate.reference import refer
from manta.finetune.finetune import finetune, summary
from manta.finetune.settings import FinetuneConfig
from manta.job import run_job, say


def main(config: FinetuneConfig) -> int:
    check(config)
    run, done = finetune(config, say, refer, beside=beside)
    print("\n" + summary(config, run, done))
    if run.model.labels and not done.exit_code:
        balanced = run.class_weights == "balanced"
        for line in publish(done.folder, run.name, examine(done.checkpoint, balanced=balanced)):
            print(line)
    return done.exit_code


if __name__ == "__main__":
    configs = Path(__file__).parent / "configs"
    others = {
        "kind=preference": configs / "dpo.yaml",
        "kind=classify": configs / "classifier.yaml",
    }
    run_job(main, FinetuneConfig, configs / "chat.yaml", others)
