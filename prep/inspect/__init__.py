"""Look at packed shards, never change them."""
