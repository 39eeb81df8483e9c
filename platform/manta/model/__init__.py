"""The model: a GPT in plain PyTorch, its presets, generation, and its cost.

Its files, in reading order:

    presets         named shapes: what differs from ModelConfig's defaults
    shape           ModelConfig, without any torch
    inference       what every use of a trained model shares: precision, attention
    compilation     functions compiled whole, once for the process
    cpu_attention   causal attention in bf16 on a CPU, by whole matrix products
    attention       masks and positions within documents, and which kernel takes which mask
    cache           the KV cache
    recomputation   activation checkpointing: what a block keeps for its backward pass
    targets         the mark of a target that no loss counts
    loss            the head: logits, or their cross-entropy without ever holding all logits
    gpt             GPT itself
    groups          the groups of weights by which the optimizer tells them apart
    init            how a new model's weights start
    generate        text, token by token
    cost            parameters and floating-point operations, by arithmetic
    activations     bytes that a forward pass holds for its backward pass, op by op
    traffic         bytes that the head's loss moves through memory
    memory          what a training worker holds, and the most at once, from its config alone
"""
