"""Token ids against the official encoders, the chat formats letter by letter, and what load_tokenizer refuses.

    pytest tests/test_tokenizer.py
"""
import ast
import base64
import datetime
import io
import itertools
import json
import random
import shutil
import subprocess
import sys
import threading
import unicodedata
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
from llama_models.llama3.tokenizer import Tokenizer as Llama3Tokenizer
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

import tokenizer as tokenizer_module
from oracles import LLAMA3_MODEL, MISTRAL_MODELS, llama3_prompt, mistral_ids, write_smollm2_tokenizer
from tokenizer import (BREAK, CHAT_FORMATS, BytePairTokenizer, SentencePieceTokenizer, load_chat,
                       load_chat_format, load_tokenizer)

# --- generated dialogues ----------------------------------------------------------------------------------------------

WORDS = ["the", "Hello", "don't", "WE'LL", "naïve", "straße", "привет", "γειά", "שלום", "مرحبا", "नमस्ते", "你好世界",
         "こんにちは", "안녕하세요", "👍🏽", "👨‍👩‍👧", "🇫🇷", "e\u0301", "1", "42", "12345678",
         "3.14", "x_1", "...", "?!", "—", "“q”", "def f(x):\n    return x ** 2\n", "<b>a && b</b>",
         "https://a.io/?q=1&r=%20",
         "{'k': [1, 2]}", "\\n", "\u200b"]
SPACES = [" ", " ", " ", "", "  ", "     ", "\n", "\n\n", "\n\n\n", "\t", " \n ", "\r\n", "\u00a0", "\u3000"]
CONTROL_TEXTS = ["<s>", "</s>", "<unk>", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "[TOOL_CALLS]",
                 "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_of_text|>", "<|im_start|>",
                 "<|im_end|>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<filename>"]
ALPHABETS = [(0x21, 0x7E), (0xA1, 0x24F), (0x300, 0x36F), (0x391, 0x52F), (0x5D0, 0x5EA), (0x621, 0x64A),
             (0x905, 0x939), (0x2010, 0x2027), (0x3041, 0x30FF), (0x4E00, 0x9FA5), (0xAC00, 0xD7A3), (0x1F300, 0x1F64F)]


def make_text(rng, words):
    """A text without surrounding white space, which the formats strip and some oracles do not."""
    parts = []
    for _ in range(rng.randint(1, 12)):
        noise = "".join(chr(rng.randint(*rng.choice(ALPHABETS))) for _ in range(rng.randint(1, 6)))
        parts += [rng.choice([*words, noise]), rng.choice(SPACES)]
    return "".join(parts).strip() or make_text(rng, words)


def make_dialogues(seed, words, count=200):
    """Dialogues that end with the response: [system] user assistant (user assistant)*."""
    rng = random.Random(seed)
    dialogues = []
    for _ in range(count):
        roles = ["system"] * rng.randint(0, 1) + ["user", "assistant"] * rng.randint(1, 3)
        dialogues.append([{"role": role, "content": make_text(rng, words)} for role in roles])
    return dialogues


PLAIN = make_dialogues(1, WORDS)
HOSTILE = make_dialogues(2, WORDS + CONTROL_TEXTS)          # texts that read like control tokens
TEXTS = [message["content"] for dialogue in PLAIN + HOSTILE for message in dialogue]
SYSTEM_TWO_TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi there"},
                    {"role": "assistant", "content": "Hello!"}, {"role": "user", "content": "Bye"}]
ONE_TURN = SYSTEM_TWO_TURNS[1:2]


# --- models -----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Model folders as downloaded: a tokenizer.model for Llama-3 and Mistral v1 to v7, a tokenizer.json for SmolLM2."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ["llama3", "smollm2", *MISTRAL_MODELS]}
    shutil.copy(LLAMA3_MODEL, folders["llama3"])
    for version, path in MISTRAL_MODELS.items():
        shutil.copy(path, folders[version] / "tokenizer.model")
    write_smollm2_tokenizer(folders["smollm2"])
    return folders


