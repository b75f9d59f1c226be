import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from fedveil.defenses import BlockDCT, transform_folder
from fedveil.errors import FedveilError


@pytest.fixture
def folder(tmp_path):
    src = tmp_path / "src"
    rng = np.random.default_rng(0)
    for name, shape in {
        "cats/a.png": (20, 30, 3),
        "cats/b.jpg": (16, 16, 3),
        "dogs/c.png": (8, 8),
    }.items():
        (src / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(src / name)
    (src / "notes.txt").write_text("not an image")
    return src


def test_writes_the_same_structure(folder, tmp_path):
    ticks = []
    count = transform_folder(
        folder, tmp_path / "out" / "dst", BlockDCT(keep=6), progress=lambda *at: ticks.append(at)
    )
    assert count == 3
    assert ticks == [(1, 3), (2, 3), (3, 3)]
    written = sorted(
        p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.*")
    )
    assert written == ["dst/cats/a.png", "dst/cats/b.png", "dst/dogs/c.png"]


def test_pixels_are_the_transformations(folder, tmp_path):
    transform = BlockDCT(keep=6)
    transform_folder(folder, tmp_path / "dst", transform)
    raw = torch.from_numpy(np.asarray(Image.open(folder / "cats/a.png")).copy())
    expected = transform(raw.permute(2, 0, 1)[None].float() / 255)[0].mul(255).round().clamp(0, 255)
    got = torch.from_numpy(np.asarray(Image.open(tmp_path / "dst/cats/a.png")).copy())
    assert torch.equal(got.permute(2, 0, 1).float(), expected)
    assert Image.open(tmp_path / "dst/dogs/c.png").mode == "L"


def test_nothing_half_written(folder, tmp_path):
    (folder / "zz.png").write_bytes(b"broken")
    with pytest.raises(FedveilError, match=r"zz\.png is no readable image"):
        transform_folder(folder, tmp_path / "dst", BlockDCT(keep=6))
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


def test_refusals(folder, tmp_path):
    transform = BlockDCT(keep=6)
    with pytest.raises(FedveilError, match="is not a folder"):
        transform_folder(tmp_path / "none", tmp_path / "dst", transform)
    with pytest.raises(FedveilError, match="lies inside"):
        transform_folder(folder, folder / "dst", transform)
    (tmp_path / "there").mkdir()
    with pytest.raises(FedveilError, match="exists already"):
        transform_folder(folder, tmp_path / "there", transform)
    with pytest.raises(FedveilError, match="holds no images"):
        transform_folder(tmp_path / "there", tmp_path / "dst", transform)
    Image.new("RGB", (8, 8)).save(folder / "cats" / "a.jpg")
    with pytest.raises(FedveilError, match="would both become"):
        transform_folder(folder, tmp_path / "dst", transform)


def test_command(folder, tmp_path):
    import typer

    from fedveil.cli.transform import transform

    app = typer.Typer()
    app.command()(transform)
    result = CliRunner().invoke(app, [str(folder), str(tmp_path / "dst"), "--keep", "21"])
    assert result.exit_code == 0, result.output
    assert "3 images" in result.output
