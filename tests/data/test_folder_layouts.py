"""What lies in a folder of images: every file is read, or left out by name, or refused by name."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from made_tables import random_pngs, write_parquet
from PIL import Image
from pyarrow import parquet as pq

from fedveil.data import load_dataset, load_own_images
from fedveil.data.files import told
from fedveil.data.load import absolute_name
from fedveil.errors import FedveilError


def _image(path, seed=0, form="PNG"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, form)


def _classes(root, *names, count=5):
    for name in names:
        for number in range(count):
            _image(root / name / f"{number}.png", seed=number)


def _read(path):
    data = load_dataset(str(path))
    return len(data.train) + len(data.test)


@pytest.fixture
def two(tmp_path):
    """Two classes of five images."""
    _classes(tmp_path / "site", "cat", "dog")
    return tmp_path / "site"


# Files


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("0.jfif", "JPEG"),
        ("0.JPG", "JPEG"),
        ("0.jpe", "JPEG"),
        ("0.pgm", "PPM"),
        ("0.pnm", "PPM"),
        ("0.webp", "WEBP"),
        ("0.bmp", "BMP"),
        ("0.TIFF", "TIFF"),
        ("0.tif", "PNG"),
        ("0.gif", "GIF"),
        ("0.jp2", "JPEG2000"),
        ("0.avif", "AVIF"),
        ("0.png", "JPEG"),
        ("0.txt", "PNG"),
        ("0.dat", "TIFF"),
        ("0", "WEBP"),
        ("scan.2024-01-01", "PNG"),
        ("ünï cödé [b]", "PNG"),
    ],
)
def test_an_image_is_known_by_its_content(two, name, form):
    _image(two / "cat/more" / name, seed=9, form=form)
    assert _read(two) == 11
    assert load_dataset(str(two)).left_out == ()


def test_an_image_whose_head_stands_at_its_end_is_one(two):
    """As libtiff writes them: pixels first, the directory that describes them last."""
    pixels = np.random.default_rng(0).integers(0, 256, 6 * 6, dtype=np.uint8).tobytes() + bytes(64)
    padding = bytes(200_000)
    entries = ((256, 4, 6), (257, 4, 6), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 8))
    entries += ((277, 3, 1), (278, 4, 6), (279, 4, 36))
    head = b"II*\0" + (8 + len(pixels) + len(padding)).to_bytes(4, "little")
    directory = len(entries).to_bytes(2, "little") + b"".join(
        tag.to_bytes(2, "little")
        + kind.to_bytes(2, "little")
        + (1).to_bytes(4, "little")
        + value.to_bytes(4, "little")
        for tag, kind, value in entries
    )
    (two / "cat/scan").write_bytes(head + pixels + padding + directory + bytes(4))
    assert _read(two) == 11


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("notes.txt", b"text", "no image"),
        ("empty", b"", "no image"),
        ("list.csv", b"P1,0,cat\n", "no image"),
        ("BMW", b"BM but a text", "no image"),
        ("archive.zip", b"PK\3\4" + bytes(99), "no image"),
        ("weights.h5", b"\x89HDF\r\n\x1a\n" + bytes(99), "no image"),
        ("paper.pdf", b"%PDF-1.7\n", "no image"),
        ("phone.heic", b"\0\0\0\x18ftypheic", "of a format that is not read; convert it"),
        ("scan.dcm", bytes(128) + b"DICM", "of a format that is not read; convert it"),
        ("._0.png", b"Mac OS X", "hidden"),
        (".DS_Store", b"\0\0\0\1Bud1", "hidden"),
        (".hidden.png", b"", "hidden"),
    ],
)
def test_what_is_no_image_is_named(two, name, content, reason):
    (two / "cat" / name).write_bytes(content)
    assert _read(two) == 10
    assert load_dataset(str(two)).left_out == (f"cat/{name}: {reason}",)


def test_folders_that_hold_nothing_or_are_hidden_are_named(two):
    (two / "owl").mkdir()
    _image(two / "cat/.thumbs/0.png")
    _image(two / "loose.png")
    assert load_dataset(str(two)).left_out == (
        "loose.png: in no class's sub-folder",
        "owl: an empty folder",
        "cat/.thumbs: hidden",
    )


def test_a_few_are_named_and_the_rest_counted():
    assert told(["a: no image"]) == "1 file left out: a: no image"
    assert told([f"{n}: hidden" for n in range(400)]).endswith("4: hidden; and 395 more")
    assert told([f"{n}: hidden" for n in range(400)]).startswith("400 files left out: 0: hidden;")


# Links and what cannot be read


def test_links_are_followed_once(two, tmp_path):
    _image(tmp_path / "store/x.png", seed=20)
    _classes(tmp_path / "store", "owls", count=3)
    (two / "cat/x.png").symlink_to(tmp_path / "store/x.png")
    (two / "dog/again.png").symlink_to(tmp_path / "store/x.png")
    (two / "dog/same.png").symlink_to(two / "cat/0.png")
    (two / "owl").symlink_to(tmp_path / "store/owls")
    (two / "aaa").symlink_to(two / "cat")
    data = load_dataset(str(two))
    assert data.classes == ("cat", "dog", "owl")
    assert len(data.train) + len(data.test) == 5 + 1 + 5 + 3
    assert data.left_out == (
        f"dog/again.png: a link to {tmp_path / 'store/x.png'}, which is read already",
        f"dog/same.png: a link to {two / 'cat/0.png'}, which is read already",
        f"aaa: a link to {two / 'cat'}, a folder that is read already",
    )


@pytest.mark.parametrize("target", ["..", ".", "../dog", "../.."])
def test_a_loop_of_links_ends(two, target):
    (two / "cat/around").symlink_to(target)
    (two / "dog/self").symlink_to("self")
    data = load_dataset(str(two))
    assert len(data.train) + len(data.test) == 10
    assert len(data.left_out) == 2
    assert "a folder that is read already" in data.left_out[0]
    assert "dog/self: " in data.left_out[1]


def test_links_that_multiply_are_read_once(two):
    """Each of 30 folders links twice to the next: 2^30 paths."""
    for level in range(30):
        (two / f"cat/{level}").mkdir()
    for level in range(29):
        for name in ("x", "y"):
            (two / f"cat/{level}/{name}").symlink_to(two / f"cat/{level + 1}")
    assert _read(two) == 10
    assert len(load_dataset(str(two)).left_out) == 58 + 1


def test_test_images_never_link_to_training_images(tmp_path):
    _classes(tmp_path / "train", "cat", "dog")
    (tmp_path / "test").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "test" / name).symlink_to(tmp_path / "train" / name)
    data = load_dataset(str(tmp_path))
    assert (len(data.train), len(data.test)) == (8, 2)
    assert len(data.left_out) == 2


@pytest.mark.parametrize("name", ["gone.png", "gone", "gone.txt"])
def test_a_broken_link_is_named(two, name):
    (two / "cat" / name).symlink_to("/nonexistent/gone.png")
    (two / "owl").symlink_to("/nonexistent")
    assert _read(two) == 10
    assert load_dataset(str(two)).left_out[-1].endswith("which does not exist")
    assert len(load_dataset(str(two)).left_out) == 2


def test_what_is_no_file_is_never_opened(two):
    os.mkfifo(two / "cat/pipe.png")
    os.mkfifo(two / "cat/pipe")
    assert load_dataset(str(two)).left_out == (
        "cat/pipe.png: no regular file",
        "cat/pipe: no regular file",
    )


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no POSIX permissions to forbid a file by")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cat", "the folder {}/cat cannot be read: Permission denied"),
        ("cat/0.png", "cannot decode the image {}/cat/0.png: [Errno 13] Permission denied"),
        ("cat/notes", "cat/notes: cannot be read: Permission denied"),
    ],
)
def test_what_may_not_be_read_is_named(name, words):
    # Where this is root, as another user, to whom permissions mean something; and outside what
    # pytest keeps private.
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        root = Path(place).resolve() / "site"
        _classes(root, "cat", "dog")
        (root / "cat/notes").write_text("x")
        (root / name).chmod(0)
        code = (
            f"import os; from fedveil.data import load_dataset; from PIL import Image\n"
            f"from fedveil.errors import FedveilError\n"
            f"Image.init(); os.geteuid() or os.setuid(65534)\n"
            f"try: print(load_dataset({str(root)!r}).left_out)\n"
            f"except FedveilError as error: print(error)"
        )
        cache = {"FEDVEIL_CACHE": f"{place}/none"}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **cache},
            capture_output=True,
            text=True,
        )
        assert words.format(root) in done.stdout, done.stderr


# Splits and classes


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("Train", "Test"),
        ("train", "testing"),
        ("Training", "Testing"),
        ("TRAIN", "VAL"),
        ("train", "Valid"),
        ("train", "validation"),
        ("train_set", "test_set"),
        ("TrainImages", "TestImages"),
        ("training data", "validation data"),
        ("trainset", "testset"),
        ("1-train", "2-eval"),
        ("train", "dev"),
    ],
)
def test_splits_are_known_in_folders_and_in_names_of_tables(tmp_path, train, test):
    _classes(tmp_path / "images" / train, "cat", "dog", count=4)
    _classes(tmp_path / "images" / test, "cat", "dog", count=3)
    for place in ("{}.parquet", "{}-00000-of-00001.parquet", "data/{}/part-0.parquet", "x_{}.pq"):
        root = tmp_path / place.format("tables").replace("/", "-")
        write_parquet(root / place.format(train), random_pngs(8, (6, 6)), [0, 1] * 4)
        write_parquet(root / place.format(test), random_pngs(6, (6, 6)), [0, 1] * 3)
        data = load_dataset(str(root))
        assert (len(data.train), len(data.test)) == (8, 6), place
    data = load_dataset(str(tmp_path / "images"))
    assert (data.classes, len(data.train), len(data.test)) == (("cat", "dog"), 8, 6)


@pytest.mark.parametrize("ending", ["png", "parquet"])
def test_of_several_held_out_splits_the_best_is_taken_and_the_other_named(tmp_path, ending):
    for split, count in (("train", 8), ("val", 6), ("test", 4)):
        if ending == "png":
            _classes(tmp_path / split, "cat", "dog", count=count // 2)
        else:
            images = random_pngs(count, (6, 6))
            write_parquet(tmp_path / f"{split}.parquet", images, [0, 1] * (count // 2))
    data = load_dataset(str(tmp_path))
    assert (len(data.train), len(data.test)) == (8, 4)
    assert len(data.left_out) == (6 if ending == "png" else 1)
    assert all(one.startswith("val") for one in data.left_out)


@pytest.mark.parametrize(
    "names",
    [("train", "test"), ("Training", "plane"), ("test", "val"), ("train", "bus", "plane")],
)
def test_classes_that_may_be_splits_are_asked_about(tmp_path, names):
    _classes(tmp_path, *names)
    with pytest.raises(FedveilError, match=f"{tmp_path}@splits.*{tmp_path}@classes"):
        load_dataset(str(tmp_path))
    data = load_dataset(f"{tmp_path}@classes")
    assert data.classes == tuple(sorted(names))
    assert len(data.train) + len(data.test) == 5 * len(names)
    own = load_own_images(f"{tmp_path}@classes", classes=data.classes, shape=data.shape)
    assert len(own) == 5 * len(names)
    assert len(load_dataset(f"{tmp_path}@classes@1/5").test) > 0


def test_splits_beside_other_folders_are_asked_about(tmp_path):
    _classes(tmp_path / "train", "cat", "dog")
    _classes(tmp_path / "test", "cat", "dog", count=2)
    _classes(tmp_path, "backup", count=1)
    with pytest.raises(FedveilError, match="may be splits or classes"):
        load_dataset(str(tmp_path))
    data = load_dataset(f"{tmp_path}@splits")
    assert (data.classes, len(data.train), len(data.test)) == (("cat", "dog"), 10, 4)
    assert data.left_out == ("backup/0.png: not in train or test",)
    # The same files in another layout are another dataset, whatever the cache holds.
    assert load_dataset(f"{tmp_path}@classes").classes == ("backup", "test", "train")


def test_splits_below_the_classes_are_refused(tmp_path):
    for name in ("cat", "dog"):
        _classes(tmp_path / name, "train", "test")
    with pytest.raises(FedveilError, match="put them above the classes"):
        load_dataset(str(tmp_path))
    assert load_dataset(f"{tmp_path}@classes").classes == ("cat", "dog")


def test_one_class_among_several_may_be_called_test(tmp_path):
    _classes(tmp_path, "blood", "test", "urine")
    assert load_dataset(str(tmp_path)).classes == ("blood", "test", "urine")


@pytest.mark.parametrize(("layout", "words"), [("splits", "0 sub-folders"), ("classes", None)])
def test_a_layout_that_does_not_fit_is_refused(two, layout, words):
    if words is None:
        assert load_dataset(f"{two}@{layout}").classes == ("cat", "dog")
    else:
        with pytest.raises(FedveilError, match=words):
            load_dataset(f"{two}@{layout}")


def test_a_layout_is_for_folders(tmp_path):
    with pytest.raises(FedveilError, match="'digits' is no folder here"):
        load_dataset("digits@classes")


# Tables beside images


def test_tables_without_images_are_left_out_beside_classes(two):
    pq.write_table(pa.table({"file_name": ["cat/0.png"]}), two / "metadata.parquet")
    pq.write_table(
        pa.table({"id": ["x"], "embedding": pa.array([b"x"], pa.binary())}), two / "vectors.parquet"
    )
    assert _read(two) == 10
    assert load_dataset(str(two)).left_out == (
        "metadata.parquet: a table without images or labels",
        "vectors.parquet: a table without images or labels",
    )


def test_images_are_named_that_lie_beside_tables_of_images(tmp_path):
    write_parquet(tmp_path / "train.parquet", random_pngs(10, (6, 6)), [0, 1] * 5)
    pq.write_table(pa.table({"note": ["x"]}), tmp_path / "notes.parquet")
    _image(tmp_path / "assets/logo.png")
    (tmp_path / "README.md").write_text("x")
    for _ in ("decoded", "from the cache"):
        assert load_dataset(str(tmp_path)).left_out == (
            "assets/logo.png: beside tables of images",
            "README.md: no image",
            "notes.parquet: a table without images or labels",
        )


# Who is told


def test_a_node_is_told_of_its_own_folder(two):
    (two / "cat/notes.txt").write_text("x")
    said = []
    load_own_images(str(two), classes=("cat", "dog"), shape=(3, 6, 6), tell=said.append)
    assert said == [f"{two}: 1 file left out: cat/notes.txt: no image"]


def test_a_stored_run_finds_its_folder_from_anywhere(two, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute_name("site") == str(two)
    assert absolute_name("./site@1/3") == f"{two}@1/3"
    assert absolute_name("site@classes@1/3") == f"{two}@classes@1/3"
    assert [absolute_name(name) for name in ("digits@1/3", "user/name", "no")] == [
        "digits@1/3",
        "user/name",
        "no",
    ]
    before = load_dataset("site").train.raw
    monkeypatch.chdir("/")
    assert torch.equal(load_dataset(absolute_name(str(two))).train.raw, before)
