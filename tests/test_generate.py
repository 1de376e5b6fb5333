"""The sampler against plain forward passes, exact probabilities and transformers; jobs that are
killed; the files of AlpacaEval and Arena-Hard.

    pytest tests/test_generate.py
"""
import fcntl
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast

import generate as generate_py
import sampler
from data.preference import encode_pair
from data.prompts import read_prompts
from generate import main
from layouts import write_layout
from model import load_model
from oracles import LLAMA3_MODEL, MISTRAL_MODELS, write_smollm2_tokenizer
from sampler import answer, generate, next_tokens
from small import small_model
from tokenizer import CHAT_FORMATS, load_chat_format, load_tokenizer

ROOT = Path(generate_py.__file__).parent
TINY = ROOT / "data/tiny/model"
PROMPTS = [[5], [7, 8, 9], list(range(10, 31)), [3, 1, 4, 1, 5, 9, 2, 6], [50, 40, 30, 20],
           list(range(9))]
SEEDS = [(0, i) for i in range(len(PROMPTS))]
MODELS = {"llama": {}, "window": {"model_type": "mistral", "sliding_window": 6},
          "tied": {"tie_word_embeddings": True},
          "biases": {"model_type": "qwen2", "max_window_layers": 2}}


def plain_answer(model, prompt, seed, stop_ids, max_new_tokens, temperature, top_p=1.0, top_k=0):
    """One answer by whole forward passes and sorted probabilities in float64: slow, and without
    any of sampler.py."""
    ids, random = list(prompt), np.random.default_rng(seed)
    while len(ids) < len(prompt) + max_new_tokens:
        logits = model(torch.tensor(ids))[-1].detach().double().numpy()
        uniform = random.random()
        if temperature == 0:
            token = int(logits.argmax())
        else:
            order = np.argsort(-logits)[:top_k or None]
            probs = np.exp((logits[order] - logits.max()) / temperature)
            cumulative = np.cumsum(probs / probs.sum())
            n = 1 + int((cumulative < top_p).sum())                    # the fewest that reach top_p
            order, cumulative = order[:n], cumulative[:n]
            if top_p == 1 and top_k == 0:           # nothing is cut: in the vocabulary's order
                order = np.arange(len(logits))
                weights = np.exp(logits / temperature)
                cumulative = np.cumsum(weights / weights.sum())
            token = int(order[(cumulative <= uniform * cumulative[-1]).sum()])
        if token in stop_ids:
            break
        ids.append(token)
    return ids[len(prompt):]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return small_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def tiny():
    tokenizer = load_tokenizer(TINY)
    return load_model(TINY), tokenizer, load_chat_format(TINY, tokenizer)


# --- answers --------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("family", MODELS)
def test_greedy_answers_equal_plain_forward_passes(family, dtype, tmp_path):
    # Two places for six prompts: places are refilled while others run.
    model = small_model(tmp_path, dtype=dtype, **MODELS[family])
    settings = {"stop_ids": {}, "temperature": 0}
    first = generate(model, PROMPTS[:1], seeds=SEEDS[:1], max_new_tokens=8, **settings)
    stop = {first[0][0][5]}
    settings = {"stop_ids": stop, "temperature": 0}
    found = generate(model, PROMPTS, seeds=SEEDS, max_new_tokens=12, batch_size=2, **settings)
    assert found == [[plain_answer(model, p, 0, stop, 12, 0)] for p in PROMPTS]
    assert min(len(ids) for ids, in found) < max(len(ids) for ids, in found) == 12


@pytest.mark.parametrize("settings", [{"temperature": 1.0, "top_p": 1.0},
                                      {"temperature": 0.7, "top_p": 0.9},
                                      {"temperature": 1.5, "top_p": 1.0, "top_k": 5},
                                      {"temperature": 1.0, "top_p": 0.6, "top_k": 20}], ids=str)
def test_an_answer_depends_on_seed_prompt_and_sample_alone(llama, settings):
    stop = {0, 1, 2, 3}
    expected = [[plain_answer(llama, p, [7, i, n], stop, 16, **settings) for n in range(3)]
                for i, p in enumerate(PROMPTS)]
    seeds = [(7, i) for i in range(6)]
    settings = settings | {"samples": 3, "max_new_tokens": 16, "stop_ids": stop}
    for batch_size in (3, 4, 7, 100):
        assert expected == generate(llama, PROMPTS, seeds=seeds, batch_size=batch_size, **settings)
    some = [4, 1]
    assert [expected[i] for i in some] == generate(
        llama, [PROMPTS[i] for i in some], seeds=[seeds[i] for i in some], **settings)
    assert len({tuple(ids) for texts in expected for ids in texts}) > 12
    assert len({len(ids) for texts in expected for ids in texts}) > 4


