"""Model folders as they are downloaded: the tokenizer side of the models that people align.

    write_layout("qwen3", folder)

Every template is our own program that renders what the real one renders for ordinary dialogues: no
tools, one optional system turn first. A vocabulary is of the real kind: the same normaliser, split
pattern, decoder and added tokens with the same flags. Where the real vocabulary is on PyPI it is
used; the others are cut from one of those. Nothing is fetched.
"""
import base64
import json
import shutil
from dataclasses import dataclass, field
from functools import cache

import sentencepiece
from llama_models.llama3.tokenizer import Tokenizer as Llama3Tokenizer
from transformers import AutoTokenizer

from oracles import LLAMA3_MODEL, MISTRAL_MODELS, package_folder, write_smollm2_tokenizer

# Vocabularies of 128,000 byte pairs take seconds to read. One layout has all of them.
CUT = 30_000

# --- templates ------------------------------------------------------------------------------------

LLAMA3 = r"""
{{- bos_token -}}
{%- for turn in messages -%}
    {{- '<|start_header_id|>' ~ turn.role ~ '<|end_header_id|>\n\n' ~ turn.content | trim -}}
    {{- '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
{%- endif -%}
"""

# DATE is replaced by an expression. A system turn with the date comes first in any case.
LLAMA3_DATED = r"""
{%- macro header(role) -%}
    {{- '<|start_header_id|>' ~ role ~ '<|end_header_id|>\n\n' -}}
{%- endmacro -%}
{%- set rules = '' -%}
{%- set turns = messages -%}
{%- if messages[0].role == 'system' -%}
    {%- set rules = messages[0].content.strip() -%}
    {%- set turns = messages[1:] -%}
{%- endif -%}
{{- bos_token ~ header('system') -}}
{{- 'Cutting Knowledge Date: December 2023\nToday Date: ' ~ DATE ~ '\n\n' ~ rules ~ '<|eot_id|>' -}}
{%- for turn in turns -%}
    {{- header(turn['role']) ~ turn['content'].strip() ~ '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- header('assistant') -}}{%- endif -%}
"""

LLAMA2 = r"""
{%- set state = namespace(rules=none, turn=0) -%}
{%- for message in messages -%}
    {%- if message.role == 'system' and loop.first -%}
        {%- set state.rules = message.content -%}
    {%- elif message.role != ['user', 'assistant'][state.turn % 2] -%}
        {{- raise_exception('user and assistant must take turns') -}}
    {%- else -%}
        {%- set text = message.content -%}
        {%- if state.turn == 0 and state.rules is not none -%}
            {%- set text = '<<SYS>>\n' ~ state.rules ~ '\n<</SYS>>\n\n' ~ text -%}
        {%- endif -%}
        {%- if message.role == 'user' -%}
            {{- bos_token ~ '[INST] ' ~ text.strip() ~ ' [/INST]' -}}
        {%- else -%}
            {{- ' ' ~ text.strip() ~ ' ' ~ eos_token -}}
        {%- endif -%}
        {%- set state.turn = state.turn + 1 -%}
    {%- endif -%}
{%- endfor -%}
"""

# OPEN, CLOSE and ANSWER are replaced. The system text joins the first user turn.
MISTRAL_V1 = r"""
{%- set with_system = messages[0].role == 'system' -%}
{%- if REFUSE -%}{{- raise_exception('no system turn') -}}{%- endif -%}
{{- bos_token -}}
{%- for message in (messages[1:] if with_system else messages) -%}
    {%- if message.role != ('assistant' if loop.index0 % 2 else 'user') -%}
        {{- raise_exception('user and assistant must take turns') -}}
    {%- elif message.role == 'assistant' -%}
        {{- ANSWER -}}
    {%- else -%}
        {{- OPEN ~ (messages[0].content ~ '\n\n' if with_system and loop.first else '') -}}
        {{- message.content ~ ' [/INST]' -}}
    {%- endif -%}
{%- endfor -%}
"""

