"""Actions refined in the critic: what refinement may never do, when it stops, and what it says of bad requests."""

import itertools
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import stable_baselines3
import torch
from drawn import drawn
from test_gap import runs  # noqa: F401  # a fixture
from test_laws import LEARNERS

import rlamort as ra
from rlamort.cli import main
from rlamort.domain import Sphere, unit_box
from rlamort.env.make import open_env
from rlamort.measure.anytime import AUTOMATIC, CEM, GRADIENT, Played, players, return_against_time, verdict
from rlamort.measure.claims.anytime import DRAWN, EPISODES, judged, random_returns
from rlamort.measure.evaluate import refinement
from rlamort.objective import MaxQ, Objective
from rlamort.score import Interval
from rlamort.update import AUTO, Adam, Anytime, Cem, LineSearch, Projected, Worth, best

SOLVERS = {
    "line search": LineSearch,
    "cem": lambda domain: Cem(domain, 16, 4, sigma=0.5),
    "the best of cem": best(lambda domain: Cem(domain, 16, 4, sigma=0.5)),
    "adam": lambda domain: Projected(Adam(0.1), domain),
    "away from it": lambda domain: Projected(Adam(-0.5), domain),
}


@pytest.fixture(params=LEARNERS)
def agent(request, spec):
    torch.manual_seed(0)
    agent = drawn(request.param, spec, hidden=(16, 16), normalise=True).double()
    agent.observe(torch.randn(64, 3, dtype=torch.float64) * 3 + 1)
    return agent


def met(count=12):
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2


def cost(agent, x, y):
    with torch.no_grad():
        return agent.action_cost()(y, agent.normaliser(x))


def test_no_steps_is_predict_bit_for_bit(agent):
    observed = met().numpy()
    for deterministic in (True, False):
        torch.manual_seed(3)
        plain, _ = agent.predict(observed, deterministic=deterministic)
        torch.manual_seed(3)
        asked, _ = agent.predict(observed, deterministic=deterministic, refine=0, budget_us=1e-3)
        np.testing.assert_array_equal(plain, asked)
    assert agent.refined(0) is agent
    assert agent.refined(Anytime(0)) is agent


@pytest.mark.parametrize("solver", SOLVERS)
def test_refining_never_lowers_the_pessimistic_q(agent, solver):
    x = met()
    start = agent.act(x, explore=False)
    for worth in (Anytime(1).worth, Worth()):
        ends = [agent.refined(Anytime(k, worth=worth, update=SOLVERS[solver])).act(x, False) for k in (0, 1, 2, 5, 20)]
        costs = torch.stack([cost(agent, x, y) for y in (start, *ends)])
        assert (costs.diff(dim=0) <= 1e-12).all()
        assert all(agent.domain.violation(y).max() == 0 for y in ends)
        torch.testing.assert_close(ends[0], start)
    if solver == "away from it":
        return
    assert (cost(agent, x, agent.refined(Anytime(20, update=SOLVERS[solver])).act(x, False)) < costs[0] - 1e-6).any()


@pytest.mark.parametrize("refine", [3, "auto", Anytime(3, update=SOLVERS["cem"])])
def test_a_batch_is_one_by_one_and_what_is_drawn_is_the_same_at_every_call(agent, refine):
    observed = met().numpy()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batch, _ = agent.predict(observed, deterministic=True, refine=refine)
    torch.testing.assert_close(torch.get_rng_state(), before, rtol=0, atol=0)
    torch.manual_seed(1)
    alone = np.stack([agent.predict(one, deterministic=True, refine=refine)[0] for one in observed])
    np.testing.assert_allclose(batch, alone, rtol=1e-6, atol=1e-6)  # in the action space's float32


def test_what_explores_is_refined_from_its_median(agent):
    observed = met().numpy()
    exploring, _ = agent.predict(observed, refine=2)
    np.testing.assert_array_equal(exploring, agent.predict(observed, deterministic=True, refine=2)[0])


