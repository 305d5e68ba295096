"""Kinds of indexes, builds that are killed, the server of Search-R1's protocol, and its client.

The encoder is that of the miniature world. faiss and bm25s are optional: their tests skip.
"""

import gzip
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

import retriever
import sampling
from data import Passage
from formats import corpora
from formats.corpora import Lines, join_contents, split_contents
from infra.checkpoint import newest_state
from infra.http import Refused
from infra.run import Stop
from model import load_encoder
from retrieval import bm25, compare, remote, serve
from retrieval import build as building
from retrieval.build import build, to_int8
from retrieval.remote import RemoteRetriever
from retriever import Retriever, TorchIndex, inner_products, split_products
from tests.support.mini import make_encoder
from tests.support.runs import run
from tests.support.scripted import play
from world.pretrain import save_encoder

ROOT = Path(__file__).resolve().parents[1]
NUM_PASSAGES, WIDTH = 300, 24
WORDS = "amber basalt cedar delta ember fjord gravel harbor indigo juniper kelp lagoon".split()
INT8_RECALL = 0.95  # of the best 3 among random vectors
HALF_TOLERANCE = 2e-6  # fp32 sums of exact products of halves, in another order
SCORE_TOLERANCE = 1e-5


def texts(count: int = NUM_PASSAGES) -> list[str]:
    draw = np.random.default_rng(0)
    return [f'"{draw.choice(WORDS)} {i}"\n' + " ".join(draw.choice(WORDS, 9)) for i in range(count)]


