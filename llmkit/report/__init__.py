"""What a run was and came to, as one page."""
