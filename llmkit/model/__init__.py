"""Models: loading them, where their parts are, which parameters stand still and how the rest are optimised."""
