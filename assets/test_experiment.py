"""assets/experiment.py and real_model.py: formulas against simulations, and the wrappers on iterations by hand.

    make test-assets
"""

import copy
import functools
import math
import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))

import pipo  # noqa: E402
from test_pipo import (  # noqa: E402, F401 (fixtures, too)
    folder, graded_by_coin, on_paper, section_of, table_rows, three_weights)

torch.set_num_threads(1)


def test_a_steady_rise_has_the_same_xi_however_fast_it_is(on_paper):
    """On steady progress PIPO is a constant replay. By the tracker itself."""
    for K, pace in (4, 0.03), (8, 0.03), (8, 1e-4), (16, 1e-4):
        tracker = pipo.ImprovementTracker(K)
        tracker.history.extend(0.2 + pace * i for i in range(K))
        assert tracker.feedback(0.2 + pace * K).xi == pytest.approx(on_paper.perfect_xi(K), rel=1e-6)


def test_the_noise_of_a_mean_reward_by_drawing_prompts_and_samples(on_paper):
    """Plain, held against rates known, and against rates from earlier samples or of a class."""
    random, Q, G, n = np.random.default_rng(0), 16, 8, 40_000
    centre = random.choice([0.2, 0.5, 0.8], (n, Q))  # of the class
    p = centre + random.choice([-0.1, 0.1], (n, Q))
    between, within, explained = 0.06 + 0.01, np.mean(p * (1 - p)), 0.06 / 0.07
    mean, earlier = random.binomial(G, p) / G, random.binomial(4, p) / 4
    for measured, formula in (
            (mean, on_paper.reward_variance(between, within, Q, G)),
            (mean - p, on_paper.paired_variance(between, within, Q, G)),
            (mean - earlier, on_paper.paired_variance(between, within, Q, G, earlier=4)),
            (mean - centre, on_paper.paired_variance(between, within, Q, G, explained=explained))):
        assert measured.mean(1).var() == pytest.approx(formula, rel=0.05)


def test_how_much_xi_knows_by_simulating_runs(on_paper):
    """The numerator as the formula says; xi itself within 0.03 of it where noise prevails, 0.06 where it is even."""
    random, n = np.random.default_rng(0), 100_000
    for K in (8, 16):
        for step in (0.1, 0.3, 1.0):  # in standard deviations of the noise
            changes = step * (0.3 + random.standard_normal((n, K + 1)))  # with a steady part
            mu = changes.cumsum(1) + random.standard_normal((n, K + 1))
            gap, formula = mu[:, K] - mu[:, :K].mean(1), on_paper.xi_correlation(step, 1.0, K)
            assert np.corrcoef(gap, changes[:, K])[0, 1] == pytest.approx(formula, abs=0.01)
            xi = gap / mu[:, :K].std(1, ddof=1)
            assert np.corrcoef(xi, changes[:, K])[0, 1] == pytest.approx(formula, abs=0.03 if step < 1 else 0.06)
    variance = on_paper.reward_variance(0.1, 0.1, on_paper.prompts_needed(0.4, 0.01, 0.1, 0.1, 8, 8), 8)
    assert on_paper.xi_correlation(0.01, variance, 8) == pytest.approx(0.4)
    assert on_paper.prompts_needed(0.6, 0.01, 0.1, 0.1, 8, 8) == math.inf  # its numerator cannot reach 0.57 at K = 8


def test_pairing_takes_out_the_luck_of_the_draw(on_paper):
    """Three easy prompts for one hard: mu says 0.7, the policy's rate is 0.5, then 0.6 when each rose by 0.1."""
    pairing = on_paper.Paired(("easy", "hard"))
    for _ in range(60):
        pairing([0.9, 0.1], ["easy", "hard"])
    assert pairing([0.9, 0.9, 0.9, 0.1], ["easy", "easy", "easy", "hard"]) == pytest.approx(0.5, abs=0.01)
    assert pairing([1.0, 1.0, 1.0, 0.2], ["easy", "easy", "easy", "hard"]) == pytest.approx(0.6, abs=0.02)