class Clock:
    """Seconds that pass when one looks: those of one cost of a step after the other."""

    def __init__(self, *ticks):
        self.now, self.ticks = 0.0, itertools.chain(ticks, itertools.repeat(0.0))

    def __call__(self):
        now = self.now
        self.now += next(self.ticks)
        return now


class Counted(LineSearch):
    """Each step takes 100 microseconds of a clock."""

    def __init__(self, domain, clock, lengths):
        super().__init__(domain)
        self.clock, self.cost = clock, iter(lengths)
        self.taken = 0

    def forward(self, *arguments):
        self.taken += 1
        self.clock.now += 1e-6 * next(self.cost)
        return super().forward(*arguments)


@pytest.mark.parametrize(
    ("budget", "each", "steps", "taken"),
    [
        (1_050, [100] * 99, None, 10),  # as many as there is time for
        (1_050, [100] * 99, 4, 4),
        (950, [100] * 99, None, 9),  # the tenth would end too late
        (1_050, [100, 600, 100, 100], None, 2),  # a step might take as long as the longest again
        (50, [100] * 99, None, 1),  # how long one takes is not known before the first
        (None, [100] * 99, 7, 7),
    ],
)
def test_a_budget_is_a_number_of_steps(budget, each, steps, taken, spec):
    agent, clock = drawn("td3", spec, hidden=(8,)), Clock()
    counted = Counted(agent.domain, clock, each)
    agent.refined(Anytime(steps, budget, update=lambda domain: counted, clock=clock)).act(met().float(), False)
    assert counted.taken == taken


def test_the_unrefined_action_is_part_of_the_budget(spec):
    agent = drawn("td3", spec, hidden=(8,))
    x = met().float()
    start = agent.act(x, False)
    late = Clock(0.002)  # it is over once the action is there, but not where the action is tried again
    asked = agent.refined(Anytime(budget_us=1_000, clock=late))
    torch.testing.assert_close(asked.act(x, False), start, rtol=0, atol=0)
    always = Clock(*[0.002] * 99)
    with pytest.raises(ra.UserError, match="budget_us=1000: the unrefined action alone takes 2000 microseconds here"):
        agent.refined(Anytime(budget_us=1_000, clock=always)).act(x, False)


def test_auto_stops_where_a_step_is_not_worth_its_cost(spec):
    """On a quadratic of which the solution is known, and with a critic that doubts it."""
    domain, x, y = unit_box(2), torch.zeros(3, 1), torch.tensor([[0.5, 0.5], [0.9, 0.0], [0.0, 0.0]])

    class Known(torch.nn.Module):
        def forward(self, x, y, members=None):
            away = (y - 1).square().sum(-1)
            return torch.stack([-away, -away + self.doubt * y.sum(-1) + self.apart])[:members]

    known = Known()
    f, known.doubt, known.apart = MaxQ(known, 0.0, 1), 0.0, 0.0
    assert (f(AUTO(f, domain, x, y), x) < 1e-6).all()
    none = replace(AUTO, worth=Worth(tolerance=1e6))
    assert torch.equal(none(f, domain, x, y)[:2], y[:2])  # no step is worth that
    known.apart = 20.0  # they agree on every gain, and it is less than they differ by
    assert torch.equal(AUTO(f, domain, x, y), y)
    known.apart = 0.1
    assert (f(AUTO(f, domain, x, y), x) < 1e-6).all()
    known.doubt = -100.0  # the second critic, which f does not ask, says that every step is worse
    assert torch.equal(AUTO(f, domain, x, y)[:2], y[:2])
    assert (f(replace(AUTO, worth=Anytime(1).worth)(f, domain, x, y), x) < 1e-6).all()


