"""Fixtures of all tests: the miniature world, the byte tokenizer, real checkpoints and data."""

import os
from pathlib import Path

import pytest
import torch

from model import Tokenizer
from tests.support.mini import make_mini
from tests.support.models import byte_tokenizer

ROOT = Path(__file__).resolve().parent.parent


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Student, teacher, encoder, corpus, questions, episodes and mini.toml; to be read only."""
    return make_mini(tmp_path_factory.mktemp("mini"))


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One token a byte, and three control tokens."""
    return byte_tokenizer(tmp_path_factory.mktemp("bytes"))


def _folder(variable: str, default: Path) -> Path:
    folder = Path(os.environ.get(variable, default))
    if not folder.is_dir():
        pytest.skip(f"{variable}: no folder {folder}")
    return folder


@pytest.fixture(scope="session")
def real_assets() -> Path:
    """smollm2-135m-instruct, all-minilm-l6-v2, ... in the public layout."""
    return _folder("DGPO_TEST_ASSETS", ROOT / "build" / "assets")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """questions/, passages/ and gold/."""
    return _folder("DGPO_TEST_DATA", ROOT / "build" / "data")
