"""Model folders whose files are odd: damaged, cut, of another encoding, with values of another kind, keys twice.

    pytest tests/test_odd_folders.py
    EXAMPLES=20000 pytest tests/test_odd_folders.py

Each file of a folder is changed in generated ways and read. Nothing but a ValueError or OSError that names the file
may come of it, within 5 seconds; what is read is compared with the tokenizers library where that reads the file too.
"""
import base64
import io
import json
import os
from datetime import timedelta

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from tokenizers import Tokenizer

import model
import tokenizer
from small import CONFIG, small_model
from test_tokenizer import ALPHABET, BYTE_LEVEL, CHATML_TEMPLATE, MODEL, SPEC, SPLIT, write_bpe

# The same inputs in every run.
many = settings(max_examples=int(os.environ.get("EXAMPLES", 1000)), derandomize=True, deadline=timedelta(seconds=5),
                database=None, suppress_health_check=list(HealthCheck))


# --- what is generated ------------------------------------------------------------------------------------------------

# Values of another kind than expected, written as JSON: some are none that json.dumps writes.
ODD = ["null", "true", "false", "0", "1", "-1", "2", "3", "7", "1.5", "1e-5", "1e999", "-0.0", "NaN", "Infinity",
       "7" * 400, "7" * 5000, '""', '"x"', '"false"', '"1"', '"a b"', r'"\ud83d"', r'"\u0000"', '"<s>"', "[]", "{}",
       "[null]", "[[1]]",
       '["a", "b"]',
       '{"a": 1}', '{"a": 1, "a": 2}', "[" * 100 + "]" * 100, "[" * 2000 + "]" * 2000, '"llama3"', '"NFC"', '"BPE"',
       '{"content": "<a>", "id": 300}', str(2**24), str(2**31), str(2**63)]


def paths_of(value, path=()):
    """The paths of all values within a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths_of(inner, (*path, key))


def changed(value, path, how, odd):
    """Text of the JSON value with the part at `path` replaced by `odd`, dropped, or written twice."""
    def write(inner, here):
        if here == path and how == "replace":
            return odd
        if isinstance(inner, dict):
            items = []
            for key, part in inner.items():
                text = f"{json.dumps(key)}: {write(part, (*here, key))}"
                if (*here, key) == path and how != "replace":
                    items += [] if how == "drop" else [text, f"{json.dumps(key)}: {odd}"]
                else:
                    items.append(text)
            return "{" + ", ".join(items) + "}"
        if isinstance(inner, list):
            items = []
            for key, part in enumerate(inner):
                if (*here, key) == path and how != "replace":
                    items += [] if how == "drop" else [write(part, (*here, key))] * 2
                else:
                    items.append(write(part, (*here, key)))
            return "[" + ", ".join(items) + "]"
        return json.dumps(inner)
    return write(value, ())


@st.composite
def odd_json(draw, value, skip=()):
    """Bytes of a JSON file with some of its parts changed, or its bytes damaged."""
    text = None
    for _ in range(draw(st.integers(1, 2))):
        paths = [path for path in paths_of(value) if not path[:len(skip)] == skip or not skip]
        path = draw(st.sampled_from(paths))
        text = changed(value, path, draw(st.sampled_from(["replace", "replace", "drop", "twice"])),
                       draw(st.sampled_from(ODD)))
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            break
        if not isinstance(value, (dict, list)):
            break
    content = text.encode()
    if draw(st.integers(0, 4)) == 0:
        content = draw(odd_bytes(content))
    return content


@st.composite
def odd_bytes(draw, content):
    """Bytes with some flipped, cut, repeated, or in another encoding."""
    how = draw(st.sampled_from(["flip", "cut", "repeat", "encoding", "noise"]))
    at = draw(st.integers(0, max(0, len(content) - 1)))
    if how == "flip" and content:
        bit = 1 << draw(st.integers(0, 7))
        return content[:at] + bytes([content[at] ^ bit]) + content[at + 1:]
    if how == "cut":
        return content[:at]
    if how == "repeat":
        return content[:at] + content[max(0, at - 20):]
    if how == "encoding":
        encoding = draw(st.sampled_from(["utf-16", "utf-32", "utf-8-sig", "cp500"]))
        return content.decode("latin-1").encode(encoding, "replace")
    return content[:at] + draw(st.binary(max_size=8)) + content[at:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("odd")


def emptied(folder):
    for file in folder.iterdir():
        file.unlink()


def read_or_refuse(file, read):
    """What read() gives, or None after an error that names the file."""
    try:
        return read()
    except (ValueError, OSError) as e:
        assert str(file.parent) in str(e) and file.name in str(e), f"does not name {file}: {e}"
        str(e).encode()                     # it can be printed
    return None


# --- the model's files ------------------------------------------------------------------------------------------------

LLAMA3 = CONFIG | {"head_dim": 8, "sliding_window": None, "rope_scaling": {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64}, "torch_dtype": "bfloat16", "eos_token_id": [1, 2]}
MISTRAL = CONFIG | {"model_type": "mistral", "sliding_window": 16, "layer_types": ["sliding_attention"] * 2}
QWEN3 = CONFIG | {"model_type": "qwen3", "head_dim": 8, "use_sliding_window": False, "max_window_layers": 2,
                  "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder of a model; `whole` has its safetensors file."""
    folder = tmp_path_factory.mktemp("weights")
    content = save(small_model(folder).state_dict(), metadata={"format": "pt"})
    (folder / "model.safetensors").write_bytes(content)
    model.load_model(folder)                # which imports what takes seconds
    (folder / "whole").write_bytes(content)
    return folder