# The system text joins the user turn that ends the dialogue; where an answer ends it, it is lost.
MISTRAL_V3 = r"""
{%- if messages[0].role == 'system' -%}
    {%- set rules = messages[0].content ~ '\n\n' -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set rules = '' -%}
    {%- set turns = messages -%}
{%- endif -%}
{{- bos_token -}}
{%- for turn in turns -%}
    {%- if turn.role == 'user' and loop.index0 is even -%}
        {{- 'OPEN' ~ (rules if loop.last else '') ~ turn.content ~ '[/INST]' -}}
    {%- elif turn.role == 'assistant' and loop.index0 is odd -%}
        {{- ANSWER ~ eos_token -}}
    {%- else -%}
        {{- raise_exception('user and assistant must take turns') -}}
    {%- endif -%}
{%- endfor -%}
"""

# The newlines of this template are its newlines: one follows every turn and the generation prompt.
ZEPHYR = r"""{% for turn in messages %}
<|{{ turn.role }}|>
{{ turn.content + eos_token }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
"""

TULU3 = r"""
{{- bos_token -}}
{%- for turn in messages -%}
    {{- '<|' ~ turn.role ~ '|>\n' ~ turn.content -}}
    {%- if turn.role == 'assistant' -%}{{- eos_token -}}{%- endif -%}
    {%- if turn.role != 'assistant' or not loop.last -%}{{- '\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\n' -}}{%- endif -%}
"""

