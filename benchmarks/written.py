"""How a benchmark's result is written: beside what it came from."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedveil.files import json_bytes, write_atomically
from fedveil.runs.directory import versions


def write_result(path: Path, command: str, **content: Any) -> None:
    """Write a result with its command, the date and the versions, whole or not at all."""
    origin = {"command": command, "date": datetime.now(UTC).date().isoformat()}
    result = origin | {"versions": versions()} | content
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json_bytes(result))
