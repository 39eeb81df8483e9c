"""Text: where documents come from, and how they become tokens.

Its files, in reading order:

    files           documents in JSONL, Parquet and plain text, whole files and pieces of large ones
    sources         documents from wherever they are: files, the hub, or Python itself
    tokenizer       tiktoken's named encodings, and byte-pair encodings trained on the corpus
    tokenizer_json  a tokenizer as Hugging Face's tokenizer.json, and back
"""
