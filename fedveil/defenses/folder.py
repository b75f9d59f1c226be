"""A transformed copy of an image folder, for sites that cannot enforce what an app does."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from fedveil.data.decode import DAMAGE, read_image, reason
from fedveil.data.files import SUFFIXES, list_images
from fedveil.errors import FedveilError

_MOST_PIXELS = 2**26

Progress = Callable[[int, int], None]


def transform_folder(
    src: Path,
    dst: Path,
    transform: nn.Module,
    *,
    progress: Progress = lambda done, total: None,
    on_left_out: Callable[[tuple[str, ...]], None] = lambda left_out: None,
) -> int:
    """Write a transformed copy of every image below ``src`` into ``dst``, as PNG.

    Folders keep their names; a file keeps its name with the suffix ``.png``. Images are read as
    training reads them (``fedveil.data.decode.read_image``), so that training on the copy sees
    T(x) rounded to 8 bits; no metadata of theirs, a thumbnail for instance, gets into it. ``dst``
    appears only when it is complete.

    Args:
        src: Folder of images, nested at will.
        dst: Folder to make; must not exist.
        transform: Float [1, C, H, W] in [0, 1] to the same shape; its result is clipped and
            rounded to 8 bits.
        progress: Called with (images done, images in all).
        on_left_out: Called once with the files that are no images, each with the reason, if any.

    Returns:
        Number of images written.

    Raises:
        FedveilError: No folder or no images at ``src``, ``dst`` exists or lies inside ``src``, two
            files that would get one name, or a file that is no readable image.
    """
    files, left_out = _plan(src, dst)
    if left_out:
        on_left_out(left_out)
    dst.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{dst.name}-", dir=dst.parent))
    try:
        for done, (relative, source) in enumerate(files.items(), start=1):
            target = scratch / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            _write(target, transform(_read(source)))
            progress(done, len(files))
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
    listing, files = list_images(src), dict[Path, Path]()
    for path in listing.images:
        relative = path.relative_to(src).with_suffix(".png")
        if relative in files:
            raise FedveilError(
                f"{files[relative]} and {path} would both become {relative}; rename one of them"
            )
        files[relative] = path
    if not files:
        raise FedveilError(
            f"{src} holds no images; known suffixes are {', '.join(sorted(SUFFIXES))}"
        )
    return files, listing.left_out


def _read(path: Path) -> Tensor:
    try:
        pixels = read_image(path, most=_MOST_PIXELS)
    except DAMAGE as error:
        raise FedveilError(
            f"{path} is no readable image ({reason(error)}); remove it or mend it"
        ) from error
    tensor = torch.from_numpy(pixels.copy()).float().div_(255)
    return (tensor[None] if tensor.ndim == 2 else tensor.permute(2, 0, 1))[None]


def _write(path: Path, image: Tensor) -> None:
    from PIL import Image

    raw = image[0].mul(255).round().clamp(0, 255).to(torch.uint8)
    pixels = raw[0] if len(raw) == 1 else raw.permute(1, 2, 0)
    Image.fromarray(pixels.contiguous().numpy()).save(path)
