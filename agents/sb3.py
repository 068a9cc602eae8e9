"""Stable-Baselines3 with the same commands, evaluation and run directory, as a baseline."""

import functools
import time
import warnings
from collections.abc import Callable
from types import MappingProxyType
from typing import Any, Literal, SupportsFloat

import gymnasium
import numpy as np
import stable_baselines3
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv
from torch import Tensor, nn

from rlamort.agent import Agent
from rlamort.config import Count, Fraction, Positive, Widths
from rlamort.env import Episode, Spec
from rlamort.env.gym import GymEnv
from rlamort.env.local import LocalVectorEnv
from rlamort.env.snapshot import Snapshot
from rlamort.errors import Fault, UserError
from rlamort.objective import MaxQ
from rlamort.train import Clock, Journal, Schedule, Updates, crosses, finite, speed, summary

NEW = {  # where an agent from a file learns on, since its policy is all that was saved
    "SAC": "the optimisers, the temperature and the replay are new",
    "TD3": "the optimisers and the replay are new",
    "DDPG": "the optimisers and the replay are new",
    "PPO": "the optimiser is new",
}
NEEDED = "in training, Stable-Baselines3 needs an environment without a failure"


class _Shape(gymnasium.Env[np.ndarray, np.ndarray]):
    """An environment with spaces only, from which Stable-Baselines3 builds a policy."""

    def __init__(self, spec: Spec) -> None:
        self.observation_space, self.action_space = spec.observation.box(), spec.action.box()


class _Asked(gymnasium.Wrapper[Any, Any, Any, Any]):
    """An environment of ours without what forgives its failures, which Stable-Baselines3 would learn from.

    Args:
        name: for messages.
        ours: it, with the options of every reset.
    """

    def __init__(self, name: str, ours: Snapshot) -> None:
        super().__init__(ours.env)
        self.name, self.options, self.taken = name, ours.options, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        return self._sound("its reset", lambda: self.env.reset(seed=seed, options=self.options), 1)  # type: ignore[no-any-return]

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        self.taken += 1
        return self._sound("it", lambda: self.env.step(action), 2)  # type: ignore[no-any-return]

    def _sound(self, what: str, call: Callable[[], Any], numbers: int) -> Any:
        """What it answers, if it does and the first `numbers` parts are finite."""
        where = f"env {self.name}, step {self.taken}: {what}"
        try:
            answer = call()
            sound = all(np.isfinite(part).all() for part in answer[:numbers])
        except Exception as error:  # whatever a user's environment raises, or returns instead of numbers
            raise Fault(f"{where} raised {type(error).__name__}: {error}; {NEEDED}") from error
        if not sound:
            given = ", ".join(map(str, answer[:numbers]))
            raise Fault(f"{where} returned {given}; {NEEDED}")
        return answer


class Critics(nn.Module):
    """Stable-Baselines3's critics with the interface of `Critic`.

    Args:
        critic: its `ContinuousCritic`.
    """

    def __init__(self, critic: nn.Module) -> None:
        super().__init__()
        self.critic = critic

    def forward(self, x: Tensor, y: Tensor, members: int | None = None) -> Tensor:
        """x (B, d), y (B, n) -> (members, B)."""
        return torch.cat(self.critic(x, y), dim=-1).T[:members]


class SB3(Agent):
    """A policy trained by Stable-Baselines3. None takes its default.

    Args:
        spec: sizes and action bounds.
        algorithm: the algorithm.
        learning_rate: SB3's learning_rate.
        discount: SB3's gamma.
        tau: SB3's tau (SAC, TD3, DDPG).
        hidden: SB3's net_arch.
        exploration_noise: standard deviation of Gaussian action noise (TD3, DDPG), in units of half the action range.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        algorithm: Literal["SAC", "TD3", "DDPG", "PPO"] = "SAC",
        learning_rate: Positive | None = None,
        discount: Fraction = 0.99,
        tau: Fraction | None = None,
        hidden: Widths | None = None,
        exploration_noise: Positive | None = None,
    ) -> None:
        super().__init__(spec, normalise=False)
        self.algorithm = algorithm
        self.keywords: dict[str, Any] = {"gamma": discount}
        if learning_rate is not None:
            self.keywords["learning_rate"] = learning_rate
        if tau is not None:
            self.keywords["tau"] = tau
        if hidden is not None:
            self.keywords["policy_kwargs"] = {"net_arch": list(hidden)}
        if exploration_noise is not None:
            n = spec.action.shape
            self.keywords["action_noise"] = NormalActionNoise(np.zeros(n), np.full(n, exploration_noise))
        small = {} if algorithm == "PPO" else {"buffer_size": 1}
        self.take(self.build(DummyVecEnv([lambda: _Shape(spec)]), torch.device("cpu"), small))

    def build(self, env: VecEnv, device: torch.device, more: dict[str, Any]) -> Any:
        """The algorithm's object on `env`."""
        return getattr(stable_baselines3, self.algorithm)("MlpPolicy", env, device=device, **self.keywords, **more)

    def take(self, model: Any) -> None:
        """Use that model's policy from now on, for acting and saving."""
        self.policy = model.policy

    def action_cost(self) -> MaxQ:
        critic = getattr(self.policy, "critic", None)
        if critic is None:
            return super().action_cost()
        theirs: Any = Critics(critic)
        return MaxQ(theirs, 1.0) if self.algorithm == "SAC" else MaxQ(theirs, 0.0, 1)  # TD3 and DDPG ask the first

    def act(self, x: Tensor, explore: bool) -> Tensor:
        observed = x.numpy(force=True).reshape(-1, *self.spec.observation.shape)
        action, _ = self.policy.predict(observed, deterministic=not explore)
        return torch.from_numpy(self.units.encode(action)).to(x)


