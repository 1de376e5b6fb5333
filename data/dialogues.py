"""What a row asks: its prompt as turns, with the columns that change it; and what is refused because it says something
that turns of text cannot hold.

    turns = prompt_turns({"prompt": "And now?", "system": "Be brief.", "history": [["Hi", "Hello!"]]}, "prompt")

A turn is {"role": "system" | "user" | "assistant", "content": "..."}. Contents are kept as they are: what is stripped of
them the chat format decides. A column `system` (text) is the system turn of a prompt that has none, as converters of
Orca's and Alpaca's sets take it; `history`, a list of [user, assistant] pairs, holds the turns before a prompt that is a
string, as LLaMA-Factory has it; `instruction` with `input` are one prompt, an empty line between them, as in Alpaca's sets
beside chosen and rejected. An empty or null column is none.
"""
import re

# Columns of a row and fields of a turn that the model would have to see, in a layout that we do not make.
NOT_TEXT = ("tools", "functions", "tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "images",
            "image", "videos", "video", "audios", "audio", "chat_template_kwargs")
TOOL_ROLES = ("tool", "function", "ipython")

def _control_marks(opens, closes):
    """Text that begins with the opening of a turn, or has one at the start of a line and a closing after it."""
    return rf"\A(?:\s|<s>|<\|begin_of_text\|>|<bos>|<｜begin▁of▁sentence｜>)*{opens}|^{opens}.*?{closes}"


# Text that is laid out already: (whose layout, a mark to look for first, what it looks like). To mention a mark is not
# enough.
LAYOUTS = [(name, mark, re.compile(pattern, re.MULTILINE | re.DOTALL)) for name, mark, pattern in (
    ("ChatML", "<|im_start|>", _control_marks(r"<\|im_start\|>\w+\n", r"<\|im_end\|>")),
    ("Llama-3", "<|start_header_id|>", _control_marks(r"<\|start_header_id\|>\w+<\|end_header_id\|>\s", r"<\|eot_id\|>")),
    ("Llama-4", "<|header_start|>", _control_marks(r"<\|header_start\|>\w+<\|header_end\|>\s", r"<\|eot\|>")),
    ("Llama-2 or Mistral", "[INST]", _control_marks(r"\[INST\](?=.*?\[/INST\])", r"\[/INST\]")),
    ("Zephyr, Phi-3 or Tulu", "<|user|>",
     _control_marks(r"<\|(?:user|system|assistant)\|>\s*\n", r"(?:<\|assistant\|>|<\|end\|>|</s>)")),
    ("Gemma", "<start_of_turn>", _control_marks(r"<start_of_turn>\w+\n", r"<end_of_turn>")),
    ("DeepSeek", "<｜User｜>", _control_marks(r"<｜User｜>", r"<｜Assistant｜>")),
    ("Command-R", "<|START_OF_TURN_TOKEN|>",
     _control_marks(r"<\|START_OF_TURN_TOKEN\|><\|\w+\|>", r"<\|END_OF_TURN_TOKEN\|>")),
    ("gpt-oss", "<|message|>", _control_marks(r"<\|start\|>\w+<\|message\|>", r"<\|end\|>")),
    ("Granite", "<|start_of_role|>",
     _control_marks(r"<\|start_of_role\|>\w+<\|end_of_role\|>", r"<\|end_of_text\|>")),
    ("a dialogue of Human: and Assistant:, as in HH", "Human:", r"\A\s*Human:.*?\n\nAssistant:"),
    ("Alpaca's ### Instruction: and ### Response:", "### Instruction:", r"### Instruction:\n.*?\n### Response:\s*\Z"),
    ("Vicuna's USER: and ASSISTANT:", "USER:", r"\bUSER: .*?\sASSISTANT:\s*\Z"))]
END_MARKS = ("<|im_end|>", "<|eot_id|>", "</s>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "<|end_of_text|>",
             "<｜end▁of▁sentence｜>")


