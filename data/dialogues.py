"""What a row asks: its prompt as turns, with the columns that change it; and what is refused, as
it says something that turns of text cannot hold.

    row = {"prompt": "And now?", "system": "Be brief.", "history": [["Hi", "Hello!"]]}
    turns = prompt_turns(row, "prompt")

A turn is {"role": "system" | "user" | "assistant", "content": "..."}. Contents are kept as they
are: what is stripped of them the chat format decides. Columns, of which an empty or null one is
none, are taken as the field's converters take them:

    system                  text: the system turn of a prompt that has none (Orca's pairs)
    history                 [[user, assistant], ...]: the turns before a prompt that is a string
    instruction and input   one prompt, an empty line between them (Alpaca's sets)
"""
import re

# Columns of a row and fields of a turn that the model would have to see, in a layout that is not
# made here.
NOT_TEXT = ("tools", "functions", "tool_calls", "function_call", "reasoning_content", "reasoning",
            "thinking", "images", "image", "videos", "video", "audios", "audio",
            "chat_template_kwargs")
TOOL_ROLES = ("tool", "function", "ipython")

BEGIN = r"\A(?:\s|<s>|<\|begin_of_text\|>|<bos>|<｜begin▁of▁sentence｜>)*"


def _turns(opens, closes):
    """Text that begins with the opening of a turn, or has one at the start of a line and a closing
    after it."""
    return rf"{BEGIN}{opens}|^{opens}.*?{closes}"


# Text that is laid out already: whose layout it is, a mark to look for first, and the pattern. The
# mention of a mark is no layout.
LAYOUTS = [
    ("ChatML", "<|im_start|>",
     _turns(r"<\|im_start\|>\w+\n", r"<\|im_end\|>")),
    ("Llama-3", "<|start_header_id|>",
     _turns(r"<\|start_header_id\|>\w+<\|end_header_id\|>\s", r"<\|eot_id\|>")),
    ("Llama-4", "<|header_start|>",
     _turns(r"<\|header_start\|>\w+<\|header_end\|>\s", r"<\|eot\|>")),
    ("Llama-2 or Mistral", "[INST]",
     _turns(r"\[INST\](?=.*?\[/INST\])", r"\[/INST\]")),
    ("Zephyr, Phi-3 or Tulu", "<|user|>",
     _turns(r"<\|(?:user|system|assistant)\|>\s*\n", r"(?:<\|assistant\|>|<\|end\|>|</s>)")),
    ("Gemma", "<start_of_turn>",
     _turns(r"<start_of_turn>\w+\n", r"<end_of_turn>")),
    ("DeepSeek", "<｜User｜>",
     _turns(r"<｜User｜>", r"<｜Assistant｜>")),
    ("Command-R", "<|START_OF_TURN_TOKEN|>",
     _turns(r"<\|START_OF_TURN_TOKEN\|><\|\w+\|>", r"<\|END_OF_TURN_TOKEN\|>")),
    ("gpt-oss", "<|message|>",
     _turns(r"<\|start\|>\w+<\|message\|>", r"<\|end\|>")),
    ("Granite", "<|start_of_role|>",
     _turns(r"<\|start_of_role\|>\w+<\|end_of_role\|>", r"<\|end_of_text\|>")),
    ("a dialogue of Human: and Assistant:, as in HH", "Human:",
     r"\A\s*Human:.*?\n\nAssistant:"),
    ("Alpaca's ### Instruction: and ### Response:", "### Instruction:",
     r"### Instruction:\n.*?\n### Response:\s*\Z"),
    ("Vicuna's USER: and ASSISTANT:", "USER:",
     r"\bUSER: .*?\sASSISTANT:\s*\Z"),
]
LAYOUTS = [(name, mark, re.compile(pattern, re.MULTILINE | re.DOTALL))
           for name, mark, pattern in LAYOUTS]
END_MARKS = ("<|im_end|>", "<|eot_id|>", "</s>", "<end_of_turn>", "<|end|>", "<|endoftext|>",
             "<|end_of_text|>", "<｜end▁of▁sentence｜>")


# --- turns ----------------------------------------------------------------------------------------

