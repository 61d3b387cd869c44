"""A Triton backend for tests: it compiles nothing, and makes vLLM take Triton for usable on the CPU.

Kernels run in Triton's interpreter (TRITON_INTERPRET=1), so no compiler is ever called. Triton finds the package
through the entry point in the `tricpu-0.1.dist-info` directory beside it, once their parent is on PYTHONPATH.
"""
