"""How much memory caches may take, by the cost model and what the machine has free."""

import psutil
import torch

from manta.model.activations import BF16, FP32, Dtype
from manta.model.cost import parameters
from manta.model.memory import ALLOWANCE, USABLE
from manta.model.shape import ModelConfig

# Tokens of prompts that are read at once. A CPU takes an eighth of a second for them with a model
# of 124M parameters, and reads hardly faster with more; a GPU does.
CHUNK = {"cpu": 64, "cuda": 512}
MOST_RUNNING = 64
# Share of a machine's free memory that a server takes for caches. Others use that memory too.
USABLE_OF_HOST = 0.5
FP64 = 8


def cache_budget(
    c: ModelConfig, device: torch.device, dtype: Dtype, most_running: int = MOST_RUNNING
) -> int:
    """Computes the bytes that caches may take now that the model is on its device: what is free,
    without what a step needs; at least 0."""
    if device.type == "cuda":
        free = USABLE * torch.cuda.mem_get_info(device)[0]
    else:
        free = USABLE_OF_HOST * psutil.virtual_memory().available
    working = working_bytes(c, dtype, most_running, CHUNK[device.type])
    return max(0, int(free) - working - ALLOWANCE)


def working_bytes(c: ModelConfig, dtype: Dtype, most_running: int, chunk: int) -> int:
    """Computes the most bytes that a step holds at once, besides weights and caches: the wider of a
    block and the choice of tokens, and copies of weights."""
    rows, vocabulary = most_running + chunk, c.padded_vocab_size
    block = FP32 * rows * (6 * c.n_embd + (0 if c.is_recurrent else 2 * c.hidden + c.query_size))
    # Logits as they are, adjusted, as probabilities, and these summed.
    choice = rows * vocabulary * (2 * FP32 + 2 * FP64)
    # bf16 copies of all weights; or that of the head that is also the embedding, for oneDNN.
    copies = BF16 * parameters(c).total if dtype == "bf16" else FP32 * vocabulary * c.n_embd
    return max(block, choice) + copies
