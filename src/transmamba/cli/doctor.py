"""transmamba doctor: what is installed, what it runs on, which backends it uses, and whether they compute right."""

import os
import platform
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from importlib import metadata
from typing import Annotated

import torch
import typer
from packaging.requirements import Requirement
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from transmamba._version import __version__
from transmamba.errors import TransMambaError
from transmamba.inference import resolve_device
from transmamba.memory import SWITCH, is_kept
from transmamba.ops import (
    attention_step,
    bidirectional_scan,
    causal_conv1d,
    conv_ssd_step,
    explain,
    gated_rms_norm,
    hybrid_mixer,
    logit_distillation,
    memory_converter,
    merge_scans,
    post_norm,
    residual_norm,
    selective_scan,
    softmax_attention,
    ssd_scan,
    ssd_step,
    step_linear,
    token_cosines,
)

EXTRAS = {
    "eval": "the lm-eval harness",
    "peft": "LoRA adapters",
    "tensorboard": "training logs that TensorBoard shows",
    "text": "sentence encoders",
    "triton": "GPU kernels",
    "vision": "augmentation of images, and handwritten digits",
}


def doctor(
    device: Annotated[
        str, typer.Option(help="Device to explain and check, such as cpu, cuda:1, mps, or auto: the best here.")
    ] = "auto",
) -> None:
    """Show versions, devices and backends, and check every op on this machine.

    Exit code 1 when a requirement is not met or an op is wrong.
    """
    chosen = resolve_device(device)
    console = Console()
    packages = installed_packages()
    console.print(_table("Versions", ("package", "installed", "needed"), _version_rows(packages)))
    console.print(_table("Devices", ("device", "what it is"), _device_rows()))
    optional = list(_optional_rows(packages))
    if optional:
        console.print(_table("Optional packages", ("package", "installed", "for", "install"), optional))
    choices = [(choice.op, choice.backend, choice.reason) for choice in explain(chosen.type)]
    console.print(_table(f"Backends on {chosen.type}", ("op", "backend", "why"), choices))
    with console.status("Checking the ops against their references"):
        checks = check_ops(chosen)
    title = f"Largest relative error against the reference, on {chosen}"
    console.print(_table(title, ("op", "values", "gradients", "bound", ""), _check_rows(checks)))

    wrong = [f"{package.name} {package.needed}" for package in packages if not package.extra and not package.satisfied]
    wrong += [f"{check.op} on {chosen}" for check in checks if not check.passed]
    if wrong:
        console.print(f"[bold red]Not healthy:[/] {', '.join(wrong)}")
        raise typer.Exit(1)
    console.print("[bold green]Healthy[/]")


@dataclass(frozen=True, kw_only=True)
class Package:
    """A package that transmamba needs, or can use when `extra` is not empty."""

    name: str
    installed: str | None
    needed: str
    extra: str
    satisfied: bool


@dataclass(frozen=True, kw_only=True)
class OpCheck:
    """An op's largest relative RMS error over outputs and over gradients; failure: why it could not run."""

    op: str
    values: float
    gradients: float
    bound: float
    failure: str = ""

    @property
    def passed(self) -> bool:
        return not self.failure and self.values <= self.bound and self.gradients <= self.bound  # NaN does not pass


def installed_packages() -> list[Package]:
    """Return what transmamba's own metadata asks for, against what is installed; development tools left out."""
    try:
        requirements = [Requirement(line) for line in metadata.requires("transmamba") or []]
    except metadata.PackageNotFoundError:  # run from a source folder: the ranges are not known, the versions are
        requirements = [Requirement(name) for name in ("torch", "transformers")]
    packages = []
    for requirement in requirements:
        for extra in ("", *EXTRAS):
            applies = requirement.marker is None or requirement.marker.evaluate({"extra": extra})
            if applies:
                packages.append(_package(requirement, extra))
                break  # a core requirement applies under every extra; it is listed once
    return packages


def check_ops(device: torch.device) -> list[OpCheck]:
    """Run every op on the device with its own backend, and compare values and gradients with the reference there."""
    return [_check_op(choice.op, choice.backend, device) for choice in explain(device.type)]


@dataclass(frozen=True, kw_only=True)
class _Sample:
    """Small grouped inputs: 2 rows, 4 query heads on 2 key heads, longer than a chunk and not a multiple of one."""

    q: Tensor
    k: Tensor
    v: Tensor
    dt: Tensor
    A: Tensor
    D: Tensor
    state: Tensor
    weight: Tensor
    angles: Tensor

    @classmethod
    def draw(cls, device: torch.device, dtype: torch.dtype) -> "_Sample":
        batch, seq_len, heads, kv_heads, state_size, head_dim = 2, 157, 4, 2, 16, 8
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        tensors = {
            "q": normal(batch, seq_len, heads, state_size),
            "k": normal(batch, seq_len, kv_heads, state_size),
            "v": normal(batch, seq_len, kv_heads, head_dim),
            "dt": torch.nn.functional.softplus(normal(batch, seq_len, heads) - 2),
            "A": -1 - normal(heads).abs(),
            "D": normal(heads),
            "state": normal(batch, heads, state_size, head_dim),
            "weight": normal(kv_heads * head_dim, 4),
            "angles": normal(seq_len, state_size),
        }
        return cls(**{name: x.to(device, dtype).requires_grad_(name != "angles") for name, x in tensors.items()})

    @property
    def rotary(self) -> tuple[Tensor, Tensor]:
        return self.angles.cos(), self.angles.sin()

    def leaves(self) -> list[Tensor]:
        return [x for x in (getattr(self, field.name) for field in fields(self)) if x.requires_grad]


