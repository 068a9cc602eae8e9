"""The replay ring against a slow reference in plain Python, over random episodes, rows, capacities and n-step returns."""

from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from conftest import Count
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from hypothesis import given, settings
from hypothesis import strategies as st

from rlamort.domain import unit_box
from rlamort.env import Spec
from rlamort.env.make import open_env
from rlamort.errors import UserError
from rlamort.source import Batch, Replay, bytes_per_frame
from rlamort.source.append import InOneCopy
from rlamort.source.replay import FRAME

DISCOUNT = 0.9


def stage(rows, d=2, n=1):
    """What Replay asks of an environment, for tests that add transitions by hand."""
    cpu = torch.device("cpu")
    spec = Spec(d, [-1.0] * n, [1.0] * n)
    return SimpleNamespace(count=rows, spec=spec, domain=unit_box(n), device=cpu, place=cpu, x=torch.zeros(rows, d))


class Reference:
    """Per row, a list of episodes of (x, y, r, terminated, x_next), cut to the latest frames."""

    def __init__(self, rows, slots, n_step):
        self.rows = [[[]] for _ in range(rows)]
        self.slots, self.n_step = slots, n_step

    def add(self, row, x, y, r, terminated, truncated, x_next):
        self.rows[row][-1].append((x, y, r, terminated, x_next))
        if terminated or truncated:
            self.rows[row].append([])

    def interrupt(self, row):
        if self.rows[row][-1]:
            self.rows[row].append([])

    def transitions(self):
        """Every n-step transition that is still stored, as {x: (y, return, discount, terminated, x_next)}."""
        found = {}
        for episodes in self.rows:
            # a slot for every frame, and one for the successor of each episode's last; newest first, up to the capacity
            frames, kept = 0, []
            for episode in reversed(episodes):
                frames += 1 if episode else 0
                if not episode and episode is episodes[-1]:
                    continue
                for k in range(len(episode) - 1, -1, -1):
                    frames += 1
                    if frames > self.slots:
                        break
                    kept.append((episode, k))
            for episode, k in kept:
                window = episode[k : k + self.n_step]
                total = sum(DISCOUNT**i * step[2] for i, step in enumerate(window))
                last = window[-1]
                found[episode[k][0]] = (episode[k][1], total, DISCOUNT ** len(window), last[3], last[4])
        return found


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 3),
    slots=st.integers(8, 20),
    n_step=st.integers(1, 4),
    events=st.lists(
        st.lists(st.sampled_from(["go", "go", "go", "terminate", "truncate", "both", "skip"]), min_size=3, max_size=3),
        max_size=45,
    ),
)
def test_ring_equals_reference(rows, slots, n_step, events):
    ring = Replay(stage(rows), buffer_size=rows * slots, n_step=n_step, discount=DISCOUNT)
    reference = Reference(rows, slots, n_step)
    label, state = 0, []
    for _ in range(rows):
        label += 1
        state.append(label)
    for event in events:
        event = event[:rows]
        valid = np.array([e != "skip" for e in event])
        terminated = np.array([e in ("terminate", "both") for e in event])
        truncated = np.array([e in ("truncate", "both") for e in event])
        successor = []
        for _ in range(rows):
            label += 1
            successor.append(label)
        x = torch.tensor([[s, -s] for s in state], dtype=torch.float32)
        x_next = torch.tensor([[s, -s] for s in successor], dtype=torch.float32)
        y, r = x[:, :1] / 1000, x[:, 0] / 7
        ring.add(x, y, r, x_next, terminated, truncated, valid)
        for row in range(rows):
            if valid[row]:
                reference.add(row, state[row], y[row, 0].item(), r[row].item(), terminated[row], truncated[row], successor[row])
                if terminated[row] or truncated[row]:
                    label += 1
                    state[row] = label
                else:
                    state[row] = successor[row]
            else:  # its episode was cut off, by a reset or a failure
                reference.interrupt(row)
                label += 1
                state[row] = label
    expected = reference.transitions()
    assert len(ring) == len(expected)
    if not expected:
        return
    batch = ring.everything()
    assert sorted(batch.x[:, 0].tolist()) == sorted(expected)
    batch = Batch(*map(torch.cat, zip(batch, ring.sample(40 * len(expected)), strict=True)))
    seen = set()
    for i in range(len(batch.x)):
        key = int(batch.x[i, 0])
        y, total, discount, terminated, x_next = expected[key]
        assert batch.x[i, 1] == -key
        assert batch.y[i, 0].item() == y
        assert batch.reward[i].item() == pytest.approx(total, rel=1e-5)
        assert batch.discount[i].item() == pytest.approx(discount, rel=1e-6)
        assert batch.terminated[i].item() == terminated
        assert batch.x_next[i, 0] == x_next
        seen.add(key)
    assert len(seen) >= 0.9 * len(expected)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 4),
    slots=st.integers(8, 14),
    events=st.lists(
        st.lists(st.sampled_from(["go", "go", "go", "end", "skip"]), min_size=4, max_size=4) | st.sampled_from([True, False]),
        max_size=60,
    ),
)
def test_an_episode_keeps_its_number(rows, slots, events):
    """k N + i of row i's k-th: whatever other rows do, in a full ring, and restored, exactly (True) or cut off (False)."""

    def opened():
        env = stage(rows)
        env.state, env.restore = dict, lambda state: event
        return Replay(env, buffer_size=rows * slots)

    ring, numbers, label, none = opened(), {}, 0, np.zeros(rows, dtype=bool)
    begun, going = [0] * rows, [False] * rows
    for event in events:
        if isinstance(event, bool):
            state, frames, ring = ring.state(), ring.frames_since(np.zeros(rows, dtype=np.int64)), opened()
            ring.restore(state, [frames])
            going = [one and event for one in going]
            continue
        for row, kind in enumerate(event[:rows]):
            begun[row] += kind != "skip" and not going[row]
            numbers[label + row] = (begun[row] - 1) * rows + row
            going[row] = kind == "go"
        x = torch.arange(label, label + rows).float()[:, None].expand(-1, 2)
        ended, valid = (np.array([(kind == what) for kind in event[:rows]]) for what in ("end", "skip"))
        ring.add(x, x[:, :1], x[:, 0], x, ended, none, ~valid)
        label += rows
        assert ring.episodes().tolist() == [numbers[int(x)] for x in ring.everything().x[:, 0]]


