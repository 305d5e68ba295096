"""Corpus files, exact search, indexes, and recall on real passages.

The encoder is a tiny random BERT: what it retrieves is arbitrary but fixed, which is all that these
tests need. faiss is compared with where it is installed.
"""

import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

import retriever
from data import load_questions
from encoder import Encoder
from formats import indexes
from formats.corpora import convert
from infra.files import replace_surrogates
from model import load_encoder
from retrieval.build import build
from retriever import Corpus, Retriever, TorchIndex
from rollout import RolloutSettings
from world.pretrain import new_encoder, save_encoder

ROOT = Path(__file__).resolve().parents[1]
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
NUM_PASSAGES = 41
SCORE_TOLERANCE = 1e-5  # fp32 inner products of unit vectors, summed in another order


@pytest.fixture(scope="session")
def encoder(tmp_path_factory) -> Encoder:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *LETTERS, *("##" + c for c in LETTERS)]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    config = {
        "vocab_size": len(words), "hidden_size": 16, "intermediate_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    made = new_encoder(config, path, 0)
    for parameter in made.parameters():  # spread the vectors, which std 0.02 leaves nearly parallel
        if parameter.dim() == 2:
            parameter.data.mul_(20)
    return made.eval()


def write_corpus(path: Path, contents: list[str]) -> Path:
    rows = [{"id": str(100 + i), "contents": text} for i, text in enumerate(contents)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def passages(count: int = NUM_PASSAGES) -> list[str]:
    random = np.random.default_rng(0)
    word = lambda: "".join(random.choice(list(LETTERS), 4))  # noqa: E731
    return [f'"{word()} {i}"\n' + " ".join(word() for _ in range(8)) for i in range(count)]


@pytest.fixture
def corpus(tmp_path) -> Path:
    return write_corpus(tmp_path / "corpus.jsonl", passages())


@pytest.fixture
def encoder_dir(tmp_path, encoder) -> Path:
    save_encoder(encoder, tmp_path / "encoder")
    return tmp_path / "encoder"


def best_by_hand(vectors: np.ndarray, queries: np.ndarray, top_k: int) -> np.ndarray:
    """Rows by (score, lower row first)."""
    return np.argsort(-(queries @ vectors.T), axis=1, kind="stable")[:, :top_k]


# ---- corpus ----


def test_s5_the_first_line_is_the_title_as_it_stands_and_the_rest_is_text(tmp_path):
    contents = ['"Red"\nline\nnext', '""Heroes" (song)"\nx', "no title", "Bare\nx", '"\nx', ""]
    lines = Corpus(write_corpus(tmp_path / "c.jsonl", contents))
    results = [lines.passage(row, 0.5)[:3] for row in range(len(lines))]
    assert results == [
        ("100", '"Red"', "line\nnext"), ("101", '""Heroes" (song)"', "x"), ("102", "", "no title"),
        ("103", "Bare", "x"), ("104", '"', "x"), ("105", "", ""),
    ]  # fmt: skip


def test_any_text_is_read_back_with_what_tokenizers_refuse_replaced(tmp_path):
    path = tmp_path / "c.jsonl"
    long = "</information>\x00\x1b\u2028<|im_end|>\U0001f600" * 5_000
    path.write_bytes(
        b'\xef\xbb\xbf{"id": 7, "contents": "\\"A\\ud83d\\"\\n\xff"}\r\n'
        + json.dumps({"id": "b", "contents": long}, ensure_ascii=False).encode()
    )
    lines = Corpus(path)
    assert len(lines) == 2  # the last line counts without a newline, too
    assert lines.passage(0, 0.0)[:3] == ("7", '"A\ufffd"', "\ufffd")
    assert lines.passage(1, 0.0).text == long


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(st.characters()), min_size=1, max_size=5), st.booleans())
def test_rows_are_lines_whatever_they_contain(tmp_path_factory, contents, ascii_only):
    path = tmp_path_factory.mktemp("corpus") / "c.jsonl"
    contents = [replace_surrogates(text) for text in contents]
    rows = [{"id": i, "contents": text} for i, text in enumerate(contents)]
    text = "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
    path.write_bytes(text.encode())
    lines = Corpus(path)
    assert [lines.read(row)[1] for row in range(len(lines))] == contents


@pytest.mark.parametrize(
    "line",
    ["{", "[1]", '{"id": "1"}', '{"contents": "x"}', '{"id": 1, "contents": 2}', "[" * 9**5],
)
def test_a_bad_line_is_named_by_file_and_line(tmp_path, encoder, line):
    path = write_corpus(tmp_path / "c.jsonl", passages(2))
    path.write_text(path.read_text() + line + "\n" + '{"id": 9, "contents": "x"}\n')
    with pytest.raises(ValueError, match=r"c\.jsonl:3: got"):
        Retriever.load(path, encoder)


def test_missing_and_empty_corpora_are_errors(tmp_path, encoder):
    with pytest.raises(FileNotFoundError, match="got no such file"):
        Retriever.load(tmp_path / "c.jsonl", encoder)
    (tmp_path / "c.jsonl").touch()
    with pytest.raises(ValueError, match="got an empty file"):
        Retriever.load(tmp_path / "c.jsonl", encoder)


# ---- exact search ----


@pytest.mark.parametrize("chunk_rows", [1, 7, 40, 41, 42, None])
@pytest.mark.parametrize("top_k", [1, 3, 41, 50])
def test_a_search_is_brute_force_whatever_the_chunks(monkeypatch, chunk_rows, top_k):
    """Small integers: products are exact and full of ties, so that the order is fixed."""
    if chunk_rows:
        monkeypatch.setattr(retriever, "TILE_ELEMENTS", 6 * chunk_rows)
    random = np.random.default_rng(top_k)
    vectors = random.integers(-2, 3, (NUM_PASSAGES, 6)).astype(np.float32)
    queries = random.integers(-2, 3, (5, 6)).astype(np.float32)
    index = TorchIndex(torch.from_numpy(vectors))
    scores, rows = index.search(torch.from_numpy(queries), top_k)
    expected = best_by_hand(vectors, queries, top_k)
    assert rows.tolist() == expected.tolist()
    assert scores.tolist() == np.take_along_axis(queries @ vectors.T, expected, 1).tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_vectors_are_multiplied_in_fp32(dtype):
    """fp16 products would tie scores that differ, and order them by row."""
    vectors = torch.tensor([[1.0, 1.0], [1.0, 1.0 + 2**-7]]).to(dtype)
    scores, rows = TorchIndex(vectors).search(torch.tensor([[1.0, 2**-8]]), 2)
    assert rows.tolist() == [[1, 0]] and scores.dtype == np.float32


