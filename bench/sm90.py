"""What every kernel compiles to for sm_90: registers, spilled bytes, shared memory, widest load. Needs no GPU.

    python bench/sm90.py [--out FILE.jsonl] [--only NAME]

Compiles with the Triton it finds and reads the cubin with the cuobjdump inside that Triton; another version: PYTHONPATH.
Ends with 1 when a kernel spills.
"""

import sys

sys.path[:] = [p for p in sys.path if not p.rstrip("/").endswith("/bench")]  # bench/ holds names like kernels.py

import argparse
import importlib
import json
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pr1.kernels import blocks

TARGET = GPUTarget("cuda", 90, 32)


@dataclass(frozen=True)
class Entry:
    name: str
    kernel: str  # module:function
    arguments: (
        dict  # name -> "*bf16", "i32", "fp32", ...: all but the constants; pointers that Triton may specialise are
    )
    # taken to be 16-byte aligned, those in do_not_specialize not
    constants: dict = field(default_factory=dict)
    num_warps: int = blocks.WARPS


ROWS = {"n": "i32", "row_units": "i32"}
SCALES = {"scale": "fp32", "inverse": "fp32"}
WIDTH = {"bf16": 8, "fp16": 8, "fp32": 4}


def forward(dtype: str, unit: int = 16, lanes: int = blocks.LANES) -> Entry:
    arguments = {"logits": f"*{dtype}", "tokens": "*i64", "index": "*i64", "weight": "*fp32", "out": "*fp32", **ROWS,
                 "v_units": "i32", **SCALES}  # fmt: skip
    constants = {"UNIT": unit, "LANES": lanes, "WIDTH": WIDTH[dtype], "INDEXED": True, "WEIGHTED": True}
    return Entry(f"softmax forward {dtype} unit {unit} lanes {lanes}", "pr1.kernels.softmax_triton:forward_kernel",
                 arguments, constants)  # fmt: skip


def backward(dtype: str, out: str, unit: int = 16, block: int = blocks.BLOCK) -> Entry:
    arguments = {"logits": f"*{dtype}", "out": f"*{out}", "tokens": "*i64", "index": "*i64", "rows": "*fp32",
                 "dlogp": "*fp32", "dentropy": "*fp32", **ROWS, "out_units": "i32", "v_units": "i32",
                 "blocks_per_row": "i32", **SCALES}  # fmt: skip
    constants = {"UNIT": unit, "BLOCK": block, "INDEXED": True}
    return Entry(f"softmax backward {dtype} to {out} unit {unit} block {block}",
                 "pr1.kernels.softmax_triton:backward_kernel", arguments, constants)  # fmt: skip


def scale(dtype: str) -> Entry:
    return Entry(f"scale {dtype} block {blocks.SCALE_BLOCK}", "pr1.kernels.softmax_triton:scale_kernel",
                 {"x": f"*{dtype}", "factor": "*fp32", "units": "i32"},
                 {"UNIT": 16, "BLOCK": blocks.SCALE_BLOCK})  # fmt: skip


def sample(dtype: str, greedy: bool = False) -> Entry:
    arguments = {"x_ptr": f"*{dtype}", "key_ptr": "*i64", "class_ptr": "*i8", "forbid_ptr": "*i1", "token_ptr": "*i64",
                 "logp_ptr": "*fp32", "entropy_ptr": "*fp32", "kept_ptr": "*fp32", "vocab": "i32", "stride": "i32",
                 "inverse": "fp32"}  # fmt: skip
    return Entry(f"sample {dtype}" + " greedy" * greedy, "pr1.kernels.sample_triton:_sample", arguments,
                 {"GREEDY": greedy, "FORBID": True, "BLOCK": 4096}, num_warps=8)  # fmt: skip


