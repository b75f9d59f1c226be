"""Learning from answers alone: what leaves the server, and what w learns."""

import copy
import json

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Context, RecordDict
from flwr.app.message.message import make_message
from torch import nn
from torch.nn import functional as F

from fedveil.data.augmentation import Augmentation
from fedveil.errors import FedveilError
from fedveil.federation import Distillation, EnsembleDistillation, Resume, client_app
from fedveil.federation.acceptance import Acceptance
from fedveil.federation.answers import asked_about, encoded
from fedveil.federation.replies import Update
from fedveil.federation.roster import Client
from fedveil.federation.secagg.client import INSISTS, MASKED, WORDS
from fedveil.federation.server_app import prepare_job
from fedveil.federation.strategies.fedavg import Distribution
from fedveil.runs.directory import StrategyState
from tests.federation.test_secrecy import TOLD, arrays, rounds_sent, train

PROTECTED = {
    "strategy": "protected",
    "rounds": 4,
    "epochs": 3,
    "learning_rate": 0.1,
    "batch_size": 20,
    "momentum": 0.9,
    "clip": 1.0,
    "decay": True,
}
ALONE = PROTECTED | {"secure_aggregation": False}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def linear(weight):
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3, bias=False))
    with torch.no_grad():
        net[1].weight.copy_(weight)
    return net


def strategy(model, images=40, **options):
    generator = torch.Generator().manual_seed(1)
    raw = torch.randint(0, 256, (images, 1, 4, 4), generator=generator, dtype=torch.uint8)
    return EnsembleDistillation(model=model, unlabelled=raw, **options)


def answers(weights, counts, images=40):
    """What clients with these linear models answer to ``strategy``'s images."""
    pixels = strategy(linear(torch.zeros(3, 16)), images=images).unlabelled.float() / 255
    clients = [Client(i, i, n) for i, n in enumerate(counts)]
    updates = [
        Update(
            client,
            {WORDS: encoded(linear(weight)(pixels).detach(), client.examples).flatten()},
            client.examples,
            0.0,
            {"num-examples": client.examples},
        )
        for client, weight in zip(clients, weights, strict=True)
    ]
    return clients, updates


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return train(tmp_path_factory.mktemp("alone") / "run", **ALONE)


@pytest.fixture(scope="module")
def secure(tmp_path_factory):
    return train(tmp_path_factory.mktemp("secure") / "run", **PROTECTED)


def ask(message, records, **config):
    """Let the real client app answer a message that was sent, with other records or config."""
    node = {"partition-id": message.metadata.dst_node_id - 2, "num-partitions": 6, **config}
    context = Context(run_id=1, node_id=2, node_config=node, state=RecordDict(), run_config={})
    metadata = copy.copy(message.metadata)
    kept = {name: record for name, record in message.content.items() if name in records}
    metadata.message_type = "train.answers" if "questions" in kept else "train"
    return client_app.app(make_message(metadata, RecordDict(kept)), context)


def test_every_message_of_a_run_holds_the_untrained_model_and_the_servers_images(alone):
    job, _, grid, delivered = alone
    untrained = prepare_job(job.config).model.state_dict()
    assert delivered[-1][0].accuracy > 0.6
    for _, _, messages in rounds_sent(grid, delivered):
        assert len(messages) == 6
        for message in messages:
            assert same(arrays(message), untrained)
            assert set(message.content) == {"arrays", "config", "unlabelled", "questions"}
            assert set(message.content.config_records["config"]) <= TOLD
            sent = message.content.array_records["unlabelled"].to_torch_state_dict()
            assert set(sent) == {"images"}
            assert torch.equal(sent["images"], job.evaluation.calibration.raw)


def test_no_model_comes_back(alone):
    _, directory, grid, _ = alone
    returned = [reply for reply in grid.replies if reply.content.array_records]
    assert len(returned) == 24
    for reply in returned:
        (record,) = reply.content.array_records.values()
        assert [(name, array.dtype) for name, array in record.items()] == [(WORDS, "int64")]
    told = json.loads((directory.path / "summary.json").read_text())["answers"]
    assert (told["questions"], told["answer_bytes"]) == (179, 179 * 10 * 8)
    assert told["question_bytes"] == 179 * 64
    assert "own answers" in told["server_sees"]


