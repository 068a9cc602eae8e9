"""Iterative policies on frozen critics: learned steps, beside the policy that one network predicts, and beside Adam.

x state (B, d) · lam = (mean | log_std) of a squashed Gaussian (B, 2 n) · f = Soft(-min Q, alpha) (B,), in units of return ·
S draws of an action

A soft actor-critic is trained; its critic and its temperature are frozen. On states of its replay its policy then goes on
learning, which makes the direct policy, and the models of row `iapo` learn, from the prior and from a policy that went on
learning for half as long, with steps for the other half: everyone asks the critic for equally many values and gradients. Gaps
are to the best lam that Adam finds for each held-out state, from several starts. Adam itself begins in the direct policy.
"""

import copy
import itertools
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from rlamort import parts
from rlamort.agent import Adam as Optimiser
from rlamort.agent import descend
from rlamort.agents.sac import SAC
from rlamort.config import resolve
from rlamort.envs.maxq import frozen, visit
from rlamort.host.randomness import Randomness
from rlamort.losses import Loss, objective
from rlamort.measure.verdict import Measured, Verdict, at_least, at_most
from rlamort.model import Model, Unroll
from rlamort.objective import MaxQ, Oracle, Soft, Temperature
from rlamort.run.learner import learner_class
from rlamort.source import Contexts
from rlamort.update import Adam

SHARED = {"seed": 0, "hidden": (128, 128), "batch_size": 128, "learning_rate": 1e-3}  # of the soft actor-critics
UPDATES, BATCH = 3_000, 32  # of learned steps on a frozen critic, from the prior; an even number
ASKED, SCORED = 16, 256  # draws of a gradient that is asked for, and of a score
EPISODES, STATES, SEED = 8, 128, 2_000_000  # held out, and the seed of the episodes that they are from
PRIOR, POLICY, DIRECT = "the prior", "the policy of half the updates", "the direct policy"  # where steps begin
LONGER, PLATEAU = 20, 0.05  # steps in all, and the share of the direct gap by which more steps may be worse
SEARCHED, STARTS = 60, 4  # steps of Adam from so many starts of every state, and again, with SCORED draws, from the best


def pendulum() -> Measured:
    """Learned steps on a frozen critic of Pendulum-v1, beside the direct policy and Adam."""
    return measured("Pendulum-v1", 6_000)


def cheetah() -> Measured:
    """Learned steps on a frozen critic of HalfCheetah-v5, beside the direct policy and Adam."""
    return measured("HalfCheetah-v5", 15_000)


def hopper() -> Measured:
    """Learned steps on a frozen critic of Hopper-v5, beside the direct policy and Adam."""
    return measured("Hopper-v5", 15_000)


class Redrawn(Soft):
    """A soft objective whose oracle draws anew at every query, as the paper's does; an agent's holds its draws."""

    def oracle(self, x: Tensor) -> Oracle:
        return Oracle(self, x)


