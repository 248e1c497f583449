"""Checkpoints: one layout, written by every engine at every world size and readable at every other."""

from launch.checkpoint.commit import SaveFailure, SaveResult
from launch.checkpoint.export import publish, read_safetensors, stream, write_safetensors
from launch.checkpoint.store import CheckpointStore

__all__ = [
    "CheckpointStore",
    "SaveFailure",
    "SaveResult",
    "publish",
    "read_safetensors",
    "stream",
    "write_safetensors",
]
