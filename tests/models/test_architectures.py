"""Real architectures through every strategy and the leakage audit: right, or refused by name."""

import pytest

from fedveil.audit.leakage import run_leakage_audit
from fedveil.audit.settings import LeakageSettings
from fedveil.errors import FedveilError
from fedveil.federation import client_app
from fedveil.federation.server_app import prepare_job
from fedveil.runs.config import TrainConfig
from tests.models.architectures import ARCHITECTURES
from tests.models.architectures_table import STRATEGIES, become

REFUSED = {
    ("capsules", "noise-delta"): "its logits are not the output of one linear layer",
    ("SqueezeNet", "noise-delta"): "its logits are not the output of one linear layer",
}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_it_passes_the_trial_step_of_every_strategy_or_says_why(name, strategy):
    client_app._model.cache_clear()
    config = TrainConfig.check(
        {
            "dataset": "digits", "clients": 4, "fraction": 1.0, "calibration_images": 100,
            "strategy": strategy, "model": f"tests.models.architectures_table:{become(name)}",
        }
    )  # fmt: skip
    if told := REFUSED.get((name, strategy)):
        with pytest.raises(FedveilError, match=told):
            prepare_job(config)
    else:
        assert prepare_job(config).notes == ()


@pytest.mark.parametrize("name", ["Siamese, tied", "Conv3d", "GRU over rows", "LSTM over rows"])
def test_an_audit_attacks_it_or_says_why(name, tmp_path):
    settings = LeakageSettings(clients=2, images=1, attacks=("ig:steps=3",), defenses=("none",))
    try:
        report = run_leakage_audit(
            "digits", f"tests.models.architectures_table:{become(name)}", settings, out=None
        )
    except FedveilError as error:
        assert str(error).count("\n") == 0  # noqa: PT017
    else:
        assert report.rows[0].scores