def as_messages(prompt, field="prompt"):
    """A prompt as a list of turns: a string is one user turn. ValueError if it is malformed, or more than text."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{field} is {prompt!r:.80}; expected a string or a non-empty list of turns")
    for turn in turns:
        if isinstance(turn, dict):
            refuse_more_than_text(turn, f"a turn of {field}")
            if turn.get("role") in TOOL_ROLES:
                raise ValueError(f"{field} has a turn of the role {turn['role']!r}: tools are not supported; leave such "
                                 "dialogues out")
            if isinstance(turn.get("content"), list):
                raise ValueError(f"{field} has a turn whose content is a list of parts, {turn['content']!r:.80}; expected "
                                 "one string, of text alone")
        if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise ValueError(f"turn {turn!r:.80} of {field}; expected an object with a string role and a string content")
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def refuse_more_than_text(fields, where):
    """ValueError that names the field of a row or of a turn which says more than text does. A null or empty one is
    none."""
    for name in NOT_TEXT:
        if fields.get(name):
            raise ValueError(f"{where} has {name} ({fields[name]!r:.80}), which the model would have to see and which is not "
                             "supported; take the field out if it does not matter, else leave the row out")


def prompt_turns(row, field, as_it_stands=False):
    """The turns to be answered of a row whose prompt is in `field`, with its columns `history` and `system`. ValueError
    if they are malformed or contradict each other, or if the text is laid out already (unless as_it_stands)."""
    refuse_more_than_text(row, "the row")
    prompt = row[field]
    for name in ("instruction", "input"):
        text = row.get(name)
        if name == field or not text:
            continue
        if name == "input" and field == "instruction" and isinstance(text, str) and isinstance(prompt, str):
            prompt = f"{prompt}\n\n{text}" if text.strip() else prompt
        elif not isinstance(text, str) or text.strip() not in str(prompt):
            raise ValueError(f"{name} is {text!r:.60} beside {field}; expected all of the prompt in {field}, or in "
                             "instruction and input as strings")
    turns = _earlier_turns(row, prompt, field) + as_messages(prompt, field)
    return checked_turns(with_system(turns, row), field, as_it_stands)


def _earlier_turns(row, prompt, field):
    history = row.get("history")
    if not history:
        return []
    pairs = isinstance(history, list) and all(isinstance(pair, list) and len(pair) == 2
                                              and all(isinstance(text, str) for text in pair) for pair in history)
    if not pairs or not isinstance(prompt, str):
        raise ValueError(f"history is {history!r:.80}; expected a list of [user, assistant] pairs of strings, beside a "
                         f"{field} that is a string")
    return [{"role": role, "content": text} for pair in history for role, text in zip(("user", "assistant"), pair)]


def with_system(turns, row):
    """Turns that begin with the text of the row's column `system`, if there is one. ValueError if they begin with
    another system turn."""
    system = row.get("system")
    if system is not None and not isinstance(system, str):
        raise ValueError(f"system is {system!r:.80}; expected a string, the text of the system turn")
    if not system or not system.strip():
        return turns
    if turns[0]["role"] != "system":
        return [{"role": "system", "content": system}, *turns]
    if turns[0]["content"].strip() != system.strip():
        raise ValueError(f"system is {system!r:.60}, and the prompt begins with the system turn "
                         f"{turns[0]['content']!r:.60}; expected one of them, or the same in both")
    return turns


def checked_turns(turns, field, as_it_stands=False):
    """The turns, if no text of theirs is laid out already."""
    for turn in turns:
        checked_text(turn["content"], field, as_it_stands)
    return turns


def checked_text(text, field, as_it_stands=False):
    """The text, if it is not laid out already by some chat format or other."""
    if not as_it_stands:
        for name, mark, pattern in LAYOUTS:
            if mark in text and (found := pattern.search(text)):
                beside = ", beside a prompt," if field in ("chosen", "rejected") else ""
                raise ValueError(f"{field} is laid out already as {name} ({found[0].strip()[:40]!r} ...); expected bare text "
                                 "or a list of turns, for the model's own chat format goes around it. Bring it into turns, "
                                 f"or{beside} --as_it_stands takes it as it stands")
    return text


def end_mark(text):
    """The end mark of a chat format that follows the last word of a text at once, or None."""
    text = text.rstrip()
    for mark in END_MARKS:
        if text.endswith(mark) and not text[:-len(mark)][-1:].isspace():
            return mark
    return None


def same_turns(some, others):
    """Whether two dialogues are the same but for white space around their texts."""
    def bare(turns):
        return [(turn["role"], turn["content"].strip()) for turn in turns]
    return bare(some) == bare(others)
