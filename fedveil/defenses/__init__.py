"""What protects: image transformations, update sanitisers, degraded model copies."""

from fedveil.defenses.block_dct import BlockDCT, dct_matrix, zigzag_mask
from fedveil.defenses.folder import transform_folder
from fedveil.defenses.specs import Defense, parse_defense

__all__ = [
    "BlockDCT",
    "Defense",
    "dct_matrix",
    "parse_defense",
    "transform_folder",
    "zigzag_mask",
]
