"""Makes golden_logits.json: what transformers computes for small checkpoints of every kind that
model.py reads.

    python tests/make_golden.py

Weights follow from a formula of their name, so the golden values depend on no random generator and
test_model.py can check them without transformers. It builds its other checkpoints with the
functions of this file too.
"""
import json
import math
import zlib
from pathlib import Path

import torch
from safetensors.torch import save_file

GOLDEN = Path(__file__).with_name("golden_logits.json")
TOKENS = torch.arange(96) ** 2 * 37 % 101
ROWS = [0, 1, 31, 64, 95]               # the positions of TOKENS whose logits are kept

SMALL = dict(
    vocab_size=101, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-3)
LLAMA31_ROPE = dict(
    rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=64)
LLAMA3_ROPE = dict(rope_type="default", rope_theta=500000.0)
QWEN2_ROPE = dict(rope_type="default", rope_theta=1000000.0)
LONG = dict(rope_parameters=LLAMA31_ROPE, max_position_embeddings=512)

# Of each case the model_type and the fields in which it differs from SMALL.
CASES = {
    "llama2": ("llama", dict(num_key_value_heads=4)),
    "llama3": ("llama", dict(rope_parameters=LLAMA3_ROPE)),
    "llama31": ("llama", LONG),
    "llama32": ("llama", dict(**LONG, tie_word_embeddings=True)),
    "head_dim": ("llama", dict(head_dim=24)),
    "mistral": ("mistral", dict(sliding_window=16)),
    "mistral_full": ("mistral", dict(sliding_window=None)),
    "qwen2": ("qwen2", dict(rope_parameters=QWEN2_ROPE)),
    "qwen3": ("qwen3", dict(head_dim=24, tie_word_embeddings=True)),
}


def formula_weight(name, shape):
    """The fp32 weight of that name: a chirp whose rate is the name's checksum. Logits come out of
    order 1."""
    n = torch.arange(math.prod(shape), dtype=torch.float64)
    wave = torch.sin(n * n * (1 + zlib.crc32(name.encode()) / 2**32)).view(shape)
    if "norm" in name:
        return (1 + wave / 2).float()
    if name.endswith("bias"):
        return (wave / 2).float()
    return (wave / math.sqrt(shape[-1])).float()


def write_checkpoint(folder, config, shapes):
    """A checkpoint folder without transformers: config.json and the formula's weights in one
    file."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    weights = {name: formula_weight(name, shape) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors")


def transformers_checkpoint(case, folder, **save_options):
    """The same, written by transformers. Returns its model."""
    from transformers import AutoConfig, AutoModelForCausalLM
    model_type, fields = CASES[case]
    config = AutoConfig.for_model(model_type, **SMALL | fields)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(formula_weight(name, p.shape))
    model.save_pretrained(folder, **save_options)
    return model.eval()


@torch.no_grad()
def main():
    import tempfile

    import transformers
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    golden = {"made_with": versions}
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            model = transformers_checkpoint(case, folder)
            config = json.loads((Path(folder) / "config.json").read_text())
        logits = model(TOKENS[None]).logits[0, ROWS]                            # (5, V)
        golden[case] = {
            "config": config,
            "shapes": {name: list(p.shape) for name, p in model.named_parameters()},
            "logits": [[round(z, 7) for z in row] for row in logits.tolist()],
        }
    GOLDEN.write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()
