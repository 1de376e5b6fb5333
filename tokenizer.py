"""Tokenizers and chat formats of Llama, Mistral and Qwen models, read from a Hugging Face folder.

    chat = load_chat("Llama-3-8B-Instruct")
    prompt = chat.encode_prompt([{"role": "user", "content": "Hi there"}])
    response = chat.encode_response("Hello!")

    python tokenizer.py Llama-3-8B-Instruct     # shows a dialogue token by token, and checks it

The ids of the prompt end where the response starts; those of the response end with its one end
token.

There are two layers. A tokenizer turns text into ids and knows nothing of chat. A chat format lays
out turns: by the folder's own chat template, rendered as transformers and vLLM render it, or by one
of the short layouts below. Control tokens come from the layout alone: an `<|eot_id|>` typed by a
user stays ordinary text. Prompt and response are encoded apart, so the border between them is
exact.

The file can be copied alone. It needs sentencepiece and tiktoken, and jinja2 for chat templates.
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
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import sentencepiece
import tiktoken

# --- tokenizers -----------------------------------------------------------------------------------
#
# A text is cut at the names of added tokens, and the runs of text between them are encoded one by
# one. Sentencepiece begins a text with a space, so it matters where a run is, its place:
#
#   "text"      by itself
#   "start"     at the start of a rendered dialogue
#   "after"     after an added token
#   "inside"    after other text

# The places at which a run gets a space in front. The keys are tokenizer.json's own words, and
# "every", under which a run of a dialogue gets one even if it begins with a space itself.
SPACED_PLACES = {
    "every": ("text", "start", "after"),
    "always": ("text", "start", "after"),
    "first": ("text", "start"),
    "never": (),
}

# A chat template writes its control tokens and the content into one string. BREAK is put into names
# of control tokens that occur in content (ChatTemplate.break_control), so that they are not found
# there, and is taken out again when the string is encoded (without_breaks). Unicode reserves this
# character for use inside a program; where content holds it nevertheless, it is doubled.
BREAK = "\ufdd0"


class Tokenizer:
    """What all tokenizers share: added tokens, and text in runs between them.

    special: {name: id} of control tokens, which text never turns into. words: {name: id} of the
    other added tokens, such as Qwen's <think>: a model writes them as one token and they show in
    text, so text turns into them. bos, eos: names of the begin and the end token. text_size: the
    ids of runs are below it. Subclasses encode and decode a run.
    """

    note = ""           # in words, if other programs read the same files otherwise

    def __init__(self, special, words, bos, eos, text_size):
        self.special = dict(special)
        self.words = dict(words)
        self.names = self.special | self.words
        self.name_of = {i: name for name, i in self.names.items()}
        self.bos_id = self.names.get(bos)           # None where the files name none
        self.eos_id = self.names.get(eos)

        # Ids that text turns into are below text_size, all ids below vocab_size.
        self.text_size = 1 + max([text_size - 1, *self.words.values()])
        self.vocab_size = 1 + max([self.text_size - 1, *self.special.values()])

        # Text is cut at words alone, what a chat template rendered at all names.
        self.find_word = any_of(self.words)
        self.find_name = any_of(self.names)

    def encode(self, text, *, bos, eos):
        """Ids of a text. bos, eos: whether to add the begin and the end token.

        Neither has a default, so that nobody adds a second begin token unawares. ValueError if the
        files name no such token.
        """
        if (bos and self.bos_id is None) or (eos and self.eos_id is None):
            raise ValueError("this tokenizer's files name no such begin or end token; call encode "
                             "without it")
        ids = self.encode_text(text, "text")
        if bos:
            ids = [self.bos_id, *ids]
        if eos:
            ids = [*ids, self.eos_id]
        return ids

    def encode_text(self, text, place):
        """Ids of a text at `place`; names of control tokens in it are text."""
        return self._encode_parts(self.find_word.split(text), place)

    def encode_rendered(self, text, place="start"):
        """Ids of a text that a chat template rendered: names of control tokens are those tokens."""
        parts = [without_breaks(part) for part in self.find_name.split(text)]
        return self._encode_parts(parts, place)

    def _encode_parts(self, parts, place):
        ids = []
        for n, part in enumerate(parts):
            if n % 2:                       # the parts are text, a name, text, a name, ..., text
                ids.append(self.names[part])
                place = "after"
            elif part:                      # empty between two names in a row
                ids += self.encode_run(part, place)
        return ids

    def decode(self, ids, place="text"):
        """The text of ids without control tokens; bytes that are not UTF-8 show as U+FFFD."""
        return self._decode(ids, place, self.words)

    def spell(self, ids):
        """How ids look one after another, control tokens by name."""
        return self._decode(ids, "start", self.names)

    def _decode(self, ids, place, shown):
        """shown: the names of added tokens that become part of the text."""
        text = ""
        run = []                    # ids of text since the last added token
        for i in map(int, ids):
            if i not in self.name_of:
                run.append(i)
                continue
            # An added token ends the run.
            text += self.decode_run(run, place)
            if self.name_of[i] in shown:
                text += self.name_of[i]
            run = []
            place = "after"
        return text + self.decode_run(run, place)

    def piece(self, i):
        """How one id looks, for showing a text token by token; "" for an id without a token."""
        if i in self.name_of:
            return self.name_of[i]
        return self.run_piece(i)

    def reserve(self, names):
        """Makes control tokens of words: those that a chat layout writes around turns."""
        # find_name stays as it is: it looks for both kinds.
        for name in self.words.keys() & set(names):
            self.special[name] = self.words.pop(name)
        self.find_word = any_of(self.words)

    # What subclasses define, for a run of text that holds no added token.

    def encode_run(self, text, place):
        """Ids of a run of text at `place`."""
        raise NotImplementedError

    def decode_run(self, ids, place):
        """The text of ids that are no added tokens. An id without a token is nothing."""
        raise NotImplementedError

    def run_piece(self, i):
        """How one id that is no added token looks."""
        raise NotImplementedError


def any_of(names):
    """A pattern that finds the longest of `names`.

    Its `split` keeps the names: the parts are text, a name, text, a name, ..., text.
    """
    longest_first = sorted(names, key=len, reverse=True)
    alternatives = "|".join(map(re.escape, longest_first))
    if not alternatives:
        alternatives = "(?!)"               # matches nowhere, where "" would match everywhere
    return re.compile(f"({alternatives})")


def without_breaks(text):
    """Takes BREAK out again: one is nothing, two are one that stood in content."""
    return re.sub(f"{BREAK}({BREAK}?)", r"\1", text)


def first_difference(a, b):
    """The first index at which two sequences differ."""
    for i, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return i
    return min(len(a), len(b))              # one is the beginning of the other


def refuse_panic(error, what):
    """ValueError that names `what`, if `error` is a panic of a Rust library: no Exception is."""
    if type(error).__name__ == "PanicException":
        raise ValueError(f"{what}: the library that reads it gives up ({error})") from None


class BytePairTokenizer(Tokenizer):
    """Byte-level BPE of Llama-3, SmolLM2 and Qwen, merged by tiktoken.

    ranks: {bytes: id}; the pair whose result has the lowest id is merged first.
    pattern: how text is cut before that. normal_form: the Unicode form, such as "NFC", that text is
    brought to first.
    """

    def __init__(self, ranks, pattern, special, bos=None, eos=None, normal_form=None, words=()):
        super().__init__(special, words, bos, eos, text_size=1 + max(ranks.values()))
        self.pattern = pattern
        self.normal_form = normal_form
        self.bytes_of = {i: token for token, i in ranks.items()}
        self.length_of = [0] * (1 + max(ranks.values()))
        for token, i in ranks.items():
            self.length_of[i] = len(token)

        # tiktoken wants an id for every byte. Those that the vocabulary lacks get ids past its
        # end, by which encode_run knows them.
        complete = dict(ranks)
        free_id = self.vocab_size
        for b in range(256):
            if bytes([b]) not in ranks:
                complete[bytes([b])] = free_id
                free_id += 1
        # tiktoken drops text that the pattern does not match; the tokenizers library keeps each run
        # of it as a piece, which here is what the last alternative matches.
        covering = rf"(?:{pattern})|(?:(?!{pattern})[\s\S])+"
        try:
            self.model = tiktoken.Encoding("model", pat_str=covering, mergeable_ranks=complete,
                                           special_tokens={})
        except BaseException as e:
            refuse_panic(e, f"pattern {pattern!r:.200}")
            raise

    def encode_run(self, text, place):
        if self.normal_form:
            text = unicodedata.normalize(self.normal_form, text)
        try:
            ids = self.model.encode_ordinary(text)
        except BaseException as e:
            refuse_panic(e, f"text {text[:80]!r}")
            raise
        try:
            length = sum(map(self.length_of.__getitem__, ids))
        except IndexError:
            # The tokenizers library drops such bytes silently.
            raise ValueError(f"text holds a character whose bytes are not in the vocabulary: "
                             f"{text[:80]!r}") from None
        if length != len(text.encode()):
            raise ValueError(f"the tokenizer's pattern loses a part of the text {text[:80]!r}")
        return ids

    def decode_run(self, ids, place):
        # A character may be spread over several tokens, so bytes are joined before decoding.
        content = b"".join(self.bytes_of.get(i, b"") for i in ids)
        return content.decode("utf-8", "replace")

    def run_piece(self, i):
        return self.decode_run([i], "inside")


class SentencePieceTokenizer(Tokenizer):
    """tokenizer.model of Llama-2 and Mistral, by Google's library.

    special, words: what the other files add. prepend_scheme: a key of SPACED_PLACES.
    """

    def __init__(self, path, special=(), words=(), prepend_scheme="first"):
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as e:
            raise ValueError(f"{path}: neither a sentencepiece model nor tiktoken ranks "
                             f"({e})") from None

        # The model file knows its control tokens, the begin and the end token among them.
        control = {}
        for i in range(self.model.vocab_size()):
            if self.model.is_control(i):
                control[self.model.id_to_piece(i)] = i
        super().__init__(control | dict(special), words, None, None, self.model.vocab_size())
        # The library gives -1 for a token that the model lacks.
        self.bos_id = self.model.bos_id() if self.model.bos_id() >= 0 else None
        self.eos_id = self.model.eos_id() if self.model.eos_id() >= 0 else None
        self.spaced_places = SPACED_PLACES[prepend_scheme]
        self.newline = self.model.encode("\n")      # with the space that the library puts before

    def encode_run(self, text, place):
        ids = self._encode_run(text, place)
        if self.name_of.keys().isdisjoint(ids):
            return ids

        # The model itself knows a symbol that another file declares a control token, and found it
        # in the text. It is not found in text that is cut after the first letter of its name.
        first_letters = [re.escape(name[:1]) for name in self.special]
        cut = re.compile("(?<=" + "|".join(first_letters) + ")")
        ids = []
        for part in cut.split(text):
            ids += self._encode_run(part, place)
            place = "inside"
        return ids

    def _encode_run(self, text, place):
        # The library puts a space before every text, which is right where one belongs there.
        spaced = text.startswith(" ") and place != "text"
        if place in self.spaced_places and not spaced:
            return self.model.encode(text)

        # Behind a newline, which nothing merges with, it puts none.
        ids = self.model.encode("\n" + text)
        n = len(self.newline)
        if self.model.decode(self.newline) != "\n" or ids[:n] != self.newline:
            raise ValueError("this sentencepiece model changes newlines; text within a dialogue "
                             "cannot be encoded exactly")
        return ids[n:]

    def decode_run(self, ids, place):
        # Ids past the model's own are added tokens, or nothing.
        text = self.model.decode([i for i in ids if i < self.model.vocab_size()])
        # The library takes the first space away; where none was put in front, it is the text's own.
        if place not in self.spaced_places and ids and self.run_piece(ids[0]).startswith("▁"):
            return " " + text
        return text

    def run_piece(self, i):
        if i < self.model.vocab_size():
            return self.model.id_to_piece(i)
        return ""


class CharacterPairTokenizer(Tokenizer):
    """BPE of characters, and bytes for characters without a token.

    This is the tokenizer.json of a sentencepiece vocabulary, as transformers saves it for Llama-2,
    Mistral and TinyLlama.

    vocab: {token: id}, in which "▁" stands for a space. merges: pairs of tokens, of which the
    first in the list is merged first. whole: {token: id} of further pieces, which are never cut.
    prepend_scheme: a key of SPACED_PLACES.
    """

    def __init__(self, vocab, merges, special, words, bos, eos, prepend_scheme, whole=()):
        super().__init__(special, words, bos, eos, text_size=1 + max(vocab.values()))
        self.vocab = vocab | dict(whole)
        self.prepend_scheme = prepend_scheme
        self.spaced_places = SPACED_PLACES[prepend_scheme]
        self.find_whole = any_of(whole)

        # A character without a token is written as the tokens of its UTF-8 bytes.
        self.piece_of = {i: token for token, i in self.vocab.items() if i not in self.name_of}
        self.byte_id = {b: vocab[byte_name(b)] for b in range(256)}
        self.byte_of = {i: b for b, i in self.byte_id.items()}

        self.rank = {}              # {pair of tokens: its place in the list of merges}
        for rank, (left, right) in enumerate(merges):
            # Text that spells the name of an added token out is never merged into it.
            if left + right not in self.names:
                self.rank[left, right] = rank

        # Two characters that stand side by side in no token are never merged, so text is cut
        # between them. The parts are short and come again and again, so their ids are cached.
        self.neighbors = {a + b for token in vocab for a, b in pairwise(token)}
        self.merge = lru_cache(2**17)(self._merge)

    def encode_run(self, text, place):
        text = text.replace(" ", "▁")
        # Only the scheme "every" gives a run that begins with a space a second one.
        if place in self.spaced_places:
            spaced = text.startswith("▁") and place != "text"
            if self.prepend_scheme == "every" or not spaced:
                text = "▁" + text

        ids = []
        for n, part in enumerate(self.find_whole.split(text)):
            if n % 2:                       # the parts are text, a whole piece, text, ...
                ids.append(self.vocab[part])
            else:
                ids += self._encode_part(part)
        return ids

    def _encode_part(self, text):
        """Ids of text without whole pieces, cut where nothing is merged."""
        ids = []
        start = 0                           # of the part after the last cut
        for end, (a, b) in enumerate(pairwise(text), 1):
            if a + b not in self.neighbors:
                ids += self.merge(text[start:end])
                start = end
        if text:
            ids += self.merge(text[start:])
        return ids

    def _merge(self, text):
        """Ids of a text whose pairs are merged in the order of `rank`."""
        # What is left is in the vocabulary, or a character that is written as its bytes.
        ids = []
        for part in merge_pairs(list(text), self.rank.get):
            if part in self.vocab:
                ids.append(self.vocab[part])
            else:
                ids += [self.byte_id[b] for b in part.encode()]
        return ids

    def decode_run(self, ids, place):
        content = bytearray()
        for i in ids:
            if i in self.byte_of:
                content.append(self.byte_of[i])
            else:
                content += self.piece_of.get(i, "").encode()
        text = content.decode("utf-8", "replace").replace("▁", " ")
        # The space that encode_run put in front goes away again.
        return text.removeprefix(" ") if place in self.spaced_places else text

    def run_piece(self, i):
        return self.piece_of.get(i, "")


def merge_pairs(token, rank_of):
    """The tokens of a list after merging neighbors, in the order of their rank, leftmost first.

    rank_of((left, right)): the rank of a pair; None if it is never merged.
    O(n log n) for n tokens: a heap holds the pairs, linked lists hold the neighbors.
    """
    n = len(token)
    token = list(token)                     # token[i] starts at i; None once it is merged away
    after = [*range(1, n), None]            # the start of the next token
    before = [None, *range(n - 1)]          # the start of the token before
    heap = []                               # (rank, start, pair) of pairs to merge

    def offer(left):
        right = after[left]
        if right is not None:
            pair = (token[left], token[right])
            rank = rank_of(pair)
            if rank is not None:
                heapq.heappush(heap, (rank, left, pair))

    for start in range(n):
        offer(start)
    while heap:
        _, left, pair = heapq.heappop(heap)
        right = after[left]
        if right is None or (token[left], token[right]) != pair:
            continue                        # one of the two was merged with another since

        # The left token takes the right one in.
        token[left] += token[right]
        token[right] = None
        after[left] = after[right]
        if after[left] is not None:
            before[after[left]] = left

        # The longer token makes new pairs with its neighbors.
        if before[left] is not None:
            offer(before[left])
        offer(left)
    return [part for part in token if part is not None]


def byte_name(b):
    """The token of a byte in a sentencepiece vocabulary, such as <0x0A>."""
    return f"<0x{b:02X}>"


# --- tokenizer files ------------------------------------------------------------------------------

# How text is cut before byte pairs are merged, so that no token reaches from one word into the
# next. Llama-3: letters with the character before them, digits by threes, marks with the newlines
# after them, white space.
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
                  r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
# GPT-2: letters, digits or marks with the space before them, white space.
GPT2_PATTERN = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|"
                r"\s+(?!\S)|\s+")
# GPT-2's, after a step that takes digits out one by one (SmolLM2).
DIGITS_PATTERN = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|"
                  r"\s+(?![^\s\p{N}])|\s+")

# Llama-3's tokenizer.model holds the byte pairs only; its 256 control tokens follow them in this
# order.
LLAMA3_SPECIAL = [
    "<|begin_of_text|>", "<|end_of_text|>",
    "<|reserved_special_token_0|>", "<|reserved_special_token_1|>", "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
]
LLAMA3_SPECIAL += [f"<|reserved_special_token_{i}|>" for i in range(3, 248)]

MAX_ID = 2**24          # of a token: past any vocabulary, and lists of so many fit in memory

# The tokens that transformers' classes have where tokenizer_config.json does not name them.
CLASS_TOKENS = {
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "Qwen2Tokenizer": {
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    },
}


@dataclass
class AddedTokens:
    """What the files of a folder add to a vocabulary."""

    special: dict       # {name: id} of control tokens
    words: dict         # {name: id} of the other tokens
    whole: dict         # {piece: id} of words that are found only after a space
    bos: str            # name of the begin token; None where the files name none
    eos: str            # name of the end token; None where the files name none


def load_tokenizer(folder):
    """The tokenizer of a model folder.

    It reads tokenizer.json, else tokenizer.model, else original/tokenizer.model (Meta's).
    tokenizer.json goes first because transformers, vLLM and others read it. The kind of a file is
    recognized by its content. ValueError names the file that cannot be read exactly, or the one
    to fetch.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected a model folder, as `hf download` "
                         "makes it from the hub")
    # The settings, and what they add, go with either kind of file.
    settings = _read_json(folder / "tokenizer_config.json")
    spec = _read_json(folder / "tokenizer.json")
    added = _added_tokens(folder, settings, spec)
    path = folder / "tokenizer.json"
    if path.exists():
        with _naming(path):
            tokenizer = _read_tokenizer_json(path, spec, added)
        tokenizer.note = _other_reading(folder, settings, tokenizer)
        return tokenizer

    # Meta's own folders have tokenizer.model in a folder of its own.
    for path in (folder / "tokenizer.model", folder / "original" / "tokenizer.model"):
        if path.exists():
            with _naming(path):
                return _read_tokenizer_model(path, settings, added)
    raise ValueError(f"{folder}: no tokenizer.json and no tokenizer.model; fetch the one that the "
                     "model came with")


