"""The contract between `prep` and `train`: schemas, layout arithmetic, shards, manifest, order and cost."""
