"""The configuration of VideoMamba: flat, in Hugging Face's names, checked when it is made."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from transmamba.errors import InputError
from transmamba.models.vision import check_choice, check_sizes, default_dt_rank, sides
from transmamba.modules.scan_orders import scan_order_names


@strict
class VideoMambaConfig(PreTrainedConfig):
    """Sizes and choices of a VideoMamba (arXiv 2403.06977). The defaults are VideoMamba-tiny for images.

    Args:
        image_size: pixels, one number or [height, width], that the position embeddings are made for; any size runs.
        num_frames: frames of a video that the temporal embeddings are made for, any number runs; None = images.
        tubelet_size: frames of one token.
        patch_size, patch_stride: pixels of a patch's side, and between patches (None = patch_size).
        scan_order: the order in which the forward direction visits the patches; the backward one is its reverse. None:
            "spatial_first" for videos, "raster" for images. The class token stands first.
        state_size, conv_kernel, expand, dt_rank: of the mixer, as in Mamba-1.
        norm_eps: of the RMSNorms. residual_in_fp32: the residual stream is fp32 whatever the weights are.
        drop_path_rate: of the last layer; it grows evenly from 0 in the first.
    """

    model_type = "video_mamba"
    attribute_map: ClassVar[dict[str, str]] = {"num_layers": "num_hidden_layers"}

    image_size: Any = 224
    num_frames: int | None = None
    tubelet_size: int = 1
    patch_size: int = 16
    patch_stride: int | None = None
    num_channels: int = 3
    hidden_size: int = 192
    num_hidden_layers: int = 24
    scan_order: str | None = None
    state_size: int = 16
    conv_kernel: int = 4
    expand: int = 2
    dt_rank: int | None = None
    conv_bias: bool = True
    use_bias: bool = False
    norm_eps: float = 1e-5
    residual_in_fp32: bool = True
    drop_path_rate: float = 0.0
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        self.patch_stride = self.patch_size if self.patch_stride is None else self.patch_stride
        check_sizes(
            self,
            (
                *("patch_size", "patch_stride", "num_channels", "hidden_size", "num_hidden_layers"),
                *("state_size", "conv_kernel", "expand", "tubelet_size"),
            ),
        )
        if self.num_frames is not None and (self.num_frames < 1 or self.num_frames % self.tubelet_size):
            raise InputError(
                f"num_frames={self.num_frames} must be a multiple of tubelet_size={self.tubelet_size}, "
                "or None for images."
            )
        if self.scan_order is None:
            self.scan_order = "raster" if self.num_frames is None else "spatial_first"
        check_choice("scan_order", self.scan_order, scan_order_names(2 if self.num_frames is None else 3))
        self.dt_rank = default_dt_rank(self.hidden_size) if self.dt_rank is None else self.dt_rank
        if min(self.trained_grid) < 1:
            raise InputError(f"image_size={self.image_size} holds no patch of {self.patch_size} x {self.patch_size}.")
        super().__post_init__(**kwargs)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Whole patches of an image, or of a frame."""
        stride = self.patch_stride or self.patch_size
        return (height - self.patch_size) // stride + 1, (width - self.patch_size) // stride + 1

    @property
    def trained_grid(self) -> tuple[int, int]:
        """The grid of image_size."""
        return self.grid(*sides(self.image_size))
