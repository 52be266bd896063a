"""The plain loop with the usual tuning: channels_last, bf16 where the CPU has instructions for it, a worker a core."""

import os

from peers.common import main
from peers.loop import Style, rates

if __name__ == "__main__":
    import torch

    # Public names for these two probes do not exist yet (torch 2.14); without such instructions bf16 is emulated.
    bf16 = any(getattr(torch.cpu, name, bool)() for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    main(lambda row: rates(row, Style(bf16=bf16, channels_last=True, workers=workers)))
