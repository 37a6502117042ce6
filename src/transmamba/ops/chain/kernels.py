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
def wait_for_the_chain(EARLY: tl.constexpr):
    """Wait for the kernels ahead. EARLY: the next kernel may begin before the wait, else after it."""
    if EARLY:
        gdc_launch_dependents()
    gdc_wait()
    if not EARLY:
        gdc_launch_dependents()


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


@triton.jit
def prefetch_share(address, size):
    """Ask for this program's share of `size` bytes, a multiple of 16; all programs together ask for all of them."""
    share = tl.cdiv(size, tl.num_programs(0) * 128) * 128  # whole lines of the cache
    start = tl.minimum(tl.program_id(0) * share, size)
    prefetch(address.to(tl.int64) + start, tl.minimum(share, size - start))


@triton.jit
def prefetch_shares(a0, a1, a2, a3, a4, s0, s1, s2, s3, s4):
    """The same of what the next product of the chain will read. Sizes may be 0, and are no constants, since what comes
    next is not known in the first step and nothing can be compiled while the second is recorded.
    """
    prefetch_share(a0, s0)
    prefetch_share(a1, s1)
    prefetch_share(a2, s2)
    prefetch_share(a3, s3)
    prefetch_share(a4, s4)