# BEGIN is replaced by what comes first. `default` is the system text of a dialogue without one.
CHATML = r"""
{%- set default = DEFAULT -%}
{{- BEGIN -}}
{%- if default and messages[0]['role'] != 'system' -%}
    {{- '<|im_start|>system\n' + default + '<|im_end|>\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""

# Thinking is kept in the answer to the last user turn alone, which has a block of it in any case.
QWEN3 = r"""
{%- set last = namespace(user=-1) -%}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}{%- set last.user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
    {{- '<|im_start|>' ~ message.role ~ '\n' -}}
    {%- if message.role == 'assistant' -%}
        {%- set parts = message.content.split('</think>') -%}
        {%- set thinking = '' -%}
        {%- set answer = message.content -%}
        {%- if parts | length > 1 -%}
            {%- set thinking = parts[0].rstrip('\n').split('<think>')[-1].strip('\n') -%}
            {%- set answer = parts[-1].lstrip('\n') -%}
        {%- endif -%}
        {%- if loop.index0 > last.user -%}
            {{- '<think>\n' ~ thinking ~ '\n</think>\n\n' ~ answer.lstrip('\n') -}}
        {%- else -%}
            {{- answer -}}
        {%- endif -%}
    {%- else -%}
        {{- message.content -}}
    {%- endif -%}
    {{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n' -}}
    {%- if enable_thinking is defined and not enable_thinking -%}
        {{- '<think>\n\n</think>\n\n' -}}
    {%- endif -%}
{%- endif -%}
"""

# The system text follows the begin token without any mark. Earlier answers lose their thinking.
R1_DISTILL = r"""
{{- bos_token -}}
{%- for message in messages if message.role == 'system' -%}{{- message.content -}}{%- endfor -%}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}
        {{- '<｜User｜>' ~ message.content -}}
    {%- elif message.role == 'assistant' -%}
        {{- '<｜Assistant｜>' ~ message.content.split('</think>') | last ~ eos_token -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<｜Assistant｜><think>\n' -}}{%- endif -%}
"""


def fill(template, **parts):
    """A template with its capital words replaced."""
    for word, text in parts.items():
        template = template.replace(word, text)
    return template


# --- vocabularies: the content of a tokenizer.json ------------------------------------------------

def added_token(id, content, special=True):
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": id, "content": content, **flags, "special": special}


def byte_level_spec(ranks, pattern, first_id=0, normalizer=None, ignore_merges=False):
    """Byte-level BPE of {bytes: rank}, its ids counted from first_id, as converters write it."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in printable}
    for i, byte in enumerate(byte for byte in range(256) if byte not in letters):
        letters[byte] = chr(256 + i)
    spell = lambda token: "".join(letters[byte] for byte in token)

    # Every way to put a token together of two others, the token listed first merged first.
    merges = []
    for token in sorted(ranks, key=ranks.get):
        halves = [(token[:i], token[i:]) for i in range(1, len(token))]
        halves = [(a, b) for a, b in halves if a in ranks and b in ranks]
        halves.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [[spell(a), spell(b)] for a, b in halves]

    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
             "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence",
                          "pretokenizers": [split, byte_level | {"use_regex": False}]},
        "post_processor": None,
        "decoder": byte_level | {"use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
                  "byte_fallback": False, "ignore_merges": ignore_merges,
                  "vocab": {spell(token): first_id + rank for token, rank in ranks.items()},
                  "merges": merges}}


@cache
def llama3_ranks():
    lines = LLAMA3_MODEL.read_bytes().splitlines()
    return {base64.b64decode(line.split()[0]): rank for rank, line in enumerate(lines)}


@cache
def llama3_spec(size=CUT):
    ranks = {token: rank for token, rank in llama3_ranks().items() if rank < size}
    return byte_level_spec(ranks, Llama3Tokenizer.pat_str, ignore_merges=True)


@cache
def qwen_spec():
    pattern = Llama3Tokenizer.pat_str.replace(r"\p{N}{1,3}", r"\p{N}")
    ranks = {token: rank for token, rank in llama3_ranks().items() if rank < CUT}
    return byte_level_spec(ranks, pattern, normalizer={"type": "NFC"})


@cache
def tekken_spec():
    """Mistral-Nemo's own vocabulary, cut: 1,000 control tokens come before the byte pairs."""
    file = package_folder("mistral_common") / "data" / "tekken_240718.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    tokens = content["vocab"][:CUT]
    ranks = {base64.b64decode(token["token_bytes"]): token["rank"] for token in tokens}
    first_id = content["config"]["default_num_special_tokens"]
    return byte_level_spec(ranks, content["config"]["pattern"], first_id, ignore_merges=True)


REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
PREPEND = {"type": "Prepend", "prepend": "▁"}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}


def sentencepiece_spec(file, prefix, added):
    """A sentencepiece model as a tokenizer.json. prefix: where a text gets a space in front.

    "every piece": before each text between two control tokens, by a normaliser, as converters wrote
    it for years; "first piece": before the text that begins the string, as they write it today;
    "never": nowhere.
    """
    model = sentencepiece.SentencePieceProcessor(model_file=str(file))
    ids = range(model.vocab_size())
    vocab = {model.id_to_piece(i): i for i in ids}
    # Pieces that are merged have a score below 0; those of control tokens and bytes have none.
    scores = {model.id_to_piece(i): model.get_score(i) for i in ids if model.get_score(i) < 0}
    single = {piece for piece in scores if len(piece) == 1}
    assert len(single) > 1000, "a vocabulary of characters was expected"
    merges = []
    for piece in sorted(scores, key=scores.get, reverse=True):
        halves = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        halves = [(a, b) for a, b in halves if a in scores and b in scores]
        halves.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        merges += [list(pair) for pair in halves]

    normalizers = {"every piece": [PREPEND, REPLACE], "never": [REPLACE], "first piece": None}
    steps = normalizers[prefix]
    decoders = [REPLACE | {"pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"}, {"type": "Fuse"}]
    if prefix != "never":
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": steps and {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": METASPACE if prefix == "first piece" else None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>",
                  "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True,
                  "byte_fallback": True, "ignore_merges": False, "vocab": vocab, "merges": merges}}


def rename_pieces(content, names, add_dummy_prefix):
    """A sentencepiece model with some pieces renamed: {id: (name, kind)}, kind 3 control, 4 defined
    by its maker, which text turns into whatever stands around it.

    The file is a protobuf: a piece is field 1; its name, score and kind are its fields 1, 2 and 3.
    """
    result, position, id = [], 0, 0
    while position < len(content) and content[position] == 0x0A:
        length = content[position + 1]
        assert length < 128, "a piece of more than 127 bytes was not expected"
        end = position + 2 + length
        piece = content[position:end]
        if id in names:
            name, kind = names[id]
            body = bytes([0x0A, len(name.encode())]) + name.encode()
            body += b"\x15\x00\x00\x00\x00" + bytes([0x18, kind])
            piece = bytes([0x0A, len(body)]) + body
        result.append(piece)
        position = end
        id += 1
    # A second normalizer_spec (field 3) is merged into the first: its field 3 is add_dummy_prefix.
    normalizer = bytes([0x1A, 2, 0x18, add_dummy_prefix])
    return b"".join(result) + content[position:] + normalizer


