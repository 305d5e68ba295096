"""Indexes as they grow: what is built answers, and a result is measured once."""

import json

import numpy as np
import pytest
import torch

from data import load_questions
from experiments import scale
from experiments.rows import DIGITS
from model import load_encoder
from retrieval import build
from retrieval.compare import BATCHES, recalls
from retriever import TorchIndex

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


@pytest.mark.parametrize("kind", [*scale.OURS, *scale.PEERS, "IVF8,SQ6"])
def test_each_kind_finds_what_it_was_built_from(tmp_path, vectors, kind):
    needed = {"ivf": "faiss", "ivfpq": "faiss", "usearch": "usearch", "hnswlib": "hnswlib"}
    if kind not in ("flat", "sq8"):
        pytest.importorskip(needed.get(kind, "faiss"))
    folder = tmp_path / "index"
    folder.mkdir()
    (scale.build_peer if kind in scale.PEERS else scale.build_ours)(kind, vectors, folder)
    found = scale.open_index(kind, folder, WIDTH)(torch.from_numpy(vectors[:50].astype("f")))
    assert found.shape == (50, 3) and found.max() < ROWS
    if kind != "ivfpq":  # the others keep enough of a vector to know it again, among the best
        exact = vectors.astype("f") @ vectors[:50].astype("f").T
        hits = (found == np.argsort(-exact, axis=0)[:3].T).mean()
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


def test_of_real_vectors_it_says_what_is_found(tmp_path, mini, capsys):
    index, out = tmp_path / "index", tmp_path / "scale.json"
    build.build(mini / "corpus.jsonl", str(mini / "encoder"), index)
    argv = ["--index", str(index), "--questions", str(mini / "questions.jsonl"), "--kinds", "flat",
            "sq8", "--threads", "1", "--out", str(out), "--work", str(tmp_path)]  # fmt: skip
    scale.main(argv)
    vectors = torch.from_numpy(np.load(index / "embeddings.npy"))
    texts = [question.question for question in load_questions(mini / "questions.jsonl")]
    queries = load_encoder(mini / "encoder").embed(texts, kind="query")
    rounded = map(torch.from_numpy, build.to_int8(vectors.float()))
    best = [kind.search(queries, 3)[1] for kind in (TorchIndex(*rounded), TorchIndex(vectors))]
    shares = recalls(*best)
    assert shares[3] < 1
    results = {result["kind"]: result for result in json.loads(out.read_text())["results"]}
    assert results["flat"]["recall"] == {"1": 1.0, "3": 1.0}
    recorded = {str(k): float(f"{shares[k]:.{DIGITS}g}") for k in (1, 3)}
    assert results["sq8"]["recall"] == recorded
    assert results["flat"]["rows"] == len(vectors)
    assert "| 1.000, 1.000 |" in capsys.readouterr().out
    random = ["--rows", str(len(vectors)), "--width", str(vectors.shape[1]), "--out", str(out)]
    scale.main([*random, "--kinds", "flat", "--threads", "1"])  # is no measured one
    assert len(json.loads(out.read_text())["results"]) == 3


@pytest.mark.parametrize("kind", ["IVF8,SQ6", "faiss ivf"])
def test_a_search_of_all_lists_misses_nothing_that_one_of_few_does(tmp_path, vectors, kind):
    pytest.importorskip("faiss")
    (scale.build_peer if kind in scale.PEERS else scale.build_ours)(kind, vectors, tmp_path)
    queries = torch.from_numpy(vectors[:50].astype("f")).roll(1, 1)  # not those that are stored
    one, every = (scale.open_index(kind, tmp_path, WIDTH, nprobe)(queries) for nprobe in (1, 8))
    best = np.argsort(-(queries.numpy() @ vectors.astype("f").T), axis=1)[:, :3]
    assert recalls(every, best)[3] > 0.9 > recalls(one, best)[3]


def test_what_is_asked_for_must_fit_together(tmp_path, mini, capsys):
    with pytest.raises(SystemExit):
        scale.main(["--nprobe", "4", "--kinds", "ivf", "usearch", "flat"])
    assert "kinds without lists (flat, usearch)" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        scale.main(["--index", str(tmp_path), "--questions", "q.jsonl", "--rows", "5"])
    assert "which it has itself" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        scale.main(["--index", str(tmp_path)])
    assert "got one of them" in capsys.readouterr().err
    build.build(mini / "corpus.jsonl", str(mini / "encoder"), tmp_path / "index", kind="sq8")
    with pytest.raises(ValueError, match="of kind sq8, expected flat"):
        scale.main(["--index", str(tmp_path / "index"), "--questions", "q.jsonl"])
