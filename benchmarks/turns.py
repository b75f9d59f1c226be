"""Contestants of ``federation.py`` in processes of their own: their turns, time and memory."""

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from contestants import Entry


def family(pid: int) -> set[int]:
    """A process and all its descendants."""
    found = {pid}
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = task.read_text().split()
        except OSError:
            continue
        for child in children:
            found |= family(int(child))
    return found


def memory(pid: int) -> float:
    """Proportional set size in MiB over a whole family: shared pages count once."""
    total = 0
    for member in family(pid):
        try:
            lines = Path(f"/proc/{member}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)
    return total / 1024


def processor_seconds(pid: int) -> float:
    """Processor time of a whole family so far, which a busy machine stretches far less."""
    ticks = 0
    for member in family(pid):
        try:
            fields = Path(f"/proc/{member}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


class Contestant:
    """A process that plays a round when told to."""

    def __init__(self, entry: Entry, python: str) -> None:
        start = time.perf_counter()
        self.entry = entry
        self.peak = 0.0
        self.seconds: list[float] = []
        self.processor: list[float] = []
        self.process = subprocess.Popen(
            [python, Path(__file__).with_name("contestants.py"), json.dumps(asdict(entry))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if os.environ.get("QUIET", "1") == "1" else None,
            text=True,
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(["", *sys.path])}
            | ({"OMP_NUM_THREADS": "2"} if entry.name == "sequential-2" else {}),
        )
        threading.Thread(target=self._drain, daemon=True).start()
        self._answer()
        self.startup = time.perf_counter() - start

    def _drain(self) -> None:
        # A full pipe would stop the contestant.
        self.complaints = []
        for line in self.process.stderr or ():
            self.complaints = [*self.complaints[-20:], line]

    def _answer(self) -> float:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("@@ "):
                return float(line[3:])
        raise RuntimeError(f"{self.entry.label} has ended:\n" + "".join(self.complaints))

    def play(self, *, counts: bool) -> float:
        """Let it run one round, which counts or is a warm-up; return the seconds it took."""
        assert self.process.stdin is not None
        before = processor_seconds(self.process.pid)
        over = threading.Event()
        watch = threading.Thread(target=self._watch, args=(over,))
        watch.start()
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        seconds = self._answer()
        over.set()
        watch.join()
        if counts:
            self.seconds.append(seconds)
            self.processor.append(processor_seconds(self.process.pid) - before)
        return seconds

    def _watch(self, over: threading.Event) -> None:
        while True:
            self.peak = max(self.peak, memory(self.process.pid))
            if over.wait(0.25):
                return

    def leave(self) -> None:
        """End it and whatever it has started."""
        assert self.process.stdin is not None
        members = family(self.process.pid)
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
        for member in members - {self.process.pid}:
            try:
                os.kill(member, 9)
            except ProcessLookupError:
                continue

    def result(self) -> dict[str, Any]:
        """Everything measured about it."""
        return asdict(self.entry) | {
            "label": self.entry.label,
            "startup_seconds": self.startup,
            "round_seconds": self.seconds,
            "processor_seconds": self.processor,
            "median_processor_seconds": statistics.median(self.processor),
            "median_seconds": statistics.median(self.seconds),
            "peak_mib": self.peak,
        }


def ratios(table: Sequence[Contestant]) -> dict[str, float]:
    """Medians over the rounds of each round's own ratio, so that a slow minute cancels."""
    by_label = {contestant.entry.label: contestant for contestant in table}
    local = by_label["local"]
    found: dict[str, float] = {}
    for label, other in by_label.items():
        if label.endswith("idle"):
            found[f"{label}, seconds"] = statistics.median(other.seconds)
            found[f"{label}, processor seconds"] = statistics.median(other.processor)
        elif other is not local:
            found[f"local / {label}"] = _median_ratio(local.seconds, other.seconds)
            found[f"local / {label}, processor time"] = _median_ratio(
                local.processor, other.processor
            )
    return found


def _median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
