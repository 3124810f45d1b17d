"""The run directory: what a recipe produced, and what produced it."""