def test_w_is_what_the_clients_models_on_the_server_would_have_taught_it(alone):
    """The oracle has each client's own model, as the server had in earlier releases."""
    job, directory, grid, delivered = alone
    pixels = job.evaluation.calibration.pixels
    w = prepare_job(job.config).model.state_dict()
    total, examples = torch.zeros(len(pixels), 10, dtype=torch.float64), 0
    for record, _, messages in rounds_sent(grid, delivered):
        for message in messages:
            reply = ask(message, {"arrays", "config"})
            model = prepare_job(job.config).model.eval()
            model.load_state_dict(reply.content["arrays"].to_torch_state_dict())
            count = int(reply.content["metrics"]["num-examples"])
            with torch.no_grad():
                total += count * model(pixels).softmax(1)
            examples += count
        targets = (total / examples).float()
        model = prepare_job(job.config).model.train()
        model.load_state_dict(w)
        steps = torch.Generator().manual_seed(record.round)  # the run's seed is 0
        optimiser = torch.optim.SGD(model.parameters(), 0.05, 0.9)
        for step in range(120):
            index = torch.randint(len(pixels), (50,), generator=steps)
            optimiser.param_groups[0]["lr"] = 0.05 * (1 - step / 120)
            optimiser.zero_grad()
            F.cross_entropy(model(pixels[index]), targets[index]).backward()
            optimiser.step()
        w = {name: value.detach().clone() for name, value in model.state_dict().items()}
        kept = delivered[record.round - 1][1]
        for name, value in w.items():
            torch.testing.assert_close(kept[name], value, rtol=1e-3, atol=1e-4)
    state = directory.checkpoint().state.memory
    found = state[WORDS].double() / 2**24 / float(state["examples"])
    torch.testing.assert_close(found, total / examples, rtol=1e-5, atol=1e-6)


def test_under_secure_aggregation_w_is_the_same_to_the_bit_and_only_sums_are_seen(alone, secure):
    for (_, one, _), (_, other, _) in zip(alone[3], secure[3], strict=True):
        assert same(one, other)
    masked = [
        record[MASKED].numpy()
        for reply in secure[2].replies
        for record in reply.content.array_records.values()
    ]
    assert len(masked) == 24
    for words in masked:
        # Uniform words: about half of all bits are set, whereas answers are small numbers.
        assert abs(np.unpackbits(words.view(np.uint8)).mean() - 0.5) < 0.01
    summary = json.loads((secure[1].path / "summary.json").read_text())
    assert summary["answers"]["server_sees"] == "sums of a round's clients"


def test_a_node_checks_what_it_is_asked(alone):
    _, _, grid, delivered = alone
    message = next(rounds_sent(grid, delivered))[2][0]
    every = set(message.content)
    digest = message.content.config_records["questions"]["sha256"]
    assert not ask(message, every, questions=digest).has_error()
    with pytest.raises(FedveilError, match="one person's image"):
        ask(message, every, questions="0" * 64)
    with pytest.raises(FedveilError, match="answers 1 to 100"):
        ask(message, every, **{"most-questions": 100})
    with pytest.raises(FedveilError, match="asked for no noise"):
        ask(message, every, **{"most-epsilon": 4.0})
    with pytest.raises(FedveilError, match="update of its own"):
        ask(message, every, **{INSISTS: True})
    images = message.content.array_records["unlabelled"]
    for bent, says in (
        (torch.zeros(179, 1, 8, 8, dtype=torch.uint8), "changed on the way"),
        (torch.zeros(179, 1, 8, 9, dtype=torch.uint8), "asks about images"),
        (torch.zeros(179, 1, 8, 8), "asks about images"),
    ):
        message.content["unlabelled"] = ArrayRecord({"images": bent})
        with pytest.raises(FedveilError, match=says):
            ask(message, every)
    message.content["unlabelled"] = images


