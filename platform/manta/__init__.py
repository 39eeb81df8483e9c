"""Manta trains, sweeps and evaluates GPT models from scratch on Ray.

The rooms, in the order that data flows; imports point up this list, never down:

    errors      what a person can mend
    security    versions with known holes
    arguments   YAML files and key=value as one tree                    [omegaconf]
    config      frozen, checked configs                                 [pydantic]
    storage     files, local or in an object store                      [pyarrow.fs]
    layout      where runs, checkpoints and datasets lie in the home
    lock        one owner for a path, of all processes that want it
    progress    a bar, or now and then a line                           [tqdm]
    plot        the loss curve, document lengths, as PNG                [matplotlib]
    cluster     the connection to Ray                                   [ray]
    head        Ray's head node on this machine                         [ray]
    failures    what went wrong in Ray's workers                        [ray]
    messages    what a driver and its workers tell each other           [ray]
    job         what every job shares
    text        documents from anywhere; tokenizers        [datasets, tiktoken, tokenizers]
    model       the GPT, its presets, generation, cost
    data        documents to shards, without those of evaluations;      [ray.data]
                shards to an exact stream
    train       schedule, optimizer, engine, checkpoints, the loop,     [deepspeed, safetensors,
                and the loop inside Ray Train                            ray.train]
    evaluate    lm-eval on a checkpoint                                 [lm_eval]
    export      to and from transformers, llama.cpp, llm.c              [transformers, gguf]
    sweep       many runs, compared                                     [ray.tune]
    bench       measurements of Manta itself                            [psutil]
"""

__version__ = "0.2.0"