@pytest.fixture(scope="module")
def tokenizers(folders):
    return {name: load_tokenizer(folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def chats(folders, tokenizers):
    kinds = {"llama3": ("llama3", "llama3"), "mistral v1": ("v1", "mistral-v1"), "mistral v2": ("v2", "mistral-v3"),
             "mistral v3": ("v3", "mistral-v3"), "llama2": ("v1", "llama2"), "zephyr": ("v1", "zephyr"),
             "chatml": ("smollm2", "chatml"), "smollm2": ("smollm2", None)}
    return {name: load_chat_format(folders[model], tokenizers[model], chat_format)
            for name, (model, chat_format) in kinds.items()}


STRIPPING = ["llama3", "mistral v1", "mistral v2", "mistral v3", "llama2", "zephyr", "chatml"]     # by hand
CHATS = [*STRIPPING, "smollm2"]                     # and by the folder's template


def whole(chat, dialogue):
    return chat.encode_prompt(dialogue[:-1]) + chat.encode_response(dialogue[-1]["content"])


# --- the official encoders --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_mistral_ids_equal_mistral_common(chats, version):
    chat = chats[f"mistral {version}"]
    for dialogue in HOSTILE:
        assert chat.encode_prompt(dialogue[:-1]) == mistral_ids(version, dialogue[:-1])
        assert whole(chat, dialogue) == mistral_ids(version, dialogue)


def test_llama3_ids_equal_llama_models(chats):
    chat = chats["llama3"]
    for dialogue in HOSTILE:
        assert chat.encode_prompt(dialogue[:-1]) == llama3_prompt(dialogue[:-1])
        header = [128006, 78191, 128007, 271]               # that of the next assistant turn, after the response
        assert whole(chat, dialogue) + header == llama3_prompt(dialogue)


def test_chatml_ids_equal_transformers_chat_template(chats, folders):
    reference = PreTrainedTokenizerFast.from_pretrained(folders["smollm2"])
    encode = lambda messages, **options: reference.apply_chat_template(messages, return_dict=False, **options)
    chat, newline = chats["smollm2"], [198]                  # the template ends every turn with a newline
    for dialogue in PLAIN:
        assert chat.encode_prompt(dialogue[:-1]) == encode(dialogue[:-1], add_generation_prompt=True)
        assert whole(chat, dialogue) + newline == encode(dialogue)


def test_chatml_ids_of_text_that_reads_like_control_tokens_equal_the_tokenizers_library(chats, folders):
    # transformers would take such text for control tokens. Without its added tokens, the library reads it as text.
    spec = json.loads((folders["smollm2"] / "tokenizer.json").read_text(encoding="utf-8"))
    reference = Tokenizer.from_str(json.dumps(spec | {"added_tokens": []}))
    start, end = (spec["model"]["vocab"][token] for token in ("<|im_start|>", "<|im_end|>"))
    default = {"role": "system", "content": "You are a helpful AI assistant named SmolLM, trained by Hugging Face"}
    for dialogue in HOSTILE:
        expected = []
        for message in dialogue if dialogue[0]["role"] == "system" else [default, *dialogue]:
            expected += [start, *reference.encode(f"{message['role']}\n{message['content']}").ids, end]
            expected += reference.encode("\n").ids
        assert whole(chats["smollm2"], dialogue) == expected[:-1]


def test_llama2_ids_equal_metas_reference_code(chats, tokenizers):
    # Meta's llama/generation.py: the system text joins the first user turn, an exchange is one text with <s> and </s>.
    model, chat = tokenizers["v1"].model, chats["llama2"]
    for dialogue in HOSTILE:
        turns = [m["content"] for m in dialogue]
        if dialogue[0]["role"] == "system":
            system, user, *rest = turns
            turns = [f"<<SYS>>\n{system}\n<</SYS>>\n\n{user}", *rest]
        exchanges = [[1, *model.encode(f"[INST] {user} [/INST] {answer} "), 2]
                     for user, answer in zip(turns[::2], turns[1::2])]
        assert whole(chat, dialogue) == sum(exchanges, [])
        last_user = [1, *model.encode(f"[INST] {turns[-2]} [/INST]")]
        assert chat.encode_prompt(dialogue[:-1]) == sum(exchanges[:-1], []) + last_user


def test_zephyr_ids_equal_its_turns_encoded_whole(chats, tokenizers):
    model, chat = tokenizers["v1"].model, chats["zephyr"]
    for dialogue in HOSTILE:
        turns = [f"<|{m['role']}|>\n{m['content']}" for m in dialogue]
        turns[1:] = [f"\n{turn}" for turn in turns[1:]]             # after the </s> of the turn before
        assert whole(chat, dialogue) == sum([[*model.encode(turn), 2] for turn in turns], [])
        response = chat.encode_response(dialogue[-1]["content"])
        assert response == [*model.encode(turns[-1]), 2][-len(response):]
        assert chat.encode_prompt(dialogue[:-1])[-len(model.encode("\n<|assistant|>\n")):] == \
            model.encode("\n<|assistant|>\n")


# --- the formats, letter by letter ------------------------------------------------------------------------------------

def spell(tokenizer, ids):
    """What ids look like one by one, control tokens by name."""
    return "".join(tokenizer.piece(i) for i in ids).replace("▁", " ").replace("<0x0A>", "\n")


SMOLLM2_SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"


@pytest.mark.parametrize("name, prompt, response", [
    ("llama3", "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi there<|eot_id|>"
               "<|start_header_id|>assistant<|end_header_id|>\n\n", "Hello!<|eot_id|>"),
    ("mistral v1", "<s> [INST] Hi there [/INST]", " Hello!</s>"),
    ("mistral v2", "<s>[INST] Hi there[/INST]", " Hello!</s>"),
    ("mistral v3", "<s>[INST] Hi there[/INST]", " Hello!</s>"),
    ("llama2", "<s> [INST] Hi there [/INST]", " Hello! </s>"),       # sentencepiece begins every text with a space
    ("zephyr", " <|user|>\nHi there</s> \n<|assistant|>\n", "Hello!</s>"),
    ("chatml", "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n", "Hello!<|im_end|>"),
    ("smollm2", SMOLLM2_SYSTEM + "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n", "Hello!<|im_end|>"),
])
def test_one_turn_is_spelled(chats, name, prompt, response):
    chat = chats[name]
    assert spell(chat.tokenizer, chat.encode_prompt(ONE_TURN)) == prompt
    assert spell(chat.tokenizer, chat.encode_response("Hello!")) == response


@pytest.mark.parametrize("name, prompt", [
    ("llama3", "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
               "<|start_header_id|>user<|end_header_id|>\n\nHi there<|eot_id|>"
               "<|start_header_id|>assistant<|end_header_id|>\n\nHello!<|eot_id|>"
               "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
               "<|start_header_id|>assistant<|end_header_id|>\n\n"),
    ("mistral v1", "<s> [INST] Be brief.\n\nHi there [/INST] Hello!</s> [INST] Bye [/INST]"),
    ("mistral v2", "<s>[INST] Hi there[/INST] Hello!</s>[INST] Be brief.\n\nBye[/INST]"),
    ("mistral v3", "<s>[INST] Hi there[/INST] Hello!</s>[INST] Be brief.\n\nBye[/INST]"),
    ("llama2", "<s> [INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi there [/INST] Hello! </s><s> [INST] Bye [/INST]"),
    ("zephyr", " <|system|>\nBe brief.</s> \n<|user|>\nHi there</s> \n<|assistant|>\nHello!</s> \n<|user|>\nBye</s>"
               " \n<|assistant|>\n"),
    ("chatml", "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi there<|im_end|>\n"
               "<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"),
])
def test_two_turns_with_a_system_text_are_spelled(chats, name, prompt):
    chat = chats[name]
    assert spell(chat.tokenizer, chat.encode_prompt(SYSTEM_TWO_TURNS)) == prompt


@pytest.mark.parametrize("name, prompt, response", [
    ("llama3", [128000, 128006, 882, 128007, 271, 13347, 1070, 128009, 128006, 78191, 128007, 271], [9906, 0, 128009]),
    ("mistral v1", [1, 733, 16289, 28793, 15359, 736, 733, 28748, 16289, 28793], [22557, 28808, 2]),
    ("mistral v3", [1, 3, 16127, 1504, 4], [23325, 29576, 2]),
])
def test_golden_ids(chats, name, prompt, response):
    assert chats[name].encode_prompt(ONE_TURN) == prompt
    assert chats[name].encode_response("Hello!") == response


@pytest.mark.parametrize("name, bos", [("llama3", 128000), ("mistral v1", 1), ("mistral v2", 1), ("mistral v3", 1)])
def test_a_dialogue_has_exactly_one_bos_and_it_comes_first(chats, name, bos):
    for dialogue in HOSTILE:
        ids = whole(chats[name], dialogue)
        assert ids.count(bos) == 1 and ids[0] == bos


@pytest.mark.parametrize("name", CHATS)
def test_a_response_is_its_text_and_one_end_token(chats, name):
    chat = chats[name]
    control = set(chat.tokenizer.special.values())
    for text in TEXTS:
        *content, end = chat.encode_response(text)
        assert end == chat.end_id and control.isdisjoint(content)
        assert chat.tokenizer.decode([*content, end]) == (text + " " if name == "llama2" else text)


@pytest.mark.parametrize("name", CHATS)
def test_text_never_becomes_a_control_token(chats, name):
    chat = chats[name]
    names = [*chat.tokenizer.special, *CONTROL_TEXTS]
    control = set(chat.tokenizer.special.values())
    controls = lambda messages: [i for i in chat.encode_prompt(messages) if i in control]
    hostile = [message | {"content": message["content"] + " ".join(names)} for message in SYSTEM_TWO_TURNS]
    assert controls(hostile) == controls(SYSTEM_TWO_TURNS)


@pytest.mark.parametrize("name", STRIPPING)
def test_surrounding_white_space_is_stripped(chats, name):
    padded = [message | {"content": f"\n\t {message['content']} \u3000\n"} for message in SYSTEM_TWO_TURNS]
    assert chats[name].encode_prompt(padded) == chats[name].encode_prompt(SYSTEM_TWO_TURNS)
    assert chats[name].encode_response(" \nHello!\n ") == chats[name].encode_response("Hello!")


@pytest.mark.parametrize("messages, complaint", [
    ([], "roles"), (SYSTEM_TWO_TURNS[:1], "roles"), (SYSTEM_TWO_TURNS[:3], "user last"), (ONE_TURN * 2, "in turn"),
    (SYSTEM_TWO_TURNS[2:], "roles"), (ONE_TURN + SYSTEM_TWO_TURNS[:2], "roles"), ([{"role": "user"}], "message 1"),
    ([{"role": "user", "content": None}], "message 1"), (["Hi there"], "message 1"),
    ([{"role": "tool", "content": "Hi there"}], "roles")])
def test_a_prompt_of_another_shape_is_refused(chats, messages, complaint):
    with pytest.raises(ValueError, match=complaint):
        chats["llama3"].encode_prompt(messages)


def test_stop_ids_are_the_formats_end_tokens_and_those_of_the_generation_config(folders, tokenizers, tmp_path):
    stop_ids = lambda name, folder, tokenizer: load_chat_format(folder, tokenizers[tokenizer], name).stop_ids
    assert stop_ids("llama3", folders["llama3"], "llama3") == {128001, 128008, 128009}
    assert stop_ids("mistral-v3", folders["v3"], "v3") == {2}
    assert stop_ids("chatml", folders["smollm2"], "smollm2") == {2}
    for eos, expected in [(7, {2, 7}), ([7, 8], {2, 7, 8}), (None, {2})]:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
        assert stop_ids("mistral-v1", tmp_path, "v1") == expected


# --- which chat format a folder has -----------------------------------------------------------------------------------

PLAIN_TEMPLATE = ("{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
                  "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}")
OTHER_TEMPLATE = PLAIN_TEMPLATE.replace("INST", "USER")


def write_settings(folder, chat_template, **settings):
    settings = {"chat_template": chat_template, "bos_token": "<s>", "eos_token": "</s>"} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def test_the_chat_template_is_found_wherever_it_stands(tokenizers, tmp_path):
    opening = lambda: load_chat_format(tmp_path, tokenizers["v1"]).opening()
    write_settings(tmp_path, PLAIN_TEMPLATE)
    assert opening() == "<s>[INST] "
    write_settings(tmp_path, [{"name": "tool_use", "template": OTHER_TEMPLATE},
                              {"name": "default", "template": PLAIN_TEMPLATE}])
    assert opening() == "<s>[INST] "
    write_settings(tmp_path, OTHER_TEMPLATE)                            # chat_template.jinja goes before it
    (tmp_path / "chat_template.jinja").write_text(PLAIN_TEMPLATE, encoding="utf-8")
    assert opening() == "<s>[INST] "


@pytest.mark.parametrize("model, name", [("llama3", "llama3"), ("v2", "mistral-v3"), ("v3", "mistral-v3"),
                                         ("smollm2", "chatml")])
def test_format_is_detected_from_the_control_tokens_without_a_template(tokenizers, tmp_path, model, name):
    chat = load_chat_format(tmp_path, tokenizers[model])
    assert type(chat) is CHAT_FORMATS[name]
    assert type(chat).__name__ in chat.source and "no chat template" in chat.source


def test_a_format_asked_for_by_name_goes_before_the_template(tokenizers, tmp_path):
    write_settings(tmp_path, PLAIN_TEMPLATE)
    for name in ("llama2", "zephyr", "mistral-v1"):
        chat = load_chat_format(tmp_path, tokenizers["v1"], name)
        assert type(chat) is CHAT_FORMATS[name] and "--chat_format" in chat.source


@pytest.mark.parametrize("model", ["v1", "v7"])
def test_a_format_that_cannot_be_told_is_an_error_that_names_the_folder_and_the_choices(tokenizers, tmp_path, model):
    with pytest.raises(ValueError) as error:
        load_chat_format(tmp_path, tokenizers[model])
    assert all(word in str(error.value) for word in [str(tmp_path), "--chat_format", *CHAT_FORMATS])


# --- chat templates ---------------------------------------------------------------------------------------------------

CHATML_TEMPLATE = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
                   "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def template_chat(folder, tokenizer, template, date=None, **settings):
    write_settings(folder, template, **settings)
    return load_chat_format(folder, tokenizer or load_tokenizer(folder), date=date)


def test_a_template_without_a_default_system_line_adds_none(tokenizers, tmp_path):
    chat = template_chat(tmp_path, tokenizers["smollm2"], CHATML_TEMPLATE)
    assert spell(chat.tokenizer, chat.encode_prompt(ONE_TURN)) == \
        "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n"


def test_what_the_template_strips_is_stripped_and_no_more(tokenizers, tmp_path):
    padded = [{"role": "user", "content": " \tHi there\n "}]
    as_it_is = template_chat(tmp_path, tokenizers["smollm2"], CHATML_TEMPLATE)
    assert "user\n \tHi there\n <|im_end|>" in spell(as_it_is.tokenizer, as_it_is.encode_prompt(padded))
    assert as_it_is.encode_response("    return x") != as_it_is.encode_response("return x")
    trims = template_chat(tmp_path, tokenizers["smollm2"], CHATML_TEMPLATE.replace("m['content']", "m['content']|trim"))
    assert trims.encode_prompt(padded) == as_it_is.encode_prompt(ONE_TURN)
    assert trims.encode_response("    return x ") == as_it_is.encode_response("return x")


def test_a_template_that_asks_for_the_date_gets_one_that_is_kept(tokenizers, tmp_path):
    template = "{{ strftime_now('%d %b %Y') + '\n' }}" + CHATML_TEMPLATE
    chat = template_chat(tmp_path, tokenizers["smollm2"], template, date="2026-01-31")
    assert chat.date == "2026-01-31"
    assert spell(chat.tokenizer, chat.encode_prompt(ONE_TURN)).startswith("31 Jan 2026\n<|im_start|>user")
    today = template_chat(tmp_path, tokenizers["smollm2"], template)
    assert today.date == datetime.date.today().isoformat()
    assert template_chat(tmp_path, tokenizers["smollm2"], CHATML_TEMPLATE, date="2026-01-31").date is None


def test_tokens_written_around_turns_never_come_from_text_whatever_their_flag(tmp_path, folders):
    # As R1-Distill's <|User|>: special: false, like the <think> that its answers hold.
    add_words(shutil.copytree(folders["smollm2"], tmp_path / "m"), "<turn>", "<think>", "</think>")
    template = ("{% for m in messages %}{% if m['role'] == 'user' %}<turn>{{ m['content'] }}<|im_start|>{% else %}"
                "{{ m['content'].split('</think>')[-1] }}<|im_end|>{% endif %}{% endfor %}"
                "{% if add_generation_prompt %}<think>\n{% endif %}")
    tokenizer = load_tokenizer(tmp_path / "m")
    chat = template_chat(tmp_path / "m", tokenizer, template)
    turn, think, unthink = (tokenizer.names[name] for name in ("<turn>", "<think>", "</think>"))
    prompt = chat.encode_prompt([{"role": "user", "content": "<turn>Hi<|im_end|><think>"}])
    assert prompt.count(turn) == 1 and prompt.count(chat.end_id) == 0
    assert prompt.count(think) == 2                 # that of the text, and that of the generation prompt
    response = chat.encode_response("So.</think><turn>Hello!")
    assert response.count(unthink) == 1 and turn not in response and response[-1] == chat.end_id
    assert chat.decode_response(response[:-1]) == "So.</think><turn>Hello!"


def test_control_tokens_within_control_tokens_in_text_stay_text(tokenizers, tmp_path):
    chat = template_chat(tmp_path, tokenizers["smollm2"], CHATML_TEMPLATE)
    for text in ("<|im_<|im_end|>end|>", "<|im_end|><|im_end|>", "<<|im_start|>|im_start|>"):
        assert spell(chat.tokenizer, chat.encode_response(text)) == text + "<|im_end|>"
        assert chat.encode_response(text).count(chat.end_id) == 1


@pytest.mark.parametrize("template, words", [
    ("{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}", ["more than"]),
    ("{% for i in range(100000) %}{{ 'twenty characters...' }}{% endfor %}", ["characters"]),
    ("{{ 9 ** 9 ** 9 }}", ["no use for **"]), ("{{ 'x' * 10000000 }}", ["no use for *"]),
    ("{{ messages.append(1) }}", ["unsafe"]), ("{{ ''.__class__.__mro__ }}", ["unsafe"]),
    ("{{ messages[0]['content'] }", ["unexpected"]), ("{{ nothing.at_all }}", ["undefined"]),
    ("{{ raise_exception('only for tools') }}", ["only for tools"]),
    ("{{ messages[-1]['content'] }}", ["opens and closes responses in different ways"]),
    (PLAIN_TEMPLATE.replace(" + eos_token", ""), ["closes a response with ''"]),
    ("{{ messages[0]['content'] + eos_token }}", ["leaves the last turn"]),
    ("{% if add_generation_prompt %}ONE{% else %}TWO{% endif %}" + PLAIN_TEMPLATE, ["'ONE<s>[INST]", "'TWO<s>[INST]"])])
def test_a_template_that_cannot_be_followed_is_refused(tokenizers, tmp_path, monkeypatch, template, words):
    monkeypatch.setattr(tokenizer_module, "SECONDS", 0.2)
    with pytest.raises(ValueError) as error:
        template_chat(tmp_path, tokenizers["v1"], template)
    assert all(word in str(error.value) for word in [str(tmp_path), *words]), str(error.value)


@pytest.mark.parametrize("text", [BREAK, f"a{BREAK}{BREAK}b<|im_end|>{BREAK}", f"<{BREAK}|im_end|>"])
def test_the_character_that_breaks_names_may_stand_in_text(tokenizers, tmp_path, text):
    chat = template_chat(tmp_path, tokenizers["llama3"], CHATML_TEMPLATE.replace("<|im_end|>", "<|eot_id|>"))
    *content, end = chat.encode_response(text)
    assert content == chat.tokenizer.encode(text, bos=False, eos=False) and end == chat.end_id
    assert chat.decode_response(content) == text


def test_a_template_that_leaves_turns_out_is_refused_where_there_are_such_turns(tokenizers, tmp_path):
    template = CHATML_TEMPLATE.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")
    chat = template_chat(tmp_path, tokenizers["smollm2"], template)
    chat.encode_prompt(ONE_TURN)
    with pytest.raises(ValueError, match="leaves system turns out"):
        chat.encode_prompt(SYSTEM_TWO_TURNS)


def test_named_templates_without_a_default_are_refused(tokenizers, tmp_path):
    write_settings(tmp_path, [{"name": "tool_use", "template": PLAIN_TEMPLATE}])
    with pytest.raises(ValueError, match="named tool_use; expected one named default"):
        load_chat_format(tmp_path, tokenizers["v1"])
    assert type(load_chat_format(tmp_path, tokenizers["v1"], "mistral-v1")) is CHAT_FORMATS["mistral-v1"]


def test_words_that_a_layout_happens_to_hold_stay_words(folders, tmp_path):
    # As "\n\n" or "user" among the added tokens of a vocabulary: no mark, though ChatML writes "user" and "assistant".
    shutil.copytree(folders["smollm2"], tmp_path / "m")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    change_json(tmp_path / "m", lambda spec: spec["added_tokens"].append({"id": 49152, "content": "ssista"} | flags))
    tokenizer = load_tokenizer(tmp_path / "m")
    chat = template_chat(tmp_path / "m", tokenizer, CHATML_TEMPLATE)
    messages = [{"role": "user", "content": "Be of assistance"}]
    assert chat.encode_prompt(messages).count(49152) == 2 and 49152 in chat.encode_response("assistance")
    reference = PreTrainedTokenizerFast.from_pretrained(tmp_path / "m")
    assert chat.encode_prompt(messages) == reference.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False)


def test_an_end_token_of_one_character_is_refused(folders, tmp_path):
    add_words(shutil.copytree(folders["smollm2"], tmp_path / "m"), "\ue123")
    with pytest.raises(ValueError, match="single character"):
        template_chat(tmp_path / "m", None, CHATML_TEMPLATE.replace("<|im_end|>", "\ue123"))


def test_a_template_that_writes_a_token_without_an_id_is_refused(tokenizers, tmp_path):
    with pytest.raises(ValueError, match="writes the bos_token '<.bos.>', which has no id"):
        template_chat(tmp_path, tokenizers["smollm2"], "{{ bos_token }}" + CHATML_TEMPLATE, bos_token="<|bos|>")


def test_files_that_give_a_token_different_ids_are_refused(folders, tmp_path):
    shutil.copytree(folders["smollm2"], tmp_path / "m")
    write_settings(tmp_path / "m", CHATML_TEMPLATE,
                   added_tokens_decoder={"77": {"content": "<|im_end|>", "special": True}})
    refuse(tmp_path / "m", "'<|im_end|>' has the id 2 in one file and 77 in another")


@pytest.mark.parametrize("field, value", [("end_of_word_suffix", "</w>"), ("continuing_subword_prefix", "##"),
                                          ("dropout", 0.5)])
def test_fields_of_the_model_that_change_ids_are_refused(small_bpe, field, value):
    change_json(small_bpe, lambda spec: spec["model"].update({field: value}))
    refuse(small_bpe, field)


def test_a_template_is_read_in_another_thread_too(tokenizers, tmp_path):
    write_settings(tmp_path, PLAIN_TEMPLATE)
    found = []
    thread = threading.Thread(target=lambda: found.append(load_chat_format(tmp_path, tokenizers["v1"]).opening()))
    thread.start()
    thread.join()
    assert found == ["<s>[INST] "]


def test_a_template_without_jinja2_is_an_error_that_says_what_to_do(tokenizers, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    write_settings(tmp_path, PLAIN_TEMPLATE)
    with pytest.raises(ValueError, match="pip install jinja2"):
        load_chat_format(tmp_path, tokenizers["v1"])
    load_chat_format(tmp_path, tokenizers["v1"], "mistral-v1")


def test_a_template_that_refuses_a_dialogue_is_quoted(tokenizers, tmp_path):
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system, please') }}{% endif %}"
    chat = template_chat(tmp_path, tokenizers["smollm2"], template + CHATML_TEMPLATE)
    chat.encode_prompt(ONE_TURN)
    with pytest.raises(ValueError, match="No system, please"):
        chat.encode_prompt(SYSTEM_TWO_TURNS)


def test_a_generation_block_and_loop_controls_are_read(tokenizers, tmp_path):
    template = ("{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% continue %}"
                "{% endif %}{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}{% endfor %}")
    chat = template_chat(tmp_path, tokenizers["v1"], template)
    assert chat.encode_response("Hello!")[-1] == 2 and len(chat.encode_response("Hello!")) == 3


def test_the_command_shows_a_dialogue_and_compares_it(folders, capsys):
    tokenizer_module.main([str(folders["smollm2"])])
    out = capsys.readouterr().out
    assert "named SmolLM" in out and "'<|im_start|>'" in out and "response, which is scored" in out
    assert "4 prompts have the ids of transformers" in out


@pytest.fixture
def smollm2_copy(folders, tmp_path):
    return shutil.copytree(folders["smollm2"], tmp_path / "m")


@pytest.mark.parametrize("config", [None, {}, {"vocab_size": None}, {"vocab_size": 49152}, {"vocab_size": 49280}])
def test_load_chat_loads_the_tokenizer_and_the_format_in_one_call(smollm2_copy, config):
    if config is not None:
        (smollm2_copy / "config.json").write_text(json.dumps(config))
    chat = load_chat(str(smollm2_copy))
    two_calls = load_chat_format(smollm2_copy, load_tokenizer(smollm2_copy))
    assert type(chat) is type(two_calls) and chat.source == two_calls.source
    assert chat.tokenizer.names == two_calls.tokenizer.names
    assert chat.encode_prompt(SYSTEM_TWO_TURNS) == two_calls.encode_prompt(SYSTEM_TWO_TURNS)
    assert chat.encode_response("Hello!") == two_calls.encode_response("Hello!")
    assert type(load_chat(smollm2_copy, "chatml")) is CHAT_FORMATS["chatml"]


def test_load_chat_hands_the_date_on(smollm2_copy):
    write_settings(smollm2_copy, "{{ strftime_now('%d %b %Y') + '\n' }}" + CHATML_TEMPLATE)
    assert load_chat(smollm2_copy, date="2026-01-31").opening().startswith("31 Jan 2026\n")


def test_load_chat_refuses_an_embedding_that_is_smaller_than_the_vocabulary(smollm2_copy):
    (smollm2_copy / "config.json").write_text(json.dumps({"vocab_size": 49151}))
    with pytest.raises(ValueError, match="use 49152 tokens .* the embedding has 49151 rows"):
        load_chat(smollm2_copy)
    load_chat_format(smollm2_copy, load_tokenizer(smollm2_copy))            # which does not look at it


def test_load_chat_refuses_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        load_chat(tmp_path / "m")


def test_an_unknown_format_is_an_error_that_names_the_choices(tokenizers, tmp_path):
    with pytest.raises(ValueError) as error:
        load_chat_format(tmp_path, tokenizers["v1"], "vicuna")
    assert all(word in str(error.value) for word in ["'vicuna'", *CHAT_FORMATS])


@pytest.mark.parametrize("model, name, token", [("v1", "llama3", "<|eot_id|>"), ("v1", "mistral-v3", "[INST]"),
                                                ("v3", "chatml", "<|im_start|>"), ("smollm2", "llama3", "<|eot_id|>")])
def test_a_format_whose_control_tokens_are_absent_is_refused(tokenizers, tmp_path, model, name, token):
    with pytest.raises(ValueError) as error:
        load_chat_format(tmp_path, tokenizers[model], name)
    assert all(word in str(error.value) for word in [str(tmp_path), name, token])


@pytest.mark.parametrize("name", ["mistral-v1", "llama2", "zephyr"])
def test_a_format_is_refused_by_a_tokenizer_that_names_no_begin_or_end_token(small_bpe, tmp_path, name):
    with pytest.raises(ValueError, match=name):
        load_chat_format(tmp_path, load_tokenizer(small_bpe), name)


# --- tokenizer files --------------------------------------------------------------------------------------------------

GPT2_STYLE = pre_tokenizers.ByteLevel(add_prefix_space=False)
LLAMA3_STYLE = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(Llama3Tokenizer.pat_str), "isolated"),
                                        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
SMOLLM2_STYLE = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2_STYLE])


