"""The judge of the tiny task: how well an answer puts the words of the prompt into order."""


def score(messages, answer):
    """0 to 100: the share of places that hold the right word. Words too many or too few count as
    wrong places. messages are the turns of the prompt, whose words follow its last colon."""
    words = messages[-1]["content"].rsplit(":", 1)[1]
    expected = sorted(_split(words))
    found = _split(answer)
    right = sum(a == b for a, b in zip(found, expected))
    return 100 * right / max(len(found), len(expected))


def _split(text):
    return [word.strip() for word in text.strip().rstrip(".").split(",")]
