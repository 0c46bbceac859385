"""Offline preparation: records → document store → pack plan → packed shards. Never imports torch."""
