"""Chat templates of model folders: our ids against those of transformers, layout by layout.

    pytest tests/test_layouts.py -k qwen3

tests/layouts.py writes the folders. The oracle is transformers' PreTrainedTokenizerFast, which
takes tokenizer.json as it stands and renders the folder's template, as every version of
transformers 4 does. AutoTokenizer of transformers 5 does not: for tokenizer_class LlamaTokenizer
(Llama-2, TinyLlama, Yi) and GPT2Tokenizer (SmolLM2) it puts another pre-tokenizer in the place of
the file's.
"""
import random
import unicodedata
from datetime import datetime
from functools import cached_property

import pytest
import sentencepiece
from llama_models.llama3.tokenizer import Tokenizer as Llama3Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from layouts import LAYOUTS, write_layout
from oracles import LLAMA3_MODEL, MISTRAL_MODELS
from test_tokenizer import (ALPHABETS, CONTROL_TEXTS, ONE_TURN, SYSTEM_TWO_TURNS, TEXTS, WORDS,
                            make_text)
from tokenizer import compare, load_chat_format, load_tokenizer

DATE = "2026-01-31"
SPACES = ["", "", "", " ", "  ", "\n", "\n\n", " \n\t ", "\r\n", "\u00a0", "\u3000", "\u2028",
          "\x0b"]
THINKING = ["<think>\nLet me see.\n</think>\n\n", "<think>\n\n</think>\n\n", "So.\n</think>\n\n",
            "<think>\n\n a < b\n\n</think>", "</think>", "<think>"]
HOSTILE_WORDS = WORDS + CONTROL_TEXTS + THINKING + [
    "<｜User｜>", "<｜Assistant｜>", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<tool_call>",
    "<|endoftext|>", "<|startoftext|>", "<|im_sep|>", "<|fim_prefix|>", "<|eom_id|>", "<pad>",
    "[control_8]", "[REFERENCE_DOC_3]", "<SPECIAL_20>", "<0x0A>", "{{ bos_token }}", "{% endfor %}",
    "{#", "\ue000\ue001", "\x1d", "\x85", "\u2028", "\ufeff", "\x00"]


class FixedDay(datetime):
    @classmethod
    def now(cls, tz=None):
        return cls.strptime(DATE, "%Y-%m-%d")