def write_corpus(path: Path, contents: list[str]) -> Path:
    rows = [json.dumps({"id": f"p{i}", "contents": text}) for i, text in enumerate(contents)]
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a corpus and an encoder."""
    folder = tmp_path_factory.mktemp("place")
    write_corpus(folder / "corpus.jsonl", texts())
    make_encoder(folder)
    encoder = load_encoder(folder / "encoder")
    for parameter in encoder.parameters():  # its vectors are nearly parallel
        if parameter.dim() == 2:
            parameter.data.mul_(20)
    save_encoder(encoder, folder / "encoder")
    return folder


def found_ids(results: list[list[Passage]]) -> list[list[str]]:
    return [[passage.id for passage in passages] for passages in results]


# ---- opening ----


def test_a_known_corpus_is_opened_without_a_pass_over_it(place, tmp_path, monkeypatch):
    scans, scan = [], Lines._scan
    monkeypatch.setattr(Lines, "_scan", lambda self: scans.append(1) or scan(self))
    corpus = write_corpus(tmp_path / "c.jsonl", texts(40))
    fresh = Lines(corpus)
    for cache in (tmp_path, tmp_path / "x.index"):
        cache.touch() if cache != tmp_path else None
        scans.clear()
        known = [Lines(corpus, cache) for _ in range(3)]
        assert len(scans) == 1
        assert [lines.sha256 for lines in known] == [fresh.sha256] * 3
        assert isinstance(known[1]._offsets, np.memmap)
        assert [known[2].read(row) for row in range(40)] == [fresh.read(row) for row in range(40)]
        assert len(Lines(corpus, cache, is_known=False)) == 40 and len(scans) == 2
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {".rows.npy", ".rows.json", ".x.index.rows.npy", ".x.index.rows.json"}


def test_a_corpus_that_changed_is_read_again(tmp_path):
    """By size, by time alone, and by contents under the same size and time."""
    corpus = write_corpus(tmp_path / "c.jsonl", texts(40))
    sha256, times = Lines(corpus, tmp_path).sha256, corpus.stat().st_mtime_ns
    other = corpus.read_bytes().replace(b"amber", b"AMBER")
    corpus.write_bytes(other)
    os.utime(corpus, ns=(times, times))
    changed = Lines(corpus, tmp_path)
    assert changed.sha256 != sha256 and changed.sha256 == Lines(corpus).sha256
    os.utime(corpus, ns=(times + 1, times + 1))
    assert Lines(corpus, tmp_path).sha256 == changed.sha256
    corpus.write_bytes(b'{"id": 0, "contents": "first"}\n' + other)
    assert Lines(corpus, tmp_path).read(0) == ("0", "first")


def test_offsets_that_no_one_can_write_or_that_are_torn_are_said(tmp_path, capfd, monkeypatch):
    corpus = write_corpus(tmp_path / "c.jsonl", texts(10))
    Lines(corpus, tmp_path)
    whole = (tmp_path / ".rows.npy").read_bytes()
    (tmp_path / ".rows.npy").write_bytes(whole[:-8])
    with pytest.raises(ValueError, match=r"\.rows\.npy: got"):
        Lines(corpus, tmp_path)
    np.save(tmp_path / ".rows.npy", np.arange(11))
    with pytest.raises(ValueError, match="offsets up to 10"):
        Lines(corpus, tmp_path)
    (tmp_path / ".rows.npy").unlink()

    def refuse(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr(corpora, "write_aside", refuse)
    assert len(Lines(corpus, tmp_path)) == 10
    assert "not written (read-only), so every start reads all of" in capfd.readouterr().err


def test_titles_and_texts_make_the_contents_that_they_came_from():
    for contents in ("one line", '"T"\ntext', '"T"\ntwo\nlines', "\ntwo\nlines", "T\n", "", "\n\n"):
        title, text = split_contents(contents)
        assert split_contents(join_contents(title, text)) == (title, text)
    assert join_contents('"T"', "text") == '"T"\ntext' and join_contents("", "text") == "text"


# ---- exact search ----


def test_int8_vectors_are_searched_as_codes_times_scales(monkeypatch):
    monkeypatch.setattr(retriever, "TILE_ELEMENTS", WIDTH * 37)
    draw = torch.Generator().manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(500, WIDTH, generator=draw), dim=1)
    vectors[0] = 0.0  # no scale may be 0
    codes, scales = map(torch.from_numpy, to_int8(vectors))
    index = TorchIndex(codes, scales)
    queries = vectors[10:60] + 0.1 * torch.randn(50, WIDTH, generator=draw)
    scores, rows = index.search(queries, 3)
    stored = codes.float() * scales
    np.testing.assert_allclose(scores, (queries @ stored.T).topk(3).values, atol=SCORE_TOLERANCE)
    exact = TorchIndex(vectors).search(queries, 3)[1]
    assert compare.recalls(rows, exact)[3] >= INT8_RECALL
    assert index.difference([7, 400], vectors[[7, 400]].numpy()) is None
    assert index.difference([7, 8], vectors[[8, 7]].numpy()) is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8])
def test_two_halves_of_a_query_give_the_products_of_the_whole_one(dtype):
    """On a GPU half-precision products are summed in fp32; rounding the query would reorder."""
    draw = torch.Generator().manual_seed(0)
    queries = torch.randn(5, WIDTH, generator=draw) / WIDTH**0.5
    tile = torch.randn(40, WIDTH, generator=draw)
    tile = (20 * tile).to(torch.int8) if dtype == torch.int8 else (tile / WIDTH**0.5).to(dtype)
    got = split_products(queries, tile, lambda a, b: a.float() @ b.float())
    expected = queries.double() @ tile.double().T
    # bfloat16 holds 8 bits in each half.
    tolerance = HALF_TOLERANCE * (8 if dtype == torch.bfloat16 else 1) * tile.float().abs().max()
    assert (got - expected).abs().max() < tolerance
    rounded = queries.to(tile.half().dtype if dtype == torch.int8 else dtype).double()
    assert (rounded @ tile.double().T - expected).abs().max() > 4 * tolerance


def test_a_gpu_search_has_the_shapes_of_a_cpu_search():
    with FakeTensorMode():
        queries = torch.empty(3, WIDTH, device="cuda")
        for dtype in (torch.float16, torch.int8):
            tile = torch.empty(50, WIDTH, dtype=dtype, device="cuda")
            products = inner_products(queries, tile)
            assert products.shape == (3, 50) and products.dtype == torch.float32


def test_a_tie_for_the_last_place_is_seen_at_the_end_alone(monkeypatch):
    """Without one a second pass would double the time; with one the lower row must win."""
    monkeypatch.setattr(retriever, "TILE_ELEMENTS", 4 * 3)
    scans, scan = [], TorchIndex._scan
    monkeypatch.setattr(TorchIndex, "_scan", lambda *all: scans.append(1) or scan(*all))
    vectors = torch.eye(4).repeat(5, 1) * torch.arange(20.0)[:, None]
    index = TorchIndex(vectors)
    assert index.search(torch.ones(1, 4), 3)[1].tolist() == [[19, 18, 17]] and len(scans) == 1
    vectors[3] = vectors[17].flip(0)
    assert index.search(torch.ones(1, 4), 3)[1].tolist() == [[19, 18, 3]] and len(scans) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
def test_all_tiles_have_their_scores_in_one_piece_of_memory(monkeypatch, dtype):
    """Else the allocator kept 2 GB for 512 queries of a million vectors."""
    monkeypatch.setattr(retriever, "TILE_ELEMENTS", WIDTH * 3)
    places, top = set(), retriever._any_top
    monkeypatch.setattr(retriever, "_any_top",
                        lambda scores, k: places.add(scores.data_ptr()) or top(scores, k))
    draw = torch.Generator().manual_seed(0)
    vectors = (20 * torch.randn(20, WIDTH, generator=draw)).to(dtype)  # the last tile has two
    queries = torch.randn(5, WIDTH, generator=draw)
    found = TorchIndex(vectors, torch.ones(20, 1)).search(queries, 4)[1]
    assert len(places) == 2  # and one for the best of all tiles
    assert (found == (queries @ vectors.float().T).topk(4).indices.numpy()).all()


def test_equal_queries_of_a_call_are_embedded_and_searched_once(place, monkeypatch):
    loaded = Retriever.load(place / "corpus.jsonl", place / "encoder")
    asked, search = [], loaded.index.search
    monkeypatch.setattr(loaded.index, "search", lambda v, k: asked.append(len(v)) or search(v, k))
    results = loaded.search(["amber", "kelp", "amber", "amber"], 4)
    assert asked == [2] and results[0] == results[2] == results[3] != results[1]
    results[0].clear()
    assert len(results[2]) == 4


# ---- kinds ----


@pytest.mark.parametrize("kind", ["flat", "sq8", "ivf", "ivfpq", "IVF4,SQ6"])
def test_every_kind_finds_nearly_what_the_exact_search_finds(place, tmp_path, kind, capfd):
    if kind not in ("flat", "sq8"):
        pytest.importorskip("faiss", reason="faiss is not installed (pip install faiss-cpu)")
    build(place / "corpus.jsonl", str(place / "encoder"), tmp_path / "i", kind=kind)
    queries = texts(60)[::2]
    exact = Retriever.load(place / "corpus.jsonl", place / "encoder").search(queries, 3)
    loaded = Retriever.load(place / "corpus.jsonl", place / "encoder", index=tmp_path / "i")
    rows = [np.array(found_ids(results)) for results in (loaded.search(queries, 3), exact)]
    assert compare.recalls(*rows)[3] >= 0.9
    assert not [path.name for path in (tmp_path / "i").glob(".part*")]
    if kind in ("ivf", "ivfpq"):
        (tmp_path / "i").rename(tmp_path / "moved")  # its two files find one another again
        (tmp_path / "moved/embeddings.npy").unlink()
        bare = Retriever.load(place / "corpus.jsonl", place / "encoder", index=tmp_path / "moved")
        assert bare.index.exact is None and len(bare.search(queries, 3)) == 30
        bare.index.probe(2)
        assert bare.index._inner.nprobe == 2


def test_another_kind_of_the_same_vectors_embeds_nothing_again(place, tmp_path, monkeypatch):
    pytest.importorskip("faiss", reason="faiss is not installed (pip install faiss-cpu)")
    build(place / "corpus.jsonl", str(place / "encoder"), tmp_path / "i")
    vectors = (tmp_path / "i/embeddings.npy").stat()
    build(place / "corpus.jsonl", str(place / "encoder"), tmp_path / "i", kind="ivf")
    assert (tmp_path / "i/index.faiss").is_file()
    build(place / "corpus.jsonl", str(place / "encoder"), tmp_path / "i", kind="flat")
    assert not (tmp_path / "i/index.faiss").exists()
    assert (tmp_path / "i/embeddings.npy").stat().st_mtime_ns == vectors.st_mtime_ns


def test_a_kind_that_faiss_cannot_make_is_refused_before_anything_is_embedded(place, tmp_path):
    pytest.importorskip("faiss", reason="faiss is not installed (pip install faiss-cpu)")
    for kind in ("HNSW32", "IVF8,Nonsense"):
        with pytest.raises(ValueError, match=f"--kind: got '{kind}', expected flat, sq8, ivf"):
            build(place / "corpus.jsonl", str(place / "encoder"), tmp_path / "i", kind=kind)
    assert not (tmp_path / "i/index.json").exists()


def test_lists_grow_with_the_root_of_the_rows_and_parts_divide_the_width():
    assert building.factory_text("ivf", 21_015_324, 768) == "IVF16384,SQ8"
    assert building.factory_text("ivfpq", 21_015_324, 768) == "IVF16384,PQ96"
    assert building.factory_text("ivfpq", 300, 20) == "IVF7,PQ2"
    assert building.factory_text("flat", 300, 20) == "" == building.factory_text("sq8", 9, 9)
    assert building.factory_text("IVF4,SQ6", 300, 20) == "IVF4,SQ6"


def test_two_encoders_embed_what_one_embeds(place, tmp_path, monkeypatch):
    """As on two GPUs: a chunk each, written in the order of the corpus."""
    monkeypatch.setattr(retriever, "EMBED_ROWS", 64)
    build(place / "corpus.jsonl", str(place / "encoder"), tmp_path / "one", max_tokens=20)
    load = building.load_encoders
    monkeypatch.setattr(building, "load_encoders", lambda *a, **b: load(*a, **b) + load(*a, **b))
    build(place / "corpus.jsonl", str(place / "encoder"), tmp_path / "two", max_tokens=20)
    for name in ("embeddings.npy", "index.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_an_encoder_in_bfloat16_gives_nearly_the_same_vectors(place, tmp_path):
    for dtype in ("float32", "bfloat16"):
        build(place / "corpus.jsonl", str(place / "encoder"), tmp_path / dtype, dtype="float32",
              encoder_dtype=dtype)  # fmt: skip
    one, two = (np.load(tmp_path / d / "embeddings.npy") for d in ("float32", "bfloat16"))
    assert 0.999 < (one * two).sum(1).min() < 1


# ---- packed corpora, and builds that are killed ----


def test_a_packed_corpus_is_unpacked_once_beside_its_index(place, tmp_path, capsys):
    packed = tmp_path / "c.jsonl.gz"
    packed.write_bytes(gzip.compress((place / "corpus.jsonl").read_bytes()))
    out = tmp_path / "i"
    build(packed, str(place / "encoder"), out)
    assert f"search it with --corpus {out}/corpus.jsonl" in capsys.readouterr().out
    when = (out / "corpus.jsonl").stat().st_mtime_ns
    build(packed, str(place / "encoder"), out)
    assert (out / "corpus.jsonl").stat().st_mtime_ns == when
    assert len(Retriever.load(out / "corpus.jsonl", place / "encoder", index=out).corpus) == 300
    packed.write_bytes(gzip.compress(b'{"id": 1, "contents": "x"}\n'))
    build(packed, str(place / "encoder"), out)
    assert len(Lines(out / "corpus.jsonl")) == 1


def digests(folder: Path) -> dict[str, bytes]:
    """What must not depend on how often a build was killed."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())
            if path.name != ".rows.json" and path.name != ".corpus.json"}


