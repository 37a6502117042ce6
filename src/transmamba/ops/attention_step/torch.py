"""attention_step through torch's scaled_dot_product_attention, masked behind each row's length."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from transmamba.ops.softmax_attention.torch import without_cudnn


def attention_step_torch(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """Return the attention output; see attention_step."""
    places = torch.arange(keys.shape[1], device=q.device)
    mask = places < lengths[:, None]
    k, v = keys.transpose(1, 2), values.transpose(1, 2)
    with without_cudnn(q.device):
        y = scaled_dot_product_attention(
            q[:, :, None], k, v, attn_mask=mask[:, None, None], enable_gqa=keys.shape[2] != q.shape[1]
        )
    return y[:, :, 0]
