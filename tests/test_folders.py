"""Model folders as they are on the hub, folders that are none, and what other programs need.

    python -m pytest tests/test_folders.py

Each folder below has the fields of its model's real config.json, all of them and in their spelling,
and the files that lie in its repository; sizes are cut and weights random.
"""
import json
import math
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import generate
import score
import train
from make_golden import TOKENS, formula_weight
from model import (
    INDEX, Transformer, checkpoint_tensors, copied_files, load_model, read_config, save_model)
from ranks import run_ranks, saves_to_a_full_disk
from small import small_model

pytestmark = pytest.mark.usefixtures("one_thread")


# --- the folders ----------------------------------------------------------------------------------

# What is cut, and what families have in common.
CUT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
       "vocab_size": 101}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
         "initializer_range": 0.02, "num_key_value_heads": 2, "pretraining_tp": 1,
         "rms_norm_eps": 1e-05, "use_cache": True} | CUT
LLAMA3 = LLAMA | {"attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
                  "rope_theta": 500000.0, "torch_dtype": "bfloat16"}
LLAMA31 = LLAMA3 | {
    "eos_token_id": [128001, 128008, 128009], "max_position_embeddings": 131072, "mlp_bias": False,
    "rope_scaling": {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "tie_word_embeddings": False, "transformers_version": "4.42.3"}
SMOLLM2 = LLAMA | {
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.041666666666666664, "is_llama_config": True,
    "max_position_embeddings": 8192, "mlp_bias": False, "pad_token_id": 2,
    "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.42.3",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}}}
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral",
           "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
           "initializer_range": 0.02, "max_position_embeddings": 32768, "num_key_value_heads": 2,
           "rms_norm_eps": 1e-05, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
           "use_cache": True} | CUT
QWEN = {"attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
        "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 32768,
        "max_window_layers": 21, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
        "tie_word_embeddings": True, "use_cache": True, "use_sliding_window": False} | CUT
QWEN2 = QWEN | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
QWEN3 = QWEN | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3",
                "attention_bias": False, "head_dim": 24, "max_position_embeddings": 40960,
                "max_window_layers": 28, "rope_scaling": None, "sliding_window": None}

# What many repositories hold beside the weights; defaults that an older transformers wrote out.
TOKENIZER = ["tokenizer.json", "tokenizer_config.json"]
USUAL = [".gitattributes", "README.md", "LICENSE", "generation_config.json",
         "special_tokens_map.json", *TOKENIZER]
META = ["USE_POLICY.md", "original/consolidated.00.pth", "original/params.json",
        "original/tokenizer.model"]
DEFAULTS = {"chunk_size_feed_forward": 0, "do_sample": False, "early_stopping": False,
            "length_penalty": 1.0, "max_length": 20, "min_length": 0, "num_beam_groups": 1,
            "num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0,
            "return_dict": True, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "typical_p": 1.0,
            "torchscript": False,
            "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "pruned_heads": {},
            "bad_words_ids": None, "tie_encoder_decoder": False, "output_scores": False}

