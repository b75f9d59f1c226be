"""Tables as other tools write them: read right, or refused with the reason."""

import io
import json
import uuid
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest
import torch
from made_tables import write_parquet
from PIL import Image
from pyarrow import parquet as pq

from fedveil.data import load_dataset
from fedveil.data.tables import Table, read_tables
from fedveil.errors import FedveilError

N = 10
LABELS = [0, 1] * (N // 2)
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def _pngs(side=6, seed=0):
    random = np.random.default_rng(seed)
    made = []
    for _ in range(N):
        stream = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(
            stream, "png"
        )
        made.append(stream.getvalue())
    return made


PNGS = _pngs()
PIXELS = np.stack([np.asarray(Image.open(io.BytesIO(png))) for png in PNGS]).transpose(0, 3, 1, 2)


def _structs(side=6, kind=STRUCT):
    return pa.array([{"bytes": png, "path": None} for png in _pngs(side)], kind)


def _write(folder, columns, name="train.parquet", **described):
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if described:
        info = json.dumps({"info": {"features": described}})
        table = table.replace_schema_metadata({"huggingface": info})
    pq.write_table(table, folder / name)


def _both(folder, columns, **described):
    """Write the same rows as training and test images, so that all of them can be compared."""
    _write(folder, columns, **described)
    _write(folder, columns, "test.parquet", **described)
    data = load_dataset(str(folder))
    assert torch.equal(data.train.raw, data.test.raw)
    return data


# Images


@pytest.mark.parametrize(
    "images",
    [
        pa.array(PNGS, pa.binary()),
        pa.array(PNGS, pa.large_binary()),
        pa.array(PNGS, pa.binary_view()),
        pa.array(PNGS, pa.binary()).dictionary_encode(),
        _structs(),
        _structs(kind=pa.struct([("path", pa.string_view()), ("bytes", pa.binary_view())])),
        _structs(kind=pa.struct([("bytes", pa.large_binary()), ("path", pa.large_string())])),
        _structs(kind=pa.struct([("bytes", pa.large_binary())])),
        pa.chunked_array([pa.array(PNGS[:3], pa.binary()), pa.array(PNGS[3:], pa.binary())]),
    ],
    ids=lambda images: str(images.type),
)
def test_images_of_every_binary_type_are_read(tmp_path, images):
    data = _both(tmp_path, {"image": images, "label": LABELS})
    np.testing.assert_array_equal(data.train.raw, PIXELS)


OTHERS = {
    "map": pa.array([[("site", 1)]] * N, pa.map_(pa.string(), pa.int32())),
    "uuid": pa.array([uuid.uuid4().bytes] * N, pa.uuid()),
    "fixed": pa.array([b"0123456789abcdef"] * N, pa.binary(16)),
    "decimal": pa.array([Decimal("1.5")] * N),
    "time": pa.array([0] * N, pa.timestamp("us", "Europe/Berlin")),
    "list": pa.array([[[1.0]]] * N, pa.list_(pa.list_(pa.float16()))),
    "view": pa.array(["x"] * N, pa.string_view()),
    "struct": pa.array([{"a": {"b": [1]}}] * N),
    "null": pa.nulls(N),
    "dictionary": pa.array(["x"] * N).dictionary_encode(),
    "duration": pa.array([1] * N, pa.duration("s")),
    "label.x": pa.array(["not the label"] * N),
    "image.thumb": pa.array(["not the image"] * N),
}


@pytest.mark.parametrize("name", OTHERS)
def test_columns_of_any_type_may_stand_beside(tmp_path, name):
    data = _both(tmp_path, {name: OTHERS[name], "image": _structs(), "label": LABELS})
    np.testing.assert_array_equal(data.train.raw, PIXELS)
    assert data.train.labels.tolist() == LABELS
    assert data.remarks == ()


@pytest.mark.parametrize(
    ("columns", "taken"),
    [
        ({"mask": _structs(4), "image": _structs()}, "image"),
        ({"image": _structs(), "mask": _structs(4)}, "image"),
        ({"Mask": _structs(4), "Image": _structs()}, "Image"),
        ({"mask": _structs(4), "image": pa.array(PNGS, pa.binary())}, "image"),
        ({"thumb": pa.array(_pngs(4), pa.binary()), "scan": _structs()}, "scan"),
    ],
)
def test_of_two_columns_of_images_it_is_said_which_was_taken(tmp_path, columns, taken):
    data = _both(tmp_path, {**columns, "label": LABELS})
    assert data.shape == (3, 6, 6)
    names = ", ".join(sorted(columns))
    assert data.remarks == (f"of the columns {names}, images are read from {taken}",)


def test_two_columns_of_images_of_no_known_name_are_asked_about(tmp_path):
    _write(tmp_path, {"mask": _structs(4), "scan": _structs(), "label": LABELS})
    with pytest.raises(FedveilError, match=r"2 columns of images: mask, scan\. Call"):
        load_dataset(str(tmp_path))


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (pa.array([*PNGS[:4], None, *PNGS[5:]], pa.binary()), "row 4 holds no image"),
        (pa.array([*PNGS[:4], b"", *PNGS[5:]], pa.binary()), "row 4: it is not an image"),
        (pa.array([{"bytes": None, "path": None}] * N, STRUCT), "row 0 holds no image"),
        (pa.array([None] * N, STRUCT), "row 0 holds no image"),
        (pa.array([{"bytes": "text", "path": None}] * N), "row 0: .*No such file"),
        (pa.array([{"bytes": 3}] * N), "row 0 holds no image"),
        (pa.array([{"bytes": None, "path": "gone.png"}] * N, STRUCT), "row 0: .*No such file"),
        (pa.array([{"bytes": None, "path": "a\0b"}] * N, STRUCT), "row 0: "),
        (pa.array([[{"bytes": png}] for png in PNGS]), "no image column"),
        (pa.array([{"photo": {"bytes": png}} for png in PNGS]), "no image column"),
        (pa.array([[[1, 2], [3, 4]]] * N), "no image column"),
    ],
)
def test_what_is_no_image_is_named_by_its_row(tmp_path, images, words):
    _write(tmp_path, {"image": images, "label": LABELS})
    with pytest.raises(FedveilError, match=words):
        load_dataset(str(tmp_path))


