"""An app without fedveil inside it is audited from its messages, with the same figures."""

import json
import stat
from dataclasses import replace

import pytest
import torch
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import FedAvg
from torch.nn import functional as F
from typer.testing import CliRunner

from fedveil.audit.leakage import audit_leakage
from fedveil.audit.recorded import (
    audit_recorded,
    check_settings,
    observed,
    of_one_client,
    read_truth,
    truth_of,
)
from fedveil.audit.settings import LeakageSettings
from fedveil.audit.watch import ground_truth
from fedveil.cli.main import app as command
from fedveil.data import load_dataset
from fedveil.defenses import parse_defense
from fedveil.errors import FedveilError
from fedveil.federation.engines.local import LocalGrid
from fedveil.federation.recording import RecordingGrid
from fedveil.federation.roster import Sampling
from fedveil.federation.strategies.fedsgd import WatchingFedSGD
from fedveil.models import build_model
from fedveil.report import write_report
from fedveil.runs.recordings import RECORD_KEY_FILE, Exchange, read_exchanges
from fedveil.sealing import OperatorKey

NONE = parse_defense("none")
INSIDE = LeakageSettings(
    clients=2,
    images=8,
    update="step",
    attacks=("lm",),
    workers=1,
)


@pytest.fixture(scope="module")
def data():
    return load_dataset("digits")


@pytest.fixture
def key(tmp_path, monkeypatch):
    file = tmp_path / "record.key"
    made = OperatorKey.make(file)
    monkeypatch.setenv(RECORD_KEY_FILE, str(file))
    return made


def record(strategy, model, places, tmp_path, monkeypatch, *, rate=1.0, server=False):
    """Run the plain app for a round a list of places; return the folder of its recording."""
    folder = tmp_path / "recorded"
    monkeypatch.setenv("PLAIN", json.dumps({"places": places, "rate": rate}))
    monkeypatch.setenv("PLAIN_RECORDED", str(tmp_path / "unused" if server else folder))
    with LocalGrid("tests.audit.plain_app:app", nodes=2, workers=1) as inner:
        grid = RecordingGrid(inner, folder) if server else inner
        strategy.start(grid, ArrayRecord(model.state_dict()), num_rounds=len(places), timeout=60)
    return folder


def flowers():
    return FedAvg(fraction_evaluate=0.0)


def test_the_figures_are_those_inside_fedveil(data, key, tmp_path, monkeypatch):
    model = build_model("lenet", data.shape, 10, seed=0).train()
    expected = audit_leakage(data, model, INSIDE)
    places = ground_truth(data, INSIDE).view(8, 1).tolist()
    names = [name for name, _ in model.named_parameters()]
    strategy = WatchingFedSGD(
        victims=(0,), parameters=names, action="step", sampling=Sampling(min_clients=2)
    )
    folder = record(strategy, model, places, tmp_path, monkeypatch)
    exchanges = of_one_client(read_exchanges(folder, key), 0)
    truth = truth_of(exchanges, data, None)
    assert truth.used.tolist() == places
    report = audit_recorded(exchanges, truth, model, INSIDE)
    for mine, theirs in zip(report.rows, expected.rows, strict=True):
        for name in theirs.scores.keys() - {"seconds_per_image"}:
            # Beyond 100 dB it is the rounding of float32 that is compared.
            one, other = (row.scores[name].clamp(max=100) for row in (mine, theirs))
            assert torch.allclose(one, other, atol=1e-3), name
    told, asked = report.as_json()["membership"], expected.as_json()["membership"]
    assert [one["picked_out"] for one in told] == pytest.approx(
        [one["picked_out"] for one in asked]
    )
    assert report.rows[0].scores["exact"].mean() == 1


@pytest.mark.parametrize("server", [False, True])
def test_eight_images_of_flowers_own_fedavg_come_back_exactly(
    data, key, tmp_path, monkeypatch, server
):
    model = build_model("lenet", data.shape, 10, seed=0)
    places = [[7 * number] for number in range(8)]
    folder = record(flowers(), model, places, tmp_path, monkeypatch, rate=0.1, server=server)
    files = sorted(folder.iterdir())
    assert len(files) == (8 if server else 16)
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    given = ["--model", "lenet", "--dataset", "digits", "--learning-rate", "0.1"]
    if server:  # a server sees no images: the auditor names them
        own = torch.tensor(places).flatten()
        torch.save(
            {"images": data.train.raw[own], "labels": data.train.labels[own]}, tmp_path / "own.pt"
        )
        given += ["--truth", str(tmp_path / "own.pt")]
    out = tmp_path / "out"
    done = CliRunner().invoke(
        command, ["audit", "leakage", "--recorded", str(folder), *given, "--out", str(out)]
    )
    assert done.exit_code == 0, done.output
    told = json.loads((out / "leakage.json").read_text())
    (row,) = told["rows"]
    assert (row["images"], row["exact"], row["identified"]) == (8, 1.0, 1.0)
    assert told["settings"]["recorded"] == str(folder)


