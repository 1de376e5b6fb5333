"""Mutation testing: how many small changes of the method's code do its tests notice?

    make mutants                                            # every mutant
    make mutants ARGS="--file alphapo.py --sample 50"       # 50 of one file, drawn by --seed

A mutant is the code with one change by a standard operator: `<` to `<=`, `+` to `-`, a statement left out ... It is
killed if a test fails, and survives if all tests pass that run its line. A survivor is a missing test, or a change that
changes nothing: mutants_accepted.txt lists those that were looked at, with reasons. Exit status 1 if less than 95 % are
killed, those that are listed as equivalent left out. Needs git and Linux.
"""
import argparse
import ast
import functools
import gc
import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}      # a forked child has no threads of its parent

import pytest

ROOT = Path(__file__).resolve().parent.parent
LEAST = 0.95            # the share that must be killed
CPU_LIMIT = 6           # seconds for a mutant, and four times what its tests took
WALL_LIMIT = 300        # for one that waits

# {file: (its tests, -k of those that are quick, the functions to mutate or None for all, the line at which to stop)}
TARGETS = {
    "alphapo.py": ("test_alphapo.py", "not copied_alone", None, None),
    "data/preference.py": ("test_preference.py", "not many_workers", None, "# --- a cache"),
    "model.py": (
        "test_model.py", "not cpu and not blocked and not error and (golden_values or equal_transformers or "
        "packing or recompute or bf16 or attention or logps or logits or blocks or head or retained or any_size or "
        "both_spellings)", None, "# --- Hugging Face"),
    "train.py": (
        "test_train.py", "step or packing or scoring or alpha_zero or dpo_starts or rate or warm_up or decayed or "
        "logs or no_tensor or rank or work or metrics or without_a_loss or gathered or reference or signal or half", {
            "pair_loss", "run_row", "head_and_loss", "run_rows", "train_step", "learning_rate", "make_optimizer",
            "score_pairs", "reference_logps", "metrics_of", "step_metrics", "work_of"}, None),
}


# --- the mutants ----------------------------------------------------------------------------------------------------

OPERATORS = {
    "<": ["<=", ">="], "<=": ["<", ">"], ">": [">=", "<="], ">=": [">", "<"], "==": ["!="], "!=": ["=="],
    "is not": ["is"], "is": ["is not"], "not in": ["in"], "in": ["not in"], "and": ["or"], "or": ["and"],
    "+": ["-"], "-": ["+"], "*": ["/"], "/": ["*"], "//": ["/"], "%": ["*"], "**": ["*"], "&": ["|"], "|": ["&"],
    "+=": ["-=", "="], "-=": ["+=", "="], "|=": ["="]}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}
ATTRIBUTES = NAMES | {
    "amin": "amax", "amax": "amin", "ceil": "floor", "floor": "ceil", "cos": "sin", "sin": "cos", "exp": "expm1",
    "expm1": "exp", "zeros": "ones", "zeros_like": "ones_like", "mean": "sum", "sum": "mean",
    "double": "float", "float64": "float32"}


@dataclass(frozen=True)
class Mutant:
    file: str
    lines: range        # of the statement, or of its head
    start: int          # text[start:end] becomes `new`
    end: int
    new: str

    def source(self, text):
        return text[:self.start] + self.new + text[self.end:]

    def change(self, text):
        """The changed lines as a diff. The same wherever they stand in the file."""
        begin, end = text.rfind("\n", 0, self.start) + 1, text.find("\n", self.end)
        before, after = text[begin:end], text[begin:self.start] + self.new + text[self.end:end]
        return f"- {' '.join(before.split())}\n+ {' '.join(after.split())}"


def mutants_of(file):
    """The mutants of a file, in the order of the places that they change."""
    text = (ROOT / file).read_text(encoding="utf-8")
    _, _, functions, stop = TARGETS[file]
    last = text[:text.index(stop)].count("\n") if stop else len(text)
    found = {}
    for top in ast.parse(text).body:
        if top.lineno > last or functions and getattr(top, "name", None) not in functions:
            continue
        for statement in (node for node in ast.walk(top) if isinstance(node, ast.stmt)):
            body = getattr(statement, "body", None)
            end = max(statement.lineno, body[0].lineno - 1) if body else statement.end_lineno
            lines = range(statement.lineno, end + 1)
            for change in [*of_statement(statement, top, text), *of_expressions(statement, text)]:
                mutant = Mutant(file, lines, *change)
                if is_a_program(mutant, text):
                    found[change] = mutant
    return [found[change] for change in sorted(found)]


