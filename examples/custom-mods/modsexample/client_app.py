"""The ClientApp."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedveil.defenses import BlockDCT
from fedveil.defenses.mods import transform_inputs
from fedveil.federation.recording import record_messages
from modsexample.mods import timing_mod
from modsexample.task import Net, load_data
from modsexample.task import test as evaluate_net
from modsexample.task import train as train_net

app = ClientApp(mods=[record_messages("recorded"), timing_mod, transform_inputs(BlockDCT(keep=21))])


def _loaders(context: Context):
    node = context.node_config
    return load_data(int(node["partition-id"]), int(node["num-partitions"]))


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
