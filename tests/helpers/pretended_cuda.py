"""A pretended CUDA device: hpo trains as on a GPU, with real numbers, on a machine without one.

A tensor "on cuda:0" is a CPU tensor underneath (`GpuTensor`) with CUDA's dispatch keys, so every operation passes
`_dispatch`, which raises what a GPU would raise and notes what would make the host wait. torch.cuda's own Python code
runs down to `torch._C`, which is replaced. Autograd, which looks from C++, sees a CPU and needs no streams; autocast
would see one too and cast nothing, so `_Autocast` casts by CUDA's lists. torch's FakeTensorMode does not serve: its
backward pass fails without a driver (torch 2.15), and whatever reads a value stops it.

    with pretended_cuda() as seen:
        list(fit(model, splits, config))    # with device="cuda"
    seen.waits                              # how often the host waited, by kind and function of hpo
    seen.operations                         # of each step that `seen.listening()` surrounded

It finds tensors on two devices, CPU generators for tensors on the GPU, calls that torch.cuda refuses, waits of the
host, convolutions without cuDNN, operations without a deterministic form, and tensors that outlive a trial. A CUDA
graph repeats its operations with the plain numbers and the tensors of its capture, in which a wait is an error. It
cannot see inside kernels: numerics of TF32 and bf16, races between streams, real memory and speed are for
tests/test_gpu.py. It leans on private names of torch, read in 2.15.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.device("cuda:0")
TOTAL_MEMORY = 80 * 10**9
HPO = str(Path(__file__).parents[2] / "hpo")
aten = torch.ops.aten


@dataclass
class Seen:
    """What a run did that matters on a GPU."""

    waits: Counter[tuple[str, str]] = field(default_factory=Counter)
    """How often the host waited for the device, by kind and by function of hpo."""
    without_cudnn: Counter[str] = field(default_factory=Counter)
    """Convolutions with cuDNN switched off, by function of hpo."""
    operations: list[list[tuple[str, Any, str]]] = field(default_factory=list)
    """Name, plain arguments and place of each operation, for each time that `listening` was entered."""
    is_listening: bool = False
    num_captures: int = 0
    num_replays: int = 0

    def wait(self, kind: str) -> None:
        if _captured is not None:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({kind})")
        self.waits[kind, place_in_hpo()] += 1

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note the operations in here: a CUDA graph would repeat them with the same plain arguments."""
        self.operations.append([])
        self.is_listening = True
        try:
            yield
        finally:
            self.is_listening = False

    def bytes_alive(self) -> int:
        """Of all tensors on the device that are alive; nothing is collected for it."""
        storages = [each._cpu.untyped_storage() for each in _alive()]
        # Several tensors may share a storage, whose Python object comes and goes; its address is what lasts.
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


_seen = Seen()
_captured: list[tuple[Any, Any, Any, Any]] | None = None
"""Operations of the graph that is being captured, with their arguments and results; None outside of a capture."""


_references: dict[int, weakref.ref[GpuTensor]] = {}
"""To every tensor on the device; the garbage collector knows them too, among millions of other objects."""


def _alive() -> list[GpuTensor]:
    return [tensor for reference in [*_references.values()] if (tensor := reference()) is not None]


def place_in_hpo() -> str:
    """The innermost function of hpo that is at work, as "training/step.py:_step"; "?" outside of it."""
    frame = sys._getframe()
    while frame:
        file = frame.f_code.co_filename
        # From Python 3.12 on, a list comprehension is a part of its function.
        if file.startswith(HPO) and frame.f_code.co_name != "<listcomp>":
            return f"{file.removeprefix(HPO)[1:]}:{frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "?"


# --- the tensor -------------------------------------------------------------------------------------------------------


_PLAIN = frozenset({bool, float, int, str, type(None), torch.device, torch.dtype, torch.layout, torch.memory_format})
"""Types of most arguments that are no tensors, nor contain any."""


