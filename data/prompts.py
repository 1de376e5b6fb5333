"""Files of prompts to answer and of the answers, in three shapes. What the prompts hold decides what is written:

    {"prompt": "..." or [turns], ...}            the same line with `all_generated_responses`, as JSON Lines
    {"instruction": "...", "dataset": "..."}     AlpacaEval 2: a JSON array of dataset, instruction, output, generator
    {"question_id": "...", "turns": [one turn]}  Arena-Hard (v0.1): its JSON Lines of answers, one choice a sample

Prompts are a file of rows (data/files.py). A row that is none of these is a bad line.
"""
import hashlib
import json
import time

from data.dialogues import as_messages, checked_turns, prompt_turns
from data.files import Dropped, read_rows


def read_prompts(path, encode, dropped=None, skip_bad_lines=False, as_it_stands=False,
                 required_field=None):
    """(shape, rows, prompts) of a file: one shape for all, objects as read, and encode(turns to be answered) of each.
    Empty prompts are dropped and counted. ValueError names the bad lines; one that encode raises makes a bad line too.
    required_field: a field without which a line is bad; "prompt" allows the first shape alone."""
    shapes = {}         # the first one counts

    def prompt_to_answer(row, source):
        if required_field and row.get(required_field) is None:
            raise ValueError(f"no field {required_field}")
        shape, turns = prompt_of(row, as_it_stands)
        if not turns[-1]["content"].strip():
            raise Dropped("an empty prompt")
        prompt = encode(turns)
        shapes.setdefault(shape)
        first = next(iter(shapes))
        if shape != first:
            raise ValueError(f"of the shape {shape}; expected {first}, as before")
        return row, prompt

    found = [pair for _, pair in read_rows([path], prompt_to_answer, dropped, skip_bad_lines)]
    if not found:
        raise ValueError(f"{path}: no prompts")
    return next(iter(shapes)), [row for row, _ in found], [prompt for _, prompt in found]


def prompt_of(row, as_it_stands=False):
    """(shape, turns to answer) of one object."""
    if "prompt" in row:
        return "responses", prompt_turns(row, "prompt", as_it_stands)
    if isinstance(row.get("instruction"), str):
        if row.get("input"):
            raise ValueError("instruction with an input; expected all of the prompt in instruction, as in AlpacaEval")
        return "alpaca_eval", prompt_turns(row, "instruction", as_it_stands)
    if "question_id" in row and "turns" in row:
        turns = row["turns"]
        if not isinstance(turns, list) or len(turns) != 1 or not isinstance(turns[0], dict):
            raise ValueError(f"turns is {turns!r:.80}; expected a list of one object, the question")
        return "arena_hard", checked_turns(as_messages([{"role": "user"} | turns[0]], "turns"), "turns", as_it_stands)
    raise ValueError(f"fields {sorted(row)}; expected prompt, or instruction (AlpacaEval), or question_id and turns "
                     "(Arena-Hard)")


def answers_text(shape, rows, answers, name):
    """The text of a file of answers. answers: for each row a list of (text, number of tokens); name: the model's."""
    if shape == "alpaca_eval":
        kept = ({key: row[key] for key in ("dataset", "instruction") if key in row} for row in rows)
        lines = [row | {"output": texts[0][0], "generator": name} for row, texts in zip(kept, answers)]
        return json.dumps(lines, indent=2, ensure_ascii=False) + "\n"
    if shape == "responses":
        lines = [row | {"all_generated_responses": [text for text, _ in texts]} for row, texts in zip(rows, answers)]
    else:
        lines = [{"question_id": row["question_id"],
                  "answer_id": hashlib.sha256(f"{name} {row['question_id']}".encode()).hexdigest()[:22],
                  "model_id": name,
                  "choices": [{"index": i, "turns": [{"content": text, "token_len": n}]}
                              for i, (text, n) in enumerate(texts)],
                  "tstamp": time.time()} for row, texts in zip(rows, answers)]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
