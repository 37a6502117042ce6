"""What kernels of a chain call: to let the next one begin, to wait for those ahead, to ask for memory.

A kernel that waits does so for the whole of the kernel ahead, which itself ended after the one ahead of it, and so on:
after the wait all that was launched before is done and seen, and nobody reads any more what is overwritten now. That
needs every program of every kernel that is started early to wait once before it ends, and to write nothing before.
"""

import triton
import triton.language as tl

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # older versions of triton, where launching.py starts nothing early
    gdc_launch_dependents = gdc_wait = None


@triton.jit
def wait_for_the_chain():
    """Let the next kernel begin, then wait for those ahead."""
    gdc_launch_dependents()
    gdc_wait()


@triton.jit
def prefetch(address, size):
    """Ask for `size` bytes, 0 or a multiple of 16, to come into the L2 cache, which all share; one thread asks. It
    reads nothing that a program would see, so it may stand before the wait whatever lies there.
    """
    tl.inline_asm_elementwise(
        "{.reg .pred p; .reg .b32 t; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0; setp.ne.and.u32 p, $2, 0, p; "
        "@p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;}",
        "=r,l,r",
        [address.to(tl.int64), size],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
