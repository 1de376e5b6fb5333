"""What the READMEs say is what is here: tables of results, counts of lines, links. Run: pytest tests/test_readme.py"""
import ast
import json
import re
from pathlib import Path

import pytest

from benchmarks import table
from experiments import alpha, equal_kl, order

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / name for name in ("README.md", "RUNNING.md", "CONTRIBUTING.md", "benchmarks/README.md",
                                  "experiments/README.md", "tests/README.md")]
README = PAGES[0].read_text(encoding="utf-8")
STUDIES = {study: [json.loads(line) for line in study.results.read_text().splitlines()]
           for study in (alpha.TINY, alpha.SMOLLM2)}
ROWS = STUDIES[alpha.TINY]

LINES_AN_HOUR = 1200        # 20 a minute
COUNTS_HOLD_WITHIN = 0.05   # so that not every small change of the method changes README.md too


# --- tables ---------------------------------------------------------------------------------------

def test_the_table_of_speed_is_that_of_the_committed_results():
    assert table.table() in (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")


def test_the_table_of_a_gpu_is_that_of_the_committed_results():
    assert table.gpu_table() in (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("make", [table.predicted_table, table.changes_table, table.plan_table])
def test_the_tables_of_dry_runs_are_those_of_the_committed_results(make):
    assert make() in (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")


def test_the_plan_is_within_5_percent_of_every_committed_peak():
    for model, gpus, knobs, peak, planned in table.planned_peaks():
        assert 0.95 <= planned / peak <= 1.05, (model, gpus, knobs)


def test_what_the_dry_run_predicts_of_a_step_is_within_a_tenth_of_what_an_h100_took():
    # The rates were set to the first one by kind of kernel; kernels, gaps and peaks were not.
    for setting, predicted in results("dry-h100").items():
        measured = results("gpu")["steps of 8B"].get(setting)
        if measured:
            assert predicted["seconds"]["in all"] == pytest.approx(measured["profiled_seconds"], rel=0.1)
            assert predicted["peak_gb"] == pytest.approx(measured["peak_bytes"] / 1e9, rel=0.1)


def test_the_row_of_a_gpu_is_that_of_the_committed_results():
    gpu = results("gpu")
    times = gpu["trl"]["trl-4x8"]["seconds"] / gpu["trl"]["ours"]["seconds"]
    what = "on one H100 in bf16: optimiser step, Llama-3.2-1B's shape"
    assert f"| {what} | TRL 1.16, 4 pairs a batch | {times:.2f} times as fast |" in README
    assert f"{gpu['sampler']['graph, batch 128']:,.0f} tokens/s" in README
    assert f"{gpu['steps of 8B']['kept']['mfu']:.0%} MFU" in README


def results(name):
    return json.loads((ROOT / "benchmarks" / f"{name}.json").read_text())


def row_of_step(name):
    (r,) = results(name)["vocabularies"]
    trl = r["trl_best"]
    memory = r["peak_bytes"]["ours"] / r["peak_bytes"][trl]
    return f"optimiser step, vocabulary {r['vocabulary']:,}", r["times_as_long_as_ours"][trl], f"{memory:.2f} of theirs"


def row_of_head():
    r = results("head")["vocabularies"][-1]
    memory = r["peak_bytes"]["ours"] / r["peak_bytes"]["liger"]
    return f"vocabulary head and its gradient, {r['vocabulary']:,}", r["liger_times_as_long"], f"{memory:.2f} of theirs"


def row_of_sample():
    r = results("sample")
    return f"greedy answers, SmolLM2-135M, batch {r['batch_size']}", r["times_as_long_as_ours"], "not measured"


@pytest.mark.parametrize("row", [row_of_step("step"), row_of_step("step-128k"), row_of_head(), row_of_sample()],
                         ids=lambda row: row[0])
def test_the_rows_of_speed_are_those_of_the_committed_results(row):
    what, times, memory = row
    cells = next(line for line in README.splitlines() if line.startswith(f"| {what} |")).split(" | ")
    assert cells[2:] == [f"{times:.2f} times as fast", f"{memory} |"]


def test_the_speeds_without_avx512_are_those_of_the_committed_results():
    page = " ".join((ROOT / "benchmarks" / "README.md").read_text().split())
    (_, small, share), (_, large, of_large) = row_of_step("avx2/step"), row_of_step("avx2/step-128k")
    share = share.removesuffix(" of theirs")
    assert f"a step is {small:.2f} and {large:.2f} times as fast as TRL's, in {share} and {of_large[:4]} of the" in page
    heads = [r["liger_times_as_long"] for r in results("avx2/head")["vocabularies"]]
    assert f"the head is {heads[0]:.2f} and {heads[1]:.2f} times as fast as Liger's" in page
    answers = results("avx2/sample")["times_as_long_as_ours"]
    assert f"rows' speeds are {small:.2f}, {large:.2f}, {heads[1]:.2f} and {answers:.2f}." in README


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.recipe)
def test_the_tables_of_alphas_are_those_of_the_committed_runs(study):
    assert alpha.table(study, STUDIES[study]) in (ROOT / "experiments" / "README.md").read_text(encoding="utf-8")


def test_the_tables_of_order_are_those_of_the_committed_runs():
    rows = [json.loads(line) for line in order.RESULTS.read_text().splitlines()]
    assert order.table(rows) in (ROOT / "experiments" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.recipe)
def test_every_way_had_the_same_search_and_seeds(study):
    rows = STUDIES[study]
    assert len(alpha.paired_seeds(study, rows)) >= 3
    for label in study.ways:
        mine = [(r["learning_rate"], r["seed"]) for r in rows if r["label"] == label]
        search = {(rate, seed) for rate in study.rates for seed in study.search_seeds}
        final = {(alpha.best_rate(study, rows, label), seed) for seed in study.seeds}
        assert search <= set(mine) <= search | final and len(set(mine)) == len(mine)


@pytest.mark.parametrize("study, label", [(alpha.TINY, alpha.TINY_MATCHED), (alpha.SMOLLM2, alpha.SMOLLM2_MATCHED)],
                         ids=["tiny", "smollm2"])
def test_a_study_has_a_simpo_matched_to_alpha_1_at_the_mean_log_prob_of_the_start(study, label):
    # Of all pairs it is what the beta is made of; of those held out on each seed it is nearly so.
    logps = [r["logp_before"] for r in STUDIES[study] if r["seed"] in study.seeds]
    _, _, beta = alpha.WAYS[label]
    assert beta == pytest.approx(order.matched_beta(1, 2.5, sum(logps) / len(logps)), rel=0.05)


def test_the_loop_on_smollm2_is_a_committed_run():
    (r,) = [r for r in STUDIES[alpha.SMOLLM2] if r["label"] == "alpha = 0.25" and r["seed"] == 0]
    page = " ".join((ROOT / "experiments" / "README.md").read_text(encoding="utf-8").split())
    for text in (f"rose from {r['score_before']:.1f} +- 2.2 to {r['score']:.1f} +- {r['score_stderr']:.1f}.",
                 f"fell by {-r['displacement_rejected']:.2f} a token and the chosen one by "
                 f"{-r['displacement_chosen']:.2f} (in {100 * r['fell']:.0f} % of the pairs)",
                 f"KL to the start is {r['kl']:.3f} +- {r['kl_stderr']:.3f} nats"):
        assert text in page


def test_the_table_at_equal_kl_is_that_of_the_committed_runs():
    rows = [json.loads(line) for line in equal_kl.RESULTS.read_text().splitlines()]
    assert equal_kl.table(rows) in (ROOT / "experiments" / "README.md").read_text(encoding="utf-8")


def test_the_table_is_of_means_over_the_final_seeds():
    rows = [r | ({"score": 10.0 * r["seed"]} if r["seed"] < 5 else {}) for r in ROWS]
    table = alpha.table(alpha.TINY, rows)
    assert table.count(" | 20.0 +- 15.8 | ") == len(alpha.TINY.ways)        # of 0, 10, ..., 40


def test_differences_to_simpo_are_paired_by_seed():
    # Scores are 10 * seed for SimPO, and above it by 1, 1, 1, 1 and 6 for others: by 2, with a standard error of 1.
    rows = []
    for r in ROWS:
        above = 0 if r["label"] == alpha.SIMPO else 6 if r["seed"] == 4 else 1
        rows.append(r | {"score": 10.0 * r["seed"] + above} if r["seed"] < 5 else r)
    table = alpha.paired_table(alpha.TINY, rows)
    assert table.count(" | +2.0 +- 1.0 | ") == len(alpha.TINY.ways) - 1
    assert table.splitlines()[-2].startswith("| alpha = 1 - SimPO (beta = 2.93) | +0.0 +- 0.0 | ")
    assert alpha.cell(*alpha.mean_and_error([1.0, 1.0, 1.0, 1.0, 6.1]), 1) == "+2.0 +- 1.0"
    assert alpha.cell(*alpha.mean_and_error([1.0, 1.0, 1.0, 1.0, 5.9]), 1) == "**+2.0 +- 1.0**"


# --- the reading order ----------------------------------------------------------------------------

def reading_order():
    """(file, claimed lines, lines) of the rows of README's table.

    "from `X` down to `Y`" are the lines from the first "# --- ... X ... ---" to the next that names Y.
    """
    rows = re.findall(r"^\| \[(\S+\.py)\]\(\1\)(.*?) \| (\d+) \|", README, re.MULTILINE)
    for file, part, claimed in rows:
        text = (ROOT / file).read_text(encoding="utf-8").splitlines()
        marks = [i for name in re.findall("`(.+?)`", part)
                 for i, line in enumerate(text) if line.startswith("# --- ") and name in line]
        first = marks[0] if "from" in part else 0
        end = next((i for i in marks if i > first), len(text))
        assert ("down to" in part) == (end < len(text)), f"{file}: no such section as in {part!r}"
        yield file, int(claimed), end - first


def test_the_method_is_four_files_in_reading_order():
    assert [file for file, *_ in reading_order()] == ["alphapo.py", "data/preference.py", "model.py", "train.py"]


def test_the_counts_of_lines_are_those_of_the_files():
    for file, claimed, lines in reading_order():
        assert claimed == pytest.approx(lines, rel=COUNTS_HOLD_WITHIN), f"README.md: {file} has {lines} lines to read"


def test_the_method_can_be_read_in_an_hour():
    assert sum(lines for _, _, lines in reading_order()) <= LINES_AN_HOUR


# --- the lists of mutants.py and gpu_mutants.py ---------------------------------------------------

def test_the_lists_of_changes_to_the_code_are_of_lines_that_are_there():
    # gpu_mutants.py loads PyTorch's distributed parts and sets the number of threads: read, not imported.
    (found,) = [node for node in ast.parse((ROOT / "tests/gpu_mutants.py").read_text()).body
                if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MUTANTS"]
    changes = ast.literal_eval(found.value)
    assert len(changes) > 70
    for file, old, new, why in changes:
        assert (ROOT / file).read_text().count(old) == 1 and old != new, f"{file}: {old!r}"
    for paragraph in (ROOT / "tests/mutants_accepted.txt").read_text().strip().split("\n\n"):
        _, file, old, _ = paragraph.splitlines()
        lines = {" ".join(line.split()) for line in (ROOT / file).read_text().splitlines()}
        assert old.removeprefix("- ") in lines, f"{file}: {old}"


# --- pages ----------------------------------------------------------------------------------------

def test_readme_takes_five_minutes():
    assert len(README.splitlines()) <= 160


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings_that_are_there(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for link in links:
        if link.startswith("http"):
            continue
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if heading:
            file = target if target.is_file() else target / "README.md"
            titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}, link
