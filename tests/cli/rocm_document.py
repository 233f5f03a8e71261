"""The tables of docs/ROCM.md that say what each path takes, made of the contracts. Run as a program, it renews them."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from miniserve.attention.contracts import CONTRACTS
from miniserve.attention.terms import BackendContract, KernelContract, name_of

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "ROCM.md"


def backend_table() -> str:
    rows = [
        "| backend | runs on | needs | KV layouts | decode | prefill; with cached context | writes to the cache |",
        "|---|---|---|---|---|---|---|",
    ]
    for contract in CONTRACTS:
        needs = ", ".join(contract.requires).replace("native", "a C++ compiler") or "nothing"
        rerouted = _kernels(contract.rerouted_decode)
        decode = _kernels(contract.decode) + (f"; rerouted: {rerouted}" if rerouted else "")
        rows.append(
            f"| `{contract.name}` | {_places(contract)} | {needs} | {', '.join(contract.layouts)} | {decode} | "
            f"{_kernels(contract.chunks)} | {_kernels(contract.write) or '-'} |"
        )
    return "\n".join(rows)


def kernel_table() -> str:
    rows = [
        "| kernel | KV layout | computes in | KV cache | head_dim | heads per KV head | block size | cannot do |",
        "|---|---|---|---|---|---|---|---|",
    ]
    kernels = {
        kernel: None
        for contract in CONTRACTS
        for role in (contract.decode, contract.rerouted_decode, contract.chunks, contract.write)
        for kernel in role
    }
    rows += [_kernel_row(kernel) for kernel in kernels]
    return "\n".join(rows)


def renewed(text: str) -> str:
    """The document with its tables as their sources have them."""
    for name, table in (("backends", backend_table()), ("kernels", kernel_table())):
        marks = f"<!-- {name}: generated -->", f"<!-- /{name} -->"
        pattern = re.compile(f"{re.escape(marks[0])}.*{re.escape(marks[1])}", re.DOTALL)
        assert pattern.search(text), name
        text = pattern.sub(lambda _, marks=marks, table=table: f"{marks[0]}\n{table}\n{marks[1]}", text)
    return text


def _kernels(kernels: tuple[KernelContract, ...]) -> str:
    return ", ".join(dict.fromkeys(f"`{kernel.name}`" for kernel in kernels))


def _places(contract: BackendContract) -> str:
    return ", ".join(contract.archs) or "anything"


def _kernel_row(kernel: KernelContract) -> str:
    dtypes = ", ".join(_short(dtype) for dtype in kernel.dtypes)
    cache = "any" if kernel.any_kv else "the same, or fp8" if kernel.fp8_kv else "the same"
    group = str(f"≤ {kernel.max_group}" if kernel.max_group else "any")
    if kernel.heads:
        group = f"{kernel.heads[0]}, {kernel.heads[1]}, … {kernel.heads[-1]} heads in all"
    return (
        f"| `{kernel.name}` | {', '.join(kernel.layouts)} | {dtypes} | {cache} | {_head_dims(kernel)} | {group} | "
        f"{_blocks(kernel)} | {_lacks(kernel)} |"
    )


def _head_dims(kernel: KernelContract) -> str:
    if kernel.latent_parts:
        return " + ".join(map(str, kernel.latent_parts))
    if (sizes := kernel.head_dim).only:
        return ", ".join(map(str, sizes.only))
    if kernel.max_dense_dim is not None:
        return f"≤ {kernel.max_dense_dim}, keys and values expanded"
    if sizes.most is None:
        return f"≥ {sizes.least}, powers of 2" if sizes.pow2 else "any"
    more = f", × {sizes.multiple}" if sizes.multiple > 1 else ""
    return f"{max(sizes.least, sizes.multiple)}-{sizes.most}{more}{', powers of 2' if sizes.pow2 else ''}"


def _blocks(kernel: KernelContract) -> str:
    if (sizes := kernel.block_size).only:
        return ", ".join(map(str, sizes.only))
    return f"{f'× {sizes.multiple}' if sizes.multiple > 1 else 'any'}{', powers of 2' if sizes.pow2 else ''}"


def _lacks(kernel: KernelContract) -> str:
    lacks = ["window"] if kernel.min_window is None else []
    lacks += [f"window below {kernel.min_window}"] if (kernel.min_window or 1) > 1 else []
    lacks += ["softcap"] if not kernel.softcap else []
    lacks += ["sinks"] if not kernel.sinks else []
    lacks += ["a scale other than head_dim ** -0.5"] if not kernel.any_scale else []
    lacks += ["norm of q and k"] if not kernel.qk_norm else []
    lacks += ["rope of a part of each head"] if not kernel.partial_rope else []
    lacks += ["several query tokens a row"] if kernel.one_query else []
    return ", ".join(lacks) or "-"


def _short(dtype: torch.dtype) -> str:
    return {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[name_of(dtype)]


if __name__ == "__main__":
    DOCUMENT.write_text(renewed(DOCUMENT.read_text()))
