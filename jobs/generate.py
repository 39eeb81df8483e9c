"""Complete a prompt with a trained model.

python jobs/generate.py [config.yaml ...] [key=value ...]
python jobs/generate.py checkpoint=quickstart prompt="def main("
"""

import sys
from pathlib import Path
from typing import Any

# The code beside this job is the code that runs, and jobs/ leaves the path: jobs/evaluate.py would
# hide the package of that name, which lm-eval imports.
sys.path[0] = str(Path(__file__).resolve().parents[1] / "platform")

from manta import storage
from manta.job import run_job
from manta.model.generate import GenerateConfig, generate, generate_batch
from manta.model.inference import inference
from manta.train.checkpoints import checkpoint
from manta.train.step.place import place_of


def main(config: GenerateConfig) -> None:
    path = checkpoint.resolve(config.checkpoint, storage.home(config.home))
    device, dtype = place_of(config)
    model = checkpoint.load_model(path, device)
    tokenizer = checkpoint.load_tokenizer(path)
    texts = [text for text in config.prompts or [config.prompt] for _ in range(config.num_samples)]
    prompts = [tokenizer.encode(text) or [tokenizer.eot] for text in texts]
    seeds = [config.seed + index for index in range(len(texts))]
    options: dict[str, Any] = {
        "temperature": config.temperature,
        "top_k": config.top_k,
        "stop": tokenizer.eot,
    }
    with inference(device, dtype):
        if len(texts) == 1:  # as it comes
            print(texts[0], end="", flush=True)
            tokens = generate(model, prompts[0], config.max_tokens, seed=seeds[0], **options)
            for text in tokenizer.stream(tokens):
                print(text, end="", flush=True)
            print()
        else:
            batch = list(generate_batch(model, prompts, config.max_tokens, seeds=seeds, **options))
            for index, text in enumerate(texts):
                print(text + tokenizer.decode([new[index] for new in batch if index in new]))
                print("-" * 40)
    print(f"next  python jobs/evaluate.py checkpoint={config.checkpoint}", file=sys.stderr)


if __name__ == "__main__":
    run_job(main, GenerateConfig)
