"""What an engine saves and restores."""
