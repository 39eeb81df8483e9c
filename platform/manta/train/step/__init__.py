"""The optimizer step: device, schedule, optimizer, and the DeepSpeed engine.

Its files, in reading order:

    device           what this machine computes with: device, threads, dtype, peak and memory
    place            what `device` and `dtype` stand for where a trained model is asked
    schedule         the learning rate at a step
    scaling          how learning rate, batch and token budget follow from a model's size
    optimizer        AdamW, and Muon for the matrices of the blocks
    reducer          gradients averaged over the workers while the backward pass still computes
    engine_settings  the keys of DeepSpeed's engine, and where they would do nothing
    engine           one module between plain keys and DeepSpeed
"""
