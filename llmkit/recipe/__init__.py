"""The recipe: an immutable, validated document that says what to do."""
