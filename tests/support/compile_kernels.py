"""Compile the Triton kernels for an NVIDIA GPU (compute capability 9.0) on a machine without one, down to its binary.

Run as a process of its own: `python -m tests.support.compile_kernels`.
"""

from typing import Any

import triton
import triton.language as tl
import vllm.triton_utils
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# vLLM hides Triton where it finds no device.
vllm.triton_utils.triton, vllm.triton_utils.tl, vllm.triton_utils.HAS_TRITON = triton, tl, True

from vllm_mod import kernels  # noqa: E402

POINTERS = {
    "*i32": ("block_table", "seq_lens", "columns", "page_columns", "pages", "tables", "layer_seq_lens", "stored",
             "window_ends"),
    "*i64": ("layer_slots", "kept_count", "rows", "first_row", "first_piece", "slots", "ends", "number"),
    "*i1": ("live", "keep", "state", "known", "state_keep", "decided"),
    "*fp32": ("weight", "scores"),
    "*fp64": ("cutoffs", "sums", "state_sums"),
    "*bf16": ("x",),
    "fp32": ("cutoff",),
}  # fmt: skip
TYPES = {name: kind for kind, names in POINTERS.items() for name in names}  # strides and sizes are numbers


def compile_kernel(kernel: Any, **constants: Any) -> None:
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else TYPES.get(name, "i32") for name in names}
    constexprs = {(names.index(name),): value for name, value in constants.items()}
    binary = triton.compile(ASTSource(kernel, signature, constexprs), target=GPUTarget("cuda", 90, 32))
    assert len(binary.asm["cubin"])
    print(kernel.__name__, constants)


def main() -> None:
    compile_kernel(kernels._scores_kernel, CHUNK=1024)
    compile_kernel(kernels._row_scores_kernel, CHUNK=1024)
    compile_kernel(kernels._window_sums_kernel, CHUNK=128)
    for decided, dense, shared in ((True, True, False), (True, False, False), (True, True, True), (False, False, True)):
        flags = {"DECIDED": decided, "DENSE": dense, "SHARED": shared}
        compile_kernel(kernels._split_pages_kernel, BLOCK_SIZE=16, CHUNK=128, **flags)
    for attention in (True, False):
        for dense in (True, False):
            compile_kernel(kernels._decide_requests_kernel, ATTENTION=attention, DENSE=dense, CHUNK=1024)
        for constant in (-1, 0, 1):
            flags = {"ATTENTION": attention, "CONSTANT": constant}
            compile_kernel(kernels._decide_tokens_kernel, BLOCK_SIZE=16, CHUNK=1024, **flags)


if __name__ == "__main__":
    main()
