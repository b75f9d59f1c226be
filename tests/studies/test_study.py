"""The engine of studies, on one of arithmetic; and the tables of those that were measured."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from matplotlib.figure import Figure

from fedveil.errors import FedveilError
from fedveil.studies.dct import DctStudy
from fedveil.studies.frontier import FrontierStudy
from fedveil.studies.noise import NOISE
from fedveil.studies.study import Piece, markdown, measure
from fedveil.studies.theft import THEFT
from fedveil.studies.trace import TraceStudy

RESULTS = Path(__file__).parents[2] / "docs/results"


def squared(number, out):
    """Leave the square of a number in a file, and a line for every time it was measured."""
    path = out / "squares" / str(number)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        time.sleep(0.2)  # so that who does not wait for it finds nothing
        path.write_text(str(number**2))
        with (out / "measured").open("a") as file:
            file.write(f"{number}\n")
    return int(path.read_text())


def added(numbers, out):
    """Add up squares that must be there."""
    return sum(int((out / "squares" / str(number)).read_text()) for number in numbers)


@dataclass(frozen=True)
class Squares:
    """Squares and their sum."""

    name: ClassVar[str] = "squares"
    command: ClassVar[str] = "square DIR"
    numbers: tuple[int, ...] = (2, 3, 5)

    def check(self):
        if 0 in self.numbers:
            raise FedveilError("0 is its own square")

    def pieces(self, out):
        names = tuple(map(str, self.numbers))
        squares = [Piece(str(number), squared, (number, out)) for number in self.numbers]
        return [*squares, Piece("sum", added, (self.numbers, out), needs=names)]

    def result(self, found, out):
        return {"rows": [found[str(number)] for number in self.numbers], "sum": found["sum"]}

    def table(self, result):
        return markdown(("square",), ([str(square)] for square in result["rows"]))

    def figures(self, result, out):
        return {"squares.png": Figure()}


def test_what_is_needed_comes_first_and_nothing_is_measured_twice(tmp_path):
    begun = []
    told = measure(Squares(), tmp_path, workers=2, on_piece=lambda *piece: begun.append(piece))
    assert [name for name, _, _ in begun][-1] == "sum"
    assert [(done, total) for _, done, total in begun] == [(number, 4) for number in range(4)]
    assert (told["command"], told["rows"], told["sum"]) == ("square DIR", [4, 9, 25], 38)
    assert told["versions"]["fedveil"]
    assert json.loads((tmp_path / "squares.json").read_text()) == told
    assert (tmp_path / "squares.md").read_text() == "| square |\n|---|\n| 4 |\n| 9 |\n| 25 |\n"
    assert (tmp_path / "squares.png").read_bytes().startswith(b"\x89PNG")
    assert measure(Squares((2, 3, 5, 7)), tmp_path, workers=2)["sum"] == 87
    measured = (tmp_path / "measured").read_text().split()
    assert sorted(measured) == ["2", "3", "5", "7"]


@pytest.mark.parametrize(
    ("study", "workers", "message"),
    [(Squares((0,)), None, "0 is its own square"), (Squares(), 0, "--workers 0 is out of range")],
)
def test_what_cannot_be_leaves_nothing_behind(tmp_path, study, workers, message):
    with pytest.raises(FedveilError, match=message):
        measure(study, tmp_path / "out", workers=workers)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("study", "name"),
    [
        *((NOISE, name) for name in ("noise", "noise-blind")),
        *((THEFT, name) for name in ("theft-study", "theft-cifar10", "theft-analytic")),
        (DctStudy(), "dct"),
        (TraceStudy(), "trace"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_stored_result_gives_its_stored_table(study, name):
    result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    assert study.table(result) == (RESULTS / f"{name}.md").read_text(encoding="utf-8")


def test_a_frontier_of_an_earlier_version_still_opens():
    """It asked one membership attack, whose figures are withdrawn: they count as not measured."""
    result = json.loads((RESULTS / "frontier.json").read_text(encoding="utf-8"))
    head, _, *lines = FrontierStudy().table(result).splitlines()
    assert "membership" not in result
    assert "best membership attack" in head
    assert len(lines) == len([row for row in result["rows"] if row["best"]])
    assert all(line.endswith("| not measured | not measured | not measured |") for line in lines)
