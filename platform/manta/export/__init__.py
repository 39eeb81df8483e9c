"""Export and import: models in the formats of other projects.

Its files, in reading order:

    weights         a model's config and weights in transformers' form, and back
    special_tokens  which token of a transformers folder has which part, and back
    huggingface     a folder that plain transformers opens
    adapter         the same with LoRA's adapters apart, which PEFT opens
    ggml            GGUF, the format of llama.cpp
    llmc            llm.c's checkpoints of GPT-2
    card            a model card, made from the model's run
    convert         a checkpoint in another format, and a model in one as a checkpoint
"""
