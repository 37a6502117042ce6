"""Which device a command runs on."""

import torch

from transmamba.errors import InputError

__all__ = ["resolve_device"]


def resolve_device(name: str = "auto") -> torch.device:
    """The device of this name, such as cpu, cuda, cuda:1 or mps; "auto" is the first there is of cuda, mps and cpu.

    Raises:
        InputError: the name is unknown, or this machine has no such device.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    here = [kind for kind, is_there in available.items() if is_there]
    try:
        device = torch.device(here[0] if name == "auto" else name)
    except RuntimeError as error:  # the only type torch raises for a name it does not know
        raise InputError(f"device {name!r} is not known; this machine has {', '.join(here)}, or say auto.") from error
    if device.type not in here:
        raise InputError(f"device {name!r} is not available; this machine has {', '.join(here)}, or say auto.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device {name!r} is beyond the {torch.cuda.device_count()} CUDA devices here, from cuda:0 on."
        )
    return device
