"""CUDA tensors on a machine without a GPU: values on the CPU, which say that they are on cuda:0 and refuse to meet the CPU's.

Torch's own `FakeTensorMode` does not serve: without values nothing that branches on them runs (certificates, references,
active sets), and autograd of fake CUDA tensors needs a torch that was built with CUDA.

To torch's C++ these tensors are on its meta device, whose backward pass runs on the calling thread; Python reads cuda:0. What a
real GPU would refuse is an error here: an operation on tensors of both devices, but for copies and for scalars of the CPU in
elementwise operations; a generator of the other device; NumPy's view of memory on the GPU. So are indices on the CPU,
which a GPU would copy first, and a graph of it could not. Random numbers are those of the CPU's generator, so that results can
be compared with the CPU's.
"""

import contextlib
from collections import Counter
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from rlamort.host import graphs
from rlamort.run import rounds
from rlamort.source import append

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
BETWEEN = (torch.ops.aten._to_copy, torch.ops.aten.copy_)  # copies from one device to another
READS = (torch.ops.aten._local_scalar_dense, torch.ops.aten.equal)  # these wait for the GPU and give a number to Python


class OnCuda(Tensor):
    """A tensor whose values are in `inner`, on the CPU."""

    @staticmethod
    def __new__(cls, inner):
        outer = Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype, device="meta"
        )
        outer.inner = inner
        return outer

    device, is_cuda, is_cpu, is_meta = (property(lambda self, fact=fact: fact) for fact in (CUDA, True, False, False))

    def to(self, *args, **kwargs):
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and device.type == "cpu":
            return super().to(device="cpu", dtype=dtype or self.dtype)
        return super().to(dtype=dtype or self.dtype)

    def numpy(self, *, force=False):
        if not force:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        return self.detach().cpu().numpy()

    def tolist(self):
        return self.detach().cpu().tolist()

    def new_tensor(self, values, **kwargs):
        return torch.tensor(values, **{"dtype": self.dtype, "device": self.device} | kwargs)

    def cuda(self, *args, **kwargs):
        return self

    def __repr__(self):
        return f"OnCuda({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def run(func, args, kwargs):
    """One operation, on the CPU."""
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    ours = any(isinstance(leaf, OnCuda) for leaf in leaves)
    if ours and func.overloadpacket not in BETWEEN:
        for leaf in leaves:
            if not isinstance(leaf, OnCuda) and not (leaf.ndim == 0 and torch.Tag.pointwise in func.tags):
                raise RuntimeError(
                    f"Expected all tensors to be on the same device: {func} is given one {tuple(leaf.shape)} on the CPU"
                )
    if kwargs.get("device") is not None:
        ours = torch.device(kwargs["device"]).type in ("cuda", "meta")  # meta is what C++ reads of a tensor of ours
        kwargs = {**kwargs, "device": CPU, **({"pin_memory": False} if "pin_memory" in kwargs else {})}
    elif func.overloadpacket is torch.ops.aten.copy_:
        ours = isinstance(args[0], OnCuda)
    generator = kwargs.get("generator")
    if ours and generator is not None and generator.device.type != "cuda":
        raise RuntimeError(f"Expected a 'cuda' device type for generator but found 'cpu': {func}")
    inner_args, inner_kwargs = tree_map(_inner, args), tree_map(_inner, kwargs)
    found = func(*inner_args, **inner_kwargs)
    if not ours:
        return found
    return return_and_correct_aliasing(func, args, kwargs, tree_map(_outer, found))


def _inner(leaf):
    return leaf.inner if isinstance(leaf, OnCuda) else leaf


def _outer(leaf):
    return OnCuda(leaf) if isinstance(leaf, Tensor) and not isinstance(leaf, OnCuda) else leaf


class FakeCuda(TorchDispatchMode):
    """While it holds, device="cuda" makes such tensors. `reads` counts what waits for the GPU, `crossings` copies to it."""

    _mode_key = torch._C._TorchDispatchModeKey.FAKE  # or torch would look for a driver where a device is named

    def __init__(self):
        super().__init__()
        self.reads, self.crossings = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        leaves = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        if func.overloadpacket in READS and any(isinstance(leaf, OnCuda) for leaf in leaves):
            self.reads[func] += 1
        found = run(func, args, kwargs or {})
        if func.overloadpacket in BETWEEN and isinstance(found, OnCuda) != isinstance(leaves[-1], OnCuda):
            self.crossings[func] += 1
        return found

    def record(self, work, device, restore=lambda: None, tries=1):
        """As of rlamort.host.graphs: an error is what a graph could not hold, reads and copies from or to the CPU."""
        for _ in range(tries):
            work()
        restore()
        state, before = torch.get_rng_state(), self.reads + self.crossings
        found = work()
        torch.set_rng_state(state)  # nothing is drawn while a graph is recorded
        if more := self.reads + self.crossings - before:
            raise RuntimeError(f"operation not permitted when stream is capturing: {dict(more)}")

        def launch():
            for old, new in zip(tree_leaves(found), tree_leaves(work()), strict=True):
                if isinstance(old, Tensor):
                    old.copy_(new)

        return launch, found


@contextlib.contextmanager
def fake_cuda(monkeypatch):
    """The mode, with the functions of `torch.cuda` that rlamort calls; there is one GPU of 64 GiB."""
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_capability": lambda device=None: (8, 0),
        "get_device_name": lambda device=None: "Fake",
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "manual_seed": torch.default_generator.manual_seed,
        "manual_seed_all": lambda seed: None,
        "device": lambda device: contextlib.nullcontext(),
        "synchronize": lambda device=None: None,
        "is_current_stream_capturing": lambda: False,
        "mem_get_info": lambda device=None: (2**36, 2**36),
        "Event": lambda: SimpleNamespace(record=lambda: None, synchronize=lambda: None),
        "get_device_properties": lambda device=None: SimpleNamespace(total_memory=2**36, name="fake"),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    before, lifted = torch.__future__.get_swap_module_params_on_conversion(), torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor` makes them on the CPU, and then moves them
    torch.__future__.set_swap_module_params_on_conversion(True)  # parameters keep their identity where they move
    try:
        with FakeCuda() as mode:
            for module in (graphs, rounds, append):
                monkeypatch.setattr(module, "record", mode.record)
            yield mode
    finally:
        torch._C._set_only_lift_cpu_tensors(lifted)
        torch.__future__.set_swap_module_params_on_conversion(before)
