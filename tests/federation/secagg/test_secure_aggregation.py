"""Secure aggregation over real worker processes: the sum is right, and is all the server has."""

import re
from itertools import product

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedveil.copies.noise import NoiseKey
from fedveil.errors import FedveilError
from fedveil.federation import NoisyFedAvg, Sampling, SeededFedAvg
from fedveil.federation.engines.local import LocalGrid
from fedveil.federation.roster import Client
from fedveil.federation.secagg.client import FixedPoint, mask, secure_aggregation_mod
from fedveil.federation.secagg.server import SecureAggregation, neighbourhoods
from fedveil.federation.server_app import prepare_job, run_rounds
from fedveil.runs.config import TrainConfig
from fedveil.runs.directory import RunDirectory
from tests.federation import apps
from tests.federation.strategies.test_strategies import delta, pair, run, trains, weights_of
from tests.federation.test_train import FAST, RAY, fedveil, same_bits

KEY = NoiseKey(bytes(range(32)))
STRATEGIES = ["fedavg", "noise-pair", "noise-delta"]
SETTINGS = {
    "dataset": "digits",
    "clients": 6,
    "fraction": 1.0,
    "rounds": 3,
    "epochs": 2,
    "learning_rate": 0.1,
    "clip": 5.0,
    "sigma_step": 1.0,
    "sigma_limit": 1e6,
}
MAKES = [
    pytest.param(lambda model, cap: SeededFedAvg(), id="fedavg"),
    pytest.param(delta, id="noise-delta"),
    pytest.param(lambda model, cap: pair(model, cap, server_clients=2), id="noise-pair"),
]


def directory_of(path, **settings):
    return RunDirectory.create(path, TrainConfig.check(SETTINGS | settings), noise_key=KEY)


def train(directory, app="fedveil.federation.client_app:app"):
    """Train on real workers; return the checkpoint after each round, and every message."""
    kept = []
    with LocalGrid(app, nodes=6, workers=2) as inner:
        grid = apps.RecordingGrid(inner)
        job = prepare_job(directory.config)
        run_rounds(grid, job, directory, on_round=lambda _: kept.append(directory.checkpoint()))
    return kept, grid


@pytest.fixture(scope="module")
def summed(tmp_path_factory):
    """Runs under secure aggregation, by their strategy: as ``train`` tells of them."""
    runs = {}

    def run(strategy):
        if strategy not in runs:
            path = tmp_path_factory.mktemp(strategy) / "run"
            hidden = directory_of(path, strategy=strategy, secure_aggregation=True)
            runs[strategy] = (hidden, *train(hidden))
        return runs[strategy]

    return run


def flat(arrays):
    """A model in the order in which secure aggregation sums it, float64 [D]."""
    return torch.cat([arrays[name].double().flatten() for name in sorted(arrays)]).numpy()


def is_copy(message, number):
    return message.content.config_records.get("config", {}).get("server-round") == number


def answers(grid, number):
    return [
        reply
        for reply in grid.replies
        if any(r.get("server-round") == number for r in reply.content.metric_records.values())
    ]


def true_changes(grid, number):
    """What each node changed, float64 [D], and on how many images: from the same copies again.

    Training is seeded, so a client that is sent its copy without secure aggregation shows what it
    did under it.
    """
    sent = [m for m in grid.sent if is_copy(m, number)]
    records = [RecordDict({k: m.content[k] for k in ("arrays", "config")}) for m in sent]
    nodes = [m.metadata.dst_node_id for m in sent]
    with LocalGrid("fedveil.federation.client_app:app", nodes=6, workers=2) as again:
        messages = [Message(r, n, "train") for r, n in zip(records, nodes, strict=True)]
        replies = again.send_and_receive(messages)
    return {
        node: (
            flat(weights_of(reply)) - flat(weights_of(message)),
            reply.content.metric_records["metrics"]["num-examples"],
        )
        for node, message, reply in zip(nodes, sent, replies, strict=True)
    }


def masked_answers(grid, number):
    """What the server has of each node, uint32 [D]."""
    return {
        reply.metadata.src_node_id: weights_of(reply)["masked"].numpy().view(np.uint32)[:-1]
        for reply in answers(grid, number)
    }


