"""Which parameters decay."""

from torch import nn


def decayed_parameter_names(model: nn.Module) -> list[str]:
    """
    Names of the parameters that weight decay applies to: the weights of linear and convolutional layers.

    Norms, gates, biases, latents, position embeddings, the input embedding and the output layer have none. The
    original decayed the gated cross-attention blocks alone, among them by accident the norm in front of their
    feed-forward part; the resampler, and all of OtterHD, had no decay whatever `weight_decay` said.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings()
    if head is not None:
        embeddings.add(id(head.weight))
    layers = (nn.Linear, nn.modules.conv._ConvNd)
    return [
        f"{prefix}.weight" if prefix else "weight"
        for prefix, module in model.named_modules()
        if isinstance(module, layers) and id(module.weight) not in embeddings
    ]
