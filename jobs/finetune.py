"""Fine-tune a model: go on from a checkpoint, on conversations, on preferences or on texts.

    python jobs/finetune.py base=quickstart data.source=chats.jsonl
    python jobs/finetune.py kind=preference base=chat data.source=pairs.jsonl
    ray job submit -- python jobs/finetune.py base=RUN data.source=FILE kind=chat name=chat

Rows of conversations have OpenAI's messages, ShareGPT's conversations, Alpaca's instruction, input
and output, or prompt and completion. The loss is that of the assistant's answers. Rows of
preferences have a prompt, a chosen and a rejected answer; the loss is DPO's, against the
log-probabilities that the base gives the answers. The run is one like any other: the same command
continues it, and evaluate, generate and export take it.
"""

import sys
from pathlib import Path

# Run the code next to this job, and take jobs/ off the path: jobs/evaluate.py would hide the
# package `evaluate`, which lm-eval imports.
sys.path[0] = str(Path(__file__).resolve().parents[1] / "platform")

from manta.evaluate.beside import beside, check
from manta.evaluate.reference import refer
from manta.finetune.finetune import finetune
from manta.finetune.settings import FinetuneConfig
from manta.job import run_job, say
from manta.train.pretrain import summary


def main(config: FinetuneConfig) -> int:
    check(config)
    run, done = finetune(config, say, refer, beside=beside)
    print("\n" + summary(run, done))
    return done.exit_code


if __name__ == "__main__":
    configs = Path(__file__).parent / "configs"
    others = {
        "kind=preference": configs / "dpo.yaml",
        "kind=classify": configs / "classify.yaml",
    }
    run_job(main, FinetuneConfig, configs / "chat.yaml", others)