def is_a_program(mutant, text):
    try:
        ast.parse(mutant.source(text))
    except SyntaxError:
        return False
    return mutant.new != text[mutant.start:mutant.end]


@functools.cache
def line_starts(text):
    return [0, *(match.end() for match in re.finditer("\n", text))]


def place(node, text):
    """(start, end) of a node in the text. (ast counts columns in bytes: lines with mutants are ASCII.)"""
    starts = line_starts(text)
    return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset


def words(node, text):
    return f"({text[slice(*place(node, text))]})"


def of_statement(node, top, text):
    """Leaves a statement out, or what it returns; turns a condition round. Yields (start, end, new)."""
    names = {n.id for target in getattr(node, "targets", []) for n in ast.walk(target) if isinstance(n, ast.Name)}
    earlier = {getattr(n, "id", getattr(n, "arg", None)) for n in ast.walk(top)
               if isinstance(n, (ast.Name, ast.arg)) and n.lineno < node.lineno}
    # A name that had no value before would only be an error.
    again = isinstance(node, ast.Assign) and names <= earlier
    call = isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)
    if again or call or isinstance(node, (ast.AugAssign, ast.Raise, ast.Delete, ast.Break, ast.Continue)):
        yield *place(node, text), "pass"
    if isinstance(node, ast.Return) and node.value:
        yield *place(node.value, text), "None"
    # The opposite of a comparison is among those of its operator.
    if isinstance(node, (ast.If, ast.While)) and not isinstance(node.test, (ast.Compare, ast.UnaryOp)):
        yield *place(node.test, text), f"not {words(node.test, text)}"
    if isinstance(node, ast.AugAssign):
        yield from swapped(node.target, node.value, text)


def of_expressions(statement, text):
    """The changes of a statement's own expressions; not those of its body, nor the words of an error."""
    if isinstance(statement, ast.Raise):
        return
    for field, child in ast.iter_fields(statement):
        for part in child if isinstance(child, list) else [child]:
            if isinstance(part, ast.AST) and not isinstance(part, ast.stmt) and field != "annotation":
                for node in ast.walk(part):
                    yield from of_expression(node, text)


def of_expression(node, text):
    def becomes(*news):
        return [(*place(node, text), new) for new in news]

    match node:
        case ast.Compare(left, _, others):
            for a, b in zip([left, *others], others):
                yield from swapped(a, b, text)
        case ast.BinOp(left, _, right):
            yield from swapped(left, right, text)
        case ast.BoolOp(_, values):
            yield from becomes(*[words(value, text) for value in values])
            for a, b in zip(values, values[1:]):
                yield from swapped(a, b, text)
        case ast.UnaryOp(_, operand):
            yield from becomes(words(operand, text))
        case ast.IfExp(_, body, orelse):
            yield from becomes(words(body, text), words(orelse, text))
        case ast.Slice(lower, upper, step):
            for bound in filter(None, (lower, upper, step)):
                yield *place(bound, text), ""
        case ast.Call(_, [*_, a, b]) if not isinstance(a, ast.Starred) and not isinstance(b, ast.Starred):
            # The last two arguments change places.
            (first, first_end), (second, second_end) = place(a, text), place(b, text)
            yield first, second_end, text[second:second_end] + text[first_end:second] + text[first:first_end]
        case ast.Constant(bool(value)):
            yield from becomes(repr(not value))
        case ast.Constant(int(value) | float(value)):
            yield from becomes(repr(value + 1), f"({value - 1!r})")
        case ast.Name(name) if name in NAMES:
            yield from becomes(NAMES[name])
        case ast.Attribute(_, name) if name in ATTRIBUTES:
            _, end = place(node, text)
            yield end - len(name), end, ATTRIBUTES[name]