# --- the layouts ----------------------------------------------------------------------------------

@dataclass
class Layout:
    """A model folder's tokenizer side, and what the tests must know about its template.

    marks: added tokens with special: false that the template opens turns with. system: whether it
    takes a system turn. thinking: whether answers may hold <think> blocks.
    """
    template: str
    vocabulary: str
    settings: dict
    generation: dict = field(default_factory=dict)
    jinja_file: bool = False
    special_tokens_map: bool = False
    marks: tuple = ()
    system: bool = True
    thinking: bool = False


SENTENCEPIECE = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
                 "add_bos_token": True, "add_eos_token": False,
                 "clean_up_tokenization_spaces": False, "sp_model_kwargs": {},
                 "model_max_length": 1000000000000000019884624838656,
                 "tokenizer_class": "LlamaTokenizer", "use_default_system_prompt": False}
META = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>",
        "clean_up_tokenization_spaces": True, "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 131072, "tokenizer_class": "PreTrainedTokenizerFast"}
QWEN = {"add_bos_token": False, "add_prefix_space": False, "bos_token": None,
        "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None,
        "clean_up_tokenization_spaces": False, "errors": "replace", "model_max_length": 131072,
        "split_special_tokens": False, "tokenizer_class": "Qwen2Tokenizer"}
R1_MARKS = ("<｜User｜>", "<｜Assistant｜>")
R1 = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>",
      "pad_token": "<｜end▁of▁sentence｜>", "unk_token": None, "add_bos_token": True,
      "add_eos_token": False, "add_prefix_space": None, "clean_up_tokenization_spaces": False,
      "legacy": True, "model_max_length": 16384, "sp_model_kwargs": {},
      "tokenizer_class": "LlamaTokenizerFast"}
MISTRAL_TODAY = fill(MISTRAL_V1, REFUSE="false", OPEN="' [INST] '",
                     ANSWER="' ' ~ message.content ~ eos_token")

