"""Folders of published passage encoders: what the files beside the network ask for.

sentence-transformers keeps a list of modules (modules.json), a folder for each, prompts, and the
length of a text. What is not supported here is refused by name, because an encoder that is read
otherwise than it was trained finds other passages and says nothing.
"""

import json
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open

from infra.files import blaming, file_in, read_json

BERTS, ROBERTAS = ("bert",), ("roberta", "xlm-roberta", "camembert")
DECODERS = ("llama", "qwen2", "qwen3")  # model.py reads their config.json, but for what is here

# Ways of pooling, and what follows pooling_mode_ in the older of the two styles of keys.
POOLINGS = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens",
            "lasttoken": "lasttoken", "mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
            "weightedmean": "weightedmean_tokens"}
ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "Sigmoid")
PROMPTS = {"query": ("query",), "passage": ("document", "passage", "corpus")}
NO_LENGTH = 2**24  # a tokenizer without a limit has a model_max_length of 1e30
Prefixes = dict[str, str]  # of a "query" and of a "passage"


class Recipe(NamedTuple):
    folder: Path  # that holds config.json, tokenizer.json and the weights of the network
    config: dict[str, Any]  # of the network
    pooling: str  # one of POOLINGS
    dense: tuple[tuple[Path, dict], ...]  # folder and configuration of each layer after pooling
    normalize: bool
    prefixes: Prefixes
    max_tokens: int | None  # of a text; None: as many as there are positions
    lowercase: bool
    notes: tuple[str, ...]  # what a person should know about where this comes from


def read_recipe(path: str | Path, folder: Path) -> Recipe:
    """path: as it was given, because a downloaded folder is named by a hash."""
    modules, notes = folder / "modules.json", []
    network, dense = folder, ()
    if modules.is_file():
        network, pooling_folder, dense, normalize = _modules(modules)
        pooling = _pooling(pooling_folder / "config.json")
    else:
        normalize, pooling = True, "mean"
        # A flat copy of a folder has the pooling's config.json in place of the network's.
        files = [folder / "1_Pooling" / "config.json", folder / "config.json"]
        named = [file for file in files if _names_pooling(read_json(file, {}))]
        if named:
            pooling = _pooling(named[0])
        else:
            notes.append("no modules.json, so the mean is taken")
    settings = folder / "config_sentence_transformers.json"
    document = read_json(settings, {})
    similarity = document.get("similarity_fn_name") or "cosine"
    _check(settings, "similarity_fn_name", similarity, ("cosine", "dot"))
    if similarity == "cosine":
        normalize = True
    prefixes, note = _prefixes(settings, document, public_names(path, folder))
    max_tokens, lowercase = _length(network)
    with blaming(network / "config.json", "the configuration of an encoder"):
        config = _config(network)
    if config["model_type"] in DECODERS and not modules.is_file():
        raise FileNotFoundError(f"{folder}: got a decoder without modules.json, expected that file "
                                "to say how its states become a vector")
    width = config["hidden_size"]
    for dense_folder, layer in dense:
        _check(dense_folder / "config.json", "in_features", layer["in_features"], (width,))
        width = layer["out_features"]
    return Recipe(network, config, pooling, dense, normalize, prefixes, max_tokens, lowercase,
                  (*notes, *note))


def _modules(file: Path) -> tuple[Path, Path, tuple[tuple[Path, dict], ...], bool]:
    """(folder of the network, of the pooling, layers after it, whether vectors are normalised)."""
    with blaming(file, "a list of modules, each with a type and a path"):
        listed = [(str(module["type"]), file.parent / module.get("path", ""))
                  for module in json.loads(file.read_text(encoding="utf-8"))]
    names = [kind.rpartition(".")[2] if kind.startswith("sentence_transformers.") else kind
             for kind, _ in listed]
    # Dropout does nothing outside training.
    letters = {"Transformer": "T", "Pooling": "P", "Dense": "D", "Normalize": "N", "Dropout": ""}
    unknown = [name for name in names if name not in letters]
    if unknown or not re.fullmatch("TPD*N*", "".join(letters[name] for name in names)):
        raise ValueError(f"{file}: got the modules {unknown or names}, expected a Transformer, a "
                         "Pooling, any number of Dense and perhaps a Normalize, in this order; "
                         "use another encoder")
    folders = [folder for _, folder in listed]
    dense = tuple((folder, _dense(folder)) for name, folder in zip(names, folders, strict=True)
                  if name == "Dense")
    return folders[0], folders[names.index("Pooling")], dense, "Normalize" in names


