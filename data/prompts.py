"""Files of prompts to answer and of the answers, in three shapes. What the prompts hold decides what is written:

    {"prompt": "..." or [turns], ...}            the same line with `all_generated_responses`, as JSON Lines
    {"instruction": "...", "dataset": "..."}     AlpacaEval 2: a JSON array of dataset, instruction, output, generator
    {"question_id": "...", "turns": [one turn]}  Arena-Hard (v0.1): its JSON Lines of answers, one choice a sample

Prompts are JSON Lines, or one JSON array, as AlpacaEval's file is. A line that is none of these stops with its place.
"""
import hashlib
import json
import time
from pathlib import Path

from data.preference import as_messages, parse_line, read_lines


def read_prompts(path, encode):
    """(shape, rows, prompts) of a file: one shape for all, objects as read, and encode(turns to be answered) of each.
    ValueError names the line."""
    lines = list(read_lines(path))
    if lines and lines[0][1].lstrip().startswith("["):
        try:
            rows = json.loads(Path(path).read_text(encoding="utf-8"))
        except json.JSONDecodeError as e:
            raise ValueError(f"{path}: not a valid JSON array ({e})") from None
        lines = [(f"{path}: item {i + 1}", json.dumps(row)) for i, row in enumerate(rows)]
    found, shapes = [], {}
    for source, line in lines:
        row = parse_line(source, line)
        try:
            shape, turns = prompt_of(row)
            found.append((row, encode(turns)))
        except ValueError as e:
            raise ValueError(f"{source}: {e}") from None
        shapes.setdefault(shape, source)
        if len(shapes) > 1:
            raise ValueError(f"{source}: of the shape {shape}; expected {next(iter(shapes))}, as before")
    if not found:
        raise ValueError(f"{path}: no prompts")
    return shape, [row for row, _ in found], [prompt for _, prompt in found]


def prompt_of(row):
    """(shape, turns to answer) of one object."""
    if "prompt" in row:
        return "responses", as_messages(row["prompt"])
    if isinstance(row.get("instruction"), str):
        if row.get("input"):
            raise ValueError("instruction with an input; expected all of the prompt in instruction, as in AlpacaEval")
        return "alpaca_eval", as_messages(row["instruction"])
    if "question_id" in row and "turns" in row:
        turns = row["turns"]
        if not isinstance(turns, list) or len(turns) != 1 or not isinstance(turns[0], dict):
            raise ValueError(f"turns is {turns!r:.80}; expected a list of one object, the question")
        return "arena_hard", as_messages([{"role": "user"} | turns[0]])
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
