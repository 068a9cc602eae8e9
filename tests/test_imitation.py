"""Behaviour cloning and DAgger: laws of labels, experts of every kind, and data that is not what it should be."""

import itertools
import time
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
from conftest import Identity
from gymnasium.wrappers import RescaleAction
from rlamort.agents.bc import BC
from test_cli import rlamort
from test_foreign import saved
from test_resume import assert_equal, timeless

import rlamort as ra
from rlamort import parts
from rlamort.agent import Player
from rlamort.domain import SquashedGaussian
from rlamort.errors import Preempted, UserError
from rlamort.measure.imitation import Imitation
from rlamort.run.demonstrate import demonstrate
from rlamort.run.learner import learner_class
from rlamort.run.recorded import Episode, joined
from rlamort.run.restore import resume
from rlamort.run.track import read_records, say
from rlamort.source import Labelled

SMALL = {"hidden": (16, 16), "batch_size": 16, "device": "cpu", "threads": 1, "eval_episodes": 2, "log_every": 10_000}
ME = "test_imitation"


class Asked:
    """The best action in `Identity`, of which every answer is counted."""

    answers = 0

    def predict(self, observation):
        type(self).answers += len(observation)
        return 1 + 2 * observation


class Remembering:
    """An expert with a memory, as Stable-Baselines3's recurrent ones: it counts steps since the episode began."""

    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        assert deterministic
        steps = np.zeros(len(observation)) if state is None else state[0]
        steps = np.where(episode_start, 0, steps)
        return (1 + steps[:, None] / 10).astype(np.float32), (steps + 1,)


class Slow(Asked):
    def predict(self, observation):
        time.sleep(0.02)
        return super().predict(observation)


UNFIT = {
    "nan": lambda x: np.full_like(x, np.nan),
    "shape": lambda x: np.zeros((len(x), 2), np.float32),
    "units": lambda x: 100 * np.ones_like(x),
    "discrete": lambda x: np.ones_like(x, dtype=int),
}
nan, shape, units, discrete = (SimpleNamespace(predict=function) for function in UNFIT.values())


def bc(env=Identity, expert=f"{ME}:Asked", method="bc", **fields):
    return learner_class(method)(env, expert=expert, **{**SMALL, **fields})


def test_a_policy_that_imitates_itself_has_loss_zero_and_moves_nothing(spec):
    for loss in (parts.Regress(parts.Labelled()), parts.Regress(parts.Labelled(), decay=0.5)):
        agent = BC(spec, loss=loss, hidden=(16,), normalise=False)
        before = {name: tensor.clone() for name, tensor in agent.model.state_dict().items()}
        x = torch.randn(32, 3)
        for _ in range(3):
            metrics = agent.update(Labelled(x, Player(agent, 32)(x, explore=False)), improve=True)
        assert metrics["model/distance"] == 0
        assert_equal(before, dict(agent.model.state_dict()))
        assert_equal(before, dict(agent.best.state_dict()))


def test_what_is_held_out_is_never_trained_on():
    trained = []
    for poison in (False, True):
        learner = bc(label_budget=120, held_out=0.25, fit_every=0)
        shown = learner.source.shown
        held = torch.from_numpy(shown.held(shown.episode))
        assert held.sum() == 30  # episodes 2, 6 and 10 of twelve, ten steps each
        if poison:
            shown.y[held], shown.x[held] = torch.nan, torch.nan
        trained.append(dict(learner.learn(50).agent.state_dict()))
    assert_equal(*trained)


def test_dagger_whose_expert_always_plays_is_behaviour_cloning():
    """On the same data and after as many updates: the same parameters, bit for bit."""
    same = {"label_budget": 60, "normalise": False, "fit_every": 20, "held_out": 0.25}
    cloned = bc(**same).learn(100)
    mixed = bc(method="dagger", beta=1, beta_decay=1, update_after=60, **same).learn(160)
    for name in ("x", "y", "played"):
        assert torch.equal(getattr(cloned.source.shown, name), getattr(mixed.source.shown, name))
    assert cloned.clock.updates == mixed.clock.updates == 100
    assert_equal(dict(cloned.agent.state_dict()), dict(mixed.agent.state_dict()))