def test_a_line_search_stays_on_a_curved_set():
    class Tilted(Objective):
        def report(self, y, x):
            return (x * y).sum(-1), {}

    x, y = torch.randn(5, 3, dtype=torch.float64), torch.nn.functional.normalize(torch.randn(5, 3, dtype=torch.float64), dim=-1)
    oracle, step = Tilted().oracle(x), LineSearch(Sphere(3))
    h = step.start(y, x, oracle)
    for _ in range(60):
        y, h = step(y, h, x, oracle)
    torch.testing.assert_close(oracle.value(y), -x.norm(dim=-1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(h[0], oracle.value(y))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("theirs")
    model = stable_baselines3.SAC(
        "MlpPolicy", "Pendulum-v1", policy_kwargs={"net_arch": [16]}, device="cpu", seed=0, learning_starts=50, batch_size=16
    ).learn(300)
    model.save(folder / "sac.zip")
    stable_baselines3.PPO("MlpPolicy", "Pendulum-v1", device="cpu", n_steps=8, batch_size=8).save(folder / "ppo.zip")
    return folder, model


def test_a_file_of_stable_baselines3_is_refined_in_its_own_critic(theirs, capsys):
    folder, model = theirs
    agent = ra.load(f"sb3:{folder / 'sac.zip'}")
    observed = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)

    def q(action):
        scaled = torch.from_numpy(model.policy.scale_action(action))
        return torch.cat(model.critic(torch.from_numpy(observed), scaled), 1).amin(1).detach()

    plain, refined = (agent.predict(observed, deterministic=True, refine=k)[0] for k in (0, 5))
    assert (q(refined) >= q(plain) - 1e-5).all()
    assert (q(refined) > q(plain) + 1e-4).any()
    with pytest.raises(ra.UserError, match=r"has no critic Q\(x, y\).*no action can be refined"):
        ra.load(f"sb3:{folder / 'ppo.zip'}").predict(observed, refine=1)
    main(
        [
            "eval",
            f"sb3:{folder / 'sac.zip'}",
            "env=Pendulum-v1",
            "refine=2",
            "update=cem",
            "update.samples=9",
            "--episodes",
            "2",
        ]
    )
    assert "refine=2" in capsys.readouterr().out.splitlines()[0]


def test_without_a_critic_nothing_is_refined():
    with pytest.raises(ra.UserError, match=r"agent: Amortize has no critic Q\(x, y\)"):
        ra.SPHERE("rlamort/Sphere-v0", hidden=(8,)).score(2, refine=1)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"refine": -1}, "refine=-1: a whole number of steps, 0 or more, auto, or an Anytime is needed"),
        ({"refine": "atuo"}, "refine=atuo: a whole number"),
        ({"refine": True}, "refine=True: a whole number"),
        ({"refine": 2.5}, r"refine=2.5: a whole number"),
        ({"budget_us": 0}, "budget_us=0: microseconds, above 0, are needed"),
        ({"budget_us": float("nan")}, "budget_us=nan: microseconds"),
    ],
)
def test_bad_requests_of_python(asked, said, spec):
    with pytest.raises(ra.UserError, match=said):
        drawn("td3", spec, hidden=(8,)).predict(np.zeros(3, np.float32), **asked)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"refine": -1}, "refine=-1: a whole number"),
        ({"budget_us": -5}, "budget_us=-5: a number > 0 is needed"),
        ({"update": "cem"}, "update: nothing is refined; refine=5, refine=auto or budget_us=500 is needed, too"),
        ({"refine": 5, "tolerance": 0.1}, "tolerance=0.1: it belongs to refine=auto"),
        ({"refine": 5, "update": "recurrent"}, "update=recurrent: its step has weights to learn"),
        ({"refine": 5, "update": {"kind": "cem", "sample": 3}}, "update.sample: Cem has no such key"),
    ],
)
def test_bad_requests_of_the_command_line(keys, said, spec):
    with pytest.raises(ra.UserError, match=said):
        refinement(keys, spec)


