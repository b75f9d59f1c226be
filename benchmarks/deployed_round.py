"""What a round on deployed SuperNodes costs when the clients do nothing, and what the waits are.

    python benchmarks/deployed_round.py --out docs/results

Contestants, each a real SuperLink and two SuperNodes on loopback whose clients return what they
received, after importing what fedveil's own client imports:

flower   as Flower comes
poll     SuperExec looks for tasks every 0.25 s instead of every second
eager    and the server looks for replies every 0.1 s instead of every three (fedveil's EagerGrid)
gate     and the deployment of ``fedveil deploy init``: TLS, node authentication, signed apps, and a
         gate that holds an idle node's question back for 2.5 s
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

from written import write_result

from fedveil.deployment.control import register
from fedveil.deployment.layout import CONNECTION, Deployment, create
from fedveil.deployment.signed_apps import sign_app
from fedveil.federation.engines.deployed import ENVIRONMENT, environment, free_port, program

NODES = 2
POLL = "FLWR_SUPEREXEC_TASK_POLL_INTERVAL"
APP = {
    "pyproject.toml": """[project]
name = "idle"
version = "1.0.0"
description = "Clients that do nothing"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "fedveil"
[tool.flwr.app.components]
serverapp = "idle:server_app"
clientapp = "idle:client_app"
[tool.flwr.app.config]
eager = false
rounds = 6
out = ""
""",
    "idle.py": """import json, time
from pathlib import Path
import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
import fedveil.federation.client_app
from fedveil.federation.engines.eager_grid import EagerGrid

client_app = ClientApp()
server_app = ServerApp()

@client_app.train()
def train(message, context):
    content = {"arrays": message.content["arrays"], "m": MetricRecord({"num-examples": 1})}
    return Message(RecordDict(content), reply_to=message)

@server_app.main()
def main(grid, context):
    config, times = context.run_config, []
    FedAvg(fraction_evaluate=0.0).start(
        EagerGrid(grid) if config["eager"] else grid,
        ArrayRecord([np.zeros(1_663_370, dtype=np.float32)]),
        num_rounds=config["rounds"],
        evaluate_fn=lambda number, arrays: times.append(time.time()),
    )
    place = Path(config["out"])
    place.with_suffix(".part").write_text(json.dumps(times))
    place.with_suffix(".part").replace(place)
""",
}


class Processes:
    """Processes that end with a stack."""

    def __init__(self, stack: ExitStack) -> None:
        self.stack = stack

    def start(self, command: list[str], settings: dict[str, str]) -> None:
        """Start one, without output."""
        process = subprocess.Popen(
            command,
            env=settings,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.stack.callback(lambda: (os.killpg(process.pid, 9), process.wait()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--only", action="append", choices=CONTESTANTS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results = {name: measure(name, options.rounds) for name in options.only or CONTESTANTS}
    results["start of one client process"] = process_start()
    report = {"nodes": NODES, "load": os.getloadavg(), "cores": os.cpu_count(), **results}
    print(json.dumps(report, indent=2))
    if options.out:
        write_result(options.out / "deployed-round.json", options, **report)


def measure(name: str, rounds: int) -> dict[str, object]:
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fedveil-")))
        (home / "app").mkdir()
        for file, content in APP.items():
            (home / "app" / file).write_text(content)
        processes = Processes(stack)
        start, eager = CONTESTANTS[name]
        app, connection, flower_home = start(processes, home)
        times = run(app, connection, flower_home, home / "times.json", eager, rounds)
        # The first round waits for the nodes to join.
        seconds = [after - before for before, after in pairwise(times[1:])]
        print(name, [round(s, 2) for s in seconds], flush=True)
        return {"seconds": seconds, "median": statistics.median(seconds)}


def plain(poll: str) -> object:
    def start(processes: Processes, home: Path) -> tuple[str, str, Path]:
        settings = {**environment(home / "flwr"), POLL: poll}
        (home / "flwr").mkdir()
        port = free_port()
        (home / "flwr" / "config.toml").write_text(
            f'[superlink]\ndefault = "{CONNECTION}"\n[superlink.{CONNECTION}]\n'
            f'address = "127.0.0.1:{port}"\ninsecure = true\n'
        )
        superlink = "flower-superlink --insecure --disable-runtime-dependency-installation"
        command = [*superlink.split(), "--port", str(port)]
        processes.start([program(command[0]), *command[1:]], settings)
        for _ in range(NODES):
            command = [program("flower-supernode"), "--insecure"]
            command += ["--superlink", f"127.0.0.1:{port}", "--port", str(free_port())]
            processes.start(command, settings)
        return str(home / "app"), CONNECTION, home / "flwr"

    return start


def deployment(processes: Processes, home: Path) -> tuple[str, str, Path]:
    folder = home / "deployment"
    # Below the ports the system hands out, so that the following ones are free as well.
    create(folder, Deployment("127.0.0.1", free_port() // 2, NODES))
    app = sign_app(home / "app", key=folder / "signing.key", shelf=folder / "signed-apps")
    settings = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for part in ("shelf", "superlink", "gate"):
        processes.start([str(folder / f"start-{part}")], settings)
    while True:
        try:
            register(folder)
            break
        except Exception:  # until it is up
            time.sleep(1)
    for number in range(NODES):
        processes.start([str(folder / "nodes" / f"node-{number}" / "start")], settings)
    return app.spec, CONNECTION, folder / "flwr"


def run(app: str, connection: str, home: Path, out: Path, eager: bool, rounds: int) -> list[float]:
    config = f'out="{out}" eager={str(eager).lower()} rounds={rounds}'
    command = [program("flwr"), "run", app, connection, "--run-config", config]
    while True:
        done = subprocess.run(
            command, env=environment(home), capture_output=True, text=True, check=False
        )
        if "Successfully" in done.stdout:
            break
        if "unavailable" not in done.stdout + done.stderr:
            raise SystemExit(done.stdout + done.stderr)
        time.sleep(1)
    while not out.exists():
        time.sleep(0.5)
    times: list[float] = json.loads(out.read_text())
    return times


def process_start() -> dict[str, float]:
    """Processor seconds of what every message pays before the client app is called."""
    parts = {
        "flwr-clientapp": "from flwr.supernode.cli import flwr_clientapp",
        "and torch": "from flwr.supernode.cli import flwr_clientapp; import torch",
        "and fedveil's client": "from flwr.supernode.cli import flwr_clientapp; "
        "import fedveil.federation.client_app",
    }
    return {name: statistics.median(cpu(code) for _ in range(3)) for name, code in parts.items()}


def cpu(code: str) -> float:
    before = os.times()
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **ENVIRONMENT}, check=True)
    after = os.times()
    return (after.children_user + after.children_system) - (
        before.children_user + before.children_system
    )


CONTESTANTS = {
    "flower": (plain("1.0"), False),
    "poll": (plain(ENVIRONMENT[POLL]), False),
    "eager": (plain(ENVIRONMENT[POLL]), True),
    "gate": (deployment, True),
}

if __name__ == "__main__":
    main()
