"""A judge that anybody can check: how close is an answer to one plain paragraph of 40 words that
comes to its end?

A stand-in for a reward model, to show the loop working. It says nothing about whether an answer is
right.
"""
WORDS = 40
ENDS = (".", "!", "?", '."', ".'", ".)")


def score(messages, answer):
    """0 to 100: full marks for 40 words, less by the factor between (20 or 80 words: 50). Half of
    that for a list, headings or several paragraphs, and half for an answer that does not end in a
    full stop, question mark or exclamation mark."""
    answer = answer.strip()
    n = len(answer.split())
    if n == 0:
        return 0.0
    points = 100.0 * min(n / WORDS, WORDS / n)
    if "\n" in answer:
        points /= 2
    if not answer.endswith(ENDS):
        points /= 2
    return points