def train_bpe(folder, pre_tokenizer, normalizer=None):
    """A tokenizer.json of 1200 tokens, learnt from half of the texts."""
    reference = Tokenizer(models.BPE())
    reference.pre_tokenizer = pre_tokenizer
    if normalizer:
        reference.normalizer = normalizer
    reference.train_from_iterator(TEXTS[::2], trainers.BpeTrainer(
        vocab_size=1200, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    reference.save(str(folder / "tokenizer.json"))
    return reference


@pytest.fixture
def small_bpe(tmp_path):
    train_bpe(tmp_path, GPT2_STYLE)
    return tmp_path


@pytest.mark.parametrize("normalizer", [None, normalizers.NFC()], ids=["none", "nfc"])
@pytest.mark.parametrize("style", [GPT2_STYLE, LLAMA3_STYLE, SMOLLM2_STYLE], ids=["gpt2", "llama3", "smollm2"])
def test_tokenizer_json_encodes_as_the_tokenizers_library(tmp_path, style, normalizer):
    reference = train_bpe(tmp_path, style, normalizer)
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, BytePairTokenizer)
    rng = random.Random(3)
    texts = [make_text(rng, WORDS) for _ in range(500)]
    assert any(unicodedata.normalize("NFC", text) != text for text in texts)
    for text in texts:
        assert tokenizer.encode(text, bos=False, eos=False) == reference.encode(text).ids
        assert tokenizer.encode(f" \n{text}  ", bos=False, eos=False) == reference.encode(f" \n{text}  ").ids


def test_llama3_tokenizer_json_encodes_as_metas_tokenizer(tmp_path, monkeypatch):
    # What most fine-tunes of Llama-3 carry. The converter lists every way to put a token together, 280,147 merges.
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    reference = Llama3Tokenizer(LLAMA3_MODEL)
    converter = TikTokenConverter(vocab_file=str(LLAMA3_MODEL), pattern=reference.pat_str,
                                  extra_special_tokens=list(reference.special_tokens))
    converter.converted().save(str(tmp_path / "tokenizer.json"))
    settings = {"bos_token": "<|begin_of_text|>", "eos_token": {"content": "<|eot_id|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (128000, 128009, 128256)
    for text in TEXTS:
        assert tokenizer.encode(text, bos=False, eos=False) == reference.encode(text, bos=False, eos=False)
    chat = load_chat_format(tmp_path, tokenizer)
    assert whole(chat, HOSTILE[0]) == llama3_prompt(HOSTILE[0])[:-4]


def test_smollm2_tokenizer_json_encodes_as_the_tokenizers_library(tokenizers, folders):
    # Random texts, then every token of the vocabulary that is text by itself.
    reference = Tokenizer.from_file(str(folders["smollm2"] / "tokenizer.json"))
    rng = random.Random(4)
    texts = [make_text(rng, WORDS) for _ in range(1000)]
    texts += [text for i in range(17, 49152) if "\ufffd" not in (text := reference.decode([i]))]
    assert len(texts) > 49_000
    expected = [encoding.ids for encoding in reference.encode_batch(texts)]
    assert [tokenizers["smollm2"].encode(text, bos=False, eos=False) for text in texts] == expected


@pytest.mark.parametrize("model, kind, vocab_size", [
    ("llama3", BytePairTokenizer, 128256), ("v1", SentencePieceTokenizer, 32000), ("v3", SentencePieceTokenizer, 32768),
    ("smollm2", BytePairTokenizer, 49152)])
def test_a_tokenizer_file_is_known_by_its_content(tokenizers, model, kind, vocab_size):
    assert type(tokenizers[model]) is kind
    assert tokenizers[model].vocab_size == vocab_size


def test_metas_tokenizer_model_is_found_in_the_folder_original(folders, tokenizers, tmp_path):
    (tmp_path / "original").mkdir()
    shutil.copy(folders["llama3"] / "tokenizer.model", tmp_path / "original")
    assert load_tokenizer(tmp_path).encode("Hi there", bos=True, eos=True) == [128000, 13347, 1070, 128001]


def test_tokenizer_json_goes_before_tokenizer_model_as_in_transformers_and_vllm(small_bpe, folders):
    shutil.copy(folders["v1"] / "tokenizer.model", small_bpe)
    assert isinstance(load_tokenizer(small_bpe), BytePairTokenizer)
    (small_bpe / "tokenizer.json").unlink()
    assert isinstance(load_tokenizer(small_bpe), SentencePieceTokenizer)


@pytest.mark.parametrize("file, content", [
    ("added_tokens.json", {"<|im_start|>": 32001, "<|im_end|>": 32000}),
    ("tokenizer_config.json", {"added_tokens_decoder": {"32000": {"content": "<|im_end|>"},
                                                        "32001": {"content": "<|im_start|>"}}})])
def test_control_tokens_that_a_fine_tune_added_to_a_sentencepiece_model_are_used(folders, tmp_path, file, content):
    shutil.copy(folders["v1"] / "tokenizer.model", tmp_path)
    (tmp_path / file).write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 32002
    response = load_chat_format(tmp_path, tokenizer, "chatml").encode_response("Hello!")
    assert response[-1] == 32000 and tokenizer.decode(response) == "Hello!"
    assert tokenizer.piece(32000) == "<|im_end|>"


@pytest.mark.parametrize("model, begin, end", [("v1", 1, 2), ("v3", 1, 2), ("llama3", 128000, 128001),
                                               ("smollm2", 1, 2)])
def test_encode_adds_the_begin_and_end_token_only_where_asked(tokenizers, model, begin, end):
    tokenizer = tokenizers[model]
    ids = tokenizer.encode("Hi there", bos=False, eos=False)
    assert begin not in ids and end not in ids
    assert tokenizer.encode("Hi there", bos=True, eos=False) == [begin, *ids]
    assert tokenizer.encode("Hi there", bos=False, eos=True) == [*ids, end]
    assert tokenizer.encode("Hi there", bos=True, eos=True) == [begin, *ids, end]


@pytest.mark.parametrize("model", ["v1", "llama3"])
def test_bos_and_eos_must_be_given_and_by_name(tokenizers, model):
    encode = tokenizers[model].encode
    for call in [lambda: encode("a"), lambda: encode("a", True, True), lambda: encode("a", bos=True),
                 lambda: encode("a", eos=True)]:
        with pytest.raises(TypeError):
            call()


def test_a_begin_or_end_token_that_the_files_do_not_name_is_refused(small_bpe):
    tokenizer = load_tokenizer(small_bpe)
    for asked in ({"bos": True, "eos": False}, {"bos": False, "eos": True}):
        with pytest.raises(ValueError, match="begin or end token"):
            tokenizer.encode("Hi there", **asked)


@pytest.mark.parametrize("text", ["\x04", "a\x1db", "\U00040000"])
def test_text_with_a_byte_that_the_vocabulary_lacks_is_refused(tokenizers, folders, text):
    reference = Tokenizer.from_file(str(folders["smollm2"] / "tokenizer.json"))
    assert reference.decode(reference.encode(text).ids) != text             # the library drops it without a word
    with pytest.raises(ValueError, match="not in the vocabulary"):
        tokenizers["smollm2"].encode(text, bos=False, eos=False)


# --- files that are refused -------------------------------------------------------------------------------------------

def refuse(folder, *words):
    with pytest.raises(ValueError) as error:
        load_tokenizer(folder)
    assert all(word in str(error.value) for word in words), str(error.value)


def change_json(folder, change):
    path = folder / "tokenizer.json"
    spec = json.loads(path.read_text(encoding="utf-8"))
    change(spec)
    path.write_text(json.dumps(spec), encoding="utf-8")


@pytest.mark.parametrize("changes", [
    {"pre_tokenizer": None, "normalizer": {"type": "Prepend", "prepend": "▁"}},
    {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}}])
def test_a_sentencepiece_style_tokenizer_json_is_refused_with_the_name_of_the_file_to_fetch(small_bpe, changes):
    change_json(small_bpe, lambda spec: spec.update(changes))
    refuse(small_bpe, "tokenizer.json", "fetch tokenizer.model")


@pytest.mark.parametrize("change", [{"byte_fallback": True}, {"type": "Unigram"}, {"type": "WordPiece"}])
def test_another_kind_of_model_is_refused(small_bpe, change):
    change_json(small_bpe, lambda spec: spec["model"].update(change))
    refuse(small_bpe, "tokenizer.json", "fetch tokenizer.model")


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
SPLIT = {"type": "Split", "pattern": {"Regex": r"\s+"}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize("steps", [
    [BYTE_LEVEL | {"use_regex": False}], [BYTE_LEVEL | {"add_prefix_space": True}],
    [{"type": "Whitespace"}, BYTE_LEVEL], [{"type": "Digits", "individual_digits": False}, BYTE_LEVEL],
    [SPLIT, BYTE_LEVEL], [SPLIT | {"behavior": "Removed"}, BYTE_LEVEL | {"use_regex": False}],
    [SPLIT | {"invert": True}, BYTE_LEVEL | {"use_regex": False}],
    [SPLIT | {"pattern": {"String": " "}}, BYTE_LEVEL | {"use_regex": False}], [SPLIT, SPLIT, BYTE_LEVEL]])
def test_another_pre_tokenizer_is_refused(small_bpe, steps):
    pre_tokenizer = {"type": "Sequence", "pretokenizers": steps} if len(steps) > 1 else steps[0]
    change_json(small_bpe, lambda spec: spec.update(pre_tokenizer=pre_tokenizer))
    refuse(small_bpe, "tokenizer.json", "pre_tokenizer")


@pytest.mark.parametrize("normalizer", [{"type": "NFKC"}, {"type": "Lowercase"},
                                        {"type": "Sequence", "normalizers": []}])
def test_another_normalizer_is_refused(small_bpe, normalizer):
    change_json(small_bpe, lambda spec: spec.update(normalizer=normalizer))
    refuse(small_bpe, "tokenizer.json", normalizer["type"])


@pytest.mark.parametrize("i", [-1, 10**10, 5, 1.5, True, None, "7"])
def test_a_vocabulary_with_an_impossible_id_is_refused(small_bpe, i):
    change_json(small_bpe, lambda spec: spec["model"]["vocab"].update({"a": i}))
    refuse(small_bpe, "tokenizer.json", "ids of its vocabulary")


@pytest.mark.parametrize("token", [{"content": "", "id": 1200}, {"content": None, "id": 1200}, {"content": "<a>"},
                                   {"content": "<a>", "id": None}, {"content": "<a>", "id": 7}, "<a>"])
def test_an_impossible_added_token_is_refused(small_bpe, token):
    change_json(small_bpe, lambda spec: spec["added_tokens"].append(token))
    refuse(small_bpe, str(small_bpe))


def test_merges_out_of_the_order_of_the_vocabulary_are_refused(small_bpe):
    change_json(small_bpe, lambda spec: spec["model"]["merges"].reverse())
    refuse(small_bpe, "tokenizer.json", "merges")


def test_a_token_that_no_merge_makes_is_refused(small_bpe):
    # tiktoken would use it, the tokenizers library never does.
    change_json(small_bpe, lambda spec: spec["model"]["vocab"].update({"zqxj": 1200}))
    assert 1200 not in Tokenizer.from_file(str(small_bpe / "tokenizer.json")).encode("zqxj").ids
    refuse(small_bpe, "tokenizer.json")


def add_words(folder, *words):
    def add(spec):
        free = 1 + max(*spec["model"]["vocab"].values(), *(t["id"] for t in spec["added_tokens"]), 0)
        spec["added_tokens"] += [{"id": free + i, "content": word, "special": word == "<end>"}
                                 for i, word in enumerate(words)]
    change_json(folder, add)
    return folder


def test_a_word_that_a_model_may_write_is_one_token_and_shown_and_control_tokens_are_not(small_bpe):
    tokenizer = load_tokenizer(add_words(small_bpe, "<think>", "<end>"))
    hi, end = tokenizer.encode("hi", bos=False, eos=False), tokenizer.special["<end>"]
    assert tokenizer.decode([end - 1, *hi, end]) == "<think>hi" and tokenizer.piece(end) == "<end>"
    assert tokenizer.encode("<think>hi", bos=False, eos=False) == [end - 1, *hi]
    assert end not in tokenizer.encode("<end>", bos=False, eos=False) and tokenizer.vocab_size == end + 1


def test_a_symbol_of_the_sentencepiece_model_that_is_a_control_token_stays_text_in_text(tmp_path):
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=trained, model_type="bpe", vocab_size=1200, byte_fallback=True,
        character_coverage=0.98, normalization_rule_name="identity", remove_extra_whitespaces=False,
        user_defined_symbols=["<|im_start|>", "<|im_end|>"], minloglevel=2)
    (tmp_path / "tokenizer.model").write_bytes(trained.getvalue())
    special = {str(i): {"content": name, "special": True} for i, name in ((3, "<|im_start|>"), (4, "<|im_end|>"))}
    chat = template_chat(tmp_path, None, CHATML_TEMPLATE, added_tokens_decoder=special)
    assert chat.tokenizer.model.encode("a<|im_end|>").count(4) == 1         # the library itself would take it
    for text in ("<|im_end|>", "a <|im_start|><|im_end|> b <|im_end|>"):
        *content, end = chat.encode_response(text)
        assert end == 4 and {3, 4}.isdisjoint(content) and chat.decode_response(content) == text


def test_an_id_without_a_token_decodes_to_nothing(tokenizers):
    for name, tokenizer in tokenizers.items():
        hi = tokenizer.encode("Hi there", bos=False, eos=False)
        assert tokenizer.decode([*hi, tokenizer.vocab_size + 5]) == "Hi there", name
        assert tokenizer.piece(tokenizer.vocab_size + 5) == ""


@pytest.mark.parametrize("name", ["llama3", "mistral v1", "chatml"])
def test_half_a_surrogate_pair_is_refused(chats, name):
    with pytest.raises(ValueError, match="surrogates not allowed"):
        chats[name].encode_response("half: \ud83d")


def test_a_folder_without_tokenizer_files_is_refused(tmp_path):
    refuse(tmp_path, str(tmp_path), "tokenizer.model", "tokenizer.json")


@pytest.mark.parametrize("content", [b"", b'{"model": {"type": "BPE"', b"\xff\xfe\x00", b"[]", b"null", b"{}",
                                     b'{"model": {"type": "BPE"}, "pre_tokenizer": {"type": "ByteLevel"}}'])
def test_a_corrupt_tokenizer_json_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    refuse(tmp_path, "tokenizer.json")


@pytest.mark.parametrize("settings", [b'{"bos_token"', b"\xff", b"[]"])
def test_a_corrupt_tokenizer_config_is_refused(small_bpe, settings):
    (small_bpe / "tokenizer_config.json").write_bytes(settings)
    refuse(small_bpe, "tokenizer_config.json")


@pytest.mark.parametrize("content", [b"", b"\x00\x01\x02" * 100, b"<html>404</html>",
                                     b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 499723\n"])
def test_a_corrupt_tokenizer_model_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes(content)
    refuse(tmp_path, "tokenizer.model")


def test_a_sentencepiece_model_cut_short_is_refused(folders, tmp_path):
    content = (folders["v1"] / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(content[:len(content) // 2])
    refuse(tmp_path, "tokenizer.model")


@pytest.mark.parametrize("last_line", ["@@@@ 256", "YWI=", "YWI= x", "YWI= 25", "YWI= 1000", "YWI= -1"],
                         ids=["base64", "no rank", "rank", "rank used twice", "gap", "negative"])
def test_tiktoken_ranks_with_a_bad_line_are_refused(tmp_path, last_line):
    lines = [f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256)]
    (tmp_path / "tokenizer.model").write_text("".join(lines))
    assert load_tokenizer(tmp_path).encode("ab", bos=False, eos=False) == [97, 98]
    (tmp_path / "tokenizer.model").write_text("".join([*lines, last_line]))
    refuse(tmp_path, "tokenizer.model")


def test_tokenizer_py_can_be_copied_alone_and_needs_few_libraries(tmp_path):
    copy = shutil.copy(tokenizer_module.__file__, tmp_path)
    # -I: sys.path holds no folder of ours.
    subprocess.run([sys.executable, "-I", copy, "--help"], cwd=tmp_path, check=True)
    nodes = list(ast.walk(ast.parse(Path(copy).read_text(encoding="utf-8"))))
    modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    modules += ["." * node.level + (node.module or "") for node in nodes if isinstance(node, ast.ImportFrom)]
    # jinja2 only for folders with a chat template, transformers only to compare with it.
    assert {module.split(".")[0] for module in modules} - sys.stdlib_module_names == \
        {"sentencepiece", "tiktoken", "jinja2", "transformers"}


# --- patterns and merge tables that tiktoken alone would read otherwise -----------------------------------------------

SPEC = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "post_processor": None, "decoder": None}
MODEL = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
         "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
ALPHABET = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


def write_bpe(folder, tokens, merges, pattern=None, **changes):
    """A tokenizer.json of single bytes and `tokens`, and the tokenizers library's reading of it."""
    byte_level = BYTE_LEVEL
    if pattern is not None:
        step = SPLIT | {"pattern": {"Regex": pattern}}
        byte_level = {"type": "Sequence", "pretokenizers": [step, BYTE_LEVEL | {"use_regex": False}]}
    vocab = ALPHABET | {token: 256 + i for i, token in enumerate(tokens)}
    spec = SPEC | {"pre_tokenizer": byte_level, "model": MODEL | {"vocab": vocab, "merges": merges} | changes}
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    return Tokenizer.from_str(json.dumps(spec))


def assert_same_ids(folder, reference, texts):
    tokenizer = load_tokenizer(folder)
    for text in texts:
        assert tokenizer.encode(text, bos=False, eos=False) == reference.encode(text).ids, text


ODD_PATTERNS = [
    r"\p{L}+", r"\s+", r"\d", "b", "ab?", r"\s+(?!\S)", r"(?=a)b|[a-c]", r"(?<=a)b", r"(?<!a)b+", r"a(?:b|(?!c))",
    r"[^\s\p{L}]+", r"\p{^L}+", r"\P{L}+", r"(?i:'s|'t|ll)|x", r"a{2}", r"a{2,}|b{1,2}", "a++b?", "(a|b)c", r"\.|\[",
    "é+",
    r" ?[\p{Lu}\p{Lt}]?[\p{Ll}\p{M}]+(?i:'s|'re)?|\p{N}{1,3}", r"[\r\n]", r"(?>a+)b", ".", "-"]


@pytest.mark.parametrize("pattern", ODD_PATTERNS)
def test_text_that_a_pattern_leaves_out_is_kept_as_the_tokenizers_library_keeps_it(tmp_path, pattern):
    tokens = ["ab", "abc", "cc", "aa", "bb", "12", "..", "xx", "'s"]
    merges = [["a", "b"], ["ab", "c"], ["c", "c"], ["a", "a"], ["b", "b"], ["1", "2"], [".", "."], ["x", "x"], ["'",
        "s"]]
    reference = write_bpe(tmp_path, tokens, merges, pattern)
    rng = random.Random(5)
    texts = ["".join(rng.choices("aabbccx12. \n-['sSéÉ\u0301ſ", k=rng.randint(1, 12))) for _ in range(300)]
    assert_same_ids(tmp_path, reference, texts + TEXTS[:50])


@pytest.mark.parametrize("pattern", ["(", "[", "a*", "", r"\b", "(?=a)", "a|b*", "(?:a?b?){3}", "(?!a)", "^a", "a$",
    r"\w+", "(?i)a",
                                     "(?i:ss)", "(?i:fi|x)", "[[:punct:]]+", "[a&&b]", r"(a)\1", "(?x) a", "a{,2}",
                                     "a{2}+",
                                     r"\h", r"\R", "*a", "a{3,2}", "a{100000000}", r"\p{Nothing}", "(?<n>a)",
                                     "(" * 300 + "a" + ")" * 300,
                                     7, None, ["a"]], ids=str)
def test_a_pattern_that_is_none_or_matches_nothing_or_is_read_in_two_ways_is_refused(tmp_path, pattern):
    write_bpe(tmp_path, ["ab"], [["a", "b"]], "b")
    change_json(tmp_path, lambda spec: spec["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": pattern}))
    refuse(tmp_path, str(tmp_path / "tokenizer.json"))


def test_real_patterns_are_known_to_be_read_alike(tmp_path):
    o200k = ("[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+"
             "(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]+"
             "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|"
             "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+")
    cl100k = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}|"
              r" ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+")
    for pattern in (o200k, cl100k, tokenizer_module.LLAMA3_PATTERN, tokenizer_module.GPT2_PATTERN,
                    tokenizer_module.DIGITS_PATTERN, tokenizer_module.LLAMA3_PATTERN.replace("{1,3}", "")):
        assert_same_ids(tmp_path, write_bpe(tmp_path, ["ab"], [["a", "b"]], pattern), TEXTS[:200])


def test_a_tokenizer_that_lost_a_part_of_a_text_says_so(small_bpe):
    tokenizer = load_tokenizer(small_bpe)
    tokenizer.length_of[tokenizer.encode("a", bos=False, eos=False)[0]] = 0
    with pytest.raises(ValueError, match="loses a part of the text 'xa'"):
        tokenizer.encode("xa", bos=False, eos=False)


@pytest.mark.parametrize("text", ["a", ""])
def test_a_panic_of_tiktoken_is_an_error_that_names_the_text(small_bpe, text, monkeypatch):
    class PanicException(BaseException):
        pass

    def panics(*args):
        raise PanicException("StackOverflow")
    tokenizer = load_tokenizer(small_bpe)
    monkeypatch.setattr(tokenizer.model, "encode_ordinary", panics)
    with pytest.raises(ValueError, match=f"text '{text}': .*StackOverflow"):
        tokenizer.encode_run(text, "text")


SHORT = ["".join(letters) for n in range(1, 9) for letters in itertools.product("ab", repeat=n)]


def test_a_merge_that_lists_one_way_to_a_token_and_not_tiktokens_is_refused(tmp_path):
    # "abb": the bytes become ab, b first, as ab comes before bb.
    tokens, merges = ["ab", "bb", "abb"], [["a", "b"], ["b", "b"], ["a", "bb"]]
    reference = write_bpe(tmp_path, tokens, merges)
    assert reference.encode("abb").ids == [256, ALPHABET["b"]]
    refuse(tmp_path, str(tmp_path / "tokenizer.json"), "('ab', 'b')", "'abb'")
    for listed in ([["ab", "b"]], [["a", "bb"], ["ab", "b"]], [["ab", "b"], ["a", "bb"]]):
        assert_same_ids(tmp_path, write_bpe(tmp_path, tokens, [*merges[:2], *listed]), SHORT)


def test_a_token_that_no_merge_makes_is_read_where_merges_are_ignored_for_whole_pieces(tmp_path):
    write_bpe(tmp_path, ["ab", "bab"], [["a", "b"]])
    refuse(tmp_path, str(tmp_path / "tokenizer.json"))
    write_bpe(tmp_path, ["ab", "baba"], [["a", "b"]])
    refuse(tmp_path, str(tmp_path / "tokenizer.json"))
    assert_same_ids(tmp_path, write_bpe(tmp_path, ["ab", "baba"], [["a", "b"]], ignore_merges=True), SHORT)


@pytest.mark.parametrize("seed", range(2))
def test_random_merge_tables_are_read_as_by_the_tokenizers_library_or_refused_where_tiktoken_differs(tmp_path, seed):
    rng = random.Random(seed)
    seen = {"equal": 0, "refused": 0}
    for _ in range(60):
        tokens, merges = ["a", "b"], []
        for _ in range(rng.randint(1, 7)):
            new = rng.choice(tokens) + rng.choice(tokens)
            if len(new) <= 6 and new not in tokens:
                ways = [(new[:i], new[i:]) for i in range(1, len(new)) if {new[:i], new[i:]} <= set(tokens)]
                merges += rng.sample(ways, rng.randint(0, len(ways)))
                tokens.append(new)
        reference = write_bpe(tmp_path, tokens[2:], merges, ignore_merges=rng.random() < 0.5)
        expected = [encoding.ids for encoding in reference.encode_batch(SHORT)]
        vocab = {**{bytes([b]): i for i, b in enumerate(tokenizer_module._byte_alphabet()[c] for c in ALPHABET)},
                 **{token.encode(): 256 + i for i, token in enumerate(tokens[2:])}}
        plain = tiktoken.Encoding("plain", pat_str=r"[\s\S]+", mergeable_ranks=vocab, special_tokens={})
        same = [plain.encode_ordinary(text) for text in SHORT] == expected
        try:
            load_tokenizer(tmp_path)
        except ValueError:
            assert not same
            seen["refused"] += 1
            continue
        assert same
        assert_same_ids(tmp_path, reference, SHORT)
        seen["equal"] += 1
    assert min(seen.values()) > 5


# --- odd files --------------------------------------------------------------------------------------------------------

NO_JSON = {"empty": b"", "cut": b'{"a": ', "no UTF-8": b'{"a": "\xe9"}', "no object": b"[]",
           "5,000 digits": b'{"a": ' + b"7" * 5000 + b"}", "nested": b'{"a": ' + b"[" * 10**5 + b"]" * 10**5 + b"}",
           "nested list": b"[" * 990 + b"]" * 990, "a key twice": b'{"vocab_size": 1, "vocab_size": 2}',
           "half a pair": rb'{"a": "\ud83d"}', "UTF-16": '{"a": 1}'.encode("utf-16")}
JSON_FILES = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
              "generation_config.json", "config.json"]


@pytest.mark.parametrize("content", [*NO_JSON.values(), None], ids=[*NO_JSON, "a directory"])
@pytest.mark.parametrize("file", JSON_FILES)
def test_a_json_file_that_is_none_is_an_error_that_names_it(smollm2_copy, file, content):
    (smollm2_copy / file).unlink(missing_ok=True)
    (smollm2_copy / file).mkdir() if content is None else (smollm2_copy / file).write_bytes(content)
    with pytest.raises(ValueError) as error:
        load_chat(smollm2_copy)
    assert str(error.value).startswith(f"{smollm2_copy / file}: not ")


@pytest.mark.parametrize("file, content", [
    ("added_tokens.json", {"<a>": True}), ("added_tokens.json", {"<a>": 1e999}), ("added_tokens.json", {"<a>": 1200.5}),
    ("added_tokens.json", {"<a>": "1200"}), ("added_tokens.json", {"<a>": 10**400}), ("added_tokens.json",
    {"<a>": 1200, "<b>": 1200}),
    ("added_tokens.json", {"<a>": 7}), ("added_tokens.json", {"": 1200}),
    *[("tokenizer_config.json", {"added_tokens_decoder": value}) for value in (
        [1], "x", {"1200": None}, {"1200": {}}, {"1200": {"content": 7}}, {"1_200": {"content": "<a>"}},
        {"9" * 5000: {"content": "<a>"}}, {"1200": {"content": "<a>", "special": "false"}},
        {"1200": {"content": ["<a>"]}},
        {"1200": {"content": "<a>"}, "01200": {"content": "<b>"}})],
    *[("tokenizer.json", {"added_tokens": value}) for value in (
        7, [None], [{}], [{"content": "<a>", "id": True}], [{"content": "<a>", "id": 1200, "special": 1}])],
    *[("tokenizer.json", {"model": value}) for value in (
        [], {"type": "BPE", "vocab": [], "merges": []}, {"type": "BPE", "vocab": {}, "merges": []},
        {"type": "BPE", "vocab": {"a": 0}, "merges": [["a"]]}, {"type": "BPE", "vocab": {"a": 0}, "merges": 7},
        {"type": "BPE", "vocab": {"a": 2**31}, "merges": []}, {"type": "BPE", "vocab": {"": 0}, "merges": []},
        {"type": ["BPE"], "vocab": {"a": 0}, "merges": []}, {"type": "BPE", "vocab": {"\n": 0}, "merges": []})],
    ("tokenizer.json", {"pre_tokenizer": []}), ("tokenizer.json", {"pre_tokenizer": {"pretokenizers": []}}),
    ("tokenizer.json", {"normalizer": "NFC"}), ("special_tokens_map.json", {"pad_token": 7}),
    ("tokenizer_config.json", {"bos_token": [1]}), ("generation_config.json", {"eos_token_id": 10**400}),
    ("generation_config.json", {"eos_token_id": [True]}), ("generation_config.json", {"eos_token_id": ""}),
    ("generation_config.json", {"eos_token_id": -1}), ("tokenizer_config.json", {"chat_template": [{"name": [],
    "template": 7}]}),
], ids=lambda value: repr(value)[:60])
def test_a_field_of_another_kind_is_an_error_that_names_the_file(small_bpe, file, content):
    write_settings(small_bpe, PLAIN_TEMPLATE, bos_token=None, eos_token="<|endoftext|>")
    path = small_bpe / file
    spec = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(spec | content), encoding="utf-8")
    with pytest.raises(ValueError) as error:
        load_chat_format(small_bpe, load_tokenizer(small_bpe))
    assert str(path) in str(error.value)