@given(content=st.one_of(odd_json(LLAMA3), odd_json(MISTRAL), odd_json(QWEN3)))
@many
def test_an_odd_config_json_is_read_strictly_or_refused(weights, content):
    file = weights / "config.json"
    file.write_bytes(content)
    config = read_or_refuse(file, lambda: model.read_config(weights))
    if config:
        sizes = (config.vocab_size, config.dim, config.n_layers, config.n_heads, config.n_kv_heads, config.head_dim,
                 config.hidden_dim, config.max_positions)
        assert all(type(size) is int and size > 0 for size in sizes)
        assert config.n_heads % config.n_kv_heads == 0 and config.head_dim % 2 == 0
        assert type(config.norm_eps) is float and type(config.rope_theta) is float
        assert 0 < config.norm_eps < 1e300 and 0 < config.rope_theta < 1e300
        assert type(config.tied) is bool and type(config.window) in (int, type(None))


INDEX = {"metadata": {"total_size": 8}, "weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors",
                                                       "lm_head.weight": "model-00002-of-00002.safetensors"}}


@given(content=odd_json(INDEX))
@many
def test_an_odd_index_is_read_or_refused(weights, content):
    folder = weights
    file = weights / model.INDEX
    for name in INDEX["weight_map"].values():
        (folder / name).touch()
    file.write_bytes(content)
    try:
        files = read_or_refuse(folder, lambda: model.weight_files(folder))
        assert files is None or all(f.parent == folder and f.exists() for f in files)
    finally:
        for f in (file, *(folder / name for name in INDEX["weight_map"].values())):
            f.unlink()


@st.composite
def odd_weights(draw):
    header = {"__metadata__": {"format": "pt"}, "a": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]},
              "b": {"dtype": "BF16", "shape": [2], "data_offsets": [8, 12]}}
    text = draw(odd_json(header))
    length = len(text) if draw(st.integers(0, 4)) else draw(st.integers(0, 2**64 - 1))
    content = length.to_bytes(8, "little") + text + bytes(draw(st.sampled_from([12, 12, 12, 0, 11, 13])))
    return draw(odd_bytes(content)) if draw(st.integers(0, 4)) == 0 else content


@given(content=odd_weights())
@many
def test_an_odd_safetensors_header_is_read_or_refused(weights, content):
    (weights / "config.json").write_text(json.dumps(CONFIG))
    file = weights / "model.safetensors"
    file.write_bytes(content)
    found = read_or_refuse(file, lambda: model.checkpoint_tensors(weights))
    assert found is None or all(dtype in model.DTYPES.values() for _, dtype, _ in found.values())


@given(data=st.data())
@many
def test_an_odd_safetensors_file_loads_as_it_was_or_is_refused(weights, data):
    (weights / "config.json").write_text(json.dumps(CONFIG))
    file = weights / "model.safetensors"
    file.write_bytes(data.draw(odd_bytes((weights / "whole").read_bytes())))
    read_or_refuse(weights, lambda: model.load_model(weights))


# --- the tokenizer's files --------------------------------------------------------------------------------------------

