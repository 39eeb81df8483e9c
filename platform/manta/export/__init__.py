"""Export and import: models in the formats that others read and write.

Its files, in reading order:

    weights         a model's config and weights as transformers has them, and back
    huggingface     a folder that plain transformers opens
    ggml            GGUF, the format of llama.cpp
    llmc            llm.c's checkpoints of GPT-2
    card            a model card, from the model's run
    convert         a checkpoint in a format of others, and one of theirs as a checkpoint
"""