def test_dagger_keeps_labels_beside_what_was_played():
    learner = bc(method="dagger", label_budget=40, round_labels=20, beta_decay=0, num_envs=2).learn(60)
    shown = learner.source.shown
    best = (1 + 2 * shown.x - 1) / 4  # the label in [-1, 1], of actions from -3 to 5
    torch.testing.assert_close(shown.y, best)
    assert torch.equal(shown.played[:20], shown.y[:20])
    assert not torch.isclose(shown.played[20:], shown.y[20:], atol=1e-6).any()


@pytest.mark.parametrize("method", ["bc", "dagger"])
def test_labels_are_counted_exactly(method):
    Asked.answers = 0
    learner = bc(method=method, label_budget=48, num_envs=3)
    learner.learn(60)
    assert Asked.answers == learner.source.labels == 48
    assert learner.source.complete
    with pytest.raises(UserError, match=r"label_budget=50: 3 environments.*a multiple of 3"):
        bc(method=method, label_budget=50, num_envs=3)


def test_the_mixture_is_a_share_of_actions():
    learner = bc(method="dagger", label_budget=400, beta=0.5, beta_decay=0.5, round_labels=200, update_after=10_000).learn(400)
    shares = [torch.isclose(part[0], part[1]).float().mean() for part in zip(
        learner.source.shown.played.split(200), learner.source.shown.y.split(200), strict=True)]  # fmt: skip
    assert 0.4 < shares[0] < 0.6
    assert 0.17 < shares[1] < 0.33


@pytest.mark.parametrize(("method", "expert"), [("bc", f"{ME}:Asked"), ("dagger", f"{ME}:Remembering"), ("dagger", "planner")])
def test_stopped_and_resumed_is_uninterrupted(method, expert, tmp_path):
    quick = {"kind": "planner", "keys": {"horizon": 3, "model": {"steps": 1, "update": {"samples": 8, "elites": 2}}}}
    fields = {"expert": quick if expert == "planner" else expert, "label_budget": 30, "fit_every": 10, "beta": 0.5,
              "beta_decay": 0.5, "round_labels": 10, "checkpoint_every": 7, "log_every": 10, "eval_every": 25}  # fmt: skip
    if method == "bc":
        fields = {name: value for name, value in fields.items() if "beta" not in name and name != "round_labels"}
    env = "Pendulum-v1" if expert == "planner" else f"{ME}:Unit"
    for at in (17, 45) if "Remembering" in expert else (17,):
        whole = bc(env, method=method, dir=str(tmp_path / f"whole{at}"), **fields).learn(60)
        broken = bc(env, method=method, dir=str(tmp_path / f"broken{at}"), **fields)
        with pytest.raises(Preempted):
            broken.learn(60, stop=lambda at=at, broken=broken: broken.clock.env_step >= at)
        broken.close()
        torch.rand(3)
        again, exactness = resume(tmp_path / f"broken{at}")
        assert exactness == "exact"
        again.learn(60 - again.clock.env_step, reset_num_timesteps=False)
        assert_equal(dict(whole.agent.state_dict()), dict(again.agent.state_dict()))
        one, two = whole.state(), again.state()
        one["clock"]["seconds"] = two["clock"]["seconds"] = 0
        assert_equal(one, two)
        assert timeless(tmp_path / f"whole{at}") == timeless(tmp_path / f"broken{at}")


class Unit(Identity):
    """`Identity`, as an environment that commands make by its name."""


@pytest.mark.parametrize("fields", [{}, {"loss": "likelihood"}, {"model": "mip"}], ids=str)
def test_every_loss_and_model_learns(fields):
    learner = bc(label_budget=300, learning_rate=5e-3, patience=1_000, **fields).learn(400)
    assert np.mean(learner.score(5).returns) > -0.5  # ten steps; at random they cost about 40
    records = learner.agent.fit(learner.source)
    assert records["labels"] == 300
    assert records["held_out/best"] <= records["held_out/distance"]


