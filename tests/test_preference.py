"""Reading, dropping, order and packing of preference pairs. Run: pytest tests/test_preference.py"""
import json
import math
import re
from collections import Counter

import numpy as np
import pytest

from data.files import Dropped
from data.preference import (PreferencePair, are_finite_numbers, as_answers, best_against_worst, content_hash,
                             encode_pair, epoch_steps, hold_out, keep_pairs, load_pairs, pack, parse_record,
                             read_kept_pairs)


class LetterChat:
    """A chat format whose ids can be read: characters; 1 begins, 2 follows every prompt turn, 3
    ends a response."""

    def encode_prompt(self, messages):
        if messages[-1]["role"] != "user":
            raise ValueError("user last")
        return [1] + [i for m in messages for i in [*map(ord, m["content"]), 2]]

    def encode_response(self, text):
        return [*map(ord, text.strip()), 3]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def load(tmp_path, *rows, max_length=100, max_prompt_length=50):
    path = tmp_path / "pairs.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines))
    return load_pairs([path], LetterChat(), max_length, max_prompt_length)


SHAPES = {
    "three strings": {"prompt": "q", "chosen": "good", "rejected": "bad"},
    "prompt string, answers in lists": {"prompt": "q", "chosen": [assistant("good")],
                                        "rejected": [assistant("bad")]},
    "prompt list": {"prompt": [user("q")], "chosen": [assistant("good")],
                    "rejected": [assistant("bad")]},
    "prompt list, answers as strings": {"prompt": [user("q")], "chosen": "good", "rejected": "bad"},
    "prompt string and in the lists": {"prompt": "q", "chosen": [user("q"), assistant("good")],
                                       "rejected": [user("q"), assistant("bad")]},
    "prompt in the lists alone": {"chosen": [user("q"), assistant("good")],
                                  "rejected": [user("q"), assistant("bad")]},
    "scored responses": {"prompt": "q", "all_generated_responses": ["so", "bad", "good"],
                         "all_rm_scores": [0.1, -2, 0.3]},
    "SimPO's published sets": {"prompt_id": "x", "prompt": "q",
                               "all_generated_responses": ["bad", "good"],
                               "all_rm_scores": [0, 1], "chosen": [user("q"), assistant("good")],
                               "rejected": [user("q"), assistant("bad")]},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_a_line_gives_the_same_pair(shape, tmp_path):
    (pair,), dropped = load(tmp_path, SHAPES[shape])
    assert pair.prompt.tolist() == [1, ord("q"), 2]
    assert pair.chosen.tolist() == [*b"good", 3] and pair.rejected.tolist() == [*b"bad", 3]
    assert pair.source == f"{tmp_path}/pairs.jsonl:1" and not dropped


def test_multi_turn_dialogues_keep_every_turn():
    turns = [{"role": "system", "content": "s"}, user(" first "), assistant("reply"),
             user("second")]
    row = {"chosen": turns + [assistant("good")], "rejected": turns + [assistant("bad")],
           "prompt": "first"}
    prompt, chosen, rejected = parse_record(row)
    # White space stays: the format strips it.
    assert [t["content"] for t in prompt] == ["s", " first ", "reply", "second"]
    assert (chosen, rejected) == ("good", "bad")


def test_drops_are_counted_by_reason_and_nothing_is_cut(tmp_path):
    fine = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    pairs, dropped = load(
        tmp_path, fine, "", fine | {"rejected": " good\n"}, fine | {"chosen": "  "},
        fine | {"rejected": ""},
        fine | {"prompt": "q" * 49}, fine | {"prompt": "q" * 48},       # 51 and 50 tokens
        # 101 and 100 tokens as a sequence
        fine | {"chosen": "a" * 97}, fine | {"rejected": "a" * 96}, fine | {"rejected": "a" * 97},
        {"prompt": "q", "all_generated_responses": ["a", "b"], "all_rm_scores": [1, 1.0]})
    assert [pair.source.rsplit(":")[-1] for pair in pairs] == ["1", "7", "9"]
    assert len(pairs[1].prompt) == 50 and len(pairs[2].rejected) == 97
    assert dropped == {"answers that differ only in white space, which the chat format strips": 1,
                       "an empty answer": 2, "prompt over max_prompt_length = 50": 1,
                       "prompt with response over max_length = 100": 2, "all scores equal": 1}


def test_of_equally_good_and_of_equally_bad_answers_the_first_is_taken():
    row = {"prompt": "q", "all_generated_responses": list("abcdefg"), "all_rm_scores": [1, 3, 0, 3.0, 2, 0, 1]}
    _, chosen, rejected = parse_record(row)
    assert (chosen, rejected) == ("b", "c")


BAD_ROWS = {
    "not valid JSON": '{"prompt": "q", "chosen": ',
    "expected a JSON object": '["q"]',
    "no field prompt": {"chosen": "good", "rejected": "bad"},
    "expected chosen and rejected, or": {"prompt": "q", "chosen": "good"},
    "turn {'role': 'user', 'content': 3}": {"prompt": [{"role": "user", "content": 3}],
                                            "chosen": "a", "rejected": "b"},
    "turn 'q'": {"prompt": ["q"], "chosen": "a", "rejected": "b"},
    "prompt is 3": {"prompt": 3, "chosen": "a", "rejected": "b"},
    "prompt is []": {"prompt": [], "chosen": "a", "rejected": "b"},
    "chosen is None": {"prompt": "q", "chosen": None, "rejected": "b"},
    "rejected is 7": {"prompt": "q", "chosen": "a", "rejected": 7},
    "chosen ends with a turn of 'user'": {"chosen": [user("q")],
                                          "rejected": [user("q"), assistant("b")]},
    "chosen and rejected differ before": {"chosen": [user("q"), assistant("a")],
                                          "rejected": [user("r"), assistant("b")]},
    "field prompt differs": {"prompt": "r", "chosen": [user("q"), assistant("a")],
                             "rejected": [user("q"), assistant("b")]},
    "user last": {"prompt": [user("q"), assistant("a")], "chosen": "a", "rejected": "b"},
    "2 responses and 3 scores": {"prompt": "q", "all_generated_responses": ["a", "b"],
                                 "all_rm_scores": [1, 2, 3]},
    "1 responses and 1 scores": {"prompt": "q", "all_generated_responses": ["a"],
                                 "all_rm_scores": [1]},
    "list of finite numbers": {"prompt": "q", "all_generated_responses": ["a", "b"],
                               "all_rm_scores": [1, "2"]},
    "all_rm_scores; expected a list of finite numbers": {
        "prompt": "q", "all_generated_responses": ["a", "b"], "all_rm_scores": [0, True]},
    "all_rm_scores[1] is NaN, which JSON does not have": {"prompt": "q",
                                                          "all_generated_responses": ["a", "b"],
                                                         "all_rm_scores": [1, math.nan]},
    "no field prompt beside all_generated_responses": {"all_generated_responses": ["a", "b"],
                                                       "all_rm_scores": [1, 2]},
    "fields ['all_generated_responses', 'prompt']; expected chosen and": {
        "prompt": "q", "all_generated_responses": ["a", "b"]},
    "fields ['all_rm_scores', 'prompt']; expected chosen and": {"prompt": "q", "all_rm_scores": [1, 2]},
    "all_generated_responses; expected a list of strings": {
        "prompt": "q", "all_generated_responses": "ab", "all_rm_scores": [1, 2]},
    "expected a list of strings": {"prompt": "q", "all_generated_responses": ["a", 1],
                                   "all_rm_scores": [1, 2]},
}


@pytest.mark.parametrize("message", BAD_ROWS)
def test_a_malformed_line_is_an_error_that_names_file_and_line(message, tmp_path):
    with pytest.raises(ValueError) as error:
        load(tmp_path, SHAPES["three strings"], BAD_ROWS[message])
    assert message in str(error.value) and f"{tmp_path}/pairs.jsonl:2: " in str(error.value)


@pytest.mark.parametrize("name", ["chosen", "rejected"])
def test_one_answer_beside_scored_ones_is_ignored(name):
    prompt, chosen, rejected = parse_record(SHAPES["scored responses"] | {name: "other"})
    assert (chosen, rejected) == ("good", "bad")


def test_only_a_list_of_finite_numbers_is_one():
    assert are_finite_numbers([1, -2.5]) is True and are_finite_numbers([]) is True
    for values in (3, None, "12", (1, 2), [1, math.inf], [math.nan, 1], [True, 1], ["1"], [None]):
        assert are_finite_numbers(values) is False


def test_text_that_is_laid_out_already_is_refused_by_default(tmp_path):
    laid_out = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    pair = SHAPES["three strings"] | {"prompt": laid_out}
    scored = SHAPES["scored responses"] | {"prompt": laid_out}
    for read in (lambda: parse_record(pair), lambda: parse_record(scored), lambda: best_against_worst(scored),
                 lambda: as_answers(scored), lambda: encode_pair(pair, "f:1", LetterChat(), 500, 500),
                 lambda: load(tmp_path, pair, max_length=500, max_prompt_length=500)):
        with pytest.raises(ValueError, match="im_start"):
            read()
    assert encode_pair(pair, "f:1", LetterChat(), 500, 500, as_it_stands=True).source == "f:1"


def test_a_prompt_is_empty_if_its_last_turn_is(tmp_path):
    turns = [user("q"), assistant("a")]
    pairs, dropped = load(tmp_path, {"prompt": " ", "chosen": "a", "rejected": "b"},
                          {"prompt": [*turns, user("\n")], "chosen": "a", "rejected": "b"},
                          {"prompt": [user(" "), *turns[1:], user("q")], "chosen": "a", "rejected": "b"})
    assert dropped == {"an empty prompt": 2} and [pair.source[-2:] for pair in pairs] == [":3"]


def test_answers_that_the_format_makes_equal_are_identical_whatever_differs(tmp_path):
    class SmallLetters(LetterChat):
        def encode_response(self, text):
            return super().encode_response(text.lower())

    row = {"prompt": "q", "chosen": "A", "rejected": "a"}
    with pytest.raises(Dropped, match="^identical answers$"):
        encode_pair(row, "f:1", SmallLetters(), 10, 10)


def test_large_data_say_how_far_they_are_and_are_read_in_this_process(tmp_path, capsys):
    class Counting(LetterChat):
        prompts = 0

        def encode_prompt(self, messages):
            self.prompts += 1
            return super().encode_prompt(messages)

    (tmp_path / "pairs.jsonl").write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n' * 10_001)
    chat = Counting()
    assert len(load_pairs([tmp_path / "pairs.jsonl"], chat, 10, 10)[0]) == chat.prompts == 10_001
    assert re.fullmatch(r"data +10000 pairs tokenised in \d{1,3} s\n", capsys.readouterr().out)


def test_data_that_is_empty_after_drops_says_what_was_dropped(tmp_path):
    with pytest.raises(ValueError, match="pairs.jsonl: no pairs left to use "
                                         ".*1 identical answers; 1 an empty answer"):
        load(tmp_path, {"prompt": "q", "chosen": "a", "rejected": "a"},
             {"prompt": "q", "chosen": "", "rejected": "a"})
    with pytest.raises(ValueError, match="the files are empty"):
        load(tmp_path)
    with pytest.raises(ValueError, match="absent.jsonl: cannot be read"):
        load_pairs([tmp_path / "absent.jsonl"], LetterChat(), 10, 10)
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(ValueError, match="latin.jsonl:1: cannot be read as UTF-8"):
        load_pairs([tmp_path / "latin.jsonl"], LetterChat(), 10, 10)


def test_many_workers_and_what_is_kept_give_the_same_pairs(tmp_path, capsys):
    rows = [{"prompt": f"question {i}", "chosen": f"good {i}" * (i % 5 + 1),
             "rejected": "bad" if i % 7 else f"good {i}"}
            for i in range(1000)]
    rows += [{"prompt": "q", "chosen": "a", "rejected": "a"}] * 3
    for name, part in (("a.jsonl", rows[:600]), ("b: c.jsonl", rows[600:])):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    files = [tmp_path / "a.jsonl", tmp_path / "b: c.jsonl"]
    alone, dropped = load_pairs(files, LetterChat(), 100, 50)
    many, dropped_by_many = load_pairs(files, LetterChat(), 100, 50, workers=3)
    keep_pairs(tmp_path / "kept" / "x.safetensors", many, dropped_by_many)
    kept, dropped_kept = read_kept_pairs(tmp_path / "kept" / "x.safetensors")
    assert dropped == dropped_by_many == dropped_kept
    assert dropped["identical answers"] == 3 + 29       # every 35th
    for pairs in (many, kept):
        assert [p.source for p in pairs] == [p.source for p in alone]
        for p, q in zip(pairs, alone):
            for name in ("prompt", "chosen", "rejected"):
                assert np.array_equal(getattr(p, name), getattr(q, name))
            assert p.prompt.dtype == np.int32
    (tmp_path / "a.jsonl").write_text((tmp_path / "a.jsonl").read_text() + "{\n")
    with pytest.raises(ValueError, match="a.jsonl:601: not valid JSON"):
        load_pairs(files, LetterChat(), 100, 50, workers=3)


def test_the_hash_of_data_depends_on_its_content_and_what_is_done_with_it(tmp_path):
    for name, text in (("a", "xy"), ("b", "xy"), ("c", "xz")):
        (tmp_path / name).write_text(text)
    hashes = [content_hash([tmp_path / name], *others) for name, others in (
        ("a", ()), ("b", ()), ("c", ()), ("a", (1,)), ("a", ("1",)))]
    assert hashes[0] == hashes[1] and len(set(hashes)) == 4


def make_pairs(lengths):
    """Pairs of the given (prompt, chosen, rejected) lengths; all tokens of a job are different."""
    n, pairs = 0, []
    for k, (P, C, R) in enumerate(lengths):
        ids = np.arange(n, n + P + C + R)
        pairs.append(PreferencePair(ids[:P], ids[P:P + C], ids[P + C:], f"f:{k}"))
        n += P + C + R
    return pairs


def test_packing_keeps_every_token_once_and_respects_the_budget():
    pairs = make_pairs([(3 + i % 7, 1 + i * 5 % 11, 1 + i * 3 % 13) for i in range(50)])
    for budget in (max(map(len, pairs)), 64, 200, 10**6):
        rows = pack(pairs, budget)
        assert max(len(row.tokens) for row in rows) <= budget
        packed_sources = sorted(p.source for row in rows for p in row.pairs)
        assert packed_sources == sorted(p.source for p in pairs)
        for row in rows:
            expected = [t for p in row.pairs for t in [*p.prompt, *p.chosen, *p.rejected]]
            assert row.tokens.tolist() == expected
            assert row.lengths == [(len(p.prompt), len(p.chosen), len(p.rejected))
                                   for p in row.pairs]
    assert len(pack(pairs, 10**6)) == 1


def test_packed_rows_are_of_near_equal_work():
    pairs = make_pairs([(10 + i * 37 % 90, 1 + i * 53 % 200, 1 + i * 71 % 200) for i in range(64)])
    loads = [len(row.tokens) for row in pack(pairs, 3000)]
    assert len(loads) == math.ceil(sum(map(len, pairs)) / 3000)      # as few rows as can hold them
    in_file_order = [sum(map(len, pairs[i::len(loads)])) for i in range(len(loads))]
    spread = lambda loads: (max(loads) - min(loads)) / max(loads)
    assert spread(loads) < 0.05 and spread(in_file_order) > 0.1


def test_rows_are_as_few_as_the_rule_allows_for_any_number_of_ranks():
    pairs = make_pairs([(2, 2, 2)] * 3)
    assert [len(row.tokens) for row in pack(pairs, 10)] == [6, 6, 6]        # 18 tokens, but no two pairs fit a row
    assert [len(row.indices) for row in pack(pairs, 12, ranks=2)] == [2, 1]
    # Where there are hundreds of rows, they are added by the hundredth: 200, 202, ... 300, 303.
    rows = pack(make_pairs([(2, 2, 2)] * 301), 10)
    assert len(rows) == 303 and sum(len(row.indices) == 1 for row in rows) == 301


def test_a_row_left_over_holds_the_shortest_pair_without_an_index():
    pairs = make_pairs([(3, 3, 3), (4, 4, 4), (1, 2, 1), (5, 5, 5)])
    rows = pack(pairs, 100, ranks=5)
    assert [row.indices for row in rows] == [[3], [1], [0], [2], []]
    assert rows[4].pairs == [pairs[2]] and rows[4].lengths == [(1, 2, 1)] and len(rows[4].tokens) == 4


def test_a_pair_over_the_budget_is_named():
    with pytest.raises(ValueError, match=r"f:1: the pair has 60 tokens, more than "
                                         r"tokens_per_micro_batch = 59"):
        pack(make_pairs([(1, 2, 3), (10, 20, 30)]), 59)


def test_the_order_is_a_function_of_seed_and_epoch_alone():
    steps = epoch_steps(100, 32, seed=3, epoch=1)
    assert [len(step) for step in steps] == [32, 32, 32, 4]
    assert sorted(i for step in steps for i in step) == list(range(100))
    assert steps == epoch_steps(100, 32, seed=3, epoch=1)
    assert steps != epoch_steps(100, 32, seed=3, epoch=2)
    assert steps != epoch_steps(100, 32, seed=4, epoch=1)
    flat = lambda steps: [i for step in steps for i in step]
    assert flat(steps) == flat(epoch_steps(100, 7, seed=3, epoch=1))


def test_the_order_is_numpys_permutation_of_seed_and_epoch_which_are_no_sum():
    (order,) = epoch_steps(100, 100, seed=3, epoch=1)
    assert order == np.random.default_rng([3, 1]).permutation(100).tolist()
    assert epoch_steps(100, 100, seed=2, epoch=2) != [order] != epoch_steps(100, 100, seed=1, epoch=3)


def test_held_out_pairs_are_drawn_by_seed_and_none_is_in_both_parts():
    pairs = make_pairs([(1, 1, 1)] * 20)
    train, held_out = hold_out(pairs, 5, seed=1)
    assert len(held_out) == 5
    assert sorted(p.source for p in train + held_out) == sorted(p.source for p in pairs)
    sources = lambda pairs: [p.source for p in pairs]
    assert [*map(sources, hold_out(pairs, 5, seed=1))] == [sources(train), sources(held_out)]
    assert sources(held_out) != sources(hold_out(pairs, 5, seed=2)[1])
    assert [*map(sources, hold_out(pairs, 0, seed=1))] == [sources(pairs), []]
    for n in (20, -1):
        with pytest.raises(ValueError, match=f"^cannot hold out {n} of 20 pairs$"):
            hold_out(pairs, n, seed=1)


def test_where_prompts_are_unique_the_first_of_the_seeded_order_are_held_out():
    pairs = make_pairs([(2, 1, 1)] * 50)
    for n in (1, 7, 49):
        expected = sorted(np.random.default_rng(3).permutation(50)[:n].tolist())
        assert [int(p.source[2:]) for p in hold_out(pairs, n, seed=3)[1]] == expected


def test_pairs_of_one_prompt_are_held_out_together_or_not_at_all():
    sizes = [1, 5, 2, 3, 1, 4, 2, 2]
    pairs = [PreferencePair(np.array([prompt]), np.array([1]), np.array([2]), f"f:{prompt}-{i}")
             for prompt, size in enumerate(sizes) for i in range(size)]
    prompts = lambda pairs: [p.prompt.item() for p in pairs]
    drawn = set()
    for n in range(1, len(pairs)):
        for seed in range(20):
            train, held_out = hold_out(pairs, n, seed)
            assert not set(prompts(train)) & set(prompts(held_out))
            assert len(train) + len(held_out) == len(pairs)
            assert train and 0 < len(held_out) <= n
            # Fewer than n are held out only if every prompt that is left has more pairs than are
            # missing.
            assert all(sizes[prompt] > n - len(held_out) for prompt in set(prompts(train)))
            drawn |= set(prompts(held_out)) if n == 5 else set()
    assert drawn == set(range(8))
    with pytest.raises(ValueError, match="cannot hold out 1 of 4 pairs: every prompt has more"):
        hold_out(pairs[1:3] * 2, 1, seed=0)


def test_pairs_of_arrays_and_lines_are_kept_with_their_places(tmp_path):
    ids = np.array([1, 2], dtype=np.int32)
    sources = ["a 7.json: item 1", "a 7.json: item 22", "b: 3.jsonl:4", "a 7.json: item 3"]
    pairs = [PreferencePair(ids, ids, ids, source) for source in sources]
    keep_pairs(tmp_path / "x.safetensors", pairs, Counter())
    assert [pair.source for pair in read_kept_pairs(tmp_path / "x.safetensors")[0]] == sources


def test_a_damaged_file_of_kept_pairs_is_an_error_that_names_it(tmp_path):
    ids = np.array([1, 2], dtype=np.int32)
    pairs = [PreferencePair(ids, ids, ids, "a.jsonl:1")]
    keep_pairs(tmp_path / "x.safetensors", pairs, Counter())
    whole = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="x.safetensors: damaged .*delete it"):
        read_kept_pairs(tmp_path / "x.safetensors")


def test_history_beside_dialogues_is_refused():
    row = {"prompt": "u", "history": [["a", "b"]], "chosen": [user("u"), assistant("a")],
           "rejected": [user("u"), assistant("b")]}
    with pytest.raises(ValueError, match="history beside dialogues"):
        parse_record(row)