def _mapped(apply: Callable[[torch.Tensor], Any], tree: Any) -> Any:
    """A tree of lists, tuples and dictionaries with its tensors replaced; torch's pytree takes four times as long."""
    kind = type(tree)
    if kind in _PLAIN:
        return tree
    if kind is list or kind is tuple:
        return kind([_mapped(apply, each) for each in tree])
    if kind is dict:
        return {key: _mapped(apply, each) for key, each in tree.items()}
    return apply(tree) if isinstance(tree, torch.Tensor) else tree


class GpuTensor(torch.Tensor):
    """A CPU tensor that passes for one on cuda:0."""

    _cpu: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def of(cpu: torch.Tensor) -> GpuTensor:
        assert not isinstance(cpu, GpuTensor)
        made: GpuTensor = torch.Tensor._make_subclass(GpuTensor, cpu, device_for_backend_keys=CUDA)
        made._cpu = cpu
        key = id(made)
        _references[key] = weakref.ref(made, lambda _: _references.pop(key))
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _dispatch(func, args, kwargs or {})

    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def get_device(self) -> int:
        return 0

    def to(self, *args: Any, **kwargs: Any) -> Any:
        device, dtype, non_blocking, memory_format = _parse_to(*args, **kwargs)
        stays = device is None or device.type == "cuda"
        same_format = memory_format in (None, torch.preserve_format) or self.is_contiguous(memory_format=memory_format)
        if stays and dtype in (None, self.dtype) and same_format and not kwargs.get("copy"):
            return self
        return aten._to_copy(
            self,
            dtype=dtype or self.dtype,
            device=CUDA if stays else device,
            non_blocking=non_blocking,
            memory_format=memory_format,
        )

    def cuda(self, *args: Any, **kwargs: Any) -> Any:
        return self

    def cpu(self, *args: Any, **kwargs: Any) -> Any:
        return self.to("cpu")

    def tolist(self) -> Any:
        _seen.wait("tolist")
        return self._cpu.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    def pin_memory(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")

    def record_stream(self, stream: Any) -> None:
        assert isinstance(stream, _Stream)

    def __format__(self, spec: str) -> str:
        return self.item().__format__(spec) if self.dim() == 0 else object.__format__(self, spec)

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"gpu({self._cpu!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copied = GpuTensor.of(self._cpu.clone(memory_format=torch.preserve_format))
            copied.requires_grad_(self.requires_grad)
            if getattr(self, "_is_param", False):
                copied._is_param = True
            memo[id(self)] = copied
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        _seen.wait("torch.save")  # each storage is copied by itself, and waited for
        return self._cpu.detach().__reduce_ex__(protocol)


def _parse_to(*args: Any, **kwargs: Any) -> tuple[torch.device | None, torch.dtype | None, bool, Any]:
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    non_blocking, memory_format = kwargs.get("non_blocking", False), kwargs.get("memory_format")
    rest = list(args)
    if rest and isinstance(rest[0], torch.Tensor):
        other = rest.pop(0)
        device, dtype = other.device, other.dtype
    if rest and (rest[0] is None or isinstance(rest[0], str | torch.device | int)):
        device = rest.pop(0)
    if rest and (rest[0] is None or isinstance(rest[0], torch.dtype)):
        dtype = rest.pop(0)
    if rest:
        non_blocking = rest.pop(0)
    return (None if device is None else torch.device(device)), dtype, bool(non_blocking), memory_format


# --- dispatch ---------------------------------------------------------------------------------------------------------

_WAITS = {
    aten._local_scalar_dense.default: "item",
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten.bincount.default: "bincount",
    aten.equal.default: "equal",
    aten._unique2.default: "unique",
    aten.unique_dim.default: "unique",
    aten.unique_consecutive.default: "unique",
    aten.multinomial.default: None,  # waits for nothing, but checks its input on the device
    aten.repeat_interleave.Tensor: "repeat_interleave",
}

_CONVOLUTIONS = {aten.convolution.default, aten.convolution_backward.default}

# torch.use_deterministic_algorithms: "operations will throw a RuntimeError", those that a CUDA tensor meets.
_NONDETERMINISTIC = {
    "aten::_adaptive_avg_pool2d_backward",
    "aten::adaptive_max_pool2d_backward",
    "aten::avg_pool3d_backward",
    "aten::fractional_max_pool2d_backward",
    "aten::grid_sampler_2d_backward",
    "aten::reflection_pad1d_backward",
    "aten::reflection_pad2d_backward",
    "aten::replication_pad1d_backward",
    "aten::replication_pad2d_backward",
    "aten::upsample_linear1d_backward",
    "aten::upsample_bilinear2d_backward",
    "aten::_upsample_bilinear2d_aa_backward",
    "aten::upsample_bicubic2d_backward",
    "aten::_upsample_bicubic2d_aa_backward",
    "aten::upsample_trilinear3d_backward",
    "aten::_ctc_loss_backward",
    "aten::histc",
    "aten::kthvalue",
    "aten::nll_loss2d_forward",
    "aten::nll_loss2d_backward",
    "aten::put_",
}

_MOVES = {aten._to_copy.default, aten.copy_.default, aten.copy.default}
_INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}