def test_learning_ends_when_the_loss_on_what_is_held_out_no_longer_falls():
    noisy = bc(
        expert=f"{ME}:Noisy", label_budget=200, hidden=(64, 64), learning_rate=1e-2, fit_every=10, patience=3, held_out=0.25
    )
    lines = []
    before = say.set(lines.append)
    noisy.learn(5_000)
    say.reset(before)
    assert noisy.clock.env_step < 2_000
    (line,) = lines
    assert line.startswith(f"step {noisy.clock.env_step:,}: the loss on held-out labels")
    assert "has not fallen in 3 measurements (patience)" in line
    held = noisy.source.held_out()
    losses = [noisy.agent.loss.distance(model(noisy.agent.normaliser(held.x)), held.y).mean() for model in (
        noisy.agent.best, noisy.agent.model)]  # fmt: skip
    assert losses[0] < losses[1]
    x = torch.randn(5, 1)
    torch.testing.assert_close(noisy.agent.act(x, explore=False), noisy.agent.best(noisy.agent.normaliser(x)))


class Noisy:
    """Labels with noise, which a network learns by heart."""

    def __init__(self):
        self.generator = np.random.default_rng(0)

    def predict(self, observation):
        return (1 + self.generator.uniform(-3, 3, observation.shape)).astype(np.float32)


def test_the_log_density_of_a_point_is_that_of_its_draw():
    density, lam = SquashedGaussian(3), 0.5 * torch.randn(50, 6, dtype=torch.float64)
    y, logq = density.sample(lam)
    torch.testing.assert_close(density.log_density(lam, y), logq)
    grid = torch.linspace(-1, 1, 20_001, dtype=torch.float64)[1:-1, None]
    one = density.log_density(torch.tensor([[0.3, -0.5]], dtype=torch.float64).expand(len(grid), -1), grid).exp()
    assert abs(one.sum() * (grid[1] - grid[0]) - 1).item() < 1e-6


def test_the_second_step_of_mip_is_trained_from_noisy_labels():
    """Where the network returns what it reads as an iterate, its regression is on the label plus noise of (1 - t)."""
    model = parts.TwoStep(t=0.75, hidden=())(parts.Setting(SquashedGaussian(2).parameters, 3, ()))
    with torch.no_grad():
        model.net.net[0].weight.zero_()
        model.net.net[0].bias.zero_()
        model.net.net[0].weight[:, :4] = torch.eye(4)
    y, x = torch.rand(20_000, 4) - 0.5, torch.zeros(20_000, 3)
    first, second = model.taught(x, y)
    assert (first == 0).all()
    assert abs((second - y).std() - 0.25) < 0.01
    path = model.iterates(x)
    assert path.shape == (2, 20_000, 4)
    assert (path == 0).all()


def test_experts_of_every_kind_give_their_own_actions(tmp_path):
    theirs = saved("SAC", tmp_path / "model.zip")
    ours = ra.TD3("Pendulum-v1", hidden=(8,))
    ours.save(tmp_path / "agent")
    for expert, agent in ((f"sb3:{tmp_path / 'model.zip'}", theirs), (str(tmp_path / "agent"), ours)):
        shown = bc("Pendulum-v1", expert=expert, label_budget=20).source.shown
        action, _ = agent.predict(shown.x.numpy(), deterministic=True)
        np.testing.assert_allclose(2 * shown.y.numpy(), action, atol=1e-5)


def test_an_expert_remembers_within_an_episode():
    shown = bc(expert=f"{ME}:Remembering", label_budget=40, num_envs=2).source.shown
    assert torch.allclose(shown.y[::2, 0] * 4, torch.arange(20) % 10 / 10)


