"""Mutation testing: how many small changes of the method's code do its tests notice?

    make mutants                                            # every mutant: see README.md for how long
    make mutants ARGS="--file alphapo.py --sample 50"       # 50 of one file, drawn by --seed

A mutant is the code with one change by a standard operator (`<` to `<=`, `+` to `-`, a statement left out ...). It is
killed if a test fails or runs out of time, and survives if all that run its line pass. A survivor is a missing test, or
a change that changes nothing. mutants_accepted.txt lists those that were looked at, each with its reason.

1. The tests of each file run once, and what lines each of them runs is noted.
2. torch is imported once. For each mutant a worker writes the changed file into its own copy of the repository and
   forks; the child imports the code and runs the tests of the line, quickest first, up to the first that fails.
3. Survivors are printed as a diff. Exit status 1 if less than 95 % of the mutants are killed, not counting those that
   are listed as equivalent.
"""
import argparse
import ast
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

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):     # a forked child cannot use the threads of its parent
    os.environ[name] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest

ROOT = Path(__file__).resolve().parent.parent
ACCEPTED = Path(__file__).with_name("mutants_accepted.txt")
LEAST = 0.95            # the share that must be killed
CPU_LIMIT = 10          # seconds, and four times what the tests took
WALL_LIMIT = 300        # for a child that waits

# {file: (its tests, -k of those that are quick, the functions to mutate or None for all, the line at which to stop)}
TARGETS = {
    "alphapo.py": ("test_alphapo.py", "not copied_alone", None, None),
    "data/preference.py": ("test_preference.py", "not many_workers", None, "# --- a cache"),
    "model.py": ("test_model.py", "not alone_in_an_empty and not copied_alone", None, "# --- Hugging Face"),
    "train.py": (
        "test_train.py", "step or packing or scoring or alpha_zero or dpo_starts or rate or warm_up or decayed or "
        "logs or no_tensor or rank or work or metrics or without_a_loss or gathered", {
            "pair_loss", "run_row", "head_and_loss", "run_rows", "train_step", "learning_rate", "make_optimizer",
            "score_pairs", "reference_logps", "metrics_of", "step_metrics", "work_of"}, None),
}


# --- the mutants ----------------------------------------------------------------------------------------------------

SYMBOLS = {     # what an operator becomes
    "<": ["<=", ">="], "<=": ["<", ">"], ">": [">=", "<="], ">=": [">", "<"], "==": ["!="], "!=": ["=="],
    "is not": ["is"], "is": ["is not"], "not in": ["in"], "in": ["not in"],
    "+": ["-"], "-": ["+"], "*": ["/"], "/": ["*"], "//": ["/"], "%": ["*"], "**": ["*"], "&": ["|"], "|": ["&"],
    "and": ["or"], "or": ["and"], "+=": ["-=", "="], "-=": ["+=", "="], "|=": ["="]}
NAMES = dict(pair for a, b in [
    ("min", "max"), ("amin", "amax"), ("any", "all"), ("ceil", "floor"), ("cos", "sin"), ("exp", "expm1"),
    ("zeros_like", "ones_like"), ("zeros", "ones"), ("mean", "sum"), ("True", "False"), ("argmin", "argmax"),
] for pair in ((a, b), (b, a)))
NAMES |= {"double": "float", "float64": "float32"}     # precision


@dataclass(frozen=True)
class Mutant:
    file: str
    line: int           # where the change is, from 1
    first: int          # the first and the last line of the statement, or of its head
    last: int
    whole: bool         # outside of functions: any test may notice
    start: int          # what is replaced, in characters of the file's text
    end: int
    new: str

    def source(self, text):
        return text[:self.start] + self.new + text[self.end:]

    def change(self, text):
        """The change as the lines of a diff, without their indentation: it does not depend on where they stand."""
        begin = text.rfind("\n", 0, self.start) + 1
        end = text.find("\n", self.end)
        after = text[begin:self.start] + self.new + text[self.end:end]
        flat = lambda lines: " ".join(lines.split())
        return f"- {flat(text[begin:end])}\n+ {flat(after)}"


