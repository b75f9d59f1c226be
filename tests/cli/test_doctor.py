"""``fedveil doctor`` says what can be had, by the same rules as the strategies themselves."""

import pytest
from typer.testing import CliRunner

from fedveil.cli.main import app
from fedveil.copies.calibration import certifiable
from fedveil.defenses.dp_sgd import DPSGD
from fedveil.doctor import examine


def found(name, **changes):
    checks = examine("digits", **({"clients": 10, "cap": 0.6} | changes))
    return next(check for check in checks if check.name.startswith(name))


def test_what_can_be_had_is_said_with_its_numbers():
    assert "1,438 training images" in found("data digits").found
    assert "143 a client of 10" in found("data digits").found
    told = found("cap")
    assert not told.advice
    assert f"below {certifiable(179, 0.6):.0%}" in told.found
    spent = DPSGD(noise=1.0).epsilon(images=143, batch_size=10, steps=20 * 15)
    assert f"ε = {spent:.1f}" in found("DP-SGD").found


@pytest.mark.parametrize(
    ("name", "changes", "advice"),
    [
        ("cap", {"cap": 0.12}, "raise --cap"),
        ("data digits", {"clients": 400}, "fewer --clients"),
    ],
)
def test_what_cannot_be_had_comes_with_what_to_do(name, changes, advice):
    assert advice in found(name, **changes).advice


def test_data_that_are_none_are_a_line_and_no_traceback():
    done = CliRunner().invoke(app, ["doctor", "--dataset", "digts"])
    assert done.exit_code == 1
    assert "cannot be used" in done.output


def test_a_data_folder_without_data_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("FEDVEIL_DATA", str(tmp_path))
    assert "holds none of mnist" in found("FEDVEIL_DATA").found
    assert found("FEDVEIL_DATA").advice
