"""Export a checkpoint to transformers, PEFT, llama.cpp or llm.c.

    python jobs/export.py checkpoint=my-run to=hf out=my-model
    python jobs/export.py checkpoint=my-run to=gguf out=my-model.gguf
    python jobs/export.py checkpoint=chat to=peft out=my-adapter

The written model is read back and compared with the checkpoint before it appears under its name.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1] / "platform")

from manta.export.convert import ExportConfig, export
from manta.export.huggingface import auto_class
from manta.job import run_job


def main(config: ExportConfig) -> None:
    out = export(config, print)
    print(f"written to {out}")
    if config.to == "hf":
        print(f'next  transformers.{auto_class(out)}.from_pretrained("{out}")')
    if config.to == "peft":
        base = f'transformers.{auto_class(out / "base")}.from_pretrained("{out}/base")'
        print(f'next  peft.PeftModel.from_pretrained({base}, "{out}/adapter")')


if __name__ == "__main__":
    run_job(main, ExportConfig)
