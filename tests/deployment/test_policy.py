"""What a site's policy allows, and what it has spent."""

import os
import signal
import subprocess
import sys

import pytest
from flwr.app import ConfigRecord, Context, Metadata, RecordDict
from flwr.app.message.message import make_message
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fedveil.deployment.clientapp import LEDGER, admit
from fedveil.deployment.ledger import Ledger, Release
from fedveil.deployment.policy import POLICY, Policy, PolicyError
from fedveil.deployment.site_images import admitted_images
from fedveil.errors import FedveilError
from tests.deployment.conftest import PROGRAMS

APP = "@fedveil/fedveil-run==1.0.0"
NAMED = f'apps = ["{APP}"]\n'
BUNDLE = "ab" * 32
DELTA = 1e-5
ORDERS = [1 + x / 10 for x in range(1, 100)] + [*range(12, 64), 80, 128, 192, 256, 384, 512, 1024]


def message(kind="train", *, secagg=None, task=True, **settings):
    records = {}
    if task:
        known = {"dataset": "digits", "partition": "iid", "model": "cnn", "epochs": 1}
        known |= {"batch-size": 10, "learning-rate": 0.1, "seed": 0}
        records["config"] = ConfigRecord(known | settings)
    if secagg is not None:
        records[RECORD_KEY_CONFIGS] = ConfigRecord(secagg)
    metadata = Metadata(0, "", 0, 0, "", "", 0.0, 1e12, kind, 0, None)
    return make_message(metadata, RecordDict(records))


def read(tmp_path, text):
    path = tmp_path / POLICY
    path.write_text(text)
    return Policy.read(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("epsilon = 0\n" + NAMED, "epsilon: Input should be greater than 0"),
        ("epsilon = 1", "name those that keep to it"),
        ("smallest-sum = 10", "name those that keep to it"),
        ("smallest-sum = 2\n" + NAMED, "greater than or equal to 3"),
        ('transform = "noise:ratio=1"', "no transformation of images alone"),
        ('transform = "dct:kep=1"', "dct"),
        ("budget = 3", "a policy has apps, messages, models, transform, smallest-sum, epsilon"),
        ("apps = ", "cannot be read"),
    ],
)
def test_a_policy_that_cannot_be_held_to_is_refused(tmp_path, text, said):
    with pytest.raises(FedveilError, match=said):
        read(tmp_path, text)


def test_a_node_with_a_policy_that_cannot_be_held_to_does_not_start(tmp_path):
    (tmp_path / POLICY).write_text("epsilon = 1")
    command = [PROGRAMS / "fedveil", "deploy", "images", tmp_path, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "name those that keep to it" in done.stderr


@pytest.mark.parametrize(
    ("text", "asked", "said"),
    [
        ('apps = ["@other/app==1.0.0"]', message(), "asked for @fedveil/fedveil-run"),
        (f'apps = ["{APP} sha256:00"]', message(), f"what is there is sha256:{BUNDLE}"),
        ('messages = ["query"]', message("train.gradient"), "asked for train.gradient"),
        (NAMED + 'models = ["lenet"]', message(), "allows models lenet, and the server asked for"),
        (NAMED + 'models = ["cnn"]', message(task=False), "no task of fedveil's"),
        (NAMED + 'models = ["no.such:model sha256:00"]', message(model="no.such:model"), "none"),
        (NAMED + "smallest-sum = 5", message(), "train with --secure-aggregation"),
        (
            NAMED + "smallest-sum = 5",
            message("train.gradient", secagg={Key.STAGE: Stage.UNMASK}),
            "train with --secure-aggregation",
        ),
        (
            NAMED + "smallest-sum = 5",
            message(secagg={Key.STAGE: Stage.SETUP, Key.SAMPLE_NUMBER: 9, Key.THRESHOLD: 4}),
            "4 would do",
        ),
        (NAMED + "smallest-sum = 5", message(secagg={Key.STAGE: "other"}), "a stage"),
    ],
)
def test_what_exceeds_a_policy_is_refused_by_name(tmp_path, text, asked, said):
    with pytest.raises(PolicyError, match=said):
        read(tmp_path, text).check(APP, asked, bundle=BUNDLE)


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("", message("train.gradient", task=False)),
        (NAMED + 'messages = ["train"]\nmodels = ["lenet", "cnn"]', message()),
        (NAMED + "smallest-sum = 5", message("query")),
        (NAMED + "smallest-sum = 5", message("train.statistics", secagg={Key.STAGE: Stage.UNMASK})),
        (f'apps = ["{APP} sha256:{BUNDLE}"]', message()),
        (
            NAMED + "smallest-sum = 5",
            message(secagg={Key.STAGE: Stage.SETUP, Key.SAMPLE_NUMBER: 9, Key.THRESHOLD: 5}),
        ),
    ],
)
def test_what_a_policy_allows_passes(tmp_path, text, asked):
    read(tmp_path, text).check(APP, asked, bundle=BUNDLE)


