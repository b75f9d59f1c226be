import io
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from made_tables import png, random_pngs, write_parquet
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image

from fedveil.data import load_dataset
from fedveil.errors import FedveilError


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


def chw(image):
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


# --- embedded -----------------------------------------------------------------------------------


def test_digits_are_scikit_learns_digits():
    data = load_dataset("digits")
    bunch = load_digits()
    expected = sorted(
        (np.round(image * 255 / 16).astype(np.uint8).tobytes(), int(label))
        for image, label in zip(bunch.images, bunch.target, strict=True)
    )
    found = sorted(
        (image.numpy().tobytes(), int(label))
        for split in (data.train, data.test)
        for image, label in zip(split.raw, split.labels, strict=True)
    )
    assert found == expected
    assert data.shape == (1, 8, 8)
    assert data.train.raw.dtype == torch.uint8
    assert data.train.labels.dtype == torch.int64
    assert data.classes == tuple("0123456789")
    assert data.train.pixels.min() == 0
    assert data.train.pixels.max() == 1


def test_split_is_stratified_and_drawn_by_the_seed():
    first, again, other = (load_dataset("digits", seed=s) for s in (1, 1, 2))
    assert torch.equal(first.test.raw, again.test.raw)
    assert not torch.equal(first.test.raw, other.test.raw)
    total = torch.bincount(torch.cat([first.train.labels, first.test.labels]))
    share = torch.bincount(first.test.labels) / total
    assert share.min() > 0.19
    assert share.max() < 0.21


def test_photos_splits_share_no_pixel_and_classes_know_their_photograph():
    data = load_dataset("photos")
    places = {}
    for file in ("china.jpg", "flower.jpg"):
        photo = load_sample_image(file)
        for y in range(0, photo.shape[0] - 31, 16):
            for x in range(0, photo.shape[1] - 31, 16):
                patch = np.ascontiguousarray(photo[y : y + 32, x : x + 32].transpose(2, 0, 1))
                places[patch.tobytes()] = (file, y, x)
    touched = {}
    for name, split in (("train", data.train), ("test", data.test)):
        masks = {f: np.zeros((427, 640), bool) for f in ("china.jpg", "flower.jpg")}
        for raw, label in zip(split.raw, split.labels, strict=True):
            file, y, x = places[raw.numpy().tobytes()]
            masks[file][y : y + 32, x : x + 32] = True
            assert (file == "china.jpg") == (data.classes[label] in {"sky", "pavilion", "garden"})
        touched[name] = masks
    for file in ("china.jpg", "flower.jpg"):
        assert touched["train"][file].any()
        assert touched["test"][file].any()
        assert not (touched["train"][file] & touched["test"][file]).any()
    assert data.shape == (3, 32, 32)
    assert (len(data.train), len(data.test)) == (1400, 200)
    assert torch.bincount(data.test.labels).min() >= 10


def test_photos_can_be_learnt():
    data = load_dataset("photos")
    distance = torch.cdist(data.test.pixels.flatten(1), data.train.pixels.flatten(1))
    nearest = data.train.labels[distance.argmin(1)]
    assert (nearest == data.test.labels).float().mean() > 0.7


# --- parquet ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits", "photos"])
@pytest.mark.parametrize("folds", [2, 6])
def test_folds_divide_the_training_images_and_leave_the_test_images_out(name, folds):
    whole = load_dataset(name)
    parts = [load_dataset(f"{name}@{number}/{folds}") for number in range(1, folds + 1)]
    for number, part in enumerate(parts):
        assert torch.equal(part.test.raw, whole.train.raw[number::folds])
        assert torch.equal(part.test.labels, whole.train.labels[number::folds])
        rest = np.delete(whole.train.raw.numpy(), np.s_[number::folds], axis=0)
        assert np.array_equal(part.train.raw.numpy(), rest)


