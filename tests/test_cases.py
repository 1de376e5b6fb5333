"""Small files as people bring them, through every command that reads such files: train.py, generate.py, score.py and
data/pairs.py. None of them leaves half a file under its final name.

    pytest tests/test_cases.py
"""
import dataclasses
import gzip
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import generate
import score
import train
from data import pairs
from data.files import read_jsonl
from data.preference import load_pairs
from test_preference import LetterChat
from tokenizer import load_chat

TINY = Path(train.__file__).parent / "data/tiny/model"
PAIRS = [{"prompt": f"Sort these words: owl, moss {i}", "chosen": f"moss {i}, owl.", "rejected": "owl"}
         for i in range(12)]
PROMPTS = [{"prompt": row["prompt"], "id": i} for i, row in enumerate(PAIRS)]
ANSWERS = [row | {"all_generated_responses": ["moss, owl.", f"owl {i}"]} for i, row in enumerate(PROMPTS)]
SCORED = [row | {"all_rm_scores": [i + 1.5, i]} for i, row in enumerate(ANSWERS)]
COMMANDS = {"train": PAIRS, "generate": PROMPTS, "score": ANSWERS, "pairs": SCORED}      # and what each reads


@pytest.fixture
def run(tmp_path):
    """run(command, file, *flags): the rows that come out; of train.py the pairs that it would train on."""
    (tmp_path / "judge.py").write_text("def length(turns, answer):\n    return len(turns[0]['content'] + answer)\n")
    output = tmp_path / "out.jsonl"

    def run(command, path, *flags):
        path = str(path)
        if command == "train":
            config = train.parse_config(["--model", str(TINY), "--data", path, "--max_length", "500", *flags])
            found, run.dropped = train.tokenised_pairs(config, config.data, load_chat(TINY))
            return found
        if command == "generate":
            generate.main(["--model", str(TINY), "--prompts", path, "--output", str(output),
                           "--max_new_tokens", "3", *flags])
        elif command == "score":
            score.main(["--input", path, "--output", str(output), "--judge", f"{tmp_path}/judge.py:length", *flags])
        else:
            pairs.main(["--input", path, "--output", str(output), *flags])
        return [row for _, row in read_jsonl(output)]

    run.output = output
    return run


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("form", ["byte-order mark", "array", "indented array", "gzip", "Windows"])
def test_every_command_reads_every_form(command, form, run, tmp_path):
    rows = COMMANDS[command]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    content = {"byte-order mark": b"\xef\xbb\xbf" + lines.encode(), "array": json.dumps(rows).encode(),
               "indented array": json.dumps(rows, indent=1).encode(), "gzip": gzip.compress(lines.encode()),
               "Windows": lines.replace("\n", "\r\n").encode()}[form]
    (tmp_path / "rows").write_bytes(content)
    assert len(run(command, tmp_path / "rows")) == 12


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("content, message", [
    (lambda text: text.encode("utf-16"), "rows: UTF-16 text"),
    (lambda text: "\n".join(json.dumps(json.loads(line), indent=1) for line in text.splitlines()).encode(),
     "rows: JSON objects that are indented over several lines")], ids=["UTF-16", "indented objects"])
def test_every_command_refuses_another_form_as_what_it_is(command, content, message, run, tmp_path):
    (tmp_path / "rows").write_bytes(content("".join(json.dumps(row) + "\n" for row in COMMANDS[command])))
    with pytest.raises(ValueError, match=message):
        run(command, tmp_path / "rows", "--skip_bad_lines")
    assert not run.output.exists()


HALF = '{"note": "cut \\ud83d", '
BAD = {"half a surrogate pair": (lambda row: HALF + json.dumps(row)[1:], "note holds half a surrogate pair"),
       "NaN": (lambda row: json.dumps(row | {"n": float("nan")}), "n is NaN"),
       "broken": (lambda row: json.dumps(row)[:-1], "not valid JSON"),
       "laid out": (lambda row: row | {"prompt": "\n\nHuman: q\n\nAssistant:"},
                    "laid out already as a dialogue of Human"),
       "templated": (lambda row: row | {"prompt": "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"},
                     "as ChatML"),
       "tools": (lambda row: row | {"tools": [{"type": "function"}]}, "the row has tools")}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", BAD)
def test_every_command_tells_all_bad_lines_or_drops_and_counts_them(command, kind, run, tmp_path, capsys):
    spoil, message = BAD[kind]
    rows = [spoil(row) if i in (3, 7) else row for i, row in enumerate(COMMANDS[command])]
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError) as error:
        run(command, path)
    told = str(error.value).splitlines()
    assert told[0] == "2 bad lines:" and told[3].endswith("--skip_bad_lines")
    for line, number in zip(told[1:3], (4, 8)):
        assert line.startswith(f"  {path}:{number}: ") and message in line
    assert not run.output.exists()

    assert len(run(command, path, "--skip_bad_lines")) == 10
    if command == "train":
        assert [*run.dropped.items()] == [(f"bad lines, the first {told[1].strip()}", 2)]
    else:
        assert f"2 dropped: bad lines, the first {path}:4: " in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_one_flag_takes_laid_out_prompts_as_they_stand(command, run, tmp_path):
    rows = [row | {"prompt": f"\n\nHuman: q {i}\n\nAssistant:"} for i, row in enumerate(COMMANDS[command])]
    found = run(command, write(tmp_path / "rows.jsonl", rows), "--as_it_stands")
    assert len(found) == 12
    if command != "train":
        assert [row["prompt"] for row in found] == [row["prompt"] for row in rows]