LAYOUTS = {
    "llama-2-chat": Layout(
        LLAMA2, "llama-2", SENTENCEPIECE | {"legacy": False, "pad_token": None},
        {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}, special_tokens_map=True),
    "llama-3-instruct": Layout(
        LLAMA3, "llama-3", META, {"bos_token_id": "<|begin_of_text|>",
                                  "eos_token_id": ["<|end_of_text|>", "<|eot_id|>"]},
        special_tokens_map=True),
    "llama-3.1-instruct": Layout(
        fill(LLAMA3_DATED, DATE="'26 Jul 2024'"), "llama-3.1", META,
        {"bos_token_id": "<|begin_of_text|>",
         "eos_token_id": ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]}, special_tokens_map=True),
    "llama-3.2-instruct": Layout(
        fill(LLAMA3_DATED, DATE="strftime_now('%d %b %Y')"), "llama-3.1", META,
        {"bos_token_id": "<|begin_of_text|>",
         "eos_token_id": ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]}, special_tokens_map=True),
    "mistral-v0.1-instruct": Layout(
        MISTRAL_TODAY, "mistral-v1",
        SENTENCEPIECE | {"legacy": False, "add_prefix_space": None, "pad_token": None,
                         "additional_special_tokens": [], "spaces_between_special_tokens": False},
        {"bos_token_id": 1, "eos_token_id": 2}, special_tokens_map=True),
    # The first release: no system turn, a space after the end token, none before an answer.
    "mistral-v0.1-first": Layout(
        fill(MISTRAL_V1, REFUSE="with_system", OPEN="'[INST] '",
             ANSWER="message.content ~ eos_token ~ ' '"),
        "mistral-v1-first", SENTENCEPIECE | {"legacy": True, "pad_token": None},
        {"bos_token_id": 1, "eos_token_id": 2}, special_tokens_map=True, system=False),
    "mistral-v0.3-instruct": Layout(
        fill(MISTRAL_V3, OPEN="[INST] ", ANSWER="' ' ~ turn.content | trim"), "mistral-v3",
        SENTENCEPIECE | {"legacy": False, "add_prefix_space": True, "pad_token": None},
        {"bos_token_id": 1, "eos_token_id": 2}, jinja_file=True, special_tokens_map=True),
    "mistral-nemo-instruct": Layout(
        fill(MISTRAL_V3, OPEN="[INST]", ANSWER="turn.content"), "tekken",
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True,
         "add_eos_token": False, "add_prefix_space": False, "clean_up_tokenization_spaces": False,
         "model_max_length": 1000000000000000019884624838656,
         "tokenizer_class": "PreTrainedTokenizerFast"},
        {"bos_token_id": 1, "eos_token_id": 2}, special_tokens_map=True),
    "zephyr-beta": Layout(
        ZEPHYR, "zephyr", SENTENCEPIECE | {
            "legacy": True, "pad_token": "</s>", "truncation_side": "left",
            "additional_special_tokens": ["<unk>", "<s>", "</s>"]},
        {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}, special_tokens_map=True),
    "tinyllama-chat": Layout(
        ZEPHYR, "llama-2",
        SENTENCEPIECE | {"legacy": False, "pad_token": "</s>", "padding_side": "right"},
        {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}, special_tokens_map=True),
    "tulu-3": Layout(
        TULU3, "tulu-3", META | {"eos_token": "<|end_of_text|>", "pad_token": "<pad>"},
        {"bos_token_id": "<|begin_of_text|>", "eos_token_id": "<|end_of_text|>"},
        special_tokens_map=True),
    "smollm2-instruct": Layout(
        fill(CHATML, BEGIN="''", DEFAULT="'You are a helpful AI assistant named SmolLM, trained by "
                                         "Hugging Face'"),
        "smollm2", {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>",
                    "pad_token": "<|im_end|>", "unk_token": "<|endoftext|>",
                    "add_prefix_space": False,
                    "clean_up_tokenization_spaces": False, "model_max_length": 8192,
                    "vocab_size": 49152, "tokenizer_class": "GPT2Tokenizer"},
        {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}, jinja_file=True,
        special_tokens_map=True),
    "qwen2.5-instruct": Layout(
        fill(CHATML, BEGIN="''", DEFAULT="'You are Qwen, created by Alibaba Cloud. You are a "
                                         "helpful assistant.'"),
        "qwen2.5", QWEN, {"bos_token_id": "<|endoftext|>", "pad_token_id": "<|endoftext|>",
                          "eos_token_id": ["<|im_end|>", "<|endoftext|>"]}),
    "qwen2.5-math-instruct": Layout(
        fill(CHATML, BEGIN="''", DEFAULT=r"'Please reason step by step, and put your final answer "
                                         r"within \\boxed{}.'"),
        "qwen2.5", QWEN, {"bos_token_id": "<|endoftext|>", "eos_token_id": "<|im_end|>"}),
    "qwen3": Layout(
        QWEN3, "qwen3", QWEN, {"bos_token_id": "<|endoftext|>", "pad_token_id": "<|endoftext|>",
                               "eos_token_id": ["<|im_end|>", "<|endoftext|>"]}, thinking=True),
    "hermes-3": Layout(
        fill(CHATML, BEGIN="bos_token", DEFAULT="'You are a helpful assistant.'"), "hermes-3",
        META | {"eos_token": "<|im_end|>", "pad_token": "<|end_of_text|>"},
        {"bos_token_id": "<|begin_of_text|>", "eos_token_id": ["<|im_end|>", "<|end_of_text|>"]},
        special_tokens_map=True, marks=("<|im_start|>",)),
    # ChatML on Mistral's vocabulary, as Dolphin and OpenHermes have it.
    "dolphin-mistral": Layout(
        fill(CHATML, BEGIN="''", DEFAULT="''"), "dolphin",
        SENTENCEPIECE | {"eos_token": "<|im_end|>", "legacy": True, "pad_token": "</s>"},
        {"bos_token_id": 1, "eos_token_id": 32000}, special_tokens_map=True,
        marks=("<|im_start|>",)),
    "yi-chat": Layout(
        fill(CHATML, BEGIN="''", DEFAULT="''"), "yi",
        SENTENCEPIECE | {"bos_token": "<|startoftext|>", "eos_token": "<|im_end|>", "legacy": True,
                         "add_bos_token": False, "pad_token": "<unk>", "model_max_length": 4096},
        {"bos_token_id": 1, "eos_token_id": "<|im_end|>", "pad_token_id": 0}),
    "r1-distill-llama": Layout(
        R1_DISTILL, "r1-llama", R1, {"bos_token_id": "<｜begin▁of▁sentence｜>",
                                     "eos_token_id": "<｜end▁of▁sentence｜>"},
        marks=R1_MARKS, thinking=True),
    "r1-distill-qwen": Layout(
        R1_DISTILL, "r1-qwen", R1, {"bos_token_id": "<｜begin▁of▁sentence｜>",
                                    "eos_token_id": "<｜end▁of▁sentence｜>"},
        marks=R1_MARKS, thinking=True),
    # A fine-tune that transformers 5 wrote: no tokenizer.model, another pre-tokenizer.
    "tinyllama-saved": Layout(ZEPHYR, "saved by transformers", {}),
}