def arrays(path, **changes):
    x = np.random.default_rng(0).uniform(-1, 1, (30, 1)).astype(np.float32)
    chosen = {"observations": x, "actions": 1 + 2 * x, "episode": np.arange(30) // 10, **changes}
    np.savez(path, **{name: value for name, value in chosen.items() if value is not None})
    return str(path)


def test_arrays_are_read_as_they_are(tmp_path):
    learner = bc(expert=arrays(tmp_path / "shown.npz"), held_out=0.4)
    shown = learner.source.shown
    torch.testing.assert_close(shown.y, shown.x / 2)
    assert shown.held(shown.episode).tolist() == [False] * 10 + [True] * 10 + [False] * 10
    assert bc(expert=arrays(tmp_path / "shown.npz"), label_budget=12).source.labels == 12


ODD = np.ones((30, 1), np.float32)
ODD_NAN = np.where(np.arange(30)[:, None] == 7, np.nan, ODD)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"actions": None}, "it lacks actions"),
        ({"actions": np.ones((29, 1))}, "30 observations, 29 actions"),
        ({"actions": np.ones((30, 2))}, r"actions of episode 0 have shape \(10, 2\)"),
        ({"observations": np.ones((30, 2))}, r"observations of episode 0 have shape \(10, 2\)"),
        ({"actions": ODD_NAN}, "actions are not finite in 1 of 30 steps, of which 7 is the first"),
        ({"observations": ODD_NAN}, "observations are not finite in 1 of 30"),
        ({"actions": 50 * ODD}, r"span Box\(\[50.\], \[50.\].*environment's Box\(\[-3.\], \[5.\]"),
        ({"low": -1.0, "high": 1.0}, r"are of Box\(\[-1.\], \[1.\].*Box\(\[-3.\], \[5.\].*units must be the same"),
        ({"actions": np.ones((30, 1), int)}, "discrete"),
        ({"episode": np.arange(30)[::-1]}, "never fall"),
        ({"observations": 1.0}, "observations is one value, 1.0; an array of one for every step is needed"),
        ({"low": np.zeros(2), "high": 5.0}, r"low has shape \(2,\), of float64; numbers in Box\(\[-3.\], \[5.\]"),
        ({"low": -3.0, "high": "five"}, r"high has shape \(\), of <U4; numbers in Box"),
        ({"high": 5.0}, "it has high alone; both low and high, or neither, are needed"),
        ({"low": np.nan, "high": 5.0}, r"low is \[nan\]; numbers are needed, in Box"),
    ],
)
def test_data_that_does_not_fit_is_said(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        bc(expert=arrays(tmp_path / "shown.npz", **changes))


def test_arrays_that_nothing_reads_are_named(tmp_path):
    """`episodes` for `episode`, or flags of ends, would make all steps one episode without a word."""
    ends = {"episode": None, "episodes": np.arange(30) // 10, "terminals": np.zeros(30, bool)}
    said = "shown.npz: nothing reads its episodes, terminals, only .*; without `episode` all steps are one episode"
    with pytest.warns(UserWarning, match=said):
        bc(expert=arrays(tmp_path / "shown.npz", **ends))
    with pytest.warns(UserWarning, match="nothing reads its rewards, only observations, actions, episode, low, high$"):
        bc(expert=arrays(tmp_path / "shown.npz", rewards=np.zeros(30)))


def cut(path):
    path.write_bytes(path.read_bytes()[:200])


def changed(path):
    content = bytearray(path.read_bytes())
    content[200] ^= 255
    path.write_bytes(content)


def one_array(path):
    with path.open("wb") as file:
        np.save(file, ODD)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "not a zip file"),
        (changed, "Bad CRC-32 for file 'observations.npy'"),
        (lambda path: path.write_bytes(b""), "No data left"),
        (one_array, "it holds one array, without a name"),
    ],
)
def test_a_damaged_file_is_said(damage, message, tmp_path):
    path = tmp_path / "shown.npz"
    arrays(path)
    damage(path)
    with pytest.raises(UserError, match=f"shown.npz: it cannot be read: .*{message}"):
        bc(expert=str(path))


