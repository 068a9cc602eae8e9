"""The machine: cores, memory, devices, and the float32 GEMM backend."""

import contextlib
import functools
import os
import platform
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

from rlamort.errors import UserError

MATMUL = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # its settings of oneDNN's matrix products


def cores() -> int:
    """Cores that this process may use, by its affinity and its container's quota."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        allowed, _, period = quota.read_text().partition(" ")
        if allowed != "max":
            found = min(found, max(1, int(allowed) // int(period)))
    return found


def processor() -> str:
    """The processor's name, as the system has it."""
    facts = Path("/proc/cpuinfo")  # Linux
    lines = facts.read_text().splitlines() if facts.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """The GPU's name, or cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def memory(device: torch.device) -> int:
    """Total memory of the machine, or of its GPU, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_memory() -> int:
    """Bytes of the machine's memory that are free for this process, within its container's limit."""
    found, group = int(psutil.virtual_memory().available), Path("/sys/fs/cgroup/memory.max")
    if group.is_file() and (limit := group.read_text().strip()) != "max":
        used = int(group.with_name("memory.current").read_text())
        facts = dict(line.split() for line in group.with_name("memory.stat").read_text().splitlines())
        found = min(found, int(limit) - used + int(facts["inactive_file"]))  # cached files give way
    return found


def state_dict_on_meta(make: Callable[[], nn.Module]) -> dict[str, Tensor] | None:
    """The `state_dict` of the module that `make` builds, on the meta device; None if it cannot be built there.

    Raises:
        OverflowError: its sizes exceed any memory.
    """
    try:
        with torch.device("meta"):
            return make().state_dict()
    except Exception as error:  # it looks at numbers; or something is wrong, which is said when it is built in earnest
        if isinstance(error, RuntimeError) and "overflow" in str(error):
            raise OverflowError(str(error)) from error
        return None


def require_memory(what: str, make: Callable[[], nn.Module], device: torch.device) -> None:
    """Compute the size of `what` before it is built.

    Raises:
        UserError: its tensors alone exceed the memory of `device`.
    """
    has = memory(device)
    try:
        needed = sum(tensor.numel() * tensor.element_size() for tensor in (state_dict_on_meta(make) or {}).values())
        size = f"{needed / 2**30:,.0f} GiB"
    except OverflowError:
        needed, size = has + 1, "more than any machine's memory"
    if needed > has:
        raise UserError(
            f"{what}: networks of these sizes take {size}; {device} has {has / 2**30:,.0f} GiB, and smaller ones are needed"
        )


def device_of(name: str) -> torch.device:
    """The device of a name; a GPU with its number, as tensors have it.

    Raises:
        UserError: it is no name of a CPU or GPU, or there is no such GPU.
    """
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if there else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise UserError(f"device={name}: auto, cpu, cuda or cuda:N is needed")
    if device.type == "cpu":
        return torch.device("cpu")
    if not there:
        raise UserError(f"device={name}: this torch ({torch.__version__}) sees no CUDA device; use device=cpu or device=auto")
    number = torch.cuda.current_device() if device.index is None else device.index
    if number >= there:
        known = ", ".join(f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(there))
        raise UserError(f"device={name}: there is no such GPU; allowed: auto, cpu, {known}")
    return torch.device("cuda", number)


@contextlib.contextmanager
def default_dtype(name: str) -> Iterator[None]:
    """A context in which new tensors are float64 if `name` is; float32 leaves torch's default, which a user may have set."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if name == "float64" else before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def fast_products() -> Iterator[None]:
    """A context with oneDNN as the float32 GEMM backend on CPUs where MKL, torch's default, is slower.

    MKL uses half of an AMD processor's AVX-512; oneDNN, in the same torch, all of it. Torch selects it only with the
    permission to round factors to bfloat16, which oneDNN does not use without AMX; a test product verifies that here.
    A user's own setting is kept.
    """
    wanted = MATMUL.fp32_precision == "none" and _favours_onednn()
    with _permission() if wanted else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def tf32_products() -> Iterator[None]:
    """A context in which a GPU multiplies float32 tensors with factors of TF32's ten bits, and sums in float32."""
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "tf32"
    try:
        yield
    finally:
        settings.fp32_precision = before


def products_of(matmul: str) -> contextlib.AbstractContextManager[None]:
    """The context of float32 products for a value of `matmul`."""
    return tf32_products() if matmul == "tf32" else fast_products()


def require_products(matmul: str, device: torch.device) -> None:
    """Raises UserError if `device` has no products in TF32, and `matmul` asks for them."""
    has = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    if matmul == "tf32" and has < (8, 0):
        name = f"{device} (capability {has[0]}.{has[1]})" if device.type == "cuda" else str(device)
        raise UserError(
            f"matmul=tf32: a GPU of compute capability 8.0 or newer is needed; on {name} float32 and bfloat16 are allowed"
        )


def products() -> str:
    """The float32 GEMM backend of a training on the CPU: oneDNN, torch's BLAS, or the user's setting."""
    precision = MATMUL.fp32_precision
    if precision == "bf16":
        return "oneDNN" if _exact() else "oneDNN in bfloat16"
    return "oneDNN" if precision == "none" and _favours_onednn() else "BLAS"


@functools.cache
def _favours_onednn() -> bool:
    """Whether to use oneDNN, by the processor's model and not by timing, so that runs are reproducible."""
    with_mkl = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    if not (with_mkl and torch.backends.cpu.get_cpu_capability() == "AVX512" and _vendor_is_amd()):
        return False
    with _permission():
        return _exact()


@contextlib.contextmanager
def _permission() -> Iterator[None]:
    """A context with torch's setting that selects oneDNN for float32 products."""
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
    """Whether products of the size of an update's, plain and batched, have float32's precision at present."""
    largest = 0.0
    for shape in ((256, 256), (2, 256, 256)):
        # entries that bfloat16's eight bits cannot hold, without drawing from anybody's random numbers
        a = torch.linspace(1, 2, 256 * 256).reshape(256, 256).expand(shape)
        exact = a.double() @ a.mT.double()
        largest = max(largest, float(((a @ a.mT - exact) / exact).abs().max()))
    return largest < 1e-5  # bfloat16 is off by 1e-3


def versions() -> dict[str, str]:
    """Versions of the packages that a result depends on, and the float32 GEMM backend."""
    found = {}
    for name in ("rlamort", "torch", "gymnasium", "mujoco", "numpy", "stable-baselines3"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    found["float32 products"] = products()
    return found
