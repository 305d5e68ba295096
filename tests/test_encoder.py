"""Folders of published passage encoders: prefixes, pooling, layers after it, length of a text.

The networks are small and random. What is expected is written down as a formula over their states.
One test compares with sentence-transformers where that is installed.

Run: python -m pytest tests/test_encoder.py
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models, pre_tokenizers, processors

from encoder import Encoder, pool
from infra.files import resolve
from model import load_encoder
from weights import save_tensors
from world.pretrain import new_decoder, randomize

TOLERANCE = 1e-5  # fp32, components of vectors of length about 1, in another order of summation
COSINE_TOLERANCE = 1e-5  # of the same vector from two programs
WIDTH = 16
SIZES = {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 2, "max_position_embeddings": 48}  # fmt: skip
BERT = SIZES | {"model_type": "bert", "hidden_act": "gelu", "type_vocab_size": 2,
                "pad_token_id": 0, "architectures": ["BertModel"]}  # fmt: skip
XLM_ROBERTA = BERT | {"model_type": "xlm-roberta", "type_vocab_size": 1, "pad_token_id": 1,
                      "bos_token_id": 0, "eos_token_id": 2, "max_position_embeddings": 50,
                      "layer_norm_eps": 1e-5, "architectures": ["XLMRobertaModel"]}  # fmt: skip
QWEN3 = SIZES | {"model_type": "qwen3", "num_key_value_heads": 1, "head_dim": 8,
                 "rms_norm_eps": 1e-6, "rope_theta": 1e4, "hidden_act": "silu",
                 "tie_word_embeddings": False, "architectures": ["Qwen3Model"]}  # fmt: skip
NETWORKS = {"bert": BERT, "xlm-roberta": XLM_ROBERTA, "qwen3": QWEN3}
# What stands around a text; the first words of the vocabulary, so that pad has its usual id.
SPECIAL = {"bert": ["[PAD]", "[CLS]", "[SEP]", "[UNK]"], "xlm-roberta": ["<s>", "<pad>", "</s>",
           "<unk>"], "qwen3": ["<|endoftext|>", "<unk>"]}  # fmt: skip
AROUND = {"bert": "[CLS] $A [SEP]", "xlm-roberta": "<s> $A </s>", "qwen3": "$A <|endoftext|>"}
WORDS = ["the", "hat", "of", "a", "man", "who", "sings", "query", "passage", ":", "Hat"]
TEXTS = ["the hat", "a man who sings the hat of the man", "hat", "who sings : a hat"]


def write_tokenizer(folder: Path, family: str) -> int:
    """tokenizer.json of a few words; returns the size of the vocabulary."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL[family], *WORDS])}
    unknown = [word for word in vocabulary if "unk" in word.lower()][0]
    raw = RawTokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [(word, vocabulary[word]) for word in SPECIAL[family]]
    raw.post_processor = processors.TemplateProcessing(
        single=AROUND[family], special_tokens=special
    )
    raw.add_special_tokens(SPECIAL[family])
    folder.mkdir(parents=True, exist_ok=True)
    raw.save(str(folder / "tokenizer.json"))
    pad = [word for word in vocabulary if "pad" in word.lower() or "endoftext" in word][0]
    write(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast",
                                             "pad_token": pad, "unk_token": unknown})  # fmt: skip
    return len(vocabulary)


def write(path: Path, document: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))


def write_network(folder: Path, family: str = "bert", **changes: object) -> Path:
    """config.json, the weights under their public names, and the tokenizer."""
    config = {**NETWORKS[family], "vocab_size": write_tokenizer(folder, family), **changes}
    if family == "qwen3":
        network = new_decoder(config, 0)
    else:
        tokenizer = RawTokenizer.from_file(str(folder / "tokenizer.json"))
        network = randomize(Encoder(config, tokenizer, {"query": "", "passage": ""}), 0)
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():  # large enough for every part to matter
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    state = network.state_dict()
    if family == "qwen3":  # saved without its head, as published embedding decoders are
        state = {k.removeprefix("model."): v for k, v in state.items() if k != "lm_head.weight"}
    save_tensors(folder, config, state)
    return folder


