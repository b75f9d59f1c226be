"""``fedveil transform``: a transformed copy of an image folder."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from fedveil.errors import FedveilError
from fedveil.wording import quantity


def transform(
    src: Annotated[Path, typer.Argument(help="Folder of images, nested at will.")],
    dst: Annotated[Path, typer.Argument(help="Folder to make; must not exist.")],
    keep: Annotated[
        int | None,
        typer.Option(help="Keep the first so many DCT coefficients (zigzag) of a block."),
    ] = None,
    cutoff: Annotated[
        float | None, typer.Option(help="Or those below this share of the Nyquist frequency.")
    ] = None,
    block: Annotated[int, typer.Option(help="Side of a block in pixels.")] = 8,
) -> None:
    """Write a copy of an image folder without its high spatial frequencies, as PNG."""
    if (keep is None) == (cutoff is None):
        raise FedveilError("give either --keep N or --cutoff SHARE: what is kept of a block")
    from fedveil.defenses import BlockDCT, transform_folder

    module = BlockDCT(keep=keep, cutoff=cutoff, block=block)
    console = Console()
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("transforming")
        count = transform_folder(
            src,
            dst,
            module,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            tell=lambda sentence: bar.console.print(f"{src}: {sentence}", markup=False),
        )
    console.print(f"{quantity(count, 'image')} written to {dst}")
