"""Peak memory of a swap, measured as resident bytes of a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from textwrap import dedent

import pytest

SCRIPT = """
    import gc, json, sys, torch
    from rollmill.moe import MoeConfig, RoutedExperts
    from rollmill.quant import QuantLinear, find_capability, make_scheme
    from rollmill.weight_sync import Policy, SyncPlan

    torch.set_num_threads(1)
    mode, quant = sys.argv[1:]
    cpu, scheme = find_capability("cpu"), make_scheme(quant)
    common = {"capability": cpu, "dtype": torch.bfloat16}
    config = MoeConfig(num_experts=8, top_k=2, hidden_size=1024, intermediate_size=1024)
    slots = []
    for layer in range(3):
        shards = [f"{layer}.{name}" for name in ("q_proj", "k_proj", "v_proj")]
        slots += QuantLinear(shards, [1024] * 3, 1024, scheme, fused=f"{layer}.qkv_proj", **common).slots
        slots += RoutedExperts(f"{layer}.experts", ("w1", "w3", "w2"), config, scheme, **common).slots
    policy = Policy(SyncPlan(slots), mode)

    def weights(value):  # one bucket = one tensor of 2 MiB, made when it is asked for
        for slot in slots:
            for unit in slot.modules:
                for module in unit:
                    yield f"{module}.weight", torch.full((1024, 1024), value, dtype=torch.bfloat16)

    def status(field):
        line = next(line for line in open("/proc/self/status") if line.startswith(field))
        return int(line.split()[1]) * 1024

    policy.update(weights(1.0), "0")
    policy.update(weights(1.5), "1")  # warm
    gc.collect()
    base = status("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")
    policy.update(weights(2.0), "2")
    packed = sum(slot.num_bytes for slot in slots)
    group = max(2 * slot.shape.num_rows * slot.shape.cols for slot in slots)
    print(json.dumps({"peak": status("VmHWM") - base, "packed": packed, "group": group, "bucket": 2 << 20}))
"""

SLACK = 4 << 20  # temporaries of one chunk, Python objects


CASES = [(mode, quant) for mode in ("staged", "streamed") for quant in ("bf16", "fp8", "nvfp4")]


@pytest.mark.parametrize(("mode", "quant"), [*CASES, ("host", "fp8")])
def test_peak_memory_of_a_swap(mode, quant):
    # freed blocks go back to the system at once, so that resident bytes are bytes in use
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", dedent(SCRIPT), mode, quant]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    copies = found["packed"] // 2 if mode == "staged" else 0  # BF16 values: a CPU widens them where they are served
    limit = copies + found["bucket"] + found["group"]
    print({key: f"{value / 2**20:.1f} MiB" for key, value in {**found, "limit": limit}.items()})
    quantized = 0 if quant == "bf16" else found["group"] // 2  # a group's codes, between its BF16 and packed forms
    assert found["peak"] <= limit + quantized + SLACK
    assert mode != "staged" or found["peak"] > copies * 0.9  # the measure works
