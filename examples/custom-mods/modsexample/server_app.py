"""The ServerApp: Flower's own strategy."""

import json
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from modsexample.task import Net, load_central
from modsexample.task import test as evaluate_net

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train, and write how good the model is."""
    net, config = Net(), context.run_config
    _, report = load_central()
    result = FedAvg(fraction_evaluate=0.5).start(
        grid=grid,
        initial_arrays=ArrayRecord(net.state_dict()),
        train_config=ConfigRecord({"lr": float(config["learning-rate"])}),
        num_rounds=int(config["num-server-rounds"]),
    )
    net.load_state_dict(result.arrays.to_torch_state_dict())
    told = result.train_metrics_clientapp[1]
    _write(context, {"model": evaluate_net(net, report)[1], "said": sorted(told)})


def _write(context, outcome):
    print(outcome)
    if place := str(context.run_config["result"]):
        Path(place).write_text(json.dumps(outcome))