def as_messages(prompt, field="prompt"):
    """A prompt as a list of turns: a string is one user turn. ValueError if it is malformed, or
    more than text."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{field} is {prompt!r:.80}; expected a string or a non-empty list of "
                         "turns")
    for turn in turns:
        _check_turn(turn, field)
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def _check_turn(turn, field):
    if isinstance(turn, dict):
        refuse_more_than_text(turn, f"a turn of {field}")
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


def refuse_more_than_text(fields, where):
    """ValueError that names a field of a row or of a turn which says more than text does. A null
    or empty one is none."""
    for name in NOT_TEXT:
        if fields.get(name):
            raise ValueError(f"{where} has {name} ({fields[name]!r:.80}), which the model would "
                             "have to see and which is not supported; take the field out if it "
                             "does not matter, else leave the row out")


def same_turns(some, others):
    """Whether two dialogues are the same but for white space around their texts."""
    def bare(turns):
        return [(turn["role"], turn["content"].strip()) for turn in turns]
    return bare(some) == bare(others)


# --- columns --------------------------------------------------------------------------------------

def prompt_turns(row, field, as_it_stands=False):
    """The turns to be answered of a row whose prompt is in `field`, with the columns that change
    it. ValueError if they are malformed or contradict each other, or if a text is laid out already
    (unless as_it_stands)."""
    refuse_more_than_text(row, "the row")
    prompt = _with_input(row, field)
    turns = _earlier_turns(row, prompt, field) + as_messages(prompt, field)
    return checked_turns(with_system(turns, row), field, as_it_stands)


def _with_input(row, field):
    """The prompt in `field`, with the column `input` after an instruction. Beside another prompt,
    instruction and input may only repeat parts of it."""
    prompt = row[field]
    for name in ("instruction", "input"):
        text = row.get(name)
        if name == field or not text:
            continue
        are_strings = isinstance(text, str) and isinstance(prompt, str)
        if field == "instruction" and are_strings:
            prompt = f"{prompt}\n\n{text}" if text.strip() else prompt
        elif not isinstance(text, str) or text.strip() not in str(prompt):
            raise ValueError(f"{name} is {text!r:.60} beside {field}; expected all of the prompt "
                             f"in {field}, or in instruction and input as strings")
    return prompt


def _earlier_turns(row, prompt, field):
    history = row.get("history")
    if not history:
        return []
    turns = []
    for pair in history if isinstance(history, list) and isinstance(prompt, str) else [None]:
        if not isinstance(pair, list) or [type(text) for text in pair] != [str, str]:
            raise ValueError(f"history is {history!r:.80}; expected a list of [user, assistant] "
                             f"pairs of strings, beside a {field} that is a string")
        turns.append({"role": "user", "content": pair[0]})
        turns.append({"role": "assistant", "content": pair[1]})
    return turns


def with_system(turns, row):
    """Turns that begin with the text of the row's column `system`, if there is one. ValueError if
    they begin with another system turn."""
    system = row.get("system")
    if system is not None and not isinstance(system, str):
        raise ValueError(f"system is {system!r:.80}; expected a string, the text of the system "
                         "turn")
    if not system or not system.strip():
        return turns
    if turns[0]["role"] != "system":
        return [{"role": "system", "content": system}, *turns]
    if turns[0]["content"].strip() != system.strip():
        raise ValueError(f"system is {system!r:.60}, and the prompt begins with the system turn "
                         f"{turns[0]['content']!r:.60}; expected one of them, or the same in both")
    return turns


# --- layouts --------------------------------------------------------------------------------------

def checked_turns(turns, field, as_it_stands=False):
    """The turns, if no text of theirs is laid out already."""
    for turn in turns:
        checked_text(turn["content"], field, as_it_stands)
    return turns


def checked_text(text, field, as_it_stands=False):
    """The text, if it is not laid out already, by some chat format or other."""
    if as_it_stands:
        return text
    for name, mark, pattern in LAYOUTS:
        found = pattern.search(text) if mark in text else None
        if found:
            beside = ", beside a prompt," if field in ("chosen", "rejected") else ""
            raise ValueError(
                f"{field} is laid out already as {name} ({found[0].strip()[:40]!r} ...); expected "
                "bare text or a list of turns, for the model's own chat format goes around it. "
                f"Bring it into turns, or{beside} --as_it_stands takes it as it stands")
    return text


def end_mark(text):
    """The end mark of a chat format that follows the last word of a text at once, or None."""
    text = text.rstrip()
    for mark in END_MARKS:
        if text.endswith(mark) and not text[:-len(mark)][-1:].isspace():
            return mark
    return None