class Mutate(ast.NodeVisitor):
    """Collects the mutants of a file."""

    def __init__(self, file, text):
        self.file, self.text, self.found = file, text, []
        # ast counts columns in bytes.
        self.lines = [line.encode() for line in text.splitlines(keepends=True)]
        self.offsets = [0]
        for line in self.lines:
            self.offsets.append(self.offsets[-1] + len(line.decode()))
        self.span = None            # (first, last) line of the statement at hand
        self.inside = False         # a function
        self.bound = set()          # names that have a value before it, in its function

    def at(self, line, column):
        return self.offsets[line - 1] + len(self.lines[line - 1][:column].decode())

    def ends(self, node):
        return self.at(node.lineno, node.col_offset), self.at(node.end_lineno, node.end_col_offset)

    def code(self, node):
        return self.text[slice(*self.ends(node))]

    def add(self, start, end, *news):
        for new in news:
            line = self.text.count("\n", 0, start) + 1
            mutant = Mutant(self.file, line, *self.span, not self.inside, start, end, new)
            try:
                compile(mutant.source(self.text), self.file, "exec")
            except SyntaxError:
                continue
            self.found.append(mutant)

    def replace(self, node, *news):
        self.add(*self.ends(node), *news)

    def symbol(self, left, right):
        """Swaps the operator that stands between two nodes."""
        begin, end = self.ends(left)[1], self.ends(right)[0]
        match = re.search(r"not in|is not|[a-z]+|[^\s()\\]+", self.text[begin:end])
        self.add(begin + match.start(), begin + match.end(), *SYMBOLS.get(match.group(), []))

    # Statements: left out, or without their value; conditions turned round.

    def visit(self, node):
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None)
            self.span = node.lineno, body[0].lineno - 1 if body else node.end_lineno
            if body and self.span[1] < node.lineno:
                self.span = node.lineno, node.lineno
            self.statement(node)
        super().visit(node)

    def statement(self, node):
        if isinstance(node, (ast.AugAssign, ast.Raise, ast.Break, ast.Continue, ast.Delete)):
            self.replace(node, "pass")
        elif isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant):
            self.replace(node, "pass")
        elif isinstance(node, ast.Assign):
            # A name that had no value before would only be an error.
            names = {n.id for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)}
            if names <= self.bound:
                self.replace(node, "pass")
            self.bound |= names
        elif isinstance(node, ast.Return) and node.value:
            self.replace(node.value, "None")
        # Of a comparison the opposite is made below, and `not` is dropped there.
        if isinstance(node, (ast.If, ast.While)) and not isinstance(node.test, (ast.Compare, ast.UnaryOp)):
            self.replace(node.test, f"not ({self.code(node.test)})")

    def visit_FunctionDef(self, node):
        self.bound = {argument.arg for argument in ast.walk(node.args) if isinstance(argument, ast.arg)}
        for child in [*node.args.defaults, *filter(None, node.args.kw_defaults)]:
            self.visit(child)
        inside, self.inside = self.inside, True
        for child in node.body:
            self.visit(child)
        self.inside = inside

    def visit_AnnAssign(self, node):
        if node.value:
            self.visit(node.value)

    def visit_Raise(self, node):
        pass                        # the words of an error

    # Expressions.

    def visit_Compare(self, node):
        for left, right in zip([node.left, *node.comparators], node.comparators):
            self.symbol(left, right)
        self.generic_visit(node)

    def visit_BinOp(self, node):
        self.symbol(node.left, node.right)
        self.generic_visit(node)

    def visit_AugAssign(self, node):
        self.symbol(node.target, node.value)
        self.generic_visit(node)

    def visit_BoolOp(self, node):
        self.replace(node, *[f"({self.code(value)})" for value in node.values])
        for left, right in zip(node.values, node.values[1:]):
            self.symbol(left, right)
        self.generic_visit(node)

    def visit_UnaryOp(self, node):
        self.replace(node, f"({self.code(node.operand)})")
        self.generic_visit(node)

    def visit_IfExp(self, node):
        self.replace(node, f"({self.code(node.body)})", f"({self.code(node.orelse)})")
        self.generic_visit(node)

    def visit_Slice(self, node):
        for part in filter(None, (node.lower, node.upper, node.step)):
            self.replace(part, "")
        self.generic_visit(node)

    def visit_Call(self, node):
        # The last two arguments change places.
        if len(node.args) > 1 and not any(isinstance(a, (ast.Starred, ast.GeneratorExp)) for a in node.args[-2:]):
            (a, b), (c, d) = map(self.ends, node.args[-2:])
            self.add(a, d, self.text[c:d] + self.text[b:c] + self.text[a:b])
        self.generic_visit(node)

    def visit_Constant(self, node):
        if isinstance(node.value, bool):
            self.replace(node, NAMES[str(node.value)])
        elif isinstance(node.value, (int, float)):
            self.replace(node, repr(node.value + 1), f"({node.value - 1!r})")

    def visit_Name(self, node):
        if node.id in ("min", "max", "any", "all"):
            self.replace(node, NAMES[node.id])

    def visit_Attribute(self, node):
        if node.attr in NAMES:
            end = self.ends(node)[1]
            self.add(end - len(node.attr), end, NAMES[node.attr])
        self.generic_visit(node)


