"""What a round costs on each engine, beside plain loops, another framework and the floor.

The job is McMahan's: MNIST-sized images (random: speed does not depend on what they show), 100
clients of 600, his CNN of 1,663,370 parameters, batches of 10, one epoch, 10 clients a round, two
processes or threads.

Every contestant is a process of its own that waits for its turn; rounds go there and back (A B C,
C B A, ...), so that whatever else the machine does falls on all of them. Quote the ratios. `ray`
runs the same client code as `local`; `ray-plain` runs what a textbook would write.

    python benchmarks/federation.py compare --rounds 5 --out docs/results
    python benchmarks/federation.py grow --out docs/results

pfl joins where it is installed, also in another environment: --pfl-python PATH. It needs
``pip install pfl`` beside PyTorch; two ranks talk over gloo, so neither Horovod nor MPI is needed.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from contestants import FLOP_A_ROUND, SEED, Entry
from turns import Contestant, ratios
from written import write_result


def has_pfl(python: str) -> bool:
    done = subprocess.run([python, "-c", "import pfl"], capture_output=True, check=False)
    return done.returncode == 0


def compare(arguments: argparse.Namespace) -> None:
    python, rounds, out = arguments.pfl_python, arguments.rounds, arguments.out
    names = [
        "floor",
        "local",
        "ray",
        "ray-plain",
        "two-processes",
        "two-processes-best",
        "sequential-1",
    ]
    entries = [Entry(name) for name in [*names, "sequential-2"]]
    entries += [Entry("local", idle=True), Entry("ray", idle=True)]
    entries += [Entry("pfl")] if has_pfl(python) else []
    entries = [entry for entry in entries if entry.label not in arguments.skip]
    table = [
        Contestant(entry, python if entry.name == "pfl" else sys.executable) for entry in entries
    ]
    try:
        for turn in range(rounds + 1):
            # There and back, so that nobody always follows the same neighbour.
            for contestant in table if turn % 2 else table[::-1]:
                seconds = contestant.play(counts=turn > 0)
                print(f"{turn:3d} {contestant.entry.label:20s} {seconds:8.3f} s", flush=True)
    finally:
        for contestant in table:
            contestant.leave()
    results = [contestant.result() for contestant in table]
    absent = [] if has_pfl(python) else ["pfl: not installed; pip install pfl, or --pfl-python"]
    found: dict[str, Any] = {"results": results, "ratios": ratios(table), "absent": absent}
    write_result(out / "federation-cost.json", arguments, **machine(), **found)
    draw_comparison(results, out / "federation-cost.png")
    for name, value in found["ratios"].items():
        print(f"{name:44s} {value:.2f}")


GROWTH: dict[str, list[Entry]] = {
    "registered": [Entry("local", registered=n, idle=True) for n in (10, 100, 1_000, 10_000)],
    "cohort": [Entry("local", cohort=n, idle=True) for n in (10, 20, 50, 100)],
    "parameters": [Entry("local", parameters=n, idle=True) for n in (10**4, 10**5, 10**6, 10**7)],
}


def grow(arguments: argparse.Namespace) -> None:
    curves: dict[str, list[dict[str, Any]]] = {}
    for axis, entries in GROWTH.items():
        curves[axis] = []
        for entry in entries:
            pair = [entry, replace(entry, name="ray")] if arguments.with_ray else [entry]
            table = [Contestant(one, sys.executable) for one in pair]
            try:
                for turn in range(arguments.rounds + 1):
                    for contestant in table:
                        contestant.play(counts=turn > 0)
            finally:
                for contestant in table:
                    contestant.leave()
            curves[axis] += [contestant.result() for contestant in table]
            for contestant in table:
                print(
                    f"{axis} {getattr(entry, axis):>9,} {contestant.entry.name:6s} "
                    f"{statistics.median(contestant.seconds):.3f} s a round, start "
                    f"{contestant.startup:.1f} s, peak {contestant.peak:.0f} MiB",
                    flush=True,
                )
    path = arguments.out / "federation-growth.json"
    write_result(path, arguments, **machine(), curves=curves)
    draw_growth(curves, arguments.out / "federation-growth.png")


def machine() -> dict[str, Any]:
    return {
        "seed": SEED,
        "flop_a_round": FLOP_A_ROUND,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "machine": platform.machine(),
        "ray": metadata.version("ray"),
    }


def draw_comparison(results: Sequence[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    ordered = sorted(results, key=lambda one: one["median_seconds"])
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained", sharey=True)
    columns = {
        "median_seconds": "seconds a round",
        "startup_seconds": "seconds from start to first reply",
        "peak_mib": "peak memory, MiB",
    }
    for axis, (key, title) in zip(axes, columns.items(), strict=True):
        colours = ["#c44e52" if one["name"] == "local" else "#8da0b6" for one in ordered]
        bars = axis.barh([one["label"] for one in ordered], [one[key] for one in ordered])
        for bar, colour in zip(bars, colours, strict=True):
            bar.set_color(colour)
        axis.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.margins(x=0.18)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def draw_growth(curves: dict[str, list[dict[str, Any]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    names = {
        "registered": "registered clients",
        "cohort": "clients a round",
        "parameters": "parameters of the model",
    }
    rows = {"median_seconds": "seconds a round, idle clients", "peak_mib": "peak memory, MiB"}
    figure, axes = plt.subplots(2, 3, figsize=(11, 6), layout="constrained", sharex="col")
    for column, (axis_name, points) in enumerate(curves.items()):
        for row, (key, title) in enumerate(rows.items()):
            axis = axes[row][column]
            for engine in ("local", "ray"):
                mine = [point for point in points if point["name"] == engine]
                if mine:
                    xs = [point[axis_name] for point in mine]
                    axis.plot(xs, [point[key] for point in mine], "o-", label=engine)
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.grid(alpha=0.3)
            if row:
                axis.set_xlabel(names[axis_name])
            if not column:
                axis.set_ylabel(title)
    axes[0][0].legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, rounds in (("compare", 5), ("grow", 3)):
        command = commands.add_parser(name)
        command.add_argument("--rounds", type=int, default=rounds)
        command.add_argument("--out", type=Path, default=Path("docs/results"))
        if name == "compare":
            command.add_argument("--pfl-python", default=sys.executable)
            command.add_argument("--skip", action="append", default=[], metavar="LABEL")
        else:
            command.add_argument("--with-ray", action="store_true")
    arguments = parser.parse_args()
    {"compare": compare, "grow": grow}[arguments.command](arguments)


if __name__ == "__main__":
    main()
