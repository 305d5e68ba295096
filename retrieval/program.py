"""`python retriever.py COMMAND`: build, search, compare, serve, convert."""

import argparse
from pathlib import Path

from formats.corpora import convert
from formats.indexes import FaissIndex
from infra.cli import Parser, reporting
from infra.config import is_remote
from infra.parallel import pick_device
from infra.programs import check_path, count
from retrieval.build import KINDS, build
from retriever import WORLD, Retriever

DTYPES = ("float32", "bfloat16", "float16")


def make_parser() -> Parser:
    parser = Parser("retriever.py", description="Passages: build an index, search it, serve it.")
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("build", help="embed a corpus, and index what is embedded")
    search = commands.add_parser("search", help="print the passages for queries")
    versus = commands.add_parser("compare", help="an index beside the exact search of its vectors")
    serve = commands.add_parser("serve", help="answer Search-R1's POST /retrieve")
    plain = commands.add_parser("convert", help="write a corpus of another format as JSON lines")
    plain.add_argument("--corpus", type=Path, required=True, help="gz, bz2, xz, tsv, parquet, ...")
    plain.add_argument("--out", type=Path, required=True, help="new file")
    for command in (make, search, versus, serve):
        command.add_argument("--corpus", type=Path, default=WORLD / "corpus.jsonl")
        command.add_argument("--encoder", default=str(WORLD / "encoder"), help="folder or model id")
        command.add_argument("--device", default="cpu", help="cpu, cuda (to build: every GPU), "
                             "cuda:N or mps")
        for kind in ("query", "passage"):
            command.add_argument(f"--{kind}-prefix", help=f"before each {kind}; default: the "
                                 "encoder's own")
        command.add_argument("--max-tokens", type=int, help="of a text; default: as many as the "
                             "encoder's folder says, or as the index was built with")
    make.add_argument("--out", type=Path, required=True, help="folder of the index")
    make.add_argument("--kind", default="flat", metavar="|".join(KINDS), help="what is searched; "
                      "or a text for faiss.index_factory (IVF4096,SQ6)")
    make.add_argument("--dtype", choices=("float16", "float32", "int8"), default="float16",
                      help="of the stored vectors; sq8: int8")
    make.add_argument("--encoder-dtype", choices=DTYPES, help="of the encoder; default: float32, "
                      "on a GPU float16")
    make.add_argument("--batch-size", type=count, default=64, help="passages at once")
    for command in (search, versus, serve):
        command.add_argument("--index", type=Path, required=command is versus,
                             help="folder, or faiss file; default: embed now")
        command.add_argument("--nprobe", type=count, help="lists that an IVF searches; default: "
                             "as its file says")
        command.add_argument("--full-hash", dest="is_known", action="store_false",
                             help="read all of the corpus, in place of size, time and a sample")
    for command in (search, serve):
        command.add_argument("--backend", choices=("auto", "torch", "faiss"), default="auto",
                             help="torch: the exact search, whatever the kind")
        command.add_argument("--top-k", type=count, default=3, help="passages a query")
    search.add_argument("queries", nargs="+")
    versus.add_argument("--questions", type=Path, required=True, help="JSON lines: the queries")
    versus.add_argument("--exact", type=Path, help="folder whose vectors are searched exactly; "
                        "default: the index's own")
    versus.add_argument("--limit", type=count, help="only the first questions")
    add_serving(serve)
    return parser


def add_serving(serve: argparse.ArgumentParser) -> None:
    serve.add_argument("--host", default="127.0.0.1", help="0.0.0.0 opens the door to other "
                       "machines, without a password")
    serve.add_argument("--port", type=count, default=8000)
    serve.add_argument("--max-queries", type=count, default=1024, help="queries of a request")
    serve.add_argument("--timeout-s", type=float, default=60.0, help="a search that takes longer "
                       "has failed")


def main(argv: list[str]) -> None:
    options = vars(make_parser().parse_args(argv))
    with reporting("retriever.py"):
        check_path(str(options["corpus"]), "FILE", "--corpus")
        if (command := options.pop("command")) == "convert":
            return convert(**options)
        options["device"] = pick_device(options["device"])
        options["prefixes"] = {kind: options.pop(f"{kind}_prefix") for kind in ("query", "passage")}
        if not is_remote(options["encoder"]) and options.get("kind") != "bm25":
            check_path(options["encoder"], "DIR", "--encoder")
        if options.get("index"):
            check_path(str(options["index"]), "PATH", "--index")
        if options.get("exact"):
            check_path(str(options["exact"]), "PATH", "--exact")
        if command == "build":
            return build(**options)
        own = ("queries", "top_k", "questions", "exact", "limit", "host", "port", "max_queries",
               "timeout_s", "nprobe")
        mine = {name: options.pop(name) for name in own if name in options}
        retriever = Retriever.load(**options)
        if (nprobe := mine.pop("nprobe")) is not None:
            set_nprobe(retriever, nprobe)
        if command == "search":
            return print_passages(retriever, **mine)
        if command == "compare":
            from retrieval.compare import compare

            return compare(retriever, options["index"], **mine)
        from retrieval.serve import run_server

        run_server(retriever, **mine)


def set_nprobe(retriever: Retriever, nprobe: int) -> None:
    if not isinstance(retriever.index, FaissIndex):
        raise ValueError(f"--nprobe {nprobe}: got an index of kind {retriever.index.kind}, "
                         "expected one with lists (IVF); drop it")
    retriever.index.probe(nprobe)


def print_passages(retriever: Retriever, queries: list[str], top_k: int) -> None:
    for query, passages in zip(queries, retriever.search(queries, top_k), strict=True):
        print(f"\n{query}")
        for passage in passages:
            print(f"{passage.score:.4f}  [{passage.id}] {passage.name}: {passage.text}")


