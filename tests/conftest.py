"""What every test needs, wherever the suite is started."""

import os
import signal
import sys
from importlib import import_module
from pathlib import Path

from tests.programs import share_forks

# Threads that wait for one another wait busily, each on the core that another needs: of two runs
# side by side each took three times as long. It is read when torch is loaded, also by what is
# started from here.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Under nohup, cron or a shell's "&" SIGINT is ignored, and every process started here would inherit
# that: tests of Ctrl-C would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)

# With xdist a file is one worker's. These take longest and so come first: where one of them began
# last, the other workers would wait for it.
LONG = (
    "deployment/test_end_to_end.py",
    "federation/test_train.py",
    "audit/test_theft.py",
    "cli/test_main.py",
    "deployment/test_policy_of_a_node.py",
    "test_notebook.py",
    "studies/test_frontier.py",
    "federation/secagg/test_secure_aggregation.py",
    "test_contributing.py",
    "federation/strategies/test_analytic.py",
    "federation/engines/test_local.py",
    "audit/test_leakage.py",
    "report/test_report_in_browser.py",
    "data/test_data_load.py",
    "attacks/inversion/test_recovery.py",
    "audit/test_recorded.py",
    "runs/test_archive.py",
    "federation/test_faults.py",
    "audit/test_trace.py",
    "audit/test_pieces.py",
    "studies/test_dct.py",
    "studies/test_noise.py",
    "federation/strategies/test_ensemble_distillation.py",
    "federation/test_secrecy.py",
    "runs/test_secrets.py",
    "models/test_architectures.py",
    "audit/test_adaptive.py",
    "test_readme.py",
)


# The first optimiser imports Dynamo, and the first score Torchmetrics, else in every client's fork.
LOADED = ("matplotlib.backends.backend_agg", "sklearn.cluster", "torch._dynamo", "torchmetrics")


def pytest_configure(config):
    """Load once what is long to load: for the programs of all workers, and for a worker's forks."""
    if sys.platform != "linux":
        return
    if getattr(config.option, "numprocesses", None):
        share_forks()
    elif hasattr(config, "workerinput"):
        for name in LOADED:
            import_module(name)


def pytest_collection_modifyitems(items):
    """Let the longest files begin first; within a file nothing moves."""
    place = {name: number for number, name in enumerate(LONG)}
    here = Path(__file__).parent
    items.sort(key=lambda item: place.get(item.path.relative_to(here).as_posix(), len(LONG)))
