"""Every parser of what comes from outside, and what it is fed with."""

import io
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from tests.fuzz.mutations import Mutate, compose, flip, in_turn, regrow, retext, rezip

Seeds = Callable[[], list[bytes]]
Parse = Callable[[bytes, Path], object]


@dataclass(frozen=True)
class Target:
    """One parser.

    Attributes:
        name: What it reads.
        count: Inputs at scale 1.
        seeds: Well-formed inputs to start from.
        mutate: Makes an input of them.
        parse: Feeds it to the parser; has an empty folder for files.
    """

    name: str
    count: int
    seeds: Seeds
    mutate: Mutate
    parse: Parse


# What is fed

_SETTINGS = b"""dataset = "digits"
clients = 10
fraction = 0.5
rounds = 3
learning-rate = 0.1
strategy = "noise-delta"
cap = 0.6
partition = "shards:2"
noise = "all"
sigma_start = 0.1
workers = 2
seed = 7
"""


def _config_seeds() -> list[bytes]:
    from fedveil.runs.config import TrainConfig

    return [
        json.dumps({"configuration": TrainConfig(**changes).model_dump(), "versions": {}}).encode()
        for changes in ({}, {"strategy": "fedavg", "clip": 1.0}, {"noise": "all", "workers": 2})
    ]


def _round_seeds() -> list[bytes]:
    line = {
        "round": 1,
        "accuracy": 0.5,
        "copies": [0.1, 0.2],
        "sigma": 0.1,
        "calibration_evaluations": 2,
        "calibration_images": 100,
        "calibration_seconds": 0.1,
        "seconds": 1.0,
        "loss": 0.3,
        "clients": [1, 2],
        "refused": ["node 3: NaN"],
    }
    return ["".join(json.dumps({**line, "round": n}) + "\n" for n in (1, 2)).encode()]


def _tensors() -> dict[str, Any]:
    import torch

    return {"w/a": torch.zeros(2, 3), "base/a": torch.ones(2, 3), "w/b": torch.zeros(2)}


def _run_checkpoint_seeds() -> list[bytes]:
    from safetensors.torch import save

    states = ('{"round": 2, "sigma": 0.5, "noisy": true}', '{"round": 0, "sigma": 0, "noisy": 0}')
    return [save(_tensors(), metadata={"state": state}) for state in states]


_OPERATOR = "c3" * 32 + "\n"


def _sealed_run(folder: Path) -> None:
    """Write the secrets and the archive of an encrypted run, the same bytes each time."""
    import torch

    from fedveil.copies.noise import NoiseKey
    from fedveil.runs.archive import Archive, Entry
    from fedveil.runs.secrets import RunSecrets
    from fedveil.sealing import OperatorKey

    key = NoiseKey(b"\x07" * 32)
    run = RunSecrets(folder)
    with patch("fedveil.sealing.secrets.token_bytes", lambda count: b"\x09" * count):
        run.keep(key, OperatorKey(folder / "operator.key", bytes.fromhex(_OPERATOR)))
        for name, content in zip(_SEALED, (_run_checkpoint_seeds()[0], b"weights"), strict=True):
            run.path(name).write_bytes(run.closed(name, content))
        Archive.create(folder, key).write(Entry(1, ({"a": torch.zeros(2)},), {0: 0, 3: 0}))


_SEALED = ("checkpoint.safetensors", "model.safetensors")
_SEALED_FILES = ("noise.key.enc", *(f"{name}.enc" for name in _SEALED), "archive/000001.enc")


def _sealed_seeds() -> list[bytes]:
    with tempfile.TemporaryDirectory() as scratch, _operator(Path(scratch)):
        _sealed_run(Path(scratch))
        return [
            f"{name}\n".encode() + (Path(scratch) / name).read_bytes() for name in _SEALED_FILES
        ]