def test_gradient_distortion_against_monte_carlo_on_a_softmax_bandit(on_paper):
    """The mean GRPO gradient of a two-armed bandit over that of p. Guards against a mixed-up conditioning."""
    torch.manual_seed(0)
    p, G, n = 0.1, 8, 400_000
    rewards = (torch.rand(n, G) < p).float()
    spread = rewards.std(1, correction=0, keepdim=True)
    advantages = torch.where(spread > 0, (rewards - rewards.mean(1, keepdim=True)) / spread, 0.0)
    score = rewards - p  # d log pi(arm) / d logit
    gradient = (advantages * score).mean(1)
    for estimate, conditional in (gradient, False), (gradient[spread[:, 0] > 0], True):
        eta, error = estimate.mean() / (p * (1 - p)), estimate.std() / len(estimate) ** 0.5 / (p * (1 - p))
        assert abs(eta - on_paper.gradient_distortion(p, G, conditional)) < 4 * error < 0.05
    for p, conditional, eta in (0.01, True, 33.8), (0.5, True, 1.87), (0.1, False, 2.33), (0.01, False, 2.61):
        assert math.isclose(on_paper.gradient_distortion(p, 8, conditional), eta, rel_tol=4e-3)
    assert math.isclose(on_paper.gradient_distortion(1e-9, 8), math.sqrt(7), rel_tol=1e-6)


def test_what_follows_a_harm_by_hand(on_paper):
    """Guards against rows off by one, and a harm that is charged with the next one's fall."""
    J = [0.5] * 12 + [0.5, 0.47, 0.46, 0.5, 0.51, 0.51, 0.3, 0.3]  # harms at rows 12 and 17
    xi = [None] * 9 + [1.0, 2.0, 3.0, 1.5, -1.0, -2.0, 0.0, 0.0, 0.0, -3.0, -3.0]
    columns = {"J": J, "xi": xi, "harm": [int(t in (12, 17)) for t in range(20)]}
    run = dict(arm="pipo", seed=0, failed=None, rows=20, columns=columns)
    first, = on_paper.aftermath(run)  # of the second too little is known
    assert first[:6] == pytest.approx([0, -3, -4, 0, 1, 1]) and np.isnan(first[6:]).all()
    after, free = on_paper.told_apart([run], 1)
    assert after.tolist() == [-1.0, -3.0] and free.tolist() == [1.0, 2.0, 3.0, 1.5]
    report = on_paper.harm_report([run])["pipo"]
    assert (report["lost"], report["back"], report["area_1"]) == (pytest.approx(4), 3, 1.0)


def test_harm_roll_back_and_a_tracker_that_hears_something_else(on_paper):
    """The experiment's wrappers around an iteration that only records what it was given."""
    rewards, seen = torch.tensor([[1.0, 0.0]]), []
    model = torch.nn.Linear(1, 1)
    optimizer = pipo.MasterAdamW(model.parameters(), "cpu", lr=0.1)
    run = pipo.Run(model, None, optimizer, pipo.ImprovementTracker(2))

    def iteration(run, problems, cfg):
        run.step += 1
        seen.append((pipo.group_advantages(rewards)[0, 0].item(), cfg.lr, model.weight.item()))
        model.weight.grad = torch.ones(1, 1)
        optimizer.step()
        run.tracker.push(0.0)
        return None, {"xi": next(xis)}

    cfg = pipo.Config(lr=1.0)
    xis = iter([None, None, None, 0.5, -3.0, 0.0])
    for kind in ("inverted", "tenfold"):
        run.step = 0
        on_paper.sabotaged(iteration, kind, [1])(run, [], cfg)
    assert [(advantage > 0, lr) for advantage, lr, _ in seen] == [(False, 1.0), (True, 10.0)]
    assert pipo.group_advantages(rewards)[0, 0] > 0  # nothing stays changed
    seen.clear()
    rolling = on_paper.rolling_back(iteration, -2.0)
    rows = [rolling(run, [], cfg)[1] for _ in range(4)]
    assert [row["rolled_back"] for row in rows] == [0, 0, 1, 0]
    assert seen[3][2] == seen[1][2] != seen[2][2]  # as before the step that the third iteration judged
    told = on_paper.telling(run.tracker)
    told["mu"] = 7.0
    run.tracker.push(0.0)
    assert run.tracker.history[-1] == 7.0