def test_a_pair_of_state_dicts(data, tmp_path):
    model = build_model("lenet", data.shape, 10, seed=0).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images, labels = data.test.pixels[3:4], data.test.labels[3:4]
    torch.nn.functional.cross_entropy(model(images), labels).backward()
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    torch.save(before, tmp_path / "before.pt")
    torch.save(model.state_dict(), tmp_path / "after.pt")
    torch.save({"images": images, "labels": labels}, tmp_path / "truth.pt")
    given = ["audit", "leakage", "--model", "lenet", "--dataset", "digits"]
    for name in ("before", "after", "truth"):
        given += [f"--{name}", str(tmp_path / f"{name}.pt")]
    wrong = CliRunner().invoke(command, [*given, "--out", str(tmp_path / "wrong")])
    assert isinstance(wrong.exception, FedveilError)
    assert "0.5 would fit" in str(wrong.exception)
    assert not (tmp_path / "wrong").exists()
    done = CliRunner().invoke(
        command, [*given, "--learning-rate", "0.5", "--out", str(tmp_path / "out")]
    )
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "out/leakage.json").read_text())["rows"][0]["exact"] == 1.0


def test_a_defence_of_the_update_hides_wrong_settings_and_that_is_said(data, tmp_path):
    model = build_model("lenet", data.shape, 10, seed=0)
    torch.save(model.state_dict(), tmp_path / "before.pt")
    changed = {name: value + 0.01 for name, value in model.state_dict().items()}
    torch.save(changed, tmp_path / "after.pt")
    own = {"images": data.train.raw[:1], "labels": data.train.labels[:1]}
    torch.save(own, tmp_path / "truth.pt")
    given = ["audit", "leakage", "--model", "lenet", "--dataset", "digits", "--attack", "lm"]
    for name in ("before", "after", "truth"):
        given += [f"--{name}", str(tmp_path / f"{name}.pt")]
    out = tmp_path / "out"
    done = CliRunner().invoke(command, [*given, "--defense", "prune:share=0.5", "--out", str(out)])
    assert done.exit_code == 0, done.output
    told = json.loads((out / "leakage.json").read_text())["settings"]["unchecked"]
    assert "could not be checked" in told
    write_report([out], tmp_path / "report.html")
    assert "could not be checked" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod."])