class _Mode(TorchDispatchMode):
    """Sees what begins on the CPU and ends on the device: factories and copies."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and keeping Dynamo off costs time in every operation

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors: list[torch.Tensor] = []
    on_gpu: list[GpuTensor] = []

    def seen_as_plain(tensor: torch.Tensor) -> torch.Tensor:
        tensors.append(tensor)
        if not isinstance(tensor, GpuTensor):
            return tensor
        on_gpu.append(tensor)
        return tensor._cpu

    # Most arguments are tensors, numbers or flags.
    plain_args = [
        each
        if type(each) in _PLAIN
        else seen_as_plain(each)
        if type(each) is GpuTensor
        else _mapped(seen_as_plain, each)
        for each in args
    ]
    plain_kwargs = _mapped(seen_as_plain, kwargs) if kwargs else {}
    wants_gpu = "device" in kwargs and _is_cuda(kwargs["device"])
    if not on_gpu and not wants_gpu:
        if not kwargs.get("pin_memory"):
            return func(*args, **kwargs)
        pinned = func(*args, **{**kwargs, "pin_memory": False})
        pinned._is_pinned = True
        return pinned
    if func is aten._to_copy.default and torch._C._current_graph_task_id() != -1:
        # The backward pass of a change of type goes back to the device that C++ sees.
        kwargs, wants_gpu = {**kwargs, "device": CUDA}, True
        plain_kwargs["device"] = CUDA
    if _is_composite(func):
        with _Mode():
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
    stays_on_gpu = _check(func, args, kwargs, tensors, on_gpu, wants_gpu)
    own = {id(each._cpu): each for each in on_gpu}
    if "device" in plain_kwargs:
        plain_kwargs["device"] = torch.device("cpu") if wants_gpu or kwargs["device"] is None else kwargs["device"]
    if is_pinned := bool(plain_kwargs.get("pin_memory")):
        plain_kwargs["pin_memory"] = False
    result = func(*plain_args, **plain_kwargs)
    if _captured is not None:
        _captured.append((func, plain_args, plain_kwargs, result))
    if is_pinned:
        result._is_pinned = True
    if _changes_the_view(func):
        with torch._C._DisableTorchDispatch():  # such as transpose_: the outer tensor's shape changes as well
            func(*args, **kwargs)
    if not stays_on_gpu:
        return result
    if _seen.is_listening:
        _seen.operations[-1].append((func.name(), _plain((args, kwargs)), place_in_hpo()))
    if type(result) is torch.Tensor:
        return own[id(result)] if id(result) in own else GpuTensor.of(result)
    return _mapped(lambda t: own[id(t)] if id(t) in own else GpuTensor.of(t), result)


@functools.cache
def _is_composite(func: Any) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"))


@functools.cache
def _facts(func: Any) -> tuple[str, bool]:
    """The name of an operation without its overload, and whether it takes numbers on the CPU beside tensors."""
    name = func.name().partition(".")[0]
    return name, torch.Tag.pointwise in func.tags or func in _INDEXING or name.startswith("aten::_foreach")


@functools.cache
def _changes_the_view(func: Any) -> bool:
    return torch.Tag.inplace_view in func.tags


def _check(func: Any, args: Any, kwargs: dict[str, Any], tensors: Any, on_gpu: Any, wants_gpu: bool) -> bool:
    """Raise what a GPU would; note what makes the host wait. Gives whether the result is on the device."""
    if func in _MOVES:
        return _check_move(func, args, kwargs, wants_gpu)
    name, takes_scalars = _facts(func)
    generator = kwargs.get("generator")
    if isinstance(generator, torch.Generator) and generator.device.type != "cuda":
        raise RuntimeError(f"Expected a 'cuda' device type for generator but found 'cpu' ({func}, {place_in_hpo()})")
    on_cpu = [] if len(tensors) == len(on_gpu) else [each for each in tensors if not isinstance(each, GpuTensor)]
    if func in _INDEXING and isinstance(args[0], GpuTensor):
        indices = [each for each in args[1] if each is not None]
        if any(each.dtype in (torch.bool, torch.uint8) for each in indices):
            _seen.wait("boolean mask")
        if any(not isinstance(each, GpuTensor) for each in indices):
            _seen.wait("index on the CPU")
        on_cpu = [each for each in on_cpu if all(each is not index for index in indices)]
    if on_gpu and any(each.dim() > 0 or not takes_scalars for each in on_cpu):
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
            f"({func}, {place_in_hpo()})"
        )
    if on_gpu and _WAITS.get(func):
        _seen.wait(_WAITS[func] or "")
    if func is aten._local_scalar_dense.default:
        return False
    if func in _CONVOLUTIONS and not torch.backends.cudnn.enabled:
        _seen.without_cudnn[place_in_hpo()] += 1
    if torch.are_deterministic_algorithms_enabled() and name in _NONDETERMINISTIC:
        raise RuntimeError(
            f"{name} does not have a deterministic implementation, but you set "
            f"'torch.use_deterministic_algorithms(True)' ({place_in_hpo()})"
        )
    return wants_gpu or (bool(on_gpu) and kwargs.get("device") is None) or _is_cuda(kwargs.get("device"))


def _check_move(func: Any, args: Any, kwargs: dict[str, Any], wants_gpu: bool) -> bool:
    if func is aten._to_copy.default:
        source, stays = args[0], kwargs.get("device") is None and isinstance(args[0], GpuTensor)
        to_gpu = wants_gpu or stays
        from_gpu = isinstance(source, GpuTensor)
    else:
        target, source = args[0], args[1]
        to_gpu, from_gpu = isinstance(target, GpuTensor), isinstance(source, GpuTensor)
    is_async = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
    is_pinned = func is aten.copy_.default and getattr(args[0], "_is_pinned", False)
    if from_gpu and not to_gpu and not (is_async and is_pinned):
        _seen.wait("copy to the host")
    if to_gpu and not from_gpu and source.dim() > 0 and not (is_async and getattr(source, "_is_pinned", False)):
        _seen.wait("copy from pageable memory")
    return to_gpu


# --- autocast ---------------------------------------------------------------------------------------------------------

_LOW = {
    "conv1d", "conv2d", "conv3d", "conv_transpose2d", "linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm",
    "addmm", "baddbmm", "addbmm", "mv",
}  # fmt: skip
_HIGH = {
    "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt", "sinh",
    "tan", "pow", "__pow__", "softplus", "layer_norm", "group_norm", "cosine_similarity", "nll_loss", "kl_div",
    "l1_loss", "smooth_l1_loss", "huber_loss", "mse_loss", "cross_entropy", "binary_cross_entropy_with_logits", "dist",
    "cdist", "renorm", "logsumexp", "interpolate", "prod", "softmax", "log_softmax", "cumprod", "cumsum", "norm", "sum",
}  # fmt: skip


class _Autocast(TorchFunctionMode):
    """What torch.autocast("cuda") does before an operation (ATen/autocast_mode.h of torch 2.15)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not torch.is_autocast_enabled("cuda"):
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        wanted = torch.get_autocast_dtype("cuda") if name in _LOW else torch.float32 if name in _HIGH else None
        if wanted is None:
            return func(*args, **kwargs)

        def cast(tensor: torch.Tensor) -> torch.Tensor:
            is_eligible = tensor.is_floating_point() and tensor.dtype not in (torch.float64, wanted)
            return tensor.to(wanted) if is_eligible and isinstance(tensor, GpuTensor) else tensor

        args, kwargs = _mapped(cast, (args, kwargs))
        return func(*args, **kwargs)


