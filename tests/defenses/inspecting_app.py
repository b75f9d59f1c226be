"""The package's own client, with the inspection in front of its training."""

from flwr.clientapp import ClientApp

from fedveil.defenses.model_inspection import inspect_model
from fedveil.federation import client_app

app = ClientApp(mods=[inspect_model()])
app.query()(client_app.query)
app.train("gradient")(client_app.gradient)