class SB3Source:
    """The environment and replay size of Stable-Baselines3, which collects its own data.

    Args:
        env: the training environments.
        buffer_size: capacity of its replay buffer, in transitions (SAC, TD3).
    """

    resumable = False
    unsupported = ("dtype", "overlap", "update_after", "keep_checkpoints", "on_nan", "wandb_artifacts")  # no checkpoints
    meaning = MappingProxyType({
        "checkpoint_every": "steps between uploads to what `track` names; there are no checkpoints.",
        "max_env_faults": "number of steps of evaluations that may raise or return NaN; one in training ends it.",
    })  # fmt: skip

    def __init__(self, env: GymEnv, *, buffer_size: Count = 1_000_000) -> None:
        self.env, self.buffer_size = env, buffer_size
        self.model: Any = None

    def prepare(self) -> None:
        """Nothing: transitions come with time."""

    def vec_env(self) -> VecEnv:
        """The same environments as a VecEnv of Stable-Baselines3; with worker processes, new ones of the same kind."""
        ours = self.env.ours
        if ours is None:
            raise UserError(f"env={self.env.name}: Stable-Baselines3 takes single environments, not a vector environment")
        if isinstance(ours, LocalVectorEnv):
            return DummyVecEnv([functools.partial(Monitor, _Asked(self.env.name, row)) for row in ours.envs])
        if self.env.statistics() is not None:
            warnings.warn(
                f"env={self.env.name}: running statistics of wrappers in Stable-Baselines3's worker processes are not visible "
                f"to evaluations and saved agents; use vectorization=sync",
                stacklevel=2,
            )
        name = self.env.name
        return SubprocVecEnv([lambda make=make: Monitor(_Asked(name, make())) for make in ours.makers])

    def keywords(self, algorithm: str, schedule: Schedule) -> dict[str, Any]:
        """Schedule and seed as its keywords."""
        seed = int(torch.randint(2**31, ()))  # from the run's own stream
        if algorithm == "PPO":
            return {"seed": seed, "batch_size": schedule.batch_size}
        updates = schedule.utd * self.env.count  # in a step of all environments
        return {
            "seed": seed,
            "batch_size": schedule.batch_size,
            "buffer_size": self.buffer_size,
            "learning_starts": schedule.warmup_steps,
            "train_freq": updates.denominator,
            "gradient_steps": updates.numerator,
        }


class _Follow(BaseCallback):  # type: ignore[misc]  # untyped here
    """Records losses, returns and evaluations as `rlamort.train` does."""

    def __init__(self, agent: SB3, schedule: Schedule, clock: Clock, journal: Journal) -> None:
        super().__init__()
        self.agent, self.schedule, self.clock, self.journal = agent, schedule, clock, journal

    def _on_training_start(self) -> None:
        self.origin = self.num_timesteps - self.clock.env_step
        self.started = time.perf_counter() - self.clock.seconds

    def _on_step(self) -> bool:
        clock = self.clock
        before, clock.env_step = clock.env_step, self.num_timesteps - self.origin
        clock.seconds, clock.updates = time.perf_counter() - self.started, self.model._n_updates
        clock.episodes += [Episode(i["episode"]["r"], i["episode"]["l"]) for i in self.locals["infos"] if "episode" in i]
        self.journal.progress(clock, fit_every=0)
        if crosses(before, clock.env_step, self.schedule.log_every):
            clock.metrics = {name: value for name, value in self.logger.name_to_value.items() if name.startswith("train/")}
            self.journal.record(clock, {**finite(clock), **summary(clock.episodes), **speed(clock, self.journal.pace)})
            clock.episodes.clear()
        if crosses(before, clock.env_step, self.schedule.eval_every):
            self.journal.measure(self.agent, clock)
        self.journal.keep()
        self.started = time.perf_counter() - clock.seconds
        return True


def train(agent: SB3, source: SB3Source, schedule: Schedule, clock: Clock, updates: Updates, journal: Journal) -> None:
    """Stable-Baselines3's own `learn`, with a callback that records; arguments as in `rlamort.train.train`.

    Its first call constructs the algorithm, whose networks begin as its seed has it, or as they were loaded.

    Raises:
        Fault: an environment failed, which Stable-Baselines3 does not tolerate.
    """
    if source.model is None:
        source.model = agent.build(source.vec_env(), source.env.device, source.keywords(agent.algorithm, schedule))
        if agent.loaded:
            source.model.policy.load_state_dict(agent.policy.state_dict())
            source.model._n_updates = clock.updates
            warnings.warn(
                f"{agent.algorithm} of Stable-Baselines3 learns on with the policy and critics that were loaded; "
                f"{NEW[agent.algorithm]}, since a saved agent does not hold the old ones",
                stacklevel=4,  # where `learn` is called
            )
        agent.take(source.model)
    follow = _Follow(agent, schedule, clock, journal)
    try:
        source.model.learn(schedule.steps, callback=follow, reset_num_timesteps=source.model.num_timesteps == 0)
    except (EOFError, ConnectionError) as error:
        raise Fault(f"env {source.env.name}: a worker process ended, for the reason that it said; {NEEDED}") from error
