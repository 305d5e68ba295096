"""Weights: published checkpoint folders (config.json, *.safetensors), read strictly and written atomically.

A checkpoint fits its config.json exactly or is refused with file, tensor, got, expected, what to do.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOAT_TYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


def check(where: str, key: str, got: object, *expected: object) -> None:
    if got not in expected:
        raise ValueError(f"{where}: unsupported {key}: got {got!r}, expected one of {list(expected)}; "
                         "use a Qwen2, Qwen3 or Llama decoder, or a BERT-type encoder with mean pooling")


def resolve(path: str | Path) -> Path:
    """The folder of a checkpoint; ids such as "Qwen/Qwen2.5-0.5B-Instruct" are downloaded."""
    if Path(path).is_dir():
        return Path(path)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) is None or Path(path).parent.is_dir():
        raise FileNotFoundError(f"checkpoint: got {path}, expected a folder or an id like org/name; check the path")
    from huggingface_hub import snapshot_download  # here, because only downloads need it

    try:
        return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt"]))
    except Exception as error:
        raise FileNotFoundError(f"checkpoint: got {path}, expected a folder or an id that can be downloaded "
                                f"({type(error).__name__}: {error}); check the path") from error


@contextmanager
def blaming(path: Path, expected: str) -> Iterator[None]:
    """Whatever goes wrong within is the fault of a file that a person handed in: an error that names it."""
    try:
        yield
    except FileNotFoundError:
        raise
    except BaseException as error:  # a panic of a Rust library is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
            raise
        if isinstance(error, ValueError) and str(path.parent) in str(error):
            raise
        raise ValueError(f"{path}: got {type(error).__name__}: {str(error)[:200]}; expected {expected}; copy it "
                         "again") from error


def file_in(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        found = sorted(entry.name for entry in folder.iterdir())
        raise FileNotFoundError(f"{folder}: got {found}, expected {name} among them; copy it from the checkpoint")
    return folder / name


def read_json(path: Path, default: dict | None = None) -> dict:
    if default is not None and not path.is_file():
        return default
    try:
        document = json.loads(file_in(path.parent, path.name).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: got broken JSON ({error}), expected an object; copy it again") from error
    if not isinstance(document, dict):
        raise ValueError(f"{path}: got {str(document)[:40]!r}, expected a JSON object; copy it again")
    return document


def shards(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file() or not (folder / INDEX).is_file():
        return [file_in(folder, WEIGHTS)]
    return [file_in(folder, name) for name in sorted(set(read_json(folder / INDEX)["weight_map"].values()))]


def open_tensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path}: got {path.stat().st_size} bytes that are no complete safetensors file ({error}), "
                         "expected a whole one; copy it again") from error


def fill(module: nn.Module, folder: Path, public_name: Callable[[str], str | None], *, dtype: torch.dtype,
          device: torch.device | str, twin: dict[str, str]) -> None:
    """Load, strictly, a module laid out on the meta device; `twin` names tensors that may only repeat another one."""
    again = "take config.json and weights from the same checkpoint"
    expected = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
    found: dict[str, Tensor] = {}
    for path in shards(folder):
        with open_tensors(path) as file:
            for stored in file.keys():
                name, part = public_name(stored), file.get_slice(stored)
                if name is None:
                    continue
                at, wanted, shape = f"{path}: tensor {stored}:", expected.get(twin.get(name, name)), part.get_shape()
                if wanted is None:
                    raise ValueError(f"{at} got it with shape {shape}, expected no such (unexpected) tensor; {again}")
                if shape != wanted:
                    raise ValueError(f"{at} got shape {shape}, expected {wanted}; {again}")
                if part.get_dtype() not in FLOAT_TYPES:
                    raise ValueError(f"{at} got type {part.get_dtype()}, expected one of {list(FLOAT_TYPES)}; "
                                     "use a checkpoint that is not quantized")
                found[name] = file.get_tensor(stored).to(device, dtype, copy=True)  # else it is a view of the file
    missing = [name for name in expected if name not in found]
    if missing:
        raise ValueError(f"{folder}: missing tensor {missing[0]} (and {len(missing) - 1} more): got {len(found)} "
                         f"tensors, expected {len(expected)}; {again}")
    for name in twin.keys() & found.keys():
        if not torch.equal(found.pop(name), found[twin[name]]):
            raise ValueError(f"{folder}: tensor {name}: got values other than {twin[name]}'s, expected the same, as "
                             "config.json says tie_word_embeddings; set that to false, or remove the tensor")
    module.load_state_dict(found, assign=True)


def randomize(module: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():  # norm weights stay 1
        if parameter.ndim > 1:
            nn.init.normal_(parameter, 0.0, 0.02, generator=generator)
        elif name.endswith(".bias"):
            nn.init.zeros_(parameter)
    return module


def write_aside(path: Path, write: Callable[[Path], object]) -> None:
    """Atomic: a reader, or a crash, leaves the old file or the new one."""
    partial = path.with_name(f".{path.name}.partial{os.getpid()}")
    write(partial)
    umask = os.umask(0)
    os.umask(umask)  # the one way to read it is to set it
    partial.chmod(0o666 & ~umask)  # as any program's file: safetensors writes for the owner alone
    os.replace(partial, path)


def save_tensors(folder: Path, public: dict, state: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in state.items()}
    kind = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    public = {key: value for key, value in public.items() if key != "dtype"} | {"torch_dtype": kind}
    write_aside(folder / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    (folder / INDEX).unlink(missing_ok=True)  # of a sharded checkpoint that was here before
    write_aside(folder / "config.json", lambda path: path.write_text(json.dumps(public, indent=1) + "\n"))
