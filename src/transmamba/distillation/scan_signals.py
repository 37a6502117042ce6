"""What every scan of a student reads: step sizes, B and C of each layer and direction, tapped while it runs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.functional import softplus

from transmamba.errors import InputError
from transmamba.models import VisionMambaClassifier
from transmamba.modules import BidirectionalMambaMixer, DirectionOutput, PlainMambaMixer, scan_order


@dataclass(frozen=True)
class ScanSignal:
    """One direction of a layer: dt (batch, steps, channels), B and C (batch, steps, state_size), A (channels,
    state_size), D (channels,), in scan order. patches: of the steps."""

    dt: Tensor
    B: Tensor
    C: Tensor
    A: Tensor
    D: Tensor
    patches: Tensor


@dataclass
class ScanWatch:
    """What the projections of a student's mixers wrote in its last forward pass."""

    mixers: list[PlainMambaMixer | BidirectionalMambaMixer]
    seen: dict[tuple[int, str], Tensor] = field(default_factory=dict)

    def signals(self, directions: Sequence[Sequence[DirectionOutput]]) -> list[tuple[ScanSignal, ...]]:
        """For every layer one signal a direction; directions: the student's own output."""
        found = []
        for layer, (mixer, outputs) in enumerate(zip(self.mixers, directions, strict=True)):
            read = _plain if isinstance(mixer, PlainMambaMixer) else _bidirectional
            found.append(
                tuple(read(cast(Any, mixer), layer, place, output, self.seen) for place, output in enumerate(outputs))
            )
        return found


@contextmanager
def watched_scans(student: VisionMambaClassifier) -> Iterator[ScanWatch]:
    """Within, the student's forward pass is watched.

    Raises:
        InputError: its mixers make B and C in no module of their own.
    """
    mixers = [module for module in student.modules() if isinstance(module, PlainMambaMixer | BidirectionalMambaMixer)]
    if not mixers:
        raise InputError(
            f"{type(student).__name__} makes B and C of all directions in one product, where they cannot be tapped; "
            "choose a PlainMamba, ViM or VideoMamba, or another method."
        )
    watch = ScanWatch(mixers)

    def keep(layer: int, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            watch.seen[layer, name] = output

        return hook

    handles = []
    for layer, mixer in enumerate(mixers):
        names = ["x_proj", "dt_proj"]
        if isinstance(mixer, BidirectionalMambaMixer):
            names += ["x_proj_b", "dt_proj_b"]
        handles += [getattr(mixer, name).register_forward_hook(keep(layer, name)) for name in names]
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()


def _bidirectional(
    mixer: BidirectionalMambaMixer,
    layer: int,
    place: int,
    output: DirectionOutput,
    seen: dict[tuple[int, str], Tensor],
) -> ScanSignal:
    way = "_b" if place else ""
    _, B, C = seen[layer, f"x_proj{way}"].split(mixer.split_sizes, dim=-1)
    A_log, D = (mixer.A_b_log, mixer.D_b) if place else (mixer.A_log, mixer.D)
    dt = softplus(seen[layer, f"dt_proj{way}"].float())
    return ScanSignal(dt=dt, B=B, C=C, A=-A_log.float().exp(), D=D, patches=output.patches)


def _plain(
    mixer: PlainMambaMixer, layer: int, place: int, output: DirectionOutput, seen: dict[tuple[int, str], Tensor]
) -> ScanSignal:
    """As published, step t of a scan takes dt, B and C of patch t of the raster, and dt_proj's bias twice."""
    _, B, C = seen[layer, "x_proj"].split(mixer.split_sizes, dim=-1)
    moves = scan_order(output.name, output.grid, output.patches.device).moves()
    dt = softplus((seen[layer, "dt_proj"] + mixer.dt_proj.bias).float())
    return ScanSignal(
        dt=dt,
        B=B + mixer.direction_Bs[moves].to(B.dtype),
        C=C,
        A=-mixer.A_log.float().exp(),
        D=mixer.D,
        patches=output.patches,
    )