# Each calls an op with everything optional present, on the backend asked for.
_CALLS: dict[str, Callable[[_Sample, str | None], Tensor | tuple[Tensor, ...]]] = {
    "attention_step": lambda s, backend: attention_step(
        s.q[:, 0], s.k, s.v, torch.tensor([len(s.angles), 70], device=s.angles.device), backend=backend
    ),
    "bidirectional_scan": lambda s, backend: bidirectional_scan(
        s.v.flatten(2),
        s.k[..., :8].flatten(2),
        s.q[:, :, :2, :8].flatten(2),
        s.dt,
        dt_bias=(s.D[:2], s.D[2:]),
        A_log=(s.A[:2], s.A[2:]),
        D=(s.D[2:], s.D[:2]),
        m=s.dt[..., :2],
        gate=s.v.flatten(2),
        weight=s.weight.repeat(3, 1),
        bias=s.weight.flatten()[:48],
        lengths=torch.tensor([len(s.angles), 70], device=s.angles.device),
        backend=backend,
    ),
    "causal_conv1d": lambda s, backend: causal_conv1d(
        s.v.flatten(2), s.weight, s.weight[:, 0], activation="silu", return_final_state=True, backend=backend
    ),
    "conv_ssd_step": lambda s, backend: _conv_ssd_step(s, backend),
    "gated_rms_norm": lambda s, backend: gated_rms_norm(
        s.k.flatten(2), s.q[:, 7:, :2].flatten(2), s.q[0, :2, 0].flatten(), start=7, backend=backend
    ),
    "hybrid_mixer": lambda s, backend: hybrid_mixer(
        s.q, s.k, s.v, s.dt, s.A, s.D, trans_point=71, rotary=s.rotary, return_final_state=True, backend=backend
    ),
    "logit_distillation": lambda s, backend: logit_distillation(
        s.q[0, :, 0],
        torch.arange(len(s.angles), device=s.angles.device) % s.angles.shape[1],
        s.angles,
        temperature=2.0,
        ce_weight=0.5,
        backend=backend,
    )[:2],
    "memory_converter": lambda s, backend: memory_converter(
        s.k, s.v, s.dt, s.A, initial_state=s.state, backend=backend
    ),
    "merge_scans": lambda s, backend: merge_scans(
        s.v.permute(2, 0, 1, 3), _both_ways(s), s.k[:, :, 0, 8:], backend=backend
    ),
    "post_norm": lambda s, backend: post_norm(s.k, s.k.flip(0), s.q[0, 0, 0], s.q[0, 1, 0], backend=backend),
    "residual_norm": lambda s, backend: residual_norm(s.k, s.q[0, 0, 0], s.q[0, 1, 0], backend=backend),
    "selective_scan": lambda s, backend: selective_scan(
        s.v.flatten(2).transpose(1, 2),
        s.dt.repeat_interleave(4, dim=2).transpose(1, 2),
        s.A.repeat_interleave(4)[:, None] * (1 + s.weight.square()),
        s.k[..., :4].permute(0, 2, 3, 1),
        s.q[:, :, :2, :4].permute(0, 2, 3, 1),
        s.weight[:, 0],
        s.v.flatten(2).transpose(1, 2),
        s.weight[:, 1].square(),
        initial_state=s.state.flatten(1, 2)[:, :16, :4],
        return_last_state=True,
        backend=backend,
    ),
    "softmax_attention": lambda s, backend: softmax_attention(s.q, s.k, s.v, backend=backend),
    "ssd_scan": lambda s, backend: ssd_scan(
        s.q, s.k, s.v, s.dt, s.A, s.D, initial_state=s.state, return_final_state=True, backend=backend
    ),
    "ssd_step": lambda s, backend: ssd_step(
        s.state, s.q[:, 0], s.k[:, 0], s.v[:, 0], s.dt[:, 0], s.A, s.D, backend=backend
    ),
    "step_linear": lambda s, backend: step_linear(  # without gradients, which its kernel has none of
        s.q[:, 0, 0].detach(), [s.angles[:40], s.angles[40:60]], norm_weight=s.angles[0].abs(), backend=backend
    ),
    "token_cosines": lambda s, backend: token_cosines(
        s.q[:, :, :2].permute(2, 0, 1, 3), s.k[:, :, 0], _both_ways(s), backend=backend
    ),
}


def _both_ways(s: _Sample) -> Tensor:
    """Two orders of the sample's tokens, from either end."""
    steps = torch.arange(s.v.shape[1], device=s.v.device)
    return torch.stack([steps, steps.flip(0)])