def _names_pooling(config: dict) -> bool:
    return any(key.startswith("pooling_mode") for key in config)


def _pooling(file: Path) -> str:
    """The one way of pooling that a configuration names, in the older or the newer keys."""
    config = read_json(file)
    mode = config.get("pooling_mode")
    if mode is None:
        mode = [name for name, key in POOLINGS.items() if config.get(f"pooling_mode_{key}")]
    if isinstance(mode, list) and len(mode) == 1:
        [mode] = mode
    _check(file, "pooling_mode", mode, [*POOLINGS])
    _check(file, "include_prompt", config.get("include_prompt", True), (True,))
    return mode


def _dense(folder: Path) -> dict:
    file = folder / "config.json"
    config = read_json(file)
    for key in ("in_features", "out_features"):
        if type(config.get(key)) is not int or not 0 < config[key] < 2**24:
            raise ValueError(f"{file}: got {key} {config.get(key)!r}, expected a size; "
                             "copy it again")
    name = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    allowed = [f"torch.nn.modules.{module}.{kind}" for kind in ACTIVATIONS
               for module in ("activation", "linear")]
    _check(file, "activation_function", name, allowed)
    _check(file, "use_residual", config.get("use_residual", False), (False,))
    for key in ("module_input_name", "module_output_name"):
        _check(file, key, config.get(key) or "sentence_embedding", ("sentence_embedding",))
    _check(file, "bias", config.get("bias", True), (True, False))
    if not (folder / "model.safetensors").is_file():
        got = sorted(entry.name for entry in folder.iterdir())
        raise FileNotFoundError(
            f"{folder}: got {got}, expected model.safetensors among them; load the encoder in "
            "sentence-transformers, which reads pytorch_model.bin, and save it again")
    return {**config, "activation": name.rpartition(".")[2]}


def public_names(path: str | Path, folder: Path) -> list[str]:
    """Names that tell what an encoder is: of the id or path as given, of its folder in the cache of
    downloads, and the one that the checkpoint was trained from."""
    trained_from = str(read_json(folder / "config.json", {}).get("_name_or_path") or "")
    paths = [Path(path), folder.resolve()]
    cached = [part for one in paths for part in one.parts if part.startswith("models--")]
    return [*(one.name for one in paths), *cached, trained_from.rstrip("/").rpartition("/")[2]]


def _prefixes(file: Path, document: dict, names: list[str]) -> tuple[Prefixes, list[str]]:
    """The text before a query and before a passage, and a note on where it comes from."""
    prompts = document.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(
            isinstance(text, str | None) for text in prompts.values()):
        raise ValueError(f"{file}: got prompts {prompts!r}, expected texts by name")
    default = document.get("default_prompt_name")
    _check(file, "default_prompt_name", default, (None, *prompts))
    if any(prompts.values()):  # sentence-transformers writes empty prompts where nobody gave any
        named = {kind: [prompts[key] or "" for key in keys if key in prompts]
                 for kind, keys in PROMPTS.items()}
        if any(named.values()):
            return {kind: texts[0] if texts else "" for kind, texts in named.items()}, []
        if default:  # it knows no kinds of text
            return dict.fromkeys(PROMPTS, prompts[default] or ""), [f"its prompt {default!r}"]
        return dict.fromkeys(PROMPTS, ""), [f"its prompts {sorted(prompts)} are for other tasks"]
    # An instruction-tuned E5 has other prefixes. "e5" alone may stand in the hash of a revision.
    words = [re.split("[^a-z0-9]+", name.lower()) for name in names]
    if any("e5" in one and "instruct" not in one for one in words):
        return {"query": "query: ", "passage": "passage: "}, ["prefixes of E5, by its name"]
    return dict.fromkeys(PROMPTS, ""), []


