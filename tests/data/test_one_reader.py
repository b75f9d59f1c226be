"""Training and ``fedveil transform`` read the same files to the same pixels; the rest is named."""

import io

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet as pq
from torch import nn

from fedveil.data import load_dataset
from fedveil.data.decode import read_image
from fedveil.data.load import absolute_name
from fedveil.defenses import transform_folder
from fedveil.errors import FedveilError

RNG = np.random.default_rng(0)


def _bytes(mode):
    shapes = {"L": (), "LA": (2,), "RGB": (3,), "RGBA": (4,), "CMYK": (4,), "YCbCr": (3,)}
    return Image.fromarray(RNG.integers(0, 256, (6, 9, *shapes[mode]), dtype=np.uint8), mode)


def _sixteen():
    return Image.fromarray((np.arange(54).reshape(6, 9) * 1200).astype(np.uint16))


KINDS = {
    "grey.png": lambda: _bytes("L"),
    "grey-and-alpha.png": lambda: _bytes("LA"),
    "colour.jfif": lambda: _bytes("RGB"),
    "alpha.png": lambda: _bytes("RGBA"),
    "print.jpg": lambda: _bytes("CMYK"),
    "palette.gif": lambda: _bytes("RGB").quantize(8),
    "one-bit.pbm": lambda: _bytes("L").convert("1"),
    "sixteen.png": _sixteen,
    "sixteen.tif": _sixteen,
    "sixteen.pgm": _sixteen,
    "colour.ppm": lambda: _bytes("RGB"),
    "web.webp": lambda: _bytes("RGB"),
    "no-suffix": lambda: _bytes("L"),
    "wrong.txt": lambda: _bytes("RGB"),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("turned", [1, 6])
def test_the_copy_is_what_training_reads(tmp_path, name, turned):
    file = tmp_path / "site/cat" / name
    file.parent.mkdir(parents=True)
    image, suffix = KINDS[name](), file.suffix[1:]
    kinds = {"jfif": "JPEG", "jpg": "JPEG", "pbm": "PPM", "pgm": "PPM", "ppm": "PPM", "tif": "TIFF"}
    kind = kinds.get(suffix, suffix.upper() if suffix in ("png", "gif", "webp") else "PNG")
    exif = image.getexif()
    exif[0x0112] = turned
    image.save(file, kind, **({"exif": exif} if kind in ("PNG", "JPEG", "WEBP") else {}))
    assert transform_folder(tmp_path / "site", tmp_path / "copy", nn.Identity()) == 1
    (copy,) = (tmp_path / "copy/cat").iterdir()
    np.testing.assert_array_equal(read_image(copy), read_image(file))
    with Image.open(copy) as written:
        assert not written.getexif()
    if kind in ("PNG", "JPEG"):
        assert read_image(file).shape[:2] == ((9, 6) if turned == 6 else (6, 9))


def test_sixteen_bits_keep_their_range(tmp_path):
    for suffix in ("png", "tif", "pgm"):
        _sixteen().save(tmp_path / f"x.{suffix}")
        expected = np.rint(np.arange(54).reshape(6, 9) * 1200 / 257)
        np.testing.assert_array_equal(read_image(tmp_path / f"x.{suffix}"), expected)


@pytest.mark.parametrize(("dtype", "told"), [(np.int32, "32 bits"), (np.float32, "floating-point")])
def test_pixels_of_no_known_range_are_refused(tmp_path, dtype, told):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.fromarray(np.ones((4, 4), dtype=dtype)).save(tmp_path / name / "x.tif")
    for read in (
        lambda: load_dataset(str(tmp_path)),
        lambda: transform_folder(tmp_path, tmp_path.parent / "copy", nn.Identity()),
    ):
        with pytest.raises(FedveilError, match=told):
            read()


def _classes(root, *names, count=4):
    for name in names:
        (root / name).mkdir(parents=True)
        for number in range(count):
            _bytes("RGB").save(root / name / f"{number}.png")


def test_every_file_that_is_left_out_is_named(tmp_path):
    _classes(tmp_path, "cat", "dog")
    (tmp_path / "cat/notes.txt").write_text("x")
    (tmp_path / "cat/gone.png").symlink_to("/nonexistent/gone.png")
    (tmp_path / "cat/._0.png").write_text("Mac OS X")
    (tmp_path / "dog/again").symlink_to(tmp_path / "dog")
    _bytes("RGB").save(tmp_path / "loose.png")
    pq.write_table(pa.table({"file_name": ["cat/0.png"]}), tmp_path / "metadata.parquet")
    data = load_dataset(str(tmp_path))
    assert len(data.train) + len(data.test) == 8
    told = sorted(reason.removeprefix(f"{tmp_path}/") for reason in data.left_out)
    assert told == [
        "cat/gone.png: a link to /nonexistent/gone.png, which does not exist",
        "cat/notes.txt: no image",
        "loose.png: in no class's sub-folder",
        "metadata.parquet: a table without images",
    ]


@pytest.mark.parametrize(
    ("train", "test"), [("Train", "Test"), ("training", "testing"), ("TRAIN", "Valid")]
)
def test_splits_are_known_by_many_names(tmp_path, train, test):
    _classes(tmp_path / train, "cat", "dog", count=5)
    _classes(tmp_path / test, "cat", "dog", count=3)
    data = load_dataset(str(tmp_path))
    assert (data.classes, len(data.train), len(data.test)) == (("cat", "dog"), 10, 6)


@pytest.mark.parametrize("names", [("train", "test"), ("Training", "plane"), ("test", "val")])
def test_classes_that_may_be_splits_are_asked_about(tmp_path, names):
    _classes(tmp_path, *names)
    with pytest.raises(FedveilError, match="may be splits or classes"):
        load_dataset(str(tmp_path))


def test_one_class_among_several_may_be_called_test(tmp_path):
    _classes(tmp_path, "blood", "test", "urine")
    assert load_dataset(str(tmp_path)).classes == ("blood", "test", "urine")


def _png(side=6):
    stream = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(stream, "png")
    return stream.getvalue()


LABELS = pa.array([0, 1] * 5)


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()])
def test_images_in_any_binary_column_beside_columns_of_any_type(tmp_path, kind):
    columns = {
        "meta": pa.array([[("site", 1)]] * 10, pa.map_(pa.string(), pa.int32())),
        "image": pa.array([_png() for _ in range(10)], pa.binary()).cast(kind),
        "label": LABELS,
    }
    pq.write_table(pa.table(columns), tmp_path / "birds_val.parquet")
    pq.write_table(pa.table(columns), tmp_path / "birds_training.parquet")
    data = load_dataset(str(tmp_path))
    assert (len(data.train), len(data.test), data.shape) == (10, 10, (3, 6, 6))