def _conv_ssd_step(s: _Sample, backend: str | None) -> tuple[Tensor, ...]:
    """It works in place and has no gradients."""
    q, k, v, dt = (x.detach() for x in (s.q[:, 0].flatten(1), s.k[:, 0].flatten(1), s.v[:, 0].flatten(1), s.dt[:, 0]))
    state, ring = s.state.detach().clone(), s.angles[:5, :1].expand(2, 5, s.D.shape[0] * 28).contiguous()
    channels = sum(x.shape[1] for x in (q, k, v))
    weight = s.weight.detach().flatten()[:4].expand(channels, 4)
    y = conv_ssd_step(
        state,
        ring[..., :channels].contiguous(),
        torch.tensor([9, 70], device=state.device),
        q,
        k,
        v,
        dt,
        s.q[:, 1, :, :8].detach().flatten(1),
        weight=weight,
        dt_bias=s.D.detach(),
        A_log=s.A.detach(),
        D=s.D.detach(),
        backend=backend,
    )
    return y, state


def _check_op(op: str, backend: str, device: torch.device) -> OpCheck:
    # The bounds are the ones that the tests hold the ops to. MPS and the Triton kernels have no fp64.
    single = device.type == "mps" or backend == "triton"
    dtype, bound = (torch.float32, 1e-5) if single else (torch.float64, 1e-10)
    sample = _Sample.draw(device, dtype)
    try:
        values, gradients = _values_and_gradients(op, sample, None)
        exact_values, exact_gradients = _values_and_gradients(op, sample, "reference")
    except (RuntimeError, TransMambaError) as error:
        return OpCheck(op=op, values=float("nan"), gradients=float("nan"), bound=bound, failure=str(error))
    return OpCheck(
        op=op,
        values=_largest_error(values, exact_values),
        gradients=_largest_error(gradients, exact_gradients),
        bound=bound,
    )


def _values_and_gradients(op: str, sample: _Sample, backend: str | None) -> tuple[list[Tensor], list[Tensor]]:
    result = _CALLS[op](sample, backend)
    outputs = result if isinstance(result, tuple) else (result,)
    loss = torch.stack([x.square().sum() for x in outputs]).sum()
    gradients = torch.autograd.grad(loss, sample.leaves(), allow_unused=True) if loss.requires_grad else ()
    return [x.detach() for x in outputs], [x for x in gradients if x is not None]


def _largest_error(actual: list[Tensor], exact: list[Tensor]) -> float:
    ratios = [(a - e).norm() / e.norm() for a, e in zip(actual, exact, strict=True)]
    return torch.stack(ratios).max().item() if ratios else 0.0  # max keeps NaN


def _package(requirement: Requirement, extra: str) -> Package:
    try:
        installed = torch.__version__ if requirement.name == "torch" else metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        installed = None
    return Package(
        name=requirement.name,
        installed=installed,
        needed=str(requirement.specifier),
        extra=extra,
        satisfied=installed is not None and requirement.specifier.contains(installed, prereleases=True),
    )


def _version_rows(packages: list[Package]) -> Iterable[tuple[str, ...]]:
    yield "python", platform.python_version(), ""
    yield "transmamba", __version__, ""
    for package in packages:
        if not package.extra:
            mark = "" if package.satisfied else "[bold red]"
            yield package.name, mark + (package.installed or "absent"), package.needed


def _optional_rows(packages: list[Package]) -> Iterable[tuple[str, ...]]:
    for package in packages:
        if package.extra:
            install = "" if package.satisfied else escape(f"pip install 'transmamba[{package.extra}]'")
            yield package.name, package.installed or "absent", EXTRAS[package.extra], install


def _device_rows() -> Iterable[tuple[str, str]]:
    threads = f"{os.cpu_count()} logical cores, torch threads: {torch.get_num_threads()}"
    yield "cpu", f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {threads}{_cpu_memory()}"
    yield (
        "",
        f"freed memory is kept by commands that compute here; {SWITCH}=0: given back"
        if is_kept()
        else ("freed memory is given back to the system"),
    )
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        memory = f"{card.total_memory / 2**30:.0f} GiB memory"
        yield f"cuda:{index}", f"{card.name}, compute capability {card.major}.{card.minor}, {memory}"
    if torch.backends.mps.is_available():
        yield "mps", f"Apple GPU, {torch.mps.recommended_max_memory() / 2**30:.0f} GiB memory"


def _cpu_memory() -> str:
    if sys.platform == "win32":  # no sysconf there
        return ""
    return f", {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB memory"


def _check_rows(checks: list[OpCheck]) -> Iterable[tuple[str, ...]]:
    for check in checks:
        verdict = "[green]ok" if check.passed else f"[bold red]{escape(check.failure) or 'wrong'}"
        yield check.op, f"{check.values:.1e}", f"{check.gradients:.1e}", f"{check.bound:.0e}", verdict


def _table(title: str, columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, no_wrap=column == columns[0])  # a name is never cut
    for row in rows:
        table.add_row(*row)
    return table
