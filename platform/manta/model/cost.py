"""What a model costs to train: parameters and floating-point operations."""

from manta.model.gpt import ModelConfig, num_parameters


def flops_per_token(c: ModelConfig, seq_len: int) -> float:
    """Forward and backward FLOPs per token: 6 N + 12 L C T.

    N counts every parameter that multiplies: not the position table, nor an untied embedding
    (both are looked up). 12 L C T is attention without counting causality (Chowdhery et al. 2022,
    PaLM, appendix B), as nanoGPT and most others count, so that MFUs compare.
    """
    looked_up = 0
    assert c.vocab_size is not None
    if c.family == "gpt2":
        looked_up += c.context_length * c.n_embd
    if not c.tie_embeddings:
        looked_up += c.vocab_size * c.n_embd
    n = num_parameters(c) - looked_up
    return 6.0 * n + 12.0 * c.n_layer * c.n_embd * seq_len