def mutants_of(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    _, _, functions, stop = TARGETS[file]
    last = text[:text.index(stop)].count("\n") if stop else len(text)
    collector = Mutate(file, text)
    for node in ast.parse(text).body:
        if node.lineno <= last and (functions is None or getattr(node, "name", None) in functions):
            collector.visit(node)
    same = ast.dump(ast.parse(text))
    found = {(m.start, m.end, m.new): m for m in collector.found if ast.dump(ast.parse(m.source(text))) != same}
    return [found[key] for key in sorted(found)]


# --- the tests ------------------------------------------------------------------------------------------------------

class Recorder:
    """Notes of each test how long it takes and what lines of the file it runs, those of its fixtures included."""

    def __init__(self, path):
        self.path, self.lines = str(path), set()
        self.fixtures, self.tests = {}, {}

    def trace(self, frame, event, _):
        if frame.f_code.co_filename != self.path:
            return None
        self.lines.add(frame.f_lineno)
        return self.trace

    def measured(self, kept, name):
        outer, self.lines, began = self.lines, set(), time.process_time()
        sys.settrace(self.trace)
        yield
        seconds, lines = kept.get(name, (0, set()))
        kept[name] = max(seconds, time.process_time() - began), lines | self.lines
        self.lines = outer

    @pytest.hookimpl(hookwrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        yield from self.measured(self.fixtures, fixturedef.argname)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_call(self, item):
        yield from self.measured(self.tests, item.nodeid)
        seconds, lines = self.tests[item.nodeid]
        for name in item.fixturenames:
            of_fixture, lines_of_fixture = self.fixtures.get(name, (0, set()))
            seconds, lines = seconds + of_fixture, lines | lines_of_fixture
        self.tests[item.nodeid] = seconds, sorted(lines)


class Chosen:
    """Runs these tests alone, in this order."""

    def __init__(self, names):
        self.places = {name: place for place, name in enumerate(names)}

    def pytest_collection_modifyitems(self, items):
        items[:] = sorted((item for item in items if item.nodeid in self.places), key=lambda i: self.places[i.nodeid])


def in_child(copy, file, plugin, cpu_seconds, after=lambda: None):
    """Forks a process that runs the tests of a file in a copy of the repository. Returns its id; it ends with pytest's
    exit status, or by a signal if it takes too long."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()                 # what it starts can be ended with it
        signal.alarm(WALL_LIMIT)
        resource.setrlimit(resource.RLIMIT_CPU, (int(cpu_seconds), int(cpu_seconds) + 5))
        os.chdir(copy)
        for stream in (1, 2):
            os.dup2(os.open(copy / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        tests, quick, *_ = TARGETS[file]
        # unraisableexception walks through all objects that torch has, several times.
        status = pytest.main([
            f"tests/{tests}", "-k", quick, "-q", "-x", "-p", "no:cacheprovider", "-p", "no:unraisableexception",
            f"--basetemp={copy}/tmp"], plugins=[plugin])
        after()
        sys.stdout.flush()
        os._exit(status)
    finally:
        os._exit(3)


def ended(pid):
    """Whatever the child left running is ended too."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def recorded(copies, file):
    """{name of a test: (seconds, lines)}, quickest first."""
    copy = copies[0]
    recorder = Recorder(copy / file)
    sys.dont_write_bytecode = False     # pytest takes a second to compile a file of tests

    def keep():
        outside = [name for name, module in sys.modules.items()
                   if not str(getattr(module, "__file__", None) or copy).startswith(str(copy))]
        (copy / "recorded").write_text(json.dumps([recorder.tests, outside]))

    pid = in_child(copy, file, recorder, 600, keep)
    _, status = os.waitpid(pid, 0)
    ended(pid)
    if status:
        sys.exit(f"the tests of {file} fail as they are, or take too long:\n{(copy / 'log').read_text()[-3000:]}")
    tests, outside = json.loads((copy / "recorded").read_text())
    for name in outside:            # what is imported here need not be imported by every child
        try:
            importlib.import_module(name)
        except Exception:
            pass
    gc.freeze()                     # else a child's first collection copies all of its parent's memory
    # A change within a second, of the same length, would not be seen.
    sys.dont_write_bytecode = True
    for compiled in (copy / file).parent.glob(f"__pycache__/{Path(file).stem}.*"):
        compiled.unlink()
    for other in copies[1:]:
        shutil.copytree(copy / "tests", other / "tests", dirs_exist_ok=True)
    return dict(sorted(tests.items(), key=lambda item: item[1][0]))


def run_all(mutants, tests, copies):
    """{mutant: "killed", "timed out" or "survived"}, one at a time in each copy."""
    outcome, running, free, waiting = {}, {}, list(copies), list(mutants)[::-1]
    while waiting or running:
        while waiting and free:
            mutant = waiting.pop()
            covering = [name for name, (_, lines) in tests[mutant.file].items()
                        if mutant.whole or any(mutant.first <= line <= mutant.last for line in lines)]
            if not covering:
                outcome[mutant] = "survived"
                continue
            copy = free.pop()
            text = (ROOT / mutant.file).read_text(encoding="utf-8")
            (copy / mutant.file).write_text(mutant.source(text), encoding="utf-8")
            limit = CPU_LIMIT + 4 * sum(tests[mutant.file][name][0] for name in covering)
            running[in_child(copy, mutant.file, Chosen(covering), limit)] = mutant, copy
        if not running:
            break
        pid, status = os.wait()
        ended(pid)
        mutant, copy = running.pop(pid)
        shutil.copy(ROOT / mutant.file, copy / mutant.file)
        free.append(copy)
        outcome[mutant] = "survived" if status == 0 else "killed"
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGALRM, signal.SIGXCPU, signal.SIGKILL):
            outcome[mutant] = "timed out"
    return outcome


def accepted():
    """{(file, change): "equivalent" or "accepted"}: paragraphs of the kind and the reason, the file, - and + line."""
    found = {}
    for paragraph in ACCEPTED.read_text(encoding="utf-8").split("\n\n"):
        reason, file, *change = paragraph.strip().rsplit("\n", 3)
        kind = reason.partition(":")[0]
        if kind not in ("equivalent", "accepted") or len(change) != 2:
            raise ValueError(f"{ACCEPTED}: {paragraph!r}; expected a line of `equivalent: REASON` or `accepted: "
                             "REASON`, then the file, the - line and the + line")
        found[file, "\n".join(change)] = kind
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--file", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--sample", type=int, help="so many mutants of each file, drawn by --seed; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    began = time.monotonic()
    listed = accepted()
    shares = Counter()
    sys.path[0] = ""                # children import the tests of their copy
    with tempfile.TemporaryDirectory() as folder:
        copies = [Path(folder).resolve() / str(n) for n in range(args.workers)]
        files = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True)
        for copy in copies:
            for file in files.splitlines():
                (copy / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / file, copy / file)
        for file in args.file:
            shares += report(file, args, listed, copies)
    killed, counted = shares["killed"] + shares["timed out"], sum(shares.values()) - shares["equivalent"]
    print(f"\nall {killed} of {counted} killed, {killed / counted:.1%}; {shares['equivalent']} more are equivalent; "
          f"{time.monotonic() - began:.0f} s")
    return killed < LEAST * counted