def test_no_token_is_computed_twice_or_in_vain(llama, monkeypatch):
    """A prompt runs once for all its answers, and a sequence that has ended runs no more."""
    rows, states = [], llama.states
    def counted(tokens, *rest):
        rows.append(len(tokens))
        return states(tokens, *rest)
    monkeypatch.setattr(llama, "states", counted)
    found = generate(llama, PROMPTS, seeds=SEEDS, samples=3, batch_size=7, max_new_tokens=16,
                     stop_ids={0, 1, 2, 3}, temperature=1.0, top_p=1.0)
    lengths = [len(ids) for answers in found for ids in answers]
    assert min(lengths) < 16 == max(lengths)
    sampled = sum(min(n, 15) for n in lengths)      # the 16th token is not run itself
    assert sum(rows) == sum(map(len, PROMPTS)) + sampled
    assert max(rows) <= 7 + sum(map(len, PROMPTS))


def test_an_answer_ends_before_any_end_token(llama):
    settings = {"seeds": SEEDS, "max_new_tokens": 30, "temperature": 1.0, "top_p": 1.0}
    whole = generate(llama, PROMPTS, stop_ids={60}, **settings)
    ends = {whole[0][0][4], whole[1][0][9]}
    cut = generate(llama, PROMPTS, stop_ids=ends, **settings)
    for (long,), (short,) in zip(whole, cut):
        assert short == long[:next((i for i, token in enumerate(long) if token in ends), len(long))]
    assert len(cut[0][0]) <= 4 and len(cut[1][0]) <= 9


def test_weights_are_packed_only_while_it_runs(tmp_path):
    model = small_model(tmp_path, dtype=torch.float32)
    before = model(torch.arange(9))
    generate(model, PROMPTS, seeds=SEEDS, max_new_tokens=2, stop_ids={}, temperature=0)
    assert torch.equal(model(torch.arange(9)), before)
    assert not any("forward" in vars(m) for m in model.modules())


def test_greedy_answers_of_the_tiny_model_equal_transformers(tiny):
    from transformers import AutoModelForCausalLM
    model, tokenizer, chat = tiny
    theirs = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    lines = (ROOT / "data/tiny/prompts.jsonl").read_text().splitlines()[:20]
    prompts = []
    for line in lines:
        turns = [{"role": "user", "content": json.loads(line)["prompt"]}]
        prompts.append(chat.encode_prompt(turns))
    ours = generate(model, prompts, seeds=[(0,)] * 20, max_new_tokens=40, stop_ids=chat.stop_ids,
                    temperature=0)
    for prompt, (ids,) in zip(prompts, ours):
        out = theirs.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)
        out = out[0, len(prompt):].tolist()
        assert ids + [2] == out if out[-1] == 2 else ids == out


@pytest.mark.parametrize("changes, message", [
    ({"temperature": -1.0}, "temperature = -1.0; expected 0 or more"),
    ({"top_p": 0.0}, "top_p = 0.0; expected more"),
    ({"top_k": -1}, "top_k = -1"), ({"samples": 0}, "samples = 0"),
    ({"max_new_tokens": 0}, "max_new_tokens = 0"),
    ({"samples": 5, "batch_size": 4}, "batch_size = 4; expected room for the 5 answers"),
    ({"temperature": 1e-40}, "temperature = 1e-40; expected 0 or more, if it is not 0 at least 1e-06"),
    ({"temperature": math.nan}, "temperature = nan"), ({"temperature": math.inf}, "temperature = inf"),
    ({"temperature": True}, "temperature = True; expected a finite number"),
    ({"top_p": True}, "top_p = True"), ({"top_p": math.nan}, "top_p = nan"), ({"top_p": "0.9"}, "top_p = '0.9'"),
    ({"top_k": True}, "top_k = True; expected a whole number"), ({"top_k": 2.0}, "top_k = 2.0"),
    ({"samples": True}, "samples = True"), ({"max_new_tokens": 4.0}, "max_new_tokens = 4.0"),
    ({"batch_size": math.nan}, "batch_size = nan"),
    ({"max_new_tokens": 240}, "prompt 3 has 21 tokens; .* at most the 256 positions")], ids=str)
def test_settings_out_of_range_are_named(llama, changes, message):
    with pytest.raises(ValueError, match=message):
        generate(llama, PROMPTS, seeds=SEEDS, stop_ids={}, **{"max_new_tokens": 4} | changes)


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 1.0}, {"top_p": 1.0}, {"top_k": 3}],
                         ids=str)