def test_an_episode_that_is_cut_off_is_said():
    spec = bc(label_budget=10).agent.spec
    fit = Episode(np.zeros((11, 1)), np.zeros((10, 1)))
    assert len(joined([fit, Episode(np.zeros((10, 1)), np.zeros((10, 1)))], "x", spec).y) == 20
    with pytest.raises(UserError, match="episode 1 is cut off, with 4 observations for 10 actions; 10 or 11"):
        joined([fit, Episode(np.zeros((4, 1)), np.zeros((10, 1)))], "x", spec)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"expert": None}, "expert: it is missing"),
        ({"expert": "nowhere"}, "expert=nowhere: it is no folder of a run"),
        ({"expert": "none.npz"}, "cannot be read"),
        ({"expert": "sb3:none.zip"}, "expert=sb3:none.zip: none.zip: there is no such file"),
        ({"expert": "sb3:none.npz"}, "expert=sb3:none.npz: none.npz: "),
        ({"expert": "/"}, "expert=/: /: no agent is saved there"),
        ({"expert": f"{ME}:nan"}, "its label is .nan.; finite"),
        ({"expert": f"{ME}:shape"}, r"floats of shape \(1, 1\) in Box"),
        ({"expert": f"{ME}:units"}, r"between 100 and 100, lie outside Box\(\[-3.\], \[5.\]"),
        ({"expert": f"{ME}:discrete"}, "it predicts int64"),
        ({"expert": f"{ME}:ODD"}, "an object with `predict`"),
        ({"expert": f"{ME}:Slow", "expert_ms": 10}, r"a decision takes it 2\d(\.\d)? ms; expert_ms=10 are allowed"),
        ({"expert": "planner"}, "dynamics=own"),
        ({"loss": "objective"}, "f is unknown, and it needs f"),
        ({"model": "recurrent"}, "has no value"),
        ({"model": "mip", "loss": "likelihood"}, "reads labels as predictions of its own"),
        ({"held_out": 0.5}, "held_out=0.5"),
        ({"env": "CartPole-v1"}, "a Box of bounded floats is needed"),
    ],
)
def test_what_cannot_be_imitated_is_said_before_anything_starts(fields, message):
    with pytest.raises(UserError, match=message):
        bc(**{"label_budget": 20, **fields})


def test_data_sets_cannot_be_asked(tmp_path):
    with pytest.raises(UserError, match="it is a data set"):
        bc(method="dagger", expert=arrays(tmp_path / "shown.npz"))
    with pytest.raises(UserError, match=r"label_budget=31: .*has 30 labels"):
        bc(expert=arrays(tmp_path / "shown.npz"), label_budget=31)


def test_an_expert_of_other_bounds_is_said_with_both(tmp_path):
    ra.TD3("Pendulum-v1", hidden=(8,)).save(tmp_path / "agent")
    with pytest.raises(UserError, match=r"its action space is Box\(\[-1.\].*agent's is Box\(\[-2.\]"):
        bc(lambda: RescaleAction(gymnasium.make("Pendulum-v1"), -1, 1), expert=str(tmp_path / "agent"))


