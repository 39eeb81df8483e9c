"""Complete a prompt with a trained model.

python jobs/generate.py [config.yaml ...] [key=value ...]
python jobs/generate.py checkpoint=quickstart prompt="def main("
"""

import sys
from pathlib import Path

# The code beside this job is the code that runs, and jobs/ leaves the path: jobs/evaluate.py would
# hide the package of that name, which lm-eval imports.
sys.path[0] = str(Path(__file__).resolve().parents[1] / "platform")

from manta import storage
from manta.job import run_job
from manta.model.generate import GenerateConfig, generate
from manta.train import checkpoint


def main(config: GenerateConfig) -> None:
    path = checkpoint.resolve(config.checkpoint, storage.home(config.home))
    model = checkpoint.load_model(path)
    tokenizer = checkpoint.load_tokenizer(path)
    prompt = tokenizer.encode(config.prompt) or [tokenizer.eot]
    for index in range(config.num_samples):
        print(config.prompt, end="", flush=True)
        tokens = generate(
            model,
            prompt,
            config.max_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            stop=tokenizer.eot,
            seed=config.seed + index,
        )
        for text in tokenizer.stream(tokens):
            print(text, end="", flush=True)
        print("\n" + "-" * 40 if config.num_samples > 1 else "")
    print(f"next  python jobs/evaluate.py checkpoint={config.checkpoint}", file=sys.stderr)


if __name__ == "__main__":
    run_job(main, GenerateConfig)
