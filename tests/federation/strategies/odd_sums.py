"""Client apps of an analytic federation in which client 0 lies, or two clients are away."""

import torch
from flwr.app import ArrayRecord
from flwr.clientapp import ClientApp

from fedveil.federation.client_app import answer_sums, client_images, query
from fedveil.federation.client_app import app as honest
from fedveil.federation.secagg.client import WORDS, secure_aggregation_mod
from fedveil.federation.task import ClientTask


def _away(message, context):
    if context.node_config["partition-id"] in (0, 1) and "statistics" in str(
        message.metadata.message_type
    ):
        raise RuntimeError("away")
    return honest(message, context)


without_two = _away


def _lying(change):
    app = ClientApp(mods=[secure_aggregation_mod])
    app.query()(query)

    @app.train("statistics")
    def statistics(message, context):
        task = ClientTask.from_record(message.content.config_records["config"])
        reply = answer_sums(message, context, client_images(context, task))
        if context.node_config["partition-id"] == 0:
            change(reply)
        return reply

    @app.train()
    def other(message, context):
        raise AssertionError("no client of an analytic run is asked to train")

    return app


def _put(reply, words):
    reply.content["arrays"] = ArrayRecord({WORDS: words})


def _words(reply):
    return reply.content["arrays"][WORDS].numpy().copy()


def _negative(reply):
    words = torch.from_numpy(_words(reply))
    words[0] = -(2**50)
    _put(reply, words)


def _huge(reply):
    _put(reply, torch.from_numpy(_words(reply)) * 1000)


def _too_many(reply):
    reply.content["metrics"]["num-examples"] = reply.content["metrics"]["num-examples"] - 1


def _floats(reply):
    _put(reply, torch.from_numpy(_words(reply)).double())


def _short(reply):
    _put(reply, torch.from_numpy(_words(reply))[:-1])


def _twice_all(reply):
    _put(reply, torch.from_numpy(_words(reply)) * 2)


negative, huge, too_many = _lying(_negative), _lying(_huge), _lying(_too_many)
floats, short, twice_all = _lying(_floats), _lying(_short), _lying(_twice_all)
