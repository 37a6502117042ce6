"""The Triton kernel of logit_distillation: a program reads one row twice, the second time from the cache."""

import triton
import triton.language as tl


@triton.jit
def logit_kernel(
    logits,
    labels,
    teacher,
    gradient,
    kl,
    ce,
    logits_r,
    teacher_r,
    gradient_r,
    size,
    known,
    inverse,
    kl_factor,
    kl_slope,
    ce_weight,
    IGNORE: tl.constexpr,
    TEACHER: tl.constexpr,
    SOFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """kl, ce (rows,), and the gradient (rows, size), which may lie where the logits do.

    First: the maximum m, sum l of exp(x - m) and, with SOFT, soft_l of exp((x - m) / tau) so far, rescaled when m
    rises; the same of the teacher, and the sum of its weights times its distance from the student. Then the gradient.
    inverse: 1 / tau. kl_factor: tau^2. kl_slope: kl_weight tau. known: the teacher's entries that count.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_r
    teacher += row * teacher_r
    gradient += row * gradient_r
    label = tl.load(labels + row)
    within = tl.arange(0, BLOCK)
    if label == IGNORE:
        for start in range(0, size, BLOCK):
            tl.store(gradient + start + within, within * 0.0, mask=start + within < size)
        tl.store(kl + row, 0.0)
        tl.store(ce + row, 0.0)
        return
    of_label = tl.load(logits + label).to(tl.float32)
    m, l, soft_l = float("-inf"), 0.0, 0.0
    m_t, l_t, apart = float("-inf"), 0.0, 0.0
    for start in range(0, size, BLOCK):
        at = start + within
        x = tl.load(logits + at, mask=at < size, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(m, tl.max(x))
        l = l * tl.exp(m - higher) + tl.sum(tl.exp(x - higher))
        if SOFT:
            soft_l = soft_l * tl.exp((m - higher) * inverse) + tl.sum(tl.exp((x - higher) * inverse))
        m = higher
        if TEACHER:
            given = tl.load(teacher + at, mask=at < known, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(m_t, tl.max(given))
            rescale = tl.exp((m_t - higher) * inverse)
            weight = tl.exp((given - higher) * inverse)
            l_t = l_t * rescale + tl.sum(weight)
            distance = tl.where(at < known, given, 0.0) - tl.where(at < known, x, 0.0)
            apart = apart * rescale + tl.sum(weight * distance)
            m_t = higher
    if not SOFT:
        soft_l = l
    tl.store(ce + row, m + tl.log(l) - of_label)
    divergence = 0.0
    if TEACHER:
        divergence = (apart / l_t - (m_t - m)) * inverse + tl.log(soft_l) - tl.log(l_t)
    tl.store(kl + row, kl_factor * divergence)
    for start in range(0, size, BLOCK):
        at = start + within
        x = tl.load(logits + at, mask=at < size, other=float("-inf")).to(tl.float32)
        slope = tl.exp(x - m) * (ce_weight / l) - tl.where(at == label, ce_weight, 0.0)
        if TEACHER:
            given = tl.load(teacher + at, mask=at < known, other=float("-inf")).to(tl.float32)
            q, p = tl.exp((x - m) * inverse) / soft_l, tl.exp((given - m_t) * inverse) / l_t
            slope += kl_slope * (q - p)
        tl.store(gradient + at, slope.to(gradient.dtype.element_ty), mask=at < size)
