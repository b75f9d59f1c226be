"""A transformed copy of an image folder, for sites that cannot enforce what an app does."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from fedveil.data.decode import DAMAGE, Remarks, read_image, reason
from fedveil.data.files import SUFFIXES, in_words, list_files, told
from fedveil.data.source import LeftOut
from fedveil.errors import FedveilError

_MOST_PIXELS = 2**26

Progress = Callable[[int, int], None]


def transform_folder(
    src: Path,
    dst: Path,
    transform: nn.Module,
    *,
    progress: Progress = lambda done, total: None,
    tell: Callable[[str], None] = lambda sentence: None,
) -> int:
    """Write a transformed copy of every image below ``src`` into ``dst``, as PNG.

    Folders keep their names, and so classes and splits; a file keeps its name with the suffix
    ``.png``. Images are read as training reads them (``fedveil.data.decode.read_image``), so that
    training on the copy sees T(x) rounded to 8 bits; no metadata of theirs, a thumbnail or a
    profile for instance, gets into it. ``dst`` appears only when it is complete.

    Args:
        src: Folder of images, nested at will.
        dst: Folder to make; must not exist.
        transform: Float [1, C, H, W] in [0, 1] to the same shape; its result is clipped and
            rounded to 8 bits.
        progress: Called with (images done, images in all).
        tell: Told in a sentence each which files are not in the copy, and how images were read.

    Returns:
        Number of images written.

    Raises:
        FedveilError: No folder or no images at ``src``, ``dst`` exists or lies inside ``src``, two
            files that would get one name, or a file that is no readable image.
    """
    files, left_out = _plan(src, dst)
    if left_out:
        tell(told(left_out))
    remarks = Remarks()
    dst.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{dst.name}-", dir=dst.parent))
    try:
        for done, (relative, source) in enumerate(files.items(), start=1):
            target = scratch / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            _write(target, transform(_read(source, remarks)))
            progress(done, len(files))
        for sentence in remarks.told():
            tell(sentence)
        scratch.chmod(0o755)
        scratch.rename(dst)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return len(files)


def _plan(src: Path, dst: Path) -> tuple[dict[Path, Path], tuple[str, ...]]:
    if not src.is_dir():
        raise FedveilError(f"{src} is not a folder; give a folder of images")
    if dst.exists():
        raise FedveilError(f"{dst} exists already; remove it or name another folder")
    if dst.resolve().is_relative_to(src.resolve()):
        raise FedveilError(f"{dst} lies inside {src}; name a folder outside it")
    listing, files = list_files(src), dict[Path, Path]()
    for path in listing.images:
        relative = _png(path.relative_to(listing.root))
        if relative in files:
            raise FedveilError(
                f"{files[relative]} and {path} would both become {relative}; rename one of them"
            )
        files[relative] = path
    if not files:
        tables = " but tables, whose images are not transformed" if listing.tables else ""
        raise FedveilError(
            f"{src} holds no images{tables}; known suffixes are {', '.join(sorted(SUFFIXES))}"
        )
    tables_too = [LeftOut(table, "a table") for table in listing.tables]
    return files, in_words(tables_too + listing.left_out, listing.root)


def _png(path: Path) -> Path:
    # A name without an image's suffix may have a dot all the same: scan.2024-01.
    known = path.suffix.lower() in SUFFIXES
    return path.with_suffix(".png") if known else path.with_name(path.name + ".png")


def _read(path: Path, remarks: Remarks) -> Tensor:
    try:
        picture = read_image(path, most=_MOST_PIXELS)
    except DAMAGE as error:
        raise FedveilError(
            f"{path} is no readable image ({reason(error)}); remove it or mend it"
        ) from error
    remarks.note(str(path), picture)
    tensor = torch.from_numpy(picture.pixels.copy()).float().div_(255)
    return (tensor[None] if tensor.ndim == 2 else tensor.permute(2, 0, 1))[None]


def _write(path: Path, image: Tensor) -> None:
    from PIL import Image

    raw = image[0].mul(255).round().clamp(0, 255).to(torch.uint8)
    pixels = raw[0] if len(raw) == 1 else raw.permute(1, 2, 0)
    Image.fromarray(pixels.contiguous().numpy()).save(path)
