"""
Falcon (Almazrouei et al. 2023, https://huggingface.co/papers/2311.16867) as a decoder that images can reach.

transformers' `FalconModel` calls its layers with a fixed list of arguments. This one hands unknown keyword arguments
on to them, as newer models do; weights, layers and configuration are those of transformers.
"""

import torch
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.falcon.modeling_falcon import FalconAttention, FalconDecoderLayer, FalconModel
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs


class OtterFalconModel(FalconModel):
    """
    The decoder without output layer, for configurations with rotary embeddings (all Falcon but the `-rw-` models).

    Raises:
        ValueError: at construction, for a configuration with ALiBi.
    """

    # transformers has a list of Falcon's attentions, in which it is not
    _supports_varlen_sdpa = False
    _can_record_outputs = {
        "hidden_states": FalconDecoderLayer,
        "attentions": OutputRecorder(FalconAttention, index=1),
    }

    def __init__(self, config):
        if config.alibi:
            raise ValueError("text_config.alibi is True; of the Falcon models only those with rotary embeddings work.")
        super().__init__(config)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """As in the parent class; `kwargs` reach every layer. ValueError unless exactly one kind of input is given."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)  # (B, L, hidden)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_length
            position_ids = position_ids.unsqueeze(0)  # (1, L)
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        for layer in self.h:
            hidden_states, _ = layer(
                hidden_states,
                alibi=None,
                attention_mask=causal_mask,
                position_ids=position_ids,
                layer_past=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.ln_f(hidden_states), past_key_values=past_key_values)


__all__ = ["OtterFalconModel"]
