"""Checkpoints: how 4-bit weights lie in files, and reading and writing those."""
