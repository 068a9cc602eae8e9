"""Agents saved by Stable-Baselines3. Of their files, tensors and JSON are read, and pickles never are."""

import contextlib
import io
import json
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from rlamort.env import Spec
from rlamort.errors import UserError
from rlamort.host.saved import LARGEST_JSON

LARGEST_TENSORS = 2 * 2**30  # bytes
OFF_POLICY = {"sac": "stable_baselines3.sac.policies", "td3": "stable_baselines3.td3.policies"}
PPO = "stable_baselines3.common.policies"
SETTINGS = ("batch_size", "learning_rate", "tau")  # called so by both, positive; a schedule is no number, and left


class Foreign(NamedTuple):
    """A Stable-Baselines3 agent as a method, values and tensors of rlamort."""

    method: str
    values: dict[str, Any]  # fields that differ from the defaults
    spec: Spec
    tensors: dict[str, Tensor]  # of our agent's `state_dict`, without optimisers

    def fill(self, agent: nn.Module) -> None:
        """Copy the tensors into `agent`. Raises UserError if a shape differs."""
        own = agent.state_dict()
        for name, tensor in self.tensors.items():
            if name not in own or own[name].shape != tensor.shape:
                raise UserError(f"{name}: shape {tuple(tensor.shape)} in the file does not fit a {self.method} agent")
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                own[name].copy_(tensor)


def read_sb3(path: Path) -> Foreign:
    """SAC, TD3, DDPG or PPO with an `MlpPolicy`, from a file of its `save`.

    Raises:
        UserError: it is none of these, or has a structure that cannot be read without unpickling.
    """
    data, tensors = _data(path), _tensors(path, "policy.pth")
    kind = data.get("policy_class", {}).get("__module__")
    if data.get("use_sde"):
        raise UserError(f"{path}: it was trained with use_sde, which is not supported")
    spec = _spec(path, data)
    values: dict[str, Any] = {"discount": float(data.get("gamma", 0.99))}
    values |= {key: data[key] for key in SETTINGS if _number(data.get(key)) and data[key] > 0}
    chosen = data.get("policy_kwargs", {})
    _expect(path, chosen, "features_extractor_class", "stable_baselines3.common.torch_layers.FlattenExtractor")
    if kind == PPO and "action_net.weight" in tensors:
        _expect(path, chosen, "activation_fn", "torch.nn.modules.activation.Tanh")
        widths = _widths(tensors, "mlp_extractor.policy_net")
        return Foreign("sb3/ppo", values | {"hidden": widths}, spec, {f"policy.{name}": t for name, t in tensors.items()})
    _expect(path, chosen, "activation_fn", "torch.nn.modules.activation.ReLU")
    critics = len({name.split(".")[1] for name in tensors if name.startswith("critic.")})
    try:
        if kind == OFF_POLICY["sac"]:
            method, widths = "sac", _widths(tensors, "actor.latent_pi")
            last = str(2 * len(widths))
            ours = _mlp(tensors, "actor.latent_pi", "model.net")
            for part in ("weight", "bias"):
                ours[f"model.net.{last}.{part}"] = torch.cat([tensors[f"actor.mu.{part}"], tensors[f"actor.log_std.{part}"]])
            values["temperature"] = _temperature(path)
            if _number(data.get("target_entropy")):
                values["target_entropy"] = data["target_entropy"]
        elif kind == OFF_POLICY["td3"]:
            method, widths = ("ddpg" if critics == 1 else "td3"), _widths(tensors, "actor.mu")[:-1]
            ours = _mlp(tensors, "actor.mu", "model.net") | _mlp(tensors, "actor_target.mu", "target_model.net")
        else:
            raise UserError(f"{path}: its policy is from {kind}; MlpPolicy agents of SAC, TD3, DDPG and PPO can be read")
        ours |= _ensemble(tensors, "critic", "critic", critics) | _ensemble(tensors, "critic_target", "target_critic", critics)
    except KeyError as error:
        raise UserError(f"{path}: it lacks the tensor {error}; only MlpPolicy agents can be read") from error
    return Foreign(method, values | {"hidden": widths, "critic": {"members": critics}}, spec, ours)


def _number(value: Any) -> bool:
    return type(value) in (int, float)


def _temperature(path: Path) -> float:
    """That of SAC when it was saved."""
    variables = _tensors(path, "pytorch_variables.pth")
    if "ent_coef_tensor" not in variables:
        return float(variables["log_ent_coef"].detach().exp())
    fixed = float(variables["ent_coef_tensor"])
    if fixed > 0:
        warnings.warn(
            f"{path}: its ent_coef is fixed at {fixed:.4g}; here it begins there, and training on adapts it", stacklevel=5
        )
    return fixed


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What fails within is said as a UserError."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: it cannot be read as a Stable-Baselines3 file: {type(error).__name__}") from error


