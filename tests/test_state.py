"""What an environment holds is saved, or named, and a resume is called what it is."""

import collections
import types
from pathlib import Path

import counting
import gymnasium
import numpy as np
import pytest
import torch
from counting import SMALL
from gymnasium.wrappers import FrameStackObservation, TransformReward
from test_resume import assert_equal, everything

import rlamort as ra
from rlamort.env.copies import equal
from rlamort.env.snapshot import Snapshot
from rlamort.env.state import Reader, Unlike, Writer
from rlamort.errors import Preempted
from rlamort.run.checkpoint import _pack, _unpack
from rlamort.run.restore import resume

FIELDS = {
    **SMALL, "buffer_size": 500, "eval_every": 30, "eval_episodes": 1, "log_every": 20, "checkpoint_every": 1000,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _as_in_a_new_process():
    _begin()


def _begin():
    """What a class or module holds, as it is when a process begins."""
    counting.ClassAttribute.total = counting.COUNTS["observed"] = counting.number = 0


def stopped_and_resumed(kind, folder, at=41, **fields):
    """An uninterrupted run, and one that was stopped and gone on with; how exact that is said to be."""
    fields = {**FIELDS, **fields}
    whole = ra.TD3(kind, dir=str(folder / "whole"), **fields).learn(90)
    _begin()
    broken = ra.TD3(kind, dir=str(folder / "broken"), **fields)
    with pytest.raises(Preempted):
        broken.learn(90, stop=lambda: broken.clock.env_step >= at)
    broken.close()
    _begin()
    torch.rand(3)
    np.random.random(3)
    again, exactness = resume(folder / "broken")
    again.learn(90 - again.clock.env_step, reset_num_timesteps=False)
    return whole, again, exactness


HELD = [
    counting.Nested, counting.Sampler, counting.ClassAttribute, counting.ModuleGlobal, counting.Rebound,
    counting.GlobalGenerators, counting.Tuples, counting.Parts, counting.FunctionAttribute, counting.Generators,
]  # fmt: skip


WORKERS = {"num_envs": 3, "vectorization": "async", "num_workers": 2}


@pytest.mark.parametrize(
    ("kind", "rows"),
    [*((kind, {}) for kind in HELD), *((kind, WORKERS) for kind in (counting.Nested, counting.GlobalGenerators))],
    ids=lambda value: getattr(value, "__name__", "workers" if value else "here"),
)
def test_what_is_held_is_saved_wherever_it_is_held(kind, rows, tmp_path):
    whole, again, exactness = stopped_and_resumed(kind, tmp_path, **rows)
    assert exactness == "exact"
    assert_equal(everything(whole), everything(again))
    whole.close()
    again.close()


def test_a_model_that_changes_is_saved(tmp_path):
    def env():
        return counting.Heavier(gymnasium.make("Hopper-v5"))

    fields = {**FIELDS, "max_episode_steps": 15}
    with pytest.warns(UserWarning, match="no command can make it again"):
        whole = ra.TD3(env, dir=str(tmp_path / "whole"), **fields).learn(90)
    with pytest.warns(UserWarning, match="no command can make it again"):
        broken = ra.TD3(env, dir=str(tmp_path / "broken"), **fields)
    with pytest.raises(Preempted):
        broken.learn(90, stop=lambda: broken.clock.env_step >= 41)
    broken.close()
    again, exactness = resume(tmp_path / "broken", env=env)
    assert exactness == "exact"
    again.learn(90 - again.clock.env_step, reset_num_timesteps=False)
    assert_equal(everything(whole), everything(again))


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        (counting.Iterator, "Iterator.numbers holds a range_iterator, whose state cannot be read"),
        (counting.Clock, "a copy in the same state gave another observation, so it holds something that was not found"),
    ],
)
def test_what_cannot_be_saved_is_named_and_the_episode_ends(kind, part, tmp_path):
    whole, again, exactness = stopped_and_resumed(kind, tmp_path)
    assert exactness == "exact but for the episode"
    assert again.source.env.unsaved == (part,)
    assert again.clock.env_step == whole.clock.env_step == 90
    whole.close()
    again.close()


@pytest.mark.parametrize("wrap", [lambda env: FrameStackObservation(env, 3), lambda env: TransformReward(env, of_a_script)])
def test_wrappers_are_put_back_exactly(wrap):
    """Of frames that are one array after a reset, and with functions of a script around an environment of a library."""
    row = Snapshot(lambda: wrap(gymnasium.make("Pendulum-v1")), 0)
    row.reset(seed=0)
    row.prove()
    for _ in range(30):
        row.step(np.ones(1, np.float32))
    assert row.snapshot()["unsaved"] == []


