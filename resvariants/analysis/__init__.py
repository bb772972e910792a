"""Questions to trained networks: lesions, paths, layers' gradients and responses, deepening."""

from resvariants.analysis.deepening import deepen
from resvariants.analysis.lesions import (
    count_blocks,
    first_blocks,
    is_residual,
    make_errors,
    reordered,
    residual_scales,
    swapped,
    without,
)
from resvariants.analysis.paths import make_path_gradients
from resvariants.analysis.responses import by_layer, make_layer_gradients, make_layer_responses

__all__ = [
    "by_layer",
    "count_blocks",
    "deepen",
    "first_blocks",
    "is_residual",
    "make_errors",
    "make_layer_gradients",
    "make_layer_responses",
    "make_path_gradients",
    "reordered",
    "residual_scales",
    "swapped",
    "without",
]
