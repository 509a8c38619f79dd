"""Checkpoints: how 4-bit weights lie in safetensors files, and reading and writing those."""

from int4q.checkpoint.files import load_file, load_into_, save_file

__all__ = ["load_file", "load_into_", "save_file"]