@pytest.mark.parametrize("chunk_rows", [4, 100])
def test_equal_scores_come_in_the_order_of_rows(monkeypatch, chunk_rows):
    monkeypatch.setattr(retriever, "TILE_ELEMENTS", 3 * chunk_rows)
    vectors = torch.ones(30, 3)
    vectors[[5, 17, 29]] = 2.0
    rows = TorchIndex(vectors).search(torch.ones(2, 3), 5)[1]
    assert rows.tolist() == [[5, 17, 29, 0, 1]] * 2


def test_a_search_returns_the_passages_of_faiss_flat(monkeypatch):
    monkeypatch.setattr(retriever, "TILE_ELEMENTS", 64 * 999)
    faiss = pytest.importorskip("faiss", reason="faiss is not installed (FAISS=cpu make setup)")
    random = np.random.default_rng(0)
    vectors = random.standard_normal((5_000, 32), dtype=np.float32)
    queries = random.standard_normal((64, 32), dtype=np.float32)
    index = faiss.IndexFlatIP(32)
    index.add(vectors)
    expected_scores, expected_rows = index.search(queries, 20)
    scores, rows = TorchIndex(torch.from_numpy(vectors)).search(torch.from_numpy(queries), 20)
    assert rows.tolist() == expected_rows.tolist()
    np.testing.assert_allclose(scores, expected_scores, atol=32 * SCORE_TOLERANCE)


# ---- retriever ----


def test_search_returns_the_nearest_passages_with_their_scores(corpus, encoder):
    results = Retriever.load(corpus, encoder).search(["abcd 1", "zzzz"], 3)
    vectors = encoder.embed(passages(), kind="passage").numpy()
    queries = encoder.embed(["abcd 1", "zzzz"], kind="query").numpy()
    rows = best_by_hand(vectors, queries, 3)
    assert [[int(p.id) - 100 for p in one] for one in results] == rows.tolist()
    scores = np.take_along_axis(queries @ vectors.T, rows, 1)
    np.testing.assert_allclose(
        [[p.score for p in one] for one in results], scores, atol=SCORE_TOLERANCE
    )
    assert f"{results[0][0].title}\n{results[0][0].text}" == passages()[rows[0][0]]


def test_search_of_nothing_of_anything_and_of_more_than_there_is(tmp_path, encoder):
    small = Retriever.load(write_corpus(tmp_path / "c.jsonl", passages(2)), encoder)
    assert small.search([], 3) == []
    odd = ["", "\x00\u2028", "\ud800", "x" * 100_000, "[CLS] [SEP] </search>"]
    results = small.search(odd, 3)
    assert [len(one) for one in results] == [2] * len(odd)
    assert all(np.isfinite(p.score) for one in results for p in one)
    with pytest.raises(ValueError, match="top_k: got 0"):
        small.search(["x"], 0)


def test_queries_find_the_same_alone_and_together(corpus, encoder):
    loaded, queries = Retriever.load(corpus, encoder), ["ab", "cd ef gh ij", "12 ab" * 9]
    together = loaded.search(queries, 5)
    for query, expected in zip(queries, together, strict=True):
        (alone,) = loaded.search([query], 5)
        assert [p.id for p in alone] == [p.id for p in expected]


# ---- index ----


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_built_index_finds_what_a_search_without_one_finds(tmp_path, corpus, encoder_dir, dtype):
    build(corpus, str(encoder_dir), tmp_path / "index", dtype=dtype)
    direct = Retriever.load(corpus, encoder_dir).search(["ab cd", "e5"], 4)
    stored = Retriever.load(corpus, encoder_dir, index=tmp_path / "index")
    assert stored.index.vectors.dtype == getattr(torch, dtype)
    results = stored.search(["ab cd", "e5"], 4)
    assert [[p.id for p in one] for one in results] == [[p.id for p in one] for one in direct]
    names = sorted(path.name for path in (tmp_path / "index").iterdir())
    assert names == [".rows.json", ".rows.npy", "embeddings.npy", "index.json"]


def test_a_build_that_was_stopped_goes_on_and_ends_the_same(
    tmp_path, corpus, encoder_dir, monkeypatch, capfd
):
    monkeypatch.setattr(retriever, "EMBED_ROWS", 10)
    build(corpus, str(encoder_dir), tmp_path / "at-once")
    embedded = []

    def embed(self, texts, *, kind, **options):
        if len(embedded) == 2:
            raise KeyboardInterrupt
        if kind == "passage" and options:  # one of the build
            embedded.append(len(texts))
        return original(self, texts, kind=kind, **options)

    original = Encoder.embed
    monkeypatch.setattr(Encoder, "embed", embed)
    with pytest.raises(KeyboardInterrupt):
        build(corpus, str(encoder_dir), tmp_path / "parts")
    with pytest.raises(ValueError, match=f"done 20, expected {NUM_PASSAGES}"):
        Retriever.load(corpus, encoder_dir, index=tmp_path / "parts")
    embedded[:] = [0] * 9
    build(corpus, str(encoder_dir), tmp_path / "parts")
    assert embedded[9:] == [10, 10, 1]
    at_once, parts = (np.load(tmp_path / n / "embeddings.npy") for n in ("at-once", "parts"))
    assert np.array_equal(at_once, parts)
    reader = Retriever.load(corpus, encoder_dir, index=tmp_path / "parts")
    num_embedded = len(embedded)
    build(corpus, str(encoder_dir), tmp_path / "parts")
    assert embedded[num_embedded:] == []  # it is finished
    # The encoder may have been trained again at the same path: then it is built anew, and said.
    changed = load_encoder(encoder_dir)
    changed.embeddings["LayerNorm"].bias.data += 1e-3
    save_encoder(changed, encoder_dir)
    build(corpus, str(encoder_dir), tmp_path / "parts")
    assert embedded[num_embedded:] == [10, 10, 10, 10, 1]
    assert "built again, because it has other values of weights" in capfd.readouterr().err
    assert np.array_equal(reader.index.vectors.numpy(), at_once)  # who reads the old file keeps it
    at_once = np.load(tmp_path / "parts/embeddings.npy")
    (tmp_path / "parts/embeddings.npy").unlink()
    build(corpus, str(encoder_dir), tmp_path / "parts")  # although index.json is there
    assert np.array_equal(np.load(tmp_path / "parts/embeddings.npy"), at_once)
    index = json.loads((tmp_path / "parts/index.json").read_text())
    assert index.pop("done") == NUM_PASSAGES
    (tmp_path / "parts/index.json").write_text(json.dumps(index))  # as older builds wrote it
    assert Retriever.load(corpus, encoder_dir, index=tmp_path / "parts").search(["ab"], 1)


