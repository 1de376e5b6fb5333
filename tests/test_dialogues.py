"""Columns that change a prompt, what is refused by name, and text that is laid out already.

    pytest tests/test_dialogues.py
"""
import pytest

from data.dialogues import as_messages, checked_text, prompt_turns
from data.preference import parse_record

ANSWERS = {"chosen": "good", "rejected": "bad"}


def turn(role, content):
    return {"role": role, "content": content}


def dialogue(*contents, system=None):
    turns = [turn("assistant" if i % 2 else "user", content) for i, content in enumerate(contents)]
    return turns if system is None else [turn("system", system), *turns]


@pytest.mark.parametrize("columns, turns", [
    ({"prompt": "q", "system": "s"}, dialogue("q", system="s")),
    ({"prompt": "q", "system": ""}, dialogue("q")),
    ({"prompt": "q", "system": None}, dialogue("q")),
    ({"prompt": "q", "system": " \n"}, dialogue("q")),
    ({"question": "q", "system": "s"}, dialogue("q", system="s")),      # as in Orca's pairs
    ({"prompt": dialogue("q"), "system": "s"}, dialogue("q", system="s")),
    ({"prompt": dialogue("q", system="s "), "system": "s"}, dialogue("q", system="s ")),
    ({"prompt": "q", "history": [["a", "b"], ["c", "d"]]}, dialogue("a", "b", "c", "d", "q")),
    ({"prompt": "q", "history": [["a", "b"]], "system": "s"}, dialogue("a", "b", "q", system="s")),
    ({"prompt": "q", "history": []}, dialogue("q")),
    ({"prompt": "q", "history": None}, dialogue("q")),
    ({"instruction": "q"}, dialogue("q")), ({"instruction": "q", "input": ""}, dialogue("q")),
    ({"instruction": "q", "input": None}, dialogue("q")),
    ({"instruction": "q", "input": " \n"}, dialogue("q")),
    ({"instruction": "Sum:", "input": "1, 2"}, dialogue("Sum:\n\n1, 2")),
    ({"prompt": "Sum: 1, 2", "instruction": "Sum:", "input": "1, 2"}, dialogue("Sum: 1, 2")),
    ({"prompt": "q", "tools": None, "images": [], "reasoning_content": ""}, dialogue("q"))],
    ids=str)
def test_columns_beside_chosen_and_rejected_make_the_prompt(columns, turns):
    assert parse_record(columns | ANSWERS) == (turns, "good", "bad")


def test_a_system_column_goes_before_a_dialogue_inside_the_answers_and_before_scored_ones():
    pair = {name: dialogue("q", answer) for name, answer in ANSWERS.items()}
    for prompt in ({}, {"prompt": "q"}, {"prompt": dialogue("q")}):
        assert parse_record(pair | prompt | {"system": "s"}) == (
            dialogue("q", system="s"), "good", "bad")
    scored = {"prompt": "q", "system": "s", "all_generated_responses": ["good", "bad"],
              "all_rm_scores": [1, 0]}
    assert parse_record(scored) == (dialogue("q", system="s"), "good", "bad")


@pytest.mark.parametrize("columns, message", [
    ({"prompt": "q", "system": 3}, "system is 3; expected a string"),
    ({"prompt": dialogue("q", system="t"), "system": "s"},
     "system is 's', and the prompt begins with the system turn 't'"),
    ({"prompt": "q", "history": "a"}, "history is 'a'; expected a list of .user, assistant. pairs"),
    ({"prompt": "q", "history": [["a"]]}, "history is"),
    ({"prompt": "q", "history": [["a", None]]}, "history is"),
    ({"prompt": dialogue("q"), "history": [["a", "b"]]},
     "history is .* beside a prompt that is a string"),
    ({"instruction": "q", "input": ["x"]}, "input is .* beside instruction"),
    ({"prompt": "q", "input": "x"}, "input is 'x' beside prompt"),
    ({"prompt": "q", "instruction": "Be brief."}, "instruction is 'Be brief.' beside prompt")],
    ids=str)
def test_columns_that_are_odd_or_contradict_the_prompt_are_refused(columns, message):
    with pytest.raises(ValueError, match=message):
        parse_record(columns | ANSWERS)


CALL = [{"type": "function", "function": {"name": "now", "arguments": "{}"}}]


@pytest.mark.parametrize("row, message", [
    ({"tools": CALL}, "the row has tools"), ({"images": ["a.png"]}, "the row has images"),
    ({"chat_template_kwargs": {"enable_thinking": False}}, "the row has chat_template_kwargs"),
    ({"prompt": [turn("user", "q"), turn("assistant", None) | {"tool_calls": CALL},
                 turn("tool", "12:00")]},
     "a turn of prompt has tool_calls"),
    ({"prompt": [turn("user", "q"), turn("assistant", "a"), turn("tool", "12:00")]},
     "prompt has a turn of the role 'tool'"),
    ({"prompt": [turn("function", "q")]}, "prompt has a turn of the role 'function'"),
    ({"chosen": [turn("assistant", "") | {"tool_calls": CALL}]}, "a turn of chosen has tool_calls"),
    ({"rejected": [turn("assistant", "b") | {"reasoning_content": "Dark."}]},
     "a turn of rejected has reasoning_content"),
    ({"rejected": [turn("assistant", "b") | {"thinking": "Dark."}]},
     "a turn of rejected has thinking"),
    ({"prompt": [turn("user", [{"type": "image"}, {"type": "text", "text": "q"}])]},
     "prompt has a turn whose content is a list of parts")], ids=str)
