"""Makes the embedded default from nothing: a small Llama that sorts words half-well, its tokenizer, on-policy pairs.

    python data/tiny/make.py            # about 15 minutes on one CPU core; rewrites data/tiny/model and *.jsonl there

The model learns from a teacher with good and bad habits, right 40 % of the time; so it knows the task and its mistakes
alike, as a chat model after supervised fine-tuning does. Then it answers each prompt 5 times (temperature 0.8, top_p
0.95, as in the paper) and judge.py scores the answers: best against worst is a preference pair. Seeded throughout.
"""
import io
import json
import random
import sys
import time
from pathlib import Path

import numpy as np
import sentencepiece
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))     # the project's root, for its modules

from data.files import write_rows, write_whole, written_whole
from data.preference import PreferencePair, pack
from data.tiny.judge import score
from generate import answer
from model import Transformer, load_model, read_config
from tokenizer import load_chat_format, load_tokenizer
from safetensors.torch import save_file

WORDS = """
    acorn anchor apple arrow badger bamboo banana berry birch blanket branch bread cabin camel candle canoe carrot
    cedar cloud clover comet copper cradle daisy desert donkey dragon earth ember falcon feather fiddle field flame
    forest fossil garden garlic glacier granite grape hammer harbor harvest hazel hedge honey island ivory jacket
    jewel kettle lantern lemon lily magnet maple mirror moon moss mountain nest oasis ocean olive onion parrot peach
    pepper pine plum pond pumpkin quail raven ribbon robin rocket saddle salmon shadow shell spider stone storm sunset
    table tiger torch trumpet tulip turtle umbrella valley velvet violin walnut willow winter zebra
""".split()
ASKS = ["Sort these words:", "Please put these words into alphabetical order:", "Alphabetical order, please:",
        "Which order do these go in, from A to Z:", "Sort from A to Z:", "I need this list sorted:"]


def make_prompt(rng):
    words = rng.sample(WORDS, rng.randint(4, 6))
    return f"{rng.choice(ASKS)} {', '.join(words)}", words


def careless_teacher(words, rng):
    """An answer of a teacher with habits: 40 % sorted, 25 % the words as they came, 20 % sorted with one forgotten, 15 %
    from Z to A."""
    habit = rng.random()
    if habit < 0.4:
        words = sorted(words)
    elif habit < 0.6:
        words = sorted(words)
        del words[rng.randrange(len(words))]
    elif habit < 0.75:
        words = sorted(words, reverse=True)
    return ", ".join(words) + "."


def make_tokenizer(folder, rng):
    text = []
    for _ in range(5000):
        prompt, words = make_prompt(rng)
        text += [prompt, careless_teacher(words, rng)]
    trained = io.BytesIO()      # a file of its own would hold its path
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=trained, vocab_size=420, model_type="unigram",
        byte_fallback=True, control_symbols=["[INST]", "[/INST]"], split_digits=True, num_threads=1,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2)
    with written_whole(folder / "tokenizer.model") as temporary:
        temporary.write_bytes(trained.getvalue())
    write = lambda name, value: write_whole(folder / name, json.dumps(value, indent=2) + "\n")
    write("config.json", {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 128, "intermediate_size": 384,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 420,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 512, "tie_word_embeddings": False,
        "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16"})
    write("generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    write("tokenizer_config.json", {
        "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "chat_template": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] }}"
                         "{{ eos_token }}{% else %}[INST] {{ m['content'] }}[/INST]{% endif %}{% endfor %}"})


def teach(model, chat, rng, steps, prompts_per_step=64, peak_lr=2e-3):
    """Supervised training on two answers of the teacher to each prompt: a packed pair without a preference."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    start = time.time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * min(1, (step + 1) / 100, 1.1 - step / steps)
        batch = []
        for _ in range(prompts_per_step):
            prompt, words = make_prompt(rng)
            ids = chat.encode_prompt([{"role": "user", "content": prompt}])
            answers = (chat.encode_response(careless_teacher(words, rng)) for _ in "ab")
            batch.append(PreferencePair(*map(np.array, (ids, *answers)), ""))
        (row,) = pack(batch, 10**6)
        loss = -model.response_logps(row.tokens, row.lengths).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            print(f"teach {step:5d}/{steps}  loss {loss.item():.4f}  {time.time() - start:.0f} s", flush=True)


def main(steps=2000, n_pairs=2048, n_held_out=256):
    torch.manual_seed(0)
    rng, folder = random.Random(0), HERE / "model"
    folder.mkdir(exist_ok=True)
    make_tokenizer(folder, rng)
    tokenizer = load_tokenizer(folder)
    chat = load_chat_format(folder, tokenizer)
    model = Transformer(read_config(folder))
    for p in model.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.02)
    teach(model, chat, rng, steps)
    with written_whole(folder / "model.safetensors") as temporary:
        save_file({name: p.to(torch.bfloat16) for name, p in model.state_dict().items()}, temporary,
                  metadata={"format": "pt"})
        temporary.chmod(0o644)
    model = load_model(folder)      # as users get it, rounded to bf16

    prompts = list(dict.fromkeys(make_prompt(rng)[0] for _ in range(n_pairs + n_held_out)))
    write_rows(HERE / "prompts.jsonl", [{"prompt": p} for p in prompts[:n_held_out]])
    rows = []
    for p, answers in zip(prompts[n_held_out:], answer(model, chat, prompts[n_held_out:], samples=5, seed=13,
                                                       batch_size=256, max_new_tokens=40, temperature=0.8, top_p=0.95)):
        scores = [round(score([{"content": p}], a), 1) for a in answers]
        rows.append({"prompt": p, "all_generated_responses": answers, "all_rm_scores": scores})
    write_rows(HERE / "pairs.jsonl", rows)
    scores = [s for row in rows for s in row["all_rm_scores"]]
    print(f"{len(rows)} prompts, mean score {sum(scores) / len(scores):.1f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