def write_modules(
    folder: Path, pooling: dict, *, dense: dict | None = None, normalize: bool = True,
    similarity: str | None = None, prompts: dict | None = None, newer: bool = False,
    default_prompt_name: str | None = None,
) -> Path:  # fmt: skip
    """modules.json and its folders; newer: the names of classes since version 5.5."""
    kinds = ["Transformer", "Pooling"] + ["Dense"] * bool(dense) + ["Normalize"] * normalize
    rooms = {"Transformer": "base.modules.transformer", "Dense": "base.modules.dense",
             "Pooling": "sentence_transformer.modules.pooling",
             "Normalize": "base.modules.normalize"}  # fmt: skip
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "",
         "type": f"sentence_transformers.{rooms[kind] if newer else 'models'}.{kind}"}
        for i, kind in enumerate(kinds)
    ]  # fmt: skip
    write(folder / "modules.json", modules)
    write(folder / "1_Pooling/config.json", {"word_embedding_dimension": WIDTH, **pooling})
    if dense:
        activation = "torch.nn.modules.activation.Tanh"
        config = {"in_features": WIDTH, "out_features": 6, "bias": True,
                  "activation_function": activation, **dense}  # fmt: skip
        write(folder / "2_Dense/config.json", config)
        generator = torch.Generator().manual_seed(2)
        tensors = {"linear.weight": torch.randn(6, WIDTH, generator=generator),
                   "linear.bias": torch.randn(6, generator=generator)}  # fmt: skip
        save_file(tensors, folder / "2_Dense/model.safetensors")
    write(folder / "config_sentence_transformers.json", {
        "prompts": prompts or {}, "default_prompt_name": default_prompt_name,
        "similarity_fn_name": similarity})  # fmt: skip
    return folder


def older(mode: str) -> dict:
    """The boolean keys of a 1_Pooling/config.json, with one that is true."""
    keys = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens",
            "mean_sqrt_len_tokens": "mean_sqrt_len_tokens", "lasttoken": "lasttoken",
            "weightedmean": "weightedmean_tokens"}  # fmt: skip
    return {f"pooling_mode_{key}": name == mode for name, key in keys.items()}


POOLED = {  # over the states [T, D] of one text
    "cls": lambda x: x[0],
    "mean": lambda x: x.mean(0),
    "max": lambda x: x.amax(0),
    "lasttoken": lambda x: x[-1],
    "mean_sqrt_len_tokens": lambda x: x.sum(0) / len(x) ** 0.5,
    "weightedmean": lambda x: sum((i + 1) * row for i, row in enumerate(x))
    / sum(range(1, len(x) + 1)),
}


# ---- R1: prefixes ----


E5 = {"query": "query: ", "passage": "passage: "}
NONE = {"query": "", "passage": ""}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("e5-base-v2", E5), ("multilingual-e5-small", E5), ("my_E5_tuned", E5),
        ("multilingual-e5-large-instruct", NONE), ("stage5-bge", NONE), ("mode5", NONE),
        ("9e5b0a", NONE), ("all-MiniLM-L6-v2", NONE),
    ],
)  # fmt: skip
def test_r1_e5_is_known_by_a_word_of_its_name(tmp_path, name, expected):
    """Only E5 without instructions has these prefixes, and three letters may stand in any name."""
    assert load_encoder(write_network(tmp_path / name)).prefixes == expected


@pytest.mark.parametrize("revision", ["1c644c92ad3ba1efdad3f1451a637716616a20e8", "e5" * 20])
@pytest.mark.parametrize(("name", "expected"), [("e5-base-v2", E5), ("bge-base-en", NONE)])
def test_r1_prefixes_come_from_the_id_and_never_from_the_hash_of_a_revision(
    tmp_path, monkeypatch, revision, name, expected
):
    """A downloaded id lies in a folder that is named by a hash, in which "e5" may stand."""
    snapshot = tmp_path / f"models--org--{name}/snapshots/{revision}"
    write_network(snapshot)
    assert load_encoder(snapshot).prefixes == expected  # a path into the cache of downloads
    assert load_encoder(f"{snapshot}/").prefixes == expected
    bare = tmp_path / "blobs" / revision
    shutil.copytree(snapshot, bare)
    monkeypatch.setattr("encoder.resolve", lambda path: bare if "/" in str(path) else resolve(path))
    assert load_encoder(f"org/{name}").prefixes == expected


