"""Each example app does what its README says, on real worker processes and by ``flwr run``."""

import importlib
import json
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict

from fedveil.federation.engines.deployed import environment, free_port
from fedveil.federation.engines.local import LocalGrid

EXAMPLES = Path(__file__).parents[1] / "examples"
FLWR = Path(sys.executable).with_name("flwr")


def _processes(mark):
    """Yield the ids of processes whose command line names ``mark``."""
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (place / "cmdline").read_text():
                yield int(place.name)
        except OSError:
            continue


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """One FLWR_HOME, and so one SuperLink, for all; it outlives ``flwr run``."""
    home = tmp_path_factory.mktemp("flwr-home")
    ports = ("FLWR_LOCAL_SUPERLINK_HTTP_API_PORT", "FLWR_LOCAL_CONTROL_API_PORT")
    yield environment(home) | {name: str(free_port()) for name in ports}
    for process in _processes(str(home)):
        if process != os.getpid():
            os.kill(process, signal.SIGTERM)


def run(home, example, tmp_path, *, nodes=4):
    """Return what the app says of itself, and its log."""
    result = tmp_path / "result.json"
    done = subprocess.run(
        [
            *(FLWR, "run", EXAMPLES / example, "--stream"),
            *(
                "--federation-config",
                f"num-supernodes={nodes}",
                "--run-config",
                f'result="{result}"',
            ),
        ],
        env=home,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    log = done.stdout + done.stderr
    assert result.exists(), log
    return json.loads(result.read_text()), log


def lines_of_fedveil(example):
    """Return how many lines of an app import or call fedveil's names."""
    files = (EXAMPLES / example).rglob("*.py")
    return sum(
        line.startswith(("from fedveil", "import fedveil"))
        for file in files
        for line in file.read_text().splitlines()
    )


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


CAPPED = ("quickstart-pytorch", "quickstart-sklearn", "secure-aggregation")


def check(example, told):
    """Hold what an app says against what its README promises."""
    assert "nan" not in str(told)
    assert told["model"] > 0.65
    assert lines_of_fedveil(example) <= 3
    if example in CAPPED:
        assert len(told["copies"]) >= 3
        assert max(told["copies"]) < 0.6
    if example == "advanced-pytorch":
        assert max(told["copies"]) < 0.3  # an untrained model's
    if example == "custom-mods":
        assert told["said"] == ["seconds", "train_loss"]


@pytest.mark.parametrize("example", [*CAPPED, "advanced-pytorch", "custom-mods"])
def test_an_example_does_what_it_promises(example, tmp_path, monkeypatch):
    check(example, run_here(example, tmp_path, monkeypatch))


def test_the_quickstart_runs_by_flwr_run(home, tmp_path):
    told, log = run(home, "quickstart-pytorch", tmp_path)
    check("quickstart-pytorch", told)
    assert log.count("clients evaluate nothing") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "example", ["quickstart-sklearn", "secure-aggregation", "advanced-pytorch", "custom-mods"]
)
def test_the_others_run_by_flwr_run(home, example, tmp_path):
    told, log = run(home, example, tmp_path)
    check(example, told)
    if example == "custom-mods":
        assert "recording client messages" in log
        assert "is off" in log
