"""The configuration of PlainMamba: flat, in Hugging Face's names, checked when it is made."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from transmamba.errors import InputError
from transmamba.models.vision import check_choice, check_sizes, default_dt_rank, sides
from transmamba.modules.scan_orders import PLAIN_MAMBA_ORDERS


@strict
class PlainMambaConfig(PreTrainedConfig):
    """Sizes and choices of a PlainMamba (arXiv 2403.17695). The defaults are the 12-layer tiny student.

    Args:
        image_size: pixels, one number or [height, width], that the position embeddings are made for; any size runs.
        patch_size: pixels of a patch's side, even: the stem halves the image first.
        num_stem_convs: 3 x 3 convolutions in the stem, after the one that halves.
        state_size, conv_kernel, expand, dt_rank: of the mixer, as in Mamba-1; conv_kernel is odd, of a 2-D convolution.
        layers_with_local_conv: layers followed by a depthwise 3 x 3 convolution, BatchNorm and GELU (L1 has the first).
        scan_orders: names of orders that move from neighbour to neighbour.
        layer_norm_eps, final_norm_eps: of the norms in the layers, and of the last one.
        drop_path_rate: of the last layer; it grows evenly from 0 in the first.
    """

    model_type = "plain_mamba"
    attribute_map: ClassVar[dict[str, str]] = {"num_layers": "num_hidden_layers"}

    image_size: Any = 224
    patch_size: int = 16
    num_channels: int = 3
    hidden_size: int = 192
    num_hidden_layers: int = 12
    num_stem_convs: int = 2
    state_size: int = 16
    conv_kernel: int = 7
    expand: int = 2
    dt_rank: int | None = None
    conv_bias: bool = True
    use_bias: bool = True
    layers_with_local_conv: Any = ()
    scan_orders: Any = PLAIN_MAMBA_ORDERS
    layer_norm_eps: float = 1e-5
    final_norm_eps: float = 1e-6
    drop_path_rate: float = 0.0
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        check_sizes(
            self,
            ("patch_size", "num_channels", "hidden_size", "num_hidden_layers", "state_size", "conv_kernel", "expand"),
        )
        if self.num_stem_convs < 0:
            raise InputError(f"num_stem_convs={self.num_stem_convs} must be at least 0.")
        if self.patch_size % 2:
            raise InputError(f"patch_size={self.patch_size} must be even: the stem halves the image first.")
        if self.conv_kernel % 2 == 0:
            raise InputError(f"conv_kernel={self.conv_kernel} must be odd; try {self.conv_kernel + 1}.")
        self.dt_rank = default_dt_rank(self.hidden_size) if self.dt_rank is None else self.dt_rank
        self.layers_with_local_conv = sorted(self.layers_with_local_conv)
        for layer in self.layers_with_local_conv:
            if not 0 <= layer < self.num_hidden_layers:
                raise InputError(f"layers_with_local_conv names layer {layer} of {self.num_hidden_layers}.")
        self.scan_orders = list(self.scan_orders)
        if not self.scan_orders:
            raise InputError("scan_orders is empty; name at least one.")
        for name in self.scan_orders:
            check_choice("scan_orders", name, PLAIN_MAMBA_ORDERS)
        super().__post_init__(**kwargs)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Patches of an image: halved, then padded on the right and at the bottom to whole patches."""
        stride = self.patch_size // 2
        return -(-((height + 1) // 2) // stride), -(-((width + 1) // 2) // stride)

    @property
    def trained_grid(self) -> tuple[int, int]:
        """The grid of image_size."""
        return self.grid(*sides(self.image_size))
