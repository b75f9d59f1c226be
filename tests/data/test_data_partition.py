import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.data import Dirichlet, Iid, Shards, parse_partition
from fedveil.data.partition import partition
from fedveil.errors import FedveilError

BALANCED = torch.arange(10).repeat(600)
SCHEMES = [Iid(), Dirichlet(0.3), Shards(2)]
KINDS = {
    "iid": st.just(Iid()),
    "dirichlet": st.floats(1e-3, 1e3).map(Dirichlet),
    "shards": st.integers(1, 3).map(Shards),
}
schemes = st.one_of(*KINDS.values())


def classes_held(parts, labels=BALANCED):
    return [len(labels[part].unique()) for part in parts]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_every_image_has_one_client_and_every_client_an_image(kind, data):
    scheme = data.draw(KINDS[kind])
    shards = getattr(scheme, "per_client", 1)
    images = data.draw(st.integers(shards, 90))
    labels = torch.tensor(data.draw(st.lists(st.integers(0, 5), min_size=images, max_size=images)))
    clients = data.draw(st.integers(1, images // shards))
    parts = partition(labels, clients=clients, scheme=scheme, seed=data.draw(st.integers(0, 9)))
    assert len(parts) == clients
    assert all(part.dtype == torch.int64 and len(part) > 0 for part in parts)
    assert torch.cat(parts).sort().values.tolist() == list(range(images))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_seed_decides_with_or_without_the_cache(scheme, fresh_cache):
    def draw(seed):
        return partition(BALANCED, clients=20, scheme=scheme, seed=seed)

    first = draw(7)
    cached = draw(7)
    assert len(list(fresh_cache.glob("clients-*"))) == 1
    for file in fresh_cache.iterdir():
        file.unlink()
    drawn = draw(7)
    for other in (cached, drawn):
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, draw(8), strict=True))


def test_other_labels_or_clients_are_other_partitions():
    swapped = BALANCED.flip(0)
    one, two, three = (
        partition(labels, clients=clients, scheme=Shards(1), seed=0)
        for labels, clients in ((BALANCED, 10), (swapped, 10), (BALANCED, 5))
    )
    assert set(classes_held(one)) == {1}
    assert set(classes_held(two, swapped)) == {1}
    assert not torch.equal(one[0], two[0])
    assert len(three) == 5


def test_iid_is_flowers_partitioner_on_shuffled_images():
    import datasets
    from flwr_datasets.partitioner import IidPartitioner

    parts = partition(BALANCED, clients=7, scheme=Iid(), seed=3)
    flower = IidPartitioner(num_partitions=7)
    flower.dataset = datasets.Dataset.from_dict({"index": torch.cat(parts).tolist()})
    for client, part in enumerate(parts):
        assert flower.load_partition(client)["index"][:] == part.tolist()
    assert torch.cat(parts).tolist() != sorted(torch.cat(parts).tolist())
    assert min(classes_held(parts)) == 10


def test_shards_bound_the_classes_of_a_client():
    for per_client in (1, 2, 3):
        parts = partition(BALANCED, clients=50, scheme=Shards(per_client), seed=0)
        assert {len(part) for part in parts} == {120}
        assert max(classes_held(parts)) <= per_client
    uneven = torch.cat([BALANCED, torch.zeros(97, dtype=torch.int64)])
    parts = partition(uneven, clients=48, scheme=Shards(2), seed=0)
    assert len(torch.cat(parts).unique()) == len(uneven)
    # A shard across a boundary holds two classes, and leftovers bring none that is new.
    assert max(classes_held(parts, uneven)) <= 4
    assert np.mean(classes_held(parts, uneven)) < 2.5


def test_dirichlet_skew_grows_as_alpha_falls():
    def skew(alpha):
        parts = partition(BALANCED, clients=20, scheme=Dirichlet(alpha), seed=0)
        shares = [torch.bincount(BALANCED[p], minlength=10) / len(p) for p in parts]
        return torch.stack(shares).sub(0.1).abs().sum(1).mean().item()

    skews = [skew(alpha) for alpha in (100.0, 1.0, 0.3, 0.05)]
    assert skews == sorted(skews)
    assert skews[0] < 0.3
    assert skews[-1] > 1.2


def test_clients_left_empty_by_dirichlet_get_one_image():
    parts = partition(BALANCED, clients=3000, scheme=Dirichlet(0.05), seed=0)
    assert min(len(part) for part in parts) == 1
    assert len(torch.cat(parts).unique()) == len(BALANCED)


def test_a_drawn_partition_needs_no_flwr_datasets():
    partition(BALANCED, clients=4, scheme=Shards(2), seed=0)
    code = (
        "import sys, torch; from fedveil.data import Shards\n"
        "from fedveil.data.partition import partition\n"
        "partition(torch.arange(10).repeat(600), clients=4, scheme=Shards(2), seed=0)\n"
        "print(sorted({'datasets', 'flwr_datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- parsing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "scheme"),
    [
        ("iid", Iid()),
        ("dirichlet", Dirichlet(0.5)),
        ("dirichlet:0.3", Dirichlet(0.3)),
        (" Dirichlet:1e-2 ", Dirichlet(0.01)),
        ("shards", Shards(2)),
        ("shards:5", Shards(5)),
    ],
)
def test_parse(text, scheme):
    assert parse_partition(text) == scheme


@given(schemes)
def test_parse_reads_what_str_writes(scheme):
    assert parse_partition(str(scheme)) == scheme


@pytest.mark.parametrize(
    "text",
    ["", "idd", "iid:3", "dirichlet:", "dirichlet:x", "shards:2.5", "shards:two", "shards:"],
)
def test_parse_errors_name_the_text(text):
    with pytest.raises(FedveilError, match="use ") as caught:
        parse_partition(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [("dirichlet:0", "0.0"), ("dirichlet:-1", "-1.0"), ("dirichlet:nan", "nan"),
     ("dirichlet:inf", "inf"), ("shards:0", "0"), ("shards:-2", "-2")],
)  # fmt: skip
def test_numbers_out_of_range_are_named(text, value):
    with pytest.raises(FedveilError, match="must be") as caught:
        parse_partition(text)
    assert f" {value};" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"clients": 11}, ("11 clients", "10 training images", "at most 10")),
        ({"clients": 0}, ("clients is 0", "at least 1")),
        ({"clients": 2, "seed": -4}, ("seed is -4", "at least 0")),
        ({"clients": 4, "scheme": Shards(3)}, ("4 clients", "12 images", "shards:2")),
    ],
)
def test_impossible_partitions_say_why(options, words):
    with pytest.raises(FedveilError) as caught:
        partition(torch.arange(10) % 2, **{"scheme": Iid(), "seed": 0, **options})
    assert all(word in str(caught.value) for word in words)