def llama3_names(renamed):
    """The 256 control tokens of Llama-3.1 in the order of their ids; renamed: {index: name}."""
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>",
             "<|reserved_special_token_1|>", "<|finetune_right_pad_id|>",
             "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>",
             "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"]
    names += [f"<|reserved_special_token_{i}|>" for i in range(3, 248)]
    return [renamed.get(i, name) for i, name in enumerate(names)]


# Llama-3 itself reserved what 3.1 names.
LLAMA3_RENAMED = {4: "<|reserved_special_token_2|>", 5: "<|reserved_special_token_3|>",
                  8: "<|reserved_special_token_4|>", 10: "<|reserved_special_token_5|>"}
LLAMA3_RENAMED |= {i: f"<|reserved_special_token_{i - 5}|>" for i in range(11, 256)}
HERMES_RENAMED = {2: "<|im_start|>", 3: "<|im_end|>", 13: "<tool_call>", 14: "<tool_response>"}
R1_LLAMA_RENAMED = {0: "<｜begin▁of▁sentence｜>", 1: "<｜end▁of▁sentence｜>", 11: "<｜User｜>",
                    12: "<｜Assistant｜>", 13: "<think>", 14: "</think>", 15: "<｜▁pad▁｜>"}

QWEN_ADDED = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>",
              "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>",
              "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
              "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>",
              "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"]
QWEN3_ADDED = QWEN_ADDED + ["<tool_response>", "</tool_response>", "<think>", "</think>"]
R1_QWEN_ADDED = ["<｜end▁of▁sentence｜>", *R1_MARKS, "<｜begin▁of▁sentence｜>", "<|EOT|>", "<think>",
                 "</think>", *QWEN_ADDED[7:]]
WORDS = {"<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>",
         "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>",
         "<think>", "</think>", "<|EOT|>"}


SENTENCEPIECE_KINDS = {"llama-2", "mistral-v1", "mistral-v1-first", "zephyr", "dolphin",
                       "mistral-v3", "yi"}


def write_layout(name, folder):
    """Writes the tokenizer side of a model folder and returns its layout."""
    layout = LAYOUTS[name]
    if layout.vocabulary == "saved by transformers":
        source = folder / "source"
        source.mkdir()
        write_layout("tinyllama-chat", source)
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
        shutil.rmtree(source)
        return layout
    spec = write_vocabulary(layout, folder)
    ids = {token["content"]: token["id"] for token in spec["added_tokens"]}

    settings = dict(layout.settings)
    settings["added_tokens_decoder"] = {
        str(token["id"]): {key: value for key, value in token.items() if key != "id"}
        for token in spec["added_tokens"]}
    if layout.jinja_file:
        (folder / "chat_template.jinja").write_text(layout.template, encoding="utf-8")
    elif name == "hermes-3":
        other = {"name": "tool_use", "template": "{{ raise_exception('no tools were given') }}"}
        settings["chat_template"] = [{"name": "default", "template": layout.template}, other]
    else:
        settings["chat_template"] = layout.template
    write_json(folder / "tokenizer_config.json", settings)

    if layout.special_tokens_map:
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        write_json(folder / "special_tokens_map.json",
                   {key: settings[key] for key in names if settings.get(key) is not None})

    # Ids of generation_config.json that depend on where a vocabulary was cut are given by name.
    generation = {"transformers_version": "4.43.0"}
    for key, value in layout.generation.items():
        many = isinstance(value, list)
        generation[key] = [ids[name] for name in value] if many else ids.get(value, value)
    write_json(folder / "generation_config.json", generation)
    return layout