@pytest.mark.parametrize("damage", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_no_answer(tmp_path, damage, settings):
    model = small_model(tmp_path)
    model.head_weight.data[7] = damage
    with pytest.raises(ValueError, match="prompt [1-6]: the model's logits are not finite"):
        generate(model, PROMPTS, seeds=SEEDS, stop_ids={}, max_new_tokens=4, **settings)


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_the_least_temperature_is_greedy_and_not_infinite(top_p):
    logits = torch.randn(500, 40, generator=torch.Generator().manual_seed(0)) * 1000
    uniform = torch.rand(500, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = sampler.sample(logits, uniform, temperature=sampler.LEAST_TEMPERATURE, top_p=top_p)
    assert torch.equal(found, logits.argmax(-1))


def test_a_prompt_without_tokens_is_refused_and_no_prompts_have_no_answers(llama):
    with pytest.raises(ValueError, match="prompt 2 has 0 tokens"):
        generate(llama, [[1], []], seeds=SEEDS[:2], stop_ids={}, max_new_tokens=4)
    assert generate(llama, [], seeds=[], stop_ids={}, max_new_tokens=4) == []


# --- the distribution -----------------------------------------------------------------------------

LOGITS = torch.tensor([1.0, 2.5, 0.3, 2.0, -1.0, 0.9, 1.1, -0.2])


def sample(logits, uniform, **settings):
    """Tokens (B,), of one rank."""
    return torch.tensor(next_tokens(None, logits, uniform, **settings))


def exact_probabilities(temperature, top_p, top_k):
    """In float64, by sorting: of softmax(LOGITS / temperature) the top_k likeliest, of these the
    fewest with top_p."""
    probs = (LOGITS.double() / temperature).softmax(-1).tolist()
    kept = sorted(range(len(probs)), key=lambda t: -probs[t])[:top_k or None]
    masses = list(accumulate(probs[t] for t in kept))
    kept = kept[:1 + sum(mass < top_p * (masses[-1] if top_k else 1) for mass in masses)]
    total = sum(probs[t] for t in kept)
    return torch.tensor([probs[t] / total if t in kept else 0.0 for t in range(len(probs))])


# `first` tokens are sorted at first; with few, rows need all of them.
@pytest.mark.parametrize("first", [1, 3, 256])
@pytest.mark.parametrize("top_k", [0, 1, 3, 7, 100])
@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 1.0), (1.0, 0.8), (1.5, 0.5),
                                                (0.3, 0.999),
                                                (1.0, 0.01)])
def test_samples_follow_the_exact_distribution(temperature, top_p, top_k, first):
    n = 20_000
    # Evenly spaced: shares are exact to 1 / n.
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    tokens = sample(LOGITS.expand(n, -1), uniform, temperature=temperature, top_p=top_p,
                    top_k=top_k, first=first)
    expected = exact_probabilities(temperature, top_p, top_k)
    shares = tokens.bincount(minlength=len(LOGITS)) / n
    assert (shares - expected).abs().max() < 2 / n and not shares[expected == 0].any()


def test_the_extremes_of_uniform_stay_within_what_is_kept():
    logits = torch.randn(2000, 300, generator=torch.Generator().manual_seed(0)) * 3
    for uniform in (0.0, np.nextafter(1.0, 0.0)):
        for top_p, top_k in ((0.9, 0), (1.0, 0), (0.9, 40), (1.0, 40)):
            uniforms = torch.full((2000,), uniform, dtype=torch.float64)
            tokens = sample(logits, uniforms, temperature=1.0, top_p=top_p, top_k=top_k, first=30)
            rank = (logits > logits.gather(1, tokens[:, None])).sum(1)
            if top_p == 1 and top_k == 0:
                assert (tokens == (299 if uniform else 0)).all()
            else:
                assert (rank == 0).all() if uniform == 0 else (rank < (top_k or 300)).all()
                assert uniform == 0 or rank.max() > 20


def test_borders_are_exact():
    logits, uniform = torch.zeros(4, 4), torch.tensor([0.0, 0.25, 0.5, 0.75], dtype=torch.float64)
    # A piece begins with its lower end.
    assert sample(logits, uniform, temperature=1.0).tolist() == [0, 1, 2, 3]
    # The fewest that reach top_p.
    for top_p, n in ((0.25, 1), (0.5, 2), (0.75, 3), (0.76, 4)):
        assert len(set(sample(logits, uniform, temperature=1.0, top_p=top_p).tolist())) == n


