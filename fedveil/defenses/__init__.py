"""What protects: image transformations, update sanitisers, degraded model copies."""

from fedveil.defenses.block_dct import BlockDCT, dct_matrix, zigzag_mask
from fedveil.defenses.defense import Defense
from fedveil.defenses.dp_sgd import DPSGD
from fedveil.defenses.filters import JPEG, DownSampling, GaussianBlur
from fedveil.defenses.folder import transform_folder
from fedveil.defenses.protocol import Metadata, Sanitizer, Transformation
from fedveil.defenses.random_block_dct import RandomBlockDCT
from fedveil.defenses.sanitizers import Clipping, GaussianNoise, Pruning
from fedveil.defenses.soteria import Soteria
from fedveil.defenses.specs import DEFENSES, check_defense, parse_defense

__all__ = [
    "DEFENSES",
    "DPSGD",
    "JPEG",
    "BlockDCT",
    "Clipping",
    "Defense",
    "DownSampling",
    "GaussianBlur",
    "GaussianNoise",
    "Metadata",
    "Pruning",
    "RandomBlockDCT",
    "Sanitizer",
    "Soteria",
    "Transformation",
    "check_defense",
    "dct_matrix",
    "parse_defense",
    "transform_folder",
    "zigzag_mask",
]