def test_what_is_more_than_text_is_refused_by_name(row, message):
    with pytest.raises(ValueError, match=message):
        parse_record({"prompt": "q"} | ANSWERS | row)


def test_contents_are_left_as_they_are():
    assert as_messages("\n  x = 1\n") == [turn("user", "\n  x = 1\n")]
    row = {"prompt": " q\n", "chosen": dialogue(" q", "  a\n"), "rejected": dialogue("q", "a")}
    assert parse_record(row) == (dialogue(" q"), "  a\n", "a")


LAID_OUT = {
    "ChatML": "<|im_start|>system\nBe kind.<|im_end|>\n"
              "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n",
    "ChatML, one turn that is not closed": "<|im_start|>user\nq",
    "ChatML after a line": "Template:\n<|im_start|>user\nq<|im_end|>",
    "Llama-3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nq<|eot_id|>",
    "Llama-2": "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nq [/INST]",
    "Mistral": "[INST] q [/INST] a</s>[INST] r [/INST]",
    "Zephyr": "<|system|>\nBe kind.</s>\n<|user|>\nq</s>\n<|assistant|>\n",
    "Tulu": "<|user|>\nq\n<|assistant|>\n",
    "Phi-3": "<|user|>\nq<|end|>\n<|assistant|>\n",
    "Gemma": "<bos><start_of_turn>user\nq<end_of_turn>\n<start_of_turn>model\n",
    "DeepSeek": "<｜begin▁of▁sentence｜><｜User｜>q<｜Assistant｜>",
    "HH": "\n\nHuman: q\n\nAssistant:",
    "HH dialogue": "Human: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: b",
    "Alpaca": "Below is an instruction.\n\n### Instruction:\nq\n\n### Response:\n",
    "Vicuna": "A chat between a user and an assistant. USER: q ASSISTANT:"}


@pytest.mark.parametrize("name", LAID_OUT)
def test_text_that_is_laid_out_already_is_recognised_in_every_field(name):
    text, layout = LAID_OUT[name], name.split(",")[0].split()[0]
    for row, field in (({"prompt": text}, "prompt"), ({"prompt": [turn("user", text)]}, "prompt"),
                       ({"system": text}, "prompt"),
                       ({"instruction": text, "prompt": None}, "instruction"),
                       ({"history": [["a", text]]}, "prompt"), ({"chosen": text}, "chosen"),
                       ({"rejected": text}, "rejected")):
        message = f"{field} is laid out already as .*{layout}.* --as_it_stands"
        with pytest.raises(ValueError, match=message):
            parse_record({"prompt": "q"} | ANSWERS | row)
    prompt, *_ = parse_record({"prompt": text} | ANSWERS, as_it_stands=True)
    assert prompt == [turn("user", text)] == prompt_turns({"prompt": text}, "prompt",
                                                          as_it_stands=True)


@pytest.mark.parametrize("text", [
    "What does <|im_end|> mean?", "Why does my model write <|im_start|>user again and again?",
    "<|im_start|> and <|im_end|>: what are they?", "Is [INST] one token?",
    "[INST] shows up in the answer. Why?",
    "Explain [INST] and [/INST] to me.",
    "Does Llama-3 end a turn with <|eot_id|> or <|end_of_text|>?",
    "What is <|start_header_id|>?", "<start_of_turn> is Gemma's mark.",
    "Is it <|user|> or <|assistant|>?", "<s>old</s>",
    "Human: a novel. Who wrote it?", "Act as an Assistant:\nHuman: hi",
    "### Instruction: is a heading of Alpaca's.",
    "In the USER: field, what do I write?", "a <b and c> d, 1 < 2 | 3 > 2"])
def test_a_mention_of_a_mark_is_no_layout(text):
    assert checked_text(text, "prompt") == text
    row = {"prompt": text, "chosen": text, "rejected": "no idea"}
    assert parse_record(row) == (dialogue(text), text, "no idea")


def test_end_marks_behind_both_answers_are_refused_and_a_mention_is_not():
    with pytest.raises(ValueError,
                       match="chosen and rejected end with <.im_end.>; expected bare text"):
        parse_record({"prompt": "q", "chosen": "good.<|im_end|>", "rejected": "bad<|im_end|>\n"})
    for chosen, rejected in (("It is </s>", "</s>, I think"),
                             ("It is </s>", "Llama ends with </s>"), ("a</s>", "b<|end|>")):
        row = {"prompt": "q", "chosen": chosen, "rejected": rejected}
        assert parse_record(row)[1:] == (chosen, rejected)
    row = {"prompt": "q", "chosen": "good.</s>", "rejected": "bad</s>"}
    assert parse_record(row, as_it_stands=True)[1:] == ("good.</s>", "bad</s>")
