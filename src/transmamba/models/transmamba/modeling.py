"""The TransMamba language model: embedding, layers of mixer and MLP, head; a transformers PreTrainedModel.

Notable: a layer is pre-norm residual as in Llama; padding is removed before the first layer and packed documents are
told apart by their positions, so every execution (full, packed, padded, chunked, stepwise) computes the same function
of the document; baselines are schedules of this model, or its "standard" form.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils.generic import can_return_tuple

from transmamba.errors import CacheError, InputError
from transmamba.modules import (
    GatedMLP,
    MixerConfig,
    PlainMLP,
    RotaryTables,
    TokenLayout,
    TransMambaCache,
    TransMambaLayerCache,
    TransMambaMixer,
)
from transmamba.modules.plain import called_again
from transmamba.ops.checks import check_finite, values_are_checked
from transmamba.ops.recomputation import recomputing
from transmamba.schedule import TransPointSchedule

from .configuration import TransMambaConfig
from .decoding import LENGTH_DEPENDENT_ROPE, Decoder, announce, obstacle
from .initial_values import apply_initial_value, find_initial_value, initial_values

logger = logging.getLogger(__name__)


class TransMambaPreTrainedModel(PreTrainedModel):
    """What all TransMamba models share: initial values, checkpointing, the kind of cache."""

    config_class = TransMambaConfig
    config: TransMambaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TransMambaDecoderLayer"]  # noqa: RUF012 -- transformers' own class attribute
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _is_stateful = True  # a row that has switched cannot be rewound: transformers then refuses assisted generation
    _can_compile_fullgraph = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw the parameters that the module itself owns; transformers calls it once for each that owns some."""
        if isinstance(
            module, LlamaRotaryEmbedding
        ):  # its buffers are in no checkpoint: loading leaves them to this method
            super()._init_weights(module)
        made_by_resizing = "embed_tokens" if isinstance(module, nn.Embedding) else "lm_head"
        name = next((name for name, other in self.named_modules() if other is module), made_by_resizing)
        table = initial_values(self.config)
        for ending, parameter in module.named_parameters(recurse=False):
            row = find_initial_value(table, f"{name}.{ending}")
            apply_initial_value(parameter, row, dt_init_floor=self.config.dt_init_floor)