def test_a_system_column_is_seen_by_every_command(run, tmp_path):
    judged = {}
    for command, rows in COMMANDS.items():
        with_system = [row | {"system": "Be brief." if i == 0 else ""} for i, row in enumerate(rows)]
        judged[command] = run(command, write(tmp_path / "rows.jsonl", with_system))
        run.output.unlink(missing_ok=True)
    tokenizer = load_chat(TINY).tokenizer
    texts = [tokenizer.decode(pair.prompt.tolist()) for pair in judged["train"][:2]]
    assert texts[0].startswith(" Be brief.") and not texts[1].startswith(" Be brief.")     # the template's space
    assert judged["generate"][0]["system"] == "Be brief."                   # for the next command
    assert judged["score"][0]["all_rm_scores"] == [len("Be brief.moss, owl."), len("Be brief.owl 0")]
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPTS[0]["prompt"]}]
    assert judged["pairs"][0]["prompt"] == turns and judged["pairs"][1]["prompt"] == PROMPTS[1]["prompt"]


def test_an_empty_prompt_is_dropped_and_counted(run, tmp_path, capsys):
    empty = [row | {"prompt": " \n" if i == 3 else row["prompt"]} for i, row in enumerate(PAIRS)]
    assert len(run("train", write(tmp_path / "rows.jsonl", empty))) == 11 and run.dropped == {"an empty prompt": 1}
    empty = [row | {"prompt": "" if i == 3 else row["prompt"]} for i, row in enumerate(PROMPTS)]
    assert [row["id"] for row in run("generate", write(tmp_path / "rows.jsonl", empty))] == [0, 1, 2, *range(4, 12)]
    assert "1 dropped: an empty prompt" in capsys.readouterr().out


def test_prompts_too_long_to_answer_are_told_before_anything_is_answered(run, tmp_path, capsys):
    rows = [row | {"prompt": "word " * 600} if row["id"] in (3, 5) else row for row in PROMPTS]
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=r"2 bad lines:\n  .*rows.jsonl:4: the prompt has \d+ tokens; expected, with "
                                         r"max_new_tokens = 3, at most the 512 positions.*\n  .*rows.jsonl:6: "):
        run("generate", path)
    assert not list(tmp_path.glob("out*"))
    assert [row["id"] for row in run("generate", path, "--skip_bad_lines")] == [0, 1, 2, 4, *range(6, 12)]
    assert "2 dropped: bad lines, the first" in capsys.readouterr().out


def test_answers_too_long_to_score_are_told_before_anything_is_scored(run, tmp_path, capsys):
    shutil.copytree(TINY, tmp_path / "reward")
    tensors = load_file(TINY / "model.safetensors")
    tensors = ({name: w for name, w in tensors.items() if name != "lm_head.weight"}
               | {"score.weight": torch.ones(1, 128)})
    save_file(tensors, tmp_path / "reward/model.safetensors", metadata={"format": "pt"})
    rows = [row | {"all_generated_responses": ["yes", "word " * 600]} if row["id"] in (3, 5) else row
            for row in ANSWERS]
    path, flags = write(tmp_path / "rows.jsonl", rows), ("--reward_model", str(tmp_path / "reward"))
    with pytest.raises(ValueError, match=r"2 bad lines:\n  .*rows.jsonl:4: prompt and answer 2 have \d+ tokens, more "
                                         r"than the 512 positions of .*\n  .*rows.jsonl:6: "):
        run("score", path, *flags)
    assert not list(tmp_path.glob("out*"))
    assert [row["id"] for row in run("score", path, *flags, "--skip_bad_lines")] == [0, 1, 2, 4, *range(6, 12)]
    assert "2 dropped: bad lines, the first" in capsys.readouterr().out


class ChatThatStripsNothing(LetterChat):
    def encode_response(self, text):
        return [*map(ord, text), 3]


def test_answers_that_differ_in_indentation_alone_are_not_identical(tmp_path):
    path = write(tmp_path / "code.jsonl", [{"prompt": f"Complete {i}", "chosen": f"    return {i}\n\n",
                                            "rejected": f"return {i}"} for i in range(3)])
    kept, dropped = load_pairs([path], ChatThatStripsNothing(), 100, 100)
    assert len(kept) == 3 and kept[0].chosen.tolist() == [*b"    return 0\n\n", 3] and not dropped
    with pytest.raises(ValueError, match="no pairs left to use .3 answers that differ only in white space, "
                                         "which the chat "):
        load_pairs([path], LetterChat(), 100, 100)


def test_prompts_that_repeat_never_stand_on_both_sides(tmp_path, capsys):
    rows = [row | {"chosen": f"{row['chosen']} {n}"} for row in PAIRS for n in range(3)]
    config = train.parse_config(["--model", str(TINY), "--data", str(write(tmp_path / "rows.jsonl", rows)),
                                 "--eval_pairs", "7", "--max_steps", "1", "--pairs_per_step", "2",
                                 "--output", str(tmp_path / "out")])
    train.main(dataclasses.replace(config, cache=""))
    shown = capsys.readouterr().out
    assert "6 pairs are held out, not 7: pairs of one prompt stay together" in shown
    assert "30 pairs to train on, 6 held out" in shown


def test_train_prints_what_it_dropped(tmp_path, capsys):
    rows = [row | {"rejected": None} if i == 3 else row for i, row in enumerate(PAIRS)]
    argv = ["--model", str(TINY), "--data", str(write(tmp_path / "rows.jsonl", rows)), "--skip_bad_lines",
            "--max_steps", "1", "--pairs_per_step", "2", "--output", str(tmp_path / "out")]
    train.main(train.parse_config(argv))
    assert (f"1 dropped: bad lines, the first {tmp_path}/rows.jsonl:4: rejected is None; expected"
            in capsys.readouterr().out)