def report(file, args, listed, copies):
    """Runs the mutants of a file, prints the survivors, and returns how many there were of each kind."""
    began = time.monotonic()
    mutants = mutants_of(file)
    if args.sample and args.sample < len(mutants):
        mutants = random.Random(args.seed).sample(mutants, args.sample)
    tests = {file: recorded(copies, file)}
    recording = time.monotonic() - began
    outcome = run_all(mutants, tests, copies)
    text = (ROOT / file).read_text(encoding="utf-8")
    counts = Counter()
    for mutant in sorted(mutants, key=lambda m: (m.start, m.end, m.new)):
        result = outcome[mutant]
        change = mutant.change(text)
        kind = listed.get((file, change), "not listed")
        if result == "survived":
            print(f"\n{file}:{mutant.line}  survived, {kind}\n{change}", flush=True)
            result = "equivalent" if kind == "equivalent" else result
        elif kind != "not listed":
            print(f"\n{file}:{mutant.line}  {result}, although it is listed as {kind}\n{change}", flush=True)
        counts[result] += 1
    print(f"\n{file:20} {len(mutants)} mutants: " + ", ".join(f"{n} {kind}" for kind, n in counts.most_common())
          + f"; {len(tests[file])} tests; {recording:.0f} s to record, {time.monotonic() - began:.0f} s", flush=True)
    return counts


if __name__ == "__main__":
    sys.exit(main())
