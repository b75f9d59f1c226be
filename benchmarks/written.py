"""How a benchmark's result is written: beside what it came from."""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from fedveil.files import json_bytes, write_results
from fedveil.runs.directory import origin


def write_result(path: Path, arguments: argparse.Namespace, **content: Any) -> None:
    """Write a result with its command, its options, the date and the versions.

    It is there whole or not at all. Where things lie on this machine is nobody's business: a path
    is its last part only.

    Args:
        path: The JSON file; its folder is made if need be.
        arguments: What the command line was read as; all that was not given is in it, too.
        content: The result.
    """
    words = [_shown(Path(word)) if Path(word).is_absolute() else word for word in sys.argv[1:]]
    made = {
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words]),
        "options": {name: _shown(v) for name, v in vars(arguments).items() if name != "out"},
        **origin(),
    }
    write_results(path.parent, {path.name: json_bytes(made | content)})


def _shown(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_shown(one) for one in value]
    return value.name if isinstance(value, Path) else value
