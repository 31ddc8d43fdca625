"""From raw text to batches: fetch, format, encode to HDF5 shards, read."""
