"""What this machine offers: cores, memory, devices, and who multiplies float32 matrices fastest."""

import contextlib
import functools
import os
import platform
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor, nn

from rlamort.errors import UserError

MATMUL = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # its settings of oneDNN's matrix products


def cores() -> int:
    """Cores that this process may use: those of its affinity, and no more than its container's quota pays for."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        allowed, _, period = quota.read_text().partition(" ")
        if allowed != "max":
            found = min(found, max(1, int(allowed) // int(period)))
    return found


def memory(device: torch.device) -> int:
    """Bytes that this machine, or its GPU, has in all."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def drawn_without_memory(make: Callable[[], nn.Module]) -> dict[str, Tensor] | None:
    """The names and shapes of the tensors of what `make` builds; None where it cannot be built without their numbers.

    Raises:
        OverflowError: no machine could hold them.
    """
    try:
        with torch.device("meta"):
            return make().state_dict()
    except Exception as error:  # it looks at numbers; or something is wrong, which is said when it is built in earnest
        if isinstance(error, RuntimeError) and "overflow" in str(error):
            raise OverflowError(str(error)) from error
        return None


def require_memory(what: str, make: Callable[[], nn.Module], device: torch.device) -> None:
    """Find out how large `what` is before it is made.

    Raises:
        UserError: its tensors alone are more than the memory of `device`.
    """
    has = memory(device)
    try:
        needed = sum(tensor.numel() * tensor.element_size() for tensor in (drawn_without_memory(make) or {}).values())
        size = f"{needed / 2**30:,.0f} GiB"
    except OverflowError:
        needed, size = has + 1, "more than any machine's memory"
    if needed > has:
        raise UserError(
            f"{what}: networks of these sizes take {size}; {device} has {has / 2**30:,.0f} GiB, and smaller ones are needed"
        )


def device_of(name: str) -> torch.device:
    """Raises UserError where it is asked for and absent."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device={name}: auto, cpu, cuda or cuda:N is needed") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device={name}: this torch ({torch.__version__}) sees no CUDA device; use device=cpu or device=auto")
    return device


@contextlib.contextmanager
def fast_products() -> Iterator[None]:
    """Meanwhile, float32 matrix products on the CPU are oneDNN's where MKL, which torch gives them to, is the slower one.

    MKL leaves half of an AMD processor's AVX-512 unused; oneDNN, in the same torch, does not. The only way there is the
    permission to round factors to bfloat16. oneDNN makes no use of it without AMX, and whether that holds here is tried out.
    What a user has set is left alone.
    """
    wanted = MATMUL.fp32_precision == "none" and _favours_onednn()
    with _permission() if wanted else contextlib.nullcontext():
        yield


def products() -> str:
    """Who computes a training's float32 matrix products on the CPU: oneDNN, torch's BLAS, or what a user has allowed."""
    given = MATMUL.fp32_precision
    if given == "bf16":
        return "oneDNN" if _exact() else "oneDNN in bfloat16"
    return "oneDNN" if given == "none" and _favours_onednn() else "BLAS"


@functools.cache
def _favours_onednn() -> bool:
    """By the kind of processor, not by a stopwatch: the same run takes the same way every time."""
    with_mkl = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    if not (with_mkl and torch.backends.cpu.get_cpu_capability() == "AVX512" and _vendor_is_amd()):
        return False
    with _permission():
        return _exact()


@contextlib.contextmanager
def _permission() -> Iterator[None]:
    """What sends float32 products to oneDNN."""
    before = MATMUL.fp32_precision
    MATMUL.fp32_precision = "bf16"
    try:
        yield
    finally:
        MATMUL.fp32_precision = before


def _vendor_is_amd() -> bool:
    facts = Path("/proc/cpuinfo")  # Linux
    return "AuthenticAMD" in (facts.read_text() if facts.is_file() else platform.processor())


def _exact() -> bool:
    """Whether products of matrices as large as an update's, plain and batched, have float32's precision now."""
    largest = 0.0
    for shape in ((256, 256), (2, 256, 256)):
        # entries that bfloat16's eight bits cannot hold, without drawing from anybody's random numbers
        a = torch.linspace(1, 2, 256 * 256).reshape(256, 256).expand(shape)
        exact = a.double() @ a.mT.double()
        largest = max(largest, float(((a @ a.mT - exact) / exact).abs().max()))
    return largest < 1e-5  # bfloat16 is off by 1e-3


def versions() -> dict[str, str]:
    """Of everything that a result depends on."""
    found = {}
    for name in ("rlamort", "torch", "gymnasium", "mujoco", "numpy", "stable-baselines3"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    found["float32 products"] = products()
    return found