def decode(part: str, dtype: str, tile: int, repeat: int = 8) -> Entry:
    """Attention of a decoding step: 2 KV heads of 128 with `repeat` query heads each, as in Qwen2.5-VL-3B."""
    pointers = {"prefix": "q k v", "suffix": "q new_k new_v k v"}[part].split()
    own = {"prefix": {"length_ptr": "*i32", "members_ptr": "*i32", "part_ptr": "*fp32", "lse_ptr": "*fp32",
                      **dict.fromkeys("width tiles slot_tokens split_tokens splits".split(), "i32")},
           "suffix": {"length_ptr": "*i64", "part_ptr": "*fp32", "lse_ptr": "*fp32", "out_ptr": f"*{dtype}",
                      **dict.fromkeys("slot_tokens splits new_k_stride new_v_stride".split(), "i32")}}[part]  # fmt: skip
    return Entry(f"decode {part} {dtype} tile {tile}", f"pr1.kernels.decode_attention_triton:_{part}_kernel",
                 {**{f"{p}_ptr": f"*{dtype}" for p in pointers}, **own, "scale": "fp32"},
                 {"HEADS": 2, "REPEAT": repeat, "DIM": 128, "TILE": tile, "KEYS": 64}, num_warps=4 if tile < 64 else 8)  # fmt: skip


# At production block sizes. Another kernel: one more line.
KERNELS = [
    *(forward(dtype) for dtype in WIDTH),
    *(backward(dtype, dtype) for dtype in WIDTH),
    backward("fp32", "bf16"),
    backward("fp32", "fp16"),
    forward("bf16", unit=1),
    backward("bf16", "bf16", unit=1),
    *(scale(dtype) for dtype in WIDTH),
    *(sample(dtype, greedy) for dtype in ("bf16", "fp32") for greedy in (False, True)),
    *(decode("prefix", "bf16", tile) for tile in (16, 64)),
    decode("suffix", "bf16", 16),
]


def compile_entry(entry: Entry) -> dict:
    """Registers a thread, spilled (stack and local) bytes a thread, shared bytes a program, widest global load in bytes."""
    module, _, function = entry.kernel.partition(":")
    kernel = getattr(importlib.import_module(module), function)
    names = kernel.arg_names
    missing = set(names) ^ {*entry.arguments, *entry.constants}
    if missing:
        raise ValueError(f"{entry.name}: arguments do not fit the kernel: {sorted(missing)}")
    signature = {n: entry.arguments.get(n, "constexpr") for n in names}
    constants = {(names.index(n),): value for n, value in entry.constants.items()}
    free = {p.name for p in kernel.params if p.do_not_specialize or p.do_not_specialize_on_alignment}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names)
               if signature[n].startswith("*") and n not in free}  # fmt: skip
    source = ASTSource(kernel, signature, constants, aligned)
    compiled = triton.compile(source, target=TARGET, options={"num_warps": entry.num_warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
        usage = subprocess.run([tool, "-res-usage", cubin.name], check=True, capture_output=True, text=True).stdout
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    loads = re.findall(r"ld\.global(?:\.\w+)*?(?:\.v(\d))?\.[bfsu](\d+)", compiled.asm["ptx"])
    return {
        "kernel": entry.name, "triton": triton.__version__, "arch": "sm_90", "warps": entry.num_warps,
        "registers": used["REG"], "spilled": used["STACK"] + used["LOCAL"], "shared": compiled.metadata.shared,
        "widest_load": max((int(vector or 1) * int(bits) // 8 for vector, bits in loads), default=0),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", help="one JSON object a kernel, appended")
    parser.add_argument("--only", default="", help="kernels whose name holds this")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing; unset it")
    results = []
    print(f"| kernel (triton {triton.__version__}, sm_90) | warps | registers | spilled bytes | shared bytes | "
          "widest load, bytes |\n|---|--:|--:|--:|--:|--:|")  # fmt: skip
    for entry in KERNELS:
        if options.only in entry.name:
            results.append(compile_entry(entry))
            columns = ("kernel", "warps", "registers", "spilled", "shared", "widest_load")
            print("| " + " | ".join(str(results[-1][c]) for c in columns) + " |", flush=True)
    if options.out:
        with open(options.out, "a") as file:
            file.writelines(json.dumps(r) + "\n" for r in results)
    return int(any(r["spilled"] for r in results))


if __name__ == "__main__":
    sys.exit(main())
