"""The study of the transformation, small enough to run, on data that comes with the package."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from scipy.fft import dctn, idctn

from fedveil.data import load_dataset
from fedveil.errors import FedveilError
from fedveil.federation.server_app import prepare_job
from fedveil.runs.directory import RunDirectory
from fedveil.studies import measured
from fedveil.studies.dct import DctStudy
from fedveil.studies.study import measure

SMALL = DctStudy(
    images=2,
    seeds=2,
    dataset="digits@1/2",  # not what is learnt
    accuracy_dataset="digits",
    keeps=(3, 64),
    figure_attacks=("rgap",),
    figure_images=1,
    figure_keep=3,
    rounds=1,
)
FILES = {"dct.json", "dct.png", "dct.md", "figure3.png"}
# The first coefficients of an 8×8 block in JPEG's zigzag order, written out.
ZIGZAG = [(0, 0), (0, 1), (1, 0)]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    out = tmp_path_factory.mktemp("studies") / "dct"
    pieces = []
    result = measure(SMALL, out, on_piece=lambda *told: pieces.append(told))
    return out, result, pieces


def _transformed(images):
    kept = np.zeros((8, 8))
    kept[tuple(zip(*ZIGZAG, strict=True))] = 1
    result = np.empty_like(images)
    blocks = images.shape[2] // 8, images.shape[3] // 8
    for n, c, row, column in np.ndindex(*images.shape[:2], *blocks):
        block = np.s_[n, c, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        result[block] = idctn(dctn(images[block], norm="ortho") * kept, norm="ortho")
    return result


def test_it_writes_its_files_and_says_what_it_does(study):
    out, result, pieces = study
    assert {path.name for path in out.iterdir() if path.is_file()} == FILES
    assert json.loads((out / "dct.json").read_text()) == result
    assert result["seeds"] == [0, 1]
    assert result["settings"]["images"] == 2
    assert "--images 2 --seeds 2 --dataset digits@1/2" in result["command"]
    assert result["versions"]["fedveil"]
    for name in ("dct.png", "figure3.png"):
        assert Image.open(out / name).width > 500
    assert [done for _, done, _ in pieces] == list(range(len(pieces)))
    assert {total for _, _, total in pieces} == {len(pieces)}
    # 2 of figure 3, 3 of the sweep, and no runs of their own for a keep that removes nothing.
    assert len(pieces) == 2 + 3 + 2 * 2


def test_rows_are_those_of_each_audit(study):
    out, result, _ = study
    assert [row["defense"] for row in result["rows"]] == ["none", "dct:keep=3", "dct:keep=64"]
    for row, folder in zip(result["rows"], ("lm-none", "lm-keep-3", "lm-keep-64"), strict=True):
        stored = json.loads((out / "leakage" / folder / "leakage.json").read_text())
        assert row["naive"] == stored["rows"][0]
        assert row["adaptive"] == stored["rows"][-1]
        assert row["naive"]["images"] == 2
        assert row["ceiling"] == stored["rows"][0]["psnr_ceiling"]
    assert len(result["figure3"]) == 3


def test_the_ceiling_is_the_distance_of_the_transformed_image(study):
    out, result, _ = study
    arrays = np.load(out / "leakage" / "lm-keep-3" / "reconstructions.npz")
    originals = arrays["originals"].astype(np.float64)
    transformed = _transformed(originals)
    assert np.allclose(arrays["trained/dct:keep=3"], transformed, atol=1e-5)
    missed = np.square(np.clip(transformed, 0, 1) - originals).mean(axis=(1, 2, 3))
    ceiling = np.median(-10 * np.log10(missed))
    row = result["rows"][1]
    assert row["ceiling"] == pytest.approx(ceiling, abs=1e-3)
    assert row["ceiling_low"] <= row["ceiling"] <= row["ceiling_high"]
    assert row["adaptive"]["psnr_original"] <= row["ceiling"] + 0.1


def test_accuracies_are_those_of_the_delivered_model(study):
    out, result, _ = study
    row = result["rows"][1]
    for seed in (0, 1):
        config = SMALL.training("dct:keep=3", seed)
        run = out / "runs" / f"keep-3-{seed}"
        assert RunDirectory.open(run).config == config
        assert config.defense == "dct:keep=3"
        job = prepare_job(config)
        report = job.evaluation.report
        job.model.load_state_dict(load_file(run / "model.safetensors"))
        images = torch.from_numpy(_transformed(report.pixels.numpy()))
        for pixels, column in ((report.pixels, "plain"), (images, "transformed")):
            with torch.no_grad():
                right = (job.model(pixels).argmax(1) == report.labels).double().mean()
            # Float32 convolutions in another order may turn a tie or two.
            assert row[f"accuracy_{column}"]["seeds"][seed] == pytest.approx(float(right), abs=0.01)
    seeds = row["accuracy_plain"]["seeds"]
    assert row["accuracy_plain"]["mean"] == pytest.approx(np.mean(seeds))
    without, everything = result["rows"][0], result["rows"][2]
    assert everything["trained_with"] == "none"
    assert everything["accuracy_plain"] == without["accuracy_plain"]
    assert without["accuracy_plain"] == without["accuracy_transformed"]


def test_the_table_has_a_line_an_attacker(study):
    out, result, _ = study
    lines = (out / "dct.md").read_text().splitlines()
    assert len(lines) == 2 + 1 + 2 + 2
    assert len({line.count("|") for line in lines}) == 1
    row = result["rows"][1]
    assert f"| {row['ceiling']:.1f} |" in lines[3]
    assert re.search(rf"\| {row['naive']['psnr_trained']:.1f} \[", lines[3])
    assert "knows T" in lines[4]


def test_what_is_finished_is_not_done_again(study, monkeypatch):
    out, result, _ = study

    def never(*_args, **_kwargs):
        raise AssertionError("measured again")

    monkeypatch.setattr(measured, "run_leakage_audit", never)
    monkeypatch.setattr(measured, "run_to_completion", never)
    assert measure(SMALL, out)["rows"] == result["rows"]


def test_a_study_cut_short_goes_on_with_the_piece_it_was_at(study, tmp_path, monkeypatch):
    done = study[0]
    out = tmp_path / "cut"
    (out / "leakage").mkdir(parents=True)
    for folder in (done / "leakage").iterdir():
        if folder.name != "lm-keep-3":
            (out / "leakage" / folder.name).symlink_to(folder)
    (out / "accuracy").symlink_to(done / "accuracy")
    attacked = []

    def interrupted(dataset, model, settings, /, *, out, checkpoint):
        attacked.append(settings.defenses)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(measured, "run_leakage_audit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            measure(SMALL, out)
    assert attacked == [("dct:keep=3",)]
    assert not (out / "dct.json").exists()
    rows = measure(SMALL, out)["rows"]
    for row, before in zip(rows, study[1]["rows"], strict=True):
        for kind in ("naive", "adaptive"):
            assert row[kind]["psnr_trained"] == pytest.approx(before[kind]["psnr_trained"], abs=1)
            assert row[kind]["exact"] == before[kind]["exact"]


def test_a_directory_of_another_study_is_refused(study, monkeypatch):
    out = study[0]
    monkeypatch.setattr(measured, "run_leakage_audit", None)
    for changes in ({"images": 3}, {"rounds": 2}):
        other = DctStudy(**{**vars(SMALL), **changes})
        with pytest.raises(FedveilError, match="made with other settings; remove it"):
            measure(other, out)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keeps": (65,)}, "keep=65 is out of range"),
        ({"keeps": (3, 3)}, "none twice"),
        ({"figure_keep": 0}, "keep=0 is out of range"),
        ({"seeds": 0}, "--seeds 0"),
        ({"images": 0}, "--images 0"),
        ({"figure_images": 0}, "--figure-images 0"),
        ({"images": 1000}, "--images 1000 is too many"),
        ({"rounds": 0}, "rounds = 0"),
        ({"accuracy_dataset": "mnits"}, "mnist"),
        ({"attack": "ml"}, "attack 'ml' is unknown"),
    ],
)
def test_a_wrong_setting_leaves_nothing_behind(tmp_path, changes, message):
    with pytest.raises(FedveilError, match=message):
        measure(DctStudy(**{**vars(SMALL), **changes}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_pieces_are_named(study, tmp_path):
    done, out = study[0], tmp_path / "damaged"
    (out / "leakage" / "figure3-rgap-none").mkdir(parents=True)
    (out / "leakage" / "figure3-rgap-none" / "leakage.json").write_text("{")
    with pytest.raises(FedveilError, match=r"leakage\.json is damaged .* remove it"):
        measure(SMALL, out)
    assert (done / "dct.json").exists()


def test_attacked_and_learnt_images_are_the_datasets_own(study):
    arrays = np.load(study[0] / "leakage" / "lm-none" / "reconstructions.npz")
    train = load_dataset(SMALL.dataset).train.pixels.numpy()
    for image in arrays["originals"]:
        assert (image == train).all(axis=(1, 2, 3)).any()
