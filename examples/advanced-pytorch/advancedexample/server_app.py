"""The ServerApp."""

import json
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp

from advancedexample.strategy import BestProtected
from advancedexample.task import Net, load_central
from advancedexample.task import test as evaluate_net

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train, and write how good the model is, and the best copy that any client received."""
    net, config = Net(), context.run_config
    calibration, report = load_central()
    unlabelled = torch.cat([images for images, _ in calibration])
    strategy = BestProtected(
        model=net,
        unlabelled=unlabelled,
        fraction_train=float(config["fraction-train"]),
        min_available_nodes=4,
    )
    copies = []

    def accuracy(weights):
        net.load_state_dict(dict(weights))
        return evaluate_net(net, report)[1]

    def global_evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        copies.extend(accuracy(copy) for copy in (strategy.sent.copies if strategy.sent else ()))
        told = accuracy(arrays.to_torch_state_dict())
        strategy.note(told, arrays)
        return MetricRecord({"accuracy": told})

    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(net.state_dict()),
        train_config=ConfigRecord({"lr": float(config["learning-rate"])}),
        num_rounds=int(config["num-server-rounds"]),
        evaluate_fn=global_evaluate,
    )
    _write(context, {"model": strategy.best_accuracy, "copies": copies})


def _write(context, outcome):
    print(outcome)
    if place := str(context.run_config["result"]):
        Path(place).write_text(json.dumps(outcome))