def test_a_stopped_build_of_another_corpus_starts_anew(tmp_path, corpus, encoder_dir):
    out = tmp_path / "index"
    out.mkdir()
    np.save(out / "embeddings.npy", np.zeros((NUM_PASSAGES, 16), np.float16))
    (out / "index.json").write_text(json.dumps({"corpus_sha256": "other", "done": 30}))
    build(corpus, str(encoder_dir), out)
    assert np.abs(np.load(out / "embeddings.npy")).sum(1).min() > 0


def test_an_index_of_another_corpus_or_encoder_is_refused(tmp_path, corpus, encoder, encoder_dir):
    index = tmp_path / "index"
    build(corpus, str(encoder_dir), index)
    fewer = write_corpus(tmp_path / "fewer.jsonl", passages()[:-1])
    with pytest.raises(ValueError, match=f"rows {NUM_PASSAGES}, expected {NUM_PASSAGES - 1}"):
        Retriever.load(fewer, encoder, index=index)
    shuffled = write_corpus(tmp_path / "shuffled.jsonl", passages()[::-1])
    with pytest.raises(ValueError, match="corpus_sha256"):
        Retriever.load(shuffled, encoder, index=index)
    (tmp_path / "tokenizer.json").write_bytes((encoder_dir / "tokenizer.json").read_bytes())
    other = new_encoder(encoder.config, tmp_path / "tokenizer.json", 1).eval()
    with pytest.raises(ValueError, match=r"passage 0's cosine -?0\.\d+, expected at least 0.99"):
        Retriever.load(corpus, other, index=index)
    bare = load_encoder(encoder_dir, prefixes={"passage": ""})
    with pytest.raises(ValueError, match="prefixes"):
        Retriever.load(corpus, bare, index=index)


def test_an_index_that_is_not_there_says_how_to_build_one(tmp_path, corpus, encoder):
    for path in (tmp_path / "none", tmp_path):
        for backend in ("auto", "torch", "faiss"):
            with pytest.raises(FileNotFoundError, match="retriever.py build"):
                Retriever.load(corpus, encoder, index=path, backend=backend)
    with pytest.raises(ValueError, match="backend: got 'faiss' with index None"):
        Retriever.load(corpus, encoder, backend="faiss")
    with pytest.raises(ValueError, match="backend: got 'numpy'"):
        Retriever.load(corpus, encoder, backend="numpy")


def test_torch_is_not_given_a_faiss_file(tmp_path, corpus, encoder):
    (tmp_path / "e5_Flat.index").touch()
    with pytest.raises(FileNotFoundError, match="not for torch"):
        Retriever.load(corpus, encoder, index=tmp_path / "e5_Flat.index", backend="torch")


def test_faiss_that_is_not_installed_is_asked_for(
    tmp_path, corpus, encoder, encoder_dir, monkeypatch
):
    monkeypatch.setitem(sys.modules, "faiss", None)
    (tmp_path / "e5_Flat.index").touch()
    with pytest.raises(ImportError, match="pip install faiss-gpu where"):
        Retriever.load(corpus, encoder, index=tmp_path / "e5_Flat.index")
    with pytest.raises(ImportError, match="pip install faiss-gpu where"):
        build(corpus, str(encoder_dir), tmp_path / "index", kind="ivf")
    assert Retriever.load(corpus, encoder).search(["ab"], 1)


def test_faiss_files_find_what_torch_finds(tmp_path, corpus, encoder, encoder_dir):
    faiss = pytest.importorskip("faiss", reason="faiss is not installed (FAISS=cpu make setup)")
    index, queries = tmp_path / "index", ["ab cd", "e5"]
    build(corpus, str(encoder_dir), index, dtype="float32", kind="IVF1,SQ8")
    expected = [[p.id for p in one] for one in Retriever.load(corpus, encoder).search(queries, 50)]
    assert len(expected[0]) == NUM_PASSAGES
    for way in ({"index": index}, {"index": index, "backend": "faiss"},
                {"index": index / "index.faiss"}):
        loaded = Retriever.load(corpus, encoder, **way)
        assert isinstance(loaded.index, retriever.FaissIndex)
        results = loaded.search(queries, 50)
        assert [[p.id for p in one] for one in results] == expected, way
    exact = Retriever.load(corpus, encoder, index=index, backend="torch")
    assert isinstance(exact.index, TorchIndex)
    fewer = write_corpus(tmp_path / "fewer.jsonl", passages()[:-1])
    with pytest.raises(ValueError, match=f"rows {NUM_PASSAGES}, expected {NUM_PASSAGES - 1}"):
        Retriever.load(fewer, encoder, index=index / "index.faiss")
    distances = faiss.IndexFlatL2(16)
    distances.add(np.zeros((NUM_PASSAGES, 16), np.float32))
    faiss.write_index(distances, str(tmp_path / "l2.index"))
    with pytest.raises(ValueError, match="expected inner product"):
        Retriever.load(corpus, encoder, index=tmp_path / "l2.index")


