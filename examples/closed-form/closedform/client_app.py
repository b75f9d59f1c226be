"""The ClientApp."""

from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from closedform.task import load_data
from fedveil.data import Images
from fedveil.federation import summing
from fedveil.federation.secagg.client import secure_aggregation_mod

app = ClientApp(mods=[secure_aggregation_mod])


def _own(context: Context) -> Images:
    node = context.node_config
    return Images(*load_data(int(node["partition-id"]), int(node["num-partitions"])))


@app.query()
def query(message: Message, context: Context) -> Message:
    """Say who this client is and how many images it has."""
    who = int(context.node_config["partition-id"])
    metrics = MetricRecord({"partition-id": who, "num-examples": len(_own(context))})
    return Message(content=RecordDict({"metrics": metrics}), reply_to=message)


app.train("statistics")(summing(_own))  # was: @app.train(), which trained the model
app.train()(summing(_own))  # secure aggregation's stages are train messages, too