def test_folds_can_be_joined():
    first, fourth, both = (load_dataset(f"digits@{which}/5") for which in ("1", "4", "1+4"))
    joined = {image.numpy().tobytes() for part in (first, fourth) for image in part.test.raw}
    assert {image.numpy().tobytes() for image in both.test.raw} == joined
    assert len(both.test) == len(first.test) + len(fourth.test)
    assert len(both.train) + len(both.test) == len(first.train) + len(first.test)


@pytest.mark.parametrize(
    ("name", "image", "label"), [("mnist", "image", "label"), ("cifar100", "img", "fine_label")]
)
def test_published_datasets_match_an_independent_decode(name, image, label, data_root, monkeypatch):
    monkeypatch.setenv("FEDVEIL_DATA", str(data_root))
    data = load_dataset(name)
    for split, images in (("train", data.train), ("test", data.test)):
        table = pq.read_table(next((data_root / name).glob(f"{split}-*.parquet")))
        assert len(images) == len(table)
        assert images.labels.tolist() == table[label].to_pylist()
        rows = np.random.default_rng(0).choice(len(table), min(len(table), 400), replace=False)
        for row in [0, len(table) - 1, *rows.tolist()]:
            content = table[image][row].as_py()["bytes"]
            assert np.array_equal(images.raw[row], chw(Image.open(io.BytesIO(content)))), row
    info = json.loads(table.schema.metadata[b"huggingface"])["info"]
    assert list(data.classes) == info["features"][label]["names"]


def test_a_cached_load_is_fast_mapped_and_needs_no_datasets(data_root, monkeypatch, cache):
    monkeypatch.setenv("FEDVEIL_DATA", str(data_root))
    load_dataset("mnist")
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        data = load_dataset("mnist")
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5
    if sys.platform == "linux":
        address = data.train.raw.data_ptr()
        spans = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
        inside = [
            s for s in spans if int(s[0].split("-")[0], 16) <= address < int(s[0].split("-")[1], 16)
        ]
        assert str(cache) in inside[0][-1]
    done = run_python(
        "import sys; from fedveil.data import load_dataset; load_dataset('mnist');"
        "print(sorted({'datasets', 'sklearn', 'pyarrow', 'flwr_datasets'} & set(sys.modules)))"
    )
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""


def test_changing_a_loaded_image_changes_no_other_load(parquet_folder):
    load_dataset(str(parquet_folder))
    data = load_dataset(str(parquet_folder))
    before = data.train.raw.clone()
    data.train.raw.fill_(7)
    assert torch.equal(load_dataset(str(parquet_folder)).train.raw, before)


def test_parquet_without_test_split_is_split(tmp_path):
    write_parquet(tmp_path / "part-0.parquet", random_pngs(20, (4, 4), 1), [0, 1] * 10)
    write_parquet(tmp_path / "part-1.parquet", random_pngs(20, (4, 4), 2), [0, 1] * 10)
    data = load_dataset(str(tmp_path))
    assert (len(data.train), len(data.test)) == (32, 8)


