"""A stand-in for a device without float64, such as Apple's MPS. Its tensors live on the CPU, but say that they do not.

As on such a device, making a float64 tensor is an error, and so is an operation on tensors of two devices. Importing
this file registers the device "standin" for the whole process, so tests do it in a process of their own.
Leaves out: speed, memory, and which operations a real device has.
"""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from modeling_blsp_kd import devices


class _Module(_DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]


_setup_privateuseone_for_python_backend("standin", _Module())
DEVICE = torch.device("standin", 0)
devices.WITHOUT_FLOAT64.add("standin")


class StandInTensor(torch.Tensor):
    """A tensor on the stand-in device, which holds its values in one on the CPU."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )

    def __init__(self, held):
        self.held = held

    def __repr__(self):
        return f"StandInTensor({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def run(func, args, kwargs):
    """Run an operation on the held tensors, and hold its results, unless it takes them to the CPU."""
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, StandInTensor)]
    device = kwargs.get("device")
    if func is torch.ops.aten.copy_.default:
        goes_here = isinstance(args[0], StandInTensor)
    elif device is not None:
        goes_here = torch.device(device).type == DEVICE.type
    else:
        goes_here = bool(ours)
        # Real devices take numbers from the CPU, and indices.
        if ours and any(tensor.ndim and not isinstance(tensor, StandInTensor) for tensor in tensors):
            if func not in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default):
                raise RuntimeError(
                    f"{func}: expected all tensors on one device, but some are on {DEVICE}, some on cpu."
                )
    if device is not None:
        kwargs = {**kwargs, "device": "cpu"}

    def held(value):
        return value.held if isinstance(value, StandInTensor) else value

    if ours and kwargs.get("dtype") == torch.float64:
        raise TypeError(f"{func}: {DEVICE} has no float64 to convert to. Move the tensor first.")
    result = func(*tree_map(held, args), **tree_map(held, kwargs))
    if not goes_here:
        return result
    back = {id(tensor.held): tensor for tensor in ours}

    def hold(value):
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) in back:
            return back[id(value)]  # in place
        if value.dtype == torch.float64:
            raise TypeError(f"{func}: {DEVICE} has no float64.")
        return StandInTensor(value)

    return tree_map(hold, result)


class _Operations(TorchDispatchMode):
    """Serves what makes tensors on the stand-in device or moves them there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class StandInDevice(TorchFunctionMode):
    """While this is entered, the stand-in device exists.

    What PyTorch makes of Python numbers below all dispatching (`torch.tensor`, lists as indices) is made on the CPU.
    """

    def __enter__(self):
        self.operations = _Operations()
        self.operations.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.operations.__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and kwargs.get("device") is not None:
            device = kwargs["device"]
            return func(*args, **{**kwargs, "device": "cpu"}).to(device)
        if args and isinstance(args[0], StandInTensor):
            if func is torch.Tensor.new_tensor:
                device = kwargs.get("device") or DEVICE
                dtype = kwargs.get("dtype") or args[0].dtype
                return torch.tensor(args[1], dtype=dtype).to(device)
            if func is torch.Tensor.tolist:
                return args[0].held.tolist()
            if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and isinstance(args[1], list):
                args = (args[0], torch.tensor(args[1]), *args[2:])
        return func(*args, **kwargs)