def test_a_tick_and_what_is_undone(on_paper):
    """A gradient of zero moves weights by their momentum; undone, weights, moments and rate are as before."""
    model, optimizer, direction = three_weights()
    before, state = model.weight.detach().clone(), copy.deepcopy(optimizer.state_dict())
    with on_paper.undone(model, optimizer):
        on_paper.tick(optimizer, 0.02)
        assert ((model.weight - before) * direction > 0).all() and model.weight.grad is None
    assert model.weight.equal(before) and optimizer.param_groups[0]["lr"] == 0.01
    for name, value in state["adam"]["state"][0].items():
        assert optimizer.state[optimizer.masters[0]][name].equal(value)


def test_other_verification_steps(on_paper, monkeypatch):
    """Each kind on the step that pipo takes for phi < 0; pipo's own is the same, and nothing stays changed."""
    def update(model, optimizer, batch, coefficients, objective=None, lr=None):
        steps.append((optimizer is shared, optimizer.param_groups[0]["betas"][0]))
        model.weight.grad = -coefficients.sum() * direction[None]
        optimizer.step()
        optimizer.zero_grad()
        return {"grad_norm": 1.0}

    def iteration(run, problems, cfg):
        batch = SimpleNamespace(advantages=advantages)
        step_on = functools.partial(pipo.update, run.model, run.optimizer)
        if phi:
            step_on(run.previous, phi * advantages, lr=cfg.lr)
        step_on(batch, advantages, lr=cfg.lr)
        run.previous = batch
        return batch, {"seconds_verification": 1.0}

    monkeypatch.setattr(pipo, "update", update)
    monkeypatch.setattr(on_paper, "favour", lambda model, *_: (model.weight @ direction).item())
    cfg, advantages, ends, rows = pipo.Config(lr=0.01, window=2), torch.tensor([[1.0, 0.0]]), {}, {}
    for kind in (None, "adamw", "tick", "tick always", "own moments", "beta1 0"):
        model, shared, direction = three_weights()
        model.weight.data.zero_()
        run, steps, phi = pipo.Run(model, None, shared, pipo.ImprovementTracker(2)), [], 0.0
        run.tracker.push(0.0)
        one = on_paper.second_step(iteration, kind) if kind else iteration
        one(run, [], cfg)  # the window is one short: no kind does anything
        run.tracker.push(0.0)
        assert len(steps) == 1
        steps, phi = [], -0.1
        rows[kind] = one(run, [], cfg)[1]
        took = [step for step in steps if step != (True, 0.9)]
        assert took == {"own moments": [(False, 0.9)], "beta1 0": [(True, 0.0)]}.get(kind, [])
        assert len(steps) == (1 if kind in ("tick", "tick always") else 2) and pipo.update is update
        moments = shared.state[shared.masters[0]]
        ends[kind], phi, count = model.weight.detach().clone(), 0.0, moments["step"].item()
        one(run, [], cfg)
        assert shared.state[shared.masters[0]]["step"] - count == (2 if kind == "tick always" else 1)
    assert ends[None].equal(ends["adamw"])
    assert 0 < rows["adamw"]["pi_gain"] < rows["adamw"]["tick_gain"] == rows["tick"]["pi_gain"]
    assert rows["own moments"]["pi_gain"] < 0 and rows["beta1 0"]["pi_gain"] < 0
    assert rows["beta1 0"]["tick_gain"] == pytest.approx(0, abs=1e-3)  # decay alone


