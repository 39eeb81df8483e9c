"""Data: documents become tokenized shards, and shards become an exact stream of batches.

Its files, in reading order:

    order           which tokens global batch k reads: pure arithmetic
    packing         reorders whole documents so that the ends of rows cut few of them
    fingerprint     one number that stands for the tokens of a global batch
    label_keys      the keys of a dataset of labelled texts
    recipe          the configs of a dataset and of a run's data, and a dataset's recipe
    manifest        a dataset's table of contents, with the checksums of its shards
    origin          what a dataset was made from, and whether that has changed since
    shards          Parquet files of token ids
    conversations   conversations as ids, and which of these are trained
    preferences     pairs of conversations as ids, and which answer is the chosen one
    reference       log-probabilities of answers before a preference tuning
    decontaminate   drops documents that share a run of words with evaluation examples
    passes          tasks over Ray Data whose records let a preparation resume
    runs            sorted files of rows, read in ranges, and merged until they are few
    near            finds near duplicates by MinHash
    shuffle         shuffles documents and drops duplicates, in two passes over disk
    labelled        labelled texts: chosen, split and packed
    report          what a preparation tells a person
    vocabulary      the tokenizer of a dataset
    prepare         turns a corpus into a dataset
    inspect         shows what is in a dataset, for a person to read
    ahead           items that a thread draws ahead of time
    mixture         opens and checks the dataset or datasets that a run trains on
    stream          the order as a Ray Data stream, one per worker
"""
