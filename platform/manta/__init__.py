"""Manta trains, sweeps and evaluates GPT models from scratch on Ray.

The rooms, in the order that data flows; imports point up this list, never down:

    errors      problems that a person can fix
    terminal    text that cannot steer a terminal; private files
    security    versions with known security holes; secrets in addresses
    arguments   YAML files and key=value as one tree                    [omegaconf]
    config      frozen, checked configs                                 [pydantic]
    storage     files, local or in an object store                      [pyarrow.fs]
    ownership   what Manta may write over or delete
    foreign     files that others may have written, checked at one door [pydantic]
    layout      the folders and file names in the home
    lock        a lock on a path, for one process at a time
    progress    a bar in a terminal, a line now and then in a log       [tqdm]
    plot        the loss curve and document lengths, as PNG             [matplotlib]
    statistics  estimates with their errors, and tests of differences       [scipy]
    charts      pictures of many runs, as PNG                               [matplotlib]
    cluster     joins or starts a Ray; what fits into it; checks        [ray, psutil, boto3]
                cluster files
    failures    why Ray's workers failed                                [ray]
    messages    messages between a driver and its workers               [ray]
    job         what all jobs share: arguments, errors, exit codes
    text        documents and conversations from           [datasets, tiktoken, tokenizers,
                anywhere; tokenizers, chat templates        jinja2]
    model       the GPT and the LSTM, presets, generation, cost
    data        documents to shards, without evaluation documents;      [ray.data, rensa]
                shards to an exact stream
    monitor     what is told of a run while it trains: metrics,         [wandb, mlflow, trackio]
                alerts, trackers; Prometheus, Grafana
    train       schedule, optimizer, engine, checkpoints, the loop,     [deepspeed, safetensors,
                and the loop inside Ray Train                            ray.train]
    finetune    training that goes on from a checkpoint: conversations,
                preferences, labels
    evaluate    lm-eval on a checkpoint; classifiers, tested and used   [lm_eval, sklearn]
    judge       models answer questions, and a judge scores the answers [openai]
    report      what was trained on what, and what came of it, as a page
    export      to and from transformers, llama.cpp, llm.c; to PEFT     [transformers, peft, gguf]
    sweep       many runs, compared                                     [optuna]
    scaling     how the loss falls with size and tokens, and predictions    [scipy]
    plan        what a run will take: memory, hours, dollars            [scipy]
    serve       a chat page, and a server that speaks OpenAI's protocol [fastapi, uvicorn]
    bench       measurements of Manta itself                            [psutil]
"""

__version__ = "0.2.0"
