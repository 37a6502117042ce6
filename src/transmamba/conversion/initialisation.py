"""Initial values of what a Transformer does not have: the parameters that make its q, k and v a state space.

All but "mamba2" begin with a gate of 1 and a step size that does not depend on the token, so a head is a linear
attention with three numbers:

    y_t = sum_j exp(-(t - j) / tau) g (q_t . k_j) v_j + D v_t        dt = g, A = -1 / (tau g)

tau is its time constant in tokens, g the weight of a token; the scale of the output is in g, so it needs no parameter
of its own. "calibrated" fits tau, g and D of every head to the attention of the source, on text.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from transmamba.errors import InputError
from transmamba.models import TransMambaConfig, TransMambaForCausalLM
from transmamba.models.transmamba.initial_values import apply_initial_value, find_initial_value, initial_values
from transmamba.modules import RotaryTables, TokenLayout, TransMambaMixer
from transmamba.ops import apply_rotary, ssd_scan

OPEN_GATE = 1.2784645427610738  # silu of it is 1
LEAST_GAIN = 1e-3  # of tau g: a head whose best weight is negative keeps a gradient


@dataclass(frozen=True, kw_only=True, slots=True)
class Initialisation:
    """A row of the table. With text, the values are then fitted to it.

    time_constants: shortest and longest tau, spaced evenly in their logarithm over the heads; None as longest =
    max_position_embeddings; None = the initial values of a model that is trained from scratch. total_weight: tau g is
    head_dim to this power.
    """

    summary: str
    time_constants: tuple[float, float | None] | None
    total_weight: float = 0.0
    D: float = 1.0
    needs_text: bool = False

    def taus(self, config: TransMambaConfig) -> Tensor:
        """Time constants of the heads, (num_state_heads,)."""
        assert self.time_constants is not None
        shortest, longest = self.time_constants
        longest = config.max_position_embeddings if longest is None else longest
        return torch.logspace(math.log10(shortest), math.log10(longest), config.num_state_heads)

    def gains(self, config: TransMambaConfig) -> Tensor:
        """tau g of the heads, (num_state_heads,)."""
        assert config.num_state_heads is not None
        assert config.head_dim is not None
        return torch.full((config.num_state_heads,), float(config.head_dim) ** self.total_weight)


LOCAL = Initialisation(
    summary="each head averages its last 2 to 32 tokens", time_constants=(2.0, 32.0), total_weight=-1.0, D=0.1
)
INITIALISATIONS: dict[str, Initialisation] = {
    "mamba2": Initialisation(summary="drawn as for a Mamba-2 that is trained from scratch", time_constants=None),
    "averages": Initialisation(
        summary="the first-order term of softmax, over the last 1 to all tokens",
        time_constants=(1.0, None),
        total_weight=-0.5,
        D=0.0,
    ),
    "local": LOCAL,
    "calibrated": Initialisation(
        summary="time constant, weight and D of every head fitted to its attention on text",
        time_constants=LOCAL.time_constants,
        total_weight=LOCAL.total_weight,
        D=LOCAL.D,
        needs_text=True,
    ),
}


def find_initialisation(name: str | None, *, has_text: bool) -> tuple[str, Initialisation]:
    """The row of this name; None is "calibrated" where there is text and "local" where there is none.

    Raises:
        InputError: the name is unknown, or its values need text and there is none.
    """
    name = name or ("calibrated" if has_text else "local")
    if name not in INITIALISATIONS:
        raise InputError(f"initialisation={name!r} is unknown; choose one of {', '.join(INITIALISATIONS)}.")
    if INITIALISATIONS[name].needs_text and not has_text:
        raise InputError(
            f"initialisation={name!r} is fitted to text; give token ids as calibration, or choose 'local'."
        )
    return name, INITIALISATIONS[name]


def describe_initial_value(initialisation: Initialisation, target: str, config: TransMambaConfig) -> str:
    """The initial value of a fresh parameter, in words."""
    if initialisation.time_constants is None:
        row = find_initial_value(initial_values(config), target)
        numbers = f"{row.a:g}" if row.distribution in ("normal", "constant") else f"{row.a:g} to {row.b:g}"
        return f"{row.distribution} {numbers}"
    taus, gain = initialisation.taus(config), initialisation.gains(config)[0].item()
    span = f"tau {taus.min():.3g} to {taus.max():.3g}"
    words = {
        "dt_proj.weight": "0",
        "z_proj.weight": "0",
        "z_proj.bias": "1.2785 (gate 1)",
        "dt_bias": f"inverse softplus of {gain:.3g} / tau, {span}",
        "A_log": f"{-math.log(gain):.4g} (A = -1 / (tau dt))",
        ".D": f"{initialisation.D:g}",
    }
    return next(words[ending] for ending in words if target.endswith(ending))


def draw_initial_value(
    initialisation: Initialisation, target: str, shape: tuple[int, ...], config: TransMambaConfig
) -> Tensor:
    """The initial value of a fresh parameter, fp32."""
    if initialisation.time_constants is None:
        parameter = nn.Parameter(torch.empty(shape))
        row = find_initial_value(initial_values(config), target)
        with torch.no_grad():
            apply_initial_value(parameter, row, dt_init_floor=config.dt_init_floor)
        return parameter.detach()
    dt_bias, A_log = _step_parameters(initialisation.taus(config), initialisation.gains(config))
    values = {
        "dt_proj.weight": torch.zeros(shape),
        "z_proj.weight": torch.zeros(shape),
        "z_proj.bias": torch.full(shape, OPEN_GATE),
        "dt_bias": dt_bias,
        "A_log": A_log,
        ".D": torch.full(shape, initialisation.D),
    }
    return next(values[ending] for ending in values if target.endswith(ending))


@torch.no_grad()
def calibrate(student: TransMambaForCausalLM, tokens: Tensor) -> dict[str, str]:
    """Fit tau, g and D of every head to its attention on tokens (windows, window length).

    Returns the new values in words, by parameter. Every layer reads what it reads in the source. tau is the best power
    of two up to the window, g and D the least squares given tau.
    """
    if tokens.dim() != 2 or 0 in tokens.shape or tokens.is_floating_point():
        raise InputError(
            f"calibration has shape {tuple(tokens.shape)} and dtype {tokens.dtype}; give token ids "
            "(windows, window length)."
        )
    longest = student.config.max_position_embeddings
    if tokens.shape[1] > longest:
        raise InputError(
            f"calibration has windows of {tokens.shape[1]} tokens and the model {longest} positions; cut them."
        )
    largest = int(tokens.max())
    if largest >= student.config.vocab_size or int(tokens.min()) < 0:
        raise InputError(f"calibration has token id {largest}; the model knows 0 to {student.config.vocab_size - 1}.")
    taus = [2.0**power for power in range(tokens.shape[1].bit_length())]
    mixers: list[Any] = [layer.mixer for layer in student.model.layers]
    fits = [_HeadFit(taus) for _ in mixers]
    schedule = student.config.schedule
    student.set_trans_points("transformer")
    try:
        with _watched(mixers, fits):
            for window in tokens.to(next(student.parameters()).device):
                student.model(input_ids=window[None], use_cache=False)
    finally:
        student.set_trans_points(schedule)
    words: dict[str, str] = {}
    for number, (mixer, fit) in enumerate(zip(mixers, fits, strict=True)):
        tau, gain, D = fit.solve()
        dt_bias, A_log = _step_parameters(tau, gain)
        mixer.dt_proj.weight.zero_()
        if mixer.z_proj is not None:
            mixer.z_proj.weight.zero_()
            mixer.z_proj.bias.fill_(OPEN_GATE)
        for parameter, value in ((mixer.dt_bias, dt_bias), (mixer.A_log, A_log), (mixer.D, D)):
            parameter.copy_(value)
        prefix = f"model.layers.{number}.mixer."
        words[f"{prefix}dt_bias"] = (
            f"fitted: tau {tau.min():g} to {tau.max():g}, tau dt {gain.min():.2g} to {gain.max():.2g}"
        )
        words[f"{prefix}A_log"] = "fitted: A = -1 / (tau dt)"
        words[f"{prefix}D"] = f"fitted: {D.min():.2g} to {D.max():.2g}"
    return words


class _HeadFit:
    """Sums over tokens from which the best tau, tau g and D of every head of one layer follow."""

    def __init__(self, taus: list[float]) -> None:
        self.taus = taus
        self.hidden: Tensor | None = None
        self.rotary: RotaryTables | None = None
        self.layout: TokenLayout | None = None
        # (sums, heads), fp64. Of every tau: scan . scan, scan . v, scan . attention; then v . v, v . attention,
        # attention . attention.
        self.sums: Tensor | float = 0.0

    def add(self, mixer: TransMambaMixer, attention: Tensor) -> None:
        """attention: what o_proj reads, (1, seq_len, heads * head_dim)."""
        assert self.hidden is not None
        assert self.layout is not None
        c = mixer.config
        assert c.conv_kernel == 0
        assert c.num_state_heads == c.num_attention_heads
        q, k, v = mixer.project(self.hidden, self.layout)
        if c.ssm_rope and c.rotary and self.rotary is not None:
            q, k = (apply_rotary(x, self.rotary.cos, self.rotary.sin) for x in (q, k))
        q, k, v, attention = (x.float() for x in (q, k, v, attention.unflatten(-1, (-1, c.head_dim))))
        all_v = v.repeat_interleave(c.num_attention_heads // c.num_key_value_heads, dim=2)
        sums: list[Tensor] = []
        for tau in self.taus:
            dt = torch.full((*q.shape[:2], c.num_state_heads), 1 / tau, device=q.device)
            scan = ssd_scan(q, k, v, dt, torch.full((c.num_state_heads,), -1.0, device=q.device))
            sums += [_dot(scan, scan), _dot(scan, all_v), _dot(scan, attention)]
        sums += [_dot(all_v, all_v), _dot(all_v, attention), _dot(attention, attention)]
        self.sums = self.sums + torch.stack(sums)

    def solve(self) -> tuple[Tensor, Tensor, Tensor]:
        """tau, tau g and D of the heads, (heads,) each."""
        assert isinstance(self.sums, Tensor)
        ss, sv, sy = self.sums[:-3].unflatten(0, (-1, 3)).unbind(1)  # (taus, heads)
        vv, vy, yy = self.sums[-3:]
        floor = 1e-5 * ss * vv + 1e-30  # reached where the scan is a multiple of v, up to fp32, or 0
        determinant = torch.maximum(ss * vv - sv * sv, floor)
        gain = ((sy * vv - vy * sv) / determinant).clamp(min=LEAST_GAIN)
        D = (vy - gain * sv) / vv.clamp(min=1e-30)
        error = yy - 2 * gain * sy - 2 * D * vy + gain**2 * ss + 2 * gain * D * sv + D**2 * vv
        best = error.argmin(dim=0, keepdim=True)
        tau = torch.tensor(self.taus, device=best.device)[best[0]]
        return tau, gain.gather(0, best)[0].float(), D.gather(0, best)[0].float()


@contextmanager
def _watched(mixers: list[Any], fits: list[_HeadFit]) -> Iterator[None]:
    """Let every fit see what its mixer reads and what its o_proj reads."""
    handles = []
    for mixer, fit in zip(mixers, fits, strict=True):

        def remember(_: nn.Module, inputs: tuple[Any, ...], fit: _HeadFit = fit) -> None:
            fit.hidden, fit.rotary, fit.layout = inputs[:3]

        def add(_: nn.Module, inputs: tuple[Any, ...], fit: _HeadFit = fit, mixer: Any = mixer) -> None:
            fit.add(mixer, inputs[0])
            fit.hidden = fit.rotary = fit.layout = None

        handles += [mixer.register_forward_pre_hook(remember), mixer.o_proj.register_forward_pre_hook(add)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((0, 1, 3)).cpu().double()  # not every device has fp64


def _step_parameters(tau: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """dt_bias and A_log of heads with these time constants, where tau g = gain."""
    dt = gain / tau
    return dt + torch.log(-torch.expm1(-dt)), -gain.log()
