"""Weights: published checkpoint folders; what does not fit its config.json is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from infra.checkpoint import write_aside
from infra.files import blaming, check, file_in, read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOAT_TYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


def fill(module: nn.Module, folder: Path, public_name: Callable[[str], str | None], *,
         dtype: torch.dtype, device: torch.device | str, twin: dict[str, str]) -> None:
    """Load a checkpoint strictly into a module on the meta device."""
    # public_name: name of a stored tensor -> the module's, or None to skip it. twin: names of
    # tensors that may be stored although they only repeat another one, or in its place.
    advice = "take config.json and weights from the same checkpoint"
    shapes = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
    tensors: dict[str, Tensor] = {}
    files = [WEIGHTS]
    if not (folder / WEIGHTS).is_file() and (folder / INDEX).is_file():
        with blaming(folder / INDEX, "weight_map, the file of each tensor"):
            if not (files := sorted({*read_json(folder / INDEX)["weight_map"].values()})):
                raise ValueError("an empty one")
    for path in [file_in(folder, name) for name in files]:
        with blaming(path, "a complete safetensors file"):
            file = safe_open(path, "pt")
        for stored_name in file.keys():
            name, part = public_name(stored_name), file.get_slice(stored_name)
            if name is None:
                continue
            where, shape = f"{path}: tensor {stored_name}", part.get_shape()
            expected = shapes.get(twin.get(name, name), "no such tensor")
            if shape != expected:
                raise ValueError(f"{where}: got shape {shape}, expected {expected}; {advice}")
            check(where, "type", part.get_dtype(), *FLOAT_TYPES)
            # A copy, because it may be a view of the file otherwise.
            tensors[name] = file.get_tensor(stored_name).to(device, dtype, copy=True)
    for name, original in twin.items():
        if name in tensors and original not in tensors:  # stored once, under the twin's name
            tensors[original] = tensors.pop(name)
    missing = [name for name in shapes if name not in tensors]
    if missing:
        raise ValueError(f"{folder}: missing tensor {missing[0]} (and {len(missing) - 1} more): "
                         f"got {len(tensors)} tensors, expected {len(shapes)}; {advice}")
    for name in twin.keys() & tensors.keys():
        if not torch.equal(tensors.pop(name), tensors[twin[name]]):
            raise ValueError(f"{folder}: tensor {name}: got values other than {twin[name]}'s, "
                             "expected the same, as config.json says tie_word_embeddings; set that "
                             "to false, or remove the tensor")
    module.load_state_dict(tensors, assign=True)


def save_tensors(folder: Path, public: dict, state: dict[str, Tensor]) -> None:
    """Write config.json (`public`, with the dtype of the tensors); model.safetensors, if any."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in state.items()}
    config = {key: value for key, value in public.items() if key != "dtype"}
    dtype = next(iter(tensors.values()), torch.empty(0)).dtype  # fp32 where only config is written
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    text = json.dumps(config, indent=1) + "\n"
    if tensors:
        write_aside(
            folder / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
        (folder / INDEX).unlink(missing_ok=True)  # of a sharded checkpoint that was here before
    write_aside(folder / "config.json", lambda path: path.write_text(text))
