"""The built-in task, made on the spot, and its start models."""