def test_of_two_columns_of_images_the_one_called_image_or_none(tmp_path):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    small, large = (
        pa.array([{"bytes": _png(side), "path": None} for _ in range(10)], kind) for side in (4, 6)
    )
    table = {"mask": small, "image": large, "label": LABELS}
    pq.write_table(pa.table(table), tmp_path / "train.parquet")
    assert load_dataset(str(tmp_path)).shape == (3, 6, 6)
    table = {"mask": small, "scan": large, "label": LABELS}
    pq.write_table(pa.table(table), tmp_path / "train.parquet")
    with pytest.raises(FedveilError, match="2 columns of images: mask, scan"):
        load_dataset(str(tmp_path))


def test_labels_of_two_types_are_named_by_table(tmp_path):
    images = pa.array([_png() for _ in range(10)], pa.binary())
    pq.write_table(pa.table({"image": images, "label": LABELS}), tmp_path / "train-0.parquet")
    text = LABELS.cast(pa.string())
    pq.write_table(pa.table({"image": images, "label": text}), tmp_path / "train-1.parquet")
    with pytest.raises(FedveilError, match=r"text in .*train-1.*; numbers in .*train-0"):
        load_dataset(str(tmp_path))


def test_paths_in_a_table_are_relative_to_it(tmp_path, monkeypatch):
    (tmp_path / "data/img").mkdir(parents=True)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for number in range(10):
        (tmp_path / f"data/img/{number}.png").write_bytes(_png())
    rows = [{"bytes": None, "path": f"img/{number}.png"} for number in range(10)]
    table = pa.table({"image": pa.array(rows, kind), "label": LABELS})
    pq.write_table(table, tmp_path / "data/train.parquet")
    monkeypatch.chdir(tmp_path)
    assert len(load_dataset("data").train) == 8


def test_a_stored_run_finds_its_folder_from_anywhere(tmp_path, monkeypatch):
    _classes(tmp_path / "data", "cat", "dog")
    monkeypatch.chdir(tmp_path)
    assert absolute_name("data") == str(tmp_path / "data")
    assert absolute_name("data@1/3") == f"{tmp_path / 'data'}@1/3"
    assert absolute_name("digits@1/3") == "digits@1/3"
    assert absolute_name("user/name") == "user/name"