@pytest.fixture(scope="module", autouse=True)
def today():
    """The day that transformers tells templates."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_template_utils, "datetime", FixedDay)
        yield


# --- a model folder and what transformers makes of it ---------------------------------------------

class Model:
    """A layout, its folder, transformers' reading of it (reference) and ours (tokenizer, chat)."""

    def __init__(self, name, folder):
        self.name, self.folder = name, folder
        self.layout = write_layout(name, folder)
        self.reference = PreTrainedTokenizerFast.from_pretrained(folder)
        added = self.reference.added_tokens_decoder
        self.control = {i for i, token in added.items()
                        if token.special or token.content in self.layout.marks}

    @cached_property
    def tokenizer(self):
        return load_tokenizer(self.folder)

    @cached_property
    def chat(self):
        return load_chat_format(self.folder, self.tokenizer, date=DATE)

    @cached_property
    def plain(self):
        """Fifty ordinary dialogues. Answers hold the words that are one token of the vocabulary."""
        added = self.reference.added_tokens_decoder
        openings = [token.content for i, token in added.items() if i not in self.control][:8]
        return make_dialogues(self, 6, WORDS, openings + THINKING * self.layout.thinking, 50)

    @cached_property
    def hostile(self):
        """Dialogues whose texts read like control tokens, templates and placeholders, of every
        script. Words that a vocabulary cannot spell (SmolLM2 lacks 21 byte values) are left out."""
        rng = random.Random(7)
        letter = lambda: chr(rng.randint(*rng.choice(ALPHABETS)))
        noise = ["".join(letter() for _ in range(3)) for _ in range(100)]
        special = [token.content for token in self.reference.added_tokens_decoder.values()]
        words = HOSTILE_WORDS + noise + special[:40] + list(self.layout.marks) * 5
        words = [word for word in words if self.spells(word)]
        return make_dialogues(self, 8, words, [], 1000)

    def spells(self, word):
        text = unicodedata.normalize("NFC", f"a{word}")
        return self.reference.decode(self.encode(text)).replace(" ", "") == text.replace(" ", "")

    def text(self, messages, prompt):
        return self.reference.apply_chat_template(messages, tokenize=False,
                                                  add_generation_prompt=prompt)

    def ids(self, messages, prompt):
        return self.reference.apply_chat_template(messages, tokenize=True, return_dict=False,
                                                  add_generation_prompt=prompt)

    def encode(self, text):
        return self.reference(text, add_special_tokens=False).input_ids

    @cached_property
    def closing(self):
        """What the template writes behind an answer, and the id of the end token in it."""
        answered = self.text([*ONE_TURN, {"role": "assistant", "content": "Hello!"}], False)
        text = answered.rpartition("Hello!")[2]
        return text, next(i for i in self.encode(text) if i in self.control)

    def response(self, dialogue):
        """The ids of the last turn, up to its end token.

        They are what the whole dialogue has beyond its prompt, or, where a template drops the
        system turn of a dialogue that ends with an answer, what the last exchange has. Where that
        holds for the strings alone (newlines may merge across the border), they are the ids of the
        rest of the string. Where the prompt opens what the dialogue does not show (R1's `<think>`),
        they are those of the content, without that opening, and of the end token. None:
        sentencepiece merges across the border.
        """
        closing, end = self.closing
        for messages in (dialogue, dialogue[-2:]):
            prompt, whole = self.ids(messages[:-1], True), self.ids(messages, False)
            rest = whole[len(prompt):]
            if whole[:len(prompt)] == prompt:
                return rest[:1 + rest.index(end)]
        if self.layout.vocabulary == "mistral-v1-first":
            return None
        prompt, whole = self.text(messages[:-1], True), self.text(messages, False)
        rest = whole.removeprefix(prompt)
        if rest == whole:
            opening = "<think>\n" if prompt.endswith("<think>\n") else ""
            rest = messages[-1]["content"].removeprefix(opening) + closing
        ids = self.encode(rest)
        return ids[:1 + ids.index(end)]


@pytest.fixture(scope="module", params=LAYOUTS)
def model(request, tmp_path_factory):
    return Model(request.param, tmp_path_factory.mktemp(request.param))


def make_dialogues(model, seed, words, openings, count):
    """Dialogues that end with the response: [system] user assistant (user assistant)*.

    Most contents have white space around them, which templates strip or do not. openings: what
    answers may begin with.
    """
    rng = random.Random(f"{seed} {model.name}")
    text = lambda: rng.choice(SPACES) + make_text(rng, words) + rng.choice(SPACES)
    dialogues = []
    for _ in range(count):
        system = ["system"] * rng.randint(0, model.layout.system)
        roles = system + ["user", "assistant"] * rng.randint(1, 3)
        dialogue = [{"role": role, "content": text()} for role in roles]
        for message in dialogue:
            if message["role"] == "assistant":
                message["content"] = rng.choice([*openings, "", ""]) + message["content"]
        dialogues.append(dialogue)
    return dialogues


# --- the layouts themselves -----------------------------------------------------------------------

CHATML = ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi there<|im_end|>\n"
          "<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
          "<|im_start|>assistant\n")
LLAMA3 = ("<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi there<|eot_id|>"
          "<|start_header_id|>assistant<|end_header_id|>\n\nHello!<|eot_id|>"
          "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
          "<|start_header_id|>assistant<|end_header_id|>\n\n")
LLAMA3_SYSTEM = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
KNOWLEDGE = "Cutting Knowledge Date: December 2023\nToday Date: "
ZEPHYR = ("<|system|>\nBe brief.</s>\n<|user|>\nHi there</s>\n<|assistant|>\nHello!</s>\n"
          "<|user|>\nBye</s>\n<|assistant|>\n")
