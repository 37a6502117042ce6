"""memory_converter on a GPU: the pass of ssd_scan that carries states, without outputs."""

from transmamba.ops.ssd_scan.triton import memory_converter_triton

__all__ = ["memory_converter_triton"]
