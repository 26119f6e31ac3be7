"""What stays on disk: checkpoints, parts of long work, results, curves."""
