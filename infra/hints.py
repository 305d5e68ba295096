"""Hints: what a path or a folder is that is no checkpoint as this project reads it.

Loaded only where something is missing.
"""

from pathlib import Path

# Files that show what a folder without the expected one is, and what to do with it.
OTHER_KINDS = (
    ("adapter_config.json", "this is a LoRA adapter: merge it into its base model first (peft: "
     "merge_and_unload, then save_pretrained)"),
    ("*.safetensors.index.json", "its index names that file: download all parts of the checkpoint"),
    ("model-*-of-*.safetensors", "these are parts of a checkpoint: copy their "
     "model.safetensors.index.json beside them"),
    ("*.gguf", "GGUF is not read: take the safetensors checkpoint that it was made from"),
    ("pytorch_model*.bin*", "pickled weights are not read: load them with transformers, and "
     "save_pretrained(FOLDER) writes safetensors"),
    ("consolidated*", "these weights have Meta's or Mistral's own layout: take the checkpoint in "
     "transformers' layout"))


def about_missing(folder: Path, name: str) -> str:
    """What to do about a folder in which the file `name` is missing."""
    if name == "tokenizer.json":
        is_sentencepiece = (folder / "tokenizer.model").is_file()
        return ("a SentencePiece model alone is not read: load it with transformers' "
                "AutoTokenizer, and save_pretrained(FOLDER) writes tokenizer.json"
                if is_sentencepiece else "copy it there")
    hints = [advice for pattern, advice in OTHER_KINDS if any(folder.glob(pattern))]
    return hints[0] if hints else "copy it there"


def about_path(path: Path) -> str:
    """What to do about a path that is no folder, though it looks like a path."""
    if path.is_file():
        what = "GGUF is not read; " if path.suffix == ".gguf" else ""
        return f"{what}this is a file: give the folder with config.json and safetensors"
    if len(path.parts) == 2 and path.parent.name not in ("", ".", ".."):
        return (f"it was read as a path, because a folder {path.parent} is here: check the path, "
                "or, if the hub's id is meant, start in another folder")
    return "check the path"
