"""Stream packed shards into a model sharded over any mesh."""
