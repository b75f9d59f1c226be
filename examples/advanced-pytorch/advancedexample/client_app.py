"""The ClientApp."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from advancedexample.task import Net, load_data
from advancedexample.task import test as evaluate_net
from advancedexample.task import train as train_net
from fedveil.federation import answering

app = ClientApp()


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


app.train("answers")(answering(train, Net))  # what leaves this client is answers, not the model


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
