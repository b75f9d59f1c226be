"""What CONTRIBUTING prints is all it takes to add what it names, from an attack to an option."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fedveil
from fedveil.runs.archive import Archive
from fedveil.runs.directory import RunDirectory
from tests.programs import warm_programs

GUIDE = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)


def block(beginning):
    (found,) = [text for text in BLOCKS if text.startswith(beginning)]
    return found


def add(path, before, line):
    """Put a line before one that is there."""
    text = path.read_text(encoding="utf-8")
    assert text.count(before) == 1, (path, before)
    path.write_text(text.replace(before, line + before), encoding="utf-8")


def write_down(package):
    """Do what the guide says, and nothing else."""
    inversion, defenses = package / "attacks/inversion", package / "defenses"
    (inversion / "my_attack.py").write_text(block('"""My attack'))
    imported = "from fedveil.attacks.inversion.my_attack import MyAttack\n"
    add(inversion / "__init__.py", "from fedveil.attacks.inversion.observation", imported)
    add(inversion / "__init__.py", '    "dlg": DLG,', block('    "my-attack"'))
    (defenses / "my_defense.py").write_text(block('"""My defence'))
    imported = "from fedveil.defenses.my_defense import MyDefense\n"
    add(defenses / "specs.py", "from fedveil.defenses.protocol", imported)
    add(defenses / "specs.py", '    "dct": BlockDCT,', block('    "mine": MyDefense'))
    strategy = package / "federation/strategies/my_strategy.py"
    strategy.write_text(block('"""My strategy'))
    add(package / "runs/config.py", '    "fedavg": "fedveil', block('    "mine": "fedveil'))
    (package / "data/my_images.py").write_text(block('"""My images'))
    imported = "from fedveil.data.my_images import halves\n"
    add(package / "data/load.py", "from fedveil.data.source", imported)
    add(package / "data/load.py", '    "digits": digits,', block('    "halves"'))
    add(
        package / "audit/settings.py",
        "    inverse: bool = option(",
        block("    effort: int = option"),
    )


def fedveil_of(place, *options):
    paths = [str(place), os.environ.get("PYTHONPATH")]
    done = subprocess.run(
        [Path(sys.executable).with_name("fedveil"), *options],
        cwd=place,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A copy of the package with what the guide prints."""
    place = tmp_path_factory.mktemp("copy")
    package = Path(fedveil.__file__).parent
    shutil.copytree(package, place / "fedveil", ignore=shutil.ignore_patterns("__pycache__"))
    write_down(place / "fedveil")
    with warm_programs():  # only libraries: each imports the copy
        yield place


def test_one_file_and_its_name_are_all_it_takes(place, tmp_path):
    leakage = tmp_path / "leakage"
    fedveil_of(
        place,
        *("audit", "leakage", "--dataset", "digits", "--images", "2", "--workers", "1"),
        *("--attack", "my-attack:steps=3", "--defense", "none", "--defense", "mine:shades=4"),
        *("--defense", "prune:share=0.9", "--effort", "9", "--out", leakage),
    )
    found = json.loads((leakage / "leakage.json").read_text())
    assert found["settings"]["effort"] == 9
    assert "--effort" in fedveil_of(place, "audit", "leakage", "--help")
    rows = found["rows"]
    assert [(row["defense"], row["adaptive"]) for row in rows] == [
        ("none", False),
        ("mine:shades=4", False),
        ("mine:shades=4", True),
        ("prune:share=0.9", False),
        ("prune:share=0.9", True),
    ]
    assert {row["attack"] for row in rows} == {"my-attack:steps=3"}
    assert all(row["images"] == 2 for row in rows)
    # Who knows which entries were not sent compares the others, and so finds something else.
    assert rows[3]["psnr_original"] != rows[4]["psnr_original"]
    fedveil_of(place, "report", leakage, "--out", tmp_path / "report.html")
    assert "my-attack" in (tmp_path / "report.html").read_text()


def test_the_frontier_trains_and_attacks_what_was_added(place, tmp_path):
    out = tmp_path / "frontier"
    fedveil_of(
        place,
        *("frontier", "--dataset", "digits", "--images", "2", "--batch", "2", "--seeds", "1"),
        *("--rounds", "1", "--scenario", "worst", "--attack", "my-attack:steps=2"),
        *("--defense", "none", "--defense", "mine:shades=4", "--no-inverse", "--workers", "1"),
        *("--out", out),
    )
    rows = json.loads((out / "frontier.json").read_text())["rows"]
    assert [(row["family"], row["adaptive"]) for row in rows] == [
        ("none", False),
        ("mine", False),
        ("mine", True),
    ]
    assert (out / "frontier.png").exists()
    done = subprocess.run(
        [sys.executable, "-c", "from fedveil.studies.frontier import SETTINGS; print(SETTINGS)"],
        cwd=place,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "'mine:shades=8'" in done.stdout  # among those that are tried where none is named


def test_a_strategy_and_a_dataset_are_trained_archived_and_reported(place, tmp_path):
    assert "mine" in fedveil_of(place, "train", "--help")
    run, settings = tmp_path / "run", tmp_path / "run.toml"
    settings.write_text('strategy = "mine"\ndataset = "halves"\nmodel = "cnn"\n')
    fedveil_of(
        place,
        *("train", "--config", settings, "--clients", "4", "--fraction", "1", "--rounds", "2"),
        *("--learning-rate", "0.1", "--workers", "1", "--out", run),
    )
    told = json.loads((run / "summary.json").read_text())
    assert (told["sends"], told["configuration"]["strategy"]) == ("model", "mine")
    archive = Archive.open(run, RunDirectory.open(run).noise_key())
    (copy,) = archive.read(2).copies
    assert all(torch.equal(value, value.half().float()) for value in copy.values())
    fedveil_of(place, "report", run, "--out", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "mine" in page
    assert "halves" in page


def test_what_is_printed_is_in_the_house_style(tmp_path):
    for beginning in ('"""My attack', '"""My defence', '"""My strategy', '"""My images'):
        (tmp_path / "printed.py").write_text(block(beginning))
        settings = Path(__file__).parents[1] / "pyproject.toml"
        for check in (["check"], ["format", "--check"]):
            done = subprocess.run(
                [
                    *(sys.executable, "-m", "ruff", *check, "--no-cache"),
                    *("--config", settings),
                    *("--config", 'lint.isort.known-first-party = ["fedveil"]', "printed.py"),
                ],
                cwd=tmp_path,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stdout + done.stderr
