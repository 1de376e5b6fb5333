"""Makes the embedded default from nothing: a small Llama that sorts words half-well, its tokenizer,
and preference pairs of its own answers (on-policy).

    python -m data.tiny.make        # from the repository's root: about 15 minutes on one CPU core

Rewrites data/tiny/model and the *.jsonl beside it. The model learns from a teacher with good and
bad habits, right 40 % of the time. So it knows the task and its mistakes alike, as a chat model
after supervised fine-tuning does. Then it answers each prompt 5 times (temperature 0.8, top_p 0.95,
as in the paper) and judge.py scores the answers: best against worst is a preference pair.
Everything is seeded.
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
from safetensors.torch import save_file

from data.files import write_records, write_whole, written_whole
from data.preference import PreferencePair, pack
from data.tiny.judge import score
from model import Transformer, load_model, read_config
from sampler import answer
from tokenizer import load_chat

HERE = Path(__file__).parent


# --- the task -------------------------------------------------------------------------------------

WORDS = """
    acorn anchor apple arrow badger bamboo banana berry birch blanket branch bread cabin camel
    candle canoe carrot cedar cloud clover comet copper cradle daisy desert donkey dragon earth
    ember falcon feather fiddle field flame forest fossil garden garlic glacier granite grape hammer
    harbor harvest hazel hedge honey island ivory jacket jewel kettle lantern lemon lily magnet
    maple mirror moon moss mountain nest oasis ocean olive onion parrot peach pepper pine plum pond
    pumpkin quail raven ribbon robin rocket saddle salmon shadow shell spider stone storm sunset
    table tiger torch trumpet tulip turtle umbrella valley velvet violin walnut willow winter zebra
""".split()

# All of them end with a colon: behind it judge.py finds the words.
ASKS = ["Sort these words:", "Please put these words into alphabetical order:",
        "Alphabetical order, please:", "Which order do these go in, from A to Z:",
        "Sort from A to Z:", "I need this list sorted:"]


def make_prompt(rng):
    """(prompt, its words): a request to sort 4 to 6 words."""
    words = rng.sample(WORDS, rng.randint(4, 6))
    return f"{rng.choice(ASKS)} {', '.join(words)}", words


def careless_teacher(words, rng):
    """An answer of a teacher with habits: 40 % sorted, 25 % the words as they came, 20 % sorted
    with one forgotten, 15 % from Z to A."""
    habit = rng.random()
    if habit < 0.4:
        words = sorted(words)
    elif habit < 0.6:
        words = sorted(words)
        del words[rng.randrange(len(words))]
    elif habit < 0.75:
        words = sorted(words, reverse=True)
    return ", ".join(words) + "."


# --- the folder of the model ----------------------------------------------------------------------

# Mistral's layout of a dialogue, which is about the shortest.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}"
    "{% else %}[INST] {{ m['content'] }}[/INST]{% endif %}"
    "{% endfor %}")


def make_tokenizer(folder, rng):
    """Trains a sentencepiece tokenizer on dialogues of the task, into `folder`."""
    # Prompts and answers apart: no piece of the vocabulary may span the two.
    text = []
    for _ in range(5000):
        prompt, words = make_prompt(rng)
        text += [prompt, careless_teacher(words, rng)]
    trained = io.BytesIO()      # if it wrote a file itself, that would hold the file's path
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=trained,
        vocab_size=420,
        model_type="unigram",
        byte_fallback=True,             # as Llama's: any text can be encoded
        control_symbols=["[INST]", "[/INST]"],
        split_digits=True,
        num_threads=1,                  # the same result on every machine
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2)                  # errors alone
    with written_whole(folder / "tokenizer.model") as temporary:
        temporary.write_bytes(trained.getvalue())


def write_configs(folder):
    """Writes the three JSON files that a Hugging Face folder has beside weights and vocabulary."""
    write_json(folder / "config.json", {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,       # grouped-query attention, as in the large models
        "vocab_size": 420,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    })
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "chat_template": CHAT_TEMPLATE,
    })


def write_json(path, value):
    write_whole(path, json.dumps(value, indent=2) + "\n")


# --- supervised training --------------------------------------------------------------------------

def teach(model, chat, rng, steps, prompts_per_step=64, peak_lr=2e-3):
    """Trains the model on two answers of the teacher to each prompt: a packed pair in which none is
    preferred. The loss is the mean negative log-prob of their tokens."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=peak_lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    start = time.time()
    for step in range(steps):
        # 1. The learning rate: up for 100 steps, and down to a tenth after a tenth of the run.
        warmup = (step + 1) / 100
        decay = 1.1 - step / steps
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * min(1, warmup, decay)

        # 2. A packed row of new prompts, each with two answers.
        pairs = []
        for _ in range(prompts_per_step):
            prompt, words = make_prompt(rng)
            prompt_ids = chat.encode_prompt([{"role": "user", "content": prompt}])
            first_ids = chat.encode_response(careless_teacher(words, rng))
            second_ids = chat.encode_response(careless_teacher(words, rng))
            pairs.append(PreferencePair(
                np.array(prompt_ids), np.array(first_ids), np.array(second_ids), source=""))
        (row,) = pack(pairs, 10**6)     # so large a budget that it is one row

        # 3. An optimiser step.
        loss = -model.response_logps(row.tokens, row.lengths).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            seconds = time.time() - start
            print(f"teach {step:5d}/{steps}  loss {loss.item():.4f}  {seconds:.0f} s", flush=True)


# --- all of it ------------------------------------------------------------------------------------

def main(steps=2000, n_pairs=2048, n_held_out=256):
    torch.manual_seed(0)        # the first weights
    rng = random.Random(0)      # prompts and the teacher
    folder = HERE / "model"
    folder.mkdir(exist_ok=True)

    # 1. The tokenizer, and a model with random weights.
    make_tokenizer(folder, rng)
    write_configs(folder)
    chat = load_chat(folder)
    model = Transformer(read_config(folder))
    for p in model.parameters():
        if p.ndim == 2:         # matrices; norms stay at 1
            torch.nn.init.normal_(p, std=0.02)

    # 2. Supervised training. Go on with the weights as users get them, rounded to bf16.
    teach(model, chat, rng, steps)
    tensors = {name: p.to(torch.bfloat16) for name, p in model.state_dict().items()}
    with written_whole(folder / "model.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
        temporary.chmod(0o644)      # safetensors writes files that only their owner reads
    model = load_model(folder)

    # 3. Prompts, each of them once: the first are held out, the others get answers.
    drawn = [make_prompt(rng)[0] for _ in range(n_pairs + n_held_out)]
    prompts = list(dict.fromkeys(drawn))
    held_out = prompts[:n_held_out]
    answered = prompts[n_held_out:]
    write_records(HERE / "prompts.jsonl", [{"prompt": prompt} for prompt in held_out])

    # 4. Answers of the model itself, and their scores.
    answers_to_all = answer(model, chat, answered, samples=5, seed=13, batch_size=256,
                            max_new_tokens=40, temperature=0.8, top_p=0.95)
    records = []
    all_scores = []
    for prompt, answers in zip(answered, answers_to_all):
        scores = [round(score([{"content": prompt}], text), 1) for text in answers]
        all_scores += scores
        records.append(
            {"prompt": prompt, "all_generated_responses": answers, "all_rm_scores": scores})
    write_records(HERE / "pairs.jsonl", records)
    print(f"{len(records)} prompts, mean score {sum(all_scores) / len(all_scores):.1f}")


if __name__ == "__main__":
    # For a quick try: steps, pairs and held-out prompts, as numbers.
    main(*[int(word) for word in sys.argv[1:]])
