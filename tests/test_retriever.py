"""Corpus files, exact search, indexes, and recall on real passages.

The encoder is a tiny random BERT: what it retrieves is arbitrary but fixed, which is all that these
tests need. faiss is compared with where it is installed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

import retriever
from data import load_questions
from encoder import Encoder
from infra.files import replace_surrogates
from retriever import Corpus, Retriever, TorchIndex
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


def test_title_quotes_are_taken_off_once_and_the_rest_is_text(tmp_path):
    contents = ['"Red"\nline\nnext', '""Heroes" (song)"\nx', "no title", "Bare\nx", '"\nx', ""]
    lines = Corpus(write_corpus(tmp_path / "c.jsonl", contents))
    results = [lines.passage(row, 0.5)[:3] for row in range(len(lines))]
    assert results == [
        ("100", "Red", "line\nnext"), ("101", '"Heroes" (song)', "x"), ("102", "", "no title"),
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
    assert lines.passage(0, 0.0)[:3] == ("7", "A\ufffd", "\ufffd")
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
    ["{", "", "[1]", '{"id": "1"}', '{"contents": "x"}', '{"id": 1, "contents": 2}', "[" * 9**5],
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
        monkeypatch.setattr(retriever, "CHUNK_ELEMENTS", 6 * chunk_rows)
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
    monkeypatch.setattr(retriever, "CHUNK_ELEMENTS", 3 * chunk_rows)
    vectors = torch.ones(30, 3)
    vectors[[5, 17, 29]] = 2.0
    rows = TorchIndex(vectors).search(torch.ones(2, 3), 5)[1]
    assert rows.tolist() == [[5, 17, 29, 0, 1]] * 2


def test_a_search_returns_the_passages_of_faiss_flat(monkeypatch):
    monkeypatch.setattr(retriever, "CHUNK_ELEMENTS", 64 * 999)
    faiss = pytest.importorskip("faiss", reason="faiss is not installed (FAISS=1 make setup)")
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
    assert f'"{results[0][0].title}"\n{results[0][0].text}' == passages()[rows[0][0]]


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
    retriever.build(corpus, str(encoder_dir), tmp_path / "index", dtype=dtype)
    direct = Retriever.load(corpus, encoder_dir).search(["ab cd", "e5"], 4)
    stored = Retriever.load(corpus, encoder_dir, index=tmp_path / "index")
    assert stored.index.vectors.dtype == getattr(torch, dtype)
    results = stored.search(["ab cd", "e5"], 4)
    assert [[p.id for p in one] for one in results] == [[p.id for p in one] for one in direct]
    assert sorted(p.name for p in (tmp_path / "index").iterdir()) == [
        "embeddings.npy",
        "index.json",
    ]


def test_a_build_that_was_stopped_goes_on_and_ends_the_same(
    tmp_path, corpus, encoder_dir, monkeypatch
):
    monkeypatch.setattr(retriever, "EMBED_ROWS", 10)
    retriever.build(corpus, str(encoder_dir), tmp_path / "at-once")
    embedded = []

    def embed(self, texts, *, kind, batch_size=64):
        if len(embedded) == 2:
            raise KeyboardInterrupt
        embedded.append(len(texts))
        return original(self, texts, kind=kind, batch_size=batch_size)

    original = Encoder.embed
    monkeypatch.setattr(Encoder, "embed", embed)
    with pytest.raises(KeyboardInterrupt):
        retriever.build(corpus, str(encoder_dir), tmp_path / "parts")
    with pytest.raises(ValueError, match=f"done 20, expected {NUM_PASSAGES}"):
        Retriever.load(corpus, encoder_dir, index=tmp_path / "parts")
    embedded[:] = [0] * 9
    retriever.build(corpus, str(encoder_dir), tmp_path / "parts")
    assert embedded[9:] == [10, 10, 1]
    at_once, parts = (np.load(tmp_path / n / "embeddings.npy") for n in ("at-once", "parts"))
    assert np.array_equal(at_once, parts)
    reader = Retriever.load(corpus, encoder_dir, index=tmp_path / "parts")
    num_embedded = len(embedded)
    # A finished index is built anew: the encoder may have been trained again at the same path.
    retriever.build(corpus, str(encoder_dir), tmp_path / "parts")
    assert embedded[num_embedded:] == [10, 10, 10, 10, 1]
    assert np.array_equal(reader.index.vectors.numpy(), at_once)  # who reads the old file keeps it
    (tmp_path / "parts/embeddings.npy").unlink()
    retriever.build(corpus, str(encoder_dir), tmp_path / "parts")  # although index.json is there
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
    retriever.build(corpus, str(encoder_dir), out)
    assert np.abs(np.load(out / "embeddings.npy")).sum(1).min() > 0


def test_an_index_of_another_corpus_or_encoder_is_refused(tmp_path, corpus, encoder, encoder_dir):
    index = tmp_path / "index"
    retriever.build(corpus, str(encoder_dir), index)
    fewer = write_corpus(tmp_path / "fewer.jsonl", passages()[:-1])
    with pytest.raises(ValueError, match=f"rows {NUM_PASSAGES}, expected {NUM_PASSAGES - 1}"):
        Retriever.load(fewer, encoder, index=index)
    shuffled = write_corpus(tmp_path / "shuffled.jsonl", passages()[::-1])
    with pytest.raises(ValueError, match="corpus_sha256"):
        Retriever.load(shuffled, encoder, index=index)
    (tmp_path / "tokenizer.json").write_bytes((encoder_dir / "tokenizer.json").read_bytes())
    other = new_encoder(encoder.config, tmp_path / "tokenizer.json", 1).eval()
    with pytest.raises(ValueError, match=r"cosine -?0\.\d+, expected 1.0"):
        Retriever.load(corpus, other, index=index)
    bare = new_encoder(encoder.config, tmp_path / "tokenizer.json", 0, query_prefix="")
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
    with pytest.raises(ImportError, match="pip install faiss-gpu"):
        Retriever.load(corpus, encoder, index=tmp_path / "e5_Flat.index")
    with pytest.raises(ImportError, match="pip install faiss-gpu"):
        retriever.build(corpus, str(encoder_dir), tmp_path / "index", with_faiss=True)
    assert Retriever.load(corpus, encoder).search(["ab"], 1)


def test_faiss_files_find_what_torch_finds(tmp_path, corpus, encoder, encoder_dir):
    faiss = pytest.importorskip("faiss", reason="faiss is not installed (FAISS=1 make setup)")
    index, queries = tmp_path / "index", ["ab cd", "e5"]
    retriever.build(corpus, str(encoder_dir), index, dtype="float32", with_faiss=True)
    expected = [[p.id for p in one] for one in Retriever.load(corpus, encoder).search(queries, 50)]
    assert len(expected[0]) == NUM_PASSAGES
    for way in ({"index": index, "backend": "faiss"}, {"index": index / "index.faiss"}):
        loaded = Retriever.load(corpus, encoder, **way)
        assert isinstance(loaded.index, retriever.FaissIndex)
        results = loaded.search(queries, 50)
        assert [[p.id for p in one] for one in results] == expected, way
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
    faiss = pytest.importorskip("faiss", reason="faiss is not installed (FAISS=1 make setup)")
    if "gpu" in faiss.get_compile_options().lower() and faiss.get_num_gpus():
        pytest.skip("this machine has a GPU")
    flat = faiss.IndexFlatIP(2)
    flat.add(np.eye(2, dtype=np.float32))
    faiss.write_index(flat, str(tmp_path / "x.index"))
    index = retriever.FaissIndex(tmp_path / "x.index", torch.device("cuda"))
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
    assert failed.returncode == 1 and failed.stderr.startswith("retriever.py: index: got")


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