def test_older_checkpoints_number_what_they_hold_from_the_oldest():
    for rows, slots in ((1, 100), (3, 100), (3, 20)):
        ring, _ = played(rows, 60, slots)
        ring.env.state, again = dict, Replay(stage(rows), buffer_size=rows * slots)
        again.env.restore = lambda state: True
        state = {name: value for name, value in ring.state().items() if name != "opened"}
        again.restore(state, [ring.frames_since(np.zeros(rows, dtype=np.int64))])
        numbers, row = again.episodes(), torch.arange(rows).repeat_interleave(torch.from_numpy(ring.size))
        assert torch.equal(numbers % rows, row)
        for i in range(rows):
            mine, theirs = numbers[row == i] // rows, ring.episodes()[row == i] // rows
            assert torch.equal(mine, theirs - theirs[0])
            assert slots == 20 or theirs[0] == 0


def test_sampling_is_uniform():
    """Rows of different fullness and holes at episode ends change no transition's chance."""
    torch.manual_seed(0)
    ring = Replay(stage(2), buffer_size=40, n_step=1, discount=DISCOUNT)
    for t in range(30):
        x = torch.tensor([[2.0 * t, 0], [2.0 * t + 1, 0]])
        ended = np.array([t % 2 == 0, t % 7 == 0])
        ring.add(x, x[:, :1], x[:, 0], x + 2, ended, ~ended & False, np.array([True, t % 3 == 0]))
    count = 200_000
    labels, hits = ring.sample(count).x[:, 0].unique(return_counts=True)
    assert len(labels) == len(ring)
    expected = count / len(ring)
    chi_square = ((hits - expected) ** 2 / expected).sum().item()
    assert chi_square < len(ring) + 5 * (2 * len(ring)) ** 0.5


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("n_step", [1, 3])
def test_every_autoreset_mode_gives_the_same_transitions(mode, rows, n_step):
    """Against the rules of the game itself: the true successor, and no transition across an episode's end."""
    lengths = (3, 1, 4)
    makers = [lambda i=i: Count(lengths, offset=1000 * i) for i in range(rows)]
    env = open_env(SyncVectorEnv(makers, autoreset_mode=mode))
    env.reset(0)
    ring = Replay(env, buffer_size=600, n_step=n_step, discount=DISCOUNT)
    finished = []
    while ring.collected < 60 * rows:
        finished += ring.collect(lambda: torch.zeros(rows, 1)).episodes
    for total, length in finished[: 3 * rows]:
        assert length in lengths
        assert total == pytest.approx(sum(100 * (total // (100 * length)) + t for t in range(1, length + 1)), abs=1)
    batch = ring.sample(2000)
    pairs = {(int(e), int(t)) for e, t in batch.x}
    assert len(pairs) >= 55 * rows
    for x, reward, discount, terminated, x_next in zip(
        batch.x.tolist(), batch.reward.tolist(), batch.discount.tolist(), batch.terminated.tolist(), batch.x_next.tolist(),
        strict=True,
    ):  # fmt: skip
        episode, t = int(x[0]) % 1000, int(x[1])
        length = lengths[episode % 3]
        steps = min(n_step, length - t)
        newest = int(x_next[1]) - t  # an episode that is still going on may give fewer
        assert 1 <= newest <= steps
        assert x_next[0] == x[0]
        assert discount == pytest.approx(DISCOUNT**newest)
        assert reward == pytest.approx(sum(DISCOUNT**k * (100 * episode + t + k + 1) for k in range(newest)))
        over = t + newest == length
        assert terminated == (over and episode % 3 != 1)  # truncation alone is none, both at once is one


def played(rows, steps, slots, n_step=1, seed=0):
    """A ring of labelled transitions, some steps of which are none, and every episode as the list of its labels."""
    ring, drawn = Replay(stage(rows), buffer_size=rows * slots, n_step=n_step, discount=DISCOUNT), np.random.default_rng(seed)
    label, state, episodes = rows, np.arange(rows), [[[]] for _ in range(rows)]
    for _ in range(steps):
        terminated, truncated, valid = (drawn.random((3, rows)) < np.array([0.08, 0.08, 0.93])[:, None]).astype(bool)
        following = label + np.arange(rows)
        label += rows
        x, x_next = (torch.tensor(np.stack([one, -one], 1), dtype=torch.float32) for one in (state, following))
        ring.add(x, x[:, :1] / 1000, x[:, 0] / 7, x_next, terminated, truncated, valid)
        for row in range(rows):
            if valid[row]:
                episodes[row][-1].append((int(state[row]), int(following[row])))
            if terminated[row] | truncated[row] | ~valid[row]:
                episodes[row].append([])
                following[row], label = label, label + 1
        state = following
    return ring, [episode for row in episodes for episode in row]


@pytest.mark.parametrize("n_step", [1, 3])
@pytest.mark.parametrize(("rows", "slots"), [(1, 400), (3, 400), (1, 37), (3, 23)])
@pytest.mark.parametrize("length", [1, 2, 5])
def test_sequences_are_those_that_happened_and_each_is_as_likely(rows, slots, n_step, length):
    """Rings that have been round several times, and such that have not."""
    ring, episodes = played(rows, 150, slots, n_step)
    kept = {int(x) for x in ring.everything().x[:, 0]}
    happened = {
        tuple(s[k : k + length])
        for s in episodes
        for k in range(len(s) - length + 1)
        if kept >= {x for x, _ in s[k : k + length]}
    }
    torch.manual_seed(0)
    count = 60 * len(happened)
    batch = ring.sequences(count, length)
    assert batch.x.shape == (count, length, 2)
    assert batch.reward.shape == batch.discount.shape == batch.terminated.shape == (count, length)
    found = [
        tuple(zip(a, b, strict=True))
        for a, b in zip(batch.x[..., 0].int().tolist(), batch.x_next[..., 0].int().tolist(), strict=True)
    ]
    assert set(found) == happened
    assert torch.equal(batch.y[..., 0], batch.x[..., 0] / 1000)
    assert torch.equal(batch.reward, batch.x[..., 0] / 7)  # of one step, whatever the ring's own returns are
    assert (batch.discount == torch.tensor(DISCOUNT)).all()
    assert not batch.terminated[:, :-1].any()
    hits = np.unique(np.array(found).reshape(count, -1), axis=0, return_counts=True)[1]
    chi_square = ((hits - 60) ** 2 / 60).sum()
    assert chi_square < len(hits) + 5 * (2 * len(hits)) ** 0.5


def test_sequences_of_the_latest_transitions_alone():
    ring, _ = played(2, 100, 200)
    newest = [set(ring.everything().x[int(ring.size[0]) * row :][: int(ring.size[row])][-20:, 0].tolist()) for row in range(2)]
    found = ring.sequences(2_000, 3, latest=20).x[..., 0]
    assert set(found.flatten().tolist()) <= newest[0] | newest[1]
    assert ring.longest(latest=4) <= 4 <= ring.longest() <= 100


def test_a_sequence_that_no_episode_holds_is_an_error():
    ring, episodes = played(1, 40, 100)
    longest = max(map(len, episodes))
    assert ring.longest() == longest
    assert ring.sequences(3, longest).x.shape == (3, longest, 2)
    with pytest.raises(
        UserError, match=f"length={longest + 1} is given; of its {len(ring)} transitions at most {longest} follow"
    ):
        ring.sequences(3, longest + 1)
    with pytest.raises(UserError, match="of its 0 transitions at most 0"):
        Replay(stage(1), buffer_size=10).sequences(1, 1)


def test_memory_is_computed_before_it_is_taken():
    huge = psutil.virtual_memory().total // bytes_per_frame(2, 1) * 2
    with pytest.raises(UserError, match=r"buffer_size=.*GiB.*at most \d+ fit"):
        Replay(stage(1), buffer_size=huge)
    with pytest.raises(UserError, match="at least 8 are needed"):
        Replay(stage(2), buffer_size=4)


def test_bytes_per_frame_is_what_is_allocated():
    ring = Replay(stage(2, d=17, n=6), buffer_size=1000)
    tensors = (ring.x, ring.y, ring.reward, ring.terminated, ring.stop, ring.starts)
    assert sum(t.numel() * t.element_size() for t in tensors) + ring.begins.nbytes == 1000 * bytes_per_frame(17, 6)


class Meeting:
    """A way of writing, beside another one whose ring must be the same."""

    def __init__(self, ring, place):
        self.ring = ring
        self.twin = {name: getattr(ring, name).clone() for name in (*FRAME, "starts")}
        self.fifo = torch.zeros_like(ring.fifo_on_device)
        self.one, self.other = ring.write, InOneCopy(self.twin, self.fifo, place)

    def __call__(self, *step):
        self.one(*step)
        self.other(*step)
        for name, tensor in self.twin.items():
            assert torch.equal(tensor.nan_to_num(), getattr(self.ring, name).nan_to_num()), name
        assert torch.equal(self.fifo, self.ring.fifo_on_device)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 3),
    slots=st.integers(8, 12),
    events=st.lists(
        st.lists(st.sampled_from(["go", "go", "terminate", "truncate", "skip"]), min_size=3, max_size=3), max_size=30
    ),
    place=st.sampled_from(["cpu", "cuda"]),
)
def test_a_row_that_crosses_in_one_copy_is_written_as_in_place(rows, slots, events, place):
    """What a GPU does, here from the CPU to the CPU: packed, copied, scattered; with rows that have no transition, too.

    The contexts that wait cross with the step, if the environment is stepped on the CPU.
    """
    ring, state = Replay(stage(rows), buffer_size=rows * slots), 0
    ring.write = Meeting(ring, torch.device(place))
    for event in events:
        flags = {kind: np.array([one == kind for one in event[:rows]]) for kind in ("terminate", "truncate", "skip")}
        x, y, reward, x_next = (torch.arange(state, state + rows * k).float() for k in (2, 1, 1, 2))
        state += 7
        ring.env.x = x_next.view(rows, 2)
        ring.add(x.view(rows, 2), y.view(rows, 1), reward, x_next.view(rows, 2), flags["terminate"], flags["truncate"],
                 ~flags["skip"])  # fmt: skip
        waiting = ring.write.other.on_device(ring.env.x)
        assert torch.equal(waiting, ring.env.x)
        assert (waiting is ring.env.x) == (place == "cuda")
        assert torch.equal(ring.write.other.on_device(x), x)


def test_a_pinned_row_is_not_written_while_its_copy_runs():
    """Two rows in turn: each waits for the copy that read it last, and for no other."""
    ring = Replay(stage(1), buffer_size=20)
    write = InOneCopy({name: getattr(ring, name) for name in (*FRAME, "starts")}, ring.fifo_on_device, torch.device("cpu"))
    ring.write, said = write, []
    write.copied = [SimpleNamespace(record=lambda i=i: said.append(("copied", i)),
                                    synchronize=lambda i=i: said.append(("waited for", i))) for i in range(2)]  # fmt: skip
    no, x = np.array([False]), torch.zeros(1, 2)
    for _ in range(3):
        ring.add(x, x[:, :1], x[:, 0], x, no, no, ~no)
    assert said == [(what, i) for i in (1, 0, 1) for what in ("waited for", "copied")]