def test_faiss_is_asked_for_its_gpus_before_it_is_given_them(tmp_path):
    """index_cpu_to_all_gpus gives an empty index on a machine without GPUs, and says nothing."""
    faiss = pytest.importorskip("faiss", reason="faiss is not installed (FAISS=cpu make setup)")
    if "gpu" in faiss.get_compile_options().lower() and faiss.get_num_gpus():
        pytest.skip("this machine has a GPU")
    flat = faiss.IndexFlatIP(2)
    flat.add(np.eye(2, dtype=np.float32))
    faiss.write_index(flat, str(tmp_path / "x.index"))
    index = retriever.FaissIndex(tmp_path / "x.index").to(torch.device("cuda"))
    assert index.search(torch.tensor([[0.0, 1.0]]), 3)[1].tolist() == [[1, 0]]


def test_places_that_faiss_cannot_fill_are_left_out(corpus, encoder):
    loaded = Retriever.load(corpus, encoder)

    class Short(retriever.TorchIndex):
        def search(self, queries, top_k):
            return np.array([[0.5, -3e38]], np.float32), np.array([[2, -1]])

    loaded.index = Short(loaded.index.vectors)
    assert [[p.id for p in one] for one in loaded.search(["ab"], 2)] == [["102"]]


def test_the_program_builds_and_searches(tmp_path, corpus, encoder_dir):
    def run(*arguments: object) -> subprocess.CompletedProcess:
        command = [sys.executable, ROOT / "retriever.py", *arguments, "--corpus", corpus]
        return subprocess.run(
            [*command, "--encoder", encoder_dir], cwd=tmp_path, capture_output=True, text=True
        )

    built = run("build", "--out", tmp_path / "index")
    assert built.returncode == 0 and f"{NUM_PASSAGES} passages" in built.stdout, built.stderr
    results = run("search", "ab cd", "zz", "--index", tmp_path / "index", "--top-k", "2")
    assert results.returncode == 0 and results.stdout.count("  [1") == 4, results.stderr
    failed = run("search", "ab", "--index", tmp_path / "nothing")
    assert failed.returncode == 1 and failed.stderr.startswith("retriever.py: --index: got")
    assert f"encoder {encoder_dir}: pooling mean, normalised" in results.stderr.splitlines()[0]


# ---- what is asked of faiss, where it is not installed, too ----


def stub_of_faiss(monkeypatch, **of_index) -> None:
    """faiss reads an index of three passages with these attributes."""
    index = SimpleNamespace(**{"metric_type": 0, "ntotal": 3, "d": 2, **of_index})
    faiss = SimpleNamespace(
        METRIC_INNER_PRODUCT=0, IO_FLAG_MMAP_IFC=1, IO_FLAG_ONDISK_SAME_DIR=2,
        read_index=lambda path, flags: index, vector_to_array=np.array,
        downcast_index=lambda inner: inner)  # fmt: skip
    monkeypatch.setattr(indexes, "faiss_module", lambda: faiss)


def test_r3_equal_scores_of_faiss_come_in_the_order_of_rows(monkeypatch):
    scores, rows = np.array([[0.5, 0.9, 0.5]], np.float32), np.array([[2, 1, 0]])
    stub_of_faiss(monkeypatch, search=lambda queries, top_k: (scores, rows))
    found = retriever.FaissIndex(Path("x.index")).search(torch.zeros(1, 2), 3)
    assert found[0].tolist() == [[scores[0, 1], 0.5, 0.5]] and found[1].tolist() == [[1, 0, 2]]


def test_r3_an_index_of_distances_or_of_other_ids_is_refused(monkeypatch):
    stub_of_faiss(monkeypatch, metric_type=1)
    with pytest.raises(ValueError, match="expected inner product"):
        retriever.FaissIndex(Path("x.index"))
    for ids, is_right in (([2, 0, 1], True), ([1, 2, 3], False)):
        stub_of_faiss(monkeypatch, id_map=ids, index=SimpleNamespace())
        with nullcontext() if is_right else pytest.raises(ValueError, match="x.index: got"):
            assert retriever.FaissIndex(Path("x.index")).num_rows == 3


def test_r3_a_compressed_vector_is_near_to_its_passage_and_nearest_of_those_compared():
    vectors = np.array([[1.0, 0.0], [0.8, 0.6]], np.float32)
    rows = [4, 9]
    assert indexes.unlike(rows, 2 * vectors, vectors, is_coded=True) is None
    # Swapped, each still has a cosine of 0.8, but is nearer to the other's.
    assert indexes.unlike(rows, vectors[::-1], vectors, is_coded=True) is not None
    name, got, _ = indexes.unlike(rows, np.stack([vectors[0], -vectors[1]]), vectors)
    assert name == "passage 9's cosine" and float(got) < 0
    assert indexes.unlike(rows, 2 * vectors, vectors) is not None  # lengths count


# ---- R3: index files of others ----

WIDTH, NUM_ROWS = 16, 600  # enough rows for the coarse quantizers of faiss


@pytest.fixture(scope="session")
def many(tmp_path_factory, encoder) -> tuple[Path, np.ndarray]:
    """A corpus, and its vectors."""
    path = write_corpus(tmp_path_factory.mktemp("many") / "corpus.jsonl", passages(NUM_ROWS))
    return path, encoder.embed(passages(NUM_ROWS), kind="passage").numpy()


