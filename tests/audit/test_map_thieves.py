"""Thieves of runs that sent a feature map alone, on a real run and on maps that give much away."""

import pytest
import torch

from fedveil.audit.map_thieves import ATTACKS_ON_MAPS, MapThieves
from fedveil.audit.settings import TheftSettings
from fedveil.audit.theft import OWNER, run_theft_audit, steal_by_map
from fedveil.audit.thieves import AuditedRun, Thief
from fedveil.features import FeatureMap
from fedveil.federation.training_run import run_to_completion
from fedveil.runs.config import TrainConfig
from fedveil.runs.directory import RunDirectory

SETTINGS = {
    "dataset": "digits",
    "clients": 8,
    "filters": 10,
    "secure_aggregation": False,
    "workers": 1,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("sums") / "run"
    run_to_completion(RunDirectory.create(path, TrainConfig.check(SETTINGS)))
    return path


class Pixels(FeatureMap):
    """What nobody has to be sent."""

    name = "pixels"

    def __init__(self, shape):
        super().__init__(shape, shape[0] * shape[1] * shape[2])

    def forward(self, pixels):
        return pixels.flatten(1)


class Told(Pixels):
    """Pixels with the class of each image, which a server that cheats could send in a map."""

    def __init__(self, shape, known):
        super().__init__(shape)
        self.known = known

    def forward(self, pixels):
        told = pixels.flatten(1).clone()
        for row in told:
            row[self.known[row.numpy().tobytes()]] += 5
        return told

    def remade(self, images, *, seed):
        return Pixels(self.shape)


def accuracies(attempts):
    return {attempt.attack: attempt.accuracy for attempt in attempts}


def test_a_map_that_anyone_has_gains_nobody_anything(run):
    audited = AuditedRun(run, 0)
    thieves = MapThieves(audited, Pixels(audited.job.dataset.shape))
    for labels, colluders in ((0, 1), (20, 2)):
        theft = steal_by_map(thieves, Thief(labels, colluders, 0))
        received, alone = map(accuracies, (theft.attempts, theft.alone))
        assert received.items() >= alone.items()
        assert received.keys() == set(ATTACKS_ON_MAPS) - (
            set() if labels else {"probe", "fine-tune"}
        )
        assert theft.labels_held == labels
    assert received["probe"] > 0.6


def test_a_map_that_holds_what_was_learnt_is_found_out(run):
    audited = AuditedRun(run, 0)
    dataset = audited.job.dataset
    known = {
        pixels.numpy().tobytes(): int(label)
        for part in (dataset.train, dataset.test)
        for pixels, label in zip(part.pixels.flatten(1), part.labels, strict=True)
    }
    theft = steal_by_map(MapThieves(audited, Told(dataset.shape, known)), Thief(20, 1, 0))
    received, alone = map(accuracies, (theft.attempts, theft.alone))
    assert received["probe"] > alone["probe"] + 0.15
    assert max(alone.values()) < 0.8


def test_thieves_see_their_own_images_and_what_the_report_is_on(run):
    audited = AuditedRun(run, 0)
    features = audited.feature_map
    sent, own = MapThieves(audited, features).seen_by(Thief(30, 2, 1))
    labelled, unlabelled = audited.images_of(Thief(30, 2, 1))
    shares = {
        i for client in audited.clients(Thief(30, 2, 1)) for i in audited.shares[client].tolist()
    }
    assert {*labelled.tolist(), *unlabelled.tolist()} == shares
    for seen in (sent, own):
        observation = seen.observation
        assert torch.equal(observation.labelled.labels, audited.job.dataset.train.labels[labelled])
        assert len(observation.unlabelled) == len(unlabelled)
        assert len(seen.report) == len(audited.report)
        # Equal images lie where equal images lie: rows are the right ones, in the right order.
        raw = audited.job.dataset.train.raw[labelled].flatten(1).double()
        rows = observation.labelled.raw.flatten(1).double()
        apart, images = (torch.pdist(some - some.mean(0)) for some in (rows, raw))
        assert torch.corrcoef(torch.stack([apart, images]))[0, 1] > 0.5
    assert not torch.allclose(sent.report.raw, own.report.raw)


def test_the_dictionary_of_a_run_is_worth_no_more_than_the_thiefs_own(run, tmp_path):
    settings = TheftSettings(run=run, labels=(10,), colluders=(2,), thieves=2)
    report = run_theft_audit(settings, out=tmp_path, workers=1)
    assert (
        report.sent == "a feature map (filters, offset) and nothing else, by the archive of 1 round"
    )
    assert report.table().startswith(f"clients were sent {report.sent}")
    row = report.row(OWNER, 10, 2)
    assert abs(row["advantage"]) < 0.15
    assert row["accuracy"] < report.reference - 0.1