class TransMambaModel(TransMambaPreTrainedModel):
    """The backbone: token ids or embeddings to hidden states."""

    def __init__(self, config: TransMambaConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            [TransMambaDecoderLayer(config, number) for number in range(config.num_hidden_layers)]
        )
        self.norm = _norm(config)
        learned = config.position_embedding == "learned"
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size) if learned else None
        self.rotary_emb = None if learned else TransMambaRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def set_trans_points(self, schedule: Sequence[int | None] | str) -> TransPointSchedule:
        """Run with another schedule from now on: a TransPointSchedule, a list, or a name.

        Caches made before do not fit it any more.
        """
        checked = self.config.check_schedule(schedule)
        if self.config.mixer_form == "standard" and list(checked) != self.config.trans_points:
            raise InputError(
                f"mixer_form='standard' has one mode per layer, fixed at {self.config.trans_points}; "
                "a model that can change its schedule has mixer_form='shared'."
            )
        self.config.trans_points = checked.to_list()
        for mixer, point in zip(self._mixers(), checked, strict=True):
            mixer.trans_point = point
        return checked

    def make_cache(self) -> TransMambaCache:
        """An empty cache for the current schedule."""
        mixers = self._mixers()
        kernels = [0 if mixer.conv1d is None else self.config.conv_kernel for mixer in mixers]
        return TransMambaCache([mixer.trans_point for mixer in mixers], kernels)

    def _mixers(self) -> list[TransMambaMixer]:
        return [cast(TransMambaDecoderLayer, layer).mixer for layer in self.layers]

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | Sequence[int] | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Return last_hidden_state (batch, seq_len, hidden_size), and the cache when use_cache.

        Args:
            input_ids: (batch, seq_len); or inputs_embeds (batch, seq_len, hidden_size).
            attention_mask: (batch, past + seq_len), 0 = padding, on either side. Hidden states of padding are zero
                before the norm.
            position_ids: (batch, seq_len). Where they do not rise by one, a new document begins (packing). Positions
                are counted within the document in any case; with a cache they are not read.
            cu_seqlens: borders of packed documents over the flattened batch, instead of position_ids.
            past_key_values: a TransMambaCache of this schedule, from an earlier call or make_cache().
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise InputError("give input_ids or inputs_embeds, one of the two.")
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise InputError(
                "attention weights are never formed here, and SSM layers have none; leave output_attentions unset."
            )
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch, seq_len = hidden.shape[:2]
        cache = self._cache(past_key_values, use_cache)
        pasts = None if cache is None else cache.pasts(batch)
        fresh = pasts is None or not any(pasts)
        layout = TokenLayout.of(
            batch,
            seq_len,
            hidden.device,
            attention_mask=attention_mask,
            position_ids=position_ids if fresh else None,
            cu_seqlens=cu_seqlens,
            pasts=None if fresh else pasts,
        )
        if cache is not None and layout.packed:
            if use_cache or past_key_values is not None:
                raise InputError(
                    "a cache holds one document a row, and these rows are packed; pass use_cache=False and no cache."
                )
            cache = None
        self._warn_of_untrained_modes(layout)
        rotary = self._rotary(hidden, layout)

        record_all = output_hidden_states if output_hidden_states is not None else self.config.output_hidden_states
        recorded: list[Tensor] = []
        rewind = 0 if cache is None else cache.rewind
        hidden = layout.pack(hidden)
        if self.embed_positions is not None:
            hidden = hidden + self.embed_positions(self._learned_positions(layout))
        for number, layer in enumerate(self.layers):
            if record_all:
                recorded.append(layout.unpack(hidden))
            hidden = layer(hidden, rotary, layout, None if cache is None else cache.layers[number], rewind)
        hidden = layout.unpack(self.norm(hidden))
        if cache is not None:
            cache.advance(layout.lengths, seq_len)
        if values_are_checked(hidden):
            check_finite("TransMambaModel", {"last_hidden_state": hidden})
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=cache,
            hidden_states=(*recorded, hidden) if record_all else None,
        )

    def _cache(self, given: Cache | None, use_cache: bool | None) -> TransMambaCache | None:
        wanted = use_cache if use_cache is not None else self.config.use_cache and not self.training
        if self.gradient_checkpointing and self.training:
            wanted = False
        if given is None:
            return self.make_cache() if wanted else None
        if not isinstance(given, TransMambaCache):
            raise CacheError(
                f"past_key_values is a {type(given).__name__}; pass a TransMambaCache (model.make_cache()), or None."
            )
        if given.trans_points != self.config.trans_points:
            raise CacheError(
                f"this cache was made for the schedule {given.trans_points} and the model runs "
                f"{self.config.trans_points}; begin a new one."
            )
        return given

    def _learned_positions(self, layout: TokenLayout) -> Tensor:
        self.check_learned_positions(layout.longest)
        return layout.positions()

    def check_learned_positions(self, longest: int) -> None:
        """Raise InputError where positions are learned and a document is longer than they reach."""
        room = self.config.max_position_embeddings
        if self.embed_positions is not None and longest > room:
            raise InputError(
                f"a document has {longest} tokens and this model learned {room} positions; "
                f"give at most {room}, or cut the document."
            )

    def _rotary(self, hidden: Tensor, layout: TokenLayout) -> RotaryTables | None:
        if self.rotary_emb is None:
            return None
        # fp32 tables, whatever the model's dtype: bf16 positions above 256 are not whole numbers.
        like = torch.zeros(1, device=hidden.device)
        cos, sin = self.rotary_emb(like, layout.positions())
        crossed = [p for p in self.config.trans_points if p and layout.crosses(p)]
        reach = 0 if self.config.ssm_rope else max([0, *crossed])  # torch.compile cannot trace max's default
        if not reach or self.rotary_emb.rope_type in LENGTH_DEPENDENT_ROPE:
            return RotaryTables(cos, sin)
        return RotaryTables(cos, sin, *self.rotary_emb(like, torch.arange(reach, device=hidden.device)[None]))

    def _warn_of_untrained_modes(self, layout: TokenLayout) -> None:
        trained = self.config.max_position_embeddings
        longest = layout.longest
        if longest <= trained or self._warned_beyond:
            return
        untrained = [
            number
            for number, point in enumerate(self.config.trans_points)
            if point is not None and trained <= point < longest
        ]
        if untrained:
            self._warned_beyond = True
            logger.warning(
                "layers %s switch to their SSM beyond the trained length of %d, where it was never trained; "
                "set_trans_points(config.schedule.stays_attention_from(%d)) keeps them in attention.",
                untrained,
                trained,
                trained,
            )

    _warned_beyond = False


