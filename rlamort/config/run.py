"""The keys that every method shares."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from rlamort.config.fields import AtMost, Count, Fixed, Free, Range, Seconds, Seed, Size, Whole

Tracked = Literal["none", "wandb", "tensorboard"]


@dataclass(frozen=True)
class Run:
    """The keys that every method shares.

    Args:
        env: Gymnasium id, or module:Class from the current folder or an installed package.
        env_kwargs: keywords of the environment's constructor, e.g. env_kwargs.ctrl_cost_weight=0.
        eval_env: where it is evaluated, as env, without env_kwargs; null makes others like env.
        max_episode_steps: truncates longer episodes; null keeps the environment's own limit.
        reset_options: the options that every reset of the environment is given, e.g. reset_options.level=2.
        steps: environment steps to train for.
        seed: of all that is random in training; row i of the environments has seed + i. Evaluation has its own.
        device: where networks and data live; auto takes a GPU where there is one.
        dir: the run directory, which must not exist yet; null makes a new one under runs/.
        num_envs: environments stepped side by side.
        vectorization: sync steps them in this process, async in a worker process each, on one thread.
        max_env_faults: steps that may raise, return NaN or lose a worker process; each ends its episode and is said.
        env_timeout: seconds that worker processes may take over a step before they are replaced.
        utd: updates per environment step.
        reset_every: updates after which networks and optimisers begin anew, on the replay as it is (Nikishin et al., 2022);
            0 never.
        batch_size: transitions in an update.
        warmup_steps: environment steps with uniformly random actions, before the agent acts.
        update_after: environment steps before the first update; null takes warmup_steps.
        eval_every: steps between evaluations.
        eval_episodes: episodes in an evaluation, each with its own fixed seed.
        log_every: steps between records of what training measures.
        compile: true captures sampling, update and action as one graph (5-60 s, then faster); auto does so from 15,000 updates
            on. What was compiled is kept for later runs.
        threads: CPU threads of torch; null takes its own choice, within the cores and the quota that the process has, and one
            while that is faster, as it is where other processes use the same cores.
        checkpoint_every: steps between checkpoints, from which `rlamort resume` goes on.
        keep_checkpoints: how many of the newest stay.
        resume: auto goes on with the run in `dir` where there is one, for machines that may be taken away.
        on_nan: what follows when learning diverges; stop ends the run, retry goes back to the newest checkpoint once, with half
            the learning rate.
        track: where else records go; none, wandb, tensorboard, or a list of them. Rows appear there at checkpoints.
        track_timeout: seconds that the end of a run waits for them to arrive there; what did not, `rlamort push` sends later.
        wandb_project: Weights & Biases project.
        wandb_entity: user or team there; null takes the account's default.
        wandb_group: runs that are shown together; null gives the runs of one -m a group of their own.
        wandb_tags: labels.
        wandb_notes: free text.
        wandb_mode: online, offline (files that `wandb sync` sends later), or disabled.
        wandb_artifacts: how many checkpoints, the first ones, have their agents uploaded as artifacts.
        video: whether a video of one episode is made at the end.
    """

    env: Fixed[str | None] = None
    env_kwargs: Fixed[dict[str, Any] | None] = None
    eval_env: Free[str | None] = None
    max_episode_steps: Fixed[Size | None] = None
    reset_options: Fixed[dict[str, Any] | None] = None
    steps: Free[Count] = 100_000
    seed: Fixed[Seed] = 0
    device: str = "auto"
    dir: Free[str | None] = None
    num_envs: Fixed[Size] = 1
    vectorization: Literal["sync", "async"] = "sync"
    max_env_faults: Free[Whole] = 10
    env_timeout: Free[Seconds] = 60.0
    utd: Size = 1
    reset_every: Whole = 0
    batch_size: Size = 256
    warmup_steps: Whole = 1_000
    update_after: Whole | None = None
    eval_every: Free[Count] = 5_000
    eval_episodes: Free[Size] = 10
    log_every: Free[Count] = 1_000
    compile: Literal["auto"] | bool = "auto"
    threads: Annotated[int, Range(1), AtMost(1_024)] | None = None
    checkpoint_every: Free[Count] = 10_000
    keep_checkpoints: Free[Count] = 2
    resume: Free[Literal["never", "auto"]] = "never"
    on_nan: Free[Literal["stop", "retry"]] = "stop"
    track: Free[Tracked | tuple[Tracked, ...]] = "none"
    track_timeout: Free[Seconds] = 10.0
    wandb_project: Free[str] = "rlamort"
    wandb_entity: Free[str | None] = None
    wandb_group: Free[str | None] = None
    wandb_tags: Free[tuple[str, ...]] = ()
    wandb_notes: Free[str | None] = None
    wandb_mode: Free[Literal["online", "offline", "disabled"]] = "online"
    wandb_artifacts: Free[Whole] = 0
    video: Free[bool] = True