def killed_builds(place: Path, out: Path, kind: str, moments: list[float]) -> int:
    """Build with small chunks, killed after these seconds and then finished; how many kills hit."""
    program = (
        "import sys, retriever; from pathlib import Path; from retrieval import build as b; "
        "retriever.EMBED_ROWS, b.SHARD_ROWS, b.ADD_ROWS = 16, 64, 16; "
        "b.build(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), kind=sys.argv[4])"
    )
    command = [sys.executable, "-c", program, place / "corpus.jsonl", place / "encoder", out, kind]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    num_hits = 0
    for seconds in (*moments, None):
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE)  # fmt: skip
        if seconds is not None:
            _wait_for_work(process, out, seconds)
            process.kill()
        text = process.communicate(timeout=300)[1].decode()
        num_hits += process.returncode == -signal.SIGKILL
        if seconds is None:
            assert process.returncode == 0, text
    return num_hits


def _wait_for_work(process: subprocess.Popen, out: Path, seconds: float) -> None:
    """Until the build writes (imports take seconds on a busy machine), and these seconds."""
    before = {path: path.stat().st_mtime_ns for path in out.glob("**/*")} if out.exists() else {}
    end = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < end:
        now = {p: p.stat().st_mtime_ns for p in out.glob("*") if p.exists()} if out.exists() else {}
        if now != before:
            break
        time.sleep(0.005)
    time.sleep(seconds)


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["flat", "sq8", "ivf", "ivfpq"])
def test_a_build_that_is_killed_ten_times_ends_with_the_same_files(place, tmp_path, kind):
    if kind not in ("flat", "sq8"):
        pytest.importorskip("faiss", reason="faiss is not installed (pip install faiss-cpu)")
    killed_builds(place, tmp_path / "whole", kind, [])
    draw = random.Random(os.urandom(4))
    moments = [draw.uniform(0, 0.4) for _ in range(10)]
    assert killed_builds(place, tmp_path / "killed", kind, moments) > 0
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole"), moments


