"""Training a part of a model: less memory for gradients and Adam, and a shorter backward pass."""

from typing import Any


def train_last(decoder: Any, num_layers: int) -> str:
    """Leave gradients to the last layers and the final norm alone; says what will be trained.

    Embeddings and head stay as they are. Raises ValueError if the model has fewer layers.
    """
    layers = decoder.model.layers
    if num_layers > len(layers):
        raise ValueError(f"--train-layers: got {num_layers}, expected at most {len(layers)}, the "
                         "layers of this student")
    decoder.requires_grad_(False)
    for part in (*layers[-num_layers:], decoder.model.norm):
        part.requires_grad_(True)
    sizes = [(p.numel(), p.requires_grad) for p in decoder.parameters()]
    trained = sum(size for size, is_trained in sizes if is_trained)
    return (f"trains the last {num_layers} of {len(layers)} layers: {trained:,} of "
            f"{sum(size for size, _ in sizes):,} weights")
