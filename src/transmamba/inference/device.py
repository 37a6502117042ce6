"""Which device a command runs on."""

import torch

from transmamba.errors import InputError

__all__ = ["DEVICES", "resolve_device"]

DEVICES = ("auto", "cpu", "cuda", "mps")


def resolve_device(name: str) -> torch.device:
    """The device of this name; "auto" is the first there is of cuda, mps and cpu.

    Raises:
        InputError: the name is unknown, or this machine has no such device.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, is_there in available.items() if is_there))
    if name not in DEVICES:
        raise InputError(f"device={name!r} is unknown; choose one of {', '.join(DEVICES)}.")
    if not available[name]:
        raise InputError(f"device={name!r} is not to be had here: torch sees none. Use 'cpu' or 'auto'.")
    return torch.device(name)