def test_noise_and_shuffled_feedback_by_hand(on_paper, monkeypatch):
    """Training rewards alone are flipped, by seed and step; phi is that of an earlier xi, none before there is one."""
    def iteration(run, problems, cfg):
        run.step += 1
        seen.append(pipo.grade_all(None, None, None)[0])
        xi = next(xis)
        feedback = None if xi is None else pipo.Feedback(xi, run.tracker.phi(xi), 0.5, 0.1)
        return None, dict(zip(("coefficient", "feedback"), pipo.feedback_coefficient(feedback, run, cfg)))

    rewards, seen, xis = torch.ones(4, 50), [], iter([None, -2.0, 1.0, None, 3.0])
    monkeypatch.setattr(pipo, "grade_all", lambda *given: (rewards, {}))
    run, cfg = pipo.Run(None, None, None, pipo.ImprovementTracker(8)), pipo.Config(seed=3)
    one = on_paper.shuffled(on_paper.noisy(iteration, 0.1))
    rows = [one(run, [], cfg)[1] for _ in range(5)]
    assert [row["feedback"] for row in rows[:4]] == ["warmup", "warmup", "negative", "warmup"]
    assert rows[2]["coefficient"] == pytest.approx(-0.2)  # -2 is the only one before
    drawn = torch.randint(2, (), generator=pipo.rng("cpu", 3, "xi", 5))
    assert rows[4]["coefficient"] == pytest.approx((-0.2, 1.0)[drawn])
    for step, graded in enumerate(seen, 1):
        flipped = torch.rand(4, 50, generator=pipo.rng("cpu", 3, "noise", step)) < 0.1
        assert graded.equal(torch.where(flipped, 0.0, 1.0)) and 0 < flipped.sum() < 60
    assert pipo.grade_all(None, None, None)[0] is rewards  # outside of an iteration


