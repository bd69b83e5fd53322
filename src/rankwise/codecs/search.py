"""ComPEFT's scalar by search: the decoded adapter is scored at each α of a grid, and the best α is what is stored."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from rankwise.errors import OptionError

if TYPE_CHECKING:
    from rankwise.codecs.compeft import ComPEFT

#: the paper's grids (arXiv:2311.13171); its data-free rule is the codec's default, k = 0.2 and α = 1
ALPHAS = (0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)
DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.5)


@dataclasses.dataclass(frozen=True)
class CodecSearch:
    """The best codec, and every (density, alpha, score) that was tried, in order."""

    codec: ComPEFT
    tried: tuple[tuple[float, float, float], ...]


def search(
    codec: ComPEFT,
    tensors: Mapping[str, Tensor],
    score: Callable[[dict[str, Tensor]], float],
    *,
    alphas: Sequence[float] = ALPHAS,
    densities: Sequence[float] | None = None,
    higher_is_better: bool = False,
) -> CodecSearch:
    """The α (and k, where ``densities`` are given) of the best ``score`` of the decoded tensors; the first of equals.

    ``score`` must read data that no result is reported on.  One call a pair.

    Args:
        codec: whose options are the start.
        tensors: the adapter's, by name.
        score: of the decoded tensors.
        alphas: the grid of α.
        densities: the grid of the share kept; None: the codec's own.
        higher_is_better: of ``score``.

    Raises:
        OptionError: an empty grid, a score that is not finite anywhere, or what the codec refuses.
    """
    grid = [(k, a) for k in (densities if densities is not None else (codec.density,)) for a in alphas]
    if not grid:
        raise OptionError("The search for a scale got an empty grid; give at least one alpha and one density.")
    tried = []
    for density, alpha in grid:
        trial = dataclasses.replace(codec, density=density, alpha=alpha)
        value = float(score(trial.decode_tensors(trial.encode_tensors(tensors))))
        tried.append((density, alpha, value if math.isfinite(value) else math.nan))
    real = [t for t in tried if not math.isnan(t[2])]
    if not real:
        raise OptionError("No scale of the grid gives a finite score; the adapter or the data is at fault.")
    density, alpha, _ = (max if higher_is_better else min)(real, key=lambda t: t[2])
    return CodecSearch(dataclasses.replace(codec, density=density, alpha=alpha), tuple(tried))
