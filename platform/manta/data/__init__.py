"""Data: documents become tokenized shards, and shards become an exact stream of batches.

Its files, in reading order:

    order           which tokens global batch k reads: pure arithmetic
    packing         whole documents in another order, so that few are cut by a row's end
    fingerprint     one number that stands for the tokens of a global batch
    recipe          the configs of a dataset and of what a run reads, and the recipe kept with it
    manifest        a dataset's table of contents, by which its shards are known to be whole
    shards          Parquet files of token ids
    decontaminate   leaves out documents that share a run of words with evaluation examples
    shuffle         documents shuffled and without duplicates, in two passes over disk
    prepare         a corpus becomes a dataset
    inspect         what is in a dataset, for a person to read
    mixture         the one dataset or several that a run trains on, checked
    stream          the order as a Ray Data stream, one per worker
"""
