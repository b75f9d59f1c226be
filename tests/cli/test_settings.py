"""A setting is one field: what the command line, the file and the help know of it."""

import re
from dataclasses import dataclass, fields
from typing import Any

import pytest
from pydantic.fields import FieldInfo
from typer import Typer
from typer.testing import CliRunner

from fedveil.audit.settings import (
    EgressSettings,
    LeakageSettings,
    SumsSettings,
    TheftSettings,
    TraceSettings,
)
from fedveil.cli.main import app
from fedveil.cli.settings import with_settings
from fedveil.errors import FedveilError
from fedveil.runs import config as config_module
from fedveil.runs.config import TrainConfig, setting
from fedveil.settings import option, options
from fedveil.studies.settings import (
    DctOptions,
    FrontierOptions,
    NoiseOptions,
    TheftOptions,
    TraceOptions,
)

WIDE = {"COLUMNS": "200", "TERM": "dumb"}
GROUPS = (
    *("Data", "Training", "Protection", "Noise", "Both ways", "Secure aggregation"),
    *("Deployment", "Output"),
)


OTHERS = {
    "audit leakage": LeakageSettings,
    "audit trace": TraceSettings,
    "audit egress": EgressSettings,
    "audit sums": SumsSettings,
    "audit theft": TheftSettings,
    "reproduce noise": NoiseOptions,
    "reproduce dct": DctOptions,
    "reproduce trace": TraceOptions,
    "reproduce theft": TheftOptions,
    "frontier": FrontierOptions,
}


def told(*command):
    done = CliRunner().invoke(app, [*(command or ["train"]), "--help"], env=WIDE)
    assert done.exit_code == 0
    return done.output


def given_to(settings, *words):
    """Return what a command of these settings is given of a line."""
    given: dict[str, Any] = {}
    command = Typer()
    command.command()(with_settings(settings)(lambda **chosen: given.update(chosen)))
    done = CliRunner().invoke(command, list(words), env=WIDE, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return given if words != ("--help",) else done.output


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
        if not isinstance(field.default, bool | None):
            assert f"(default {field.default})" in line, line


def test_every_setting_is_reached_from_the_command_line_as_it_was_written():
    words = []
    for name, field in TrainConfig.model_fields.items():
        if field.annotation in (bool, bool | None):
            words.append(f"--{'no-' if field.default else ''}{name.replace('_', '-')}")
        else:
            value = {"strategy": "fedavg", "engine": "deployed", "log": "mlflow"}.get(name, "1")
            value = {"average": "median", "bound": "agreement"}.get(name, value)
            value = {"privacy_unit": "client", "deliver": "last"}.get(name, value)
            words += [f"--{name.replace('_', '-')}", value]
    given = given_to(TrainConfig, *words)
    assert given.keys() == TrainConfig.model_fields.keys()
    assert given["average"] == "median"
    assert given["archive"] is False
    assert given["decay"] is True
    # What is not given is not there, so that a file's value holds.
    assert given_to(TrainConfig, "--rounds", "3") == {"rounds": 3}


class Longer(TrainConfig):
    """A configuration with one field more, and nothing else."""

    patience: int = setting(7, "Protection", "Rounds to wait for nothing.", ge=1, le=99)


def test_a_new_option_is_one_field(monkeypatch, tmp_path):
    """It is in the help under its heading with its default, on the line, and in the file."""
    monkeypatch.setattr(config_module, "TrainConfig", Longer)
    shown = panels(given_to(Longer, "--help"))
    (line,) = [line for line in shown["Protection"] if "--patience" in line]
    assert "Rounds to wait for nothing. (default 7)" in line
    given = given_to(Longer, "--patience", "8")
    assert Longer.check(given).patience == 8
    file = tmp_path / "run.toml"
    file.write_text("patience = 9\n")
    assert Longer.read(file).patience == 9
    assert Longer.read(file, **given).patience == 8
    with pytest.raises(FedveilError, match=r"setting patience = 100 .*\(allowed: at least 1 and"):
        Longer.check({"patience": 100})


@dataclass(frozen=True, kw_only=True)
class Patient(SumsSettings):
    """Settings of an audit with two fields more, and nothing else."""

    patience: int = option(7, "Rounds to wait for nothing.", ge=1, lt=99)
    waiters: tuple[str, ...] = option(("me",), "Who waits.", flags=("--waiter",))


def test_a_new_option_of_an_audit_is_one_field():
    """It is in the help with its default and range, on the line, and in what the audit is given."""
    shown = given_to(Patient, "--help")
    assert "Rounds to wait for nothing. (default 7; at least 1 and below 99)" in shown
    assert "Who waits; may be repeated. (default me)" in shown
    given = given_to(Patient, "--patience", "8", "--waiter", "a", "--waiter", "b", "--images", "30")
    assert Patient(**given) == Patient(patience=8, waiters=("a", "b"), images=30)
    assert Patient(**given_to(Patient)) == Patient()
    with pytest.raises(FedveilError, match=r"--patience 99 is out of range \(allowed: at least"):
        Patient(**given_to(Patient, "--patience", "99"))


@pytest.mark.parametrize("command", OTHERS)
def test_settings_of_audits_and_studies_are_options_of_their_commands(command):
    settings, line = OTHERS[command], told(*command.split())
    usual = {one.name: one.default for one in fields(settings)}
    words, meant = [], {}
    for name, shown in options(settings).items():
        (flag, *_), value = shown.named(name), usual[name]
        assert re.search(rf"{flag}\b", line), flag
        assert shown.told.removesuffix(".")[:40] in line
        if value is False:
            words, meant = [*words, flag], meant | {name: True}
        elif isinstance(value, tuple) and shown.commas:
            words, meant = [*words, flag, "3,4"], meant | {name: (3, 4)}
        elif isinstance(value, str | tuple) and name != "update":
            several = [str(one) for one in value] if isinstance(value, tuple) else [value]
            words += [word for one in several for word in (flag, one)]
            meant |= {name: value} if several else {}
    assert given_to(settings, *words) == meant


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