def test_paths_are_relative_to_the_table_and_changes_are_seen(tmp_path, monkeypatch):
    (tmp_path / "data/tables/img").mkdir(parents=True)
    (tmp_path / "elsewhere/img").mkdir(parents=True)
    for number, png in enumerate(PNGS):
        (tmp_path / f"data/tables/img/{number}.png").write_bytes(png)
        (tmp_path / f"elsewhere/img/{number}.png").write_bytes(b"another")
    monkeypatch.chdir(tmp_path / "elsewhere")
    rows = [{"bytes": None, "path": f"img/{number}.png"} for number in range(N)]
    images = pa.array(rows, STRUCT)
    data = _both(tmp_path / "data/tables", {"image": images, "label": LABELS})
    np.testing.assert_array_equal(data.train.raw, PIXELS)
    assert data.left_out == ()
    (tmp_path / "data/tables/img/0.png").write_bytes(_pngs(seed=9)[0])
    changed = load_dataset(str(tmp_path / "data")).train.raw
    assert not np.array_equal(changed[0], PIXELS[0])
    assert np.array_equal(changed[1:], PIXELS[1:])


def test_a_column_declared_an_image_may_hold_paths(tmp_path):
    for number, png in enumerate(PNGS):
        (tmp_path / f"{number}.png").write_bytes(png)
    columns = {"image": [f"{number}.png" for number in range(N)], "label": LABELS}
    data = _both(tmp_path, columns, image={"_type": "Image"})
    np.testing.assert_array_equal(data.train.raw, PIXELS)