def test_r1_a_checkpoint_trained_from_e5_keeps_its_prefixes_whatever_its_folder_is_called(
    tmp_path, monkeypatch
):
    trained = write_network(tmp_path / "encoder", _name_or_path="intfloat/e5-base-v2")
    assert load_encoder(trained).prefixes == E5
    link = tmp_path / "linked"
    link.symlink_to(write_network(tmp_path / "e5-small"))
    assert load_encoder(link).prefixes == E5
    monkeypatch.chdir(tmp_path / "e5-small")
    assert load_encoder(".").prefixes == E5


def test_r1_given_prefixes_replace_the_folders_one_by_one(tmp_path):
    folder = write_network(tmp_path / "e5-base")
    given = {"query": "", "passage": None}
    encoder = load_encoder(folder, prefixes=given)
    assert encoder.prefixes == {"query": "", "passage": "passage: "}
    assert "prefixes query \"\", passage \"passage: \", 48 tokens" in str(encoder)
    assert "by its name" in str(load_encoder(folder))


# ---- R2: folders of sentence-transformers ----


@pytest.mark.parametrize("family", NETWORKS)
@pytest.mark.parametrize(("mode", "newer"), [*zip(POOLED, [False, True] * 3, strict=True)])
def test_r2_the_pooling_of_the_folder_is_honoured(tmp_path, family, mode, newer):
    folder = write_network(tmp_path / "x", family)
    pooling = {"pooling_mode": mode} if newer else older(mode)
    write_modules(folder, pooling, normalize=False, similarity="dot", newer=newer)
    encoder = load_encoder(folder)
    assert encoder.pooling == mode and f"pooling {mode}, not normalised" in str(encoder)
    with torch.no_grad():
        expected = [POOLED[mode](states(encoder, text)) for text in TEXTS]
    torch.testing.assert_close(
        encoder.embed(TEXTS, kind="query", batch_size=3), torch.stack(expected),
        atol=TOLERANCE, rtol=TOLERANCE,
    )  # fmt: skip


def states(encoder: Encoder, text: str) -> torch.Tensor:
    """[T, D] before pooling, of a text alone."""
    ids, valid_mask = encoder.encode([text])
    if encoder.decoder is not None:
        return encoder.decoder.hidden(ids)[0]
    first = encoder.first_position
    parts = encoder.embeddings
    x = parts["word_embeddings"](ids)
    x = x + parts["position_embeddings"].weight[first : first + ids.shape[1]]
    x = parts["LayerNorm"](x + parts["token_type_embeddings"].weight[0])
    for layer in encoder.encoder["layer"]:
        x = layer(x, valid_mask[:, None, None])
    return x[0]


def test_r2_the_position_of_a_text_in_a_batch_and_padding_do_not_count():
    x = torch.arange(24.0).view(2, 4, 3)
    valid_mask = torch.tensor([[True, True, False, False], [True] * 4])
    spoilt = x.clone()
    spoilt[0, 2:] = torch.nan
    for mode, formula in POOLED.items():
        got = pool(spoilt, valid_mask, mode)
        expected = torch.stack([formula(x[0, :2]), formula(x[1])])
        torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=0, msg=mode)


@pytest.mark.parametrize(("activation", "function"), [
    ("torch.nn.modules.activation.Tanh", torch.tanh),
    ("torch.nn.modules.linear.Identity", lambda x: x),
])  # fmt: skip
def test_r2_a_dense_layer_and_the_norm_follow_the_pooling(tmp_path, activation, function):
    folder = write_modules(write_network(tmp_path / "x"), older("cls"),
                           dense={"activation_function": activation})  # fmt: skip
    encoder = load_encoder(folder)
    assert encoder.width == 6
    weights = load_file(folder / "2_Dense/model.safetensors")
    with torch.no_grad():
        pooled = torch.stack([states(encoder, text)[0] for text in TEXTS])
    expected = function(pooled @ weights["linear.weight"].T + weights["linear.bias"])
    expected = expected / expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(
        encoder.embed(TEXTS, kind="query"), expected, atol=TOLERANCE, rtol=0
    )