def test_a_wrapper_around_the_model_changes_no_figure(data, wrapper):
    model = build_model("lenet", data.shape, 10, seed=0)
    sent = {name: value.clone() for name, value in model.state_dict().items()}
    returned = {name: value + 0.01 for name, value in sent.items()}
    plain, wrapped = (
        observed([Exchange(1, 0, *states, 1)], model, INSIDE, data)
        for states in (
            (sent, returned),
            [{wrapper + n: v for n, v in state.items()} for state in (sent, returned)],
        )
    )
    for name, gradient in plain.gradients.items():
        assert torch.equal(gradient, wrapped.gradients[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_precision_is_named(data, dtype):
    model = build_model("lenet", data.shape, 10, seed=0)
    other = {name: value.to(dtype) for name, value in model.state_dict().items()}
    exchange = Exchange(1, 0, other, other, 1, data.train.raw[:1])
    with pytest.raises(FedveilError, match=f"is {dtype} .* --model's torch.float32"):
        audit_recorded([exchange], truth_of([exchange], data, None), model, INSIDE)


@pytest.mark.parametrize(
    ("labels", "told"),
    [(torch.tensor([10]), "holds label 10, and digits has 10"), (torch.tensor([-1]), "from 0")],
)
def test_labels_that_are_no_classes_are_named(data, tmp_path, labels, told):
    path = tmp_path / "truth.pt"
    torch.save({"images": data.train.raw[:1], "labels": labels}, path)
    model = build_model("lenet", data.shape, 10, seed=0).state_dict()
    with pytest.raises(FedveilError, match=told):
        truth_of([Exchange(1, 0, model, model, 1)], data, read_truth(path))


def test_without_a_key_nothing_is_recorded_and_the_log_says_so(data, tmp_path, monkeypatch, caplog):
    monkeypatch.delenv(RECORD_KEY_FILE, raising=False)
    caplog.set_level("INFO", logger="flwr")
    model = build_model("lenet", data.shape, 10, seed=0)
    folder = record(flowers(), model, [[0]], tmp_path, monkeypatch, server=True)
    assert not folder.exists()
    assert [text for text in caplog.messages if "is off: FEDVEIL_RECORD_KEY_FILE" in text]


def test_with_a_key_every_file_is_announced(data, key, tmp_path, monkeypatch, caplog):
    model = build_model("lenet", data.shape, 10, seed=0)
    folder = record(flowers(), model, [[0]], tmp_path, monkeypatch, server=True)
    (file,) = folder.iterdir()
    loud = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any(f"RECORDED {file}" in text for text in loud)
    assert b"conv" not in file.read_bytes()
    other = OperatorKey.make(tmp_path / "other.key")
    with pytest.raises(FedveilError, match="under another key"):
        read_exchanges(folder, other)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(FedveilError, match="damaged"):
        read_exchanges(folder, key)


def test_images_that_the_app_normalises_are_not_scored(data, key, tmp_path, monkeypatch):
    model = build_model("lenet", data.shape, 10, seed=0)
    folder = record(flowers(), model, [[0]], tmp_path, monkeypatch, server=True)
    (exchange,) = read_exchanges(folder, key)
    assert exchange.images is None
    with pytest.raises(FedveilError, match="nothing says which images"):
        truth_of([exchange], data, None)
    normalised = (data.train.pixels[:1] - 0.5) / 0.25
    with pytest.raises(FedveilError, match="no pixels in"):
        truth_of([replace(exchange, images=normalised)], data, None)
    strange = torch.full((1, 1, 8, 8), 77, dtype=torch.uint8)
    with pytest.raises(FedveilError, match="none of digits"):
        truth_of([replace(exchange, images=strange)], data, None)


def test_checking_the_settings_leaves_a_batch_normalised_model_as_it_was(data):
    model = build_model("resnet-bn", data.shape, 10, seed=0).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = data.train[:4]
    torch.nn.functional.cross_entropy(model(images.pixels), images.labels).backward()
    model.load_state_dict(before)
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    own = Exchange(1, 0, before, model.state_dict(), 4, images.pixels)
    seen = observed([own], model, replace(INSIDE, learning_rate=0.5, batch=4), data)
    check_settings(seen, 0, images, replace(INSIDE, learning_rate=0.5, batch=4), NONE)
    for name, value in seen.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    with pytest.raises(FedveilError, match="do not lead"):
        check_settings(seen, 0, data.train[4:8], replace(INSIDE, learning_rate=0.5, batch=4), NONE)


def test_statistics_that_an_app_sent_back_are_read_off_its_recording(data):
    """An app that returns its state_dict: means are those of its batch, past its wrapper's name."""
    model = build_model("resnet-bn", data.shape, 10, seed=0).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images, given = data.train[:4], {}
    hook = model.stem_norm.register_forward_pre_hook(lambda _m, inputs: given.update(x=inputs[0]))
    F.cross_entropy(model(images.pixels), images.labels).backward()
    hook.remove()
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    after = {f"module.{name}": value.clone() for name, value in model.state_dict().items()}
    sent = {f"module.{name}": value for name, value in before.items()}
    settings = replace(INSIDE, learning_rate=0.5, batch=4)
    seen = observed([Exchange(1, 0, sent, after, 4, images.pixels)], model, settings, data)
    assert not seen.unread
    told = seen.statistics["stem_norm"]
    assert torch.allclose(told.mean[0], given["x"].double().mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(told.variance[0], given["x"].double().var((0, 2, 3)), rtol=1e-3)
    check_settings(seen, 0, images, settings, NONE)


def followed(data, model, rounds, places, rate):
    """Return the exchanges of clients that each take one step on their own images every round."""
    found, state = [], {name: value.clone() for name, value in model.state_dict().items()}
    for number in range(rounds):
        returned = []
        for client, own in enumerate(places):
            model.load_state_dict(state)
            batch = data.train[torch.tensor(own)]
            loss = F.cross_entropy(model(batch.pixels), batch.labels)
            named = dict(model.named_parameters())
            steps = torch.autograd.grad(loss, list(named.values()))
            after = {
                name: value.detach() - rate * step
                for (name, value), step in zip(named.items(), steps, strict=True)
            }
            returned.append(after)
            given = Exchange(number + 1, client, state, after, len(own), batch.raw)
            found.append(given)
        state = {name: torch.stack([one[name] for one in returned]).mean(0) for name in state}
    return found


def test_rounds_on_the_same_images_are_told_from_together(data):
    model = build_model("lenet", data.shape, 10, seed=0).train()
    places = torch.arange(5 * 24).view(5, 24).tolist()
    everybody = followed(data, model, 3, places, 0.3)
    own = of_one_client(everybody, 2)
    settings = replace(INSIDE, images=72, batch=24, learning_rate=0.3, attacks=("ig:steps=1",))
    truth = truth_of(own, data, None)
    report = audit_recorded(own, truth, model, settings, beside=everybody)
    told = {row.attack: row for row in report.membership["none"] if row.adaptive}
    many = told["gradient × 3 rounds"]
    assert many.picked.shape == (1, 24)
    assert float(many.strangers.above.mean()) > 0.8
    # Too few others, or other images in a round: nothing to put together.
    fewer = [one for one in everybody if one.client < 4]
    for beside, seen in ((fewer, own[:1]), ([one for one in everybody if one.client < 3], own)):
        alone = audit_recorded(seen, truth_of(seen, data, None), model, settings, beside=beside)
        assert {row.attack for row in alone.membership["none"]} == {"gradient", "span"}


def trained_alone(
    data, *, optimizer=torch.optim.SGD, rate=0.05, epochs=3, seed=5, shift=0, frozen="", **changes
):
    """What a client that trains by batches of 4 on 16 images returns, and what it was sent."""
    model = build_model("lenet", data.shape, 10, seed=0).train()
    sent = {name: value.clone() for name, value in model.state_dict().items()}
    own = data.train[torch.arange(16)]
    moving = [p for name, p in model.named_parameters() if not frozen or frozen not in name]
    descent = optimizer(moving, lr=rate, **changes)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(16, generator=generator).split(4):
            by = torch.randint(-shift, shift + 1, (2,), generator=generator).tolist()
            pixels = own.pixels[batch].roll(by, dims=(2, 3))
            descent.zero_grad()
            F.cross_entropy(model(pixels), own.labels[batch]).backward()
            descent.step()
    return Exchange(1, 0, sent, dict(model.state_dict()), 16)


def checked(data, exchange, **declared):
    settings = LeakageSettings(
        update="fedavg", images=16, batch=16,
        **{"epochs": 3, "batch_size": 4, "learning_rate": 0.05, **declared},
    )  # fmt: skip
    seen = observed([exchange], build_model("lenet", data.shape, 10, seed=3), settings, data)
    check_settings(seen, 0, data.train[torch.arange(16)], settings, NONE)


def test_the_order_of_a_clients_steps_need_not_be_known(data):
    for seed in range(5):
        checked(data, trained_alone(data, seed=seed))
        checked(data, trained_alone(data, seed=seed, epochs=1), epochs=1)
    checked(data, trained_alone(data, weight_decay=1e-4))


@pytest.mark.parametrize(
    "own",
    [
        {"momentum": 0.5},
        {"momentum": 0.9, "epochs": 1},
        {"optimizer": torch.optim.Adam, "rate": 1e-4},
        {"optimizer": torch.optim.Adam, "rate": 5e-4},
        {"optimizer": torch.optim.Adam, "rate": 1e-3},
        {"optimizer": torch.optim.Adam, "rate": 2e-3},
        {"weight_decay": 1.0},
        {"shift": 2},
        {"epochs": 1},
        {"epochs": 6},
        {"rate": 0.025},
        {"rate": 0.1},
    ],
    ids=str,
)
def test_of_several_steps_other_settings_are_refused(data, own):
    """A change at a cosine of 0.3 to one step, and up to three times as long, passed for one."""
    declared = {"epochs": 1} if own == {"momentum": 0.9, "epochs": 1} else {}
    with pytest.raises(FedveilError, match="do not lead from"):
        checked(data, trained_alone(data, **own), **declared)


@pytest.mark.parametrize("frozen", ["body.0", "body.0.weight"])
def test_a_weight_that_the_client_does_not_train_is_named(data, frozen):
    """An audit took it for a gradient of zero."""
    with pytest.raises(FedveilError, match=r"returned body\.0\.weight as it was sent"):
        checked(data, trained_alone(data, frozen=frozen))


@pytest.mark.parametrize("shift", [0, 1])
def test_of_one_step_other_images_are_refused_though_most_of_the_change_is_of_biases(data, shift):
    """Of an untrained LeNet's change 99 % are the same for images that were moved by a pixel."""
    model = build_model("lenet", data.shape, 10, seed=0).train()
    sent = {name: value.clone() for name, value in model.state_dict().items()}
    own = data.train[:4]
    F.cross_entropy(model(own.pixels.roll((shift, shift), dims=(2, 3))), own.labels).backward()
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    rounded = {name: value.half().float() for name, value in model.state_dict().items()}
    settings = replace(INSIDE, learning_rate=0.5, images=4, batch=4)
    for returned in (dict(model.state_dict()), rounded):
        seen = observed([Exchange(1, 0, sent, returned, 4)], model, settings, data)
        if not shift:
            check_settings(seen, 0, own, settings, NONE)
            continue
        with pytest.raises(FedveilError, match="do not lead from"):
            check_settings(seen, 0, own, settings, NONE)
