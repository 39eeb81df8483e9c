"""Data: documents become tokenized shards, and shards become an exact stream of batches."""
