"""logit_distillation: both losses and their gradient, by every backend, against plain PyTorch in fp64."""

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from tests.helpers import DEVICE, relative_rms_error
from tests.ops.cases import FAULT_FACTOR, rounding
from tests.ops.kernels import needs_triton
from transmamba.errors import InputError
from transmamba.ops import logit_distillation
from transmamba.ops.logit_distillation import logit_gradient

BACKENDS = ["reference", "torch", pytest.param("triton", marks=needs_triton)]
WEIGHTS = [(1.0, 1.0, 0.0), (1.0, 0.7, 0.3), (2.0, 0.7, 0.3), (0.5, 1.0, 0.2), (2.0, 0.0, 1.0)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def small_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 entries, so that small rows cross several."""
    if "triton" in request.node.name and DEVICE.type == "cpu":
        monkeypatch.setattr(import_module("transmamba.ops.logit_distillation.triton"), "LARGEST_BLOCK", 16)


def draw(
    rows: int = 5, size: int = 37, known: int = 37, dtype: torch.dtype = torch.float32, device: torch.device = DEVICE
) -> tuple[Tensor, Tensor, Tensor]:
    """logits, labels, of which every third counts for nothing, and the teacher's logits."""
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (3 * torch.randn(rows, n, generator=generator, dtype=torch.float64) for n in (size, known))
    labels = torch.randint(size, (rows,), generator=generator)
    labels[1::3] = -100
    return logits.to(device, dtype), labels.to(device), teacher.to(device, dtype)


def exact(
    logits: Tensor, labels: Tensor, teacher: Tensor | None, temperature: float, kl_weight: float, ce_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """kl, ce and the gradient in fp64, by torch's own losses."""
    student, counts = logits.detach().double().requires_grad_(), labels != -100
    ce = cross_entropy(student, labels, reduction="none")
    kl = torch.zeros_like(ce)
    if teacher is not None and kl_weight:
        known = min(logits.shape[1], teacher.shape[1])
        log_q = log_softmax(student / temperature, 1)[:, :known]
        log_p = log_softmax(teacher[:, :known].double() / temperature, 1)
        kl = temperature**2 * kl_div(log_q, log_p, log_target=True, reduction="none").sum(1) * counts
    (gradient,) = torch.autograd.grad((kl_weight * kl + ce_weight * ce).sum(), student)
    return kl.detach(), ce.detach(), gradient


def bound_of(logits: Tensor) -> float:
    """Logits reach about 12; a loss is the difference of such, rounded a few times, over losses of 1 or more, and a
    probability errs by as much as its exponent. On a card exponentials err by 2^-22 besides.
    """
    return 2**-24 * (2 * 12 + logits.shape[1] ** 0.5 + 8)


def check(logits: Tensor, labels: Tensor, teacher: Tensor | None, *options: float, **how: Any) -> None:
    wanted = exact(logits, labels, teacher, *options)
    kl, ce, gradient = logit_gradient(logits, labels, teacher, *options, **how)
    bound = bound_of(logits)
    assert kl.dtype == ce.dtype == torch.float32
    assert gradient.dtype == logits.dtype
    assert relative_rms_error(kl, wanted[0]) < bound
    assert relative_rms_error(ce, wanted[1]) < bound
    # fp16's smallest steps, 2^-24, lie under the rounding of entries of a gradient of 37 or more to a row.
    once = 0.0 if logits.dtype == torch.float32 else rounding(logits.dtype)
    assert relative_rms_error(gradient, wanted[2]) < once + 2 * bound


@pytest.mark.parametrize("options", WEIGHTS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_losses_and_gradient(backend: str, options: tuple[float, float, float]) -> None:
    check(*draw(), *options, backend=backend)
    logits, labels, _ = draw()
    check(logits, labels, None, *options, backend=backend)


@pytest.mark.parametrize(("size", "known"), [(1, 1), (2, 5), (15, 16), (16, 16), (17, 48), (48, 17), (33, 1)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_vocabularies_of_any_sizes(backend: str, size: int, known: int) -> None:
    check(*draw(size=size, known=known), 2.0, 0.7, 0.3, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("overwrite", [False, True], ids=["beside", "in place"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sixteen_bits_are_rounded_once_and_in_place(backend: str, overwrite: bool, dtype: torch.dtype) -> None:
    logits, labels, teacher = draw(dtype=dtype)
    kept = logits.clone()
    options = (2.0, 0.7, 0.3)
    check(kept.clone(), labels, teacher, *options, overwrite=overwrite, backend=backend)
    gradient = logit_gradient(logits, labels, teacher, *options, overwrite=overwrite, backend=backend)[2]
    if overwrite and backend == "triton":
        assert gradient.data_ptr() == logits.data_ptr()
    else:
        assert torch.equal(logits, kept)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_a_label_lose_nothing(backend: str) -> None:
    logits, labels, teacher = draw()
    found = logit_gradient(logits, labels, teacher, 1.0, 1.0, 1.0, backend=backend)
    assert all((x[1] == 0).all() for x in found)
    labels[:] = -100
    assert all((x == 0).all() for x in logit_gradient(logits, labels, teacher, 1.0, 1.0, 1.0, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend: str) -> None:
    logits, labels, teacher = draw(rows=0)
    total, kl, ce = logit_distillation(logits, labels, teacher, backend=backend)
    assert total.shape == kl.shape == ce.shape == (0,)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides_are_read(backend: str) -> None:
    logits, labels, teacher = draw()
    wide = torch.cat([logits, logits], 1)[:, :37]
    columns = teacher.T.contiguous().T
    check(wide.clone(memory_format=torch.preserve_format), labels, columns, 2.0, 0.7, 0.3, backend=backend)
    alike = logits[:1].expand(5, -1)
    check(alike, labels, columns, 2.0, 0.7, 0.3, overwrite=True, backend=backend)
    assert torch.equal(alike[0], logits[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits_neither_overflow_nor_vanish(backend: str) -> None:
    logits, labels, teacher = draw()
    logits, teacher = logits * 1000, teacher * 1000
    wanted = exact(logits, labels, teacher, 2.0, 0.7, 0.3)
    found = logit_gradient(logits, labels, teacher, 2.0, 0.7, 0.3, backend=backend)
    assert all(relative_rms_error(a, b) < 1000 * bound_of(logits) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_teacher_that_is_the_student_has_no_divergence(backend: str) -> None:
    logits, labels, _ = draw()
    kl, _, gradient = logit_gradient(logits, labels, logits.clone(), 2.0, 1.0, 0.0, backend=backend)
    assert kl.abs().max() < 2**-20
    assert gradient.abs().max() < 2**-20


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradients_are_those_of_finite_differences(backend: str) -> None:
    logits, labels, teacher = draw(size=6, known=6, dtype=torch.float64, device=torch.device("cpu"))

    def total(x: Tensor) -> Tensor:
        return logit_distillation(
            x, labels, teacher, temperature=2.0, kl_weight=0.7, ce_weight=0.3, validate=False, backend=backend
        ).total

    assert torch.autograd.gradcheck(total, logits.requires_grad_())


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_total_has_a_gradient(backend: str) -> None:
    logits, labels, teacher = draw()
    weights = torch.arange(1.0, 6.0, device=DEVICE)
    leaf = logits.requires_grad_()
    losses = logit_distillation(leaf, labels, teacher, kl_weight=0.7, ce_weight=0.3, backend=backend)
    assert relative_rms_error(losses.total, 0.7 * losses.kl + 0.3 * losses.ce) < 2**-22
    assert not losses.kl.requires_grad
    (found,) = torch.autograd.grad(losses.total @ weights, leaf)
    wanted = exact(logits, labels, teacher, 1.0, 0.7, 0.3)[2] * weights[:, None]
    assert relative_rms_error(found, wanted) < 3 * bound_of(logits)


@pytest.mark.parametrize("fault", ["temperature", "mean", "reverse"])
def test_every_bound_would_show_a_wrong_loss(fault: str) -> None:
    logits, labels, teacher = draw(dtype=torch.float64)
    kl, _, gradient = exact(logits, labels, teacher, 2.0, 1.0, 0.0)
    if fault == "reverse":
        wrong = exact(teacher, labels, logits, 2.0, 1.0, 0.0)[0]
    else:
        wrong = kl / (4 if fault == "temperature" else len(kl))
    assert relative_rms_error(wrong, kl) > FAULT_FACTOR * bound_of(logits)
    shifted = gradient.roll(1, 1)
    assert relative_rms_error(shifted, gradient) > FAULT_FACTOR * (rounding(torch.bfloat16) + 2 * bound_of(logits))


@needs_triton
@pytest.mark.parametrize("has_teacher", [True, False])
def test_torch_knows_the_triton_ops(has_teacher: bool) -> None:
    from transmamba.ops.logit_distillation.triton import logit_distillation_in_place_op, logit_distillation_op

    logits, labels, teacher = draw(rows=2)
    given = teacher if has_teacher else None
    for op in (logit_distillation_op, logit_distillation_in_place_op):
        torch.library.opcheck(op, (logits.clone(), labels, given, 2.0, 0.7, 0.3))


@needs_triton
def test_fp64_is_refused_by_the_kernel() -> None:
    with pytest.raises(InputError, match="the inputs are float64; pass backend='torch', or None"):
        logit_distillation(*draw(dtype=torch.float64), backend="triton")


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"logits": torch.zeros(5)}, ("logits has shape (5,)", "(rows, v)")),
        ({"labels": torch.zeros(4).long()}, ("labels has shape (4,)", "(5,) whole numbers")),
        ({"labels": torch.zeros(5)}, ("dtype torch.float32", "(5,) whole numbers")),
        ({"labels": torch.full((5,), 37)}, ("labels holds 37", "from 0 to 36")),
        ({"labels": torch.full((5,), -1)}, ("labels holds -1", "or -100")),
        ({"teacher": torch.zeros(4, 37)}, ("teacher has shape (4, 37)", "(5, v_t)")),
        ({"temperature": 0.0}, ("temperature=0.0 must be above 0",)),
        ({"logits": torch.full((5, 37), torch.nan)}, ("logits holds NaN at 185 of 185 places",)),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit_are_named(changes: dict[str, Any], fragments: tuple[str, ...]) -> None:
    logits, labels, teacher = draw(device=torch.device("cpu"))
    with pytest.raises(InputError) as caught:
        logit_distillation(**({"logits": logits, "labels": labels, "teacher": teacher} | changes))
    assert all(fragment in str(caught.value) for fragment in fragments)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("overwrite", [False, True], ids=["beside", "in place"])
@pytest.mark.parametrize(("size", "known"), [(32_000, 32_000), (50_257, 50_304), (151_936, 151_669)])
def test_vocabularies_of_models_on_a_card(size: int, known: int, overwrite: bool, dtype: torch.dtype) -> None:
    check(*draw(300, size, known, dtype), 2.0, 0.7, 0.3, overwrite=overwrite, backend="triton")
    runs = [logit_gradient(*draw(300, size, known, dtype), 2.0, 0.7, 0.3, backend="triton") for _ in range(5)]
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))


@pytest.mark.gpu
@needs_triton
def test_more_elements_than_32_bits_count() -> None:
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    rows, size = 2**16 + 3, 2**15
    few, labels, teacher = draw(3, size, size, torch.bfloat16)
    logits = torch.zeros(rows, size, device=DEVICE, dtype=torch.bfloat16)
    given = torch.zeros_like(logits)
    every = torch.full((rows,), -100, device=DEVICE)
    logits[-3:], given[-3:], every[-3:] = few, teacher, labels
    found = logit_gradient(logits, every, given, 2.0, 0.7, 0.3, overwrite=True, backend="triton")
    wanted = logit_gradient(few, labels, teacher, 2.0, 0.7, 0.3, backend="triton")
    assert all(torch.equal(a[-3:], b) for a, b in zip(found, wanted, strict=True))
