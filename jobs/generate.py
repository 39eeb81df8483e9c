"""Complete a prompt with a trained model.

python jobs/generate.py [config.yaml ...] [key=value ...]
python jobs/generate.py checkpoint=quickstart prompt="def main("
"""

import sys
from pathlib import Path

# Run the code next to this job, and take jobs/ off the path: jobs/evaluate.py would hide the
# package `evaluate`, which lm-eval imports.
sys.path[0] = str(Path(__file__).resolve().parents[1] / "platform")

from manta.evaluate.inference_settings import GenerateConfig, place_of
from manta.job import hint, run_job
from manta.model.generate import generate_batch
from manta.model.inference import inference
from manta.terminal import exact_pipe
from manta.train.checkpoints import checkpoint


def main(config: GenerateConfig) -> None:
    path = checkpoint.resolve(config.checkpoint, config.home_folder)
    device, dtype = place_of(config)
    model = checkpoint.load_model(path, device)
    tokenizer = checkpoint.load_tokenizer(path)
    texts = [text for text in config.prompts or [config.prompt] for _ in range(config.num_samples)]
    prompts = [tokenizer.prompt(text) for text in texts]
    seeds = [config.seed + index for index in range(len(texts))]
    batch = generate_batch(
        model,
        prompts,
        config.max_tokens,
        seeds=seeds,
        sampling=config.sampling(tokenizer.vocab_size),
        stop=tokenizer.ends,
    )
    with exact_pipe(), inference(device, dtype):
        if len(texts) == 1:  # print each token at once
            print(texts[0], end="", flush=True)
            for text in tokenizer.stream(new[0] for new in batch):
                print(text, end="", flush=True)
            print()
        else:
            steps = list(batch)
            for index, text in enumerate(texts):
                print(text + tokenizer.decode([new[index] for new in steps if index in new]))
                print("-" * 40)
    hint(f"next  python jobs/evaluate.py checkpoint={config.checkpoint}")


if __name__ == "__main__":
    run_job(main, GenerateConfig)
