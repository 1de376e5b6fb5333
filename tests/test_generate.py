"""The sampler against plain forward passes and exact probabilities. Run: pytest tests/test_generate.py"""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import generate as generate_py
from generate import answer, generate, sample
from model import load_model
from small import small_model
from tokenizer import load_chat_format, load_tokenizer

ROOT = Path(generate_py.__file__).parent
PROMPTS = [[5], [7, 8, 9], list(range(10, 31)), [3, 1, 4, 1, 5, 9, 2, 6]]


@pytest.mark.parametrize("changes", [{}, {"model_type": "mistral", "sliding_window": 6}, {"tie_word_embeddings": True}],
                         ids=["llama", "window", "tied"])
def test_greedy_answers_of_a_batch_equal_plain_forward_passes(changes, tmp_path):
    model = small_model(tmp_path, **changes)
    answers = generate(model, PROMPTS, seeds=[0] * 4, max_new_tokens=12, stop_ids={60}, temperature=0)
    for prompt, found in zip(PROMPTS, answers):
        ids = list(prompt)
        for _ in range(12):
            ids.append(model(torch.tensor(ids))[-1].argmax().item())
        assert found == ids[len(prompt):]


def test_an_answer_ends_before_any_end_token(tmp_path):
    model = small_model(tmp_path)
    whole = generate(model, PROMPTS, seeds=range(4), max_new_tokens=30, stop_ids={60}, temperature=1.0, top_p=1.0)
    ends = {whole[0][4], whole[1][9]}
    cut = generate(model, PROMPTS, seeds=range(4), max_new_tokens=30, stop_ids=ends, temperature=1.0, top_p=1.0)
    for long, short in zip(whole, cut):
        first = next((i for i, token in enumerate(long) if token in ends), len(long))
        assert short == long[:first]
    assert len(cut[0]) <= 4 and len(cut[1]) <= 9


def test_an_answer_depends_on_its_seed_and_not_on_its_neighbours(tmp_path):
    model = small_model(tmp_path)
    settings = {"max_new_tokens": 10, "stop_ids": {60}, "temperature": 1.0, "top_p": 0.9}
    together = generate(model, PROMPTS, seeds=[1, 2, 3, 4], **settings)
    assert [generate(model, [p], seeds=[s], **settings)[0] for p, s in zip(PROMPTS, [1, 2, 3, 4])] == together
    assert generate(model, PROMPTS, seeds=[5, 6, 7, 8], **settings) != together


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 1.0), (1.0, 0.8), (1.5, 0.5)])
def test_samples_follow_the_exact_distribution(temperature, top_p):
    logits = torch.tensor([1.0, 2.5, 0.3, 2.0, -1.0, 0.9])
    probs = (logits.double() / temperature).softmax(-1)
    kept, mass = set(), 0.0
    for token in probs.argsort(descending=True).tolist():      # the smallest set of likeliest tokens that reaches top_p
        if mass >= top_p:
            break
        kept.add(token)
        mass += probs[token].item()
    expected = torch.tensor([probs[t].item() / mass if t in kept else 0.0 for t in range(6)])

    n = 20_000
    uniform = (torch.arange(n) + 0.5) / n                      # evenly spaced: shares are exact to 1 / n, no luck in it
    shares = sample(logits.expand(n, -1), temperature, top_p, uniform).bincount(minlength=6) / n
    assert (shares - expected).abs().max() < 2 / n


def test_greedy_answers_of_the_tiny_model_equal_transformers(tmp_path):
    from transformers import AutoModelForCausalLM
    folder = ROOT / "data/tiny/model"
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    chat = load_chat_format(folder, tokenizer)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    lines = (ROOT / "data/tiny/prompts.jsonl").read_text().splitlines()[:20]
    prompts = [chat.encode_prompt([{"role": "user", "content": json.loads(line)["prompt"]}]) for line in lines]
    ours = generate(model, prompts, seeds=[0] * 20, max_new_tokens=40, stop_ids=chat.stop_ids, temperature=0)
    for prompt, ids in zip(prompts, ours):
        out = theirs.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)[0, len(prompt):].tolist()
        assert ids + [2] == out if out[-1] == 2 else ids == out


def test_a_batch_does_not_change_the_answers_of_a_job():
    folder = ROOT / "data/tiny/model"
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    chat = load_chat_format(folder, tokenizer)
    prompts = [f"Sort these words: {words}" for words in ("owl, moss, fern", "zebra, arrow", "tulip, ivy, canoe, pine")]
    job = lambda size: answer(model, tokenizer, chat, prompts, samples=2, batch_size=size, max_new_tokens=20, seed=3)
    assert job(1) == job(4) == job(100) and [len(texts) for texts in job(4)] == [2, 2, 2]


def test_the_command_line_writes_answers_beside_the_prompts(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "Sort these words: owl, moss", "id": 7}\n')
    run = lambda *flags: subprocess.run([sys.executable, "generate.py", "--model", "data/tiny/model", *flags], cwd=ROOT,
                                        capture_output=True, text=True)
    done = run("--prompts", f"{tmp_path}/p.jsonl", "--output", f"{tmp_path}/a.jsonl", "--samples", "3")
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "a.jsonl").read_text())
    assert row["id"] == 7 and len(row["all_generated_responses"]) == 3 and all(row["all_generated_responses"])
    assert run("--prompts", f"{tmp_path}/p.jsonl").returncode == 2