TOKENS = ["ab", "abc", "Ġa", "bb", "Ġab", "ÃŃ", "12"]
MERGES = [["a", "b"], ["ab", "c"], ["Ġ", "a"], ["b", "b"], ["Ġ", "ab"], ["Ã", "Ń"], ["1", "2"]]
ADDED = [{"id": 256 + len(TOKENS) + i, "content": name, "special": special, "single_word": False, "lstrip": False,
          "rstrip": False, "normalized": False}
         for i, (name, special) in enumerate([("<|im_start|>", True), ("<|im_end|>", True), ("<think>", False)])]
CUT = SPLIT | {"pattern": {"Regex": r"\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"}}
BPE = SPEC | {"added_tokens": ADDED, "normalizer": {"type": "NFC"}, "pre_tokenizer": {
    "type": "Sequence", "pretokenizers": [CUT, BYTE_LEVEL | {"use_regex": False}]},
    "model": MODEL | {"merges": MERGES, "vocab": {}}}
VOCAB = ALPHABET | {token: 256 + i for i, token in enumerate(TOKENS)}
SETTINGS = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": None, "eos_token": "<|im_end|>",
            "chat_template": CHATML_TEMPLATE, "added_tokens_decoder": {
                str(token["id"]): {key: token[key] for key in ("content", "special", "lstrip")} for token in ADDED}}
TEXTS = ["", "a", "abc abcab", " ab\n\nabb 1234 x", "í ab<think>c", "e\u0301 ab!?\t 12", "\u00a0\U0001f44d \r\n",
    "''s 'll"]


def with_vocabulary(content):
    """tokenizer.json's bytes with the vocabulary put in, which would only make the generated parts rarer."""
    return content.replace(b'"vocab": {}', b'"vocab": ' + json.dumps(VOCAB).encode())


@st.composite
def odd_vocabulary(draw):
    """tokenizer.json with the vocabulary, the merges or the pattern changed."""
    spec = json.loads(json.dumps(BPE))
    tokens = draw(st.lists(st.text("abc", min_size=2, max_size=5), max_size=6, unique=True))
    ids = draw(st.permutations(range(256, 256 + len(tokens))))
    spec["added_tokens"] = []
    spec["model"]["vocab"] = ALPHABET | dict(zip(tokens, ids))
    ways = [(t[:i], t[i:]) for t in sorted(tokens, key=spec["model"]["vocab"].get) for i in range(1, len(t))
            if {t[:i], t[i:]} <= spec["model"]["vocab"].keys()]
    spec["model"]["merges"] = [way for way in ways if draw(st.integers(0, 4))]
    spec["model"]["ignore_merges"] = draw(st.booleans())
    atoms = ["a", "b", r"\p{L}", r"\s", r"\S", "[^ab]", "[a-c]", " ", ".", r"\d", "(?=a)", "(?!b)", "(?<=a)",
        "(?<!c)", r"\n", "é"]
    atom = st.builds(str.__add__, st.sampled_from(atoms), st.sampled_from(["", "", "", "+", "*", "?", "{1,2}", "+?",
    "++"]))
    parts = st.lists(st.lists(atom, min_size=1, max_size=3).map("".join), min_size=1, max_size=3)
    spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "|".join(draw(parts))
    return json.dumps(spec).encode()


@given(content=st.one_of(odd_json(BPE).map(with_vocabulary), odd_json(BPE).map(with_vocabulary), odd_vocabulary()),
       text=st.text("abc é1\n ", max_size=12))
@many
def test_an_odd_tokenizer_json_has_the_ids_of_the_tokenizers_library_or_is_refused(folder, content, text):
    emptied(folder)
    file = folder / "tokenizer.json"
    file.write_bytes(content)
    ours = read_or_refuse(file, lambda: tokenizer.load_tokenizer(folder))
    if ours is None:
        return
    try:
        spec = json.loads(content)
        reference = Tokenizer.from_str(content.decode())
    except Exception:
        return                              # the library is stricter here
    # Control tokens are not found in text here.
    special = [token["content"] for token in spec.get("added_tokens") or [] if token.get("special")]
    for sample in (*TEXTS, text):
        if not any(name in sample for name in special):
            try:
                ids = ours.encode(sample, bos=False, eos=False)
            except ValueError as e:
                assert "text" in str(e)
                continue
            assert ids == reference.encode(sample, add_special_tokens=False).ids, sample