def test_a_flat_row_does_not_change_its_peaked_neighbours():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(40, 1000, generator=generator) * torch.linspace(0.1, 8, 40)[:, None]
    uniform = torch.rand(40, generator=generator, dtype=torch.float64)
    together = sample(logits, uniform, temperature=1.0, top_p=0.9)
    settings = {"temperature": 1.0, "top_p": 0.9}
    alone = [sample(logits[i:i + 1], uniform[i:i + 1], **settings).item() for i in range(40)]
    assert together.tolist() == alone
    assert together.tolist() == sample(logits, uniform, first=1000, **settings).tolist()


# --- prompts --------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", CHAT_FORMATS)
def test_sampled_prompts_have_the_ids_of_training_prompts(name, tmp_path, monkeypatch):
    if name == "llama3":
        (tmp_path / "tokenizer.model").write_bytes(Path(LLAMA3_MODEL).read_bytes())
    elif name == "chatml":
        write_smollm2_tokenizer(tmp_path)
    else:
        version = {"mistral-v1": "v1", "mistral-v3": "v3"}.get(name, "v1")
        (tmp_path / "tokenizer.model").write_bytes(Path(MISTRAL_MODELS[version]).read_bytes())
    chat = load_chat_format(tmp_path, load_tokenizer(tmp_path), name)
    turns = [{"role": "system", "content": " Be brief. "},
             {"role": "user", "content": "Hi <|im_end|> </s> there\n"},
             {"role": "assistant", "content": " Hello! "}, {"role": "user", "content": "Bye 👋"}]
    prompts, seen = [turns, turns[1:], turns[1:2], "  naïve\tquestion: 12345? "], []
    monkeypatch.setattr(sampler, "generate", lambda model, ids, **settings:
                        seen.extend(ids) or [[] for _ in ids])
    answer(None, chat, prompts)
    pairs = []
    for p in prompts:       # chosen and rejected are strings, or whole dialogues
        ends = ["a", "b"]
        if not isinstance(p, str):
            ends = [[*p, {"role": "assistant", "content": text}] for text in ends]
        row = {"prompt": p, "chosen": ends[0], "rejected": ends[1]}
        pairs.append(encode_pair(row, "", chat, max_length=10**6, max_prompt_length=10**6))
    assert seen == [pair.prompt.tolist() for pair in pairs] and len(seen) == 4


def test_answer_gives_texts_and_a_batch_does_not_change_them(tiny):
    words = ("owl, moss, fern", "zebra, arrow", "tulip, ivy, canoe, pine")
    prompts = [f"Sort these words: {some}" for some in words]
    job = lambda size: answer(tiny[0], tiny[2], prompts, samples=2, batch_size=size,
                              max_new_tokens=20, seed=3)
    assert job(2) == job(4) == job(100) and [len(texts) for texts in job(4)] == [2, 2, 2]
    assert all(isinstance(text, str) and "," in text for texts in job(4) for text in texts)


# --- jobs -----------------------------------------------------------------------------------------

WORDS = "acorn banana cedar daisy ember flame grape honey island jewel".split()


@pytest.fixture
def prompts_file(tmp_path):
    lines = []
    for n in range(1, 10):
        words = ", ".join(WORDS[-n:] + WORDS[:n % 3])
        lines.append({"prompt": f"Sort these words: {words}", "id": n})
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "p.jsonl"


def run(prompts, output, *flags):
    main(["--model", str(TINY), "--prompts", str(prompts), "--output", str(output),
          "--max_new_tokens", "30",
          "--batch_size", "2", "--samples", "2", *flags])
    return Path(output).read_bytes()


