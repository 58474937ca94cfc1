"""What frozen decoder layers below the first gated block make of a text, kept: a question that comes again is not read
again."""

import torch
from torch import nn

from ..models.flamingo import FlamingoForConditionalGeneration
from ..models.media_store import hash_of_tensor


class TextStateCache:
    """
    Lets a Flamingo in training compute the layers below its first gated block once for each text.

    No picture reaches these layers (Alayrac et al. 2022, https://huggingface.co/papers/2204.14198, section 3.1.2), so
    that frozen they give for a row of tokens always the same: where questions repeat, or epochs do, most of a frozen
    decoder is then never run. Rows are told apart by their embeddings, mask and positions. Calls with a cache of keys
    and values, and those that record hidden states, are computed as ever.

    Args:
        model: an Otter or Flamingo whose embeddings and lower layers are frozen. Their `forward` is replaced.
        max_bytes: of the states that are kept, on the model's device. When it is full nothing more is kept: a cache
            that makes room for the newest would, in an epoch that does not fit, lose each before it comes again.

    Raises:
        ValueError: if something of these layers is trained or drawn at random (dropout), if there are none, if
            they differ in what they attend to, or attend by `flex_attention`.
    """

    def __init__(self, model: FlamingoForConditionalGeneration, max_bytes: int = 2**30):
        self.max_bytes = max_bytes
        self.hits = self.misses = 0
        self._states: dict[tuple, torch.Tensor] = {}  # (L, hidden) each
        self._bytes = 0
        layers = model.model.decoder_layers
        gated = [index for index, layer in enumerate(layers) if layer.gated_cross_attn_layer is not None]
        lower = list(layers)[: gated[0]]
        _check(model, lower)
        self._layers = [layer.forward for layer in lower]
        # as accelerate's device hooks do: the modules, their weights and their names stay as they are
        for index, layer in enumerate(lower):
            layer.forward = self._first if index == 0 else _Passed(layer.forward)

    def _first(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """In place of the first layer: `(B, L, hidden)` embeddings -> what the last of the lower layers gives."""
        if _needs_every_layer(kwargs):
            return self._layers[0](hidden_states, *args, **kwargs)
        kwargs = {name: value for name, value in kwargs.items() if not name.startswith(("vision_", "media_"))}
        size = len(hidden_states)
        lengths = _lengths(hidden_states, kwargs.get("attention_mask"))
        keys = [_key(hidden_states[row], kwargs, row, size, lengths[row]) for row in range(size)]
        found = {key: self._states[key] for key in keys if key in self._states}
        missing = {key: row for row, key in enumerate(keys) if key not in found}
        self.hits += size - len(missing)
        self.misses += len(missing)
        if missing:
            rows = torch.tensor([*missing.values()], device=hidden_states.device)
            args, kwargs = (_rows_of(value, rows, size) for value in (args, kwargs))
            states = self._compute(hidden_states[rows], *args, **kwargs)
            for (key, row), of_row in zip(missing.items(), states, strict=True):
                found[key] = of_row[: lengths[row]]
        self._keep(found)
        output = hidden_states.new_zeros(hidden_states.shape, dtype=next(iter(found.values())).dtype)
        for row, key in enumerate(keys):
            output[row, : lengths[row]] = found[key]  # nobody looks at padding
        # checkpointing asks it of what enters a layer
        return output.requires_grad_(hidden_states.requires_grad)

    @torch.no_grad()
    def _compute(self, states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        for layer in self._layers:
            states = layer(states, *args, **kwargs)
            if not isinstance(states, torch.Tensor):
                raise ValueError("cache_text_states: this decoder's layers give more than states: leave it out.")
        return states

    def _keep(self, found: dict[tuple, torch.Tensor]) -> None:
        for key, states in found.items():
            if key not in self._states and self._bytes + states.nbytes <= self.max_bytes:
                # a copy of its own, as a part of a batch would hold all of it
                self._states[key] = states.clone()
                self._bytes += states.nbytes


class _Passed:
    """In place of a layer whose work the first one has done."""

    def __init__(self, forward):
        self._forward = forward

    def __call__(self, hidden_states: torch.Tensor, *args, **kwargs):
        return self._forward(hidden_states, *args, **kwargs) if _needs_every_layer(kwargs) else hidden_states


def _needs_every_layer(kwargs: dict) -> bool:
    return kwargs.get("past_key_values") is not None or kwargs.get("media_outputs") is not None


def _check(model: FlamingoForConditionalGeneration, lower: list[nn.Module]) -> None:
    if not lower:
        raise ValueError(
            "cache_text_states: the first layer has a gated block already (cross_attn_every_n_layers=1): leave it out."
        )
    trained = [parameter for layer in lower for parameter in layer.parameters() if parameter.requires_grad]
    if trained or model.get_input_embeddings().weight.requires_grad:
        raise ValueError("cache_text_states needs a frozen decoder: add language and embeddings to freeze.")
    config = model.config.text_config
    for name, value in config.to_dict().items():
        # attn_pdrop, attention_dropout, layerdrop; that of a classifier is not of these layers
        is_drop = "drop" in name and not name.startswith("classifier")
        if is_drop and isinstance(value, (int, float)) and value > 0:
            raise ValueError(f"cache_text_states: the decoder draws at random ({name}={value}): set it to 0.")
    if model.model.language_model.config._attn_implementation == "flex_attention":
        raise ValueError(
            "cache_text_states: the masks of flex_attention are of whole batches: set attn_implementation to sdpa, "
            "eager or flash_attention_2."
        )
    kinds = {*(getattr(config, "layer_types", None) or ["all"])[: len(lower)]}
    if len(kinds) > 1:
        raise ValueError(f"cache_text_states: the decoder's layers are of several kinds ({', '.join(sorted(kinds))}).")


def _lengths(hidden_states: torch.Tensor, mask: torch.Tensor | None) -> list[int]:
    """Of each row `(B, L)` the tokens up to the last that is no padding: what is behind changes nothing before it."""
    size, length = hidden_states.shape[:2]
    is_token = None
    if isinstance(mask, torch.Tensor) and len(mask) == size and mask.ndim in (2, 4):
        # as transformers makes them: (B, L) for flash attention, else (B, 1, L, L), where only padding misses itself
        own = mask if mask.ndim == 2 else mask[:, 0].diagonal(dim1=-2, dim2=-1)
        is_token = own == 0 if own.is_floating_point() else own != 0
    if is_token is None or is_token.shape[1] != length:
        return [length] * size
    last = is_token * torch.arange(1, length + 1, device=is_token.device)
    return [found or length for found in last.amax(dim=1).tolist()]


def _key(embeddings: torch.Tensor, kwargs: dict, row: int, size: int, length: int) -> tuple:
    """What the states of a row depend on."""
    told = [embeddings[:length]]
    for name in ("attention_mask", "position_ids"):
        value = kwargs.get(name)
        if isinstance(value, torch.Tensor):
            value = value[row if len(value) == size else 0][..., :length]
            told.append(value[..., :length, :] if value.ndim > 1 else value)
    return tuple((tuple(value.shape), hash_of_tensor(value)) for value in told)


def _rows_of(value, rows: torch.Tensor, size: int):
    """Some rows of all tensors that have a row for each of the batch; what is shared stays."""
    if isinstance(value, torch.Tensor):
        # what has one axis is of heads (ALiBi's slopes) or of places
        return value[rows] if value.ndim > 1 and len(value) == size else value
    if isinstance(value, tuple):
        return tuple(_rows_of(part, rows, size) for part in value)
    if isinstance(value, dict):
        return {name: _rows_of(part, rows, size) for name, part in value.items()}
    return value