def test_a_build_removes_what_a_killed_process_had_not_finished(place, tmp_path):
    out = tmp_path / "i"
    out.mkdir()
    (out / ".index.json.partial123").touch()
    build(place / "corpus.jsonl", str(place / "encoder"), out)
    assert not [*out.glob(".*.partial*")]


@pytest.mark.parametrize("death", ["train", "add", "merge", "write"])
def test_an_index_that_is_interrupted_in_any_stage_goes_on(place, tmp_path, monkeypatch, death):
    faiss = pytest.importorskip("faiss", reason="faiss is not installed (pip install faiss-cpu)")
    monkeypatch.setattr(building, "SHARD_ROWS", 64)
    arguments = place / "corpus.jsonl", str(place / "encoder")
    build(*arguments, tmp_path / "whole", kind="ivf")
    write, put_together, count = faiss.write_index, building.put_together, []

    def die(*things):
        count.append(1)
        if (death, len(count)) in (("train", 1), ("add", 3), ("write", 7)):
            raise KeyboardInterrupt
        return write(*things)

    def die_at_the_end(*things):
        put_together(*things)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(faiss, "write_index", die)
        if death == "merge":
            patch.setattr(building, "put_together", die_at_the_end)
        with pytest.raises(KeyboardInterrupt):
            build(*arguments, tmp_path / "parts", kind="ivf")
    with pytest.raises(FileNotFoundError, match="without .'index.faiss'."):
        Retriever.load(*arguments, index=tmp_path / "parts")
    build(*arguments, tmp_path / "parts", kind="ivf")
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")


# ---- BM25 ----


def test_bm25_finds_passages_by_their_words_and_needs_no_encoder(place, tmp_path):
    pytest.importorskip("bm25s", reason="bm25s is not installed (pip install bm25s)")
    contents = ["alpha beta", "beta gamma", "alpha beta", "delta", "gamma gamma gamma"]
    corpus = write_corpus(tmp_path / "c.jsonl", contents)
    build(corpus, "no encoder", tmp_path / "i", kind="bm25")
    loaded = Retriever.load(corpus, "no encoder", index=tmp_path / "i")
    queries = ["gamma", "alpha", "what is the", "nothing known", "alpha gamma"]
    results = found_ids(loaded.search(queries, 2))
    # Equal scores by row; a passage without a word of the query is not found.
    assert results[:4] == [["p4", "p1"], ["p0", "p2"], [], []] and len(results[4]) == 2
    assert len(loaded.search(["beta"], 9)[0]) == 3
    other = write_corpus(tmp_path / "other.jsonl", [*contents, "more"])
    with pytest.raises(ValueError, match="corpus_sha256"):
        Retriever.load(other, "no encoder", index=tmp_path / "i")


def test_scores_of_words_are_ordered_by_row_and_end_where_they_are_0(tmp_path, monkeypatch):
    """On a library that counts by hand, so that it runs where bm25s is not installed."""

    class ByHand:
        scores, vocab_dict = {"num_docs": 6}, {"red": 0, "blue": 1}
        load = classmethod(lambda cls, folder, mmap: cls())

        def get_scores(self, words: list[str]) -> np.ndarray:
            of_word = {"red": [0, 2, 1, 2, 0, 1], "blue": [0, 0, 0, 0, 3, 0]}
            return sum(np.array(of_word[word], np.float32) for word in words)

        @staticmethod
        def tokenize(texts: list[str], **_: object) -> list[list[str]]:
            return [text.split() for text in texts]

    ByHand.BM25 = ByHand
    monkeypatch.setattr(bm25, "library", lambda: ByHand)
    facts = {"corpus_sha256": "x", "done": 6}
    index = bm25.open_bm25(tmp_path, facts, 6, "x")
    scores, rows = index.search(["red", "blue", "green", "red blue green"], 3)
    assert rows.tolist() == [[1, 3, 2], [4, -1, -1], [-1, -1, -1], [4, 1, 3]]
    assert scores[0].tolist() == [2, 2, 1] and scores[3].tolist() == [3, 2, 2]
    assert index.search(["red"], 99)[1].tolist() == [[1, 3, 2, 5, -1, -1]]
    for wrong in ({**facts, "corpus_sha256": "y"}, {**facts, "done": 5}):
        with pytest.raises(ValueError, match="build it again"):
            bm25.open_bm25(tmp_path, wrong, 6, "x")