def correlation(words, change):
    """Pearson's, between integers modulo 2^32, or reals, and a change."""
    signed = words.view(np.int32) if words.dtype == np.uint32 else words
    return np.corrcoef(signed.astype(np.float64), change)[0, 1]


def secure(strategy, **options):
    strategy.secure = SecureAggregation(**options)
    return strategy


def assert_close(a, b, clients=6, limit=16.0):
    """Two models differ by the bound of the fixed point and by float32's rounding of either."""
    bound = FixedPoint(limit, clients).error(1.0)
    for name, value in a.items():
        gap = (value.double() - b[name].double()).abs().max()
        assert gap <= bound + 2**-22 * value.abs().max(), (name, float(gap))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_w_is_what_it_is_without_within_the_bound(tmp_path, strategy):
    plain = directory_of(tmp_path / "plain", strategy=strategy)
    (*_, before, expected), _ = train(plain)
    # The same last round again, from the same checkpoint: over rounds, training multiplies a gap.
    hidden = directory_of(tmp_path / "secure", strategy=strategy, secure_aggregation=True)
    hidden.write_checkpoint(before)
    hidden.write_rounds(plain.rounds()[:-1])
    (after,), _ = train(hidden)
    assert_close(after.weights, expected.weights)
    if strategy != "fedavg":
        assert plain.rounds()[-1].sigma > 0, "no noise was in the copies, so it proves nothing"
        assert_close(after.state.base, expected.state.base)
    assert after.state.sigma == expected.state.sigma
    assert hidden.rounds()[-1].loss == pytest.approx(plain.rounds()[-1].loss, rel=1e-5)
    dtypes = {value.dtype for value in after.weights.values()}
    assert dtypes == {value.dtype for value in expected.weights.values()}


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("silent", ["[]", "[2]", "[0, 5]"])
def test_noise_leaves_the_sum_whatever_the_counts_and_whoever_drops_out(model, cap, make, silent):
    config = {"silent": silent}
    (_, expected), _ = run(make(model, cap), model, "add", config=config)
    strategy = secure(make(model, cap))
    (_, after), _ = run(strategy, model, "secure_add", config=config)
    assert_close(after, expected)
    there = [client for client in range(6) if str(client) not in silent]
    assert strategy.averaged == tuple(there)
    assert len(strategy.refused) == 6 - len(there)
    assert all("is silent" in reason for reason in strategy.refused)
    assert (strategy.sent.sigma > 0) == isinstance(strategy, NoisyFedAvg)


@pytest.mark.parametrize("make", MAKES[:2])
def test_clients_that_change_nothing_leave_w_bit_for_bit(model, cap, make):
    (_, after), grid = run(secure(make(model, cap)), model, "secure_echo")
    for name, before in model.state_dict().items():
        assert torch.equal(after[name], before)
    copies = [m for m in trains(grid) if "arrays" in m.content]
    assert len(copies) == 6
    for message in copies:
        clean = torch.equal(weights_of(message)["1.weight"], model.state_dict()["1.weight"])
        assert clean == (make is not delta)


@pytest.mark.parametrize(
    ("app", "averaged"),
    [
        ("leaves_setup", (0, 2, 3, 4, 5)),
        ("leaves_share_keys", (0, 2, 3, 4, 5)),
        ("leaves_unmask", (0, 1, 2, 3, 4, 5)),
    ],
)
@pytest.mark.parametrize("shares", [None, 5])
def test_a_client_may_leave_before_any_stage(model, app, averaged, shares):
    strategy = secure(SeededFedAvg(), shares=shares)
    (_, after), _ = run(strategy, model, app)
    assert strategy.averaged == averaged
    total = sum(map(apps.examples, averaged))
    step = sum(apps.examples(client) * 0.01 * (client + 1) for client in averaged) / total
    assert_close(after, {name: value + step for name, value in model.state_dict().items()})


