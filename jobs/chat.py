"""Talk with a trained model, one turn a line.

python jobs/chat.py [config.yaml ...] [key=value ...]
python jobs/chat.py checkpoint=quickstart system="Answer briefly."

/reset forgets the conversation. /quit and Ctrl-D end it; Ctrl-C stops an answer. Lines may come
from a pipe or a file; then only the answers are on the standard output.
"""

import contextlib
import sys
from pathlib import Path

# Run the code next to this job, and take jobs/ off the path: jobs/evaluate.py would hide the
# package `evaluate`, which lm-eval imports.
sys.path[0] = str(Path(__file__).resolve().parents[1] / "platform")

from manta.evaluate.chat import Chat
from manta.evaluate.inference_settings import ChatConfig, place_of
from manta.evaluate.lines import lines
from manta.job import hint, run_job
from manta.model.inference import inference
from manta.terminal import exact_pipe
from manta.train.checkpoints import checkpoint


def main(config: ChatConfig) -> None:
    path = checkpoint.resolve(config.checkpoint, config.home_folder)
    device, dtype = place_of(config)
    model = checkpoint.load_model(path, device)
    with exact_pipe(), inference(device, dtype):
        chat = Chat(model, checkpoint.load_tokenizer(path), config)
        if not chat.form.has_turns:
            hint("the chat template has one question and one answer: each line is answered alone")
        for question in lines(hint):
            if question == "/quit":
                break
            if question == "/reset":
                chat.reset()
                hint("forgotten")
                continue
            with contextlib.closing(chat.answer(question)) as texts:
                try:
                    for text in texts:
                        print(text, end="", flush=True)
                except KeyboardInterrupt:
                    chat.notes.append("stopped")
            print(flush=True)
            for note in chat.notes:
                hint(note)


if __name__ == "__main__":
    run_job(main, ChatConfig)