def _reply_seeds() -> list[bytes]:
    from flwr.app import ArrayRecord

    arrays = [
        {
            "name": name,
            "dtype": array.dtype,
            "shape": array.shape,
            "stype": array.stype,
            "data": array.data.decode("latin-1"),
        }
        for name, array in ArrayRecord(_expected()).items()
    ]
    metrics = {"num-examples": 7, "loss": 0.5, "server-round": 1}
    return [json.dumps({"arrays": arrays, "metrics": metrics}).encode()]


def _expected() -> dict[str, Any]:
    import torch

    return {"a": torch.zeros(3, 2), "b": torch.zeros((), dtype=torch.int64)}


def _net() -> Any:
    from torch import nn

    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2, 2))


def _safetensors_seeds() -> list[bytes]:
    from safetensors.torch import save

    return [save(_net().state_dict()), save(_tensors())]


def _pt_seeds() -> list[bytes]:
    import torch

    seeds = []
    for content in (_net().state_dict(), {"a": torch.zeros(1), "b": "text"}, [1, 2]):
        for zipped in (True, False):
            buffer = io.BytesIO()
            torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
            seeds.append(buffer.getvalue())
    return seeds


_FORMATS = {"jpg": "JPEG", "jfif": "JPEG", "jp2": "JPEG2000", "tif": "TIFF"} | {
    **dict.fromkeys(("pgm", "pfm"), "PPM"),
    **dict.fromkeys(("dat", "raw"), "PNG"),
}


def _pictures() -> dict[str, bytes]:
    from PIL import Image

    random = np.random.default_rng(0)
    grey = Image.fromarray(random.integers(0, 256, (6, 5), dtype=np.uint8))
    colour = Image.fromarray(random.integers(0, 256, (6, 5, 3), dtype=np.uint8))
    wide = Image.fromarray(random.integers(0, 2**16, (6, 5), dtype=np.uint16))
    floating = Image.fromarray(random.random((6, 5), dtype=np.float32))
    alpha = Image.fromarray(random.integers(0, 256, (6, 5, 2), dtype=np.uint8))
    palette = grey.copy()
    palette.putpalette(random.integers(0, 256, 768, dtype=np.uint8).tobytes())
    turned = Image.Exif()
    turned[0x0112] = 6
    made = {}
    for suffix, image in (
        *(("png", grey), ("jpg", colour), ("gif", grey), ("bmp", colour), ("webp", colour)),
        *(("tiff", wide), ("ppm", colour), ("pgm", grey), ("jfif", colour), ("jp2", colour)),
        *(("avif", colour), ("tif", floating), ("pfm", floating), ("dat", alpha), ("raw", palette)),
    ):
        buffer = io.BytesIO()
        kind = _FORMATS.get(suffix, suffix.upper())
        options = {"transparency": 3} if image is palette else {}
        tagged = {"exif": turned} if kind in ("PNG", "JPEG", "TIFF", "WEBP") else {}
        image.save(buffer, format=kind, **options, **tagged)
        made[suffix] = buffer.getvalue()
    return made


def _parquet_seeds() -> list[bytes]:
    import datasets
    import pyarrow as pa
    from pyarrow import parquet

    image = _pictures()["png"]
    rows = [{"image": {"bytes": image, "path": None}, "label": n % 2} for n in range(6)]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    table = datasets.Dataset.from_list(rows, features=features).with_format("arrow")[:]
    plain = pa.table({"image": [image] * 4, "label": ["x", "y", "x", "y"]})
    seeds = []
    others = pa.table(
        {
            "mask": pa.array([{"bytes": image, "path": "img/0.png"}] * 4),
            "image": pa.array([image] * 4, pa.binary_view()),
            "meta": pa.array([[("site", 1)]] * 4, pa.map_(pa.string(), pa.int32())),
            "label": pa.array(["x", "y", "x", "y"]).dictionary_encode(),
        }
    )
    large = pa.table({"img": pa.array([image] * 4, pa.large_binary()), "class": [0.0, 1.0] * 2})
    for content, codec in (
        *((table, "snappy"), (plain, "none"), (plain, "zstd"), (table, "gzip")),
        *((others, "none"), (large, "none")),
    ):
        buffer = io.BytesIO()
        parquet.write_table(content, buffer, compression=codec)
        seeds.append(buffer.getvalue())
    return seeds


