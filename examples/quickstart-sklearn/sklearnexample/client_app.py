"""The ClientApp."""

from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from sklearnexample.task import load_data
from sklearnexample.task import train as train_model

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the model that came on this client's images."""
    node = context.node_config
    rows, labels = load_data(int(node["partition-id"]), int(node["num-partitions"]))
    epochs = int(context.run_config["local-epochs"])
    arrays = train_model(message.content["arrays"], rows, labels, epochs)
    metrics = MetricRecord({"num-examples": len(labels)})
    return Message(content=RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)