@pytest.mark.parametrize(
    "files",
    [
        ("data/train-0.parquet", "data/validation-0.parquet"),
        ("train/0.parquet", "test/0.parquet"),
        ("x.parquet", "test_x.parquet"),
    ],
)
def test_parquet_splits_are_told_by_file_or_folder(tmp_path, files):
    for file, count in zip(files, (6, 4), strict=True):
        write_parquet(tmp_path / file, random_pngs(count, (4, 4)), [0, 1] * (count // 2))
    data = load_dataset(str(tmp_path))
    assert (len(data.train), len(data.test)) == (6, 4)


def test_labels_that_are_texts_or_sparse_numbers_become_indices(tmp_path):
    images = random_pngs(4, (4, 4))
    write_parquet(tmp_path / "text/train.parquet", images, ["owl", "ape", "owl", "ape"])
    write_parquet(tmp_path / "text/test.parquet", images[:2], ["ape", "owl"])
    text = load_dataset(str(tmp_path / "text"))
    assert text.classes == ("ape", "owl")
    assert text.train.labels.tolist() == [1, 0, 1, 0]
    assert text.test.labels.tolist() == [0, 1]
    write_parquet(tmp_path / "sparse/train.parquet", images, [70, 9, 9, 70])
    write_parquet(tmp_path / "sparse/test.parquet", images[:1], [70])
    sparse = load_dataset(str(tmp_path / "sparse"))
    assert sparse.classes == ("9", "70")
    assert sparse.train.labels.tolist() == [1, 0, 0, 1]


# --- image folders ------------------------------------------------------------------------------


def save(image, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def test_image_folder_keeps_grey_and_scales_wide_and_binary_pixels(tmp_path):
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (5, 7), dtype=np.uint8)
    wide = rng.integers(0, 65536, (5, 7), dtype=np.uint16)
    binary = rng.integers(0, 2, (5, 7)).astype(bool)
    save(Image.fromarray(grey), tmp_path / "train/a/grey.png")
    save(Image.fromarray(wide), tmp_path / "train/b/wide.png")
    save(Image.fromarray(binary), tmp_path / "train/c/binary.png")
    save(Image.fromarray(grey), tmp_path / "test/a/grey.png")
    data = load_dataset(str(tmp_path))
    assert data.classes == ("a", "b", "c")
    assert data.shape == (1, 5, 7)
    assert np.array_equal(data.train.raw[0, 0], grey)
    assert np.array_equal(data.train.raw[1, 0], np.round(wide / 257).astype(np.uint8))
    assert np.array_equal(data.train.raw[2, 0], binary * np.uint8(255))


def test_image_folder_of_many_kinds_becomes_rgb(tmp_path):
    rng = np.random.default_rng(0)
    colour = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    alpha = rng.integers(0, 256, (6, 8, 4), dtype=np.uint8)
    palette = rng.integers(0, 256, (256, 3), dtype=np.uint8)
    index = rng.integers(0, 256, (6, 8), dtype=np.uint8)
    indexed = Image.fromarray(index)
    indexed.putpalette(palette.tobytes())
    save(Image.fromarray(colour), tmp_path / "one/0.png")
    save(Image.fromarray(index), tmp_path / "one/1.png")
    save(indexed, tmp_path / "two/2.png")
    save(Image.fromarray(alpha), tmp_path / "two/3.png")
    save(Image.fromarray(colour), tmp_path / "two/nested/4.JPG", format="JPEG", quality=90)
    (tmp_path / "two/.hidden.png").write_bytes(b"not an image")
    (tmp_path / "two/.thumbs").mkdir()
    (tmp_path / "two/.thumbs/5.png").write_bytes(b"not an image")
    (tmp_path / "two/notes.txt").write_text("not an image")
    data = load_dataset(str(tmp_path))
    jpeg = np.asarray(Image.open(tmp_path / "two/nested/4.JPG"))
    expected = {
        colour.tobytes(): "one",
        np.repeat(index[..., None], 3, 2).tobytes(): "one",
        palette[index].tobytes(): "two",
        np.ascontiguousarray(alpha[..., :3]).tobytes(): "two",
        jpeg.tobytes(): "two",
    }
    found = {
        np.ascontiguousarray(raw.numpy().transpose(1, 2, 0)).tobytes(): data.classes[label]
        for split in (data.train, data.test)
        for raw, label in zip(split.raw, split.labels, strict=True)
    }
    assert found == expected


def test_image_folder_obeys_the_orientation_tag(tmp_path):
    # Three rows of two: only a turned image can be of the size of the other.
    array = np.arange(6, dtype=np.uint8).reshape(3, 2)
    turned = Image.Exif()
    turned[0x0112] = 6
    save(Image.fromarray(array), tmp_path / "train/a/turned.png", exif=turned)
    save(Image.fromarray(np.zeros((2, 3), np.uint8)), tmp_path / "train/b/plain.png")
    save(Image.fromarray(np.zeros((2, 3), np.uint8)), tmp_path / "test/b/plain.png")
    data = load_dataset(str(tmp_path))
    assert np.array_equal(data.train.raw[0, 0], np.rot90(array, -1))


def test_a_changed_file_is_read_anew(tmp_path):
    for name in ("train/a/0.png", "train/b/0.png", "test/a/0.png"):
        save(Image.fromarray(np.full((4, 4), 10, np.uint8)), tmp_path / name)
    assert load_dataset(str(tmp_path)).train.raw.unique().tolist() == [10]
    save(Image.fromarray(np.full((4, 4), 20, np.uint8)), tmp_path / "train/a/0.png")
    assert load_dataset(str(tmp_path)).train.raw.unique().tolist() == [10, 20]


def test_a_relative_path_and_the_home_folder_are_found(parquet_folder, monkeypatch):
    monkeypatch.chdir(parquet_folder.parent)
    monkeypatch.setenv("HOME", str(parquet_folder.parent))
    for name in (parquet_folder.name, f"./{parquet_folder.name}", f"~/{parquet_folder.name}"):
        assert load_dataset(name).name == name


# --- hub ----------------------------------------------------------------------------------------


@pytest.fixture
def fake_hub(monkeypatch, fresh_cache):
    """A hub of one dataset; ``reads`` lists the revisions that were downloaded."""

    import datasets

    hub = SimpleNamespace(revision="r1", fill=30, reads=[])

    def info(_, name, **__):
        if hub.revision is None:
            raise OSError("no route to host")
        return huggingface_hub.hf_api.DatasetInfo(id=name, sha=hub.revision)

    def load(name, revision=None):
        hub.reads.append((name, revision))
        features = datasets.Features(
            {
                "coarse": datasets.ClassLabel(names=["x", "y"]),
                "label": datasets.ClassLabel(names=["no", "yes"]),
                "picture": datasets.Image(),
            }
        )
        content = png(np.full((4, 4), hub.fill, np.uint8))
        rows = {"coarse": [0, 0], "label": [1, 0], "picture": [{"bytes": content}] * 2}
        split = datasets.Dataset.from_dict(rows, features=features)
        return datasets.DatasetDict(train=split, validation=split)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    monkeypatch.setattr(datasets, "load_dataset", load)
    return hub


def test_hub_dataset_is_read_once_a_revision_and_survives_the_network(fake_hub):
    data = load_dataset("someone/pictures")
    assert data.train.labels.tolist() == [1, 0]
    assert data.classes == ("no", "yes")
    assert data.test.raw.unique().tolist() == [30]
    load_dataset("someone/pictures")
    assert fake_hub.reads == [("someone/pictures", "r1")]
    fake_hub.revision, fake_hub.fill = "r2", 40
    assert load_dataset("someone/pictures").train.raw.unique().tolist() == [40]
    fake_hub.revision = None
    assert load_dataset("someone/pictures").train.raw.unique().tolist() == [40]
    assert [revision for _, revision in fake_hub.reads] == ["r1", "r2"]
    with pytest.raises(FedveilError, match=r"other/pictures.*no route to host"):
        load_dataset("other/pictures")


def test_published_datasets_fall_back_to_the_hub(fake_hub):
    assert load_dataset("mnist").name == "mnist"
    assert fake_hub.reads[-1][0] == "ylecun/mnist"


# --- start-up -----------------------------------------------------------------------------------


def test_import_is_light():
    heavy = {"datasets", "sklearn", "pyarrow", "flwr_datasets", "flwr", "huggingface_hub", "pandas"}
    done = run_python(f"import sys, fedveil.data; print(sorted({heavy!r} & set(sys.modules)))")
    assert done.stdout.strip() == "[]"