R1 = ("<｜begin▁of▁sentence｜>Be brief.<｜User｜>Hi there<｜Assistant｜>Hello!<｜end▁of▁sentence｜>"
      "<｜User｜>Bye<｜Assistant｜><think>\n")
TWO_TURNS = {
    "llama-2-chat": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi there [/INST] Hello! </s>"
                    "<s>[INST] Bye [/INST]",
    "llama-3-instruct": LLAMA3_SYSTEM + "Be brief." + LLAMA3,
    "llama-3.1-instruct": LLAMA3_SYSTEM + KNOWLEDGE + "26 Jul 2024\n\nBe brief." + LLAMA3,
    "llama-3.2-instruct": LLAMA3_SYSTEM + KNOWLEDGE + "31 Jan 2026\n\nBe brief." + LLAMA3,
    "mistral-v0.1-instruct": "<s> [INST] Be brief.\n\nHi there [/INST] Hello!</s>"
                             " [INST] Bye [/INST]",
    "mistral-v0.3-instruct": "<s>[INST] Hi there[/INST] Hello!</s>[INST] Be brief.\n\nBye[/INST]",
    "mistral-nemo-instruct": "<s>[INST]Hi there[/INST]Hello!</s>[INST]Be brief.\n\nBye[/INST]",
    "zephyr-beta": ZEPHYR, "tinyllama-chat": ZEPHYR, "tinyllama-saved": ZEPHYR,
    "tulu-3": "<|begin_of_text|><|system|>\nBe brief.\n<|user|>\nHi there\n<|assistant|>\nHello!"
              "<|end_of_text|>\n<|user|>\nBye\n<|assistant|>\n",
    "smollm2-instruct": CHATML, "qwen2.5-instruct": CHATML, "qwen2.5-math-instruct": CHATML,
    "qwen3": CHATML, "hermes-3": "<|begin_of_text|>" + CHATML, "dolphin-mistral": CHATML,
    "yi-chat": CHATML, "r1-distill-llama": R1, "r1-distill-qwen": R1}
DEFAULT_SYSTEM = {
    "llama-3.1-instruct": KNOWLEDGE + "26 Jul 2024\n\n",
    "smollm2-instruct": "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    "qwen2.5-instruct": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "qwen2.5-math-instruct": r"Please reason step by step, and put your final answer within "
                             r"\boxed{}.",
    "hermes-3": "You are a helpful assistant."}


def test_layout_renders_what_the_real_template_renders(model):
    if model.layout.system:
        assert model.text(SYSTEM_TWO_TURNS, True) == TWO_TURNS[model.name]
    else:
        first = model.text(SYSTEM_TWO_TURNS[1:], True)
        assert first == "<s>[INST] Hi there [/INST]Hello!</s> [INST] Bye [/INST]"
    system = DEFAULT_SYSTEM.get(model.name)
    if system:
        given = [{"role": "system", "content": system}, *ONE_TURN]
        same = ONE_TURN if model.name == "llama-3.1-instruct" else given
        assert model.text(ONE_TURN, True) == model.text(same, True)
        assert system in model.text(ONE_TURN, True)


def test_layout_has_the_real_ids(model):
    real = {
        "llama-3-instruct": [128000, 128006, 882, 128007, 271, 13347, 1070, 128009, 128006, 78191,
                             128007, 271],
        "mistral-v0.1-instruct": [1, 733, 16289, 28793, 15359, 736, 733, 28748, 16289, 28793],
        "mistral-v0.3-instruct": [1, 3, 16127, 1504, 4]}
    if model.name in real:
        assert model.ids(ONE_TURN, True) == real[model.name]
    # A text by itself, against the tokenizers that the models were made with.
    texts = [text for text in TEXTS[:100] if not any(name in text for name in CONTROL_TEXTS)]
    if model.name == "llama-3-instruct":
        official = Llama3Tokenizer(LLAMA3_MODEL)
        for text in texts:
            assert model.encode(text) == official.encode(text, bos=False, eos=False)
    if model.name in ("llama-2-chat", "mistral-v0.3-instruct"):
        file = MISTRAL_MODELS["v1" if model.name == "llama-2-chat" else "v3"]
        official = sentencepiece.SentencePieceProcessor(model_file=str(file))
        assert [model.encode(text) for text in texts] == official.encode(texts)


