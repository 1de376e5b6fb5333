"""What a record of data says as a dialogue: the prompt as turns, the answers as text.

    record = {"prompt": "And now?", "system": "Be brief.", "history": [["Hi", "Hello!"]]}
    turns = prompt_turns(record, "prompt")
    record = {"prompt": "And now?", "chosen": "Wait.", "rejected": "Go!"}
    turns, chosen, rejected = prompt_and_answers(record)

A turn is {"role": "system" | "user" | "assistant", "content": "..."}. Contents are kept as they
are; the chat format decides what is stripped of them. These columns change the prompt, as the
field's converters read them (an empty or null one counts as absent):

    system                  text: the system turn of a prompt that has none (Orca's pairs)
    history                 [[user, assistant], ...]: the turns before a prompt that is a string
    instruction and input   one prompt, an empty line between them (Alpaca's sets)

A record is refused with a ValueError if turns of text cannot hold what it says (tools, images), or
if some chat format has laid out its text already: the model's own would go around that.
"""
import re

# Columns in which the prompt of a pair may stand; the first one that is there counts.
PROMPT_FIELDS = ("prompt", "instruction", "question")

# Columns of a record and fields of a turn that the model would have to see, but that no layout here
# can show it.
NOT_TEXT = ("tools", "functions", "tool_calls", "function_call", "reasoning_content", "reasoning",
            "thinking", "images", "image", "videos", "video", "audios", "audio",
            "chat_template_kwargs")
TOOL_ROLES = ("tool", "function", "ipython")        # of turns that hold what a tool returned


# --- records --------------------------------------------------------------------------------------

def prompt_turns(record, field, as_it_stands=False):
    """The turns to be answered of a record whose prompt is in the column `field`.

    The columns that change the prompt are used. ValueError if they are malformed or contradict
    each other, or if a text is laid out already (unless as_it_stands).
    """
    _refuse_more_than_text(record, "the row")
    return _prompt_in_columns(record, field, as_it_stands)


def prompt_and_answers(record, as_it_stands=False):
    """(prompt turns, chosen text, rejected text) of a record with columns `chosen` and `rejected`.

    Each of the two holds the answer alone, or a dialogue that ends with it. The prompt is in a
    column of PROMPT_FIELDS, inside both dialogues, or in both places. ValueError if the record is
    malformed, contradicts itself, or is laid out already (unless as_it_stands).
    """
    # 1. The answers, and what comes before them in dialogues.
    _refuse_more_than_text(record, "the row")
    before_chosen, chosen = _split_answer(record["chosen"], "chosen", as_it_stands)
    before_rejected, rejected = _split_answer(record["rejected"], "rejected", as_it_stands)
    if not same_turns(before_chosen, before_rejected):
        raise ValueError("chosen and rejected differ before their last turn; expected one prompt "
                         "for both")

    # 2. The prompt of both.
    prompt = _prompt_of_pair(record, before_chosen, as_it_stands)

    # 3. An end mark behind one answer may be what the answer is about; behind both it is a layout.
    mark = _end_mark(chosen)
    if mark and mark == _end_mark(rejected) and not as_it_stands:
        raise ValueError(f"chosen and rejected end with {mark}; expected bare text, for the "
                         "model's own chat format adds its end token. Take it off, or "
                         "--as_it_stands takes the texts as they stand")
    return prompt, chosen, rejected


def _split_answer(value, field, as_it_stands):
    """(turns before the answer, the answer) of a string or a list of turns."""
    if isinstance(value, str):
        return [], checked_text(value, field, as_it_stands)
    if not isinstance(value, list):
        raise ValueError(f"{field} is {value!r:.80}; expected a string or a list of turns")
    # In a dialogue, the answer is the last turn.
    turns = as_messages(value, field)
    if turns[-1]["role"] != "assistant":
        raise ValueError(f"{field} ends with a turn of {turns[-1]['role']!r}; expected "
                         "'assistant'")
    return turns[:-1], turns[-1]["content"]


def _prompt_of_pair(record, before, as_it_stands):
    """The prompt of a pair, given the turns before the answer inside `chosen` (none if it holds
    the answer alone)."""
    # 1. Where the prompt is: in a column, before the answers, or in both places.
    columns = [name for name in PROMPT_FIELDS if record.get(name) is not None]
    if not columns and not before:
        raise ValueError("no field prompt, and chosen holds the answer alone; expected one or the "
                         "other to hold the prompt")
    if before and record.get("history"):
        raise ValueError("history beside dialogues in chosen and rejected; expected the earlier "
                         "turns in one of the two")

    # 2. One place is enough.
    if not before:
        return _prompt_in_columns(record, columns[0], as_it_stands)
    prompt = checked_turns(_with_system(before, record), "chosen", as_it_stands)
    if not columns:
        return prompt

    # 3. Both places have to agree. Some sets repeat a single turn of the dialogue as the prompt;
    #    the answers answer the whole dialogue.
    field = columns[0]
    repeated = _prompt_in_columns(record, field, as_it_stands)
    repeats_a_turn = any(same_turns(repeated[-1:], [turn]) for turn in prompt)
    if repeats_a_turn and isinstance(record[field], str):
        return prompt
    if not same_turns(repeated, prompt):
        raise ValueError(f"field {field} differs from the turns before the answer in chosen")
    return prompt


