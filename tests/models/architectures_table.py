"""What becomes of real architectures: ``python -m tests.models.architectures_table OUT.json``.

Each of them is trained for a round by every strategy on the digits, and attacked by an audit.
"""

import json
import re
import sys
import tempfile
from functools import partial
from pathlib import Path

from fedveil.audit.leakage import run_leakage_audit
from fedveil.audit.settings import LeakageSettings
from fedveil.errors import FedveilError
from fedveil.federation import client_app
from fedveil.federation.training_run import run_to_completion
from fedveil.runs.config import TrainConfig
from fedveil.runs.directory import RunDirectory, origin
from tests.models.architectures import ARCHITECTURES

STRATEGIES = ("fedavg", "noise-pair", "noise-delta", "protected")
DEFENSES = ("dp-sgd:noise=1",)


def become(name):
    """Return an architecture's name as Python writes names."""
    return re.sub(r"\W+", "_", name).strip("_").lower()


globals().update({become(name): make for name, make in ARCHITECTURES.items()})


def _outcome(work):
    client_app._model.cache_clear()
    try:
        return work()
    except FedveilError as error:
        return f"refused: {error}"
    except Exception as error:  # what must not be
        return f"FAULT: {type(error).__name__}: {error}"


def _trained(name, strategy, defense="none"):
    from fedveil.federation.server_app import prepare_job

    config = TrainConfig.check(
        {
            "dataset": "digits", "clients": 4, "fraction": 1.0, "rounds": 1, "workers": 1,
            "calibration_images": 100, "report_images": 100, "distillation_steps": 5,
            "strategy": strategy, "defense": defense, "cap": 0.6,
            "model": f"tests.models.architectures_table:{become(name)}",
        }
    )  # fmt: skip
    prepare_job(config)
    with tempfile.TemporaryDirectory() as folder:
        run = RunDirectory.create(Path(folder) / "run", config)
        summary = run_to_completion(run)
        refused = run.rounds()[-1].refused
    trained = f"trained: {summary['accuracy']:.0%}"
    return f"{trained}, without {refused[0]}" if refused else trained


def _audited(name):
    settings = LeakageSettings(clients=4, images=1, attacks=("ig:steps=20",), defenses=("none",))
    model = f"tests.models.architectures_table:{become(name)}"
    row = run_leakage_audit("digits", model, settings, out=None).rows[0].summary()
    return f"attacked: {row['psnr_original']:.1f} dB"


def table():
    """Return architecture to what became of it, by strategy, defence and audit."""
    found = {}
    for name in ARCHITECTURES:
        row = {s: _outcome(partial(_trained, name, s)) for s in STRATEGIES}
        row |= {d: _outcome(partial(_trained, name, "fedavg", d)) for d in DEFENSES}
        found[name] = row | {"audit leakage": _outcome(partial(_audited, name))}
        print(name, found[name], flush=True)
    return found


if __name__ == "__main__":
    content = {
        "command": "python -m tests.models.architectures_table docs/results/architectures.json",
        "seed": 0,
        **origin(),
        "architectures": table(),
    }
    Path(sys.argv[1]).write_text(json.dumps(content, indent=1) + "\n")