def test_who_is_asked_about_an_image_of_its_own_answers_as_if_it_had_not_got_it(alone):
    job, _, grid, delivered = alone
    message = next(rounds_sent(grid, delivered))[2][0]
    context_of = message.metadata.dst_node_id - 2
    from fedveil.data import parse_partition
    from fedveil.data.partition import partition

    labels, scheme = job.dataset.train.labels, parse_partition(job.config.partition)
    mine = partition(labels, clients=6, scheme=scheme, seed=0)[context_of]
    own, others = job.dataset.train.raw[mine[:3]], job.evaluation.calibration.raw[:20]
    asked = torch.cat([own, others])
    near = own.clone()
    near[0, 0, 0, 0] ^= 1
    assert asked_about(job.dataset.train.raw[mine], torch.cat([near, others])).sum() == 3
    assert not asked_about(own, others).any()
    whole = job.dataset.train.raw
    places = torch.tensor([0, 249, 250, len(whole) - 1])
    assert set(places.tolist()) <= set(asked_about(whole, whole[places]).nonzero()[:, 0].tolist())

    from fedveil.federation.answers import QuestionTask, digest_of

    before = {name: message.content[name] for name in ("unlabelled", "questions")}
    task = QuestionTask(sha256=digest_of(asked), classes=10)
    message.content["unlabelled"] = ArrayRecord({"images": asked})
    message.content["questions"] = task.to_record()
    reply = ask(message, set(message.content))
    found = torch.from_numpy(reply.content["answers"][WORDS].numpy()).view(-1, 10)
    assert reply.content["metrics"]["num-examples"] == len(mine)  # nobody learns that it did so
    metadata = copy.copy(message.metadata)
    metadata.message_type = "train"
    kept = {name: message.content[name] for name in ("arrays", "config")}
    node = {"partition-id": context_of, "num-partitions": 6}
    context = Context(run_id=1, node_id=2, node_config=node, state=RecordDict(), run_config={})
    without = client_app.answer(
        make_message(metadata, RecordDict(kept)), context, job.dataset.train[mine[3:]]
    )
    model = prepare_job(job.config).model.eval()
    model.load_state_dict(without.content["arrays"].to_torch_state_dict())
    with torch.no_grad():
        expected = len(mine) * model(asked.float() / 255).double().softmax(1)
    torch.testing.assert_close(found.double() / 2**24, expected, rtol=1e-3, atol=1e-3)
    for name, record in before.items():
        message.content[name] = record


def test_clients_that_diverged_are_left_out_by_name(tmp_path):
    wild = {"rounds": 1, "learning_rate": 100.0, "clip": None}
    _, directory, _, _ = train(tmp_path / "run", **ALONE | wild)
    (record,) = directory.rounds()
    assert 0 < len(record.clients) < 6
    assert len(record.clients) + len(record.refused) == 6
    assert all("diverged" in told and "--learning-rate" in told for told in record.refused)
    _, directory, _, _ = train(tmp_path / "secure", **PROTECTED | wild)
    (record,) = directory.rounds()
    assert 0 < len(record.refused) == 6 - len(record.clients)
    assert all("training diverged; lower --learning-rate" in told for told in record.refused)


def test_clients_of_two_classes_teach_all_of_them_with_unlabelled_images_only(tmp_path):
    settings = ALONE | {"partition": "shards:2", "epochs": 10, "rounds": 4}
    with_images = train(tmp_path / "with", **settings, share_unlabelled=True)[3]
    without = train(tmp_path / "without", **settings)[3]
    assert with_images[-1][0].accuracy > without[-1][0].accuracy + 0.1


def test_shared_rounds_are_fedavg_and_later_copies_stay_what_they_gave(tmp_path):
    settings = ALONE | {"rounds": 4, "shared_rounds": 2}
    _, _, grid, delivered = train(tmp_path / "run", **settings)
    _, _, _, plain = train(tmp_path / "plain", **settings | {"strategy": "fedavg"})
    for number in (0, 1):
        assert same(delivered[number][1], plain[number][1])
    for record, _, messages in rounds_sent(grid, delivered):
        if record.round > 2:
            for message in messages:
                assert same(arrays(message), delivered[1][1])
    assert not same(delivered[3][1], delivered[1][1])


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_w_learns_the_mean_of_the_probabilities_weighted_by_images(share, temperature):
    torch.manual_seed(0)
    labels = torch.randint(0, 3, (12,))
    weights = [torch.randn(3, 16) for _ in range(2)]
    server = strategy(
        linear(torch.zeros(3, 16)),
        images=12,
        labels=labels,
        distillation=Distillation(
            steps=3_000,
            batch_size=12,
            learning_rate=1.0 / temperature,
            momentum=0.9,
            label_share=share,
            temperature=temperature,
        ),
    )
    pixels = server.unlabelled.float() / 255
    first, second = ((linear(weight)(pixels) / temperature).softmax(1) for weight in weights)
    clients, updates = answers([weight / temperature for weight in weights], [100, 300], images=12)
    start = {"1.weight": torch.zeros(3, 16)}
    sent = server.distribute(1, start, clients)
    w = server.combine(1, sent, updates)
    expected = (1 - share) * (0.25 * first + 0.75 * second) + share * torch.eye(3)[labels]
    # Twelve images in sixteen dimensions: a linear model can give any probabilities.
    found = (linear(w["1.weight"])(pixels) / temperature).softmax(1)
    assert torch.allclose(found, expected, atol=0.02)