@pytest.mark.parametrize("eos", [49152, [2, 10**6]])
def test_a_stop_id_that_the_embedding_lacks_is_refused(smollm2_copy, eos):
    (smollm2_copy / "config.json").write_text(json.dumps({"vocab_size": 49152}))
    (smollm2_copy / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(ValueError, match=r"generation ends at the id \d+ .*generation_config.json.* 49152 rows"):
        load_chat(smollm2_copy)


def test_the_id_0_ends_generation_too(tokenizers, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    assert load_chat_format(tmp_path, tokenizers["v1"], "mistral-v1").stop_ids == {0, 2}


def test_added_tokens_decoder_may_be_null(smollm2_copy):
    settings = json.loads((smollm2_copy / "tokenizer_config.json").read_text(encoding="utf-8"))
    (smollm2_copy / "tokenizer_config.json").write_text(json.dumps(settings | {"added_tokens_decoder": None}))
    assert load_chat(smollm2_copy).encode_response("Hello!")[-1] == 2


@pytest.mark.parametrize("content", [b"\xff\xfe{", None], ids=["no UTF-8", "a directory"])
def test_a_chat_template_that_is_no_text_is_an_error_that_names_it(smollm2_copy, content):
    file = smollm2_copy / "chat_template.jinja"
    file.mkdir() if content is None else file.write_bytes(content)
    with pytest.raises((ValueError, OSError), match=str(file)):
        load_chat(smollm2_copy)


def test_a_template_that_writes_half_a_surrogate_pair_is_refused(tokenizers, tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}.*surrogates not allowed"):
        template_chat(tmp_path, tokenizers["v1"], r"{{ '\ud83d' }}" + PLAIN_TEMPLATE)


@pytest.mark.parametrize("name", [BREAK * 2, f"a{BREAK}", f"a{BREAK}b"])
def test_a_control_token_that_holds_the_character_that_breaks_names_is_refused(smollm2_copy, name):
    add_words(smollm2_copy, name)
    change_json(smollm2_copy, lambda spec: spec["added_tokens"][-1].update(special=True))
    with pytest.raises(ValueError, match="cannot be told from text"):
        template_chat(smollm2_copy, None, CHATML_TEMPLATE)


def test_a_sentencepiece_model_without_begin_and_end_token_names_none(tmp_path):
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=trained, vocab_size=400, byte_fallback=True, bos_id=-1, eos_id=-1,
        character_coverage=0.98, minloglevel=2)
    (tmp_path / "tokenizer.model").write_bytes(trained.getvalue())
    with pytest.raises(ValueError, match="no such begin or end token"):
        load_tokenizer(tmp_path).encode("Hi", bos=True, eos=False)
