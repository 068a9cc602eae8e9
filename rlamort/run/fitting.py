"""What a run's updates will train, and what its fits will find, known before a step is taken."""

from rlamort.agent import Agent
from rlamort.config import Config
from rlamort.env import Spec
from rlamort.errors import UserError
from rlamort.host.machine import default_dtype
from rlamort.host.randomness import Randomness
from rlamort.train import Schedule


def require_frozen(spec: Spec) -> None:
    """Raises UserError if an environment's problem has parameters that are to be learned, where agents see rewards alone."""
    if spec.problem is None and spec.frozen is not None:
        spec.frozen()


def require_trained(agent: Agent, config: Config) -> None:
    """Raises UserError if learning would leave out something that the agent is to train; generators stay as they are.

    Or if rewards of a model, which are the environment's, would be added to values of scaled ones.
    """
    with Randomness(0, agent.device)(), default_dtype(config.run.dtype):
        agent.require_trained()
    if agent.adds_rewards and (scale := config.plain()["reward_scale"]) != "none":
        raise UserError(
            f"reward_scale={scale}: the critic's values would be scaled, and rewards of the model before them would not; with "
            "an expansion none is needed"
        )


def require_enough(agent: Agent, schedule: Schedule, count: int) -> None:
    """Raises UserError if the first fit, or every fit, will find less than it needs, of `count` environments.

    A fit that leaves out some of what it finds may need more, and says so itself.
    """
    _require_transitions(agent, schedule, count)
    _require_sequences(agent, count)


def _require_transitions(agent: Agent, schedule: Schedule, count: int) -> None:
    if not (agent.fit_every and agent.fit_least):
        return
    first = min(agent.fit_every, schedule.first) if agent.needs_fit else agent.fit_every  # steps before it
    found = -(-first // count) * count
    if found < agent.fit_least:
        raise UserError(
            f"warmup_steps={schedule.warmup_steps}, update_after={schedule.update_after}, {agent.fit_field}={agent.fit_every}: "
            f"the first fit would find {found} transitions, and the dynamics need at least {agent.fit_least}; it comes after "
            "the least of these fields"
        )


def _require_sequences(agent: Agent, count: int) -> None:
    seen, horizon, longest = agent.fit_every // count, agent.fit_horizon, agent.spec.longest
    if seen < horizon:
        raise UserError(
            f"{agent.fit_field}={agent.fit_every}, num_envs={count}: a fit sees {seen} steps of each environment, and "
            f"horizon={horizon} are needed; {agent.fit_field}={horizon * count} or more"
        )
    if longest is not None and longest < horizon:
        raise UserError(f"horizon={horizon}: an episode has {longest} steps at most, so fits would learn nothing; at most that")
