"""Indexes as they grow: what is built answers, and a result is measured once."""

import json

import numpy as np
import pytest
import torch

from experiments import scale
from retrieval.compare import BATCHES

ROWS, WIDTH = 400, 16


@pytest.fixture
def vectors(tmp_path):
    """A file of vectors, mapped as the measured processes map it."""
    scale.write_vectors(tmp_path / "vectors.npy", ROWS, WIDTH)
    return np.load(tmp_path / "vectors.npy", mmap_mode="r")


def test_no_two_vectors_are_the_same_whatever_is_made_at_once(tmp_path, vectors, monkeypatch):
    assert vectors.dtype == np.float16 and vectors.shape == (ROWS, WIDTH)
    assert np.linalg.norm(vectors, axis=1).mean() == pytest.approx(1, abs=0.05)
    assert not np.array_equal(vectors[: ROWS // 2], vectors[ROWS // 2 :])
    monkeypatch.setattr(scale, "PART", 100)
    scale.write_vectors(tmp_path / "again.npy", ROWS, WIDTH)
    assert len({row.tobytes() for row in np.load(tmp_path / "again.npy")}) == ROWS


@pytest.mark.parametrize("kind", ["flat", "sq8", "ivf", "ivfpq", "faiss flat", "faiss ivf",
                                  "hnswlib", "usearch"])
def test_each_kind_finds_what_it_was_built_from(tmp_path, vectors, kind):
    needed = {"ivf": "faiss", "ivfpq": "faiss", "usearch": "usearch", "hnswlib": "hnswlib"}
    if kind not in ("flat", "sq8"):
        pytest.importorskip(needed.get(kind, "faiss"))
    folder = tmp_path / "index"
    folder.mkdir()
    (scale.build_ours if kind in scale.OURS else scale.build_peer)(kind, vectors, folder)
    found = scale.open_index(kind, folder, WIDTH)(torch.from_numpy(vectors[:50].astype("f")))
    if kind == "usearch":
        found = found.distances, found.keys
    best = found[0 if kind == "hnswlib" else 1]
    assert np.asarray(best).shape == (50, 3) and np.asarray(best).max() < ROWS
    if kind != "ivfpq":  # the others keep enough of a vector to know it again, among the best
        exact = vectors.astype("f") @ vectors[:50].astype("f").T
        hits = (np.asarray(best).astype(int) == np.argsort(-exact, axis=0)[:3].T).mean()
        assert hits > 0.9


def test_parts_of_an_index_hold_their_own_rows(tmp_path, vectors, monkeypatch):
    monkeypatch.setattr(scale, "PART", 100)
    scale.build_ours("sq8", vectors, tmp_path)
    codes, scales = (np.load(tmp_path / name) for name in ("embeddings.npy", "scales.npy"))
    assert codes * scales == pytest.approx(vectors.astype("f"), abs=0.01)


def test_a_measured_index_is_kept_and_not_measured_again(tmp_path, monkeypatch, capsys):
    out = tmp_path / "scale.json"
    argv = ["--rows", "200", "100", "--width", "8", "--kinds", "flat", "--threads", "1",
            "--out", str(out), "--work", str(tmp_path)]
    scale.main(argv)
    results = json.loads(out.read_text())["results"]
    assert [result["rows"] for result in results] == [100, 200]
    for result in results:
        header = 128  # of a .npy file
        assert result["disk"] == header + 2 * 8 * result["rows"]
        assert set(result["ms"]) == {str(batch) for batch in BATCHES}
        assert result["build_s"] > 0 and min(result["ms"].values()) > 0
    assert [path.name for path in tmp_path.iterdir()] == ["scale.json"]
    shown = capsys.readouterr().out
    assert "| 100 x 8 | flat | 0 s | 0 MiB |" in shown and shown.count("| flat |") == 2
    monkeypatch.setattr(scale, "measured", lambda *_: pytest.fail("measured again"))
    scale.main(argv)
    assert json.loads(out.read_text())["results"] == results


def test_an_index_that_cannot_be_built_is_a_row_and_is_tried_again(tmp_path, monkeypatch, capsys):
    out = tmp_path / "scale.json"
    argv = ["--rows", "100", "--width", "8", "--kinds", "flat", "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(scale.sys, "executable", "false")
        scale.main(argv)
    [result] = json.loads(out.read_text())["results"]
    assert result["problem"] == "build ended with 1"
    assert "| 100 x 8 | flat | build ended with 1 |" in capsys.readouterr().out
    scale.main(argv)
    [result] = json.loads(out.read_text())["results"]
    assert "problem" not in result
