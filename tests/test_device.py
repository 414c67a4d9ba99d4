"""A job on a device that is not the CPU, where there is no GPU: a stand-in that computes on the CPU all the same, but
refuses what a GPU refuses, tensors of two devices in one operation, and counts how often the host waits for it."""

import math
import tempfile
from multiprocessing import get_context
from pathlib import Path

import torch
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

DEVICE = "standin:0"
aten = torch.ops.aten
CROSSING = {aten._to_copy.default, aten.copy_.default}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}  # by indices of the CPU, too
WAITING = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten._unique2.default}


class Elsewhere(torch.Tensor):
    """A tensor that says it is on the stand-in; what it holds is on the CPU."""

    waits = 0
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, x):
        tensor = torch.Tensor._make_wrapper_subclass(cls, x.size(), strides=x.stride(), dtype=x.dtype,
                                                     storage_offset=x.storage_offset(), device=DEVICE)
        tensor.held = x
        return tensor

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operation is aten._fused_sdp_choice.default:
            return 0  # attention by plain products: the faster kernels are CUDA's or the CPU's
        cls.waits += operation in WAITING
        may_cross = [operation in CROSSING or operation in INDEXING and k == 1 for k in range(len(args))]
        there = [each(held if may else held_there, x) for may, x in zip(may_cross, args)]
        result = operation(*there, **{name: each(held_there, x) for name, x in kwargs.items()})
        returned = operation._schema.returns[:1]
        if returned and returned[0].alias_info and returned[0].alias_info.is_write:  # in place
            return kwargs.get("out", args[:1] and args[0])
        if torch.device(kwargs.get("device") or DEVICE).type == "cpu":
            cls.waits += 1
            return result
        return each(lambda x: cls(x) if type(x) is torch.Tensor else x, result)

    def tolist(self):
        Elsewhere.waits += 1
        return self.held.tolist()

    def untyped_storage(self):  # by which weights are told apart as they are saved
        return self.held.untyped_storage()

    def __reduce_ex__(self, protocol):
        return self.held.__reduce_ex__(protocol)


def each(function, x):
    return type(x)(each(function, part) for part in x) if type(x) in (list, tuple) else function(x)


def held(x):
    return x.held if type(x) is Elsewhere else torch.device("cpu") if type(x) is torch.device else x


def held_there(x):
    if type(x) is torch.Tensor and x.dim():
        raise RuntimeError("tensors of two devices in one operation")
    return held(x)


class Backend(_DummyBackendModule):
    """What torch asks of a device."""

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


def job() -> None:
    torch.set_num_threads(1)
    torch.inference_mode = torch.no_grad  # a view that is made in inference mode asks more of a device
    torch.__future__.set_swap_module_params_on_conversion(True)  # tied weights stay tied
    _setup_privateuseone_for_python_backend("standin", Backend())
    library = torch.library.Library("aten", "IMPL")
    for name, operation in ("empty.memory_format", aten.empty.memory_format), ("empty_strided", aten.empty_strided):
        library.impl(name, lambda *args, operation=operation, **more:
                     Elsewhere(operation(*args, **more | {"device": "cpu"})), "PrivateUse1")
    library.impl("_copy_from", lambda source, target, *_: held(target).copy_(held(source)), "PrivateUse1")
    try:
        torch.ones(2, device=DEVICE) + torch.ones(2)
    except RuntimeError as error:
        assert "two devices" in str(error)
    else:
        raise AssertionError("the stand-in lets devices mix")

    import erpd
    update = erpd.optimise

    def watched(model, optimizer, rollouts, *given):
        """For each micro-batch its two passes, in which transformers looks at positions, and its KL; then the loss, and
        whether it is finite."""
        before, parts = Elsewhere.waits, len(erpd.micro_batches(rollouts, config.tokens_per_step))
        numbers = update(model, optimizer, rollouts, *given)
        assert parts > 1 and Elsewhere.waits - before in (0, 3 * parts + 2)
        return numbers

    erpd.optimise, rows = watched, []
    config = erpd.Config(problems=4, group=8, rounds=1, operands=2, max_new_tokens=32, explore_updates=2, kl_coef=0.1,
                         unlearn_updates=2, distill_updates=4, test_problems=4, test_samples=2, limit_samples=2,
                         curve_samples=0, tokens_per_step=100, checkpointing=1)
    for config.device in "cpu", DEVICE:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(erpd.run(config, Path(folder)))
    assert Elsewhere.waits and len(rows[0]) == 4
    for here, there in zip(*rows, strict=True):
        assert here["pass_rates"] == there["pass_rates"] and math.isclose(here["kl"], there["kl"], abs_tol=1e-5)


def test_a_job_away_from_the_cpu():
    """Mistake: a tensor made without a device, a wait in the midst of an update, or another result than on the CPU."""
    process = get_context("spawn").Process(target=job)  # its own: autograd counts the devices of a process once
    process.start()
    process.join()
    assert process.exitcode == 0
