"""Small models for the tests: a config folder, random weights that matter, and pairs of random
tokens."""
import json

import numpy as np
import torch

from data.preference import PreferencePair
from model import Transformer, read_config

# What a step's line of metrics.jsonl says of time.
TIMES = ("tokens_per_second", "seconds", "seconds_rows", "seconds_between")

CONFIG = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 60,
          "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 256,
          "tie_word_embeddings": False, "hidden_act": "silu"}


def small_model(folder, seed=0, dtype=torch.float64, **changes):
    """A Transformer with random weights of a size at which every part of it shows in the logits."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    model = Transformer(read_config(folder)).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3 + (p.ndim == 1))
    return model


def random_pairs(lengths, vocab_size=60, seed=0):
    """PreferencePairs of random tokens, of the given (prompt, chosen, rejected) lengths."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n):
        return torch.randint(vocab_size, (n,), generator=generator, dtype=torch.int32).numpy()

    pairs = []
    for i, (P, C, R) in enumerate(lengths, 1):
        pairs.append(PreferencePair(draw(P), draw(C), draw(R), f"pairs.jsonl:{i}"))
    return pairs


def sequence_logp(model, prompt, response):
    """Log-probs of a response's tokens, by running its sequence alone and a plain log_softmax.
    -> (len(response),)"""
    logits = model(torch.from_numpy(np.concatenate((prompt, response))).long())[len(prompt) - 1:-1]
    return logits.log_softmax(-1)[range(len(response)), response]
