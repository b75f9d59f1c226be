"""Each example app does what its README says, on real worker processes and by ``flwr run``."""

import importlib
import json
import sys
import tomllib
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict

from fedveil.federation.engines.local import LocalGrid

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import example_apps  # noqa: E402

EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """One FLWR_HOME, and so one SuperLink, for all; it outlives ``flwr run``."""
    place = tmp_path_factory.mktemp("flwr-home")
    yield example_apps.home_of(place)
    example_apps.end(place)


def run_here(example, tmp_path, monkeypatch):
    """Run an app on this package's own grid, without Ray, and return what it says of itself."""
    monkeypatch.syspath_prepend(str(EXAMPLES / example))
    described = tomllib.loads((EXAMPLES / example / "pyproject.toml").read_text())["tool"]["flwr"]
    parts, config = described["app"]["components"], described["app"]["config"]
    result = tmp_path / "result.json"
    config["result"] = str(result)
    module, _, name = parts["serverapp"].partition(":")
    server = getattr(importlib.import_module(module), name)
    with LocalGrid(parts["clientapp"], nodes=4, workers=1, run_config=config) as grid:
        server(grid, Context(1, 0, {}, RecordDict(), config))
    return json.loads(result.read_text())


def check(example, told):
    """Hold what an app says against what its README promises."""
    assert "nan" not in str(told)
    assert told["model"] > 0.65
    if example in example_apps.CAPPED:
        assert len(told["copies"]) >= 3
        assert max(told["copies"]) < example_apps.CAP
    if example in ("advanced-pytorch", "closed-form"):
        assert max(told["copies"]) < 0.3  # nothing learnt is sent
    if example == "custom-mods":
        assert told["said"] == ["seconds", "train_loss"]


@pytest.mark.parametrize("example", example_apps.APPS)
def test_an_example_does_what_it_promises(example, tmp_path, monkeypatch):
    check(example, run_here(example, tmp_path, monkeypatch))


@pytest.mark.slow
@pytest.mark.parametrize("example", example_apps.APPS)
def test_it_runs_by_flwr_run(home, example, tmp_path):
    told, log = example_apps.run(example, home, tmp_path / "result.json")
    check(example, told)
    if example == "custom-mods":
        assert "recording client messages" in log
        assert "is off" in log
    else:
        assert log.count("clients evaluate nothing") == 1


def test_the_table_of_examples_is_of_these_apps():
    found = json.loads((ROOT / "docs/results/example-apps.json").read_text())["rows"]
    lines = {row["app"]: row["lines"] for row in found}
    assert lines == {name: example_apps.lines_of_fedveil(name) for name in example_apps.APPS}
    pages = {place.name for place in EXAMPLES.iterdir() if (place / "pyproject.toml").exists()}
    assert pages == {*example_apps.APPS, "your-flower-app"}
    for row in found:
        assert row["cap"] is None or row["best_copy"] < row["cap"]
        assert row["log"]["no client evaluates"] == (row["app"] != "custom-mods")


def test_a_line_counts_once_however_often_it_names_fedveil():
    text = "from fedveil.a import b, c\nimport os\nx = b(c(1))\ny = os.sep\nz = d.b\n"
    assert example_apps._lines(text) == {1, 3}