# --- columns --------------------------------------------------------------------------------------

def _prompt_in_columns(record, field, as_it_stands):
    prompt = _with_input(record, field)
    turns = _earlier_turns(record, prompt, field) + as_messages(prompt, field)
    return checked_turns(_with_system(turns, record), field, as_it_stands)


def _with_input(record, field):
    """The prompt in `field`, with the column `input` after an instruction. Beside another prompt,
    instruction and input may only repeat parts of it."""
    prompt = record[field]
    for name in ("instruction", "input"):
        text = record.get(name)
        if name == field or not text:
            continue
        are_strings = isinstance(text, str) and isinstance(prompt, str)
        if field == "instruction" and are_strings:
            # Alpaca's two columns. An input of white space alone is none.
            if text.strip():
                prompt = f"{prompt}\n\n{text}"
        # Some sets have the parts of their prompt beside the whole of it.
        elif not isinstance(text, str) or text.strip() not in str(prompt):
            raise ValueError(f"{name} is {text!r:.60} beside {field}; expected all of the prompt "
                             f"in {field}, or in instruction and input as strings")
    return prompt


def _earlier_turns(record, prompt, field):
    """The turns in the column `history`."""
    history = record.get("history")
    if not history:
        return []
    is_history = isinstance(history, list) and all(_is_exchange(item) for item in history)
    # A prompt that is a list of turns holds its earlier turns itself.
    if not is_history or not isinstance(prompt, str):
        raise ValueError(f"history is {history!r:.80}; expected a list of [user, assistant] "
                         f"pairs of strings, beside a {field} that is a string")
    turns = []
    for asked, answered in history:
        turns.append({"role": "user", "content": asked})
        turns.append({"role": "assistant", "content": answered})
    return turns


def _is_exchange(item):
    """Whether an item of a history is a list of two strings: what was asked, what was answered."""
    return isinstance(item, list) and [type(text) for text in item] == [str, str]


def _with_system(turns, record):
    """Turns that begin with the text of the record's column `system`, if there is one. ValueError
    if they begin with another system turn."""
    system = record.get("system")
    if system is not None and not isinstance(system, str):
        raise ValueError(f"system is {system!r:.80}; expected a string, the text of the system "
                         "turn")
    # An empty text is no system turn.
    if not system or not system.strip():
        return turns
    if turns[0]["role"] != "system":
        return [{"role": "system", "content": system}, *turns]
    # The turns begin with a system turn of their own: the column may repeat it, no more.
    if turns[0]["content"].strip() != system.strip():
        raise ValueError(f"system is {system!r:.60}, and the prompt begins with the system turn "
                         f"{turns[0]['content']!r:.60}; expected one of them, or the same in both")
    return turns


# --- turns ----------------------------------------------------------------------------------------

def as_messages(prompt, field="prompt"):
    """A prompt as a list of turns: a string is one user turn. ValueError if it is malformed, or
    more than text."""
    # The short way to write a dialogue of one turn.
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list) or not prompt:
        raise ValueError(f"{field} is {prompt!r:.80}; expected a string or a non-empty list of "
                         "turns")
    turns = []
    for turn in prompt:
        _check_turn(turn, field)
        # Other fields of a turn (ids, weights, names) are not shown to the model.
        turns.append({"role": turn["role"], "content": turn["content"]})
    return turns


def _check_turn(turn, field):
    """ValueError unless a turn of `field` holds a role and a text, and nothing beside text."""
    if isinstance(turn, dict):
        # Known kinds of other dialogues are refused by what they are.
        _refuse_more_than_text(turn, f"a turn of {field}")
        if turn.get("role") in TOOL_ROLES:
            raise ValueError(f"{field} has a turn of the role {turn['role']!r}: tools are not "
                             "supported; leave such dialogues out")
        if isinstance(turn.get("content"), list):
            raise ValueError(f"{field} has a turn whose content is a list of parts, "
                             f"{turn['content']!r:.80}; expected one string, of text alone")
        if isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str):
            return
    raise ValueError(f"turn {turn!r:.80} of {field}; expected an object with a string role and a "
                     "string content")


def _refuse_more_than_text(fields, where):
    """ValueError that names a field of a record or of a turn which says more than text does. A null
    or empty one counts as absent."""
    for name in NOT_TEXT:
        if fields.get(name):
            raise ValueError(f"{where} has {name} ({fields[name]!r:.80}), which the model would "
                             "have to see and which is not supported; take the field out if it "
                             "does not matter, else leave the row out")


def same_turns(some, others):
    """Whether two dialogues are the same but for white space around their texts."""
    # Chat formats strip it, and copies of a prompt often differ in it.
    return _stripped(some) == _stripped(others)


def _stripped(turns):
    return [(turn["role"], turn["content"].strip()) for turn in turns]


