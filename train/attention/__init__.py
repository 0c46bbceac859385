"""One interface for variable-length attention; backends behind it."""
