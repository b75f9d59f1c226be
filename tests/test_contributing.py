"""What CONTRIBUTING prints is all it takes to add an attack or a defence."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import fedveil

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
    add(defenses / "specs.py", '    "dct": _Kind(', block('    "mine": _Kind'))
    add(package / "audit/adaptive.py", '    "dct": Adaptive(', block('    "mine": Adaptive'))


def fedveil_of(place, *options):
    done = subprocess.run(
        [Path(sys.executable).with_name("fedveil"), *options],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(place)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_one_file_and_its_name_are_all_it_takes(tmp_path):
    package = Path(fedveil.__file__).parent
    shutil.copytree(package, tmp_path / "fedveil", ignore=shutil.ignore_patterns("__pycache__"))
    write_down(tmp_path / "fedveil")
    fedveil_of(
        tmp_path,
        *("audit", "leakage", "--dataset", "digits", "--images", "2", "--workers", "1"),
        *("--attack", "my-attack:steps=3", "--defense", "none", "--defense", "mine:shades=4"),
        *("--out", "leakage"),
    )
    rows = json.loads((tmp_path / "leakage/leakage.json").read_text())["rows"]
    assert {(row["attack"], row["defense"]) for row in rows} == {
        ("my-attack:steps=3", "none"),
        ("my-attack:steps=3", "mine:shades=4"),
    }
    assert all(row["images"] == 2 for row in rows)
    fedveil_of(tmp_path, "report", "leakage", "--out", "report.html")
    assert "my-attack" in (tmp_path / "report.html").read_text()
    fedveil_of(
        tmp_path,
        *("train", "--dataset", "digits", "--clients", "2", "--fraction", "1", "--rounds", "1"),
        *("--strategy", "fedavg", "--transform", "mine:shades=4", "--workers", "1"),
        *("--out", "run"),
    )
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["configuration"]["defense"] == "mine:shades=4"


def test_what_is_printed_is_in_the_house_style(tmp_path):
    for beginning in ('"""My attack', '"""My defence'):
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