def test_layout_has_one_begin_token_and_the_right_marks(model):
    dialogue = SYSTEM_TWO_TURNS if model.layout.system else SYSTEM_TWO_TURNS[1:]
    ids = model.ids(dialogue, True)
    exchanges = 2 if model.name == "llama-2-chat" else 1
    if "bos_token" in model.layout.template or model.name.startswith(("llama-3.", "hermes")):
        assert ids[0] == model.reference.bos_token_id
        assert ids.count(model.reference.bos_token_id) == exchanges
    for mark in model.layout.marks:
        assert model.reference.convert_tokens_to_ids(mark) in ids


# --- ids ------------------------------------------------------------------------------------------

def test_prompt_ids_equal_transformers(model):
    for dialogue in model.plain:
        assert model.chat.encode_prompt(dialogue[:-1]) == model.ids(dialogue[:-1], True)


def test_prompt_and_response_are_the_beginning_of_the_whole_dialogue(model):
    told = 0
    for dialogue in model.plain:
        expected = model.response(dialogue)
        if expected is not None:
            told += 1
            assert model.chat.encode_response(dialogue[-1]["content"]) == expected
    assert told >= 40


def test_a_system_turn_that_the_template_refuses_is_refused(model):
    if not model.layout.system:
        with pytest.raises(ValueError):
            model.chat.encode_prompt(SYSTEM_TWO_TURNS)


def test_the_date_of_a_template_is_the_one_that_it_is_given(model):
    if not model.name.startswith("llama-3"):
        return
    chat = load_chat_format(model.folder, model.tokenizer, date="2025-12-05")
    text = model.tokenizer.decode(chat.encode_prompt(ONE_TURN))
    assert ("Today Date: 05 Dec 2025\n" in text) == (model.name == "llama-3.2-instruct")


def test_control_tokens_come_from_the_template_alone(model):
    # The same dialogue with harmless contents has the same control tokens in the same order.
    harmless = {}
    controls = lambda ids: [i for i in ids if i in model.control]
    for dialogue in model.hostile:
        prompt = dialogue[:-1]
        roles = tuple(message["role"] for message in prompt)
        if roles not in harmless:
            plain = [{"role": role, "content": "a"} for role in roles]
            harmless[roles] = controls(model.chat.encode_prompt(plain))
        assert controls(model.chat.encode_prompt(prompt)) == harmless[roles], prompt
        *content, end = model.chat.encode_response(dialogue[-1]["content"])
        assert end in model.control and model.control.isdisjoint(content), dialogue[-1]


def test_text_comes_back_from_its_ids(model):
    nfc = "qwen" in model.name
    tokenizer = model.chat.tokenizer            # which knows the tokens that the layout writes
    for dialogue in model.hostile:
        for message in dialogue:
            text = message["content"]
            ids = tokenizer.encode(text, bos=False, eos=False)
            assert model.control.isdisjoint(ids)
            expected = unicodedata.normalize("NFC", text) if nfc else text
            assert tokenizer.decode(ids) == expected


def test_the_command_finds_a_layout_the_same_as_transformers_does(model):
    chat = load_chat_format(model.folder, model.tokenizer)                  # with today's date, as transformers
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_template_utils, "datetime", datetime)
        assert " prompts have the ids of transformers" in compare(model.folder, chat)


def test_a_response_comes_back_from_its_ids(model):
    for dialogue in model.plain:
        ids = model.chat.encode_response(dialogue[-1]["content"])
        assert model.chat.encode_response(model.chat.decode_response(ids[:-1])) == ids