def _length(folder: Path) -> tuple[int | None, bool]:
    """(tokens of a text, or None; whether texts are made lower case)."""
    [file, *_] = [*sorted(folder.glob("sentence_*_config.json")), folder / "none.json"]
    config = read_json(file, {})
    task = config.get("transformer_task") or "feature-extraction"
    _check(file, "transformer_task", task, ("feature-extraction",))
    lowercase = config.get("do_lower_case") or False
    _check(file, "do_lower_case", lowercase, (True, False))
    key, length = "max_seq_length", config.get("max_seq_length")
    if length is None:
        file, key = folder / "tokenizer_config.json", "model_max_length"
        length = read_json(file, {}).get(key)
        if length is None or isinstance(length, int | float) and length >= NO_LENGTH:
            return None, lowercase
    if type(length) is not int or length < 1:
        raise ValueError(f"{file}: got {key} {length!r}, expected a number of tokens")
    return length, lowercase


def _config(folder: Path) -> dict[str, Any]:
    """The config.json of a network, checked."""
    file = folder / "config.json"
    config = read_json(file)
    if _names_pooling(config):
        config = _bert_sizes(folder)
    _check(file, "model_type", config.get("model_type"), (*BERTS, *ROBERTAS, *DECODERS))
    sizes = ["hidden_size", "vocab_size", "max_position_embeddings", "num_attention_heads"]
    is_decoder = config["model_type"] in DECODERS
    _check(file, "is_decoder", config.get("is_decoder") or False, (is_decoder, False))
    _check(file, "is_causal", config.get("is_causal", is_decoder), (is_decoder,))
    _check(file, "auto_map (code of its own)", config.get("auto_map") or None, (None,))
    if not is_decoder:
        _check(file, "hidden_act", config.get("hidden_act", "gelu"), ("gelu",))
        positions = config.get("position_embedding_type") or "absolute"
        _check(file, "position_embedding_type", positions, ("absolute",))
        sizes += ["intermediate_size", "num_hidden_layers"]
    for key in sizes:
        if type(config.get(key)) is not int or not 0 < config[key] < 2**24:
            raise ValueError(f"{file}: got {key} {config.get(key)!r}, expected a size")
    pad_id = config.get("pad_token_id") or 0
    if type(pad_id) is not int or not 0 <= pad_id < config["vocab_size"]:
        raise ValueError(f"{file}: got pad_token_id {pad_id!r}, expected a token; copy it again")
    if is_decoder:
        return config
    remainder = config["hidden_size"] % config["num_attention_heads"]
    _check(file, "hidden_size % num_attention_heads", remainder, (0,))
    return {**config, "layer_norm_eps": float(config.get("layer_norm_eps", 1e-12))}


def _bert_sizes(folder: Path) -> dict[str, Any]:
    """The config.json of a flat copy, in which 1_Pooling/config.json has taken its place."""
    with blaming(folder / "model.safetensors", "the weights of a BERT"):
        with safe_open(file_in(folder, "model.safetensors"), "pt") as file:
            shapes = {public_name(name): file.get_slice(name).get_shape() for name in file.keys()}
        vocab, width = shapes["embeddings.word_embeddings.weight"]
        # Heads are 64 wide in published BERTs, but MiniLM and E5-small have 12 in 384.
        heads = 12 if width == 384 else max(1, width // 64)
        layers = [name for name in shapes if name and name.endswith("query.weight")]
        sizes = {"model_type": "bert", "vocab_size": vocab, "hidden_size": width,
                 "intermediate_size": shapes["encoder.layer.0.intermediate.dense.weight"][0],
                 "num_hidden_layers": len(layers), "num_attention_heads": heads,
                 "max_position_embeddings": shapes["embeddings.position_embeddings.weight"][0],
                 "type_vocab_size": shapes["embeddings.token_type_embeddings.weight"][0]}
    warnings.warn(f"{folder}/config.json: got a pooling configuration; sizes are the tensors', and "
                  f"{heads} heads are assumed: copy the published config.json there", stacklevel=5)
    return sizes


def public_name(name: str) -> str | None:
    """The module's name of a stored tensor of a BERT or a RoBERTa; None for what is not used."""
    name = name.removeprefix("bert.").removeprefix("roberta.")
    name = name.replace("Norm.gamma", "Norm.weight").replace("Norm.beta", "Norm.bias")
    is_unused = name.startswith(("pooler.", "cls.", "lm_head."))
    return None if is_unused or name.endswith("position_ids") else name


def _check(file: Path, key: str, got: object, expected: tuple | list) -> None:
    if got not in expected:
        raise ValueError(f"{file}: unsupported {key}: got {got!r}, expected one of "
                         f"{list(expected)}; use another encoder")
