"""Text: where documents come from, and how they become tokens.

Its files, in reading order:

    unicode           which encoding of Unicode a file is in
    files             kinds of files, and their lines
    rows              the texts in rows, and what happens to rows without one
    conversations     conversations in the forms of data sets, as turns
    preferences       pairs of a chosen and a rejected answer in the forms of data sets
    labels            labelled texts in rows of data sets
    tables            rows of CSV and TSV files
    records           rows of any kind, as one text each
    parquet           documents in Parquet files
    pieces            documents in files of every kind, and pieces of large files
    listing           which files of a folder are read, and which are passed over
    sources           documents from files, the Hugging Face hub, or Python's own source code
    tokenizer_extras  special tokens and other things that published models' tokenizers have
    lost_bytes        bytes without a token, which texts lose
    tokenizer         text to ids and back; byte-pair encodings trained on the corpus
    tokenizer_r50k    GPT-2's own encoding
    streaming         text that comes bit by bit, up to where it ends
    templates         chat templates: conversations to ids, and which are trained       [jinja2]
    tokenizer_json    tokenizers to and from Hugging Face's tokenizer.json
"""