def write_json(path, content):
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")


def write_vocabulary(layout, folder):
    """Writes tokenizer.json, and tokenizer.model where the real folder has one. Gives the spec."""
    kind = layout.vocabulary
    if kind == "smollm2":
        write_smollm2_tokenizer(folder)
        (folder / "tokenizer_config.json").unlink()
        return json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))

    words = WORDS | set(layout.marks)
    number = lambda names, first: [added_token(first + i, name, name not in words)
                                   for i, name in enumerate(names)]
    if kind in SENTENCEPIECE_KINDS:
        spec = write_sentencepiece(kind, folder, number)
    elif kind == "tekken":
        file = package_folder("mistral_common") / "data" / "tekken_240718.json"
        shutil.copy(file, folder / "tekken.json")
        names = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]",
                 "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "<pad>",
                 "[PREFIX]", "[MIDDLE]", "[SUFFIX]"]
        names += [f"<SPECIAL_{i}>" for i in range(len(names), 1000)]
        spec = tekken_spec() | {"added_tokens": number(names, 0)}
        vocab = {name: i for i, name in enumerate(names)} | spec["model"]["vocab"]
        spec["model"] = spec["model"] | {"vocab": vocab}
    elif kind in ("qwen2.5", "qwen3", "r1-qwen"):
        names = {"qwen2.5": QWEN_ADDED, "qwen3": QWEN3_ADDED, "r1-qwen": R1_QWEN_ADDED}[kind]
        spec = qwen_spec() | {"added_tokens": number(names, CUT)}
    else:
        size = len(llama3_ranks()) if kind == "llama-3" else CUT
        renamed = {"llama-3": LLAMA3_RENAMED, "hermes-3": HERMES_RENAMED,
                   "r1-llama": R1_LLAMA_RENAMED}
        names = llama3_names(renamed.get(kind, {}))
        if kind == "tulu-3":
            names.append("<pad>")
        spec = llama3_spec(size) | {"added_tokens": number(names, size)}

    # A file that puts the begin token before every text: a chat template has its own.
    bos = layout.settings.get("bos_token")
    if bos and layout.settings.get("add_bos_token", True):
        id = next(token["id"] for token in spec["added_tokens"] if token["content"] == bos)
        first = {"SpecialToken": {"id": bos, "type_id": 0}}
        spec["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [first, {"Sequence": {"id": "A", "type_id": 0}},
                     {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [id], "tokens": [bos]}}}
    (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
    return spec


def write_sentencepiece(kind, folder, number):
    file = folder / "tokenizer.model"
    content = MISTRAL_MODELS["v3" if kind == "mistral-v3" else "v1"].read_bytes()
    added = number(["<unk>", "<s>", "</s>"], 0)
    if kind == "yi":
        # Yi's marks are pieces that its maker defined: sentencepiece finds them in any text.
        content = rename_pieces(content, {
            1: ("<|startoftext|>", 3), 2: ("<|endoftext|>", 3), 31996: ("<|im_start|>", 4),
            31997: ("<|im_end|>", 4), 31998: ("<|im_sep|>", 4)}, add_dummy_prefix=False)
        added = number(["<unk>", "<|startoftext|>", "<|endoftext|>"], 0)
        added += number(["<|im_start|>", "<|im_end|>", "<|im_sep|>"], 31996)
    file.write_bytes(content)
    if kind == "mistral-v3":
        model = sentencepiece.SentencePieceProcessor(model_file=str(file))
        names = [model.id_to_piece(i) for i in range(771)]
        added = [added_token(i, name, special=i == 0 or model.is_control(i))
                 for i, name in enumerate(names)]
    if kind == "dolphin":
        added += number(["<|im_end|>", "<|im_start|>"], 32000)
        write_json(folder / "added_tokens.json", {"<|im_end|>": 32000, "<|im_start|>": 32001})
    prefix = {"mistral-v1": "first piece", "mistral-v3": "first piece", "yi": "never"}
    return sentencepiece_spec(file, prefix.get(kind, "every piece"), added)