# --- text that is laid out already ----------------------------------------------------------------

# What may come before the first turn of a dialogue: white space and begin tokens.
BEGIN = r"\A(?:\s|<s>|<\|begin_of_text\|>|<bos>|<｜begin▁of▁sentence｜>)*"


def _turns(opens, closes):
    """A layout of turns: text that begins with an opening, or that has one at the start of a line
    and a closing after it. The mere mention of a mark is none."""
    return rf"{BEGIN}{opens}", rf"^{opens}", closes


# Whose layout it is, a mark to look for first (which is fast), and three patterns: of a beginning
# that tells it alone (or None), of an opening, and of a closing after that.
LAYOUTS = [
    ("ChatML", "<|im_start|>",
     *_turns(r"<\|im_start\|>\w+\n", r"<\|im_end\|>")),
    ("Llama-3", "<|start_header_id|>",
     *_turns(r"<\|start_header_id\|>\w+<\|end_header_id\|>\s", r"<\|eot_id\|>")),
    ("Llama-4", "<|header_start|>",
     *_turns(r"<\|header_start\|>\w+<\|header_end\|>\s", r"<\|eot\|>")),
    ("Llama-2 or Mistral", "[INST]",
     None, rf"{BEGIN}\[INST\]|^\[INST\]", r"\[/INST\]"),
    ("Zephyr, Phi-3 or Tulu", "<|user|>",
     *_turns(r"<\|(?:user|system|assistant)\|>\s*\n", r"(?:<\|assistant\|>|<\|end\|>|</s>)")),
    ("Gemma", "<start_of_turn>",
     *_turns(r"<start_of_turn>\w+\n", r"<end_of_turn>")),
    ("DeepSeek", "<｜User｜>",
     *_turns(r"<｜User｜>", r"<｜Assistant｜>")),
    ("Command-R", "<|START_OF_TURN_TOKEN|>",
     *_turns(r"<\|START_OF_TURN_TOKEN\|><\|\w+\|>", r"<\|END_OF_TURN_TOKEN\|>")),
    ("gpt-oss", "<|message|>",
     *_turns(r"<\|start\|>\w+<\|message\|>", r"<\|end\|>")),
    ("Granite", "<|start_of_role|>",
     *_turns(r"<\|start_of_role\|>\w+<\|end_of_role\|>", r"<\|end_of_text\|>")),
    # Layouts in plain words: only a whole dialogue, or one that ends where the answer begins.
    ("a dialogue of Human: and Assistant:, as in HH", "Human:",
     None, r"\A\s*Human:", r"\n\nAssistant:"),
    ("Alpaca's ### Instruction: and ### Response:", "### Instruction:",
     None, r"### Instruction:\n", r"\n### Response:\s*\Z"),
    ("Vicuna's USER: and ASSISTANT:", "USER:",
     None, r"\bUSER: ", r"\sASSISTANT:\s*\Z"),
]
# Any line may begin a turn.
LAYOUTS = [(name, mark, *(pattern and re.compile(pattern, re.MULTILINE) for pattern in patterns))
           for name, mark, *patterns in LAYOUTS]

# What these formats write behind an answer.
END_MARKS = ("<|im_end|>", "<|eot_id|>", "</s>", "<end_of_turn>", "<|end|>", "<|endoftext|>",
             "<|end_of_text|>", "<｜end▁of▁sentence｜>")


def checked_turns(turns, field, as_it_stands=False):
    """The turns, if none of their texts is laid out already; else a ValueError."""
    for turn in turns:
        checked_text(turn["content"], field, as_it_stands)
    return turns


def checked_text(text, field, as_it_stands=False):
    """The text, if no chat format has laid it out already; else a ValueError that says which."""
    if as_it_stands:
        return text
    for name, mark, *patterns in LAYOUTS:
        start = None
        if mark in text:
            start = _start_of_layout(text, *patterns)
        if start is not None:
            # A laid-out answer may hold the whole dialogue; the prompt has to be a column then too.
            beside = ", beside a prompt," if field in ("chosen", "rejected") else ""
            found = text[start:].strip()[:40]
            raise ValueError(
                f"{field} is laid out already as {name} ({found!r} ...); expected "
                "bare text or a list of turns, for the model's own chat format goes around it. "
                f"Bring it into turns, or{beside} --as_it_stands takes it as it stands")
    return text


def _start_of_layout(text, begins, opens, closes):
    """Where a layout of these patterns starts in a text, or None."""
    found = begins and begins.search(text)
    # One search after the other, and no pattern of both: the time grows with the length of the
    # text, not with its square.
    if not found:
        found = opens.search(text)
        if not found or not closes.search(text, found.end()):
            return None
    return found.start()


def _end_mark(text):
    """The end mark of a chat format that follows the last word of a text at once, or None."""
    text = text.rstrip()
    for mark in END_MARKS:
        # After a space the mark is a word of a sentence, as in "It ends with </s>".
        if text.endswith(mark) and not text[:-len(mark)][-1:].isspace():
            return mark
    return None
