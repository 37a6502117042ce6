"""The configuration of VMamba: flat, in Hugging Face's names, checked when it is made."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from transmamba.errors import InputError
from transmamba.models.vision import check_choice, check_sizes

PATCH_EMBEDDINGS = ("convolutions", "patches")
DOWNSAMPLINGS = ("conv3", "conv2", "merge")


@strict
class VMambaConfig(PreTrainedConfig):
    """Sizes and choices of a VMamba (arXiv 2401.10166). The defaults are VMamba-T as published last (v05_noz, s1l8).

    Args:
        image_size: pixels, one number or [height, width]; nothing depends on it, any size runs.
        patch_size: pixels between the positions of the first stage; even for patch_embedding="convolutions".
        depths, hidden_sizes: blocks and width of each stage; every stage but the first halves the sides.
        state_size, conv_kernel, expand: of the mixer; expand may be a fraction (ssm_ratio). The rank of the steps is a
            sixteenth of the width.
        use_gate: gate the mixer's output (published variants with "_noz" have none).
        mlp_ratio: width of the MLP over that of the stage; 0 = no MLP (v0).
        patch_embedding: "convolutions" = two of 3 x 3 (v2), "patches" = one of patch_size (v1).
        downsampling: "conv3" = 3 x 3 (v3), "conv2" = 2 x 2 (v2), "merge" = four patches side by side (v1).
        drop_path_rate: of the last block; it grows evenly from 0 in the first.
    """

    model_type = "vmamba"
    attribute_map: ClassVar[dict[str, str]] = {}

    image_size: Any = 224
    patch_size: int = 4
    num_channels: int = 3
    depths: Any = (2, 2, 8, 2)
    hidden_sizes: Any = (96, 192, 384, 768)
    state_size: int = 1
    conv_kernel: int = 3
    expand: float = 1.0
    conv_bias: bool = False
    use_bias: bool = False
    use_gate: bool = False
    mlp_ratio: float = 4.0
    patch_embedding: str = "convolutions"
    downsampling: str = "conv3"
    norm_eps: float = 1e-5
    drop_path_rate: float = 0.0
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        self.depths, self.hidden_sizes = list(self.depths), list(self.hidden_sizes)
        if not self.depths or len(self.depths) != len(self.hidden_sizes):
            raise InputError(
                f"depths={self.depths} and hidden_sizes={self.hidden_sizes} must have one entry for each stage."
            )
        if min(*self.depths, *self.hidden_sizes) < 1:
            raise InputError(
                f"depths={self.depths} and hidden_sizes={self.hidden_sizes} must be at least 1 throughout."
            )
        check_sizes(self, ("patch_size", "num_channels", "state_size", "conv_kernel"))
        check_choice("patch_embedding", self.patch_embedding, PATCH_EMBEDDINGS)
        check_choice("downsampling", self.downsampling, DOWNSAMPLINGS)
        if self.conv_kernel % 2 == 0:
            raise InputError(f"conv_kernel={self.conv_kernel} must be odd; try {self.conv_kernel + 1}.")
        if self.patch_embedding == "convolutions" and (self.patch_size % 2 or self.hidden_sizes[0] % 2):
            raise InputError(
                f"patch_size={self.patch_size} and hidden_sizes[0]={self.hidden_sizes[0]} must be even: each of "
                "the two convolutions makes one half. Or set patch_embedding='patches'."
            )
        if self.expand <= 0 or self.mlp_ratio < 0:
            raise InputError(f"expand={self.expand} must be > 0 and mlp_ratio={self.mlp_ratio} >= 0 (0 = no MLP).")
        super().__post_init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """The width of the last stage, which a head reads."""
        return self.hidden_sizes[-1]

    @property
    def num_hidden_layers(self) -> int:
        """Blocks of all stages."""
        return sum(self.depths)
