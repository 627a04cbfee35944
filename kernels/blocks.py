"""Sizes the kernels run with: the one table to edit after a measurement.

2026-11-20: from arithmetic and compiled code, for sm_90; no device has timed them yet. A row is read by 256 threads, two
16-byte loads each in flight: six such blocks of 40 registers or fewer keep 48 KiB on their way to each SM, twice what
4.3 TB/s at 0.7 us ask of 132 SMs (23 KiB). `bench/sm90.py` lists registers and spills of each.
"""

WARPS = 8  # per program, of every kernel here
LANES = 512  # softmax forward: running maxima and sums of a row, two a thread; each takes 16 bytes of logits a step
BLOCK = 4096  # softmax backward: logits of a program
SCALE_BLOCK = 2**13  # elements a program of the scaling kernel multiplies, or leaves when the factor is 1

# Bytes of one chunk of logits of the linear forms, gradients in it included. On a GPU the float32 weight gradient, 1.2 GB
# at V = 151,936 and H = 2,048, is read and written once a chunk: at 4 GiB, 4,700 rows in bf16, that is a twentieth of the
# chunk's three products. On a CPU the chunk shall stay in the last-level cache.
CHUNK_BYTES = {"cuda": 2**32, "cpu": 2**24}
