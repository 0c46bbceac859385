"""Packed shards into the formats of other trainers, and back."""
