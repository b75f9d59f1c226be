"""The ClientApp."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedveil.federation.secagg.client import secure_aggregation_mod
from secaggexample.task import Net, load_data
from secaggexample.task import test as evaluate_net
from secaggexample.task import train as train_net

app = ClientApp(mods=[secure_aggregation_mod])  # was: secaggplus_mod


def _loaders(context: Context):
    node = context.node_config
    return load_data(int(node["partition-id"]), int(node["num-partitions"]))


@app.query()
def query(message: Message, context: Context) -> Message:
    """Say who this client is and how many images it has, which the masked sum is weighed by."""
    loader, _ = _loaders(context)
    metrics = MetricRecord(
        {
            "partition-id": int(context.node_config["partition-id"]),
            "num-examples": len(loader.dataset),
        }
    )
    return Message(content=RecordDict({"metrics": metrics}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the model that came on this client's images."""
    net = Net()
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    loader, _ = _loaders(context)
    lr = float(message.content["config"]["lr"])
    loss = train_net(net, loader, int(context.run_config["local-epochs"]), lr)
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(loader.dataset)})
    content = RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate a model on this client's images; fedveil's strategies never ask for it."""
    net = Net()
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    _, loader = _loaders(context)
    loss, accuracy = evaluate_net(net, loader)
    metrics = MetricRecord(
        {"eval_loss": loss, "eval_acc": accuracy, "num-examples": len(loader.dataset)}
    )
    return Message(content=RecordDict({"metrics": metrics}), reply_to=message)
