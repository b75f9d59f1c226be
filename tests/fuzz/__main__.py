"""Feed every parser of what comes from outside with damaged and made-up input.

    python -m tests.fuzz --out docs/results
    python -m tests.fuzz --only parquet images --scale 0.1 --seed 7

Each input ends in one of three ways: *accepted*; *refused* with a ``FedveilError``, which is what a
user sees as one sentence; or *failed*: any other exception, a hang, a crash of the process, or more
than 2 GiB of memory. A failed input is saved with its traceback under ``--failures``.

Inputs are a function of (target, seed, number) alone, so a failure can be made again. Every target
runs in a child process that is watched from outside: what never comes back to Python is found, too.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from tests.fuzz.running import fuzz
from tests.fuzz.targets import targets

_OUTCOMES = ("accepted", "refused", "failed")
_VERSIONED = ("torch", "safetensors", "pyarrow", "datasets", "pillow", "pydantic", "numpy")


def main() -> int:
    """Run the command; the exit status is 1 if any input failed."""
    known = targets()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="folder for fuzz.json")
    parser.add_argument("--failures", type=Path, default=Path("fuzz-failures"))
    parser.add_argument("--only", nargs="+", choices=known, default=list(known), metavar="TARGET")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the inputs")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    _import_parsers()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["FEDVEIL_CACHE"] = cache
        tallies = fuzz(
            [known[name] for name in options.only],
            seed=options.seed,
            scale=options.scale,
            failures=options.failures,
        )
    total = {key: sum(getattr(t, key) for t in tallies.values()) for key in _OUTCOMES}
    print(f"{sum(total.values()):,} inputs: {total}")
    if options.out:
        result = {
            "command": "python -m tests.fuzz " + " ".join(sys.argv[1:]),
            "date": datetime.now(UTC).date().isoformat(),
            "seed": options.seed,
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in _VERSIONED},
            },
            "inputs": sum(total.values()),
            **total,
            "targets": {
                name: {key: getattr(tally, key) for key in _OUTCOMES}
                | {"seconds": round(tally.seconds, 1)}
                for name, tally in tallies.items()
            },
        }
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "fuzz.json").write_text(json.dumps(result, indent=2) + "\n")
    return int(total["failed"] > 0)


def _import_parsers() -> None:
    """Import once what every child needs, so that it is forked and not loaded again."""
    import datasets  # noqa: F401
    import pyarrow.parquet  # noqa: F401

    import fedveil.audit.leakage
    import fedveil.data
    import fedveil.report
    import fedveil.runs.directory  # noqa: F401


if __name__ == "__main__":
    sys.exit(main())
