"""The model as a machine: load it, shard it, score and sample with it. Knows no reward."""