@pytest.mark.parametrize(
    ("app", "reason"),
    [
        ("secure_sends_nan", "NaN or infinity"),
        ("secure_sends_infinity", "NaN or infinity"),
        ("secure_sends_huge", "more than 16, .*--largest-change"),
        ("secure_sends_name", "other tensors"),
    ],
)
def test_a_change_that_cannot_be_summed_never_leaves_its_client(model, app, reason):
    strategy = secure(SeededFedAvg())
    (_, after), _ = run(strategy, model, app, clients=4)
    assert strategy.averaged == (0, 2, 3)
    assert re.search(reason, strategy.refused[0])
    for name, before in model.state_dict().items():
        assert torch.equal(after[name], before)


@pytest.mark.parametrize("strategy", ["noise-pair", "noise-delta"])
def test_the_server_has_the_sum_and_of_no_fewer_clients_anything(summed, strategy):
    """Every message is read: what a client changed shows in the sum of all, and in nothing else."""
    hidden, kept, grid = summed(strategy)
    noisy = [record.round for record in hidden.rounds() if record.sigma > 0]
    assert noisy, "no noise was in the copies, so it proves nothing"
    assert max(max(record.copies) for record in hidden.rounds()) < 0.6
    for number in noisy:
        true, masked = true_changes(grid, number), masked_answers(grid, number)
        assert sorted(true) == sorted(masked) == list(range(2, 8))
        weights = {node: examples for node, (_, examples) in true.items()}
        images = sum(weights.values())
        code = FixedPoint(16.0, 6)
        limit = 6 / np.sqrt(len(true[2][0]))
        for answer in masked.values():
            assert stats.kstest(answer / 2**32, "uniform").pvalue > 1e-9
        absent = [sum(v for n, v in masked.items() if n != gone) for gone in masked]
        for seen, (change, _) in product([*masked.values(), *absent], true.values()):
            assert abs(correlation(seen, change)) < limit
        for node, (change, examples) in true.items():  # the same measure, without a mask
            bare = code.encode(change * examples / images)
            assert correlation(bare, change) > 0.99, node
        total = sum(change * (examples / images) for change, examples in true.values())
        before, after = (checkpoint.state.base for checkpoint in kept[number - 2 : number])
        if strategy == "noise-delta":
            learnt = flat(kept[number - 1].weights) - flat(before)
        else:  # whose next base is the mean of what came back, noise and all
            copies = [m for m in grid.sent if is_copy(m, number)]
            parts = {m.metadata.dst_node_id: flat(weights_of(m)) for m in copies}
            learnt = flat(after) - sum(parts[n] * (weights[n] / images) for n in parts)
        assert correlation(learnt, total) > 0.999
        assert np.abs(learnt - total).max() <= code.error(1.0) + 2**-22 * np.abs(flat(after)).max()
    for reply in grid.replies:
        for record in reply.content.array_records.values():
            assert [(n, a.dtype) for n, a in record.items()] == [("masked", "int32")]
        for record in reply.content.metric_records.values():
            assert set(record) <= {"partition-id", "num-examples", "server-round"}


def test_too_few_clients_end_the_round_in_a_sentence_and_the_run_goes_on(tmp_path, summed):
    settings = {"strategy": "noise-delta", "secure_aggregation": True}
    stopped = directory_of(tmp_path / "stopped", **settings)
    with pytest.raises(FedveilError, match=r"round 3: only 3 of 6 .* takes 4 .*disk .*--resume"):
        train(stopped, "tests.federation.apps:own_app_until_round_3")
    assert stopped.checkpoint().round == len(stopped.rounds()) == 2
    left = {path.name for path in stopped.path.iterdir()}
    assert not left & {"model.safetensors", "summary.json"}
    assert not [name for name in left if name.endswith(".part")]
    train(stopped)
    whole, _, _ = summed("noise-delta")
    # The masks are drawn anew each time, and cancel to the bit.
    assert same_bits(stopped.path, whole.path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"average": "median"}, ["average median", "sum only"]),
        ({"norm_limit": 5}, ["norm-limit 5", "sum only"]),
        ({"key_shares": 6}, ["key-shares 6", "odd"]),
        ({"reconstruction_threshold": 0.5}, ["reconstruction-threshold = 0.5", "above 0.5"]),
    ],
)
def test_what_has_to_see_single_changes_is_refused_in_one_sentence(settings, words):
    with pytest.raises(FedveilError) as refused:
        TrainConfig.check({"strategy": "fedavg", "secure_aggregation": True} | settings)
    assert "\n" not in str(refused.value)
    assert all(word in str(refused.value) for word in words)


