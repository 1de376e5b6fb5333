"""Judges: Python functions that score an answer, called with (prompt turns, answer).

    score = load_judge("data/tiny/judge.py:score")
    judge = Judge(score, "prompts.jsonl", chat, max_new_tokens=512)
    answers, scores, failure = judge(model, noted)

A Judge shows during training whether sampled answers to held-out prompts get better, and not just
the loss. score.py scores files of answers with the same functions.
"""
import math
import traceback
import types
from collections import Counter
from contextlib import chdir, suppress
from pathlib import Path

from data.files import is_finite_number, read_jsonl, write_records
from data.prompts import read_prompts
from distributed import Stop, forget_gathered_weights, from_rank_0, leave_if, say
from sampler import answer

# The same at every evaluation and in every run, so that scores can be compared.
SAMPLING = {"temperature": 0.8, "top_p": 0.95, "batch_size": 64}


def load_judge(name):
    """The function that FILE.py:FUNCTION names. ValueError if there is none."""
    file, _, function = name.rpartition(":")
    if not file.endswith(".py") or not Path(file).is_file():
        raise ValueError(f"judge = {name!r}; expected a Python file and a function in it, "
                         "FILE.py:FUNCTION")
    # Run from its text: Python's cache of compiled files may hold another one of the same second.
    # Not named "judge", because this module is.
    module = types.ModuleType("judge_of_a_run")
    module.__file__ = file
    try:
        exec(compile(Path(file).read_bytes(), file, "exec"), vars(module))
    # A file that calls sys.exit would end the command in silence.
    except (Exception, SystemExit) as e:
        raise ValueError(f"judge = {name!r}: {file} cannot be loaded, it failed with "
                         f"{type(e).__name__}: {e}{_line_in(file, e)}") from e
    if not callable(getattr(module, function, None)):
        raise ValueError(f"judge = {name!r}: {file} has no function {function}")
    return getattr(module, function)


def _line_in(file, error):
    """ " (FILE.py, line N)" of the last line of a file that an error passed through, if any."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
             if frame.filename == file]
    return f" ({file}, line {lines[-1]})" if lines else ""      # a SyntaxError says it itself


def ask(judge, turns, answer):
    """The score that a judge gives an answer, a finite float. ValueError tells what else it gave,
    RuntimeError that it failed; the error of the judge itself is its cause."""
    try:
        # Copies: a judge that changes its turns changes no other's. One that changes the working
        # directory does not take it from the paths of a run.
        with chdir("."):
            score = judge([dict(turn) for turn in turns], answer)
    except (Stop, KeyboardInterrupt):
        raise
    # A panic in a library written in Rust, sys.exit and asyncio's CancelledError are no Exceptions.
    except BaseException as e:
        raise RuntimeError(f"failed with {type(e).__name__}: {e}") from e
    # Scalars of numpy and torch are numbers too, the text of a number is none. An object may raise
    # anything, and Python does not spell whole numbers of more than 4,300 digits.
    found = f"an object of {type(score).__name__}"
    number = math.nan
    with suppress(Exception):
        found = f"{score!r:.40}"
    with suppress(Exception):
        if hasattr(score, "__float__") and not isinstance(score, bool):
            number = float(score)
    if not math.isfinite(number):
        raise ValueError(f"gave {found}; expected a finite number")
    return number


class Judge:
    """Samples an answer to each of N held-out prompts and scores it.

    function: called with (prompt turns, answer), returns a number. prompts_file: a file of records
    with the field `prompt`. chat: the model's chat format. ValueError names the bad lines. All
    ranks must construct and call it together.
    """

    def __init__(self, function, prompts_file, chat, *, max_new_tokens, seed=0,
                 as_it_stands=False, skip_bad_lines=False):
        self.function = function
        self.chat = chat
        self.max_new_tokens = max_new_tokens
        self.seed = seed        # every call draws the same random numbers

        def encodable(turns):
            # What the chat format refuses makes a bad line now, not after an hour of training.
            chat.encode_prompt(turns)
            return turns

        # Prompts of AlpacaEval or Arena-Hard have no field prompt, and judges of their own.
        dropped = Counter()
        _, records, self.turns = read_prompts(
            prompts_file, encodable, dropped, skip_bad_lines, as_it_stands,
            required_field="prompt")
        self.prompts = [record["prompt"] for record in records]      # as they stand in the file
        for reason, n in dropped.most_common():
            say(f"judge    {prompts_file}: {n} dropped: {reason}")

    def __call__(self, model, noted):
        """(answers, scores, failure) of the model as it is now: N texts, N floats, and in words the
        first failure of the judge, None without one. An answer that got no score has NaN: training
        is not to end with a judge's mistake. Raises Stop on all ranks after a signal (noted is of
        noted_signals)."""
        # The ranks of a sharded model sample the same answers together.
        try:
            samples = answer(model, self.chat, self.turns, seed=self.seed,
                             max_new_tokens=self.max_new_tokens,
                             progress=lambda *_: leave_if(noted), **SAMPLING)
        finally:
            forget_gathered_weights(model)
        answers = [texts[0] for texts in samples]       # one sample a prompt

        def score():
            scores = []
            failure = None
            try:
                for number, (turns, text) in enumerate(zip(self.turns, answers), 1):
                    try:
                        with noted.stop_at_once():
                            scores.append(ask(self.function, turns, text))
                    except (ValueError, RuntimeError) as e:
                        scores.append(math.nan)
                        failure = failure or f"answer {number}: it {e}"
            except Stop:
                pass        # all ranks leave below
            return scores, failure

        # One rank asks: a judge may cost money, and need not give the same score twice.
        scores, failure = from_rank_0(score)
        leave_if(noted)
        return answers, scores, failure

    def keep(self, output, step, answers, scores):
        """Writes answers-NNNNNN.jsonl to the run folder, if it can. Rank 0 only."""
        records = []
        for prompt, text, score in zip(self.prompts, answers, scores):
            if not math.isfinite(score):
                score = None        # JSON has no NaN
            records.append({"prompt": prompt, "answer": text, "score": score})
        try:
            write_records(answers_file(output, step), records)
        except OSError as e:
            say(f"note     {e}; the answers of this step are not kept")

    def show_change(self, output, answers, scores):
        """Prints how answers and their scores differ from those of step 0. Rank 0 only."""
        file = answers_file(output, 0)
        if not file.exists():
            return              # the judge came with --resume
        try:
            before = [record for _, record in read_jsonl(file)]
        except (ValueError, OSError) as e:
            say(f"note     {e}; there is nothing to compare with")
            return
        if [record.get("prompt") for record in before] != self.prompts:
            say("         step 0 was judged by other prompts; there is nothing to compare with")
            return

        # 1. How many answers score higher, how many lower. An answer that is the same may score
        # otherwise too, by a judge that is not deterministic: that shows nothing.
        changed = []
        n_higher = 0
        n_lower = 0
        for old, answer, score in zip(before, answers, scores):
            has_scores = is_finite_number(old.get("score")) and math.isfinite(score)
            if has_scores and old.get("answer") != answer:
                changed.append((old, answer, score))
                n_higher += score > old["score"]
                n_lower += score < old["score"]
        say(f"         {n_higher} answers score higher than at step 0, {n_lower} lower; the first "
            "four that changed:")

        # 2. What some of them say.
        for old, answer, score in changed[:4]:
            say(f"         {old['prompt']}",
                f"           before: {old.get('answer')}   ({old['score']:.0f})",
                f"           after:  {answer}   ({score:.0f})")


def answers_file(output, step):
    """The file of a run folder with the judged answers of a step."""
    return output / f"answers-{step:06d}.jsonl"
