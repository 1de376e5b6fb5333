"""Tokenizers and chat formats of Llama and Mistral models, read from a Hugging Face folder.

    tokenizer = load_tokenizer("Llama-3-8B-Instruct")
    chat = load_chat_format("Llama-3-8B-Instruct", tokenizer)
    prompt = chat.encode_prompt([{"role": "user", "content": "Hi there"}])     # ends where the response starts
    response = chat.encode_response("Hello!")                                  # ends with its one end token

Two layers: a tokenizer turns text into ids and knows no chat; a chat format lays out turns and appends control tokens
as ids. Text is never searched for control tokens, so an `<|eot_id|>` typed by a user stays ordinary text; prompt and
response are encoded apart, so the border between them is exact. Needs sentencepiece and tiktoken.
"""
import base64
import json
import re
import unicodedata
from pathlib import Path

import sentencepiece
import tiktoken

# How text is cut before byte pairs are merged. Llama-3's own pattern, GPT-2's, and GPT-2's with digits one by one.
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
                  r"\s*[\r\n]+|\s+(?!\S)|\s+")
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"

# Llama-3's tokenizer.model holds the byte pairs only; its 256 control tokens follow them in this order.
LLAMA3_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>",
                  "<|reserved_special_token_1|>", "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>",
                  "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"]
LLAMA3_SPECIAL += [f"<|reserved_special_token_{i}|>" for i in range(3, 3 + 256 - len(LLAMA3_SPECIAL))]


# --- tokenizers -------------------------------------------------------------------------------------------------------

class SentencePieceTokenizer:
    """tokenizer.model of Llama-2 and Mistral. `special` maps the names of control tokens to ids."""

    def __init__(self, path, added=()):
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as e:
            raise ValueError(f"{path}: neither a sentencepiece model nor tiktoken ranks ({e})") from None
        ids = range(self.model.vocab_size())
        self.special = {self.model.id_to_piece(i): i for i in ids if self.model.is_control(i)} | dict(added)
        self.bos_id, self.eos_id = self.model.bos_id(), self.model.eos_id()
        self.vocab_size = max(self.model.vocab_size(), *(i + 1 for i in self.special.values()))

    def encode(self, text, *, bos, eos):
        """Ids of a text. bos and eos add the begin and end token; they have no default so that none is added twice."""
        return [self.bos_id] * bos + self.model.encode(text) + [self.eos_id] * eos

    def decode(self, ids):
        """The text of ids, control tokens left out."""
        special = set(self.special.values())
        return self.model.decode([int(i) for i in ids if i not in special])

    def piece(self, i):
        """How one id looks, for showing a text token by token."""
        return self.model.id_to_piece(i) if i < self.model.vocab_size() else _name(i, self.special)


class BytePairTokenizer:
    """Byte-level BPE: Llama-3's tokenizer.model, or the tokenizer.json of Llama-3, SmolLM2, Qwen. Merged by tiktoken.

    ranks: {bytes: id}, merged lowest id first. Bytes that a vocabulary lacks get ids past its end and are refused.
    special: {name: id} of control tokens, which text never turns into; words: the like that a model may write and that
    decode shows, such as Qwen's <think>.
    """

    def __init__(self, ranks, pattern, special, bos=None, eos=None, normal_form=None, words=()):
        self.special, self.normal_form, words = dict(special), normal_form, dict(words)
        self.bos_id, self.eos_id = self.special.get(bos), self.special.get(eos)
        self.vocab_size = 1 + max(*ranks.values(), *self.special.values(), *words.values())
        absent = [bytes([b]) for b in range(256) if bytes([b]) not in ranks]
        ranks = ranks | {b: self.vocab_size + i for i, b in enumerate(absent)}
        # tiktoken's special tokens are ours that show in text: encode_ordinary never makes them, decode shows them.
        self.model = tiktoken.Encoding("model", pat_str=pattern, mergeable_ranks=ranks, special_tokens=words)

    def encode(self, text, *, bos, eos):
        """Ids of a text. bos and eos add the begin and end token; they have no default so that none is added twice."""
        if (bos and self.bos_id is None) or (eos and self.eos_id is None):
            raise ValueError("this tokenizer's files name no such begin or end token; call encode without it")
        if self.normal_form:
            text = unicodedata.normalize(self.normal_form, text)
        ids = self.model.encode_ordinary(text)
        if ids and max(ids) >= self.vocab_size:
            raise ValueError(f"text holds a character whose bytes are not in the vocabulary: {text[:80]!r}")
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def decode(self, ids):
        """The text of ids, control tokens left out; bytes that are not UTF-8 show as U+FFFD."""
        special = set(self.special.values())
        return self.model.decode([int(i) for i in ids if i not in special])

    def piece(self, i):
        """How one id looks, for showing a text token by token."""
        return _name(i, self.special) or self.model.decode([i])


