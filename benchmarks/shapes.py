"""The shapes of real models, as their config.json has them, for benchmarks without weights."""
import json
import tempfile
from pathlib import Path

from model import read_config


def _shape(kind, dim, hidden_dim, layers, heads, kv_heads, vocab, **more):
    return {
        "model_type": kind,
        "hidden_size": dim,
        "intermediate_size": hidden_dim,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "max_position_embeddings": 32768,
        "hidden_act": "silu",
        "tie_word_embeddings": False} | more


SHAPES = {
    "Llama-3-8B": _shape("llama", 4096, 14336, 32, 32, 8, 128256),
    "Llama-3.2-1B": _shape("llama", 2048, 8192, 16, 32, 8, 128256, tie_word_embeddings=True),
    "Llama-3.2-3B": _shape("llama", 3072, 8192, 28, 24, 8, 128256, tie_word_embeddings=True),
    "Mistral-7B": _shape("mistral", 4096, 14336, 32, 32, 8, 32000, sliding_window=None),
    "Mistral-7B-window": _shape("mistral", 4096, 14336, 32, 32, 8, 32000, sliding_window=4096),
    "Qwen2.5-7B": _shape("qwen2", 3584, 18944, 28, 28, 4, 152064),
    "Qwen3-8B": _shape("qwen3", 4096, 12288, 36, 32, 8, 151936, head_dim=128),
    "small": _shape("llama", 64, 128, 2, 4, 2, 500),
}


def config_of(model, layers=None):
    """ModelConfig of a folder or of one of SHAPES, cut to so many layers."""
    if model not in SHAPES:
        return read_config(model)
    with tempfile.TemporaryDirectory() as folder:
        shape = SHAPES[model] | ({"num_hidden_layers": layers} if layers else {})
        (Path(folder) / "config.json").write_text(json.dumps(shape))
        return read_config(folder)
