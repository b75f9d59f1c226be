"""Learning from answers alone: what leaves the server, and what w learns."""

import pytest
import torch
from torch import nn

from fedveil.data.augmentation import Augmentation
from fedveil.errors import FedveilError
from fedveil.federation import Distillation, EnsembleDistillation, Resume
from fedveil.federation.replies import Update
from fedveil.federation.roster import Client
from fedveil.federation.server_app import prepare_job
from fedveil.federation.strategies.fedavg import Distribution, weighted_mean
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


def answers(weights, counts):
    clients = [Client(i, i, n) for i, n in enumerate(counts)]
    updates = [
        Update(client, {"1.weight": weight}, client.examples, 0.0)
        for client, weight in zip(clients, weights, strict=True)
    ]
    return clients, updates


def test_every_message_of_a_run_holds_the_untrained_model_and_nothing_else(tmp_path):
    job, _, grid, delivered = train(tmp_path / "run", **PROTECTED)
    untrained = prepare_job(job.config).model.state_dict()
    assert delivered[-1][0].accuracy > 0.6
    for _, _, messages in rounds_sent(grid, delivered):
        assert len(messages) == 6
        for message in messages:
            assert same(arrays(message), untrained)
            assert set(message.content) == {"arrays", "config"}
            assert set(message.content.config_records["config"]) <= TOLD


def test_the_servers_images_leave_only_where_asked_and_without_labels(tmp_path):
    job, _, grid, delivered = train(
        tmp_path / "run", **PROTECTED | {"rounds": 1}, share_unlabelled=True, partition="shards:2"
    )
    for _, _, messages in rounds_sent(grid, delivered):
        for message in messages:
            sent = message.content.array_records["unlabelled"].to_torch_state_dict()
            assert set(sent) == {"images"}
            assert torch.equal(sent["images"], job.evaluation.calibration.raw)


def test_clients_of_two_classes_teach_all_of_them_with_unlabelled_images_only(tmp_path):
    settings = PROTECTED | {"partition": "shards:2", "epochs": 10, "rounds": 4}
    with_images = train(tmp_path / "with", **settings, share_unlabelled=True)[3]
    without = train(tmp_path / "without", **settings)[3]
    assert with_images[-1][0].accuracy > without[-1][0].accuracy + 0.1


def test_shared_rounds_are_fedavg_and_later_copies_stay_what_they_gave(tmp_path):
    settings = PROTECTED | {"rounds": 4, "shared_rounds": 2}
    _, _, grid, delivered = train(tmp_path / "run", **settings)
    _, _, _, plain = train(tmp_path / "plain", **settings | {"strategy": "fedavg"})
    for number in (0, 1):
        assert same(delivered[number][1], plain[number][1])
    for record, _, messages in rounds_sent(grid, delivered):
        if record.round > 2:
            for message in messages:
                assert same(arrays(message), delivered[1][1])
    assert not same(delivered[3][1], delivered[1][1])


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_w_learns_the_mean_of_the_probabilities_weighted_by_images(share):
    torch.manual_seed(0)
    labels = torch.randint(0, 3, (12,))
    weights = [torch.randn(3, 16) for _ in range(2)]
    server = strategy(
        linear(torch.zeros(3, 16)),
        images=12,
        labels=labels,
        distillation=Distillation(
            steps=3_000, batch_size=12, learning_rate=1.0, momentum=0.9, label_share=share
        ),
    )
    clients, updates = answers(weights, [100, 300])
    start = {"1.weight": torch.zeros(3, 16)}
    sent = server.distribute(1, start, clients)
    w = server.combine(1, sent, updates)
    pixels = server.unlabelled.float() / 255
    first, second = (linear(weight)(pixels).softmax(1) for weight in weights)
    expected = (1 - share) * (0.25 * first + 0.75 * second) + share * torch.eye(3)[labels]
    # Twelve images in sixteen dimensions: a linear model can give any probabilities.
    found = linear(w["1.weight"])(pixels).softmax(1)
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
    assert torch.allclose(memories[0]["answers"], memories[1]["answers"], atol=1e-6)
    assert [float(memory["examples"]) for memory in memories] == [100, 100]


def test_the_first_w_starts_from_the_weighted_mean():
    torch.manual_seed(0)
    weights = [torch.randn(3, 16) for _ in range(2)]
    still = Distillation(steps=1, learning_rate=1e-12)
    server = strategy(linear(torch.zeros(3, 16)), distillation=still)
    clients, updates = answers(weights, [1, 3])
    w = server.combine(1, server.distribute(1, {"1.weight": torch.zeros(3, 16)}, clients), updates)
    mean = weighted_mean([(u.weights, u.examples) for u in updates])
    assert torch.allclose(w["1.weight"], mean["1.weight"], atol=1e-6)


def test_the_first_w_starts_untrained_where_the_mean_answers_worse():
    still = Distillation(steps=1, learning_rate=1e-12)
    server = strategy(linear(torch.zeros(3, 16)), distillation=still)
    # One says the first class, the other the second, and the mean of their weights the third.
    first, second = torch.zeros(2, 3, 16)
    first[0], first[1] = 1.0, -3.0
    second[0], second[1] = -3.0, 1.0
    clients, updates = answers([first, second], [1, 1])
    start = {"1.weight": torch.zeros(3, 16)}
    w = server.combine(1, server.distribute(1, start, clients), updates)
    assert torch.allclose(w["1.weight"], start["1.weight"], atol=1e-6)


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
