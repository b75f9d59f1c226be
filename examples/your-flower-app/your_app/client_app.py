"""The ClientApp."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedveil.defenses import BlockDCT
from fedveil.defenses.mods import transform_inputs
from your_app.task import Net, load_train, train

app = ClientApp(mods=[transform_inputs(BlockDCT(keep=21))])  # was: ClientApp()


@app.train()
def train_round(message: Message, context: Context) -> Message:
    """Train the model that came for some epochs and return it."""
    net = Net()
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    loader = load_train(
        int(context.node_config["partition-id"]), int(context.node_config["num-partitions"])
    )
    config = context.run_config
    loss = train(net, loader, int(config["local-epochs"]), float(config["learning-rate"]))
    metrics = MetricRecord({"num-examples": len(loader.dataset), "loss": loss})
    arrays = ArrayRecord(net.state_dict())
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)
