"""So that `python -m llmkit` and `accelerate launch -m llmkit` work."""

from llmkit.cli.app import main

if __name__ == "__main__":
    main()
