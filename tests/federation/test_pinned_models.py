"""A node's config says which models it trains; the module of another is not even imported."""

import sys
from types import SimpleNamespace

import pytest
from flwr.app import Context, RecordDict

from fedveil.errors import FedveilError
from fedveil.federation.client_app import _model_for
from fedveil.federation.permission import MODELS


@pytest.mark.parametrize("allowed", ["cnn", "cnn, lenet", ""])
def test_a_model_the_site_does_not_allow_is_refused_before_its_module_is_imported(
    allowed, tmp_path, monkeypatch
):
    (tmp_path / "unwanted_model.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    context = Context(1, 2, {MODELS: allowed}, RecordDict(), {})
    task = SimpleNamespace(model="unwanted_model:make", shape=(1, 8, 8), classes=("a", "b"))
    with pytest.raises(FedveilError, match=r"this node's config allows models"):
        _model_for(task, context)
    assert "unwanted_model" not in sys.modules


def test_a_model_the_site_allows_is_built():
    context = Context(1, 2, {MODELS: "lenet, cnn"}, RecordDict(), {})
    task = SimpleNamespace(model="cnn", shape=(1, 8, 8), classes=("a", "b"))
    assert _model_for(task, context).training