@pytest.mark.parametrize("name, value", [
    ("tokenizer_config.json", SETTINGS), ("special_tokens_map.json", {"eos_token": {"content": "<|im_end|>"},
    "pad_token": "x"}),
    ("added_tokens.json", {"<a>": 266, "<b>": 267}), ("generation_config.json", {"eos_token_id": [264, 7],
    "top_p": 0.9}),
    ("config.json", {"vocab_size": 300, "tokenizer_class": "GPT2Tokenizer", "model_type": "llama"})])
@given(data=st.data())
@many
def test_an_odd_file_beside_the_tokenizer_is_read_or_refused(folder, name, value, data):
    emptied(folder)
    (folder / "tokenizer.json").write_bytes(with_vocabulary(json.dumps(BPE).encode()))
    if name != "tokenizer_config.json":
        (folder / "tokenizer_config.json").write_text(json.dumps(SETTINGS))
    (folder / name).write_bytes(data.draw(odd_json(value)))
    chat = read_or_refuse(folder, lambda: tokenizer.load_chat(folder))
    if chat:
        assert all(type(i) is int and 0 <= i < 2**24 for i in chat.stop_ids)
        response = chat.encode_response("ab c")
        # Under a template that writes no generation prompt it is the model that begins with the role.
        prompt = chat.tokenizer.spell(chat.encode_prompt([{"role": "user", "content": "q"}]))
        role = "" if "<|im_start|>assistant\n" in prompt else "assistant\n"
        assert response[-1] == chat.end_id and chat.decode_response(response[:-1]) == role + "ab c"


SNIPPETS = ["{% for m in messages %}", "{% endfor %}", "{{ m['content'] }}", "{{ messages }}", "{% if x %}",
    "{% else %}",
            "{% endif %}", "{{ '<|im_end|>' }}", r"{{ '\ud83d' }}", "{{ 9 ** 99 }}", "{{ 'a' * 99999999 }}",
            "{% break %}",
            "{{ raise_exception('no') }}", "{% set x = x + 1 %}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            "{{", "%}",
            "{{ ''.__class__ }}", "{% include 'x' %}", "{{ range(10**9)|list|length }}", "{{ strftime_now('%') }}",
            "(" * 200, "\0"]


@st.composite
def odd_template(draw):
    content = CHATML_TEMPLATE
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        content = content[:at] + draw(st.sampled_from(SNIPPETS)) + content[at + draw(st.integers(0, 10)):]
    return draw(odd_bytes(content.encode())) if draw(st.integers(0, 4)) == 0 else content.encode()


@given(content=odd_template())
@many
def test_an_odd_chat_template_is_followed_or_refused(folder, content):
    emptied(folder)
    (folder / "tokenizer.json").write_bytes(with_vocabulary(json.dumps(BPE).encode()))
    (folder / "chat_template.jinja").write_bytes(content)
    chat = read_or_refuse(folder, lambda: tokenizer.load_chat(folder))
    if chat:
        assert chat.encode_response("ab c")[-1] == chat.end_id


@pytest.fixture(scope="module")
def sentencepiece_model():
    """A small tokenizer.model."""
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["ab abc c", "a bb abc"] * 20), model_writer=trained, model_type="bpe", vocab_size=266,
        byte_fallback=True, normalization_rule_name="identity", minloglevel=2)
    return trained.getvalue()


RANKS = b"".join(b"%s %d\n" % (base64.b64encode(bytes([b])), b) for b in range(256))


@given(data=st.data())
@many
def test_an_odd_tokenizer_model_is_read_or_refused(folder, sentencepiece_model, data):
    emptied(folder)
    file = folder / "tokenizer.model"
    whole = data.draw(st.sampled_from([RANKS, sentencepiece_model]))
    file.write_bytes(data.draw(odd_bytes(whole)))
    ours = read_or_refuse(file, lambda: tokenizer.load_tokenizer(folder))
    if isinstance(ours, tokenizer.SentencePieceTokenizer):
        reference = sentencepiece.SentencePieceProcessor(model_file=str(file))
        assert ours.encode("ab c", bos=False, eos=False) == reference.encode("ab c")


def test_the_folder_that_is_changed_is_read_without_a_change(tmp_path):
    reference = write_bpe(tmp_path, TOKENS, MERGES)
    assert reference.encode("abc").ids == [257]
    (tmp_path / "tokenizer.json").write_bytes(with_vocabulary(json.dumps(BPE).encode()))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(SETTINGS))
    chat = tokenizer.load_chat(tmp_path)
    assert chat.encode_response("abc<think>ab")[:3] == [257, 265, 256]