def test_rounds_of_two_clients_are_refused_and_nothing_is_written(tmp_path):
    options = ["--strategy", "fedavg", "--secure-aggregation", *FAST, "--fraction", "0.4"]
    done = fedveil("--out", tmp_path / "run", *options, check=False)
    assert done.returncode == 2
    assert "2 clients a round are too few" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow  # sums of --strategy analytic go through Ray in every run of the suite
def test_local_and_ray_give_the_same_bits(tmp_path):
    options = [*FAST, "--strategy", "noise-delta", "--rounds", 1, "--secure-aggregation"]
    fedveil("--out", tmp_path / "local", *options)
    key = tmp_path / "local/noise.key"
    fedveil("--out", tmp_path / "ray", *options, "--noise-key", key, *RAY)
    assert same_bits(tmp_path / "local", tmp_path / "ray")


@pytest.mark.slow
def test_a_deployed_run_gives_the_same_bits_too(tmp_path):
    options = ["--dataset", "digits", "--clients", "3", "--fraction", "1", "--rounds", "1"]
    options += ["--strategy", "noise-delta", "--secure-aggregation"]
    fedveil("--out", tmp_path / "local", *options)
    key = tmp_path / "local/noise.key"
    fedveil("--out", tmp_path / "run", *options, "--engine", "deployed", "--noise-key", key)
    assert same_bits(tmp_path / "local", tmp_path / "run")


def stage(grid, node, name, **values):
    """Ask one node for a stage, as a server might that does not keep to the protocol."""
    record = ConfigRecord({"stage": name, **values})
    content = RecordDict({"secaggplus_configs": record})
    (reply,) = grid.send_and_receive([Message(content, node, "train")])
    return reply


@pytest.mark.parametrize("twice", ["present and gone", "present"])
def test_a_client_never_helps_to_undo_both_masks_of_another(twice):
    with LocalGrid("tests.federation.apps:secure_add", nodes=3, workers=1) as grid:
        nodes = grid.get_node_ids()
        SecureAggregation().agree(grid, [Client(i, n, 10) for i, n in enumerate(nodes)], 1)
        lists = {"present and gone": (nodes, nodes[:1]), "present": (nodes[:1] * 3, nodes[1:])}
        present, gone = lists[twice]
        reply = stage(grid, nodes[0], "unmask", active_nids=present, dead_nids=gone)
    assert f"names nodes [{nodes[0]}] twice" in reply.error.reason


@pytest.mark.parametrize(
    ("shares", "threshold", "words"), [(6, 3, "more than half"), (2, 2, "at least 3")]
)
def test_a_client_refuses_terms_that_protect_nobody(shares, threshold, words):
    terms = {"sample_num": 6, "share_num": shares, "threshold": threshold, "max_weight": 60.0}
    terms |= {"clipping_range": 16.0, "target_range": 2**32, "mod_range": 2**32}
    terms |= {"most_examples": 20, "round": 1}
    others = {"max_weight": [121.0, 0.0], "most_examples": [0], "clipping_range": [0.0, 1e300]}
    with LocalGrid("tests.federation.apps:secure_add", nodes=1, workers=1) as grid:
        (node,) = grid.get_node_ids()
        reply = stage(grid, node, "setup", **terms)
        good = terms | {"share_num": 6, "threshold": 4}
        assert not stage(grid, node, "setup", **good).has_error()
        odd = [
            stage(grid, node, "setup", **good | {key: value})
            for key, values in others.items()
            for value in values
        ]
    assert words in reply.error.reason
    for refused in odd:
        assert "rounded to nothing" in refused.error.reason or "summed" in refused.error.reason


class TwoFaced(apps.RecordingGrid):
    """A server that tells every client but one another story."""

    def __init__(self, inner, victim, told):
        super().__init__(inner)
        self.victim, self.told = victim, told

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        for message in messages:
            record = message.content.config_records.get("secaggplus_configs", {})
            if message.metadata.dst_node_id != self.inner.get_node_ids()[self.victim]:
                self.told(message, record)
        return super().send_and_receive(messages, timeout=timeout)


