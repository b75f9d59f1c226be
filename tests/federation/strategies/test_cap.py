"""The cap holds for a Flower app that normalises its images, or the run is refused."""

import normalising_app as theirs
import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, MetricRecord
from torch.utils.data import DataLoader, TensorDataset

from fedveil.data import Images
from fedveil.errors import FedveilError
from fedveil.federation import Cap, EnsembleDistillation, NoiseDelta
from fedveil.federation.engines.local import LocalGrid

NORMALISED = theirs.held_out(theirs.normalised(), 0)
TOLD = theirs.held_out(theirs.normalised(), 1)
RAW = theirs.held_out(theirs.raw(), 0)


def run(cap, *, seed=0, evaluate=True):
    """Return the highest accuracy of a copy that was sent, on images of neither side."""
    torch.manual_seed(seed)
    net, sent = theirs.Net(), []

    def accuracy(_, arrays):
        right = theirs.right(arrays.to_torch_state_dict(), TOLD)
        return MetricRecord({"accuracy": right / len(TOLD[1])})

    strategy = NoiseDelta(model=net, cap=cap)
    strategy.started = lambda *_: sent.extend(strategy.sent.copies)
    with LocalGrid("normalising_app:app", nodes=2, workers=1) as grid:
        strategy.start(
            grid,
            ArrayRecord(net.state_dict()),
            num_rounds=3,
            evaluate_fn=accuracy if evaluate else None,
        )
    return max(theirs.right(copy, TOLD) / len(TOLD[1]) for copy in sent)


@pytest.mark.parametrize("seed", range(2))
def test_raw_calibration_images_of_an_app_that_normalises_are_refused(seed):
    cap = Cap(0.6, Images((RAW[0] * 255).to(torch.uint8), RAW[1]))
    with pytest.raises(FedveilError, match=r"Cap's 450 images and of \d.*by the app's own"):
        run(cap, seed=seed)


@pytest.mark.parametrize("wrapped", [TensorDataset, lambda *pair: DataLoader(TensorDataset(*pair))])
def test_the_apps_own_images_hold_the_cap(wrapped):
    assert run(Cap(0.6, wrapped(*NORMALISED))) < 0.6


def test_the_apps_own_evaluation_holds_the_cap():
    def evaluate(weights):
        return theirs.right(weights, NORMALISED), len(NORMALISED[1])

    shown = Images((RAW[0] * 255).to(torch.uint8), RAW[1])
    assert run(Cap(0.6, shown, evaluate=evaluate)) < 0.6


def test_where_nothing_is_compared_the_log_says_so(caplog):
    run(Cap(0.6, TensorDataset(*NORMALISED)), evaluate=False)
    said = [line for line in caplog.messages if "not compared with the app's own" in line]
    assert len(said) == 1


@pytest.mark.parametrize("accuracy", [60, 0, 1, -0.6, float("nan"), "0.6", True])
def test_a_cap_that_is_no_fraction_is_refused(accuracy):
    with pytest.raises(FedveilError, match="accuracy"):
        Cap(accuracy, Images(torch.zeros(9, 1, 8, 8, dtype=torch.uint8), torch.arange(9)))


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        (NORMALISED, "a tuple"),
        (list(NORMALISED), "a list"),
        (NORMALISED[0], "a Tensor"),
        (np.zeros((9, 1, 8, 8)), "pair or by name"),
        (None, "a NoneType"),
        (TensorDataset(NORMALISED[0].permute(0, 2, 3, 1), NORMALISED[1]), "channels last"),
        (Images(*NORMALISED), "floats in"),
        (Images(RAW[0] * 255, RAW[1]), "floats in"),
        (Images(RAW[0], RAW[1][:-1]), "shape"),
        (Images(RAW[0][:0], RAW[1][:0]), "shape"),
        (TensorDataset(RAW[0] * float("nan"), RAW[1]), "NaN"),
        (TensorDataset(RAW[0]), "pair or by name"),
    ],
)
def test_images_that_calibrate_nothing_are_refused(images, reason):
    with pytest.raises(FedveilError, match=reason):
        Cap(0.6, images)


def test_images_the_model_does_not_take_are_refused():
    with pytest.raises(FedveilError, match="does not take"):
        NoiseDelta(
            model=theirs.Net(), cap=Cap(0.6, TensorDataset(torch.rand(9, 3, 8, 8), RAW[1][:9]))
        )


def test_distillation_leaves_the_callers_images_alone():
    mine = RAW[0].clone()
    strategy = EnsembleDistillation(model=theirs.Net(), unlabelled=mine)
    assert torch.equal(mine, RAW[0])
    assert torch.equal(strategy._pixels, RAW[0])
