"""What each example app does by ``flwr run``: its lines of fedveil, copies, accuracy and log.

    python benchmarks/example_apps.py --out docs/results

Each runs on Flower's simulation with four SuperNodes, under a FLWR_HOME of its own.
"""

import argparse
import ast
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from written import write_result

from fedveil.federation.engines.deployed import environment, free_port

EXAMPLES = Path(__file__).parents[1] / "examples"
APPS = (
    *("quickstart-pytorch", "advanced-pytorch", "custom-mods"),
    *("secure-aggregation", "quickstart-sklearn", "closed-form"),
)
CAPPED = ("quickstart-pytorch", "secure-aggregation", "quickstart-sklearn")
CAP = 0.6
SAID = {
    "no client evaluates": "clients evaluate nothing",
    "the recorder is off": "FEDVEIL_RECORD_KEY_FILE names no key",
}
_LIMIT_S = 600


def lines_of_fedveil(example: str) -> int:
    """Return how many lines of an app import from fedveil or name what comes from there."""
    return sum(
        len(_lines(file.read_text(encoding="utf-8"))) for file in (EXAMPLES / example).rglob("*.py")
    )


def _lines(text: str) -> set[int]:
    tree = ast.parse(text)
    imports = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fedveil"
    ]
    names = {alias.asname or alias.name for node in imports for alias in node.names}
    uses = {
        node.lineno for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id in names
    }
    return uses | {node.lineno for node in imports}


def home_of(place: Path) -> dict[str, str]:
    """Return an environment with a FLWR_HOME, and so a SuperLink, of its own."""
    ports = ("FLWR_LOCAL_SUPERLINK_HTTP_API_PORT", "FLWR_LOCAL_CONTROL_API_PORT")
    return environment(place) | {name: str(free_port()) for name in ports}


def end(place: Path) -> None:
    """End what runs under that FLWR_HOME: its SuperLink outlives ``flwr run``."""
    for process in _processes(str(place)):
        if process != os.getpid():
            os.kill(process, signal.SIGTERM)


def _processes(mark: str) -> Iterator[int]:
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (place / "cmdline").read_text():
                yield int(place.name)
        except OSError:
            continue


def run(example: str, home: dict[str, str], result: Path) -> tuple[dict[str, object], str]:
    """Run an app by ``flwr run``; return what it says of itself, and its log.

    Raises:
        RuntimeError: It wrote no result; with its log.
    """
    result.unlink(missing_ok=True)
    done = subprocess.run(
        [
            *(Path(sys.executable).with_name("flwr"), "run", EXAMPLES / example, "--stream"),
            *("--federation-config", "num-supernodes=4"),
            *("--run-config", f'result="{result}"'),
        ],
        env=home,
        capture_output=True,
        text=True,
        check=False,
        timeout=_LIMIT_S,
    )
    log = done.stdout + done.stderr
    if not result.exists():
        raise RuntimeError(log)
    return json.loads(result.read_text()), log


def _row(example: str, home: dict[str, str], result: Path) -> dict[str, object]:
    started = time.monotonic()
    told, log = run(example, home, result)
    plain = re.sub(r"\x1b\[\d+m", "", log)
    copies = told.get("copies")
    return {
        "app": example,
        "lines": lines_of_fedveil(example),
        "cap": CAP if example in CAPPED else None,
        "copies": len(copies) if isinstance(copies, list) else None,
        "best_copy": max(copies) if isinstance(copies, list) else None,
        "accuracy": told["model"],
        "log": {name: plain.count(words) for name, words in SAID.items()},
        "seconds": time.monotonic() - started,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        home = home_of(Path(place))
        try:
            rows = []
            for example in APPS:
                rows.append(_row(example, home, Path(place) / "result.json"))
                print(rows[-1], flush=True)
        finally:
            end(Path(place))
    write_result(options.out / "example-apps.json", options, rows=rows)


if __name__ == "__main__":
    main()