class Frozen(NamedTuple):
    """A frozen critic, and states."""

    f: Soft  # of one draw
    policy: Model  # that was trained with it
    setting: parts.Setting
    seen: Tensor  # (N, d) of the replay
    x: Tensor  # (STATES, d) of other episodes

    def by(self, draws: int) -> Soft:
        """f, as the mean over draws."""
        return Redrawn(self.f.f, self.f.density, self.f.alpha, draws)

    def score(self, lam: Tensor) -> Tensor:
        """f of held-out states (STATES,), by the same draws for every lam."""
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(SEED)
            return self.by(SCORED)(lam, self.x)

    def prior(self) -> Tensor:
        """lam of the prior (STATES, 2 n): the middle of the parameters."""
        return self.x.new_zeros(len(self.x), self.setting.domain.dim)

    def descent(self, lam: Tensor, steps: int, rate: float, draws: int) -> Tensor:
        """lam (S STATES, 2 n) after steps of Adam from S starts of every held-out state."""
        torch.manual_seed(SEED)
        update, domain, x = Adam(rate), self.setting.domain, self.x.repeat(len(lam) // len(self.x), 1)
        oracle = self.by(draws).oracle(x)
        h = update.start(lam, x, oracle)
        for _ in range(steps):
            lam, h = update(lam, h, x, oracle)
            lam = domain.nearest(lam)
        return lam


def critic_of(env: str, steps: int) -> Frozen:
    """Train a soft actor-critic and freeze its critic."""
    print(f"training: sac on {env}, {steps:,} steps", flush=True)
    learner = learner_class("sac")(env, **SHARED)
    learner.learn(steps)
    agent = learner.agent
    assert isinstance(agent, SAC)
    with Randomness(0, learner.device)():
        met = visit(lambda x: agent.act(x, explore=True), learner.environments.another(EPISODES), SEED)
    x = met.at(np.linspace(0, len(met.x) - 1, STATES).round().astype(int)).x
    f = Soft(MaxQ(frozen(agent.critic), agent.pessimism), agent.density, Temperature(float(agent.alpha().detach())))
    setting = parts.Setting(agent.density.parameters, x.shape[1], SHARED["hidden"])  # type: ignore[arg-type]
    found = Frozen(f, copy.deepcopy(agent.model), setting, learner.source.everything().x.clone(), x)
    learner.close()
    return found


def learn(model: Model, loss: Loss, on: Frozen, updates: int, rate: float) -> Model:
    """Train a model on the frozen critic, at states of the replay, with a step size that falls to zero."""
    optimiser, f = Optimiser(model.parameters(), rate, horizon=updates), on.by(ASKED)
    for _ in range(updates):
        batch = Contexts(on.seen[torch.randint(len(on.seen), (BATCH,))])
        descend(loss(model, f, batch)[0], model.parameters(), optimiser)
    return model


def measured(env: str, steps: int) -> Measured:
    """Claims about learned steps from the prior and from a policy, on one frozen critic."""
    torch.manual_seed(0)
    on, row = critic_of(env, steps), resolve("iapo", {}).values
    part, loss = row["model"], row["loss"](on.setting)
    asks = 2 * part.steps + 1  # values and gradients for each state in an update: those of the steps, and of the loss
    print("learning: the direct policy", flush=True)
    direct = learn(copy.deepcopy(on.policy), objective, on, asks * UPDATES, 3e-4)
    print(f"learning: steps from {PRIOR}", flush=True)
    paths = {PRIOR: walked(learn(part(on.setting), loss, on, UPDATES, 1e-3), on)}
    print(f"learning: {POLICY}, and steps from it", flush=True)
    half = learn(copy.deepcopy(on.policy), objective, on, asks * UPDATES // 2, 3e-4)  # its step size falls to zero by then
    model = replace(part, init=parts.Full())(on.setting)
    model.init.load_state_dict(half.state_dict())
    paths[POLICY] = walked(learn(model, loss, on, UPDATES // 2, 1e-3), on)
    return judged(f"{env}, SAC after {steps:,} steps", part.steps, on, direct, paths)


@torch.no_grad()
def walked(model: Model, on: Frozen) -> Tensor:
    """The iterates (LONGER + 1, STATES, 2 n) of a model's steps, for longer than it takes them in training."""
    assert isinstance(model, Unroll)
    longer = Unroll(model.init, model.update, LONGER, model.domain, model.adjoint)
    return longer.iterates(on.x, on.by(ASKED).oracle(on.x))


@torch.no_grad()
def judged(name: str, steps: int, on: Frozen, direct: Model, paths: dict[str, Tensor]) -> Measured:
    """Verdicts from the iterates (LONGER + 1, STATES, 2 n) from either start."""
    starts = {PRIOR: on.prior(), DIRECT: direct(on.x)}  # of Adam
    rival = {
        who: {rate: on.descent(lam, 50, rate, ASKED) for rate in (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)}
        for who, lam in starts.items()
    }
    best = on.score(search(on, [*starts.values()]))
    for lam in itertools.chain(starts.values(), *(found.values() for found in rival.values()), *paths.values()):
        best = torch.minimum(best, on.score(lam))
    gap = {who: float((on.score(lam) - best).mean()) for who, lam in starts.items()}
    adam = {who: {rate: float((on.score(lam) - best).mean()) for rate, lam in found.items()} for who, found in rival.items()}
    gaps = {who: [float((on.score(lam) - best).mean()) for lam in path] for who, path in paths.items()}
    whole, verdicts = gap[DIRECT], list[Verdict]()
    before = float((on.score(on.policy(on.x)) - best).mean())
    for (who, after), (begun, tried) in zip(gaps.items(), adam.items(), strict=True):
        text, least = f"{name}: {steps} learned steps from {who}", min(tried.values())
        removed = 1 - after[steps] / whole
        verdicts += [
            at_least(f"{text}: share of the direct policy's gap of {whole:.3g} that they remove", removed, 0.5),
            at_most(
                f"{text}: their gap, as a multiple of {least:.3g}, Adam's after 50 steps from {begun} at the best of "
                f"{len(tried)} rates", after[steps] / least, 1, "x",
            ),
            at_most(
                f"{text}: what {LONGER} steps lose against {steps}, as a share of the direct policy's gap",
                (after[LONGER] - after[steps]) / whole, PLATEAU,
            ),
        ]  # fmt: skip
    data: dict[str, Any] = {
        "states": len(on.x), "temperature": float(on.f.alpha()), "best": float(best.mean()),
        "gap of the direct policy": whole, "gap of the policy as it was trained": before,
        "gap of the prior": gap[PRIOR], "gap after k steps": gaps,
        "gap of Adam after 50 steps": {who: {str(rate): one for rate, one in found.items()} for who, found in adam.items()},
    }  # fmt: skip
    stem = "iapo_" + name.split(",")[0].lower().replace("-", "_")
    return Measured(verdicts, data, {stem: figure(name, steps, gaps, adam, whole)})


def search(on: Frozen, starts: list[Tensor]) -> Tensor:
    """The best lam (STATES, 2 n) that Adam finds from these starts of every held-out state, and from random ones."""
    generator, n = torch.Generator().manual_seed(0), on.f.density.dim
    means = 1.5 * torch.randn(STARTS - len(starts), 1, n, generator=generator)
    random = torch.cat([means, torch.full_like(means, -1.0)], -1).expand(-1, len(on.x), -1)
    found = on.descent(torch.cat([*starts, *random]), SEARCHED, 0.2, ASKED).view(STARTS, len(on.x), -1)
    best = torch.stack([on.score(lam) for lam in found]).argmin(0)
    return on.descent(found[best, torch.arange(len(on.x))], SEARCHED, 0.05, SCORED)


def figure(name: str, steps: int, gaps: dict[str, list[float]], adam: dict[str, dict[float, float]], direct: float) -> Figure:
    """The gap after each learned step."""
    fig = Figure(figsize=(5, 4), layout="constrained")
    axes = fig.subplots()
    for color, (who, after), (begun, tried) in zip(("C0", "C1"), gaps.items(), adam.items(), strict=True):
        axes.plot(after, "o-", markersize=3, color=color, label=f"learned steps from {who}")
        axes.axhline(min(tried.values()), linestyle=":", color=color, label=f"Adam, 50 steps from {begun}")
    axes.axhline(direct, linestyle="-.", color="C2", label="direct policy")
    axes.axhline(direct / 2, linestyle="--", color="C2", linewidth=0.8, label="half of its gap")
    axes.axvline(steps, color="k", linewidth=0.5, label="steps in training")
    axes.set(
        xlabel="steps", ylabel="gap to the best found, in units of Q", yscale="log", title=name, xticks=range(0, LONGER + 1, 5)
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    return fig