# --- torch.cuda -------------------------------------------------------------------------------------------------------


class _Stream:
    def __init__(self, device: Any = None, **kwargs: Any) -> None:
        torch.cuda.device(device)
        self.device = CUDA

    def record_event(self, event: Any = None) -> Any:
        return _Event()

    def wait_event(self, event: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def synchronize(self) -> None:
        _seen.wait("stream.synchronize")


class _Event:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None:
        _seen.wait("event.synchronize")

    def elapsed_time(self, other: Any) -> float:
        return 1.0


class _Graph:
    """A CUDA graph: operations with the addresses and the plain numbers that they were captured with."""

    def __init__(self) -> None:
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def replay(self) -> None:
        _seen.num_replays += 1
        with torch.no_grad(), torch._C._DisableTorchDispatch():
            for func, args, kwargs, before in self.operations:
                result = func(*args, **kwargs)
                given: list[torch.Tensor] = []
                _mapped(given.append, (args, kwargs))
                shared = {tensor.untyped_storage().data_ptr() for tensor in given}
                for own, new in zip(_flat(before), _flat(result), strict=True):
                    if own is not new and own.untyped_storage().data_ptr() not in shared:  # neither in place nor a view
                        own.copy_(new)


def _flat(tree: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    _mapped(found.append, tree)
    return found


@contextmanager
def _capture(graph: _Graph, **kwargs: Any) -> Iterator[None]:
    """Note the operations in here. On a GPU they are not run; here they are, and what they changed is undone."""
    global _captured
    torch.cuda.synchronize()
    alive = _alive()
    before, random_state = [each._cpu.clone() for each in alive], torch.get_rng_state()
    _seen.num_captures += 1
    _captured = graph.operations
    try:
        yield
    finally:
        _captured = None
        with torch.inference_mode():  # in which those of an evaluation can be changed, too
            for tensor, saved in zip(alive, before, strict=True):
                tensor._cpu.copy_(saved)
        torch.set_rng_state(random_state)


@contextmanager
def _on_stream(stream: Any) -> Iterator[None]:
    yield


def _group(tensorlistlist: Any, with_indices: bool = False) -> Any:
    """torch._C._group_tensors_by_device_and_dtype, by the device that Python sees."""
    groups: dict[Any, Any] = {}
    for index in range(len(tensorlistlist[0])):
        first = next(each[index] for each in tensorlistlist if each and each[index] is not None)
        lists, indices = groups.setdefault((first.device, first.dtype), ([[] for _ in tensorlistlist], []))
        for own, given in zip(lists, tensorlistlist, strict=True):
            if given:
                own.append(given[index])
        if with_indices:
            indices.append(index)
    return groups


def _pinned(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    copied = tensor.clone()
    copied._is_pinned = True  # type: ignore[attr-defined]
    return copied


@contextmanager
def pretended_cuda() -> Iterator[Seen]:
    """Let this process believe in one CUDA device; gives what was seen since the beginning."""
    global _seen
    _seen = Seen()
    torch._C._ensureCUDADeviceGuardSet()  # without a driver: guards for CUDA devices that do nothing
    device_state = {"current": 0}

    def exchange(index: int) -> int:
        before, device_state["current"] = device_state["current"], index if index >= 0 else device_state["current"]
        return before

    patches = {
        "torch.cuda._lazy_init": lambda: None,
        "torch.cuda.memory._lazy_init": lambda: None,
        "torch.cuda.is_available": lambda: True,
        "torch.cuda.device_count": lambda: 1,
        "torch.cuda.current_device": lambda: 0,
        "torch.cuda._exchange_device": exchange,
        "torch.cuda._maybe_exchange_device": exchange,
        "torch.cuda.manual_seed_all": lambda seed: None,
        "torch.cuda.manual_seed": lambda seed: None,
        "torch.cuda.get_rng_state": lambda device="cuda": torch.get_rng_state(),
        "torch.cuda.set_rng_state": lambda state, device="cuda": torch.set_rng_state(state),
        "torch.cuda.is_current_stream_capturing": lambda: _captured is not None,
        "torch.cuda.CUDAGraph": _Graph,
        "torch.cuda.graph": _capture,
        "torch.cuda.is_bf16_supported": lambda including_emulation=True: True,
        "torch.backends.cudnn.is_acceptable": lambda tensor: False,  # weights of recurrent layers stay as they are
        "torch.cuda.synchronize": lambda device=None: _seen.wait("synchronize"),
        "torch.cuda.empty_cache": lambda: None,
        "torch.cuda.Stream": _Stream,
        "torch.cuda.Event": _Event,
        "torch.cuda.stream": _on_stream,
        "torch.cuda.current_stream": lambda device=None: _Stream(device),
        "torch.accelerator.synchronize": lambda device=None: _seen.wait("synchronize"),
        "torch._C._cuda_getMemoryFraction": lambda index: 1.0,
        "torch._C._cuda_setMemoryFraction": lambda fraction, index: None,
        "torch._C._cuda_memoryStats": lambda index: {
            "allocated_bytes": {"all": {"current": 0}},
            "reserved_bytes": {"all": {"current": 0}},
        },
        "torch._C._cuda_resetPeakMemoryStats": lambda index: None,
        "torch.cuda.cudart": lambda: mock.Mock(cudaMemGetInfo=lambda index: (TOTAL_MEMORY, TOTAL_MEMORY)),
        "torch._C._group_tensors_by_device_and_dtype": _group,
        "torch.Tensor.pin_memory": _pinned,
    }
    with ExitStack() as stack:
        for name, replacement in patches.items():
            stack.enter_context(mock.patch(name, replacement, create=True))
        # torch takes the foreach kernels for its own classes only.
        for module in ("torch.utils._foreach_utils", "torch.optim.optimizer"):
            types = [torch.Tensor, torch.nn.Parameter, GpuTensor]
            stack.enter_context(mock.patch(f"{module}._foreach_supported_types", types, create=True))
        # A parameter that moves becomes another object: `parameter.data = ...` cannot change its Python class.
        overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrites)
        lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") is then a copy that is seen
        stack.callback(torch._C._set_only_lift_cpu_tensors, lifted)
        stack.enter_context(_Mode())
        stack.enter_context(_Autocast())
        yield _seen


def _plain(tree: Any) -> Any:
    """A tree of arguments with the shapes of its tensors in place of them."""
    if isinstance(tree, bool | float | int | str | None):
        return tree
    if isinstance(tree, list | tuple):
        return tuple([_plain(each) for each in tree])
    if isinstance(tree, dict):
        return tuple([(name, _plain(each)) for name, each in tree.items()])
    return tuple(tree.shape) if isinstance(tree, torch.Tensor) else str(tree)