def test_minari(tmp_path, monkeypatch):
    """A data set that was made here is read as it was shown; without Minari that is said."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    try:
        import minari  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match=r"pip install 'rlamort\[minari\]'"):
            demonstrate("planner", "minari:pendulum/own-v0", "NoSuch-v0", 3)  # before any work
        with pytest.raises(UserError, match=r"pip install 'rlamort\[minari\]'"):
            bc("Pendulum-v1", expert="minari:pendulum/own-v0")
        return
    ours = ra.TD3("Pendulum-v1", hidden=(8,))
    ours.save(tmp_path / "agent")
    demonstrate(str(tmp_path / "agent"), "minari:pendulum/own-v0", "Pendulum-v1", 230)
    demonstrate(str(tmp_path / "agent"), str(tmp_path / "own.npz"), "Pendulum-v1", 230)
    with pytest.raises(UserError, match="it exists already"):
        demonstrate("planner", "minari:pendulum/own-v0", "NoSuch-v0", 3)  # before any work
    one, two = (bc("Pendulum-v1", expert=name).source.shown for name in ("minari:pendulum/own-v0", str(tmp_path / "own.npz")))
    assert_equal(one.state(), two.state())
    with pytest.raises(UserError, match="units must be the same"):
        bc("InvertedDoublePendulum-v5", expert="minari:pendulum/own-v0")


def test_from_the_command_line(tmp_path, monkeypatch):
    ra.TD3("Pendulum-v1", hidden=(8,)).save(tmp_path / "agent")
    said = rlamort("demonstrate", "agent", "--out", "shown.npz", "env=Pendulum-v1", "labels=210", cwd=tmp_path).stdout
    assert "210 labels of expert=agent on Pendulum-v1, mean return" in said
    quick = ["env=Pendulum-v1", "steps=20", "eval_episodes=2", "hidden=[8]", "fit_every=5", "log_every=10", "video=false"]
    rlamort("train", "bc", "expert=shown.npz", "held_out=0.3", "dir=bc", *quick, cwd=tmp_path)
    assert any(record.get("labels") == 210 for record in read_records(tmp_path / "bc"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"shown.npz: it exists already"):
        demonstrate("agent", "shown.npz", "Pendulum-v1")
    with pytest.raises(UserError, match=r"--out shown.npz/new.npz: .*/shown.npz is a file; a folder is needed"):
        demonstrate("nobody", "shown.npz/new.npz", "Pendulum-v1")
    with pytest.raises(UserError, match=r"FILE.npz or minari:ID is needed"):
        demonstrate("agent", "shown", "Pendulum-v1")


def test_verdicts_follow_from_the_numbers():
    claim = Imitation(
        "dagger", "E", "planner", {"dagger": [10, 20], "bc": [20, 40]}, [0, 1], 5, 2, beside="bc", fewer=0.5, faster=100
    )
    results = {claim.expert_key(): {"returns": [-100, -100], "random": [-1100, -1100]}}
    returns = {("dagger", 10): -300, ("dagger", 20): -120, ("bc", 20): -500, ("bc", 40): -140}
    for (row, budget), value in returns.items():
        for seed in (0, 1):
            results[claim.key(row, budget, seed)] = {"returns": [value, value], "seconds": {"policy": 1e-4, "expert": 9e-3}}
    verdicts = claim.judge(results)
    assert [one.measured for one in verdicts] == ["0.98", "0.5x", "90x"]
    assert [one.passed for one in verdicts] == [True, True, False]
    assert claim.needed("bc", results) == 40
    assert claim.waiting({}) == "E, planner: 9 runs to go"
    assert "| `bc` | 20 | 0.600 [0.600, 0.600] |" in claim.report(results)


@pytest.mark.parametrize(
    ("ours", "theirs", "measured", "outcome", "lacking"),
    [
        (10, 40, "0.25x", "pass", ""),  # at most: dagger may need fewer than its smallest budget
        (10, 20, "0.5x", "incomplete", "runs of bc with fewer than 20 labels"),  # at least: so may bc
        (20, 20, "1x", "FAIL", ""),  # at least
        (20, 99, "0.5x", "pass", ""),  # bc does not get there, which counts as 40
        (99, 20, "infx", "FAIL", ""),
        (20, 30, "0.6667x", "FAIL", ""),
        (10, 15, "0.6667x", "incomplete", "runs of dagger with fewer than 10 labels"),  # at most
    ],
)
def test_a_need_that_no_budget_is_below_decides_nothing(ours, theirs, measured, outcome, lacking):
    budgets = {"dagger": [10, 20], "bc": [5, 15, 30, 40] if theirs in (15, 30) else [20, 40]}
    claim = Imitation("dagger", "E", "planner", budgets, [0, 1], 5, 2, beside="bc", fewer=0.5)
    results = {claim.expert_key(): {"returns": [-100, -100], "random": [-1100, -1100]}}
    for row, need in (("dagger", ours), ("bc", theirs)):
        for budget, seed in itertools.product(budgets[row], claim.seeds):
            results[claim.key(row, budget, seed)] = {"returns": [-120 if budget >= need else -500] * 2}
    verdict = claim.judge(results)[-1]
    assert (verdict.measured, verdict.outcome, verdict.missing) == (measured, outcome, lacking)
    assert (f"of bc, at most {theirs}" in verdict.claim) == (theirs == budgets["bc"][0])


def test_an_expert_that_is_trained_anew_is_learned_from_anew(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    claim = Imitation("bc", "E", "sac", {"bc": [10]}, [0, 1], 5, 2, expert_steps=7)
    keys = [claim.expert_key(), *(claim.key("bc", 10, seed) for seed in (0, 1))]
    before = {key: {"policy": None} for key in keys}
    assert claim.due(before) == []
    assert [task.key for task in claim.due({key: before[key] for key in keys[:2]})] == keys  # its expert is not there any more
    agent = tmp_path / claim.path / "agent.safetensors"
    agent.parent.mkdir(parents=True)
    agent.write_bytes(b"weights")
    assert [task.key for task in claim.due({key: before[key] for key in keys[:2]})] == keys
    again = before | {keys[0]: {"policy": claim._policy()}}
    assert [task.key for task in claim.due(again)] == keys[1:]