@pytest.mark.parametrize(("similarity", "normalize", "expected"), [
    (None, True, True), (None, False, True), ("cosine", False, True), ("dot", False, False),
    ("dot", True, True),
])  # fmt: skip
def test_r2_vectors_are_normalised_where_the_folder_or_its_similarity_says_so(
    tmp_path, similarity, normalize, expected
):
    """Search is by inner product, which is the cosine of normalised vectors alone."""
    folder = write_modules(write_network(tmp_path / "x"), older("mean"), normalize=normalize,
                           similarity=similarity)  # fmt: skip
    lengths = load_encoder(folder).embed(TEXTS, kind="query").norm(dim=1)
    assert bool(((lengths - 1).abs() < TOLERANCE).all()) == expected


INSTRUCTION = "Represent this sentence for searching relevant passages: "


@pytest.mark.parametrize(("prompts", "default", "expected"), [
    ({"query": INSTRUCTION}, None, (INSTRUCTION, "")),
    ({"query": "q: ", "passage": "p: "}, None, ("q: ", "p: ")),
    ({"query": "q: ", "document": "d: "}, None, ("q: ", "d: ")),
    ({"query": "q: ", "document": "", "passage": "p: "}, None, ("q: ", "")),
    ({"query": "q: ", "other": "o: "}, "query", ("q: ", "")),
    ({"other": "o: "}, "other", ("o: ", "o: ")),
    ({"query": "Instruct: find\nQuery:", "document": None}, None, ("Instruct: find\nQuery:", "")),
    ({}, None, ("", "")),
])  # fmt: skip
def test_r2_prompts_are_read_under_the_keys_of_both_styles(tmp_path, prompts, default, expected):
    folder = write_modules(write_network(tmp_path / "x"), older("mean"), prompts=prompts,
                           default_prompt_name=default)  # fmt: skip
    assert tuple(load_encoder(folder).prefixes.values()) == expected


def test_r2_prompts_of_other_tasks_are_named_and_empty_ones_leave_e5_its_own(tmp_path):
    folder = write_modules(write_network(tmp_path / "x"), older("mean"), prompts={"s2p": "x: "})
    assert "its prompts ['s2p'] are for other tasks" in str(load_encoder(folder))
    folder = write_modules(folder, older("mean"), prompts={"a": "x: "}, default_prompt_name="a")
    assert "its prompt 'a'" in str(load_encoder(folder))
    folder = write_modules(write_network(tmp_path / "e5"), older("mean"),
                           prompts={"query": "", "document": ""})  # fmt: skip
    assert load_encoder(folder).prefixes == E5  # which is what saving a model again writes