class TransMambaForCausalLM(TransMambaPreTrainedModel, GenerationMixin):
    """The language model: backbone and head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 -- transformers' own class attribute

    def __init__(self, config: TransMambaConfig) -> None:
        super().__init__(config)
        self.model = TransMambaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.decoder = Decoder()
        self.post_init()

    def set_trans_points(self, schedule: Sequence[int | None] | str) -> TransPointSchedule:
        """Run with another schedule from now on; see TransMambaModel.set_trans_points."""
        return self.model.set_trans_points(schedule)

    def make_cache(self) -> TransMambaCache:
        """An empty cache for the current schedule."""
        return self.model.make_cache()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | Sequence[int] | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits (batch, seq_len or logits_to_keep, vocab_size), and the loss when labels are given.

        labels: (batch, seq_len), shifted here; -100 is ignored. logits_to_keep: only the last n positions, or the
            positions given.
        The rest as in TransMambaModel.forward.
        """
        if input_ids is not None and labels is None and attention_mask is None and not output_hidden_states:
            stepped = self._recorded_step(input_ids, past_key_values)
            if stepped is not None:
                return CausalLMOutputWithPast(logits=stepped, past_key_values=past_key_values)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cu_seqlens=cu_seqlens,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        hidden = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        logits = self.lm_head(hidden if isinstance(kept, int) else hidden[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )

    def _recorded_step(self, input_ids: Tensor, cache: Cache | None) -> Tensor | None:
        """Logits (batch, 1, vocab_size) where generation goes on by one token and can be recorded, else None."""
        if not isinstance(cache, TransMambaCache) or cache.planned_length is None or input_ids.shape[1] != 1:
            return None
        if not cache.lengths or min(cache.lengths) == 0 or max(cache.lengths) >= cache.planned_length:
            return None
        if torch.is_grad_enabled() or self.training or self.config.output_hidden_states:
            return None
        checked = self.model._cache(cache, True)
        if checked is None or len(cache.lengths) != len(input_ids):
            return None
        self.model.check_learned_positions(max(cache.lengths) + 1)
        return self.decoder.step(self.model, self.lm_head, self.model._mixers(), cache, input_ids[:, 0])[:, None]

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """transformers' own; a token behind a cache has no padding, so its mask is left out rather than read."""
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        cache, ids = past_key_values, inputs.get("input_ids")
        behind = isinstance(cache, TransMambaCache) and cache.planned_length is not None and cache.columns > 0
        if behind and ids is not None and ids.shape[1] == 1:
            inputs["attention_mask"] = None
        return cast(dict[str, Any], inputs)

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        if generation_config.use_cache is False:
            return
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise InputError(
                f"cache_implementation={generation_config.cache_implementation!r} does not fit TransMamba, "
                "whose cache changes its form at the TransPoints; leave it unset."
            )
        if model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = self.make_cache()
        cache = model_kwargs["past_key_values"]
        if isinstance(cache, TransMambaCache):
            rows = batch_size * max(1, generation_config.num_return_sequences or 1)
            wanted = self.decoder.wanted_on(self.device)
            reason = obstacle(self, self.model, batch=rows, beams=generation_config.num_beams or 1) if wanted else ""
            if reason:
                announce(reason)
            cache.planned_length = max_cache_length if wanted and not reason else None


class TransMambaRotaryEmbedding(LlamaRotaryEmbedding):
    """Llama's, with frequencies that stay fp32 when the model is cast: in bf16 they are off by radians at position
    1,000.
    """

    inv_freq: Tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TransMambaRotaryEmbedding":
        exact = self.inv_freq
        super()._apply(fn, recurse)
        if self.inv_freq.dtype != exact.dtype:
            self.inv_freq = exact.to(self.inv_freq.device)
        return self


class TransMambaDecoderLayer(GradientCheckpointingLayer):
    """x + mixer(norm(x)), then x + mlp(norm(x)); no MLP where intermediate_size is 0."""

    def __init__(self, config: TransMambaConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        trans_point = config.trans_points[layer_idx]
        has_rope = config.position_embedding == "rotary" and (
            config.rope_layers is None or config.rope_layers[layer_idx]
        )
        self.input_layernorm = _norm(config)
        self.mixer = TransMambaMixer(mixer_config(config, trans_point, rotary=has_rope), trans_point)
        if config.intermediate_size:
            self.post_attention_layernorm = _norm(config)
            form = GatedMLP if config.mlp_gated else PlainMLP
            self.mlp: GatedMLP | PlainMLP | None = form(
                config.hidden_size, config.intermediate_size, config.hidden_act, bias=config.mlp_bias
            )
        else:
            self.mlp = None

    def forward(
        self,
        hidden: Tensor,
        rotary: RotaryTables | None,
        layout: TokenLayout,
        cache: TransMambaLayerCache | None,
        rewind: int,
    ) -> Tensor:
        with recomputing(self._recomputes() and cache is None):
            hidden = hidden + self.mixer(called_again(self.input_layernorm, hidden), rotary, layout, cache, rewind)
            if self.mlp is None:
                return hidden
            return hidden + self.mlp(called_again(self.post_attention_layernorm, hidden))

    def _recomputes(self) -> bool:
        """Whether backward computes again what is cheap; gradient checkpointing does so with all of the layer."""
        return self.config.recompute_activations and self.training and not self.gradient_checkpointing


def mixer_config(config: TransMambaConfig, trans_point: int | None, *, rotary: bool = True) -> MixerConfig:
    """The mixer of a layer; in the standard form it depends on the TransPoint. rotary: whether the layer has it."""
    standard = config.mixer_form == "standard"
    is_attention, is_ssm = standard and trans_point is None, standard and trans_point is not None
    return MixerConfig(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=cast(int, config.num_key_value_heads),  # the config has filled these in
        num_state_heads=cast(int, config.num_state_heads),
        head_dim=cast(int, config.head_dim),
        conv_kernel=0 if is_attention else config.conv_kernel,
        conv_bias=config.conv_bias,
        attention_bias=config.attention_bias,
        use_gate=config.use_gate and not is_attention,
        mode_norm=(config.mode_norm or is_ssm) and not is_attention,
        ssm_rope=config.ssm_rope and not is_ssm,
        rms_norm_eps=config.rms_norm_eps,
        attention_output_bias=config.attention_output_bias,
        qk_norm=config.qk_norm,
        rotary=rotary,
        gate_bias=config.gate_bias,
        has_attention=not is_ssm,
        has_ssm=not is_attention,
    )


def _norm(config: TransMambaConfig) -> nn.Module:
    kind = nn.RMSNorm if config.norm_type == "rms" else nn.LayerNorm
    return kind(config.hidden_size, eps=config.rms_norm_eps)
