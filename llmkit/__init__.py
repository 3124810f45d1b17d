"""llmkit: train, freeze, fine-tune, evaluate and export transformer models from one recipe."""

__version__ = "0.1.0"
