"""The built-in task and its start model, both made on the spot."""