def write_faiss(path: Path, vectors: np.ndarray, kind: str, ids: np.ndarray | None = None) -> Path:
    faiss = pytest.importorskip("faiss", reason="faiss is not installed (FAISS=cpu make setup)")
    index = faiss.index_factory(vectors.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    index.add(vectors) if ids is None else index.add_with_ids(vectors, ids)
    faiss.write_index(index, str(path))
    return path


KINDS = ["Flat", "IVF8,Flat", "IVF8,SQ8", "HNSW16", "HNSW16,SQ8", "SQ8", "SQfp16", "SQ4", "PQ4x4",
         "IVF8,PQ4x4", "PQ4x4fs", "IVF8,PQ4x4fs", "Flat,RFlat", "PCAR8,Flat"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_r3_faiss_files_of_every_kind_are_known_by_their_corpus(
    tmp_path, many, encoder, capfd, kind
):
    """Also those that cannot return a vector, or only nearly. Other orders of rows are refused."""
    path, vectors = many
    write_faiss(tmp_path / "x.index", vectors, kind)
    loaded = Retriever.load(path, encoder, index=tmp_path / "x.index")
    assert len(loaded.search(["ab cd"], 3)[0]) == 3
    said = capfd.readouterr().err
    assert ("may miss some of the best" in said) == (kind != "Flat")
    assert ("searches 1 of 8 lists (nprobe)" in said) == kind.startswith("IVF")
    for wrong in (vectors[::-1], np.roll(vectors, 1, 0)):
        write_faiss(tmp_path / "y.index", np.ascontiguousarray(wrong), kind)
        with pytest.raises(ValueError, match=r"y.index: got an index with pass.*, expected"):
            Retriever.load(path, encoder, index=tmp_path / "y.index")


@pytest.mark.parametrize("kind", ["IDMap,Flat", "IDMap2,Flat", "IVF8,Flat", "IDMap,HNSW16"])
def test_r3_ids_of_a_faiss_file_are_the_numbers_of_rows(tmp_path, many, encoder, kind):
    """Other ids would be read as rows, so that a search returns other passages than it found."""
    path, vectors = many
    order = np.random.default_rng(0).permutation(NUM_ROWS)
    write_faiss(tmp_path / "x.index", vectors[order], kind, order)
    loaded = Retriever.load(path, encoder, index=tmp_path / "x.index")
    assert loaded.search([passages(NUM_ROWS)[7]], 50)[0]
    for ids in (order + 1, order * 2, np.zeros(NUM_ROWS, int)):
        write_faiss(tmp_path / "y.index", vectors[order], kind, ids)
        with pytest.raises(ValueError, match="y.index: got ids such as"):
            Retriever.load(path, encoder, index=tmp_path / "y.index")


def test_r3_faiss_files_of_another_width_or_size_or_encoder_are_refused(tmp_path, many, encoder):
    path, vectors = many
    for wrong, message in (
        (vectors[:, :8], "dim 8, expected 16"), (vectors[:-1], "rows 599, expected 600"),
        (2 * vectors, "cosine 0.500, expected at least 0.99"),  # it was not normalised
    ):  # fmt: skip
        write_faiss(tmp_path / "y.index", np.ascontiguousarray(wrong), "Flat")
        with pytest.raises(ValueError, match=message):
            Retriever.load(path, encoder, index=tmp_path / "y.index")


@pytest.mark.parametrize("size", [0, 3, 40, 1_000, 30_000])
def test_r3_a_truncated_or_foreign_faiss_file_is_one_message(tmp_path, many, encoder, size):
    path, vectors = many
    whole = write_faiss(tmp_path / "x.index", vectors, "Flat").read_bytes()
    for content in (whole[:size], b"\x93NUMPY" + bytes(size), b"version https://git-lfs\n" * 9):
        (tmp_path / "y.index").write_bytes(content)
        with pytest.raises(ValueError, match="y.index: got no whole file of faiss") as caught:
            Retriever.load(path, encoder, index=tmp_path / "y.index")
        assert ".cpp" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("row", [0, 5, 300, 590])
def test_r3_several_passages_are_compared_with_the_index(tmp_path, many, encoder, row):
    """Passage 0 alone does not tell a corpus, or vectors, that differ behind it."""
    path, vectors = many
    spoilt = vectors.copy()
    spoilt[row : row + 100] = np.roll(vectors, 7, 0)[row : row + 100]
    index = tmp_path / "index"
    index.mkdir()
    loaded = Retriever.load(path, encoder)
    facts = {**retriever.index_facts(loaded.corpus, encoder), "done": NUM_ROWS}
    (index / "index.json").write_text(json.dumps(facts))
    for got, is_good in ((vectors, True), (spoilt, False), (np.zeros_like(vectors), False),
                         (np.full_like(vectors, np.nan), False)):  # fmt: skip
        np.save(index / "embeddings.npy", got)
        if is_good:
            Retriever.load(path, encoder, index=index)
            continue
        with pytest.raises(ValueError, match=r"passage \d+'s cosine"):
            Retriever.load(path, encoder, index=index)


def test_r3_vectors_on_disk_are_whole_floats_of_the_right_shape(tmp_path, corpus, encoder_dir):
    index = tmp_path / "index"
    build(corpus, str(encoder_dir), index)
    whole = (index / "embeddings.npy").read_bytes()
    for size in (0, 20, 200):
        (index / "embeddings.npy").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="embeddings.npy: got .*build the index again"):
            Retriever.load(corpus, encoder_dir, index=index)
    for wrong in (np.zeros(41), np.zeros((41, 16), int), np.zeros((41, 2, 8))):
        np.save(index / "embeddings.npy", wrong)
        with pytest.raises(ValueError, match="embeddings.npy: got .*, expected a row of floats"):
            Retriever.load(corpus, encoder_dir, index=index)


# ---- leftovers, and a reader beside a builder ----


def test_r3_what_a_build_left_behind_is_not_taken_for_an_index(tmp_path, corpus, encoder_dir):
    index = tmp_path / "index"
    build(corpus, str(encoder_dir), index)
    for name in (".index.json.partial7", ".index.faiss.partial7", "embeddings.npy.partial"):
        (index / name).write_bytes(b"x")
    assert Retriever.load(corpus, encoder_dir, index=index).search(["ab"], 1)
    with pytest.raises(FileNotFoundError, match="--kind ivf"):
        Retriever.load(corpus, encoder_dir, index=index, backend="faiss")
    (index / "index.faiss").write_bytes(b"of an older build")
    build(corpus, str(encoder_dir), index)
    assert not (index / "index.faiss").exists()


def test_r3_a_file_of_faiss_in_an_unfinished_folder_is_not_searched(tmp_path, many, encoder):
    path, vectors = many
    index = tmp_path / "index"
    index.mkdir()
    write_faiss(index / "index.faiss", vectors, "Flat")
    facts = retriever.index_facts(Retriever.load(path, encoder).corpus, encoder)
    (index / "index.json").write_text(json.dumps({**facts, "done": 7}))
    for way in ({"index": index, "backend": "faiss"}, {"index": index / "index.faiss"}):
        with pytest.raises(ValueError, match="done 7, expected 600"):
            Retriever.load(path, encoder, **way)


def test_r3_an_index_that_is_built_anew_while_it_is_opened_is_refused(
    tmp_path, corpus, encoder_dir, monkeypatch
):
    """The builder removes index.json first, so a reader that sees it twice has the old vectors."""
    index = tmp_path / "index"
    build(corpus, str(encoder_dir), index)
    read = retriever.read_vectors

    def read_beside_a_builder(path):
        facts = json.loads((index / "index.json").read_text())
        (index / "index.json").write_text(json.dumps({**facts, "done": 5}))
        return read(path)

    monkeypatch.setattr(retriever, "read_vectors", read_beside_a_builder)
    with pytest.raises(ValueError, match="is being built again"):
        Retriever.load(corpus, encoder_dir, index=index)


# ---- R4: bad lines ----


def refuse_to_embed(*_, **__):
    raise AssertionError("embedded before every line was read")


def test_r4_a_bad_line_is_found_before_anything_is_embedded(
    tmp_path, encoder, encoder_dir, monkeypatch
):
    path = write_corpus(tmp_path / "c.jsonl", passages(30))
    path.write_text(path.read_text() + '\n\n{"id": 9}\n{"id": 10, "contents": "x"}\n')
    monkeypatch.setattr(retriever, "EMBED_ROWS", 10)
    monkeypatch.setattr(Encoder, "embed", refuse_to_embed)
    message = r"c\.jsonl:33: got .* with the keys \['id'\], expected an id"
    with pytest.raises(ValueError, match=message):
        Retriever.load(path, encoder)
    with pytest.raises(ValueError, match=message):
        build(path, str(encoder_dir), tmp_path / "index")
    assert not (tmp_path / "index/index.json").exists()


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_r4_blank_lines_are_passed_over(tmp_path, encoder, encoder_dir, end):
    """At the start, between, and at the end; a row is the number of a line that is not blank."""
    rows = [json.dumps({"id": i, "contents": text}) for i, text in enumerate(passages())]
    blank = ["", "  ", "\t", " " * 5_000, "\x0b\x0c"]
    mixed = blank + [line for row in rows for line in (row, *blank[: len(row) % 4])] + blank
    path = tmp_path / "c.jsonl"
    path.write_bytes(end.join(mixed).encode())
    lines = Corpus(path)
    assert [lines.read(row) for row in range(len(lines))] == [
        (str(i), text) for i, text in enumerate(passages())
    ]
    numbers = [lines.lines.line_number(row) for row in range(len(lines))]
    assert [mixed[number - 1] for number in numbers] == rows
    build(path, str(encoder_dir), tmp_path / "index")
    plain = write_corpus(tmp_path / "plain.jsonl", passages())
    expected = [int(p.id) - 100 for p in Retriever.load(plain, encoder).search(["ab"], 9)[0]]
    found = Retriever.load(path, encoder, index=tmp_path / "index").search(["ab"], 9)[0]
    assert [int(p.id) for p in found] == expected


def test_r4_lines_are_found_whatever_the_blocks_that_a_file_is_read_in(tmp_path, monkeypatch):
    text = b'{"id": 1, "text": "a"}\n\n \n{"id": 2, "text": "b"}\n\n{"id": 3, "text": "c"}\n\n'
    path = tmp_path / "c.jsonl"
    path.write_bytes(text)
    for size in range(1, len(text) + 2):
        monkeypatch.setattr("formats.corpora.BLOCK", size)
        lines = Corpus(path)
        rows = [lines.read(row) for row in range(len(lines))]
        assert rows == [("1", "a"), ("2", "b"), ("3", "c")]
        assert [lines.lines.line_number(row) for row in range(3)] == [1, 4, 6]


def test_r4_a_corpus_of_blank_lines_is_empty(tmp_path):
    (tmp_path / "c.jsonl").write_text("\n \n")
    with pytest.raises(ValueError, match="c.jsonl: got blank lines alone"):
        Corpus(tmp_path / "c.jsonl")


def test_r4_ids_that_occur_twice_are_said(tmp_path, encoder, capfd):
    rows = [{"id": i, "contents": "x"} for i in (4, 5, "4", 6, 4)]
    path = tmp_path / "c.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    Retriever.load(path, encoder)
    said = capfd.readouterr().err
    assert "2 passages have the id of an earlier one, such as '4' in lines 1 and 3" in said


def test_r4_a_built_index_is_opened_without_reading_every_line_again(
    tmp_path, corpus, encoder_dir, monkeypatch
):
    """Of 14 GB that would take minutes at every start; the build has read them."""
    build(corpus, str(encoder_dir), tmp_path / "index")
    read = []
    monkeypatch.setattr(Corpus, "check", None, raising=False)
    original = retriever.Lines.read
    monkeypatch.setattr(retriever.Lines, "read",
                        lambda self, row: read.append(row) or original(self, row))  # fmt: skip
    Retriever.load(corpus, encoder_dir, index=tmp_path / "index")
    assert 0 < len(read) <= retriever.NUM_COMPARED


# ---- R5: corpora as they are published ----


@pytest.mark.parametrize(("row", "expected"), [
    ({"id": "7", "contents": '"A"\ntext'}, ("7", '"A"', "text")),
    ({"_id": "7", "title": "A", "text": "text", "metadata": {}}, ("7", "A", "text")),  # BEIR
    ({"_id": "7", "title": "", "text": "two\nlines"}, ("7", "", "two\nlines")),
    ({"_id": "7", "title": "A", "text": "A\nis A"}, ("7", "A", "A\nis A")),
    ({"docid": 7, "text": "two\nlines"}, ("7", "", "two\nlines")),
    ({"id": 7, "title": None, "text": "text"}, ("7", "", "text")),
    ({"id": 7, "title": "A", "contents": "text"}, ("7", "A", "text")),  # beside the contents
    ({"id": 7, "title": "A", "contents": "A\ntext", "text": "text"}, ("7", "A", "text")),
    ({"id": 7, "title": '"A"', "contents": '"A"\ntext'}, ("7", '"A"', "text")),
    ({"id": 7, "title": "A", "contents": '"A"\ntext'}, ("7", '"A"', "text")),
    ({"pid": 7, "title": "A\nB", "passage": "text"}, ("7", "A B", "text")),
])  # fmt: skip
def test_r5_rows_are_read_under_the_keys_of_published_corpora(tmp_path, row, expected):
    (tmp_path / "c.jsonl").write_text(json.dumps(row) + "\r\n")
    assert Corpus(tmp_path / "c.jsonl").passage(0, 0.0)[:3] == expected


@pytest.mark.parametrize("row", [
    {"contents": "x"}, {"id": None, "contents": "x"}, {"id": True, "contents": "x"},
    {"id": 1, "content": "x"}, {"id": 1, "text": ["x"]}, {"id": 1, "title": 3, "text": "x"},
    {"id": 1.5, "text": "x"},
])  # fmt: skip
def test_r5_other_rows_are_refused_with_the_keys_found(tmp_path, row):
    (tmp_path / "c.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=r"c.jsonl:1: got .* with the keys \[.*\], expected an id"):
        Corpus(tmp_path / "c.jsonl").read(0)


ROWS = [{"id": "1", "contents": "Red\nred is red"}, {"id": "2", "contents": 'Blue\n"b" is blue'}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
DPR = b'id\ttext\ttitle\r\n1\tred is red\tRed\r\n2\t"""b"" is blue"\t"Blue"\r\n'
MS_MARCO = b'1\tred is red\n\n2\t"b" is blue\n'
PUBLISHED = {
    "c.jsonl.gz": (gzip.compress(LINES), "gzip", ROWS),
    "c.jsonl": (gzip.compress(LINES), "gzip", ROWS),  # whatever it is called
    "c.jsonl.bz2": (bz2.compress(LINES), "bzip2", ROWS),
    "c.jsonl.xz": (lzma.compress(LINES), "xz", ROWS),
    "psgs.tsv": (DPR, "a table", ROWS),
    "psgs.tsv.gz": (gzip.compress(DPR), "gzip", ROWS),
    "collection.tsv": (MS_MARCO, "a table", [{"id": "1", "contents": "red is red"},
                                             {"id": "2", "contents": '"b" is blue'}]),
    "c.json": (json.dumps(ROWS, indent=1).encode(), "a JSON array", ROWS),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_r5_other_formats_are_refused_with_a_command_that_converts_them(tmp_path, encoder, name):
    content, kind, expected = PUBLISHED[name]
    path, out = tmp_path / name, tmp_path / "plain.jsonl"
    path.write_bytes(content)
    message = f"{name}: got {kind}.*python retriever.py convert --corpus .*{name} --out"
    with pytest.raises(ValueError, match=message):
        Retriever.load(path, encoder)
    convert(path, out)
    assert [json.loads(line) for line in out.read_text().splitlines()] == expected
    assert len(Retriever.load(out, encoder).corpus) == 2
    with pytest.raises(FileExistsError, match="which is there already"):
        convert(path, out)


def test_r5_parquet_is_read_where_pyarrow_is_installed_and_asked_for_elsewhere(
    tmp_path, encoder, monkeypatch
):
    path = tmp_path / "c.parquet"
    path.write_bytes(b"PAR1 and so on")
    with pytest.raises(ValueError, match="got parquet.* convert --corpus"):
        Retriever.load(path, encoder)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="pip install pyarrow"):
        convert(path, tmp_path / "out.jsonl")
    monkeypatch.undo()
    pyarrow = pytest.importorskip("pyarrow")
    with pytest.raises(ValueError, match="c.parquet: got .*expected a parquet file"):
        convert(path, tmp_path / "out.jsonl")
    from pyarrow import parquet

    rows = [{"id": 1, "title": "Red", "text": "red is red"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    convert(path, tmp_path / "out.jsonl")
    assert Corpus(tmp_path / "out.jsonl").read(0) == ("1", "Red\nred is red")


@pytest.mark.parametrize(("content", "message"), [
    (gzip.compress(LINES, mtime=0)[:-9], "c.x: got EOFError"),
    (b"PK\x03\x04zip", "got zip, expected .*unpack it"),
    ("\ufeff{}".encode("utf-16"), "got UTF-16, expected .*save it as UTF-8"),
    (LINES + b'{"id": 3}\n', r"c.x:3: got .* with the keys \['id'\]"),
    (b"[1, 2]", "c.x: entry 1: got"),
    (b"id\ttext\n1\n", r"c.x:2: got 1 columns, expected \['id', 'text'\]"),
    (b'id\ttext\n1\t"a" b\n', "c.x:2: got .*expected a field in quotes to end"),
    (b"1\turl\ttitle\tbody\n", "c.x:1: got 4 columns"),
    (b"\n\n", "c.x: got no passages"),
])  # fmt: skip
def test_r5_a_conversion_that_cannot_be_true_is_refused_and_leaves_nothing(
    tmp_path, content, message
):
    (tmp_path / "c.x").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "c.x", tmp_path / "out.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["c.x"]


# ---- R7: the length of a passage; R1: prefixes of a search ----


def test_r7_a_build_says_how_many_passages_are_cut_also_when_it_goes_on(
    tmp_path, corpus, encoder_dir, monkeypatch, capfd
):
    monkeypatch.setattr(retriever, "EMBED_ROWS", 10)
    contents = passages()
    for row in range(0, NUM_PASSAGES, 4):
        contents[row] = contents[row][:12]  # 11 of 41 are short
    path = write_corpus(tmp_path / "mixed.jsonl", contents)
    num_calls, original = 0, Encoder.embed

    def embed(self, *texts, **options):
        nonlocal num_calls
        num_calls += 1
        if num_calls == 3:
            raise KeyboardInterrupt
        return original(self, *texts, **options)

    monkeypatch.setattr(Encoder, "embed", embed)
    with pytest.raises(KeyboardInterrupt):
        build(path, str(encoder_dir), tmp_path / "index", max_tokens=30)
    build(path, str(encoder_dir), tmp_path / "index", max_tokens=30)
    said = capfd.readouterr().err
    assert "73.2% of passages are longer than 30 tokens and cut" in said
    assert "30 tokens" in said


def test_r7_an_index_is_searched_with_the_length_that_it_was_built_with(
    tmp_path, corpus, encoder_dir, capfd
):
    """Older indexes of E5 were built with 256 tokens of its 512."""
    build(corpus, str(encoder_dir), tmp_path / "index", max_tokens=20)
    facts = json.loads((tmp_path / "index/index.json").read_text())
    assert facts["max_tokens"] == 20
    capfd.readouterr()
    loaded = Retriever.load(corpus, encoder_dir, index=tmp_path / "index")
    assert loaded.encoder.max_tokens == 20 and "20 tokens" in capfd.readouterr().err
    with pytest.raises(ValueError, match="max_tokens 20, expected 64.*--max-tokens"):
        Retriever.load(corpus, encoder_dir, index=tmp_path / "index", max_tokens=64)
    for wrong in (1_000, "x", None):
        (tmp_path / "index/index.json").write_text(json.dumps({**facts, "max_tokens": wrong}))
        with pytest.raises(ValueError, match="max_tokens"):
            Retriever.load(corpus, encoder_dir, index=tmp_path / "index")


def test_r1_an_index_with_other_prefixes_is_refused_and_prefixes_can_be_given(
    tmp_path, corpus, encoder_dir
):
    given = {"query": "q ", "passage": "p "}
    build(corpus, str(encoder_dir), tmp_path / "index", prefixes=given)
    with pytest.raises(ValueError, match="prefixes.*--passage-prefix"):
        Retriever.load(corpus, encoder_dir, index=tmp_path / "index")
    loaded = Retriever.load(corpus, encoder_dir, index=tmp_path / "index", prefixes=given)
    assert loaded.encoder.prefixes == given
    other = {"query": "another ", "passage": "p "}  # no stored vector depends on it
    assert Retriever.load(corpus, encoder_dir, index=tmp_path / "index", prefixes=other)


def test_r1_the_settings_of_every_program_take_prefixes(tmp_path, corpus, encoder_dir):
    settings = RolloutSettings(corpus=str(corpus), encoder=str(encoder_dir), query_prefix="")
    loaded = retriever.open_retriever(settings)
    assert loaded.encoder.prefixes == {"query": "", "passage": "passage: "}


def test_r7_the_shipped_encoder_reads_what_it_always_read(tmp_path):
    """128 positions, mean, its own prefixes: runs of the embedded world do not change."""
    encoder = load_encoder(retriever.WORLD / "encoder")
    assert str(encoder).startswith('pooling mean, normalised, prefixes query "query: ", passage '
                                   '"passage: ", 128 tokens')  # fmt: skip


# ---- real passages ----

NUM_QUESTIONS = (
    25  # of each set, against the passages found for them; DGPO_TEST_RECALL=all: everything
)
RECALL_TOLERANCE = 0.002
RECALLS = (1, 3, 5, 20)


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.filterwarnings("ignore:.*heads are assumed")  # the asset is a flat copy
def test_recall_on_real_passages_is_that_of_sentence_transformers(real_assets, real_data, tmp_path):
    """docs/own-models.md says how to run it on all of the sample."""
    reference = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.models")
    is_all = os.environ.get("DGPO_TEST_RECALL") == "all"
    questions = []
    for name in ("nq", "triviaqa"):
        rows = load_questions(real_data / "questions" / f"{name}.jsonl")
        rows = [row for row in rows if row.metadata["answer_passage_ids"]]
        questions += rows if is_all else rows[:NUM_QUESTIONS]
    path = real_data / "passages" / "wiki18_sample.jsonl"
    if not is_all:
        wanted = {i for question in questions for i in question.metadata["wiki18_ids"]}
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path = tmp_path / "corpus.jsonl"
        path.write_text("".join(lines[i] for i in sorted(wanted)), encoding="utf-8")
    queries = [question.question for question in questions]
    loaded = Retriever.load(path, real_assets / "all-minilm-l6-v2")
    ours = [[int(p.id) for p in results] for results in loaded.search(queries, max(RECALLS))]

    public = tmp_path / "public"
    save_encoder(loaded.encoder, public)
    (public / "config_sentence_transformers.json").unlink()
    (public / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    max_tokens = loaded.encoder.tokenizer.truncation["max_length"]
    theirs = reference.SentenceTransformer(
        modules=[
            modules.Transformer(str(public), max_seq_length=max_tokens),
            modules.Pooling(loaded.encoder.config["hidden_size"], "mean"),
            modules.Normalize(),
        ],
        device="cpu",
    )
    contents = [loaded.corpus.read(row)[1] for row in range(len(loaded.corpus))]
    ids = np.array([int(loaded.corpus.read(row)[0]) for row in range(len(loaded.corpus))])
    vectors, asked = theirs.encode(contents, batch_size=64), theirs.encode(queries)
    expected = ids[best_by_hand(vectors, asked, max(RECALLS))]
    np.testing.assert_allclose(loaded.index.vectors.numpy(), vectors, atol=SCORE_TOLERANCE)

    def recall(results: list, k: int) -> float:
        golds = [question.metadata["answer_passage_ids"] for question in questions]
        return float(np.mean([bool({*g} & {*f[:k]}) for g, f in zip(golds, results, strict=True)]))

    for k in RECALLS:
        got, wanted_recall = recall(ours, k), recall(expected.tolist(), k)
        print(
            f"recall@{k}: {got:.4f}, sentence-transformers {wanted_recall:.4f}, {len(ids)} passages"
        )
        assert got == pytest.approx(wanted_recall, abs=RECALL_TOLERANCE) and got > 0.5