def _member(path: Path, name: str, largest: int) -> bytes:
    with _reading(path), zipfile.ZipFile(path) as archive:
        if name not in archive.namelist():
            raise UserError(f"{path}: it is not a Stable-Baselines3 file, since it has no member {name!r}")
        size = archive.getinfo(name).file_size  # as declared; reading more than that is an error
        if size > largest:
            raise UserError(f"{path}: its member {name!r} would unpack to {size} bytes; {largest} are allowed")
        return archive.read(name)


def _data(path: Path) -> dict[str, Any]:
    """What describes the agent, as JSON."""
    packed = _member(path, "data", LARGEST_JSON)
    with _reading(path):
        data = json.loads(packed)
    if not isinstance(data, dict):
        raise UserError(f"{path}: it is not a Stable-Baselines3 file")
    return data


def _tensors(path: Path, name: str) -> dict[str, Tensor]:
    """Of one member, a zip itself, whose parts may be packed."""
    packed = io.BytesIO(_member(path, name, LARGEST_TENSORS))
    with _reading(path):
        with zipfile.ZipFile(packed) as inner:
            size = sum(part.file_size for part in inner.infolist())
        if size > LARGEST_TENSORS:
            raise UserError(f"{path}: its tensors would unpack to {size} bytes; {LARGEST_TENSORS} are allowed")
        packed.seek(0)
        tensors = torch.load(packed, weights_only=True, map_location="cpu")
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise UserError(f"{path}: its member {name!r} holds no tensors by name")
    return tensors


def _spec(path: Path, data: dict[str, Any]) -> Spec:
    """Sizes and bounds, from the text beside the pickled spaces."""
    try:
        action, observation = data["action_space"], data["observation_space"]
        shape = [int(n) for n in observation["_shape"]]
        low, high = (_numbers(action[bound], action.get("dtype", "float32")) for bound in ("low", "high"))
        (n,) = action["_shape"]
        if len(low) != n or len(high) != n or len(shape) != 1:
            raise ValueError("its spaces are not flat boxes whose bounds are written out")
        return Spec(shape[0], low, high)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: its spaces cannot be read without executing them: {error}") from error


def _numbers(text: str, dtype: str) -> list[float]:
    """Bounds in their own precision: 0.4 stands for the float32 next to it, where they are float32."""
    if not re.fullmatch(r"\[[-+\d.e\s]*\]", text) or not re.fullmatch(r"float(16|32|64)", dtype):
        raise ValueError(f"bounds {text!r} of {dtype}")
    numbers: list[float] = np.array(text[1:-1].split(), dtype).tolist()
    return numbers


def _expect(path: Path, chosen: dict[str, Any], key: str, allowed: str) -> None:
    default = f"<class '{allowed}'>"
    if (given := chosen.get(key, default)) != default:
        raise UserError(f"{path}: its {key} is {given}; only {allowed} can be read")


def _widths(tensors: dict[str, Tensor], prefix: str) -> list[int]:
    weights = [t for name, t in tensors.items() if re.fullmatch(re.escape(prefix) + r"\.\d+\.weight", name)]
    return [t.shape[0] for t in weights]


def _mlp(tensors: dict[str, Tensor], theirs: str, ours: str) -> dict[str, Tensor]:
    return {name.replace(theirs, ours, 1): t for name, t in tensors.items() if name.startswith(f"{theirs}.")}


def _ensemble(tensors: dict[str, Tensor], theirs: str, ours: str, members: int) -> dict[str, Tensor]:
    """SB3's separate networks with weights (out, in) as our stacked ones, (E, in, out)."""
    layers = [int(name.split(".")[2]) for name in tensors if re.fullmatch(rf"{theirs}\.qf0\.\d+\.weight", name)]
    stacked = {}
    for i, layer in enumerate(sorted(layers)):
        weights = [tensors[f"{theirs}.qf{member}.{layer}.weight"].T for member in range(members)]
        biases = [tensors[f"{theirs}.qf{member}.{layer}.bias"][None] for member in range(members)]
        stacked[f"{ours}.ensemble.layers.{i}.weight"] = torch.stack(weights)
        stacked[f"{ours}.ensemble.layers.{i}.bias"] = torch.stack(biases)
    return stacked