def test_labels_that_count_must_be_there():
    with pytest.raises(FedveilError, match="labels= is not given"):
        strategy(linear(torch.zeros(3, 16)), distillation=Distillation(label_share=0.1))


def test_answers_of_all_rounds_count_alike():
    torch.manual_seed(0)
    weights = [torch.randn(3, 16) for _ in range(3)]
    counts = [10, 20, 70]
    together, apart = (strategy(linear(torch.zeros(3, 16))) for _ in range(2))
    start = {"1.weight": torch.zeros(3, 16)}
    clients, updates = answers(weights, counts)
    together.combine(1, together.distribute(1, start, clients), updates)
    for number, update in enumerate(updates, 1):
        apart.combine(number, apart.distribute(number, start, [update.client]), [update])
    memories = [s.state.memory for s in (together, apart)]
    assert torch.equal(memories[0][WORDS], memories[1][WORDS])
    assert [float(memory["examples"]) for memory in memories] == [100, 100]


def test_a_claim_over_the_bound_counts_as_the_bound():
    torch.manual_seed(0)
    weights = [torch.randn(3, 16) for _ in range(2)]
    clients, updates = answers(weights, [10, 1000])
    bounded = [updates[0], Update(**vars(updates[1]) | {"examples": 30})]
    _, fair = answers(weights, [10, 30])
    found = []
    for some in (bounded, fair):
        server = strategy(linear(torch.zeros(3, 16)))
        server.acceptance = Acceptance(weight_limit=3.0)
        server.combine(1, server.distribute(1, {"1.weight": torch.zeros(3, 16)}, clients), some)
        found.append(server.state.memory[WORDS])
    assert (found[0] - found[1]).abs().max() <= 1


def test_w_starts_from_what_was_sent():
    torch.manual_seed(0)
    still = Distillation(steps=1, learning_rate=1e-12)
    start = {"1.weight": torch.randn(3, 16)}
    server = strategy(linear(torch.zeros(3, 16)), distillation=still)
    clients, updates = answers([torch.randn(3, 16) for _ in range(2)], [1, 3])
    w = server.combine(1, server.distribute(1, start, clients), updates)
    assert torch.allclose(w["1.weight"], start["1.weight"], atol=1e-6)


def test_a_run_of_an_earlier_release_goes_on_with_the_mean_it_kept():
    torch.manual_seed(0)
    weights = [torch.randn(3, 16) for _ in range(2)]
    start = {"1.weight": torch.zeros(3, 16)}
    clients, updates = answers(weights, [100, 300])
    server = strategy(linear(torch.zeros(3, 16)))
    server.combine(1, server.distribute(1, start, clients), updates)
    mean = (server.state.memory[WORDS].double() / 2**24 / 400).float()
    kept = {"answers": mean, "examples": torch.tensor(400.0, dtype=torch.float64)}
    old = strategy(
        linear(torch.zeros(3, 16)), resume=Resume(1, StrategyState(base=start, memory=kept))
    )
    ends = [one.combine(2, one.distribute(2, start, clients), updates) for one in (server, old)]
    assert torch.allclose(ends[0]["1.weight"], ends[1]["1.weight"], atol=1e-5)


def test_a_strategy_that_resumes_goes_on_as_if_it_had_never_stopped():
    torch.manual_seed(0)
    weights = [torch.randn(3, 16) for _ in range(2)]
    clients, updates = answers(weights, [5, 5])
    usual = {"distillation": Distillation(augmentation=Augmentation(crop=1))}
    start = {"1.weight": torch.zeros(3, 16)}
    whole = strategy(linear(torch.zeros(3, 16)), **usual)
    w = whole.combine(1, whole.distribute(1, start, clients), updates)
    state = whole.state
    assert isinstance(state, StrategyState)
    resumed = strategy(linear(torch.ones(3, 16)), **usual, resume=Resume(1, state))
    ends = []
    for server in (whole, resumed):
        sent: Distribution = server.distribute(2, w, clients)
        assert same(sent.copies[0], start)
        ends.append(server.combine(2, sent, updates))
    assert same(*ends)