def test_bm25s_that_is_not_installed_is_asked_for(place, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(ImportError, match="pip install bm25s"):
        build(place / "corpus.jsonl", "", tmp_path / "i", kind="bm25")
    with pytest.raises(ImportError, match="pip install bm25s"):
        bm25.Bm25Index(tmp_path)


# ---- compare ----


def test_recall_is_the_share_of_the_exact_ones_that_were_found():
    found, exact = np.array([[3, 1, 2], [9, 8, 7]]), np.array([[1, 3, 4], [9, 8, 7]])
    shares = compare.recalls(found, exact)
    assert shares == {1: 0.5, 3: pytest.approx(5 / 6), 10: pytest.approx(5 / 6)}


def test_compare_prints_what_an_index_misses_takes_and_holds(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compare, "REPEATS", 1)
    for kind in ("sq8", "flat"):
        build(place / "corpus.jsonl", str(place / "encoder"), tmp_path / kind, kind=kind)
    questions = tmp_path / "q.jsonl"
    rows = [{"id": i, "question": text, "golden_answers": ["x"]} for i, text in enumerate(WORDS)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = Retriever.load(place / "corpus.jsonl", place / "encoder", index=tmp_path / "sq8")
    capsys.readouterr()
    compare.compare(loaded, tmp_path / "sq8", questions, tmp_path / "flat", 10)
    text = capsys.readouterr().out
    assert "300 passages" in text and "10 queries" in text and "@1 " in text
    assert "ms a query at 10" in text and "GiB resident" in text
    with pytest.raises(ValueError, match="give --exact DIR"):
        compare.compare(loaded, tmp_path / "sq8", questions, None, None)


# ---- the server ----


class Shelf:
    """A retriever whose passages name the query; it can be slow, or fail."""

    def __init__(self) -> None:
        self.batches, self.wait_s, self.corpus, self.index = [], 0.0, range(7), TorchIndex
        self.fails = False

    def search(self, queries: list[str], top_k: int) -> list[list[Passage]]:
        self.batches.append(list(queries))
        time.sleep(self.wait_s)
        if self.fails:
            raise RuntimeError("the disk is away")
        return [[Passage(str(i), f'"T{i}"', f"{q} {i}", 0.5 / (i + 1)) for i in range(top_k)]
                for q in queries]  # fmt: skip


class Door:
    """A server on a free port."""

    def __init__(self, engine: object, port: int = 0, **options: object) -> None:
        self.server = serve.open_server(engine, "127.0.0.1", port, **options)
        self.port = self.server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()

    def ask(self, body: object, path: str = "/retrieve") -> tuple[int, dict]:
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        try:
            with urllib.request.urlopen(self.url + path, data, timeout=30) as reply:
                text = reply.read().decode()
                return reply.status, json.loads(text) if text.startswith("{") else text
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


@pytest.fixture
def door(shelf) -> Iterator[Door]:
    opened = Door(shelf, max_queries=600, max_body=2**20, read_s=1.0, timeout_s=5.0)
    yield opened
    opened.server.stop(1.0)


def test_search_r1_s_request_is_answered_as_search_r1_s_server_answers_it(door):
    """The body of Search-R1's generation.py, and what it reads from the reply."""
    status, reply = door.ask({"queries": ["a", "b"], "topk": 2, "return_scores": True})
    assert status == 200 and list(reply) == ["result"]
    assert reply["result"][1] == [
        {"document": {"id": "0", "contents": '"T0"\nb 0'}, "score": 0.5},
        {"document": {"id": "1", "contents": '"T1"\nb 1'}, "score": 0.25},
    ]
    content = reply["result"][0][0]["document"]["contents"]
    assert (content.split("\n")[0], "\n".join(content.split("\n")[1:])) == ('"T0"', "a 0")
    bare = {"id": "0", "contents": '"T0"\na 0'}
    without = {"queries": ["a"], "topk": 1, "return_scores": False}
    assert door.ask(without)[1] == {"result": [[bare]]}
    assert door.ask({"queries": ["a"], "topk": None})[1]["result"][0][2]["id"] == "2"  # of --top-k
    assert door.ask({"queries": []}) == (200, {"result": []})


def test_health_and_metrics_say_how_it_goes(door, shelf):
    door.ask({"queries": ["a", "b"]})
    door.ask({"queries": [3]})
    status, reply = door.ask(None, "/health")
    assert (status, reply["status"], reply["passages"]) == (200, "ok", 7)
    text = door.ask(None, "/metrics")[1]
    for line in ('retriever_answers_total{status="200"} 2',
                 'retriever_answers_total{status="400"} 1',
                 "retriever_queries_total 2", "retriever_searches_total 1"):  # fmt: skip
        assert line in text.splitlines(), text


WRONG = [
    (b"{", 400, "no JSON"), (b"[" * 100_000, 400, "no JSON"), (b"\xff", 400, "no JSON"),
    (b"[]", 400, "expected an object with queries"), (b"{}", 400, "queries"),
    (b'{"queries": "a"}', 400, "queries"), (b'{"queries": [null]}', 400, "expected texts"),
    (json.dumps({"queries": ["x" * 20_001]}).encode(), 400, "20000 characters"),
    (json.dumps({"queries": ["x"] * 601}).encode(), 400, "at most 600"),
    (b'{"queries": ["a"], "topk": 0}', 400, "topk"),
    (b'{"queries": ["a"], "topk": true}', 400, "topk"),
    (b'{"queries": ["a"], "topk": 2.5}', 400, "topk"),
    (b'{"queries": ["a"], "topk": 1001}', 400, "topk"),
    (b'{"queries": ["a"], "return_scores": 1}', 400, "return_scores"),
    (b" " * (2**20 + 1), 413, "Content-Length"), (b" " * 2**24, 413, "Content-Length"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "status", "message"), WRONG)
def test_what_is_no_request_is_refused_with_its_reason_and_the_server_lives(
    door, body, status, message
):
    got, reply = door.ask(body)
    assert got == status and message in reply["error"]
    assert door.ask({"queries": ["a"]})[0] == 200


def test_other_paths_methods_and_lengths_are_refused(door):
    assert door.ask({"queries": []}, "/search")[0] == 404
    assert door.ask(None, "/retrieve")[0] == 405
    for head, status in ((b"POST /retrieve HTTP/1.1\r\n\r\n", 411), (b"nonsense\r\n\r\n", 400),
                         (b"POST /retrieve HTTP/1.1\r\nContent-Length: -5\r\n\r\n", 411),
                         (b"DELETE /retrieve HTTP/1.1\r\n\r\n", 501)):  # fmt: skip
        assert raw(door, head).startswith(b"HTTP/1.1 %d" % status), head
    assert door.ask({"queries": ["a"]})[0] == 200


def raw(door: Door, sent: bytes, *, then: bytes = b"", wait_s: float = 0.0) -> bytes:
    with socket.create_connection(("127.0.0.1", door.port), timeout=10) as client:
        client.sendall(sent)
        for byte in then:
            time.sleep(wait_s)
            try:
                client.sendall(bytes([byte]))
            except OSError:
                break
        answer = b""
        while part := client.recv(4096):
            answer += part
        return answer


def test_a_slow_client_gets_a_408_and_holds_up_nobody(door):
    head = b"POST /retrieve HTTP/1.1\r\nContent-Length: 50\r\n\r\n"
    with ThreadPoolExecutor(3) as pool:
        silent = pool.submit(raw, door, head + b"{")
        dripping = pool.submit(raw, door, head, then=b"{" * 20, wait_s=0.2)
        header = pool.submit(raw, door, b"POST /retri", then=b"e" * 20, wait_s=0.2)
        started = time.perf_counter()
        assert door.ask({"queries": ["a"]})[0] == 200
        assert time.perf_counter() - started < 1.0
        for client in (silent, dripping, header):
            assert client.result(timeout=20).startswith(b"HTTP/1.1 408"), client.result()


def test_clients_that_hang_up_at_any_moment_do_no_harm(door, shelf, capfd):
    body = json.dumps({"queries": ["a"], "topk": 1000}).encode()
    request = b"POST /retrieve HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    for end in (0, 5, 30, len(request) - 3, len(request)):
        with socket.create_connection(("127.0.0.1", door.port)) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset
            client.sendall(request[:end])
    assert door.ask({"queries": ["a"]})[0] == 200
    assert "Traceback" not in capfd.readouterr().err
    wait_until(lambda: not door.server.handlers)


def wait_until(is_true, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_requests_that_wait_together_are_searched_together_and_get_their_own(door, shelf):
    shelf.wait_s = 0.3
    jobs = [{"queries": [f"{i}a", f"{i}b"][: 1 + i % 2], "topk": 1 + i % 3} for i in range(30)]
    with ThreadPoolExecutor(30) as pool:
        replies = list(pool.map(door.ask, jobs))
    assert len(shelf.batches) <= 8
    for job, (status, reply) in zip(jobs, replies, strict=True):
        assert status == 200
        wanted = [[f"{q} {k}" for k in range(job["topk"])] for q in job["queries"]]
        assert [[d["contents"].split("\n")[1] for d in one] for one in reply["result"]] == wanted


def test_a_search_that_fails_or_takes_too_long_is_an_error_with_its_reason(shelf):
    door = Door(shelf, timeout_s=0.3)
    shelf.fails = True
    assert door.ask({"queries": ["a"]}) == (500, {"error": "the disk is away"})
    shelf.fails, shelf.wait_s = False, 1.0
    status, reply = door.ask({"queries": ["a"]})
    assert status == 503 and "within 0.3 s" in reply["error"]
    shelf.wait_s = 0.0
    wait_until(lambda: door.ask({"queries": ["a"]})[0] == 200)
    door.server.stop(1.0)


def test_a_search_longer_than_the_time_for_reading_is_answered(shelf):
    door = Door(shelf, read_s=0.3)
    shelf.wait_s = 1.0
    head = b"POST /retrieve HTTP/1.1\r\nConnection: close\r\nContent-Length: 18\r\n\r\n"
    answer = raw(door, head + b'{"queries": ["a"]}')
    assert answer.startswith(b"HTTP/1.1 200") and b"a 0" in answer
    client = http.client.HTTPConnection("127.0.0.1", door.port, timeout=10)
    for _ in range(2):  # the connection outlives a long search
        client.request("POST", "/retrieve", b'{"queries": ["a"]}')
        reply = client.getresponse()
        assert reply.status == 200 and reply.read()
    door.server.stop(1.0)


def test_too_many_queries_and_connections_are_sent_away(shelf, monkeypatch):
    monkeypatch.setattr(serve, "MAX_WAITING", 1)
    batcher = serve.Batcher(shelf.search)
    with pytest.raises(Refused, match="ask again later") as caught:
        batcher.ask(["a", "b"], 1, 1.0)
    assert caught.value.status == 503
    door = Door(shelf, max_connections=1)
    with socket.create_connection(("127.0.0.1", door.port)):
        wait_until(lambda: door.server.handlers)
        assert raw(door, b"").startswith(b"HTTP/1.1 503")
    wait_until(lambda: not door.server.handlers)
    assert door.ask({"queries": ["a"]})[0] == 200
    door.server.stop(1.0)


def test_a_connection_may_bring_several_requests(door):
    client = http.client.HTTPConnection("127.0.0.1", door.port, timeout=10)
    for i in range(3):
        client.request("POST", "/retrieve", json.dumps({"queries": [str(i)], "topk": 1}))
        assert f"{i} 0" in client.getresponse().read().decode()
    client.close()


def test_a_thousand_requests_at_once_are_answered(door, shelf):
    """Each from a client of its own, as 1,000 processes would; batches make it fast."""
    shelf.wait_s = 0.02
    body = json.dumps({"queries": ["a"], "topk": 1}).encode()
    request = b"POST /retrieve HTTP/1.0\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    clients = [socket.create_connection(("127.0.0.1", door.port), 30) for _ in range(1000)]
    for client in clients:
        client.sendall(request)
    for client in clients:
        assert client.recv(12) == b"HTTP/1.1 200"
        client.close()
    assert len(shelf.batches) < 300


@pytest.mark.slow
def test_the_program_serves_and_stops_when_it_is_asked(place, tmp_path):
    command = [sys.executable, ROOT / "retriever.py", "serve", "--corpus", place / "corpus.jsonl"]
    command += ["--encoder", place / "encoder", "--port", "0"]
    process = subprocess.Popen([*command[:-1], str(free_port())], text=True, cwd=tmp_path,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    address = process.stdout.readline().split()[0]
    body = b'{"queries": ["amber"], "topk": 1}'
    with urllib.request.urlopen(address, body, timeout=300) as reply:
        assert len(json.load(reply)["result"][0]) == 1
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=300) == 0 and "Traceback" not in process.stderr.read()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# ---- its client ----


def test_a_served_index_finds_the_passages_and_scores_of_the_index_itself(place):
    loaded = Retriever.load(place / "corpus.jsonl", place / "encoder")
    door = Door(loaded)
    asked = RemoteRetriever(f"{door.url}/, {door.url}/retrieve", timeout_s=20)
    queries = ["amber", "kelp \ud800", "amber", ""]
    assert asked.search(queries, 4) == loaded.search(queries, 4) and asked.search([], 3) == []
    with pytest.raises(ValueError, match="400 .*topk"):  # it says why, and is not asked again
        asked.search(["a"], 5000)
    with pytest.raises(ValueError, match="got a retriever behind http"):
        len(asked.corpus)
    door.server.stop(1.0)


def test_more_queries_than_a_server_takes_are_asked_in_parts(shelf, monkeypatch):
    monkeypatch.setattr(remote, "MAX_QUERIES", 3)
    door = Door(shelf, max_queries=3)
    asked = RemoteRetriever(door.url, timeout_s=20)
    found = asked.search([*"abcdefgabc"], 1)
    assert [one[0].text for one in found] == [f"{letter} 0" for letter in "abcdefgabc"]
    door.server.stop(1.0)


def test_replicas_are_asked_in_turn_and_one_that_is_away_is_passed_over(shelf, monkeypatch):
    doors = [Door(shelf), Door(shelf)]
    asked = RemoteRetriever(",".join(door.url for door in doors), timeout_s=20)
    doors[0].server.stop(1.0)
    assert asked.search(["a"], 1)[0][0].text == "a 0" and not asked.is_away
    started = time.monotonic()
    assert asked.search(["b"], 1) and time.monotonic() - started < 1.0  # it remembers which answers
    doors[1].server.stop(1.0)


def test_a_retriever_that_stays_away_is_given_up_and_one_that_comes_back_is_found(
    shelf, monkeypatch
):
    pauses, real = [], time.sleep
    monkeypatch.setattr(remote.time, "sleep", lambda s: pauses.append(s) or real(min(s, 0.01)))
    door = Door(shelf)
    asked = RemoteRetriever(door.url, timeout_s=1.0)
    door.server.stop(1.0)
    pauses.clear()
    with pytest.raises(ConnectionError, match=r"--index: got http://127.* tries, expected"):
        asked.search(["a"], 1)
    assert len(pauses) >= 3 and pauses[1] == 2 * pauses[0]  # it waits longer each time
    pauses.clear()
    with pytest.raises(ConnectionError, match="after 1 tries"):  # now known to be away
        asked.search(["a"], 1)
    asked.addresses = [Door(shelf).url + "/retrieve"]
    assert asked.search(["a"], 1) and not asked.is_away


def test_answers_that_are_none_are_asked_again(monkeypatch):
    answers = iter([b"no json", b"{}", b'{"result": []}', b'{"result": [[{"document": 3}]]}',
                    b'{"result": [[{"document": {"id": 1, "contents": "x"}, "score": 1}]]}'])

    class Reply:
        __enter__, __exit__ = lambda self: self, lambda self, *_: None
        read = lambda self: next(answers)  # noqa: E731

    monkeypatch.setattr(remote.urllib.request, "urlopen", lambda *a, **b: Reply())
    monkeypatch.setattr(remote.time, "sleep", lambda s: None)
    asked = RemoteRetriever("http://x", timeout_s=20)
    assert next(answers, None) is None and asked.turn == 4
    with pytest.raises(ValueError, match="expected addresses such as"):
        RemoteRetriever("ftp://x", timeout_s=1)


def test_no_server_at_the_start_is_one_message():
    with pytest.raises(ConnectionError, match="--index: got http://127.0.0.1:9/retrieve: "):
        RemoteRetriever("http://127.0.0.1:9", timeout_s=0.3)


# ---- programs that search a served index ----


def test_episodes_of_a_served_index_are_those_of_the_index_itself(place, tokenizer):
    """Token for token."""
    loaded = Retriever.load(place / "corpus.jsonl", place / "encoder")
    door = Door(loaded)
    scripts = {
        "one": "<search> amber </search>", "two": "<search>kelp lagoon</search>",
        "three": "<search> nothing, really </search>",
    }  # fmt: skip
    ids = []
    for engine in (loaded, RemoteRetriever(door.url, timeout_s=20)):
        episodes = play(tokenizer, scripts, engine)
        assert all(episode.num_searches for episode in episodes.values())
        ids.append({name: episode.ids for name, episode in episodes.items()})
    assert ids[0] == ids[1]
    door.server.stop(1.0)


def test_a_run_whose_served_index_stays_away_ends_with_a_state_and_goes_on_from_it(
    mini, tmp_path, monkeypatch
):
    loaded, real, calls = Retriever.load(mini / "corpus.jsonl", mini / "encoder"), [], []
    real, door = sampling.generate, Door(loaded)
    flags = ["--phase", "dgpo", "--index", door.url, "--steps", "3", "--save-every", "0",
             "--eval-every", "0", "--search-timeout-s", "0.5"]  # fmt: skip
    dies_at = 99

    def generate(policy, engine, questions, *arguments, **options):
        """The student of this world writes no query, so each episode asks one here."""
        calls.append(1)
        if len(calls) == dies_at:
            door.server.stop(1.0)
        episodes = real(policy, engine, questions, *arguments, **options)
        for episode in episodes:
            try:
                assert engine.search([episode.question.question], 1)[0]
            except ConnectionError:
                episode.status = "search_error"
        return episodes

    monkeypatch.setattr(sampling, "generate", generate)
    whole = run(mini, tmp_path / "whole", *flags)
    calls.clear()
    dies_at = 2
    message = "failed in 8 of 8 episodes.* the state after step 1 is saved; mend it, .*--resume"
    with pytest.raises(Stop, match=message):
        run(mini, tmp_path / "run", *flags)
    assert newest_state(tmp_path / "run")[0].name == "step_000001"
    with pytest.raises(ConnectionError, match="--index: got http"):
        run(mini, tmp_path / "run", *flags, "--resume")
    door = Door(loaded, int(door.port))
    dies_at = 99
    assert run(mini, tmp_path / "run", *flags, "--resume") == whole
    door.server.stop(1.0)


@pytest.mark.parametrize("program", ["train", "eval", "ask", "qagent"])
def test_every_program_takes_an_address_in_the_place_of_an_index(program, mini, shelf):
    """Its paths are checked, and its retriever opened, as the programs do it."""
    import eval as evaluation
    import qagent
    from infra import cli
    from infra.checks import check_asked
    from infra.programs import check_paths
    from serving import ask
    from settings import TrainSettings

    door = Door(shelf)
    cls = {"train": TrainSettings, "eval": evaluation.EvalSettings, "ask": ask.AskSettings,
           "qagent": qagent.SearchSettings}[program]  # fmt: skip
    argv = ["--config", str(mini / "mini.toml")] if program == "train" else ["--config", "none"]
    models = {"train": (), "ask": ("--question", "x")}.get(program, ())
    if program != "train":
        models += ("--model", str(mini / "student"), "--corpus", str(mini / "corpus.jsonl"),
                   "--encoder", str(mini / "encoder"))  # fmt: skip
    if program in ("eval", "qagent"):
        models += ("--questions", str(mini / "questions.jsonl"))
    settings = cli.load(cls, [*argv, *models, "--index", door.url], prog=f"{program}.py",
                        description="")  # fmt: skip
    check_paths(settings)
    if program == "train":
        settings.corpus = settings.encoder = ""
        check_asked(settings)  # neither is needed
    assert isinstance(retriever.open_retriever(settings), RemoteRetriever)
    door.server.stop(1.0)
