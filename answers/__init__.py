"""Are two answers the same mathematics? Knows no model."""
