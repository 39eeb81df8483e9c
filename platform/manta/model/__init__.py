"""The models: a GPT in plain PyTorch and an LSTM, with their presets, generation and cost.

Its files, in reading order:

    presets         named shapes, each as its differences from ModelConfig's defaults
    shape           ModelConfig, without torch
    inference       settings that every use of a trained model shares: precision, attention
    compilation     functions compiled whole, once per process
    cpu_attention   causal attention in bf16 on a CPU, by whole matrix products
    attention       masks and positions within documents, and which kernel takes which mask
    cache           what a model remembers of a text: keys and values, or an LSTM's state
    ragged          several texts' caches in one pass
    recomputation   activation checkpointing: what a block keeps for its backward pass
    targets         the mark of a target that no loss counts
    rope            positions as angles: RoPE, and its scaling for longer contexts
    loss            the head: logits, or their cross-entropy without holding all logits at once
    gpt             GPT itself, and what all families have
    lstm            the char-RNN of 2015
    families        the model of a config, whichever its family
    trainable       which weights learn in a run that goes on from others' weights
    lora            adapters that learn while the model's own weights do not
    groups          the groups into which the optimizer sorts weights
    init            how a new model's weights start
    sampling        the choice of the next token
    generate        text, token by token
    reader          a text that grows, read with a cache that is kept
    together        several texts that are read together, each with its own cache
    onednn          linear layers by oneDNN's kernels, for inference on a CPU
    cost            parameters and floating-point operations, by arithmetic
    activations     bytes that a forward pass keeps for its backward pass, op by op
    traffic         bytes that the head's loss moves through memory
    memory          what a training worker holds, and its peak, from its config alone
"""