def test_a_killed_job_goes_on_and_writes_the_same_bytes(
        prompts_file, tmp_path, monkeypatch, capsys):
    whole = run(prompts_file, tmp_path / "whole.jsonl")
    rows = [json.loads(line) for line in whole.decode().splitlines()]
    assert [row["id"] for row in rows] == list(range(1, 10))
    assert list(rows[0]) == ["prompt", "id", "all_generated_responses"]
    assert all(len(row["all_generated_responses"]) == 2 for row in rows)
    out = capsys.readouterr().out
    assert "prompts  9 of" in out and "in 3 batches, 0 of them done before" in out
    assert "answers  18/18 on rank 0 of 1" in out and "tokens/s  0.0 min left" in out
    assert "of 18 answers did not" in out

    calls, unharmed = [], generate_py.generate
    def dies(*args, progress, **settings):
        def killed(tokens, answers):
            progress(tokens, answers)
            if len(calls) == 2:
                raise KeyboardInterrupt
        calls.append(1)
        return unharmed(*args, progress=killed, **settings)

    monkeypatch.setattr(generate_py, "generate", dies)
    with pytest.raises(KeyboardInterrupt):
        run(prompts_file, tmp_path / "killed.jsonl")
    assert not (tmp_path / "killed.jsonl").exists()
    assert (tmp_path / "killed.jsonl.parts/000000.json").exists()
    monkeypatch.setattr(generate_py, "generate", unharmed)
    with pytest.raises(ValueError, match="holds answers with temperature = 0.8, found 0.5 now"):
        run(prompts_file, tmp_path / "killed.jsonl", "--temperature", "0.5")
    assert run(prompts_file, tmp_path / "killed.jsonl") == whole
    assert "in 3 batches, 1 of them done before" in capsys.readouterr().out
    assert not (tmp_path / "killed.jsonl.parts").exists()
    with pytest.raises(ValueError, match="killed.jsonl: exists already"):
        run(prompts_file, tmp_path / "killed.jsonl")
    with pytest.raises(ValueError, match="top_p = 2.0; expected more than 0"):
        run(prompts_file, tmp_path / "new.jsonl", "--top_p", "2")
    assert not (tmp_path / "new.jsonl.parts").exists()


