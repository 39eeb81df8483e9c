"""The optimizer step: device, schedule, optimizer, and the DeepSpeed engine.

Its files, in reading order:

    device            what this machine computes with: device, threads, dtype, peak and memory
    schedule          the learning rate at a step, as a share of its peak
    scaling           how learning rate, batch and token budget follow from a model's size
    muon              Muon for the matrices of the blocks, with AdamW for the other weights
    optimizer         the optimizer's config: AdamW or Muon
    reducer           averages gradients over the workers during the backward pass
    engine_settings   the keys of DeepSpeed's engine, and where they would have no effect
    deepspeed_config  imports DeepSpeed, and makes its config from Manta's keys
    engine            the DeepSpeed engine, and everything Manta knows about its internals
"""
