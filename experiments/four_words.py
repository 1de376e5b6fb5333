"""A task that anybody can check: one sentence of 8 to 20 words that uses four given words.

    python -m experiments.four_words --prompts 587 --seed 0 --output runs/prompts.jsonl

writes prompts, and `score` is their judge. A stand-in for prompts of users and a reward model, that
needs nothing but a model: SmolLM2-135M-Instruct does it by half, and what it has to learn depends
on the prompt. It says nothing about whether a sentence makes sense.
"""
import argparse
import random
import re

from command import run_command
from data.files import check_output, write_records

# Their plurals end in s.
NOUNS = """
    basket blanket bottle bridge camera candle copper desert doctor engine forest garden hammer
    harbor island kitchen ladder lantern letter market mirror museum orchard painter pencil
    pepper rabbit river sailor shadow station teacher thunder ticket tunnel village violin wagon
    window winter
    """.split()
GIVEN = 4
LEAST, MOST = 8, 20                                 # words of an answer
ENDS = (".", "!", "?", '."', '!"', '?"')


def prompt(rng):
    words = ", ".join(rng.sample(NOUNS, GIVEN))
    return f"Write one sentence of at most {MOST} words that uses all of these words: {words}."


def score(messages, answer):
    """0 to 100: the share of the words that the last turn of messages gives, after its colon, which
    the answer has, as they are or in the plural. Half of that for an answer of fewer than 8 words
    or more than 20, and half for one of several lines, or without an end."""
    given = messages[-1]["content"].rsplit(":", 1)[1].strip(" .").split(", ")
    answer = answer.strip()
    found = set(re.findall("[a-z]+", answer.lower()))
    points = 100 * sum(word in found or word + "s" in found for word in given) / len(given)
    if not LEAST <= len(answer.split()) <= MOST:
        points /= 2
    if "\n" in answer or not answer.endswith(ENDS):
        points /= 2
    return points


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, required=True, help="how many")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--output", required=True, help="JSON Lines of prompts")
    args = parser.parse_args(argv)
    check_output(args.output)
    rng = random.Random(args.seed)
    write_records(args.output, [{"prompt": prompt(rng)} for _ in range(args.prompts)])


if __name__ == "__main__":
    run_command(main)
