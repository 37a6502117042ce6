import pytest
import torch

from transmamba.errors import InputError
from transmamba.inference import resolve_device


def test_auto_is_the_best_device_here() -> None:
    expected = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert resolve_device("auto").type == resolve_device().type == expected


@pytest.mark.parametrize("name", ["abacus", "cpu:", "meta"])
def test_a_device_that_is_not_here_is_refused_by_name(name: str) -> None:
    with pytest.raises(InputError, match=rf"{name!r}.*this machine has .*cpu"):
        resolve_device(name)


@pytest.mark.gpu
def test_a_cuda_device_past_the_last_is_refused() -> None:
    with pytest.raises(InputError, match="beyond"):
        resolve_device(f"cuda:{torch.cuda.device_count()}")