# {model: (config.json, number of shards or 0 for model.safetensors, other files)}
FOLDERS = {
    "Llama-2-7b-chat-hf": (LLAMA | {
        "_name_or_path": "meta-llama/Llama-2-7b-hf", "bos_token_id": 1, "eos_token_id": 2,
        "max_position_embeddings": 4096, "num_key_value_heads": 4, "pad_token_id": 0,
        "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16",
        "transformers_version": "4.31.0.dev0"},
        2, [*USUAL, "tokenizer.model", "USE_POLICY.md", "pytorch_model-00001-of-00002.bin",
            "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json"]),
    "Meta-Llama-3-8B-Instruct": (LLAMA3 | {
        "eos_token_id": 128009, "max_position_embeddings": 8192, "rope_scaling": None,
        "tie_word_embeddings": False, "transformers_version": "4.40.0.dev0"}, 4, [*USUAL, *META]),
    "Llama-3.1-8B-Instruct": (LLAMA31, 4, [*USUAL, *META]),
    "Llama-3.2-1B-Instruct": (LLAMA31 | {
        "head_dim": 16, "rope_scaling": LLAMA31["rope_scaling"] | {"factor": 32.0},
        "tie_word_embeddings": True, "transformers_version": "4.45.0.dev0"}, 0, [*USUAL, *META]),
    "Mistral-7B-Instruct-v0.1": (MISTRAL | {
        "rope_theta": 10000.0, "sliding_window": 4096, "transformers_version": "4.34.0.dev0"},
        2, [*USUAL, "tokenizer.model", "pytorch_model-00001-of-00002.bin",
            "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json"]),
    "Mistral-7B-Instruct-v0.2": (MISTRAL | {
        "rope_theta": 1000000.0, "sliding_window": None, "transformers_version": "4.36.0"},
        3, [*USUAL, "tokenizer.model", "pytorch_model-00001-of-00003.bin"]),
    "Mistral-7B-Instruct-v0.3": (MISTRAL | {
        "_name_or_path": "ArthurZ/m3", "rope_theta": 1000000.0, "sliding_window": None,
        "transformers_version": "4.42.0.dev0"},
        3, [*USUAL, "tokenizer.model", "tokenizer.model.v3", "params.json",
            "consolidated.safetensors"]),
    "zephyr-7b-beta": (MISTRAL | {
        "_name_or_path": "HuggingFaceH4/zephyr-7b-beta", "pad_token_id": 2, "rope_theta": 10000.0,
        "sliding_window": 4096, "transformers_version": "4.35.0"},
        8, [*USUAL, "added_tokens.json", "tokenizer.model", "all_results.json", "eval_results.json",
            "train_results.json", "trainer_state.json", "training_args.bin",
            "pytorch_model-00001-of-00008.bin", "pytorch_model.bin.index.json",
            "runs/events.out.tfevents"]),
    "TinyLlama-1.1B-Chat-v1.0": (LLAMA | {
        "attention_bias": False, "bos_token_id": 1, "eos_token_id": 2,
        "max_position_embeddings": 2048, "rope_scaling": None, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.35.0"},
        0, [*USUAL, "tokenizer.model", "eval_results.json"]),
    "SmolLM2-135M-Instruct": (SMOLLM2, 0, [
        *USUAL, "merges.txt", "vocab.json", "all_results.json", "eval_results.json",
        "train_results.json", "trainer_state.json", "training_args.bin", "onnx/model.onnx",
        "runs/events.out.tfevents"]),
    "SmolLM2-1.7B-Instruct": (SMOLLM2 | {"rope_theta": 130000, "transformers.js_config": {
        "dtype": "q4", "kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"},
        "use_external_data_format": {"model.onnx": True, "model_fp16.onnx": True}}}, 0, USUAL),
    "Qwen2-7B-Instruct": (QWEN2 | {
        "max_window_layers": 28, "rope_theta": 1000000.0, "sliding_window": 131072,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.41.2"},
        4, [*USUAL, "merges.txt", "vocab.json"]),
    "Qwen2.5-0.5B-Instruct": (QWEN2 | {
        "rope_theta": 1000000.0, "sliding_window": 32768, "torch_dtype": "bfloat16",
        "transformers_version": "4.43.1"}, 0, [*USUAL, "merges.txt", "vocab.json"]),
    "Qwen3-0.6B": (QWEN3 | {
        "rope_theta": 1000000, "torch_dtype": "bfloat16", "transformers_version": "4.51.0"},
        0, [*USUAL, "merges.txt", "vocab.json"]),
    "saved by transformers 4.57": (QWEN3 | {
        "dtype": "bfloat16", "layer_types": ["full_attention"] * 2, "rope_theta": 1000000,
        "transformers_version": "4.57.1"}, 0, [*USUAL, "chat_template.jinja", "added_tokens.json"]),
    "saved by transformers 5": (QWEN2 | {
        "dtype": "bfloat16", "layer_types": ["full_attention"] * 2, "pad_token_id": None,
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
        "sliding_window": None, "transformers_version": "5.7.0"},
        0, [*TOKENIZER, "generation_config.json", "chat_template.jinja"]),
    "unsloth/Llama-3.2-1B-Instruct": (LLAMA31 | {
        "head_dim": 16, "pad_token_id": 128004, "tie_word_embeddings": True,
        "rope_scaling": LLAMA31["rope_scaling"] | {"factor": 32.0}, "unsloth_fixed": True,
        "transformers_version": "4.52.0.dev0"}, 0, [*USUAL, "chat_template.jinja"]),
    "a merge by unsloth": (LLAMA31 | {
        "_name_or_path": "unsloth/meta-llama-3.1-8b-instruct-bnb-4bit", "head_dim": None,
        "unsloth_version": "2024.9", "neftune_noise_alpha": 5}, 4, USUAL),
    "a fine-tune by axolotl": (MISTRAL | {
        "_name_or_path": "mistralai/Mistral-7B-v0.1", "eos_token_id": [2, 32000], "head_dim": 16,
        "rope_theta": 10000.0, "sliding_window": None, "transformers_version": "4.48.1",
        "use_cache": False}, 3, [*USUAL, "added_tokens.json", "trainer_state.json"]),
    "with the defaults of its time": (LLAMA | DEFAULTS | {
        "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 2048, "rope_scaling": None,
        "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "float32",
        "transformers_version": "4.46.0", "_attn_implementation_autoset": True}, 0, USUAL),
}


def write_folder(folder, config, shards, others=()):
    """A model folder: weights by make_golden's formula, and other files that do not count."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Transformer(read_config(folder)).named_parameters()}
    weights = {name: formula_weight(name, shape) for name, shape in shapes.items()}
    if shards == 0:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        file_of = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors"
                   for i, name in enumerate(weights)}
        for file in set(file_of.values()):
            save_file({name: w for name, w in weights.items() if file_of[name] == file},
                      folder / file, metadata={"format": "pt"})
        index = {"metadata": {"total_size": 1}, "weight_map": file_of}
        (folder / INDEX).write_text(json.dumps(index))
    for name in others:
        (folder / name).parent.mkdir(exist_ok=True)
        if name == "consolidated.safetensors":          # Mistral's own names, and one that clashes
            save_file({"layers.0.attention.wq.weight": torch.ones(64, 64),
                       "model.norm.weight": torch.full((64,), 3.0)}, folder / name)
        elif name.endswith(".json"):
            (folder / name).write_text("{}")
        else:
            (folder / name).write_bytes(f"{name} of {folder.name}".encode())
    return folder


def transformers_logits(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, pad_token_id=None)
    with torch.no_grad():
        return model.eval()(TOKENS[None]).logits[0]


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_as_it_is_on_the_hub_loads_and_saves(name, tmp_path):
    folder = write_folder(tmp_path / name, *FOLDERS[name])
    model = load_model(folder)
    expected = transformers_logits(folder)
    with torch.no_grad():
        assert (model(TOKENS) - expected).abs().max() <= 1e-5

    save_model(model, tmp_path / "saved", like=folder)
    assert (transformers_logits(tmp_path / "saved") - expected).abs().max() == 0
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "saved")(TOKENS), model(TOKENS))
    saved = tmp_path / "saved"
    found = {str(f.relative_to(saved)) for f in saved.rglob("*") if f.is_file()}
    copied = {f for f in FOLDERS[name][2] if "token" in f or f in (
        "generation_config.json", "merges.txt", "vocab.json", "chat_template.jinja")}
    assert found == copied | {"config.json", "model.safetensors", INDEX}
    assert all((saved / f).read_bytes() == (folder / f).read_bytes() for f in copied)


@pytest.mark.parametrize("name, fields", [
    ("SmolLM2-135M-Instruct", {"rope_interleaved": True}),
    ("SmolLM2-135M-Instruct", {"attention_dropout": 0.1}),
    ("Llama-3.1-8B-Instruct", {"quantization_config": {"quant_method": "bitsandbytes"}}),
    ("Llama-3.1-8B-Instruct", {"pruned_heads": {"0": [1]}}),
    ("Qwen2.5-0.5B-Instruct", {"use_mrope": True}),
    ("Qwen2.5-0.5B-Instruct", {"dual_chunk_attention_config": {"chunk_size": 262144}}),
    ("Qwen3-0.6B", {"num_experts": 128}),
    ("Mistral-7B-Instruct-v0.3", {"auto_map": {"AutoModelForCausalLM": "modeling.Other"}}),
    ("Mistral-7B-Instruct-v0.3", {"quantization": {"bits": 4, "group_size": 64}}),
], ids=str)
def test_a_field_that_changes_what_is_computed_is_an_error_that_names_it(name, fields, tmp_path):
    folder = write_folder(tmp_path / name, *FOLDERS[name])
    (folder / "config.json").write_text(json.dumps(FOLDERS[name][0] | fields))
    (field,) = fields
    with pytest.raises(ValueError, match=f"config.json: {field} = .* is not supported; expected"):
        load_model(folder)


# --- which files count ----------------------------------------------------------------------------

V03 = "Mistral-7B-Instruct-v0.3"


def assert_same_weights(folder, expected):
    found = load_model(folder).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("index", [True, False], ids=["index", "no index"])
@pytest.mark.parametrize("name, file", [
    (V03, "consolidated.safetensors"), (V03, "adapter_model.safetensors"),
    ("SmolLM2-135M-Instruct", "consolidated.safetensors"),
    ("SmolLM2-135M-Instruct", "model-00001-of-00002.safetensors"),
])
def test_files_beside_those_that_count_are_not_read(name, file, index, tmp_path):
    config, shards, _ = FOLDERS[name]
    folder = write_folder(tmp_path / "model", config, shards)
    expected = load_model(folder).state_dict()
    if not index and shards:
        (folder / INDEX).unlink()       # as in a folder that was put together by hand
    other = {weight: w + 1 for weight, w in expected.items()}
    save_file(other, folder / file)
    assert_same_weights(folder, expected)
    assert file not in {f for _, _, f in checkpoint_tensors(folder).values()}
    for damaged in (b"", POINTER):
        (folder / file).write_bytes(damaged)
        assert_same_weights(folder, expected)


def test_the_index_decides_between_two_saves_in_one_folder(tmp_path):
    folder = write_folder(tmp_path / "model", FOLDERS[V03][0], 3)
    expected = load_model(folder).state_dict()
    save_file({name: w + 1 for name, w in expected.items()}, folder / "model.safetensors")
    assert_same_weights(folder, expected)


# --- folders that are none ------------------------------------------------------------------------

POINTER = (b"version https://git-lfs.github.com/spec/v1\n"
           b"oid sha256:" + b"5af571cb" * 8 + b"\nsize 269060552\n")


def error_of(call, *args):
    with pytest.raises(ValueError) as caught:
        call(*args)
    return str(caught.value)


@pytest.mark.parametrize("name, hub, local", [
    ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B", "Llama-3.2-1B"),
    ("Llama-3.2-1B", "ORGANISATION/Llama-3.2-1B", "Llama-3.2-1B"),
    ("runs/step-000100", "ORGANISATION/step-000100", "runs/step-000100"),
    ("models/Llama-3.2-1B", "ORGANISATION/Llama-3.2-1B", "models/Llama-3.2-1B"),      # README's place for them
    ("/no/such/folder", "ORGANISATION/folder", "/no/such/folder"),
])
def test_a_folder_that_is_not_there_shows_how_to_fetch_one(name, hub, local, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()                # so that the third is a path that was mistyped
    for call in (load_model, read_config, checkpoint_tensors):
        message = error_of(call, name)
        assert f"hf download {hub} --local-dir {local} --exclude 'consolidated*'" in message
        assert "hf auth login" in message and message.startswith(f"{local}: no such folder")


@pytest.mark.parametrize("call", [
    lambda: train.main(train.parse_config(["--model", "google/nothing", "--data", "pairs.jsonl"])),
    lambda: generate.main(["--model", "google/nothing", "--prompt", "Hello"]),
    lambda: score.RewardScorer("google/nothing"),
], ids=["train", "generate", "score"])
def test_every_command_tells_it_before_anything_else(call):
    assert "hf download google/nothing --local-dir nothing" in error_of(call)


@pytest.mark.parametrize("file, advice", [
    ("adapter_config.json", "LoRA adapter"), ("params.json", "own layout"),
    ("snapshots", "snapshots"),
])
def test_a_folder_without_a_config_is_told_what_it_is(file, advice, tmp_path):
    (tmp_path / file).touch()
    message = error_of(load_model, tmp_path)
    assert message.startswith(f"{tmp_path}/config.json: not found; expected") and advice in message


@pytest.fixture
def small(tmp_path):
    """A folder of one file, with a tokenizer."""
    folder = tmp_path / "small"
    model = small_model(folder, dtype=torch.float32)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_git_lfs_pointer_is_recognised(file, small):
    (small / file).write_bytes(POINTER)
    message = error_of(load_model, small)
    assert message.startswith(f"{small}/{file}: a Git LFS pointer") and "git lfs pull" in message


def test_pickled_weights_are_converted_by_the_command_that_the_error_shows(small):
    weights = load_file(small / "model.safetensors")
    (small / "model.safetensors").unlink()
    torch.save(weights, small / "pytorch_model.bin")
    message = error_of(load_model, small)
    assert "no *.safetensors files" in message and "pytorch_model.bin" in message
    command = message[message.index("python -c"):]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert_same_weights(small, weights)


@pytest.mark.parametrize("file", ["consolidated.00.pth", "model-q4.gguf", None])
def test_a_folder_without_weights_is_told_what_is_missing(file, small):
    (small / "model.safetensors").unlink()
    if file:
        (small / file).touch()
    message = error_of(load_model, small)
    assert message.startswith(f"{small}: no *.safetensors files; expected") and "*.pth" in message


# --- what is saved --------------------------------------------------------------------------------

@pytest.mark.parametrize("shard_bytes", [5 * 10**9, 10_000])
def test_every_saved_file_names_its_format_and_has_the_mode_of_others(shard_bytes, small, tmp_path):
    before = os.umask(0o027)
    try:
        save_model(load_model(small), tmp_path / "saved", like=small, shard_bytes=shard_bytes)
    finally:
        os.umask(before)
    files = sorted((tmp_path / "saved").glob("*.safetensors"))
    assert ([f.name for f in files] == ["model.safetensors"]) == (shard_bytes > 10**6)
    for file in files:
        with safe_open(file, "pt") as f:
            assert f.metadata() == {"format": "pt"}
    assert {oct(f.stat().st_mode & 0o777) for f in (tmp_path / "saved").iterdir()} == {"0o640"}
    index = json.loads((tmp_path / "saved" / INDEX).read_text())
    weights = {name: w for f in files for name, w in load_file(f).items()}
    assert index["metadata"]["total_size"] == sum(w.nbytes for w in weights.values())
    assert index["weight_map"].keys() == weights.keys() == load_model(small).state_dict().keys()


@pytest.mark.parametrize("shard_bytes", [5 * 10**9, 10_000])
def test_a_save_where_weights_are_already_is_refused(shard_bytes, small):
    model = load_model(small)
    before = {f: f.read_bytes() for f in small.iterdir()}
    message = error_of(lambda: save_model(model, small, like=small, shard_bytes=shard_bytes))
    assert message.startswith(f"{small}: holds weights already")
    assert before == {f: f.read_bytes() for f in small.iterdir()}


def test_a_save_that_fails_leaves_no_model(small, tmp_path, monkeypatch):
    model = load_model(small)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**4, before[1]))
    try:
        with pytest.raises(OSError, match="model.safetensors: cannot be written .*File too large"):
            save_model(model, tmp_path / "saved", like=small)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "config.json: not found" in error_of(load_model, tmp_path / "saved")
    assert "model.safetensors" in error_of(checkpoint_tensors, tmp_path / "saved")


def test_a_run_says_that_config_json_names_another_dtype_than_it_saves_in(tmp_path, capsys):
    flags = ["--max_steps", "1", "--eval_pairs", "8", "--pairs_per_step", "8", "--judge", "",
             "--judge_prompts", "", "--save_dtype", "float32", "--output", str(tmp_path / "out")]
    train.main(train.parse_config(flags))
    lines = capsys.readouterr().out
    assert "saving   in float32; config.json goes on naming bfloat16" in lines


# --- odd values, files and links ------------------------------------------------------------------

def config_error(folder, **changes):
    raw = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(raw))
    return error_of(read_config, folder)


LLAMA3_ROPE = LLAMA31["rope_scaling"]
NO_SIZE = [True, 4.0, "4", 0, -4, 10**400, math.nan, math.inf, [4], {}]
NO_NUMBER = [True, "1e-5", 0, -1.5, 10**400, math.nan, math.inf, [1.5], {}]


@pytest.mark.parametrize("field, value", [
    *[(field, value) for value in NO_SIZE for field in (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
        "intermediate_size", "vocab_size", "max_position_embeddings")],
    *[(field, value) for value in NO_NUMBER for field in ("rms_norm_eps", "rope_theta")],
    *[(field, value) for value in ("false", 0, 1, []) for field in (
        "tie_word_embeddings", "mlp_bias", "attention_bias")],
    ("head_dim", 15), ("num_key_value_heads", 3), ("hidden_size", 30), ("num_hidden_layers", 10**6),
    ("rope_scaling", [8.0]), ("rope_scaling", "llama3"), ("rope_scaling", {"rope_type": ["llama3"]}),
    ("rope_scaling", {"rope_theta": True}),
], ids=str)
def test_a_value_of_config_json_that_is_none_of_its_field_is_an_error_that_names_both(field, value, small):
    message = config_error(small, **{field: value})
    assert message.startswith(f"{small}/config.json: ")
    assert "rope" in message if field.startswith("rope") else f"{field} = " in message


@pytest.mark.parametrize("field, value", [
    *[(field, value) for value in NO_NUMBER for field in ("factor", "low_freq_factor", "high_freq_factor")],
    *[("original_max_position_embeddings", value) for value in NO_SIZE], ("high_freq_factor", 1.0), ("factor", None)],
    ids=str)
def test_a_value_of_the_llama3_rope_that_is_none_of_its_field_is_an_error_that_names_it(field, value, small):
    message = config_error(small, rope_scaling=LLAMA3_ROPE | {field: value})
    assert message.startswith(f"{small}/config.json: ") and f"rope's {field}" in message


@pytest.mark.parametrize("changes", [
    {"sliding_window": True}, {"sliding_window": 4.5}, {"sliding_window": 0}, {"layer_types": 7},
    {"layer_types": ["sliding_attention"]}, {"layer_types": [["sliding_attention"]] * 2}])
def test_a_sliding_window_that_is_none_is_an_error_that_names_it(changes, small):
    (field,) = changes
    assert field in config_error(small, model_type="mistral", **changes)


def test_whole_numbers_are_numbers_and_rope_keeps_its_values(small):
    raw = json.loads((small / "config.json").read_text()) | {"rope_theta": 500000, "rope_scaling": LLAMA3_ROPE}
    (small / "config.json").write_text(json.dumps(raw))
    config = read_config(small)
    assert config.rope_theta == 500000
    assert config.rope_scaling == {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_type"}


NO_JSON = {
    "empty": b"", "cut": b'{"a": ', "no UTF-8": b'{"a": "\xe9"}', "no object": b"[]",
    "5,000 digits": b'{"a": ' + b"7" * 5000 + b"}",
    "nested": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested list": b"[" * 990 + b"]" * 990,
    "a key twice": b'{"vocab_size": 1, "vocab_size": 2}', "half a pair": rb'{"a": "\ud83d"}',
    "UTF-16": '{"a": 1}'.encode("utf-16")}


@pytest.mark.parametrize("content", NO_JSON.values(), ids=NO_JSON)
@pytest.mark.parametrize("file", ["config.json", INDEX])
def test_a_json_file_that_is_none_is_an_error_that_names_it(content, file, small):
    (small / file).write_bytes(content)
    assert error_of(load_model, small).startswith(f"{small / file}: not valid JSON")


@pytest.mark.parametrize("depth", range(900, 1000, 3))
def test_a_nested_value_at_any_depth_is_an_error_that_names_the_file(depth, small):
    raw = json.dumps(json.loads((small / "config.json").read_text()) | {"other": "NESTED"})
    (small / "config.json").write_text(raw.replace('"NESTED"', "[" * depth + "]" * depth))
    assert error_of(read_config, small).startswith(f"{small}/config.json: ")


@pytest.mark.parametrize("weight_map", [None, [], {}, {"a": 1}, {"a": "../model.safetensors"}, {"a": "config.json"},
                                        {"a": "a\0.safetensors"}, {"a": ["model.safetensors"]}, {"a": ""}], ids=str)
def test_an_index_that_names_no_files_of_the_folder_is_an_error_that_names_it(weight_map, small):
    (small / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert error_of(load_model, small).startswith(f"{small / INDEX}: expected a JSON object whose weight_map")


@pytest.mark.parametrize("file", ["config.json", INDEX, "model.safetensors"])
def test_a_directory_in_the_place_of_a_file_is_an_error_that_names_it(file, small):
    (small / file).unlink(missing_ok=True)
    (small / file).mkdir()
    assert error_of(load_model, small).startswith(f"{small / file}: not a file")


def safetensors_file(header, data=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + data


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize("content", [
    b"", b"\0" * 7, b"\xff" * 8, b"\0" * 8, safetensors_file(b"{"), safetensors_file([]), safetensors_file({"a": 1}),
    safetensors_file({"a": ONE}), safetensors_file({"a": ONE | {"shape": [2**63]}}, b"1234"),
    safetensors_file({"a": ONE | {"shape": [2**40, 2**40]}}, b"1234"),
    safetensors_file({"a": ONE | {"shape": [-1]}}, b"1234"),
    safetensors_file({"a": ONE | {"dtype": "F33"}}, b"1234"),
    safetensors_file({"a": ONE | {"data_offsets": [4, 0]}}, b"1234"),
    safetensors_file(b"[" * 100_000), safetensors_file(rb'{"\ud83d": 1}'), safetensors_file({"a": ONE}, b"12345678")],
    ids=lambda content: repr(content[:40]))
def test_an_odd_safetensors_header_is_an_error_that_names_the_file(content, small):
    (small / "model.safetensors").write_bytes(content)
    assert error_of(load_model, small).startswith(f"{small}/model.safetensors: ")


def test_a_panic_of_the_safetensors_library_is_an_error_that_names_the_file(small, monkeypatch):
    class PanicException(BaseException):
        pass

    def panics(*args):
        raise PanicException("called `Option::unwrap()` on a `None` value")
    monkeypatch.setattr("model.safe_open", panics)
    assert error_of(checkpoint_tensors, small).startswith(f"{small}/model.safetensors: ")


LINKS = [(file, how) for file in ("config.json", "tokenizer.json", "original/tokenizer.model")
         for how in ("absolute", "relative", "leads nowhere", "a folder")]


# A config.json that leads nowhere is told as one that is not found.
@pytest.mark.parametrize("file, how", [link for link in LINKS if link != ("config.json", "leads nowhere")])
def test_a_link_that_leads_out_of_the_folder_is_refused_when_it_is_first_looked_at(file, how, small, tmp_path):
    secret = tmp_path / "secret" / "x"
    secret.parent.mkdir()
    secret.write_text((small / "config.json").read_text())
    link = small / file
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    if how == "leads nowhere":
        secret.unlink()
    if how == "a folder":
        (tmp_path / "secret" / "tokenizer.model").write_text("secret")
        (small / "original").rmdir() if "original" in file else link.write_text("{}")
        (small / "original").symlink_to(tmp_path / "secret")
        link = small / "original" / "tokenizer.model"
    else:
        link.symlink_to(os.path.relpath(secret, link.parent) if how == "relative" else secret)
    for call in (read_config, load_model, checkpoint_tensors):
        message = error_of(call, small)
        assert message.startswith(f"{link}: ") and str(tmp_path / "secret") in message and "link" in message


@pytest.mark.parametrize("reached", ["snapshot", "a link to it"])
def test_the_links_of_the_hubs_cache_are_followed(reached, small, tmp_path):
    expected = load_model(small).state_dict()
    (small / "tokenizer.model").symlink_to("tokenizer.json")            # a link inside the folder
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123abc"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(small.iterdir())):
        (blobs / str(number)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    folder = snapshot
    if reached == "a link to it":
        folder = tmp_path / "link"
        folder.symlink_to(snapshot)
    model = load_model(folder)
    save_model(model, tmp_path / "saved", like=folder)
    assert_same_weights(tmp_path / "saved", expected)
    assert sorted(f.name for f in copied_files(folder)) == ["config.json", "tokenizer.json", "tokenizer.model"]
    for file in copied_files(folder):
        copy = tmp_path / "saved" / file.name
        assert copy.read_bytes() == file.read_bytes() and not copy.is_symlink()
    # Blobs that are a link themselves lead out again.
    (tmp_path / "models--a--b" / "elsewhere").mkdir()
    blobs.rename(tmp_path / "blobs elsewhere")
    blobs.symlink_to(tmp_path / "blobs elsewhere")
    assert "leads out of the folder" in error_of(read_config, folder)


def test_weights_may_be_links_to_anywhere(small, tmp_path):
    expected = load_model(small).state_dict()
    (small / "model.safetensors").rename(tmp_path / "big.safetensors")
    (small / "model.safetensors").symlink_to(tmp_path / "big.safetensors")
    assert_same_weights(small, expected)


@pytest.mark.parametrize("file", [INDEX, "config.json"])
def test_a_file_for_which_the_disk_has_no_space_is_named(file, small, tmp_path):
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / file).symlink_to("/dev/full")
    with pytest.raises(OSError, match=f"{tmp_path}/saved/{file}: cannot be written .*No space left"):
        save_model(load_model(small), tmp_path / "saved", like=small)


def test_all_ranks_raise_what_rank_0_cannot_write(small, tmp_path):
    started = time.monotonic()
    output = run_ranks(2, tmp_path / "logs", saves_to_a_full_disk, str(small), str(tmp_path / "saved"))
    assert time.monotonic() - started < 60
    messages = [line for line in output.splitlines() if line.startswith("OSError")]
    assert len(messages) == 2 and messages[0] == messages[1]
    assert f"{tmp_path}/saved/model-000" in messages[0] and "cannot be written" in messages[0]


def test_all_ranks_refuse_a_folder_that_holds_weights(small, tmp_path):
    output = run_ranks(2, tmp_path / "logs", saves_to_a_full_disk, str(small), str(small))
    assert [line.split(":")[0] for line in output.splitlines()].count("ValueError") == 2
