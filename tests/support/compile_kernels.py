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

STRIDES = ("table_stride", "state_stride", "stored_stride", "x_stride", "tables_stride_layer", "tables_stride_row")
TYPES = dict.fromkeys((*STRIDES, "stride_layer", "num_layers", "hidden"), "i32") | {
    "block_table": "*i32", "seq_lens": "*i32", "columns": "*i32", "tables": "*i32", "layer_seq_lens": "*i32",
    "stored": "*i32", "layer_slots": "*i64", "slot_mapping": "*i64", "kept_count": "*i64", "state": "*i1",
    "keep": "*i1", "x": "*bf16", "weight": "*fp32", "scores": "*fp32", "cutoff": "fp32",
}  # fmt: skip


def compile_kernel(kernel: Any, **constants: Any) -> None:
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else TYPES[name] for name in names}
    constexprs = {(names.index(name),): value for name, value in constants.items()}
    binary = triton.compile(ASTSource(kernel, signature, constexprs), target=GPUTarget("cuda", 90, 32))
    assert len(binary.asm["cubin"])
    print(kernel.__name__, constants)


def main() -> None:
    compile_kernel(kernels._scores_kernel, CHUNK=1024)
    compile_kernel(kernels._split_pages_kernel, BLOCK_SIZE=16, CHUNK=128)
    for constant in (-1, 0, 1):
        for attention in (True, False):
            flags = {"ATTENTION": attention, "CONSTANT": constant, "CHUNK": 1024}
            compile_kernel(kernels._decide_prompts_kernel, **flags)
            compile_kernel(kernels._decide_tokens_kernel, BLOCK_SIZE=16, **flags)


if __name__ == "__main__":
    main()
