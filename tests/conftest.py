"""Shared by all tests: real checkpoints and data where they are, a skip with its reason else."""

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


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
