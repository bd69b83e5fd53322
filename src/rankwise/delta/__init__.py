"""ΔW as an immutable value, of many kinds, and the algebra on it: apply, add, scale, compare, cut to a rank."""

from rankwise.delta.affine import BlockAffine, Replace, Scale
from rankwise.delta.base import KINDS, Delta, rebuild
from rankwise.delta.dense import Dense, Sum
from rankwise.delta.gated import ConstantGate, Gated
from rankwise.delta.geometry import LINEAR, Conv, Embedding, Geometry, Linear
from rankwise.delta.lowrank import LowRank, from_dense
from rankwise.delta.sparse import Columns, Entries, Rows
from rankwise.delta.state import AdapterState, TensorSpec
from rankwise.delta.structured import Hadamard, Kron, Tile

__all__ = [
    "KINDS",
    "LINEAR",
    "AdapterState",
    "BlockAffine",
    "Columns",
    "ConstantGate",
    "Conv",
    "Delta",
    "Dense",
    "Embedding",
    "Entries",
    "Gated",
    "Geometry",
    "Hadamard",
    "Kron",
    "Linear",
    "LowRank",
    "Replace",
    "Rows",
    "Scale",
    "Sum",
    "TensorSpec",
    "Tile",
    "from_dense",
    "rebuild",
]