# Labels


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (pa.array(LABELS, pa.int8()), ("0", "1")),
        (pa.array([2**63, 2**64 - 1] * 5, pa.uint64()), (str(2**63), str(2**64 - 1))),
        (pa.array([0.0, 1.0] * 5), ("0", "1")),
        (pa.array([3.0, 10.0] * 5, pa.float32()), ("3", "10")),
        (pa.array([False, True] * 5), ("False", "True")),
        (pa.array(["cat", "dog"] * 5, pa.string()), ("cat", "dog")),
        (pa.array(["cat", "dog"] * 5, pa.large_string()), ("cat", "dog")),
        (pa.array(["cat", "dog"] * 5, pa.string_view()), ("cat", "dog")),
        (pa.array(["cat", "dog"] * 5).dictionary_encode(), ("cat", "dog")),
        (pa.array([7, 9] * 5).dictionary_encode(), ("7", "9")),
    ],
    ids=lambda value: str(getattr(value, "type", value)),
)
def test_labels_of_every_type_become_indices(tmp_path, labels, classes):
    data = _both(tmp_path, {"image": _structs(), "Label": labels})
    assert data.classes == classes
    assert data.train.labels.tolist() == LABELS


@pytest.mark.parametrize(
    ("label", "shown"),
    [(None, "None"), (float("nan"), "None"), (0.5, "0.5"), (-1.0, "-1")],
)
def test_a_label_that_is_none_is_named_by_its_row(tmp_path, label, shown):
    _write(tmp_path, {"image": _structs(), "label": pa.array([0.0, 1.0, label] + [0.0] * 7)})
    with pytest.raises(FedveilError, match=f"image 2: the label {shown} stands for no class"):
        load_dataset(str(tmp_path))


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (["0", "1"] * 5, r"numbers in .*train-0.*; text in .*train-1"),
        ([False, True] * 5, r"numbers in .*train-0.*; true or false in .*train-1"),
    ],
)
def test_labels_of_two_types_are_named_by_table(tmp_path, labels, words):
    _write(tmp_path, {"image": _structs(), "label": LABELS}, "train-0.parquet")
    _write(tmp_path, {"image": _structs(), "label": labels}, "train-1.parquet")
    with pytest.raises(FedveilError, match=words):
        load_dataset(str(tmp_path))


def test_the_same_number_may_stand_for_another_class_in_another_table(tmp_path):
    write_parquet(tmp_path / "train.parquet", PNGS, LABELS, names=["cat", "dog"])
    write_parquet(tmp_path / "test.parquet", PNGS, LABELS, names=["dog", "cat"])
    data = load_dataset(str(tmp_path))
    assert data.classes == ("cat", "dog")
    assert data.train.labels.tolist() == LABELS
    assert data.test.labels.tolist() == [1 - label for label in LABELS]


def test_declared_classes_keep_their_order_and_text_finds_its_class(tmp_path):
    write_parquet(tmp_path / "train.parquet", PNGS, LABELS, names=["owl", "ape", "none"])
    write_parquet(tmp_path / "test.parquet", PNGS, ["ape", "owl"] * 5)
    data = load_dataset(str(tmp_path))
    assert data.classes == ("owl", "ape", "none")
    assert data.test.labels.tolist() == [1, 0] * 5


def test_of_two_columns_of_labels_it_is_said_which_was_taken(tmp_path):
    columns = {"image": _structs(), "class": [0] * N, "label": LABELS}
    data = _both(tmp_path, columns)
    assert data.train.labels.tolist() == LABELS
    assert data.remarks == ("of the columns class, label, labels are read from label",)


def test_a_table_that_names_no_split_among_others_is_said(tmp_path):
    for name in ("more.parquet", "train.parquet", "test.parquet"):
        _write(tmp_path, {"image": _structs(), "label": LABELS}, name)
    data = load_dataset(str(tmp_path))
    assert (len(data.train), len(data.test)) == (2 * N, N)
    told = "more.parquet: no split in the name, so these are training images"
    assert data.remarks == (told,)


@pytest.mark.parametrize(("images", "labels"), [(4, 3), (3, 4), (4, 0)])
def test_columns_of_unequal_length_never_shift_labels(images, labels):
    """A damaged table may have them; the labels of the next one would move, too."""
    import datasets

    features = {"image": datasets.Image(), "label": datasets.Value("int64")}

    def table(count, named):
        rows = {"image": [{"bytes": png} for png in PNGS[:count]], "label": LABELS[:named]}
        return Table("x.parquet", features, lambda column: iter([rows[column]]))

    read_tables({"train": [table(N, N)]}, "whole")
    with pytest.raises(
        FedveilError, match=r"x\.parquet has .* labels and .* images: it is damaged"
    ):
        read_tables({"train": [table(images, labels), table(N, N)]}, "damaged")