def test_keys_are_the_refinement_that_they_name(spec):
    assert refinement({}, spec) is None
    assert refinement({"refine": 0}, spec) is None
    assert refinement({"refine": 5, "budget_us": 200}, spec) == Anytime(5, 200.0)
    assert refinement({"refine": "auto", "tolerance": 0.1}, spec) == Anytime(AUTO.steps, worth=Worth(0.1))
    asked = refinement({"budget_us": 10_000, "update": {"kind": "cem", "samples": 9}}, spec)
    assert asked.update(unit_box(2)).update.update.samples == 9


def test_return_against_time_is_paired_and_says_where_the_critic_is_wrong(runs):  # noqa: F811
    agent = ra.load(runs / "SAC").agent
    env = open_env("Pendulum-v1", count=2, max_episode_steps=20)
    x = env.reset(0)
    playing = players(agent)
    assert len(playing) == 2 + len(GRADIENT) + len(CEM)
    playing = dict(list(playing.items())[::5])
    report = return_against_time(playing, env, x, np.array([0, 1]), 2, seed=5)
    own, *others = report.data["players"]
    assert own["gained"]["mean"] == own["promised"]["mean"] == 0
    assert all(one["promised"]["mean"] >= -1e-6 and one["microseconds"] > 0 for one in others)
    assert len(report.lines) >= 2 + len(playing)

    up, down, none = Interval(1.0, 0.5, 1.5), Interval(-1.0, -1.5, -0.5), Interval(0.0, -1.0, 1.0)
    said = verdict([Played("a", 1.0, up, down), Played("b", 1.0, up, up), Played("c", 1.0, up, none)], 5)
    assert said == [
        "a: a better action in the critic is a worse one in the world: Q is higher by 1 [0.5, 1.5], "
        "and the return lower, -1 [-1.5, -0.5]",
        "better in the critic and in the world: b",
        "better in the critic, and no different in the world by 5 episodes: 1 of 3",
    ]


def test_auto_is_claimed_to_lose_nothing_in_the_worst_seed():
    policy, steady, lost = [1.0, 2.0, 3.0], [1.1, 1.9, 3.1], [0.0, 1.1, 2.1]
    names = [*DRAWN, AUTOMATIC]

    def of(auto):
        players = [{"name": name, "microseconds": 1.0 + i} for i, name in enumerate(names)]
        return {"returns": {**dict.fromkeys(DRAWN, policy), AUTOMATIC: auto}, "players": players}

    (kept,) = judged({"0": of(steady), "1": of(steady)}, [1.0, 0.0, 0.5], "Pendulum-v1, SAC after 9 steps").verdicts
    measured = judged({"0": of(steady), "1": of(lost)}, [1.0, 0.0, 0.5], "Pendulum-v1, SAC after 9,000 steps")
    assert kept.passed
    assert kept.claim.endswith("unrefined the policies return 2, 2, random actions 0.5")
    assert not measured.verdicts[0].passed
    assert measured.data["worse in the world"][AUTOMATIC] == ["1"]
    assert list(measured.figures) == ["anytime_pendulum_v1_sac_9000"]  # another figure for other steps
    for auto, outcome in ((steady, "incomplete"), (lost, "FAIL")):  # who has nothing to lose does not pass
        assert judged({"0": of(auto)}, [2.0, 2.0, 2.0], "Pendulum-v1, SAC after 9 steps").verdicts[0].outcome == outcome


def test_random_actions_are_played_in_the_same_episodes_at_every_call():
    returns = random_returns()
    assert returns == random_returns()
    assert len(returns) == EPISODES
    assert -1_600 < np.mean(returns) < -900


def test_the_page_runs_as_it_stands():
    page = (Path(__file__).parent.parent / "docs" / "anytime.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```", page, re.S | re.M)
    found = {}
    exec(block, found)
    assert found["agent"].predict(found["observation"], refine=5)[0].shape == (1,)
