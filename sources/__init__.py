"""Where questions come from: files, benchmarks, and what can be wrong with them."""
