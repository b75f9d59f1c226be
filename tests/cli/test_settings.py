"""A setting of a run is one field: what the command line, the file and the help know of it."""

import re
from typing import Any

import pytest
from pydantic.fields import FieldInfo
from typer import Typer
from typer.testing import CliRunner

from fedveil.cli import settings as settings_module
from fedveil.cli.main import app
from fedveil.cli.settings import with_settings
from fedveil.errors import FedveilError
from fedveil.runs import config as config_module
from fedveil.runs.config import TrainConfig, setting

WIDE = {"COLUMNS": "200", "TERM": "dumb"}
GROUPS = (
    *("Data", "Training", "Protection", "Noise", "Both ways", "Secure aggregation"),
    *("Deployment", "Output"),
)


def told():
    done = CliRunner().invoke(app, ["train", "--help"], env=WIDE)
    assert done.exit_code == 0
    return done.output


def panels(text):
    """Return the lines of each panel of a help."""
    found = {}
    for line in text.splitlines():
        if line.startswith("╭─ "):
            name = line.removeprefix("╭─ ").rstrip("─╮ ")
            found[name] = []
        elif line.startswith("│") and found:
            found[name].append(line)
    return found


def test_help_shows_groups_in_order_and_every_default():
    shown = panels(told())
    assert [name for name in shown if name != "Options"] == list(GROUPS)
    for name, field in TrainConfig.model_fields.items():
        flag = f"--{name.replace('_', '-')}"
        group = field.json_schema_extra["group"]
        (line,) = [one for one in shown[group] if re.match(rf"│ +{flag}[ ,]", one)]
        if field.default not in (None, False, True):
            assert f"(default {field.default})" in line, line


def test_every_setting_is_reached_from_the_command_line_as_it_was_written():
    given: dict[str, Any] = {}
    command = Typer()
    command.command()(with_settings(lambda **settings: given.update(settings)))
    words = []
    for name, field in TrainConfig.model_fields.items():
        if field.annotation in (bool, bool | None):
            words.append(f"--{'no-' if field.default else ''}{name.replace('_', '-')}")
        else:
            value = {"strategy": "fedavg", "engine": "deployed", "log": "mlflow"}.get(name, "1")
            value = {"average": "median", "bound": "agreement"}.get(name, value)
            value = {"privacy_unit": "client", "deliver": "last"}.get(name, value)
            words += [f"--{name.replace('_', '-')}", value]
    done = CliRunner().invoke(command, words)
    assert done.exit_code == 0, done.output
    assert given.keys() == TrainConfig.model_fields.keys()
    assert given["average"] == "median"
    assert given["archive"] is False
    assert given["decay"] is True
    # What is not given is not there, so that a file's value holds.
    given.clear()
    assert CliRunner().invoke(command, ["--rounds", "3"]).exit_code == 0
    assert given == {"rounds": 3}


class Longer(TrainConfig):
    """A configuration with one field more, and nothing else."""

    patience: int = setting(7, "Protection", "Rounds to wait for nothing.", ge=1, le=99)


@pytest.fixture
def longer(monkeypatch):
    for module in (settings_module, config_module):
        monkeypatch.setattr(module, "TrainConfig", Longer)
    return Longer


def test_a_new_option_is_one_field(longer, tmp_path):
    """It is in the help under its heading with its default, on the line, and in the file."""
    given: dict[str, Any] = {}
    command = Typer()
    command.command()(with_settings(lambda **settings: given.update(settings)))
    shown = panels(CliRunner().invoke(command, ["--help"], env=WIDE).output)
    (line,) = [line for line in shown["Protection"] if "--patience" in line]
    assert "Rounds to wait for nothing. (default 7)" in line
    assert CliRunner().invoke(command, ["--patience", "8"]).exit_code == 0
    assert longer.check(given).patience == 8
    file = tmp_path / "run.toml"
    file.write_text("patience = 9\n")
    assert longer.read(file).patience == 9
    assert longer.read(file, **given).patience == 8
    with pytest.raises(FedveilError, match=r"setting patience = 100 .*\(allowed: at least 1 and"):
        longer.check({"patience": 100})


def test_every_field_says_where_it_belongs():
    for field in TrainConfig.model_fields.values():
        assert isinstance(field, FieldInfo)
        assert field.description
        assert field.json_schema_extra["group"] in GROUPS


def test_what_is_not_given_follows_from_what_is():
    """Sums where nothing else is asked for; a model of one's own, or its training, is trained."""
    plain = TrainConfig.check({})
    assert (plain.strategy, plain.rounds, plain.fraction) == ("analytic", 1, 1.0)
    assert (plain.secure_aggregation, plain.key_shares, plain.deliver) == (True, 15, "last")
    assert not TrainConfig.check({"clients": 2}).secure_aggregation
    assert TrainConfig.check({"clients": 20}).key_shares is None
    assert not TrainConfig.check({"secure_aggregation": False}).secure_aggregation
    own = TrainConfig.check({"model": "lenet", "epochs": 3, "clients": 40})
    assert (own.strategy, own.epochs, own.fraction) == ("protected", 3, 0.25)
    assert (own.learning_rate, own.decay, own.momentum, own.clip) == (0.1, True, 0.9, 1.0)
    assert TrainConfig.check({"strategy": "fedavg"}).learning_rate == 0.05
    for chosen in (plain, own):
        assert TrainConfig.check(chosen.model_dump()) == chosen


@pytest.mark.parametrize(("name", "value"), [("epochs", 5), ("model", "lenet"), ("cap", 0.5)])
def test_sums_refuse_what_would_mean_nothing(name, value):
    with pytest.raises(FedveilError, match=f"{name} is for clients that train a model"):
        TrainConfig.check({"strategy": "analytic", name: value})