def of_a_script(reward):
    return 2 * reward


of_a_script.__module__ = "__main__"


def test_arrays_that_were_one_do_not_overwrite_each_other():
    one, other = Anything(a=np.zeros(2), b=np.ones(2), c=[1], d=[2]), Anything(a=np.zeros(2), c=[])
    other.b, other.d = other.a, other.c
    there_and_back(one, other)
    assert (other.a.tolist(), other.b.tolist(), other.c, other.d) == ([0, 0], [1, 1], [1], [2])


def test_a_method_that_was_put_in_the_place_of_another_stays_there():
    def method(self):
        return "another"

    one, other, without = Anything(), Anything(), Anything()
    for changed in (one, other):
        changed.method = types.MethodType(method, changed)
    there_and_back(one, other)
    assert other.method() == "another"
    with pytest.raises(Unlike, match="method is no method of a Anything"):
        there_and_back(one, without)


def test_a_hidden_state_shows_when_a_copy_plays_beside(tmp_path):
    """A closure that every environment makes anew under the same name: found by play, since two of them look alike."""

    class Deep(counting.Pay):
        def __init__(self):
            super().__init__()
            calls = [lambda n=n: n for n in range(3)]  # constants by name, and yet the choice among them is state
            self.calls, self.at = calls, calls[0]

        def observe(self):
            self.at = self.calls[(self.at() + 1) % 3]
            return np.array([self.at()], np.float32)

    row = Snapshot(Deep, 0)
    row.reset(seed=0)
    row.prove()
    for _ in range(30):
        row.step(np.zeros(1, np.float32))
    assert row.snapshot()["unsaved"]


@pytest.mark.parametrize("kind", [*HELD, counting.Pay], ids=lambda kind: kind.__name__)
def test_proving_leaves_no_trace(kind):
    def play(proving):
        _begin()
        np.random.seed(0)
        counting.random.seed(0)
        torch.manual_seed(0)
        row = Snapshot(kind, 0)
        seen = [row.reset(seed=3)[0]]
        for i in range(40):
            if proving and i % 15 == 2:
                row.prove()
            observation, _, terminated, truncated, _ = row.step(np.full(1, 0.3, np.float32))
            seen.append(observation)
            if terminated or truncated:
                seen.append(row.reset()[0])
        return np.stack(seen), row.unproved

    (one, _), (other, unproved) = play(False), play(True)
    assert np.array_equal(one, other)
    assert unproved == ()


def there_and_back(one, other):
    """The state of one object, through a checkpoint's file format, into another."""
    reader = Reader([one])
    tree = [reader.layer(one), reader.shared()]
    tree = _unpack(*_pack(tree))
    assert not reader.lost
    writer = Writer([other])
    writer.layer(tree[0], other)
    writer.shared(tree[1])
    return tree


class Anything:
    """An object that holds all kinds of things."""

    def __init__(self, **held):
        vars(self).update(held)

    def method(self):
        return self


VALUES = {
    "numbers": lambda: [1, 2.5, True, None, "text", float("inf"), 10**30, np.float32(0.1), np.int64(-3), np.bool_(True)],
    "containers": lambda: ((1, [2, (3,)]), {"a": {1, 2}, (1, 2): frozenset({3}), 4: ()}, {"z": 1, "a": 2}),
    "arrays": lambda: [np.arange(6.0).reshape(2, 3), np.array(3), np.zeros((0, 2)), np.array([True]), np.uint16([1, 65535])],
    "objects in an array": lambda: np.array([None, [1], "a"], dtype=object),
    "tensors": lambda: [torch.arange(3), torch.randn(2, 2), torch.tensor(1.5, dtype=torch.bfloat16)],
    "deques": lambda: collections.deque([1, 2], maxlen=3),
    "a default dict": lambda: collections.defaultdict(list, {"a": [1]}),
    "objects": lambda: Anything(a=Anything(b=[Anything()]), c=(Anything(d=1),)),
    "values": lambda: [np.dtype("float32"), Path("a/b"), range(3), slice(1, 2), 1 + 2j, b"ab"],
    "a module": lambda: torch.nn.Linear(2, 2),
}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_there_and_back(name):
    one, other = Anything(x=VALUES[name]()), Anything(x=VALUES[name]())
    first = there_and_back(one, other)
    assert equal(first, there_and_back(other, one))
    assert type(other.x) is type(one.x)
    if name == "containers":
        assert other.x == one.x
        assert list(other.x[2]) == ["z", "a"]
    if name == "deques":
        assert other.x.maxlen == 3