@contextmanager
def _naming(path):
    """Any error of a block that reads a file is a ValueError that names it.

    The checks of the block say more; no check foresees a list where an object belongs, or a field
    that is absent.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError,
            ValueError) as e:
        if isinstance(e, ValueError) and str(path.parent) in str(e):
            raise
        raise ValueError(f"{path}: not written as such files are ({type(e).__name__}: {e!s:.200}); "
                         "fetch it again") from e
    except BaseException as e:
        refuse_panic(e, path)
        raise


def _read_json(path):
    """The object that a JSON file holds; an empty one if there is no such file.

    ValueError names the file and what is wrong with it.
    """
    if not path.exists() and not path.is_symlink():
        return {}
    if not path.is_file():
        raise ValueError(f"{path}: not a file, or a link that leads nowhere; fetch it again")
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text, object_pairs_hook=_each_key_once)
        if not isinstance(content, dict):
            raise ValueError(f"expected an object, found {content!r:.60}")
        # Half a surrogate pair is no character; only an escape can write it.
        if re.search(r"\\u[dD][89a-fA-F]", text):
            json.dumps(content, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError(f"{path}: not valid JSON for this purpose (nested too deeply)") from None
    except ValueError as e:
        raise ValueError(f"{path}: not valid JSON ({e!s:.300})") from None
    return content


def _each_key_once(pairs):
    """A JSON object as a dict. ValueError if it has a key twice."""
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in content if keys.count(key) > 1)
        raise ValueError(f"an object has the key {twice!r:.60} twice")
    return content


# Added tokens, and the roles that the settings give some of them.

def token_names(folder):
    """{"bos_token": "<s>", ...}: the tokens that a folder's settings name.

    Chat templates get them under these keys.
    """
    folder = Path(folder)
    # tokenizer_config.json counts where both files name a token.
    path = folder / "tokenizer_config.json"
    map_path = folder / "special_tokens_map.json"
    own_settings = _read_json(path)
    settings = _read_json(map_path) | own_settings
    family = str(settings.get("tokenizer_class")).removesuffix("Fast")
    defaults = CLASS_TOKENS.get(family, {})
    names = {}
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = settings.get(key, defaults.get(key))
        # Older files write {"content": "<s>", ...}.
        if isinstance(token, dict):
            token = token.get("content")
        if token is not None and not isinstance(token, str):
            raise ValueError(f"{path if key in own_settings else map_path}: {key} = "
                             f"{token!r:.60}; expected a string")
        if token:
            names[key] = token
    return names


def _added_tokens(folder, settings, spec):
    """The AddedTokens of tokenizer.json, tokenizer_config.json and added_tokens.json."""
    names = token_names(folder)

    # Each file has a form of its own:
    #   added_tokens.json       {"<|im_end|>": 32000}
    #   tokenizer.json          [{"id": 32000, "content": "<|im_end|>", "special": true, ...}]
    #   tokenizer_config.json   {"32000": {"content": "<|im_end|>", "special": true, ...}}
    listed = []                 # (path, name, id, flags)
    path = folder / "added_tokens.json"
    for name, i in _read_json(path).items():
        listed.append((path, name, i, {}))
    path = folder / "tokenizer.json"
    with _naming(path):
        for token in spec.get("added_tokens") or []:
            listed.append((path, token["content"], token["id"], token))
        _check_numbering(path, spec)
        vocab = dict((spec.get("model") or {}).get("vocab") or {})
    path = folder / "tokenizer_config.json"
    with _naming(path):
        for i, token in (settings.get("added_tokens_decoder") or {}).items():
            # int() itself takes more for a number, such as "1_0".
            number = int(i) if re.fullmatch("[0-9]{1,10}", i) else i
            listed.append((path, token["content"], number, token))

    # Where several files have a token they must agree on its id; the flags of the last count.
    ids = {}
    flags_of = {}
    name_of = {i: name for name, i in vocab.items()}
    for path, name, i, flags in listed:
        _check_added_token(path, name, i, flags)
        if ids.setdefault(name, i) != i:
            raise ValueError(f"{folder}: added token {name!r} has the id {ids[name]} in one file "
                             f"and {i} in another; expected the same in tokenizer.json, "
                             "tokenizer_config.json and added_tokens.json")
        if name_of.setdefault(i, name) != name or vocab.get(name, i) != i:
            raise ValueError(f"{path}: added token {name!r} has the id {i}, which is that of "
                             f"{name_of[i]!r}, or another than in the vocabulary; expected an id "
                             "for each token")
        flags_of[name] = flags

    # The normalizer may be one step or a sequence of steps.
    prepends = "Prepend" in json.dumps(spec.get("normalizer"))
    special, words, whole = _sort_tokens(folder, ids, flags_of, set(names.values()), prepends)
    return AddedTokens(special, words, whole, names.get("bos_token"), names.get("eos_token"))


def _check_numbering(path, spec):
    """ValueError unless transformers gives all tokens of tokenizer.json the ids that it says."""
    vocab = (spec.get("model") or {}).get("vocab") or {}
    possible = all(type(i) is int and 0 <= i < MAX_ID for i in vocab.values())
    if not possible or len(set(vocab.values())) < len(vocab):
        raise ValueError(f"{path}: the ids of its vocabulary are not different numbers from 0 on; "
                         "the file is damaged, fetch it again")

    # An added token that the vocabulary lacks gets the next id past the end from transformers,
    # whatever id the file gives.
    last = len(vocab) - 1
    for token in spec.get("added_tokens") or []:
        i = vocab.get(token["content"], last + 1)
        last = max(last, i)
        if i != token["id"] or type(token["id"]) is not int:
            raise ValueError(f"{path}: added token {token['content']!r} has id {token['id']}, "
                             f"which transformers takes for {i}; number added tokens on from the "
                             "vocabulary's end")


def _check_added_token(path, name, i, flags):
    """ValueError unless an added token has a name, an id, and flags that are true or false."""
    if not isinstance(name, str) or not name or type(i) is not int or not 0 <= i < MAX_ID:
        raise ValueError(f"{path}: added token {name!r:.60} with id {i!r:.60}; expected a name and "
                         "a number from 0 on")
    for flag in ("special", "normalized", "lstrip", "rstrip", "single_word"):
        if not isinstance(flags.get(flag, False), bool):
            raise ValueError(f"{path}: added token {name!r:.60} has {flag} = {flags[flag]!r:.60}; "
                             "expected true or false")


def _sort_tokens(folder, ids, flags_of, named, prepends):
    """(special, words, whole) of added tokens, each {name: id}.

    named: names that the settings give a role, such as the end token's. prepends: whether the
    normalizer puts a space before text. Tokens with the flag "normalized" are looked for after
    that, and so found only with "▁" in place of spaces and after one: these are `whole`.
    """
    special = {}
    words = {}
    whole = {}
    for name, i in ids.items():
        flags = flags_of[name]
        # A token without the flag, or with a role, is a control token.
        late = prepends and flags.get("normalized")
        if flags.get("special", True) or name in named:
            special[name] = i
        elif late:
            whole["▁" + name.replace(" ", "▁")] = i
        else:
            words[name] = i

        # Such a token also takes spaces beside it, or depends on them; runs are read alone here.
        takes_more = flags.get("lstrip") or flags.get("rstrip") or flags.get("single_word")
        if takes_more or (late and name in special):
            raise ValueError(f"{folder}: added token {name!r} takes in what stands beside it "
                             "(lstrip, rstrip or single_word, or normalized with a Prepend "
                             "normalizer), which cannot be read exactly; set the flag to false in "
                             "tokenizer.json and tokenizer_config.json")
    return special, words, whole


# tokenizer.model: Llama-3's holds lines of byte pairs, others are sentencepiece's.

def _read_tokenizer_model(path, settings, added):
    # Of the files with tiktoken ranks Llama-3's is the only one known. It needs no settings.
    ranks = _read_tiktoken(path)
    if ranks is not None:
        special = {name: len(ranks) + i for i, name in enumerate(LLAMA3_SPECIAL)}
        return BytePairTokenizer(ranks, LLAMA3_PATTERN, special, "<|begin_of_text|>",
                                 "<|end_of_text|>")

    # transformers' older behavior ("legacy") begins a text with a space after control tokens too.
    prepend_scheme = "always" if settings.get("legacy") else "first"
    return SentencePieceTokenizer(path, added.special, added.words, prepend_scheme)


def _read_tiktoken(path):
    """{bytes: rank} of lines like `IQ== 0`, or None if the file is of another kind."""
    content = path.read_bytes()
    if not re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", content):
        return None
    # Every line is a token in base64 and its rank, which is its id.
    ranks = {}
    for number, line in enumerate(content.splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise ValueError(f"{path}:{number}: expected a base64 token and its rank, found "
                             f"{line[:40]!r}") from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"{path}: ranks are not 0, 1, 2, ... once each; the file is cut short or "
                         "damaged")
    return ranks


# tokenizer.json: byte-level BPE, or a sentencepiece vocabulary ("byte fallback").

def _read_tokenizer_json(path, spec, added):
    model = spec.get("model") or {}
    if model.get("type", "BPE") != "BPE" or "vocab" not in model or "merges" not in model:
        raise ValueError(f"{path}: model {model.get('type')!r} is not supported; expected BPE with "
                         "vocab and merges; fetch tokenizer.model of the same model, if it has "
                         "one, and move this file away")
    # Each of these changes the ids of text.
    for field in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(field):
            raise ValueError(f"{path}: model has {field} = {model[field]!r:.40}, which is not "
                             "supported; expected none")

    # A merge is ["a", "b"], or "a b" in older files.
    merges = []
    for merge in model["merges"]:
        if isinstance(merge, str):
            merge = merge.split(" ")
        merges.append(merge)

    if model.get("byte_fallback"):
        return _read_byte_fallback(path, spec, merges, added)
    return _read_byte_level(path, spec, merges, added)


def _read_byte_level(path, spec, merges, added):
    pattern = _cutting_pattern(path, spec.get("pre_tokenizer") or {})
    normalizer = (spec.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):
        raise ValueError(f"{path}: normalizer {normalizer!r} is not supported; expected none or "
                         "NFC")

    # The vocabulary may list added tokens by name; all others are spelled bytes.
    vocab = spec["model"]["vocab"]
    byte_of = _byte_alphabet()
    spelled = {}
    ranks = {}
    for token, i in vocab.items():
        if token not in added.special and token not in added.words:
            spelled[token] = i
            ranks[bytes(byte_of[c] for c in token)] = i

    # The file says to merge the pair that is listed first, tiktoken merges the pair whose result
    # has the lowest id: the same only if results are listed in the order of their ids. (A result
    # may be listed once for each way to make it.)
    results = [vocab[left + right] for left, right in merges]
    if sorted(results) != results:
        raise ValueError(f"{path}: merges are not in the order of the vocabulary; this vocabulary "
                         "cannot be read exactly")
    _check_merges(path, spelled, merges, spec["model"].get("ignore_merges") is True)
    return BytePairTokenizer(ranks, pattern, added.special, added.bos, added.eos, normalizer,
                             added.words)


def _check_merges(path, ids, merges, ignore_merges):
    """ValueError unless tiktoken, which knows the ids alone, merges what the file lists.

    ids: {token: id}, a character for each byte. merges: pairs of tokens in the order of the ids of
    their results. ignore_merges: whether a piece of text that is a token becomes that token even
    where merging does not lead to it, as it does in tiktoken.

    tiktoken makes a token of two others wherever they stand side by side. Yet it comes to each in
    one way only: what happens to the bytes of a token before it is there is what happens to them
    alone. So the two parts that are left of them then have to be listed, and no others matter.
    """
    # {token: (these two parts, its id)}. The parts are in here too, that is have lower ids, or are
    # bytes, which have no parts.
    halves = {token: (None, None, -1) for token in ids if len(token) == 1}
    for left, right in merges:
        token = left + right
        if token not in halves and left in halves and right in halves and token in ids:
            if _ends_with(left, right, ids, halves):
                halves[token] = (left, right, ids[token])

    # Of these few the listed pairs are not known to be the parts: merge their bytes.
    unknown = ids.keys() - halves.keys()
    listed = {tuple(pair) for pair in merges} if unknown else set()
    for token in unknown:
        def rank_of(pair):
            return ids.get(pair[0] + pair[1]) if pair[0] + pair[1] != token else None

        parts = tuple(merge_pairs(token, rank_of))
        reached = len(parts) == 2
        if not token or (reached and parts not in listed) or not (reached or ignore_merges):
            raise ValueError(f"{path}: merging leads to {parts!r:.80} for the token {token!r:.60}, "
                             "of which the file lists no merge; this vocabulary cannot be read "
                             "exactly")


def _ends_with(left, right, ids, halves):
    """Whether merging the bytes of left + right, without the merge of these two, ends with them.

    It undoes the merges beside the border, the latest first. A pair across the border must not
    come before the merge that took one of the two away.
    """
    _, left_end, left_id = halves[left]
    right_start, _, right_id = halves[right]
    while left_id >= 0 or right_id >= 0:
        if left_id > right_id:
            limit = left_id
            left = left_end
            _, left_end, left_id = halves[left]
        else:
            # At the same id the pair across, which is further left, comes first.
            limit = right_id + 1
            right = right_start
            right_start, _, right_id = halves[right]
        if ids.get(left + right, limit) < limit:
            return False
    return True


# What the regular expressions of the tokenizers library (Oniguruma's) and of tiktoken (Rust's) have
# in common. They read otherwise: \w, \b, ^, $, [[:punct:]], a(?i)b|c, and (?i:ss), which Oniguruma
# finds in "ß".
REGEX_ATOM = re.compile(r"""
    (?P<look>\(\?(?:[=!]|<[=!]))
    |(?P<text>\(\?i:(?:'?(?:[a-z]{1,2}(?<!ss|ff|fi|fl|st)|\[[a-z]+\])\|?)+\)
        |\\[pP]\{\^?\w+\}|\\[sSdDrnt]|\\[!-/:-@\[-`{-~]|[^\\()\[\]{}|*+?^$]
        |\[\^?(?:\\[pP]\{\^?\w+\}|\\[sSdDrnt]|\\[!-/:-@\[-`{-~]|(?!--)[^\\\[\]&~])+\])
    |(?P<group>\((?:\?[:>])?(?!\?)|[)|])
    |(?P<repeat>[*+?](?P<kind>[+?])?(?![*+?{])|\{[0-9]+(?:,[0-9]*)?\}(?![*+?{]))
    """, re.VERBOSE)


def _check_pattern(path, pattern):
    """ValueError unless a pattern is made of REGEX_ATOM and always matches some text."""
    # The skeleton has an x for what matches one character or more. Where text is only looked at,
    # nothing is matched.
    skeleton = ""
    at = 0
    while at < len(pattern):
        atom = REGEX_ATOM.match(pattern, at)
        if not atom:
            raise ValueError(f"{path}: pre_tokenizer cuts by the pattern {pattern!r:.200}, whose "
                             f"{pattern[at:at + 10]!r} is not known to be read alike everywhere")
        if atom["look"]:
            skeleton += "(?:|"
        elif atom["text"]:
            skeleton += "x"
        elif atom["group"]:
            skeleton += "(?:" if atom[0].startswith("(") else atom[0]
        else:
            skeleton += atom[0][0] if atom["kind"] else atom[0]
        at = atom.end()
    try:
        empty = re.fullmatch(skeleton, "")
    except (re.error, OverflowError, RecursionError) as e:
        raise ValueError(f"{path}: pre_tokenizer cuts by {pattern!r:.200}, which is no regular "
                         f"expression ({e})") from None
    if empty:
        raise ValueError(f"{path}: pre_tokenizer cuts by {pattern!r:.200}, which matches the empty "
                         "text too; expected a pattern that does not")


def _cutting_pattern(path, pre_tokenizer):
    """The regular expression by which a byte-level tokenizer.json cuts text.

    Three kinds are known: ByteLevel alone, Digits before it, or Split with a pattern of its own.
    """
    # One step, or {"type": "Sequence", "pretokenizers": [...]}.
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    first = steps[0]
    byte_level = steps[-1]
    if byte_level.get("type") != "ByteLevel":
        raise ValueError(f"{path}: neither byte-level BPE nor BPE with byte fallback "
                         f"(pre-tokenizer {byte_level.get('type')}); fetch tokenizer.model of the "
                         "same model, if it has one, and move this file away")

    # ByteLevel cuts by GPT-2's pattern, unless use_regex is off.
    pattern = None
    cuts_itself = byte_level.get("use_regex", True)
    if len(steps) == 1 and cuts_itself:
        pattern = GPT2_PATTERN
    elif len(steps) == 2 and cuts_itself:
        if first == {"type": "Digits", "individual_digits": True}:
            pattern = DIGITS_PATTERN
    elif len(steps) == 2 and first["type"] == "Split" and "Regex" in first["pattern"]:
        if first["behavior"] == "Isolated" and not first["invert"]:
            pattern = first["pattern"]["Regex"]
            _check_pattern(path, pattern)
    if pattern is None or byte_level.get("add_prefix_space"):
        raise ValueError(f"{path}: pre_tokenizer {json.dumps(pre_tokenizer)[:200]} is not "
                         "supported")
    return pattern


def _byte_alphabet():
    """GPT-2's spelling of bytes as printable characters: {character: byte}."""
    printable = []
    for first, last in (("!", "~"), ("¡", "¬"), ("®", "ÿ")):
        printable += range(ord(first), ord(last) + 1)
    alphabet = {chr(b): b for b in printable}

    # The other bytes get the characters from 256 on.
    for b in range(256):
        if b not in printable:
            alphabet[chr(256 + len(alphabet) - len(printable))] = b
    return alphabet


def _read_byte_fallback(path, spec, merges, added):
    vocab = spec["model"]["vocab"]
    if spec["model"].get("ignore_merges"):
        raise ValueError(f"{path}: model has ignore_merges = true with byte_fallback, which is not "
                         "supported; expected false")
    prepend_scheme = _prepend_scheme(spec)
    # Without a token for each byte, characters outside the vocabulary would all become <unk>.
    missing = [b for b in range(256) if byte_name(b) not in vocab]
    if prepend_scheme is None or missing:
        normalizer = json.dumps(spec.get("normalizer"))[:150]
        pre_tokenizer = json.dumps(spec.get("pre_tokenizer"))[:150]
        raise ValueError(f"{path}: a sentencepiece vocabulary that cannot be read exactly "
                         f"(normalizer {normalizer}, pre_tokenizer {pre_tokenizer}, "
                         f"{len(missing)} bytes without a token); fetch tokenizer.model of the "
                         "same model, if it has one, and move this file away")
    for left, right in merges:
        if not (left in vocab and right in vocab and left + right in vocab):
            raise ValueError(f"{path}: merges {left!r:.40} and {right!r:.40}, which its vocabulary "
                             "lacks, or their sum; the file is damaged, fetch it again")
    return CharacterPairTokenizer(vocab, merges, added.special, added.words, added.bos, added.eos,
                                  prepend_scheme, added.whole)


def _prepend_scheme(spec):
    """Where tokenizer.json puts a space before text, as a key of SPACED_PLACES.

    None if its steps are others than those known here.
    """
    prepend = {"type": "Prepend", "prepend": "▁"}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    normalizer = spec.get("normalizer")
    steps = []
    if normalizer:
        steps = normalizer.get("normalizers", [normalizer])

    # Older files put it there in the normalizer, newer ones in the pre-tokenizer.
    metaspace = spec.get("pre_tokenizer")
    if not metaspace:
        if steps == [prepend, replace]:
            return "every"
        if steps == [replace]:
            return "never"
        return None
    if steps or metaspace.get("type") != "Metaspace":
        return None
    # "split" would cut text at spaces before it is merged.
    if metaspace.get("replacement") != "▁" or metaspace.get("split"):
        return None
    scheme = metaspace.get("prepend_scheme")
    if not scheme:              # before there were schemes, files said only whether
        scheme = "always" if metaspace.get("add_prefix_space") else "never"
    if scheme in ("always", "first", "never"):
        return scheme
    return None


def _other_reading(folder, settings, tokenizer):
    """A note for a folder whose tokenizer.json transformers 5 reads otherwise, else "".

    For two classes that the settings may name, its AutoTokenizer replaces the file's pre-tokenizer
    by one of its own, and so do servers that use it.
    """
    config = _read_json(folder / "config.json")
    family = str(settings.get("tokenizer_class") or config.get("tokenizer_class") or "")
    family = family.removesuffix("Fast")
    if family == "LlamaTokenizer" and isinstance(tokenizer, CharacterPairTokenizer):
        theirs = "always" if settings.get("legacy") else "first"
        if settings.get("add_prefix_space") is False:
            theirs = "never"
        # Files of the model type mistral are not changed.
        differs = theirs != tokenizer.prepend_scheme and config.get("model_type") != "mistral"
    elif family == "GPT2Tokenizer" and isinstance(tokenizer, BytePairTokenizer):
        differs = tokenizer.pattern != GPT2_PATTERN
    else:
        differs = False
    if not differs:
        return ""
    return ("tokenizer.json is read as it stands, as by transformers 4; AutoTokenizer of "
            f"transformers 5 changes it for a tokenizer_class {family} (PreTrainedTokenizerFast in "
            "tokenizer_config.json keeps it)")


# --- chat formats: the makers' own layouts --------------------------------------------------------
#
# The comment above each `layout` shows a dialogue. Where sentencepiece begins a text with a space,
# the space is shown too.

class ChatFormat:
    """How a family of models lays out a dialogue, as the encoders of its makers write it.

    Messages are {"role": "system" | "user" | "assistant", "content": str}. Content is stripped of
    surrounding white space.
    """

    date = None                             # ISO date of a template that asks for today's

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.end_id = tokenizer.eos_id      # closes a response
        self.stop_ids = {self.end_id}       # all tokens at which generation ends
        self.source = f"chat format {type(self).__name__}"      # whose layout it is, in words

    def encode_prompt(self, messages):
        """Ids of a dialogue up to where the next response starts.

        ValueError unless the roles are [system] user (assistant user)*.
        """
        self.check(messages)
        turns = [(m["role"], m["content"].strip()) for m in messages]
        system = None
        if messages[0]["role"] == "system":
            _, system = turns.pop(0)
        return self.layout(system, turns)

    def check(self, messages):
        """ValueError unless these are messages that a response can follow."""
        for number, message in enumerate(messages, 1):
            is_message = (isinstance(message, dict) and isinstance(message.get("role"), str)
                          and isinstance(message.get("content"), str))
            if not is_message:
                raise ValueError(f"message {number} is {message!r:.120}; expected an object with "
                                 "a string role and content")

        # The user begins, the two take turns, and the user's is the last.
        roles = [m["role"] for m in messages]
        turns = roles[1:] if roles[:1] == ["system"] else roles
        if turns != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
            raise ValueError(f"prompt has the roles {roles}; expected an optional system turn, "
                             "then user and assistant in turn, user last")

    def layout(self, system, turns):
        """Ids of a prompt. system: text or None. turns: (role, text), the last one of the user."""
        raise NotImplementedError

    def encode_response(self, text):
        """Ids of a response: its text and one end token. These are the tokens that are scored."""
        return self.encode(text.strip()) + [self.end_id]

    def decode_response(self, ids):
        """The text of a sampled response: what encode_response takes."""
        return self.tokenizer.decode(ids)

    def encode(self, text):
        """Ids of a text by itself, without begin and end token."""
        refuse_half_pairs(text)
        return self.tokenizer.encode(text, bos=False, eos=False)

    def encode_inside(self, text):
        """Ids of a text that follows other text: sentencepiece puts no space before it."""
        refuse_half_pairs(text)
        return self.tokenizer.encode_text(text, "inside")

    def opening(self):
        """How a dialogue without a system turn begins, up to the text of the user."""
        text = "the first question"
        prompt = self.encode_prompt([{"role": "user", "content": text}])
        return self.tokenizer.spell(prompt).partition(text)[0]


def refuse_half_pairs(text):
    """ValueError for half a surrogate pair, which JSON can hold and tokenizers make U+FFFD of."""
    text.encode()


class Llama3(ChatFormat):
    """Llama-3: a header before and <|eot_id|> after every turn.

    This is Meta's layout, with no date and no default system text.
    """

    def __init__(self, tokenizer):
        super().__init__(tokenizer)
        self.end_id = tokenizer.special["<|eot_id|>"]
        # <|eom_id|> ends a message that calls a tool; base models end with <|end_of_text|>.
        self.stop_ids = {self.end_id}
        for name in ("<|end_of_text|>", "<|eom_id|>"):
            if name in tokenizer.special:
                self.stop_ids.add(tokenizer.special[name])

    def header(self, role):
        start_id = self.tokenizer.special["<|start_header_id|>"]
        end_id = self.tokenizer.special["<|end_header_id|>"]
        # The newlines are encoded apart from the text after them, as Meta's encoder does.
        return [start_id, *self.encode(role), end_id, *self.encode("\n\n")]

    # <|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>
    # <|start_header_id|>assistant<|end_header_id|>\n\n, in one line
    def layout(self, system, turns):
        if system is not None:
            turns = [("system", system), *turns]
        ids = [self.tokenizer.special["<|begin_of_text|>"]]
        for role, text in turns:
            ids += self.header(role) + self.encode(text) + [self.end_id]
        return ids + self.header("assistant")


class MistralV1(ChatFormat):
    """Mistral-7B-Instruct v0.1 and v0.2: [INST] and [/INST] are ordinary text.

    The system text goes into the first user turn.
    """

    # <s> [INST] Hi [/INST] Hello!</s> [INST] Bye [/INST]
    def layout(self, system, turns):
        ids = [self.tokenizer.bos_id]
        for role, text in turns:
            if role == "assistant":
                ids += self.encode_response(text)
                continue
            if system:
                text = f"{system}\n\n{text}"
                system = None               # it goes into the first turn alone
            ids += self.encode(f"[INST] {text} [/INST]")
        return ids


class MistralV3(ChatFormat):
    """Mistral-7B-Instruct v0.3 (tokenizer v2 and v3): [INST] and [/INST] are control tokens.

    The system text goes into the last user turn.
    """

    # <s>[INST] Hi[/INST] Hello!</s>[INST] Bye[/INST]
    def layout(self, system, turns):
        if system:
            role, text = turns[-1]
            turns = [*turns[:-1], (role, f"{system}\n\n{text}")]
        begin_id = self.tokenizer.special["[INST]"]
        close_id = self.tokenizer.special["[/INST]"]
        ids = [self.tokenizer.bos_id]
        for role, text in turns:
            if role == "assistant":
                ids += self.encode_response(text)
            else:
                ids += [begin_id, *self.encode(text), close_id]
        return ids


class Llama2(ChatFormat):
    """Llama-2-chat: <s> and </s> around every exchange.

    The system text goes between <<SYS>> marks into the first user turn.
    """

    # <s> [INST] Hi [/INST] Hello! </s><s> [INST] Bye [/INST]
    def layout(self, system, turns):
        ids = []
        for role, text in turns:
            if role == "assistant":
                ids += self.encode_response(text)
                continue
            if system:
                text = f"<<SYS>>\n{system}\n<</SYS>>\n\n{text}"
                system = None               # it goes into the first turn alone
            ids += [self.tokenizer.bos_id, *self.encode(f"[INST] {text} [/INST]")]
        return ids

    def encode_response(self, text):
        # Meta's layout has a space before </s>.
        return self.encode(f"{text.strip()} ") + [self.end_id]


class Zephyr(ChatFormat):
    """Zephyr, TinyLlama: <|user|> and the like are ordinary text; there is no <s>."""

    # " <|user|>\nHi</s> \n<|assistant|>\nHello!</s> \n<|user|>\nBye</s> \n<|assistant|>\n"
    def layout(self, system, turns):
        if system is not None:
            turns = [("system", system), *turns]
        ids = []
        newline = ""                # between a turn's </s> and the next turn
        for role, text in turns:
            if role == "assistant":
                ids += self.encode("\n<|assistant|>\n") + self.encode_response(text)
            else:
                ids += [*self.encode(f"{newline}<|{role}|>\n{text}"), self.end_id]
            newline = "\n"
        return ids + self.encode("\n<|assistant|>\n")

    def encode_response(self, text):
        return self.encode_inside(text.strip()) + [self.end_id]


class ChatML(ChatFormat):
    """SmolLM2, Qwen and many fine-tunes. No default system text: their templates have their own."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer)
        self.start_id = tokenizer.names["<|im_start|>"]
        self.end_id = tokenizer.names["<|im_end|>"]
        self.stop_ids = {self.end_id}

    # <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n
    def layout(self, system, turns):
        if system is not None:
            turns = [("system", system), *turns]
        newline = self.encode("\n")
        ids = []
        for role, text in turns:
            ids += [self.start_id, *self.encode(f"{role}\n{text}"), self.end_id, *newline]
        return ids + [self.start_id, *self.encode("assistant\n")]

    def encode_response(self, text):
        return self.encode_inside(text.strip()) + [self.end_id]


# The names that --chat_format takes.
CHAT_FORMATS = {
    "llama3": Llama3,
    "mistral-v1": MistralV1,
    "mistral-v3": MistralV3,
    "llama2": Llama2,
    "zephyr": Zephyr,
    "chatml": ChatML,
}


# --- chat templates: the layout that a folder brings ----------------------------------------------

SECONDS = 5                     # of computing for one dialogue; templates take a ten-thousandth
EXTRA_CHARACTERS = 10**6        # that a template may write beside what it is given


class ChatTemplate(ChatFormat):
    """A folder's own chat template, rendered as transformers renders it, with one exception.

    transformers takes the name of a control token for that token everywhere, in content too.
    Here names in content are broken before the template sees them, so that all that are found in
    its output are its own. All else is rendered as it is, so whatever the template does with
    content (strips it, takes thinking out of earlier turns) happens.

    A response is what the template writes for an assistant's turn after the generation prompt, up
    to its end token. How it opens and closes one is learned from a few dialogues.
    """

    def __init__(self, tokenizer, template, source, token_names, date=None):
        """source: where the template is from, in words. token_names: {"bos_token": "<s>", ...}.

        ValueError if the template cannot be followed exactly.
        """
        super().__init__(tokenizer)
        self.source = source
        self.token_names = token_names
        self.today = datetime.date.today()
        if date:
            self.today = datetime.date.fromisoformat(date)

        # A template that does not compile is refused like one that does not render.
        environment = jinja_environment(source)
        environment.globals["strftime_now"] = self.strftime_now
        with self.bounded():
            self.template = environment.from_string(template)
        self.reserve([])
        self.learn()

    def learn(self):
        """Finds out how the template opens and closes a response, from dialogues it is given.

        ValueError if that is not always the same, or does not end with a token.
        """
        self.asked = [{"role": "user", "content": "the first question"}]
        self.left_out = set()                       # roles whose turns the template does not write
        shapes, layout = self.lay_out_samples()

        # encode_response knows one shape for all responses.
        for shape in shapes:
            if shape != shapes[0]:
                raise ValueError(f"{self.source} opens and closes responses in different ways, "
                                 f"{shapes[0][1:]} and {shape[1:]}")
        self.continues, self.open, close = shapes[0]        # see response_shape

        # The response ends with the first token after its text.
        end = self.tokenizer.find_name.search(close)
        if not end:
            raise ValueError(f"{self.source} closes a response with {close!r}, in which no token "
                             "of the tokenizer stands that generation could end at")
        self.space = close[:end.start()]            # between the text and the end token
        self.close = close[:end.end()]              # that and the end token
        self.rest = close[end.end():]               # what the template writes after it

        # Every token that the layout writes around turns is a control token from here on.
        self.reserve([end[0], *self.marks(layout)])

        # A name without an id would be encoded as text.
        for key, name in self.token_names.items():
            if name in layout + close and name not in self.tokenizer.names:
                raise ValueError(f"{self.source} writes the {key} {name!r}, which has no id in "
                                 "tokenizer.json; expected it among its added tokens")
        self.end_id = self.tokenizer.names[end[0]]
        self.stop_ids = {self.end_id}
        if self.tokenizer.eos_id is not None:
            self.stop_ids.add(self.tokenizer.eos_id)

        # The place of the response: a prompt ends with an added token, or with other text.
        self.asked_text = self.render(self.asked, True)
        ends_with_token = self.tokenizer.find_name.split(self.asked_text)[-1] == ""
        self.place = "after" if ends_with_token else "inside"

    def lay_out_samples(self):
        """(shapes of responses, text that the layout writes around turns) of four dialogues.

        They are with and without a system turn, with and without history. Fills left_out.
        """
        ask = self.asked
        more = [{"role": "assistant", "content": "the first answer"},
                {"role": "user", "content": "the next question"}]
        system = [{"role": "system", "content": "the system text"}]
        answer = {"role": "assistant", "content": "the last answer"}
        shapes = []
        layout = ""
        for messages in (ask, ask + more, system + ask, system + ask + more):
            # The prompt, the dialogue with its answer, and the dialogue alone.
            try:
                prompt = self.render(messages, True)
                whole = self.render([*messages, answer], False)
                turns = self.render(messages, False)
            except ValueError:
                # A template may refuse a system turn; it will say so where one comes.
                if messages == ask:
                    raise
                continue
            if messages[-1]["content"] not in prompt or answer["content"] not in whole:
                raise ValueError(f"{self.source} leaves the last turn of a dialogue out")

            # What remains of the dialogue without its contents is the layout.
            for message in messages:
                if message["content"] not in prompt:
                    self.left_out.add(message["role"])
                turns = turns.replace(message["content"], "")
            layout += turns

            # Mistral's template puts the system text into the last turn if that is the user's:
            # with an answer it is lost.
            has_system = messages[0]["role"] == "system"
            shape = self.response_shape(prompt, whole, answer["content"], required=not has_system)
            if shape:
                shapes.append(shape)
        return shapes, layout

    def response_shape(self, prompt, whole, answer, required):
        """(continues, opening, closing) of a response, from an answered dialogue.

        continues: whether the answered dialogue (whole) begins with its prompt. opening is the
        text between prompt and answer, closing the text after the answer. None if it is unclear
        where the response starts; ValueError if a shape is required.
        """
        at = whole.rindex(answer)
        closing = whole[at + len(answer):]
        if whole.startswith(prompt) and len(prompt) <= at:
            return True, whole[len(prompt):at], closing
        # The prompt opens something (<think>) that a finished turn does not show.
        if prompt.startswith(whole[:at]):
            return False, prompt[at:], closing
        if required:
            n = first_difference(prompt, whole)
            raise ValueError(f"{self.source} writes {prompt[n:n + 60]!r} at the end of a prompt "
                             f"where an answered dialogue has {whole[n:n + 60]!r}; where its "
                             "responses start cannot be told")
        return None

    def marks(self, layout):
        """Names of added tokens that a layout writes around turns."""
        # A word such as "user" or a line break that it happens to hold is text like any other.
        marks = set()
        for name in self.tokenizer.find_name.findall(layout):
            if len(name) > 1 and not name.isalnum() and not name.isspace():
                marks.add(name)
        return marks

    def encode_prompt(self, messages):
        self.check(messages)
        # Turns that the model would never see are refused, not dropped silently.
        for message in messages[:-1]:
            if message["role"] in self.left_out:
                raise ValueError(f"{self.source} leaves {message['role']} turns out of a "
                                 "dialogue; drop them, or name a layout with --chat_format")
        return self.tokenizer.encode_rendered(self.render(messages, True))

    def encode_response(self, text):
        # The prompt has opened the response already (<think>). A response may be stored with that
        # opening, which is not written twice.
        if not self.continues:
            text = self.break_control(text.removeprefix(self.open)) + self.close
            return self.tokenizer.encode_rendered(text, self.place)

        # The response is what an answered dialogue has beyond its prompt, up to the end token.
        whole = self.render([*self.asked, {"role": "assistant", "content": text}], False)
        if not whole.startswith(self.asked_text) or not whole.endswith(self.close + self.rest):
            n = first_difference(self.asked_text, whole)
            raise ValueError(f"{self.source} ends a prompt with {self.asked_text[-40:]!r}, and "
                             f"lays this response out as {whole[n - 20:n + 60]!r}, which does not "
                             f"follow it: {text[:60]!r}")
        text = whole[len(self.asked_text):len(whole) - len(self.rest)]
        return self.tokenizer.encode_rendered(text, self.place)

    def decode_response(self, ids):
        text = self.tokenizer.decode(ids, self.place)
        if self.continues:
            text = text.removeprefix(self.open)
        return text.removesuffix(self.space)

    def render(self, messages, generation_prompt):
        """The text that the template makes of a dialogue.

        Names of control tokens in content are broken by BREAK.
        """
        broken = []
        for message in messages:
            content = self.break_control(message["content"])
            broken.append({"role": message["role"], "content": content})

        # The text comes in pieces, so that one without an end can be stopped. A template may write
        # content a few times over.
        room = EXTRA_CHARACTERS + 10 * sum(len(message["content"]) for message in broken)
        pieces = []
        with self.bounded():
            for piece in self.template.generate(
                    messages=broken, add_generation_prompt=generation_prompt, tools=None,
                    documents=None, **self.token_names):
                room -= len(piece)
                if room < 0:
                    raise OverflowError(f"it writes more than {EXTRA_CHARACTERS} characters of "
                                        "its own")
                pieces.append(piece)
            text = "".join(pieces)
            refuse_half_pairs(text)
        return text

    @contextmanager
    def bounded(self):
        """Runs the template's code. Any error of it, and too much computing, is a ValueError."""
        try:
            with time_limit(SECONDS):
                yield
        except Exception as e:
            reason = str(e) or type(e).__name__
            raise ValueError(f"{self.source} cannot lay this out: {reason}") from None

    def strftime_now(self, style):
        # The template asked for the date: it is part of the layout.
        self.date = self.today.isoformat()
        return self.today.strftime(style)

    def reserve(self, names):
        """Makes names control tokens beside those that are, which break_control finds."""
        self.tokenizer.reserve(names)
        # BREAK goes after the first of several characters.
        for name in self.tokenizer.special:
            if len(name) < 2 or BREAK in name:
                raise ValueError(f"{self.source}: control token {name!r} is a single character, or "
                                 f"holds {BREAK!r}; it cannot be told from text")
        self.find_control = any_of(self.tokenizer.special)

    def break_control(self, content):
        """Content with BREAK in those names of control tokens that occur in it."""
        refuse_half_pairs(content)
        content = content.replace(BREAK, 2 * BREAK)
        # Breaking one name may leave another: <|im_<|im_end|>end|>.
        while self.find_control.search(content):
            content = self.find_control.sub(_break_name, content)
        return content


def _break_name(match):
    name = match[0]
    return name[0] + BREAK + name[1:]


def jinja_environment(source):
    """Jinja as transformers sets it up, in a sandbox: templates come from anywhere.

    Large powers and products, which no time limit would stop, are refused.
    """
    # Imported here: folders without a template need no jinja2.
    try:
        from jinja2 import TemplateError
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
    except ImportError:
        raise ValueError(f"{source}: reading it needs jinja2 3.1 (pip install jinja2); "
                         "--chat_format names a layout that needs none") from None

    def size(operand):
        if isinstance(operand, (int, float)):
            return abs(operand)
        return len(operand)

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("*", "**"))

        def call_binop(self, context, operator, left, right):
            if operator == "**" or size(left) * size(right) > EXTRA_CHARACTERS:
                raise SecurityError(f"a chat template has no use for {operator} of such values")
            return super().call_binop(context, operator, left, right)

    class Generation(Extension):
        # {% generation %} marks what an assistant writes; nothing is rendered for it.
        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message):
        # Templates call it to refuse a dialogue.
        raise TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        # jinja2's own filter escapes what is special in HTML.
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True,
                          extensions=[loopcontrols, Generation])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    return environment


@contextmanager
def time_limit(seconds):
    """TimeoutError in a block that computes for longer. Waiting does not count.

    Only the main thread has a limit.
    """
    # Python runs signal handlers in the main thread alone, so no other can be interrupted.
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_):
        raise TimeoutError(f"it computes for more than {seconds} s")

    # The virtual timer counts the computing time of this process.
    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


# --- model folders --------------------------------------------------------------------------------

def load_chat(folder, chat_format=None, date=None):
    """The chat format of a model folder; chat.tokenizer is its tokenizer.

    It is load_tokenizer, load_chat_format (chat_format is its name) and, where the folder's
    config.json has an integer vocab_size, check_vocabulary. ValueError as of these.
    """
    folder = Path(folder)
    tokenizer = load_tokenizer(folder)
    chat = load_chat_format(folder, tokenizer, chat_format, date)
    rows = _read_json(folder / "config.json").get("vocab_size")
    if type(rows) is int:
        check_vocabulary(folder, chat, rows)
    return chat


def load_chat_format(folder, tokenizer, name=None, date=None):
    """The chat format of a model folder, with the end tokens of its generation_config.json.

    name: a key of CHAT_FORMATS. Without one, the folder's own chat template counts, and where there
    is none, the format that its control tokens belong to. date: "2026-01-31", for a template that
    writes today's date; the format's `date` tells whether it does. ValueError if the format cannot
    be determined, or needs what the tokenizer lacks.
    """
    folder = Path(folder)
    if name and name not in CHAT_FORMATS:
        raise ValueError(f"chat format {name!r} is not known; expected one of "
                         f"{', '.join(CHAT_FORMATS)}")
    template, source = find_template(folder) if not name else ("", "")
    if template:
        chat = ChatTemplate(tokenizer, template, source, token_names(folder), date)
    elif name:
        chat = _named_format(folder, tokenizer, name)
        chat.source += " (by --chat_format)"
    else:
        chat = _named_format(folder, tokenizer, _detect(folder, tokenizer.special))
        chat.source += " (there is no chat template; told from the control tokens)"

    # The makers name all tokens that end generation, also such as the layout does not write.
    ends = _read_json(folder / "generation_config.json").get("eos_token_id")
    if ends is None:
        ends = []
    if not isinstance(ends, list):
        ends = [ends]
    for i in ends:
        if type(i) is not int or not 0 <= i < MAX_ID:
            raise ValueError(f"{folder}/generation_config.json: eos_token_id = {ends!r:.60}; "
                             "expected an id or a list of ids")
    chat.stop_ids |= set(ends)
    return chat


def find_template(folder):
    """(chat template, where it is from) of a model folder; empty strings if it has none."""
    # transformers prefers a file of its own over the field in the settings.
    file = folder / "chat_template.jinja"
    if file.exists() or file.is_symlink():
        try:
            return file.read_text(encoding="utf-8"), f"the chat template {file}"
        except ValueError as e:
            raise ValueError(f"{file}: not UTF-8 text ({e})") from None

    settings = folder / "tokenizer_config.json"
    template = _read_json(settings).get("chat_template") or ""
    if isinstance(template, list):
        # Several templates, [{"name": "default", "template": "..."}, ...].
        named = {}
        for t in template:
            if isinstance(t, dict):
                named[str(t.get("name"))] = t.get("template")
        if named and "default" not in named:
            raise ValueError(f"{settings}: chat_template has templates named "
                             f"{', '.join(named)}; expected one named default among "
                             "them, or choose a layout with --chat_format")
        template = named.get("default", "")
    if not isinstance(template, str):
        raise ValueError(f"{settings}: chat_template is {template!r:.60}; expected text or a list "
                         "of named templates")
    if not template:
        return "", ""
    return template, f"the chat template of {settings}"


def _named_format(folder, tokenizer, name):
    """The format `name` of CHAT_FORMATS. ValueError if the tokenizer lacks a token it writes."""
    # One dialogue shows all tokens of a layout.
    sample = [("user", "user"), ("assistant", "assistant"), ("user", "user")]
    try:
        chat = CHAT_FORMATS[name](tokenizer)
        ids = chat.layout("system", sample) + chat.encode_response("assistant")
    except KeyError as e:
        raise ValueError(f"{folder}: chat format {name} needs the control token {e}; this "
                         "tokenizer lacks it") from None
    if None in ids:
        raise ValueError(f"{folder}: chat format {name} needs a begin and an end token; the files "
                         "name none")
    # They are control tokens from here on, whatever the files call them.
    tokenizer.reserve(tokenizer.name_of[i] for i in ids if i in tokenizer.name_of)
    return chat


def _detect(folder, special):
    """The key of CHAT_FORMATS that a folder's control tokens belong to."""
    # Mistral's later tokenizers have [SYSTEM_PROMPT], which none of the formats writes.
    if "[SYSTEM_PROMPT]" not in special:
        if "<|start_header_id|>" in special:
            return "llama3"
        if "<|im_start|>" in special:
            return "chatml"
        if "[INST]" in special:
            return "mistral-v3"
    raise ValueError(f"{folder}: it has no chat template, and its control tokens do not tell the "
                     "chat format; name it with --chat_format, one of "
                     f"{', '.join(CHAT_FORMATS)}")


def check_vocabulary(folder, chat, rows):
    """ValueError if text or layout can produce an id that an embedding of `rows` rows lacks.

    Other ids, such as that of a pad token past the embedding, do no harm.
    """
    # Text may turn into any id below text_size; one exchange shows the tokens of the layout.
    tokenizer = chat.tokenizer
    layout = chat.encode_prompt([{"role": "user", "content": "Hi"}]) + chat.encode_response("Hi")
    needed = max(tokenizer.text_size, 1 + max(layout))
    if needed > rows:
        raise ValueError(f"{folder}: text and chat layout use {needed} tokens "
                         f"({tokenizer.spell([needed - 1])!r} is the last), the embedding has "
                         f"{rows} rows; the files do not belong together")
    if chat.stop_ids and max(chat.stop_ids) >= rows:
        raise ValueError(f"{folder}: generation ends at the id {max(chat.stop_ids)} (eos_token_id "
                         "of generation_config.json, or the tokenizer's end token), the embedding "
                         f"has {rows} rows; the files do not belong together")


# --- python tokenizer.py FOLDER -------------------------------------------------------------------

# The dialogue that is shown.
SAMPLE = [
    {"role": "user", "content": "What is 6 times 7?"},
    {"role": "assistant", "content": "It is 42."},
    {"role": "user", "content": "Say it in French, please."},
]


def main(argv=None):
    parser = argparse.ArgumentParser(
        description="Show how a model folder lays out a dialogue, token by token, and check it.")
    parser.add_argument("folder", help="model folder with its tokenizer files")
    parser.add_argument("--chat_format", choices=CHAT_FORMATS,
                        help="instead of the folder's chat template")
    parser.add_argument("--date", help="2026-01-31, for templates that write today's date; today "
                                       "if not given")
    args = parser.parse_args(argv)
    chat = load_chat(args.folder, args.chat_format, args.date)
    tokenizer = chat.tokenizer

    # 1. What was read.
    print(f"tokens    {type(tokenizer).__name__}, {tokenizer.vocab_size} ids")
    if tokenizer.note:
        print(f"note      {tokenizer.note}")
    dated = f", with the date {chat.date}" if chat.date else ""
    print(f"layout    {chat.source}{dated}")
    print(f"opening   {chat.opening()!r} where there is no system turn")

    # 2. The dialogue, a token a line.
    prompt = chat.encode_prompt(SAMPLE)
    response = chat.encode_response("C'est quarante-deux.")
    print(f"\nprompt: {len(prompt)} tokens, of which the last is followed by the response")
    for i in prompt:
        print(f"{i:>8}  {tokenizer.piece(i)!r}")
    print(f"\nresponse, which is scored: {len(response)} tokens, of which the last ends it")
    for i in response:
        print(f"{i:>8}  {tokenizer.piece(i)!r}")
    stops = ", ".join(f"{i} {tokenizer.piece(i)!r}" for i in sorted(chat.stop_ids))
    print(f"\nstops     generation ends at any of {stops}")

    # 3. The same dialogue by transformers.
    print(f"checked   {compare(args.folder, chat)}")


def compare(folder, chat):
    """Says in words how the ids of sample dialogues compare with transformers'.

    A format that is not the folder's chat template is compared with that instead. ValueError shows
    the first token that differs from transformers' apply_chat_template.
    """
    if not isinstance(chat, ChatTemplate):
        return _compare_with_template(folder, chat)
    try:
        import transformers
    except ImportError:
        return ("nothing: transformers is not installed (pip install transformers), whose "
                "apply_chat_template counts")
    # transformers takes no other date.
    if chat.date not in (None, datetime.date.today().isoformat()):
        return "nothing: transformers would write today's date; leave --date out"

    # With a system turn too, if the template takes one.
    system = [{"role": "system", "content": "Be brief."}]
    dialogues = [SAMPLE[:1], SAMPLE]
    try:
        chat.encode_prompt(system + SAMPLE)
        dialogues += [system + SAMPLE[:1], system + SAMPLE]
    except ValueError as e:
        print(f"          with a system turn refused: {e}")

    # tokenizer.json as it stands, if there is one; AutoTokenizer of transformers 5 changes some.
    as_it_stands = (Path(folder) / "tokenizer.json").exists()
    kind = "PreTrainedTokenizerFast" if as_it_stands else "AutoTokenizer"
    try:
        reference = getattr(transformers, kind).from_pretrained(folder)
        equal, different = _count_equal(chat, dialogues, reference)
        auto = transformers.AutoTokenizer.from_pretrained(folder)
        auto_equal, auto_different = _count_equal(chat, dialogues, auto)
    except Exception as e:
        return f"nothing: transformers cannot load these files ({str(e).splitlines()[0]})"
    if different:
        raise ValueError(f"a prompt differs from transformers {transformers.__version__}: "
                         f"{different}")
    said = (f"{equal} prompts have the ids of transformers {transformers.__version__}'s "
            "apply_chat_template")
    if auto_different:
        said += (";\n          but AutoTokenizer, which changes what tokenizer.json says, gives "
                 f"{len(dialogues) - auto_equal} of them other ids: {auto_different}")
    return said


def _compare_with_template(folder, chat):
    if not find_template(Path(folder))[0]:
        return "nothing: the folder has no chat template to compare with"
    other = load_chat_format(folder, chat.tokenizer)
    same = other.encode_prompt(SAMPLE) == chat.encode_prompt(SAMPLE)
    return (f"this layout is {'the same as' if same else 'another than'} that of {other.source}, "
            f"which opens a dialogue with {other.opening()!r}")


def _count_equal(chat, dialogues, reference):
    """(how many dialogues have the ids that transformers' tokenizer gives, where others differ)."""
    equal = 0
    different = ""
    for messages in dialogues:
        ours = chat.encode_prompt(messages)
        theirs = reference.apply_chat_template(messages, add_generation_prompt=True,
                                               return_dict=False)
        if ours == theirs:
            equal += 1
        elif not different:
            n = first_difference(ours, theirs)
            ours = ours[n:n + 8]
            theirs = theirs[n:n + 8]
            different = (f"token {n + 1} on is {chat.tokenizer.spell(ours)!r} {ours}, "
                         f"transformers' is {chat.tokenizer.spell(theirs)!r} {theirs}")
    return equal, different


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
