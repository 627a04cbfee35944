"""liger-kernel's RMSNorm, SwiGLU and rotary embedding on the modules of one model.

Liger's own patch rebinds transformers' classes and functions, for every model of the process. Here the forward of each
module is set on the instance, so that a plain model beside ours stays transformers'.
"""

from __future__ import annotations

from types import FunctionType, MethodType

from torch import nn

try:
    from liger_kernel.transformers.rms_norm import LigerRMSNorm
    from liger_kernel.transformers.rope import liger_rotary_pos_emb
    from liger_kernel.transformers.swiglu import LigerSwiGLUMLP
except ImportError:
    LigerRMSNorm = None


def use_liger(model: nn.Module) -> int:
    """Sets Liger's forwards on the modules of `model` (on a GPU); returns on how many, 0 without liger-kernel.

    m-RoPE: transformers merges the three rows of positions into one table of angles before the first layer, so that the
    layers need the plain rotary kernel.
    """
    if LigerRMSNorm is None:
        return 0
    done = 0
    for module in model.modules():
        forward = _rms_norm(module) or _swiglu(module) or _attention(module)
        if forward is not None:
            module.forward = MethodType(forward, module)
            done += 1
    return done


def _rms_norm(module):
    if not type(module).__name__.endswith("RMSNorm") or not hasattr(module, "variance_epsilon"):
        return None
    # in_place: the gradient of the output would be overwritten; row_mode None: Liger chooses by size
    module.offset, module.casting_mode, module.in_place, module.row_mode = 0.0, "llama", False, None
    module.elementwise_affine = True
    return LigerRMSNorm.forward


def _swiglu(module):
    parts = all(isinstance(getattr(module, name, None), nn.Linear) for name in ("gate_proj", "up_proj", "down_proj"))
    return LigerSwiGLUMLP.forward if parts and "silu" in type(module.act_fn).__name__.lower() else None


def _attention(module):
    """The class's own forward, which finds Liger's function under the name of transformers'."""
    forward, name = type(module).forward, "apply_rotary_pos_emb"
    if name not in getattr(forward, "__globals__", {}) or name not in forward.__code__.co_names:
        return None
    ours = FunctionType(forward.__code__, {**forward.__globals__, name: liger_rotary_pos_emb}, forward.__name__,
                        forward.__defaults__, forward.__closure__)  # fmt: skip
    ours.__kwdefaults__ = forward.__kwdefaults__
    return ours
