"""Tokenizers and chat formats of Llama, Mistral and Qwen models, read from a Hugging Face folder.

    tokenizer = load_tokenizer("Llama-3-8B-Instruct")
    chat = load_chat_format("Llama-3-8B-Instruct", tokenizer)
    prompt = chat.encode_prompt([{"role": "user", "content": "Hi there"}])     # ends where the response starts
    response = chat.encode_response("Hello!")                                  # ends with its one end token

    python tokenizer.py Llama-3-8B-Instruct      # shows a dialogue token by token, and checks it

Two layers. A tokenizer turns text into ids and knows no chat. A chat format lays out turns: by the folder's own chat
template, rendered as transformers and vLLM render it, or by one of the short layouts below. Control tokens come from the
layout alone: an `<|eot_id|>` typed by a user stays ordinary text. Prompt and response are encoded apart, so the border
between them is exact. Needs sentencepiece and tiktoken, and jinja2 for chat templates.
"""
import argparse
import base64
import datetime
import heapq
import json
import re
import signal
import sys
import threading
import unicodedata
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise
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

# Put into names of control tokens that stand in content, so that they are not found there. Unicode reserves this
# character for use inside a program; where content holds it nevertheless, it is doubled.
BREAK = "\ufdd0"


# --- tokenizers -------------------------------------------------------------------------------------------------------

class Tokenizer:
    """What all tokenizers share: added tokens, and text in runs between them. Subclasses encode and decode a run.

    special: {name: id} of control tokens, which text never turns into.
    words: {name: id} of the other added tokens, such as Qwen's <think>: a model writes them as one token and they show
    in text, so text turns into them.
    """

    note = ""           # in words, if others read the files otherwise

    def __init__(self, special, words, bos, eos, text_size):
        self.special, self.words = dict(special), dict(words)
        self.names = self.special | self.words
        self.bos_id, self.eos_id = self.names.get(bos), self.names.get(eos)
        self.text_size = max(text_size, *(i + 1 for i in self.words.values()), 0)    # ids of text are below
        self.vocab_size = max(self.text_size, *(i + 1 for i in self.special.values()))
        self.name_of = {i: name for name, i in self.names.items()}
        self.find_word = any_of(self.words)
        self.find_name = any_of(self.names)

    def encode(self, text, *, bos, eos):
        """Ids of a text. bos and eos add the begin and end token; they have no default so that none is added twice."""
        if (bos and self.bos_id is None) or (eos and self.eos_id is None):
            raise ValueError("this tokenizer's files name no such begin or end token; call encode without it")
        return [self.bos_id] * bos + self.encode_text(text, "text") + [self.eos_id] * eos

    def encode_text(self, text, place):
        """Ids of a text that stands at `place`, see encode_run."""
        return self._encode_parts(self.find_word.split(text), place)

    def reserve(self, names):
        """Makes control tokens of words: those that a chat layout writes around turns, whatever the files call them."""
        for name in self.words.keys() & set(names):
            self.special[name] = self.words.pop(name)
        self.find_word = any_of(self.words)

    def encode_rendered(self, text, place="start"):
        """Ids of a text in which names of control tokens stand for them: what a chat template rendered."""
        parts = self.find_name.split(text)
        return self._encode_parts([re.sub(f"{BREAK}({BREAK}?)", r"\1", part) for part in parts], place)

    def _encode_parts(self, parts, place):
        ids = []
        for n, part in enumerate(parts):                    # text, a name, text, a name, ...
            if n % 2:
                ids.append(self.names[part])
                place = "after"
            elif part:
                ids += self.encode_run(part, place)
        return ids

    def encode_run(self, text, place):
        """Ids of text without added tokens. place: "text" (by itself), or in a rendered dialogue its "start", "after" an
        added token, or "inside" (after other text). It matters to sentencepiece, which begins texts with a space."""
        raise NotImplementedError

    def decode_run(self, ids, place):
        """The text of ids that are no added tokens. Ids without a token are nothing."""
        raise NotImplementedError

    def decode(self, ids, place="text"):
        """The text of ids, control tokens left out; bytes that are not UTF-8 show as U+FFFD."""
        return self._decode(ids, place, self.words)

    def spell(self, ids):
        """How ids look one after another, control tokens by name."""
        return self._decode(ids, "start", self.names)

    def _decode(self, ids, place, shown):
        text, run = "", []
        for i in [*map(int, ids), None]:
            if i is not None and i not in self.name_of:
                run.append(i)
                continue
            text += self.decode_run(run, place)
            if i is not None:
                name = self.name_of[i]
                text += name if name in shown else ""
                run, place = [], "after"
        return text


def any_of(names):
    """A pattern that finds the longest of `names`, for split: its matches are kept between the parts."""
    return re.compile("(" + ("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)") + ")")


