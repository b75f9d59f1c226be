"""What ``import fedveil`` gives, and what it does not load."""

import subprocess
import sys

import pytest

import fedveil

HEAVY = ("torch", "flwr", "numpy", "datasets", "matplotlib", "kornia", "opacus", "ray")


def loaded(code):
    """Return which of the heavy packages a fresh interpreter has loaded after some code."""
    told = f"{code}\nimport sys\nprint('loaded:', *[m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    "code",
    [
        "import fedveil; fedveil.FedveilError",
        "from typer.testing import CliRunner\nfrom fedveil.cli.main import app\n"
        "for words in (['--help'], ['train', '--help'], ['audit', 'leakage', '--help']):\n"
        "    assert CliRunner().invoke(app, words).exit_code == 0",
    ],
    ids=["package", "help"],
)
def test_nothing_heavy_is_loaded_before_it_is_needed(code):
    assert loaded(code) == "loaded:"


def test_ten_names_are_all_a_user_needs():
    assert len(fedveil.__all__) == 10
    for name in fedveil.__all__:
        assert callable(getattr(fedveil, name))
    assert set(fedveil.__all__) <= set(dir(fedveil))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = fedveil.nonsense


def test_the_names_work_whatever_was_imported_before():
    """A sub-package of a name's own would take its place."""
    assert loaded(
        "import fedveil.report, fedveil.audit.trace, fedveil.api\n"
        "from fedveil import trace, train, watch, write_report\n"
        "assert all(map(callable, (trace, train, watch, write_report)))"
    )


def test_a_run_is_trained_watched_traced_and_reported_by_these_names(tmp_path):
    run = tmp_path / "run"
    summary = fedveil.train(
        run, dataset="digits", clients=2, fraction=1.0, rounds=1, strategy="noise-delta", workers=1
    )
    assert summary["sends"] == "capped"
    with pytest.raises(fedveil.FedveilError, match="unknown setting 'round'"):
        fedveil.train(tmp_path / "other", round=1)
    data = fedveil.load_dataset("digits")
    model = fedveil.build_model("lenet", data.shape, 10, seed=0)
    leak = fedveil.watch(
        data, model, clients=2, images=1, attacks=("rgap",), out=tmp_path / "leakage", workers=1
    )
    assert leak.rows[0].summary()["exact"] == 1
    assert "The file is w itself" in fedveil.trace(run / "model.safetensors", run)
    # What it makes is tested where it is; here it is enough that it reads this run.
    with pytest.raises(fedveil.FedveilError, match="colluders"):
        fedveil.steal(run, tmp_path / "theft", labels=(10,), colluders=(99,), workers=1)
    fedveil.write_report([run, tmp_path / "leakage"], tmp_path / "page.html")
    assert "rgap" in (tmp_path / "page.html").read_text()
