"""The CUDA kernels of the sparse products: sources, formats, build, operators."""
