"""The keys that every method shares."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from rlamort.config.fields import AtMost, Count, Fixed, Free, Range, Ratio, Seconds, Seed, Size, Whole

Tracked = Literal["none", "wandb", "tensorboard"]
Dtype = Literal["float32", "float64"]


@dataclass(frozen=True)
class Run:
    """The keys that every method shares.

    Args:
        env: Gymnasium id, or module:Class from the current folder or an installed package.
        env_kwargs: keywords of the environment's constructor, e.g. env_kwargs.ctrl_cost_weight=0.
        eval_env: the evaluation environment, as env, without env_kwargs; null makes another like env.
        max_episode_steps: truncates longer episodes; null keeps the environment's own limit.
        reset_options: options of every reset of the environment, e.g. reset_options.level=2.
        steps: environment steps to train for.
        seed: of all randomness in training; environment i has seed + i. Evaluation has its own.
        device: of networks and data; auto takes a GPU if there is one.
        dtype: of networks, contexts and the problem; float64 is for tolerances that float32 cannot reach.
        dir: the run directory, which must not exist yet; null makes a new one under runs/.
        num_envs: number of environments stepped side by side.
        vectorization: sync steps them in this process, async in worker processes, on one thread each.
        num_workers: worker processes of vectorization=async, which share the environments evenly; null takes one for each core.
        max_env_faults: number of steps that may raise, return NaN or lose a worker process; each ends its episode with a
            warning.
        env_timeout: time limit of a step of a worker process's environments, in seconds, after which it is replaced.
        utd: updates per environment step (update-to-data ratio), such as 2, 0.25 or 1/64. Of T steps since updates began there
            have been exactly floor(utd T).
        reset_every: updates between periodic network resets, which reinitialise networks and optimisers and keep the replay
            (Nikishin et al., 2022); 0 for none.
        batch_size: transitions in an update.
        warmup_steps: environment steps with uniformly random actions at the beginning.
        update_after: environment steps before the first update; null takes warmup_steps.
        eval_every: steps between evaluations.
        eval_episodes: episodes in an evaluation, each with its own fixed seed.
        log_every: steps between records of training metrics.
        compile: true compiles sampling, update and action as one graph (5-60 s, then faster); auto does so for runs of at least
            15,000 updates. Compiled code is cached for later runs.
        overlap: with updates on a GPU, step the environment while they run. Actions are then those of the policy before the
            latest updates, so that runs are others than without; a resumed run is as exact.
        threads: CPU threads of torch; null takes torch's default within the process's cores and quota, and one thread while
            that is faster, as on a busy machine.
        checkpoint_every: steps between checkpoints, from which `rlamort resume` continues.
        keep_checkpoints: number of newest checkpoints that are kept.
        resume: auto continues the run in `dir` if there is one, for preemptible machines.
        on_nan: on divergence, stop ends the run, retry returns to the newest checkpoint once, with half the learning rate.
        track: also logs to none, wandb, tensorboard, or a list of them. Records are uploaded at checkpoints.
        track_timeout: seconds to wait for uploads at the end of a run; `rlamort push` sends the rest later.
        wandb_project: Weights & Biases project.
        wandb_entity: user or team there; null takes the account's default.
        wandb_group: group of the run; null makes one for the runs of one -m.
        wandb_tags: labels.
        wandb_notes: free text.
        wandb_mode: online, offline (files that `wandb sync` sends later), or disabled.
        wandb_artifacts: number of checkpoints, from the first, whose agents are uploaded as artifacts.
        video: whether to record a video of one episode at the end.
    """

    env: Fixed[str | None] = None
    env_kwargs: Fixed[dict[str, Any] | None] = None
    eval_env: Free[str | None] = None
    max_episode_steps: Fixed[Size | None] = None
    reset_options: Fixed[dict[str, Any] | None] = None
    steps: Free[Count] = 100_000
    seed: Fixed[Seed] = 0
    device: str = "auto"
    dtype: Fixed[Dtype] = "float32"
    dir: Free[str | None] = None
    num_envs: Fixed[Size] = 1
    vectorization: Literal["sync", "async"] = "sync"
    num_workers: Size | None = None
    max_env_faults: Free[Whole] = 10
    env_timeout: Free[Seconds] = 60.0
    utd: Ratio = 1.0
    reset_every: Whole = 0
    batch_size: Size = 256
    warmup_steps: Whole = 1_000
    update_after: Whole | None = None
    eval_every: Free[Count] = 5_000
    eval_episodes: Free[Size] = 10
    log_every: Free[Count] = 1_000
    compile: Literal["auto"] | bool = "auto"
    overlap: bool = False
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
