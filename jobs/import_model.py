"""Import a model as a checkpoint: GPT-2, Llama or Qwen3 from transformers, or GPT-2 from llm.c.

    python jobs/import_model.py from=hf path=gpt2/ name=gpt2
    python jobs/import_model.py from=llmc path=gpt2_124M.bin name=gpt2

The checkpoint can be evaluated, sampled from, and trained further (init.checkpoint=gpt2).
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1] / "platform")

from manta.export.convert import ImportConfig, import_model
from manta.job import run_job


def main(config: ImportConfig) -> None:
    import_model(config, print)
    print(f'next  python jobs/generate.py checkpoint={config.name} prompt="Once"')
    print(f"      python jobs/pretrain.py init.checkpoint={config.name} name=more data.source=FILE")


if __name__ == "__main__":
    run_job(main, ImportConfig)