def _other_weight(_, record):
    if record.get("stage") == "setup":  # so large that the others round to nothing
        record["max_weight"], record["most_examples"] = 1e18, 10**18


def _other_roster(message, record):
    if record.get("stage") == "share_keys":
        members = message.content["roster"]["members"]
        message.content["roster"] = ConfigRecord({"members": [*members, bytes(32)]})


def _other_round(_, record):
    if record.get("stage") == "setup":
        record["round"] = 7


@pytest.mark.parametrize("told", [None, _other_weight, _other_roster, _other_round])
def test_a_server_that_tells_one_client_another_story_reads_noise(model, told):
    """Before, 10¹⁸ images for all but one gave that one's update as the sum, cosine 1.0000000."""
    strategy = SeededFedAvg(sampling=Sampling(min_clients=4))
    strategy.secure = SecureAggregation()
    history = []
    with LocalGrid("tests.federation.apps:secure_add", nodes=4, workers=2) as inner:
        grid = TwoFaced(inner, 2, told) if told else inner
        strategy.start(
            grid,
            ArrayRecord(model.state_dict()),
            num_rounds=1,
            timeout=60,
            evaluate_fn=lambda _, arrays: history.append(arrays.to_torch_state_dict()),
        )
    before, after = history
    change = torch.cat([(after[k].double() - before[k].double()).flatten() for k in before])
    victims = torch.full_like(change, 0.03)
    cosine = float(torch.nn.functional.cosine_similarity(change, victims, dim=0))
    assert cosine > 0.999 if told is None else abs(cosine) < 0.5


@pytest.mark.parametrize("kind", ["train", "train.gradient"])
def test_a_node_that_insists_trains_under_secure_aggregation_only(kind):
    config = {"partition-id": 0, "num-partitions": 3, "require-secure-aggregation": True}
    context = Context(run_id=1, node_id=2, node_config=config, state=RecordDict(), run_config={})
    message = Message(RecordDict(), 2, kind)
    with pytest.raises(FedveilError, match="--secure-aggregation"):
        secure_aggregation_mod(message, context, lambda *_: message)
    query = Message(RecordDict(), 2, "query")
    assert secure_aggregation_mod(query, context, lambda *_: message) is message


@given(
    values=st.lists(st.floats(-16, 16), min_size=2, max_size=40),
    counts=st.lists(st.integers(1, 10**6), min_size=2, max_size=40),
    left=st.integers(1, 40),
)
def test_a_weighted_mean_is_off_by_the_bound_at_most(values, counts, left):
    pairs = list(zip(values, counts, strict=False))
    code, images = FixedPoint(16.0, len(pairs)), sum(n for _, n in pairs)
    there = pairs[:left]
    total = np.zeros(1, np.uint32)
    for value, count in there:
        total += code.encode(np.array([value * (count / images)]))
    weight = sum(n for _, n in there) / images
    exact = sum(value * n for value, n in there) / sum(n for _, n in there)
    assert abs(code.decode(total)[0] / weight - exact) <= code.error(weight) + 1e-13


def test_masks_use_all_of_their_seed():
    """Why they are not Flower's, which needs but 32 bits: flwrlabs/flower#7522."""
    seed = bytes(range(32))
    other = seed[16:] + seed[:16]  # the same words in another order
    flowers = [pseudo_rand_gen(s, 2**32, [(100,)])[0] for s in (seed, other)]
    assert np.array_equal(*flowers)
    ours = [mask(s, 100) for s in (seed, other)]
    assert not np.isin(*ours).any()
    assert np.array_equal(ours[0], mask(seed, 100))


@given(nodes=st.integers(3, 60), half=st.integers(1, 40))
def test_neighbourhoods_are_mutual_and_of_one_size(nodes, half):
    shares = min(2 * half + 1, nodes)
    near = neighbourhoods(range(nodes), shares)
    for node, others in near.items():
        assert node in others
        assert len(others) == shares
        assert all(node in near[other] for other in others)
