"""The ServerApp."""

import json
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp

from fedveil.federation import Cap, NoiseDelta
from fedveil.federation.secagg.server import SecureAggregation
from secaggexample.task import Net, load_central
from secaggexample.task import test as evaluate_net

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train, and write how good the model is, and the best copy that any client received."""
    net, config = Net(), context.run_config
    calibration, report = load_central()
    strategy = NoiseDelta(model=net, cap=Cap(0.6, calibration), min_available_nodes=4)
    strategy.secure = SecureAggregation()  # was: SecAggPlusWorkflow(…)
    copies = []

    def accuracy(weights):
        net.load_state_dict(dict(weights))
        return evaluate_net(net, report)[1]

    def global_evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        copies.extend(accuracy(copy) for copy in (strategy.sent.copies if strategy.sent else ()))
        return MetricRecord({"accuracy": accuracy(arrays.to_torch_state_dict())})

    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(net.state_dict()),
        train_config=ConfigRecord({"lr": float(config["learning-rate"])}),
        num_rounds=int(config["num-server-rounds"]),
        evaluate_fn=global_evaluate,
    )
    final = accuracy(result.arrays.to_torch_state_dict())
    _write(context, {"model": final, "copies": copies})


def _write(context, outcome):
    print(outcome)
    if place := str(context.run_config["result"]):
        Path(place).write_text(json.dumps(outcome))