def swapped(left, right, text):
    """Other operators in the place of the one between two nodes."""
    begin, end = place(left, text)[1], place(right, text)[0]
    operator = re.search(r"not in|is not|[a-z]+|[^\s()\\]+", text[begin:end])
    for new in OPERATORS.get(operator.group(), []):
        yield begin + operator.start(), begin + operator.end(), new


# --- the tests ------------------------------------------------------------------------------------------------------

class Recorder:
    """A pytest plugin that notes the seconds of each test and the lines of a file that it runs, by fixtures too."""

    def __init__(self, path):
        self.path, self.lines = str(path), set()
        self.fixtures, self.tests = {}, {}

    def trace(self, frame, event, _):
        if frame.f_code.co_filename != self.path:
            return None
        self.lines.add(frame.f_lineno)
        return self.trace

    def measure(self, kept, name):
        outer, self.lines, began = self.lines, set(), time.process_time()
        sys.settrace(self.trace)
        yield
        seconds, lines = kept.get(name, (0, set()))
        kept[name] = max(seconds, time.process_time() - began), lines | self.lines
        self.lines = outer

    @pytest.hookimpl(hookwrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        yield from self.measure(self.fixtures, fixturedef.argname)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_call(self, item):
        yield from self.measure(self.tests, item.nodeid)
        seconds, lines = self.tests[item.nodeid]
        for name in item.fixturenames:
            more_seconds, more_lines = self.fixtures.get(name, (0, set()))
            seconds, lines = seconds + more_seconds, lines | more_lines
        self.tests[item.nodeid] = seconds, sorted(lines)


class Chosen:
    """A pytest plugin that runs these tests alone, in this order."""

    def __init__(self, names):
        self.names = names

    def pytest_collection_modifyitems(self, items):
        chosen = {item.nodeid: item for item in items}
        items[:] = [chosen[name] for name in self.names]


def fork(copy, file, plugin, cpu_seconds, at_end=lambda: None):
    """Runs the tests of a file in a copy of the repository, in a process of its own. Returns its id. It ends with the
    status of pytest, or by a signal where it takes too long."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()                 # what it starts can be ended with it
        signal.alarm(WALL_LIMIT)
        resource.setrlimit(resource.RLIMIT_CPU, (int(cpu_seconds), int(cpu_seconds) + 5))
        os.chdir(copy)
        for stream in (1, 2):
            os.dup2(os.open("log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        tests, quick, *_ = TARGETS[file]
        # unraisableexception walks through all objects that torch has, several times.
        status = pytest.main([
            f"tests/{tests}", "-k", quick, "-q", "-x", "-p", "no:cacheprovider", "-p", "no:unraisableexception",
            f"--basetemp={copy}/tmp"], plugins=[plugin])
        at_end()
        sys.stdout.flush()
        os._exit(status)
    finally:
        os._exit(3)


def wait():
    """(id, status) of the next child that ends. What it left running is ended too."""
    pid, status = os.wait()
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    return pid, status


def record(copies, file):
    """{name of a test: (seconds, lines)}, quickest first. Imports what the tests import and is not ours."""
    copy, *others = copies
    recorder = Recorder(copy / file)

    def keep():
        files = {name: str(getattr(module, "__file__", None) or copy) for name, module in sys.modules.items()}
        imported = [name for name, file in files.items() if not file.startswith(str(copy))]
        (copy / "recorded").write_text(json.dumps([recorder.tests, imported]))

    sys.dont_write_bytecode = False         # pytest takes a second to compile a file of tests
    fork(copy, file, recorder, 600, keep)
    _, status = wait()
    if status:
        sys.exit(f"the tests of {file} fail as they are:\n{(copy / 'log').read_text()[-3000:]}")
    tests, imported = json.loads((copy / "recorded").read_text())
    for name in imported:
        try:
            importlib.import_module(name)
        except Exception:                   # not meant to be imported by itself
            pass
    gc.freeze()                             # a collection in a child would copy all of its parent's memory

    # Of the code itself nothing compiled is kept: a change of the same length in the same second would not be seen.
    sys.dont_write_bytecode = True
    for compiled in (copy / file).parent.glob(f"__pycache__/{Path(file).stem}.*"):
        compiled.unlink()
    for other in others:
        shutil.copytree(copy / "tests", other / "tests", dirs_exist_ok=True)
    return dict(sorted(tests.items(), key=lambda item: item[1][0]))


def run(mutants, tests, text, copies):
    """{mutant: "killed", "timed out" or "survived"}. Each copy runs one after the other."""
    outcome, running, free, waiting = {}, {}, list(copies), mutants[::-1]
    while waiting or running:
        if waiting and free:
            mutant, copy = waiting.pop(), free.pop()
            # Lines that are run when the file is imported are not recorded: there it is all tests.
            names = [name for name, (_, lines) in tests.items() if any(line in mutant.lines for line in lines)]
            names = names or list(tests)
            limit = CPU_LIMIT + 4 * sum(tests[name][0] for name in names)
            (copy / mutant.file).write_text(mutant.source(text), encoding="utf-8")
            running[fork(copy, mutant.file, Chosen(names), limit)] = mutant, copy
            continue
        pid, status = wait()
        mutant, copy = running.pop(pid)
        (copy / mutant.file).write_text(text, encoding="utf-8")
        free.append(copy)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) > 2:     # of pytest: 1 a test failed, 2 no import, 3 ...
            sys.exit(f"{mutant}: the tests could not be run:\n{(copy / 'log').read_text()[-3000:]}")
        late = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGALRM, signal.SIGXCPU, signal.SIGKILL)
        outcome[mutant] = "survived" if status == 0 else "timed out" if late else "killed"
        print(f"\r{mutant.file}: {len(outcome)} of {len(mutants)} ", end="", file=sys.stderr, flush=True)
    return outcome


# --- the command ----------------------------------------------------------------------------------------------------

def listed_survivors():
    """{(file, change): "equivalent" or "accepted"}. In the list: kind and reason, file, - line, + line, empty line."""
    found = {}
    for paragraph in Path(__file__).with_name("mutants_accepted.txt").read_text(encoding="utf-8").split("\n\n"):
        reason, file, before, after = paragraph.strip().split("\n")
        kind, _, _ = reason.partition(": ")
        if kind not in ("equivalent", "accepted"):
            raise ValueError(f"mutants_accepted.txt: {reason!r}; expected `equivalent: ...` or `accepted: ...`")
        found[file, f"{before}\n{after}"] = kind
    return found


def mutate(file, args, copies):
    """Runs the mutants of a file, prints those that survive, and returns how many there are of each kind."""
    began = time.monotonic()
    text = (ROOT / file).read_text(encoding="utf-8")
    mutants = mutants_of(file)
    if args.sample and args.sample < len(mutants):
        mutants = random.Random(args.seed).sample(mutants, args.sample)
    tests = record(copies, file)
    outcome = run(mutants, tests, text, copies)
    listed = listed_survivors()
    counts = Counter()
    for mutant in sorted(mutants, key=lambda m: (m.start, m.end, m.new)):
        change = mutant.change(text)
        result, kind = outcome[mutant], listed.get((file, change), "not listed")
        if result == "survived" or kind != "not listed":
            print(f"\n{file}:{mutant.lines.start}  {result}, {kind}\n{change}", flush=True)
        counts["equivalent" if (result, kind) == ("survived", "equivalent") else result] += 1
    kinds = ", ".join(f"{n} {result}" for result, n in counts.most_common())
    print(f"\n{file:20} {len(mutants)} mutants: {kinds}; {time.monotonic() - began:.0f} s", flush=True)
    return counts


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--file", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--sample", type=int, help="so many mutants of each file, drawn by --seed; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    sys.path[0] = ""                # children import the tests of their copy
    ours = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True).splitlines()
    counts = Counter()
    with tempfile.TemporaryDirectory() as folder:
        copies = [Path(folder).resolve() / str(n) for n in range(args.workers)]
        for copy in copies:
            for file in ours:
                (copy / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / file, copy / file)
        for file in args.file:
            counts += mutate(file, args, copies)
    killed = counts["killed"] + counts["timed out"]
    counted = killed + counts["survived"]
    print(f"\n{killed} of {counted} killed, {killed / counted:.1%}; {counts['equivalent']} more are equivalent")
    return killed < LEAST * counted


if __name__ == "__main__":
    sys.exit(main())