def test_a_worker_does_a_whole_run(on_paper, folder, graded_by_coin, tmp_path, monkeypatch):
    """Guards against a clock in place of pipo's that lacks what a run asks of it, and an optimizer unlike pipo's."""
    monkeypatch.setattr(pipo, "time", pipo.time)  # to be as before, like what else set_up_worker changes
    monkeypatch.setattr(os, "nice", lambda _: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    shutil.copytree(folder / "model", tmp_path / "start")
    for name in ("train", "eval"):
        shutil.copy(folder / "train.jsonl", tmp_path / f"{name}.jsonl")
    on_paper.set_up_worker()
    settings = dict(steps=3, prompts_per_step=4, window=2, eval_every=3, lr=1e-3, feedback="constant", constant=-0.5)
    job = dict(condition="x", arm="own", seed=0, settings=settings | dict(second="own moments"))
    result = on_paper.perform(job, tmp_path, "start")
    assert result["rows"] == 4 and not result["failed"]
    assert result["columns"]["feedback"] == [None, "warmup", "warmup", "negative"]
    assert all(result["columns"][name][3] for name in ("pi_gain", "tick_gain", "seconds_verification"))


@pytest.fixture
def real_model(monkeypatch):
    """assets/real_model.py, without its model."""
    monkeypatch.syspath_prepend(HERE / "assets")
    import real_model
    return real_model


def test_the_real_models_sums_are_understood_and_held_out(real_model):
    """Guards against a form of answer that the verifier does not know, and sums that are there twice."""
    rows = real_model.sums(20)
    assert len({row["prompt"][-1]["content"] for row in rows}) == real_model.EVAL + real_model.TRAIN
    question, shown = rows[0]["prompt"][-1]["content"], rows[0]["prompt"][1]["content"]
    assert eval(question.rstrip("?")) == int(rows[0]["answer"])
    assert pipo.extract_answer(shown) == "7" and question != rows[0]["prompt"][0]["content"]
    for arm, own in real_model.ARMS.items():  # settings that pipo takes
        settings = real_model.SETTINGS | own
        settings.pop("largest")
        pipo.settled(pipo.Config(model="x", dataset="x", eval_dataset=["x"], **settings))


def test_an_evaluation_says_how_many_have_an_answer(real_model, monkeypatch):
    """Guards against a share over other texts than those graded, and against functions that stay replaced."""
    texts = ["The answer is 7.", "No idea", "The answer is 9.", "The answer is 1."]
    problems = [SimpleNamespace(text=text) for text in ("3 + 4?", "5 + 4?")]
    batch = SimpleNamespace(texts=texts)
    graded = lambda *_: "graded"  # noqa: E731
    monkeypatch.setattr(pipo, "grade_all", graded)
    evaluate = real_model.with_answers(lambda *_: {"told": pipo.grade_all(batch, problems, None)})
    row = evaluate(None, {}, SimpleNamespace(eval_samples=2))
    assert row["told"] == "graded" and row["eval_answered"] == 0.75 and pipo.grade_all is graded
    assert row["eval_said"] == "3 + 4? 'The answer is 7.'; 5 + 4? 'The answer is 9.'"


def test_the_real_models_figure_and_table_from_packed_runs(real_model, tmp_path, capsys, monkeypatch):
    """Guards against a gap that is not paired by seed, or taken to another task; and a run done twice."""
    import experiment
    done, steps = {}, real_model.SETTINGS["steps"]
    for arm, gain in (("grpo", 0.0), ("pipo", 0.1), ("pipo-50", -0.3)):
        for seed in range(2):
            rows = [{"step": step, "eval_pass@1": 0.2 + step / 100 + gain * (step > 0) + seed / 20,
                     "eval_answered": 0.6 + step / 100, "eval_said": f"3 + 4? '{step}'", "eval_stderr": 0.02,
                     "grad_norm": 1.0, "completion_length": 8.0, "seconds_sample": 2.0}
                    for step in range(0, steps + 1, 8)]
            done[arm, seed] = dict(condition="smollm2", arm=arm, seed=seed, failed=None, rows=len(rows),
                                   settings=real_model.SETTINGS | real_model.ARMS[arm],
                                   columns=experiment.to_columns(rows))
    experiment.pack(tmp_path, "smollm2", done)
    args = SimpleNamespace(into=tmp_path, runs=tmp_path, arms=list(real_model.ARMS), seeds=range(2))
    real_model.figure(args)
    told = capsys.readouterr().out
    grpo, pipo_row, other = [line.split("|") for line in told.splitlines() if line.startswith("| ")][2:]
    assert (tmp_path / "smollm2.png").stat().st_size > 5_000 and "3 + 4? '0'\n  -> 3 + 4? '24'" in told
    assert grpo[4].strip() == "46.5 ± 31.8" and pipo_row[5].strip() == "+10.0 ± 0.0" and not other[5].strip()
    args.arms = ["pipo"]
    real_model.run(args)
    assert "6 runs are there already, 0 to do" in capsys.readouterr().out
    monkeypatch.setitem(real_model.SETTINGS, "lr", 1.0)
    with pytest.raises(SystemExit, match="other settings"):
        real_model.run(args)


def test_the_readmes_table_is_of_the_packed_runs(real_model):
    """Guards against a README that was not changed with the runs."""
    import experiment
    runs = experiment.read_pack(HERE / "assets", "smollm2", real_model.ARMS)
    arms = {arm: [run for run in runs if run["arm"] == arm] for arm in real_model.KEPT}
    packed = [row for row in table_rows(real_model.table(arms)) if "---" not in row[0]][1:]
    told = [row for row in table_rows(section_of(HERE / "README.md", "A real small model")) if "---" not in row[0]][1:]
    assert len(told) == len(arms) == 5 and all(len(some) == 4 for some in arms.values())
    for label, end, gap, equal_time, seconds in told:
        row, = [row for row in packed if row[0] == label]
        assert [end, gap, equal_time, seconds] == [row[i].replace(" ", "") for i in (3, 4, 6, 9)]
