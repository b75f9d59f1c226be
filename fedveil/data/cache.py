"""Tensors kept between runs, so that images are decoded and clients are drawn once.

An entry is a safetensors file: no code runs when it is read, and it is mapped into memory, so
processes that read the same entry share its pages.
"""

import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

# Part of every key: raise it whenever what is stored for the same source changes.
_FORMAT = 2


def folder() -> Path:
    """Return where entries live: ``FEDVEIL_CACHE``, or ``~/.cache/fedveil``."""
    return Path(os.environ.get("FEDVEIL_CACHE") or "~/.cache/fedveil").expanduser()


def digest(*parts: object) -> str:
    """Return a name for what ``parts`` (anything JSON can hold) identify."""
    text = json.dumps([_FORMAT, *parts], separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def read(key: str) -> tuple[dict[str, Tensor], list[str]] | None:
    """Return the tensors and notes stored as ``key``, or None if there are none to be trusted."""
    path = _path(key, "safetensors")
    try:
        with safe_open(path, framework="pt") as entry:
            metadata = entry.metadata() or {}
            tensors = {name: entry.get_tensor(name) for name in entry.keys()}  # noqa: SIM118
        notes = json.loads(metadata["notes"])
        intact = metadata["checksum"] == _checksum(tensors, notes)
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    return (tensors, notes) if intact else None


def write(key: str, tensors: Mapping[str, Tensor], notes: list[str]) -> None:
    """Store ``tensors`` and ``notes`` as ``key``; do nothing where the folder cannot be written."""
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    metadata = {"notes": json.dumps(notes), "checksum": _checksum(whole, notes)}
    _replace(_path(key, "safetensors"), lambda path: save_file(whole, path, metadata))


def recall(key: str) -> str | None:
    """Return the text remembered as ``key``, if any."""
    try:
        return _path(key, "txt").read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def remember(key: str, text: str) -> None:
    """Remember ``text`` as ``key``; do nothing where the folder cannot be written."""
    _replace(_path(key, "txt"), lambda path: Path(path).write_text(text, encoding="utf-8"))


def _path(key: str, suffix: str) -> Path:
    return folder() / f"{key}.{suffix}"


def _checksum(tensors: Mapping[str, Tensor], notes: list[str]) -> str:
    layout = [(name, str(tensors[name].dtype), *tensors[name].shape) for name in sorted(tensors)]
    total = zlib.crc32(json.dumps([notes, layout]).encode())
    for name in sorted(tensors):
        total = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, total)
    return f"{total:08x}"


def _replace(path: Path, fill: Callable[[str], object]) -> None:
    """Make ``path`` what ``fill`` writes, in one step that no other process sees half done."""
    with suppress(OSError, SafetensorError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(dir=path.parent, prefix=".draft-")
        os.close(handle)
        try:
            fill(draft)
            _flush(Path(draft))
            Path(draft).replace(path)
            _flush(path.parent)
        finally:
            Path(draft).unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Push a file or a folder to the disk, lest a power cut leave a name without its content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