REFUSED = {
    "unknown module": ("modules.json", [{"type": "sentence_transformers.models.CNN", "path": ""}],
                       r"modules.json: got the modules \['CNN'\]"),
    "code of its own": ("modules.json", [{"type": "custom.Transformer", "path": ""}],
                        r"got the modules \['custom.Transformer'\]"),
    "no pooling": ("modules.json", [{"type": "sentence_transformers.models.Transformer"}],
                   r"got the modules \['Transformer'\]"),
    "no list": ("modules.json", {"a": 1}, "modules.json: got TypeError"),
    "two poolings": ("1_Pooling/config.json", older("cls") | {"pooling_mode_mean_tokens": True},
                     r"unsupported pooling_mode: got \['cls', 'mean'\]"),
    "another pooling": ("1_Pooling/config.json", {"pooling_mode": "attention"},
                        "unsupported pooling_mode: got 'attention'"),
    "prompt left out": ("1_Pooling/config.json", older("cls") | {"include_prompt": False},
                        "include_prompt: got False"),
    "similarity": ("config_sentence_transformers.json", {"similarity_fn_name": "euclidean"},
                   "similarity_fn_name: got 'euclidean'"),
    "prompts": ("config_sentence_transformers.json", {"prompts": ["query: "]}, "got prompts"),
    "default prompt": ("config_sentence_transformers.json", {"default_prompt_name": "q"},
                       "default_prompt_name: got 'q'"),
    "length": ("sentence_bert_config.json", {"max_seq_length": "long"},
               "got max_seq_length 'long'"),
    "dense activation": ("2_Dense/config.json",
                         {"in_features": WIDTH, "out_features": 6, "activation_function": "a.b"},
                         "activation_function: got 'a.b'"),
    "dense width": ("2_Dense/config.json", {"in_features": 3, "out_features": 6},
                    "in_features: got 3"),
    "dense residual": ("2_Dense/config.json",
                       {"in_features": WIDTH, "out_features": 6, "use_residual": True},
                       "use_residual"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_r2_what_is_not_supported_is_refused_by_the_name_of_file_and_key(tmp_path, what):
    file, document, message = REFUSED[what]
    folder = write_modules(write_network(tmp_path / "x"), older("cls"), dense={"bias": True})
    load_encoder(folder)
    write(folder / file, document)
    with pytest.raises(ValueError, match=message) as caught:
        load_encoder(folder)
    assert file in str(caught.value)


def test_r2_weights_that_are_a_pickle_are_refused_with_what_to_do(tmp_path):
    folder = write_modules(write_network(tmp_path / "x"), older("cls"), dense={"bias": True})
    (folder / "2_Dense/model.safetensors").rename(folder / "2_Dense/pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="sentence-transformers.* save it again"):
        load_encoder(folder)


@pytest.mark.parametrize(("family", "changes", "message"), [
    ("bert", {"model_type": "mpnet"}, "model_type: got 'mpnet'"),
    ("bert", {"is_decoder": True}, "is_decoder: got True"),
    ("bert", {"auto_map": {"AutoModel": "x.py"}}, "code of its own"),
    ("qwen3", {"is_causal": False}, "is_causal: got False"),
    ("qwen3", {"model_type": "mistral"}, "model_type: got 'mistral'"),
])  # fmt: skip
def test_r2_other_networks_are_refused_by_name(tmp_path, family, changes, message):
    folder = write_modules(write_network(tmp_path / "x", family), older("lasttoken"))
    config = json.loads((folder / "config.json").read_text())
    write(folder / "config.json", config | changes)
    with pytest.raises(ValueError, match=message):
        load_encoder(folder)


def test_r2_a_folder_that_names_no_pooling_is_read_as_e5_is_and_says_so(tmp_path):
    encoder = load_encoder(write_network(tmp_path / "x"))
    assert "no modules.json, so the mean is taken" in str(encoder)
    with pytest.raises(FileNotFoundError, match="decoder without modules.json"):
        load_encoder(write_network(tmp_path / "y", "qwen3"))


def test_r2_the_network_may_lie_in_a_folder_of_its_own_and_texts_be_made_lower_case(tmp_path):
    folder = write_modules(tmp_path / "x", older("mean"))
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    write(folder / "modules.json", modules)
    network = write_network(folder / "0_Transformer")
    plain = load_encoder(folder)
    write(network / "sentence_bert_config.json", {"max_seq_length": 5, "do_lower_case": True})
    lower = load_encoder(folder)
    assert lower.max_tokens == 5
    cased, uncased = (plain.embed([text], kind="query") for text in ("Hat", "hat"))
    assert not torch.equal(cased, uncased)
    assert torch.equal(lower.embed(["Hat"], kind="query"), uncased)


@pytest.mark.parametrize("family", NETWORKS)
@pytest.mark.parametrize("pooling", [older("mean"), older("lasttoken"), {"pooling_mode": "cls"}])
def test_r2_an_empty_text_has_a_finite_vector(tmp_path, family, pooling):
    folder = write_modules(write_network(tmp_path / "x", family), pooling)
    raw = RawTokenizer.from_file(str(folder / "tokenizer.json"))
    raw.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    raw.save(str(folder / "tokenizer.json"))  # nothing is put around a text
    vectors = load_encoder(folder).embed(["", "the hat"], kind="query")
    assert torch.isfinite(vectors).all()


PEER = [("bert", mode, {}) for mode in POOLED] + [
    ("bert", "cls", {"prompts": {"query": "query : "}}),
    ("bert", "mean", {"dense": {"bias": True}, "prompts": {"query": "a ", "document": "the "}}),
    ("bert", "mean", {"prompts": {"query": "a ", "other": "who "}, "default_prompt_name": "other"}),
    ("xlm-roberta", "mean", {"prompts": {"query": "query : ", "document": "passage : "}}),
    ("xlm-roberta", "cls", {}),
    ("qwen3", "lasttoken", {"prompts": {"query": "a query : ", "document": ""}}),
    ("qwen3", "mean", {}),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", range(len(PEER)))
def test_r2_vectors_are_those_of_sentence_transformers(tmp_path, number):
    """The same folder, loaded by both; texts longer than max_seq_length among them."""
    library = pytest.importorskip("sentence_transformers")
    (family, mode, options), newer = PEER[number], number % 2 == 1  # both styles of keys
    folder = write_network(tmp_path / "x", family)
    pooling = {"pooling_mode": mode} if newer else older(mode)
    write_modules(folder, pooling, newer=newer, **options)
    write(folder / "sentence_bert_config.json", {"max_seq_length": 12, "do_lower_case": False})
    encoder, theirs = load_encoder(folder), library.SentenceTransformer(str(folder), device="cpu")
    texts = [*TEXTS, "the man " * 20]
    for kind, embed in (("query", theirs.encode_query), ("passage", theirs.encode_document)):
        expected = torch.from_numpy(embed(texts))
        cosine = torch.cosine_similarity(encoder.embed(texts, kind=kind), expected)
        assert (1 - cosine).abs().max() <= COSINE_TOLERANCE
    assert encoder.num_cut >= 2


# ---- R7: the length of a text ----


def test_r7_a_text_is_as_long_as_the_folder_says_or_as_there_are_positions(tmp_path):
    folder = write_network(tmp_path / "x")
    assert load_encoder(folder).max_tokens == 48
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for no_limit in (10**30, 1e30):
        write(folder / "tokenizer_config.json", settings | {"model_max_length": no_limit})
        assert load_encoder(folder).max_tokens == 48
    write(folder / "tokenizer_config.json", settings | {"model_max_length": 20})
    assert load_encoder(folder).max_tokens == 20
    write(folder / "sentence_bert_config.json", {"max_seq_length": None})
    assert load_encoder(folder).max_tokens == 20
    write(folder / "sentence_bert_config.json", {"max_seq_length": 30})
    assert load_encoder(folder).max_tokens == 30
    write(folder / "sentence_bert_config.json", {"max_seq_length": 300})
    assert load_encoder(folder).max_tokens == 48
    assert load_encoder(folder, max_tokens=7).encode(["a " * 30])[0].shape == (1, 7)
    for wrong in (2, 0, -1, 49):
        with pytest.raises(ValueError, match=f"--max-tokens: got {wrong}, expected 3 to 48"):
            load_encoder(folder, max_tokens=wrong)
    write(folder / "sentence_bert_config.json", {"max_seq_length": 1})
    with pytest.raises(ValueError, match="x/max_seq_length: got .*expected 3 to 48"):
        load_encoder(folder, max_tokens=7)
    roberta = write_network(tmp_path / "y", "xlm-roberta")
    assert load_encoder(roberta).max_tokens == 48  # of 50 positions, two are its padding's
    load_encoder(roberta).embed(["a " * 100], kind="query")


def test_r7_texts_that_are_cut_are_counted(tmp_path):
    encoder = load_encoder(write_network(tmp_path / "x"), max_tokens=5)
    encoder.embed(["a", "a a a", "a a a a", "a " * 30], kind="query", batch_size=2)
    assert encoder.num_cut == 2