def _report_seeds(name: str) -> list[bytes]:
    from tests.report import report_material as material

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "it"
        make = {
            "leakage.json": lambda place: material.make_leakage(
                place, membership=[material.membership_row()]
            ),
            "reconstructions.npz": material.make_leakage,
            "theft.json": material.make_theft,
            "frontier.json": material.make_frontier,
            "egress.json": material.make_egress,
            "sums.json": material.make_sums,
        }.get(name, material.make_run)
        make(folder)
        return [(folder / name).read_bytes()]


def _bombs() -> list[bytes]:
    """Small inputs that unpack to many gigabytes or nest without end, each behind its parser."""
    import pyarrow as pa
    import torch
    from PIL import Image
    from pyarrow import parquet

    large = io.BytesIO()
    Image.new("L", (13_000, 13_000)).save(large, format="PNG")
    many = io.BytesIO()
    Image.new("L", (8_000, 8_000)).save(many, format="PNG")
    repeated = io.BytesIO()
    value = pa.DictionaryArray.from_arrays(pa.array([0] * 2_000), pa.array([bytes(2**26)]))
    labels = pa.array([0, 1] * 1_000)
    parquet.write_table(
        pa.table({"image": value, "label": labels}), repeated, dictionary_pagesize_limit=2**28
    )
    rows = io.BytesIO()
    long = pa.DictionaryArray.from_arrays(pa.array(np.zeros(3 * 10**7, np.int8)), pa.array([b""]))
    parquet.write_table(pa.table({"image": long, "label": long}), rows)
    weights = io.BytesIO()
    torch.save({"0.weight": torch.zeros(2**22)}, weights)
    with (
        zipfile.ZipFile(weights) as stored,
        zipfile.ZipFile(packed := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for name in stored.namelist():
            small.writestr(name, stored.read(name))
    archive = io.BytesIO()
    np.savez_compressed(
        archive, **{k: np.zeros((2**17, 3, 16, 16), np.float32) for k in ("originals",)}
    )
    return [
        b"image\n" + large.getvalue(),
        b"images\n" + many.getvalue(),
        b"parquet\n" + repeated.getvalue(),
        b"parquet\n" + rows.getvalue(),
        b"pt\n" + packed.getvalue(),
        b"npz\n" + archive.getvalue(),
        b"toml\na = " + b"[" * 10**6,
        b"json\n" + b"[" * 10**6,
        b"json\n" + b'{"rows":' * 10**5,
    ]


# What is fed with it


def _bomb(content: bytes, folder: Path) -> object:
    from fedveil.data.folders import folder as read_folder

    kind, _, rest = content.partition(b"\n")
    match kind:
        case b"image":
            return _images(b"png\n" + rest, folder)
        case b"images":
            for name in ("a", "b"):
                (folder / name).mkdir()
                first = _put(folder / name / "0.png", rest)
                for number in range(1, 2_000):
                    (folder / name / f"{number}.png").hardlink_to(first)
            return read_folder(folder).read()
        case b"parquet":
            return _parquet(rest, folder)
        case b"pt":
            return _weights(".pt")(rest, folder)
        case b"npz":
            return _report("reconstructions.npz")(rest, folder)
        case b"toml":
            return _toml(rest, folder)
    return _report("theft.json")(rest, folder)


def _toml(content: bytes, folder: Path) -> object:
    from fedveil.runs.config import TrainConfig

    return TrainConfig.read(_put(folder / "settings.toml", content))


def _config(content: bytes, folder: Path) -> object:
    from fedveil.runs.directory import RunDirectory

    _put(folder / "config.json", content)
    return RunDirectory.open(folder).config


def _rounds(content: bytes, folder: Path) -> object:
    from fedveil.runs.directory import RunDirectory

    _put(folder / "rounds.jsonl", content)
    return RunDirectory(folder).rounds()


def _run_checkpoint(content: bytes, folder: Path) -> object:
    from fedveil.runs.directory import RunDirectory

    _put(folder / "checkpoint.safetensors", content)
    return RunDirectory(folder).checkpoint()


def _noise_key(content: bytes, folder: Path) -> object:
    from fedveil.copies.noise import NoiseKey

    return NoiseKey.load(_put(folder / "noise.key", content))


@contextmanager
def _operator(folder: Path) -> Iterator[None]:
    """Give the operator's key, as a user does."""
    from fedveil.sealing import KEY_FILE

    path = folder / "operator.key"
    path.touch(mode=0o600)
    path.write_text(_OPERATOR)
    with patch.dict(os.environ, {KEY_FILE: str(path)}):
        yield


def _sealed(content: bytes, folder: Path) -> object:
    from fedveil.runs.archive import Archive
    from fedveil.runs.directory import RunDirectory

    name, _, damaged = content.partition(b"\n")
    with _operator(folder):
        _sealed_run(folder)
        if name.decode("latin-1") in _SEALED_FILES:
            _put(folder / name.decode(), damaged)
        run = RunDirectory(folder)
        entry = Archive.open(folder, run.noise_key()).read(1)
        return entry, run.checkpoint(), run.secrets.read(_SEALED[1])


def _operator_key(content: bytes, folder: Path) -> object:
    from fedveil.sealing import OperatorKey

    path = folder / "operator.key"
    path.touch(mode=0o600)
    return OperatorKey.read(_put(path, content), option="--key")


def _reply(content: bytes, folder: Path) -> object:
    from fedveil.errors import FedveilError
    from fedveil.federation.replies import read_replies
    from fedveil.federation.roster import Client

    try:
        reply = _message(content)
    except Exception as error:  # what Flower itself does not let a client say
        raise FedveilError(f"no message: {type(error).__name__}") from None
    updates, refusals = read_replies(
        [reply], asked={5: Client(0, 5, 9)}, expected=_expected(), round_number=1
    )
    for update in updates:
        assert 0 < update.examples <= 9
        for name, value in _expected().items():
            assert update.weights[name].shape == value.shape
            assert update.weights[name].isfinite().all()
    if refusals:
        raise FedveilError(refusals[0].reason)
    return updates


def _message(content: bytes) -> Any:
    from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 0
    said = json.loads(content)
    arrays = ArrayRecord()
    for array in said["arrays"]:
        data = array["data"].encode("latin-1")
        arrays[array["name"]] = Array(array["dtype"], tuple(array["shape"]), array["stype"], data)
    records = RecordDict({"arrays": arrays, "metrics": MetricRecord(said["metrics"])})
    reply = Message(records, dst_node_id=5, message_type="train")
    reply.metadata.__dict__["_src_node_id"] = 5
    return reply


def _weights(suffix: str) -> Parse:
    def parse(content: bytes, folder: Path) -> object:
        from fedveil.runs.state_files import load_checkpoint

        return load_checkpoint(_net(), _put(folder / f"weights{suffix}", content))

    return parse


def _parquet(content: bytes, folder: Path) -> object:
    from fedveil.data.folders import folder as read_folder

    _put(folder / "train-0.parquet", content)
    return read_folder(folder).read()


def _images(content: bytes, folder: Path) -> object:
    from fedveil.data.folders import folder as read_folder

    kind, _, picture = content.partition(b"\n")
    suffix = kind.decode("ascii", "ignore").strip() or "png"
    for name in ("a", "b"):
        (folder / name).mkdir(exist_ok=True)
        _put(folder / name / f"0.{suffix if suffix.isalnum() else 'png'}", picture)
    return read_folder(folder).read()


def _transform(content: bytes, folder: Path) -> object:
    from torch import nn

    from fedveil.defenses import transform_folder

    (folder / "src").mkdir(exist_ok=True)
    _put(folder / "src" / "0.png", content.partition(b"\n")[2])
    return transform_folder(folder / "src", folder / "dst", nn.Identity())


def _defense(content: bytes, folder: Path) -> object:
    from fedveil.defenses import parse_defense

    return parse_defense(content.decode("utf-8", "surrogateescape"))


def _partition(content: bytes, folder: Path) -> object:
    from fedveil.data import parse_partition

    return parse_partition(content.decode("utf-8", "surrogateescape"))


def _dataset(content: bytes, folder: Path) -> object:
    from fedveil.data import load_dataset

    name = content.decode("utf-8", "surrogateescape")
    # A well-formed hub name is a question to the network, not to a parser.
    return load_dataset(name.replace("/", "∕") if "@" not in name else name)


def _report(name: str) -> Parse:
    def parse(content: bytes, folder: Path) -> object:
        from fedveil.report import build_page, read_artifacts
        from tests.report import report_material as material

        place = folder / "it"
        if name in ("leakage.json", "reconstructions.npz"):
            material.make_leakage(place, arrays=False)
        elif name in ("summary.json", "rounds.jsonl"):
            material.make_run(place)
        else:
            place.mkdir()
        _put(place / name, content)
        page = build_page(read_artifacts([folder]), title="fuzz", now=datetime.now(UTC))
        return page.encode()

    return parse


def _put(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def targets() -> dict[str, Target]:
    """Return every target by name; 145,040 inputs in all."""
    kinds = [f"{suffix}\n".encode() + content for suffix, content in _pictures().items()]
    report = [
        Target(
            f"report-{name.partition('.')[0]}",
            count,
            lambda n=name: _report_seeds(n),
            how,
            _report(name),
        )
        for name, count, how in (
            ("summary.json", 3_000, regrow),
            ("rounds.jsonl", 3_000, regrow),
            ("leakage.json", 4_000, regrow),
            ("theft.json", 4_000, regrow),
            ("frontier.json", 4_000, regrow),
            ("egress.json", 4_000, regrow),
            ("sums.json", 4_000, regrow),
            ("reconstructions.npz", 3_000, rezip),
        )
    ]
    found = [
        Target("toml", 14_000, lambda: [_SETTINGS], retext, _toml),
        Target("config", 12_000, _config_seeds, regrow, _config),
        Target("rounds", 10_000, _round_seeds, regrow, _rounds),
        Target("run-checkpoint", 8_000, _run_checkpoint_seeds, flip, _run_checkpoint),
        Target("noise-key", 2_000, lambda: [b"ab" * 32 + b"\n"], retext, _noise_key),
        Target("operator-key", 2_000, lambda: [_OPERATOR.encode()], retext, _operator_key),
        Target("sealed", 6_000, _sealed_seeds, flip, _sealed),
        Target("reply", 12_000, _reply_seeds, regrow, _reply),
        Target("safetensors", 8_000, _safetensors_seeds, flip, _weights(".safetensors")),
        Target("pt", 6_000, _pt_seeds, flip, _weights(".pt")),
        Target("pt-members", 2_000, lambda: _pt_seeds()[::2], rezip, _weights(".pt")),
        Target("parquet", 8_000, _parquet_seeds, flip, _parquet),
        Target("images", 14_000, lambda: kinds, flip, _images),
        Target("transform", 3_000, lambda: kinds, flip, _transform),
        Target(
            "defense",
            8_000,
            lambda: [b"dct:keep=21", b"dct:cutoff=0.5,block=4", b"none"],
            compose("dct", "none", "keep", "cutoff", "block", "chroma_keep", "8", "21"),
            _defense,
        ),
        Target(
            "partition",
            6_000,
            lambda: [b"iid", b"dirichlet:0.5", b"shards:2"],
            compose("iid", "dirichlet", "shards", "2", "0.5"),
            _partition,
        ),
        Target(
            "dataset",
            3_000,
            lambda: [b"digits@1/5", b"digits", b"./none"],
            compose("digits", "1", "2", "10", "."),
            _dataset,
        ),
        Target("bombs", 40, _bombs, in_turn, _bomb),
        *report,
    ]
    return {target.name: target for target in found}
