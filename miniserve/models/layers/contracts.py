"""What each kernel takes of linear layers and of routed experts, as data: `options` builds by these tables, `explain`
prints what they give, the self-check tries it. What no kernel here takes PyTorch multiplies, or on a CPU packed forms;
weights in 8 bits are widened for that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from miniserve.attention.aiter import AiterProducts, Unavailable, load_products
from miniserve.attention.platform import Platform, Version
from miniserve.attention.terms import is_arch, name_of
from miniserve.models.layers.weights import LEAST_STEP, Step


@dataclass(frozen=True, slots=True)
class Product:
    """A matrix of a linear layer, or both of each routed expert. grain: "plain", or of its scales. step: of these;
    cut: the step but for where parts begin that a kernel pads. rows, columns: of the matrix, or what divides
    those of all ranks. wide: why what is multiplied with it keeps its 16 bits, empty where it may be rounded to 8."""

    dtype: torch.dtype
    grain: str = "plain"
    step: Step = None
    cut: Step = None
    rows: int = 0
    columns: int = 0
    wide: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProductContract:
    """One kernel's terms. requires: "aiter" or "triton". An empty tuple means anything goes. block: the step of scales
    that it takes, None for any that is not finer than `LEAST_STEP`; pads: it pads parts to whole blocks. first_row:
    fewer rows are left to others. tolerance: how far a row may be from float32's, relative, where it rounds what it
    multiplies to 8 bits; None: as far as in 16."""

    name: str
    requires: str
    grains: tuple[str, ...]
    archs: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    block: Step = None
    pads: bool = False
    row_multiple: int = 1
    column_multiple: int = 1
    first_row: int = 1
    min_aiter: Version = (0,)
    tolerance: float | None = None

    def refusals(self, product: Product, platform: Platform | None) -> Iterator[str]:
        """Every reason, a sentence each, why this kernel cannot multiply that there. platform None: anywhere."""
        if platform is not None:
            yield from self._platform_refusals(platform)
        if self.dtypes and product.dtype not in self.dtypes:
            yield f"it does not compute in {name_of(product.dtype)}"
        step = product.cut if self.pads else product.step
        if step is not None and self.block is not None and step != self.block:
            yield "it takes scales of {} × {} blocks, not of {} × {}".format(*self.block, *step)
        elif step is not None and self.block is None and min(step) < LEAST_STEP:
            yield "scales of {} × {} are too fine for it".format(*step)
        if product.rows % self.row_multiple:
            yield f"it takes multiples of {self.row_multiple} rows, not {product.rows}"
        if product.columns % self.column_multiple:
            yield f"it takes multiples of {self.column_multiple} columns, not {product.columns}"
        if self.tolerance is not None and product.wide:
            yield f"it rounds activations to 8 bits, and {product.wide}"

    def is_for(self, platform: Platform | None) -> bool:
        """Whether it is for such hardware."""
        return not self.archs or platform is None or any(is_arch(platform.arch, pattern) for pattern in self.archs)

    def _platform_refusals(self, platform: Platform) -> Iterator[str]:
        if self.requires == "triton" and platform.triton_unavailable is not None:
            yield platform.triton_unavailable
        version = platform.aiter_version
        if self.requires == "aiter" and version is None:
            yield str(platform.aiter_unavailable)
        elif self.requires == "aiter" and version is not None and version < self.min_aiter:
            needed, found = (".".join(map(str, each)) for each in (self.min_aiter, version))
            yield f"it needs aiter v{needed} or newer, not v{found}, whose routing writes where it must not"


@dataclass(frozen=True, slots=True)
class Route:
    """Kernels by the first number of rows that each is for, falling; `refused` are those before them, with why."""

    kernels: tuple[ProductContract, ...]
    refused: tuple[tuple[str, str], ...] = ()

    def kernel(self, rows: int) -> ProductContract | None:
        """That multiplies so many rows."""
        return next((kernel for kernel in self.kernels if kernel.first_row <= rows), None)

    def rounds(self, rows: int) -> bool:
        """Whether that kernel rounds what it multiplies to 8 bits."""
        kernel = self.kernel(rows)
        return kernel is not None and kernel.tolerance is not None

    def sentence(self, rest: str) -> str:
        """Who multiplies how many rows, for people. rest: who multiplies those that no kernel here does."""
        names = [(kernel.first_row, kernel.name) for kernel in self.kernels]
        if not names or names[-1][0] > 1:
            names.append((1, rest))
        parts = [f"{name} from {first} rows on" if first > 1 else name for first, name in names]
        return "; ".join([", else ".join(parts), *(f"not by {name}: {reason}" for name, reason in self.refused)])


_HALF = (torch.bfloat16, torch.float16)
_INSTINCT = ("gfx942", "gfx950")
_SCALED = ("tensor", "rows", "blocks")
_FP8_ARCHS = ("sm_89+", *_INSTINCT, "gfx12*")  # those before have no instructions that read e4m3
# Rounding what is multiplied costs 3 %, twice in a row 5 %, and a bad row more. Seen of aiter's experts: 9 % (#2421).
_LINEAR_TOLERANCE, _EXPERTS_TOLERANCE = 6e-2, 1e-1
# From which on a product in 8 bits is faster than one that widens: up to 64 rows the time goes to reading the weight.
# Of a step's rows experts get a few each: steps of decode rows alone, which have 256 by default, keep 16 bits there.
_LINEAR_ROWS, _EXPERTS_ROWS = 65, 257
TRITON = "the engine's Triton kernels"
TRITON_OR_LIBRARY = f"{TRITON} or the vendor's library, by size"
TRITON_LINEAR_FP8, TRITON_EXPERTS_FP8 = "triton linear_fp8", "triton experts_fp8"
TRITON_EXPERTS_ROUNDED = "triton experts in 8 bits"
TRITON_ROUTER = "the engine's kernels of the choice of experts"
LIBRARY_FP8 = "the vendor's library in 8 bits"
AITER_BLOCKSCALE, AITER_MOE = "aiter gemm_a8w8_blockscale", "aiter fused_moe"

_library = partial(
    ProductContract,
    name=LIBRARY_FP8,
    requires="triton",
    archs=("sm_90",),
    dtypes=_HALF,
    row_multiple=16,
    first_row=_LINEAR_ROWS,
    tolerance=_LINEAR_TOLERANCE,
)
LINEAR = (
    # Of fewer rows its time is not that of reading the weight: 123 µs for 64 x 1536 x 7168 on an MI325X
    # (InferenceX #863), five times what the bytes take.
    ProductContract(
        name=AITER_BLOCKSCALE,
        requires="aiter",
        grains=("blocks",),
        archs=_INSTINCT,
        dtypes=_HALF,
        block=(128, 128),
        column_multiple=128,
        first_row=65,
        tolerance=_LINEAR_TOLERANCE,
    ),
    _library(grains=("blocks",), block=(128, 128), column_multiple=512),
    _library(grains=("tensor", "rows"), column_multiple=16),
    ProductContract(name=TRITON_LINEAR_FP8, requires="triton", grains=_SCALED, archs=_FP8_ARCHS),
    ProductContract(name=TRITON_OR_LIBRARY, requires="triton", grains=("plain",)),
)
_fused_moe = partial(
    ProductContract,
    name=AITER_MOE,
    requires="aiter",
    archs=_INSTINCT,
    dtypes=_HALF,
    min_aiter=(0, 1, 20),  # v0.1.19's routing kernel writes where it must not (aiter #4530)
)
EXPERTS = (
    _fused_moe(grains=("plain",)),
    _fused_moe(grains=_SCALED, block=(128, 128), pads=True, tolerance=_EXPERTS_TOLERANCE),
    ProductContract(
        name=TRITON_EXPERTS_ROUNDED,
        requires="triton",
        grains=_SCALED,
        archs=("sm_90",),
        dtypes=_HALF,
        first_row=_EXPERTS_ROWS,
        tolerance=_EXPERTS_TOLERANCE,
    ),
    ProductContract(name=TRITON_EXPERTS_FP8, requires="triton", grains=_SCALED, archs=_FP8_ARCHS),
    ProductContract(name=TRITON, requires="triton", grains=("plain",)),
)


def find_route(
    table: Sequence[ProductContract], product: Product, platform: Platform | None, failed: Mapping[str, str]
) -> Route:
    """For each number of rows the first kernel of the table that takes the product, and why those before it for such
    hardware do not. failed: what else is wrong with a kernel, by its name."""
    kernels: list[ProductContract] = []
    refused: list[tuple[str, str]] = []
    for contract in table:
        if product.grain not in contract.grains or not contract.is_for(platform):
            continue
        reasons = [*contract.refusals(product, platform), *filter(None, [failed.get(contract.name)])]
        if reasons:
            refused.append((contract.name, reasons[0]))
        elif not kernels or contract.first_row < kernels[-1].first_row:
            kernels.append(contract)
        if kernels and kernels[-1].first_row == 1:
            break
    return Route(tuple(kernels), tuple(refused))


def find_products(platform: Platform) -> tuple[AiterProducts | None, dict[str, str]]:
    """aiter's kernels, or why each of them cannot be used though the platform has aiter."""
    if platform.aiter_version is None:
        return None, {}
    try:
        return load_products(), {}
    except Unavailable as error:
        return None, {contract.name: str(error) for contract in (*LINEAR, *EXPERTS) if contract.requires == "aiter"}
