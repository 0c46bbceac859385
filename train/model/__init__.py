"""One decoder; model families are data."""