def _name(i, special):
    return next((name for name, token in special.items() if token == i), None)


def load_tokenizer(folder):
    """The tokenizer of a model folder: tokenizer.model, else tokenizer.json, else original/tokenizer.model (Meta's).

    What a file is, is read from its content. ValueError names the file, or the one to fetch.
    """
    folder = Path(folder)
    settings = _read_json(folder / "tokenizer_config.json")
    added = dict(_read_json(folder / "added_tokens.json"))
    added |= {t["content"]: int(i) for i, t in settings.get("added_tokens_decoder", {}).items()}
    model_file, json_file = folder / "tokenizer.model", folder / "tokenizer.json"
    if not model_file.exists() and not json_file.exists():
        model_file = folder / "original" / "tokenizer.model"
    if model_file.exists():
        ranks = _read_tiktoken(model_file)
        if ranks is None:
            return SentencePieceTokenizer(model_file, added)
        special = {name: len(ranks) + i for i, name in enumerate(LLAMA3_SPECIAL)}
        return BytePairTokenizer(ranks, LLAMA3_PATTERN, special, "<|begin_of_text|>", "<|end_of_text|>")
    if json_file.exists():
        name = lambda token: token["content"] if isinstance(token, dict) else token
        return _read_tokenizer_json(json_file, name(settings.get("bos_token")), name(settings.get("eos_token")))
    raise ValueError(f"{folder}: no tokenizer.model and no tokenizer.json; fetch the one that the model came with")


def _read_json(path):
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as e:
        raise ValueError(f"{path}: not valid JSON ({e})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found {content!r:.60}")
    return content


def _read_tiktoken(path):
    """{bytes: rank} of lines like `IQ== 0`, or None if the file is of another kind."""
    content = path.read_bytes()
    if not re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", content):
        return None
    ranks = {}
    for number, line in enumerate(content.splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise ValueError(f"{path}:{number}: expected a base64 token and its rank, found {line[:40]!r}") from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"{path}: ranks are not 0, 1, 2, ... once each; the file is cut short or damaged")
    return ranks


def _read_tokenizer_json(path, bos, eos):
    spec = _read_json(path)
    model, pre = spec.get("model") or {}, spec.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre])
    if model.get("type") != "BPE" or model.get("byte_fallback") or steps[-1].get("type") != "ByteLevel":
        raise ValueError(f"{path}: not byte-level BPE (model {model.get('type')}, pre-tokenizer "
                         f"{steps[-1].get('type')}); this is a sentencepiece vocabulary: fetch tokenizer.model of the "
                         "same model into the folder")

    if not {"vocab", "merges"} <= model.keys():
        raise ValueError(f"{path}: its model has no vocab or no merges")

    pattern, first, own_pattern = None, steps[0], steps[-1].get("use_regex", True)
    if len(steps) == 1 and own_pattern:
        pattern = GPT2_PATTERN
    elif len(steps) == 2 and first == {"type": "Digits", "individual_digits": True} and own_pattern:
        pattern = DIGITS_PATTERN
    elif (len(steps) == 2 and first["type"] == "Split" and "Regex" in first["pattern"]
          and first["behavior"] == "Isolated" and not first["invert"] and not own_pattern):
        pattern = first["pattern"]["Regex"]
    if pattern is None or steps[-1].get("add_prefix_space"):
        raise ValueError(f"{path}: pre_tokenizer {json.dumps(pre)[:200]} is not supported")
    normalizer = (spec.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):
        raise ValueError(f"{path}: normalizer {normalizer!r} is not supported; expected none or NFC")

    added = spec.get("added_tokens") or []
    special = {t["content"]: t["id"] for t in added if t.get("special")}
    words = {t["content"]: t["id"] for t in added if not t.get("special")}
    byte_of = _byte_alphabet()
    ranks = {bytes(byte_of[c] for c in token): i for token, i in model["vocab"].items()
             if token not in special | words}
    # tiktoken merges the pair whose result has the lowest id; the file says merge the pair listed first. The same thing
    # when results are listed in the order of their ids (a result may be listed once for each way to make it).
    merges = (m.split(" ") if isinstance(m, str) else m for m in model["merges"])
    results = [model["vocab"][a + b] for a, b in merges]
    reachable = set(results) | {i for token, i in ranks.items() if len(token) == 1}
    if any(a > b for a, b in zip(results, results[1:])) or not reachable.issuperset(ranks.values()):
        raise ValueError(f"{path}: merges are not in the order of the vocabulary, or it has tokens that no merge "
                         "makes; this vocabulary cannot be read exactly")
    return BytePairTokenizer(ranks, pattern, special, bos, eos, normalizer, words)


