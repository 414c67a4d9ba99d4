"""The judge of the claims, figures/claims.py, and the policies that its opponents need."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import erpd
import kl
from figures import claims, claims_figures, experiments, outcomes


def test_a_combined_policy_is_the_normalised_product(make_model, device):
    """Decoding between two policies with logits that were not normalised first; at a temperature, with its inverse.
    (That sampler, scorer and KL, with one cache for all, agree with it: tests/test_rollout.py.)"""
    ids, models = torch.tensor([[5, 6, 7, 8]], device=device), [make_model("qwen3", 0), make_model("qwen3", 1)]
    first, second = (model(input_ids=ids).logits for model in models)
    for kinds, weights, expected in ((models, [0.3, 0.7], 0.3 * first.log_softmax(-1) + 0.7 * second.log_softmax(-1)),
                                     (models[:1], [2.0], first / 0.5)):
        logits = experiments.Combined(kinds, weights)(input_ids=ids).logits
        torch.testing.assert_close(logits.log_softmax(-1), expected.log_softmax(-1), rtol=1e-4, atol=1e-4)


def row(method: str, accuracy: float, kl: float, **more) -> dict:
    return {"method": method, "path": method, "at": 1, "accuracy": accuracy, "kl": kl, "entropy": 0.1} | more


def outcome(*rows: dict) -> outcomes.Outcome:
    rates = (torch.linspace(0.05, 0.6, 40) * 6400).round().div(6400).tolist()
    base = row("base", sum(rates) / len(rates), 0.0, pass_rates=rates, samples=6400)
    return outcomes.Outcome([base, *rows])


def test_a_policy_on_the_limit_has_efficiency_one_and_twice_its_kl_half():
    limit = outcome()
    points = [(a, limit.least(a)) for a in (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)]
    o = outcome(*(row("erpd", a, k, at=a) for a, k in points), *(row("nll", a, 2 * k, at=a) for a, k in points))
    assert all(abs(o.efficiency("erpd", a) - 1) < 0.02 for a in o.levels)
    assert all(abs(o.efficiency("nll", a) - 0.5) < 0.01 for a in o.levels)
    assert o.worth(o.of("erpd")[2]) == pytest.approx(1, abs=1e-3)


def test_a_level_that_is_not_reached_counts_for_nothing_and_misses_what_asks_for_every_seed():
    """Mistake: efficiency 0 for a level missed by a point, which decided a comparison of means."""
    o = outcome(row("erpd", 0.5, 0.5))
    assert o.efficiency("erpd", 0.45) > 0 and math.isnan(o.efficiency("erpd", 0.6))
    values = [0.5, 0.6, 0.55, math.nan]
    assert outcomes.mean_interval(values)[0] == pytest.approx(0.55)
    assert not claims.Statistic("C", "", values, True, 0.1).met()
    assert claims.Statistic("C", "", values, True, 0.1, every_seed=False).met()


def test_the_limits_band_lies_around_it_and_narrows_with_samples():
    """Mistake: a band around another limit than the one that is drawn, or of the problems instead of the samples."""
    widths = []
    for samples in (16, 400):
        rates = [0.25] * 50
        o = outcomes.Outcome([row("base", 0.25, 0.0, pass_rates=rates, samples=samples)])
        spent = sorted(np.interp(0.6, *limit) for limit in o.limits())
        assert spent[0] < o.least(0.6) < spent[-1] or abs(spent[100] - o.least(0.6)) < 0.05
        widths.append(spent[-5] - spent[4])
    assert widths[0] > 3 * widths[1] > 0


def test_the_least_kl_of_mending_lost_chains_too_by_enumeration_and_by_search():
    """Mistake: KL of the carries before the first wrong one alone; with a single carry each it is the limit itself.
    Mistake: one factor of odds for all problems, which is no least: a random policy of this kind was cheaper."""
    rates = torch.tensor([0.04, 0.3, 0.5], dtype=torch.float64)
    accuracy, spent = outcomes.mending_alike(rates, torch.tensor([0, 1, 1]))
    assert np.interp([0.4, 0.6, 0.9], accuracy, spent) == pytest.approx(
        np.interp([0.4, 0.6, 0.9], *kl.least_kl(rates, points=2000)), rel=1e-4)
    accuracy, spent = outcomes.mending_alike(rates[:1], torch.tensor([2]))  # 0.2 right at each of two carries
    for k in (0, 200, 300):
        s = accuracy[k] ** 0.5
        p, q = (torch.tensor([a, 1 - a], dtype=torch.float64) for a in (0.2, s))
        chains, before = (torch.outer(x, x).log().flatten() for x in (q, p))  # of all four: which carries are right
        assert spent[k] == pytest.approx(kl.exact_kl(chains, before).item(), abs=1e-9)
    assert np.interp(0.647, accuracy, spent) > 1.1 * kl.coin_kl(torch.tensor(0.647), torch.tensor(0.04))
    accuracy, spent = outcomes.mending_alike(torch.tensor([0.01, 0.4]), torch.tensor([3, 1]))
    before = torch.tensor([0.01 ** (1 / 3)] * 3 + [0.4])
    mended = before + (1 - before) * torch.rand(20_000, 4, generator=torch.Generator().manual_seed(0))
    right, cost = (mended[:, :3].prod(1) + mended[:, 3]) / 2, kl.coin_kl(mended, before).sum(1) / 2
    over = cost.numpy() / np.interp(right.numpy(), accuracy, spent)
    assert 0.999 < over.min() < 1.02


def test_a_path_that_ends_while_it_rises_is_named():
    """Mistake: an opponent stopped before its time, and a win for it."""
    def path(*accuracies):
        return [row("nll", a, 0.1, at=k, path="lr 0.1", fallen=0.0, accuracy_interval=[a - 0.05, a + 0.05])
                for k, a in enumerate(accuracies)]

    assert outcome(*path(0.4, 0.5, 0.52)).still_rising() == []
    assert outcome(*path(0.4, 0.5, 0.6)).still_rising() == ["nll, lr 0.1, update 2"]


def test_the_kl_at_a_level_is_that_of_the_first_crossing():
    """A path that rises, collapses and rises again is judged where it first gets there; a level it never reaches is
    infinite."""
    path = [row("sapo", a, k) for a, k in ((0.5, 0.04), (0.3, 4.0), (0.7, 9.0))]
    assert outcomes.kl_on_path(path, 0.3, 0.5) == pytest.approx(0.04)
    assert outcomes.kl_on_path(path, 0.3, 0.4) == pytest.approx(0.01)  # half the way in √KL
    assert outcomes.kl_on_path(path, 0.3, 0.6) == pytest.approx((2 + 0.75 * 1) ** 2)
    assert outcomes.kl_on_path(path, 0.3, 0.8) == math.inf


def test_a_statistic_is_met_only_with_its_whole_interval():
    assert claims.Statistic("C", "", [0.5, 0.6, 0.7, 0.6, 0.6], True, 0.5).met()
    assert not claims.Statistic("C", "", [0.1, 0.6, 1.7, 0.6, 0.6], True, 0.5).met()
    assert claims.Statistic("C", "", [0.2, 0.21, 0.2, 0.2, 0.2], False, 0.33).met()
    assert not claims.Statistic("C", "", [0.2], False, 0.33).met()  # one seed proves nothing


def test_the_tables_of_the_page_are_those_of_the_rows(capsys):
    """Mistake: a table that is older than what was measured."""
    claims.report(claims.known(claims.RESULTS), claims.known(claims.FRESH, fresh=True), claims.with_control())
    page = " ".join((claims.HERE / "README.md").read_text().split())
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) > 100 and [line for line in lines if line not in page] == []


def test_each_stage_has_been_run_and_no_other():
    """Mistake: a seed or a budget that is asked for and has no rows, or rows of one that nothing asks for."""
    for results, fresh in (claims.RESULTS, False), (claims.FRESH, True):
        ran = {(row["stage"], row["seed"], row["at"]) for seeds in claims.outcomes(results, ("erpd",)).values()
               for o in seeds for row in o.of("erpd")}
        asked = {(s.name, s.config.seed, budget) for s in claims.stages(fresh) for budget in s.budgets + s.further}
        assert asked == {row for row in ran if row[0] != "SmolLM2"}


def test_fresh_seeds_stand_beside_each_statistic_and_name_another_opponent(capsys):
    """Mistake: another statistic beside, one seed's verdict taken for the other's, or an opponent that changed."""
    def seeds(nll, grpo):
        return [outcome(row("sapo", 0.5, 2 + k / 100, lr=3e-5), row("erpd", 0.9, 1.0, rollouts=9), row("nll", nll, 1.0),
                        row("grpo", grpo, 1.0)) for k in range(3)]

    claims.report({"main": seeds(nll=0.88, grpo=0.7)}, {"main": seeds(nll=0.7, grpo=0.95)})
    cells = [[cell.strip() for cell in line.split("|")[2:-1]] for line in capsys.readouterr().out.splitlines()]
    ceiling, = (line for line in cells if line and line[0].startswith("e ceiling less every opponent's"))
    assert ceiling == ["e ceiling less every opponent's (nll)", "> 0", "0.020 (0.020 – 0.020)", "met",
                       "grpo: -0.050 (-0.050 – -0.050)", "**missed**", "grpo: 0.075 (-0.069 – 0.219)", "**missed**"]


def test_a_lead_over_every_opponent_is_missed_for_one_that_is_far_behind_in_the_mean_alone():
    """Mistake: only the closest opponent was asked, while over another, on some seed ahead, nothing was certain."""
    seeds = [outcome(row("sapo", 0.5, 2.0, lr=3e-5), row("erpd", 0.9, 1.0, rollouts=9),
                     row("nll", 0.87 - k / 1000, 1.0), row("grpo", grpo, 1.0))
             for k, grpo in enumerate((0.2, 0.3, 0.95))]
    ceiling, = (s for s in claims.statistics({"main": seeds}) if s.what.startswith("e "))
    assert "(grpo)" in ceiling.what and not ceiling.met()


def test_the_map_is_of_the_cells_that_were_run(tmp_path, monkeypatch):
    """Mistake: a map that needs every cell or every method, or one of the main stages alone."""
    monkeypatch.setattr(claims_figures, "HERE", tmp_path)
    o = outcome(row("erpd", 0.9, 0.9), row("nll", 0.5, 0.9))
    claims_figures.draw({"main": [o, o]})
    assert [path.name for path in tmp_path.iterdir()] == ["frontier.png"]
    claims_figures.draw({"main": [o, o], "16 prompts": [o]})
    assert (tmp_path / "which_wins.png").stat().st_size > 10_000


def test_all_jobs_run_and_a_second_start_runs_none(tmp_path, capsys):
    """A job that is never reached in a short session; rows that are written twice after a stop."""
    stage = claims.stages()[0]
    config = replace(stage.config, problems=4, group=8, test_problems=4, test_samples=2, curve_samples=2,
                     limit_samples=4, explore_updates=2, unlearn_updates=2, distill_updates=2, operands=3,
                     explore_batch=16, distill_batch=16)
    stage = replace(stage, config=config, rates=(3e-5, 1e-4), least=16, most=16, nll_least=16, shares=())
    results = tmp_path / "claims.jsonl"
    experiments.run_stage(stage, results, tmp_path)
    told = [line.split(": ", 1)[1] for line in capsys.readouterr().err.splitlines() if line.startswith("main-s0: ")]
    lines = results.read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert {row["job"] for row in rows} == set(told)
    assert {row["method"] for row in rows} >= {name for name in claims.OPPONENTS if "KL" not in name} | {"clip + KL"}
    experiments.run_stage(stage, results, tmp_path)
    assert results.read_text().splitlines() == lines
    for values in claims.statistics(outcomes.outcomes(results)):
        assert len(values.values) == 1
    few = tmp_path / "few.jsonl"
    experiments.run_stage(replace(stage, only=("base", "control")), few, tmp_path)
    assert {json.loads(line)["job"] for line in few.read_text().splitlines()} == {"base", "control"}


def test_the_control_may_spend_its_whole_budget(tmp_path, monkeypatch):
    """Mistake: a floor under λ for the control, which stops it half of the way: no opponent is weakened."""
    bench = experiments.Bench(claims.quick_stage(), tmp_path, [])
    floors = []
    monkeypatch.setattr(erpd, "distill", lambda base, *a, **k: floors.append(a[3].lambda_floor) or base)
    monkeypatch.setattr(erpd, "within_budget", lambda base, *a: (base, 0.0))
    monkeypatch.setattr(bench, "measure", lambda *a, **k: None)
    for job in "control", "erpd, unlearned":
        experiments.jobs(bench)[job]()
    assert floors == [0.0] * 2 + [erpd.Config.lambda_floor] * 4
