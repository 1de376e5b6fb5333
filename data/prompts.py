"""Files of prompts to answer, and files of the answers, in three shapes.

What the prompts hold decides what is written:

    {"prompt": "..." or [turns], ...}            the same line with `all_generated_responses`
    {"instruction": "...", "dataset": "..."}     AlpacaEval 2: a JSON array of its fields
    {"question_id": "...", "turns": [one turn]}  Arena-Hard (v0.1): JSON Lines, a choice a sample

Prompts are a file of records (data/files.py). A record that is none of these is a bad line.
"""
import hashlib
import json
import time

from data.dialogues import as_messages, checked_turns, prompt_turns
from data.files import Dropped, read_records


# --- prompts --------------------------------------------------------------------------------------

def read_prompts(path, encode, dropped=None, skip_bad_lines=False, as_it_stands=False,
                 required_field=None):
    """(shape, records, prompts) of a file of prompts: the one shape of all records ("responses",
    "alpaca_eval" or "arena_hard"), the records as they were read, and encode(turns) of each.

    Empty prompts are dropped, and counted in the Counter `dropped`. ValueError names the bad lines
    (skip_bad_lines: they are dropped and counted); a ValueError of encode makes a bad line too,
    and so does a record without the required_field: "prompt" allows the first shape alone.
    """
    first_shape = None

    def prompt_to_answer(record, source):
        nonlocal first_shape
        if required_field and record.get(required_field) is None:
            raise ValueError(f"no field {required_field}")
        shape, turns = prompt_of(record, as_it_stands)
        if not turns[-1]["content"].strip():
            raise Dropped("an empty prompt")
        prompt = encode(turns)
        # The first good record decides what the file of answers looks like.
        if first_shape is None:
            first_shape = shape
        if shape != first_shape:
            raise ValueError(f"of the shape {shape}; expected {first_shape}, as before")
        return record, prompt

    # Without workers the records are used here and in order, so that there is a first one.
    records = []
    prompts = []
    for _, (record, prompt) in read_records([path], prompt_to_answer, dropped, skip_bad_lines):
        records.append(record)
        prompts.append(prompt)
    if not records:
        raise ValueError(f"{path}: no prompts")
    return first_shape, records, prompts


def prompt_of(record, as_it_stands=False):
    """(shape, turns to answer) of one record. ValueError if it is malformed or of no known
    shape."""
    # Our own shape goes first: its records may hold any other column, which comes back as it was.
    if "prompt" in record:
        return "responses", prompt_turns(record, "prompt", as_it_stands)

    if isinstance(record.get("instruction"), str):
        # Only the instruction comes back in the file of answers: an input would be lost.
        if record.get("input"):
            raise ValueError("instruction with an input; expected all of the prompt in "
                             "instruction, as in AlpacaEval")
        return "alpaca_eval", prompt_turns(record, "instruction", as_it_stands)

    # Of Arena-Hard, version 0.1 alone: every question is one turn.
    if "question_id" in record and "turns" in record:
        turns = record["turns"]
        if not isinstance(turns, list) or len(turns) != 1 or not isinstance(turns[0], dict):
            raise ValueError(f"turns is {turns!r:.80}; expected a list of one object, the question")
        question = {"role": "user"} | turns[0]      # Arena-Hard names no role
        messages = as_messages([question], "turns")
        return "arena_hard", checked_turns(messages, "turns", as_it_stands)

    raise ValueError(f"fields {sorted(record)}; expected prompt, or instruction (AlpacaEval), or "
                     "question_id and turns (Arena-Hard)")


# --- answers --------------------------------------------------------------------------------------

def answers_text(shape, records, answers, name):
    """The text of a file of answers.

    shape, records: of read_prompts. answers: for each record a list of (text, number of tokens),
    one a sample. name: the model's.
    """
    # 1. An object for each record.
    lines = []
    for record, samples in zip(records, answers):
        if shape == "responses":
            texts = [text for text, _ in samples]
            lines.append(record | {"all_generated_responses": texts})
        elif shape == "alpaca_eval":
            lines.append(_alpaca_eval_answer(record, samples, name))
        else:
            lines.append(_arena_hard_answer(record, samples, name))

    # 2. AlpacaEval's judge reads one JSON array, Arena-Hard's and our own commands JSON Lines.
    if shape == "alpaca_eval":
        return json.dumps(lines, indent=2, ensure_ascii=False) + "\n"
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def _alpaca_eval_answer(record, samples, name):
    """An object of AlpacaEval 2's model outputs. It has room for one answer: the first sample."""
    line = {}
    for field in ("dataset", "instruction"):
        if field in record:
            line[field] = record[field]
    text, _ = samples[0]
    return line | {"output": text, "generator": name}


def _arena_hard_answer(record, samples, name):
    """An object of Arena-Hard's model answers."""
    choices = []
    for i, (text, n_tokens) in enumerate(samples):
        choices.append({"index": i, "turns": [{"content": text, "token_len": n_tokens}]})
    # Arena-Hard draws ids at random; a hash is the same whenever the same model answers again.
    answer_id = hashlib.sha256(f"{name} {record['question_id']}".encode()).hexdigest()[:22]
    return {
        "question_id": record["question_id"],
        "answer_id": answer_id,
        "model_id": name,
        "choices": choices,
        "tstamp": time.time(),      # when it was written, in seconds
    }
