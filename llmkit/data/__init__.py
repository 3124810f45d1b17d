"""Data: from a URI to canonical rows, and from rows to a tokenised corpus."""