def first_difference(a, b):
    """The first index at which two sequences differ; the length of the shorter where it is the beginning of the other."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


class BytePairTokenizer(Tokenizer):
    """Byte-level BPE: Llama-3's tokenizer.model, or the tokenizer.json of Llama-3, SmolLM2, Qwen. Merged by tiktoken.

    ranks: {bytes: id}, merged lowest id first. Bytes that a vocabulary lacks get ids past its end and are refused.
    """

    def __init__(self, ranks, pattern, special, bos=None, eos=None, normal_form=None, words=()):
        super().__init__(special, words, bos, eos, 1 + max(ranks.values()))
        self.pattern, self.normal_form = pattern, normal_form
        self.bytes_of = {i: token for token, i in ranks.items()}
        absent = [bytes([b]) for b in range(256) if bytes([b]) not in ranks]
        ranks = ranks | {b: self.vocab_size + i for i, b in enumerate(absent)}
        self.model = tiktoken.Encoding("model", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

    def encode_run(self, text, place):
        if self.normal_form:
            text = unicodedata.normalize(self.normal_form, text)
        ids = self.model.encode_ordinary(text)
        if ids and max(ids) >= self.vocab_size:
            raise ValueError(f"text holds a character whose bytes are not in the vocabulary: {text[:80]!r}")
        return ids

    def decode_run(self, ids, place):
        return b"".join(self.bytes_of.get(i, b"") for i in ids).decode("utf-8", "replace")

    def piece(self, i):
        """How one id looks, for showing a text token by token."""
        return self.name_of.get(i) or self.decode_run([i], "inside")


class SentencePieceTokenizer(Tokenizer):
    """tokenizer.model of Llama-2 and Mistral, by Google's library.

    special, words: what the other files add. every_run: in a rendered dialogue text begins with a space after each
    control token and not at the start alone.
    """

    def __init__(self, path, special=(), words=(), every_run=False):
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as e:
            raise ValueError(f"{path}: neither a sentencepiece model nor tiktoken ranks ({e})") from None
        model = self.model
        control = {model.id_to_piece(i): i for i in range(model.vocab_size()) if model.is_control(i)}
        super().__init__(control | dict(special), words, None, None, model.vocab_size())
        self.bos_id, self.eos_id = model.bos_id(), model.eos_id()
        self.every_run = every_run
        self.newline = model.encode("\n")

    def encode_run(self, text, place):
        ids = self._encode_run(text, place)
        if not self.name_of.keys().isdisjoint(ids):
            # A symbol that the model itself knows and that another file declares a control token: spell it out.
            first, *rest = re.split("(?<=" + ")|(?<=".join(re.escape(name[:1]) for name in self.special) + ")", text)
            ids = self._encode_run(first, place) + [i for part in rest for i in self._encode_run(part, "inside")]
        return ids

    def begins_with_space(self, place):
        return place in ("text", "start") or place == "after" and self.every_run

    def _encode_run(self, text, place):
        if self.begins_with_space(place) and not (text.startswith(" ") and place != "text"):
            return self.model.encode(text)
        # The library puts a space before every text. Behind a newline, which nothing merges with, there is none.
        ids = self.model.encode("\n" + text)
        if self.model.decode(self.newline) != "\n" or ids[:len(self.newline)] != self.newline:
            raise ValueError("this sentencepiece model changes newlines; text within a dialogue cannot be encoded exactly")
        return ids[len(self.newline):]

    def decode_run(self, ids, place):
        text = self.model.decode([i for i in ids if i < self.model.vocab_size()])
        if not self.begins_with_space(place) and ids and self.piece(ids[0]).startswith("▁"):
            return " " + text       # the library takes the first space away
        return text

    def piece(self, i):
        """How one id looks, for showing a text token by token."""
        return self.name_of.get(i) or (self.model.id_to_piece(i) if i < self.model.vocab_size() else "")

class CharacterPairTokenizer(Tokenizer):
    """tokenizer.json of a sentencepiece vocabulary, as transformers saves Llama-2, Mistral, TinyLlama: BPE of characters,
    and bytes for those without a token.

    vocab: {token: id}; merges: pairs of tokens, merged first to last; whole: {token: id} of pieces that are never cut.
    begins: which runs begin with a space: "every" run, "any" that has none yet, the "first" that has none, or "none".
    """

    def __init__(self, vocab, merges, special, words, bos, eos, begins, whole=()):
        super().__init__(special, words, bos, eos, 1 + max(vocab.values()))
        self.vocab, self.begins = vocab | dict(whole), begins
        self.find_whole = any_of(whole)
        self.piece_of = {i: token for token, i in self.vocab.items() if i not in self.name_of}
        self.byte_of = {vocab[f"<0x{b:02X}>"]: b for b in range(256)}
        self.byte_id = {b: i for i, b in self.byte_of.items()}
        # Text that spells a control token out is never merged into it.
        self.rank = {(a, b): rank for rank, (a, b) in enumerate(merges) if a + b not in self.names}
        # Two neighbours that are inside no token are never merged, so text is cut there, and the parts are remembered.
        self.inside = {a + b for token in vocab for a, b in pairwise(token)}
        self.merge = lru_cache(2**17)(self._merge)

    def begins_with_space(self, place):
        return {"every": place != "inside", "any": place != "inside", "first": place in ("text", "start"),
                "none": False}[self.begins]

    def encode_run(self, text, place):
        text = text.replace(" ", "▁")
        if self.begins_with_space(place) and (
                place == "text" or self.begins == "every" or not text.startswith("▁")):
            text = "▁" + text
        ids = []
        for n, part in enumerate(self.find_whole.split(text)):
            if n % 2:                                       # text, a whole piece, text, ...
                ids.append(self.vocab[part])
                continue
            start = 0
            for end, (a, b) in enumerate(pairwise(part), 1):
                if a + b not in self.inside:
                    ids += self.merge(part[start:end])
                    start = end
            if part:
                ids += self.merge(part[start:])
        return ids

    def _merge(self, text):
        """Ids of text whose pairs are merged in the order of `rank`, leftmost first. O(n log n)."""
        token = list(text)                                  # token[i] starts at i; None where it was merged away
        after = [*range(1, len(text)), None]                # the start of the next token
        before = [None, *range(len(text) - 1)]
        heap = [(self.rank[pair], i, pair) for i, pair in enumerate(pairwise(text)) if pair in self.rank]
        heapq.heapify(heap)
        while heap:
            _, i, pair = heapq.heappop(heap)
            j = after[i]
            if j is None or (token[i], token[j]) != pair:
                continue                                    # one of the two was merged with another since
            token[i], token[j], after[i] = token[i] + token[j], None, after[j]
            if after[i] is not None:
                before[after[i]] = i
            for left, right in ((before[i], i), (i, after[i])):
                if left is not None and right is not None and (new := (token[left], token[right])) in self.rank:
                    heapq.heappush(heap, (self.rank[new], left, new))
        ids = []
        for part in filter(None, token):
            ids += [self.vocab[part]] if part in self.vocab else [self.byte_id[b] for b in part.encode()]
        return ids

    def decode_run(self, ids, place):
        text = b"".join(bytes([self.byte_of[i]]) if i in self.byte_of else self.piece_of.get(i, "").encode()
                        for i in ids).decode("utf-8", "replace").replace("▁", " ")
        return text.removeprefix(" ") if self.begins_with_space(place) else text

    def piece(self, i):
        """How one id looks, for showing a text token by token."""
        return self.name_of.get(i) or self.piece_of.get(i, "")

def load_tokenizer(folder):
    """The tokenizer of a model folder: tokenizer.json, else tokenizer.model, else original/tokenizer.model (Meta's).

    tokenizer.json goes first because transformers, vLLM and others read it. What a file is, is read from its content.
    ValueError names the file, or the one to fetch.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected a model folder, as `hf download` makes it from the hub")
    try:
        return _load_tokenizer(folder)
    except (KeyError, IndexError, TypeError, AttributeError) as e:
        raise ValueError(f"{folder}: its tokenizer files are not written as such files are ({type(e).__name__}: {e}); fetch "
                         "them again") from e


def _load_tokenizer(folder):
    settings, names = _read_json(folder / "tokenizer_config.json"), token_names(folder)
    bos, eos = names.get("bos_token"), names.get("eos_token")
    json_file, model_file = folder / "tokenizer.json", folder / "tokenizer.model"
    spec = _read_json(json_file)
    special, words, whole = _added_tokens(folder, settings, spec, names)
    if json_file.exists():
        model = spec.get("model") or {}
        if model.get("type", "BPE") != "BPE" or not {"vocab", "merges"} <= model.keys():
            raise ValueError(f"{json_file}: model {model.get('type')!r} is not supported; expected BPE with vocab and "
                             "merges; fetch tokenizer.model of the same model, if it has one, and move this file away")
        for field in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
            if model.get(field):
                raise ValueError(f"{json_file}: model has {field} = {model[field]!r:.40}, which is not supported; expected none")
        merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        if model.get("byte_fallback"):
            tokenizer = _read_byte_fallback(json_file, spec, merges, special, words, whole, bos, eos)
        else:
            tokenizer = _read_byte_level(json_file, spec, merges, special, words, bos, eos)
        tokenizer.note = _other_reading(folder, settings, tokenizer)
        return tokenizer

    if not model_file.exists():
        model_file = folder / "original" / "tokenizer.model"
    if not model_file.exists():
        raise ValueError(f"{folder}: no tokenizer.json and no tokenizer.model; fetch the one that the model came with")
    ranks = _read_tiktoken(model_file)
    if ranks is None:
        return SentencePieceTokenizer(model_file, special, words, every_run=bool(settings.get("legacy")))
    special = {name: len(ranks) + i for i, name in enumerate(LLAMA3_SPECIAL)}
    return BytePairTokenizer(ranks, LLAMA3_PATTERN, special, "<|begin_of_text|>", "<|end_of_text|>")


def _other_reading(folder, settings, tokenizer):
    """What AutoTokenizer of transformers 5, and so what is served by it, makes of tokenizer.json, in words; "" if it takes
    it as it stands. For two classes that tokenizer_config.json may name it makes a pre-tokenizer of its own."""
    config = _read_json(folder / "config.json")
    family = str(settings.get("tokenizer_class") or config.get("tokenizer_class") or "").removesuffix("Fast")
    if family == "LlamaTokenizer" and isinstance(tokenizer, CharacterPairTokenizer):
        begins = "any" if settings.get("legacy") else "first"
        begins = "none" if settings.get("add_prefix_space") is False else begins
        differs = begins != tokenizer.begins and config.get("model_type") != "mistral"
    else:
        differs = family == "GPT2Tokenizer" and getattr(tokenizer, "pattern", GPT2_PATTERN) != GPT2_PATTERN
    if not differs:
        return ""
    return (f"tokenizer.json is read as it stands, as by transformers 4; AutoTokenizer of transformers 5 changes it for a "
            f"tokenizer_class {family} (PreTrainedTokenizerFast in tokenizer_config.json keeps it)")


def _read_json(path):
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as e:
        raise ValueError(f"{path}: not valid JSON ({e})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found {content!r:.60}")
    return content


def token_names(folder):
    """{"bos_token": "<s>", ...}: the tokens that a folder's settings name, as chat templates get them."""
    folder = Path(folder)
    settings = _read_json(folder / "special_tokens_map.json") | _read_json(folder / "tokenizer_config.json")
    defaults = {}
    if str(settings.get("tokenizer_class")).removesuffix("Fast") == "LlamaTokenizer":
        defaults = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    elif str(settings.get("tokenizer_class")).removesuffix("Fast") == "Qwen2Tokenizer":
        defaults = {"eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    names = {}
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = settings.get(key, defaults.get(key))
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None and not isinstance(token, str):
            raise ValueError(f"{folder}/tokenizer_config.json: {key} = {token!r:.60}; expected a string")
        if token:
            names[key] = token
    return names


def _added_tokens(folder, settings, spec, names):
    """(special, words, whole) as {name: id}: the tokens that tokenizer.json, tokenizer_config.json and added_tokens.json
    add. whole: where a space is prepended before tokens are looked for, those found only with a space before them."""
    found = [(name, i, {}) for name, i in _read_json(folder / "added_tokens.json").items()]
    found += [(t["content"], t["id"], t) for t in spec.get("added_tokens") or []]
    found += [(t["content"], i, t) for i, t in (settings.get("added_tokens_decoder") or {}).items()]
    vocab = (spec.get("model") or {}).get("vocab") or {}
    if not all(type(i) is int and 0 <= i < 2**31 for i in vocab.values()) or len(set(vocab.values())) < len(vocab):
        raise ValueError(f"{folder}/tokenizer.json: the ids of its vocabulary are not different numbers from 0 on; the "
                         "file is damaged, fetch it again")
    last = len(vocab) - 1
    for token in spec.get("added_tokens") or []:            # the library counts on where the vocabulary lacks a name
        i = vocab.get(token["content"], last + 1)
        last = max(last, i)
        if i != token["id"]:
            raise ValueError(f"{folder}/tokenizer.json: added token {token['content']!r} has id {token['id']}, which "
                             f"transformers takes for {i}; number added tokens on from the vocabulary's end")
    ids = {}
    for name, i, _ in found:
        if ids.setdefault(name, int(i)) != int(i):
            raise ValueError(f"{folder}: added token {name!r} has the id {ids[name]} in one file and {i} in another; expected "
                             "the same in tokenizer.json, tokenizer_config.json and added_tokens.json")
    prepends = "Prepend" in json.dumps(spec.get("normalizer"))
    special, words, whole = {}, {}, {}
    for name, (i, flags) in {name: (int(i), flags) for name, i, flags in found}.items():
        if not isinstance(name, str) or not name or not 0 <= i < 2**31:
            raise ValueError(f"{folder}: added token {name!r} with id {i}; expected a name and a number from 0 on")
        late = prepends and flags.get("normalized")         # looked for after the space has been put before text
        if flags.get("special", True) or name in names.values():
            special[name] = i
        elif late:
            whole["▁" + name.replace(" ", "▁")] = i
        else:
            words[name] = i
        if late and name in special or any(flags.get(flag) for flag in ("lstrip", "rstrip", "single_word")):
            raise ValueError(f"{folder}: added token {name!r} takes in what stands beside it (lstrip, rstrip or single_word, "
                             "or normalized with a Prepend normalizer), which cannot be read exactly; set the flag to "
                             "false in tokenizer.json and tokenizer_config.json")
    return special, words, whole


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


def _read_byte_level(path, spec, merges, special, words, bos, eos):
    pre, vocab = spec.get("pre_tokenizer") or {}, spec["model"]["vocab"]
    steps = pre.get("pretokenizers", [pre])
    if steps[-1].get("type") != "ByteLevel":
        raise ValueError(f"{path}: neither byte-level BPE nor BPE with byte fallback (pre-tokenizer "
                         f"{steps[-1].get('type')}); fetch tokenizer.model of the same model, if it has one, and move this "
                         "file away")
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

    byte_of = _byte_alphabet()
    ranks = {bytes(byte_of[c] for c in token): i for token, i in vocab.items()
             if token not in special and token not in words}
    # tiktoken merges the pair whose result has the lowest id; the file says merge the pair listed first. The same thing
    # when results are listed in the order of their ids (a result may be listed once for each way to make it).
    results = [vocab[a + b] for a, b in merges]
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


def _read_byte_fallback(path, spec, merges, special, words, whole, bos, eos):
    vocab, normalizer, pre = spec["model"]["vocab"], spec.get("normalizer"), spec.get("pre_tokenizer")
    prepend = {"type": "Prepend", "prepend": "▁"}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    steps = normalizer.get("normalizers", [normalizer]) if normalizer else []
    begins = None
    if steps == [prepend, replace] and not pre:
        begins = "every"
    elif steps == [replace] and not pre:
        begins = "none"
    elif not steps and pre and pre.get("type") == "Metaspace" and pre.get("replacement") == "▁" and not pre.get("split"):
        scheme = pre.get("prepend_scheme") or ("always" if pre.get("add_prefix_space") else "never")
        begins = {"always": "any", "first": "first", "never": "none"}.get(scheme)
    missing = [f"<0x{b:02X}>" for b in range(256) if f"<0x{b:02X}>" not in vocab]
    if begins is None or missing:
        raise ValueError(f"{path}: a sentencepiece vocabulary that cannot be read exactly (normalizer "
                         f"{json.dumps(normalizer)[:150]}, pre_tokenizer {json.dumps(pre)[:150]}, {len(missing)} bytes "
                         "without a token); fetch tokenizer.model of the same model, if it has one, and move this file away")
    return CharacterPairTokenizer(vocab, merges, special, words, bos, eos, begins, whole)


# --- chat formats -----------------------------------------------------------------------------------------------------

class ChatFormat:
    """How a family of models lays out a dialogue: the makers' own layout, as their encoders write it.

    Messages are {"role": "system" | "user" | "assistant", "content": str}.
    end_id closes a response; stop_ids are all tokens at which generation ends; source says in words whose layout it is.
    Content is stripped of surrounding white space.
    """
    date = None         # ISO date of a template that asks for today's

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.end_id = tokenizer.eos_id
        self.stop_ids = {self.end_id}
        self.source = f"chat format {type(self).__name__}"

    def encode_prompt(self, messages):
        """Ids of a dialogue up to where the next response starts. ValueError unless it is [system] user
        (assistant user)*."""
        self.check(messages)
        contents = [m["content"].strip() for m in messages]
        system = contents.pop(0) if messages[0]["role"] == "system" else None
        return self.layout(system, contents)

    def check(self, messages):
        for i, m in enumerate(messages):
            if not isinstance(m, dict) or not isinstance(m.get("role"), str) or not isinstance(m.get("content"), str):
                raise ValueError(f"message {i + 1} is {m!r:.120}; expected an object with a string role and content")
        roles = [m["role"] for m in messages]
        turns = roles[1:] if roles[:1] == ["system"] else roles
        if len(turns) % 2 == 0 or turns != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
            raise ValueError(f"prompt has the roles {roles}; expected an optional system turn, then user and assistant "
                             "in turn, user last")

    def layout(self, system, contents):
        """Ids of a prompt: system text or None; contents user, assistant, ..., user."""
        raise NotImplementedError

    def encode_response(self, text):
        """Ids of a response: its text and one end token. These are the tokens that are scored."""
        return self.encode(text.strip()) + [self.end_id]

    def decode_response(self, ids):
        """The text of a sampled response: what encode_response takes."""
        return self.tokenizer.decode(ids)

    def encode(self, text):
        text.encode()      # half a surrogate pair, which JSON can hold, is a ValueError here and not U+FFFD in training
        return self.tokenizer.encode(text, bos=False, eos=False)

    def opening(self):
        """What stands before a first user turn's text where there is no system turn."""
        text = "the first question"
        return self.tokenizer.spell(self.encode_prompt([{"role": "user", "content": text}])).partition(text)[0]

    def encode_inside(self, text):
        """Ids of a text that follows other text: sentencepiece would begin it with a space that is not there."""
        text.encode()
        return self.tokenizer.encode_text(text, "inside")


class Llama3(ChatFormat):
    """<|begin_of_text|>, then a header and <|eot_id|> around every turn. Meta's layout: no date, no default system."""

    def __init__(self, tokenizer):
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
        return self.encode_inside(text.strip()) + [self.end_id]


class ChatML(ChatFormat):
    """SmolLM2, Qwen and many fine-tunes. No default system text: that is their templates' own."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer)
        self.start_id, self.end_id = tokenizer.names["<|im_start|>"], tokenizer.names["<|im_end|>"]
        self.stop_ids = {self.end_id}

    def layout(self, system, contents):
        turns = [("system", system)] if system is not None else []
        turns += [("assistant" if i % 2 else "user", content) for i, content in enumerate(contents)]
        ids = []
        for role, content in turns:
            ids += [self.start_id, *self.encode(f"{role}\n{content}"), self.end_id, *self.encode("\n")]
        return ids + [self.start_id, *self.encode("assistant\n")]

    def encode_response(self, text):
        return self.encode_inside(text.strip()) + [self.end_id]


CHAT_FORMATS = {"llama3": Llama3, "mistral-v1": MistralV1, "mistral-v3": MistralV3, "llama2": Llama2, "zephyr": Zephyr,
                "chatml": ChatML}


# --- chat templates: the layout that a folder brings ------------------------------------------------------------------

SECONDS = 5                     # of computing for one dialogue; templates take a ten-thousandth
EXTRA_CHARACTERS = 10**6        # a template may write so many beside what it is given


class ChatTemplate(ChatFormat):
    """A folder's own chat template, rendered as transformers renders it.

    What transformers lets happen does not happen here: names of control tokens in content are broken before the template
    sees them, so that all that are found in its output are its own. Everything else is rendered as it is, so whatever
    the template does with content (strips it, takes thinking out of earlier turns) happens.

    A response is what the template writes for an assistant's turn after the generation prompt, up to its end token.
    """

    def __init__(self, tokenizer, template, source, token_names, date=None):
        super().__init__(tokenizer)
        self.source, self.token_names = source, token_names
        self.today = datetime.date.fromisoformat(date) if date else datetime.date.today()
        with self.bounded():
            self.template = self.environment().from_string(template)
        self.reserve([])
        self.learn()

    def environment(self):
        """Jinja as transformers sets it up: templates come from anywhere, so in a sandbox, and without large powers and
        products, which no time limit would stop."""
        try:
            from jinja2 import TemplateError
            from jinja2.ext import Extension, loopcontrols
            from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
        except ImportError:
            raise ValueError(f"{self.source}: reading it needs jinja2 3.1 (pip install jinja2); --chat_format names a "
                             "layout that needs none") from None

        class Sandbox(ImmutableSandboxedEnvironment):
            intercepted_binops = frozenset(("*", "**"))

            def call_binop(self, context, operator, left, right):
                sizes = [abs(x) if isinstance(x, (int, float)) else len(x) for x in (left, right)]
                if operator == "**" or sizes[0] * sizes[1] > EXTRA_CHARACTERS:
                    raise SecurityError(f"a chat template has no use for {operator} of such values")
                return super().call_binop(context, operator, left, right)

        class Generation(Extension):        # {% generation %} marks what an assistant writes; nothing is rendered for it
            tags = {"generation"}

            def parse(self, parser):
                next(parser.stream)
                return parser.parse_statements(("name:endgeneration",), drop_needle=True)

        def raise_exception(message):
            raise TemplateError(message)

        def strftime_now(style):
            self.date = self.today.isoformat()      # it asked: the date is part of the layout
            return self.today.strftime(style)

        def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
            return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

        sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation])
        sandbox.filters["tojson"] = tojson
        sandbox.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
        return sandbox

    @contextmanager
    def bounded(self):
        """Runs the template's code. Any error of it is a ValueError, computing for more than SECONDS too (in the main
        thread, which alone can be interrupted; a machine that stands still is no reason)."""
        def stop(*_):
            raise TimeoutError(f"it computes for more than {SECONDS} s")
        timed = threading.current_thread() is threading.main_thread()
        try:
            before = signal.signal(signal.SIGVTALRM, stop) if timed else None
            if timed:
                signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
            try:
                yield
            finally:
                if timed:
                    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
                    signal.signal(signal.SIGVTALRM, before)
        except Exception as e:
            raise ValueError(f"{self.source} cannot lay this out: {e or type(e).__name__}") from None

    def reserve(self, names):
        """Makes names control tokens beside those that are, which break_control keeps out of content."""
        self.tokenizer.reserve(names)
        if short := [name for name in self.tokenizer.special if len(name) < 2]:
            raise ValueError(f"control token {short[0]!r} is a single character, which cannot be told from text")
        self.find_control = any_of(self.tokenizer.special)

    def break_control(self, content):
        content.encode()            # half a surrogate pair, which JSON can hold, is a ValueError here
        content = content.replace(BREAK, 2 * BREAK)
        while self.find_control.search(content):
            content = self.find_control.sub(lambda name: name[0][0] + BREAK + name[0][1:], content)
        return content

    def render(self, messages, generation_prompt):
        """The text that the template makes of a dialogue, names of control tokens in content broken by BREAK."""
        broken = [{"role": m["role"], "content": self.break_control(m["content"])} for m in messages]
        room = EXTRA_CHARACTERS + 10 * sum(len(m["content"]) for m in broken)
        pieces = []
        with self.bounded():
            for piece in self.template.generate(messages=broken, add_generation_prompt=generation_prompt, tools=None,
                                                documents=None, **self.token_names):
                room -= len(piece)
                if room < 0:
                    raise OverflowError(f"it writes more than {EXTRA_CHARACTERS} characters of its own")
                pieces.append(piece)
        return "".join(pieces)

    def learn(self):
        """Finds out how the template opens and closes a response, from dialogues of which all is known. ValueError if that
        is not always the same, or does not end with a token."""
        ask = [{"role": "user", "content": "the first question"}]
        more = [{"role": "assistant", "content": "the first answer"}, {"role": "user", "content": "the next question"}]
        system = [{"role": "system", "content": "the system text"}]
        answer = {"role": "assistant", "content": "the last answer"}
        self.asked, self.left_out, shapes, layout = ask, set(), [], ""
        for messages in (ask, ask + more, system + ask, system + ask + more):
            try:
                prompt = self.render(messages, True)
                whole = self.render([*messages, answer], False)
                turns = self.render(messages, False)
            except ValueError:
                if messages == ask:
                    raise
                continue            # a template may refuse a system turn; it will say so where one comes
            if messages[-1]["content"] not in prompt or answer["content"] not in whole:
                raise ValueError(f"{self.source} leaves the last turn of a dialogue out")
            self.left_out |= {m["role"] for m in messages if m["content"] not in prompt}
            for message in messages:
                turns = turns.replace(message["content"], "")
            layout += turns
            # Mistral's template puts the system text into the last turn if that is the user's: with an answer it is lost.
            shape = self.response_shape(prompt, whole, answer["content"], required=messages[0]["role"] != "system")
            if shape:
                shapes.append(shape)
        if len(set(shapes)) > 1:
            raise ValueError(f"{self.source} opens and closes responses in different ways, {shapes[0][1:]} and "
                             f"{next(s for s in shapes if s != shapes[0])[1:]}")

        self.continues, self.open, close = shapes[0]
        end = self.tokenizer.find_name.search(close)
        if not end:
            raise ValueError(f"{self.source} closes a response with {close!r}, in which no token of the tokenizer stands "
                             "that generation could end at")
        self.space = close[:end.start()]                    # between a response's text and its end token
        self.close, self.rest = close[:end.end()], close[end.end():]
        # Marks alone: a word such as "user" or a line break that a layout happens to hold is text like any other.
        written = set(self.tokenizer.find_name.split(layout)[1::2])
        marks = [name for name in written if len(name) > 1 and not name.isalnum() and not name.isspace()]
        self.reserve([end[0], *marks])
        for key, name in self.token_names.items():
            if name in layout + close and name not in self.tokenizer.names:
                raise ValueError(f"{self.source} writes the {key} {name!r}, which has no id in tokenizer.json; expected it "
                                 "among its added tokens")
        self.end_id = self.tokenizer.names[end[0]]
        self.stop_ids = {self.end_id} | ({self.tokenizer.eos_id} - {None})
        self.asked_text = self.render(ask, True)
        ends_with_token = self.tokenizer.find_name.split(self.asked_text)[-1] == ""
        self.place = "after" if ends_with_token else "inside"

    def response_shape(self, prompt, whole, answer, required):
        """(whether the answered dialogue continues the prompt, what stands between the two and the answer, what stands
        after it). None if where the response starts cannot be told, ValueError if that is required."""
        at = whole.rindex(answer)
        close = whole[at + len(answer):]
        if whole.startswith(prompt) and len(prompt) <= at:
            return True, whole[len(prompt):at], close
        if prompt.startswith(whole[:at]):       # the prompt opens something (<think>) that a finished turn does not show
            return False, prompt[at:], close
        if required:
            n = first_difference(prompt, whole)
            raise ValueError(f"{self.source} writes {prompt[n:n + 60]!r} at the end of a prompt where an answered dialogue "
                             f"has {whole[n:n + 60]!r}; where its responses start cannot be told")

    def encode_prompt(self, messages):
        self.check(messages)
        for message in messages[:-1]:
            if message["role"] in self.left_out:
                raise ValueError(f"{self.source} leaves {message['role']} turns out of a dialogue; drop them, or name a "
                                 "layout with --chat_format")
        return self.tokenizer.encode_rendered(self.render(messages, True))

    def encode_response(self, text):
        if self.continues:
            whole = self.render([*self.asked, {"role": "assistant", "content": text}], False)
            if not whole.startswith(self.asked_text) or not whole.endswith(self.close + self.rest):
                n = first_difference(self.asked_text, whole)
                raise ValueError(f"{self.source} ends a prompt with {self.asked_text[-40:]!r}, and lays this response out as "
                                 f"{whole[n - 20:n + 60]!r}, which does not follow it: {text[:60]!r}")
            text = whole[len(self.asked_text):len(whole) - len(self.rest)]
        else:
            # The prompt has opened it already (<think>), also for a response that is stored with its opening.
            text = self.break_control(text.removeprefix(self.open)) + self.close
        return self.tokenizer.encode_rendered(text, self.place)

    def decode_response(self, ids):
        text = self.tokenizer.decode(ids, self.place)
        return (text.removeprefix(self.open) if self.continues else text).removesuffix(self.space)


# --- model folders ----------------------------------------------------------------------------------------------------

def load_chat_format(folder, tokenizer, name=None, date=None):
    """The chat format of a model folder: `name` (a key of CHAT_FORMATS), else the folder's own chat template, else, where
    there is none, the one that its control tokens tell of. date ("2026-01-31") is for templates that write today's; the
    format's `date` says whether it was asked for. Adds the end tokens of generation_config.json to stop_ids."""
    folder = Path(folder)
    if name and name not in CHAT_FORMATS:
        raise ValueError(f"chat format {name!r} is not known; expected one of {', '.join(CHAT_FORMATS)}")
    template, source = find_template(folder) if not name else ("", "")
    if template:
        chat = ChatTemplate(tokenizer, template, source, token_names(folder), date)
    else:
        chat = _named_format(folder, tokenizer, name or _detect(folder, tokenizer.special))
        chat.source += " (by --chat_format)" if name else " (there is no chat template; told from the control tokens)"
    ends = _read_json(folder / "generation_config.json").get("eos_token_id") or []
    ends = ends if isinstance(ends, list) else [ends]
    if not all(type(i) is int and i >= 0 for i in ends):
        raise ValueError(f"{folder}/generation_config.json: eos_token_id = {ends!r:.60}; expected an id or a list of ids")
    chat.stop_ids |= set(ends)
    return chat


def load_chat(folder, chat_format=None, date=None):
    """The chat format of a model folder, by `load_tokenizer` and `load_chat_format`, whose ids the model's embedding
    has. Its tokenizer is chat.tokenizer."""
    chat = load_chat_format(folder, load_tokenizer(folder), chat_format, date)
    rows = _read_json(Path(folder) / "config.json").get("vocab_size")
    if rows:
        check_vocabulary(folder, chat, rows)
    return chat


def find_template(folder):
    """(chat template, where it is from) of a model folder, empty strings without one."""
    file, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if file.exists():
        try:
            return file.read_text(encoding="utf-8"), f"the chat template {file}"
        except ValueError as e:
            raise ValueError(f"{file}: not UTF-8 text ({e})") from None
    template = _read_json(settings).get("chat_template") or ""
    if isinstance(template, list):                       # several named templates
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        if named and "default" not in named:
            raise ValueError(f"{settings}: chat_template has templates named {', '.join(map(str, named))}; expected one named "
                             "default among them, or choose a layout with --chat_format")
        template = named.get("default", "")
    if not isinstance(template, str):
        raise ValueError(f"{settings}: chat_template is {template!r:.60}; expected text or a list of named templates")
    return template, f"the chat template of {settings}" if template else ""


def _named_format(folder, tokenizer, name):
    try:
        chat = CHAT_FORMATS[name](tokenizer)
        ids = chat.layout("system", ["user", "assistant", "user"]) + chat.encode_response("assistant")
    except KeyError as e:
        raise ValueError(f"{folder}: chat format {name} needs the control token {e}; this tokenizer lacks it") from None
    if None in ids:
        raise ValueError(f"{folder}: chat format {name} needs a begin and an end token; the files name none")
    tokenizer.reserve(tokenizer.name_of[i] for i in ids if i in tokenizer.name_of)
    return chat


def _detect(folder, special):
    if "[SYSTEM_PROMPT]" not in special:
        if "<|start_header_id|>" in special:
            return "llama3"
        if "<|im_start|>" in special:
            return "chatml"
        if "[INST]" in special:
            return "mistral-v3"
    raise ValueError(f"{folder}: it has no chat template, and its control tokens do not tell the chat format; name it with "
                     f"--chat_format, one of {', '.join(CHAT_FORMATS)}")


def check_vocabulary(folder, chat, rows):
    """ValueError if text or layout can produce an id that an embedding of so many rows lacks. Others, such as that of a
    pad token past the embedding, do no harm."""
    tokenizer = chat.tokenizer
    layout = chat.encode_prompt([{"role": "user", "content": "Hi"}]) + chat.encode_response("Hi")
    if (needed := max(tokenizer.text_size, *(i + 1 for i in layout))) > rows:
        raise ValueError(f"{folder}: text and chat layout use {needed} tokens ({tokenizer.spell([needed - 1])!r} is the "
                         f"last), the embedding has {rows} rows; the files do not belong together")


# --- python tokenizer.py FOLDER ---------------------------------------------------------------------------------------

SAMPLE = [{"role": "user", "content": "What is 6 times 7?"}, {"role": "assistant", "content": "It is 42."},
          {"role": "user", "content": "Say it in French, please."}]


def main(argv=None):
    parser = argparse.ArgumentParser(description="Show how a model folder lays out a dialogue, token by token, and check it.")
    parser.add_argument("folder", help="model folder with its tokenizer files")
    parser.add_argument("--chat_format", choices=CHAT_FORMATS, help="instead of the folder's chat template")
    parser.add_argument("--date", help="2026-01-31, for templates that write today's date; today if not given")
    args = parser.parse_args(argv)
    tokenizer = load_tokenizer(args.folder)
    chat = load_chat_format(args.folder, tokenizer, args.chat_format, args.date)
    print(f"tokens    {type(tokenizer).__name__}, {tokenizer.vocab_size} ids")
    if tokenizer.note:
        print(f"note      {tokenizer.note}")
    print(f"layout    {chat.source}" + (f", with the date {chat.date}" if chat.date else ""))
    print(f"opening   {chat.opening()!r} where there is no system turn")
    prompt, response = chat.encode_prompt(SAMPLE), chat.encode_response("C'est quarante-deux.")
    print(f"\nprompt: {len(prompt)} tokens, of which the last is followed by the response")
    for i in prompt:
        print(f"{i:>8}  {tokenizer.piece(i)!r}")
    print(f"\nresponse, which is scored: {len(response)} tokens, of which the last ends it")
    for i in response:
        print(f"{i:>8}  {tokenizer.piece(i)!r}")
    stops = ", ".join(f"{i} {tokenizer.piece(i)!r}" for i in sorted(chat.stop_ids))
    print(f"\nstops     generation ends at any of {stops}")
    print(f"checked   {compare(args.folder, chat)}")


def compare(folder, chat):
    """What transformers' apply_chat_template says of the same dialogues, in words. ValueError shows the first difference."""
    if not isinstance(chat, ChatTemplate):
        if not find_template(Path(folder))[0]:
            return "nothing: the folder has no chat template to compare with"
        other = load_chat_format(folder, chat.tokenizer)
        same = other.encode_prompt(SAMPLE) == chat.encode_prompt(SAMPLE)
        return (f"this layout is {'the same as' if same else 'another than'} that of {other.source}, which opens a dialogue "
                f"with {other.opening()!r}")
    try:
        import transformers
    except ImportError:
        return "nothing: transformers is not installed (pip install transformers), whose apply_chat_template counts"
    if chat.date not in (None, datetime.date.today().isoformat()):
        return "nothing: transformers would write today's date; leave --date out"

    def count_equal(kind):
        """How many of the dialogues have the ids of a tokenizer class of transformers, and the first that has not."""
        reference = getattr(transformers, kind).from_pretrained(folder)
        equal, different = 0, ""
        for messages in dialogues:
            ours = chat.encode_prompt(messages)
            theirs = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            equal += ours == theirs
            if ours != theirs and not different:
                n = first_difference(ours, theirs)
                spell = chat.tokenizer.spell
                different = (f"token {n + 1} on is {spell(ours[n:n + 8])!r} {ours[n:n + 8]}, transformers' is "
                             f"{spell(theirs[n:n + 8])!r} {theirs[n:n + 8]}")
        return equal, different

    system = [{"role": "system", "content": "Be brief."}]
    dialogues = [SAMPLE[:1], SAMPLE]
    try:
        chat.encode_prompt(system + SAMPLE)
        dialogues += [system + SAMPLE[:1], system + SAMPLE]
    except ValueError as e:
        print(f"          with a system turn refused: {e}")
    try:
        # tokenizer.json as it stands, if there is one; AutoTokenizer of transformers 5 changes some of them.
        as_it_stands = (Path(folder) / "tokenizer.json").exists()
        equal, different = count_equal("PreTrainedTokenizerFast" if as_it_stands else "AutoTokenizer")
        auto_equal, auto_different = count_equal("AutoTokenizer")
    except Exception as e:
        return f"nothing: transformers cannot load these files ({str(e).splitlines()[0]})"
    if different:
        raise ValueError(f"a prompt differs from transformers {transformers.__version__}: {different}")
    said = f"{equal} prompts have the ids of transformers {transformers.__version__}'s apply_chat_template"
    if auto_different:
        said += (f";\n          but AutoTokenizer, which changes what tokenizer.json says, gives {len(dialogues) - auto_equal} "
                 f"of them other ids: {auto_different}")
    return said


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