def test_a_model_is_pinned_by_the_file_it_stands_in(tmp_path, monkeypatch):
    (tmp_path / "own_net.py").write_text("raise SystemExit('never imported to be pinned')\n")
    monkeypatch.syspath_prepend(tmp_path)
    digest = subprocess.run(
        ["sha256sum", tmp_path / "own_net.py"], capture_output=True, text=True, check=True
    ).stdout.split()[0]
    policy = read(tmp_path, NAMED + f'models = ["own_net:make sha256:{digest}"]')
    policy.check(APP, message(model="own_net:make"), bundle=BUNDLE)
    (tmp_path / "own_net.py").write_text("changed = True\n")
    with pytest.raises(PolicyError, match=f"pins own_net:make to sha256:{digest}"):
        policy.check(APP, message(model="own_net:make"), bundle=BUNDLE)


_releases = st.lists(
    st.tuples(st.floats(0.7, 5), st.sampled_from([0.01, 0.1, 1.0]), st.integers(1, 50)),
    min_size=1,
    max_size=4,
)


@settings(max_examples=8, deadline=None)
@given(_releases)
def test_epsilon_over_runs_is_that_of_an_independent_accountant(tmp_path_factory, releases):
    from dp_accounting import dp_event
    from dp_accounting.rdp import RdpAccountant

    ledger, oracle = Ledger(tmp_path_factory.mktemp("ledger") / "l.jsonl"), RdpAccountant(ORDERS)
    for run, (noise, rate, steps) in enumerate(releases):
        told = ledger.spend(Release(run, "m", noise, rate, steps), most=1e9, delta=DELTA)
        event = dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(noise))
        oracle.compose(event, steps)
    assert told == ledger.spent(DELTA)
    assert told == pytest.approx(oracle.get_epsilon(DELTA), rel=0.01)


def _answers(node, private, context):
    for number in range(1000):
        try:
            admit(node, APP, private, context, bundle=BUNDLE)
        except PolicyError as refusal:
            return number, str(refusal)
    raise AssertionError("a budget without end")


def test_a_budget_is_never_exceeded_and_cannot_be_forgotten(tmp_path):
    node = tmp_path / "node"
    node.mkdir()
    (node / POLICY).write_text(NAMED + "epsilon = 4.0\n")
    context = Context(7, 1, {"partition-id": 0, "num-partitions": 20}, RecordDict(), {})
    private = message(defense="dp-sgd:noise=2")
    answered, refusal = _answers(node, private, context)
    assert "allows epsilon 4 over all runs" in refusal
    kept = Ledger(node / LEDGER)
    assert len(kept.releases()) == answered > 2
    assert kept.spent(DELTA) <= 4 < kept.spent(DELTA) + 1
    admit(node, APP, message("query"), context, bundle=BUNDLE)
    for free in (message(), message("train.gradient", defense="dp-sgd:noise=2")):
        with pytest.raises(PolicyError, match="none can be reckoned"):
            admit(node, APP, free, context, bundle=BUNDLE)
    with (node / LEDGER).open("a") as file:
        file.write('{"run": 7')
    with pytest.raises(FedveilError, match=f"line {answered + 1}: .*cannot be told"):
        admit(node, APP, private, context, bundle=BUNDLE)


_SPENDS = """
import sys
from pathlib import Path
from fedveil.deployment.ledger import Ledger, Release
ledger = Ledger(Path(sys.argv[1]))
while True:
    ledger.spend(Release(1, "m", 50.0, 0.01, 1), most=1e9, delta=1e-5)
    print("answered", flush=True)
"""


def test_a_kill_forgets_no_release_whose_answer_was_begun(tmp_path):
    path = tmp_path / "ledger.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-c", _SPENDS, path], stdout=subprocess.PIPE, text=True
    )
    answers = [process.stdout.readline() for _ in range(5)]
    os.kill(process.pid, signal.SIGKILL)
    answers += process.stdout.readlines()
    process.wait()
    assert set(answers) == {"answered\n"}
    assert len(answers) <= len(Ledger(path).releases()) <= len(answers) + 1


def test_images_pass_through_the_policy_before_any_app_sees_them(tmp_path):
    node, source, told = tmp_path / "node", tmp_path / "site", []
    (source / "a").mkdir(parents=True)
    node.mkdir()
    Image.effect_noise((16, 16), 90).save(source / "a" / "1.png")
    (node / POLICY).write_text("")
    assert admitted_images(node, source, tell=told.append) == source
    (node / POLICY).write_text('transform = "dct:keep=1"')
    copy = admitted_images(node, source, tell=told.append)
    with Image.open(copy / "a" / "1.png") as seen:
        assert len(set(seen.crop((0, 0, 8, 8)).getdata())) == 1, "a block keeps its mean alone"
    before = (copy / "a" / "1.png").stat().st_mtime_ns
    assert admitted_images(node, source, tell=told.append) == copy
    assert (copy / "a" / "1.png").stat().st_mtime_ns == before, "nothing changed, nothing is made"
    Image.effect_noise((16, 16), 90).save(source / "a" / "2.png")
    assert (admitted_images(node, source, tell=told.append) / "a" / "2.png").exists()
    assert "1 image, transformed by dct:keep=1" in told[0]