def test_sampled_words_come_back_as_the_same_ids_and_answers_that_do_not_are_counted(
        tmp_path, monkeypatch, capsys):
    # A random model of Qwen's kind of vocabulary that writes <tool_call>, which is one token and
    # shows in text. Some ids of its embedding have no token.
    write_layout("qwen2.5-instruct", tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    model = small_model(tmp_path, dtype=torch.float32, vocab_size=tokenizer.vocab_size + 7)
    likely = [*tokenizer.words.values(), tokenizer.special["<|im_end|>"], tokenizer.vocab_size + 3]
    likely += tokenizer.encode("So it is: a b c, 4 2. Or\n", bos=False, eos=False)
    model.lm_head.weight.data *= 0.01
    model.lm_head.weight.data[likely] *= 300
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    lines = [json.dumps({"prompt": f"Say {i}."}) + "\n" for i in range(50)]
    (tmp_path / "prompts.jsonl").write_text("".join(lines))
    sampled, unharmed = [], generate_py.generate
    monkeypatch.setattr(generate_py, "generate", lambda *args, **settings:
                        sampled.extend(answers := unharmed(*args, **settings)) or answers)
    main(["--model", str(tmp_path), "--prompts", str(tmp_path / "prompts.jsonl"),
          "--output", str(tmp_path / "a.jsonl"), "--samples", "4", "--batch_size", "200",
          "--max_new_tokens", "12", "--temperature", "1", "--top_p", "1"])

    reference = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    chat = load_chat_format(tmp_path, tokenizer)
    rows = map(json.loads, open(tmp_path / "a.jsonl"))
    texts = [text for row in rows for text in row["all_generated_responses"]]
    same = words = 0
    for ids in (ids for some in sampled for ids in some):
        known = [i for i in ids if i < tokenizer.vocab_size]
        text = reference.decode(known, skip_special_tokens=True)
        again = reference(text, add_special_tokens=False).input_ids
        assert text in texts and chat.encode_response(text) == [*again, chat.end_id]
        same += again == ids
        words += again == ids and not set(ids).isdisjoint(tokenizer.words.values())
    assert len(texts) == 200 and words > 20 and 20 < same < 180
    assert f"; {200 - same} encode to other tokens than were sampled" in capsys.readouterr().out


def test_a_job_goes_on_with_the_date_of_its_first_day(prompts_file, tmp_path, monkeypatch):
    model = shutil.copytree(TINY, tmp_path / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{{ strftime_now('%d %b %Y') }}" + settings["chat_template"]
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    job = lambda output, *flags: run(prompts_file, tmp_path / output, "--model", str(model), *flags)
    whole = job("whole.jsonl", "--date", "2026-01-31")

    def dies(*args):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(generate_py, "answers_text", dies)
        job("killed.jsonl", "--date", "2026-01-31")
    with pytest.raises(ValueError, match="date = '2026-01-31', found '2026-02-01' now"):
        job("killed.jsonl", "--date", "2026-02-01")
    assert job("killed.jsonl") == whole                                     # on a later day


KILLED = ("--max_new_tokens", "4")


def kill_before_the_end(prompts, output, monkeypatch, *flags):
    """A job that is killed when all parts are there and none is joined."""
    def dies(*args):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(generate_py, "answers_text", dies)
        run(prompts, output, *KILLED, *flags)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.model"])
def test_answers_of_other_config_or_tokenizer_files_are_not_mixed(file, prompts_file, tmp_path, monkeypatch):
    model = shutil.copytree(TINY, tmp_path / "model")
    kill_before_the_end(prompts_file, tmp_path / "a.jsonl", monkeypatch, "--model", str(model))
    changes = {"config.json": {"rms_norm_eps": 0.001}, "generation_config.json": {"eos_token_id": [2, 100]},
               "tokenizer_config.json": {"note": 1}}
    if file in changes:
        fields = json.loads((model / file).read_text())
        (model / file).write_text(json.dumps(fields | changes[file]))
    else:
        # A field that is not known, 1000: 1, changes the file and nothing else.
        (model / file).write_bytes((model / file).read_bytes() + b"\xc0\x3e\x01")
    with pytest.raises(ValueError, match="a.jsonl.parts: holds answers with config and tokenizer = "):
        run(prompts_file, tmp_path / "a.jsonl", *KILLED, "--model", str(model))
    assert len(list((tmp_path / "a.jsonl.parts").glob("0*.json"))) == 3


def test_damaged_parts_are_named_when_they_are_found_and_made_again(prompts_file, tmp_path, monkeypatch, capsys):
    whole = run(prompts_file, tmp_path / "whole.jsonl", *KILLED)
    kill_before_the_end(prompts_file, tmp_path / "a.jsonl", monkeypatch)
    parts = tmp_path / "a.jsonl.parts"
    (parts / "000000.json").write_bytes(b"")
    text = (parts / "000002.json").read_text()
    word = max(text.split(), key=len)
    (parts / "000002.json").write_text(text.replace(word, word[::-1]))
    assert run(prompts_file, tmp_path / "a.jsonl", *KILLED) == whole
    out = capsys.readouterr().out
    assert "in 3 batches, 1 of them done before" in out
    for part in ("000000", "000002"):
        assert f"{part}.json: " in out
    assert out.count("prompts are answered again") == 2


@pytest.mark.parametrize("damage, message", [
    (lambda file: file.write_bytes(b""), "job.json: not valid JSON .*; remove the folder .* to begin anew"),
    (lambda file: file.write_text(file.read_text().replace('"date"', '"dote"')),
     "job.json: damaged, or of an earlier version of this command; remove the folder"),
    (lambda file: file.write_text('{"date": "2026-01-31"}'), "job.json: damaged"),
    (lambda file: file.unlink(), "a.jsonl.parts: holds 00000..json but no job.json")])
def test_a_damaged_job_json_is_one_error_that_says_what_to_do(damage, message, prompts_file, tmp_path, monkeypatch):
    kill_before_the_end(prompts_file, tmp_path / "a.jsonl", monkeypatch)
    parts = tmp_path / "a.jsonl.parts"
    damage(parts / "job.json")
    before = {file.name for file in parts.iterdir()}
    with pytest.raises(ValueError, match=message):
        run(prompts_file, tmp_path / "a.jsonl", *KILLED)
    assert {file.name for file in parts.iterdir()} == before


def test_a_part_that_vanishes_before_the_end_costs_no_other(prompts_file, tmp_path, monkeypatch):
    whole = run(prompts_file, tmp_path / "whole.jsonl", *KILLED)
    unharmed = generate_py.join_parts

    def vanished(job, name):
        job.part(1).unlink()
        unharmed(job, name)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="000001.json: not found; all other parts"):
        patch.setattr(generate_py, "join_parts", vanished)
        run(prompts_file, tmp_path / "a.jsonl", *KILLED)
    assert len(list((tmp_path / "a.jsonl.parts").glob("0*.json"))) == 2 and not (tmp_path / "a.jsonl").exists()
    assert run(prompts_file, tmp_path / "a.jsonl", *KILLED) == whole


@contextmanager
def full_disk(size):
    """Files of this process can have no more than `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("function, file", [("write_part", r"a.jsonl.parts/000000.json"),
                                            ("join_parts", "a.jsonl")])
def test_a_full_disk_is_named_and_the_same_command_goes_on(function, file, prompts_file, tmp_path, monkeypatch):
    whole = run(prompts_file, tmp_path / "whole.jsonl", *KILLED)
    unharmed = getattr(generate_py, function)

    def full(*args):
        with full_disk(64):
            unharmed(*args)
    with monkeypatch.context() as patch, pytest.raises(OSError, match=f"{file}: cannot be written .*too large"):
        patch.setattr(generate_py, function, full)
        run(prompts_file, tmp_path / "a.jsonl", *KILLED)
    assert not (tmp_path / "a.jsonl").exists() and not list(tmp_path.rglob("*.tmp.*"))
    assert run(prompts_file, tmp_path / "a.jsonl", *KILLED) == whole


def test_a_second_job_on_the_same_output_is_told_who_is_at_work(prompts_file, tmp_path):
    with open(tmp_path / "a.jsonl.lock", "w") as held:
        held.write("process 12 on node3")
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="a.jsonl.lock: process 12 on node3 is at work on this output"):
            run(prompts_file, tmp_path / "a.jsonl", *KILLED)
    assert not (tmp_path / "a.jsonl.parts").exists()
    run(prompts_file, tmp_path / "a.jsonl", *KILLED)
    assert not (tmp_path / "a.jsonl.lock").exists()


def test_a_folder_of_somebodys_is_not_taken_for_parts(prompts_file, tmp_path):
    (tmp_path / "a.jsonl.parts").mkdir()
    (tmp_path / "a.jsonl.parts/thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="a.jsonl.parts: holds thesis.txt but no job.json"):
        run(prompts_file, tmp_path / "a.jsonl", *KILLED)
    assert (tmp_path / "a.jsonl.parts/thesis.txt").exists()


def test_a_clock_that_jumps_does_not_show(monkeypatch):
    said = []
    jumps = iter(range(0, -10**9, -86400))
    monkeypatch.setattr(generate_py, "say", said.append)
    monkeypatch.setattr(generate_py.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    progress = generate_py.Progress(2)
    progress(5, 1)
    progress(5, 1)
    monkeypatch.undo()
    assert len(said) == 1 and "2/2 on rank 0 of 1" in said[0] and "-" not in said[0]


def test_a_stdout_that_is_gone_does_not_end_sampling(prompts_file, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    flags = ["--model", str(TINY), "--prompts", str(prompts_file), "--output", str(tmp_path / "a.jsonl"), *KILLED]
    done = subprocess.run([sys.executable, "generate.py", *flags], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert done.returncode == 0 and not done.stderr
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 9


def test_ranks_write_the_same_bytes_as_one(prompts_file, tmp_path):
    flags = ["--model", str(TINY), "--prompts", str(prompts_file),
             "--output", str(tmp_path / "two.jsonl"),
             "--samples", "2", "--max_new_tokens", "30", "--batch_size", "2"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    done = subprocess.run([*torchrun, "generate.py", *flags], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    assert "on rank 0 of 2" in done.stdout
    threads = torch.get_num_threads()
    # As torchrun does: another number of threads may round differently.
    torch.set_num_threads(1)
    assert (tmp_path / "two.jsonl").read_bytes() == run(prompts_file, tmp_path / "one.jsonl")
    torch.set_num_threads(threads)


def test_the_command_line_prints_answers(capsys):
    main(["--model", str(TINY), "--prompt", "Sort these words: owl, moss", "--samples", "3",
          "--max_new_tokens", "20"])
    out = capsys.readouterr().out
    assert out.count("\n---\n") == 2 and "moss" in out
    for flags in ([], ["--prompts", "p.jsonl"], ["--prompt", "?", "--output", "a"],
                  ["--prompt", "?", "--seed", "-1"]):
        with pytest.raises(SystemExit) as stopped:
            main(["--model", str(TINY), *flags])
        assert stopped.value.code == 2


def test_an_error_is_one_line(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "Sort these words: owl, moss"}\n{"promt": "?"}\n')
    flags = ["--model", str(TINY), "--prompts", f"{tmp_path}/p.jsonl",
             "--output", f"{tmp_path}/a.jsonl", "--max_new_tokens", "30"]
    done = subprocess.run([sys.executable, "generate.py", *flags], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path}/p.jsonl:2: fields ['promt']; expected")
    assert done.stderr.count("\n") == 1 and not (tmp_path / "a.jsonl").exists()


# --- the files of AlpacaEval and Arena-Hard -------------------------------------------------------

# Written by hand after lines of the published files: alpaca_eval.json, and
# results/NAME/model_outputs.json.
ALPACA = [{"instruction": "Sort these words: owl, moss", "output": "moss, owl.",
           "generator": "gpt4_1106_preview",
           "dataset": "helpful_base", "datasplit": "eval"},
          {"instruction": "Sort these words: “pine”, fern\n", "dataset": "koala"}]
ALPACA_OUTPUT = {"dataset": str, "instruction": str, "output": str, "generator": str}
# arena-hard-v0.1/question.jsonl, and model_answer/gpt-4-0314.jsonl.
ARENA = [{"question_id": "96d2e87e1be8490181fc62cbee45a18e", "category": "arena-hard-v0.1",
          "cluster": "Keyboard Key Functions & Layout",
          "turns": [{"content": "Sort these words: owl, moss"}]},
         {"question_id": "4f8bbc6867bb420aa1c457bffd1a27d1", "category": "arena-hard-v0.1",
          "cluster": "Options Trading Strategies",
          "turns": [{"content": "Sort these words: pine, fern, lily"}]}]
ARENA_OUTPUT = {"question_id": str, "answer_id": str, "model_id": str, "choices": list,
                "tstamp": float}


def types_of(row):
    return {key: type(value) for key, value in row.items()}


def flags_of(*extra):
    return ["--samples", "1", "--name", "tiny-alphapo", *extra]


@pytest.mark.parametrize("array", [True, False], ids=["array", "lines"])
def test_alpaca_eval_prompts_become_its_model_outputs(array, tmp_path):
    lines = "".join(json.dumps(row) + "\n" for row in ALPACA)
    (tmp_path / "p.json").write_text(json.dumps(ALPACA, indent=2) if array else lines)
    outputs = json.loads(run(tmp_path / "p.json", tmp_path / "model_outputs.json", *flags_of()))
    assert list(map(types_of, outputs)) == [ALPACA_OUTPUT] * 2
    for row, asked in zip(outputs, ALPACA):
        assert row["instruction"] == asked["instruction"] and row["dataset"] == asked["dataset"]
        assert row["generator"] == "tiny-alphapo" and row["output"] not in ("", asked.get("output"))


def test_arena_hard_questions_become_its_model_answers(tmp_path, tiny):
    (tmp_path / "question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ARENA))
    output = run(tmp_path / "question.jsonl", tmp_path / "tiny.jsonl", *flags_of("--samples", "2"))
    lines = output.decode().splitlines()
    answers = list(map(json.loads, lines))
    assert list(map(types_of, answers)) == [ARENA_OUTPUT] * 2
    assert [row["question_id"] for row in answers] == [row["question_id"] for row in ARENA]
    assert len({row["answer_id"] for row in answers}) == 2
    assert {row["model_id"] for row in answers} == {"tiny-alphapo"}
    prompts = [row["turns"][0]["content"] for row in ARENA]
    texts = answer(tiny[0], tiny[2], prompts, samples=2, batch_size=2, max_new_tokens=30)
    for row, some in zip(answers, texts):
        assert [choice["index"] for choice in row["choices"]] == [0, 1]
        for choice, text in zip(row["choices"], some):
            (turn,) = choice["turns"]
            n_tokens = len(tiny[1].encode(text, bos=False, eos=False))
            assert turn == {"content": text, "token_len": n_tokens}


@pytest.mark.parametrize("content, message", [
    ("", "no prompts"), ("[]", "no prompts"), ('[{"instruction": "a"}', "not a valid JSON array"),
    ('[{"instruction": "a"}, 3]', "item 2: expected a JSON object, found 3"),
    ('{"prompt": "a"}\n{"instruction": "b"}', "p:2: of the shape alpaca_eval; expected responses"),
    ('{"prompt": "a"}\n\n{"prompt": []}', r"p:3: prompt is \[\]; expected a string"),
    ('{"prompt": 3}', "p:1: prompt is 3; expected a string"),
    ('{"instruction": 3}', r"p:1: fields \['instruction'\]"),
    ('{"instruction": "a", "input": "b"}', "p:1: instruction with an input"),
    ('{"question_id": "x", "turns": [{"content": "a"}, {"content": "b"}]}',
     "p:1: turns is .*; expected a list of one"),
    ('{"question_id": "x", "turns": [{"text": "a"}]}',
     "p:1: turn .*; expected an object with a string role"),
    ('{"question": "x"}',
     r"p:1: fields \['question'\]; expected prompt, or instruction \(AlpacaEval\)"),
    ('{"prompt": "a"', "p:1: not valid JSON"),
    ('{"prompt": [{"role": "assistant", "content": "a"}]}', "p:1: prompt has the roles"),
], ids=range(14))
def test_prompts_of_another_shape_are_refused_by_line(content, message, tmp_path, tiny):
    (tmp_path / "p").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / "p", tiny[2].encode_prompt)


def test_alpaca_eval_has_one_answer_a_prompt(tmp_path):
    (tmp_path / "p.json").write_text(json.dumps(ALPACA))
    with pytest.raises(ValueError, match="samples = 2; expected 1"):
        run(tmp_path / "p.json", tmp_path / "o.json")
