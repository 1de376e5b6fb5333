"""A judge that anybody can check: how close is an answer to one plain paragraph of 40 words that comes to its end?

A stand-in for a reward model, to show the loop working: it says nothing about whether an answer is right.
"""
WORDS = 40


def score(messages, answer):
    """0 to 100: full marks for 40 words, less by the factor between (20 or 80 words: 50); half of that for a list, headings
    or several paragraphs, and half for an answer that does not end in a full stop, question or exclamation mark."""
    answer = answer.strip()
    n = len(answer.split())
    points = 100.0 * min(n / WORDS, WORDS / n) if n else 0.0
    points /= 1 if "\n" not in answer else 2
    return points if answer.endswith((".", "!", "?", '."', ".'", ".)")) else points / 2