class Scripted(gymnasium.Env):
    """Of a script, as its module says; what it holds is shared by all."""

    __module__ = "__main__"
    played = [0]  # noqa: RUF012


class Imported(Scripted):
    """Of a module, which the script's is a base of."""


def test_a_scripts_classes_are_found_beside_a_modules():
    first = Imported()
    reader = Reader([first])
    reader.layer(first)
    trees = reader.shared()
    assert any("__main__" in place for place in trees)
    Scripted.played[0] = 7
    Writer([first]).shared(trees)
    assert Scripted.played == [0]


class Bound(gymnasium.Env):
    """It holds a method of an object of a library, which it changes."""

    observation_space = action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self):
        self.act = torch.nn.Linear(1, 1).double().forward

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        with torch.no_grad():
            self.act.__self__.weight.fill_(0.5)
            self.act.__self__.bias.fill_(0.0)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        with torch.no_grad():
            self.act.__self__.bias.add_(0.01)
            observation = self.act(torch.tensor(action, dtype=torch.float64))
        return observation.numpy().astype(np.float32), 0.0, False, False, {}


def test_a_method_that_is_held_is_found_in_the_object_that_is_there():
    one, other = Snapshot(Bound, 0), Snapshot(Bound, 0)
    one.reset(seed=0)
    other.reset(seed=0)
    for _ in range(3):
        one.step(np.ones(1, np.float32))
    assert other.restore(one.snapshot()) == ""
    assert one.step(np.ones(1, np.float32))[0] == other.step(np.ones(1, np.float32))[0] == pytest.approx([0.54])


class Stubborn(gymnasium.Env):
    """Nothing can be written to what it holds."""

    observation_space = action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    class Growing(list):
        def clear(self):
            raise RuntimeError("nothing is given back")

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.held = self.Growing([1.0])
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), 0.0, False, False, {}


def test_a_copy_that_raises_costs_the_promise_and_not_the_episode():
    env = Snapshot(Stubborn, 0)
    env.reset(seed=0)
    env.prove()
    for _ in range(8):
        assert env.step(np.zeros(1, np.float32))[1] == 0.0
    assert env.raised == 0
    assert "RuntimeError: nothing is given back" in env.unproved[0]


def test_what_is_one_object_stays_one():
    shared = [1]
    one, other = Anything(a=shared, b=(shared,), c=None), Anything(a=[0], b=([0],), c=[5])
    one.c = one
    there_and_back(one, other)
    assert other.a is other.b[0]
    assert other.c is other
    assert other.a == [1]


def test_arrays_are_written_in_place_and_methods_are_found_again():
    base = np.zeros(4)
    other = Anything(base=base, view=base[1:3], call=None)
    one = Anything(base=np.arange(4.0), view=None, call=None)
    one.view = one.base[1:3]
    one.call = one.method
    other.call = other.method
    there_and_back(one, other)
    other.base[1] = 9
    assert other.view[0] == 9
    assert other.call() is other


def test_nothing_is_made_but_what_the_users_own_modules_hold():
    """A tree comes from a file: it may name no class, function or attribute elsewhere."""
    live = Anything(x=None)
    for name in ("os:system", "subprocess:Popen", "builtins:eval", "gymnasium.core:Env", "test_state:no_such"):
        for tree in (
            {"constant": name},
            {"object": 1, "class": name, "attributes": {}},
            {"object": 1, "method": "system", "self": {"constant": "os"}},
        ):
            with pytest.raises(Unlike):
                Writer([live]).layer({"class": "test_state:Anything", "attributes": {"x": tree}}, live)
    with pytest.raises(Unlike, match="no generator of NumPy's"):
        Writer([live]).put({"object": 1, "generator": {"object": 2, "dict": [["bit_generator", "seterr"]]}}, None)


def test_a_snapshot_of_another_build_begins_a_new_episode():
    row, other = Snapshot(counting.Pay, 0), Snapshot(lambda: counting.Factor(counting.Pay()), 0)
    row.reset(seed=0)
    other.reset(seed=0)
    assert other.restore(row.snapshot()) == "it has 2 layers; there were 1"
    changed = row.snapshot()
    changed["layers"][0]["class"] = "counting:Nested"
    assert "stands where there was a counting:Nested" in row.restore(changed)
    assert row.restore([{"seed": 0}]) == "it was saved by an older rlamort"
    row.reset()  # as good as new