def _byte_alphabet():
    """GPT-2's spelling of bytes as printable characters: {character: byte}."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


# --- chat formats -----------------------------------------------------------------------------------------------------

class ChatFormat:
    """How a family of models lays out a dialogue.

    Messages are {"role": "system" | "user" | "assistant", "content": str}.
    end_id closes a response; stop_ids are all tokens at which generation ends. Content is stripped of surrounding white
    space.
    """

    def __init__(self, tokenizer, template=""):
        self.tokenizer = tokenizer
        self.end_id = tokenizer.eos_id
        self.stop_ids = {self.end_id}

    def encode_prompt(self, messages):
        """Ids of a dialogue up to where the next response starts. ValueError unless it is [system] user
        (assistant user)*."""
        for i, m in enumerate(messages):
            if not isinstance(m, dict) or not isinstance(m.get("role"), str) or not isinstance(m.get("content"), str):
                raise ValueError(f"message {i + 1} is {m!r:.120}; expected an object with a string role and content")
        roles = [m["role"] for m in messages]
        turns = roles[1:] if roles[:1] == ["system"] else roles
        if len(turns) % 2 == 0 or turns != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
            raise ValueError(f"prompt has the roles {roles}; expected an optional system turn, then user and assistant "
                             "in turn, user last")
        contents = [m["content"].strip() for m in messages]
        system = contents.pop(0) if roles[0] == "system" else None
        return self.layout(system, contents)

    def layout(self, system, contents):
        """Ids of a prompt: system text or None; contents user, assistant, ..., user."""
        raise NotImplementedError

    def encode_response(self, text):
        """Ids of a response: its text and one end token. These are the tokens that are scored."""
        return self.encode(text.strip()) + [self.end_id]

    def encode(self, text):
        text.encode()      # half a surrogate pair, which JSON can hold, is a ValueError here and not U+FFFD in training
        return self.tokenizer.encode(text, bos=False, eos=False)

    def encode_after_newline(self, text):
        """Ids of a text that follows a newline: sentencepiece would begin it with a space that is not there."""
        newline = self.encode("\n")
        ids = self.encode("\n" + text)
        assert ids[:len(newline)] == newline, "this vocabulary merges a newline with the text after it"
        return ids[len(newline):]


class Llama3(ChatFormat):
    """<|begin_of_text|>, then a header and <|eot_id|> around every turn. Meta's layout: no date, no default system."""

    def __init__(self, tokenizer, template=""):
        super().__init__(tokenizer)
        self.end_id = tokenizer.special["<|eot_id|>"]
        self.stop_ids = {tokenizer.special[t] for t in ("<|eot_id|>", "<|end_of_text|>", "<|eom_id|>")
                         if t in tokenizer.special}

    def header(self, role):
        special = self.tokenizer.special
        return [special["<|start_header_id|>"], *self.encode(role), special["<|end_header_id|>"], *self.encode("\n\n")]

    def layout(self, system, contents):
        ids = [self.tokenizer.special["<|begin_of_text|>"]]
        if system is not None:
            ids += self.header("system") + self.encode(system) + [self.end_id]
        for i, content in enumerate(contents):
            ids += self.header("assistant" if i % 2 else "user") + self.encode(content) + [self.end_id]
        return ids + self.header("assistant")


class MistralV1(ChatFormat):
    """Mistral-7B-Instruct v0.1 and v0.2: `[INST] ... [/INST]` as ordinary text, the system text in the first user
    turn."""

    def layout(self, system, contents):
        if system:
            contents = [f"{system}\n\n{contents[0]}", *contents[1:]]
        ids = [self.tokenizer.bos_id]
        for i, content in enumerate(contents):
            ids += self.encode_response(content) if i % 2 else self.encode(f"[INST] {content} [/INST]")
        return ids


class MistralV3(ChatFormat):
    """Mistral-7B-Instruct v0.3 (tokenizer v2 and v3): [INST] and [/INST] are control tokens, the system text goes into
    the last user turn."""

    def layout(self, system, contents):
        if system:
            contents = [*contents[:-1], f"{system}\n\n{contents[-1]}"]
        begin, end = self.tokenizer.special["[INST]"], self.tokenizer.special["[/INST]"]
        ids = [self.tokenizer.bos_id]
        for i, content in enumerate(contents):
            ids += self.encode_response(content) if i % 2 else [begin, *self.encode(content), end]
        return ids


