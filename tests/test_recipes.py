"""Every recipe of configs/ against the numbers of the papers, written out here. Run: pytest tests/test_recipes.py"""
import os
from pathlib import Path

import pytest

from train import ROOT, parse_config

MISTRAL = "Mistral-7B-Instruct-v0.2", "mistral-instruct-ultrafeedback"
PAIRRM = "Meta-Llama-3-8B-Instruct", "llama3-ultrafeedback"
ARMORM = "Meta-Llama-3-8B-Instruct", "llama3-ultrafeedback-armorm"
PAPERS = {   # recipe: (model, data), method, alpha, beta, gamma / beta, learning rate
    "mistral_7b": (MISTRAL, "alphapo", 0.25, 2.5, 0.1, 7e-7),                       # AlphaPO, Table 3
    "llama3_8b_pairrm": (PAIRRM, "alphapo", 0.25, 2.5, 1.0, 1e-6),
    "llama3_8b_armorm": (ARMORM, "alphapo", 0.25, 10, 0.3, 1.1e-6),
    "mistral_7b_simpo": (MISTRAL, "simpo", None, 2.5, 0.1, 5e-7),                   # SimPO's README
    "llama3_8b_pairrm_simpo": (PAIRRM, "simpo", None, 2.5, 0.55, 1e-6),
    "llama3_8b_armorm_simpo": (ARMORM, "simpo", None, 10, 0.3, 1e-6),
    "mistral_7b_dpo": (MISTRAL, "dpo", None, 0.01, None, 5e-7),
    "llama3_8b_pairrm_dpo": (PAIRRM, "dpo", None, 0.01, None, 7e-7),
    "llama3_8b_armorm_dpo": (ARMORM, "dpo", None, 0.01, None, 3e-7),
}
RECIPES = {path.stem: path for path in sorted((ROOT / "configs").glob("*.toml"))}


def test_every_recipe_is_in_a_table():
    assert set(RECIPES) == set(PAPERS) | {"tiny", "smollm2"}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_parses_and_its_paths_stay_in_the_project(name):
    config = parse_config([str(RECIPES[name])])
    files = [config.model, *config.data, *config.eval_data]
    assert len(files) > 1 and all(Path(os.path.abspath(file)).is_relative_to(ROOT) for file in files)
    assert config.eval_pairs or config.eval_data


@pytest.mark.parametrize("name", PAPERS)
def test_a_recipe_holds_the_papers_numbers(name):
    (model, data), method, *knobs = PAPERS[name]
    config = parse_config([str(RECIPES[name])])
    assert [config.alpha, config.beta, config.gamma_beta_ratio, config.learning_rate] == knobs
    assert (config.method, Path(config.model).name) == (method, model)
    assert [Path(f).resolve().relative_to(ROOT) for f in config.data + config.eval_data] == [
        Path("data", data, "train.jsonl"), Path("data", data, "test.jsonl")]
    assert (config.pairs_per_step, config.epochs, config.warmup_ratio, config.max_length, config.max_prompt_length) == (
        128, 1, 0.1, 2048, 1800)


def test_smollm2_takes_the_mistral_row_but_for_its_rate():
    config, mistral = (parse_config([str(RECIPES[name])]) for name in ("smollm2", "mistral_7b"))
    knobs = ("method", "alpha", "beta", "gamma_beta_ratio")
    assert [getattr(config, k) for k in knobs] == [getattr(mistral, k) for k in knobs] and config.learning_rate == 5e-5