class Llama2(ChatFormat):
    """Llama-2-chat: every exchange is `<s>[INST] ... [/INST] ... </s>`, the system text between <<SYS>> marks in the
    first."""

    def layout(self, system, contents):
        if system:
            contents = [f"<<SYS>>\n{system}\n<</SYS>>\n\n{contents[0]}", *contents[1:]]
        ids = []
        for i, content in enumerate(contents):
            if i % 2:
                ids += self.encode_response(content)
            else:
                ids += [self.tokenizer.bos_id, *self.encode(f"[INST] {content} [/INST]")]
        return ids

    def encode_response(self, text):
        return self.encode(f"{text.strip()} ") + [self.end_id]     # Meta's layout has a space before </s>


class Zephyr(ChatFormat):
    """Zephyr, TinyLlama: `<|user|>` and the like as ordinary text, </s> after every turn. Its template has no <s>."""

    def layout(self, system, contents):
        ids, newline = [], ""
        if system is not None:
            ids, newline = [*self.encode(f"<|system|>\n{system}"), self.end_id], "\n"
        for i, content in enumerate(contents):
            if i % 2:
                ids += self.encode("\n<|assistant|>\n") + self.encode_response(content)
            else:
                ids += [*self.encode(f"{newline}<|user|>\n{content}"), self.end_id]
            newline = "\n"
        return ids + self.encode("\n<|assistant|>\n")

    def encode_response(self, text):
        return self.encode_after_newline(text.strip()) + [self.end_id]


class ChatML(ChatFormat):
    """SmolLM2, Qwen and many fine-tunes. A system line that the model's template puts before dialogues without one is
    read from the template."""

    def __init__(self, tokenizer, template=""):
        super().__init__(tokenizer)
        self.start_id, self.end_id = tokenizer.special["<|im_start|>"], tokenizer.special["<|im_end|>"]
        self.stop_ids = {self.end_id}
        # The template is a program; this literal in it is all that differs between the models.
        found = re.search(r"<\|im_start\|>system(?:\n|\\n)([^<>{}]+?)<\|im_end\|>", template)
        self.default_system = found.group(1).replace("\\n", "\n") if found else None

    def layout(self, system, contents):
        system = self.default_system if system is None else system
        turns = [("system", system)] if system is not None else []
        turns += [("assistant" if i % 2 else "user", content) for i, content in enumerate(contents)]
        ids = []
        for role, content in turns:
            ids += [self.start_id, *self.encode(f"{role}\n{content}"), self.end_id, *self.encode("\n")]
        return ids + [self.start_id, *self.encode("assistant\n")]

    def encode_response(self, text):
        return self.encode_after_newline(text.strip()) + [self.end_id]


CHAT_FORMATS = {"llama3": Llama3, "mistral-v1": MistralV1, "mistral-v3": MistralV3, "llama2": Llama2, "zephyr": Zephyr,
                "chatml": ChatML}


def load_chat_format(folder, tokenizer, name=None):
    """The chat format of a model folder: by `name` (a key of CHAT_FORMATS), or by the marks in its chat template, or,
    without one, by its control tokens. Adds the end tokens of generation_config.json to stop_ids."""
    folder = Path(folder)
    template = _read_json(folder / "tokenizer_config.json").get("chat_template") or ""
    if (folder / "chat_template.jinja").exists():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if isinstance(template, list):                       # several named templates
        template = {t["name"]: t["template"] for t in template}.get("default", "")
    name = name or _detect(folder, template, tokenizer.special)
    if name not in CHAT_FORMATS:
        raise ValueError(f"chat format {name!r} is not known; expected one of {', '.join(CHAT_FORMATS)}")
    try:
        chat = CHAT_FORMATS[name](tokenizer, template)
        ids = chat.layout("system", ["user", "assistant", "user"]) + chat.encode_response("assistant")
    except KeyError as e:
        raise ValueError(f"{folder}: chat format {name} needs the control token {e}; this tokenizer lacks it") from None
    if None in ids:
        raise ValueError(f"{folder}: chat format {name} needs a begin and an end token; the files name none")
    ends = _read_json(folder / "generation_config.json").get("eos_token_id") or []
    chat.stop_ids |= set(ends if isinstance(ends, list) else [ends])
    return chat


def _detect(folder, template, special):
    marks = template or " ".join(special)
    if "[SYSTEM_PROMPT]" not in marks:
        if "<|start_header_id|>" in marks:
            return "llama3"
        if "<|im_start|>" in marks:
            return "chatml"
        if "<<SYS>>" in marks:
            return "llama2"
        if "[INST]" in marks:
            return "mistral-v3" if "[INST]" in special else "mistral-v1"
        if "<|user|>" in marks and "eos_token" in marks:
            return "zephyr"
    raise ValueError(f"{folder}: cannot tell the chat format from its "
                     f"{'chat template' if template else 'control tokens'}; name it with --chat_format, one of {', '.join(CHAT_FORMATS)}")
